//! Broken, missing and obstructing files: errors name them, nothing panics, and nothing is left half done.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ett::backend::{Cpu, DType, Device, Fill, Kernels, Plan, Role, Stream};
use ett::config::{Config, StageConfig, StageKind};
use ett::data::{
    Columns, Folder, Image, LoadOptions, Scenes, Source, Split, TextTokenizer, Wanted, save_png,
};
use ett::error::Result;
use ett::eval::{self, HeldOut};
use ett::feed::{DataSet, Feed, Template};
use ett::io::weights::TensorFile;
use ett::io::{load_weights, save_weights};
use ett::model::Ett;
use ett::nn::Stored;
use ett::report::plots;
use ett::rng::Philox;
use ett::tensor::Tensor;
use ett::train::{self, RunOptions, Stage};

use rayon::prelude::*;

use crate::common::{Outcome, Scratch, cpu};

/// The smallest model with every part.
fn config() -> Config {
    let mut c = Config::default();
    (c.tokenizer.ch, c.tokenizer.ch_mult, c.tokenizer.norm_groups) = (8, vec![1, 2], 4);
    (c.tokenizer.num_res_blocks, c.tokenizer.z_channels) = (1, 8);
    (c.quantizer.codes, c.quantizer.dim) = (16, 4);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    let l = &mut c.llm;
    (l.vocab, l.width, l.layers, l.heads, l.kv_heads, l.head_dim, l.mlp) = (264, 16, 1, 2, 1, 8, 24);
    (c.data.source, c.data.size, c.data.train_samples, c.data.test_samples) = (Source::Scenes, 32, 8, 4);
    c.train.threads = 1;
    c
}

fn stage(kind: StageKind) -> StageConfig {
    let text = format!("kind = {:?}\nsteps = 1\nbatch = 4\n", kind.name());
    toml::from_str(&text).expect("a stage")
}

/// The message of an error, which has to begin with `path`.
fn said<T>(result: Result<T>, path: &Path) -> String {
    let Err(e) = result else { panic!("{} was accepted", path.display()) };
    let e = e.to_string();
    assert!(e.starts_with(&format!("{}: ", path.display())), "{e}");
    e
}

#[test]
fn broken_weights_are_named_and_change_nothing() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("model.safetensors");
    let model = Ett::new(&config(), cpu(1))?;
    let all = || -> Result<Vec<_>> {
        model.params.names().map(|(name, ..)| model.params.read(name, Stored::Master)).collect()
    };
    save_weights(&model.params, &path, Stored::Master)?;
    let (before, bytes) = (all()?, fs::read(&path)?);
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into()?) as usize;
    let refuse = |bytes: &[u8], what: &str| -> Outcome {
        fs::write(&path, bytes)?;
        let e = said(load_weights(&model.params, &path), &path);
        let known = [
            "not a complete safetensors file",
            "does not fit",
            "is empty",
            "wanted a float",
            // A header that does not begin as one, or the name of a tensor in it.
            "is in none of the formats",
            "holds control characters",
        ];
        assert!(known.iter().any(|k| e.contains(k)), "{what}: {e}");
        assert!(all()? == before, "{what}: weights were changed");
        Ok(())
    };
    for length in [0, 1, 7, 8, 9, header / 2, header, header + 1, bytes.len() / 2, bytes.len() - 1] {
        refuse(&bytes[..length], &format!("cut to {length} bytes"))?;
    }
    refuse(&[&bytes[..], b"more"].concat(), "lengthened")?;
    // A flipped bit of the values goes unnoticed, as the file has no checksum; one in the header is found.
    let mut rng = Philox::new(1, 0);
    for _ in 0..300 {
        let (at, bit) = (rng.below(header), rng.below(8));
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << bit;
        refuse(&flipped, &format!("bit {bit} of byte {at} flipped"))?;
    }
    for header in [
        r#"{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}"#,
        r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[16,8]}}"#,
        r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551616]}}"#,
        r#"{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#,
        "[[[[",
    ] {
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 16]].concat();
        refuse(&file, header)?;
    }
    // The last bytes of the file belong to a tensor.
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut holed = bytes.clone();
        let end = holed.len();
        holed[end - 4..].copy_from_slice(&bad.to_le_bytes());
        fs::write(&path, holed)?;
        let e = said(load_weights(&model.params, &path), &path);
        let last = TensorFile::open(&path)?;
        let broken: Vec<String> =
            last.tensors().into_keys().filter(|name| last.read_finite(name).is_err()).collect();
        assert_eq!(broken.len(), 1);
        assert!(e.contains(&format!("does not fit the model: `{}` has 1 of ", broken[0])), "{e}");
        assert!(e.ends_with("values that are not finite") && all()? == before, "{e}");
    }
    fs::write(&path, &bytes)?;
    load_weights(&model.params, &path)?;
    assert!(all()? == before);
    fs::remove_file(&path)?;
    said(load_weights(&model.params, &path), &path);
    Ok(())
}

