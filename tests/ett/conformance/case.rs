//! What is tested: one call of a kernel, its arguments, what it is tried with and how its outputs are judged.

use std::collections::HashMap;

use rayon::prelude::*;

use ett::backend::{Acc, Buffer, In, Kernels, Out};
use ett::compare::Bounds;
use ett::data::Philox;
use ett::error;
use ett::tensor::{DType, Dims, Precision};

use super::Size;
use super::place::compute;

/// Element type of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// The activation type of the run.
    Act,
    /// The accumulator type of the run.
    Acc,
    /// This type; in the oracle f64 stands for every float.
    Is(DType),
}

impl Type {
    pub fn of(self, p: Precision) -> DType {
        match self {
            Type::Act => p.act,
            Type::Acc => p.acc,
            Type::Is(DType::I32) => DType::I32,
            Type::Is(_) if p == Precision::F64 => DType::F64,
            Type::Is(dtype) => dtype,
        }
    }
}

/// What an argument holds before the call.
#[derive(Clone)]
pub enum Content {
    /// Only read.
    In(Vec<f64>),
    /// Overwritten: poison.
    Out,
    /// Read and written.
    Add(Vec<f64>),
}

/// One tensor argument.
#[derive(Clone)]
pub struct Arg {
    pub name: &'static str,
    pub ty: Type,
    pub dims: Dims,
    pub content: Content,
    pub judge: Judge,
    /// Rows follow each other without gaps in every layout.
    pub dense: bool,
}

impl Arg {
    fn new(name: &'static str, ty: Type, dims: impl Into<Dims>, content: Content, judge: Judge) -> Self {
        Arg { name, ty, dims: dims.into(), content, judge, dense: false }
    }

    /// No gaps between the rows of this argument.
    pub fn dense(self) -> Self {
        Arg { dense: true, ..self }
    }

    pub fn values(&self) -> Option<&Vec<f64>> {
        match &self.content {
            Content::In(v) | Content::Add(v) => Some(v),
            Content::Out => None,
        }
    }

    pub fn is_output(&self) -> bool {
        !matches!(self.content, Content::In(_))
    }
}

/// An input.
pub fn input(name: &'static str, ty: Type, dims: impl Into<Dims>, values: Vec<f64>) -> Arg {
    Arg::new(name, ty, dims, Content::In(values), Judge::Exact)
}

/// An input of the activation type.
pub fn act(name: &'static str, dims: impl Into<Dims>, values: Vec<f64>) -> Arg {
    input(name, Type::Act, dims, values)
}

/// An input of the accumulator type.
pub fn acc(name: &'static str, dims: impl Into<Dims>, values: Vec<f64>) -> Arg {
    input(name, Type::Acc, dims, values)
}

/// A vector of indices.
pub fn int(name: &'static str, values: Vec<i32>) -> Arg {
    let n = values.len();
    input(name, Type::Is(DType::I32), [n], values.into_iter().map(f64::from).collect())
}

/// An output that is overwritten.
pub fn out(name: &'static str, ty: Type, dims: impl Into<Dims>, judge: impl Into<Judge>) -> Arg {
    Arg::new(name, ty, dims, Content::Out, judge.into())
}

/// An output that is added to, or updated.
pub fn add(
    name: &'static str,
    ty: Type,
    dims: impl Into<Dims>,
    start: Vec<f64>,
    judge: impl Into<Judge>,
) -> Arg {
    Arg::new(name, ty, dims, Content::Add(start), judge.into())
}

/// How an output is compared with the oracle's.
#[derive(Clone)]
pub enum Judge {
    /// By the comparator.
    Near(Near),
    /// The oracle's value rounded to the type, bit by bit.
    Exact,
    /// By a function of this case.
    By(fn(&Seen) -> Result<(), String>),
}

impl From<Near> for Judge {
    fn from(near: Near) -> Self {
        Judge::Near(near)
    }
}

/// How near is near enough: the comparator's bounds for the output's type, and what this kernel needs beyond
/// them.
#[derive(Debug, Clone, Copy)]
pub struct Near {
    roundings: f64,
    conditioning: f64,
    size: f64,
    coarse: bool,
    specials: bool,
}

/// The comparator's bounds as they are.
pub fn near() -> Near {
    Near { roundings: 1.0, conditioning: 0.0, size: 0.0, coarse: false, specials: false }
}

