//! The tiled quantizer kernels against the dense closed form.

use std::sync::Arc;

use ett::backend::{DType, Kernels, Metric, Nearest, Precision, Role, Stream};
use ett::compare::{Bounds, choices, compare, indices};
use ett::tensor::Tensor;

use crate::common::{Outcome, cpu, gpu, ids, norm, normal, rounded, scaled, shim, tensor};
use crate::dense::{Answer, Problem, dense, kernels, kernels_on};

const PRECISIONS: [Precision; 3] = [Precision::F64, Precision::F32, Precision::BF16];
const SIZES: [usize; 6] = [1, 63, 64, 65, 1000, 1025];

/// Compares all results. Scores have a rounding error of about their size times that of the accumulator type, which
/// exponentials turn into a relative error; `wide` is the resulting factor on the bounds of one product. Losses and
/// gradients that cancel are compared relative to those of one token.
fn agree(what: &str, prec: Precision, p: &Problem, got: &Answer, want: &Answer, wide: f64) -> Outcome {
    let (acc, act) = (Bounds::of(prec.acc).times(wide), Bounds::of(prec.act));
    let spread = want.smax.iter().fold(1.0, |a: f64, b| a.max(b.abs()));
    let act = match prec.act {
        DType::Bf16 => act,
        _ => act.times(wide),
    };
    choices(what, &got.idx, &p.scores(), p.k, 4.0 * spread * Bounds::of(prec.acc).norm)?;
    indices(what, &got.idx, &want.idx)?;
    let stat = |name: &str, got: &[f64], want: &[f64]| {
        compare(&format!("{what}, {name}"), got, want, 1, Bounds { row: f64::INFINITY, ..acc }.least(1e-3))
    };
    stat("smax", &got.smax, &want.smax)?;
    stat("rest_p", &got.rest_p, &want.rest_p)?;
    stat("rest_q", &got.rest_q, &want.rest_q)?;
    stat("xbar", &got.xbar, &want.xbar)?;
    for (name, i) in [("quant", 0), ("sample", 1), ("avg", 2)] {
        compare(&format!("{what}, {name}"), &got.losses[i..=i], &want.losses[i..=i], 1, acc.least(1e-2))?;
    }
    assert_eq!(got.zq, want.zq, "{what}: zq is a copy of the codes");
    assert_eq!(got.bad, 0.0);
    let least = 1e-2 * norm(&p.g);
    compare(&format!("{what}, dz"), &got.dz, &want.dz, p.d, act.least(least))?;
    compare(&format!("{what}, de"), &got.de, &want.de, p.d, acc.least(least))?;
    Ok(())
}

fn sweep(shapes: impl Iterator<Item = [usize; 3]>) -> Outcome {
    let dev = cpu(2);
    for [m, k, d] in shapes {
        for prec in PRECISIONS {
            let what = format!("{m}x{k}x{d} in {}", prec.act);
            // Two codes may have equal scores after rounding: looks for numbers for which every token has a unique
            // best code.
            let seeds = (0..100).map(|s| (m + 10 * k + 100 * d + 1_000_000 * s) as u64);
            let p = seeds
                .map(|seed| Problem::new(m, k, d, 1.0, seed).rounded(prec))
                .find(|p| well_separated(p, 1e-4))
                .ok_or_else(|| format!("{what}: no numbers without near ties"))?;
            agree(&what, prec, &p, &kernels(&dev, prec, &p)?, &dense(&p), 30.0)?;
        }
    }
    Ok(())
}

/// True if the best and the second-best score of every token differ by more than `gap`.
fn well_separated(p: &Problem, gap: f64) -> bool {
    p.scores().chunks(p.k).all(|row| {
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        row.iter().filter(|&&s| s > best - gap).count() == 1
    })
}

#[test]
fn any_number_of_tokens() -> Outcome {
    sweep(SIZES.into_iter().flat_map(|m| [[m, 65, 3], [m, 33, 16]]))
}

#[test]
fn any_number_of_codes() -> Outcome {
    sweep(SIZES.into_iter().flat_map(|k| [[3, k, 5], [65, k, 8]]))
}

