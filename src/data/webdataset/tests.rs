use std::fs::{self, File};
use std::io::{Cursor, Write};

use super::index::{ENDING, scan};
use super::tar::{BLOCK, Entry, Tar};
use super::unpack::Limits;
use super::*;
use crate::data::save::{Format, encode};
use crate::data::scratch::Scratch;
use crate::rng::Philox;

/// An archive in the making.
#[derive(Default, Clone)]
struct Archive(Vec<u8>);

impl Archive {
    fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(b'0', name.as_bytes(), content, |_| ())
    }

    /// A member whose header `change` alters before its checksum is computed.
    fn entry(mut self, kind: u8, name: &[u8], content: &[u8], change: impl FnOnce(&mut [u8])) -> Self {
        let mut header = write::header("x", content.len() as u64).unwrap();
        header[..100].fill(0);
        header[..name.len()].copy_from_slice(name);
        header[156] = kind;
        change(&mut header);
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(header);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK as usize), 0);
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend(END);
        self.0
    }
}

fn png(seed: usize) -> Vec<u8> {
    let pixels: Vec<u8> = (0..8 * 9 * 3).map(|i| (i * 31 + seed * 7) as u8).collect();
    encode(Path::new("a.png"), &pixels, 8, 9, Format::Png).unwrap()
}

/// `n` samples with captions.
fn shard(first: usize, n: usize) -> Vec<u8> {
    let add = |a: Archive, i: usize| {
        let text = format!("caption {i}\n");
        a.file(&format!("{i:04}.png"), &png(i)).file(&format!("{i:04}.txt"), text.as_bytes())
    };
    (first..first + n).fold(Archive::default(), add).end()
}

fn list(dir: &Scratch, pattern: &str) -> Result<Listed> {
    open(&dir.path(pattern), Ok(dir.path("cache")))
}

/// The listing of one shard with this content.
fn listed(name: &str, content: &[u8]) -> (Scratch, Listed) {
    let dir = Scratch::new(name);
    dir.write("a.tar", content);
    let listed = list(&dir, "a.tar").unwrap();
    (dir, listed)
}

fn captions(listed: &Listed) -> Vec<Vec<&str>> {
    listed.samples.iter().map(|s| s.captions.iter().map(String::as_str).collect()).collect()
}

fn reasons(listed: &Listed) -> String {
    listed.ignored.names()
}

#[test]
fn members_with_a_common_key_are_a_sample() {
    let json = br#"{"caption": "b", "captions": ["a", "b", " "], "prompt": "draw", "qa": [["q?", "yes"]],
        "chats": [{"system": "s", "turns": [["1", "2"], ["3", "4"]]}], "score": NaN, "text": null}"#;
    let archive = Archive::default()
        .entry(b'5', b"./sub/", b"", |_| ())
        .file("./sub/1.txt", b"\xef\xbb\xbf a \r\n")
        .file("./sub/1.PNG", &png(1))
        .file("./sub/1.seg.png", b"mask")
        .file("sub/1.json", json)
        .file("sub/2.cls", b"3")
        .file("sub/2.jpg", &png(2))
        .file("sub/2.caption", b"second")
        .file("sub/3.txt", b"gr\xfc\xdfe")
        .file("sub/3.webp", b"")
        .file("sub/4.txt", b"alone")
        .file("sub/._5.png", b"")
        .file("README", b"");
    let (dir, listed) = listed("wds-members", &archive.end());
    assert_eq!(captions(&listed), [vec!["a", "b"], vec!["second"], vec![]]);
    let first = &listed.samples[0];
    assert_eq!(first.image, dir.path("a.tar/sub/1.PNG"));
    assert_eq!(first.prompt.as_deref(), Some("draw"));
    let turns = ["1", "3"].iter().zip(["2", "4"]).map(|(q, a)| (q.to_string(), a.to_string())).collect();
    assert_eq!(first.chats, [Chat::of("q?", "yes"), Chat { system: Some("s".into()), turns }]);
    assert_eq!(listed.pictures.decode(0, 8).unwrap(), Bitmap::decode(&png(1), Path::new("a"), 8).unwrap());
    assert_eq!(listed.pictures.encoded(1).unwrap(), Some(png(2)));
    assert_eq!(listed.pictures.folder(1), Some(dir.root()));
    let e = listed.pictures.decode(2, 8).unwrap_err().to_string();
    assert!(e.contains("a.tar/sub/3.webp: this file is empty"), "{e}");
    assert_eq!(listed.ignored.count, 2, "{}", reasons(&listed));
    assert!(reasons(&listed).contains("a.tar/sub/3.txt: this is not UTF-8 text"));
    assert!(reasons(&listed).contains("a.tar/sub/4.txt: its sample has no picture"));
    let about = &listed.about[1].1;
    assert_eq!(about, "cls 1, hidden 1, no extension 1, seg.png 1");
    assert_eq!(listed.root, dir.root());
}

