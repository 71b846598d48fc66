//! Plans of the paper's sizes, on the device that only counts.

use std::sync::Arc;

use ett::backend::{Cpu, Device, Kernels, Memory, Plan, Role, Slot, Target};
use ett::config::{Config, Operands, Recompute, Shard, StageConfig, StageKind, VisualHeadKind};
use ett::error::Result;
use ett::eval::HeldOut;
use ett::feed::Batch;
use ett::model::tokenizer::Grid;
use ett::model::{Ett, Part};
use ett::tensor::Tensor;
use ett::train::{
    self, Devices, Hyper, Optimizer, RunOptions, Stage, StagePlan, StepState, TokenizerMode, averaged,
    largest_batch, parse_memory, plan, plan_stage, step,
};

use crate::common::{Outcome, Scratch, cpu, gpu, ids, scaled};
use crate::training::small;

const CPU: Target = Target::Cpu { threads: 1 };

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
    // VGG16's convolutions, the LPIPS heads, and the scaling layer.
    assert_eq!(count("loss.perceptual_loss."), 14_714_688 + 1472 + 6);
    let group = |name: &str| model.params.group(name).map(|g| model.params.count(g)).unwrap_or(0);
    assert_eq!(group("encoder") + group("decoder"), 140_342_147);
    assert_eq!(group("llm"), 1_543_714_304);
    // D x C + C + C x C + C.
    assert_eq!(group("projector"), 256 * 1536 + 1536 + 1536 * 1536 + 1536);
    // 4x4 convolutions 3-64-128-256-512-1, BatchNorm after the middle three, biases in the first and the last.
    assert_eq!(group("discriminator"), 2_765_633);
    // Only master weights (4 bytes), their copies (2 bytes) and less than 4 MiB of inputs are held.
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
    let p = plan_stage(&cfg, &StageConfig::new(StageKind::Semantic, 1, 1), CPU)?;
    // 18.4 TFLOP per image is the cost of a step's products, forward and backward. The bounds allow for norms,
    // point-wise kernels and recomputed probabilities and logits (attention, quantizer, head), which are counted too.
    let tflop = p.flop as f64 / 1e12;
    assert!((16.56..=20.24).contains(&tflop), "{tflop:.2} TFLOP");
    for role in [Role::Weight, Role::Gradient, Role::Moment, Role::Activation, Role::Input] {
        assert!(bytes(&p, role) > 0, "{role}");
    }
    // Gradients take 4 and moments 8 bytes per trained parameter.
    let trained: usize = p.parameters.iter().filter(|(_, _, t)| *t).map(|(_, n, _)| n).sum();
    assert!(bytes(&p, Role::Gradient) >= 4 * trained as u64 && bytes(&p, Role::Moment) >= 8 * trained as u64);
    assert!(bytes(&p, Role::Moment) == 2 * bytes(&p, Role::Gradient));
    assert_eq!(p.memory.at_peak.iter().sum::<u64>(), p.memory.peak);

    // No role that grows with the batch has a tensor of size tokens x codes or tokens x vocabulary: the largest is a
    // picture with 128 channels.
    let element = 2;
    let codes = 1024 * cfg.quantizer.codes as u64 * element;
    let vocabulary = (1024 + 128) * cfg.llm.vocab as u64 * element;
    let supervised = 128 * cfg.llm.vocab as u64 * element;
    let picture = 512 * 512 * 128 * element;
    let largest = |role: Role| p.largest[role as usize];
    assert_eq!(largest(Role::Activation), picture);
    assert!(picture < codes && picture < vocabulary);
    assert!(largest(Role::Input) < supervised);
    // Nor do the workspaces of the kernels that form scores and logits a tile at a time.
    for (kernel, bound) in [
        ("ibq_rows", codes),
        ("ibq_cols", codes),
        ("ibq_bwd", codes),
        ("linear_xent_fwd", supervised),
        ("linear_xent_bwd", supervised),
    ] {
        let bytes = p.kernels[kernel].workspace;
        assert!(bytes > 0 && bytes < bound, "{kernel}: {bytes} bytes of workspace, {bound} of scores");
    }
    assert!(largest(Role::Workspace) >= p.kernels["linear_xent_bwd"].workspace);

    // With four images, activations grow with the batch and everything else stays the same.
    let four = plan_stage(&cfg, &StageConfig::new(StageKind::Semantic, 1, 4), CPU)?;
    assert_eq!(four.largest[Role::Activation as usize], 4 * picture);
    for role in [Role::Weight, Role::Gradient, Role::Moment] {
        assert_eq!(bytes(&four, role), bytes(&p, role), "{role}");
    }
    let ratio = bytes(&four, Role::Activation) as f64 / bytes(&p, Role::Activation) as f64;
    assert!((3.0..=4.0).contains(&ratio), "{ratio}");
    // Except for the optimizer's 12 operations per parameter, FLOP grow with the batch.
    let ratio = four.flop as f64 / p.flop as f64;
    assert!((3.95..=4.01).contains(&ratio), "{ratio}");
    Ok(())
}

