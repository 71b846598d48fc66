//! What a command line asks for: the ranks to start, and the device of each.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::ranks::Place;

/// The variables by which a process knows that another one has started it as a rank.
pub(super) const RANK: &str = "RANK";
/// Number of ranks of this machine.
pub(super) const LOCAL_RANKS: &str = "LOCAL_WORLD_SIZE";

/// The GPUs that `--gpus` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpus {
    /// All that there are.
    All,
    /// Those with these numbers, each once.
    These(Vec<usize>),
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "all" {
            return Ok(Gpus::All);
        }
        let mut numbers = Vec::new();
        for part in text.split(',') {
            let number = part
                .trim()
                .parse()
                .map_err(|_| format!("{part:?} is not a number; give all, or numbers such as 0,2,3"))?;
            if numbers.contains(&number) {
                return Err(format!("GPU {number} is named twice; a rank has a GPU of its own"));
            }
            numbers.push(number);
        }
        Ok(Gpus::These(numbers))
    }
}

impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Gpus::All => f.write_str("all"),
            Gpus::These(numbers) => {
                let numbers: Vec<String> = numbers.iter().map(usize::to_string).collect();
                f.write_str(&numbers.join(","))
            }
        }
    }
}

impl Gpus {
    /// Their numbers on a machine with GPUs 0 to `there` - 1; at least one.
    fn numbers(&self, there: usize) -> Result<Vec<usize>> {
        let want = match there {
            0 => "left out on this machine, which has no GPU".into(),
            1 => "GPU 0, the only one here".into(),
            n => format!("some of the GPUs 0 to {}, which are here", n - 1),
        };
        match self {
            Gpus::All if there > 0 => Ok((0..there).collect()),
            Gpus::These(numbers) if numbers.iter().all(|&n| n < there) => Ok(numbers.clone()),
            _ => Err(Error::config("--gpus", self, want)),
        }
    }
}

/// What a process is in a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Alone,
    /// One of its ranks, which another program has started.
    Rank(Place),
    /// The launcher of this many ranks, at least 2.
    Launcher(usize),
}

/// What a command line says about devices and ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// The GPUs of the ranks, in their order.
    pub gpus: Option<Gpus>,
    /// Number of ranks on this machine.
    pub ranks: Option<usize>,
}

impl Request {
    /// Numbers of ranks on one machine.
    pub const RANKS: RangeInclusive<u64> = 1..=1024;

    /// The part of this process, which has the `place` of its environment. `there` counts the GPUs of this machine.
    pub fn part(&self, place: Option<Place>, there: impl Fn() -> Result<usize>) -> Result<Part> {
        if let Some(place) = place {
            return Ok(Part::Rank(place));
        }
        if launched() {
            return Ok(Part::Alone);
        }
        Ok(match self.asked(there)? {
            1 => Part::Alone,
            n => Part::Launcher(n),
        })
    }

    /// Number of ranks to start.
    fn asked(&self, there: impl Fn() -> Result<usize>) -> Result<usize> {
        match (&self.gpus, self.ranks) {
            (Some(gpus), ranks) => first(ranks, gpus.numbers(there()?)?.len()),
            (None, None | Some(1)) => Ok(1),
            (None, Some(n)) if self.device == "cpu" => Ok(n),
            (None, Some(n)) => {
                let want = "with --gpus, for ranks on GPUs, or with --device cpu";
                Err(Error::config("--ranks", format!("{n} with --device {}", self.device), want))
            }
        }
    }

    /// The device and the number of ranks to plan for. Neither has to be here, except for `--gpus all`, whose GPUs `there`
    /// counts.
    pub fn planned(&self, there: impl Fn() -> Result<usize>) -> Result<(String, usize)> {
        let numbers = match &self.gpus {
            None => return Ok((self.device.clone(), self.ranks.unwrap_or(1))),
            Some(all @ Gpus::All) => all.numbers(there()?)?,
            Some(Gpus::These(numbers)) => numbers.clone(),
        };
        let ranks = first(self.ranks, numbers.len())?;
        Ok((numbers.first().map_or("cuda".into(), |n| format!("cuda:{n}")), ranks))
    }

