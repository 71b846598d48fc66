//! Parameters in flat groups. Each group has one contiguous range for its master weights, gradients, moments,
//! averages, and the copy that products read, so that an optimizer, a norm or a reduction is one call on a range.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::reduce::Spans;
use super::share::{Sharing, Span, place};
use super::shared::{Form, Kept, Places};
use crate::autograd::{Tape, Target, Var};
use crate::backend::{Cast, DType, Dims, Fill, Kernels, Precision, Role, Stream};
use crate::error::{Error, Result};
use crate::rng::Philox;
use crate::tensor::{Tensor, to_f64};

/// A parameter: its position in a [`Params`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Param {
    group: usize,
    item: usize,
}

/// How initial values are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// One value for all elements.
    Constant(f64),
    /// Normal with this mean and standard deviation.
    Normal(f64, f64),
    /// Uniform in `[-bound, bound]`.
    Uniform(f64),
    /// Normal with mean 0 and this standard deviation, the same for every seed: for features that stand in for
    /// pretrained ones.
    Fixed(f64),
    /// These values.
    Values(&'static [f64]),
}

impl Init {
    /// Kaiming-uniform with a = sqrt 5, PyTorch's default for linear and convolution layers: uniform with bound
    /// `1 / sqrt(fan_in)`, for weights and biases alike.
    pub fn kaiming(fan_in: usize) -> Self {
        Init::Uniform(1.0 / (fan_in.max(1) as f64).sqrt())
    }

    /// The values of a tensor from its value `start` on, a multiple of [`Init::CHUNK`]. Threads share the work, since a
    /// block of random numbers makes two values whatever came before it.
    fn fill(self, values: &mut [f64], start: usize, seed: u64, name: &str) {
        if let Init::Values(all) = self {
            values.copy_from_slice(&all[start..start + values.len()]);
            return;
        }
        values.par_chunks_mut(Self::CHUNK).enumerate().for_each(|(i, chunk)| {
            let block = ((start + i * Self::CHUNK) / 2) as u64;
            let rng = |seed| Philox::new(seed, key(name)).from_block(block);
            match self {
                Init::Constant(c) => chunk.fill(c),
                Init::Fixed(std) => {
                    let mut rng = rng(0);
                    chunk.iter_mut().for_each(|v| *v = std * rng.normal());
                }
                Init::Normal(mean, std) => {
                    let mut rng = rng(seed);
                    chunk.iter_mut().for_each(|v| *v = mean + std * rng.normal());
                }
                Init::Uniform(bound) => {
                    let mut rng = rng(seed);
                    chunk.iter_mut().for_each(|v| *v = bound * (2.0 * rng.uniform() - 1.0));
                }
                Init::Values(_) => {}
            }
        });
    }

    /// Values that one thread draws at a time.
    const CHUNK: usize = 1 << 14;
}

/// A name in public weight files and the rows of the item that it names.
#[derive(Debug, Clone)]
struct Public {
    name: String,
    rows: Range<usize>,
    /// Shape in files. Convolutions are OHWI in memory and OIHW in files.
    dims: Vec<usize>,
    oihw: bool,
}

pub(super) struct Item {
    dims: Dims,
    pub offset: usize,
    init: Init,
    publics: Vec<Public>,
}

pub(super) struct Group {
    name: String,
    pub items: Vec<Item>,
    pub len: usize,
    pub spans: Vec<Span>,
    /// Products read master weights of the group, too.
    masters: bool,
}

/// Collects parameters before memory is allocated for them.
#[derive(Default)]
pub struct ParamBuilder {
    groups: Vec<Group>,
    sharing: Option<Sharing>,
}

impl ParamBuilder {
    /// A builder without groups.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a group; parameters added afterwards belong to it.
    pub fn group(&mut self, name: &str) {
        let (items, spans) = (Vec::new(), Vec::new());
        self.groups.push(Group { name: name.into(), items, len: 0, spans, masters: false });
    }

    /// Says that master weights of the current group are read by [`Params::var_as`], so that every rank needs all of them.
    pub fn reads_masters(&mut self) {
        if let Some(group) = self.groups.last_mut() {
            group.masters = true;
        }
    }

