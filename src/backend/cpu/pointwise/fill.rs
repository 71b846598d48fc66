//! Filling a tensor with one value.

use rayon::prelude::*;

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(fill(Fill));

pub(crate) fn fill(_ws: &Workspace, s: &Fill) -> Result<()> {
    match s.y.0.dtype {
        DType::I32 => fill_with(&s.y.0, s.value as i32),
        DType::U8 => fill_with(&s.y.0, s.value as u8),
        float => by_dtype!("fill", float, T => fill_with(&s.y.0, T::down(<T as Elem>::Acc::of(s.value)))),
    }
}

fn fill_with<T: Element>(y: &In, value: T) -> Result<()> {
    if y.is_contiguous() {
        flat_mut::<T>("fill", "y", y)?.par_chunks_mut(CHUNK).for_each(|y| y.fill(value));
    } else {
        let y = rows_mut::<T>("fill", "y", y)?;
        par_for(y.rows, chunk_rows(y.cols), |r| {
            for i in r {
                // SAFETY: chunks do not share rows.
                unsafe { y.row(i) }.fill(value);
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::testing::run::*;

    #[test]
    fn fills_every_type_and_slices() {
        let r = Run::f64();
        for dtype in [DType::F64, DType::F32, DType::Bf16, DType::I32, DType::U8] {
            let t = Tensor::empty(&r.cpu, Role::Activation, dtype, [50, 1001]).unwrap();
            r.cpu.fill(S, &Fill { y: t.out(), value: 3.0 }).unwrap();
            r.cpu.fill(S, &Fill { y: t.columns(7, 2).unwrap().out(), value: 7.0 }).unwrap();
            let want = |i: usize| if (7..9).contains(&(i % 1001)) { 7.0 } else { 3.0 };
            assert!(r.get(&t).iter().enumerate().all(|(i, x)| *x == want(i)));
        }
    }
}
