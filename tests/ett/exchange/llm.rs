//! Language models of `transformers` and llama.cpp: logits and continuations as `transformers` computes them, folders
//! that are read as they were written, and what is refused. `tests/oracle/llm.py` makes the files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ett::autograd::{Tape, Var};
use ett::config::Config;
use ett::data::{Special, TextTokenizer};
use ett::exchange::{ForeignLlm, open_llm, write_llm};
use ett::feed::Batch;
use ett::formats::{Archive, Encoding, FileTensor, Selection, write_safetensors};
use ett::infer::Continued;
use ett::io::weights::{Fit, load_selection, read_file};
use ett::model::{Ett, Part};
use serde_json::{Value, json};

use crate::common::{Outcome, Scratch, cpu, fixtures, int};

type Failure = Box<dyn std::error::Error>;

/// Every folder or file, by the name of its folder.
const HUGGING_FACE: [&str; 5] = ["llama", "mistral", "qwen2", "qwen2-untied", "torch"];
const GGUF: [&str; 2] = ["gguf-llama", "gguf-qwen2"];

fn folder(name: &str) -> PathBuf {
    fixtures().join("llm").join(name)
}

fn source(name: &str) -> PathBuf {
    match name.starts_with("gguf") {
        true => folder(name).join("model.gguf"),
        false => folder(name),
    }
}

/// Our model with these weights, and a tokenizer that is as small as possible.
fn model(of: &ForeignLlm) -> Result<Ett, Failure> {
    let mut c = Config { llm: of.config.clone(), ..Config::default() };
    let t = &mut c.tokenizer;
    (t.ch, t.ch_mult, t.num_res_blocks, t.z_channels, t.norm_groups) = (8, vec![1, 1], 1, 8, 4);
    (c.quantizer.codes, c.quantizer.dim) = (24, 8);
    c.lpips.widths = [4; 5];
    c.discriminator.ndf = 4;
    (c.train.precision, c.data.size) = ("f32".into(), 4);
    let model = Ett::new(&c, cpu(2))?;
    let is_llm = |name: &str| name.starts_with("model.") || name == "lm_head.weight";
    let grows = |name: &str| name == "model.embed_tokens.weight" || name == "lm_head.weight";
    load_selection(&model.params, &of.weights, Fit { wanted: &is_llm, grows: &grows, ..Fit::EXACT })?;
    Ok(model)
}

fn host(t: &Tape, x: &Var) -> Result<Vec<f64>, Failure> {
    Ok(x.value().to_host::<f32>(t.dev())?.into_iter().map(f64::from).collect())
}

/// Logits `[N, rows]` at all positions of a sequence, of the first `rows` tokens.
fn logits(model: &Ett, ids: &[i32], rows: usize) -> Result<Vec<f64>, Failure> {
    let t = Tape::inference(model.params.device().clone(), model.params.precision());
    let packed = Batch::pack(model, &[vec![Part::context(ids.to_vec())]], &[], 1)?;
    let hidden = model.hidden(&t, None, &packed)?;
    let all = host(&t, &model.text_logits(&t, &hidden)?)?;
    let vocab = model.cfg.llm.vocab;
    Ok(all.chunks(vocab).take(ids.len()).flat_map(|row| row[..rows].to_vec()).collect())
}

fn largest(row: &[f64]) -> i32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(-1, |(i, _)| i as i32)
}

/// The tokens with the largest logits, from a cache of keys and values.
fn greedy_cached(model: &Ett, prompt: &[i32], rows: usize, n: usize) -> Result<Vec<i32>, Failure> {
    let t = Tape::inference(model.params.device().clone(), model.params.precision());
    let prompts = [vec![Part::context(prompt.to_vec())]];
    let mut state = Continued::new(model, &t, &prompts, None, n)?;
    let mut next = Vec::new();
    for _ in 0..n {
        let row = host(&t, &model.text_logits(&t, state.hidden())?)?;
        next.push(largest(&row[..rows]));
        state.tokens(&int(t.dev(), &next[next.len() - 1..]))?;
    }
    Ok(next)
}

