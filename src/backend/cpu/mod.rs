//! The contract in plain generic Rust: `f32` to run, `f64` as the reference, `bf16` by rounding on store.
//!
//! Sums are computed in fixed chunks, whose bounds depend only on shapes, so that results are bitwise the same for any
//! number of threads.

mod attention;
mod codebook;
mod collectives;
mod conv;
mod elem;
mod gather;
mod gemm;
mod lanes;
mod loss;
mod norm;
mod optim;
mod pointwise;
mod pool;
mod products;
mod resample;
mod sample;
#[cfg(test)]
mod testing;
mod views;
mod workspace;

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::*;
use crate::error::{Error, Result};
use crate::ranks::Group;
pub(crate) use elem::{Elem, Real};
pub(crate) use gemm::{FEW, Mat, gemm};
pub(crate) use pool::Pool;
pub(crate) use views::*;
pub(crate) use workspace::{PerThread, Scratch, Workspace};

/// The CPU as a device. It runs one call at a time; calls from other threads wait.
pub struct Cpu {
    id: DeviceId,
    threads: rayon::ThreadPool,
    pool: Arc<Pool>,
    /// Held while buffers are read or written: kernels take `&self`, and tensors share buffers, so that two threads
    /// could otherwise write to the same buffer at the same time.
    turn: Mutex<()>,
    /// The times of kernels since they were last asked for, if they are measured, and the end of the last call.
    profile: OnceLock<Mutex<(Profile, Option<Instant>)>>,
    /// The ranks that train together.
    group: Arc<Group>,
}

impl Cpu {
    /// A CPU device with `threads` threads, at most [`Cpu::MAX_THREADS`]; 0 for one per core.
    pub fn new(threads: usize) -> Result<Self> {
        Self::of(threads, Group::alone())
    }

    /// The same as the device of a rank of `group`.
    pub fn of(threads: usize, group: Arc<Group>) -> Result<Self> {
        Self::build(threads, false, group)
    }

    /// Like [`Cpu::new`], but every allocation is filled with NaN (-1 for indices), so that tests detect kernels that
    /// leave outputs unwritten or read uninitialised memory.
    pub fn poisoned(threads: usize) -> Result<Self> {
        Self::build(threads, true, Group::alone())
    }

    /// Maximum number of threads of a device.
    pub const MAX_THREADS: usize = 1024;

    fn build(threads: usize, poison: bool, group: Arc<Group>) -> Result<Self> {
        if threads > Self::MAX_THREADS {
            let want = format!("0 (one per core) to {}", Self::MAX_THREADS);
            return Err(Error::arg("Cpu::new", "threads", threads, want));
        }
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| Error::arg("Cpu::new", "threads", e, "a number of threads the system can start"))?;
        let pool = Arc::new(Pool::new(poison));
        let (turn, profile) = (Mutex::default(), OnceLock::new());
        Ok(Cpu { id: DeviceId::unique(), threads, pool, turn, profile, group })
    }

    /// Number of threads that kernels run on.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Waits for the calls of other threads.
    fn turn(&self) -> MutexGuard<'_, ()> {
        // After a panic of a kernel, buffers still hold valid values, although possibly wrong ones.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a kernel on the device's threads.
    fn install(&self, kernel: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        let _turn = self.turn();
        match rayon::current_thread_index() {
            None => self.threads.install(kernel),
            // A thread of another pool that waits in `install` runs other tasks of its pool. If one of them called a
            // kernel, it would deadlock waiting for `turn`.
            Some(_) => std::thread::scope(|s| match s.spawn(|| self.threads.install(kernel)).join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }),
        }
    }

    /// Limits the total memory allocated from now on; allocations beyond it fail with [`Error::OutOfMemory`].
    pub fn limit(&self, bytes: u64) {
        self.pool.limit(bytes);
    }

    /// Runs `kernel` with a workspace of the size that its query returns.
    fn launch<A: Query>(&self, a: &A, kernel: impl FnOnce(&Workspace) -> Result<()> + Send) -> Result<()> {
        let name = a.kernel();
        // Before any size is formed from them.
        check::call(self.id, a)?;
        let threads = self.threads();
        let bytes = a.workspace(threads);
        let start = Instant::now();
        let result = self.install(|| {
            let memory =
                self.pool.reserve(bytes).ok_or_else(|| self.out_of_memory(Role::Workspace, bytes))?;
            let ws = Workspace::new(memory, threads, self.pool.is_poisoned());
            kernel(&ws)?;
            ws.check(name)
        });
        if let Some(profile) = self.profile.get() {
            let (all, last) = &mut *profile.lock().unwrap_or_else(PoisonError::into_inner);
            let idle = last.map_or(0.0, |last| start.saturating_duration_since(last).as_secs_f64());
            all.add((name, ""), a.cost(), start.elapsed().as_secs_f64(), idle);
            *last = Some(Instant::now());
        }
        result
    }

    fn out_of_memory(&self, role: Role, bytes: usize) -> Error {
        Error::OutOfMemory {
            device: "cpu".into(),
            role: role.to_string(),
            asked: super::size(bytes as u64),
            free: self.pool.refusal(),
            held: self.pool.memory().largest(),
        }
    }
}

