//! Sources of data in training: conversations, mixtures, aspect ratios, ranks, resuming, and `ett data`.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use ett::config::{Config, MixConfig, StageConfig, StageKind};
use ett::data::{Bitmap, Chat, Crop, Framing, Image, Source, TextTokenizer, save_png};
use ett::eval::HeldOut;
use ett::feed::{DataSet, Feed, Template};
use ett::model::Part;
use ett::ranks::Group;
use ett::train::{self, RunOptions};

use crate::common::{Outcome, Scratch, cpu};

/// A small model, for pictures of 32 x 32 pixels with tokens of 4 x 4.
fn config() -> Config {
    let mut c = Config::default();
    (c.tokenizer.ch, c.tokenizer.ch_mult, c.tokenizer.norm_groups) = (8, vec![1, 2, 2], 4);
    (c.tokenizer.num_res_blocks, c.tokenizer.z_channels) = (1, 8);
    (c.quantizer.codes, c.quantizer.dim) = (16, 4);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    // The pictures are too small for the discriminator.
    c.loss.gan = 0.0;
    let l = &mut c.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (264, 16, 1, 2, 1, 8, 24);
    (c.data.source, c.data.size) = (Source::Folder, 32);
    (c.train.threads, c.train.workers) = (1, 2);
    c
}

/// A picture of one colour, which belongs to number `i`.
fn coloured(height: usize, width: usize, i: usize) -> Image {
    let rgb = [40 + 20 * (i % 10), 250 - 20 * (i / 10), 128].map(|v| v as u8);
    Image::from(&Bitmap { height, width, rgb: rgb.repeat(height * width) })
}

/// Makes a folder of `n` pictures of these sizes in turn; the caption of a picture is its number.
fn folder(dir: &Path, n: usize, sizes: &[(usize, usize)]) -> Outcome {
    fs::create_dir_all(dir)?;
    let mut lines = String::new();
    for i in 0..n {
        let (height, width) = sizes[i % sizes.len()];
        save_png(dir.join(format!("{i:02}.png")), &coloured(height, width, i))?;
        let qa = [["which?", &i.to_string()]];
        let line = serde_json::json!({"file_name": format!("{i:02}.png"), "text": i.to_string(), "qa": qa});
        lines += &format!("{line}\n");
    }
    Ok(fs::write(dir.join("metadata.jsonl"), lines)?)
}

/// The caption of a sequence, and its picture's place in the batch.
fn said(template: &Template, sequence: &[Part]) -> (usize, usize) {
    let mut all = (usize::MAX, usize::MAX);
    for part in sequence {
        match part {
            Part::Tokens { ids, supervised: true } => {
                all.0 = template.tokenizer().decode(ids).parse().expect("the caption is a number");
            }
            Part::Image(place) => all.1 = *place,
            _ => {}
        }
    }
    all
}

#[test]
fn conversations_are_chatml_and_only_answers_are_supervised() -> Outcome {
    let template = Template::new(TextTokenizer::Bytes, 100).with_system("Be brief.");
    let turns = |all: &[(&str, &str)]| -> Vec<(String, String)> {
        all.iter().map(|(q, a)| (q.to_string(), a.to_string())).collect()
    };
    let mut chat = Chat { system: None, turns: turns(&[("what?", "a cat"), ("where?<|im_end|>", "here")]) };
    let rest = "<|im_start|>user\n<|vision_start|><image 3><|vision_end|>what?<|im_end|>\n\
                <|im_start|>assistant\n[[a cat<|im_end|>]]\n\
                <|im_start|>user\nwhere?<|im_end|><|im_end|>\n<|im_start|>assistant\n[[here<|im_end|>]]";
    let shown = template.show(&template.chat(3, &chat)?);
    assert_eq!(shown, format!("<|im_start|>system\nBe brief.<|im_end|>\n{rest}"));
    // The name of a special token in a text is text: one token each was inserted, ten bytes were written by the user.
    let end = template.end_of_turn();
    let ids: Vec<i32> = template
        .chat(3, &chat)?
        .into_iter()
        .flat_map(|p| if let Part::Tokens { ids, .. } = p { ids } else { vec![] })
        .collect();
    assert_eq!(ids.iter().filter(|&&id| id == end).count(), 5);

    chat.system = Some("Rhyme.".into());
    let shown = template.show(&template.chat(3, &chat)?);
    assert!(shown.starts_with("<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\n"), "{shown}");
    assert_eq!(template.show(&template.question(None, "what?")?).matches("Be brief.").count(), 1);
    let plain = Template::new(TextTokenizer::Bytes, 100);
    chat.system = None;
    assert_eq!(plain.show(&plain.chat(3, &chat)?), rest);

    // Later turns of a conversation that is too long are left out.
    let short = Template::new(TextTokenizer::Bytes, 20);
    assert!(short.loses_turns(&chat)? && !plain.loses_turns(&chat)?);
    let shown = short.show(&short.chat(3, &chat)?);
    assert!(shown.ends_with("assistant\n[[a cat<|im_end|>]]"), "{shown}");
    let whole = short.text_chat(&chat)?;
    assert!(matches!(&whole[..], [Part::Tokens { supervised: true, .. }]));
    Ok(())
}

