//! VGG16 and the heads of LPIPS.

use std::path::{Path, PathBuf};

use super::named::{Named, Shape, misfits, no_problems, tensors, write_all};
use crate::error::{Error, Result};
use crate::formats::{Archive, Encoding, Selection};

/// The prefix of the names of a perceptual loss in this crate and in IBQ's checkpoints.
pub(super) const PREFIX: &str = "loss.perceptual_loss.";
/// Position of each convolution in torchvision's `vgg16().features`, block by block.
const SLICES: [&[usize]; 5] = [&[0, 2], &[5, 7], &[10, 12, 14], &[17, 19, 21], &[24, 26, 28]];
/// Largest width that a model may have.
const MAX_WIDTH: usize = 1 << 16;

/// The features of a perceptual loss.
pub struct ForeignPerceptual {
    /// Weights under the names of this crate: VGG16, and the heads and the scaling of the input if a file has them.
    pub weights: Selection,
    /// Channels of the five blocks.
    pub widths: [usize; 5],
    /// What was left out and what is missing, in words.
    pub notes: Vec<String>,
}

/// The tensors of VGG16.
pub(super) fn vgg(widths: &[usize; 5]) -> Vec<Shape> {
    let (mut all, mut from) = (vec![], 3);
    for (s, (places, &to)) in SLICES.iter().zip(widths).enumerate() {
        for place in *places {
            let name = format!("{PREFIX}net.slice{}.{place}", s + 1);
            all.push((format!("{name}.weight"), vec![to, from, 3, 3]));
            all.push((format!("{name}.bias"), vec![to]));
            from = to;
        }
    }
    all
}

/// The learned heads.
pub(super) fn heads(widths: &[usize; 5]) -> Vec<Shape> {
    let head = |(i, &c): (usize, &usize)| (format!("{PREFIX}lin{i}.model.1.weight"), vec![1, c, 1, 1]);
    widths.iter().enumerate().map(head).collect()
}

/// The constants that scale the input.
pub(super) fn scaling() -> Vec<Shape> {
    ["shift", "scale"].map(|what| (format!("{PREFIX}scaling_layer.{what}"), vec![1, 3, 1, 1])).into()
}

/// The channels of the five blocks; a phrase that says what is missing otherwise.
pub(super) fn widths<'a>(
    dims: impl Fn(&str) -> Option<&'a [usize]>,
) -> std::result::Result<[usize; 5], String> {
    let mut widths = [0; 5];
    for (s, (places, width)) in SLICES.iter().zip(&mut widths).enumerate() {
        let name = format!("{PREFIX}net.slice{}.{}.weight", s + 1, places[0]);
        *width = match dims(&name) {
            Some(&[n, _, 3, 3]) if (1..=MAX_WIDTH).contains(&n) => n,
            Some(dims) => return Err(format!("`{name}` is {dims:?}, wanted [width, width before, 3, 3]")),
            None => {
                return Err(format!(
                    "holds no complete VGG16: it lacks `{name}`; name torchvision's file too"
                ));
            }
        };
    }
    Ok(widths)
}

/// Opens the features of a perceptual loss from one file or several: torchvision's VGG16, the heads of LPIPS, both in one
/// file, or a file of [`write_perceptual`]. Heads and scaling are left out if no file has them.
pub fn open_perceptual(files: &[PathBuf]) -> Result<ForeignPerceptual> {
    let Some(first) = files.first() else {
        return Err(Error::config("lpips.weights", "no file", "a file of VGG16"));
    };
    let (mut all, mut notes) = (Selection::new(first), vec![]);
    let mut problems = vec![];
    for path in files {
        let (part, unknown) = part(path, &mut notes)?;
        problems.extend(unknown);
        for (name, _) in part.tensors() {
            if all.dims(name).is_some() {
                problems.push(format!("`{name}` is in {} again", path.display()));
            }
        }
        all.extend(part);
    }
    let widths = widths(|name| all.dims(name)).map_err(|why| Error::weights(first, why))?;
    problems.extend(misfits(&all, &vgg(&widths)));
    for (optional, missing) in [
        (heads(&widths), "no file has the heads of LPIPS (`lin0` to `lin4`): every channel counts the same"),
        (scaling(), "no file has the scaling of the input (`scaling_layer`): it stays that of LPIPS"),
    ] {
        match optional.iter().any(|(name, _)| all.dims(name).is_some()) {
            true => problems.extend(misfits(&all, &optional)),
            false => notes.push(missing.into()),
        }
    }
    no_problems(first, "VGG16 and LPIPS", problems)?;
    Ok(ForeignPerceptual { weights: all, widths, notes })
}

/// The tensors of one file under our names, and those that are unknown.
fn part(path: &Path, notes: &mut Vec<String>) -> Result<(Selection, Vec<String>)> {
    let mut file = Named::whole(Archive::open(path)?);
    if file.names().any(|name| name.starts_with("state_dict.")) {
        file = file.take_prefixed("state_dict.");
    }
    // A whole tokenizer: only its perceptual loss is wanted.
    if file.names().any(|name| name.starts_with(PREFIX)) {
        let loss = file.take_prefixed(PREFIX);
        let others = file.names().count();
        if others > 0 {
            notes.push(format!("{}: left out {} of other networks", path.display(), tensors(others)));
        }
        file = loss;
    }
    for (prefix, what) in [("classifier.", "the classifier"), ("lins.", "copies of the heads")] {
        let count = file.take_prefixed(prefix).names().count();
        if count > 0 {
            notes.push(format!("{}: left out {what} (`{prefix}*`, {})", path.display(), tensors(count)));
        }
    }
    let known = file.take(ours);
    Ok((known.selection(path), file.unknown(&[], "")))
}

/// Our name of a tensor; `None` if it is no part of a perceptual loss.
fn ours(name: &str) -> Option<String> {
    if let Some(rest) = name.strip_prefix("features.") {
        let (place, what) = rest.split_once('.')?;
        let place: usize = place.parse().ok()?;
        let slice = SLICES.iter().position(|places| places.contains(&place))? + 1;
        return matches!(what, "weight" | "bias").then(|| format!("{PREFIX}net.slice{slice}.{place}.{what}"));
    }
    let name = format!("{PREFIX}{name}");
    let any = [1; 5];
    let known = [vgg(&any), heads(&any), scaling()];
    known.iter().flatten().any(|(known, _)| *known == name).then_some(name)
}

/// Writes them as the safetensors file that `lpips.weights` names. `from` may hold more.
pub fn write_perceptual(path: &Path, from: &Selection, encoding: Option<Encoding>) -> Result<()> {
    write_all(path, from, |name| name.starts_with(PREFIX), encoding)
}
