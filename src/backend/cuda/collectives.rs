//! Collectives of a GPU: NCCL's, on the stream of the peers.

use super::device::Cuda;
use super::nccl::{self, Line};
use super::peers::{Peers, Use};
use crate::backend::*;
use crate::error::{Error, Result};

impl Cuda {
    /// Checks that `s` can run a collective.
    fn check_stream(&self, op: &'static str, s: Stream) -> Result<()> {
        if s != Stream::COMPUTE && s != Stream::PEERS {
            return Err(Error::arg(op, "stream", s.0, "the compute stream or that of the peers"));
        }
        self.takes_part(op, s)
    }

    /// Enqueues a collective that sends `sent` bytes from each rank. On the compute stream, it runs after all that was
    /// enqueued there, and before all that will be.
    fn collective(
        &self,
        peers: &Peers,
        how: Use,
        op: &'static str,
        s: Stream,
        sent: u64,
        enqueue: impl FnOnce(Line) -> nccl::Result<()>,
    ) -> Result<()> {
        let gpu = &self.gpu;
        let fail = |e| gpu.error(op, e);
        gpu.context.bind_to_thread().map_err(fail)?;
        let joins = s == Stream::COMPUTE;
        let profiler = self.profiler.get().filter(|_| joins);
        let start = profiler.map(|p| p.event(gpu)).transpose().map_err(fail)?;
        if let Some(start) = &start {
            start.record(&gpu.compute).map_err(fail)?;
        }
        if joins {
            peers.stream.join(&gpu.compute).map_err(fail)?;
        }
        peers.enqueue(how, enqueue).map_err(|why| Error::device(&gpu.name, why))?;
        if joins {
            gpu.compute.join(&peers.stream).map_err(fail)?;
        }
        if let Some((profiler, start)) = profiler.zip(start) {
            profiler.end(gpu, start, (op, "nccl"), Cost { flop: 0, bytes: sent }).map_err(fail)?;
        }
        match self.sync && !gpu.is_recording() {
            true => gpu.drain(&peers.stream, &format!("{op} (nccl) failed")),
            false => Ok(()),
        }
    }
}

/// The bytes that a rank sends in a ring when parts of `bytes` bytes in all go once around it.
fn around(bytes: u64, ranks: usize) -> u64 {
    bytes - bytes / ranks.max(1) as u64
}

/// Sums on the stream of the peers are those of gradients, while the backward pass goes on. Gathers are those of updated
/// weights, for which the next step waits.
fn sums(s: Stream) -> Use {
    if s == Stream::PEERS { Use::Beside } else { Use::Alone }
}

/// One GPU is one rank.
impl Collectives for Cuda {
    fn ranks(&self) -> usize {
        self.gpu.peers.as_ref().map_or(1, |peers| peers.group.ranks())
    }

    fn rank(&self) -> usize {
        self.gpu.peers.as_ref().map_or(0, |peers| peers.group.rank())
    }

    fn all_reduce(&self, s: Stream, x: Acc, how: Reduction) -> Result<()> {
        const OP: &str = "all_reduce";
        self.check_stream(OP, s)?;
        check::view(self.gpu.id, OP, "x", &x.0)?;
        if !x.0.is_contiguous() {
            return Err(Error::arg(OP, "x", format!("strided by {}", x.0.ld), "contiguous"));
        }
        let (at, n, dtype) = (x.0.addr(), x.0.dims.numel(), x.0.dtype);
        if how == Reduction::Mean && matches!(dtype, DType::I32 | DType::U8) {
            return Err(Error::arg(OP, "x", dtype, "a float type, since a mean of integers is rounded"));
        }
        let Some(peers) = self.gpu.peers.as_ref().filter(|_| n > 0) else { return Ok(()) };
        self.collective(peers, sums(s), OP, s, 2 * around(x.0.bytes(), self.ranks()), |line| {
            // SAFETY: the view was checked, and memory goes back to the driver after the work of all streams.
            unsafe { line.all_reduce(at, n, dtype, how) }
        })
    }

    fn reduce_scatter(&self, s: Stream, x: In, y: Out) -> Result<()> {
        const OP: &str = "reduce_scatter";
        self.check_stream(OP, s)?;
        let (rank, ranks) = (self.rank(), self.ranks());
        let own = check::parts(self.gpu.id, OP, ("y", &y.0), ("x", &x), rank, ranks)?;
        let Some(peers) = &self.gpu.peers else { return if own { Ok(()) } else { self.copy(s, x, y) } };
        let (from, to, n, dtype) = (x.addr(), y.0.addr(), y.0.dims.numel(), x.dtype);
        if n == 0 {
            return Ok(());
        }
        self.collective(peers, sums(s), OP, s, around(x.bytes(), ranks), |line| {
            // SAFETY: the views were checked, as above.
            unsafe { line.reduce_scatter(from, to, n, dtype) }
        })
    }

    fn all_gather(&self, s: Stream, x: In, y: Out) -> Result<()> {
        const OP: &str = "all_gather";
        self.check_stream(OP, s)?;
        let (rank, ranks) = (self.rank(), self.ranks());
        let own = check::parts(self.gpu.id, OP, ("x", &x), ("y", &y.0), rank, ranks)?;
        let Some(peers) = &self.gpu.peers else { return if own { Ok(()) } else { self.copy(s, x, y) } };
        let (from, to, n, dtype) = (x.addr(), y.0.addr(), x.dims.numel(), x.dtype);
        if n == 0 {
            return Ok(());
        }
        self.collective(peers, Use::Alone, OP, s, around(y.0.bytes(), ranks), |line| {
            // SAFETY: the views were checked, as above.
            unsafe { line.all_gather(from, to, n, dtype) }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::around;

    #[test]
    fn a_rank_sends_all_parts_but_one() {
        assert_eq!([1, 2, 4].map(|ranks| around(4096, ranks)), [0, 2048, 3072]);
    }
}
