//! Folders of pictures: what a stage can use of them, what an evaluation measures, and how the programs treat broken
//! pictures.

use std::fs;
use std::io::Write;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use ett::config::{Config, StageConfig, StageKind, VisualHeadKind};
use ett::data::{Image, Source, Special, TextTokenizer, save_png};
use ett::eval::{self, HeldOut};
use ett::feed::{DataSet, Feed, Template};
use ett::infer::{Sampling, Trained};
use ett::model::{Ett, Part};
use ett::train::{self, RunOptions, Stage};

use crate::common::{Outcome, Scratch, cpu};

/// The smallest model with every part, for the pictures of `dir`.
fn config(dir: &Scratch) -> Config {
    let mut c = Config::default();
    (c.tokenizer.ch, c.tokenizer.ch_mult, c.tokenizer.norm_groups) = (8, vec![1, 2, 2], 4);
    (c.tokenizer.num_res_blocks, c.tokenizer.z_channels) = (1, 8);
    (c.quantizer.codes, c.quantizer.dim) = (16, 4);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    c.visual_head.kind = VisualHeadKind::Linear;
    let l = &mut c.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (264, 16, 1, 2, 1, 8, 24);
    (c.data.source, c.data.size) = (Source::Folder, 16);
    (c.data.train, c.data.test) = (dir.path("data"), Some(dir.path("data")));
    c.train.threads = 1;
    c
}

/// Makes a folder `data` of distinct pictures, `i.png`, with these metadata keys beside their names.
fn folder(dir: &Scratch, lines: &[serde_json::Value]) -> Outcome {
    fs::create_dir_all(dir.path("data"))?;
    let mut text = String::new();
    for (i, line) in lines.iter().enumerate() {
        let name = format!("{i:02}.png");
        let pixels = (0..16 * 16 * 3).map(|k| ((k * (i + 3)) % 17) as f32 / 8.5 - 1.0).collect();
        save_png(dir.path("data").join(&name), &Image { height: 16, width: 16, pixels })?;
        let mut line = line.clone();
        line["file_name"] = name.into();
        text += &format!("{line}\n");
    }
    Ok(fs::write(dir.path("data").join("metadata.jsonl"), text)?)
}

fn broken(dir: &Scratch, pictures: &[usize]) -> Outcome {
    for i in pictures {
        fs::write(dir.path("data").join(format!("{i:02}.png")), "no picture")?;
    }
    Ok(())
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no thread panics").extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs `what`; also returns what this thread logged meanwhile.
fn logged<T>(what: impl FnOnce() -> T) -> (T, String) {
    let log = Log::default();
    let to = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || to.clone()).finish();
    let done = tracing::subscriber::with_default(subscriber, what);
    let bytes = log.0.lock().expect("no thread panics").clone();
    (done, String::from_utf8_lossy(&bytes).into_owned())
}

fn stage(kind: StageKind) -> StageConfig {
    StageConfig::new(kind, 1, 2)
}

fn ids(parts: &[Part]) -> Vec<i32> {
    let ids = parts.iter().filter_map(|p| match p {
        Part::Tokens { ids, .. } => Some(ids.clone()),
        _ => None,
    });
    ids.collect::<Vec<_>>().concat()
}

