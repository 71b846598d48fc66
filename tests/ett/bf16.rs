//! The gradients of the whole model in bf16 against those in f64, for the same rounded weights and pictures. The
//! inputs are made such that rounding changes the choice of no code, because a changed choice would change every
//! gradient behind it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ett::autograd::Tape;
use ett::backend::{DType, Kernels};
use ett::compare::{Bounds, compare};
use ett::config::{Arm, Config, Operands, QuantizerKind, QuantizerMetric, StageKind, VisualHeadKind};
use ett::error::Result;
use ett::formats::Encoding;
use ett::io::save_weights;
use ett::io::weights::{read_file, write_file};
use ett::model::Ett;
use ett::nn::{HostTensor, Stored};
use ett::ops;
use ett::train::check;

use crate::common::{Outcome, Scratch, cpu, gpu, ids, norm, normal, scaled, tensor};
use crate::training::small;

type Tensors = BTreeMap<String, HostTensor>;

const CODEBOOK: &str = "quantize.embedding.weight";
/// The last convolution of the discriminator.
const LOGITS: &str = "loss.discriminator.main.11.";

const DIM: usize = 8;
/// Relative bound of the gradients of a part against f64. Rounding takes up to 0.17 of the discriminator's gradients,
/// whose BatchNorm sees few values, and less of all others; an error by a factor of two is at least 0.4.
const BOUND: f64 = 0.25;
/// `[B, H, W, 3]`: 36 tokens per picture.
const PICTURES: [usize; 4] = [2, 24, 24, 3];
const CODES: usize = 4;

/// The trained arm and its quantizer.
#[derive(Debug, Clone, Copy)]
struct Case {
    arm: Arm,
    kind: QuantizerKind,
    metric: QuantizerMetric,
    operands: Operands,
    alpha: f64,
}

const DOT: Case = Case {
    arm: Arm::Ett,
    kind: QuantizerKind::Ibq,
    metric: QuantizerMetric::Dot,
    operands: Operands::Act,
    alpha: 1.0,
};
const CASES: [Case; 9] = [
    DOT,
    Case { metric: QuantizerMetric::L2norm, ..DOT },
    Case { kind: QuantizerKind::Vq, ..DOT },
    Case { alpha: 0.0, ..DOT },
    Case { arm: Arm::Embed, ..DOT },
    Case { arm: Arm::Index, ..DOT },
    Case { operands: Operands::F32, ..DOT },
    Case { operands: Operands::F32, metric: QuantizerMetric::L2norm, ..DOT },
    Case { operands: Operands::F32, kind: QuantizerKind::Vq, ..DOT },
];

fn config(case: Case, precision: &str) -> Config {
    let mut cfg = small(precision);
    // Wide enough for averages over channels to be averages.
    let t = &mut cfg.tokenizer;
    (t.ch, t.z_channels, t.norm_groups) = (16, 16, 4);
    let q = &mut cfg.quantizer;
    (q.kind, q.metric, q.codes, q.dim) = (case.kind, case.metric, CODES, DIM);
    q.precision = case.operands;
    // At the default temperature, the rounding error of a score would be multiplied by a hundred.
    q.temperature = 0.5;
    cfg.lpips.widths = [16; 5];
    cfg.discriminator.ndf = 8;
    let l = &mut cfg.llm;
    (l.width, l.head_dim, l.mlp) = (64, 16, 96);
    (cfg.train.arm, cfg.loss.alpha) = (case.arm, case.alpha);
    // The discriminator is stepped first, by the sign of every gradient.
    cfg.train.lr = 1e-6;
    // These two losses have kinks and norms of few values, whose gradients lose the most precision in bf16. Their
    // weights are small so that they take part without hiding the other losses.
    (cfg.loss.gan, cfg.loss.lpips, cfg.loss.rec) = (0.001, 0.005, 20.0);
    cfg
}

/// The input files of a step.
struct Step {
    scratch: Scratch,
}

