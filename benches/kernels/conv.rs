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

/// A convolution of `x [B, H, W, C]` to `[B, H', W', O]`.
struct Conv {
    x: [usize; 4],
    outputs: usize,
    taps: usize,
    to: usize,
    stride: usize,
    pad: usize,
}

impl Conv {
    /// With as many positions as pixels.
    fn same(n: usize, size: usize, channels: usize, outputs: usize, taps: usize) -> Self {
        Conv { x: [n, size, size, channels], outputs, taps, to: size, stride: 1, pad: taps / 2 }
    }

    fn name(&self) -> String {
        let ([n, h, w, c], k) = (self.x, self.taps);
        let outputs = if self.outputs == c { String::new() } else { format!(" to {}", self.outputs) };
        let stride = if self.stride == 1 { String::new() } else { format!(" stride {}", self.stride) };
        format!("{n}x{h}x{w}x{c}{outputs} {k}x{k}{stride}")
    }
}

/// The layers of the tokenizer at 512 pixels, with batch 8, and what else the tokenizer, its discriminator and the perceptual
/// loss have; small ones on the CPU.
fn shapes(gpu: bool) -> Vec<Conv> {
    if !gpu {
        return [[8, 64, 16], [8, 32, 64], [2, 16, 256]]
            .map(|[n, size, ch]| Conv::same(n, size, ch, ch, 3))
            .into_iter()
            .collect();
    }
    vec![
        Conv::same(8, 512, 128, 128, 3),
        Conv::same(8, 256, 128, 128, 3),
        Conv::same(8, 128, 256, 256, 3),
        Conv::same(8, 64, 256, 256, 3),
        Conv::same(8, 32, 512, 512, 3),
        Conv::same(32, 16, 512, 512, 3),
        // The perceptual loss.
        Conv::same(8, 512, 64, 64, 3),
        Conv::same(8, 256, 64, 128, 3),
        // The first and the last layer.
        Conv::same(8, 256, 3, 128, 3),
        Conv::same(8, 256, 128, 3, 3),
        Conv::same(8, 512, 3, 128, 3),
        Conv::same(8, 512, 128, 3, 3),
        Conv::same(8, 64, 256, 512, 1),
        // Down-sampling with one-sided padding; up-sampling, whose forward is the data gradient of this one.
        Conv { x: [8, 512, 512, 128], outputs: 128, taps: 3, to: 256, stride: 2, pad: 0 },
        Conv { x: [8, 512, 512, 128], outputs: 128, taps: 4, to: 256, stride: 2, pad: 1 },
        // The discriminator's.
        Conv { x: [8, 512, 512, 3], outputs: 64, taps: 4, to: 256, stride: 2, pad: 1 },
        Conv { x: [8, 256, 256, 64], outputs: 128, taps: 4, to: 128, stride: 2, pad: 1 },
        Conv { x: [8, 64, 64, 256], outputs: 512, taps: 4, to: 63, stride: 1, pad: 1 },
    ]
}

