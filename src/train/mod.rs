//! Training: one step, its optimizers, the stages of a run, and what is written down about them.

mod check;
mod checkpoint;
pub mod feed;
mod optim;
mod plan;
pub mod plots;
mod run;
mod stages;
mod step;
pub mod weights;

pub use check::check;
pub use checkpoint::{load_training, save_training};
pub use optim::{Hyper, Optimizer, schedule};
pub use plan::{StagePlan, plan, plan_stage};
pub use run::{CONFIG, EMA, Finished, WEIGHTS, profile_table, run};
pub use stages::{Stage, Template};
pub use step::{Batch, Loss, Outcome, Recipe, TokenizerMode, step};
pub use weights::{load_weights, save_weights};
