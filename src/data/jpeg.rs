//! Decoding of JPEGs, after a check that their compressed data are complete (ITU-T T.81). Decoders silently fill missing
//! data with grey, so every Huffman code is read once more here, without computing a pixel. The check also bounds the
//! memory and the time of the decoder that follows.

use ::image::metadata::Orientation;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::bitmap::{Bitmap, MAX_BYTES, MAX_SIDE, Refused};

/// Extra bytes after the last block of a scan that are accepted as padding. Some cameras write a few.
const PADDING: usize = 8;
/// Bits of a code that are looked up at once; longer codes are searched.
const LOOKUP: u32 = 9;

/// Maximum number of scans, and of blocks in all of them. Programs write about ten scans; without a limit, a file of a few
/// kilobytes could keep a decoder busy for minutes.
const MAX_SCANS: usize = 100;
const MAX_BLOCKS: usize = 1 << 26;

/// How far above the wanted size a reduced picture has to be. The decoder drops the high frequencies of each block, which
/// sharpens gradients inside of a block by 6 to 10 % against those between blocks; a resize by two averages that away.
const REDUCED_ABOVE: usize = 2;

/// Decodes the first picture in `bytes`, a JPEG, turned as its EXIF block says: at 1/4 or 1/2 of its size if its shorter
/// side is at least twice `shorter` then.
pub(super) fn decode(bytes: &[u8], shorter: usize) -> Result<Bitmap, Refused> {
    let checked = check(bytes, shorter)?;
    if checked.reduction > 1
        && let Some(bitmap) = reduced(bytes, &checked, shorter)
    {
        return Ok(bitmap.turned(checked.orientation));
    }
    // The other decoder has refused it, or it is to be decoded in full.
    if checked.memory(1) > MAX_BYTES {
        return Err(Refused::TooLarge);
    }
    let options = DecoderOptions::default()
        .set_max_width(MAX_SIDE as usize)
        .set_max_height(MAX_SIDE as usize)
        .jpeg_set_max_scans(MAX_SCANS)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = zune_jpeg::JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let rgb = decoder.decode().map_err(Refused::broken)?;
    let (width, height) = decoder.dimensions().unwrap_or((0, 0));
    if rgb.len() != height * width * 3 {
        return Err(Refused::broken("its colours are not grey, RGB or CMYK"));
    }
    Ok(Bitmap { height, width, rgb }.turned(checked.orientation))
}

/// Decodes at a reduced size. `None` if this decoder cannot do that.
fn reduced(bytes: &[u8], checked: &Checked, shorter: usize) -> Option<Bitmap> {
    let mut decoder = jpeg_decoder::Decoder::new(bytes);
    decoder.set_max_decoding_buffer_size(MAX_BYTES as usize);
    let part = |side: usize| u16::try_from(side.div_ceil(checked.reduction)).ok();
    let (width, height) = decoder.scale(part(checked.width)?, part(checked.height)?).ok()?;
    let values = decoder.decode().ok()?;
    let (width, height) = (usize::from(width), usize::from(height));
    let rgb = match values.len() {
        n if n == width * height * 3 => values,
        n if n == width * height => values.into_iter().flat_map(|grey| [grey; 3]).collect(),
        _ => return None,
    };
    (width.min(height) >= shorter).then_some(Bitmap { height, width, rgb })
}

/// A JPEG whose data are complete.
#[derive(Debug, PartialEq)]
struct Checked {
    height: usize,
    width: usize,
    /// Divisor of the sides at which it is to be decoded.
    reduction: usize,
    orientation: Orientation,
    /// Bytes of the coefficients, if the decoder has to hold all of them.
    coefficients: u64,
}

impl Checked {
    /// Bytes that a decoder needs at a reduction: the coefficients, the components and the picture.
    fn memory(&self, reduction: usize) -> u64 {
        let pixels = self.height.div_ceil(reduction) * self.width.div_ceil(reduction);
        let components = if reduction > 1 { 3 } else { 0 };
        self.coefficients + pixels as u64 * (3 + components)
    }
}

/// Fails if the first picture in `bytes`, a JPEG, does not reach its end marker, if its data do not match its blocks exactly,
/// or if it exceeds a limit. Only Huffman coding, baseline, extended or progressive, can be decoded.
fn check(bytes: &[u8], shorter: usize) -> Result<Checked, Refused> {
    let mut jpeg = Jpeg { shorter, ..Jpeg::default() };
    jpeg.read(bytes)?;
    jpeg.fits()?;
    Ok(jpeg.checked())
}

