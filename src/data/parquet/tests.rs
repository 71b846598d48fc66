//! Tests with small tables.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{
    EnabledStatistics, WriterProperties, WriterPropertiesBuilder, WriterVersion,
};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;
use crate::data::draw::Split;
use crate::data::image::Image;
use crate::data::save_png;
use crate::data::scratch::Scratch;

/// The values of a column in a row group, with definition and repetition levels.
type Column = (Vec<Vec<u8>>, Vec<i16>, Vec<i16>);

/// Pictures of Hugging Face, with names and captions, and a number.
const PICTURES: &str = "message m { optional group image { optional binary bytes; optional binary path (UTF8); } \
                        optional binary text (UTF8); }";

fn bytes(schema: &str, props: WriterPropertiesBuilder, groups: &[Vec<Column>]) -> Vec<u8> {
    let mut out = Vec::new();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(&mut out, schema, Arc::new(props.build())).unwrap();
    for group in groups {
        let mut rows = writer.next_row_group().unwrap();
        for (values, def, rep) in group {
            let mut column = rows.next_column().unwrap().unwrap();
            let (def, rep) =
                (Some(&def[..]).filter(|d| !d.is_empty()), Some(&rep[..]).filter(|r| !r.is_empty()));
            let values: Vec<ByteArray> = values.iter().cloned().map(ByteArray::from).collect();
            // One value at a time, so that pages end where their limits say.
            if rep.is_none() && def.is_none() {
                for value in values.chunks(1) {
                    column.typed::<ByteArrayType>().write_batch(value, None, None).unwrap();
                }
            } else {
                column.typed::<ByteArrayType>().write_batch(&values, def, rep).unwrap();
            }
            column.close().unwrap();
        }
        rows.close().unwrap();
    }
    writer.close().unwrap();
    out
}

fn props() -> WriterPropertiesBuilder {
    WriterProperties::builder().set_compression(Compression::SNAPPY)
}

/// A PNG file of one row of pixels of this colour.
fn png(dir: &Scratch, colour: u8) -> Vec<u8> {
    let path = dir.path(&format!("made-{colour}.png"));
    save_png(&path, &Image::from_u8(1, 2, &[colour; 6]).unwrap()).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    bytes
}

fn text(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}

fn open_with(path: &Path, columns: &Columns, images: Option<&Path>) -> Result<Listed> {
    FromParquet.open(&Wanted { split: Split::Train, path: Some(path), images, columns, samples: 0, size: 0 })
}

fn open(path: &Path) -> Result<Listed> {
    open_with(path, &Columns::default(), None)
}

/// A group of `n` pictures with names and captions, of the colours from `first` on.
fn group(dir: &Scratch, first: u8, n: u8) -> Vec<Column> {
    let all = || first..first + n;
    vec![
        (all().map(|i| png(dir, i)).collect(), vec![2; n as usize], vec![]),
        (all().map(|i| text(&format!("{i}.png"))).collect(), vec![2; n as usize], vec![]),
        (all().map(|i| text(&format!(" caption {i}\n"))).collect(), vec![1; n as usize], vec![]),
    ]
}

#[test]
fn pictures_and_captions_are_read_however_they_are_written() {
    let dir = Scratch::new("parquet");
    let zstd = Compression::ZSTD(ZstdLevel::default());
    let small = |p: WriterPropertiesBuilder| {
        p.set_data_page_row_count_limit(2).set_write_batch_size(1).set_dictionary_page_size_limit(200)
    };
    for (i, props) in [
        props(),
        WriterProperties::builder().set_compression(Compression::UNCOMPRESSED),
        WriterProperties::builder().set_compression(zstd),
        WriterProperties::builder().set_compression(Compression::LZ4_RAW),
        props().set_dictionary_enabled(false),
        props().set_writer_version(WriterVersion::PARQUET_2_0).set_encoding(Encoding::PLAIN),
        props().set_statistics_enabled(EnabledStatistics::None),
        small(props()),
        small(props()).set_dictionary_enabled(false),
        small(WriterProperties::builder().set_compression(zstd))
            .set_encoding(Encoding::PLAIN)
            .set_writer_version(WriterVersion::PARQUET_2_0),
    ]
    .into_iter()
    .enumerate()
    {
        let groups = [group(&dir, 0, 7), group(&dir, 7, 1), group(&dir, 8, 12)];
        dir.write("a.parquet", &bytes(PICTURES, props, &groups));
        let listed = open(&dir.path("a.parquet")).unwrap();
        assert_eq!((listed.samples.len(), listed.ignored.count), (20, 0), "{i}");
        for n in (0..20).rev().chain([3, 3]) {
            let sample = &listed.samples[n];
            assert_eq!(sample.captions, [format!("caption {n}")], "{i}");
            assert_eq!(sample.image, dir.path("a.parquet").join(n.to_string()));
            assert_eq!(listed.pictures.decode(n, 8).unwrap().rgb, [n as u8; 6], "{i}: {n}");
        }
        assert_eq!(listed.pictures.folder(0), Some(dir.root()));
    }
}

