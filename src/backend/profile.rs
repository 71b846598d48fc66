//! Times of kernels, as a device measures them.

use std::collections::BTreeMap;

use super::Cost;

/// The time spent in each kernel between two moments, on the clock of the device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Profile {
    kernels: BTreeMap<(&'static str, &'static str), KernelTime>,
}

/// The launches of one implementation of a kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct KernelTime {
    /// The kernel's name in the contract.
    pub kernel: &'static str,
    /// Which of the device's implementations ran; empty on a device with only one.
    pub implementation: &'static str,
    /// Launches.
    pub calls: u64,
    /// Seconds from start to end of all launches.
    pub seconds: f64,
    /// Seconds in which the device ran no kernel, from the end of another launch to the start of these.
    pub idle: f64,
    /// Floating-point operations of all launches.
    pub flop: f64,
    /// Minimal memory traffic of all launches, in bytes.
    pub bytes: f64,
}

impl Profile {
    /// Adds a launch that took `seconds`, after the device had run no kernel for `idle` seconds.
    pub(super) fn add(
        &mut self,
        (kernel, implementation): (&'static str, &'static str),
        cost: Cost,
        seconds: f64,
        idle: f64,
    ) {
        let k = self.kernels.entry((kernel, implementation)).or_default();
        (k.kernel, k.implementation) = (kernel, implementation);
        k.calls += 1;
        k.seconds += seconds;
        k.idle += idle;
        k.flop += cost.flop as f64;
        k.bytes += cost.bytes as f64;
    }

    /// The kernels, those with the longest times first.
    pub fn kernels(&self) -> Vec<KernelTime> {
        let mut all: Vec<KernelTime> = self.kernels.values().copied().collect();
        all.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        all
    }

    /// Seconds in kernels.
    pub fn busy(&self) -> f64 {
        self.kernels.values().map(|k| k.seconds).sum()
    }

    /// Seconds without a kernel, from the first launch to the last.
    pub fn idle(&self) -> f64 {
        self.kernels.values().map(|k| k.idle).sum()
    }
}
