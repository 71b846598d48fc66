//! The crate's error type. Every message is one sentence that says what was got and what was wanted, followed by the
//! remedy if one is known.

use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument of a kernel or an op violates its contract.
    #[error("{op}: argument `{arg}` is {got}, wanted {want}")]
    Argument {
        /// Name of the op or kernel.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
        /// The given value.
        got: String,
        /// The values that the contract allows.
        want: String,
    },
    /// The device does not implement this case.
    #[error("{op}: {what} is not supported by {device}")]
    Unsupported {
        /// The op or kernel.
        op: &'static str,
        /// The unsupported case.
        what: String,
        /// The device.
        device: String,
    },
    /// An allocation failed.
    #[error(
        "out of memory on {device}: {asked} of {role} memory requested, {free}; {held}; \
         use a smaller batch, or see `--plan` for what a step needs"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Role of the buffer.
        role: String,
        /// Requested bytes, with their unit.
        asked: String,
        /// The memory that was free.
        free: String,
        /// The roles that held the most memory.
        held: String,
    },
    /// A device cannot be used or has failed.
    #[error("{device}: {what}")]
    Device {
        /// The device.
        device: String,
        /// What is wrong, and the remedy.
        what: String,
    },
    /// A configuration value is invalid.
    #[error("configuration: `{key}` is {got}, wanted {want}")]
    Config {
        /// Dotted key.
        key: String,
        /// The value found.
        got: String,
        /// The allowed values.
        want: String,
    },
    /// A weights file does not fit the model.
    #[error("{path}: {what}")]
    Weights {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the names of tensors.
        what: String,
    },
    /// A data set or one of its files cannot be used.
    #[error("{path}: {what}")]
    Data {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and the remedy.
        what: String,
    },
    /// A file was written in another format than this program reads.
    #[error("{path}: {what}")]
    Format {
        /// The file.
        path: PathBuf,
        /// The formats, and the remedy.
        what: String,
    },
    /// The operating system refused a file operation.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A signal asked the program to stop.
    #[error("interrupted")]
    Interrupted,
    /// The ranks that train together cannot find each other or disagree, or one of them has ended.
    #[error("{0}")]
    Rank(String),
    /// Training cannot continue.
    #[error("training stopped: {0}")]
    Training(String),
    /// A device failed in a stage.
    #[error("stage {stage}{}: {source}{remedy}", step.map_or(String::new(), |step| format!(", step {step}")))]
    Stage {
        /// The kind of the stage.
        stage: String,
        /// Step in the stage, from 0; `None` before the first one.
        step: Option<usize>,
        /// The error of the device, which names the op.
        source: Box<Error>,
        /// Empty, or the remedy, with the semicolon before it.
        remedy: String,
    },
}

impl Error {
    /// An [`Error::Argument`]; `got` and `want` may be anything printable.
    pub fn arg(op: &'static str, arg: &'static str, got: impl ToString, want: impl ToString) -> Self {
        Error::Argument { op, arg, got: got.to_string(), want: want.to_string() }
    }

    /// An [`Error::Device`]; the arguments may be anything printable.
    pub fn device(device: impl ToString, what: impl ToString) -> Self {
        Error::Device { device: device.to_string(), what: what.to_string() }
    }

    /// An [`Error::Config`]; the arguments may be anything printable.
    pub fn config(key: impl ToString, got: impl ToString, want: impl ToString) -> Self {
        Error::Config { key: key.to_string(), got: got.to_string(), want: want.to_string() }
    }

    /// An [`Error::Data`] about `path`.
    pub fn data(path: impl AsRef<Path>, what: impl ToString) -> Self {
        Error::Data { path: path.as_ref().into(), what: what.to_string() }
    }

    /// An [`Error::Weights`] about `path`. Names of tensors and files come from other people's files, so control characters
    /// are escaped.
    pub fn weights(path: impl AsRef<Path>, what: impl ToString) -> Self {
        let what = what.to_string();
        let escaped = |c: char| match c.is_control() {
            true => c.escape_default().to_string(),
            false => c.to_string(),
        };
        let what = if what.contains(char::is_control) { what.chars().map(escaped).collect() } else { what };
        Error::Weights { path: path.as_ref().into(), what }
    }

    /// Says in which stage and step a device failed; all other errors stay as they are.
    pub fn at(self, stage: &str, step: Option<usize>) -> Self {
        use Error::{Argument, Device, OutOfMemory, Unsupported};
        match self {
            e @ (Argument { .. } | Unsupported { .. } | OutOfMemory { .. } | Device { .. }) => {
                Error::Stage { stage: stage.into(), step, source: Box::new(e), remedy: String::new() }
            }
            e => e,
        }
    }

    /// The message without the path at its beginning, for use next to the path.
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
