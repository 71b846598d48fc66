//! Shapes of up to four dimensions, by value.

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

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.as_slice().iter().product()
    }

    /// The last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.as_slice().last().copied().unwrap_or(1)
    }

    /// The product of all dimensions but the last; 1 for vectors and scalars.
    pub fn rows(&self) -> usize {
        let s = self.as_slice();
        s[..s.len().saturating_sub(1)].iter().product()
    }
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
