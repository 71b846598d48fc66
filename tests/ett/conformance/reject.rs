//! The errors of kernels for arguments that violate the contract: every argument of a small valid call is damaged in
//! every way, and each time the device has to name it and write nothing.

use std::sync::Arc;

use ett::backend::spec::{self, Elements, Expr, KernelSpec, Kind, TensorSpec};
use ett::backend::{Buffer, Cpu, DType, Dims, Extent, In, Kernels, Precision, Reclaim, Role};
use ett::error::{Error, Result};

use super::case::{Arg, Draw, Layout, Type, Views, round};
use super::place::{Placed, views};
use super::{Kernel, Report, TABLE};

/// Memory that does not exist.
struct Nowhere;

impl Reclaim for Nowhere {
    unsafe fn reclaim(&self, _addr: u64, _bytes: usize, _role: Role) {}
}

/// The damage of an argument.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Damage {
    Null,
    /// Begins at the end of its buffer.
    Outside,
    /// Begins inside an element.
    Misaligned,
    /// Rows overlap.
    Overlapping,
    /// Twice 2^63 more rows, which overflows to a valid size.
    Wrapping,
    /// Rows so far apart that their distance in bytes overflows.
    Far,
    Type(DType),
    /// One row, or one column, less.
    Rows,
    Cols,
}

impl Damage {
    fn text(self) -> String {
        match self {
            Damage::Null => "without memory".into(),
            Damage::Outside => "outside of its buffer".into(),
            Damage::Misaligned => "inside an element".into(),
            Damage::Overlapping => "with overlapping rows".into(),
            Damage::Wrapping => "with 2^64 rows more".into(),
            Damage::Far => "with rows far apart".into(),
            Damage::Type(t) => format!("as {t}"),
            Damage::Rows => "with a row less".into(),
            Damage::Cols => "with a column less".into(),
        }
    }

    /// All kinds of damage that make this argument invalid by the table of kernels: the rest of the call determines the
    /// size or the type that is changed.
    fn all(spec: &KernelSpec, args: &[Arg], arg: &Arg, p: Precision) -> Vec<Damage> {
        let dtype = arg.ty.of(p);
        let types = match dtype {
            DType::I32 => vec![DType::F32, DType::U8],
            DType::F32 => vec![DType::I32, DType::Bf16],
            _ => vec![DType::I32, DType::F32],
        };
        let mut all = vec![Damage::Null, Damage::Outside];
        all.extend((dtype.size() > 1).then_some(Damage::Misaligned));
        all.extend(types.into_iter().filter(|t| is_wrong_type(spec, args, arg, *t)).map(Damage::Type));
        let sizes = tensor(spec, arg.name).sizes();
        if arg.dims.rank() > 1 {
            all.extend([Damage::Overlapping, Damage::Wrapping, Damage::Far]);
            let leading = &sizes[..sizes.len() - 1];
            all.extend(leading.iter().any(|e| is_bound(spec, args, arg, e)).then_some(Damage::Rows));
        }
        all.extend(is_bound(spec, args, arg, &sizes[sizes.len() - 1]).then_some(Damage::Cols));
        all
    }

    fn apply<'a>(self, v: In<'a>, nowhere: &'a Buffer) -> In<'a> {
        let (mut buf, mut off) = (v.buffer(), v.addr() - v.buffer().addr());
        let Extent { mut dtype, mut dims, mut ld } = *v;
        let (rows, cols) = (dims.rows(), dims.cols());
        match self {
            Damage::Null => (buf, off) = (nowhere, 0),
            Damage::Outside => off = buf.bytes() as u64,
            Damage::Misaligned => off += 1,
            Damage::Overlapping => ld = cols as i64 - 1,
            Damage::Wrapping => dims = [(1 << 63) + rows, 2, cols].into(),
            Damage::Far => ld = i64::MAX / 2,
            Damage::Type(t) => dtype = t,
            Damage::Rows => dims = [rows - 1, cols].into(),
            Damage::Cols if dims.rank() == 1 => dims = [cols - 1].into(),
            Damage::Cols => dims = [rows, cols - 1].into(),
        }
        // SAFETY: devices check views themselves, which this tests and conformance requires of every device.
        unsafe { In::unchecked(buf, off, dtype, dims, ld) }
    }

