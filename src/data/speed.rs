//! How fast the pictures of a source are decoded and brought to the training size.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use super::cache::{LoadOptions, Skipped};
use super::fit::Fitted;
use super::source::Listed;
use crate::error::{Error, Result};
use crate::rng::Philox;

/// How often the memory is looked at.
const STEPS: usize = 10;

/// What [`speed`] has measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Speed {
    /// Pictures that were decoded and fitted.
    pub pictures: usize,
    /// Pictures that could not be used, with the reasons.
    pub skipped: Skipped,
    /// Time for all of them.
    pub seconds: f64,
    /// Usable pictures per second, of all threads together.
    pub per_second: f64,
    /// Bytes of their files per second, if each of the pictures is a file of its own.
    pub bytes_per_second: Option<f64>,
    /// Largest resident memory of the process since its start, in bytes; known on Linux only.
    pub peak: Option<u64>,
    /// Resident memory in bytes after a number of pictures, the first one being 0, in ten steps; empty where it is not
    /// known.
    pub resident: Vec<(usize, u64)>,
}

impl Speed {
    /// The results as lines of text.
    pub fn text(&self) -> String {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let mut lines = vec![format!(
            "{} pictures in {:.2} s: {:.1} pictures/s",
            self.pictures, self.seconds, self.per_second
        )];
        if let Some(rate) = self.bytes_per_second {
            lines.push(format!("read: {}/s", mib(rate as u64)));
        }
        if !self.resident.is_empty() {
            let steps = self.resident.iter().map(|(n, bytes)| format!("{} after {n}", mib(*bytes)));
            lines.push(format!("memory: {}", steps.collect::<Vec<_>>().join(", ")));
        }
        lines.extend(self.peak.map(|bytes| format!("peak memory: {}", mib(bytes))));
        if self.skipped.count > 0 {
            lines.push(format!("{} pictures cannot be used: {}", self.skipped.count, self.skipped.names()));
        }
        lines.join("\n") + "\n"
    }
}

/// What a thread tells about a sample.
struct Done {
    sample: usize,
    bytes: Option<u64>,
    error: Option<Error>,
}

/// Decodes and fits the first `most` pictures of a source, on `threads` threads of its own, and keeps none of them.
/// `progress` is told how many are done, usable or not.
///
/// # Errors
///
/// If there are no pictures, or if `threads` is 0. A picture that cannot be used is counted and no error.
pub fn speed(
    listed: &Listed,
    options: &LoadOptions,
    threads: usize,
    most: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Speed> {
    let pictured = (0..listed.samples.len()).filter(|&i| listed.samples[i].has_picture());
    let samples: Vec<usize> = pictured.take(most).collect();
    if threads == 0 {
        return Err(Error::arg("speed", "threads", 0, "at least 1"));
    }
    if samples.is_empty() {
        return Err(Error::data(
            &listed.root,
            "there are no pictures to measure; name a source that has some",
        ));
    }
    let step = samples.len().div_ceil(STEPS);
    let mut resident: Vec<(usize, u64)> = memory("VmRSS").map(|m| (0, m)).into_iter().collect();
    let mut bytes = Some(0);
    let mut bad = Vec::new();
    let mut done = 0;
    let next = AtomicUsize::new(0);
    let since = Instant::now();
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        for _ in 0..threads.min(samples.len()) {
            let (sender, samples, next) = (sender.clone(), &samples, &next);
            scope.spawn(move || {
                while let Some(&sample) = samples.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = one(listed, options, sample);
                    let done = Done { sample, bytes: size(listed, sample), error: result.err() };
                    if sender.send(done).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        for one in receiver {
            done += 1;
            bytes = bytes.zip(one.bytes).map(|(a, b)| a + b);
            bad.extend(one.error.map(|e| (one.sample, e)));
            if done % step == 0 || done == samples.len() {
                resident.extend(memory("VmRSS").map(|m| (done, m)));
            }
            progress(done);
        }
    });
    let seconds = since.elapsed().as_secs_f64().max(1e-9);
    // In the order of the source, however the threads took turns.
    bad.sort_by_key(|&(sample, _)| sample);
    let mut skipped = Skipped::default();
    for (sample, e) in bad {
        let name = &listed.samples[sample].image;
        skipped.add(name, e.reason(name));
    }
    let pictures = samples.len() - skipped.count;
    Ok(Speed {
        pictures,
        skipped,
        seconds,
        per_second: pictures as f64 / seconds,
        bytes_per_second: bytes.map(|b| b as f64 / seconds),
        peak: memory("VmHWM"),
        resident,
    })
}

/// Decodes and fits a picture as a training step would.
fn one(listed: &Listed, options: &LoadOptions, sample: usize) -> Result<()> {
    let LoadOptions { frames, crop, flip, .. } = options;
    let bitmap = listed.pictures.decode(sample, frames.shorter())?;
    let fitted = Fitted::new(bitmap, frames, *crop)?;
    std::hint::black_box(fitted.cut(*crop, *flip, &mut Philox::new(0, sample as u64)));
    Ok(())
}

/// Bytes of a picture's file, if it is one.
fn size(listed: &Listed, sample: usize) -> Option<u64> {
    let data = std::fs::metadata(&listed.samples[sample].image).ok()?;
    data.is_file().then_some(data.len())
}

/// A line of Linux's status of this process, in bytes; `None` elsewhere.
fn memory(line: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let rest = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':'))?;
    Some(rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::scratch::Scratch;
    use crate::data::{Columns, Image, Source, Split, Wanted, save_png};

    #[test]
    fn a_folder_is_measured() {
        let dir = Scratch::new("speed");
        for i in 0..25 {
            save_png(dir.path(&format!("{i:02}.png")), &Image::filled(20, 30, 0.1)).unwrap();
        }
        dir.write("07.png", b"broken");
        let columns = Columns::default();
        let wanted = Wanted {
            split: Split::Train,
            path: Some(dir.root()),
            images: None,
            columns: &columns,
            samples: 0,
            size: 16,
        };
        let listed = Source::Folder.open(&wanted).unwrap();
        let options = LoadOptions::new(16);
        for threads in [1, 3] {
            let mut seen = Vec::new();
            let speed = speed(&listed, &options, threads, 20, &mut |n| seen.push(n)).unwrap();
            assert_eq!((speed.pictures, speed.skipped.count), (19, 1));
            assert!(speed.skipped.names().contains("07.png: this is not a"), "{}", speed.skipped.names());
            assert_eq!(seen, (1..=20).collect::<Vec<_>>());
            assert!(speed.per_second > 0.0 && speed.bytes_per_second.unwrap() > 0.0);
            if cfg!(target_os = "linux") {
                let after: Vec<usize> = speed.resident.iter().map(|&(n, _)| n).collect();
                assert_eq!(after, (0..=20).step_by(2).collect::<Vec<_>>());
                assert!(speed.peak.unwrap() > 1 << 20);
            }
        }
        assert!(speed(&listed, &options, 0, 1, &mut |_| ()).is_err());
        assert!(speed(&listed, &options, 1, 0, &mut |_| ()).is_err());
    }
}