impl Step {
    fn new(case: Case) -> std::result::Result<Self, Box<dyn std::error::Error>> {
        let step = Step { scratch: Scratch::new() };
        let [b, h, w, c] = PICTURES;
        // Pixels of two values only: any reconstruction stays on one side of each.
        let tone = |i: usize| {
            let (x, y, n) = (i / c % w, i / c / w % h, i / c / w / h);
            let wave =
                (0.5 * x as f64 + 0.7 * y as f64 * (1.0 + i as f64 % 3.0 * 0.3) + 2.0 * n as f64).sin();
            if wave > 0.0 { 0.75 } else { -0.75 }
        };
        let image = HostTensor { dims: PICTURES.to_vec(), values: (0..b * h * w * c).map(tone).collect() };
        let text = ids(5, b * 6, 40).into_iter().map(f64::from).collect();
        let text = HostTensor { dims: vec![b, 6], values: text };
        step.write("batch", [("input.image".into(), image), ("input.text".into(), text)].into())?;

        let model = Ett::new(&config(case, "f32"), cpu(2))?;
        save_weights(&model.params, &step.path("weights"), Stored::Master)?;
        let mut weights = read_file(&step.path("weights"))?;
        // Small logits of the discriminator: none is near 1 or -1, where the slope of the hinge changes.
        for t in weights.iter_mut().filter(|(name, _)| name.starts_with(LOGITS)).map(|(_, t)| t) {
            t.values.iter_mut().for_each(|v| *v *= 0.1);
        }
        let values = weights.values_mut().flat_map(|t| &mut t.values);
        values.for_each(|v| *v = DType::Bf16.rounded(*v));
        step.write("weights", weights.clone())?;
        // Tokens do not depend on the codes.
        let z = step.run(&config(case, "f64"))?.remove("act.z").ok_or("tokens")?.values;
        let (margin, codes) = codes(case, &z);
        println!("{case:?}: margin {margin}");
        weights.get_mut(CODEBOOK).ok_or("a codebook")?.values = codes;
        step.write("weights", weights)?;
        Ok(step)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(&format!("{name}.safetensors"))
    }

    fn write(&self, name: &str, tensors: Tensors) -> Result<()> {
        let ty = |n: &str| if n == "input.text" { Encoding::I32 } else { Encoding::F32 };
        let entries: Vec<_> = tensors.into_iter().map(|(n, t)| (n.clone(), t, ty(&n))).collect();
        write_file(&self.path(name), &entries)
    }

    fn run(&self, cfg: &Config) -> Result<Tensors> {
        self.run_on(cpu(2), StageKind::Semantic, cfg)
    }

