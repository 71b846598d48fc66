//! A GPU as a device.

use std::collections::HashSet;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::{CudaContext, CudaStream, DriverError, result, sys};

use super::arena::{Arena, Gpu, keep_pool};
use super::call::{self, ToC};
use super::copies::Pinned;
use super::peers::Peers;
use super::products::{Product, Products, WORKSPACE};
use super::profile::Profiler;
use super::{ffi, record};
use crate::backend::*;
use crate::error::{Error, Result};
use crate::ranks::Group;

/// The CUDA release that the kernels were compiled with, as the driver counts: 1000 * major + 10 * minor.
const CUDA: i32 = 13000;
/// The oldest compute capability that the kernels were compiled for.
const OLDEST: (i32, i32) = (8, 0);

/// Options of a GPU device.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Waits after every launch, so that an error names its kernel.
    pub sync: bool,
    /// Fills every allocation with NaN (-1 for indices), for tests.
    pub poison: bool,
    /// Implementations to use instead of those that launchers choose: `op=kernel,op=kernel`.
    pub force: String,
    /// Thread blocks that sums of gradients take at most from the kernels beside them; `None`: as many as NCCL chooses.
    pub collective_blocks: Option<u32>,
}

impl Options {
    /// Reads `ETT_SYNC` (any value but 0 turns it on), `ETT_FORCE` and `ETT_COLLECTIVE_BLOCKS` (a number; 0: as many as NCCL
    /// chooses).
    pub fn from_env() -> Self {
        /// Few enough that kernels beside them hardly notice, enough that they keep up with the backward pass.
        const BLOCKS: u32 = 8;
        let blocks =
            std::env::var("ETT_COLLECTIVE_BLOCKS").ok().and_then(|v| v.parse().ok()).unwrap_or(BLOCKS);
        Options {
            sync: std::env::var("ETT_SYNC").is_ok_and(|v| v != "0"),
            poison: false,
            force: std::env::var("ETT_FORCE").unwrap_or_default(),
            collective_blocks: (blocks > 0).then_some(blocks),
        }
    }
}

/// The memory that a GPU device holds permanently: the workspace of cuBLASLt, if `products` is true, and the fault
/// slot.
pub(in crate::backend) fn held(products: bool) -> [(Role, usize); 2] {
    [(Role::Workspace, if products { WORKSPACE } else { 0 }), (Role::Input, size_of::<ffi::ett_fault>())]
}

/// Arguments with a query for the workspace of their launch.
pub(in crate::backend) trait Query: Args {
    /// Bytes of workspace, from `ett_<kernel>_workspace`. Needs no GPU and dereferences no address.
    fn workspace(&self) -> Result<usize>;
}

/// Converts the result of a query, which is negative for unsupported arguments.
fn bytes(a: &impl Args, answer: i64) -> Result<usize> {
    usize::try_from(answer).map_err(|_| {
        let views: Vec<String> =
            a.views().iter().map(|(n, _, v)| format!("{n} {} {}", v.dims, v.dtype)).collect();
        Error::Unsupported { op: a.kernel(), what: views.join(", "), device: "cuda".into() }
    })
}

/// A GPU.
pub struct Cuda {
    pub(super) gpu: Arc<Gpu>,
    /// The arena for allocations: the device's, or that of the recording being made.
    arena: Mutex<Arc<Arena>>,
    pinned: Arc<Pinned>,
    products: Option<Products>,
    products_workspace: Buffer,
    fault: Buffer,
    pub(super) sync: bool,
    poison: bool,
    forced: Vec<(&'static str, CString)>,
    /// Measures the launches, once it is set.
    pub(super) profiler: OnceLock<Profiler>,
    /// Kernels whose first launch was logged.
    seen: Mutex<HashSet<(&'static str, &'static str)>>,
}

impl Cuda {
    /// Opens GPU `ordinal` with [`Options::from_env`].
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::with(ordinal, &Options::from_env())
    }

