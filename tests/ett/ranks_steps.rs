//! Steps of several ranks against the steps of one.

use std::collections::BTreeMap;
use std::sync::Arc;

use ett::backend::{self, Cpu, Kernels};
use ett::compare::{self, Bounds};
use ett::config::{Config, Shard, StageKind, VisualHeadKind};
use ett::error::Result;
use ett::feed::Batch;
use ett::io::load_weights;
use ett::io::weights::read_file;
use ett::model::tokenizer::Grid;
use ett::model::{Ett, Part};
use ett::nn::{HostTensor, Stored};
use ett::ranks::Group;
use ett::train::{Counts, Hyper, Loss, Optimizer, Stage, averaged};

use crate::common::{Outcome, cpu, fixtures, gpu_turn, ids, tensor};
use crate::ranks::together;
use crate::training::{Run, VOCAB, pixels, small};

/// Pixels per side of a token of the small model.
const S: usize = 4;
/// Pictures of a batch, for 2, 3 and 4 ranks.
const PICTURES: usize = 12;
const STEPS: usize = 3;

/// A model with little to compute.
fn config(precision: &str) -> Config {
    let mut cfg = small(precision);
    cfg.visual_head.kind = VisualHeadKind::Tied;
    cfg.discriminator.sync = true;
    cfg.discriminator.lecam_decay = 0.5;
    cfg.loss.gan = 0.3;
    cfg.train.clip = 0.5;
    // Several spans and pieces of each group.
    cfg.train.range_mib = 0.01;
    cfg
}

/// The share of `rank` among `ranks` of the batch of a step: pictures with texts of different lengths.
fn share(model: &Ett, kind: StageKind, step: usize, rank: usize, ranks: usize) -> Result<Batch> {
    let (dev, act) = (&**model.params.device(), model.params.precision().act);
    let n = PICTURES / ranks;
    let own = rank * n..(rank + 1) * n;
    let values: Vec<f64> = own.clone().flat_map(|i| pixels((100 * step + i) as u64, [1, 32, 32])).collect();
    let grids = [Grid { images: n, h: 32 / S, w: 32 / S }];
    let sequence = |(at, i): (usize, usize)| {
        let text = ids((100 * step + i) as u64, 2 + (5 * i + step) % 7, VOCAB);
        match kind {
            StageKind::Text => vec![Part::context(vec![1]), Part::target(text)],
            StageKind::Gen => vec![Part::context(text), Part::Codes(at)],
            _ => vec![Part::context(vec![1]), Part::Image(at), Part::target(text)],
        }
    };
    let sequences: Vec<Vec<Part>> = own.enumerate().map(sequence).collect();
    let pictured = kind != StageKind::Text;
    let packed = match kind {
        StageKind::Tokenizer => None,
        _ => Some(Batch::pack(model, &sequences, if pictured { &grids } else { &[] }, 8)?),
    };
    let images = if pictured { vec![tensor(dev, act, &values, [n, 32, 32, 3])] } else { vec![] };
    Ok(Batch { images, packed, most: None })
}

/// What a rank knows after some steps.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    losses: Vec<BTreeMap<Loss, f64>>,
    norms: Vec<f64>,
    idx: Vec<Vec<i32>>,
    kept: BTreeMap<String, Vec<f64>>,
}

/// Everything kept per parameter.
fn kept(model: &Ett) -> Result<BTreeMap<String, Vec<f64>>> {
    let mut all = BTreeMap::new();
    let names: Vec<String> = model.params.names().map(|(name, ..)| name.to_string()).collect();
    for stored in [Stored::Master, Stored::Gradient, Stored::Ema, Stored::Moment1, Stored::Moment2] {
        for name in &names {
            if let Some(t) = model.params.read(name, stored)? {
                all.insert(format!("{stored:?} {name}"), t.values);
            }
        }
    }
    Ok(all)
}

