//! `config.json` of `transformers`: sizes and options of a model.

use std::path::Path;

use serde_json::{Map, Value};

use super::keys::Keys;
use crate::config::{Config, LlmConfig};
use crate::error::{Error, Result};
use crate::formats::shown;

/// What a configuration says.
pub(super) struct Described {
    /// Sizes and options; the vocabulary is the file's.
    pub llm: LlmConfig,
    /// The class that computes it.
    pub architecture: &'static str,
    /// The tokens that end a text.
    pub ends: Vec<usize>,
}

/// The classes that are read, with their `model_type`.
const CLASSES: [(&str, &str); 3] =
    [("LlamaForCausalLM", "llama"), ("MistralForCausalLM", "mistral"), ("Qwen2ForCausalLM", "qwen2")];

/// Most characters of a text of a file that errors show.
const SHOWN: usize = 60;

/// The value that a key may have, beside being absent.
enum Only {
    Absent,
    False,
    One,
    Text(&'static str),
    Zero,
}

impl Only {
    fn allows(&self, v: &Value) -> bool {
        match self {
            Only::Absent => false,
            Only::False => v.as_bool() == Some(false),
            Only::One => v.as_f64() == Some(1.0),
            Only::Text(text) => v.as_str() == Some(text),
            Only::Zero => v.as_f64() == Some(0.0),
        }
    }

    fn words(&self) -> String {
        match self {
            Only::Absent => "null".into(),
            Only::False => "false".into(),
            Only::One => "1".into(),
            Only::Text(text) => format!("{text:?}"),
            Only::Zero => "0".into(),
        }
    }
}

/// Keys that change what a model computes, each with the value for which ett computes the same.
const PLAIN: [(&str, Only); 34] = [
    ("add_cross_attention", Only::False),
    ("alibi", Only::False),
    ("attention_chunk_size", Only::Absent),
    ("attention_multiplier", Only::Absent),
    ("attn_logit_softcapping", Only::Absent),
    ("attn_temperature_tuning", Only::False),
    ("clip_qkv", Only::Absent),
    ("embedding_multiplier", Only::One),
    ("embedding_size", Only::Absent),
    ("final_logit_softcapping", Only::Absent),
    ("hidden_act", Only::Text("silu")),
    ("hidden_activation", Only::Text("silu")),
    ("is_encoder_decoder", Only::False),
    ("logit_scale", Only::One),
    ("logits_scaling", Only::One),
    ("mlp_bias", Only::False),
    ("no_rope_layers", Only::Absent),
    ("num_experts", Only::Zero),
    ("num_local_experts", Only::Zero),
    ("partial_rotary_factor", Only::One),
    ("pretraining_tp", Only::One),
    ("qk_layernorm", Only::False),
    ("qk_norm", Only::False),
    ("quantization_config", Only::Absent),
    ("query_pre_attn_scalar", Only::Absent),
    ("residual_multiplier", Only::One),
    ("rope_interleaved", Only::False),
    ("rope_local_base_freq", Only::Absent),
    ("rotary_pct", Only::One),
    ("scale_depth", Only::Absent),
    ("scale_emb", Only::One),
    ("sliding_window_pattern", Only::Absent),
    ("use_qk_norm", Only::False),
    ("use_sliding_window", Only::False),
];

/// Reads a configuration. Unknown keys are fine, those that change the computation are not.
pub(super) fn describe(path: &Path, map: &Map<String, Value>) -> Result<Described> {
    let keys = Keys { path, map };
    let architecture = class(keys)?;
    let qwen = architecture == "Qwen2ForCausalLM";
    for (key, only) in &PLAIN {
        match keys.get(key) {
            Some(v) if !only.allows(v) => return Err(not_computed(keys, key, &only.words())),
            _ => {}
        }
    }
    // Qwen2 always has biases before attention and none after it; the others would have both.
    if !qwen && keys.flag("attention_bias")? == Some(true) {
        return Err(not_computed(keys, "attention_bias", "false"));
    }
    // Qwen2 has a number there even if nothing slides.
    if !qwen && keys.get("sliding_window").is_some() {
        return Err(not_computed(keys, "sliding_window", "null"));
    }
    // `transformers` takes 4096 for Mistral where the key is not there.
    if architecture == "MistralForCausalLM" && !map.contains_key("sliding_window") {
        let want = "null, since `transformers` computes a window of 4096 without the key, and ett none";
        return Err(keys.wrong("sliding_window", want));
    }
    full_attention(keys)?;
    let llm = sizes(keys, architecture)?;
    check(path, &llm, spelled)?;
    let ends = keys.tokens("eos_token_id", llm.vocab)?;
    Ok(Described { llm, architecture, ends })
}

fn not_computed(keys: Keys, key: &str, want: &str) -> Error {
    keys.wrong(key, &format!("{want}, since ett does not compute anything else"))
}

/// The class of a model.
fn class(keys: Keys) -> Result<&'static str> {
    let named = match keys.list("architectures")? {
        Some([Value::String(name)]) => Some(name.as_str()),
        Some(_) => return Err(keys.wrong("architectures", "one class, such as [\"Qwen2ForCausalLM\"]")),
        None => None,
    };
    let found = match (named, keys.text("model_type")?) {
        (Some(name), _) => CLASSES.iter().find(|(class, _)| *class == name),
        (None, Some(kind)) => CLASSES.iter().find(|(_, of)| *of == kind),
        (None, None) => return Err(keys.wrong("architectures", "one class, such as [\"Qwen2ForCausalLM\"]")),
    };
    let name = named.or(keys.text("model_type")?).unwrap_or_default();
    let why = match name.to_lowercase().starts_with("qwen3") {
        true => " (its queries and keys pass through norms, q_norm and k_norm, which ett does not compute)",
        false => "",
    };
    let name = shown(name, SHOWN);
    found.map(|(class, _)| *class).ok_or_else(|| {
        let all = CLASSES.map(|(class, _)| class).join(", ");
        Error::weights(keys.path, format!("is a model of the class {name}{why}, wanted one of {all}"))
    })
}

