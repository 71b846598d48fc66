//! Sequences that a model goes on with, a position at a time, over a cache of keys and values.

use crate::autograd::{Tape, Var};
use crate::backend::Role;
use crate::error::{Error, Result};
use crate::model::tokenizer::Grid;
use crate::model::{Cache, Ett, Part};
use crate::ops;
use crate::tensor::Tensor;
use crate::train::Batch;

/// S sequences side by side, and what the model makes of them so far.
pub struct Continued<'a> {
    model: &'a Ett,
    tape: &'a Tape,
    cache: Cache,
    hidden: Var,
}

impl<'a> Continued<'a> {
    /// Reads prompts, of any lengths above 0, over pictures whose visual rows `[M, C]` and grids are given; `more`
    /// positions at most can follow. `tape` is one of inference.
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
        Ok(Continued { model, tape, cache, hidden })
    }

    /// Hidden states `[S, C]` that predict what comes next.
    pub fn hidden(&self) -> &Var {
        &self.hidden
    }

    /// Goes on with a token of the vocabulary in each sequence.
    pub fn tokens(&mut self, ids: &[i32]) -> Result<()> {
        self.expect("ids", ids)?;
        let x = self.model.text_rows(self.tape, &indices(self.tape, ids)?)?;
        self.push(&x)
    }

    /// Goes on with a visual token in each sequence: rows `idx` of the codes `[K, D]`.
    pub fn codes(&mut self, idx: &[i32], codes: &Var) -> Result<()> {
        self.expect("idx", idx)?;
        let idx = indices(self.tape, idx)?;
        let x = self.model.visual_rows(self.tape, &ops::gather(self.tape, codes, &idx)?, &idx)?;
        self.push(&x)
    }

    fn expect(&self, arg: &'static str, ids: &[i32]) -> Result<()> {
        let want = self.cache.sequences();
        if ids.len() != want {
            return Err(Error::arg("continue", arg, ids.len(), format!("{want}, one a sequence")));
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
