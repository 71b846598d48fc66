//! Conversion of the contract's views to slices, the only place where CPU kernels dereference addresses, and the fixed
//! chunks of all parallel loops with the sums over them.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use rayon::prelude::*;

use super::workspace::{acc_size, block, is_narrow, per_thread};
use super::{Elem, PerThread, Real, Scratch, Workspace};
use crate::backend::{DType, Element, In, check};
use crate::error::{Error, Result};

/// Runs `$body` with `$t` as the Rust type of a float dtype.
macro_rules! by_dtype {
    ($op:expr, $dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::backend::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::backend::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::backend::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            other @ ($crate::backend::DType::I32 | $crate::backend::DType::U8) => {
                Err($crate::error::Error::arg($op, "dtype", other, "a float type"))
            }
        }
    };
}
pub(crate) use by_dtype;

fn check_dtype(op: &'static str, arg: &'static str, v: &In, want: DType) -> Result<()> {
    if v.dtype != want {
        return Err(Error::arg(op, arg, v.dtype, want));
    }
    Ok(())
}

fn check_flat(op: &'static str, arg: &'static str, v: &In) -> Result<()> {
    check::extent(op, arg, v)?;
    if !v.is_contiguous() {
        return Err(Error::arg(op, arg, format!("strided by {}", v.ld), "contiguous"));
    }
    Ok(())
}

/// A contiguous input.
pub(crate) fn flat<'a, T: Element>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<&'a [T]> {
    check_dtype(op, arg, v, T::DTYPE)?;
    check_flat(op, arg, v)?;
    // SAFETY: checked above; the element type is the view's.
    Ok(unsafe { slice(v, v.dims.numel()) })
}

/// A contiguous output.
#[allow(clippy::mut_from_ref)]
pub(crate) fn flat_mut<'a, T: Element>(
    op: &'static str,
    arg: &'static str,
    v: &In<'a>,
) -> Result<&'a mut [T]> {
    check_dtype(op, arg, v, T::DTYPE)?;
    check_flat(op, arg, v)?;
    // SAFETY: as in `flat`.
    Ok(unsafe { slice_mut(v, v.dims.numel()) })
}

/// The bytes of a contiguous view of any type.
pub(crate) fn bytes<'a>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<&'a [u8]> {
    check_flat(op, arg, v)?;
    // SAFETY: checked above; every element type can be read as bytes.
    Ok(unsafe { slice(v, v.bytes() as usize) })
}

/// The bytes of a contiguous view of any type, mutably.
#[allow(clippy::mut_from_ref)]
pub(crate) fn bytes_mut<'a>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<&'a mut [u8]> {
    check_flat(op, arg, v)?;
    // SAFETY: as in `bytes`; any bytes are valid values of every element type.
    Ok(unsafe { slice_mut(v, v.bytes() as usize) })
}

/// A copy of the bytes of a view of any type, row by row without gaps.
pub(crate) fn packed(op: &'static str, arg: &'static str, v: &In) -> Result<Vec<u8>> {
    fn all<T: Element>(op: &'static str, arg: &'static str, v: &In) -> Result<Vec<u8>> {
        let x = rows::<T>(op, arg, v)?;
        let mut bytes = Vec::with_capacity(v.bytes() as usize);
        (0..x.rows).for_each(|r| bytes.extend_from_slice(bytemuck::cast_slice(x.row(r))));
        Ok(bytes)
    }
    match v.dtype {
        DType::F64 => all::<f64>(op, arg, v),
        DType::F32 => all::<f32>(op, arg, v),
        DType::Bf16 => all::<half::bf16>(op, arg, v),
        DType::I32 => all::<i32>(op, arg, v),
        DType::U8 => all::<u8>(op, arg, v),
    }
}