#[test]
fn stages_say_how_many_pictures_they_can_use() -> Outcome {
    let dir = Scratch::new();
    let nothing = || serde_json::json!({});
    let mut lines = vec![nothing(); 10];
    lines[3] = serde_json::json!({"text": "a red circle"});
    lines[4] = serde_json::json!({"prompt": "draw a dog"});
    lines[5] = serde_json::json!({"prompt": "draw a cat", "text": " "});
    lines[6] = serde_json::json!({"qa": [["what?", "a cow"]]});
    folder(&dir, &lines)?;
    let c = config(&dir);
    let data = DataSet::train(&c.data, 8)?;
    let model = Ett::new(&c, cpu(1))?;
    let template = Template::new(TextTokenizer::Bytes, 100);
    let start = |data: &DataSet, kind: StageKind| {
        let all = Config { stage: vec![stage(kind)], ..model.cfg.clone() };
        logged(|| {
            let pictures = Stage::of(&all.stage[0], &model)?.reads_pictures();
            let feed = Feed::new(&all, 0, data, &template, pictures, false)?;
            feed.batch(0).map(|batch| batch.sequences)
        })
    };
    for (kind, want) in [
        (StageKind::Tokenizer, "stage tokenizer: 10 pictures"),
        (StageKind::Text, "stage text: 2 of 10 pictures can be used, those with a caption or a question"),
        (StageKind::Semantic, "stage semantic: 1 of 10 pictures can be used, those with a caption"),
        (StageKind::Chat, "stage chat: 1 of 10 pictures can be used, those with a question"),
        (StageKind::Gen, "stage gen: 3 of 10 pictures can be used, those with a prompt or a caption"),
    ] {
        let (sequences, log) = start(&data, kind);
        sequences?;
        assert!(log.contains(want) && !log.contains("WARN"), "{kind:?}: {log}");
    }

    // Prompts alone are enough to learn to draw, and are used for nothing else.
    let prompts = |i: usize| serde_json::json!({"prompt": format!("draw {i}")});
    folder(&dir, &(0..10).map(prompts).collect::<Vec<_>>())?;
    let data = DataSet::train(&c.data, 8)?;
    let (sequences, _) = start(&data, StageKind::Gen);
    for sequence in sequences? {
        let text = template.tokenizer().decode(&ids(&sequence));
        assert!(text.is_empty() || text.starts_with("draw "), "{text:?}");
    }
    let (refused, _) = start(&data, StageKind::Semantic);
    let e = refused.err().ok_or("no caption is none")?.to_string();
    assert!(
        e.ends_with("data: none of its 10 pictures has a caption, which stage `semantic` trains on"),
        "{e}"
    );
    Ok(())
}

#[test]
fn long_texts_are_cut_and_counted() -> Outcome {
    let template = Template::new(TextTokenizer::Bytes, 10);
    let end = |s: Special| template.tokenizer().special(s);
    let (ten, eleven) = ("abcdefghij", "abcdefghijk");
    // A text that is cut has no end token.
    let whole = [template.tokenizer().encode(ten)?, vec![end(Special::EndOfText)]].concat();
    assert_eq!(ids(&template.text_caption(ten)?), whole);
    assert_eq!(ids(&template.text_caption(eleven)?), whole[..10]);
    assert!(ids(&template.caption(0, eleven)?).ends_with(&whole[..10]));
    assert_eq!(template.answer(ten)?.last(), Some(&end(Special::ImEnd)));
    assert_eq!(template.answer(eleven)?, whole[..10]);
    assert_eq!(template.drawing(eleven)?, whole[..10]);
    assert_eq!(template.question(None, eleven)?, template.question(None, ten)?);
    assert!(!template.is_cut(ten)? && template.is_cut(eleven)?);

    let dir = Scratch::new();
    let long = "a very long story ".repeat(1200);
    let lines = [
        serde_json::json!({"text": long, "qa": [[long, "yes"], ["what?", long]], "prompt": long}),
        serde_json::json!({"text": "short", "qa": [["what?", "yes"]]}),
    ];
    folder(&dir, &lines)?;
    let mut c = config(&dir);
    c.data.max_text_tokens = 64;
    let data = DataSet::train(&c.data, 8)?;
    let model = Ett::new(&c, cpu(1))?;
    let template = Template::new(TextTokenizer::Bytes, c.data.max_text_tokens);
    for (kind, cut) in [
        (StageKind::Tokenizer, 0),
        (StageKind::Semantic, 1),
        (StageKind::Text, 3),
        (StageKind::Chat, 2),
        (StageKind::Gen, 1),
    ] {
        let all = Config { stage: vec![stage(kind)], ..model.cfg.clone() };
        let (batch, log) = logged(|| {
            let pictures = Stage::of(&all.stage[0], &model)?.reads_pictures();
            Feed::new(&all, 0, &data, &template, pictures, false)?.batch(0)
        });
        // A picture has 16 codes; the tokens of two chat turns surround a question and its answer.
        assert!(batch?.rows() <= 2 * (16 + 2 * 64 + 40), "{kind:?}");
        let want = format!("stage {}: {cut} texts and conversations are longer than data.max", kind.name());
        assert_eq!(log.contains(&want), cut > 0, "{kind:?}: {log}");
        assert_eq!(log.contains("and are cut"), cut > 0, "{kind:?}: {log}");
    }
    Ok(())
}

