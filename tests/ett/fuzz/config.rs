//! A `config.json` of `transformers` beside the weights of a small model.

use std::fs;
use std::sync::OnceLock;

use ett::exchange::open_llm;
use ett::formats::{Encoding, FileTensor, write_safetensors};

use super::scratch;

/// Width, width of the MLP, rows of keys, vocabulary.
const C: usize = 8;
const F: usize = 12;
const K: usize = 4;
const V: usize = 16;

/// Writes weights, all zeros.
fn weights(path: &std::path::Path) {
    let mut all =
        vec![("model.embed_tokens.weight".to_string(), vec![V, C]), ("model.norm.weight".into(), vec![C])];
    for (name, dims) in [
        ("self_attn.q_proj.weight", vec![C, C]),
        ("self_attn.q_proj.bias", vec![C]),
        ("self_attn.k_proj.weight", vec![K, C]),
        ("self_attn.k_proj.bias", vec![K]),
        ("self_attn.v_proj.weight", vec![K, C]),
        ("self_attn.v_proj.bias", vec![K]),
        ("self_attn.o_proj.weight", vec![C, C]),
        ("mlp.gate_proj.weight", vec![F, C]),
        ("mlp.up_proj.weight", vec![F, C]),
        ("mlp.down_proj.weight", vec![C, F]),
        ("input_layernorm.weight", vec![C]),
        ("post_attention_layernorm.weight", vec![C]),
    ] {
        all.push((format!("model.layers.0.{name}"), dims));
    }
    let tensor = |(name, dims): (String, Vec<usize>)| {
        let bytes = 4 * dims.iter().product::<usize>();
        FileTensor { name, dims, encoding: Encoding::F32, bytes: Box::new(move || Ok(vec![0; bytes])) }
    };
    let tensors = all.into_iter().map(tensor).collect();
    ett::files::replace(path, |file| write_safetensors(file, tensors, Default::default())).expect("a file");
}

pub fn run(data: &[u8]) {
    static FOLDER: OnceLock<std::path::PathBuf> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = scratch("config");
        weights(&folder.join("model.safetensors"));
        folder
    });
    fs::write(folder.join("config.json"), data).expect("a file");
    let open =
        || open_llm(folder).map(|m| (m.config, m.architecture, m.ends, m.notes)).map_err(|e| e.to_string());
    let first = open();
    assert_eq!(first, open());
    if let Ok((config, ..)) = first {
        assert_eq!((config.vocab, config.width, config.mlp, config.layers), (V, C, F, 1));
        assert_eq!((config.heads * config.head_dim, config.kv_heads * config.head_dim), (C, K));
        assert!(config.rope_theta.is_finite() && config.rms_eps.is_finite());
    }
}