#[test]
fn any_dimension() -> Outcome {
    sweep([1, 2, 7, 63, 64, 65, 256, 1000, 1025].into_iter().flat_map(|d| [[7, 67, d], [66, 129, d]]))
}

#[test]
fn many_tiles_in_both_directions() -> Outcome {
    sweep([[200, 5000, 24], [333, 3001, 7], [1025, 1025, 65]].into_iter())
}

#[test]
fn both_placements_of_beta_and_the_paper_temperature() -> Outcome {
    let dev = cpu(2);
    for (beta_commit, beta_code) in [(1.0, 0.25), (0.25, 1.0), (0.0, 0.0)] {
        for w in [[0.0; 3], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.25, 0.0125, -0.0125]] {
            for prec in PRECISIONS {
                // Scores with a standard deviation of 0.05, so that q at T = 0.01 is neither flat nor one-hot.
                let p = Problem {
                    beta_commit,
                    beta_code,
                    w,
                    temperature: 0.01,
                    ..Problem::new(70, 150, 12, 0.05, 5)
                };
                let p = p.rounded(prec);
                let what = format!("betas {beta_commit} {beta_code}, weights {w:?}, {}", prec.act);
                // T = 0.01 multiplies rounding errors by a hundred.
                agree(&what, prec, &p, &kernels(&dev, prec, &p)?, &dense(&p), 300.0)?;
            }
        }
    }
    Ok(())
}

/// Tokens whose best code has probability `p_top` at temperature 1: each token points at some code and is scaled
/// until its softmax is as peaked as required.
fn peaked(p_top: f64, prec: Precision) -> Problem {
    let (m, k, d) = (67, 1000, 32);
    let mut p = Problem { w: [0.0; 3], ..Problem::new(m, k, d, 1.0, 11) };
    p.e = normal(1, k * d);
    let noise = scaled(2, m * d, 0.3);
    for (i, &t) in ids(3, m, k / 2).iter().enumerate() {
        let code = &p.e[t as usize * d..][..d];
        let direction: Vec<f64> = code.iter().zip(&noise[i * d..]).map(|(c, n)| c + n).collect();
        let scores: Vec<f64> =
            p.e.chunks(d).map(|e| e.iter().zip(&direction).map(|(a, b)| a * b).sum()).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // 1 - p falls as the token is scaled up. `rest` is (1 - p) / p, which is exact even for p close to 1.
        let rest = |stretch: f64| -> f64 {
            scores.iter().filter(|&&s| s != top).map(|s| (stretch * (s - top)).exp()).sum()
        };
        let want = (1.0 - p_top) / p_top;
        let (mut low, mut high) = (0.0, 100.0);
        for _ in 0..200 {
            let middle = 0.5 * (low + high);
            if rest(middle) > want { low = middle } else { high = middle }
        }
        direction.iter().zip(&mut p.z[i * d..]).for_each(|(x, z)| *z = low * x);
    }
    p.rounded(prec)
}

/// The bounds for gradients of a softmax whose best code has probability `p_top`. A rounding error of a score of
/// magnitude 10 to 100 is a relative error of its probability; the dense form cancels down to 1 - p.
fn soft(dtype: DType, p_top: f64) -> Bounds {
    Bounds::of(dtype).times(match dtype {
        DType::F64 => 60.0 + 0.02 / (1.0 - p_top),
        DType::F32 => 60.0,
        // Values in bf16 were computed in f32.
        _ => 1.0,
    })
}

/// The type that the gradient of the scores is rounded to before it is multiplied by tokens and codes: of the portable
/// kernels, and of those for Hopper, which a GPU of the tests may have.
fn portable(prec: Precision) -> DType {
    prec.acc
}
fn hopper(prec: Precision) -> DType {
    prec.act
}

