//! The comparator of all numerical tests: measures how far computed numbers are from expected ones. Failures are
//! sentences.

use crate::backend::DType;

/// Error bounds. Errors are Euclidean norms of differences, relative to the wanted values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// All values together.
    pub norm: f64,
    /// One row, relative to the larger of its own norm and the rms norm of all rows.
    pub row: f64,
    /// One value, relative to the larger of its own magnitude and the rms of all values.
    pub element: f64,
    /// Lower bound of the norm that errors are relative to, for values that are zero except for rounding.
    pub least: f64,
}

impl Bounds {
    /// The bounds for one kernel against an oracle on the same rounded inputs. They are a few times the rounding of
    /// each type (1.1e-16, 6e-8, 3.9e-3), with room for sums of a few thousand terms.
    pub const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F64 => Bounds { norm: 1e-12, row: 1e-11, element: 1e-10, least: 0.0 },
            DType::F32 => Bounds { norm: 2e-6, row: 1e-5, element: 1e-4, least: 0.0 },
            DType::Bf16 => Bounds { norm: 4e-3, row: 1e-2, element: 3e-2, least: 0.0 },
            DType::I32 | DType::U8 => Bounds { norm: 0.0, row: 0.0, element: 0.0, least: 0.0 },
        }
    }

    /// Bounds the norm of all values only.
    pub const fn norm(norm: f64) -> Self {
        Bounds { norm, row: f64::INFINITY, element: f64::INFINITY, least: 0.0 }
    }

    /// The same bounds, `factor` times as wide: for several kernels in a row or ill-conditioned ones.
    pub const fn times(self, factor: f64) -> Self {
        Bounds {
            norm: self.norm * factor,
            row: self.row * factor,
            element: self.element * factor,
            least: self.least,
        }
    }

    /// The same bounds with another `least`.
    pub const fn least(self, least: f64) -> Self {
        Bounds { least, ..self }
    }
}

/// Relative rounding error of a type: half the distance from 1 to the next larger number.
pub const fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON / 2.0,
        DType::F32 => f32::EPSILON as f64 / 2.0,
        DType::Bf16 => 1.0 / 256.0,
        DType::I32 | DType::U8 => 0.0,
    }
}

/// Measured errors, relative as in [`Bounds`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Errors {
    /// All values together.
    pub norm: f64,
    /// The worst row and its number.
    pub row: (f64, usize),
    /// The worst value and its index.
    pub element: (f64, usize),
}

fn square(v: f64) -> f64 {
    v * v
}

fn norm(v: impl Iterator<Item = f64>) -> f64 {
    v.map(square).sum::<f64>().sqrt()
}

/// `part / whole`, and 0 for 0 / 0.
fn ratio(part: f64, whole: f64) -> f64 {
    if part == 0.0 { 0.0 } else { part / whole }
}

/// Errors of `got` against `want`, in rows of `cols` values. Fails if the lengths differ or either side has
/// non-finite values.
pub fn errors(what: &str, got: &[f64], want: &[f64], cols: usize, least: f64) -> Result<Errors, String> {
    if got.len() != want.len() {
        return Err(format!("{what}: got {} values, wanted {}", got.len(), want.len()));
    }
    if cols == 0 || !got.len().is_multiple_of(cols) {
        return Err(format!("{what}: {} values cannot be cut into rows of {cols}", got.len()));
    }
    if let Some(i) = want.iter().position(|v| !v.is_finite()) {
        return Err(format!("{what}: the wanted value {i} is {}, wanted a finite one", want[i]));
    }
    if let Some(i) = got.iter().position(|v| !v.is_finite()) {
        let n = got.iter().filter(|v| !v.is_finite()).count();
        let (row, col) = (i / cols, i % cols);
        return Err(format!(
            "{what}: {n} of {} values are not finite, the first at row {row}, column {col}: {}, wanted {}",
            got.len(),
            got[i],
            want[i]
        ));
    }
    let difference = |i: usize| got[i] - want[i];
    let whole = norm(want.iter().copied()).max(least);
    let rms = whole / (want.len().max(1) as f64).sqrt();
    let rms_row = rms * (cols as f64).sqrt();
    let mut e =
        Errors { norm: ratio(norm((0..got.len()).map(difference)), whole), row: (0.0, 0), element: (0.0, 0) };
    for (r, row) in want.chunks(cols).enumerate() {
        let at = r * cols;
        let part = norm((at..at + cols).map(difference));
        let here = ratio(part, norm(row.iter().copied()).max(rms_row));
        if here > e.row.0 {
            e.row = (here, r);
        }
        for (c, w) in row.iter().enumerate() {
            let here = ratio(difference(at + c).abs(), w.abs().max(rms));
            if here > e.element.0 {
                e.element = (here, at + c);
            }
        }
    }
    Ok(e)
}

