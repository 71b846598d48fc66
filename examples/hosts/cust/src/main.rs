//! Two kernels of ett called from cust, which owns the context, the stream and the memory: the nearest codes, and the
//! row statistics of IBQ. Both are compared with a loop in f64. Prints one line per check, and fails without a GPU.

use std::error::Error;
use std::ffi::CStr;
use std::ptr;

use cust::context::Context;
use cust::memory::{CopyDestination, DeviceBuffer, DeviceCopy};
use cust::stream::{Stream, StreamFlags};

use ffi::{ett_dtype, ett_view};

/// The declarations of `ett_kernels.h`, which build.rs makes.
#[allow(dead_code, non_camel_case_types, clippy::all, clippy::undocumented_unsafe_blocks)]
mod ffi {
    include!(concat!(env!("OUT_DIR"), "/ett_kernels.rs"));
}

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Tokens, codes and their dimension.
const SIZES: [usize; 3] = [300, 1000, 64];
const TEMPERATURE: f64 = 0.5;
/// Largest error of a result, relative to the largest wanted value.
const BOUND: f64 = 1e-4;

struct Gpu {
    stream: Stream,
    /// Dropped last: the stream belongs to it.
    _context: Context,
}

/// A launcher, and the query for its workspace.
type Launcher<A> = unsafe extern "C" fn(*const A, *const ffi::ett_launch) -> i32;
type Query<A> = unsafe extern "C" fn(*const A) -> i64;

impl Gpu {
    /// Calls a kernel, waits for it and returns the name of the implementation that ran.
    ///
    /// # Safety
    /// The views of `args` lie inside of buffers of this GPU that no other view of `args` may write to.
    unsafe fn call<A>(&self, args: &A, query: Query<A>, launcher: Launcher<A>) -> Outcome<String> {
        // SAFETY: it reads the struct only.
        let workspace_bytes = unsafe { query(args) };
        let size = usize::try_from(workspace_bytes).map_err(|_| why())?;
        // SAFETY: kernels write to their workspace before they read from it.
        let workspace = unsafe { DeviceBuffer::<u8>::uninitialized(size.max(1)) }?;
        let launch = ffi::ett_launch {
            stream: self.stream.as_inner().cast(),
            workspace: workspace.as_device_ptr().as_raw() as _,
            workspace_bytes,
            fault: ptr::null_mut(),
            number: 0,
            force: ptr::null(),
        };
        // SAFETY: the caller vouches for the views; the workspace lives until the work is done.
        if unsafe { launcher(args, &launch) } != ffi::ETT_OK as i32 {
            return Err(why().into());
        }
        self.stream.synchronize()?;
        // SAFETY: it returns a string literal.
        Ok(unsafe { CStr::from_ptr(ffi::ett_last_kernel()) }.to_string_lossy().into_owned())
    }
}

