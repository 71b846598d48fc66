//! Training: one step, its optimizers, the stages of a run, and what is written down about them.

mod check;
pub mod checkpoint;
pub mod feed;
pub mod files;
pub mod interrupt;
mod optim;
mod plan;
mod run;
mod stages;
mod step;
pub mod weights;

pub use check::check;
pub use checkpoint::{Checkpoints, Progress};
pub use optim::{Hyper, Optimizer, schedule};
pub use plan::{StagePlan, plan, plan_stage};
pub use run::{CONFIG, EMA, Finished, WEIGHTS, profile_table, run};
pub use stages::{Stage, Template};
pub use step::{Batch, Loss, Outcome, Recipe, TokenizerMode, step};
pub use weights::{load_weights, save_weights};
