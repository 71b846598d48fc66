//! Vision tokenizers, perceptual features and Inception as other programs save them (tests/oracle/ibq.py).

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use ett::config::{Config, QuantizerMetric};
use ett::data::Image;
use ett::exchange::{
    ForeignTokenizer, inception_shapes, open_inception, open_perceptual, open_tokenizer, write_checkpoint,
    write_inception, write_perceptual, write_tokenizer,
};
use ett::files::replace;
use ett::formats::{Archive, Encoding, FileTensor, Selection, Tree, write_safetensors, write_torch};
use ett::infer::reconstruct;
use ett::io::weights::{Fit, load_selection, read_file, write_file};
use ett::model::Ett;
use ett::nn::HostTensor;

use crate::common::{Outcome, Scratch, cpu, fixtures, normal, scaled};
use crate::training::small;

fn fixture(name: &str) -> PathBuf {
    fixtures().join("ibq").join(name)
}

/// The modules that a tokenizer's file may hold.
const GROUPS: [&str; 4] = ["encoder", "decoder", "discriminator", "lpips"];

/// A small model around a tokenizer.
fn config(of: &ForeignTokenizer) -> Config {
    let mut cfg = small("f32");
    cfg.tokenizer = of.tokenizer.clone();
    cfg.quantizer = of.quantizer.clone();
    cfg.discriminator = of.discriminator.clone().unwrap_or(cfg.discriminator);
    cfg.lpips.widths = of.widths.unwrap_or(cfg.lpips.widths);
    cfg
}

/// Loads all that the file has into the modules `groups`.
fn load(model: &Ett, from: &Selection, groups: &[&str]) -> ett::error::Result<()> {
    let names = model.params.names().filter(|(_, group, _)| groups.contains(group));
    let names: Vec<&str> = names.map(|(name, ..)| name).collect();
    load_selection(&model.params, from, Fit { wanted: &|name| names.contains(&name), ..Fit::EXACT })?;
    Ok(())
}

/// A tensor: name, encoding, shape and bits.
type Bits = (String, Encoding, Vec<usize>, Vec<u64>);

/// Every tensor of a selection.
fn all(of: &Selection) -> ett::error::Result<Vec<Bits>> {
    let one = |(name, dims): (&str, &[usize])| {
        let bits = of.read(name)?.values.iter().map(|v| v.to_bits()).collect();
        Ok((name.to_string(), of.encoding(name)?, dims.to_vec(), bits))
    };
    of.tensors().map(one).collect()
}

/// Pictures `[B, H, W, 3]` one by one.
fn pictures(t: &HostTensor) -> Vec<Image> {
    let (height, width) = (t.dims[1], t.dims[2]);
    let one = |c: &[f64]| Image { height, width, pixels: c.iter().map(|&v| v as f32).collect() };
    t.values.chunks(height * width * 3).map(one).collect()
}

/// Compares codes and reconstructions with those that PyTorch computed.
fn compare(model: &Ett, expected: &BTreeMap<String, HostTensor>, case: &str) -> Outcome {
    let (rec, codes) = reconstruct(model, &pictures(&expected["image"]))?;
    let want: Vec<i32> = expected[&format!("{case}.codes")].values.iter().map(|&v| v as i32).collect();
    assert_eq!(codes, want, "{case}");
    let want = &expected[&format!("{case}.rec")].values;
    let got = rec.iter().flat_map(|image| &image.pixels);
    let worst = got.zip(want).map(|(&a, &b)| (f64::from(a) - b).abs()).fold(0.0, f64::max);
    assert!(worst < 1e-4, "{case}: {worst:e}");
    Ok(())
}

