//! Lists of the pictures in a folder, and captions.

use std::fs;

use ett::data::Source;

use super::{open, scratch};

pub fn run(bytes: &[u8]) {
    let folder = scratch("folder");
    fs::write(folder.join("a.png"), b"").expect("a picture");
    for name in ["metadata.jsonl", "metadata.csv", "a.txt"] {
        let path = folder.join(name);
        fs::write(&path, bytes).expect("a file");
        open(Source::Folder, &folder);
        fs::remove_file(&path).expect("its end");
    }
}