#[test]
fn logits_exist_at_no_batch_size() -> Outcome {
    // Small pictures and a large codebook and vocabulary: a buffer of tokens x codes, or of supervised tokens x
    // vocabulary, would be the largest by far.
    let mut cfg = paper();
    (cfg.data.size, cfg.data.text_tokens) = (128, 512);
    cfg.tokenizer.ch = 32;
    (cfg.quantizer.codes, cfg.llm.vocab) = (1 << 20, 1 << 20);
    (cfg.llm.layers, cfg.llm.width, cfg.llm.heads, cfg.llm.kv_heads, cfg.llm.mlp) = (2, 256, 2, 2, 512);
    for kind in [StageKind::Semantic, StageKind::Tokenizer, StageKind::Align, StageKind::Chat] {
        let p = plan_stage(&cfg, &StageConfig::new(kind, 1, 8), CPU)?;
        let codes = 8 * 64 * (1 << 20) * 2;
        for role in [Role::Activation, Role::Workspace] {
            let largest = p.largest[role as usize];
            let what = format!("{}: {largest} bytes of {role} in one buffer", kind.name());
            assert!(largest > 0 && largest < codes / 16, "{what}");
        }
    }
    Ok(())
}

#[test]
fn every_stage_can_be_planned() -> Outcome {
    let cfg = paper();
    let flop = |kind| -> ett::error::Result<f64> {
        Ok(plan_stage(&cfg, &StageConfig::new(kind, 1, 1), CPU)?.flop as f64 / 1e12)
    };
    let semantic = flop(StageKind::Semantic)?;
    let (tokenizer, text) = (flop(StageKind::Tokenizer)?, flop(StageKind::Text)?);
    let (align, chat) = (flop(StageKind::Align)?, flop(StageKind::Chat)?);
    assert!(text < align && align < chat && chat < semantic && tokenizer < semantic);
    // The semantic stage is the tokenizer stage plus a language model step no larger than that of the chat stage.
    assert!(semantic < tokenizer + chat, "{semantic} {tokenizer} {chat}");
    let text = plan(&cfg, CPU, None)?;
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
    let mut planned = |what| {
        cfg.train.recompute = what;
        plan_stage(&cfg, &stage, CPU)
    };
    let (kept, cheap) = (planned(Recompute::None)?, planned(Recompute::Cheap)?);
    let blocks = planned(Recompute::Blocks)?;
    let [a, b, c] = [&kept, &cheap, &blocks].map(|p| bytes(p, Role::Activation));
    assert!(20 * b < 17 * a && 2 * c < b, "{a}, {b}, {c} bytes of activations");
    // Norms and activation functions take hardly any of the operations.
    assert!(kept.flop < cheap.flop && cheap.flop < kept.flop / 100 * 101, "{} {}", kept.flop, cheap.flop);
    assert!(cheap.flop < blocks.flop && blocks.flop < 3 * kept.flop / 2, "{} {}", cheap.flop, blocks.flop);
    Ok(())
}