    /// Whether the C query, which does not know the buffers, has to answer -1.
    fn is_seen_by_queries(self, spec: &KernelSpec, arg: &Arg) -> bool {
        match self {
            Damage::Outside => false,
            // A null pointer means that an optional argument is absent.
            Damage::Null => {
                let kind = spec.field(arg.name).map(|f| f.kind);
                !matches!(kind, Some(Kind::Tensor { optional: true, .. }))
            }
            _ => true,
        }
    }

    /// Whether an error about `blamed` explains this damage of `arg`: if two arguments do not fit each other, either
    /// may be named.
    fn explains(self, spec: &KernelSpec, args: &[Arg], arg: &Arg, blamed: &str) -> bool {
        let Some(other) = args.iter().find(|a| a.name == blamed) else {
            // Not a tensor: a count that does not fit the shapes.
            return matches!(self, Damage::Rows | Damage::Cols) && spec.field(blamed).is_some();
        };
        let shared = |dims: Dims| dims.as_slice().iter().any(|n| arg.dims.as_slice().contains(n));
        blamed == arg.name
            || match self {
                Damage::Rows | Damage::Cols => shared(other.dims) || other.ty == Type::Is(DType::I32),
                Damage::Type(_) => other.ty == arg.ty || matches!(arg.ty, Type::Acc) && other.ty == Type::Act,
                _ => false,
            }
    }
}

/// What the table says of a tensor.
fn tensor(spec: &KernelSpec, name: &str) -> &'static TensorSpec {
    let field = spec.field(name).unwrap_or_else(|| panic!("{} has no `{name}`", spec.name));
    field.tensor.as_ref().unwrap_or_else(|| panic!("`{name}` of {} is no tensor", spec.name))
}

/// Whether the rest of the call says what this size of `arg` is: it is a number, or made of a count or of a letter that
/// another argument has too.
fn is_bound(spec: &KernelSpec, args: &[Arg], arg: &Arg, size: &Expr) -> bool {
    let elsewhere = |symbol: u8| {
        let others = args.iter().filter(|a| a.name != arg.name);
        let mut sizes = others.flat_map(|a| tensor(spec, a.name).sizes());
        spec.field(spec.symbols[symbol as usize]).is_some() || sizes.any(|e| e.symbols().any(|s| s == symbol))
    };
    size.symbols().next().is_none() || size.symbols().any(elsewhere)
}

/// Whether `arg` cannot be of this type in this call.
fn is_wrong_type(spec: &KernelSpec, args: &[Arg], arg: &Arg, t: DType) -> bool {
    let others = |elements: Elements| {
        args.iter().any(|a| a.name != arg.name && tensor(spec, a.name).elements == elements)
    };
    // The types of activations that go with sums in f32.
    let narrow = matches!(t, DType::F32 | DType::Bf16);
    match tensor(spec, arg.name).elements {
        Elements::Any => false,
        Elements::Float => t == DType::I32,
        Elements::Act => !narrow || others(Elements::Act),
        // One of the two is f32 in any case, and the other one is tried in bf16 only.
        Elements::ActOrAcc => !narrow || (!others(Elements::Act) && args.iter().any(|a| like(spec, a, arg))),
        Elements::Acc | Elements::I32 | Elements::U8 | Elements::Like(_) => true,
    }
}

/// Whether the type of `a` is that of `arg` by the table.
fn like(spec: &KernelSpec, a: &Arg, arg: &Arg) -> bool {
    matches!(tensor(spec, a.name).elements, Elements::Like(i) if spec.fields[i as usize].name == arg.name)
}

/// Damages the arguments of every kernel of the table, or of those in `only`.
pub fn run(dev: &dyn Kernels, prec: Precision, only: Option<&[&str]>) -> Report {
    run_asking(dev, prec, only, None)
}

