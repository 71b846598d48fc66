//! Runs that start from the weights which their configurations name.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use ett::backend::Cpu;
use ett::config::{Config, StageConfig, StageKind};
use ett::eval::HeldOut;
use ett::exchange::{
    ModelOptions, Start, export_llm, export_model, export_tokenizer, load_config, open_tokenizer,
};
use ett::io::weights::{TensorFile, read_file};
use ett::io::{History, Skill};
use ett::model::Ett;
use ett::model::{is_of_llm, is_of_tokenizer};
use ett::nn::HostTensor;
use ett::nn::Stored;
use ett::train::{self, RunOptions};

use crate::common::{Outcome, Scratch};
use crate::run::{config, pictures};

/// A small language model for configurations that name none.
const LLM: [&str; 7] = [
    "llm.vocab=264",
    "llm.width=16",
    "llm.layers=1",
    "llm.heads=2",
    "llm.kv_heads=1",
    "llm.head_dim=8",
    "llm.mlp=24",
];

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
    let o = RunOptions::quiet(out, &HeldOut);
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
            let history = History::of(&TensorFile::open(&new)?).ok_or("a history")?;
            assert!(history.learnt.contains(&Skill::Reconstruct) && !history.unknown);
        }
    }
    Ok(())
}

/// The discriminator goes on where it was, and exports say what it has seen.
#[test]
fn statistics_of_the_discriminator_go_along() -> Outcome {
    let dir = Scratch::new();
    parts(&dir)?;
    let last = ett::io::Checkpoints::latest(&dir.path("old"))?.ok_or("a checkpoint")?;
    let was = TensorFile::open(&last.join("training.safetensors"))?;
    let exported = open_tokenizer(&dir.path("t.safetensors"))?;
    let names: Vec<String> = was.tensors().into_keys().filter(|n| n.starts_with("loss.")).collect();
    assert!(names.iter().any(|n| n.ends_with("running_var")) && names.iter().any(|n| n.contains("lecam")));
    for name in &names {
        assert_eq!(exported.state.read(name)?.values, was.read(name)?.values, "{name}");
    }
    let cfg = open(&dir, "tokenizer = \"t.safetensors\"", &LLM)?;
    train(&cfg, &[StageKind::Align], &dir.path("new"))?;
    let now = ett::io::Checkpoints::latest(&dir.path("new"))?.ok_or("a checkpoint")?;
    let now = TensorFile::open(&now.join("training.safetensors"))?;
    for name in &names {
        assert_eq!(now.read(name)?.values, was.read(name)?.values, "{name}");
    }
    // A copy for use has no discriminator, one for training has no checkpoint.
    let o = ModelOptions { encoding: None, training: true, licence: Some("MIT | x".into()) };
    export_model(&dir.path("old"), &dir.path("copy"), &o)?;
    let notes = export_tokenizer(&dir.path("copy"), &dir.path("copy.safetensors"), None)?;
    assert!(
        notes.iter().any(|n| n.contains("running statistics of an untrained discriminator")),
        "{notes:?}"
    );
    Ok(())
}