/// The sizes of the paper's second stage: 3.57 GiB of activations a picture on the CPU and 3.604 on a GPU with cheap
/// recomputation (PyTorch's compiler needs 3.6), and 16 pictures on a card of 80 GB with recomputed blocks. On such a card,
/// `auto` chooses accordingly.
#[test]
fn the_second_stage_of_the_paper_fits() -> Outcome {
    let memory = parse_memory("80GB")?;
    for target in targets() {
        let stage = |batch| StageConfig::new(StageKind::Semantic, 1, batch);
        let with = |what| {
            let mut cfg = paper();
            cfg.train.recompute = what;
            cfg
        };
        let activations = |batch| -> ett::error::Result<f64> {
            let p = plan_stage(&with(Recompute::Cheap), &stage(batch), target)?;
            Ok(bytes(&p, Role::Activation) as f64 / (1u64 << 30) as f64)
        };
        let each = (activations(8)? - activations(4)?) / 4.0;
        assert!(each <= 3.61, "{target}: {each:.3} GiB of activations a picture");
        let most = largest_batch(&with(Recompute::Blocks), &stage(1), target, memory)?;
        assert!(most >= 16, "{target}: {most} pictures in 80 GB");
        let text = plan(&Config { stage: vec![stage(16)], ..with(Recompute::Auto) }, target, Some(memory))?;
        assert!(text.contains("bf16 precision, blocks recomputed"), "{text}");
        let text = plan(&Config { stage: vec![stage(4)], ..with(Recompute::Auto) }, target, Some(memory))?;
        assert!(text.contains("bf16 precision, nothing recomputed"), "{text}");
        println!(
            "{target}: {each:.3} GiB of activations a picture with cheap recomputation, {most} pictures in 80 GB"
        );
    }
    Ok(())
}

/// The targets that this build can plan for.
fn targets() -> Vec<Target> {
    ["cpu", "cuda"].iter().filter_map(|name| Target::named(name, 1).ok()).collect()
}

#[test]
fn parts_save_memory_too() -> Outcome {
    let cfg = paper();
    let whole = plan_stage(&cfg, &StageConfig::new(StageKind::Semantic, 1, 4), CPU)?;
    let parts = StageConfig { accumulate: 4, ..StageConfig::new(StageKind::Semantic, 1, 4) };
    let parts = plan_stage(&cfg, &parts, CPU)?;
    assert!(2 * bytes(&parts, Role::Activation) < bytes(&whole, Role::Activation));
    Ok(())
}

/// What a rank of 8 holds and sends, at the paper's sizes.
#[test]
fn ranks_hold_their_part_and_send_their_share() -> Outcome {
    let mut cfg = paper();
    let stage = |batch| StageConfig { ema: true, ..StageConfig::new(StageKind::Semantic, 1, batch) };
    let one = plan_stage(&cfg, &stage(1), CPU)?;
    let trained: usize = one.parameters.iter().filter(|p| p.2).map(|p| p.1).sum();
    let all: usize = one.parameters.iter().map(|p| p.1).sum();
    let near = |what: &str, got: u64, want: f64| {
        assert!((got as f64 / want - 1.0).abs() < 0.02, "{what}: {got}, wanted about {want:.0}");
    };
    let eight = |cfg: &Config| plan_stage(cfg, &stage(8), Devices { target: CPU, ranks: 8 });
    for shard in [Shard::None, Shard::Optimizer, Shard::Gradients] {
        cfg.train.shard = shard;
        let p = eight(&cfg)?;
        let state = if shard == Shard::None { 1.0 } else { 8.0 };
        near("moments", bytes(&p, Role::Moment), 8.0 * trained as f64 / state);
        near("averages", bytes(&p, Role::Ema), bytes(&one, Role::Ema) as f64 / state);
        near("weights", p.memory.live[Role::Weight as usize], (4.0 / state + 2.0) * all as f64);
        if shard != Shard::Gradients {
            near("gradients", bytes(&p, Role::Gradient), 4.0 * trained as f64);
        } else {
            // The embedding, from the loss to the first layer, and two spans; and the parts of sums.
            let most = 4.0 * (trained as f64 / 8.0 + 151_936.0 * 1536.0 + 2.0 * 200e6);
            let got = bytes(&p, Role::Gradient) as f64;
            assert!(got < most && got > 0.5 * trained as f64, "gradients: {got}, at most {most}");
        }
        let sent = |name| p.sent.get(name).map_or(0, |s| s.bytes);
        let share = 7.0 / 8.0 * trained as f64;
        if shard == Shard::None {
            near("sums", sent("all_reduce"), 8.0 * share + 8.0 / 8.0 * 7.0 * 131_072.0);
            assert_eq!(sent("reduce_scatter"), 0);
        } else {
            near("sums", sent("reduce_scatter"), 4.0 * share);
            near("weights", sent("all_gather"), 2.0 * share);
        }
    }
    // If tokens are compared with codes in f32, every rank needs the encoder's group in f32.
    let before = eight(&cfg)?.memory.live[Role::Weight as usize];
    cfg.quantizer.precision = Operands::F32;
    let encoder = one.parameters.iter().find(|p| p.0 == "encoder").map_or(0, |p| p.1);
    let more = eight(&cfg)?.memory.live[Role::Weight as usize] - before;
    near("the encoder in f32", more, 4.0 * 7.0 / 8.0 * encoder as f64);
    let text = plan(&Config { stage: vec![stage(16)], ..cfg }, Devices { target: CPU, ranks: 8 }, None)?;
    assert!(text.contains("planned for 8 ranks") && text.contains("GiB to other ranks per step"), "{text}");
    assert!(text.contains("batch 16 on 8 ranks"), "{text}");
    Ok(())
}

