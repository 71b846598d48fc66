//! Files of other programs, and files that no program writes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::{Archive, Encoding, FileTensor, Format, Info, list, write_safetensors};
use crate::files;

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/files").join(name)
}

/// A file that ends with the test.
pub(super) struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("ett-formats-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Scratch(std::env::temp_dir().join(name))
    }

    /// Opens these bytes as a file.
    pub fn open(&self, bytes: &[u8]) -> crate::error::Result<Archive> {
        std::fs::write(&self.0, bytes).unwrap();
        Archive::open(&self.0)
    }

    /// The error for these bytes.
    pub fn refused(&self, bytes: &[u8]) -> String {
        self.open(bytes).err().expect("a file that cannot be used").to_string()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Compares a file with what the program that wrote it reads, exactly.
fn agrees(file: &str, format: Format) -> Archive {
    let text = std::fs::read_to_string(fixture("values.json")).unwrap();
    let all: Value = serde_json::from_str(&text).unwrap();
    let want = all[file].as_object().unwrap();
    let archive = Archive::open(&fixture(file)).unwrap();
    assert_eq!(archive.format(), format);
    assert!(archive.tensors().keys().eq(want.keys()), "{:?}", archive.tensors().keys());
    for (name, want) in want {
        let got = archive.read(name).unwrap();
        assert_eq!(json!(got.dims), want["shape"], "{file}, {name}");
        let values = want["values"].as_array().unwrap().iter().map(|x| x.as_str().unwrap().parse().unwrap());
        let values: Vec<f64> = values.collect();
        assert_eq!(got.values, values, "{file}, {name}");
        let (info, raw) = (&archive.tensors()[name], archive.raw(name).unwrap());
        assert_eq!(raw.is_none(), info.strides.is_some());
        if let Some((encoding, bytes)) = raw {
            assert_eq!(encoding.bytes(info.count()), Some(bytes.len()));
        }
    }
    archive
}

#[test]
fn files_of_torch() {
    for file in ["zip.pth", "legacy.pth", "protocol4.pth"] {
        let archive = agrees(file, Format::Torch);
        let top = if file == "protocol4.pth" { "" } else { "model." };
        let info = |name: &str| &archive.tensors()[&format!("{top}{name}")];
        assert_eq!(info("bf16").encoding, Encoding::Bf16);
        assert_eq!(info("bool").encoding, Encoding::Bool);
        assert_eq!(info("transposed").strides, Some(vec![1, 8]));
        assert_eq!(info("parameter").strides, None);
        assert_eq!(info("first").bytes.end, info("second").bytes.start, "one storage");
        if !top.is_empty() {
            assert_eq!(archive.about(), &json!({"epoch": 5}));
        }
    }
}

#[test]
fn a_checkpoint_of_lightning() {
    let archive = agrees("lightning.ckpt", Format::Torch);
    let about = archive.about();
    assert_eq!((&about["epoch"], &about["global_step"]), (&json!(3), &json!(1200)));
    let want = json!({
        "lr": 1e-3, "betas": [0.9, 0.95], "widths": [4, 8], "dtype": "torch.float32", "ids": [3], "size": [2, 3],
        "device": "cpu", "no": null, "large": "0x400000000000000000", "flag": true, "counts": {"a": 1},
    });
    assert_eq!(about["hyper_parameters"], want);
    assert!(archive.tensors().contains_key("optimizer_states.0.state.0.exp_avg"));
}

#[test]
fn files_of_gguf() {
    let archive = agrees("small.gguf", Format::Gguf);
    let about = archive.about();
    assert_eq!(about["general.architecture"], "qwen2");
    assert_eq!(about["qwen2.rope.freq_base"], 1e6);
    assert_eq!(about["tokenizer.ggml.tokens"], json!(["a", "\u{120}b", "c"]));
    assert_eq!(about["general.large"], 1u64 << 60);
    assert_eq!(archive.tensors()["q4_1"].encoding, Encoding::Q4_1);
}

#[test]
fn files_of_safetensors() {
    let archive = agrees("small.safetensors", Format::Safetensors);
    assert_eq!(archive.about(), &json!({"format": "pt"}));
}

/// A header of 640 bytes begins like a pickle.
#[test]
fn a_header_with_the_length_of_a_pickles_magic() {
    let scratch = Scratch::new();
    let header = format!("{:640}", r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#);
    let bytes = [&640u64.to_le_bytes()[..], header.as_bytes(), &[7]].concat();
    assert_eq!(scratch.open(&bytes).unwrap().read("a").unwrap().values, [7.0]);
}

/// Every beginning of a file is refused, or is another whole file: GGUF does not say where its last tensor ends to 32.
#[test]
fn truncated_files() {
    for file in ["zip.pth", "legacy.pth", "small.gguf", "small.safetensors"] {
        let bytes = std::fs::read(fixture(file)).unwrap();
        for end in 0..bytes.len() {
            match list(&bytes[..end]) {
                Err(e) => assert!(!e.is_empty()),
                Ok((format, contents)) => {
                    assert_eq!(format, Format::Gguf, "{file} of {end} bytes is not complete");
                    assert!(contents.tensors.values().all(|info| info.bytes.end <= end));
                }
            }
        }
    }
}

/// Every byte is changed once.
#[test]
fn damaged_files() {
    for file in ["zip.pth", "legacy.pth", "small.gguf", "small.safetensors"] {
        let mut bytes = std::fs::read(fixture(file)).unwrap();
        for at in 0..bytes.len() {
            for change in [0x81, 0xff, 1] {
                bytes[at] ^= change;
                let tensors =
                    list(&bytes).map_or_else(|_| Default::default(), |(_, contents)| contents.tensors);
                for info in tensors.values() {
                    assert_eq!(info.values(&bytes).unwrap().len(), info.count());
                }
                bytes[at] ^= change;
            }
        }
    }
}

/// Headers in files of zeros, which take no place on the disk.
#[test]
fn long_headers_of_gguf() {
    let scratch = Scratch::new();
    let refused = |header: &[u8], length: u64| {
        std::fs::write(&scratch.0, [b"GGUF\x03\0\0\0", header].concat()).unwrap();
        std::fs::File::options().write(true).open(&scratch.0).unwrap().set_len(length).unwrap();
        Archive::open(&scratch.0).err().expect("a file that cannot be used").to_string()
    };
    let counts = |tensors: u64, keys: u64| [tensors.to_le_bytes(), keys.to_le_bytes()].concat();
    for (tensors, want) in [(4_000_000, "has 4000000 tensors, wanted at most 262144"), (9, "without a name")]
    {
        let e = refused(&counts(tensors, 0), 96 << 20);
        assert!(e.contains(want), "{e}");
    }
    // A key without a name, whose value has the type 0; the next one has the same name.
    let e = refused(&counts(0, u64::MAX), 1 << 40);
    assert!(e.contains("has the key `` twice"), "{e}");
    // A key with a long text.
    let text = [&1u64.to_le_bytes()[..], b"k", &8u32.to_le_bytes(), &(65u64 << 20).to_le_bytes()].concat();
    let e = refused(&[counts(0, 1), text].concat(), 66 << 20);
    assert!(e.contains("has a header of more than 64 MiB"), "{e}");
}

/// Whatever a file says, a message is a short line.
#[test]
fn names_that_cannot_be_shown() {
    let scratch = Scratch::new();
    let long = "n".repeat(2 << 20);
    let entry = |name: &str, kind: &str| {
        let name = serde_json::to_string(name).unwrap();
        safetensors(&format!(r#"{{{name}:{{"dtype":"{kind}","shape":[1],"data_offsets":[0,1]}}}}"#), 1)
    };
    let gguf =
        |name: &str, kind| Gguf { tensors: vec![(name.into(), vec![1], kind, 0)], ..Gguf::small() }.bytes();
    for (name, want) in [
        ("a\x1b[31mb", r"control characters (`a\u{1b}[31mb`)"),
        ("a\x1b]0;b\x07", r"control characters (`a\u{1b}]0;b\u{7}`)"),
        ("a\nb: loaded", r"control characters (`a\nb: loaded`)"),
        ("a\u{202e}b", r"control characters (`a\u{202e}b`)"),
        (&long, "is 2097152 bytes long (`nnn"),
    ] {
        for bytes in [entry(name, "U8"), gguf(name, 0), entry(name, "U7"), entry(name, "F32"), gguf(name, 12)]
        {
            let e = scratch.refused(&bytes);
            assert!(e.len() < 2000 && !e.contains(|c: char| c.is_control() || c == '\u{202e}'), "{e:?}");
        }
        for bytes in [entry(name, "U8"), gguf(name, 0)] {
            let e = scratch.refused(&bytes);
            assert!(e.contains(want) && e.ends_with("; rename it"), "{e}");
        }
    }
    let keys = vec![("k\n".repeat(1 << 20), 77, vec![])];
    let e = scratch.refused(&Gguf { keys, ..Gguf::small() }.bytes());
    assert!(e.len() < 2000 && !e.contains('\n') && e.ends_with("has the unknown type 77"), "{e}");
    // Other characters are names like any.
    scratch.open(&entry(&"é\u{301} \"'\\".repeat(100), "U8")).unwrap();
}

#[test]
fn other_formats_are_named() {
    let scratch = Scratch::new();
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n";
    let e = scratch.refused(pointer.as_bytes());
    assert!(e.contains("is a pointer of Git LFS") && e.contains("git lfs pull"), "{e}");
    for beginning in [
        &b"<!DOCTYPE html>\n<html>"[..],
        b"\x89PNG\r\n\x1a\n",
        b"\x89HDF\r\n\x1a\n",
        b"\n\n\n\n",
        b"\x02\0\0\0\0\0\0\0[]",
    ] {
        let mut bytes = beginning.to_vec();
        bytes.resize(100_022, b' ');
        let e = scratch.refused(&bytes);
        assert!(e.contains("is in none of the formats safetensors, PyTorch and GGUF"), "{e}");
    }
}

/// Types of safetensors beyond floats and signed integers: what is not read hides nothing else.
#[test]
fn types_that_are_only_listed() {
    let scratch = Scratch::new();
    let header = r#"{
        "four":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]},
        "six":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[3,6]},
        "eight":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[6,8]},
        "short":{"dtype":"U16","shape":[2],"data_offsets":[8,12]},
        "int":{"dtype":"U32","shape":[1],"data_offsets":[12,16]},
        "long":{"dtype":"U64","shape":[1],"data_offsets":[16,24]}
    }"#;
    let mut bytes = safetensors(header.trim(), 0);
    bytes.extend([[1; 8].as_slice(), &[0xff; 8], &[0, 0, 0, 0, 0, 0, 0, 0x80]].concat());
    let archive = scratch.open(&bytes).unwrap();
    for (name, values) in [("short", &[65535.0; 2][..]), ("int", &[4294967295.0]), ("long", &[2f64.powi(63)])]
    {
        assert_eq!(archive.read(name).unwrap().values, values, "{name}");
        let encoding = archive.tensors()[name].encoding;
        assert!(encoding.is_read() && !encoding.is_float());
        assert_eq!(encoding.encode(values).unwrap(), archive.raw(name).unwrap().unwrap().1, "{name}");
    }
    for (name, kind) in [("four", "F4"), ("six", "F6_E2M3"), ("eight", "F8_E4M3")] {
        let encoding = archive.tensors()[name].encoding;
        assert_eq!((encoding.name(), encoding.is_read(), encoding.is_float()), (kind, false, false));
        let e = archive.read(name).expect_err("values that are not read").to_string();
        assert!(e.ends_with(&format!("`{name}` has type {kind}, which ett does not read")), "{e}");
        assert!(encoding.encode(&[0.0]).is_err());
    }
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn wrong_headers_of_safetensors() {
    let scratch = Scratch::new();
    let one = r#""a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let deep = format!("{{{one},\"b\":{}", "[".repeat(1 << 20));
    let long = format!(r#"{{"a":{{"dtype":"U8","shape":[{}1],"data_offsets":[0,1]}}}}"#, "1,".repeat(64));
    let huge = r#"{"a":{"dtype":"U8","shape":[0,4611686018427387904,8],"data_offsets":[0,0]}}"#;
    let gap = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    let overlap = format!(r#"{{{one},"b":{{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}}}"#);
    let back = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,0]}}"#;
    for (header, data, want) in [
        (format!("{{{one},{one}}}"), 1, "wanted 1 bytes from 1"),
        (
            format!("{{{one},\"a\":{{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}}}"),
            2,
            "occurs twice",
        ),
        (r#"{"__metadata__":{},"__metadata__":{}}"#.into(), 0, "duplicate"),
        (deep, 1, "expected value"),
        (long, 1, "at most 64 sizes"),
        (huge.into(), 0, "cannot be stored"),
        (gap.into(), 2, "wanted 1 bytes from 0"),
        (overlap, 2, "`b` [2] is at 0 to 2, wanted 2 bytes from 1"),
        (back.into(), 1, "`a` [1]"),
        (format!("{{{one}}}"), 2, "wanted"),
    ] {
        let e = scratch.refused(&safetensors(&header, data));
        assert!(e.contains(want) && e.len() < 400, "{e}");
    }
    for length in [u64::MAX, 100_000_001, 1 << 20] {
        let e = scratch.refused(&length.to_le_bytes());
        assert!(e.contains("too few"), "{e}");
    }
    assert!(scratch.refused(b"").contains("is empty"));
    // No tensors, and tensors without values.
    scratch.open(&safetensors("{}", 0)).unwrap();
    let none = r#"{"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}}"#;
    assert_eq!(scratch.open(&safetensors(none, 0)).unwrap().read("a").unwrap().dims, [0, 3]);
}

