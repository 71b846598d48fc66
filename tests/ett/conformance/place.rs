//! Arguments in device memory: in larger buffers with guard bands, poisoned before the call and checked afterwards.

use rayon::prelude::*;

use ett::backend::{Access, Buffer, DType, In, Kernels, Out, Precision, Role, Stream, to_bf16};
use ett::error;

use super::case::{Arg, Content, Layout, Views};

const S: Stream = Stream::COMPUTE;
/// Bytes before and after the rows, a multiple of the alignment.
const GUARD: usize = 256;
/// Content of the guard bands, two bytes at a time: NaN in every float type, and out of bounds for any table as an
/// index.
const BAND: [u8; 2] = 0x7FC1u16.to_le_bytes();
/// Content of outputs before the call: NaN in every float type.
const POISON: u8 = 0xFF;
/// The same for integers, because all bits set is an index (-1) and a byte (255) that kernels write; no case has a byte of
/// this value as a result.
const POISONED_INTEGER: u8 = 0x7F;

fn poison(dtype: DType) -> u8 {
    if matches!(dtype, DType::I32 | DType::U8) { POISONED_INTEGER } else { POISON }
}

/// An argument in the memory of a device.
pub struct Placed {
    pub name: &'static str,
    pub access: Access,
    dtype: DType,
    rows: usize,
    cols: usize,
    off: usize,
    ld: usize,
    dims: ett::backend::Dims,
    /// Content of the whole buffer before the call.
    image: Vec<u8>,
    buf: Buffer,
}

impl Placed {
    /// Allocates and fills a buffer for `arg`.
    pub fn new(dev: &dyn Kernels, p: Precision, arg: &Arg, layout: Layout) -> error::Result<Self> {
        let dtype = arg.ty.of(p);
        let (rows, cols, size) = (arg.dims.rows(), arg.dims.cols(), dtype.size());
        let ld = match layout {
            _ if arg.dense || rows <= 1 => cols,
            Layout::Dense | Layout::Shifted => cols,
            Layout::Gapped => cols.next_multiple_of(16) + 16,
            Layout::Odd | Layout::Ragged => (cols + 2) | 1,
        };
        let shift = matches!(layout, Layout::Shifted | Layout::Odd) as usize;
        let off = GUARD / size + shift;
        let total = (off + rows * ld) * size + GUARD;
        let mut image = BAND.repeat(total.div_ceil(BAND.len()));
        let access = match &arg.content {
            Content::In(_) => Access::Read,
            Content::Out => Access::Write,
            Content::Add(_) => Access::Accumulate,
        };
        let bytes = arg.values().map(|v| encode(dtype, v));
        for r in 0..rows {
            let (at, width) = ((off + r * ld) * size, cols * size);
            match &bytes {
                Some(b) => image[at..at + width].copy_from_slice(&b[r * width..(r + 1) * width]),
                None => image[at..at + width].fill(poison(dtype)),
            }
        }
        let buf = dev.alloc(Role::Input, image.len())?;
        let placed =
            Placed { name: arg.name, access, dtype, rows, cols, off, ld, dims: arg.dims, image, buf };
        placed.restore(dev)?;
        Ok(placed)
    }

    /// Restores the buffer to its content before the call.
    pub fn restore(&self, dev: &dyn Kernels) -> error::Result<()> {
        dev.copy_in(S, &self.image, Out(self.whole()))
    }

    /// Current content of the whole buffer. Waits for the device.
    pub fn read(&self, dev: &dyn Kernels) -> error::Result<Vec<u8>> {
        dev.read_later(S, self.whole())?.wait()
    }

