//! Every target on the files of `tests/fuzz`: small valid ones, from which the fuzzer starts, and those that it found.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::{TARGETS, scratch};
use crate::common::{Outcome, Scratch};
use crate::memory;

/// Set in the child process that runs the targets.
const INSIDE: &str = "ETT_TEST_FUZZ_INPUTS";
/// Far more than any input needs.
const SLOW: Duration = Duration::from_secs(60);
/// Bytes of the heap that an input may take.
const MOST: usize = 640 << 20;

fn files(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = fs::read_dir(folder)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// In a process of its own, because of its memory, its cache, and faults that end a process.
#[test]
fn inputs_of_the_fuzzer() -> Outcome {
    let all = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz");
    if std::env::var_os(INSIDE).is_none() {
        let dir = Scratch::new();
        let out = Command::new(std::env::current_exe()?)
            .args(["fuzz::inputs::inputs_of_the_fuzzer", "--exact", "--nocapture", "--test-threads=1"])
            .env(INSIDE, "1")
            .env("ETT_CACHE", dir.path("cache"))
            .output()?;
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
        assert!(text.contains("1 passed"), "{text}");
        return Ok(());
    }
    let folders: Vec<PathBuf> = TARGETS.iter().map(|(name, _)| all.join(name)).collect();
    assert_eq!(files(&all)?, folders, "a folder for each target");
    for (folder, (_, target)) in folders.iter().zip(TARGETS) {
        for file in files(folder)? {
            println!("{}", file.display());
            let start = Instant::now();
            target(&fs::read(file)?);
            assert!(start.elapsed() < SLOW, "{:?}", start.elapsed());
            assert!(memory::peak() < MOST, "{} bytes", memory::peak());
        }
    }
    fs::remove_dir_all(scratch(""))?;
    Ok(())
}
