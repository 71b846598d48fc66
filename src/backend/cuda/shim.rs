//! The C interface on the CPU, through the library that `make -C kernels shim` builds from the CUDA sources.

use std::alloc::Layout;
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::call::{self, ToC};
use super::ffi;
use crate::backend::*;
use crate::error::{Error, Result};

type Query = unsafe extern "C" fn(*const c_void) -> i64;
type Launcher = unsafe extern "C" fn(*const c_void, *const ffi::ett_launch) -> i32;

/// The CUDA kernels compiled for the host: slow, for tests. Every buffer is a heap block of exactly its size, so that
/// an address sanitizer finds accesses out of bounds, and is filled with NaN (-1 for indices), so that tests find
/// outputs that were not written. A query that answers -1 where its launcher accepts the arguments, or a size where it
/// refuses them, is an error.
pub struct Shim {
    library: libloading::Library,
    heap: Arc<Heap>,
    fault: Buffer,
    forced: Vec<(&'static str, std::ffi::CString)>,
    /// What the last query answered.
    queried: AtomicI64,
    /// Held while buffers are read or written: one call at a time, as on the CPU.
    turn: Mutex<()>,
}

struct Heap {
    id: DeviceId,
    memory: Mutex<Memory>,
}

/// `bytes` bytes with the alignment that the contract promises; `None` if they overflow.
fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1), 256).ok()
}

impl Reclaim for Heap {
    unsafe fn reclaim(&self, addr: u64, bytes: usize, role: Role) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).sub(role, bytes);
        if let Some(layout) = layout(bytes) {
            // SAFETY: the block came from `alloc` with this layout.
            unsafe { std::alloc::dealloc(addr as *mut u8, layout) };
        }
    }
}

impl Shim {
    /// Loads the library at `path`; `force` names implementations as `op=kernel,op=kernel`.
    pub fn open(path: &Path, force: &str) -> Result<Self> {
        // SAFETY: the library's initialisers do nothing but set up sanitizers.
        let library = unsafe { libloading::Library::new(path) }.map_err(|e| {
            let what = format!("cannot be loaded ({e}); build it with tools/shim-test");
            Error::device(path.display(), what)
        })?;
        let heap = Arc::new(Heap { id: DeviceId::unique(), memory: Mutex::default() });
        let fault = Self::take(&heap, Role::Input, size_of::<ffi::ett_fault>())?;
        // SAFETY: just taken, of this size.
        unsafe { std::ptr::write_bytes(fault.addr() as *mut u8, 0, fault.bytes()) };
        let forced = call::forced(force)?;
        Ok(Shim { library, heap, fault, forced, queried: AtomicI64::new(0), turn: Mutex::default() })
    }

    fn take(heap: &Arc<Heap>, role: Role, bytes: usize) -> Result<Buffer> {
        // Null if the allocation fails.
        let at = match layout(bytes) {
            // SAFETY: the size is not zero.
            Some(layout) => unsafe { std::alloc::alloc(layout) },
            None => std::ptr::null_mut(),
        };
        let mut memory = heap.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if at.is_null() {
            return Err(Error::OutOfMemory {
                device: "shim".into(),
                role: role.to_string(),
                asked: size(bytes as u64),
                free: "the system has no more".into(),
                held: memory.largest(),
            });
        }
        // SAFETY: freshly allocated, `bytes` long.
        unsafe { std::ptr::write_bytes(at, 0xff, bytes) };
        memory.add(role, bytes);
        // SAFETY: the block was just allocated, with an alignment of 256, and the heap takes it back.
        Ok(unsafe { Buffer::new(at as u64, bytes, role, heap.id, heap.clone()) })
    }

    /// The function `ett_<name>`.
    ///
    /// # Safety
    /// `F` is the type that the header gives this function.
    unsafe fn symbol<F: Copy>(&self, name: &str) -> Result<F> {
        let symbol = format!("ett_{name}");
        // SAFETY: the caller guarantees the type.
        let f = unsafe { self.library.get::<F>(symbol.as_bytes()) };
        f.map(|f| *f).map_err(|e| {
            Error::device(
                "shim",
                format!("the library has no `{symbol}` ({e}); rebuild it with tools/shim-test"),
            )
        })
    }

