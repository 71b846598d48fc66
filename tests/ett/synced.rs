//! Statistics over all ranks: several ranks, as threads, compute what one rank computes with all pictures.

use std::sync::Arc;

use ett::autograd::{Recomputing, Tape, Var};
use ett::backend::*;
use ett::compare::{Bounds, compare};
use ett::config::{Config, DiscriminatorConfig, StageConfig, StageKind};
use ett::data::Framing;
use ett::error::Result;
use ett::model::tokenizer::Discriminator;
use ett::nn::ParamBuilder;
use ett::ops::{self, BatchStats};
use ett::tensor::Tensor;

use crate::common::{Outcome, cpu, normal, tensor};
use crate::ranks::together;

const P: Precision = Precision::F64;
const BOUNDS: Bounds = Bounds { norm: 1e-12, row: 1e-11, element: 1e-10, least: 0.0 };

/// The results of `work` on `n` ranks, of which it gets the number.
fn ranks<R: Send>(n: usize, work: impl Fn(Arc<dyn Kernels>, usize) -> Result<R> + Sync) -> Result<Vec<R>> {
    together(n, |group| work(Arc::new(Cpu::of(1, group.clone())?), group.rank())).into_iter().collect()
}

/// What one rank computes.
struct Seen {
    /// Values with a row for each picture.
    pictures: Vec<Vec<f64>>,
    /// Gradients of weights, which are summed over the ranks.
    weights: Vec<Vec<f64>>,
    /// The same on all ranks.
    shared: Vec<Vec<f64>>,
}

impl Seen {
    /// What the ranks have computed together.
    fn joined(all: &[Seen]) -> Seen {
        let of = |f: fn(&Seen) -> &Vec<Vec<f64>>| -> Vec<Vec<Vec<f64>>> {
            (0..f(&all[0]).len()).map(|i| all.iter().map(|s| f(s)[i].clone()).collect()).collect()
        };
        let sum =
            |parts: Vec<Vec<f64>>| (0..parts[0].len()).map(|i| parts.iter().map(|p| p[i]).sum()).collect();
        assert!(all.iter().all(|s| s.shared == all[0].shared), "the ranks differ");
        Seen {
            pictures: of(|s| &s.pictures).into_iter().map(|parts| parts.concat()).collect(),
            weights: of(|s| &s.weights).into_iter().map(sum).collect(),
            shared: all[0].shared.clone(),
        }
    }

    fn compare(&self, want: &Seen, what: &str, bounds: Bounds) -> Outcome {
        let all = |s: &Seen| [&s.pictures[..], &s.weights, &s.shared].concat();
        for (i, (got, want)) in all(self).iter().zip(all(want)).enumerate() {
            compare(&format!("{what}, value {i}"), got, &want, 1, Bounds { row: bounds.element, ..bounds })?;
        }
        Ok(())
    }
}

/// The statistics of a pass, and their numbers of rows.
fn statistics(dev: &dyn Kernels, all: &[BatchStats]) -> Result<Vec<Vec<f64>>> {
    let of = |s: &BatchStats| Ok([s.mean.to_f64(dev)?, s.var.to_f64(dev)?, vec![s.rows as f64]].concat());
    all.iter().map(of).collect()
}

const SHAPE: [usize; 4] = [6, 3, 2, 5];

/// BatchNorm of rank `rank` of `ranks`, forward and backward: of its part of six pictures.
fn norm(dev: Arc<dyn Kernels>, rank: usize, ranks: usize, merged: bool, cheap: bool) -> Result<Seen> {
    let [n, h, w, c] = SHAPE;
    let part = |seed| {
        let all = normal(seed, SHAPE.iter().product());
        let own = all.chunks(all.len() / ranks).nth(rank).unwrap_or_default();
        tensor(&*dev, DType::F64, &own.iter().map(|v| v + 3.0).collect::<Vec<_>>(), [n / ranks, h, w, c])
    };
    let t = Tape::new(dev.clone(), P).recomputing(Recomputing { cheap, blocks: false });
    let vector = |seed| t.leaf(tensor(&*dev, DType::F64, &normal(seed, c), [c]));
    let (x, w, b) = (t.leaf(part(1)), vector(2), vector(3));
    let norm = if merged { ops::batch_norm_merged } else { ops::batch_norm };
    let (y, stats) = norm(&t, &x, &w, &b, 1e-5, 0.2)?;
    let values = y.value().to_f64(&*dev)?;
    // An op that reads the value in the backward pass, where it may be computed again.
    let z = ops::unary(&t, &y, Unary::Silu)?;
    drop(y);
    let mut g = t.backward(&[(&z, &part(4))])?;
    let mut grad = |v: &Var| g.take(v)?.map_or(Ok(Vec::new()), |t| t.to_f64(&*dev));
    Ok(Seen {
        pictures: vec![values, grad(&x)?],
        weights: vec![grad(&w)?, grad(&b)?],
        shared: statistics(&*dev, &[stats])?,
    })
}

