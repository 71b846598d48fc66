//! The command line of runs on several ranks, as far as one process can tell.

use std::process::{Command, Stdio};

use crate::common::{Outcome, program};
use crate::process::{Place, done, refused, stages, text};

/// `ett-train run` without a device.
fn run(place: &Place, more: &[&str]) -> Command {
    let mut command = Command::new(program("ett-train"));
    command.args(["run", "--quiet", "--config"]).arg(place.path("configs/tiny.toml"));
    command.arg("--out").arg(place.path("out")).args(more).stdin(Stdio::null());
    command
}

#[test]
fn command_lines_that_make_no_sense_are_refused() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    for (args, what) in [
        (&["--gpus", "0,1,0"][..], "GPU 0 is named twice"),
        (&["--gpus", "one"], "\"one\" is not a number; give all, or numbers such as 0,2,3"),
        (&["--gpus", ""], "is not a number"),
        (&["--gpus", "0", "--device", "cpu"], "cannot be used with"),
        (&["--ranks", "0"], "0 is not in 1..=1024"),
        (&["--ranks", "-1"], "-1"),
    ] {
        let out = run(&place, args).output()?;
        let said = text(&out.stderr);
        assert!(out.status.code() == Some(2) && said.contains(what), "{args:?}: {said}");
    }
    for device in ["auto", "cuda"] {
        let said = refused(&mut run(&place, &["--ranks", "2", "--device", device]))?;
        let want = "wanted with --gpus, for ranks on GPUs, or with --device cpu";
        assert!(said.contains(&format!("`--ranks` is 2 with --device {device}, {want}")), "{said}");
    }
    let mut speed = Command::new(program("ett-train"));
    speed.args(["speed", "--device", "cpu", "--scaling", "--config"]).arg(place.path("configs/tiny.toml"));
    let said = refused(&mut speed)?;
    assert!(said.contains("`--scaling` is given, wanted with --gpus or --ranks"), "{said}");
    assert!(!place.path("out").exists(), "nothing was begun");
    Ok(())
}

#[test]
fn gpus_that_are_not_there_are_refused() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    let said = refused(run(&place, &["--gpus", "777"]).env("CUDA_VISIBLE_DEVICES", ""))?;
    // Without kernels, without a driver, or without GPUs.
    let why = ["was built without its CUDA kernels", "libcuda", "the driver", "which has no GPU"];
    assert!(why.iter().any(|w| said.contains(w)), "{said}");
    assert!(!place.path("out").exists(), "nothing was begun");
    Ok(())
}

#[test]
fn plans_of_several_ranks_start_none() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    let plan = |ranks: &'static str| place.run("out", &["--plan", "--memory", "1GiB", "--ranks", ranks]);
    let (said, log) = done(&mut plan("2"))?;
    assert!(said.contains("stage tokenizer: batch 2") && !log.contains("starting"), "{said}{log}");
    let said = refused(&mut plan("4"))?;
    assert!(said.contains("`stage.0.batch` is 2, wanted a multiple of 4 ranks x 1 parts"), "{said}");
    Ok(())
}

#[test]
fn one_rank_is_a_process_without_a_launcher() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 2))?;
    let (_, log) = done(&mut place.run("out", &["--ranks", "1"]))?;
    assert!(!log.contains("starting"), "{log}");
    // A rank that another program has started starts no others.
    let mut only = place.run("only", &["--ranks", "2"]);
    let vars = [("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
    let (_, log) = done(only.envs(vars))?;
    assert!(!log.contains("starting"), "{log}");
    let weights = |out: &str| std::fs::read(place.path(out).join("model.safetensors"));
    assert!(weights("only")? == weights("out")?);
    Ok(())
}

#[test]
fn what_all_ranks_would_refuse_is_refused_once() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    for mut command in [
        place.run("out", &["--ranks", "2", "--set", "train.lr=many"]),
        place.run("out", &["--ranks", "2", "--set", "absent.key=1"]),
    ] {
        command.stdout(Stdio::null());
        let out = command.output()?;
        let said = text(&out.stderr);
        let errors = said.lines().filter(|l| l.contains("error: ")).count();
        assert!(out.status.code() == Some(1) && errors == 1 && !said.contains("rank 1"), "{said}");
    }
    let mut resume = place.resume("absent");
    let said = refused(resume.args(["--ranks", "2"]))?;
    assert!(said.contains("absent"), "{said}");
    Ok(())
}