/// The same from whole sequences.
fn greedy(model: &Ett, prompt: &[i32], rows: usize, n: usize) -> Result<Vec<i32>, Failure> {
    let mut ids = prompt.to_vec();
    for _ in 0..n {
        let all = logits(model, &ids, rows)?;
        ids.push(largest(&all[all.len() - rows..]));
    }
    Ok(ids.split_off(prompt.len()))
}

fn ints(values: &[f64]) -> Vec<i32> {
    values.iter().map(|&x| x as i32).collect()
}

/// Logits and continuations against those of `transformers`; gives the largest difference.
fn agrees(of: &ForeignLlm, expected: &Path) -> Result<f64, Failure> {
    let want = read_file(expected)?;
    let (ids, next) = (ints(&want["ids"].values), ints(&want["next"].values));
    let rows = want["logits"].dims[1];
    let model = model(of)?;
    let got = logits(&model, &ids, rows)?;
    let want = &want["logits"].values;
    assert_eq!(got.len(), want.len());
    let scale = want.iter().fold(1.0, |m: f64, x| m.max(x.abs()));
    let worst = got.iter().zip(want).fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    assert!(worst <= 1e-4 * scale, "{worst} of {scale}");
    assert_eq!(greedy_cached(&model, &ids, rows, next.len())?, next);
    assert_eq!(greedy(&model, &ids, rows, next.len())?, next);
    Ok(worst / scale)
}

#[test]
fn transformers_computes_the_same() -> Outcome {
    for name in HUGGING_FACE.into_iter().chain(GGUF) {
        let of = open_llm(&source(name)).map_err(|e| format!("{name}: {e}"))?;
        let worst = agrees(&of, &folder(name).join("expected.safetensors"));
        println!("{name}: {:.1e}", worst.map_err(|e| format!("{name}: {e}"))?);
    }
    Ok(())
}

/// Opens a text tokenizer.
fn tokenizer(text: &str) -> Result<TextTokenizer, Failure> {
    let dir = Scratch::new();
    fs::write(dir.path("tokenizer.json"), text)?;
    Ok(TextTokenizer::open(Some(&dir.path("tokenizer.json")))?)
}

#[test]
fn configurations_are_those_of_the_files() -> Outcome {
    for (name, architecture, vocab, tied, theta) in [
        ("gguf-llama", "LlamaForCausalLM", 272, false, 1e5),
        ("gguf-qwen2", "Qwen2ForCausalLM", 272, true, 1e6),
        ("llama", "LlamaForCausalLM", 272, false, 5e5),
        ("mistral", "MistralForCausalLM", 272, false, 1e6),
        ("qwen2", "Qwen2ForCausalLM", 272, true, 1e6),
        ("qwen2-untied", "Qwen2ForCausalLM", 304, false, 1e4),
        ("torch", "Qwen2ForCausalLM", 272, true, 1e6),
    ] {
        let of = open_llm(&source(name))?;
        let c = &of.config;
        assert_eq!(
            (of.architecture.as_str(), c.vocab, c.tied, c.rope_theta),
            (architecture, vocab, tied, theta)
        );
        assert_eq!(c.qkv_bias, architecture.starts_with("Qwen2"), "{name}");
        assert_eq!(of.ends, [264], "{name}");
        assert_eq!((c.heads, c.kv_heads, c.layers), (4, 2, 2));
        let Some(text) = &of.text else {
            assert_eq!(name, "torch");
            assert!(of.notes[0].contains("without a text tokenizer"), "{:?}", of.notes);
            continue;
        };
        let t = tokenizer(text)?;
        assert!(t.vocabulary() <= c.vocab);
        assert_eq!(Special::ALL.map(|s| t.special(s)), [262, 263, 264, 265, 266], "{name}");
        let ids = t.encode(" the red 12 größer")?;
        assert_eq!((t.decode(&ids).as_str(), &ids[..1]), (" the red 12 größer", &[258][..]), "{name}");
        if !name.starts_with("gguf") && name != "mistral" {
            assert_eq!(text.as_bytes(), fs::read(folder(name).join("tokenizer.json"))?);
        }
    }
    Ok(())
}