    /// Opens GPU `ordinal` with [`Options::from_env`] as the device of a rank of `group`. With several ranks, all of them
    /// call this, each with a GPU of its own, and it fails if NCCL is missing.
    pub fn of(ordinal: usize, group: Arc<Group>) -> Result<Self> {
        Self::joined(ordinal, &Options::from_env(), group)
    }

    /// Number of GPUs that the driver reports. Fails if the driver is missing, does not start or is too old.
    pub fn count() -> Result<usize> {
        // SAFETY: it only looks for the library. Called first, since the driver's functions panic if it is missing.
        if !unsafe { sys::is_culib_present() } {
            let what = "libcuda.so.1 was not found; install the NVIDIA driver, or run on the CPU";
            return Err(Error::device("cuda", what));
        }
        let explain = |e: cudarc::driver::DriverError| {
            let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
            Error::device(
                "cuda",
                format!("the driver does not start ({text}); check it with nvidia-smi, or run on the CPU"),
            )
        };
        let mut version = 0;
        // SAFETY: it writes one number.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(explain)?;
        if version < CUDA {
            let text = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            let (has, wants) = (text(version), text(CUDA));
            let what = format!(
                "the driver supports CUDA {has}, but the kernels were built with {wants}; update the driver"
            );
            return Err(Error::device("cuda", what));
        }
        result::init().map_err(explain)?;
        let n = CudaContext::device_count().map_err(explain)?;
        Ok(n.max(0) as usize)
    }

    /// Opens GPU `ordinal`.
    pub fn with(ordinal: usize, options: &Options) -> Result<Self> {
        Self::joined(ordinal, options, Group::alone())
    }

    /// Opens GPU `ordinal` as the device of a rank of `group`, as [`Cuda::of`].
    pub fn joined(ordinal: usize, options: &Options, group: Arc<Group>) -> Result<Self> {
        let n = Self::count()?;
        let name = format!("cuda:{ordinal}");
        if ordinal >= n {
            let what = format!(
                "there is no such GPU, the driver reports {n}; choose another one, or run on the CPU"
            );
            return Err(Error::device(name, what));
        }
        let fail = |e: cudarc::driver::DriverError| {
            let text = e.error_string().ok().and_then(|s| s.to_str().ok()).unwrap_or("unknown error");
            Error::device(&name, format!("cannot be opened: {text}"))
        };
        let context = CudaContext::new(ordinal).map_err(fail)?;
        // SAFETY: this device orders its streams itself. Called before the first allocation, since event tracking
        // breaks recordings.
        unsafe { context.disable_event_tracking() };
        let capability = context.compute_capability().map_err(fail)?;
        if capability < OLDEST {
            let model = context.name().map_err(fail)?;
            let ((a, b), (c, d)) = (capability, OLDEST);
            let what = format!(
                "{model} has compute capability {a}.{b}, the kernels need {c}.{d} or newer; run on the CPU"
            );
            return Err(Error::device(name, what));
        }
        keep_pool(&context).map_err(fail)?;
        let peers = match group.ranks() {
            1 => None,
            _ => Some(Peers::join(&context, group, options.collective_blocks)),
        };
        let peers = peers.transpose().map_err(|why| Error::device(&name, why))?;
        let gpu = Arc::new(Gpu::new(name.clone(), context, peers).map_err(fail)?);
        let products = Products::new().inspect_err(|why| {
            tracing::warn!("cuBLASLt {why}; matrix products use the portable kernel, which is slower");
        });
        let products = products.ok();
        let [workspace, fault] = held(products.is_some());
        let arena = Arc::new(Arena::new(gpu.clone()));
        let take = |(role, bytes): (Role, usize)| buffer(&arena, role, bytes);
        let fault = take(fault)?;
        // SAFETY: the buffer has this size.
        unsafe { result::memset_d8_async(fault.addr(), 0, fault.bytes(), gpu.compute.cu_stream()) }
            .map_err(fail)?;
        let products_workspace = take(workspace)?;
        Ok(Cuda {
            pinned: Arc::new(Pinned::new(gpu.clone())),
            arena: Mutex::new(arena),
            products,
            products_workspace,
            fault,
            sync: options.sync,
            poison: options.poison,
            forced: call::forced(&options.force)?,
            profiler: OnceLock::new(),
            seen: Mutex::default(),
            gpu,
        })
    }

