//! The table of supported weights in docs/weights.md is true.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use ett::exchange::{Foreign, inception_shapes, recognise};
use ett::files::replace;
use ett::formats::{Encoding, FileTensor, Tree, write_torch};

use crate::common::{Outcome, Scratch, fixtures};

/// The cells of the rows of the table with the columns "weights" and "example".
fn rows() -> Result<Vec<Vec<String>>, Box<dyn std::error::Error>> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/weights.md"))?;
    let rows = text.lines().skip_while(|l| !l.starts_with("| weights |")).skip(2);
    let cells = |row: &str| row.trim_matches('|').split('|').map(|c| c.trim().to_string()).collect();
    Ok(rows.take_while(|l| l.starts_with('|')).map(cells).collect())
}

/// The names in backticks.
fn named(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(String::from).collect()
}

/// The language models and tokenizers among the fixtures.
fn examples() -> Result<BTreeSet<String>, Box<dyn std::error::Error>> {
    let mut all = BTreeSet::new();
    for group in ["ibq", "llm"] {
        for entry in fs::read_dir(fixtures().join(group))? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                all.insert(format!("{group}/{}", entry.file_name().to_string_lossy()));
            }
        }
    }
    Ok(all)
}

/// A file of FID's Inception network, which is too large for a fixture.
fn inception(path: &Path) -> Outcome {
    let zeros = |(name, dims): (String, Vec<usize>)| {
        let bytes = vec![0; 2 * dims.iter().product::<usize>()];
        let bytes = Box::new(move || Ok(bytes.clone()));
        (name.clone(), Tree::Tensor(FileTensor { name, dims, encoding: Encoding::F16, bytes }))
    };
    let all = inception_shapes().into_iter().map(zeros).collect();
    replace(path, |file| write_torch(file, Tree::Dict(all)))?;
    Ok(())
}

#[test]
fn every_row_is_read_and_written_as_it_says() -> Outcome {
    let rows = rows()?;
    let mut shown = BTreeSet::new();
    for row in &rows {
        let [weights, becomes, _files, key, example] = &row[..] else { panic!("{row:?}") };
        let (names, dir) = (named(example), Scratch::new());
        shown.extend(names.iter().map(|n| n.split('/').take(2).collect::<Vec<_>>().join("/")));
        let mut paths: Vec<PathBuf> = names.iter().map(|n| fixtures().join(n)).collect();
        if names.is_empty() {
            assert_eq!(becomes, "the Inception network of FID");
            paths.push(dir.path("inception.pth"));
            inception(&paths[0])?;
        }
        let foreign = recognise(&paths)?;
        assert!(foreign.becomes().starts_with(becomes.as_str()), "{weights}: {}", foreign.becomes());
        let out = dir.path(if matches!(foreign, Foreign::Llm(_)) { "model" } else { "model.safetensors" });
        let (written, _) = foreign.write(&out, None)?;
        assert_eq!(named(key).first().map(String::as_str), written, "{weights}");
        // Mistral's block is Llama's, by which name it is written.
        let sizes = |foreign: &Foreign| {
            let text = foreign.becomes();
            let first = text.lines().next().unwrap_or_default();
            first.split_once("): ").map_or(first, |(_, sizes)| sizes).to_string()
        };
        assert_eq!(sizes(&recognise(&[out])?), sizes(&foreign), "{weights}");
    }
    let missing: Vec<_> = examples()?.difference(&shown).cloned().collect();
    assert!(missing.is_empty(), "docs/weights.md lacks {missing:?}");
    Ok(())
}
