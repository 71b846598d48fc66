//! Reverse-mode differentiation over a tape of ops, independent of the device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use crate::backend::{Accumulate, Add, Cast, DType, Dims, Kernels, Precision, Role, Stream};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// What a backward pass needs to know of a value to pass gradients on: which one it is, its shape and type, and whether a
/// gradient flows to it.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    id: usize,
    dims: Dims,
    dtype: DType,
    grad: bool,
}

impl Key {
    /// The shape of the value.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// The type of the value.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// True if a gradient flows to the value.
    pub fn needs_grad(&self) -> bool {
        self.grad
    }
}

impl From<&Key> for Key {
    fn from(key: &Key) -> Key {
        *key
    }
}

/// Computes a value again, with the same bits.
type Again = Rc<dyn Fn() -> Result<Tensor>>;

/// A value on a tape.
#[derive(Clone)]
pub struct Var {
    key: Key,
    value: Tensor,
    again: Option<Again>,
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Its shape.
    pub fn dims(&self) -> Dims {
        self.key.dims
    }

    /// True if a gradient flows to this value.
    pub fn needs_grad(&self) -> bool {
        self.key.grad
    }

    /// What an op keeps of an input whose value its backward pass does not read.
    pub fn key(&self) -> Key {
        self.key
    }

    /// What an op keeps of an input whose value its backward pass reads.
    pub fn keep(&self) -> Kept {
        let source = match &self.again {
            Some(again) => Source::Again(again.clone()),
            None => Source::Value(self.value.clone()),
        };
        Kept { key: self.key, source }
    }

    /// The same value, cut off from the tape.
    pub fn detach(&self) -> Var {
        Var { key: Key { grad: false, ..self.key }, ..self.clone() }
    }
}

impl From<&Var> for Key {
    fn from(v: &Var) -> Key {
        v.key
    }
}

#[derive(Clone)]
enum Source {
    Value(Tensor),
    Again(Again),
}

/// A value that an op keeps for its backward pass, or the means to compute it again.
#[derive(Clone)]
pub struct Kept {
    key: Key,
    source: Source,
}

impl Kept {
    /// The value.
    pub fn value(&self) -> Result<Tensor> {
        match &self.source {
            Source::Value(value) => Ok(value.clone()),
            Source::Again(again) => again(),
        }
    }

    /// The value, when it is not needed any more.
    pub fn into_value(self) -> Result<Tensor> {
        match self.source {
            Source::Value(value) => Ok(value),
            Source::Again(again) => again(),
        }
    }

    /// Its shape.
    pub fn dims(&self) -> Dims {
        self.key.dims
    }

    /// True if a gradient flows to this value.
    pub fn needs_grad(&self) -> bool {
        self.key.grad
    }
}

impl From<&Kept> for Key {
    fn from(v: &Kept) -> Key {
        v.key
    }
}

/// Names a weight to whoever follows a backward pass, by two numbers of its owner.
pub type WeightId = (usize, usize);

/// Where the gradient of a weight is added, in the accumulator type.
#[derive(Clone)]
pub struct Target {
    id: Option<WeightId>,
    tensor: Rc<dyn Fn() -> Result<Tensor>>,
}

impl Target {
    /// The tensor that `tensor` returns, which is asked for during the backward pass, as often as something is added.
    pub fn new(id: WeightId, tensor: impl Fn() -> Result<Tensor> + 'static) -> Self {
        Target { id: Some(id), tensor: Rc::new(tensor) }
    }
}

impl From<Tensor> for Target {
    /// A weight that has no name.
    fn from(tensor: Tensor) -> Self {
        Target { id: None, tensor: Rc::new(move || Ok(tensor.clone())) }
    }
}

type Backward = Box<dyn FnOnce(&mut Grads, &[Key]) -> Result<()>>;

struct Node {
    outputs: Vec<Key>,
    backward: Backward,
}

#[derive(Default)]
struct Inner {
    nodes: Vec<Node>,
    next: usize,
    targets: HashMap<usize, Target>,
    /// Whether a weight that is being trained was used; set whether or not the tape records.
    trains: bool,
    /// The weights with a name, in the order of their first use; set whether or not the tape records.
    used: Vec<WeightId>,
    /// The node that used each weight first, which is the last one to add to its gradient.
    first: HashMap<WeightId, usize>,
}

