//! Stages, steps and optimizers on a small model.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ett::autograd::{Tape, Var};
use ett::backend::{DType, Kernels, Role};
use ett::compare::{Bounds, compare};
use ett::config::{Arm, Config, QuantizerMetric, Recompute, StageKind, VisualHeadKind};
use ett::error::Result;
use ett::feed::Batch;
use ett::io::{load_weights, save_weights};
use ett::model::tokenizer::Grid;
use ett::model::{Carried, Ett, Part};
use ett::nn::Stored;
use ett::tensor::Tensor;
use ett::train::{
    Counts, Hyper, Loss, Optimizer, Outcome as Step, Own, Recipe, Stage, StepState, TokenizerMode, schedule,
    step,
};

use crate::common::{Outcome, Scratch, cpu, ids, tensor};

pub const VOCAB: usize = 40;
/// Pixels per side of a token.
const S: usize = 4;

/// A model with all parts.
pub fn small(precision: &str) -> Config {
    let mut cfg = Config::default();
    let t = &mut cfg.tokenizer;
    (t.ch, t.ch_mult, t.num_res_blocks, t.z_channels, t.norm_groups) = (8, vec![1, 1, 2], 1, 8, 2);
    (cfg.quantizer.codes, cfg.quantizer.dim) = (48, 6);
    cfg.lpips.widths = [4, 6, 8, 8, 8];
    cfg.discriminator.ndf = 4;
    let l = &mut cfg.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (VOCAB, 16, 2, 4, 2, 4, 24);
    l.init_std = 0.2;
    cfg.data.size = 32;
    cfg.train.precision = precision.into();
    cfg
}

/// Pictures of waves, `[B, H, W, 3]`.
pub fn pixels(seed: u64, [b, h, w]: [usize; 3]) -> Vec<f64> {
    let mut v = Vec::new();
    for i in 0..b {
        let f = 0.15 + 0.1 * ((seed as usize + i) % 5) as f64;
        for y in 0..h {
            for x in 0..w {
                for c in 0..3 {
                    let (y, x, c) = (y as f64, x as f64, c as f64);
                    v.push(0.8 * (f * x + 0.31 * y * (1.0 + 0.2 * c) + seed as f64 + i as f64).sin());
                }
            }
        }
    }
    v
}

/// A batch of pictures of some sizes; each sequence has a start token, the picture, and its own text.
pub fn batch(model: &Ett, sizes: &[[usize; 3]], kind: StageKind) -> Result<Batch> {
    let dev = &**model.params.device();
    let act = model.params.precision().act;
    let (mut images, mut grids, mut sequences) = (Vec::new(), Vec::new(), Vec::new());
    for (n, &[b, h, w]) in sizes.iter().enumerate() {
        images.push(tensor(dev, act, &pixels(n as u64, [b, h, w]), [b, h, w, 3]));
        grids.push(Grid { images: b, h: h / S, w: w / S });
        for _ in 0..b {
            let i = sequences.len();
            let text = Part::target(ids(i as u64, 6, VOCAB));
            sequences.push(match kind {
                StageKind::Text => vec![Part::context(vec![1]), text],
                _ => vec![Part::context(vec![1]), Part::Image(i), text],
            });
        }
    }
    let packed = match kind {
        StageKind::Tokenizer => None,
        _ => Some(Batch::pack(model, &sequences, &grids, 8)?),
    };
    let images = if kind == StageKind::Text { vec![] } else { images };
    Ok(Batch { images, packed, most: None })
}

/// A stage in progress.
pub struct Run {
    pub model: Ett,
    recipe: Recipe,
    state: StepState,
    pub main: Optimizer,
    pub disc: Option<Optimizer>,
    rate: f64,
}

impl Run {
    pub fn new(cfg: &Config, dev: Arc<dyn Kernels>, kind: StageKind, rate: f64) -> Result<Self> {
        let model = Ett::new(cfg, dev)?;
        let stage = Stage::new(kind, &model)?;
        Self::with(model, stage.recipe, &stage.groups, stage.discriminator, rate)
    }

    fn with(mut model: Ett, recipe: Recipe, groups: &[&str], discriminator: bool, rate: f64) -> Result<Self> {
        let t = model.cfg.train.clone();
        let all: Vec<&str> = groups.iter().copied().chain(discriminator.then_some("discriminator")).collect();
        model.params.train(&all)?;
        let hyper = |betas| Hyper { betas, eps: 1e-8, weight_decay: 0.0, ema_decay: 0.9, clip: t.clip };
        let state = StepState::new(&**model.params.device(), model.params.precision().acc)?;
        let main = Optimizer::new(&model.params, groups, hyper(t.betas))?;
        let disc = match discriminator {
            true => Some(Optimizer::new(&model.params, &["discriminator"], hyper(t.disc_betas))?),
            false => None,
        };
        Ok(Run { model, recipe, state, main, disc, rate })
    }

    pub fn step(&mut self, batch: &Batch) -> Result<Step> {
        self.step_in_parts(std::slice::from_ref(batch))
    }

    fn step_in_parts(&mut self, parts: &[Batch]) -> Result<Step> {
        let counts = self.counts(parts)?;
        self.step_counting(parts, &counts)
    }

    /// The counts of a batch of one rank.
    pub fn counts(&self, parts: &[Batch]) -> Result<Counts> {
        let packed = || parts.iter().filter_map(|b| b.packed.as_ref());
        let dev = self.model.params.device().clone();
        let count = |t: &Tensor| t.to_f64(&*dev).map(|v| v.iter().filter(|&&i| i >= 0.0).count());
        let tokens = packed().map(|p| count(&p.target)).sum::<Result<usize>>()?;
        let codes = packed().map(|p| count(&p.code_of)).sum::<Result<usize>>()?;
        Ok(Counts::new(&self.model, parts, tokens, codes))
    }

