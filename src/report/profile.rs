//! The time spent in each kernel, by the parts of a run.

use std::fmt::Write;

use serde::Serialize;

use crate::backend::{KernelTime, Profile};
use crate::error::{Error, Result};

/// Version of the file `profile.json`.
const FORMAT: u32 = 1;

/// What a device measured in the parts of a run: its stages and its closing evaluation.
#[derive(Debug, Clone, Default)]
pub struct Profiles {
    parts: Vec<(String, usize, Profile)>,
}

/// A part of the file.
#[derive(Serialize)]
struct Part<'a> {
    part: &'a str,
    steps: usize,
    seconds: f64,
    idle_seconds: f64,
    kernels: Vec<Row>,
}

/// A kernel of the file.
#[derive(Serialize)]
struct Row {
    kernel: &'static str,
    implementation: &'static str,
    calls: u64,
    seconds: f64,
    /// Of the time in kernels.
    share: f64,
    tflop_per_s: f64,
    gb_per_s: f64,
    /// Without a kernel, before launches of this one.
    idle_seconds: f64,
}

/// The kernels of a profile, those with the longest times first.
fn rows(p: &Profile) -> Vec<Row> {
    let busy = p.busy().max(f64::MIN_POSITIVE);
    let row = |k: KernelTime| {
        let per_second = |n: f64| if k.seconds > 0.0 { n / k.seconds } else { 0.0 };
        Row {
            kernel: k.kernel,
            implementation: k.implementation,
            calls: k.calls,
            seconds: k.seconds,
            share: k.seconds / busy,
            tflop_per_s: per_second(k.flop) * 1e-12,
            gb_per_s: per_second(k.bytes) * 1e-9,
            idle_seconds: k.idle,
        }
    };
    p.kernels().into_iter().map(row).collect()
}

impl Profiles {
    /// Adds a part of a run with its number of steps, 0 for the evaluation.
    pub fn add(&mut self, part: &str, steps: usize, profile: Profile) {
        self.parts.push((part.into(), steps, profile));
    }

    /// Whether nothing was measured.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// A table for each part: operations and memory traffic per second are the least that the kernel's arguments imply;
    /// `idle` is the time in which the device ran no kernel, before a launch of this one.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for (part, steps, p) in &self.parts {
            let (busy, idle) = (p.busy(), p.idle());
            let share = 100.0 * idle / (busy + idle).max(f64::MIN_POSITIVE);
            let steps = if *steps > 0 { format!(", {steps} steps") } else { String::new() };
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "\n{part}{steps}: {busy:.3} s in kernels, {idle:.3} s ({share:.0}%) without one\n  {:<36} {:>8} \
                 {:>9} {:>6} {:>8} {:>8} {:>8}",
                "kernel", "calls", "seconds", "share", "TFLOP/s", "GB/s", "idle s"
            );
            for r in rows(p) {
                let name = match r.implementation {
                    "" => r.kernel.to_string(),
                    one => format!("{} ({one})", r.kernel),
                };
                let _ = writeln!(
                    out,
                    "  {name:<36} {:>8} {:>9.3} {:>5.1}% {:>8.3} {:>8.1} {:>8.3}",
                    r.calls,
                    r.seconds,
                    100.0 * r.share,
                    r.tflop_per_s,
                    r.gb_per_s,
                    r.idle_seconds
                );
            }
        }
        out
    }

    /// The same as a JSON file, for the device with this name.
    pub fn json(&self, device: &str) -> Result<String> {
        let parts = self.parts.iter().map(|(part, steps, p)| {
            let (seconds, idle_seconds) = (p.busy(), p.idle());
            Part { part, steps: *steps, seconds, idle_seconds, kernels: rows(p) }
        });
        let parts: Vec<Part> = parts.collect();
        let all = serde_json::json!({ "format": FORMAT, "device": device, "parts": parts });
        serde_json::to_string_pretty(&all)
            .map_err(|e| Error::data("profile", format!("cannot be written ({e})")))
    }
}
