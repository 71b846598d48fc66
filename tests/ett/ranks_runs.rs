//! Runs on several ranks as people start them, as processes on CPUs: their bits, signals, and what happens when one of
//! them fails.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ett::io::Checkpoints;
use ett::rng::Philox;
use serde_json::Value;

use crate::common::{Outcome, program};
use crate::kill::{CONFIG, LIMIT, PAUSE, Place, Running, SEED, assert_same, phase, seed};

/// Arguments of runs with one, two and four ranks.
const ONE: &[&str] = &["--device", "cpu"];
const TWO: &[&str] = &["--device", "cpu", "--ranks", "2"];
const FOUR: &[&str] = &["--device", "cpu", "--ranks", "4"];
/// Ranks end sooner after a failure by themselves; after 30 seconds the launcher kills them.
const SOON: Duration = Duration::from_secs(25);
/// Kills of the long test, at least.
const KILLS: usize = 16;

/// The model of the killed runs, with as many pictures a step as there may be ranks.
fn config(batch: usize) -> String {
    CONFIG.replace("batch = 2", &format!("batch = {batch}"))
}

/// The same with all statistics over all ranks and small updates, so that the digits hardly depend on the order of sums.
fn calm() -> String {
    config(4).replace("lr = 1e-3", "lr = 1e-5").replace("ndf = 4", "ndf = 4\nsync = true")
}

fn assert_near(got: &[Value], want: &[Value], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (got, want) in got.iter().zip(want) {
        let (Some(losses), Some(wanted)) = (got["loss"].as_object(), want["loss"].as_object()) else {
            panic!("{what}: {got} and {want} have losses");
        };
        assert!(losses.keys().eq(wanted.keys()), "{what}: {got} and {want}");
        for (name, want) in wanted {
            let (got, want) = (losses[name].as_f64(), want.as_f64());
            let near = got.zip(want).is_some_and(|(a, b)| (a - b).abs() <= 1e-3 * b.abs());
            assert!(near, "{what}: {name} is {got:?}, wanted {want:?}");
        }
    }
}

/// The parent of a process, unless it has ended.
fn parent(id: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name of the program before, in brackets, may contain anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    let state = fields.next()?;
    fields.next()?.parse().ok().filter(|_| state != "Z")
}

/// Whether a process has this variable; not before it is the program that it is started for.
fn has(id: u32, variable: &str) -> bool {
    let variables = std::fs::read(format!("/proc/{id}/environ")).unwrap_or_default();
    variables.split(|byte| *byte == 0).any(|v| v == variable.as_bytes())
}

/// The process of a rank that a launcher has started or is about to start.
fn process(launcher: &Running, rank: usize) -> u32 {
    let (id, variable, start) = (launcher.child.id(), format!("RANK={rank}"), Instant::now());
    let is_it = |child: &u32| parent(*child) == Some(id) && has(*child, &variable);
    loop {
        let all = std::fs::read_dir("/proc").expect("processes").flatten();
        let mut ids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        if let Some(child) = ids.find(is_it) {
            return child;
        }
        assert!(start.elapsed() < LIMIT, "no rank {rank} of process {id}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn send(id: u32, signal: libc::c_int) {
    // SAFETY: sends a signal to a process that this test has started.
    unsafe { libc::kill(id as libc::pid_t, signal) };
}

/// Waits until these processes have ended.
fn assert_gone(ids: &[u32]) {
    let start = Instant::now();
    while ids.iter().any(|id| parent(*id).is_some()) {
        assert!(start.elapsed() < SOON, "{ids:?} live on");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ports of this host that nobody listens at, `n` in a row, and none that the system or `ett-train` gives away.
fn free_ports(n: u32) -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let next = std::process::id().wrapping_mul(61).wrapping_add(NEXT.fetch_add(n, Ordering::Relaxed));
        let first = 30_000 + (next % 2_700) as u16;
        if (first..).take(n as usize).all(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            return first;
        }
    }
}

/// A rank as a launcher of other programs starts it, the first one of its host.
fn by_hand(place: &Place, rank: usize, ranks: usize, port: u16) -> Command {
    let mut command = Command::new(program("ett-train"));
    command.args(["run", "--device", "cpu", "--quiet", "--config"]).arg(place.scratch.path("config.toml"));
    command.arg("--out").arg(place.out()).env("MASTER_ADDR", "localhost").env("LOCAL_RANK", "0");
    for (name, value) in [("RANK", rank), ("WORLD_SIZE", ranks), ("MASTER_PORT", port.into())] {
        command.env(name, value.to_string());
    }
    command
}

/// Two ranks that are started by hand, the second one with additional arguments.
fn both(place: &Place, more: &[&str], pause: u64) -> std::io::Result<[Running; 2]> {
    let port = free_ports(1);
    let second = Running::of(by_hand(place, 1, 2, port).args(more), pause)?;
    Ok([Running::of(&mut by_hand(place, 0, 2, port), pause)?, second])
}

/// The exit status of ranks and what they said.
fn ends(ranks: [Running; 2]) -> [(Option<i32>, String); 2] {
    ranks.map(|mut rank| (rank.wait().code(), rank.said()))
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let (entry, to) = (entry?, to.to_path_buf());
        match entry.file_type()?.is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name()))?,
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name()))?),
        }
    }
    Ok(())
}