#[test]
fn special_tokens_are_added_or_marked() -> Outcome {
    let of = open_llm(&folder("mistral"))?;
    let added = [
        "<|vision_start|> was added to the text tokenizer as token 265",
        "<|vision_end|> was added to the text tokenizer as token 266",
    ];
    assert_eq!(of.notes[..2], added);
    // One that is there, but not special, and rows for ids that the file has not.
    let dir = copy("llama")?;
    edit(&dir.path("tokenizer.json"), |t| {
        let list = t["added_tokens"].as_array_mut().expect("a list");
        list.truncate(1);
        list[0]["special"] = false.into();
        let tool = |i: usize| {
            json!({"id": 263 + i, "content": format!("<tool {i}>"), "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": false})
        };
        list.extend((0..10).map(tool));
    })?;
    let of = open_llm(&dir.path(""))?;
    assert_eq!(of.notes[0], "<|endoftext|>, token 262, was marked as special in the text tokenizer");
    assert_eq!(of.notes[1], "<|im_start|> was added to the text tokenizer as token 273");
    assert_eq!(of.notes[5], "the vocabulary has 280 rows, the file 272; 8 are new");
    assert_eq!(of.config.vocab, 280);
    let t = tokenizer(of.text.as_deref().ok_or("a text tokenizer")?)?;
    assert_eq!(t.vocabulary(), 280);
    assert!(model(&of).is_ok());
    Ok(())
}

/// A copy of a folder.
fn copy(name: &str) -> Result<Scratch, Failure> {
    let dir = Scratch::new();
    for entry in fs::read_dir(folder(name))? {
        let path = entry?.path();
        fs::copy(&path, dir.path(&path.file_name().ok_or("a name")?.to_string_lossy()))?;
    }
    Ok(dir)
}

fn edit(path: &Path, change: impl Fn(&mut Value)) -> Outcome {
    let mut value: Value = serde_json::from_slice(&fs::read(path)?)?;
    change(&mut value);
    Ok(fs::write(path, value.to_string())?)
}

/// Names, shapes, encodings and bytes of all tensors.
type Stored = Vec<(String, Vec<usize>, Encoding, Vec<u8>)>;

fn stored(s: &Selection) -> Result<Stored, Failure> {
    let one = |(name, dims): (&str, &[usize])| {
        let bytes = match s.raw(name)? {
            Some((_, bytes)) => bytes.to_vec(),
            None => s.encoding(name)?.encode(&s.read(name)?.values)?,
        };
        Ok((name.to_string(), dims.to_vec(), s.encoding(name)?, bytes))
    };
    s.tensors().map(one).collect()
}

#[test]
fn folders_are_read_as_they_were_written() -> Outcome {
    for name in HUGGING_FACE {
        let dir = Scratch::new();
        let out = dir.path("out");
        let of = open_llm(&folder(name))?;
        let files =
            write_llm(&out, &of.config, &of.weights, of.text.as_deref().map(str::as_bytes), &[], None)?;
        assert!(
            files.iter().all(|f| f.is_file()) && files.last() == Some(&out.join("config.json")),
            "{files:?}"
        );
        let again = open_llm(&out)?;
        assert_eq!(again.config, of.config, "{name}");
        assert_eq!(again.text, of.text, "{name}");
        assert!(stored(&again.weights)? == stored(&of.weights)?, "{name}");
        agrees(&again, &folder(name).join("expected.safetensors")).map_err(|e| format!("{name}: {e}"))?;
        // Nothing is overwritten.
        let e = write_llm(&out, &of.config, &of.weights, None, &[], None).expect_err("files").to_string();
        assert!(e.contains(" already, which is not overwritten; name a new folder"), "{e}");
    }
    Ok(())
}

#[test]
fn quantized_values_are_written_as_floats() -> Outcome {
    for name in GGUF {
        let dir = Scratch::new();
        let of = open_llm(&source(name))?;
        let text = of.text.as_deref().map(str::as_bytes);
        write_llm(&dir.path("out"), &of.config, &of.weights, text, &[], None)?;
        let again = open_llm(&dir.path("out"))?;
        assert_eq!(again.config.rms_eps, of.config.rms_eps);
        agrees(&again, &folder(name).join("expected.safetensors"))?;
        write_llm(&dir.path("bf16"), &of.config, &of.weights, text, &[], Some(Encoding::Bf16))?;
        let small = open_llm(&dir.path("bf16"))?;
        assert!(stored(&small.weights)?.iter().all(|t| t.2 == Encoding::Bf16));
    }
    Ok(())
}

