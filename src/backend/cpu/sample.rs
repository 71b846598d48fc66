//! Sampling, with operations that have the same bits on every device (docs/sampling.md): f64 operations that are
//! rounded individually, and integer weights, whose sums do not depend on the order.

use rayon::prelude::*;

use super::workspace::{per_thread, together};
use super::*;
use crate::rng::{Philox, Purpose};

/// The weight of the largest logit. Weights are rounded to integers.
const ONE: f64 = (1u64 << 42) as f64;
/// Maximum number of logits in a row, so that the sum of the weights fits into 63 bits.
const MOST: usize = 1 << 21;
/// Weights below this exponent are 0: e^LEAST * ONE < 1/2.
const LEAST: f64 = -30.0;

pub(super) fn sample_workspace(a: &Sample, threads: usize) -> usize {
    let (b, v) = (a.logits.dims.rows(), a.logits.dims.cols());
    together([per_thread(threads, 8, b, [v, v]), per_thread(threads, 4, b, [v])])
}

pub(super) fn sample(ws: &Workspace, a: &Sample) -> Result<()> {
    by_dtype!("sample", a.logits.dtype, E => draw::<E>(ws, a))
}

fn draw<E: Elem>(ws: &Workspace, a: &Sample) -> Result<()> {
    const OP: &str = "sample";
    let logits = rows::<E>(OP, "logits", &a.logits)?;
    let without = match &a.without {
        Some(v) => Some(rows::<E>(OP, "without", v)?),
        None => None,
    };
    let number = flat::<i32>(OP, "number", &a.number)?;
    let (position, idx) =
        (flat_mut::<i32>(OP, "position", &a.position.0)?, flat_mut::<i32>(OP, "idx", &a.idx.0)?);
    let choice = Choice { temperature: a.temperature, top_k: a.top_k, top_p: a.top_p };
    if logits.cols > MOST {
        return Err(Error::arg(OP, "logits", logits.cols, format!("at most {MOST} columns")));
    }
    let numbers = ws.per_thread::<f64, 2>(logits.rows, [logits.cols; 2])?;
    let places = ws.per_thread::<i32, 1>(logits.rows, [logits.cols])?;
    let of_row = |(n, (position, idx)): (usize, (&mut i32, &mut i32))| {
        let (mut numbers, mut places) = (numbers.take(), places.take());
        let ([l, w], [kept]) = (numbers.parts(), places.parts());
        match &without {
            Some(u) => {
                let both = logits.row(n).iter().zip(u.row(n));
                l.iter_mut().zip(both).for_each(|(l, (c, u))| *l = guided(c, u, a.guidance));
            }
            None => l.iter_mut().zip(logits.row(n)).for_each(|(l, c)| *l = c.up().wide()),
        }
        let stream = (Purpose::Sample as u64) << 32 | u64::from(number[n] as u32);
        let [low, high, ..] = Philox::at(a.seed, stream, u64::from(*position as u32));
        let r = u64::from(low) | u64::from(high) << 32;
        *idx = if choice.weigh(l, w, kept) { pick(w, r) } else { -1 };
        *position = position.wrapping_add(1);
    };
    position.par_iter_mut().zip(idx).enumerate().for_each(of_row);
    Ok(())
}

fn guided<E: Elem>(with: &E, without: &E, guidance: f64) -> f64 {
    let (c, u) = (with.up().wide(), without.up().wide());
    u + guidance * (c - u)
}

/// The parameters of sampling.
#[derive(Debug, Clone, Copy)]
struct Choice {
    temperature: f64,
    top_k: usize,
    top_p: f64,
}