/// What a tape computes again in the backward pass instead of keeping it. The bits are the same, because forward passes are
/// pure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recomputing {
    /// The values of ops that do little work: see [`Tape::cheap`].
    pub cheap: bool,
    /// The inside of blocks: see [`Tape::block`].
    pub blocks: bool,
}

/// The ops of one forward pass, in order.
pub struct Tape {
    dev: Arc<dyn Kernels>,
    prec: Precision,
    recording: bool,
    recomputing: Recomputing,
    inner: RefCell<Inner>,
}

impl Tape {
    /// An empty tape.
    pub fn new(dev: Arc<dyn Kernels>, prec: Precision) -> Self {
        Tape { dev, prec, recording: true, recomputing: Recomputing::default(), inner: RefCell::default() }
    }

    /// The tape, which recomputes `what` from now on.
    pub fn recomputing(self, what: Recomputing) -> Self {
        Tape { recomputing: what, ..self }
    }

    /// A tape that saves nothing, for evaluation.
    pub fn inference(dev: Arc<dyn Kernels>, prec: Precision) -> Self {
        Tape { recording: false, ..Self::new(dev, prec) }
    }

    /// The device.
    pub fn dev(&self) -> &dyn Kernels {
        &*self.dev
    }

    /// The device, as a shared handle.
    pub fn device(&self) -> Arc<dyn Kernels> {
        self.dev.clone()
    }

    /// Element types of this run.
    pub fn precision(&self) -> Precision {
        self.prec
    }

    /// A new activation; contents unspecified.
    pub fn act(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        Tensor::empty(self.dev(), Role::Activation, self.prec.act, dims)
    }

    /// A new activation in the type of `x`; contents unspecified.
    pub fn like(&self, x: &Var, dims: impl Into<Dims>) -> Result<Tensor> {
        Tensor::empty(self.dev(), Role::Activation, x.value.dtype(), dims)
    }

    /// A new statistic or loss; contents unspecified.
    pub fn stat(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        Tensor::empty(self.dev(), Role::Activation, self.prec.acc, dims)
    }

    /// A statistic that starts at zero.
    pub fn zero_stat(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        Tensor::zeros(self.dev(), Role::Activation, self.prec.acc, dims)
    }

    fn var(&self, value: Tensor, grad: bool) -> Var {
        let mut inner = self.inner.borrow_mut();
        inner.next += 1;
        let key =
            Key { id: inner.next, dims: value.dims(), dtype: value.dtype(), grad: grad && self.recording };
        Var { key, value, again: None }
    }

    /// A value that receives no gradient.
    pub fn constant(&self, value: Tensor) -> Var {
        self.var(value, false)
    }

    /// A value whose gradient can be taken from [`Grads`] after the backward pass.
    pub fn leaf(&self, value: Tensor) -> Var {
        self.var(value, true)
    }

    /// A weight: its gradient is added to `grad` (accumulator type, same element count), if given.
    pub fn weight(&self, value: Tensor, grad: Option<impl Into<Target>>) -> Var {
        let v = self.var(value, grad.is_some());
        let Some(target) = grad.map(Into::into) else { return v };
        let mut inner = self.inner.borrow_mut();
        inner.trains = true;
        inner.used.extend(target.id);
        if v.key.grad {
            inner.targets.insert(v.key.id, target);
        }
        v
    }

    /// True for a weight that is being trained.
    pub fn is_weight(&self, v: &Var) -> bool {
        self.inner.borrow().targets.contains_key(&v.key.id)
    }

    /// Records an op. `backward` is called with the keys of the outputs. If no input needs a gradient, `backward` and
    /// everything it keeps are dropped.
    pub fn op(
        &self,
        inputs: &[&Var],
        outputs: Vec<Tensor>,
        backward: impl FnOnce(&mut Grads, &[Key]) -> Result<()> + 'static,
    ) -> Vec<Var> {
        let read = || inputs.iter().filter(|v| v.key.grad);
        let named = |v: &&Var| self.inner.borrow().targets.get(&v.key.id)?.id;
        let weights: Vec<WeightId> = read().filter_map(named).collect();
        self.node(read().count() > 0, &weights, outputs, backward)
    }

