//! Tensors: a shape and an element type over a device buffer.

use std::sync::Arc;

use crate::backend::{Acc, Buffer, DType, Dims, Element, Fill, In, Kernels, Out, Role, Stream, to_bf16};
use crate::error::{Error, Result};

/// A tensor on some device: rows of `cols` elements, `ld` elements apart (`ld == cols` unless it is a
/// column slice of a fused tensor). Cloning shares the buffer.
#[derive(Clone)]
pub struct Tensor {
    buf: Arc<Buffer>,
    off: u64,
    dtype: DType,
    dims: Dims,
    ld: usize,
}

impl Tensor {
    /// A new tensor; its contents are unspecified until a kernel writes them.
    pub fn empty(dev: &dyn Kernels, role: Role, dtype: DType, dims: impl Into<Dims>) -> Result<Self> {
        let dims = dims.into();
        let bytes = dims.bytes(dtype).ok_or_else(|| {
            Error::arg(
                "empty",
                "dims",
                format!("{dims} {dtype}"),
                "fewer elements, so that they can be addressed",
            )
        })?;
        let buf = Arc::new(dev.alloc(role, bytes)?);
        Ok(Tensor { buf, off: 0, dtype, dims, ld: dims.cols() })
    }

    /// Whether there are other tensors with this buffer.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.buf) > 1
    }

    /// A new tensor filled with zeros.
    pub fn zeros(dev: &dyn Kernels, role: Role, dtype: DType, dims: impl Into<Dims>) -> Result<Self> {
        let t = Self::empty(dev, role, dtype, dims)?;
        dev.fill(Stream::COMPUTE, &Fill { y: t.out(), value: 0.0 })?;
        Ok(t)
    }

    /// Copies host values in, as they are: `T` is the tensor's element type.
    pub fn from_host<T: Element>(
        dev: &dyn Kernels,
        role: Role,
        values: &[T],
        dims: impl Into<Dims>,
    ) -> Result<Self> {
        let dims = dims.into();
        if values.len() != dims.numel() {
            return Err(Error::arg("from_host", "values", values.len(), dims.numel()));
        }
        let t = Self::empty(dev, role, T::DTYPE, dims)?;
        dev.copy_in(Stream::COMPUTE, bytemuck::cast_slice(values), t.out())?;
        Ok(t)
    }

    /// Copies float values in, rounded to `dtype`.
    pub fn from_f64(
        dev: &dyn Kernels,
        role: Role,
        dtype: DType,
        values: &[f64],
        dims: impl Into<Dims>,
    ) -> Result<Self> {
        match dtype {
            DType::F64 => Self::from_host(dev, role, values, dims),
            DType::F32 => {
                let v: Vec<f32> = values.iter().map(|&x| x as f32).collect();
                Self::from_host(dev, role, &v, dims)
            }
            DType::Bf16 => {
                let v: Vec<half::bf16> = values.iter().map(|&x| to_bf16(x)).collect();
                Self::from_host(dev, role, &v, dims)
            }
            DType::I32 => {
                let v: Vec<i32> = values.iter().map(|&x| x as i32).collect();
                Self::from_host(dev, role, &v, dims)
            }
            DType::U8 => {
                let v: Vec<u8> = values.iter().map(|&x| x as u8).collect();
                Self::from_host(dev, role, &v, dims)
            }
        }
    }

    /// Copies an `ndarray` in, rounded to `dtype`; at most four dimensions.
    pub fn from_ndarray(
        dev: &dyn Kernels,
        role: Role,
        dtype: DType,
        a: &ndarray::ArrayD<f64>,
    ) -> Result<Self> {
        let dims = Dims::from_slice(a.shape())
            .ok_or_else(|| Error::arg("from_ndarray", "a", a.ndim(), "at most 4 dimensions"))?;
        let values: Vec<f64> = a.iter().copied().collect();
        Self::from_f64(dev, role, dtype, &values, dims)
    }

    /// The values on the host, widened to f64. Waits for the device.
    pub fn to_f64(&self, dev: &dyn Kernels) -> Result<Vec<f64>> {
        Ok(to_f64(self.dtype, &dev.read_later(Stream::COMPUTE, self.view())?.wait()?))
    }

    /// The values on the host as they are stored. Waits for the device.
    pub fn to_host<T: Element>(&self, dev: &dyn Kernels) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype {
            return Err(Error::arg("to_host", "T", T::DTYPE, self.dtype));
        }
        Ok(bytemuck::pod_collect_to_vec(&dev.read_later(Stream::COMPUTE, self.view())?.wait()?))
    }

    /// The values as an f64 `ndarray`. Waits for the device.
    pub fn to_ndarray(&self, dev: &dyn Kernels) -> Result<ndarray::ArrayD<f64>> {
        let v = self.to_f64(dev)?;
        ndarray::ArrayD::from_shape_vec(self.dims.as_slice(), v)
            .map_err(|e| Error::arg("to_ndarray", "self", e, "a shape that fits its values"))
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape.
    pub fn dims(&self) -> Dims {
        self.dims
    }

    /// True when rows follow each other without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.ld == self.dims.cols() || self.dims.rows() <= 1
    }

    /// The same elements under another shape.
    pub fn reshape(&self, dims: impl Into<Dims>) -> Result<Self> {
        let dims = dims.into();
        if !self.is_contiguous() {
            return Err(Error::arg("reshape", "self", format!("strided by {}", self.ld), "contiguous"));
        }
        if dims.numel() != self.dims.numel() || dims.bytes(self.dtype).is_none() {
            return Err(Error::arg("reshape", "dims", dims, format!("{} elements", self.dims.numel())));
        }
        Ok(Tensor { dims, ld: dims.cols(), ..self.clone() })
    }

    /// Rows `start..start + n` of the tensor seen as `[rows, cols]`.
    pub fn rows(&self, start: usize, n: usize) -> Result<Self> {
        within("rows", start, n, self.dims.rows())?;
        let off = self.off + (start * self.ld * self.dtype.size()) as u64;
        Ok(Tensor { off, dims: [n, self.dims.cols()].into(), ..self.clone() })
    }

    /// Columns `start..start + n` of the tensor seen as `[rows, cols]`: a view with a row stride.
    pub fn columns(&self, start: usize, n: usize) -> Result<Self> {
        within("columns", start, n, self.dims.cols())?;
        let off = self.off + (start * self.dtype.size()) as u64;
        Ok(Tensor { off, dims: [self.dims.rows(), n].into(), ..self.clone() })
    }

    /// Elements `start..start + n` of a contiguous tensor, as a vector.
    pub fn range(&self, start: usize, n: usize) -> Result<Self> {
        if !self.is_contiguous() {
            return Err(Error::arg("range", "self", format!("strided by {}", self.ld), "contiguous"));
        }
        within("range", start, n, self.dims.numel())?;
        let off = self.off + (start * self.dtype.size()) as u64;
        Ok(Tensor { off, dims: [n].into(), ld: n, ..self.clone() })
    }

    /// `dims` elements of type `dtype` that begin at byte `at` of a tensor of bytes: several tensors that are copied
    /// to the device as one. Kernels are fastest if `at` is a multiple of 256.
    pub fn part(&self, at: usize, dtype: DType, dims: impl Into<Dims>) -> Result<Self> {
        let dims = dims.into();
        if self.dtype != DType::U8 || !self.is_contiguous() {
            return Err(Error::arg(
                "part",
                "self",
                format!("{} {}", self.dims, self.dtype),
                "contiguous bytes",
            ));
        }
        let bytes = dims.bytes(dtype).unwrap_or(usize::MAX);
        within("part", at, bytes, self.dims.numel())?;
        let off = self.off + at as u64;
        if !off.is_multiple_of(dtype.size() as u64) {
            return Err(Error::arg("part", "at", at, format!("a multiple of {}", dtype.size())));
        }
        Ok(Tensor { off, dtype, dims, ld: dims.cols(), ..self.clone() })
    }

    /// As a kernel input.
    pub fn view(&self) -> In<'_> {
        // SAFETY: `empty` takes as many bytes as its shape needs, and every tensor made of another is a part of it.
        unsafe { In::unchecked(&self.buf, self.off, self.dtype, self.dims, self.ld as i64) }
    }

    /// As a kernel output: every element is overwritten.
    pub fn out(&self) -> Out<'_> {
        Out(self.view())
    }

    /// As an accumulated kernel output.
    pub fn acc(&self) -> Acc<'_> {
        Acc(self.view())
    }
}

