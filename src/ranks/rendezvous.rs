//! How the ranks find each other: rank 0 listens, all others connect and say who they are.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::Place;
use super::door::{Door, Guest};
use super::wire::{self, Fields, Frame, Kind, LONGEST_HELLO, VERSION};
use crate::error::{Error, Result};

/// Time for which rank 0 tells those who come why there is no group.
const LINGER: Duration = Duration::from_millis(500);

/// The connections of a rank, and what it knows of the others.
pub(super) struct Joined {
    /// Rank 0: a connection to every other rank. Others: one to rank 0.
    pub(super) control: Vec<Option<TcpStream>>,
    /// The hosts of all ranks.
    pub(super) hosts: Vec<String>,
    /// Where the listeners of all ranks are reached from here.
    pub(super) data: Vec<SocketAddr>,
    /// The listener of this rank for data.
    pub(super) listener: TcpListener,
    /// A number that only the ranks of this run know.
    pub(super) token: u64,
}

/// A rank as it introduces itself.
struct Hello {
    rank: usize,
    ranks: usize,
    host: String,
    /// Port of its listener for data.
    port: u16,
}

impl Hello {
    fn encode(&self) -> Frame {
        let mut body = Vec::new();
        [self.rank, self.ranks, self.port as usize]
            .iter()
            .for_each(|n| body.extend((*n as u64).to_le_bytes()));
        wire::put(&mut body, self.host.as_bytes());
        Frame::new(Kind::Hello, 0, body)
    }

    fn decode(frame: &Frame) -> Option<Self> {
        let mut fields = Fields(&frame.body);
        let (rank, ranks) = (fields.number()?.try_into().ok()?, fields.number()?.try_into().ok()?);
        let (port, host) = (fields.number()?.try_into().ok()?, fields.text()?);
        (frame.kind == Kind::Hello).then_some(Hello { rank, ranks, host, port })
    }
}

/// Meets the other ranks of `place`, for at most `patience`. Rank 0 listens at its address, or on `listener`.
pub(super) fn meet(place: &Place, listener: Option<TcpListener>, patience: Duration) -> Result<Joined> {
    let deadline = Instant::now() + patience;
    let data = bind(&place.address, 0)
        .map_err(|e| Error::Rank(format!("rank {} cannot listen for data: {e}", place.rank)))?;
    if place.rank > 0 {
        return follow(place, data, deadline);
    }
    let listener = match listener {
        Some(listener) => listener,
        None => bind(&place.address, split(&place.address)?.1).map_err(|e| {
            let (at, free) =
                (&place.address, "end the program that uses it, or choose another `MASTER_PORT`");
            Error::Rank(format!("rank 0 cannot listen at {at}: {e}; {free}"))
        })?,
    };
    lead(place, listener, data, deadline)
}

/// Host and port of an address.
fn split(address: &str) -> Result<(&str, u16)> {
    let bad = || {
        Error::Rank(format!("the address of rank 0 is `{address}`, wanted a host and a port: `node01:29500`"))
    };
    let (host, port) = address.rsplit_once(':').ok_or_else(bad)?;
    let port = port.parse().map_err(|_| bad())?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() { Err(bad()) } else { Ok((host, port)) }
}

/// Listens at a port of this host; only for this host if the address of rank 0 says so.
fn bind(address: &str, port: u16) -> std::io::Result<TcpListener> {
    let host = split(address).map_or("", |(host, _)| host);
    match host.parse::<IpAddr>() {
        Ok(ip) if ip.is_loopback() => TcpListener::bind((ip, port)),
        _ if host == "localhost" => TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
        // Accepts IPv4 too, except where the system has no IPv6.
        _ => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
    }
}

/// The name of this host for messages.
fn host_name() -> String {
    let read = |path| std::fs::read_to_string(path).ok().map(|s| s.trim().to_string());
    let found = ["/proc/sys/kernel/hostname", "/etc/hostname"].into_iter().find_map(read);
    found
        .filter(|name| !name.is_empty())
        .map_or("this host".into(), |n| wire::shown(&n).chars().take(255).collect())
}

/// Rank 0.
struct Lead {
    ranks: usize,
    control: Vec<Option<TcpStream>>,
    hosts: Vec<Option<String>>,
    data: Vec<SocketAddr>,
}