    /// Records an op that adds to the gradients of `weights`.
    fn node(
        &self,
        grad: bool,
        weights: &[WeightId],
        outputs: Vec<Tensor>,
        backward: impl FnOnce(&mut Grads, &[Key]) -> Result<()> + 'static,
    ) -> Vec<Var> {
        let grad = self.recording && grad;
        let outputs: Vec<Var> = outputs.into_iter().map(|t| self.var(t, grad)).collect();
        if grad {
            let node = Node { outputs: outputs.iter().map(Var::key).collect(), backward: Box::new(backward) };
            let inner = &mut *self.inner.borrow_mut();
            for &id in weights {
                inner.first.entry(id).or_insert(inner.nodes.len());
            }
            inner.nodes.push(node);
        }
        outputs
    }

    /// [`Tape::op`] with one output.
    pub fn op1(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(&mut Grads, &Key) -> Result<()> + 'static,
    ) -> Var {
        let out = self.op(inputs, vec![output], move |g, outs| backward(g, &outs[0]));
        out.into_iter().next().unwrap_or_else(|| unreachable!("an op of one output has one"))
    }

    /// `v`, an output of an op that does little work. A tape that recomputes such values keeps none of them: the ops whose
    /// backward pass reads `v` call `again`, which returns the same bits and keeps little.
    pub fn cheap(&self, v: Var, again: impl Fn() -> Result<Tensor> + 'static) -> Var {
        match self.recording && self.recomputing.cheap && v.key.grad {
            true => Var { again: Some(Rc::new(again)), ..v },
            false => v,
        }
    }

    /// Runs a part of a model, `f` of `inputs`. A tape that recomputes blocks keeps nothing of the inside: the backward pass
    /// runs `f` again, with the same bits because a forward pass is pure. Other tapes just run `f`.
    pub fn block(
        &self,
        inputs: &[&Var],
        f: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>> + 'static,
    ) -> Result<Vec<Var>> {
        let inputs: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
        if !self.recording || !self.recomputing.blocks {
            return f(self, &inputs);
        }
        let inner = Tape::inference(self.device(), self.prec);
        let outputs = f(&inner, &inputs.iter().map(Var::detach).collect::<Vec<_>>())?;
        let inner = inner.inner.into_inner();
        let grad = inputs.iter().any(|v| v.key.grad) || inner.trains;
        let outputs = outputs.into_iter().map(|v| v.value).collect();
        let (dev, prec, cheap) = (self.device(), self.prec, self.recomputing.cheap);
        let inputs: Vec<Kept> = inputs.iter().map(Var::keep).collect();
        Ok(self.node(grad, &inner.used, outputs, move |g, outs| {
            let t = Tape::new(dev, prec).recomputing(Recomputing { cheap, blocks: false });
            let mut again = Vec::new();
            for v in &inputs {
                again.push(t.var(v.value()?, v.needs_grad()));
            }
            let results = f(&t, &again)?;
            let mut seeds = Vec::new();
            for (out, result) in outs.iter().zip(&results) {
                seeds.extend(g.take(out)?.map(|d| (result, d)));
            }
            let seeds: Vec<(&Var, &Tensor)> = seeds.iter().map(|(v, d)| (*v, d)).collect();
            let mut inner = t.backward(&seeds)?;
            for (v, a) in inputs.iter().zip(&again) {
                if let Some(d) = inner.take(a)? {
                    g.give(v, d)?;
                }
            }
            Ok(())
        }))
    }

    /// Runs the tape backwards from `seeds` (values and the gradients they receive). The saved values of a node are
    /// freed as soon as it has run. Gradients of leaves stay in the result.
    pub fn backward(self, seeds: &[(&Var, &Tensor)]) -> Result<Grads> {
        self.backward_telling(seeds, &mut |_| Ok(()))
    }

    /// The same, calling `done` for each weight with a name as soon as nothing more will be added to its gradient: the
    /// weights that a node used first, after it has run.
    pub fn backward_telling(
        self,
        seeds: &[(&Var, &Tensor)],
        done: &mut dyn FnMut(WeightId) -> Result<()>,
    ) -> Result<Grads> {
        let inner = self.inner.into_inner();
        let mut weights: Vec<(usize, WeightId)> =
            inner.first.into_iter().map(|(id, node)| (node, id)).collect();
        weights.sort_unstable();
        let mut grads =
            Grads { dev: self.dev, prec: self.prec, slots: HashMap::new(), targets: inner.targets };
        for (v, g) in seeds {
            if g.dims().numel() != v.dims().numel() {
                return Err(Error::arg("backward", "seed", g.dims(), v.dims()));
            }
            grads.give(*v, (*g).clone())?;
        }
        for (i, node) in inner.nodes.into_iter().enumerate().rev() {
            if node.outputs.iter().any(|key| grads.slots.contains_key(&key.id)) {
                (node.backward)(&mut grads, &node.outputs)?;
            }
            while let Some((_, id)) = weights.pop_if(|(first, _)| *first == i) {
                done(id)?;
            }
        }
        Ok(grads)
    }
}

