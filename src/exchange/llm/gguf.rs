//! GGUF, llama.cpp's file of a model: configuration, weights and text tokenizer.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::config::check;
use super::keys::Keys;
use super::layout::Tensors;
use super::{ForeignLlm, gguf_text};
use crate::config::LlmConfig;
use crate::error::{Error, Result};
use crate::formats::{Archive, Change, Format};

/// Parts of public names, and how llama.cpp spells them.
const NAMES: [(&str, &str); 13] = [
    ("input_layernorm", "attn_norm"),
    ("lm_head", "output"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("model.embed_tokens", "token_embd"),
    ("model.layers", "blk"),
    ("model.norm", "output_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.v_proj", "attn_v"),
];

/// Keys after the architecture's name that change what a model computes, each with the value that means nothing.
const PLAIN: [(&str, f64); 14] = [
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attention.sliding_window", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.scale_linear", 1.0),
    ("rope.scaling.factor", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
];

/// Opens a file.
pub(super) fn open(path: &Path) -> Result<ForeignLlm> {
    let archive = Archive::open(path)?;
    if archive.format() != Format::Gguf {
        let what = format!(
            "is a file of {}, which does not say what model it holds; name the folder with its config.json",
            archive.format().name()
        );
        return Err(Error::weights(path, what));
    }
    let archive = Arc::new(archive);
    let none = Map::new();
    let keys = Keys { path, map: archive.about().as_object().unwrap_or(&none) };
    let kind = keys.text("general.architecture")?.unwrap_or_default();
    let architecture = match kind {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        _ => return Err(keys.wrong("general.architecture", "\"llama\" or \"qwen2\"")),
    };
    let config = sizes(keys, kind, &archive)?;
    check(path, &config, |_| None)?;
    let all = archive.tensors().keys().map(|name| (name.clone(), archive.clone())).collect();
    let tensors = Tensors { path, all, spelled };
    // llama.cpp rotates neighbours in a model of this kind, and halves in one of the other.
    let change = |public: &str| match (kind, heads(public, &config)) {
        ("llama", Some(heads)) => Change::Halves { heads },
        _ => Change::None,
    };
    let weights = tensors.select(&config, change, why)?;
    let ends = keys.tokens("tokenizer.ggml.eos_token_id", config.vocab)?;
    let (text, notes) = gguf_text::tokenizer(keys)?;
    let model = ForeignLlm { config, weights, text: None, architecture: architecture.into(), ends, notes };
    model.with_text(path, text.map(|t| t.to_string()))
}

/// The name in a file of a tensor with this public name.
fn spelled(public: &str) -> String {
    NAMES.iter().fold(public.to_string(), |name, (ours, theirs)| name.replace(ours, theirs))
}

/// The number of heads of queries or keys, which are rotated; `None` for all other tensors.
fn heads(public: &str, cfg: &LlmConfig) -> Option<usize> {
    match public {
        name if name.contains("q_proj") => Some(cfg.heads),
        name if name.contains("k_proj") => Some(cfg.kv_heads),
        _ => None,
    }
}

/// Why a tensor is not part of a model.
fn why(name: &str) -> &'static str {
    if name.starts_with("rope_") {
        return " (its rotary angles are scaled, which ett does not compute)";
    }
    if name.contains("attn_q_norm") || name.contains("attn_k_norm") {
        return " (ett computes no norm of queries and keys)";
    }
    ""
}

fn sizes(keys: Keys, kind: &str, archive: &Archive) -> Result<LlmConfig> {
    let at = |name: &str| format!("{kind}.{name}");
    for (name, plain) in PLAIN {
        if keys.number(&at(name))?.is_some_and(|x| x != plain) {
            let want = format!("{plain}, since ett does not compute anything else");
            return Err(keys.wrong(&at(name), &want));
        }
    }
    if keys.text(&at("rope.scaling.type"))?.is_some_and(|kind| kind != "none") {
        let want = "\"none\", since ett does not compute anything else";
        return Err(keys.wrong(&at("rope.scaling.type"), want));
    }
    let (width, heads) = (keys.needed(&at("embedding_length"))?, keys.needed(&at("attention.head_count"))?);
    let head_dim = match keys.count(&at("attention.key_length"))? {
        Some(dim) => dim,
        None if heads > 0 && width.is_multiple_of(heads) => width / heads,
        None => return Err(keys.wrong(&at("attention.key_length"), "a whole number")),
    };
    for name in ["attention.value_length", "rope.dimension_count"] {
        if keys.count(&at(name))?.is_some_and(|dim| dim != head_dim) {
            return Err(keys.wrong(&at(name), &format!("{head_dim}, the dimensions of a head")));
        }
    }
    let rows = archive.tensors().get("token_embd.weight").and_then(|info| info.dims.first());
    let tokens = keys.list("tokenizer.ggml.tokens")?.map(<[Value]>::len);
    let vocab = keys.count(&at("vocab_size"))?.or(tokens).or(rows.copied());
    Ok(LlmConfig {
        vocab: vocab.ok_or_else(|| keys.wrong(&at("vocab_size"), "a whole number"))?,
        width,
        layers: keys.needed(&at("block_count"))?,
        heads,
        kv_heads: keys.count(&at("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        mlp: keys.needed(&at("feed_forward_length"))?,
        rms_eps: short(keys.number(&at("attention.layer_norm_rms_epsilon"))?)
            .ok_or_else(|| keys.wrong(&at("attention.layer_norm_rms_epsilon"), "a number"))?,
        rope_theta: short(keys.number(&at("rope.freq_base"))?).unwrap_or(1e4),
        tied: !archive.tensors().contains_key("output.weight"),
        qkv_bias: kind == "qwen2" || archive.tensors().contains_key("blk.0.attn_q.bias"),
        positions: keys.needed(&at("context_length"))?,
        ..LlmConfig::default()
    })
}

/// The number that was meant, where the file has it in 4 bytes: 1e-5 and not 9.999999747378752e-6.
fn short(x: Option<f64>) -> Option<f64> {
    let x = x?;
    let near = (x as f32).to_string().parse().unwrap_or(x);
    Some(if f64::from(x as f32) == x { near } else { x })
}
