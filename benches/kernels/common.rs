//! Common code of the benches: random tensors, timing, and the table of results.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use ett::backend::{Args, Cost, Cpu, DType, Dims, Kernels, Role, to_bf16};
use ett::compare::{Bounds, compare};
use ett::error::{Error, Result};
use ett::rng::Philox;
use ett::tensor::Tensor;
use serde_json::json;

/// Inputs are rotated through this many bytes: three times the largest L2 in use.
const ROTATE: u64 = 150 << 20;
/// Launches in one recorded graph, which hides the launch overhead of the host.
const BATCH: usize = 20;

/// A kernel call with its own set of tensors: calls the kernel on `dev` and returns the minimum cost of the call.
pub type Call = Box<dyn Fn(&dyn Kernels) -> Result<Cost>>;
/// Compares the results of the call with a reference.
pub type Check = Box<dyn Fn(&dyn Kernels) -> std::result::Result<(), String>>;

/// Makes a set of tensors from a seed, with the call and an optional check of its results.
pub type Make<'a> = &'a dyn Fn(&dyn Kernels, u64) -> Result<(Call, Option<Check>)>;

/// The highest rates of this device, measured in the same run.
#[derive(Default, Clone, Copy)]
struct Ceilings {
    /// Bytes read plus bytes written per second by a large copy.
    copy: f64,
    /// Operations per second of a large matrix product.
    gemm: f64,
}

/// Device, criterion, and results so far.
pub struct Bench {
    pub dev: Arc<dyn Kernels>,
    /// True on a GPU, which is timed at real sizes by its own clock.
    pub gpu: bool,
    criterion: Criterion,
    ceilings: Ceilings,
    rows: Vec<serde_json::Value>,
    peers: BTreeMap<&'static str, (&'static str, f64)>,
    #[cfg(ett_cuda)]
    cuda: Option<Arc<ett::backend::Cuda>>,
}

impl Bench {
    /// The GPU if there is one, else the CPU.
    pub fn new(criterion: Criterion) -> Result<Self> {
        #[cfg(ett_cuda)]
        if ett::backend::Cuda::count().is_ok_and(|n| n > 0) {
            let cuda = Arc::new(ett::backend::Cuda::new(0)?);
            return Ok(Bench {
                dev: cuda.clone(),
                gpu: true,
                criterion,
                ceilings: Ceilings::default(),
                rows: Vec::new(),
                peers: crate::peers::h200(),
                cuda: Some(cuda),
            });
        }
        eprintln!("no GPU: timing the CPU, at small shapes");
        Ok(Bench {
            dev: Arc::new(Cpu::new(0)?),
            gpu: false,
            criterion,
            ceilings: Ceilings::default(),
            rows: Vec::new(),
            peers: BTreeMap::new(),
            #[cfg(ett_cuda)]
            cuda: None,
        })
    }

    pub fn criterion(&mut self) -> &mut Criterion {
        &mut self.criterion
    }

