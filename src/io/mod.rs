//! Files of a run: weights and their history, the run folder and its lock, checkpoints and the progress that they
//! record.

pub mod checkpoints;
mod fingerprint;
mod folder;
mod history;
mod inspect;
mod lock;
mod mark;
pub mod weights;

pub use checkpoints::{Checkpoints, Progress};
pub use fingerprint::{Fingerprint, Texts};
pub use folder::{
    CONFIG, EMA, METRICS, PROFILE, REPORT, TOKENIZER, WEIGHTS, config_text, model_folder, run_config, written,
};
pub(crate) use folder::{refuse_part, refuse_used, write_model};
pub use history::{History, Skill};
pub use inspect::inspect;
pub(crate) use lock::Lock;
pub(crate) use mark::mark;
pub use weights::{load_weights, save_weights, save_weights_of};
