//! Signals that stop a run: the first one requests it to save and stop, the second one exits at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// Exit status after a second signal, the one that shells use for interrupted programs.
pub const STATUS: u8 = 130;
/// A second signal of a rank that comes sooner after the first one is the same: systems and launchers both send one.
pub(crate) const APART: Duration = Duration::from_secs(1);

static REQUESTED: AtomicBool = AtomicBool::new(false);
static PHASE: AtomicU8 = AtomicU8::new(Phase::Starting as u8);

/// The phase of a run, which determines the effect of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// There is nothing to save yet: a signal exits at once.
    Starting,
    /// The first signal requests to save after the current step.
    Training,
    /// Training is done and saved: the first signal requests to stop the evaluation.
    Closing,
}

/// Sets the current phase.
pub fn enter(phase: Phase) {
    PHASE.store(phase as u8, Ordering::SeqCst);
}

/// Starts catching SIGINT, SIGTERM and SIGHUP (Ctrl-C on other systems); a second call does nothing. Signals that
/// were ignored when the program was started, as `nohup` does with SIGHUP, stay ignored. To be called by programs
/// only, not by libraries.
pub fn install() -> Result<()> {
    catch(|| requested_now(Duration::ZERO))
}

/// The same in one of several ranks, which takes two signals within a second for one.
pub fn install_in_rank() -> Result<()> {
    catch(|| requested_now(APART))
}

/// Calls `handler` at each of these signals, in a thread of its own, as [`install`] does with the one that asks a run to
/// stop. Only the first call of the two has an effect.
pub fn catch(handler: impl FnMut() + Send + 'static) -> Result<()> {
    let ignored = ignored();
    match ctrlc::set_handler(handler) {
        Ok(()) => {}
        Err(ctrlc::Error::MultipleHandlers) => return Ok(()),
        Err(e) => return Err(Error::Training(format!("signals cannot be caught ({e})"))),
    }
    ignore(&ignored);
    Ok(())
}

/// A signal has come; one that comes less than `apart` after the first one changes nothing.
fn requested_now(apart: Duration) {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let phase = PHASE.load(Ordering::SeqCst);
    let first = FIRST.get_or_init(Instant::now);
    if REQUESTED.swap(true, Ordering::SeqCst) {
        if first.elapsed() < apart {
            return;
        }
        std::process::exit(STATUS.into());
    }
    if phase == Phase::Starting as u8 {
        tracing::warn!("interrupted before the first step: there is nothing to save");
        std::process::exit(STATUS.into());
    }
    let what = match phase == Phase::Closing as u8 {
        true => "stopping the evaluation, the weights are saved",
        false => "saving after this step",
    };
    tracing::warn!("interrupted: {what}; interrupt again to exit at once");
}

/// True after the first signal: the run should save and stop.
pub fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// [`Error::Interrupted`] after the first signal: for work that can be stopped without loss.
pub fn check() -> Result<()> {
    if requested() { Err(Error::Interrupted) } else { Ok(()) }
}

#[cfg(unix)]
fn ignored() -> Vec<libc::c_int> {
    let is_ignored = |&signal: &libc::c_int| {
        // SAFETY: an all-zero action is valid; with a null pointer, sigaction only writes the current action to it.
        let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &mut now) };
        asked == 0 && now.sa_sigaction == libc::SIG_IGN
    };
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].into_iter().filter(is_ignored).collect()
}

#[cfg(unix)]
fn ignore(signals: &[libc::c_int]) {
    for &signal in signals {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

#[cfg(not(unix))]
fn ignored() {}

#[cfg(not(unix))]
fn ignore(_: &()) {}
