//! The rules for arguments in the table of kernels, as data. The text after a field of the table, such as
//! `[N, C]; act; with residual`, is compiled to a [`FieldSpec`] together with the crate; `super::check` checks calls
//! against it.
//!
//! The rules of a tensor are separated by semicolons:
//! - its shape. `[N, C]`: rows with any stride, in any number of dimensions; `[C]`: a vector of contiguous elements, in
//!   any number of dimensions; `[B, H, W, C]`: exactly these dimensions; `[..]`: as `[N, C]`, with the same shape as all
//!   other tensors of the call with `[..]`. A size is `N`, `2H`, `H/2`, `S+1` or `heads*head_dim`, where a letter stands
//!   for the same number in the whole call, and other names are arguments of the call. `[N, C], or [C, N] if ta` depends
//!   on a `bool`;
//! - its element type: `act`, `acc`, `act or acc`, `i32`, `u8`, `any float`, `any type`, or `type of x`;
//! - `without gaps`: the tensor is contiguous;
//! - `with x` (present if and only if `x` is), `unless x` (present if and only if `x` is absent) or `only with x`
//!   (absent if `x` is), for optional tensors;
//! - `may be x`: this output may be the input `x` itself, with the same strides. No other output may overlap anything;
//! - `values below R`, `values at most N`: limits of indices or offsets. Kernels report values beyond them as faults;
//! - rules for sizes: `G divides C`, `C at least heads*head_dim`.
//!
//! The rules of a number are `at least 1`, `above 0`, `at most 1`, `below 16`, `even`, `finite`, `divides heads`, and
//! `if x`: the number is ignored unless `x` is present.

use super::Access;

/// Maximum number of letters and counts of a kernel.
pub(super) const SYMBOLS: usize = 16;
/// Maximum number of arguments of a kernel.
const FIELDS: usize = 24;
/// No symbol.
const NONE: u8 = u8::MAX;

/// The type of a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A tensor.
    Tensor {
        /// How the kernel accesses it.
        access: Access,
        /// Whether it may be absent.
        optional: bool,
    },
    /// A `usize`.
    Count,
    /// A `bool`.
    Flag,
    /// An `f64`.
    Real,
    /// A `u64`.
    Seed,
    /// A [`super::Metric`].
    Metric,
    /// A [`super::Unary`].
    Unary,
}

/// A size: `times * symbols[0] * symbols[1] / over + plus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expr {
    pub(super) times: usize,
    symbols: [u8; 2],
    pub(super) over: usize,
    pub(super) plus: usize,
}

impl Expr {
    const fn number(n: usize) -> Self {
        Expr { times: n, symbols: [NONE; 2], over: 1, plus: 0 }
    }

    pub(super) const fn symbol(i: u8) -> Self {
        Expr { times: 1, symbols: [i, NONE], over: 1, plus: 0 }
    }

    /// The symbol, if the size is a single symbol.
    pub(super) const fn plain(&self) -> Option<u8> {
        match self {
            Expr { times: 1, symbols: [i, NONE], over: 1, plus: 0 } if *i != NONE => Some(*i),
            _ => None,
        }
    }

    /// The symbol, if the size is a single symbol plus a constant, such as `S+1`.
    pub(super) const fn successor(&self) -> Option<u8> {
        match self {
            Expr { times: 1, symbols: [i, NONE], over: 1, .. } if *i != NONE => Some(*i),
            _ => None,
        }
    }

    /// The symbols in the size.
    pub fn symbols(&self) -> impl Iterator<Item = u8> {
        self.symbols.into_iter().filter(|&s| s != NONE)
    }
}

/// The sizes of a tensor: one for a vector, two for rows, otherwise all dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    rank: u8,
    dims: [Expr; 4],
}

impl Shape {
    pub(super) fn sizes(&self) -> &[Expr] {
        &self.dims[..self.rank as usize]
    }

    pub(super) fn rank(&self) -> usize {
        self.rank as usize
    }
}

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Elements {
    /// The activation type of the call.
    Act,
    /// The accumulator type of the call.
    Acc,
    /// Either of them.
    ActOrAcc,
    /// 32-bit integers.
    I32,
    /// Bytes.
    U8,
    /// Any float type.
    Float,
    /// Any type.
    Any,
    /// The type of the argument with this index.
    Like(u8),
}

