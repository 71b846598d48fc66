//! A Qwen2-style decoder on flat packed batches (arXiv 2412.15115).

use crate::autograd::{Tape, Var};
use crate::backend::{Kernels, PutRows, Role, Stream};
use crate::config::LlmConfig;
use crate::error::{Error, Result};
use crate::nn::{Init, Linear, Param, ParamBuilder, Params, RmsNorm};
use crate::ops::{self, Heads, Rotary, Seqs, Slots};
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

impl Block {
    /// Runs the block on the residual sum so far and its norm, both `[N, C]`; `next` is the norm after the block.
    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        t: &Tape,
        p: &Params,
        [h, y]: [&Var; 2],
        next: RmsNorm,
        position: &Tensor,
        rotary: Rotary,
        attend: impl Fn(&Var) -> Result<Var>,
    ) -> Result<Vec<Var>> {
        let qkv = ops::rope(t, &self.qkv.forward(t, p, y)?, position, rotary)?;
        let a = self.out.forward(t, p, &attend(&qkv)?)?;
        let (h, y) = self.post_norm.add_forward(t, p, &a, h)?;
        let m = ops::swiglu(t, &self.gate_up.forward(t, p, &y)?)?;
        let m = self.down.forward(t, p, &m)?;
        let (h, y) = next.add_forward(t, p, &m, &h)?;
        Ok(vec![h, y])
    }
}