#[test]
fn the_largest_batch_is_the_last_that_fits() -> Outcome {
    let cfg = paper();
    let stage = StageConfig::new(StageKind::Semantic, 1, 1);
    let memory = parse_memory("80GiB")?;
    let n = largest_batch(&cfg, &stage, CPU, memory)?;
    let peak = |batch| -> ett::error::Result<u64> {
        Ok(plan_stage(&cfg, &StageConfig { batch, ..stage.clone() }, CPU)?.memory.peak)
    };
    assert!(n > 1 && peak(n)? <= memory && peak(n + 1)? > memory, "{n}");
    assert_eq!(largest_batch(&cfg, &stage, CPU, 1 << 30)?, 0);
    let text = plan(&Config { stage: vec![stage], ..cfg }, CPU, Some(memory))?;
    assert!(text.contains(&format!("80.0 GiB hold a batch of up to {n} in one part")), "{text}");
    for (text, bytes) in [("512MiB", 512 << 20), ("24 GB", 24_000_000_000), ("17", 17), ("1.5GiB", 3 << 29)] {
        assert_eq!(parse_memory(text)?, bytes);
    }
    for wrong in ["", "GiB", "-3GiB", "8 apples", "nanGiB"] {
        assert!(parse_memory(wrong).is_err_and(|e| e.to_string().contains("80GiB")), "{wrong}");
    }
    Ok(())
}

#[test]
fn averages_of_earlier_stages_are_counted() -> Outcome {
    let mut cfg = paper();
    cfg.data.size = 64;
    let tokenizer = StageConfig { ema: true, ..StageConfig::new(StageKind::Tokenizer, 1, 1) };
    cfg.stage = vec![tokenizer, StageConfig::new(StageKind::Text, 1, 1)];
    let text = plan(&cfg, CPU, None)?;
    assert!(text.starts_with("planned for the CPU with 1 thread\n"), "{text}");
    let ema = |stage: &str| -> Option<f64> {
        let line = stage.lines().find(|l| l.trim().starts_with("ema"))?;
        line.split_whitespace().nth(1)?.parse().ok()
    };
    let of_stages: Vec<_> = text.split("stage ").skip(1).map(ema).collect();
    // Encoder, decoder and discriminator, 4 bytes per weight.
    let want = (4 * (140_342_147 + 2_765_633)) as f64 / (1u64 << 30) as f64;
    assert!(of_stages.len() == 2 && of_stages.iter().flatten().all(|e| (e - want).abs() < 0.01), "{text}");
    assert_eq!(bytes(&plan_stage(&cfg, &cfg.stage[1], CPU)?, Role::Ema), 0);
    Ok(())
}

