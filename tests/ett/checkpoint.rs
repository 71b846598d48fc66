//! Checkpoints restore everything bit for bit, report damage, and survive full disks and killed runs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use ett::config::{Config, Operands, SamplingConfig, StageKind};
use ett::error::Result;
use ett::files::{Lines, probe, replace, write_synced};
use ett::infer::Trained;
use ett::interrupt;
use ett::io::{Checkpoints, Fingerprint, History, Progress, Skill, Texts, checkpoints};
use ett::nn::Stored;
use ett::train::{Optimizer, checkpoint};

use ett::io::weights::TensorFile;

use crate::common::{Outcome, Scratch, cpu};
use crate::training::{Bits, Run, batch, bits, small};

/// Set in the child process that a test starts.
const INSIDE: &str = "ETT_TEST_CHECKPOINT";
/// Maximum size of files in the child process, in bytes.
const LIMIT: &str = "ETT_TEST_FILE_LIMIT";

/// A run of the semantic stage with discriminator and averages, after `steps` steps.
fn run_of(cfg: &Config, steps: usize) -> Result<Run> {
    let mut run = Run::new(cfg, cpu(2), StageKind::Semantic, 1e-3)?;
    run.model.params.average(&["encoder", "decoder", "discriminator"])?;
    for _ in 0..steps {
        advance(&mut run)?;
    }
    Ok(run)
}

fn advance(run: &mut Run) -> Result<()> {
    let batch = batch(&run.model, &[[2, 32, 32]], StageKind::Semantic)?;
    run.step(&batch)?;
    Ok(())
}

fn optimizers(run: &Run) -> Vec<&Optimizer> {
    std::iter::once(&run.main).chain(&run.disc).collect()
}

fn save(run: &Run, to: &Checkpoints, total: usize) -> Result<PathBuf> {
    checkpoint::save(to, &run.model, &optimizers(run), &Progress { total, ..Progress::default() })
}

fn load(run: &mut Run, folder: &Path) -> Result<()> {
    let optimizers: Vec<&Optimizer> = std::iter::once(&run.main).chain(&run.disc).collect();
    checkpoint::load(folder, &mut run.model, &optimizers)
}

/// Weights, averages, moments and the discriminator's state.
fn everything(run: &Run) -> Result<Vec<Bits>> {
    [Stored::Master, Stored::Ema, Stored::Moment1, Stored::Moment2]
        .map(|c| bits(&run.model, c))
        .into_iter()
        .collect()
}

fn refused<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("this has to fail"),
        Err(e) => e.to_string(),
    }
}

fn names(folder: &Path) -> Vec<String> {
    let found = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<_> =
        found.map(|e| e.expect("an entry").file_name().into_string().expect("a plain name")).collect();
    names.sort();
    names
}