    /// A step on the part of a batch that a rank has; `counts` are those of the whole batch.
    pub fn step_counting(&mut self, parts: &[Batch], counts: &Counts) -> Result<Step> {
        self.recipe.weights(&self.model, &mut self.state, parts.len());
        self.main.prepare(&mut self.state, self.rate);
        if let Some(d) = &mut self.disc {
            d.prepare(&mut self.state, self.rate);
        }
        counts.set(&mut self.state);
        self.state.send(&**self.model.params.device())?;
        step(&mut self.model, &self.recipe, parts, &self.state, &self.main, self.disc.as_ref())
    }

    fn value(&self, out: &Step, loss: Loss) -> Result<f64> {
        out.value(&self.model, loss)
    }
}

pub type Bits = BTreeMap<String, Vec<u64>>;

/// The bits of every tensor of a copy of the parameters, and of the discriminator's state.
pub fn bits(model: &Ett, stored: Stored) -> Result<Bits> {
    let raw = |v: Vec<f64>| v.into_iter().map(f64::to_bits).collect::<Vec<_>>();
    let mut all = BTreeMap::new();
    for (name, _, _) in model.params.names() {
        if let Some(t) = model.params.read(name, stored)? {
            all.insert(name.to_string(), raw(t.values));
        }
    }
    let dev = &**model.params.device();
    let s = &model.discriminator_state;
    for (i, (mean, var)) in s.running.iter().enumerate() {
        all.insert(format!("discriminator state, mean {i}"), raw(mean.to_f64(dev)?));
        all.insert(format!("discriminator state, variance {i}"), raw(var.to_f64(dev)?));
    }
    all.insert("discriminator state, lecam".into(), raw(s.lecam.to_f64(dev)?));
    all.insert("discriminator state, batches".into(), vec![s.batches]);
    Ok(all)
}

fn group_of(model: &Ett, name: &str) -> String {
    let mut names = model.params.names();
    names.find(|(n, _, _)| *n == name).map_or("discriminator", |(_, group, _)| group).to_string()
}

#[test]
fn stages_train_their_groups_and_freeze_the_rest() -> Outcome {
    let tokenizer = ["encoder", "decoder", "discriminator"];
    let everything = ["encoder", "decoder", "discriminator", "llm", "projector"];
    let (ett, embed, index) = (Arm::Ett, Arm::Embed, Arm::Index);
    for (kind, arm, alpha, gan, trained) in [
        (StageKind::Tokenizer, ett, 0.25, 0.1, &tokenizer[..]),
        (StageKind::Tokenizer, index, 0.0, 0.1, &tokenizer),
        (StageKind::Tokenizer, ett, 0.25, 0.0, &["encoder", "decoder"]),
        (StageKind::Text, ett, 0.25, 0.1, &["llm"]),
        (StageKind::Align, ett, 0.25, 0.1, &["projector"]),
        (StageKind::Align, embed, 0.25, 0.1, &["projector"]),
        (StageKind::Align, index, 0.25, 0.1, &["visual_embed"]),
        (StageKind::Semantic, ett, 0.25, 0.1, &everything),
        (StageKind::Semantic, ett, 0.0, 0.1, &["encoder", "llm", "projector"]),
        (StageKind::Semantic, ett, 0.25, 0.0, &["encoder", "decoder", "llm", "projector"]),
        (StageKind::Semantic, embed, 0.25, 0.1, &["llm", "projector"]),
        (StageKind::Semantic, index, 0.25, 0.1, &["llm", "visual_embed"]),
        (StageKind::Chat, ett, 0.25, 0.1, &["llm", "projector"]),
        (StageKind::Chat, index, 0.25, 0.1, &["llm", "visual_embed"]),
    ] {
        for precision in ["f32", "bf16"] {
            let mut cfg = small(precision);
            (cfg.train.arm, cfg.loss.alpha, cfg.loss.gan) = (arm, alpha, gan);
            let what = format!("{}, {arm:?}, alpha {alpha}, gan {gan}, {precision}", kind.name());
            let mut run = Run::new(&cfg, cpu(2), kind, 1e-3)?;
            let batch = batch(&run.model, &[[2, 32, 32]], kind)?;
            let before = bits(&run.model, Stored::Master)?;
            for _ in 0..2 {
                run.step(&batch)?;
            }
            let after = bits(&run.model, Stored::Master)?;
            let mut moved = BTreeSet::new();
            for (name, old) in &before {
                let group = group_of(&run.model, name);
                let changed = after[name] != *old;
                assert!(!changed || trained.contains(&&*group), "{what}: frozen `{name}` has changed");
                if changed {
                    moved.insert(group);
                } else if trained.contains(&&*group) {
                    // A bias of keys has no effect; codes are used by the quantizer only.
                    assert!(name.ends_with(".k.bias"), "{what}: trained `{name}` has not changed");
                }
            }
            assert_eq!(moved, trained.iter().map(|g| g.to_string()).collect(), "{what}");
        }
    }
    Ok(())
}

