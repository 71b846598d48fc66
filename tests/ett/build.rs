//! The part of the build that checks the output of CUDA compilers and finds headers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

type Result<T> = std::result::Result<T, String>;

#[allow(dead_code)]
#[path = "../../build/cuda.rs"]
mod cuda;

use crate::common::Scratch;
use cuda::{complaints, fetch, has_driver, with_headers};

const CLEAN: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3addPf' for 'sm_90a'
ptxas info    : Function properties for _Z3addPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 8192 bytes smem
ptxas info    : Compile time = 25.453 ms
";

#[test]
fn nothing_is_said_about_a_clean_kernel() {
    assert_eq!(complaints(CLEAN), "");
    assert_eq!(complaints(""), "");
}

#[test]
fn spills_and_stacks_are_blamed_on_their_kernel() {
    for (from, to) in [
        ("0 bytes stack frame", "256 bytes stack frame"),
        ("0 bytes spill stores", "8 bytes spill stores"),
        ("0 bytes spill loads", "8 bytes spill loads"),
    ] {
        let said = complaints(&CLEAN.replace(from, to));
        assert!(said.starts_with("'_Z3addPf' for 'sm_90a'\n") && said.contains(to), "{said}");
    }
}

#[test]
fn every_compiler_of_nvcc_may_complain() {
    for line in [
        "add.cu(10): warning #177-D: variable \"unused\" was declared but never referenced",
        "add.cu:13:27: warning: unused parameter 'x' [-Wunused-parameter]",
        "ptxas warning : Value of threads per SM is out of range",
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized",
    ] {
        assert_eq!(complaints(&format!("{line}\n{CLEAN}")), line);
        assert_eq!(complaints(&format!("{CLEAN}{line}\n")), line);
    }
}

#[test]
fn headers_are_followed_wherever_they_are() {
    let scratch = Scratch::new();
    let write = |name: &str, text: &str| {
        let path = scratch.path(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder can be made");
        fs::write(&path, text).expect("a file can be written");
        path
    };
    let source = write("op/a.cu", "#include <cuda_runtime.h>\n  #  include \"b.cuh\"\n#include <c.h>\n");
    let beside = write("op/b.cuh", "#pragma once\n#include \"b.cuh\"\n#include \"../deep/d.h\"\n");
    let c = write("include/c.h", "");
    let d = write("deep/d.h", "#include \"c.h\"\n// #include \"unused.h\"\n");
    write("include/unused.h", "");
    let include = scratch.path("include");
    let absolute = |p: &Path| fs::canonicalize(p).expect("it exists");
    let found: BTreeSet<_> = with_headers(&source, &[&include]).iter().map(|p| absolute(p)).collect();
    assert_eq!(found, [source, beside, c, d].iter().map(|p| absolute(p)).collect());
}

#[test]
fn a_driver_is_found_by_its_files() {
    for (file, found) in [
        ("proc/driver/nvidia/version", true),
        ("dev/nvidiactl", true),
        ("usr/lib/wsl/lib/libcuda.so.1", true),
        ("usr/local/cuda/lib64/stubs/libcuda.so", false),
    ] {
        let root = Scratch::new();
        let path = root.path(file);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder can be made");
        fs::write(&path, "").expect("a file can be written");
        assert_eq!(has_driver(&root.path("")), found, "{file}");
    }
}

/// A package whose `tools/setup-cuda` is this script.
#[cfg(unix)]
fn package(script: &str) -> Scratch {
    let package = Scratch::new();
    fs::write(package.path("build.rs"), "").expect("a file can be written");
    fs::create_dir(package.path("tools")).expect("a folder can be made");
    let text = format!("cd \"$(dirname \"$0\")/..\"\n{script}\n");
    fs::write(package.path("tools/setup-cuda"), text).expect("a file can be written");
    package
}

/// A file that the build script names must not be newer than the script's start: cargo would run it again.
#[cfg(unix)]
#[test]
fn a_fetched_compiler_is_as_old_as_the_build_script() {
    let there = ".cuda/nvidia/cu13/bin";
    let package = package(&format!("[ $1 = --from-build ] && mkdir -p {there} && echo nvcc >{there}/nvcc"));
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    let script = fs::File::options().append(true).open(package.path("build.rs")).expect("a file of our own");
    script.set_modified(old).expect("a time can be set");
    let nvcc = fetch(&package.path("")).expect("a compiler");
    assert_eq!(fs::read_to_string(&nvcc).expect("a file"), "nvcc\n");
    assert_eq!(fs::metadata(&nvcc).and_then(|m| m.modified()).expect("a time"), old);
}

#[cfg(unix)]
#[test]
fn a_compiler_that_cannot_be_fetched_gives_the_reason() {
    let refused = |script: &str| fetch(&package(script).path("")).expect_err("no compiler");
    let said =
        refused("echo 'ERROR: No matching distribution'; echo 'setup-cuda: python3 has no pip.' >&2; exit 1");
    assert_eq!(said, "python3 has no pip");
    assert_eq!(refused("exit 3"), "`sh` failed");
    assert!(refused("exit 0").contains(".cuda/nvidia/cu13/bin/nvcc cannot be used"));
    let none = fetch(Path::new("/nonexistent")).expect_err("no package");
    assert!(none.contains("/nonexistent/tools/setup-cuda") && !none.contains('\n'), "{none}");
}