/// The rules of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorSpec {
    pub(super) shape: Shape,
    /// The shape if the `bool` argument with this index is true.
    pub(super) otherwise: Option<(Shape, u8)>,
    /// Element type.
    pub elements: Elements,
    /// Whether it must be contiguous.
    pub(super) dense: bool,
    /// Index of the input that this output may be.
    pub(super) may_be: Option<u8>,
    /// Whether its values are indices or offsets with a limit.
    values: bool,
}

impl TensorSpec {
    /// Its sizes, unless a `bool` argument selects the other shape: one for a vector, two for rows, otherwise all
    /// dimensions.
    pub fn sizes(&self) -> &[Expr] {
        self.shape.sizes()
    }
}

/// A relation between two numbers, or a property of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Relation {
    AtLeast,
    Above,
    AtMost,
    Below,
    Divides,
    Even,
    Finite,
}

/// A rule for numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) left: Expr,
    pub(super) relation: Relation,
    pub(super) right: Expr,
}

/// A dependence on the presence of another argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Presence {
    /// Index of the other argument.
    pub(super) of: u8,
    pub(super) needs: Needs,
}

/// How the presence of an argument depends on that of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    /// It is the same.
    Same,
    /// It is the opposite.
    Opposite,
    /// It is absent if the other one is.
    Only,
}

/// The rules of an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldSpec {
    /// The field of the argument struct.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// The text of the rules in the table; empty without rules.
    pub text: &'static str,
    /// The rules of a tensor.
    pub tensor: Option<TensorSpec>,
    pub(super) rules: [Option<Rule>; 3],
    pub(super) presence: Option<Presence>,
}

/// A row of the table of kernels.
#[derive(Debug, Clone, Copy)]
pub struct KernelSpec {
    /// The kernel.
    pub name: &'static str,
    /// Its arguments, in the order of the C header.
    pub fields: &'static [FieldSpec],
    /// The names of symbols (letters and counts), by their index in sizes.
    pub symbols: [&'static str; SYMBOLS],
}

impl KernelSpec {
    /// The field of this name.
    pub fn field(&self, name: &str) -> Option<&'static FieldSpec> {
        self.fields.iter().find(|f| f.name == name)
    }

    /// The argument with limited values, which faults refer to.
    pub fn indices(&self) -> Option<&'static FieldSpec> {
        self.fields.iter().find(|f| f.tensor.is_some_and(|t| t.values))
    }
}

/// The row of kernel `name`.
pub fn kernel(name: &str) -> Option<&'static KernelSpec> {
    super::KERNELS.iter().copied().find(|k| k.name == name)
}

/// A field of the table before compilation.
pub(super) struct Raw {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) text: &'static str,
}

/// The rules of all fields of a kernel, in the first `n` elements.
pub(super) struct Compiled {
    pub(super) fields: [FieldSpec; FIELDS],
    pub(super) n: usize,
    pub(super) symbols: [&'static str; SYMBOLS],
}

/// Compiles the texts of a kernel's fields. A mistake in a text is a compile-time error.
pub(super) const fn compile(raw: &[Raw]) -> Compiled {
    assert!(raw.len() <= FIELDS, "a kernel with too many arguments");
    let none =
        FieldSpec { name: "", kind: Kind::Seed, text: "", tensor: None, rules: [None; 3], presence: None };
    let mut all = Compiled { fields: [none; FIELDS], n: raw.len(), symbols: [""; SYMBOLS] };
    let mut reader = Reader {
        text: b"",
        at: 0,
        raw,
        symbols: [""; SYMBOLS],
        bound: [false; SYMBOLS],
        optional: [false; SYMBOLS],
    };
    // Counts come first, since their values are always known.
    let mut i = 0;
    while i < raw.len() {
        if matches!(raw[i].kind, Kind::Count) {
            let s = reader.intern(raw[i].name);
            reader.bound[s as usize] = true;
        }
        i += 1;
    }
    let mut i = 0;
    while i < raw.len() {
        let Raw { name, kind, text } = raw[i];
        reader.text = text.as_bytes();
        reader.at = 0;
        let mut field = FieldSpec { name, kind, text, ..none };
        if let Kind::Tensor { optional, .. } = kind {
            field.tensor = Some(reader.tensor(!optional));
            assert!(reader.done() || reader.eat(";"), "unexpected text after a rule, expected `;`");
        }
        while !reader.done() {
            reader.segment(&mut field);
            assert!(reader.done() || reader.eat(";"), "unexpected text after a rule, expected `;`");
        }
        all.fields[i] = field;
        i += 1;
    }
    let mut s = 0;
    while s < SYMBOLS {
        assert!(
            reader.bound[s] || reader.optional[s] || reader.symbols[s].is_empty(),
            "a letter without a value from a tensor"
        );
        s += 1;
    }
    all.symbols = reader.symbols;
    all
}

struct Reader<'r> {
    text: &'static [u8],
    at: usize,
    raw: &'r [Raw],
    symbols: [&'static str; SYMBOLS],
    /// Symbols that have a value in every call.
    bound: [bool; SYMBOLS],
    /// Symbols that have a value in every call with a certain optional tensor.
    optional: [bool; SYMBOLS],
}

impl Reader<'_> {
    const fn intern(&mut self, name: &'static str) -> u8 {
        let mut i = 0;
        while i < SYMBOLS {
            if self.symbols[i].is_empty() {
                self.symbols[i] = name;
            }
            if same(self.symbols[i].as_bytes(), name.as_bytes()) {
                return i as u8;
            }
            i += 1;
        }
        panic!("a kernel with too many letters")
    }

