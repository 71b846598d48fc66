//! Shapes of up to four dimensions, by value.

use super::DType;

/// A shape; images are `[B, H, W, C]`, everything else ends in its channel dimension.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    n: u8,
    d: [usize; 4],
}

impl Dims {
    /// Number of dimensions, 0 to 4.
    pub fn rank(&self) -> usize {
        self.n as usize
    }

    /// The dimensions as a slice.
    pub fn as_slice(&self) -> &[usize] {
        &self.d[..self.n as usize]
    }

    /// Number of elements. It saturates at `usize::MAX`, since shapes may come from input; no tensor has that many (see
    /// [`Dims::bytes`]).
    pub fn numel(&self) -> usize {
        product(self.as_slice())
    }

    /// Bytes of a tensor of this shape; `None` if they exceed `isize::MAX`. Empty tensors are checked with 1 in place
    /// of every 0, so that the product of any dimensions of a tensor does not overflow.
    pub fn bytes(&self, dtype: DType) -> Option<usize> {
        let most = self.as_slice().iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d.max(1)))?;
        let empty = self.as_slice().contains(&0);
        (most <= isize::MAX as usize).then_some(if empty { 0 } else { most })
    }

    /// The last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.as_slice().last().copied().unwrap_or(1)
    }

    /// The product of all dimensions but the last; 1 for vectors and scalars. It saturates as [`Dims::numel`].
    pub fn rows(&self) -> usize {
        let s = self.as_slice();
        product(&s[..s.len().saturating_sub(1)])
    }
}

/// The product, saturating at `usize::MAX`; 0 if any dimension is 0.
fn product(dims: &[usize]) -> usize {
    if dims.contains(&0) { 0 } else { dims.iter().fold(1, |n, &d| n.saturating_mul(d)) }
}

impl std::ops::Index<usize> for Dims {
    type Output = usize;
    fn index(&self, i: usize) -> &usize {
        &self.as_slice()[i]
    }
}

impl<const N: usize> From<[usize; N]> for Dims {
    fn from(a: [usize; N]) -> Self {
        const { assert!(N <= 4, "a tensor has at most four dimensions") };
        let mut d = [1; 4];
        d[..N].copy_from_slice(&a);
        Dims { n: N as u8, d }
    }
}

impl Dims {
    /// A shape from a slice; `None` above four dimensions.
    pub fn from_slice(s: &[usize]) -> Option<Self> {
        if s.len() > 4 {
            return None;
        }
        let mut d = [1; 4];
        d[..s.len()].copy_from_slice(s);
        Some(Dims { n: s.len() as u8, d })
    }
}

impl std::fmt::Debug for Dims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.as_slice())
    }
}

impl std::fmt::Display for Dims {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_do_not_wrap() {
        // Wrapping products of these are 0 or small.
        for dims in [[1 << 60, 4, 4, 4], [1 << 63, 2, 1, 1], [(1 << 63) + 1, 2, 1, 3], [usize::MAX; 4]] {
            let d = Dims::from(dims);
            assert_eq!((d.numel(), d.bytes(DType::F32)), (usize::MAX, None), "{d}");
        }
        assert_eq!(Dims::from([1 << 60, 4]).bytes(DType::F32), None);
        assert_eq!(Dims::from([1 << 60, 4]).bytes(DType::Bf16), None);
        assert_eq!(Dims::from([1 << 58, 4]).bytes(DType::F32), Some(1 << 62));
        let empty = Dims::from([1 << 60, 0, 1 << 60, 4]);
        assert_eq!((empty.numel(), empty.rows(), empty.bytes(DType::F32)), (0, 0, None));
        assert_eq!(Dims::from([3, 0, 5]).bytes(DType::F64), Some(0));
        assert_eq!(Dims::from([3, 5]).bytes(DType::F64), Some(120));
        assert_eq!(Dims::from([]).bytes(DType::F64), Some(8));
    }
}