fn lead(place: &Place, listener: TcpListener, data: TcpListener, deadline: Instant) -> Result<Joined> {
    let io = |e| Error::Rank(format!("rank 0 cannot listen at {}: {e}", place.address));
    let own = data.local_addr().map_err(io)?;
    let door = Door::open(listener).map_err(io)?;
    let mut lead = Lead {
        ranks: place.ranks,
        control: (0..place.ranks).map(|_| None).collect(),
        hosts: vec![None; place.ranks],
        data: vec![own; place.ranks],
    };
    lead.hosts[0] = Some(host_name());
    while lead.hosts.contains(&None) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(lead.refuse(&door, None, lead.absent(&place.address)));
        }
        if let Some(mut guest) = door.next(left)
            && let Err(why) = lead.admit(&mut guest)
        {
            return Err(lead.refuse(&door, Some(guest), why));
        }
    }
    lead.welcome(data)
}

impl Lead {
    /// Takes in a rank, or says why not.
    fn admit(&mut self, guest: &mut Guest) -> std::result::Result<(), String> {
        let own = self.hosts[0].as_deref().unwrap_or_default();
        let from =
            guest.stream.peer_addr().map_err(|e| format!("a rank was lost while it connected: {e}"))?;
        let Some(frame) = &guest.frame else {
            return Err(format!(
                "a rank at {} speaks version {} of the protocol between ranks, rank 0 on host {own} version {VERSION}; start \
                 the same build of ett everywhere",
                from.ip(),
                guest.version
            ));
        };
        let Some(hello) = Hello::decode(frame) else {
            return Err(format!(
                "a rank at {} introduced itself with something else than its rank",
                from.ip()
            ));
        };
        let Hello { rank, ranks, host, port } = hello;
        if ranks != self.ranks {
            return Err(format!(
                "rank {rank} on host {host} was started as one of {ranks} ranks, rank 0 on host {own} as one of {}; start all \
                 with the same number of ranks",
                self.ranks
            ));
        }
        if rank >= ranks {
            return Err(format!(
                "a process on host {host} says that it is rank {rank}, wanted 1 to {}",
                ranks - 1
            ));
        }
        if let Some(other) = &self.hosts[rank] {
            return Err(format!(
                "two processes say that they are rank {rank}, on host {other} and on host {host}; give each a rank of its own"
            ));
        }
        let stream =
            guest.stream.try_clone().map_err(|e| format!("rank {rank} on host {host} was lost: {e}"))?;
        self.control[rank] = Some(stream);
        self.hosts[rank] = Some(host);
        self.data[rank] = SocketAddr::new(from.ip().to_canonical(), port);
        Ok(())
    }

    fn absent(&self, address: &str) -> String {
        let missing: Vec<String> = (0..self.ranks)
            .filter(|r| self.hosts[*r].is_none())
            .take(8)
            .map(|rank| rank.to_string())
            .collect();
        let came = self.hosts.iter().flatten().count();
        format!(
            "only {came} of {} ranks came to {address} in time, without ranks {}; see their logs, and whether their hosts reach \
             this address",
            self.ranks,
            missing.join(", ")
        )
    }

    /// Tells everybody why the group does not come about, also those who come a moment later.
    fn refuse(&self, door: &Door, guest: Option<Guest>, why: String) -> Error {
        let tell = |mut stream: &TcpStream| {
            // Whoever is gone needs no reason.
            let _ = wire::greet(&mut stream, &Frame::text(Kind::Refused, &why));
        };
        self.control.iter().flatten().for_each(tell);
        let mut told = self.control.iter().flatten().count() + usize::from(guest.is_some());
        guest.iter().for_each(|g| tell(&g.stream));
        let deadline = Instant::now() + LINGER;
        while told + 1 < self.ranks {
            let Some(guest) = door.next(deadline.saturating_duration_since(Instant::now())) else { break };
            tell(&guest.stream);
            told += 1;
        }
        Error::Rank(why)
    }

    fn welcome(self, listener: TcpListener) -> Result<Joined> {
        let mut state = RandomState::new().build_hasher();
        state.write_u32(std::process::id());
        let token = state.finish();
        let hosts: Vec<String> = self.hosts.into_iter().flatten().collect();
        let mut body = token.to_le_bytes().to_vec();
        for (host, at) in hosts.iter().zip(&self.data) {
            wire::put(&mut body, host.as_bytes());
            wire::put(&mut body, at.to_string().as_bytes());
        }
        let frame = Frame::new(Kind::Welcome, 0, body);
        for mut stream in self.control.iter().flatten() {
            // A rank that is gone by now is noticed by the watch.
            let _ = wire::greet(&mut stream, &frame);
        }
        Ok(Joined { control: self.control, hosts, data: self.data, listener, token })
    }
}

