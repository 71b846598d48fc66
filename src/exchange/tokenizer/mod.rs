//! IBQ's vision tokenizers.

mod layout;
mod saved;
mod settings;
mod source;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use super::named::{Named, Shape, no_problems, tensors};
use super::perceptual::{PREFIX as LPIPS, heads, scaling, vgg, widths};
use crate::config::{DiscriminatorConfig, QuantizerConfig, TokenizerConfig};
use crate::error::{Error, Result};
use crate::formats::{Archive, Format, Selection};
use layout::Sizes;
use saved::Saved;
use settings::Settings;
use source::Source;
pub use write::{write_checkpoint, write_tokenizer};

/// The prefix of everything in a checkpoint of PyTorch Lightning.
const STATE_DICT: &str = "state_dict.";
/// The prefix of averages in IBQ's checkpoints, whose names have no dots after it.
const EMA: &str = "model_ema.";
/// The prefix of averages in files of [`write_tokenizer`].
const OWN_EMA: &str = "ema.";
/// LeCAM's averages, which only files of [`write_tokenizer`] have.
const LECAM: &str = "loss.lecam_ema";
/// Networks that a checkpoint may hold for measurements.
const MEASURES: [&str; 3] = ["inception_model.", "lpips_vgg.", "lpips_alex."];

/// A vision tokenizer of another program, or an exported one.
pub struct ForeignTokenizer {
    /// Sizes of encoder and decoder.
    pub tokenizer: TokenizerConfig,
    /// Sizes of the codebook, and how it is compared with tokens.
    pub quantizer: QuantizerConfig,
    /// Sizes of the discriminator; `None` if the file has none.
    pub discriminator: Option<DiscriminatorConfig>,
    /// Channels of the blocks of the perceptual loss; `None` if the file has none.
    pub widths: Option<[usize; 5]>,
    /// Whether the features of the perceptual loss are random ones, as in runs without `lpips.weights`.
    pub random_features: bool,
    /// Weights under the names of this crate: the tokenizer's, and those of the discriminator and of the perceptual loss if
    /// the file has them.
    pub weights: Selection,
    /// Averages of weights under the same names, if the file has them: of the tokenizer and of the discriminator.
    pub averages: Option<Selection>,
    /// The number of updates in the averages, if it was counted.
    pub updates: Option<u64>,
    /// The decay of the averages, if the file says it.
    pub decay: Option<f64>,
    /// The discriminator's running statistics, under the names of [`Ett::carried`](crate::model::Ett::carried), and LeCAM's
    /// averages if the file has them.
    pub state: Selection,
    /// What was found and what was left out, in words.
    pub notes: Vec<String>,
}

/// The tensors of a file, sorted by their use.
struct Contents {
    weights: Named,
    averages: Named,
    /// The prefix of averages in the file.
    ema: &'static str,
    state: Named,
}

/// The sizes of what a file holds.
struct Found {
    sizes: Sizes,
    ndf: Option<usize>,
    widths: Option<[usize; 5]>,
}