    const fn skip(&mut self) {
        while self.at < self.text.len() && self.text[self.at] == b' ' {
            self.at += 1;
        }
    }

    const fn done(&mut self) -> bool {
        self.skip();
        self.at == self.text.len()
    }

    /// The next byte, 0 at the end.
    const fn peek(&self) -> u8 {
        if self.at < self.text.len() { self.text[self.at] } else { 0 }
    }

    /// Consumes these words if they are next.
    const fn eat(&mut self, words: &str) -> bool {
        self.skip();
        let words = words.as_bytes();
        if self.text.len() - self.at < words.len() {
            return false;
        }
        let (_, rest) = self.text.split_at(self.at);
        let (head, rest) = rest.split_at(words.len());
        let whole = !in_name(words[words.len() - 1]) || rest.is_empty() || !in_name(rest[0]);
        if same(head, words) && whole {
            self.at += words.len();
            return true;
        }
        false
    }

    const fn expect(&mut self, words: &str) {
        assert!(self.eat(words), "unexpected text");
    }

    const fn int(&mut self) -> Option<usize> {
        self.skip();
        let (start, mut n) = (self.at, 0);
        while self.peek().is_ascii_digit() {
            n = 10 * n + (self.peek() - b'0') as usize;
            self.at += 1;
        }
        if self.at > start { Some(n) } else { None }
    }

