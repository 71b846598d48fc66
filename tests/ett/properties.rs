//! Random shapes and texts: ops return the documented shape or an error, on the CPU and in a plan, and nothing
//! panics.

use std::sync::Arc;

use ett::autograd::{Tape, Var};
use ett::backend::{DType, Kernels, Plan, Precision, Target, Unary};
use ett::config::{
    Config, DataConfig, GroupConfig, MixConfig, StageConfig, StageData, StageKind, VisualHeadKind,
};
use ett::data::{Columns, Crop, Framing, Source};
use ett::error::Result;
use ett::ops::{self, Conv, ConvWith, Entropy, Heads, IbqOptions, InputNorm, Rotary, Seqs};
use ett::train::plan_stage;
use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, RngAlgorithm, TestRng, TestRunner};

use crate::common::{Outcome, Scratch, cpu, int, normal, tensor};

type Checked = std::result::Result<(), TestCaseError>;

thread_local! {
    /// Number of ops that ran forward and backward, and of calls that had to be refused.
    static SEEN: std::cell::Cell<[u32; 2]> = const { std::cell::Cell::new([0; 2]) };
}

fn seen(which: usize) {
    let mut seen = SEEN.get();
    seen[which] += 1;
    SEEN.set(seen);
}

/// [`cases`] of calls checked by [`holds`]: at least a third has to be valid and run, and at least an eighth has to
/// be refused.
fn calls<S: Strategy>(count: u32, of: S, check: impl Fn(S::Value) -> Checked) {
    SEEN.set([0; 2]);
    cases(count, of, check);
    let [ran, refused] = SEEN.get();
    assert!(
        ran >= count / 3 && refused >= count / 8,
        "of {count} cases {ran} calls ran and {refused} were refused"
    );
}

