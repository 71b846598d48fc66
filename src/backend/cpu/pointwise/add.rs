//! Sums of two tensors.

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(add(Add));

pub(crate) fn add(_ws: &Workspace, s: &Add) -> Result<()> {
    by_dtype!("add", s.y.0.dtype, T => {
        map2::<T>("add", ("a", &s.a), ("b", &s.b), ("y", &s.y.0), #[inline(always)] |a, b| a + b)
    })
}

#[cfg(test)]
mod tests {
    use super::super::naive::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    #[test]
    fn sums_match_loops() {
        for (n, c) in [(1, 1), (67, 31), (1, 40_001), (9001, 3)] {
            let (a, b) = (values(n * c, 1), values(n * c, 2));
            check(&[zip(&a, &b, |a, b| a + b)], |r| {
                let (a, b, y) = (r.act([n, c], &a), r.columns(n, c, &b), r.out([n, c]));
                r.cpu.add(S, &Add { a: a.view(), b: b.view(), y: y.out() }).unwrap();
                vec![y]
            });
        }
    }
}
