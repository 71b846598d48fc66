//! Compressed shards: unpacked once into the cache, because pictures are read from any place.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use flate2::read::MultiGzDecoder;

use super::index::{Stamp, hash};
use crate::error::{Error, Result};
use crate::files;

/// How large an unpacked shard may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes that may come of one byte, once `free` bytes have been unpacked.
    pub ratio: u64,
    /// Bytes to which `ratio` does not apply.
    pub free: u64,
}

/// Deflate reaches 1032 at most, for zeros; shards of pictures are near 1.
pub(super) const LIMITS: Limits = Limits { bytes: 1 << 40, ratio: 200, free: 64 << 20 };
/// After this time, an incomplete file was left by a program that was ended.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
const PIECE: usize = 1 << 20;

/// Whether a shard is compressed, told by its name.
pub(super) fn is_packed(shard: &Path) -> bool {
    let name = shard.file_name().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
    name.ends_with(".gz") || name.ends_with(".tgz")
}

/// The unpacked form of a shard in the folder `cache`. Of a stream that is cut off or damaged, it holds what comes
/// before.
pub(super) fn unpacked(shard: &Path, cache: &Path, limits: Limits) -> Result<PathBuf> {
    let metadata = fs::metadata(shard).map_err(Error::io(shard))?;
    let stamp = Stamp::of(&metadata);
    let of_shard = format!("{:016x}-", hash(shard));
    let name = format!("{of_shard}{:x}-{:x}.tar", stamp.bytes, stamp.modified);
    let to = cache.join(&name);
    if to.is_file() {
        return Ok(to);
    }
    fs::create_dir_all(cache).map_err(|e| unusable(cache, &e))?;
    tracing::info!("{}: unpacking it to {}", shard.display(), to.display());
    // Another program may unpack the same shard at this moment.
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let own = format!("{of_shard}{}-{}.new", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let own = cache.join(own);
    let written = files::replace(&own, |out| copy(shard, limits, &mut |bytes| out.put(bytes)));
    written.map_err(|e| match files::is_full(&e) {
        true => Error::data(
            &to,
            format!(
                "{} cannot be unpacked: the disk is full; set ETT_CACHE to a folder with more room",
                shard.display()
            ),
        ),
        false => match e {
            Error::Io { path, source } if path != shard => unusable(cache, &source),
            e => e,
        },
    })?;
    if Stamp::of(&fs::metadata(shard).map_err(Error::io(shard))?) != stamp {
        let _ = fs::remove_file(&own);
        return Err(Error::data(
            shard,
            "this shard changed while it was read; start again when it is complete",
        ));
    }
    // What another program unpacked meanwhile stays, because it may be reading it already.
    match fs::hard_link(&own, &to) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => fs::rename(&own, &to),
        _ => fs::remove_file(&own),
    }
    .map_err(Error::io(&to))?;
    files::sync_dir(cache)?;
    clean(cache, &of_shard, &name);
    Ok(to)
}

/// The error about a cache that cannot be written.
fn unusable(cache: &Path, e: &std::io::Error) -> Error {
    Error::data(cache, format!("the cache cannot be written ({e}); set ETT_CACHE to a folder that can"))
}

/// Passes the unpacked bytes on.
fn copy(shard: &Path, limits: Limits, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let packed = File::open(shard).map_err(Error::io(shard))?;
    let packed = Counted { from: packed, bytes: 0, failed: None };
    let mut stream = MultiGzDecoder::new(packed);
    let (mut piece, mut total) = (vec![0; PIECE], 0u64);
    loop {
        let n = match stream.read(&mut piece) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => match stream.get_mut().failed.take() {
                // The file could not be read, which may be different next time.
                Some(kind) => return Err(Error::io(shard)(kind.into())),
                None => {
                    tracing::warn!("{}: only {total} bytes can be unpacked ({e})", shard.display());
                    0
                }
            },
        };
        if n == 0 {
            return Ok(());
        }
        total += n as u64;
        let most = limits.free.max(stream.get_ref().bytes.saturating_mul(limits.ratio)).min(limits.bytes);
        if total > most {
            let what = format!(
                "this shard unpacks to more than {} MiB from {} bytes, which no shard of pictures does; \
                 unpack it yourself if you trust it",
                most >> 20,
                stream.get_ref().bytes
            );
            return Err(Error::data(shard, what));
        }
        put(&piece[..n])?;
    }
}

/// Counts the bytes that are read, and remembers errors of the file system.
struct Counted {
    from: File,
    bytes: u64,
    failed: Option<ErrorKind>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.from.read(buffer).inspect_err(|e| {
            if e.kind() != ErrorKind::Interrupted {
                self.failed = Some(e.kind());
            }
        })?;
        self.bytes += n as u64;
        Ok(n)
    }
}

/// Removes what was unpacked from earlier contents of a shard.
fn clean(cache: &Path, of_shard: &str, keep: &str) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        let old = age.is_some_and(|age| age > ABANDONED);
        let ours = name.trim_start_matches('.').starts_with(of_shard);
        let complete = name.ends_with(".tar") || name.ends_with(super::index::ENDING);
        if ours && !name.starts_with(keep) && (complete || old) {
            let _ = fs::remove_file(entry.path());
        }
    }
}