/// The losses of three steps and the resulting weights and averages.
fn three_steps(cfg: &Config, threads: usize) -> Result<(Vec<u64>, Bits, Bits)> {
    let mut run = Run::new(cfg, cpu(threads), StageKind::Semantic, 1e-3)?;
    run.model.params.average(&["encoder", "decoder", "discriminator"])?;
    let batch = batch(&run.model, &[[3, 32, 32], [1, 32, 48]], StageKind::Semantic)?;
    let mut losses = Vec::new();
    for _ in 0..3 {
        let out = run.step(&batch)?;
        for loss in Loss::ALL {
            losses.push(run.value(&out, loss)?.to_bits());
        }
    }
    Ok((losses, bits(&run.model, Stored::Master)?, bits(&run.model, Stored::Ema)?))
}

#[test]
fn one_and_two_threads_give_the_same_bits() -> Outcome {
    for precision in ["f32", "bf16"] {
        let mut cfg = small(precision);
        // Large enough to be split into several blocks.
        cfg.quantizer.codes = 1500;
        let one = three_steps(&cfg, 1)?;
        for threads in [2, 2, 3] {
            assert!(three_steps(&cfg, threads)? == one, "{threads} threads in {precision}");
        }
    }
    Ok(())
}

/// Memorising one batch drives the losses to nearly nothing: the caption is predicted, the pictures are reconstructed
/// up to a tenth of their contrast, and the tokens nearly coincide with their codes: a few may still change their code
/// at the end, which rounding decides. The discriminator is left out, since its loss does not converge.
#[test]
fn one_batch_can_be_learnt_by_heart() -> Outcome {
    for metric in [QuantizerMetric::Dot, QuantizerMetric::L2norm] {
        let mut cfg = small("f32");
        cfg.quantizer.metric = metric;
        cfg.loss.gan = 0.0;
        let mut run = Run::new(&cfg, cpu(2), StageKind::Semantic, 3e-3)?;
        let batch = batch(&run.model, &[[2, 16, 16]], StageKind::Semantic)?;
        let first = run.step(&batch)?;
        for step in 0..520 {
            if step == 330 {
                run.rate *= 0.1;
            }
            run.step(&batch)?;
        }
        let last = run.step(&batch)?;
        let tokens = run.value(&first, Loss::Quant)?;
        for (loss, start, end) in [
            (Loss::Cap, 3.0, 1e-3),
            (Loss::Rec, 0.4, 0.08),
            (Loss::Lpips, 1.0, 0.03),
            (Loss::Quant, 0.1, 0.05 * tokens),
        ] {
            let (a, b) = (run.value(&first, loss)?, run.value(&last, loss)?);
            println!("{metric:?}, {loss:?}: {a:.4} to {b:.2e}");
            assert!(
                a > start,
                "{metric:?}, {loss:?}: {a} at the start, wanted something to learn, above {start}"
            );
            assert!(b < end, "{metric:?}, {loss:?}: {a} to {b}, wanted below {end}");
        }
    }
    Ok(())
}

/// The order of tokens is by group, then by image. (The order by row within an image is tested by the fixture with a
/// picture that is not square.)
#[test]
fn mixed_sizes_are_encoded_and_decoded_as_each_alone() -> Outcome {
    for metric in [QuantizerMetric::Dot, QuantizerMetric::L2norm] {
        let mut cfg = small("f64");
        cfg.quantizer.metric = metric;
        let model = Ett::new(&cfg, cpu(2))?;
        let dev = model.params.device().clone();
        let p = &model.params;
        let sizes = [[2, 32, 32], [1, 16, 24], [3, 4, 8]];
        let t = Tape::inference(dev.clone(), p.precision());
        let put = |v: &[f64], dims: [usize; 4]| t.constant(tensor(&*dev, DType::F64, v, dims));
        let pictures: Vec<Vec<f64>> = sizes.iter().enumerate().map(|(i, &s)| pixels(i as u64, s)).collect();
        let images: Vec<Var> =
            pictures.iter().zip(sizes).map(|(v, [b, h, w])| put(v, [b, h, w, 3])).collect();
        let (z, grids) = model.tokenizer.encode(&t, p, &images)?;
        assert_eq!(
            grids.iter().map(|g| [g.images, g.h, g.w]).collect::<Vec<_>>(),
            [[2, 8, 8], [1, 4, 6], [3, 1, 2]]
        );
        let codes = model.tokenizer.codes(&t, p)?;
        let (zq, _, _) = model.look_up(&t, &z, &codes)?;
        let rec = model.tokenizer.decode(&t, p, &zq, &grids)?;
        let together = z.value().to_f64(&*dev)?;
        let d = cfg.quantizer.dim;
        let bounds = Bounds::of(DType::F64).times(100.0);
        let mut row = 0;
        for ((picture, [b, h, w]), rec) in pictures.iter().zip(sizes).zip(&rec) {
            let rec = rec.value().to_f64(&*dev)?;
            for i in 0..b {
                let n = h * w * 3;
                let alone = put(&picture[i * n..(i + 1) * n], [1, h, w, 3]);
                let (z, grid) = model.tokenizer.encode(&t, p, std::slice::from_ref(&alone))?;
                let (zq, _, _) = model.look_up(&t, &z, &codes)?;
                let tokens = h * w / (S * S);
                let z = z.value().to_f64(&*dev)?;
                compare("z", &together[row * d..(row + tokens) * d], &z, d, bounds)?;
                let decoded = model.tokenizer.decode(&t, p, &zq, &grid)?.remove(0);
                compare("rec", &rec[i * n..(i + 1) * n], &decoded.value().to_f64(&*dev)?, w * 3, bounds)?;
                row += tokens;
            }
        }
        assert_eq!(row * d, together.len());
    }
    Ok(())
}

