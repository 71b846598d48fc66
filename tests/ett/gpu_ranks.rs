//! Collectives of several GPUs. Each rank is a thread: NCCL allows several in one process if each has a GPU of its own.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use ett::backend::cuda::Cuda;
use ett::backend::{Accumulate, Add, DType, Fill, Kernels, Reduction, Role, Stream, open_of};
use ett::error::{Error, Result};
use ett::ranks::Group;
use ett::tensor::Tensor;

use crate::common::{Outcome, gpu_turn, int, normal, tensor};

const S: Stream = Stream::COMPUTE;

/// One of the ranks of a test.
struct Rank {
    group: Arc<Group>,
    dev: Arc<dyn Kernels>,
    n: usize,
    r: usize,
}

/// The number of GPUs to test with; `None`, with a line, if there is only one.
fn several() -> Result<Option<usize>> {
    gpu_turn();
    let n = Cuda::count()?.min(4);
    if n < 2 {
        println!("skipped: this machine has {n} GPU, the test needs two");
    }
    Ok((n >= 2).then_some(n))
}

/// Calls `work` in a thread for each of `n` ranks, with GPU `gpu(r)`; returns their results. A rank that fails tells the
/// others.
fn on_ranks<T: Send>(
    n: usize,
    gpu: fn(usize) -> usize,
    work: impl Fn(&Rank) -> Result<T> + Sync,
) -> std::result::Result<Vec<Result<T>>, Box<dyn std::error::Error>> {
    let groups = Group::in_process(n, Duration::from_secs(60))?;
    let run = |r: usize, group: &Arc<Group>| {
        let worked = open_of(&format!("cuda:{}", gpu(r)), 0, group).and_then(|dev| {
            let rank = Rank { group: group.clone(), dev, n, r };
            // A device that is dropped waits for those of the other ranks, unless one has failed.
            work(&rank).inspect_err(|e| group.fail(&e.to_string()))
        });
        group.leave();
        worked
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            groups.iter().enumerate().map(|(r, group)| scope.spawn(move || run(r, group))).collect();
        threads.into_iter().map(|t| t.join().map_err(|_| "a rank panicked".into())).collect()
    })
}

/// The same on GPUs of their own, for work that succeeds.
fn all_ranks(n: usize, work: impl Fn(&Rank) -> Result<()> + Sync) -> Outcome {
    for result in on_ranks(n, |r| r, work)? {
        result?;
    }
    Ok(())
}

/// An error unless `ok`.
fn ensure(ok: bool, what: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::device("test", what())) }
}

/// A whole number below 7 in magnitude: sums over a few ranks are exact in bf16.
fn value(r: usize, i: usize) -> f64 {
    ((7 * i + 3 * r) % 13) as f64 - 6.0
}

impl Rank {
    /// Waits for the other ranks, with the device idle: memory that one of them allocates from the driver could otherwise
    /// wait for a collective that waits for this rank.
    fn meet(&self) -> Result<()> {
        self.dev.synchronize()?;
        self.group.gather(&[]).map(drop)
    }

    /// This rank's numbers, and their sum over all ranks.
    fn numbers(&self, n: usize) -> (Vec<f64>, Vec<f64>) {
        let sum = |i| (0..self.n).map(|r| value(r, i)).sum();
        ((0..n).map(|i| value(self.r, i)).collect(), (0..n).map(sum).collect())
    }

    /// Runs `collective` on `s`, after and before work on the compute stream, and waits.
    fn run(&self, s: Stream, collective: impl FnOnce() -> Result<()>) -> Result<()> {
        self.meet()?;
        if s == Stream::PEERS {
            self.dev.order(S, s)?;
        }
        collective()?;
        if s == Stream::PEERS {
            self.dev.order(s, S)?;
        }
        self.meet()
    }

