//! A kernel of ett on memory of cudarc: the nearest code of each token. Without a GPU, the same call runs on the CPU. The
//! result is compared with a loop in f64.

use std::error::Error;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DevicePtr, DevicePtrMut};
use ett::backend::{self, Buffer, DType, In, Kernels, Metric, Nearest, Out, Reclaim, Role, Stream};
use ett::tensor::Tensor;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Tokens, codes and their dimension.
const SIZES: [usize; 3] = [300, 1000, 64];
/// Largest error of a score, relative to the largest score.
const BOUND: f64 = 1e-4;

/// The call, for any device.
fn nearest(dev: &dyn Kernels, z: In, e: In, idx: Out, score: Out) -> ett::error::Result<()> {
    let args = Nearest { z, e, idx, score: Some(score), bad: None, metric: Metric::Dot };
    dev.nearest(Stream::COMPUTE, &args)
}

/// The owner of memory that cudarc frees.
struct Cudarc;

impl Reclaim for Cudarc {
    unsafe fn reclaim(&self, _addr: u64, _bytes: usize, _role: Role) {}
}

/// Codes and scores on GPU 0, with memory of cudarc.
fn on_gpu(gpu: &dyn Kernels, z: &[f32], e: &[f32]) -> Outcome<(Vec<i32>, Vec<f32>)> {
    let [m, k, d] = SIZES;
    // The same primary context as that of `gpu`, so each may use the memory of the other.
    let stream = CudaContext::new(0)?.default_stream();
    let (z, e) = (stream.clone_htod(z)?, stream.clone_htod(e)?);
    let (mut idx, mut score) = (stream.alloc_zeros::<i32>(m)?, stream.alloc_zeros::<f32>(m)?);
    {
        let ((z, _z), (e, _e)) = (z.device_ptr(&stream), e.device_ptr(&stream));
        let ((idx, _idx), (score, _score)) = (idx.device_ptr_mut(&stream), score.device_ptr_mut(&stream));
        // ett has streams of its own.
        stream.synchronize()?;
        let owner: Arc<dyn Reclaim> = Arc::new(Cudarc);
        let buffer = |addr, n: usize| {
            // SAFETY: cudarc aligns allocations to 256 bytes. They have `n` elements of 4 bytes, were initialised and
            // outlive the buffers, which are dropped at the end of this block, after the kernel.
            unsafe { Buffer::new(addr, 4 * n, Role::Activation, gpu.id(), owner.clone()) }
        };
        let [z, e] = [buffer(z, m * d), buffer(e, k * d)];
        let [idx, score] = [buffer(idx, m), buffer(score, m)];
        nearest(
            gpu,
            In::new(&z, 0, DType::F32, [m, d], d as i64)?,
            In::new(&e, 0, DType::F32, [k, d], d as i64)?,
            Out(In::new(&idx, 0, DType::I32, [m], m as i64)?),
            Out(In::new(&score, 0, DType::F32, [m], m as i64)?),
        )?;
        gpu.synchronize()?;
    }
    Ok((stream.clone_dtoh(&idx)?, stream.clone_dtoh(&score)?))
}

/// The same on the CPU, with memory of ett.
fn on_cpu(z: &[f32], e: &[f32]) -> Outcome<(Vec<i32>, Vec<f32>)> {
    let [m, k, d] = SIZES;
    let dev = backend::open("cpu", 0)?;
    let z = Tensor::from_host(&*dev, Role::Input, z, [m, d])?;
    let e = Tensor::from_host(&*dev, Role::Input, e, [k, d])?;
    let idx = Tensor::empty(&*dev, Role::Activation, DType::I32, [m])?;
    let score = Tensor::empty(&*dev, Role::Activation, DType::F32, [m])?;
    nearest(&*dev, z.view(), e.view(), idx.out(), score.out())?;
    Ok((idx.to_host(&*dev)?, score.to_host(&*dev)?))
}

/// Numbers in [-1, 1), the same at every call.
fn numbers(mut seed: u64, n: usize) -> Vec<f32> {
    let next = |_| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

fn main() -> Outcome<()> {
    let [m, k, d] = SIZES;
    let (z, e) = (numbers(1, m * d), numbers(2, k * d));
    let (place, (idx, score)) = match backend::open("cuda", 0) {
        Ok(gpu) => (format!("on the GPU ({})", gpu.name()), on_gpu(&*gpu, &z, &e)?),
        Err(why) => (format!("on the CPU, because no GPU can be used ({why})"), on_cpu(&z, &e)?),
    };

    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let (mut error, mut largest) = (0f64, 0f64);
    for ((z, &i), &score) in z.chunks(d).zip(&idx).zip(&score) {
        let scores: Vec<f64> = e.chunks(d).map(|e| dot(z, e)).collect();
        let best = scores.iter().copied().fold(f64::MIN, f64::max);
        let chosen = usize::try_from(i).ok().and_then(|i| scores.get(i));
        let chosen = chosen.ok_or_else(|| format!("a code is {i}, wanted one of 0..{k}"))?;
        // Rounding may exchange codes with nearly the same score.
        error = error.max(best - chosen).max((f64::from(score) - best).abs());
        largest = largest.max(best);
    }
    let error = error / largest;
    if idx.len() != m || score.iter().any(|s| !s.is_finite()) || error > BOUND {
        return Err(format!("nearest {place}: error {error:.1e}, wanted at most {BOUND:.0e}").into());
    }
    println!("nearest {place}: {m} tokens found the best of {k} codes, error of scores {error:.1e}");
    Ok(())
}