/// Runs the same random cases every time.
fn cases<S: Strategy>(count: u32, of: S, check: impl Fn(S::Value) -> Checked) {
    let config = Cases { cases: count, failure_persistence: None, ..Cases::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    TestRunner::new_with_rng(config, rng).run(&of, check).unwrap_or_else(|e| panic!("{e}"));
}

type Shape = Vec<usize>;

fn any_shape() -> impl Strategy<Value = Shape> {
    prop::collection::vec(0..6usize, 0..=4)
}

/// Usually this shape, sometimes another.
fn mostly(shape: Shape) -> impl Strategy<Value = Shape> {
    prop_oneof![5 => Just(shape), 1 => any_shape()]
}

/// A tape and the tensors that an op under test takes, all of which need gradients.
struct Bench {
    tape: Tape,
    seed: std::cell::Cell<u64>,
}

impl Bench {
    fn leaf(&self, shape: &[usize]) -> Var {
        self.seed.set(self.seed.get() + 1);
        let values = normal(self.seed.get(), shape.iter().product());
        let dims = ett::backend::Dims::from_slice(shape).expect("at most four dimensions");
        self.tape.leaf(tensor(self.tape.dev(), DType::F32, &values, dims))
    }
}

/// Runs an op on both devices, forward and backward. The outputs must have the shapes `want`, and the gradients of
/// the inputs must have the shapes of the inputs. With `None` the op must return an error. Empty tensors may be
/// refused.
fn holds(want: Option<Vec<Shape>>, op: impl Fn(&Bench) -> Result<(Vec<Var>, Vec<Var>)>) -> Checked {
    let devices: [Arc<dyn Kernels>; 2] = [cpu(1), Arc::new(Plan::new())];
    for dev in devices {
        let name = dev.name();
        let bench = Bench { tape: Tape::new(dev, Precision::F32), seed: 0.into() };
        let (inputs, outputs) = match (op(&bench), &want) {
            (Ok(done), _) => done,
            (Err(e), Some(want)) => {
                let e = e.to_string();
                let empty = want.iter().flatten().any(|&n| n == 0);
                prop_assert!(empty, "{name} refused what is documented: {e}");
                continue;
            }
            (Err(e), None) => {
                let e = e.to_string();
                prop_assert!(e.contains("wanted") || e.contains("not supported"), "{name}: {e}");
                seen(1);
                continue;
            }
        };
        let got: Vec<Shape> = outputs.iter().map(|v| v.dims().as_slice().to_vec()).collect();
        prop_assert_eq!(Some(&got), want.as_ref(), "on {}", name);
        let seeds: Vec<Var> = outputs.iter().map(|v| bench.leaf(v.dims().as_slice())).collect();
        let seeds: Vec<_> = outputs.iter().zip(&seeds).map(|(v, s)| (v, s.value())).collect();
        let mut grads = match bench.tape.backward(&seeds) {
            Ok(grads) => grads,
            Err(e) => return Err(TestCaseError::fail(format!("{name}: no backward: {e}"))),
        };
        for input in &inputs {
            let grad = grads.take(input).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let same = grad.is_some_and(|g| g.dims().numel() == input.dims().numel());
            prop_assert!(
                same,
                "{}: the gradient of an input {} is missing or has another shape",
                name,
                input.dims()
            );
        }
        seen(0);
    }
    Ok(())
}

fn rows(shape: &[usize]) -> usize {
    shape[..shape.len().saturating_sub(1)].iter().product()
}

fn cols(shape: &[usize]) -> usize {
    shape.last().copied().unwrap_or(1)
}

#[test]
fn linear_layers() {
    let shapes = (any_shape(), 0..6usize, any::<bool>()).prop_flat_map(|(x, o, bias)| {
        let w = mostly(vec![o, cols(&x)]);
        (Just(x), w, mostly(vec![o]).prop_map(move |b| bias.then_some(b)), any::<bool>())
    });
    calls(96, shapes, |(x, w, b, gelu)| {
        let fits = w.len() == 2 && w[1] == cols(&x) && b.as_ref().is_none_or(|b| *b == [w[0]]);
        holds(fits.then(|| vec![vec![rows(&x), w[0]]]), |t| {
            let (x, w, b) = (t.leaf(&x), t.leaf(&w), b.as_ref().map(|b| t.leaf(b)));
            let y = match gelu {
                false => ops::linear(&t.tape, &x, &w, b.as_ref())?,
                true => ops::linear_gelu(&t.tape, &x, &w, b.as_ref())?,
            };
            Ok(([Some(x), Some(w), b].into_iter().flatten().collect(), vec![y]))
        })
    });
}

#[test]
fn convolutions() {
    let shapes =
        (prop::array::uniform4(0..7usize), prop::array::uniform3(0..5usize)).prop_flat_map(|(x, k)| {
            let w = mostly(vec![k[0], k[1], k[2], x[3]]);
            let b = mostly(vec![k[0]]);
            (mostly(x.to_vec()), w, prop::option::of(b), 0..4usize, 0..4usize, 0..4usize)
        });
    calls(160, shapes, |(x, w, b, stride, before, after)| {
        let conv = Conv { stride, before, after };
        let side = |i: usize| (x[i] + before + after).checked_sub(w[i]).map(|n| n / stride + 1);
        let fits = x.len() == 4
            && w.len() == 4
            && w[3] == x[3]
            && stride > 0
            && b.as_ref().is_none_or(|b| *b == [w[0]]);
        let want = match fits {
            true => side(1).zip(side(2)).map(|(h, wide)| vec![vec![x[0], h, wide, w[0]]]),
            false => None,
        };
        holds(want, |t| {
            let (x, w, b) = (t.leaf(&x), t.leaf(&w), b.as_ref().map(|b| t.leaf(b)));
            let y = ops::conv2d(&t.tape, &x, &w, b.as_ref(), conv)?;
            Ok(([Some(x), Some(w), b].into_iter().flatten().collect(), vec![y]))
        })
    });
}

#[test]
fn convolutions_of_normalised_pictures() {
    let sizes = (0..4usize, 1..5usize, 1..5usize, 1..4usize, 1..4usize);
    let shapes = sizes.prop_flat_map(|(b, h, w, groups, width)| {
        let c = groups * width;
        (
            mostly(vec![b, h, w, c]),
            mostly(vec![c]),
            mostly(vec![4, 3, 3, c]),
            mostly(vec![b, h, w, 4]),
            prop_oneof![7 => Just(groups), 1 => 0..6usize],
            prop_oneof![7 => Just(2usize), 1 => 0..6usize],
        )
    });
    calls(128, shapes, |(x, scale, w, residual, groups, of_y)| {
        let fits = x.len() == 4
            && scale == [x[3]]
            && w == [4, 3, 3, x[3]]
            && residual == [x[0], x[1], x[2], 4]
            && groups > 0
            && x[3].is_multiple_of(groups)
            && [1, 2, 4].contains(&of_y);
        holds(fits.then(|| vec![residual.clone()]), |t| {
            let (x, w, residual) = (t.leaf(&x), t.leaf(&w), t.leaf(&residual));
            let (scale, shift) = (t.leaf(&scale), t.leaf(&scale));
            let stats = ops::group_stats(&t.tape, &x, groups, 1e-5)?;
            let norm = Some(InputNorm { stats: &stats, w: &scale, b: &shift });
            let with = ConvWith { norm, residual: Some(&residual), stats: Some((of_y, 1e-5)) };
            let y = ops::conv2d_with(&t.tape, &x, &w, None, Conv::same(3), with)?.0;
            Ok((vec![x, scale, shift, w, residual], vec![y]))
        })
    });
}

#[test]
fn norms_over_rows() {
    let shapes = (0..7usize, 0..7usize).prop_flat_map(|(n, c)| {
        (mostly(vec![n, c]), mostly(vec![c]), mostly(vec![c]), mostly(vec![n, c]), 0..4usize)
    });
    calls(128, shapes, |(x, w, b, residual, which)| {
        let vector = |v: &Shape| x.len() == 2 && *v == [x[1]];
        let fits = match which {
            0 => vector(&w),
            1 => vector(&w) && vector(&b),
            2 => vector(&w) && residual == x,
            _ => x.len() == 2,
        };
        let outputs = if which == 2 { 2 } else { 1 };
        holds(fits.then(|| vec![x.clone(); outputs]), |t| {
            let (x, w, b, r) = (t.leaf(&x), t.leaf(&w), t.leaf(&b), t.leaf(&residual));
            Ok(match which {
                0 => (vec![x.clone(), w.clone()], vec![ops::rms_norm(&t.tape, &x, &w, 1e-6)?]),
                1 => {
                    let y = ops::layer_norm(&t.tape, &x, &w, &b, 1e-6)?;
                    (vec![x, w, b], vec![y])
                }
                2 => {
                    let (sum, y) = ops::add_rms_norm(&t.tape, &x, &r, &w, 1e-6)?;
                    (vec![x, r, w], vec![sum, y])
                }
                _ => (vec![x.clone()], vec![ops::l2_norm(&t.tape, &x, 1e-12)?]),
            })
        })
    });
}

#[test]
fn norms_over_pictures() {
    let shapes = prop::array::uniform4(0..7usize).prop_flat_map(|x| {
        (mostly(x.to_vec()), mostly(vec![x[3]]), mostly(vec![x[3]]), 0..5usize, any::<bool>(), 0..3usize)
    });
    calls(128, shapes, |(x, w, b, groups, silu, which)| {
        let vectors = x.len() == 4 && w == [x[3]] && b == [x[3]];
        let fits = vectors && (which > 0 || groups > 0 && x[3] % groups == 0);
        holds(fits.then(|| vec![x.clone()]), |t| {
            let (x, w, b) = (t.leaf(&x), t.leaf(&w), t.leaf(&b));
            let y = match which {
                0 => ops::group_norm(&t.tape, &x, &w, &b, groups, 1e-5, silu)?,
                1 => ops::batch_norm(&t.tape, &x, &w, &b, 1e-5, 0.2)?.0,
                _ => ops::batch_norm_merged(&t.tape, &x, &w, &b, 1e-5, 0.2)?.0,
            };
            Ok((vec![x, w, b], vec![y]))
        })
    });
}

#[test]
fn attention_over_any_sequences() {
    let shapes =
        (prop::collection::vec(0..9usize, 0..5), 0..5usize, 0..4usize, 0..9usize, 0..3usize, any::<bool>())
            .prop_flat_map(|(lengths, query, kv, dim, spare, causal)| {
                let total: usize = lengths.iter().sum();
                let qkv = mostly(vec![total + spare, (query + 2 * kv) * dim]);
                (Just(lengths), qkv, Just(Heads { query, kv, dim, scale: 0.5, causal }))
            });
    calls(128, shapes, |(lengths, qkv, h)| {
        let total: usize = lengths.iter().sum();
        let fits = qkv.len() == 2
            && qkv[0] >= total
            && qkv[1] == (h.query + 2 * h.kv) * h.dim
            && h.kv > 0
            && h.query % h.kv == 0;
        holds(fits.then(|| vec![vec![qkv[0], h.query * h.dim]]), |t| {
            let x = t.leaf(&qkv);
            let y = ops::attention(&t.tape, &x, &Seqs::new(t.tape.dev(), &lengths)?, h)?;
            Ok((vec![x], vec![y]))
        })
    });
}

#[test]
fn rows_by_index() {
    let shapes = (0..6usize, 0..6usize)
        .prop_flat_map(|(r, c)| (mostly(vec![r, c]), prop::collection::vec(-1..r.max(1) as i32, 0..7)));
    calls(96, shapes, |(table, idx)| {
        let inside = |i: &i32| *i < table.first().copied().unwrap_or(0) as i32;
        // An index outside of the table is reported with the next value that is read: see the conformance tests.
        prop_assume!(idx.iter().all(inside));
        holds((table.len() == 2).then(|| vec![vec![idx.len(), table[1]]]), |t| {
            let x = t.leaf(&table);
            let y = ops::gather(&t.tape, &x, &int(t.tape.dev(), &idx))?;
            Ok((vec![x], vec![y]))
        })
    });
}

#[test]
fn rotations_and_gates() {
    let shapes = (0..6usize, 0..4usize, 0..4usize, 0..3usize, any::<bool>()).prop_flat_map(
        |(n, heads, half, more, odd)| {
            let dim = 2 * half + usize::from(odd);
            let position = prop_oneof![5 => n..=n, 1 => 0..8usize]
                .prop_flat_map(|count| prop::collection::vec(0..100i32, count));
            let r = Rotary { heads, head_dim: dim, theta: 1e4 };
            (mostly(vec![n, heads * dim + more]), position, Just(r))
        },
    );
    calls(128, shapes, |(x, position, r)| {
        let fits = x.len() == 2
            && x[0] == position.len()
            && r.head_dim % 2 == 0
            && r.head_dim > 0
            && r.heads * r.head_dim <= x[1];
        holds(fits.then(|| vec![x.clone()]), |t| {
            let x = t.leaf(&x);
            let y = ops::rope(&t.tape, &x, &int(t.tape.dev(), &position), r)?;
            Ok((vec![x], vec![y]))
        })?;
        let halves = x.len() == 2 && x[1] % 2 == 0;
        holds(halves.then(|| vec![vec![x[0], x[1] / 2]]), |t| {
            let x = t.leaf(&x);
            let y = ops::swiglu(&t.tape, &x)?;
            Ok((vec![x], vec![y]))
        })
    });
}

#[test]
fn larger_and_smaller_pictures() {
    calls(96, prop_oneof![any_shape(), prop::collection::vec(0..7usize, 4)], |x| {
        let picture = x.len() == 4;
        holds(picture.then(|| vec![vec![x[0], 2 * x[1], 2 * x[2], x[3]]]), |t| {
            let x = t.leaf(&x);
            let y = ops::upsample2x(&t.tape, &x)?;
            Ok((vec![x], vec![y]))
        })?;
        let doubled = |i: usize| 2 * x.get(i).copied().unwrap_or(0);
        let c = x.last().copied().unwrap_or(0);
        holds(picture.then(|| vec![vec![x[0], doubled(1), doubled(2), 5]]), |t| {
            let (x, w) = (t.leaf(&x), t.leaf(&[5, 3, 3, c]));
            let y = ops::upsample2x_conv2d(&t.tape, &x, &w, None)?;
            Ok((vec![x, w], vec![y]))
        })?;
        holds(picture.then(|| vec![vec![x[0], x[1] / 2, x[2] / 2, x[3]]]), |t| {
            let x = t.leaf(&x);
            let y = ops::max_pool2x2(&t.tape, &x)?;
            Ok((vec![x], vec![y]))
        })
    });
}

#[test]
fn rows_apart_and_together() {
    let shapes = (any_shape(), prop::collection::vec(0..4usize, 0..4), any_shape());
    calls(96, shapes, |(x, counts, other)| {
        let sum: usize = counts.iter().sum();
        let fits = x.len() == 2 && sum == x[0];
        holds(fits.then(|| counts.iter().map(|&n| vec![n, x[1]]).collect()), |t| {
            let x = t.leaf(&x);
            let parts = ops::split_rows(&t.tape, &x, &counts)?;
            Ok((if parts.is_empty() { vec![] } else { vec![x] }, parts))
        })?;
        let joined = (cols(&x) == cols(&other)).then(|| vec![vec![rows(&x) + rows(&other), cols(&x)]]);
        holds(joined, |t| {
            let (x, other) = (t.leaf(&x), t.leaf(&other));
            let y = ops::concat_rows(&t.tape, &[&x, &other])?;
            Ok((vec![x, other], vec![y]))
        })?;
        holds((x == other).then(|| vec![x.clone()]), |t| {
            let (x, other) = (t.leaf(&x), t.leaf(&other));
            let y = ops::add(&t.tape, &x, &other)?;
            Ok((vec![x, other], vec![y]))
        })?;
        holds(Some(vec![x.clone()]), |t| {
            let x = t.leaf(&x);
            let y = ops::unary(&t.tape, &x, Unary::Silu)?;
            Ok((vec![x], vec![y]))
        })
    });
}

#[test]
fn quantizers() {
    let shapes = (0..9usize, 0..9usize, 0..5usize)
        .prop_flat_map(|(m, k, d)| (mostly(vec![m, d]), mostly(vec![k, d]), any::<bool>()));
    calls(96, shapes, |(z, e, ibq)| {
        let fits = z.len() == 2 && e.len() == 2 && z[1] == e[1] && e[0] > 0;
        let m = z.first().copied().unwrap_or(1);
        let options = IbqOptions {
            entropy: Some(Entropy { temperature: 0.1, eps: 1e-5 }),
            beta_commit: 1.0,
            beta_code: 0.25,
        };
        let want = fits.then(|| {
            let mut all = vec![z.clone(), vec![1]];
            all.extend(if ibq { vec![vec![1], vec![1]] } else { vec![] });
            all
        });
        holds(want, |t| {
            let inv_count = tensor(t.tape.dev(), DType::F32, &[1.0 / m.max(1) as f64], [1]);
            let (z, e) = (t.leaf(&z), t.leaf(&e));
            let q = match ibq {
                true => ops::ibq(&t.tape, &z, &e, &inv_count, options)?,
                false => ops::vq(&t.tape, &z, &e, &inv_count, options)?,
            };
            let outputs = [Some(q.zq), Some(q.quant), q.sample, q.avg].into_iter().flatten().collect();
            Ok((vec![z, e], outputs))
        })
    });
}

#[test]
fn any_override_is_taken_or_refused_in_words() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("config.toml");
    std::fs::write(&path, "[[stage]]\nkind = \"text\"\nsteps = 1\nbatch = 1\n")?;
    let keys = prop_oneof![
        Just("train.lr"),
        Just("stage.0.steps"),
        Just("stage.0"),
        Just("stage"),
        Just("data"),
        Just("tokenizer.ch_mult"),
        Just("tokenizer.ch_mult.0"),
        Just("data.size")
    ];
    let text = prop_oneof![
        any::<String>(),
        "[a-z.0-9]{0,12}=[\\[\\]{}=\"'a-z0-9.,\n -]{0,12}",
        (keys, "[\\[\\]{}=\"'a-z0-9.,\n -]{0,8}").prop_map(|(key, value)| format!("{key}={value}")),
        "-?(train|stage|data)?[.=]{0,3}(0|99999999999999999999|seed)?[.=]{0,3}",
    ];
    cases(512, prop::collection::vec(text, 1..3), |overrides| {
        if let Err(e) = Config::load(&path, &overrides) {
            let e = e.to_string();
            prop_assert!(e.contains("wanted") || e.contains("not a configuration"), "{overrides:?}: {e}");
        }
        Ok(())
    });
    cases(256, any::<String>(), |text| {
        std::fs::write(&path, &text).map_err(|e| TestCaseError::fail(e.to_string()))?;
        if let Err(e) = Config::load(&path, &[]) {
            prop_assert!(e.to_string().contains("config.toml: not a configuration"), "{text:?}: {e}");
        }
        Ok(())
    });
    Ok(())
}

