use super::*;
use crate::data::scratch::Scratch;
use crate::data::{Columns, Source, Wanted};
use crate::rng::Philox;

const CIRCLE: &str = "<circle cx=\"5\" cy=\"5\" r=\"4\" fill=\"#ff0000\"/>";

fn origin() -> Origin {
    Origin {
        name: "tests".into(),
        what: "icons".into(),
        package: "none".into(),
        version: "1.0".into(),
        sha256: String::new(),
        licence: "CC0-1.0".into(),
        author: "nobody".into(),
        url: String::new(),
        used: 1,
    }
}

fn body(svg: &str) -> Body {
    Body { name: "thing".into(), origin: 0, view: [0.0, 0.0, 10.0, 10.0], svg: svg.into() }
}

fn icon(split: Split, size: [usize; 2], at: [usize; 4]) -> Picture {
    Picture {
        split,
        size,
        background: Paint([0, 0, 255]),
        items: vec![Item::Icon { body: 0, at, paint: Paint([0, 255, 0]) }],
        captions: vec!["a red circle".into(), "a \"dot\"".into()],
        prompt: Some("draw a red circle".into()),
        questions: vec![("what is this?".into(), "a circle".into())],
    }
}

/// Two letters: a square block, and a space.
fn alphabet() -> Alphabet {
    let block = Letter(500.0, "M0 0L400 0L400 -400L0 -400Z".into());
    let letters = [('a', block), (' ', Letter(500.0, String::new()))];
    Alphabet { name: "blocks".into(), origin: 0, ascent: 400.0, descent: 0.0, letters: letters.into() }
}

fn text(says: &str) -> Picture {
    let item =
        Item::Text { alphabet: 0, text: says.into(), at: [10.0, 50.0], em: 50.0, paint: Paint([9, 8, 7]) };
    Picture { items: vec![item], ..icon(Split::Test, [100, 80], [0, 0, 1, 1]) }
}

fn with(bodies: Vec<Body>, pictures: Vec<Picture>) -> Result<Drawings> {
    Drawings::new("tests", vec![origin()], vec![alphabet()], bodies, pictures)
}

fn small() -> Drawings {
    let square = icon(Split::Train, [60, 40], [10, 0, 40, 40]);
    with(vec![body(CIRCLE)], vec![square, text("a a"), icon(Split::Train, [16, 16], [0, 0, 16, 16])]).unwrap()
}

fn pixel(bitmap: &Bitmap, x: usize, y: usize) -> [u8; 3] {
    let at = (y * bitmap.width + x) * 3;
    bitmap.rgb[at..at + 3].try_into().unwrap()
}

/// A file of these lines.
fn packed(lines: &str) -> Vec<u8> {
    zstd::encode_all(lines.as_bytes(), 1).unwrap()
}

fn unpacked(drawings: &Drawings) -> String {
    String::from_utf8(zstd::decode_all(&drawings.contents.bytes().unwrap()[..]).unwrap()).unwrap()
}

#[test]
fn files_round_trip() {
    let dir = Scratch::new("vector-round");
    let made = small();
    let first = made.save(dir.path("a.vector")).unwrap();
    let read = Drawings::open(dir.path("a.vector")).unwrap();
    assert_eq!(read.contents, made.contents);
    assert_eq!(read.save(dir.path("b.vector")).unwrap(), first);
    assert_eq!((read.part(Split::Train), read.part(Split::Test)), (vec![0, 2], vec![1]));
    for i in 0..3 {
        assert_eq!(read.draw(i).unwrap(), made.draw(i).unwrap());
    }
    let e = read.draw(3).unwrap_err().to_string();
    assert!(e.ends_with("a.vector: there is no picture 3, it holds 3"), "{e}");
}

