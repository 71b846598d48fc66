//! NCCL, found at run time.
//!
//! The few functions are declared here, with the types that `nccl.h` has had since 2.18: cudarc's bindings look for
//! `libnccl.so` only, which the packages for users do not contain, and panic where it is missing.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::backend::{DType, Reduction};

/// What went wrong, without the name of the device.
pub(super) type Result<T> = std::result::Result<T, String>;

/// The names of the library: that of its interface, which every package has, and that for compilers.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version that has all functions and fields, as NCCL counts: 10000 * major + 100 * minor + patch.
const OLDEST: c_int = 21800;
/// Marks a configuration, as `nccl.h` says.
const MAGIC: c_uint = 0xcafe_beef;
/// A number that is left to NCCL.
const UNDEFINED: c_int = c_int::MIN;
/// The length of the name under which the ranks find each other.
pub(super) const ID: usize = 128;

/// A handle of `ncclComm_t`.
pub(super) type Handle = *mut c_void;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; ID]);

/// `ncclConfig_t` of [`OLDEST`]. Newer libraries copy the bytes that `size` counts, and have defaults for the rest.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cluster: c_int,
    fewest_blocks: c_int,
    most_blocks: c_int,
    network: *const c_char,
    share: c_int,
    /// Newer than the others; it lies where they would end with padding.
    traffic: c_int,
}

macro_rules! functions {
    ($($name:ident: $symbol:literal($($arg:ty),*) -> $answer:ty;)*) => {
        /// The functions of the library.
        struct Functions {
            $($name: unsafe extern "C" fn($($arg),*) -> $answer,)*
        }

        impl Functions {
            fn of(library: &Library) -> std::result::Result<Self, libloading::Error> {
                Ok(Functions {
                    // SAFETY: the type is the one that `nccl.h` gives this function.
                    $($name: unsafe { *library.get($symbol.as_bytes())? },)*
                })
            }
        }
    };
}

