//! What files of weights are, and what they become here.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use super::run::is_run;
use super::{
    ForeignLlm, ForeignPerceptual, ForeignTokenizer, open_inception, open_llm, open_perceptual,
    open_tokenizer, write_inception, write_llm, write_perceptual, write_tokenizer,
};
use crate::error::{Error, Result};
use crate::formats::{Archive, Encoding, Format, Selection};
use crate::io;

/// Weights of another program.
pub enum Foreign {
    /// A language model.
    Llm(ForeignLlm),
    /// A vision tokenizer.
    Tokenizer(ForeignTokenizer),
    /// The features of a perceptual loss.
    Perceptual(ForeignPerceptual),
    /// The Inception network of FID.
    Inception(Selection, Vec<String>),
}

/// Recognises the weights in a folder, a file, or several files of a perceptual loss.
pub fn recognise(paths: &[PathBuf]) -> Result<Foreign> {
    let [path] = paths else { return Ok(Foreign::Perceptual(open_perceptual(paths)?)) };
    if path.is_dir() {
        if is_run(path) {
            let what = "is a run of ett already, which a configuration names as it is; `ett export` writes it for others";
            return Err(Error::data(path, what));
        }
        return match path.join("config.json").is_file() {
            true => Ok(Foreign::Llm(open_llm(path)?)),
            false => Ok(Foreign::Tokenizer(open_tokenizer(path)?)),
        };
    }
    let archive = Archive::open(path)?;
    if archive.format() == Format::Gguf {
        return Ok(Foreign::Llm(open_llm(path)?));
    }
    let has = |part: &str| archive.tensors().keys().any(|name| name.contains(part));
    if has("encoder.conv_in.") {
        return Ok(Foreign::Tokenizer(open_tokenizer(path)?));
    }
    if has("Conv2d_1a_3x3.") {
        let (all, notes) = open_inception(path)?;
        return Ok(Foreign::Inception(all, notes));
    }
    if ["features.0.weight", "net.slice1.", "lin0.model.1."].iter().any(|part| has(part)) {
        return Ok(Foreign::Perceptual(open_perceptual(paths)?));
    }
    let what = match has("model.layers.0.") {
        true => "holds a language model without its configuration; name the folder that also has config.json",
        false => {
            "holds none of the weights that ett knows (docs/weights.md lists them); `ett inspect FILE --tensors` shows its names"
        }
    };
    Err(Error::weights(path, what))
}

impl Foreign {
    /// What it becomes here, in lines of text.
    pub fn becomes(&self) -> String {
        // Writing to a String cannot fail.
        let mut out = String::new();
        let notes = match self {
            Foreign::Llm(ForeignLlm { config: l, architecture, notes, text, .. }) => {
                let _ = writeln!(
                    out,
                    "a language model ({architecture}): {} layers, width {}, {} heads ({} of keys and values) of {}, \
                     vocabulary {}, {}, {}, {}",
                    l.layers,
                    l.width,
                    l.heads,
                    l.kv_heads,
                    l.head_dim,
                    l.vocab,
                    if l.qkv_bias { "biases" } else { "no biases" },
                    if l.tied { "head tied to the embedding" } else { "a head of its own" },
                    if text.is_some() { "with its text tokenizer" } else { "without a text tokenizer" }
                );
                notes
            }
            Foreign::Tokenizer(t) => {
                let has = |part: &str| t.weights.tensors().any(|(name, _)| name.starts_with(part));
                let (c, q) = (&t.tokenizer, &t.quantizer);
                let _ = writeln!(
                    out,
                    "a vision tokenizer: {} channels x {:?}, one token for {s}x{s} pixels, {} codes of {} dimensions, {}{}{}",
                    c.ch,
                    c.ch_mult,
                    q.codes,
                    q.dim,
                    if t.averages.is_some() {
                        "weights and their averages"
                    } else {
                        "weights without averages"
                    },
                    if has("loss.discriminator.") { ", discriminator" } else { "" },
                    if has("loss.perceptual_loss.") { ", perceptual loss" } else { "" },
                    s = c.downsampling()
                );
                &t.notes
            }
            Foreign::Perceptual(p) => {
                let heads = p.weights.tensors().any(|(name, _)| name.contains(".lin0."));
                let with = if heads { "with" } else { "without" };
                let _ = writeln!(out, "the features of a perceptual loss, {with} the heads of LPIPS");
                &p.notes
            }
            Foreign::Inception(_, notes) => {
                out.push_str("the Inception network of FID\n");
                notes
            }
        };
        for note in notes {
            let _ = writeln!(out, "  {note}");
        }
        out
    }

    /// Writes it as a configuration names it: a folder for a language model, a safetensors file for all others. Returns the
    /// key that names it, if there is one, and what was left out, in words.
    pub fn write(
        &self,
        out: &Path,
        encoding: Option<Encoding>,
    ) -> Result<(Option<&'static str>, Vec<String>)> {
        let mut notes = Vec::new();
        let key = match self {
            Foreign::Llm(llm) => {
                let text = llm.text.as_deref().map(str::as_bytes);
                write_llm(out, &llm.config, &llm.weights, text, &llm.ends, encoding)?;
                Some("init.llm")
            }
            Foreign::Tokenizer(t) => {
                notes = write_tokenizer(out, t, encoding)?;
                Some("init.tokenizer")
            }
            Foreign::Perceptual(p) => {
                write_perceptual(out, &p.weights, encoding)?;
                Some("lpips.weights")
            }
            Foreign::Inception(all, _) => {
                write_inception(out, all, encoding)?;
                None
            }
        };
        Ok((key, notes))
    }
}

/// Describes a run, a checkpoint, or weights of any format: what they hold, and what they become here.
pub fn inspect(path: &Path, all: bool) -> Result<String> {
    if path.is_dir() && !path.join("config.json").is_file() {
        let run = io::inspect(path, all);
        if run.is_ok() || path.join(io::CONFIG).is_file() {
            return run;
        }
    }
    let mut out = match path.is_dir() {
        false => io::inspect(path, all)?,
        true => files(path, all)?,
    };
    // A file of a run says more about itself than what it could become elsewhere.
    if path.is_file() && io::weights::TensorFile::open(path)?.note().is_some() {
        return Ok(out);
    }
    out += &match recognise(&[path.to_path_buf()]) {
        Ok(foreign) => foreign.becomes(),
        Err(e) => format!("not usable here: {}\n", e.reason(path)),
    };
    Ok(out)
}

/// Describes the files of weights in a folder.
fn files(folder: &Path, all: bool) -> Result<String> {
    const ENDS: [&str; 5] = ["safetensors", "bin", "ckpt", "pth", "pt"];
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        if path.extension().and_then(|e| e.to_str()).is_some_and(|e| ENDS.contains(&e)) {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() {
        return Err(Error::data(
            folder,
            "holds no weights; name a run, a file of weights or a folder with them",
        ));
    }
    found.iter().map(|path| io::inspect(path, all)).collect()
}
