//! The Rust side of the C interface, `src/backend/cuda/ffi.rs`: `cargo run --manifest-path tools/bindings/Cargo.toml`
//! generates it, `cargo test` with the same manifest compares it with the committed file.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::{env, fs};

const HEADER: &str = "kernels/include/ett_kernels.h";
const BINDINGS: &str = "src/backend/cuda/ffi.rs";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Generates the bindings of the current header. All settings of bindgen are here.
fn generate() -> Result<String, String> {
    if env::var_os("LIBCLANG_PATH").is_none() {
        let fetched = root().join(".cuda/clang/native");
        if !fetched.join("libclang.so").exists() {
            return Err(
                "there is no libclang: set LIBCLANG_PATH to its folder, or run tools/setup-cuda".into()
            );
        }
        // SAFETY: there is only one thread, and it reads the environment later.
        unsafe { env::set_var("LIBCLANG_PATH", fetched) };
    }
    let made = bindgen::builder()
        .header(root().join(HEADER).display().to_string())
        .raw_line("// From kernels/include/ett_kernels.h. To make it again: see tools/bindings.")
        .raw_line("#![allow(dead_code, missing_docs, non_camel_case_types)]")
        // Use cudarc's stream type, so that its streams are passed without a cast.
        .raw_line("pub use cudarc::driver::sys::CUstream_st;")
        .blocklist_type("CUstream_st")
        .allowlist_item("ett_.*|ETT_.*")
        // A string that no Rust code needs.
        .blocklist_item("ETT_VERSION")
        .prepend_enum_name(false)
        .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
        .merge_extern_blocks(true)
        .derive_copy(true)
        .derive_debug(true)
        .derive_default(true)
        .generate_comments(false)
        // Sizes and offsets as constant assertions, which a test of ett compares with the C compiler's.
        .layout_tests(true)
        .rust_target(bindgen::RustTarget::stable(90, 0).map_err(|e| e.to_string())?)
        .rust_edition(bindgen::RustEdition::Edition2024)
        .rustfmt_configuration_file(Some(root().join("rustfmt.toml")))
        .generate();
    Ok(made.map_err(|e| e.to_string())?.to_string())
}

fn main() -> ExitCode {
    let written =
        generate().and_then(|text| fs::write(root().join(BINDINGS), text).map_err(|e| e.to_string()));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

#[test]
fn bindings_are_those_of_the_header() {
    let made = generate().expect("bindings");
    let old = fs::read_to_string(root().join(BINDINGS)).expect("the bindings are checked in");
    let differs = made.lines().zip(old.lines()).position(|(a, b)| a != b);
    let line = differs.unwrap_or(made.lines().count().min(old.lines().count()));
    assert!(
        made == old,
        "{BINDINGS} is not what {HEADER} asks for, from line {} on: {:?}, wanted {:?}; \
         cargo run --manifest-path tools/bindings/Cargo.toml writes it",
        line + 1,
        old.lines().nth(line).unwrap_or_default(),
        made.lines().nth(line).unwrap_or_default(),
    );
}
