//! Tests of the driver: a device that is the CPU except for one fault, which the driver has to report.

use std::sync::atomic::{AtomicUsize, Ordering};

use ett::backend::*;
use ett::error::{Error, Result};

use super::{Report, Size, reject, run};

/// The fault of the device.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The last row of an output is not written.
    RowUnwritten,
    /// The last value of an output is not written.
    ValueUnwritten,
    /// A value after the last row is written.
    AfterEnd,
    /// A value before the first row is written.
    BeforeStart,
    /// A value after the first row is written, if there is a gap.
    IntoGap,
    /// An input is written.
    IntoInput,
    /// Every other call gives one value whose last bit differs.
    Unsteady,
    /// One index is not that of the best code.
    WrongIndex,
    /// An output is overwritten instead of added to.
    NotAdded,
    /// A row is a copy of another.
    WrongRow,
    /// All values are off by a few hundred roundings.
    Inexact,
    /// NaN in place of a number.
    Nan,
    /// The kernel is missing.
    Missing,
    /// The kernel does not support an odd number of columns.
    Partial,
    /// Rows that do not begin on multiples of 16 bytes are refused.
    Aligned,
    /// Valid arguments are refused.
    Strict,
    /// Invalid arguments are accepted.
    Lax,
    /// The error names the wrong argument.
    Misnamed,
    /// Arguments are refused after something was written.
    TooLate,
}

/// The CPU with a fault.
struct Broken {
    cpu: Cpu,
    fault: Fault,
    calls: AtomicUsize,
}

/// A view of the CPU's memory.
#[derive(Clone, Copy)]
struct Bytes<'a>(In<'a>);

impl<'a> Bytes<'a> {
    /// `values` elements, starting `at` elements after the first one.
    fn at(&self, at: i64, values: usize) -> &'a mut [u8] {
        let size = self.0.dtype.size();
        let address = self.0.addr() as i64 + at * size as i64;
        // SAFETY: inside the buffers of the driver, which have guard bands on both sides. Nothing else accesses them
        // during a call, and no slice is used after an overlapping one was made.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, values * size) }
    }

    fn row(&self, r: usize) -> &'a mut [u8] {
        self.at(r as i64 * self.0.ld, self.0.dims.cols())
    }

    /// The value after the end of a row.
    fn beyond(&self, r: usize) -> &'a mut [u8] {
        self.at(r as i64 * self.0.ld + self.0.dims.cols() as i64, 1)
    }

    fn is_wide(&self) -> bool {
        let (size, dims) = (self.0.dtype.size(), self.0.dims);
        let ld = if dims.rows() > 1 { self.0.ld as usize } else { 0 };
        [self.0.addr() as usize, ld * size, dims.cols() * size].iter().all(|n| n.is_multiple_of(16))
    }
}

impl Broken {
    fn new(fault: Fault) -> Self {
        let cpu = Cpu::poisoned(1).expect("a thread can be started");
        Broken { cpu, fault, calls: AtomicUsize::new(0) }
    }