impl Near {
    /// The bounds of the output's type this many times: as many roundings to it on the way.
    pub fn roundings(self, roundings: f64) -> Self {
        Near { roundings, ..self }
    }
    /// How many times rounding errors of the accumulator are amplified: added to the bounds, times those of f32.
    pub fn conditioning(self, conditioning: f64) -> Self {
        Near { conditioning, ..self }
    }
    /// Typical size of a value: errors are relative to at least this, for outputs that may cancel to nothing.
    pub fn size(self, size: f64) -> Self {
        Near { size, ..self }
    }
    /// The bounds of the activation type also where the output is wider: it follows a rounding to act.
    pub fn coarse(self) -> Self {
        Near { coarse: true, ..self }
    }
    /// NaN and infinities may be wanted, and have to be where they are wanted.
    pub fn specials(self) -> Self {
        Near { specials: true, ..self }
    }

    pub fn allows_specials(&self) -> bool {
        self.specials
    }

    /// The bounds for `n` values of `dtype` in a run of precision `p`.
    pub fn bounds(&self, dtype: DType, p: Precision, n: usize) -> Bounds {
        let own = Bounds::of(if self.coarse { p.act } else { dtype }).times(self.roundings);
        let more = Bounds::of(DType::F32).times(self.conditioning);
        Bounds {
            norm: own.norm + more.norm,
            row: own.row + more.row,
            element: own.element + more.element,
            least: self.size * (n as f64).sqrt(),
        }
    }

    /// Whether twice the error of the naive computation is the limit too: for results in bf16, where one rounding
    /// is most of the error. In f32 the naive order of a sum, which is the CPU's, may by luck be the best one.
    pub fn naive(&self, dtype: DType, want: &[f64]) -> bool {
        let (n, square) = (want.len() as f64, want.iter().map(|v| v * v).sum::<f64>());
        dtype == DType::Bf16 && want.len() >= 64 && square > 0.25 * self.size * self.size * n
    }
}

/// What a judging function sees.
pub struct Seen<'a> {
    pub what: &'a str,
    pub got: &'a [f64],
    /// The oracle's.
    pub want: &'a [f64],
    /// All arguments as they were rounded.
    pub args: &'a [Arg],
    pub oracle: &'a dyn Kernels,
}

impl Seen<'_> {
    /// An input.
    pub fn input(&self, name: &str) -> &Arg {
        self.args.iter().find(|a| a.name == name).expect("an input of this case")
    }
}

/// How arguments lie in memory. All have guard bands on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Rows without gaps, from a multiple of 256 bytes.
    Dense,
    /// Columns of a wider tensor whose rows begin on multiples of 16 bytes.
    Gapped,
    /// One element into the buffer, without gaps.
    Shifted,
    /// Columns of a wider tensor whose rows begin anywhere.
    Odd,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layout::Dense => "dense",
            Layout::Gapped => "gapped rows",
            Layout::Shifted => "one element in",
            Layout::Odd => "odd rows, one element in",
        })
    }
}

/// Scales of the inputs, each with the layouts it is tried in.
pub type Runs = &'static [(f64, &'static [Layout])];
pub const EVERY: Runs = &[
    (1.0, &[Layout::Dense, Layout::Gapped, Layout::Shifted, Layout::Odd]),
    (0.01, &[Layout::Dense]),
    (3.0, &[Layout::Gapped]),
    (30.0, &[Layout::Odd]),
];
/// For large cases.
pub const LIGHT: Runs = &[(1.0, &[Layout::Dense]), (30.0, &[Layout::Gapped])];
/// For named cases, whose values are what matters.
pub const ONCE: Runs = &[(1.0, &[Layout::Dense])];
/// The sanitizers': the vector path and the plain one.
pub const SANITIZER: Runs = &[(1.0, &[Layout::Dense, Layout::Odd])];

type Args = dyn Fn(&Draw) -> Vec<Arg>;
type Call = dyn Fn(&dyn Kernels, &Views) -> error::Result<()>;

/// A call and what it is tried with.
pub struct Case {
    pub what: String,
    /// The smallest size that it is part of.
    pub size: Size,
    pub runs: Runs,
    /// The shim takes it, as large as it is.
    pub on_shim: bool,
    pub args: Box<Args>,
    pub call: Box<Call>,
}

impl Case {
    pub fn new(
        what: impl Into<String>,
        args: impl Fn(&Draw) -> Vec<Arg> + 'static,
        call: impl Fn(&dyn Kernels, &Views) -> error::Result<()> + 'static,
    ) -> Self {
        let (args, call) = (Box::new(args), Box::new(call));
        Case { what: what.into(), size: Size::Tiny, runs: EVERY, on_shim: false, args, call }
    }

    /// From this size on.
    pub fn from(self, size: Size) -> Self {
        let runs = match size {
            Size::Full => LIGHT,
            _ => self.runs,
        };
        Case { size, runs, ..self }
    }

    /// On the shim, too, though it is large.
    pub fn on_shim(self) -> Self {
        Case { on_shim: true, ..self }
    }

