//! A process as one of the ranks: joining them, and its end or theirs.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, Result};
use crate::files;
use crate::ranks::{Group, Place};
use crate::terminal;

/// Time for a rank to end by itself after another one has failed; its device may never return.
const GRACE: Duration = Duration::from_secs(10);

/// Does `work` as the rank of `place`, or alone (`None`). Connects to the other ranks before, and tells them after how it
/// ended.
///
/// If another rank has failed, its sentence is the error of rank 0, or of rank 1 if it is about rank 0; the others return a
/// status of failure. A rank that does not return for ten seconds after that ends the process.
pub fn take_part(place: Option<Place>, work: impl FnOnce(&Arc<Group>) -> Result<()>) -> Result<ExitCode> {
    let Some(place) = place else { return work(&Group::alone()).map(|()| ExitCode::SUCCESS) };
    let group = Group::join(place)?;
    let rank = group.rank();
    group.on_failure(move |why| end_later(rank, why));
    let done = build().and_then(|build| group.agree("the build", &build)).and_then(|()| work(&group));
    conclude(&group, done)
}

fn conclude(group: &Group, done: Result<()>) -> Result<ExitCode> {
    let Err(e) = done else {
        group.leave();
        return Ok(ExitCode::SUCCESS);
    };
    if !matches!(e, Error::Rank(_)) && group.failure().is_none() {
        group.fail(&e.to_string());
    }
    // Whatever else fails here once another rank has failed, such as a collective, fails because of it; and if all fail alike,
    // the first one tells.
    let own = |why: &str| why.starts_with(&format!("rank {} ", group.rank()));
    let why = match (&e, group.failure()) {
        (Error::Rank(why), _) if !own(why) => why.clone(),
        (_, Some(why)) if !own(&why) => why,
        _ => return Err(e),
    };
    if group.failure().is_none() {
        // All have the same error, such as two builds: nobody has to be told.
        group.leave();
    }
    match tells(group.rank(), &why) {
        true => Err(Error::Rank(why)),
        false => Ok(ExitCode::FAILURE),
    }
}

/// Whether a rank prints why another one has failed: rank 0, or if that is the one, rank 1, since it may have been killed before
/// it could.
fn tells(rank: usize, why: &str) -> bool {
    rank == usize::from(why.starts_with("rank 0 "))
}

/// Ends the process after a while, if it has not ended by then.
fn end_later(rank: usize, why: &str) {
    let why = why.to_string();
    std::thread::spawn(move || {
        std::thread::sleep(GRACE);
        if tells(rank, &why) {
            terminal::complain(&Error::Rank(why));
        }
        std::process::exit(1);
    });
}

/// The version of this program, and the checksum of its file.
fn build() -> Result<String> {
    let path = match cfg!(target_os = "linux") {
        // Also if the file was replaced since.
        true => Path::new("/proc/self/exe").into(),
        false => std::env::current_exe().map_err(Error::io("this program"))?,
    };
    let sum = files::checksum(&path)?.crc32;
    Ok(format!("ett {}, checksum {sum:08x}", env!("CARGO_PKG_VERSION")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_tells_why_another_has_failed() {
        let tell = |why: &str| (0..4).filter(|&rank| tells(rank, why)).collect::<Vec<_>>();
        assert_eq!(tell("rank 2 on host a ended without a word at stage align, step 3"), [0]);
        assert_eq!(tell("rank 0 on host a ended without a word at stage align, step 3"), [1]);
        assert_eq!(tell("all ranks have made no progress for 60 s"), [0]);
    }

    #[test]
    fn a_build_has_a_checksum() {
        let text = build().expect("a build");
        assert!(text.starts_with("ett ") && text.contains(", checksum ") && text == build().expect("again"));
    }

    #[test]
    fn work_alone_needs_no_others() {
        assert!(
            take_part(None, |group| {
                assert_eq!(group.ranks(), 1);
                Ok(())
            })
            .is_ok()
        );
        let e = take_part(None, |_| Err(Error::Interrupted)).expect_err("its own");
        assert!(matches!(e, Error::Interrupted));
    }
}