/// Any other rank.
fn follow(place: &Place, listener: TcpListener, deadline: Instant) -> Result<Joined> {
    let Place { rank, ranks, ref address, .. } = *place;
    let lost = |what: String| Error::Rank(format!("rank {rank} cannot join rank 0 at {address}: {what}"));
    let port = listener.local_addr().map_err(|e| lost(e.to_string()))?.port();
    let mut stream = connect(address, deadline).map_err(lost)?;
    let hello = Hello { rank, ranks, host: host_name(), port };
    // As long as rank 0 may wait for others, and a bit: it says then who is missing.
    let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(5);
    let answer = stream
        .set_read_timeout(Some(left))
        .and_then(|()| wire::greet(&mut stream, &hello.encode()))
        .and_then(|()| wire::greeted(&mut stream, LONGEST_HELLO.saturating_mul(ranks)));
    let frame = match answer {
        Ok(Some((_, Some(frame)))) => frame,
        Ok(Some((version, None))) => {
            let what = format!(
                "it speaks version {version} of the protocol between ranks, this rank version {VERSION}"
            );
            return Err(lost(format!("{what}; start the same build of ett everywhere")));
        }
        Ok(None) => return Err(lost("another program listens there; choose another `MASTER_PORT`".into())),
        Err(e) => {
            let what = "it ended before all ranks were there, or another program listens at this address";
            return Err(lost(format!("{what} ({e}); see the log of rank 0")));
        }
    };
    if frame.kind == Kind::Refused {
        return Err(Error::Rank(frame.as_text()));
    }
    let unclear = || lost("its answer makes no sense; start the same build of ett everywhere".into());
    let at = stream.peer_addr().map_err(|e| lost(e.to_string()))?.ip();
    let (token, hosts, data) = decode_welcome(&frame, ranks, at).ok_or_else(unclear)?;
    stream.set_read_timeout(None).map_err(|e| lost(e.to_string()))?;
    let mut control: Vec<_> = (0..ranks).map(|_| None).collect();
    control[0] = Some(stream);
    Ok(Joined { control, hosts, data, listener, token })
}

/// Token, hosts and addresses of all ranks. `at` is where rank 0 is reached from here.
fn decode_welcome(frame: &Frame, ranks: usize, at: IpAddr) -> Option<(u64, Vec<String>, Vec<SocketAddr>)> {
    let mut fields = Fields(&frame.body);
    let token = fields.number()?;
    let (mut hosts, mut data) = (Vec::new(), Vec::new());
    for rank in 0..ranks {
        hosts.push(fields.text()?);
        let mut address: SocketAddr = fields.text()?.parse().ok()?;
        // Rank 0 does not know its own address, and ranks of its host may have come over the loopback device.
        if rank == 0 || address.ip().to_canonical().is_loopback() {
            address.set_ip(at);
        }
        data.push(address);
    }
    (frame.kind == Kind::Welcome).then_some((token, hosts, data))
}

/// Connects to rank 0, again and again until it is there.
fn connect(address: &str, deadline: Instant) -> std::result::Result<TcpStream, String> {
    let place = split(address).map_err(|e| e.to_string())?;
    let mut wait = Duration::from_millis(10);
    loop {
        let why = match place.to_socket_addrs() {
            Ok(addresses) => {
                let mut why = "its name has no address".to_string();
                for at in addresses {
                    match connect_once(&at) {
                        Ok(stream) => return Ok(stream),
                        Err(e) => why = e.to_string(),
                    }
                }
                why
            }
            Err(e) => e.to_string(),
        };
        if Instant::now() + wait > deadline {
            return Err(format!("{why}; see whether rank 0 runs, and whether this host reaches its address"));
        }
        std::thread::sleep(wait);
        wait = (wait * 2).min(Duration::from_millis(500));
    }
}

/// One attempt to connect.
pub(super) fn connect_once(at: &SocketAddr) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(at, Duration::from_secs(10))?;
    stream.set_nodelay(true)?;
    // A connection to a free port of this host can meet itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(std::io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}