#[test]
fn missing_pictures_are_files_or_ignored() {
    let dir = Scratch::new("parquet-null");
    let path = dir.path("pics/sub/3.png");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, png(&dir, 3)).unwrap();
    let columns = vec![
        // Bytes; a null struct; null bytes with a name; null bytes and name; a name outside.
        (vec![png(&dir, 1)], vec![2, 0, 1, 1, 1], vec![]),
        (vec![text("x"), text("sub/3.png"), text("../x.png")], vec![2, 0, 2, 1, 2], vec![]),
        (vec![text("a"), text("b")], vec![1, 1, 0, 0, 0], vec![]),
    ];
    dir.write("a.parquet", &bytes(PICTURES, props(), &[columns]));
    let listed = open_with(&dir.path("a.parquet"), &Columns::default(), Some(&dir.path("pics"))).unwrap();
    assert_eq!(listed.samples.len(), 2);
    assert_eq!(listed.samples[1].image, path);
    assert_eq!((listed.samples[0].caption(), listed.samples[1].caption()), (Some("a"), None));
    assert_eq!(listed.pictures.decode(0, 8).unwrap().rgb, [1; 6]);
    assert_eq!(listed.pictures.decode(1, 8).unwrap().rgb, [3; 6]);
    assert_eq!(listed.pictures.folder(1), Some(dir.path("pics").as_path()));
    let names = listed.ignored.names();
    assert_eq!(listed.ignored.count, 3, "{names}");
    for want in ["1: it has no picture", "3: it has no picture", "4: its picture \"../x.png\" is not inside"]
    {
        assert!(names.contains(want), "{names}");
    }
    // Where nulls are not counted, names are used too.
    let columns = vec![
        (vec![png(&dir, 1)], vec![2, 1], vec![]),
        (vec![text("x"), text("sub/3.png")], vec![2, 2], vec![]),
        (vec![text("a")], vec![1, 0], vec![]),
    ];
    let none = || props().set_statistics_enabled(EnabledStatistics::None);
    dir.write("c.parquet", &bytes(PICTURES, none(), &[columns]));
    let listed = open_with(&dir.path("c.parquet"), &Columns::default(), Some(&dir.path("pics"))).unwrap();
    assert_eq!(listed.samples[1].image, path);
    assert_eq!(listed.pictures.encoded(0).unwrap(), Some(png(&dir, 1)));
    assert_eq!(listed.pictures.encoded(1).unwrap(), Some(png(&dir, 3)));
    // Without names, a missing picture is an error of its sample only.
    let columns = vec![(vec![png(&dir, 1)], vec![0, 1], vec![])];
    let schema = "message m { optional binary jpg; }";
    dir.write("b.parquet", &bytes(schema, none(), &[columns]));
    let listed = open(&dir.path("b.parquet")).unwrap();
    let e = listed.pictures.decode(0, 8).unwrap_err().to_string();
    assert!(e.ends_with("b.parquet/0: it has no picture"), "{e}");
    assert_eq!(listed.pictures.decode(1, 8).unwrap().rgb, [1; 6]);
}

