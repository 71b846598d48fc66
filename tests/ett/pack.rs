//! Small copies of trained models say and draw what their runs do.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ett::backend::{Cpu, DType};
use ett::config::{Config, StageConfig, StageKind};
use ett::data::Image;
use ett::eval::{HeldOut, evaluate_run};
use ett::exchange::{ModelOptions, export_model};
use ett::formats::Encoding;
use ett::infer::{Sampling, Trained, reconstruct};
use ett::io::weights::{TensorFile, read_file, write_file};
use ett::io::{self, Skill, inspect};
use ett::nn::Stored;
use ett::train::{self, RunOptions};

use crate::common::{Outcome, Scratch};
use crate::run::{config, pictures};

/// A run that has learnt everything, with averages.
fn run(dir: &Scratch, precision: &str) -> Result<Config, Box<dyn std::error::Error>> {
    pictures(&dir.path("data"));
    let mut cfg = config(&dir.path("data"));
    cfg.train.precision = precision.into();
    cfg.train.ema_decay = 0.5;
    cfg.train.eval_every = 0;
    cfg.stage = [StageKind::Tokenizer, StageKind::Align, StageKind::Chat, StageKind::Gen]
        .map(|kind| StageConfig {
            lr: Some(1e-2),
            ema: kind == StageKind::Tokenizer,
            ..StageConfig::new(kind, 4, 3)
        })
        .to_vec();
    let out = dir.path("run");
    let o = RunOptions::quiet(&out, &HeldOut);
    train::run(&cfg, Arc::new(Cpu::new(1)?), &o)?;
    Ok(cfg)
}

/// The copy that `ett export model` writes by default.
fn pack(run: &Path, out: &Path) -> ett::error::Result<()> {
    let o = ModelOptions { encoding: Some(Encoding::Bf16), training: false, licence: None };
    export_model(run, out, &o)
}

fn open(folder: &Path, ema: bool) -> ett::error::Result<Trained> {
    Trained::open(folder, Arc::new(Cpu::new(1)?), ema)
}

/// Bytes of the values of a safetensors file, and their number.
fn size(path: &Path) -> Result<(u64, usize), Box<dyn std::error::Error>> {
    let bytes = fs::read(path)?;
    let header = u64::from_le_bytes(bytes[..8].try_into()?);
    let count =
        TensorFile::open(path)?.tensors().values().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    Ok((bytes.len() as u64 - 8 - header, count))
}

/// In bf16 the run computes with its weights as the copy stores them.
#[test]
fn a_copy_of_a_bf16_run_says_and_draws_the_same() -> Outcome {
    let dir = Scratch::new();
    let cfg = run(&dir, "bf16")?;
    let small = dir.path("small");
    pack(&dir.path("run"), &small)?;
    let image = Image::open(dir.path("data/0.png"))?;
    let square = Image { height: 32, width: 32, pixels: image.pixels[..32 * 32 * 3].to_vec() };
    for ema in [false, true] {
        let (whole, copy) = (open(&dir.path("run"), ema)?, open(&small, ema)?);
        assert_eq!(copy.caption(&image)?, whole.caption(&image)?);
        assert_eq!(copy.ask(&image, "light?")?, whole.ask(&image, "light?")?);
        let sampling = Sampling::default();
        let draw = |t: &Trained| t.draw(&["a light square".into()], &sampling, &mut |_, _| ());
        assert!(draw(&copy)? == draw(&whole)?, "drawings");
        let of = |t: &Trained| reconstruct(&t.model, std::slice::from_ref(&square));
        assert!(of(&copy)? == of(&whole)?, "reconstructions and codes");
        assert_eq!(copy.lacks(Skill::Draw), None);
    }
    // Evaluated as the run was, with its averages beside its weights.
    let evaluated = |folder: &Path, out: &str| {
        let mut trained = open(folder, false)?;
        evaluate_run(&mut trained, Some(&dir.path("data")), None, &dir.path(out))
    };
    let (whole, copy) = (evaluated(&dir.path("run"), "whole")?, evaluated(&small, "copy")?);
    assert_eq!(copy.reconstructed_by, "averages of the weights");
    assert_eq!((copy.mse, copy.caption_loss, copy.accuracy), (whole.mse, whole.caption_loss, whole.accuracy));
    // The features that stand in for LPIPS come from a fixed seed.
    assert_eq!(copy.perceptual, whole.perceptual);

    let kept = io::run_config(&small)?;
    assert!(kept.data.train.as_os_str().is_empty() && kept.data.test.is_none());
    assert_eq!((kept.tokenizer, kept.llm, kept.stage.len()), (cfg.tokenizer, cfg.llm, 4));
    let names: Vec<String> = {
        let mut all: Vec<_> = fs::read_dir(&small)?
            .map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_, _>>()?;
        all.sort();
        all
    };
    assert_eq!(names, ["README.md", "config.toml", "ema.safetensors", "model.safetensors"]);
    let text = inspect(&small, false)?;
    assert!(
        text.contains("trained to ") && text.contains("only training needs: discriminator, lpips"),
        "{text}"
    );
    Ok(())
}