    /// The time of `work` by the device's own clock.
    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
        #[cfg(ett_cuda)]
        if let Some(cuda) = &self.cuda {
            return cuda.time(work);
        }
        let start = Instant::now();
        work()?;
        Ok(start.elapsed())
    }

    /// Measures the rates of a large copy and a large matrix product.
    pub fn ceilings(&mut self) -> Result<()> {
        let (bytes, n) = if self.gpu { (4u64 << 30, 8192) } else { (64 << 20, 1024) };
        let copy = self.copy_seconds(bytes)?;
        self.ceilings.copy = 2.0 * bytes as f64 / copy;
        let (dtype, dev) = (if self.gpu { DType::Bf16 } else { DType::F32 }, self.dev.clone());
        let (a, b, y) =
            (normal(&*dev, dtype, [n, n], 1)?, normal(&*dev, dtype, [n, n], 2)?, out(&*dev, dtype, [n, n])?);
        let product = || {
            let args = ett::backend::Matmul {
                a: a.view(),
                b: b.view(),
                ta: false,
                tb: true,
                bias: None,
                y: y.out(),
            };
            dev.matmul(ett::backend::Stream::COMPUTE, &args)
        };
        let gemm = self.best(&mut || product())?;
        self.ceilings.gemm = 2.0 * (n as f64).powi(3) / gemm;
        println!(
            "{}: copy {:.2} TB/s, product of {n}x{n} {dtype} matrices {:.1} TFLOP/s",
            dev.name(),
            self.ceilings.copy * 1e-12,
            self.ceilings.gemm * 1e-12
        );
        Ok(())
    }

    /// The shortest of ten times of `work`, in seconds.
    fn best(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        work()?;
        let mut best = f64::MAX;
        for _ in 0..10 {
            best = best.min(self.time(work)?.as_secs_f64());
        }
        Ok(best)
    }

    fn copy_seconds(&self, bytes: u64) -> Result<f64> {
        let n = bytes as usize / 4;
        let (x, y) = (normal(&*self.dev, DType::F32, [n], 3)?, out(&*self.dev, DType::F32, [n])?);
        #[cfg(ett_cuda)]
        if self.cuda.is_some() {
            return self.best(&mut || self.dev.copy(ett::backend::Stream::COMPUTE, x.view(), y.out()));
        }
        let cast = ett::backend::Cast { x: x.view(), y: y.out() };
        self.best(&mut || self.dev.cast(ett::backend::Stream::COMPUTE, &cast))
    }

    /// Benches one kernel call. `make` makes a set of tensors from a seed; the check of the first set runs before
    /// anything is timed.
    pub fn kernel(&mut self, op: &'static str, shape: &str, dtype: DType, make: Make) {
        let name = format!("{op}/{shape} {dtype}");
        if let Err(e) = self.try_kernel(op, shape, dtype, make) {
            match e {
                Error::Unsupported { .. } => println!("{name}: skipped, {e}"),
                e => panic!("{name}: {e}"),
            }
        }
    }

    fn try_kernel(&mut self, op: &'static str, shape: &str, dtype: DType, make: Make) -> Result<()> {
        let dev = self.dev.clone();
        let (first, check) = make(&*dev, 1)?;
        let cost = first(&*dev)?;
        dev.synchronize()?;
        if let Some(check) = check {
            check(&*dev).map_err(Error::Training)?;
        }
        let mut calls = vec![first];
        if self.gpu {
            let sets = (ROTATE / cost.bytes.max(1) + 1).min(BATCH as u64);
            for seed in 2..=sets {
                calls.push(make(&*dev, seed)?.0);
            }
        }
        let batch = if self.gpu { BATCH } else { 1 };
        let mut round = || -> Result<()> {
            for i in 0..batch {
                calls[i % calls.len()](&*dev)?;
            }
            Ok(())
        };
        round()?;
        let recording = dev.record(&mut round)?;
        let mut samples = Vec::new();
        let mut group = self.criterion.benchmark_group(op);
        group.throughput(match cost.flop {
            0 => Throughput::Bytes(cost.bytes),
            flop => Throughput::Elements(flop),
        });
        // `self` is borrowed by criterion here, so `self.time` cannot be called.
        #[cfg(ett_cuda)]
        let cuda = self.cuda.clone();
        let time = |work: &mut dyn FnMut() -> Result<()>| -> Result<Duration> {
            #[cfg(ett_cuda)]
            if let Some(cuda) = &cuda {
                return cuda.time(work);
            }
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        };
        group.bench_function(format!("{shape} {dtype}"), |b| {
            b.iter_custom(|iterations| {
                let rounds = iterations.div_ceil(batch as u64);
                let took = time(&mut || {
                    for _ in 0..rounds {
                        match &recording {
                            Some(r) => r.replay()?,
                            None => round()?,
                        }
                    }
                    Ok(())
                });
                let one = took.expect("the kernel ran before").as_secs_f64() / (rounds * batch as u64) as f64;
                samples.push(one);
                Duration::from_secs_f64(one * iterations as f64)
            });
        });
        group.finish();
        self.row(op, shape, dtype, cost, samples);
        Ok(())
    }

    fn row(&mut self, op: &str, shape: &str, dtype: DType, cost: Cost, mut samples: Vec<f64>) {
        if samples.is_empty() {
            return;
        }
        samples.sort_by(f64::total_cmp);
        let at = |q: f64| samples[((samples.len() - 1) as f64 * q).round() as usize];
        let (median, p20, p80) = (at(0.5), at(0.2), at(0.8));
        let (flops, rate) = (cost.flop as f64 / median, cost.bytes as f64 / median);
        // The kernel is bound by the one that would take longer at its ceiling.
        let floors = (cost.flop as f64 / self.ceilings.gemm, cost.bytes as f64 / self.ceilings.copy);
        let (bound, of_ceiling) =
            if floors.0 > floors.1 { ("product", floors.0 / median) } else { ("copy", floors.1 / median) };
        let key = format!("{op}/{shape} {dtype}");
        let peer = self.peers.get(key.as_str());
        self.rows.push(json!({
            "op": op,
            "shape": shape,
            "dtype": dtype.name(),
            "median_us": median * 1e6,
            "p20_us": p20 * 1e6,
            "p80_us": p80 * 1e6,
            "tflops": flops * 1e-12,
            "tbs": rate * 1e-12,
            "bound": bound,
            "of_ceiling": of_ceiling,
            "peer": peer.map(|p| p.0),
            "peer_us": peer.map(|p| p.1),
            "faster_than_peer": peer.map(|p| p.1 / (median * 1e6)),
        }));
    }

    /// Prints the table, and writes `raw.json` and `summary.md` to the folder given by `ETT_RECORD`.
    pub fn finish(self) -> std::io::Result<()> {
        self.criterion.final_summary();
        let mut table = String::from(
            "| kernel | shape | type | median us | p20 | p80 | TFLOP/s | TB/s | bound by | of the ceiling | peer | us | faster |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        for r in &self.rows {
            let f =
                |key: &str, digits: usize| r[key].as_f64().map_or(String::new(), |v| format!("{v:.digits$}"));
            let s = |key: &str| r[key].as_str().unwrap_or("").to_string();
            table += &format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.0}% | {} | {} | {} |\n",
                s("op"),
                s("shape"),
                s("dtype"),
                f("median_us", 1),
                f("p20_us", 1),
                f("p80_us", 1),
                f("tflops", 1),
                f("tbs", 2),
                s("bound"),
                100.0 * r["of_ceiling"].as_f64().unwrap_or(0.0),
                s("peer"),
                f("peer_us", 1),
                f("faster_than_peer", 2),
            );
        }
        println!("{table}");
        let Some(folder) = std::env::var_os("ETT_RECORD").map(PathBuf::from) else { return Ok(()) };
        std::fs::create_dir_all(&folder)?;
        let (copy, gemm) = (self.ceilings.copy * 1e-12, self.ceilings.gemm * 1e-12);
        let commit = std::env::var("ETT_COMMIT").unwrap_or_else(|_| "unknown".into());
        let raw = json!({
            "device": self.dev.name(),
            "commit": commit,
            "command": "cargo bench",
            "ceilings": { "copy_tbs": copy, "product_tflops": gemm },
            "rows": self.rows,
        });
        std::fs::write(folder.join("raw.json"), serde_json::to_string_pretty(&raw)? + "\n")?;
        let head = format!(
            "# Kernels on {}\n\nCommit {commit}. Command: `cargo bench`. Ceilings in the same run: copy {copy:.2} TB/s (bytes read plus \
             written), product {gemm:.1} TFLOP/s. Times are device time, launches hidden in a graph of {BATCH}, inputs \
             rotated through {} MB where they are smaller; TFLOP/s and TB/s are of the minimum work (`Args::cost`).\n\n",
            self.dev.name(),
            ROTATE >> 20,
        );
        std::fs::write(folder.join("summary.md"), head + &table)
    }
}

