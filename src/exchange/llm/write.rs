//! A folder that `transformers` loads.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::layout::layout;
use super::text::parse;
use crate::config::LlmConfig;
use crate::data::Special;
use crate::error::{Error, Result};
use crate::files::{self, replace};
use crate::formats::{Encoding, FileTensor, Selection, write_safetensors};
use crate::io::weights::{fewer_rows, misfit};
use crate::model::PER_TOKEN;

/// Bytes of weights in a file, from which on there are several.
const SHARD: usize = 5_000_000_000;

/// The encodings in which weights are written.
const WRITTEN: [Encoding; 4] = [Encoding::Bf16, Encoding::F16, Encoding::F32, Encoding::F64];

const CONFIG: &str = "config.json";
const GENERATION: &str = "generation_config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Conversations in the ChatML format, as `feed::Template` lays them out.
const CHAT: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
    {% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Writes a language model as a folder that `transformers` loads, and returns its files; `None` keeps the encoding of
/// every tensor, except that quantized ones become F32. `weights` may hold more than the language model, `text` is a
/// `tokenizer.json`, `ends` are tokens that end a text besides ett's own. The embedding and the output head may have fewer rows
/// than the vocabulary; each row that is added is the mean of all others. A folder that has one of the files is refused, and after an error none of them is left.
pub fn write_llm(
    out: &Path,
    cfg: &LlmConfig,
    weights: &Selection,
    text: Option<&[u8]>,
    ends: &[usize],
    encoding: Option<Encoding>,
) -> Result<Vec<PathBuf>> {
    write_shards(out, cfg, weights, (text, ends), encoding, SHARD)
}

/// The same with at most `most` bytes in a file of weights, unless a single tensor has more.
fn write_shards(
    out: &Path,
    cfg: &LlmConfig,
    weights: &Selection,
    (text, ends): (Option<&[u8]>, &[usize]),
    encoding: Option<Encoding>,
    most: usize,
) -> Result<Vec<PathBuf>> {
    if let Some(other) = encoding.filter(|e| !WRITTEN.contains(e)) {
        let want = WRITTEN.map(Encoding::name).join(", ");
        return Err(Error::weights(
            out,
            format!("cannot have weights in {}, wanted one of {want}", other.name()),
        ));
    }
    let tensors = tensors(cfg, weights, encoding)?;
    let ends = Ends::of(out, text, ends, cfg)?;
    fs::create_dir_all(out).map_err(Error::io(out))?;
    refuse_existing(out)?;
    let mut folder = Folder { out, written: Vec::new() };
    let done = folder.fill(cfg, tensors, text, &ends, most);
    match done {
        Ok(()) => Ok(folder.written),
        Err(e) => {
            folder.written.iter().for_each(|path| drop(fs::remove_file(path)));
            Err(e)
        }
    }
}

/// Fails if a folder has a file that would be written, or weights that would be read instead.
fn refuse_existing(out: &Path) -> Result<()> {
    for entry in fs::read_dir(out).map_err(Error::io(out))? {
        let name = entry.map_err(Error::io(out))?.file_name();
        let name = name.to_string_lossy();
        let shard = name.starts_with("model-") && name.ends_with(".safetensors");
        if shard || [CONFIG, GENERATION, WEIGHTS, INDEX, TOKENIZER, TOKENIZER_CONFIG].contains(&&*name) {
            let what = format!("has {name} already, which is not overwritten; name a new folder");
            return Err(Error::data(out, what));
        }
    }
    Ok(())
}

/// The tensors of the language model; the matrices with a row per token get the rows that they lack.
fn tensors<'a>(
    cfg: &LlmConfig,
    weights: &'a Selection,
    encoding: Option<Encoding>,
) -> Result<Vec<FileTensor<'a>>> {
    let (mut tensors, mut problems) = (Vec::new(), Vec::new());
    for (name, dims) in layout(cfg) {
        let grows = PER_TOKEN.contains(&name.as_str());
        match weights.dims(&name) {
            None => problems.push(format!("missing `{name}` {dims:?}")),
            Some(have) if have != dims && !(grows && fewer_rows(have, &dims)) => {
                problems.push(format!("`{name}` is {have:?}, wanted {dims:?}"));
            }
            Some(_) if !weights.encoding(&name)?.is_float() => {
                let stored = weights.encoding(&name)?.name();
                problems.push(format!("`{name}` has type {stored}, wanted floats"));
            }
            Some(_) => tensors.push(weights.tensor_of_rows(&name, name.clone(), encoding, dims[0])?),
        }
    }
    match problems.is_empty() {
        true => Ok(tensors),
        false => Err(Error::weights(weights.path(), misfit("the configuration", problems))),
    }
}