impl Choice {
    /// Computes the weights `w` of logits `l`, 0 for those that cannot be chosen. Weights are integers, which f64
    /// represents exactly. Returns false if the row is empty or contains NaN, or if its maximum is not finite. `kept`
    /// is scratch.
    fn weigh(&self, l: &[f64], w: &mut [f64], kept: &mut [i32]) -> bool {
        if l.is_empty() || l.iter().any(|l| l.is_nan()) {
            return false;
        }
        let best = (0..l.len()).fold(0, |best, i| if l[i] > l[best] { i } else { best });
        let most = l[best];
        if !most.is_finite() {
            return false;
        }
        if self.temperature == 0.0 {
            w.fill(0.0);
            w[best] = ONE;
            return true;
        }
        for (w, l) in w.iter_mut().zip(l) {
            *w = weight((l - most) / self.temperature);
        }
        if self.top_k == 0 && self.top_p == 1.0 {
            return true;
        }
        let mut n = 0;
        for (i, &weight) in w.iter().enumerate().take(l.len()) {
            if weight > 0.0 {
                kept[n] = i as i32;
                n += 1;
            }
        }
        // There is no NaN; 0 and -0 compare equal.
        let larger = |a: f64, b: f64| b.partial_cmp(&a).unwrap_or(std::cmp::Ordering::Equal);
        let better = |a: &i32, b: &i32| larger(l[*a as usize], l[*b as usize]).then(a.cmp(b));
        let mut kept = &mut kept[..n];
        if self.top_k > 0 && self.top_k < n {
            kept.select_nth_unstable_by(self.top_k, better);
            let (first, rest) = kept.split_at_mut(self.top_k);
            rest.iter().for_each(|&i| w[i as usize] = 0.0);
            kept = first;
        }
        if self.top_p < 1.0 {
            kept.sort_unstable_by(better);
            let sum: u64 = kept.iter().map(|&i| w[i as usize] as u64).sum();
            let enough = ((self.top_p * sum as f64).ceil() as u64).clamp(1, sum);
            let mut mass = 0;
            for &i in kept.iter() {
                if mass >= enough {
                    w[i as usize] = 0.0;
                } else {
                    mass += w[i as usize] as u64;
                }
            }
        }
        true
    }
}

/// The first index where the running sum of the weights exceeds `floor(r * sum / 2^64)`.
fn pick(w: &[f64], r: u64) -> i32 {
    let sum: u64 = w.iter().map(|&w| w as u64).sum();
    let target = ((u128::from(r) * u128::from(sum)) >> 64) as u64;
    let mut below = 0;
    let passes = |w: &f64| {
        below += *w as u64;
        below > target
    };
    w.iter().position(passes).map_or(-1, |i| i as i32)
}

/// `round(ONE * e^x)` for x <= 0. The exponential is `2^n e^r` with `r = x - n ln 2` (Cody and Waite) and e^r by its
/// Taylor polynomial, which is accurate to two roundings for |r| <= ln(2) / 2.
fn weight(x: f64) -> f64 {
    /// Adding and subtracting this constant rounds to an integer.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    const LN2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    if x < LEAST {
        return 0.0;
    }
    let n = (x * std::f64::consts::LOG2_E + ROUND) - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = INVERSE_FACTORIALS[0];
    for c in &INVERSE_FACTORIALS[1..] {
        p = p * r + c;
    }
    // 2^n: n is an integer from -44 to 0.
    let two = f64::from_bits(((1023 + n as i64) as u64) << 52);
    (p * two * ONE + 0.5).floor()
}

/// 1/13! to 1/0!.
const INVERSE_FACTORIALS: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

#[cfg(test)]
mod tests {
    use super::super::testing::args::*;
    use super::*;

    const ALL: Choice = Choice { temperature: 1.0, top_k: 0, top_p: 1.0 };

    fn logs(p: &[f64]) -> Vec<f64> {
        p.iter().map(|p| p.ln()).collect()
    }

    /// `None` if nothing can be drawn.
    fn weights(c: Choice, l: &[f64]) -> Option<Vec<f64>> {
        let mut w = vec![f64::NAN; l.len()];
        c.weigh(l, &mut w, &mut vec![-1; l.len()]).then_some(w)
    }

    fn distribution(c: Choice, logits: &[f64]) -> Vec<f64> {
        let w = weights(c, logits).unwrap();
        let sum: f64 = w.iter().sum();
        w.iter().map(|w| w / sum).collect()
    }

