//! Rows by index: embeddings and their gradients, rows of a cache; and indices that count.

use rayon::prelude::*;

use super::workspace::no_workspace;
use super::*;

no_workspace!(
    gather_fwd(GatherFwd),
    gather_bwd(GatherBwd),
    put_rows(PutRows),
    pick(Pick),
    count_up(CountUp),
    arange(Arange)
);

/// Rows that one task copies.
const ROWS: usize = 64;

pub(super) fn gather_fwd(_ws: &Workspace, a: &GatherFwd) -> Result<()> {
    by_dtype!("gather_fwd", a.table.dtype, E => fwd::<E>(a))
}

pub(super) fn gather_bwd(_ws: &Workspace, a: &GatherBwd) -> Result<()> {
    by_dtype!("gather_bwd", a.dy.dtype, E => bwd::<E>(a))
}

pub(super) fn put_rows(_ws: &Workspace, a: &PutRows) -> Result<()> {
    match a.x.dtype {
        DType::I32 => put::<i32>(a),
        DType::U8 => put::<u8>(a),
        float => by_dtype!("put_rows", float, E => put::<E>(a)),
    }
}

pub(super) fn pick(_ws: &Workspace, a: &Pick) -> Result<()> {
    let x = flat::<i32>("pick", "x", &a.x)?;
    let y = flat_mut::<i32>("pick", "y", &a.y.0)?;
    for (y, &i) in y.iter_mut().zip(indices("pick", &a.idx, x.len())?) {
        *y = usize::try_from(i).map_or(-1, |i| x[i]);
    }
    Ok(())
}

pub(super) fn count_up(_ws: &Workspace, a: &CountUp) -> Result<()> {
    let skipped = match &a.norm {
        Some(norm) => {
            by_dtype!("count_up", norm.dtype, E => Ok(is_skipped(flat::<E>("count_up", "norm", norm)?)))
        }
        None => Ok(false),
    }?;
    let x = flat_mut::<i32>("count_up", "x", &a.x.0)?;
    if !skipped {
        x.iter_mut().for_each(|v| *v = v.wrapping_add(1));
    }
    Ok(())
}

fn is_skipped<E: Elem>(norm: &[E]) -> bool {
    norm[1].up() > E::Acc::of(0.0)
}

pub(super) fn arange(_ws: &Workspace, a: &Arange) -> Result<()> {
    let y = flat_mut::<i32>("arange", "y", &a.y.0)?;
    let last = y.len().saturating_sub(1).saturating_mul(a.step);
    if i32::try_from(last).is_err() {
        return Err(Error::arg("arange", "step", a.step, format!("a last value below 2^31, not {last}")));
    }
    for (n, y) in y.iter_mut().enumerate() {
        *y = (n * a.step) as i32;
    }
    Ok(())
}

/// The indices, checked against the number of rows of the table.
fn indices<'a>(op: &'static str, idx: &In<'a>, rows: usize) -> Result<&'a [i32]> {
    let idx = flat::<i32>(op, "idx", idx)?;
    match idx.iter().find(|&&i| i >= 0 && i as usize >= rows) {
        Some(i) => Err(Error::arg(op, "idx", i, format!("less than the {rows} rows of the table"))),
        None => Ok(idx),
    }
}

fn fwd<E: Elem>(a: &GatherFwd) -> Result<()> {
    let op = "gather_fwd";
    let table = rows::<E>(op, "table", &a.table)?;
    let y = rows_mut::<E>(op, "y", &a.y.0)?;
    let idx = indices(op, &a.idx, table.rows)?;
    par_for(y.rows, ROWS, |r| {
        for n in r {
            // SAFETY: chunks do not overlap, so that each row belongs to one thread.
            let y = unsafe { y.row(n) };
            match usize::try_from(idx[n]) {
                Ok(i) => y.copy_from_slice(table.row(i)),
                Err(_) => y.fill(E::zeroed()),
            }
        }
    });
    Ok(())
}

fn put<E: Element>(a: &PutRows) -> Result<()> {
    let op = "put_rows";
    let x = rows::<E>(op, "x", &a.x)?;
    let y = rows_mut::<E>(op, "y", &a.y.0)?;
    for (n, &i) in indices(op, &a.idx, y.rows)?.iter().enumerate() {
        if let Ok(i) = usize::try_from(i) {
            // SAFETY: `indices` checked the range, and one thread writes all rows.
            unsafe { y.row(i) }.copy_from_slice(x.row(n));
        }
    }
    Ok(())
}