    const fn name(&mut self) -> &'static str {
        self.skip();
        let start = self.at;
        assert!(self.peek().is_ascii_alphabetic(), "expected a name");
        while in_name(self.peek()) {
            self.at += 1;
        }
        let (_, rest) = self.text.split_at(start);
        let (name, _) = rest.split_at(self.at - start);
        match std::str::from_utf8(name) {
            Ok(name) => name,
            Err(_) => panic!("names are ASCII"),
        }
    }

    /// Consumes the name of an argument and returns its index.
    const fn field(&mut self) -> u8 {
        let name = self.name();
        let mut i = 0;
        while i < self.raw.len() {
            if same(self.raw[i].name.as_bytes(), name.as_bytes()) {
                return i as u8;
            }
            i += 1;
        }
        panic!("not an argument of this kernel")
    }

    const fn expr(&mut self) -> Expr {
        let mut e = match self.int() {
            Some(n) => Expr::number(n),
            None => Expr::number(1),
        };
        if self.peek().is_ascii_alphabetic() {
            let name = self.name();
            e.symbols[0] = self.intern(name);
            if self.eat("*") {
                let name = self.name();
                e.symbols[1] = self.intern(name);
            }
        } else {
            assert!(self.at > 0 && self.text[self.at - 1].is_ascii_digit(), "expected a size");
        }
        if self.eat("/") {
            e.over = self.must_int();
            assert!(e.over > 0, "a division by zero");
        }
        if self.eat("+") {
            e.plus = self.must_int();
        }
        e
    }

    const fn must_int(&mut self) -> usize {
        match self.int() {
            Some(n) => n,
            None => panic!("expected a number"),
        }
    }

    const fn shape(&mut self, required: bool) -> Shape {
        self.expect("[");
        let mut shape = Shape { rank: 0, dims: [Expr::number(1); 4] };
        if self.eat("..]") {
            shape.rank = 2;
            shape.dims[0] = Expr::symbol(self.intern("rows"));
            shape.dims[1] = Expr::symbol(self.intern("columns"));
        } else {
            loop {
                assert!(shape.rank < 4, "a shape with more than four sizes");
                shape.dims[shape.rank as usize] = self.expr();
                shape.rank += 1;
                if !self.eat(",") {
                    break;
                }
            }
            self.expect("]");
        }
        let mut i = 0;
        while i < shape.rank as usize {
            match (shape.dims[i].successor(), shape.dims[i].plain()) {
                (Some(s), _) if required => self.bound[s as usize] = true,
                (_, Some(s)) => self.optional[s as usize] = true,
                _ => {}
            }
            i += 1;
        }
        shape
    }

    /// Consumes the shape and the element type of a tensor.
    const fn tensor(&mut self, required: bool) -> TensorSpec {
        let shape = self.shape(required);
        let mut otherwise = None;
        if self.eat(", or") {
            let other = self.shape(required);
            self.expect("if");
            let flag = self.field();
            assert!(matches!(self.raw[flag as usize].kind, Kind::Flag), "expected a bool argument");
            otherwise = Some((other, flag));
        }
        self.expect(";");
        let elements = if self.eat("act or acc") {
            Elements::ActOrAcc
        } else if self.eat("act") {
            Elements::Act
        } else if self.eat("acc") {
            Elements::Acc
        } else if self.eat("i32") {
            Elements::I32
        } else if self.eat("u8") {
            Elements::U8
        } else if self.eat("any float") {
            Elements::Float
        } else if self.eat("any type") {
            Elements::Any
        } else {
            self.expect("type of");
            Elements::Like(self.field())
        };
        TensorSpec { shape, otherwise, elements, dense: false, may_be: None, values: false }
    }

    /// Consumes one of the other rules.
    const fn segment(&mut self, field: &mut FieldSpec) {
        if let Some(tensor) = &mut field.tensor {
            if self.eat("without gaps") {
                tensor.dense = true;
                return;
            }
            if self.eat("may be") {
                assert!(
                    matches!(field.kind, Kind::Tensor { access: Access::Write, .. }),
                    "only an output may be an input"
                );
                tensor.may_be = Some(self.field());
                return;
            }
            if self.eat("values") {
                assert!(
                    self.eat("below") || self.eat("at most"),
                    "expected `values below` or `values at most`"
                );
                self.expr();
                tensor.values = true;
                return;
            }
            let needs = if self.eat("with") {
                Some(Needs::Same)
            } else if self.eat("unless") {
                Some(Needs::Opposite)
            } else if self.eat("only with") {
                Some(Needs::Only)
            } else {
                None
            };
            if let Some(needs) = needs {
                assert!(
                    matches!(field.kind, Kind::Tensor { optional: true, .. }),
                    "a required tensor cannot be absent"
                );
                field.presence = Some(Presence { of: self.field(), needs });
                return;
            }
        } else if self.eat("if") {
            field.presence = Some(Presence { of: self.field(), needs: Needs::Same });
            return;
        }
        let left = match (field.kind, field.tensor) {
            (_, Some(_)) => self.expr(),
            (Kind::Count, _) => Expr::symbol(self.intern(field.name)),
            (Kind::Real, _) => Expr::number(0),
            _ => panic!("no rules for this kind of argument"),
        };
        let (relation, unary) = if self.eat("even") {
            (Relation::Even, true)
        } else if self.eat("finite") {
            (Relation::Finite, true)
        } else if self.eat("divides") {
            (Relation::Divides, false)
        } else if self.eat("at least") {
            (Relation::AtLeast, false)
        } else if self.eat("at most") {
            (Relation::AtMost, false)
        } else if self.eat("above") {
            (Relation::Above, false)
        } else {
            self.expect("below");
            (Relation::Below, false)
        };
        let whole =
            !matches!(relation, Relation::Even | Relation::Divides) || !matches!(field.kind, Kind::Real);
        assert!(whole, "a rule for integers only");
        let right = if unary { Expr::number(0) } else { self.expr() };
        let mut i = 0;
        while field.rules[i].is_some() {
            i += 1;
        }
        field.rules[i] = Some(Rule { left, relation, right });
    }
}

const fn in_name(c: u8) -> bool {
    c.is_ascii_alphanumeric() || c == b'_' || c == b'\''
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}