    /// Fails if `t` is not `want`.
    fn equal(&self, what: &str, t: &Tensor, want: &[f64]) -> Result<()> {
        let got = t.to_f64(&*self.dev)?;
        let wrong = got.iter().zip(want).position(|(a, b)| a != b);
        ensure(got.len() == want.len() && wrong.is_none(), || {
            let at = wrong.unwrap_or(0);
            format!(
                "{what}, rank {} of {}: {:?} at {at}, wanted {:?}",
                self.r,
                self.n,
                got.get(at),
                want.get(at)
            )
        })
    }

    /// All collectives in all forms, with parts of `m` elements.
    fn collectives(&self, s: Stream, dtype: DType, m: usize) -> Result<()> {
        let dev = &*self.dev;
        let peers = dev.collectives();
        let what = |op: &str| format!("{op} of {m} {dtype} on stream {}", s.0);
        let (mine, sums) = self.numbers(self.n * m);
        let own = self.r * m..(self.r + 1) * m;
        let whole = || tensor(dev, dtype, &mine, [self.n * m]);

        let x = whole();
        self.run(s, || peers.all_reduce(s, x.acc(), Reduction::Sum))?;
        self.equal(&what("all_reduce"), &x, &sums)?;
        let x = whole();
        self.run(s, || peers.all_reduce(s, x.acc(), Reduction::Mean))?;
        let close = |(got, sum): (&f64, &f64)| (got - sum / self.n as f64).abs() < 0.1;
        let means = x.to_f64(dev)?;
        ensure(means.iter().zip(&sums).all(close), || what("mean"))?;

        let (x, y) = (whole(), Tensor::zeros(dev, Role::Gradient, dtype, [m])?);
        self.run(s, || peers.reduce_scatter(s, x.view(), y.out()))?;
        self.equal(&what("reduce_scatter"), &y, &sums[own.clone()])?;
        self.equal(&what("the input of reduce_scatter"), &x, &mine)?;
        let part = x.range(own.start, m)?;
        self.run(s, || peers.reduce_scatter(s, x.view(), part.out()))?;
        self.equal(&what("reduce_scatter in place"), &part, &sums[own.clone()])?;

        let all: Vec<f64> = (0..self.n * m).map(|i| value(i / m, i % m)).collect();
        let (x, y) =
            (tensor(dev, dtype, &mine[..m], [m]), Tensor::zeros(dev, Role::Weight, dtype, [self.n * m])?);
        self.run(s, || peers.all_gather(s, x.view(), y.out()))?;
        self.equal(&what("all_gather"), &y, &all)?;
        let y = Tensor::zeros(dev, Role::Weight, dtype, [self.n * m])?;
        let part = y.range(own.start, m)?;
        dev.copy(S, x.view(), part.out())?;
        self.run(s, || peers.all_gather(s, part.view(), y.out()))?;
        self.equal(&what("all_gather in place"), &y, &all)
    }
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs two GPUs")]
fn collectives_are_plain_sums_and_copies() -> Outcome {
    let Some(n) = several()? else { return Ok(()) };
    all_ranks(n, |rank| {
        ensure(rank.dev.collectives().ranks() == n && rank.dev.collectives().rank() == rank.r, || {
            "rank".into()
        })?;
        for s in [S, Stream::PEERS] {
            for dtype in [DType::F32, DType::Bf16] {
                for m in [0, 1, 1000, 70_001] {
                    rank.collectives(s, dtype, m)?;
                }
            }
        }
        Ok(())
    })
}

/// Reducing the same numbers again gives the same bits, and on all ranks.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs two GPUs")]
fn sums_have_the_same_bits_again_and_everywhere() -> Outcome {
    let Some(n) = several()? else { return Ok(()) };
    all_ranks(n, |rank| {
        let dev = &*rank.dev;
        for (dtype, how) in
            [(DType::F32, Reduction::Sum), (DType::Bf16, Reduction::Sum), (DType::F32, Reduction::Mean)]
        {
            let mut bits = Vec::new();
            for _ in 0..3 {
                let x = tensor(dev, dtype, &normal(rank.r as u64, 3_000_001), [3_000_001]);
                rank.run(S, || dev.collectives().all_reduce(S, x.acc(), how))?;
                let mut hash = DefaultHasher::new();
                dev.read_later(S, x.view())?.wait()?.hash(&mut hash);
                bits.push(hash.finish());
            }
            let all = rank.group.gather(bytemuck::cast_slice(&bits))?;
            ensure(bits.iter().all(|b| *b == bits[0]), || format!("{dtype}: other bits the second time"))?;
            ensure(all.iter().all(|a| *a == all[0]), || format!("{dtype}: other bits on other ranks"))?;
        }
        Ok(())
    })
}

/// How a collective is placed in a recording.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Placed {
    /// Among the kernels.
    Compute,
    /// Beside a kernel, and joined.
    Beside,
    /// At the end, where the recording joins it.
    Open,
}

