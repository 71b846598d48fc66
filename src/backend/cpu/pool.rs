//! Host memory with free lists by size: the same calls in a step give the same addresses, and steps after
//! the first ask the system for nothing.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::{Memory, Reclaim, Role};
use crate::tensor::Element;

/// Free lists above this size are given back to the system.
const KEEP: usize = 2 << 30;

pub(crate) struct Pool {
    poison: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: HashMap<usize, Vec<u64>>,
    free_bytes: usize,
    memory: Memory,
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1).checked_next_multiple_of(256)?, 256).ok()
}

impl Pool {
    pub(crate) fn new(poison: bool) -> Self {
        Pool { poison, state: Mutex::new(State::default()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn memory(&self) -> Memory {
        self.lock().memory.clone()
    }

    /// An address of `bytes` bytes, aligned to 256; `None` if the system has no more.
    pub(crate) fn take(&self, role: Role, bytes: usize) -> Option<u64> {
        let layout = layout(bytes)?;
        let mut s = self.lock();
        let addr = match s.free.get_mut(&layout.size()).and_then(Vec::pop) {
            Some(addr) => {
                s.free_bytes -= layout.size();
                addr
            }
            // SAFETY: the size is not zero.
            None => unsafe { alloc_zeroed(layout) as u64 },
        };
        if addr == 0 {
            return None;
        }
        s.memory.add(role, bytes);
        drop(s);
        if self.poison {
            // All bits set is NaN in every float type and -1 in i32.
            // SAFETY: the block has this size, and nobody else has it.
            unsafe { std::ptr::write_bytes(addr as *mut u8, 0xFF, layout.size()) };
        }
        Some(addr)
    }
}

fn release(free: &mut HashMap<usize, Vec<u64>>) {
    for (size, list) in free.drain() {
        for addr in list {
            // SAFETY: every address in a free list came from alloc_zeroed with this very layout.
            unsafe { dealloc(addr as *mut u8, Layout::from_size_align_unchecked(size, 256)) };
        }
    }
}

impl Reclaim for Pool {
    unsafe fn reclaim(&self, addr: u64, bytes: usize, role: Role) {
        let Some(layout) = layout(bytes) else { return };
        let mut s = self.lock();
        s.memory.sub(role, bytes);
        s.free.entry(layout.size()).or_default().push(addr);
        s.free_bytes += layout.size();
        if s.free_bytes > KEEP {
            s.free_bytes = 0;
            release(&mut s.free);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        release(&mut self.lock().free);
    }
}

/// Scratch memory of a kernel, counted as [`Role::Workspace`].
pub(crate) struct Scratch<T> {
    addr: u64,
    n: usize,
    pool: Arc<Pool>,
    of: PhantomData<T>,
}

impl<T: Element> Scratch<T> {
    pub(crate) fn new(pool: &Arc<Pool>, n: usize) -> Self {
        let bytes = n * std::mem::size_of::<T>();
        let Some(addr) = pool.take(Role::Workspace, bytes) else {
            std::alloc::handle_alloc_error(Layout::new::<T>())
        };
        Scratch { addr, n, pool: pool.clone(), of: PhantomData }
    }
}

impl<T> Drop for Scratch<T> {
    fn drop(&mut self) {
        // SAFETY: `new` took it from this pool with the same size and role.
        unsafe { self.pool.reclaim(self.addr, self.n * std::mem::size_of::<T>(), Role::Workspace) };
    }
}

impl<T: Element> Deref for Scratch<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `n` elements initialised (zeroed when fresh), aligned to 256, exclusively owned.
        unsafe { std::slice::from_raw_parts(self.addr as *const T, self.n) }
    }
}

impl<T: Element> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(self.addr as *mut T, self.n) }
    }
}
