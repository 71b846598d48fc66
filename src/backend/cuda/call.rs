//! Conversion of the contract's arguments to the C structs, and of statuses to errors.

use std::ffi::{CStr, c_char};

use super::ffi;
use crate::backend::{Acc, In, KERNELS, Metric, Out, Unary, contract, spec};
use crate::error::{Error, Result};

/// A type with a counterpart in the C argument structs.
pub(super) trait ToC {
    /// The C type.
    type C;
    fn to_c(&self) -> Self::C;
}

impl ToC for In<'_> {
    type C = ffi::ett_view;
    fn to_c(&self) -> ffi::ett_view {
        let mut dims = [1; 4];
        let given: &[usize] = self.dims.as_slice();
        for (to, from) in dims.iter_mut().zip(given) {
            *to = *from as i64;
        }
        ffi::ett_view {
            ptr: self.addr() as *mut _,
            dtype: self.dtype as i32,
            rank: given.len() as i32,
            dims,
            ld: self.ld,
        }
    }
}

impl ToC for Out<'_> {
    type C = ffi::ett_view;
    fn to_c(&self) -> ffi::ett_view {
        self.0.to_c()
    }
}

impl ToC for Acc<'_> {
    type C = ffi::ett_view;
    fn to_c(&self) -> ffi::ett_view {
        self.0.to_c()
    }
}

impl<T: ToC<C = ffi::ett_view>> ToC for Option<T> {
    type C = ffi::ett_view;
    fn to_c(&self) -> ffi::ett_view {
        match self {
            Some(v) => v.to_c(),
            None => ffi::ett_view { ptr: std::ptr::null_mut(), dtype: 0, rank: 0, dims: [1; 4], ld: 0 },
        }
    }
}

impl ToC for usize {
    type C = i64;
    fn to_c(&self) -> i64 {
        *self as i64
    }
}

impl ToC for u64 {
    type C = u64;
    fn to_c(&self) -> u64 {
        *self
    }
}

impl ToC for bool {
    type C = i32;
    fn to_c(&self) -> i32 {
        *self as i32
    }
}

impl ToC for f64 {
    type C = f64;
    fn to_c(&self) -> f64 {
        *self
    }
}

impl ToC for Metric {
    type C = i32;
    fn to_c(&self) -> i32 {
        *self as i32
    }
}

impl ToC for Unary {
    type C = ffi::ett_unary;
    fn to_c(&self) -> ffi::ett_unary {
        match *self {
            Unary::Silu => ffi::ett_unary { kind: 0, slope: 0.0 },
            Unary::Gelu => ffi::ett_unary { kind: 1, slope: 0.0 },
            Unary::Relu => ffi::ett_unary { kind: 2, slope: 0.0 },
            Unary::LeakyRelu(slope) => ffi::ett_unary { kind: 3, slope },
            Unary::GeluTanh => ffi::ett_unary { kind: 4, slope: 0.0 },
        }
    }
}

macro_rules! impl_to_c {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => {
        $($(#[$fdoc:meta])* $field:ident: $ty:ty $(= $text:literal)?,)*
    })*) => { pastey::paste! {
        $(impl ToC for contract::$args<'_> {
            type C = ffi::[<ett_ $name _args>];
            fn to_c(&self) -> Self::C {
                Self::C { $($field: self.$field.to_c(),)* }
            }
        })*
    } };
}
contract::kernel_table!(impl_to_c);

/// The index of a kernel in the contract, which identifies it in faults.
pub(super) fn number(kernel: &str) -> i32 {
    KERNELS.iter().position(|k| k.name == kernel).map_or(-1, |i| i as i32)
}

/// `s` as a static string if it names an argument of `kernel` or a part of the launch, otherwise "arguments".
fn argument(kernel: &str, s: &str) -> &'static str {
    let fields = spec::kernel(kernel).map_or(&[][..], |k| k.fields);
    let launch = ["launch.workspace", "launch.force", "launch", "args"];
    fields.iter().map(|f| f.name).chain(launch).find(|name| *name == s).unwrap_or("arguments")
}