#[test]
fn what_was_not_measured_is_left_out() -> Outcome {
    let dir = Scratch::new();
    let c = config(&dir);
    let mut model = Ett::new(&c, cpu(1))?;
    let template = Template::new(TextTokenizer::Bytes, 100);
    let mut evaluate = |lines: &[serde_json::Value]| -> Result<_, Box<dyn std::error::Error>> {
        folder(&dir, lines)?;
        let test = DataSet::test(&c.data)?.ok_or("a test folder")?;
        let out = dir.path("out");
        fs::create_dir_all(&out)?;
        let table = eval::closing(&mut model, &test, &template, &out)?.rows();
        let json: serde_json::Value = serde_json::from_slice(&fs::read(out.join("eval.json"))?)?;
        let keys: Vec<&str> = ["caption_loss", "accuracy", "accuracy_yes_no", "accuracy_open", "codes"]
            .into_iter()
            .filter(|key| json.get(key).is_some())
            .collect();
        let during = |kind| eval::during(&mut model, &test, &template, kind);
        let during = [StageKind::Text, StageKind::Chat, StageKind::Gen].map(during);
        let during = during.into_iter().collect::<Result<Vec<_>, _>>()?;
        let during = during.into_iter().flat_map(|m| m.into_keys().collect::<Vec<_>>()).collect::<Vec<_>>();
        Ok((table, keys.join(" "), during.join(" ")))
    };
    let bare = || serde_json::json!({});
    let said = || serde_json::json!({"text": "a cat"});
    let open = || serde_json::json!({"qa": [["what?", "a cat"]]});
    let yes = || serde_json::json!({"qa": [["a cat?", "yes"]]});
    for (lines, keys, during) in [
        ([bare(), bare()], "", ""),
        ([said(), bare()], "caption_loss codes", "cap cap code"),
        ([open(), bare()], "accuracy accuracy_open", "answers"),
        ([yes(), bare()], "accuracy accuracy_yes_no", "answers"),
        ([yes(), open()], "accuracy accuracy_yes_no accuracy_open", "answers"),
    ] {
        let (table, got, measured) = evaluate(&lines)?;
        assert_eq!((got.as_str(), measured.as_str()), (keys, during));
        let has = |row: &str| table.iter().any(|(name, _)| name.trim() == row);
        assert_eq!(has("caption loss, nats per token"), keys.contains("caption_loss"));
        assert_eq!(has("answers exactly right"), keys.contains("accuracy"));
        assert_eq!(has("yes or no"), keys.contains("yes_no"));
        assert_eq!(has("all others"), keys.contains("open"));
        assert_eq!(has("code loss, nats per code"), keys.contains("codes"));
    }

    // Identical pictures have no variance to compare the reconstruction error with.
    folder(&dir, &[bare(), bare(), bare()])?;
    for i in [1, 2] {
        fs::copy(dir.path("data/00.png"), dir.path(&format!("data/0{i}.png")))?;
    }
    let test = DataSet::test(&c.data)?.ok_or("a test folder")?;
    let table = eval::closing(&mut model, &test, &template, &dir.path("out"))?.rows();
    assert!(table.iter().any(|(name, _)| name == "reconstruction MSE"), "{table:?}");
    assert!(table.iter().all(|(_, value)| !value.contains("inf") && !value.contains("NaN")), "{table:?}");
    Ok(())
}

#[test]
fn evaluations_look_at_the_first_usable_pictures_and_say_what_they_left_out() -> Outcome {
    let dir = Scratch::new();
    folder(&dir, &vec![serde_json::json!({}); 12])?;
    // More than half of all pictures, but not of those that are examined.
    broken(&dir, &[0, 2, 5, 6, 7, 8, 9, 10, 11])?;
    let mut c = config(&dir);
    c.data.eval_samples = 3;
    let mut model = Ett::new(&c, cpu(1))?;
    let template = Template::new(TextTokenizer::Bytes, 100);
    for cache_mib in [1, 0] {
        c.data.cache_mib = cache_mib;
        let test = DataSet::test(&c.data)?.ok_or("a test folder")?;
        let drawn = eval::held_out(&test, 3)?;
        assert_eq!(drawn.iter().map(|d| d.sample).collect::<Vec<_>>(), [1, 3, 4], "{cache_mib} MiB");
        if cache_mib > 0 {
            let report = eval::evaluate(&mut model, &test, &template, &drawn)?;
            assert_eq!((report.pictures, report.skipped.count), (3, 2));
            let (_, value) = &report.rows()[0];
            assert!(
                value.starts_with("3 (2 skipped: ") && value.contains("02.png: this is not a"),
                "{value}"
            );
        }
    }
    (c.data.eval_samples, c.data.cache_mib) = (12, 1);
    let e = DataSet::test(&c.data).err().ok_or("most pictures are broken")?.to_string();
    assert!(e.contains("9 of 12 pictures cannot be used") && e.ends_with("and 4 more"), "{e}");
    Ok(())
}

