//! Generation with the key/value cache against recomputing the whole sequence for every token.

use std::process::Command;
use std::slice;
use std::sync::Arc;

use ett::autograd::{Tape, Var};
use ett::backend::{Kernels, Role};
use ett::compare::{Bounds, compare};
use ett::config::{Arm, Config, QuantizerMetric, SamplingConfig, VisualHeadKind};
use ett::data::{Image, Special, TextTokenizer};
use ett::error::{Error, Result};
use ett::feed::{Batch, images_to_device};
use ett::infer::{Continued, Sampling, Seen, Trained, decode_codes, draw, draw_codes};
use ett::io::save_weights;
use ett::model::tokenizer::Grid;
use ett::model::{Ett, Packed, Part};
use ett::nn::Stored;
use ett::ops;
use ett::tensor::Tensor;

use crate::common::{Outcome, Scratch, cpu, gpu, ids, int, scaled, shim};

const CODES: usize = 24;
const VOCAB: usize = 264;
const START: i32 = 259;
const ARMS: [(Arm, VisualHeadKind, QuantizerMetric); 3] = [
    (Arm::Index, VisualHeadKind::Linear, QuantizerMetric::Dot),
    (Arm::Embed, VisualHeadKind::Tied, QuantizerMetric::L2norm),
    (Arm::Ett, VisualHeadKind::Tied, QuantizerMetric::Dot),
];

fn config(precision: &str, (arm, head, metric): (Arm, VisualHeadKind, QuantizerMetric)) -> Config {
    let mut c = Config::default();
    let t = &mut c.tokenizer;
    (t.ch, t.ch_mult, t.num_res_blocks, t.z_channels, t.norm_groups) = (8, vec![1, 1], 1, 8, 4);
    (c.quantizer.codes, c.quantizer.dim, c.quantizer.metric) = (CODES, 8, metric);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    let l = &mut c.llm;
    (l.vocab, l.width, l.layers, l.mlp) = (VOCAB, 32, 2, 48);
    (l.heads, l.kv_heads, l.head_dim) = (4, 2, 16);
    // Large enough for the output to depend on the input.
    l.init_std = 0.3;
    c.visual_head.kind = head;
    (c.train.arm, c.train.precision, c.data.size) = (arm, precision.into(), 4);
    c
}

fn model(
    dev: Arc<dyn Kernels>,
    precision: &str,
    kind: (Arm, VisualHeadKind, QuantizerMetric),
) -> Result<Ett> {
    Ett::new(&config(precision, kind), dev)
}

fn tape(model: &Ett) -> Tape {
    Tape::inference(model.params.device().clone(), model.params.precision())
}

/// Prompts of several lengths; the second has the minimum length.
fn texts() -> Vec<Vec<Part>> {
    [9, 1, 4, 17].iter().map(|&n| vec![Part::context(ids(n as u64, n, 256))]).collect()
}

/// Pictures of 6 x 4 pixels.
fn images() -> Vec<Image> {
    let picture = |seed| {
        let pixels = scaled(seed, 6 * 4 * 3, 0.5).iter().map(|&v| v.clamp(-1.0, 1.0) as f32).collect();
        Image { height: 6, width: 4, pixels }
    };
    vec![picture(1), picture(2)]
}

/// The visual rows of the pictures.
fn visual(model: &Ett, t: &Tape) -> Result<(Var, Vec<Grid>)> {
    let (x, _) = images_to_device(model, &images())?;
    let (z, grids) = model.tokenizer.encode(t, &model.params, &[t.constant(x)])?;
    let (zq, idx, _) = model.look_up(t, &z, &model.tokenizer.codes(t, &model.params)?)?;
    Ok((model.visual_rows(t, &zq, &idx)?, grids))
}

/// Prompts with pictures, and one without.
fn seen() -> Vec<Vec<Part>> {
    let text = |seed, n| Part::context(ids(seed, n, 256));
    vec![
        vec![Part::context(vec![START]), Part::Image(0), text(1, 3)],
        vec![text(2, 7), Part::Image(1), text(3, 1), Part::Image(0)],
        vec![text(4, 2)],
        vec![Part::Image(1)],
    ]
}

