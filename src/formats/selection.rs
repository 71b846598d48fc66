//! Tensors of one file or several under the names of this crate.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Archive, Encoding};
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
    /// The input channels of a convolution are reversed: RGB for BGR.
    ReversedInputs,
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
            Change::ReversedInputs => {
                let &[_, inputs, ref area @ ..] = &*t.dims else { return };
                let area = area.iter().product::<usize>();
                for output in t.values.chunks_exact_mut((inputs * area).max(1)) {
                    let old = output.to_vec();
                    for (i, channel) in old.chunks_exact(area.max(1)).rev().enumerate() {
                        output[i * area..(i + 1) * area].copy_from_slice(channel);
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
}