#[test]
fn icons_and_words_are_drawn_at_any_size() {
    let all = small();
    let bitmap = all.draw(0).unwrap();
    assert_eq!((bitmap.height, bitmap.width, bitmap.rgb.len()), (40, 60, 7200));
    assert_eq!(pixel(&bitmap, 30, 20), [255, 0, 0]);
    assert_eq!(pixel(&bitmap, 1, 20), [0, 0, 255]);
    for (shorter, want) in [(80, (80, 120)), (20, (20, 30)), (1, (1, 2)), (usize::MAX, (40, 60))] {
        let bitmap = all.draw_shorter(0, shorter).unwrap();
        assert_eq!((bitmap.height, bitmap.width), want);
    }
    assert_eq!(pixel(&all.draw_shorter(0, 80).unwrap(), 60, 40), [255, 0, 0]);
    // Blocks of 20 pixels above the base line, at 10 and, after a space of 25, at 60.
    let bitmap = all.draw(1).unwrap();
    for (x, inked) in [(12, true), (28, true), (40, false), (62, true), (78, true), (82, false)] {
        assert_eq!(pixel(&bitmap, x, 40) == [9, 8, 7], inked, "{x}");
    }
    assert_eq!(pixel(&bitmap, 12, 52), [0, 0, 255]);
}

#[test]
fn current_colour_is_that_of_the_picture_and_what_overflows_is_cut() {
    let wide = body("<rect x=\"-50\" width=\"100\" height=\"10\" fill=\"currentColor\"/>");
    let all = with(vec![wide], vec![icon(Split::Train, [30, 30], [10, 10, 10, 10])]).unwrap();
    let bitmap = all.draw(0).unwrap();
    assert_eq!(pixel(&bitmap, 15, 15), [0, 255, 0]);
    assert_eq!([pixel(&bitmap, 8, 15), pixel(&bitmap, 21, 15)], [[0, 0, 255]; 2]);
}

#[test]
fn parts_are_sources_of_samples() {
    let dir = Scratch::new("vector-source");
    let path = dir.path("a.vector");
    small().save(&path).unwrap();
    let columns = Columns::default();
    let part =
        |split| Wanted { split, path: Some(&path), images: None, columns: &columns, samples: 0, size: 8 };
    assert!(Source::Vector.has(&part(Split::Train)));
    let listed = Source::Vector.open(&part(Split::Train)).unwrap();
    assert_eq!(listed.samples.len(), 2);
    let sample = &listed.samples[1];
    assert_eq!(sample.image, path.join("2"));
    assert_eq!(sample.captions, ["a red circle", "a \"dot\""]);
    assert_eq!(sample.drawing_prompt(), Some("draw a red circle"));
    assert_eq!(sample.turns().collect::<Vec<_>>(), [("what is this?", "a circle")]);
    assert_eq!(listed.pictures.decode(1, 16).unwrap(), small().draw(2).unwrap());
    assert!(listed.about.iter().any(|(name, text)| name == "tests" && text.contains("CC0-1.0")));
    assert_eq!(Source::Vector.open(&part(Split::Test)).unwrap().samples.len(), 1);

    with(vec![body(CIRCLE)], vec![text("a")]).unwrap().save(&path).unwrap();
    let e = Source::Vector.open(&part(Split::Train)).unwrap_err().to_string();
    assert!(e.ends_with("a.vector: holds no pictures of the train part"), "{e}");
}