/// The steps of a rank; each batch consists of `parts` batches.
fn steps(cfg: &Config, dev: Arc<dyn Kernels>, group: &Group, kind: StageKind, parts: usize) -> Result<Seen> {
    let mut run = Run::new(cfg, dev.clone(), kind, 1e-3)?;
    let trained = Stage::new(kind, &run.model)?.trained();
    run.model.params.average(&averaged(&trained))?;
    let (mut losses, mut norms, mut idx) = (Vec::new(), Vec::new(), Vec::new());
    for step in 0..STEPS {
        let of = |part| share(&run.model, kind, parts * step + part, group.rank(), group.ranks());
        let batches = (0..parts).map(of).collect::<Result<Vec<_>>>()?;
        let all = group.sum(&run.counts(&batches)?.numbers())?;
        let counts = Counts::of(all.try_into().unwrap_or_default());
        let values = run.step_counting(&batches, &counts)?.read_later(&*dev)?.wait()?;
        assert!(!values.skipped, "step {step} was skipped");
        losses.push(values.losses);
        norms.push(values.grad_norm);
        idx.push(values.idx);
    }
    // Averages in place of weights and back: an evaluation, which changes nothing.
    run.model.params.swap_averages()?;
    run.model.params.swap_averages()?;
    Ok(Seen { losses, norms, idx, kept: kept(&run.model)? })
}

fn of_one(cfg: &Config, kind: StageKind, parts: usize) -> Result<Seen> {
    steps(cfg, cpu(1), &Group::alone(), kind, parts)
}

/// What all of `n` ranks on the CPU see, which has to be the same bits.
fn of_many(cfg: &Config, n: usize, kind: StageKind, parts: usize) -> Result<Seen> {
    on_devices(cfg, n, kind, parts, &|group| Ok(Arc::new(Cpu::of(1, group.clone())?)))
}

/// Opens the device of a rank.
type Open<'a> = dyn Fn(&Arc<Group>) -> Result<Arc<dyn Kernels>> + Sync + 'a;

fn on_devices(cfg: &Config, n: usize, kind: StageKind, parts: usize, device: &Open) -> Result<Seen> {
    let all = together(n, |group| -> Result<Seen> {
        let seen = device(&group).and_then(|dev| steps(cfg, dev, &group, kind, parts));
        if let Err(e) = &seen {
            group.fail(&e.to_string());
        }
        seen
    });
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    for (rank, seen) in all.iter().enumerate() {
        for (name, values) in &seen.kept {
            let same = values.iter().zip(&all[0].kept[name]).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} of {n} ranks: rank {rank} has another {name}", kind.name());
        }
        assert!(seen == &all[0], "{} of {n} ranks: rank {rank} has other losses", kind.name());
    }
    Ok(all.into_iter().next().unwrap_or_else(|| unreachable!("there are ranks")))
}

/// Compares with bounds relative to the largest value of each tensor.
fn equal(what: &str, got: &Seen, want: &Seen, bound: f64) {
    let close = |name: &str, a: &[f64], b: &[f64]| {
        assert_eq!(a.len(), b.len(), "{what}: {name}");
        let most = b.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
        let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs() / most).fold(0.0, f64::max);
        assert!(worst <= bound, "{what}: {name} differs by {worst:e}");
    };
    for (step, (a, b)) in got.losses.iter().zip(&want.losses).enumerate() {
        assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{what}");
        for (loss, v) in a {
            close(&format!("{} of step {step}", loss.name()), &[*v], &[b[loss]]);
        }
    }
    close("the norms", &got.norms, &want.norms);
    assert_eq!(got.kept.keys().collect::<Vec<_>>(), want.kept.keys().collect::<Vec<_>>(), "{what}");
    for (name, values) in &got.kept {
        close(name, values, &want.kept[name]);
    }
    let lengths = |seen: &Seen| seen.idx.iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(got), lengths(want), "{what}: codes");
}

/// The codes of all ranks, in the order of the pictures, are those of one.
fn same_codes(what: &str, got: &Seen, want: &Seen) {
    assert_eq!(got.idx, want.idx, "{what}: codes");
}

#[test]
fn several_ranks_make_the_steps_of_one() -> Outcome {
    let shards = [Shard::None, Shard::Optimizer, Shard::Gradients];
    for (i, kind) in StageKind::ALL.into_iter().enumerate() {
        let mut cfg = config("f64");
        let want = of_one(&cfg, kind, 1)?;
        for (k, ranks) in [2, 3, 4].into_iter().enumerate() {
            cfg.train.shard = shards[(i + k) % shards.len()];
            let what = format!("{} on {ranks} ranks, {:?}", kind.name(), cfg.train.shard);
            let got = of_many(&cfg, ranks, kind, 1)?;
            equal(&what, &got, &want, 1e-10);
            same_codes(&what, &got, &want);
        }
    }
    Ok(())
}