#[test]
fn a_conversation_about_a_picture_needs_one() {
    let json = |shown: &str| {
        let text = r#"{"text_only": true, "conversations": [{"user": "SHOWNq", "assistant": "a"}]}"#;
        text.replace("SHOWN", shown).into_bytes()
    };
    let archive =
        Archive::default().file("1.json", &json("<image>")).file("2.json", &json("")).file("3.png", &png(3));
    let (_dir, listed) = listed("wds-shown", &archive.file("3.json", &json("<image>")).end());
    let pictures: Vec<bool> = listed.samples.iter().map(Sample::has_picture).collect();
    assert_eq!(pictures, [false, true]);
    assert!(listed.samples.iter().all(|s| s.chats == [Chat::of("q", "a")]));
    assert!(reasons(&listed).contains("1.json: its conversation shows <image>"), "{}", reasons(&listed));
    assert_eq!(listed.ignored.count, 1);
}

#[test]
fn the_folder_of_relative_names_is_not_empty() {
    for (shards, want) in [
        (&["a.tar"][..], "."),
        (&["a.tar", "s/b.tar"], "."),
        (&["s/a.tar", "t/b.tar"], "."),
        (&["s/a.tar", "s/t/b.tar"], "s"),
        (&["/s/a.tar", "/t/b.tar"], "/"),
    ] {
        let shards: Vec<PathBuf> = shards.iter().map(PathBuf::from).collect();
        assert_eq!(pattern::common(&shards), Path::new(want));
    }
}

#[test]
fn a_cache_that_cannot_be_written_has_a_remedy() {
    let dir = Scratch::new("wds-no-cache");
    dir.write("cache", b"a file");
    dir.write("a.tgz", b"");
    let e = list(&dir, "a.tgz").unwrap_err().to_string();
    assert!(
        e.contains("cache: the cache cannot be written (") && e.contains("set ETT_CACHE to a folder"),
        "{e}"
    );
}

#[test]
fn odd_texts_are_counted_with_reasons() {
    let archive = Archive::default()
        .file("1.png", b"")
        .file("1.json", b"[1]")
        .file("2.png", b"")
        .file("2.json", b"{\"text\": 3, \"captions\": [\"a\", {}], \"qa\": [[\"q\"]], \"prompt\": \"p\"}")
        .file("3.png", b"")
        .file("3.json", b"{")
        .file("4.png", b"")
        .file("4.txt", b"a\0b");
    let (_dir, listed) = listed("wds-texts", &archive.end());
    assert_eq!(captions(&listed), [vec![], vec!["a"], vec![], vec![]]);
    assert_eq!(listed.samples[1].prompt.as_deref(), Some("p"));
    let all = reasons(&listed);
    assert_eq!(listed.ignored.count, 6, "{all}");
    for want in [
        "1.json: this is not a JSON object",
        "`text` holds a value that is not a text",
        "`captions` holds a value that is not a text",
        "`qa` is of another form (invalid length 1",
        "3.json: this is not JSON (EOF",
        "and 1 more",
    ] {
        assert!(all.contains(want), "{want}: {all}");
    }
}