/// Special tokens that a configuration names.
struct Ends {
    /// End of a turn and of a text; `None` without a text tokenizer.
    ids: Option<(u32, u32)>,
    /// The ends of the model that training started from.
    others: Vec<usize>,
}

impl Ends {
    fn of(out: &Path, text: Option<&[u8]>, others: &[usize], cfg: &LlmConfig) -> Result<Self> {
        let others = others.to_vec();
        let Some(text) = text else { return Ok(Ends { ids: None, others }) };
        let tokenizer = parse(&out.join(TOKENIZER), text)?;
        let id = |s: Special| {
            let id = tokenizer.token_to_id(s.name()).filter(|&id| (id as usize) < cfg.vocab);
            id.ok_or_else(|| {
                let what =
                    format!("its text tokenizer has no {} below {}, the vocabulary", s.name(), cfg.vocab);
                Error::weights(
                    out.join(TOKENIZER),
                    format!("{what}; pass the one that the model was made with"),
                )
            })
        };
        Ok(Ends { ids: Some((id(Special::ImEnd)?, id(Special::EndOfText)?)), others })
    }
}

/// A folder that is being filled.
struct Folder<'a> {
    out: &'a Path,
    written: Vec<PathBuf>,
}

impl Folder<'_> {
    /// Writes all files; the configuration is the last one, so that a folder without it is incomplete.
    fn fill(
        &mut self,
        cfg: &LlmConfig,
        tensors: Vec<FileTensor>,
        text: Option<&[u8]>,
        ends: &Ends,
        most: usize,
    ) -> Result<()> {
        let dtype = dtype(&tensors);
        self.weights(tensors, most)?;
        if let Some(text) = text {
            self.file(TOKENIZER, text)?;
            self.json(TOKENIZER_CONFIG, &tokenizer_config(cfg))?;
        }
        self.json(GENERATION, &generation_config(ends))?;
        self.json(CONFIG, &config(cfg, dtype, ends))
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.out.join(name);
        replace(&path, |file| file.put(bytes))?;
        self.written.push(path);
        Ok(())
    }

    fn json(&mut self, name: &str, value: &Value) -> Result<()> {
        self.file(name, format!("{value:#}\n").as_bytes())
    }

    fn weights(&mut self, tensors: Vec<FileTensor>, most: usize) -> Result<()> {
        let size = |t: &FileTensor| t.encoding.bytes(t.dims.iter().product()).unwrap_or(usize::MAX);
        let all = tensors.iter().map(size).fold(0, usize::saturating_add);
        let shards = shards(tensors, size, most);
        let (count, mut map) = (shards.len(), BTreeMap::new());
        for (i, shard) in shards.into_iter().enumerate() {
            let name = match count {
                1 => WEIGHTS.into(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            map.extend(shard.iter().map(|t| (t.name.clone(), name.clone())));
            let path = self.out.join(&name);
            let note = HashMap::from([("format".to_string(), "pt".to_string())]);
            replace(&path, |file| write_safetensors(file, shard, note))?;
            self.written.push(path);
        }
        match count {
            1 => files::sync_dir(self.out),
            _ => self.json(INDEX, &json!({"metadata": {"total_size": all}, "weight_map": map})),
        }
    }
}

/// Divides tensors, in their order, into files of at most `most` bytes, of which each has a tensor.
fn shards<'a>(
    tensors: Vec<FileTensor<'a>>,
    size: impl Fn(&FileTensor) -> usize,
    most: usize,
) -> Vec<Vec<FileTensor<'a>>> {
    let (mut shards, mut used) = (vec![vec![]], 0usize);
    for t in tensors {
        let more = size(&t);
        if used > 0 && used.saturating_add(more) > most {
            shards.push(vec![]);
            used = 0;
        }
        used = used.saturating_add(more);
        if let Some(last) = shards.last_mut() {
            last.push(t);
        }
    }
    shards
}

/// The element type in which `transformers` computes: that of the tensors, or f32 if they differ.
fn dtype(tensors: &[FileTensor]) -> &'static str {
    let first = tensors.first().map(|t| t.encoding);
    match first.filter(|&e| tensors.iter().all(|t| t.encoding == e)) {
        Some(Encoding::Bf16) => "bfloat16",
        Some(Encoding::F16) => "float16",
        Some(Encoding::F64) => "float64",
        _ => "float32",
    }
}