    /// Shares what is kept per parameter among ranks; without this, every rank has everything.
    pub fn share(&mut self, sharing: Sharing) {
        self.sharing = Some(sharing);
    }

    /// Adds a parameter under one public name, with the same shape in files.
    pub fn add(&mut self, name: &str, dims: impl Into<Dims>, init: Init) -> Param {
        let dims = dims.into();
        self.shaped(name, dims, dims.as_slice(), init)
    }

    /// Adds a parameter that has another shape in files.
    pub fn shaped(&mut self, name: &str, dims: impl Into<Dims>, public: &[usize], init: Init) -> Param {
        let dims = dims.into();
        let rows = 0..dims.as_slice().first().copied().unwrap_or(1);
        let publics = vec![Public { name: name.into(), rows, dims: public.to_vec(), oihw: false }];
        self.push(dims, init, publics)
    }

    /// Adds a convolution weight `[O, kh, kw, I]`, OIHW in files.
    pub fn conv(&mut self, name: &str, o: usize, k: usize, i: usize, init: Init) -> Param {
        let publics = vec![Public { name: name.into(), rows: 0..o, dims: vec![o, i, k, k], oihw: true }];
        self.push([o, k, k, i].into(), init, publics)
    }

    /// Adds one item for several public tensors of equal row width, stacked by rows. `parts` holds names and row
    /// counts, `tail` the dimensions after the first in files.
    pub fn stacked(
        &mut self,
        parts: &[(String, usize)],
        cols: Option<usize>,
        tail: &[usize],
        init: Init,
    ) -> Param {
        let mut at = 0;
        let mut publics = Vec::new();
        for (name, n) in parts {
            let dims = [&[*n], tail].concat();
            publics.push(Public { name: name.clone(), rows: at..at.saturating_add(*n), dims, oihw: false });
            at = usize::saturating_add(at, *n);
        }
        let dims = match cols {
            Some(c) => Dims::from([at, c]),
            None => Dims::from([at]),
        };
        self.push(dims, init, publics)
    }

    fn push(&mut self, dims: Dims, init: Init, publics: Vec<Public>) -> Param {
        if self.groups.is_empty() {
            self.group("model");
        }
        let group = self.groups.len() - 1;
        let g = &mut self.groups[group];
        g.items.push(Item { dims, offset: 0, init, publics });
        Param { group, item: g.items.len() - 1 }
    }

    /// Allocates memory and draws initial values, each from (seed, public name), so that adding a layer changes the
    /// initial values of no other layer.
    pub fn build(self, dev: Arc<dyn Kernels>, prec: Precision, seed: u64) -> Result<Params> {
        self.build_without(dev, prec, seed, &|_| false)
    }

    /// The same without drawing the values of the public names that are `given`: they are 0 until they are written.
    pub fn build_without(
        self,
        dev: Arc<dyn Kernels>,
        prec: Precision,
        seed: u64,
        given: &dyn Fn(&str) -> bool,
    ) -> Result<Params> {
        let sharing = self.sharing.unwrap_or(Sharing::ALONE);
        let mut groups = Vec::new();
        for mut layout in self.groups {
            // A saturated length cannot be allocated.
            let lengths: Vec<usize> = layout.items.iter().map(|i| i.dims.numel()).collect();
            let (offsets, spans, len) = place(&lengths, &sharing);
            layout.items.iter_mut().zip(offsets).for_each(|(item, offset)| item.offset = offset);
            (layout.spans, layout.len) = (spans, len);
            let largest = layout.items.iter().find(|i| i.dims.bytes(prec.acc).is_none());
            if let Some((item, name)) = largest.and_then(|i| Some((i, &i.publics.first()?.name))) {
                let got = format!("{name} {}", item.dims);
                return Err(Error::arg(
                    "build",
                    "params",
                    got,
                    "fewer elements, so that they can be addressed",
                ));
            }
            let shadow = match prec.act == prec.acc {
                true => None,
                false => Some(Tensor::empty(&*dev, Role::Weight, prec.act, [len])?),
            };
            let parts = sharing.state && shadow.is_some() && !layout.masters;
            let master = Kept::empty(&*dev, Role::Weight, prec.acc, len, parts.then_some(&sharing))?;
            let zeros = |y: &Tensor| dev.fill(Stream::COMPUTE, &Fill { y: y.out(), value: 0.0 });
            zeros(&master.tensor)?;
            shadow.iter().try_for_each(zeros)?;
            groups.push(Store { layout: Arc::new(layout), master, shadow, train: None, ema: None });
        }
        let params = Params { dev, prec, sharing, groups };
        params.draw(seed, given)?;
        Ok(params)
    }
}

