//! The evaluation at the end of a run: held-out results, pictures above their reconstructions, captions and answers
//! beside the truth, and drawn pictures.

use std::fmt::Write;
use std::path::Path;

use crate::data::{Drawn, Image, Scene, grid, look, save_png};
use crate::error::{Error, Result};
use crate::feed::{DataSet, Template};
use crate::files;
use crate::infer::{Sampling, Seen, draw, reconstruct};
use crate::io::REPORT;
use crate::model::{Ett, Part};
use crate::report::{self, Pair, Report, plots};

/// Number of pictures shown with their reconstructions, and per row.
const SHOWN: usize = 16;
const ROW: usize = 8;
/// Number of pictures with captions and answers.
const DESCRIBED: usize = 8;
/// Maximum number of questions about each of them.
const QUESTIONS: usize = 5;
/// Number of drawings that are shown.
const DRAWN: usize = 8;
/// Maximum number of tokens of a caption or an answer.
const MAX_TOKENS: usize = 96;

/// Evaluates a model on held-out samples and writes `reconstructions.png`, `held-out.md` (if there are captions or
/// questions), `drawings.png` (if the model draws) and finally `eval.json` into `out`. If one of the other files cannot
/// be written, `eval.json` is still written before the error is returned.
pub fn closing(model: &mut Ett, test: &DataSet, template: &Template, out: &Path) -> Result<Report> {
    let path = out.join(REPORT);
    files::probe(&path)?;
    let drawn = super::held_out(test, model.cfg.data.eval_samples)?;
    let mut report = super::evaluate(model, test, template, &drawn)?;
    let drawings = match report.codes {
        Some(_) => drawings(model, test, template, &drawn)?,
        None => vec![],
    };
    report.drawings = looked_at(&drawings);
    let shown = show(model, test, template, &drawn, &drawings, &report, out);
    if let Err(Error::Interrupted) = shown {
        return Err(Error::Interrupted);
    }
    let json = serde_json::to_string_pretty(&report)
        .map_err(|e| Error::data(&path, format!("cannot be written ({e})")))?;
    files::replace(&path, |f| f.put(json.as_bytes()))?;
    shown.map(|()| report)
}

/// Writes the files beside the numbers.
fn show(
    model: &mut Ett,
    test: &DataSet,
    template: &Template,
    drawn: &[Drawn],
    drawings: &[Drawing],
    report: &Report,
    out: &Path,
) -> Result<()> {
    let path = out.join("reconstructions.png");
    super::with_averages(model, |model| reconstructions(model, drawn, &path))?;
    if report.captions + report.questions > 0 {
        held_out(model, test, template, drawn, &out.join("held-out.md"))?;
    }
    if !drawings.is_empty() {
        let shown = drawings.iter().take(DRAWN).map(|d| (d.image.clone(), d.prompt.to_string()));
        let rows: Vec<Vec<_>> = shown.collect::<Vec<_>>().chunks(ROW / 2).map(<[_]>::to_vec).collect();
        plots::labelled_grid(&rows, &out.join("drawings.png"))?;
    }
    Ok(())
}

/// Originals above their reconstructions.
fn reconstructions(model: &Ett, drawn: &[Drawn], path: &Path) -> Result<()> {
    let images: Vec<Image> = drawn.iter().take(SHOWN).map(|d| d.image.clone()).collect();
    let (rec, _) = reconstruct(model, &images)?;
    let rows: Vec<Vec<&Image>> = images
        .chunks(ROW)
        .zip(rec.chunks(ROW))
        .flat_map(|(a, b)| [a.iter().collect::<Vec<_>>(), b.iter().collect()])
        .collect();
    save_png(path, &grid(&rows, 2)?)
}