#[test]
fn wrong_configurations_are_named_with_line_and_key() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("config.toml");
    for (text, line, key) in [
        ("[train]\nlr = \n", "line 2", "lr"),
        ("[train]\n\nlr = \"fast\"\n", "line 3", "lr"),
        ("[train]\nseed = -1\n", "line 2", "seed"),
        ("[llm]\nwidth = 1e3\n", "line 2", "width"),
        ("[quantizer]\nkind = \"fsq\"\n", "line 2", "kind"),
        ("[data]\nsource = \"web\"\n", "line 2", "source"),
        ("[loss\n", "line 1", "[loss"),
        ("[loss]\nalpha = 1\nalpha = 2\n", "line 3", "alpha"),
        ("[[stage]]\nkind = \"text\"\n", "line 1", "steps"),
        ("train = 3\n", "line 1", "train"),
    ] {
        fs::write(&path, text)?;
        let e = said(Config::load(&path, &[]), &path);
        assert!(e.contains(line) && e.contains(key), "{text:?} gave {e:?}");
    }
    fs::write(&path, "[train]\nlr = \"fast\"\n")?;
    let e = said(Config::load(&path, &["train.seed=3".into()]), &path);
    assert!(e.contains("train.lr"), "{e}");
    // Errors that are not caused by the file.
    fs::write(&path, "[train]\nlr = 1.0\n")?;
    for (set, quoted) in [
        ("data.train=2024", "quote it: 'data.train=\"2024\"'"),
        ("train.precision=32", "quote it: 'train.precision=\"32\"'"),
        ("llm.width=wide", "invalid type: string \"wide\""),
        ("train.sed=3", "unknown field `sed`"),
    ] {
        let Err(e) = Config::load(&path, &["train.seed=3".into(), set.into()]) else { panic!("{set}") };
        let e = e.to_string();
        assert!(
            e.starts_with(&format!("configuration: `--set` is {set}, wanted")) && e.contains(quoted),
            "{e}"
        );
        assert!(e.contains("quotes") == quoted.contains("quotes"), "{e}");
    }
    fs::write(&path, b"[train]\nprecision = \"\xff\"\n")?;
    said(Config::load(&path, &[]), &path);
    said(Config::load(&dir.path("absent.toml"), &[]), &dir.path("absent.toml"));
    Ok(())
}

/// Sizes whose product overflows: 2^60 rows of 4 columns of 4 bytes wrap to 0 bytes, which once caused a segmentation
/// fault.
#[test]
fn sizes_that_wrap_are_a_sentence() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("config.toml");
    let mut small = config();
    small.stage = vec![stage(StageKind::Text)];
    fs::write(&path, toml::to_string(&small)?)?;
    let ended = |set: &[&str]| -> std::result::Result<String, Box<dyn std::error::Error>> {
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_ett-train"));
        program.args(["run", "--device", "cpu", "--config"]).arg(&path).arg("--out").arg(dir.path("run"));
        program.args(set.iter().flat_map(|s| ["--set", s]));
        let out = program.output()?;
        assert_eq!((out.status.code(), dir.path("run").exists()), (Some(1), false), "{out:?}");
        Ok(String::from_utf8(out.stderr)?)
    };
    let e = ended(&["llm.vocab=1152921504606846976", "llm.width=4"])?;
    assert_eq!(e, "error: configuration: `llm.vocab` is 1152921504606846976, wanted 1 to 2147483647\n");
    // More threads than allowed, though the system could start them.
    let e = ended(&["train.threads=20000"])?;
    assert_eq!(e, "error: configuration: `train.threads` is 20000, wanted 0 to 1024\n");
    // Each value is possible, but not all of them together.
    let e = ended(&[
        "llm.vocab=2147483647",
        "llm.width=65536",
        "data.text_tokens=1048576",
        "stage.0.batch=1048576",
    ])?;
    assert!(
        e.contains("llm.width, layers")
            && e.contains("vocab")
            && e.contains("operations")
            && e.contains("wanted at most"),
        "{e}"
    );
    Ok(())
}

