//! Launches of small shell scripts in place of ranks.

use std::cell::RefCell;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use super::{Rules, Signals, supervise};
use crate::error::Error;

/// Longer than anything here takes, and shorter than the scripts that have to be killed.
const LIMIT: Duration = Duration::from_secs(30);
/// A rank that never ends by itself, and one that ends as asked.
const STUCK: &str = "trap '' TERM; while :; do sleep 1; done";
const SAVES: &str = "trap 'exit 0' TERM; while :; do sleep 0.02; done";

fn rules(saves: bool, patience: Duration) -> Rules {
    Rules { saves, patience }
}

/// Runs a script for each rank; `signals` is given a sender, and returns when the launch has ended. Returns the status and
/// what was said.
fn launch(scripts: &[&str], rules: Rules, act: impl FnOnce(Sender<()>) + Send) -> (u8, Vec<String>) {
    let (send, receive) = channel();
    let said = RefCell::new(Vec::new());
    let start = Instant::now();
    let status = std::thread::scope(|scope| {
        scope.spawn(move || act(send));
        let command = |rank: usize| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", scripts[rank]]).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let say = |e: &Error| said.borrow_mut().push(e.to_string());
        supervise(scripts.len(), command, &Signals::from(receive), rules, say).expect("they start")
    });
    assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
    (status, said.into_inner())
}

/// The words of a sentence, without the numbers of processes.
fn words(said: &[String]) -> Vec<String> {
    said.iter()
        .map(|text| {
            text.split(' ')
                .filter(|w| !w.ends_with(')'))
                .collect::<Vec<_>>()
                .join(" ")
                .replace(" (process", "")
        })
        .collect()
}

#[test]
fn the_status_is_that_of_the_first_rank_that_failed() {
    let patient = rules(true, LIMIT);
    assert_eq!(launch(&["exit 0", "exit 0"], patient, drop), (0, vec![]));
    assert_eq!(launch(&["sleep 0.5; exit 4", "exit 3", "exit 0"], patient, drop), (3, vec![]));
    assert_eq!(launch(&["exit 4", "sleep 0.5; exit 3"], patient, drop), (4, vec![]));
    assert_eq!(launch(&["sleep 0.2", "exit 300"], patient, drop).0, 300u32 as u8);
}

#[test]
fn a_killed_rank_is_named_with_its_signal() {
    let (status, said) = launch(&["exit 0", "kill -9 $$"], rules(true, LIMIT), drop);
    assert_eq!((status, &*words(&said)), (1, &["rank 1 was killed by signal 9".to_string()][..]));
    assert!(said[0].contains("rank 1 (process "), "{said:?}");
}

#[test]
fn ranks_that_do_not_end_after_a_failure_are_killed() {
    let (status, said) = launch(&[STUCK, "exit 7", STUCK], rules(true, Duration::from_millis(300)), drop);
    let late = |rank| format!("rank {rank} has not ended 0 s after rank 1 failed, and is killed");
    assert_eq!((status, words(&said)), (7, vec![late(0), late(2)]));
}

#[test]
fn the_first_signal_goes_to_the_first_rank() {
    let dir = std::env::temp_dir().join(format!("ett-launch-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder");
    let (ready, told) = (dir.join("ready"), dir.join("told"));
    let once = |send: Sender<()>| {
        let start = Instant::now();
        while !ready.exists() && start.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(300));
        let _ = send.send(());
        // Kept, as the sender of the real signals.
        std::thread::sleep(Duration::from_millis(300));
    };
    // Rank 1 is told by rank 0, here by a file; a signal would end it with status 9.
    let (touch, wait) = (format!("touch {}", ready.display()), "do sleep 0.02; done");
    let first = format!("trap 'touch {}; exit 0' TERM; {touch}; while :; {wait}", told.display());
    let second = format!("trap 'exit 9' TERM; while [ ! -e {} ]; {wait}", told.display());
    assert_eq!(launch(&[&first, &second], rules(true, LIMIT), once), (0, vec![]));
    std::fs::remove_file(&ready).expect("rank 0 has made it");
    // Rank 0 has ended before.
    let saves = format!("trap 'exit 0' TERM; {touch}; while :; {wait}");
    assert_eq!(launch(&["exit 0", &saves], rules(true, LIMIT), once), (0, vec![]));
    std::fs::remove_dir_all(&dir).expect("its end");
}

#[test]
fn an_interrupt_before_anything_can_be_saved_ends_all() {
    let once = |send: Sender<()>| {
        std::thread::sleep(Duration::from_millis(300));
        let _ = send.send(());
    };
    // Rank 0 does not catch signals yet, or says that there is nothing to save.
    let nothing = "trap 'exit 130' TERM; while :; do sleep 0.02; done";
    for first in ["while :; do sleep 0.02; done", nothing] {
        assert_eq!(launch(&[first, STUCK], rules(true, LIMIT), once), (130, vec![]));
    }
    // A measurement has nothing to save either.
    assert_eq!(launch(&[SAVES, STUCK], rules(false, LIMIT), once), (130, vec![]));
}

#[test]
fn a_second_signal_kills_all() {
    // The one that comes at once is the first one again.
    let start = Instant::now();
    let thrice = |send: Sender<()>| {
        for pause in [300, 100, 1200] {
            std::thread::sleep(Duration::from_millis(pause));
            let _ = send.send(());
        }
    };
    assert_eq!(launch(&[STUCK, STUCK], rules(true, LIMIT), thrice), (130, vec![]));
    assert!(start.elapsed() > Duration::from_secs(1));
}

#[test]
fn a_program_that_cannot_be_started_is_named() {
    let (_send, receive) = channel();
    let command = |rank: usize| Command::new(if rank == 0 { "/bin/sh" } else { "/absent" });
    let e = supervise(2, command, &Signals::from(receive), rules(true, LIMIT), |_| {}).expect_err("absent");
    assert!(e.to_string().starts_with("/absent: "), "{e}");
}

/// The launcher is this program again, with this test alone.
#[cfg(target_os = "linux")]
#[test]
fn ranks_end_with_their_launcher() {
    const INNER: &str = "ETT_LAUNCH_IDS";
    if let Ok(ids) = std::env::var(INNER) {
        let script = format!("echo $$ >> {ids}; {STUCK}");
        launch(&[&script, &script], rules(true, LIMIT), drop);
        return;
    }
    let file = std::env::temp_dir().join(format!("ett-launch-ids-{}", std::process::id()));
    let mut launcher = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "launch::tests::ranks_end_with_their_launcher"])
        .env(INNER, &file)
        .stdout(Stdio::null())
        .spawn()
        .expect("it starts");
    let start = Instant::now();
    let until = |done: &dyn Fn() -> bool, what: &str| {
        while !done() {
            assert!(start.elapsed() < LIMIT, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let ids = || std::fs::read_to_string(&file).unwrap_or_default();
    until(&|| ids().lines().count() == 2, "the ranks do not start");
    let lives = |id: &str| {
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        !(status.is_empty() || status.contains("State:\tZ"))
    };
    assert!(ids().lines().all(lives));
    launcher.kill().and_then(|()| launcher.wait()).expect("it is killed");
    until(&|| !ids().lines().any(lives), "the ranks live on");
    std::fs::remove_file(&file).expect("its end");
}
