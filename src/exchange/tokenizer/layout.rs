//! Names and shapes of IBQ's networks, as its public checkpoints have them, and their sizes read from the shapes.

use crate::config::TokenizerConfig;
use crate::exchange::named::{Named, Shape};

/// Largest width that a model may have.
const MAX_WIDTH: usize = 1 << 16;
/// Most levels of a tokenizer, and most blocks in one.
const MAX_LEVELS: usize = 8;
const MAX_BLOCKS: usize = 1024;

/// Collects the shapes of layers.
#[derive(Default)]
struct Shapes(Vec<Shape>);

impl Shapes {
    fn weight(&mut self, name: &str, dims: &[usize]) {
        self.0.push((format!("{name}.weight"), dims.to_vec()));
    }

    fn bias(&mut self, name: &str, c: usize) {
        self.0.push((format!("{name}.bias"), vec![c]));
    }

    fn conv(&mut self, name: &str, i: usize, o: usize, k: usize) {
        self.weight(name, &[o, i, k, k]);
        self.bias(name, o);
    }

    fn norm(&mut self, name: &str, c: usize) {
        self.weight(name, &[c]);
        self.bias(name, c);
    }

    fn residual(&mut self, name: &str, i: usize, o: usize) {
        self.norm(&format!("{name}.norm1"), i);
        self.conv(&format!("{name}.conv1"), i, o, 3);
        self.norm(&format!("{name}.norm2"), o);
        self.conv(&format!("{name}.conv2"), o, o, 3);
        if i != o {
            self.conv(&format!("{name}.nin_shortcut"), i, o, 1);
        }
    }

    fn attention(&mut self, name: &str, c: usize) {
        self.norm(&format!("{name}.norm"), c);
        for part in ["q", "k", "v", "proj_out"] {
            self.conv(&format!("{name}.{part}"), c, c, 1);
        }
    }

    fn level(&mut self, name: &str, i: usize, o: usize, blocks: usize, attends: bool) {
        for block in 0..blocks {
            self.residual(&format!("{name}.block.{block}"), if block == 0 { i } else { o }, o);
            if attends {
                self.attention(&format!("{name}.attn.{block}"), o);
            }
        }
    }

    fn middle(&mut self, name: &str, c: usize) {
        self.residual(&format!("{name}.block_1"), c, c);
        self.attention(&format!("{name}.attn_1"), c);
        self.residual(&format!("{name}.block_2"), c, c);
    }

    fn encoder(&mut self, t: &TokenizerConfig) {
        self.conv("encoder.conv_in", 3, t.ch, 3);
        let (last, mut c) = (t.ch_mult.len() - 1, t.ch);
        for (l, mult) in t.ch_mult.iter().enumerate() {
            let (name, o) = (format!("encoder.down.{l}"), t.ch * mult);
            self.level(&name, c, o, t.num_res_blocks, l == last);
            if l < last {
                self.conv(&format!("{name}.downsample.conv"), o, o, 3);
            }
            c = o;
        }
        self.middle("encoder.mid", c);
        self.norm("encoder.norm_out", c);
        self.conv("encoder.conv_out", c, t.z_channels, 3);
    }

    fn decoder(&mut self, t: &TokenizerConfig) {
        let last = t.ch_mult.len() - 1;
        let mut c = t.ch * t.ch_mult[last];
        self.conv("decoder.conv_in", t.z_channels, c, 3);
        self.middle("decoder.mid", c);
        for (l, mult) in t.ch_mult.iter().enumerate().rev() {
            let (name, o) = (format!("decoder.up.{l}"), t.ch * mult);
            self.level(&name, c, o, t.num_res_blocks + 1, l == last);
            if l > 0 {
                self.conv(&format!("{name}.upsample.conv"), o, o, 3);
            }
            c = o;
        }
        self.norm("decoder.norm_out", c);
        self.conv("decoder.conv_out", c, 3, 3);
    }
}

/// Encoder, codebook and decoder, in the order of the reference. `ch_mult` must not be empty.
pub(super) fn tokenizer(t: &TokenizerConfig, codes: usize, dim: usize) -> Vec<Shape> {
    let mut all = Shapes::default();
    all.encoder(t);
    all.decoder(t);
    all.weight("quantize.embedding", &[codes, dim]);
    all.conv("quant_conv", t.z_channels, dim, 1);
    all.conv("post_quant_conv", dim, t.z_channels, 1);
    all.0
}

/// The public name of a layer of the discriminator.
fn patch(layer: usize) -> String {
    format!("loss.discriminator.main.{layer}")
}

/// The discriminator with `ndf` channels in its first layer.
pub(super) fn discriminator(ndf: usize) -> Vec<Shape> {
    let mut all = Shapes::default();
    all.conv(&patch(0), 3, ndf, 4);
    for (layer, width) in [(2, ndf), (5, 2 * ndf), (8, 4 * ndf)] {
        all.weight(&patch(layer), &[2 * width, width, 4, 4]);
        all.norm(&patch(layer + 1), 2 * width);
    }
    all.conv(&patch(11), 8 * ndf, 1, 4);
    all.0
}

