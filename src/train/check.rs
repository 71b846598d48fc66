//! `ett-train check`: runs one step of a stage on given weights and a given batch, and writes all results to a file.

use std::path::Path;
use std::sync::Arc;

use super::StepState;
use super::update::Update;
use super::{Counts, Loss, Outcome, Stage, step};
use crate::autograd::Tape;
use crate::backend::{DType, Kernels, Role};
use crate::config::{Config, ScheduleKind, StageConfig, StageKind};
use crate::error::{Error, Result};
use crate::feed::Batch;
use crate::files;
use crate::formats::{Archive, Encoding, Selection};
use crate::io::weights::{Fit, load_selection, read_file, write_file};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::nn::{HostTensor, Stored};
use crate::tensor::Tensor;

/// Runs the step and writes `dump`. Shapes and names are documented in docs/check.md.
pub fn check(
    cfg: &Config,
    kind: StageKind,
    dev: Arc<dyn Kernels>,
    weights: &Path,
    batch: &Path,
    dump: &Path,
) -> Result<()> {
    files::probe(dump)?;
    let mut model = Ett::new(cfg, dev.clone())?;
    load_selection(&model.params, &Selection::whole(Archive::open(weights)?), Fit::EXACT)?;
    let stage = Stage::new(kind, &model)?;
    model.params.train(&stage.trained())?;

    let (image, text) = read_batch(batch)?;
    let prec = model.params.precision();
    let dims: [usize; 4] = [image.dims[0], image.dims[1], image.dims[2], image.dims[3]];
    let pixels = Tensor::from_f64(&*dev, Role::Input, prec.act, &image.values, dims)?;
    let s = cfg.tokenizer.downsampling();
    let (b, l) = (text.dims[0], text.dims[1]);
    let sequences: Vec<Vec<Part>> = (0..b)
        .map(|i| {
            let ids = text.values[i * l..(i + 1) * l].iter().map(|&x| x as i32).collect();
            match (stage.recipe.codes, stage.reads_pictures()) {
                (true, _) => vec![Part::context(ids), Part::Codes(i)],
                (_, true) => vec![Part::Image(i), Part::target(ids)],
                (_, false) => vec![Part::target(ids)],
            }
        })
        .collect();
    let grid = Grid { images: dims[0], h: dims[1] / s, w: dims[2] / s };
    let (images, grids) = if stage.reads_pictures() { (vec![pixels], vec![grid]) } else { (vec![], vec![]) };
    let packed = match stage.recipe.text || stage.recipe.codes {
        true => Some(Batch::pack(&model, &sequences, &grids, 1)?),
        false => None,
    };
    // The tokens of each text that are predicted: without a picture before it, there is nothing to predict the first one
    // from.
    let predicted = match (stage.recipe.text, stage.reads_pictures()) {
        (true, true) => l,
        (true, false) => l - 1,
        (false, _) => 0,
    };
    let codes = if stage.recipe.codes { grid.tokens() } else { 0 };
    let batch = Batch { images, packed, most: None };

    let parts = [batch];
    // The gradients are written as computed, so there is no clipping; there is no weight decay either.
    let stage_cfg = StageConfig {
        schedule: ScheduleKind::Constant,
        clip: Some(0.0),
        weight_decay: Some(0.0),
        ..StageConfig::new(kind, 1, b)
    };
    let mut update = Update::new(&model, &stage_cfg, &stage)?;
    update.prepare(&model, &stage_cfg, &Counts::new(&model, &parts, b * predicted, codes), 0)?;
    let Update { state, main, disc, .. } = &update;
    // Logits are computed with the weights of the step, so the head is copied before the update.
    let head = model.params.read("model.embed_tokens.weight", Stored::Master)?;
    let out = step(&mut model, &stage.recipe, &parts, state, main, disc.as_ref())?;

    let mut entries = losses(&model, &stage, state, &out)?;
    entries.extend(activations(&model, &out, head, [b, predicted], &*dev)?);
    let trained = stage.trained();
    let names: Vec<String> = model
        .params
        .names()
        .filter(|(_, group, _)| trained.contains(group))
        .map(|(name, _, _)| name.to_string())
        .collect();
    for (prefix, stored) in [("grad", Stored::Gradient), ("after", Stored::Master)] {
        for name in &names {
            if let Some(v) = model.params.read(name, stored)? {
                entries.push((format!("{prefix}.{name}"), v, Encoding::F64));
            }
        }
    }
    write_file(dump, &entries)
}

