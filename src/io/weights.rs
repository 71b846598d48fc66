//! Reading and writing weights: safetensors under the public names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::History;
use crate::backend::{DType, Precision};
use crate::error::{Error, Result};
use crate::files::{self, FileWriter, replace};
use crate::formats::{Archive, Encoding, FileTensor, Selection, in_file_order, write_safetensors};
use crate::nn::{HostTensor, Params, Stored};

/// The only key used in the format's metadata.
const NOTE: &str = "ett";
/// Version of the names, shapes and layouts of weights in files.
const FORMAT: u32 = 1;

/// What the header of a file of weights says about them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// Files of version 1 do not all have it.
    #[serde(default = "first")]
    format: u32,
    /// Where the weights come from.
    #[serde(flatten)]
    pub history: History,
    /// Groups that are left out since only training needs them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without: Vec<String>,
}

/// The first version.
fn first() -> u32 {
    1
}

impl Note {
    /// The note of weights with this history, for a file without the groups `without`.
    pub fn new(history: &History, without: &[&str]) -> Self {
        let without = without.iter().map(|g| g.to_string()).collect();
        Note { format: FORMAT, history: history.clone(), without }
    }
}

/// A file of weights with its note.
pub struct TensorFile {
    archive: Archive,
    note: Option<Note>,
}

impl TensorFile {
    /// Opens a file and reads its header. Fails if it says that it has a newer format than this program reads.
    pub fn open(path: &Path) -> Result<Self> {
        let archive = Archive::open(path)?;
        let note = archive.about().get(NOTE).and_then(Value::as_str);
        let note = note.and_then(|text| serde_json::from_str::<Value>(text).ok());
        let format = note.as_ref().and_then(|note| note["format"].as_u64()).unwrap_or(first().into());
        files::check_format(path, format.try_into().unwrap_or(u32::MAX), first()..=FORMAT)?;
        let note = note.and_then(|note| serde_json::from_value(note).ok());
        Ok(TensorFile { archive, note })
    }

    /// Names of the tensors with encoding and shape.
    pub fn tensors(&self) -> BTreeMap<String, (Encoding, Vec<usize>)> {
        let all = self.archive.tensors().iter();
        all.map(|(name, info)| (name.clone(), (info.encoding, info.dims.clone()))).collect()
    }

    /// How the values of a tensor are stored, if there is such a tensor.
    pub fn encoding(&self, name: &str) -> Option<Encoding> {
        self.archive.tensors().get(name).map(|info| info.encoding)
    }

    /// The note in the file's header, if it has one.
    pub fn note(&self) -> Option<&Note> {
        self.note.as_ref()
    }

    /// The file, in any format.
    pub fn archive(&self) -> &Archive {
        &self.archive
    }

    /// The file without its note.
    pub fn into_archive(self) -> Archive {
        self.archive
    }

    /// Reads a tensor, widened to f64.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        self.archive.read(name)
    }

    /// Reads every tensor, widened to f64.
    pub fn read_all(&self) -> Result<BTreeMap<String, HostTensor>> {
        self.archive.tensors().keys().map(|name| Ok((name.clone(), self.read(name)?))).collect()
    }

    /// Like [`TensorFile::read`], but fails if a value is not finite.
    pub fn read_finite(&self, name: &str) -> Result<HostTensor> {
        let t = self.read(name)?;
        match not_finite(name, &t) {
            Some(what) => {
                let what = format!("{what}; continue from an earlier checkpoint");
                Err(Error::weights(self.archive.path(), what))
            }
            None => Ok(t),
        }
    }
}

/// Describes the non-finite values of a weight, if there are any.
fn not_finite(name: &str, t: &HostTensor) -> Option<String> {
    let bad = t.values.iter().filter(|v| !v.is_finite()).count();
    (bad > 0).then(|| format!("`{name}` has {bad} of {} values that are not finite", t.values.len()))
}

/// Reads every tensor of a safetensors file, widened to f64.
pub fn read_file(path: &Path) -> Result<BTreeMap<String, HostTensor>> {
    TensorFile::open(path)?.read_all()
}

/// The encoding in which parameters, moments and statistics of a run are written without loss.
pub fn lossless(prec: Precision) -> Encoding {
    match prec.acc {
        DType::F64 => Encoding::F64,
        _ => Encoding::F32,
    }
}

/// A tensor to be written. Its values are computed only when they are written, so that a file may be larger than the
/// host's memory.
pub struct Entry<'a> {
    /// Public name.
    pub name: String,
    /// Shape in files.
    pub dims: Vec<usize>,
    /// How the values are stored.
    pub encoding: Encoding,
    /// Computes the values, row-major.
    pub values: Box<dyn Fn() -> Result<Vec<f64>> + 'a>,
}

