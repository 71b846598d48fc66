//! The programs as people use them: several at once, output streams without readers, full disks, moved folders, and
//! the errors of invalid use.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ett::config::Config;
use ett::data::Special;
use ett::io::Checkpoints;
use serde_json::json;

use crate::common::{Outcome, Scratch};
use crate::run::pictures;

const TRAIN: &str = env!("CARGO_BIN_EXE_ett-train");
const USE: &str = env!("CARGO_BIN_EXE_ett");
/// Longer than any run in this file.
const LIMIT: Duration = Duration::from_secs(60);

/// The smallest model with all skills, for `data` beside the configuration's folder.
const MODEL: &str = r#"
[tokenizer]
ch = 8
ch_mult = [1, 2]
num_res_blocks = 1
z_channels = 8
norm_groups = 4
[quantizer]
codes = 16
dim = 4
[lpips]
widths = [4, 4, 4, 4, 4]
[discriminator]
ndf = 4
[llm]
vocab = 264
width = 16
layers = 1
heads = 2
kv_heads = 1
head_dim = 8
mlp = 24
[visual_head]
kind = "tied"
[train]
lr = 1e-3
threads = 1
save_every = 2
[data]
train = "../data"
size = 32
"#;

pub fn stages(kinds: &[&str], steps: usize) -> String {
    let stage = |kind: &&str| format!("[[stage]]\nkind = \"{kind}\"\nsteps = {steps}\nbatch = 2\n");
    kinds.iter().map(stage).collect()
}

/// Data, a configuration in a folder of its own, and the folders of its runs.
pub struct Place {
    scratch: Scratch,
}

impl Place {
    pub fn new(stages: &str) -> Result<Self, std::io::Error> {
        let place = Place { scratch: Scratch::new() };
        pictures(&place.path("data"));
        fs::create_dir(place.path("configs"))?;
        fs::write(place.path("configs/tiny.toml"), format!("{MODEL}{stages}"))?;
        Ok(place)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// `ett-train run` into `out`, with additional arguments.
    pub fn run(&self, out: &str, more: &[&str]) -> Command {
        let mut command = Command::new(TRAIN);
        command.args(["run", "--device", "cpu", "--quiet", "--config"]).arg(self.path("configs/tiny.toml"));
        command.arg("--out").arg(self.path(out)).args(more).stdin(Stdio::null());
        command
    }

    pub fn resume(&self, out: &str) -> Command {
        let mut command = Command::new(TRAIN);
        command.args(["resume", "--device", "cpu", "--quiet"]).arg(self.path(out)).stdin(Stdio::null());
        command
    }

    /// `ett COMMAND --run OUT`, with additional arguments.
    fn ett(&self, command: &str, out: &str, more: &[&str]) -> Command {
        let mut ett = Command::new(USE);
        ett.args([command, "--threads", "1", "--run"]).arg(self.path(out)).args(more).stdin(Stdio::null());
        ett
    }

    /// Starts a run and kills it after its first checkpoint.
    fn killed(&self, out: &str) -> Outcome {
        let mut running = Running::new(self.run(out, &[]).env("ETT_SAVE_PAUSE", "60"))?;
        running.saw("step-00000002: latest replaced");
        running.child.kill()?;
        running.child.wait()?;
        Ok(())
    }
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Standard output and standard error of a program that has to succeed.
pub fn done(command: &mut Command) -> Result<(String, String), std::io::Error> {
    let Output { status, stdout, stderr } = command.output()?;
    assert!(status.success(), "{status}: {}{}", text(&stdout), text(&stderr));
    Ok((text(&stdout), text(&stderr)))
}

/// The error message of a program that has to fail.
pub fn refused(command: &mut Command) -> Result<String, std::io::Error> {
    let Output { status, stdout, stderr } = command.output()?;
    let said = text(&stderr);
    assert_eq!(status.code(), Some(1), "{}{said}", text(&stdout));
    Ok(said.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("{said}")).to_string())
}

/// A running program whose standard error is read; it is killed when this value is dropped.
struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStderr>,
    seen: String,
}