#[test]
fn two_ranks_compute_the_same_bits_again_and_nearly_those_of_one() -> Outcome {
    let mut place = Place::of(&calm(), TWO)?;
    let want = place.finish()?;
    assert_eq!(want.lines.len(), 14);
    std::fs::remove_dir_all(place.out())?;
    assert_same(&place.finish()?, &want, "again");
    std::fs::remove_dir_all(place.out())?;
    place.device = ONE.to_vec();
    assert_near(&want.lines, &place.finish()?.lines, "two ranks and one");
    Ok(())
}

#[test]
fn ranks_that_other_programs_start_are_the_same_run() -> Outcome {
    let place = Place::of(&config(2), TWO)?;
    let want = place.finish()?;
    std::fs::remove_dir_all(place.out())?;
    for ended in ends(both(&place, &[], 0)?) {
        assert!(ended.0 == Some(0) && !ended.1.contains("starting"), "{ended:?}");
    }
    assert_same(&place.result()?, &want, "by hand");
    std::fs::remove_dir_all(place.out())?;
    // torchrun listens at the port that it names.
    let port = free_ports(2);
    let _torchrun = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let start = |rank| {
        let mut command = by_hand(&place, rank, 2, port);
        Running::of(command.env("TORCHELASTIC_USE_AGENT_STORE", "True"), 0)
    };
    for ended in ends([start(0)?, start(1)?]) {
        assert_eq!(ended.0, Some(0), "{}", ended.1);
    }
    assert_same(&place.result()?, &want, "torchrun");
    Ok(())
}

#[test]
fn a_signal_to_any_process_saves_once() -> Outcome {
    let mut place = Place::of(&calm(), TWO)?;
    let want = place.finish()?;
    for to in [None, Some(1), Some(0)] {
        std::fs::remove_dir_all(place.out())?;
        let mut running = place.start(PAUSE / 2)?;
        let ranks = [0, 1].map(|rank| process(&running, rank));
        assert!(running.saw("step-00000002: begun", 1), "{}", running.said());
        let to_whom = to.map_or(running.child.id(), |rank| ranks[rank]);
        // Those who stop a job often send two signals at once.
        for _ in 0..2 {
            send(to_whom, libc::SIGTERM);
            std::thread::sleep(Duration::from_millis(30));
        }
        let status = running.wait();
        let said = running.said();
        assert!(status.code() == Some(0), "{to:?}, {status}: {said}");
        assert_gone(&ranks);
        // After the step that began during the signal, between two of the usual saves.
        let saved = Checkpoints::latest(&place.out())?.ok_or("a checkpoint")?;
        assert!(saved.ends_with("step-00000003"), "{to:?}, {}: {said}", saved.display());
        assert_eq!(said.matches(": begun").count(), 2, "{to:?}: {said}");
        if to.is_none() {
            let kept = place.scratch.path("kept");
            copy(&place.out(), &kept)?;
            for others in [ONE, FOUR] {
                place.device = others.to_vec();
                assert_near(&place.finish()?.lines, &want.lines, &format!("resumed with {others:?}"));
                std::fs::remove_dir_all(place.out())?;
                copy(&kept, &place.out())?;
            }
            place.device = TWO.to_vec();
        }
        assert_same(&place.finish()?, &want, &format!("{to:?}"));
    }
    Ok(())
}

