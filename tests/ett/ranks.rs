//! Arithmetic of ranks: sums over ranks are divided by the counts of all ranks.

use std::sync::Arc;

use ett::backend::*;
use ett::config::StageKind;
use ett::error::{Error, Result};
use ett::tensor::Tensor;
use ett::train::Loss;

use crate::common::{Outcome, cpu};
use crate::training::{Run, batch, small};

/// One of two ranks; the other one holds the same pictures, so that sums over ranks double.
struct Twin(Arc<dyn Kernels>);

impl Collectives for Twin {
    fn ranks(&self) -> usize {
        2
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_reduce(&self, s: Stream, x: Acc, _how: Reduction) -> Result<()> {
        let copy = Tensor::empty(self, Role::Workspace, x.0.dtype, x.0.dims)?;
        self.cast(s, &Cast { x: x.0, y: copy.out() })?;
        self.accumulate(s, &Accumulate { x: copy.view(), y: x })
    }
    fn reduce_scatter(&self, _s: Stream, _x: In, _y: Out) -> Result<()> {
        Err(Error::device("twin", "reduces nothing by slices"))
    }
    fn all_gather(&self, _s: Stream, _x: In, _y: Out) -> Result<()> {
        Err(Error::device("twin", "gathers nothing"))
    }
}

impl Device for Twin {
    fn name(&self) -> String {
        "twin".into()
    }
    fn id(&self) -> DeviceId {
        self.0.id()
    }
    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        self.0.alloc(role, bytes)
    }
    fn copy_in(&self, s: Stream, src: &[u8], dst: Out) -> Result<()> {
        self.0.copy_in(s, src, dst)
    }
    fn copy(&self, s: Stream, src: In, dst: Out) -> Result<()> {
        self.0.copy(s, src, dst)
    }
    fn read_later(&self, s: Stream, src: In) -> Result<Pending> {
        self.0.read_later(s, src)
    }
    fn collectives(&self) -> &dyn Collectives {
        self
    }
    fn memory(&self) -> Memory {
        self.0.memory()
    }
}

macro_rules! delegate {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => {
        impl Kernels for Twin {
            $(fn $name(&self, s: Stream, a: &$args<'_>) -> Result<()> {
                self.0.$name(s, a)
            })*
        }
    };
}
ett::kernel_table!(delegate);

#[test]
fn two_ranks_with_the_same_pictures_make_the_step_of_one() -> Outcome {
    for kind in [StageKind::Tokenizer, StageKind::Semantic] {
        let losses = |dev: Arc<dyn Kernels>, ranks: usize| -> Result<(Vec<f64>, Vec<f64>)> {
            let mut run = Run::new(&small("f64"), dev, kind, 1e-3)?;
            let data = batch(&run.model, &[[2, 32, 32]], kind)?;
            let out = run.step_of_ranks(std::slice::from_ref(&data), ranks)?;
            let p = &run.model.params;
            let encoder =
                p.group("encoder").and_then(|g| p.training(g)).map(|t| t.grad.to_f64(&**p.device()));
            let values = Loss::ALL.iter().map(|&l| out.value(&run.model, l)).collect::<Result<_>>()?;
            Ok((values, encoder.transpose()?.unwrap_or_default()))
        };
        let one = losses(cpu(2), 1)?;
        let two = losses(Arc::new(Twin(cpu(2))), 2)?;
        for (i, loss) in Loss::ALL.into_iter().enumerate() {
            // The share of a rank is one half, except for the entropy of the average, which each rank computes over
            // both.
            let share = if loss == Loss::EntAvg { 1.0 } else { 0.5 };
            let (a, b) = (share * one.0[i], two.0[i]);
            assert!((a - b).abs() <= 1e-12 * a.abs(), "{} {}: {b}, wanted {a}", kind.name(), loss.name());
        }
        // The gradients of both ranks add up to that of a single one.
        let largest = one.1.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (a, b) in one.1.iter().zip(&two.1) {
            assert!((a - 2.0 * b).abs() <= 1e-9 * largest, "{}: {b}, wanted half of {a}", kind.name());
        }
    }
    Ok(())
}
