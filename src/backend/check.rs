//! The checks of arguments against the table of kernels, which every device makes before anything else in a call. Views
//! must belong to the device and lie inside their buffers; required tensors must be present; numbers, element types and
//! shapes must satisfy the rules of [`super::spec`]; outputs must not overlap other arguments. The first violation is
//! returned as the error.

use std::fmt::Write;

use super::spec::{
    Elements, Expr, FieldSpec, KernelSpec, Needs, Presence, Relation, Rule, SYMBOLS, Shape, TensorSpec,
};
use super::{Access, Args, DType, DeviceId, Dims, In, Value};
use crate::error::{Error, Result};

/// Checks a call for a device.
pub(crate) fn call(device: DeviceId, a: &dyn Args) -> Result<()> {
    let spec = a.spec();
    a.with_values(&mut |values| Call { spec, values, sizes: [None; SYMBOLS] }.check(device))
}

/// Checks only the memory of a call: that views belong to the device and lie inside their buffers, and that outputs do
/// not overlap other arguments.
pub(crate) fn memory(device: DeviceId, a: &dyn Args) -> Result<()> {
    let spec = a.spec();
    a.with_values(&mut |values| {
        let call = Call { spec, values, sizes: [None; SYMBOLS] };
        call.views(device)?;
        call.aliases()
    })
}

/// Checks that a view belongs to a device and lies inside its buffer, so that its address can be dereferenced.
pub(crate) fn view(device: DeviceId, op: &'static str, arg: &'static str, v: &In) -> Result<()> {
    if v.buffer().device() != device {
        let want = "memory of the device that runs the call; copy the tensor through the host";
        return Err(Error::arg(op, arg, "memory of another device", want));
    }
    extent(op, arg, v)
}

/// Checks that a view lies inside its buffer, starts at a multiple of the element size, and has rows that do not
/// overlap.
pub(crate) fn extent(op: &'static str, arg: &'static str, v: &In) -> Result<()> {
    let text = || format!("{} {}", v.dims, v.dtype);
    if v.dims.bytes(v.dtype).is_none() {
        return Err(Error::arg(op, arg, text(), "fewer elements, so that they can be addressed"));
    }
    let size = v.dtype.size() as u64;
    if !v.off.is_multiple_of(size) {
        let want = format!("at a multiple of {size} bytes");
        return Err(Error::arg(op, arg, format!("at byte {}", v.off), want));
    }
    let (rows, cols) = (v.dims.rows() as u64, v.dims.cols() as u64);
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    if v.ld < cols as i64 && rows > 1 {
        return Err(Error::arg(op, arg, format!("row stride {}", v.ld), format!("at least {cols}")));
    }
    // The stride of a single row is not used.
    let ld = if rows > 1 { v.ld as u64 } else { 0 };
    let elements = (rows - 1).checked_mul(ld).and_then(|n| n.checked_add(cols));
    let end = elements.and_then(|n| n.checked_mul(size)).and_then(|n| n.checked_add(v.off));
    if end.is_none_or(|end| end > v.buf.bytes as u64) {
        let at = end.map_or("beyond the address range".into(), |end| format!("at byte {end}"));
        let want = format!("inside its buffer of {} bytes", v.buf.bytes);
        return Err(Error::arg(op, arg, format!("{} ending {at}", text()), want));
    }
    Ok(())
}

/// Checks that an output does not overlap an input.
pub(crate) fn apart(op: &'static str, input: (&'static str, &In), output: (&'static str, &In)) -> Result<()> {
    match overlap(input.1, output.1) {
        true => Err(overlapping(op, output.0, input.0, "")),
        false => Ok(()),
    }
}

fn overlapping(op: &'static str, arg: &'static str, other: &str, but: &str) -> Error {
    Error::arg(op, arg, format!("memory shared with `{other}`"), format!("memory of its own{but}"))
}

/// A call, and the values of its symbols so far.
struct Call<'c> {
    spec: &'static KernelSpec,
    values: &'c [Value<'c>],
    sizes: [Option<usize>; SYMBOLS],
}

impl<'c> Call<'c> {
    fn check(&mut self, device: DeviceId) -> Result<()> {
        self.views(device)?;
        self.presence()?;
        self.numbers()?;
        self.elements()?;
        self.shapes()?;
        self.aliases()
    }

    fn views(&self, device: DeviceId) -> Result<()> {
        self.tensors().try_for_each(|(field, v)| view(device, self.spec.name, field.name, v))
    }