#[test]
fn a_mixed_batch_is_the_average_of_its_parts() -> Outcome {
    let cfg = small("f64");
    let losses = |sizes: &[[usize; 3]]| -> Result<BTreeMap<Loss, f64>> {
        let mut run = Run::new(&cfg, cpu(2), StageKind::Tokenizer, 1e-3)?;
        let out = run.step(&batch(&run.model, sizes, StageKind::Tokenizer)?)?;
        assert_eq!(out.rec.len(), sizes.len());
        Loss::ALL.into_iter().map(|l| Ok((l, run.value(&out, l)?))).collect()
    };
    // `batch` draws the pictures of the second size with another seed; `second_alone` uses the same one.
    let both = losses(&[[2, 32, 32], [1, 32, 48]])?;
    let (first, second) = (losses(&[[2, 32, 32]])?, second_alone(&cfg)?);
    let tokens = [128.0, 96.0];
    let images = [2.0, 1.0];
    for (loss, weights) in
        [(Loss::Rec, tokens), (Loss::Quant, tokens), (Loss::EntSample, tokens), (Loss::Lpips, images)]
    {
        let want = (weights[0] * first[&loss] + weights[1] * second[&loss]) / (weights[0] + weights[1]);
        compare(loss.name(), &[both[&loss]], &[want], 1, Bounds::norm(1e-10))?;
    }
    // The entropy of the average is at least the average of the entropies.
    let least = (tokens[0] * first[&Loss::EntAvg] + tokens[1] * second[&Loss::EntAvg]) / 224.0;
    assert!(both[&Loss::EntAvg] >= least - 1e-3, "{} {least}", both[&Loss::EntAvg]);
    Ok(())
}

/// The losses of the 32x48 picture that [`batch`] puts second.
fn second_alone(cfg: &Config) -> Result<BTreeMap<Loss, f64>> {
    let mut run = Run::new(cfg, cpu(2), StageKind::Tokenizer, 1e-3)?;
    let dev = run.model.params.device().clone();
    let image = tensor(&*dev, DType::F64, &pixels(1, [1, 32, 48]), [1, 32, 48, 3]);
    let out = run.step(&Batch { images: vec![image], packed: None, most: None })?;
    Loss::ALL.into_iter().map(|l| Ok((l, run.value(&out, l)?))).collect()
}

#[test]
fn two_groups_of_one_size_are_one_batch() -> Outcome {
    // BatchNorm takes its statistics per group; without the discriminator, nothing distinguishes the groups.
    let mut cfg = small("f64");
    cfg.loss.gan = 0.0;
    let gradients = |split: bool| -> Result<BTreeMap<String, Vec<f64>>> {
        let mut run = Run::new(&cfg, cpu(2), StageKind::Semantic, 1e-3)?;
        let mut batch = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
        if split {
            let whole = &batch.images[0];
            let half = |i: usize| whole.rows(32 * 32 * i, 32 * 32)?.reshape([1, 32, 32, 3]);
            batch.images = vec![half(0)?, half(1)?];
        }
        run.step(&batch)?;
        let p = &run.model.params;
        let mut all = BTreeMap::new();
        for (name, _, _) in p.names() {
            if let Some(t) = p.read(name, Stored::Gradient)? {
                all.insert(name.to_string(), t.values);
            }
        }
        Ok(all)
    };
    let (one, two) = (gradients(false)?, gradients(true)?);
    assert!(one.len() > 100);
    for (name, want) in &one {
        compare(name, &two[name], want, 1, Bounds::norm(1e-9).least(1e-6))?;
    }
    Ok(())
}

#[test]
fn averages_follow_the_weights() -> Outcome {
    let mut run = Run::new(&small("f64"), cpu(2), StageKind::Semantic, 1e-2)?;
    run.model.params.average(&["encoder", "discriminator"])?;
    let batch = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
    let read = |run: &Run, stored: Stored| -> Result<BTreeMap<String, Vec<f64>>> {
        let p = &run.model.params;
        let mut all = BTreeMap::new();
        for (name, _, _) in p.names() {
            if let Some(t) = p.read(name, stored)? {
                all.insert(name.to_string(), t.values);
            }
        }
        Ok(all)
    };
    assert!(
        read(&run, Stored::Ema)?
            .keys()
            .all(|n| ["encoder", "discriminator"].contains(&&*group_of(&run.model, n)))
    );
    let mut want = read(&run, Stored::Ema)?;
    let start = read(&run, Stored::Master)?;
    assert!(want.iter().all(|(n, v)| *v == start[n]), "averages start from the weights");
    for _ in 0..3 {
        run.step(&batch)?;
        let live = read(&run, Stored::Master)?;
        for (name, v) in &mut want {
            v.iter_mut().zip(&live[name]).for_each(|(e, w)| *e = 0.9 * *e + 0.1 * w);
        }
    }
    let got = read(&run, Stored::Ema)?;
    assert_eq!(got.len(), want.len());
    for (name, want) in &want {
        compare(name, &got[name], want, 1, Bounds::of(DType::F64).least(1e-6))?;
        assert!(*want != start[name] || name.ends_with(".k.bias"), "{name} has moved");
    }
    // Swapped for an evaluation and back.
    let live = bits(&run.model, Stored::Master)?;
    run.model.params.swap_averages()?;
    assert!(read(&run, Stored::Master)?.iter().all(|(n, v)| got.get(n).is_none_or(|g| g == v)));
    run.model.params.swap_averages()?;
    assert!(bits(&run.model, Stored::Master)? == live);
    Ok(())
}

