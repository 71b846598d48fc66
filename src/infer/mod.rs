//! Use of a trained model: reconstructions, captions, answers and drawings.

mod continued;
mod draw;
mod sample;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::autograd::{Tape, Var};
use crate::backend::{Kernels, Role};
use crate::data::{Crop, Image, Special, fit, fit_multiple, trimmed};
use crate::error::{Error, Result};
use crate::feed::{Batch, Template, images_to_device};
use crate::formats::Selection;
use crate::interrupt;
use crate::io::weights::{Fit, TensorFile, load_averages, load_selection};
use crate::io::{EMA, History, Skill, WEIGHTS, load_weights, model_folder, run_config};
use crate::model::tokenizer::Grid;
use crate::model::{Ett, Packed, Part};
use crate::ops;
use crate::rng::Philox;
use crate::tensor::Tensor;
pub use continued::Continued;
pub use draw::{decode_codes, draw, draw_codes};
pub use sample::Sampling;

/// Rows of logits held at a time.
const ROWS: usize = 1024;

/// Maximum number of tokens of a caption or an answer.
const MAX_TOKENS: usize = 128;

/// A trained model, ready for use.
pub struct Trained {
    /// The model.
    pub model: Ett,
    pub(crate) template: Template,
    history: Option<History>,
    /// File of the averages of weights, if the run kept them and they are not in use.
    averages: Option<PathBuf>,
}

impl Trained {
    /// Loads the model of a run folder, a checkpoint or an exported folder; for an unfinished run, its
    /// last checkpoint. With `ema`, the averages replace the weights of the groups for which the run kept them.
    pub fn open(run: &Path, dev: Arc<dyn Kernels>, ema: bool) -> Result<Self> {
        let folder = model_folder(run)?;
        let cfg = run_config(&folder)?;
        let (template, text) = Template::of(&cfg)?;
        let weights = folder.join(WEIGHTS);
        let file = TensorFile::open(&weights)?;
        let history = History::of(&file);
        if let Some(history) = &history {
            history.check_text(&text, &cfg, &folder)?;
        }
        let held = file.tensors();
        let model = Ett::without(&cfg, dev, &|name| held.contains_key(name))?;
        load_weights(&model.params, &weights)?;
        let averages = folder.join(EMA);
        let averages = averages.exists().then_some(averages);
        if ema {
            let Some(path) = &averages else {
                let what = format!("holds no {EMA}; leave --ema out, or train with `ema = true` in a stage");
                return Err(Error::data(folder, what));
            };
            let averages = Selection::whole(TensorFile::open(path)?.into_archive());
            let wanted = |name: &str| averages.dims(name).is_some();
            load_selection(&model.params, &averages, Fit { wanted: &wanted, ..Fit::EXACT })?;
        }
        let averages = averages.filter(|_| !ema);
        Ok(Trained { model, template, history, averages })
    }

    /// Loads the run's averages in addition to the weights, for an evaluation as during training.
    pub(crate) fn keep_averages(&mut self) -> Result<()> {
        let Some(path) = self.averages.take() else { return Ok(()) };
        load_averages(&mut self.model.params, &path)
    }

    /// A warning if no stage has trained the model for this skill; `None` if one has, or if the weights hold no
    /// history.
    pub fn lacks(&self, skill: Skill) -> Option<String> {
        self.history.as_ref()?.lacks(skill)
    }

    /// The picture as in training: shorter side resized, centre crop.
    fn square(&self, image: &Image) -> Result<Image> {
        fit(image, self.model.cfg.data.size, Crop::Centre, false, &mut Philox::new(0, 0))
    }

    fn say(&self, image: &Image, prompt: &[Part], stop: Special) -> Result<String> {
        let seen = Seen::new(&self.model, &[self.square(image)?])?;
        let text = self.template.tokenizer();
        let said = seen.complete_all(&[prompt.to_vec()], text.special(stop), MAX_TOKENS)?;
        Ok(text.decode(&said.concat()))
    }

    /// A user's text as training would see it: without surrounding whitespace and byte order marks. Fails if it is
    /// longer than the limit, where training would truncate it.
    fn whole<'a>(&self, what: &'static str, text: &'a str) -> Result<&'a str> {
        let text = trimmed(text);
        if self.template.is_cut(text)? {
            let want = format!("at most {} (data.max_text_tokens)", self.template.max_text_tokens());
            let got = format!("{} tokens long", self.template.tokenizer().encode(text)?.len());
            return Err(Error::arg("use", what, got, want));
        }
        Ok(text)
    }

    /// Describes a picture.
    pub fn caption(&self, image: &Image) -> Result<String> {
        self.say(image, &self.template.picture(0), Special::EndOfText)
    }

