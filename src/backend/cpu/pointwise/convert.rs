//! Copies to another type, and sums in another type.

use super::*;
use crate::backend::cpu::workspace::no_workspace;

no_workspace!(accumulate(Accumulate), cast(Cast), scale_bytes(ScaleBytes));

pub(crate) fn accumulate(_ws: &Workspace, s: &Accumulate) -> Result<()> {
    by_dtype!("accumulate", s.x.dtype, X => by_dtype!("accumulate", s.y.0.dtype, Y => {
        map::<X, Y>("accumulate", &s.x, ("y", &s.y.0), #[inline(always)] |x, y| {
            *y = Y::down(y.up() + convert::<X, Y>(x));
        })
    }))
}

pub(crate) fn cast(_ws: &Workspace, s: &Cast) -> Result<()> {
    by_dtype!("cast", s.x.dtype, X => by_dtype!("cast", s.y.0.dtype, Y => {
        map::<X, Y>("cast", &s.x, ("y", &s.y.0), #[inline(always)] |x, y| {
            *y = Y::down(convert::<X, Y>(x));
        })
    }))
}

pub(crate) fn scale_bytes(_ws: &Workspace, s: &ScaleBytes) -> Result<()> {
    by_dtype!("scale_bytes", s.y.0.dtype, Y => {
        map::<u8, Y>("scale_bytes", &s.x, ("y", &s.y.0), #[inline(always)] |x, y| {
            let of = <Y as Elem>::Acc::of;
            *y = Y::down(of(f64::from(x)) / of(127.5) - of(1.0));
        })
    })
}

#[inline(always)]
fn convert<X: Elem, Y: Elem>(x: X) -> Y::Acc {
    Y::Acc::of(x.up().wide())
}

#[cfg(test)]
mod tests {
    use super::super::naive::*;
    use super::*;
    use crate::backend::cpu::testing::run::*;

    #[test]
    fn bytes_become_values_from_minus_1_to_1() {
        let r = Run::f64();
        let x = Tensor::from_host(&r.cpu, Role::Input, &[0u8, 51, 204, 255], [2, 2]).unwrap();
        let y = r.out([2, 2]);
        r.cpu.scale_bytes(S, &ScaleBytes { x: x.view(), y: y.out() }).unwrap();
        assert_eq!(r.get(&y), [0.0, 51.0, 204.0, 255.0].map(|x| x / 127.5 - 1.0));
    }

    #[test]
    fn casts_and_accumulates_between_all_types() {
        let r = Run::f64();
        let types = [DType::F64, DType::F32, DType::Bf16];
        for (from, to) in types.into_iter().flat_map(|a| types.map(|b| (a, b))) {
            for (n, c) in [(1, 1), (13, 7), (1, 20_001)] {
                let (v, before) = (values(n * c, 1), values(n * c, 2));
                let tensor =
                    |dtype, v: &[f64]| Tensor::from_f64(&r.cpu, Role::Activation, dtype, v, [n, c]).unwrap();
                let wide = |dtype| {
                    let t = Tensor::empty(&r.cpu, Role::Activation, dtype, [n, c + 3]).unwrap();
                    t.columns(1, c).unwrap()
                };
                let (x, y, sum, slice) = (tensor(from, &v), tensor(to, &v), tensor(to, &before), wide(to));
                r.cpu.cast(S, &Cast { x: x.view(), y: slice.out() }).unwrap();
                r.cpu.cast(S, &Cast { x: slice.view(), y: y.out() }).unwrap();
                assert_eq!(r.get(&y), v);
                r.cpu.accumulate(S, &Accumulate { x: x.view(), y: sum.acc() }).unwrap();
                let want = tensor(to, &zip(&before, &v, |a, b| a + b));
                assert_eq!(r.get(&sum), r.get(&want));
            }
        }
        let (x, y) = (r.idx(&[1]), r.out([1]));
        let e = r.cpu.cast(S, &Cast { x: x.view(), y: y.out() }).unwrap_err();
        assert_eq!(e.to_string(), "cast: argument `x` is i32, wanted a float type");
    }
}
