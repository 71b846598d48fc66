//! Every op against finite differences in f64, through the tape: all inputs, with random cotangents. Then the tape's
//! guarantees about gradients.

use ett::autograd::{Tape, Var};
use ett::backend::{DType, Dims, Precision, Role, Unary};
use ett::compare::{Bounds, compare};
use ett::error::{Error, Result};
use ett::ops::{self, Conv, ConvWith, Entropy, Heads, IbqOptions, InputNorm, Rotary, Seqs};
use ett::tensor::Tensor;

use crate::common::{Outcome, cpu, ids, int, norm, normal, scaled, spread, tensor};
use crate::dense::{Problem, dense, kernels};

const P: Precision = Precision::F64;
/// The stencil below has an error of h^4 / 30 times the fifth derivative, and rounding errors of 2e-16 / h.
const H: f64 = 1e-3;
const BOUNDS: Bounds = Bounds { norm: 1e-8, row: 1e-7, element: 1e-6, least: 0.0 };

#[derive(Clone)]
struct Input {
    values: Vec<f64>,
    dims: Dims,
    grad: bool,
}

fn grad(values: Vec<f64>, dims: impl Into<Dims>) -> Input {
    Input { values, dims: dims.into(), grad: true }
}

fn fixed(values: Vec<f64>, dims: impl Into<Dims>) -> Input {
    Input { grad: false, ..grad(values, dims) }
}

