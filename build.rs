//! Compiles the C side of the kernel library.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels/include");
    println!("cargo::rerun-if-changed=kernels/common");
    cc::Build::new()
        .file("kernels/common/status.c")
        .file("kernels/common/missing.c")
        .include("kernels/include")
        .std("c11")
        .extra_warnings(true)
        .warnings_into_errors(true)
        .compile("ett_kernels");
}
