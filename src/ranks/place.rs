//! Which of the ranks this process is.

use std::time::Duration;

use crate::error::{Error, Result};

/// The place of this process among the ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This rank, from 0.
    pub rank: usize,
    /// Number of ranks, at least 1.
    pub ranks: usize,
    /// This rank among those of its host, from 0: the number of its GPU.
    pub local: usize,
    /// Host and port at which rank 0 listens.
    pub address: String,
    /// Time without progress after which a rank counts as lost.
    pub stall: Duration,
}

/// The variables of one launcher.
struct Launcher {
    rank: &'static str,
    ranks: &'static str,
    local: &'static str,
}

const TORCHRUN: Launcher = Launcher { rank: "RANK", ranks: "WORLD_SIZE", local: "LOCAL_RANK" };
const OPEN_MPI: Launcher = Launcher {
    rank: "OMPI_COMM_WORLD_RANK",
    ranks: "OMPI_COMM_WORLD_SIZE",
    local: "OMPI_COMM_WORLD_LOCAL_RANK",
};
const PMI: Launcher = Launcher { rank: "PMI_RANK", ranks: "PMI_SIZE", local: "MPI_LOCALRANKID" };

impl Place {
    /// Maximum number of ranks.
    pub const MOST: usize = 4096;

    /// The place that the environment names; `None` if it names none, or only one rank. `stall` becomes [`Place::stall`].
    /// Understands the variables of torchrun, of Slurm's `srun` and of MPI, in this order. Variables that are there in part
    /// or contradict each other are errors. Rank 0 listens at `MASTER_PORT`, except under torchrun, which listens there itself
    /// (`TORCHELASTIC_USE_AGENT_STORE`): at the port after it, or before it for 65535.
    pub fn from_env(stall: Duration) -> Result<Option<Self>> {
        Self::from_vars(stall, |name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    /// As [`Place::from_env`], with the values that `get` returns.
    pub(super) fn from_vars(stall: Duration, get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let vars = Vars(&|name| get(name).map(|v| v.trim().to_string()).filter(|v| !v.is_empty()));
        if vars.has(TORCHRUN.rank) || vars.has(TORCHRUN.ranks) {
            return vars.launched(&TORCHRUN, stall);
        }
        if let Some(slurm) = vars.slurm() {
            return vars.place(&slurm, stall, |vars| vars.slurm_address());
        }
        for mpi in [OPEN_MPI, PMI] {
            if vars.has(mpi.rank) || vars.has(mpi.ranks) {
                return vars.launched(&mpi, stall);
            }
        }
        Ok(None)
    }
}

/// Variables of the environment; empty ones count as absent.
struct Vars<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Vars<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn launched(&self, of: &Launcher, stall: Duration) -> Result<Option<Place>> {
        self.place(of, stall, |vars| {
            let (host, port) = (vars.need("MASTER_ADDR", "the host of rank 0", of)?, vars.free_port(of)?);
            Ok(joined(&host, port))
        })
    }

    /// The port of `MASTER_PORT`, or the one beside it if torchrun itself listens there.
    fn free_port(&self, of: &Launcher) -> Result<u16> {
        let port = self.port(of)?;
        let taken = self.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|v| v.eq_ignore_ascii_case("true"));
        Ok(match port {
            _ if !taken => port,
            u16::MAX => port - 1,
            _ => port + 1,
        })
    }

    /// The place of a launcher's variables; the address is only asked for if there is more than one rank.
    fn place(
        &self,
        of: &Launcher,
        stall: Duration,
        address: impl Fn(&Self) -> Result<String>,
    ) -> Result<Option<Place>> {
        let ranks = self.number(of.ranks, "the number of ranks", of)?;
        if ranks == 0 || ranks > Place::MOST {
            return Err(wrong(of.ranks, ranks, format!("1 to {}", Place::MOST)));
        }
        if ranks == 1 && !self.has(of.rank) {
            return Ok(None);
        }
        let rank = self.number(of.rank, "this rank", of)?;
        if rank >= ranks {
            return Err(wrong(of.rank, rank, format!("a number below `{}`, which is {ranks}", of.ranks)));
        }
        if ranks == 1 {
            return Ok(None);
        }
        let local = self.number(of.local, "this rank among those of its host", of)?;
        if local > rank {
            return Err(wrong(of.local, local, format!("at most `{}`, which is {rank}", of.rank)));
        }
        Ok(Some(Place { rank, ranks, local, address: address(self)?, stall }))
    }

    /// The variables under `srun`. A program that is started in a job without it is a single rank, although the number of
    /// tasks and rank 0 are in its environment: only the variables of a step tell the difference.
    fn slurm(&self) -> Option<Launcher> {
        let in_step = self.has("SLURM_STEP_ID") || self.has("SLURM_STEPID");
        let ranks = match self.has("SLURM_STEP_NUM_TASKS") {
            true => "SLURM_STEP_NUM_TASKS",
            false if in_step && self.has("SLURM_NTASKS") => "SLURM_NTASKS",
            false => return None,
        };
        Some(Launcher { rank: "SLURM_PROCID", ranks, local: "SLURM_LOCALID" })
    }

