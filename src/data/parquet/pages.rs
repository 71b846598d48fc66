//! The pages of a column, with bounded memory whatever a file declares.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use bytes::Bytes;
use parquet::basic::Encoding;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::ParquetError;
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::properties::ReaderProperties;
use parquet::file::reader::{ChunkReader, Length, SerializedPageReader};

use super::super::bitmap::MAX_BYTES;

/// Entries of a dictionary; writers end dictionaries at about a MiB.
const MAX_WORDS: u32 = 1 << 22;

pub(super) type Fallible<T> = std::result::Result<T, ParquetError>;

/// The bytes of a file at given places: threads share the file without sharing a cursor.
pub(super) struct FileBytes {
    pub file: Arc<File>,
    pub len: u64,
}

/// Reads on from a place.
pub(super) struct Onward {
    file: Arc<File>,
    at: u64,
}

/// Reads the header of a page, after a check of the sizes in it, by which the crate reserves memory.
pub(super) struct Header {
    read: BufReader<Onward>,
    checked: bool,
}

#[cfg(unix)]
fn read_at(file: &File, to: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, to, at)
}

#[cfg(windows)]
fn read_at(file: &File, to: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, to, at)
}

impl Read for Onward {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let n = read_at(&self.file, to, self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Read for Header {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if !self.checked {
            let what = match page_size(self.read.fill_buf()?) {
                Some(size) if size <= MAX_BYTES => None,
                Some(size) => {
                    let most = MAX_BYTES >> 20;
                    Some(format!("a page has {size} bytes, more than the limit of {most} MiB"))
                }
                None => Some("the header of a page is damaged".into()),
            };
            if let Some(what) = what {
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            self.checked = true;
        }
        // The crate passes over a list that is declared to be long at the end of the file, too, element by element.
        match self.read.read(to)? {
            0 if !to.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            n => Ok(n),
        }
    }
}

/// Bytes of a file from a place on.
pub(super) fn bytes_at(file: &Arc<File>, at: u64, n: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; n];
    Onward { file: file.clone(), at }.read_exact(&mut bytes)?;
    Ok(bytes)
}

impl Length for FileBytes {
    fn len(&self) -> u64 {
        self.len
    }
}

impl ChunkReader for FileBytes {
    type T = Header;

    /// The crate asks for this at the headers of pages, and at the bytes after a header, which it does not read by it.
    fn get_read(&self, start: u64) -> Fallible<Self::T> {
        let onward = Onward { file: self.file.clone(), at: start };
        Ok(Header { read: BufReader::with_capacity(1 << 10, onward), checked: false })
    }