#[test]
fn bodies_reach_nothing_outside_and_do_bounded_work() {
    let dir = Scratch::new("vector-hostile");
    dir.write("secret.svg", format!("<svg xmlns=\"http://www.w3.org/2000/svg\">{CIRCLE}</svg>").as_bytes());
    let secret = dir.path("secret.svg").display().to_string();
    // Each level draws the one before it ten times.
    let mut laughs = format!("<defs><g id=\"l0\">{CIRCLE}</g>");
    for level in 1..10 {
        let again = format!("<use href=\"#l{}\"/>", level - 1).repeat(10);
        laughs += &format!("<g id=\"l{level}\">{again}</g>");
    }
    laughs += "</defs><use href=\"#l9\"/>";
    let deep = format!("{}{CIRCLE}{}", "<g>".repeat(1000), "</g>".repeat(1000));
    for (svg, want) in [
        (format!("<image href=\"{secret}\" width=\"10\" height=\"10\"/>"), "contains <image>"),
        (format!("<use href=\"{secret}#a\"/>"), "only parts of the same body"),
        (format!("<rect width=\"9\" height=\"9\" fill=\"url({secret}#a)\"/>"), "only parts of the same body"),
        ("<g style=\"mask: url('http://example.org/m#a')\"/>".into(), "only parts of the same body"),
        ("<text>hello</text>".into(), "contains <text>"),
        ("<style>@import url(x)</style>".into(), "contains <style>"),
        ("<filter><feTurbulence numOctaves=\"99999999\"/></filter>".into(), "contains <feTurbulence>"),
        ("<svg/>".into(), "contains <svg>"),
        ("</svg><svg>".into(), "thing: "),
        ("<!DOCTYPE svg [<!ENTITY a \"b\">]>".into(), "thing: "),
        ("<g>".into(), "thing: "),
        ("<path d=\"M0 0\"".into(), "thing: "),
        ("&unknown;".into(), "thing: "),
        ("<g id=\"a\"><use href=\"#a\"/></g>".into(), "refers to itself"),
        ("<g id=\"a\" mask=\"url(#b)\"/><mask id=\"b\"><use href=\"#a\"/></mask>".into(), "refers to itself"),
        (laughs, "too much work"),
        (deep, "nested more than"),
        ("<g/>".repeat(40_000), "bytes, wanted at most"),
        ("<g/>".repeat(16_000), "too much work"),
    ] {
        let picture = icon(Split::Train, [20, 20], [0, 0, 20, 20]);
        let fine = Picture { items: Vec::new(), ..picture.clone() };
        let all = with(vec![body(&svg)], vec![picture, fine]).unwrap();
        let e = all.draw(0).unwrap_err().to_string();
        assert!(e.contains("new drawings/0: ") && e.contains(want), "{svg:.60}: {e}");
        all.draw(1).expect("other pictures are not concerned");
    }
}

#[test]
fn work_is_bounded_by_picture_and_numbers_are_bounded() {
    let error = |svg: &str, items: usize| {
        let mut picture = icon(Split::Train, [20, 20], [0, 0, 20, 20]);
        picture.items = vec![picture.items[0].clone(); items];
        with(vec![body(svg)], vec![picture]).unwrap().draw(0).err().map(|e| e.to_string())
    };
    let blurs = format!(
        "<filter id=\"f\"><feGaussianBlur stdDeviation=\"1\"/></filter>{}{CIRCLE}{}",
        "<g filter=\"url(#f)\">".repeat(20),
        "</g>".repeat(20)
    );
    assert_eq!(error(&blurs, 1), None);
    assert!(error(&blurs, 64).unwrap().contains("too much work to draw all of its items"));
    for (svg, want) in [
        ("<path d=\"M0 0C1e9 1e9 -1e9 1e9 5 5\" stroke=\"#000\"/>", "coordinates or stroke widths"),
        ("<path d=\"M0 0L2000000 5\" stroke=\"#000\"/>", "coordinates or stroke widths"),
        ("<path d=\"M0 0L5 5\" stroke=\"#000\" style=\"stroke-width:1e8\"/>", "coordinates or stroke widths"),
        ("<path d=\"M0 0L9 9\" stroke=\"#000\" stroke-dasharray=\"0.00002\"/>", "has dashes shorter than"),
    ] {
        let e = error(svg, 1).unwrap();
        assert!(e.contains(want), "{svg}: {e}");
    }
    for fine in [
        "<path d=\"M0 0a9 9 0 119999-9999\"/>",
        "<path d=\"M0 0L9 9\" stroke=\"#000\" stroke-dasharray=\"0.5 1\"/>",
        "<path d=\"M0 0L9 9\" stroke=\"#000\" stroke-dasharray=\"0\"/>",
    ] {
        assert_eq!(error(fine, 1), None, "{fine}");
    }
    // Letters that take no room.
    let letter = Letter(0.0, "M0 0L400 0L400 -400L0 -400Z".repeat(1000));
    let alphabet = Alphabet { letters: [('a', letter)].into(), ..alphabet() };
    let all = Drawings::new("tests", vec![origin()], vec![alphabet], vec![], vec![text(&"a".repeat(20_000))]);
    let e = all.unwrap().draw(0).unwrap_err().to_string();
    assert!(e.contains("too much work to draw all of its items"), "{e}");
}