#[derive(Default)]
struct SlotGrad {
    /// In the type of the value.
    value: Option<Tensor>,
    /// In the accumulator type.
    acc: Option<Tensor>,
}

/// Gradients during and after a backward pass.
pub struct Grads {
    dev: Arc<dyn Kernels>,
    prec: Precision,
    slots: HashMap<usize, SlotGrad>,
    targets: HashMap<usize, Target>,
}

impl Grads {
    /// The device.
    pub fn dev(&self) -> &dyn Kernels {
        &*self.dev
    }

    /// A new activation gradient; contents unspecified.
    pub fn act(&self, dims: impl Into<Dims>) -> Result<Tensor> {
        Tensor::empty(self.dev(), Role::Activation, self.prec.act, dims)
    }

    /// A new gradient of the shape and type of `x`; contents unspecified.
    pub fn like(&self, x: impl Into<Key>) -> Result<Tensor> {
        let x = x.into();
        self.empty(x.dims, x.dtype)
    }

    fn empty(&self, dims: Dims, dtype: DType) -> Result<Tensor> {
        Tensor::empty(self.dev(), Role::Activation, dtype, dims)
    }

    /// Adds a gradient in the type of the value.
    pub fn give(&mut self, to: impl Into<Key>, g: Tensor) -> Result<()> {
        let to = to.into();
        if !to.grad {
            return Ok(());
        }
        if let Some(target) = self.targets.get(&to.id) {
            let target = (target.tensor)()?.reshape(g.dims())?;
            return self.dev.accumulate(Stream::COMPUTE, &Accumulate { x: g.view(), y: target.acc() });
        }
        let old = self.slots.entry(to.id).or_default().value.take();
        let sum = match old {
            None => g,
            Some(old) => {
                // Into a new tensor, because an op may still use the one that it gave.
                let sum = self.empty(g.dims(), g.dtype())?;
                let a = Add { a: old.view(), b: g.view(), y: sum.out() };
                self.dev.add(Stream::COMPUTE, &a)?;
                sum
            }
        };
        self.slots.entry(to.id).or_default().value = Some(sum);
        Ok(())
    }

    /// The tensor to which kernels add the gradient of a weight-like input; `None` if the input needs no gradient.
    pub fn target(&mut self, of: impl Into<Key>) -> Result<Option<Tensor>> {
        let of = of.into();
        if !of.grad {
            return Ok(None);
        }
        if let Some(t) = self.targets.get(&of.id) {
            return Ok(Some((t.tensor)()?.reshape(of.dims)?));
        }
        let slot = self.slots.entry(of.id).or_default();
        if slot.acc.is_none() {
            slot.acc = Some(Tensor::zeros(&*self.dev, Role::Activation, self.prec.acc, of.dims)?);
        }
        Ok(slot.acc.clone())
    }

    /// Takes the gradient of a value, in the type of the value; `None` if no gradient reached it.
    pub fn take(&mut self, of: impl Into<Key>) -> Result<Option<Tensor>> {
        let of = of.into();
        let Some(slot) = self.slots.remove(&of.id) else { return Ok(None) };
        match (slot.value, slot.acc) {
            (g, None) => Ok(g),
            (None, Some(acc)) if acc.dtype() == of.dtype => Ok(Some(acc)),
            (g, Some(acc)) => {
                if let Some(g) = g {
                    let a = Accumulate { x: g.view(), y: acc.acc() };
                    self.dev.accumulate(Stream::COMPUTE, &a)?;
                }
                let out = self.like(of)?;
                self.dev.cast(Stream::COMPUTE, &Cast { x: acc.view(), y: out.out() })?;
                Ok(Some(out))
            }
        }
    }

    /// Takes the gradient of a weight-like value in the accumulator type, for ops that pass it on without rounding.
    pub fn take_acc(&mut self, of: impl Into<Key>) -> Result<Option<Tensor>> {
        let of = of.into();
        match self.slots.get(&of.id) {
            Some(SlotGrad { value: None, acc: Some(_) }) => Ok(self.slots.remove(&of.id).and_then(|s| s.acc)),
            _ => self.take(of),
        }
    }
}