    fn get_bytes(&self, start: u64, n: usize) -> Fallible<Bytes> {
        if n as u64 > MAX_BYTES || start.checked_add(n as u64).is_none_or(|end| end > self.len) {
            return Err(ParquetError::General(format!("{n} bytes at {start} are not inside the file")));
        }
        Ok(bytes_at(&self.file, start, n)?.into())
    }
}

/// The larger one of the sizes of a page, compressed and not, given by its header: fields 2 and 3 of a struct in Thrift's
/// compact form, which follow the type of the page. `None` if the header does not begin like that.
fn page_size(header: &[u8]) -> Option<u64> {
    let mut header = header.iter().copied();
    let mut largest = 0;
    for field in 0..3 {
        // The next field, an i32.
        header.next().filter(|&b| b == 0x15)?;
        let mut zigzag = 0u64;
        for shift in (0..).step_by(7).take(5) {
            let byte = header.next()?;
            zigzag |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        // Negative sizes are odd.
        match (field, zigzag % 2) {
            (0, _) => {}
            (_, 0) => largest = largest.max(zigzag / 2),
            _ => return None,
        }
    }
    Some(largest)
}

/// The pages of a column, refused if the decoders of the crate would panic on them or reserve too much memory.
pub(super) struct Pages {
    pages: SerializedPageReader<FileBytes>,
    checks: Checks,
}

impl Pages {
    /// The pages of a column chunk of `rows` rows; pages with more than `most` entries in all are refused.
    pub fn new(bytes: FileBytes, column: &ColumnChunkMetaData, rows: usize, most: u64) -> Fallible<Self> {
        let props = Arc::new(ReaderProperties::builder().build());
        let pages = SerializedPageReader::new_with_properties(Arc::new(bytes), column, rows, None, props)?;
        let depth = column.column_descr().max_rep_level().max(0) as u32;
        let width = (i32::BITS - depth.leading_zeros()) as usize;
        Ok(Pages { pages, checks: Checks { words: false, left: most, width } })
    }
}

/// What has been seen of the pages of a column.
struct Checks {
    /// Whether there was a dictionary.
    words: bool,
    /// Entries that may still follow.
    left: u64,
    /// Bits of a repetition level; 0 for columns without lists.
    width: usize,
}

impl Checks {
    fn check(&mut self, page: &Page) -> std::result::Result<(), String> {
        let (bytes, n) = (page.buffer().len(), page.num_values());
        match page {
            Page::DictionaryPage { .. } => {
                self.words = true;
                // Each word has a length of four bytes.
                if n > MAX_WORDS || n as usize > bytes / 4 {
                    return Err(format!("a dictionary of {bytes} bytes declares {n} entries"));
                }
                return Ok(());
            }
            Page::DataPage { buf, def_level_encoding, rep_level_encoding, .. } => {
                // Columns without levels name any encoding for them.
                #[expect(deprecated, reason = "older writers name it")]
                let known = |e: &Encoding| matches!(e, Encoding::RLE | Encoding::BIT_PACKED);
                if !known(def_level_encoding) || !known(rep_level_encoding) {
                    return Err("its levels have an unknown encoding".into());
                }
                let (n, width) = (n as usize, self.width);
                let whole = match rep_level_encoding {
                    Encoding::RLE => {
                        let size = buf.first_chunk().map_or(0, |b| u32::from_le_bytes(*b) as usize);
                        repeated(buf.get(4..4usize.saturating_add(size)).unwrap_or_default(), width, n)
                    }
                    _ => buf.len() >= (n * width).div_ceil(8),
                };
                if !whole {
                    return Err("its repetition levels end too early".into());
                }
            }
            Page::DataPageV2 { buf, def_levels_byte_len, rep_levels_byte_len, .. } => {
                if u64::from(*def_levels_byte_len) + u64::from(*rep_levels_byte_len) > bytes as u64 {
                    return Err(format!("a page of {bytes} bytes declares more bytes of levels"));
                }
                let levels = buf.get(..*rep_levels_byte_len as usize).unwrap_or_default();
                if !repeated(levels, self.width, n as usize) {
                    return Err("its repetition levels end too early".into());
                }
            }
        }
        self.left =
            self.left.checked_sub(n.into()).ok_or("its pages declare more entries than the file can hold")?;
        match page.encoding() {
            Encoding::PLAIN => Ok(()),
            Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY if self.words => Ok(()),
            Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY => {
                Err("a page refers to a dictionary, but there is none".into())
            }
            other => {
                Err(format!("it is encoded as {other}, wanted PLAIN or RLE_DICTIONARY; write the file again"))
            }
        }
    }
}

/// Whether levels of `width` bits, in runs and packed groups of eight, are at least `n`. The crate's reader would wait
/// forever for those that are missing.
fn repeated(mut bytes: &[u8], width: usize, n: usize) -> bool {
    let mut count = 0usize;
    while width > 0 && count < n {
        let (mut header, mut shift) = (0u64, 0);
        loop {
            let Some((byte, rest)) = bytes.split_first() else { return false };
            bytes = rest;
            header |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 || shift > 56 {
                break;
            }
        }
        let many = usize::try_from(header >> 1).unwrap_or(usize::MAX);
        let size = if header & 1 == 1 { many.saturating_mul(width) } else { width.div_ceil(8) };
        // A run or group without entries would make no progress either.
        if many == 0 || size > bytes.len() {
            return false;
        }
        bytes = &bytes[size..];
        count = count.saturating_add(if header & 1 == 1 { many.saturating_mul(8) } else { many });
    }
    true
}

impl Iterator for Pages {
    type Item = Fallible<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Fallible<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(page) = &page {
            self.checks.check(page).map_err(ParquetError::General)?;
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Fallible<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Fallible<()> {
        self.pages.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Fallible<bool> {
        self.pages.at_record_boundary()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_pages_are_read_before_them() {
        // The type, and sizes as zigzag varints: 2 * 300 is 0xd8 0x04.
        let header = |uncompressed: &[u8], compressed: &[u8]| {
            [&[0x15, 0x00, 0x15][..], uncompressed, &[0x15], compressed, &[0x2c]].concat()
        };
        assert_eq!(page_size(&header(&[0x14], &[0x06])), Some(10));
        assert_eq!(page_size(&header(&[0x14], &[0xd8, 0x04])), Some(300));
        assert_eq!(page_size(&header(&[0xfe, 0xff, 0xff, 0xff, 0x0f], &[0x06])), Some(i32::MAX as u64));
        // Negative, cut off, of another type, and longer than 32 bits.
        assert_eq!(page_size(&header(&[0x13], &[0x06])), None);
        assert_eq!(page_size(&header(&[0x14], &[])[..5]), None);
        assert_eq!(page_size(&[0x25, 0x00, 0x15, 0x14, 0x15, 0x06]), None);
        assert_eq!(page_size(&header(&[0xff; 9], &[0x06])), None);
        assert_eq!(page_size(b""), None);
    }

    #[test]
    fn levels_are_counted_before_they_are_waited_for() {
        // A run of 5, a group of 8 bits, and both with something missing.
        assert!(repeated(&[5 << 1, 1], 1, 5) && !repeated(&[5 << 1, 1], 1, 6) && !repeated(&[5 << 1], 1, 5));
        assert!(
            repeated(&[3, 0xff], 1, 8) && repeated(&[3, 0xff, 2, 0], 1, 9) && !repeated(&[5, 0xff], 1, 8)
        );
        assert!(repeated(&[], 0, 100) && !repeated(&[], 1, 1) && !repeated(&[0, 0, 0], 1, 1));
    }

    #[test]
    fn pages_that_declare_too_much_are_refused() {
        let check = |left, words, page: &Page| Checks { words, left, width: 0 }.check(page);
        let buf = Bytes::from(vec![0; 40]);
        let dictionary = |num_values| Page::DictionaryPage {
            buf: buf.clone(),
            num_values,
            encoding: Encoding::PLAIN,
            is_sorted: false,
        };
        assert!(check(0, false, &dictionary(10)).is_ok());
        let e = check(0, false, &dictionary(11)).unwrap_err();
        assert_eq!(e, "a dictionary of 40 bytes declares 11 entries");
        let data = |num_values, encoding| Page::DataPage {
            buf: buf.clone(),
            num_values,
            encoding,
            def_level_encoding: Encoding::RLE,
            rep_level_encoding: Encoding::RLE,
            statistics: None,
        };
        assert!(check(5, false, &data(5, Encoding::PLAIN)).is_ok());
        assert!(check(5, false, &data(6, Encoding::PLAIN)).unwrap_err().contains("more entries"));
        assert!(check(5, true, &data(5, Encoding::RLE_DICTIONARY)).is_ok());
        assert!(check(5, false, &data(5, Encoding::RLE_DICTIONARY)).unwrap_err().contains("there is none"));
        assert!(check(5, false, &data(5, Encoding::DELTA_BYTE_ARRAY)).unwrap_err().contains("wanted PLAIN"));
        let second = |levels| Page::DataPageV2 {
            buf: buf.clone(),
            num_values: 5,
            encoding: Encoding::PLAIN,
            num_nulls: 0,
            num_rows: 5,
            def_levels_byte_len: levels,
            rep_levels_byte_len: 1,
            is_compressed: false,
            statistics: None,
        };
        assert!(check(5, false, &second(39)).is_ok());
        assert!(check(5, false, &second(u32::MAX)).unwrap_err().contains("more bytes of levels"));
    }
}
