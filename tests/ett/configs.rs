//! The configurations in the repository, and the errors of wrong ones.

use std::path::{Path, PathBuf};

use ett::backend::Target;
use ett::config::{Config, StageConfig, StageKind};
use ett::error::Result;
use ett::train::plan_stage;

use crate::common::{Outcome, Scratch};

fn configs() -> Vec<PathBuf> {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    let folder = Path::new(&package).join("configs");
    let files = std::fs::read_dir(&folder).expect("the folder is there").flatten().map(|e| e.path());
    files.filter(|p| p.extension().is_some_and(|e| e == "toml")).collect()
}

#[test]
fn every_stage_of_every_configuration_can_be_planned() -> Outcome {
    let all = configs();
    assert!(all.len() >= 4, "{all:?}");
    for path in all {
        let cfg = Config::load(&path, &[])?;
        assert!(!cfg.stage.is_empty(), "{}", path.display());
        for stage in &cfg.stage {
            let one = StageConfig { batch: 1, accumulate: 1, ..stage.clone() };
            let p = plan_stage(&cfg, &one, Target::Cpu { threads: 2 })?;
            assert!(p.flop > 0 && p.launches > 0, "{} {:?}", path.display(), stage.kind);
        }
    }
    Ok(())
}

#[test]
fn the_demo_has_every_stage() -> Outcome {
    let kinds: Vec<StageKind> = Config::demo()?.stage.iter().map(|s| s.kind).collect();
    let want = [
        StageKind::Tokenizer,
        StageKind::Text,
        StageKind::Align,
        StageKind::Semantic,
        StageKind::Chat,
        StageKind::Gen,
    ];
    assert_eq!(kinds, want);
    Ok(())
}

fn load(text: &str) -> Result<Config> {
    let dir = Scratch::new();
    let path = dir.path("c.toml");
    std::fs::write(&path, text).expect("a file");
    Config::load(&path, &[])
}

#[test]
fn wrong_values_name_key_value_and_what_is_allowed() {
    let stage = |rest: &str| format!("[[stage]]\nkind = \"chat\"\nsteps = 1\nbatch = 6\n{rest}\n");
    for (text, parts) in [
        (stage("accumulate = 4"), ["stage.0.accumulate", "4", "divisor of the batch of 6"]),
        (stage("accumulate = 0"), ["stage.0.accumulate", "0", "1 to "]),
        (stage("captions = 1.5"), ["stage.0.captions", "1.5", "0 to 1"]),
        (stage("groups = { llm = { lr = -1.0 } }"), ["stage.0.groups.llm.lr", "-1", "from 0 to"]),
        (stage("groups = { llm = { betas = [0.9, 1.0] } }"), ["stage.0.groups.llm.betas", "1.0", "below 1"]),
        (stage("kind2 = 1"), ["kind2", "unknown field", "accumulate"]),
        (stage("").replace("chat", "gen"), ["visual_head.kind", "none", "tied or linear"]),
        (stage("").replace("chat", "walk"), ["walk", "unknown variant", "tokenizer"]),
        ("[train]\nprompt_dropout = 2.0\n".into(), ["train.prompt_dropout", "2", "0 to 1"]),
        ("[sampling]\ntop_p = 0.0\n".into(), ["sampling.top_p", "0.0", "above 0, at most 1"]),
        ("[sampling]\ntop_p = 1.5\n".into(), ["sampling.top_p", "1.5", "above 0, at most 1"]),
        ("[sampling]\ntemperature = -1\n".into(), ["sampling.temperature", "-1.0", "from 0 to"]),
        ("[sampling]\nguidance = nan\n".into(), ["sampling.guidance", "NaN", "from -1e9 to 1e9"]),
        ("[sampling]\ntop_k = -1\n".into(), ["line 2", "-1", "usize"]),
        ("[sampling]\nseed = 1\n".into(), ["seed", "unknown field", "guidance"]),
        ("[train]\nkeep = 0\n".into(), ["train.keep", "0", "1 to "]),
        ("[train]\nkept = 3\n".into(), ["kept", "unknown field", "save_every"]),
        ("[train\n".into(), ["c.toml", "line 1", "TOML"]),
    ] {
        let e = load(&text).expect_err(&text).to_string();
        assert!(parts.iter().all(|p| e.contains(p)), "{text}: {e}");
    }
}