#[test]
fn everything_comes_back_bit_for_bit() -> Outcome {
    let operands =
        [("f32", Operands::Act), ("f64", Operands::Act), ("bf16", Operands::Act), ("bf16", Operands::F32)];
    for (precision, operands) in operands {
        let scratch = Scratch::new();
        let mut cfg = small(precision);
        cfg.quantizer.precision = operands;
        let mut whole = run_of(&cfg, 2)?;
        let progress = Progress {
            stage: 3,
            stage_name: "semantic".into(),
            step: 2,
            total: 120,
            skipped: 5,
            in_a_row: 1,
            seconds: vec![("tokenizer".into(), 1.5), ("semantic".into(), 0.25)],
            metrics: 1 << 40,
            data: vec![Fingerprint {
                names: Texts { count: 7, crc32: 8 },
                pictures: 6,
                ..Fingerprint::default()
            }],
            history: History { learnt: [Skill::Draw].into(), unknown: true, text: "bytes".into() },
            window: vec![0, -1, i32::MAX, i32::MIN, 7],
            tokenizer: Some(b"the file of a tokenizer"[..].into()),
        };
        let to = Checkpoints::new(&scratch.path("run"), 3);
        let folder = checkpoint::save(&to, &whole.model, &optimizers(&whole), &progress)?;
        assert_eq!(folder, scratch.path("run/checkpoints/step-00000120"));
        let files = [
            "config.toml",
            "ema.safetensors",
            "model.safetensors",
            "state.json",
            "tokenizer.json",
            "training.safetensors",
        ];
        assert_eq!(names(&folder), files);
        assert_eq!(checkpoints::progress(&folder)?, progress);
        let weights = TensorFile::open(&folder.join("model.safetensors"))?;
        assert_eq!(History::of(&weights), Some(progress.history));

        // Into a run that has diverged.
        cfg.train.seed += 1;
        let mut other = run_of(&cfg, 1)?;
        other.model.params.average(&["llm"])?;
        assert!(everything(&other)? != everything(&whole)?);
        load(&mut other, &folder)?;
        assert!(everything(&other)? == everything(&whole)?, "{precision}: tensors after loading");
        let steps = |o: &Optimizer| o.steps(&**other.model.params.device());
        assert_eq!((steps(&other.main)?, other.disc.as_ref().map(steps).transpose()?), (2, Some(2)));
        advance(&mut whole)?;
        advance(&mut other)?;
        assert!(everything(&other)? == everything(&whole)?, "{precision}: tensors a step later");
    }
    Ok(())
}

#[test]
fn names_are_public_and_the_folder_is_a_model() -> Outcome {
    let scratch = Scratch::new();
    let mut cfg = small("f32");
    cfg.llm.vocab = 264;
    let run = run_of(&cfg, 1)?;
    let folder = save(&run, &Checkpoints::new(&scratch.path("run"), 1), 1)?;
    let training = TensorFile::open(&folder.join("training.safetensors"))?;
    for layer in [3, 6, 9] {
        let name = |what: &str| format!("loss.discriminator.main.{layer}.{what}");
        let tracked = training.read(&name("num_batches_tracked"))?;
        assert_eq!((tracked.dims, tracked.values), (vec![], vec![3.0]));
        assert!(training.read(&name("running_mean"))?.values.iter().any(|&v| v != 0.0));
        assert!(training.read(&name("running_var"))?.values.iter().all(|&v| v > 0.0 && v != 1.0));
    }
    assert_eq!(training.read("loss.lecam_ema")?.dims, [2]);
    let trained = Trained::open(&folder, cpu(1), false)?;
    assert!(
        bits(&trained.model, Stored::Master)?["model.norm.weight"]
            == bits(&run.model, Stored::Master)?["model.norm.weight"]
    );
    Ok(())
}

#[test]
fn averages_outlast_stages_that_do_not_train_them() -> Outcome {
    let scratch = Scratch::new();
    let mut run = run_of(&small("f32"), 1)?;
    run.model.params.train(&["llm"])?;
    let want = bits(&run.model, Stored::Ema)?;
    let folder = checkpoint::save(
        &Checkpoints::new(&scratch.path("run"), 1),
        &run.model,
        &[&run.main],
        &Progress::default(),
    )?;
    let mut other = Run::new(&small("f32"), cpu(1), StageKind::Text, 1e-3)?;
    load(&mut other, &folder)?;
    assert!(bits(&other.model, Stored::Ema)? == want);
    Ok(())
}

#[test]
fn checkpoints_of_other_training_are_refused() -> Outcome {
    let scratch = Scratch::new();
    let run = run_of(&small("f32"), 1)?;
    let folder = save(&run, &Checkpoints::new(&scratch.path("run"), 1), 1)?;
    let refuse = |mut other: Run, wants: &[&str]| -> Outcome {
        let before = everything(&other)?;
        let e = refused(load(&mut other, &folder));
        assert!(wants.iter().all(|w| e.contains(w)), "{e}");
        assert!(everything(&other)? == before, "nothing is changed");
        assert!(other.main.steps(&**other.model.params.device())? < 2, "nor the steps");
        Ok(())
    };
    let mut wide = small("f32");
    wide.llm.width = 32;
    refuse(run_of(&wide, 1)?, &["wanted [40, 32]", "and ", " more"])?;
    let mut deep = small("f32");
    deep.llm.layers = 3;
    refuse(run_of(&deep, 1)?, &["missing `model.layers.2."])?;
    deep.llm.layers = 1;
    refuse(run_of(&deep, 1)?, &["unknown `model.layers.1."])?;
    refuse(run_of(&small("f64"), 1)?, &["is F32, wanted F64"])?;
    let text = Run::new(&small("f32"), cpu(1), StageKind::Text, 1e-3)?;
    refuse(
        text,
        &[
            "it trained the groups",
            "this run trains [\"llm\"]",
            "it had 2 optimizers, now 1",
            "unknown `moment1.",
        ],
    )
}

