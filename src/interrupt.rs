//! Signals that end a run: the first asks it to save and stop, the second ends it at once.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::error::{Error, Result};

/// Exit status when a signal ends the program at once, as shells give it for an interrupted one.
const STATUS: i32 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);
static PHASE: AtomicU8 = AtomicU8::new(Phase::Starting as u8);

/// What a run is doing, and so what a signal does to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing that is not saved: a signal ends the program at once.
    Starting,
    /// The first signal asks to save after the step under way.
    Training,
    /// All is trained and saved: the first signal asks to stop evaluating.
    Closing,
}

/// Says what the run is doing from now on.
pub fn enter(phase: Phase) {
    PHASE.store(phase as u8, Ordering::SeqCst);
}

/// Catches SIGINT, SIGTERM and SIGHUP (Ctrl-C elsewhere) from now on; a second call changes nothing. Signals that the
/// program was started to ignore, as `nohup` does with SIGHUP, stay ignored. Only programs call this, not libraries.
pub fn install() -> Result<()> {
    let ignored = ignored();
    let handler = || {
        let phase = PHASE.load(Ordering::SeqCst);
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(STATUS);
        }
        if phase == Phase::Starting as u8 {
            tracing::warn!("interrupted before the first step: there is nothing to save");
            std::process::exit(STATUS);
        }
        let what = match phase == Phase::Closing as u8 {
            true => "stopping the evaluation, the weights are saved",
            false => "saving after this step",
        };
        tracing::warn!("interrupted: {what}; once more ends the run at once");
    };
    match ctrlc::set_handler(handler) {
        Ok(()) => {}
        Err(ctrlc::Error::MultipleHandlers) => return Ok(()),
        Err(e) => return Err(Error::Training(format!("signals cannot be caught ({e})"))),
    }
    ignore(&ignored);
    Ok(())
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
        // SAFETY: an action of zeros is valid; with a null pointer sigaction only writes the current one into it.
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
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

#[cfg(not(unix))]
fn ignored() {}

#[cfg(not(unix))]
fn ignore(_: &()) {}
