//! The connections to rank 0: calls of all ranks, signs of life, failures.
//!
//! Every connection has a thread that reads and one that writes, and every rank a thread that watches. None of them waits for
//! the main thread, so that a rank is heard whatever it computes, and no writer waits for another rank with the state locked.

use std::io::{BufReader, ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::door::start;
use super::watch::{self, Peer, Standing};
use super::wire::{Frame, Kind, LONGEST, shown};
use super::{Phase, Place};
use crate::error::{Error, Result};

/// Time that a reported failure waits for a better reason: a rank may fail because another one has ended.
const DOUBT: Duration = Duration::from_millis(250);
/// Time for the last words before a rank leaves or fails.
const FAREWELL: Duration = Duration::from_secs(3);

/// The function that is called with the sentence of a failure.
pub(super) type Hook = Box<dyn Fn(&str) + Send>;

/// A connection.
struct Link {
    out: Sender<Frame>,
    socket: TcpStream,
    /// When bytes last came, in milliseconds since `Control::start`.
    heard: AtomicU64,
}

/// A sentence with which the group is about to end.
struct Verdict {
    sentence: String,
    due: Instant,
    /// Whether it stands against other reports.
    certain: bool,
}

struct State {
    peers: Vec<Peer>,
    /// The result of the present call, which rank 0 has sent.
    whole: Option<Vec<u8>>,
    /// When all ranks had last entered a call.
    turned: Instant,
    verdict: Option<Verdict>,
    /// The others are being told.
    conveying: bool,
    failure: Option<String>,
    /// This rank has left, or its group was dropped.
    ended: bool,
    hook: Option<Hook>,
    /// The hook was called, or never will be.
    hooked: bool,
    /// Connections for data, which end with the group.
    data: Vec<TcpStream>,
}

/// This rank's end of the star.
pub(super) struct Control {
    rank: usize,
    stall: Duration,
    pub(super) hosts: Vec<String>,
    links: Vec<Option<Link>>,
    start: Instant,
    state: Mutex<State>,
    /// For calls: something has arrived or failed.
    changed: Condvar,
    /// For the watch: there is a verdict, a hook, or the end.
    alarm: Condvar,
}

impl Control {
    /// Starts the threads of the connections `sockets`, one for each rank that this one is connected to.
    pub(super) fn start(
        place: &Place,
        sockets: Vec<Option<TcpStream>>,
        hosts: Vec<String>,
    ) -> Result<Arc<Self>> {
        let lost =
            |e: std::io::Error| Error::Rank(format!("rank {} cannot watch the others: {e}", place.rank));
        let mut ends = Vec::new();
        let mut links = Vec::new();
        for (rank, socket) in sockets.into_iter().enumerate() {
            links.push(match socket {
                None => None,
                Some(socket) => {
                    let (out, frames) = channel();
                    let read = socket.try_clone().map_err(lost)?;
                    ends.push((rank, read, socket.try_clone().map_err(lost)?, frames));
                    Some(Link { out, socket, heard: AtomicU64::new(0) })
                }
            });
        }
        let state = State {
            peers: hosts.iter().map(|_| Peer::new()).collect(),
            whole: None,
            turned: Instant::now(),
            verdict: None,
            conveying: false,
            failure: None,
            ended: false,
            hook: None,
            hooked: false,
            data: Vec::new(),
        };
        let control = Arc::new(Control {
            rank: place.rank,
            stall: place.stall,
            hosts,
            links,
            start: Instant::now(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            alarm: Condvar::new(),
        });
        let pulse = control.tick();
        for (rank, read, write, frames) in ends {
            let reader = control.clone();
            start("ett-hear", move || reader.hear(rank, read)).map_err(lost)?;
            start("ett-tell", move || tell(write, &frames, pulse)).map_err(lost)?;
        }
        let watch = control.clone();
        start("ett-watch", move || watch.watch()).map_err(lost)?;
        Ok(control)
    }

    /// Time between signs of life, and between looks at them.
    fn tick(&self) -> Duration {
        (self.stall / 5).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No function panics between two changes that belong together.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a change until `deadline`; `None` after it.
    fn wait_until<'a>(
        &self,
        state: MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Option<MutexGuard<'a, State>> {
        let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        Some(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    fn name(&self, rank: usize) -> String {
        watch::name(rank, &self.hosts)
    }

    /// The writer of a rank's connection has ended if it does not take the frame, which its reader reports.
    fn send(&self, to: usize, frame: &Frame) {
        if let Some(Some(link)) = self.links.get(to) {
            let _ = link.out.send(frame.clone());
        }
    }

    fn send_all(&self, frame: &Frame) {
        (0..self.links.len()).for_each(|to| self.send(to, frame));
    }

    /// Fails if the group has ended for this rank.
    fn usable(&self, state: &State) -> Result<()> {
        match (&state.failure, state.ended) {
            (Some(failure), _) => Err(Error::Rank(failure.clone())),
            (None, true) => Err(Error::Rank(format!("rank {} has left the others", self.rank))),
            (None, false) => Ok(()),
        }
    }

    pub(super) fn check(&self) -> Result<()> {
        self.usable(&self.lock())
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }

    pub(super) fn on_failure(&self, hook: Hook) {
        let mut state = self.lock();
        if !state.hooked && !state.ended {
            state.hook = Some(hook);
            self.alarm.notify_all();
        }
    }

    pub(super) fn enter(&self, phase: Phase, at: &str) {
        let at = shown(at);
        let mut state = self.lock();
        let own = &mut state.peers[self.rank];
        if own.phase == phase && own.at == at {
            return;
        }
        own.enter(phase, at.clone());
        self.send_all(&Frame::new(Kind::State, phase as u8, at.into_bytes()));
    }

    /// Ends the connections for data together with the group.
    pub(super) fn own_data(&self, sockets: Vec<TcpStream>) -> Result<()> {
        let mut state = self.lock();
        self.usable(&state)?;
        state.data = sockets;
        Ok(())
    }

    /// One call of all ranks: rank 0 turns the parts of all, in their order, into a result, which all return. The name of the
    /// call is for messages. An error of `combine` ends the group.
    pub(super) fn call(
        &self,
        call: Call,
        mine: Vec<u8>,
        combine: impl FnOnce(Vec<Vec<u8>>) -> std::result::Result<Vec<u8>, String>,
    ) -> Result<Vec<u8>> {
        if mine.len() > LONGEST {
            return Err(
                self.fail(&format!("it sends {} bytes at once, at most {LONGEST} are possible", mine.len()))
            );
        }
        match self.rank {
            0 => self.lead(call, mine, combine),
            _ => self.follow(call, mine),
        }
    }

    fn lead(
        &self,
        call: Call,
        mine: Vec<u8>,
        combine: impl FnOnce(Vec<Vec<u8>>) -> std::result::Result<Vec<u8>, String>,
    ) -> Result<Vec<u8>> {
        let mut state = self.lock();
        self.usable(&state)?;
        if call == Call::Sum {
            state.peers[0].advance();
        }
        while let Some(rank) = (1..state.peers.len()).find(|r| state.peers[*r].part.is_none()) {
            self.usable(&state)?;
            if state.peers[rank].standing == Standing::Left {
                let why = self.missed(rank, 0, &state);
                return Err(self.give_up(state, why));
            }
            state = self.wait(state);
        }
        self.usable(&state)?;
        state.turned = Instant::now();
        let mut parts = vec![mine];
        let mut other = None;
        for (rank, peer) in state.peers.iter_mut().enumerate().skip(1) {
            let (tag, part) = peer.part.take().unwrap_or_default();
            if tag != call as u8 {
                other.get_or_insert((rank, tag));
            }
            parts.push(part);
        }
        if let Some((rank, tag)) = other {
            let (name, own) = (self.name(rank), self.name(0));
            let at = watch::place(&state.peers[rank]);
            let why = format!(
                "{name} calls `{}`{at}, but {own} calls `{}`",
                Call::text(tag),
                Call::text(call as u8)
            );
            return Err(self.give_up(state, why));
        }
        drop(state);
        let whole = combine(parts).and_then(|whole| match whole.len() {
            0..=LONGEST => Ok(whole),
            n => Err(format!("the ranks send {n} bytes at once, at most {LONGEST} are possible")),
        });
        match whole {
            Ok(whole) => {
                self.send_all(&Frame::new(Kind::Whole, call as u8, whole.clone()));
                Ok(whole)
            }
            Err(why) => Err(self.give_up(self.lock(), why)),
        }
    }

    fn follow(&self, call: Call, mine: Vec<u8>) -> Result<Vec<u8>> {
        let mut state = self.lock();
        self.usable(&state)?;
        if call == Call::Sum {
            state.peers[self.rank].advance();
        }
        self.send(0, &Frame::new(Kind::Part, call as u8, mine));
        loop {
            if let Some(whole) = state.whole.take() {
                return Ok(whole);
            }
            self.usable(&state)?;
            if state.peers[0].standing == Standing::Left {
                let why = self.missed(0, self.rank, &state);
                return Err(self.give_up(state, why));
            }
            state = self.wait(state);
        }
    }

    fn missed(&self, left: usize, by: usize, state: &State) -> String {
        let at = watch::place(&state.peers[by]);
        format!("{} has left the others, but {} waits for it{at}", self.name(left), self.name(by))
    }

    /// Ends the group with a sentence about all ranks.
    fn give_up<'a>(&'a self, mut state: MutexGuard<'a, State>, sentence: String) -> Error {
        state.hooked = true;
        self.suspect(&mut state, sentence.clone(), Duration::ZERO, true);
        self.settle(state, sentence)
    }

    /// Says that this rank has failed. Returns the error of the group, which may have ended for another reason before.
    pub(super) fn fail(&self, why: &str) -> Error {
        let mut state = self.lock();
        let why = shown(why);
        let sentence =
            format!("{} failed{}: {why}", self.name(self.rank), watch::place(&state.peers[self.rank]));
        if let Err(e) = self.usable(&state) {
            return e;
        }
        state.hooked = true;
        if self.rank > 0 && state.peers[0].standing == Standing::Present {
            // Rank 0 answers with the sentence of the group.
            self.send(0, &Frame::text(Kind::Fail, &why));
        } else {
            self.suspect(&mut state, sentence.clone(), DOUBT, false);
        }
        self.settle(state, sentence)
    }

    /// Waits for the end of the group; if it does not come, ends it for this rank with `sentence`.
    fn settle<'a>(&'a self, mut state: MutexGuard<'a, State>, sentence: String) -> Error {
        let deadline = Instant::now() + FAREWELL;
        while state.failure.is_none() && !state.ended {
            state = match self.wait_until(state, deadline) {
                Some(state) => state,
                None => {
                    let mut state = self.lock();
                    self.conclude(&mut state, sentence.clone());
                    state
                }
            };
        }
        Error::Rank(state.failure.clone().unwrap_or(sentence))
    }

    /// Leaves the group.
    pub(super) fn leave(&self) {
        let mut state = self.lock();
        if state.ended || state.failure.is_some() {
            return;
        }
        state.ended = true;
        drop(state);
        self.farewell(&Frame::text(Kind::Leave, ""), FAREWELL);
        self.close();
    }

    /// The group is dropped: a rank that has not left has ended without a word.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.ended = true;
        state.hook = None;
        for socket in state.data.iter().chain(self.links.iter().flatten().map(|l| &l.socket)) {
            // Fails if the other side has closed it.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.alarm.notify_all();
        self.changed.notify_all();
    }

    /// Sends last words to all, and waits until they have taken note of them or are gone.
    fn farewell(&self, frame: &Frame, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.send_all(frame);
        let mut state = self.lock();
        let open = |state: &State| {
            (0..self.links.len()).any(|r| self.links[r].is_some() && !state.peers[r].acknowledged)
        };
        while open(&state) {
            match self.wait_until(state, deadline) {
                Some(next) => state = next,
                None => return,
            }
        }
    }

    /// Ends the group after `doubt`, unless there is a better reason by then.
    fn suspect(&self, state: &mut State, sentence: String, doubt: Duration, certain: bool) {
        if state.ended || state.failure.is_some() || state.conveying {
            return;
        }
        if state.verdict.as_ref().is_none_or(|v| certain && !v.certain) {
            state.verdict = Some(Verdict { sentence, due: Instant::now() + doubt, certain });
            self.alarm.notify_all();
        }
    }

    /// The group has ended for this rank.
    fn conclude(&self, state: &mut State, sentence: String) {
        if state.failure.is_none() {
            state.failure = Some(sentence);
        }
        for socket in &state.data {
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.changed.notify_all();
        self.alarm.notify_all();
    }

    /// The watch: ends the group when it has to, and calls the hook.
    fn watch(&self) {
        let tick = self.tick();
        let mut looked = Instant::now();
        let mut awake = looked;
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            // Whoever was stopped for long has not heard the others meanwhile.
            if now.saturating_duration_since(looked) > self.stall / 2 {
                awake = now;
            }
            looked = now;
            let mut wait = tick;
            if let Some(failure) = &state.failure {
                let failure = failure.clone();
                if let (false, Some(hook)) = (state.hooked, state.hook.take()) {
                    state.hooked = true;
                    drop(state);
                    hook(&failure);
                    state = self.lock();
                    continue;
                }
            } else {
                if state.verdict.is_none() {
                    self.judge(&mut state, awake, now);
                }
                match state.verdict.take_if(|v| v.due <= now) {
                    Some(verdict) => {
                        state = self.convey(state, verdict.sentence);
                        continue;
                    }
                    None => {
                        wait = state.verdict.as_ref().map_or(tick, |v| v.due.duration_since(now).min(tick))
                    }
                }
            }
            state = self.alarm.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn judge(&self, state: &mut State, awake: Instant, now: Instant) {
        let heard = |link: &Option<Link>| {
            let at = Duration::from_millis(link.as_ref()?.heard.load(Ordering::Relaxed));
            Some((self.start + at).max(awake))
        };
        let heard: Vec<_> = self.links.iter().map(heard).collect();
        let trouble = watch::silent(&state.peers, &heard, now, self.stall).or_else(|| {
            // Only rank 0 knows how far all are.
            let since = state.turned.max(awake);
            if self.rank == 0 { watch::stuck(&state.peers, since, now, self.stall) } else { None }
        });
        if let Some(trouble) = trouble {
            let sentence = watch::sentence(&trouble, &state.peers, &self.hosts, self.stall);
            self.suspect(state, sentence, Duration::ZERO, true);
        }
    }

    /// Ends the group: tells the others before the calls of this rank return, since the program may end with them.
    fn convey<'a>(&'a self, mut state: MutexGuard<'a, State>, sentence: String) -> MutexGuard<'a, State> {
        state.conveying = true;
        if self.rank == 0 {
            drop(state);
            self.farewell(&Frame::text(Kind::Fail, &sentence), Duration::from_secs(1));
            state = self.lock();
        }
        self.conclude(&mut state, sentence);
        state
    }

    /// Reads a connection to its end.
    fn hear(&self, rank: usize, socket: TcpStream) {
        let Some(Some(link)) = self.links.get(rank) else { return };
        link.heard.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
        let mut from = BufReader::new(Heard { socket, control: self, link });
        loop {
            match Frame::read(&mut from, LONGEST) {
                Ok(frame) => self.take(rank, frame),
                Err(e) => return self.lost(rank, &e),
            }
        }
    }

    fn take(&self, rank: usize, frame: Frame) {
        let mut state = self.lock();
        let peer = &mut state.peers[rank];
        match frame.kind {
            Kind::Pulse => return,
            Kind::State => {
                let phase = if frame.tag == Phase::Busy as u8 { Phase::Busy } else { Phase::Training };
                peer.enter(phase, frame.as_text());
                return;
            }
            Kind::Part => {
                if frame.tag == Call::Sum as u8 {
                    peer.advance();
                }
                peer.part = Some((frame.tag, Arc::unwrap_or_clone(frame.body)));
            }
            Kind::Whole => state.whole = Some(Arc::unwrap_or_clone(frame.body)),
            Kind::Bye => peer.acknowledged = true,
            Kind::Leave => {
                peer.standing = Standing::Left;
                self.send(rank, &Frame::text(Kind::Bye, ""));
            }
            Kind::Fail => {
                peer.standing = Standing::Gone;
                self.send(rank, &Frame::text(Kind::Bye, ""));
                let text = frame.as_text();
                if rank == 0 {
                    self.suspect(&mut state, text, Duration::ZERO, true);
                } else {
                    let sentence =
                        format!("{} failed{}: {text}", self.name(rank), watch::place(&state.peers[rank]));
                    self.suspect(&mut state, sentence, DOUBT, false);
                }
            }
            Kind::Hello | Kind::Welcome | Kind::Refused => {
                let sentence = format!("{} sent what no rank sends at this point", self.name(rank));
                self.suspect(&mut state, sentence, Duration::ZERO, false);
            }
        }
        self.changed.notify_all();
    }

    /// A connection has ended.
    fn lost(&self, rank: usize, error: &std::io::Error) {
        let mut state = self.lock();
        let peer = &mut state.peers[rank];
        peer.acknowledged = true;
        if peer.standing == Standing::Present {
            peer.standing = Standing::Gone;
            let how = match error.kind() {
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
                    String::new()
                }
                _ => format!(" ({error})"),
            };
            let at = watch::place(&state.peers[rank]);
            let sentence = format!("{} ended without a word{at}{how}", self.name(rank));
            self.suspect(&mut state, sentence, Duration::ZERO, true);
        }
        self.changed.notify_all();
    }
}

/// The calls of all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Call {
    Gather,
    Broadcast,
    Sum,
    Agree,
}

impl Call {
    fn text(tag: u8) -> &'static str {
        let all = ["gather", "broadcast", "sum", "agree"];
        all.get(usize::from(tag)).copied().unwrap_or("an unknown function")
    }
}

/// A socket that notes when bytes come.
struct Heard<'a> {
    socket: TcpStream,
    control: &'a Control,
    link: &'a Link,
}

impl Read for Heard<'_> {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        let n = self.socket.read(to)?;
        self.link.heard.store(self.control.start.elapsed().as_millis() as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// Writes frames to a connection, and signs of life between them.
fn tell(mut socket: TcpStream, frames: &Receiver<Frame>, pulse: Duration) {
    loop {
        let frame = match frames.recv_timeout(pulse) {
            Ok(frame) => frame,
            Err(RecvTimeoutError::Timeout) => Frame::text(Kind::Pulse, ""),
            Err(RecvTimeoutError::Disconnected) => return,
        };
        // The reader of this connection sees its end too, and reports it.
        if frame.write(&mut socket).is_err() {
            return;
        }
    }
}
