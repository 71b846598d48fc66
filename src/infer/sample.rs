//! From logits to a choice: temperature, top-k, top-p, guidance.

use std::cmp::Ordering;

use crate::data::{Philox, Purpose};
use crate::error::{Error, Result};

/// How the next token or code is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 always takes the best.
    pub temperature: f64,
    /// Only this many of the best can be chosen; 0: all.
    pub top_k: usize,
    /// Of those only the best that together reach this probability, above 0, at most 1.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// g of `u + g (c - u)`, c and u the logits with the prompt and without (arXiv 2207.12598); 1: with it only.
    pub guidance: f64,
}

impl Default for Sampling {
    /// The paper's (arXiv 2505.10562): all codes, at their probabilities; guidance 3.
    fn default() -> Self {
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 1, guidance: 3.0 }
    }
}

impl Sampling {
    /// Always the best.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, guidance: 1.0 };

    /// Fails on values that nothing can be sampled with.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::config("temperature", self.temperature, "a finite number, 0 or more"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::config("top_p", self.top_p, "a number above 0, at most 1"));
        }
        if !self.guidance.is_finite() {
            return Err(Error::config("guidance", self.guidance, "a finite number"));
        }
        Ok(())
    }

    /// True if sequences without the prompt are needed beside those with it.
    pub fn is_guided(&self) -> bool {
        self.guidance != 1.0
    }

    /// Logits with guidance: `u + g (c - u)`.
    pub fn guide(&self, with: &[f64], without: &[f64]) -> Vec<f64> {
        with.iter().zip(without).map(|(c, u)| u + self.guidance * (c - u)).collect()
    }

    /// The probabilities that a choice is drawn from. Of equal logits those with the smaller index are kept first.
    /// Fails on NaN, and if no logit is finite or one is infinity.
    pub fn distribution(&self, logits: &[f64]) -> Result<Vec<f64>> {
        self.check()?;
        if let Some(i) = logits.iter().position(|l| l.is_nan()) {
            return Err(Error::arg("sample", "logits", format!("NaN at {i}"), "numbers"));
        }
        let best = argmax(logits);
        let most = logits.get(best).copied().unwrap_or(f64::NEG_INFINITY);
        if !most.is_finite() {
            let got = format!("{} numbers of which {most} is the largest", logits.len());
            return Err(Error::arg("sample", "logits", got, "a finite largest one"));
        }
        let mut p = vec![0.0; logits.len()];
        if self.temperature == 0.0 {
            p[best] = 1.0;
            return Ok(p);
        }
        let mut kept: Vec<usize> = (0..logits.len()).collect();
        // There is no NaN, and the zeros are equal.
        let larger = |a: f64, b: f64| b.partial_cmp(&a).unwrap_or(Ordering::Equal);
        let better = |a: &usize, b: &usize| larger(logits[*a], logits[*b]).then(a.cmp(b));
        if self.top_k > 0 && self.top_k < kept.len() {
            kept.select_nth_unstable_by(self.top_k, better);
            kept.truncate(self.top_k);
        }
        // In one order, so that the sum is the same however they were kept.
        kept.sort_unstable();
        let mut sum = 0.0;
        for &i in &kept {
            p[i] = ((logits[i] - most) / self.temperature).exp();
            sum += p[i];
        }
        if self.top_p < 1.0 {
            kept.sort_unstable_by(better);
            let (mut mass, enough) = (0.0, self.top_p * sum);
            let first = kept.iter().position(|&i| {
                mass += p[i];
                mass >= enough
            });
            for i in kept.split_off(first.map_or(kept.len(), |first| first + 1)) {
                p[i] = 0.0;
            }
            sum = mass;
        }
        kept.iter().for_each(|&i| p[i] /= sum);
        Ok(p)
    }

    /// Draws the choice at place `position` of sequence `number`: whatever else is drawn beside it, the same.
    pub fn draw(&self, logits: &[f64], number: u32, position: u64) -> Result<usize> {
        let p = self.distribution(logits)?;
        let u = Philox::of(self.seed, Purpose::Sample, number).from_block(position).uniform();
        let mut below = 0.0;
        let passes = |p: &f64| {
            below += p;
            u < below
        };
        // Rounded, the sum of all may stay below u.
        let last = || p.iter().rposition(|&p| p > 0.0).unwrap_or(0);
        Ok(p.iter().position(passes).unwrap_or_else(last))
    }
}

