//! All fuzz targets in one program, so that it is linked once; `ETT_FUZZ` names the target that runs.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use libfuzzer_sys::fuzz_target;
use targets::{TARGETS, Target};

#[path = "../../../tests/ett/fuzz/mod.rs"]
mod targets;

/// Bytes of the heap that a target may hold.
const MOST: usize = 640 << 20;

/// The system's allocator, which ends the process when more than [`MOST`] bytes are held. libFuzzer's own limits need a
/// sanitizer, or see the process only once a second.
struct Limited;

#[global_allocator]
static HEAP: Limited = Limited;

static LIVE: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    if LIVE.fetch_add(bytes, Relaxed).saturating_add(bytes) > MOST {
        // What follows allocates.
        LIVE.store(0, Relaxed);
        let trace = std::backtrace::Backtrace::force_capture();
        eprintln!("the heap would hold more than {} MiB with {bytes} bytes more:\n{trace}", MOST >> 20);
        std::process::abort();
    }
}

fn shrink(bytes: usize) {
    LIVE.fetch_sub(bytes, Relaxed);
}

// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller upholds the contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller upholds the contract.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        shrink(layout.size());
        // SAFETY: the caller upholds the contract.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match size.checked_sub(layout.size()) {
            Some(more) => grow(more),
            None => shrink(layout.size() - size),
        }
        // SAFETY: the caller upholds the contract.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Stack of the threads that decode pictures in training.
const STACK: usize = 2 << 20;

fn chosen() -> Target {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let wanted = std::env::var("ETT_FUZZ").unwrap_or_default();
        let found = TARGETS.iter().find(|(name, _)| *name == wanted);
        let found = found.unwrap_or_else(|| panic!("ETT_FUZZ is {wanted:?}, wanted one of {TARGETS:?}"));
        // ett catches the panics of some libraries; its own are always errors.
        let fatal = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let at = panic.location().map_or("", |l| l.file());
            if !at.contains("/registry/") && !at.contains("/rustc/") {
                fatal(panic);
            }
        }));
        found.1
    })
}

fuzz_target!(|bytes: &[u8]| {
    let target = chosen();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().stack_size(STACK);
        let thread = thread.spawn_scoped(scope, || target(bytes)).expect("a thread");
        if let Err(panic) = thread.join() {
            let what = panic.downcast_ref::<String>().map(String::as_str);
            eprintln!("a panic of a library: {}", what.or(panic.downcast_ref().copied()).unwrap_or_default());
            std::process::abort();
        }
    });
});
