//! Device memory. Blocks are taken from the driver's pool once and then reused: a step that allocates like the previous
//! one gets the same addresses without calling the driver.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use super::peers::Peers;
use crate::backend::{DeviceId, Memory, Reclaim, Role, size};
use crate::error::{Error, Result};

/// The context and its streams, shared by everything that outlives a call.
pub(super) struct Gpu {
    pub(super) id: DeviceId,
    pub(super) name: String,
    pub(super) context: Arc<CudaContext>,
    /// Runs kernels.
    pub(super) compute: Arc<CudaStream>,
    /// Copies batches.
    pub(super) copy: Arc<CudaStream>,
    /// The other ranks, if there are any, with the stream of collectives.
    pub(super) peers: Option<Peers>,
    /// Allocates and frees memory; never part of a recording.
    taking: Arc<CudaStream>,
    /// During a recording, an event after all work enqueued before it on the compute stream and on that of the peers. Work
    /// enqueued during the recording is stored instead of run, and the streams support neither waits nor events of
    /// others until the recording ends.
    recording: Mutex<Option<CudaEvent>>,
    /// Bytes by role, over all arenas.
    pub(super) memory: Mutex<Memory>,
}

impl Gpu {
    pub(super) fn new(
        name: String,
        context: Arc<CudaContext>,
        peers: Option<Peers>,
    ) -> std::result::Result<Self, DriverError> {
        let [compute, copy, taking] = [context.new_stream()?, context.new_stream()?, context.new_stream()?];
        let (recording, memory) = (Mutex::default(), Mutex::default());
        let id = DeviceId::unique();
        Ok(Gpu { id, name, context, compute, copy, peers, taking, recording, memory })
    }

    /// A driver error during `what`.
    pub(super) fn error(&self, what: &str, e: DriverError) -> Error {
        let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
        let hint = match std::env::var_os("ETT_SYNC") {
            Some(_) => "",
            None => "; set ETT_SYNC=1 to find the kernel that caused it",
        };
        Error::device(&self.name, format!("{what}: {text}{hint}"))
    }

    /// The event that precedes the current recording; `None` outside of recordings.
    pub(super) fn before_recording(&self) -> MutexGuard<'_, Option<CudaEvent>> {
        self.recording.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the compute stream is being recorded.
    pub(super) fn is_recording(&self) -> bool {
        self.before_recording().is_some()
    }

    /// Makes `stream` wait for all work enqueued on the compute stream, except work being recorded.
    fn after_compute(&self, stream: &CudaStream) -> std::result::Result<(), DriverError> {
        match &*self.before_recording() {
            Some(before) => stream.wait(before),
            None => stream.wait(&self.compute.record_event(None)?),
        }
    }

    /// Makes `stream` wait for all work enqueued on the stream of the peers, except work being recorded.
    fn after_peers(&self, stream: &CudaStream) -> std::result::Result<(), DriverError> {
        match (&self.peers, &*self.before_recording()) {
            (Some(peers), None) => stream.join(&peers.stream),
            // The work before a recording is before its event.
            _ => Ok(()),
        }
    }

    /// Waits until all enqueued work is done, except work being recorded. If a rank is lost, the collectives stop.
    pub(super) fn finish(&self) -> std::result::Result<(), DriverError> {
        self.after_compute(&self.taking)?;
        self.after_peers(&self.taking)?;
        self.taking.wait(&self.copy.record_event(None)?)?;
        self.reach(&self.taking.record_event(None)?)
    }

    /// Waits until the device has reached an event. If a rank is lost, the collectives before it stop.
    pub(super) fn reach(&self, event: &CudaEvent) -> std::result::Result<(), DriverError> {
        if let Some(peers) = &self.peers {
            peers.watch(event)?;
        }
        event.synchronize()
    }

    /// Waits, as `what`, until the device has reached an event. Fails if a rank is lost, since the collectives before the
    /// event have no result then.
    pub(super) fn wait(&self, event: &CudaEvent, what: &str) -> Result<()> {
        let reached = self.reach(event);
        self.look(what)?;
        reached.map_err(|e| self.error(what, e))
    }