    /// The GPU's model, such as "NVIDIA H200".
    pub fn model(&self) -> Result<String> {
        self.gpu.context.name().map_err(|e| self.gpu.error("asking for the name", e))
    }

    /// The time that the device takes for the work that `work` enqueues on the compute stream.
    pub fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<std::time::Duration> {
        let fail = |e| self.gpu.error("timing with events", e);
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        self.synchronize()?;
        let start = self.gpu.compute.record_event(timed).map_err(fail)?;
        work()?;
        let end = self.gpu.compute.record_event(timed).map_err(fail)?;
        let ms = start.elapsed_ms(&end).map_err(fail)?;
        Ok(std::time::Duration::from_secs_f64(f64::from(ms) * 1e-3))
    }

    fn stream(&self, s: Stream) -> &CudaStream {
        match (s, &self.gpu.peers) {
            (Stream::COPY, _) => &self.gpu.copy,
            (Stream::PEERS, Some(peers)) => &peers.stream,
            _ => &self.gpu.compute,
        }
    }

    /// Whether the stream of the peers is a part of the recording being made; true outside of recordings.
    fn peers_take_part(&self) -> std::result::Result<bool, DriverError> {
        match &self.gpu.peers {
            Some(peers) if self.gpu.is_recording() => peers.is_recorded(),
            _ => Ok(true),
        }
    }

    /// Fails if work on `s` would run at once although a recording is being made.
    pub(super) fn takes_part(&self, op: &'static str, s: Stream) -> Result<()> {
        if s != Stream::PEERS || self.peers_take_part().map_err(|e| self.gpu.error(op, e))? {
            return Ok(());
        }
        let got = "that of the peers, which is no part of the recording yet";
        Err(Error::arg(
            op,
            "stream",
            got,
            "one that was ordered after the compute stream during the recording",
        ))
    }

    /// Fails during a recording, which cannot contain `what`.
    fn not_recording(&self, op: &'static str, arg: &'static str, what: &str) -> Result<()> {
        match self.gpu.is_recording() {
            true => Err(Error::arg(op, arg, format!("{what} during a recording"), "one before or after it")),
            false => Ok(()),
        }
    }

    /// The implementation that is forced for `op`.
    fn force(&self, op: &str) -> Option<&CString> {
        self.forced.iter().find(|(name, _)| *name == op).map(|(_, kernel)| kernel)
    }

