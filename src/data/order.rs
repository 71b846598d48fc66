//! The order in which samples are visited, a function of the seed and the position only.

use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::rng::{Philox, Purpose};

/// A permutation of `0..n` per epoch. Sample number `position` since the start of training is `index(position)`;
/// positions can be queried in any order, so the batch of a step follows from the step's number.
#[derive(Debug)]
pub struct Order {
    n: usize,
    seed: u64,
    epoch: Mutex<Option<(u32, Arc<[u32]>)>>,
}

impl Order {
    /// Orders of `n` samples under `seed`; `n` is at least 1 and fits in 32 bits.
    pub fn new(n: usize, seed: u64) -> Result<Self> {
        if n == 0 || u32::try_from(n).is_err() {
            return Err(Error::arg("Order::new", "n", n, "1 to 4294967295 samples"));
        }
        Ok(Order { n, seed, epoch: Mutex::new(None) })
    }

    /// The number of samples in an epoch.
    pub fn samples(&self) -> usize {
        self.n
    }

    /// The epoch of `position`.
    pub fn epoch(&self, position: u64) -> u64 {
        position / self.n as u64
    }

    /// The sample at `position`, counted from the start of training over all epochs.
    pub fn index(&self, position: u64) -> usize {
        // Epochs repeat after 2^32, which no run reaches.
        let order = self.permutation(self.epoch(position) as u32);
        order[(position % self.n as u64) as usize] as usize
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
        assert_eq!((order.epoch(9), order.epoch(10), order.samples()), (0, 1, 10));
    }

    #[test]
    fn one_sample_and_none() {
        assert_eq!(Order::new(1, 0).unwrap().index(u64::MAX), 0);
        assert!(Order::new(0, 0).unwrap_err().to_string().contains("wanted 1 to"));
    }
}
