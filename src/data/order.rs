//! The order in which samples are visited, a function of the seed and the position only.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::rng::{Philox, Purpose};

/// Positions after which a mixture has taken the exact share of each source.
const BLOCK: usize = 4096;

/// A permutation of the samples per epoch. Sample number `position` since the start of training is `index(position)`;
/// positions can be queried in any order, so the batch of a step follows from the step's number.
///
/// The samples of a mixture are those of its sources, one source after another. Each source has epochs of its own, and
/// of every 4096 positions each one gets its share.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    sources: Vec<Permutations>,
    /// Positions of each source in a block.
    shares: Vec<usize>,
    /// The sources of the positions of a block, and how many positions of the block before it are of the same source.
    block: Mutex<Option<(u64, Block)>>,
}

/// Makes seeds of sources that differ in all bits.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

type Block = Arc<[(u16, u16)]>;

/// The order of one source.
#[derive(Debug)]
struct Permutations {
    /// Number of its first sample.
    start: usize,
    n: usize,
    seed: u64,
    epoch: Mutex<Option<(u32, Arc<[u32]>)>>,
}

impl Order {
    /// Orders of `n` samples under `seed`; `n` is at least 1 and fits in 32 bits.
    pub fn new(n: usize, seed: u64) -> Result<Self> {
        Self::mixture(&[(n, 1.0)], seed)
    }

    /// Orders of sources with these numbers of samples and weights.
    pub fn mixture(sources: &[(usize, f64)], seed: u64) -> Result<Self> {
        if let Some((n, _)) = sources.iter().find(|(n, _)| *n == 0 || u32::try_from(*n).is_err()) {
            return Err(Error::arg("Order::new", "n", n, "1 to 4294967295 samples"));
        }
        let shares = shares(&sources.iter().map(|s| s.1).collect::<Vec<_>>())?;
        let mut start = 0;
        let sources = sources.iter().enumerate().map(|(i, &(n, _))| {
            start += n;
            // The first source has the order that it has alone.
            Permutations {
                start: start - n,
                n,
                seed: seed ^ (i as u64).wrapping_mul(SPREAD),
                epoch: Mutex::new(None),
            }
        });
        Ok(Order { seed, sources: sources.collect(), shares, block: Mutex::new(None) })
    }

    /// The sample at `position`, counted from the start of training over all epochs.
    pub fn index(&self, position: u64) -> usize {
        if let [source] = &self.sources[..] {
            return source.index(position);
        }
        let (block, place) = (position / BLOCK as u64, (position % BLOCK as u64) as usize);
        let (source, before) = self.block(block)[place];
        let source = usize::from(source);
        self.sources[source].index(block * self.shares[source] as u64 + u64::from(before))
    }

    fn block(&self, number: u64) -> Block {
        let mut kept = self.block.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((n, block)) if *n == number => block.clone(),
            _ => {
                let each = self.shares.iter().enumerate();
                let mut all: Vec<u16> = each.flat_map(|(i, &n)| vec![i as u16; n]).collect();
                Philox::of(self.seed, Purpose::Mixture, number as u32).shuffle(&mut all);
                let mut taken = vec![0; self.shares.len()];
                let counted = all.into_iter().map(|source| {
                    let taken = &mut taken[usize::from(source)];
                    *taken += 1;
                    (source, *taken - 1)
                });
                let block: Block = counted.collect();
                *kept = Some((number, block.clone()));
                block
            }
        }
    }
}

/// How many positions of a block each source gets; at least one.
fn shares(weights: &[f64]) -> Result<Vec<usize>> {
    let sum: f64 = weights.iter().sum();
    let exact: Vec<f64> = weights.iter().map(|w| w / sum * BLOCK as f64).collect();
    if let Some(i) = exact.iter().position(|&share| share < 1.0 || share.is_nan()) {
        let want = format!("at least 1/{BLOCK} of the sum of all weights");
        return Err(Error::config(format!("data.mix.{i}.weight"), weights[i], want));
    }
    let mut all: Vec<usize> = exact.iter().map(|&share| share as usize).collect();
    // The rest goes to the largest fractions.
    let mut by_fraction: Vec<usize> = (0..all.len()).collect();
    by_fraction.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let rest = BLOCK - all.iter().sum::<usize>();
    by_fraction.into_iter().cycle().take(rest).for_each(|i| all[i] += 1);
    Ok(all)
}