#[test]
fn what_is_written_is_read() {
    let scratch = Scratch::new();
    let tensor = |name: &str, dims: &[usize], encoding| FileTensor {
        name: name.into(),
        dims: dims.to_vec(),
        encoding,
        bytes: Box::new(|| Ok(vec![1; 12])),
    };
    let tensors = || vec![tensor("a", &[12], Encoding::U8), tensor("b", &[3], Encoding::F32)];
    files::replace(&scratch.0, |f| write_safetensors(f, tensors(), Default::default())).unwrap();
    let archive = Archive::open(&scratch.0).unwrap();
    assert_eq!(archive.raw("b").unwrap(), Some((Encoding::F32, &[1; 12][..])));
    let bad = vec![tensor("a", &[2], Encoding::F32)];
    let e = files::replace(&scratch.0, |f| write_safetensors(f, bad, Default::default())).unwrap_err();
    assert!(e.to_string().contains("`a` has 3 values, wanted 2"), "{e}");
}

/// A file of GGUF, for mistakes of all kinds.
#[derive(Clone)]
struct Gguf {
    version: u32,
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: usize,
}

impl Gguf {
    fn small() -> Self {
        Gguf { version: 3, keys: Vec::new(), tensors: vec![("a".into(), vec![2], 0, 0)], data: 64 }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut all = [b"GGUF", &self.version.to_le_bytes()[..]].concat();
        let text = |all: &mut Vec<u8>, t: &str| {
            all.extend((t.len() as u64).to_le_bytes());
            all.extend(t.as_bytes());
        };
        all.extend([self.tensors.len() as u64, self.keys.len() as u64].map(u64::to_le_bytes).concat());
        for (key, kind, value) in &self.keys {
            text(&mut all, key);
            all.extend(kind.to_le_bytes());
            all.extend(value);
        }
        for (name, dims, kind, offset) in &self.tensors {
            text(&mut all, name);
            all.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|d| all.extend(d.to_le_bytes()));
            all.extend(kind.to_le_bytes());
            all.extend(offset.to_le_bytes());
        }
        all.resize(all.len().next_multiple_of(32) + self.data, 0);
        all
    }
}