/// The bits of everything that a step may change: counts of updates, weights, the copies that products read, moments, averages, and the
/// discriminator's state.
fn everything(run: &Run) -> Result<Vec<Vec<u64>>> {
    let (p, dev) = (&run.model.params, &**run.model.params.device());
    let mut all = vec![vec![run.model.discriminator_state.batches]];
    for optimizer in std::iter::once(&run.main).chain(&run.disc) {
        all.push(vec![(optimizer.steps(dev)? as f64).to_bits()]);
    }
    let mut put = |t: &Tensor| -> Result<()> {
        all.push(t.to_f64(dev)?.into_iter().map(f64::to_bits).collect());
        Ok(())
    };
    (0..p.groups().len()).flat_map(|g| p.stepped(g)).try_for_each(&mut put)?;
    run.model.carried().iter().try_for_each(|(_, carried)| match carried {
        Carried::Tensor(t) => put(t),
        Carried::Count(_) => Ok(()),
    })?;
    Ok(all)
}

/// Makes a step on a batch with a non-finite value, which has to change nothing, and then a step on a good batch.
fn is_skipped(run: &mut Run, bad: &[Batch], good: &[Batch], what: &str) -> Result<Step> {
    let dev = run.model.params.device().clone();
    let before = everything(run)?;
    let out = run.step_in_parts(bad)?;
    assert!(run.main.norm().to_f64(&*dev)?[1] > 0.0, "{what}: non-finite values are counted");
    run.model.discriminator_state.batches -= out.passes;
    assert!(everything(run)? == before, "{what}: a step that is skipped changes nothing");
    run.step_in_parts(good)?;
    assert_eq!(run.main.norm().to_f64(&*dev)?[1], 0.0, "{what}: the next batch trains again");
    let after = everything(run)?;
    assert!(after != before && after[1..].iter().flatten().all(|b| f64::from_bits(*b).is_finite()), "{what}");
    Ok(out)
}

/// A batch like that of [`batch`] whose first picture has one non-finite value.
fn spoiled(model: &Ett, kind: StageKind) -> Result<Batch> {
    let mut bad = batch(model, &[[2, 32, 32]], kind)?;
    let mut values = pixels(0, [2, 32, 32]);
    values[100] = f64::NAN;
    let dev = &**model.params.device();
    bad.images = vec![tensor(dev, model.params.precision().act, &values, [2, 32, 32, 3])];
    Ok(bad)
}

#[test]
fn a_picture_that_is_not_finite_skips_the_step() -> Outcome {
    for (precision, kind, parts) in [
        ("f32", StageKind::Semantic, 1),
        ("bf16", StageKind::Semantic, 1),
        ("f32", StageKind::Tokenizer, 1),
        ("f32", StageKind::Tokenizer, 2),
    ] {
        let what = format!("{precision}, {}, {parts} parts", kind.name());
        let mut run = Run::new(&small(precision), cpu(2), kind, 1e-3)?;
        run.model.params.average(&["encoder", "decoder", "discriminator"])?;
        let good = || batch(&run.model, &[[2, 32, 32]], kind);
        let good = (0..parts).map(|_| good()).collect::<Result<Vec<_>>>()?;
        let mut bad =
            (1..parts).map(|_| batch(&run.model, &[[2, 32, 32]], kind)).collect::<Result<Vec<_>>>()?;
        bad.push(spoiled(&run.model, kind)?);
        run.step_in_parts(&good)?;
        let out = is_skipped(&mut run, &bad, &good, &what)?;
        assert!(run.value(&out, Loss::Rec)?.is_nan(), "{what}: the loss shows it");
        // One picture's tokens are bad; with several parts, they pass through the quantizer twice.
        assert_eq!(out.unscored(&run.model)?, 64 * parts, "{what}");
    }
    Ok(())
}

#[test]
fn a_frozen_tokenizer_that_gives_no_codes_skips_the_step() -> Outcome {
    // The code of a non-finite token would be 0, and the loss finite.
    for kind in [StageKind::Align, StageKind::Chat] {
        let mut run = Run::new(&small("f32"), cpu(2), kind, 1e-3)?;
        let good = [batch(&run.model, &[[2, 32, 32]], kind)?];
        let bad = [spoiled(&run.model, kind)?];
        let out = is_skipped(&mut run, &bad, &good, kind.name())?;
        assert!(run.value(&out, Loss::Cap)?.is_finite(), "the caption loss alone does not show it");
        assert_eq!(out.unscored(&run.model)?, 64);
    }
    Ok(())
}

#[test]
fn a_language_model_that_is_not_finite_takes_the_discriminators_step_back() -> Outcome {
    // The discriminator is stepped before the caption loss is computed.
    let mut run = Run::new(&small("f32"), cpu(2), StageKind::Semantic, 1e-3)?;
    let data = [batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?];
    run.step_in_parts(&data)?;
    let name = "model.norm.weight";
    let kept = run.model.params.read(name, Stored::Master)?.ok_or("a weight")?;
    let mut broken = kept.clone();
    broken.values[0] = f64::NAN;
    run.model.params.write_public(name, Stored::Master, &broken)?;
    let before = everything(&run)?;
    let out = run.step_in_parts(&data)?;
    assert!(run.value(&out, Loss::Cap)?.is_nan() && run.value(&out, Loss::DHinge)?.is_finite());
    run.model.discriminator_state.batches -= out.passes;
    assert!(everything(&run)? == before, "a step that is skipped changes nothing");
    Ok(())
}