// Results are numbers here, since newer libraries may have more of them than an enum of today.
functions! {
    version: "ncclGetVersion"(*mut c_int) -> c_int;
    unique_id: "ncclGetUniqueId"(*mut UniqueId) -> c_int;
    join: "ncclCommInitRankConfig"(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int;
    destroy: "ncclCommDestroy"(Handle) -> c_int;
    abort: "ncclCommAbort"(Handle) -> c_int;
    state: "ncclCommGetAsyncError"(Handle, *mut c_int) -> c_int;
    result_text: "ncclGetErrorString"(c_int) -> *const c_char;
    last_text: "ncclGetLastError"(Handle) -> *const c_char;
    all_reduce: "ncclAllReduce"(*const c_void, *mut c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
    reduce_scatter: "ncclReduceScatter"(*const c_void, *mut c_void, usize, c_int, c_int, Handle, CUstream) -> c_int;
    all_gather: "ncclAllGather"(*const c_void, *mut c_void, usize, c_int, Handle, CUstream) -> c_int;
}

/// The library.
pub(super) struct Nccl {
    functions: Functions,
    version: c_int,
    /// Never unloaded: it has threads of its own.
    _library: Library,
}

/// `ncclDataType_t` of an element type.
fn code(dtype: DType) -> c_int {
    match dtype {
        DType::U8 => 1,
        DType::I32 => 2,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
    }
}

/// `ncclRedOp_t` of a reduction.
fn operation(how: Reduction) -> c_int {
    match how {
        Reduction::Sum => 0,
        Reduction::Mean => 4,
    }
}

/// The text of a string of the library.
///
/// # Safety
/// `text` is null or a C string that lives during the call.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    let text = unsafe { CStr::from_ptr(text) }.to_string_lossy();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A version as text.
fn dotted(version: c_int) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

/// Opens the library under the first of its names that the system finds.
fn open() -> Result<Library> {
    let mut why = Vec::new();
    for name in NAMES {
        // SAFETY: the library's initialisers only set up its own state.
        match unsafe { Library::new(name) } {
            Ok(library) => return Ok(library),
            Err(e) => why.push(std::error::Error::source(&e).map_or(e.to_string(), ToString::to_string)),
        }
    }
    Err(format!(
        "NCCL cannot be loaded ({}); install it (libnccl2 of NVIDIA's repositories, or nvidia-nccl-cu13 of pip) and add \
         the folder of {} to LD_LIBRARY_PATH, or train on one GPU",
        why.join("; "),
        NAMES[0]
    ))
}

impl Nccl {
    /// The library of this process.
    pub(super) fn get() -> Result<&'static Self> {
        static LIBRARY: OnceLock<Result<Nccl>> = OnceLock::new();
        LIBRARY.get_or_init(Self::load).as_ref().map_err(String::clone)
    }

    fn load() -> Result<Self> {
        let library = open()?;
        let functions = Functions::of(&library)
            .map_err(|e| format!("NCCL lacks a function ({e}); install {} or newer", dotted(OLDEST)))?;
        let mut version = 0;
        // SAFETY: it writes one number.
        let code = unsafe { (functions.version)(&mut version) };
        let nccl = Nccl { functions, version, _library: library };
        nccl.check("asking for the version", std::ptr::null_mut(), code)?;
        match version < OLDEST {
            true => Err(format!(
                "NCCL is {}, wanted {}; install this or a newer one",
                nccl.version(),
                dotted(OLDEST)
            )),
            false => Ok(nccl),
        }
    }

    /// The version, such as `2.28.3`.
    pub(super) fn version(&self) -> String {
        dotted(self.version)
    }

    /// Turns a result into an error that says what NCCL says.
    fn check(&self, what: &str, comm: Handle, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: both take any number and a communicator or null, and return strings that the library owns.
        let (kind, last) =
            unsafe { (text((self.functions.result_text)(code)), text((self.functions.last_text)(comm))) };
        let detail = if last.is_empty() { String::new() } else { format!(" ({last})") };
        Err(format!("{what} failed in NCCL: {kind}{detail}; set NCCL_DEBUG=WARN to learn more"))
    }

    /// A new name under which ranks find each other, which one of them makes for all.
    pub(super) fn unique_id(&self) -> Result<[u8; ID]> {
        let mut id = UniqueId([0; ID]);
        // SAFETY: it writes the struct.
        let code = unsafe { (self.functions.unique_id)(&mut id) };
        self.check("naming the group of ranks", std::ptr::null_mut(), code)?;
        Ok(id.0)
    }

    /// Connects this rank, whose context is bound, to all others; blocks until they are there. A collective runs at most
    /// `blocks` thread blocks. The caller destroys or aborts the communicator.
    pub(super) fn join(
        &self,
        id: [u8; ID],
        rank: usize,
        ranks: usize,
        blocks: Option<u32>,
    ) -> Result<Handle> {
        let number = |n: usize| c_int::try_from(n).map_err(|_| format!("{n} is too large for a rank"));
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: OLDEST as c_uint,
            blocking: 1,
            cluster: UNDEFINED,
            fewest_blocks: UNDEFINED,
            most_blocks: blocks.and_then(|n| c_int::try_from(n).ok()).unwrap_or(UNDEFINED),
            network: std::ptr::null(),
            share: UNDEFINED,
            traffic: UNDEFINED,
        };
        let mut comm = std::ptr::null_mut();
        // SAFETY: it writes the handle and reads the configuration, which says its size.
        let code = unsafe {
            (self.functions.join)(&mut comm, number(ranks)?, UniqueId(id), number(rank)?, &mut config)
        };
        self.check("connecting the GPUs", std::ptr::null_mut(), code)?;
        Ok(comm)
    }

    /// Fails with an error that collectives met after they were enqueued.
    ///
    /// # Safety
    /// The communicator is alive.
    pub(super) unsafe fn state(&self, comm: Handle) -> Result<()> {
        let mut state = 0;
        // SAFETY: it reads the communicator and writes one number.
        let code = unsafe { (self.functions.state)(comm, &mut state) };
        self.check("asking for errors", comm, code)?;
        self.check("a collective", comm, state)
    }

    /// Frees the communicator once its collectives are done and the other ranks of the host free theirs.
    ///
    /// # Safety
    /// The communicator is alive, and not used afterwards.
    pub(super) unsafe fn destroy(&self, comm: Handle) -> Result<()> {
        // SAFETY: as the caller says.
        let code = unsafe { (self.functions.destroy)(comm) };
        self.check("leaving the group of ranks", std::ptr::null_mut(), code)
    }

    /// Stops the collectives of the communicator and frees it, once no recording contains them any more.
    ///
    /// # Safety
    /// As for [`Nccl::destroy`].
    pub(super) unsafe fn abort(&self, comm: Handle) -> Result<()> {
        // SAFETY: as the caller says.
        let code = unsafe { (self.functions.abort)(comm) };
        self.check("stopping collectives", std::ptr::null_mut(), code)
    }
}