/// Hidden states `[S, C]` at the last position of whole sequences.
fn last(model: &Ett, t: &Tape, visual: Option<&Var>, b: &Packed) -> Result<Var> {
    let hidden = model.hidden(t, visual, b)?;
    let ends = b.seqs.cu.to_host::<i32>(t.dev())?;
    let rows: Vec<i32> = ends[1..].iter().map(|end| end - 1).collect();
    ops::gather(t, &hidden, &int(t.dev(), &rows))
}

/// The next position of all sequences.
enum Next {
    Tokens(Vec<i32>),
    Codes(Vec<i32>),
}

/// Continues with tokens and codes in turn, and compares the hidden states with those of whole sequences on the same
/// device.
fn cache_agrees(dev: Arc<dyn Kernels>, precision: &str, bound: f64, steps: u64) -> Outcome {
    for kind in ARMS {
        let model = model(dev.clone(), precision, kind)?;
        let t = tape(&model);
        let codes = model.tokenizer.codes(&t, &model.params)?;
        let mut prompts = texts();
        let n = prompts.len();
        let mut cached = Continued::new(&model, &t, &prompts, None, steps as usize)?;
        // The codes so far; they are rows of one visual tensor.
        let mut drawn: Vec<i32> = Vec::new();
        for step in 0..=steps {
            let pictures: Vec<_> = (0..drawn.len()).map(|i| i..i + 1).collect();
            let packed = Packed::new(&*dev, &prompts, &pictures, 1)?;
            let visual = match drawn.is_empty() {
                true => None,
                false => {
                    let idx = int(&*dev, &drawn);
                    Some(model.visual_rows(&t, &ops::gather(&t, &codes, &idx)?, &idx)?)
                }
            };
            let want = last(&model, &t, visual.as_ref(), &packed)?.value().to_f64(&*dev)?;
            let got = cached.hidden().value().to_f64(&*dev)?;
            let what = format!("{precision}, {kind:?}, step {step}");
            compare(
                &what,
                &got,
                &want,
                32,
                Bounds { norm: bound, row: bound, element: 1e3 * bound, least: 0.0 },
            )?;
            if step == steps {
                break;
            }
            let next = match step % 2 {
                0 => Next::Codes(ids(100 + step, n, CODES)),
                _ => Next::Tokens(ids(100 + step, n, VOCAB)),
            };
            match &next {
                Next::Tokens(ids) => cached.tokens(&int(&*dev, ids))?,
                Next::Codes(idx) => cached.codes(&int(&*dev, idx), &codes, 1)?,
            }
            for (s, prompt) in prompts.iter_mut().enumerate() {
                prompt.push(match &next {
                    Next::Tokens(ids) => Part::context(vec![ids[s]]),
                    Next::Codes(idx) => {
                        drawn.push(idx[s]);
                        Part::Image(drawn.len() - 1)
                    }
                });
            }
        }
        let full = cached.tokens(&int(&*dev, &vec![0; n])).expect_err("there is no room").to_string();
        assert!(full.starts_with("decode: argument `cache` is full"), "{full}");
    }
    Ok(())
}