    /// Runs a kernel of the CPU and applies the fault before or after it.
    fn call(&self, a: &dyn Args, work: &dyn Fn() -> Result<()>) -> Result<()> {
        let views = a.views();
        let first = |access: Access| views.iter().find(|v| v.1 == access).map(|v| Bytes(v.2));
        let output = first(Access::Write).or(first(Access::Accumulate)).expect("a kernel with an output");
        let dims = output.0.dims;
        match self.fault {
            Fault::Partial if dims.cols().is_multiple_of(2) => return work(),
            Fault::Missing | Fault::Partial => {
                let what = format!("a shape like {dims}");
                return Err(Error::Unsupported { op: a.kernel(), what, device: self.name() });
            }
            Fault::Aligned => {
                return match views.iter().find(|v| !Bytes(v.2).is_wide()) {
                    Some((name, ..)) => Err(Error::arg(a.kernel(), name, "misaligned", "rows on 16 bytes")),
                    None => work(),
                };
            }
            Fault::Strict => return Err(Error::arg(a.kernel(), views[0].0, "as it is", "different")),
            Fault::Lax => return work().or(Ok(())),
            Fault::Misnamed => {
                return work().map_err(|e| match e {
                    Error::Argument { op, got, want, .. } => Error::Argument { op, arg: "it", got, want },
                    e => e,
                });
            }
            Fault::TooLate => {
                return work().inspect_err(|_| {
                    let buf = output.0.buffer();
                    if buf.bytes() > 0 {
                        let start = In::new(buf, 0, DType::I32, [1], 1).expect("a buffer with guard bands");
                        Bytes(start).at(0, 1).fill(0);
                    }
                });
            }
            _ if dims.numel() == 0 => return work(),
            _ => {}
        }
        let last = output.row(dims.rows() - 1);
        let before = last.to_vec();
        let value = last.len() - output.0.dtype.size()..last.len();
        if let (Fault::NotAdded, Some(sum)) = (self.fault, first(Access::Accumulate)) {
            (0..sum.0.dims.rows()).for_each(|r| sum.row(r).fill(0));
        }
        work()?;
        match self.fault {
            Fault::RowUnwritten => last.copy_from_slice(&before),
            Fault::ValueUnwritten => last[value.clone()].copy_from_slice(&before[value]),
            Fault::AfterEnd => output.beyond(dims.rows() - 1).fill(0),
            Fault::BeforeStart => output.at(-1, 1).fill(0),
            Fault::IntoGap if dims.rows() > 1 && output.0.ld as usize > dims.cols() => {
                output.beyond(0).fill(0)
            }
            Fault::IntoInput => {
                let input = first(Access::Read).expect("a kernel with an input");
                input.at(0, 1)[0] ^= 1;
            }
            Fault::Unsteady if self.calls.fetch_add(1, Ordering::Relaxed) % 2 == 1 => last[value.start] ^= 1,
            Fault::WrongIndex => last[value.start] ^= 1,
            Fault::WrongRow if dims.rows() > 2 => last.copy_from_slice(output.row(0)),
            // The lowest byte of f32, the lowest bits of bf16.
            Fault::Inexact => {
                let flip = if output.0.dtype.size() == 4 { 0xFF } else { 0x07 };
                let rows = (0..dims.rows()).flat_map(|r| output.row(r).chunks_mut(output.0.dtype.size()));
                rows.for_each(|v| v[0] ^= flip);
            }
            Fault::Nan => last[value].copy_from_slice(match output.0.dtype.size() {
                4 => &[0, 0, 0xC0, 0x7F],
                _ => &[0xC0, 0x7F],
            }),
            _ => {}
        }
        Ok(())
    }
}

impl Device for Broken {
    fn name(&self) -> String {
        format!("broken: {:?}", self.fault)
    }
    fn id(&self) -> DeviceId {
        self.cpu.id()
    }
    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        self.cpu.alloc(role, bytes)
    }
    fn copy_in(&self, s: Stream, src: &[u8], dst: Out) -> Result<()> {
        self.cpu.copy_in(s, src, dst)
    }
    fn copy(&self, s: Stream, src: In, dst: Out) -> Result<()> {
        self.cpu.copy(s, src, dst)
    }
    fn read_later(&self, s: Stream, src: In) -> Result<Pending> {
        self.cpu.read_later(s, src)
    }
    fn collectives(&self) -> &dyn Collectives {
        self.cpu.collectives()
    }
    fn memory(&self) -> Memory {
        self.cpu.memory()
    }
}

macro_rules! delegate {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => {
        impl Kernels for Broken {
            $(fn $name(&self, s: Stream, a: &$args<'_>) -> Result<()> {
                self.call(a, &|| self.cpu.$name(s, a))
            })*
        }
    };
}
ett::kernel_table!(delegate);

/// Tests one kernel of a broken device.
fn report(fault: Fault, kernel: &str, prec: Precision) -> Report {
    run(&Broken::new(fault), prec, Size::Tiny, Some(&[kernel]))
}

/// Expects a failure whose message contains all of `words`, in both precisions.
fn tells(fault: Fault, kernel: &str, words: &[&str]) {
    for prec in [Precision::F32, Precision::BF16] {
        let found = report(fault, kernel, prec);
        let start = format!("{kernel} in {}: ", prec.act);
        let told =
            |f: &String| f.starts_with(&start) && words.iter().all(|w| f.contains(w)) && !f.contains('\n');
        assert!(
            found.failures.iter().any(told),
            "{fault:?}: no failure says {words:?}: {:#?}",
            found.failures
        );
    }
}

/// Kernels with different kinds of outputs.
const SOME: [&str; 5] = ["add", "matmul", "rms_norm_fwd", "attention_bwd", "gather_fwd"];

#[test]
fn a_sound_device_passes() {
    for kernel in SOME {
        report(Fault::None, kernel, Precision::BF16).expect(&[]);
    }
}

#[test]
fn what_is_not_written_is_told() {
    for kernel in SOME {
        tells(Fault::RowUnwritten, kernel, &["not written", "in row "]);
        tells(Fault::ValueUnwritten, kernel, &["1 of ", "not written", "scale 1, dense"]);
    }
    tells(Fault::RowUnwritten, "nearest", &["20 of 20 values of `idx` were not written"]);
    // Outputs that are added to are not poisoned: their value is wrong.
    tells(Fault::RowUnwritten, "matmul_acc", &["`y`", "off by"]);
}

