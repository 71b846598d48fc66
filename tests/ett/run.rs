//! A complete run on pictures generated here: files, refusals, reproducibility, and the use of the trained model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ett::backend::{Cpu, Device, Kernels};
use ett::config::{Arm, Config, StageConfig, StageData, StageKind, VisualHeadKind};
use ett::data::{Image, Source, save_png};
use ett::eval::{HeldOut, evaluate_run};
use ett::infer::Trained;
use ett::io;
use ett::model::Ett;
use ett::nn::Stored;
use ett::ranks::Group;
use ett::train::{self, RunOptions};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("ett-run-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("a folder");
        Folder(dir)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Eight squares, light or dark, on grey, with captions and questions; one file is broken.
pub fn pictures(dir: &Path) {
    std::fs::create_dir_all(dir).expect("a folder");
    let mut lines = String::new();
    for i in 0..8usize {
        let mut image = Image::filled(40, 48, 0.1 * i as f32 - 0.4);
        let (word, value) = if i % 2 == 0 { ("light", 0.9) } else { ("dark", -0.9) };
        for y in 10..20 + i {
            for x in 12..30 {
                image.pixels[(y * 48 + x) * 3..][..3].fill(value);
            }
        }
        save_png(dir.join(format!("{i}.png")), &image).expect("a picture");
        lines += &format!(
            "{{\"file_name\": \"{i}.png\", \"text\": \"a {word} square\", \"qa\": [[\"light?\", \"{}\"]]}}\n",
            if i % 2 == 0 { "yes" } else { "no" }
        );
    }
    std::fs::write(dir.join("broken.png"), b"not a picture").expect("a file");
    lines += "{\"file_name\": \"broken.png\", \"text\": \"nothing\"}\n";
    std::fs::write(dir.join("metadata.jsonl"), lines).expect("a file");
}

/// Every stage with a small model, on the pictures of a folder.
pub fn config(data: &Path) -> Config {
    let mut c = Config::default();
    (c.tokenizer.ch, c.tokenizer.ch_mult, c.tokenizer.norm_groups) = (8, vec![1, 2], 4);
    (c.tokenizer.num_res_blocks, c.tokenizer.z_channels) = (1, 8);
    (c.quantizer.codes, c.quantizer.dim) = (16, 4);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    let l = &mut c.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (264, 16, 1, 2, 1, 8, 24);
    (c.data.size, c.data.eval_samples) = (32, 8);
    (c.data.train, c.data.test) = (data.to_path_buf(), Some(data.to_path_buf()));
    (c.train.threads, c.train.eval_every) = (1, 2);
    c.visual_head.kind = VisualHeadKind::Tied;
    let kinds = [
        StageKind::Tokenizer,
        StageKind::Text,
        StageKind::Align,
        StageKind::Semantic,
        StageKind::Chat,
        StageKind::Gen,
    ];
    c.stage = kinds
        .map(|kind| StageConfig {
            lr: Some(1e-3),
            ema: kind == StageKind::Semantic,
            captions: 0.5,
            accumulate: if kind == StageKind::Semantic { 3 } else { 1 },
            ..StageConfig::new(kind, 2, 3)
        })
        .to_vec();
    c
}

fn run(c: &Config, out: &Path) -> ett::error::Result<train::Finished> {
    let o = RunOptions::quiet(out, &HeldOut);
    train::run(c, Arc::new(Cpu::poisoned(c.train.threads)?), &o)
}

#[test]
fn a_run_leaves_its_files_and_a_model_that_can_be_used() {
    let dir = Folder::new("whole");
    pictures(&dir.0.join("data"));
    let c = config(&dir.0.join("data"));
    let out = dir.0.join("out");
    let done = run(&c, &out).expect("the run ends");
    let report = done.report.as_ref().expect("a held-out folder was named");
    assert_eq!((report.pictures, report.captions, report.questions), (8, 8, 8));
    assert!(report.mse.is_finite() && report.caption_loss.is_some_and(|p| p.seen > 0.0));
    assert!(done.table().contains("reconstruction MSE"));

    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    let lines: Vec<serde_json::Value> =
        metrics.lines().map(|l| serde_json::from_str(l).expect("a line is JSON")).collect();
    assert_eq!(lines.len(), 12);
    assert_eq!(lines[0]["stage"], "tokenizer");
    let number = |step: usize, keys: [&str; 2]| lines[step][keys[0]][keys[1]].as_f64();
    for (step, keys) in [
        (6, ["loss", "cap"]),
        (10, ["loss", "code"]),
        (0, ["quantizer", "softmax_entropy"]),
        (0, ["quantizer", "logit_spread"]),
        (1, ["eval", "mse"]),
        (3, ["eval", "cap"]),
        (7, ["eval", "cap"]),
        (9, ["eval", "answers"]),
        (11, ["eval", "code"]),
    ] {
        assert!(number(step, keys).is_some_and(f64::is_finite), "{keys:?} in {}", lines[step]);
    }
    for (key, least) in
        [("codes_used", 1.0), ("code_perplexity", 1.0), ("memory_mib", 0.1), ("images_per_s", 0.1)]
    {
        assert!(lines[11][key].as_f64().is_some_and(|v| v >= least), "{key} in {}", lines[11]);
    }
    assert!(lines[1]["quantizer"].is_null() && lines[0]["eval"].is_null(), "{}", lines[1]);
    assert!(report.ssim <= 1.0 && report.perceptual > 0.0 && report.perceptual_by.contains("random VGG16"));
    let codes = report.codes.ok_or("the model draws").expect("codes");
    assert!(codes.loss.seen > 0.0 && codes.unigram >= 0.0);
    let light = &report.types;
    assert!(light.is_empty(), "yes and no are not types: {light:?}");

    // The averages kept by the semantic stage survive the chat stage, which does not train the tokenizer.
    for (file, _) in io::written(&out).into_iter().chain([("ema.safetensors", ""), ("config.toml", "")]) {
        assert!(out.join(file).is_file(), "{file} is missing");
    }

    let Err(e) = run(&c, &out) else { panic!("a finished run was overwritten") };
    assert!(e.to_string().contains("holds a finished run"), "{e}");

    let cpu = Arc::new(Cpu::poisoned(1).expect("a thread"));
    // Averages in place of the weights; a checkpoint used as a run; folders as pictures.
    let averaged = Trained::open(&out, cpu.clone(), true).expect("the run kept averages");
    let plain = Trained::open(&out, cpu.clone(), false).expect("the run loads");
    let weight = |t: &Trained, name: &str| {
        t.model.params.read(name, Stored::Master).expect("readable").expect("a weight").values
    };
    for (name, differs) in [("encoder.conv_in.weight", true), ("model.norm.weight", false)] {
        assert_eq!(weight(&averaged, name) != weight(&plain, name), differs, "{name}");
    }
    let last = io::Checkpoints::latest(&out).expect("readable").expect("a checkpoint");
    let mut trained = Trained::open(&last, cpu.clone(), false).expect("a checkpoint can be used");
    let again = evaluate_run(&mut trained, Some(&dir.0.join("data")), Some(4), &dir.0.join("again"))
        .expect("results");
    assert_eq!((again.pictures, again.data), (4, dir.0.join("data").display().to_string()));
    assert!(dir.0.join("again/eval.json").is_file() && dir.0.join("again/drawings.png").is_file());
    let text = io::inspect(&out, false).expect("a run folder");
    for part in [
        "arm Ett, f32 precision",
        "finished; last checkpoint",
        "stage 5 (gen)",
        "encoder ",
        "ema.safetensors",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    let text = io::inspect(&last, false).expect("a checkpoint");
    assert!(text.contains("checkpoint after 12 steps: stage 5 (gen), 2 steps done in it"), "{text}");
    let text = io::inspect(&out.join("model.safetensors"), true).expect("a weights file");
    assert!(
        text.contains("encoder.conv_in.weight") && text.contains("F32 ") && text.contains("[8, 3, 3, 3]"),
        "{text}"
    );
    assert!(io::inspect(&dir.0.join("nothing"), false).is_err());
    assert!(
        io::inspect(&dir.0.join("data"), false).is_err_and(|e| e.to_string().contains("model.safetensors"))
    );
    let trained = plain;
    let image = Image::open(dir.0.join("data/0.png")).expect("a picture");
    trained.caption(&image).expect("a caption");
    trained.ask(&image, "light?").expect("an answer");
    let (fitted, rec) = trained.reconstruct(&image, 64).expect("a reconstruction");
    assert_eq!((fitted.height, fitted.width), (40, 48));
    assert_eq!((rec.height, rec.width), (40, 48));
    let Err(e) = Trained::open(&dir.0, cpu, false) else { panic!("an empty folder was loaded") };
    assert!(e.to_string().contains("model.safetensors"), "{e}");
}

/// Runs of all stages on a GPU, with steps launched one by one and replayed; batches come from one thread or several.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_replayed_steps_are_bitwise_launched_ones() {
    let dir = Folder::new("graph");
    pictures(&dir.0.join("data"));
    for precision in ["f32", "bf16"] {
        let mut c = config(&dir.0.join("data"));
        c.train.precision = precision.into();
        c.stage.iter_mut().for_each(|stage| stage.steps = 6);
        let mut results = Vec::new();
        for (graph, workers) in [(false, 1), (true, 3)] {
            (c.train.graph, c.train.workers) = (graph, workers);
            let out = dir.0.join(format!("{precision}-{graph}"));
            let o = RunOptions::quiet(&out, &HeldOut);
            train::run(&c, crate::common::gpu(), &o).expect("the run ends");
            let read = |name: &str| std::fs::read(out.join(name)).expect(name);
            results.push([read("model.safetensors"), read("ema.safetensors")]);
        }
        assert!(results[0] == results[1], "{precision}: other weights");
    }
}

#[test]
fn speeds_are_measured_without_saving_anything() {
    let dir = Folder::new("speed");
    pictures(&dir.0.join("data"));
    let c = config(&dir.0.join("data"));
    let open = || -> ett::error::Result<Arc<dyn Kernels>> { Ok(Arc::new(Cpu::poisoned(1)?)) };
    let all = train::speed(&c, &open, None, 5, &HeldOut, &Group::alone()).expect("speeds");
    let kinds: Vec<&str> = all.iter().filter_map(|s| s.op.strip_prefix("step:")).collect();
    assert_eq!(kinds, ["tokenizer", "text", "align", "semantic", "chat", "gen"]);
    for s in &all {
        assert!(s.images_per_s > 0.0 && s.tflop_per_s > 0.0 && s.peak_gib > 0.0 && s.plan_gib > 0.0, "{s:?}");
        assert!((s.images_per_s * s.median_us / (1e6 * s.batch as f64) - 1.0).abs() < 1e-9, "{s:?}");
    }
    let json = dir.0.join("speed.json");
    train::write_speeds(&all, &json).expect("a file");
    assert!(std::fs::read_to_string(&json).expect("a file").contains("\"step:semantic\""));
    // Nothing is left but the file and the data.
    assert_eq!(std::fs::read_dir(&dir.0).expect("a folder").count(), 2);
    let e = train::speed(&c, &open, None, 3, &HeldOut, &Group::alone())
        .expect_err("no step is counted")
        .to_string();
    assert!(e.contains("`--steps` is 3, wanted more than 3"), "{e}");
    let text = Config { stage: vec![c.stage[1].clone()], ..c.clone() };
    let e = train::speed(&text, &open, Some(StageKind::Gen), 5, &HeldOut, &Group::alone())
        .expect_err("no such stage");
    assert!(e.to_string().contains("`stage` is gen"), "{e}");
}

#[test]
fn a_run_follows_from_its_seed_and_not_from_its_threads() {
    let dir = Folder::new("same");
    pictures(&dir.0.join("data"));
    let mut c = config(&dir.0.join("data"));
    let weights = |c: &Config, name: &str| {
        let out = dir.0.join(name);
        run(c, &out).expect("the run ends");
        std::fs::read(out.join("model.safetensors")).expect("weights")
    };
    let first = weights(&c, "a");
    (c.train.threads, c.train.workers) = (2, 3);
    assert!(first == weights(&c, "b"), "more threads gave other bits than one");
    c.train.seed += 1;
    assert!(first != weights(&c, "c"), "the seed changes nothing");
}

#[test]
fn stages_without_anything_to_learn_from_are_refused() {
    let dir = Folder::new("refused");
    let data = dir.0.join("data");
    pictures(&data);
    std::fs::remove_file(data.join("metadata.jsonl")).expect("the file is there");
    let mut c = config(&data);
    c.stage.retain(|s| s.kind == StageKind::Semantic);
    let Err(e) = run(&c, &dir.0.join("a")) else { panic!("pictures without captions were accepted") };
    assert!(e.to_string().contains("none of its 8 pictures has a caption"), "{e}");
    c.stage.clear();
    let Err(e) = run(&c, &dir.0.join("b")) else { panic!("a run without stages was accepted") };
    assert!(e.to_string().contains("[[stage]]"), "{e}");
}

#[test]
fn every_arm_runs_all_stages() {
    let dir = Folder::new("arms");
    pictures(&dir.0.join("data"));
    for (arm, alpha) in [(Arm::Index, 0.25), (Arm::Embed, 0.25), (Arm::Ett, 0.0), (Arm::Ett, 1.0)] {
        let mut c = config(&dir.0.join("data"));
        (c.train.arm, c.loss.alpha) = (arm, alpha);
        run(&c, &dir.0.join(format!("{arm:?}-{alpha}"))).expect("the run ends");
    }
}

#[test]
fn numbers_that_are_not_finite_are_skipped_dumped_once_and_then_stop_the_run() {
    not_finite("nonfinite", Arc::new(Cpu::poisoned(1).expect("a thread")));
}

/// Steps are replayed there, and the host learns a step later that one was skipped.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_numbers_that_are_not_finite_are_skipped_dumped_once_and_then_stop_the_run() {
    not_finite("gpu-nonfinite", crate::common::gpu());
}

