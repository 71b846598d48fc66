//! A listener that lets ranks in and turns strangers away.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::wire::{self, Frame};

/// Time in which someone who connects must have said who it is.
const PATIENCE: Duration = Duration::from_secs(10);
/// Connections that may be about to say who they are; more are closed at once.
const MOST_GUESTS: usize = 512;

/// Someone who speaks our protocol.
pub(super) struct Guest {
    pub(super) stream: TcpStream,
    pub(super) version: u32,
    /// The first frame; `None` if the version is another one.
    pub(super) frame: Option<Frame>,
}

/// A listener with a thread that accepts connections, until it is dropped. Every connection is read by a thread of its own, so
/// that a silent stranger keeps nobody waiting.
pub(super) struct Door {
    open: Arc<AtomicBool>,
    guests: Receiver<Guest>,
}

impl Door {
    pub(super) fn open(listener: TcpListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, guests) = channel();
        let open = Arc::new(AtomicBool::new(true));
        let stays = open.clone();
        start("ett-door", move || accept(&listener, &stays, &sender))?;
        Ok(Door { open, guests })
    }

    /// The next one, if one comes within `wait`.
    pub(super) fn next(&self, wait: Duration) -> Option<Guest> {
        self.guests.recv_timeout(wait).ok()
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.open.store(false, Ordering::Release);
    }
}

/// Starts a thread.
pub(super) fn start(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).stack_size(1 << 19).spawn(work).map(|_| ())
}

fn accept(listener: &TcpListener, open: &AtomicBool, sender: &Sender<Guest>) {
    let waiting = Arc::new(AtomicUsize::new(0));
    while open.load(Ordering::Acquire) {
        let Ok((stream, _)) = listener.accept() else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        if waiting.load(Ordering::Relaxed) >= MOST_GUESTS {
            continue;
        }
        waiting.fetch_add(1, Ordering::Relaxed);
        let (waiting, sender) = (waiting.clone(), sender.clone());
        // If no thread can be started, the connection closes, and the other side reports it.
        let _ = start("ett-guest", move || {
            if let Some(guest) = receive(stream) {
                // The door may have been closed meanwhile.
                let _ = sender.send(guest);
            }
            waiting.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Reads the first words of a connection; `None` for a stranger.
fn receive(mut stream: TcpStream) -> Option<Guest> {
    stream.set_nonblocking(false).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let (version, frame) = wire::greeted(&mut stream, wire::LONGEST_HELLO).ok()??;
    stream.set_read_timeout(None).ok()?;
    Some(Guest { stream, version, frame })
}
