//! Runs that start from the weights which their configurations name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use ett::backend::Cpu;
use ett::config::{Config, StageConfig, StageKind};
use ett::eval::HeldOut;
use ett::exchange::{export_llm, export_tokenizer, load_config};
use ett::io::weights::read_file;
use ett::io::{History, Skill};
use ett::model::{is_of_llm, is_of_tokenizer};
use ett::nn::HostTensor;
use ett::train::{self, RunOptions};

use crate::common::{Outcome, Scratch};
use crate::run::{config, pictures};

const YAML: &str = "model:\n  class_path: IBQ\n  init_args:\n    ddconfig:\n      norm_groups: 4\n";

/// Runs stages of two steps each.
fn train(cfg: &Config, kinds: &[StageKind], out: &Path) -> ett::error::Result<()> {
    let mut cfg = cfg.clone();
    (cfg.train.eval_every, cfg.data.test) = (0, None);
    let stage = |&kind: &StageKind| StageConfig {
        lr: Some(1e-2),
        ema: kind == StageKind::Tokenizer,
        ..StageConfig::new(kind, 2, 3)
    };
    cfg.stage = kinds.iter().map(stage).collect();
    let o = RunOptions { out, init: None, quiet: true, evaluation: &HeldOut };
    train::run(&cfg, Arc::new(Cpu::new(1)?), &o).map(drop)
}

/// A finished run with averages, and its language model and tokenizer as other programs read them.
fn parts(dir: &Scratch) -> Outcome {
    pictures(&dir.path("data"));
    let mut cfg = config(&dir.path("data"));
    (cfg.llm.tied, cfg.llm.qkv_bias) = (false, false);
    train(&cfg, &[StageKind::Tokenizer, StageKind::Text], &dir.path("old"))?;
    export_llm(&dir.path("old"), &dir.path("llm"), None)?;
    for name in ["t.ckpt", "t.safetensors"] {
        export_tokenizer(&dir.path("old"), &dir.path(name), None)?;
    }
    // A checkpoint does not say how many groups its norms have.
    fs::write(dir.path("t.yaml"), YAML)?;
    Ok(())
}

/// A configuration without any size, but with these keys.
fn open(dir: &Scratch, init: &str, set: &[&str]) -> ett::error::Result<Config> {
    let path = dir.path("c.toml");
    let text = format!("[init]\n{init}\n[train]\nthreads = 1\n[data]\ntrain = \"data\"\nsize = 32\n");
    fs::write(&path, text).expect("a file");
    load_config(&path, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>())
}

type Tensors = BTreeMap<String, HostTensor>;

fn kept(file: &Path, keep: fn(&str) -> bool) -> Result<Tensors, Box<dyn std::error::Error>> {
    Ok(read_file(file)?.into_iter().filter(|(name, _)| keep(name)).collect())
}

#[test]
fn a_run_starts_from_the_parts_of_others() -> Outcome {
    let dir = Scratch::new();
    parts(&dir)?;
    let old = dir.path("old/model.safetensors");
    let (llm, tokenizer) = (kept(&old, is_of_llm)?, kept(&old, is_of_tokenizer)?);
    let averages = read_file(&dir.path("old/ema.safetensors"))?;
    let was = config(&dir.path("data"));
    for (i, from) in ["old", "t.ckpt", "t.safetensors"].into_iter().enumerate() {
        for averaged in [false, true] {
            let init = format!("llm = \"llm\"\ntokenizer = \"{from}\"\naverages = {averaged}");
            let cfg = open(&dir, &init, &[])?;
            assert_eq!((&cfg.tokenizer, cfg.quantizer.codes), (&was.tokenizer, was.quantizer.codes));
            assert_eq!(
                (cfg.quantizer.dim, cfg.discriminator.ndf),
                (was.quantizer.dim, was.discriminator.ndf)
            );
            assert_eq!((cfg.llm.width, cfg.llm.tied, cfg.llm.qkv_bias), (was.llm.width, false, false));
            // Its features are the random ones, which a new run makes again.
            assert_eq!((cfg.lpips.widths, &cfg.lpips.weights), (was.lpips.widths, &None));
            // Only the projector is trained.
            let out = dir.path(&format!("new-{i}-{averaged}"));
            train(&cfg, &[StageKind::Align], &out)?;
            let new = out.join("model.safetensors");
            assert!(kept(&new, is_of_llm)? == llm, "{from}: language model");
            let mut want = tokenizer.clone();
            if averaged {
                want.extend(averages.clone());
                assert!(want != tokenizer);
            }
            assert!(kept(&new, is_of_tokenizer)? == want, "{from}, averages {averaged}: tokenizer");
            let history = History::of(&ett::io::weights::TensorFile::open(&new)?).ok_or("a history")?;
            assert!(history.learnt.contains(&Skill::Reconstruct) && !history.unknown);
        }
    }
    Ok(())
}

