//! Cross-entropy of a linear layer. Each task stores the logits of only one tile of rows and vocabulary at a time; rows
//! without a target are skipped.

use std::ops::Range;

use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::is_narrow;

/// Rows of a tile.
pub(super) const ROWS: usize = 256;
/// Vocabulary entries of a tile.
pub(super) const VOCAB: usize = 2048;
/// Maximum number of shares of the vocabulary in the backward pass. Each has its own partial gradient of a block of
/// rows, to which its tiles are added in order.
const PARTS: usize = 16;
/// Number of statistics of a row and a tile.
pub(super) const NOTES: usize = 3;

/// Upper bounds of the sizes of a call, if every row is supervised.
pub(super) struct Most {
    pub(super) rows: usize,
    pub(super) cols: usize,
    vocab: usize,
    pub(super) act: DType,
}

impl Most {
    pub(super) fn new(x: &In, w: &In) -> Self {
        Most { rows: x.dims.rows(), cols: x.dims.cols(), vocab: w.dims.rows(), act: x.dtype }
    }

    /// Elements of the packed rows.
    pub(super) fn packed(&self) -> usize {
        self.rows.saturating_mul(self.cols)
    }

    /// Number of pairs of a tile of the vocabulary and a block of rows.
    pub(super) fn tiles(&self) -> usize {
        self.vocab.div_ceil(VOCAB).saturating_mul(self.rows.div_ceil(ROWS))
    }

    /// Elements of the statistics of the forward pass, [`NOTES`] per row and tile of the vocabulary.
    pub(super) fn notes(&self) -> usize {
        self.vocab.div_ceil(VOCAB).saturating_mul(self.rows).saturating_mul(NOTES)
    }

    /// Elements of the converted weights and of the logits of a tile.
    pub(super) fn parts(&self) -> [usize; 2] {
        let vocab = VOCAB.min(self.vocab);
        let weights = if is_narrow(self.act) { vocab.saturating_mul(self.cols) } else { 0 };
        [weights, ROWS.min(self.rows) * vocab]
    }

    /// Vocabulary entries of a share in the backward pass.
    pub(super) fn share(&self) -> usize {
        self.vocab.div_ceil(PARTS).max(ROWS)
    }

    pub(super) fn shares(&self) -> usize {
        self.vocab.div_ceil(self.share())
    }

    /// Elements of the partial gradients of a block of rows, for all shares.
    pub(super) fn partial(&self) -> usize {
        self.shares().saturating_mul(ROWS.min(self.rows)).saturating_mul(self.cols)
    }
}

/// The supervised rows of a call, packed into a contiguous matrix.
pub(super) struct Packed<'a, E: Elem> {
    /// Their indices in the batch.
    pub(super) at: Vec<usize>,
    pub(super) target: Vec<usize>,
    /// `[at.len(), C]`.
    pub(super) x: Scratch<'a, E::Acc>,
    pub(super) w: Rows<'a, E>,
}

impl<'a, E: Elem> Packed<'a, E> {
    pub(super) fn new(ws: &'a Workspace, op: &'static str, x: &In, w: &In<'a>, target: &In) -> Result<Self> {
        let (x, w) = (rows::<E>(op, "x", x)?, rows::<E>(op, "w", w)?);
        let target = flat::<i32>(op, "target", target)?;
        if let Some(t) = target.iter().find(|&&t| t >= 0 && t as usize >= w.rows) {
            return Err(Error::arg(op, "target", t, format!("less than the {} rows of w", w.rows)));
        }
        let at: Vec<usize> = (0..x.rows).filter(|&n| target[n] >= 0).collect();
        let mut packed = ws.scratch::<E::Acc>(x.rows * x.cols)?;
        packed.par_chunks_mut(x.cols.max(1)).zip(&at).with_min_len(64).for_each(|(out, &n)| {
            for (o, &v) in out.iter_mut().zip(x.row(n)) {
                *o = v.up();
            }
        });
        let target = at.iter().map(|&n| target[n] as usize).collect();
        Ok(Packed { at, target, x: packed, w })
    }

    pub(super) fn cols(&self) -> usize {
        self.w.cols
    }