    /// With these scales and layouts.
    pub fn runs(self, runs: Runs) -> Self {
        Case { runs, ..self }
    }

    /// One run, for the sake of its values.
    pub fn named(self, name: &str) -> Self {
        let what = format!("{}, {name}", self.what);
        Case { what, runs: ONCE, ..self }
    }
}

/// Draws the arguments of one run: the same numbers for the same case and scale.
pub struct Draw<'a> {
    pub prec: Precision,
    pub scale: f64,
    seed: u64,
    next: std::cell::Cell<u64>,
    oracle: &'a dyn Kernels,
}

impl<'a> Draw<'a> {
    pub fn new(oracle: &'a dyn Kernels, prec: Precision, scale: f64, text: &str) -> Self {
        // FNV-1a: a case keeps its numbers when others are added.
        let hash = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
        let seed =
            text.as_bytes().iter().chain(&scale.to_bits().to_le_bytes()).fold(0xcbf2_9ce4_8422_2325, hash);
        Draw { prec, scale, seed, next: Default::default(), oracle }
    }

    fn rng(&self) -> Philox {
        self.next.set(self.next.get() + 1);
        Philox::new(self.seed, self.next.get())
    }

    /// Standard normal numbers.
    pub fn unit(&self, n: usize) -> Vec<f64> {
        let mut v = vec![0f32; n];
        self.rng().fill_normal(&mut v);
        v.into_par_iter().map(f64::from).collect()
    }

    /// Normal numbers times `scale`.
    pub fn times(&self, scale: f64, n: usize) -> Vec<f64> {
        let mut v = self.unit(n);
        v.par_iter_mut().for_each(|v| *v *= scale);
        v
    }

    /// Normal numbers times the scale of the run.
    pub fn normal(&self, n: usize) -> Vec<f64> {
        self.times(self.scale, n)
    }

    /// Indices below `below`.
    pub fn ids(&self, n: usize, below: usize) -> Vec<i32> {
        let mut rng = self.rng();
        (0..n).map(|_| rng.below(below) as i32).collect()
    }

    /// Values as activations hold them.
    pub fn rounded(&self, values: &[f64]) -> Vec<f64> {
        values.iter().map(|&v| self.prec.act.rounded(v)).collect()
    }

    /// What the oracle gives for arguments rounded to their types: outputs of a forward for its backward.
    pub fn forward(
        &self,
        mut args: Vec<Arg>,
        call: impl Fn(&dyn Kernels, &Views) -> error::Result<()>,
    ) -> HashMap<&'static str, Vec<f64>> {
        round(&mut args, self.prec);
        let outputs =
            compute(self.oracle, Precision::F64, &args, &call).expect("the oracle takes the forward");
        args.iter().filter(|a| a.is_output()).map(|a| a.name).zip(outputs).collect()
    }
}

/// Rounds what arguments hold to their types.
pub fn round(args: &mut [Arg], p: Precision) {
    for a in args {
        if let Content::In(v) | Content::Add(v) = &mut a.content {
            let dtype = a.ty.of(p);
            assert_eq!(v.len(), a.dims.numel(), "`{}` has as many values as its shape", a.name);
            if dtype != DType::F64 {
                v.par_iter_mut().for_each(|v| *v = dtype.rounded(*v));
            }
        }
    }
}

/// The arguments of a call on a device, by name.
pub struct Views<'a> {
    pub all: Vec<(&'static str, In<'a>)>,
}

impl<'a> Views<'a> {
    /// A view of a whole buffer: `off` elements in, rows `ld` elements apart.
    pub fn view(buf: &'a Buffer, dtype: DType, dims: Dims, off: usize, ld: usize) -> In<'a> {
        let v = In::new(buf, (off * dtype.size()) as u64, dtype, dims, ld as i64);
        v.unwrap_or_else(|e| panic!("a driver that places arguments outside of their buffers: {e}"))
    }

    /// An input that may be absent.
    pub fn input_if(&self, name: &str) -> Option<In<'a>> {
        self.all.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
    }
    /// An output that may be absent.
    pub fn out_if(&self, name: &str) -> Option<Out<'a>> {
        self.input_if(name).map(Out)
    }
    /// An accumulated output that may be absent.
    pub fn acc_if(&self, name: &str) -> Option<Acc<'a>> {
        self.input_if(name).map(Acc)
    }

    /// An input.
    pub fn input(&self, name: &str) -> In<'a> {
        self.input_if(name).unwrap_or_else(|| panic!("the case has no argument `{name}`"))
    }
    /// An output.
    pub fn out(&self, name: &str) -> Out<'a> {
        Out(self.input(name))
    }
    /// An accumulated output.
    pub fn acc(&self, name: &str) -> Acc<'a> {
        Acc(self.input(name))
    }
}
