use ett::backend::{DType, Matmul, MatmulAcc, Stream};

use crate::common::{Bench, acc, call, normal, out};

pub fn benches(b: &mut Bench) {
    // The language model's MLP, forward and weight gradient; squares on the CPU.
    let shapes: &[[usize; 3]] =
        if b.gpu { &[[9216, 1536, 8960], [8192, 8192, 8192]] } else { &[[512; 3], [1024; 3]] };
    let types: &[DType] = if b.gpu { &[DType::Bf16] } else { &[DType::F32, DType::Bf16, DType::F64] };
    for &[n, c, o] in shapes {
        for &dtype in types {
            b.kernel("matmul", &format!("{n}x{c}x{o}"), dtype, &|dev, seed| {
                let (x, w) = (normal(dev, dtype, [n, c], seed)?, normal(dev, dtype, [o, c], seed + 100)?);
                let y = out(dev, dtype, [n, o])?;
                let run = move |dev: &dyn ett::backend::Kernels| {
                    let a = Matmul { a: x.view(), b: w.view(), ta: false, tb: true, bias: None, y: y.out() };
                    call(&a, |a| dev.matmul(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
            b.kernel("matmul_acc", &format!("{n}x{c}x{o}"), dtype, &|dev, seed| {
                let (dy, x) = (normal(dev, dtype, [n, o], seed)?, normal(dev, dtype, [n, c], seed + 100)?);
                let dw = out(dev, acc(dtype), [o, c])?;
                let run = move |dev: &dyn ett::backend::Kernels| {
                    let a = MatmulAcc { a: dy.view(), b: x.view(), ta: true, tb: false, y: dw.acc() };
                    call(&a, |a| dev.matmul_acc(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
        }
    }
}