#[test]
fn batch_norm_of_several_ranks_is_that_of_all_their_pictures() -> Outcome {
    let whole = norm(cpu(1), 0, 1, false, false)?;
    for (n, cheap) in [(2, false), (3, false), (2, true)] {
        let parts = ranks(n, |dev, rank| norm(dev, rank, n, true, cheap))?;
        Seen::joined(&parts).compare(&whole, &format!("{n} ranks, recomputing {cheap}"), BOUNDS)?;
    }
    Ok(())
}

#[test]
fn merged_batch_norm_of_one_rank_is_batch_norm() -> Outcome {
    let whole = norm(cpu(1), 0, 1, false, false)?;
    for cheap in [false, true] {
        norm(cpu(1), 0, 1, true, cheap)?.compare(&whole, "one rank", Bounds::norm(1e-15))?;
    }
    Ok(())
}

#[test]
fn merged_batch_norm_needs_two_pixels() -> Outcome {
    let dev = cpu(1);
    let t = Tape::new(dev.clone(), P);
    let vector = |c| t.constant(tensor(&*dev, DType::F64, &vec![1.0; c], [c]));
    let x = t.constant(tensor(&*dev, DType::F64, &[1.0; 3], [1, 1, 1, 3]));
    let result = ops::batch_norm_merged(&t, &x, &vector(3), &vector(3), 1e-5, 0.2);
    let want = "batch_norm_merged: argument `x` is [1, 1, 1, 3], wanted at least 2 pixels on all ranks to take statistics over";
    assert_eq!(result.err().map(|e| e.to_string()).as_deref(), Some(want));
    Ok(())
}

/// A discriminator's pass of rank `rank` of `ranks`, down to the gradient of its pictures, and LeCAM's averages.
fn judge(dev: Arc<dyn Kernels>, rank: usize, ranks: usize, sync: bool) -> Result<Seen> {
    let cfg = DiscriminatorConfig { ndf: 2, lecam_decay: 0.7, sync, ..DiscriminatorConfig::default() };
    let mut builder = ParamBuilder::new();
    let model = Discriminator::new(&mut builder, &cfg);
    let params = builder.build(dev.clone(), P, 1)?;
    let part = |seed, [h, w, c]: [usize; 3]| {
        let all = normal(seed, 6 * h * w * c);
        let own = all.chunks(all.len() / ranks).nth(rank).unwrap_or_default();
        tensor(&*dev, DType::F64, own, [6 / ranks, h, w, c])
    };
    let t = Tape::new(dev.clone(), P);
    let (real, fake) = (t.constant(part(1, [32, 32, 3])), t.leaf(part(2, [32, 32, 3])));
    let (real, _) = model.forward(&t, &params, &real, true)?;
    let (logits, stats) = model.forward(&t, &params, &fake, true)?;
    let lecam = model.lecam_after(&t, &model.state(&*dev, P.acc)?, &real, &logits)?;
    let shape: Vec<usize> = logits.dims().as_slice()[1..].to_vec();
    let values = logits.value().to_f64(&*dev)?;
    let mut g = t.backward(&[(&logits, &part(3, [shape[0], shape[1], shape[2]]))])?;
    let dx: Option<Tensor> = g.take(&fake)?;
    let mut shared = statistics(&*dev, &stats)?;
    shared.push(lecam.to_f64(&*dev)?);
    Ok(Seen {
        pictures: vec![values, dx.map_or(Ok(Vec::new()), |t| t.to_f64(&*dev))?],
        weights: vec![],
        shared,
    })
}

#[test]
fn synchronised_discriminators_are_that_of_all_pictures() -> Outcome {
    let whole = judge(cpu(1), 0, 1, false)?;
    assert_eq!(whole.pictures[1].len(), 6 * 32 * 32 * 3);
    for n in [1, 2, 3] {
        let parts = ranks(n, |dev, rank| judge(dev, rank, n, true))?;
        Seen::joined(&parts).compare(&whole, &format!("{n} ranks"), BOUNDS)?;
    }
    // Each on its own, they are not.
    let parts = ranks(2, |dev, rank| judge(dev, rank, 2, false))?;
    assert!(parts[0].shared != parts[1].shared);
    Ok(())
}

#[test]
fn synchronised_discriminators_need_pictures_of_one_size() {
    let stage = vec![StageConfig::new(StageKind::Tokenizer, 1, 2)];
    let mut c = Config { stage, ..Config::default() };
    c.discriminator.sync = true;
    c.check().expect("squares");
    c.data.framing = Framing::Buckets;
    let e = c.check().expect_err("several sizes").to_string();
    assert!(e.contains("discriminator.sync") && e.contains("buckets"), "{e}");
    c.stage[0].kind = StageKind::Align;
    c.check().expect("a stage without a discriminator");
}