/// Gradient and moments of a group that is being trained.
#[derive(Clone)]
pub struct Training {
    /// Accumulated gradients, in the accumulator type.
    pub grad: Tensor,
    /// First moment.
    pub m: Tensor,
    /// Second moment.
    pub v: Tensor,
    /// Where the backward pass adds to, if `grad` has only the own parts of the sums over the ranks.
    pub(super) spans: Option<Arc<Spans>>,
}

#[derive(Clone)]
pub(super) struct Store {
    pub layout: Arc<Group>,
    pub master: Kept,
    pub shadow: Option<Tensor>,
    pub train: Option<Training>,
    pub ema: Option<Kept>,
}

/// One of the tensors kept per parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Master weights.
    Master,
    /// Gradients of the groups that are being trained.
    Gradient,
    /// Averages of the weights, for groups that have them.
    Ema,
    /// First moments of the groups that are being trained.
    Moment1,
    /// Second moments of the groups that are being trained.
    Moment2,
}

/// One public tensor on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Shape in files.
    pub dims: Vec<usize>,
    /// Values, row-major.
    pub values: Vec<f64>,
}

/// All parameters of a model. A clone shares their memory.
#[derive(Clone)]
pub struct Params {
    pub(super) dev: Arc<dyn Kernels>,
    prec: Precision,
    pub(super) sharing: Sharing,
    pub(super) groups: Vec<Store>,
}

fn key(name: &str) -> u64 {
    // FNV-1a: a fixed stream number for each name.
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3))
}

impl Params {
    fn draw(&self, seed: u64, given: &dyn Fn(&str) -> bool) -> Result<()> {
        if self.dev.has_data() {
            for g in &self.groups {
                for item in &g.layout.items {
                    let row = item.dims.numel() / item.dims.as_slice().first().copied().unwrap_or(1).max(1);
                    for p in item.publics.iter().filter(|p| !given(&p.name)) {
                        let at = item.offset + p.rows.start * row;
                        self.draw_into(g, at..at + p.rows.len() * row, item.init, seed, &p.name)?;
                    }
                }
            }
        }
        self.refresh()
    }

    /// Draws the values of one public tensor, in pieces that bound the memory of the host.
    fn draw_into(&self, g: &Store, to: Range<usize>, init: Init, seed: u64, name: &str) -> Result<()> {
        const PIECE: usize = 16 << 20;
        for start in (0..to.len()).step_by(PIECE) {
            let mut values = vec![0.0; PIECE.min(to.len() - start)];
            init.fill(&mut values, start, seed, name);
            let at = to.start + start;
            for (of, part) in self.places(g, &g.master.tensor, g.master.form(), at..at + values.len())? {
                self.write(&part, &values[of])?;
            }
        }
        Ok(())
    }

    fn write(&self, to: &Tensor, values: &[f64]) -> Result<()> {
        let t = Tensor::from_f64(&*self.dev, Role::Input, to.dtype(), values, to.dims())?;
        self.dev.cast(Stream::COMPUTE, &Cast { x: t.view(), y: to.out() })
    }

    /// The device that holds the parameters.
    pub fn device(&self) -> &Arc<dyn Kernels> {
        &self.dev
    }

    /// Element types.
    pub fn precision(&self) -> Precision {
        self.prec
    }

    /// Names of the groups, in order.
    pub fn groups(&self) -> Vec<&str> {
        self.groups.iter().map(|g| g.layout.name.as_str()).collect()
    }

