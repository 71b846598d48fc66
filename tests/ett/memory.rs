//! Nothing of size tokens x codes is stored: measured on the heap, in a process of its own. Steps use the memory of
//! earlier steps again.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use ett::autograd::Tape;
use ett::backend::{Cpu, DType, Device, Precision, Role};
use ett::config::StageKind;
use ett::error::{Error, Result};
use ett::feed::{DataSet, Template};
use ett::model::Ett;
use ett::ops::{self, Entropy, IbqOptions};
use ett::report::{Evaluation, Report};
use ett::tensor::Tensor;
use ett::train::{self, RunOptions};

use crate::common::{Outcome, Scratch, gpu, normal};
use crate::run::{config, pictures};

/// The system's allocator, which also counts the bytes held, their peak, and all bytes ever allocated.
pub struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static TOTAL: AtomicUsize = AtomicUsize::new(0);

fn grew(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
    TOTAL.fetch_add(bytes, Relaxed);
}

// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: the caller upholds the contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grew(layout.size());
        // SAFETY: the caller upholds the contract.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller upholds the contract.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new block may both exist for a moment.
        grew(size);
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller upholds the contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// The most bytes that the heap has held.
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

const M: usize = 4096;
const K: usize = 131_072;
const D: usize = 32;
const LIMIT: u64 = 64 << 20;
/// Set in the child process that measures.
const INSIDE: &str = "ETT_TEST_MEASURE_MEMORY";

