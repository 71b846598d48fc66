//! The contract between the model and a device.
//!
//! A *kernel* is a small named function over buffers with a documented formula. [`Kernels`] lists all kernels, and
//! [`Device`] provides memory, copies and collectives. [`Cpu`] implements them in plain Rust; [`Plan`] computes nothing
//! and counts memory and operations. Ops, models and training only use `&dyn Kernels`.

pub mod abi;
pub(crate) mod check;
mod contract;
pub mod cpu;
pub mod cuda;
mod dims;
mod dtype;
mod plan;
mod profile;
mod slot;
pub mod spec;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::ranks::Group;
pub use contract::*;
pub use cpu::Cpu;
#[cfg(ett_cuda)]
pub use cuda::Cuda;
pub use dims::Dims;
pub use dtype::{DType, Element, Precision, to_bf16};
pub use plan::{KernelCount, Plan, Sent, Target};
pub use profile::{KernelTime, Profile};
pub use slot::Slot;
use spec::{KernelSpec, Kind};

/// The purpose of a buffer; memory is reported by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Master weights, and their copies in the activation type.
    Weight,
    /// Parameter gradients.
    Gradient,
    /// Optimizer moments.
    Moment,
    /// Exponential moving averages of the weights.
    Ema,
    /// Values and gradients that live within one step.
    Activation,
    /// Scratch memory of a kernel.
    Workspace,
    /// Batches, indices and the step state.
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

/// An ordered queue of launches. Devices without queues run every call immediately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(pub u8);

impl Stream {
    /// Runs kernels.
    pub const COMPUTE: Stream = Stream(0);
    /// Copies batches.
    pub const COPY: Stream = Stream(1);
    /// Runs collectives beside the kernels. Their views stay allocated until [`Device::order`] has made the compute stream
    /// wait for them.
    pub const PEERS: Stream = Stream(2);
}

/// Identifies a device of this process. A device only accesses its own memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceId(u64);

impl DeviceId {
    /// An identity that no other device has.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        DeviceId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Frees memory when a [`Buffer`] is dropped.
pub trait Reclaim: Send + Sync {
    /// Frees memory that [`Device::alloc`] returned.
    ///
    /// # Safety
    /// `addr`, `bytes` and `role` describe one allocation of this owner, which is no longer used.
    unsafe fn reclaim(&self, addr: u64, bytes: usize, role: Role);
}

/// Device memory: an address that only its device may dereference.
pub struct Buffer {
    addr: u64,
    bytes: usize,
    role: Role,
    device: DeviceId,
    owner: Arc<dyn Reclaim>,
}

impl Buffer {
    /// For devices: wraps an allocation of `device`.
    ///
    /// # Safety
    /// Kernels of `device` dereference the address. `addr` is a multiple of 256, and the `bytes` bytes from there on
    /// are initialised and can be read and written by the device, and by nothing else, until the buffer is dropped and
    /// `owner` frees them. With 0 bytes, or on a device without data, any address is valid.
    pub unsafe fn new(
        addr: u64,
        bytes: usize,
        role: Role,
        device: DeviceId,
        owner: Arc<dyn Reclaim>,
    ) -> Self {
        Buffer { addr, bytes, role, device, owner }
    }

    /// The device address; 0 on a device without data.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device that the memory belongs to.
    pub fn device(&self) -> DeviceId {
        self.device
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the memory came from this owner; views borrow the buffer, so none is left.
        unsafe { self.owner.reclaim(self.addr, self.bytes, self.role) };
    }
}

/// Element type, shape and stride of a view, which gives read access to them. They cannot be changed, since the view
/// might then exceed its buffer.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Element type.
    pub dtype: DType,
    /// Shape; all dimensions but the last are rows.
    pub dims: Dims,
    /// Row stride, in elements.
    pub ld: i64,
}

/// A kernel input: a part of a buffer, described by its [`Extent`].
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

/// A kernel output that is read and updated: parameter gradients, statistics, and tensors updated by an optimizer.
#[derive(Clone, Copy)]
pub struct Acc<'a>(pub In<'a>);

