//! Convolutions against loops and finite differences.

use super::*;
use crate::backend::cpu::testing::run::*;

#[derive(Clone, Copy)]
struct Case {
    x: [usize; 4],
    w: [usize; 4],
    y: [usize; 4],
    stride: usize,
    pad: [usize; 2],
}

/// Several sizes, kernels and strides, one-sided padding, a kernel smaller than its stride.
fn cases() -> Vec<Case> {
    let case = |x: [usize; 4], o, k: [usize; 2], grid: [usize; 2], stride, pad| Case {
        x,
        w: [o, k[0], k[1], x[3]],
        y: [x[0], grid[0], grid[1], o],
        stride,
        pad,
    };
    vec![
        case([1, 1, 1, 1], 1, [1, 1], [1, 1], 1, [0, 0]),
        case([2, 5, 7, 3], 5, [3, 3], [5, 7], 1, [1, 1]),
        case([2, 7, 6, 3], 4, [3, 3], [4, 3], 2, [0, 0]),
        case([1, 8, 8, 2], 3, [4, 4], [4, 4], 2, [1, 1]),
        case([3, 11, 13, 5], 7, [1, 1], [11, 13], 1, [0, 0]),
        case([1, 7, 7, 2], 2, [1, 1], [4, 4], 2, [0, 0]),
        case([1, 5, 4, 2], 3, [2, 3], [3, 2], 3, [2, 0]),
        case([2, 3, 2, 1], 2, [5, 5], [3, 2], 1, [2, 2]),
        // As many positions as pixels, but shifted by the padding.
        case([2, 4, 5, 3], 2, [1, 1], [4, 5], 1, [1, 1]),
        case([2, 37, 33, 2], 3, [3, 3], [37, 33], 1, [1, 1]),
    ]
}

/// Calls `f` with the indices into x, w and y of every multiplication.
fn each(c: Case, mut f: impl FnMut(usize, usize, usize)) {
    let [_, h, w, ci] = c.x;
    let [_, kh, kw, _] = c.w;
    for iy in 0..c.y.iter().product() {
        let [_, ho, wo, o] = c.y;
        let (b, i, j, oc) = (iy / o / wo / ho, iy / o / wo % ho, iy / o % wo, iy % o);
        for iw in 0..kh * kw * ci {
            let (u, v, k) = (iw / ci / kw, iw / ci % kw, iw % ci);
            let (y, x) = (i * c.stride + u, j * c.stride + v);
            if (c.pad[0]..h + c.pad[0]).contains(&y) && (c.pad[1]..w + c.pad[1]).contains(&x) {
                f(((b * h + y - c.pad[0]) * w + x - c.pad[1]) * ci + k, oc * kh * kw * ci + iw, iy);
            }
        }
    }
}

fn size(d: [usize; 4]) -> usize {
    d.iter().product()
}

#[test]
fn convolutions_match_loops() {
    for c in cases() {
        let (x, w, b) = (values(size(c.x), 1), values(size(c.w), 2), values(c.w[0], 3));
        let (dy, dw, db) = (values(size(c.y), 4), values(size(c.w), 5), values(c.w[0], 6));
        let mut want = vec![vec![0.0; size(c.y)], vec![0.0; size(c.x)], dw.clone(), db.clone()];
        each(c, |ix, iw, iy| {
            want[0][iy] += x[ix] * w[iw];
            want[1][ix] += dy[iy] * w[iw];
            want[2][iw] += dy[iy] * x[ix];
        });
        for (i, dy) in dy.iter().enumerate() {
            want[3][i % c.w[0]] += dy;
        }
        let plain = want[0].clone();
        want[0].iter_mut().enumerate().for_each(|(i, y)| *y += b[i % c.w[0]]);
        want.push(plain);
        let stride = c.stride;
        check(&want, |r| {
            let (x, w, bias) = (r.act(c.x, &x), r.act(c.w, &w), r.act([c.w[0]], &b));
            let (y, plain, dx) = (r.out(c.y), r.out(c.y), r.out(c.x));
            let (dy, dw, db) = (r.act(c.y, &dy), r.acc(c.w, &dw), r.acc([c.w[0]], &db));
            let (x, w, dy) = (x.view(), w.view(), dy.view());
            for (bias, y) in [(Some(bias.view()), &y), (None, &plain)] {
                let s = Conv2dFwd::plain([x, w], bias, y.out(), stride, c.pad);
                r.cpu.conv2d_fwd(S, &s).unwrap();
            }
            let s = Conv2dBwdData::plain([dy, w], dx.out(), stride, c.pad);
            r.cpu.conv2d_bwd_data(S, &s).unwrap();
            let (dw_acc, db_acc) = (dw.acc(), Some(db.acc()));
            let s = Conv2dBwdWeight::plain([x, dy], dw_acc, db_acc, stride, c.pad);
            r.cpu.conv2d_bwd_weight(S, &s).unwrap();
            vec![y, dx, dw, db, plain]
        });
    }
}

