//! The part of the build that checks the output of CUDA compilers and finds headers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

type Result<T> = std::result::Result<T, String>;

#[allow(dead_code)]
#[path = "../../build/cuda.rs"]
mod cuda;

use crate::common::Scratch;
use cuda::{complaints, with_headers};

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