    fn slurm_address(&self) -> Result<String> {
        let host = match self.get("MASTER_ADDR") {
            Some(host) => host,
            None => self.first_node()?,
        };
        let port = match self.has("MASTER_PORT") {
            true => self.port(&TORCHRUN)?,
            false => self.slurm_port()?,
        };
        Ok(joined(&host, port))
    }

    fn first_node(&self) -> Result<String> {
        let lists = ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"];
        let Some((name, list)) = lists.into_iter().find_map(|n| Some((n, self.get(n)?))) else {
            let what = "the environment has neither `MASTER_ADDR` nor `SLURM_STEP_NODELIST`, which name the host of \
                        rank 0; start with srun, or set `MASTER_ADDR`";
            return Err(Error::Rank(what.into()));
        };
        let want = "a list of hosts such as `node[01-04]`; or set `MASTER_ADDR`";
        first_host(&list).ok_or_else(|| wrong(name, list, want))
    }

    /// A port below those that systems give to outgoing connections, another one for every job and step.
    fn slurm_port(&self) -> Result<u16> {
        let id = |name: &str, want: &str| match self.get(name) {
            None => Ok(None),
            Some(v) => v.parse::<u64>().map(Some).map_err(|_| wrong(name, &v, want)),
        };
        let want = "the number of the job; or set `MASTER_PORT`";
        let job = match id("SLURM_JOB_ID", want)? {
            Some(job) => job,
            None => {
                id("SLURM_JOBID", want)?.ok_or_else(|| missing("SLURM_JOB_ID", "the job", "MASTER_PORT"))?
            }
        };
        let step = id("SLURM_STEP_ID", "the number of the step; or set `MASTER_PORT`")?.unwrap_or(0);
        Ok(15000 + (job % 15000 + step % 15000 * 101) as u16 % 15000)
    }

    fn port(&self, of: &Launcher) -> Result<u16> {
        let name = "MASTER_PORT";
        let port = self.need(name, "the port of rank 0", of)?;
        port.parse().ok().filter(|p| *p > 0).ok_or_else(|| wrong(name, &port, "a port, 1 to 65535"))
    }

    fn number(&self, name: &str, what: &str, of: &Launcher) -> Result<usize> {
        let value = self.need(name, what, of)?;
        value.parse().map_err(|_| wrong(name, &value, format!("{what}, a number")))
    }

    fn need(&self, name: &str, what: &str, of: &Launcher) -> Result<String> {
        // Names a variable that is there, which says whose variables these are.
        let there = if name == of.rank { of.ranks } else { of.rank };
        self.get(name).ok_or_else(|| missing(name, what, there))
    }
}

fn wrong(name: &str, got: impl ToString, want: impl ToString) -> Error {
    let (got, want) = (got.to_string(), want.to_string());
    Error::Rank(format!("the environment variable `{name}` is {got}, wanted {want}"))
}

fn missing(name: &str, what: &str, there: &str) -> Error {
    Error::Rank(format!(
        "the environment variable `{name}` is not set, wanted {what}; set it, or unset `{there}` to train with one rank"
    ))
}