/// Every layer attends to the whole sequence.
fn full_attention(keys: Keys) -> Result<()> {
    match keys.list("layer_types")? {
        Some(all) if all.iter().any(|v| v.as_str() != Some("full_attention")) => {
            let other = all.iter().find(|v| v.as_str() != Some("full_attention"));
            let other = other.map_or(String::new(), |v| shown(&v.to_string(), SHOWN));
            let what = format!("`layer_types` names {other}, wanted \"full_attention\" for every layer");
            Err(Error::weights(keys.path, what))
        }
        _ => Ok(()),
    }
}

/// The numbers, with the defaults of `transformers` where those are the same for every model of a class.
fn sizes(keys: Keys, architecture: &str) -> Result<LlmConfig> {
    let heads = keys.needed("num_attention_heads")?;
    let width = keys.needed("hidden_size")?;
    let head_dim = match keys.count("head_dim")? {
        Some(dim) => dim,
        None if heads > 0 && width.is_multiple_of(heads) => width / heads,
        None => return Err(keys.wrong("hidden_size", "a multiple of `num_attention_heads`, or `head_dim`")),
    };
    let kv_heads = match architecture {
        "LlamaForCausalLM" => keys.count("num_key_value_heads")?.unwrap_or(heads),
        _ => keys.needed("num_key_value_heads")?,
    };
    Ok(LlmConfig {
        vocab: keys.needed("vocab_size")?,
        width,
        layers: keys.needed("num_hidden_layers")?,
        heads,
        kv_heads,
        head_dim,
        mlp: keys.needed("intermediate_size")?,
        rms_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: rope_theta(keys)?.unwrap_or(1e4),
        tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: architecture == "Qwen2ForCausalLM",
        positions: keys.needed("max_position_embeddings")?,
        init_std: keys.number("initializer_range")?.unwrap_or(0.02),
    })
}

/// The base of the rotary angles, at the top or under `rope_parameters`.
fn rope_theta(keys: Keys) -> Result<Option<f64>> {
    let mut theta = keys.number("rope_theta")?;
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(value) = keys.get(key) else { continue };
        let map = value.as_object().ok_or_else(|| keys.wrong(key, "null or a dictionary"))?;
        let under = Keys { path: keys.path, map };
        for name in ["rope_type", "type"] {
            match under.text(name)? {
                None | Some("default") => {}
                Some(kind) => {
                    let kind = shown(kind, SHOWN);
                    let what =
                        format!("`{key}` is of the type {kind}, which ett does not compute; wanted default");
                    return Err(Error::weights(keys.path, what));
                }
            }
        }
        for name in map.keys() {
            match name.as_str() {
                "rope_type" | "type" => {}
                "rope_theta" => {
                    let here = under.number(name)?;
                    if here.is_some() && theta.is_some() && here != theta {
                        return Err(under.wrong(name, "the same as `rope_theta` elsewhere in the file"));
                    }
                    theta = here.or(theta);
                }
                "partial_rotary_factor" if under.number(name)?.is_none_or(|x| x == 1.0) => {}
                "partial_rotary_factor" => return Err(not_computed(under, name, "1")),
                _ if under.get(name).is_none() => {}
                _ => {
                    let name = shown(name, SHOWN);
                    let what = format!("`{key}` has `{name}`, which ett does not compute; remove it");
                    return Err(Error::weights(keys.path, what));
                }
            }
        }
    }
    Ok(theta)
}

/// Checks the ranges of a configuration's numbers; `spelled` gives the file's names for ours.
pub(super) fn check(path: &Path, llm: &LlmConfig, spelled: fn(&str) -> Option<&'static str>) -> Result<()> {
    let all = Config { llm: llm.clone(), ..Config::default() };
    all.check().map_err(|e| match e {
        Error::Config { key, got, want } => {
            let key = spelled(&key).map_or(key, String::from);
            Error::weights(path, format!("`{key}` is {got}, wanted {want}"))
        }
        other => other,
    })
}

fn spelled(key: &str) -> Option<&'static str> {
    Some(match key {
        "llm.vocab" => "vocab_size",
        "llm.width" => "hidden_size",
        "llm.layers" => "num_hidden_layers",
        "llm.heads" => "num_attention_heads",
        "llm.kv_heads" => "num_key_value_heads",
        "llm.head_dim" => "head_dim",
        "llm.mlp" => "intermediate_size",
        "llm.rms_eps" => "rms_norm_eps",
        "llm.rope_theta" => "rope_theta",
        "llm.positions" => "max_position_embeddings",
        "llm.init_std" => "initializer_range",
        _ => return None,
    })
}