/// Tokens for which the file has no rows get the mean of all others, in an embedding and in a head of its own.
#[test]
fn a_vocabulary_grows_when_it_is_written() -> Outcome {
    for name in ["llama", "qwen2-untied"] {
        let dir = Scratch::new();
        let of = open_llm(&folder(name))?;
        let mut wide = of.config.clone();
        wide.vocab += 8;
        write_llm(&dir.path("out"), &wide, &of.weights, None, &[7], None)?;
        let again = open_llm(&dir.path("out"))?;
        assert_eq!((again.config.vocab, again.ends), (wide.vocab, vec![7]));
        for (name, dims) in again.weights.tensors() {
            let (new, old) = (again.weights.read(name)?.values, of.weights.read(name)?.values);
            assert!(new[..old.len()] == old[..], "{name}");
            let width = dims.last().copied().unwrap_or(1);
            for row in new[old.len()..].chunks(width) {
                let rows = old.len() / width;
                for (i, v) in row.iter().enumerate() {
                    let mean = (0..rows).map(|r| old[r * width + i]).sum::<f64>() / rows as f64;
                    // Rounded to bf16 at most.
                    assert!((v - mean).abs() <= 4e-3 * mean.abs() + 1e-6, "{name}: {v}, wanted {mean}");
                }
            }
        }
        assert!(again.weights.dims("model.embed_tokens.weight").is_some_and(|d| d[0] == wide.vocab));
    }
    Ok(())
}

#[test]
fn an_export_that_fails_leaves_nothing() -> Outcome {
    let dir = Scratch::new();
    let of = open_llm(&folder("qwen2"))?;
    let mut narrow = of.config.clone();
    narrow.vocab = 264;
    let e = write_llm(&dir.path("out"), &narrow, &of.weights, None, &[], None).expect_err("more rows");
    assert!(e.to_string().contains("`model.embed_tokens.weight` is [272, 32], wanted [264, 32]"), "{e}");
    let e = write_llm(&dir.path("out"), &of.config, &of.weights, Some(b"{}"), &[], None)
        .expect_err("no tokenizer");
    assert!(e.to_string().contains("is not a tokenizer.json of Hugging Face"), "{e}");
    assert!(!dir.path("out").exists());
    let e = write_llm(&dir.path("out"), &of.config, &of.weights, None, &[], Some(Encoding::Q8_0))
        .expect_err("type");
    assert!(e.to_string().contains("cannot have weights in Q8_0, wanted one of BF16, F16, F32, F64"), "{e}");
    assert!(!dir.path("out").exists());
    // F16 ends at 65504.
    let large = copy("qwen2")?;
    rewrite(&large.path("model.safetensors"), |all| all[0].3[..4].copy_from_slice(&1e5f32.to_le_bytes()))?;
    let of = open_llm(&large.path(""))?;
    let e = write_llm(&dir.path("out"), &of.config, &of.weights, None, &[], Some(Encoding::F16))
        .expect_err("large");
    assert!(
        e.to_string()
            .contains("` has 1 values that are not finite in F16; choose a type with a larger range"),
        "{e}"
    );
    assert_eq!(fs::read_dir(dir.path("out"))?.count(), 0);
    Ok(())
}

/// The error of a copy of a folder with a changed file.
fn refused(name: &str, file: &str, change: impl Fn(&mut Value)) -> Result<String, Failure> {
    let dir = copy(name)?;
    edit(&dir.path(file), change)?;
    match open_llm(&dir.path("")) {
        Ok(_) => Err(format!("{name} is read with a changed {file}").into()),
        Err(e) => Ok(e.to_string()),
    }
}

