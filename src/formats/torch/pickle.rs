//! A machine for pickles that knows values only: it looks up no functions, and builds no objects of classes.

use super::REMEDY;
use crate::formats::Encoding;

/// Longest pickle that is read; those of state dictionaries have about 200 bytes per tensor.
pub(super) const LONGEST: usize = 64 << 20;
/// Most values of a pickle.
const MOST: usize = 4 << 20;
/// A place of the memo that was not filled.
const UNSET: Id = Id::MAX;

/// The index of a value. Values refer to one another by index: dropping them never recurses, and they may form cycles.
pub(super) type Id = u32;

/// A value of a pickle, with texts in the file.
#[derive(Debug)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// An integer of more than 8 bytes, the lowest first.
    Long(&'a [u8]),
    Float(f64),
    Text(&'a str),
    /// Bytes, which nothing here needs.
    Bytes,
    /// A list, a tuple or a set.
    List(Vec<Id>),
    /// A dictionary of any kind.
    Dict(Vec<(Id, Id)>),
    Global(Global),
    /// A storage, by the tuple that describes it.
    Storage(Id),
    /// A tensor, by the list of a storage, an offset, sizes, strides and more.
    Tensor(Id),
}

/// A function or class that pickles may name. None of them is called; their results are known.
#[derive(Debug, Clone, Copy)]
pub(super) enum Global {
    /// `collections.OrderedDict` or a dictionary of another kind.
    Dict,
    /// A function that returns its first argument, or an empty list: `set`, `torch.Size`, `torch.device`.
    First,
    /// A function that returns bytes.
    Bytes,
    /// A class that dictionaries use for absent values, such as `list`.
    Factory,
    /// `torch._utils._rebuild_tensor_v2`.
    Tensor,
    /// `torch._utils._rebuild_parameter`, around a tensor.
    Parameter,
    /// A class of storages; those of complex and quantized values have no encoding.
    Storage(Option<Encoding>),
    /// `torch.float32` and others.
    Dtype(&'static str),
}

const DTYPES: [&str; 17] = [
    "torch.float64",
    "torch.float32",
    "torch.float16",
    "torch.bfloat16",
    "torch.float8_e4m3fn",
    "torch.float8_e5m2",
    "torch.complex64",
    "torch.complex128",
    "torch.int64",
    "torch.int32",
    "torch.int16",
    "torch.int8",
    "torch.uint64",
    "torch.uint32",
    "torch.uint16",
    "torch.uint8",
    "torch.bool",
];

impl Global {
    fn of(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict" | "defaultdict") => Global::Dict,
            ("builtins" | "__builtin__", "set" | "frozenset") => Global::First,
            ("builtins" | "__builtin__", "bytes") | ("_codecs", "encode") => Global::Bytes,
            ("builtins" | "__builtin__", "list" | "dict" | "int" | "long" | "float") => Global::Factory,
            ("torch", "Size" | "device") => Global::First,
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Global::Tensor,
            ("torch._utils", "_rebuild_parameter") => Global::Parameter,
            ("torch.storage", "UntypedStorage") => Global::Storage(Some(Encoding::U8)),
            ("torch", name) => match name.strip_suffix("Storage") {
                Some(kind) => Global::Storage(Self::encoding(kind)?),
                None => Global::Dtype(DTYPES.into_iter().find(|d| d.strip_prefix("torch.") == Some(name))?),
            },
            _ => return None,
        })
    }

    /// The encoding of a kind of storages; `None` if there is no such kind.
    fn encoding(kind: &str) -> Option<Option<Encoding>> {
        Some(Some(match kind {
            "Double" => Encoding::F64,
            "Float" => Encoding::F32,
            "Half" => Encoding::F16,
            "BFloat16" => Encoding::Bf16,
            "Long" => Encoding::I64,
            "Int" => Encoding::I32,
            "Short" => Encoding::I16,
            "Char" => Encoding::I8,
            "Byte" | "Untyped" => Encoding::U8,
            "Bool" => Encoding::Bool,
            "ComplexFloat" | "ComplexDouble" | "QInt8" | "QUInt8" | "QInt32" | "QUInt4x2" | "QUInt2x4" => {
                return Some(None);
            }
            _ => return None,
        }))
    }
}

