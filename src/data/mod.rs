//! The host side of training data: pictures, captions and questions from folders or drawn by the program, text
//! tokenization and the order in which samples are visited. Nothing here touches a device.

mod cache;
mod draw;
mod folder;
mod image;
mod jpeg;
mod plain;
mod plan;
mod save;
mod scenes;
mod source;
mod text;
mod words;

pub use cache::{Drawn, ImageSet, LoadOptions, Skipped};
pub use draw::{Drawing, Split};
pub use folder::{Folder, Sample, pictures};
pub use image::{Crop, Image, fit, fit_multiple, grid};
pub use plain::{read_text, trimmed};
pub use plan::Order;
pub use save::{Format, save, save_png};
pub use scenes::Scenes;
pub use source::{DataSet, DataSource, Source, Wanted};
pub use text::{Special, TextTokenizer};
pub use words::Words;

/// A folder of its own for each test.
#[cfg(test)]
mod scratch {
    use std::path::{Path, PathBuf};

    pub struct Scratch(PathBuf);

    impl Scratch {
        pub fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("ett-data-{}-{name}", std::process::id()));
            let _ = std::fs::remove_dir_all(&root);
            std::fs::create_dir_all(&root).unwrap();
            Scratch(root)
        }

        pub fn root(&self) -> &Path {
            &self.0
        }

        pub fn path(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        pub fn write(&self, name: &str, bytes: &[u8]) {
            let path = self.path(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}
