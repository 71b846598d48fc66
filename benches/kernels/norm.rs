use criterion::Criterion;
use ett::backend::{Cpu, GroupNormBwd, GroupNormFwd, Kernels, RmsNormFwd, Stream};
use ett::tensor::DType;

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    let dtype = DType::F32;
    let (b, size, ch, groups) = (8, 64, 32, 8);
    let dims = [b, size, size, ch];
    let (x, dy, y) = (normal(&dev, dtype, dims, 1), normal(&dev, dtype, dims, 2), out(&dev, dtype, dims));
    let (w, bias) = (normal(&dev, dtype, [ch], 3), normal(&dev, dtype, [ch], 4));
    let (mean, rstd) = (out(&dev, dtype, [b, groups]), out(&dev, dtype, [b, groups]));
    let name = format!("{b}x{size}x{size}x{ch} + SiLU {dtype}");
    let args = GroupNormFwd {
        x: x.view(),
        w: w.view(),
        b: bias.view(),
        y: y.out(),
        mean: mean.out(),
        rstd: rstd.out(),
        eps: 1e-6,
        silu: true,
    };
    kernel(c, &name, &args, || dev.group_norm_fwd(Stream::COMPUTE, &args));
    let args = GroupNormBwd {
        dy: dy.view(),
        x: x.view(),
        w: w.view(),
        b: bias.view(),
        mean: mean.view(),
        rstd: rstd.view(),
        dx: y.out(),
        dw: None,
        db: None,
        silu: true,
    };
    kernel(c, &name, &args, || dev.group_norm_bwd(Stream::COMPUTE, &args));

    let (n, width) = (4096, 256);
    let (x, w) = (normal(&dev, dtype, [n, width], 5), normal(&dev, dtype, [width], 6));
    let (y, rstd) = (out(&dev, dtype, [n, width]), out(&dev, dtype, [n]));
    let args = RmsNormFwd {
        x: x.view(),
        residual: None,
        w: w.view(),
        sum: None,
        y: y.out(),
        rstd: rstd.out(),
        eps: 1e-6,
    };
    kernel(c, &format!("{n}x{width} {dtype}"), &args, || dev.rms_norm_fwd(Stream::COMPUTE, &args));
}
