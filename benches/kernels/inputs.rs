//! What a batch goes through on the device: bytes of pictures, offsets and targets.

use ett::backend::{Arange, DType, Kernels, Pick, Role, ScaleBytes, Stream};
use ett::rng::Philox;
use ett::tensor::Tensor;

use crate::common::{Bench, call, ids, out};

const S: Stream = Stream::COMPUTE;

pub fn benches(b: &mut Bench) {
    let (batch, side) = if b.gpu { (128, 512) } else { (16, 64) };
    let dims = [batch, side, side, 3];
    for dtype in [DType::F32, DType::Bf16] {
        b.kernel("scale_bytes", &format!("{batch}x{side}x{side}x3"), dtype, &|dev, seed| {
            let mut rng = Philox::new(seed, 0);
            let block: Vec<u8> = (0..side * side * 3).map(|_| rng.below(256) as u8).collect();
            let (x, y) =
                (Tensor::from_host(dev, Role::Input, &block.repeat(batch), dims)?, out(dev, dtype, dims)?);
            let run = move |dev: &dyn Kernels| {
                let a = ScaleBytes { x: x.view(), y: y.out() };
                call(&a, |a| dev.scale_bytes(S, a))
            };
            Ok((Box::new(run), None))
        });
    }
    let n = if b.gpu { 1 << 24 } else { 1 << 20 };
    b.kernel("pick", &n.to_string(), DType::I32, &|dev, seed| {
        let (x, idx) = (ids(dev, n, 1 << 17, seed)?, ids(dev, n, n, seed + 100)?);
        let y = out(dev, DType::I32, [n])?;
        let run = move |dev: &dyn Kernels| {
            let a = Pick { x: x.view(), idx: idx.view(), y: y.out() };
            call(&a, |a| dev.pick(S, a))
        };
        Ok((Box::new(run), None))
    });
    b.kernel("arange", &n.to_string(), DType::I32, &|dev, _| {
        let y = out(dev, DType::I32, [n])?;
        let run = move |dev: &dyn Kernels| {
            let a = Arange { y: y.out(), step: 64 };
            call(&a, |a| dev.arange(S, a))
        };
        Ok((Box::new(run), None))
    });
}
