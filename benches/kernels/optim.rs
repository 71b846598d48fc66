use criterion::Criterion;
use ett::backend::{Adamw, Cpu, Kernels, Slot, StepState, Stream};
use ett::tensor::DType;

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    let dtype = DType::F32;
    let n = 1 << 22;
    let (master, grad) = (normal(&dev, dtype, [n], 1), normal(&dev, dtype, [n], 2));
    let (m, v, norm) = (out(&dev, dtype, [n]), out(&dev, dtype, [n]), out(&dev, dtype, [2]));
    let mut state = StepState::new(&dev, dtype).expect("memory for a bench");
    for (slot, value) in [(Slot::Rate(0), 1e-4), (Slot::Bias1(0), 10.0), (Slot::Bias2(0), 20.0)] {
        state.set(slot, value);
    }
    state.send(&dev).expect("a copy");
    let args = Adamw {
        master: master.acc(),
        grad: grad.view(),
        m: m.acc(),
        v: v.acc(),
        ema: None,
        shadow: None,
        state: state.tensor().view(),
        norm: norm.view(),
        group: 0,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.0,
        ema_decay: 0.0,
    };
    kernel(c, &format!("{n} {dtype}"), &args, || dev.adamw(Stream::COMPUTE, &args));
}
