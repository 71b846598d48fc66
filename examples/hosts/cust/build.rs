//! Links the kernels, and makes their declarations from the header with bindgen.
//!
//! | variable | meaning |
//! | --- | --- |
//! | `ETT_KERNELS` | the folder of `libett_kernels.a`, by default `kernels/build`, where `make -C kernels` puts it |
//! | `CUDA_HOME` | CUDA with `libcudart_static.a`, by default `.cuda/nvidia/cu13` or `/usr/local/cuda` |
//! | `LIBCLANG_PATH` | the folder of libclang, by default `.cuda/clang/native`, if it exists |

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    if let Err(error) = build() {
        println!("cargo::error={error}");
    }
}

fn build() -> Result<(), String> {
    let variable = |name: &str| {
        println!("cargo::rerun-if-env-changed={name}");
        env::var_os(name).map(PathBuf::from)
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../..");
    let fetched = root.join(".cuda/nvidia/cu13");
    let default = if fetched.is_dir() { fetched } else { "/usr/local/cuda".into() };
    let cuda = variable("CUDA_HOME").unwrap_or(default);
    let kernels = variable("ETT_KERNELS").unwrap_or(root.join("kernels/build"));
    let library = kernels.join("libett_kernels.a");
    if !library.is_file() {
        return Err(format!(
            "there is no {}: run `make -C kernels`, or set ETT_KERNELS to the library's folder",
            library.display()
        ));
    }
    let Some(runtime) = ["lib64", "lib"].map(|l| cuda.join(l)).into_iter().find(|l| has_runtime(l)) else {
        return Err(format!(
            "{} has no libcudart_static.a: run tools/setup-cuda, or set CUDA_HOME",
            cuda.display()
        ));
    };
    println!("cargo::rerun-if-changed={}", library.display());
    println!("cargo::rustc-link-search=native={}", kernels.display());
    println!("cargo::rustc-link-search=native={}", runtime.display());
    for lib in ["static=ett_kernels", "static=cudart_static", "stdc++", "dl", "rt", "pthread"] {
        println!("cargo::rustc-link-lib={lib}");
    }

    let header = root.join("kernels/include/ett_kernels.h");
    println!("cargo::rerun-if-changed={}", header.display());
    let libclang = root.join(".cuda/clang/native");
    if variable("LIBCLANG_PATH").is_none() && libclang.is_dir() {
        // SAFETY: there is only one thread, and bindgen reads the environment later.
        unsafe { env::set_var("LIBCLANG_PATH", libclang) };
    }
    let made = bindgen::builder()
        .header(header.display().to_string())
        .allowlist_item("ett_.*|ETT_.*")
        .prepend_enum_name(false)
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .derive_default(true)
        .generate_comments(false)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .generate()
        .map_err(|e| e.to_string())?;
    let out = variable("OUT_DIR").ok_or("cargo sets OUT_DIR, but it is absent")?;
    fs::write(out.join("ett_kernels.rs"), made.to_string()).map_err(|e| e.to_string())
}

fn has_runtime(folder: &Path) -> bool {
    folder.join("libcudart_static.a").is_file()
}