/// The first `n` elements from the start of a view, in memory order.
///
/// # Safety
/// They lie inside the view's buffer and start at a multiple of their size.
unsafe fn slice<'a, T: bytemuck::Pod>(v: &In<'a>, n: usize) -> &'a [T] {
    if n == 0 {
        return &[];
    }
    // SAFETY: the caller guarantees that the elements are inside the buffer and aligned. A buffer is initialised when
    // it is allocated, and lives for 'a. The device runs one call at a time (`Cpu::turn`), so that no other call writes
    // to them now, and the contract forbids views of one call to overlap if one of them is written.
    unsafe { std::slice::from_raw_parts(v.addr() as *const T, n) }
}

/// As [`slice`], mutably.
///
/// # Safety
/// As for [`slice`].
#[allow(clippy::mut_from_ref)]
unsafe fn slice_mut<'a, T: bytemuck::Pod>(v: &In<'a>, n: usize) -> &'a mut [T] {
    if n == 0 {
        return &mut [];
    }
    // SAFETY: as in `slice`; the contract also forbids outputs of one call to overlap.
    unsafe { std::slice::from_raw_parts_mut(v.addr() as *mut T, n) }
}

/// A strided input as a matrix `[rows, cols]`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) ld: usize,
    data: &'a [T],
}

impl<'a, T> Rows<'a, T> {
    /// A slice as rows of `cols` elements.
    pub(crate) fn of(data: &'a [T], cols: usize) -> Self {
        Rows { rows: data.len().checked_div(cols).unwrap_or(0), cols, ld: cols, data }
    }
    /// Row `i`.
    pub(crate) fn row(&self, i: usize) -> &'a [T] {
        &self.data[i * self.ld..i * self.ld + self.cols]
    }
    /// The elements from the first to the last, including gaps.
    pub(crate) fn data(&self) -> &'a [T] {
        self.data
    }
}

impl<'a, T: Elem> Rows<'a, T> {
    /// The same memory as the accumulator type, which must be the stored type.
    fn cast(self) -> Rows<'a, T::Acc> {
        Rows { rows: self.rows, cols: self.cols, ld: self.ld, data: bytemuck::cast_slice(self.data) }
    }
}

/// A strided output as a matrix `[rows, cols]`, whose rows can be written by several threads.
#[derive(Clone, Copy)]
pub(crate) struct RowsMut<'a, T> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) ld: usize,
    at: *mut T,
    of: PhantomData<&'a mut [T]>,
}

// SAFETY: it represents a `&mut [T]`, whose parts may be used on any thread if `T` is `Send`.
unsafe impl<T: Send> Send for RowsMut<'_, T> {}
// SAFETY: a shared reference gives access to parts only through unsafe functions, whose callers guarantee that no two
// threads have the same part.
unsafe impl<T: Send> Sync for RowsMut<'_, T> {}

impl<'a, T> RowsMut<'a, T> {
    /// Row `i`.
    ///
    /// # Safety
    /// `i < rows`, and no other slice of the row is alive: each row belongs to one thread of a loop.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn row(&self, i: usize) -> &'a mut [T] {
        debug_assert!(i < self.rows);
        // SAFETY: `rows_mut` checked that all rows are aligned and inside the buffer. The caller guarantees that the
        // slice is unique within this call; for other calls see `slice_mut`.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(i * self.ld), self.cols) }
    }

    /// Columns `cols` of row `i`.
    ///
    /// # Safety
    /// `i < rows`, `cols` is within the columns, and no other slice of these elements is alive: each pair of a row and
    /// a range of columns belongs to one thread of a loop.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, i: usize, cols: Range<usize>) -> &'a mut [T] {
        debug_assert!(i < self.rows && cols.end <= self.cols);
        // SAFETY: as in `row`.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(i * self.ld + cols.start), cols.len()) }
    }

    /// Rows `r` of a contiguous output.
    ///
    /// # Safety
    /// The output is contiguous; otherwise as for [`RowsMut::row`].
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn block(&self, r: Range<usize>) -> &'a mut [T] {
        debug_assert!(self.ld == self.cols && r.end <= self.rows);
        // SAFETY: as in `row`.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(r.start * self.cols), r.len() * self.cols) }
    }
}