/// The running statistics of the discriminator: means and variances, and counts of batches.
pub(super) fn statistics(ndf: usize) -> (Vec<Shape>, Vec<String>) {
    let (mut running, mut counts) = (vec![], vec![]);
    for (layer, width) in [(3, 2 * ndf), (6, 4 * ndf), (9, 8 * ndf)] {
        for what in ["running_mean", "running_var"] {
            running.push((format!("{}.{what}", patch(layer)), vec![width]));
        }
        counts.push(format!("{}.num_batches_tracked", patch(layer)));
    }
    (running, counts)
}

/// Sizes of a tokenizer as its tensors have them.
pub(super) struct Sizes {
    /// Without the options of its GroupNorms, which are not in the tensors.
    pub tokenizer: TokenizerConfig,
    /// Number of codes.
    pub codes: usize,
    /// Dimensions of a code.
    pub dim: usize,
}

/// Reads the sizes of a tokenizer, or says in one phrase why they cannot be read.
pub(super) fn sizes(from: &Named) -> std::result::Result<Sizes, String> {
    let dims = |name: &str, axis: usize, rank: usize| -> std::result::Result<usize, String> {
        let name = format!("{name}.weight");
        let Some(dims) = from.dims(&name) else { return Err(nothing(from, &name)) };
        match dims.get(axis) {
            Some(&n) if dims.len() == rank && (1..=MAX_WIDTH).contains(&n) => Ok(n),
            _ => Err(format!("`{name}` is {dims:?}, wanted {rank} sizes, each from 1 to {MAX_WIDTH}")),
        }
    };
    let ch = dims("encoder.conv_in", 0, 4)?;
    let has = |name: String| from.dims(&name).is_some();
    let level = |l: &usize| has(format!("encoder.down.{l}.block.0.conv1.weight"));
    let levels = (0..=MAX_LEVELS).take_while(level).count();
    if !(1..=MAX_LEVELS).contains(&levels) {
        let many = if levels == 0 { "no".into() } else { format!("more than {MAX_LEVELS}") };
        return Err(format!("has {many} levels `encoder.down.*`, wanted 1 to {MAX_LEVELS}"));
    }
    let mut ch_mult = vec![];
    for l in 0..levels {
        let width = dims(&format!("encoder.down.{l}.block.0.conv1"), 0, 4)?;
        if !width.is_multiple_of(ch) {
            return Err(format!("level {l} of the encoder has {width} channels, wanted a multiple of {ch}"));
        }
        ch_mult.push(width / ch);
    }
    let block = |b: &usize| has(format!("encoder.down.0.block.{b}.conv1.weight"));
    let num_res_blocks = (0..MAX_BLOCKS).take_while(block).count();
    let (z_channels, encoded) = (dims("decoder.conv_in", 1, 4)?, dims("encoder.conv_out", 0, 4)?);
    if encoded == 2 * z_channels {
        return Err(format!(
            "its encoder has {encoded} output channels for {z_channels} of the decoder (`double_z`), \
             as a VAE has them; IBQ has equally many"
        ));
    }
    attention(from, levels)?;
    let tokenizer = TokenizerConfig { ch, ch_mult, num_res_blocks, z_channels, ..Default::default() };
    let dim = dims("quant_conv", 0, 4)?;
    let codebook = "quantize.embedding.weight";
    let codes = match from.dims(codebook) {
        Some(&[codes, _]) if (1..=i32::MAX as usize).contains(&codes) => codes,
        Some(dims) => return Err(format!("`{codebook}` is {dims:?}, wanted a row per code")),
        None => return Err(nothing(from, codebook)),
    };
    Ok(Sizes { tokenizer, codes, dim })
}

/// Says that a file holds something else.
fn nothing(from: &Named, missing: &str) -> String {
    let first: Vec<String> = from.names().take(3).map(|name| format!("`{name}`")).collect();
    let has = if first.is_empty() { "no tensors".into() } else { first.join(", ") };
    format!("holds no vision tokenizer of IBQ: it lacks `{missing}` and has {has}; name another file")
}

/// Fails unless there are attention blocks at the lowest level, and only there.
fn attention(from: &Named, levels: usize) -> std::result::Result<(), String> {
    for part in ["encoder.down", "decoder.up"] {
        for l in 0..levels {
            let there = from.dims(&format!("{part}.{l}.attn.0.q.weight")).is_some();
            if there != (l + 1 == levels) {
                let found = if there { "attention blocks" } else { "no attention blocks" };
                let last = levels - 1;
                return Err(format!(
                    "has {found} at `{part}.{l}`; ett has them at level {last} only, the lowest"
                ));
            }
        }
    }
    Ok(())
}

/// The channels of the discriminator's first layer; `None` if there is no discriminator.
pub(super) fn ndf(from: &Named) -> std::result::Result<Option<usize>, String> {
    if !from.names().any(|name| name.starts_with("loss.discriminator.")) {
        return Ok(None);
    }
    let first = "loss.discriminator.main.0.weight";
    match from.dims(first) {
        Some(&[n, 3, 4, 4]) if (1..=MAX_WIDTH / 8).contains(&n) => Ok(Some(n)),
        Some(dims) => Err(format!("`{first}` is {dims:?}, wanted [ndf, 3, 4, 4]")),
        None => Err(format!("has a part of a discriminator, but lacks `{first}`")),
    }
}