/// Opens a vision tokenizer: a `.ckpt` of PyTorch Lightning, a bare dictionary, a safetensors file, or a folder with a
/// configuration in YAML and one of these. A configuration beside a file has the file's stem.
pub fn open_tokenizer(path: &Path) -> Result<ForeignTokenizer> {
    let source = Source::find(path)?;
    let archive = Archive::open(&source.weights)?;
    let path = source.weights.as_path();
    if archive.format() == Format::Gguf {
        return Err(Error::weights(path, "is a language model of llama.cpp; name a vision tokenizer"));
    }
    let mut notes = progress(&archive);
    let mut random_features = false;
    let saved = Saved::read(path, archive.about())?;
    let contents = Contents::sorted(Named::whole(archive), &mut notes);
    let mut found = contents.measured(path)?;
    let mut quantizer =
        QuantizerConfig { codes: found.sizes.codes, dim: found.sizes.dim, ..Default::default() };
    let mut discriminator = found.ndf.map(|ndf| DiscriminatorConfig { ndf, ..Default::default() });
    let (mut updates, mut decay) = contents.schedule()?;
    if let Some(saved) = saved {
        saved.check(path, &found.sizes, found.ndf)?;
        found.sizes.tokenizer = saved.tokenizer;
        quantizer = saved.quantizer;
        discriminator = discriminator.and(saved.discriminator);
        (updates, decay) = (saved.updates, saved.decay);
        random_features = saved.random_features;
    } else if let Some(yaml) = &source.settings {
        let settings = Settings::read(yaml)?;
        notes.extend(settings.apply(&mut found.sizes, found.ndf, &mut quantizer)?);
    }
    groups(path, &found.sizes.tokenizer)?;
    contents.check(path, &found)?;
    let averaged = contents.averages.names().next().is_some();
    let averages = averaged.then(|| contents.averages_of(path, &found));
    Ok(ForeignTokenizer {
        tokenizer: found.sizes.tokenizer,
        quantizer,
        discriminator,
        widths: found.widths,
        random_features,
        weights: contents.weights.selection(path),
        averages,
        updates: updates.filter(|_| averaged),
        decay: decay.filter(|_| averaged),
        state: contents.state.selection(path),
        notes,
    })
}

/// How long a checkpoint was trained, if it says so.
fn progress(archive: &Archive) -> Vec<String> {
    let about = archive.about();
    match (about["epoch"].as_u64(), about["global_step"].as_u64()) {
        (Some(epoch), Some(step)) if step > 0 => vec![format!("was saved in epoch {epoch} at step {step}")],
        _ => vec![],
    }
}

/// Fails if a width does not divide into the groups of GroupNorm.
fn groups(path: &Path, t: &TokenizerConfig) -> Result<()> {
    match t.ch_mult.iter().map(|m| t.ch * m).find(|width| !width.is_multiple_of(t.norm_groups.max(1))) {
        Some(width) => {
            let what = format!(
                "has {width} channels, which do not divide into the {} groups of its GroupNorms; say another number \
                 as `norm_groups` in the `ddconfig` of a YAML file beside it",
                t.norm_groups
            );
            Err(Error::weights(path, what))
        }
        None => Ok(()),
    }
}

impl Contents {
    /// Sorts the tensors of a file by their names, and notes what is left out.
    fn sorted(mut all: Named, notes: &mut Vec<String>) -> Self {
        if all.names().any(|name| name.starts_with(STATE_DICT)) {
            let inner = all.take_prefixed(STATE_DICT);
            let mut others = BTreeMap::new();
            for name in all.names() {
                *others.entry(name.split('.').next().unwrap_or_default().to_string()).or_insert(0) += 1;
            }
            notes.extend(others.iter().map(|(what, &n)| format!("left out `{what}` ({})", tensors(n))));
            all = inner;
        }
        for prefix in MEASURES {
            let count = all.take_prefixed(prefix).names().count();
            if count > 0 {
                notes.push(format!("left out `{prefix}*` ({}), which only measures", tensors(count)));
            }
        }
        let ema = if all.names().any(|name| name.starts_with(EMA)) { EMA } else { OWN_EMA };
        let averages = all.take_prefixed(ema);
        let is_state = |name: &str| {
            let statistic = ["running_mean", "running_var", "num_batches_tracked"];
            name == LECAM || name.rsplit('.').next().is_some_and(|last| statistic.contains(&last))
        };
        let state = all.take(|name| is_state(name).then(|| name.into()));
        Contents { weights: all, averages, ema, state }
    }

    fn measured(&self, path: &Path) -> Result<Found> {
        let fail = |why| Error::weights(path, why);
        let sizes = layout::sizes(&self.weights).map_err(fail)?;
        let ndf = layout::ndf(&self.weights).map_err(fail)?;
        let perceptual = self.weights.names().any(|name| name.starts_with(LPIPS));
        let widths = perceptual.then(|| widths(|name| self.weights.dims(name))).transpose().map_err(fail)?;
        Ok(Found { sizes, ndf, widths })
    }