#[test]
fn a_copy_holds_the_rounded_weights_in_two_bytes_each() -> Outcome {
    let dir = Scratch::new();
    run(&dir, "f32")?;
    let small = dir.path("small");
    pack(&dir.path("run"), &small)?;
    for (name, stored) in [("model.safetensors", Stored::Master), ("ema.safetensors", Stored::Ema)] {
        let (bytes, count) = size(&small.join(name))?;
        assert_eq!(bytes, 2 * count as u64, "{name}");
        let (whole, copy) = (read_file(&dir.path("run").join(name))?, read_file(&small.join(name))?);
        assert!(copy.len() < whole.len(), "{name}: {stored:?}");
        for (tensor, t) in &copy {
            let want: Vec<f64> = whole[tensor].values.iter().map(|v| DType::Bf16.rounded(*v)).collect();
            assert!(t.values == want && t.dims == whole[tensor].dims, "{tensor}");
        }
        let left = whole.keys().filter(|k| !copy.contains_key(*k));
        assert!(left.into_iter().all(|k| k.starts_with("loss.")), "{name}");
    }
    let image = Image::open(dir.path("data/0.png"))?;
    let (whole, copy) = (open(&dir.path("run"), false)?, open(&small, false)?);
    let (_, a) = whole.reconstruct(&image, 64)?;
    let (_, b) = copy.reconstruct(&image, 64)?;
    let apart =
        a.pixels.iter().zip(&b.pixels).map(|(a, b)| (a - b).abs()).sum::<f32>() / a.pixels.len() as f32;
    assert!(apart < 0.05, "pixels are {apart} apart");

    // The last checkpoint gives the same copy; a copy of the copy too.
    let last = io::Checkpoints::latest(&dir.path("run"))?.ok_or("a checkpoint")?;
    for (from, to) in [(&last, "again"), (&small, "of the copy")] {
        pack(from, &dir.path(to))?;
        for name in ["config.toml", "model.safetensors", "ema.safetensors"] {
            assert!(fs::read(dir.path(to).join(name))? == fs::read(small.join(name))?, "{to}: {name}");
        }
    }
    Ok(())
}

#[test]
fn weights_are_only_missing_where_the_file_says_so() -> Outcome {
    let dir = Scratch::new();
    run(&dir, "f32")?;
    let (whole, small) = (dir.path("run"), dir.path("small"));
    pack(&whole, &small)?;
    let refused = |what: &str| match open(&dir.path("broken"), false) {
        Ok(_) => panic!("{what} was opened"),
        Err(e) => e.to_string(),
    };
    // Files without a note, as other programs write them.
    let tensors = |from: &Path, kept: fn(&str) -> bool| -> Outcome {
        let _ = fs::remove_dir_all(dir.path("broken"));
        fs::create_dir(dir.path("broken"))?;
        fs::copy(from.join("config.toml"), dir.path("broken/config.toml"))?;
        let all = read_file(&from.join("model.safetensors"))?.into_iter().filter(|(name, _)| kept(name));
        let all: Vec<_> = all.map(|(name, t)| (name, t, Encoding::F32)).collect();
        Ok(write_file(&dir.path("broken/model.safetensors"), &all)?)
    };
    tensors(&whole, |_| true)?;
    open(&dir.path("broken"), false)?;
    tensors(&whole, |name| !name.starts_with("loss.discriminator"))?;
    assert!(refused("a run without its discriminator").contains("missing `loss.discriminator."));
    tensors(&small, |_| true)?;
    assert!(refused("a copy without its note").contains("missing `loss."));
    // A copy is not written over anything, and is not made of nothing.
    let e = pack(&whole, &small).expect_err("a model is there").to_string();
    assert!(e.contains("name another folder with --out"), "{e}");
    let e = pack(&dir.path("data"), &dir.path("new")).expect_err("no model is there").to_string();
    assert!(e.contains("holds neither model.safetensors nor a checkpoint"), "{e}");
    assert!(!dir.path("new").exists());
    Ok(())
}