impl Permutations {
    /// The sample at a position of this source.
    fn index(&self, position: u64) -> usize {
        // Epochs repeat after 2^32, which no run reaches.
        let order = self.permutation((position / self.n as u64) as u32);
        self.start + order[(position % self.n as u64) as usize] as usize
    }

    fn permutation(&self, epoch: u32) -> Arc<[u32]> {
        let mut kept = self.epoch.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some((e, order)) if *e == epoch => order.clone(),
            _ => {
                let mut order: Vec<u32> = (0..self.n as u32).collect();
                Philox::of(self.seed, Purpose::Order, epoch).shuffle(&mut order);
                let order: Arc<[u32]> = order.into();
                *kept = Some((epoch, order.clone()));
                order
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_another_permutation() {
        let order = Order::new(101, 3).unwrap();
        let epoch = |e: u64| (e * 101..(e + 1) * 101).map(|p| order.index(p)).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        for mut e in [first, second, epoch(1000)] {
            e.sort();
            assert_eq!(e, (0..101).collect::<Vec<_>>());
        }
    }

    #[test]
    fn any_position_is_known_without_the_ones_before() {
        let order = Order::new(10, 5).unwrap();
        let forward: Vec<usize> = (0..40).map(|p| order.index(p)).collect();
        for p in (0..40).rev() {
            assert_eq!(Order::new(10, 5).unwrap().index(p), forward[p as usize]);
            assert_eq!(order.index(p), forward[p as usize]);
        }
        assert_ne!(forward, (0..40).map(|p| Order::new(10, 6).unwrap().index(p)).collect::<Vec<_>>());
    }

    #[test]
    fn one_sample_and_none() {
        assert_eq!(Order::new(1, 0).unwrap().index(u64::MAX), 0);
        assert!(Order::new(0, 0).unwrap_err().to_string().contains("wanted 1 to"));
    }

    #[test]
    fn a_mixture_takes_the_share_of_each_source_in_its_own_order() {
        let sizes = [(10, 1.0), (7, 2.0), (5000, 1.0)];
        let mixed = Order::mixture(&sizes, 3).unwrap();
        let all: Vec<usize> = (0..2 * BLOCK as u64).map(|p| mixed.index(p)).collect();
        let of = |from: usize, n: usize| -> Vec<usize> {
            all.iter().filter(|i| (from..from + n).contains(i)).map(|i| i - from).collect()
        };
        let (first, second, third) = (of(0, 10), of(10, 7), of(17, 5000));
        assert_eq!((first.len(), second.len(), third.len()), (BLOCK / 2, BLOCK, BLOCK / 2));
        let alone = Order::new(10, 3).unwrap();
        assert_eq!(first, (0..BLOCK as u64 / 2).map(|p| alone.index(p)).collect::<Vec<_>>());
        for epoch in second.chunks_exact(7) {
            let mut epoch = epoch.to_vec();
            epoch.sort();
            assert_eq!(epoch, (0..7).collect::<Vec<_>>());
        }
        assert_eq!(third.iter().collect::<std::collections::BTreeSet<_>>().len(), third.len());
        // Any position is known without the ones before.
        let again = Order::mixture(&sizes, 3).unwrap();
        for p in [2 * BLOCK as u64 - 1, 0, 5000, 77] {
            assert_eq!(again.index(p), all[p as usize]);
        }
        let e = Order::mixture(&[(3, 1.0), (3, 1e-5)], 0).unwrap_err().to_string();
        assert!(e.contains("data.mix.1.weight") && e.contains("1/4096"), "{e}");
        assert_eq!(shares(&[1.0, 1.0, 1.0]).unwrap(), [1366, 1365, 1365]);
    }
}