#[test]
fn codes_and_reconstructions_are_those_of_torch() -> Outcome {
    let expected = read_file(&fixture("expected.safetensors"))?;
    let from = open_tokenizer(&fixture("ibq.ckpt"))?;
    let mut model = Ett::new(&config(&from), cpu(2))?;
    load(&model, &from.weights, &GROUPS)?;
    compare(&model, &expected, "raw")?;
    let averages = from.averages.as_ref().ok_or("the file has averages")?;
    load(&model, averages, &["encoder", "decoder", "discriminator"])?;
    compare(&model, &expected, "ema")?;
    assert_eq!((from.updates, from.decay), (Some(1234), Some(0.999)));
    for (name, _) in from.state.tensors() {
        model.set_carried(name, &from.state.read(name)?.values)?;
    }
    assert_eq!(model.discriminator_state.batches, 77);
    let variance = model.discriminator_state.running[2].1.to_f64(&**model.params.device())?;
    let file = Archive::open(&fixture("ibq.ckpt"))?;
    assert_eq!(variance, file.read("state_dict.loss.discriminator.main.9.running_var")?.values);

    let from = open_tokenizer(&fixture("emu"))?;
    let mut cfg = config(&from);
    // The published code does not pass the option on, so that plain dot products are its result.
    assert_eq!(cfg.quantizer.metric, QuantizerMetric::Dot);
    let notes = from.notes.join("\n");
    assert!(notes.contains("`l2_normalize` is set, but"), "{notes}");
    for (case, metric) in [("emu", QuantizerMetric::Dot), ("emu_l2", QuantizerMetric::L2norm)] {
        cfg.quantizer.metric = metric;
        let model = Ett::new(&cfg, cpu(2))?;
        load(&model, &from.weights, &["encoder", "decoder"])?;
        compare(&model, &expected, case)?;
    }
    assert!(from.averages.is_none() && from.discriminator.is_none() && from.widths.is_none());
    Ok(())
}

#[test]
fn what_a_checkpoint_says() -> Outcome {
    let from = open_tokenizer(&fixture("ibq.ckpt"))?;
    let t = &from.tokenizer;
    assert_eq!((t.ch, &t.ch_mult[..], t.num_res_blocks, t.z_channels), (8, &[1, 1, 2][..], 1, 8));
    assert_eq!((t.norm_groups, t.norm_eps), (4, 1e-6));
    let q = &from.quantizer;
    assert_eq!((q.codes, q.dim, q.beta, q.temperature, q.metric), (48, 8, 0.5, 0.02, QuantizerMetric::Dot));
    assert_eq!(from.discriminator.as_ref().map(|d| d.ndf), Some(2));
    assert_eq!(from.widths, Some([4, 4, 6, 6, 8]));
    let notes = from.notes.join("\n");
    for note in [
        "was saved in epoch 3 at step 1234",
        "left out `optimizer_states` (6 tensors)",
        "was trained with `entropy_loss_weight` 0.1; set loss.entropy to go on like this",
    ] {
        assert!(notes.contains(note), "{notes}");
    }
    Ok(())
}

/// Asserts that two tokenizers are the same, bit by bit.
fn same(a: &ForeignTokenizer, b: &ForeignTokenizer) -> Outcome {
    assert_eq!(all(&a.weights)?, all(&b.weights)?);
    assert_eq!(a.averages.as_ref().map(all).transpose()?, b.averages.as_ref().map(all).transpose()?);
    assert_eq!(all(&a.state)?, all(&b.state)?);
    assert_eq!(
        (&a.tokenizer, &a.quantizer, &a.discriminator),
        (&b.tokenizer, &b.quantizer, &b.discriminator)
    );
    assert_eq!((a.widths, a.updates, a.decay), (b.widths, b.updates, b.decay));
    Ok(())
}