impl<'a> In<'a> {
    /// A view of shape `dims` that starts at byte `off` of `buf`, with a row stride of `ld` elements. Fails if it
    /// exceeds the buffer, if `off` is not a multiple of the element size, or if rows overlap.
    pub fn new(buf: &'a Buffer, off: u64, dtype: DType, dims: impl Into<Dims>, ld: i64) -> Result<Self> {
        let v = In { buf, off, extent: Extent { dtype, dims: dims.into(), ld } };
        check::extent("view", "extent", &v)?;
        Ok(v)
    }

    /// As [`In::new`], without its checks.
    ///
    /// # Safety
    /// The view would pass these checks, or is only passed to devices that check every view, as those of this crate do.
    pub unsafe fn unchecked(buf: &'a Buffer, off: u64, dtype: DType, dims: Dims, ld: i64) -> Self {
        In { buf, off, extent: Extent { dtype, dims, ld } }
    }

    /// A contiguous view with another shape of as many elements; errors name argument `arg` of `op`.
    pub(crate) fn reshape(&self, op: &'static str, arg: &'static str, dims: impl Into<Dims>) -> Result<Self> {
        let dims = dims.into();
        check::extent(op, arg, self)?;
        if !self.is_contiguous() {
            return Err(Error::arg(op, arg, format!("strided by {}", self.ld), "contiguous"));
        }
        if dims.numel() != self.dims.numel() {
            return Err(Error::arg(op, arg, self.dims, format!("{} elements", dims.numel())));
        }
        let extent = Extent { dims, ld: dims.cols() as i64, ..self.extent };
        Ok(In { extent, ..*self })
    }

    /// The buffer that the view is a part of.
    pub fn buffer(&self) -> &'a Buffer {
        self.buf
    }

    /// The device address of the first element.
    pub fn addr(&self) -> u64 {
        self.buf.addr.wrapping_add(self.off)
    }

    /// Whether rows follow one another without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.ld == self.dims.cols() as i64 || self.dims.rows() <= 1
    }

    /// Bytes of the elements, without gaps between rows.
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

/// How a kernel accesses a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read only.
    Read,
    /// Overwritten.
    Write,
    /// Read and written.
    Accumulate,
}

/// A value being copied to the host.
pub struct Pending(Box<dyn FnOnce() -> Result<Vec<u8>> + Send>);

impl Pending {
    /// For devices: `wait` waits for the copy and returns its bytes.
    pub fn new(wait: impl FnOnce() -> Result<Vec<u8>> + Send + 'static) -> Self {
        Pending(Box::new(wait))
    }

    /// Waits for the device and returns the bytes of the elements in row order, without gaps. Fails with a fault that a
    /// kernel recorded before the copy.
    pub fn wait(self) -> Result<Vec<u8>> {
        (self.0)()
    }
}

/// How [`Collectives::all_reduce`] combines the values of all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// Their sum.
    Sum,
    /// Their sum divided by the number of ranks.
    Mean,
}

/// Collective operations over ranks, those of NCCL: all ranks make the same calls in the same order, with views of the same
/// shapes, on the compute stream or on that of the peers, and in the same recordings. Views are contiguous. With a single
/// rank each is the identity. A rank's own part of `n` elements is the one from element `rank * n` on.
pub trait Collectives {
    /// Number of ranks.
    fn ranks(&self) -> usize;
    /// This rank.
    fn rank(&self) -> usize;
    /// Replaces `x` `[n]` by the sum or mean over all ranks, with the same bits on all of them.
    fn all_reduce(&self, s: Stream, x: Acc, how: Reduction) -> Result<()>;
    /// Writes this rank's own part of the sum of all `x` `[ranks * n]` into `y` `[n]`, which shares no memory with `x`
    /// or is its own part.
    fn reduce_scatter(&self, s: Stream, x: In, y: Out) -> Result<()>;
    /// Writes the `x` `[n]` of all ranks, in their order, into `y` `[ranks * n]`; `x` shares no memory with `y` or is its
    /// own part.
    fn all_gather(&self, s: Stream, x: In, y: Out) -> Result<()>;
}