/// Normal random values: a block of them, repeated; its length shares no factor with the usual dimensions.
pub fn normal(dev: &dyn Kernels, dtype: DType, dims: impl Into<Dims>, seed: u64) -> Result<Tensor> {
    scaled(dev, dtype, dims, seed, 1.0)
}

/// Normal random values times `scale`.
pub fn scaled(
    dev: &dyn Kernels,
    dtype: DType,
    dims: impl Into<Dims>,
    seed: u64,
    scale: f64,
) -> Result<Tensor> {
    let dims = dims.into();
    let mut rng = Philox::new(seed, 0);
    let block: Vec<f64> = (0..dims.numel().min((1 << 18) + 5)).map(|_| scale * rng.normal()).collect();
    let bytes: Vec<u8> = match dtype {
        DType::F64 => block.iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::Bf16 => block.iter().flat_map(|&v| to_bf16(v).to_le_bytes()).collect(),
        _ => block.iter().flat_map(|&v| (v as f32).to_le_bytes()).collect(),
    };
    let t = Tensor::empty(dev, Role::Activation, dtype, dims)?;
    let flat = t.reshape([dims.numel()])?;
    // Copies several repetitions of the block at a time.
    let copies = ((32 << 20) / bytes.len().max(1)).max(1);
    let stretch = bytes.repeat(copies.min(dims.numel().div_ceil(block.len().max(1))));
    let mut at = 0;
    while at < dims.numel() {
        let n = (stretch.len() / dtype.size()).min(dims.numel() - at);
        dev.copy_in(ett::backend::Stream::COMPUTE, &stretch[..n * dtype.size()], flat.range(at, n)?.out())?;
        at += n;
    }
    Ok(t)
}

