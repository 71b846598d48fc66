//! The crate's one error type. Every message is one sentence that names what was got and what was
//! wanted; where a remedy is known it follows as a hint.

use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A kernel or an op was given an argument that its contract forbids.
    #[error("{op}: argument `{arg}` is {got}, wanted {want}")]
    Argument {
        /// Name of the op or kernel.
        op: &'static str,
        /// Name of the argument.
        arg: &'static str,
        /// What was given.
        got: String,
        /// What the contract asks for.
        want: String,
    },
    /// The device does not implement this case.
    #[error("{op}: {what} is not supported by {device}")]
    Unsupported {
        /// Name of the op or kernel.
        op: &'static str,
        /// The case that is missing.
        what: String,
        /// The device that was asked.
        device: String,
    },
    /// An allocation failed.
    #[error(
        "out of memory on {device}: {asked} were asked for as {role}, {free}; {held}; \
         use a smaller batch, or see `--plan` for what a step needs"
    )]
    OutOfMemory {
        /// The device that was asked.
        device: String,
        /// Role of the buffer.
        role: String,
        /// Bytes asked for, with their unit.
        asked: String,
        /// What there was.
        free: String,
        /// The largest roles at that moment.
        held: String,
    },
    /// A device cannot be used, or failed.
    #[error("{device}: {what}")]
    Device {
        /// The device.
        device: String,
        /// What is wrong and what would help.
        what: String,
    },
    /// A configuration value is impossible.
    #[error("configuration: `{key}` is {got}, wanted {want}")]
    Config {
        /// Dotted key.
        key: String,
        /// The value found.
        got: String,
        /// What is allowed.
        want: String,
    },
    /// A weights file does not fit the model.
    #[error("{path}: {what}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong, tensor names included.
        what: String,
    },
    /// A data set or one of its files cannot be used.
    #[error("{path}: {what}")]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
    /// The operating system refused a file operation.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A signal asked for an end.
    #[error("interrupted")]
    Interrupted,
    /// Training cannot go on.
    #[error("training stopped: {0}")]
    Training(String),
}

impl Error {
    /// An [`Error::Argument`] from anything printable.
    pub fn arg(op: &'static str, arg: &'static str, got: impl ToString, want: impl ToString) -> Self {
        Error::Argument { op, arg, got: got.to_string(), want: want.to_string() }
    }

    /// An [`Error::Device`] from anything printable.
    pub fn device(device: impl ToString, what: impl ToString) -> Self {
        Error::Device { device: device.to_string(), what: what.to_string() }
    }

    /// An [`Error::Config`] from anything printable.
    pub fn config(key: impl ToString, got: impl ToString, want: impl ToString) -> Self {
        Error::Config { key: key.to_string(), got: got.to_string(), want: want.to_string() }
    }

    /// An [`Error::Data`] about `path`.
    pub fn data(path: impl AsRef<Path>, what: impl ToString) -> Self {
        Error::Data { path: path.as_ref().into(), what: what.to_string() }
    }

    /// An [`Error::Weights`] about `path`.
    pub fn weights(path: impl AsRef<Path>, what: impl ToString) -> Self {
        Error::Weights { path: path.as_ref().into(), what: what.to_string() }
    }

    /// The message without the path that it begins with, to stand beside it.
    pub fn reason(&self, path: &Path) -> String {
        let text = self.to_string();
        text.strip_prefix(&format!("{}: ", path.display())).unwrap_or(&text).into()
    }

    /// Attaches a path to an I/O error: `fs::read(p).map_err(Error::io(p))`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Error::Io { path, source }
    }
}