    /// Every argument with its rules.
    fn fields(&self) -> impl Iterator<Item = (&'static FieldSpec, Value<'c>)> + use<'c> {
        self.spec.fields.iter().zip(self.values.iter().copied())
    }

    /// The tensors that are present.
    fn tensors(&self) -> impl Iterator<Item = (&'static FieldSpec, &'c In<'c>)> + use<'c> {
        self.fields().filter_map(|(field, value)| match value {
            Value::Tensor(_, v) => Some((field, v)),
            _ => None,
        })
    }

    fn specs(&self) -> impl Iterator<Item = (&'static FieldSpec, &'static TensorSpec, &'c In<'c>)> + use<'c> {
        self.tensors().filter_map(|(field, v)| field.tensor.as_ref().map(|t| (field, t, v)))
    }

    fn error(&self, field: &FieldSpec, got: impl ToString, want: impl ToString) -> Error {
        Error::arg(self.spec.name, field.name, got, want)
    }

    fn is_there(&self, place: u8) -> bool {
        !matches!(self.values[place as usize], Value::Absent)
    }

    fn name(&self, place: u8) -> &'static str {
        self.spec.fields[place as usize].name
    }

    fn presence(&self) -> Result<()> {
        for (i, field) in self.spec.fields.iter().enumerate() {
            let (Some(Presence { of, needs }), Some(_)) = (field.presence, field.tensor) else { continue };
            let (there, other) = (self.is_there(i as u8), self.is_there(of));
            let holds = match needs {
                Needs::Same => there == other,
                Needs::Opposite => there != other,
                Needs::Only => other || !there,
            };
            if !holds {
                let word = |there| if there { "present" } else { "absent" };
                let want = format!("{}, as `{}` is {}", word(!there), self.name(of), word(other));
                return Err(self.error(field, word(there), want));
            }
        }
        Ok(())
    }

    fn numbers(&mut self) -> Result<()> {
        // Counts are the first symbols, in the order of the fields.
        let counts = self.values.iter().filter_map(|v| match v {
            Value::Count(n) => Some(*n),
            _ => None,
        });
        for (size, n) in self.sizes.iter_mut().zip(counts) {
            *size = Some(n);
        }
        for (field, value) in self.fields() {
            let looked_at = field.presence.is_none_or(|p| self.is_there(p.of));
            for rule in field.rules.iter().flatten().filter(|_| looked_at && field.tensor.is_none()) {
                let holds = match value {
                    Value::Real(v) => {
                        self.value(&rule.right).is_some_and(|to| number(rule.relation, v, to as f64))
                    }
                    _ => self.holds(rule),
                };
                if !holds {
                    let got = match value {
                        Value::Real(v) => v.to_string(),
                        Value::Count(n) => n.to_string(),
                        _ => String::new(),
                    };
                    return Err(self.error(field, got, self.want(rule)));
                }
            }
        }
        Ok(())
    }

    fn elements(&self) -> Result<()> {
        let (mut act, mut acc) = (None, None);
        for (field, t, v) in self.specs() {
            let own = v.dtype;
            let fits = match t.elements {
                Elements::Act => {
                    let fits = act
                        .map_or(sums(own).is_some() && acc.is_none_or(|a| sums(own) == Some(a)), |a| {
                            a == own
                        });
                    if fits {
                        (act, acc) = (Some(own), sums(own));
                    }
                    fits
                }
                Elements::Acc => {
                    let fits = acc.map_or(sums(own) == Some(own), |a| a == own);
                    acc = acc.or(Some(own).filter(|_| fits));
                    fits
                }
                Elements::I32 => own == DType::I32,
                Elements::U8 => own == DType::U8,
                Elements::Float => sums(own).is_some(),
                Elements::ActOrAcc | Elements::Any | Elements::Like(_) => true,
            };
            if !fits {
                return Err(self.mistyped(field, t, own, act, acc));
            }
        }
        for (field, t, v) in self.specs() {
            let own = v.dtype;
            let fits = match t.elements {
                Elements::ActOrAcc => match act {
                    Some(act) => own == act || Some(own) == acc,
                    None => sums(own).is_some() && acc.is_none_or(|a| sums(own) == Some(a)),
                },
                Elements::Like(other) => match self.values[other as usize] {
                    Value::Tensor(_, other) => own == other.dtype,
                    _ => true,
                },
                _ => true,
            };
            if !fits {
                return Err(self.mistyped(field, t, own, act, acc));
            }
        }
        Ok(())
    }

    fn mistyped(
        &self,
        field: &FieldSpec,
        t: &TensorSpec,
        own: DType,
        act: Option<DType>,
        acc: Option<DType>,
    ) -> Error {
        let both = |a: DType, b: DType| if a == b { a.to_string() } else { format!("{a} or {b}") };
        let want = match (t.elements, act, acc) {
            (Elements::Act, Some(act), _) => act.to_string(),
            (Elements::Act | Elements::ActOrAcc, None, Some(DType::F32)) => "bf16 or f32".into(),
            (Elements::Act | Elements::ActOrAcc, None, Some(acc)) => acc.to_string(),
            (Elements::Acc, _, Some(acc)) => acc.to_string(),
            (Elements::Acc, ..) => "f32 or f64".into(),
            (Elements::ActOrAcc, Some(act), Some(acc)) => both(act, acc),
            (Elements::I32, ..) => DType::I32.to_string(),
            (Elements::U8, ..) => DType::U8.to_string(),
            (Elements::Like(other), ..) => match self.values[other as usize] {
                Value::Tensor(_, v) => format!("{}, as `{}` is", v.dtype, self.name(other)),
                _ => String::new(),
            },
            _ => "a float type".into(),
        };
        self.error(field, own, want)
    }

    fn shapes(&mut self) -> Result<()> {
        // Sizes that are single letters define the letters; the other sizes are checked afterwards.
        for plain in [true, false] {
            for (field, t, v) in self.specs() {
                let shape = self.shape(t);
                let Some(sizes) = sizes(shape, v.dims) else {
                    let want = format!("of {} dimensions: {}", shape.rank(), self.shape_text(shape));
                    return Err(self.error(field, v.dims, want));
                };
                for (expr, &size) in shape.sizes().iter().zip(&sizes) {
                    if expr.plain().is_some() == plain && !self.fits(expr, size) {
                        return Err(self.error(field, v.dims, self.shape_text(shape)));
                    }
                }
            }
        }
        for (field, t, v) in self.specs() {
            if (t.dense || self.shape(t).rank() == 1) && !v.is_contiguous() {
                return Err(self.error(field, format!("strided by {}", v.ld), "contiguous"));
            }
            if let Some(rule) = field.rules.iter().flatten().find(|r| !self.holds(r)) {
                return Err(self.error(field, v.dims, self.want(rule)));
            }
        }
        Ok(())
    }

    fn shape(&self, t: &'static TensorSpec) -> &'static Shape {
        match &t.otherwise {
            Some((shape, flag)) if matches!(self.values[*flag as usize], Value::Flag(true)) => shape,
            _ => &t.shape,
        }
    }

    /// Whether a size has the value of `expr`. A letter without a value is defined by the size.
    fn fits(&mut self, expr: &Expr, size: usize) -> bool {
        if let Some(want) = self.value(expr) {
            return size == want;
        }
        match (expr.successor(), size.checked_sub(expr.plus)) {
            (Some(i), Some(n)) => {
                self.sizes[i as usize] = Some(n);
                true
            }
            _ => false,
        }
    }

    /// The value of a size, saturating at `usize::MAX`; `None` if a letter has no value.
    fn value(&self, expr: &Expr) -> Option<usize> {
        let product =
            expr.symbols().try_fold(expr.times, |n, s| Some(n.saturating_mul(self.sizes[s as usize]?)))?;
        Some((product / expr.over).saturating_add(expr.plus))
    }

    fn holds(&self, rule: &Rule) -> bool {
        let (Some(left), Some(right)) = (self.value(&rule.left), self.value(&rule.right)) else {
            return true;
        };
        match rule.relation {
            Relation::Divides => left > 0 && right.is_multiple_of(left),
            Relation::Even => left.is_multiple_of(2),
            Relation::AtLeast => left >= right,
            Relation::AtMost => left <= right,
            Relation::Above => left > right,
            Relation::Below => left < right,
            Relation::Finite => true,
        }
    }

    /// A rule in words.
    fn want(&self, rule: &Rule) -> String {
        let right = self.size_text(&rule.right);
        // The error names an argument that is a number itself; a size of a tensor has to be named here.
        let of = match rule.left.plain().map(|s| self.spec.symbols[s as usize]) {
            Some(name) if self.spec.field(name).is_none() => format!("with {name} "),
            _ => String::new(),
        };
        match rule.relation {
            Relation::Divides => format!("{of}a divisor of {right}"),
            Relation::Even => format!("{of}even"),
            Relation::Finite => format!("{of}a finite number"),
            Relation::AtLeast => format!("{of}at least {right}"),
            Relation::AtMost => format!("{of}at most {right}"),
            Relation::Above => format!("{of}above {right}"),
            Relation::Below => format!("{of}below {right}"),
        }
    }

    /// A size as a number if it has a value, otherwise in letters.
    fn size_text(&self, expr: &Expr) -> String {
        if let Some(n) = self.value(expr) {
            return n.to_string();
        }
        let names: Vec<&str> = expr.symbols().map(|s| self.spec.symbols[s as usize]).collect();
        let mut text = names.join("*");
        if expr.times != 1 {
            text.insert_str(0, &expr.times.to_string());
        }
        if expr.over != 1 {
            let _ = write!(text, "/{}", expr.over);
        }
        if expr.plus != 0 {
            let _ = write!(text, "+{}", expr.plus);
        }
        text
    }

    fn shape_text(&self, shape: &Shape) -> String {
        let sizes: Vec<String> = shape.sizes().iter().map(|e| self.size_text(e)).collect();
        match &sizes[..] {
            [n] => format!("{n} elements"),
            [rows, cols] => format!("{rows} rows of {cols}"),
            _ => format!("[{}]", sizes.join(", ")),
        }
    }

    fn aliases(&self) -> Result<()> {
        for (i, (field, value)) in self.fields().enumerate() {
            let Value::Tensor(Access::Write | Access::Accumulate, v) = value else { continue };
            for (k, other) in self.values.iter().enumerate() {
                let Value::Tensor(access, w) = other else { continue };
                // Of two overlapping outputs, the error names the later one.
                if k == i || (k > i && *access != Access::Read) || !overlap(v, w) {
                    continue;
                }
                let may_be = field.tensor.and_then(|t| t.may_be).filter(|&m| m as usize == k);
                if may_be.is_some() && identical(v, w) {
                    continue;
                }
                let but = if may_be.is_some() { ", or exactly the same elements" } else { "" };
                return Err(overlapping(self.spec.name, field.name, self.name(k as u8), but));
            }
        }
        Ok(())
    }
}

