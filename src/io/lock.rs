//! One process at a time in a run folder.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The file in a run folder that is locked for as long as a run lives. The system unlocks it when the process ends, in
/// whatever way, so that the file alone means nothing.
const LOCK: &str = ".lock";

/// A locked run folder.
pub(crate) struct Lock {
    /// `None` on file systems without locks.
    file: Option<File>,
    folder: PathBuf,
    new_file: bool,
    new_folder: bool,
}

impl Lock {
    /// Locks a run folder, which is made if it is not there.
    pub fn take(folder: &Path) -> Result<Self> {
        loop {
            let new_folder = !folder.is_dir();
            std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
            let path = folder.join(LOCK);
            let new_file = !path.exists();
            let mut options = File::options();
            let mut file = match options.read(true).write(true).create(true).truncate(false).open(&path) {
                Ok(file) => file,
                // Another process has just given its new folder up.
                Err(e) if e.kind() == std::io::ErrorKind::NotFound && !folder.is_dir() => continue,
                Err(e) => return Err(Error::io(&path)(e)),
            };
            let lock = |file| Lock { file, folder: folder.into(), new_file, new_folder };
            match file.try_lock() {
                // Unless it was removed since it was opened.
                Ok(()) if !same(&file, &path) => continue,
                Ok(()) => {
                    // Only for the other's message.
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
                        "{}: cannot be locked ({e}); see to it that no other run uses this folder",
                        folder.display()
                    );
                    return Ok(lock(None));
                }
            }
        }
    }

    /// Unlocks a folder in which no run has begun, and removes what taking the lock has made.
    pub fn abandon(self) {
        if self.new_file && self.file.is_some() {
            let _ = std::fs::remove_file(self.folder.join(LOCK));
        }
        if self.new_folder {
            // Fails if something else is in it.
            let _ = std::fs::remove_dir(&self.folder);
        }
    }
}

/// Whether a path still names an open file.
#[cfg(unix)]
fn same(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// An open file cannot be removed there.
#[cfg(not(unix))]
fn same(_: &File, _: &Path) -> bool {
    true
}
