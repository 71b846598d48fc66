//! Files of another version: older ones are read, newer ones are refused in a sentence that names the versions.

use std::fs;
use std::path::Path;

use ett::config::{Config, Recompute};
use ett::error::Error;
use ett::formats::Encoding;
use ett::io::weights::{TensorFile, write_file};
use ett::io::{History, Skill, config_text, inspect, load_weights, save_weights, save_weights_of};
use ett::model::Ett;
use ett::nn::Stored;

use serde_json::{Value, json};

use crate::common::{Outcome, Scratch, cpu};
use crate::training::small;

const NEWER: &str = "has the format 2, but this program reads the format 1; use a newer version of ett";

fn load(text: &str, set: &[&str]) -> ett::error::Result<Config> {
    let dir = Scratch::new();
    let path = dir.path("c.toml");
    fs::write(&path, text).expect("a file");
    Config::load(&path, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>())
}

#[test]
fn configurations_of_another_version() -> Outcome {
    // A run's own file says its version; a user's need not.
    let text = config_text(&Config::default())?;
    assert!(text.starts_with("format = 1\n"), "{text}");
    assert_eq!((load(&text, &[])?, load("", &[])?), (Config::default(), Config::default()));
    // The version is the reason, not what is new about the file.
    let e = load("format = 2\n[data]\nfolders = 3\n", &[]).expect_err("a newer file");
    assert!(matches!(e, Error::Format { .. }) && e.to_string().ends_with(&format!("c.toml: {NEWER}")), "{e}");
    let e = load("format = -1\n", &[]).expect_err("no version").to_string();
    assert!(e.contains("TOML line 1, `format = -1`"), "{e}");
    let e = load("", &["format=2"]).expect_err("not a version of this program").to_string();
    assert!(e.contains("`format` is 2, wanted 1"), "{e}");

    // Before there were versions.
    for (old, new) in [("true", Recompute::Blocks), ("false", Recompute::None)] {
        let text = format!("[train]\nrecompute = {old}\n");
        assert_eq!(load(&text, &[])?.train.recompute, new);
        assert_eq!(load(&text, &["train.recompute=cheap"])?.train.recompute, Recompute::Cheap);
        let e = load(&format!("format = 1\n{text}"), &[]).expect_err("no value of version 1").to_string();
        assert!(e.contains("TOML line 3"), "{e}");
    }
    Ok(())
}

/// Changes the header of a file and its values.
fn edit(path: &Path, change: impl FnOnce(&mut Value, &mut Vec<u8>) -> Outcome) -> Outcome {
    let bytes = fs::read(path)?;
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into()?) as usize;
    let (mut header, mut values) = (serde_json::from_slice(&bytes[8..end])?, bytes[end..].to_vec());
    change(&mut header, &mut values)?;
    let header = header.to_string().into_bytes();
    let length = (header.len() as u64).to_le_bytes();
    Ok(fs::write(path, [&length[..], &header, &values].concat())?)
}

/// Changes the text of the note in the header of a file.
fn annotate(path: &Path, change: impl Fn(&mut Value)) -> Outcome {
    edit(path, |header, _| {
        let note = header["__metadata__"]["ett"].as_str().ok_or("a note")?;
        let mut note: Value = serde_json::from_str(note)?;
        change(&mut note);
        header["__metadata__"]["ett"] = note.to_string().into();
        Ok(())
    })
}

#[test]
fn weights_of_another_version() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("model.safetensors");
    let model = Ett::new(&small("f32"), cpu(1))?;
    let history = History { learnt: [Skill::Caption].into(), unknown: false, text: "bytes".into() };
    save_weights_of(&model.params, &path, Stored::Master, &history)?;
    annotate(&path, |note| assert_eq!(note["format"], 1))?;
    load_weights(&model.params, &path)?;
    // Before there were versions.
    annotate(&path, |note| {
        note.as_object_mut().expect("a note").remove("format");
    })?;
    load_weights(&model.params, &path)?;
    assert_eq!(History::of(&TensorFile::open(&path)?), Some(history));
    // A newer one may say other things, too.
    annotate(&path, |note| {
        note["format"] = 2.into();
        note["learnt"] = "much".into();
    })?;
    let e = load_weights(&model.params, &path).expect_err("a newer file");
    assert_eq!(e.to_string(), format!("{}: {NEWER}", path.display()));
    Ok(())
}

#[test]
fn what_a_file_says_is_shown_without_control_of_the_terminal() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("model.safetensors");
    let model = Ett::new(&small("f32"), cpu(1))?;
    save_weights_of(&model.params, &path, Stored::Master, &History::default())?;
    annotate(&path, |note| note["without"] = json!(["\u{1b}[31mred\n", "x".repeat(1 << 20)]))?;
    let text = inspect(&path, false)?;
    assert!(text.contains(r"training needs: \u{1b}[31mred\n, xxx") && text.len() < 4000, "{text}");
    Ok(())
}

/// A type that is not read hides no other tensor, and is refused where a weight is wanted.
#[test]
fn weights_of_a_type_that_is_not_read() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("model.safetensors");
    let model = Ett::new(&small("f32"), cpu(1))?;
    save_weights(&model.params, &path, Stored::Master)?;
    let mut last = String::new();
    edit(&path, |header, values| {
        let end = values.len();
        let all = header.as_object_mut().ok_or("a dictionary")?;
        let (name, entry) = all.iter_mut().find(|(_, e)| e["data_offsets"][1] == end).ok_or("a tensor")?;
        let start = entry["data_offsets"][0].as_u64().ok_or("a number")? as usize;
        values.truncate(start + (end - start) / 4);
        (entry["dtype"], entry["data_offsets"][1]) = ("F8_E4M3".into(), values.len().into());
        last = name.clone();
        Ok(())
    })?;
    let text = inspect(&path, true)?;
    assert!(text.contains(&last) && text.contains("1 F8_E4M3"), "{text}");
    let e = load_weights(&model.params, &path).expect_err("no floats").to_string();
    assert!(e.ends_with(&format!("does not fit the model: `{last}` has type F8_E4M3, wanted floats")), "{e}");
    Ok(())
}

/// A file in f64 fits a model in f32 as far as its values do.
#[test]
fn weights_in_f64_are_rounded_or_refused() -> Outcome {
    let dir = Scratch::new();
    let path = dir.path("model.safetensors");
    let model = Ett::new(&small("f32"), cpu(1))?;
    let mut all = Vec::new();
    for (name, ..) in model.params.names() {
        let t = model.params.read(name, Stored::Master)?.ok_or("a weight")?;
        all.push((name.to_string(), t, Encoding::F64));
    }
    write_file(&path, &all)?;
    load_weights(&model.params, &path)?;
    let first = all[0].0.clone();
    assert_eq!(model.params.read(&first, Stored::Master)?.as_ref(), Some(&all[0].1));
    all[0].1.values[0] = 1e39;
    write_file(&path, &all)?;
    let e = load_weights(&model.params, &path).expect_err("too large").to_string();
    assert!(e.contains(&format!("`{first}` has 1 of ")) && e.ends_with("values that are not finite"), "{e}");
    Ok(())
}