#[test]
fn configurations_that_ett_does_not_compute() -> Outcome {
    let only = "since ett does not compute anything else";
    for (name, key, value, want) in [
        (
            "llama",
            "architectures",
            json!(["Qwen3ForCausalLM"]),
            "class Qwen3ForCausalLM (its queries and keys pass through norms, q_norm and k_norm".to_string(),
        ),
        (
            "llama",
            "architectures",
            json!(["GPT2LMHeadModel"]),
            "class GPT2LMHeadModel, wanted one of LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"
                .into(),
        ),
        ("llama", "architectures", json!([]), "`architectures` is a list, wanted one class".into()),
        ("llama", "attention_bias", json!(true), format!("`attention_bias` is true, wanted false, {only}")),
        ("llama", "head_dim", json!(7), "`head_dim` is 7, wanted an even number".into()),
        ("llama", "hidden_act", json!("gelu"), format!("`hidden_act` is \"gelu\", wanted \"silu\", {only}")),
        ("llama", "hidden_size", json!("wide"), "`hidden_size` is \"wide\", wanted a whole number".into()),
        ("llama", "hidden_size", json!(-3), "`hidden_size` is -3, wanted a whole number".into()),
        ("llama", "hidden_size", Value::Null, "`hidden_size` is missing, wanted a whole number".into()),
        ("llama", "hidden_size", json!(1u64 << 60), "`hidden_size` is 1152921504606846976, wanted".into()),
        ("llama", "intermediate_size", json!(0), "`intermediate_size` is 0, wanted".into()),
        (
            "llama",
            "layer_types",
            json!(["full_attention", "sliding_attention"]),
            "`layer_types` names \"sliding_attention\", wanted \"full_attention\" for every layer".into(),
        ),
        ("llama", "mlp_bias", json!(true), format!("`mlp_bias` is true, wanted false, {only}")),
        ("llama", "num_hidden_layers", json!(1_000_000), "`num_hidden_layers` is 1000000, wanted".into()),
        (
            "llama",
            "num_hidden_layers",
            json!(3),
            "missing `model.layers.2.self_attn.q_proj.weight` [64, 32]".into(),
        ),
        (
            "llama",
            "num_key_value_heads",
            json!(3),
            "`num_key_value_heads` is 3, wanted a divisor of 4".into(),
        ),
        (
            "llama",
            "partial_rotary_factor",
            json!(0.5),
            format!("`partial_rotary_factor` is 0.5, wanted 1, {only}"),
        ),
        ("llama", "pretraining_tp", json!(2), format!("`pretraining_tp` is 2, wanted 1, {only}")),
        (
            "llama",
            "quantization_config",
            json!({"bits": 4}),
            format!("`quantization_config` is a dictionary, wanted null, {only}"),
        ),
        ("llama", "rms_norm_eps", json!(-1.0), "`rms_norm_eps` is -1.0, wanted".into()),
        (
            "llama",
            "rope_interleaved",
            json!(true),
            format!("`rope_interleaved` is true, wanted false, {only}"),
        ),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "yarn", "rope_theta": 1e4}),
            "`rope_parameters` is of the type yarn, which ett does not compute".into(),
        ),
        (
            "llama",
            "rope_parameters",
            json!({"rope_theta": 1e4, "factor": 2}),
            "`rope_parameters` has `factor`, which ett does not compute".into(),
        ),
        (
            "llama",
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0}),
            "`rope_scaling` is of the type llama3, which ett does not compute".into(),
        ),
        (
            "llama",
            "rope_theta",
            json!(3.0),
            "`rope_theta` is 500000.0, wanted the same as `rope_theta` elsewhere".into(),
        ),
        ("llama", "vocab_size", json!(280), "`lm_head.weight` is [272, 32], wanted [280, 32]".into()),
        (
            "llama",
            "eos_token_id",
            json!([1, 272]),
            "`eos_token_id` is a list, wanted tokens below 272".into(),
        ),
        ("mistral", "sliding_window", json!(4096), format!("`sliding_window` is 4096, wanted null, {only}")),
        ("qwen2", "num_key_value_heads", Value::Null, "`num_key_value_heads` is missing".into()),
        ("qwen2", "tie_word_embeddings", json!(false), "missing `lm_head.weight` [272, 32]".into()),
        (
            "qwen2",
            "use_sliding_window",
            json!(true),
            format!("`use_sliding_window` is true, wanted false, {only}"),
        ),
    ] {
        let e = refused(name, "config.json", |c| c[key] = value.clone())?;
        assert!(e.contains(&want), "{key}: {e}");
    }
    // Without the key, `transformers` computes a window of 4096.
    let e = refused("mistral", "config.json", |c| {
        c.as_object_mut().expect("a dictionary").remove("sliding_window");
    })?;
    assert!(e.contains("`sliding_window` is missing, wanted null, since `transformers` computes"), "{e}");
    let e = refused("llama", "config.json", |c| c["architectures"] = json!(["A\u{1b}[31m\n"]))?;
    assert!(e.contains(r"class A\u{1b}[31m\n, wanted"), "{e}");
    // Qwen2.5 says how wide a window would be that it does not use.
    let dir = copy("qwen2")?;
    edit(&dir.path("config.json"), |c| {
        c["sliding_window"] = 32768.into();
        c["rope_scaling"] = json!({"type": "default"});
        c["colour"] = json!("red");
    })?;
    assert!(open_llm(&dir.path("")).is_ok());
    let e = refused("llama", "generation_config.json", |c| c["eos_token_id"] = json!("end"))?;
    assert!(e.contains("generation_config.json: `eos_token_id` is \"end\", wanted tokens below 272"), "{e}");
    Ok(())
}

