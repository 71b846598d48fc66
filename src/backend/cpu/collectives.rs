//! Collectives between CPUs: parts of tensors travel between every two ranks, and each rank adds them up in the order of
//! the ranks, so that all get the same bits.
//!
//! A rank holds its own device's `turn` meanwhile, and waits for the other ranks, whose devices are others.

use super::*;

/// Bytes up to which every rank sends the whole of a tensor to all others: one exchange instead of two.
const WHOLE: usize = 32 << 10;
/// Elements of a part that are reduced at a time, which bounds the memory for those of the other ranks.
const RANGE: usize = 1 << 18;

impl Collectives for Cpu {
    fn ranks(&self) -> usize {
        self.group.ranks()
    }

    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn all_reduce(&self, _s: Stream, x: Acc, how: Reduction) -> Result<()> {
        check::view(self.id, "all_reduce", "x", &x.0)?;
        x.0.reshape("all_reduce", "x", x.0.dims)?;
        if self.ranks() == 1 {
            return Ok(());
        }
        let _turn = self.turn();
        match (x.0.dtype, how) {
            (DType::F64, _) => self.reduce_all::<f64>(&x.0, how),
            (DType::F32, _) => self.reduce_all::<f32>(&x.0, how),
            (DType::I32, Reduction::Sum) => self.reduce_all::<i32>(&x.0, how),
            (other, _) => Err(Error::arg("all_reduce", "x", other, "f32 or f64, or i32 for the sum")),
        }
    }

    fn reduce_scatter(&self, s: Stream, x: In, y: Out) -> Result<()> {
        let in_place =
            check::parts(self.id, "reduce_scatter", ("y", &y.0), ("x", &x), self.rank(), self.ranks())?;
        if self.ranks() == 1 {
            return if in_place { Ok(()) } else { self.copy(s, x, y) };
        }
        let _turn = self.turn();
        match x.dtype {
            DType::F64 => self.scatter::<f64>(&x, &y.0, in_place),
            DType::F32 => self.scatter::<f32>(&x, &y.0, in_place),
            DType::I32 => self.scatter::<i32>(&x, &y.0, in_place),
            other => Err(Error::arg("reduce_scatter", "x", other, "f32, f64 or i32")),
        }
    }

    fn all_gather(&self, s: Stream, x: In, y: Out) -> Result<()> {
        let in_place =
            check::parts(self.id, "all_gather", ("x", &x), ("y", &y.0), self.rank(), self.ranks())?;
        if self.ranks() == 1 {
            return if in_place { Ok(()) } else { self.copy(s, x, y) };
        }
        let _turn = self.turn();
        let n = x.bytes() as usize;
        let mut parts = split(bytes_mut("all_gather", "y", &y.0)?, vec![n; self.ranks()]);
        if !in_place {
            parts[self.rank()].copy_from_slice(bytes("all_gather", "x", &x)?);
        }
        self.gather(parts)
    }
}

impl Cpu {
    fn reduce_all<T: Term>(&self, x: &In, how: Reduction) -> Result<()> {
        let (x, ranks) = (flat_mut::<T>("all_reduce", "x", x)?, self.ranks());
        if size_of_val(x) <= WHOLE {
            return self.reduce(&vec![&*x.to_vec(); ranks], x, how);
        }
        let bound = |rank: usize| (x.len() as u128 * rank as u128 / ranks as u128) as usize;
        let lengths: Vec<usize> = (0..ranks).map(|r| bound(r + 1) - bound(r)).collect();
        let mut parts = split(x, lengths);
        let own = std::mem::take(&mut parts[self.rank()]);
        self.reduce(&parts.iter().map(|p| &**p).collect::<Vec<_>>(), own, how)?;
        parts[self.rank()] = own;
        self.gather(parts.into_iter().map(bytemuck::cast_slice_mut).collect())
    }