/// The fused forms of a residual block and of the last layer: input SiLU(GroupNorm(x)), residual, statistics of the output.
fn fused(b: &mut Bench) {
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    let all = match b.gpu {
        true => vec![
            Conv::same(8, 512, 128, 128, 3),
            Conv::same(8, 256, 128, 128, 3),
            Conv::same(8, 128, 256, 256, 3),
            Conv::same(8, 64, 256, 256, 3),
            Conv::same(8, 32, 512, 512, 3),
            Conv::same(8, 512, 3, 128, 3),
            Conv::same(8, 512, 128, 3, 3),
        ],
        false => vec![Conv::same(8, 64, 32, 32, 3)],
    };
    for of in all {
        let Conv { x: image, outputs, taps, to, stride, pad } = of;
        let ([n, .., ch], kernel, result) =
            (image, [outputs, taps, taps, image[3]], [image[0], to, to, outputs]);
        let (groups, of_y, normed) =
            (if ch < 32 { 1 } else { 32 }, if outputs < 32 { 1 } else { 32 }, ch >= 32);
        let with: &[_] = match normed {
            true => &[(" of norm + statistics", false), (" of norm + residual + statistics", true)],
            false => &[(" + statistics", false)],
        };
        for &(with, added) in with {
            b.kernel("conv2d_fwd", &format!("{}{with}", of.name()), dtype, &|dev, seed| {
                let (x, w, y) = (
                    normal(dev, dtype, image, seed)?,
                    normal(dev, dtype, kernel, 2)?,
                    out(dev, dtype, result)?,
                );
                let (mean, rstd) =
                    (normal(dev, acc(dtype), [n, groups], 3)?, normal(dev, acc(dtype), [n, groups], 4)?);
                let (gamma, beta) = (normal(dev, dtype, [ch], 5)?, normal(dev, dtype, [ch], 6)?);
                let (bias, residual) = (normal(dev, dtype, [outputs], 7)?, normal(dev, dtype, result, 8)?);
                let (y_mean, y_rstd) = (out(dev, acc(dtype), [n, of_y])?, out(dev, acc(dtype), [n, of_y])?);
                let run = move |dev: &dyn Kernels| {
                    let a = Conv2dFwd {
                        mean: normed.then(|| mean.view()),
                        rstd: normed.then(|| rstd.view()),
                        gamma: normed.then(|| gamma.view()),
                        beta: normed.then(|| beta.view()),
                        residual: added.then(|| residual.view()),
                        y_mean: Some(y_mean.out()),
                        y_rstd: Some(y_rstd.out()),
                        eps: 1e-6,
                        ..Conv2dFwd::plain(
                            [x.view(), w.view()],
                            Some(bias.view()),
                            y.out(),
                            stride,
                            [pad, pad],
                        )
                    };
                    call(&a, |a| dev.conv2d_fwd(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
        }
        if !normed {
            continue;
        }
        for (with, added) in [("", false), (" + skip", true)] {
            let shape = format!("{} through norm{with}", of.name());
            b.kernel("conv2d_bwd_data", &shape, dtype, &|dev, seed| {
                let (dy, w, dx) = (
                    normal(dev, dtype, result, seed)?,
                    normal(dev, dtype, kernel, 2)?,
                    out(dev, dtype, image)?,
                );
                let (x, skip) =
                    (normal(dev, dtype, image, seed + 100)?, normal(dev, dtype, image, seed + 200)?);
                let (mean, rstd) =
                    (normal(dev, acc(dtype), [n, groups], 3)?, normal(dev, acc(dtype), [n, groups], 4)?);
                let (gamma, beta) = (normal(dev, dtype, [ch], 5)?, normal(dev, dtype, [ch], 6)?);
                let (dgamma, dbeta) = (out(dev, acc(dtype), [ch])?, out(dev, acc(dtype), [ch])?);
                let run = move |dev: &dyn Kernels| {
                    let a = Conv2dBwdData {
                        x: Some(x.view()),
                        mean: Some(mean.view()),
                        rstd: Some(rstd.view()),
                        gamma: Some(gamma.view()),
                        beta: Some(beta.view()),
                        skip: added.then(|| skip.view()),
                        dgamma: Some(dgamma.acc()),
                        dbeta: Some(dbeta.acc()),
                        ..Conv2dBwdData::plain([dy.view(), w.view()], dx.out(), stride, [pad, pad])
                    };
                    call(&a, |a| dev.conv2d_bwd_data(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
        }
        b.kernel("conv2d_bwd_weight", &format!("{} of norm + bias", of.name()), dtype, &|dev, seed| {
            let (x, dy) = (normal(dev, dtype, image, seed)?, normal(dev, dtype, result, seed + 100)?);
            let (mean, rstd) =
                (normal(dev, acc(dtype), [n, groups], 3)?, normal(dev, acc(dtype), [n, groups], 4)?);
            let (gamma, beta) = (normal(dev, dtype, [ch], 5)?, normal(dev, dtype, [ch], 6)?);
            let (dw, db) = (out(dev, acc(dtype), kernel)?, out(dev, acc(dtype), [outputs])?);
            let run = move |dev: &dyn Kernels| {
                let a = Conv2dBwdWeight {
                    mean: Some(mean.view()),
                    rstd: Some(rstd.view()),
                    gamma: Some(gamma.view()),
                    beta: Some(beta.view()),
                    ..Conv2dBwdWeight::plain(
                        [x.view(), dy.view()],
                        dw.acc(),
                        Some(db.acc()),
                        stride,
                        [pad, pad],
                    )
                };
                call(&a, |a| dev.conv2d_bwd_weight(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
    }
}

pub fn benches(b: &mut Bench) {
    resample(b);
    fused(b);
    let dtype = if b.gpu { DType::Bf16 } else { DType::F32 };
    for of in shapes(b.gpu) {
        let Conv { x: image, outputs, taps, to, stride, pad } = of;
        let (kernel, result) = ([outputs, taps, taps, image[3]], [image[0], to, to, outputs]);
        let shape = of.name();
        b.kernel("conv2d_fwd", &shape, dtype, &|dev, seed| {
            let (x, w, y) =
                (normal(dev, dtype, image, seed)?, normal(dev, dtype, kernel, 2)?, out(dev, dtype, result)?);
            let run = move |dev: &dyn Kernels| {
                let (x, w, y) = (x.view(), w.view(), y.out());
                let a = Conv2dFwd::plain([x, w], None, y, stride, [pad, pad]);
                call(&a, |a| dev.conv2d_fwd(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        b.kernel("conv2d_bwd_data", &shape, dtype, &|dev, seed| {
            let (dy, w, dx) =
                (normal(dev, dtype, result, seed)?, normal(dev, dtype, kernel, 2)?, out(dev, dtype, image)?);
            let run = move |dev: &dyn Kernels| {
                let (dy, w, dx) = (dy.view(), w.view(), dx.out());
                let a = Conv2dBwdData::plain([dy, w], dx, stride, [pad, pad]);
                call(&a, |a| dev.conv2d_bwd_data(Stream::COMPUTE, a))
            };
            Ok((Box::new(run), None))
        });
        for bias in [false, true] {
            let with = if bias { " + bias" } else { "" };
            b.kernel("conv2d_bwd_weight", &format!("{shape}{with}"), dtype, &|dev, seed| {
                let (x, dy) = (normal(dev, dtype, image, seed)?, normal(dev, dtype, result, seed + 100)?);
                let (dw, db) = (out(dev, acc(dtype), kernel)?, out(dev, acc(dtype), [outputs])?);
                let run = move |dev: &dyn Kernels| {
                    let (x, dy, dw, db) = (x.view(), dy.view(), dw.acc(), bias.then(|| db.acc()));
                    let a = Conv2dBwdWeight::plain([x, dy], dw, db, stride, [pad, pad]);
                    call(&a, |a| dev.conv2d_bwd_weight(Stream::COMPUTE, a))
                };
                Ok((Box::new(run), None))
            });
        }
    }
}