fn not_finite(name: &str, dev: Arc<dyn Kernels>) {
    let dir = Folder::new(name);
    pictures(&dir.0.join("data"));
    let mut c = config(&dir.0.join("data"));
    c.stage = vec![StageConfig::new(StageKind::Align, 30, 3)];
    let model = Ett::new(&c, Arc::new(Cpu::poisoned(1).expect("a thread"))).expect("a model");
    let mut norm =
        model.params.read("model.norm.weight", Stored::Master).expect("readable").expect("a weight");
    // Finite, as weights have to be, but everything computed from them overflows.
    norm.values.fill(3e38);
    model.params.write_public("model.norm.weight", Stored::Master, &norm).expect("a weight");
    let (init, out) = (dir.0.join("nan.safetensors"), dir.0.join("out"));
    io::save_weights(&model.params, &init, Stored::Master).expect("weights");
    let o = RunOptions { init: Some(&init), ..RunOptions::quiet(&out, &HeldOut) };
    let Err(e) = train::run(&c, dev, &o) else { panic!("a model of NaN was trained") };
    assert!(e.to_string().contains("21 updates in a row had non-finite losses or gradients"), "{e}");
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    assert!(metrics.lines().count() <= 21, "{metrics}");
    let files: Vec<String> = std::fs::read_dir(&out)
        .expect("the run's folder")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with("nonfinite-"))
        .collect();
    assert_eq!(files, ["nonfinite-align-0.safetensors"]);
    let inputs = io::weights::read_file(&out.join(&files[0])).expect("the inputs of step 0");
    assert_eq!(inputs["part.0.image.0"].dims, [3, 32, 32, 3]);
    assert!(
        inputs.contains_key("part.0.text") && inputs.contains_key("part.0.target"),
        "{:?}",
        inputs.keys()
    );
}