#[test]
fn names_alone_are_files_beside_the_table() {
    let dir = Scratch::new("parquet-names");
    dir.write("x/1.png", &png(&dir, 1));
    let schema = "message m { required binary png (UTF8); required int64 id; }";
    let mut out = Vec::new();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(&mut out, schema, Arc::new(props().build())).unwrap();
    let mut rows = writer.next_row_group().unwrap();
    let mut column = rows.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("x/1.png")], None, None).unwrap();
    column.close().unwrap();
    let mut column = rows.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[1], None, None).unwrap();
    column.close().unwrap();
    rows.close().unwrap();
    writer.close().unwrap();
    dir.write("a.parquet", &out);
    let listed = open(&dir.path("a.parquet")).unwrap();
    assert_eq!(listed.pictures.decode(0, 8).unwrap().rgb, [1; 6]);
    let error = |columns: Columns| open_with(&dir.path("a.parquet"), &columns, None).unwrap_err().to_string();
    let e = error(Columns { image: Some("id".into()), ..Columns::default() });
    assert!(e.contains("a.parquet: the column \"id\" holds no pictures: wanted the bytes"), "{e}");
    let e = error(Columns { image: Some("img".into()), ..Columns::default() });
    assert!(e.contains("no column \"img\" (`image` of data.columns); the columns are png, id"), "{e}");
    let e = error(Columns { captions: Some(vec!["caption".into()]), ..Columns::default() });
    assert!(e.contains("no column \"caption\" (`captions` of data.columns); the columns are"), "{e}");
    let e = error(Columns { prompt: Some("id".into()), ..Columns::default() });
    assert!(e.contains("the column \"id\" is not read: wanted texts"), "{e}");
}

#[test]
fn the_declared_column_is_the_picture() {
    let dir = Scratch::new("parquet-declared");
    let schema = "message m { required binary image (UTF8); required binary photo; }";
    let columns = vec![(vec![text("not this")], vec![], vec![]), (vec![png(&dir, 9)], vec![], vec![])];
    let info = r#"{"info": {"features": {"photo": {"_type": "Image"}, "image": {"dtype": "string", "_type": "Value"}}}}"#;
    let pairs = vec![KeyValue::new("huggingface".to_string(), info.to_string())];
    dir.write("a.parquet", &bytes(schema, props().set_key_value_metadata(Some(pairs)), &[columns]));
    let listed = open(&dir.path("a.parquet")).unwrap();
    assert_eq!(listed.pictures.decode(0, 8).unwrap().rgb, [9; 6]);
}

