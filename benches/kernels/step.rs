//! A whole tokenizer step of configs/easy-vqa.toml on random pictures.

use std::path::Path;
use std::sync::Arc;

use criterion::Throughput;
use ett::backend::Cpu;
use ett::config::{Config, StageKind};
use ett::feed::Batch;
use ett::model::Ett;
use ett::train::{Hyper, Optimizer, Stage, StepState, step};

use crate::common::{Bench, normal};

pub fn benches(b: &mut Bench) {
    // Some of its kernels are not on the GPU yet.
    if b.gpu {
        return;
    }
    // The folder of the package, or of an unpacked bundle on a GPU machine.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    let path = Path::new(&package).join("configs/easy-vqa.toml");
    let cfg = Config::load(&path, &[]).expect("the configuration is whole");
    let dev = Arc::new(Cpu::new(0).expect("threads"));
    let mut model = Ett::new(&cfg, dev.clone()).expect("the model fits");
    let stage = Stage::new(StageKind::Tokenizer, &model).expect("a stage");
    model.params.train(&stage.trained()).expect("memory");
    let batch = 16;
    let prec = model.params.precision();
    let images = normal(&*dev, prec.act, [batch, cfg.data.size, cfg.data.size, 3], 1).expect("memory");
    let parts = [Batch { images: vec![images], packed: None, most: None }];
    let mut state = StepState::new(&*dev, prec.acc).expect("memory");
    stage.recipe.weights(&model, &mut state, 1);
    let h = Hyper { betas: [0.5, 0.9], eps: 1e-8, weight_decay: 0.0, ema_decay: 0.0, clip: 1.0 };
    let main = Optimizer::new(&model.params, &stage.groups, h).expect("groups");
    let disc = Optimizer::new(&model.params, &["discriminator"], h).expect("groups");
    let mut group = b.criterion().benchmark_group("tokenizer_step");
    group.throughput(Throughput::Elements(batch as u64));
    group.bench_function(format!("batch {batch}, images"), |b| {
        b.iter(|| {
            main.prepare(&mut state, 1e-4);
            disc.prepare(&mut state, 1e-4);
            state.send(&*dev).expect("a copy");
            step(&mut model, &stage.recipe, &parts, &state, &main, Some(&disc)).expect("a step")
        });
    });
    group.finish();
}
