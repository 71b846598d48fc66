//! Arithmetic of ranks: collectives of CPUs.

use std::sync::Arc;
use std::time::Duration;

use ett::backend::*;
use ett::error::Result;
use ett::ranks::Group;
use ett::tensor::Tensor;

use crate::common::Outcome;

/// Runs `f` as each of `n` ranks, on a thread of its own, and returns its results in the order of the ranks. The ranks leave
/// their group when `f` returns; one that panics has ended without a word for the others.
pub fn together<T: Send>(n: usize, f: impl Fn(Arc<Group>) -> T + Sync) -> Vec<T> {
    let groups = Group::in_process(n, Duration::from_secs(60)).expect("ranks on the loopback device");
    std::thread::scope(|s| {
        let run = |group: Arc<Group>| {
            let result = f(group.clone());
            group.leave();
            result
        };
        let ranks: Vec<_> = groups.into_iter().map(|group| s.spawn(move || run(group))).collect();
        ranks.into_iter().map(|r| r.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Values of a rank that are different everywhere, so that sums depend on their order.
fn values(rank: usize, n: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * 7919 + rank * 104_729) % 1009) as f64 / 31.0 - 16.0 + 1e-7 * i as f64).collect()
}

fn tensor(dev: &dyn Kernels, dtype: DType, values: &[f64]) -> Result<Tensor> {
    Tensor::from_f64(dev, Role::Gradient, dtype, values, [values.len()])
}

/// The sum of all ranks' values, in the order of the ranks and with the rounding of `dtype`.
fn sums(ranks: usize, n: usize, dtype: DType) -> Vec<f64> {
    let of: Vec<Vec<f64>> = (0..ranks).map(|r| values(r, n)).collect();
    let term = |r: usize, i: usize| dtype.rounded(of[r][i]);
    (0..n).map(|i| (1..ranks).fold(term(0, i), |sum, r| dtype.rounded(sum + term(r, i)))).collect()
}

const TYPES: [DType; 3] = [DType::F32, DType::F64, DType::I32];

/// Sizes on both sides of every choice of algorithm.
fn sizes(ranks: usize) -> &'static [usize] {
    if ranks > 4 { &[0, 1, 9001] } else { &[0, 1, 7, 8192, 8193, 20_011] }
}

/// Runs `f` as each of 1, 2, 3, 4 and 8 ranks with a device.
fn as_ranks(f: impl Fn(&Cpu, usize, usize) -> Result<()> + Sync) -> Outcome {
    for ranks in [1, 2, 3, 4, 8] {
        for result in together(ranks, |g| f(&Cpu::of(1, g.clone())?, g.rank(), ranks)) {
            result?;
        }
    }
    Ok(())
}

#[test]
fn all_reduce_adds_in_the_order_of_the_ranks() -> Outcome {
    as_ranks(|dev, rank, ranks| {
        for &n in sizes(ranks) {
            for dtype in TYPES {
                for how in [Reduction::Sum, Reduction::Mean] {
                    let x = tensor(dev, dtype, &values(rank, n))?;
                    let done = dev.all_reduce(Stream::COMPUTE, x.acc(), how);
                    if dtype == DType::I32 && how == Reduction::Mean && ranks > 1 {
                        assert!(done.unwrap_err().to_string().contains("i32 for the sum"));
                        continue;
                    }
                    done?;
                    let over = if how == Reduction::Mean { ranks as f64 } else { 1.0 };
                    let want: Vec<f64> =
                        sums(ranks, n, dtype).iter().map(|v| dtype.rounded(v / over)).collect();
                    assert!(x.to_f64(dev)? == want, "{ranks} ranks, {n} {dtype}, {how:?}");
                }
            }
        }
        Ok(())
    })
}

