//! A two-layer language model learns text through the same code on every device: losses are close to the CPU's, a
//! recorded step is bitwise equal to a launched one, and a resumed run is bitwise equal to an uninterrupted one.

use std::sync::Arc;

use ett::backend::{Kernels, Stream};
use ett::config::{Config, ScheduleKind, StageKind};
use ett::error::Result;
use ett::feed::Batch;
use ett::io::{Checkpoints, Progress};
use ett::model::{Ett, FlatBatch, Packed, Part};
use ett::nn::Stored;
use ett::tensor::{Block, Parts, Tensor};
use ett::train::{
    Counts, Hyper, Loss, Optimizer, Outcome as Step, Recipe, Stage, StepState, checkpoint, schedule, step,
};

use crate::common::{Outcome, Scratch, cpu, gpu, ids, shim};

/// Sizes of the model and its batches.
#[derive(Clone, Copy)]
struct Sizes {
    vocab: usize,
    width: usize,
    heads: [usize; 2],
    head_dim: usize,
    mlp: usize,
    /// Peak learning rate.
    rate: f64,
    /// Lengths of the sequences of a batch.
    lengths: &'static [usize],
}

/// For the shim, where a launch takes milliseconds.
const TINY: Sizes =
    Sizes { vocab: 40, width: 16, heads: [2, 1], head_dim: 8, mlp: 24, rate: 3e-3, lengths: &[5, 9, 1] };
/// The usual case.
const SMALL: Sizes = Sizes {
    vocab: 264,
    width: 64,
    heads: [4, 2],
    head_dim: 16,
    mlp: 96,
    rate: 3e-3,
    lengths: &[17, 33, 8, 64, 2],
};
/// As wide as tiles of the kernels, with heads as in Qwen2.5.
const WIDE: Sizes = Sizes {
    vocab: 1031,
    width: 512,
    heads: [4, 2],
    head_dim: 128,
    mlp: 704,
    rate: 5e-4,
    lengths: &[130, 257, 64, 31],
};

const STEPS: usize = 20;

struct Trainer {
    model: Ett,
    recipe: Recipe,
    state: StepState,
    main: Optimizer,
    sizes: Sizes,
    /// The batch, and the block of memory that it consists of.
    batch: Batch,
    block: Tensor,
}

/// The batch of a step: sequences of the same lengths with other words. The first half of each sequence is context.
fn rows(sizes: &Sizes, step: usize) -> Result<FlatBatch> {
    let sequences: Vec<Vec<Part>> = sizes
        .lengths
        .iter()
        .enumerate()
        .map(|(i, &n)| {
            // Few distinct words, so that there is something to learn.
            let words = ids((step * 100 + i) as u64, n, sizes.vocab.min(24));
            let (read, learnt) = words.split_at(n / 2);
            vec![Part::context(read.to_vec()), Part::target(learnt.to_vec())]
        })
        .collect();
    FlatBatch::new(&sequences, &[], 16)
}

fn block(rows: &FlatBatch) -> Block {
    let mut block = Block::default();
    rows.write(&mut block);
    block
}

impl Trainer {
    fn new(dev: Arc<dyn Kernels>, precision: &str, sizes: Sizes) -> Result<Self> {
        let mut cfg = Config::default();
        // The parts that are not used are small.
        let t = &mut cfg.tokenizer;
        (t.ch, t.ch_mult, t.num_res_blocks, t.z_channels, t.norm_groups) = (8, vec![1, 1], 1, 8, 2);
        (cfg.quantizer.codes, cfg.quantizer.dim) = (16, 8);
        cfg.lpips.widths = [4, 4, 4, 4, 4];
        cfg.discriminator.ndf = 4;
        let l = &mut cfg.llm;
        (l.vocab, l.width, l.layers, l.mlp) = (sizes.vocab, sizes.width, 2, sizes.mlp);
        ([l.heads, l.kv_heads], l.head_dim) = (sizes.heads, sizes.head_dim);
        l.init_std = 0.05;
        cfg.train.precision = precision.into();
        let mut model = Ett::new(&cfg, dev.clone())?;
        let stage = Stage::new(StageKind::Text, &model)?;
        model.params.train(&stage.trained())?;
        let mut state = StepState::new(&*dev, model.params.precision().acc)?;
        stage.recipe.weights(&model, &mut state, 1);
        let hyper =
            Hyper { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.01, ema_decay: 0.9, clip: cfg.train.clip };
        model.params.average(&["llm"])?;
        let main = Optimizer::new(&model.params, &stage.groups, hyper)?;
        let first = rows(&sizes, 0)?;
        let block = block(&first).upload(&*dev, Stream::COMPUTE)?;
        let packed = Packed::of(&mut Parts::of(&block), first.sizes())?;
        let batch = Batch { images: vec![], packed: Some(packed), most: None };
        Ok(Trainer { model, recipe: stage.recipe, state, main, sizes, batch, block })
    }

    /// Sets the values that change with the step: rate, counts, words.
    fn prepare(&mut self, at: usize) -> Result<()> {
        let dev = self.model.params.device().clone();
        self.main.prepare(&mut self.state, schedule(ScheduleKind::Cosine, self.sizes.rate, 0.2, at, STEPS));
        let rows = rows(&self.sizes, at)?;
        dev.copy_in(Stream::COMPUTE, block(&rows).bytes(), self.block.out())?;
        Counts::new(&self.model, std::slice::from_ref(&self.batch), rows.tokens(), 0).set(&mut self.state);
        self.state.send(&*dev)
    }

    fn launch(&mut self) -> Result<Step> {
        let parts = std::slice::from_ref(&self.batch);
        step(&mut self.model, &self.recipe, parts, &self.state, &self.main, None)
    }