#[test]
fn a_stage_reads_data_of_its_own() {
    let dir = Folder::new("own-data");
    pictures(&dir.0.join("data"));
    let mut c = config(&dir.0.join("data"));
    c.stage.retain(|s| matches!(s.kind, StageKind::Tokenizer | StageKind::Align));
    c.stage[0].data = StageData {
        source: Some(Source::Scenes),
        size: Some(24),
        train_samples: Some(24),
        test_samples: Some(4),
        ..StageData::default()
    };
    let out = dir.0.join("out");
    let done = run(&c, &out).expect("the run ends");
    // The closing evaluation uses the run's own pictures.
    let report = done.report.expect("a held-out folder was named");
    assert_eq!((report.pictures, report.size, report.captions), (8, 32, 8));
    // With the same pictures in all stages the weights differ.
    let plain = Config {
        stage: c.stage.iter().map(|s| StageConfig { data: StageData::default(), ..s.clone() }).collect(),
        ..c.clone()
    };
    let other = dir.0.join("plain");
    run(&plain, &other).expect("the run ends");
    let weights = |out: &Path| std::fs::read(out.join("model.safetensors")).expect("weights");
    assert_ne!(weights(&out), weights(&other));
    let e = Config {
        stage: vec![StageConfig {
            data: StageData { size: Some(15), ..StageData::default() },
            ..c.stage[1].clone()
        }],
        ..c
    }
    .check()
    .expect_err("15 pixels are no multiple of 2")
    .to_string();
    assert!(e.contains("stage.0.data.size") && e.contains("15"), "{e}");
}