/// A strided input.
pub(crate) fn rows<'a, T: Element>(op: &'static str, arg: &'static str, v: &In<'a>) -> Result<Rows<'a, T>> {
    check_dtype(op, arg, v, T::DTYPE)?;
    check::extent(op, arg, v)?;
    let (rows, cols) = (v.dims.rows(), v.dims.cols());
    let ld = stride(v);
    let n = if rows == 0 { 0 } else { (rows - 1) * ld + cols };
    // SAFETY: the checks above include the last element that the stride reaches.
    let data = unsafe { slice(v, n) };
    Ok(Rows { rows, cols, ld, data })
}

/// A strided output.
pub(crate) fn rows_mut<'a, T: Element>(
    op: &'static str,
    arg: &'static str,
    v: &In<'a>,
) -> Result<RowsMut<'a, T>> {
    check_dtype(op, arg, v, T::DTYPE)?;
    check::extent(op, arg, v)?;
    let (rows, cols) = (v.dims.rows(), v.dims.cols());
    let at = if rows * cols == 0 { NonNull::dangling().as_ptr() } else { v.addr() as *mut T };
    Ok(RowsMut { rows, cols, ld: stride(v), at, of: PhantomData })
}

/// The row stride in elements; the number of columns if the view's own stride is not used.
fn stride(v: &In) -> usize {
    if v.dims.rows() <= 1 || v.dims.cols() == 0 { v.dims.cols() } else { v.ld as usize }
}

/// A one-element input.
pub(crate) fn scalar<T: Element>(op: &'static str, arg: &'static str, v: &In) -> Result<T> {
    Ok(flat::<T>(op, arg, v)?[0])
}

/// The dimensions `[B, H, W, C]` of an image.
pub(crate) fn image(op: &'static str, arg: &'static str, v: &In) -> Result<[usize; 4]> {
    v.dims.as_slice().try_into().map_err(|_| Error::arg(op, arg, v.dims, "four dimensions"))
}

/// Runs `f` compiled for the vector instructions of this machine. The loops in `f` must be inlined into it. Results are
/// bitwise those of scalar code, since Rust does not fuse multiplications and additions.
#[inline(always)]
pub(crate) fn simd<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// The dot product, as interleaved sums in a fixed order that vectorises.
#[inline(always)]
pub(crate) fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    const LANES: usize = 32;
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let mut rest = R::zero();
    for (a, b) in a.remainder().iter().zip(b.remainder()) {
        rest += *a * *b;
    }
    let mut lanes = [R::zero(); LANES];
    for (a, b) in a.zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    rest + tree(lanes)
}

/// The sum, in the order of [`dot`].
#[inline(always)]
pub(crate) fn sum<R: Real>(a: &[R]) -> R {
    const LANES: usize = 32;
    let a = a.chunks_exact(LANES);
    let mut rest = R::zero();
    for a in a.remainder() {
        rest += *a;
    }
    let mut lanes = [R::zero(); LANES];
    for a in a {
        for i in 0..LANES {
            lanes[i] += a[i];
        }
    }
    rest + tree(lanes)
}

#[inline(always)]
fn tree<R: Real>(lanes: [R; 32]) -> R {
    // Forces the lanes through memory. Otherwise the compiler vectorises the loops above by two, to match the pairs
    // that are added below.
    let mut lanes = std::hint::black_box(lanes);
    for half in [16, 8, 4, 2, 1] {
        for i in 0..half {
            let other = lanes[i + half];
            lanes[i] += other;
        }
    }
    lanes[0]
}

/// Elements of one chunk of an element-wise loop.
pub(crate) const CHUNK: usize = 16 << 10;