/// Files hold whole tensors, and batches are functions of the seed and the step, so that the number of ranks may change.
#[test]
fn a_checkpoint_of_four_ranks_is_resumed_on_any_number() -> Outcome {
    let eight = ["--device", "cpu", "--ranks", "8"];
    let calm = calm().replace("batch = 4", "batch = 8");
    let mut place = Place::of(&calm, FOUR)?;
    let want = place.finish()?;
    std::fs::remove_dir_all(place.out())?;
    let mut running = place.start(PAUSE / 4)?;
    assert!(running.saw("step-00000004: latest replaced", 1), "{}", running.said());
    send(running.child.id(), libc::SIGTERM);
    assert!(running.wait().success(), "{}", running.said());
    let kept = place.scratch.path("kept");
    copy(&place.out(), &kept)?;
    for ranks in [FOUR, ONE, TWO, &eight] {
        place.device = ranks.to_vec();
        let got = place.finish()?;
        match ranks == FOUR {
            true => assert_same(&got, &want, "four ranks again"),
            false => assert_near(&got.lines, &want.lines, &format!("resumed with {ranks:?}")),
        }
        std::fs::remove_dir_all(place.out())?;
        copy(&kept, &place.out())?;
    }
    Ok(())
}

#[test]
fn a_second_signal_ends_all_at_once() -> Outcome {
    let place = Place::of(&config(2), TWO)?;
    let want = place.finish()?;
    std::fs::remove_dir_all(place.out())?;
    let mut running = place.start(PAUSE / 4)?;
    let ranks = [0, 1].map(|rank| process(&running, rank));
    assert!(running.saw("step-00000002: latest replaced", 1) && running.kill(), "{}", running.said());
    assert_gone(&ranks);
    // Saving takes longer than the second in which two signals are one.
    let mut running = place.start(6 * PAUSE)?;
    let ranks = [0, 1].map(|rank| process(&running, rank));
    assert!(running.saw("step-00000004: begun", 1), "{}", running.said());
    running.signal(libc::SIGINT);
    assert!(running.saw("interrupted", 1), "{}", running.said());
    std::thread::sleep(Duration::from_millis(1100));
    running.signal(libc::SIGINT);
    assert_eq!(running.wait().code(), Some(130), "{}", running.said());
    assert_gone(&ranks);
    assert!(Checkpoints::latest(&place.out())?.ok_or("a checkpoint")?.ends_with("step-00000002"));
    assert_same(&place.finish()?, &want, "interrupted twice");
    Ok(())
}

#[test]
fn a_killed_launcher_takes_its_ranks_along() -> Outcome {
    let place = Place::of(&config(2), TWO)?;
    let want = place.finish()?;
    std::fs::remove_dir_all(place.out())?;
    let mut running = place.start(PAUSE / 4)?;
    let ranks = [0, 1].map(|rank| process(&running, rank));
    assert!(running.saw("step-00000004: begun", 1) && running.kill(), "{}", running.said());
    assert_gone(&ranks);
    assert_same(&place.finish()?, &want, "the launcher was killed");
    Ok(())
}

/// When a rank is killed.
#[derive(Debug, Clone)]
enum Moment {
    /// In a phase of the nth save.
    Saving(String, usize),
    /// So long after the beginning of the first save.
    Later(Duration),
}