#[test]
fn cuda_can_be_planned_for_where_its_kernels_are() -> Outcome {
    assert_eq!(Target::named("cpu", 3)?, Target::Cpu { threads: 3 });
    for wrong in ["gpu", "cuda:x", "cpu:1"] {
        assert!(Target::named(wrong, 1).is_err_and(|e| e.to_string().contains("cuda:N")), "{wrong}");
    }
    match Target::named("cuda:7", 1) {
        Ok(target) => {
            let p = plan_stage(&paper(), &StageConfig::new(StageKind::Semantic, 1, 1), target)?;
            assert!(p.kernels["linear_xent_bwd"].workspace > 0);
            // The workspace of cuBLASLt is always held.
            assert!(bytes(&p, Role::Workspace) >= 32 << 20);
        }
        Err(e) => assert!(!cfg!(ett_cuda) && e.to_string().contains("tools/setup-cuda"), "{e}"),
    }
    Ok(())
}

/// A batch of the shape that a plan assumes: pictures of the configured size, texts of the configured length.
fn batch(model: &Ett, stage: &Stage, n: usize) -> Result<Batch> {
    let (dev, cfg) = (&**model.params.device(), &model.cfg);
    let size = cfg.data.size;
    let (mut images, mut grids) = (vec![], vec![]);
    if stage.recipe.tokenizer != TokenizerMode::Off {
        let dims = [n, size, size, 3];
        let bytes: Vec<u8> =
            scaled(1, dims.iter().product(), 0.4).iter().map(|v| (128.0 + 100.0 * v) as u8).collect();
        images.push(Tensor::from_host(dev, Role::Input, &bytes, dims)?);
        let s = size / cfg.tokenizer.downsampling();
        grids.push(Grid { images: n, h: s, w: s });
    }
    let sequence = |i: usize| {
        let text = ids(i as u64, cfg.data.text_tokens, cfg.llm.vocab);
        match (stage.recipe.codes, grids.is_empty()) {
            (true, _) => vec![Part::context(text), Part::Codes(i)],
            (_, true) => vec![Part::target(text)],
            _ => vec![Part::Image(i), Part::target(text)],
        }
    };
    let packed = match stage.recipe.text || stage.recipe.codes {
        true => Some(Batch::pack(model, &(0..n).map(sequence).collect::<Vec<_>>(), &grids, 64)?),
        false => None,
    };
    Ok(Batch { images, packed, most: None })
}

/// Memory that a step of a stage took on a device.
fn measured(cfg: &Config, stage_cfg: &StageConfig, dev: Arc<dyn Kernels>) -> Result<Memory> {
    let mut model = Ett::new(cfg, dev.clone())?;
    let stage = Stage::of(stage_cfg, &model)?;
    let trained = stage.trained();
    model.params.train(&trained)?;
    if stage_cfg.ema {
        model.params.average(&averaged(&trained))?;
    }
    let n = stage_cfg.batch / stage_cfg.accumulate;
    let parts: Vec<Batch> =
        (0..stage_cfg.accumulate).map(|_| batch(&model, &stage, n)).collect::<Result<_>>()?;
    let h = Hyper { betas: cfg.train.betas, eps: 1e-8, weight_decay: 0.0, ema_decay: 0.9, clip: 1.0 };
    let main = Optimizer::new(&model.params, &stage.groups, h)?;
    let disc = match stage.discriminator {
        true => Some(Optimizer::new(&model.params, &["discriminator"], h)?),
        false => None,
    };
    let mut state = StepState::new(&*dev, model.params.precision().acc)?;
    stage.recipe.weights(&model, &mut state, stage_cfg.accumulate);
    state.set(Slot::InvTokens, 1.0 / (stage_cfg.batch * cfg.data.text_tokens) as f64);
    state.set(Slot::InvCodes, 1.0 / 64.0);
    main.prepare(&mut state, 1e-4);
    if let Some(d) = &disc {
        d.prepare(&mut state, 1e-4);
    }
    state.send(&*dev)?;
    step(&mut model, &stage.recipe, &parts, &state, &main, disc.as_ref())?;
    dev.synchronize()?;
    Ok(dev.memory())
}

/// A small model with all parts, and with more pictures and text than weights.
fn tiny(precision: &str) -> Config {
    let mut cfg = small(precision);
    cfg.data.text_tokens = 30;
    cfg.visual_head.kind = VisualHeadKind::Tied;
    cfg
}