#[test]
fn keys_that_come_again() {
    let archive = Archive::default()
        .file("1.png", &png(1))
        .file("1.jpg", &png(2))
        .file("1.txt", b"one")
        .file("1.txt", b"two")
        .file("2.png", &png(3))
        .file("1.json", b"{\"text\": \"late\"}")
        .file("2.txt", b"late too")
        .file("2.png", &png(4));
    let (dir, listed) = listed("wds-again", &archive.end());
    let images: Vec<_> = listed.samples.iter().map(|s| s.image.clone()).collect();
    assert_eq!(images, ["a.tar/1.png", "a.tar/2.png", "a.tar/2.png"].map(|n| dir.path(n)));
    assert_eq!(captions(&listed), [vec!["one"], vec![], vec!["late too"]]);
    for (i, seed) in [1, 3, 4].into_iter().enumerate() {
        assert_eq!(listed.pictures.encoded(i).unwrap(), Some(png(seed)));
    }
    let all = reasons(&listed);
    assert_eq!(listed.ignored.count, 3, "{all}");
    assert!(all.contains("1.jpg: its sample has a picture already"), "{all}");
    assert!(all.contains("1.txt: its sample has such a member already"), "{all}");
    assert!(
        all.contains("1.json: the other members of its sample are elsewhere in the shard; sort"),
        "{all}"
    );
}

#[test]
fn samples_without_a_picture_say_so() {
    let json = br#"{"text_only": true, "qa": [["2 + 2?", "4"]]}"#;
    let (_dir, listed) = listed("wds-text-only", &Archive::default().file("1.json", json).end());
    assert!(!listed.samples[0].has_picture());
    assert_eq!(listed.samples[0].chats, [Chat::of("2 + 2?", "4")]);
    assert!(listed.pictures.decode(0, 1).unwrap_err().to_string().contains("this sample has no picture"));
}