/// A communicator that is alive and held by one thread, and the stream of its collectives.
pub(super) struct Line<'a> {
    pub(super) nccl: &'a Nccl,
    pub(super) comm: Handle,
    pub(super) stream: CUstream,
}

/// The collectives. Addresses are those of the first elements; counts are elements.
impl Line<'_> {
    /// Replaces `n` elements at `x` by their sum or mean over all ranks.
    ///
    /// # Safety
    /// There are as many elements, which are not freed before the collective is done. The context is bound.
    pub(super) unsafe fn all_reduce(&self, x: u64, n: usize, dtype: DType, how: Reduction) -> Result<()> {
        let at = x as *mut c_void;
        let all_reduce = self.nccl.functions.all_reduce;
        // SAFETY: guaranteed by the caller; NCCL allows the two arrays to be one.
        let code = unsafe { all_reduce(at, at, n, code(dtype), operation(how), self.comm, self.stream) };
        self.nccl.check("all_reduce", self.comm, code)
    }

    /// Writes this rank's part, of `n` elements, of the sum of all `x` to `y`.
    ///
    /// # Safety
    /// As for [`Line::all_reduce`]; `x` has as many elements for each rank. `y` is apart from it or its own part.
    pub(super) unsafe fn reduce_scatter(&self, x: u64, y: u64, n: usize, dtype: DType) -> Result<()> {
        let (from, to, sum) = (x as *const c_void, y as *mut c_void, operation(Reduction::Sum));
        let reduce_scatter = self.nccl.functions.reduce_scatter;
        // SAFETY: guaranteed by the caller.
        let code = unsafe { reduce_scatter(from, to, n, code(dtype), sum, self.comm, self.stream) };
        self.nccl.check("reduce_scatter", self.comm, code)
    }

    /// Writes the `n` elements at `x` of all ranks to `y`.
    ///
    /// # Safety
    /// As for [`Line::reduce_scatter`], with `x` and `y` exchanged.
    pub(super) unsafe fn all_gather(&self, x: u64, y: u64, n: usize, dtype: DType) -> Result<()> {
        let (from, to) = (x as *const c_void, y as *mut c_void);
        let all_gather = self.nccl.functions.all_gather;
        // SAFETY: guaranteed by the caller.
        let code = unsafe { all_gather(from, to, n, code(dtype), self.comm, self.stream) };
        self.nccl.check("all_gather", self.comm, code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the library is missing, the error has a remedy; where it is found, no GPU is needed to ask for its version.
    #[test]
    fn the_library_is_found_or_a_sentence_says_how_to_install_it() {
        match Nccl::get() {
            Ok(nccl) => assert!(nccl.version().starts_with("2."), "{}", nccl.version()),
            Err(e) => assert!(e.contains("NCCL") && e.contains("install"), "{e}"),
        }
        assert_eq!(dotted(22803), "2.28.3");
    }

    /// The layout that `nccl.h` of 2.18 has on machines of 64 bits.
    #[test]
    fn the_configuration_has_the_layout_of_the_header() {
        use std::mem::offset_of;
        assert_eq!(size_of::<Config>(), 48);
        assert_eq!((offset_of!(Config, blocking), offset_of!(Config, most_blocks)), (16, 28));
        assert_eq!((offset_of!(Config, network), offset_of!(Config, traffic)), (32, 44));
    }
}