impl Running {
    fn new(command: &mut Command) -> Result<Self, Box<dyn std::error::Error>> {
        command.env("ETT_LOG", "info,ett::checkpoint=debug").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let lines = BufReader::new(child.stderr.take().ok_or("standard error")?);
        Ok(Running { child, lines, seen: String::new() })
    }

    /// Waits for a line that contains `what`.
    fn saw(&mut self, what: &str) {
        loop {
            let from = self.seen.len();
            let read = self.lines.read_line(&mut self.seen).expect("lines of text");
            assert!(read > 0, "ended without {what:?}: {}", self.seen);
            if self.seen[from..].contains(what) {
                return;
            }
        }
    }

    /// Waits for the end and returns exit status, standard output and standard error.
    fn end(mut self) -> (Option<i32>, String, String) {
        let start = Instant::now();
        while self.child.try_wait().expect("a child can be waited for").is_none() {
            assert!(start.elapsed() < LIMIT, "it does not end: {}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
        self.lines.read_to_string(&mut self.seen).expect("text");
        let mut said = String::new();
        if let Some(out) = &mut self.child.stdout {
            out.read_to_string(&mut said).expect("text");
        }
        let status = self.child.wait().expect("a child can be waited for");
        (status.code(), said, std::mem::take(&mut self.seen))
    }

    #[cfg(unix)]
    fn signal(&self, signal: libc::c_int) {
        // SAFETY: sends a signal to a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_run_folder_belongs_to_one_process() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 6))?;
    let mut first = Running::new(place.run("out", &[]).env("ETT_SAVE_PAUSE", "150"))?;
    first.saw("step-00000002: latest replaced");
    let id = first.child.id();
    for mut other in [place.run("out", &[]), place.resume("out")] {
        let said = refused(&mut other)?;
        assert!(said.contains(&format!("out: is in use by process {id}; wait for it to end")), "{said}");
    }
    // The lock of a dead process does not matter.
    first.child.kill()?;
    first.child.wait()?;
    done(&mut place.resume("out"))?;
    assert_eq!(fs::read_to_string(place.path("out/metrics.jsonl"))?.lines().count(), 6);
    let said = refused(&mut place.resume("out"))?;
    assert!(said.contains("holds a finished run"), "{said}");
    // Two runs started at the same time, in a folder that does not exist.
    for name in ["a", "b", "c"] {
        let start = || Running::new(place.run(name, &[]).env("ETT_SAVE_PAUSE", "40"));
        let both = [start()?, start()?].map(Running::end);
        let mut codes = both.each_ref().map(|(code, ..)| *code);
        codes.sort();
        assert_eq!(codes, [Some(0), Some(1)], "{both:?}");
        assert!(both.iter().any(|(.., said)| said.contains("is in use by ")), "{both:?}");
        let metrics = fs::read_to_string(place.path(name).join("metrics.jsonl"))?;
        assert!(metrics.lines().count() == 6, "{metrics}");
        metrics.lines().try_for_each(|l| serde_json::from_str::<serde_json::Value>(l).map(drop))?;
    }
    // A run that fails before it begins leaves nothing behind.
    assert!(
        refused(place.run("d", &["--set", "data.eval_samples=0"]).arg("--init=absent"))?.contains("absent")
    );
    assert!(!place.path("d").exists());
    Ok(())
}

/// A pipe whose reader has closed it.
fn unread() -> std::io::Result<Stdio> {
    std::io::pipe().map(|(_, writer)| writer.into())
}

#[cfg(target_os = "linux")]
fn full() -> std::io::Result<Stdio> {
    fs::File::options().write(true).open("/dev/full").map(Stdio::from)
}

#[cfg(target_os = "linux")]
#[test]
fn streams_that_nobody_reads_stop_no_training() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 3))?;
    for (name, stream) in [("unread", unread as fn() -> std::io::Result<Stdio>), ("full", full)] {
        let status = place.run(name, &[]).stdout(stream()?).stderr(stream()?).status()?;
        assert_eq!(status.code(), Some(0), "{name}");
        assert!(place.path(name).join("model.safetensors").exists());
        let plan = place.run("plan", &["--plan", "--memory", "1GiB"]);
        let mut inspect = Command::new(USE);
        inspect.arg("inspect").arg(place.path(name));
        let caption = place.ett("caption", name, &[&place.text("data/0.png"), &place.text("data/1.png")]);
        for mut command in [plan, inspect, caption] {
            let Output { status, stderr, .. } = command.stdout(stream()?).env("ETT_LOG", "error").output()?;
            // A pipe closed by `head` is no failure, a full disk is one.
            let (want, said) = if name == "full" { (1, "error: standard output: ") } else { (0, "") };
            assert_eq!(status.code(), Some(want), "{name} {command:?}: {}", text(&stderr));
            assert!(
                text(&stderr).starts_with(said) && !text(&stderr).contains("panicked"),
                "{}",
                text(&stderr)
            );
            assert_eq!(stderr.is_empty(), name == "unread", "{}", text(&stderr));
        }
        let what = place.run("plan", &["--plan", "--config", "absent"]).stderr(stream()?).status()?;
        assert_eq!(what.code(), Some(2), "an argument twice");
        assert_eq!(place.resume(name).stderr(stream()?).status()?.code(), Some(1));
    }
    // Interrupted while its output has no reader.
    let mut command = place.run("interrupted", &["--set", "stage.0.steps=100000"]);
    let mut child = command.stdout(unread()?).stderr(unread()?).spawn()?;
    let start = Instant::now();
    while Checkpoints::latest(&place.path("interrupted"))?.is_none() {
        assert!(start.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(5));
    }
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) };
    assert_eq!(child.wait()?.code(), Some(0));
    Ok(())
}