#[test]
fn changed_configurations_are_named() -> Outcome {
    let scratch = Scratch::new();
    let run = Run::new(&small("f32"), cpu(1), StageKind::Text, 1e-3)?;
    let folder = save(&run, &Checkpoints::new(&scratch.path("run"), 1), 1)?;
    let mut cfg = small("f32");
    checkpoint::check_config(&folder, &cfg)?;
    (cfg.train.threads, cfg.data.eval_samples, cfg.data.train) = (7, 3, "elsewhere".into());
    cfg.sampling = SamplingConfig { temperature: 0.5, top_k: 5, top_p: 0.5, guidance: 2.0 };
    checkpoint::check_config(&folder, &cfg)?;
    cfg.train.lr = 0.5;
    cfg.tokenizer.ch_mult.push(2);
    cfg.lpips.weights = Some("vgg".into());
    let e = refused(checkpoint::check_config(&folder, &cfg));
    for what in [
        "`train.lr` was",
        "now 0.5",
        "`tokenizer.ch_mult` was [1, 1, 2], now [1, 1, 2, 2]",
        "left out, now \"vgg\"",
    ] {
        assert!(e.contains(what), "{e}");
    }
    assert!(!e.contains("threads"), "{e}");
    Ok(())
}

#[test]
fn damage_is_named_and_nothing_loaded() -> Outcome {
    let scratch = Scratch::new();
    let run = run_of(&small("f32"), 1)?;
    let folder = save(&run, &Checkpoints::new(&scratch.path("run"), 1), 1)?;
    let mut other = Run::new(&small("f32"), cpu(1), StageKind::Semantic, 1e-3)?;
    let before = everything(&other)?;
    let mut damaged = |file: &str, bytes: Option<&[u8]>| -> Outcome {
        let path = folder.join(file);
        let good = std::fs::read(&path)?;
        match bytes {
            Some(bytes) => std::fs::write(&path, bytes)?,
            None => std::fs::remove_file(&path)?,
        }
        let e = refused(load(&mut other, &folder));
        assert!(e.contains(file), "{file} is not named: {e}");
        std::fs::write(&path, good)?;
        Ok(())
    };
    for file in names(&folder) {
        let good = std::fs::read(folder.join(&file))?;
        damaged(&file, None)?;
        damaged(&file, Some(&[]))?;
        damaged(&file, Some(&good[..good.len() - 1]))?;
        damaged(&file, Some(&[&good[..], &[0]].concat()))?;
        // Every byte of the small file, some bytes of the others.
        let step = if file == "state.json" { 1 } else { 1 + good.len() / 9 };
        for at in (0..good.len()).step_by(step).chain([good.len() - 1]) {
            let mut bad = good.clone();
            bad[at] ^= 1;
            damaged(&file, Some(&bad))?;
        }
    }
    assert!(everything(&other)? == before, "nothing is changed");
    load(&mut other, &folder)?;
    assert!(everything(&other)? == everything(&run)?);
    Ok(())
}

