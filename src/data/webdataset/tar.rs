//! Where the members of a tar archive lie. Only headers are read; everything in them is taken for hostile.

use std::io::{ErrorKind, Read, Seek, SeekFrom};

/// Size of a header, and the unit of an archive.
pub(super) const BLOCK: u64 = 512;
/// Bytes that are read at once: a header with the texts and headers that often follow it.
const WINDOW: usize = 8 << 10;
/// Maximum size of a header that extends the next one, such as a long name.
const MAX_EXTENSION: u64 = 1 << 20;
/// Maximum length of a name.
const MAX_NAME: usize = 4096;
/// Zero blocks that are looked through after the end of an archive, for another one behind it.
const PADDING: u64 = 2048;

/// A member that is a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    /// Its path, with `/` between the parts and without `./` at the beginning.
    pub name: Vec<u8>,
    /// Where its bytes begin. Its header is the block before them.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
    /// CRC-32 of its header.
    pub header: u32,
}

/// What an archive holds, in its order.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// A file.
    File(Member),
    /// A member that is not used, with the reason; empty for a folder.
    Other(String, &'static str),
    /// The archive cannot be read further, with the reason.
    Broken(String),
}

/// The headers of an archive, one after the other.
pub(super) struct Tar<R> {
    from: R,
    /// Size of the archive.
    total: u64,
    /// Where the next header is.
    at: u64,
    window: Vec<u8>,
    window_at: u64,
    done: bool,
}

/// Names and sizes for the next header.
#[derive(Default)]
struct Extended {
    name: Option<Vec<u8>>,
    size: Option<u64>,
    sparse: bool,
}

/// Why reading ended.
enum Stop {
    Io(std::io::Error),
    Broken(String),
}

impl From<std::io::Error> for Stop {
    fn from(e: std::io::Error) -> Self {
        Stop::Io(e)
    }
}

fn broken<T>(what: impl Into<String>) -> Result<T, Stop> {
    Err(Stop::Broken(what.into()))
}

impl<R: Read + Seek> Tar<R> {
    /// An archive of `total` bytes.
    pub fn new(from: R, total: u64) -> Self {
        Tar { from, total, at: 0, window: Vec::new(), window_at: 0, done: false }
    }

    /// The next entry; `None` at the end. Errors are those of the file system.
    pub fn next(&mut self) -> std::io::Result<Option<Entry>> {
        if self.done {
            return Ok(None);
        }
        match self.advance() {
            Ok(Some(entry)) => Ok(Some(entry)),
            Ok(None) => {
                self.done = true;
                Ok(None)
            }
            Err(Stop::Broken(what)) => {
                self.done = true;
                Ok(Some(Entry::Broken(what)))
            }
            Err(Stop::Io(e)) => Err(e),
        }
    }

    /// The content of a member that `next` returned, which the caller has checked for its size.
    pub fn content(&mut self, member: &Member) -> std::io::Result<Vec<u8>> {
        self.read(member.offset, member.bytes as usize).map(<[u8]>::to_vec)
    }

    fn advance(&mut self) -> Result<Option<Entry>, Stop> {
        let mut extended = Extended::default();
        loop {
            let at = self.at;
            let left = self.total - at;
            if left == 0 {
                return match at {
                    0 => broken("this archive is empty"),
                    _ => broken("this archive ends without its end mark, so it may be incomplete"),
                };
            }
            if left < BLOCK {
                return broken(format!("this archive is cut off within the header at byte {at}"));
            }
            let mut header = [0; BLOCK as usize];
            header.copy_from_slice(self.read(at, BLOCK as usize)?);
            if header.iter().all(|&b| b == 0) {
                return self.trailer();
            }
            if !sums_up(&header) {
                return match at {
                    0 => broken(
                        "this is not a tar archive; the name of a compressed one has to end in .tar.gz or .tgz",
                    ),
                    _ => broken(format!("the header at byte {at} is damaged; what follows is not read")),
                };
            }
            let kind = header[156];
            // The size in an extended header is that of the file itself.
            let own = number(&header[124..136]);
            let size = if matches!(kind, b'x' | b'g' | b'L' | b'K') { own } else { extended.size.or(own) };
            let Some(bytes) = size else {
                return broken(format!(
                    "the header at byte {at} has no valid size; what follows is not read"
                ));
            };
            let mut offset = at + BLOCK;
            if kind == b'S' {
                offset = self.after_map(offset, header[482])?;
            }
            let end = bytes.checked_next_multiple_of(BLOCK).and_then(|padded| offset.checked_add(padded));
            // The padding of the last member may be missing.
            let Some(end) = end.filter(|_| bytes <= self.total - offset) else {
                let name = lossy(&extended.name.unwrap_or_else(|| name_of(&header)));
                let what = format!(
                    "this archive is cut off within {name:?}: it has {} of {bytes} bytes at byte {offset}",
                    self.total - offset
                );
                return broken(what);
            };
            self.at = end.min(self.total);
            if matches!(kind, b'x' | b'L') {
                if bytes > MAX_EXTENSION {
                    return broken(format!(
                        "the extended header at byte {at} has {bytes} bytes, wanted 1 MiB at most"
                    ));
                }
                let content = self.read(offset, bytes as usize)?;
                match kind {
                    b'L' => {
                        let end = content.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
                        extended.name = Some(content[..end].to_vec());
                    }
                    _ if extended.pax(content).is_none() => {
                        return broken(format!(
                            "the extended header at byte {at} is damaged; what follows is not read"
                        ));
                    }
                    _ => {}
                }
                continue;
            }
            if matches!(kind, b'g' | b'K') {
                continue;
            }
            let name = extended.name.unwrap_or_else(|| name_of(&header));
            let other = |why| Ok(Some(Entry::Other(lossy(&name), why)));
            return match kind {
                b'0' | b'7' | 0 if !name.ends_with(b"/") => match checked(&name) {
                    _ if extended.sparse => other("sparse members are not read"),
                    Err(why) => other(why),
                    Ok(name) => {
                        let header = crc32fast::hash(&header);
                        Ok(Some(Entry::File(Member { name: name.to_vec(), offset, bytes, header })))
                    }
                },
                b'0' | b'7' | 0 | b'5' => other(""),
                b'1' | b'2' => other("links are not followed"),
                b'S' => other("sparse members are not read"),
                b'3' | b'4' | b'6' => other("devices and pipes are not read"),
                _ => other("members of this type are not read"),
            };
        }
    }

