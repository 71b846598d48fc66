//! This program, started once per rank.

use std::ffi::OsString;
use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::children::{Rules, Signals, supervise};
use super::request::{LOCAL_RANKS, RANK};
use crate::error::{Error, Result};
use crate::terminal;

/// Where ranks of one machine meet.
const HOST: &str = "127.0.0.1";
/// Time that ranks have to end by themselves after one of them has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// This program with the arguments of its ranks.
pub struct Program {
    path: PathBuf,
    args: Vec<OsString>,
    rules: Rules,
    silent: bool,
}

impl Program {
    /// This program with the arguments that it was started with; if it `saves`, its ranks end by themselves after a signal.
    pub fn this(saves: bool) -> Result<Self> {
        let path = std::env::current_exe().map_err(Error::io("this program"))?;
        let (args, rules) = (std::env::args_os().skip(1).collect(), Rules { saves, patience: PATIENCE });
        Ok(Program { path, args, rules, silent: false })
    }

    /// The same without the argument `flag`, and without standard output.
    pub fn silent(mut self, flag: &str) -> Self {
        self.args.retain(|arg| arg != flag);
        self.silent = true;
        self
    }

    /// Starts it as each of `ranks` ranks of this machine, with `more` arguments, and waits for all. Returns the exit
    /// status, as [`supervise`].
    pub fn launch(&self, ranks: usize, more: &[OsString], signals: &Signals) -> Result<u8> {
        let port = free_port()?;
        let command = |rank: usize| {
            let mut command = Command::new(&self.path);
            command.args(&self.args).args(more);
            for (name, value) in place(rank, ranks, port) {
                command.env(name, value);
            }
            // It would send the ranks to another port.
            command.env_remove("TORCHELASTIC_USE_AGENT_STORE");
            if self.silent {
                command.stdout(Stdio::null());
            }
            command
        };
        tracing::info!("starting {ranks} {}", if ranks == 1 { "rank" } else { "ranks" });
        supervise(ranks, command, signals, self.rules, terminal::complain)
    }
}

/// The variables that tell a process its place, those of torchrun.
fn place(rank: usize, ranks: usize, port: u16) -> [(&'static str, String); 6] {
    [
        (RANK, rank.to_string()),
        ("WORLD_SIZE", ranks.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        (LOCAL_RANKS, ranks.to_string()),
        ("MASTER_ADDR", HOST.into()),
        ("MASTER_PORT", port.to_string()),
    ]
}

/// A port that nobody listens at. It is not one that the system gives to those who ask for any, so that no other program gets
/// it before rank 0 listens there.
fn free_port() -> Result<u16> {
    const FIRST: u16 = 15_000;
    const PORTS: u64 = 15_000;
    const TRIES: u64 = 100;
    let start = RandomState::new().hash_one(std::process::id()) % PORTS;
    let mut ports = (0..TRIES).map(|i| FIRST + ((start + i) % PORTS) as u16);
    let free = |port: &u16| TcpListener::bind((HOST, *port)).is_ok();
    let taken = || {
        Error::Rank(format!("ranks cannot meet: {TRIES} ports of {HOST} are taken; end what listens there"))
    };
    ports.find(free).ok_or_else(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_get_the_variables_of_torchrun() {
        let all = place(2, 4, 77);
        let text: Vec<String> = all.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let want = "RANK=2 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=77";
        assert_eq!(text.join(" "), want);
    }

    #[test]
    fn ports_are_none_that_systems_give_away() {
        for _ in 0..20 {
            let port = free_port().expect("a port");
            assert!((15_000..30_000).contains(&port));
        }
    }

    #[test]
    fn a_flag_is_left_out_wherever_it_stands() {
        let mut program = Program::this(false).expect("a program");
        program.args = ["speed", "--scaling", "--gpus", "all"].map(OsString::from).to_vec();
        assert_eq!(program.silent("--scaling").args, ["speed", "--gpus", "all"]);
    }
}
