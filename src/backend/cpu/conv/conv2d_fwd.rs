//! Outputs of convolutions.

use rayon::prelude::*;

use super::norm::{channels::Planes, group_stats};
use super::*;
use crate::backend::cpu::products::{bias, start_from_bias};
use crate::backend::cpu::workspace::{acc_size, block, per_thread, together, wide};

pub(crate) fn conv2d_fwd_workspace(a: &Conv2dFwd, threads: usize) -> usize {
    let y = &a.y.0;
    let (Ok(x_dims), Ok(w), Ok(y_dims)) = (image("", "", &a.x), image("", "", &a.w), image("", "", y)) else {
        return 0;
    };
    let (o, size) = (w[0], acc_size(y.dtype));
    if y.dims.numel() == 0 {
        return 0;
    }
    let of_statistics = a.y_mean.as_ref().and_then(|mean| Planes::of_groups("", y, &mean.0).ok());
    let of_statistics = of_statistics.map_or(0, |at| at.statistics_bytes(y.dtype));
    let cols = Geometry::forward(x_dims, w, y_dims, a.stride, [a.pad_top, a.pad_left]);
    let transposed = if o <= FEW { 0 } else { block(size, a.w.dims.numel()) };
    let of_product = together([
        wide(&a.w),
        transposed,
        rounded_bytes(y.dtype, threads, cols.chunks(), cols.chunk().saturating_mul(o)),
        per_thread(threads, size, cols.chunks(), [cols.gathered(a.x.dtype)]),
    ]);
    with_norm(input_norm(a), &a.x, of_product).max(of_statistics)
}

fn input_norm<'a>(a: &Conv2dFwd<'a>) -> Option<InputNorm<'a>> {
    InputNorm::of([a.mean, a.rstd, a.gamma, a.beta])
}

pub(crate) fn conv2d_fwd(ws: &Workspace, s: &Conv2dFwd) -> Result<()> {
    by_dtype!("conv2d_fwd", s.y.0.dtype, T => fwd::<T>(ws, s))
}

const OP: &str = "conv2d_fwd";

fn fwd<T: Elem>(ws: &Workspace, s: &Conv2dFwd) -> Result<()> {
    match input_norm(s) {
        Some(norm) if s.y.0.dims.numel() > 0 => product(ws, s, &norm.apply::<T>(OP, ws, &s.x)?)?,
        _ => product(ws, s, flat::<T>(OP, "x", &s.x)?)?,
    }
    if let (Some(mean), Some(rstd)) = (&s.y_mean, &s.y_rstd) {
        group_stats::<T>(OP, ws, [("y", &s.y.0), ("y_mean", &mean.0), ("y_rstd", &rstd.0)], s.eps)?;
    }
    Ok(())
}

/// The outputs for the activation `x`.
fn product<T: Elem>(ws: &Workspace, s: &Conv2dFwd, x: &[T]) -> Result<()> {
    let w = flat::<T>(OP, "w", &s.w)?;
    let residual = s.residual.as_ref().map(|r| flat::<T>(OP, "residual", r)).transpose()?;
    let y = flat_mut::<T>(OP, "y", &s.y.0)?;
    let o = s.w.dims[0];
    let bias = bias::<T>(OP, s.bias.as_ref())?;
    if y.is_empty() {
        return Ok(());
    }
    let dims = [image(OP, "x", &s.x)?, image(OP, "w", &s.w)?, image(OP, "y", &s.y.0)?];
    let of = Geometry::forward(dims[0], dims[1], dims[2], s.stride, [s.pad_top, s.pad_left]);
    let cols = Columns { x, of };
    let k = of.width();
    let w = Wide::new(ws, Rows::of(w, k))?;
    let w = w.rows().data();
    // Products read weights in this order without packing them.
    let wt = if o <= FEW { None } else { Some(transposed(ws, w, k)?) };
    let wt = wt.as_ref().map_or(Mat::new(w, o, k, k).t(), |wt| Mat::new(wt, k, o, o));
    let chunk = of.chunk();
    let rounded = Rounded::<T>::new(ws, of.chunks(), chunk * o)?;
    let gathered = ws.per_thread::<T::Acc, 1>(of.chunks(), [of.gathered(T::DTYPE)])?;
    y.par_chunks_mut(chunk * o).enumerate().for_each(|(i, y)| {
        let r = i * chunk..i * chunk + y.len() / o;
        let mut gathered = gathered.take();
        let [scratch] = gathered.parts();
        rounded.write(y, |y| {
            start_from_bias(bias, y);
            cols.with(r.clone(), scratch, |cols| gemm(cols, wt, y, o, bias.is_some()));
            if let Some(residual) = residual {
                for (y, add) in y.iter_mut().zip(&residual[r.start * o..]) {
                    *y += add.up();
                }
            }
        });
    });
    Ok(())
}