/// The values of elements of a type, read back as bytes.
pub(crate) fn to_f64(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    fn all<T: Element>(bytes: &[u8], wide: impl Fn(T) -> f64) -> Vec<f64> {
        bytemuck::pod_collect_to_vec::<u8, T>(bytes).into_iter().map(wide).collect()
    }
    match dtype {
        DType::F64 => all::<f64>(bytes, |x| x),
        DType::F32 => all::<f32>(bytes, f64::from),
        DType::Bf16 => all::<half::bf16>(bytes, half::bf16::to_f64),
        DType::I32 => all::<i32>(bytes, f64::from),
        DType::U8 => all::<u8>(bytes, f64::from),
    }
}

/// Arrays that are copied to a device as one, each at a multiple of 256 bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Block(Vec<u8>);

impl Block {
    const ALIGN: usize = 256;

    /// Appends an array.
    pub fn push<T: Element>(&mut self, array: &[T]) {
        self.0.resize(self.0.len().next_multiple_of(Self::ALIGN), 0);
        self.0.extend_from_slice(bytemuck::cast_slice(array));
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Copies all arrays to new memory of a device on stream `s`; [`Parts`] finds them there.
    pub fn upload(&self, dev: &dyn Kernels, s: Stream) -> Result<Tensor> {
        let t = Tensor::empty(dev, Role::Input, DType::U8, [self.0.len()])?;
        dev.copy_in(s, &self.0, t.out())?;
        Ok(t)
    }
}

/// The arrays of a [`Block`] on a device, in the order in which they were appended.
pub struct Parts<'a> {
    block: &'a Tensor,
    at: usize,
}

impl<'a> Parts<'a> {
    /// The arrays of a block that was copied to `block`.
    pub fn of(block: &'a Tensor) -> Self {
        Parts { block, at: 0 }
    }

    /// The next array.
    pub fn take(&mut self, dtype: DType, dims: impl Into<Dims>) -> Result<Tensor> {
        let start = self.at.next_multiple_of(Block::ALIGN);
        let t = self.block.part(start, dtype, dims)?;
        self.at = start + t.dims.numel() * dtype.size();
        Ok(t)
    }
}

/// Fails unless `start..start + n` lies within `0..len`.
fn within(op: &'static str, start: usize, n: usize, len: usize) -> Result<()> {
    match start.checked_add(n) {
        Some(end) if end <= len => Ok(()),
        _ => Err(Error::arg(op, "start + n", format!("{start} + {n}"), format!("<= {len}"))),
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor {} {}", self.dims, self.dtype)
    }
}