/// Kills a rank of the run in `place`, which is started or resumed, and checks how the others end. False if the run was
/// over before.
fn kill(place: &Place, rank: usize, moment: &Moment) -> Result<bool, Box<dyn std::error::Error>> {
    let pause = if matches!(moment, Moment::Saving(..)) { PAUSE } else { 0 };
    let mut running = place.start(pause)?;
    let ranks = [0, 1].map(|rank| process(&running, rank));
    let there = match moment {
        Moment::Saving(phase, nth) => running.saw(&format!(": {phase}"), *nth),
        Moment::Later(time) => {
            let begun = running.saw(": begun", 1);
            std::thread::sleep(*time);
            begun
        }
    };
    send(ranks[rank], libc::SIGKILL);
    let killed = Instant::now();
    let status = running.wait();
    let (took, said) = (killed.elapsed(), running.said());
    if status.success() || place.out().join("model.safetensors").exists() {
        return Ok(false);
    }
    let what = format!("rank {rank} killed at {moment:?} ({there}), {status} after {took:?}: {said}");
    assert!(there && status.code() == Some(1) && took < SOON && !said.contains("has not ended"), "{what}");
    assert!(
        said.contains(&format!("rank {rank} (process {}) was killed by signal 9", ranks[rank])),
        "{what}"
    );
    let names = |line: &str| {
        line.contains(&format!("error: rank {rank} on host "))
            && line.contains(" ended without a word at stage ")
            && line.contains(", step ")
    };
    assert_eq!(said.lines().filter(|line| names(line)).count(), 1, "{what}");
    assert_gone(&ranks);
    Ok(true)
}

/// Kills ranks one after another, lets the run go on after each, and compares its end with that of `place` undisturbed.
fn killed(place: &Place, kills: &[(usize, Moment)], rng: &mut Philox, what: &str) -> Outcome {
    let want = place.finish()?;
    std::fs::remove_dir_all(place.out())?;
    let mut log = Vec::new();
    for (rank, moment) in kills {
        log.push(format!("rank {rank} {moment:?}"));
        // Sometimes the run continues to its end; otherwise the next kill hits the resumed run.
        let over = !kill(place, *rank, moment)?;
        let result = match over {
            true => place.result()?,
            false if rng.below(3) == 0 => place.finish()?,
            false => continue,
        };
        log.push("to the end".into());
        assert_same(&result, &want, &format!("{what} {log:?}"));
        std::fs::remove_dir_all(place.out())?;
    }
    println!("{log:?}");
    assert_same(&place.finish()?, &want, &format!("{what} {log:?}"));
    Ok(())
}

#[test]
fn runs_go_on_after_a_rank_was_killed() -> Outcome {
    let place = Place::of(&config(2), TWO)?;
    let saving = |phase: &str, nth| Moment::Saving(phase.into(), nth);
    let kills = [
        (1, saving("renamed", 1)),
        (0, saving("its place synced", 2)),
        (1, Moment::Later(Duration::from_millis(150))),
    ];
    killed(&place, &kills, &mut Philox::new(1, 0), "")
}

#[test]
#[ignore = "takes minutes"]
fn runs_go_on_after_many_kills() -> Outcome {
    let seed = seed()?;
    println!("{SEED}={seed}");
    let mut rng = Philox::new(seed, 0);
    let place = Place::of(&config(2), TWO)?;
    let start = Instant::now();
    let mut whole = place.start(0)?;
    let status = whole.wait();
    let (time, said) = (start.elapsed(), whole.said());
    assert!(status.success(), "{said}");
    std::fs::remove_dir_all(place.out())?;
    let first = said.lines().filter(|l| l.contains("step-00000002:"));
    let mut kills: Vec<(usize, Moment)> = first
        .filter_map(phase)
        .map(|phase| (rng.below(2), Moment::Saving(phase, 1 + rng.below(2))))
        .collect();
    assert!(kills.len() >= 8, "{said}");
    while kills.len() < KILLS {
        kills.push((rng.below(2), Moment::Later(time.mul_f64(rng.uniform()))));
    }
    rng.shuffle(&mut kills);
    killed(&place, &kills, &mut rng, &format!("{SEED}={seed}"))
}

