use ett::backend::{
    Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, DType, Kernels, MaxPool2x2Bwd, MaxPool2x2Fwd, Stream,
    Upsample2xBwd, Upsample2xFwd,
};

use crate::common::{Bench, acc, call, normal, out};

/// Upsampling and pooling by two.
fn resample(b: &mut Bench) {
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    let [n, size, ch] = if b.gpu { [8, 512, 128] } else { [8, 64, 16] };
    let (fine, coarse) = ([n, size, size, ch], [n, size / 2, size / 2, ch]);
    let shape = format!("{n}x{size}x{size}x{ch}");
    b.kernel("upsample2x_fwd", &shape, dtype, &|dev, seed| {
        let (x, y) = (normal(dev, dtype, coarse, seed)?, out(dev, dtype, fine)?);
        let run = move |dev: &dyn Kernels| {
            call(&Upsample2xFwd { x: x.view(), y: y.out() }, |a| dev.upsample2x_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("upsample2x_bwd", &shape, dtype, &|dev, seed| {
        let (dy, dx) = (normal(dev, dtype, fine, seed)?, out(dev, dtype, coarse)?);
        let run = move |dev: &dyn Kernels| {
            call(&Upsample2xBwd { dy: dy.view(), dx: dx.out() }, |a| dev.upsample2x_bwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("max_pool2x2_fwd", &shape, dtype, &|dev, seed| {
        let (x, y) = (normal(dev, dtype, fine, seed)?, out(dev, dtype, coarse)?);
        let run = move |dev: &dyn Kernels| {
            call(&MaxPool2x2Fwd { x: x.view(), y: y.out() }, |a| dev.max_pool2x2_fwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("max_pool2x2_bwd", &shape, dtype, &|dev, seed| {
        let (dy, x, dx) = (
            normal(dev, dtype, coarse, seed)?,
            normal(dev, dtype, fine, seed + 100)?,
            out(dev, dtype, fine)?,
        );
        let run = move |dev: &dyn Kernels| {
            let a = MaxPool2x2Bwd { dy: dy.view(), x: x.view(), dx: dx.out() };
            call(&a, |a| dev.max_pool2x2_bwd(Stream::COMPUTE, a))
        };
        Ok((Box::new(run), None))
    });
}

pub fn benches(b: &mut Bench) {
    resample(b);
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
