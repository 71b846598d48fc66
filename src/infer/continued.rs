//! Sequences that a model continues one position at a time, with a cache of keys and values.

use crate::autograd::{Tape, Var};
use crate::backend::Role;
use crate::error::{Error, Result};
use crate::feed::Batch;
use crate::model::tokenizer::Grid;
use crate::model::{Cache, Ett, Part};
use crate::ops;
use crate::tensor::Tensor;

/// S sequences and the model's state after their last positions.
pub struct Continued<'a> {
    model: &'a Ett,
    tape: &'a Tape,
    cache: Cache,
    hidden: Var,
    /// The number of copies of [`Continued::codes`] and the row that each sequence gets, once they are known.
    copies: Option<(usize, Tensor)>,
}

impl<'a> Continued<'a> {
    /// Processes non-empty prompts of any lengths over pictures with the given visual rows `[M, C]` and grids; at
    /// most `more` positions can follow. `tape` must be an inference tape.
    pub fn new(
        model: &'a Ett,
        tape: &'a Tape,
        prompts: &[Vec<Part>],
        visual: Option<(&Var, &[Grid])>,
        more: usize,
    ) -> Result<Self> {
        let packed = Batch::pack(model, prompts, visual.map_or(&[], |v| v.1), 1)?;
        let x = model.input_rows(tape, visual.map(|v| v.0), &packed)?;
        let (p, seqs) = (&model.params, &packed.seqs);
        let (hidden, cache) = model.llm.prefill(tape, p, &x, &packed.position, seqs, more)?;
        let ends = seqs.cu.to_host::<i32>(tape.dev())?;
        let last: Vec<i32> = ends[1..].iter().map(|end| end - 1).collect();
        let hidden = ops::gather(tape, &hidden, &indices(tape, &last)?)?;
        Ok(Continued { model, tape, cache, hidden, copies: None })
    }

    /// Hidden states `[S, C]` that predict the next position.
    pub fn hidden(&self) -> &Var {
        &self.hidden
    }

    /// Appends a token of the vocabulary to each sequence, `ids` `[S]` i32.
    pub fn tokens(&mut self, ids: &Tensor) -> Result<()> {
        self.expect("ids", ids, 1)?;
        let x = self.model.text_rows(self.tape, ids)?;
        self.push(&x)
    }

    /// Appends a visual token to each sequence: rows `idx` `[S]` i32 of the codes `[K, D]`. With `copies` = n, `idx`
    /// is `[S / n]` and sequence s gets row `s % (S / n)` of it.
    pub fn codes(&mut self, idx: &Tensor, codes: &Var, copies: usize) -> Result<()> {
        self.expect("idx", idx, copies)?;
        let x = self.model.visual_rows(self.tape, &ops::gather(self.tape, codes, idx)?, idx)?;
        if copies == 1 {
            return self.push(&x);
        }
        let rows = match &self.copies {
            Some((known, rows)) if *known == copies => rows.clone(),
            _ => {
                let n = idx.dims().numel() as i32;
                let rows: Vec<i32> = (0..copies as i32 * n).map(|s| s % n).collect();
                self.copies.insert((copies, indices(self.tape, &rows)?)).1.clone()
            }
        };
        let x = ops::gather(self.tape, &x, &rows)?;
        self.push(&x)
    }

    fn expect(&self, arg: &'static str, ids: &Tensor, copies: usize) -> Result<()> {
        let (n, want) = (ids.dims().numel(), self.cache.sequences());
        if n * copies != want {
            let each =
                if copies == 1 { "one per sequence".into() } else { format!("one for {copies} sequences") };
            return Err(Error::arg("continue", arg, n, format!("{}, {each}", want / copies.max(1))));
        }
        Ok(())
    }

    fn push(&mut self, x: &Var) -> Result<()> {
        self.hidden = self.model.llm.decode(self.tape, &self.model.params, x, &mut self.cache)?;
        Ok(())
    }
}

/// Indices on the device.
pub(super) fn indices(tape: &Tape, idx: &[i32]) -> Result<Tensor> {
    Tensor::from_host(tape.dev(), Role::Input, idx, [idx.len()])
}