/// The same; `query` tells what the C query of the last call's kernel answered.
pub fn run_asking(
    dev: &dyn Kernels,
    prec: Precision,
    only: Option<&[&str]>,
    query: Option<&dyn Fn() -> i64>,
) -> Report {
    let mut report = Report::new(dev);
    for kernel in TABLE.iter().filter(|k| only.is_none_or(|names| names.contains(&k.name))) {
        if let Err(e) = spoil(dev, prec, kernel, query, &mut report) {
            let what = format!("{} in {}", kernel.name, prec.act);
            if !report.unsupported(kernel.name, &e) {
                report.failures.push(format!("{what}: the call that is right was refused: {e}"));
            }
        }
    }
    report
}

fn spoil(
    dev: &dyn Kernels,
    prec: Precision,
    kernel: &Kernel,
    query: Option<&dyn Fn() -> i64>,
    report: &mut Report,
) -> Result<()> {
    let case = (kernel.sample)();
    let oracle = Cpu::new(1)?;
    let mut args = (case.args)(&Draw::new(&oracle, prec, 1.0, kernel.name));
    round(&mut args, prec);
    let placed: Vec<Placed> =
        args.iter().map(|a| Placed::new(dev, prec, a, Layout::Dense)).collect::<Result<_>>()?;
    (case.call)(dev, &views(&placed))?;
    if let Some(answer) = query.map(|query| query()).filter(|&answer| answer < 0) {
        let what = format!("{} in {}", kernel.name, prec.act);
        report.failures.push(format!("{what}: the query says {answer} of arguments that are right"));
    }
    let restore = || placed.iter().try_for_each(|p| p.restore(dev));
    restore()?;
    // SAFETY: the buffer has no bytes.
    let nowhere = unsafe { Buffer::new(0, 0, Role::Input, dev.id(), Arc::new(Nowhere)) };
    let spec = spec::kernel(kernel.name).expect("a kernel of the contract");
    for (i, arg) in args.iter().enumerate() {
        for damage in Damage::all(spec, &args, arg, prec) {
            let mut all = views(&placed).all;
            all[i].1 = damage.apply(all[i].1, &nowhere);
            let what = format!("{} in {}: `{}` {}", kernel.name, prec.act, arg.name, damage.text());
            report.supported(kernel.name);
            let outcome = (case.call)(dev, &Views { all });
            if let Some(answer) = query.filter(|_| damage.is_seen_by_queries(spec, arg)).map(|query| query())
                && answer != -1
            {
                report.failures.push(format!("{what}: the query says {answer}, wanted -1"));
            }
            match outcome {
                Ok(()) => {
                    report.failures.push(format!("{what} was accepted"));
                    restore()?;
                }
                Err(Error::Argument { op, arg: blamed, .. })
                    if op == kernel.name && damage.explains(spec, &args, arg, blamed) => {}
                Err(e) => report.failures.push(format!("{what}: the error names something else: {e}")),
            }
        }
    }
    for p in &placed {
        if let Err(e) = p.untouched(&p.read(dev)?) {
            report.failures.push(format!("{} in {}: refused, but {e}", kernel.name, prec.act));
        }
    }
    Ok(())
}

#[test]
fn cpu() {
    let dev = Cpu::poisoned(1).expect("a thread can be started");
    for prec in [Precision::F32, Precision::BF16] {
        run(&dev, prec, None).expect(&[]);
    }
}

#[test]
fn samples_have_another_number_for_each_letter() {
    let oracle = Cpu::new(1).expect("a thread can be started");
    for kernel in TABLE {
        let args = ((kernel.sample)().args)(&Draw::new(&oracle, Precision::F32, 1.0, kernel.name));
        for a in &args {
            let mut dims = a.dims.as_slice().to_vec();
            if kernel.name.starts_with("upsample2x_weights") {
                dims.remove(1); // these taps are numbers, as many one way as the other
            }
            let letters = dims.len();
            dims.sort();
            dims.dedup();
            assert_eq!(dims.len(), letters, "{}: `{}` is {}", kernel.name, a.name, a.dims);
        }
    }
}
