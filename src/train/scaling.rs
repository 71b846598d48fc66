//! How the speed of a configuration grows with the number of ranks.

use std::fmt::Write;
use std::path::Path;

use serde_json::Value;

use super::Speed;
use crate::error::{Error, Result};
use crate::report::Profiles;

/// The numbers of ranks to measure, up to `all`: 1, 2, 4 and so on, and all.
pub fn rank_counts(all: usize) -> Vec<usize> {
    let mut counts: Vec<usize> =
        std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|&n| n < all).collect();
    counts.push(all);
    counts
}

/// Reads the speeds that [`write_speeds`](super::write_speeds) has written.
pub fn read_speeds(path: &Path) -> Result<Vec<Speed>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let bad = |what: String| Error::data(path, format!("the speeds cannot be read ({what})"));
    let all: Vec<Value> = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    all.iter().map(|one| read(one).ok_or_else(|| bad(format!("{one} lacks a value")))).collect()
}

/// A speed from JSON, where numbers that are not finite are `null`.
fn read(one: &Value) -> Option<Speed> {
    let number = |key: &str| one[key].as_f64().unwrap_or(f64::NAN);
    let text = |key: &str| one[key].as_str().map(String::from);
    let count = |key: &str| one[key].as_u64().and_then(|n| usize::try_from(n).ok());
    Some(Speed {
        op: text("op")?,
        shape: text("shape")?,
        median_us: number("median_us"),
        images_per_s: number("images_per_s"),
        batch: count("batch")?,
        ranks: count("ranks")?,
        scaling: number("scaling"),
        tflop_per_image: number("tflop_per_image"),
        tflop_per_s: number("tflop_per_s"),
        peak_gib: number("peak_gib"),
        plan_gib: number("plan_gib"),
        waited_ms: number("waited_ms"),
        graph: one["graph"].as_bool()?,
        communication_ms: one["communication_ms"].as_f64(),
        hidden: one["hidden"].as_f64(),
        peer_images_per_s: one["peer_images_per_s"].as_f64(),
        profiles: Profiles::default(),
    })
}

/// The speeds of all stages with several numbers of ranks, of which the first is one, with [`Speed::ranks`] and
/// [`Speed::scaling`], stage by stage.
pub fn scaled(measured: Vec<(usize, Vec<Speed>)>) -> Vec<Speed> {
    let base: Vec<(f64, f64)> = measured
        .first()
        .map_or(vec![], |(_, one)| one.iter().map(|s| (s.images_per_s, s.median_us)).collect());
    let mut all: Vec<(usize, Speed)> = Vec::new();
    for (ranks, speeds) in measured {
        for (stage, (speed, (images_per_s, median_us))) in speeds.into_iter().zip(&base).enumerate() {
            let scaling = speed.images_per_s / (ranks as f64 * images_per_s);
            let longer = (speed.median_us - median_us).max(0.0) / 1e3;
            let hidden = speed.communication_ms.map(|alone| (1.0 - longer / alone).max(0.0));
            all.push((stage, Speed { ranks, scaling, hidden, ..speed }));
        }
    }
    all.sort_by_key(|(stage, _)| *stage);
    all.into_iter().map(|(_, speed)| speed).collect()
}

/// The speeds of several numbers of ranks as a table.
pub fn scaling_table(all: &[Speed]) -> String {
    let mut out = format!(
        "  {:<16} {:>5} {:>6} {:>10} {:>9} {:>9} {:>9} {:>8} {:>9} {:>9}\n",
        "step", "ranks", "batch", "images/s", "ms", "scaling", "comm., ms", "hidden", "peak GiB", "data, ms"
    );
    for s in all {
        let scaling = format!("{:.1} %", 100.0 * s.scaling);
        let alone = s.communication_ms.map_or(String::new(), |ms| format!("{ms:.2}"));
        let hidden = s.hidden.map_or(String::new(), |part| format!("{:.0} %", 100.0 * part));
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "  {:<16} {:>5} {:>6} {:>10.2} {:>9.2} {scaling:>9} {alone:>9} {hidden:>8} {:>9.2} {:>9.2}",
            s.op,
            s.ranks,
            s.batch,
            s.images_per_s,
            s.median_us / 1e3,
            s.peak_gib,
            s.waited_ms
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::write_speeds;

    fn speed(op: &str, images_per_s: f64) -> Speed {
        Speed {
            op: op.into(),
            shape: "batch 4 of 32x32, f32".into(),
            median_us: 1e6 * 4.0 / images_per_s,
            images_per_s,
            batch: 4,
            ranks: 1,
            scaling: 1.0,
            tflop_per_image: f64::NAN,
            tflop_per_s: f64::NAN,
            peak_gib: 1.5,
            plan_gib: f64::NAN,
            waited_ms: 0.0,
            graph: true,
            communication_ms: None,
            hidden: None,
            peer_images_per_s: None,
            profiles: Profiles::default(),
        }
    }

    #[test]
    fn ranks_double_up_to_all() {
        let of = |all| rank_counts(all);
        assert_eq!((of(1), of(2), of(3)), (vec![1], vec![1, 2], vec![1, 2, 3]));
        assert_eq!((of(4), of(6), of(8)), (vec![1, 2, 4], vec![1, 2, 4, 6], vec![1, 2, 4, 8]));
    }

    #[test]
    fn scaling_is_the_share_of_as_many_single_ranks() {
        let all = scaled(vec![
            (1, vec![speed("step:align", 10.0), speed("step:semantic", 5.0)]),
            (
                2,
                vec![
                    speed("step:align", 20.0),
                    // 1000 ms for 8 pictures instead of 800 for 4.
                    Speed { median_us: 1e6, communication_ms: Some(800.0), ..speed("step:semantic", 8.0) },
                ],
            ),
        ]);
        let got: Vec<_> = all.iter().map(|s| (&*s.op, s.ranks, s.scaling)).collect();
        let want = [
            ("step:align", 1, 1.0),
            ("step:align", 2, 1.0),
            ("step:semantic", 1, 1.0),
            ("step:semantic", 2, 0.8),
        ];
        assert_eq!(got, want);
        assert!(all[1].hidden.is_none() && all[3].hidden.is_some_and(|part| (part - 0.75).abs() < 1e-12));
        let table = scaling_table(&all);
        assert!(table.lines().count() == 5 && table.contains(" 80.0 %"), "{table}");
    }

    #[test]
    fn speeds_are_read_as_they_were_written() {
        let path = std::env::temp_dir().join(format!("ett-speeds-{}.json", std::process::id()));
        let all = [speed("step:align", 10.0), speed("step:semantic", 5.0)];
        write_speeds(&all, &path).expect("a file");
        let read = read_speeds(&path).expect("speeds");
        assert_eq!(format!("{read:?}"), format!("{all:?}"));
        std::fs::write(&path, "[{\"op\": \"step:align\"}]").expect("a file");
        assert!(read_speeds(&path).expect_err("bad").to_string().contains("lacks a value"));
        std::fs::remove_file(&path).expect("its end");
    }
}