/// Arguments with a query for the workspace of their launch on this device.
pub(super) trait Query: Args {
    /// Bytes of workspace with this many threads.
    fn workspace(&self, threads: usize) -> usize;
}

impl Device for Cpu {
    fn name(&self) -> String {
        format!("cpu ({} threads)", self.threads.current_num_threads())
    }

    fn id(&self) -> DeviceId {
        self.id
    }

    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        let addr = self.pool.take(role, bytes).ok_or_else(|| self.out_of_memory(role, bytes))?;
        // SAFETY: the block comes from the pool, and is returned to it when the buffer is dropped.
        Ok(unsafe { Buffer::new(addr, bytes, role, self.id, self.pool.clone()) })
    }

    fn copy_in(&self, _s: Stream, src: &[u8], dst: Out) -> Result<()> {
        check::view(self.id, "copy_in", "dst", &dst.0)?;
        let _turn = self.turn();
        let to = bytes_mut("copy_in", "dst", &dst.0)?;
        if to.len() != src.len() {
            return Err(Error::arg("copy_in", "src", src.len(), format!("{} bytes", to.len())));
        }
        to.copy_from_slice(src);
        Ok(())
    }

    fn copy(&self, _s: Stream, src: In, dst: Out) -> Result<()> {
        check::copy(self.id, &src, &dst)?;
        let _turn = self.turn();
        bytes_mut("copy", "dst", &dst.0)?.copy_from_slice(bytes("copy", "src", &src)?);
        Ok(())
    }

    fn read_later(&self, _s: Stream, src: In) -> Result<Pending> {
        check::view(self.id, "read_later", "src", &src)?;
        let _turn = self.turn();
        let v = packed("read_later", "src", &src)?;
        Ok(Pending::new(move || Ok(v)))
    }

    fn collectives(&self) -> &dyn Collectives {
        self
    }

    fn target(&self) -> Option<Target> {
        Some(Target::Cpu { threads: self.threads() })
    }

    fn available(&self) -> Option<u64> {
        let system = || {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
        };
        [system(), self.pool.room()].into_iter().flatten().min()
    }

    fn memory(&self) -> Memory {
        self.pool.memory()
    }

    fn start_profile(&self) -> Result<()> {
        self.profile.get_or_init(Mutex::default);
        self.profile().map(|_| ())
    }

    fn profile(&self) -> Result<Option<Profile>> {
        let taken = self
            .profile
            .get()
            .map(|p| std::mem::take(&mut *p.lock().unwrap_or_else(PoisonError::into_inner)));
        Ok(taken.map(|(all, _)| all))
    }
}

macro_rules! impl_cpu {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => { pastey::paste! {
        $(impl Query for $args<'_> {
            fn workspace(&self, threads: usize) -> usize {
                $module::[<$name _workspace>](self, threads)
            }
        })*

        impl Kernels for Cpu {
            $(fn $name(&self, _s: Stream, a: &$args<'_>) -> Result<()> {
                self.launch(a, |ws| $module::$name(ws, a))
            })*
        }
    } };
}
super::contract::kernel_table!(impl_cpu);