    /// Packed rows `r`.
    pub(super) fn rows(&self, r: &Range<usize>) -> Mat<'_, E::Acc> {
        let c = self.cols();
        Mat::new(&self.x[r.start * c..r.end * c], r.len(), c, c)
    }

    /// Rows `v` of the weights, converted into `buf` unless they are stored in the accumulator type.
    pub(super) fn weights<'b>(&'b self, v: &Range<usize>, buf: &'b mut [E::Acc]) -> Mat<'b, E::Acc> {
        let (c, ld) = (self.cols(), self.w.ld);
        if E::DTYPE == E::Acc::DTYPE {
            let end = (v.end - 1) * ld + c;
            return Mat::new(bytemuck::cast_slice(&self.w.data()[v.start * ld..end]), v.len(), c, ld);
        }
        for (i, out) in v.clone().zip(buf.chunks_mut(c.max(1))) {
            for (o, &w) in out.iter_mut().zip(self.w.row(i)) {
                *o = w.up();
            }
        }
        Mat::new(buf, v.len(), c, c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::args::*;

    /// N, C, V and `every`: each `every`-th row is supervised.
    type Case = (usize, usize, usize, usize);

    const SMALL: [Case; 3] = [(1, 1, 1, 1), (7, 3, 13, 1), (11, 5, 31, 3)];

    const LARGE: [Case; 2] = [(2 * ROWS + 3, 7, VOCAB + 5, 2), (37, 3, PARTS * VOCAB + 1234, 5)];

    /// x, w, target, scale, g and dw.
    fn args((n, c, v, every): Case) -> Vec<Arg> {
        let target = (0..n).map(|i| if i % every == 0 { (i * 7919 % v) as f64 } else { -1.0 }).collect();
        vec![
            act([n, c], normal(1, n * c)),
            act([v, c], normal(2, v * c)),
            int([n], target),
            acc([1], vec![0.125]),
            acc([1], vec![1.5]),
            acc([v, c], vec![0.0; v * c]),
        ]
    }

    /// lse and loss.
    fn run_fwd(dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
        let (lse, loss) = (out(dev, p.acc, [t[0].dims().rows()]), out(dev, p.acc, [1]));
        let a = LinearXentFwd {
            x: t[0].view(),
            w: t[1].view(),
            target: t[2].view(),
            scale: t[3].view(),
            lse: lse.out(),
            loss: loss.out(),
        };
        dev.linear_xent_fwd(S, &a)?;
        Ok(vec![lse, loss])
    }

    /// dx and dw; dx is written into columns of a wider tensor.
    fn run_bwd(dev: &Cpu, p: Precision, t: &[Tensor]) -> Result<Vec<Tensor>> {
        let lse = &run_fwd(dev, p, t)?[0];
        let (n, c) = (t[0].dims().rows(), t[0].dims().cols());
        let dx = out(dev, p.act, [n, c + 2]).columns(1, c)?;
        let a = LinearXentBwd {
            x: t[0].view(),
            w: t[1].view(),
            target: t[2].view(),
            scale: t[3].view(),
            lse: lse.view(),
            g: t[4].view(),
            dx: dx.out(),
            dw: Some(t[5].acc()),
        };
        dev.linear_xent_bwd(S, &a)?;
        let alone = out(dev, p.act, [n, c]);
        dev.linear_xent_bwd(S, &LinearXentBwd { dx: alone.out(), dw: None, ..a })?;
        assert_eq!(alone.to_f64(dev)?, dx.to_f64(dev)?);
        Ok(vec![dx, t[5].clone()])
    }

    fn naive((n, c, v, _): Case, t: &[Vec<f64>]) -> [Vec<f64>; 4] {
        let (mut lse, mut loss) = (vec![0.0; n], vec![0.0]);
        let (mut dx, mut dw) = (vec![0.0; n * c], t[5].clone());
        for i in (0..n).filter(|&i| t[2][i] >= 0.0) {
            let dot = |j: usize| (0..c).map(|k| t[0][i * c + k] * t[1][j * c + k]).sum::<f64>();
            let logits: Vec<f64> = (0..v).map(dot).collect();
            lse[i] = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
            loss[0] += t[3][0] * (lse[i] - logits[t[2][i] as usize]);
            for j in 0..v {
                let hit = if j == t[2][i] as usize { 1.0 } else { 0.0 };
                let d = t[3][0] * t[4][0] * ((logits[j] - lse[i]).exp() - hit);
                for k in 0..c {
                    dx[i * c + k] += d * t[1][j * c + k];
                    dw[j * c + k] += d * t[0][i * c + k];
                }
            }
        }
        [lse, loss, dx, dw]
    }

    #[test]
    fn forward_and_backward_match_a_naive_loop() {
        for case in SMALL[1..].iter().chain(&LARGE) {
            check(&args(*case), |t| naive(*case, t)[..2].to_vec(), run_fwd);
            check(&args(*case), |t| naive(*case, t)[2..].to_vec(), run_bwd);
        }
    }

    #[test]
    fn backward_matches_finite_differences() {
        for case in SMALL {
            let loss =
                |dev: &Cpu, t: &[Tensor]| Ok(1.5 * run_fwd(dev, Precision::F64, t)?[1].to_f64(dev)?[0]);
            check_grad(&args(case), &[0, 1], loss, |dev, t| run_bwd(dev, Precision::F64, t));
        }
    }

    #[test]
    fn nothing_supervised_costs_nothing() {
        let mut args = args(SMALL[1]);
        args[2].2.fill(-1.0);
        args[3].2[0] = f64::INFINITY;
        check(&args, |_| vec![vec![0.0; 7], vec![0.0]], run_fwd);
        check(&args, |_| vec![vec![0.0; 21], vec![0.0; 39]], run_bwd);
    }

    #[test]
    fn large_logits_stay_finite() {
        let mut args = args(SMALL[2]);
        args[0].2.iter_mut().for_each(|x| *x *= 1e4);
        let dev = Cpu::poisoned(2).unwrap();
        let t = tensors(&dev, Precision::F32, &args);
        let results =
            [run_fwd(&dev, Precision::F32, &t).unwrap(), run_bwd(&dev, Precision::F32, &t).unwrap()];
        for v in read(&dev, &results.concat()) {
            assert!(v.iter().all(|x| x.is_finite()));
        }
    }

    #[test]
    fn a_target_beyond_the_vocabulary_is_an_error() {
        let mut args = args(SMALL[1]);
        args[2].2[3] = 13.0;
        let dev = Cpu::poisoned(2).unwrap();
        let e = run_fwd(&dev, Precision::F32, &tensors(&dev, Precision::F32, &args)).unwrap_err();
        assert_eq!(
            e.to_string(),
            "linear_xent_fwd: argument `target` is 13, wanted less than the 13 rows of w"
        );
    }
}