/// A copy of everything is the run's weights bit for bit, with a card that says where they come from.
#[test]
fn a_whole_model_has_a_card() -> Outcome {
    let dir = Scratch::new();
    parts(&dir)?;
    let cfg = open(&dir, "llm = \"llm\"\ntokenizer = \"t.safetensors\"", &[])?;
    train(&cfg, &[StageKind::Align], &dir.path("new"))?;
    let o = ModelOptions { encoding: None, training: true, licence: Some("apache-2.0\n# x".into()) };
    export_model(&dir.path("new"), &dir.path("copy"), &o)?;
    let (new, copy) = (dir.path("new/model.safetensors"), dir.path("copy/model.safetensors"));
    assert!(read_file(&new)? == read_file(&copy)?);
    let card = fs::read_to_string(dir.path("copy/README.md"))?;
    for part in [
        "license: \"apache-2.0 # x\"\n",
        "# new\n",
        "| codebook | 16 codes of 4 dimensions |",
        "| parameters of `discriminator` |",
        "- The language model started from the weights in `llm`.",
        "- The vision tokenizer started from the weights in `t.safetensors`.",
        "- The perceptual loss used random features.",
        "| align | 2 | 3 | 1e-2 |",
        "- folder `data`, pictures of 32x32",
        "None on held-out data were stored with the run.",
    ] {
        assert!(card.contains(part), "{part} in {card}");
    }
    // A copy of the copy knows as much; one for use only leaves out what it does not hold.
    let o = ModelOptions { encoding: None, training: false, licence: None };
    export_model(&dir.path("copy"), &dir.path("again"), &o)?;
    let again = fs::read_to_string(dir.path("again/README.md"))?;
    assert!(again.contains("`t.safetensors`") && !again.contains("`discriminator`"), "{again}");
    assert!(again.contains("license: other\n") && again.contains("The weights: not stated."), "{again}");
    // Other people's files stay.
    fs::create_dir(dir.path("mine"))?;
    fs::write(dir.path("mine/README.md"), "mine")?;
    let e = export_model(&dir.path("new"), &dir.path("mine"), &o).expect_err("a README").to_string();
    assert!(e.contains("has README.md already; name another folder with --out"), "{e}");
    assert_eq!(fs::read_to_string(dir.path("mine/README.md"))?, "mine");
    Ok(())
}

/// The perceptual loss of the tokenizer's file is used, unless `lpips.weights` names another, which then brings its own heads.
#[test]
fn the_perceptual_loss_comes_from_one_file() -> Outcome {
    const HEAD: &str = "loss.perceptual_loss.lin0.model.1.weight";
    let dir = Scratch::new();
    let ibq = crate::common::fixtures().join("ibq");
    let (ckpt, vgg) = (ibq.join("ibq.ckpt"), ibq.join("vgg16.pth"));
    let init = format!("tokenizer = {:?}", ckpt.display().to_string());
    let heads = |cfg: &Config| -> Result<Vec<f64>, Box<dyn std::error::Error>> {
        let mut model = Ett::new(cfg, Arc::new(Cpu::new(1)?))?;
        Start::open(cfg)?.load(&mut model)?;
        Ok(model.params.read(HEAD, Stored::Master)?.ok_or("heads")?.values)
    };
    let cfg = open(&dir, &init, &LLM)?;
    assert_eq!(cfg.lpips.weights.as_ref(), Some(&ckpt));
    let own = open_tokenizer(&ckpt)?.weights.read(HEAD)?.values;
    assert_eq!(heads(&cfg)?, own);
    assert!(own.iter().any(|h| *h != 1.0));
    let named = format!("lpips.weights={:?}", vgg.display().to_string());
    let cfg = open(&dir, &init, &[&LLM[..], &[&named]].concat())?;
    assert_eq!(cfg.lpips.weights.as_ref(), Some(&vgg));
    assert!(heads(&cfg)?.iter().all(|h| *h == 1.0));
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
        assert!(new.values[264 * 16..] == drawn(&cfg, name)?[264 * 16..]);
    }
    Ok(())
}

/// A weight of a model that starts from no other.
fn drawn(cfg: &Config, name: &str) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
    let model = Ett::new(cfg, Arc::new(Cpu::new(1)?))?;
    let t = model.params.read(name, Stored::Master)?;
    Ok(t.ok_or("a weight")?.values)
}

#[test]
fn weights_that_are_missing_or_of_another_kind_are_named() -> Outcome {
    let dir = Scratch::new();
    parts(&dir)?;
    let refused = |init: &str, want: &str| {
        let e = open(&dir, init, &[]).expect_err(init).to_string();
        assert!(e.contains(want), "{init}: {e}");
    };
    refused("llm = \"nowhere\"", "wanted weights that are there; fetch them, or correct the path");
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