/// What the headers and scans read so far say about a picture.
#[derive(Default)]
struct Jpeg {
    tables: [[Option<Huffman>; 4]; 2],
    components: Vec<Component>,
    progressive: bool,
    /// MCUs of an interleaved scan: columns and rows.
    mcus: (usize, usize),
    restart_interval: usize,
    /// Width and height.
    size: (usize, usize),
    /// The shorter side of the result that is enough.
    shorter: usize,
    orientation: Option<Orientation>,
    /// Scans so far, and the blocks in them.
    scans: usize,
    work: usize,
}

#[derive(Default)]
struct Component {
    id: u8,
    /// Blocks of an MCU: columns and rows.
    sampling: (usize, usize),
    /// Blocks that the picture covers, columns and rows; a scan of this component alone holds exactly these.
    blocks: (usize, usize),
    /// Blocks in a row of whole MCUs.
    stride: usize,
    /// Rows of blocks in whole MCUs.
    rows: usize,
    /// For each block, a bit mask of the non-zero coefficients in zigzag order. Later progressive scans hold one bit
    /// for each of them.
    nonzero: Vec<u64>,
    seen: bool,
}

/// A scan's parameters.
struct Scan {
    /// Component, DC table and AC table of each component of the scan.
    of: Vec<(usize, usize, usize)>,
    /// First and last coefficient.
    band: (usize, usize),
    refines: bool,
}

impl Jpeg {
    fn checked(&self) -> Checked {
        let (width, height) = self.size;
        let side = width.min(height);
        let least = self.shorter.saturating_mul(REDUCED_ABOVE);
        // Only grey and colour can be reduced, not CMYK. At 1/8, the decoder rounds down, and saves little more time.
        let plain = matches!(self.components.len(), 1 | 3);
        let reduction = [4, 2].into_iter().find(|&n| plain && side.div_ceil(n) >= least).unwrap_or(1);
        let blocks: usize = self.components.iter().map(|c| c.stride * c.rows).sum();
        let holds = self.progressive || self.scans > 1;
        Checked {
            height,
            width,
            reduction,
            orientation: self.orientation.unwrap_or(Orientation::NoTransforms),
            coefficients: if holds { blocks as u64 * 128 } else { 0 },
        }
    }

    /// Fails if the decoder would need too much memory.
    fn fits(&self) -> Result<(), Refused> {
        let checked = self.checked();
        match checked.memory(checked.reduction) > MAX_BYTES {
            true => Err(Refused::TooLarge),
            false => Ok(()),
        }
    }

    fn read(&mut self, bytes: &[u8]) -> Result<(), Refused> {
        let mut at = 2;
        loop {
            let (marker, next) = marker(bytes, at).map_err(Refused::Broken)?;
            at = next;
            match marker {
                0xD9 => break,
                0x01 | 0xD0..=0xD8 => continue,
                _ => {}
            }
            let length = bytes.get(at..at + 2).map(|b| usize::from(b[0]) << 8 | usize::from(b[1]));
            let body = length
                .filter(|&n| n >= 2)
                .and_then(|n| bytes.get(at + 2..at + n))
                .ok_or(Refused::broken(CUT))?;
            at += 2 + body.len();
            match marker {
                0xC0..=0xC2 => self
                    .frame(body, marker == 0xC2)
                    .ok_or(Refused::broken("its frame header is broken"))??,
                0xC3 | 0xC5..=0xC7 | 0xC9..=0xCB | 0xCD..=0xCF => {
                    let coding = if marker > 0xC8 { "arithmetic" } else { "lossless or hierarchical" };
                    let what =
                        format!("it uses {coding} coding, wanted baseline or progressive Huffman coding");
                    return Err(Refused::Broken(what + "; convert it"));
                }
                0xC4 => self.huffman(body).ok_or(Refused::broken("a Huffman table is broken"))?,
                0xDD => {
                    let interval = number(body);
                    self.restart_interval =
                        interval.ok_or(Refused::broken("its restart interval is broken"))?;
                }
                0xDA => {
                    let scan = self.scan(body).ok_or(Refused::broken("a scan's header is broken"))?;
                    self.fits()?;
                    at = self.data(bytes, at, &scan).map_err(Refused::Broken)?;
                }
                0xE1 if self.orientation.is_none() => {
                    let block = body.strip_prefix(b"Exif\0\0");
                    // A broken EXIF block is no reason to lose the picture.
                    self.orientation = block.and_then(Orientation::from_exif_chunk);
                }
                _ => {}
            }
        }
        match self.components.iter().all(|c| c.seen) && !self.components.is_empty() {
            true => Ok(()),
            false => Err(Refused::broken("it lacks a scan")),
        }
    }