#[cfg(target_os = "linux")]
#[test]
fn pictures_are_written_whole_or_refused_before_the_work() -> Outcome {
    let place = Place::new(&stages(&["gen"], 1))?;
    done(&mut place.run("out", &[]))?;
    let (sheet, jpeg) = (place.text("sheet.png"), place.text("sheet.jpg"));
    done(&mut place.ett("generate", "out", &["a", "--out", &jpeg]))?;
    assert!(fs::read(&jpeg)?.starts_with(b"\xff\xd8\xff"), "a JPEG by its name");
    let said = refused(&mut place.ett("generate", "out", &["a", "--out", "/dev/full"]))?;
    assert!(said.contains("/dev/full: No space left"), "{said}");
    // A limit of the file size in place of a full disk.
    fs::write(&sheet, "the older one")?;
    let (picture, each) = (place.text("data/0.png"), place.text("each"));
    let limited = |args: &[&str]| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"", USE]);
        shell.args(args).args(["--threads", "1", "--out", &sheet, "--run"]).arg(place.path("out"));
        refused(&mut shell)
    };
    for args in [&["reconstruct", &picture][..], &["generate", "a", "b", "--count", "9"]] {
        let said = limited(args)?;
        assert!(said.contains("sheet.png: File too large"), "{said}");
        assert_eq!(fs::read(&sheet)?, b"the older one");
    }
    assert!(!place.path(".sheet.png.part").exists());
    // The run does not exist, but the output path is checked first.
    for (out, what) in [
        ("absent/a.png", "absent/a.png: its folder does not exist; create it first"),
        ("a.gif", "a.gif: pictures are written as .png, .jpg, .jpeg or .webp"),
        ("data", "data: is a folder; name a file"),
    ] {
        for args in [["reconstruct", &picture], ["generate", "a"]] {
            let said = refused(&mut place.ett(args[0], "no-run", &[args[1], "--out", &place.text(out)]))?;
            assert!(said.contains(what), "{said}");
        }
    }
    done(&mut place.ett("reconstruct", "out", &[&picture, "--out", &sheet, "--each", &each]))?;
    assert!(place.path("each/00000-0.png").exists());
    // Negative numbers are values, not options.
    done(&mut place.ett("generate", "out", &["a", "--guidance", "-5", "--out", &sheet]))?;
    let said = refused(&mut place.ett("generate", "out", &["a", "--temperature", "-1", "--out", &sheet]))?;
    assert!(said.contains("`temperature` is -1"), "{said}");
    let said =
        refused(&mut place.ett("reconstruct", "out", &[&picture, "--max-side", "0", "--out", &sheet]))?;
    assert!(said.contains("`max_side` is 0, wanted 2 to 16384 pixels"), "{said}");
    Ok(())
}

