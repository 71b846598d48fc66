//! Host memory with free lists by size: steps with the same calls get the same addresses, and only the first step
//! allocates from the system. Workspaces of launches share one block that grows to the largest of them.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::{Memory, Reclaim, Role, size};

/// Free blocks are returned to the system when they exceed this many bytes in total.
const KEEP: usize = 2 << 30;

pub(crate) struct Pool {
    poison: bool,
    state: Mutex<State>,
}

struct State {
    free: HashMap<usize, Vec<u64>>,
    free_bytes: usize,
    /// Unused blocks for workspaces: one, unless launches run at the same time.
    spare: Vec<(u64, Layout)>,
    memory: Memory,
    /// Maximum of the total allocated memory, in bytes.
    limit: u64,
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1).checked_next_multiple_of(256)?, 256).ok()
}

impl Pool {
    pub(crate) fn new(poison: bool) -> Self {
        let (free, spare, memory) = Default::default();
        let state = State { free, free_bytes: 0, spare, memory, limit: u64::MAX };
        Pool { poison, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn memory(&self) -> Memory {
        self.lock().memory.clone()
    }

    /// Limits the total allocated memory to `bytes`.
    pub(crate) fn limit(&self, bytes: u64) {
        self.lock().limit = bytes;
    }

    /// Bytes that may be allocated before the limit is reached; `None` without a limit.
    pub(crate) fn room(&self) -> Option<u64> {
        let s = self.lock();
        (s.limit < u64::MAX).then(|| s.limit.saturating_sub(s.memory.total()))
    }

    /// Whether allocated memory is filled with NaN (-1 for indices).
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poison
    }

    /// The reason why an allocation failed, for messages.
    pub(crate) fn refusal(&self) -> String {
        match self.lock().limit {
            u64::MAX => "the system has no more".into(),
            limit => format!("at most {} may be allocated", size(limit)),
        }
    }

    /// The address of a block of `bytes` bytes, aligned to 256; `None` if the system has no more memory or the limit
    /// would be exceeded.
    pub(crate) fn take(&self, role: Role, bytes: usize) -> Option<u64> {
        let layout = layout(bytes)?;
        let mut s = self.lock();
        s.fits(bytes)?;
        let addr = match s.free.get_mut(&layout.size()).and_then(Vec::pop) {
            Some(addr) => {
                s.free_bytes -= layout.size();
                addr
            }
            None => {
                s.memory.taken += layout.size() as u64;
                // SAFETY: the size is not zero.
                unsafe { alloc_zeroed(layout) as u64 }
            }
        };
        if addr == 0 {
            return None;
        }
        s.memory.add(role, bytes);
        drop(s);
        if self.poison {
            // All bits set is NaN in every float type and -1 in i32.
            // SAFETY: the block has this size and is not used elsewhere.
            unsafe { std::ptr::write_bytes(addr as *mut u8, 0xFF, layout.size()) };
        }
        Some(addr)
    }

    /// Memory for the workspace of a launch; `None` in the same cases as [`Pool::take`].
    pub(crate) fn reserve(self: &Arc<Self>, bytes: usize) -> Option<Reserved> {
        let mut s = self.lock();
        s.fits(bytes)?;
        let enough = s.spare.iter().position(|(_, l)| l.size() >= bytes);
        let (addr, layout) = match enough {
            Some(i) => s.spare.swap_remove(i),
            None => {
                // Replace a block that is too small.
                if let Some((addr, small)) = s.spare.pop() {
                    // SAFETY: it came from alloc_zeroed with this layout.
                    unsafe { dealloc(addr as *mut u8, small) };
                }
                let layout = layout(bytes)?;
                s.memory.taken += layout.size() as u64;
                // SAFETY: the size is not 0.
                (unsafe { alloc_zeroed(layout) } as u64, layout)
            }
        };
        if addr == 0 {
            return None;
        }
        s.memory.add(Role::Workspace, bytes);
        drop(s);
        Some(Reserved { addr, bytes, layout, pool: self.clone() })
    }
}

impl State {
    /// `None` if `bytes` more would exceed the limit.
    fn fits(&self, bytes: usize) -> Option<()> {
        (self.memory.total().checked_add(bytes as u64)? <= self.limit).then_some(())
    }
}

/// Memory of a launch's workspace, initialised and aligned to 256; counted as [`Role::Workspace`].
pub(crate) struct Reserved {
    addr: u64,
    bytes: usize,
    layout: Layout,
    pool: Arc<Pool>,
}

impl Reserved {
    pub(crate) fn addr(&self) -> u64 {
        self.addr
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut s = self.pool.lock();
        s.memory.sub(Role::Workspace, self.bytes);
        s.spare.push((self.addr, self.layout));
    }
}

fn release(free: &mut HashMap<usize, Vec<u64>>) {
    for (size, list) in free.drain() {
        for addr in list {
            // SAFETY: every address in a free list came from alloc_zeroed with this layout.
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
        let mut s = self.lock();
        release(&mut s.free);
        for (addr, layout) in s.spare.drain(..) {
            // SAFETY: it came from alloc_zeroed with this layout.
            unsafe { dealloc(addr as *mut u8, layout) };
        }
    }
}