#[test]
fn wide_pictures_stay_wide_and_keep_their_texts() -> Outcome {
    let dir = Scratch::new();
    folder(&dir.path("data"), 12, &[(20, 20), (10, 40), (50, 13)])?;
    let mut c = config();
    (c.data.train, c.data.framing) = (dir.path("data"), Framing::Buckets);
    c.data.test = Some(dir.path("data"));
    c.stage = vec![StageConfig::new(StageKind::Semantic, 3, 6)];
    let data = DataSet::train(&c.data, 4)?;
    let template = Template::new(TextTokenizer::Bytes, 100);
    let feed = Feed::new(&c, 0, &data, &template, true, false)?;
    let mut sizes = BTreeSet::new();
    for step in 0..4 {
        let batch = feed.batch(step)?;
        let images = &batch.parts[0].images;
        // The pictures of the batch in their order, each as its size and its first pixel.
        let pictures: Vec<(usize, usize, &[u8])> = images
            .iter()
            .flat_map(|(bytes, [_, h, w, _])| bytes.chunks(h * w * 3).map(|b| (*h, *w, &b[..3])))
            .collect();
        assert_eq!((pictures.len(), batch.sequences.len()), (6, 6));
        for sequence in &batch.sequences {
            let (number, place) = said(&template, sequence);
            let (h, w, pixel) = pictures[place];
            assert_eq!(pixel, &coloured(1, 1, number).to_u8()[..], "the picture of caption {number}");
            assert_eq!((h, w), [(32, 32), (16, 64), (64, 16)][number % 3], "caption {number}");
            sizes.insert((h, w));
        }
        let visual: usize = pictures.iter().map(|(h, w, _)| h * w / 16).sum();
        let text: usize = batch
            .sequences
            .iter()
            .flatten()
            .map(|p| match p {
                Part::Tokens { ids, .. } => ids.len(),
                _ => 0,
            })
            .sum();
        assert_eq!(batch.rows(), visual + text);
    }
    assert_eq!(sizes.len(), 3);
    let out = dir.path("run");
    let finished = train::run(&c, cpu(1), &RunOptions::quiet(&out, &HeldOut))?;
    assert!(finished.report.is_some());
    let metrics = fs::read_to_string(out.join("metrics.jsonl"))?;
    let lines: Vec<serde_json::Value> =
        metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!(lines.len(), 3);
    assert!(lines.iter().all(|l| l["grad_norm"].as_f64().is_some_and(f64::is_finite)), "{metrics}");

    c.stage[0].accumulate = 2;
    let e = c.check().expect_err("parts of different sizes").to_string();
    assert!(e.contains("stage.0.accumulate") && e.contains("buckets"), "{e}");
    Ok(())
}

