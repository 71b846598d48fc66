//! A Qwen2-style decoder on flat packed batches (arXiv 2412.15115).

use crate::autograd::{Tape, Var};
use crate::config::LlmConfig;
use crate::error::Result;
use crate::nn::{Init, Linear, Param, ParamBuilder, Params, RmsNorm};
use crate::ops::{self, Heads, Rotary, Seqs};
use crate::tensor::Tensor;

#[derive(Clone)]
struct Block {
    input_norm: RmsNorm,
    qkv: Linear,
    out: Linear,
    post_norm: RmsNorm,
    gate_up: Linear,
    down: Linear,
}

/// Embedding, blocks, final norm; the head is the embedding again.
pub struct Llm {
    embed: Param,
    blocks: Vec<Block>,
    norm: RmsNorm,
    cfg: LlmConfig,
}

impl Llm {
    /// Registers `model.*` in group `llm`, under Hugging Face's names.
    pub fn new(b: &mut ParamBuilder, cfg: &LlmConfig) -> Self {
        b.group("llm");
        let init = Init::Normal(0.0, cfg.init_std);
        let zero = Some(Init::Constant(0.0));
        let (c, wq, wk) = (cfg.width, cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
        let embed = b.add("model.embed_tokens.weight", [cfg.vocab, c], init);
        let blocks = (0..cfg.layers)
            .map(|i| {
                let at = |s: &str| format!("model.layers.{i}.{s}");
                let qkv =
                    [("q", wq), ("k", wk), ("v", wk)].map(|(n, w)| (at(&format!("self_attn.{n}_proj")), w));
                let gate_up = ["gate", "up"].map(|n| (at(&format!("mlp.{n}_proj")), cfg.mlp));
                Block {
                    input_norm: RmsNorm::new(b, &at("input_layernorm"), c, cfg.rms_eps),
                    qkv: Linear::stacked(b, &qkv, c, &[c], zero, init),
                    out: Linear::new(b, &at("self_attn.o_proj"), wq, c, None, init),
                    post_norm: RmsNorm::new(b, &at("post_attention_layernorm"), c, cfg.rms_eps),
                    gate_up: Linear::stacked(b, &gate_up, c, &[c], None, init),
                    down: Linear::new(b, &at("mlp.down_proj"), cfg.mlp, c, None, init),
                }
            })
            .collect();
        let norm = RmsNorm::new(b, "model.norm", c, cfg.rms_eps);
        Llm { embed, blocks, norm, cfg: cfg.clone() }
    }

    /// The embedding `[V, C]`, which is also the head.
    pub fn embedding(&self, t: &Tape, p: &Params) -> Result<Var> {
        p.var(t, self.embed)
    }

    /// `x` `[N, C]` through all blocks and the final norm: `[N, C]`. `position` `[N]` i32.
    pub fn forward(&self, t: &Tape, p: &Params, x: &Var, position: &Tensor, seqs: &Seqs) -> Result<Var> {
        let cfg = &self.cfg;
        let rotary =
            Rotary { heads: cfg.heads + cfg.kv_heads, head_dim: cfg.head_dim, theta: cfg.rope_theta };
        let heads = Heads {
            query: cfg.heads,
            kv: cfg.kv_heads,
            dim: cfg.head_dim,
            scale: 1.0 / (cfg.head_dim as f64).sqrt(),
            causal: true,
        };
        let mut h = x.clone();
        let Some(first) = self.blocks.first() else { return self.norm.forward(t, p, &h) };
        let mut y = first.input_norm.forward(t, p, &h)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let next = self.blocks.get(i + 1).map_or(self.norm, |b| b.input_norm);
            let (block, p, position, seqs) = (block.clone(), p.clone(), position.clone(), seqs.clone());
            let outs = t.block(&[&h, &y], move |t, hy| {
                let qkv = ops::rope(t, &block.qkv.forward(t, &p, &hy[1])?, &position, rotary)?;
                let a = block.out.forward(t, &p, &ops::attention(t, &qkv, &seqs, heads)?)?;
                let (h, y) = block.post_norm.add_forward(t, &p, &a, &hy[0])?;
                let m = ops::swiglu(t, &block.gate_up.forward(t, &p, &y)?)?;
                let m = block.down.forward(t, &p, &m)?;
                let (h, y) = next.add_forward(t, &p, &m, &h)?;
                Ok(vec![h, y])
            })?;
            [h, y] = outs.try_into().unwrap_or_else(|_| unreachable!("a block gives a sum and its norm"));
        }
        Ok(y)
    }
}
