use ett::backend::{Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, Kernels, Stream};
use ett::tensor::DType;

use crate::common::{Bench, acc, call, normal, out};

pub fn benches(b: &mut Bench) {
    let shapes: &[[usize; 3]] =
        if b.gpu { &[[8, 256, 128]] } else { &[[8, 64, 16], [8, 32, 64], [2, 16, 256]] };
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    let (stride, pad_top, pad_left) = (1, 1, 1);
    for &[n, size, ch] in shapes {
        let (image, kernel) = ([n, size, size, ch], [ch, 3, 3, ch]);
        let shape = format!("{n}x{size}x{size}x{ch} 3x3");
        b.kernel("conv2d_fwd", &shape, dtype, &|dev, seed| {
            let (x, w, y) =
                (normal(dev, dtype, image, seed)?, normal(dev, dtype, kernel, 2)?, out(dev, dtype, image)?);
            let run = move |dev: &dyn Kernels| {
                let (x, w, y) = (x.view(), w.view(), y.out());
                let a = Conv2dFwd { x, w, bias: None, y, stride, pad_top, pad_left };
                call(&a, |a| dev.conv2d_fwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        b.kernel("conv2d_bwd_data", &shape, dtype, &|dev, seed| {
            let (dy, w, dx) =
                (normal(dev, dtype, image, seed)?, normal(dev, dtype, kernel, 2)?, out(dev, dtype, image)?);
            let run = move |dev: &dyn Kernels| {
                let (dy, w, dx) = (dy.view(), w.view(), dx.out());
                let a = Conv2dBwdData { dy, w, dx, stride, pad_top, pad_left };
                call(&a, |a| dev.conv2d_bwd_data(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        b.kernel("conv2d_bwd_weight", &shape, dtype, &|dev, seed| {
            let (x, dy) = (normal(dev, dtype, image, seed)?, normal(dev, dtype, image, seed + 100)?);
            let dw = out(dev, acc(dtype), kernel)?;
            let run = move |dev: &dyn Kernels| {
                let (x, dy, dw) = (x.view(), dy.view(), dw.acc());
                let a = Conv2dBwdWeight { x, dy, dw, db: None, stride, pad_top, pad_left };
                call(&a, |a| dev.conv2d_bwd_weight(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
    }
}
