//! A small model: `cargo run --release --example 3_small_model`.
//!
//! Two layers learn which points of a square lie inside of a circle, with the ops, layers and the optimizer that train
//! the large models.

use std::error::Error;
use std::sync::Arc;

use ett::autograd::{Tape, Var};
use ett::backend::{Cpu, DType, Kernels, Precision, Role};
use ett::nn::{Init, Linear, ParamBuilder, Params};
use ett::ops;
use ett::rng::Philox;
use ett::tensor::Tensor;
use ett::train::{Hyper, Optimizer, StepState};

const POINTS: usize = 512;
const WIDTH: usize = 32;
const STEPS: usize = 200;

/// `[N, 2]` points to `[N, 2]` logits of outside and inside.
struct Model {
    first: Linear,
    second: Linear,
}

impl Model {
    fn new(b: &mut ParamBuilder) -> Self {
        let mut layer = |name: &str, i: usize, o: usize| {
            Linear::new(b, name, i, o, Some(Init::Constant(0.0)), Init::kaiming(i))
        };
        Model { first: layer("first", 2, WIDTH), second: layer("second", WIDTH, 2) }
    }

    fn forward(&self, tape: &Tape, p: &Params, x: &Var) -> ett::error::Result<Var> {
        self.second.forward(tape, p, &self.first.forward_gelu(tape, p, x)?)
    }
}

/// Ends the example, and the test that runs it, with the error.
pub fn main() -> Result<(), Box<dyn Error>> {
    let dev: Arc<dyn Kernels> = Arc::new(Cpu::new(0)?);
    let mut rng = Philox::new(7, 0);
    let points: Vec<f64> = (0..2 * POINTS).map(|_| 2.0 * rng.uniform() - 1.0).collect();
    let inside: Vec<i32> = points.chunks(2).map(|p| i32::from(p[0] * p[0] + p[1] * p[1] < 0.5)).collect();
    let x = Tensor::from_f64(&*dev, Role::Input, DType::F32, &points, [POINTS, 2])?;
    let target = Tensor::from_host(&*dev, Role::Input, &inside, [POINTS])?;
    let scale = Tensor::from_host(&*dev, Role::Input, &[1.0 / POINTS as f32], [1])?;
    let one = Tensor::from_host(&*dev, Role::Input, &[1f32], [1])?;

    // Parameters are registered first and get their memory at once. A group is what an optimizer trains.
    let mut b = ParamBuilder::new();
    b.group("model");
    let model = Model::new(&mut b);
    let mut params = b.build(dev.clone(), Precision::F32, 1)?;
    params.train(&["model"])?;
    let hyper = Hyper { betas: [0.9, 0.99], eps: 1e-8, weight_decay: 0.0, ema_decay: 0.0, clip: 1.0 };
    let optimizer = Optimizer::new(&params, &["model"], hyper)?;
    // Rates and other values that change are in device memory, which kernels read.
    let mut state = StepState::new(&*dev, DType::F32)?;
    optimizer.prepare(&mut state, 0.02);
    state.send(&*dev)?;

    let mut losses = Vec::new();
    for _ in 0..STEPS {
        params.zero_grad()?;
        let tape = Tape::new(dev.clone(), Precision::F32);
        let logits = model.forward(&tape, &params, &tape.constant(x.clone()))?;
        let loss = ops::cross_entropy(&tape, &logits, &target, None, &scale)?;
        tape.backward(&[(&loss, &one)])?;
        optimizer.apply(&params, &state, loss.value(), std::iter::empty())?;
        optimizer.count(&*dev, optimizer.norm())?;
        losses.extend(loss.value().to_f64(&*dev)?);
    }

    let tape = Tape::inference(dev.clone(), Precision::F32);
    let logits = model.forward(&tape, &params, &tape.constant(x))?.value().to_f64(&*dev)?;
    let right = logits.chunks(2).zip(&inside).filter(|(l, t)| (l[1] > l[0]) == (**t == 1)).count();
    let (first, last) = (losses[0], losses[STEPS - 1]);
    println!("loss {first:.3} to {last:.3} in {STEPS} steps; {right} of {POINTS} points are right");
    assert!(last < 0.2 * first && right * 100 >= POINTS * 97, "the model has not learnt");
    Ok(())
}