#[test]
fn reduce_scatter_and_all_gather_in_place_and_apart() -> Outcome {
    as_ranks(|dev, rank, ranks| {
        for (&n, in_place) in sizes(ranks).iter().flat_map(|n| [(n, false), (n, true)]) {
            for dtype in TYPES {
                let whole = tensor(dev, dtype, &values(rank, n * ranks))?;
                let apart = tensor(dev, dtype, &vec![0.0; n])?;
                let off = (rank * n * dtype.size()) as u64;
                let own = In::new(whole.view().buffer(), off, dtype, [n], n as i64)?;
                let part = if in_place { own } else { apart.view() };
                dev.reduce_scatter(Stream::COMPUTE, whole.view(), Out(part))?;
                let want = sums(ranks, n * ranks, dtype);
                let got = if in_place {
                    whole.to_f64(dev)?[rank * n..][..n] == want[rank * n..][..n]
                } else {
                    apart.to_f64(dev)? == want[rank * n..][..n]
                };
                assert!(got, "reduce_scatter: {ranks} ranks, {n} {dtype}, in place: {in_place}");
                dev.all_gather(Stream::COMPUTE, part, whole.out())?;
                assert!(
                    whole.to_f64(dev)? == want,
                    "all_gather: {ranks} ranks, {n} {dtype}, in place: {in_place}"
                );
            }
        }
        // Types that are only gathered.
        for dtype in [DType::Bf16, DType::U8] {
            let part = tensor(dev, dtype, &[rank as f64; 3])?;
            let whole = tensor(dev, dtype, &vec![9.0; 3 * ranks])?;
            dev.all_gather(Stream::COMPUTE, part.view(), whole.out())?;
            let want: Vec<f64> = (0..3 * ranks).map(|i| (i / 3) as f64).collect();
            assert_eq!(whole.to_f64(dev)?, want);
        }
        Ok(())
    })
}

#[test]
fn large_tensors_are_reduced_in_ranges() -> Outcome {
    for result in together(2, |g| -> Result<()> {
        let dev = Cpu::of(1, g.clone())?;
        let mine: Vec<f64> = (0..1_100_001).map(|i| (i % 1000 * (g.rank() + 1)) as f64).collect();
        let x = tensor(&dev, DType::F32, &mine)?;
        dev.all_reduce(Stream::COMPUTE, x.acc(), Reduction::Sum)?;
        let got = x.to_f64(&dev)?;
        assert!(got.iter().enumerate().all(|(i, v)| *v == (i % 1000 * 3) as f64));
        Ok(())
    }) {
        result?;
    }
    Ok(())
}

#[test]
fn collectives_refuse_views_that_do_not_fit() -> Outcome {
    for result in together(2, |g| -> Result<()> {
        let (dev, other) = (Cpu::of(1, g.clone())?, Cpu::new(1)?);
        let (x, y) = (tensor(&dev, DType::F32, &[1.0; 12])?, tensor(&dev, DType::F32, &[1.0; 6])?);
        let foreign = tensor(&other, DType::F32, &[1.0; 12])?;
        let strided = In::new(x.view().buffer(), 0, DType::F32, [3, 2], 4)?;
        let overlapping = In::new(x.view().buffer(), 4, DType::F32, [6], 6)?;
        let doubles = tensor(&dev, DType::F64, &[1.0; 6])?;
        let s = Stream::COMPUTE;
        let refused = |done: Result<()>, part: &str| {
            let text = done.unwrap_err().to_string();
            assert!(text.contains(part), "{text}: no `{part}`");
        };
        refused(dev.all_reduce(s, foreign.acc(), Reduction::Sum), "memory of another device");
        refused(dev.all_reduce(s, Acc(strided), Reduction::Sum), "strided by 4");
        refused(dev.reduce_scatter(s, foreign.view(), y.out()), "memory of another device");
        refused(dev.reduce_scatter(s, x.view(), Out(strided)), "strided by 4");
        refused(dev.reduce_scatter(s, x.view(), Out(overlapping)), "memory shared with `x`");
        refused(dev.reduce_scatter(s, y.view(), x.out()), "parts of as many elements");
        refused(dev.all_gather(s, y.view(), foreign.out()), "memory of another device");
        refused(dev.all_gather(s, strided, x.out()), "strided by 4");
        refused(dev.all_gather(s, doubles.view(), x.out()), "f64");
        let narrow = tensor(&dev, DType::Bf16, &[1.0; 12])?;
        refused(dev.all_reduce(s, narrow.acc(), Reduction::Sum), "bf16, wanted f32 or f64");
        // Nothing was sent: the ranks still understand each other.
        dev.all_reduce(s, x.acc(), Reduction::Sum)?;
        assert_eq!(x.to_f64(&dev)?, [2.0; 12]);
        Ok(())
    }) {
        result?;
    }
    Ok(())
}