/// Indices below `below`.
pub fn ids(dev: &dyn Kernels, n: usize, below: usize, seed: u64) -> Result<Tensor> {
    let mut rng = Philox::new(seed, 1);
    let v: Vec<i32> = (0..n).map(|_| rng.below(below) as i32).collect();
    Tensor::from_host(dev, Role::Input, &v, [n])
}

/// A tensor to write.
pub fn out(dev: &dyn Kernels, dtype: DType, dims: impl Into<Dims>) -> Result<Tensor> {
    Tensor::zeros(dev, Role::Activation, dtype, dims)
}

/// The accumulator type for activations of `dtype`.
pub fn acc(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The first `rows` rows of a tensor, copied to the device `to`.
pub fn head(dev: &dyn Kernels, to: &dyn Kernels, t: &Tensor, rows: usize, dtype: DType) -> Result<Tensor> {
    let rows = rows.min(t.dims().rows());
    let part = t.rows(0, rows)?;
    Tensor::from_f64(to, Role::Input, dtype, &part.to_f64(dev)?, part.dims())
}

/// Compares the first rows of `got` with the CPU's result in `want`.
pub fn same(
    what: &str,
    dev: &dyn Kernels,
    got: &Tensor,
    cpu: &Cpu,
    want: &Tensor,
    dtype: DType,
) -> std::result::Result<(), String> {
    let text = |e: Error| e.to_string();
    let want_values = want.to_f64(cpu).map_err(text)?;
    let got = got.rows(0, want.dims().rows()).and_then(|t| t.to_f64(dev)).map_err(text)?;
    compare(what, &got, &want_values, want.dims().cols(), Bounds::of(dtype).times(2.0)).map(|_| ())
}

/// Calls the kernel and returns the cost of the call.
pub fn call<A: Args>(args: &A, run: impl FnOnce(&A) -> Result<()>) -> Result<Cost> {
    run(args)?;
    Ok(args.cost())
}
