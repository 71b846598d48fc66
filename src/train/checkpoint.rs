//! What training goes on from, in one safetensors file.

use std::collections::BTreeMap;
use std::path::Path;

use super::Optimizer;
use super::weights::{FileType, read_file, write_file};
use crate::backend::Role;
use crate::error::{Error, Result};
use crate::model::Ett;
use crate::nn::{Copy, HostTensor};
use crate::tensor::{DType, Tensor};

/// Copies of the parameters in a file, and what their public names are prefixed with.
const COPIES: [(Copy, &str); 4] =
    [(Copy::Master, ""), (Copy::Ema, "ema."), (Copy::Moment1, "moment1."), (Copy::Moment2, "moment2.")];

/// Saves weights, averages, moments, the optimizers' step counts and what the discriminator carries from step to
/// step. [`load_training`] brings all of it back bit for bit.
pub fn save_training(model: &Ett, optimizers: &[&Optimizer], path: &Path) -> Result<()> {
    let dev = &**model.params.device();
    let float = match model.params.precision().acc {
        DType::F64 => FileType::F64,
        _ => FileType::F32,
    };
    let mut out = Vec::new();
    for (copy, prefix) in COPIES {
        for (name, _, _) in model.params.names() {
            if let Some(t) = model.params.read(name, copy)? {
                out.push((format!("{prefix}{name}"), t, float));
            }
        }
    }
    let mut counts: Vec<(String, u64)> =
        optimizers.iter().enumerate().map(|(i, o)| (format!("optimizer.{i}.steps"), o.steps())).collect();
    counts.push(("discriminator.batches".into(), model.discriminator_state.batches));
    for (name, n) in counts {
        out.push((name, HostTensor { dims: vec![1], values: vec![n as f64] }, FileType::F64));
    }
    for (name, t) in carried(model) {
        let t = HostTensor { dims: t.dims().as_slice().to_vec(), values: t.to_f64(dev)? };
        out.push((name, t, float));
    }
    write_file(path, &out)
}

/// Tensors that the discriminator carries from step to step.
fn carried(model: &Ett) -> Vec<(String, &Tensor)> {
    let s = &model.discriminator_state;
    let mut all = vec![("discriminator.lecam".to_string(), &s.lecam)];
    for (i, (mean, var)) in s.running.iter().enumerate() {
        all.push((format!("discriminator.running_mean.{i}"), mean));
        all.push((format!("discriminator.running_var.{i}"), var));
    }
    all
}

/// Loads what [`save_training`] wrote into a model and optimizers that train the same groups. Nothing is changed if
/// the file does not fit.
pub fn load_training(model: &mut Ett, optimizers: &mut [&mut Optimizer], path: &Path) -> Result<()> {
    let tensors = read_file(path)?;
    let mut left: BTreeMap<&str, &HostTensor> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    let mut problems = Vec::new();
    let mut take = |name: &str, dims: &[usize]| match left.remove(name) {
        Some(t) if t.dims == dims => Some(t),
        Some(t) => {
            problems.push(format!("`{name}` is {:?}, wanted {dims:?}", t.dims));
            None
        }
        None => {
            problems.push(format!("missing `{name}` {dims:?}"));
            None
        }
    };
    let mut parameters = Vec::new();
    for (copy, prefix) in COPIES {
        for (name, group, dims) in model.params.names() {
            let group = model.params.group(group).unwrap_or_default();
            let kept = match copy {
                Copy::Ema => model.params.ema(group).is_some(),
                Copy::Moment1 | Copy::Moment2 => model.params.training(group).is_some(),
                _ => true,
            };
            if kept && let Some(t) = take(&format!("{prefix}{name}"), dims) {
                parameters.push((name.to_string(), copy, t));
            }
        }
    }
    let steps: Vec<_> = (0..optimizers.len()).map(|i| take(&format!("optimizer.{i}.steps"), &[1])).collect();
    let batches = take("discriminator.batches", &[1]);
    let states: Vec<_> =
        carried(model).into_iter().map(|(name, t)| (t.clone(), take(&name, t.dims().as_slice()))).collect();
    problems.extend(left.keys().map(|n| format!("unknown `{n}`")));
    if !problems.is_empty() {
        let more = problems.len().saturating_sub(20);
        problems.truncate(20);
        if more > 0 {
            problems.push(format!("and {more} more"));
        }
        let what = format!("does not fit what is being trained: {}", problems.join("; "));
        return Err(Error::weights(path, what));
    }
    for (name, copy, t) in parameters {
        model.params.write_public(&name, copy, t)?;
    }
    model.params.refresh()?;
    for (o, t) in optimizers.iter_mut().zip(steps.into_iter().flatten()) {
        o.resume(t.values[0] as u64);
    }
    let dev = model.params.device().clone();
    for (to, t) in states {
        if let Some(t) = t {
            let from = Tensor::from_f64(&*dev, Role::Input, to.dtype(), &t.values, to.dims())?;
            let cast = crate::backend::Cast { x: from.view(), y: to.out() };
            dev.cast(crate::backend::Stream::COMPUTE, &cast)?;
        }
    }
    if let Some(t) = batches {
        model.discriminator_state.batches = t.values[0] as u64;
    }
    Ok(())
}
