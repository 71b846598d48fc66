//! Helpers shared by the tests.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ett::backend::cuda::Shim;
use ett::backend::{Cpu, DType, Dims, Kernels, Role};
use ett::rng::Philox;
use ett::tensor::Tensor;

/// The result of a test; it fails with the message of the error.
pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// A program of this crate: the one that cargo has built, or on a machine without cargo the one beside the tests.
pub fn program(name: &str) -> PathBuf {
    let built = match name {
        "ett-train" => env!("CARGO_BIN_EXE_ett-train"),
        _ => env!("CARGO_BIN_EXE_ett"),
    };
    let beside = std::env::current_exe().ok().and_then(|tests| Some(tests.parent()?.join(name)));
    match beside.filter(|path| path.is_file()) {
        Some(path) if !Path::new(built).is_file() => path,
        _ => built.into(),
    }
}

/// A CPU device with poisoned memory.
pub fn cpu(threads: usize) -> Arc<dyn Kernels> {
    Arc::new(Cpu::poisoned(threads).expect("threads can be started"))
}

/// Waits until no other test uses the GPU, and keeps it for this one: until the end of its thread. Tests measure its
/// memory and its time, and some need nearly all of it.
pub fn gpu_turn() {
    static GPU: Mutex<()> = Mutex::new(());
    thread_local!(static MINE: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) });
    MINE.with_borrow_mut(|mine| {
        // A test that failed leaves the GPU usable.
        mine.get_or_insert_with(|| GPU.lock().unwrap_or_else(PoisonError::into_inner));
    });
}

/// The first GPU, with poisoned memory, for one test at a time; fails if there is none.
pub fn gpu() -> Arc<dyn Kernels> {
    gpu_forcing(&std::env::var("ETT_FORCE").unwrap_or_default())
}

/// The same with forced implementations, `op=kernel,op=kernel`.
#[cfg(ett_cuda)]
pub fn gpu_forcing(force: &str) -> Arc<dyn Kernels> {
    use ett::backend::cuda::{Cuda, Options};
    gpu_turn();
    let options = Options { poison: true, force: force.into(), ..Options::from_env() };
    Arc::new(Cuda::with(0, &options).expect("a GPU"))
}

/// Without CUDA, tests that ask for a GPU fail.
#[cfg(not(ett_cuda))]
pub fn gpu_forcing(_force: &str) -> Arc<dyn Kernels> {
    ett::backend::open("cuda", 0).expect("a GPU")
}

/// The kernels compiled for the CPU; `tools/shim-test` builds them and sets `ETT_SHIM`.
pub fn shim() -> Arc<dyn Kernels> {
    shim_forcing(&std::env::var("ETT_FORCE").unwrap_or_default())
}

/// The same with forced implementations, `op=kernel,op=kernel`.
pub fn shim_forcing(force: &str) -> Arc<dyn Kernels> {
    Arc::new(open_shim(force))
}

/// The shim as what it is.
pub fn open_shim(force: &str) -> Shim {
    Shim::open(Path::new(&shim_path()), force).expect("the shim can be loaded")
}

/// Where the shim is.
pub fn shim_path() -> String {
    std::env::var("ETT_SHIM").expect("ETT_SHIM names libett_shim.so: use tools/shim-test")
}

/// `n` standard normal numbers, the same at every call.
pub fn normal(seed: u64, n: usize) -> Vec<f64> {
    let mut rng = Philox::new(seed, 77);
    (0..n).map(|_| rng.normal()).collect()
}

/// Normal numbers times `scale`.
pub fn scaled(seed: u64, n: usize, scale: f64) -> Vec<f64> {
    normal(seed, n).into_iter().map(|v| scale * v).collect()
}

/// Distinct numbers in random order, at least `gap` apart from each other and from 0, up to about `n * gap / 2` in
/// magnitude: for functions with kinks.
pub fn spread(seed: u64, n: usize, gap: f64) -> Vec<f64> {
    let mut v: Vec<f64> = (0..n).map(|i| gap * (i as f64 - n as f64 / 2.0 + 0.37)).collect();
    Philox::new(seed, 78).shuffle(&mut v);
    v
}

/// Indices below `below`.
pub fn ids(seed: u64, n: usize, below: usize) -> Vec<i32> {
    let mut rng = Philox::new(seed, 79);
    (0..n).map(|_| rng.below(below) as i32).collect()
}

/// Values as a tensor of `dtype`.
pub fn tensor(dev: &dyn Kernels, dtype: DType, values: &[f64], dims: impl Into<Dims>) -> Tensor {
    Tensor::from_f64(dev, Role::Input, dtype, values, dims).expect("values fit their shape")
}

/// Indices as a vector on the device.
pub fn int(dev: &dyn Kernels, values: &[i32]) -> Tensor {
    Tensor::from_host(dev, Role::Input, values, [values.len()]).expect("values fit their shape")
}

/// Values after rounding to `dtype`.
pub fn rounded(dtype: DType, values: &[f64]) -> Vec<f64> {
    values.iter().map(|&v| dtype.rounded(v)).collect()
}

/// Euclidean norm.
pub fn norm(v: &[f64]) -> f64 {
    v.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// The folder of the fixtures, in the package or where a bundle for a GPU machine was unpacked.
pub fn fixtures() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("tests/fixtures")
}

/// A temporary folder that is removed when this value is dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ett-tests-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("the temporary folder can be written");
        Scratch(dir)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
