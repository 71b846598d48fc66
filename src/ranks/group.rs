//! The connected ranks.

use std::sync::Arc;

use super::Place;
use crate::error::Result;

/// What a rank is doing, which decides whether it may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Starting, saving, evaluating or at a first step: takes any time.
    Busy,
    /// Training: every step is progress.
    Training,
}

/// The ranks that train together, as one of them sees them.
pub struct Group {
    place: Place,
}

impl Group {
    /// A group of one rank.
    pub fn alone() -> Arc<Self> {
        let place = Place {
            rank: 0,
            ranks: 1,
            local: 0,
            address: String::new(),
            stall: std::time::Duration::from_secs(60),
        };
        Arc::new(Group { place })
    }

    /// Connects to all other ranks of `place`. Blocks until they are all there, or fails after ten minutes.
    pub fn join(place: Place) -> Result<Arc<Self>> {
        Ok(Arc::new(Group { place }))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.place.ranks
    }

    /// True for the rank that writes files and talks to the user.
    pub fn leads(&self) -> bool {
        self.place.rank == 0
    }

    /// Every rank's bytes, in the order of the ranks. All ranks call this at the same point; so for the functions below.
    pub fn gather(&self, _mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        unimplemented!()
    }

    /// The bytes of rank 0.
    pub fn broadcast(&self, _mine: &[u8]) -> Result<Vec<u8>> {
        unimplemented!()
    }

    /// Sums of as many numbers of every rank. Counts as progress: a rank in [`Phase::Training`] that does not come here for
    /// [`Place::stall`] while others wait ends the run.
    pub fn sum(&self, _mine: &[u64]) -> Result<Vec<u64>> {
        unimplemented!()
    }

    /// Fails on all ranks if their texts differ, and names `what` differs and on which ranks.
    pub fn agree(&self, _what: &str, _mine: &str) -> Result<()> {
        unimplemented!()
    }

    /// Says what this rank is doing from now on, for the others and for their messages: such as `stage semantic, step 12`.
    pub fn enter(&self, _phase: Phase, _at: &str) {
        unimplemented!()
    }

    /// Tells all others that this rank has failed: their calls, also those that they are waiting in, fail with a sentence
    /// that names this rank, its host, its step and `why`.
    pub fn fail(&self, _why: &str) {
        unimplemented!()
    }

    /// Leaves the group: the others may go on without this rank, which is not missed any more.
    pub fn leave(&self) {
        unimplemented!()
    }

    /// Why the group has failed, if it has.
    pub fn failure(&self) -> Option<String> {
        None
    }

    /// Calls `f` once with the sentence if another rank has failed, from a thread of the group.
    pub fn on_failure(&self, _f: impl Fn(&str) + Send + 'static) {}

    /// For devices with host memory: sends `send[r]` to rank r and receives `receive[r]` from it, of which both sides know the
    /// length; the entries of this rank are not used.
    pub fn exchange(&self, _send: &[&[u8]], _receive: &mut [&mut [u8]]) -> Result<()> {
        unimplemented!()
    }
}
