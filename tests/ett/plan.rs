//! The paper's sizes, on the device that only counts.

use std::sync::Arc;

use ett::backend::{Device, Plan, Role};
use ett::config::{Config, StageConfig, StageKind};
use ett::model::Ett;
use ett::train::{StagePlan, largest_batch, parse_memory, plan, plan_stage};

use crate::common::Outcome;

/// 1024 visual and 128 text tokens, bf16.
fn paper() -> Config {
    let mut cfg = Config::default();
    cfg.train.precision = "bf16".into();
    cfg.data.size = 512;
    cfg.data.text_tokens = 128;
    cfg
}

#[test]
fn parameter_counts_are_the_papers() -> Outcome {
    let dev = Arc::new(Plan::new());
    let model = Ett::new(&paper(), dev.clone())?;
    let count = |prefix: &str| -> usize {
        let of = |(name, _, dims): (&str, &str, &[usize])| match name.starts_with(prefix) {
            true => dims.iter().product(),
            false => 0,
        };
        model.params.names().map(of).sum()
    };
    assert_eq!(count("encoder."), 46_752_256);
    assert_eq!(count("decoder."), 59_903_875);
    assert_eq!(count("quantize."), 33_554_432);
    assert_eq!(count("quant_conv.") + count("post_quant_conv."), 131_584);
    assert_eq!(count("model."), 1_543_714_304);
    // VGG16's convolutions, its heads, and the scaling.
    assert_eq!(count("loss.perceptual_loss."), 14_714_688 + 1472 + 6);
    let group = |name: &str| model.params.group(name).map(|g| model.params.count(g)).unwrap_or(0);
    assert_eq!(group("encoder") + group("decoder"), 140_342_147);
    assert_eq!(group("llm"), 1_543_714_304);
    // D x C + C + C x C + C.
    assert_eq!(group("projector"), 256 * 1536 + 1536 + 1536 * 1536 + 1536);
    // 4x4 convolutions 3-64-128-256-512-1, BatchNorm after the middle three, biases on the first and the last.
    assert_eq!(group("discriminator"), 2_765_633);
    // Nothing but masters (4 bytes) and their copies (2) is held, and a step state's worth of inputs.
    let all: usize = (0..model.params.groups().len()).map(|g| model.params.count(g)).sum();
    let weights = dev.memory().live[Role::Weight as usize];
    assert!(
        weights >= 6 * all as u64 && weights < 6 * all as u64 + (4 << 20),
        "{weights} bytes of {all} weights"
    );
    Ok(())
}

fn bytes(p: &StagePlan, role: Role) -> u64 {
    p.memory.at_peak[role as usize]
}

#[test]
fn a_semantic_step_costs_what_the_paper_sizes_imply() -> Outcome {
    let cfg = paper();
    let p = plan_stage(&cfg, &StageConfig::new(StageKind::Semantic, 1, 1))?;
    // 18.4 TFLOP an image is the products of a step, forward and backward. What differs here: norms and
    // point-wise kernels are counted too, and recomputed probabilities and logits (attention, quantizer, head).
    let tflop = p.flop as f64 / 1e12;
    assert!((16.56..=20.24).contains(&tflop), "{tflop:.2} TFLOP");
    for role in [Role::Weight, Role::Gradient, Role::Moment, Role::Activation, Role::Input] {
        assert!(bytes(&p, role) > 0, "{role}");
    }
    // Gradients 4 and moments 8 bytes a trained parameter.
    let trained: usize = p.parameters.iter().filter(|(_, _, t)| *t).map(|(_, n, _)| n).sum();
    assert!(bytes(&p, Role::Gradient) >= 4 * trained as u64 && bytes(&p, Role::Moment) >= 8 * trained as u64);
    assert!(bytes(&p, Role::Moment) == 2 * bytes(&p, Role::Gradient));
    assert_eq!(p.memory.at_peak.iter().sum::<u64>(), p.memory.peak);

    // Nothing of size tokens x codes or tokens x vocabulary, in any role that grows with the batch: the
    // largest is a picture at 128 channels.
    let element = 2;
    let codes = 1024 * cfg.quantizer.codes as u64 * element;
    let vocabulary = (1024 + 128) * cfg.llm.vocab as u64 * element;
    let supervised = 128 * cfg.llm.vocab as u64 * element;
    let picture = 512 * 512 * 128 * element;
    let largest = |role: Role| p.largest[role as usize];
    assert_eq!(largest(Role::Activation), picture);
    assert!(picture < codes && picture < vocabulary);
    assert!(largest(Role::Workspace) < supervised && largest(Role::Input) < supervised);

    // The same with four images: activations grow with the batch, all else stays.
    let four = plan_stage(&cfg, &StageConfig::new(StageKind::Semantic, 1, 4))?;
    assert_eq!(four.largest[Role::Activation as usize], 4 * picture);
    for role in [Role::Weight, Role::Gradient, Role::Moment] {
        assert_eq!(bytes(&four, role), bytes(&p, role), "{role}");
    }
    let ratio = bytes(&four, Role::Activation) as f64 / bytes(&p, Role::Activation) as f64;
    assert!((3.0..=4.0).contains(&ratio), "{ratio}");
    // But for the optimizer's 12 operations a parameter, FLOP grow with the batch.
    let ratio = four.flop as f64 / p.flop as f64;
    assert!((3.95..=4.01).contains(&ratio), "{ratio}");
    Ok(())
}

