//! The part of the kernels' C interface, `kernels/include/ett_kernels.h`, that every build contains. The header mirrors
//! [`super::KERNELS`] and its enumerations; a test here compares them.

use std::ffi::{CStr, c_char};

// SAFETY: the declarations are those of the header.
unsafe extern "C" {
    fn ett_status_name(code: i32) -> *const c_char;
    fn ett_abi_version() -> i32;
    fn ett_version() -> *const c_char;
    fn ett_targets() -> *const c_char;
    fn ett_implementations(kernel: *const c_char) -> *const c_char;
}

/// The name of a launcher's status code; "unknown status" for any other number.
pub fn status_name(code: i32) -> &'static str {
    // SAFETY: the C function returns a string literal for every number.
    unsafe { CStr::from_ptr(ett_status_name(code)) }.to_str().unwrap_or("unknown status")
}

/// The interface version of the linked library.
pub fn version() -> i32 {
    // SAFETY: it takes nothing and returns a constant.
    unsafe { ett_abi_version() }
}

/// The version of the linked library.
pub fn library_version() -> &'static str {
    // SAFETY: the C function returns a string literal.
    unsafe { CStr::from_ptr(ett_version()) }.to_str().unwrap_or_default()
}

/// The compute capabilities that the linked library was compiled for, separated by spaces; "" without kernels.
pub fn targets() -> &'static str {
    // SAFETY: the C function returns a string literal.
    unsafe { CStr::from_ptr(ett_targets()) }.to_str().unwrap_or_default()
}

/// The names of a kernel's implementations for a GPU; none if there is no kernel of this name.
pub fn implementations(kernel: &str) -> Vec<&'static str> {
    let Ok(name) = std::ffi::CString::new(kernel) else { return Vec::new() };
    // SAFETY: the argument is a string; the C function returns a string literal or null.
    let found = unsafe { ett_implementations(name.as_ptr()) };
    if found.is_null() {
        return Vec::new();
    }
    // SAFETY: not null, so a string literal.
    unsafe { CStr::from_ptr(found) }.to_str().unwrap_or_default().split(' ').collect()
}

#[cfg(test)]
mod tests {
    use super::super::spec::{FieldSpec, Kind};
    use super::super::{Access, DType, KERNELS, Metric, Slot, Unary};
    use super::*;

    const HEADER: &str = include_str!("../../kernels/include/ett_kernels.h");

    /// A struct of arguments: its kernel and its fields.
    #[derive(Debug, PartialEq)]
    struct Struct {
        kernel: String,
        fields: Vec<Field>,
    }

    /// Name, C type, the access stated in the comment of a view, and the rest of the comment.
    #[derive(Debug, PartialEq)]
    struct Field {
        name: String,
        ty: String,
        access: String,
        comment: String,
    }

    impl Field {
        /// Whether the header agrees with the table: the comment must start with the rules of a tensor, or end with
        /// those of a number.
        fn says(&self, want: &FieldSpec) -> bool {
            let text = want.text;
            *self == Field { comment: self.comment.clone(), ..in_c(want) }
                && match want.tensor {
                    Some(_) => self.comment == text || self.comment.starts_with(&format!("{text}; ")),
                    None => text.is_empty() || self.comment.ends_with(&format!("; {text}")),
                }
        }
    }

    /// The argument structs of a header in order, each followed by its launcher; anything else is an error.
    fn parse(header: &str) -> Result<Vec<Struct>, String> {
        let mut all: Vec<Struct> = Vec::new();
        let mut open: Option<Struct> = None;
        let mut waiting: Vec<String> = Vec::new();
        for (n, line) in header.lines().map(str::trim).enumerate() {
            let bad = |what: &str| Err(format!("line {}: {what}: {line}", n + 1));
            if let Some(current) = &mut open {
                if let Some(end) = line.strip_prefix("} ") {
                    if end != format!("ett_{}_args;", current.kernel) {
                        return bad("another name than at the start of the struct");
                    }
                    let k = &current.kernel;
                    waiting = vec![
                        format!(
                            "ETT_API int32_t ett_{k}(const ett_{k}_args* args, const ett_launch* launch);"
                        ),
                        format!("ETT_API int64_t ett_{k}_workspace(const ett_{k}_args* args);"),
                    ];
                    all.extend(open.take());
                } else if let Some(more) = line.strip_prefix("//") {
                    let Some(field) = current.fields.last_mut() else {
                        return bad("a comment before the first field");
                    };
                    field.comment = format!("{} {}", field.comment, in_numbers(more));
                } else {
                    let Some((code, comment)) = line.split_once("//") else {
                        return bad("a field without comment");
                    };
                    let Some((ty, name)) = code.trim().trim_end_matches(';').rsplit_once(' ') else {
                        return bad("not a field");
                    };
                    let view = if ty == "ett_view" { comment.split_whitespace().next() } else { None };
                    let access = view.unwrap_or_default().to_string();
                    let comment = in_numbers(comment.trim().strip_prefix(&access).unwrap_or_default());
                    current.fields.push(Field { name: name.into(), ty: ty.into(), access, comment });
                }
            } else if let Some(launcher) = waiting.pop() {
                if line != launcher {
                    return bad(&format!("wanted {launcher}"));
                }
            } else if line.starts_with("ETT_API int") && line.contains("_args*") {
                return bad("a launcher that does not follow its struct");
            } else if let Some(kernel) =
                line.strip_prefix("typedef struct ett_").and_then(|l| l.strip_suffix("_args {"))
            {
                open = Some(Struct { kernel: kernel.into(), fields: Vec::new() });
            }
        }
        match open {
            Some(s) => Err(format!("the struct of {} does not end", s.kernel)),
            None => Ok(all),
        }
    }