impl Rank {
    /// Three replays of `v += 2 * (sum of v over all ranks)`, and of a kernel beside.
    fn replays(&self, placed: Placed) -> Result<()> {
        const N: usize = 100_003;
        let dev = &*self.dev;
        let v0 = |r: usize, i: usize| (r + i % 5) as f64;
        let v = tensor(dev, DType::F32, &(0..N).map(|i| v0(self.r, i)).collect::<Vec<_>>(), [N]);
        let x = Tensor::zeros(dev, Role::Gradient, DType::F32, [N])?;
        let z = Tensor::zeros(dev, Role::Gradient, DType::F32, [N])?;
        self.meet()?;
        let mut work = || -> Result<()> {
            dev.add(S, &Add { a: v.view(), b: v.view(), y: x.out() })?;
            let s = if placed == Placed::Compute { S } else { Stream::PEERS };
            if placed != Placed::Compute {
                let early = dev.collectives().all_reduce(s, z.acc(), Reduction::Sum).err();
                let early = early.map(|e| e.to_string()).unwrap_or_default();
                ensure(early.contains("recording"), || format!("before an order: {early}"))?;
                // Nothing of the recording is there yet, so that there is nothing to wait for.
                dev.order(s, S)?;
                dev.order(S, s)?;
            }
            dev.collectives().all_reduce(s, x.acc(), Reduction::Sum)?;
            dev.fill(S, &Fill { y: z.out(), value: 3.0 })?;
            if placed == Placed::Open {
                return Ok(());
            }
            dev.order(s, S)?;
            dev.accumulate(S, &Accumulate { x: x.view(), y: v.acc() })
        };
        let recording = dev.record(&mut work)?.ok_or_else(|| Error::device("test", "a GPU records"))?;
        for _ in 0..3 {
            recording.replay()?;
            if placed == Placed::Open {
                dev.accumulate(S, &Accumulate { x: x.view(), y: v.acc() })?;
            }
            // One that is not in the recording, in turn with those that are.
            dev.collectives().all_reduce(Stream::PEERS, z.acc(), Reduction::Sum)?;
            dev.order(Stream::PEERS, S)?;
        }
        self.meet()?;
        let mut want: Vec<Vec<f64>> = (0..self.n).map(|r| (0..N).map(|i| v0(r, i)).collect()).collect();
        for _ in 0..3 {
            let sums: Vec<f64> = (0..N).map(|i| want.iter().map(|v| v[i]).sum()).collect();
            want.iter_mut().for_each(|v| v.iter_mut().zip(&sums).for_each(|(v, sum)| *v += 2.0 * sum));
        }
        self.equal(&format!("{placed:?}"), &v, &want[self.r])?;
        self.equal("the kernel beside, and the collective after", &z, &vec![3.0 * self.n as f64; N])?;
        self.meet()
    }
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs two GPUs")]
fn recordings_contain_collectives() -> Outcome {
    let Some(n) = several()? else { return Ok(()) };
    all_ranks(n, |rank| {
        [Placed::Compute, Placed::Beside, Placed::Open]
            .into_iter()
            .try_for_each(|placed| rank.replays(placed))
    })
}

/// Streams, types and shapes that a collective refuses, before it reaches NCCL.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs two GPUs")]
fn wrong_collectives_are_sentences() -> Outcome {
    let Some(n) = several()? else { return Ok(()) };
    all_ranks(n, |rank| {
        let (dev, peers) = (&*rank.dev, rank.dev.collectives());
        let x = tensor(dev, DType::F32, &[1.0; 64], [8, 8]);
        let ints = int(dev, &[1; 8]);
        let strided = x.columns(0, 4)?;
        for (e, want) in [
            (peers.all_reduce(Stream::COPY, x.acc(), Reduction::Sum), "stream"),
            (peers.all_reduce(S, strided.acc(), Reduction::Sum), "contiguous"),
            (peers.all_reduce(S, ints.acc(), Reduction::Mean), "a float type"),
            (peers.all_gather(S, x.view(), x.out()), "parts of as many elements"),
            (dev.fill(Stream::PEERS, &Fill { y: x.out(), value: 0.0 }), "compute stream"),
        ] {
            let e = e.err().map(|e| e.to_string()).unwrap_or_default();
            ensure(e.contains(want), || format!("{e}; wanted {want}"))?;
        }
        rank.meet()
    })
}

/// While kernels are measured, collectives among them are too.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs two GPUs")]
fn a_profile_counts_collectives() -> Outcome {
    let Some(n) = several()? else { return Ok(()) };
    all_ranks(n, |rank| {
        let dev = &*rank.dev;
        let x = tensor(dev, DType::F32, &vec![1.0; 1 << 20], [1 << 20]);
        dev.start_profile()?;
        rank.run(S, || dev.collectives().all_reduce(S, x.acc(), Reduction::Sum))?;
        let profile = dev.profile()?.ok_or_else(|| Error::device("test", "it was started"))?;
        let kernels = profile.kernels();
        let bytes = 4 << 20;
        let sent = (2 * (bytes - bytes / n)) as f64;
        ensure(
            kernels.iter().any(|k| k.kernel == "all_reduce" && k.implementation == "nccl" && k.bytes == sent),
            || format!("{sent} bytes sent: {kernels:?}"),
        )
    })
}

/// NCCL would wait for ever, or fail without a reason.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn two_ranks_on_one_gpu_are_refused() -> Outcome {
    gpu_turn();
    for result in on_ranks(2, |_| 0, |_| Ok(()))? {
        let e = result.err().ok_or("two ranks share a GPU")?.to_string();
        println!("{e}");
        assert!(e.contains("ranks 0 and 1 use the same GPU") || e.contains("NCCL cannot be loaded"), "{e}");
    }
    Ok(())
}

/// A rank that fails while others wait in a collective: their wait ends with its reason.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs two GPUs")]
fn a_lost_rank_ends_the_wait_of_the_others() -> Outcome {
    let Some(n) = several()? else { return Ok(()) };
    let results = on_ranks(
        n,
        |r| r,
        |rank| {
            let dev = &*rank.dev;
            let x = tensor(dev, DType::F32, &vec![1.0; 1 << 20], [1 << 20]);
            // The first collective connects the GPUs.
            rank.run(S, || dev.collectives().all_reduce(S, x.acc(), Reduction::Sum))?;
            if rank.r == rank.n - 1 {
                std::thread::sleep(Duration::from_millis(500));
                return Err(Error::Training("the disk is full".into()));
            }
            dev.collectives().all_reduce(S, x.acc(), Reduction::Sum)?;
            dev.read_later(S, x.view())?.wait().map(drop)
        },
    )?;
    for (r, result) in results.into_iter().enumerate() {
        let e = result.err().ok_or(format!("rank {r} of {n} did not notice"))?.to_string();
        println!("{e}");
        assert!(e.contains("the disk is full"), "{e}");
    }
    Ok(())
}