#[test]
fn files_that_are_no_models() -> Outcome {
    let dir = copy("qwen2")?;
    let config = fs::read(dir.path("config.json"))?;
    let error = || open_llm(&dir.path("")).err().map_or(String::new(), |e| e.to_string());
    for (bytes, want) in [
        (&b"\xff\xfe{"[..], "config.json: is not a JSON dictionary ("),
        (&b"[1, 2]"[..], "config.json: is not a JSON dictionary (it is a list)"),
        (&config[..config.len() / 2], "config.json: is not a JSON dictionary (EOF"),
        (&[b'['; 100_000][..], "config.json: is not a JSON dictionary (recursion limit"),
        (&b"{\"hidden_size\": 1e999}"[..], "config.json: is not a JSON dictionary (number out of range"),
    ] {
        fs::write(dir.path("config.json"), bytes)?;
        assert!(error().contains(want), "{}", error());
    }
    // A file of 100 MB is not read.
    fs::File::create(dir.path("config.json"))?.set_len(100 << 20)?;
    let start = Instant::now();
    assert!(error().contains("config.json: has more than 4 MiB"), "{}", error());
    assert!(start.elapsed().as_secs() < 5);
    fs::remove_file(dir.path("config.json"))?;
    assert!(
        error().contains("has no config.json; name the folder of a model, or a GGUF file"),
        "{}",
        error()
    );
    fs::write(dir.path("config.json"), config)?;
    assert_eq!(error(), "");
    let e = open_llm(&dir.path("model.safetensors")).err().map_or(String::new(), |e| e.to_string());
    assert!(e.contains("is a file of safetensors, which does not say what model it holds"), "{e}");
    fs::write(dir.path("tokenizer.json"), "{}")?;
    assert!(error().contains("tokenizer.json: its text tokenizer is not a tokenizer.json"), "{}", error());
    fs::remove_file(dir.path("model.safetensors"))?;
    assert!(error().contains("has neither model.safetensors nor pytorch_model.bin"), "{}", error());
    assert!(open_llm(&dir.path("absent")).is_err());
    Ok(())
}

/// Rewrites a file of weights with changed tensors: name, shape, encoding, bytes.
fn rewrite(path: &Path, change: impl Fn(&mut Stored)) -> Outcome {
    let mut all = stored(&Selection::whole(Archive::open(path)?))?;
    change(&mut all);
    let tensor = |(name, dims, encoding, bytes): &(String, Vec<usize>, Encoding, Vec<u8>)| FileTensor {
        name: name.clone(),
        dims: dims.clone(),
        encoding: *encoding,
        bytes: Box::new({
            let bytes = bytes.clone();
            move || Ok(bytes.clone())
        }),
    };
    ett::files::replace(path, |file| {
        write_safetensors(file, all.iter().map(tensor).collect(), Default::default())
    })?;
    Ok(())
}