    /// Index of a group.
    pub fn group(&self, name: &str) -> Option<usize> {
        self.groups.iter().position(|g| g.layout.name == name)
    }

    /// Number of parameters in a group, without padding.
    pub fn count(&self, group: usize) -> usize {
        self.groups[group].layout.items.iter().map(|i| i.dims.numel()).sum()
    }

    /// Allocates zeroed gradients and moments for these groups and frees those of all others.
    pub fn train(&mut self, groups: &[&str]) -> Result<()> {
        let Sharing { ranks, state, gradients, .. } = self.sharing;
        for g in &mut self.groups {
            g.train = None;
            if groups.contains(&g.layout.name.as_str()) {
                let zeros = |role, parts: bool| {
                    let n = if parts { g.layout.len / ranks } else { g.layout.len };
                    Tensor::zeros(&*self.dev, role, self.prec.acc, [n])
                };
                g.train = Some(Training {
                    grad: zeros(Role::Gradient, gradients)?,
                    m: zeros(Role::Moment, state)?,
                    v: zeros(Role::Moment, state)?,
                    spans: gradients.then(|| Arc::new(Spans::of(&g.layout.spans))),
                });
            }
        }
        Ok(())
    }

    /// Drops the averages of these groups.
    pub fn drop_averages(&mut self, groups: &[&str]) {
        for g in self.groups.iter_mut().filter(|g| groups.contains(&g.layout.name.as_str())) {
            g.ema = None;
        }
    }

    pub(super) fn is_one_of(&self, group: usize, names: &[&str]) -> bool {
        names.contains(&self.groups[group].layout.name.as_str())
    }

    /// Gradients and moments of a group; `None` if it is frozen.
    pub fn training(&self, group: usize) -> Option<&Training> {
        self.groups[group].train.as_ref()
    }

    /// Master weights of a group, in the accumulator type: all, or this rank's own parts.
    pub fn master(&self, group: usize) -> &Tensor {
        &self.groups[group].master.tensor
    }

    /// The copy that products read, if it differs from the master weights.
    pub fn shadow(&self, group: usize) -> Option<&Tensor> {
        self.groups[group].shadow.as_ref()
    }

    /// Averages of a group: all, or this rank's own parts.
    pub fn ema(&self, group: usize) -> Option<&Tensor> {
        self.groups[group].ema.as_ref().map(|ema| &ema.tensor)
    }

    /// Every tensor of a group that an optimizer step changes: master weights, moments, averages, and the copy that
    /// products read.
    pub fn stepped(&self, group: usize) -> Vec<&Tensor> {
        let g = &self.groups[group];
        let moments = g.train.iter().flat_map(|t| [&t.m, &t.v]);
        let kept = [Some(&g.master), g.ema.as_ref()].into_iter().flatten().map(|kept| &kept.tensor);
        kept.chain(moments).chain(&g.shadow).collect()
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&self) -> Result<()> {
        // Where `grad` has parts of sums, these are overwritten, and a backward pass begins with zeros.
        for t in self.groups.iter().filter_map(|g| g.train.as_ref()).filter(|t| t.spans.is_none()) {
            self.dev.fill(Stream::COMPUTE, &Fill { y: t.grad.out(), value: 0.0 })?;
        }
        Ok(())
    }

    /// A parameter as a value on a tape, in the type that products read.
    pub fn var(&self, tape: &Tape, p: Param) -> Result<Var> {
        self.var_as(tape, p, self.precision().act)
    }

    /// A parameter on a tape as the master that the optimizer changes, where `dtype` is its type; else as
    /// [`Params::var`] gives it. The gradient goes to the same place.
    pub fn var_as(&self, tape: &Tape, p: Param, dtype: DType) -> Result<Var> {
        let g = &self.groups[p.group];
        let item = &g.layout.items[p.item];
        let n = item.dims.numel();
        let master = &g.master.tensor;
        let rounded = g.shadow.as_ref().filter(|_| dtype != master.dtype());
        if rounded.is_none() && g.master.parts {
            let got = format!("{dtype} of group {}", g.layout.name);
            return Err(Error::arg("var_as", "dtype", got, "one of which every rank has all weights"));
        }
        let value = rounded.unwrap_or(master).range(item.offset, n)?.reshape(item.dims)?;
        Ok(tape.weight(value, self.gradient(p.group, p.item)?))
    }

