//! Pictures from prompts: codes are sampled one by one, then decoded by the tokenizer.

use super::continued::{Continued, indices};
use super::{Sampling, pictures};
use crate::autograd::Tape;
use crate::data::Image;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::ops;

/// Pictures drawn at a time, which bounds the size of the cache.
const BATCH: usize = 16;

/// Draws a picture of `grid` (rows, columns) codes for each prompt, which holds text only; `start` is the id of
/// `<|vision_start|>`, which is appended to the prompt. `progress` is called with the number of codes drawn and the
/// total. Picture i is a function of the model, its prompt, `s` and i only, up to rounding.
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
    let codes = model.tokenizer.table(&t, &model.params)?;
    let mut all = Vec::new();
    for batch in prompts.chunks(BATCH) {
        let begin = Part::context(vec![start]);
        let mut sequences: Vec<Vec<Part>> =
            batch.iter().map(|prompt| prompt.iter().chain([&begin]).cloned().collect()).collect();
        if s.is_guided() {
            // As in training when the prompt is dropped.
            sequences.resize(2 * batch.len(), vec![begin]);
        }
        let mut sequences = Continued::new(model, &t, &sequences, None, n - 1)?;
        let number: Vec<i32> = (all.len() as i32..).take(batch.len()).collect();
        let (number, position) = (indices(&t, &number)?, indices(&t, &vec![0; batch.len()])?);
        // The codes stay on the device until all are drawn.
        let mut drawn = Vec::with_capacity(n);
        for i in 0..n {
            interrupt::check()?;
            let logits = model.code_logits(&t, sequences.hidden(), &codes)?;
            let next = s.choose(t.dev(), logits.value(), &number, &position)?;
            if i + 1 < n {
                sequences.codes(&next, &codes, logits.dims().rows() / batch.len())?;
            }
            drawn.push(next);
            progress(n * all.len() + (i + 1) * batch.len(), total);
        }
        let drawn = drawn.iter().map(|next| Sampling::chosen(t.dev(), next)).collect::<Result<Vec<_>>>()?;
        all.extend((0..batch.len()).map(|b| drawn.iter().map(|next| next[b]).collect()));
    }
    Ok(all)
}

/// The clamped pictures of codes, given row by row of `grid` (rows, columns).
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
    let table = model.tokenizer.table(&t, &model.params)?;
    let zq = ops::gather(&t, &table, &indices(&t, &codes.concat())?)?;
    pictures(model, &t, &zq, &[Grid { images: codes.len(), h: grid.0, w: grid.1 }])
}
