//! The CPU's workspaces: a launch allocates what the kernel's query returns, before anything is written.

use std::collections::BTreeSet;
use std::path::Path;

use ett::backend::{Access, Cpu, Device, Kernels, Plan, Precision, Target};
use ett::error::{Error, Result};

use super::case::{Arg, Case, Draw, Layout, round};
use super::place::{Placed, views};
use super::{Size, TABLE};
use crate::common::Outcome;

fn place(dev: &dyn Kernels, prec: Precision, args: &[Arg], layout: Layout) -> Result<Vec<Placed>> {
    args.iter().map(|a| Placed::new(dev, prec, a, layout)).collect()
}

/// Bytes of workspace of one call; also checks that the call fails cleanly if one byte is missing.
fn workspace(threads: usize, prec: Precision, case: &Case, args: &[Arg], layout: Layout) -> Result<u64> {
    // Poisoned: such a device refuses a kernel that uses more than its query returns, or far less.
    let dev = Cpu::poisoned(threads)?;
    let placed = place(&dev, prec, args, layout)?;
    let held = dev.memory().total();
    (case.call)(&dev, &views(&placed))?;
    let bytes = dev.memory().peak - held;
    assert_eq!(dev.memory().total(), held, "the workspace was given back");
    if bytes > 0 {
        placed.iter().try_for_each(|p| p.restore(&dev))?;
        dev.limit(held + bytes - 1);
        let e = (case.call)(&dev, &views(&placed)).expect_err("a byte is missing");
        assert!(matches!(&e, Error::OutOfMemory { role, .. } if role == "workspace"), "{e}");
        for p in &placed {
            p.untouched(&p.read(&dev)?).unwrap_or_else(|what| panic!("{}: {what}", case.what));
        }
        dev.limit(held + bytes);
        (case.call)(&dev, &views(&placed))?;
    }
    Ok(bytes)
}

/// All sources in a folder.
fn sources(folder: &Path) -> std::io::Result<String> {
    let mut all = String::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        all += &if path.is_dir() { sources(&path)? } else { std::fs::read_to_string(&path)? };
    }
    Ok(all)
}

#[test]
fn queries_of_the_cpu_are_what_its_kernels_take() -> Outcome {
    let oracle = Cpu::new(0)?;
    let mut with = BTreeSet::new();
    for prec in [Precision::F32, Precision::BF16] {
        for kernel in TABLE {
            for case in (kernel.cases)().iter().filter(|c| c.size <= Size::Tiny) {
                let mut args = (case.args)(&Draw::new(&oracle, prec, 1.0, &case.what));
                round(&mut args, prec);
                let odd = if kernel.flat_on_cpu { Layout::Shifted } else { Layout::Odd };
                for (threads, layout) in [(1, odd), (3, Layout::Dense), (8, odd)] {
                    let what = format!("{} in {}, {}, {layout}", kernel.name, prec.act, case.what);
                    let bytes = workspace(threads, prec, case, &args, layout)
                        .unwrap_or_else(|e| panic!("{what}, {threads} threads: {e}"));
                    if bytes > 0 {
                        with.insert(kernel.name);
                    }
                    let plan = Plan::of(Target::Cpu { threads });
                    (case.call)(&plan, &views(&place(&plan, prec, &args, layout)?))?;
                    let planned: Vec<u64> = plan.kernels().values().map(|k| k.workspace).collect();
                    assert_eq!(planned, [bytes], "{what}, {threads} threads");
                }
            }
        }
    }
    // A query of its own is for a kernel that takes a workspace in some case here; the others say `no_workspace!`.
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cpu"))?;
    for kernel in TABLE {
        let asks = sources.contains(&format!("fn {}_workspace(", kernel.name));
        assert_eq!(with.contains(kernel.name), asks, "{} takes workspace, or asks for it", kernel.name);
    }
    assert!(with.len() > 10, "{with:?}");
    Ok(())
}

/// Inputs only, because tensors of a plan hold no data.
#[test]
fn a_plan_follows_no_address() -> Result<()> {
    let oracle = Cpu::new(0)?;
    for kernel in TABLE {
        let case = (kernel.sample)();
        let mut args = (case.args)(&Draw::new(&oracle, Precision::F32, 1.0, &case.what));
        round(&mut args, Precision::F32);
        let plan = Plan::new();
        let placed = place(&plan, Precision::F32, &args, Layout::Dense)?;
        // The first addresses of a process are never mapped, so following one crashes.
        for p in placed.iter().filter(|p| p.access == Access::Read) {
            assert!((1..1 << 40).contains(&p.view().addr()), "`{}`", p.name);
        }
        (case.call)(&plan, &views(&placed))?;
    }
    Ok(())
}