    /// Where the gradient of a parameter is added; `None` if its group is frozen.
    fn gradient(&self, group: usize, item: usize) -> Result<Option<Target>> {
        let g = &self.groups[group];
        let Item { offset, dims, .. } = &g.layout.items[item];
        let (n, dims) = (dims.numel(), *dims);
        let Some(t) = &g.train else { return Ok(None) };
        let id = (group, item);
        Ok(Some(match &t.spans {
            None => {
                let grad = t.grad.range(*offset, n)?.reshape(dims)?;
                Target::new(id, move || Ok(grad.clone()))
            }
            Some(spans) => {
                let (dev, spans, at, acc) = (self.dev.clone(), spans.clone(), *offset, self.prec.acc);
                Target::new(id, move || spans.tensor(&*dev, acc, at, n)?.reshape(dims))
            }
        }))
    }

    /// A parameter as a value on a tape that no gradient reaches.
    pub fn frozen(&self, tape: &Tape, p: Param) -> Result<Var> {
        Ok(self.var(tape, p)?.detach())
    }

    /// Every public name with its group and shape, in order.
    pub fn names(&self) -> impl Iterator<Item = (&str, &str, &[usize])> {
        self.groups.iter().flat_map(|g| {
            g.layout.items.iter().flat_map(move |i| {
                i.publics.iter().map(move |p| (p.name.as_str(), g.layout.name.as_str(), p.dims.as_slice()))
            })
        })
    }

    fn find(&self, name: &str) -> Option<(&Store, &Item, &Public)> {
        self.groups.iter().find_map(|g| {
            g.layout.items.iter().find_map(|i| i.publics.iter().find(|p| p.name == name).map(|p| (g, i, p)))
        })
    }

