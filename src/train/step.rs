//! One training step of any stage: forward, discriminator update, backward, optimizers.

use std::collections::{BTreeMap, BTreeSet};

use super::Optimizer;
use super::StepState;
use crate::autograd::{Recomputing, Tape, Var};
use crate::backend::{
    Accumulate, Cast, DType, Fill, Kernels, Pending, Reduction, Restore, Role, ScaleBytes, Slot, Stream,
};
use crate::config::Recompute;
use crate::error::{Error, Result};
use crate::feed::Batch;
use crate::model::{BACKWARD, Carried, Ett, MODULES, TrainedBy};
use crate::nn::Reducer;
use crate::ops::{self, BatchStats};
use crate::tensor::{Tensor, to_f64};

/// The losses, in the order of their weights in the step state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Loss {
    /// Cross-entropy of text, per token.
    Cap,
    /// Mean absolute error of the reconstruction.
    Rec,
    /// Perceptual distance.
    Lpips,
    /// Generator's adversarial loss.
    Gan,
    /// Quantization.
    Quant,
    /// Mean entropy of a token's code distribution, which is minimised.
    EntSample,
    /// Entropy of the average code distribution, which is maximised.
    EntAvg,
    /// Discriminator's hinge loss.
    DHinge,
    /// Discriminator's regulariser.
    DLecam,
    /// Cross-entropy of codes, per code.
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

    /// Its slot among the loss weights of the step state.
    pub fn slot(self) -> Slot {
        Slot::Weight(self as usize)
    }

    /// True if the loss is a mean over one part of the batch; the others are means over the whole batch. The average
    /// entropy is not a sum over tokens, and the quantizer uses a single count for all its losses.
    fn of_a_part(self) -> bool {
        matches!(self, Loss::Quant | Loss::EntSample | Loss::EntAvg)
    }
}

/// How a stage uses the tokenizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TokenizerMode {
    /// Not used.
    Off,
    /// Its codes are looked up; nothing of it is trained.
    Frozen,
    /// Trained; its own losses are multiplied by this weight, and 0 turns the decoder off.
    Trained(f64),
}

/// The computation of a stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Tokenizer.
    pub tokenizer: TokenizerMode,
    /// Whether there is a text loss.
    pub text: bool,
    /// Whether there is a code loss.
    pub codes: bool,
}

impl Recipe {
    /// Sets the weights of all losses in the step state, for batches of `parts` equal parts.
    pub fn weights(&self, model: &Ett, state: &mut StepState, parts: usize) {
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
            let share = if loss.of_a_part() { 1.0 / parts as f64 } else { 1.0 };
            state.set(loss.slot(), share * w);
        }
    }

    /// True if the stage computes reconstructions and their losses.
    fn reconstructs(&self) -> bool {
        matches!(self.tokenizer, TokenizerMode::Trained(alpha) if alpha > 0.0)
    }
}

/// Results of a step; activations are those of the last part of the batch.
pub struct Outcome {
    /// What the host reads of every step: the losses in the order of [`Loss::ALL`], the number of tokens without a finite
    /// score, and the norms of the optimizer. Accumulator type.
    report: Tensor,
    /// The losses of this step.
    present: BTreeSet<Loss>,
    /// Number of parts of the batch.
    parts: usize,
    /// Number of ranks.
    ranks: usize,
    /// Quantizer input `[M, D]`.
    pub z: Option<Tensor>,
    /// Codes i32 of each part: `[M]`, or with several ranks those of all of them, and -1 where a rank has fewer than others.
    pub idx: Vec<Tensor>,
    /// Quantizer output `[M, D]`.
    pub zq: Option<Tensor>,
    /// Reconstructions, one tensor per size.
    pub rec: Vec<Tensor>,
    /// Hidden states that predict supervised tokens, `[n, C]`.
    pub selected: Option<Tensor>,
    /// Number of passes that the step adds to the discriminator's running statistics.
    pub passes: u64,
}

/// The group whose gradients come from a tape of its own.
const DISCRIMINATOR: &str = "discriminator";

