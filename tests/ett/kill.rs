//! Runs of the real program that are killed, interrupted and resumed: each ends in the same bits as a run that was
//! never stopped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ett::io::Checkpoints;
use ett::rng::Philox;

use crate::common::{Outcome, Scratch, program};
use crate::run::pictures;

/// Kills of the long test: one at each phase of saving, the others at random times.
const KILLS: usize = 20;
/// Set to the seed printed by a failed test to repeat its kills.
pub const SEED: &str = "ETT_KILL_SEED";
/// Milliseconds that a program waits in each phase of saving, to be killed there.
pub const PAUSE: u64 = 60;
/// Longer than any run in this file.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Three stages with everything that a checkpoint holds: a discriminator, averages, and averages that a later stage
/// does not train.
pub const CONFIG: &str = r#"
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
[train]
lr = 1e-3
threads = 1
save_every = 2
keep = 2
[data]
train = "DATA"
size = 32
[[stage]]
kind = "tokenizer"
steps = 5
batch = 2
ema = true
[[stage]]
kind = "semantic"
steps = 5
batch = 2
ema = true
[[stage]]
kind = "text"
steps = 4
batch = 2
"#;

/// The results that two runs must have in common.
#[derive(PartialEq)]
pub struct Result {
    weights: Vec<u8>,
    averages: Vec<u8>,
    /// Metrics of the steps, without what depends on the machine.
    pub lines: Vec<serde_json::Value>,
}

/// A configuration, the folder of its run, and the arguments that name its device.
pub struct Place {
    pub scratch: Scratch,
    pub device: Vec<&'static str>,
}

impl Place {
    fn new(device: &'static str) -> std::io::Result<Self> {
        Self::of(CONFIG, &["--device", device])
    }

    /// The pictures are put in place of `DATA` in the configuration.
    pub fn of(config: &str, device: &[&'static str]) -> std::io::Result<Self> {
        let scratch = Scratch::new();
        let data = scratch.path("data");
        pictures(&data);
        std::fs::write(scratch.path("config.toml"), config.replace("DATA", &data.display().to_string()))?;
        Ok(Place { scratch, device: device.to_vec() })
    }

    pub fn out(&self) -> PathBuf {
        self.scratch.path("out")
    }

    /// Resumes the run, or starts it if it has no checkpoint yet.
    pub fn start(&self, pause: u64) -> std::result::Result<Running, Box<dyn std::error::Error>> {
        let out = self.out();
        if Checkpoints::latest(&out)?.is_some() {
            return Ok(Running::new(&self.device, &["resume".as_ref(), out.as_ref()], pause)?);
        }
        if out.exists() {
            std::fs::remove_dir_all(&out)?;
        }
        let config = self.scratch.path("config.toml");
        let args = ["run".as_ref(), "--config".as_ref(), config.as_ref(), "--out".as_ref(), out.as_ref()];
        Ok(Running::new(&self.device, &args, pause)?)
    }

    /// Runs or resumes to the end.
    pub fn finish(&self) -> std::result::Result<Result, Box<dyn std::error::Error>> {
        let mut running = self.start(0)?;
        let status = running.wait();
        assert!(status.success(), "{status}: {}", running.said());
        self.result()
    }

    pub fn result(&self) -> std::result::Result<Result, Box<dyn std::error::Error>> {
        let out = self.out();
        let mut lines = Vec::new();
        for line in std::fs::read_to_string(out.join("metrics.jsonl"))?.lines() {
            let mut line: serde_json::Value = serde_json::from_str(line)?;
            let fields = line.as_object_mut().ok_or("a line is an object")?;
            // These fields depend on the machine and the process.
            fields.retain(|key, _| {
                !["images_per_s", "tokens_per_s", "waited_ms", "memory_mib"].contains(&key.as_str())
            });
            lines.push(line);
        }
        Ok(Result {
            weights: std::fs::read(out.join("model.safetensors"))?,
            averages: std::fs::read(out.join("ema.safetensors"))?,
            lines,
        })
    }
}

pub fn assert_same(got: &Result, want: &Result, what: &str) {
    for (i, (got, want)) in got.lines.iter().zip(&want.lines).enumerate() {
        assert_eq!(got, want, "{what}: line {i} of the metrics");
    }
    assert_eq!(got.lines.len(), want.lines.len(), "{what}: lines of the metrics");
    assert!(got.weights == want.weights, "{what}: other weights");
    assert!(got.averages == want.averages, "{what}: other averages");
}

/// The running program; it is killed when this value is dropped.
pub struct Running {
    pub child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Running {
    fn new(device: &[&str], args: &[&std::ffi::OsStr], pause: u64) -> std::io::Result<Self> {
        Self::of(Command::new(program("ett-train")).args(args).args(device).arg("--quiet"), pause)
    }

    /// Starts a program that waits for `pause` milliseconds in each phase of saving.
    pub fn of(command: &mut Command, pause: u64) -> std::io::Result<Self> {
        let mut child = command
            .env("ETT_LOG", "warn,ett::checkpoint=debug")
            .env("ETT_SAVE_PAUSE", pause.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let (send, lines) = channel();
        if let Some(err) = child.stderr.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(err).lines().map_while(std::io::Result::ok) {
                    let _ = send.send(line);
                }
            });
        }
        Ok(Running { child, lines, seen: vec![] })
    }

