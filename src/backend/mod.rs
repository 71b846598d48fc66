//! The contract between the model and a device.
//!
//! A *kernel* is a small named function over buffers with a documented formula. [`Kernels`] lists all of
//! them, [`Device`] what surrounds them: memory, copies, collectives. [`Cpu`] computes them in plain
//! Rust, [`Plan`] computes nothing and counts. Ops, models and training see `&dyn Kernels` only.

pub mod abi;
mod contract;
pub mod cpu;
pub mod cuda;
mod dims;
mod dtype;
mod plan;
mod slot;

use std::sync::Arc;

use crate::error::{Error, Result};
pub use contract::*;
pub use cpu::{Cpu, KernelTime};
#[cfg(ett_cuda)]
pub use cuda::Cuda;
pub use dims::Dims;
pub use dtype::{DType, Element, Precision, to_bf16};
pub use plan::{KernelCount, Plan, Target};
pub use slot::Slot;

/// What a buffer is for; memory is reported by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Master weights and the weights that products read.
    Weight,
    /// Parameter gradients.
    Gradient,
    /// Optimizer moments.
    Moment,
    /// Exponential moving averages of the weights.
    Ema,
    /// Values and gradients that live within one step.
    Activation,
    /// Scratch of one kernel.
    Workspace,
    /// Batches, indices, the step state.
    Input,
}

impl Role {
    /// All roles, in report order.
    pub const ALL: [Role; 7] = [
        Role::Weight,
        Role::Gradient,
        Role::Moment,
        Role::Ema,
        Role::Activation,
        Role::Workspace,
        Role::Input,
    ];
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Weight => "weight",
            Role::Gradient => "gradient",
            Role::Moment => "moment",
            Role::Ema => "ema",
            Role::Activation => "activation",
            Role::Workspace => "workspace",
            Role::Input => "input",
        })
    }
}

/// An ordered queue of launches. Devices without queues run everything at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub u8);

impl Stream {
    /// Where kernels run.
    pub const COMPUTE: Stream = Stream(0);
    /// Where batches are copied.
    pub const COPY: Stream = Stream(1);
}

/// Gives memory back when a [`Buffer`] is dropped.
pub trait Reclaim: Send + Sync {
    /// Takes back what [`Device::alloc`] gave.
    ///
    /// # Safety
    /// `addr`, `bytes` and `role` are those of memory that this owner gave, and nobody uses it any more.
    unsafe fn reclaim(&self, addr: u64, bytes: usize, role: Role);
}

/// Device memory: an address that only its device may follow.
pub struct Buffer {
    addr: u64,
    bytes: usize,
    role: Role,
    owner: Arc<dyn Reclaim>,
}

impl Buffer {
    /// For devices: wraps an allocation.
    ///
    /// # Safety
    /// Kernels follow the address. From `addr`, a multiple of 256, the device may read and write `bytes` bytes, which
    /// hold some value, until the buffer is dropped and `owner` takes them back; nothing else uses them. On a device
    /// without data, and with 0 bytes, any address will do.
    pub unsafe fn new(addr: u64, bytes: usize, role: Role, owner: Arc<dyn Reclaim>) -> Self {
        Buffer { addr, bytes, role, owner }
    }

    /// The device address; 0 on a device without data.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `new` was given this memory by its owner; views borrow the buffer, so that none is left.
        unsafe { self.owner.reclaim(self.addr, self.bytes, self.role) };
    }
}

/// What a view covers. A view lets its fields be read, as its own, but not changed: it would leave its buffer.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Element type.
    pub dtype: DType,
    /// Shape; all dimensions but the last are rows.
    pub dims: Dims,
    /// Elements from one row to the next.
    pub ld: i64,
}

/// A kernel input: a part of a buffer, as its [`Extent`] says.
#[derive(Clone, Copy)]
pub struct In<'a> {
    buf: &'a Buffer,
    /// Byte offset of the first element.
    off: u64,
    extent: Extent,
}

