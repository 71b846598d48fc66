//! Steps of training: `cargo run --release --example 4_training_step`.
//!
//! `ett-train` repeats `train::step` with batches from a data set, in every stage. Here the stage `text` of a tiny model
//! repeats it with one batch: its language model learns two sequences by heart.

use std::error::Error;
use std::sync::Arc;

use ett::backend::{Cpu, Stream};
use ett::config::{Config, StageKind};
use ett::feed::Batch;
use ett::model::{Ett, FlatBatch, Packed, Part};
use ett::tensor::{Block, Parts};
use ett::train::{Counts, Hyper, Loss, Optimizer, Stage, StepState, step};

const STEPS: usize = 20;

/// The sizes of a model that is trained in milliseconds.
fn tiny() -> Config {
    let mut cfg = Config::default();
    let t = &mut cfg.tokenizer;
    (t.ch, t.ch_mult, t.num_res_blocks, t.z_channels, t.norm_groups) = (8, vec![1, 1], 1, 8, 2);
    (cfg.quantizer.codes, cfg.quantizer.dim) = (16, 8);
    cfg.lpips.widths = [4; 5];
    cfg.discriminator.ndf = 4;
    let l = &mut cfg.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (32, 32, 2, 2, 1, 16, 64);
    l.init_std = 0.05;
    cfg
}

/// Ends the example, and the test that runs it, with the error.
pub fn main() -> Result<(), Box<dyn Error>> {
    let dev = Arc::new(Cpu::new(0)?);
    let mut model = Ett::new(&tiny(), dev.clone())?;
    let stage = Stage::new(StageKind::Text, &model)?;
    model.params.train(&stage.trained())?;
    println!("the stage trains {}", stage.trained().join(", "));

    // Two sequences of tokens below 32: what is read only, then what the model learns to continue with. One copy brings
    // a batch to the device, and `Packed` finds its tensors there.
    let sequence =
        |first: i32| vec![Part::context(vec![first]), Part::target((first + 1..first + 12).collect())];
    let rows = FlatBatch::new(&[sequence(2), sequence(17)], &[], 16)?;
    let mut block = Block::default();
    rows.write(&mut block);
    let block = block.upload(&*dev, Stream::COMPUTE)?;
    let packed = Packed::of(&mut Parts::of(&block), rows.sizes())?;
    let batch = [Batch { images: vec![], packed: Some(packed), most: None }];

    let hyper = Hyper { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.01, ema_decay: 0.0, clip: 1.0 };
    let optimizer = Optimizer::new(&model.params, &stage.groups, hyper)?;
    // The weights of the losses, their denominators and the learning rates, which kernels read from the device.
    let mut state = StepState::new(&*dev, model.params.precision().acc)?;
    stage.recipe.weights(&model, &mut state, batch.len());
    Counts::new(&model, &batch, rows.tokens(), 0).set(&mut state);
    optimizer.prepare(&mut state, 0.01);
    state.send(&*dev)?;

    let mut losses = Vec::new();
    for n in 0..STEPS {
        let out = step(&mut model, &stage.recipe, &batch, &state, &optimizer, None)?;
        let values = out.read_later(&*dev)?.wait()?;
        assert!(!values.skipped, "step {n} was skipped: a value was not finite");
        losses.push(values.losses[&Loss::Cap]);
    }
    let (first, last) = (losses[0], losses[STEPS - 1]);
    println!("loss {first:.3} to {last:.3} nats a token in {STEPS} steps");
    assert!(last < 0.5 * first, "the model has not learnt");
    assert_eq!(optimizer.steps(&*dev)?, STEPS as u64);
    Ok(())
}
