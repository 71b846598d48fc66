//! The connected ranks.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Place;
use super::control::{Call, Control};
use super::mesh::{Mesh, Plan};
use super::rendezvous::meet;
use super::wire::{Fields, put};
use crate::error::{Error, Result};

/// Time in which all ranks must have come.
const PATIENCE: Duration = Duration::from_secs(600);

/// What a rank is doing, which decides whether it may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Starting, saving, evaluating or at a first step: takes any time.
    Busy,
    /// Training: every step is progress.
    Training,
}

/// The ranks that train together, as one of them sees them.
///
/// A rank whose group is dropped without [`Group::leave`] or [`Group::fail`] has ended without a word for the others. When a
/// rank ends, fails or stands still, the group ends: all calls on all ranks, also those in which a rank waits, fail with the
/// same [`Error::Rank`], which names the rank, its host and its place in the run.
pub struct Group {
    place: Place,
    /// `None` with a single rank.
    net: Option<Net>,
}

struct Net {
    control: Arc<Control>,
    /// Held during a call: the ranks take part in one at a time.
    turn: Mutex<()>,
    data: Mutex<Data>,
}

/// The connections between every two ranks.
enum Data {
    /// They are opened when they are first used.
    Planned(Plan),
    Open(Mesh),
    /// They could not be opened, which has ended the group.
    Failed,
}

impl Group {
    /// A group of one rank: all calls return at once, with what this rank passes.
    pub fn alone() -> Arc<Self> {
        let place =
            Place { rank: 0, ranks: 1, local: 0, address: String::new(), stall: Duration::from_secs(60) };
        Arc::new(Group { place, net: None })
    }

    /// Connects to all other ranks of `place`. Blocks until they are all there, or fails after ten minutes. Fails on all ranks
    /// that are there if two say that they are the same one, or if their numbers of ranks or their versions differ.
    pub fn join(place: Place) -> Result<Arc<Self>> {
        Self::join_within(place, None, PATIENCE)
    }

