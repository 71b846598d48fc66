//! What a rank knows of the others, and when it gives them up.

use std::time::{Duration, Instant};

use super::Phase;

/// Whether a rank still takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    Present,
    /// It has left, and is not missed.
    Left,
    /// It has said that it failed, or its connection has ended.
    Gone,
}

/// What is known of a rank.
pub(super) struct Peer {
    /// Calls of `sum` that it has entered.
    pub(super) count: u64,
    pub(super) phase: Phase,
    /// Its place in the run, as it said.
    pub(super) at: String,
    /// When count, phase or place last changed.
    pub(super) moved: Instant,
    pub(super) standing: Standing,
    /// Whether it has taken note of our last words, or cannot any more.
    pub(super) acknowledged: bool,
    /// Its part of the present call, which is named by a tag.
    pub(super) part: Option<(u8, Vec<u8>)>,
}

impl Peer {
    pub(super) fn new() -> Self {
        Peer {
            count: 0,
            phase: Phase::Busy,
            at: String::new(),
            moved: Instant::now(),
            standing: Standing::Present,
            acknowledged: false,
            part: None,
        }
    }

    pub(super) fn advance(&mut self) {
        self.count += 1;
        self.moved = Instant::now();
    }

    pub(super) fn enter(&mut self, phase: Phase, at: String) {
        (self.phase, self.at, self.moved) = (phase, at, Instant::now());
    }
}

/// Why the group is given up.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// A rank gives no signs of life.
    Silent(usize),
    /// These ranks keep the others waiting.
    Behind(Vec<usize>),
    /// Nobody moves.
    All,
}

/// Whether a rank has been silent for `stall`. `heard` is when each rank was last heard, `None` for those without a connection.
pub(super) fn silent(
    peers: &[Peer],
    heard: &[Option<Instant>],
    now: Instant,
    stall: Duration,
) -> Option<Trouble> {
    let late = |i: &usize| {
        peers[*i].standing == Standing::Present
            && heard[*i].is_some_and(|heard| now.saturating_duration_since(heard) > stall)
    };
    (0..peers.len()).find(late).map(Trouble::Silent)
}

/// Whether nothing has moved for `stall` since `since`, and because of whom: the ranks that have entered the fewest sums keep
/// the others waiting. If one of them is busy, it may take any time.
pub(super) fn stuck(peers: &[Peer], since: Instant, now: Instant, stall: Duration) -> Option<Trouble> {
    let present: Vec<usize> = (0..peers.len()).filter(|i| peers[*i].standing == Standing::Present).collect();
    let lowest = present.iter().map(|i| peers[*i].count).min()?;
    let behind: Vec<usize> = present.iter().copied().filter(|i| peers[*i].count == lowest).collect();
    let stands = |i: &usize| {
        let moved = peers[*i].moved.max(since);
        peers[*i].phase == Phase::Training && now.saturating_duration_since(moved) > stall
    };
    if !behind.iter().all(stands) {
        return None;
    }
    Some(if behind.len() == present.len() { Trouble::All } else { Trouble::Behind(behind) })
}

/// The sentence about it.
pub(super) fn sentence(trouble: &Trouble, peers: &[Peer], hosts: &[String], stall: Duration) -> String {
    let remedy = "if a step may take longer, raise `train.stall_s`";
    let time = duration(stall);
    match trouble {
        Trouble::Silent(rank) => format!(
            "{} has given no sign of life for {time}{}; it was stopped, or its host or the network is down",
            name(*rank, hosts),
            place(&peers[*rank]),
        ),
        Trouble::Behind(ranks) => {
            let more = ranks.len().saturating_sub(3);
            let mut named: Vec<String> = ranks.iter().take(3).map(|r| name(*r, hosts)).collect();
            if more > 0 {
                named.push(format!("{more} more"));
            }
            let have = if ranks.len() == 1 { "has" } else { "have" };
            let at = ranks.first().map_or(String::new(), |r| place(&peers[*r]));
            format!("{} {have} made no progress for {time}{at}; {remedy}", named.join(" and "))
        }
        Trouble::All => {
            let first = peers.iter().find(|p| p.standing == Standing::Present);
            let at = first.map_or(String::new(), place);
            format!("no rank has made progress for {time}{at}; {remedy}")
        }
    }
}