#[test]
fn weights_that_do_not_fit() -> Outcome {
    let find = |all: &Stored, name: &str| all.iter().position(|t| t.0 == name).expect("a tensor");
    let error = |name: &str, change: &dyn Fn(&mut Stored)| {
        let dir = copy(name)?;
        rewrite(&dir.path("model.safetensors"), change)?;
        Ok::<_, Failure>(open_llm(&dir.path("")).err().map_or(String::new(), |e| e.to_string()))
    };
    // All of them in one sentence.
    let e = error("llama", &|all| {
        let at = find(all, "model.layers.1.mlp.up_proj.weight");
        all.remove(at);
        let at = find(all, "model.norm.weight");
        all[at].1 = vec![4, 8];
        let at = find(all, "model.layers.0.self_attn.v_proj.weight");
        all[at].2 = Encoding::I32;
        all.push(("model.layers.0.self_attn.q_norm.weight".into(), vec![16], Encoding::F32, vec![0; 64]));
        all.push(("model.layers.0.self_attn.o_proj.bias".into(), vec![32], Encoding::F32, vec![0; 128]));
        all.push(("visual.weight".into(), vec![1], Encoding::F32, vec![0; 4]));
    })?;
    for part in [
        "does not fit its configuration: `model.norm.weight` is [4, 8], wanted [32]; ",
        "; missing `model.layers.1.mlp.up_proj.weight` [48, 32]; ",
        "; unknown `model.layers.0.self_attn.o_proj.bias` (ett computes no such bias); ",
        "; unknown `model.layers.0.self_attn.q_norm.weight` (ett computes no norm of queries and keys); ",
        "; unknown `visual.weight`",
        "`model.layers.0.self_attn.v_proj.weight` has type I32, wanted floats",
    ] {
        assert!(e.contains(part), "{e}");
    }
    // Tables that older versions stored are left out.
    let buffer = |all: &mut Stored| {
        all.push((
            "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
            vec![8],
            Encoding::F32,
            vec![0; 32],
        ));
    };
    assert_eq!(error("llama", &buffer)?, "");
    // The head of a tied model may only repeat the embedding.
    let repeat = |all: &mut Stored| {
        let mut head = all[find(all, "model.embed_tokens.weight")].clone();
        head.0 = "lm_head.weight".into();
        all.push(head);
    };
    assert_eq!(error("qwen2", &repeat)?, "");
    let e = error("qwen2", &|all| {
        repeat(all);
        all.last_mut().expect("a tensor").3[5] ^= 1;
    })?;
    assert!(
        e.contains("`lm_head.weight` is not `model.embed_tokens.weight`, though the configuration ties them"),
        "{e}"
    );
    // Values are looked at when they are loaded.
    let dir = copy("llama")?;
    rewrite(&dir.path("model.safetensors"), |all| {
        let at = find(all, "model.norm.weight");
        all[at].3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    })?;
    let e = model(&open_llm(&dir.path(""))?).err().map_or(String::new(), |e| e.to_string());
    assert!(e.contains("`model.norm.weight` has 1 of 32 values that are not finite"), "{e}");
    Ok(())
}

#[test]
fn shards_that_do_not_fit() -> Outcome {
    const INDEX: &str = "model.safetensors.index.json";
    let norm = "model.norm.weight";
    let e = refused("qwen2-untied", INDEX, |i| i["weight_map"][norm] = json!("../model.safetensors"))?;
    assert!(
        e.contains(
            "gives `model.norm.weight` the file \"../model.safetensors\", wanted the name of a file in this"
        ),
        "{e}"
    );
    for other in [json!("/etc/passwd"), json!(".."), json!(""), json!("a\\b"), json!(3)] {
        let e = refused("qwen2-untied", INDEX, |i| i["weight_map"][norm] = other.clone())?;
        assert!(e.contains("wanted the name of a file in this folder"), "{e}");
    }
    let e = refused("qwen2-untied", INDEX, |i| i["weight_map"][norm] = json!("absent.safetensors"))?;
    assert!(e.contains("names absent.safetensors, which is not in the folder; fetch it, too"), "{e}");
    let e = refused("qwen2-untied", INDEX, |i| i["weight_map"] = json!([1]))?;
    assert!(e.contains("`weight_map` is a list, wanted a dictionary"), "{e}");
    let e = refused("qwen2-untied", INDEX, |i| {
        let map = i["weight_map"].as_object_mut().expect("a dictionary");
        let here = map[norm].clone();
        let other = map.values().find(|file| **file != here).cloned().expect("another file");
        map.insert(norm.into(), other);
    })?;
    assert!(e.contains("does not fit the files that it names: `model.norm.weight` is not in model-"), "{e}");
    assert!(e.contains("has `model.norm.weight`, which the index does not place there"), "{e}");
    let dir = copy("qwen2-untied")?;
    let index: Value = serde_json::from_slice(&fs::read(dir.path(INDEX))?)?;
    let shard = dir.path(index["weight_map"][norm].as_str().ok_or("a file")?);
    let bytes = fs::read(&shard)?;
    fs::write(&shard, &bytes[..bytes.len() - 7])?;
    let e = open_llm(&dir.path("")).err().map_or(String::new(), |e| e.to_string());
    assert!(e.contains("not a complete safetensors file"), "{e}");
    Ok(())
}