    /// The end of the blocks that continue the map of a sparse member.
    fn after_map(&mut self, mut at: u64, mut more: u8) -> Result<u64, Stop> {
        while more != 0 {
            if self.total - at < BLOCK {
                return broken(format!("this archive is cut off within the header at byte {at}"));
            }
            more = self.read(at, BLOCK as usize)?[504];
            at += BLOCK;
        }
        Ok(at)
    }

    /// Looks behind the end mark, because whole archives are sometimes written one after the other.
    fn trailer(&mut self) -> Result<Option<Entry>, Stop> {
        let last = self.total.min(self.at + PADDING * BLOCK);
        while self.at < last {
            let length = (WINDOW as u64).min(last - self.at) as usize;
            if self.read(self.at, length)?.iter().any(|&b| b != 0) {
                return broken("there is data behind the end mark of this archive, which is not read");
            }
            self.at += length as u64;
        }
        Ok(None)
    }

    /// The bytes from `at` on, which have to exist.
    fn read(&mut self, at: u64, length: usize) -> std::io::Result<&[u8]> {
        let inside = at >= self.window_at && at + length as u64 <= self.window_at + self.window.len() as u64;
        if !inside {
            self.window_at = at;
            let wanted = (length.max(WINDOW) as u64).min(self.total.saturating_sub(at));
            self.window.clear();
            self.from.seek(SeekFrom::Start(at))?;
            (&mut self.from).take(wanted).read_to_end(&mut self.window)?;
            if self.window.len() < length {
                // The file has become shorter since it was measured.
                self.window.clear();
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        let first = (at - self.window_at) as usize;
        Ok(&self.window[first..first + length])
    }
}

impl Extended {
    /// Takes over the records of a pax header: `length key=value\n`. `None` if it is not one.
    fn pax(&mut self, mut rest: &[u8]) -> Option<()> {
        while !rest.is_empty() && rest[0] != 0 {
            let space = rest.iter().take(20).position(|&b| b == b' ')?;
            let length: usize = str::from_utf8(&rest[..space]).ok()?.parse().ok()?;
            let record = rest.get(space + 1..length)?.strip_suffix(b"\n")?;
            rest = &rest[length..];
            let equals = record.iter().position(|&b| b == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.name = Some(value.to_vec()),
                b"size" => self.size = Some(str::from_utf8(value).ok()?.parse().ok()?),
                _ => self.sparse |= key.starts_with(b"GNU.sparse."),
            }
        }
        Some(())
    }
}

/// Whether the checksum of a header is right, computed with signed or unsigned bytes.
fn sums_up(header: &[u8; BLOCK as usize]) -> bool {
    let outside = |i: usize| !(148..156).contains(&i);
    let bytes = || header.iter().enumerate().map(|(i, &b)| if outside(i) { b } else { b' ' });
    let unsigned: i64 = bytes().map(i64::from).sum();
    let signed: i64 = bytes().map(|b| i64::from(b as i8)).sum();
    let wanted = number(&header[148..156]).and_then(|n| i64::try_from(n).ok());
    wanted == Some(unsigned) || wanted == Some(signed)
}

/// A number of a header: octal digits, or base 256 after a set bit.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let mut value = u64::from(field[0] & 0x7f);
        for &b in &field[1..] {
            value = value.checked_mul(256)?.checked_add(u64::from(b))?;
        }
        return Some(value);
    }
    let text = str::from_utf8(field).ok()?.trim_matches([' ', '\0']);
    match text.is_empty() {
        true => Some(0),
        // A sign is no part of a number here.
        false if text.starts_with('+') => None,
        false => u64::from_str_radix(text, 8).ok(),
    }
}

/// The name in a header, which may be in two parts.
fn name_of(header: &[u8; BLOCK as usize]) -> Vec<u8> {
    let text = |field: &[u8]| field.split(|&b| b == 0).next().unwrap_or_default().to_vec();
    let name = text(&header[..100]);
    let prefix = text(&header[345..500]);
    // GNU archives use the place of the prefix for other values.
    match &header[257..263] == b"ustar\0" && !prefix.is_empty() {
        true => [&prefix[..], b"/", &name].concat(),
        false => name,
    }
}

/// The name without `./` at its beginning, or why it is refused.
pub(super) fn checked(mut name: &[u8]) -> Result<&[u8], &'static str> {
    while let Some(rest) = name.strip_prefix(b"./") {
        name = rest;
    }
    if name.is_empty() || name.len() > MAX_NAME {
        return Err("its name is empty or longer than 4096 bytes");
    }
    if name.contains(&0) {
        return Err("its name contains a NUL byte");
    }
    if name[0] == b'/' || name[0] == b'\\' {
        return Err("its name is an absolute path");
    }
    match name.split(|&b| b == b'/' || b == b'\\').any(|part| part == b"..") {
        true => Err("its name contains `..`"),
        false => Ok(name),
    }
}

/// A name as text, without characters that control terminals.
pub(super) fn lossy(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(&name[..name.len().min(MAX_NAME)]);
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