/// A kernel output: overwritten, never read.
#[derive(Clone, Copy)]
pub struct Out<'a>(pub In<'a>);

/// A kernel output that is added to: parameter gradients, statistics, and what an optimizer updates.
#[derive(Clone, Copy)]
pub struct Acc<'a>(pub In<'a>);

impl<'a> In<'a> {
    /// `dims` elements of `dtype` from byte `off` of `buf`, rows `ld` elements apart; an error if they do not lie
    /// inside the buffer, in whole elements, or if rows overlap.
    pub fn new(buf: &'a Buffer, off: u64, dtype: DType, dims: impl Into<Dims>, ld: i64) -> Result<Self> {
        let v = In { buf, off, extent: Extent { dtype, dims: dims.into(), ld } };
        check_view("view", "extent", &v)?;
        Ok(v)
    }

    /// As [`In::new`], without its checks.
    ///
    /// # Safety
    /// The view would pass them, or it only meets devices that check every view themselves, as those of this crate do.
    pub unsafe fn unchecked(buf: &'a Buffer, off: u64, dtype: DType, dims: Dims, ld: i64) -> Self {
        In { buf, off, extent: Extent { dtype, dims, ld } }
    }

    /// The same elements of a contiguous view under another shape; errors name argument `arg` of `op`.
    pub(crate) fn reshape(&self, op: &'static str, arg: &'static str, dims: impl Into<Dims>) -> Result<Self> {
        let dims = dims.into();
        check_view(op, arg, self)?;
        if !self.is_contiguous() {
            return Err(Error::arg(op, arg, format!("strided by {}", self.ld), "contiguous"));
        }
        if dims.numel() != self.dims.numel() {
            return Err(Error::arg(op, arg, self.dims, format!("{} elements", dims.numel())));
        }
        let extent = Extent { dims, ld: dims.cols() as i64, ..self.extent };
        Ok(In { extent, ..*self })
    }

    /// The memory that it is a part of.
    pub fn buffer(&self) -> &'a Buffer {
        self.buf
    }

    /// The device address of the first element.
    pub fn addr(&self) -> u64 {
        self.buf.addr.wrapping_add(self.off)
    }

    /// True when rows follow each other without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.ld == self.dims.cols() as i64 || self.dims.rows() <= 1
    }

    /// Bytes of the elements themselves, gaps left out.
    pub fn bytes(&self) -> u64 {
        self.dims.numel().saturating_mul(self.dtype.size()) as u64
    }
}

impl std::ops::Deref for In<'_> {
    type Target = Extent;
    fn deref(&self) -> &Extent {
        &self.extent
    }
}

/// How a kernel touches a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Overwritten.
    Write,
    /// Read and written.
    Accumulate,
}

/// A value on its way back to the host.
pub struct Pending(Box<dyn FnOnce() -> Result<Vec<u8>> + Send>);

impl Pending {
    /// For devices: wraps the wait.
    pub fn new(wait: impl FnOnce() -> Result<Vec<u8>> + Send + 'static) -> Self {
        Pending(Box::new(wait))
    }

    /// Waits for the device and returns the elements in row order, gaps left out.
    pub fn wait(self) -> Result<Vec<u8>> {
        (self.0)()
    }
}

/// Sums and gathers over ranks. With one rank each is the identity.
pub trait Collectives {
    /// Number of ranks.
    fn ranks(&self) -> usize;
    /// This rank.
    fn rank(&self) -> usize;
    /// Sums `x` over all ranks in place.
    fn all_reduce(&self, s: Stream, x: Acc) -> Result<()>;
    /// Sums over all ranks; every rank keeps its own `1/ranks` slice in `y`.
    fn reduce_scatter(&self, s: Stream, x: In, y: Out) -> Result<()>;
    /// Concatenates every rank's `x` in `y`.
    fn all_gather(&self, s: Stream, x: In, y: Out) -> Result<()>;
}