    /// Answers a question about a picture.
    pub fn ask(&self, image: &Image, question: &str) -> Result<String> {
        let question = self.whole("question", question)?;
        self.say(image, &self.template.question(Some(0), question)?, Special::ImEnd)
    }

    /// The settings of the model's configuration for drawings, with the default seed.
    pub fn sampling(&self) -> Sampling {
        Sampling::of(&self.model.cfg.sampling, Sampling::default().seed)
    }

    /// Draws a picture of the training size for each prompt; see [`draw`].
    pub fn draw(
        &self,
        prompts: &[String],
        s: &Sampling,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Image>> {
        let text = |p: &String| {
            let prompt = self.whole("prompt", p)?;
            Ok(vec![Part::context(self.template.drawing(prompt)?)])
        };
        let prompts = prompts.iter().map(text).collect::<Result<Vec<_>>>()?;
        let start = self.template.tokenizer().special(Special::VisionStart);
        let side = self.model.cfg.data.size / self.model.cfg.tokenizer.downsampling();
        draw(&self.model, &prompts, start, (side, side), s, progress)
    }

    /// The picture resized to the nearest size that the tokenizer takes, with the longer side at most `max_side`, and
    /// its reconstruction.
    pub fn reconstruct(&self, image: &Image, max_side: usize) -> Result<(Image, Image)> {
        let least = self.model.cfg.tokenizer.downsampling();
        let fitted = fit_multiple(image, max_side, least)?;
        let (rec, _) = reconstruct(&self.model, std::slice::from_ref(&fitted))?;
        match rec.into_iter().next() {
            Some(rec) => Ok((fitted, rec)),
            None => Err(Error::arg("reconstruct", "image", "empty", "at least one pixel")),
        }
    }
}

/// Pictures encoded for the language model.
pub struct Seen<'a> {
    model: &'a Ett,
    tape: Tape,
    visual: Var,
    idx: Tensor,
    grids: Vec<Grid>,
}

impl<'a> Seen<'a> {
    /// Encodes pictures of equal size.
    pub fn new(model: &'a Ett, images: &[Image]) -> Result<Self> {
        let tape = Tape::inference(model.params.device().clone(), model.params.precision());
        let (zq, idx, grids) = encode(model, &tape, images)?;
        let visual = model.visual_rows(&tape, &zq, &idx)?;
        Ok(Seen { model, tape, visual, idx, grids })
    }

    /// Without pictures, for text only.
    pub fn nothing(model: &'a Ett) -> Result<Self> {
        let tape = Tape::inference(model.params.device().clone(), model.params.precision());
        let dims = [0, model.cfg.llm.width];
        let empty = tape.constant(tape.act(dims)?);
        let idx = Tensor::from_host::<i32>(tape.dev(), Role::Input, &[], [0])?;
        Ok(Seen { model, tape, visual: empty, idx, grids: vec![] })
    }

    /// The hidden states that predict the supervised tokens of `sequences`, and their batch.
    fn selected(&self, sequences: &[Vec<Part>]) -> Result<(Var, Packed)> {
        let packed = Batch::pack(self.model, sequences, &self.grids, 1)?;
        let hidden = self.model.hidden(&self.tape, Some(&self.visual), &packed)?;
        Ok((ops::gather(&self.tape, &hidden, &packed.select)?, packed))
    }

    /// Total nats of all supervised tokens, and their number.
    pub fn nats(&self, sequences: &[Vec<Part>]) -> Result<(f64, usize)> {
        if sequences.is_empty() {
            return Ok((0.0, 0));
        }
        let (rows, packed) = self.selected(sequences)?;
        let (t, n) = (&self.tape, rows.dims().rows());
        let one = Tensor::from_f64(t.dev(), Role::Input, t.precision().acc, &[1.0], [1])?;
        let mut nats = 0.0;
        for start in (0..n).step_by(ROWS) {
            let len = ROWS.min(n - start);
            let logits = self.model.text_logits(t, &t.constant(rows.value().rows(start, len)?))?;
            let loss = ops::cross_entropy(t, &logits, &packed.target.range(start, len)?, None, &one)?;
            nats += loss.value().to_f64(t.dev())?[0];
        }
        Ok((nats, n))
    }

    /// Total nats of all codes that `sequences` predict, and their number.
    pub fn code_nats(&self, sequences: &[Vec<Part>]) -> Result<(f64, usize)> {
        if sequences.is_empty() {
            return Ok((0.0, 0));
        }
        let packed = Batch::pack(self.model, sequences, &self.grids, 1)?;
        let hidden = self.model.hidden(&self.tape, Some(&self.visual), &packed)?;
        let acc = self.model.params.precision().acc;
        let one = Tensor::from_f64(self.tape.dev(), Role::Input, acc, &[1.0], [1])?;
        let loss = self.model.code_loss(&self.tape, &hidden, &packed, &self.idx, &one)?;
        Ok((loss.value().to_f64(self.tape.dev())?[0], packed.code_rows.dims().numel()))
    }