/// The smallest model with every part, and a value for every optional key.
fn every_key() -> Config {
    let mut c = Config::default();
    (c.tokenizer.ch, c.tokenizer.ch_mult, c.tokenizer.norm_groups) = (8, vec![1, 2], 4);
    (c.tokenizer.num_res_blocks, c.tokenizer.z_channels) = (1, 8);
    (c.quantizer.codes, c.quantizer.dim) = (16, 4);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    let l = &mut c.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (264, 16, 1, 2, 1, 8, 24);
    (c.data.size, c.data.text_tokens) = (32, 8);
    c.visual_head.kind = VisualHeadKind::Tied;
    let own = GroupConfig {
        lr: Some(1e-3),
        betas: Some([0.5, 0.9]),
        clip: Some(0.5),
        weight_decay: Some(0.1),
        adam_eps: Some(1e-8),
    };
    let data = StageData {
        source: Some(Source::Scenes),
        train: Some("train".into()),
        test: Some("test".into()),
        images: Some("images".into()),
        test_images: Some("test images".into()),
        columns: Some(Columns { image: Some("picture".into()), ..Columns::default() }),
        mix: Some(vec![MixConfig { source: Source::Scenes, weight: 2.0, ..MixConfig::default() }]),
        framing: Some(Framing::Square),
        train_samples: Some(9),
        test_samples: Some(3),
        size: Some(16),
        crop: Some(Crop::Random),
        flip: Some(false),
        text_tokens: Some(7),
    };
    let groups = [("llm".to_string(), own)].into();
    let with = |kind| StageConfig {
        lr: Some(1e-3),
        betas: Some([0.9, 0.95]),
        ema: true,
        warmup: Some(0.1),
        clip: Some(1.0),
        weight_decay: Some(0.0),
        adam_eps: Some(1e-8),
        data: data.clone(),
        ..StageConfig::new(kind, 2, 4)
    };
    c.stage = vec![StageConfig { groups, ..with(StageKind::Semantic) }, with(StageKind::Gen)];
    c
}