    fn launch<A: Args + ToC>(&self, a: &A) -> Result<()> {
        let name = a.kernel();
        let _turn = self.turn();
        let c = a.to_c();
        let c = std::ptr::from_ref(&c).cast::<c_void>();
        // SAFETY: the type of all queries in the header, except for the type of the struct behind the pointer.
        let query: Query = unsafe { self.symbol(&format!("{name}_workspace"))? };
        // Called before the views are checked, so that tests can call the query with invalid views too.
        // SAFETY: the struct is the one that this kernel's functions take, and no view's memory is read.
        let bytes = unsafe { query(c) };
        self.queried.store(bytes, Ordering::Relaxed);
        // Only memory is checked here: this device tests the checks that launchers make themselves.
        check::memory(self.heap.id, a)?;
        let workspace = match usize::try_from(bytes) {
            Ok(bytes) if bytes > 0 => Some(Self::take(&self.heap, Role::Workspace, bytes)?),
            _ => None,
        };
        let launch = ffi::ett_launch {
            stream: std::ptr::null_mut(),
            workspace: workspace.as_ref().map_or(std::ptr::null_mut(), |w| w.addr() as *mut c_void),
            workspace_bytes: bytes.max(0),
            fault: self.fault.addr() as *mut ffi::ett_fault,
            number: call::number(name),
            force: self
                .forced
                .iter()
                .find(|(op, _)| *op == name)
                .map_or(std::ptr::null(), |(_, k)| k.as_ptr()),
        };
        // SAFETY: the type of all launchers in the header, except for the type of the struct behind the pointer.
        let run: Launcher = unsafe { self.symbol(name)? };
        // SAFETY: the struct is the one that this kernel takes; its views were checked, the workspace has the size that
        // the query returned, and nothing else runs meanwhile.
        let code = unsafe { run(c, &launch) };
        // SAFETY: a struct of numbers.
        let mut last = unsafe { std::mem::zeroed::<ffi::ett_status>() };
        // SAFETY: its type in the header.
        let status: unsafe extern "C" fn(*mut ffi::ett_status) = unsafe { self.symbol("last_status")? };
        // SAFETY: it writes the struct.
        unsafe { status(&mut last) };
        // SAFETY: an array that ends with a zero.
        let arg = unsafe { CStr::from_ptr(last.arg.as_ptr()) }.to_bytes();
        let refused = matches!(code, 1 | 2) && arg != b"args" && !arg.starts_with(b"launch");
        if refused != (bytes < 0) {
            let (refused, arg) = (if refused { "refused" } else { "took" }, String::from_utf8_lossy(arg));
            let what = format!(
                "the query of {name} answered {bytes}, but the launcher {refused} its arguments ({arg})"
            );
            return Err(Error::device("shim", what));
        }
        call::check(name, "shim", code, &last)?;
        // Launches are synchronous, so that a fault can be reported immediately.
        let slot = self.fault.addr() as *mut ffi::ett_fault;
        // SAFETY: the buffer is one fault long, and only launches use it, one at a time.
        let found = std::mem::take(unsafe { &mut *slot });
        call::fault(&found).map_or(Ok(()), Err)
    }

    /// Waits for the calls of other threads.
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the query of the last call answered, which was asked before anything else was looked at.
    pub fn last_query(&self) -> i64 {
        self.queried.load(Ordering::Relaxed)
    }

    /// The implementation that this thread's last launch chose.
    pub fn last_kernel(&self) -> Result<&'static str> {
        // SAFETY: its type in the header.
        let f: unsafe extern "C" fn() -> *const c_char = unsafe { self.symbol("last_kernel")? };
        // SAFETY: it takes nothing and returns null or a string literal.
        Ok(unsafe { call::kernel_name(f()) })
    }
}

impl Collectives for Shim {
    fn ranks(&self) -> usize {
        1
    }
    fn rank(&self) -> usize {
        0
    }
    fn all_reduce(&self, _s: Stream, x: Acc, _how: Reduction) -> Result<()> {
        check::view(self.heap.id, "all_reduce", "x", &x.0)
    }
    fn reduce_scatter(&self, _s: Stream, _x: In, _y: Out) -> Result<()> {
        Err(Error::Unsupported { op: "reduce_scatter", what: "a collective".into(), device: "shim".into() })
    }
    fn all_gather(&self, _s: Stream, _x: In, _y: Out) -> Result<()> {
        Err(Error::Unsupported { op: "all_gather", what: "a collective".into(), device: "shim".into() })
    }
}

impl Device for Shim {
    fn name(&self) -> String {
        "shim".into()
    }

    fn id(&self) -> DeviceId {
        self.heap.id
    }

    fn alloc(&self, role: Role, bytes: usize) -> Result<Buffer> {
        Self::take(&self.heap, role, bytes)
    }

    fn copy_in(&self, _s: Stream, src: &[u8], dst: Out) -> Result<()> {
        let _turn = self.turn();
        check::view(self.heap.id, "copy_in", "dst", &dst.0)?;
        if dst.0.bytes() != src.len() as u64 || !dst.0.is_contiguous() {
            return Err(Error::arg(
                "copy_in",
                "src",
                src.len(),
                format!("{} contiguous bytes", dst.0.bytes()),
            ));
        }
        // SAFETY: the view was checked and has the length of the source; there are no references into buffers.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst.0.addr() as *mut u8, src.len()) };
        Ok(())
    }

    fn copy(&self, _s: Stream, src: In, dst: Out) -> Result<()> {
        let _turn = self.turn();
        check::copy(self.heap.id, &src, &dst)?;
        // SAFETY: the views were checked and have the same length; there are no references into buffers.
        unsafe {
            std::ptr::copy(src.addr() as *const u8, dst.0.addr() as *mut u8, src.bytes() as usize);
        }
        Ok(())
    }

    fn read_later(&self, _s: Stream, src: In) -> Result<Pending> {
        let _turn = self.turn();
        check::view(self.heap.id, "read_later", "src", &src)?;
        let (rows, width) = (src.dims.rows(), src.dims.cols() * src.dtype.size());
        let mut v = Vec::with_capacity(rows * width);
        for r in 0..if width == 0 { 0 } else { rows } {
            let at = src.addr() + r as u64 * src.ld as u64 * src.dtype.size() as u64;
            // SAFETY: not empty, and in bounds since the view was checked; blocks are initialised when they are
            // allocated, and no other call runs meanwhile.
            v.extend_from_slice(unsafe { std::slice::from_raw_parts(at as *const u8, width) });
        }
        Ok(Pending::new(move || Ok(v)))
    }

    fn collectives(&self) -> &dyn Collectives {
        self
    }

    fn memory(&self) -> Memory {
        self.heap.memory.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

macro_rules! impl_shim {
    ($($(#[$doc:meta])* $module:ident: $name:ident($args:ident<$lt:lifetime>) flop |$s:ident| $flop:expr => $fields:tt)*) => {
        impl Kernels for Shim {
            $(fn $name(&self, _s: Stream, a: &$args<'_>) -> Result<()> {
                self.launch(a)
            })*
        }
    };
}
contract::kernel_table!(impl_shim);
