//! The evaluation at the end of a run: held-out results, pictures above their reconstructions, captions and answers
//! beside the truth, and drawn pictures.

use std::fmt::Write;
use std::path::Path;

use crate::data::{DataSet, Drawn, Image, grid, save_png};
use crate::error::{Error, Result};
use crate::feed::Template;
use crate::files;
use crate::infer::{Sampling, Seen, draw, reconstruct};
use crate::io::REPORT;
use crate::model::{Ett, Part};
use crate::report::{Report, plots};

/// Number of pictures shown with their reconstructions, and per row.
const SHOWN: usize = 16;
const ROW: usize = 8;
/// Number of pictures with captions and answers.
const DESCRIBED: usize = 8;
/// Maximum number of questions about each of them.
const QUESTIONS: usize = 5;
/// Number of drawn prompts.
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
    let report = super::evaluate(model, test, template, &drawn)?;
    let shown = show(model, test, template, &drawn, &report, out);
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
    report: &Report,
    out: &Path,
) -> Result<()> {
    let path = out.join("reconstructions.png");
    super::with_averages(model, |model| reconstructions(model, drawn, &path))?;
    if report.captions + report.questions > 0 {
        held_out(model, test, template, drawn, &out.join("held-out.md"))?;
    }
    if report.codes.is_some() {
        drawings(model, test, template, drawn, &out.join("drawings.png"))?;
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
        captions.extend(s.caption.iter().map(|c| (k, "caption", c.as_str(), template.picture(k))));
        for (q, a) in s.qa.iter().take(QUESTIONS) {
            answers.push((k, q.as_str(), a.as_str(), template.question(Some(k), q)?));
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

/// Pictures drawn for held-out prompts.
fn drawings(model: &Ett, test: &DataSet, template: &Template, drawn: &[Drawn], path: &Path) -> Result<()> {
    let prompts: Vec<&str> =
        drawn.iter().filter_map(|d| test.samples[d.sample].drawing_prompt()).take(DRAWN).collect();
    let tokens = model.cfg.data.size / model.cfg.tokenizer.downsampling();
    let texts: Vec<Vec<Part>> =
        prompts.iter().map(|p| Ok(vec![Part::context(template.drawing(p)?)])).collect::<Result<_>>()?;
    let sampling = Sampling { seed: model.cfg.train.seed, ..Sampling::default() };
    let grid = (tokens, tokens);
    let pictures = draw(model, &texts, template.begin_picture(), grid, &sampling, &mut |_, _| ())?;
    let labelled: Vec<(Image, String)> =
        pictures.into_iter().zip(prompts.iter().map(|p| p.to_string())).collect();
    let rows: Vec<Vec<(Image, String)>> = labelled.chunks(ROW / 2).map(<[_]>::to_vec).collect();
    plots::labelled_grid(&rows, path)
}
