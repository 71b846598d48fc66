//! The quantizer and the losses of the tokenizer as ops, forward and backward, on any device against the CPU in f64.

use std::sync::Arc;

use ett::autograd::Tape;
use ett::backend::{DType, Kernels, Precision, Role};
use ett::compare::{Bounds, compare, no_worse_than};
use ett::error::{Error, Result};
use ett::ops::{self, Entropy, IbqOptions};
use ett::tensor::Tensor;

use crate::common::{Outcome, cpu, gpu, ids, norm, normal, rounded, scaled, shim, tensor};

/// How the tokens of [`quantized`] become codes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Codes {
    Dot,
    L2norm,
    Vq,
}

/// Numbers of a call, by name, and the columns of each.
type Numbers = Vec<(&'static str, Vec<f64>, usize)>;

/// Inputs of a tokenizer's step behind its encoder: B pictures of H x W tokens next to some of K codes of D dimensions,
/// and what its losses compare.
struct Inputs {
    images: usize,
    side: usize,
    dim: usize,
    z: Vec<f64>,
    e: Vec<f64>,
    target: Vec<f64>,
    real: Vec<f64>,
}

impl Inputs {
    fn new(images: usize, side: usize, codes: usize, dim: usize) -> Self {
        let tokens = images * side * side;
        let mut e = normal(1, codes * dim);
        for code in e.chunks_mut(dim) {
            let length = norm(code);
            code.iter_mut().for_each(|v| *v /= length);
        }
        let mut z = scaled(2, tokens * dim, 0.15 / (dim as f64).sqrt());
        for (z, j) in z.chunks_mut(dim).zip(ids(3, tokens, codes)) {
            z.iter_mut().zip(&e[j as usize * dim..]).for_each(|(z, e)| *z += e);
        }
        let target = scaled(4, tokens * dim, 0.4);
        Inputs { images, side, dim, z, e, target, real: scaled(5, tokens * dim, 0.5) }
    }
}

/// Quantizer and losses, forward and backward, as a step of the tokenizer has them behind its encoder; the codes stand for
/// pictures, features and logits in turn. `operands`: the type of tokens and codes.
fn quantized(
    dev: &Arc<dyn Kernels>,
    prec: Precision,
    operands: DType,
    codes: Codes,
    x: &Inputs,
) -> Result<Numbers> {
    let d = &**dev;
    let t = Tape::new(dev.clone(), prec);
    let (m, k) = (x.z.len() / x.dim, x.e.len() / x.dim);
    let one = |v: f64| tensor(d, prec.acc, &[v], [1]);
    let z = t.leaf(tensor(d, operands, &x.z, [m, x.dim]));
    let de = Tensor::zeros(d, Role::Gradient, prec.acc, [k, x.dim])?;
    let e = t.weight(tensor(d, operands, &x.e, [k, x.dim]), Some(de.clone()));
    let entropy = Some(Entropy { temperature: 0.5, eps: 1e-5 });
    let o = IbqOptions { entropy, beta_commit: 1.0, beta_code: 0.25 };
    let per_token = one(1.0 / m as f64);
    let q = match codes {
        Codes::Dot => ops::ibq(&t, &z, &e, &per_token, o)?,
        Codes::L2norm => {
            let (z, e) = (ops::l2_norm(&t, &z, 1e-12)?, ops::l2_norm(&t, &e, 1e-12)?);
            ops::ibq(&t, &z, &e, &per_token, o)?
        }
        Codes::Vq => ops::vq(&t, &z, &e, &per_token, o)?,
    };
    let zq = ops::cast(&t, &q.zq, prec.act)?;
    let picture = ops::reshape(&t, &zq, [x.images, x.side, x.side, x.dim])?;
    let constant = |v: &[f64]| t.constant(tensor(d, prec.act, v, [x.images, x.side, x.side, x.dim]));
    let (target, real) = (constant(&x.target), constant(&x.real));
    let w = t.constant(tensor(d, prec.act, &vec![0.5; x.dim], [x.dim]));
    let per_element = one(1.0 / (m * x.dim) as f64);
    let per_picture = one(1.0 / x.images as f64);
    let logits = ops::reshape(&t, &zq, [x.images, x.side * x.side * x.dim])?;
    let ema = tensor(d, prec.acc, &[0.3, -0.2], [2]);
    let mut losses = vec![
        ("quant", q.quant.clone(), 1.0),
        ("l1", ops::l1(&t, &picture, &target, &per_element)?, 1.0),
        (
            "lpips",
            ops::lpips_layer(&t, &target, &picture, &w, 1e-10, &per_picture, 1.0 / (x.side * x.side) as f64)?,
            1.0,
        ),
        ("generator", ops::gan_generator(&t, &logits, &per_picture)?, 0.3),
        ("hinge", ops::hinge(&t, &logits, false, &per_element, 0.5)?, 0.3),
        ("lecam", ops::lecam(&t, &real, &picture, &ema, &per_element)?, 0.2),
    ];
    losses.extend(q.sample.clone().map(|v| ("sample", v, 0.05)));
    losses.extend(q.avg.clone().map(|v| ("avg", v, -0.05)));
    let mut out: Numbers = vec![
        ("idx", q.idx.to_host::<i32>(d)?.into_iter().map(f64::from).collect(), 1),
        ("bad", q.bad.to_f64(d)?, 1),
    ];
    for (name, loss, _) in &losses {
        out.push((name, loss.value().to_f64(d)?, 1));
    }
    let weights: Vec<Tensor> = losses.iter().map(|(_, _, w)| one(*w)).collect();
    let seeds: Vec<_> = losses.iter().map(|(_, loss, _)| loss).zip(&weights).collect();
    let mut grads = t.backward(&seeds)?;
    let dz = grads.take(&z)?.ok_or_else(|| Error::Training("no gradient for the tokens".into()))?;
    out.push(("dz", dz.to_f64(d)?, x.dim));
    out.push(("de", de.to_f64(d)?, x.dim));
    Ok(out)
}

/// Against the CPU in f64 on the same rounded inputs.
fn quantizer_and_losses_agree(dev: Arc<dyn Kernels>, x: &Inputs) -> Outcome {
    let of = [(Precision::F32, DType::F32), (Precision::BF16, DType::Bf16), (Precision::BF16, DType::F32)];
    for ((prec, operands), codes) in
        of.into_iter().flat_map(|p| [Codes::Dot, Codes::L2norm, Codes::Vq].map(|c| (p, c)))
    {
        let held = Inputs {
            z: rounded(operands, &x.z),
            e: rounded(operands, &x.e),
            target: rounded(prec.act, &x.target),
            real: rounded(prec.act, &x.real),
            ..*x
        };
        let want = quantized(&cpu(0), Precision::F64, DType::F64, codes, &held)?;
        let naive = quantized(&cpu(0), prec, operands, codes, &held)?;
        let got = quantized(&dev, prec, operands, codes, &held)?;
        for (((name, got, cols), (_, want, _)), (_, naive, _)) in got.iter().zip(&want).zip(&naive) {
            let what = format!("{name} in {} with {codes:?} of {operands}", prec.act);
            if matches!(*name, "idx" | "bad") {
                assert_eq!(got, want, "{what}");
                continue;
            }
            let e = match *name {
                // In bf16, rounded gradients of several losses are added up, and rounded directions scored: the error is
                // that of the plain computation.
                "dz" | "de" if prec == Precision::BF16 => {
                    no_worse_than(&what, got, naive, want, *cols, prec.act)?
                }
                // zq is rounded to act.
                _ => compare(&what, got, want, *cols, Bounds::of(prec.act).times(3.0))?,
            };
            println!("{what}: off by {:.1e}", e.norm);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs the shim"]
fn shim_quantizer_and_losses() -> Outcome {
    quantizer_and_losses_agree(shim(), &Inputs::new(2, 4, 70, 24))
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_quantizer_and_losses() -> Outcome {
    quantizer_and_losses_agree(gpu(), &Inputs::new(4, 16, 8192, 256))
}
