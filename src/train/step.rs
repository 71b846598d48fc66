//! One training step of any stage: forward, discriminator first, backward, optimizers.

use std::ops::Range;

use super::Optimizer;
use crate::autograd::{Tape, Var};
use crate::backend::{Slot, StepState};
use crate::error::{Error, Result};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Packed, Part};
use crate::ops::{self, BatchStats, RowStatistics};
use crate::tensor::Tensor;

/// The losses, in the order of their weights in the step state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Loss {
    /// Cross-entropy of text, a token.
    Cap,
    /// Mean absolute error of the reconstruction.
    Rec,
    /// Perceptual distance.
    Lpips,
    /// Generator's adversarial loss.
    Gan,
    /// Quantization.
    Quant,
    /// Mean entropy of a token's code distribution: lowered.
    EntSample,
    /// Entropy of the average code distribution: raised.
    EntAvg,
    /// Discriminator's hinge loss.
    DHinge,
    /// Discriminator's regulariser.
    DLecam,
    /// Cross-entropy of codes, a code.
    Code,
}

impl Loss {
    /// All of them.
    pub const ALL: [Loss; 10] = [
        Loss::Cap,
        Loss::Rec,
        Loss::Lpips,
        Loss::Gan,
        Loss::Quant,
        Loss::EntSample,
        Loss::EntAvg,
        Loss::DHinge,
        Loss::DLecam,
        Loss::Code,
    ];

    /// Name in metrics and dumps.
    pub fn name(self) -> &'static str {
        match self {
            Loss::Cap => "cap",
            Loss::Rec => "rec",
            Loss::Lpips => "lpips",
            Loss::Gan => "gan",
            Loss::Quant => "quant",
            Loss::EntSample => "ent_sample",
            Loss::EntAvg => "ent_avg",
            Loss::DHinge => "d_hinge",
            Loss::DLecam => "d_lecam",
            Loss::Code => "code",
        }
    }

    /// Its place among the weights of the step state.
    pub fn slot(self) -> Slot {
        Slot::Weight(self as usize)
    }
}

/// What a stage does with the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TokenizerMode {
    /// Not used.
    Off,
    /// Only its codes are looked up.
    Frozen,
    /// Trained; its own losses count with this weight, and 0 turns the decoder off.
    Trained(f64),
}

/// What a stage computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Tokenizer.
    pub tokenizer: TokenizerMode,
    /// Text loss.
    pub text: bool,
    /// Code loss.
    pub codes: bool,
}

impl Recipe {
    /// Sets the weights of all losses in the step state.
    pub fn weights(&self, model: &Ett, state: &mut StepState) {
        let l = &model.cfg.loss;
        let alpha = match self.tokenizer {
            TokenizerMode::Trained(alpha) => alpha,
            _ => 0.0,
        };
        for (loss, w) in [
            (Loss::Cap, if self.text { 1.0 } else { 0.0 }),
            (Loss::Rec, alpha * l.rec),
            (Loss::Lpips, alpha * l.lpips),
            (Loss::Gan, alpha * l.gan),
            (Loss::Quant, alpha * l.quant),
            (Loss::EntSample, alpha * l.entropy),
            (Loss::EntAvg, -alpha * l.entropy),
            (Loss::DHinge, 1.0),
            (Loss::DLecam, l.lecam),
            (Loss::Code, if self.codes { 1.0 } else { 0.0 }),
        ] {
            state.set(loss.slot(), w);
        }
    }

    /// True if reconstructions are made and judged.
    fn reconstructs(&self) -> bool {
        matches!(self.tokenizer, TokenizerMode::Trained(alpha) if alpha > 0.0)
    }
}

/// One batch on the device.
pub struct Batch {
    /// Images `[B, H, W, 3]` in [-1, 1], one tensor a size.
    pub images: Vec<Tensor>,
    /// Sequences over these images.
    pub packed: Option<Packed>,
}

impl Batch {
    /// Packs sequences over images of these grids (see [`Packed::new`]).
    pub fn pack(model: &Ett, sequences: &[Vec<Part>], grids: &[Grid], pad: usize) -> Result<Packed> {
        let mut rows: Vec<Range<usize>> = Vec::new();
        for g in grids {
            for _ in 0..g.images {
                let start = rows.last().map_or(0, |r| r.end);
                rows.push(start..start + g.h * g.w);
            }
        }
        Packed::new(&**model.params.device(), sequences, &rows, pad)
    }
}