#[test]
fn the_entropies_are_left_out_where_nothing_asks_for_them() -> Outcome {
    // At alpha 0 or weight 0 there is no sweep over the columns, and everything else is updated in the same way.
    let mut cfg = small("f64");
    (cfg.loss.alpha, cfg.loss.entropy) = (0.0, 0.05);
    let plan = |cfg: &Config, kind| -> Result<Vec<&'static str>> {
        let stage = ett::config::StageConfig::new(kind, 1, 2);
        let plan = ett::train::plan_stage(cfg, &stage, ett::backend::Target::Cpu { threads: 1 })?;
        Ok(plan.kernels.into_keys().collect())
    };
    assert!(!plan(&cfg, StageKind::Semantic)?.contains(&"ibq_cols"));
    assert!(plan(&cfg, StageKind::Tokenizer)?.contains(&"ibq_cols"));
    cfg.loss.entropy = 0.0;
    assert!(!plan(&cfg, StageKind::Tokenizer)?.contains(&"ibq_cols"));

    let train = |entropy: f64| -> Result<Vec<f64>> {
        let mut cfg = small("f64");
        cfg.loss.entropy = entropy;
        let mut run = Run::new(&cfg, cpu(2), StageKind::Tokenizer, 1e-3)?;
        let data = batch(&run.model, &[[2, 32, 32]], StageKind::Tokenizer)?;
        run.step(&data)?;
        let p = &run.model.params;
        let trained = p.group("encoder").and_then(|g| p.training(g));
        trained.map_or(Ok(Vec::new()), |t| t.grad.to_f64(&**p.device()))
    };
    let (without, with_next_to_none, with) = (train(0.0)?, train(1e-13)?, train(0.05)?);
    let off = |a: &[f64], b: &[f64]| {
        let d: f64 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
        (d / b.iter().map(|b| b * b).sum::<f64>()).sqrt()
    };
    assert!(off(&without, &with_next_to_none) < 1e-9, "{}", off(&without, &with_next_to_none));
    assert!(off(&without, &with) > 1e-3, "{}", off(&without, &with));
    Ok(())
}

#[test]
fn visual_heads_learn_codes() -> Outcome {
    for kind in [VisualHeadKind::Tied, VisualHeadKind::Linear] {
        let mut cfg = small("f32");
        cfg.visual_head.kind = kind;
        let model = Ett::new(&cfg, cpu(2))?;
        let recipe = Recipe { tokenizer: TokenizerMode::Frozen, text: false, codes: true };
        let mut run = Run::with(model, recipe, &["llm", "projector", "visual_head"], false, 1e-2)?;
        let mut batch = batch(&run.model, &[[2, 32, 32]], StageKind::Align)?;
        // Each picture has its own prompt; every code is predicted, the first from the prompt.
        let sequences: Vec<Vec<Part>> =
            (0..2).map(|i| vec![Part::context(vec![i + 2]), Part::Codes(i as usize)]).collect();
        let packed = Batch::pack(&run.model, &sequences, &[Grid { images: 2, h: 8, w: 8 }], 8)?;
        assert_eq!((packed.code_rows.dims().numel(), packed.target.dims().numel()), (128, 0));
        batch.packed = Some(packed);
        let before = bits(&run.model, Stored::Master)?;
        let first = run.step(&batch)?;
        let first = run.value(&first, Loss::Code)?;
        for step in 0..240 {
            if step == 160 {
                run.rate *= 0.1;
            }
            run.step(&batch)?;
        }
        let last = run.step(&batch)?;
        let last = run.value(&last, Loss::Code)?;
        println!("{kind:?}: {first} to {last}, uniform {}", (48f64).ln());
        assert!(first > 3.0 && last < 0.02, "{kind:?}: {first} to {last}, wanted the codes memorised");
        let after = bits(&run.model, Stored::Master)?;
        for (name, old) in &before {
            if name.starts_with("quantize.") || name.starts_with("encoder.") {
                assert!(after[name] == *old, "{name} is frozen");
            }
        }
    }
    // Without a head, codes cannot be predicted.
    let model = Ett::new(&small("f32"), cpu(2))?;
    let recipe = Recipe { tokenizer: TokenizerMode::Frozen, text: false, codes: true };
    let mut run = Run::with(model, recipe, &["llm"], false, 1e-2)?;
    let batch = batch(&run.model, &[[1, 32, 32]], StageKind::Align)?;
    let e = run.step(&batch).err().ok_or("no head is an error")?.to_string();
    assert!(e.contains("visual_head.kind") && e.contains("tied or linear"), "{e}");
    Ok(())
}

#[test]
fn steps_after_the_first_hold_no_more_memory() -> Outcome {
    // A single thread: with two, the scratch memory held at once depends on timing.
    let mut run = Run::new(&small("bf16"), cpu(1), StageKind::Semantic, 1e-3)?;
    let dev = run.model.params.device().clone();
    let batch = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
    drop(run.step(&batch)?);
    let (live, peak) = (dev.memory().live, dev.memory().peak);
    for _ in 0..3 {
        drop(run.step(&batch)?);
        assert_eq!((dev.memory().live, dev.memory().peak), (live, peak));
    }
    assert!(live[Role::Workspace as usize] == 0, "scratch is given back");
    Ok(())
}

