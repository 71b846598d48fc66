//! Tables in Parquet files.

use std::fs;

use ett::data::Source;

use super::{open, scratch};

pub fn run(bytes: &[u8]) {
    let path = scratch("parquet").join("a.parquet");
    fs::write(&path, bytes).expect("a file");
    open(Source::Parquet, &path);
}
