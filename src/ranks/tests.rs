//! Ranks as threads over the loopback device.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::wire::{self, Frame, Kind};
use super::{Group, Phase, Place};
use crate::error::Result;

const LONG: Duration = Duration::from_secs(60);
/// Short, but longer than a loaded machine keeps a thread waiting.
const SHORT: Duration = Duration::from_millis(800);

/// Runs `f` on each of `n` ranks.
fn ranks<T: Send>(n: usize, stall: Duration, f: impl Fn(Arc<Group>) -> T + Sync) -> Vec<T> {
    let groups = Group::in_process(n, stall).unwrap();
    std::thread::scope(|s| {
        let threads: Vec<_> = groups.into_iter().map(|g| s.spawn(|| f(g))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn place(rank: usize, ranks: usize, listener: &TcpListener) -> Place {
    let address = listener.local_addr().unwrap().to_string();
    Place { rank, ranks, local: rank, address, stall: LONG }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

/// Fails unless the sentence has all parts.
fn says(got: &Result<impl Sized>, parts: &[&str]) {
    let text = match got {
        Ok(_) => panic!("succeeded, wanted {parts:?}"),
        Err(e) => e.to_string(),
    };
    parts.iter().for_each(|part| assert!(text.contains(part), "{text}: no `{part}`"));
}

#[test]
fn a_group_of_one_is_the_identity() {
    let g = Group::alone();
    assert_eq!(g.gather(b"a").unwrap(), [b"a"]);
    assert_eq!(g.broadcast(b"b").unwrap(), b"b");
    assert_eq!(g.sum(&[3]).unwrap(), [3]);
    g.agree("it", "x").unwrap();
    g.exchange(&[b""], &mut [&mut []]).unwrap();
    g.enter(Phase::Training, "step 1");
    g.fail("nothing");
    g.leave();
    assert_eq!((g.rank(), g.ranks(), g.leads(), g.failure(), g.host(0)), (0, 1, true, None, "this host"));
}

#[test]
fn calls_of_all_ranks() {
    for n in [2, 3, 5] {
        let ok = ranks(n, LONG, |g| -> Result<()> {
            for step in 0..20u64 {
                let mine = vec![g.rank() as u8; g.rank() * 50_000];
                let want: Vec<Vec<u8>> = (0..n).map(|r| vec![r as u8; r * 50_000]).collect();
                assert!(g.gather(&mine)? == want);
                assert_eq!(g.broadcast(&[7 + g.rank() as u8, step as u8])?, [7, step as u8]);
                let total = (n * (n - 1) / 2) as u64;
                assert_eq!(
                    g.sum(&[g.rank() as u64, step, u64::MAX])?,
                    [total, step * n as u64, 0u64.wrapping_sub(n as u64)]
                );
                assert!(g.sum(&[])?.is_empty());
                g.agree("the step", &step.to_string())?;
            }
            assert!((0..n).all(|r| g.host(r) == g.host(0) && !g.host(r).is_empty()));
            g.leave();
            Ok(())
        });
        ok.into_iter().for_each(|r| r.unwrap());
    }
}

#[test]
fn disagreement_is_shown_to_all_and_ends_nothing() {
    for done in ranks(3, LONG, |g| {
        let rate = if g.rank() == 2 { "2e-4" } else { "1e-4" };
        let got = g.agree("the configuration", &format!("seed = 1\n  train.lr = {rate}\nx = 2"));
        let shorter = g.agree("the list", if g.rank() == 1 { "a" } else { "a\nb" });
        let after = g.sum(&[1]);
        g.leave();
        (got, shorter, after, g.failure())
    }) {
        says(&done.0, &["the configuration of rank 2 on host ", " differs from that of rank 0 on host "]);
        says(&done.0, &[": `train.lr = 2e-4`, there `train.lr = 1e-4`"]);
        says(&done.1, &["the list of rank 1 on host ", ": nothing, there `b`"]);
        assert_eq!((done.2.unwrap(), done.3), (vec![3], None));
    }
}

#[test]
fn a_rank_that_is_dropped_has_ended_without_a_word() {
    for who in [0, 2] {
        let all = std::sync::Barrier::new(3);
        let errors = ranks(3, LONG, |g| {
            g.enter(Phase::Training, "stage semantic, step 12");
            g.sum(&[1]).unwrap();
            all.wait();
            if g.rank() == who { None } else { Some((g.sum(&[1]), g.gather(b"later"), g.failure())) }
        });
        for (waiting, later, failure) in errors.into_iter().flatten() {
            says(
                &waiting,
                &[&format!("rank {who} on host "), " ended without a word at stage semantic, step 12"],
            );
            says(&later, &["ended without a word"]);
            assert_eq!(failure, Some(waiting.unwrap_err().to_string()));
        }
    }
}

#[test]
fn a_rank_that_fails_says_why() {
    for who in [0, 1] {
        let errors = ranks(3, LONG, |g| {
            g.enter(Phase::Training, "stage semantic, step 12");
            g.sum(&[1]).unwrap();
            if g.rank() == who {
                g.fail("out of memory\non cuda:1");
                (Ok(vec![]), g.failure())
            } else {
                (g.sum(&[1]), g.failure())
            }
        });
        let want = " failed at stage semantic, step 12: out of memory on cuda:1";
        for (rank, (waiting, failure)) in errors.into_iter().enumerate() {
            let failure = failure.unwrap();
            assert!(
                failure.starts_with(&format!("rank {who} on host ")) && failure.ends_with(want),
                "{failure}"
            );
            if rank != who {
                says(&waiting, &[&failure]);
            }
        }
    }
}

#[test]
fn a_rank_that_fails_because_another_has_ended_is_not_blamed() {
    let errors = ranks(3, LONG, |g| {
        g.sum(&[1]).unwrap();
        match g.rank() {
            1 => {
                g.fail("the collective was aborted");
                g.failure()
            }
            2 => {
                std::thread::sleep(Duration::from_millis(20));
                None
            }
            _ => Some(g.sum(&[1]).unwrap_err().to_string()),
        }
    });
    for text in errors.into_iter().flatten() {
        assert!(text.starts_with("rank 2 ") && text.ends_with(" ended without a word"), "{text}");
    }
}

#[test]
fn ranks_leave_while_others_are_in_their_last_call() {
    for _ in 0..20 {
        let done = ranks(4, LONG, |g| {
            let sum = g.sum(&[1]);
            g.leave();
            (sum, g.failure(), g.sum(&[1]))
        });
        for (sum, failure, after) in done {
            assert_eq!((sum.unwrap(), failure), (vec![4], None));
            says(&after, &["has left the others"]);
        }
    }
}

#[test]
fn a_rank_that_has_left_is_missed_by_a_call() {
    for who in [0, 1] {
        for (rank, got) in ranks(3, LONG, |g| {
            g.sum(&[1]).unwrap();
            if g.rank() == who {
                g.leave();
                std::thread::sleep(Duration::from_millis(100));
                return None;
            }
            Some(g.sum(&[1]))
        })
        .into_iter()
        .enumerate()
        {
            if rank != who {
                says(&got.unwrap(), &[&format!("rank {who} on host "), "has left the others, but rank "]);
            }
        }
    }
}

#[test]
fn different_calls_are_named() {
    for got in ranks(2, LONG, |g| if g.leads() { g.gather(&[]).map(|_| ()) } else { g.sum(&[]).map(|_| ()) })
    {
        says(&got, &["rank 1 on host ", " calls `sum`, but rank 0 on host ", " calls `gather`"]);
    }
    for got in ranks(2, LONG, |g| g.sum(&vec![1; 1 + g.rank()])) {
        says(&got, &["rank 1 on host ", " adds 2 numbers, rank 0 1"]);
    }
}

#[test]
fn a_rank_that_stands_still_is_named_on_all_ranks() {
    for who in [0, 1] {
        let begun = Instant::now();
        let errors = ranks(3, SHORT, |g| {
            let (sender, told) = channel();
            g.on_failure(move |why| drop(sender.send(why.to_string())));
            g.enter(Phase::Training, "stage semantic, step 12");
            g.sum(&[1]).unwrap();
            // Its main thread is stuck; only the hook is called.
            let waiting = if g.rank() == who { None } else { Some(g.sum(&[1])) };
            (waiting, told.recv_timeout(LONG).unwrap())
        });
        assert!(begun.elapsed() < LONG / 2);
        for (waiting, told) in errors {
            let want = " has made no progress for 0.8 s at stage semantic, step 12; ";
            assert!(told.starts_with(&format!("rank {who} on host ")) && told.contains(want), "{told}");
            if let Some(waiting) = waiting {
                says(&waiting, &[&told]);
            }
        }
    }
}

#[test]
fn a_busy_rank_takes_its_time_and_all_may_stand_still() {
    let got = ranks(2, SHORT, |g| {
        g.enter(if g.leads() { Phase::Busy } else { Phase::Training }, "saving");
        if g.leads() {
            std::thread::sleep(SHORT * 2);
        }
        g.sum(&[1]).unwrap();
        g.enter(Phase::Training, "step 3");
        g.gather(&[]).unwrap();
        let (sender, told) = channel();
        g.on_failure(move |why| drop(sender.send(why.to_string())));
        told.recv_timeout(LONG).unwrap()
    });
    got.iter().for_each(|t| assert!(t.starts_with("no rank has made progress for 0.8 s at step 3; "), "{t}"));
}

/// A rank that says hello and then nothing.
fn silent(rank: u64, ranks: u64, to: &TcpListener) -> TcpStream {
    let mut body: Vec<u8> = [rank, ranks, 1].iter().flat_map(|n| n.to_le_bytes()).collect();
    wire::put(&mut body, b"node07");
    let mut stream = TcpStream::connect(to.local_addr().unwrap()).unwrap();
    wire::greet(&mut stream, &Frame::new(Kind::Hello, 0, body)).unwrap();
    stream
}

#[test]
fn a_silent_rank_is_given_up() {
    let listener = listener();
    let stream = silent(1, 2, &listener);
    let place = Place { stall: SHORT, ..place(0, 2, &listener) };
    let group = Group::join_within(place, Some(listener), LONG).unwrap();
    says(&group.sum(&[1]), &["rank 1 on host node07 has given no sign of life for 0.8 s"]);
    drop(stream);
}

#[test]
fn a_silent_rank_0_is_given_up() {
    let listener = listener();
    let place = Place { stall: SHORT, ..place(1, 2, &listener) };
    let lead = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        wire::greeted(&mut stream, 4096).unwrap();
        let mut body = 5u64.to_le_bytes().to_vec();
        for host in ["node01", "node02"] {
            wire::put(&mut body, host.as_bytes());
            wire::put(&mut body, b"127.0.0.1:9");
        }
        wire::greet(&mut stream, &Frame::new(Kind::Welcome, 0, body)).unwrap();
        stream
    });
    let group = Group::join_within(place, None, LONG).unwrap();
    says(&group.sum(&[1]), &["rank 0 on host node01 has given no sign of life for 0.8 s"]);
    drop(lead.join().unwrap());
}

#[test]
fn strangers_do_no_harm() {
    let listener = listener();
    let at = listener.local_addr().unwrap();
    let places = [place(0, 2, &listener), place(1, 2, &listener)];
    let mut http = TcpStream::connect(at).unwrap();
    http.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let _quiet = TcpStream::connect(at).unwrap();
    drop(TcpStream::connect(at).unwrap());
    let mut endless = TcpStream::connect(at).unwrap();
    endless.write_all(&wire::MAGIC).unwrap();
    endless.write_all(&wire::VERSION.to_le_bytes()).unwrap();
    endless.write_all(&[255; 6]).unwrap();
    let [lead, other] = places;
    std::thread::scope(|s| {
        let lead = s.spawn(move || Group::join_within(lead, Some(listener), LONG).unwrap());
        let other = s.spawn(move || Group::join_within(other, None, LONG).unwrap());
        // The stranger's connection is closed.
        http.set_read_timeout(Some(LONG)).unwrap();
        assert!(!matches!(http.read(&mut [0]), Ok(1)));
        let (lead, other) = (lead.join().unwrap(), other.join().unwrap());
        let sum = s.spawn(move || other.sum(&[2]).map(|sum| (sum, other.leave())).unwrap().0);
        assert_eq!(lead.sum(&[1]).unwrap(), [3]);
        assert_eq!(sum.join().unwrap(), [3]);
        lead.leave();
    });
}

/// Two ranks that do not fit together, and the sentence that both get.
fn refused(first: (usize, usize), second: (usize, usize), parts: &[&str]) {
    let listener = listener();
    let places = [(0, 3), first, second].map(|(rank, ranks)| place(rank, ranks, &listener));
    let mut listener = Some(listener);
    let threads = places.map(|place| {
        let listener = listener.take();
        std::thread::spawn(move || Group::join_within(place, listener, LONG))
    });
    let got = threads.map(|t| t.join().unwrap());
    got.iter().for_each(|got| says(got, parts));
}

#[test]
fn ranks_that_do_not_fit_are_refused_on_both_sides() {
    refused((1, 3), (1, 3), &["two processes say that they are rank 1, on host "]);
    refused(
        (1, 3),
        (2, 4),
        &["rank 2 on host ", "was started as one of 4 ranks, rank 0 on host ", " as one of 3; "],
    );
    let listener = listener();
    let (lead, zero) = (place(0, 2, &listener), silent(0, 2, &listener));
    says(&Group::join_within(lead, Some(listener), LONG), &["two processes say that they are rank 0"]);
    drop(zero);
}

#[test]
fn another_version_is_refused() {
    let listener = listener();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.write_all(&wire::MAGIC).unwrap();
    stream.write_all(&77u32.to_le_bytes()).unwrap();
    let lead = place(0, 2, &listener);
    says(
        &Group::join_within(lead, Some(listener), LONG),
        &["speaks version 77 of the protocol", "version 1;"],
    );
    let (_, answer) = wire::greeted(&mut stream, 4096).unwrap().unwrap();
    assert!(answer.unwrap().as_text().contains("the same build"));
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let short = Duration::from_millis(200);
    let free = listener();
    let (lead, other) = (place(0, 3, &free), place(1, 3, &free));
    let (lead, other) = std::thread::scope(|s| {
        let lead = s.spawn(move || Group::join_within(lead, Some(free), short));
        let other = s.spawn(move || Group::join_within(other, None, LONG));
        (lead.join().unwrap(), other.join().unwrap())
    });
    for got in [lead.map(|_| ()), other.map(|_| ())] {
        says(&got, &["of 3 ranks came to 127.0.0.1:", "in time, without ranks ", "2; "]);
    }
    let nobody = listener();
    let place = place(1, 2, &nobody);
    drop(nobody);
    says(
        &Group::join_within(place, None, short),
        &["rank 1 cannot join rank 0 at 127.0.0.1:", "; see whether rank 0 runs"],
    );
    let bad = Place { rank: 1, ranks: 2, local: 0, address: "node01".into(), stall: LONG };
    says(
        &Group::join_within(bad, None, short),
        &["the address of rank 0 is `node01`, wanted a host and a port"],
    );
}

#[test]
fn exchange_of_any_sizes() {
    // Different sizes in both directions, some larger than all buffers of a connection.
    let size = |from: usize, to: usize, round: usize| match round {
        0 => 0,
        1 => from * 7 + to,
        2 => 4096,
        _ => from * 3_000_000 + to * 100_001,
    };
    for n in [2, 3, 4] {
        let done = ranks(n, LONG, |g| -> Result<()> {
            let me = g.rank();
            for round in [0, 1, 2, 3, 1] {
                let send: Vec<Vec<u8>> =
                    (0..n).map(|to| vec![(me * 16 + to) as u8; size(me, to, round)]).collect();
                let mut receive: Vec<Vec<u8>> = (0..n).map(|from| vec![0; size(from, me, round)]).collect();
                let send: Vec<&[u8]> = send.iter().map(|s| &s[..]).collect();
                g.exchange(&send, &mut receive.iter_mut().map(|r| &mut r[..]).collect::<Vec<_>>())?;
                for from in (0..n).filter(|r| *r != me) {
                    assert!(receive[from].iter().all(|b| *b == (from * 16 + me) as u8), "{from} to {me}");
                }
            }
            g.leave();
            Ok(())
        });
        done.into_iter().for_each(|r| r.unwrap());
    }
}

#[test]
fn many_ranks() {
    let done = ranks(16, LONG, |g| -> Result<u64> {
        let n = g.ranks();
        let mut receive = vec![[0; 1]; n];
        let mine = [g.rank() as u8];
        g.exchange(&vec![&mine[..]; n], &mut receive.iter_mut().map(|r| &mut r[..]).collect::<Vec<_>>())?;
        receive[g.rank()] = mine;
        let sum = g.sum(&[receive.iter().map(|r| u64::from(r[0])).sum()])?;
        g.leave();
        Ok(sum[0])
    });
    done.into_iter().for_each(|sum| assert_eq!(sum.unwrap(), 16 * 120));
}

#[test]
fn an_exchange_ends_with_the_group() {
    for big in [false, true] {
        let errors = ranks(3, LONG, |g| {
            g.enter(Phase::Training, "step 5");
            let bytes = vec![1; if big { 20_000_000 } else { 10 }];
            let mut receive = vec![bytes.clone(); 3];
            let mut exchange = || {
                g.exchange(&[&bytes[..]; 3], &mut receive.iter_mut().map(|r| &mut r[..]).collect::<Vec<_>>())
            };
            exchange().unwrap();
            // No rank is dropped before all have exchanged.
            g.gather(&[]).unwrap();
            if g.rank() == 1 { None } else { Some(exchange()) }
        });
        for got in errors.into_iter().flatten() {
            says(&got, &["rank 1 on host ", " ended without a word at step 5"]);
        }
    }
}