/// The soft gradients alone. The losses have no weight, so that dE consists of the soft part and the scatter of g
/// into the rows of the chosen codes, where the soft part is far below one rounding of g. Rows of codes that no token
/// chose contain only the soft part, so dE is compared there. The chosen code's own dS is part of dz, which sums over
/// all codes. Codes are chosen from the first half, so at least half of the rows remain.
fn peaked_softmax(dev: &Arc<dyn Kernels>, precisions: &[Precision], ds: fn(Precision) -> DType) -> Outcome {
    for &prec in precisions {
        for p_top in [0.03, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0 - 1e-7] {
            let p = peaked(p_top, prec);
            let (got, want) = (kernels(dev, prec, &p)?, dense(&p));
            let what = format!("p_top {p_top} in {}", prec.act);
            indices(&what, &got.idx, &want.idx)?;
            let far: Vec<f64> =
                want.rest_p.iter().map(|r| (r / (1.0 + r) / (1.0 - p_top)).ln().abs()).collect();
            let far = far.iter().copied().fold(0.0, f64::max);
            assert!(far < 1.0, "{what}: rounding moved 1 - p by a factor of {:.2}", far.exp());

            let unchosen: Vec<usize> = (0..p.k).filter(|&j| !want.idx.contains(&(j as i32))).collect();
            assert!(unchosen.len() >= p.k / 2);
            let rows = |v: &[f64]| -> Vec<f64> {
                unchosen.iter().flat_map(|&j| v[j * p.d..(j + 1) * p.d].to_vec()).collect()
            };
            // All values together, and the worst token: every token is as peaked as the others.
            let dz = compare(&format!("{what}, soft dz"), &got.dz, &want.dz, p.d, soft(prec.act, p_top))?;
            let de = soft(ds(prec), p_top);
            let de = compare(&format!("{what}, soft dE"), &rows(&got.de), &rows(&want.de), p.d, de)?;
            // With the scatter, every row of dE agrees to the precision of what is added.
            let whole = Bounds::of(ds(prec)).times(if ds(prec) == prec.acc { 10.0 } else { 1.0 });
            compare(&format!("{what}, whole dE"), &got.de, &want.de, p.d, whole)?;
            println!("{what}: dz off by {:.1e}, dE by {:.1e}", dz.norm, de.norm);
        }
    }
    Ok(())
}

#[test]
fn peaked_softmax_keeps_its_soft_gradients() -> Outcome {
    peaked_softmax(&cpu(2), &PRECISIONS, portable)
}

#[test]
#[ignore = "needs the shim"]
fn shim_peaked_softmax() -> Outcome {
    peaked_softmax(&shim(), &PRECISIONS[1..], portable)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_peaked_softmax() -> Outcome {
    peaked_softmax(&gpu(), &PRECISIONS[1..], hopper)
}

/// The same tokens at a temperature that makes q, not p, as peaked.
fn peaked_q(dev: &Arc<dyn Kernels>, precisions: &[Precision], ds: fn(Precision) -> DType) -> Outcome {
    for &prec in precisions {
        for p_top in [0.5, 0.99, 0.9999, 1.0 - 1e-7] {
            for w in [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]] {
                let mut p = Problem { temperature: 0.01, w, ..peaked(p_top, prec) };
                // About a hundredth of the score, by a power of two so that nothing is rounded again.
                p.z.iter_mut().for_each(|v| *v /= 128.0);
                p.temperature = 1.0 / 128.0;
                p.g.fill(0.0);
                let (got, want) = (kernels(dev, prec, &p)?, dense(&p));
                let what = format!("q_top {p_top} in {}, weights {w:?}", prec.act);
                compare(&format!("{what}, dz"), &got.dz, &want.dz, p.d, soft(prec.act, p_top))?;
                compare(&format!("{what}, dE"), &got.de, &want.de, p.d, soft(ds(prec), p_top))?;
                let losses = soft(prec.acc, p_top);
                compare(&format!("{what}, losses"), &got.losses[1..], &want.losses[1..], 1, losses)?;
            }
        }
    }
    Ok(())
}