/// Source of the keys and values of attention.
#[derive(Clone, Copy)]
pub enum Keys<'a> {
    /// The batch itself, which holds whole sequences.
    Batch(&'a Seqs),
    /// The same, and they are stored in a cache, each position in the row of the third `[N]` i32; negative: in none.
    Kept(&'a Seqs, &'a Cache, &'a Tensor),
    /// A cache, into which those of the batch, one row per sequence, are stored first.
    Cached(&'a Cache),
}

impl Keys<'_> {
    /// Attention of layer `layer` for `qkv` `[N, (query + 2 kv) D]`.
    fn attention(self, t: &Tape, layer: usize, qkv: &Var, h: Heads) -> Result<Var> {
        match self {
            Keys::Batch(seqs) => ops::attention(t, qkv, seqs, h),
            Keys::Kept(seqs, cache, rows) => {
                cache.keep(t.dev(), layer, qkv.value(), h, rows)?;
                ops::attention(t, qkv, seqs, h)
            }
            Keys::Cached(cache) => {
                cache.keep(t.dev(), layer, qkv.value(), h, &cache.slots.row)?;
                ops::cached_attention(t, qkv, &cache.layers[layer], &cache.queries, &cache.slots, h)
            }
        }
    }
}

/// Keys and values of all positions of S sequences so far. Each sequence has a slot with a row for every position that
/// it may reach, from its first position on. Which rows a step reads and writes is known on the device only, so that
/// the work of a step is the same every time.
pub struct Cache {
    /// `[S * max, 2 kv D]` per layer: key and value of a position side by side.
    layers: Vec<Tensor>,
    /// Size of the key and value of a position, 2 kv D.
    width: usize,
    /// Positions of the longest sequence.
    used: usize,
    /// One query per sequence.
    queries: Seqs,
    slots: Slots,
}

impl Cache {
    /// A cache for prompts of these lengths and `more` positions.
    fn new(t: &Tape, cfg: &LlmConfig, prompts: &[usize], more: usize) -> Result<Self> {
        if prompts.is_empty() || prompts.contains(&0) {
            let got = format!("sequences of {prompts:?} tokens");
            return Err(Error::arg("prefill", "prompts", got, "at least one token in each"));
        }
        let (s, width) = (prompts.len(), 2 * cfg.kv_heads * cfg.head_dim);
        let used = prompts.iter().copied().max().unwrap_or(0);
        let slots = Slots::new(t.dev(), prompts, used.saturating_add(more))?;
        let layers =
            (0..cfg.layers).map(|_| t.act([s.saturating_mul(slots.max), width])).collect::<Result<_>>()?;
        let queries = Seqs::new(t.dev(), &vec![1; s])?;
        Ok(Cache { layers, width, used, queries, slots })
    }

    /// The number of sequences, S.
    pub fn sequences(&self) -> usize {
        self.slots.len.dims().numel()
    }

    /// The rows `[n]` of the prompts' positions in a flat batch of n rows, of which the last may be padding.
    fn prompt_rows(&self, dev: &dyn Kernels, prompts: &[usize], n: usize) -> Result<Tensor> {
        // `Slots::new` has checked that rows fit.
        let rows = prompts.iter().enumerate().flat_map(|(s, &len)| {
            let start = s * self.slots.max;
            (start..start + len).map(|row| row as i32)
        });
        let rows: Vec<i32> = rows.chain(std::iter::repeat(-1)).take(n).collect();
        Tensor::from_host(dev, Role::Input, &rows, [n])
    }

    /// Adds a row for the next position of every sequence.
    fn advance(&mut self, dev: &dyn Kernels) -> Result<()> {
        if self.used == self.slots.max {
            let got = format!("full, with {} positions", self.used);
            return Err(Error::arg("decode", "cache", got, "one made for more positions"));
        }
        self.used += 1;
        self.slots.advance(dev)
    }

    /// Copies the keys and values of `qkv` `[N, (query + 2 kv) D]` into the rows `[N]` i32 of the cache.
    fn keep(&self, dev: &dyn Kernels, layer: usize, qkv: &Tensor, h: Heads, rows: &Tensor) -> Result<()> {
        let x = qkv.columns(h.query * h.dim, self.width)?;
        dev.put_rows(Stream::COMPUTE, &PutRows { x: x.view(), idx: rows.view(), y: self.layers[layer].acc() })
    }
}

/// Embedding, blocks, final norm and output head, which may be the embedding.
pub struct Llm {
    embed: Param,
    head: Param,
    blocks: Vec<Block>,
    norm: RmsNorm,
    cfg: LlmConfig,
}

impl Llm {
    /// Registers `model.*` in group `llm`, under Hugging Face's names.
    pub fn new(b: &mut ParamBuilder, cfg: &LlmConfig) -> Self {
        b.group("llm");
        let init = Init::Normal(0.0, cfg.init_std);
        let bias = cfg.qkv_bias.then_some(Init::Constant(0.0));
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
                    qkv: Linear::stacked(b, &qkv, c, &[c], bias, init),
                    out: Linear::new(b, &at("self_attn.o_proj"), wq, c, None, init),
                    post_norm: RmsNorm::new(b, &at("post_attention_layernorm"), c, cfg.rms_eps),
                    gate_up: Linear::stacked(b, &gate_up, c, &[c], None, init),
                    down: Linear::new(b, &at("mlp.down_proj"), cfg.mlp, c, None, init),
                }
            })
            .collect();
        let norm = RmsNorm::new(b, "model.norm", c, cfg.rms_eps);
        let head = if cfg.tied { embed } else { b.add("lm_head.weight", [cfg.vocab, c], init) };
        Llm { embed, head, blocks, norm, cfg: cfg.clone() }
    }

    /// The embedding `[V, C]`.
    pub fn embedding(&self, t: &Tape, p: &Params) -> Result<Var> {
        p.var(t, self.embed)
    }

    /// The output head `[V, C]`.
    pub fn head(&self, t: &Tape, p: &Params) -> Result<Var> {
        p.var(t, self.head)
    }

    /// Applies all blocks and the final norm to `x` `[N, C]`: `[N, C]`. `position` is `[N]` i32.
    pub fn forward(&self, t: &Tape, p: &Params, x: &Var, position: &Tensor, keys: Keys) -> Result<Var> {
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
            let outs = match keys {
                Keys::Batch(seqs) => {
                    let (block, p) = (block.clone(), p.clone());
                    let (position, seqs) = (position.clone(), seqs.clone());
                    t.block(&[&h, &y], move |t, hy| {
                        let attend = |qkv: &Var| Keys::Batch(&seqs).attention(t, i, qkv, heads);
                        block.run(t, &p, [&hy[0], &hy[1]], next, &position, rotary, attend)
                    })?
                }
                // Caches are for inference only, where nothing is recomputed.
                keys => {
                    let attend = |qkv: &Var| keys.attention(t, i, qkv, heads);
                    block.run(t, p, [&h, &y], next, position, rotary, attend)?
                }
            };
            [h, y] = outs.try_into().unwrap_or_else(|_| unreachable!("a block gives a sum and its norm"));
        }
        Ok(y)
    }

    /// [`Llm::forward`] of whole prompts on an inference tape. Also returns the cache from which [`Llm::decode`]
    /// continues for up to `more` positions. Waits for the device.
    pub fn prefill(
        &self,
        t: &Tape,
        p: &Params,
        x: &Var,
        position: &Tensor,
        seqs: &Seqs,
        more: usize,
    ) -> Result<(Var, Cache)> {
        let cu = seqs.cu.to_host::<i32>(t.dev())?;
        let prompts: Vec<usize> = cu.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let cache = Cache::new(t, &self.cfg, &prompts, more)?;
        let rows = cache.prompt_rows(t.dev(), &prompts, x.dims().rows())?;
        Ok((self.forward(t, p, x, position, Keys::Kept(seqs, &cache, &rows))?, cache))
    }

    /// Decodes one more position of every sequence in a cache: `x` `[S, C]` to `[S, C]`.
    pub fn decode(&self, t: &Tape, p: &Params, x: &Var, cache: &mut Cache) -> Result<Var> {
        if x.dims().rows() != cache.sequences() {
            return Err(Error::arg("decode", "x", x.dims(), format!("{} rows", cache.sequences())));
        }
        cache.advance(t.dev())?;
        self.forward(t, p, x, &cache.slots.position, Keys::Cached(cache))
    }
}
