//! Restricts a run folder to one process at a time.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file in a run folder that is locked while a run is alive. The system releases the lock when the process ends
/// for any reason, so the existence of the file alone has no meaning.
const LOCK: &str = ".lock";

/// A locked run folder.
pub(crate) struct Lock {
    /// `None` on file systems without locking.
    file: Option<File>,
    folder: PathBuf,
    new_file: bool,
    new_folder: bool,
}

impl Lock {
    /// Locks a run folder, which is created if it does not exist.
    pub fn take(folder: &Path) -> Result<Self> {
        loop {
            let new_folder = !folder.is_dir();
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            let path = folder.join(LOCK);
            let new_file = !path.exists();
            let mut options = File::options();
            let mut file = match options.read(true).write(true).create(true).truncate(false).open(&path) {
                Ok(file) => file,
                // Another process has just removed its new folder.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && !folder.is_dir() => continue,
                Err(e) => return Err(Error::io(&path)(e)),
            };
            let lock = |file| Lock { file, folder: folder.into(), new_file, new_folder };
            match file.try_lock() {
                // The file was removed after it was opened.
                Ok(()) if !same(&file, &path) => continue,
                Ok(()) => {
                    // The process id is only for the error message of other processes.
                    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                    return Ok(lock(Some(file)));
                }
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    let _ = file.read_to_string(&mut text);
                    let who = match text.trim().parse::<u32>() {
                        Ok(id) => format!("process {id}"),
                        Err(_) => "another process".into(),
                    };
                    let what = format!(
                        "is in use by {who}; wait for it to end (Ctrl-C there saves and ends it), or name another \
                         folder"
                    );
                    return Err(Error::data(folder, what));
                }
                Err(TryLockError::Error(e)) => {
                    tracing::warn!(
                        "{}: cannot be locked ({e}); make sure that no other run uses this folder",
                        folder.display()
                    );
                    return Ok(lock(None));
                }
            }
        }
    }

    /// Unlocks a folder in which no run has begun, and removes what [`Lock::take`] created.
    pub fn abandon(self) {
        if self.new_file && self.file.is_some() {
            let _ = std::fs::remove_file(self.folder.join(LOCK));
        }
        if self.new_folder {
            // Fails if the folder is not empty.
            let _ = std::fs::remove_dir(&self.folder);
        }
    }
}

/// Whether a path still refers to an open file.
#[cfg(unix)]
fn same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Other systems do not remove open files.
#[cfg(not(unix))]
fn same(_: &File, _: &Path) -> bool {
    true
}