    fn source<'a>(&'a self, g: &'a Store, stored: Stored) -> Option<(&'a Tensor, Form)> {
        let of = |parts: bool| if parts { Form::Parts } else { Form::Whole };
        let state = of(self.sharing.state);
        match stored {
            Stored::Master => Some((&g.master.tensor, g.master.form())),
            Stored::Gradient => g.train.as_ref().map(|t| (&t.grad, self.sharing.form_of_gradients())),
            Stored::Ema => g.ema.as_ref().map(|ema| (&ema.tensor, ema.form())),
            Stored::Moment1 => g.train.as_ref().map(|t| (&t.m, state)),
            Stored::Moment2 => g.train.as_ref().map(|t| (&t.v, state)),
        }
    }

    /// True if a group has these values.
    pub fn has(&self, group: &str, stored: Stored) -> bool {
        self.groups.iter().any(|g| g.layout.name == group && self.source(g, stored).is_some())
    }

    /// A public tensor in the layout of files; `None` for an unknown name or a copy that does not exist. Where ranks share
    /// the copy, all of them call this at the same point, or [`Params::attend`].
    pub fn read(&self, name: &str, stored: Stored) -> Result<Option<HostTensor>> {
        let Some((g, at, p)) = self.elements(name) else { return Ok(None) };
        let Some((from, form)) = self.source(g, stored) else { return Ok(None) };
        let values = self.collect(g, from, form, at)?;
        let values = if p.oihw { permute(&values, &p.dims, true) } else { values };
        Ok(Some(HostTensor { dims: p.dims.clone(), values }))
    }

    /// Gives this rank's parts to the ranks that read a public tensor.
    pub fn attend(&self, name: &str, stored: Stored) -> Result<()> {
        let Some((g, at, _)) = self.elements(name) else { return Ok(()) };
        let Some((from, form)) = self.source(g, stored) else { return Ok(()) };
        self.gathered(g, from, form, &at).try_for_each(|part| part.map(drop))
    }

    /// The elements of a public tensor in its group.
    fn elements(&self, name: &str) -> Option<(&Store, Range<usize>, &Public)> {
        let (g, item, p) = self.find(name)?;
        let n: usize = p.dims.iter().product();
        let at = item.offset + p.rows.start * (n / p.rows.len().max(1));
        Some((g, at..at + n, p))
    }

    /// Where this rank keeps the first `n` values of one copy of a public tensor.
    fn target(&self, name: &str, stored: Stored, n: usize) -> Result<(Places, &Public)> {
        let Some((g, at, p)) = self.elements(name) else {
            return Err(Error::arg("write_public", "name", name, "a parameter of this model"));
        };
        let Some((to, form)) = self.source(g, stored) else {
            return Err(Error::arg(
                "write_public",
                "stored",
                format!("{stored:?}"),
                "one that the group has",
            ));
        };
        let row = at.len() / p.rows.len().max(1);
        if n > at.len() || !n.is_multiple_of(row.max(1)) || (p.oihw && n != at.len()) {
            let want = format!("rows of {:?}", p.dims);
            return Err(Error::arg("write_public", "values", format!("{n} of {name}"), want));
        }
        Ok((self.places(g, to, form, at.start..at.start + n)?, p))
    }

    /// Overwrites one copy of a public tensor. After writing master weights, call [`Params::refresh`]. Where ranks share the
    /// copy, each keeps its own parts of the values.
    pub fn write_public(&self, name: &str, stored: Stored, t: &HostTensor) -> Result<()> {
        let (_, p) = self.target(name, stored, t.values.len())?;
        if t.dims != p.dims {
            return Err(Error::arg(
                "write_public",
                "t",
                format!("{name} {:?}", t.dims),
                format!("{:?}", p.dims),
            ));
        }
        self.write_rows(name, stored, &t.values)
    }

    /// Overwrites the first rows of one copy of a public tensor, or all of them.
    pub fn write_rows(&self, name: &str, stored: Stored, values: &[f64]) -> Result<()> {
        let (to, p) = self.target(name, stored, values.len())?;
        let permuted = p.oihw.then(|| permute(values, &p.dims, false));
        let values = permuted.as_deref().unwrap_or(values);
        to.into_iter().try_for_each(|(of, to)| self.write(&to, &values[of]))
    }

    /// The same with values as a file stores them, row-major, which the device converts.
    pub fn write_stored(&self, name: &str, stored: Stored, dtype: DType, bytes: &[u8]) -> Result<()> {
        /// Values that are on the device in both types at a time.
        const PIECE: usize = 16 << 20;
        let (all, p) = self.target(name, stored, bytes.len() / dtype.size())?;
        // Only a few weights are of convolutions.
        if p.oihw {
            return self.write_rows(name, stored, &to_f64(dtype, bytes));
        }
        for (of, to) in all {
            let bytes = &bytes[of.start * dtype.size()..of.end * dtype.size()];
            for (i, piece) in bytes.chunks(PIECE * dtype.size()).enumerate() {
                let n = piece.len() / dtype.size();
                let from = Tensor::empty(&*self.dev, Role::Input, dtype, [n])?;
                self.dev.copy_in(Stream::COMPUTE, piece, from.out())?;
                let to = to.range(i * PIECE, n)?;
                self.dev.cast(Stream::COMPUTE, &Cast { x: from.view(), y: to.out() })?;
            }
        }
        Ok(())
    }
}

/// Converts between OIHW (files) and OHWI (memory); `dims` are OIHW.
fn permute(v: &[f64], dims: &[usize], to_oihw: bool) -> Vec<f64> {
    let (o, i, hw) = (dims[0], dims[1], dims[2] * dims[3]);
    let mut out = vec![0.0; v.len()];
    for a in 0..o {
        for b in 0..i {
            for c in 0..hw {
                let (oihw, ohwi) = ((a * i + b) * hw + c, (a * hw + c) * i + b);
                if to_oihw {
                    out[oihw] = v[ohwi];
                } else {
                    out[ohwi] = v[oihw];
                }
            }
        }
    }
    out
}