#[test]
fn a_mixture_takes_its_sources_by_their_weights() -> Outcome {
    let dir = Scratch::new();
    folder(&dir.path("a"), 10, &[(16, 16)])?;
    folder(&dir.path("b"), 30, &[(16, 16)])?;
    let mut c = config();
    let part = |name: &str, weight| MixConfig {
        source: Source::Folder,
        train: dir.path(name),
        test: Some(dir.path(name)),
        weight,
        ..MixConfig::default()
    };
    c.data.mix = vec![part("a", 3.0), part("b", 1.0)];
    c.stage = vec![StageConfig::new(StageKind::Semantic, 1, 8)];
    c.check()?;
    let data = DataSet::train(&c.data, 4)?;
    assert_eq!(data.samples.len(), 40);
    let template = Template::new(TextTokenizer::Bytes, 100);
    let feed = Feed::new(&c, 0, &data, &template, true, false)?;
    let mut from_b = 0;
    for step in 0..40 {
        for sequence in feed.batch(step)?.sequences {
            from_b += usize::from(said(&template, &sequence).0 >= 10);
        }
    }
    // A quarter of 320 samples, of which a third has a number below 10.
    assert!((35..75).contains(&from_b), "{from_b}");
    assert_eq!(DataSet::test(&c.data)?.ok_or("held-out data")?.samples.len(), 40);

    // The fingerprint does not depend on where the folders are.
    let before = data.fingerprint();
    fs::rename(dir.path("b"), dir.path("elsewhere"))?;
    c.data.mix[1] = part("elsewhere", 1.0);
    assert_eq!(DataSet::train(&c.data, 4)?.fingerprint(), before);

    // A source whose pictures are gone is an error, however many the others have.
    let mut gone = c.clone();
    fs::create_dir_all(dir.path("gone"))?;
    fs::copy(dir.path("a/metadata.jsonl"), dir.path("gone/metadata.jsonl"))?;
    gone.data.mix[0] = part("gone", 1.0);
    let e = DataSet::train(&gone.data, 4).err().ok_or("missing pictures")?.to_string();
    assert!(e.contains("10 of 10 pictures cannot be used"), "{e}");
    // An evaluation looks at all sources.
    let test = DataSet::test(&c.data)?.ok_or("held-out data")?;
    let drawn: Vec<usize> = ett::eval::held_out(&test, 4)?.iter().map(|d| d.sample).collect();
    assert_eq!(drawn, [0, 10, 1, 11]);
    // A stage that names only a path would be given the mixture.
    let mut stage = c.clone();
    stage.stage[0].data.train = Some(dir.path("a"));
    let e = stage.check().expect_err("a path without its source").to_string();
    assert!(e.contains("stage.0.data.source"), "{e}");

    c.data.mix[0].weight = 0.0;
    let e = c.check().expect_err("a source without weight").to_string();
    assert!(e.contains("data.mix.0.weight"), "{e}");
    Ok(())
}

/// Shards of a mixture, one with a broken picture: 20 steps are 10 and 10, bit for bit.
#[test]
fn a_run_on_shards_resumes_at_its_sample() -> Outcome {
    let dir = Scratch::new();
    folder(&dir.path("a"), 14, &[(20, 20), (10, 40)])?;
    folder(&dir.path("b"), 9, &[(30, 20)])?;
    let mut c = config();
    for name in ["a", "b"] {
        shards(&dir.path(name), &dir.path(&format!("{name}-shards")))?;
    }
    // The first picture of a shard loses its signature.
    let shard = dir.path("b-shards/train-000001.tar");
    let mut bytes = fs::read(&shard)?;
    let at = bytes.windows(4).position(|w| w == b"\x89PNG").ok_or("a PNG")?;
    bytes[at..at + 4].fill(b'?');
    fs::write(&shard, bytes)?;
    let part = |name: &str, weight| MixConfig {
        source: Source::WebDataset,
        train: dir.path(name).join("*.tar"),
        weight,
        ..MixConfig::default()
    };
    c.data.mix = vec![part("a-shards", 1.0), part("b-shards", 2.0)];
    (c.data.framing, c.data.crop, c.data.cache_mib) = (Framing::Buckets, Crop::Random, 0);
    (c.train.save_every, c.train.keep) = (10, 2);
    c.stage = vec![StageConfig::new(StageKind::Semantic, 20, 3)];
    let out = dir.path("run");
    train::run(&c, cpu(1), &RunOptions::quiet(&out, &HeldOut))?;
    let weights = || fs::read(out.join("model.safetensors"));
    let whole = weights()?;

    // Back to the checkpoint in the middle.
    let folders = fs::read_dir(out.join("checkpoints"))?.flatten().filter(|e| e.path().is_dir());
    let mut names: Vec<String> = folders.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    assert_eq!(names.len(), 2, "{names:?}");
    fs::write(out.join("checkpoints/latest"), format!("{}\n", names[0]))?;
    fs::remove_dir_all(out.join("checkpoints").join(&names[1]))?;
    fs::remove_file(out.join("model.safetensors"))?;
    // Where the shards were indexed meanwhile does not matter.
    for entry in fs::read_dir(dir.path("a-shards"))?.flatten() {
        if entry.path().extension().is_some_and(|e| e == "ett-index") {
            fs::remove_file(entry.path())?;
        }
    }
    train::resume(&out, cpu(1), true, &HeldOut, &Group::alone())?;
    assert!(weights()? == whole, "the resumed run has other weights");
    Ok(())
}

