//! Conformance: every kernel of a device against the CPU in f64, on the same rounded inputs.
//!
//! The project's comparator judges each call. Outputs lie in larger buffers with guard bands, some as columns of
//! wider tensors, some off their natural alignment. They start poisoned, or with random values if the kernel adds to
//! them. The memory around them must not change, every value must be written, and a repeated call must give the same
//! bits.
//!
//! To add a device: a `#[test]` that calls [`run`] with it and [`Report::expect`] with the kernels that it may lack,
//! and one that calls [`reject::run`]. To add a kernel: a row in [`TABLE`] and its cases in the module of its kind.

mod attention;
mod broken;
mod case;
mod codebook;
mod conv;
mod devices;
mod interface;
mod losses;
mod norms;
mod optim;
mod place;
mod pointwise;
mod products;
mod quantizer;
pub mod reject;
mod resample;
mod rows;
mod sampling;
mod workspace;
mod xent;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use ett::backend::{Access, Cpu, KERNELS, Kernels, Precision};
use ett::compare::{compare, no_worse_than};
use ett::error::Error;

use case::{Arg, Case, Draw, Judge, Layout, ONCE, SANITIZER, Seen, round};
use place::{Placed, compute, views};

/// Amount of testing; each size contains the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    /// One minimal case of each kind, for tools that slow everything down.
    Sanitizer,
    /// Small cases among the small shapes, once each, for a device on which a launch takes milliseconds.
    Shim,
    /// Small shapes around the edges of tiles, three times each.
    Tiny,
    /// The model's sizes, twenty times each.
    Full,
}

/// A row of the table.
pub struct Kernel {
    pub name: &'static str,
    /// The cases of all sizes.
    pub cases: fn() -> Vec<Case>,
    /// A small call with a distinct number for each letter of the shapes, whose arguments [`reject`] damages.
    pub sample: fn() -> Case,
    /// Arguments that a device may refuse unless their rows begin on multiples of 16 bytes.
    pub aligned: &'static [&'static str],
    /// Whether the CPU takes arguments without gaps only.
    pub flat_on_cpu: bool,
}

const fn kernel(name: &'static str, cases: fn() -> Vec<Case>, sample: fn() -> Case) -> Kernel {
    Kernel { name, cases, sample, aligned: &[], flat_on_cpu: false }
}

impl Kernel {
    const fn flat_on_cpu(self) -> Self {
        Kernel { flat_on_cpu: true, ..self }
    }
    const fn aligned(self, aligned: &'static [&'static str]) -> Self {
        Kernel { aligned, ..self }
    }
}