/// Memory, copies and ranks of one device.
pub trait Device: Send + Sync {
    /// Name for messages.
    fn name(&self) -> String;
    /// The identity of this device, which is stored in its buffers. Tensors of other devices are refused.
    fn id(&self) -> DeviceId;
    /// Whether the device stores data; initial values need not be computed for one that does not.
    fn has_data(&self) -> bool {
        true
    }
    /// What a plan for this device is made for; `None` for devices that only tests use.
    fn target(&self) -> Option<Target> {
        None
    }
    /// Bytes that could be allocated now, if known.
    fn available(&self) -> Option<u64> {
        None
    }
    /// Allocates memory aligned to 256 bytes, with unspecified contents. Steps with the same sequence of calls get the
    /// same addresses. Fails if there is not enough memory.
    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer>;
    /// Copies host bytes into a contiguous view. `src` may be reused when this returns.
    fn copy_in(&self, s: Stream, src: &[u8], dst: Out) -> Result<()>;
    /// Copies one contiguous view to another of as many bytes.
    fn copy(&self, s: Stream, src: In, dst: Out) -> Result<()>;
    /// Starts a copy to the host, the only way to read device memory.
    fn read_later(&self, s: Stream, src: In) -> Result<Pending>;
    /// Makes all work enqueued on `after` from now on wait for all work enqueued on `before` so far. Devices without
    /// queues do nothing.
    fn order(&self, _before: Stream, _after: Stream) -> Result<()> {
        Ok(())
    }
    /// Waits until all work enqueued so far is done.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
    /// Whether [`Device::record`] records.
    fn can_record(&self) -> bool {
        false
    }
    /// Calls `work` once and records the launches that it enqueues on the compute stream, without executing them; a
    /// replay costs as much as one launch. Results differ between replays only through memory that is written outside
    /// of the recording: the step state and the batch. Copies to and from the host, orders with them and waits cannot be
    /// recorded. Collectives can: on the compute stream, and on that of the peers once it was ordered after the former.
    /// Memory that `work` allocates belongs to the recording, so that replays write to no other memory; tensors that
    /// `work` reads but did not create must outlive the recording. Returns `None` without calling `work` on devices that
    /// cannot record, and while kernels are measured.
    fn record(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        Ok(None)
    }
    /// Collective operations over the ranks that train together.
    fn collectives(&self) -> &dyn Collectives;
    /// Ends the connection to other ranks, after all that was enqueued. All ranks call this at the same point, when they need
    /// no collectives any more.
    fn disconnect(&self) -> Result<()> {
        Ok(())
    }
    /// Allocated bytes by role, now and at the peak.
    fn memory(&self) -> Memory;
    /// Measures the time of every kernel from now on. Fails on devices that cannot.
    fn start_profile(&self) -> Result<()> {
        let what = "measuring the time of kernels".into();
        Err(Error::Unsupported { op: "start_profile", what, device: self.name() })
    }
    /// The times of the kernels launched since the last call of this function or of [`Device::start_profile`]; `None`
    /// if they are not measured. Waits for the device.
    fn profile(&self) -> Result<Option<Profile>> {
        Ok(None)
    }
}

/// Launches recorded by [`Device::record`].
pub trait Recording {
    /// Enqueues all of them on the compute stream.
    fn replay(&self) -> Result<()>;
}

/// Bytes by role.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    /// Allocated now, in the order of [`Role::ALL`].
    pub live: [u64; 7],
    /// Allocated when the total was largest, in the same order.
    pub at_peak: [u64; 7],
    /// The largest total so far.
    pub peak: u64,
    /// Bytes taken from the driver or the system so far: memory that is freed is kept and used again, so that this
    /// does not change from one step to the next. 0 on a device without data.
    pub taken: u64,
}

impl Memory {
    /// The total allocated now.
    pub fn total(&self) -> u64 {
        self.live.iter().sum()
    }

    /// The three largest roles and their allocated bytes, for messages.
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

/// A number of bytes with a unit, for messages.
pub(crate) fn size(bytes: u64) -> String {
    let (b, unit) = match bytes {
        0..1024 => return format!("{bytes} bytes"),
        1024..1048576 => (1024.0, "KiB"),
        1048576..1073741824 => (1048576.0, "MiB"),
        _ => (1073741824.0, "GiB"),
    };
    format!("{:.1} {unit}", bytes as f64 / b)
}

/// Operations and minimal memory traffic of one kernel call.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add counts as two.
    pub flop: u64,
    /// Bytes read and written if every input is read once and every output is written once.
    pub bytes: u64,
}