#[test]
fn logits_exist_at_no_batch_size() -> Outcome {
    // Small pictures and a wide output: a buffer of tokens x codes, or of supervised tokens x vocabulary, would
    // be the largest by far.
    let mut cfg = paper();
    (cfg.data.size, cfg.data.text_tokens) = (128, 512);
    cfg.tokenizer.ch = 32;
    (cfg.quantizer.codes, cfg.llm.vocab) = (1 << 20, 1 << 20);
    (cfg.llm.layers, cfg.llm.width, cfg.llm.heads, cfg.llm.kv_heads, cfg.llm.mlp) = (2, 256, 2, 2, 512);
    for kind in [StageKind::Semantic, StageKind::Tokenizer, StageKind::Align, StageKind::Chat] {
        let p = plan_stage(&cfg, &StageConfig::new(kind, 1, 8))?;
        let largest = p.largest[Role::Activation as usize].max(p.largest[Role::Workspace as usize]);
        let codes = 8 * 64 * (1 << 20) * 2;
        assert!(largest < codes / 16, "{}: {largest} bytes in one buffer", kind.name());
    }
    Ok(())
}

#[test]
fn every_stage_can_be_planned() -> Outcome {
    let cfg = paper();
    let flop = |kind| -> ett::error::Result<f64> {
        Ok(plan_stage(&cfg, &StageConfig::new(kind, 1, 1))?.flop as f64 / 1e12)
    };
    let semantic = flop(StageKind::Semantic)?;
    let (tokenizer, text) = (flop(StageKind::Tokenizer)?, flop(StageKind::Text)?);
    let (align, chat) = (flop(StageKind::Align)?, flop(StageKind::Chat)?);
    assert!(text < align && align < chat && chat < semantic && tokenizer < semantic);
    // Tokenizer plus language model is the semantic stage, but for the text without its picture.
    assert!(semantic < tokenizer + chat, "{semantic} {tokenizer} {chat}");
    let text = plan(&cfg, None)?;
    for word in [
        "stage semantic: batch 1, bf16",
        "TFLOP",
        "activation",
        "projector",
        "1543714304 parameters, trained",
    ] {
        assert!(text.contains(word), "{word} is missing from\n{text}");
    }
    Ok(())
}

#[test]
fn recomputation_saves_memory_and_costs_a_forward() -> Outcome {
    let mut cfg = paper();
    let stage = StageConfig::new(StageKind::Semantic, 1, 4);
    let kept = plan_stage(&cfg, &stage)?;
    cfg.train.recompute = true;
    let again = plan_stage(&cfg, &stage)?;
    let (a, b) = (bytes(&kept, Role::Activation), bytes(&again, Role::Activation));
    assert!(2 * b < a, "{b} bytes of activations with recomputation, {a} without");
    assert!(again.flop > kept.flop && again.flop < 3 * kept.flop / 2, "{} {}", again.flop, kept.flop);
    Ok(())
}

#[test]
fn parts_save_memory_too() -> Outcome {
    let cfg = paper();
    let whole = plan_stage(&cfg, &StageConfig::new(StageKind::Semantic, 1, 4))?;
    let parts = StageConfig { accumulate: 4, ..StageConfig::new(StageKind::Semantic, 1, 4) };
    let parts = plan_stage(&cfg, &parts)?;
    assert!(2 * bytes(&parts, Role::Activation) < bytes(&whole, Role::Activation));
    Ok(())
}

#[test]
fn the_largest_batch_is_the_last_that_fits() -> Outcome {
    let cfg = paper();
    let stage = StageConfig::new(StageKind::Semantic, 1, 1);
    let memory = parse_memory("80GiB")?;
    let n = largest_batch(&cfg, &stage, memory)?;
    let peak = |batch| -> ett::error::Result<u64> {
        Ok(plan_stage(&cfg, &StageConfig { batch, ..stage.clone() })?.memory.peak)
    };
    assert!(n > 1 && peak(n)? <= memory && peak(n + 1)? > memory, "{n}");
    assert_eq!(largest_batch(&cfg, &stage, 1 << 30)?, 0);
    let text = plan(&Config { stage: vec![stage], ..cfg }, Some(memory))?;
    assert!(text.contains(&format!("80.0 GiB hold a batch of up to {n} in one part")), "{text}");
    for (text, bytes) in [("512MiB", 512 << 20), ("24 GB", 24_000_000_000), ("17", 17), ("1.5GiB", 3 << 29)] {
        assert_eq!(parse_memory(text)?, bytes);
    }
    for wrong in ["", "GiB", "-3GiB", "8 apples", "nanGiB"] {
        assert!(parse_memory(wrong).is_err_and(|e| e.to_string().contains("80GiB")), "{wrong}");
    }
    Ok(())
}