#[test]
fn tokenizers_survive_every_format() -> Outcome {
    for name in ["ibq.ckpt", "emu"] {
        let dir = Scratch::new();
        let mut from = open_tokenizer(&fixture(name))?;
        from.quantizer.metric = QuantizerMetric::L2norm;
        let ours = dir.path("ours.safetensors");
        let missing = write_tokenizer(&ours, &from, None)?;
        assert_eq!(missing.len(), if name == "emu" { 2 } else { 0 }, "{missing:?}");
        same(&from, &open_tokenizer(&ours)?)?;
        let theirs = dir.path("theirs.ckpt");
        assert_eq!(write_checkpoint(&theirs, &from)?, missing);
        same(&from, &open_tokenizer(&theirs)?)?;
        // Nothing is overwritten.
        for e in [write_tokenizer(&ours, &from, None), write_checkpoint(&theirs, &from)] {
            let e = e.expect_err("a file").to_string();
            assert!(e.contains("exists already and is not overwritten; name a new file"), "{e}");
        }
    }
    let dir = Scratch::new();
    // Another encoding, for weights and averages only.
    let from = open_tokenizer(&fixture("ibq.ckpt"))?;
    let path = dir.path("bf16.safetensors");
    write_tokenizer(&path, &from, Some(Encoding::Bf16))?;
    let back = open_tokenizer(&path)?;
    assert_eq!(back.weights.encoding("quant_conv.weight")?, Encoding::Bf16);
    assert_eq!(all(&back.state)?, all(&from.state)?);
    Ok(())
}

#[test]
fn frozen_weights_are_their_own_averages() -> Outcome {
    let dir = Scratch::new();
    let mut from = open_tokenizer(&fixture("ibq.ckpt"))?;
    let averages = from.averages.as_mut().ok_or("the file has averages")?;
    averages.retain(|name| !name.starts_with("decoder."));
    from.state.retain(|name| !name.ends_with("tracked"));
    let notes = write_checkpoint(&dir.path("a.ckpt"), &from)?;
    assert!(notes.len() == 1 && notes[0].contains("have no averages, and stand for them"), "{notes:?}");
    fs::copy(fixture("ibq.yaml"), dir.path("a.yaml"))?;
    let back = open_tokenizer(&dir.path("a.ckpt"))?;
    let name = "decoder.conv_in.weight";
    assert_eq!(back.averages.as_ref().ok_or("averages")?.read(name)?, from.weights.read(name)?);
    let counts = back.state.read("loss.discriminator.main.3.num_batches_tracked")?;
    assert_eq!((counts.dims.len(), counts.values), (0, vec![0.0]));
    // Nothing is written of an incomplete model.
    from.weights.retain(|name| name != "quant_conv.bias");
    let e = write_checkpoint(&dir.path("b.ckpt"), &from).expect_err("an incomplete tokenizer").to_string();
    assert!(e.ends_with("does not fit the tokenizer: missing `quant_conv.bias` [8]"), "{e}");
    assert!(!dir.path("b.ckpt").exists());
    Ok(())
}

/// The tensors of a file, to be changed.
type Tensors = BTreeMap<String, (Encoding, Vec<usize>, Vec<u8>)>;

fn read(path: &Path) -> Result<Tensors, Box<dyn std::error::Error>> {
    let file = Archive::open(path)?;
    let mut all = BTreeMap::new();
    for (name, info) in file.tensors() {
        let bytes = info.encoding.encode(&file.read(name)?.values)?;
        all.insert(name.clone(), (info.encoding, info.dims.clone(), bytes));
    }
    Ok(all)
}

fn tensors(of: &Tensors) -> impl Iterator<Item = FileTensor<'_>> {
    of.iter().map(|(name, (encoding, dims, bytes))| FileTensor {
        name: name.clone(),
        dims: dims.clone(),
        encoding: *encoding,
        bytes: Box::new(|| Ok(bytes.clone())),
    })
}

fn to_safetensors(path: &Path, of: &Tensors, metadata: HashMap<String, String>) -> ett::error::Result<()> {
    replace(path, |file| write_safetensors(file, tensors(of).collect(), metadata))?;
    Ok(())
}

fn to_torch(path: &Path, of: &Tensors) -> ett::error::Result<()> {
    let leaves = tensors(of).map(|t| (t.name.clone(), Tree::Tensor(t))).collect();
    replace(path, |file| write_torch(file, Tree::Dict(leaves)))?;
    Ok(())
}