/// What a step leaves behind.
#[derive(Default)]
pub struct Outcome {
    /// Terms of each loss; a loss is the sum of its terms.
    pub terms: Vec<(Loss, Tensor)>,
    /// Quantizer input `[M, D]`.
    pub z: Option<Tensor>,
    /// Codes `[M]` i32.
    pub idx: Option<Tensor>,
    /// Quantizer output `[M, D]`.
    pub zq: Option<Tensor>,
    /// Reconstructions, one tensor a size.
    pub rec: Vec<Tensor>,
    /// Hidden states that predict supervised tokens, `[n, C]`.
    pub selected: Option<Tensor>,
    /// Row statistics of the quantizer.
    pub rows: Option<RowStatistics>,
    /// Tokens without a finite score, `[1]`.
    pub bad: Option<Tensor>,
}

impl Outcome {
    /// The value of a loss; 0 if the step had none. Waits for the device.
    pub fn value(&self, model: &Ett, loss: Loss) -> Result<f64> {
        let mut sum = 0.0;
        for (_, t) in self.terms.iter().filter(|(l, _)| *l == loss) {
            sum += t.to_f64(&**model.params.device())?[0];
        }
        Ok(sum)
    }
}

/// Runs one step. `main` trains the recipe's groups, `disc` the discriminator; gradients start from zero. The
/// step state must have been sent.
pub fn step(
    model: &mut Ett,
    recipe: &Recipe,
    batch: &Batch,
    state: &StepState,
    main: &Optimizer,
    disc: Option<&Optimizer>,
) -> Result<Outcome> {
    model.params.zero_grad()?;
    let t = Tape::new(model.params.device().clone(), model.params.precision());
    let mut out = Outcome::default();
    let mut losses: Vec<(Loss, Var)> = Vec::new();
    let images: Vec<Var> = batch.images.iter().map(|x| t.constant(x.clone())).collect();
    let mut visual = None;
    if recipe.tokenizer != TokenizerMode::Off {
        let (z, grids) = model.tokenizer.encode(&t, &model.params, &images)?;
        let codes = model.tokenizer.codes(&t, &model.params)?;
        out.z = Some(z.value().clone());
        let (zq, idx) = match recipe.tokenizer {
            TokenizerMode::Trained(alpha) => {
                let q = model.tokenizer.quantize(&t, &z, &codes, 1.0 / z.dims()[0] as f64)?;
                if alpha > 0.0 {
                    losses.push((Loss::Quant, q.quant));
                    losses.extend(q.sample.map(|v| (Loss::EntSample, v)));
                    losses.extend(q.avg.map(|v| (Loss::EntAvg, v)));
                }
                (out.rows, out.bad) = (q.rows, q.bad);
                (q.zq, q.idx)
            }
            _ => model.look_up(&t, &z, &codes)?,
        };
        if recipe.reconstructs() {
            let rec = model.tokenizer.decode(&t, &model.params, &zq, &grids)?;
            reconstruction_losses(model, &t, &images, &rec, state, disc, &mut losses, &mut out)?;
            out.rec = rec.iter().map(|r| r.value().clone()).collect();
        }
        out.zq = Some(zq.value().clone());
        out.idx = Some(idx.clone());
        visual = Some((zq, idx));
    }
    if recipe.text || recipe.codes {
        let packed = batch.packed.as_ref().ok_or_else(|| {
            Error::arg("step", "batch.packed", "none", "sequences, in a stage with a text loss")
        })?;
        let rows = match &visual {
            Some((zq, idx)) => Some(model.visual_rows(&t, zq, idx)?),
            None => None,
        };
        let hidden = model.hidden(&t, rows.as_ref(), packed)?;
        if recipe.text {
            let (selected, loss) = model.text_loss(&t, &hidden, packed, &state.slot(Slot::InvTokens)?)?;
            out.selected = Some(selected.value().clone());
            losses.push((Loss::Cap, loss));
        }
        if recipe.codes {
            let idx = match &visual {
                Some((_, idx)) => idx.to_host::<i32>(t.dev())?,
                None => return Err(Error::arg("step", "recipe.tokenizer", "off", "on, to predict codes")),
            };
            let loss = model.code_loss(&t, &hidden, packed, &idx, &state.slot(Slot::InvCodes)?)?;
            losses.push((Loss::Code, loss));
        }
    }
    backward(t, &losses, state)?;
    main.apply(&model.params, state)?;
    out.terms.extend(losses.into_iter().map(|(l, v)| (l, v.value().clone())));
    Ok(out)
}