    /// The groups of `ranks` ranks in one process, for tests. Each belongs to a thread of its own.
    pub fn in_process(ranks: usize, stall: Duration) -> Result<Vec<Arc<Self>>> {
        let lost =
            |e: std::io::Error| Error::Rank(format!("the ranks of a process cannot find each other: {e}"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(lost)?;
        let address = listener.local_addr().map_err(lost)?.to_string();
        let mut listener = Some(listener);
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..ranks)
                .map(|rank| {
                    let place = Place { rank, ranks, local: rank, address: address.clone(), stall };
                    let listener = listener.take();
                    scope.spawn(move || Self::join_within(place, listener, PATIENCE))
                })
                .collect();
            let panicked = || Error::Rank("a rank of this process has panicked".into());
            ranks.into_iter().map(|r| r.join().unwrap_or_else(|_| Err(panicked()))).collect()
        })
    }

    /// As [`Group::join`]. Rank 0 uses `listener` if there is one.
    pub(super) fn join_within(
        place: Place,
        listener: Option<TcpListener>,
        patience: Duration,
    ) -> Result<Arc<Self>> {
        if place.rank >= place.ranks || place.ranks > Place::MOST {
            let Place { rank, ranks, .. } = place;
            let want = format!("a rank below the number of ranks, and at most {} of them", Place::MOST);
            return Err(Error::Rank(format!("this is rank {rank} of {ranks} ranks, wanted {want}")));
        }
        if place.ranks == 1 {
            return Ok(Arc::new(Group { place, net: None }));
        }
        let joined = meet(&place, listener, patience)?;
        let control = Control::start(&place, joined.control, joined.hosts)?;
        let plan = Plan { rank: place.rank, at: joined.data, listener: joined.listener, token: joined.token };
        let net = Net { control, turn: Mutex::default(), data: Mutex::new(Data::Planned(plan)) };
        Ok(Arc::new(Group { place, net: Some(net) }))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.place.ranks
    }

    /// True for the rank that writes files and talks to the user.
    pub fn leads(&self) -> bool {
        self.place.rank == 0
    }

    /// The host of a rank; empty if there is no such rank.
    pub fn host(&self, rank: usize) -> &str {
        match &self.net {
            None if rank == 0 => "this host",
            None => "",
            Some(net) => net.control.hosts.get(rank).map_or("", String::as_str),
        }
    }

    /// The sentence with which the group has ended; `None` while it has not.
    pub fn failure(&self) -> Option<String> {
        self.net.as_ref().and_then(|net| net.control.failure())
    }

    /// Calls `f` once with the sentence when the group ends because of another rank, on a thread of the group. A rank whose
    /// main thread waits for its device cannot notice otherwise. `f` must not hold the group itself, which would never be
    /// dropped. It is not called after [`Group::fail`] or an error of a call that this rank caused.
    pub fn on_failure(&self, f: impl Fn(&str) + Send + 'static) {
        if let Some(net) = &self.net {
            net.control.on_failure(Box::new(f));
        }
    }

    /// Every rank's bytes, in the order of the ranks, at most 1 GiB together. All ranks call this at the same point; so for the
    /// functions below.
    pub fn gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let Some(net) = &self.net else { return Ok(vec![mine.to_vec()]) };
        let whole = net.call(Call::Gather, mine, |parts| {
            let mut whole = Vec::new();
            parts.iter().for_each(|part| put(&mut whole, part));
            Ok(whole)
        })?;
        let mut fields = Fields(&whole);
        let parts: Option<Vec<_>> = (0..self.ranks()).map(|_| fields.bytes().map(<[u8]>::to_vec)).collect();
        parts.ok_or_else(|| net.control.fail("it got less than the bytes of all ranks"))
    }

    /// The bytes of rank 0, at most 1 GiB.
    pub fn broadcast(&self, mine: &[u8]) -> Result<Vec<u8>> {
        let Some(net) = &self.net else { return Ok(mine.to_vec()) };
        let mine = if self.leads() { mine } else { &[] };
        net.call(Call::Broadcast, mine, |mut parts| Ok(parts.swap_remove(0)))
    }

    /// Sums of as many numbers of every rank, modulo 2^64. Counts as progress: a rank in [`Phase::Training`] that does not come
    /// here for [`Place::stall`] while others wait ends the run.
    pub fn sum(&self, mine: &[u64]) -> Result<Vec<u64>> {
        let Some(net) = &self.net else { return Ok(mine.to_vec()) };
        let bytes: Vec<u8> = mine.iter().flat_map(|n| n.to_le_bytes()).collect();
        let hosts = &net.control.hosts;
        let whole = net.call(Call::Sum, &bytes, |parts| {
            let mut sums = mine.to_vec();
            for (rank, part) in parts.iter().enumerate().skip(1) {
                if part.len() != bytes.len() {
                    let (got, want) = (part.len() / 8, mine.len());
                    let host = hosts.get(rank).map_or("", String::as_str);
                    return Err(format!("rank {rank} on host {host} adds {got} numbers, rank 0 {want}"));
                }
                sums.iter_mut().zip(numbers(part)).for_each(|(sum, n)| *sum = sum.wrapping_add(n));
            }
            Ok(sums.iter().flat_map(|n| n.to_le_bytes()).collect())
        })?;
        Ok(numbers(&whole).collect())
    }

    /// Fails on all ranks if their texts differ, and names `what` differs, on which ranks, and the first line that does. The
    /// group goes on.
    pub fn agree(&self, what: &str, mine: &str) -> Result<()> {
        let Some(net) = &self.net else { return Ok(()) };
        let hosts = &net.control.hosts;
        let whole = net.call(Call::Agree, mine.as_bytes(), |parts| {
            Ok(difference(what, &parts, hosts).unwrap_or_default().into_bytes())
        })?;
        match whole.is_empty() {
            true => Ok(()),
            false => Err(Error::Rank(String::from_utf8_lossy(&whole).into_owned())),
        }
    }

    /// Says what this rank is doing from now on, for the others and for their messages: such as `stage semantic, step 12`.
    pub fn enter(&self, phase: Phase, at: &str) {
        if let Some(net) = &self.net {
            net.control.enter(phase, at);
        }
    }

    /// Tells all others that this rank has failed: their calls, also those that they are waiting in, fail with a sentence
    /// that names this rank, its host, its place in the run and `why`. Waits up to three seconds until they know. Does nothing
    /// if the group has ended before.
    pub fn fail(&self, why: &str) {
        if let Some(net) = &self.net {
            net.control.fail(why);
        }
    }

    /// Leaves the group: the others may go on without this rank, which is not missed any more. Waits up to three seconds until
    /// they know.
    pub fn leave(&self) {
        if let Some(net) = &self.net {
            net.control.leave();
        }
    }

    /// For devices with host memory: sends `send[r]` to rank r and receives `receive[r]` from it, of which both sides know the
    /// length; the entries of this rank are not used.
    pub fn exchange(&self, send: &[&[u8]], receive: &mut [&mut [u8]]) -> Result<()> {
        let ranks = self.ranks();
        if send.len() != ranks || receive.len() != ranks {
            let got = format!("{} and {} entries", send.len(), receive.len());
            return Err(Error::arg("exchange", "send", got, format!("one for each of {ranks} ranks")));
        }
        let Some(net) = &self.net else { return Ok(()) };
        let mut data = net.data.lock().unwrap_or_else(PoisonError::into_inner);
        if let Data::Planned(_) = *data
            && let Data::Planned(plan) = std::mem::replace(&mut *data, Data::Failed)
        {
            *data = Data::Open(Mesh::open(plan, &net.control)?);
        }
        match &*data {
            Data::Open(mesh) => mesh.exchange(&net.control, send, receive),
            _ => Err(net.control.fail("it has no connections for data")),
        }
    }
}

impl Net {
    fn call(
        &self,
        call: Call,
        mine: &[u8],
        combine: impl FnOnce(Vec<Vec<u8>>) -> std::result::Result<Vec<u8>, String>,
    ) -> Result<Vec<u8>> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.control.call(call, mine.to_vec(), combine)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.control.close();
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|n| n.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// A sentence about the first rank whose text is not that of rank 0.
fn difference(what: &str, texts: &[Vec<u8>], hosts: &[String]) -> Option<String> {
    let others: Vec<usize> = (1..texts.len()).filter(|r| texts[*r] != texts[0]).collect();
    let rank = *others.first()?;
    let (here, there) = (String::from_utf8_lossy(&texts[0]), String::from_utf8_lossy(&texts[rank]));
    let (mut lead, mut other) = (here.lines(), there.lines());
    let (lead, other) = loop {
        match (lead.next(), other.next()) {
            // Line ends differ.
            (None, None) => break (None, None),
            (a, b) if a == b => {}
            differing => break differing,
        }
    };
    let show = |line: Option<&str>| match line {
        Some(line) => format!("`{}`", line.trim().chars().take(200).collect::<String>()),
        None => "nothing".into(),
    };
    let more = match others.len() {
        1 => String::new(),
        n => format!(" (and of {} more)", n - 1),
    };
    Some(format!(
        "{what} of rank {rank} on host {}{more} differs from that of rank 0 on host {}: {}, there {}",
        hosts[rank],
        hosts[0],
        show(other),
        show(lead)
    ))
}