/// Rows of one chunk of a row-wise loop.
pub(crate) fn chunk_rows(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

/// Whether `T` is its own accumulator type.
pub(crate) fn is_acc<T: Elem>() -> bool {
    T::DTYPE == T::Acc::DTYPE
}

/// Runs `f` on every row, in parallel chunks of rows.
pub(crate) fn par_rows(rows: usize, cols: usize, f: impl Fn(usize) + Sync) {
    par_for(rows, chunk_rows(cols), |r| {
        simd(
            #[inline(always)]
            || r.for_each(&f),
        )
    });
}

/// Converts to the accumulator type.
#[inline(always)]
pub(crate) fn widen<T: Elem>(x: &[T], y: &mut [T::Acc]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.up();
    }
}

/// Rounds from the accumulator type.
#[inline(always)]
pub(crate) fn round<T: Elem>(x: &[T::Acc], y: &mut [T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = T::down(*x);
    }
}

/// Lets tasks write outputs in the accumulator type: in place if this is the stored type, otherwise in scratch that is
/// then rounded into the output.
pub(crate) struct Rounded<'w, T: Elem>(Option<PerThread<'w, T::Acc, 1>>);

impl<'w, T: Elem> Rounded<'w, T> {
    /// For `tasks` tasks that write at most `n` elements each.
    pub(crate) fn new(ws: &'w Workspace, tasks: usize, n: usize) -> Result<Self> {
        if is_acc::<T>() { Ok(Rounded(None)) } else { ws.per_thread(tasks, [n]).map(|s| Rounded(Some(s))) }
    }

    /// Runs `f` on `y`.
    pub(crate) fn write(&self, y: &mut [T], f: impl FnOnce(&mut [T::Acc])) {
        let Some(scratch) = &self.0 else { return f(bytemuck::cast_slice_mut(y)) };
        let mut local = scratch.take();
        let [s] = local.parts();
        let s = &mut s[..y.len()];
        f(s);
        simd(
            #[inline(always)]
            || round(s, y),
        );
    }
}

/// Bytes of [`Rounded::new`].
pub(crate) fn rounded_bytes(dtype: DType, threads: usize, tasks: usize, n: usize) -> usize {
    if is_narrow(dtype) { per_thread(threads, acc_size(dtype), tasks, [n]) } else { 0 }
}

/// Runs `f` on fixed blocks of rows of an output, each as a contiguous slice: in place if the output is contiguous,
/// otherwise in scratch that is then copied to the output. With `keep`, the scratch starts with the values of the
/// output.
pub(crate) fn par_row_blocks<T: Element>(
    ws: &Workspace,
    y: RowsMut<T>,
    block: usize,
    keep: bool,
    f: impl Fn(Range<usize>, &mut [T]) + Sync,
) -> Result<()> {
    if y.ld == y.cols {
        par_for(y.rows, block, |r| {
            // SAFETY: the output is contiguous, and chunks do not share rows.
            let rows = unsafe { y.block(r.clone()) };
            f(r, rows);
        });
        return Ok(());
    }
    let scratch = ws.per_thread::<T, 1>(y.rows.div_ceil(block), [block.min(y.rows) * y.cols])?;
    par_for(y.rows, block, |r| {
        let mut local = scratch.take();
        let [s] = local.parts();
        let s = &mut s[..r.len() * y.cols];
        // SAFETY: the rows of this chunk belong to this thread, and each slice ends before the next is created.
        let row = |i: usize| unsafe { y.row(r.start + i) };
        if keep && y.cols > 0 {
            s.chunks_mut(y.cols).enumerate().for_each(|(i, s)| s.copy_from_slice(row(i)));
        }
        f(r.clone(), s);
        if y.cols > 0 {
            s.chunks(y.cols).enumerate().for_each(|(i, s)| row(i).copy_from_slice(s));
        }
    });
    Ok(())
}

/// Bytes of [`par_row_blocks`].
pub(crate) fn row_blocks_bytes(y: &In, threads: usize, block: usize) -> usize {
    let rows = y.dims.rows();
    if y.is_contiguous() || block == 0 {
        return 0;
    }
    let n = block.min(rows).saturating_mul(y.dims.cols());
    per_thread(threads, y.dtype.size(), rows.div_ceil(block), [n])
}