#[test]
fn wrong_metadata_is_named_with_its_line() -> Outcome {
    let dir = Scratch::new();
    save_png(dir.path("a.png"), &Image::filled(8, 8, 0.0))?;
    let good = "{\"file_name\": \"a.png\"}\n";
    let deep = format!("{{\"file_name\": \"a.png\", \"other\": {}", "[".repeat(100_000));
    for line in [
        "{\"file_name\": \"a.p",
        "{\"file_name\": 3}",
        "null",
        "\0\0",
        "{\"file_name\": \"a\\u0000.png\"}",
        &deep,
    ] {
        let path = dir.path("metadata.jsonl");
        fs::write(&path, format!("{good}\n{good}{line}"))?;
        let e = said(Folder::open(dir.path("")), &path);
        assert!(e.contains("line 4: "), "{e}");
    }
    Ok(())
}

/// Ten pictures of scenes with captions; every second one has no question.
fn pictures(dir: &Scratch) -> Outcome {
    let scenes = Scenes::new(32, 1)?;
    let mut lines = String::new();
    for i in 0..10 {
        let drawing = scenes.get(Split::Train, i);
        save_png(dir.path(&format!("{i}.png")), &drawing.image)?;
        let mut line = serde_json::json!({"file_name": format!("{i}.png"), "text": drawing.sample.caption()});
        if i % 2 == 0 {
            line["qa"] = serde_json::json!(drawing.sample.questions().collect::<Vec<_>>());
        }
        lines += &format!("{line}\n");
    }
    Ok(fs::write(dir.path("metadata.jsonl"), lines)?)
}

#[test]
fn pictures_that_are_none_are_skipped_counted_and_named() -> Outcome {
    let dir = Scratch::new();
    pictures(&dir)?;
    let png = fs::read(dir.path("0.png"))?;
    fs::write(dir.path("1.png"), [])?;
    fs::write(dir.path("3.png"), &png[..png.len() / 2])?;
    fs::write(dir.path("4.png"), &png[..20])?;
    // The frame header of a JPEG holds height and width, without a checksum.
    let path = dir.path("6.png");
    image::RgbImage::new(16, 16).save_with_format(&path, image::ImageFormat::Jpeg)?;
    let mut jpeg = fs::read(&path)?;
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).ok_or("a frame header")?;
    jpeg[frame + 5..frame + 9].fill(0xff);
    fs::write(&path, jpeg)?;

    let mut c = config();
    (c.data.source, c.data.train) = (Source::Folder, dir.path(""));
    let data = DataSet::train(&c.data, 16)?;
    let skipped = data.images.skipped();
    assert_eq!((data.samples.len(), data.images.usable(), skipped.count), (10, 6, 4));
    let names: Vec<&Path> = skipped.first.iter().map(|(path, _)| path.as_path()).collect();
    assert_eq!(names, ["1.png", "3.png", "4.png", "6.png"].map(|n| dir.path(n)));
    assert!(skipped.first[3].1.contains("too large"), "{:?}", skipped.first[3]);
    assert!(skipped.first.iter().all(|(_, why)| !why.is_empty()));
    for name in ["2.png", "5.png"] {
        fs::write(dir.path(name), "no picture")?;
    }
    let Err(e) = DataSet::train(&c.data, 16) else { panic!("a folder of broken pictures was accepted") };
    assert!(
        e.to_string().contains("6 of 10 pictures cannot be used, more than half; replace or remove"),
        "{e}"
    );
    Ok(())
}

#[test]
fn pictures_that_vanish_in_training_are_replaced_by_others_of_their_kind() -> Outcome {
    let dir = Scratch::new();
    pictures(&dir)?;
    let (path, columns) = (dir.path(""), Columns::default());
    let part = Wanted {
        split: Split::Train,
        path: Some(&path),
        images: None,
        columns: &columns,
        samples: 0,
        size: 32,
    };
    let options = LoadOptions { memory: 0, patience: Duration::ZERO, ..LoadOptions::new(32) };
    let data = DataSet::of(vec![(Source::Folder.open(&part)?, 1.0)], options)?;
    let model = Ett::new(&config(), Arc::new(Plan::new()))?;
    let template = Template::new(TextTokenizer::Bytes, 1024);
    let chat = Stage::new(StageKind::Chat, &model)?;
    let all = Config { stage: vec![stage(StageKind::Chat)], ..model.cfg.clone() };
    let feed = Feed::new(&all, 0, &data, &template, chat.reads_pictures(), false)?;

    // Each of these is followed by a picture without a question, which this stage cannot use.
    for name in ["0.png", "4.png"] {
        fs::remove_file(dir.path(name))?;
    }
    for step in 0..5 {
        assert_eq!(feed.batch(step)?.sequences.len(), 4);
    }
    assert_eq!(data.images.skipped().count, 2);
    // Then all pictures are removed, with their folder.
    fs::remove_dir_all(dir.path(""))?;
    let Err(e) = (0..10).try_for_each(|step| feed.batch(step).map(drop)) else {
        panic!("a folder that is gone was trained on")
    };
    let e = e.to_string();
    assert!(e.contains("none of the requested pictures") || e.contains("more than half"), "{e}");
    let mut c = config();
    (c.data.source, c.data.train) = (Source::Folder, dir.path("gone"));
    let Err(e) = DataSet::train(&c.data, 16) else { panic!("a folder that is gone was opened") };
    assert!(e.to_string().contains("gone: there is no such folder; fetch the data set first"), "{e}");
    c.data.train = Default::default();
    let Err(e) = DataSet::train(&c.data, 16) else { panic!("no folder was opened") };
    assert!(
        e.to_string().contains("`data.train` is empty, wanted a folder, or a built-in data.source"),
        "{e}"
    );
    Ok(())
}

