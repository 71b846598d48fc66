//! Test cases: one call of a kernel, its arguments, the scales and layouts to try, and how its outputs are judged.

use std::collections::HashMap;

use rayon::prelude::*;

use ett::backend::{Acc, Buffer, DType, Dims, In, Kernels, Out, Precision};
use ett::compare::Bounds;
use ett::error;
use ett::rng::Philox;

use super::Size;
use super::place::compute;

/// Element type of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// The activation type of the run.
    Act,
    /// The accumulator type of the run.
    Acc,
    /// This type; in the oracle, f64 stands for every float type.
    Is(DType),
}

impl Type {
    pub fn of(self, p: Precision) -> DType {
        match self {
            Type::Act => p.act,
            Type::Acc => p.acc,
            Type::Is(integer @ (DType::I32 | DType::U8)) => integer,
            Type::Is(_) if p == Precision::F64 => DType::F64,
            Type::Is(dtype) => dtype,
        }
    }
}

/// Content of an argument before the call.
#[derive(Clone)]
pub enum Content {
    /// An input.
    In(Vec<f64>),
    /// An output that is overwritten; starts poisoned.
    Out,
    /// An output that is added to or updated.
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
    /// Whether rows have no gaps in any layout.
    pub dense: bool,
}

impl Arg {
    fn new(name: &'static str, ty: Type, dims: impl Into<Dims>, content: Content, judge: Judge) -> Self {
        Arg { name, ty, dims: dims.into(), content, judge, dense: false }
    }

    /// Keeps the rows of this argument without gaps.
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

/// An output that is added to or updated.
pub fn add(
    name: &'static str,
    ty: Type,
    dims: impl Into<Dims>,
    start: Vec<f64>,
    judge: impl Into<Judge>,
) -> Arg {
    Arg::new(name, ty, dims, Content::Add(start), judge.into())
}

/// How an output is compared with that of the oracle.
#[derive(Clone)]
pub enum Judge {
    /// By the comparator.
    Near(Near),
    /// The oracle's value rounded to the type must match bit by bit.
    Exact,
    /// By a function of the case.
    By(fn(&Seen) -> Result<(), String>),
}

impl From<Near> for Judge {
    fn from(near: Near) -> Self {
        Judge::Near(near)
    }
}

/// The tolerance of an output: the comparator's bounds for its type, plus what this kernel needs.
#[derive(Debug, Clone, Copy)]
pub struct Near {
    roundings: f64,
    conditioning: f64,
    size: f64,
    coarse: bool,
    specials: bool,
}

/// The comparator's bounds unchanged.
pub fn near() -> Near {
    Near { roundings: 1.0, conditioning: 0.0, size: 0.0, coarse: false, specials: false }
}

impl Near {
    /// Multiplies the bounds of the output's type: the number of roundings to it on the way.
    pub fn roundings(self, roundings: f64) -> Self {
        Near { roundings, ..self }
    }
    /// How much rounding errors of the accumulator are amplified: adds this many times the bounds of f32.
    pub fn conditioning(self, conditioning: f64) -> Self {
        Near { conditioning, ..self }
    }
    /// Typical size of a value: errors are relative to at least this, for outputs that may cancel.
    pub fn size(self, size: f64) -> Self {
        Near { size, ..self }
    }
    /// Uses the bounds of the activation type for a wider output that follows a rounding to it.
    pub fn coarse(self) -> Self {
        Near { coarse: true, ..self }
    }
    /// Allows NaN and infinities, which have to be where the oracle has them.
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

    /// Whether the error must also be at most twice that of the naive computation: for results in bf16, where one
    /// rounding is most of the error. In f32 the naive order of a sum, which is the CPU's, may happen to be the best
    /// one.
    pub fn naive(&self, dtype: DType, want: &[f64]) -> bool {
        let (n, square) = (want.len() as f64, want.iter().map(|v| v * v).sum::<f64>());
        dtype == DType::Bf16 && want.len() >= 64 && square > 0.25 * self.size * self.size * n
    }
}

/// Input of a judging function.
pub struct Seen<'a> {
    pub what: &'a str,
    pub got: &'a [f64],
    /// The output of the oracle.
    pub want: &'a [f64],
    /// All arguments, rounded to their types.
    pub args: &'a [Arg],
    pub prec: Precision,
    pub oracle: &'a dyn Kernels,
}