    /// The name of the device of rank `local` of this machine, or of a process alone (`None`): `auto`, `cpu`, `cuda` or
    /// `cuda:N`. A rank that sees a single GPU uses it, since Slurm shows each task only its own.
    pub fn device(&self, local: Option<usize>, there: impl Fn() -> Result<usize>) -> Result<String> {
        let any = matches!(&*self.device, "auto" | "cuda");
        let numbers = match (&self.gpus, local) {
            (Some(gpus), _) => gpus.numbers(there()?)?,
            (None, Some(_)) if any => Gpus::All.numbers(there()?)?,
            _ => return Ok(self.device.clone()),
        };
        let all = !matches!(self.gpus, Some(Gpus::These(_)));
        let number = match (&numbers[..], local.unwrap_or(0)) {
            ([one], _) if all => Some(one),
            (many, local) => many.get(local),
        };
        number.map(|n| format!("cuda:{n}")).ok_or_else(|| {
            let got = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            let wanted = local.unwrap_or(0) + 1;
            Error::device(
                "cuda",
                format!("there is only GPU {got} for {wanted} or more ranks of this machine; start fewer"),
            )
        })
    }
}

/// The number of ranks on `there` GPUs: `ranks` of them, or all.
fn first(ranks: Option<usize>, there: usize) -> Result<usize> {
    match ranks {
        Some(n) if n > there => {
            Err(Error::config("--ranks", n, format!("at most {there}, the GPUs of --gpus")))
        }
        n => Ok(n.unwrap_or(there)),
    }
}

