//! Shift and scale of channels.

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(channel_affine_fwd(ChannelAffineFwd), channel_affine_bwd(ChannelAffineBwd));

pub(crate) fn channel_affine_fwd(_ws: &Workspace, s: &ChannelAffineFwd) -> Result<()> {
    by_dtype!("channel_affine_fwd", s.y.0.dtype, T => affine_fwd::<T>(s))
}

pub(crate) fn channel_affine_bwd(_ws: &Workspace, s: &ChannelAffineBwd) -> Result<()> {
    by_dtype!("channel_affine_bwd", s.dx.0.dtype, T => affine_bwd::<T>(s))
}

fn affine_fwd<T: Elem>(s: &ChannelAffineFwd) -> Result<()> {
    const OP: &str = "channel_affine_fwd";
    let (x, y) = (rows::<T>(OP, "x", &s.x)?, rows_mut::<T>(OP, "y", &s.y.0)?);
    let (shift, scale) = (flat::<T>(OP, "shift", &s.shift)?, flat::<T>(OP, "scale", &s.scale)?);
    par_rows(
        x.rows,
        x.cols,
        #[inline(always)]
        |i| {
            // SAFETY: chunks do not share rows.
            let y = unsafe { y.row(i) };
            for (((y, x), shift), scale) in y.iter_mut().zip(x.row(i)).zip(shift).zip(scale) {
                *y = T::down((x.up() - shift.up()) / scale.up());
            }
        },
    );
    Ok(())
}

fn affine_bwd<T: Elem>(s: &ChannelAffineBwd) -> Result<()> {
    const OP: &str = "channel_affine_bwd";
    let (dy, dx) = (rows::<T>(OP, "dy", &s.dy)?, rows_mut::<T>(OP, "dx", &s.dx.0)?);
    let scale = flat::<T>(OP, "scale", &s.scale)?;
    par_rows(
        dy.rows,
        dy.cols,
        #[inline(always)]
        |i| {
            // SAFETY: chunks do not share rows.
            let dx = unsafe { dx.row(i) };
            for ((dx, dy), scale) in dx.iter_mut().zip(dy.row(i)).zip(scale) {
                *dx = T::down(dy.up() / scale.up());
            }
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::run::*;

    #[test]
    fn channel_affine_matches_loops() {
        for (n, c) in [(1, 1), (67, 31), (1, 40_001), (9001, 3)] {
            let (a, b) = (values(n * c, 1), values(n * c, 2));
            let (shift, scale) =
                (values(c, 3), values(c, 4).iter().map(|x| x.abs() + 0.5).collect::<Vec<_>>());
            let scale: Vec<f64> = scale.iter().map(|x| DType::Bf16.rounded(*x)).collect();
            let affine = (0..n * c).map(|i| (a[i] - shift[i % c]) / scale[i % c]).collect();
            let affine_bwd = (0..n * c).map(|i| b[i] / scale[i % c]).collect();
            check(&[affine, affine_bwd], |r| {
                let (a, b) = (r.act([n, c], &a), r.columns(n, c, &b));
                let (shift, scale) = (r.act([c], &shift), r.act([c], &scale));
                let (affine, dx) = (r.out([n, c]), r.columns(n, c, &vec![f64::NAN; n * c]));
                let (shift, scale) = (shift.view(), scale.view());
                let s = ChannelAffineFwd { x: a.view(), shift, scale, y: affine.out() };
                r.cpu.channel_affine_fwd(S, &s).unwrap();
                let s = ChannelAffineBwd { dy: b.view(), scale, dx: dx.out() };
                r.cpu.channel_affine_bwd(S, &s).unwrap();
                vec![affine, dx]
            });
        }
    }
}
