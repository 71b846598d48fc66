//! The contract in plain generic Rust: `f32` to run, `f64` as the oracle, `bf16` by rounding on store.
//!
//! Sums are formed in fixed chunks whose bounds depend on shapes only, so results are the same bits for any
//! number of threads.

mod attention;
mod codebook;
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

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::*;
use crate::error::{Error, Result};
pub(crate) use elem::{Elem, Real};
pub(crate) use gemm::{FEW, Mat, gemm};
pub(crate) use pool::Pool;
pub(crate) use views::*;
pub(crate) use workspace::{PerThread, Scratch, Workspace};

/// The CPU as a device. It runs one call at a time; a call from another thread waits for its turn.
pub struct Cpu {
    threads: rayon::ThreadPool,
    pool: Arc<Pool>,
    /// Held while memory that is handed out is read or written: kernels take `&self`, and tensors share buffers, so that
    /// two threads could write one at the same time.
    turn: Mutex<()>,
    profile: Option<Mutex<BTreeMap<&'static str, KernelTime>>>,
}

/// Where the time of one kernel went.
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelTime {
    /// Calls.
    pub calls: u64,
    /// Seconds.
    pub seconds: f64,
    /// Seconds in matrix products, summed over threads.
    pub gemm_seconds: f64,
}

impl Cpu {
    /// A CPU device with `threads` threads (0: one per core).
    pub fn new(threads: usize) -> Result<Self> {
        Self::build(threads, false)
    }

    /// Like [`Cpu::new`], but every allocation is filled with NaN (-1 for indices), for tests: a kernel that
    /// leaves part of its output unwritten, or reads what nobody wrote, shows at once.
    pub fn poisoned(threads: usize) -> Result<Self> {
        Self::build(threads, true)
    }

    /// Threads that a device can have at most.
    pub const MAX_THREADS: usize = 1024;

    fn build(threads: usize, poison: bool) -> Result<Self> {
        if threads > Self::MAX_THREADS {
            let want = format!("0 (one per core) to {}", Self::MAX_THREADS);
            return Err(Error::arg("Cpu::new", "threads", threads, want));
        }
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| Error::arg("Cpu::new", "threads", e, "a number of threads the system can start"))?;
        Ok(Cpu { threads, pool: Arc::new(Pool::new(poison)), turn: Mutex::default(), profile: None })
    }

    /// Times every kernel from now on. Products are timed for the whole process: profile one device at a time.
    pub fn profiled(mut self) -> Self {
        gemm::TIMED.store(true, Ordering::Relaxed);
        self.profile = Some(Mutex::default());
        self
    }

    /// Threads that kernels run on.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Times by kernel name; empty unless [`Cpu::profiled`].
    pub fn profile(&self) -> BTreeMap<&'static str, KernelTime> {
        match &self.profile {
            Some(p) => p.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            None => BTreeMap::new(),
        }
    }

    /// Waits for the calls of other threads.
    fn turn(&self) -> MutexGuard<'_, ()> {
        // A kernel that panicked left values behind, if not the right ones.
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a kernel on the device's threads.
    fn install(&self, kernel: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        let _turn = self.turn();
        match rayon::current_thread_index() {
            None => self.threads.install(kernel),
            // A thread of another pool, waiting in `install`, would take up other work of its pool: if that calls a
            // kernel too, it waits for its own turn to end.
            Some(_) => std::thread::scope(|s| match s.spawn(|| self.threads.install(kernel)).join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }),
        }
    }

    /// Memory that may be held from now on, in all; what would take more is an [`Error::OutOfMemory`].
    pub fn limit(&self, bytes: u64) {
        self.pool.limit(bytes);
    }

    /// Runs `kernel` in a workspace of as many bytes as its query says.
    fn launch<A: Query>(&self, a: &A, kernel: impl FnOnce(&Workspace) -> Result<()> + Send) -> Result<()> {
        let name = a.kernel();
        // Before any size is formed from them.
        for (arg, _, v) in a.views() {
            check_view(name, arg, &v)?;
        }
        let threads = self.threads();
        let bytes = a.workspace(threads);
        let (start, before) = (Instant::now(), gemm::NANOS.load(Ordering::Relaxed));
        let result = self.install(|| {
            let memory =
                self.pool.reserve(bytes).ok_or_else(|| self.out_of_memory(Role::Workspace, bytes))?;
            let ws = Workspace::new(memory, threads, self.pool.is_poisoned());
            kernel(&ws)?;
            ws.check(name)
        });
        let Some(profile) = &self.profile else { return result };
        let mut all = profile.lock().unwrap_or_else(PoisonError::into_inner);
        let k = all.entry(name).or_default();
        k.calls += 1;
        k.seconds += start.elapsed().as_secs_f64();
        k.gemm_seconds += (gemm::NANOS.load(Ordering::Relaxed) - before) as f64 * 1e-9;
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

/// Arguments that know what a launch takes on this device.
pub(super) trait Query: Args {
    /// Bytes of workspace on this many threads.
    fn workspace(&self, threads: usize) -> usize;
}

/// One CPU is one rank.
impl Collectives for Cpu {
    fn ranks(&self) -> usize {
        1
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_reduce(&self, _s: Stream, x: Acc) -> Result<()> {
        check_view("all_reduce", "x", &x.0)
    }
    fn reduce_scatter(&self, s: Stream, x: In, y: Out) -> Result<()> {
        self.all_gather(s, x, y)
    }
    fn all_gather(&self, _s: Stream, x: In, y: Out) -> Result<()> {
        let _turn = self.turn();
        let from = bytes("all_gather", "x", &x)?;
        let to = bytes_mut("all_gather", "y", &y.0)?;
        if from.len() != to.len() {
            return Err(Error::arg("all_gather", "y", y.0.dims, x.dims));
        }
        to.copy_from_slice(from);
        Ok(())
    }
}

impl Device for Cpu {
    fn name(&self) -> String {
        format!("cpu ({} threads)", self.threads.current_num_threads())
    }

    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        let addr = self.pool.take(role, bytes).ok_or_else(|| self.out_of_memory(role, bytes))?;
        // SAFETY: the pool gave this block, and takes it back when the buffer is dropped.
        Ok(unsafe { Buffer::new(addr, bytes, role, self.pool.clone()) })
    }

    fn copy_in(&self, _s: Stream, src: &[u8], dst: Out) -> Result<()> {
        let _turn = self.turn();
        let to = bytes_mut("copy_in", "dst", &dst.0)?;
        if to.len() != src.len() {
            return Err(Error::arg("copy_in", "src", src.len(), format!("{} bytes", to.len())));
        }
        to.copy_from_slice(src);
        Ok(())
    }

    fn read_later(&self, _s: Stream, src: In) -> Result<Pending> {
        let _turn = self.turn();
        let v = packed("read_later", "src", &src)?;
        Ok(Pending::new(move || Ok(v)))
    }

    fn collectives(&self) -> &dyn Collectives {
        self
    }

    fn available(&self) -> Option<u64> {
        let text = std::fs::read_to_string("/proc/meminfo").ok()?;
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    }

    fn memory(&self) -> Memory {
        self.pool.memory()
    }
}

macro_rules! impl_cpu {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => {
        $($(#[$fdoc:meta])* $field:ident: $ty:ty,)*
    })*) => { pastey::paste! {
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