    fn near(c: Choice, logits: &[f64], want: &[f64]) {
        let got = distribution(c, logits);
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-12 && (*g == 0.0) == (*w == 0.0), "{c:?}: {got:?}, wanted {want:?}");
        }
    }

    #[test]
    fn weights_are_exponentials_to_a_step() {
        for i in 0..=40_000 {
            let x = -f64::from(i) * 1e-3;
            let want = x.exp() * ONE;
            // 0.5 for rounding to an integer, the rest for the polynomial.
            assert!((weight(x) - want).abs() <= 0.5 + 1e-15 * want, "{x}: {} {want}", weight(x));
        }
        assert_eq!((weight(0.0), weight(-0.0), weight(f64::NEG_INFINITY)), (ONE, ONE, 0.0));
    }

    #[test]
    fn distributions_are_those_worked_out_by_hand() {
        let p = [0.1, 0.4, 0.2, 0.3];
        let l = logs(&p);
        near(ALL, &l, &p);
        // Only differences of logits matter.
        near(ALL, &l.iter().map(|l| l + 1e3).collect::<Vec<_>>(), &p);
        // At temperature 1/2 probabilities are proportional to squares, at temperature 2 to square roots.
        near(Choice { temperature: 0.5, ..ALL }, &l, &[1.0 / 30.0, 16.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0]);
        let roots: Vec<f64> = p.iter().map(|p| p.sqrt()).collect();
        let sum: f64 = roots.iter().sum();
        near(Choice { temperature: 2.0, ..ALL }, &l, &roots.iter().map(|r| r / sum).collect::<Vec<_>>());
        near(Choice { temperature: 0.0, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Choice { temperature: 1e-300, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Choice { top_k: 2, ..ALL }, &l, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        near(Choice { top_k: 1, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        for top_k in [0, 4, 5, usize::MAX] {
            near(Choice { top_k, ..ALL }, &l, &p);
        }
        // 0.4 + 0.3 reaches 0.69, and 0.4 reaches 0.39. At least one is always kept.
        near(Choice { top_p: 0.69, ..ALL }, &l, &[0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
        near(Choice { top_p: 0.71, ..ALL }, &l, &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        near(Choice { top_p: 0.39, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Choice { top_p: f64::MIN_POSITIVE, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        // top_p is a share of the probability that top-k keeps: 4/7 reaches a half.
        near(Choice { top_p: 0.5, top_k: 2, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0]);
        near(Choice { top_p: 0.9, top_k: 3, ..ALL }, &l, &[0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]);
        // Logits of -inf are never chosen.
        near(Choice { top_k: 3, ..ALL }, &[f64::NEG_INFINITY, 0.0, f64::NEG_INFINITY], &[0.0, 1.0, 0.0]);
        near(ALL, &[7.0], &[1.0]);
    }

    #[test]
    fn of_equal_logits_the_first_are_kept() {
        let third = 1.0 / 3.0;
        let l = [1.0, 2.0, 2.0, 1.0, 2.0, 2.0];
        near(Choice { top_k: 3, ..ALL }, &l, &[0.0, third, third, 0.0, third, 0.0]);
        near(Choice { top_k: 1, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        near(Choice { temperature: 0.0, ..ALL }, &l, &[0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        near(Choice { top_k: 1, ..ALL }, &[-1.0, -0.0, 0.0], &[0.0, 1.0, 0.0]);
        // Exactly half of four equal logits.
        near(Choice { top_p: 0.5, ..ALL }, &[3.0; 4], &[0.5, 0.5, 0.0, 0.0]);
        near(Choice { top_p: 0.51, ..ALL }, &[3.0; 4], &[third, third, third, 0.0]);
    }

    #[test]
    fn what_cannot_be_drawn_from_gives_minus_one() {
        for l in [&[0.0, f64::NAN][..], &[f64::NAN, 0.0], &[], &[f64::NEG_INFINITY; 2], &[1.0, f64::INFINITY]]
        {
            for temperature in [1.0, 0.0] {
                assert!(weights(Choice { temperature, ..ALL }, l).is_none(), "{l:?}");
            }
        }
    }

    #[test]
    fn the_pick_is_where_the_running_sum_passes() {
        let w = [0.0, 1.0, 0.0, 2.0, 1.0, 0.0];
        let quarter = 1u64 << 62;
        for (r, want) in
            [(0, 1), (quarter - 1, 1), (quarter, 3), (3 * quarter - 1, 3), (3 * quarter, 4), (u64::MAX, 4)]
        {
            assert_eq!(pick(&w, r), want, "{r}");
        }
    }

    /// The indices drawn by `times` calls, starting at `position`.
    fn calls(
        s: Sample,
        logits: &Tensor,
        number: &[i32],
        position: &Tensor,
        times: usize,
        dev: &Cpu,
    ) -> Vec<Vec<i32>> {
        let b = number.len();
        let number = Tensor::from_host(dev, Role::Input, number, [b]).unwrap();
        let idx = out(dev, DType::I32, [b]);
        let one = |_| {
            let a = Sample {
                logits: logits.view(),
                number: number.view(),
                position: position.acc(),
                idx: idx.out(),
                ..s
            };
            dev.sample(S, &a).unwrap();
            idx.to_host::<i32>(dev).unwrap()
        };
        (0..times).map(one).collect()
    }

    /// Pearson's statistic of 20,000 draws. With d degrees of freedom its mean is d and its variance 2 d, so that a
    /// value six standard deviations above the mean practically never occurs by chance.
    #[test]
    fn frequencies_are_the_distribution() {
        let dev = Cpu::poisoned(2).unwrap();
        let l: Vec<f64> = (0..12).map(|i| f64::from(i * 7 % 12) * 0.25).collect();
        const N: usize = 200;
        let logits = Tensor::from_f64(&dev, Role::Input, DType::F32, &l.repeat(N), [N, 12]).unwrap();
        let numbers: Vec<i32> = (0..N as i32).collect();
        for c in [
            ALL,
            Choice { temperature: 0.6, ..ALL },
            Choice { top_k: 5, ..ALL },
            Choice { top_p: 0.8, ..ALL },
        ] {
            let position = Tensor::from_host(&dev, Role::Input, &vec![3i32; N], [N]).unwrap();
            let view = logits.view();
            let s = Sample {
                logits: view,
                without: None,
                number: view,
                position: position.acc(),
                idx: position.out(),
                temperature: c.temperature,
                top_k: c.top_k,
                top_p: c.top_p,
                guidance: 1.0,
                seed: 5,
            };
            let p = distribution(c, &l);
            let mut counts = [0u32; 12];
            for i in calls(s, &logits, &numbers, &position, 100, &dev).concat() {
                counts[i as usize] += 1;
            }
            assert_eq!(position.to_host::<i32>(&dev).unwrap(), [103; N]);
            let mut chi = 0.0;
            for (&count, &p) in counts.iter().zip(&p) {
                let want = p * (100 * N) as f64;
                assert!(p > 0.0 || count == 0, "{c:?}: an index with probability 0 was drawn");
                chi += if p > 0.0 { (f64::from(count) - want).powi(2) / want } else { 0.0 };
            }
            let d = p.iter().filter(|p| **p > 0.0).count() as f64 - 1.0;
            assert!(chi < d + 6.0 * (2.0 * d).sqrt(), "{c:?}: {chi} for {d} degrees of freedom: {counts:?}");
        }
    }

    #[test]
    fn draws_follow_from_seed_sequence_and_place() {
        let dev = Cpu::poisoned(2).unwrap();
        let logits = Tensor::from_f64(&dev, Role::Input, DType::F64, &[0.0; 3000], [3, 1000]).unwrap();
        let draw = |seed, number: [i32; 3], first: i32, times| {
            let position = Tensor::from_host(&dev, Role::Input, &[first; 3], [3]).unwrap();
            let view = logits.view();
            let s = Sample {
                logits: view,
                without: None,
                number: view,
                position: position.acc(),
                idx: position.out(),
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                guidance: 1.0,
                seed,
            };
            calls(s, &logits, &number, &position, times, &dev)
        };
        let all = draw(1, [2, 3, 2], 3, 2);
        assert!(all[0][0] == all[0][2] && all[0][0] != all[0][1] && all[0][0] != all[1][0], "{all:?}");
        // Draws depend neither on other sequences nor on the first position of the loop.
        assert_eq!(draw(1, [9, 2, 8], 4, 1)[0][1], all[1][0]);
        assert_ne!(draw(2, [2, 3, 2], 3, 1)[0], all[0]);
        // The host's generator gives the same draw.
        let u = Philox::of(1, Purpose::Sample, 2).from_block(3).uniform();
        assert_eq!(all[0][0], (u * 1000.0) as i32);
    }

    #[test]
    fn guidance_moves_away_from_the_logits_without_prompt() {
        let of = |g: f64| [(1.0, 0.0), (-2.0, 1.0), (0.5, 0.5)].map(|(c, u): (f64, f64)| guided(&c, &u, g));
        assert_eq!(of(1.0), [1.0, -2.0, 0.5]);
        assert_eq!(of(0.0), [0.0, 1.0, 0.5]);
        assert_eq!(of(3.0), [3.0, -8.0, 0.5]);
    }

    #[test]
    fn wrong_numbers_are_named() {
        let dev = Cpu::poisoned(1).unwrap();
        let logits = Tensor::from_f64(&dev, Role::Input, DType::F32, &[0.0, 1.0], [1, 2]).unwrap();
        let (position, idx) =
            (Tensor::from_host(&dev, Role::Input, &[0i32], [1]).unwrap(), out(&dev, DType::I32, [1]));
        let a = Sample {
            logits: logits.view(),
            without: Some(logits.view()),
            number: position.view(),
            position: position.acc(),
            idx: idx.out(),
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            guidance: 1.0,
            seed: 1,
        };
        for (a, arg) in [
            (Sample { temperature: -0.1, ..a }, "temperature"),
            (Sample { temperature: f64::INFINITY, ..a }, "temperature"),
            (Sample { top_p: 0.0, ..a }, "top_p"),
            (Sample { top_p: 1.1, ..a }, "top_p"),
            (Sample { top_p: f64::NAN, ..a }, "top_p"),
            (Sample { guidance: f64::NAN, ..a }, "guidance"),
        ] {
            let e = dev.sample(S, &a).unwrap_err().to_string();
            assert!(
                e.starts_with(&format!("sample: argument `{arg}` is ")) && e.contains(", wanted "),
                "{e}"
            );
        }
    }
}