#[test]
fn weights_survive_a_file() -> Outcome {
    let scratch = Scratch::new();
    let path = scratch.path("weights.safetensors");
    for (precision, arm) in [("f32", Arm::Ett), ("bf16", Arm::Index), ("f64", Arm::Embed)] {
        let mut cfg = small(precision);
        (cfg.train.arm, cfg.projector.norm) = (arm, true);
        let model = Ett::new(&cfg, cpu(2))?;
        save_weights(&model.params, &path, Stored::Master)?;
        cfg.train.seed = 99;
        let other = Ett::new(&cfg, cpu(2))?;
        assert!(
            bits(&other, Stored::Master)? != bits(&model, Stored::Master)?,
            "another seed is another start"
        );
        load_weights(&other.params, &path)?;
        assert!(bits(&other, Stored::Master)? == bits(&model, Stored::Master)?, "{precision}");
        let dev = other.params.device();
        for g in 0..other.params.groups().len() {
            if let Some(s) = other.params.shadow(g) {
                let want = model.params.shadow(g).ok_or("the same copies")?;
                assert!(
                    s.to_f64(&**dev)? == want.to_f64(&**model.params.device())?,
                    "the rounded copies follow"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn adding_a_part_changes_no_other_start() -> Outcome {
    // Initial values depend on the seed and the name only.
    let start = |change: fn(&mut Config)| -> Result<Bits> {
        let mut cfg = small("f32");
        change(&mut cfg);
        bits(&Ett::new(&cfg, cpu(1))?, Stored::Master)
    };
    let plain = start(|_| {})?;
    let more = start(|c| {
        c.visual_head.kind = VisualHeadKind::Linear;
        c.llm.layers = 3;
        c.train.threads = 2;
    })?;
    assert!(plain.iter().all(|(name, v)| more[name] == *v) && more.len() > plain.len());
    Ok(())
}

#[test]
fn steps_say_what_is_missing() -> Outcome {
    let mut run = Run::new(&small("f32"), cpu(1), StageKind::Semantic, 1e-3)?;
    let mut b = batch(&run.model, &[[1, 32, 32]], StageKind::Semantic)?;
    b.packed = None;
    let e = run.step(&b).err().ok_or("no sequences is an error")?.to_string();
    assert!(e.contains("batch.packed"), "{e}");
    // Pictures whose sides are not multiples of the downsampling factor.
    let dev = run.model.params.device().clone();
    b = batch(&run.model, &[[1, 32, 32]], StageKind::Semantic)?;
    b.images = vec![Tensor::zeros(&*dev, Role::Input, DType::F32, [1, 32, 30, 3])?];
    let e = run.step(&b).err().ok_or("30 pixels are an error")?.to_string();
    assert!(e.contains("[1, 32, 30, 3]") && e.contains("multiples of 4"), "{e}");
    assert_eq!(schedule(ett::config::ScheduleKind::Cosine, 1.0, 0.5, 0, 10), 0.2);
    Ok(())
}

/// Gradients of a step over these parts, in the order of names, and its losses.
fn gradients_of(cfg: &Config, kind: StageKind, parts: usize, copies: bool) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut run = Run::new(cfg, cpu(2), kind, 1e-3)?;
    let dev = run.model.params.device().clone();
    let values = pixels(3, [4, 32, 32]);
    // Copies of one part, or the quarters of a batch.
    let n = if copies { 4 } else { 4 / parts };
    let batches: Vec<Batch> = (0..parts)
        .map(|p| {
            let first = if copies { 0 } else { p * n };
            let own = &values[first * 32 * 32 * 3..][..n * 32 * 32 * 3];
            let sequences: Vec<Vec<Part>> = (0..n)
                .map(|i| {
                    // Texts of different lengths: the mean is over tokens, not over parts.
                    let text = ids((first + i) as u64, 4 + first + i, VOCAB);
                    vec![Part::context(vec![1]), Part::Image(i), Part::target(text)]
                })
                .collect();
            let packed = match kind {
                StageKind::Tokenizer => None,
                _ => Some(Batch::pack(&run.model, &sequences, &[Grid { images: n, h: 8, w: 8 }], 8)?),
            };
            Ok(Batch { images: vec![tensor(&*dev, DType::F64, own, [n, 32, 32, 3])], packed, most: None })
        })
        .collect::<Result<_>>()?;
    let out = run.step_in_parts(&batches)?;
    let mut all = Vec::new();
    for (name, _, _) in run.model.params.names() {
        all.extend(run.model.params.read(name, Stored::Gradient)?.into_iter().flat_map(|t| t.values));
    }
    let losses = Loss::ALL.into_iter().map(|l| run.value(&out, l)).collect::<Result<_>>()?;
    Ok((all, losses))
}

#[test]
fn a_batch_in_parts_is_the_batch() -> Outcome {
    // Without the losses that depend on the parts: BatchNorm's statistics and the average entropy.
    let mut cfg = small("f64");
    (cfg.loss.gan, cfg.loss.entropy) = (0.0, 0.0);
    let (whole, losses) = gradients_of(&cfg, StageKind::Semantic, 1, false)?;
    assert!(losses[Loss::Cap as usize] > 0.0 && losses[Loss::Rec as usize] > 0.0);
    for parts in [2, 4] {
        let (got, values) = gradients_of(&cfg, StageKind::Semantic, parts, false)?;
        compare("gradients", &got, &whole, whole.len(), Bounds::norm(1e-10))?;
        for (l, (a, b)) in Loss::ALL.iter().zip(values.iter().zip(&losses)) {
            let mean_of_entropies = matches!(l, Loss::EntAvg);
            assert!(mean_of_entropies || (a - b).abs() <= 1e-10 * b.abs().max(1.0), "{l:?}: {a} {b}");
        }
    }
    // With all losses but equal parts, whose statistics are those of each part.
    let mut cfg = small("f64");
    cfg.loss.lecam = 0.0;
    for kind in [StageKind::Tokenizer, StageKind::Semantic] {
        let (one, losses) = gradients_of(&cfg, kind, 1, true)?;
        let (two, values) = gradients_of(&cfg, kind, 2, true)?;
        compare("gradients", &two, &one, one.len(), Bounds::norm(1e-9))?;
        for (l, (a, b)) in Loss::ALL.iter().zip(values.iter().zip(&losses)) {
            let is_lecam = matches!(l, Loss::DLecam);
            assert!(is_lecam || (a - b).abs() <= 1e-9 * b.abs().max(1.0), "{kind:?} {l:?}: {a} {b}");
        }
    }
    Ok(())
}

#[test]
fn recomputation_gives_the_same_bits() -> Outcome {
    for (precision, kind) in
        [("f32", StageKind::Semantic), ("bf16", StageKind::Semantic), ("f32", StageKind::Text)]
    {
        let train = |recompute: Recompute| -> Result<(Bits, u64)> {
            let mut cfg = small(precision);
            cfg.train.recompute = recompute;
            let mut run = Run::new(&cfg, cpu(2), kind, 1e-3)?;
            let data = batch(&run.model, &[[2, 32, 32]], kind)?;
            run.step(&data)?;
            run.step(&data)?;
            Ok((bits(&run.model, Stored::Master)?, run.model.params.device().memory().peak))
        };
        let (kept, mut memory) = train(Recompute::None)?;
        for what in [Recompute::Cheap, Recompute::Blocks] {
            let (again, less) = train(what)?;
            assert!(kept == again, "{precision} {kind:?} {what:?}: other bits");
            assert!(
                less < memory,
                "{precision} {kind:?} {what:?}: {less} bytes, {memory} with less recomputation"
            );
            memory = less;
        }
    }
    Ok(())
}

#[test]
fn groups_have_constants_of_their_own() -> Outcome {
    let usual = Own { scale: 1.0, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0, clip: None };
    let train = |own: Own| -> Result<BTreeMap<String, Bits>> {
        let mut run = Run::new(&small("f32"), cpu(2), StageKind::Semantic, 1e-3)?;
        run.main.set_group(&run.model.params, "projector", own)?;
        let data = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
        run.step(&data)?;
        run.step(&data)?;
        let mut groups = BTreeMap::<String, Bits>::new();
        for (name, b) in bits(&run.model, Stored::Master)? {
            let group = if name.starts_with("discriminator state") {
                "state".into()
            } else {
                group_of(&run.model, &name)
            };
            groups.entry(group).or_default().insert(name, b);
        }
        Ok(groups)
    };
    let (same, fixed) = (train(usual)?, train(Own { scale: 0.0, ..usual })?);
    let fresh = Run::new(&small("f32"), cpu(2), StageKind::Semantic, 1e-3)?;
    for (name, b) in &fixed["projector"] {
        assert!(bits(&fresh.model, Stored::Master)?[name] == *b, "{name} moves at rate 0");
    }
    for other in [
        Own { scale: 0.0, ..usual },
        Own { betas: [0.0, 0.5], ..usual },
        Own { eps: 1e-2, ..usual },
        Own { weight_decay: 0.5, ..usual },
        Own { eps: 1e-2, clip: Some(1e-3), ..usual },
    ] {
        assert!(same["projector"] != train(other)?["projector"], "{other:?}");
    }
    // A first step does not depend on the other groups; the second sees a projector that has changed.
    assert!(same["llm"] != fixed["llm"]);
    let mut run = Run::new(&small("f32"), cpu(1), StageKind::Align, 1e-3)?;
    let e = run.main.set_group(&run.model.params, "llm", usual).expect_err("llm is frozen").to_string();
    assert!(e.contains("llm"), "{e}");
    Ok(())
}

#[test]
fn a_clip_of_its_own_looks_at_a_groups_own_gradient() -> Outcome {
    // The first moment after one step is (1 - beta1) times the clipped gradient.
    let limit = 1e-3;
    let mut cfg = small("f64");
    cfg.train.clip = 0.0;
    let mut run = Run::new(&cfg, cpu(2), StageKind::Semantic, 1e-3)?;
    let own = Own { scale: 1.0, betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0, clip: Some(limit) };
    run.main.set_group(&run.model.params, "projector", own)?;
    let data = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
    run.step(&data)?;
    let p = &run.model.params;
    let norm = |t: &Tensor| -> Result<f64> {
        Ok(t.to_f64(&**p.device())?.iter().map(|v| v * v).sum::<f64>().sqrt())
    };
    for name in ["projector", "llm", "encoder"] {
        let t = p.training(p.group(name).ok_or("a group")?).ok_or("trained")?;
        let (grad, m) = (norm(&t.grad)?, norm(&t.m)?);
        assert!(grad > 10.0 * limit, "{name}: {grad}");
        let want = 0.1 * if name == "projector" { limit } else { grad };
        assert!((m / want - 1.0).abs() < 2e-3, "{name}: {m}, wanted {want}");
    }
    let norms = run.main.norm().to_f64(&**p.device())?;
    assert_eq!(norms.len(), 4, "one row for all, one for the projector");
    Ok(())
}

#[test]
fn a_non_finite_loss_skips_the_update() -> Outcome {
    let mut run = Run::new(&small("f32"), cpu(1), StageKind::Semantic, 1e-3)?;
    let data = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
    run.step(&data)?;
    let dev = run.model.params.device().clone();
    let before = bits(&run.model, Stored::Master)?;
    for (value, count) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (1.0, 0.0)] {
        let losses = tensor(&*dev, DType::F32, &[2.0, value], [2]);
        run.main.apply(&run.model.params, &run.state, &losses, [].iter())?;
        assert_eq!(run.main.norm().to_f64(&*dev)?[1], count, "{value}");
        assert_eq!(bits(&run.model, Stored::Master)? == before, count > 0.0, "{value}");
    }
    Ok(())
}