/// Seeds every loss with its weight from the step state and runs the tape backwards.
fn backward(t: Tape, losses: &[(Loss, Var)], state: &StepState) -> Result<()> {
    let weights: Vec<Tensor> = losses.iter().map(|(l, _)| state.slot(l.slot())).collect::<Result<_>>()?;
    let seeds: Vec<(&Var, &Tensor)> = losses.iter().map(|(_, v)| v).zip(&weights).collect();
    t.backward(&seeds)?;
    Ok(())
}

/// Steps the discriminator on real images and detached reconstructions, then adds the generator's losses: mean
/// absolute error, perceptual distance, and the judgement of the discriminator just stepped.
#[allow(clippy::too_many_arguments)]
fn reconstruction_losses(
    model: &mut Ett,
    t: &Tape,
    images: &[Var],
    rec: &[Var],
    state: &StepState,
    disc: Option<&Optimizer>,
    losses: &mut Vec<(Loss, Var)>,
    out: &mut Outcome,
) -> Result<()> {
    let elements: usize = images.iter().map(|x| x.dims().numel()).sum();
    let count: usize = images.iter().map(|x| x.dims()[0]).sum();
    let mut passes: Vec<Vec<BatchStats>> = Vec::new();
    if let Some(disc) = disc {
        discriminator_step(model, images, rec, state, disc, &mut passes, out)?;
    }
    for (x, r) in images.iter().zip(rec) {
        losses.push((Loss::Rec, ops::l1(t, r, x, 1.0 / elements as f64)?));
        if model.cfg.loss.lpips > 0.0 {
            let terms = model.lpips.distance(t, &model.params, x, r, 1.0 / count as f64)?;
            losses.extend(terms.into_iter().map(|v| (Loss::Lpips, v)));
        }
        if disc.is_some() {
            let (logits, stats) = model.discriminator.forward(t, &model.params, r, true)?;
            let d = logits.dims();
            let logits = ops::reshape(t, &logits, [d[0], d[1] * d[2]])?;
            losses.push((Loss::Gan, ops::gan_generator(t, &logits, 1.0 / count as f64)?));
            passes.push(stats);
        }
    }
    let dev = model.params.device().clone();
    model.discriminator.commit(&*dev, &mut model.discriminator_state, &passes)
}

fn discriminator_step(
    model: &mut Ett,
    images: &[Var],
    rec: &[Var],
    state: &StepState,
    disc: &Optimizer,
    passes: &mut Vec<Vec<BatchStats>>,
    out: &mut Outcome,
) -> Result<()> {
    let dev = model.params.device().clone();
    let t = Tape::new(dev.clone(), model.params.precision());
    let mut judge = |xs: &[Var]| -> Result<Var> {
        let mut logits = Vec::new();
        for x in xs {
            let x = t.constant(x.value().clone());
            let (l, stats) = model.discriminator.forward(&t, &model.params, &x, false)?;
            passes.push(stats);
            logits.push(ops::reshape(&t, &l, [l.dims().numel(), 1])?);
        }
        match &logits[..] {
            [one] => Ok(one.clone()),
            all => ops::concat_rows(&t, &all.iter().collect::<Vec<_>>()),
        }
    };
    let (real, fake) = (judge(images)?, judge(rec)?);
    let half = 0.5 / real.dims().numel() as f64;
    let averages = model.discriminator.lecam_after(&t, &model.discriminator_state, &real, &fake)?;
    let losses = [
        (Loss::DHinge, ops::hinge(&t, &real, true, half)?),
        (Loss::DHinge, ops::hinge(&t, &fake, false, half)?),
        (Loss::DLecam, ops::lecam(&t, &real, &fake, &averages)?),
    ];
    backward(t, &losses, state)?;
    disc.apply(&model.params, state)?;
    model.discriminator.commit_lecam(&*dev, &model.discriminator_state, &averages)?;
    out.terms.extend(losses.into_iter().map(|(l, v)| (l, v.value().clone())));
    Ok(())
}
