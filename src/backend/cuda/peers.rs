//! The other ranks, as a GPU sees them: a stream for collectives and NCCL's communicator.
//!
//! All collectives run on this stream, so that they have one order, on which NCCL relies. A rank that is lost would leave
//! the GPUs of the others waiting in a collective for ever. So whoever waits for this GPU looks after the group and after
//! NCCL meanwhile, and stops the collectives when either has failed.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::nccl::{Handle, ID, Line, Nccl, Result};
use crate::ranks::Group;

/// The longest time between two looks after the group.
const PAUSE: Duration = Duration::from_micros(200);
/// Time that the group has to say why NCCL failed.
const GRACE: Duration = Duration::from_secs(2);
/// Time for which a device that is closed waits for NCCL, which waits for the other ranks of the host.
const PATIENCE: Duration = Duration::from_secs(5);

/// How a collective shares the GPU with kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// Nothing runs beside it: it takes as many thread blocks as NCCL chooses.
    Alone,
    /// Kernels run beside it: it takes few, since a kernel that would fill the GPU has to wait for every multiprocessor that
    /// is not free.
    Beside,
}

/// The communicators that are alive, one for each [`Use`].
#[derive(Clone, Copy)]
struct Communicators([Handle; 2]);

// SAFETY: NCCL's communicators may be used from any thread, by one at a time.
unsafe impl Send for Communicators {}

impl Communicators {
    fn of(&self, how: Use) -> Handle {
        self.0[how as usize]
    }
}

/// How communicators end.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// When all its collectives are done.
    Leave,
    /// At once: running collectives stop without a result.
    Stop,
}

/// The connection to the other ranks.
pub(super) struct Peers {
    nccl: &'static Nccl,
    pub(super) group: Arc<Group>,
    context: Arc<CudaContext>,
    /// Runs all collectives.
    pub(super) stream: Arc<CudaStream>,
    /// `None` once they have ended. Held during every call of NCCL.
    comm: Mutex<Option<Communicators>>,
    /// Why the collectives were stopped.
    lost: OnceLock<String>,
    /// Says when the communicators that ended are freed.
    ended: Mutex<Option<Receiver<()>>>,
}

impl Peers {
    /// Connects the GPU of this rank, which the context is of, to those of all others; all ranks call this. A collective
    /// beside kernels takes at most `blocks` thread blocks.
    pub(super) fn join(context: &Arc<CudaContext>, group: Arc<Group>, blocks: Option<u32>) -> Result<Self> {
        let nccl = Nccl::get()?;
        let plain = |e: crate::error::Error| e.to_string();
        group.agree("the version of NCCL", &nccl.version()).map_err(plain)?;
        let all = group.gather(&uuid(context).map_err(|e| driver("asking for the GPU's identity", e))?);
        if let Some(ranks) = sharing(&all.map_err(plain)?) {
            return Err(format!(
                "ranks {ranks} use the same GPU, wanted one of its own for each; start at most as many ranks on a host as \
                 it has GPUs"
            ));
        }
        let stream = first(context).map_err(|e| driver("making a stream", e))?;
        let join = |blocks: Option<u32>| -> Result<Handle> {
            let id = if group.leads() { nccl.unique_id()?.to_vec() } else { Vec::new() };
            let id = group.broadcast(&id).map_err(plain)?;
            let id: [u8; ID] = id
                .try_into()
                .map_err(|id: Vec<u8>| format!("got {} bytes of NCCL's name, wanted {ID}", id.len()))?;
            nccl.join(id, group.rank(), group.ranks(), blocks)
        };
        let comm = Communicators([join(None)?, join(blocks)?]);
        tracing::debug!("NCCL {}, rank {} of {}", nccl.version(), group.rank(), group.ranks());
        Ok(Peers {
            nccl,
            group,
            context: context.clone(),
            stream,
            comm: Mutex::new(Some(comm)),
            lost: OnceLock::new(),
            ended: Mutex::default(),
        })
    }

    fn comm(&self) -> MutexGuard<'_, Option<Communicators>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the stream is a part of the recording that is being made.
    pub(super) fn is_recorded(&self) -> std::result::Result<bool, DriverError> {
        let none = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        self.stream.capture_status().map(|status| status != none)
    }

    /// Calls `enqueue`, which enqueues a collective.
    pub(super) fn enqueue(&self, how: Use, enqueue: impl FnOnce(Line) -> Result<()>) -> Result<()> {
        let comm = self.comm();
        match &*comm {
            Some(comm) => {
                let stream = self.stream.cu_stream();
                enqueue(Line { nccl: self.nccl, comm: comm.of(how), stream })
            }
            None => Err(self.lost.get().cloned().unwrap_or_default()),
        }
    }

    /// Fails if a collective has failed.
    fn state(&self) -> Result<()> {
        let comm = self.comm();
        let all = comm.iter().flat_map(|comm| comm.0);
        // SAFETY: they are alive while the lock is held.
        all.into_iter().try_for_each(|comm| unsafe { self.nccl.state(comm) })
    }