    /// A comment with the values of the constants that it names.
    fn in_numbers(comment: &str) -> String {
        let value = |name: &str| constant(name).to_string();
        let known = ["ETT_STATE_LEN", "ETT_STATE_GROUPS"];
        known.iter().fold(comment.trim().to_string(), |text, name| text.replace(name, &value(name)))
    }

    /// A field as the header has to declare it, without comment.
    fn in_c(field: &FieldSpec) -> Field {
        let (ty, access) = match field.kind {
            Kind::Tensor { access, optional } => {
                let access = match access {
                    Access::Read => "in",
                    Access::Write => "out",
                    Access::Accumulate => "add",
                };
                ("ett_view", format!("{access}{}", if optional { "?" } else { "" }))
            }
            Kind::Count => ("int64_t", String::new()),
            Kind::Seed => ("uint64_t", String::new()),
            Kind::Flag | Kind::Metric => ("int32_t", String::new()),
            Kind::Real => ("double", String::new()),
            Kind::Unary => ("ett_unary", String::new()),
        };
        Field { name: field.name.into(), ty: ty.into(), access, comment: String::new() }
    }

    /// Where a header and the table of kernels first differ.
    fn difference(header: &str) -> Option<String> {
        let found = match parse(header) {
            Ok(found) => found,
            Err(e) => return Some(e),
        };
        for (i, kernel) in KERNELS.iter().enumerate() {
            let Some(s) = found.get(i).filter(|s| s.kernel == kernel.name) else {
                return Some(format!("struct {i} is {:?}, wanted that of {}", found.get(i), kernel.name));
            };
            if s.fields.len() != kernel.fields.len() {
                return Some(format!(
                    "{} has {} fields, wanted {}",
                    s.kernel,
                    s.fields.len(),
                    kernel.fields.len()
                ));
            }
            if let Some((f, want)) = s.fields.iter().zip(kernel.fields).find(|(f, want)| !f.says(want)) {
                return Some(format!(
                    "{}: {f:?}, wanted {:?} that says `{}`",
                    s.kernel,
                    in_c(want),
                    want.text
                ));
            }
        }
        (found.len() > KERNELS.len()).then(|| format!("{} structs, wanted {}", found.len(), KERNELS.len()))
    }

    /// The number that the header gives a constant.
    fn constant(name: &str) -> i64 {
        let number = HEADER.lines().find_map(|l| {
            let l = l.trim().strip_prefix("#define ").unwrap_or(l.trim());
            let rest = l.strip_prefix(name)?.strip_prefix([' '])?.trim_start_matches(['=', ' ']);
            rest.split([',', ' ', '/']).next()?.parse().ok()
        });
        number.unwrap_or_else(|| panic!("the header has no {name}"))
    }

    #[test]
    fn the_library_says_what_it_is() {
        assert!(HEADER.contains(&format!("#define ETT_VERSION \"{}\"\n", env!("CARGO_PKG_VERSION"))));
        assert_eq!(library_version(), env!("CARGO_PKG_VERSION"));
        assert_eq!(targets().is_empty(), !cfg!(ett_cuda));
        for kernel in KERNELS {
            assert!(!implementations(kernel.name).is_empty(), "{}", kernel.name);
        }
        assert!(implementations("nothing").is_empty() && implementations("a\0b").is_empty());
    }

    #[test]
    fn header_mirrors_the_contract() {
        assert_eq!(difference(HEADER), None);
    }

