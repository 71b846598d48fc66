//! Compiles the kernels: the C files always, the CUDA files if there is a CUDA compiler.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `ETT_CUDA` | `fetch`: fetch a missing CUDA compiler, as on a machine with a driver; `require`: a missing one is an error; `off`: do not search for one |
//! | `NVCC`, `CUDA_HOME` | the compiler, or the folder of CUDA |
//! | `ETT_CUDA_ARCHS` | compute capabilities to compile for, by default `80 90a`; PTX of 80 is always included |
//!
//! With CUDA, the cfg `ett_cuda` is set, and a program links everything that it needs except the driver, which it loads
//! at run time. If this machine has a driver, the cfg `ett_gpu_here` is set too, and the tests of a GPU are not ignored.

#[path = "build/cuda.rs"]
mod cuda;

use std::path::{Path, PathBuf};
use std::{env, fs, process};

/// The error is one sentence, on a line of its own after any output of a compiler.
type Result<T> = std::result::Result<T, String>;

fn main() {
    if let Err(error) = build() {
        let (said, sentence) = error.rsplit_once('\n').unwrap_or(("", &error));
        eprintln!("{said}");
        println!("cargo::error={sentence}");
        process::exit(1);
    }
}

fn build() -> Result<()> {
    println!("cargo::rustc-check-cfg=cfg(ett_cuda, ett_gpu_here)");
    for path in ["build.rs", "build"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let kernels = Path::new(&env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?).join("kernels");
    let folders = folders(&kernels)?;

    let mut cc = cc::Build::new();
    cc.files(files(&kernels.join("common"), "c")?);
    cc.include(kernels.join("include")).include(kernels.join("common"));
    cc.std("c11").extra_warnings(true).warnings_into_errors(true);

    let root = Path::new("/");
    let toolkit = cuda::Toolkit::find(root)?;
    let targets = if toolkit.is_some() { cuda::targets() } else { String::new() };
    cc.define("ETT_TARGETS", &*format!("\"{targets}\""));
    if let Some(toolkit) = &toolkit {
        let mut sources = Vec::new();
        for folder in &folders {
            sources.extend(files(folder, "cu")?);
        }
        cc.objects(cuda::compile(toolkit, &kernels, &sources)?);
    }
    cc.try_compile("ett_kernels").map_err(|e| format!("{e}\nthe C files of the kernels do not compile"))?;

    // After the archive, which needs them.
    if let Some(toolkit) = &toolkit {
        println!("cargo::rustc-cfg=ett_cuda");
        if cuda::has_driver(root) {
            println!("cargo::rustc-cfg=ett_gpu_here");
        }
        println!("cargo::rustc-link-search=native={}", toolkit.lib.display());
        println!("cargo::rustc-link-lib=static=cudart_static");
        for lib in ["stdc++", "dl", "rt", "pthread"] {
            println!("cargo::rustc-link-lib=dylib={lib}");
        }
    }
    Ok(())
}

/// The folders of `kernels` that belong to the library; cargo watches them. `build` belongs to the Makefile and `shim`
/// to the tests. Cargo notices a new folder by the change of the header or of `common` that comes with it.
fn folders(kernels: &Path) -> Result<Vec<PathBuf>> {
    println!("cargo::rerun-if-changed=kernels/Makefile");
    let mut all = entries(kernels)?;
    all.retain(|p| p.is_dir() && !p.ends_with("build") && !p.ends_with("shim"));
    for folder in &all {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    Ok(all)
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut all = entries(folder)?;
    all.retain(|p| p.extension().is_some_and(|e| e == extension));
    Ok(all)
}

/// The entries of a folder, sorted by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |e| format!("{} cannot be read: {e}", folder.display());
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        all.push(entry.map_err(unreadable)?.path());
    }
    all.sort();
    Ok(all)
}
