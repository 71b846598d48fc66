//! Steps of training: `cargo run --release --example 4_training_step`.
//!
//! `ett-train` repeats `train::step` with batches from a data set. Here the tokenizer stage of a tiny model repeats it
//! with one batch of made-up pictures: encoder, quantizer, decoder, their losses and the discriminator.

use std::error::Error;
use std::sync::Arc;

use ett::backend::{Cpu, Role};
use ett::config::{Config, StageKind};
use ett::feed::Batch;
use ett::model::Ett;
use ett::tensor::Tensor;
use ett::train::{Counts, Hyper, Loss, Optimizer, Stage, StepState, step};

const PICTURES: usize = 2;
const SIDE: usize = 16;
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
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (32, 16, 1, 2, 1, 8, 16);
    cfg.data.size = SIDE;
    cfg
}

/// Ends the example, and the test that runs it, with the error.
pub fn main() -> Result<(), Box<dyn Error>> {
    let dev = Arc::new(Cpu::new(0)?);
    let cfg = tiny();
    let mut model = Ett::new(&cfg, dev.clone())?;
    let stage = Stage::new(StageKind::Tokenizer, &model)?;
    model.params.train(&stage.trained())?;
    println!("the stage trains {}", stage.trained().join(", "));

    // [B, H, W, 3] bytes, as they come from a data set: colours that change slowly.
    let pixel = |i: usize| (8 * (i / (3 * SIDE) % SIDE) + 5 * (i / 3 % SIDE) + 60 * (i % 3)) as u8;
    let bytes: Vec<u8> = (0..PICTURES * SIDE * SIDE * 3).map(pixel).collect();
    let images = Tensor::from_host(&*dev, Role::Input, &bytes, [PICTURES, SIDE, SIDE, 3])?;
    let batch = [Batch { images: vec![images], packed: None }];

    let hyper = Hyper { betas: [0.5, 0.9], eps: 1e-8, weight_decay: 0.0, ema_decay: 0.0, clip: 1.0 };
    let main = Optimizer::new(&model.params, &stage.groups, hyper)?;
    let disc = Optimizer::new(&model.params, &["discriminator"], hyper)?;
    // The weights of the losses, their denominators and the learning rates, which kernels read from the device.
    let mut state = StepState::new(&*dev, model.params.precision().acc)?;
    stage.recipe.weights(&model, &mut state, batch.len());
    Counts::new(&model, &batch, 0, 0).set(&mut state);
    main.prepare(&mut state, 3e-3);
    disc.prepare(&mut state, 1e-3);
    state.send(&*dev)?;

    let mut losses = Vec::new();
    for n in 0..STEPS {
        let out = step(&mut model, &stage.recipe, &batch, &state, &main, Some(&disc))?;
        let values = out.read_later(&*dev)?.wait()?;
        assert!(!values.skipped, "step {n} was skipped: a value was not finite");
        losses.push(values.losses[&Loss::Rec]);
    }
    let (first, last) = (losses[0], losses[STEPS - 1]);
    println!("reconstruction loss {first:.3} to {last:.3} in {STEPS} steps");
    assert!(last < 0.7 * first, "the model has not learnt");
    assert_eq!(main.steps(&*dev)?, STEPS as u64);
    Ok(())
}