#[test]
fn reconstructions_are_evaluated_with_the_averages() {
    let dir = Folder::new("averages");
    pictures(&dir.0.join("data"));
    let mut c = config(&dir.0.join("data"));
    c.stage = vec![StageConfig { lr: Some(1e-2), ema: true, ..StageConfig::new(StageKind::Tokenizer, 4, 3) }];
    c.train.ema_decay = 0.9;
    let out = dir.0.join("out");
    let done = run(&c, &out).expect("the run ends");
    let report = done.report.as_ref().expect("a held-out folder was named");
    assert_eq!(report.reconstructed_by, "averages of the weights");
    let dev = || Arc::new(Cpu::new(1).expect("a thread"));
    let mse = |ema: bool| {
        let mut trained = Trained::open(&out, dev(), ema).expect("a run");
        evaluate_run(&mut trained, None, None, &dir.0.join("eval")).expect("an evaluation")
    };
    // As during training, with the averages beside the weights; and with the averages in place of the weights.
    let (beside, instead) = (mse(false), mse(true));
    assert_eq!((beside.mse, beside.reconstructed_by), (report.mse, report.reconstructed_by));
    assert_eq!((instead.mse, instead.reconstructed_by), (report.mse, "the weights"));
    // The weights alone give another number, so evaluating has left them unchanged.
    std::fs::remove_file(out.join("ema.safetensors")).expect("averages were kept");
    let live = mse(false);
    assert!(live.reconstructed_by == "the weights" && live.mse != report.mse);
    let lines = std::fs::read_to_string(out.join("metrics.jsonl")).expect("metrics");
    let last: serde_json::Value = serde_json::from_str(lines.lines().last().expect("lines")).expect("JSON");
    assert_eq!(last["eval"]["mse"].as_f64(), Some(report.mse), "the evaluation after the last step, too");
}

