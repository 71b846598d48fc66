//! The time spent in each kernel on the CPU.

use crate::backend::Cpu;

/// A table of kernels with their calls and time, the slowest first.
pub fn profile_table(dev: &Cpu) -> String {
    let mut rows: Vec<_> = dev.profile().into_iter().collect();
    rows.sort_by(|a, b| b.1.seconds.total_cmp(&a.1.seconds));
    let total: f64 = rows.iter().map(|(_, k)| k.seconds).sum();
    let gemm: f64 = rows.iter().map(|(_, k)| k.gemm_seconds).sum::<f64>() / dev.threads() as f64;
    let mut out = format!(
        "  kernels {total:.1} s on {} threads, {:.0}% of it in matrix products\n",
        dev.threads(),
        100.0 * gemm / total.max(1e-9)
    );
    for (name, k) in rows {
        let share = 100.0 * k.gemm_seconds / dev.threads() as f64 / k.seconds.max(1e-9);
        let percent = 100.0 * k.seconds / total.max(1e-9);
        out.push_str(&format!(
            "  {name:<20} {:>8} calls {:>8.2} s {percent:>5.1}%   products {share:>3.0}%\n",
            k.calls, k.seconds
        ));
    }
    out
}