#[test]
fn other_formats_are_refused() -> Outcome {
    let scratch = Scratch::new();
    let run = Run::new(&small("f32"), cpu(1), StageKind::Text, 1e-3)?;
    let folder = save(&run, &Checkpoints::new(&scratch.path("run"), 1), 1)?;
    let state = "{\"format\": 2}";
    let text = format!("{{\"crc32\": \"{:08x}\",\n\"state\": {state}}}\n", crc32fast::hash(state.as_bytes()));
    std::fs::write(folder.join("state.json"), text)?;
    let e = refused(checkpoints::progress(&folder));
    let said = "has the format 2, but this program reads the format 1; use a newer version of ett";
    assert!(e.ends_with(said), "{e}");
    // Nor is the run taken up from an earlier checkpoint behind the user's back.
    let e = refused(Checkpoints::latest(&scratch.path("run")));
    assert!(e.starts_with(&folder.join("state.json").display().to_string()) && e.ends_with(said), "{e}");
    std::fs::remove_file(scratch.path("run/checkpoints/latest"))?;
    assert!(refused(Checkpoints::latest(&scratch.path("run"))).ends_with(said));
    Ok(())
}

#[test]
fn the_newest_are_kept() -> Outcome {
    let scratch = Scratch::new();
    let run = Run::new(&small("f32"), cpu(1), StageKind::Text, 1e-3)?;
    let at = scratch.path("run");
    let all = at.join("checkpoints");
    assert_eq!(Checkpoints::latest(&at)?, None);
    let to = Checkpoints::new(&at, 2);
    for total in [2, 4, 6, 6, 8] {
        let folder = save(&run, &to, total)?;
        assert_eq!(Checkpoints::latest(&at)?, Some(folder));
    }
    assert_eq!(names(&all), ["latest", "step-00000006", "step-00000008"]);
    // A run that continues from an earlier checkpoint removes the later ones.
    std::fs::write(all.join("latest"), "step-00000006\n")?;
    std::fs::create_dir(all.join(".step-00000007.part"))?;
    std::fs::write(all.join(".latest.part"), "step-")?;
    save(&run, &to, 7)?;
    assert_eq!(names(&all), ["latest", "step-00000006", "step-00000007"]);
    // The latest checkpoint itself is always kept.
    save(&run, &Checkpoints::new(&at, 0), 9)?;
    assert_eq!(names(&all), ["latest", "step-00000009"]);
    Ok(())
}

#[test]
fn the_latest_is_found_whatever_a_killed_run_left() -> Outcome {
    let scratch = Scratch::new();
    let run = Run::new(&small("f32"), cpu(1), StageKind::Text, 1e-3)?;
    let at = scratch.path("run");
    let all = at.join("checkpoints");
    let folder = |n: usize| all.join(format!("step-{n:08}"));
    let to = Checkpoints::new(&at, 9);
    for total in [2, 4, 6, 8] {
        save(&run, &to, total)?;
    }
    let latest = || Checkpoints::latest(&at);
    // Killed between renaming the folder and renaming `latest`.
    std::fs::write(all.join("latest"), "step-00000006\n")?;
    assert_eq!(latest()?, Some(folder(6)));
    // Killed between the two renames of a checkpoint that replaces one of the same step. The reader must not repair
    // it, since another run may be about to do the second rename.
    let part = all.join(".step-00000006.part");
    std::fs::rename(folder(6), &part)?;
    assert_eq!(latest()?, Some(part.clone()));
    assert!(!folder(6).exists());
    std::fs::rename(&part, folder(6))?;
    for named in ["", "step-00000007", "../step-00000006", "nonsense"] {
        std::fs::write(all.join("latest"), named)?;
        assert_eq!(latest()?, Some(folder(8)), "{named}");
    }
    std::fs::remove_file(all.join("latest"))?;
    assert_eq!(latest()?, Some(folder(8)));
    // Incomplete checkpoints: one lacks a file, one has a truncated file.
    std::fs::write(all.join("latest"), "step-00000008\n")?;
    std::fs::remove_file(folder(8).join("config.toml"))?;
    assert_eq!(latest()?, Some(folder(6)));
    std::fs::write(folder(6).join("model.safetensors"), b"short")?;
    assert_eq!(latest()?, Some(folder(4)));
    std::fs::create_dir(all.join(".step-00000009.part"))?;
    std::fs::write(folder(4).join("state.json"), b"{")?;
    std::fs::remove_dir_all(folder(2))?;
    let e = refused(latest());
    assert!(e.contains("no complete checkpoint"), "{e}");
    Ok(())
}