    /// Fails if a rank is lost or a collective has failed. The first time, this stops all collectives, also one that the
    /// GPU waits in.
    pub(super) fn look(&self) -> Result<()> {
        if let Some(why) = self.lost.get() {
            return Err(why.clone());
        }
        let why = match (self.group.failure(), self.state()) {
            (None, Ok(())) => return Ok(()),
            (Some(why), _) => why,
            (None, Err(why)) => self.reason().unwrap_or(why),
        };
        let _ = self.lost.set(why.clone());
        self.end(End::Stop);
        Err(why)
    }

    /// Why the group has failed, as it learns soon after NCCL has met the end of a rank; `None` if it has not.
    fn reason(&self) -> Option<String> {
        let start = Instant::now();
        loop {
            let why = self.group.failure();
            if why.is_some() || start.elapsed() > GRACE {
                return why;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Returns when the device has reached `event`, or when a rank is lost: the device then reaches it soon.
    pub(super) fn watch(&self, event: &CudaEvent) -> std::result::Result<(), DriverError> {
        let mut pause = Duration::from_micros(5);
        while !event.try_is_complete()? && self.look().is_ok() {
            std::thread::sleep(pause);
            pause = (2 * pause).min(PAUSE);
        }
        Ok(())
    }

    /// Ends the communicators, if that has not happened, in threads: NCCL may wait for other ranks, and for recordings that
    /// contain collectives to be dropped. Each has a thread of its own, since a recording may contain collectives of both.
    fn end(&self, how: End) {
        let Some(comm) = self.comm().take() else { return };
        let (done, ended) = channel();
        for (i, handle) in comm.0.into_iter().enumerate() {
            let (nccl, context, done) = (self.nccl, self.context.clone(), done.clone());
            let comm = Communicators([handle; 2]);
            let end = move || {
                // NCCL makes the context current itself; if this fails, so does NCCL, with a message.
                let _ = context.bind_to_thread();
                let comm = comm.of(Use::Alone);
                // SAFETY: it was taken from its only place, under the lock that is held while it is used.
                let freed = unsafe {
                    match how {
                        End::Leave => nccl.destroy(comm),
                        End::Stop => nccl.abort(comm),
                    }
                };
                if let Err(why) = freed {
                    tracing::debug!("{why}");
                }
                let _ = done.send(());
            };
            // Without a thread, the communicator stays until the process ends.
            if let Err(e) = std::thread::Builder::new().name(format!("nccl-{i}")).spawn(end) {
                tracing::warn!("NCCL is not closed, since no thread can be started: {e}");
            }
        }
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
    }

    /// Ends the communicators when their collectives are done, or at once if a rank is lost, and waits for that.
    pub(super) fn leave(&self) {
        // Errors are ignored: nobody waits for a result any more.
        if let Ok(event) = self.stream.record_event(None) {
            let _ = self.watch(&event);
        }
        let _ = self.look();
        self.end(End::Leave);
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        let until = Instant::now() + PATIENCE;
        let left = || until.saturating_duration_since(Instant::now());
        let late = |ended: Receiver<()>| {
            (0..2).any(|_| ended.recv_timeout(left()) == Err(RecvTimeoutError::Timeout))
        };
        if ended.is_some_and(late) {
            tracing::warn!("NCCL did not end within {} s; the process ends without it", PATIENCE.as_secs());
        }
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A driver error as text.
fn driver(what: &str, e: DriverError) -> String {
    let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
    format!("{what}: {text}")
}

/// A stream whose kernels start before those of others.
fn first(context: &Arc<CudaContext>) -> std::result::Result<Arc<CudaStream>, DriverError> {
    context.bind_to_thread()?;
    let (_, highest) = result::stream::get_priority_range()?;
    context.new_stream_with_priority(highest)
}

/// The bytes that identify a GPU among those of all hosts.
fn uuid(context: &CudaContext) -> std::result::Result<Vec<u8>, DriverError> {
    Ok(context.uuid()?.bytes.iter().map(|b| *b as u8).collect())
}

/// The first ranks that have the same GPU, such as `0 and 2`, if there are any.
fn sharing(gpus: &[Vec<u8>]) -> Option<String> {
    let with = |gpu: &Vec<u8>| -> Vec<String> {
        gpus.iter().enumerate().filter(|(_, g)| *g == gpu).map(|(rank, _)| rank.to_string()).collect()
    };
    let ranks = gpus.iter().map(with).find(|ranks| ranks.len() > 1)?;
    let (last, others) = ranks.split_last()?;
    Some(format!("{} and {last}", others.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::sharing;

    #[test]
    fn ranks_that_share_a_gpu_are_named() {
        let gpus = |names: &[u8]| names.iter().map(|n| vec![*n; 16]).collect::<Vec<_>>();
        assert_eq!(sharing(&gpus(&[3, 1, 2])), None);
        assert_eq!(sharing(&gpus(&[1, 2, 3, 2, 1])).as_deref(), Some("0 and 4"));
        assert_eq!(sharing(&gpus(&[5, 7, 7, 7])).as_deref(), Some("1, 2 and 3"));
        assert_eq!(sharing(&[]), None);
    }
}