/// Memory, copies and ranks of one device.
pub trait Device: Send + Sync {
    /// Name for messages.
    fn name(&self) -> String;
    /// False on a device that holds no data: initial values need not be drawn for it.
    fn has_data(&self) -> bool {
        true
    }
    /// Bytes that could be taken now, if the device knows.
    fn available(&self) -> Option<u64> {
        None
    }
    /// New memory, aligned to 256 bytes; contents unspecified. The same sequence of calls in a step gives
    /// the same addresses.
    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer>;
    /// Copies host bytes into a contiguous view. `src` may be reused when this returns.
    fn copy_in(&self, s: Stream, src: &[u8], dst: Out) -> Result<()>;
    /// Starts a copy to the host: the only way back.
    fn read_later(&self, s: Stream, src: In) -> Result<Pending>;
    /// Makes what is enqueued on `after` from now on wait for everything enqueued on `before` so far. Devices
    /// without queues have nothing to order.
    fn order(&self, _before: Stream, _after: Stream) -> Result<()> {
        Ok(())
    }
    /// Waits until everything enqueued so far is done.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    /// Runs `work` once and keeps the launches it enqueues on the compute stream, without executing them, to be
    /// replayed at the cost of one launch. Values change between replays only through memory that is written
    /// outside: the step state, the batch. Copies to and from the host, orders and waits cannot be recorded. Memory that `work`
    /// takes belongs to the recording, so that replays write nothing else; tensors that it reads and did not make
    /// have to outlive the recording. `None` on a device that cannot record: it did not call `work`.
    fn record(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        Ok(None)
    }
    /// The ranks that train together.
    fn collectives(&self) -> &dyn Collectives;
    /// Bytes held now and at most so far, by role.
    fn memory(&self) -> Memory;
}

/// Launches kept by [`Device::record`].
pub trait Recording {
    /// Enqueues them all on the compute stream.
    fn replay(&self) -> Result<()>;
}

/// Bytes by role.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// Held now, in the order of [`Role::ALL`].
    pub live: [u64; 7],
    /// Of each role, held when the total was largest.
    pub at_peak: [u64; 7],
    /// The largest total.
    pub peak: u64,
}

impl Memory {
    /// Total held now.
    pub fn total(&self) -> u64 {
        self.live.iter().sum()
    }

    /// What is held now, the largest roles first, for messages.
    pub(crate) fn largest(&self) -> String {
        let mut held: Vec<(u64, Role)> =
            self.live.iter().copied().zip(Role::ALL).filter(|(b, _)| *b > 0).collect();
        held.sort_by_key(|(b, _)| std::cmp::Reverse(*b));
        let text: Vec<String> = held.iter().take(3).map(|(b, r)| format!("{r} {}", size(*b))).collect();
        if text.is_empty() { "nothing is held".into() } else { format!("held: {}", text.join(", ")) }
    }

    pub(crate) fn add(&mut self, role: Role, bytes: usize) {
        self.live[role as usize] += bytes as u64;
        if self.total() > self.peak {
            self.peak = self.total();
            self.at_peak = self.live;
        }
    }

    pub(crate) fn sub(&mut self, role: Role, bytes: usize) {
        self.live[role as usize] -= bytes as u64;
    }
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    let (b, unit) = match bytes {
        0..1024 => return format!("{bytes} bytes"),
        1024..1048576 => (1024.0, "KiB"),
        1048576..1073741824 => (1048576.0, "MiB"),
        _ => (1073741824.0, "GiB"),
    };
    format!("{:.1} {unit}", bytes as f64 / b)
}

/// Operations and least bytes of one kernel call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts two.
    pub flop: u64,
    /// Bytes if every input is read once and every output written once.
    pub bytes: u64,
}

/// Arguments of a kernel, as the devices that only look at them see them.
pub trait Args {
    /// The kernel's name, equal to the C launcher's without its prefix.
    fn kernel(&self) -> &'static str;
    /// Name, access and extent of every tensor argument that is present.
    fn views(&self) -> Vec<(&'static str, Access, In<'_>)>;
    /// Operations and least bytes.
    fn cost(&self) -> Cost;
}

