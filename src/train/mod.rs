//! Training: the step, its optimizers, the stages of a run, and the run itself.

mod check;
pub mod checkpoint;
mod dump;
mod optim;
mod plan;
mod run;
mod running;
mod scaling;
mod session;
mod speed;
mod stages;
mod state;
mod step;
mod update;

pub use check::check;
pub use optim::{Hyper, Optimizer, Own, schedule};
pub use plan::{Devices, StagePlan, choose_device, largest_batch, parse_memory, plan, plan_stage};
pub use run::{Ending, Finished, RunOptions, resume, run};
pub use scaling::{rank_counts, read_speeds, scaled, scaling_table};
pub use speed::{Speed, speed, speed_table, write_speeds};
pub use stages::{Stage, averaged};
pub use state::StepState;
pub use step::{Counts, Loss, Outcome, Reading, Recipe, TokenizerMode, Values, step};
