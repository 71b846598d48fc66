//! Processes of ranks: their start, the signals passed on to them, and their end.

use std::io;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::interrupt;
use crate::terminal;

/// Time between two looks at the processes.
const POLL: Duration = Duration::from_millis(20);
/// Time for killed processes to end, and for their last lines to be printed.
const LAST: Duration = Duration::from_secs(5);

/// Signals that this process gets from now on.
pub struct Signals(Receiver<()>);

impl Signals {
    /// Catches the signals that end a run, instead of [`interrupt::install`].
    pub fn catch() -> Result<Self> {
        let (send, receive) = channel();
        interrupt::catch(move || {
            let _ = send.send(());
        })?;
        Ok(Signals(receive))
    }

    /// Signals that are sent by hand, for tests.
    pub fn from(receive: Receiver<()>) -> Self {
        Signals(receive)
    }

    /// Waits for a signal; false if there is none for `time`.
    fn came(&self, time: Duration) -> bool {
        match self.0.recv_timeout(time) {
            Ok(()) => true,
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(time);
                false
            }
        }
    }
}

/// How ranks may end.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Ranks save after the first signal; otherwise it kills them.
    pub saves: bool,
    /// Time for the others to end by themselves after one has failed.
    pub patience: Duration,
}

/// Starts `ranks` processes, those of `command(rank)`, and waits until all have ended. Returns the exit status: 0 if all
/// succeeded, else that of the first one that failed, 1 if a signal killed it, and 130 if this process was interrupted and
/// nothing was saved.
///
/// Standard output and standard error of rank 0 are as `command` says; of the others only standard error is printed, with
/// the rank before each line. The first signal is passed on to the first rank that still runs, the second one kills all.
/// After a failure, the others have time to end, then they are killed. `say` is told about ranks that were killed.
///
/// On Linux the processes do not outlive the calling thread.
pub fn supervise(
    ranks: usize,
    command: impl Fn(usize) -> Command,
    signals: &Signals,
    rules: Rules,
    say: impl Fn(&Error),
) -> Result<u8> {
    let mut all = Children::start(ranks, command)?;
    let (mut first, patience) = (None::<Instant>, rules.patience);
    loop {
        let interrupted = first.is_some();
        all.look(interrupted, &say)?;
        if all.running().next().is_none() {
            break;
        }
        if let Some(failure) = &all.failure
            && failure.at.elapsed() >= failure.patience(interrupted, patience)
        {
            let (rank, told) = (failure.rank, !(interrupted && failure.interrupted));
            if told {
                all.late(rank, patience, &say);
            }
            all.kill();
            break;
        }
        // Those who stop a job often send two signals at once.
        if signals.came(POLL) && first.is_none_or(|at| at.elapsed() > interrupt::APART) {
            if interrupted || !rules.saves {
                all.kill();
                return Ok(interrupt::STATUS);
            }
            first = Some(Instant::now());
            all.terminate();
        }
    }
    Ok(all.failure.as_ref().map_or(0, |f| f.status))
}

/// How the first rank failed.
struct Failure {
    rank: usize,
    status: u8,
    /// It ended because of a signal before it could save.
    interrupted: bool,
    at: Instant,
}

impl Failure {
    /// Time for the other ranks to end.
    fn patience(&self, interrupted: bool, patience: Duration) -> Duration {
        if interrupted && self.interrupted { Duration::ZERO } else { patience }
    }
}

/// A process of a rank.
struct Rank {
    child: Child,
    ended: bool,
    /// Prints its standard error.
    relay: Option<JoinHandle<()>>,
}

/// The processes of all ranks; they are killed when this value is dropped.
struct Children {
    all: Vec<Rank>,
    failure: Option<Failure>,
}

impl Children {
    fn start(ranks: usize, command: impl Fn(usize) -> Command) -> Result<Self> {
        let mut children = Children { all: Vec::new(), failure: None };
        for rank in 0..ranks {
            let mut command = command(rank);
            command.stdin(Stdio::null());
            if rank > 0 {
                command.stdout(Stdio::null()).stderr(Stdio::piped());
            }
            bind(&mut command);
            let mut child = command.spawn().map_err(Error::io(command.get_program()))?;
            let relay = child.stderr.take().map(|from| {
                let prefix = format!("rank {rank}: ");
                std::thread::spawn(move || terminal::pass_on(from, &prefix))
            });
            children.all.push(Rank { child, ended: false, relay });
        }
        Ok(children)
    }