/// Elements of a report before the norms.
const LOSSES: usize = Loss::ALL.len();
const NORMS: usize = LOSSES + 1;

impl Outcome {
    fn new(model: &Ett, parts: usize, main: &Optimizer) -> Result<Self> {
        let n = NORMS + main.norm().dims().numel();
        Ok(Outcome {
            report: Tensor::zeros(
                &**model.params.device(),
                Role::Activation,
                model.params.precision().acc,
                [n],
            )?,
            present: BTreeSet::new(),
            parts,
            ranks: model.params.device().collectives().ranks(),
            z: None,
            idx: Vec::new(),
            zq: None,
            rec: Vec::new(),
            selected: None,
            passes: 0,
        })
    }

    /// Starts to read the results back.
    pub fn read_later(&self, dev: &dyn Kernels) -> Result<Reading> {
        Ok(Reading {
            report: dev.read_later(Stream::COMPUTE, self.report.view())?,
            dtype: self.report.dtype(),
            idx: self.idx.iter().map(|t| dev.read_later(Stream::COMPUTE, t.view())).collect::<Result<_>>()?,
            present: self.present.clone(),
            parts: self.parts,
            ranks: self.ranks,
        })
    }

    /// The value of a loss; 0 if the step does not have it. Waits for the device.
    pub fn value(&self, model: &Ett, loss: Loss) -> Result<f64> {
        Ok(self.read_later(&**model.params.device())?.wait()?.losses.get(&loss).copied().unwrap_or(0.0))
    }

    /// Number of tokens without a finite score in the whole step. Waits for the device.
    pub fn unscored(&self, model: &Ett) -> Result<usize> {
        Ok(self.read_later(&**model.params.device())?.wait()?.unscored)
    }

    /// The losses from `first` to `last`.
    fn losses(&self, first: Loss, last: Loss) -> Result<Tensor> {
        self.report.range(first as usize, last as usize - first as usize + 1)
    }

    /// `[1]`, the number of tokens without a finite score so far.
    fn bad(&self) -> Result<Tensor> {
        self.report.range(LOSSES, 1)
    }

    /// Adds a value of the device to an element of the report.
    fn add(&self, dev: &dyn Kernels, at: usize, value: &Tensor) -> Result<()> {
        let y = self.report.range(at, 1)?;
        dev.accumulate(Stream::COMPUTE, &Accumulate { x: value.view(), y: y.acc() })
    }
}

/// Results of a step on their way to the host.
pub struct Reading {
    report: Pending,
    dtype: DType,
    idx: Vec<Pending>,
    present: BTreeSet<Loss>,
    parts: usize,
    ranks: usize,
}

/// What the host learns of a step.
pub struct Values {
    /// The losses that the step has.
    pub losses: BTreeMap<Loss, f64>,
    /// Number of tokens without a finite score.
    pub unscored: usize,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// Whether the update was skipped because a value was not finite.
    pub skipped: bool,
    /// Codes of the visual tokens.
    pub idx: Vec<i32>,
}

impl Reading {
    /// Waits until the step is done.
    pub fn wait(self) -> Result<Values> {
        let report = to_f64(self.dtype, &self.report.wait()?);
        let mut idx = Vec::new();
        for pending in self.idx {
            idx.extend(bytemuck::pod_collect_to_vec::<u8, i32>(&pending.wait()?));
        }
        // Every rank computes the entropy of the average over the tokens of all ranks.
        let ranks = |loss: Loss| if loss == Loss::EntAvg { self.ranks.max(1) as f64 } else { 1.0 };
        let share = |loss: Loss| ranks(loss) * if loss.of_a_part() { self.parts.max(1) as f64 } else { 1.0 };
        let norms = &report[NORMS..];
        Ok(Values {
            losses: self.present.into_iter().map(|l| (l, report[l as usize] / share(l))).collect(),
            unscored: report[LOSSES] as usize,
            grad_norm: norms.chunks(2).map(|n| n[0]).sum::<f64>().sqrt(),
            skipped: norms[1] > 0.0,
            idx,
        })
    }
}