/// Draws everything of the file that `ETT_VECTOR` names.
#[test]
#[ignore = "needs a file"]
fn a_whole_file_is_drawn() {
    use rayon::prelude::*;
    let all = Drawings::open(std::env::var_os("ETT_VECTOR").unwrap()).unwrap();
    let draw = |i| all.draw_shorter(i, 16).err().map(|e| e.to_string());
    let bad: Vec<String> = (0..all.pictures().len()).into_par_iter().filter_map(draw).collect();
    assert!(bad.is_empty(), "{} of {}: {:#?}", bad.len(), all.pictures().len(), &bad[..bad.len().min(20)]);
}

#[test]
fn odd_numbers_in_bodies_are_harmless() {
    for svg in [
        "<circle r=\"1e38\" cx=\"-1e38\"/>",
        "<rect width=\"nan\" height=\"inf\"/>",
        "<path d=\"M0 0L1e30 1e30L-1e30 5Z\" stroke=\"#000\" stroke-width=\"1e30\"/>",
        "<path d=\"M0 0L10 10\" stroke=\"#000\" stroke-dasharray=\"1e-30 1e-30\"/>",
        "<g transform=\"scale(0)\"><rect width=\"5\" height=\"5\"/></g>",
        "<g transform=\"matrix(1e20 0 0 1e20 1e20 1e20)\"><rect width=\"5\" height=\"5\"/></g>",
        "<filter id=\"f\" x=\"-1e9\" width=\"1e10\"><feGaussianBlur stdDeviation=\"1e9\"/></filter>\
         <g filter=\"url(#f)\"><rect width=\"5\" height=\"5\"/></g>",
        "<mask id=\"m\" width=\"1e30\"><rect width=\"5\" height=\"5\"/></mask><g mask=\"url(#m)\"/>",
        "<linearGradient id=\"a\" href=\"#missing\"/><rect width=\"5\" height=\"5\" fill=\"url(#a)\"/>",
    ] {
        let all = with(vec![body(svg)], vec![icon(Split::Train, [20, 20], [0, 0, 20, 20])]).unwrap();
        let _ = all.draw(0);
    }
}

#[test]
fn contents_that_cannot_be_drawn_are_refused() {
    let square = || icon(Split::Train, [20, 20], [0, 0, 20, 20]);
    let letters = |letter| Alphabet { letters: [('a', letter)].into(), ..alphabet() };
    let many = |n| (0..n).map(|i| i.to_string()).collect::<Vec<_>>();
    for (alphabet, body, picture, want) in [
        (
            alphabet(),
            body(CIRCLE),
            Picture { size: [0, 5], ..square() },
            "the canvas is 0 x 5 pixels, wanted",
        ),
        (alphabet(), body(CIRCLE), Picture { size: [9, 4097], ..square() }, "wanted sides of 1 to 4096"),
        (alphabet(), body(CIRCLE), icon(Split::Train, [20, 20], [1, 0, 20, 20]), "is not inside 20 x 20"),
        (alphabet(), body(CIRCLE), icon(Split::Train, [20, 20], [0, usize::MAX, 1, 2]), "is not inside"),
        (alphabet(), body(CIRCLE), icon(Split::Train, [20, 20], [0, 0, 0, 5]), "is not inside"),
        (alphabet(), body(CIRCLE), text("ab"), "cannot spell \"ab\""),
        (alphabet(), body(CIRCLE), text("aaaa"), "is not inside 100 x 80"),
        (
            alphabet(),
            body(CIRCLE),
            Picture { captions: many(257), ..square() },
            "257 captions, wanted at most 256",
        ),
        (alphabet(), Body { origin: 1, ..body(CIRCLE) }, square(), "origin 1 does not exist, there are 1"),
        (alphabet(), Body { view: [0.0, 0.0, 0.0, 1.0], ..body(CIRCLE) }, square(), "the view box is"),
        (alphabet(), Body { view: [f32::NAN, 0.0, 1.0, 1.0], ..body(CIRCLE) }, square(), "the view box is"),
        (letters(Letter(f32::NAN, String::new())), body(CIRCLE), square(), "the advance of 'a' is NaN"),
        (letters(Letter(1.0, "M0 0\"/>".into())), body(CIRCLE), square(), "wanted SVG path data"),
    ] {
        let e =
            Drawings::new("tests", vec![origin()], vec![alphabet], vec![body], vec![picture]).unwrap_err();
        assert!(e.to_string().contains(want), "{e}");
    }
    let mut other = square();
    other.items = vec![Item::Icon { body: 7, at: [0, 0, 1, 1], paint: Paint([0; 3]) }];
    let e = with(vec![body(CIRCLE)], vec![other]).unwrap_err().to_string();
    assert!(e.contains("picture 0: body 7 does not exist"), "{e}");
}

