//! A Qwen2-style decoder on flat packed batches (arXiv 2412.15115).

use crate::autograd::{Tape, Var};
use crate::backend::{Cast, Kernels, Stream};
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
    /// The same, and they are stored in a cache as its prompts.
    Kept(&'a Seqs, &'a Cache),
    /// A cache, into which those of the batch, one row per sequence, are stored first.
    Cached(&'a Cache),
}

impl Keys<'_> {
    /// Attention of layer `layer` for `qkv` `[N, (query + 2 kv) D]`.
    fn attention(self, t: &Tape, layer: usize, qkv: &Var, h: Heads) -> Result<Var> {
        match self {
            Keys::Batch(seqs) => ops::attention(t, qkv, seqs, h),
            Keys::Kept(seqs, cache) => {
                cache.keep_prompts(t.dev(), layer, qkv.value(), h)?;
                ops::attention(t, qkv, seqs, h)
            }
            Keys::Cached(cache) => {
                cache.keep_column(t.dev(), layer, qkv.value(), h)?;
                let rows =
                    cache.layers[layer].reshape([cache.lengths.len() * cache.slots.max, cache.width])?;
                ops::cached_attention(t, qkv, &rows, &cache.queries, &cache.slots, h)
            }
        }
    }
}

/// Keys and values of all positions of S sequences so far. Each sequence has a slot with a column for every position
/// it may reach. Prompts end at the same column of all slots, so that a decoding step writes a single column.
pub struct Cache {
    /// `[S, columns * 2 kv D]` per layer: key and value of a position side by side.
    layers: Vec<Tensor>,
    /// Size of the key and value of a position, 2 kv D.
    width: usize,
    /// Length of each sequence.
    lengths: Vec<usize>,
    /// Columns in use.
    columns: usize,
    /// One query per sequence.
    queries: Seqs,
    slots: Slots,
}

impl Cache {
    fn new(t: &Tape, cfg: &LlmConfig, prompts: Vec<usize>, more: usize) -> Result<Self> {
        if prompts.is_empty() || prompts.contains(&0) {
            let got = format!("sequences of {prompts:?} tokens");
            return Err(Error::arg("prefill", "prompts", got, "at least one token in each"));
        }
        let (s, width) = (prompts.len(), 2 * cfg.kv_heads * cfg.head_dim);
        let columns = prompts.iter().copied().max().unwrap_or(0);
        let offsets: Vec<usize> = prompts.iter().map(|n| columns - n).collect();
        let slots = Slots::new(t.dev(), &offsets, columns.saturating_add(more))?;
        let layers =
            (0..cfg.layers).map(|_| t.act([s, slots.max.saturating_mul(width)])).collect::<Result<_>>()?;
        let queries = Seqs::new(t.dev(), &vec![1; s])?;
        Ok(Cache { layers, width, lengths: prompts, columns, queries, slots })
    }

    /// The number of sequences, S.
    pub fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// Adds a column for the next position of every sequence.
    fn advance(&mut self, dev: &dyn Kernels) -> Result<()> {
        if self.columns == self.slots.max {
            let got = format!("full, with {} columns", self.columns);
            return Err(Error::arg("decode", "cache", got, "one made for more positions"));
        }
        self.columns += 1;
        self.lengths.iter_mut().for_each(|n| *n += 1);
        self.slots.set(dev, &self.lengths)
    }

    /// Copies the keys and values of whole sequences into the cache.
    fn keep_prompts(&self, dev: &dyn Kernels, layer: usize, qkv: &Tensor, h: Heads) -> Result<()> {
        let kv = qkv.columns(h.query * h.dim, self.width)?;
        let mut at = 0;
        for (s, &n) in self.lengths.iter().enumerate() {
            let slot = self.layers[layer].rows(s, 1)?.reshape([self.slots.max, self.width])?;
            let (x, y) = (kv.rows(at, n)?, slot.rows(self.columns - n, n)?);
            dev.cast(Stream::COMPUTE, &Cast { x: x.view(), y: y.out() })?;
            at += n;
        }
        Ok(())
    }

    /// Copies the keys and values of one position of every sequence into the cache.
    fn keep_column(&self, dev: &dyn Kernels, layer: usize, qkv: &Tensor, h: Heads) -> Result<()> {
        let x = qkv.columns(h.query * h.dim, self.width)?;
        let y = self.layers[layer].columns((self.columns - 1) * self.width, self.width)?;
        dev.cast(Stream::COMPUTE, &Cast { x: x.view(), y: y.out() })
    }
}

/// Embedding, blocks and final norm; the output head is tied to the embedding.
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

    /// The embedding `[V, C]`, which is also the output head.
    pub fn embedding(&self, t: &Tape, p: &Params) -> Result<Var> {
        p.var(t, self.embed)
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
        let prompts = cu.windows(2).map(|w| (w[1] - w[0]) as usize).collect();
        let cache = Cache::new(t, &self.cfg, prompts, more)?;
        Ok((self.forward(t, p, x, position, Keys::Kept(seqs, &cache))?, cache))
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