impl Seen<'_> {
    /// An input.
    pub fn input(&self, name: &str) -> &Arg {
        self.args.iter().find(|a| a.name == name).expect("an input of this case")
    }
}

/// Memory layout of arguments. All have guard bands on both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Rows without gaps, from a multiple of 256 bytes.
    Dense,
    /// Columns of a wider tensor whose rows begin on multiples of 16 bytes.
    Gapped,
    /// Starting one element into the buffer, without gaps.
    Shifted,
    /// Columns of a wider tensor whose rows begin anywhere.
    Odd,
    /// The same from a multiple of 256 bytes, so that only the rows after the first tell.
    Ragged,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layout::Dense => "dense",
            Layout::Gapped => "gapped rows",
            Layout::Shifted => "one element in",
            Layout::Odd => "odd rows, one element in",
            Layout::Ragged => "odd rows",
        })
    }
}

/// Scales of the inputs, each with the layouts to try.
pub type Runs = &'static [(f64, &'static [Layout])];
pub const EVERY: Runs = &[
    (1.0, &[Layout::Dense, Layout::Gapped, Layout::Shifted, Layout::Odd]),
    (0.01, &[Layout::Dense]),
    (3.0, &[Layout::Gapped]),
    (30.0, &[Layout::Odd]),
];
/// For large cases.
pub const LIGHT: Runs = &[(1.0, &[Layout::Dense]), (30.0, &[Layout::Gapped])];
/// For values whose scale does not matter, such as those that are copied.
const COPIED: Runs = &[EVERY[0]];
/// The same for large cases.
const COPIED_LARGE: Runs = &[(1.0, &[Layout::Dense, Layout::Odd])];
/// For named cases, which are about particular values.
pub const ONCE: Runs = &[(1.0, &[Layout::Dense])];
/// For rows that are not aligned like the first one.
pub const RAGGED: Runs = &[(1.0, &[Layout::Ragged])];
/// For the sanitizers: the vector path and the scalar one.
pub const SANITIZER: Runs = &[(1.0, &[Layout::Dense, Layout::Odd])];

type Args = dyn Fn(&Draw) -> Vec<Arg>;
type Call = dyn Fn(&dyn Kernels, &Views) -> error::Result<()>;

/// A call, and the runs to make of it.
pub struct Case {
    pub what: String,
    /// The smallest size that includes it.
    pub size: Size,
    pub runs: Runs,
    /// Runs on the shim whatever its size.
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

    /// Includes the case from this size on.
    pub fn from(self, size: Size) -> Self {
        let runs = match size {
            Size::Full => LIGHT,
            _ => self.runs,
        };
        Case { size, runs, ..self }
    }

    /// Includes the case from this size on; the scale of its values does not matter.
    pub fn copied(self, size: Size) -> Self {
        let runs = if size == Size::Full { COPIED_LARGE } else { COPIED };
        Case { size, runs, ..self }
    }

    /// Runs on the shim, too, although it is large.
    pub fn on_shim(self) -> Self {
        Case { on_shim: true, ..self }
    }

    /// Uses these scales and layouts.
    pub fn runs(self, runs: Runs) -> Self {
        Case { runs, ..self }
    }

    /// Runs once, for its particular values.
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
        // FNV-1a of the text: a case keeps its numbers when others are added.
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

    /// Values rounded to the activation type.
    pub fn rounded(&self, values: &[f64]) -> Vec<f64> {
        values.iter().map(|&v| self.prec.act.rounded(v)).collect()
    }

    /// The oracle's outputs for arguments rounded to their types: results of a forward kernel for its backward.
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

/// Rounds the values of arguments to their types.
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
    /// A view into a buffer: starts at element `off`, with rows `ld` elements apart.
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