/// Why the last call of a launcher or a query failed.
fn why() -> String {
    let mut status = ffi::ett_status::default();
    // SAFETY: it writes one struct, whose strings are null-terminated.
    let [op, arg, got, want] = unsafe {
        ffi::ett_last_status(&mut status);
        [status.op.as_ptr(), status.arg.as_ptr(), status.got.as_ptr(), status.want.as_ptr()]
            .map(|text| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    format!("{op}: argument `{arg}` is {got}, wanted {want}")
}

/// All of a buffer as a tensor.
fn view<T: DeviceCopy>(buffer: &DeviceBuffer<T>, dtype: ett_dtype, shape: &[usize]) -> ett_view {
    assert_eq!(shape.iter().product::<usize>(), buffer.len(), "elements of the view");
    let mut dims = [1; 4];
    for (to, &from) in dims.iter_mut().zip(shape) {
        *to = from as i64;
    }
    let ptr = buffer.as_device_ptr().as_raw() as _;
    ett_view { ptr, dtype: dtype as i32, rank: shape.len() as i32, dims, ld: dims[shape.len() - 1] }
}

fn host<T: DeviceCopy + Default>(buffer: &DeviceBuffer<T>) -> Outcome<Vec<T>> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.copy_to(&mut values)?;
    Ok(values)
}

/// Numbers in [-1, 1), the same at every call.
fn numbers(mut seed: u64, n: usize) -> Vec<f32> {
    let next = |_| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(next).collect()
}

/// Fails unless `got` are `want` within [`BOUND`], and prints the error.
fn check(what: &str, kernel: &str, got: &[f64], want: &[f64]) -> Outcome<()> {
    let largest = want.iter().fold(0.0, |a: f64, w| a.max(w.abs()));
    // A NaN is no smaller than the bound.
    let errors = got.iter().zip(want).map(|(g, w)| (g - w).abs() / largest);
    let error = errors.fold(0.0, |a: f64, e| if e <= a { a } else { e });
    if got.len() == want.len() && error <= BOUND {
        println!("{what}: right, {} values, error {error:.1e} (kernel `{kernel}`)", got.len());
        return Ok(());
    }
    Err(format!("{what}: error {error:.1e} of kernel `{kernel}`, wanted at most {BOUND:.0e}").into())
}

fn wide(values: Vec<f32>) -> Vec<f64> {
    values.into_iter().map(f64::from).collect()
}

fn main() -> Outcome<()> {
    // SAFETY: it returns a number.
    let version = unsafe { ffi::ett_abi_version() };
    if version != ffi::ETT_ABI_VERSION {
        let header = ffi::ETT_ABI_VERSION;
        return Err(
            format!("the library has interface {version}, its header {header}: build it again").into()
        );
    }
    // The primary context, the one that the launchers use. A stream that waits for the default stream, on which cust
    // copies.
    let context = cust::quick_init().map_err(|e| format!("no GPU can be used: {e:?}"))?;
    let gpu = Gpu { stream: Stream::new(StreamFlags::DEFAULT, None)?, _context: context };

    let [m, k, d] = SIZES;
    let (z, e) = (numbers(1, m * d), numbers(2, k * d));
    // scores[i][j] = z_i . e_j
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let scores: Vec<Vec<f64>> = z.chunks(d).map(|z| e.chunks(d).map(|e| dot(z, e)).collect()).collect();
    let best: Vec<f64> = scores.iter().map(|row| row.iter().copied().fold(f64::MIN, f64::max)).collect();
    // Rounding may exchange codes whose scores are nearly the same, so scores are compared, not indices.
    let chosen = |idx: &[i32]| -> Outcome<Vec<f64>> {
        let score = |(row, &i): (&Vec<f64>, &i32)| row.get(usize::try_from(i).ok()?).copied();
        let all: Option<_> = scores.iter().zip(idx).map(score).collect();
        all.ok_or_else(|| format!("an index is outside of 0..{k}: {idx:?}").into())
    };

    let (z, e) = (DeviceBuffer::from_slice(&z)?, DeviceBuffer::from_slice(&e)?);
    let (z_view, e_view) = (view(&z, ffi::ETT_F32, &[m, d]), view(&e, ffi::ETT_F32, &[k, d]));
    let idx = DeviceBuffer::from_slice(&vec![-1i32; m])?;
    let bad = DeviceBuffer::from_slice(&[0f32])?;
    let row = || DeviceBuffer::from_slice(&vec![f32::NAN; m]);

    let score = row()?;
    let args = ffi::ett_nearest_args {
        z: z_view,
        e: e_view,
        idx: view(&idx, ffi::ETT_I32, &[m]),
        score: view(&score, ffi::ETT_F32, &[m]),
        bad: view(&bad, ffi::ETT_F32, &[1]),
        metric: ffi::ETT_METRIC_DOT as i32,
    };
    // SAFETY: every view is all of its own buffer.
    let kernel = unsafe { gpu.call(&args, ffi::ett_nearest_workspace, ffi::ett_nearest) }?;
    check("nearest, codes", &kernel, &chosen(&host(&idx)?)?, &best)?;
    check("nearest, scores", &kernel, &wide(host(&score)?), &best)?;

    let [smax, rest_p, rest_q, xbar] = [row()?, row()?, row()?, row()?];
    let args = ffi::ett_ibq_rows_args {
        z: z_view,
        e: e_view,
        idx: view(&idx, ffi::ETT_I32, &[m]),
        smax: view(&smax, ffi::ETT_F32, &[m]),
        rest_p: view(&rest_p, ffi::ETT_F32, &[m]),
        rest_q: view(&rest_q, ffi::ETT_F32, &[m]),
        xbar: view(&xbar, ffi::ETT_F32, &[m]),
        bad: view(&bad, ffi::ETT_F32, &[1]),
        temperature: TEMPERATURE,
    };
    // SAFETY: as above.
    let kernel = unsafe { gpu.call(&args, ffi::ett_ibq_rows_workspace, ffi::ett_ibq_rows) }?;
    // Sums over all codes but the best one.
    let rest = |f: &dyn Fn(f64) -> f64| -> Vec<f64> {
        scores.iter().zip(&best).map(|(row, t)| row.iter().map(|s| f(s - t)).sum::<f64>() - f(0.0)).collect()
    };
    let q = |x: f64| (x / TEMPERATURE).exp();
    let sum_q = rest(&q);
    let sum_qx = rest(&|x| q(x) * x / TEMPERATURE);
    let mean: Vec<f64> = sum_qx.iter().zip(&sum_q).map(|(qx, rest)| qx / (1.0 + rest)).collect();
    check("ibq_rows, codes", &kernel, &chosen(&host(&idx)?)?, &best)?;
    check("ibq_rows, best scores", &kernel, &wide(host(&smax)?), &best)?;
    check("ibq_rows, rest of the softmax", &kernel, &wide(host(&rest_p)?), &rest(&f64::exp))?;
    check("ibq_rows, rest at a temperature", &kernel, &wide(host(&rest_q)?), &sum_q)?;
    check("ibq_rows, mean of x", &kernel, &wide(host(&xbar)?), &mean)?;
    check("rows without a finite score, plus one", &kernel, &[1.0 + wide(host(&bad)?)[0]], &[1.0])
}
