//! `ett import` and `ett export`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use ett::error::Result;
use ett::exchange::{ModelOptions, export_llm, export_model, export_tokenizer, inspect, recognise};
use ett::formats::Encoding;
use ett::terminal::Output;

/// How weights are stored.
#[derive(Clone, Copy, ValueEnum)]
pub enum Type {
    /// As they are; quantized ones as f32.
    Keep,
    /// 2-byte floats with the range of f32.
    Bf16,
    /// 2-byte floats of IEEE 754.
    F16,
    /// 4-byte floats.
    F32,
}

impl Type {
    fn encoding(self) -> Option<Encoding> {
        match self {
            Type::Keep => None,
            Type::Bf16 => Some(Encoding::Bf16),
            Type::F16 => Some(Encoding::F16),
            Type::F32 => Some(Encoding::F32),
        }
    }
}

#[derive(Args)]
pub struct Import {
    /// A Hugging Face folder or a GGUF file of a language model; a .ckpt, .safetensors or folder of a vision tokenizer; .pth
    /// files of VGG16 and LPIPS; the .pth file of FID's Inception network.
    #[arg(required = true)]
    from: Vec<PathBuf>,
    /// Folder for a language model, otherwise a .safetensors file.
    #[arg(long)]
    out: PathBuf,
    /// How weights are stored.
    #[arg(long = "type", value_name = "TYPE", default_value = "keep")]
    kind: Type,
}

impl Import {
    pub fn run(self, say: &mut Output) -> Result<()> {
        let foreign = recognise(&self.from)?;
        say.put(&foreign.becomes());
        let (key, notes) = foreign.write(&self.out, self.kind.encoding())?;
        for note in notes {
            say.line(note);
        }
        // A configuration's paths are relative to its own folder.
        let out = std::path::absolute(&self.out).unwrap_or(self.out);
        let out = out.display();
        say.line(match key {
            Some(key) => format!("written to {out}; a configuration names it: {key} = \"{out}\""),
            None => format!("written to {out}"),
        });
        Ok(())
    }
}

#[derive(Subcommand)]
pub enum Export {
    /// A copy of the whole model for use, with a model card; all commands read it like a run.
    Model {
        /// Folder of a run, or one of its checkpoints.
        run: PathBuf,
        /// Folder for the copy; name it with --run.
        #[arg(long)]
        out: PathBuf,
        /// How weights are stored.
        #[arg(long = "type", value_name = "TYPE", default_value = "bf16")]
        kind: Type,
        /// Also what only training needs: discriminator and perceptual loss.
        #[arg(long)]
        training: bool,
        /// Licence of the weights, for the model card, such as apache-2.0.
        #[arg(long)]
        licence: Option<String>,
    },
    /// The language model, as a folder that transformers loads.
    Llm {
        /// Folder of a run, one of its checkpoints, or an exported model.
        run: PathBuf,
        /// Folder for the language model.
        #[arg(long)]
        out: PathBuf,
        /// How weights are stored.
        #[arg(long = "type", value_name = "TYPE", default_value = "keep")]
        kind: Type,
    },
    /// The vision tokenizer: a .safetensors file, or a .ckpt that IBQ's own code loads.
    Tokenizer {
        /// Folder of a run, one of its checkpoints, or an exported model.
        run: PathBuf,
        /// File to write; its ending chooses the format.
        #[arg(long)]
        out: PathBuf,
        /// How weights are stored in a .safetensors file.
        #[arg(long = "type", value_name = "TYPE", default_value = "keep")]
        kind: Type,
    },
}

impl Export {
    pub fn run(self, say: &mut Output) -> Result<()> {
        match self {
            Export::Model { run, out, kind, training, licence } => {
                let o = ModelOptions { encoding: kind.encoding(), training, licence };
                export_model(&run, &out, &o)?;
                say.put(&inspect(&out, false)?);
            }
            Export::Llm { run, out, kind } => {
                for file in export_llm(&run, &out, kind.encoding())? {
                    say.line(format!("written: {}", file.display()));
                }
            }
            Export::Tokenizer { run, out, kind } => {
                for note in export_tokenizer(&run, &out, kind.encoding())? {
                    say.line(note);
                }
                say.put(&inspect(&out, false)?);
            }
        }
        Ok(())
    }
}