/// The index of the largest value, of equal ones the smallest; NaN is never the largest, 0 if all are.
pub(super) fn argmax(v: &[f64]) -> usize {
    let larger =
        |best: usize, i: usize| if v[i] > v[best] || (v[best].is_nan() && !v[i].is_nan()) { i } else { best };
    (0..v.len()).reduce(larger).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 5, guidance: 1.0 };

    fn logs(p: &[f64]) -> Vec<f64> {
        p.iter().map(|p| p.ln()).collect()
    }

    fn near(s: Sampling, logits: &[f64], want: &[f64]) {
        let got = s.distribution(logits).unwrap();
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-12 && (*g == 0.0) == (*w == 0.0), "{s:?}: {got:?}, wanted {want:?}");
        }
    }

    #[test]
    fn distributions_are_those_worked_out_by_hand() {
        let p = [0.1, 0.4, 0.2, 0.3];
        let l = logs(&p);
        near(ALL, &l, &p);
        // Logits count by their differences only.
        near(ALL, &l.iter().map(|l| l + 1e3).collect::<Vec<_>>(), &p);
        // At half the temperature probabilities are squared, at twice it they are square roots.
        near(Sampling { temperature: 0.5, ..ALL }, &l, &[1.0 / 30.0, 16.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0]);
        let roots: Vec<f64> = p.iter().map(|p| p.sqrt()).collect();
        let sum: f64 = roots.iter().sum();
        near(Sampling { temperature: 2.0, ..ALL }, &l, &roots.iter().map(|r| r / sum).collect::<Vec<_>>());
        near(Sampling { temperature: 0.0, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Sampling { temperature: 1e-300, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Sampling { top_k: 2, ..ALL }, &l, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        near(Sampling { top_k: 1, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        for top_k in [0, 4, 5, usize::MAX] {
            near(Sampling { top_k, ..ALL }, &l, &p);
        }
        // 0.4 + 0.3 reach 0.69, 0.4 alone 0.39; nothing is below one.
        near(Sampling { top_p: 0.69, ..ALL }, &l, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        near(Sampling { top_p: 0.71, ..ALL }, &l, &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        near(Sampling { top_p: 0.39, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Sampling { top_p: f64::MIN_POSITIVE, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        // The mass is that of what top-k left: 4/7 of it reach a half.
        near(Sampling { top_p: 0.5, top_k: 2, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Sampling { top_p: 0.9, top_k: 3, ..ALL }, &l, &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        // What cannot be is not.
        near(Sampling { top_k: 3, ..ALL }, &[f64::NEG_INFINITY, 0.0, f64::NEG_INFINITY], &[0.0, 1.0, 0.0]);
        near(ALL, &[7.0], &[1.0]);
    }

    #[test]
    fn of_equal_logits_the_first_are_kept() {
        let third = 1.0 / 3.0;
        let l = [1.0, 2.0, 2.0, 1.0, 2.0, 2.0];
        near(Sampling { top_k: 3, ..ALL }, &l, &[0.0, third, third, 0.0, third, 0.0]);
        near(Sampling { top_k: 1, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        near(Sampling { temperature: 0.0, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        near(Sampling { top_k: 1, ..ALL }, &[-1.0, -0.0, 0.0], &[0.0, 1.0, 0.0]);
        // Exactly half of four equal ones.
        near(Sampling { top_p: 0.5, ..ALL }, &[3.0; 4], &[0.5, 0.5, 0.0, 0.0]);
        near(Sampling { top_p: 0.51, ..ALL }, &[3.0; 4], &[third, third, third, 0.0]);
        assert_eq!((argmax(&[f64::NAN, 1.0, f64::NAN, 1.0]), argmax(&[f64::NAN; 2]), argmax(&[])), (1, 0, 0));
    }

    #[test]
    fn guidance_moves_away_from_the_logits_without_prompt() {
        let (c, u) = ([1.0, -2.0, 0.5], [0.0, 1.0, 0.5]);
        let guided = |guidance| Sampling { guidance, ..ALL }.guide(&c, &u);
        assert_eq!(guided(1.0), c);
        assert_eq!(guided(0.0), u);
        assert_eq!(guided(3.0), [3.0, -8.0, 0.5]);
        assert!(!ALL.is_guided() && Sampling::default().is_guided());
    }

    /// Pearson's statistic of 200,000 draws; with d degrees of freedom its mean is d and its variance 2 d, so that six
    /// deviations above the mean are never seen by chance.
    #[test]
    fn frequencies_are_the_distribution() {
        let l: Vec<f64> = (0..12).map(|i| f64::from(i * 7 % 12) * 0.3).collect();
        let n = 200_000u32;
        for s in [
            ALL,
            Sampling { temperature: 0.6, seed: 9, ..ALL },
            Sampling { top_k: 5, ..ALL },
            Sampling { top_p: 0.8, ..ALL },
        ] {
            let p = s.distribution(&l).unwrap();
            let mut counts = vec![0u32; l.len()];
            // Half of the draws from other sequences, half from other places of one.
            for i in 0..n / 2 {
                counts[s.draw(&l, i, 3).unwrap()] += 1;
                counts[s.draw(&l, 7, u64::from(i) + 4).unwrap()] += 1;
            }
            let mut chi = 0.0;
            for (&count, &p) in counts.iter().zip(&p) {
                let want = p * f64::from(n);
                assert!(p > 0.0 || count == 0, "{s:?}: what has no probability was drawn");
                chi += if p > 0.0 { (f64::from(count) - want).powi(2) / want } else { 0.0 };
            }
            let d = p.iter().filter(|p| **p > 0.0).count() as f64 - 1.0;
            assert!(chi < d + 6.0 * (2.0 * d).sqrt(), "{s:?}: {chi} for {d} degrees of freedom: {counts:?}");
        }
    }

    #[test]
    fn draws_follow_from_seed_sequence_and_place() {
        let l = [0.0; 1000];
        let draw = |seed, number, position| Sampling { seed, ..ALL }.draw(&l, number, position).unwrap();
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        for other in [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)] {
            assert_ne!(draw(1, 2, 3), other);
        }
    }

    #[test]
    fn what_cannot_be_sampled_is_an_error() {
        for (s, key) in [
            (Sampling { temperature: -0.1, ..ALL }, "temperature"),
            (Sampling { temperature: f64::INFINITY, ..ALL }, "temperature"),
            (Sampling { top_p: 0.0, ..ALL }, "top_p"),
            (Sampling { top_p: 1.1, ..ALL }, "top_p"),
            (Sampling { top_p: f64::NAN, ..ALL }, "top_p"),
            (Sampling { guidance: f64::NAN, ..ALL }, "guidance"),
        ] {
            let e = s.distribution(&[0.0, 1.0]).unwrap_err().to_string();
            assert!(e.contains(&format!("`{key}`")) && e.contains(", wanted "), "{e}");
        }
        for l in [&[0.0, f64::NAN][..], &[], &[f64::NEG_INFINITY; 2], &[1.0, f64::INFINITY]] {
            for s in [ALL, Sampling::GREEDY] {
                let e = s.draw(l, 0, 0).unwrap_err().to_string();
                assert!(e.starts_with("sample: argument `logits` is "), "{e}");
            }
        }
    }
}