/// The paths of all values in a configuration as JSON, where absent values are null; lists contribute themselves and
/// their elements.
fn leaves(v: &serde_json::Value, at: Vec<String>, all: &mut Vec<Vec<String>>) {
    let below = |k: String| [at.clone(), vec![k]].concat();
    match v {
        serde_json::Value::Object(o) => o.iter().for_each(|(k, v)| leaves(v, below(k.clone()), all)),
        serde_json::Value::Array(a) => {
            a.iter().enumerate().for_each(|(i, v)| leaves(v, below(i.to_string()), all));
            all.push(at);
        }
        _ => all.push(at),
    }
}

/// The value at a path; missing tables on the way are inserted.
fn place<'a>(v: &'a mut toml::Value, at: &[String]) -> &'a mut toml::Value {
    let Some((first, rest)) = at.split_first() else { return v };
    let next = match v {
        toml::Value::Array(a) => &mut a[first.parse::<usize>().expect("a number")],
        toml::Value::Table(t) => t.entry(first.clone()).or_insert(toml::Value::Boolean(false)),
        v => return v,
    };
    place(next, rest)
}

/// Extreme values that no one writes on purpose.
fn extreme() -> impl Strategy<Value = toml::Value> {
    use toml::Value::*;
    let whole = [
        0,
        1,
        2,
        3,
        7,
        1 << 13,
        1 << 16,
        1 << 20,
        i64::from(i32::MAX),
        1 << 32,
        1 << 60,
        i64::MAX,
        -1,
        i64::MIN,
    ];
    let real = [
        0.0,
        -0.0,
        0.5,
        1.0,
        -1.0,
        1e-320,
        1e-20,
        1e9,
        1e300,
        f64::MAX,
        f64::INFINITY,
        -f64::INFINITY,
        f64::NAN,
    ];
    prop_oneof![
        4 => prop::sample::select(whole.to_vec()).prop_map(Integer),
        4 => prop::sample::select(real.to_vec()).prop_map(Float),
        1 => prop::sample::select(vec![
            Boolean(true), String("x".into()), String("gen".into()), Array(vec![]), Array(vec![Integer(1); 9]),
            Array(vec![Float(f64::NAN); 2]), Table(toml::Table::new()),
        ]),
    ]
}