/// A rank in a sentence.
pub(super) fn name(rank: usize, hosts: &[String]) -> String {
    format!("rank {rank} on host {}", hosts.get(rank).map_or("unknown", String::as_str))
}

/// A rank's place in the run at the end of a sentence.
pub(super) fn place(peer: &Peer) -> String {
    if peer.at.is_empty() { String::new() } else { format!(" at {}", peer.at) }
}

fn duration(time: Duration) -> String {
    match time.subsec_nanos() {
        0 => format!("{} s", time.as_secs()),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(60);

    /// Ranks with a count, a phase and the age of their last move in seconds.
    fn peers(now: Instant, of: &[(u64, Phase, u64)]) -> Vec<Peer> {
        let peer = |&(count, phase, age): &(u64, Phase, u64)| {
            let moved = now - Duration::from_secs(age);
            Peer { count, phase, at: format!("step {count}"), moved, ..Peer::new() }
        };
        of.iter().map(peer).collect()
    }

    #[test]
    fn those_behind_are_blamed_unless_they_are_busy() {
        use Phase::{Busy, Training};
        let now = Instant::now() + Duration::from_secs(1000);
        let long_ago = now - Duration::from_secs(500);
        let judge = |of: &[(u64, Phase, u64)]| stuck(&peers(now, of), long_ago, now, STALL);
        assert_eq!(
            judge(&[(5, Training, 70), (4, Training, 90), (5, Training, 70)]),
            Some(Trouble::Behind(vec![1]))
        );
        assert_eq!(judge(&[(5, Training, 70), (4, Busy, 90), (4, Training, 90)]), None);
        assert_eq!(judge(&[(5, Busy, 70), (4, Training, 90)]), Some(Trouble::Behind(vec![1])));
        assert_eq!(judge(&[(5, Training, 70), (5, Training, 90)]), Some(Trouble::All));
        assert_eq!(judge(&[(5, Training, 10), (5, Training, 90)]), None);
        assert_eq!(judge(&[(5, Training, 70), (4, Training, 10)]), None);
        // The sum that all were waiting for is a few seconds old.
        let late = peers(now, &[(6, Training, 1), (5, Training, 90)]);
        assert_eq!(stuck(&late, now - Duration::from_secs(5), now, STALL), None);
        let mut left = peers(now, &[(5, Training, 1), (4, Training, 500)]);
        left[1].standing = Standing::Left;
        assert_eq!(stuck(&left, long_ago, now, STALL), None);
    }

    #[test]
    fn sentences_name_rank_host_and_step() {
        let now = Instant::now() + Duration::from_secs(1000);
        let hosts: Vec<String> = ["a", "b", "c", "d", "e"].map(String::from).into();
        let all = peers(now, &[(4, Phase::Training, 0); 5]);
        let say = |trouble| sentence(&trouble, &all, &hosts, STALL);
        let heard = [None, Some(now), Some(now - STALL * 2)];
        assert_eq!(silent(&all[..3], &heard, now, STALL), Some(Trouble::Silent(2)));
        assert!(
            say(Trouble::Silent(2))
                .starts_with("rank 2 on host c has given no sign of life for 60 s at step 4; ")
        );
        let behind = say(Trouble::Behind(vec![1]));
        assert!(behind.starts_with("rank 1 on host b has made no progress for 60 s at step 4; "), "{behind}");
        assert!(behind.contains("`train.stall_s`"));
        let many = say(Trouble::Behind(vec![0, 1, 2, 3]));
        assert!(many.contains("rank 2 on host c and 1 more have made"), "{many}");
        assert!(say(Trouble::All).starts_with("no rank has made progress for 60 s at step 4; "));
    }
}
