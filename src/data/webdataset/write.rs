//! Writing shards.

use super::tar::BLOCK;
use crate::error::{Error, Result};
use crate::files::FileWriter;

/// The end mark of an archive.
pub(in super::super) const END: [u8; 2 * BLOCK as usize] = [0; 2 * BLOCK as usize];

/// Appends a member to an archive. The bytes depend on the name and the content only.
pub(in super::super) fn member(file: &mut FileWriter, name: &str, content: &[u8]) -> Result<()> {
    let header = header(name, content.len() as u64).ok_or_else(|| {
        Error::data(file.path(), format!("the member {name:?} is too large for an archive"))
    })?;
    file.put(&header)?;
    file.put(content)?;
    let padding = content.len().next_multiple_of(BLOCK as usize) - content.len();
    file.put(&END[..padding])
}

/// The header of a file in the ustar format; `None` if its name or size does not fit.
pub(super) fn header(name: &str, bytes: u64) -> Option<[u8; BLOCK as usize]> {
    if name.len() > 100 || bytes >= 1 << 33 {
        return None;
    }
    let mut header = [0; BLOCK as usize];
    let mut field = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    field(0, name);
    field(100, "0000644\0");
    field(108, "0000000\0");
    field(116, "0000000\0");
    field(124, &format!("{bytes:011o}\0"));
    field(136, "00000000000\0");
    field(148, "        ");
    field(156, "0");
    field(257, "ustar\x0000");
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(header)
}
