//! Signals that end a run: the first asks it to save and stop, the second ends it at once.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// Exit status after the second signal, as shells give it for an interrupted program.
const STATUS: i32 = 130;

static REQUESTED: AtomicBool = AtomicBool::new(false);

/// Catches SIGINT, SIGTERM and SIGHUP (Ctrl-C elsewhere) from now on; a second call changes nothing. Signals that the
/// program was started to ignore, as `nohup` does with SIGHUP, stay ignored. Only programs call this, not libraries.
pub fn install() -> Result<()> {
    let ignored = ignored();
    let handler = || {
        if REQUESTED.swap(true, Ordering::SeqCst) {
            std::process::exit(STATUS);
        }
        tracing::warn!("interrupted: saving after this step; once more ends the run at once");
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
