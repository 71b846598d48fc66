//! Sums and maxima over a row in a fixed number of lanes, so that the loops vectorise and the order of additions
//! depends only on the length.

use super::Real;

const LANES: usize = 16;

#[inline(always)]
fn join<R: Copy>(mut lanes: [R; LANES], f: impl Fn(R, R) -> R) -> R {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] = f(lanes[i], lanes[i + n]);
        }
        n /= 2;
    }
    lanes[0]
}

/// Sum of `f(a)`.
#[inline(always)]
pub(crate) fn sum<A: Copy, R: Real>(a: &[A], f: impl Fn(A) -> R) -> R {
    let mut s = [R::zero(); LANES];
    let (full, rest) = a.as_chunks::<LANES>();
    for a in full {
        for i in 0..LANES {
            s[i] += f(a[i]);
        }
    }
    for (s, &a) in s.iter_mut().zip(rest) {
        *s += f(a);
    }
    join(s, |a, b| a + b)
}

/// Sum of `f(a, b)`.
#[inline(always)]
pub(crate) fn sum2<A: Copy, B: Copy, R: Real>(a: &[A], b: &[B], f: impl Fn(A, B) -> R) -> R {
    let mut s = [R::zero(); LANES];
    let ((full_a, rest_a), (full_b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in full_a.iter().zip(full_b) {
        for i in 0..LANES {
            s[i] += f(a[i], b[i]);
        }
    }
    for ((s, &a), &b) in s.iter_mut().zip(rest_a).zip(rest_b) {
        *s += f(a, b);
    }
    join(s, |a, b| a + b)
}

/// Sum of `f(a, b, c)`.
#[inline(always)]
pub(crate) fn sum3<A: Copy, B: Copy, C: Copy, R: Real>(
    a: &[A],
    b: &[B],
    c: &[C],
    f: impl Fn(A, B, C) -> R,
) -> R {
    let mut s = [R::zero(); LANES];
    let ((full_a, rest_a), (full_b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (full_c, rest_c) = c.as_chunks::<LANES>();
    for ((a, b), c) in full_a.iter().zip(full_b).zip(full_c) {
        for i in 0..LANES {
            s[i] += f(a[i], b[i], c[i]);
        }
    }
    for (((s, &a), &b), &c) in s.iter_mut().zip(rest_a).zip(rest_b).zip(rest_c) {
        *s += f(a, b, c);
    }
    join(s, |a, b| a + b)
}

/// The maximum, ignoring NaN; -inf for an empty row.
#[inline(always)]
pub(crate) fn max<R: Real>(x: &[R]) -> R {
    let larger = |a: R, b: R| if b > a { b } else { a };
    let mut m = [R::neg_infinity(); LANES];
    let (full, rest) = x.as_chunks::<LANES>();
    for x in full {
        for i in 0..LANES {
            m[i] = larger(m[i], x[i]);
        }
    }
    for (m, &x) in m.iter_mut().zip(rest) {
        *m = larger(*m, x);
    }
    join(m, larger)
}

/// `x = exp(x - shift)` in place; returns the sum.
#[inline(always)]
pub(crate) fn exp_sum<R: Real>(x: &mut [R], shift: R) -> R {
    let mut s = [R::zero(); LANES];
    let (full, rest) = x.as_chunks_mut::<LANES>();
    for x in full {
        for i in 0..LANES {
            x[i] = (x[i] - shift).fast_exp();
            s[i] += x[i];
        }
    }
    for (s, x) in s.iter_mut().zip(rest) {
        *x = (*x - shift).fast_exp();
        *s += *x;
    }
    join(s, |a, b| a + b)
}
