//! Reading and writing weights: safetensors under the public names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::History;
use crate::backend::{DType, Precision, to_bf16};
use crate::config::LpipsConfig;
use crate::error::{Error, Result};
use crate::files::{self, FileWriter, replace};
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

/// A safetensors file whose tensors are read one at a time.
pub struct TensorFile {
    path: PathBuf,
    file: File,
    /// Offset of the tensors' bytes.
    start: u64,
    header: Metadata,
    note: Option<Note>,
}

impl TensorFile {
    /// Opens a file and reads its header. Fails if it says that it has a newer format than this program reads.
    pub fn open(path: &Path) -> Result<Self> {
        let broken = |why: &dyn std::fmt::Display| {
            Error::weights(path, format!("not a complete safetensors file ({why})"))
        };
        let mut file = File::open(path).map_err(Error::io(path))?;
        let bytes = file.metadata().map_err(Error::io(path))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|e| broken(&e))?;
        let length = u64::from_le_bytes(length);
        let start = length.checked_add(8).filter(|&s| s <= bytes);
        let start = start.ok_or_else(|| broken(&format!("{bytes} bytes are too few for its header")))?;
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(|e| broken(&e))?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| broken(&e))?;
        let want = start + header.data_len() as u64;
        if want != bytes {
            return Err(broken(&format!("it has {bytes} bytes, wanted {want}")));
        }
        let note = header.metadata().as_ref().and_then(|all| all.get(NOTE));
        let note = note.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok());
        let format = note.as_ref().and_then(|note| note["format"].as_u64()).unwrap_or(first().into());
        files::check_format(path, format.try_into().unwrap_or(u32::MAX), first()..=FORMAT)?;
        let note = note.and_then(|note| serde_json::from_value(note).ok());
        Ok(TensorFile { path: path.into(), file, start, header, note })
    }

    /// Names of the tensors with type and shape.
    pub fn tensors(&self) -> BTreeMap<String, (Dtype, Vec<usize>)> {
        let all = self.header.tensors().into_iter();
        all.map(|(name, info)| (name, (info.dtype, info.shape.clone()))).collect()
    }

    /// The note in the file's header, if it has one.
    pub fn note(&self) -> Option<&Note> {
        self.note.as_ref()
    }

    /// Reads a tensor, widened to f64.
    pub fn read(&self, name: &str) -> Result<HostTensor> {
        let info = self.header.info(name);
        let info = info.ok_or_else(|| Error::weights(&self.path, format!("missing `{name}`")))?;
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to - from];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.start + from as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(&self.path))?;
        let values = widen(info.dtype, &bytes).ok_or_else(|| {
            let what = format!("`{name}` has type {:?}, wanted a float or integer", info.dtype);
            Error::weights(&self.path, what)
        })?;
        Ok(HostTensor { dims: info.shape.clone(), values })
    }

    /// Reads every tensor, widened to f64.
    pub fn read_all(&self) -> Result<BTreeMap<String, HostTensor>> {
        self.tensors().into_keys().map(|name| Ok((name.clone(), self.read(&name)?))).collect()
    }

    /// Like [`TensorFile::read`], but fails if a value is not finite.
    pub fn read_finite(&self, name: &str) -> Result<HostTensor> {
        let t = self.read(name)?;
        match not_finite(name, &t) {
            Some(what) => {
                Err(Error::weights(&self.path, format!("{what}; continue from an earlier checkpoint")))
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

/// Bytes of a file as f64; `None` for types other than the floats and integers supported here.
fn widen(dtype: Dtype, b: &[u8]) -> Option<Vec<f64>> {
    fn all<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(b: &[u8], f: fn(T) -> f64) -> Option<Vec<f64>> {
        Some(b.chunks_exact(size_of::<T>()).map(|c| f(bytemuck::pod_read_unaligned(c))).collect())
    }
    match dtype {
        Dtype::F64 => all::<f64>(b, |x| x),
        Dtype::F32 => all::<f32>(b, f64::from),
        Dtype::BF16 => all::<half::bf16>(b, f64::from),
        Dtype::F16 => all::<half::f16>(b, f64::from),
        Dtype::I32 => all::<i32>(b, f64::from),
        Dtype::I64 => all::<i64>(b, |x| x as f64),
        _ => None,
    }
}

/// Element type of a written tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// 8-byte floats.
    F64,
    /// 4-byte floats.
    F32,
    /// 2-byte floats with the exponents of 4-byte ones.
    Bf16,
    /// 4-byte integers.
    I32,
    /// 8-byte integers.
    I64,
}

impl FileType {
    /// The type in which parameters, moments and statistics of a run are written without loss.
    pub fn of(prec: Precision) -> Self {
        match prec.acc {
            DType::F64 => FileType::F64,
            _ => FileType::F32,
        }
    }

    /// Its name in the format.
    pub fn dtype(self) -> Dtype {
        match self {
            FileType::F64 => Dtype::F64,
            FileType::F32 => Dtype::F32,
            FileType::Bf16 => Dtype::BF16,
            FileType::I32 => Dtype::I32,
            FileType::I64 => Dtype::I64,
        }
    }

    fn put(self, file: &mut FileWriter, values: &[f64]) -> Result<()> {
        fn cast<T: bytemuck::NoUninit>(values: &[f64], f: fn(f64) -> T) -> Vec<T> {
            values.iter().map(|&x| f(x)).collect()
        }
        match self {
            FileType::F64 => file.put(bytemuck::cast_slice(values)),
            FileType::F32 => file.put(bytemuck::cast_slice(&cast(values, |x| x as f32))),
            FileType::Bf16 => file.put(bytemuck::cast_slice(&cast(values, to_bf16))),
            FileType::I32 => file.put(bytemuck::cast_slice(&cast(values, |x| x as i32))),
            FileType::I64 => file.put(bytemuck::cast_slice(&cast(values, |x| x as i64))),
        }
    }
}

/// A tensor to be written. Its values are computed only when they are written, so that a file may be larger than the
/// host's memory.
pub struct Entry<'a> {
    /// Public name.
    pub name: String,
    /// Shape in files.
    pub dims: Vec<usize>,
    /// Element type.
    pub ty: FileType,
    /// Computes the values, row-major.
    pub values: Box<dyn Fn() -> Result<Vec<f64>> + 'a>,
}

/// Writes tensors in the safetensors format, with a note in the header.
pub fn write_tensors(file: &mut FileWriter, mut entries: Vec<Entry>, note: Option<&Note>) -> Result<()> {
    let unwritable = |e: &dyn std::fmt::Display| Error::data(file.path(), format!("cannot be written ({e})"));
    // The order of the format: wide types first, for alignment.
    entries.sort_by(|a, b| b.ty.dtype().cmp(&a.ty.dtype()).then_with(|| a.name.cmp(&b.name)));
    let mut at = 0;
    let infos = entries.iter().map(|e| {
        let from = at;
        at += e.dims.iter().product::<usize>() * e.ty.dtype().bitsize() / 8;
        (e.name.clone(), TensorInfo { dtype: e.ty.dtype(), shape: e.dims.clone(), data_offsets: (from, at) })
    });
    let note = note.map(serde_json::to_string).transpose().map_err(|e| unwritable(&e))?;
    let note = note.map(|note| HashMap::from([(NOTE.to_string(), note)]));
    let header = Metadata::new(note, infos.collect()).map_err(|e| unwritable(&e))?;
    let mut header = serde_json::to_vec(&header).map_err(|e| unwritable(&e))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    file.put(&(header.len() as u64).to_le_bytes())?;
    file.put(&header)?;
    for e in entries {
        let (values, want) = ((e.values)()?, e.dims.iter().product::<usize>());
        if values.len() != want {
            let what = format!("`{}` has {} values, wanted {want} for {:?}", e.name, values.len(), e.dims);
            return Err(Error::weights(file.path(), what));
        }
        e.ty.put(file, &values)?;
    }
    Ok(())
}

/// Writes tensors to a safetensors file, see [`replace`].
pub fn write_file(path: &Path, tensors: &[(String, HostTensor, FileType)]) -> Result<()> {
    let entries = tensors.iter().map(|(name, t, ty)| Entry {
        name: name.clone(),
        dims: t.dims.clone(),
        ty: *ty,
        values: Box::new(|| Ok(t.values.clone())),
    });
    replace(path, |file| write_tensors(file, entries.collect(), None))?;
    Ok(())
}

/// Entries for one copy of all parameters that have it, under their public names with a prefix.
pub fn entries<'a>(params: &'a Params, stored: Stored, prefix: &str) -> Vec<Entry<'a>> {
    let ty = FileType::of(params.precision());
    let kept = params.names().filter(|(_, group, _)| params.has(group, stored));
    let entry = |(name, _, dims): (&'a str, _, &[usize])| Entry {
        name: format!("{prefix}{name}"),
        dims: dims.to_vec(),
        ty,
        values: Box::new(move || Ok(params.read(name, stored)?.map_or(vec![], |t| t.values))),
    };
    kept.map(entry).collect()
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