#[test]
fn sizes_may_only_repeat_those_of_the_weights() -> Outcome {
    let dir = Scratch::new();
    parts(&dir)?;
    let init = "llm = \"llm\"\ntokenizer = \"t.safetensors\"";
    for (set, want) in [
        ("llm.width=99", "`llm.width` is 99, wanted 16 as in "),
        ("llm.vocab=256", "`llm.vocab` is 256, wanted 264 as in "),
        ("llm.tied=true", "`llm.tied` is true, wanted false as in "),
        ("quantizer.codes=32", "`quantizer.codes` is 32, wanted 16 as in "),
        ("tokenizer.ch_mult=[1, 1]", "`tokenizer.ch_mult` is [1, 1], wanted [1, 2] as in "),
    ] {
        let e = open(&dir, init, &[set]).expect_err(set).to_string();
        assert!(e.contains(want) && e.contains("leave the key out"), "{e}");
    }
    // Rows for more tokens are drawn, each as it would be in a model of this vocabulary.
    let set = ["llm.vocab=272", "llm.rope_theta=1000000", "llm.init_std=0.5", "train.seed=5"];
    let cfg = open(&dir, init, &set)?;
    train(&cfg, &[StageKind::Align], &dir.path("more"))?;
    let old = read_file(&dir.path("old/model.safetensors"))?;
    let new = read_file(&dir.path("more/model.safetensors"))?;
    for name in ["model.embed_tokens.weight", "lm_head.weight"] {
        let (old, new) = (&old[name], &new[name]);
        assert_eq!((&old.dims[..], &new.dims[..]), (&[264, 16][..], &[272, 16][..]));
        assert!(new.values[..264 * 16] == old.values[..]);
        assert!(new.values[264 * 16..].iter().all(|v| *v != 0.0));
    }
    Ok(())
}

#[test]
fn weights_that_are_missing_or_of_another_kind_are_named() -> Outcome {
    let dir = Scratch::new();
    parts(&dir)?;
    let refused = |init: &str, want: &str| {
        let e = open(&dir, init, &[]).expect_err(init).to_string();
        assert!(e.contains(want), "{init}: {e}");
    };
    refused("llm = \"nowhere\"", "No such file");
    refused("llm = \"t.safetensors\"", "`init.llm` names a folder");
    refused("tokenizer = \"llm\"", "holds no vision tokenizer of IBQ: it lacks `encoder.conv_in.weight`");
    refused("tokenizer = \"c.toml\"", "is in none of the formats safetensors, PyTorch and GGUF");
    // Without averages, they cannot be asked for.
    fs::remove_file(dir.path("old/ema.safetensors"))?;
    let cfg = open(&dir, "tokenizer = \"old\"\naverages = true", &["llm.width=16", "llm.layers=1"])?;
    let e = train(&cfg, &[StageKind::Tokenizer], &dir.path("x")).expect_err("no averages").to_string();
    assert!(e.contains("holds no averages of weights; set `init.averages = false`"), "{e}");
    assert!(!dir.path("x").exists(), "nothing is left of a run that did not begin");
    // What changed since the configuration was completed is found when the weights are read.
    let cfg = open(
        &dir,
        "llm = \"llm\"",
        &["tokenizer.ch=8", "tokenizer.norm_groups=4", "quantizer.codes=16", "lpips.widths=[4, 4, 4, 4, 4]"],
    )?;
    let file = dir.path("llm/model.safetensors");
    let mut bytes = fs::read(&file)?;
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&file, bytes)?;
    let e = train(&cfg, &[StageKind::Align], &dir.path("y")).expect_err("not a number").to_string();
    assert!(e.contains("1 of ") && e.contains("values that are not finite"), "{e}");
    Ok(())
}