/// Converts the status of a launcher; `last` is the struct written by `ett_last_status`.
pub(super) fn check(kernel: &'static str, device: &str, code: i32, last: &ffi::ett_status) -> Result<()> {
    let text = |s: &[c_char]| {
        let bytes: Vec<u8> = s.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (arg, got, want) = (text(&last.arg), text(&last.got), text(&last.want));
    // Of a name that is forced: the name itself, which the launcher quotes.
    let name = got.split('`').nth(1).unwrap_or(&got);
    match code {
        0 => Ok(()),
        1 if arg == "launch.force" => {
            let want = format!("an implementation of {kernel}: {want}");
            Err(Error::config("ETT_FORCE", format!("{kernel}={name}"), want))
        }
        1 => Err(Error::Argument { op: kernel, arg: argument(kernel, &arg), got, want }),
        2 if arg == "launch.force" => Err(Error::Unsupported {
            op: kernel,
            what: format!(
                "the implementation `{name}` requested by ETT_FORCE (available for this call: {want})"
            ),
            device: device.into(),
        }),
        2 => Err(Error::Unsupported {
            op: kernel,
            what: if arg == "args" { got } else { format!("argument `{arg}` that is {got} (wanted {want})") },
            device: device.into(),
        }),
        _ => Err(Error::device(device, format!("{kernel} failed: {want} ({got})"))),
    }
}

/// The name of the implementation that was launched last.
///
/// # Safety
/// `name` is null or a string literal, as returned by `ett_last_kernel`.
pub(super) unsafe fn kernel_name(name: *const c_char) -> &'static str {
    if name.is_null() {
        return "";
    }
    // SAFETY: the caller guarantees a string literal.
    unsafe { CStr::from_ptr(name) }.to_str().unwrap_or("")
}

/// The fault that kernels recorded in the fault slot, as an error; `None` if there is none.
pub(super) fn fault(f: &ffi::ett_fault) -> Option<Error> {
    if f.kind == 0 {
        return None;
    }
    let kernel = usize::try_from(f.launch).ok().and_then(|i| KERNELS.get(i));
    let (op, arg) =
        (kernel.map_or("kernel", |k| k.name), kernel.and_then(|k| k.indices()).map_or("index", |f| f.name));
    let got = format!("{} at element {}", f.value, f.where_);
    Some(Error::arg(op, arg, got, format!("below {}", f.limit)))
}

/// Parses the implementations requested by `ETT_FORCE`: `op=kernel`, separated by commas.
pub(super) fn forced(text: &str) -> Result<Vec<(&'static str, std::ffi::CString)>> {
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let bad = |want: &str| Error::config("ETT_FORCE", part, want);
        let (op, kernel) = part.split_once('=').ok_or_else(|| bad("op=kernel"))?;
        let op = spec::kernel(op).ok_or_else(|| bad("the name of a kernel of the contract before the ="))?;
        let kernel = std::ffi::CString::new(kernel).map_err(|_| bad("a name without zero bytes"))?;
        all.push((op.name, kernel));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forced_kernels_are_known_ones() {
        let all = forced("nearest=simple, matmul=portable,").expect("two kernels");
        assert_eq!(all.iter().map(|(op, _)| *op).collect::<Vec<_>>(), ["nearest", "matmul"]);
        for (text, want) in [("nearest", "op=kernel"), ("nearst=simple", "name of a kernel")] {
            let e = forced(text).expect_err(text).to_string();
            assert!(e.contains("ETT_FORCE") && e.contains(want), "{e}");
        }
    }

    #[test]
    fn a_forced_name_is_refused_in_a_sentence() {
        let status = |code, got: &str, want: &str| {
            // SAFETY: a struct of numbers.
            let mut s = unsafe { std::mem::zeroed::<ffi::ett_status>() };
            let put = |to: &mut [c_char], from: &str| {
                to.iter_mut().zip(from.bytes()).for_each(|(to, b)| *to = b as c_char);
            };
            put(&mut s.arg, "launch.force");
            put(&mut s.got, got);
            put(&mut s.want, want);
            check("add", "shim", code, &s).expect_err("a code that is not 0").to_string()
        };
        assert_eq!(
            status(1, "`fast`, the name of no implementation", "one of wide, plain"),
            "configuration: `ETT_FORCE` is add=fast, wanted an implementation of add: one of wide, plain"
        );
        assert_eq!(
            status(2, "`wide`, which cannot do this call", "plain"),
            "add: the implementation `wide` requested by ETT_FORCE (available for this call: plain) is not supported by shim"
        );
    }

    #[test]
    fn faults_are_sentences() {
        let f = ffi::ett_fault { kind: 1, launch: number("gather_fwd"), where_: 5, value: 70000, limit: 48 };
        let e = fault(&f).expect("a fault").to_string();
        assert_eq!(e, "gather_fwd: argument `idx` is 70000 at element 5, wanted below 48");
        assert!(fault(&ffi::ett_fault { kind: 0, ..f }).is_none());
    }
}
