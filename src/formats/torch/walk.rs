//! From nested values to tensors under names.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use serde_json::{Map, Number, Value as Json};

use super::REMEDY;
use super::pickle::{Global, Id, Pickle, Value};
use super::place::Placed;
use super::storages::{TorchFile, size, storage};
use crate::formats::{Contents, Info, MOST_DIMS};

/// Bytes of all names together, and a little for each value. Dictionaries that contain one another, or one in many
/// places, would otherwise have names without end.
const NAMES: usize = 64 << 20;
/// What a tensor, or a list or dictionary on the way to one, costs besides its name.
const EACH: usize = 256;
/// Bytes of what a file says besides its tensors.
const ABOUT: usize = 1 << 20;
/// What an entry of a dictionary costs there besides its name.
const ENTRY: usize = 32;
/// Values within values of it.
const DEPTH: usize = 32;

/// The tensors of a file, and the rest of its values.
pub(super) fn contents(file: &TorchFile) -> Result<Contents, String> {
    let mut about = About { pickle: &file.pickle, left: ABOUT };
    let about = about.json(file.pickle.root, 0).unwrap_or_default();
    Ok(Contents { tensors: tensors(file)?, about })
}

fn tensors(file: &TorchFile) -> Result<BTreeMap<String, Info>, String> {
    let pickle = &file.pickle;
    let mut left = NAMES;
    let mut spend = |bytes: usize| {
        left = left.checked_sub(bytes).ok_or_else(|| format!("its values contain one another; {REMEDY}"))?;
        Ok::<_, String>(())
    };
    let mut tensors = BTreeMap::new();
    let mut pending = vec![(pickle.root, String::new())];
    while let Some((id, path)) = pending.pop() {
        let mut visit = |id: Id, key: &dyn Fn() -> String| {
            if !matches!(pickle.get(id), Value::List(_) | Value::Dict(_) | Value::Tensor(_)) {
                return spend(1);
            }
            let key = key();
            spend(path.len() + key.len() + EACH)?;
            let path = if path.is_empty() { key } else { format!("{path}.{key}") };
            pending.push((id, path));
            Ok(())
        };
        match pickle.get(id) {
            Value::List(list) => {
                for (i, &id) in list.iter().enumerate() {
                    visit(id, &|| i.to_string())?;
                }
            }
            Value::Dict(items) => {
                for (i, &(name, id)) in items.iter().enumerate() {
                    visit(id, &|| key(pickle, name, i).into_owned())?;
                }
            }
            Value::Tensor(arguments) => {
                // A file may hold a tensor alone.
                let name = if path.is_empty() { "tensor".into() } else { path };
                let info = tensor(file, *arguments).map_err(|why| format!("its tensor `{name}` {why}"))?;
                spend(2 * size_of_val(&*info.dims))?;
                match tensors.entry(name) {
                    Entry::Vacant(place) => drop(place.insert(info)),
                    Entry::Occupied(old) => return Err(format!("has two tensors `{}`; {REMEDY}", old.key())),
                }
            }
            _ => {}
        }
    }
    Ok(tensors)
}

/// A key of a dictionary as a part of a name; one that is neither a text nor a number is named by its position.
fn key<'a>(pickle: &Pickle<'a>, id: Id, position: usize) -> Cow<'a, str> {
    match pickle.get(id) {
        Value::Text(text) => Cow::Borrowed(text),
        Value::Int(n) => n.to_string().into(),
        Value::Float(x) => x.to_string().into(),
        Value::Bool(b) => b.to_string().into(),
        _ => format!("#{position}").into(),
    }
}

/// Finds the bytes of a tensor from the arguments with which PyTorch would build it.
fn tensor(file: &TorchFile, arguments: Id) -> Result<Info, String> {
    let pickle = &file.pickle;
    let unknown = || "is described in an unknown way".to_string();
    let &[held, offset, dims, strides, ..] = pickle.list(arguments) else { return Err(unknown()) };
    let &Value::Storage(held) = pickle.get(held) else { return Err(unknown()) };
    let held = storage(pickle, held)?;
    let within = file.storages.get(held.key);
    let within = within.ok_or_else(|| format!("needs the storage `{}`, which is missing", held.key))?;
    if held.encoding.bytes(held.count) != Some(within.len()) {
        return Err(format!(
            "needs a storage of {} values of type {}, but `{}` has {} bytes",
            held.count,
            held.encoding.name(),
            held.key,
            within.len()
        ));
    }
    let sizes = |id| {
        let list = pickle.list(id);
        let sizes = list.iter().map(|&n| size(pickle, n)).collect::<Option<Vec<_>>>();
        sizes.filter(|_| matches!(pickle.get(id), Value::List(_)) && list.len() <= MOST_DIMS)
    };
    let (dims, strides) = (sizes(dims).ok_or_else(unknown)?, sizes(strides).ok_or_else(unknown)?);
    let offset = size(pickle, offset).and_then(|n| n.checked_add(held.part.start)).ok_or_else(unknown)?;
    Placed { encoding: held.encoding, dims, strides, offset, end: held.part.end, storage: within }.info()
}

/// What a file says besides its tensors.
struct About<'p, 'a> {
    pickle: &'p Pickle<'a>,
    /// Bytes that may still be copied.
    left: usize,
}

impl About<'_, '_> {
    /// A value in JSON; `None` for what is left out: tensors, bytes, and what is too long or too deep.
    fn json(&mut self, id: Id, depth: usize) -> Option<Json> {
        self.spend(8)?;
        Some(match self.pickle.get(id) {
            Value::None => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Int(n) => Json::from(*n),
            Value::Float(x) => Number::from_f64(*x).map_or(Json::Null, Json::Number),
            Value::Text(text) => {
                self.spend(text.len())?;
                Json::from(*text)
            }
            Value::Long(digits) => {
                self.spend(2 * digits.len())?;
                let digits: String = digits.iter().rev().map(|b| format!("{b:02x}")).collect();
                Json::from(format!("0x{digits}"))
            }
            Value::Global(Global::Dtype(name)) => Json::from(*name),
            Value::List(list) if depth < DEPTH => {
                let all = list.iter().map(|&id| self.json(id, depth + 1));
                let all = all.collect::<Option<Vec<_>>>()?;
                Json::Array(all)
            }
            Value::Dict(items) if depth < DEPTH => self.dict(items, depth)?,
            _ => return None,
        })
    }

    /// A dictionary without its tensors. Short values come first, so that long ones do not take their place.
    fn dict(&mut self, items: &[(Id, Id)], depth: usize) -> Option<Json> {
        let mut map = Map::new();
        for long in [false, true] {
            for (i, &(name, id)) in items.iter().enumerate() {
                if self.spend(1).is_none() {
                    break;
                }
                if matches!(self.pickle.get(id), Value::List(_) | Value::Dict(_)) != long {
                    continue;
                }
                let name = key(self.pickle, name, i);
                if let Some(value) =
                    self.json(id, depth + 1).filter(|_| self.spend(name.len() + ENTRY).is_some())
                {
                    map.insert(name.into_owned(), value);
                }
            }
        }
        (!map.is_empty() || items.is_empty()).then_some(Json::Object(map))
    }

    fn spend(&mut self, bytes: usize) -> Option<()> {
        self.left = self.left.checked_sub(bytes)?;
        Some(())
    }
}