    fn running(&mut self) -> impl Iterator<Item = (usize, &mut Rank)> {
        self.all.iter_mut().enumerate().filter(|(_, rank)| !rank.ended)
    }

    /// Notices which processes have ended, and how.
    fn look(&mut self, interrupted: bool, say: &dyn Fn(&Error)) -> Result<()> {
        let mut failure = None;
        for (rank, it) in self.running() {
            let status = it.child.try_wait().map_err(|e| lost(rank, &it.child, e))?;
            let Some(status) = status else { continue };
            it.ended = true;
            let by = signal(status);
            let stopped = interrupted && by == Some(TERMINATE);
            if let (Some(by), false) = (by, stopped) {
                let id = it.child.id();
                say(&Error::Rank(format!("rank {rank} (process {id}) was killed by signal {by}")));
            }
            let status = match status.code() {
                Some(code) => u8::try_from(code).unwrap_or(1),
                None if stopped => interrupt::STATUS,
                None => 1,
            };
            if status != 0 && failure.is_none() {
                let interrupted = status == interrupt::STATUS;
                failure = Some(Failure { rank, status, interrupted, at: Instant::now() });
            }
        }
        if self.failure.is_none() {
            self.failure = failure;
        }
        Ok(())
    }

    /// Asks the first rank that still runs to save and to end: it tells the others.
    fn terminate(&mut self) {
        if let Some((_, rank)) = self.running().next() {
            terminate(&mut rank.child);
        }
    }

    /// Tells about the ranks that have not ended `patience` after rank `first` had failed.
    fn late(&mut self, first: usize, patience: Duration, say: &dyn Fn(&Error)) {
        for (rank, it) in self.running() {
            let (id, s) = (it.child.id(), patience.as_secs());
            say(&Error::Rank(format!(
                "rank {rank} (process {id}) has not ended {s} s after rank {first} failed, and is killed"
            )));
        }
    }

    /// Kills all that still run, and waits a little for their end.
    fn kill(&mut self) {
        self.running().for_each(|(_, rank)| {
            let _ = rank.child.kill();
        });
        let start = Instant::now();
        while self.running().next().is_some() && start.elapsed() < LAST {
            for (_, rank) in self.running() {
                rank.ended = !matches!(rank.child.try_wait(), Ok(None));
            }
            std::thread::sleep(POLL / 4);
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.kill();
        let start = Instant::now();
        for relay in self.all.iter_mut().filter_map(|rank| rank.relay.take()) {
            // A process that was started by a rank may still hold the pipe.
            while !relay.is_finished() && start.elapsed() < LAST {
                std::thread::sleep(POLL / 4);
            }
        }
    }
}

fn lost(rank: usize, child: &Child, e: io::Error) -> Error {
    Error::Rank(format!("rank {rank} (process {}) cannot be waited for ({e})", child.id()))
}

#[cfg(unix)]
const TERMINATE: i32 = libc::SIGTERM;
#[cfg(not(unix))]
const TERMINATE: i32 = 15;

/// Gives a process a group of its own, so that Ctrl-C reaches the launcher only, and ties its life to this thread's.
#[cfg(unix)]
fn bind(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
    let launcher = std::process::id();
    // SAFETY: between fork and exec it makes only system calls and allocates nothing.
    unsafe { command.pre_exec(move || prepare(launcher)) };
}

/// In the new process, before it becomes the rank.
#[cfg(unix)]
fn prepare(launcher: u32) -> io::Result<()> {
    // Else a terminal with `tostop` would stop a process in the background that prints.
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
    #[cfg(target_os = "linux")]
    {
        // SAFETY: it sets the signal that this process gets when the thread ends that has started it.
        if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // The launcher may have ended before.
        if std::os::unix::process::parent_id() != launcher {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = launcher;
    Ok(())
}

#[cfg(not(unix))]
fn bind(_: &mut Command) {}

#[cfg(unix)]
fn terminate(child: &mut Child) {
    // SAFETY: sends a signal to a child that has not been waited for.
    unsafe { libc::kill(child.id() as libc::pid_t, TERMINATE) };
}

/// There is no signal to ask with.
#[cfg(not(unix))]
fn terminate(child: &mut Child) {
    let _ = child.kill();
}

/// The signal that killed a process.
#[cfg(unix)]
fn signal(status: ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(&status)
}

#[cfg(not(unix))]
fn signal(_: ExitStatus) -> Option<i32> {
    None
}