    /// `None` if the header is broken.
    fn frame(&mut self, body: &[u8], progressive: bool) -> Option<Result<(), Refused>> {
        let (height, width) = (number(&body[1.min(body.len())..])?, number(body.get(3..)?)?);
        let count = usize::from(*body.get(5)?);
        if !self.components.is_empty() || !(1..=4).contains(&count) || height * width == 0 {
            return None;
        }
        if height.max(width) > MAX_SIDE as usize {
            return Some(Err(Refused::TooLarge));
        }
        let listed = body.get(6..6 + 3 * count)?;
        let sampling = |c: &[u8]| (usize::from(c[1] >> 4), usize::from(c[1] & 15));
        let (mut across, mut down) = (1, 1);
        for c in listed.chunks(3) {
            let (h, v) = sampling(c);
            if !(1..=4).contains(&h) || !(1..=4).contains(&v) {
                return None;
            }
            (across, down) = (across.max(h), down.max(v));
        }
        self.progressive = progressive;
        self.size = (width, height);
        self.mcus = (width.div_ceil(8 * across), height.div_ceil(8 * down));
        for c in listed.chunks(3) {
            let (h, v) = sampling(c);
            let (stride, rows) = (self.mcus.0 * h, self.mcus.1 * v);
            self.components.push(Component {
                id: c[0],
                sampling: (h, v),
                blocks: ((width * h).div_ceil(8 * across), (height * v).div_ceil(8 * down)),
                stride,
                rows,
                nonzero: Vec::new(),
                seen: false,
            });
        }
        if let Err(e) = self.fits() {
            return Some(Err(e));
        }
        for c in self.components.iter_mut().filter(|_| progressive) {
            c.nonzero = vec![0; c.stride * c.rows];
        }
        Some(Ok(()))
    }

    fn huffman(&mut self, mut body: &[u8]) -> Option<()> {
        while let Some((&head, rest)) = body.split_first() {
            let counts = rest.get(..16)?;
            let n = counts.iter().map(|&c| usize::from(c)).sum::<usize>();
            let symbols = rest.get(16..16 + n)?;
            let place = self.tables.get_mut(usize::from(head >> 4))?.get_mut(usize::from(head & 15))?;
            *place = Some(Huffman::new(counts, symbols)?);
            body = &rest[16 + n..];
        }
        Some(())
    }

    fn scan(&mut self, body: &[u8]) -> Option<Scan> {
        let (&count, rest) = body.split_first()?;
        let (listed, rest) = rest.split_at_checked(2 * usize::from(count))?;
        let mut of = Vec::new();
        for c in listed.chunks(2) {
            let i = self.components.iter().position(|known| known.id == c[0])?;
            self.components[i].seen = true;
            of.push((i, usize::from(c[1] >> 4), usize::from(c[1] & 15)));
        }
        let &[first, last, approximation] = rest else { return None };
        let band = match self.progressive {
            true => (usize::from(first), usize::from(last)),
            false => (0, 63),
        };
        // In a progressive scan, only DC coefficients can be interleaved.
        let together = !self.progressive || of.len() == 1 || band == (0, 0);
        let mixed = self.progressive && band.0 == 0 && band.1 > 0;
        ((1..=4).contains(&of.len()) && together && !mixed && band.0 <= band.1 && band.1 < 64)
            .then_some(Scan { of, band, refines: self.progressive && approximation >> 4 > 0 })
    }