impl<'a> Entry<'a> {
    /// The tensor with its bytes.
    pub fn encoded(self) -> FileTensor<'a> {
        let (encoding, values) = (self.encoding, self.values);
        let bytes = Box::new(move || encoding.encode(&values()?));
        FileTensor { name: self.name, dims: self.dims, encoding, bytes }
    }
}

/// Writes tensors in the safetensors format, with a note in the header.
pub fn write_tensors(file: &mut FileWriter, entries: Vec<Entry>, note: Option<&Note>) -> Result<()> {
    write_encoded(file, entries.into_iter().map(Entry::encoded).collect(), note)
}

/// The same for tensors whose bytes are made by others.
pub(crate) fn write_encoded(
    file: &mut FileWriter,
    tensors: Vec<FileTensor>,
    note: Option<&Note>,
) -> Result<()> {
    let unwritable = |e: serde_json::Error| Error::data(file.path(), format!("cannot be written ({e})"));
    let note = note.map(serde_json::to_string).transpose().map_err(unwritable)?;
    let metadata: HashMap<_, _> = note.map(|note| (NOTE.to_string(), note)).into_iter().collect();
    write_safetensors(file, tensors, metadata)
}

/// Writes tensors to a safetensors file, see [`replace`].
pub fn write_file(path: &Path, tensors: &[(String, HostTensor, Encoding)]) -> Result<()> {
    let entries = tensors.iter().map(|(name, t, encoding)| Entry {
        name: name.clone(),
        dims: t.dims.clone(),
        encoding: *encoding,
        values: Box::new(|| Ok(t.values.clone())),
    });
    replace(path, |file| write_tensors(file, entries.collect(), None))?;
    Ok(())
}

/// Entries for one copy of all parameters that have it, under their public names with a prefix. Where ranks share the copy,
/// rank 0 gets the values, and all others [`attend`].
pub fn entries<'a>(params: &'a Params, stored: Stored, prefix: &str) -> Vec<Entry<'a>> {
    let encoding = lossless(params.precision());
    let kept = params.names().filter(|(_, group, _)| params.has(group, stored));
    let entry = |(name, _, dims): (&'a str, _, &[usize])| Entry {
        name: format!("{prefix}{name}"),
        dims: dims.to_vec(),
        encoding,
        values: Box::new(move || match params.sharing().rank {
            0 => Ok(params.read(name, stored)?.map_or(vec![], |t| t.values)),
            _ => params.attend(name, stored).map(|()| vec![]),
        }),
    };
    kept.map(entry).collect()
}

/// What a rank does that writes no files, while rank 0 writes these entries: asks for the values in the same order.
pub fn attend(entries: Vec<Entry>) -> Result<()> {
    let tensors = in_file_order(entries.into_iter().map(Entry::encoded).collect());
    tensors.into_iter().try_for_each(|t| (t.bytes)().map(drop))
}

/// One sentence with at most 20 of the problems.
pub(crate) fn misfit(what: &str, mut problems: Vec<String>) -> String {
    let more = problems.len().saturating_sub(20);
    problems.truncate(20);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    format!("does not fit {what}: {}", problems.join("; "))
}

/// What of a model is loaded from a file, and what may differ.
#[derive(Clone, Copy)]
pub struct Fit<'a> {
    /// The parameters to overwrite.
    pub wanted: &'a dyn Fn(&str) -> bool,
    /// Those of them that stay as they are where the file lacks them.
    pub optional: &'a dyn Fn(&str) -> bool,
    /// Those of which the file may hold only the first rows; the others stay as they are.
    pub grows: &'a dyn Fn(&str) -> bool,
}

impl Fit<'_> {
    /// All parameters as they are in the model.
    pub const EXACT: Fit<'static> = Fit { wanted: &|_| true, optional: &|_| false, grows: &|_| false };
}

/// Whether a tensor is the first rows of one with these dimensions.
pub(crate) fn fewer_rows(have: &[usize], want: &[usize]) -> bool {
    have.len() == want.len() && have.get(1..) == want.get(1..) && have.first() <= want.first()
}