/// The covered kernels.
pub const TABLE: &[Kernel] = &[
    kernel("matmul", products::matmul, products::matmul_sample),
    kernel("linear_gelu", products::linear_gelu, products::linear_gelu_sample),
    kernel("matmul_acc", products::matmul_acc, products::matmul_acc_sample),
    kernel("col_sum", products::col_sum, products::col_sum_sample),
    kernel("conv2d_fwd", conv::fwd, conv::fwd_sample).flat_on_cpu(),
    kernel("conv2d_bwd_data", conv::bwd_data, conv::bwd_data_sample).flat_on_cpu(),
    kernel("conv2d_bwd_weight", conv::bwd_weight, conv::bwd_weight_sample).flat_on_cpu(),
    kernel("upsample2x_weights_fwd", conv::up_weights_fwd, conv::up_weights_fwd_sample).flat_on_cpu(),
    kernel("upsample2x_weights_bwd", conv::up_weights_bwd, conv::up_weights_bwd_sample).flat_on_cpu(),
    kernel("upsample2x_fwd", resample::up_fwd, resample::up_fwd_sample).flat_on_cpu(),
    kernel("upsample2x_bwd", resample::up_bwd, resample::up_bwd_sample).flat_on_cpu(),
    kernel("max_pool2x2_fwd", resample::pool_fwd, resample::pool_fwd_sample).flat_on_cpu(),
    kernel("max_pool2x2_bwd", resample::pool_bwd, resample::pool_bwd_sample).flat_on_cpu(),
    kernel("group_norm_fwd", norms::group_fwd, norms::group_fwd_sample).flat_on_cpu(),
    kernel("group_norm_stats", norms::group_stats, norms::group_stats_sample).flat_on_cpu(),
    kernel("group_norm_bwd", norms::group_bwd, norms::group_bwd_sample).flat_on_cpu(),
    kernel("rms_norm_fwd", norms::rms_fwd, norms::rms_fwd_sample),
    kernel("rms_norm_bwd", norms::rms_bwd, norms::rms_bwd_sample),
    kernel("layer_norm_fwd", norms::layer_fwd, norms::layer_fwd_sample),
    kernel("layer_norm_bwd", norms::layer_bwd, norms::layer_bwd_sample),
    kernel("batch_norm_fwd", norms::batch_fwd, norms::batch_fwd_sample).flat_on_cpu(),
    kernel("batch_norm_bwd", norms::batch_bwd, norms::batch_bwd_sample).flat_on_cpu(),
    kernel("batch_norm_eval_fwd", norms::batch_eval_fwd, norms::batch_eval_fwd_sample).flat_on_cpu(),
    kernel("batch_norm_eval_bwd", norms::batch_eval_bwd, norms::batch_eval_bwd_sample).flat_on_cpu(),
    kernel("batch_norm_merge", norms::batch_merge, norms::batch_merge_sample),
    kernel("batch_norm_merged_bwd", norms::batch_merged_bwd, norms::batch_merged_bwd_sample).flat_on_cpu(),
    kernel("batch_norm_running", norms::batch_running, norms::batch_running_sample),
    kernel("l2_norm_fwd", norms::l2_fwd, norms::l2_fwd_sample),
    kernel("l2_norm_bwd", norms::l2_bwd, norms::l2_bwd_sample),
    kernel("unary_fwd", pointwise::unary_fwd, pointwise::unary_fwd_sample),
    kernel("unary_bwd", pointwise::unary_bwd, pointwise::unary_bwd_sample),
    kernel("add", pointwise::add, pointwise::add_sample),
    kernel("accumulate", pointwise::accumulate, pointwise::accumulate_sample),
    kernel("cast", pointwise::cast, pointwise::cast_sample),
    kernel("scale_bytes", pointwise::scale_bytes, pointwise::scale_bytes_sample),
    kernel("fill", pointwise::fill, pointwise::fill_sample),
    kernel("channel_affine_fwd", pointwise::affine_fwd, pointwise::affine_fwd_sample),
    kernel("channel_affine_bwd", pointwise::affine_bwd, pointwise::affine_bwd_sample),
    kernel("swiglu_fwd", pointwise::swiglu_fwd, pointwise::swiglu_fwd_sample),
    kernel("swiglu_bwd", pointwise::swiglu_bwd, pointwise::swiglu_bwd_sample),
    kernel("rope", rows::rope, rows::rope_sample),
    kernel("gather_fwd", rows::gather_fwd, rows::gather_fwd_sample),
    kernel("gather_bwd", rows::gather_bwd, rows::gather_bwd_sample),
    kernel("put_rows", rows::put_rows, rows::put_rows_sample),
    kernel("pick", rows::pick, rows::pick_sample),
    kernel("count_up", rows::count_up, rows::count_up_sample),
    kernel("arange", rows::arange, rows::arange_sample),
    kernel("attention_fwd", attention::fwd, attention::fwd_sample),
    kernel("attention_bwd", attention::bwd, attention::bwd_sample),
    kernel("linear_xent_fwd", xent::fwd, xent::fwd_sample),
    kernel("linear_xent_bwd", xent::bwd, xent::bwd_sample),
    kernel("xent_fwd", xent::stored_fwd, xent::stored_fwd_sample),
    kernel("xent_bwd", xent::stored_bwd, xent::stored_bwd_sample),
    kernel("l1_fwd", losses::l1_fwd, losses::l1_fwd_sample).flat_on_cpu(),
    kernel("l1_bwd", losses::l1_bwd, losses::l1_bwd_sample).flat_on_cpu(),
    kernel("lpips_fwd", losses::lpips_fwd, losses::lpips_fwd_sample),
    kernel("lpips_bwd", losses::lpips_bwd, losses::lpips_bwd_sample),
    kernel("gan_generator_fwd", losses::generator_fwd, losses::generator_fwd_sample),
    kernel("gan_generator_bwd", losses::generator_bwd, losses::generator_bwd_sample),
    kernel("hinge_fwd", losses::hinge_fwd, losses::hinge_fwd_sample).flat_on_cpu(),
    kernel("hinge_bwd", losses::hinge_bwd, losses::hinge_bwd_sample).flat_on_cpu(),
    kernel("lecam_update", losses::lecam_update, losses::lecam_update_sample).flat_on_cpu(),
    kernel("lecam_fwd", losses::lecam_fwd, losses::lecam_fwd_sample).flat_on_cpu(),
    kernel("lecam_bwd", losses::lecam_bwd, losses::lecam_bwd_sample).flat_on_cpu(),
    kernel("sample", sampling::cases, sampling::sample),
    kernel("nearest", codebook::nearest, codebook::nearest_sample).aligned(&["z", "e"]),
    kernel("ibq_rows", quantizer::rows, quantizer::rows_sample),
    kernel("ibq_cols", quantizer::cols, quantizer::cols_sample),
    kernel("ibq_losses", quantizer::losses, quantizer::losses_sample),
    kernel("ibq_bwd", quantizer::bwd, quantizer::bwd_sample),
    kernel("vq_losses", quantizer::vq_losses, quantizer::vq_losses_sample),
    kernel("vq_bwd", quantizer::vq_bwd, quantizer::vq_bwd_sample),
    kernel("sum_squares", optim::sum_squares, optim::sum_squares_sample),
    kernel("adamw", optim::adamw, optim::adamw_sample),
    kernel("restore", optim::restore, optim::restore_sample),
];