/// The denominators of the losses of a batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Supervised text tokens of the whole batch, on all ranks.
    pub tokens: usize,
    /// Supervised codes of the whole batch, on all ranks.
    pub codes: usize,
    /// Pictures of the whole batch, on all ranks.
    pub pictures: usize,
    /// Elements (pixels times channels) of these pictures.
    pub elements: usize,
    /// Patch logits of the discriminator for these pictures.
    pub patches: usize,
    /// Visual tokens of one part of the batch, on all ranks.
    pub visual: usize,
}

impl Counts {
    /// Counts of what this rank has of a batch of equal parts, with this many supervised `tokens` and `codes`.
    pub fn new(model: &Ett, parts: &[Batch], tokens: usize, codes: usize) -> Self {
        let mut all = Counts { tokens, codes, ..Counts::default() };
        let side = model.cfg.tokenizer.downsampling();
        for (i, part) in parts.iter().enumerate() {
            for d in part.images.iter().map(|x| x.dims()) {
                let (n, h, w) = (d[0], d[1], d[2]);
                all.pictures += n;
                all.elements += n * h * w * d[3];
                all.patches += n * model.discriminator.patches(h, w);
                if i == 0 {
                    all.visual += n * (h / side) * (w / side);
                }
            }
        }
        all
    }

    /// As numbers that can be added up over ranks.
    pub fn numbers(&self) -> [u64; 6] {
        let Counts { tokens, codes, pictures, elements, patches, visual } = *self;
        [tokens, codes, pictures, elements, patches, visual].map(|n| n as u64)
    }

    /// The counts of [`Counts::numbers`].
    pub fn of(numbers: [u64; 6]) -> Self {
        let [tokens, codes, pictures, elements, patches, visual] = numbers.map(|n| n as usize);
        Counts { tokens, codes, pictures, elements, patches, visual }
    }

    /// Writes their reciprocals into the step state.
    pub fn set(&self, state: &mut StepState) {
        for (slot, n) in [
            (Slot::InvTokens, self.tokens),
            (Slot::InvCodes, self.codes),
            (Slot::InvPictures, self.pictures),
            (Slot::InvElements, self.elements),
            (Slot::InvPatches, self.patches),
            (Slot::InvVisual, self.visual),
        ] {
            state.set(slot, 1.0 / n.max(1) as f64);
        }
    }
}

/// A copy of the discriminator before a step: it is updated before it is known whether the step will be skipped.
struct Before(Vec<(Tensor, Tensor)>);

impl Before {
    fn new(model: &Ett) -> Result<Self> {
        let dev = &**model.params.device();
        let early = MODULES.iter().filter(|m| m.by == TrainedBy::Discriminator);
        let groups = early.filter_map(|m| model.params.group(m.group));
        let live = groups.flat_map(|g| model.params.stepped(g));
        let live = live.chain(model.carried().into_iter().filter_map(|(_, carried)| match carried {
            Carried::Tensor(t) => Some(t),
            Carried::Count(_) => None,
        }));
        let copy = |x: &Tensor| {
            let kept = Tensor::empty(dev, Role::Activation, x.dtype(), x.dims())?;
            dev.cast(Stream::COMPUTE, &Cast { x: x.view(), y: kept.out() })?;
            Ok((kept, x.clone()))
        };
        Ok(Before(live.map(copy).collect::<Result<_>>()?))
    }

    /// Restores the discriminator if `norm` counts non-finite values.
    fn restore_if_skipped(&self, dev: &dyn Kernels, norm: &Tensor) -> Result<()> {
        for (kept, live) in &self.0 {
            let a = Restore { x: kept.view(), norm: norm.view(), y: live.acc() };
            dev.restore(Stream::COMPUTE, &a)?;
        }
        Ok(())
    }
}

