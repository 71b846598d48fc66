//! Training: the step, its optimizers, the stages of a run, and its records.

mod check;
pub mod checkpoint;
mod closing;
mod dump;
pub mod feed;
mod fingerprint;
mod history;
mod inspect;
pub mod interrupt;
mod lock;
mod metrics;
mod optim;
mod plan;
pub mod plots;
mod run;
mod sharpness;
mod stages;
mod step;
pub mod weights;

pub use check::check;
pub use checkpoint::{Checkpoints, Progress};
pub use closing::evaluate;
pub use fingerprint::{Fingerprint, Texts};
pub(crate) use history::text;
pub use history::{History, Skill};
pub use inspect::inspect;
pub(crate) use metrics::code_usage;
pub use optim::{Hyper, Optimizer, Own, schedule};
pub use plan::{StagePlan, choose_device, largest_batch, parse_memory, plan, plan_stage};
pub use run::{
    CONFIG, EMA, Ending, Finished, METRICS, RunOptions, TOKENIZER, WEIGHTS, profile_table, resume, run,
    run_config, written,
};
use stages::start_averages;
pub use stages::{Stage, Template, averaged};
pub use step::{Batch, Counts, Loss, Outcome, Recipe, TokenizerMode, step};
pub use weights::{load_weights, save_weights, save_weights_of};
