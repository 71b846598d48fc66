//! Rows by index: embeddings, selected positions, merged streams.

use super::{S, expect_rank};
use crate::autograd::{Tape, Var};
use crate::backend::{GatherBwd, GatherFwd};
use crate::error::Result;
use crate::tensor::Tensor;

/// `y[n] = table[idx[n]]`, zeros where `idx[n] < 0`: `table` `[R, C]`, `idx` `[N]` i32, `y` `[N, C]`. Saves `idx`.
pub fn gather(tape: &Tape, table: &Var, idx: &Tensor) -> Result<Var> {
    expect_rank("gather", "table", table, 2)?;
    let y = tape.like(table, [idx.dims().numel(), table.dims().cols()])?;
    let a = GatherFwd { table: table.value().view(), idx: idx.view(), y: y.out() };
    tape.dev().gather_fwd(S, &a)?;
    let (ts, idx) = (table.key(), idx.clone());
    Ok(tape.op1(&[table], y, move |g, out| {
        let Some(dy) = g.take(out)? else { return Ok(()) };
        if let Some(dt) = g.target(ts)? {
            let a = GatherBwd { dy: dy.view(), idx: idx.view(), dtable: dt.acc() };
            g.dev().gather_bwd(S, &a)?;
        }
        Ok(())
    }))
}
