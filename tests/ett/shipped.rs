//! The model that comes with the repository.

use std::fs;
use std::path::{Path, PathBuf};

use ett::eval::evaluate_run;
use ett::infer::Trained;

use crate::common::{Outcome, Scratch, cpu};

fn folder() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).join("models/small")
}

/// The first pictures of its held-out set; its figures over the whole set are in records/.
#[test]
fn the_small_model_reads_and_draws_held_out_pictures() -> Outcome {
    let dir = Scratch::new();
    let bytes: u64 = fs::read_dir(folder())?.flatten().map(|f| f.metadata().map_or(0, |m| m.len())).sum();
    assert!(bytes < 4 << 20, "{bytes} bytes");
    let mut trained = Trained::open(&folder(), cpu(2), false)?;
    trained.model.cfg.data.eval_drawings = 32;
    let report = evaluate_run(&mut trained, None, Some(64), &dir.path("out"))?;
    let share = report.mse / report.mse_mean_image;
    assert!(share < 0.02, "reconstructions: {share} of the mean image's error");
    let words =
        report.types.iter().find(|t| t.question == "what does it say?").ok_or("words are asked for")?;
    assert!(words.accuracy.seen >= 0.75 && words.accuracy.other < 0.1, "{words:?}");
    for t in &report.types {
        assert!(t.accuracy.seen >= 0.75, "{t:?}");
    }
    let all = report.accuracy.ok_or("questions")?;
    assert!(all.seen >= 0.95, "answers: {all:?}");
    // 15 of 16 are right; rounding, and with it a choice of codes, may be another on this machine.
    let scenes = "colour, count and place";
    let scenes = report.drawings.iter().find(|d| d.aspect == scenes).ok_or("drawings are looked at")?;
    assert!(scenes.drawings == 16 && scenes.right.seen >= 0.75 && scenes.right.other < 0.25, "{scenes:?}");
    Ok(())
}