/// A tokenizer of bytes whose ids are rotated by `turn`.
fn tokenizer(turn: usize) -> String {
    let letters = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut letters: Vec<String> = letters.into_iter().map(String::from).collect();
    letters.sort();
    letters.rotate_left(turn);
    let vocab: serde_json::Map<_, _> = letters.into_iter().enumerate().map(|(i, l)| (l, json!(i))).collect();
    let added = |(i, s): (usize, &Special)| {
        json!({"id": 256 + i, "content": s.name(), "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let added: Vec<_> = Special::ALL.iter().enumerate().map(added).collect();
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
    .to_string()
}

#[test]
fn a_run_owns_its_text_tokenizer() -> Outcome {
    let place = Place::new(&stages(&["align"], 4))?;
    let file = place.path("configs/text.json");
    fs::write(&file, tokenizer(0))?;
    let config = fs::read_to_string(place.path("configs/tiny.toml"))?;
    fs::write(
        place.path("configs/tiny.toml"),
        config.replace("[data]", "[data]\ntokenizer = \"text.json\""),
    )?;
    place.killed("out")?;
    // Another tokenizer of equal size at the original path; then none.
    fs::write(&file, tokenizer(1))?;
    assert_eq!(fs::read(place.path("out/tokenizer.json"))?, tokenizer(0).as_bytes());
    done(&mut place.resume("out"))?;
    fs::remove_file(&file)?;
    // From another working directory, after the folder was moved.
    fs::rename(place.path("out"), place.path("moved"))?;
    let picture = place.text("data/0.png");
    let caption = |out: &str| place.ett("caption", out, &[&picture]);
    let said = done(caption("moved").current_dir("/"))?.0;
    let last = Checkpoints::latest(&place.path("moved"))?.ok_or("a checkpoint")?;
    assert_eq!(done(&mut caption(&last.display().to_string()))?.0, said);
    for bytes in [tokenizer(2), tokenizer(0).replace("<|im_end|>", "<|im_gone|>")] {
        fs::write(place.path("moved/tokenizer.json"), &bytes)?;
        let said = refused(&mut caption("moved"))?;
        assert!(said.contains("moved/tokenizer.json: "), "{said}");
        assert!(
            said.contains("is not the one of the weights") || said.contains("lacks <|im_end|>"),
            "{said}"
        );
    }
    // A vocabulary that does not fit the model.
    fs::write(place.path("moved/tokenizer.json"), tokenizer(0).replace(":260,", ":560,"))?;
    refused(&mut caption("moved"))?;
    Ok(())
}

#[test]
fn resumed_runs_know_their_data_wherever_it_lies() -> Outcome {
    let place = Place::new(&stages(&["semantic"], 6))?;
    done(&mut place.run("whole", &[]))?;
    place.killed("out")?;
    fs::rename(place.path("data"), place.path("elsewhere"))?;
    assert!(refused(&mut place.resume("out"))?.contains("data: there is no such folder"));
    let config = place.path("out/config.toml");
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace("../data", "../elsewhere"))?;
    // The same name with other data.
    let metadata = place.path("elsewhere/metadata.jsonl");
    let lines = fs::read_to_string(&metadata)?;
    let fewer: Vec<&str> = lines.lines().take(6).collect();
    let mut turned: Vec<&str> = lines.lines().collect();
    turned.reverse();
    for (now, what) in [
        (fewer.join("\n"), "9 pictures then, 6 now"),
        (turned.join("\n"), "different pictures, or a different order; different captions"),
        (lines.replacen("a dark", "a Dark", 1), "on: different captions, or a different order; put"),
        (lines.replacen("light?", "Light?", 1), "on: different questions, or a different order; put"),
        (lines.replacen("\"text\"", "\"prompt\": \"draw\", \"text\"", 1), "0 prompts then, 1 now"),
    ] {
        fs::write(&metadata, &now)?;
        let said = refused(&mut place.resume("out"))?;
        assert!(
            said.contains("the data is not what the run was trained on") && said.contains(what),
            "{said}"
        );
    }
    fs::write(&metadata, &lines)?;
    done(&mut place.resume("out"))?;
    let weights = |out: &str| fs::read(place.path(out).join("model.safetensors"));
    assert!(weights("out")? == weights("whole")?);
    Ok(())
}

#[test]
fn relative_paths_mean_the_place_of_the_configuration() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    done(place.run("out", &[]).current_dir("/"))?;
    let config = Config::load(&place.path("out/config.toml"), &[])?;
    assert!(config.data.train.is_absolute() && config.data.train.join("0.png").exists());
    // On the command line, they are relative to the working directory.
    let set = ["--set", "data.train=data", "--set", "data.test=configs/../data"];
    done(place.run("other", &set).current_dir(place.path("")))?;
    let config = Config::load(&place.path("other/config.toml"), &[])?;
    assert_eq!(config.data.train, place.path("data"));
    assert!(place.path("other/eval.json").exists());
    Ok(())
}

#[test]
fn what_evaluation_needs_is_asked_for_before_training() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    let one = place.path("one");
    fs::create_dir(&one)?;
    fs::copy(place.path("data/0.png"), one.join("0.png"))?;
    let test = |folder: &Path| format!("data.test={}", folder.display());
    let (one, all) = (test(&one), test(&place.path("data")));
    for (set, what) in [
        (vec!["--set", &one], "one: holds 1 of the 2 pictures that an evaluation needs"),
        (vec!["--set", &all, "--set", "data.eval_samples=1"], "`data.eval_samples` is 1, wanted 2 or more"),
        (vec!["--set", &all, "--set", "data.eval_samples=0"], "`data.eval_samples` is 0, wanted 2 or more"),
        (
            vec!["--set", "data.source=scenes", "--set=data.train_samples=4", "--set=data.test_samples=1"],
            "scenes: holds 1 of the 2 pictures",
        ),
    ] {
        let said = refused(&mut place.run("out", &set))?;
        assert!(said.contains(what), "{said}");
        assert!(!place.path("out").exists(), "nothing was begun");
    }
    done(&mut place.run("out", &["--set", "data.eval_samples=0"]))?;
    Ok(())
}