#[test]
fn files_that_are_something_else_are_named() {
    let dir = Scratch::new("vector-else");
    let path = dir.path("a.vector");
    let good = unpacked(&small());
    let lines: Vec<&str> = good.split_inclusive('\n').collect();
    let all_but = |n: usize| lines[..lines.len() - n].concat();
    for (bytes, want) in [
        (b"hello".to_vec(), "this is not a file of vector graphics ("),
        (Vec::new(), "this is not a file of vector graphics ("),
        (packed(""), "this file is empty"),
        (packed("hello\n"), "does not say \"ett vector graphics\""),
        (
            packed(&good.replacen("\"version\":1,", "\"version\":2,", 1)),
            "has the format 2, but this program reads",
        ),
        (packed(&good.replacen("\"made\"", "\"mad\"", 1)), "line 1 is not a manifest: unknown field `mad`"),
        (packed(&good.replacen("\"train\"", "\"trian\"", 1)), "the split is \"trian\", wanted train or test"),
        (packed(&good.replacen("#0000ff", "blue", 1)), "the colour is \"blue\", wanted #rrggbb"),
        (packed(&good.replacen("[60,40]", "[60,99999]", 1)), "is not a picture: the canvas is 60 x 99999"),
        (packed(&all_but(1)), "ends before line 6, where a picture is announced"),
        (packed(good.trim_end()), "line 6 is cut off"),
        (packed(&(good.clone() + "{}\n")), "line 7 comes after the last announced picture"),
        (packed(&"x".repeat(64 << 20)), "line 1 is longer than 1 MiB"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let e = Drawings::open(&path).unwrap_err().to_string();
        assert!(e.contains("a.vector: ") && e.contains(want), "wanted {want}: {e}");
    }
    let e = Drawings::open(dir.path("none")).unwrap_err().to_string();
    assert!(e.contains("there is no such file"), "{e}");
    let e = Drawings::open(dir.root()).unwrap_err().to_string();
    assert!(e.contains("this is a folder"), "{e}");
}

/// Whatever a file holds, it is refused or its pictures are drawn or refused.
#[test]
fn damaged_files_are_harmless() {
    let dir = Scratch::new("vector-damaged");
    let path = dir.path("a.vector");
    let whole = small().contents.bytes().unwrap();
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        Drawings::open(&path).expect_err("a truncated file");
    }
    let try_all = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let Ok(all) = Drawings::open(&path) else { return 0 };
        (0..all.pictures().len()).filter(|&i| all.draw_shorter(i, 16).is_ok()).count()
    };
    let mut rng = Philox::new(3, 0);
    for _ in 0..500 {
        let mut flipped = whole.clone();
        let at = rng.below(flipped.len());
        flipped[at] ^= 1 << rng.below(8);
        try_all(&flipped);
    }
    // Compressed anew, so that no checksum stops the damage.
    let lines = unpacked(&small()).into_bytes();
    let mut drawn = 0;
    for _ in 0..1500 {
        let mut damaged = lines.clone();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(damaged.len());
            match rng.below(3) {
                0 => damaged[at] = b"0123456789eE-.,:\"<>#/\\{}[]"[rng.below(26)],
                1 => damaged[at] ^= 1 << rng.below(8),
                _ => {
                    damaged.remove(at);
                }
            }
        }
        drawn += try_all(&zstd::encode_all(&damaged[..], 1).unwrap());
    }
    assert!(drawn > 100, "some damage is in texts, after which all is drawn: {drawn}");
}