    /// The most likely token at each supervised position, sequence by sequence.
    fn likeliest(&self, sequences: &[Vec<Part>]) -> Result<(Vec<i32>, Packed)> {
        let (rows, packed) = self.selected(sequences)?;
        let logits = self.model.text_logits(&self.tape, &rows)?;
        let best = Sampling::greedy(&self.tape, logits.value())?;
        Ok((best.to_host::<i32>(self.tape.dev())?, packed))
    }

    /// For each sequence, whether every supervised token is the most likely one, that is, whether greedy decoding
    /// would produce exactly these tokens.
    pub fn exact(&self, sequences: &[Vec<Part>]) -> Result<Vec<bool>> {
        if sequences.is_empty() {
            return Ok(vec![]);
        }
        let (best, packed) = self.likeliest(sequences)?;
        let target = packed.target.to_host::<i32>(self.tape.dev())?;
        let mut hits = best.iter().zip(&target).map(|(a, b)| a == b);
        let right = |s: &Vec<Part>| {
            let supervised = s.iter().map(|p| match p {
                Part::Tokens { ids, supervised: true } => ids.len(),
                _ => 0,
            });
            hits.by_ref().take(supervised.sum()).filter(|hit| !hit).count() == 0
        };
        Ok(sequences.iter().map(right).collect())
    }

    /// Continues sequences greedily, each until `stop` or `max` tokens; the stop token is left out.
    pub fn complete_all(&self, prompts: &[Vec<Part>], stop: i32, max: usize) -> Result<Vec<Vec<i32>>> {
        let mut said = vec![Vec::new(); prompts.len()];
        if prompts.is_empty() || max == 0 {
            return Ok(said);
        }
        let (t, visual) = (&self.tape, Some((&self.visual, &self.grids[..])));
        let mut sequences = Continued::new(self.model, t, prompts, visual, max - 1)?;
        let mut open = vec![true; prompts.len()];
        let zeros = vec![0; prompts.len()];
        let (number, position) = (continued::indices(t, &zeros)?, continued::indices(t, &zeros)?);
        for i in 0..max {
            interrupt::check()?;
            let logits = self.model.text_logits(t, sequences.hidden())?;
            let best = Sampling::GREEDY.choose(t.dev(), logits.value(), &number, &position)?;
            let next = Sampling::chosen(t.dev(), &best)?;
            for ((said, open), &id) in said.iter_mut().zip(&mut open).zip(&next) {
                *open &= id != stop;
                said.extend(open.then_some(id));
            }
            if i + 1 == max || !open.contains(&true) {
                break;
            }
            // Sequences that have ended are continued too, but their tokens are ignored.
            sequences.tokens(&best)?;
        }
        Ok(said)
    }
}

fn encode(model: &Ett, t: &Tape, images: &[Image]) -> Result<(Var, Tensor, Vec<Grid>)> {
    let (x, _) = images_to_device(model, images)?;
    let (z, grids) = model.tokenizer.encode(t, &model.params, &[t.constant(x)])?;
    let codes = model.tokenizer.codes(t, &model.params)?;
    let (zq, idx, bad) = model.look_up(t, &z, &codes)?;
    let bad = bad.to_f64(t.dev())?[0];
    if bad > 0.0 {
        return Err(Error::arg(
            "encode",
            "images",
            format!("encoded into {bad} tokens without a finite score for any code"),
            "finite weights of the encoder and the codebook",
        ));
    }
    Ok((zq, idx, grids))
}

/// Clamped reconstructions and codes of pictures of equal size.
pub fn reconstruct(model: &Ett, images: &[Image]) -> Result<(Vec<Image>, Vec<i32>)> {
    let dev = model.params.device().clone();
    let t = Tape::inference(dev.clone(), model.params.precision());
    let (zq, idx, grids) = encode(model, &t, images)?;
    Ok((pictures(model, &t, &zq, &grids)?, idx.to_host::<i32>(&*dev)?))
}

/// The clamped pictures decoded from `zq` `[M, D]`.
fn pictures(model: &Ett, t: &Tape, zq: &Var, grids: &[Grid]) -> Result<Vec<Image>> {
    let mut out = Vec::new();
    for (rec, g) in model.tokenizer.decode(t, &model.params, zq, grids)?.iter().zip(grids) {
        let s = model.cfg.tokenizer.downsampling();
        let (height, width) = (g.h * s, g.w * s);
        for c in rec.value().to_f64(t.dev())?.chunks(height * width * 3) {
            let pixels = c.iter().map(|&v| v.clamp(-1.0, 1.0) as f32).collect();
            out.push(Image { height, width, pixels });
        }
    }
    Ok(out)
}