/// Host and port as one text.
fn joined(host: &str, port: u16) -> String {
    match host.contains(':') && !host.starts_with('[') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

/// The first host of Slurm's lists: `a`, `a,b`, `node[03-05,7]`, `n[1-2]c[0-3]`.
fn first_host(list: &str) -> Option<String> {
    let mut host = String::new();
    let mut rest = list;
    loop {
        let end = rest.find(['[', ',']).unwrap_or(rest.len());
        host.push_str(&rest[..end]);
        let Some(inner) = rest[end..].strip_prefix('[') else { break };
        let (numbers, after) = inner.split_once(']')?;
        let first = numbers.split([',', '-']).next().filter(|n| !n.is_empty())?;
        host.push_str(first);
        rest = after;
    }
    let is_name = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    (!host.is_empty() && host.chars().all(is_name)).then_some(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(vars: &[(&str, &str)]) -> Result<Option<Place>> {
        let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Place::from_vars(Duration::from_secs(60), get)
    }

    fn found(vars: &[(&str, &str)]) -> Option<(usize, usize, usize, String)> {
        place(vars).unwrap().map(|p| (p.rank, p.ranks, p.local, p.address))
    }

    const TORCH: [(&str, &str); 5] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "node01"),
        ("MASTER_PORT", "29500"),
    ];

    const SLURM: [(&str, &str); 7] = [
        ("SLURM_PROCID", "3"),
        ("SLURM_NTASKS", "16"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_STEP_NODELIST", "gpu[07-08]"),
        ("SLURM_JOB_ID", "1234567"),
        ("SLURM_STEP_ID", "2"),
    ];

    #[test]
    fn launchers() {
        assert_eq!(found(&[]), None);
        assert_eq!(found(&TORCH), Some((5, 8, 1, "node01:29500".into())));
        assert_eq!(found(&SLURM), Some((3, 4, 1, "gpu07:19769".into())));
        let both = [&SLURM[..], &TORCH[..]].concat();
        assert_eq!(found(&both), Some((5, 8, 1, "node01:29500".into())));
        let at = [&SLURM[..], &TORCH[3..]].concat();
        assert_eq!(found(&at), Some((3, 4, 1, "node01:29500".into())));
        let mpi = |rank, ranks, local| {
            found(&[(rank, "1"), (ranks, "2"), (local, "0"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "7")])
        };
        let want = Some((1, 2, 0, "[::1]:7".into()));
        assert_eq!(mpi("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"), want);
        assert_eq!(mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"), want);
    }

    #[test]
    fn torchrun_keeps_its_port() {
        let at = |port: &'static str, store: &'static str| {
            let vars =
                [&TORCH[..4], &[("MASTER_PORT", port), ("TORCHELASTIC_USE_AGENT_STORE", store)]].concat();
            found(&vars).map(|(.., address)| address)
        };
        assert_eq!(at("29500", "True").as_deref(), Some("node01:29501"));
        assert_eq!(at("65535", "True").as_deref(), Some("node01:65534"));
        assert_eq!(at("29500", "False").as_deref(), Some("node01:29500"));
    }

    #[test]
    fn one_rank_needs_nothing_else() {
        assert_eq!(found(&[("WORLD_SIZE", "1"), ("RANK", "0")]), None);
        assert_eq!(found(&[("WORLD_SIZE", "1")]), None);
        assert_eq!(found(&[("RANK", ""), ("WORLD_SIZE", " ")]), None);
        // A script of sbatch or a shell of salloc, without srun.
        assert_eq!(found(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "1")]), None);
        // A shell in a step of one task.
        assert_eq!(
            found(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4"), ("SLURM_STEP_NUM_TASKS", "1")]),
            None
        );
    }

    #[test]
    fn variables_that_are_missing_or_wrong_are_named() {
        let fails = |vars: &[(&str, &str)], parts: &[&str]| {
            let text = place(vars).unwrap_err().to_string();
            parts.iter().for_each(|p| assert!(text.contains(p), "{text}: no `{p}`"));
        };
        for i in 0..5 {
            let mut vars = TORCH.to_vec();
            let (name, _) = vars.remove(i);
            fails(&vars, &[&format!("`{name}` is not set, wanted "), "with one rank"]);
        }
        let with = |name: &str, value: &'static str| {
            TORCH.map(|(n, v)| if n == name { (n, value) } else { (n, v) }).to_vec()
        };
        fails(&with("RANK", "8"), &["`RANK` is 8, wanted a number below `WORLD_SIZE`, which is 8"]);
        fails(&with("RANK", "-1"), &["`RANK` is -1, wanted this rank, a number"]);
        fails(&with("WORLD_SIZE", "0"), &["`WORLD_SIZE` is 0, wanted 1 to 4096"]);
        fails(&with("LOCAL_RANK", "6"), &["`LOCAL_RANK` is 6, wanted at most `RANK`, which is 5"]);
        fails(&with("MASTER_PORT", "0"), &["`MASTER_PORT` is 0, wanted a port, 1 to 65535"]);
        fails(&with("MASTER_PORT", "99999"), &["`MASTER_PORT` is 99999"]);
        let mut vars = SLURM.to_vec();
        vars[4].1 = "gpu[07-";
        fails(&vars, &["`SLURM_STEP_NODELIST` is gpu[07-, wanted a list of hosts"]);
        vars.truncate(4);
        fails(&vars, &["neither `MASTER_ADDR` nor `SLURM_STEP_NODELIST`"]);
        fails(&SLURM[..5], &["`SLURM_JOB_ID` is not set"]);
        fails(
            &[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")],
            &["OMPI_COMM_WORLD_LOCAL_RANK"],
        );
    }

    #[test]
    fn first_hosts() {
        for (list, want) in [
            ("a", "a"),
            ("a,b", "a"),
            ("node[03-05,7]", "node03"),
            ("n[1-2]c[0-3]", "n1c0"),
            ("n[7]-ib,x", "n7-ib"),
            ("gpu-1.cluster,gpu-2.cluster", "gpu-1.cluster"),
        ] {
            assert_eq!(first_host(list).as_deref(), Some(want), "{list}");
        }
        for list in ["", ",a", "[1-2", "a[", "a[]", "a[-3]", "a b"] {
            assert_eq!(first_host(list), None, "{list}");
        }
    }
}
