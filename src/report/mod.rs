//! Output for users: metrics of a run, held-out results, plots and tables.

mod metrics;
pub mod plots;
mod profile;
mod results;
mod sharpness;
mod survey;

pub(crate) use metrics::{Line, Smooth, Usage, code_usage};
pub use profile::Profiles;
pub use results::{Codes, Drawn, Evaluation, Pair, QuestionType, Report};
pub(crate) use sharpness::Sharpness;
pub use survey::{First, Survey};
