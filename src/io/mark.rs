//! Marks of files: enough to tell whether two hosts have the same ones.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::{CONFIG, METRICS, WEIGHTS, model_folder};
use crate::error::{Error, Result};

/// Bytes at each end of a file that are compared.
const END: u64 = 1 << 20;

/// The size of a file and a checksum of its ends, where headers are; of a folder, those of all files directly in it, by name,
/// except hidden ones; of a run, those of the folder of its weights.
pub fn mark(path: &Path) -> Result<String> {
    if !path.is_dir() {
        return of_file(path);
    }
    // The folder of a run that is trained has files that differ from copy to copy.
    let folder = if path.join(CONFIG).is_file() { model_folder(path)? } else { path.into() };
    let weights = folder.join(WEIGHTS);
    if folder != path || (path.join(METRICS).is_file() && weights.is_file()) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        return Ok(format!("{name}, {}", of_file(&weights)?));
    }
    let io = Error::io(path);
    let entries =
        std::fs::read_dir(path).and_then(|all| all.collect::<std::io::Result<Vec<_>>>()).map_err(io)?;
    let hidden = |p: &Path| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
    let mut files: Vec<_> = entries.iter().map(|e| e.path()).filter(|p| p.is_file() && !hidden(p)).collect();
    files.sort();
    let line = |p: &std::path::PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        Ok(format!("{name}: {}", of_file(p)?))
    };
    Ok(files.iter().map(line).collect::<Result<Vec<_>>>()?.join("\n"))
}

fn of_file(path: &Path) -> Result<String> {
    let io = || Error::io(path);
    let mut file = File::open(path).map_err(io())?;
    let size = file.metadata().map_err(io())?.len();
    let mut sum = crc32fast::Hasher::new();
    for start in [0, size.saturating_sub(END)] {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(start)).map_err(io())?;
        (&mut file).take(END).read_to_end(&mut bytes).map_err(io())?;
        sum.update(&bytes);
    }
    Ok(format!("{size} bytes, checksum {:08x}", sum.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_tell_files_apart() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = std::env::temp_dir().join(format!("ett-mark-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        let path = dir.join("a");
        let mut bytes = vec![7u8; 3 << 20];
        let mut marks = Vec::new();
        for at in [0, bytes.len() - 1] {
            bytes[at] += 1;
            std::fs::write(&path, &bytes)?;
            marks.push(mark(&path)?);
        }
        std::fs::write(dir.join("b"), b"")?;
        std::fs::write(dir.join(".lock"), b"1")?;
        let folder = mark(&dir)?;
        // A run: the metrics do not matter.
        let run = dir.join("run");
        std::fs::create_dir_all(&run)?;
        for (file, text) in [(CONFIG, "a"), (METRICS, "b"), (WEIGHTS, "c")] {
            std::fs::write(run.join(file), text)?;
        }
        let of_run = mark(&run)?;
        std::fs::write(run.join(METRICS), "bb")?;
        assert_eq!(of_run, mark(&run)?);
        assert!(of_run.starts_with("run, 1 bytes"), "{of_run}");
        std::fs::remove_dir_all(&dir)?;
        assert_ne!(marks[0], marks[1]);
        assert_eq!(folder, format!("a: {}\nb: 0 bytes, checksum 00000000", marks[1]));
        assert!(mark(&path).is_err_and(|e| e.to_string().contains("ett-mark-")));
        Ok(())
    }
}
