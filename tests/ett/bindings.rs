//! The Rust side of the C interface, `src/backend/cuda/ffi.rs`, against the C compiler. A test of tools/bindings
//! checks that bindgen makes this file from the header.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use crate::common::Scratch;

const HEADER: &str = "kernels/include/ett_kernels.h";
const BINDINGS: &str = "src/backend/cuda/ffi.rs";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn checked_in() -> String {
    fs::read_to_string(root().join(BINDINGS)).expect("the bindings are checked in")
}

/// The sizes, alignments, offsets and constants that the bindings contain, as C expressions with their values. The
/// bindings themselves assert that the Rust structs have them.
fn claims(bindings: &str) -> Vec<(String, String)> {
    let mut claims = Vec::new();
    for statement in bindings.split(';') {
        let words = statement.split_whitespace().collect::<Vec<_>>().join(" ");
        if let Some((name, value)) = words.strip_prefix("pub const ETT_").and_then(|c| c.split_once(" = ")) {
            let name = name.split(':').next().unwrap_or(name);
            claims.push((format!("ETT_{name}"), value.into()));
        }
        // `["Offset of field: ett_view::ld"][::std::mem::offset_of!(ett_view, ld) - 48usize]`
        let Some((_, claim)) = words.split_once("[\"") else { continue };
        let (what, rust) = claim.split_once("\"]").expect("an assertion");
        let value = rust.rsplit_once(" - ").and_then(|(_, v)| v.strip_suffix("usize]"));
        let value = value.expect("a number in an assertion").to_string();
        let c = if let Some(name) = what.strip_prefix("Size of ") {
            format!("sizeof({name})")
        } else if let Some(name) = what.strip_prefix("Alignment of ") {
            format!("_Alignof({name})")
        } else {
            let field = what.strip_prefix("Offset of field: ").expect("one of three assertions");
            let (name, field) = field.split_once("::").expect("a struct and its field");
            // Names that are Rust keywords end in an underscore in the bindings.
            format!("offsetof({name}, {})", field.strip_suffix('_').unwrap_or(field))
        };
        claims.push((c, value));
    }
    claims
}

#[test]
fn the_c_compiler_lays_structs_out_as_the_bindings_do() {
    let bindings = checked_in();
    let claims = claims(&bindings);
    let header = fs::read_to_string(root().join(HEADER)).expect("the header");
    let count = |what: &str| claims.iter().filter(|(c, _)| c.starts_with(what)).count();
    assert_eq!(count("sizeof("), header.matches("\ntypedef struct ett_").count(), "structs");
    let fields = bindings.lines().filter(|l| l.starts_with("    pub ") && l.ends_with(',')).count();
    assert_eq!(count("offsetof("), fields, "fields");

    let mut program = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"ett_kernels.h\"\nint main(void) {\n",
    );
    for (c, _) in &claims {
        writeln!(program, "    printf(\"%s\\t%lld\\n\", \"{c}\", (long long){c});").expect("a string");
    }
    program += "    return 0;\n}\n";
    let scratch = Scratch::new();
    let (source, binary) = (scratch.path("layout.c"), scratch.path("layout"));
    fs::write(&source, program).expect("a file can be written");
    let mut cc = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
    cc.arg("-std=c11").arg("-I").arg(root().join("kernels/include")).arg(&source).arg("-o").arg(&binary);
    assert!(
        cc.status().expect("a C compiler").success(),
        "the C compiler refuses an expression of the bindings"
    );
    let out = Command::new(&binary).output().expect("the program runs");
    let said = String::from_utf8(out.stdout).expect("text");
    let ours: String = claims.iter().map(|(c, value)| format!("{c}\t{value}\n")).collect();
    for (c, rust) in said.lines().zip(ours.lines()) {
        assert_eq!(c, rust, "the C compiler and the bindings");
    }
    assert_eq!(said, ours);
}