fn ett(arguments: &[&std::ffi::OsStr]) -> std::io::Result<Output> {
    Command::new(env!("CARGO_BIN_EXE_ett")).args(arguments).output()
}

#[test]
fn the_program_goes_on_after_broken_pictures_and_fails_at_the_end() -> Outcome {
    let dir = Scratch::new();
    folder(&dir, &vec![serde_json::json!({"text": "a cat", "qa": [["what?", "a cat"]]}); 12])?;
    let mut c = config(&dir);
    c.stage = vec![stage(StageKind::Tokenizer), stage(StageKind::Gen)];
    // The pictures are too small for the discriminator.
    c.loss.gan = 0.0;
    (c.data.eval_samples, c.data.max_text_tokens) = (3, 20);
    let run = dir.path("run");
    train::run(&c, cpu(1), &RunOptions::quiet(&run, &HeldOut))?;
    broken(&dir, &[1, 4])?;
    let (data, sheet) = (dir.path("data"), dir.path("sheet.png"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let complaint = format!("error: {}: 2 of 12 pictures cannot be used: ", data.display());

    let told = ett(&["caption".as_ref(), "--run".as_ref(), run.as_ref(), data.as_ref()])?;
    let (out, err) = (text(&told.stdout), text(&told.stderr));
    assert_eq!((told.status.code(), out.matches(".png: ").count()), (Some(1), 10), "{out}{err}");
    assert!(err.contains(&complaint) && err.contains("04.png: this is not a PNG"), "{err}");

    let reconstruct = |more: [&str; 2], images: &[&std::ffi::OsStr]| {
        let mut all: Vec<&std::ffi::OsStr> = vec!["reconstruct".as_ref(), "--run".as_ref(), run.as_ref()];
        all.extend(more.map(std::ffi::OsStr::new));
        all.extend(["--out".as_ref(), sheet.as_os_str()]);
        all.extend(images);
        ett(&all)
    };
    let told = reconstruct(["--max-side", "16"], &[data.as_ref()])?;
    let (out, err) = (text(&told.stdout), text(&told.stderr));
    assert_eq!((told.status.code(), out.matches("PSNR").count()), (Some(1), 10), "{out}{err}");
    assert!(err.contains(&complaint) && out.contains("10 of 12 pictures beside their"), "{out}{err}");
    // Gaps of 2 pixels between and around rows of 16.
    assert_eq!(Image::open(&sheet)?.height, 10 * 18 + 2);

    fs::remove_file(&sheet)?;
    let told = reconstruct(["--max-side", "0"], &[data.as_ref()])?;
    let err = text(&told.stderr);
    assert!(err.contains("`max_side` is 0, wanted 4 to 16384 pixels"), "{err}");
    let bad = data.join("01.png");
    let told = reconstruct(["--max-side", "16"], &[bad.as_ref()])?;
    assert_eq!(told.status.code(), Some(1));
    assert!(!sheet.exists());

    let trained = Trained::open(&run, cpu(1), false)?;
    let draw = |p: &str| trained.draw(&[p.into()], &Sampling::default(), &mut |_, _| ());
    assert_eq!(draw("\u{feff}a cat \r")?, draw("a cat")?);
    let e = draw("twenty-one characters").err().ok_or("21 tokens are too many")?.to_string();
    assert!(e.contains("`prompt` is 21 tokens long, wanted at most 20 (data.max_text_tokens)"), "{e}");
    let picture = Image::open(data.join("00.png"))?;
    assert_eq!(trained.ask(&picture, "\u{feff}what?")?, trained.ask(&picture, "what?")?);
    assert!(trained.ask(&picture, &"why? ".repeat(9)).is_err());
    Ok(())
}