#[test]
fn writes_outside_are_told() {
    for kernel in SOME.into_iter().chain(["matmul_acc", "nearest", "adamw"]) {
        tells(Fault::AfterEnd, kernel, &["memory outside `", "1 after the end of row "]);
        tells(Fault::BeforeStart, kernel, &["memory outside `", "1 before the first row"]);
        tells(Fault::IntoInput, kernel, &["the input `", "was written: row 0, column 0"]);
    }
    for kernel in SOME {
        tells(Fault::IntoGap, kernel, &["memory outside `", "1 after the end of row 0", "rows"]);
    }
}

#[test]
fn other_bits_are_told() {
    for kernel in SOME.into_iter().chain(["matmul_acc", "col_sum", "nearest", "sum_squares"]) {
        tells(Fault::Unsteady, kernel, &["call 2 gave other bits than the first: 1 of "]);
    }
}

#[test]
fn wrong_values_are_told() {
    for kernel in SOME {
        tells(Fault::Nan, kernel, &[if kernel == "gather_fwd" { "wanted exactly" } else { "not finite" }]);
        tells(Fault::Inexact, kernel, &[if kernel == "gather_fwd" { "wanted exactly" } else { "off by" }]);
        tells(Fault::WrongRow, kernel, &["row "]);
    }
    tells(Fault::WrongIndex, "nearest", &["`idx`", "well separated", "1 of ", "indices differ"]);
    tells(Fault::WrongIndex, "nearest", &["`idx`", "token ", "below the best"]);
    for kernel in ["matmul_acc", "col_sum", "accumulate", "gather_bwd", "sum_squares", "adamw"] {
        tells(Fault::NotAdded, kernel, &[kernel]);
    }
    for kernel in ["rms_norm_bwd", "layer_norm_bwd", "linear_xent_bwd"] {
        tells(Fault::NotAdded, kernel, &["`dw`", "off by"]);
    }
}

#[test]
fn what_is_missing_is_listed() {
    let found = run(&Broken::new(Fault::Missing), Precision::F32, Size::Tiny, Some(&["add", "rope"]));
    assert_eq!((found.missing(), found.failures.len(), found.calls), (vec!["add", "rope"], 0, 0));
    assert_eq!(found.complaints(&["add", "rope"]), ["nothing was called"]);
    let found = report(Fault::Partial, "add", Precision::F32);
    assert!(found.missing().is_empty() && found.failures.is_empty() && found.calls > 0);
    for excuse in [&["add"][..], &["rope", "add: a shape like"]] {
        assert_eq!(found.complaints(excuse), [""; 0]);
    }
    for other in [&[][..], &["rope"], &["add: a colour"], &["rope: a shape like"]] {
        let complaints = found.complaints(other);
        assert!(
            complaints.len() == 1 && complaints[0].contains("add: a shape like"),
            "{other:?}: {complaints:?}"
        );
    }
}

#[test]
fn refusals_are_told_unless_they_are_allowed() {
    tells(Fault::Strict, "add", &["it was refused", "argument `a`"]);
    tells(Fault::Aligned, "add", &["it was refused", "misaligned", "one element in"]);
    // `nearest` may require aligned tokens and codes, but not aligned indices.
    let found = report(Fault::Aligned, "nearest", Precision::F32);
    let told = found.failures.iter().all(|f| f.contains("argument `idx`"));
    assert!(!found.failures.is_empty() && told, "{:#?}", found.failures);
}

#[test]
fn wrong_arguments_have_to_be_refused_by_name() {
    let reject =
        |fault, prec| reject::run(&Broken::new(fault), prec, Some(&["add", "matmul_acc", "gather_fwd"]));
    for (fault, words) in [
        (Fault::Lax, "was accepted"),
        (Fault::Misnamed, "the error names something else: "),
        (Fault::TooLate, "refused, but `"),
        (Fault::Strict, "the call that is right was refused: "),
    ] {
        for prec in [Precision::F32, Precision::BF16] {
            let found = reject(fault, prec);
            assert!(found.failures.iter().all(|f| f.contains(words)), "{fault:?}: {:#?}", found.failures);
            assert!(found.failures.len() >= 3, "{fault:?}: {:#?}", found.failures);
        }
    }
    assert_eq!(reject(Fault::Missing, Precision::F32).missing(), ["add", "gather_fwd", "matmul_acc"]);
}