/// Fails unless `got` is `want` within `bounds`; rows are `cols` values long.
pub fn compare(what: &str, got: &[f64], want: &[f64], cols: usize, bounds: Bounds) -> Result<Errors, String> {
    let e = errors(what, got, want, cols, bounds.least)?;
    if e.norm > bounds.norm {
        let size = norm(want.iter().copied());
        return Err(format!(
            "{what}: off by {:.2e} of the norm {size:.3e}, at most {:.2e} is allowed; row {} is the worst",
            e.norm, bounds.norm, e.row.1
        ));
    }
    if e.row.0 > bounds.row {
        return Err(format!(
            "{what}: row {} is off by {:.2e}, at most {:.2e} is allowed",
            e.row.1, e.row.0, bounds.row
        ));
    }
    if e.element.0 > bounds.element {
        let (row, col) = (e.element.1 / cols, e.element.1 % cols);
        return Err(format!(
            "{what}: row {row}, column {col} is {:e}, wanted {:e}: off by {:.2e}, at most {:.2e} is allowed",
            got[e.element.1], want[e.element.1], e.element.0, bounds.element
        ));
    }
    Ok(e)
}

/// Fails if the error of `got` is more than twice that of `naive`, in norm or in the worst row. `naive` is the plain
/// computation on the same rounded inputs with one rounding per output. Errors below the rounding of `dtype`, the
/// type of the outputs, count as that rounding.
pub fn no_worse_than(
    what: &str,
    got: &[f64],
    naive: &[f64],
    want: &[f64],
    cols: usize,
    dtype: DType,
) -> Result<Errors, String> {
    let plain = errors(&format!("{what} (naive)"), naive, want, cols, 0.0)?;
    let e = errors(what, got, want, cols, 0.0)?;
    let floor = unit_roundoff(dtype);
    for (kind, ours, theirs) in [("norm", e.norm, plain.norm), ("worst row", e.row.0, plain.row.0)] {
        let limit = 2.0 * theirs.max(floor);
        if ours > limit {
            return Err(format!(
                "{what}: the {kind} is off by {ours:.2e}, at most {limit:.2e} is allowed, twice the naive computation"
            ));
        }
    }
    Ok(e)
}

/// Fails unless all indices are equal.
pub fn indices(what: &str, got: &[i32], want: &[i32]) -> Result<(), String> {
    if got.len() != want.len() {
        return Err(format!("{what}: got {} indices, wanted {}", got.len(), want.len()));
    }
    let wrong = got.iter().zip(want).filter(|(a, b)| a != b).count();
    match got.iter().zip(want).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(format!(
            "{what}: {wrong} of {} indices differ, the first at {i}: {}, wanted {}",
            got.len(),
            got[i],
            want[i]
        )),
    }
}

/// Fails unless the score of every chosen index is within `slack` of the best of its row; `scores` holds rows of
/// `cols` exact scores. For choices that rounding may change.
pub fn choices(what: &str, got: &[i32], scores: &[f64], cols: usize, slack: f64) -> Result<(), String> {
    if cols == 0 || scores.len() != got.len() * cols {
        return Err(format!("{what}: {} indices, but {} scores in rows of {cols}", got.len(), scores.len()));
    }
    for (i, (&j, row)) in got.iter().zip(scores.chunks(cols)).enumerate() {
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let Some(&score) = usize::try_from(j).ok().and_then(|j| row.get(j)) else {
            return Err(format!("{what}: index {i} is {j}, wanted one below {cols}"));
        };
        if score.is_nan() || best - score > slack {
            return Err(format!(
                "{what}: index {i} is {j} with score {score:e}, {:.2e} below the best, at most {slack:.2e} is allowed",
                best - score
            ));
        }
    }
    Ok(())
}