/// True if another program has started this process as a rank, even as the only one.
pub(super) fn launched() -> bool {
    std::env::var_os(RANK).is_some()
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// The CPU threads of this process: `train.threads`, or if that is 0 its part of the cores, which ranks of one launcher or
/// torchrun share. Slurm and MPI give each rank cores of its own.
pub fn threads(asked: usize) -> usize {
    share(asked, std::env::var(LOCAL_RANKS).ok().and_then(|n| n.parse().ok()).unwrap_or(1))
}

fn share(asked: usize, ranks: usize) -> usize {
    match (asked, ranks) {
        (0, 2..) => (cores() / ranks).max(1),
        (asked, _) => asked,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn request(device: &str, gpus: Option<&str>, ranks: Option<usize>) -> Request {
        Request { device: device.into(), gpus: gpus.map(|g| g.parse().expect("GPUs")), ranks }
    }

    fn there(n: usize) -> impl Fn() -> Result<usize> {
        move || Ok(n)
    }

    fn none() -> Result<usize> {
        Err(Error::device("cuda", "no driver"))
    }

    fn said<T: fmt::Debug>(result: Result<T>) -> String {
        result.expect_err("refused").to_string()
    }

    #[test]
    fn lists_of_gpus_are_all_or_distinct_numbers() {
        assert_eq!("all".parse(), Ok(Gpus::All));
        assert_eq!("3".parse(), Ok(Gpus::These(vec![3])));
        assert_eq!("2, 0".parse(), Ok(Gpus::These(vec![2, 0])));
        for (text, what) in [
            ("", "\"\" is not a number"),
            ("0,", "\"\" is not a number"),
            ("cuda", "\"cuda\" is not a number; give all"),
            ("-1", "\"-1\" is not a number"),
            ("0,1,0", "GPU 0 is named twice"),
            ("0-3", "\"0-3\" is not a number"),
            ("99999999999999999999999", "is not a number"),
        ] {
            let e = text.parse::<Gpus>().expect_err(text);
            assert!(e.contains(what), "{text}: {e}");
        }
    }

    #[test]
    fn ranks_are_the_gpus_that_are_named() {
        for (gpus, ranks, n, want) in
            [("all", None, 4, 4), ("all", Some(3), 4, 3), ("0,3", None, 4, 2), ("1,2,3", Some(2), 4, 2)]
        {
            assert_eq!(request("auto", Some(gpus), ranks).asked(there(n)).expect("ranks"), want);
        }
        for (gpus, ranks, n, what) in [
            ("all", None, 0, "`--gpus` is all, wanted left out on this machine, which has no GPU"),
            ("0,4", None, 4, "`--gpus` is 0,4, wanted some of the GPUs 0 to 3, which are here"),
            ("1", None, 1, "wanted GPU 0, the only one here"),
            ("0,1", Some(3), 4, "`--ranks` is 3, wanted at most 2, the GPUs of --gpus"),
        ] {
            let e = said(request("auto", Some(gpus), ranks).asked(there(n)));
            assert!(e.contains(what), "{e}");
        }
        assert!(said(request("auto", Some("all"), None).asked(none)).contains("no driver"));
    }

    #[test]
    fn ranks_without_gpus_are_of_the_cpu() {
        assert_eq!(request("cpu", None, Some(3)).asked(none).expect("ranks"), 3);
        assert_eq!(request("auto", None, None).asked(none).expect("one"), 1);
        for device in ["auto", "cuda", "cuda:1"] {
            assert_eq!(request(device, None, Some(1)).asked(none).expect("one"), 1);
            let e = said(request(device, None, Some(2)).asked(none));
            assert!(e.contains(&format!("`--ranks` is 2 with --device {device}, wanted with --gpus")), "{e}");
        }
    }

    #[test]
    fn a_rank_has_the_gpu_of_its_number() {
        let of = |r: Request, local, n| r.device(local, there(n));
        assert_eq!(of(request("auto", None, None), Some(2), 4).expect("a GPU"), "cuda:2");
        assert_eq!(of(request("cuda", None, None), Some(2), 4).expect("a GPU"), "cuda:2");
        assert_eq!(of(request("auto", Some("1,3"), None), Some(1), 4).expect("a GPU"), "cuda:3");
        assert_eq!(of(request("auto", Some("1,3"), None), None, 4).expect("a GPU"), "cuda:1");
        // Those that are given by name, and processes without ranks.
        assert_eq!(request("cuda:1", None, None).device(Some(0), none).expect("a name"), "cuda:1");
        assert_eq!(request("cpu", None, None).device(Some(5), none).expect("a name"), "cpu");
        assert_eq!(request("auto", None, None).device(None, none).expect("a name"), "auto");
        // Each task of Slurm sees its own GPU only.
        assert_eq!(of(request("auto", None, None), Some(5), 1).expect("a GPU"), "cuda:0");
        assert_eq!(of(request("auto", Some("all"), None), Some(5), 1).expect("a GPU"), "cuda:0");
        for (gpus, local, n) in [(None, 4, 4), (Some("0,2"), 2, 4), (Some("0"), 1, 1)] {
            let e = said(of(request("auto", gpus, None), Some(local), n));
            assert!(e.contains(&format!("for {} or more ranks of this machine", local + 1)), "{e}");
        }
        assert!(said(request("auto", None, None).device(Some(0), none)).contains("no driver"));
    }

    #[test]
    fn plans_need_no_gpu() {
        let of = |gpus, ranks| request("cuda", gpus, ranks).planned(none);
        assert_eq!(of(None, None).expect("a plan"), ("cuda".into(), 1));
        assert_eq!(of(None, Some(64)).expect("a plan"), ("cuda".into(), 64));
        assert_eq!(of(Some("2,3"), None).expect("a plan"), ("cuda:2".into(), 2));
        assert!(said(of(Some("all"), None)).contains("no driver"));
        assert!(said(of(Some("0"), Some(2))).contains("`--ranks` is 2"));
    }

    #[test]
    fn a_place_in_the_environment_makes_a_rank() {
        let stall = Duration::from_secs(1);
        let place = Place { rank: 1, ranks: 2, local: 1, address: "a:1".into(), stall };
        let r = request("auto", Some("all"), Some(2));
        assert_eq!(r.part(Some(place.clone()), none).expect("a part"), Part::Rank(place));
        assert_eq!(r.part(None, there(3)).expect("a part"), Part::Launcher(2));
        assert_eq!(request("auto", Some("0"), None).part(None, there(3)).expect("a part"), Part::Alone);
        assert_eq!(request("auto", None, None).part(None, none).expect("a part"), Part::Alone);
    }

    #[test]
    fn ranks_of_a_machine_share_its_cores() {
        assert_eq!((share(0, 1), share(7, 4)), (0, 7));
        assert_eq!(share(0, 2), (cores() / 2).max(1));
        assert_eq!(share(0, 100_000), 1);
    }
}