/// A type that may stand in a kernel's arguments.
pub(crate) trait Field {
    fn view(&self) -> Option<(Access, In<'_>)> {
        None
    }
}
impl Field for In<'_> {
    fn view(&self) -> Option<(Access, In<'_>)> {
        Some((Access::Read, *self))
    }
}
impl Field for Out<'_> {
    fn view(&self) -> Option<(Access, In<'_>)> {
        Some((Access::Write, self.0))
    }
}
impl Field for Acc<'_> {
    fn view(&self) -> Option<(Access, In<'_>)> {
        Some((Access::Accumulate, self.0))
    }
}
impl<T: Field> Field for Option<T> {
    fn view(&self) -> Option<(Access, In<'_>)> {
        self.as_ref().and_then(Field::view)
    }
}
impl Field for f64 {}
impl Field for usize {}
impl Field for u64 {}
impl Field for bool {}

/// What the name of a device stands for.
enum Named {
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
}

impl Named {
    fn parse(name: &str) -> Result<Self> {
        let bad = || Error::config("device", name, "cpu, cuda or cuda:N");
        match name.split_once(':').unwrap_or((name, "0")) {
            ("cpu", _) if name == "cpu" => Ok(Named::Cpu),
            ("cuda", ordinal) => Ok(Named::Cuda(ordinal.parse().map_err(|_| bad())?)),
            _ => Err(bad()),
        }
    }
}

/// Opens a device by name: `cpu`, with `threads` threads (0: one per core), `cuda` or `cuda:N`.
pub fn open(name: &str, threads: usize) -> Result<Arc<dyn Kernels>> {
    match Named::parse(name)? {
        Named::Cpu => Ok(Arc::new(Cpu::new(threads)?)),
        Named::Cuda(ordinal) => open_cuda(ordinal),
    }
}

#[cfg(not(ett_cuda))]
fn no_cuda() -> Error {
    let what = "this program was built without its CUDA kernels, because no nvcc was found: run tools/setup-cuda and \
                build again, or run on the CPU";
    Error::device("cuda", what)
}

#[cfg(ett_cuda)]
fn open_cuda(ordinal: usize) -> Result<Arc<dyn Kernels>> {
    Ok(Arc::new(Cuda::new(ordinal)?))
}

#[cfg(not(ett_cuda))]
fn open_cuda(_ordinal: usize) -> Result<Arc<dyn Kernels>> {
    Err(no_cuda())
}

/// Checks that a view lies inside its buffer; devices call this before following an address.
pub(crate) fn check_view(op: &'static str, arg: &'static str, v: &In) -> Result<()> {
    let text = || format!("{} {}", v.dims, v.dtype);
    if v.dims.bytes(v.dtype).is_none() {
        return Err(Error::arg(op, arg, text(), "a tensor that can be addressed: fewer elements"));
    }
    let size = v.dtype.size() as u64;
    if !v.off.is_multiple_of(size) {
        let want = format!("at a multiple of {size} bytes");
        return Err(Error::arg(op, arg, format!("at byte {}", v.off), want));
    }
    let (rows, cols) = (v.dims.rows() as u64, v.dims.cols() as u64);
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    if v.ld < cols as i64 && rows > 1 {
        return Err(Error::arg(op, arg, format!("row stride {}", v.ld), format!("at least {cols}")));
    }
    // Of a single row the stride means nothing.
    let ld = if rows > 1 { v.ld as u64 } else { 0 };
    let elements = (rows - 1).checked_mul(ld).and_then(|n| n.checked_add(cols));
    let end = elements.and_then(|n| n.checked_mul(size)).and_then(|n| n.checked_add(v.off));
    if end.is_none_or(|end| end > v.buf.bytes as u64) {
        let at = end.map_or("beyond all addresses".into(), |end| format!("at byte {end}"));
        let want = format!("inside its buffer of {} bytes", v.buf.bytes);
        return Err(Error::arg(op, arg, format!("{} ending {at}", text()), want));
    }
    Ok(())
}
