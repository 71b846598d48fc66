//! A device that fails or runs out of memory in the middle of a run: the error says where and what to do, and the
//! checkpoint before it is whole.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ett::backend::*;
use ett::config::{Config, Recompute, StageConfig, StageKind};
use ett::error::{Error, Result};
use ett::eval::HeldOut;
use ett::ranks::Group;
use ett::train::{self, Finished, RunOptions, plan_stage};

use crate::common::{Outcome, Scratch, cpu};
use crate::run::{config, pictures};

/// A device on which one launch of a kernel fails.
struct Failing {
    inner: Arc<dyn Kernels>,
    kernel: &'static str,
    /// Launches of this kernel up to the one that fails.
    left: AtomicUsize,
}

impl Failing {
    fn launched(&self, kernel: &str) -> Result<()> {
        match kernel == self.kernel && self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            true => Err(Error::device("cuda:0", format!("{kernel} failed: an illegal memory access"))),
            false => Ok(()),
        }
    }
}

impl Device for Failing {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn id(&self) -> DeviceId {
        self.inner.id()
    }
    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        self.inner.alloc(role, bytes)
    }
    fn copy_in(&self, s: Stream, src: &[u8], dst: Out) -> Result<()> {
        self.inner.copy_in(s, src, dst)
    }
    fn copy(&self, s: Stream, src: In, dst: Out) -> Result<()> {
        self.inner.copy(s, src, dst)
    }
    fn read_later(&self, s: Stream, src: In) -> Result<Pending> {
        self.inner.read_later(s, src)
    }
    fn collectives(&self) -> &dyn Collectives {
        self.inner.collectives()
    }
    fn memory(&self) -> Memory {
        self.inner.memory()
    }
}

macro_rules! delegate {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => {
        impl Kernels for Failing {
            $(fn $name(&self, s: Stream, a: &$args<'_>) -> Result<()> {
                self.launched(stringify!($name))?;
                self.inner.$name(s, a)
            })*
        }
    };
}
ett::kernel_table!(delegate);

fn run(cfg: &Config, dev: Arc<dyn Kernels>, out: &Path) -> Result<Finished> {
    train::run(cfg, dev, &RunOptions::quiet(out, &HeldOut))
}

#[test]
fn a_failed_launch_names_stage_and_step_and_leaves_the_checkpoint_before_it() -> Outcome {
    let dir = Scratch::new();
    pictures(&dir.path("data"));
    let mut cfg = config(&dir.path("data"));
    (cfg.data.test, cfg.train.save_every) = (None, 2);
    cfg.stage = [StageKind::Tokenizer, StageKind::Semantic]
        .map(|kind| StageConfig { lr: Some(1e-3), ..StageConfig::new(kind, 5, 3) })
        .to_vec();
    let whole = dir.path("whole");
    run(&cfg, cpu(1), &whole)?;
    // One launch a step in the stage that reads text, but none in the other: the fourth step of the semantic stage.
    let (kernel, left) = ("linear_xent_fwd", AtomicUsize::new(4));
    let broken = dir.path("broken");
    let e = run(&cfg, Arc::new(Failing { inner: cpu(1), kernel, left }), &broken)
        .err()
        .ok_or("a launch failed")?
        .to_string();
    assert!(e.starts_with("stage semantic, step 3: cuda:0: linear_xent_fwd failed: an illegal"), "{e}");
    let last = broken.join("checkpoints/step-00000007");
    assert!(e.ends_with(&format!("the last checkpoint, {}, is complete", last.display())), "{e}");
    train::resume(&broken, cpu(1), true, &HeldOut, &Group::alone())?;
    let weights = |out: &Path| std::fs::read(out.join("model.safetensors"));
    assert!(weights(&broken)? == weights(&whole)?, "the bits of a run that was not interrupted");
    Ok(())
}

#[test]
fn a_failure_before_the_first_checkpoint_is_in_its_stage_too() -> Outcome {
    let dir = Scratch::new();
    pictures(&dir.path("data"));
    let mut cfg = config(&dir.path("data"));
    cfg.data.test = None;
    cfg.stage = vec![StageConfig::new(StageKind::Text, 2, 3)];
    let (kernel, left) = ("adamw", AtomicUsize::new(1));
    let e = run(&cfg, Arc::new(Failing { inner: cpu(1), kernel, left }), &dir.path("out"))
        .err()
        .ok_or("a launch failed")?
        .to_string();
    assert_eq!(e, "stage text, step 0: cuda:0: adamw failed: an illegal memory access");
    Ok(())
}

/// The message names the largest batch that fits, which then does.
#[test]
fn out_of_memory_names_the_batch_that_fits() -> Outcome {
    let dir = Scratch::new();
    pictures(&dir.path("data"));
    let mut cfg = config(&dir.path("data"));
    (cfg.data.test, cfg.data.text_tokens, cfg.train.threads) = (None, 18, 2);
    let stage = |batch| StageConfig { lr: Some(1e-4), ..StageConfig::new(StageKind::Semantic, 2, batch) };
    let target = Target::Cpu { threads: 2 };
    let peak =
        |cfg: &Config, batch| -> Result<u64> { Ok(plan_stage(cfg, &stage(batch), target)?.memory.peak) };
    cfg.train.recompute = Recompute::None;
    // Five and a bit, with what is kept free.
    let memory = (peak(&cfg, 5)? + 1000) / 19 * 20;
    assert!(memory < peak(&cfg, 6)?, "the sixth does not fit into what is kept free");
    let limited = |cfg: &Config, out: &str| {
        let dev = Arc::new(Cpu::poisoned(2)?);
        dev.limit(memory);
        run(cfg, dev, &dir.path(out))
    };
    cfg.stage = vec![stage(7)];
    let e = limited(&cfg, "large").err().ok_or("more than there is")?.to_string();
    for part in [
        "stage semantic, step 0: out of memory on cpu: ",
        " memory requested, ",
        "hold a batch of up to 5 in",
    ] {
        assert!(e.contains(part), "{part}: {e}");
    }
    let more =
        e.split("or of ").nth(1).and_then(|t| t.split_once(" with train.recompute = \"")).ok_or(&*e)?;
    let more: usize = more.0.parse()?;
    assert!(more > 5, "{e}");
    cfg.stage = vec![stage(5)];
    limited(&cfg, "fits")?;
    cfg.train.recompute = Recompute::Blocks;
    cfg.stage = vec![stage(more)];
    limited(&cfg, "recomputed")?;
    // Weights, gradients and moments alone are too much.
    cfg.stage = vec![stage(1)];
    let dev = Arc::new(Cpu::poisoned(2)?);
    let weights = plan_stage(&cfg, &stage(1), target)?.memory.live[Role::Weight as usize];
    dev.limit(weights + weights / 2);
    let e = run(&cfg, dev, &dir.path("none")).err().ok_or("more than there is")?.to_string();
    assert!(e.starts_with("stage semantic: out of memory") && e.contains("not even a batch of 1"), "{e}");
    Ok(())
}