/// A pickle that was read.
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    /// Its result.
    pub root: Id,
    /// Its length in bytes.
    pub length: usize,
}

impl<'a> Pickle<'a> {
    /// Reads the pickle at the beginning of `bytes`.
    pub fn read(bytes: &'a [u8]) -> Result<Self, String> {
        let bytes = &bytes[..bytes.len().min(LONGEST)];
        let mut machine = Machine {
            bytes,
            at: 0,
            budget: MOST.min(1024 + bytes.len() / 2),
            values: vec![Value::None, Value::Bool(false), Value::Bool(true), Value::List(Vec::new())],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
        };
        let root = machine.run()?;
        Ok(Pickle { values: machine.values, root, length: machine.at })
    }

    pub fn get(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    /// All values, also those that the result does not contain.
    pub fn values(&self) -> &[Value<'a>] {
        &self.values
    }

    /// The elements of a list or tuple; none of anything else.
    pub fn list(&self, id: Id) -> &[Id] {
        match self.get(id) {
            Value::List(list) => list,
            _ => &[],
        }
    }
}

/// The constants, which are made once.
const NONE: Id = 0;
const FALSE: Id = 1;
const TRUE: Id = 2;
const EMPTY: Id = 3;

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Values that may still be made.
    budget: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack at the marks.
    marks: Vec<u32>,
    memo: Vec<Id>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let [code] = self.array()?;
            match code {
                b'.' => return self.pop(),
                0x80 => {
                    let [version] = self.array()?;
                    if !(2..=5).contains(&version) {
                        return Err(self.broken(&format!("has protocol {version}, wanted 2 to 5")));
                    }
                }
                0x95 => drop(self.array::<8>()?),
                b'N' => self.stack.push(NONE),
                0x88 => self.stack.push(TRUE),
                0x89 => self.stack.push(FALSE),
                b')' => self.stack.push(EMPTY),
                b'J' | b'K' | b'M' | b'G' | 0x8a | 0x8b => self.number(code)?,
                b'X' | 0x8c | 0x8d | b'T' | b'U' | b'B' | b'C' | 0x8e | 0x96 => self.text(code)?,
                b'0' | b'1' | b'2' | b'(' => self.stacked(code)?,
                b'q' | b'r' | 0x94 | b'h' | b'j' => self.memory(code)?,
                b'c' | 0x93 | b'Q' | b'R' | 0x81 | b'b' => self.object(code)?,
                _ => self.container(code)?,
            }
        }
    }

    fn number(&mut self, code: u8) -> Result<(), String> {
        let value = match code {
            b'J' => Value::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Value::Int(self.array::<1>()?[0].into()),
            b'M' => Value::Int(u16::from_le_bytes(self.array()?).into()),
            b'G' => Value::Float(f64::from_be_bytes(self.array()?)),
            _ => {
                let length = self.length(if code == 0x8a { 1 } else { 4 })?;
                let digits = self.take(length)?;
                let negative = digits.last().is_some_and(|&b| b >= 0x80);
                let mut all = [if negative { 0xff } else { 0 }; 8];
                match all.get_mut(..digits.len()) {
                    Some(low) => {
                        low.copy_from_slice(digits);
                        Value::Int(i64::from_le_bytes(all))
                    }
                    None => Value::Long(digits),
                }
            }
        };
        self.push(value)
    }

    fn text(&mut self, code: u8) -> Result<(), String> {
        let length = self.length(match code {
            0x8c | b'U' | b'C' => 1,
            b'X' | b'T' | b'B' => 4,
            _ => 8,
        })?;
        let bytes = self.take(length)?;
        let value = match (code, std::str::from_utf8(bytes)) {
            (b'B' | b'C' | 0x8e | 0x96, _) => Value::Bytes,
            (_, Ok(text)) => Value::Text(text),
            // What Python 2 called a string.
            (b'T' | b'U', _) => Value::Bytes,
            _ => return Err(self.broken("holds a text that is not in UTF-8")),
        };
        self.push(value)
    }

    fn stacked(&mut self, code: u8) -> Result<(), String> {
        match code {
            b'(' => self.marks.push(self.stack.len() as u32),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.marked()?),
            _ => {
                let top = self.top()?;
                self.stack.push(top);
            }
        }
        Ok(())
    }

    fn memory(&mut self, code: u8) -> Result<(), String> {
        let at = match code {
            b'q' | b'h' => usize::from(self.array::<1>()?[0]),
            b'r' | b'j' => u32::from_le_bytes(self.array()?) as usize,
            _ => self.memo.len(),
        };
        if matches!(code, b'h' | b'j') {
            let known = self.memo.get(at).filter(|&&id| id != UNSET);
            let id =
                *known.ok_or_else(|| self.broken(&format!("refers to its value {at}, which it lacks")))?;
            self.stack.push(id);
            return Ok(());
        }
        // Python numbers the values from 0, so that the memo is never longer than the pickle.
        if at > self.bytes.len() {
            return Err(self.broken(&format!("numbers a value {at}")));
        }
        if self.memo.len() <= at {
            self.memo.resize(at + 1, UNSET);
        }
        self.memo[at] = self.top()?;
        Ok(())
    }

    fn object(&mut self, code: u8) -> Result<(), String> {
        match code {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.value(module), self.value(name)) {
                    (&Value::Text(module), &Value::Text(name)) => self.global(module, name),
                    _ => Err(self.broken("names a global by something else than texts")),
                }
            }
            b'Q' => {
                let tuple = self.pop()?;
                self.push(Value::Storage(tuple))
            }
            b'b' => {
                // The attributes of a dictionary, such as the versions of modules (`_metadata`).
                self.pop()?;
                let object = self.top()?;
                match self.value(object) {
                    Value::Dict(_) => Ok(()),
                    _ => Err(format!("sets attributes of an object, which ett does not; {REMEDY}")),
                }
            }
            _ => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(function, arguments)
            }
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<(), String> {
        match Global::of(module, name) {
            Some(known) => self.push(Value::Global(known)),
            None => {
                let name: String = format!("{module}.{name}").escape_debug().take(100).collect();
                Err(format!("needs `{name}`, which ett does not call; {REMEDY}"))
            }
        }
    }

    fn call(&mut self, function: Id, arguments: Id) -> Result<(), String> {
        let (&Value::Global(function), Value::List(list)) = (self.value(function), self.value(arguments))
        else {
            return Err(self.broken("calls what is not a function"));
        };
        let first = list.first().copied();
        match (function, first) {
            (Global::Dict, Some(pairs)) => {
                let pairs = self.pairs(pairs);
                self.spend(pairs.len())?;
                self.push(Value::Dict(pairs))
            }
            (Global::Dict, None) => self.push(Value::Dict(Vec::new())),
            (Global::Bytes, _) => self.push(Value::Bytes),
            (Global::Tensor, _) if list.len() >= 4 => self.push(Value::Tensor(arguments)),
            (Global::First | Global::Parameter, Some(first)) => {
                self.stack.push(first);
                Ok(())
            }
            (Global::First, None) => self.push(Value::List(Vec::new())),
            _ => Err(self.broken(&format!("calls {function:?} with {} arguments", list.len()))),
        }
    }

    /// The pairs of which Python 2 makes an ordered dictionary; none if the argument is something else.
    fn pairs(&self, of: Id) -> Vec<(Id, Id)> {
        let Value::List(list) = self.value(of) else { return Vec::new() };
        let pair = |&id: &Id| match self.value(id) {
            Value::List(pair) => pair.first().copied().zip(pair.get(1).copied()),
            _ => None,
        };
        list.iter().take(self.budget.saturating_add(1)).filter_map(pair).collect()
    }

    fn container(&mut self, code: u8) -> Result<(), String> {
        match code {
            b']' | 0x8f => self.push(Value::List(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            0x85..=0x87 => {
                let elements = self.popped(usize::from(code - 0x84))?;
                self.push(Value::List(elements))
            }
            b't' | b'l' | 0x91 => {
                let elements = self.marked()?;
                self.push(Value::List(elements))
            }
            b'd' => {
                let items = self.items()?;
                self.push(Value::Dict(items))
            }
            b'a' | b'e' | 0x90 => {
                let elements = if code == b'a' { self.popped(1)? } else { self.marked()? };
                let list = self.top()?;
                match self.values.get_mut(list as usize) {
                    Some(Value::List(list)) if list.is_empty() => *list = elements,
                    Some(Value::List(list)) => list.extend(elements),
                    _ => return Err(self.broken("appends to what is not a list")),
                }
                Ok(())
            }
            b's' | b'u' => {
                if code == b's' {
                    let start = self.stack.len().saturating_sub(2);
                    self.marks.push(start.max(self.fence()) as u32);
                }
                let items = self.items()?;
                let dict = self.top()?;
                match self.values.get_mut(dict as usize) {
                    Some(Value::Dict(dict)) if dict.is_empty() => *dict = items,
                    Some(Value::Dict(dict)) => dict.extend(items),
                    _ => return Err(self.broken("sets an item of what is not a dictionary")),
                }
                Ok(())
            }
            _ => Err(self.broken(&format!("has the operation {code:#04x}, which ett does not know"))),
        }
    }

    /// What is above the last mark, as keys and values.
    fn items(&mut self) -> Result<Vec<(Id, Id)>, String> {
        let all = self.marked()?;
        if all.len() % 2 != 0 {
            return Err(self.broken("has a key without a value"));
        }
        Ok(all.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }

    /// What is above the last mark, which is removed.
    fn marked(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or_else(|| self.broken("lacks a mark"))?;
        Ok(self.stack.split_off((mark as usize).min(self.stack.len())))
    }

    /// The height of the stack at the last mark.
    fn fence(&self) -> usize {
        self.marks.last().map_or(0, |&mark| mark as usize)
    }

    fn popped(&mut self, count: usize) -> Result<Vec<Id>, String> {
        let start = self.stack.len().checked_sub(count).filter(|&start| start >= self.fence());
        let start = start.ok_or_else(|| self.broken("takes a value that it has not made"))?;
        Ok(self.stack.split_off(start))
    }

    fn pop(&mut self) -> Result<Id, String> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn top(&self) -> Result<Id, String> {
        let top = self.stack.last().filter(|_| self.stack.len() > self.fence());
        top.copied().ok_or_else(|| self.broken("takes a value that it has not made"))
    }

    fn value(&self, id: Id) -> &Value<'a> {
        self.values.get(id as usize).unwrap_or(&Value::None)
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), String> {
        self.spend(1)?;
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
        Ok(())
    }

    fn spend(&mut self, values: usize) -> Result<(), String> {
        let left = self.budget.checked_sub(values);
        self.budget = left.ok_or_else(|| {
            format!("has more values than its size allows, or than {MOST}, besides its tensors; {REMEDY}")
        })?;
        Ok(())
    }

    fn length(&mut self, bytes: usize) -> Result<usize, String> {
        let mut all = [0; 8];
        let taken = self.take(bytes)?;
        all[..bytes].copy_from_slice(taken);
        usize::try_from(u64::from_le_bytes(all)).map_err(|_| self.broken("ends early"))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or_else(|| self.broken("ends early"))?;
        self.at += end + 1;
        std::str::from_utf8(&rest[..end]).map_err(|_| self.broken("has a name that is not in UTF-8"))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let taken = self.bytes[self.at..].first_chunk().copied();
        let taken = taken.ok_or_else(|| self.broken("ends early"))?;
        self.at += N;
        Ok(taken)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let taken = self.bytes[self.at..].get(..length).ok_or_else(|| self.broken("ends early"))?;
        self.at += length;
        Ok(taken)
    }

    fn broken(&self, why: &str) -> String {
        format!(
            "is not a PyTorch file that ett can read (its pickle {why}, at byte {}); fetch or copy it again",
            self.at
        )
    }
}
