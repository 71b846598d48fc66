//! Rotary position embedding.

use num_traits::{Float, One, Zero};

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(rope(Rope));

pub(crate) fn rope(_ws: &Workspace, s: &Rope) -> Result<()> {
    by_dtype!("rope", s.y.0.dtype, T => rope_of::<T>(s))
}

fn rope_of<T: Elem>(s: &Rope) -> Result<()> {
    const OP: &str = "rope";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    let position = flat::<i32>(OP, "position", &s.position)?;
    let d = s.head_dim;
    let turned = s.heads * d;
    // Without heads, `head_dim` may have any size.
    let half = if s.heads == 0 { 0 } else { d / 2 };
    let frequency: Vec<T::Acc> =
        (0..half).map(|i| T::Acc::of(s.theta.powf(-2.0 * i as f64 / d as f64))).collect();
    par_for(x.rows, chunk_rows(x.cols), |r| {
        let mut turn = vec![(T::Acc::one(), T::Acc::zero()); half];
        for i in r {
            let position = T::Acc::of(position[i] as f64);
            for (turn, f) in turn.iter_mut().zip(&frequency) {
                let (sin, cos) = (position * *f).sin_cos();
                *turn = (cos, if s.inverse { -sin } else { sin });
            }
            // SAFETY: chunks do not share rows.
            let (x, y) = (x.row(i), unsafe { y.row(i) });
            for (x, y) in x[..turned].chunks_exact(d).zip(y[..turned].chunks_exact_mut(d)) {
                rotate(x, y, &turn);
            }
            y[turned..].copy_from_slice(&x[turned..]);
        }
    });
    Ok(())
}

/// Rotates the pairs (k, k + D/2) of one head by the angles of `turn`, given as (cos, sin).
fn rotate<T: Elem>(x: &[T], y: &mut [T], turn: &[(T::Acc, T::Acc)]) {
    let half = turn.len();
    let ((x0, x1), (y0, y1)) = (x.split_at(half), y.split_at_mut(half));
    for ((((y0, y1), x0), x1), &(cos, sin)) in y0.iter_mut().zip(y1).zip(x0).zip(x1).zip(turn) {
        let (a, b) = (x0.up(), x1.up());
        *y0 = T::down(a * cos - b * sin);
        *y1 = T::down(b * cos + a * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::run::*;

    #[test]
    fn rope_turns_pairs_and_back() {
        let (n, heads, d, cols, theta) = (37, 3, 10, 35, 1e4);
        let x = values(n * cols, 1);
        let position: Vec<i32> = (0..n as i32).map(|i| i * 7 % 23).collect();
        let mut y = x.clone();
        for i in 0..n * heads * d / 2 {
            let (row, head, k) = (i / (heads * d / 2), i / (d / 2) % heads, i % (d / 2));
            let angle = position[row] as f64 * f64::powf(theta, -2.0 * k as f64 / d as f64);
            let (a, b) = (row * cols + head * d + k, row * cols + head * d + k + d / 2);
            y[a] = x[a] * angle.cos() - x[b] * angle.sin();
            y[b] = x[b] * angle.cos() + x[a] * angle.sin();
        }
        check(&[y, x.clone()], |r| {
            let (x, position) = (r.columns(n, cols, &x), r.idx(&position));
            let (y, back) = (r.columns(n, cols, &vec![f64::NAN; n * cols]), r.out([n, cols]));
            let turn = |x: &Tensor, y: &Tensor, inverse| {
                let (x, position, y) = (x.view(), position.view(), y.out());
                r.cpu.rope(S, &Rope { x, position, y, heads, head_dim: d, theta, inverse }).unwrap();
            };
            turn(&x, &y, false);
            turn(&y, &back, true);
            vec![y, back]
        });
    }
}
