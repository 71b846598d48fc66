//! Connections for data between every two ranks, which are opened when they are first used.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use super::control::Control;
use super::door::Door;
use super::rendezvous::connect_once;
use super::wire::{self, Fields, Frame, Kind};
use crate::error::{Error, Result};

/// Bytes to one rank that certainly fit into the buffers of a connection, so that they can be written before anything is read.
const SMALL: usize = 4096;

/// Where to connect to.
pub(super) struct Plan {
    pub(super) rank: usize,
    /// The addresses of all ranks.
    pub(super) at: Vec<SocketAddr>,
    /// This rank's own.
    pub(super) listener: TcpListener,
    /// What tells the ranks of this run from others.
    pub(super) token: u64,
}

/// The connections, by rank; none to itself.
pub(super) struct Mesh {
    rank: usize,
    peers: Vec<Option<TcpStream>>,
}

/// What went wrong with the connection to a rank, or the end of the group.
enum Broken {
    With(usize, std::io::Error),
    Ended(Error),
}

impl Mesh {
    /// Connects to all lower ranks and waits for all higher ones.
    pub(super) fn open(plan: Plan, control: &Control) -> Result<Self> {
        Self::connect(plan, control).map_err(|broken| match broken {
            Broken::Ended(e) => e,
            Broken::With(rank, e) => control.fail(&format!(
                "it cannot connect to rank {rank} on host {}: {e}; ranks must reach each other at any port",
                control.hosts[rank]
            )),
        })
    }

    fn connect(plan: Plan, control: &Control) -> std::result::Result<Self, Broken> {
        let Plan { rank, at, listener, token } = plan;
        let mut peers: Vec<Option<TcpStream>> = at.iter().map(|_| None).collect();
        let hello = |rank: usize| {
            let body = [token.to_le_bytes(), (rank as u64).to_le_bytes()].concat();
            Frame::new(Kind::Hello, 0, body)
        };
        for to in 0..rank {
            let greeted =
                connect_once(&at[to]).and_then(|mut s| wire::greet(&mut s, &hello(rank)).map(|()| s));
            peers[to] = Some(greeted.map_err(|e| Broken::With(to, e))?);
        }
        let door = Door::open(listener).map_err(|e| Broken::With(rank, e))?;
        while peers.iter().skip(rank + 1).any(Option::is_none) {
            control.check().map_err(Broken::Ended)?;
            let Some(guest) = door.next(Duration::from_millis(50)) else { continue };
            let Some(frame) = guest.frame else { continue };
            let mut fields = Fields(&frame.body);
            let from = match (fields.number(), fields.number()) {
                (Some(given), Some(from)) if given == token => from as usize,
                // A rank of another run.
                _ => continue,
            };
            if let Some(peer @ None) = peers.get_mut(from).filter(|_| from > rank) {
                *peer = Some(guest.stream);
            }
        }
        let copies = peers.iter().flatten().map(TcpStream::try_clone).collect::<std::io::Result<Vec<_>>>();
        control.own_data(copies.map_err(|e| Broken::With(rank, e))?).map_err(Broken::Ended)?;
        Ok(Mesh { rank, peers })
    }

    /// Sends and receives at the same time.
    pub(super) fn exchange(
        &self,
        control: &Control,
        send: &[&[u8]],
        receive: &mut [&mut [u8]],
    ) -> Result<()> {
        control.check()?;
        // Ends the group, and with it the connections, so that the other direction does not wait for ever.
        let broken = |(rank, e): (usize, std::io::Error)| {
            let host = control.hosts.get(rank).map_or("", String::as_str);
            control.fail(&format!("its connection to rank {rank} on host {host} broke: {e}"))
        };
        if send.iter().all(|s| s.len() <= SMALL) {
            return self.send_all(send).and_then(|()| self.receive_all(receive)).map_err(broken);
        }
        std::thread::scope(|scope| {
            let sender = std::thread::Builder::new().name("ett-send".into());
            let sender = sender
                .spawn_scoped(scope, || self.send_all(send).map_err(broken))
                .map_err(|e| control.fail(&format!("it cannot start a thread that sends: {e}")))?;
            let received = self.receive_all(receive).map_err(broken);
            let sent =
                sender.join().unwrap_or_else(|_| Err(control.fail("a thread that sends has panicked")));
            received.and(sent)
        })
    }

    /// To the next rank first, so that in every round each rank sends to one and receives from one.
    fn send_all(&self, send: &[&[u8]]) -> std::result::Result<(), (usize, std::io::Error)> {
        let n = self.peers.len();
        for to in (1..n).map(|i| (self.rank + i) % n) {
            if let Some(mut peer) = self.peers[to].as_ref() {
                peer.write_all(send[to]).map_err(|e| (to, e))?;
            }
        }
        Ok(())
    }

    /// From the previous rank first, as the others send.
    fn receive_all(&self, receive: &mut [&mut [u8]]) -> std::result::Result<(), (usize, std::io::Error)> {
        let n = self.peers.len();
        for from in (1..n).map(|i| (self.rank + n - i) % n) {
            if let Some(mut peer) = self.peers[from].as_ref() {
                peer.read_exact(receive[from]).map_err(|e| (from, e))?;
            }
        }
        Ok(())
    }
}