/// The complaint about a report without calls.
const NOTHING: &str = "nothing was called";

/// Results of a run.
pub struct Report {
    device: String,
    /// Number of calls that were judged, without repetitions.
    pub calls: usize,
    /// One sentence for each failure.
    pub failures: Vec<String>,
    /// The cases that the device does not support, by kernel.
    unsupported: BTreeMap<&'static str, Vec<String>>,
    /// Kernels of which at least one call was supported.
    called: BTreeSet<&'static str>,
    /// Kernels that the run was to test.
    asked: Vec<&'static str>,
    /// Seconds of the device, including repetitions and copies, and of the oracle.
    times: BTreeMap<&'static str, [f64; 2]>,
}

impl Report {
    fn new(dev: &dyn Kernels) -> Self {
        Report {
            device: dev.name(),
            calls: 0,
            failures: Vec::new(),
            unsupported: BTreeMap::new(),
            called: BTreeSet::new(),
            asked: Vec::new(),
            times: BTreeMap::new(),
        }
    }

    /// Kernels that the device lacks entirely.
    pub fn missing(&self) -> Vec<&'static str> {
        self.unsupported.keys().copied().filter(|name| !self.called.contains(name)).collect()
    }

    /// The failures, up to a maximum per kernel, and the unsupported calls that `unsupported` does not list. An entry
    /// is `kernel`, if the device may lack all of it, or `kernel: words`, if it may lack cases whose error contains
    /// these words.
    pub fn complaints(&self, unsupported: &[&str]) -> Vec<String> {
        let mut all = Vec::new();
        for kernel in TABLE {
            let of_kernel = |f: &&String| f.split_once(' ').is_some_and(|(name, _)| name == kernel.name);
            let failures: Vec<&String> = self.failures.iter().filter(of_kernel).collect();
            all.extend(failures.iter().take(TOLD).map(|f| f.to_string()));
            if failures.len() > TOLD {
                all.push(format!("{}: and {} more like these", kernel.name, failures.len() - TOLD));
            }
        }
        for (name, refusals) in &self.unsupported {
            let listed = |refusal: &str| {
                unsupported.iter().any(|u| match u.split_once(": ") {
                    Some((kernel, words)) => kernel == *name && refusal.contains(words),
                    None => u == name,
                })
            };
            let missing: Vec<&String> = refusals.iter().filter(|r| !listed(r)).collect();
            if let Some(first) = missing.first() {
                let n = missing.len();
                all.push(format!("{n} calls are not supported, which was not to be expected: {first}"));
            }
        }
        let never = |name: &&str| !self.called.contains(name) && !self.unsupported.contains_key(name);
        all.extend(self.asked.iter().filter(|n| never(n)).map(|name| format!("{name} was never called")));
        if self.calls == 0 {
            all.push(NOTHING.into());
        }
        all
    }

    /// Panics if there are complaints; `unsupported` is as in [`Report::complaints`].
    pub fn expect(&self, unsupported: &[&str]) {
        println!("{self}");
        let all = self.complaints(unsupported);
        assert!(all.is_empty(), "{}: {} failures\n{}", self.device, self.failures.len(), all.join("\n"));
    }

    /// Records an error of the device; true if it means that the call is not supported.
    fn unsupported(&mut self, kernel: &'static str, e: &Error) -> bool {
        let is = matches!(e, Error::Unsupported { .. });
        if is {
            self.unsupported.entry(kernel).or_default().push(e.to_string());
        }
        is
    }

    fn supported(&mut self, kernel: &'static str) {
        self.calls += 1;
        self.called.insert(kernel);
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sum = |i: usize| self.times.values().fold(0.0, |sum, t| sum + t[i]);
        write!(
            f,
            "{}: {} calls, {} failures, {:.1} s, and {:.1} s of the oracle; missing: {:?}",
            self.device,
            self.calls,
            self.failures.len(),
            sum(0),
            sum(1),
            self.missing()
        )?;
        for (name, [own, oracle]) in &self.times {
            write!(f, "\n{name:>20} {own:7.2} s, oracle {oracle:7.2} s")?;
        }
        Ok(())
    }
}