    /// Reads the data of a scan from `at` and returns where they end.
    fn data(&mut self, bytes: &[u8], at: usize, scan: &Scan) -> Result<usize, String> {
        let (columns, rows) = match scan.of[..] {
            [(alone, ..)] => self.components[alone].blocks,
            _ => self.mcus,
        };
        let total = columns * rows;
        let blocks = |&(c, ..): &(usize, usize, usize)| {
            let (across, down) = self.components[c].sampling;
            if scan.of.len() == 1 { 1 } else { across * down }
        };
        self.scans += 1;
        self.work += total * scan.of.iter().map(blocks).sum::<usize>();
        if self.scans > MAX_SCANS || self.work > MAX_BLOCKS {
            return Err(format!("it has more than {MAX_SCANS} scans, or {MAX_BLOCKS} blocks in its scans"));
        }
        let interval = if self.restart_interval == 0 { total } else { self.restart_interval };
        let mut bits = Bits { bytes, at, buffer: 0, held: 0 };
        let mut run = 0;
        for mcu in 0..total {
            if mcu > 0 && mcu % interval == 0 {
                let at = bits.end()?;
                let (found, next) = marker(bytes, at)?;
                if usize::from(found) != 0xD0 + (mcu / interval - 1) % 8 {
                    return Err(format!("a restart marker is missing after {mcu} of {total} units"));
                }
                (bits, run) = (Bits { bytes, at: next, buffer: 0, held: 0 }, 0);
            }
            self.mcu(&mut bits, scan, (mcu % columns, mcu / columns), &mut run)
                .ok_or_else(|| format!("its data end early or are broken after {mcu} of {total} units"))?;
        }
        bits.end()
    }

    /// Reads the blocks of an MCU; `None` if the data end early or are invalid.
    fn mcu(&mut self, bits: &mut Bits, scan: &Scan, at: (usize, usize), run: &mut usize) -> Option<()> {
        for &(component, dc, ac) in &scan.of {
            let c = &mut self.components[component];
            let (across, down) = if scan.of.len() == 1 { (1, 1) } else { c.sampling };
            let table = |class: usize, i: usize| self.tables[class].get(i)?.as_ref();
            for block in 0..across * down {
                if !self.progressive {
                    baseline(bits, table(0, dc)?, table(1, ac)?)?;
                    continue;
                }
                let (x, y) = (at.0 * across + block % across, at.1 * down + block / across);
                let nonzero = c.nonzero.get_mut(y * c.stride + x)?;
                match (scan.band.0, scan.refines) {
                    (0, false) => mean(bits, table(0, dc)?)?,
                    (0, true) => bits.skip(1)?,
                    (_, false) => first(bits, table(1, ac)?, scan.band, nonzero, run)?,
                    (_, true) => refine(bits, table(1, ac)?, scan.band, nonzero, run)?,
                }
            }
        }
        Some(())
    }
}

const CUT: &str = "it ends before its end marker";

/// The next marker at or after `at`, and the position after it.
fn marker(bytes: &[u8], mut at: usize) -> Result<(u8, usize), String> {
    loop {
        match (bytes.get(at), bytes.get(at + 1)) {
            (Some(0xFF), Some(&m)) if m != 0 && m != 0xFF => return Ok((m, at + 2)),
            (Some(_), Some(_)) => at += 1,
            _ => return Err(CUT.into()),
        }
    }
}

fn number(bytes: &[u8]) -> Option<usize> {
    Some(usize::from(*bytes.first()?) << 8 | usize::from(*bytes.get(1)?))
}

fn mean(bits: &mut Bits, dc: &Huffman) -> Option<()> {
    let size = bits.symbol(dc)?;
    (size < 16).then_some(())?;
    bits.skip(size.into())
}

fn baseline(bits: &mut Bits, dc: &Huffman, ac: &Huffman) -> Option<()> {
    mean(bits, dc)?;
    let mut k = 1;
    while k < 64 {
        let symbol = bits.symbol(ac)?;
        match (symbol >> 4, symbol & 15) {
            (15, 0) => k += 16,
            (_, 0) => break,
            (zeros, size) => {
                k += usize::from(zeros) + 1;
                (k <= 64).then_some(())?;
                bits.skip(size.into())?;
            }
        }
    }
    Some(())
}

/// First scan of a band of coefficients. `run` counts the blocks still to come that have none.
fn first(
    bits: &mut Bits,
    ac: &Huffman,
    band: (usize, usize),
    nonzero: &mut u64,
    run: &mut usize,
) -> Option<()> {
    if *run > 0 {
        *run -= 1;
        return Some(());
    }
    let mut k = band.0;
    while k <= band.1 {
        let symbol = bits.symbol(ac)?;
        match (symbol >> 4, symbol & 15) {
            (15, 0) => k += 16,
            (more, 0) => {
                *run = (1 << more) - 1 + bits.take(more.into())?;
                break;
            }
            (zeros, size) => {
                k += usize::from(zeros);
                (k <= band.1).then_some(())?;
                bits.skip(size.into())?;
                *nonzero |= 1 << k;
                k += 1;
            }
        }
    }
    Some(())
}