#[test]
fn peaked_entropies() -> Outcome {
    peaked_q(&cpu(2), &PRECISIONS, portable)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_peaked_entropies() -> Outcome {
    peaked_q(&gpu(), &PRECISIONS[1..], hopper)
}

/// A run in bf16 with `quantizer.precision` "act" and "f32" against the dense form of what is not rounded at all, at the
/// paper's temperature: the numbers of docs/quantizer.md.
#[test]
fn operands_in_f32_keep_what_bf16_rounds_away() -> Outcome {
    let dev = cpu(2);
    let p = Problem { temperature: 0.01, ..Problem::new(1000, 4096, 32, 0.05, 21) };
    // Means over tokens.
    let p = Problem { g: rounded(DType::Bf16, &p.g.iter().map(|g| g / 1000.0).collect::<Vec<_>>()), ..p };
    let want = dense(&p);
    let off = |operands: DType| -> Result<[f64; 4], Box<dyn std::error::Error>> {
        let held = Problem { z: rounded(operands, &p.z), e: rounded(operands, &p.e), ..p.clone() };
        let got = kernels_on(&dev, Precision::BF16, operands, &held)?;
        let changed = got.idx.iter().zip(&want.idx).filter(|(a, b)| a != b).count() as f64 / p.m as f64;
        let error = |name: &str, got: &[f64], want: &[f64]| {
            compare(name, got, want, got.len(), Bounds::norm(f64::INFINITY)).map(|e| e.norm)
        };
        let losses = error("losses", &got.losses, &want.losses)?;
        Ok([changed, error("dz", &got.dz, &want.dz)?, error("de", &got.de, &want.de)?, losses])
    };
    let (act, f32) = (off(DType::Bf16)?, off(DType::F32)?);
    println!("codes changed, errors of dz, dE, losses: {act:?} in bf16, {f32:?} in f32");
    assert!(act[0] > 1e-3 && act[1] > 1e-2, "bf16 would do: {act:?}");
    assert_eq!(f32[0], 0.0, "codes of f32 operands");
    let most = Bounds::of(DType::F32).times(100.0).norm;
    assert!(f32[1..].iter().all(|&e| e < most), "{f32:?}");
    Ok(())
}

/// Counted by the kernels' own queries, which take an H100 for granted where there is no GPU.
#[cfg(ett_cuda)]
#[test]
fn cuda_takes_at_most_64_mib_for_any_number_of_codes() -> Outcome {
    use ett::backend::{Plan, Target};
    use ett::ops::{self, Entropy, IbqOptions};

    const SHAPES: [[usize; 3]; 5] = [
        [16_384, 131_072, 256],
        [16_384, 1 << 20, 256],
        [16_384, 131_073, 512],
        [1 << 20, 1 << 20, 512],
        [1, 1 << 20, 512],
    ];
    let entropy = Some(Entropy { temperature: 0.01, eps: 1e-5 });
    for (prec, [m, k, d]) in PRECISIONS[1..].iter().flat_map(|&p| SHAPES.map(|s| (p, s))) {
        let plan = Arc::new(Plan::of(Target::Cuda));
        let dev: Arc<dyn Kernels> = plan.clone();
        let empty = |dtype, dims: [usize; 2]| Tensor::empty(&*dev, Role::Input, dtype, dims);
        let one = || Tensor::empty(&*dev, Role::Input, prec.acc, [1]);
        for entropy in [entropy, None] {
            let o = IbqOptions { entropy, beta_commit: 1.0, beta_code: 0.25 };
            for op in [ops::ibq, ops::vq] {
                let t = ett::autograd::Tape::new(dev.clone(), prec);
                let z = ops::l2_norm(&t, &t.leaf(empty(prec.act, [m, d])?), 1e-12)?;
                let e = t.weight(empty(prec.act, [k, d])?, Some(empty(prec.acc, [k, d])?));
                let q = op(&t, &z, &e, &one()?, o)?;
                let (g, w) = (empty(prec.act, [m, d])?, one()?);
                let losses = [Some(&q.quant), q.sample.as_ref(), q.avg.as_ref()].into_iter().flatten();
                let seeds: Vec<_> = losses.map(|loss| (loss, &w)).chain([(&q.zq, &g)]).collect();
                t.backward(&seeds)?;
            }
        }
        let idx = Tensor::empty(&*dev, Role::Input, DType::I32, [m])?;
        let (z, e) = (empty(prec.act, [m, d])?, empty(prec.act, [k, d])?);
        for metric in [Metric::Dot, Metric::L2] {
            let a = Nearest { z: z.view(), e: e.view(), idx: idx.out(), score: None, bad: None, metric };
            dev.nearest(Stream::COMPUTE, &a)?;
        }
        let counted = plan.kernels();
        for name in ["ibq_rows", "ibq_cols", "ibq_losses", "ibq_bwd", "nearest", "vq_losses", "vq_bwd"] {
            let bytes = counted.get(name).ok_or_else(|| format!("{name} was not called"))?.workspace;
            let what = format!("{name} in {}, [{m}, {d}] among [{k}, {d}]", prec.act);
            println!("{what}: {:.1} MiB", bytes as f64 / (1 << 20) as f64);
            assert!(bytes <= 64 << 20, "{what}: {bytes} bytes");
        }
    }
    Ok(())
}

/// Indices by `nearest` with a metric.
fn nearest(dev: &dyn Kernels, dtype: DType, z: &[f64], e: &[f64], d: usize, metric: Metric) -> Vec<i32> {
    let (z, e) = (tensor(dev, dtype, z, [z.len() / d, d]), tensor(dev, dtype, e, [e.len() / d, d]));
    let idx = Tensor::empty(dev, Role::Activation, DType::I32, [z.dims()[0]]).expect("memory");
    let a = Nearest { z: z.view(), e: e.view(), idx: idx.out(), score: None, bad: None, metric };
    dev.nearest(Stream::COMPUTE, &a).expect("the arguments are right");
    idx.to_host(dev).expect("indices")
}

/// Indices by every kernel that computes them.
fn every_way(dtype: DType, z: &[f64], e: &[f64], d: usize, want: &[i32]) -> Outcome {
    let dev = cpu(2);
    indices("nearest by dot", &nearest(&*dev, dtype, z, e, d, Metric::Dot), want)?;
    let prec = PRECISIONS.into_iter().find(|p| p.act == dtype).ok_or("a float type")?;
    let (m, k) = (z.len() / d, e.len() / d);
    let p = Problem { z: z.to_vec(), e: e.to_vec(), ..Problem::new(m, k, d, 1.0, 1) };
    indices("ibq", &kernels(&dev, prec, &p)?.idx, want)?;
    Ok(())
}

#[test]
fn ties_go_to_the_smallest_index() -> Outcome {
    for prec in PRECISIONS {
        for k in [1, 2, 64, 65, 1000, 1025, 3000] {
            let d = 3;
            // All scores zero; all scores equal; only the last two codes tied.
            every_way(prec.act, &[0.0; 6], &normal(1, k * d), d, &[0, 0])?;
            every_way(prec.act, &[1.0, -2.0, 0.5, 3.0, 0.0, 1.0], &[0.25, 0.5, -1.0].repeat(k), d, &[0, 0])?;
            let mut e = vec![0.0; k * d];
            let first = k.saturating_sub(2);
            e[first * d..].iter_mut().for_each(|v| *v = 1.0);
            every_way(prec.act, &[1.0, 1.0, 1.0], &e, d, &[first as i32])?;
        }
    }
    Ok(())
}

#[test]
fn duplicate_codes_share_their_probability() -> Outcome {
    let dev = cpu(2);
    for prec in PRECISIONS {
        // Every code occurs twice, far apart in the codebook: the first one is chosen, and p_top is below one half.
        let mut p = Problem::new(67, 600, 5, 4.0, 3);
        let half = p.e.len() / 2;
        p.e.copy_within(..half, half);
        let p = p.rounded(prec);
        let (got, want) = (kernels(&dev, prec, &p)?, dense(&p));
        assert!(want.idx.iter().all(|&j| j < 300) && want.rest_p.iter().all(|&r| r >= 1.0));
        agree(&format!("duplicates in {}", prec.act), prec, &p, &got, &want, 100.0)?;
    }
    Ok(())
}

#[test]
fn a_code_finds_itself() -> Outcome {
    let (k, d) = (2000, 16);
    // With the distance this holds for any codes, with the dot product for unit vectors.
    let e = normal(1, k * d);
    let unit: Vec<f64> =
        e.chunks(d).flat_map(|r| r.iter().map(|v| v / norm(r)).collect::<Vec<_>>()).collect();
    let all: Vec<i32> = (0..k as i32).collect();
    let dev = cpu(2);
    for dtype in [DType::F64, DType::F32, DType::Bf16] {
        indices("by distance", &nearest(&*dev, dtype, &e, &e, d, Metric::L2), &all)?;
    }
    for dtype in [DType::F64, DType::F32] {
        every_way(dtype, &unit, &unit, d, &all)?;
    }
    Ok(())
}

#[test]
fn well_separated_data_has_no_mismatch() -> Outcome {
    let (m, k, d) = (1500, 3000, 24);
    let dev = cpu(2);
    let (z, e) = (normal(1, m * d), normal(2, k * d));
    let scores = |metric: Metric| -> Vec<f64> {
        let score = |z: &[f64], e: &[f64]| -> f64 {
            match metric {
                Metric::Dot => z.iter().zip(e).map(|(a, b)| a * b).sum(),
                Metric::L2 => -z.iter().zip(e).map(|(a, b)| (a - b) * (a - b)).sum::<f64>(),
            }
        };
        z.chunks(d).flat_map(|z| e.chunks(d).map(move |e| score(z, e))).collect()
    };
    for metric in [Metric::Dot, Metric::L2] {
        let s = scores(metric);
        let got = nearest(&*dev, DType::F32, &z, &e, d, metric);
        choices("nearest", &got, &s, k, 1e-4)?;
        let (mut sure, mut wrong) = (0, 0);
        for (row, &j) in s.chunks(k).zip(&got) {
            let best = (0..k).fold(0, |b, j| if row[j] > row[b] { j } else { b });
            if row.iter().enumerate().all(|(j, &v)| j == best || v < row[best] - 1e-4) {
                sure += 1;
                wrong += usize::from(best as i32 != j);
            }
        }
        assert!(sure > 1400 && wrong == 0, "{metric:?}: {wrong} of {sure} indices are wrong");
    }
    Ok(())
}

#[test]
fn k_131072_exactly() -> Outcome {
    let (m, k, d) = (6, 131_072, 8);
    let dev = cpu(2);
    let mut p = Problem::new(m, k, d, 1.0, 9);
    // The best codes are at both ends, at the edge of a tile and in the middle; the code of token 4 occurs twice.
    let places = [0, k - 1, 1023, 65_536, 1024, k - 2];
    for (i, &j) in places.iter().enumerate() {
        let z = p.z[i * d..(i + 1) * d].to_vec();
        let size = norm(&z);
        let code: Vec<f64> = z.iter().map(|v| v / size * 12.0 / size).collect();
        p.e[j * d..(j + 1) * d].copy_from_slice(&code);
        if i == 4 {
            p.e[(k - 3) * d..(k - 2) * d].copy_from_slice(&code);
        }
    }
    for prec in PRECISIONS {
        let p = p.clone().rounded(prec);
        let want = dense(&p);
        indices("planted", &want.idx, &places.map(|j| j as i32))?;
        let got = kernels(&dev, prec, &p)?;
        agree(&format!("K = 131072 in {}", prec.act), prec, &p, &got, &want, 100.0)?;
        let planted: Vec<i32> = places.iter().map(|&j| j as i32).collect();
        indices("nearest", &nearest(&*dev, prec.act, &p.z, &p.e, d, Metric::Dot), &planted)?;
    }
    Ok(())
}

#[test]
fn nan_ranks_below_all_numbers() -> Outcome {
    let (m, k, d) = (70, 200, 4);
    let dev = cpu(2);
    for prec in PRECISIONS {
        let good = Problem::new(m, k, d, 1.0, 4).rounded(prec);
        let sound = kernels(&dev, prec, &good)?;
        // A token with a NaN has no score: it gets index 0 and is counted, and its neighbours are not affected.
        let mut p = good.clone();
        for row in [0, 65] {
            p.z[row * d + 1] = f64::NAN;
        }
        let got = kernels(&dev, prec, &p)?;
        assert_eq!(got.bad, 2.0);
        for i in 0..m {
            if i == 0 || i == 65 {
                assert_eq!(got.idx[i], 0);
            } else {
                assert_eq!(
                    (got.idx[i], got.smax[i], got.rest_p[i]),
                    (sound.idx[i], sound.smax[i], sound.rest_p[i])
                );
            }
        }
        for metric in [Metric::Dot, Metric::L2] {
            let idx = nearest(&*dev, prec.act, &p.z, &p.e, d, metric);
            assert_eq!((idx[0], idx[65]), (0, 0), "{metric:?}");
        }
        // A token whose best score is infinite has no finite score.
        let mut p = good.clone();
        p.z[3 * d] = f64::INFINITY;
        assert_eq!(kernels(&dev, prec, &p)?.bad, 1.0);
        // A code with a NaN is never chosen, wherever it is.
        let mut p = good.clone();
        let dead = [0, 3, 64, 199];
        for j in dead {
            p.e[j * d] = f64::NAN;
        }
        let scores = p.scores();
        let want: Vec<i32> = scores
            .chunks(k)
            .map(|row| (1..k).fold(1, |b, j| if row[j] > row[b] { j } else { b }) as i32)
            .collect();
        for metric in [Metric::Dot, Metric::L2] {
            let idx = nearest(&*dev, prec.act, &p.z, &p.e, d, metric);
            assert!(idx.iter().all(|&j| !dead.contains(&(j as usize))), "{metric:?}");
        }
        let got = kernels(&dev, prec, &p)?;
        indices("codes with NaN", &got.idx, &want)?;
        assert_eq!(got.bad, 0.0);
        // All codes are NaN.
        let mut p = good.clone();
        p.e.fill(f64::NAN);
        let got = kernels(&dev, prec, &p)?;
        assert!(got.idx.iter().all(|&j| j == 0) && got.bad == m as f64);
    }
    Ok(())
}

#[test]
fn the_same_bits_on_one_and_two_threads_and_again() -> Outcome {
    let (one, two) = (cpu(1), cpu(2));
    for prec in PRECISIONS {
        for [m, k, d] in [[1, 5, 3], [130, 2500, 17], [513, 1000, 64]] {
            let p = Problem::new(m, k, d, 3.0, 6).rounded(prec);
            let first = kernels(&one, prec, &p)?;
            for dev in [&one, &two, &two] {
                assert!(kernels(dev, prec, &p)? == first, "{m}x{k}x{d} in {}", prec.act);
            }
            for metric in [Metric::Dot, Metric::L2] {
                let idx = |dev: &dyn Kernels| nearest(dev, prec.act, &p.z, &p.e, d, metric);
                assert_eq!(idx(&*one), idx(&*two));
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_are_added_to_what_is_there() -> Outcome {
    // The codebook's gradient accumulates, over micro-batches and over a second use of the codebook.
    use ett::autograd::Tape;
    use ett::ops::{self, Entropy, IbqOptions};
    let dev = cpu(2);
    let (m, k, d) = (9, 70, 5);
    let p = Problem::new(m, k, d, 1.0, 8);
    let want = dense(&p).de;
    let de = tensor(&*dev, DType::F64, &vec![3.0; k * d], [k, d]);
    let t = Tape::new(dev.clone(), Precision::F64);
    let z = t.constant(tensor(&*dev, DType::F64, &p.z, [m, d]));
    let e = t.weight(tensor(&*dev, DType::F64, &p.e, [k, d]), Some(de.clone()));
    let o = IbqOptions {
        entropy: Some(Entropy { temperature: p.temperature, eps: p.eps }),
        beta_commit: p.beta_commit,
        beta_code: p.beta_code,
    };
    let inv_count = tensor(&*dev, DType::F64, &[1.0 / m as f64], [1]);
    let q = ops::ibq(&t, &z, &e, &inv_count, o)?;
    let put = |v: &[f64], n: [usize; 2]| tensor(&*dev, DType::F64, v, n);
    let g = put(&p.g, [m, d]);
    let w = p.w.map(|w| put(&[w], [1, 1]));
    let (sample, avg) = (q.sample.as_ref().ok_or("sample")?, q.avg.as_ref().ok_or("avg")?);
    t.backward(&[(&q.zq, &g), (&q.quant, &w[0]), (sample, &w[1]), (avg, &w[2])])?;
    let got: Vec<f64> = de.to_f64(&*dev)?.iter().map(|v| v - 3.0).collect();
    compare("de", &got, &want, d, Bounds::of(DType::F64).times(30.0).least(1.0))?;
    Ok(())
}
