//! What the header promises of every kernel, asked of the shim's library: null arguments, and names of implementations.

use std::ffi::{CStr, c_char, c_void};

use ett::backend::cuda::ffi;
use ett::backend::{Cpu, KERNELS, Kernels, Precision};
use ett::error::Error;

use super::case::{Draw, Layout, round};
use super::place::{Placed, views};
use super::{Kernel, TABLE};
use crate::common::{Outcome, open_shim, shim_forcing, shim_path};

type Query = unsafe extern "C" fn(*const c_void) -> i64;
type Launcher = unsafe extern "C" fn(*const c_void, *const ffi::ett_launch) -> i32;
type LastStatus = unsafe extern "C" fn(*mut ffi::ett_status);

fn library() -> Result<libloading::Library, libloading::Error> {
    // SAFETY: the library's initialisers do nothing but set up sanitizers.
    unsafe { libloading::Library::new(shim_path()) }
}

fn text(s: &[c_char]) -> String {
    // SAFETY: the strings of a status end with a zero.
    unsafe { CStr::from_ptr(s.as_ptr()) }.to_string_lossy().into_owned()
}

/// Argument, what it is, and what is wanted.
fn last_status(library: &libloading::Library) -> Result<[String; 3], libloading::Error> {
    // SAFETY: so the header declares it.
    let status = unsafe { library.get::<LastStatus>(b"ett_last_status")? };
    // SAFETY: a struct of numbers.
    let mut last = unsafe { std::mem::zeroed::<ffi::ett_status>() };
    // SAFETY: it writes the struct.
    unsafe { status(&mut last) };
    Ok([text(&last.arg), text(&last.got), text(&last.want)])
}

#[test]
#[ignore = "needs the shim"]
fn shim_null_arguments_are_wrong() -> Outcome {
    let library = library()?;
    for name in KERNELS.iter().map(|k| k.name) {
        // SAFETY: so the header declares them, but for the types that the pointers are to.
        let query = unsafe { library.get::<Query>(format!("ett_{name}_workspace").as_bytes())? };
        // SAFETY: as above.
        let run = unsafe { library.get::<Launcher>(format!("ett_{name}").as_bytes())? };
        // SAFETY: null is what queries and launchers look for first.
        let (bytes, code) = unsafe { (query(std::ptr::null()), run(std::ptr::null(), std::ptr::null())) };
        assert_eq!(bytes, -1, "the query of {name}");
        let [arg, got, want] = last_status(&library)?;
        assert!(
            code == 1 && arg == "args" && got == "null",
            "{name}: {code}, `{arg}` is {got}, wanted {want}"
        );
    }
    Ok(())
}

/// Calls the kernel's sample.
fn call(dev: &dyn Kernels, kernel: &Kernel) -> Result<(), Error> {
    let case = (kernel.sample)();
    let mut args = (case.args)(&Draw::new(&Cpu::new(1)?, Precision::BF16, 1.0, kernel.name));
    round(&mut args, Precision::BF16);
    let placed: Vec<Placed> =
        args.iter().map(|a| Placed::new(dev, Precision::BF16, a, Layout::Dense)).collect::<Result<_, _>>()?;
    (case.call)(dev, &views(&placed))
}

/// The names in "one of a, b" or "a".
fn names(want: &str) -> Vec<String> {
    want.trim_start_matches("one of ").split(", ").map(str::to_string).collect()
}

/// The implementations of a kernel, by the error of a device on which another name is forced.
pub fn implementations(dev: &dyn Kernels, kernel: &Kernel) -> Vec<String> {
    let start = format!("an implementation of {}: ", kernel.name);
    match call(dev, kernel) {
        Err(Error::Config { want, .. }) if want.starts_with(&start) => names(&want[start.len()..]),
        other => panic!("{}: another name of an implementation gave {other:?}", kernel.name),
    }
}

#[test]
#[ignore = "needs the shim"]
fn shim_names_of_no_implementation_are_refused() -> Outcome {
    let library = library()?;
    let mut unlisted = Vec::new();
    for kernel in TABLE {
        let name = kernel.name;
        let e = call(&*shim_forcing(&format!("{name}=magic")), kernel).expect_err(name);
        let [arg, got, want] = last_status(&library)?;
        assert_eq!([&*arg, &*got], ["launch.force", "`magic`, the name of no implementation"], "{name}");
        let all = names(&want);
        let mut once = all.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), all.len(), "{name}: {want} says a name twice");
        let mut listed = ett::backend::abi::implementations(name);
        listed.sort();
        if listed != once {
            unlisted.push(format!("{name}: {once:?}"));
        }
        assert_eq!(all.len() > 1, want.starts_with("one of "), "{name}: {want}");
        let sentence =
            format!("configuration: `ETT_FORCE` is {name}=magic, wanted an implementation of {name}: {want}");
        assert_eq!(e.to_string(), sentence);
        // Each of them runs this call or is refused because it cannot.
        let mut ran = 0;
        for one in &all {
            let dev = open_shim(&format!("{name}={one}"));
            match call(&dev, kernel) {
                Ok(()) => {
                    assert_eq!(dev.last_kernel()?, one, "{name}");
                    ran += 1;
                }
                Err(e @ Error::Unsupported { .. }) => {
                    let [arg, got, want] = last_status(&library)?;
                    let refused = format!("`{one}`, which cannot do this call");
                    assert_eq!([arg, got], ["launch.force".to_string(), refused], "{name}");
                    assert!(!names(&want).contains(one) && all.contains(&names(&want)[0]), "{name}: {want}");
                    let sentence = format!("{name}: the implementation `{one}` requested by ETT_FORCE");
                    assert!(e.to_string().starts_with(&sentence), "{e}");
                }
                Err(e) => return Err(e.into()),
            }
        }
        assert!(ran > 0, "{name}: none of {want} runs");
    }
    assert!(unlisted.is_empty(), "what kernels/common/kernels.c does not say: {unlisted:#?}");
    Ok(())
}

/// A name of any length leaves a sentence that ends.
#[test]
#[ignore = "needs the shim"]
fn shim_long_names_are_cut() -> Outcome {
    let kernel = TABLE.iter().find(|k| k.name == "add").ok_or("add is covered")?;
    let e = call(&*shim_forcing(&format!("add={}", "x".repeat(500))), kernel).expect_err("no such name");
    let cut = format!("add={}, wanted", "x".repeat(40));
    assert!(e.to_string().contains(&cut), "{e}");
    Ok(())
}