/// Runs a test of this file in a process of its own, after some shell commands.
fn inside(test: &str, first: &str, run: &Path, limit: &str) -> std::io::Result<Output> {
    Command::new("sh")
        .args(["-c", &format!("{first} exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe()?)
        .args(["--exact", &format!("checkpoint::{test}"), "--nocapture", "--include-ignored"])
        .env(INSIDE, run)
        .env(LIMIT, limit)
        .output()
}

fn inner() -> Option<PathBuf> {
    std::env::var_os(INSIDE).map(PathBuf::from)
}

/// Saves until the disk is full, then checks what is left.
fn fill_the_disk(at: &Path) -> Outcome {
    let run = run_of(&small("f32"), 1)?;
    let to = Checkpoints::new(at, 100);
    let e = refused((2..100).try_for_each(|total| save(&run, &to, total).map(|_| ())));
    println!("{e}");
    let last = Checkpoints::latest(at)?.ok_or("a checkpoint was saved before")?;
    assert!(e.contains("the disk is full"), "{e}");
    assert!(e.contains(&format!("the last checkpoint, {}, is complete", last.display())), "{e}");
    assert!(
        names(&at.join("checkpoints")).iter().all(|n| !n.ends_with(".part")),
        "the unfinished checkpoint is removed"
    );
    let mut other = run_of(&small("f32"), 0)?;
    load(&mut other, &last)?;
    assert!(everything(&other)? == everything(&run)?);
    // Other files of a run.
    let big = at.join("big");
    write_synced(&big, b"old")?;
    assert!(ett::files::is_full(&replace(&big, |file| file.put(&vec![0; 16 << 20])).expect_err("full")));
    assert_eq!((std::fs::read(&big)?, at.join(".big.part").exists()), (b"old".to_vec(), false));
    Ok(())
}

/// A limit of the file size in place of a full disk, exceeded at the weights and at the moments.
#[cfg(unix)]
#[test]
fn a_full_disk_spoils_nothing() -> Outcome {
    if let Some(run) = inner() {
        let bytes = std::env::var(LIMIT)?.parse()?;
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
        // SAFETY: plain system calls; with the signal ignored, writing past the limit is an error.
        let set = unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit)
        };
        assert_eq!(set, 0);
        return fill_the_disk(&run);
    }
    let scratch = Scratch::new();
    let run = run_of(&small("f32"), 1)?;
    let at = scratch.path("run");
    let folder = save(&run, &Checkpoints::new(&at, 100), 1)?;
    for file in ["model.safetensors", "training.safetensors"] {
        let bytes = std::fs::metadata(folder.join(file))?.len() - 1;
        let out = inside("a_full_disk_spoils_nothing", "", &at, &bytes.to_string())?;
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
        assert!(text.contains("step-00000001, is complete") && text.contains(file), "{text}");
    }
    Ok(())
}

#[test]
#[ignore = "needs the right to mount"]
fn a_full_file_system_spoils_nothing() -> Outcome {
    if let Some(run) = inner() {
        return fill_the_disk(&run);
    }
    let scratch = Scratch::new();
    let at = scratch.path("run");
    std::fs::create_dir(&at)?;
    // In a mount namespace of its own, in which the shell runs itself again.
    let first = format!(
        "exec unshare --mount sh -c 'mount -t tmpfs -o size=8m none {} && exec \"$0\" \"$@\"' \"$0\" \"$@\";",
        at.display()
    );
    let out = inside("a_full_file_system_spoils_nothing", &first, &at, "")?;
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}{}", String::from_utf8_lossy(&out.stderr));
    assert!(text.contains("No space left"), "{text}");
    Ok(())
}