/// Normal values.
fn random(seed: u64, dims: impl Into<Dims>) -> Input {
    let dims = dims.into();
    grad(normal(seed, dims.numel()), dims)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Checks every gradient of `f` at `inputs`: of values, of weights, whose gradient is added to what is there, and of
/// each input alone.
fn check(name: &str, inputs: &[Input], f: impl Fn(&Tape, &[Var]) -> Result<Vec<Var>>) -> Outcome {
    let dev = cpu(2);
    let value = |i: &Input| tensor(&*dev, DType::F64, &i.values, i.dims);
    let forward = |inputs: &[Input]| -> Result<Vec<Vec<f64>>> {
        let t = Tape::inference(dev.clone(), P);
        let vars: Vec<Var> = inputs.iter().map(|i| t.constant(value(i))).collect();
        f(&t, &vars)?.iter().map(|v| v.value().to_f64(&*dev)).collect()
    };
    let outputs = forward(inputs)?;
    let cotangents: Vec<Vec<f64>> =
        outputs.iter().enumerate().map(|(i, o)| normal(1000 + i as u64, o.len())).collect();
    let objective = |inputs: &[Input]| -> Result<f64> {
        Ok(forward(inputs)?.iter().zip(&cotangents).map(|(o, c)| dot(o, c)).sum())
    };
    /// How inputs enter the tape.
    #[derive(PartialEq)]
    enum As {
        Leaves,
        Weights,
        Only(usize),
    }
    let analytic = |how: As| -> Result<Vec<Option<Vec<f64>>>> {
        let t = Tape::new(dev.clone(), P);
        let mut targets = Vec::new();
        let vars: Vec<Var> = inputs
            .iter()
            .enumerate()
            .map(|(i, x)| match (&how, x.grad) {
                (As::Leaves, true) => t.leaf(value(x)),
                (As::Only(n), true) if *n == i => t.leaf(value(x)),
                (As::Weights, true) => {
                    let start = tensor(&*dev, DType::F64, &vec![2.0; x.values.len()], x.dims);
                    targets.push((i, start.clone()));
                    t.weight(value(x), Some(start))
                }
                _ => t.constant(value(x)),
            })
            .collect();
        let outs = f(&t, &vars)?;
        let seeds: Vec<Tensor> =
            outs.iter().zip(&cotangents).map(|(o, c)| tensor(&*dev, DType::F64, c, o.dims())).collect();
        let mut g = t.backward(&outs.iter().zip(&seeds).collect::<Vec<_>>())?;
        let mut all = vec![None; inputs.len()];
        for (i, v) in vars.iter().enumerate() {
            all[i] = g.take(v)?.map(|t| t.to_f64(&*dev)).transpose()?;
        }
        for (i, t) in targets {
            all[i] = Some(t.to_f64(&*dev)?.iter().map(|x| x - 2.0).collect());
        }
        Ok(all)
    };
    let leaves = analytic(As::Leaves)?;
    let weights = analytic(As::Weights)?;
    for (i, x) in inputs.iter().enumerate() {
        let what = format!("{name}, input {i} {}", x.dims);
        let (Some(got), true) = (&leaves[i], x.grad) else {
            assert!(!x.grad, "{what}: no gradient arrived");
            continue;
        };
        assert_eq!(got.len(), x.values.len(), "{what}");
        let weight = weights[i].as_ref().expect("weights have their gradient");
        compare(&format!("{what} as a weight"), weight, got, 1, Bounds::norm(1e-13).least(1e-2))?;
        assert_eq!(analytic(As::Only(i))?[i].as_ref(), Some(got), "{what} alone");

        // All elements one by one if there are few; otherwise some of them, and some random directions.
        let n = x.values.len();
        let mut directions: Vec<Vec<(usize, f64)>> = match n <= 128 {
            true => (0..n).map(|j| vec![(j, 1.0)]).collect(),
            false => ids(i as u64, 64, n).iter().map(|&j| vec![(j as usize, 1.0)]).collect(),
        };
        if n > 128 {
            let scale = 1.0 / (n as f64).sqrt();
            directions.extend((0..8).map(|s| scaled(50 + s, n, scale).into_iter().enumerate().collect()));
        }
        let (mut want, mut have) = (Vec::new(), Vec::new());
        for direction in &directions {
            let at = |h: f64| -> Result<f64> {
                let mut moved = inputs.to_vec();
                for &(j, v) in direction {
                    moved[i].values[j] += h * v;
                }
                objective(&moved)
            };
            want.push((8.0 * (at(H)? - at(-H)?) - (at(2.0 * H)? - at(-2.0 * H)?)) / (12.0 * H));
            have.push(direction.iter().map(|&(j, v)| got[j] * v).sum::<f64>());
        }
        // Where a gradient is zero, the difference is only the rounding of the objective.
        compare(&what, &have, &want, 1, BOUNDS.least(1e-3))?;
    }
    Ok(())
}

/// [`check`] of an op with one output.
fn check1(name: &str, inputs: &[Input], f: impl Fn(&Tape, &[Var]) -> Result<Var>) -> Outcome {
    check(name, inputs, |t, v| Ok(vec![f(t, v)?]))
}

#[test]
fn linear() -> Outcome {
    for (x, o) in
        [([5, 7].into(), 3), (Dims::from([2, 3, 4, 5]), 6), ([1, 1].into(), 1), ([67, 33].into(), 65)]
    {
        let c = x.cols();
        let inputs = [random(1, x), random(2, [o, c]), random(3, [o])];
        check1("linear", &inputs, |t, v| ops::linear(t, &v[0], &v[1], Some(&v[2])))?;
        check1("linear_gelu", &inputs, |t, v| ops::linear_gelu(t, &v[0], &v[1], Some(&v[2])))?;
        check1("linear without bias", &inputs[..2], |t, v| ops::linear(t, &v[0], &v[1], None))?;
    }
    Ok(())
}

#[test]
fn conv2d() -> Outcome {
    let down = Conv { stride: 2, before: 0, after: 1 };
    let patch = Conv { stride: 2, before: 1, after: 1 };
    let last = Conv { stride: 1, before: 1, after: 1 };
    for (name, k, conv, [b, h, w, c, o]) in [
        ("3x3", 3, Conv::same(3), [2, 5, 4, 3, 4]),
        ("1x1", 1, Conv::same(1), [2, 3, 4, 5, 2]),
        ("3x3, stride 2, padded right and below", 3, down, [2, 6, 4, 3, 2]),
        ("3x3, stride 2, odd sides", 3, down, [1, 5, 7, 2, 3]),
        ("4x4, stride 2", 4, patch, [2, 6, 8, 3, 2]),
        ("4x4, stride 1", 4, last, [1, 5, 4, 2, 3]),
        ("4x4, stride 1, one pixel", 4, last, [2, 2, 2, 3, 1]),
        ("no padding, stride 3", 2, Conv { stride: 3, before: 0, after: 0 }, [1, 7, 5, 2, 2]),
    ] {
        let inputs = [random(1, [b, h, w, c]), random(2, [o, k, k, c]), random(3, [o])];
        check1(name, &inputs, |t, v| ops::conv2d(t, &v[0], &v[1], Some(&v[2]), conv))?;
        check1(name, &inputs[..2], |t, v| ops::conv2d(t, &v[0], &v[1], None, conv))?;
    }
    Ok(())
}

#[test]
fn conv2d_of_a_normalised_input() -> Outcome {
    let down = Conv { stride: 2, before: 0, after: 1 };
    for (k, conv, [b, h, w, c, o], groups) in [
        (3, Conv::same(3), [2, 5, 4, 6, 4], 3),
        (3, down, [1, 6, 5, 4, 2], 2),
        (1, Conv::same(1), [2, 3, 4, 8, 3], 1),
    ] {
        let inputs = [
            random(1, [b, h, w, c]),
            random(2, [o, k, k, c]),
            random(3, [o]),
            random(4, [c]),
            random(5, [c]),
        ];
        check1(&format!("{k}x{k} of a normalised input"), &inputs, |t, v| {
            let stats = ops::group_stats(t, &v[0], groups, 1e-3)?;
            let norm = Some(InputNorm { stats: &stats, w: &v[3], b: &v[4] });
            let with = ConvWith { norm, ..ConvWith::default() };
            Ok(ops::conv2d_with(t, &v[0], &v[1], Some(&v[2]), conv, with)?.0)
        })?;
    }
    Ok(())
}

/// The gradient of x is the sum of three: of the residual, of the first convolution, and of its statistics.
#[test]
fn a_residual_block() -> Outcome {
    let dims = [2, 4, 3, 6];
    let weights = [random(2, [6, 3, 3, 6]), random(3, [6]), random(4, [6]), random(5, [6])];
    let inputs: Vec<Input> = std::iter::once(random(1, dims)).chain(weights).collect();
    check1("a residual block", &inputs, |t, v| {
        let (w, b, conv) = (&v[1], Some(&v[2]), Conv::same(3));
        let norm = |stats| Some(InputNorm { stats, w: &v[3], b: &v[4] });
        let stats = ops::group_stats(t, &v[0], 3, 1e-3)?;
        let with = ConvWith { norm: norm(&stats), residual: None, stats: Some((2, 1e-3)) };
        let (h, stats) = ops::conv2d_with(t, &v[0], w, b, conv, with)?;
        let stats = stats.expect("statistics were asked for");
        let with = ConvWith { norm: norm(&stats), residual: Some(&v[0]), stats: None };
        Ok(ops::conv2d_with(t, &h, w, b, conv, with)?.0)
    })
}

#[test]
fn resampling() -> Outcome {
    check1("upsample2x", &[random(1, [2, 3, 2, 3])], |t, v| ops::upsample2x(t, &v[0]))?;
    let inputs = [random(1, [2, 3, 2, 3]), random(2, [4, 3, 3, 3]), random(3, [4])];
    check1("upsample2x_conv2d", &inputs, |t, v| ops::upsample2x_conv2d(t, &v[0], &v[1], Some(&v[2])))?;
    check1("upsample2x_conv2d", &inputs[..2], |t, v| ops::upsample2x_conv2d(t, &v[0], &v[1], None))?;
    for dims in [[2, 4, 6, 3], [1, 5, 3, 2], [1, 3, 7, 1]] {
        let x = grad(spread(1, dims.iter().product(), 0.02), dims);
        check1("max_pool2x2", &[x], |t, v| ops::max_pool2x2(t, &v[0]))?;
    }
    Ok(())
}

#[test]
fn group_norm() -> Outcome {
    for (dims, groups) in [([2, 3, 2, 6], 3), ([1, 4, 5, 4], 1), ([3, 2, 2, 4], 4), ([1, 8, 9, 64], 32)] {
        let c = dims[3];
        let inputs = [random(1, dims), random(2, [c]), random(3, [c])];
        for silu in [false, true] {
            check1(&format!("group_norm {dims:?}, {groups} groups, silu {silu}"), &inputs, |t, v| {
                ops::group_norm(t, &v[0], &v[1], &v[2], groups, 1e-3, silu)
            })?;
        }
    }
    Ok(())
}

#[test]
fn rms_norm() -> Outcome {
    for dims in [[4, 6], [1, 1], [3, 65]] {
        let w = random(2, [dims[1]]);
        let inputs = [random(1, dims), w.clone()];
        check1("rms_norm", &inputs, |t, v| ops::rms_norm(t, &v[0], &v[1], 1e-2))?;
        let inputs = [random(1, dims), random(3, dims), w];
        let both = |t: &Tape, v: &[Var]| ops::add_rms_norm(t, &v[0], &v[1], &v[2], 1e-2);
        check("add_rms_norm", &inputs, |t, v| both(t, v).map(|(s, y)| vec![s, y]))?;
        check1("add_rms_norm, norm only", &inputs, |t, v| Ok(both(t, v)?.1))?;
        check1("add_rms_norm, sum only", &inputs[..2], |t, v| {
            let w = t.constant(tensor(t.dev(), DType::F64, &vec![1.0; dims[1]], [dims[1]]));
            Ok(ops::add_rms_norm(t, &v[0], &v[1], &w, 1e-2)?.0)
        })?;
    }
    Ok(())
}

#[test]
fn layer_norm() -> Outcome {
    for dims in [[4, 6], [2, 67]] {
        let inputs = [random(1, dims), random(2, [dims[1]]), random(3, [dims[1]])];
        check1("layer_norm", &inputs, |t, v| ops::layer_norm(t, &v[0], &v[1], &v[2], 1e-2))?;
    }
    Ok(())
}

#[test]
fn batch_norm() -> Outcome {
    for (dims, slope) in [([2, 3, 2, 3], 1.0), ([2, 3, 2, 3], 0.2), ([1, 5, 7, 4], 0.2), ([2, 1, 1, 3], 0.2)]
    {
        let c = dims[3];
        let norm =
            |t: &Tape, v: &[Var], slope: f64| Ok(ops::batch_norm(t, &v[0], &v[1], &v[2], 1e-2, slope)?.0);
        let merged = |t: &Tape, v: &[Var]| Ok(ops::batch_norm_merged(t, &v[0], &v[1], &v[2], 1e-2, slope)?.0);
        // Inputs without values near LeakyReLU's kink.
        let inputs = (0..)
            .map(|s| [random(3 * s, dims), random(3 * s + 1, [c]), random(3 * s + 2, [c])])
            .find(|inputs| {
                let t = Tape::inference(cpu(1), P);
                let v: Vec<Var> = inputs
                    .iter()
                    .map(|i| t.constant(tensor(t.dev(), DType::F64, &i.values, i.dims)))
                    .collect();
                let y = norm(&t, &v, 1.0).and_then(|y| y.value().to_f64(t.dev())).expect("a forward");
                y.iter().all(|y| y.abs() > 0.01)
            })
            .expect("the numbers do not run out");
        check1(&format!("batch_norm {dims:?}, slope {slope}"), &inputs, |t, v| norm(t, v, slope))?;
        check1(&format!("batch_norm_merged {dims:?}, slope {slope}"), &inputs, merged)?;
    }
    Ok(())
}

#[test]
fn l2_norm() -> Outcome {
    // The third row is shorter than eps, so it is divided by eps; so is a zero row.
    for (n, d) in [(5, 4), (4, 1), (4, 65)] {
        let mut x = normal(1, n * d);
        for (r, scale) in [(0, 3.0), (1, 2.0), (2, 1e-2), (3, 0.0)] {
            let row = &mut x[r * d..(r + 1) * d];
            let size = norm(row);
            row.iter_mut().for_each(|v| *v *= scale / size);
        }
        check1("l2_norm", &[grad(x, [n, d])], |t, v| ops::l2_norm(t, &v[0], 0.3))?;
    }
    Ok(())
}

#[test]
fn unary() -> Outcome {
    let x = |n: usize| grad(spread(1, n, 0.06), [n / 4, 4]);
    for (name, f, n) in [
        ("silu", Unary::Silu, 120),
        ("gelu", Unary::Gelu, 120),
        ("gelu, tanh form", Unary::GeluTanh, 120),
        ("relu", Unary::Relu, 120),
        ("leaky relu", Unary::LeakyRelu(0.2), 120),
        ("gelu, many", Unary::Gelu, 1000),
    ] {
        check1(name, &[x(n)], |t, v| ops::unary(t, &v[0], f))?;
    }
    Ok(())
}

#[test]
fn pointwise() -> Outcome {
    let dims = [2, 3, 2, 3];
    check1("add", &[random(1, dims), random(2, dims)], |t, v| ops::add(t, &v[0], &v[1]))?;
    let shift = fixed(normal(2, 3), [3]);
    let scale = fixed(vec![0.5, -1.5, 2.0], [3]);
    check1("channel_affine", &[random(1, dims), shift, scale], |t, v| {
        ops::channel_affine(t, &v[0], &v[1], &v[2])
    })?;
    for dims in [[3, 8], [2, 130]] {
        check1("swiglu", &[random(1, dims)], |t, v| ops::swiglu(t, &v[0]))?;
    }
    Ok(())
}

#[test]
fn rope() -> Outcome {
    // Positions that jump and repeat; columns after the rotated heads are copied.
    for (heads, head_dim, cols) in [(2, 4, 8), (3, 6, 24), (1, 2, 2)] {
        let r = Rotary { heads, head_dim, theta: 100.0 };
        check1("rope", &[random(1, [4, cols])], |t, v| ops::rope(t, &v[0], &int(t.dev(), &[0, 7, 1, 7]), r))?;
    }
    Ok(())
}

#[test]
fn rows() -> Outcome {
    let parts = [random(1, [2, 3]), random(2, [2, 2, 1, 3]), random(3, [1, 3])];
    check1("concat_rows", &parts, |t, v| ops::concat_rows(t, &v.iter().collect::<Vec<_>>()))?;
    check("split_rows", &[random(1, [6, 3])], |t, v| ops::split_rows(t, &v[0], &[2, 1, 3]))?;
    check1("split_rows, one part", &[random(1, [6, 3])], |t, v| {
        Ok(ops::split_rows(t, &v[0], &[2, 1, 3])?.remove(1))
    })?;
    check1("reshape", &[random(1, [6, 4])], |t, v| {
        let y = ops::reshape(t, &v[0], [2, 3, 2, 2])?;
        ops::unary(t, &y, Unary::Gelu)
    })?;
    // Index -1 gives zeros; index 1 occurs twice, index 4 never.
    let idx = [1, -1, 0, 3, 1, -1, 2];
    check1("gather", &[random(1, [5, 3])], |t, v| ops::gather(t, &v[0], &int(t.dev(), &idx)))?;
    check1("gather, nothing", &[random(1, [2, 3])], |t, v| ops::gather(t, &v[0], &int(t.dev(), &[-1, -1])))
}

#[test]
fn attention() -> Outcome {
    for (lengths, padding, query, kv, dim) in [
        (&[4, 1, 3][..], 2, 2, 2, 4),
        (&[5, 2], 1, 4, 2, 2),
        (&[6], 0, 3, 1, 4),
        (&[1], 3, 1, 1, 1),
        (&[70, 65], 5, 2, 1, 6),
    ] {
        let n = lengths.iter().sum::<usize>() + padding;
        for causal in [false, true] {
            let h = Heads { query, kv, dim, scale: 0.6, causal };
            let name = format!("attention {lengths:?}, {query}/{kv} heads of {dim}, causal {causal}");
            check1(&name, &[random(1, [n, (query + 2 * kv) * dim])], |t, v| {
                ops::attention(t, &v[0], &Seqs::new(t.dev(), lengths)?, h)
            })?;
        }
    }
    Ok(())
}

#[test]
fn cross_entropy_of_stored_logits() -> Outcome {
    for (n, v, target) in [(1, 1, vec![0]), (4, 7, vec![3, -1, 0, 6]), (3, 5, vec![-1, -1, -1])] {
        for weighted in [false, true] {
            let inputs = [random(1, [n, v])];
            check1(&format!("cross_entropy [{n}, {v}], weighted {weighted}"), &inputs, |t, x| {
                let stat = |v: &[f64]| tensor(t.dev(), DType::F64, v, [v.len()]);
                let (weight, scale) = (stat(&normal(2, n)), stat(&[0.3]));
                ops::cross_entropy(t, &x[0], &int(t.dev(), &target), weighted.then_some(&weight), &scale)
            })?;
        }
    }
    Ok(())
}

#[test]
fn batch_norm_with_given_statistics() -> Outcome {
    for (dims, slope) in [([1, 1, 1, 3], 0.2), ([2, 3, 2, 4], 1.0)] {
        let c = dims[3];
        let inputs = [random(1, dims), random(2, [c]), random(3, [c])];
        check1(&format!("batch_norm_eval {dims:?}, slope {slope}"), &inputs, |t, v| {
            let stat = |v: &[f64]| tensor(t.dev(), DType::F64, v, [c]);
            let var: Vec<f64> = normal(5, c).iter().map(|v| 0.5 + v.abs()).collect();
            let (mean, var) = (stat(&normal(4, c)), stat(&var));
            ops::batch_norm_eval(t, &v[0], [&v[1], &v[2]], [&mean, &var], 1e-2, slope)
        })?;
    }
    Ok(())
}

#[test]
fn linear_cross_entropy() -> Outcome {
    for (n, c, vocab) in [(5, 4, 7), (1, 1, 2), (70, 5, 130)] {
        let mut target = ids(1, n, vocab);
        if n > 1 {
            target[1] = -1;
            target[n - 1] = -1;
        }
        let inputs = [random(1, [n, c]), random(2, [vocab, c])];
        check1("linear_cross_entropy", &inputs, |t, v| {
            let scale = tensor(t.dev(), DType::F64, &[0.3], [1]);
            ops::linear_cross_entropy(t, &v[0], &v[1], &int(t.dev(), &target), &scale)
        })?;
    }
    check1("linear_cross_entropy, nothing supervised", &[random(1, [2, 3]), random(2, [4, 3])], |t, v| {
        let scale = tensor(t.dev(), DType::F64, &[0.3], [1]);
        ops::linear_cross_entropy(t, &v[0], &v[1], &int(t.dev(), &[-1, -1]), &scale)
    })
}

#[test]
fn image_losses() -> Outcome {
    let dims = [2, 2, 3, 3];
    let b = normal(1, 36);
    let a = b.iter().zip(spread(2, 36, 0.05)).map(|(b, d)| b + d).collect();
    check1("l1", &[grad(a, dims), fixed(b, dims)], |t, v| ops::l1(t, &v[0], &v[1], &scalar(t, 0.3)))?;

    // Features as ReLU leaves them; one pixel of the reference is all zero.
    let features = |seed: u64| -> Vec<f64> { normal(seed, 36).iter().map(|v| v.max(0.0)).collect() };
    let (mut f0, mut f1) = (features(3), features(4));
    f0[6..9].fill(0.0);
    for pixel in f1.chunks_mut(3) {
        if norm(pixel) < 0.1 {
            pixel[1] = 0.8;
        }
    }
    let w = fixed(vec![0.2, 0.9, 0.5], [3]);
    let lpips = |t: &Tape, v: &[Var]| ops::lpips_layer(t, &v[0], &v[1], &v[2], 1e-10, &scalar(t, 0.7), 0.5);
    let inputs = [fixed(f0, dims), grad(f1.clone(), dims), w];
    check1("lpips_layer", &inputs, lpips)?;

    // At an all-zero pixel of the reconstruction there is no derivative; its gradient is 0, and no other is.
    f1[15..18].fill(0.0);
    let t = Tape::new(cpu(2), P);
    let put = |v: &[f64], d: Dims| tensor(t.dev(), DType::F64, v, d);
    let v = [
        t.constant(put(&inputs[0].values, inputs[0].dims)),
        t.leaf(put(&f1, dims.into())),
        t.constant(put(&inputs[2].values, inputs[2].dims)),
    ];
    let loss = lpips(&t, &v)?;
    let seed = put(&[1.0], [1].into());
    let dev = t.device();
    let g = t.backward(&[(&loss, &seed)])?.take(&v[1])?.ok_or("a gradient")?.to_f64(&*dev)?;
    for (p, pixel) in g.chunks(3).enumerate() {
        assert_eq!(pixel.iter().all(|&x| x == 0.0), p == 5, "pixel {p}: {pixel:?}");
    }
    Ok(())
}

#[test]
fn adversarial_losses() -> Outcome {
    check1("gan_generator", &[random(1, [3, 4])], |t, v| ops::gan_generator(t, &v[0], &scalar(t, 0.4)))?;
    // Logits on both sides of the kinks at 1 and -1, and of the averages.
    let x = || grad(spread(1, 40, 0.1), [2, 4, 5, 1]);
    for real in [true, false] {
        check1("hinge", &[x()], |t, v| ops::hinge(t, &v[0], real, &scalar(t, 0.4), 0.5))?;
    }
    check1("lecam", &[x(), grad(spread(2, 18, 0.1), [18, 1])], |t, v| {
        let averages = tensor(t.dev(), DType::F64, &[0.31, -0.22], [2]);
        ops::lecam(t, &v[0], &v[1], &averages, &scalar(t, 0.6))
    })
}

/// A device scalar.
fn scalar(t: &Tape, v: f64) -> Tensor {
    tensor(t.dev(), DType::F64, &[v], [1])
}

fn options(temperature: f64, beta_commit: f64, beta_code: f64) -> IbqOptions {
    IbqOptions { entropy: Some(Entropy { temperature, eps: 1e-3 }), beta_commit, beta_code }
}

#[test]
fn vq() -> Outcome {
    let (m, k, d) = (5, 4, 3);
    let inputs = [random(1, [m, d]), random(2, [k, d])];
    // Each term alone is a true derivative for the input that it pulls.
    for (beta_commit, beta_code, which) in [(0.7, 0.0, 0), (0.0, 0.7, 1)] {
        let mut inputs = inputs.clone();
        inputs[1 - which].grad = false;
        check1("vq, quantization loss", &inputs, |t, v| {
            Ok(ops::vq(t, &v[0], &v[1], &scalar(t, 1.0 / m as f64), options(1.0, beta_commit, beta_code))?
                .quant)
        })?;
    }
    // Together: the gradient of zq passes straight to z, and each term reaches its own input only.
    let (beta_commit, beta_code, w) = (0.25, 1.0, 0.8);
    let t = Tape::new(cpu(2), P);
    let dev = t.device();
    let [z, e] = [0, 1].map(|i| t.leaf(tensor(&*dev, DType::F64, &inputs[i].values, inputs[i].dims)));
    let q = ops::vq(&t, &z, &e, &scalar(&t, 1.0 / m as f64), options(1.0, beta_commit, beta_code))?;
    let idx = q.idx.to_host::<i32>(&*dev)?;
    let cotangent = normal(3, m * d);
    let seeds = [tensor(&*dev, DType::F64, &cotangent, [m, d]), tensor(&*dev, DType::F64, &[w], [1])];
    let mut g = t.backward(&[(&q.zq, &seeds[0]), (&q.quant, &seeds[1])])?;
    let (mut dz, mut de) = (cotangent, vec![0.0; k * d]);
    for (i, &best) in idx.iter().enumerate() {
        for x in 0..d {
            let (at, code) = (i * d + x, best as usize * d + x);
            let pull = w * 2.0 * (inputs[0].values[at] - inputs[1].values[code]) / (m * d) as f64;
            dz[at] += beta_commit * pull;
            de[code] -= beta_code * pull;
        }
    }
    let bounds = Bounds::of(DType::F64);
    compare("vq dz", &g.take(&z)?.ok_or("dz")?.to_f64(&*dev)?, &dz, d, bounds)?;
    compare("vq de", &g.take(&e)?.ok_or("de")?.to_f64(&*dev)?, &de, d, bounds)?;
    Ok(())
}

#[test]
fn ibq_entropies() -> Outcome {
    // True derivatives of z and the codes, without the straight-through path.
    for (m, k, d, temperature) in [(4, 5, 3, 0.5), (1, 2, 1, 1.0), (3, 1, 2, 1.0), (66, 70, 5, 0.8)] {
        let inputs = [random(1, [m, d]), random(2, [k, d])];
        check("ibq, both entropies", &inputs, |t, v| {
            let q = ops::ibq(t, &v[0], &v[1], &scalar(t, 1.0 / m as f64), options(temperature, 1.0, 0.25))?;
            Ok(q.sample.into_iter().chain(q.avg).collect())
        })?;
    }
    // At the paper's temperature, with scores small enough for finite differences.
    let inputs = [grad(scaled(1, 12, 0.05), [4, 3]), grad(scaled(2, 18, 0.05), [6, 3])];
    check("ibq, T = 0.01", &inputs, |t, v| {
        let q = ops::ibq(t, &v[0], &v[1], &scalar(t, 0.25), options(0.01, 1.0, 0.25))?;
        Ok(q.sample.into_iter().chain(q.avg).collect())
    })
}

#[test]
fn ibq_against_the_dense_closed_form() -> Outcome {
    // The straight-through gradient is not the derivative of the value, so it is compared with the formulas.
    let dev = cpu(2);
    for (m, k, d) in [(1, 1, 1), (4, 5, 3), (17, 33, 8), (70, 130, 6)] {
        for (beta_commit, beta_code) in [(1.0, 0.25), (0.25, 1.0)] {
            for w in [[0.0, 0.0, 0.0], [1.3, 0.0, 0.0], [0.0, 0.6, -0.6], [0.5, 0.3, -0.2]] {
                let p = Problem { beta_commit, beta_code, w, ..Problem::new(m, k, d, 1.5, 7) };
                let (got, want) = (kernels(&dev, P, &p)?, dense(&p));
                let what = |s: &str| format!("ibq {m}x{k}x{d}, weights {w:?}, {s}");
                // The dense form itself cancels: its error is 1e-15 over the smallest 1 - p.
                let bounds = Bounds::of(DType::F64).times(20.0).least(1e-3);
                compare(&what("dz"), &got.dz, &want.dz, d, bounds)?;
                compare(&what("de"), &got.de, &want.de, d, bounds)?;
                compare(&what("losses"), &got.losses, &want.losses, 1, bounds)?;
                assert_eq!((&got.idx, &got.zq), (&want.idx, &want.zq));
            }
        }
    }
    Ok(())
}

#[test]
fn values_used_twice_add_up() -> Outcome {
    let x = random(1, [3, 4]);
    let w = random(2, [4, 4]);
    check1("a value twice in one op", std::slice::from_ref(&x), |t, v| ops::add(t, &v[0], &v[0]))?;
    check1("a value in three ops", &[x.clone(), w.clone()], |t, v| {
        let y = ops::add(t, &v[0], &ops::unary(t, &v[0], Unary::Silu)?)?;
        ops::add(t, &y, &ops::linear(t, &v[0], &v[1], None)?)
    })?;
    check1("a weight twice", &[x, w.clone()], |t, v| {
        let y = ops::linear(t, &v[0], &v[1], None)?;
        ops::linear(t, &y, &v[1], None)
    })?;
    // Like the language model's embedding: used as a table, as a head, and as a plain value.
    check("a table that is a head too", &[w], |t, v| {
        let x = ops::gather(t, &v[0], &int(t.dev(), &[2, 0, -1]))?;
        let scale = tensor(t.dev(), DType::F64, &[1.0], [1]);
        let loss = ops::linear_cross_entropy(t, &x, &v[0], &int(t.dev(), &[1, 3, 0]), &scale)?;
        Ok(vec![loss, ops::unary(t, &v[0], Unary::Gelu)?])
    })
}

#[test]
fn unused_values_have_no_gradient() -> Outcome {
    let dev = cpu(1);
    let t = Tape::new(dev.clone(), P);
    let put = |v: f64| tensor(&*dev, DType::F64, &[v, v], [2]);
    let (x, unused, constant) = (t.leaf(put(1.0)), t.leaf(put(2.0)), t.constant(put(3.0)));
    let target = put(5.0);
    let weight = t.weight(put(4.0), Some(target.clone()));
    let y = ops::add(&t, &x, &constant)?;
    let dead = ops::add(&t, &unused, &weight)?;
    let cut = ops::add(&t, &unused.detach(), &y)?;
    assert!(y.needs_grad() && dead.needs_grad() && !constant.needs_grad() && !unused.detach().needs_grad());
    let seed = put(0.5);
    let mut g = t.backward(&[(&cut, &seed), (&cut, &seed)])?;
    assert_eq!(g.take(&x)?.ok_or("a gradient")?.to_f64(&*dev)?, [1.0, 1.0], "seeds of one value add up");
    assert!(g.take(&x)?.is_none(), "a gradient is taken once");
    assert!(g.take(&unused)?.is_none() && g.take(&constant)?.is_none() && g.take(&dead)?.is_none());
    assert_eq!(target.to_f64(&*dev)?, [5.0, 5.0], "an unused weight's gradient is left alone");
    Ok(())
}

#[test]
fn tapes_refuse_and_forget() -> Outcome {
    let dev = cpu(1);
    let t = Tape::new(dev.clone(), P);
    let x = t.leaf(tensor(&*dev, DType::F64, &[1.0, 2.0], [2]));
    let wrong = tensor(&*dev, DType::F64, &[1.0], [1]);
    match t.backward(&[(&x, &wrong)]) {
        Err(e @ Error::Argument { op: "backward", arg: "seed", .. }) => {
            assert_eq!(e.to_string(), "backward: argument `seed` is [1], wanted [2]");
        }
        _ => panic!("a seed of the wrong size is an error"),
    }

    // An inference tape keeps nothing, and no gradient flows.
    let live = dev.memory().total();
    let t = Tape::inference(dev.clone(), P);
    let x = t.leaf(tensor(&*dev, DType::F64, &normal(1, 1000), [1000]));
    let mut y = x.clone();
    for _ in 0..10 {
        y = ops::unary(&t, &y, Unary::Silu)?;
    }
    assert!(!y.needs_grad());
    assert_eq!(dev.memory().total() - live, 2 * 8000, "only the first and the last value are held");

    // The saved values of a node are freed as soon as it has run backwards.
    let t = Tape::new(dev.clone(), P);
    let x = t.leaf(tensor(&*dev, DType::F64, &normal(1, 1000), [1000]));
    let mut y = x.clone();
    for _ in 0..100 {
        y = ops::unary(&t, &y, Unary::Silu)?;
    }
    let seed = Tensor::zeros(&*dev, Role::Activation, DType::F64, [1000])?;
    let before = dev.memory().total();
    let grads = t.backward(&[(&y, &seed)])?;
    let peak = dev.memory().peak;
    assert!(peak <= before + 3 * 8000, "{peak} bytes at most, {before} before the backward");
    drop(grads);
    Ok(())
}

/// An upsampling convolution is an upsampling and a convolution, in values and gradients.
#[test]
fn upsampling_convolutions_are_both_in_one() -> Outcome {
    let dev = cpu(2);
    for dims in [[1, 1, 1, 1], [2, 3, 4, 5], [1, 6, 2, 8]] {
        let value = |i: Input| tensor(&*dev, DType::F64, &i.values, i.dims);
        let run = |fused: bool| -> Result<Vec<Vec<f64>>> {
            let t = Tape::new(dev.clone(), P);
            let [x, w, b] =
                [random(1, dims), random(2, [6, 3, 3, dims[3]]), random(3, [6])].map(|i| t.leaf(value(i)));
            let y = match fused {
                true => ops::upsample2x_conv2d(&t, &x, &w, Some(&b))?,
                false => ops::conv2d(&t, &ops::upsample2x(&t, &x)?, &w, Some(&b), Conv::same(3))?,
            };
            let mut all = vec![y.value().to_f64(&*dev)?];
            let dy = value(random(4, y.dims()));
            let mut grads = t.backward(&[(&y, &dy)])?;
            for v in [&x, &w, &b] {
                let Some(d) = grads.take(v)? else { panic!("every input gets a gradient") };
                all.push(d.to_f64(&*dev)?);
            }
            Ok(all)
        };
        for (n, (a, b)) in run(true)?.iter().zip(&run(false)?).enumerate() {
            let what = ["y", "dx", "dw", "db"][n];
            assert_eq!(a.len(), b.len());
            for (a, b) in a.iter().zip(b) {
                assert!((a - b).abs() < 1e-11, "{what} of {dims:?}: {a} and {b}");
            }
        }
    }
    Ok(())
}