#[test]
fn long_names_and_sizes_of_all_kinds() {
    let long = format!("{}/{}.png", "folder".repeat(30), "name".repeat(30));
    let record = |key: &str, value: &str| {
        let rest = format!(" {key}={value}\n");
        let length = (1..).find(|n: &usize| n.to_string().len() + rest.len() == *n).unwrap();
        format!("{length}{rest}")
    };
    let picture = png(1);
    let pax = record("mtime", "1.5") + &record("path", "pax größe.png");
    let size = record("size", &picture.len().to_string());
    let archive = Archive::default()
        .entry(b'g', b"global", record("comment", "x").as_bytes(), |_| ())
        .entry(b'L', b"././@LongLink", format!("{long}\0").as_bytes(), |_| ())
        .file("cut.png", &picture)
        .entry(b'x', b"pax", pax.as_bytes(), |_| ())
        .file("short.png", &picture)
        .entry(b'x', b"pax", size.as_bytes(), |_| ())
        .entry(b'0', b"sized.png", &picture, |h| h[124..136].copy_from_slice(b"00000000000\0"))
        .entry(b'0', b"binary.png", &picture, |h| {
            h[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            h[132..136].copy_from_slice(&(picture.len() as u32).to_be_bytes());
        })
        .entry(0, b"old.png", &picture, |h| h[257..265].fill(0))
        .entry(b'0', b"name.png", &picture, |h| h[345..351].copy_from_slice(b"prefix"));
    let (dir, listed) = listed("wds-names", &archive.end());
    assert_eq!(listed.ignored.count, 0, "{}", reasons(&listed));
    let images: Vec<_> = listed.samples.iter().map(|s| s.image.clone()).collect();
    let want = [&long, "pax größe.png", "sized.png", "binary.png", "old.png", "prefix/name.png"];
    assert_eq!(images, want.map(|n| dir.path("a.tar").join(n)));
    for (i, name) in want.iter().enumerate() {
        assert_eq!(listed.pictures.encoded(i).unwrap().as_ref(), Some(&picture), "{name}");
    }
}

#[test]
fn what_is_no_file_and_unsafe_names_are_never_used() {
    let sparse = "22 GNU.sparse.major=1\n";
    let mut archive = Archive::default()
        .file("../up.png", b"")
        .file("a/../../up.png", b"")
        .file("/etc/a.png", b"")
        .file("..\\up.png", b"")
        .entry(b'x', b"pax", b"18 path=a\0b/c.png\n", |_| ())
        .file("nul.png", b"")
        .entry(b'1', b"hard.png", b"", |h| h[157..168].copy_from_slice(b"/etc/passwd"))
        .entry(b'2', b"soft.png", b"", |h| h[157..168].copy_from_slice(b"/etc/passwd"))
        .entry(b'3', b"device.png", b"", |_| ())
        .entry(b'6', b"pipe.png", b"", |_| ())
        .entry(b'M', b"volume.png", b"", |_| ())
        .entry(b'x', b"pax", sparse.as_bytes(), |_| ())
        .file("new.png", b"")
        .entry(b'S', b"sparse.png", b"", |h| h[482] = 1);
    // The continued map of the sparse member.
    archive.0.extend([7; BLOCK as usize - 8]);
    archive.0.extend([0; 8]);
    let bytes = archive.file("good.png", b"").end();
    let mut tar = Tar::new(Cursor::new(&bytes), bytes.len() as u64);
    let mut others = Vec::new();
    let good = loop {
        match tar.next().unwrap() {
            Some(Entry::Other(name, why)) => others.push(format!("{name}: {why}")),
            Some(Entry::File(member)) => break member,
            other => panic!("{other:?} after {others:?}"),
        }
    };
    assert_eq!(good.name, b"good.png");
    assert_eq!(tar.next().unwrap(), None);
    let want = [
        "../up.png: its name contains `..`",
        "a/../../up.png: its name contains `..`",
        "/etc/a.png: its name is an absolute path",
        "..\\up.png: its name contains `..`",
        "a\u{fffd}b/c.png: its name contains a NUL byte",
        "hard.png: links are not followed",
        "soft.png: links are not followed",
        "device.png: devices and pipes are not read",
        "pipe.png: devices and pipes are not read",
        "volume.png: members of this type are not read",
        "new.png: sparse members are not read",
        "sparse.png: sparse members are not read",
    ];
    assert_eq!(others, want);
}

#[test]
fn damaged_archives_are_used_up_to_the_damage() {
    let whole = shard(0, 3);
    let ends = |bytes: &[u8]| {
        let groups = scan(Cursor::new(bytes), bytes.len() as u64).unwrap();
        (groups.samples.len(), groups.first.last().map_or(String::new(), |(_, why)| why.clone()))
    };
    assert_eq!(ends(&whole), (3, String::new()));
    // A picture of one block, its text and their headers; the text is cut, then the picture.
    let sample = (whole.len() - END.len()) / 3;
    let (samples, why) = ends(&whole[..2 * sample + sample - 508]);
    assert!(samples == 3 && why.contains("is cut off within \"0002.txt\": it has 4 of 10 bytes"), "{why}");
    let (samples, why) = ends(&whole[..2 * sample + 600]);
    assert!(samples == 2 && why.contains("cut off within \"0002.png\": it has 88 of"), "{why}");
    let (samples, why) = ends(&whole[..2 * sample + 100]);
    assert!(samples == 2 && why.contains("cut off within the header at byte"), "{why}");
    let (samples, why) = ends(&whole[..3 * sample]);
    assert!(samples == 3 && why.contains("ends without its end mark"), "{why}");
    let mut bytes = whole.clone();
    bytes[2 * sample + 3] ^= 1;
    let (samples, why) = ends(&bytes);
    assert!(samples == 2 && why.contains("is damaged; what follows is not read"), "{why}");
    let (samples, why) = ends(&[&whole[..], &whole].concat());
    assert!(samples == 3 && why.contains("there is data behind the end mark"), "{why}");
    assert!(ends(b"<html>").1.contains("cut off within the header"));
    assert!(ends(&[b'x'; 2000]).1.contains("this is not a tar archive; the name of a compressed"));
    assert!(ends(b"").1.contains("this archive is empty"));
    assert_eq!(ends(&END), (0, String::new()));
    let huge = Archive::default().entry(b'0', b"a.png", b"", |h| h[124..136].fill(0xff)).end();
    assert!(ends(&huge).1.contains("has no valid size"));
    let huge = Archive::default().entry(b'0', b"a.png", b"", |h| {
        h[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    });
    assert!(ends(&huge.end()).1.contains("has 1024 of 18446744073709551615 bytes"));
    let long = Archive::default().entry(b'L', b"x", &vec![b'a'; 2 << 20], |_| ());
    assert!(ends(&long.end()).1.contains("wanted 1 MiB at most"));
}

#[test]
fn random_damage_does_no_harm() {
    let record = "24 path=a long name.png\n";
    let archive = Archive::default()
        .file("1.png", &png(1))
        .file("1.json", br#"{"text": "a", "qa": [["q", "a"]]}"#)
        .entry(b'x', b"pax", record.as_bytes(), |_| ())
        .file("2.png", &png(2))
        .entry(b'L', b"long", b"another/name.txt\0", |_| ())
        .file("x", b"text");
    let whole = archive.end();
    for cut in 0..whole.len() {
        scan(Cursor::new(&whole[..cut]), cut as u64).unwrap();
    }
    let mut rng = Philox::new(5, 0);
    for _ in 0..4000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + rng.u32() % 4 {
            let at = rng.u32() as usize % bytes.len();
            bytes[at] = rng.u32() as u8;
        }
        // Half of them with right checksums, so that the other fields matter.
        if rng.u32().is_multiple_of(2) {
            for at in (0..bytes.len()).step_by(BLOCK as usize) {
                let header = &mut bytes[at..at + BLOCK as usize];
                if header[257..262] == *b"ustar" {
                    header[148..156].fill(b' ');
                    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
                    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        let groups = scan(Cursor::new(&bytes), bytes.len() as u64).unwrap();
        for sample in groups.samples {
            assert!(sample.offset + sample.bytes <= bytes.len() as u64);
        }
    }
}

#[test]
fn indices_are_used_while_they_fit_and_made_anew_otherwise() {
    let dir = Scratch::new("wds-index");
    dir.write("a.tar", &shard(0, 4));
    let (tar, index) = (dir.path("a.tar"), dir.path(&format!("a.tar{ENDING}")));
    let cache: Result<PathBuf> = Ok(dir.path("cache"));
    let made = Shard::open(&tar, &cache).unwrap();
    assert!(made.is_new && index.is_file() && !dir.path("cache").exists());
    let again = Shard::open(&tar, &cache).unwrap();
    assert!(!again.is_new);
    assert_eq!(again.index, made.index);
    let (first, second) = (list(&dir, "a.tar").unwrap(), list(&dir, "a.tar").unwrap());
    assert_eq!(first.samples, second.samples);
    let good = fs::read(&index).unwrap();
    let mut rng = Philox::new(6, 0);
    let mut damaged =
        vec![Vec::new(), good[..good.len() / 2].to_vec(), good[..good.len() - 1].to_vec(), vec![0; 64]];
    for _ in 0..50 {
        let mut bytes = good.clone();
        let at = rng.u32() as usize % bytes.len();
        bytes[at] ^= 1 << (rng.u32() % 8);
        damaged.push(bytes);
    }
    for bytes in damaged {
        fs::write(&index, &bytes).unwrap();
        assert_eq!(Shard::open(&tar, &cache).unwrap().index, made.index);
        assert_eq!(fs::read(&index).unwrap(), good);
    }
    // An index that is whole, but lies.
    for (from, to) in
        [("\"offset\":512", "\"offset\":100"), ("0000.png", "/etc.png"), ("\"format\":2", "\"format\":9")]
    {
        let text = String::from_utf8(good[..good.len() - 10].to_vec()).unwrap();
        let text = text.replacen(from, to, 1);
        fs::write(&index, format!("{text}\n{:08x}\n", crc32fast::hash(text.as_bytes()))).unwrap();
        assert!(Shard::open(&tar, &cache).unwrap().is_new, "{from}");
    }
    dir.write("a.tar", &shard(0, 5));
    assert_eq!(list(&dir, "a.tar").unwrap().samples.len(), 5);
    // The same size, another time.
    let file = File::options().write(true).open(&tar).unwrap();
    file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(60)).unwrap();
    assert!(Shard::open(&tar, &cache).unwrap().is_new);
}

#[test]
fn indices_of_folders_that_cannot_be_written_are_in_the_cache() {
    let dir = Scratch::new("wds-cache");
    dir.write("a.tar", &shard(0, 4));
    // A folder stands in the place of the index; permissions would not keep root from writing.
    fs::create_dir(dir.path(&format!("a.tar{ENDING}"))).unwrap();
    let cache: Result<PathBuf> = Ok(dir.path("cache"));
    let made = Shard::open(&dir.path("a.tar"), &cache).unwrap();
    let again = Shard::open(&dir.path("a.tar"), &cache).unwrap();
    assert_eq!((made.is_new, again.is_new), (true, false));
    assert_eq!(again.index, made.index);
    // Without a cache it works too.
    let none = || Err(Error::data(Path::new("ETT_CACHE"), "none"));
    assert!(Shard::open(&dir.path("a.tar"), &none()).unwrap().is_new);
    dir.write("b.tar.gz", b"");
    let e = Shard::open(&dir.path("b.tar.gz"), &none()).err().unwrap().to_string();
    assert!(
        e.contains("b.tar.gz: this shard is compressed and has to be unpacked, but ETT_CACHE: none"),
        "{e}"
    );
}

#[test]
fn shards_that_change_give_errors_and_no_garbage() {
    let dir = Scratch::new("wds-changes");
    let content = shard(0, 4);
    let tar = dir.path("a.tar");
    let changed = |listed: &Listed, sample: usize| {
        let e = listed.pictures.decode(sample, 8).unwrap_err().to_string();
        assert!(e.contains(&format!("a.tar/000{sample}.png: its shard has changed")), "{e}");
    };
    // Before and after the shard is open.
    for opened in [false, true] {
        dir.write("a.tar", &content);
        let listed = list(&dir, "a.tar").unwrap();
        if opened {
            listed.pictures.decode(0, 8).unwrap();
        }
        File::options().write(true).open(&tar).unwrap().set_len(2000).unwrap();
        changed(&listed, 3);
        changed(&listed, 0);
    }
    // Another content with the same size and time.
    dir.write("a.tar", &content);
    let listed = list(&dir, "a.tar").unwrap();
    let time = fs::metadata(&tar).unwrap().modified().unwrap();
    dir.write("a.tar", &shard(5, 4)[..content.len()]);
    let file = File::options().write(true).open(&tar).unwrap();
    file.set_len(content.len() as u64).unwrap();
    file.set_modified(time).unwrap();
    changed(&listed, 1);
    // Gone: an error of the file system, for which readers wait.
    dir.write("a.tar", &content);
    let listed = list(&dir, "a.tar").unwrap();
    fs::remove_file(&tar).unwrap();
    assert!(matches!(listed.pictures.decode(0, 8), Err(Error::Io { .. })));
}

#[test]
fn many_shards_share_few_handles() {
    let dir = Scratch::new("wds-handles");
    for i in 0..80 {
        dir.write(&format!("a-{i:02}.tar"), &shard(2 * i, 2));
    }
    let mut ignored = Skipped::default();
    let shards = pattern::files(&dir.path("a-*.tar"), SHARDS, &mut ignored).unwrap();
    let opened: Vec<Shard> = shards.iter().map(|s| Shard::open(s, &Ok(dir.path("c"))).unwrap()).collect();
    let handles = Handles::new(opened.iter().map(|s| (s.file.clone(), s.index.shard)).collect());
    let read = |i: usize| {
        let (_, place) = sample(Path::new("a"), i as u32 / 2, opened[i / 2].index.samples[i % 2].clone());
        assert_eq!(handles.read(&place, Path::new("a")).unwrap(), png(i));
    };
    (0..160).into_par_iter().for_each(read);
    (0..160).rev().for_each(read);
    assert_eq!(handles.count(), 64);
}

#[test]
fn empty_shards_count_for_nothing() {
    let dir = Scratch::new("wds-empty");
    dir.write("a.tar", &END);
    dir.write("b.tar", b"");
    let e = list(&dir, ".").unwrap_err().to_string();
    assert!(e.contains("there are no samples in 2 shards; wanted members such as 000.jpg"), "{e}");
    assert!(e.contains("b.tar: this archive is empty"), "{e}");
    dir.write("c.tar", &shard(0, 2));
    assert_eq!(list(&dir, "{a..c}.tar").unwrap_err().to_string().matches("neither").count(), 1);
    let listed = list(&dir, "{a,b,c}.tar").unwrap();
    assert_eq!((listed.samples.len(), listed.ignored.count), (2, 1));
}

fn packed(content: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(content).unwrap();
    out.finish().unwrap()
}

#[test]
fn compressed_shards_are_unpacked_once() {
    let dir = Scratch::new("wds-gz");
    dir.write("a.tar.gz", &packed(&shard(0, 3)));
    let tars = || {
        let names = fs::read_dir(dir.path("cache")).unwrap().map(|e| e.unwrap().path());
        names.filter(|p| p.extension().is_some_and(|e| e == "tar")).collect::<Vec<_>>()
    };
    let listed = list(&dir, "a.tar.gz").unwrap();
    assert_eq!(listed.samples[2].image, dir.path("a.tar.gz/0002.png"));
    assert_eq!(listed.pictures.encoded(2).unwrap(), Some(png(2)));
    let first = tars();
    let time = fs::metadata(&first[0]).unwrap().modified().unwrap();
    assert_eq!(list(&dir, "a.tar.gz").unwrap().samples, listed.samples);
    assert_eq!((tars().len(), fs::metadata(&first[0]).unwrap().modified().unwrap()), (1, time));
    // Two members one after the other, as parallel compressors write them; the old file is replaced.
    let whole = shard(0, 5);
    dir.write("a.tar.gz", &[packed(&whole[..700]), packed(&whole[700..])].concat());
    let listed = list(&dir, "a.tar.gz").unwrap();
    assert_eq!(listed.pictures.encoded(4).unwrap(), Some(png(4)));
    let second = tars();
    assert!(second.len() == 1 && second != first, "{second:?}");
    let entries = fs::read_dir(dir.path("cache")).unwrap().count();
    assert_eq!(entries, 2, "the tar and its index");
    // What is before the cut can be used.
    let bytes = packed(&shard(0, 40));
    dir.write("a.tgz", &bytes[..bytes.len() - 300]);
    let listed = list(&dir, "a.tgz").unwrap();
    assert!((20..40).contains(&listed.samples.len()), "{}", listed.samples.len());
    assert!(reasons(&listed).contains("a.tgz"), "{}", reasons(&listed));
}

#[test]
fn bombs_are_refused() {
    let dir = Scratch::new("wds-bomb");
    dir.write("a.tgz", &packed(&vec![0; 4 << 20]));
    let unpack = |bytes, ratio, free| {
        let limits = Limits { bytes, ratio, free };
        unpack::unpacked(&dir.path("a.tgz"), &dir.path("cache"), limits)
    };
    for limits in [(1 << 20, u64::MAX, 0), (u64::MAX, 100, 1 << 20)] {
        let e = unpack(limits.0, limits.1, limits.2).unwrap_err().to_string();
        assert!(e.contains("a.tgz: this shard unpacks to more than 1 MiB from"), "{e}");
        assert_eq!(fs::read_dir(dir.path("cache")).unwrap().count(), 0);
    }
    unpack(u64::MAX, 2000, 0).unwrap();
}

/// Takes 200 MiB of disk: `cargo test --release a_hundred_shards -- --ignored --nocapture`.
#[test]
#[ignore = "measures time"]
fn a_hundred_shards_open_fast() {
    let dir = Scratch::new("wds-speed");
    for s in 0..100 {
        dir.write(&format!("a-{s:03}.tar"), &shard(s * 1000, 1000));
    }
    for what in ["indexing", "opening with indices"] {
        let since = std::time::Instant::now();
        let listed = list(&dir, "a-{000..099}.tar").unwrap();
        eprintln!("{what}: {} samples in {:?}", listed.samples.len(), since.elapsed());
        assert_eq!(listed.samples.len(), 100_000);
    }
    let since = std::time::Instant::now();
    let shards: Vec<PathBuf> = (0..100).map(|s| dir.path(&format!("a-{s:03}.tar"))).collect();
    let all: Vec<Shard> = shards.par_iter().map(|s| Shard::open(s, &Ok(dir.path("c"))).unwrap()).collect();
    eprintln!("of which reading the indices of {} shards: {:?}", all.len(), since.elapsed());
    let listed = list(&dir, "a-*.tar").unwrap();
    let since = std::time::Instant::now();
    (0..10_000).for_each(|i| assert!(listed.pictures.encoded(i * 7919 % 100_000).unwrap().is_some()));
    eprintln!("10000 pictures in random order: {:?}", since.elapsed());
    let first = fs::metadata(dir.path(&format!("a-000.tar{ENDING}"))).unwrap().len();
    eprintln!("an index has {first} bytes");
}
