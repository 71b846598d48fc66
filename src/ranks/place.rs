//! Which of the ranks this process is.

use std::time::Duration;

use crate::error::Result;

/// The place of this process among the ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks, at least 1.
    pub ranks: usize,
    /// This rank among those of its host, from 0: the number of its GPU.
    pub local: usize,
    /// Host and port at which rank 0 listens.
    pub address: String,
    /// Time without progress after which a rank counts as lost.
    pub stall: Duration,
}

impl Place {
    /// The place that the environment names; `None` if it names none, or only one rank. `stall` becomes [`Place::stall`].
    pub fn from_env(_stall: Duration) -> Result<Option<Self>> {
        Ok(None)
    }
}