#[test]
fn a_profile_has_every_stage_and_the_evaluation() {
    let dir = Folder::new("profile");
    pictures(&dir.0.join("data"));
    let mut c = config(&dir.0.join("data"));
    c.stage.truncate(2);
    let dev = Arc::new(Cpu::poisoned(1).expect("a thread"));
    dev.start_profile().expect("the CPU measures");
    let out = dir.0.join("out");
    let o = RunOptions::quiet(&out, &HeldOut);
    let done = train::run(&c, dev, &o).expect("the run ends");
    let text = std::fs::read_to_string(out.join("profile.json")).expect("a profile");
    let all: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((all["format"].as_u64(), all["device"].as_str()), (Some(1), Some("cpu (1 threads)")));
    let parts = all["parts"].as_array().expect("parts");
    let named: Vec<_> = parts.iter().map(|p| (p["part"].as_str(), p["steps"].as_u64())).collect();
    // Without the first step of each stage.
    let want = [("tokenizer", 1), ("text", 1), ("evaluation", 0)];
    assert_eq!(named, want.map(|(part, steps)| (Some(part), Some(steps))));
    let kernels = |part: usize| parts[part]["kernels"].as_array().expect("kernels").clone();
    let calls = |part: usize, name: &str| {
        kernels(part).iter().find(|k| k["kernel"] == name).and_then(|k| k["calls"].as_u64())
    };
    // Encoder, decoder and discriminator; the language model; nothing.
    assert_eq!([0, 1, 2].map(|part| calls(part, "adamw")), [Some(3), Some(1), None]);
    for (part, (name, _)) in want.into_iter().enumerate() {
        let sum = |key: &str| kernels(part).iter().filter_map(|k| k[key].as_f64()).sum::<f64>();
        let total = |key: &str| parts[part][key].as_f64().expect("a number");
        assert!((sum("share") - 1.0).abs() < 1e-9 && total("seconds") > 0.0, "{name}");
        assert!((sum("seconds") - total("seconds")).abs() < 1e-9, "{name}");
        assert!((sum("idle_seconds") - total("idle_seconds")).abs() < 1e-9, "{name}");
        assert!(sum("tflop_per_s") > 0.0 && sum("gb_per_s") > 0.0, "{name}");
    }
    let table = done.profiles.table();
    for part in ["\ntokenizer, 1 steps: ", "\nevaluation: ", "\n  conv2d_fwd ", "TFLOP/s"] {
        assert!(table.contains(part), "{part} in {table}");
    }
}