    #[test]
    fn a_change_of_the_header_is_seen() {
        let adamw = "    ett_view master;        // add  [n]; acc; updated\n    ett_view grad;          // in   [n]; acc\n";
        let (first, second) = adamw.split_at(adamw.find("    ett_view grad").expect("second line"));
        let swapped = format!("{second}{first}");
        for (what, from, to) in [
            ("swapped fields", adamw, &swapped[..]),
            ("a field of another name", "ett_view gate_up; ", "ett_view up_gate; "),
            ("a field of another type", "    int64_t kv_heads; ", "    int32_t kv_heads; "),
            ("another access", "ett_view running_mean;  // add ", "ett_view running_mean;  // out "),
            ("an optional field required", "// in?  [N, C]; act; gradient", "// in   [N, C]; act; gradient"),
            ("another shape", "// out  [N, C]; act", "// out  [N, D]; act"),
            ("another element type", "// out  [B, G]; acc; without", "// out  [B, G]; act; without"),
            ("a rule left out", "; without gaps; G divides C", "; without gaps"),
            ("another rule of a number", "head dimension; even; at least 2", "head dimension; at least 2"),
            ("a missing field", "    double theta; ", "    // double theta; "),
            ("a new field", "    double theta; ", "    double theta2;  // new\n    double theta; "),
            ("a missing comment", "ett_view gate_up;       //", "ett_view gate_up;    "),
            ("another struct", "typedef struct ett_rope_args {", "typedef struct ett_rop_args {"),
            ("another end of a struct", "} ett_rope_args;", "} ett_rop_args;"),
            (
                "a missing launcher",
                "ETT_API int32_t ett_rope(const ett_rope_args* args, const ett_launch* launch);\n",
                "",
            ),
            ("a missing query", "ETT_API int64_t ett_rope_workspace(const ett_rope_args* args);\n", ""),
            (
                "another launcher",
                "int32_t ett_rope(const ett_rope_args*",
                "int32_t ett_rope(const ett_add_args*",
            ),
        ] {
            assert!(HEADER.contains(from), "{what}: the header has no {from:?}");
            assert!(difference(&HEADER.replacen(from, to, 1)).is_some(), "{what}");
        }
        let start = HEADER.find("typedef struct ett_matmul_args").expect("the first struct");
        let end = HEADER[start..].find("ett_launch* launch);\n").expect("its launcher") + start + 21;
        let (head, matmul, tail) = (&HEADER[..start], &HEADER[start..end], &HEADER[end..]);
        assert!(difference(&format!("{head}{tail}")).is_some(), "a missing kernel");
        let extra = matmul.replace("ett_matmul", "ett_matmul2");
        assert!(difference(&format!("{HEADER}{extra}")).is_some(), "an extra kernel");
        let next = tail.find("ett_launch* launch);\n").expect("the second kernel") + 21;
        let moved = format!("{head}{}{matmul}{}", &tail[..next], &tail[next..]);
        assert!(difference(&moved).is_some(), "kernels in another order");
    }

    #[test]
    fn constants_mirror_the_enumerations() {
        for (name, value) in [
            ("ETT_F64", DType::F64),
            ("ETT_F32", DType::F32),
            ("ETT_BF16", DType::Bf16),
            ("ETT_I32", DType::I32),
            ("ETT_U8", DType::U8),
        ] {
            assert_eq!(constant(name), value as i64, "{name}");
        }
        for (name, value) in [("ETT_METRIC_DOT", Metric::Dot), ("ETT_METRIC_L2", Metric::L2)] {
            assert_eq!(constant(name), value as i64, "{name}");
        }
        for f in [Unary::Silu, Unary::Gelu, Unary::Relu, Unary::LeakyRelu(0.2), Unary::GeluTanh] {
            let (name, value) = match f {
                Unary::Silu => ("ETT_UNARY_SILU", 0),
                Unary::Gelu => ("ETT_UNARY_GELU", 1),
                Unary::Relu => ("ETT_UNARY_RELU", 2),
                Unary::LeakyRelu(_) => ("ETT_UNARY_LEAKY_RELU", 3),
                Unary::GeluTanh => ("ETT_UNARY_GELU_TANH", 4),
            };
            assert_eq!(constant(name), value, "{name}");
        }
        let at = |name: &str| constant(&format!("ETT_STATE_{name}")) as usize;
        assert_eq!(at("GROUPS"), Slot::GROUPS);
        assert_eq!(at("LOSSES"), Slot::LOSSES);
        assert_eq!(at("LEN"), Slot::LEN);
        for g in [0, 1, Slot::GROUPS - 1] {
            let row = g * at("STRIDE");
            assert_eq!(row + at("RATE"), Slot::Rate(g).index());
            assert_eq!(row + at("CLIP"), Slot::Clip(g).index());
        }
        assert_eq!(at("WEIGHT"), Slot::Weight(0).index());
        assert_eq!(at("WEIGHT") + 5, Slot::Weight(5).index());
        assert_eq!(at("INV_TOKENS"), Slot::InvTokens.index());
        assert_eq!(at("INV_CODES"), Slot::InvCodes.index());
        assert_eq!(at("INV_PICTURES"), Slot::InvPictures.index());
        assert_eq!(at("INV_ELEMENTS"), Slot::InvElements.index());
        assert_eq!(at("INV_PATCHES"), Slot::InvPatches.index());
        assert_eq!(at("INV_VISUAL"), Slot::InvVisual.index());
    }

    #[test]
    fn status_codes_have_names() {
        for (name, text) in [
            ("ETT_OK", "ok"),
            ("ETT_BAD_ARGUMENT", "bad argument"),
            ("ETT_UNSUPPORTED", "unsupported"),
            ("ETT_CUDA_ERROR", "CUDA error"),
        ] {
            assert_eq!(status_name(constant(name) as i32), text);
        }
        assert_eq!(status_name(-1), "unknown status");
        assert_eq!(status_name(i32::MAX), "unknown status");
        assert_eq!(i64::from(version()), constant("ETT_ABI_VERSION"));
    }
}
