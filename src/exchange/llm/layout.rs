//! The tensors of a model, and whether files hold exactly these.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use crate::config::LlmConfig;
use crate::error::{Error, Result};
use crate::formats::{Archive, Change, Selection};
use crate::io::weights::misfit;

/// The embedding, and the head that a tied model may repeat.
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Names and shapes of all tensors.
pub(super) fn layout(cfg: &LlmConfig) -> Vec<(String, Vec<usize>)> {
    let (c, wq, wk) = (cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let mut all = vec![(EMBEDDING.to_string(), vec![cfg.vocab, c]), ("model.norm.weight".into(), vec![c])];
    if !cfg.tied {
        all.push((HEAD.into(), vec![cfg.vocab, c]));
    }
    for i in 0..cfg.layers {
        let mut add = |name: &str, dims: Vec<usize>| all.push((format!("model.layers.{i}.{name}"), dims));
        for (name, rows) in [("q", wq), ("k", wk), ("v", wk)] {
            add(&format!("self_attn.{name}_proj.weight"), vec![rows, c]);
            if cfg.qkv_bias {
                add(&format!("self_attn.{name}_proj.bias"), vec![rows]);
            }
        }
        add("self_attn.o_proj.weight", vec![c, wq]);
        add("mlp.gate_proj.weight", vec![cfg.mlp, c]);
        add("mlp.up_proj.weight", vec![cfg.mlp, c]);
        add("mlp.down_proj.weight", vec![c, cfg.mlp]);
        add("input_layernorm.weight", vec![c]);
        add("post_attention_layernorm.weight", vec![c]);
    }
    all
}

/// The tensors of one file or several.
pub(super) struct Tensors<'a> {
    /// The path in error messages.
    pub path: &'a Path,
    /// The file of every tensor.
    pub all: BTreeMap<String, Arc<Archive>>,
    /// The name in the files of a tensor with this public name.
    pub spelled: fn(&str) -> String,
}

impl Tensors<'_> {
    /// The tensors of a model under public names. Missing, extra and misshapen ones and those that are not floats give
    /// a single error that names them; `why` explains extra ones.
    pub fn select(
        &self,
        cfg: &LlmConfig,
        change: impl Fn(&str) -> Change,
        why: impl Fn(&str) -> &'static str,
    ) -> Result<Selection> {
        let (mut problems, mut known) = (Vec::new(), BTreeSet::new());
        let mut selection = Selection::new(self.path);
        for (public, dims) in layout(cfg) {
            let name = (self.spelled)(&public);
            match self.all.get(&name).and_then(|file| Some((file, file.tensors().get(&name)?))) {
                None => problems.push(format!("missing `{name}` {dims:?}")),
                Some((_, info)) if info.dims != dims => {
                    problems.push(format!("`{name}` is {:?}, wanted {dims:?}", info.dims));
                }
                Some((_, info)) if !info.encoding.is_float() => {
                    problems.push(format!("`{name}` has type {}, wanted floats", info.encoding.name()));
                }
                Some((file, _)) => selection.add_changed(&public, file, &name, change(&public)),
            }
            known.insert(name);
        }
        let head = (self.spelled)(HEAD);
        if cfg.tied {
            known.insert(head.clone());
        }
        let extra = self.all.keys().filter(|name| !known.contains(*name) && !is_buffer(name));
        problems.extend(extra.map(|name| format!("unknown `{name}`{}", why(name))));
        if problems.is_empty() && cfg.tied && self.all.contains_key(&head) {
            problems.extend(self.differs(&head)?);
        }
        match problems.is_empty() {
            true => Ok(selection),
            false => Err(Error::weights(self.path, misfit("its configuration", problems))),
        }
    }

    /// How the head of a tied model differs from its embedding, if it does.
    fn differs(&self, head: &str) -> Result<Option<String>> {
        let embedding = (self.spelled)(EMBEDDING);
        let (Some(a), Some(b)) = (self.all.get(&embedding), self.all.get(head)) else { return Ok(None) };
        let same = match (a.raw(&embedding)?, b.raw(head)?) {
            (Some(a), Some(b)) => a == b,
            _ => {
                let (a, b) = (a.read(&embedding)?, b.read(head)?);
                let bits = |t: &[f64]| t.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                a.dims == b.dims && bits(&a.values) == bits(&b.values)
            }
        };
        let what = format!("`{head}` is not `{embedding}`, though the configuration ties them");
        Ok((!same).then_some(what))
    }
}

/// Tables that a model computes from its configuration.
pub(super) fn is_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}