#[test]
fn hidden_states_through_the_cache_are_those_of_whole_sequences() -> Outcome {
    for (precision, bound) in [("f64", 1e-12), ("f32", 1e-5), ("bf16", 3e-2)] {
        cache_agrees(cpu(2), precision, bound, 6)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs the shim"]
fn shim_cache_agrees() -> Outcome {
    cache_agrees(shim(), "f32", 1e-5, 2)?;
    cache_agrees(shim(), "bf16", 3e-2, 2)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_cache_agrees() -> Outcome {
    cache_agrees(gpu(), "f32", 1e-5, 9)?;
    cache_agrees(gpu(), "bf16", 3e-2, 9)
}

/// The codes that `steps` steps choose, with random numbers. A step reads and writes nothing on the host, so that a
/// device that records repeats one recorded step; `record` asks for that.
fn chosen_step_by_step(
    dev: &Arc<dyn Kernels>,
    kind: usize,
    steps: usize,
    record: bool,
) -> Result<Vec<Vec<i32>>> {
    let model = model(dev.clone(), "bf16", ARMS[kind])?;
    let t = tape(&model);
    let codes = model.tokenizer.table(&t, &model.params)?;
    // The prompts, and as many sequences without one.
    let prompts = [texts(), texts()].concat();
    let n = prompts.len() / 2;
    let mut sequences = Continued::new(&model, &t, &prompts, None, steps)?;
    let s = Sampling { top_k: 8, ..Sampling::default() };
    let (number, position) = (int(&**dev, &(0..n as i32).collect::<Vec<_>>()), int(&**dev, &vec![0; n]));
    let next = int(&**dev, &vec![0; n]);
    let mut step = || -> Result<()> {
        sequences.codes(&next, &codes, 2)?;
        let logits = model.code_logits(&t, sequences.hidden(), &codes)?;
        s.choose_into(&**dev, logits.value(), &number, &position, &next)
    };
    // The first step makes what depends on the number of sequences only.
    step()?;
    let mut all = vec![Sampling::chosen(&**dev, &next)?];
    let recording = if record { dev.record(&mut step)? } else { None };
    assert_eq!(recording.is_some(), record, "a GPU records");
    while all.len() < steps {
        match &recording {
            Some(recording) => recording.replay()?,
            None => step()?,
        }
        all.push(Sampling::chosen(&**dev, &next)?);
    }
    Ok(all)
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_a_recorded_step_chooses_what_calls_choose() -> Outcome {
    let dev = gpu();
    let [called, replayed] = [false, true].map(|record| chosen_step_by_step(&dev, 2, 20, record));
    assert_eq!(called?, replayed?);
    Ok(())
}

#[test]
#[cfg_attr(not(ett_gpu_here), ignore = "needs a GPU")]
fn gpu_drawings_with_and_without_a_recording_are_equal() -> Outcome {
    for (precision, kind) in [("bf16", ARMS[2]), ("f32", ARMS[0])] {
        let model = model(gpu(), precision, kind)?;
        // More than one batch, the second one smaller.
        let prompts: Vec<Vec<Part>> =
            (0..18).map(|i| vec![Part::context(ids(i, 1 + i as usize % 5, 256))]).collect();
        for s in [Sampling::default(), Sampling { guidance: 1.0, top_k: 8, ..Sampling::default() }] {
            for n in [1, 2, 3, 256] {
                let mut heard = 0;
                let [called, replayed] = [false, true].map(|recorded| {
                    draw_codes(&model, &prompts, START, n, &s, recorded, &mut |_, _| heard += 1)
                });
                let called = called?;
                assert_eq!(called, replayed?, "{precision}, {n} codes, {s:?}");
                assert_eq!((called.len(), called[17].len(), heard), (18, n, 4 * n));
            }
        }
    }
    Ok(())
}

/// Greedy decoding that recomputes the whole sequence for every token.
fn complete(model: &Ett, prompt: &[Part], stop: i32, max: usize) -> Result<Vec<i32>> {
    let t = tape(model);
    let (visual, grids) = visual(model, &t)?;
    let mut said = Vec::new();
    while said.len() < max {
        let parts = [prompt, &[Part::context(said.clone())]].concat();
        let packed = Batch::pack(model, &[parts], &grids, 1)?;
        let hidden = last(model, &t, Some(&visual), &packed)?;
        let logits = model.text_logits(&t, &hidden)?.value().to_f64(t.dev())?;
        let best = (0..VOCAB).fold(0, |best, i| if logits[i] > logits[best] { i } else { best }) as i32;
        if best == stop {
            break;
        }
        said.push(best);
    }
    Ok(said)
}

#[test]
fn text_through_the_cache_is_that_of_whole_sequences() -> Outcome {
    let dev = cpu(2);
    for (precision, kind) in [("f32", ARMS[0]), ("f64", ARMS[1]), ("f32", ARMS[2])] {
        let model = model(dev.clone(), precision, kind)?;
        let read = Seen::new(&model, &images())?;
        let prompts = seen();
        let never = -1;
        let want = prompts.iter().map(|p| complete(&model, p, never, 12)).collect::<Result<Vec<_>>>()?;
        assert!(want.iter().all(|w| w.len() == 12) && want[0] != want[1] && want[1] != want[2], "{want:?}");
        assert_eq!(read.complete_all(&prompts, never, 12)?, want, "{precision}, {kind:?}");
        for (p, want) in prompts.iter().zip(&want) {
            assert_eq!(read.complete_all(slice::from_ref(p), never, 12)?, slice::from_ref(want), "alone");
        }
        // Sequences end at different steps; the others continue.
        let stop = want[1][4];
        let stopped = read.complete_all(&prompts, stop, 12)?;
        for (s, w) in stopped.iter().zip(&want) {
            assert_eq!(s, &w[..w.iter().position(|&id| id == stop).unwrap_or(12)]);
        }
        assert!(stopped[1].len() <= 4 && stopped.iter().any(|s| s.len() > 4), "{stopped:?}");
        assert_eq!(
            read.complete_all(&prompts, never, 1)?,
            want.iter().map(|w| vec![w[0]]).collect::<Vec<_>>()
        );
        assert_eq!(read.complete_all(&prompts, never, 0)?, vec![vec![0; 0]; 4]);
        assert!(read.complete_all(&[], never, 3)?.is_empty());
        let e =
            read.complete_all(&[prompts[0].clone(), vec![]], never, 3).expect_err("nothing to go on from");
        assert!(e.to_string().contains("at least one token"), "{e}");
    }
    Ok(())
}

/// The codes of picture `number`, recomputing the whole sequence for every code.
fn codes(model: &Ett, prompt: &[Part], number: u32, n: usize, s: &Sampling) -> Result<Vec<i32>> {
    let t = tape(model);
    let table = model.tokenizer.codes(&t, &model.params)?;
    let mut drawn: Vec<i32> = Vec::new();
    while drawn.len() < n {
        let logits = |prompt: &[Part]| -> Result<Vec<f64>> {
            let mut parts = prompt.to_vec();
            parts.push(Part::context(vec![START]));
            let visual = match drawn.is_empty() {
                true => None,
                false => {
                    parts.push(Part::Image(0));
                    let idx = int(t.dev(), &drawn);
                    Some(model.visual_rows(&t, &ops::gather(&t, &table, &idx)?, &idx)?)
                }
            };
            let packed = Packed::new(t.dev(), &[parts], slice::from_ref(&(0..drawn.len())), 1)?;
            let hidden = last(model, &t, visual.as_ref(), &packed)?;
            model.code_logits(&t, &hidden, &table)?.value().to_f64(t.dev())
        };
        let mut row = logits(prompt)?;
        if s.guidance != 1.0 {
            row.extend(logits(&[])?);
        }
        let rows = [row.len() / CODES, CODES];
        let row = Tensor::from_f64(t.dev(), Role::Input, t.precision().act, &row, rows)?;
        let (number, position) = (int(t.dev(), &[number as i32]), int(t.dev(), &[drawn.len() as i32]));
        let next = s.choose(t.dev(), &row, &number, &position)?;
        drawn.extend(Sampling::chosen(t.dev(), &next)?);
    }
    Ok(drawn)
}

fn silent(_: usize, _: usize) {}

#[test]
fn codes_through_the_cache_are_those_of_whole_sequences() -> Outcome {
    let dev = cpu(2);
    let prompts: Vec<_> = [texts(), vec![vec![]]].concat();
    let plain = Sampling { guidance: 1.0, seed: 3, ..Sampling::default() };
    let guided = Sampling { guidance: 3.0, temperature: 0.8, top_k: 9, top_p: 0.9, ..plain };
    for (precision, kind) in ARMS.into_iter().flat_map(|kind| [("f32", kind), ("f64", kind)]) {
        let model = model(dev.clone(), precision, kind)?;
        for s in [plain, guided, Sampling { temperature: 0.0, ..guided }] {
            let want = prompts.iter().enumerate().map(|(i, p)| codes(&model, p, i as u32, 8, &s));
            let want = want.collect::<Result<Vec<_>>>()?;
            let mut heard = Vec::new();
            let got =
                draw_codes(&model, &prompts, START, 8, &s, true, &mut |done, all| heard.push((done, all)))?;
            assert_eq!(got, want, "{precision}, {kind:?}, {s:?}");
            assert!(want[0] != want[1] && want[1] != want[2], "prompts change nothing: {want:?}");
            assert_eq!(heard, (1..=8).map(|i| (5 * i, 40)).collect::<Vec<_>>());
            // The other pictures of a batch change nothing.
            assert_eq!(draw_codes(&model, &prompts[..2], START, 8, &s, true, &mut silent)?, want[..2]);
        }
        let other = Sampling { seed: 4, ..plain };
        let draws = |s: &Sampling| draw_codes(&model, &prompts, START, 8, s, true, &mut silent);
        assert_ne!(draws(&plain)?, draws(&other)?, "the seed changes nothing");
    }
    Ok(())
}

#[test]
fn pictures_of_many_prompts_are_those_of_each() -> Outcome {
    let model = model(cpu(2), "f32", ARMS[2])?;
    // More than fit in one batch; the numbers of the pictures continue across batches.
    let prompts: Vec<Vec<Part>> =
        (0..18).map(|i| vec![Part::context(ids(i, 1 + i as usize % 5, 256))]).collect();
    let s = Sampling::default();
    let mut heard = Vec::new();
    let images = draw(&model, &prompts, START, (3, 2), &s, &mut |done, all| heard.push((done, all)))?;
    assert!(heard.is_sorted() && heard.len() == 12 && heard[11] == (108, 108), "{heard:?}");
    let together = draw_codes(&model, &prompts, START, 6, &s, true, &mut silent)?;
    for i in [0, 15, 16, 17] {
        let alone = codes(&model, &prompts[i], i as u32, 6, &s)?;
        assert_eq!(together[i], alone, "picture {i}");
        // Products of other shapes round differently.
        let pixels = |i: &Image| i.pixels.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let decoded = decode_codes(&model, &[alone], (3, 2))?;
        let bounds = Bounds { norm: 1e-5, row: 1e-4, element: 1e-3, least: 0.0 };
        compare("pixels", &pixels(&images[i]), &pixels(&decoded[0]), 12, bounds)?;
    }
    assert!(images.iter().all(|i| (i.height, i.width) == (6, 4)));
    assert!(images.iter().flat_map(|i| &i.pixels).all(|p| (-1.0..=1.0).contains(p)));
    assert!(images[0] != images[1]);
    assert!(draw(&model, &[], START, (3, 2), &s, &mut silent)?.is_empty());
    Ok(())
}

#[test]
fn what_cannot_be_drawn_is_an_error() -> Outcome {
    let says = |e: Result<Vec<Image>>, what: &str| match e {
        Err(e) => assert!(e.to_string().contains(what), "{e}"),
        Ok(_) => panic!("drawn, though {what}"),
    };
    let headless = model(cpu(1), "f32", (Arm::Ett, VisualHeadKind::None, QuantizerMetric::Dot))?;
    let s = Sampling::default();
    says(draw(&headless, &texts(), START, (2, 2), &s, &mut silent), "`visual_head.kind` is none");
    let model = model(cpu(1), "f32", ARMS[2])?;
    says(draw(&model, &texts(), START, (2, 0), &s, &mut silent), "`grid` is empty");
    says(draw(&model, &seen(), START, (2, 2), &s, &mut silent), "`image` is 0, wanted below 0");
    says(draw(&model, &texts(), VOCAB as i32, (2, 2), &s, &mut silent), "`idx` is 264");
    let bad = Sampling { top_p: 0.0, ..s };
    says(draw(&model, &texts(), START, (2, 2), &bad, &mut silent), "`top_p` is 0");
    says(decode_codes(&model, &[vec![0; 3]], (2, 2)), "`codes` is 3, wanted 2 x 2");
    says(decode_codes(&model, &[vec![CODES as i32; 4]], (2, 2)), "`idx` is 24");
    let t = tape(&model);
    let mut two = Continued::new(&model, &t, &texts()[..2], None, 1)?;
    let e = two.tokens(&int(t.dev(), &[1])).expect_err("two sequences").to_string();
    assert!(e.contains("`ids` is 1, wanted 2"), "{e}");
    let mut params = Ett::new(&model.cfg, cpu(1))?;
    let recording = Tape::new(params.params.device().clone(), params.params.precision());
    params.params.train(&["llm"])?;
    let mut learning = Continued::new(&params, &recording, &texts(), None, 1)?;
    match learning.tokens(&int(recording.dev(), &[1; 4])) {
        Err(Error::Argument { op: "cached_attention", arg: "qkv", .. }) => {}
        other => panic!("{other:?}"),
    }
    Ok(())
}

#[test]
fn a_finished_run_draws_from_the_command_line() -> Outcome {
    let dir = Scratch::new();
    let cfg = config("f32", ARMS[2]);
    let trained = Ett::new(&cfg, cpu(1))?;
    save_weights(&trained.params, &dir.path("model.safetensors"), Stored::Master)?;
    std::fs::write(dir.path("config.toml"), toml::to_string(&cfg)?)?;
    std::fs::write(dir.path("prompts.txt"), "a dark square\n\na light one\n")?;
    let run = |more: &[&str]| {
        let mut c = Command::new(env!("CARGO_BIN_EXE_ett"));
        c.args(["generate", "--threads", "1", "--run"]).arg(dir.path("")).args(more);
        c.output().expect("the program starts")
    };
    let [sheet, prompts, none] = ["sheet.png", "prompts.txt", "config.toml"].map(|n| dir.path(n));
    let done = run(&["red", "--prompts", &prompts.display().to_string(), "--count", "2", "--out"]
        .into_iter()
        .chain([&*sheet.display().to_string()])
        .collect::<Vec<_>>());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // Three rows of two pictures of 4 x 4 pixels, with gaps of two pixels.
    let image = Image::open(&sheet)?;
    assert_eq!((image.height, image.width), (3 * 6 + 2, 2 * 6 + 2));
    // The same as the library draws.
    let lines: Vec<String> = ["red", "a dark square", "a light one"].map(String::from).to_vec();
    let twice: Vec<String> = lines.iter().flat_map(|l| [l.clone(), l.clone()]).collect();
    let open = Trained::open(&dir.path(""), cpu(1), false)?;
    let drawn = open.draw(&twice, &Sampling::default(), &mut silent)?;
    let rows: Vec<Vec<&Image>> = drawn.chunks(2).map(|row| row.iter().collect()).collect();
    assert!(ett::data::grid(&rows, 2)?.to_u8() == image.to_u8());
    let text = TextTokenizer::Bytes;
    let start = text.special(Special::VisionStart);
    let parts: Vec<Vec<Part>> =
        twice.iter().map(|p| Ok(vec![Part::context(text.encode(p)?)])).collect::<Result<_>>()?;
    assert!(draw(&open.model, &parts, start, (2, 2), &Sampling::default(), &mut silent)? == drawn);

    // Options that are left out are as in the model's configuration.
    let own = SamplingConfig { temperature: 0.3, top_k: 3, top_p: 0.9, guidance: 2.0 };
    std::fs::write(dir.path("config.toml"), toml::to_string(&Config { sampling: own, ..cfg })?)?;
    let open = Trained::open(&dir.path(""), cpu(1), false)?;
    assert_eq!(open.sampling(), Sampling::of(&own, 1));
    let mut different = Vec::new();
    for (options, s) in [
        (&[][..], Sampling::of(&own, 1)),
        (
            &["--temperature", "2", "--guidance", "1"],
            Sampling { temperature: 2.0, guidance: 1.0, ..open.sampling() },
        ),
        (&["--temperature", "1", "--top-k", "0", "--top-p", "1", "--guidance", "3"], Sampling::default()),
    ] {
        let out = sheet.display().to_string();
        let done = run(&[&["red", "--count", "2", "--out", &out][..], options].concat());
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let drawn = open.draw(&["red".into(), "red".into()], &s, &mut silent)?;
        let want = ett::data::grid(&[drawn.iter().collect::<Vec<_>>()], 2)?.to_u8();
        assert!(Image::open(&sheet)?.to_u8() == want, "{options:?}");
        different.push(want);
    }
    assert!(different[0] != different[1] && different[1] != different[2] && different[0] != different[2]);

    for (args, what) in [
        (&["red", "--top-p", "0"][..], "`top_p` is 0"),
        (&["red", "--temperature=-1"], "`temperature` is -1"),
        (&["red", "--count", "0"], "0 is not in 1.."),
        (&[], "required"),
        (&["--prompts", &none.with_extension("no").display().to_string()], "config.no"),
    ] {
        let failed = run(args);
        let text = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert!(!failed.status.success() && text.contains(what), "{args:?}: {text}");
    }
    Ok(())
}