/// Stages, precisions, numbers of threads and ways to save memory.
fn variants() -> Vec<(Config, StageConfig, usize)> {
    let mut all = Vec::new();
    for precision in ["f32", "bf16"] {
        for kind in StageKind::ALL {
            all.push((tiny(precision), StageConfig::new(kind, 1, 6), 3));
        }
        let semantic = StageConfig { ema: true, ..StageConfig::new(StageKind::Semantic, 1, 6) };
        for what in [Recompute::Cheap, Recompute::Blocks] {
            let mut recompute = tiny(precision);
            recompute.train.recompute = what;
            all.push((recompute, semantic.clone(), 2));
        }
        all.push((tiny(precision), StageConfig { accumulate: 3, ..semantic }, 1));
    }
    all
}

fn named(cfg: &Config, stage: &StageConfig, threads: usize) -> String {
    let parts = stage.accumulate;
    format!("{} in {} on {threads} threads, {parts} parts", stage.kind.name(), cfg.train.precision)
}

#[test]
fn a_step_takes_what_the_plan_says() -> Outcome {
    for (cfg, stage, threads) in variants() {
        let what = named(&cfg, &stage, threads);
        let planned = plan_stage(&cfg, &stage, Target::Cpu { threads })?.memory;
        let measured = measured(&cfg, &stage, cpu(threads))?;
        // The same calls with the same shapes: equal to the byte.
        assert_eq!((planned.peak, planned.at_peak), (measured.peak, measured.at_peak), "{what}");
        assert_eq!(planned.at_peak.iter().sum::<u64>(), planned.peak, "{what}");
    }
    Ok(())
}

#[test]
fn the_largest_batch_runs_in_its_memory_and_the_next_does_not() -> Outcome {
    for kind in [StageKind::Tokenizer, StageKind::Semantic] {
        let (cfg, stage) = (tiny("bf16"), StageConfig::new(kind, 1, 1));
        let target = Target::Cpu { threads: 2 };
        let memory = plan_stage(&cfg, &StageConfig { batch: 5, ..stage.clone() }, target)?.memory.peak + 100;
        assert_eq!(largest_batch(&cfg, &stage, target, memory)?, 5, "{}", kind.name());
        let run = |batch| {
            let dev = Arc::new(Cpu::poisoned(2)?);
            dev.limit(memory);
            measured(&cfg, &StageConfig { batch, ..stage.clone() }, dev)
        };
        run(5)?;
        let e = run(6).expect_err("more than there is").to_string();
        assert!(e.contains("out of memory on cpu") && e.contains("may be allocated"), "{e}");
    }
    Ok(())
}

/// A run holds nothing that counts beyond a step. Its texts differ in length.
#[test]
fn a_run_takes_what_the_plan_says() -> Outcome {
    let dir = Scratch::new();
    let data = dir.path("pictures");
    crate::run::pictures(&data);
    for kind in [StageKind::Tokenizer, StageKind::Semantic] {
        let mut cfg = tiny("f32");
        cfg.llm.vocab = 264;
        cfg.data.train = data.clone();
        cfg.data.text_tokens = 18;
        cfg.train.threads = 2;
        cfg.stage = vec![StageConfig { lr: Some(1e-4), ..StageConfig::new(kind, 2, 8) }];
        let dev = Arc::new(Cpu::new(2)?);
        let out = dir.path(kind.name());
        train::run(&cfg, dev.clone(), &RunOptions::quiet(&out, &HeldOut))?;
        let measured = dev.memory().peak as f64;
        let planned = plan_stage(&cfg, &cfg.stage[0], Target::Cpu { threads: 2 })?.memory.peak as f64;
        let ratio = planned / measured;
        assert!((0.98..=1.02).contains(&ratio), "{}: {planned} planned, {measured} measured", kind.name());
    }
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn a_step_on_a_gpu_takes_what_the_plan_says() -> Outcome {
    for (cfg, stage, threads) in variants() {
        let plan = plan_stage(&cfg, &stage, Target::named("cuda", 0)?)?;
        let planned = plan.memory.peak as f64;
        let measured = measured(&cfg, &stage, gpu())?.peak as f64;
        let ratio = planned / measured;
        let what = named(&cfg, &stage, threads);
        assert!((0.98..=1.02).contains(&ratio), "{what}: {planned} planned, {measured} measured");
    }
    Ok(())
}