/// Runs one step over the parts of a batch, one after another. With several ranks, all of them call this with what they have
/// of the batch, and get the same losses and weights. `main` trains the recipe's groups, `disc` the
/// discriminator; gradients start from zero. The step state must have been sent to the device, with the loss weights
/// for this number of parts and the counts of this batch. If any loss, gradient or score is not finite, the model
/// does not change.
pub fn step(
    model: &mut Ett,
    recipe: &Recipe,
    parts: &[Batch],
    state: &StepState,
    main: &Optimizer,
    disc: Option<&Optimizer>,
) -> Result<Outcome> {
    model.params.zero_grad()?;
    let dev = model.params.device().clone();
    let mut out = Outcome::new(model, parts.len(), main)?;
    let disc = disc.filter(|_| recipe.reconstructs());
    let before = disc.map(|_| Before::new(model)).transpose()?;
    // The generator is judged by the discriminator that has been updated with the whole batch. With several parts,
    // the discriminator therefore gets reconstructions of its own, computed without a backward pass.
    let first = match disc {
        Some(disc) if parts.len() > 1 => {
            for (i, part) in parts.iter().enumerate() {
                let images = values(model, &part.images)?;
                let rec = reconstruct(model, &images, &mut out)?;
                discriminator_part(model, i, &images, &rec, state, &mut out)?;
            }
            update_discriminator(model, state, disc, &out)?;
            None
        }
        first => first,
    };
    for (i, part) in parts.iter().enumerate() {
        generator_part(model, recipe, (i, part), state, disc.is_some(), first, &mut out)?;
    }
    let counted = disc.map(Optimizer::norm).map(|norm| norm.rows(0, 1)?.columns(1, 1)).transpose()?;
    main.apply(
        &model.params,
        state,
        &out.report.range(0, LOSSES)?,
        [Some(out.bad()?), counted].iter().flatten(),
    )?;
    let norm = main.norm().rows(0, 1)?;
    if let Some(before) = before {
        before.restore_if_skipped(&*dev, &norm)?;
    }
    for optimizer in [Some(main), disc].into_iter().flatten() {
        optimizer.count(&*dev, &norm)?;
    }
    if out.ranks > 1 {
        let sums = out.report.range(0, NORMS)?;
        dev.collectives().all_reduce(Stream::COMPUTE, sums.acc(), Reduction::Sum)?;
    }
    let norms = out.report.range(NORMS, main.norm().dims().numel())?;
    dev.cast(Stream::COMPUTE, &Cast { x: main.norm().reshape(norms.dims())?.view(), y: norms.out() })?;
    Ok(out)
}

/// Pictures in the activation type: bytes become values in [-1, 1].
fn values(model: &Ett, images: &[Tensor]) -> Result<Vec<Tensor>> {
    let dev = &**model.params.device();
    let value = |x: &Tensor| -> Result<Tensor> {
        if x.dtype() != DType::U8 {
            return Ok(x.clone());
        }
        let y = Tensor::empty(dev, Role::Activation, model.params.precision().act, x.dims())?;
        dev.scale_bytes(Stream::COMPUTE, &ScaleBytes { x: x.view(), y: y.out() })?;
        Ok(y)
    };
    images.iter().map(value).collect()
}

/// Reconstructions of the pictures of a part, without recording a tape.
fn reconstruct(model: &Ett, images: &[Tensor], out: &mut Outcome) -> Result<Vec<Tensor>> {
    let t = Tape::inference(model.params.device().clone(), model.params.precision());
    let images: Vec<Var> = images.iter().map(|x| t.constant(x.clone())).collect();
    let (z, grids) = model.tokenizer.encode(&t, &model.params, &images)?;
    let (zq, _, bad) = model.look_up(&t, &z, &model.tokenizer.codes(&t, &model.params)?)?;
    out.add(t.dev(), LOSSES, &bad)?;
    let rec = model.tokenizer.decode(&t, &model.params, &zq, &grids)?;
    Ok(rec.iter().map(|r| r.value().clone()).collect())
}

/// `auto` is settled before a run begins to train; elsewhere it is `none`.
fn recomputing(what: Recompute) -> Recomputing {
    let blocks = what == Recompute::Blocks;
    Recomputing { cheap: blocks || what == Recompute::Cheap, blocks }
}