#[test]
fn quantizer_stays_under_64_mib() -> Outcome {
    if std::env::var_os(INSIDE).is_some() {
        return measure();
    }
    let out = Command::new(std::env::current_exe()?)
        .args(["memory::quantizer_stays_under_64_mib", "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()?;
    let text = String::from_utf8_lossy(&out.stdout);
    println!("{text}");
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    assert!(text.contains("1 passed") && text.contains("beyond inputs and gradients"), "{text}");
    Ok(())
}

fn measure() -> Outcome {
    let cpu = std::sync::Arc::new(Cpu::new(0)?);
    let prec = Precision::F32;
    let put = |seed: u64, n: usize, scale: f64, dims: [usize; 2]| {
        let v: Vec<f32> = normal(seed, n).iter().map(|v| (v * scale) as f32).collect();
        Tensor::from_host(&*cpu, Role::Input, &v, dims)
    };
    let scale = (D as f64).powf(-0.25);
    let z = put(1, M * D, scale, [M, D])?;
    let e = put(2, K * D, scale, [K, D])?;
    let g = put(3, M * D, 1.0, [M, D])?;
    let de = Tensor::zeros(&*cpu, Role::Gradient, DType::F32, [K, D])?;
    let weights =
        [0.25, 0.0125, -0.0125].map(|w| Tensor::from_f64(&*cpu, Role::Input, DType::F32, &[w], [1]));
    let [w_quant, w_sample, w_avg] = weights;
    let (w_quant, w_sample, w_avg) = (w_quant?, w_sample?, w_avg?);
    let inv_count = Tensor::from_f64(&*cpu, Role::Input, DType::F32, &[1.0 / M as f64], [1])?;

    let device = cpu.memory();
    let held = device.total();
    assert_eq!(device.peak, held, "before the step, the peak is the memory held");
    let heap = LIVE.load(Relaxed);
    PEAK.store(heap, Relaxed);
    let asked_for = TOTAL.load(Relaxed);
    let start = Instant::now();

    let t = Tape::new(cpu.clone(), prec);
    let (z, e) = (t.leaf(z), t.weight(e, Some(de.clone())));
    let o = IbqOptions {
        entropy: Some(Entropy { temperature: 0.01, eps: 1e-5 }),
        beta_commit: 1.0,
        beta_code: 0.25,
    };
    let q = ops::ibq(&t, &z, &e, &inv_count, o)?;
    let (sample, avg) = (q.sample.as_ref().ok_or("sample")?, q.avg.as_ref().ok_or("avg")?);
    let forward = start.elapsed().as_secs_f64();
    let seeds = [(&q.zq, &g), (&q.quant, &w_quant), (sample, &w_sample), (avg, &w_avg)];
    let mut grads = t.backward(&seeds)?;
    let dz = grads.take(&z)?.ok_or("a gradient of the tokens")?;

    let seconds = start.elapsed().as_secs_f64();
    let on_heap = (PEAK.load(Relaxed) - heap) as u64;
    let on_device = cpu.memory().peak - held;
    let in_all = TOTAL.load(Relaxed) - asked_for;
    // dz is a gradient but was allocated during the measurement, so it counts; the limit has room for it.
    println!(
        "{M} x {K} x {D}: {:.1} MiB on the heap, {:.1} MiB by the device's count, beyond inputs and gradients; \
         {:.1} MiB allocated in total; forward {forward:.1} s, backward {:.1} s",
        on_heap as f64 / (1 << 20) as f64,
        on_device as f64 / (1 << 20) as f64,
        in_all as f64 / (1 << 20) as f64,
        seconds - forward
    );
    for (what, bytes) in [("heap", on_heap), ("device", on_device)] {
        assert!(bytes < LIMIT, "{what}: {bytes} bytes beyond inputs and gradients, wanted below {LIMIT}");
    }
    // Nor is such memory allocated and freed in pieces: every allocation of the process counts here.
    assert!((in_all as u64) < LIMIT, "{in_all} bytes were allocated in total, wanted below {LIMIT}");
    // Checks the counting: allocations that are known to occur were counted.
    assert!(on_device >= (M * D * 4 + 2 * K * 4) as u64 && on_heap >= on_device && in_all as u64 >= on_heap);
    let sound = |t: &Tensor| -> ett::error::Result<bool> {
        let v = t.to_f64(&*cpu)?;
        Ok(v.iter().all(|x| x.is_finite()) && v.iter().any(|&x| x != 0.0))
    };
    assert!(sound(&dz)? && sound(&de)?, "the gradients are finite and not zero");
    Ok(())
}

/// In place of an evaluation after every step: how much memory the device has taken by then.
#[derive(Default)]
struct Watch(Mutex<Vec<(StageKind, u64)>>);

impl Evaluation for Watch {
    fn check(&self, _: &DataSet, _: usize) -> Result<()> {
        Ok(())
    }

    fn during(
        &self,
        model: &mut Ett,
        _: &DataSet,
        _: &Template,
        stage: StageKind,
    ) -> Result<BTreeMap<&'static str, f64>> {
        self.0.lock().expect("no panic").push((stage, model.params.device().memory().taken));
        Ok(BTreeMap::new())
    }

    fn closing(&self, _: &mut Ett, _: &DataSet, _: &Template, _: &Path) -> Result<Report> {
        Err(Error::Training("nothing is evaluated".into()))
    }
}

/// The first step of a stage takes memory, and so does the second, which is recorded. Later ones do not.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_later_steps_take_no_memory_from_the_driver() -> Outcome {
    let dir = Scratch::new();
    pictures(&dir.path("data"));
    let mut cfg = config(&dir.path("data"));
    cfg.train.eval_every = 1;
    cfg.stage.iter_mut().for_each(|s| s.steps = 6);
    let watch = Watch::default();
    let out = dir.path("out");
    let o = RunOptions::quiet(&out, &watch);
    train::run(&cfg, gpu(), &o)?;
    let taken = watch.0.into_inner()?;
    for kind in StageKind::ALL {
        let steps: Vec<u64> = taken.iter().filter(|(of, _)| *of == kind).map(|(_, bytes)| *bytes).collect();
        println!("{}: {steps:?} bytes taken", kind.name());
        assert!(steps.len() == 6 && steps[0] > 0, "{}: {steps:?}", kind.name());
        assert!(steps[1..].iter().all(|bytes| *bytes == steps[1]), "{}: {steps:?}", kind.name());
    }
    Ok(())
}
