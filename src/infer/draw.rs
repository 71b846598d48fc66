//! Pictures from prompts: codes one by one, then the tokenizer's decoder.

use rayon::prelude::*;

use super::continued::{Continued, indices};
use super::{Sampling, pictures};
use crate::autograd::Tape;
use crate::data::Image;
use crate::error::{Error, Result};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::ops;
use crate::train::interrupt;

/// Pictures drawn side by side, which bounds the cache.
const BATCH: usize = 16;

/// Draws a picture of `grid` (rows, columns) codes for each prompt, text alone; `start` is the id of
/// `<|vision_start|>`, which follows it. `progress` hears how many codes there are and are to be. Picture i follows
/// from the model, its prompt, `s` and i alone, up to rounding.
pub fn draw(
    model: &Ett,
    prompts: &[Vec<Part>],
    start: i32,
    grid: (usize, usize),
    s: &Sampling,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for codes in draw_codes(model, prompts, start, grid.0 * grid.1, s, progress)?.chunks(BATCH) {
        images.extend(decode_codes(model, codes, grid)?);
    }
    Ok(images)
}

/// The codes of [`draw`], `n` for each prompt.
pub fn draw_codes(
    model: &Ett,
    prompts: &[Vec<Part>],
    start: i32,
    n: usize,
    s: &Sampling,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<i32>>> {
    s.check()?;
    if n == 0 {
        return Err(Error::arg("draw", "grid", "empty", "at least one row and one column of codes"));
    }
    let (t, total) =
        (Tape::inference(model.params.device().clone(), model.params.precision()), n * prompts.len());
    let codes = model.tokenizer.codes(&t, &model.params)?;
    let mut all = Vec::new();
    for batch in prompts.chunks(BATCH) {
        let begin = Part::context(vec![start]);
        let mut sequences: Vec<Vec<Part>> =
            batch.iter().map(|prompt| prompt.iter().chain([&begin]).cloned().collect()).collect();
        if s.is_guided() {
            // As in training where the prompt was dropped.
            sequences.resize(2 * batch.len(), vec![begin]);
        }
        let mut sequences = Continued::new(model, &t, &sequences, None, n - 1)?;
        let mut drawn = vec![Vec::new(); batch.len()];
        for i in 0..n {
            interrupt::check()?;
            let logits = model.code_logits(&t, sequences.hidden(), &codes)?.value().to_f64(t.dev())?;
            let rows: Vec<&[f64]> = logits.chunks(model.cfg.quantizer.codes).collect();
            let choose = |b: usize| {
                let number = (all.len() + b) as u32;
                let code = match rows.get(b + batch.len()) {
                    Some(without) => s.draw(&s.guide(rows[b], without), number, i as u64)?,
                    None => s.draw(rows[b], number, i as u64)?,
                };
                Ok(code as i32)
            };
            let next = (0..batch.len()).into_par_iter().map(choose).collect::<Result<Vec<_>>>()?;
            drawn.iter_mut().zip(&next).for_each(|(codes, &code): (&mut Vec<i32>, _)| codes.push(code));
            if i + 1 < n {
                sequences.codes(&next.repeat(rows.len() / batch.len()), &codes)?;
            }
            progress(n * all.len() + (i + 1) * batch.len(), total);
        }
        all.extend(drawn);
    }
    Ok(all)
}

/// The pictures (clamped) that codes stand for, row by row of `grid` (rows, columns).
pub fn decode_codes(model: &Ett, codes: &[Vec<i32>], grid: (usize, usize)) -> Result<Vec<Image>> {
    if let Some(c) = codes.iter().find(|c| c.len() != grid.0 * grid.1) {
        return Err(Error::arg(
            "decode_codes",
            "codes",
            c.len(),
            format!("{} x {} a picture", grid.0, grid.1),
        ));
    }
    if codes.is_empty() {
        return Ok(Vec::new());
    }
    let t = Tape::inference(model.params.device().clone(), model.params.precision());
    let table = model.tokenizer.codes(&t, &model.params)?;
    let zq = ops::gather(&t, &table, &indices(&t, &codes.concat())?)?;
    pictures(model, &t, &zq, &[Grid { images: codes.len(), h: grid.0, w: grid.1 }])
}
