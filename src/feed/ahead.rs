//! Batches prepared by threads of their own, ahead of the steps that need them.

use std::ops::Range;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::Scope;

use super::{Feed, HostBatch};
use crate::error::{Error, Result};

/// Batches that a thread prepares before it waits for the training to catch up.
const AHEAD: usize = 2;

/// The batches of steps one after another. Batches are functions of the step, so that it does not matter which thread
/// prepares them, or when.
pub struct Ahead {
    /// Worker w of n prepares the steps whose number is w modulo n.
    workers: Vec<Receiver<Result<HostBatch>>>,
}

impl Ahead {
    /// Starts `workers` threads (0: half the cores, at most 8), which end when all steps are prepared or the batches are
    /// dropped.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        feed: &'scope Feed,
        steps: Range<usize>,
        workers: usize,
    ) -> Result<Self> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let workers = if workers > 0 { workers } else { (cores() / 2).clamp(1, 8) };
        let start = |w: usize| -> Result<Receiver<Result<HostBatch>>> {
            let (send, receive) = sync_channel(AHEAD);
            let own = steps.clone().filter(move |s| s % workers == w);
            let prepare = move || {
                for step in own {
                    let batch = feed.batch(step);
                    let failed = batch.is_err();
                    // Sending fails if the training has ended.
                    if send.send(batch).is_err() || failed {
                        break;
                    }
                }
            };
            let builder = std::thread::Builder::new().name(format!("data-{w}"));
            builder.spawn_scoped(scope, prepare).map_err(|e| {
                Error::Training(format!("a thread that prepares batches does not start: {e}"))
            })?;
            Ok(receive)
        };
        Ok(Ahead { workers: (0..workers).map(start).collect::<Result<_>>()? })
    }

    /// The batch of step `step`; steps are taken in order. Waits until it is prepared.
    pub fn batch(&self, step: usize) -> Result<HostBatch> {
        let worker = &self.workers[step % self.workers.len()];
        let stopped =
            |_| Error::Training(format!("the thread that prepares the batch of step {step} has stopped"));
        worker.recv().map_err(stopped)?
    }
}