/// Maximum number of elements of all arguments of a case for the shim.
const SHIM: usize = 3000;

/// Maximum number of failures reported per kernel; the others are mostly the same.
const TOLD: usize = 8;

/// Tests the kernels of the table, or those named in `only`, on `dev` in one precision.
pub fn run(dev: &dyn Kernels, prec: Precision, size: Size, only: Option<&[&str]>) -> Report {
    let oracle = Cpu::new(0).expect("threads can be started");
    let mut report = Report::new(dev);
    // For a look at some kernels alone.
    let asked = std::env::var("ETT_TEST_KERNELS").ok();
    let asked = |name: &str| asked.as_ref().is_none_or(|all| all.split(',').any(|one| one == name));
    let wanted = |k: &&Kernel| only.is_none_or(|names| names.contains(&k.name)) && asked(k.name);
    for kernel in TABLE.iter().filter(wanted) {
        report.asked.push(kernel.name);
        let most = if size == Size::Shim { Size::Tiny } else { size };
        for case in (kernel.cases)().iter().filter(|c| c.size <= most) {
            let runs = if size <= Size::Shim && case.runs != ONCE { SANITIZER } else { case.runs };
            for &(scale, layouts) in runs {
                Trial { dev, oracle: &oracle, prec, size, kernel, case, scale }.run(layouts, &mut report);
            }
        }
    }
    report
}

/// A case with one scale of inputs.
struct Trial<'a> {
    dev: &'a dyn Kernels,
    oracle: &'a dyn Kernels,
    prec: Precision,
    size: Size,
    kernel: &'a Kernel,
    case: &'a Case,
    scale: f64,
}

/// The expected outputs.
struct Answer {
    want: Vec<Vec<f64>>,
    /// The same in the precision of the run, if an output is compared with it.
    naive: Option<Vec<Vec<f64>>>,
}

