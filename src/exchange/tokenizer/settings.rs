//! The configuration in YAML of a published tokenizer: checked against the weights, and read for what they cannot say.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::layout::Sizes;
use crate::config::{LossConfig, QuantizerConfig};
use crate::error::{Error, Result};
use crate::io::weights::misfit;

/// Largest configuration that is read, in bytes.
const LARGEST: u64 = 1 << 20;
/// The last part of the class that ett knows, in `model.class_path` or `model.target`.
const CLASS: &str = "IBQ";

/// A configuration in YAML.
pub(super) struct Settings {
    path: PathBuf,
    /// The arguments of the model.
    model: Value,
    class: Option<String>,
}

impl Settings {
    /// Reads a configuration of IBQ's reference code (arguments under `model.init_args` or `model.params`) or of Emu3.5
    /// (arguments at the top).
    pub fn read(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?.take(LARGEST + 1);
        let mut bytes = vec![];
        file.read_to_end(&mut bytes).map_err(Error::io(path))?;
        if bytes.len() as u64 > LARGEST {
            let what = format!("is no configuration of a tokenizer: it has more than {LARGEST} bytes");
            return Err(Error::weights(path, what));
        }
        let text = String::from_utf8(bytes).map_err(|_| Error::weights(path, "is not text in UTF-8"))?;
        let root: Value = serde_saphyr::from_str(&text).map_err(|e| {
            let why = e.to_string();
            let why = why.lines().next().unwrap_or_default().trim_start_matches("error: ");
            Error::weights(path, format!("is not valid YAML ({why})"))
        })?;
        let model = &root["model"];
        let places = [&root, &model["init_args"], &model["params"], model];
        let Some(arguments) = places.into_iter().find(|place| place["ddconfig"].is_object()) else {
            let what =
                "lacks `ddconfig`, the sizes of encoder and decoder; name the configuration of the tokenizer";
            return Err(Error::weights(path, what));
        };
        let class = ["class_path", "target"].iter().find_map(|key| model[key].as_str());
        Ok(Settings { path: path.into(), model: arguments.clone(), class: class.map(String::from) })
    }

    /// The value of a dotted key; `None` if it is missing or null.
    fn get(&self, key: &str) -> Option<&Value> {
        let value = key.split('.').try_fold(&self.model, |at, part| at.get(part))?;
        (!value.is_null()).then_some(value)
    }

    fn number(&self, key: &str, problems: &mut Vec<String>) -> Option<f64> {
        let value = self.get(key)?;
        if value.as_f64().is_none() {
            problems.push(format!("`{key}` is {value}, wanted a number"));
        }
        value.as_f64()
    }

    /// Checks all that the weights say, too, takes over what they do not say, and returns what is worth knowing, in words.
    pub fn apply(
        &self,
        sizes: &mut Sizes,
        ndf: Option<usize>,
        q: &mut QuantizerConfig,
    ) -> Result<Vec<String>> {
        let mut problems = vec![];
        if let Some(class) = self.class.as_deref().filter(|c| c.rsplit('.').next() != Some(CLASS)) {
            problems.push(format!("its class is `{class}`, wanted one named {CLASS}"));
        }
        self.compare(sizes, ndf, &mut problems);
        self.refuse(&mut problems);
        self.attention(sizes.tokenizer.ch_mult.len(), &mut problems);
        let t = &mut sizes.tokenizer;
        let whole = |v: f64| v >= 1.0 && v <= f64::from(u16::MAX) && v.fract() == 0.0;
        // The reference fixes both; its classes ignore keys that they do not know.
        for (key, to) in [
            ("ddconfig.norm_eps", &mut t.norm_eps),
            ("beta", &mut q.beta),
            ("entropy_temperature", &mut q.temperature),
        ] {
            *to = self.number(key, &mut problems).unwrap_or(*to);
        }
        match self.number("ddconfig.norm_groups", &mut problems) {
            Some(groups) if whole(groups) => t.norm_groups = groups as usize,
            Some(groups) => {
                problems.push(format!("`ddconfig.norm_groups` is {groups}, wanted a whole number"))
            }
            None => {}
        }
        let notes = self.notes(&mut problems);
        match problems.is_empty() {
            true => Ok(notes),
            false => Err(Error::weights(&self.path, misfit("the weights or ett", problems))),
        }
    }