/// Forward and backward pass of a part. If `judged`, there is an adversarial loss; `first` is the discriminator's
/// optimizer if the discriminator has to be updated before that.
fn generator_part(
    model: &mut Ett,
    recipe: &Recipe,
    (number, batch): (usize, &Batch),
    state: &StepState,
    judged: bool,
    first: Option<&Optimizer>,
    out: &mut Outcome,
) -> Result<()> {
    let t = Tape::new(model.params.device().clone(), model.params.precision())
        .recomputing(recomputing(model.cfg.train.recompute));
    let mut losses: Vec<(Loss, Var)> = Vec::new();
    let pictures = values(model, &batch.images)?;
    let images: Vec<Var> = pictures.iter().map(|x| t.constant(x.clone())).collect();
    let mut visual = None;
    if recipe.tokenizer != TokenizerMode::Off {
        let (z, grids) = model.tokenizer.encode(&t, &model.params, &images)?;
        let codes = model.tokenizer.codes(&t, &model.params)?;
        out.z = Some(z.value().clone());
        let (zq, idx) = match recipe.tokenizer {
            TokenizerMode::Trained(alpha) => {
                let inv_count = state.slot(Slot::InvVisual)?;
                let entropies = alpha > 0.0 && model.cfg.loss.entropy > 0.0;
                let q = model.tokenizer.quantize(&t, &z, &codes, &inv_count, entropies)?;
                if alpha > 0.0 {
                    losses.push((Loss::Quant, q.quant));
                    losses.extend(q.sample.map(|v| (Loss::EntSample, v)));
                    losses.extend(q.avg.map(|v| (Loss::EntAvg, v)));
                }
                out.add(t.dev(), LOSSES, &q.bad)?;
                (q.zq, q.idx)
            }
            _ => {
                let (zq, idx, bad) = model.look_up(&t, &z, &codes)?;
                out.add(t.dev(), LOSSES, &bad)?;
                (zq, idx)
            }
        };
        if recipe.reconstructs() {
            let rec = model.tokenizer.decode(&t, &model.params, &zq, &grids)?;
            out.rec = rec.iter().map(|r| r.value().clone()).collect();
            if let Some(disc) = first {
                let rec = out.rec.clone();
                discriminator_part(model, number, &pictures, &rec, state, out)?;
                update_discriminator(model, state, disc, out)?;
            }
            let passes = reconstruction_losses(model, &t, &images, &rec, judged, state, &mut losses)?;
            out.passes += passes;
        }
        out.zq = Some(zq.value().clone());
        out.idx.push(of_all_ranks(t.dev(), &idx, batch.most)?);
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
            let Some((_, idx)) = &visual else {
                return Err(Error::arg("step", "recipe.tokenizer", "off", "on, to predict codes"));
            };
            let loss = model.code_loss(&t, &hidden, packed, idx, &state.slot(Slot::InvCodes)?)?;
            losses.push((Loss::Code, loss));
        }
    }
    let trained: Vec<&str> = BACKWARD.into_iter().filter(|g| *g != DISCRIMINATOR).collect();
    let reducer = Reducer::new(&model.params, &trained, number, out.parts);
    backward(t, losses, state, reducer, out)
}

/// Codes `[M]` of all ranks one after another, `most` of each or -1 where it has fewer; `None`: all have as many.
fn of_all_ranks(dev: &dyn Kernels, idx: &Tensor, most: Option<usize>) -> Result<Tensor> {
    let (peers, m) = (dev.collectives(), idx.dims().numel());
    let n = most.unwrap_or(m);
    if peers.ranks() == 1 {
        return Ok(idx.clone());
    }
    let new = |n: usize| Tensor::empty(dev, Role::Activation, idx.dtype(), [n]);
    let own = match n == m {
        true => idx.clone(),
        false => {
            let own = new(n)?;
            dev.fill(Stream::COMPUTE, &Fill { y: own.out(), value: -1.0 })?;
            dev.copy(Stream::COMPUTE, idx.view(), own.range(0, m)?.out())?;
            own
        }
    };
    let all = new(n * peers.ranks())?;
    peers.all_gather(Stream::COMPUTE, own.view(), all.out())?;
    Ok(all)
}