/// Refinement scan: one more bit of the coefficients of a band.
fn refine(
    bits: &mut Bits,
    ac: &Huffman,
    band: (usize, usize),
    nonzero: &mut u64,
    run: &mut usize,
) -> Option<()> {
    let mut k = band.0;
    while *run == 0 && k <= band.1 {
        let symbol = bits.symbol(ac)?;
        let (mut zeros, size) = (symbol >> 4, symbol & 15);
        match (zeros, size) {
            (15, 0) => {}
            (more, 0) => {
                *run = (1 << more) + bits.take(more.into())?;
                break;
            }
            _ => bits.skip(1)?,
        }
        // Each non-zero coefficient that is passed has a bit here; zeros are counted.
        while k <= band.1 {
            if *nonzero >> k & 1 == 1 {
                bits.skip(1)?;
            } else if zeros == 0 {
                break;
            } else {
                zeros -= 1;
            }
            k += 1;
        }
        if size > 0 && k <= band.1 {
            *nonzero |= 1 << k;
        }
        k += 1;
    }
    if *run > 0 {
        for k in k..=band.1 {
            if *nonzero >> k & 1 == 1 {
                bits.skip(1)?;
            }
        }
        *run -= 1;
    }
    Some(())
}

/// A table of Huffman codes.
struct Huffman {
    /// Length and symbol of the code that begins a word of [`LOOKUP`] bits; length 0 if the code is longer.
    short: Vec<(u8, u8)>,
    /// For each length from 1: one past the last code, and the offset from a code to the index of its symbol.
    ends: [(i32, i32); 16],
    symbols: Vec<u8>,
}

impl Huffman {
    /// `counts` holds the number of codes of each length from 1; `symbols` are in the order of the codes.
    fn new(counts: &[u8], symbols: &[u8]) -> Option<Self> {
        let mut table =
            Huffman { short: vec![(0, 0); 1 << LOOKUP], ends: [(0, 0); 16], symbols: symbols.into() };
        let (mut code, mut place) = (0i32, 0i32);
        for (i, &count) in counts.iter().enumerate() {
            let length = i as u32 + 1;
            for c in code..code + i32::from(count) {
                let symbol = *symbols.get((place + c - code) as usize)?;
                if length <= LOOKUP {
                    let start = (c as usize) << (LOOKUP - length);
                    let words = table.short.get_mut(start..start + (1 << (LOOKUP - length)))?;
                    words.fill((length as u8, symbol));
                }
            }
            table.ends[i] = (code + i32::from(count), place - code);
            place += i32::from(count);
            code += i32::from(count);
            (code <= 1 << length).then_some(())?;
            code <<= 1;
        }
        Some(table)
    }
}

/// The bits of a scan up to its next marker.
struct Bits<'a> {
    bytes: &'a [u8],
    /// Position of the next byte.
    at: usize,
    /// Its lowest `held` bits have not been read yet.
    buffer: u64,
    held: u32,
}

