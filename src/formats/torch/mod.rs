//! What `torch.save` writes, read without executing anything: a pickle of values and of references to storages, and
//! the bytes of these storages. Either all of it is in a zip archive, without compression, or, before PyTorch 1.6, in a
//! sequence of pickles with the storages behind them.

mod pickle;
mod place;
mod storages;
#[cfg(test)]
mod tests;
mod walk;
mod write;

use super::Contents;
pub use write::{Tree, write_torch};

/// What is read in the place of a file that needs more than the values of state dictionaries.
const REMEDY: &str = "if you trust it, save only its weights in Python, \
    torch.save(torch.load(p, weights_only=False)[\"state_dict\"], q), and use that file";

/// Reads the list of tensors of a file; names are the keys on the way to a tensor, joined by dots.
pub(super) fn read(bytes: &[u8]) -> Result<Contents, String> {
    let file = match bytes {
        [b'P', b'K', ..] => storages::of_archive(bytes)?,
        _ => storages::of_pickles(bytes)?,
    };
    walk::contents(&file)
}