/// Loads `every_key` with some values replaced. An error must be one line that names one of the keys.
fn replaced(
    path: &std::path::Path,
    changes: &[(&Vec<String>, toml::Value)],
) -> std::result::Result<Option<Config>, TestCaseError> {
    let mut table = toml::Value::try_from(every_key()).expect("a table");
    for (at, value) in changes {
        *place(&mut table, at) = value.clone();
    }
    std::fs::write(path, toml::to_string(&table).expect("TOML"))
        .map_err(|e| TestCaseError::fail(e.to_string()))?;
    let e = match Config::load(path, &[]) {
        Ok(c) => return Ok(Some(c)),
        Err(e) => e.to_string(),
    };
    let key = |at: &&Vec<String>| {
        at.iter().rev().find(|k| k.parse::<usize>().is_err()).is_some_and(|k| e.contains(k))
    };
    prop_assert!(!e.contains('\n') && changes.iter().any(|(at, _)| key(at)), "{changes:?}: {e}");
    Ok(None)
}

/// Every key of the configuration, including future ones, with extreme values: the result is a configuration that can
/// be planned, or a sentence that names the key.
#[test]
fn any_value_of_any_key_is_taken_or_refused_by_name() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("config.toml");
    let mut keys = Vec::new();
    leaves(&serde_json::to_value(every_key())?, vec![], &mut keys);
    assert!(keys.len() > 90 && keys.contains(&vec!["lpips".into(), "weights".into()]), "{keys:?}");

    let values = serde_json::to_value(every_key())?;
    for key in &keys {
        let now = key.iter().fold(&values, |v, k| k.parse::<usize>().map_or(&v[k.as_str()], |i| &v[i]));
        let mut wrong = match now {
            v if v.is_u64() => vec![toml::Value::Integer(-1), toml::Value::Float(0.5)],
            v if v.is_f64() => [f64::NAN, f64::INFINITY, -1.0, f64::MAX].map(toml::Value::Float).to_vec(),
            _ => vec![],
        };
        // Any number is a valid seed of a run.
        if now.is_u64() && key.last().is_none_or(|k| k != "seed") {
            wrong.push(toml::Value::Integer(i64::MAX));
        }
        // A negative guidance is one away from the prompt.
        if key.last().is_some_and(|k| k == "guidance") {
            wrong.retain(|v| *v != toml::Value::Float(-1.0));
        }
        for value in wrong {
            let what = format!("{key:?} = {value}");
            let taken = replaced(&path, &[(key, value)]).map_err(|e| format!("{what}: {e}"))?;
            assert!(taken.is_none(), "{what} was accepted");
        }
    }

    let change = || (prop::sample::select(keys.clone()), extreme());
    cases(1500, prop::collection::vec(change(), 1..4), |changes| {
        // Elements of a list first, because the list itself may be replaced.
        let mut changes: Vec<_> = changes.iter().map(|(at, v)| (at, v.clone())).collect();
        changes.sort_by_key(|(at, _)| std::cmp::Reverse(at.len()));
        let Some(c) = replaced(&path, &changes)? else { return Ok(()) };
        let tokens = |data: DataConfig| data.text_tokens + (data.size / c.tokenizer.downsampling()).pow(2);
        let blocks = c.llm.layers + c.tokenizer.num_res_blocks;
        let small = |s: &&StageConfig| blocks <= 16 && tokens(c.data_of(s)) * s.batch <= 1 << 14;
        for s in c.stage.iter().filter(small) {
            if let Err(e) = plan_stage(&c, s, Target::Cpu { threads: 2 }) {
                let e = e.to_string();
                prop_assert!(!e.contains('\n') && e.contains("wanted"), "{changes:?}: no plan: {e}");
            }
        }
        Ok(())
    });
    Ok(())
}
