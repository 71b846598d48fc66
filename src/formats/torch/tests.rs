//! Pickles that no program writes, and what `write_torch` writes.

use super::super::tests::{Scratch, fixture};
use super::pickle::Pickle;
use super::{Tree, write_torch};
use crate::files;
use crate::formats::{Archive, Encoding, FileTensor};

/// An archive without compression, with storages of 64 bytes.
fn archive(pickle: &[u8]) -> Vec<u8> {
    entries(&[("x/data.pkl", pickle), ("x/data/0", &[1; 64]), ("x/data/1", &[2; 64])], 0)
}

fn entries(entries: &[(&str, &[u8])], method: u16) -> Vec<u8> {
    let (mut zip, mut list) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let at = zip.len() as u32;
        let mut header = [20, 0, method, 0, 0x21].map(u16::to_le_bytes).concat();
        header.extend(crc32fast::hash(bytes).to_le_bytes());
        header.extend([bytes.len() as u32; 2].map(u32::to_le_bytes).concat());
        header.extend([name.len() as u16, 0].map(u16::to_le_bytes).concat());
        zip.extend([b"PK\x03\x04", &*header, name.as_bytes(), bytes].concat());
        list.extend([b"PK\x01\x02\x14\0", &*header, &[0; 10], &at.to_le_bytes(), name.as_bytes()].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (start, length) = ((zip.len() as u32).to_le_bytes(), (list.len() as u32).to_le_bytes());
    zip.extend(list);
    zip.extend([b"PK\x05\x06\0\0\0\0", &count[..], &count, &length, &start, &[0; 2]].concat());
    zip
}

fn text(t: &str) -> Vec<u8> {
    [b"X", &(t.len() as u32).to_le_bytes()[..], t.as_bytes()].concat()
}

fn tuple(numbers: &[i32]) -> Vec<u8> {
    let all = numbers.iter().flat_map(|n| [b"J", &n.to_le_bytes()[..]].concat()).collect::<Vec<_>>();
    [b"(", &*all, b"t"].concat()
}

/// A tensor of floats in storage 0, which has 16.
fn tensor(offset: i32, dims: &[i32], strides: &[i32]) -> Vec<u8> {
    tensor_of("0", "FloatStorage", 16, offset, dims, strides)
}

fn tensor_of(key: &str, class: &str, count: i32, offset: i32, dims: &[i32], strides: &[i32]) -> Vec<u8> {
    let number = |n: i32| [b"J", &n.to_le_bytes()[..]].concat();
    let class = format!("ctorch\n{class}\n");
    let storage = [text("storage"), class.into(), text(key), text("cpu"), number(count)].concat();
    let end = [number(offset), tuple(dims), tuple(strides), b"\x89)tR".to_vec()].concat();
    [b"ctorch._utils\n_rebuild_tensor_v2\n((", &*storage, b"tQ", &end].concat()
}

/// A dictionary with one item.
fn item(key: &str, value: &[u8]) -> Vec<u8> {
    [b"\x80\x02}", &*text(key), value, b"s."].concat()
}

#[test]
fn nothing_is_executed() {
    let scratch = Scratch::new();
    for pickle in [
        [b"\x80\x02cos\nsystem\n", &*text("true"), b"\x85R."].concat(),
        [b"\x80\x04\x8c\x02os\x8c\x06system\x93", &*text("true"), b"\x85R."].concat(),
    ] {
        let e = scratch.refused(&archive(&pickle));
        assert!(e.contains("needs `os.system`") && e.contains("torch.save(torch.load("), "{e}");
        let old = std::fs::read(fixture("legacy.pth")).unwrap();
        let at = old.windows(11).position(|w| w == b"collections").unwrap() - 1;
        let e = scratch.refused(&[&old[..at], &pickle[2..]].concat());
        assert!(e.contains("needs `os.system`"), "{e}");
    }
    let e = scratch.refused(&archive(b"\x80\x02ctorch\nload\n."));
    assert!(e.contains("`torch.load`"), "{e}");
}

#[test]
fn places_of_tensors() {
    let scratch = Scratch::new();
    let open = |value: &[u8]| scratch.open(&archive(&item("t", value)));
    for (offset, dims, strides, want) in [
        (0, &[16][..], &[1][..], 0..64),
        (3, &[2, 3], &[3, 1], 12..36),
        (0, &[4, 4], &[1, 4], 0..64),
        (15, &[1, 1], &[99, 7], 60..64),
        (0, &[], &[], 0..4),
        (0, &[16, 1], &[1, 0], 0..64),
        (0, &[4, 4], &[0, 1], 0..16),
        (0, &[0, 5], &[5, 1], 0..0),
    ] {
        let bytes = self::archive(&item("t", &tensor(offset, dims, strides)));
        let storage = bytes.windows(64).position(|w| w == [1; 64]).unwrap();
        let archive = scratch.open(&bytes).unwrap();
        let info = &archive.tensors()["t"];
        assert_eq!(info.bytes, storage + want.start..storage + want.end, "{dims:?}");
        assert_eq!(archive.read("t").unwrap().values.len(), info.count());
    }
    for (offset, dims, strides, want) in [
        (1, &[16][..], &[1][..], "beyond its storage"),
        (-1, &[1], &[1], "unknown way"),
        (0, &[-1], &[1], "unknown way"),
        (0, &[2], &[-1], "unknown way"),
        (0, &[2, 2], &[1], "2 sizes, but 1 strides"),
        (0, &[4, 5], &[5, 1], "beyond its storage"),
        (0, &[2, 2], &[i32::MAX, 1], "beyond its storage"),
        (0, &[17], &[0], "repeats the 16 values"),
        (0, &[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0], "cannot be stored"),
        (0, &[0, 1 << 30, 1 << 30, 1 << 30], &[0, 0, 0, 0], "cannot be stored"),
        (0, &[1; 65], &[1; 65], "unknown way"),
    ] {
        let e = open(&tensor(offset, dims, strides)).err().unwrap().to_string();
        assert!(e.contains("`t`") && e.contains(want), "{e}");
    }
    for (key, class, count, want) in [
        ("2", "FloatStorage", 16, "`2`, which is missing"),
        ("0", "FloatStorage", 15, "`0` has 64 bytes"),
        ("0", "DoubleStorage", 16, "`0` has 64 bytes"),
        ("0", "ComplexFloatStorage", 8, "complex or quantized"),
        ("0", "FloatStorage", -16, "unknown way"),
    ] {
        let e = open(&tensor_of(key, class, count, 0, &[1], &[1])).err().unwrap().to_string();
        assert!(e.contains(want), "{e}");
    }
}

/// Old files say which part of a storage a view of it is.
#[test]
fn parts_of_storages() {
    let scratch = Scratch::new();
    let whole = tensor(2, &[6], &[1]);
    let at = whole.windows(2).position(|w| w == b"tQ").unwrap();
    let view = |from: i32, count: i32| {
        let view = [b"(", &*text("view"), &tuple(&[from, count])[1..]].concat();
        archive(&item("t", &[&whole[..at], &view, &whole[at..]].concat()))
    };
    let bytes = view(4, 8);
    let storage = bytes.windows(64).position(|w| w == [1; 64]).unwrap();
    let archive = scratch.open(&bytes).unwrap();
    assert_eq!(archive.tensors()["t"].bytes, storage + 24..storage + 48);
    assert!(scratch.refused(&view(4, 7)).contains("beyond its storage, which ends at 11"));
    assert!(scratch.refused(&view(4, 13)).contains("larger than the whole"));
    assert!(scratch.refused(&view(-1, 8)).contains("unknown way"));
}

#[test]
fn names_of_tensors() {
    let scratch = Scratch::new();
    let t = tensor(0, &[1], &[1]);
    let twice = [b"\x80\x02}(", &*text("a.b"), &t, &text("a"), b"}", &*text("b"), &t, b"su."].concat();
    assert!(scratch.refused(&archive(&twice)).contains("two tensors `a.b`"));
    let keys = [b"\x80\x02}(", &*tuple(&[1, 2]), &t, b"K\x05", &t, &text("l"), b"]", &t, b"au."].concat();
    let archive = scratch.open(&archive(&keys)).unwrap();
    assert_eq!(archive.tensors().keys().collect::<Vec<_>>(), ["#0", "5", "l.0"]);
    let alone = [b"\x80\x02", &*t, b"."].concat();
    let alone = scratch.open(&self::archive(&alone)).unwrap();
    assert_eq!(alone.tensors().keys().collect::<Vec<_>>(), ["tensor"]);
}

/// Values that contain themselves or one another, and ones nested without end.
#[test]
fn nested_without_end() {
    let scratch = Scratch::new();
    let e = scratch.refused(&archive(b"\x80\x02]q\0h\0a."));
    assert!(e.contains("contain one another"), "{e}");
    let e = scratch.refused(&archive(&[b"\x80\x02}q\0", &*text("self"), b"h\0s."].concat()));
    assert!(e.contains("contain one another"), "{e}");
    // Each dictionary has the one before twice.
    let mut doubled = b"\x80\x02}q\0".to_vec();
    for _ in 0..200 {
        doubled.extend([b"}(", &*text("a"), b"h\0", &text("b"), b"h\0uq\0"].concat());
    }
    doubled.push(b'.');
    let e = scratch.refused(&archive(&doubled));
    assert!(e.contains("contain one another"), "{e}");
    // Lists in lists: no recursion overflows the stack.
    let deep = [&b"\x80\x02"[..], &b"]".repeat(1 << 19), &b"a".repeat((1 << 19) - 1), b"."].concat();
    let deep = scratch.refused(&archive(&deep));
    assert!(
        deep.contains("more values than its size allows") || deep.contains("contain one another"),
        "{deep}"
    );
    let deep = [&b"\x80\x02"[..], &b"]q\0".repeat(1 << 17), &b"a".repeat((1 << 17) - 1), b"."].concat();
    assert!(scratch.refused(&archive(&deep)).contains("contain one another"));
    let shallow = [&b"\x80\x02"[..], &b"]q\0".repeat(1000), &b"a".repeat(999), b"."].concat();
    assert!(scratch.open(&archive(&shallow)).unwrap().about().is_null());
}

/// A long list is left out, not what is beside it.
#[test]
fn what_a_file_says_is_short() {
    let scratch = Scratch::new();
    let list = [b"](", &*b"K\x01".repeat(1 << 20), b"e"].concat();
    let long = [b"\x80\x02}(", &*text("long"), &list, &text("epoch"), b"K\x05u."].concat();
    let archive = scratch.open(&archive(&long)).unwrap();
    assert_eq!(archive.about(), &serde_json::json!({"epoch": 5}));
}

#[test]
fn wrong_pickles() {
    for (pickle, want) in [
        (&b""[..], "ends early"),
        (b"\x80", "ends early"),
        (b"\x80\x01.", "protocol 1"),
        (b"\x80\x06.", "protocol 6"),
        (b"\x80\x02.", "has not made"),
        (b"\x80\x02(.", "has not made"),
        (b"\x80\x02N(0.", "has not made"),
        (b"\x80\x02t.", "lacks a mark"),
        (b"\x80\x02h\x05.", "its value 5"),
        (b"\x80\x02Nr\xff\xff\xff\xff.", "numbers a value"),
        (b"\x80\x02NNa.", "not a list"),
        (b"\x80\x02NNNs.", "not a dictionary"),
        (b"\x80\x02}(Nu.", "a key without"),
        (b"\x80\x02N)R.", "not a function"),
        (b"\x80\x02N}b.", "sets attributes"),
        (b"\x80\x02X\xff\xff\xff\xffa", "ends early"),
        (b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xff", "ends early"),
        (b"\x80\x02X\x01\0\0\0\xff.", "UTF-8"),
        (b"\x80\x02\x8b\xff\xff\xff\xff.", "ends early"),
        (b"\x80\x02I1\n.", "operation 0x49"),
        (b"\x80\x02ctorch\nSize\n", "ends early"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments"),
    ] {
        let e = Pickle::read(pickle).err().expect("no pickle");
        assert!(e.contains(want), "{e}, wanted {want}");
    }
    // Python 2 makes ordered dictionaries of a list of pairs.
    let pairs = [b"\x80\x02ccollections\nOrderedDict\n](]", &*text("a"), b"aK\x01ae\x85R."].concat();
    let scratch = Scratch::new();
    assert_eq!(scratch.open(&archive(&pairs)).unwrap().about(), &serde_json::json!({"a": 1}));
}

#[test]
fn wrong_archives() {
    let scratch = Scratch::new();
    let values = b"\x80\x02}.";
    scratch.open(&entries(&[("any/data.pkl", values), ("any/byteorder", b"little")], 0)).unwrap();
    let big = entries(&[("x/data.pkl", values), ("x/byteorder", b"big")], 0);
    assert!(scratch.refused(&big).contains("lowest byte first"));
    let packed = entries(&[("x/data.pkl", values)], 8);
    assert!(scratch.refused(&packed).contains("`data.pkl` is compressed"));
    let other = entries(&[("x/model.json", b"{}")], 0);
    assert!(scratch.refused(&other).contains("without the `data.pkl`"));
}

fn written() -> Tree<'static> {
    let tensor = |encoding: Encoding, dims: &[usize]| {
        let count: usize = dims.iter().product();
        let bytes = encoding.bytes(count).unwrap();
        let bytes = move || Ok((0..bytes).map(|i| (i % 2) as u8).collect());
        Tree::Tensor(FileTensor { name: "t".into(), dims: dims.to_vec(), encoding, bytes: Box::new(bytes) })
    };
    let tensors = [
        ("a.weight", tensor(Encoding::F32, &[2, 3])),
        ("a.bias", tensor(Encoding::Bf16, &[3])),
        ("b", tensor(Encoding::F16, &[1, 2])),
        ("c", tensor(Encoding::I64, &[2])),
        ("d", tensor(Encoding::Bool, &[5])),
        ("scalar", tensor(Encoding::F64, &[])),
        ("empty", tensor(Encoding::U8, &[0, 4])),
    ];
    let tensors = tensors.into_iter().map(|(name, t)| (name.to_string(), t)).collect();
    Tree::Dict(vec![
        ("state_dict".into(), Tree::Dict(tensors)),
        ("epoch".into(), Tree::Int(3)),
        ("global_step".into(), Tree::Int(1 << 40)),
        ("negative".into(), Tree::Int(i64::MIN)),
        ("lr".into(), Tree::Float(0.5)),
        ("note".into(), Tree::Text("über".into())),
    ])
}

#[test]
fn what_is_written_for_torch_is_read() {
    let scratch = Scratch::new();
    files::replace(&scratch.0, |f| write_torch(f, written())).unwrap();
    let archive = Archive::open(&scratch.0).unwrap();
    let about = serde_json::json!({
        "epoch": 3, "global_step": 1u64 << 40, "negative": i64::MIN, "lr": 0.5, "note": "über",
    });
    assert_eq!(archive.about(), &about);
    assert_eq!(archive.tensors().len(), 7);
    for (name, info) in archive.tensors() {
        assert!(name.starts_with("state_dict.") && info.strides.is_none());
        assert!(info.bytes.start.is_multiple_of(64), "{name}: {:?}", info.bytes);
        let (encoding, raw) = archive.raw(name).unwrap().unwrap();
        assert_eq!(encoding.bytes(info.count()), Some(raw.len()));
        assert!(raw.iter().enumerate().all(|(i, &b)| usize::from(b) == i % 2), "{name}");
    }
    assert_eq!(archive.tensors()["state_dict.a.weight"].dims, [2, 3]);
    // Checksums are right, and the library agrees with the rest.
    let bytes = std::fs::read(&scratch.0).unwrap();
    let mut zip = zip::ZipArchive::new(std::io::Cursor::new(&bytes)).unwrap();
    for i in 0..zip.len() {
        std::io::copy(&mut zip.by_index(i).unwrap(), &mut std::io::sink()).unwrap();
    }
    zip.validate_header_consistency().unwrap();

    let short = FileTensor {
        name: "t".into(),
        dims: vec![2],
        encoding: Encoding::F32,
        bytes: Box::new(|| Ok(vec![0; 4])),
    };
    let e = files::replace(&scratch.0, |f| write_torch(f, Tree::Tensor(short))).unwrap_err();
    assert!(e.to_string().contains("`t` has 1 values, wanted 2"), "{e}");
    let quantized = FileTensor {
        name: "t".into(),
        dims: vec![32],
        encoding: Encoding::Q8_0,
        bytes: Box::new(|| Ok(Vec::new())),
    };
    let e = files::replace(&scratch.0, |f| write_torch(f, Tree::Tensor(quantized))).unwrap_err();
    assert!(e.to_string().contains("`t` has a type"), "{e}");
}

#[test]
fn names_that_cannot_be_shown() {
    let scratch = Scratch::new();
    let long = "n".repeat(2 << 20);
    let one = tensor(0, &[2], &[1]);
    for (name, want) in
        [("a\x1b[31m", r"control characters (`a\u{1b}[31m`)"), (&long, "is 2097152 bytes long")]
    {
        let e = scratch.refused(&archive(&item(name, &one)));
        assert!(e.contains(want) && e.len() < 2000, "{e}");
        // Of a tensor that is wrong, of a storage that is missing, and of a class.
        let outside = item(name, &tensor(0, &[17], &[1]));
        let missing = item("a", &tensor_of(name, "FloatStorage", 16, 0, &[2], &[1]));
        let class = [b"\x80\x02c", name.as_bytes(), b"\nx\n."].concat();
        for pickle in [outside, missing, class] {
            let e = scratch.refused(&archive(&pickle));
            assert!(e.len() < 2000 && !e.contains(char::is_control), "{e:?}");
        }
    }
}
