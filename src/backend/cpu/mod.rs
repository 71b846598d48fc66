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
mod losses;
mod norm;
mod optim;
mod pointwise;
mod pool;
mod products;
mod resample;
mod sample;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod testing_b;
mod views;
mod xent;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::*;
use crate::error::{Error, Result};
pub(crate) use elem::{Elem, Real};
pub(crate) use gemm::{FEW, Mat, gemm};
pub(crate) use pool::{Pool, Scratch};
pub(crate) use views::*;

/// The CPU as a device.
pub struct Cpu {
    threads: rayon::ThreadPool,
    pool: Arc<Pool>,
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

    fn build(threads: usize, poison: bool) -> Result<Self> {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| Error::arg("Cpu::new", "threads", e, "a number of threads the system can start"))?;
        Ok(Cpu { threads, pool: Arc::new(Pool::new(poison)), profile: None })
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

    fn launch(&self, name: &'static str, kernel: impl FnOnce() -> Result<()> + Send) -> Result<()> {
        let Some(profile) = &self.profile else { return self.threads.install(kernel) };
        let (start, before) = (Instant::now(), gemm::NANOS.load(Ordering::Relaxed));
        let result = self.threads.install(kernel);
        let mut all = profile.lock().unwrap_or_else(PoisonError::into_inner);
        let k = all.entry(name).or_default();
        k.calls += 1;
        k.seconds += start.elapsed().as_secs_f64();
        k.gemm_seconds += (gemm::NANOS.load(Ordering::Relaxed) - before) as f64 * 1e-9;
        result
    }

    /// Scratch of `n` elements for the duration of a kernel; contents unspecified.
    pub(crate) fn scratch<T: crate::tensor::Element>(&self, n: usize) -> Scratch<T> {
        Scratch::new(&self.pool, n)
    }
}

struct OneRank;

impl Collectives for OneRank {
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
        let addr = self.pool.take(role, bytes).ok_or_else(|| Error::OutOfMemory {
            device: "cpu".into(),
            role: role.to_string(),
            asked: super::size(bytes as u64),
            free: "the system gave none".into(),
            held: self.pool.memory().largest(),
        })?;
        Ok(Buffer::new(addr, bytes, role, self.pool.clone()))
    }

    fn copy_in(&self, _s: Stream, src: &[u8], dst: Out) -> Result<()> {
        let to = bytes_mut("copy_in", "dst", &dst.0)?;
        if to.len() != src.len() {
            return Err(Error::arg("copy_in", "src", src.len(), format!("{} bytes", to.len())));
        }
        to.copy_from_slice(src);
        Ok(())
    }

    fn read_later(&self, _s: Stream, src: In) -> Result<Pending> {
        check_view("read_later", "src", &src)?;
        let (rows, width) = (src.dims.rows(), src.dims.cols() * src.dtype.size());
        let mut v = Vec::with_capacity(rows * width);
        for r in 0..rows {
            let at = src.buf.addr() + src.off + r as u64 * src.ld as u64 * src.dtype.size() as u64;
            // In bounds by check_view; memory is initialised from the moment the pool hands it out.
            v.extend_from_slice(unsafe { std::slice::from_raw_parts(at as *const u8, width) });
        }
        Ok(Pending::new(move || Ok(v)))
    }

    fn collectives(&self) -> &dyn Collectives {
        &OneRank
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
    })*) => {
        impl Kernels for Cpu {
            $(fn $name(&self, _s: Stream, a: &$args<'_>) -> Result<()> {
                self.launch(stringify!($name), || $module::$name(self, a))
            })*
        }
    };
}
super::contract::kernel_table!(impl_cpu);