#[test]
fn an_evaluation_that_fails_loses_nothing() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    // Results cannot be written to this path.
    fs::create_dir_all(place.path("out/eval.json"))?;
    let test = format!("data.test={}", place.text("data"));
    let (said, log) = done(&mut place.run("out", &["--set", &test]))?;
    assert!(log.contains("the weights are saved, but the evaluation failed: "), "{log}");
    assert!(log.contains("eval.json: is a folder") && said.contains("resume"), "{log}{said}");
    let weights = fs::read(place.path("out/model.safetensors"))?;
    assert!(refused(&mut place.resume("out"))?.contains("eval.json: is a folder"));
    fs::remove_dir(place.path("out/eval.json"))?;
    let (said, _) = done(&mut place.resume("out"))?;
    assert!(said.contains("PSNR") && place.path("out/eval.json").is_file(), "{said}");
    assert!(fs::read(place.path("out/model.safetensors"))? == weights);
    assert!(
        refused(&mut place.resume("out"))?.contains("holds a finished run, which has nothing left to do")
    );
    Ok(())
}

#[cfg(unix)]
#[test]
fn an_interrupted_evaluation_ends_soon_and_is_done_later() -> Outcome {
    let place = Place::new(&stages(&["gen"], 1))?;
    let set =
        ["--set", "data.source=scenes", "--set", "data.train_samples=4", "--set", "data.test_samples=512"];
    let mut running = Running::new(&mut place.run("out", &set))?;
    running.saw("evaluating on held-out pictures");
    running.signal(libc::SIGINT);
    running.saw("interrupted: stopping the evaluation, the weights are saved");
    let (code, said, log) = running.end();
    assert_eq!(code, Some(0), "{log}");
    assert!(
        said.contains("interrupted; the weights are trained and saved") && said.contains("resume"),
        "{said}"
    );
    assert!(place.path("out/model.safetensors").exists() && !place.path("out/eval.json").exists());
    // The full evaluation takes too long for a test, so the rest uses fewer samples.
    let config = place.path("out/config.toml");
    let text = fs::read_to_string(&config)?;
    fs::write(&config, text.replace("eval_samples = 512", "eval_samples = 4"))?;
    let (said, log) = done(&mut place.resume("out"))?;
    assert!(said.contains("held-out pictures") && log.contains("only the evaluation is left"), "{said}{log}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_signal_before_the_first_step_ends_the_program() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    let set = ["--set", "data.source=words", "--set", "data.size=512", "--set", "data.train_samples=1000000"];
    let running = Running::new(&mut place.run("out", &set))?;
    let start = Instant::now();
    while !place.path("out/.lock").exists() {
        assert!(start.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(5));
    }
    running.signal(libc::SIGTERM);
    let (code, _, log) = running.end();
    assert_eq!(code, Some(130), "{log}");
    assert!(log.contains("interrupted before the first step: there is nothing to save"), "{log}");
    // The folder can still be used.
    done(&mut place.run("out", &[]))?;
    Ok(())
}

#[test]
fn what_no_stage_has_taught_is_said() -> Outcome {
    let place = Place::new(&stages(&["tokenizer"], 1))?;
    done(&mut place.run("first", &[]))?;
    let picture = place.text("data/0.png");
    let sheet = place.text("sheet.png");
    let said = |out: &str, command: &str| -> Result<String, std::io::Error> {
        let args: &[&str] = match command {
            "reconstruct" => &[&picture, "--out", &sheet],
            "generate" => &["a", "--out", &sheet],
            "ask" => &[&picture, "light?"],
            _ => &[&picture],
        };
        done(&mut place.ett(command, out, args)).map(|(_, log)| log)
    };
    let warns = |out: &str, command: &str, what: &str| -> Outcome {
        let log = said(out, command)?;
        assert_eq!(log.contains("has not been trained to"), !what.is_empty(), "{out} {command}: {log}");
        assert!(log.contains(what), "{log}");
        Ok(())
    };
    warns("first", "reconstruct", "")?;
    warns("first", "caption", "to describe pictures")?;
    warns("first", "ask", "to answer questions")?;
    warns("first", "generate", "to draw")?;
    // Skills that the weights were trained for in an earlier run count.
    let config = fs::read_to_string(place.path("configs/tiny.toml"))?;
    fs::write(
        place.path("configs/tiny.toml"),
        config.replace("kind = \"tokenizer\"", "kind = \"gen\"\ncaptions = 0.5"),
    )?;
    done(&mut place.run("second", &["--init", &place.text("first/model.safetensors")]))?;
    warns("second", "reconstruct", "")?;
    warns("second", "caption", "")?;
    warns("second", "generate", "")?;
    warns("second", "ask", "to answer questions")?;
    let said = done(Command::new(USE).arg("inspect").arg(place.path("second")))?.0;
    assert!(said.contains("trained to reconstruct pictures, describe pictures, draw\n"), "{said}");
    done(&mut place.run("third", &[]))?;
    warns("third", "reconstruct", "to reconstruct pictures")?;
    Ok(())
}