#[test]
fn wrong_files_of_gguf() {
    let scratch = Scratch::new();
    let good = Gguf::small();
    let info = scratch.open(&good.bytes()).unwrap().tensors()["a"].clone();
    assert_eq!(info, Info { encoding: Encoding::F32, dims: vec![2], strides: None, bytes: 64..72 });
    let tensors = |list: &[(&str, &[u64], u32, u64)]| {
        list.iter().map(|&(n, d, k, o)| (n.into(), d.to_vec(), k, o)).collect::<Vec<_>>()
    };
    let key = |name: &str, kind, value: &[u8]| vec![(name.to_string(), kind, value.to_vec())];
    let list = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let nested = list(9, 1).repeat(9);
    let cases = [
        (Gguf { version: 1, ..good.clone() }, "version 1"),
        (Gguf { version: 3 << 24, ..good.clone() }, "highest byte first"),
        (Gguf { version: 0, ..good.clone() }, "version 0, wanted 2 or 3"),
        (Gguf { tensors: tensors(&[("", &[1], 0, 0)]), ..good.clone() }, "a tensor without a name"),
        (Gguf { keys: key("k", 77, &[]), ..good.clone() }, "`k` has the unknown type 77"),
        (Gguf { keys: key("k", 9, &list(0, u64::MAX)), ..good.clone() }, "more than there are bytes"),
        (Gguf { keys: key("k", 9, &nested), ..good.clone() }, "`k` has the unknown type 9"),
        (Gguf { keys: key("k", 8, &u64::MAX.to_le_bytes()), ..good.clone() }, "ends within"),
        (Gguf { keys: [key("k", 0, &[1]), key("k", 0, &[1])].concat(), ..good.clone() }, "`k` twice"),
        (Gguf { keys: key("general.alignment", 4, &[0; 4]), ..good.clone() }, "a power of two"),
        (Gguf { tensors: tensors(&[("q", &[32], 12, 0)]), ..good.clone() }, "`q` has the type Q4_K"),
        (Gguf { tensors: tensors(&[("q", &[16, 2], 8, 0)]), ..good.clone() }, "cannot be stored"),
        (Gguf { tensors: tensors(&[("q", &[1 << 40, 1 << 40], 0, 0)]), ..good.clone() }, "cannot be stored"),
        (
            Gguf { tensors: tensors(&[("q", &[1 << 40, 0, 1 << 40], 0, 0)]), ..good.clone() },
            "cannot be stored",
        ),
        (Gguf { tensors: tensors(&[("q", &[17], 0, 0)]), ..good.clone() }, "beyond its end"),
        (Gguf { tensors: tensors(&[("q", &[1], 0, u64::MAX - 31)]), ..good.clone() }, "beyond its end"),
        (Gguf { tensors: tensors(&[("q", &[1], 0, 4)]), ..good.clone() }, "no multiple of 32"),
        (Gguf { tensors: tensors(&[("a", &[1], 0, 0), ("b", &[1], 0, 0)]), ..good.clone() }, "overlaps"),
        (
            Gguf { tensors: tensors(&[("a", &[1], 0, 0), ("a", &[1], 0, 32)]), ..good.clone() },
            "two tensors `a`",
        ),
        (Gguf { tensors: tensors(&[("a", &[1; 65], 0, 0)]), ..good.clone() }, "65 dimensions"),
    ];
    for (file, want) in cases {
        let e = scratch.refused(&file.bytes());
        assert!(e.contains(want), "{e}, wanted {want}");
    }
}