    /// The same for all work enqueued on a stream.
    pub(super) fn drain(&self, stream: &CudaStream, what: &str) -> Result<()> {
        let event = stream.record_event(None).map_err(|e| self.error(what, e))?;
        self.wait(&event, what)
    }

    /// Fails, as `what`, if a rank is lost or a collective has failed.
    fn look(&self, what: &str) -> Result<()> {
        let looked = self.peers.as_ref().map_or(Ok(()), Peers::look);
        looked.map_err(|why| Error::device(&self.name, format!("{what}: {why}")))
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The work that the next use of a free block has to wait for.
enum After {
    /// No wait: only the compute stream uses the block, before and after.
    Compute,
    /// Either stream may have used the block and may use it next. The events follow the work enqueued on each stream
    /// when the block was freed: the compute stream has to wait for a copy into the block, and the copy stream for
    /// kernels that read it.
    Both { compute: CudaEvent, copy: CudaEvent },
    /// As `Both`, but without events, since the block was freed during a recording, when events of the compute stream
    /// would become part of the recording: wait for all work enqueued on each stream by the time of reuse.
    All,
}

/// Free blocks of one size by address. The lowest address is used first, so that the same calls on the same set of free
/// blocks give the same addresses, independently of the order in which the blocks were freed.
type Free = BTreeMap<u64, After>;

/// Free blocks of one owner: the device or a recording.
pub(super) struct Arena {
    gpu: Arc<Gpu>,
    blocks: Mutex<Blocks>,
    /// The device's arena, if this one belongs to a recording. The launches of a recording run after all work enqueued
    /// before, so that they can use the device's free blocks. The recording keeps its blocks, whether free or in use.
    device: Option<Arc<Arena>>,
}

#[derive(Default)]
struct Blocks {
    /// By size and by whether the block is for batches, the only blocks that the copy stream writes.
    free: HashMap<(usize, bool), Free>,
}

/// The size rounded up by at most an eighth, so that few distinct sizes occur; `None` if it overflows.
fn class(bytes: usize) -> Option<usize> {
    let step = (bytes.checked_next_power_of_two()? / 16).max(256);
    bytes.max(1).checked_next_multiple_of(step)
}

impl Arena {
    /// The arena of a device.
    pub(super) fn new(gpu: Arc<Gpu>) -> Self {
        Arena { gpu, blocks: Mutex::default(), device: None }
    }

    /// The arena of a recording.
    pub(super) fn of_recording(device: Arc<Arena>) -> Self {
        Arena { gpu: device.gpu.clone(), blocks: Mutex::default(), device: Some(device) }
    }

    /// The device that the memory belongs to.
    pub(super) fn device(&self) -> DeviceId {
        self.gpu.id
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pop(&self, key: (usize, bool)) -> Option<(u64, After)> {
        self.blocks().free.get_mut(&key).and_then(BTreeMap::pop_first)
    }

    /// The address of a block of at least `bytes`.
    pub(super) fn take(&self, role: Role, bytes: usize) -> Result<u64> {
        let held = class(bytes).ok_or_else(|| self.out_of_memory(role, bytes))?;
        let key = (held, role == Role::Input);
        let addr = match &self.device {
            None => match self.pop(key) {
                Some((addr, after)) => {
                    self.order(&after).map_err(|e| self.gpu.error("ordering a copy", e))?;
                    Ok(addr)
                }
                // Freeing the blocks of other sizes may make room.
                None => self.ask(held).or_else(|_| {
                    self.give_back();
                    self.ask(held)
                }),
            },
            Some(device) => match self.pop(key).or_else(|| device.pop(key)) {
                // The block is first used by a replay. Before that, the end of the recording makes the compute stream
                // wait for copies.
                Some((addr, _)) => Ok(addr),
                None => self.ask(held).or_else(|_| {
                    device.give_back();
                    self.ask(held)
                }),
            },
        };
        let addr = addr.map_err(|_| self.out_of_memory(role, bytes))?;
        self.gpu.memory().add(role, bytes);
        Ok(addr)
    }

    /// Makes the streams wait for the previous use of a block.
    fn order(&self, after: &After) -> std::result::Result<(), DriverError> {
        let gpu = &self.gpu;
        match after {
            After::Compute => Ok(()),
            After::Both { compute, copy } => {
                gpu.copy.wait(compute)?;
                gpu.compute.wait(copy)
            }
            After::All => {
                gpu.after_compute(&gpu.copy)?;
                gpu.compute.wait(&gpu.copy.record_event(None)?)
            }
        }
    }

    fn ask(&self, bytes: usize) -> std::result::Result<u64, DriverError> {
        self.gpu.context.bind_to_thread()?;
        let stream = self.gpu.taking.cu_stream();
        // SAFETY: the stream is alive and belongs to the bound context. Other streams use the block only after this
        // stream was synchronized.
        unsafe {
            let addr = result::malloc_async(stream, bytes)?;
            result::stream::synchronize(stream)?;
            self.gpu.memory().taken += bytes as u64;
            Ok(addr)
        }
    }

    /// Gives all free blocks back to the driver.
    fn give_back(&self) {
        let free: Free = self.blocks().free.drain().flat_map(|(_, blocks)| blocks).collect();
        if free.is_empty() || self.gpu.context.bind_to_thread().is_err() {
            return;
        }
        // Work enqueued before a block was freed may still use it. Errors are ignored: a device that fails here also
        // fails in a call that reports it.
        let _ = self.gpu.finish();
        for addr in free.into_keys() {
            // SAFETY: the block came from `ask`, is in no list any more, and its work is done. No replay uses it: the
            // arena of a recording is dropped after its graph.
            let _ = unsafe { result::free_async(addr, self.gpu.taking.cu_stream()) };
        }
        let _ = self.gpu.taking.synchronize();
    }

    fn out_of_memory(&self, role: Role, bytes: usize) -> Error {
        let free =
            self.gpu.context.mem_get_info().map_or("free memory is unknown".into(), |(free, total)| {
                format!("{} of {} are free", size(free as u64), size(total as u64))
            });
        Error::OutOfMemory {
            device: self.gpu.name.clone(),
            role: role.to_string(),
            asked: size(bytes as u64),
            free,
            held: self.gpu.memory().largest(),
        }
    }
}

impl Reclaim for Arena {
    unsafe fn reclaim(&self, addr: u64, bytes: usize, role: Role) {
        // `take` fails for sizes without a class.
        let Some(held) = class(bytes) else { return };
        let gpu = &self.gpu;
        gpu.memory().sub(role, bytes);
        let input = role == Role::Input;
        let after = match (input, &self.device) {
            (true, None) if !gpu.is_recording() => {
                match (gpu.compute.record_event(None), gpu.copy.record_event(None)) {
                    (Ok(compute), Ok(copy)) => After::Both { compute, copy },
                    _ => After::All,
                }
            }
            (true, None) => After::All,
            // Only the recording itself can reuse its blocks, while it is being made.
            (true, Some(_)) | (false, _) => After::Compute,
        };
        self.blocks().free.entry((held, input)).or_default().insert(addr, after);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Lets the driver's pool keep freed memory, so that allocating and freeing take microseconds.
pub(super) fn keep_pool(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let mut all = u64::MAX;
    // SAFETY: the context is alive; the attribute is a u64, which the driver copies.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let what = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        result::mem_pool::set_attribute(pool, what, std::ptr::from_mut(&mut all).cast())
    }
}

#[cfg(test)]
mod tests {
    use super::class;

    #[test]
    fn sizes_are_rounded_up_by_an_eighth_at_most() {
        for bytes in [0, 1, 255, 256, 257, 4096, 5000, 100_000, 1 << 20, (1 << 20) + 1, 3_000_000_000] {
            let c = class(bytes).expect("a possible size");
            assert!(c >= bytes.max(1) && c.is_multiple_of(256), "{bytes}: {c}");
            assert!(c <= bytes + (bytes / 8).max(256), "{bytes}: {c}");
        }
        assert_eq!([usize::MAX, usize::MAX - 255, (1 << 63) + 1].map(class), [None; 3]);
    }
}
