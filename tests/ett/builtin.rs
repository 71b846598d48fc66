//! The built-in data, as training uses it.

use std::collections::BTreeSet;

use ett::config::{Config, DataConfig, SamplingConfig, StageKind, VisualHeadKind};
use ett::data::{Crop, Source, TextTokenizer};
use ett::eval::closing;
use ett::feed::{DataSet, Template};
use ett::model::Ett;
use ett::rng::Philox;

use crate::common::{Outcome, Scratch, cpu};

fn config(source: Source, size: usize) -> DataConfig {
    DataConfig { source, size, train_samples: 60, test_samples: 20, ..DataConfig::default() }
}

#[test]
fn built_in_data_is_like_a_folder_and_the_same_every_time() -> Outcome {
    for (source, size) in [(Source::Scenes, 32), (Source::Words, 64), (Source::Mixed, 48)] {
        let cfg = config(source, size);
        let train = DataSet::train(&cfg, 16)?;
        let test = DataSet::test(&cfg)?.ok_or("20 test pictures")?;
        assert_eq!((train.images.len(), train.samples.len(), test.images.len()), (60, 60, 20));
        assert_eq!(train.root.to_str(), Some(source.name()));
        assert_eq!((train.images.bytes(), train.images.skipped().count), (0, 0));
        for kind in [StageKind::Tokenizer, StageKind::Text, StageKind::Align, StageKind::Chat] {
            assert_eq!(train.usable(kind).len(), 60, "{}", kind.name());
        }
        let captions = |data: &DataSet| -> BTreeSet<_> {
            data.samples.iter().filter_map(|s| s.drawing_prompt().map(String::from)).collect()
        };
        assert!(captions(&train).is_disjoint(&captions(&test)) && captions(&test).len() > 10);
        // A larger set begins with the same pictures; a random crop of a square picture is the picture itself.
        let more = DataSet::train(&DataConfig { train_samples: 70, crop: Crop::Random, ..cfg.clone() }, 16)?;
        assert_eq!(more.samples[..60], train.samples[..]);
        for i in [0, 59] {
            let drawn = |data: &DataSet| data.images.first([i], &mut Philox::new(3, 0));
            assert_eq!(drawn(&more)?, drawn(&train)?);
            assert_eq!((drawn(&train)?.1.height, drawn(&train)?.1.width), (size, size));
        }
        assert!(DataSet::test(&DataConfig { test_samples: 0, ..cfg })?.is_none());
    }
    Ok(())
}

/// The names in `eval.json` that docs/evaluation.md promises, for an untrained model.
#[test]
fn the_closing_evaluation_reports_every_kind_of_question_and_what_drawings_show() -> Outcome {
    let mut cfg = Config::default();
    let t = &mut cfg.tokenizer;
    (t.ch, t.ch_mult, t.num_res_blocks, t.z_channels, t.norm_groups) = (8, vec![1; 4], 1, 8, 4);
    (cfg.quantizer.codes, cfg.quantizer.dim, cfg.lpips.widths) = (16, 4, [4; 5]);
    let l = &mut cfg.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (264, 16, 1, 2, 1, 8, 24);
    cfg.visual_head.kind = VisualHeadKind::Tied;
    let eval = DataConfig { eval_samples: 64, eval_drawings: 10, ..config(Source::Mixed, 48) };
    cfg.data = DataConfig { test_samples: 64, ..eval };
    let mut model = Ett::new(&cfg, cpu(2))?;
    let test = DataSet::test(&cfg.data)?.ok_or("64 test pictures")?;
    let template = Template::new(TextTokenizer::Bytes, 100);
    let dir = Scratch::new();
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/evaluation.md"))?;
    let report = closing(&mut model, &test, &template, &dir.path(""))?;
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.path("eval.json"))?)?;

    let names = |list: &str, key: &str| -> BTreeSet<String> {
        let all = json[list].as_array().into_iter().flatten();
        all.filter_map(|entry| entry[key].as_str().map(String::from)).collect()
    };
    let asked = [
        ["what color?", "what shape?", "how many?", "where?", "what size?"].as_slice(),
        &["what does it say?", "what color is the word?", "what shape is there?", "what color is the shape?"],
    ];
    let looked = [
        ["colour", "count", "place", "colour, count and place", "shape", "size"].as_slice(),
        &["word", "colours of word and shape", "shape beside the word"],
    ];
    let all = |names: [&[&str]; 2]| names.concat().into_iter().map(String::from).collect::<BTreeSet<_>>();
    assert_eq!((names("types", "question"), names("drawings", "aspect")), (all(asked), all(looked)));
    let keys = json.as_object().into_iter().flatten().map(|(key, _)| key.clone());
    for name in keys.chain(all(asked)).chain(all(looked)) {
        assert!(page.contains(&format!("`{name}`")), "docs/evaluation.md does not explain {name}");
    }
    for d in &report.drawings {
        let of = if d.aspect == "shape beside the word" { 1..=5 } else { 5..=5 };
        assert!(of.contains(&d.drawings), "{d:?}");
        assert!((0.0..=1.0).contains(&d.right.seen) && (0.0..=1.0).contains(&d.right.other), "{d:?}");
    }
    let rows: String = report.rows().iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
    assert!(rows.contains("right in colour, count and place: 0."), "{rows}");
    assert!(rows.contains("\"what does it say?\": 0."), "{rows}");
    // Drawings are sampled as the configuration says: the most likely codes, in two ways, are the same ones.
    let drawings =
        |model: &mut Ett, sampling: SamplingConfig| -> Result<Vec<u8>, Box<dyn std::error::Error>> {
            (model.cfg.data.eval_samples, model.cfg.sampling) = (8, sampling);
            closing(model, &test, &template, &dir.path(""))?;
            Ok(std::fs::read(dir.path("drawings.png"))?)
        };
    let paper = SamplingConfig::default();
    let likeliest = drawings(&mut model, SamplingConfig { top_k: 1, ..paper })?;
    assert!(drawings(&mut model, SamplingConfig { temperature: 0.0, ..paper })? == likeliest);
    assert!(drawings(&mut model, paper)? != likeliest);
    // A model that cannot draw, and pictures of a folder, have no such results.
    model.visual_head = None;
    assert!(closing(&mut model, &test, &template, &dir.path(""))?.drawings.is_empty());
    Ok(())
}