fn run_fwd(c: Case, x: &[f64], w: &[f64]) -> Vec<f64> {
    let r = Run::f64();
    let (x, w, y) = (r.act(c.x, x), r.act(c.w, w), r.out(c.y));
    let s = Conv2dFwd::plain([x.view(), w.view()], None, y.out(), c.stride, c.pad);
    r.cpu.conv2d_fwd(S, &s).unwrap();
    r.get(&y)
}

#[test]
fn gradients_match_differences() {
    for c in &cases()[1..4] {
        let (x, w, dy) = (values(size(c.x), 1), values(size(c.w), 2), values(size(c.y), 3));
        let stride = c.stride;
        let r = Run::f64();
        let (xt, wt, dyt) = (r.act(c.x, &x), r.act(c.w, &w), r.act(c.y, &dy));
        let (dx, dw) = (r.out(c.x), r.acc(c.w, &vec![0.0; w.len()]));
        let (xv, wv, dyv) = (xt.view(), wt.view(), dyt.view());
        let s = Conv2dBwdData::plain([dyv, wv], dx.out(), stride, c.pad);
        r.cpu.conv2d_bwd_data(S, &s).unwrap();
        let s = Conv2dBwdWeight::plain([xv, dyv], dw.acc(), None, stride, c.pad);
        r.cpu.conv2d_bwd_weight(S, &s).unwrap();
        check_gradients(&[&x, &w], &[&r.get(&dx), &r.get(&dw)], |v| inner(&run_fwd(*c, &v[0], &v[1]), &dy));
    }
}

#[test]
fn wrong_shapes_are_named() {
    let r = Run::new(Precision::F32, 1);
    let (x, w, y) = (r.out([1, 4, 4, 3]), r.out([2, 3, 3, 4]), r.out([1, 4, 4, 2]));
    let s = Conv2dFwd::plain([x.view(), w.view()], None, y.out(), 1, [1, 1]);
    let want = "conv2d_fwd: argument `w` is [2, 3, 3, 4], wanted [2, 3, 3, 3]";
    assert_eq!(r.cpu.conv2d_fwd(S, &s).unwrap_err().to_string(), want);
    let w = r.out([2, 3, 3, 3]);
    let s = Conv2dFwd { w: w.view(), stride: 0, ..s };
    let want = "conv2d_fwd: argument `stride` is 0, wanted at least 1";
    assert_eq!(r.cpu.conv2d_fwd(S, &s).unwrap_err().to_string(), want);
}

#[test]
fn strides_and_padding_whose_sums_overflow_are_refused() {
    let r = Run::new(Precision::F32, 1);
    let (x, w, y) = (r.out([1, 4, 4, 3]), r.out([2, 3, 3, 3]), r.out([1, 4, 4, 2]));
    for (arg, stride, pad_top, pad_left) in
        [("stride", 1 << 63, 1, 1), ("pad_top", 2, usize::MAX, 1), ("pad_left", 2, 1, usize::MAX)]
    {
        let fwd = Conv2dFwd::plain([x.view(), w.view()], None, y.out(), stride, [pad_top, pad_left]);
        let bwd = Conv2dBwdData::plain([y.view(), w.view()], x.out(), stride, [pad_top, pad_left]);
        for e in [r.cpu.conv2d_fwd(S, &fwd), r.cpu.conv2d_bwd_data(S, &bwd)] {
            let e = e.unwrap_err().to_string();
            assert!(e.contains(&format!("`{arg}` is")) && e.contains("below 268435456"), "{e}");
        }
    }
}