fn read_batch(path: &Path) -> Result<(HostTensor, HostTensor)> {
    let mut file = read_file(path)?;
    let mut take = |name: &str, rank: usize, want: &str| {
        let t = file.remove(name).ok_or_else(|| Error::weights(path, format!("missing `{name}` {want}")))?;
        match t.dims.len() == rank && !t.values.is_empty() {
            true => Ok(t),
            false => Err(Error::weights(path, format!("`{name}` is {:?}, wanted {want}", t.dims))),
        }
    };
    let image = take("input.image", 4, "[B, H, W, 3]")?;
    let text = take("input.text", 2, "[B, L]")?;
    if image.dims[0] != text.dims[0] {
        let what = format!("{} images but {} texts, wanted one text per image", image.dims[0], text.dims[0]);
        return Err(Error::weights(path, what));
    }
    match file.keys().next() {
        Some(name) => Err(Error::weights(path, format!("unknown `{name}`"))),
        None => Ok((image, text)),
    }
}

type Entry = (String, HostTensor, Encoding);

fn number(name: &str, v: f64) -> Entry {
    (name.into(), HostTensor { dims: vec![1], values: vec![v] }, Encoding::F64)
}

fn losses(model: &Ett, stage: &Stage, state: &StepState, out: &Outcome) -> Result<Vec<Entry>> {
    let l = &model.cfg.loss;
    let mut entries = Vec::new();
    let mut value = std::collections::HashMap::new();
    for loss in Loss::ALL.into_iter().filter(|&l| l != Loss::Code || stage.recipe.codes) {
        let v = out.value(model, loss)?;
        value.insert(loss, v);
        entries.push(number(&format!("loss.{}", loss.name()), v));
    }
    let vq = l.rec * value[&Loss::Rec]
        + l.quant * value[&Loss::Quant]
        + l.lpips * value[&Loss::Lpips]
        + l.gan * value[&Loss::Gan]
        + l.entropy * (value[&Loss::EntSample] - value[&Loss::EntAvg]);
    let alpha = match stage.recipe.tokenizer {
        super::TokenizerMode::Trained(alpha) => alpha,
        _ => 0.0,
    };
    let d = state.get(Loss::DHinge.slot()) * value[&Loss::DHinge]
        + state.get(Loss::DLecam.slot()) * value[&Loss::DLecam];
    entries.push(number("loss.vq", vq));
    entries
        .push(number("loss.total", value[&Loss::Cap] + value.get(&Loss::Code).unwrap_or(&0.0) + alpha * vq));
    entries.push(number("loss.d_loss", d));
    Ok(entries)
}

fn activations(
    model: &Ett,
    out: &Outcome,
    head: Option<HostTensor>,
    [b, l]: [usize; 2],
    dev: &dyn Kernels,
) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut put = |name: &str, t: &Tensor, dims: Option<Vec<usize>>| -> Result<()> {
        let dims = dims.unwrap_or_else(|| t.dims().as_slice().to_vec());
        let ty = if t.dtype() == DType::I32 { Encoding::I32 } else { Encoding::F64 };
        entries.push((name.into(), HostTensor { dims, values: t.to_f64(dev)? }, ty));
        Ok(())
    };
    for (name, t) in [("act.z", out.z.as_ref()), ("act.ind", out.idx.first()), ("act.zq", out.zq.as_ref())] {
        if let Some(t) = t {
            put(name, t, None)?;
        }
    }
    if let [rec] = &out.rec[..] {
        put("act.rec", rec, None)?;
    }
    if let (Some(rows), Some(head)) = (&out.selected, head) {
        let prec = model.params.precision();
        let t = Tape::inference(model.params.device().clone(), prec);
        let dims = [head.dims[0], head.dims[1]];
        let head = Tensor::from_f64(dev, Role::Activation, prec.act, &head.values, dims)?;
        let logits = crate::ops::linear(&t, &t.constant(rows.clone()), &t.constant(head), None)?;
        put("act.text_logits", logits.value(), Some(vec![b, l, dims[0]]))?;
    }
    Ok(entries)
}