    /// The number of updates in the averages and their decay, as IBQ's checkpoints have them.
    fn schedule(&self) -> Result<(Option<u64>, Option<f64>)> {
        if self.ema == OWN_EMA {
            return Ok((None, None));
        }
        // -1 stands for an average that does not count.
        let updates = self.averages.scalar("num_updates")?.filter(|&n| n >= 0.0).map(|n| n as u64);
        // The number that was meant by the nearest float32: 0.999, not 0.9990000128746033.
        let meant = |decay: f64| (decay as f32).to_string().parse().unwrap_or(decay);
        Ok((updates, self.averages.scalar("decay")?.map(meant)))
    }

    /// Compares all tensors with the architecture.
    fn check(&self, path: &Path, found: &Found) -> Result<()> {
        let (weights, trained) = (found.weights(), found.trained());
        let mut problems = self.weights.misfits(&weights, "");
        problems.extend(self.weights.unknown(&[&weights], ""));
        problems.extend(self.check_averages(&trained));
        problems.extend(self.check_state(found));
        no_problems(path, "the tokenizer", problems)
    }

    fn check_averages(&self, trained: &[Shape]) -> Vec<String> {
        if self.averages.names().next().is_none() {
            return vec![];
        }
        let shapes: Vec<Shape> =
            trained.iter().map(|(name, dims)| (self.average(name), dims.clone())).collect();
        let mut problems = self.averages.misfits(&shapes, self.ema);
        let constants = match self.ema {
            EMA => ["decay", "num_updates"].map(|name| (name.to_string(), vec![])).to_vec(),
            _ => vec![],
        };
        for (name, _) in &constants {
            match self.averages.dims(name) {
                Some([] | [1]) => {}
                Some(dims) => {
                    problems.push(format!("`{}{name}` is {dims:?}, wanted a single value", self.ema))
                }
                None => problems.push(format!("missing `{}{name}`", self.ema)),
            }
        }
        problems.extend(self.averages.unknown(&[&shapes, &constants], self.ema));
        problems
    }

    fn check_state(&self, found: &Found) -> Vec<String> {
        let (running, counts) = found.ndf.map(layout::statistics).unwrap_or_default();
        let mut problems = self.state.misfits(&running, "");
        let lecam: Vec<Shape> = found.ndf.map(|_| (LECAM.to_string(), vec![2])).into_iter().collect();
        if self.state.dims(LECAM).is_some() {
            problems.extend(self.state.misfits(&lecam, ""));
        }
        for name in &counts {
            match (self.state.dims(name), self.state.encoding(name)) {
                (Some([] | [1]), Some(e)) if !e.is_float() => {}
                (Some(dims), Some(e)) => {
                    problems
                        .push(format!("`{name}` is {dims:?} of type {}, wanted a whole number", e.name()));
                }
                _ => problems.push(format!("missing `{name}`")),
            }
        }
        let counts: Vec<Shape> = counts.into_iter().map(|name| (name, vec![])).collect();
        problems.extend(self.state.unknown(&[&running, &counts, &lecam], ""));
        problems
    }

    /// The name of the average of a weight, without its prefix.
    fn average(&self, name: &str) -> String {
        if self.ema == EMA { name.replace('.', "") } else { name.into() }
    }

    /// The averages under the names of the weights.
    fn averages_of(&self, path: &Path, found: &Found) -> Selection {
        let names = found.trained().into_iter().map(|(name, _)| (self.average(&name), name)).collect();
        self.averages.renamed(path, &names)
    }
}

impl Found {
    /// Everything that a training step changes.
    fn trained(&self) -> Vec<Shape> {
        trained(&self.sizes, self.ndf)
    }

    fn weights(&self) -> Vec<Shape> {
        let mut all = self.trained();
        if let Some(widths) = &self.widths {
            all.extend([vgg(widths), heads(widths), scaling()].concat());
        }
        all
    }
}

/// The weights of tokenizer and discriminator.
fn trained(sizes: &Sizes, ndf: Option<usize>) -> Vec<Shape> {
    let mut all = layout::tokenizer(&sizes.tokenizer, sizes.codes, sizes.dim);
    all.extend(ndf.map(layout::discriminator).unwrap_or_default());
    all
}