/// Seeds every loss with its weight from the step state and runs the tape backwards, while `reducer` sums the gradients that
/// are done over the ranks.
fn backward(
    t: Tape,
    losses: Vec<(Loss, Var)>,
    state: &StepState,
    mut reducer: Reducer,
    out: &mut Outcome,
) -> Result<()> {
    let weights: Vec<Tensor> = losses.iter().map(|(l, _)| state.slot(l.slot())).collect::<Result<_>>()?;
    let seeds: Vec<(&Var, &Tensor)> = losses.iter().map(|(_, v)| v).zip(&weights).collect();
    let dev = t.device();
    t.backward_telling(&seeds, &mut |id| reducer.done(id))?;
    reducer.finish()?;
    for (loss, v) in losses {
        out.present.insert(loss);
        out.add(&*dev, loss as usize, v.value())?;
    }
    Ok(())
}

/// Mean absolute error, perceptual distance, and the adversarial loss. Returns the number of passes added to the
/// discriminator's running statistics.
fn reconstruction_losses(
    model: &mut Ett,
    t: &Tape,
    images: &[Var],
    rec: &[Var],
    judged: bool,
    state: &StepState,
    losses: &mut Vec<(Loss, Var)>,
) -> Result<u64> {
    let (inv_elements, inv_pictures) = (state.slot(Slot::InvElements)?, state.slot(Slot::InvPictures)?);
    let mut passes: Vec<Vec<BatchStats>> = Vec::new();
    for (x, r) in images.iter().zip(rec) {
        losses.push((Loss::Rec, ops::l1(t, r, x, &inv_elements)?));
        if model.cfg.loss.lpips > 0.0 {
            let terms = model.lpips.distance(t, &model.params, x, r, &inv_pictures)?;
            losses.extend(terms.into_iter().map(|v| (Loss::Lpips, v)));
        }
        if judged {
            let (logits, stats) = model.discriminator.forward(t, &model.params, r, true)?;
            let d = logits.dims();
            let logits = ops::reshape(t, &logits, [d[0], d[1] * d[2]])?;
            losses.push((Loss::Gan, ops::gan_generator(t, &logits, &inv_pictures)?));
            passes.push(stats);
        }
    }
    let dev = model.params.device().clone();
    model.discriminator.commit(&*dev, &mut model.discriminator_state, &passes)?;
    Ok(passes.len() as u64)
}

/// The discriminator's losses for real images and reconstructions, and their gradients.
fn discriminator_part(
    model: &mut Ett,
    number: usize,
    images: &[Tensor],
    rec: &[Tensor],
    state: &StepState,
    out: &mut Outcome,
) -> Result<()> {
    let dev = model.params.device().clone();
    let t =
        Tape::new(dev.clone(), model.params.precision()).recomputing(recomputing(model.cfg.train.recompute));
    let mut passes: Vec<Vec<BatchStats>> = Vec::new();
    let mut judge = |xs: &[Tensor]| -> Result<Var> {
        let mut logits = Vec::new();
        for x in xs {
            let x = t.constant(x.clone());
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
    let inv_patches = state.slot(Slot::InvPatches)?;
    let averages = model.discriminator.lecam_after(&t, &model.discriminator_state, &real, &fake)?;
    let losses = vec![
        (Loss::DHinge, ops::hinge(&t, &real, true, &inv_patches, 0.5)?),
        (Loss::DHinge, ops::hinge(&t, &fake, false, &inv_patches, 0.5)?),
        (Loss::DLecam, ops::lecam(&t, &real, &fake, &averages, &inv_patches)?),
    ];
    let reducer = Reducer::new(&model.params, &[DISCRIMINATOR], number, out.parts);
    backward(t, losses, state, reducer, out)?;
    out.passes += passes.len() as u64;
    model.discriminator.commit(&*dev, &mut model.discriminator_state, &passes)?;
    model.discriminator.commit_lecam(&*dev, &model.discriminator_state, &averages)
}

fn update_discriminator(model: &Ett, state: &StepState, disc: &Optimizer, out: &Outcome) -> Result<()> {
    let losses = out.losses(Loss::DHinge, Loss::DLecam)?;
    disc.apply(&model.params, state, &losses, std::iter::once(&out.bad()?))
}
