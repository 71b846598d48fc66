//! Tensors of one file or several under the names of this crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Archive, Encoding, FileTensor};
use crate::error::{Error, Result};
use crate::nn::HostTensor;

/// What is done to the values of a tensor when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The rows of every head are brought from llama.cpp's order, which rotates neighbours, into the halves that Hugging
    /// Face rotates. The tensor has this many heads.
    Halves {
        /// Number of heads.
        heads: usize,
    },
}

impl Change {
    fn apply(self, t: &mut HostTensor) {
        match self {
            Change::None => {}
            Change::Halves { heads } => {
                let all = t.dims.first().copied().unwrap_or(0);
                let rows = all / heads.max(1);
                let width = t.values.len() / all.max(1);
                let old = t.values.clone();
                for head in 0..heads {
                    for row in 0..rows {
                        // Row 2 i + s of the file is row i + s rows / 2.
                        let from = head * rows + row;
                        let to = head * rows + row / 2 + row % 2 * (rows / 2);
                        t.values[to * width..(to + 1) * width]
                            .copy_from_slice(&old[from * width..(from + 1) * width]);
                    }
                }
            }
        }
    }
}

struct Chosen {
    archive: Arc<Archive>,
    name: String,
    dims: Vec<usize>,
    change: Change,
}

/// Tensors of one file or several under the names of this crate. Nothing is read before it is asked for.
pub struct Selection {
    path: PathBuf,
    tensors: BTreeMap<String, Chosen>,
}

impl Selection {
    /// An empty one; errors name `path`.
    pub fn new(path: &Path) -> Self {
        Selection { path: path.into(), tensors: BTreeMap::new() }
    }

    /// All tensors of a file under their own names.
    pub fn whole(archive: Archive) -> Self {
        let mut all = Selection::new(archive.path());
        let archive = Arc::new(archive);
        for name in archive.tensors().keys() {
            all.add(name, &archive, name);
        }
        all
    }

    /// The path in error messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds the tensor `name` of a file, which must have it, as `public`.
    pub fn add(&mut self, public: &str, archive: &Arc<Archive>, name: &str) {
        self.add_changed(public, archive, name, Change::None);
    }

    /// The same with a change.
    pub fn add_changed(&mut self, public: &str, archive: &Arc<Archive>, name: &str, change: Change) {
        let dims = archive.tensors().get(name).map_or(Vec::new(), |info| info.dims.clone());
        let chosen = Chosen { archive: archive.clone(), name: name.into(), dims, change };
        self.tensors.insert(public.into(), chosen);
    }

    /// Adds all tensors of another selection.
    pub fn extend(&mut self, other: Selection) {
        self.tensors.extend(other.tensors);
    }

    /// Leaves out the tensors that `keep` refuses.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| keep(name));
    }

    /// Names and shapes, in order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t.dims.as_slice()))
    }

    /// The shape of a tensor; `None` if there is no such tensor.
    pub fn dims(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.dims.as_slice())
    }

    fn chosen(&self, name: &str) -> Result<&Chosen> {
        self.tensors.get(name).ok_or_else(|| Error::weights(&self.path, format!("missing `{name}`")))
    }

    /// How the values of a tensor are stored.
    pub fn encoding(&self, name: &str) -> Result<Encoding> {
        let t = self.chosen(name)?;
        let info = t.archive.tensors().get(&t.name);
        info.map(|info| info.encoding)
            .ok_or_else(|| Error::weights(t.archive.path(), format!("missing `{}`", t.name)))
    }

    /// The stored bytes of a tensor, row-major; `None` if its values are changed or not stored in this order.
    pub fn raw(&self, name: &str) -> Result<Option<(Encoding, &[u8])>> {
        let t = self.chosen(name)?;
        match t.change {
            Change::None => t.archive.raw(&t.name),
            _ => Ok(None),
        }
    }

    /// Reads a tensor, widened to f64.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let t = self.chosen(name)?;
        let mut read = t.archive.read(&t.name)?;
        t.change.apply(&mut read);
        Ok(read)
    }

    /// A tensor as it is written to another file, as `name_there`; `None` keeps its encoding, except that quantized values become
    /// F32. Values that are not finite, or are not in the new encoding, are an error when it is written.
    pub fn tensor(
        &self,
        name: &str,
        name_there: String,
        encoding: Option<Encoding>,
    ) -> Result<FileTensor<'_>> {
        let rows = self.dims(name).and_then(|dims| dims.first().copied()).unwrap_or(1);
        self.tensor_of_rows(name, name_there, encoding, rows)
    }

    /// The same with at least as many rows as there are; each that is added is the mean of all others.
    pub fn tensor_of_rows(
        &self,
        name: &str,
        name_there: String,
        encoding: Option<Encoding>,
        rows: usize,
    ) -> Result<FileTensor<'_>> {
        let stored = self.encoding(name)?;
        let encoding = encoding.unwrap_or(match stored {
            Encoding::Q4_1 | Encoding::Q8_0 => Encoding::F32,
            other => other,
        });
        let mut dims = self.chosen(name)?.dims.clone();
        let more = dims.first().map_or(0, |&have| rows.saturating_sub(have));
        if let Some(first) = dims.first_mut() {
            *first += more;
        }
        let name = name.to_string();
        let bytes = Box::new(move || self.encoded(&name, encoding, more));
        Ok(FileTensor { name: name_there, dims, encoding, bytes })
    }

    fn encoded(&self, name: &str, encoding: Encoding, more: usize) -> Result<Vec<u8>> {
        let fail = |n: usize, what: &str| {
            Err(Error::weights(&self.path, format!("`{name}` has {n} values that are not finite{what}")))
        };
        if let (Some((stored, bytes)), 0) = (self.raw(name)?, more)
            && stored == encoding
        {
            return match encoding.count_not_finite(bytes).unwrap_or(0) {
                0 => Ok(bytes.to_vec()),
                n => fail(n, "; use weights from an earlier save"),
            };
        }
        let mut t = self.read(name)?;
        match t.values.iter().filter(|v| !v.is_finite()).count() {
            0 => {}
            n => return fail(n, "; use weights from an earlier save"),
        }
        add_mean_rows(&mut t, more);
        let bytes = encoding.encode(&t.values)?;
        match encoding.count_not_finite(&bytes).unwrap_or(0) {
            0 => Ok(bytes),
            n => fail(n, &format!(" in {}; choose a type with a larger range", encoding.name())),
        }
    }
}

/// Appends rows that are the mean of all others.
fn add_mean_rows(t: &mut HostTensor, more: usize) {
    let rows = t.dims.first().copied().unwrap_or(0);
    if more == 0 || rows == 0 {
        return;
    }
    let width = t.values.len() / rows;
    let mut mean = vec![0.0; width];
    for row in t.values.chunks_exact(width.max(1)) {
        mean.iter_mut().zip(row).for_each(|(m, v)| *m += v / rows as f64);
    }
    (0..more).for_each(|_| t.values.extend_from_slice(&mean));
    t.dims[0] += more;
}
