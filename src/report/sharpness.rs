//! Sharpness of a quantizer's choice at the start of training. Codebook collapse has been reported if the softmax is
//! nearly one-hot or flat: either way the soft gradient carries no information to the encoder.

use rayon::prelude::*;
use serde::Serialize;

use crate::autograd::Tape;
use crate::error::Result;
use crate::model::Ett;
use crate::tensor::Tensor;

/// Number of tokens to measure.
const TOKENS: usize = 64;
/// Nats from 0, and from the entropy of a uniform distribution, below which a softmax counts as one-hot or flat.
const ONE_HOT: f64 = 0.05;
const FLAT: f64 = 0.01;

/// Means over the tokens of one batch, with respect to all codes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Sharpness {
    /// Standard deviation of a token's scores.
    pub logit_spread: f64,
    /// Entropy of `softmax(S)`, in nats.
    pub softmax_entropy: f64,
    /// Largest probability.
    pub top: f64,
    /// Entropy of the uniform distribution, ln K.
    pub uniform_entropy: f64,
}

impl Sharpness {
    /// Measures the first tokens of `z` `[M, D]` against the model's codebook.
    pub fn measure(model: &Ett, z: &Tensor) -> Result<Self> {
        let dev = &**model.params.device();
        let t = Tape::inference(model.params.device().clone(), model.params.precision());
        let e = model.tokenizer.codes(&t, &model.params)?;
        let (m, d) = (z.dims().rows().min(TOKENS), z.dims().cols());
        let (z, e) = (z.rows(0, m)?.to_f64(dev)?, e.value().to_f64(dev)?);
        Ok(Self::of(&z, &e, d))
    }

    /// Measures tokens `[M, D]` against codes `[K, D]`.
    fn of(z: &[f64], e: &[f64], d: usize) -> Self {
        let k = (e.len() / d) as f64;
        let rows: Vec<[f64; 3]> = z
            .par_chunks(d)
            .map(|z| {
                let s: Vec<f64> = e.chunks(d).map(|e| z.iter().zip(e).map(|(a, b)| a * b).sum()).collect();
                let mean = s.iter().sum::<f64>() / k;
                let spread = (s.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / k).sqrt();
                let max = s.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
                let cross: f64 = s.iter().map(|s| (s - max).exp() * (s - max)).sum();
                [spread, sum.ln() - cross / sum, 1.0 / sum]
            })
            .collect();
        let mean = |i: usize| rows.iter().map(|r| r[i]).sum::<f64>() / rows.len().max(1) as f64;
        Sharpness { logit_spread: mean(0), softmax_entropy: mean(1), top: mean(2), uniform_entropy: k.ln() }
    }

    /// A warning with a remedy if the softmax is nearly one-hot or flat.
    pub fn warning(&self) -> Option<String> {
        let (h, most) = (self.softmax_entropy, self.uniform_entropy);
        if most == 0.0 {
            // There is only one code.
            return None;
        }
        let seen = format!("entropy {h:.3} of {most:.3} nats, logit spread {:.3}", self.logit_spread);
        if h < ONE_HOT {
            return Some(format!(
                "the quantizer's softmax is nearly one-hot ({seen}): the soft gradient vanishes and codes may die; lower \
                 quantizer.init_scale or use quantizer.metric = \"l2norm\""
            ));
        }
        if most - h < FLAT {
            return Some(format!(
                "the quantizer's softmax is nearly flat ({seen}): the soft gradient barely distinguishes codes; raise \
                 quantizer.init_scale"
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sharpness_of_known_scores() {
        // One token, and codes with scores 0 and ln 3: probabilities 1/4 and 3/4.
        let s = Sharpness::of(&[1.0], &[0.0, 3f64.ln()], 1);
        assert!((s.top - 0.75).abs() < 1e-12 && (s.logit_spread - 3f64.ln() / 2.0).abs() < 1e-12);
        let h = -(0.25 * 0.25f64.ln() + 0.75 * 0.75f64.ln());
        assert!((s.softmax_entropy - h).abs() < 1e-12 && s.warning().is_none());
        let sharp = Sharpness::of(&[1.0], &[0.0, 40.0], 1).warning().expect("one-hot");
        assert!(sharp.contains("one-hot") && sharp.contains("init_scale"), "{sharp}");
        let flat = Sharpness::of(&[1e-3], &[0.0, 1.0], 1).warning().expect("flat");
        assert!(flat.contains("flat"), "{flat}");
        assert_eq!(Sharpness::of(&[1.0], &[2.0], 1).warning(), None);
    }
}
