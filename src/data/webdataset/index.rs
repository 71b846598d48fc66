//! The index of a shard: its samples with their texts, and where their pictures lie.
//!
//! It is kept beside the shard, or in the cache if that folder cannot be written. It is never trusted: it holds the size
//! and the time of its shard and a checksum, and is made again if anything is odd.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::super::bitmap::MAX_BYTES;
use super::super::texts::ChatLine;
use super::group::Groups;
use super::tar::{BLOCK, Entry, Tar, checked};
use crate::error::{Error, Result};
use crate::files;

/// What the name of an index ends in.
pub(super) const ENDING: &str = ".ett-index";
/// The format of indices. It also rises when other texts are read from the members of a shard.
const FORMAT: u32 = 2;
/// Maximum size of an index.
const MAX_INDEX: u64 = 4 << 30;

/// Size and time of a file, to notice that it has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    /// Bytes.
    pub bytes: u64,
    /// Modification time in nanoseconds since 1970.
    pub modified: u64,
}

impl Stamp {
    pub fn of(metadata: &Metadata) -> Self {
        let since = metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let modified = since.and_then(|d| u64::try_from(d.as_nanos()).ok()).unwrap_or(0);
        Stamp { bytes: metadata.len(), modified }
    }
}

/// A sample of a shard.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listing {
    /// The member that holds its picture; empty if it has none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Where the picture begins.
    #[serde(default)]
    pub offset: u64,
    /// Size of the picture.
    #[serde(default)]
    pub bytes: u64,
    /// CRC-32 of the header before the picture.
    #[serde(default)]
    pub header: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub captions: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chats: Vec<ChatLine>,
}

/// The content of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Index {
    format: u32,
    /// The file that was read.
    pub shard: Stamp,
    /// Its samples in their order.
    pub samples: Vec<Listing>,
    /// How many of its members and texts are not used.
    pub ignored: usize,
    /// The first ones with the reasons; the name is empty for the shard itself.
    pub first: Vec<(String, String)>,
    /// Members whose extension means nothing here, counted by extension.
    pub unknown: BTreeMap<String, usize>,
}

impl Index {
    /// The index of the file `shard`, and whether it had to be made. A new one is kept if it can be written somewhere.
    pub fn open(shard: &Path, cache: Option<&Path>) -> Result<(Self, bool)> {
        let metadata = fs::metadata(shard).map_err(Error::io(shard))?;
        if !metadata.is_file() {
            return Err(Error::data(shard, "this is not a file; name a shard, a file that ends in .tar"));
        }
        let stamp = Stamp::of(&metadata);
        let mut beside = shard.as_os_str().to_owned();
        beside.push(ENDING);
        let beside = PathBuf::from(beside);
        let cached = cache.map(|folder| folder.join(format!("{:016x}{ENDING}", hash(shard))));
        let places = || [Some(&beside), cached.as_ref()].into_iter().flatten();
        if let Some(index) = places().find_map(|at| read(at, stamp)) {
            return Ok((index, false));
        }
        let index = Self::build(shard, stamp)?;
        let text = index.text(shard)?;
        let kept = places().any(|at| {
            let in_cache = Some(at) == cached.as_ref();
            let written = match in_cache {
                true => fs::create_dir_all(files::parent(at)).map_err(Error::io(at)),
                false => Ok(()),
            };
            let written = written.and_then(|()| files::replace(at, |file| file.put(&text)));
            written.inspect_err(|e| tracing::debug!("the index cannot be kept here: {e}")).is_ok()
        });
        if !kept {
            tracing::warn!(
                "{}: its index cannot be kept and is made at each start; set ETT_CACHE",
                shard.display()
            );
        }
        Ok((index, true))
    }

    /// Reads the headers and texts of a shard.
    fn build(shard: &Path, stamp: Stamp) -> Result<Self> {
        let io = |e| Error::io(shard)(e);
        let file = File::open(shard).map_err(io)?;
        let groups = scan(file, stamp.bytes).map_err(io)?;
        if Stamp::of(&fs::metadata(shard).map_err(io)?) != stamp {
            return Err(Error::data(
                shard,
                "this shard changed while it was read; start again when it is complete",
            ));
        }
        let Groups { samples, ignored, first, unknown, .. } = groups;
        Ok(Index { format: FORMAT, shard: stamp, samples, ignored, first, unknown })
    }

    /// The content of its file: a line of JSON, and a line with the checksum.
    fn text(&self, shard: &Path) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self)
            .map_err(|e| Error::data(shard, format!("no index can be made ({e})")))?;
        let sum = crc32fast::hash(&text);
        text.extend(format!("\n{sum:08x}\n").bytes());
        Ok(text)
    }

    /// Whether the pictures lie where pictures can lie.
    fn is_sound(&self) -> bool {
        self.samples.iter().filter(|s| !s.name.is_empty()).all(|s| {
            let end = s.offset.checked_add(s.bytes);
            s.offset >= BLOCK
                && s.bytes <= MAX_BYTES
                && end.is_some_and(|end| end <= self.shard.bytes)
                && checked(s.name.as_bytes()).is_ok()
        })
    }
}

/// What an archive of `total` bytes holds. Errors are those of the file system.
pub(super) fn scan<R: Read + Seek>(from: R, total: u64) -> std::io::Result<Groups> {
    let (mut tar, mut groups) = (Tar::new(from, total), Groups::default());
    while let Some(entry) = tar.next()? {
        match entry {
            Entry::File(member) => groups.member(member, |m| tar.content(m))?,
            Entry::Other(name, why) => groups.ignore(&name, why),
            Entry::Broken(why) => groups.ignore("", why),
        }
    }
    Ok(groups.finish())
}

/// The index in a file, if it belongs to a shard with this stamp and is whole.
fn read(at: &Path, stamp: Stamp) -> Option<Index> {
    let metadata = fs::metadata(at).ok().filter(|m| m.is_file() && m.len() <= MAX_INDEX);
    metadata?;
    let text = fs::read(at).ok()?;
    let (body, sum) = text.strip_suffix(b"\n")?.split_at_checked(text.len().checked_sub(10)?)?;
    if sum != format!("\n{:08x}", crc32fast::hash(body)).as_bytes() {
        return None;
    }
    let index: Index = serde_json::from_slice(body).ok()?;
    (index.format == FORMAT && index.shard == stamp && index.is_sound()).then_some(index)
}

/// A hash of a path for names in the cache, the same on every run (FNV-1a).
pub(super) fn hash(path: &Path) -> u64 {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let bytes = path.as_os_str().as_encoded_bytes();
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}