    fn launch<A: Args + ToC>(
        &self,
        s: Stream,
        a: &A,
        query: unsafe extern "C" fn(*const A::C) -> i64,
        run: unsafe extern "C" fn(*const A::C, *const ffi::ett_launch) -> i32,
    ) -> Result<()> {
        let name = a.kernel();
        if s != Stream::COMPUTE {
            return Err(Error::arg(
                name,
                "stream",
                s.0,
                "the compute stream, since the others only copy and run collectives",
            ));
        }
        check::call(self.gpu.id, a)?;
        self.gpu.context.bind_to_thread().map_err(|e| self.gpu.error(name, e))?;
        let c = a.to_c();
        // SAFETY: the struct is what the query and the launcher take; both only read it.
        let bytes = unsafe { query(&c) };
        let profiler = self.profiler.get();
        let measured = |e| self.gpu.error("measuring a launch", e);
        let start = profiler.map(|p| p.event(&self.gpu)).transpose().map_err(measured)?;
        let begin =
            || start.as_ref().map_or(Ok(()), |start| start.record(&self.gpu.compute)).map_err(measured);
        // SAFETY: `c` is the struct of this kernel.
        let kernel = match unsafe { self.library_product(name, std::ptr::from_ref(&c).cast(), &begin)? } {
            true => "cublaslt",
            false => {
                let workspace = match usize::try_from(bytes) {
                    Ok(bytes) if bytes > 0 => Some(self.alloc(Role::Workspace, bytes)?),
                    _ => None,
                };
                let launch = ffi::ett_launch {
                    stream: self.gpu.compute.cu_stream(),
                    workspace: workspace.as_ref().map_or(std::ptr::null_mut(), |w| w.addr() as *mut c_void),
                    workspace_bytes: bytes.max(0),
                    fault: self.fault.addr() as *mut ffi::ett_fault,
                    number: call::number(name),
                    force: self.force(name).map_or(std::ptr::null(), |k| k.as_ptr()),
                };
                begin()?;
                // SAFETY: the struct is the one that the launcher takes, its views were checked, and the workspace has
                // the size that the query returned; memory that the kernel uses is not reused before it is done.
                let code = unsafe { run(&c, &launch) };
                if code != 0 {
                    // SAFETY: a struct of numbers.
                    let mut last = unsafe { std::mem::zeroed::<ffi::ett_status>() };
                    // SAFETY: it writes the struct.
                    unsafe { ffi::ett_last_status(&mut last) };
                    call::check(name, &self.gpu.name, code, &last)?;
                }
                // The workspace is freed here: its next user runs after this kernel, on the same stream.
                // SAFETY: it takes nothing and returns null or a string literal.
                unsafe { call::kernel_name(ffi::ett_last_kernel()) }
            }
        };
        if let Some((profiler, start)) = profiler.zip(start) {
            profiler.end(&self.gpu, start, (name, kernel), a.cost()).map_err(measured)?;
        }
        if tracing::enabled!(tracing::Level::DEBUG)
            && self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert((name, kernel))
        {
            let views: Vec<String> =
                a.views().iter().map(|(n, _, v)| format!("{n} {} {}", v.dims, v.dtype)).collect();
            tracing::debug!(op = name, kernel, "first launch: {}", views.join(", "));
        }
        if self.sync && !self.gpu.is_recording() {
            self.gpu.drain(&self.gpu.compute, &format!("{name} ({kernel}) failed"))?;
        }
        Ok(())
    }

    /// Calls `begin` and runs a matrix product with cuBLASLt. Returns false if this kernel is not a product, if another
    /// implementation is forced, or if the library does not support it.
    ///
    /// # Safety
    /// `args` is the C struct of kernel `name`, with views that were checked.
    unsafe fn library_product(
        &self,
        name: &'static str,
        args: *const c_void,
        begin: &dyn Fn() -> Result<()>,
    ) -> Result<bool> {
        let Some(products) = &self.products else { return Ok(false) };
        let forced = self.force(name).map(|k| k.as_bytes());
        if forced.is_some_and(|k| k != b"cublaslt") {
            return Ok(false);
        }
        fn there(v: &ffi::ett_view) -> Option<&ffi::ett_view> {
            (!v.ptr.is_null()).then_some(v)
        }
        let stream = self.gpu.compute.cu_stream().cast();
        let scratch = self.products_workspace.addr();
        let product = match name {
            "matmul" => {
                // SAFETY: guaranteed by the caller, here and below.
                let a = unsafe { &*args.cast::<ffi::ett_matmul_args>() };
                let (ta, tb, bias) = (a.ta != 0, a.tb != 0, there(&a.bias));
                Product { a: &a.a, b: &a.b, ta, tb, bias, y: &a.y, pre: None, add: false }
            }
            "matmul_acc" => {
                // SAFETY: as above.
                let a = unsafe { &*args.cast::<ffi::ett_matmul_acc_args>() };
                let (ta, tb) = (a.ta != 0, a.tb != 0);
                Product { a: &a.a, b: &a.b, ta, tb, bias: None, y: &a.y, pre: None, add: true }
            }
            "linear_gelu" => {
                // SAFETY: as above.
                let a = unsafe { &*args.cast::<ffi::ett_linear_gelu_args>() };
                let (bias, pre) = (there(&a.bias), there(&a.pre));
                Product { a: &a.x, b: &a.w, ta: false, tb: true, bias, y: &a.y, pre, add: false }
            }
            _ => return Ok(false),
        };
        begin()?;
        let done = products.run(&product, scratch, stream);
        let done =
            done.map_err(|e| Error::device(&self.gpu.name, format!("{name} failed in cuBLASLt: {e}")))?;
        match (done, forced) {
            (false, Some(_)) => Err(Error::Unsupported {
                op: name,
                what: "this shape with cuBLASLt, which ETT_FORCE requests,".into(),
                device: self.gpu.name.clone(),
            }),
            _ => Ok(done),
        }
    }