/// Overwrites the parameters named in `wanted` (all if `None`) from `tensors`. Missing, extra and misshapen tensors
/// and non-finite values give a single error that names them; then nothing is changed.
pub fn set_weights(
    params: &Params,
    path: &Path,
    tensors: &BTreeMap<String, HostTensor>,
    wanted: Option<&dyn Fn(&str) -> bool>,
) -> Result<()> {
    let mut problems = Vec::new();
    let mut known = BTreeSet::new();
    for (name, _, dims) in params.names() {
        if wanted.is_some_and(|w| !w(name)) {
            continue;
        }
        known.insert(name.to_string());
        match tensors.get(name) {
            None => problems.push(format!("missing `{name}` {dims:?}")),
            Some(t) if t.dims != dims => {
                problems.push(format!("`{name}` is {:?}, wanted {dims:?}", t.dims));
            }
            Some(t) => problems.extend(not_finite(name, t)),
        }
    }
    problems.extend(tensors.keys().filter(|n| !known.contains(*n)).map(|n| format!("unknown `{n}`")));
    if !problems.is_empty() {
        return Err(Error::weights(path, misfit("the model", problems)));
    }
    for name in &known {
        params.write_public(name, Stored::Master, &tensors[name])?;
    }
    params.refresh()
}

/// Loads a safetensors file that holds exactly the model's parameters, except for the groups that its note says it does
/// without: these stay as they are.
pub fn load_weights(params: &Params, path: &Path) -> Result<()> {
    let file = TensorFile::open(path)?;
    let without = file.note().map_or(&[][..], |note| &note.without);
    let held = params.names().filter(|(_, group, _)| !without.iter().any(|g| g == group));
    let held: BTreeSet<&str> = held.map(|(name, ..)| name).collect();
    set_weights(params, path, &file.read_all()?, Some(&|name| held.contains(name)))
}

/// Loads the LPIPS weights that the configuration names, or says that its features are random.
pub(crate) fn load_lpips(params: &Params, cfg: &LpipsConfig) -> Result<()> {
    const PREFIX: &str = "loss.perceptual_loss.";
    let Some(path) = &cfg.weights else {
        tracing::info!(
            "perceptual loss: random VGG features from a fixed seed (lpips.weights names no file)"
        );
        return Ok(());
    };
    let named = |n: String| if n.starts_with(PREFIX) { n } else { format!("{PREFIX}{n}") };
    let tensors = read_file(path)?.into_iter().map(|(n, t)| (named(n), t)).collect();
    set_weights(params, path, &tensors, Some(&|n| n.starts_with(PREFIX)))
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