/// Writes every model into the folder that `ETT_LLM_OUT` names, for `tests/oracle/llm.py --check`.
#[test]
#[ignore = "writes files for another program"]
fn written() -> Outcome {
    let out = PathBuf::from(std::env::var("ETT_LLM_OUT")?);
    for name in HUGGING_FACE.into_iter().chain(GGUF) {
        let of = open_llm(&source(name))?;
        write_llm(
            &out.join(name),
            &of.config,
            &of.weights,
            of.text.as_deref().map(str::as_bytes),
            &[],
            None,
        )?;
    }
    Ok(())
}

/// A real model. `ETT_SMOLLM2` names a folder with its GGUF file and what `tests/oracle/llm.py --smollm2` wrote
/// beside it.
#[test]
#[ignore = "needs a file of 98 MB"]
fn smollm2() -> Outcome {
    let dir = PathBuf::from(std::env::var("ETT_SMOLLM2")?);
    let file = fs::read_dir(&dir)?.map(|e| Ok(e?.path())).collect::<std::io::Result<Vec<_>>>()?;
    let file = file.into_iter().find(|p| p.extension().is_some_and(|e| e == "gguf")).ok_or("a GGUF file")?;
    let of = open_llm(&file)?;
    println!("{}: {:?}, {:#?}", of.architecture, of.config, of.notes);
    let want = read_file(&dir.join("expected.safetensors"))?;
    let t = tokenizer(of.text.as_deref().ok_or("a text tokenizer")?)?;
    let bytes: Vec<u8> = want["text"].values.iter().map(|&x| x as u8).collect();
    let (tokens, mut at, mut token) = (ints(&want["tokens"].values), 0, 0);
    let lengths = want["text.lengths"].values.iter().zip(&want["tokens.lengths"].values);
    for (&length, &count) in lengths.clone() {
        let text = std::str::from_utf8(&bytes[at..at + length as usize])?;
        let ids = t.encode(text)?;
        assert_eq!(ids, tokens[token..token + count as usize], "{text:?}");
        assert_eq!(t.decode(&ids), text);
        (at, token) = (at + length as usize, token + count as usize);
    }
    println!("{} texts with {} tokens are encoded the same", lengths.len(), tokens.len());
    let start = Instant::now();
    let worst = agrees(&of, &dir.join("expected.safetensors"))?;
    let next = ints(&want["next"].values);
    println!("logits differ by {worst:.1e} of the largest; {:?}; {:?}", t.decode(&next), start.elapsed());
    Ok(())
}

/// The rows of queries and keys are brought into Hugging Face's order.
#[test]
fn halves_of_heads() -> Outcome {
    let of = open_llm(&source("gguf-llama"))?;
    let archive = Archive::open(&source("gguf-llama"))?;
    let (got, stored) =
        (of.weights.read("model.layers.0.self_attn.k_proj.weight")?, archive.read("blk.0.attn_k.weight")?);
    let (rows, width) = (16, 64);
    for head in 0..2 {
        for row in 0..rows {
            let from = head * rows + row / (rows / 2) + row % (rows / 2) * 2;
            let to = head * rows + row;
            assert_eq!(got.values[to * width..][..width], stored.values[from * width..][..width]);
        }
    }
    Ok(())
}