    fn record_work(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Recording>> {
        let fail = |what: &'static str| move |e| self.gpu.error(what, e);
        let swap =
            |arena| std::mem::replace(&mut *self.arena.lock().unwrap_or_else(PoisonError::into_inner), arena);
        record::begin(&self.gpu).map_err(fail("starting a recording"))?;
        let device = self.arena.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let arena = Arc::new(Arena::of_recording(device.clone()));
        swap(arena.clone());
        let worked = work();
        swap(device);
        let graph = record::end(&self.gpu, arena).map_err(fail("ending a recording"));
        // Blocks taken from the device's arena may still be the target of a copy.
        self.order(Stream::COPY, Stream::COMPUTE)?;
        worked?;
        Ok(Box::new(graph?))
    }
}

/// A new buffer from an arena.
fn buffer(arena: &Arc<Arena>, role: Role, bytes: usize) -> Result<Buffer> {
    let addr = arena.take(role, bytes)?;
    // SAFETY: a block of at least this size, used only by this buffer until it is returned to the arena.
    Ok(unsafe { Buffer::new(addr, bytes, role, arena.device(), arena.clone()) })
}

impl Device for Cuda {
    fn name(&self) -> String {
        match self.model() {
            Ok(model) => format!("{} ({model})", self.gpu.name),
            Err(_) => self.gpu.name.clone(),
        }
    }

    fn id(&self) -> DeviceId {
        self.gpu.id
    }

    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        let arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let buffer = buffer(&arena, role, bytes)?;
        if self.poison && bytes > 0 {
            self.gpu.context.bind_to_thread().map_err(|e| self.gpu.error("alloc", e))?;
            // SAFETY: the buffer has this size.
            let filled =
                unsafe { result::memset_d8_async(buffer.addr(), 0xff, bytes, self.gpu.compute.cu_stream()) };
            filled.map_err(|e| self.gpu.error("filling new memory", e))?;
            // The other stream may copy a batch into it.
            if role == Role::Input && !self.gpu.is_recording() {
                self.order(Stream::COMPUTE, Stream::COPY)?;
            }
        }
        Ok(buffer)
    }

    fn copy_in(&self, s: Stream, src: &[u8], dst: Out) -> Result<()> {
        check::view(self.gpu.id, "copy_in", "dst", &dst.0)?;
        if dst.0.bytes() != src.len() as u64 || !dst.0.is_contiguous() {
            return Err(Error::arg(
                "copy_in",
                "src",
                src.len(),
                format!("{} contiguous bytes", dst.0.bytes()),
            ));
        }
        self.not_recording("copy_in", "src", "a copy from the host")?;
        self.gpu.context.bind_to_thread().map_err(|e| self.gpu.error("copy_in", e))?;
        self.pinned
            .copy_in(self.stream(s), src, dst.0.addr())
            .map_err(|e| self.gpu.error("copying to the device", e))
    }