impl Bits<'_> {
    /// Fills the buffer, stopping at the next marker.
    fn fill(&mut self) {
        while self.held <= 56 {
            let stuffed = match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                (Some(0xFF), Some(0)) => 2,
                (Some(0xFF), _) | (None, _) => break,
                _ => 1,
            };
            self.buffer = self.buffer << 8 | u64::from(self.bytes[self.at]);
            (self.at, self.held) = (self.at + stuffed, self.held + 8);
        }
    }

    /// The next `n` bits, at most 16.
    fn take(&mut self, n: u32) -> Option<usize> {
        self.skip(n)?;
        Some(self.buffer.checked_shr(self.held).unwrap_or(0) as usize & ((1 << n) - 1))
    }

    fn skip(&mut self, n: u32) -> Option<()> {
        if self.held < n {
            self.fill();
        }
        self.held = self.held.checked_sub(n)?;
        Some(())
    }

    fn symbol(&mut self, table: &Huffman) -> Option<u8> {
        if self.held < 16 {
            self.fill();
        }
        let word = match self.held {
            16.. => (self.buffer >> (self.held - 16)) as usize & 0xFFFF,
            held => (self.buffer << (16 - held)) as usize & 0xFFFF,
        };
        if let (length @ 1.., symbol) = table.short[word >> (16 - LOOKUP)] {
            self.skip(length.into())?;
            return Some(symbol);
        }
        for length in LOOKUP + 1..=16 {
            let code = (word >> (16 - length)) as i32;
            let (end, place) = table.ends[length as usize - 1];
            if code < end {
                self.skip(length)?;
                return table.symbols.get((code + place) as usize).copied();
            }
        }
        None
    }

    /// The position of the next marker; fails if more than padding lies before it.
    fn end(&self) -> Result<usize, String> {
        let mut at = self.at;
        while !matches!((self.bytes.get(at), self.bytes.get(at + 1)), (Some(0xFF), Some(1..))) {
            at += 1;
            if at >= self.bytes.len() {
                return Err(CUT.into());
            }
        }
        match at - self.at + self.held as usize / 8 {
            0..=PADDING => Ok(at),
            more => Err(format!("{more} bytes follow the last block of a scan")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    /// Baseline with subsampled chroma, progressive, both with restart markers, without subsampling and with its own
    /// Huffman codes, grey, and CMYK; written by libjpeg-turbo.
    const PICTURES: [(&str, &[u8]); 7] = [
        ("baseline", include_bytes!("../../tests/pictures/baseline.jpg")),
        ("progressive", include_bytes!("../../tests/pictures/progressive.jpg")),
        ("restart", include_bytes!("../../tests/pictures/restart.jpg")),
        ("restart-progressive", include_bytes!("../../tests/pictures/restart-progressive.jpg")),
        ("full", include_bytes!("../../tests/pictures/full.jpg")),
        ("grey", include_bytes!("../../tests/pictures/grey.jpg")),
        ("cmyk", include_bytes!("../../tests/pictures/cmyk.jpg")),
    ];

    fn passes(jpeg: &[u8]) -> bool {
        check(jpeg, usize::MAX).is_ok()
    }

    /// Where the data of the first scan begin.
    fn data(jpeg: &[u8]) -> usize {
        let at = jpeg.windows(2).position(|w| w == [0xFF, 0xDA]).unwrap() + 2;
        at + number(&jpeg[at..]).unwrap()
    }

    #[test]
    fn whole_pictures_pass_whatever_surrounds_them() {
        for (name, jpeg) in PICTURES {
            assert!(passes(jpeg), "{name}");
            let thumbnail = PICTURES[0].1;
            let segment =
                [&[0xFF, 0xE1], &(thumbnail.len() as u16 + 2).to_be_bytes()[..], thumbnail].concat();
            let with = [&jpeg[..2], &segment, &jpeg[2..], &[0; 40], b"\xff\xd8more"].concat();
            assert!(passes(&with), "{name}");
            // A marker may be preceded by any number of FF bytes.
            let end = jpeg.len() - 2;
            let filled = [&jpeg[..end], &[0xFF; 5], &jpeg[end..]].concat();
            assert!(passes(&filled), "{name}");
        }
    }

    #[test]
    fn cut_pictures_are_refused_wherever_they_are_cut() {
        for (name, jpeg) in PICTURES {
            for length in 0..jpeg.len() {
                assert!(!passes(&jpeg[..length]), "{name} cut to {length} of {}", jpeg.len());
                // With an end marker appended, as some programs do. Cut after a whole progressive scan, that is a
                // complete picture.
                let closed = [&jpeg[..length], &[0xFF, 0xD9]].concat();
                let refused = !passes(&closed);
                assert!(
                    refused || length > jpeg.len() - 20 || name.contains("progressive"),
                    "{name} cut to {length} of {} and closed",
                    jpeg.len()
                );
            }
        }
    }

    #[test]
    fn holes_are_refused() {
        for (name, jpeg) in PICTURES {
            let (from, to) = (data(jpeg), jpeg.len() - 2);
            let hole = from + (to - from) / 3..from + (to - from) * 2 / 3;
            let mut zeroed = jpeg.to_vec();
            zeroed[hole.clone()].fill(0);
            assert!(!passes(&zeroed), "{name} with zeros");
            let cut_out = [&jpeg[..hole.start], &jpeg[hole.end..]].concat();
            assert!(!passes(&cut_out), "{name} without its middle");
            let doubled = [&jpeg[..hole.end], &jpeg[hole.start..]].concat();
            assert!(!passes(&doubled), "{name} with its middle twice");
        }
    }

    #[test]
    fn nothing_panics() {
        let mut rng = Philox::new(1, 0);
        for (_, jpeg) in PICTURES {
            for _ in 0..2000 {
                let mut changed = jpeg.to_vec();
                for _ in 0..1 + rng.below(4) {
                    changed[rng.below(jpeg.len())] = rng.u32() as u8;
                }
                // Either result is right.
                let _ = decode(&changed, 1 + rng.below(100));
            }
        }
    }
}