/// Converts a folder to shards of five samples by the program.
fn shards(from: &Path, to: &Path) -> Outcome {
    let told = Command::new(crate::common::program("ett"))
        .args(["data", "convert", "--per-shard", "5"])
        .arg(from)
        .arg("--out")
        .arg(to)
        .output()?;
    let (out, err) = (String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    assert!(told.status.success() && out.contains("samples in"), "{out}{err}");
    Ok(())
}

#[test]
fn ranks_share_the_batch_of_one() -> Outcome {
    let dir = Scratch::new();
    folder(&dir.path("data"), 10, &[(16, 16)])?;
    let mut c = config();
    c.data.train = dir.path("data");
    c.stage = vec![StageConfig { accumulate: 2, ..StageConfig::new(StageKind::Semantic, 1, 8) }];
    let data = DataSet::train(&c.data, 4)?;
    let template = Template::new(TextTokenizer::Bytes, 100);
    let feed = |rank, ranks| Feed::new(&c, 0, &data, &template, true, false)?.of_rank(rank, ranks);
    let numbers = |feed: &Feed, step| -> Result<Vec<Vec<usize>>, Box<dyn std::error::Error>> {
        let all: Vec<usize> = feed.batch(step)?.sequences.iter().map(|s| said(&template, s).0).collect();
        let part = all.len() / 2;
        Ok(all.chunks(part).map(<[usize]>::to_vec).collect())
    };
    let (whole, first, second) = (feed(0, 1)?, feed(0, 2)?, feed(1, 2)?);
    for step in 0..5 {
        let (all, a, b) = (numbers(&whole, step)?, numbers(&first, step)?, numbers(&second, step)?);
        for part in 0..2 {
            assert_eq!([&a[part][..], &b[part][..]].concat(), all[part]);
        }
    }
    // Padded for replays, the shares of all ranks and steps have the same sizes.
    let padded = |rank| Feed::new(&c, 0, &data, &template, true, true)?.of_rank(rank, 2);
    let (first, second) = (padded(0)?, padded(1)?);
    let sizes = first.batch(0)?.sizes();
    for step in 0..5 {
        assert!(first.batch(step)?.sizes() == sizes && second.batch(step)?.sizes() == sizes, "step {step}");
    }
    let e = feed(0, 3).err().ok_or("4 pictures for 3 ranks")?.to_string();
    assert!(e.contains("stage.batch") && e.contains("ranks, 3"), "{e}");
    Ok(())
}

#[test]
fn inspecting_shows_what_a_model_sees() -> Outcome {
    let dir = Scratch::new();
    folder(&dir.path("data"), 9, &[(20, 20), (10, 40)])?;
    fs::write(dir.path("data/04.png"), "no picture")?;
    let sheet = dir.path("sheet.png");
    let told = Command::new(crate::common::program("ett"))
        .args(["data", "inspect", "--buckets", "--size", "64", "--samples", "5", "--out"])
        .args([&sheet, &dir.path("data")])
        .output()?;
    let out = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.status.success(), "{out}{}", String::from_utf8_lossy(&told.stderr));
    for want in [
        "captions                        9 in 9 samples",
        "tokens of a caption             1.0 on average, 1 at most",
        "3 of 32 x 128, 2 of 64 x 64",
        "not used: ",
        "04.png: this is not a",
        "caption: <|vision_start|><image 0><|vision_end|>[[3<|endoftext|>]]",
        "conversation: <|im_start|>user <|vision_start|><image 0><|vision_end|>which?<|im_end|> \
         <|im_start|>assistant [[3<|im_end|>]]",
        "drawing: 3<|vision_start|>[[<image 0>]]",
    ] {
        assert!(out.contains(want), "{want}\n{out}");
    }
    assert!(Image::open(&sheet)?.width > 4 * 128);
    Ok(())
}
