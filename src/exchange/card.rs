//! The card of an exported model, for people who find it without having trained it.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use crate::config::{Config, DataConfig};
use crate::data::read_text;
use crate::error::Result;
use crate::io::{History, REPORT};
use crate::nn::Params;

/// A model card in Markdown with the metadata that Hugging Face reads: what the model is, its sizes, its training, its data, its
/// results and its licences.
pub(super) fn card(
    run: &Path,
    cfg: &Config,
    (params, without): (&Params, &[&str]),
    history: &History,
    licence: Option<&str>,
) -> Result<String> {
    let name = run.file_name().unwrap_or_default().to_string_lossy();
    // Writing to a String cannot fail.
    let mut out = String::new();
    let _ = write!(
        out,
        "---\nlibrary_name: ett\npipeline_tag: image-text-to-text\nlicense: {}\ntags: [ett, vision-tokenizer, ibq]\n---\n\n\
         # {}\n\n\
         A vision tokenizer and a language model that reads its codes, trained by ett, an implementation of *End-to-End \
         Vision Tokenizer Tuning* ([arXiv 2505.10562](https://arxiv.org/abs/2505.10562)). It was trained to {}.\n\n\
         ```\nett caption --run . picture.png\nett reconstruct --run . picture.png\n\
         ett ask --run . picture.png \"what is this?\"\nett generate --run . \"a red circle\"\n```\n\n",
        licence.map_or("other".into(), yaml),
        line(&name),
        history.words()
    );
    model(&mut out, cfg, params, without);
    training(&mut out, cfg);
    data(&mut out, cfg);
    results(&mut out, &run.join(REPORT))?;
    let _ = write!(
        out,
        "## Licences\n\nThe weights: {}. The licences of the weights that training started from and of its data apply to them, \
         too. ett itself: MIT or Apache-2.0.\n\n## Configuration\n\n`config.toml` has every value of the training, without \
         paths.\n",
        licence.map_or("not stated".into(), line)
    );
    Ok(out)
}

/// A text without line breaks and without what Markdown would read as markup.
fn line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() || "`|<>*[]".contains(c) { ' ' } else { c }).collect()
}

/// A text as a quoted value of YAML.
fn yaml(text: &str) -> String {
    Value::from(line(text)).to_string()
}

fn model(out: &mut String, cfg: &Config, params: &Params, without: &[&str]) {
    let (t, q, l) = (&cfg.tokenizer, &cfg.quantizer, &cfg.llm);
    let side = t.downsampling();
    let _ = write!(
        out,
        "## Model\n\n| part | |\n| --- | --- |\n\
         | tokenizer | {} channels x {:?}, one token for {side}x{side} pixels |\n\
         | codebook | {} codes of {} dimensions |\n\
         | language model | {} layers, width {}, {} heads ({} of keys and values) of {}, vocabulary {} |\n\
         | visual input | {} |\n",
        t.ch,
        t.ch_mult,
        q.codes,
        q.dim,
        l.layers,
        l.width,
        l.heads,
        l.kv_heads,
        l.head_dim,
        l.vocab,
        match cfg.train.arm {
            crate::config::Arm::Index => "a table of embeddings of the codes",
            _ => "the codes through a projector",
        }
    );
    for (group, name) in params.groups().into_iter().enumerate() {
        let n = params.count(group);
        if n > 0 && !without.contains(&name) {
            let _ = writeln!(out, "| parameters of `{name}` | {n} |");
        }
    }
    out.push('\n');
}

fn training(out: &mut String, cfg: &Config) {
    out.push_str("## Training\n\n");
    let named = |path: &Option<std::path::PathBuf>| {
        path.as_ref().map(|p| line(&p.file_name().unwrap_or(p.as_os_str()).to_string_lossy()))
    };
    let init = [("language model", named(&cfg.init.llm)), ("vision tokenizer", named(&cfg.init.tokenizer))];
    for (what, from) in init {
        if let Some(name) = from {
            let _ = writeln!(out, "- The {what} started from the weights in `{name}`.");
        }
    }
    if cfg.init.llm.is_none() && cfg.init.tokenizer.is_none() {
        out.push_str("- The configuration names no weights that training started from.\n");
    }
    let features =
        named(&cfg.lpips.weights).map_or("random features".into(), |n| format!("the features of `{n}`"));
    let _ =
        writeln!(out, "- The perceptual loss used {features}.\n\n| stage | steps | batch | learning rate |");
    out.push_str("| --- | --- | --- | --- |\n");
    for s in &cfg.stage {
        let lr = s.lr.unwrap_or(cfg.train.lr);
        let _ = writeln!(out, "| {} | {} | {} | {lr:e} |", s.kind.name(), s.steps, s.batch);
    }
    out.push('\n');
}

fn data(out: &mut String, cfg: &Config) {
    out.push_str("## Data\n\n");
    let mut told = Vec::new();
    let all = cfg.stage.iter().map(|s| cfg.data_of(s)).chain([cfg.data.clone()]);
    for data in all {
        let text = sources(&data);
        if !told.contains(&text) {
            out.push_str(&text);
            told.push(text);
        }
    }
    out.push('\n');
}

/// The sources of the data of a stage by name, without their folders.
fn sources(data: &DataConfig) -> String {
    let mut out = String::new();
    for part in data.parts() {
        let file = line(&part.train.file_name().unwrap_or_default().to_string_lossy());
        let file = if file.is_empty() { String::new() } else { format!(" `{file}`") };
        let share = if data.mix.is_empty() { String::new() } else { format!(", weight {}", part.weight) };
        let (source, size) = (part.source.name(), data.size);
        let _ = writeln!(out, "- {source}{file}, pictures of {size}x{size}{share}");
    }
    out
}

/// The held-out results of the run, if it has any.
fn results(out: &mut String, path: &Path) -> Result<()> {
    if !path.is_file() {
        out.push_str("## Results\n\nNone on held-out data were stored with the run.\n\n");
        return Ok(());
    }
    let all: Value = serde_json::from_str(&read_text(path)?).unwrap_or_default();
    out.push_str(
        "## Results\n\nOn held-out data, as `ett eval` measures them.\n\n| result | value |\n| --- | --- |\n",
    );
    rows(out, "", &all);
    out.push('\n');
    Ok(())
}

/// The numbers and texts of a JSON object as rows of a table, lists left out.
fn rows(out: &mut String, name: &str, value: &Value) {
    match value {
        Value::Object(all) => {
            for (key, value) in all {
                let name = if name.is_empty() { key.clone() } else { format!("{name}, {key}") };
                rows(out, &name, value);
            }
        }
        Value::Number(n) => {
            let n = n.as_f64().filter(|v| v.fract() != 0.0).map_or(n.to_string(), |v| format!("{v:.4}"));
            let _ = writeln!(out, "| {} | {n} |", line(&name.replace('_', " ")));
        }
        Value::String(text) => {
            let _ = writeln!(out, "| {} | {} |", line(&name.replace('_', " ")), line(text));
        }
        _ => {}
    }
}