    fn whole(&self) -> In<'_> {
        let n = self.image.len() / self.dtype.size();
        Views::view(&self.buf, self.dtype, [n].into(), 0, n)
    }

    /// A view of the argument.
    pub fn view(&self) -> In<'_> {
        Views::view(&self.buf, self.dtype, self.dims, self.off, self.ld)
    }

    /// True if all rows begin on multiples of 16 bytes and their size is a multiple of 16 bytes.
    pub fn is_wide(&self) -> bool {
        [self.off, self.ld, self.cols].iter().all(|n| (n * self.dtype.size()).is_multiple_of(16))
    }

    fn row(&self, r: usize) -> std::ops::Range<usize> {
        let size = self.dtype.size();
        let at = (self.off + r * self.ld) * size;
        at..at + self.cols * size
    }

    /// The values of the argument in memory that was read back.
    pub fn values(&self, memory: &[u8]) -> Vec<f64> {
        (0..self.rows).into_par_iter().flat_map_iter(|r| decode(self.dtype, &memory[self.row(r)])).collect()
    }

    /// Fails if memory outside of an output's rows changed, or if an output was not written.
    pub fn check(&self, memory: &[u8]) -> Result<(), String> {
        let name = self.name;
        if memory.len() != self.image.len() {
            return Err(format!("`{name}`: {} bytes were read back, of {}", memory.len(), self.image.len()));
        }
        if self.access == Access::Read {
            return self.untouched(memory).map_err(|e| format!("the input {e}"));
        }
        let mut outside = 0;
        for r in 0..=self.rows {
            let end = if r < self.rows { self.row(r).start } else { memory.len() };
            if let Some(i) = first_difference(&memory[outside..end], &self.image[outside..end]) {
                return Err(format!("memory outside `{name}` was written: {}", self.place(outside + i)));
            }
            outside = if r < self.rows { self.row(r).end } else { end };
        }
        if self.access == Access::Write {
            let size = self.dtype.size();
            let poison = poison(self.dtype);
            let left = |row: &[u8]| row.chunks(size).filter(|e| e.iter().all(|&b| b == poison)).count();
            let unwritten: usize = (0..self.rows).into_par_iter().map(|r| left(&memory[self.row(r)])).sum();
            let unwritten_row =
                || (0..self.rows).map(|r| (r, left(&memory[self.row(r)]))).find(|(_, n)| *n > 0);
            if let Some((r, here)) = unwritten_row().filter(|_| unwritten > 0) {
                return Err(format!(
                    "{unwritten} of {} values of `{name}` were not written, {here} of {} in row {r}, the first such",
                    self.dims.numel(),
                    self.cols
                ));
            }
        }
        Ok(())
    }

    /// Fails if anything in the buffer changed.
    pub fn untouched(&self, memory: &[u8]) -> Result<(), String> {
        match first_difference(memory, &self.image) {
            None => Ok(()),
            Some(at) => Err(format!("`{}` or what surrounds it was written: {}", self.name, self.place(at))),
        }
    }

    /// Fails if two calls left different bits.
    pub fn same(&self, call: usize, memory: &[u8], first: &[u8]) -> Result<(), String> {
        let Some(at) = first_difference(memory, first) else { return Ok(()) };
        let (now, before) = (self.values(memory), self.values(first));
        let different = now.iter().zip(&before).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
        let value = |v: &[f64]| match self.index(at) {
            Some(i) => format!("{:e}", v[i]),
            None => "other bytes".into(),
        };
        Err(format!(
            "call {call} gave other bits than the first: {different} of {} values of `{}` differ, {}: {}, before {}",
            now.len(),
            self.name,
            self.place(at),
            value(&now),
            value(&before)
        ))
    }

    /// The index of the value that contains a byte.
    fn index(&self, byte: usize) -> Option<usize> {
        let at = (byte / self.dtype.size()).checked_sub(self.off)?;
        let (r, c) = (at.checked_div(self.ld)?, at % self.ld);
        (r < self.rows && c < self.cols).then_some(r * self.cols + c)
    }

    /// The position of a byte, for messages.
    fn place(&self, byte: usize) -> String {
        let at = byte / self.dtype.size();
        match (self.index(byte), at.checked_sub(self.off)) {
            (Some(i), _) => format!("row {}, column {}", i / self.cols, i % self.cols),
            (None, None) => format!("{} before the first row", self.off - at),
            (None, Some(at)) if self.rows == 0 || self.cols == 0 => format!("{at} after its empty place"),
            (None, Some(at)) => {
                let r = (at / self.ld).min(self.rows - 1);
                format!("{} after the end of row {r}", at + 1 - r * self.ld - self.cols)
            }
        }
    }
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b { None } else { a.iter().zip(b).position(|(a, b)| a != b).or(Some(a.len().min(b.len()))) }
}

fn encode(dtype: DType, v: &[f64]) -> Vec<u8> {
    fn of<T: bytemuck::NoUninit + Send>(v: &[f64], f: impl Fn(f64) -> T + Sync) -> Vec<u8> {
        let v: Vec<T> = v.par_iter().map(|&v| f(v)).collect();
        bytemuck::cast_slice(&v).to_vec()
    }
    match dtype {
        DType::F64 => of(v, |v| v),
        DType::F32 => of(v, |v| v as f32),
        DType::Bf16 => of(v, to_bf16),
        DType::I32 => of(v, |v| v as i32),
        DType::U8 => of(v, |v| v as u8),
    }
}

fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    fn of<T: bytemuck::Pod>(bytes: &[u8], f: impl Fn(T) -> f64) -> Vec<f64> {
        bytes.chunks_exact(size_of::<T>()).map(|b| f(bytemuck::pod_read_unaligned(b))).collect()
    }
    match dtype {
        DType::F64 => of(bytes, |v: f64| v),
        DType::F32 => of(bytes, |v: f32| f64::from(v)),
        DType::Bf16 => of(bytes, half::bf16::to_f64),
        DType::I32 => of(bytes, |v: i32| f64::from(v)),
        DType::U8 => of(bytes, |v: u8| f64::from(v)),
    }
}

/// Runs a call on a trusted device and returns its outputs.
pub fn compute(
    dev: &dyn Kernels,
    p: Precision,
    args: &[Arg],
    call: &dyn Fn(&dyn Kernels, &Views) -> error::Result<()>,
) -> error::Result<Vec<Vec<f64>>> {
    let placed: Vec<Placed> =
        args.iter().map(|a| Placed::new(dev, p, a, Layout::Dense)).collect::<error::Result<_>>()?;
    call(dev, &views(&placed))?;
    let outputs = placed.iter().filter(|p| p.access != Access::Read);
    outputs.map(|p| Ok(p.values(&p.read(dev)?))).collect()
}

/// The arguments by name.
pub fn views(placed: &[Placed]) -> Views<'_> {
    Views { all: placed.iter().map(|p| (p.name, p.view())).collect() }
}