/// Values in the accumulator type: borrowed where they are stored in it, else a widened copy.
pub(crate) enum Wide<'a, R: Real> {
    Borrowed(Rows<'a, R>),
    Owned(Scratch<'a, R>, usize, usize),
}

impl<'a, R: Real> Wide<'a, R> {
    /// Widens a strided input (the copy is contiguous), which takes [`super::workspace::wide`] bytes.
    pub(crate) fn new<E: Elem<Acc = R>>(ws: &'a Workspace, x: Rows<'a, E>) -> Result<Self> {
        if is_acc::<E>() {
            return Ok(Wide::Borrowed(x.cast()));
        }
        let mut s = ws.scratch::<R>(x.rows * x.cols)?;
        if x.cols > 0 {
            s.par_chunks_mut(x.cols).enumerate().with_min_len(64).for_each(|(i, out)| {
                for (o, &v) in out.iter_mut().zip(x.row(i)) {
                    *o = v.up();
                }
            });
        }
        Ok(Wide::Owned(s, x.rows, x.cols))
    }

    /// As rows.
    pub(crate) fn rows(&self) -> Rows<'_, R> {
        match self {
            Wide::Borrowed(r) => *r,
            Wide::Owned(s, rows, cols) => Rows { rows: *rows, cols: *cols, ld: *cols, data: s },
        }
    }
}

/// The fixed chunks of a loop over `n` items, which depend only on `n` and `size`.
pub(crate) fn chunks(n: usize, size: usize) -> Vec<Range<usize>> {
    let size = size.max(1);
    (0..n.div_ceil(size)).map(|i| i * size..((i + 1) * size).min(n)).collect()
}

/// Runs `f` on fixed chunks in parallel.
pub(crate) fn par_for(n: usize, size: usize, f: impl Fn(Range<usize>) + Sync + Send) {
    chunks(n, size).into_par_iter().for_each(f);
}

/// Sums `f` over fixed chunks, in their order.
pub(crate) fn par_sum<R: Real>(n: usize, size: usize, f: impl Fn(Range<usize>) -> R + Sync + Send) -> R {
    let parts: Vec<R> = chunks(n, size).into_par_iter().map(f).collect();
    parts.into_iter().fold(R::zero(), |a, b| a + b)
}

/// Number of chunks of [`par_reduce_rows`], at most 16.
pub(crate) fn reduce_chunks(rows: usize) -> usize {
    rows.div_ceil(reduce_chunk(rows))
}

fn reduce_chunk(rows: usize) -> usize {
    rows.div_ceil(16).max(64)
}

/// Adds to `out` a sum over rows. For each of at most 16 chunks of rows, `f` adds the sum over the chunk to a buffer of
/// zeros with the length of `out`; these partial sums are then added to `out` in order.
pub(crate) fn par_reduce_rows<R: Real>(
    ws: &Workspace,
    rows: usize,
    out: &mut [R],
    f: impl Fn(Range<usize>, &mut [R]) + Sync,
) -> Result<()> {
    let parts = chunks(rows, reduce_chunk(rows));
    let n = out.len();
    let mut partial = ws.scratch::<R>(parts.len() * n)?;
    partial.fill(R::zero());
    if n == 0 {
        return Ok(());
    }
    partial.par_chunks_mut(n).zip(parts.par_iter()).for_each(|(p, r)| f(r.clone(), p));
    for p in partial.chunks(n) {
        for (o, &v) in out.iter_mut().zip(p) {
            *o += v;
        }
    }
    Ok(())
}

/// Bytes of workspace of [`par_reduce_rows`] for `n` sums of `size` bytes each.
pub(crate) fn reduce_bytes(size: usize, rows: usize, n: usize) -> usize {
    block(size, reduce_chunks(rows).saturating_mul(n))
}