/// The fused forms against the kernels that they replace.
#[test]
fn fused_forms_match_separate_kernels() {
    for (c, groups, of_y) in [(cases()[1], 3, 5), (cases()[2], 1, 2), (cases()[4], 5, 7), (cases()[9], 2, 3)]
    {
        let [b, _, _, ci] = c.x;
        let (x, w, bias) = (values(size(c.x), 1), values(size(c.w), 2), values(c.w[0], 3));
        let (dy, residual, skip) = (values(size(c.y), 4), values(size(c.y), 5), values(size(c.x), 6));
        let (gamma, beta, start) = (values(ci, 7), values(ci, 8), values(ci, 9));
        let dw = values(size(c.w), 10);
        let run = |r: &Run, fused: bool| {
            let (x, w, bias) = (r.act(c.x, &x), r.act(c.w, &w), r.act([c.w[0]], &bias));
            let (dy, residual, skip) = (r.act(c.y, &dy), r.act(c.y, &residual), r.act(c.x, &skip));
            let (gamma, beta) = (r.act([ci], &gamma), r.act([ci], &beta));
            let (mean, rstd, a) = (r.out_acc([b, groups]), r.out_acc([b, groups]), r.out(c.x));
            let (y, y_mean, y_rstd) = (r.out(c.y), r.out_acc([b, of_y]), r.out_acc([b, of_y]));
            let (dx, dw, dgamma, dbeta) =
                (r.out(c.x), r.acc(c.w, &dw), r.acc([ci], &start), r.acc([ci], &start));
            let (cpu, eps) = (&r.cpu, 1e-3);
            let norm = GroupNormFwd {
                x: x.view(),
                w: gamma.view(),
                b: beta.view(),
                y: a.out(),
                mean: mean.out(),
                rstd: rstd.out(),
                eps,
                silu: true,
            };
            cpu.group_norm_fwd(S, &norm).unwrap();
            let [m, s, ga, be] = [&mean, &rstd, &gamma, &beta].map(|t| fused.then(|| t.view()));
            let (sum, back) = (r.out(c.y), r.out(c.x));
            let from = if fused { &x } else { &a };
            let to = if fused { &y } else { &sum };
            let fwd = Conv2dFwd {
                mean: m,
                rstd: s,
                gamma: ga,
                beta: be,
                residual: fused.then(|| residual.view()),
                y_mean: fused.then(|| y_mean.out()),
                y_rstd: fused.then(|| y_rstd.out()),
                eps,
                ..Conv2dFwd::plain([from.view(), w.view()], Some(bias.view()), to.out(), c.stride, c.pad)
            };
            cpu.conv2d_fwd(S, &fwd).unwrap();
            let to = if fused { &dx } else { &back };
            let data = Conv2dBwdData {
                x: fused.then(|| x.view()),
                mean: m,
                rstd: s,
                gamma: ga,
                beta: be,
                skip: fused.then(|| skip.view()),
                dgamma: fused.then(|| dgamma.acc()),
                dbeta: fused.then(|| dbeta.acc()),
                ..Conv2dBwdData::plain([dy.view(), w.view()], to.out(), c.stride, c.pad)
            };
            cpu.conv2d_bwd_data(S, &data).unwrap();
            let weight = Conv2dBwdWeight {
                mean: m,
                rstd: s,
                gamma: ga,
                beta: be,
                ..Conv2dBwdWeight::plain([from.view(), dy.view()], dw.acc(), None, c.stride, c.pad)
            };
            cpu.conv2d_bwd_weight(S, &weight).unwrap();
            if !fused {
                cpu.add(S, &Add { a: sum.view(), b: residual.view(), y: y.out() }).unwrap();
                let stats = GroupNormStats { x: y.view(), mean: y_mean.out(), rstd: y_rstd.out(), eps };
                cpu.group_norm_stats(S, &stats).unwrap();
                let through = r.out(c.x);
                let norm = GroupNormBwd {
                    dy: back.view(),
                    x: x.view(),
                    w: gamma.view(),
                    b: beta.view(),
                    mean: mean.view(),
                    rstd: rstd.view(),
                    dx: through.out(),
                    dw: Some(dgamma.acc()),
                    db: Some(dbeta.acc()),
                    silu: true,
                };
                cpu.group_norm_bwd(S, &norm).unwrap();
                cpu.add(S, &Add { a: through.view(), b: skip.view(), y: dx.out() }).unwrap();
            }
            vec![y, y_mean, y_rstd, dx, dgamma, dbeta, dw]
        };
        let r = Run::f64();
        let want = r.values(&run(&r, false));
        // bf16 rounds the activation, and the gradient of the activation, on the way.
        for p in [Precision::F64, Precision::F32] {
            let r = Run::new(p, 2);
            compare_all(&r, &run(&r, true), &want);
        }
    }
}