    /// Losses of the steps `from..to`, launched one by one.
    fn steps(&mut self, from: usize, to: usize) -> Result<Vec<f64>> {
        (from..to)
            .map(|s| {
                self.prepare(s)?;
                self.launch()?.value(&self.model, Loss::Cap)
            })
            .collect()
    }

    /// Weights, averages and moments.
    fn everything(&self) -> Result<Vec<f64>> {
        let mut all = Vec::new();
        for copy in [Stored::Master, Stored::Ema, Stored::Moment1, Stored::Moment2] {
            for (name, _, _) in self.model.params.names() {
                all.extend(self.model.params.read(name, copy)?.into_iter().flat_map(|t| t.values));
            }
        }
        Ok(all)
    }
}

fn bits(v: &[f64]) -> Vec<u64> {
    v.iter().map(|x| x.to_bits()).collect()
}

/// The losses of a device agree with the CPU's within the relative `bound`, or are as close to those in f64 as the
/// CPU's in the same precision: training amplifies small differences, on the CPU too.
fn follows_the_cpu(
    dev: Arc<dyn Kernels>,
    precision: &str,
    sizes: Sizes,
    steps: usize,
    bound: f64,
) -> Outcome {
    let got = Trainer::new(dev, precision, sizes)?.steps(0, steps)?;
    let cpu_losses = |precision: &str| Trainer::new(cpu(0), precision, sizes)?.steps(0, steps);
    let (want, exact) = (cpu_losses(precision)?, cpu_losses("f64")?);
    let worst = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs() / b).fold(0.0, f64::max);
    let (apart, own, theirs) = (worst(&got, &want), worst(&got, &exact), worst(&want, &exact));
    println!(
        "{precision}, width {}: {:.6} to {:.6}; {apart:.1e} from the CPU, {own:.1e} from f64, the CPU {theirs:.1e}",
        sizes.width,
        want[0],
        want[steps - 1]
    );
    // Before differences grow.
    let first = worst(&got[..steps.min(3)], &want[..steps.min(3)]);
    assert!(first <= bound, "{precision}: first losses {got:?}, the CPU's {want:?}, {first:.2e} apart");
    assert!(
        apart <= bound || own <= 2.0 * theirs,
        "{precision}: losses {got:?}, the CPU's {want:?}, in f64 {exact:?}: {apart:.2e} apart"
    );
    assert!(steps < STEPS || want[steps - 1] < 0.8 * want[0], "the model learns: {want:?}");
    Ok(())
}

/// Saving and resuming from the checkpoint in a new model changes no bit.
fn resumes_bitwise(
    dev: &dyn Fn() -> Arc<dyn Kernels>,
    precision: &str,
    sizes: Sizes,
    steps: usize,
) -> Outcome {
    let mut whole = Trainer::new(dev(), precision, sizes)?;
    let want = whole.steps(0, steps)?;
    let mut first = Trainer::new(dev(), precision, sizes)?;
    let mut got = first.steps(0, steps / 2)?;
    let scratch = Scratch::new();
    let checkpoints = Checkpoints::new(&scratch.path("run"), 1);
    let folder = checkpoint::save(&checkpoints, &first.model, &[&first.main], &Progress::default())?;
    drop(first);
    let mut second = Trainer::new(dev(), precision, sizes)?;
    checkpoint::load(&folder, &mut second.model, &[&second.main])?;
    got.extend(second.steps(steps / 2, steps)?);
    assert_eq!(bits(&got), bits(&want), "{precision}: losses {got:?}, never stopped {want:?}");
    assert!(bits(&second.everything()?) == bits(&whole.everything()?), "{precision}: weights and moments");
    Ok(())
}

#[test]
fn cpu_resumes_bitwise() -> Outcome {
    for precision in ["f32", "bf16"] {
        resumes_bitwise(&|| cpu(2), precision, SMALL, STEPS)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs the shim"]
fn shim_follows_the_cpu() -> Outcome {
    follows_the_cpu(shim(), "f32", TINY, 3, 1e-5)?;
    follows_the_cpu(shim(), "bf16", TINY, 3, 2e-2)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_follows_the_cpu() -> Outcome {
    for sizes in [SMALL, WIDE] {
        follows_the_cpu(gpu(), "f32", sizes, STEPS, 1e-4)?;
        follows_the_cpu(gpu(), "bf16", sizes, STEPS, 2e-2)?;
    }
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_resumes_bitwise() -> Outcome {
    for precision in ["f32", "bf16"] {
        resumes_bitwise(&gpu, precision, WIDE, STEPS)?;
    }
    Ok(())
}

/// One recorded step, replayed for every batch and rate.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_recorded_steps_are_bitwise_launched_ones() -> Outcome {
    for precision in ["f32", "bf16"] {
        let mut launched = Trainer::new(gpu(), precision, WIDE)?;
        let want = launched.steps(0, STEPS)?;
        let mut t = Trainer::new(gpu(), precision, WIDE)?;
        let dev = t.model.params.device().clone();
        let mut outcome = None;
        let recording = dev.record(&mut || {
            outcome = Some(t.launch()?);
            Ok(())
        })?;
        let (recording, outcome) =
            (recording.ok_or("a GPU records")?, outcome.ok_or("the step was recorded")?);
        let mut got = Vec::new();
        for s in 0..STEPS {
            t.prepare(s)?;
            recording.replay()?;
            got.push(outcome.value(&t.model, Loss::Cap)?);
        }
        assert_eq!(bits(&got), bits(&want), "{precision}: replayed {got:?}, launched {want:?}");
        assert!(bits(&t.everything()?) == bits(&launched.everything()?), "{precision}: weights and moments");
    }
    Ok(())
}