impl Trial<'_> {
    fn run(&self, layouts: &[Layout], report: &mut Report) {
        let name = self.kernel.name;
        let start = Instant::now();
        let text = format!("{name} {}", self.case.what);
        let draw = Draw::new(self.oracle, self.prec, self.scale, &text);
        let mut args = (self.case.args)(&draw);
        round(&mut args, self.prec);
        let elements: usize = args.iter().map(|a| a.dims.numel()).sum();
        let small = self.case.size <= Size::Sanitizer || self.case.on_shim || elements <= SHIM;
        if self.size == Size::Shim && !small {
            return;
        }
        let answer = OnceCell::new();
        let mut oracle_seconds = start.elapsed().as_secs_f64();
        // Kernels whose CPU version takes no strides.
        let flat = self.kernel.flat_on_cpu && self.dev.name().starts_with("cpu (");
        for &layout in layouts.iter().filter(|l| !flat || matches!(l, Layout::Dense | Layout::Shifted)) {
            let what =
                format!("{name} in {}: {}, scale {}, {layout}", self.prec.act, self.case.what, self.scale);
            let start = Instant::now();
            let found = self.call(&args, layout);
            let called = start.elapsed().as_secs_f64();
            match found {
                Ok(None) => report.supported(name),
                Ok(Some(got)) => {
                    report.supported(name);
                    let answer = answer.get_or_init(|| {
                        let start = Instant::now();
                        let answer = self.answer(&args);
                        oracle_seconds += start.elapsed().as_secs_f64();
                        answer
                    });
                    match answer {
                        Ok(answer) => {
                            report.failures.extend(self.judge(&what, &args, answer, &got));
                        }
                        Err(e) => report.failures.push(format!("{what}: the oracle refused it: {e}")),
                    }
                }
                Err(Trouble::Refused(e)) if report.unsupported(name, &e) => {}
                Err(Trouble::Refused(e)) => report.failures.push(format!("{what}: it was refused: {e}")),
                Err(Trouble::Wrong(e)) => {
                    report.supported(name);
                    report.failures.push(format!("{what}: {e}"));
                }
            }
            report.times.entry(name).or_default()[0] += called;
        }
        report.times.entry(name).or_default()[1] += oracle_seconds;
    }

    /// Calls the kernel repeatedly. Returns the outputs if everything but their values is in order, or `None` if the
    /// device refuses this alignment and is allowed to.
    fn call(&self, args: &[Arg], layout: Layout) -> Result<Option<Vec<Vec<f64>>>, Trouble> {
        let dev = self.dev;
        let placed: Vec<Placed> =
            args.iter().map(|a| Placed::new(dev, self.prec, a, layout)).collect::<Result<_, _>>()?;
        let misaligned = |arg: &str| {
            self.kernel.aligned.contains(&arg) && placed.iter().any(|p| p.name == arg && !p.is_wide())
        };
        match (self.case.call)(dev, &views(&placed)) {
            Err(Error::Argument { arg, .. }) if misaligned(arg) => return Ok(None),
            other => other?,
        }
        let outputs = || placed.iter().filter(|p| p.access != Access::Read);
        let first: Vec<Vec<u8>> = outputs().map(|p| p.read(dev)).collect::<Result<_, _>>()?;
        for p in placed.iter().filter(|p| p.access == Access::Read) {
            p.check(&p.read(dev)?)?;
        }
        for (p, memory) in outputs().zip(&first) {
            p.check(memory)?;
        }
        for call in 2..=self.repetitions(first.iter().map(Vec::len).sum()) {
            outputs().try_for_each(|p| p.restore(dev))?;
            (self.case.call)(dev, &views(&placed))?;
            for (p, first) in outputs().zip(&first) {
                p.same(call, &p.read(dev)?, first)?;
            }
        }
        Ok(Some(outputs().zip(&first).map(|(p, memory)| p.values(memory)).collect()))
    }

    /// Number of calls for one layout; fewer if copying the outputs would take longer than the calls.
    fn repetitions(&self, bytes: usize) -> usize {
        match self.size {
            Size::Sanitizer | Size::Shim => 1,
            Size::Tiny => 3,
            Size::Full if bytes > 64 << 20 => 3,
            Size::Full if bytes > 4 << 20 => 6,
            Size::Full => 20,
        }
    }

    fn answer(&self, args: &[Arg]) -> Result<Answer, Error> {
        let want = compute(self.oracle, Precision::F64, args, &self.case.call)?;
        let outputs = args.iter().filter(|a| a.is_output());
        let compared = outputs.zip(&want).any(|(a, want)| match &a.judge {
            Judge::Near(near) => near.naive(a.ty.of(self.prec), want),
            _ => false,
        });
        let naive = compared.then(|| compute(self.oracle, self.prec, args, &self.case.call)).transpose()?;
        Ok(Answer { want, naive })
    }

    /// Errors in the values of the outputs.
    fn judge(&self, what: &str, args: &[Arg], answer: &Answer, got: &[Vec<f64>]) -> Vec<String> {
        let outputs = args.iter().filter(|a| a.is_output()).enumerate();
        let judged = outputs.map(|(i, a)| {
            let naive = answer.naive.as_ref().map(|naive| &naive[i][..]);
            self.judge_one(&format!("{what}, `{}`", a.name), args, a, &got[i], &answer.want[i], naive)
        });
        judged.filter_map(Result::err).collect()
    }

    fn judge_one(
        &self,
        what: &str,
        args: &[Arg],
        a: &Arg,
        got: &[f64],
        want: &[f64],
        naive: Option<&[f64]>,
    ) -> Result<(), String> {
        let (dtype, cols) = (a.ty.of(self.prec), a.dims.cols());
        if want.is_empty() {
            return Ok(());
        }
        match &a.judge {
            Judge::By(judge) => judge(&Seen { what, got, want, args, prec: self.prec, oracle: self.oracle }),
            Judge::Exact => {
                let want: Vec<f64> = want.iter().map(|&v| dtype.rounded(v)).collect();
                same_bits(what, got, &want, cols)
            }
            Judge::Near(near) => {
                let bounds = near.bounds(dtype, self.prec, want.len());
                if near.allows_specials() {
                    let (got, want) = without_specials(what, got, want, cols)?;
                    return compare(what, &got, &want, cols, bounds).map(|_| ());
                }
                compare(what, got, want, cols, bounds)?;
                match naive.filter(|_| near.naive(dtype, want)) {
                    Some(naive) => no_worse_than(what, got, naive, want, cols, dtype).map(|_| ()),
                    None => Ok(()),
                }
            }
        }
    }
}