fn bwd<E: Elem>(a: &GatherBwd) -> Result<()> {
    let op = "gather_bwd";
    let dy = rows::<E>(op, "dy", &a.dy)?;
    let dtable = rows_mut::<E::Acc>(op, "dtable", &a.dtable.0)?;
    let idx = indices(op, &a.idx, dtable.rows)?;

    // The sort is stable, so that one thread adds the gradients of a row of the table in a fixed order.
    let mut order: Vec<usize> = (0..idx.len()).filter(|&n| idx[n] >= 0).collect();
    order.sort_by_key(|&n| idx[n]);
    let runs: Vec<&[usize]> = order.chunk_by(|&m, &n| idx[m] == idx[n]).collect();
    runs.par_iter().with_min_len(ROWS / 8).for_each(|run| {
        // SAFETY: `indices` checked the range, and each row of the table has one run.
        let out = unsafe { dtable.row(idx[run[0]] as usize) };
        for &n in *run {
            for (o, &d) in out.iter_mut().zip(dy.row(n)) {
                *o += d.up();
            }
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::testing::args::*;
    use super::*;

    fn args(n: usize, r: usize, c: usize) -> Vec<Arg> {
        let idx = (0..n).map(|i| if i % 5 == 3 { -1.0 } else { (i * i % r) as f64 }).collect();
        vec![
            act([r, c], normal(1, r * c)),
            int([n], idx),
            act([n, c], normal(2, n * c)),
            acc([r, c], normal(3, r * c)),
        ]
    }

    #[test]
    fn rows_are_copied_and_their_gradients_added() {
        for (n, r, c) in [(1, 1, 1), (7, 3, 5), (301, 131, 17)] {
            check(
                &args(n, r, c),
                |v| {
                    let (mut y, mut d) = (vec![0.0; n * c], v[3].clone());
                    for i in 0..n * c {
                        if v[1][i / c] >= 0.0 {
                            let at = v[1][i / c] as usize * c + i % c;
                            y[i] = v[0][at];
                            d[at] += v[2][i];
                        }
                    }
                    vec![y, d]
                },
                |dev, p, t| {
                    let y = out(dev, p.act, [n, c]);
                    dev.gather_fwd(S, &GatherFwd { table: t[0].view(), idx: t[1].view(), y: y.out() })?;
                    let a = GatherBwd { dy: t[2].view(), idx: t[1].view(), dtable: t[3].acc() };
                    dev.gather_bwd(S, &a)?;
                    Ok(vec![y, t[3].clone()])
                },
            );
        }
    }

    #[test]
    fn rows_of_a_table_are_replaced() {
        check(
            &[act([3, 2], normal(1, 6)), int([3], vec![4.0, -1.0, 0.0]), act([5, 2], normal(2, 10))],
            |v| {
                let mut y = v[2].clone();
                y[8..].copy_from_slice(&v[0][..2]);
                y[..2].copy_from_slice(&v[0][4..]);
                vec![y]
            },
            |dev, _, t| {
                dev.put_rows(S, &PutRows { x: t[0].view(), idx: t[1].view(), y: t[2].acc() })?;
                Ok(vec![t[2].clone()])
            },
        );
    }

    #[test]
    fn indices_count_up_and_wrap() {
        let dev = Cpu::poisoned(2).unwrap();
        let x = Tensor::from_host(&dev, Role::Input, &[-1, 7, i32::MAX], [3]).unwrap();
        dev.count_up(S, &CountUp { x: x.acc(), norm: None }).unwrap();
        assert_eq!(x.to_host::<i32>(&dev).unwrap(), [0, 8, i32::MIN]);
    }

    #[test]
    fn an_index_beyond_the_table_is_an_error() {
        let dev = Cpu::poisoned(2).unwrap();
        let t = tensors(&dev, Precision::F32, &[act([3, 2], vec![0.0; 6]), int([2], vec![0.0, 3.0])]);
        let y = out(&dev, DType::F32, [2, 2]);
        let e = dev.gather_fwd(S, &GatherFwd { table: t[0].view(), idx: t[1].view(), y: y.out() });
        assert_eq!(
            e.unwrap_err().to_string(),
            "gather_fwd: argument `idx` is 3, wanted less than the 3 rows of the table"
        );
        let y = out(&dev, DType::F32, [2, 3]);
        assert!(dev.gather_fwd(S, &GatherFwd { table: t[0].view(), idx: t[1].view(), y: y.out() }).is_err());
    }
}