#[test]
fn what_cannot_be_written_is_named() -> Outcome {
    let dir = Scratch::new();
    let file = dir.path("file");
    fs::write(&file, "in the way")?;
    let mut c = config();
    c.stage = vec![stage(StageKind::Align)];
    let mut model = Ett::new(&c, cpu(1))?;
    let metrics = dir.path("metrics.jsonl");
    fs::write(&metrics, "{\"stage\": \"text\", \"step\": 0, \"loss\": {\"cap\": 1.0}}\n")?;
    let picture = Image::filled(4, 4, 0.0);
    for below in [file.clone(), Path::new("/dev/null").to_path_buf()] {
        let named = |result: Result<()>, what: &str| {
            let Err(e) = result else { panic!("{what} was written below {}", below.display()) };
            assert!(e.to_string().contains(&*below.to_string_lossy()), "{what}: {e}");
        };
        let out = below.join("run");
        let o = RunOptions::quiet(&out, &HeldOut);
        named(train::run(&c, cpu(1), &o).map(drop), "a run");
        named(save_weights(&model.params, &below.join("model.safetensors"), Stored::Master), "weights");
        named(save_png(below.join("a.png"), &picture), "a picture");
        named(plots::loss_curves(&metrics, &below.join("a.png")), "curves");
        named(plots::labelled_grid(&[vec![(picture.clone(), "a".into())]], &below.join("a.png")), "a grid");
        let test = DataSet::test(&c.data)?.ok_or("built-in data")?;
        let template = Template::new(TextTokenizer::Bytes, 1024);
        named(eval::closing(&mut model, &test, &template, &below).map(drop), "an evaluation");
    }
    assert_eq!(fs::read(&file)?, b"in the way");
    Ok(())
}

/// Threads that use one tensor take turns: a read returns the values written by a single call.
#[test]
fn calls_of_several_threads_take_turns() -> Outcome {
    const N: usize = 1 << 18;
    let dev = Cpu::new(2)?;
    let x = Tensor::zeros(&dev, Role::Activation, DType::F32, [N])?;
    let (dev, x) = (&dev, &x);
    std::thread::scope(|s| {
        for writer in 0..3 {
            s.spawn(move || {
                for i in 0..60 {
                    let value = f64::from(10 * i + writer);
                    match writer {
                        0 => dev.copy_in(Stream::COPY, bytemuck::cast_slice(&vec![value as f32; N]), x.out()),
                        _ => dev.fill(Stream::COMPUTE, &Fill { y: x.out(), value }),
                    }
                    .expect("a value");
                }
            });
        }
        for _ in 0..60 {
            let v = x.to_host::<f32>(dev).expect("values");
            assert!(v.iter().all(|y| *y == v[0]), "two calls wrote one tensor at the same time");
        }
    });
    Ok(())
}

/// Calls from the threads of another pool, each of which may start a second call while its first is in progress.
#[test]
fn calls_from_another_pool_of_threads_end() -> Outcome {
    let dev = Cpu::new(2)?;
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build()?;
    let sums: Vec<f32> = pool.install(|| {
        (0..300u16)
            .into_par_iter()
            .map(|i| {
                let x = Tensor::zeros(&dev, Role::Activation, DType::F32, [5000]).expect("memory");
                dev.fill(Stream::COMPUTE, &Fill { y: x.out(), value: f64::from(i) }).expect("a kernel");
                x.to_host::<f32>(&dev).expect("values").iter().sum()
            })
            .collect()
    });
    assert!(sums.iter().enumerate().all(|(i, s)| *s == 5000.0 * i as f32));
    Ok(())
}

#[test]
fn threads_have_a_limit() {
    let e = Cpu::new(20_000).err().map(|e| e.to_string()).unwrap_or_default();
    assert_eq!(e, "Cpu::new: argument `threads` is 20000, wanted 0 (one per core) to 1024");
}
