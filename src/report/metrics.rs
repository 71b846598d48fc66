//! Metrics of a run: one line of `metrics.jsonl` per step, and the text of the progress bar.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use crate::error::{Error, Result};

/// One line of `metrics.jsonl`.
#[derive(Default, Serialize)]
pub(crate) struct Line {
    pub stage: &'static str,
    /// Index of the stage in the run.
    pub number: usize,
    /// Step in the stage, from 0.
    pub step: usize,
    pub rate: f64,
    pub loss: BTreeMap<&'static str, f64>,
    pub grad_norm: f64,
    /// Number of updates skipped so far.
    pub skipped: usize,
    /// Number of visual tokens of this step without a finite score for any code.
    pub unscored: usize,
    /// Distinct codes among the last `train.usage_window` tokens, and the exponential of their entropy.
    pub codes_used: usize,
    pub code_perplexity: f64,
    pub images_per_s: f64,
    pub tokens_per_s: f64,
    /// Time spent waiting until the batch was prepared, in ms.
    pub waited_ms: f64,
    /// Peak device memory so far, in MiB.
    pub memory_mib: f64,
    /// Held-out results, in steps with an evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<BTreeMap<&'static str, f64>>,
    /// Sharpness of the quantizer's choice, in the first step of a stage that trains it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantizer: Option<super::sharpness::Sharpness>,
}

impl Line {
    /// The line as JSON, without a line break.
    pub fn json(&self) -> Result<String> {
        serde_json::to_string(self)
            .map_err(|e| Error::data("metrics", format!("a line cannot be written ({e})")))
    }
}

/// Codebook usage of the last tokens.
pub(crate) struct Usage {
    window: VecDeque<i32>,
    counts: Vec<u32>,
    most: usize,
}

impl Usage {
    /// Usage over the last `most` tokens of `codes` codes, continued from `window`.
    pub fn new(codes: usize, most: usize, window: &[i32]) -> Self {
        let mut usage = Usage { window: VecDeque::new(), counts: vec![0; codes], most };
        usage.add(window);
        usage
    }

    /// Adds tokens.
    pub fn add(&mut self, idx: &[i32]) {
        for &i in idx {
            let Some(count) = usize::try_from(i).ok().and_then(|i| self.counts.get_mut(i)) else { continue };
            *count += 1;
            self.window.push_back(i);
            if self.window.len() > self.most
                && let Some(old) = self.window.pop_front()
            {
                self.counts[old as usize] -= 1;
            }
        }
    }

    /// Number of distinct codes, and the exponential of their entropy.
    pub fn measure(&self) -> (usize, f64) {
        code_usage(self.counts.iter().map(|&c| c as usize))
    }

    /// The tokens of the window.
    pub fn window(&self) -> Vec<i32> {
        self.window.iter().copied().collect()
    }
}

/// The number of distinct codes and the exponential of their entropy, from the count of each code.
pub(crate) fn code_usage(counts: impl Iterator<Item = usize> + Clone) -> (usize, f64) {
    let used = counts.filter(|&c| c > 0);
    let total = used.clone().sum::<usize>().max(1) as f64;
    let entropy: f64 = used.clone().map(|c| c as f64 / total).map(|p| -p * p.ln()).sum();
    (used.count(), entropy.exp())
}

/// Averages of the losses for the progress bar.
#[derive(Default)]
pub(crate) struct Smooth {
    loss: BTreeMap<&'static str, f64>,
    rate: f64,
}

impl Smooth {
    pub fn message(&mut self, line: &Line) -> String {
        for (&name, &v) in line.loss.iter().filter(|(_, v)| v.is_finite()) {
            let old = self.loss.entry(name).or_insert(v);
            *old += 0.05 * (v - *old);
        }
        let speed = &mut self.rate;
        *speed += if *speed == 0.0 { line.images_per_s } else { 0.05 * (line.images_per_s - *speed) };
        let shown: Vec<String> = ["cap", "code", "rec", "quant", "lpips", "gan"]
            .iter()
            .filter_map(|n| self.loss.get(n).map(|v| format!("{n} {v:.3}")))
            .collect();
        format!("{} {:.0}/s", shown.join(" "), self.rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_forgets_what_left_the_window() {
        let mut u = Usage::new(8, 4, &[7]);
        u.add(&[0, 0, 1]);
        assert_eq!(u.measure().0, 3);
        u.add(&[1, -1, 9]);
        assert_eq!((u.window(), u.measure().0), (vec![0, 0, 1, 1], 2));
        assert!((u.measure().1 - 2.0).abs() < 1e-12);
        assert_eq!(Usage::new(8, 4, &[]).measure(), (0, 1.0));
    }
}