    /// `in_place`: `y` is this rank's part of `x`.
    fn scatter<T: Term>(&self, x: &In, y: &In, in_place: bool) -> Result<()> {
        let n = y.dims.numel();
        if n == 0 {
            return Ok(());
        }
        if in_place {
            let mut parts = split(flat_mut::<T>("reduce_scatter", "x", x)?, vec![n; self.ranks()]);
            let own = std::mem::take(&mut parts[self.rank()]);
            return self.reduce(&parts.iter().map(|p| &**p).collect::<Vec<_>>(), own, Reduction::Sum);
        }
        let parts: Vec<&[T]> = flat("reduce_scatter", "x", x)?.chunks_exact(n).collect();
        let y = flat_mut("reduce_scatter", "y", y)?;
        y.copy_from_slice(parts[self.rank()]);
        self.reduce(&parts, y, Reduction::Sum)
    }

    /// Sends `parts[r]` to rank r, and adds to `own` what all others send for it, of the same length. All ranks call this with
    /// parts of the same lengths, up to this rank's own, which is not used.
    fn reduce<T: Term>(&self, parts: &[&[T]], own: &mut [T], how: Reduction) -> Result<()> {
        let rank = self.rank();
        let longest = parts.iter().map(|p| p.len()).max().unwrap_or(0).max(own.len());
        for start in (0..longest).step_by(RANGE) {
            let range = |n: usize| start.min(n)..(start + RANGE).min(n);
            let own = {
                let range = range(own.len());
                &mut own[range]
            };
            let mut received: Vec<Vec<T>> =
                (0..parts.len()).map(|r| vec![T::zeroed(); if r == rank { 0 } else { own.len() }]).collect();
            let send: Vec<&[u8]> = parts.iter().map(|p| bytemuck::cast_slice(&p[range(p.len())])).collect();
            let mut receive: Vec<&mut [u8]> =
                received.iter_mut().map(|r| bytemuck::cast_slice_mut(&mut r[..])).collect();
            self.group.exchange(&send, &mut receive)?;
            add_up(own, rank, received);
            if how == Reduction::Mean {
                own.iter_mut().for_each(|v| *v = v.over(parts.len()));
            }
        }
        Ok(())
    }

    /// Sends this rank's own part to all others, and receives theirs.
    fn gather(&self, mut parts: Vec<&mut [u8]>) -> Result<()> {
        if parts.iter().all(|p| p.is_empty()) {
            return Ok(());
        }
        let own = std::mem::take(&mut parts[self.rank()]);
        self.group.exchange(&vec![&*own; parts.len()], &mut parts)
    }
}

/// Replaces `own`, the values of `rank`, by the sum over all ranks in their order.
fn add_up<T: Term>(own: &mut [T], rank: usize, mut of: Vec<Vec<T>>) {
    fn add<T: Term>(total: &mut [T], x: &[T]) {
        total.iter_mut().zip(x).for_each(|(total, x)| *total = total.plus(*x));
    }
    if rank == 0 {
        return of.iter().skip(1).for_each(|x| add(own, x));
    }
    let mut total = std::mem::take(&mut of[0]);
    of.iter().enumerate().skip(1).for_each(|(r, x)| add(&mut total, if r == rank { own } else { x }));
    own.copy_from_slice(&total);
}

/// Consecutive parts of a slice. The lengths add up to at most its own.
fn split<T>(mut x: &mut [T], lengths: Vec<usize>) -> Vec<&mut [T]> {
    let mut parts = Vec::with_capacity(lengths.len());
    for n in lengths {
        let (part, rest) = x.split_at_mut(n);
        parts.push(part);
        x = rest;
    }
    parts
}

/// Elements that ranks add up.
trait Term: Element {
    fn plus(self, other: Self) -> Self;
    /// Divided by a number of ranks.
    fn over(self, ranks: usize) -> Self;
}

impl Term for f64 {
    fn plus(self, other: f64) -> f64 {
        self + other
    }
    fn over(self, ranks: usize) -> f64 {
        self / ranks as f64
    }
}

impl Term for f32 {
    fn plus(self, other: f32) -> f32 {
        self + other
    }
    fn over(self, ranks: usize) -> f32 {
        self / ranks as f32
    }
}

impl Term for i32 {
    fn plus(self, other: i32) -> i32 {
        self.wrapping_add(other)
    }
    fn over(self, ranks: usize) -> i32 {
        self / ranks as i32
    }
}