fn config(cfg: &LlmConfig, dtype: &str, ends: &Ends) -> Value {
    let (architecture, kind) = match cfg.qkv_bias {
        true => ("Qwen2ForCausalLM", "qwen2"),
        false => ("LlamaForCausalLM", "llama"),
    };
    let mut all = json!({
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": cfg.width,
        "initializer_range": cfg.init_std,
        "intermediate_size": cfg.mlp,
        "max_position_embeddings": cfg.positions,
        "model_type": kind,
        "num_attention_heads": cfg.heads,
        "num_hidden_layers": cfg.layers,
        "num_key_value_heads": cfg.kv_heads,
        "rms_norm_eps": cfg.rms_eps,
        "rope_parameters": {"rope_theta": cfg.rope_theta, "rope_type": "default"},
        "rope_theta": cfg.rope_theta,
        "tie_word_embeddings": cfg.tied,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": cfg.vocab,
        "bos_token_id": null,
        "eos_token_id": ends.ids.map(|(turn, _)| turn),
        "pad_token_id": ends.ids.map(|(_, text)| text),
    });
    if cfg.heads * cfg.head_dim != cfg.width {
        all["head_dim"] = cfg.head_dim.into();
    }
    match cfg.qkv_bias {
        true => all["use_sliding_window"] = false.into(),
        false => {
            all["attention_bias"] = false.into();
            all["mlp_bias"] = false.into();
        }
    }
    all
}

fn generation_config(ends: &Ends) -> Value {
    let own = ends.ids.iter().flat_map(|&(turn, text)| [turn as usize, text as usize]);
    let mut all: Vec<usize> = own.collect();
    for &id in &ends.others {
        if !all.contains(&id) {
            all.push(id);
        }
    }
    match (ends.ids, all.is_empty()) {
        (Some((_, text)), _) => json!({"eos_token_id": all, "pad_token_id": text}),
        (None, false) => json!({"eos_token_id": all}),
        (None, true) => json!({}),
    }
}

fn tokenizer_config(cfg: &LlmConfig) -> Value {
    json!({
        "add_bos_token": false,
        "chat_template": CHAT,
        "clean_up_tokenization_spaces": false,
        "eos_token": Special::ImEnd.name(),
        "model_max_length": cfg.positions,
        "pad_token": Special::EndOfText.name(),
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

#[cfg(test)]
mod tests {
    use super::super::open_llm;
    use super::*;
    use crate::formats::Archive;

    #[test]
    fn large_models_are_written_in_several_files() {
        let dir = std::env::temp_dir().join(format!("ett-llm-write-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        let cfg = LlmConfig {
            vocab: 16,
            width: 8,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            mlp: 12,
            tied: false,
            ..LlmConfig::default()
        };
        let value = |i: usize| move || Ok(vec![i as u8; 2 * 128]);
        let tensor = |(i, (name, dims)): (usize, (String, Vec<usize>))| {
            let bytes = 2 * dims.iter().product::<usize>();
            let bytes = Box::new(move || Ok(value(i)()?[..bytes].to_vec()));
            FileTensor { name, dims, encoding: Encoding::Bf16, bytes }
        };
        let all = || layout(&cfg).into_iter().enumerate().map(tensor).collect();
        let whole = dir.join("whole.safetensors");
        replace(&whole, |file| write_safetensors(file, all(), HashMap::new())).unwrap();
        let weights = Selection::whole(Archive::open(&whole).unwrap());
        let out = dir.join("out");
        let files = write_shards(&out, &cfg, &weights, (None, &[]), None, 600).unwrap();
        let names: Vec<String> =
            files.iter().map(|f| f.file_name().unwrap().to_string_lossy().into_owned()).collect();
        assert!(
            names[0].starts_with("model-00001-of-000") && names.contains(&INDEX.to_string()),
            "{names:?}"
        );
        assert!(names.len() > 5 && !names.contains(&WEIGHTS.to_string()), "{names:?}");
        let index: Value = serde_json::from_slice(&fs::read(out.join(INDEX)).unwrap()).unwrap();
        let bytes: usize = layout(&cfg).iter().map(|(_, dims)| 2 * dims.iter().product::<usize>()).sum();
        assert_eq!(index["metadata"]["total_size"], bytes);
        let again = open_llm(&out).unwrap();
        assert_eq!(again.config, cfg);
        for (name, _) in layout(&cfg) {
            assert_eq!(again.weights.raw(&name).unwrap(), weights.raw(&name).unwrap(), "{name}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
