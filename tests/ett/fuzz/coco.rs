//! The captions of COCO.

use std::fs;

use ett::data::Source;

use super::{open, scratch};

pub fn run(bytes: &[u8]) {
    let path = scratch("coco").join("a.json");
    fs::write(&path, bytes).expect("a file");
    open(Source::Coco, &path);
}