/// The reason for which a tokenizer is refused.
fn refused(path: &Path) -> String {
    match open_tokenizer(path) {
        Ok(_) => format!("{} was not refused", path.display()),
        Err(e) => e.to_string(),
    }
}

/// The weights of `emu` after a change, with its configuration after another.
fn changed(
    edit: impl Fn(&mut Tensors),
    (old, new): (&str, &str),
) -> Result<String, Box<dyn std::error::Error>> {
    let dir = Scratch::new();
    let mut of = read(&fixture("emu/model.ckpt"))?;
    edit(&mut of);
    to_safetensors(&dir.path("model.safetensors"), &of, HashMap::new())?;
    let yaml = fs::read_to_string(fixture("emu/config.yaml"))?;
    assert!(yaml.contains(old), "{yaml}");
    fs::write(dir.path("config.yaml"), yaml.replace(old, new))?;
    Ok(refused(&dir.path("")))
}

#[test]
fn tensors_that_do_not_fit_are_listed() -> Outcome {
    let e = changed(
        |of| {
            of.remove("quant_conv.bias");
            of.insert("temb.weight".into(), (Encoding::F32, vec![1], vec![0; 4]));
            of.insert("encoder.norm_out.bias".into(), (Encoding::F32, vec![3], vec![0; 12]));
            of.insert("encoder.norm_out.weight".into(), (Encoding::I64, vec![16], vec![0; 128]));
        },
        ("", ""),
    )?;
    let want = "does not fit the tokenizer: `encoder.norm_out.weight` has type I64, wanted floats; \
                `encoder.norm_out.bias` is [3], wanted [16]; missing `quant_conv.bias` [8]; unknown `temb.weight`";
    assert!(e.ends_with(want), "{e}");
    let e = changed(|of| of.clear(), ("", ""))?;
    assert!(
        e.contains("holds no vision tokenizer of IBQ: it lacks `encoder.conv_in.weight` and has no tensors"),
        "{e}"
    );

    // Attention at another level, and none at the lowest.
    let moved = |from: &'static str, to: &'static str| {
        move |of: &mut Tensors| {
            let names: Vec<String> = of.keys().filter(|name| name.starts_with(from)).cloned().collect();
            for name in names {
                let t = of[&name].clone();
                of.insert(name.replacen(from, to, 1), t);
            }
        }
    };
    let e = changed(moved("encoder.down.2.attn", "encoder.down.1.attn"), ("", ""))?;
    let want = "has attention blocks at `encoder.down.1`; ett has them at level 2 only, the lowest";
    assert!(e.ends_with(want), "{e}");
    let e = changed(|of| of.retain(|name, _| !name.starts_with("decoder.up.2.attn")), ("", ""))?;
    assert!(e.contains("has no attention blocks at `decoder.up.2`"), "{e}");
    let e = changed(
        |of| {
            let (encoding, _, bytes) = of["encoder.conv_out.weight"].clone();
            of.insert("encoder.conv_out.weight".into(), (encoding, vec![16, 16, 3, 3], bytes.repeat(2)));
        },
        ("", ""),
    )?;
    assert!(e.contains("its encoder has 16 output channels for 8 of the decoder (`double_z`)"), "{e}");

    // Values are looked at when they are loaded.
    let dir = Scratch::new();
    let mut of = read(&fixture("emu/model.ckpt"))?;
    if let Some((_, _, bytes)) = of.get_mut("quant_conv.bias") {
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    fs::copy(fixture("emu/config.yaml"), dir.path("a.yaml"))?;
    to_torch(&dir.path("a.pth"), &of)?;
    let from = open_tokenizer(&dir.path("a.pth"))?;
    let model = Ett::new(&config(&from), cpu(1))?;
    let e = load(&model, &from.weights, &["encoder", "decoder"]).expect_err("a NaN").to_string();
    assert!(e.ends_with("`quant_conv.bias` has 1 of 8 values that are not finite"), "{e}");
    Ok(())
}

#[test]
fn configurations_that_do_not_fit_are_refused() -> Outcome {
    for (old, new, want) in [
        (
            "n_embed: 48",
            "n_embed: 64",
            "does not fit the weights or ett: `n_embed` is 64, but the weights have 48",
        ),
        ("ch: 8", "ch: 128", "`ddconfig.ch` is 128, but the weights have 8"),
        ("[1, 1, 2]", "[1, 2, 2]", "`ddconfig.ch_mult` is [1,2,2], but the weights have [1,1,2]"),
        (
            "double_z: False",
            "double_z: True",
            "`ddconfig.double_z` is true, which ett does not have, wanted false",
        ),
        ("dropout: 0.0", "dropout: 0.1", "`ddconfig.dropout` is 0.1, which ett does not have, wanted 0"),
        ("dropout: 0.0", "dropout: ${drop}", "`ddconfig.dropout` is \"${drop}\", wanted a number"),
        (
            "dropout: 0.0",
            "resamp_with_conv: no way",
            "`ddconfig.resamp_with_conv` is \"no way\", which ett does",
        ),
        (
            "attn_resolutions: [4]",
            "attn_resolutions: [8, 4]",
            "`ddconfig.attn_resolutions` [8,4] puts attention at the levels [1, 2] of a resolution of 16; \
             ett has it at level 2 only, the lowest",
        ),
        ("n_embed: 48", "remap: used.npy", "`remap` is \"used.npy\", which ett does not have, wanted none"),
        ("norm_groups: 4", "norm_groups: 0", "`ddconfig.norm_groups` is 0, wanted a whole number"),
        ("norm_groups: 4", "norm_groups: 3", "has 8 channels, which do not divide into the 3 groups"),
        ("norm_groups: 4", "", "has 8 channels, which do not divide into the 32 groups"),
        ("ddconfig:", "other:", "lacks `ddconfig`, the sizes of encoder and decoder"),
        (
            "ddconfig:",
            "model: {class_path: a.b.VQModel}\nddconfig:",
            "its class is `a.b.VQModel`, wanted one named IBQ",
        ),
        ("n_embed: 48", "n_embed: [48", "is not valid YAML (line "),
        ("n_embed: 48", "n_embed: 48\nn_embed: 48", "is not valid YAML (line "),
    ] {
        let e = changed(|_| (), (old, new))?;
        assert!(e.contains(want), "{new}: {e}");
    }
    // A small text that would become a large one, and a large text.
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x]\n");
    for n in 1..20 {
        bomb.push_str(&format!("a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 8].join(", ")));
    }
    for (text, want) in
        [(bomb, "is not valid YAML ("), ("# long\n".repeat(200_000), "it has more than 1048576 bytes")]
    {
        let e = changed(|_| (), ("ddconfig:", &format!("{text}ddconfig:")))?;
        assert!(e.contains(want), "{e}");
    }
    Ok(())
}

#[test]
fn averages_and_statistics_are_complete() -> Outcome {
    let dir = Scratch::new();
    fs::copy(fixture("ibq.yaml"), dir.path("a.yaml"))?;
    let path = dir.path("a.ckpt");
    let whole = read(&fixture("ibq.ckpt"))?;
    for (name, want) in [
        ("model_ema.quant_convbias", "does not fit the tokenizer: missing `model_ema.quant_convbias` [8]"),
        ("model_ema.num_updates", "does not fit the tokenizer: missing `model_ema.num_updates`"),
        (
            "model_ema.lossdiscriminatormain0bias",
            "does not fit the tokenizer: missing `model_ema.lossdiscriminatormain0bias` [2]",
        ),
        ("loss.discriminator.main.6.running_var", "missing `loss.discriminator.main.6.running_var` [8]"),
        ("loss.discriminator.main.6.num_batches_tracked", "`loss.discriminator.main.6.num_batches_tracked`"),
        (
            "loss.perceptual_loss.lin2.model.1.weight",
            "missing `loss.perceptual_loss.lin2.model.1.weight` [1, 6, 1, 1]",
        ),
    ] {
        let mut of = whole.clone();
        assert!(of.remove(&format!("state_dict.{name}")).is_some(), "{name}");
        let of = of.into_iter().filter(|(name, _)| name.starts_with("state_dict.")).collect();
        to_torch(&path, &of)?;
        let e = refused(&path);
        assert!(e.ends_with(want), "{e}");
    }
    Ok(())
}

#[test]
fn files_that_are_no_tokenizer_are_refused() -> Outcome {
    let dir = Scratch::new();
    let whole = fs::read(fixture("ibq.ckpt"))?;
    for (name, bytes) in [
        ("half.ckpt", &whole[..whole.len() / 2]),
        ("class.pth", &b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."[..]),
        ("text.bin", &b"once upon a time"[..]),
        ("empty.ckpt", &[][..]),
    ] {
        fs::write(dir.path(name), bytes)?;
        let e = refused(&dir.path(name));
        assert!(e.starts_with(&dir.path(name).display().to_string()) && e.len() < 300, "{e}");
    }
    let e = refused(&dir.path(""));
    let want =
        "holds several files of weights (class.pth, empty.ckpt, half.ckpt, text.bin); name one of them";
    assert!(e.ends_with(want), "{e}");
    let e = refused(&dir.path("nothing.ckpt"));
    assert!(e.contains("nothing.ckpt: "), "{e}");
    let e = refused(&fixture("ibq.yaml"));
    assert!(e.ends_with("is a configuration; name the file of weights, or the folder of both"), "{e}");
    let e = refused(&fixture("heads.pth"));
    assert!(
        e.contains("holds no vision tokenizer of IBQ: it lacks `encoder.conv_in.weight` and has `lin0."),
        "{e}"
    );

    // What a header of ours says has to be true, and of a known version.
    let from = open_tokenizer(&fixture("emu"))?;
    let path = dir.path("ours.safetensors");
    write_tokenizer(&path, &from, None)?;
    let said = Archive::open(&path)?.about()["tokenizer"].as_str().unwrap_or_default().to_string();
    let of = read(&path)?;
    for (old, new, want) in [
        (
            "\"codes\":48",
            "\"codes\":49",
            "does not fit its own header: `quantizer.codes` is 49, but the weights have 48",
        ),
        (
            "\"format\":1",
            "\"format\":2",
            "has the format 2, but this program reads the format 1; use a newer version of ett",
        ),
        ("\"ch\":8", "\"channels\":8", "its header does not describe a tokenizer (unknown field `channels`"),
    ] {
        assert!(said.contains(old), "{said}");
        to_safetensors(&path, &of, HashMap::from([("tokenizer".into(), said.replace(old, new))]))?;
        let e = refused(&path);
        assert!(e.contains(want), "{e}");
    }
    Ok(())
}

#[test]
fn perceptual_features_from_other_files() -> Outcome {
    let open = |names: &[&str]| open_perceptual(&names.iter().map(|n| fixture(n)).collect::<Vec<_>>());
    let whole = open(&["lpips.pth"])?;
    assert_eq!((whole.widths, whole.notes.len()), ([4, 4, 6, 6, 8], 0));
    let want = all(&whole.weights)?;
    let of_tokenizer = open(&["ibq.ckpt"])?;
    assert_eq!(all(&of_tokenizer.weights)?, want);
    for files in [["vgg16.pth", "heads.pth"], ["heads.pth", "vgg16-legacy.pth"]] {
        let parts = open(&files)?;
        let unscaled = want.iter().filter(|(name, ..)| !name.contains("scaling_layer")).cloned();
        assert_eq!(all(&parts.weights)?, unscaled.collect::<Vec<_>>());
        let notes = parts.notes.join("\n");
        assert!(notes.contains("left out the classifier (`classifier.*`, 2 tensors)"), "{notes}");
        assert!(notes.contains("no file has the scaling of the input"), "{notes}");
    }
    let trunk = open(&["vgg16-legacy.pth"])?;
    assert_eq!((trunk.weights.tensors().count(), trunk.notes.len()), (26, 3));

    let dir = Scratch::new();
    let path = dir.path("lpips.safetensors");
    write_perceptual(&path, &open_tokenizer(&fixture("ibq.ckpt"))?.weights, None)?;
    assert_eq!(all(&open_perceptual(std::slice::from_ref(&path))?.weights)?, want);
    // The model takes what is complete.
    let model = Ett::new(&config(&open_tokenizer(&fixture("ibq.ckpt"))?), cpu(1))?;
    load(&model, &whole.weights, &["lpips"])?;

    let refuse = |names: &[&str]| open(names).err().map_or(String::new(), |e| e.to_string());
    let e = refuse(&["heads.pth"]);
    assert!(
        e.contains("holds no complete VGG16: it lacks `loss.perceptual_loss.net.slice1.0.weight`"),
        "{e}"
    );
    let e = refuse(&["lpips.pth", "heads.pth"]);
    assert!(e.contains("`loss.perceptual_loss.lin0.model.1.weight` is in") && e.contains("again"), "{e}");
    let mut of = read(&fixture("vgg16.pth"))?;
    of.remove("features.28.bias");
    of.insert("features.30.weight".into(), (Encoding::F32, vec![1], vec![0; 4]));
    to_torch(&path, &of)?;
    let e = open_perceptual(std::slice::from_ref(&path)).err().map_or(String::new(), |e| e.to_string());
    let want = "does not fit VGG16 and LPIPS: unknown `features.30.weight`; \
                missing `loss.perceptual_loss.net.slice5.28.bias` [8]";
    assert!(e.ends_with(want), "{e}");
    Ok(())
}

#[test]
fn inception_of_pytorch() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("inception.pth");
    let shapes = inception_shapes();
    let parameters: usize = shapes.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    // torchvision's `inception_v3` without its auxiliary classifier has 23,869,000 with statistics, and 8 classes fewer.
    assert_eq!((shapes.len(), parameters), (472, 23_869_000 + 8 * 2049));
    // Two bytes a value are enough here.
    let mut of: Tensors = BTreeMap::new();
    for (i, (name, dims)) in shapes.iter().enumerate() {
        let bytes = (0..2 * dims.iter().product::<usize>()).map(|b| ((b + i) % 61) as u8).collect();
        of.insert(name.clone(), (Encoding::F16, dims.clone(), bytes));
    }
    let ours = of.clone();
    of.insert("Mixed_5b.branch1x1.bn.num_batches_tracked".into(), (Encoding::I64, vec![], vec![0; 8]));
    of.insert("AuxLogits.conv0.conv.weight".into(), (Encoding::F16, vec![1], vec![0; 2]));
    to_torch(&path, &of)?;
    let (weights, notes) = open_inception(&path)?;
    assert_eq!(notes, ["left out the auxiliary classifier (`AuxLogits.*`, 1 tensor)"]);
    let saved = dir.path("inception.safetensors");
    write_inception(&saved, &weights, None)?;
    assert_eq!(read(&saved)?, ours);
    assert_eq!(open_inception(&saved)?.0.tensors().count(), 472);

    of.insert("fc.bias".into(), (Encoding::F16, vec![1000], vec![0; 2000]));
    of.remove("Conv2d_1a_3x3.bn.running_var");
    to_torch(&path, &of)?;
    let e = open_inception(&path).err().map_or(String::new(), |e| e.to_string());
    let want = "does not fit Inception-v3 for FID: missing `Conv2d_1a_3x3.bn.running_var` [32]; \
                `fc.bias` is [1000], wanted [1008]";
    assert!(e.ends_with(want), "{e}");
    Ok(())
}

/// Writes a checkpoint at the size of IBQ's and what it computes here, for `ibq.py --reference` (tests/oracle).
#[test]
#[ignore = "writes two gigabytes into the folder ETT_IBQ"]
fn writes_for_the_reference() -> Outcome {
    let dir = PathBuf::from(std::env::var("ETT_IBQ").map_err(|_| "ETT_IBQ names no folder")?);
    let mut cfg = small("f32");
    let standard = Config::default();
    (cfg.tokenizer, cfg.quantizer) = (standard.tokenizer, standard.quantizer);
    cfg.quantizer.codes = 1024;
    (cfg.lpips, cfg.discriminator) = (standard.lpips, standard.discriminator);
    let mut saved = vec![];
    let x = HostTensor { dims: vec![1, 64, 64, 3], values: scaled(5, 64 * 64 * 3, 0.5) };
    let mut results = vec![("image".to_string(), x.clone(), Encoding::F32)];
    for (seed, case) in [(1, "raw"), (2, "ema")] {
        cfg.train.seed = seed;
        let model = Ett::new(&cfg, cpu(2))?;
        let (rec, codes) = reconstruct(&model, &pictures(&x))?;
        let rec = rec.iter().flat_map(|r| &r.pixels).map(|&v| f64::from(v)).collect();
        results.push((
            format!("{case}.rec"),
            HostTensor { dims: x.dims.clone(), values: rec },
            Encoding::F32,
        ));
        let codes =
            HostTensor { dims: vec![codes.len()], values: codes.iter().map(|&c| f64::from(c)).collect() };
        results.push((format!("{case}.codes"), codes, Encoding::I32));
        let path = dir.join(format!("{case}.safetensors"));
        ett::io::save_weights(&model.params, &path, ett::nn::Stored::Master)?;
        saved.push(Selection::whole(Archive::open(&path)?));
    }
    let averages = saved.pop();
    let weights = saved.pop().ok_or("two models")?;
    let statistics = dir.join("state.safetensors");
    let mut state = vec![];
    for (layer, width) in [(3, 128), (6, 256), (9, 512)] {
        for what in ["running_mean", "running_var"] {
            let values = normal(layer, width).into_iter().map(f64::abs).collect();
            let name = format!("loss.discriminator.main.{layer}.{what}");
            state.push((name, HostTensor { dims: vec![width], values }, Encoding::F32));
        }
    }
    write_file(&statistics, &state)?;
    let from = ForeignTokenizer {
        random_features: false,
        tokenizer: cfg.tokenizer,
        quantizer: cfg.quantizer,
        discriminator: Some(cfg.discriminator),
        widths: Some(cfg.lpips.widths),
        weights,
        averages,
        updates: None,
        decay: Some(0.999),
        state: Selection::whole(Archive::open(&statistics)?),
        notes: vec![],
    };
    assert!(write_checkpoint(&dir.join("tokenizer.ckpt"), &from)?.is_empty());
    write_file(&dir.join("pictures.safetensors"), &results)?;
    Ok(())
}

#[test]
fn folders_without_a_tokenizer() -> Outcome {
    let dir = Scratch::new();
    let refused = || open_tokenizer(&dir.path("")).err().map_or(String::new(), |e| e.to_string());
    assert!(refused().contains("holds no file of weights (.ckpt, "), "{}", refused());
    assert!(refused().contains(") but nothing; name"), "{}", refused());
    for i in 0..9 {
        fs::write(dir.path(&format!("{i}.txt")), "")?;
    }
    let e = refused();
    assert!(e.contains(") but 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, 3 more; name another folder"), "{e}");
    fs::write(dir.path("model.gguf"), "GGUF")?;
    let e = refused();
    assert!(
        e.contains("holds model.gguf, but no vision tokenizer: files of GGUF are language models"),
        "{e}"
    );
    assert!(e.contains("`ett import model.gguf --out FOLDER`"), "{e}");
    Ok(())
}
