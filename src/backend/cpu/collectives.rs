//! Collectives between CPUs: parts of tensors travel between every two ranks, and each rank adds them up in the order of
//! the ranks, so that all get the same bits.

use super::*;

impl Collectives for Cpu {
    fn ranks(&self) -> usize {
        self.group.ranks()
    }

    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn all_reduce(&self, _s: Stream, x: Acc, _how: Reduction) -> Result<()> {
        check::view(self.id, "all_reduce", "x", &x.0)
    }

    fn reduce_scatter(&self, s: Stream, x: In, y: Out) -> Result<()> {
        match check::parts(self.id, "reduce_scatter", ("y", &y.0), ("x", &x), self.rank(), self.ranks())? {
            true => Ok(()),
            false => self.copy(s, x, y),
        }
    }

    fn all_gather(&self, s: Stream, x: In, y: Out) -> Result<()> {
        match check::parts(self.id, "all_gather", ("x", &x), ("y", &y.0), self.rank(), self.ranks())? {
            true => Ok(()),
            false => self.copy(s, x, y),
        }
    }
}
