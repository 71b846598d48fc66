//! Reverse-mode differentiation over a tape of ops, independent of the device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use crate::backend::{Accumulate, Add, Cast, DType, Dims, Kernels, Precision, Role, Stream};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A value on a tape.
#[derive(Clone, Debug)]
pub struct Var {
    id: usize,
    value: Tensor,
    grad: bool,
}

impl Var {
    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// Its shape.
    pub fn dims(&self) -> Dims {
        self.value.dims()
    }

    /// True if a gradient flows to this value.
    pub fn needs_grad(&self) -> bool {
        self.grad
    }

    /// The same value, cut off from the tape.
    pub fn detach(&self) -> Var {
        Var { grad: false, ..self.clone() }
    }
}

type Backward = Box<dyn FnOnce(&mut Grads, &[Var]) -> Result<()>>;

struct Node {
    outputs: Vec<Var>,
    backward: Backward,
}

#[derive(Default)]
struct Inner {
    nodes: Vec<Node>,
    next: usize,
    targets: HashMap<usize, Tensor>,
    /// Whether a weight that is being trained was used; set whether or not the tape records.
    trains: bool,
}

/// The ops of one forward pass, in order.
pub struct Tape {
    dev: Arc<dyn Kernels>,
    prec: Precision,
    recording: bool,
    recomputing: bool,
    inner: RefCell<Inner>,
}

impl Tape {
    /// An empty tape.
    pub fn new(dev: Arc<dyn Kernels>, prec: Precision) -> Self {
        Tape { dev, prec, recording: true, recomputing: false, inner: RefCell::default() }
    }

    /// If `yes`, the tape keeps only the inputs of each [`Tape::block`] for the backward pass.
    pub fn recomputing(self, yes: bool) -> Self {
        Tape { recomputing: yes, ..self }
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
        Var { id: inner.next, value, grad: grad && self.recording }
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
    pub fn weight(&self, value: Tensor, grad: Option<Tensor>) -> Var {
        let v = self.var(value, grad.is_some());
        self.inner.borrow_mut().trains |= grad.is_some();
        if let (true, Some(grad)) = (v.grad, grad) {
            self.inner.borrow_mut().targets.insert(v.id, grad);
        }
        v
    }

    /// True for a weight that is being trained.
    pub fn is_weight(&self, v: &Var) -> bool {
        self.inner.borrow().targets.contains_key(&v.id)
    }

    /// Records an op. `backward` is called with the outputs as they are on the tape. If no input needs a gradient,
    /// `backward` and everything it saved are dropped.
    pub fn op(
        &self,
        inputs: &[&Var],
        outputs: Vec<Tensor>,
        backward: impl FnOnce(&mut Grads, &[Var]) -> Result<()> + 'static,
    ) -> Vec<Var> {
        self.node(inputs.iter().any(|v| v.grad), outputs, backward)
    }

    fn node(
        &self,
        grad: bool,
        outputs: Vec<Tensor>,
        backward: impl FnOnce(&mut Grads, &[Var]) -> Result<()> + 'static,
    ) -> Vec<Var> {
        let grad = self.recording && grad;
        let outputs: Vec<Var> = outputs.into_iter().map(|t| self.var(t, grad)).collect();
        if grad {
            let node = Node { outputs: outputs.clone(), backward: Box::new(backward) };
            self.inner.borrow_mut().nodes.push(node);
        }
        outputs
    }

    /// [`Tape::op`] with one output.
    pub fn op1(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(&mut Grads, &Var) -> Result<()> + 'static,
    ) -> Var {
        let out = self.op(inputs, vec![output], move |g, outs| backward(g, &outs[0]));
        out.into_iter().next().unwrap_or_else(|| unreachable!("an op of one output has one"))
    }

    /// Runs a part of a model, `f` of `inputs`. A recomputing tape keeps nothing of the inside: the backward pass
    /// runs `f` again, with the same bits because a forward pass is pure. Other tapes just run `f`.
    pub fn block(
        &self,
        inputs: &[&Var],
        f: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>> + 'static,
    ) -> Result<Vec<Var>> {
        let inputs: Vec<Var> = inputs.iter().map(|&v| v.clone()).collect();
        if !self.recording || !self.recomputing {
            return f(self, &inputs);
        }
        let inner = Tape::inference(self.device(), self.prec);
        let outputs = f(&inner, &inputs.iter().map(Var::detach).collect::<Vec<_>>())?;
        let grad = inputs.iter().any(|v| v.grad) || inner.inner.borrow().trains;
        let outputs = outputs.into_iter().map(|v| v.value).collect();
        let (dev, prec) = (self.device(), self.prec);
        Ok(self.node(grad, outputs, move |g, outs| {
            let t = Tape::new(dev, prec);
            let again: Vec<Var> = inputs.iter().map(|v| t.var(v.value.clone(), v.grad)).collect();
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
        let inner = self.inner.into_inner();
        let mut grads =
            Grads { dev: self.dev, prec: self.prec, slots: HashMap::new(), targets: inner.targets };
        for (v, g) in seeds {
            if g.dims().numel() != v.dims().numel() {
                return Err(Error::arg("backward", "seed", g.dims(), v.dims()));
            }
            grads.give(v, (*g).clone())?;
        }
        for node in inner.nodes.into_iter().rev() {
            if node.outputs.iter().any(|v| grads.slots.contains_key(&v.id)) {
                (node.backward)(&mut grads, &node.outputs)?;
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
    targets: HashMap<usize, Tensor>,
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
    pub fn like(&self, x: &Var) -> Result<Tensor> {
        self.empty(x.dims(), x.value.dtype())
    }

    fn empty(&self, dims: Dims, dtype: DType) -> Result<Tensor> {
        Tensor::empty(self.dev(), Role::Activation, dtype, dims)
    }

    /// Adds a gradient in the type of the value.
    pub fn give(&mut self, to: &Var, g: Tensor) -> Result<()> {
        if !to.grad {
            return Ok(());
        }
        if let Some(target) = self.targets.get(&to.id) {
            let target = target.reshape(g.dims())?;
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
    pub fn target(&mut self, of: &Var) -> Result<Option<Tensor>> {
        if !of.grad {
            return Ok(None);
        }
        if let Some(t) = self.targets.get(&of.id) {
            return Ok(Some(t.reshape(of.dims())?));
        }
        let slot = self.slots.entry(of.id).or_default();
        if slot.acc.is_none() {
            slot.acc = Some(Tensor::zeros(&*self.dev, Role::Activation, self.prec.acc, of.dims())?);
        }
        Ok(slot.acc.clone())
    }

    /// Takes the gradient of a value, in the type of the value; `None` if no gradient reached it.
    pub fn take(&mut self, of: &Var) -> Result<Option<Tensor>> {
        let Some(slot) = self.slots.remove(&of.id) else { return Ok(None) };
        match (slot.value, slot.acc) {
            (g, None) => Ok(g),
            (None, Some(acc)) if acc.dtype() == of.value.dtype() => Ok(Some(acc)),
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
    pub fn take_acc(&mut self, of: &Var) -> Result<Option<Tensor>> {
        match self.slots.get(&of.id) {
            Some(SlotGrad { value: None, acc: Some(_) }) => Ok(self.slots.remove(&of.id).and_then(|s| s.acc)),
            _ => self.take(of),
        }
    }
}
