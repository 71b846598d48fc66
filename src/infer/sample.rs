//! Sampling of the next token or code.

use super::continued::indices;
use crate::autograd::Tape;
use crate::backend::{DType, Kernels, Role, Sample, Stream};
use crate::config::SamplingConfig;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// How the next token or code is sampled from logits (docs/sampling.md).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 always takes the most likely index.
    pub temperature: f64,
    /// Only this many of the most likely indices can be chosen; 0: all.
    pub top_k: usize,
    /// Of those, only the most likely ones that together reach this probability, above 0 and at most 1.
    pub top_p: f64,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Classifier-free guidance: g of `u + g (c - u)`, where c and u are the logits with and without the prompt
    /// (arXiv 2207.12598); 1 uses c only.
    pub guidance: f64,
}

impl Default for Sampling {
    /// The paper's settings (arXiv 2505.10562): all codes, with their probabilities, and guidance 3.
    fn default() -> Self {
        Sampling::of(&SamplingConfig::default(), 1)
    }
}

impl Sampling {
    /// Always takes the most likely index.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0, guidance: 1.0 };

    /// The settings of a configuration.
    pub fn of(cfg: &SamplingConfig, seed: u64) -> Self {
        let SamplingConfig { temperature, top_k, top_p, guidance } = *cfg;
        Sampling { temperature, top_k, top_p, seed, guidance }
    }

    /// Fails on invalid values.
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

    /// True if logits of sequences without the prompt are needed in addition.
    pub fn is_guided(&self) -> bool {
        self.guidance != 1.0
    }

    /// Chooses an index for each of B sequences, `[B]` i32, on the device. `logits` are `[B, V]`, or `[2B, V]` with
    /// those without the prompt last. `number` and `position` `[B]` i32 identify the random numbers; positions are
    /// increased by one. An index is -1 if the logits allow no choice; [`Sampling::chosen`] checks for it.
    pub fn choose(
        &self,
        dev: &dyn Kernels,
        logits: &Tensor,
        number: &Tensor,
        position: &Tensor,
    ) -> Result<Tensor> {
        let idx = Tensor::empty(dev, Role::Input, DType::I32, [number.dims().numel()])?;
        self.choose_into(dev, logits, number, position, &idx)?;
        Ok(idx)
    }

    /// The same into `idx` `[B]` i32, so that a recorded step can choose what its next replay continues with.
    pub fn choose_into(
        &self,
        dev: &dyn Kernels,
        logits: &Tensor,
        number: &Tensor,
        position: &Tensor,
        idx: &Tensor,
    ) -> Result<()> {
        self.check()?;
        let (b, rows) = (number.dims().numel(), logits.dims().rows());
        if rows != b && rows != 2 * b {
            return Err(Error::arg("choose", "logits", logits.dims(), format!("{b} or {} rows", 2 * b)));
        }
        let with = logits.rows(0, b)?;
        let without = (rows > b).then(|| logits.rows(b, b)).transpose()?;
        let a = Sample {
            logits: with.view(),
            without: without.as_ref().map(Tensor::view),
            number: number.view(),
            position: position.acc(),
            idx: idx.out(),
            temperature: self.temperature,
            top_k: self.top_k.min(logits.dims().cols()),
            top_p: self.top_p,
            guidance: self.guidance,
            seed: self.seed,
        };
        dev.sample(Stream::COMPUTE, &a)
    }

    /// The most likely index for each row of `logits` `[B, V]`, `[B]` i32, on the device.
    pub(super) fn greedy(tape: &Tape, logits: &Tensor) -> Result<Tensor> {
        // No random numbers are drawn.
        let zeros = vec![0; logits.dims().rows()];
        let (number, position) = (indices(tape, &zeros)?, indices(tape, &zeros)?);
        Sampling::GREEDY.choose(tape.dev(), logits, &number, &position)
    }

    /// Copies results of [`Sampling::choose`], `[B]` or one row `[.., B]` for each call, to the host. Fails if an index is
    /// -1.
    pub fn chosen(dev: &dyn Kernels, idx: &Tensor) -> Result<Vec<i32>> {
        let (idx, b) = (idx.to_host::<i32>(dev)?, idx.dims().cols());
        match idx.iter().position(|&i| i < 0) {
            None => Ok(idx),
            Some(n) => Err(Error::arg(
                "sample",
                "logits",
                format!("row {} with NaN or without a finite maximum", n % b),
                "rows without NaN and with a finite maximum",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cpu;

    #[test]
    fn what_cannot_be_sampled_is_an_error() {
        let dev = Cpu::poisoned(1).unwrap();
        let int = |v: &[i32]| Tensor::from_host(&dev, Role::Input, v, [v.len()]).unwrap();
        let all = Sampling { guidance: 1.0, ..Sampling::default() };
        let choose = |s: Sampling, rows: &[[f64; 2]]| {
            let logits =
                Tensor::from_f64(&dev, Role::Input, DType::F32, rows.as_flattened(), [rows.len(), 2])?;
            Sampling::chosen(&dev, &s.choose(&dev, &logits, &int(&[0, 1]), &int(&[0, 0]))?)
        };
        for (s, key) in [
            (Sampling { temperature: -0.1, ..all }, "temperature"),
            (Sampling { temperature: f64::INFINITY, ..all }, "temperature"),
            (Sampling { top_p: 0.0, ..all }, "top_p"),
            (Sampling { top_p: 1.1, ..all }, "top_p"),
            (Sampling { top_p: f64::NAN, ..all }, "top_p"),
            (Sampling { guidance: f64::NAN, ..all }, "guidance"),
        ] {
            let e = choose(s, &[[0.0, 1.0]; 2]).unwrap_err().to_string();
            assert!(e.contains(&format!("`{key}`")) && e.contains(", wanted "), "{e}");
        }
        for bad in [[0.0, f64::NAN], [f64::NEG_INFINITY; 2], [1.0, f64::INFINITY]] {
            for s in [all, Sampling::GREEDY] {
                let e = choose(s, &[[0.0, 1.0], bad]).unwrap_err().to_string();
                assert!(e.starts_with("sample: argument `logits` is ") && e.contains("row 1"), "{e}");
            }
        }
        let e = choose(all, &[[0.0, 1.0]; 3]).unwrap_err().to_string();
        assert!(e.contains("`logits` is [3, 2], wanted 2 or 4 rows"), "{e}");
        assert!(!all.is_guided() && Sampling::default().is_guided());
    }

    #[test]
    fn rows_without_the_prompt_stand_behind_those_with_it() {
        let dev = Cpu::poisoned(1).unwrap();
        let int = |v: &[i32]| Tensor::from_host(&dev, Role::Input, v, [v.len()]).unwrap();
        // With the prompt, the first index is best; the difference that the prompt makes favours the second.
        let rows = [[1.0, 0.9], [0.0, 2.0], [1.0, 0.0], [0.0, 2.0]];
        let logits = Tensor::from_f64(&dev, Role::Input, DType::F64, rows.as_flattened(), [4, 2]).unwrap();
        let best = |guidance| {
            let s = Sampling { guidance, ..Sampling::GREEDY };
            let position = int(&[5, 6]);
            let idx = s.choose(&dev, &logits, &int(&[0, 1]), &position).unwrap();
            assert_eq!(position.to_host::<i32>(&dev).unwrap(), [6, 7]);
            Sampling::chosen(&dev, &idx).unwrap()
        };
        assert_eq!((best(1.0), best(3.0)), (vec![0, 1], vec![1, 1]));
    }
}