    /// Sizes that the weights have, too.
    fn compare(&self, sizes: &Sizes, ndf: Option<usize>, problems: &mut Vec<String>) {
        let t = &sizes.tokenizer;
        for (key, have) in [
            ("ddconfig.ch", t.ch),
            ("ddconfig.num_res_blocks", t.num_res_blocks),
            ("ddconfig.z_channels", t.z_channels),
            ("ddconfig.in_channels", 3),
            ("ddconfig.out_ch", 3),
            ("n_embed", sizes.codes),
            ("embed_dim", sizes.dim),
        ] {
            self.same(key, &Value::from(have), problems);
        }
        self.same("ddconfig.ch_mult", &Value::from(t.ch_mult.clone()), problems);
        if let Some(ndf) = ndf {
            self.same("lossconfig.params.disc_ndf", &Value::from(ndf), problems);
        }
    }

    fn same(&self, key: &str, have: &Value, problems: &mut Vec<String>) {
        if let Some(value) = self.get(key).filter(|value| *value != have) {
            problems.push(format!("`{key}` is {value}, but the weights have {have}"));
        }
    }

    /// Options that change what is computed.
    fn refuse(&self, problems: &mut Vec<String>) {
        let fixed = [
            ("ddconfig.double_z", Value::from(false)),
            ("ddconfig.resamp_with_conv", Value::from(true)),
            ("ddconfig.give_pre_end", Value::from(false)),
            ("ddconfig.tanh_out", Value::from(false)),
            ("ddconfig.use_linear_attn", Value::from(false)),
            ("ddconfig.attn_type", Value::from("vanilla")),
            ("lossconfig.params.disc_num_layers", Value::from(3)),
            ("lossconfig.params.disc_in_channels", Value::from(3)),
            ("lossconfig.params.disc_conditional", Value::from(false)),
            ("lossconfig.params.use_actnorm", Value::from(false)),
        ];
        for (key, want) in fixed {
            if let Some(value) = self.get(key).filter(|value| **value != want) {
                problems.push(format!("`{key}` is {value}, which ett does not have, wanted {want}"));
            }
        }
        if let Some(dropout) = self.number("ddconfig.dropout", problems).filter(|&p| p != 0.0) {
            problems.push(format!("`ddconfig.dropout` is {dropout}, which ett does not have, wanted 0"));
        }
        for key in ["remap", "colorize_nlabels"] {
            if let Some(value) = self.get(key) {
                problems.push(format!("`{key}` is {value}, which ett does not have, wanted none"));
            }
        }
    }

    /// The levels at which `attn_resolutions` puts attention, of `levels`.
    fn attention(&self, levels: usize, problems: &mut Vec<String>) {
        let (Some(sides), Some(side)) =
            (self.get("ddconfig.attn_resolutions"), self.get("ddconfig.resolution"))
        else {
            return;
        };
        let (Some(list), Some(full)) = (sides.as_array(), side.as_u64()) else {
            problems.push(format!(
                "`ddconfig.attn_resolutions` is {sides} of `ddconfig.resolution` {side}, wanted sides and a side"
            ));
            return;
        };
        let attends = |&level: &usize| list.iter().any(|side| side.as_u64() == Some(full >> level));
        let found: Vec<usize> = (0..levels).filter(attends).collect();
        if found != [levels - 1] {
            problems.push(format!(
                "`ddconfig.attn_resolutions` {sides} puts attention at the levels {found:?} of a resolution of {full}; \
                 ett has it at level {} only, the lowest",
                levels - 1
            ));
        }
    }

    /// What is worth knowing about the other options.
    fn notes(&self, problems: &mut Vec<String>) -> Vec<String> {
        let mut notes = vec![];
        if self.get("l2_normalize").is_some_and(|value| value.as_bool() != Some(false)) {
            notes.push(
                "`l2_normalize` is set, but the published code does not pass it on to its quantizer: codes are \
                 compared by plain dot products; set quantizer.metric = \"l2norm\" if yours was trained otherwise"
                    .into(),
            );
        }
        for key in ["sample_minimization_weight", "batch_maximization_weight"] {
            if let Some(weight) = self.number(key, problems).filter(|&w| w != 1.0) {
                notes.push(format!("`{key}` {weight} is not taken over: ett weighs both entropies equally"));
            }
        }
        let ours = LossConfig::default();
        for (key, name, usual) in [
            ("quant_loss_weight", "quant", ours.quant),
            ("perceptual_weight", "lpips", ours.lpips),
            ("gen_loss_weight", "gan", ours.gan),
            ("lecam_loss_weight", "lecam", ours.lecam),
            ("entropy_loss_weight", "entropy", ours.entropy),
        ] {
            let weight = self.number(&format!("lossconfig.params.{key}"), problems);
            if let Some(weight) = weight.filter(|&w| w != usual) {
                notes.push(format!("was trained with `{key}` {weight}; set loss.{name} to go on like this"));
            }
        }
        notes
    }
}
