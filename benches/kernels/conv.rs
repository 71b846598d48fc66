use criterion::Criterion;
use ett::backend::{Conv2dBwdData, Conv2dBwdWeight, Conv2dFwd, Cpu, Kernels, Stream};
use ett::tensor::DType;

use crate::common::{kernel, normal, out};

pub fn benches(c: &mut Criterion) {
    let dev = Cpu::new(0).expect("threads");
    let dtype = DType::F32;
    for (b, size, ch) in [(8, 64, 16), (8, 32, 64), (2, 16, 256)] {
        let x = normal(&dev, dtype, [b, size, size, ch], 1);
        let w = normal(&dev, dtype, [ch, 3, 3, ch], 2);
        let dy = normal(&dev, dtype, [b, size, size, ch], 3);
        let (y, dw) = (out(&dev, dtype, [b, size, size, ch]), out(&dev, dtype, [ch, 3, 3, ch]));
        let name = format!("{b}x{size}x{size}x{ch} 3x3 {dtype}");
        let (stride, pad_top, pad_left) = (1, 1, 1);
        let args = Conv2dFwd { x: x.view(), w: w.view(), bias: None, y: y.out(), stride, pad_top, pad_left };
        kernel(c, &name, &args, || dev.conv2d_fwd(Stream::COMPUTE, &args));
        let args = Conv2dBwdData { dy: dy.view(), w: w.view(), dx: y.out(), stride, pad_top, pad_left };
        kernel(c, &name, &args, || dev.conv2d_bwd_data(Stream::COMPUTE, &args));
        let args =
            Conv2dBwdWeight { x: x.view(), dy: dy.view(), dw: dw.acc(), db: None, stride, pad_top, pad_left };
        kernel(c, &name, &args, || dev.conv2d_bwd_weight(Stream::COMPUTE, &args));
    }
}
