//! Fuzz targets: what misbehaves on an input fails by a panic. `tools/fuzz` is made from these files too.

use std::fs;
use std::path::{Path, PathBuf};

use ett::data::{Bitmap, Columns, Listed, Source, Split, Wanted};

mod coco;
mod config;
mod folder;
#[cfg(test)]
mod inputs;
mod llava;
mod parquet;
mod pictures;
mod tar;
mod vector;
mod weights;

/// Fails by a panic if the program misbehaves on an input.
pub type Target = fn(&[u8]);

/// All of them, by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("coco", coco::run),
    ("config", config::run),
    ("folder", folder::run),
    ("gguf", weights::gguf),
    ("llava", llava::run),
    ("parquet", parquet::run),
    ("pickle", weights::pickle),
    ("pictures", pictures::run),
    ("safetensors", weights::safetensors),
    ("tar", tar::run),
    ("vector", vector::run),
];

/// Samples whose pictures are decoded.
const DECODED: usize = 4;

/// A folder for the files of one target of this process.
fn scratch(target: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("ett-fuzz-{}", std::process::id())).join(target);
    fs::create_dir_all(&folder).expect("a scratch folder");
    folder
}

/// Opens `path` as the data of `source`, and decodes a few of its pictures. The same file gives the same samples, or the
/// same error.
fn open(source: Source, path: &Path) {
    let columns = Columns::default();
    for split in [Split::Train, Split::Test] {
        let wanted =
            Wanted { split, path: Some(path), images: None, columns: &columns, samples: 0, size: 64 };
        let first = source.open(&wanted).map_err(|e| e.to_string());
        let again = source.open(&wanted).map_err(|e| e.to_string());
        match (first, again) {
            (Ok(first), Ok(again)) => {
                assert_eq!(first.samples, again.samples);
                list(&first);
            }
            (Err(first), Err(again)) => assert_eq!(first, again),
            (first, again) => panic!("{first:?}, then {again:?}"),
        }
    }
}

fn list(listed: &Listed) {
    for (i, sample) in listed.samples.iter().enumerate() {
        assert!(!sample.has_picture() || sample.image.starts_with(&listed.root), "{sample:?}");
        assert!(sample.captions.iter().all(|c| !c.trim().is_empty()), "{sample:?}");
        assert!(sample.chats.iter().all(|c| !c.turns.is_empty()), "{sample:?}");
        if let Some(Ok(bitmap)) = (i < DECODED).then(|| listed.pictures.decode(i, 64)) {
            whole(&bitmap);
        }
    }
}

/// A picture has the bytes that its sides say.
fn whole(Bitmap { height, width, rgb }: &Bitmap) {
    assert!(*height > 0 && *width > 0);
    assert_eq!(rgb.len(), height * width * 3);
}