/// Arguments of a kernel, in a form that is independent of the kernel.
pub trait Args {
    /// The kernel's row of the table.
    fn spec(&self) -> &'static KernelSpec;
    /// Calls `f` with all arguments, in the order of the row.
    fn with_values(&self, f: &mut dyn FnMut(&[Value]) -> Result<()>) -> Result<()>;
    /// Name, access and view of every tensor argument that is present.
    fn views(&self) -> Vec<(&'static str, Access, In<'_>)>;
    /// Operations and minimal memory traffic.
    fn cost(&self) -> Cost;
    /// The kernel's name, equal to the C launcher's without its prefix.
    fn kernel(&self) -> &'static str {
        self.spec().name
    }
}

/// An argument of a kernel, for checks.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    /// An optional tensor that is absent.
    Absent,
    /// A tensor and its access.
    Tensor(Access, &'a In<'a>),
    /// A `usize`.
    Count(usize),
    /// A `bool`.
    Flag(bool),
    /// An `f64`.
    Real(f64),
    /// An argument without rules.
    Other,
}

/// A type of kernel arguments.
pub(crate) trait Field {
    const KIND: Kind;
    fn value(&self) -> Value<'_> {
        Value::Other
    }
}

const fn tensor(access: Access) -> Kind {
    Kind::Tensor { access, optional: false }
}

impl Field for In<'_> {
    const KIND: Kind = tensor(Access::Read);
    fn value(&self) -> Value<'_> {
        Value::Tensor(Access::Read, self)
    }
}
impl Field for Out<'_> {
    const KIND: Kind = tensor(Access::Write);
    fn value(&self) -> Value<'_> {
        Value::Tensor(Access::Write, &self.0)
    }
}
impl Field for Acc<'_> {
    const KIND: Kind = tensor(Access::Accumulate);
    fn value(&self) -> Value<'_> {
        Value::Tensor(Access::Accumulate, &self.0)
    }
}
impl<T: Field> Field for Option<T> {
    const KIND: Kind = match T::KIND {
        Kind::Tensor { access, .. } => Kind::Tensor { access, optional: true },
        _ => panic!("only a tensor may be absent"),
    };
    fn value(&self) -> Value<'_> {
        self.as_ref().map_or(Value::Absent, Field::value)
    }
}
impl Field for f64 {
    const KIND: Kind = Kind::Real;
    fn value(&self) -> Value<'_> {
        Value::Real(*self)
    }
}
impl Field for usize {
    const KIND: Kind = Kind::Count;
    fn value(&self) -> Value<'_> {
        Value::Count(*self)
    }
}
impl Field for u64 {
    const KIND: Kind = Kind::Seed;
}
impl Field for bool {
    const KIND: Kind = Kind::Flag;
    fn value(&self) -> Value<'_> {
        Value::Flag(*self)
    }
}

/// A device as named on the command line.
enum Named {
    Cpu,
    /// The GPU with this index.
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
    open_of(name, threads, &Group::alone())
}

/// Opens the device of a rank of `group` by name, as [`open`]: all ranks have to call this.
pub fn open_of(name: &str, threads: usize, group: &Arc<Group>) -> Result<Arc<dyn Kernels>> {
    match Named::parse(name)? {
        Named::Cpu => Ok(Arc::new(Cpu::of(threads, group.clone())?)),
        Named::Cuda(ordinal) => open_cuda(ordinal, group),
    }
}

#[cfg(not(ett_cuda))]
fn no_cuda() -> Error {
    let what = "this program was built without its CUDA kernels, because no nvcc was found; run tools/setup-cuda and \
                build again, or run on the CPU";
    Error::device("cuda", what)
}

#[cfg(ett_cuda)]
fn open_cuda(ordinal: usize, group: &Arc<Group>) -> Result<Arc<dyn Kernels>> {
    Ok(Arc::new(Cuda::of(ordinal, group.clone())?))
}

#[cfg(not(ett_cuda))]
fn open_cuda(_ordinal: usize, _group: &Arc<Group>) -> Result<Arc<dyn Kernels>> {
    Err(no_cuda())
}

/// Number of GPUs of this machine; an error if there is no driver, or if the program has no kernels for them.
#[cfg(ett_cuda)]
pub fn gpus() -> Result<usize> {
    Cuda::count()
}

/// Number of GPUs of this machine; an error if there is no driver, or if the program has no kernels for them.
#[cfg(not(ett_cuda))]
pub fn gpus() -> Result<usize> {
    Err(no_cuda())
}