/// Fails unless all values have the same bits; any two NaN count as equal.
fn same_bits(what: &str, got: &[f64], want: &[f64], cols: usize) -> Result<(), String> {
    let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    match got.iter().zip(want).position(|pair| !same(pair)) {
        None => Ok(()),
        Some(i) => {
            let (r, c) = (i / cols, i % cols);
            Err(format!("{what}: row {r}, column {c} is {:e}, wanted exactly {:e}", got[i], want[i]))
        }
    }
}

/// Replaces NaN and infinities by 0 in both; they must be at the same positions.
fn without_specials(
    what: &str,
    got: &[f64],
    want: &[f64],
    cols: usize,
) -> Result<(Vec<f64>, Vec<f64>), String> {
    let special = |v: f64| if v.is_finite() { 0.0 } else { v };
    let all = |v: &[f64]| -> Vec<f64> { v.iter().map(|&v| special(v)).collect() };
    same_bits(what, &all(got), &all(want), cols)?;
    let none = |v: &[f64]| -> Vec<f64> { v.iter().map(|&v| if v.is_finite() { v } else { 0.0 }).collect() };
    Ok((none(got), none(want)))
}

/// Why a call gave no outputs.
enum Trouble {
    /// The device returned an error.
    Refused(Error),
    /// The memory was not left as required.
    Wrong(String),
}

impl From<Error> for Trouble {
    fn from(e: Error) -> Self {
        Trouble::Refused(e)
    }
}

impl From<String> for Trouble {
    fn from(e: String) -> Self {
        Trouble::Wrong(e)
    }
}

fn cpu(prec: Precision) {
    let dev = Cpu::poisoned(0).expect("threads can be started");
    run(&dev, prec, Size::Tiny, None).expect(&[]);
}

#[test]
fn cpu_f32() {
    cpu(Precision::F32);
}

#[test]
fn cpu_bf16() {
    cpu(Precision::BF16);
}

#[test]
fn every_kernel_is_covered() {
    for name in KERNELS.iter().map(|k| k.name) {
        let times = TABLE.iter().filter(|k| k.name == name).count();
        assert_eq!(times, 1, "{name} is in {times} rows of the table");
    }
    assert_eq!(TABLE.len(), KERNELS.len(), "a name that is no kernel");
    for k in TABLE {
        let sizes: Vec<Size> = (k.cases)().iter().map(|c| c.size).collect();
        for size in [Size::Sanitizer, Size::Tiny, Size::Full] {
            assert!(sizes.contains(&size), "{} has no case for {size:?}", k.name);
        }
    }
}