/// A run whose ranks are given up after two seconds.
fn impatient() -> String {
    config(2).replace("[train]", "[train]\nstall_s = 2")
}

/// The sentence about a rank that was stopped.
fn assert_silent(said: &str) {
    let is_it = |line: &str| {
        line.contains("error: rank 1 on host ")
            && line.contains(" has given no sign of life for 2 s at stage ")
            && line.contains(", step ")
    };
    assert!(said.lines().any(is_it), "{said}");
}

#[test]
fn a_stopped_rank_is_named_and_ends_when_it_wakes_up() -> Outcome {
    let place = Place::of(&impatient(), TWO)?;
    let mut ranks = both(&place, &[], 0)?;
    assert!(ranks[0].saw("step-00000002: latest replaced", 1), "{}", ranks[0].said());
    ranks[1].signal(libc::SIGSTOP);
    let stopped = Instant::now();
    assert_eq!(ranks[0].wait().code(), Some(1), "{}", ranks[0].said());
    assert!(stopped.elapsed() < SOON, "{:?}", stopped.elapsed());
    assert_silent(&ranks[0].said());
    ranks[1].signal(libc::SIGCONT);
    assert_eq!(ranks[1].wait().code(), Some(1), "{}", ranks[1].said());
    place.finish()?;
    Ok(())
}

#[test]
#[ignore = "takes half a minute, in which the launcher is patient"]
fn a_stopped_rank_is_killed_by_its_launcher() -> Outcome {
    let place = Place::of(&impatient(), TWO)?;
    let mut running = place.start(0)?;
    let ranks = [0, 1].map(|rank| process(&running, rank));
    assert!(running.saw("step-00000002: latest replaced", 1), "{}", running.said());
    send(ranks[1], libc::SIGSTOP);
    let status = running.wait();
    let said = running.said();
    assert_eq!(status.code(), Some(1), "{said}");
    assert_silent(&said);
    assert!(said.contains(" has not ended 30 s after rank 0 failed, and is killed"), "{said}");
    assert_gone(&ranks);
    place.finish()?;
    Ok(())
}

#[test]
fn ranks_that_differ_are_refused() -> Outcome {
    let place = Place::of(&config(2), TWO)?;
    let (data, fewer) = (place.scratch.path("data"), place.scratch.path("fewer"));
    copy(&data, &fewer)?;
    let metadata = std::fs::read_to_string(data.join("metadata.jsonl"))?;
    std::fs::write(fewer.join("metadata.jsonl"), metadata.replacen("a dark", "a Dark", 1))?;
    let (fewer, absent) = (format!("data.train={}", fewer.display()), "data.train=/absent/data".to_string());
    for (set, what) in [
        ("train.lr=2e-3", &["the configuration of rank 1 on host ", "`lr = 0.002`, there `lr = 0.001`"][..]),
        (&fewer, &["the training data of rank 1 on host ", " differs from that of rank 0 on host "]),
        (&absent, &["rank 1 on host ", " failed: /absent/data: there is no such folder"]),
    ] {
        let [lead, other] = ends(both(&place, &["--set", set], 0)?);
        assert_eq!((lead.0, other.0), (Some(1), Some(1)), "{set}: {}{}", lead.1, other.1);
        let error = lead.1.lines().find(|l| l.starts_with("error: ")).unwrap_or_default();
        assert!(what.iter().all(|part| error.contains(part)), "{set}: {}", lead.1);
        assert!(!place.out().exists(), "nothing was begun");
    }
    let port = free_ports(1);
    let start = |rank, ranks| Running::of(&mut by_hand(&place, rank, ranks, port), 0);
    for (status, said) in ends([start(0, 2)?, start(1, 3)?]) {
        let wanted = ["rank 1 on host ", "as one of 3 ranks, rank 0 on host ", "same number of ranks"];
        assert!(status == Some(1) && wanted.iter().all(|part| said.contains(part)), "{said}");
    }
    Ok(())
}