#[test]
fn files_are_replaced_where_links_point_and_only_where_they_can_be() -> Outcome {
    let scratch = Scratch::new();
    let names = || names(&scratch.path(""));
    let (a, link) = (scratch.path("a"), scratch.path("link"));
    replace(&a, |file| file.put(b"old"))?;
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(&a, &link)?;
        replace(&link, |file| file.put(b"new"))?;
        assert!(link.is_symlink() && std::fs::read(&a)? == b"new");
        std::fs::remove_file(&link)?;
    }
    #[cfg(target_os = "linux")]
    {
        // A device stays a device, and reports that it is full.
        let full = Path::new("/dev/full");
        probe(full)?;
        assert!(ett::files::is_full(&replace(full, |file| file.put(&[0; 100])).expect_err("full")));
        assert!(!full.metadata()?.is_file());
    }
    for (path, what) in [
        (scratch.path("absent/a"), "absent/a: its folder does not exist"),
        (scratch.path(""), "is a folder; name a file"),
        (a.join("b"), "a/b: "),
    ] {
        for e in [refused(probe(&path)), refused(replace(&path, |file| file.put(b"")))] {
            assert!(e.contains(what), "{e}");
        }
    }
    probe(&a)?;
    probe(&link)?;
    assert_eq!(names(), ["a"]);
    Ok(())
}

#[test]
fn metrics_are_cut_back_to_the_checkpoint() -> Outcome {
    let scratch = Scratch::new();
    let path = scratch.path("metrics.jsonl");
    let mut lines = Lines::resume(&path, 0)?;
    lines.push("one")?;
    let kept = lines.sync()?;
    lines.push("of a killed run")?;
    lines.sync()?;
    drop(lines);
    let mut lines = Lines::resume(&path, kept)?;
    lines.push("two")?;
    assert_eq!(lines.sync()?, 8);
    assert_eq!(std::fs::read_to_string(&path)?, "one\ntwo\n");
    drop(lines);
    // Shorter than at the checkpoint: complete lines stay.
    std::fs::write(&path, "one\ntw")?;
    let mut lines = Lines::resume(&path, 8)?;
    lines.push("three")?;
    assert_eq!(lines.sync()?, 10);
    assert_eq!(std::fs::read_to_string(&path)?, "one\nthree\n");
    std::fs::remove_file(&path)?;
    assert_eq!(Lines::resume(&path, 8)?.sync()?, 0);
    Ok(())
}

#[cfg(unix)]
#[test]
fn the_first_signal_asks_and_the_second_ends() -> Outcome {
    let Some(kind) = inner() else {
        for (kind, first) in [("INT", ""), ("TERM", ""), ("HUP", ""), ("ignored", "trap '' HUP;")] {
            let out = inside("the_first_signal_asks_and_the_second_ends", first, Path::new(kind), "")?;
            let text = String::from_utf8_lossy(&out.stdout);
            assert_eq!(out.status.code(), Some(130), "{kind}: {text}");
        }
        return Ok(());
    };
    // Sends a signal to this process; true if the run is asked to stop within `ms` milliseconds.
    let raise = |signal, ms| {
        // SAFETY: sends a signal to this process.
        unsafe { libc::kill(libc::getpid(), signal) };
        let start = Instant::now();
        while !interrupt::requested() && start.elapsed() < Duration::from_millis(ms) {
            std::thread::sleep(Duration::from_millis(1));
        }
        interrupt::requested()
    };
    interrupt::install()?;
    interrupt::install()?;
    interrupt::enter(interrupt::Phase::Training);
    assert!(!interrupt::requested() && interrupt::check().is_ok());
    let signal = match kind.to_str() {
        Some("INT") => libc::SIGINT,
        Some("HUP") => libc::SIGHUP,
        _ => libc::SIGTERM,
    };
    // As under nohup.
    assert!(kind.to_str() != Some("ignored") || !raise(libc::SIGHUP, 200), "an ignored signal asks");
    assert!(raise(signal, 10_000) && interrupt::check().is_err());
    raise(signal, 0);
    std::thread::sleep(Duration::from_secs(10));
    Err("the second signal was survived".into())
}
