//! What every device does with a call before anything else: it holds the arguments against the table of kernels. Views
//! belong to the device and lie inside their buffers; what has to be there is there; numbers, element types and shapes
//! are those of [`super::spec`]; outputs overlap nothing. The first thing found wrong is the error.

use std::fmt::Write;

use super::spec::{
    Elements, Expr, FieldSpec, KernelSpec, Presence, Relation, Rule, SYMBOLS, Shape, TensorSpec,
};
use super::{Access, Args, DType, DeviceId, Dims, In, Value};
use crate::error::{Error, Result};

/// Checks a call for a device.
pub(crate) fn call(device: DeviceId, a: &dyn Args) -> Result<()> {
    let spec = a.spec();
    a.with_values(&mut |values| Call { spec, values, sizes: [None; SYMBOLS] }.check(device))
}

/// Checks that a view belongs to a device and lies inside its buffer: before following an address.
pub(crate) fn view(device: DeviceId, op: &'static str, arg: &'static str, v: &In) -> Result<()> {
    if v.buffer().device() != device {
        let want = "memory of the device that it is given to (a tensor goes to another one over the host)";
        return Err(Error::arg(op, arg, "memory of another device", want));
    }
    extent(op, arg, v)
}

/// Checks that a view lies inside its buffer, in whole elements, and that its rows do not overlap.
pub(crate) fn extent(op: &'static str, arg: &'static str, v: &In) -> Result<()> {
    let text = || format!("{} {}", v.dims, v.dtype);
    if v.dims.bytes(v.dtype).is_none() {
        return Err(Error::arg(op, arg, text(), "a tensor that can be addressed: fewer elements"));
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
    // Of a single row the stride means nothing.
    let ld = if rows > 1 { v.ld as u64 } else { 0 };
    let elements = (rows - 1).checked_mul(ld).and_then(|n| n.checked_add(cols));
    let end = elements.and_then(|n| n.checked_mul(size)).and_then(|n| n.checked_add(v.off));
    if end.is_none_or(|end| end > v.buf.bytes as u64) {
        let at = end.map_or("beyond all addresses".into(), |end| format!("at byte {end}"));
        let want = format!("inside its buffer of {} bytes", v.buf.bytes);
        return Err(Error::arg(op, arg, format!("{} ending {at}", text()), want));
    }
    Ok(())
}

/// Checks that an output overlaps an input nowhere.
pub(crate) fn apart(op: &'static str, input: (&'static str, &In), output: (&'static str, &In)) -> Result<()> {
    match overlap(input.1, output.1) {
        true => Err(overlapping(op, output.0, input.0, "")),
        false => Ok(()),
    }
}

fn overlapping(op: &'static str, arg: &'static str, other: &str, but: &str) -> Error {
    Error::arg(op, arg, format!("memory that `{other}` lies in too"), format!("memory of its own{but}"))
}

/// A call, and the sizes that its letters stand for so far.
struct Call<'c> {
    spec: &'static KernelSpec,
    values: &'c [Value<'c>],
    sizes: [Option<usize>; SYMBOLS],
}

impl<'c> Call<'c> {
    fn check(&mut self, device: DeviceId) -> Result<()> {
        for (field, v) in self.tensors() {
            view(device, self.spec.name, field.name, v)?;
        }
        self.presence()?;
        self.numbers()?;
        self.elements()?;
        self.shapes()?;
        self.aliases()
    }

    /// Every argument with what the table says of it.
    fn fields(&self) -> impl Iterator<Item = (&'static FieldSpec, Value<'c>)> + use<'c> {
        self.spec.fields.iter().zip(self.values.iter().copied())
    }

    /// The tensors that are there.
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
            let (Some(Presence { of, same }), Some(_)) = (field.presence, field.tensor) else { continue };
            let (there, other) = (self.is_there(i as u8), self.is_there(of));
            if there != (other == same) {
                let word = |there| if there { "present" } else { "absent" };
                let want = format!("{}, as `{}` is {}", word(!there), self.name(of), word(other));
                return Err(self.error(field, word(there), want));
            }
        }
        Ok(())
    }

    fn numbers(&mut self) -> Result<()> {
        for (field, value) in self.fields() {
            if let (Value::Count(n), Some(i)) = (value, self.symbol(field.name)) {
                self.sizes[i] = Some(n);
            }
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

    fn symbol(&self, name: &str) -> Option<usize> {
        self.spec.symbols.iter().position(|s| *s == name)
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
                    acc = acc.or(Some(own));
                    fits
                }
                Elements::I32 => own == DType::I32,
                Elements::Float => own != DType::I32,
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
            (Elements::Like(other), ..) => match self.values[other as usize] {
                Value::Tensor(_, v) => format!("{}, as `{}` is", v.dtype, self.name(other)),
                _ => String::new(),
            },
            _ => "a float type".into(),
        };
        self.error(field, own, want)
    }

    fn shapes(&mut self) -> Result<()> {
        // Letters alone say what they stand for; sizes that are made of them can be held against that afterwards.
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

    /// Whether a size is what the table says; if a letter has no value yet, this gives it one.
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

    /// The value of a size; `None` if a letter has none. What is too large for any tensor is `usize::MAX`.
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

    /// What a rule asks for, in words.
    fn want(&self, rule: &Rule) -> String {
        let right = self.size_text(&rule.right);
        // The number itself is what is told; of a tensor's sizes it has to be said which.
        let of = match rule.left.plain().map(|s| self.spec.symbols[s as usize]) {
            Some(name) if self.spec.field(name).is_none() => format!("{name} "),
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

    /// A size as its value, or in letters while it has none.
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
                // Of two outputs the later one is told.
                if k == i || (k > i && *access != Access::Read) || !overlap(v, w) {
                    continue;
                }
                let may_be = field.tensor.and_then(|t| t.may_be).filter(|&m| m as usize == k);
                if may_be.is_some() && identical(v, w) {
                    continue;
                }
                let but = if may_be.is_some() { ", or just the same elements" } else { "" };
                return Err(overlapping(self.spec.name, field.name, self.name(k as u8), but));
            }
        }
        Ok(())
    }
}

/// The type that sums of this one are formed in, if it is a float type.
fn sums(t: DType) -> Option<DType> {
    match t {
        DType::F64 => Some(DType::F64),
        DType::F32 | DType::Bf16 => Some(DType::F32),
        DType::I32 => None,
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

/// The sizes that a tensor has for a shape of the table; `None` if it has other dimensions.
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

/// Whether two views are of the very same elements.
fn identical(a: &In, b: &In) -> bool {
    let rows = a.dims.rows();
    (a.addr(), a.dtype, rows, a.dims.cols()) == (b.addr(), b.dtype, b.dims.rows(), b.dims.cols())
        && (rows <= 1 || a.ld == b.ld)
}

/// Where the rows of a view lie, in bytes.
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

    /// Whether rows `stride` apart of both share a byte; of a single row its stride means nothing.
    fn meet(&self, other: &Rows, stride: i128) -> bool {
        // Row i of this one begins `(i - j) stride - ahead` after row j of the other. They meet if that is less than the
        // other's width, and more than this one's below it.
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
