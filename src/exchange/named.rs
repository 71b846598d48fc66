//! The tensors of a file under names of ours, and their comparison with an architecture.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::files::{self, FileWriter};
use crate::formats::{Archive, Encoding, Info, Selection, write_safetensors};
use crate::io::weights::misfit;

/// A tensor of an architecture: its name and its shape.
pub(super) type Shape = (String, Vec<usize>);

/// Tensors of a file, some of them under other names.
pub(super) struct Named {
    archive: Arc<Archive>,
    /// From our names to the file's.
    names: BTreeMap<String, String>,
}

impl Named {
    /// All tensors of a file.
    pub fn whole(archive: Archive) -> Self {
        let names = archive.tensors().keys().map(|name| (name.clone(), name.clone())).collect();
        Named { archive: Arc::new(archive), names }
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    fn info(&self, name: &str) -> Option<&Info> {
        self.archive.tensors().get(self.names.get(name)?)
    }

    /// The shape of a tensor; `None` if there is no such tensor.
    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        Some(&self.info(name)?.dims)
    }

    /// The encoding of a tensor; `None` if there is no such tensor.
    pub fn encoding(&self, name: &str) -> Option<Encoding> {
        Some(self.info(name)?.encoding)
    }

    /// The value of a tensor with a single one.
    pub fn scalar(&self, name: &str) -> Result<Option<f64>> {
        match self.names.get(name) {
            Some(name) if self.archive.tensors().get(name).is_some_and(|info| info.count() == 1) => {
                Ok(self.archive.read(name)?.values.first().copied())
            }
            _ => Ok(None),
        }
    }

    /// The tensors to which `name` gives a name; the others stay here.
    pub fn take(&mut self, name: impl Fn(&str) -> Option<String>) -> Named {
        let (mut taken, mut left) = (BTreeMap::new(), BTreeMap::new());
        for (old, file) in std::mem::take(&mut self.names) {
            match name(&old) {
                Some(new) => taken.insert(new, file),
                None => left.insert(old, file),
            };
        }
        self.names = left;
        Named { archive: self.archive.clone(), names: taken }
    }

    /// The tensors whose names begin with a prefix, without it; the others stay here.
    pub fn take_prefixed(&mut self, prefix: &str) -> Named {
        self.take(|name| name.strip_prefix(prefix).map(String::from))
    }

    /// All of them; errors name `path`.
    pub fn selection(&self, path: &Path) -> Selection {
        let mut all = Selection::new(path);
        for (name, file) in &self.names {
            all.add(name, &self.archive, file);
        }
        all
    }

    /// Those that `names` gives a name, under it; errors name `path`.
    pub fn renamed(&self, path: &Path, names: &BTreeMap<String, String>) -> Selection {
        let mut all = Selection::new(path);
        for (name, file) in &self.names {
            if let Some(public) = names.get(name) {
                all.add(public, &self.archive, file);
            }
        }
        all
    }

    /// What is wrong with the tensors of an architecture here: missing ones, misshapen ones, ones without floats. `prefix`
    /// stands before their names in messages.
    pub fn misfits(&self, want: &[Shape], prefix: &str) -> Vec<String> {
        let found = |name: &str| self.info(name).map(|info| (info.dims.as_slice(), info.encoding));
        want.iter().filter_map(|shape| problem(shape, found(&shape.0), prefix)).collect()
    }

    /// The tensors that no architecture in `known` has.
    pub fn unknown(&self, known: &[&[Shape]], prefix: &str) -> Vec<String> {
        let known: BTreeSet<&str> =
            known.iter().flat_map(|shapes| shapes.iter().map(|(name, _)| name.as_str())).collect();
        self.names().filter(|name| !known.contains(name)).map(|n| format!("unknown `{prefix}{n}`")).collect()
    }
}

/// What is wrong with a tensor, given the shape and the encoding that were found.
fn problem((name, dims): &Shape, found: Option<(&[usize], Encoding)>, prefix: &str) -> Option<String> {
    match found {
        None => Some(format!("missing `{prefix}{name}` {dims:?}")),
        Some((have, _)) if have != dims => Some(format!("`{prefix}{name}` is {have:?}, wanted {dims:?}")),
        Some((_, stored)) if !stored.is_float() => {
            Some(format!("`{prefix}{name}` has type {}, wanted floats", stored.name()))
        }
        Some(_) => None,
    }
}

/// What is wrong with the tensors of an architecture in a selection, like [`Named::misfits`].
pub(super) fn misfits(all: &Selection, want: &[Shape]) -> Vec<String> {
    let found = |name: &str| Some((all.dims(name)?, all.encoding(name).ok()?));
    want.iter().filter_map(|shape| problem(shape, found(&shape.0), "")).collect()
}

/// An error that lists the problems, if there are any.
pub(super) fn no_problems(path: &Path, what: &str, problems: Vec<String>) -> Result<()> {
    match problems.is_empty() {
        true => Ok(()),
        false => Err(Error::weights(path, misfit(what, problems))),
    }
}

/// "3 tensors", "1 tensor".
pub(super) fn tensors(count: usize) -> String {
    format!("{count} tensor{}", if count == 1 { "" } else { "s" })
}

/// Writes tensors of a selection as a safetensors file; `None` keeps the encoding of each.
pub(super) fn write_all(
    path: &Path,
    from: &Selection,
    wanted: impl Fn(&str) -> bool,
    encoding: Option<Encoding>,
) -> Result<()> {
    let names = from.tensors().map(|(name, _)| name).filter(|name| wanted(name));
    let one = |name: &str| {
        let float = from.encoding(name)?.is_float();
        from.tensor(name, name.into(), encoding.filter(|_| float))
    };
    let tensors = names.map(one).collect::<Result<_>>()?;
    create(path, |file| write_safetensors(file, tensors, HashMap::new()))
}

/// Writes a new file; one that exists is not overwritten.
pub(super) fn create(path: &Path, fill: impl FnOnce(&mut FileWriter) -> Result<()>) -> Result<()> {
    if path.is_file() {
        return Err(Error::data(path, "exists already and is not overwritten; name a new file"));
    }
    files::replace(path, fill).map(drop)
}
