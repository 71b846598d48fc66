//! Pictures from prompts: codes are sampled one by one, then decoded by the tokenizer.

use super::continued::{Continued, indices};
use super::{Sampling, pictures};
use crate::autograd::{Tape, Var};
use crate::backend::{CountUp, DType, PutRows, Role, Stream};
use crate::data::Image;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Part};
use crate::ops;
use crate::tensor::Tensor;

/// Pictures drawn at a time, which bounds the size of the cache.
const BATCH: usize = 16;
/// Steps between two waits for the device, which bound the work that is enqueued when a run is interrupted.
const AHEAD: usize = 16;

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
    for codes in draw_codes(model, prompts, start, grid.0 * grid.1, s, true, progress)?.chunks(BATCH) {
        images.extend(decode_codes(model, codes, grid)?);
    }
    Ok(images)
}

/// The codes of [`draw`], `n` for each prompt. With `recorded`, a device that can record a step replays it for every code;
/// the codes are the same.
pub fn draw_codes(
    model: &Ett,
    prompts: &[Vec<Part>],
    start: i32,
    n: usize,
    s: &Sampling,
    recorded: bool,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Vec<i32>>> {
    s.check()?;
    if n == 0 {
        return Err(Error::arg("draw", "grid", "empty", "at least one row and one column of codes"));
    }
    let t = Tape::inference(model.params.device().clone(), model.params.precision());
    let codes = model.tokenizer.table(&t, &model.params)?;
    let mut all = Vec::new();
    for batch in prompts.chunks(BATCH) {
        let mut drawing = Drawing::new(model, &t, &codes, batch, start, all.len(), n, s)?;
        let mut recording = None;
        for i in 0..n {
            interrupt::check()?;
            // The step before the recorded one makes what all steps share.
            if i == 2 && recorded {
                recording = t.dev().record(&mut || drawing.step())?;
            }
            match &recording {
                _ if i == 0 => drawing.choose()?,
                None => drawing.step()?,
                Some(recording) => recording.replay()?,
            }
            if i % AHEAD == AHEAD - 1 {
                t.dev().read_later(Stream::COMPUTE, drawing.next.view())?.wait()?;
            }
            progress(n * all.len() + (i + 1) * batch.len(), n * prompts.len());
        }
        let drawn = Sampling::chosen(t.dev(), &drawing.drawn)?;
        all.extend((0..batch.len()).map(|b| drawn.iter().skip(b).step_by(batch.len()).copied().collect()));
    }
    Ok(all)
}

/// B pictures being drawn. All that changes from code to code is on the device, so that a step can be recorded.
struct Drawing<'a> {
    model: &'a Ett,
    tape: &'a Tape,
    codes: &'a Var,
    sampling: &'a Sampling,
    /// The prompts; if the drawing is guided, followed by as many sequences without one.
    sequences: Continued<'a>,
    /// Sequences per picture.
    copies: usize,
    /// `[B]` i32 numbers of the pictures and positions of the next codes, which identify random numbers.
    number: Tensor,
    position: Tensor,
    /// `[B]` i32 the codes chosen last.
    next: Tensor,
    /// `[n, B]` i32 all codes, and the row `[1]` i32 that the next ones go to.
    drawn: Tensor,
    row: Tensor,
}

impl<'a> Drawing<'a> {
    /// Pictures of `n` codes; `first` is the number of the first one.
    #[allow(clippy::too_many_arguments)]
    fn new(
        model: &'a Ett,
        tape: &'a Tape,
        codes: &'a Var,
        prompts: &[Vec<Part>],
        start: i32,
        first: usize,
        n: usize,
        sampling: &'a Sampling,
    ) -> Result<Self> {
        let (b, begin) = (prompts.len(), Part::context(vec![start]));
        let copies = if sampling.is_guided() { 2 } else { 1 };
        let mut sequences: Vec<Vec<Part>> =
            prompts.iter().map(|prompt| prompt.iter().chain([&begin]).cloned().collect()).collect();
        // As in training when the prompt is dropped.
        sequences.resize(copies * b, vec![begin]);
        let number: Vec<i32> = (first as i32..).take(b).collect();
        let zeros = || indices(tape, &vec![0; b]);
        Ok(Drawing {
            model,
            tape,
            codes,
            sampling,
            sequences: Continued::new(model, tape, &sequences, None, n - 1)?,
            copies,
            number: indices(tape, &number)?,
            position: zeros()?,
            next: zeros()?,
            drawn: Tensor::empty(tape.dev(), Role::Activation, DType::I32, [n, b])?,
            row: indices(tape, &[0])?,
        })
    }

    /// Chooses the next code of each picture.
    fn choose(&self) -> Result<()> {
        let dev = self.tape.dev();
        let logits = self.model.code_logits(self.tape, self.sequences.hidden(), self.codes)?;
        self.sampling.choose_into(dev, logits.value(), &self.number, &self.position, &self.next)?;
        let next = self.next.reshape([1, self.next.dims().numel()])?;
        let put = PutRows { x: next.view(), idx: self.row.view(), y: self.drawn.acc() };
        dev.put_rows(Stream::COMPUTE, &put)?;
        dev.count_up(Stream::COMPUTE, &CountUp { x: self.row.acc(), norm: None })
    }

    /// Appends the codes chosen last and chooses the next ones.
    fn step(&mut self) -> Result<()> {
        self.sequences.codes(&self.next, self.codes, self.copies)?;
        self.choose()
    }
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