    fn run_on(&self, dev: Arc<dyn Kernels>, kind: StageKind, cfg: &Config) -> Result<Tensors> {
        let out = self.path(&cfg.train.precision);
        check(cfg, kind, dev, &self.path("weights"), &self.path("batch"), &out)?;
        read_file(&out)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Codes whose decision boundaries are far from the tokens, and their margin: the fraction of its length by which a
/// token has to move to change its code.
fn codes(case: Case, z: &[f64]) -> (f64, Vec<f64>) {
    let length = norm(z) / (z.len() as f64 / DIM as f64).sqrt();
    let scale = match case.kind {
        QuantizerKind::Ibq => 2.0 / length,
        QuantizerKind::Vq => length / (DIM as f64).sqrt(),
    };
    let unit = case.kind == QuantizerKind::Ibq && case.metric == QuantizerMetric::L2norm;
    let margin = |e: &[f64]| {
        let code = |j: usize| -> Vec<f64> {
            let e = &e[j * DIM..][..DIM];
            e.iter().map(|v| if unit { v / norm(e) } else { *v }).collect()
        };
        let all: Vec<Vec<f64>> = (0..CODES).map(code).collect();
        let score = |z: &[f64], e: &[f64]| match case.kind {
            QuantizerKind::Ibq => dot(z, e),
            QuantizerKind::Vq => dot(z, e) - 0.5 * dot(e, e),
        };
        let mut least = f64::INFINITY;
        for z in z.chunks(DIM) {
            let s: Vec<f64> = all.iter().map(|e| score(z, e)).collect();
            let best = (0..CODES).fold(0, |b, j| if s[j] > s[b] { j } else { b });
            for j in (0..CODES).filter(|&j| j != best) {
                let apart: Vec<f64> = all[best].iter().zip(&all[j]).map(|(a, b)| a - b).collect();
                least = least.min((s[best] - s[j]) / (norm(&apart) * norm(z)));
            }
        }
        least
    };
    let draw = |seed| -> Vec<f64> {
        normal(seed, CODES * DIM).iter().map(|v| DType::Bf16.rounded(scale * v)).collect()
    };
    (0..3000)
        .map(|seed| (margin(&draw(seed)), draw(seed)))
        .fold((0.0, vec![]), |a, b| if b.0 > a.0 { b } else { a })
}

/// The part of the model that a parameter belongs to: a block, a layer, a projection.
fn module(name: &str) -> String {
    let layer = name.trim_end_matches(".weight").trim_end_matches(".bias");
    layer.split('.').take(3).collect::<Vec<_>>().join(".")
}

/// The gradients of each part, concatenated.
fn gradients(dump: &Tensors) -> BTreeMap<String, Vec<f64>> {
    let mut all = BTreeMap::<String, Vec<f64>>::new();
    for (name, t) in dump {
        if let Some(parameter) = name.strip_prefix("grad.") {
            all.entry(module(parameter)).or_default().extend(&t.values);
        }
    }
    all
}

/// Fails unless the gradients of every part agree up to `bound`; returns the worst error.
fn agree(what: &str, got: &Tensors, want: &Tensors, bound: f64) -> std::result::Result<f64, String> {
    let (got, want) = (gradients(got), gradients(want));
    if !got.keys().eq(want.keys()) {
        return Err(format!("{what}: gradients of {:?}, wanted {:?}", got.keys(), want.keys()));
    }
    let mut worst = 0.0;
    for (name, w) in &want {
        let e =
            compare(&format!("{what}, gradients of {name}"), &got[name], w, w.len(), Bounds::norm(bound))?;
        worst = f64::max(worst, e.norm);
    }
    Ok(worst)
}

/// The gradients on a device against those of the CPU in f64.
fn gradients_agree(dev: &Arc<dyn Kernels>, precision: &str, bound: f64) -> Outcome {
    for case in CASES {
        let what = format!("{case:?}");
        let step = Step::new(case)?;
        let want = step.run(&config(case, "f64"))?;
        let got = step.run_on(dev.clone(), StageKind::Semantic, &config(case, precision))?;
        assert_eq!(
            got["act.ind"], want["act.ind"],
            "{what}: the choice of a code differs, so that gradients cannot be compared"
        );
        let worst = agree(&what, &got, &want, bound)?;
        println!("{what} in {precision}: off by at most {worst:.1e}");
    }
    Ok(())
}

/// The losses and gradients of every stage on a device against those of the CPU in f64.
fn stages_agree(dev: &Arc<dyn Kernels>, precision: &str, bound: f64) -> Outcome {
    let step = Step::new(DOT)?;
    let with_head = |precision: &str| {
        let mut cfg = config(DOT, precision);
        cfg.visual_head.kind = VisualHeadKind::Linear;
        cfg
    };
    let model = Ett::new(&with_head("f32"), cpu(2))?;
    save_weights(&model.params, &step.path("fresh"), Stored::Master)?;
    let mut weights = read_file(&step.path("weights"))?;
    for (name, mut t) in read_file(&step.path("fresh"))? {
        if let std::collections::btree_map::Entry::Vacant(e) = weights.entry(name) {
            t.values.iter_mut().for_each(|v| *v = DType::Bf16.rounded(*v));
            e.insert(t);
        }
    }
    step.write("weights", weights)?;
    for kind in StageKind::ALL {
        let what = format!("{kind:?}");
        let want = step.run_on(cpu(2), kind, &with_head("f64"))?;
        let got = step.run_on(dev.clone(), kind, &with_head(precision))?;
        assert_eq!(got.get("act.ind"), want.get("act.ind"), "{what}: the choice of a code differs");
        let worst = agree(&what, &got, &want, bound)?;
        println!("{what} in {precision}: gradients off by at most {worst:.1e}");
        let (got, want) = (got["loss.total"].values[0], want["loss.total"].values[0]);
        assert!((got - want).abs() <= bound / 10.0 * want.abs(), "{what}: a loss of {got}, wanted {want}");
    }
    Ok(())
}

#[test]
fn every_stage_in_bf16_is_that_of_f64() -> Outcome {
    stages_agree(&cpu(2), "bf16", BOUND)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_every_stage_in_f32_is_that_of_f64() -> Outcome {
    stages_agree(&gpu(), "f32", 1e-3)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_every_stage_in_bf16_is_that_of_f64() -> Outcome {
    stages_agree(&gpu(), "bf16", BOUND)
}

#[test]
fn gradients_in_bf16_are_those_of_f64() -> Outcome {
    gradients_agree(&cpu(2), "bf16", BOUND)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_gradients_in_f32_are_those_of_f64() -> Outcome {
    gradients_agree(&gpu(), "f32", 1e-3)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_gradients_in_bf16_are_those_of_f64() -> Outcome {
    gradients_agree(&gpu(), "bf16", BOUND)
}

/// With `quantizer.precision = "f32"` tokens and codes of a bf16 step are not rounded before they are compared.
#[test]
fn operands_in_f32_are_not_rounded() -> Outcome {
    let kept = |v: &[f64], dtype: DType| v.iter().all(|&v| dtype.rounded(v) == v);
    for (operands, metric) in [Operands::Act, Operands::F32]
        .into_iter()
        .flat_map(|o| [QuantizerMetric::Dot, QuantizerMetric::L2norm].map(|m| (o, m)))
    {
        let mut cfg = config(Case { operands, metric, ..DOT }, "bf16");
        cfg.train.arm = Arm::Ett;
        let model = Ett::new(&cfg, cpu(2))?;
        let dev = &**model.params.device();
        let t = Tape::inference(model.params.device().clone(), model.params.precision());
        let values = scaled(3, PICTURES.iter().product(), 0.5);
        let x = t.constant(tensor(dev, DType::Bf16, &values, PICTURES));
        let (z, _) = model.tokenizer.encode(&t, &model.params, &[x])?;
        let codes = model.tokenizer.codes(&t, &model.params)?;
        let q =
            model.tokenizer.quantize(&t, &z, &codes, &tensor(dev, DType::F32, &[1.0 / 72.0], [1]), true)?;
        let (zq, idx, _) = model.look_up(&t, &z, &codes)?;
        assert_eq!(q.idx.to_host::<i32>(dev)?, idx.to_host::<i32>(dev)?);
        assert_eq!(q.zq.value().to_f64(dev)?, zq.value().to_f64(dev)?);
        assert_eq!(zq.value().dtype(), DType::Bf16);
        let table = model.tokenizer.table(&t, &model.params)?;
        let read = ops::gather(&t, &table, &idx)?;
        assert_eq!(read.value().to_f64(dev)?, zq.value().to_f64(dev)?, "what is drawn is what was trained");
        let rounds = operands == Operands::Act;
        for (name, v) in [("z", &z), ("codes", &codes)] {
            let values = v.value().to_f64(dev)?;
            assert_eq!(kept(&values, DType::Bf16), rounds, "{name}, {operands:?}, {metric:?}");
            assert!(kept(&values, DType::F32));
        }
    }
    Ok(())
}

/// Tests the test: wrong gradients are found in every part of the model and for every loss.
#[test]
fn wrong_gradients_are_not_those_of_f64() -> Outcome {
    let step = Step::new(DOT)?;
    let want = step.run(&config(DOT, "f64"))?;
    let got = step.run(&config(DOT, "bf16"))?;
    let parts = gradients(&want);
    assert!(parts.len() > 20, "{:?}", parts.keys());
    let spoilt = |part: &str, spoil: &dyn Fn(&mut Vec<f64>)| {
        let mut got = got.clone();
        for (name, t) in &mut got {
            if name.strip_prefix("grad.").is_some_and(|n| part.is_empty() || module(n) == part) {
                spoil(&mut t.values);
            }
        }
        agree("spoilt", &got, &want, BOUND)
    };
    for part in parts.keys().map(String::as_str).chain([""]) {
        for (what, factor) in [("zero", 0.0), ("doubled", 2.0), ("halved", 0.5), ("of the other sign", -1.0)]
        {
            let found = spoilt(part, &|v| v.iter_mut().for_each(|v| *v *= factor));
            assert!(found.is_err(), "gradients of `{part}` that are {what} pass");
        }
    }
    let mut missing = got.clone();
    missing.retain(|name, _| !name.starts_with("grad.model.norm"));
    assert!(agree("missing", &missing, &want, BOUND).is_err());
    // Leaves out one of the losses.
    type Change = fn(&mut Config);
    let losses: [(&str, Change); 3] = [
        ("rec", |c| c.loss.rec = 0.0),
        ("quant", |c| c.loss.quant = 0.0),
        ("alpha", |c| c.loss.alpha *= 0.5),
    ];
    for (loss, change) in losses {
        let mut cfg = config(DOT, "f64");
        change(&mut cfg);
        let found = agree("a loss less", &step.run(&cfg)?, &want, BOUND);
        println!("{loss}: {found:?}");
        assert!(found.is_err(), "without the loss `{loss}` the gradients pass");
    }
    Ok(())
}