#[test]
fn a_rank_that_fails_during_training_is_named() -> Outcome {
    let config = config(2).replace("[data]", "[data]\ncache_mib = 0");
    let place = Place::of(&config, TWO)?;
    let other = place.scratch.path("other");
    copy(&place.scratch.path("data"), &other)?;
    let set = format!("data.train={}", other.display());
    let mut ranks = both(&place, &["--set", &set], PAUSE / 2)?;
    assert!(ranks[0].saw("step-00000002: begun", 1), "{}", ranks[0].said());
    for entry in std::fs::read_dir(&other)? {
        std::fs::write(entry?.path(), "broken since")?;
    }
    let [lead, other] = ends(ranks);
    assert_eq!((lead.0, other.0), (Some(1), Some(1)), "{}{}", lead.1, other.1);
    let error = |said: &str| said.lines().find(|l| l.starts_with("error: ")).unwrap_or_default().to_string();
    let (told, own) = (error(&lead.1), error(&other.1));
    assert!(told.starts_with("error: rank 1 on host ") && told.contains(" failed at stage "), "{told}");
    assert!(told.ends_with(own.trim_start_matches("error: ")), "{told}, {own}");
    place.finish()?;
    Ok(())
}

/// The results of `ett-train speed` on some ranks, with additional arguments.
fn speeds(place: &Place, more: &[&str]) -> Result<Vec<Value>, Box<dyn std::error::Error>> {
    let json = place.scratch.path("speed.json");
    let mut command = Command::new(program("ett-train"));
    command.args(["speed", "--device", "cpu", "--quiet", "--steps", "4"]).args(more);
    command.arg("--config").arg(place.scratch.path("config.toml")).arg("--json").arg(&json);
    let out = command.stdin(Stdio::null()).output()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(serde_json::from_slice(&std::fs::read(json)?)?)
}

#[test]
fn scaling_is_measured_with_one_batch_per_rank() -> Outcome {
    let place = Place::of(&config(2), TWO)?;
    let all = speeds(&place, &["--ranks", "2", "--scaling", "--stage", "semantic"])?;
    let of = |key: &str| all.iter().map(|s| s[key].as_f64()).collect::<Vec<_>>();
    assert_eq!((of("ranks"), of("batch")), (vec![Some(1.0), Some(2.0)], vec![Some(2.0), Some(4.0)]));
    let (scaling, speed) = (of("scaling"), of("images_per_s"));
    let want = speed[1].zip(speed[0]).map(|(two, one)| two / (2.0 * one));
    assert!(scaling[0] == Some(1.0) && scaling[1].zip(want).is_some_and(|(a, b)| (a - b).abs() < 1e-9));
    let alone = of("communication_ms");
    assert!(alone[0].is_none() && alone[1].is_some_and(|ms| ms > 0.0), "{all:?}");
    Ok(())
}

#[test]
fn eight_ranks_take_what_the_plan_says() -> Outcome {
    // Short texts, which a plan does not know.
    let config = config(16).replace("[data]", "[data]\ntext_tokens = 18").replace("steps = 5", "steps = 2");
    let place = Place::of(&config, &["--device", "cpu", "--ranks", "8"])?;
    let all = speeds(&place, &["--ranks", "8"])?;
    let mut most: f64 = 0.0;
    for stage in &all[..2] {
        let (planned, measured) = (stage["plan_gib"].as_f64(), stage["peak_gib"].as_f64());
        let ratio = planned.zip(measured).map_or(0.0, |(p, m)| p / m);
        assert!((0.98..=1.02).contains(&ratio), "{stage}");
        most = most.max(planned.unwrap_or_default());
    }
    place.finish()?;
    let metrics = std::fs::read_to_string(place.out().join("metrics.jsonl"))?;
    let last: Value = serde_json::from_str(metrics.lines().last().ok_or("metrics")?)?;
    let ratio = most * 1024.0 / last["memory_mib"].as_f64().unwrap_or_default();
    assert!((0.98..=1.02).contains(&ratio), "{most} GiB planned: {last}");
    Ok(())
}
