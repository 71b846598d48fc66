use ett::backend::{Adamw, DType, Kernels, Slot, Stream, SumSquares};
use ett::train::StepState;

use crate::common::{Bench, call, normal, out};

const S: Stream = Stream::COMPUTE;

pub fn benches(b: &mut Bench) {
    // All of Qwen2.5-1.5B.
    let n = if b.gpu { 1_544_000_000 } else { 1 << 22 };
    let dtype = DType::F32;
    b.kernel("sum_squares", &n.to_string(), dtype, &|dev, seed| {
        let (x, sums) = (normal(dev, dtype, [n], seed)?, out(dev, dtype, [2])?);
        let run = move |dev: &dyn Kernels| {
            let a = SumSquares { x: x.view(), out: sums.acc() };
            call(&a, |a| dev.sum_squares(S, a))
        };
        Ok((Box::new(run), None))
    });
    for shadow in [false, true] {
        let shape = format!("{n}{}", if shadow { " + bf16 copy" } else { "" });
        b.kernel("adamw", &shape, dtype, &|dev, seed| {
            let (master, grad) = (normal(dev, dtype, [n], seed)?, normal(dev, dtype, [n], seed + 100)?);
            // Second moments must not be negative; constant ones are as good as random, since nothing branches on them.
            let (m, v) = (normal(dev, dtype, [n], seed + 200)?, out(dev, dtype, [n])?);
            dev.fill(S, &ett::backend::Fill { y: v.out(), value: 0.7 })?;
            let copy = if shadow { Some(out(dev, DType::Bf16, [n])?) } else { None };
            let norm = out(dev, dtype, [2])?;
            let steps = out(dev, DType::I32, [1])?;
            let mut state = StepState::new(dev, dtype)?;
            state.set(Slot::Rate(0), 1e-4);
            state.send(dev)?;
            let run = move |dev: &dyn Kernels| {
                let a = Adamw {
                    master: master.acc(),
                    grad: grad.view(),
                    m: m.acc(),
                    v: v.acc(),
                    ema: None,
                    shadow: copy.as_ref().map(|t| t.out()),
                    state: state.tensor().view(),
                    steps: steps.view(),
                    norm: norm.view(),
                    group: 0,
                    beta1: 0.9,
                    beta2: 0.95,
                    eps: 1e-8,
                    weight_decay: 0.0,
                    ema_decay: 0.0,
                };
                call(&a, |a| dev.adamw(S, a))
            };
            Ok((Box::new(run), None))
        });
    }
}
