//! Matrix products with the `gemm` crate, one thread per call. Parallel products are split into fixed blocks of rows,
//! so that the bits do not depend on the number of threads.

use super::{Real, dot, simd};

/// A matrix in a slice, with any strides.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, R> {
    data: &'a [R],
    rows: usize,
    cols: usize,
    rs: usize,
    cs: usize,
}

impl<'a, R> Mat<'a, R> {
    /// Row-major `[rows, cols]`, rows `ld` apart.
    pub(crate) fn new(data: &'a [R], rows: usize, cols: usize, ld: usize) -> Self {
        assert!(rows == 0 || cols == 0 || data.len() >= (rows - 1) * ld + cols, "matrix exceeds its slice");
        Mat { data, rows, cols, rs: ld, cs: 1 }
    }

    /// Number of columns.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The transpose.
    pub(crate) fn t(self) -> Self {
        Mat { rows: self.cols, cols: self.rows, rs: self.cs, cs: self.rs, ..self }
    }

    /// Rows `start..start + n`.
    pub(crate) fn rows(self, start: usize, n: usize) -> Self {
        assert!(start + n <= self.rows);
        let data = if n == 0 || self.cols == 0 { &self.data[..0] } else { &self.data[start * self.rs..] };
        Mat { data, rows: n, ..self }
    }
}

/// Number of columns up to which products are computed as dot products, since `gemm` would leave most of a vector idle.
pub(crate) const FEW: usize = 4;

/// A product with few columns: dot products of rows of `a` with columns of `b`, both contiguous.
fn few_columns<R: Real>(a: Mat<R>, b: Mat<R>, c: &mut [R], ldc: usize, accumulate: bool) {
    simd(
        #[inline(always)]
        || {
            for (i, c) in c.chunks_mut(ldc).take(a.rows).enumerate() {
                let row = &a.data[i * a.rs..i * a.rs + a.cols];
                for (j, c) in c[..b.cols].iter_mut().enumerate() {
                    let sum = dot(row, &b.data[j * b.cs..j * b.cs + b.rows]);
                    *c = if accumulate { *c + sum } else { sum };
                }
            }
        },
    );
}

/// `c = a b`, or `c += a b`; `c` is row-major with `ldc` elements between rows. One thread.
pub(crate) fn gemm<R: Real>(a: Mat<R>, b: Mat<R>, c: &mut [R], ldc: usize, accumulate: bool) {
    assert_eq!(a.cols, b.rows, "inner dimensions differ");
    let (m, n, k) = (a.rows, b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!(c.len() >= (m - 1) * ldc + n && ldc >= n, "product exceeds its slice");
    if k == 0 {
        if !accumulate {
            c.chunks_mut(ldc).take(m).for_each(|r| r[..n].fill(R::zero()));
        }
        return;
    }
    if n <= FEW && a.cs == 1 && b.rs == 1 {
        return few_columns(a, b, c, ldc, accumulate);
    }
    // SAFETY: these extents and strides stay inside the slices, as asserted here and in `Mat`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            ldc as isize,
            accumulate,
            a.data.as_ptr(),
            a.cs as isize,
            a.rs as isize,
            b.data.as_ptr(),
            b.cs as isize,
            b.rs as isize,
            R::one(),
            R::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Rows of one block of a parallel product. Every block reads all of `b`, so blocks have at least 64 rows if that
/// leaves at least two blocks.
pub(super) fn block_rows(m: usize) -> usize {
    m.div_ceil(32).clamp(64, 512).min(m.div_ceil(2).max(16)).next_multiple_of(8)
}