    /// Waits for the `nth` line that contains `what`; false if the program ends first.
    pub fn saw(&mut self, what: &str, nth: usize) -> bool {
        let mut left = nth;
        while left > 0 {
            let Ok(line) = self.lines.recv_timeout(LIMIT) else { return false };
            left -= usize::from(line.contains(what));
            self.seen.push(line);
        }
        true
    }

    pub fn said(&mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(LIMIT) {
            self.seen.push(line);
        }
        self.seen.join("\n")
    }

    pub fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            match self.child.try_wait().expect("a child can be waited for") {
                Some(status) => return status,
                None if start.elapsed() > LIMIT => panic!("the program does not end: {:?}", self.seen),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Sends SIGKILL; true if the program had not ended by itself.
    pub fn kill(&mut self) -> bool {
        let _ = self.child.kill();
        self.wait().code().is_none()
    }

    #[cfg(unix)]
    pub fn signal(&self, signal: libc::c_int) {
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

/// The text after the checkpoint's name in a line of the log.
pub fn phase(line: &str) -> Option<String> {
    let (_, rest) = line.split_once("step-")?;
    rest.split_once(": ").map(|(_, phase)| phase.to_string())
}

pub fn seed() -> std::result::Result<u64, Box<dyn std::error::Error>> {
    Ok(match std::env::var(SEED) {
        Ok(seed) => seed.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64 >> 10,
    })
}

#[test]
fn killed_runs_end_in_the_same_bits() -> Outcome {
    killed_runs("cpu")
}

/// Steps are recorded there, from the second of each stage on.
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_killed_runs_end_in_the_same_bits() -> Outcome {
    killed_runs("cuda")
}

fn killed_runs(device: &'static str) -> Outcome {
    let seed = seed()?;
    println!("{SEED}={seed}");
    let mut rng = Philox::new(seed, 0);
    let place = Place::new(device)?;
    let start = Instant::now();
    let mut whole = place.start(0)?;
    let status = whole.wait();
    let time = start.elapsed();
    let said = whole.said();
    assert!(status.success(), "{said}");
    let want = place.result()?;
    assert_eq!(want.lines.len(), 14);
    std::fs::remove_dir_all(place.out())?;

    // The phases of one save, in order; then kills at each of them and at random times.
    let first = said.lines().filter(|l| l.contains("step-00000002:"));
    let phases: Vec<String> = first.filter_map(phase).collect();
    assert!(phases.len() >= 8, "{said}");
    assert!(["renamed", "its place synced", "latest replaced"].iter().all(|p| phases.iter().any(|q| q == p)));
    let mut kills: Vec<Option<&str>> = phases.iter().map(|p| Some(p.as_str())).collect();
    kills.resize(KILLS.max(kills.len()), None);
    rng.shuffle(&mut kills);
    let mut log = Vec::new();
    for kill in kills {
        match kill {
            Some(phase) => {
                let mut nth = 1 + rng.below(2);
                loop {
                    let mut running = place.start(PAUSE)?;
                    if !running.saw(&format!(": {phase}"), nth) {
                        // The run ended before the kill; the next one starts anew and saves often enough.
                        assert!(running.wait().success(), "{}", running.said());
                        assert_same(&place.result()?, &want, &format!("{SEED}={seed} {log:?}"));
                        std::fs::remove_dir_all(place.out())?;
                        nth = 1;
                        continue;
                    }
                    let killed = running.kill();
                    let said = running.said();
                    let last = said.lines().filter_map(self::phase).next_back();
                    log.push(format!("{phase} {nth}"));
                    assert!(killed && last.as_deref() == Some(phase), "not killed there: {log:?} {said}");
                    break;
                }
            }
            None => {
                let mut running = place.start(0)?;
                let after = time.mul_f64(rng.uniform());
                std::thread::sleep(after);
                log.push(format!("{after:?}"));
                if !running.kill() {
                    assert!(running.wait().success(), "{log:?} {}", running.said());
                    assert_same(&place.result()?, &want, &format!("{SEED}={seed} {log:?}"));
                    std::fs::remove_dir_all(place.out())?;
                }
            }
        }
        // Killed after its weights were saved: training is complete, and there is nothing to resume.
        if place.out().join("model.safetensors").exists() {
            log.push("trained".into());
            assert_same(&place.result()?, &want, &format!("{SEED}={seed} {log:?}"));
            std::fs::remove_dir_all(place.out())?;
        }
        // Sometimes the run continues to its end; otherwise the next kill hits the resumed run.
        if rng.below(3) == 0 {
            log.push("to the end".into());
            assert_same(&place.finish()?, &want, &format!("{SEED}={seed} {log:?}"));
            std::fs::remove_dir_all(place.out())?;
        }
    }
    assert_same(&place.finish()?, &want, &format!("{SEED}={seed} {log:?}"));
    println!("{log:?}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn interrupted_runs_save_and_go_on() -> Outcome {
    interrupted_runs("cpu")
}

#[cfg(unix)]
#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_interrupted_runs_save_and_go_on() -> Outcome {
    interrupted_runs("cuda")
}

#[cfg(unix)]
fn interrupted_runs(device: &'static str) -> Outcome {
    let place = Place::new(device)?;
    let want = place.finish()?;
    for (signal, at) in [(libc::SIGTERM, "begun"), (libc::SIGINT, "renamed"), (libc::SIGHUP, "synced")] {
        std::fs::remove_dir_all(place.out())?;
        let mut running = place.start(PAUSE / 4)?;
        assert!(running.saw(&format!("step-00000002: {at}"), 1));
        running.signal(signal);
        let status = running.wait();
        let said = running.said();
        assert!(status.code() == Some(0), "{status}: {said}");
        // Stopped after the current step, between two of the usual saves.
        let saved = Checkpoints::latest(&place.out())?.ok_or("a checkpoint")?;
        assert!(saved.ends_with("step-00000003"), "{said}");
        assert!(!place.out().join("model.safetensors").exists(), "the run has not ended");
        assert_same(&place.finish()?, &want, at);
    }
    // Interrupted twice: the program ends at once, and the earlier checkpoint is still there.
    std::fs::remove_dir_all(place.out())?;
    let mut running = place.start(PAUSE)?;
    assert!(running.saw("step-00000004: begun", 1));
    running.signal(libc::SIGINT);
    assert!(running.saw("interrupted", 1));
    running.signal(libc::SIGINT);
    assert_eq!(running.wait().code(), Some(130));
    assert!(Checkpoints::latest(&place.out())?.ok_or("a checkpoint")?.ends_with("step-00000002"));
    assert_same(&place.finish()?, &want, "interrupted twice");
    Ok(())
}

/// The program's error for a run that it does not resume.
fn refused(out: &Path) -> std::io::Result<String> {
    let mut running = Running::new(&["--device", "cpu"], &["resume".as_ref(), out.as_ref()], 0)?;
    let status = running.wait();
    let said = running.said();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.lines().any(|l| l.starts_with("error: ")), "{said}");
    Ok(said)
}

#[test]
fn what_cannot_be_resumed_is_said() -> Outcome {
    let place = Place::new("cpu")?;
    let out = place.out();
    assert!(refused(&out)?.contains("config.toml"), "the folder does not exist");
    std::fs::create_dir(&out)?;
    std::fs::copy(place.scratch.path("config.toml"), out.join("config.toml"))?;
    // Resuming and starting give the same error for a run that ended before its first checkpoint.
    assert!(refused(&out)?.contains("ended before its first checkpoint; remove the folder"));
    let config = place.scratch.path("config.toml");
    let args = ["run".as_ref(), "--config".as_ref(), config.as_ref(), "--out".as_ref(), out.as_ref()];
    let mut started = Running::new(&["--device", "cpu"], &args, 0)?;
    assert_eq!(started.wait().code(), Some(1));
    let said = started.said();
    assert!(said.contains("ended before its first checkpoint; remove the folder"), "{said}");
    std::fs::remove_dir_all(&out)?;
    let mut running = place.start(PAUSE)?;
    assert!(running.saw("step-00000004: latest replaced", 1) && running.kill());

    let config = std::fs::read_to_string(out.join("config.toml"))?;
    for (key, from, to) in
        [("llm.width", "width = 16", "width = 32"), ("train.lr", "lr = 0.001", "lr = 0.002")]
    {
        assert!(config.contains(from), "{config}");
        std::fs::write(out.join("config.toml"), config.replacen(from, to, 1))?;
        let said = refused(&out)?;
        assert!(said.contains(&format!("`{key}` was")), "{said}");
    }
    let checkpoint = Checkpoints::latest(&out)?.ok_or("a checkpoint")?;
    for part in [checkpoint.clone(), out.join("checkpoints")] {
        let said = refused(&part)?;
        let whole = std::fs::canonicalize(&out)?;
        assert!(said.contains(&format!("go on with `ett-train resume {}`", whole.display())), "{said}");
    }
    // Killed between the two renames of a checkpoint.
    std::fs::rename(&checkpoint, checkpoint.with_file_name(".step-00000004.part"))?;
    // Settings that change no bit may be changed.
    std::fs::write(out.join("config.toml"), config.replacen("threads = 1", "threads = 2", 1))?;
    let done = place.finish()?;
    assert!(refused(&out)?.contains("finished run"));
    std::fs::remove_dir_all(&out)?;
    assert_same(&done, &place.finish()?, "two threads after some steps with one");
    Ok(())
}