#[test]
fn lists_are_several_captions_and_conversations() {
    let dir = Scratch::new("parquet-lists");
    let list = |name: &str| {
        format!(
            "optional group {name} (LIST) {{ repeated group list {{ optional binary element (UTF8); }} }}"
        )
    };
    let turns = |name: &str, a: &str, b: &str| {
        format!(
            "optional group {name} (LIST) {{ repeated group list {{ optional group element {{ optional binary {a} (UTF8); \
             optional binary {b} (UTF8); }} }} }}"
        )
    };
    let schema = format!(
        "message m {{ required binary image; {} {} {} {} optional binary prompt (UTF8); }}",
        list("captions"),
        list("question"),
        list("answer"),
        turns("conversations", "from", "value")
    );
    let columns = vec![
        ((1..5).map(|i| png(&dir, i)).collect(), vec![], vec![]),
        // Two captions; a null among them; an empty list; a null list.
        (vec![text("a"), text("b"), text("c")], vec![3, 3, 2, 3, 1, 0], vec![0, 1, 0, 1, 0, 0]),
        (vec![text("q?"), text("r?"), text("s?"), text("t?")], vec![3, 3, 3, 3, 0], vec![0, 1, 0, 0, 0]),
        (
            vec![text("yes"), text(""), text("u"), text("v"), text("w")],
            vec![3, 3, 3, 3, 3, 0],
            vec![0, 1, 0, 0, 1, 0],
        ),
        (vec![text("human"), text("gpt"), text("human")], vec![4, 4, 4, 1, 0], vec![0, 1, 0, 0, 0]),
        (vec![text("<image>\nHi"), text("Hello"), text("alone")], vec![4, 4, 4, 1, 0], vec![0, 1, 0, 0, 0]),
        (vec![text("draw")], vec![1, 0, 0, 0], vec![]),
    ];
    dir.write("a.parquet", &bytes(&schema, props(), &[columns]));
    let listed = open(&dir.path("a.parquet")).unwrap();
    let captions: Vec<_> = listed.samples.iter().map(|s| s.captions.join("+")).collect();
    assert_eq!(captions, ["a+b", "c", "", ""]);
    assert_eq!(listed.samples[0].chats, [Chat::of("q?", "yes"), Chat::of("Hi", "Hello")]);
    assert_eq!(listed.samples[1].chats, [Chat::of("s?", "u")]);
    assert_eq!(listed.samples[2].chats, []);
    assert_eq!(listed.samples[0].prompt.as_deref(), Some("draw"));
    let names = listed.ignored.names();
    assert_eq!(listed.ignored.count, 3, "{names}");
    for want in
        ["0: a question or its answer", "1: the last question has no answer", "2: 1 questions with 2 answers"]
    {
        assert!(names.contains(want), "{names}");
    }
    // Pairs of questions and answers, and conversations as JSON.
    for (column, values) in [
        (
            turns("texts", "user", "assistant"),
            [(vec![text("q")], vec![4], vec![0]), (vec![text("a")], vec![4], vec![0])].to_vec(),
        ),
        (
            "required binary messages (UTF8);".into(),
            vec![(
                vec![text(r#"[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]"#)],
                vec![],
                vec![],
            )],
        ),
    ] {
        let schema = format!("message m {{ required binary image; {column} }}");
        let columns = [vec![(vec![png(&dir, 1)], vec![], vec![])], values].concat();
        dir.write("a.parquet", &bytes(&schema, props(), &[columns]));
        assert_eq!(open(&dir.path("a.parquet")).unwrap().samples[0].chats, [Chat::of("q", "a")]);
    }
}

#[test]
fn lists_of_pictures_have_one_each() {
    let dir = Scratch::new("parquet-images");
    let schema = "message m { optional group images (LIST) { repeated group list { optional group element { \
                  optional binary bytes; optional binary path (UTF8); } } } }";
    let columns = vec![
        (vec![png(&dir, 1), png(&dir, 2), png(&dir, 3)], vec![4, 4, 4, 1], vec![0, 0, 1, 0]),
        (vec![], vec![3, 3, 3, 1], vec![0, 0, 1, 0]),
    ];
    dir.write("a.parquet", &bytes(schema, props(), &[columns]));
    let listed = open(&dir.path("a.parquet")).unwrap();
    assert_eq!(listed.pictures.decode(0, 8).unwrap().rgb, [1; 6]);
    let e = |i| listed.pictures.decode(i, 8).unwrap_err().to_string();
    assert!(e(1).ends_with("a.parquet/1: it has 2 pictures, wanted one"), "{}", e(1));
    assert!(e(2).ends_with("a.parquet/2: it has no picture"), "{}", e(2));
}

#[test]
fn folders_and_patterns_stand_for_files() {
    let dir = Scratch::new("parquet-files");
    for (name, first) in
        [("train-0.parquet", 0), ("train-1.parquet", 5), ("test-0.parquet", 9), (".x.parquet", 10)]
    {
        dir.write(name, &bytes(PICTURES, props(), &[group(&dir, first, 2)]));
    }
    dir.write("README.md", b"");
    let colours = |path: &str| {
        let listed = open(&dir.path(path)).unwrap();
        (0..listed.samples.len()).map(|i| listed.pictures.decode(i, 8).unwrap().rgb[0]).collect::<Vec<_>>()
    };
    assert_eq!(colours(""), [9, 10, 0, 1, 5, 6]);
    assert_eq!(colours("train-*"), [0, 1, 5, 6]);
    assert_eq!(colours("t*t-?.parquet"), [9, 10]);
    assert_eq!(colours("train-{0,1}.parquet"), [0, 1, 5, 6]);
    let e = open(&dir.path("valid-*.parquet")).unwrap_err().to_string();
    assert!(e.contains("no table matches this pattern; correct it or fetch"), "{e}");
    assert!(open(&dir.path("none.parquet")).unwrap_err().to_string().contains("none.parquet: "));
}

#[test]
fn captions_of_several_columns_are_not_repeated() {
    let dir = Scratch::new("parquet-captions");
    let schema =
        "message m { required binary image; required binary text (UTF8); required binary caption (UTF8); }";
    let columns = vec![
        (vec![png(&dir, 1), png(&dir, 2)], vec![], vec![]),
        (vec![text("a"), text("b")], vec![], vec![]),
        (vec![text("a"), text("c")], vec![], vec![]),
    ];
    for folder in ["one", "two"] {
        dir.write(
            &format!("x/{folder}/a-0.parquet"),
            &bytes(schema, props(), std::slice::from_ref(&columns)),
        );
    }
    let listed = open(&dir.path("x/*/a-*.parquet")).unwrap();
    let captions: Vec<_> = listed.samples.iter().map(|s| s.captions.join("+")).collect();
    assert_eq!(captions, ["a", "b+c", "a", "b+c"]);
    assert_eq!(listed.root, dir.path("x"));
}

#[test]
fn what_is_damaged_or_not_supported_is_named() {
    let dir = Scratch::new("parquet-errors");
    let good = bytes(PICTURES, props(), &[group(&dir, 0, 3)]);
    let error = |bytes: &[u8]| {
        dir.write("a.parquet", bytes);
        open(&dir.path("a.parquet")).unwrap_err().to_string()
    };
    assert!(error(b"").contains("a.parquet: this has 0 bytes, too few"), "{}", error(b""));
    assert!(error(&[b'x'; 40]).contains("does not begin and end with PAR1"));
    let mut long = good.clone();
    let at = long.len() - 8;
    long[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(error(&long).contains("its metadata would have 4294967295 bytes, but"), "{}", error(&long));
    let mut broken = good.clone();
    let footer = at - u32::from_le_bytes(good[at..at + 4].try_into().unwrap()) as usize;
    broken[footer..footer + 4].fill(0xff);
    assert!(error(&broken).contains("a.parquet: its metadata cannot be read ("), "{}", error(&broken));
    // Encodings that are not read.
    let other = props().set_dictionary_enabled(false).set_encoding(Encoding::DELTA_LENGTH_BYTE_ARRAY);
    let e = error(&bytes(PICTURES, other, &[group(&dir, 0, 3)]));
    assert!(
        e.contains("column text of row group 0: it is encoded as DELTA_LENGTH_BYTE_ARRAY, wanted"),
        "{e}"
    );
    let latin = vec![
        (vec![png(&dir, 1)], vec![2], vec![]),
        (vec![text("x")], vec![2], vec![]),
        (vec![b"\xff".to_vec()], vec![1], vec![]),
    ];
    dir.write("a.parquet", &bytes(PICTURES, props(), &[latin]));
    let listed = open(&dir.path("a.parquet")).unwrap();
    assert_eq!(listed.samples[0].captions, [""; 0]);
    assert!(listed.ignored.names().ends_with("a.parquet/0: a text is not UTF-8"));
    // A picture that is none is an error of its sample.
    let noise = vec![
        (vec![text("noise"), png(&dir, 2)], vec![2, 2], vec![]),
        (vec![], vec![1, 1], vec![]),
        (vec![], vec![0, 0], vec![]),
    ];
    dir.write("a.parquet", &bytes(PICTURES, props(), &[noise]));
    let listed = open(&dir.path("a.parquet")).unwrap();
    let e = listed.pictures.decode(0, 8).unwrap_err().to_string();
    assert!(e.contains("a.parquet/0: this is not a PNG, JPEG, WebP or GIF"), "{e}");
    assert_eq!(listed.pictures.decode(1, 8).unwrap().rgb, [2; 6]);
}

/// A file without rows whose schema has the root and these elements, each with its number of members.
fn schema_of(elements: &[u32]) -> Vec<u8> {
    let varint = |mut n: u32| {
        let mut all = Vec::new();
        while n >= 0x80 {
            all.push(n as u8 | 0x80);
            n >>= 7;
        }
        all.push(n as u8);
        all
    };
    // The version; then the list of elements, the root with the name r and one member.
    let mut meta = [vec![0x15, 2, 0x19, 0xfc], varint(elements.len() as u32 + 1)].concat();
    meta.extend([0x48, 1, b'r', 0x15, 2, 0]);
    for &members in elements {
        // The type of a column, its repetition and its name; the members of a group.
        meta.extend(if members == 0 { vec![0x15, 12, 0x25, 0] } else { vec![0x35, 0] });
        meta.extend([0x18, 1, b'a']);
        if members > 0 {
            meta.push(0x15);
            meta.extend(varint(members * 2));
        }
        meta.push(0);
    }
    // No rows, and no row groups.
    meta.extend([0x16, 0, 0x19, 0x0c, 0]);
    let size = (meta.len() as u32).to_le_bytes();
    [b"PAR1", &meta[..], &size, b"PAR1"].concat()
}

#[test]
fn schemas_that_are_too_deep_or_too_large_are_refused() {
    let dir = Scratch::new("parquet-deep");
    let error = |elements: &[u32]| {
        dir.write("a.parquet", &schema_of(elements));
        open(&dir.path("a.parquet")).unwrap_err().to_string()
    };
    let deep = |n: usize| [vec![1; n], vec![0]].concat();
    for levels in [64, 5_000] {
        let e = error(&deep(levels));
        assert!(e.contains("a.parquet: its schema is nested more than 64 deep; write"), "{e}");
    }
    let e = error(&[vec![9_999], vec![0; 9_999]].concat());
    assert!(e.contains("a.parquet: its schema has 10001 elements, wanted at most 10000; write"), "{e}");
    // What is allowed comes to the columns.
    for fine in [deep(63), [vec![9_998], vec![0; 9_998]].concat()] {
        let e = error(&fine);
        assert!(e.contains("no column of pictures found among a"), "{e}");
    }
    // A field of another type could hide what follows.
    let mut odd = schema_of(&deep(1));
    let name = odd.iter().position(|&b| b == 0x48).unwrap();
    odd[name] = 0x45;
    dir.write("a.parquet", &odd);
    let e = open(&dir.path("a.parquet")).unwrap_err().to_string();
    assert!(e.contains("its metadata cannot be read (the schema is damaged)"), "{e}");
}

/// Damaged files are errors, or give pictures and errors of pictures, in bounded time. Panics of the parquet crate become
/// errors too, but are printed.
#[test]
fn truncated_and_mutated_files_are_survived() {
    let dir = Scratch::new("parquet-mutated");
    let zstd = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default()));
    let files = [
        bytes(PICTURES, props(), &[group(&dir, 0, 3), group(&dir, 3, 2)]),
        bytes(
            PICTURES,
            zstd.set_writer_version(WriterVersion::PARQUET_2_0).set_encoding(Encoding::PLAIN),
            &[group(&dir, 0, 4)],
        ),
        bytes(
            PICTURES,
            WriterProperties::builder().set_data_page_row_count_limit(1).set_write_batch_size(1),
            &[group(&dir, 0, 4)],
        ),
    ];
    let mut survived = (0, 0);
    let mut attempt = |bytes: &[u8]| {
        let since = Instant::now();
        dir.write("a.parquet", bytes);
        match open(&dir.path("a.parquet")) {
            Ok(listed) => {
                survived.0 += 1;
                for i in 0..listed.samples.len().min(8) {
                    let _ = listed.pictures.decode(i, 8);
                }
            }
            Err(e) => {
                survived.1 += 1;
                assert!(e.to_string().contains("a.parquet"), "{e}");
            }
        }
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
    };
    let rounds = 400;
    for (i, good) in files.iter().enumerate() {
        for cut in (0..good.len()).step_by(7) {
            attempt(&good[..cut]);
        }
        let mut rng = crate::rng::Philox::new(5, i as u64);
        for _ in 0..rounds {
            let mut bad = good.clone();
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(bad.len());
                bad[at] = match rng.below(3) {
                    0 => 0xff,
                    1 => bad[at] ^ (1 << rng.below(8)),
                    _ => rng.below(256) as u8,
                };
            }
            attempt(&bad);
        }
    }
    assert!(survived.0 > 100 && survived.1 > 100, "{survived:?}");
}