/// Checks a copy on device `own` between contiguous views.
pub(crate) fn copy(own: DeviceId, src: &In, dst: &super::Out) -> Result<()> {
    view(own, "copy", "src", src)?;
    view(own, "copy", "dst", &dst.0)?;
    apart("copy", ("src", src), ("dst", &dst.0))?;
    if src.bytes() != dst.0.bytes() || !src.is_contiguous() || !dst.0.is_contiguous() {
        return Err(Error::arg("copy", "dst", dst.0.dims, format!("{} contiguous bytes", src.bytes())));
    }
    Ok(())
}

/// Checks the views of a collective, named `x` and `y`: of `ranks` parts, `part` is one and `whole` has all. Returns whether
/// `part` is part `rank` of `whole`; else the two must share no memory.
pub(crate) fn parts(
    own: DeviceId,
    op: &'static str,
    part: (&'static str, &In),
    whole: (&'static str, &In),
    rank: usize,
    ranks: usize,
) -> Result<bool> {
    let mut both = [part, whole];
    both.sort_by_key(|(name, _)| *name);
    for (name, v) in both {
        view(own, op, name, v)?;
        if !v.is_contiguous() {
            return Err(Error::arg(op, name, format!("strided by {}", v.ld), "contiguous"));
        }
    }
    if part.1.dtype != whole.1.dtype {
        return Err(Error::arg(op, "y", both[1].1.dtype, format!("{}, as `x`", both[0].1.dtype)));
    }
    let (n, all) = (part.1.dims.numel(), whole.1.dims.numel());
    if n.checked_mul(ranks) != Some(all) {
        let want = format!("{ranks} parts of as many elements as {} {}", part.0, part.1.dims);
        return Err(Error::arg(op, whole.0, whole.1.dims, want));
    }
    let at = whole.1.addr().wrapping_add(rank as u64 * part.1.bytes());
    let same = std::ptr::eq(part.1.buffer(), whole.1.buffer()) && part.1.addr() == at;
    if !same {
        apart(op, both[0], both[1])?;
    }
    Ok(same)
}

/// The accumulator type of a float type; `None` for integers.
fn sums(t: DType) -> Option<DType> {
    match t {
        DType::F64 => Some(DType::F64),
        DType::F32 | DType::Bf16 => Some(DType::F32),
        DType::I32 | DType::U8 => None,
    }
}

fn number(relation: Relation, left: f64, right: f64) -> bool {
    match relation {
        Relation::AtLeast => left >= right,
        Relation::AtMost => left <= right,
        Relation::Above => left > right,
        Relation::Below => left < right,
        Relation::Finite => left.is_finite(),
        Relation::Divides | Relation::Even => true,
    }
}

/// The sizes of a tensor in the form of a shape of the table; `None` if the number of dimensions differs.
fn sizes(shape: &Shape, dims: Dims) -> Option<[usize; 4]> {
    match shape.rank() {
        1 => Some([dims.numel(), 1, 1, 1]),
        2 => Some([dims.rows(), dims.cols(), 1, 1]),
        n if n == dims.rank() => {
            let mut sizes = [1; 4];
            sizes[..n].copy_from_slice(dims.as_slice());
            Some(sizes)
        }
        _ => None,
    }
}

/// Whether two views have exactly the same elements.
fn identical(a: &In, b: &In) -> bool {
    let rows = a.dims.rows();
    (a.addr(), a.dtype, rows, a.dims.cols()) == (b.addr(), b.dtype, b.dims.rows(), b.dims.cols())
        && (rows <= 1 || a.ld == b.ld)
}

/// The rows of a view, as addresses and sizes in bytes.
#[derive(Clone, Copy)]
struct Rows {
    start: i128,
    rows: i128,
    width: i128,
    stride: i128,
}

impl Rows {
    fn of(v: &In) -> Self {
        let size = v.dtype.size() as i128;
        Rows {
            start: v.addr() as i128,
            rows: v.dims.rows() as i128,
            width: v.dims.cols() as i128 * size,
            stride: v.ld as i128 * size,
        }
    }

    fn end(&self) -> i128 {
        self.start + if self.rows > 1 { (self.rows - 1) * self.stride } else { 0 } + self.width
    }

    /// Whether any rows share a byte, if `stride` is the row stride of both; the stride of a single row is not used.
    fn meet(&self, other: &Rows, stride: i128) -> bool {
        // Row i of this view starts `(i - j) stride - ahead` bytes after row j of the other. They overlap if this is
        // less than the width of the other's rows and greater than minus the width of this one's.
        let ahead = other.start - self.start;
        let first = (ahead - self.width).div_euclid(stride) + 1;
        let least = first.max(1 - other.rows);
        least < self.rows && least * stride < ahead + other.width
    }
}

/// Whether two views inside their buffers share a byte.
fn overlap(a: &In, b: &In) -> bool {
    if a.dims.numel() == 0 || b.dims.numel() == 0 {
        return false;
    }
    let (a, b) = (Rows::of(a), Rows::of(b));
    if a.end() <= b.start || b.end() <= a.start {
        return false;
    }
    match (a.rows, b.rows) {
        (1, 1) => true,
        (1, _) => a.meet(&b, b.stride),
        (_, 1) => a.meet(&b, a.stride),
        _ if a.stride == b.stride => a.meet(&b, a.stride),
        _ => (0..a.rows).any(|i| Rows { start: a.start + i * a.stride, rows: 1, ..a }.meet(&b, b.stride)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::*;
    use crate::tensor::Tensor;

    const S: Stream = Stream::COMPUTE;

    fn of(dev: &dyn Kernels, dtype: DType, dims: impl Into<Dims>) -> Tensor {
        Tensor::empty(dev, Role::Activation, dtype, dims).expect("a tensor")
    }

    fn f32(dev: &dyn Kernels, dims: impl Into<Dims>) -> Tensor {
        of(dev, DType::F32, dims)
    }

    fn refusal(result: Result<()>) -> String {
        result.expect_err("a wrong call").to_string()
    }

    #[test]
    fn shapes_are_those_of_the_table() {
        let p = Plan::new();
        let t = |dims: &[usize]| f32(&p, Dims::from_slice(dims).expect("at most four"));
        let matmul = |a: &[usize], b: &[usize], y: &[usize], ta, tb| {
            let (a, b, y) = (t(a), t(b), t(y));
            p.matmul(S, &Matmul { a: a.view(), b: b.view(), ta, tb, bias: None, y: y.out() })
        };
        for (a, b, ta, tb) in [
            ([3, 4], [4, 5], false, false),
            ([4, 3], [4, 5], true, false),
            ([3, 4], [5, 4], false, true),
            ([4, 3], [5, 4], true, true),
        ] {
            assert!(matmul(&a, &b, &[3, 5], ta, tb).is_ok());
            assert!(matmul(&a, &b, &[3, 5], !ta, tb).is_err());
        }
        // Rows may have any number of dimensions.
        assert!(matmul(&[1, 3, 4], &[4, 5], &[3, 1, 5], false, false).is_ok());
        let e = refusal(matmul(&[3, 4], &[6, 5], &[3, 5], false, false));
        assert_eq!(e, "matmul: argument `b` is [6, 5], wanted 4 rows of O");
        let e = refusal(matmul(&[3, 4], &[4, 5], &[3, 6], false, false));
        assert_eq!(e, "matmul: argument `y` is [3, 6], wanted 3 rows of 5");

        let up = |x: &[usize], y: &[usize]| {
            let (x, y) = (t(x), t(y));
            p.upsample2x_bwd(S, &Upsample2xBwd { dy: y.view(), dx: x.out() })
        };
        assert!(up(&[1, 2, 3, 4], &[1, 4, 6, 4]).is_ok());
        let e = refusal(up(&[1, 2, 3, 4], &[1, 5, 6, 4]));
        assert_eq!(e, "upsample2x_bwd: argument `dy` is [1, 5, 6, 4], wanted [1, 4, 6, 4]");
        let e = refusal(up(&[1, 2, 3, 4], &[24, 4]));
        assert_eq!(e, "upsample2x_bwd: argument `dy` is [24, 4], wanted of 4 dimensions: [B, 2H, 2W, C]");
        let pool = |h: usize| {
            let (x, y) = (t(&[1, h, 3, 4]), t(&[1, 2, 1, 4]));
            p.max_pool2x2_fwd(S, &MaxPool2x2Fwd { x: x.view(), y: y.out() })
        };
        assert!(pool(4).is_ok() && pool(5).is_ok() && pool(6).is_err());
    }

    #[test]
    fn numbers_and_letters_keep_their_rules() {
        let p = Plan::new();
        let (x, y, at) = (f32(&p, [3, 8]), f32(&p, [3, 8]), of(&p, DType::I32, [3]));
        let rope = |heads, head_dim| {
            let (x, position, y) = (x.view(), at.view(), y.out());
            p.rope(S, &Rope { x, position, y, heads, head_dim, theta: 1e4, inverse: false })
        };
        assert!(rope(2, 4).is_ok() && rope(1, 4).is_ok() && rope(0, 4).is_ok());
        assert_eq!(refusal(rope(3, 4)), "rope: argument `x` is [3, 8], wanted with C at least 12");
        assert_eq!(refusal(rope(1, 3)), "rope: argument `head_dim` is 3, wanted even");
        assert_eq!(refusal(rope(1, 0)), "rope: argument `head_dim` is 0, wanted at least 2");
        assert!(rope(usize::MAX, 2).is_err());

        let norm = |groups| {
            let (x, w, y, s) =
                (f32(&p, [1, 2, 2, 6]), f32(&p, [6]), f32(&p, [1, 2, 2, 6]), f32(&p, [2, groups]));
            let (mean, rstd) = (s.rows(0, 1).expect("a row"), s.rows(1, 1).expect("a row"));
            let (x, w, y, mean, rstd) = (x.view(), w.view(), y.out(), mean.out(), rstd.out());
            p.group_norm_fwd(S, &GroupNormFwd { x, w, b: w, y, mean, rstd, eps: 1e-6, silu: false })
        };
        assert!(norm(3).is_ok());
        let want = "group_norm_fwd: argument `mean` is [1, 4], wanted with G a divisor of 6";
        assert_eq!(refusal(norm(4)), want);
        assert!(norm(0).is_err());

        let (logits, number, position) = (f32(&p, [2, 9]), of(&p, DType::I32, [2]), of(&p, DType::I32, [2]));
        let idx = of(&p, DType::I32, [2]);
        let sample = |temperature, top_p, without: Option<&Tensor>, guidance| {
            let a = Sample {
                logits: logits.view(),
                without: without.map(Tensor::view),
                number: number.view(),
                position: position.acc(),
                idx: idx.out(),
                temperature,
                top_k: 0,
                top_p,
                guidance,
                seed: 0,
            };
            p.sample(S, &a)
        };
        assert!(sample(0.0, 1.0, None, f64::NAN).is_ok());
        let e = refusal(sample(0.0, 1.0, Some(&logits), f64::NAN));
        assert_eq!(e, "sample: argument `guidance` is NaN, wanted a finite number");
        for wrong in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(refusal(sample(wrong, 1.0, None, 1.0)).contains("`temperature`"));
        }
        for wrong in [0.0, 1.5, f64::NAN] {
            assert!(refusal(sample(1.0, wrong, None, 1.0)).contains("`top_p`"));
        }
    }

    #[test]
    fn element_types_fit_each_other() {
        let p = Plan::new();
        let norm = |act: DType, w: DType, stat: DType| {
            let (x, w, y, s) = (of(&p, act, [2, 4]), of(&p, w, [4]), of(&p, act, [2, 4]), of(&p, stat, [2]));
            let a = RmsNormFwd {
                x: x.view(),
                residual: None,
                w: w.view(),
                sum: None,
                y: y.out(),
                rstd: s.out(),
                eps: 1e-6,
            };
            p.rms_norm_fwd(S, &a)
        };
        use DType::*;
        assert!(norm(F64, F64, F64).is_ok() && norm(F32, F32, F32).is_ok() && norm(Bf16, Bf16, F32).is_ok());
        assert_eq!(refusal(norm(Bf16, F32, F32)), "rms_norm_fwd: argument `w` is f32, wanted bf16");
        assert_eq!(refusal(norm(Bf16, Bf16, Bf16)), "rms_norm_fwd: argument `rstd` is bf16, wanted f32");
        assert_eq!(refusal(norm(F64, F64, F32)), "rms_norm_fwd: argument `rstd` is f32, wanted f64");
        assert_eq!(refusal(norm(I32, I32, F32)), "rms_norm_fwd: argument `x` is i32, wanted a float type");

        let restore = |x: DType, norm: DType, y: DType| {
            let (x, norm, y) = (of(&p, x, [4]), of(&p, norm, [2]), of(&p, y, [4]));
            p.restore(S, &Restore { x: x.view(), norm: norm.view(), y: y.acc() })
        };
        assert!(
            restore(Bf16, F32, Bf16).is_ok()
                && restore(F32, F32, F32).is_ok()
                && restore(F64, F64, F64).is_ok()
        );
        assert_eq!(refusal(restore(Bf16, F32, F32)), "restore: argument `y` is f32, wanted bf16, as `x` is");
        assert_eq!(refusal(restore(F64, F32, F64)), "restore: argument `x` is f64, wanted bf16 or f32");
        assert_eq!(refusal(restore(F32, Bf16, F32)), "restore: argument `norm` is bf16, wanted f32 or f64");

        // The accumulator type must be that of the activation type.
        let sums = |x: DType, y: DType| {
            let (x, y) = (of(&p, x, [2, 4]), of(&p, y, [4]));
            p.col_sum(S, &ColSum { x: x.view(), y: y.acc() })
        };
        assert!(sums(Bf16, F32).is_ok() && sums(F32, F32).is_ok() && sums(F32, F64).is_err());
        let fill = |dtype| p.fill(S, &Fill { y: of(&p, dtype, [2]).out(), value: 0.0 });
        assert!([F64, F32, Bf16, I32].into_iter().all(|t| fill(t).is_ok()));
        let cast = |x, y| {
            let (x, y) = (of(&p, x, [2]), of(&p, y, [2]));
            p.cast(S, &Cast { x: x.view(), y: y.out() })
        };
        assert!(cast(F64, Bf16).is_ok() && cast(I32, F32).is_err() && cast(F32, I32).is_err());
    }

    #[test]
    fn what_belongs_together_is_there_together() {
        let p = Plan::new();
        let (x, w, rstd) = (f32(&p, [2, 4]), f32(&p, [4]), f32(&p, [2]));
        let (y, sum) = (f32(&p, [2, 4]), f32(&p, [2, 4]));
        let norm = |residual: Option<&Tensor>, sum: Option<&Tensor>| {
            let a = RmsNormFwd {
                x: x.view(),
                residual: residual.map(Tensor::view),
                w: w.view(),
                sum: sum.map(Tensor::out),
                y: y.out(),
                rstd: rstd.out(),
                eps: 1e-6,
            };
            p.rms_norm_fwd(S, &a)
        };
        assert!(norm(None, None).is_ok() && norm(Some(&x), Some(&sum)).is_ok());
        let e = refusal(norm(Some(&x), None));
        assert_eq!(e, "rms_norm_fwd: argument `sum` is absent, wanted present, as `residual` is present");
        let e = refusal(norm(None, Some(&sum)));
        assert_eq!(e, "rms_norm_fwd: argument `sum` is present, wanted absent, as `residual` is absent");

        let l2 = |dx: Option<&Tensor>, dx_acc: Option<&Tensor>| {
            let (dx, dx_acc) = (dx.map(Tensor::out), dx_acc.map(Tensor::acc));
            p.l2_norm_bwd(
                S,
                &L2NormBwd { dy: x.view(), x: x.view(), norm: rstd.view(), dx, dx_acc, eps: 1e-6 },
            )
        };
        assert!(l2(Some(&y), None).is_ok() && l2(None, Some(&y)).is_ok());
        let e = refusal(l2(None, None));
        assert_eq!(e, "l2_norm_bwd: argument `dx_acc` is absent, wanted present, as `dx` is absent");
        let e = refusal(l2(Some(&y), Some(&sum)));
        assert_eq!(e, "l2_norm_bwd: argument `dx_acc` is present, wanted absent, as `dx` is present");
    }

    #[test]
    fn vectors_have_no_gaps() {
        let p = Plan::new();
        let wide = f32(&p, [4, 3]);
        let sums = |y: &Tensor| p.col_sum(S, &ColSum { x: f32(&p, [2, 4]).view(), y: y.acc() });
        assert!(sums(&f32(&p, [2, 2])).is_ok());
        let column = wide.columns(1, 1).expect("a column");
        assert_eq!(refusal(sums(&column)), "col_sum: argument `y` is strided by 3, wanted contiguous");
    }

    #[test]
    fn devices_take_their_own_memory_only() {
        let (plan, other) = (Plan::new(), Plan::new());
        let (one, two) = (Cpu::new(1).expect("a thread"), Cpu::new(1).expect("a thread"));
        let words = "memory of another device, wanted memory of the device that runs the call";
        let devices: [&dyn Kernels; 4] = [&plan, &other, &one, &two];
        for (i, dev) in devices.iter().enumerate() {
            let (x, y) = (f32(*dev, [2, 4]), f32(*dev, [2, 4]));
            for (k, to) in devices.iter().enumerate() {
                let own = f32(*to, [2, 4]);
                let calls = [
                    ("add", "a", to.add(S, &Add { a: x.view(), b: own.view(), y: own_out(*to).out() })),
                    ("add", "y", to.add(S, &Add { a: own.view(), b: own.view(), y: y.out() })),
                    ("copy_in", "dst", to.copy_in(S, &[0; 32], y.out())),
                    ("read_later", "src", to.read_later(S, y.view()).map(|_| ())),
                    ("all_reduce", "x", to.collectives().all_reduce(S, y.acc(), Reduction::Sum)),
                    ("all_gather", "x", to.collectives().all_gather(S, x.view(), own.out())),
                    ("all_gather", "y", to.collectives().all_gather(S, own.view(), y.out())),
                ];
                for (op, arg, result) in calls {
                    if i == k {
                        result.unwrap_or_else(|e| panic!("{e}"));
                    } else {
                        let e = refusal(result);
                        assert!(e.starts_with(&format!("{op}: argument `{arg}` is {words}")), "{e}");
                    }
                }
            }
        }
        fn own_out(dev: &dyn Kernels) -> Tensor {
            f32(dev, [2, 4])
        }
    }

    #[test]
    fn outputs_overlap_nothing() {
        let p = Plan::new();
        let all = f32(&p, [4, 12]);
        let part = |start| all.columns(start, 4).expect("four columns");
        let add =
            |a: &Tensor, b: &Tensor, y: &Tensor| p.add(S, &Add { a: a.view(), b: b.view(), y: y.out() });
        // Inputs may be the same; adjacent columns do not overlap.
        assert!(add(&part(0), &part(0), &part(4)).is_ok());
        assert!(add(&part(0), &part(8), &part(4)).is_ok());
        assert!(add(&part(4), &part(8), &part(0)).is_ok());
        let e = refusal(add(&part(0), &part(5), &part(4)));
        assert_eq!(e, "add: argument `y` is memory shared with `b`, wanted memory of its own");
        assert!(add(&part(4), &part(0), &part(4)).is_err());
        // Two outputs: the later one is named.
        let (x, w) = (f32(&p, [2, 4]), f32(&p, [4]));
        let stat = f32(&p, [2]);
        let (mean, y) = (stat.out(), f32(&p, [2, 4]));
        let a =
            LayerNormFwd { x: x.view(), w: w.view(), b: w.view(), y: y.out(), mean, rstd: mean, eps: 1e-6 };
        let e = refusal(p.layer_norm_fwd(S, &a));
        assert_eq!(
            e,
            "layer_norm_fwd: argument `rstd` is memory shared with `mean`, wanted memory of its own"
        );
        let e = refusal(p.col_sum(S, &ColSum { x: x.view(), y: x.rows(1, 1).expect("a row").acc() }));
        assert!(e.contains("`y` is memory shared with `x`"), "{e}");
        // Empty tensors do not overlap anything.
        let none = f32(&p, [0, 4]);
        assert!(add(&none, &none, &none).is_ok());
        let all = f32(&p, [5, 4]);
        let gather = |x: &Tensor, y: &Tensor| p.collectives().all_gather(S, x.view(), y.out());
        let e = refusal(gather(&all.rows(0, 4).expect("rows"), &all.rows(1, 4).expect("rows")));
        assert_eq!(e, "all_gather: argument `y` is memory shared with `x`, wanted memory of its own");
        // A rank's own part of the whole stays where it is.
        assert!(gather(&all, &all).is_ok());
    }

    #[test]
    fn an_output_may_be_the_input_that_the_table_names() {
        let p = Plan::new();
        let all = f32(&p, [4, 8]);
        let (one, rows) = (f32(&p, [1]), f32(&p, [4]));
        let target = of(&p, DType::I32, [4]);
        let bwd = |logits: &Tensor, dlogits: &Tensor| {
            let a = XentBwd {
                logits: logits.view(),
                target: target.view(),
                weight: None,
                scale: one.view(),
                lse: rows.view(),
                g: one.view(),
                dlogits: dlogits.out(),
            };
            p.xent_bwd(S, &a)
        };
        let part = |start| all.columns(start, 4).expect("four columns");
        assert!(bwd(&part(2), &part(2)).is_ok() && bwd(&part(0), &part(4)).is_ok());
        let e = refusal(bwd(&part(2), &part(3)));
        let want = "memory shared with `logits`, wanted memory of its own, or exactly the same elements";
        assert_eq!(e, format!("xent_bwd: argument `dlogits` is {want}"));
    }

    /// Compares with sets of bytes.
    #[test]
    fn overlaps_are_exact() {
        let p = Plan::new();
        let buffer = p.alloc(Role::Activation, 4 * 64).expect("memory");
        let mut views = Vec::new();
        for start in [0, 1, 2, 5, 9, 13] {
            for (rows, cols) in [(1, 1), (1, 7), (2, 3), (3, 2), (4, 1)] {
                for ld in [cols, cols + 1, 5, 8] {
                    let v = In::new(&buffer, 4 * start, DType::F32, [rows, cols], ld as i64);
                    views.extend(v.ok().map(|v| (v, start as usize, rows, cols, ld)));
                }
            }
        }
        let elements = |&(_, start, rows, cols, ld): &(In, usize, usize, usize, usize)| {
            let of_row =
                move |r| (start + r * ld..start + r * ld + cols).fold(0u64, |all, i| all | (1u64 << i));
            (0..rows).map(of_row).fold(0, |all, row| all | row)
        };
        let (mut apart, mut together) = (0, 0);
        for a in &views {
            for b in &views {
                let want = elements(a) & elements(b) != 0;
                assert_eq!(
                    overlap(&a.0, &b.0),
                    want,
                    "{:?} and {:?}",
                    (a.1, a.2, a.3, a.4),
                    (b.1, b.2, b.3, b.4)
                );
                *if want { &mut together } else { &mut apart } += 1;
            }
        }
        assert!(apart > 100 && together > 100, "{apart}, {together}");
    }

    /// Every tensor of every kernel has a shape, and every symbol in a shape has a name.
    #[test]
    fn every_tensor_of_the_table_has_rules() {
        for kernel in KERNELS {
            for field in kernel.fields {
                let is_tensor = matches!(field.kind, spec::Kind::Tensor { .. });
                assert_eq!(field.tensor.is_some(), is_tensor, "{}: `{}`", kernel.name, field.name);
                let Some(tensor) = field.tensor else { continue };
                assert!(
                    !tensor.sizes().is_empty() && !field.text.is_empty(),
                    "{}: `{}`",
                    kernel.name,
                    field.name
                );
                for symbol in tensor.sizes().iter().flat_map(|e| e.symbols()) {
                    assert!(!kernel.symbols[symbol as usize].is_empty(), "{}: `{}`", kernel.name, field.name);
                }
            }
        }
        let of = |kernel: &str| spec::kernel(kernel).and_then(|k| k.indices()).map(|f| f.name);
        assert_eq!((of("gather_bwd"), of("xent_fwd"), of("add")), (Some("idx"), Some("target"), None));
        assert_eq!((of("attention_fwd"), of("ibq_bwd")), (Some("cu_q"), Some("idx")));
    }
}