/// Captions and answers of the model beside the true ones.
fn held_out(model: &Ett, test: &DataSet, template: &Template, drawn: &[Drawn], path: &Path) -> Result<()> {
    let shown = &drawn[..drawn.len().min(DESCRIBED)];
    let images: Vec<Image> = shown.iter().map(|d| d.image.clone()).collect();
    let seen = Seen::new(model, &images)?;
    let text = template.tokenizer();
    // (picture, question, truth, prompt)
    let (mut captions, mut answers) = (Vec::new(), Vec::new());
    for (k, d) in shown.iter().enumerate() {
        let s = &test.samples[d.sample];
        captions.extend(s.caption().map(|c| (k, "caption", c, template.picture(k))));
        for ((q, a), chat) in s.questions().zip(s.openings()).take(QUESTIONS) {
            answers.push((k, q, a, template.opening(k, &chat, q)?));
        }
    }
    let mut rows: Vec<(usize, &str, &str, String)> = Vec::new();
    for (list, stop) in [(captions, template.end_of_text()), (answers, template.end_of_turn())] {
        let prompts: Vec<Vec<Part>> = list.iter().map(|l| l.3.clone()).collect();
        let said = seen.complete_all(&prompts, stop, MAX_TOKENS)?;
        rows.extend(list.iter().zip(said).map(|(l, ids)| (l.0, l.1, l.2, text.decode(&ids))));
    }
    // Captions before answers, picture by picture.
    rows.sort_by_key(|r| r.0);
    let cell = |s: &str| s.replace('|', "\\|").replace('\n', " ");
    let mut md =
        String::from("| held-out picture | | the model says | the truth |\n| --- | --- | --- | --- |\n");
    for (k, asked, truth, said) in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(md, "| {} | {} | {} | {} |", k + 1, cell(asked), cell(&said), cell(truth));
    }
    files::replace(path, |f| f.put(md.as_bytes()))?;
    Ok(())
}

/// A picture drawn for a held-out prompt.
struct Drawing<'a> {
    prompt: &'a str,
    /// What the prompt asks for, if its picture is a built-in one.
    scene: Option<&'a Scene>,
    image: Image,
}

/// Draws the first held-out prompts: those that are shown, and of built-in pictures as many as are looked at.
fn drawings<'a>(
    model: &Ett,
    test: &'a DataSet,
    template: &Template,
    drawn: &[Drawn],
) -> Result<Vec<Drawing<'a>>> {
    let data = &model.cfg.data;
    let asked = drawn.iter().filter_map(|d| {
        let sample = &test.samples[d.sample];
        Some((sample.drawing_prompt()?, sample.scene.as_ref()))
    });
    let asked: Vec<_> = asked
        .enumerate()
        .take_while(|(i, (_, scene))| *i < DRAWN || scene.is_some() && *i < data.eval_drawings)
        .map(|(_, asked)| asked)
        .collect();
    let tokens = data.size / model.cfg.tokenizer.downsampling();
    let texts: Vec<Vec<Part>> =
        asked.iter().map(|(p, _)| Ok(vec![Part::context(template.drawing(p)?)])).collect::<Result<_>>()?;
    let sampling = Sampling::of(&model.cfg.sampling, model.cfg.train.seed);
    let grid = (tokens, tokens);
    let images = draw(model, &texts, template.begin_picture(), grid, &sampling, &mut |_, _| ())?;
    Ok(asked
        .into_iter()
        .zip(images)
        .map(|((prompt, scene), image)| Drawing { prompt, scene, image })
        .collect())
}

/// What the drawings of built-in scenes show.
fn looked_at(drawings: &[Drawing]) -> Vec<report::Drawn> {
    let pictures: Vec<_> = drawings.iter().filter_map(|d| Some((d.scene?, &d.image))).collect();
    if pictures.len() < 2 {
        // Each is compared with the prompt of another one.
        return vec![];
    }
    let share = |n: usize, of: usize| n as f64 / of as f64;
    look(&pictures)
        .into_iter()
        .map(|(aspect, l)| report::Drawn {
            aspect: aspect.name(),
            drawings: l.pictures,
            right: Pair { seen: share(l.own, l.pictures), other: share(l.other, l.pictures) },
        })
        .collect()
}