/// Overwrites parameters. Missing, extra and misshapen tensors, values that are not floats and non-finite ones give a single
/// error that names them; then nothing is changed. Returns what differs from the file, in words.
pub fn load_selection(params: &Params, from: &Selection, fit: Fit) -> Result<Vec<String>> {
    let (mut problems, mut differences, mut known) = (Vec::new(), Vec::new(), BTreeSet::new());
    for (name, _, dims) in params.names().filter(|(name, ..)| (fit.wanted)(name)) {
        match from.dims(name) {
            None if (fit.optional)(name) => differences.push(format!("`{name}` {dims:?} is new")),
            None => problems.push(format!("missing `{name}` {dims:?}")),
            Some(have) if have == dims => {}
            Some(have) if (fit.grows)(name) && fewer_rows(have, dims) => {
                differences.push(format!("`{name}` has {} rows, {} are new", dims[0], dims[0] - have[0]));
            }
            Some(have) => problems.push(format!("`{name}` is {have:?}, wanted {dims:?}")),
        }
        known.insert(name);
    }
    problems
        .extend(from.tensors().filter(|(n, _)| !known.contains(n)).map(|(n, _)| format!("unknown `{n}`")));
    known.retain(|name| from.dims(name).is_some());
    if problems.is_empty() {
        for name in &known {
            problems.extend(unusable(from, name, params.precision())?);
        }
    }
    if !problems.is_empty() {
        return Err(Error::weights(from.path(), misfit("the model", problems)));
    }
    for name in &known {
        match from.raw(name)? {
            Some((encoding, bytes)) if let Some(dtype) = device_type(encoding, params.precision()) => {
                params.write_stored(name, Stored::Master, dtype, bytes)?;
            }
            _ => params.write_rows(name, Stored::Master, &from.read(name)?.values)?,
        }
    }
    params.refresh()?;
    Ok(differences)
}

/// The element type in which a device reads stored values, if it does. Only runs in f64, on the CPU, know F64.
fn device_type(encoding: Encoding, prec: Precision) -> Option<DType> {
    match encoding {
        Encoding::F64 if prec.acc == DType::F64 => Some(DType::F64),
        Encoding::F32 => Some(DType::F32),
        Encoding::Bf16 => Some(DType::Bf16),
        _ => None,
    }
}

/// Why a stored tensor cannot be a weight, if it cannot.
fn unusable(from: &Selection, name: &str, prec: Precision) -> Result<Option<String>> {
    let encoding = from.encoding(name)?;
    if !encoding.is_float() {
        return Ok(Some(format!("`{name}` has type {}, wanted floats", encoding.name())));
    }
    if let Some((encoding, bytes)) = from.raw(name)?
        && device_type(encoding, prec).is_some()
    {
        let bad = encoding.count_not_finite(bytes).unwrap_or(0);
        let all = bytes.len() / encoding.bytes(1).unwrap_or(1);
        return Ok((bad > 0).then(|| format!("`{name}` has {bad} of {all} values that are not finite")));
    }
    let mut t = from.read(name)?;
    // Values that are finite in the file may be too large for the model.
    t.values.iter_mut().for_each(|v| *v = prec.acc.rounded(*v));
    Ok(not_finite(name, &t))
}

/// Loads a safetensors file that holds exactly the model's parameters, except for the groups that its note says it does
/// without: these stay as they are.
pub fn load_weights(params: &Params, path: &Path) -> Result<()> {
    let file = TensorFile::open(path)?;
    let without = file.note().map_or(vec![], |note| note.without.clone());
    let held = params.names().filter(|(_, group, _)| !without.iter().any(|g| g == group));
    let held: BTreeSet<&str> = held.map(|(name, ..)| name).collect();
    let fit = Fit { wanted: &|name| held.contains(name), ..Fit::EXACT };
    load_selection(params, &Selection::whole(file.into_archive()), fit)?;
    Ok(())
}

/// Loads the averages of weights that a file holds beside the weights themselves.
pub(crate) fn load_averages(params: &mut Params, path: &Path) -> Result<()> {
    let averages = read_file(path)?;
    let groups: Vec<String> = params
        .groups()
        .into_iter()
        .filter(|g| params.names().any(|(name, of, _)| of == *g && averages.contains_key(name)))
        .map(String::from)
        .collect();
    params.average(&groups.iter().map(String::as_str).collect::<Vec<_>>())?;
    averages.iter().try_for_each(|(name, t)| params.write_public(name, Stored::Ema, t))
}

/// Saves all parameters under their public names, in f32 (f64 in an f64 run).
pub fn save_weights(params: &Params, path: &Path, stored: Stored) -> Result<()> {
    replace(path, |file| write_tensors(file, entries(params, stored, ""), None))?;
    Ok(())
}

/// The same with the history of the weights.
pub fn save_weights_of(params: &Params, path: &Path, stored: Stored, history: &History) -> Result<()> {
    let note = Note::new(history, &[]);
    replace(path, |file| write_tensors(file, entries(params, stored, ""), Some(&note)))?;
    Ok(())
}
