//! Device memory: blocks are taken from the driver's pool once and handed out again and again, so that a step that
//! allocates as the one before gets the same addresses and costs no call to the driver.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result, sys};

use crate::backend::{Memory, Reclaim, Role, size};
use crate::error::{Error, Result};

/// The context and its streams, shared by all that outlives a call.
pub(super) struct Gpu {
    pub(super) name: String,
    pub(super) context: Arc<CudaContext>,
    /// Where kernels run.
    pub(super) compute: Arc<CudaStream>,
    /// Where batches are copied.
    pub(super) copy: Arc<CudaStream>,
    /// Where memory is taken: never part of a recording.
    taking: Arc<CudaStream>,
    /// Bytes by role, over all arenas.
    pub(super) memory: Mutex<Memory>,
}

impl Gpu {
    pub(super) fn new(name: String, context: Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        let [compute, copy, taking] = [context.new_stream()?, context.new_stream()?, context.new_stream()?];
        Ok(Gpu { name, context, compute, copy, taking, memory: Mutex::default() })
    }

    /// A driver's refusal as an error.
    pub(super) fn error(&self, what: &str, e: DriverError) -> Error {
        let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
        let hint = match std::env::var_os("ETT_SYNC") {
            Some(_) => "",
            None => "; set ETT_SYNC=1 to find the kernel that caused it",
        };
        Error::device(&self.name, format!("{what}: {text}{hint}"))
    }
}

/// Free blocks of one size by address. Each has the compute stream's work at the time it was given back, if it is one
/// that the copy stream may write: such a copy has to wait for that. The lowest address goes first, so that the same
/// calls on the same set of free blocks give the same addresses, in whatever order the blocks came back.
type Free = BTreeMap<u64, Option<CudaEvent>>;

/// Free blocks of one owner: the device itself, or a recording.
pub(super) struct Arena {
    gpu: Arc<Gpu>,
    blocks: Mutex<Blocks>,
    /// Blocks belong to a recording: no events while it is made, and none are needed.
    recorded: bool,
}

#[derive(Default)]
struct Blocks {
    /// By size, batches apart: they are the only blocks that the copy stream writes.
    free: HashMap<(usize, bool), Free>,
}

/// Sizes are rounded up by at most an eighth, so that few distinct ones occur.
fn class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(256);
    bytes.max(1).next_multiple_of(step)
}

impl Arena {
    pub(super) fn new(gpu: Arc<Gpu>, recorded: bool) -> Self {
        Arena { gpu, blocks: Mutex::default(), recorded }
    }

    fn blocks(&self) -> std::sync::MutexGuard<'_, Blocks> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a block of at least `bytes`.
    pub(super) fn take(&self, role: Role, bytes: usize) -> Result<u64> {
        let bytes_held = class(bytes);
        let found =
            self.blocks().free.get_mut(&(bytes_held, role == Role::Input)).and_then(BTreeMap::pop_first);
        let addr = match found {
            Some((addr, after)) => {
                if let Some(event) = &after {
                    self.gpu.copy.wait(event).map_err(|e| self.gpu.error("ordering a copy", e))?;
                }
                addr
            }
            None => match self.ask(bytes_held) {
                Ok(addr) => addr,
                Err(_) => {
                    // Blocks of other sizes may hold what is needed.
                    self.give_back();
                    self.ask(bytes_held).map_err(|_| self.out_of_memory(role, bytes))?
                }
            },
        };
        self.gpu.memory.lock().unwrap_or_else(PoisonError::into_inner).add(role, bytes);
        Ok(addr)
    }

    fn ask(&self, bytes: usize) -> std::result::Result<u64, DriverError> {
        self.gpu.context.bind_to_thread()?;
        let stream = self.gpu.taking.cu_stream();
        // The block is used on other streams after this one has been waited for.
        unsafe {
            let addr = result::malloc_async(stream, bytes)?;
            result::stream::synchronize(stream)?;
            Ok(addr)
        }
    }

    /// Gives all free blocks back to the driver.
    fn give_back(&self) {
        let free: Free = self.blocks().free.drain().flat_map(|(_, blocks)| blocks).collect();
        if free.is_empty() || self.gpu.context.bind_to_thread().is_err() {
            return;
        }
        // Work that was enqueued before a block was given back may still use it. A device that fails here has
        // failed elsewhere, where it is reported.
        let _ = self.gpu.context.synchronize();
        for addr in free.into_keys() {
            let _ = unsafe { result::free_async(addr, self.gpu.taking.cu_stream()) };
        }
        let _ = self.gpu.taking.synchronize();
    }

    fn out_of_memory(&self, role: Role, bytes: usize) -> Error {
        let free =
            self.gpu.context.mem_get_info().map_or("nobody knows what is free".into(), |(free, total)| {
                format!("{} of {} are free", size(free as u64), size(total as u64))
            });
        Error::OutOfMemory {
            device: self.gpu.name.clone(),
            role: role.to_string(),
            asked: size(bytes as u64),
            free,
            held: self.gpu.memory.lock().unwrap_or_else(PoisonError::into_inner).largest(),
        }
    }
}

impl Reclaim for Arena {
    fn reclaim(&self, addr: u64, bytes: usize, role: Role) {
        self.gpu.memory.lock().unwrap_or_else(PoisonError::into_inner).sub(role, bytes);
        let input = role == Role::Input;
        let after = match input && !self.recorded {
            true => self.gpu.compute.record_event(None).ok(),
            false => None,
        };
        self.blocks().free.entry((class(bytes), input)).or_default().insert(addr, after);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// Keeps what the pool has been given: allocating and freeing then cost microseconds.
pub(super) fn keep_pool(context: &CudaContext) -> std::result::Result<(), DriverError> {
    let mut all = u64::MAX;
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
            let c = class(bytes);
            assert!(c >= bytes.max(1) && c.is_multiple_of(256), "{bytes}: {c}");
            assert!(c <= bytes + (bytes / 8).max(256), "{bytes}: {c}");
        }
    }
}