    fn copy(&self, s: Stream, src: In, dst: Out) -> Result<()> {
        check::copy(self.gpu.id, &src, &dst)?;
        self.takes_part("copy", s)?;
        let (from, to, bytes) = (src.addr(), dst.0.addr(), src.bytes() as usize);
        let bound = self.gpu.context.bind_to_thread();
        let copied = bound.and_then(|()| {
            // SAFETY: the views were checked.
            unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream(s).cu_stream()) }
        });
        copied.map_err(|e| self.gpu.error("copying on the device", e))
    }

    fn read_later(&self, s: Stream, src: In) -> Result<Pending> {
        check::view(self.gpu.id, "read_later", "src", &src)?;
        self.not_recording("read_later", "src", "a copy to the host")?;
        self.gpu.context.bind_to_thread().map_err(|e| self.gpu.error("read_later", e))?;
        let pending = self.pinned.read_later(self.stream(s), src, self.fault.addr());
        pending.map_err(|e| self.gpu.error("copying from the device", e))
    }

    fn order(&self, before: Stream, after: Stream) -> Result<()> {
        let fail = |e| self.gpu.error("ordering two streams", e);
        if before == Stream::COPY || after == Stream::COPY {
            self.not_recording("order", "after", "an order with copies")?;
        }
        let (from, to) = (self.stream(before), self.stream(after));
        // What was enqueued for the peers before a recording is waited for by its replays.
        if from == to || before == Stream::PEERS && !self.peers_take_part().map_err(fail)? {
            return Ok(());
        }
        to.join(from).map_err(fail)
    }

    fn synchronize(&self) -> Result<()> {
        self.not_recording("synchronize", "device", "a wait for the device")?;
        [Stream::COPY, Stream::COMPUTE, Stream::PEERS]
            .iter()
            .try_for_each(|s| self.gpu.drain(self.stream(*s), "waiting for the device"))
    }

    fn record(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Option<Box<dyn Recording>>> {
        self.not_recording("record", "work", "a recording")?;
        // A replay is one launch for the host: its kernels could neither be measured nor blamed one by one.
        match self.profiler.get().is_some() || self.sync {
            true => Ok(None),
            false => self.record_work(work).map(Some),
        }
    }

    fn can_record(&self) -> bool {
        true
    }

    fn collectives(&self) -> &dyn Collectives {
        self
    }

    fn target(&self) -> Option<Target> {
        Some(Target::Cuda)
    }

    fn available(&self) -> Option<u64> {
        self.gpu.context.mem_get_info().ok().map(|(free, _)| free as u64)
    }

    fn disconnect(&self) -> Result<()> {
        self.synchronize()?;
        if let Some(peers) = &self.gpu.peers {
            peers.leave();
        }
        Ok(())
    }

    fn memory(&self) -> Memory {
        self.gpu.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start_profile(&self) -> Result<()> {
        self.not_recording("start_profile", "device", "the begin of a profile")?;
        self.profiler.get_or_init(Profiler::default);
        self.profile().map(|_| ())
    }

    fn profile(&self) -> Result<Option<Profile>> {
        let Some(profiler) = self.profiler.get() else { return Ok(None) };
        self.synchronize()?;
        profiler.take().map(Some).map_err(|e| self.gpu.error("measuring launches", e))
    }
}

macro_rules! impl_cuda {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => { pastey::paste! {
        $(impl Query for $args<'_> {
            fn workspace(&self) -> Result<usize> {
                let c = self.to_c();
                // SAFETY: the struct is what this query takes, and it only reads it.
                bytes(self, unsafe { ffi::[<ett_ $name _workspace>](&c) })
            }
        })*

        impl Kernels for Cuda {
            $(fn $name(&self, s: Stream, a: &$args<'_>) -> Result<()> {
                self.launch(s, a, ffi::[<ett_ $name _workspace>], ffi::[<ett_ $name>])
            })*
        }
    } };
}
contract::kernel_table!(impl_cuda);