#[test]
fn batches_of_several_parts_are_shared_part_by_part() -> Outcome {
    let mut cfg = config("f64");
    let want = of_one(&cfg, StageKind::Semantic, 2)?;
    for shard in [Shard::Optimizer, Shard::Gradients] {
        cfg.train.shard = shard;
        let got = of_many(&cfg, 2, StageKind::Semantic, 2)?;
        equal(&format!("{shard:?}"), &got, &want, 1e-10);
    }
    Ok(())
}

/// With bf16, products read a copy of master weights, of which each rank then has its own part only.
#[test]
fn what_is_shared_does_not_change_the_bits() -> Outcome {
    let mut cfg = config("bf16");
    let one = of_one(&cfg, StageKind::Semantic, 1)?;
    let mut all = Vec::new();
    for shard in [Shard::None, Shard::Optimizer, Shard::Gradients] {
        cfg.train.shard = shard;
        all.push(of_many(&cfg, 2, StageKind::Semantic, 1)?);
    }
    assert!(all.iter().all(|seen| seen == &all[0]), "the bits depend on what is shared");
    for (a, b) in all[0].losses[0].iter().zip(&one.losses[0]) {
        assert!((a.1 - b.1).abs() <= 2e-2 * b.1.abs(), "{}: {}, alone {}", a.0.name(), a.1, b.1);
    }
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_several_ranks_make_the_steps_of_one() -> Outcome {
    gpu_turn();
    let gpus = backend::gpus()?;
    let counts: Vec<usize> = [2, 3, 4].into_iter().filter(|&n| n <= gpus).collect();
    if counts.is_empty() {
        println!("skipped: this machine has {gpus} GPU, the test needs two");
    }
    for kind in [StageKind::Tokenizer, StageKind::Semantic, StageKind::Gen] {
        let mut cfg = config("f32");
        let alone = Group::alone();
        let want = steps(&cfg, backend::open_of("cuda:0", 0, &alone)?, &alone, kind, 1)?;
        for (i, &ranks) in counts.iter().enumerate() {
            cfg.train.shard = [Shard::Optimizer, Shard::Gradients, Shard::None][i];
            let what = format!("{} on {ranks} GPUs, {:?}", kind.name(), cfg.train.shard);
            let run = || {
                on_devices(&cfg, ranks, kind, 1, &|group| {
                    backend::open_of(&format!("cuda:{}", group.rank()), 0, group)
                })
            };
            let got = run()?;
            assert!(run()? == got, "{what}: other bits the second time");
            near(&what, &got, &want)?;
        }
    }
    Ok(())
}

/// Compares results in f32: losses and the norm of the first step closely; of those after it, which depend on the signs of
/// gradients that are zero but for rounding, that they are near.
fn near(what: &str, got: &Seen, want: &Seen) -> Outcome {
    for (step, (a, b)) in got.losses.iter().zip(&want.losses).enumerate() {
        let bounds = Bounds::norm(if step == 0 { 2e-5 } else { 1e-2 });
        for (loss, v) in a {
            let name = format!("{what}: {} of step {step}", loss.name());
            compare::compare(&name, &[*v], &[b[loss]], 1, bounds)?;
        }
    }
    compare::compare(&format!("{what}: norm"), &got.norms[..1], &want.norms[..1], 1, Bounds::norm(1e-4))?;
    Ok(())
}

/// With statistics of their own, as PyTorch computes the step of two ranks (tests/oracle/twin.py).
#[test]
fn ranks_with_statistics_of_their_own_agree_with_pytorch() -> Outcome {
    for (file, kind, clips) in [
        ("expected", StageKind::Semantic, false),
        ("tokenizer", StageKind::Tokenizer, false),
        ("clipped", StageKind::Semantic, true),
    ] {
        let dir = fixtures().join("ranks");
        let cfg = Config::load(&dir.join("config.toml"), &["train.precision=\"f64\"".into()])?;
        let want = read_file(&dir.join(format!("{file}.safetensors")))?;
        let all = together(2, |group| -> Result<BTreeMap<String, HostTensor>> {
            let got = twin_step(&cfg, &group, kind, clips);
            if let Err(e) = &got {
                group.fail(&e.to_string());
            }
            got
        });
        let mut compared = 0;
        for (rank, got) in all.into_iter().enumerate() {
            for (name, t) in got? {
                // Of the state, the file has that of rank 0.
                if rank > 0 && name.starts_with("state.") {
                    continue;
                }
                let Some(w) = want.get(&name) else { continue };
                compared += 1;
                let most = w.values.iter().fold(1e-3f64, |m, v| m.max(v.abs()));
                let worst =
                    t.values.iter().zip(&w.values).map(|(a, b)| (a - b).abs() / most).fold(0.0, f64::max);
                assert!(
                    t.values.len() == w.values.len() && worst <= 1e-9,
                    "{file}: {name} differs by {worst:e}"
                );
            }
        }
        assert!(compared > 2 * 200, "{file}: only {compared} tensors were compared");
    }
    Ok(())
}

/// One step of a rank on its share of the fixture's batch: losses, gradients, weights after it, and the discriminator's
/// state.
fn twin_step(
    cfg: &Config,
    group: &Arc<Group>,
    kind: StageKind,
    clips: bool,
) -> Result<BTreeMap<String, HostTensor>> {
    let dir = fixtures().join("ranks");
    let dev: Arc<dyn Kernels> = Arc::new(Cpu::of(1, group.clone())?);
    let mut run = Run::new(cfg, dev.clone(), kind, cfg.train.lr)?;
    load_weights(&run.model.params, &dir.join("weights.safetensors"))?;
    let stage = Stage::new(kind, &run.model)?;
    let t = cfg.train.clone();
    let clip = if clips { t.clip } else { 0.0 };
    let hyper = |betas| Hyper { betas, eps: t.adam_eps, weight_decay: 0.0, ema_decay: 0.0, clip };
    run.main = Optimizer::new(&run.model.params, &stage.groups, hyper(t.betas))?;
    run.disc = Some(Optimizer::new(&run.model.params, &["discriminator"], hyper(t.disc_betas))?);

    let mut file = read_file(&dir.join("batch.safetensors"))?;
    let (image, text) = (file.remove("input.image"), file.remove("input.text"));
    let (Some(image), Some(text)) = (image, text) else { unreachable!("the fixture has a batch") };
    let [b, h, w] = [image.dims[0], image.dims[1], image.dims[2]];
    let (n, l) = (b / group.ranks(), text.dims[1]);
    let own = group.rank() * n..(group.rank() + 1) * n;
    let size = h * w * 3;
    let pixels = tensor(
        &*dev,
        run.model.params.precision().act,
        &image.values[own.start * size..own.end * size],
        [n, h, w, 3],
    );
    let s = cfg.tokenizer.downsampling();
    let grids = [Grid { images: n, h: h / s, w: w / s }];
    let sequence = |(at, i): (usize, usize)| {
        let ids = text.values[i * l..(i + 1) * l].iter().map(|&x| x as i32).collect();
        vec![Part::Image(at), Part::target(ids)]
    };
    let sequences: Vec<Vec<Part>> = own.enumerate().map(sequence).collect();
    let packed = match kind {
        StageKind::Tokenizer => None,
        _ => Some(Batch::pack(&run.model, &sequences, &grids, 1)?),
    };
    let batch = [Batch { images: vec![pixels], packed, most: None }];
    let all = group.sum(&run.counts(&batch)?.numbers())?;
    let out = run.step_counting(&batch, &Counts::of(all.try_into().unwrap_or_default()))?;

    let mut got = BTreeMap::new();
    let mut put = |name: String, values: Vec<f64>| {
        got.insert(name, HostTensor { dims: vec![values.len()], values });
    };
    for (loss, v) in out.read_later(&*dev)?.wait()?.losses {
        put(format!("loss.{}", loss.name()), vec![v]);
    }
    let names: Vec<String> = run.model.params.names().map(|(name, ..)| name.to_string()).collect();
    for (prefix, stored) in [("grad", Stored::Gradient), ("after", Stored::Master)] {
        for name in &names {
            if let Some(t) = run.model.params.read(name, stored)? {
                put(format!("{prefix}.{name}"), t.values);
            }
        }
    }
    for (name, carried) in run.model.carried() {
        put(format!("state.{name}"), carried.values(&run.model)?);
    }
    Ok(got)
}
