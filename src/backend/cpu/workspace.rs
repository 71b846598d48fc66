//! Scratch memory of kernels. Every kernel has a *query*, `<kernel>_workspace`, which computes its size in bytes from
//! the arguments and the number of threads. A launch allocates one block of this size before its kernel starts, so that
//! nothing has been written if there is not enough memory. The kernel then allocates smaller blocks from it.
//!
//! Tasks of a parallel loop cannot allocate blocks, since [`Workspace`] is not `Sync`. Instead, they take slots of a
//! [`PerThread`] that is allocated before the loop. A task must not start a parallel loop while it holds a slot,
//! because a thread that waits for a loop runs other tasks, which may need more slots than there are.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::pool::Reserved;
use crate::backend::{DType, Element, In};
use crate::error::{Error, Result};

/// Blocks of a workspace start at multiples of this many bytes.
const ALIGN: usize = 256;
/// Parts of a [`PerThread`] start at multiples of this many elements.
const LANES: usize = 32;

/// On a poisoned device, a kernel may leave half of its workspace and this many bytes unused.
const SLACK: usize = 64 << 10;

// ---- sizes, for queries: all of them saturate at `usize::MAX`, which cannot be allocated
// ------------------------------

/// Bytes of a block of `n` elements of `size` bytes.
pub(crate) fn block(size: usize, n: usize) -> usize {
    n.saturating_mul(size).checked_next_multiple_of(ALIGN).unwrap_or(usize::MAX)
}

/// Bytes of [`PerThread`] scratch.
pub(crate) fn per_thread<const N: usize>(
    threads: usize,
    size: usize,
    tasks: usize,
    parts: [usize; N],
) -> usize {
    block(size, slot(parts).saturating_mul(threads.min(tasks)))
}

/// Bytes of blocks that are held at the same time.
pub(crate) fn together<const N: usize>(blocks: [usize; N]) -> usize {
    blocks.into_iter().fold(0, usize::saturating_add)
}

/// Size of the accumulator type of `dtype`, in bytes.
pub(crate) fn acc_size(dtype: DType) -> usize {
    if dtype == DType::F64 { 8 } else { 4 }
}

/// Whether the accumulator type is wider than `dtype`.
pub(crate) fn is_narrow(dtype: DType) -> bool {
    dtype == DType::Bf16
}

/// Bytes of [`super::Wide`].
pub(crate) fn wide(x: &In) -> usize {
    if is_narrow(x.dtype) { block(4, x.dims.numel()) } else { 0 }
}

/// Defines the queries of kernels that need no workspace.
macro_rules! no_workspace {
    ($($kernel:ident($args:ident)),* $(,)?) => { pastey::paste! {
        $(pub(crate) fn [<$kernel _workspace>](_a: &crate::backend::$args, _threads: usize) -> usize {
            0
        })*
    } };
}
pub(crate) use no_workspace;

// ---- memory, for kernels
// ---------------------------------------------------------------------------------------------

/// The workspace of one launch.
pub(crate) struct Workspace {
    at: *mut u8,
    bytes: usize,
    threads: usize,
    poison: bool,
    /// The ends of the blocks in order, and whether they are still in use.
    blocks: RefCell<Vec<(usize, bool)>>,
    used: Cell<usize>,
    /// Frees the memory when dropped.
    _memory: Reserved,
}

impl Workspace {
    /// A workspace in reserved memory, for a kernel that runs on `threads` threads.
    pub(crate) fn new(memory: Reserved, threads: usize, poison: bool) -> Self {
        Workspace {
            at: memory.addr() as *mut u8,
            bytes: memory.bytes(),
            threads,
            poison,
            blocks: RefCell::default(),
            used: Cell::new(0),
            _memory: memory,
        }
    }

    /// A block of `n` elements; contents unspecified.
    pub(crate) fn scratch<T: Element>(&self, n: usize) -> Result<Scratch<'_, T>> {
        let bytes = block(size_of::<T>(), n);
        let mut blocks = self.blocks.borrow_mut();
        let start = blocks.last().map_or(0, |b| b.0);
        let end = start.saturating_add(bytes);
        if end > self.bytes {
            let what =
                format!("a kernel needs {end} bytes of workspace, but its query returned {}", self.bytes);
            return Err(Error::device("cpu", what));
        }
        blocks.push((end, true));
        self.used.set(self.used.get().max(end));
        // SAFETY: `start <= end <= bytes`, the length of the reserved memory.
        let at = unsafe { self.at.add(start) }.cast::<T>();
        let mut s = Scratch {
            at: if n == 0 { std::ptr::NonNull::dangling().as_ptr() } else { at },
            n,
            index: blocks.len() - 1,
            workspace: self,
        };
        if self.poison {
            poison(&mut s);
        }
        Ok(s)
    }

    /// Scratch for a parallel loop of `tasks` tasks: one slot, with parts of these numbers of elements, for each task
    /// that can run at the same time.
    pub(crate) fn per_thread<T: Element, const N: usize>(
        &self,
        tasks: usize,
        parts: [usize; N],
    ) -> Result<PerThread<'_, T, N>> {
        let slots = self.threads.min(tasks);
        let memory = self.scratch(slot(parts).saturating_mul(slots))?;
        Ok(PerThread { memory, parts, free: Mutex::new((0..slots).collect()), poison: self.poison })
    }

    /// On a poisoned device, fails if the query returned much more than the kernel used.
    pub(crate) fn check(&self, kernel: &'static str) -> Result<()> {
        let used = self.used.get();
        if self.poison && self.bytes > used.saturating_mul(2).saturating_add(SLACK) {
            let what =
                format!("{kernel} used {used} bytes of workspace, but its query returned {}", self.bytes);
            return Err(Error::device("cpu", what));
        }
        Ok(())
    }
}

/// Elements of one slot with these parts.
fn slot<const N: usize>(parts: [usize; N]) -> usize {
    parts.into_iter().map(padded).fold(0, usize::saturating_add)
}

fn padded(n: usize) -> usize {
    n.checked_next_multiple_of(LANES).unwrap_or(usize::MAX)
}

/// All bits set is NaN in every float type and -1 in i32.
fn poison<T: Element>(s: &mut [T]) {
    bytemuck::cast_slice_mut::<T, u8>(s).fill(0xFF);
}

/// A block of a workspace.
pub(crate) struct Scratch<'w, T> {
    at: *mut T,
    n: usize,
    index: usize,
    workspace: &'w Workspace,
}

// SAFETY: a shared reference only allows reading the elements. The workspace is accessed when the block is dropped,
// which happens on the thread that allocated it, since a block is not `Send`.
unsafe impl<T: Sync> Sync for Scratch<'_, T> {}

impl<T> Drop for Scratch<'_, T> {
    fn drop(&mut self) {
        let mut blocks = self.workspace.blocks.borrow_mut();
        blocks[self.index].1 = false;
        while blocks.last().is_some_and(|b| !b.1) {
            blocks.pop();
        }
    }
}

impl<T: Element> Deref for Scratch<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: inside the reserved memory, which is aligned to 256 and initialised; blocks in use do not overlap.
        unsafe { std::slice::from_raw_parts(self.at, self.n) }
    }
}

impl<T: Element> DerefMut for Scratch<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.n) }
    }
}

/// Scratch of the tasks of a parallel loop: a slot of `N` parts for each task that can run at the same time.
pub(crate) struct PerThread<'w, T, const N: usize> {
    memory: Scratch<'w, T>,
    parts: [usize; N],
    /// Indices of the unused slots.
    free: Mutex<Vec<usize>>,
    poison: bool,
}

impl<T: Element, const N: usize> PerThread<'_, T, N> {
    /// A slot for a task, which it keeps until the returned value is dropped.
    pub(crate) fn take(&self) -> Local<'_, T, N> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(slot) = free else {
            unreachable!(
                "a task waits for other tasks while it holds a slot, or there are more tasks than declared"
            )
        };
        Local { all: self, slot, of: PhantomData }
    }
}

/// A slot in use by one task.
pub(crate) struct Local<'a, T, const N: usize> {
    all: &'a PerThread<'a, T, N>,
    slot: usize,
    of: PhantomData<&'a mut [T]>,
}

impl<T: Element, const N: usize> Local<'_, T, N> {
    /// The parts as slices; contents unspecified.
    pub(crate) fn parts(&mut self) -> [&mut [T]; N] {
        let mut at = self.slot * slot(self.all.parts);
        self.all.parts.map(|n| {
            // SAFETY: the slots of a `PerThread` follow one another inside its block, and so do the parts of a slot. A
            // slot belongs to one `Local` at a time, which is borrowed as long as the slices live.
            let part = unsafe { std::slice::from_raw_parts_mut(self.all.memory.at.add(at), n) };
            at += padded(n);
            if self.all.poison {
                poison(part);
            }
            part
        })
    }
}

impl<T, const N: usize> Drop for Local<'_, T, N> {
    fn drop(&mut self) {
        self.all.free.lock().unwrap_or_else(PoisonError::into_inner).push(self.slot);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rayon::prelude::*;

    use super::super::Pool;
    use super::*;

    fn workspace(bytes: usize, threads: usize) -> Workspace {
        let memory = Arc::new(Pool::new(true)).reserve(bytes).expect("a little memory");
        Workspace::new(memory, threads, true)
    }

    #[test]
    fn blocks_do_not_overlap_and_are_used_again() {
        let ws = workspace(together([block(4, 100), block(8, 3)]), 1);
        let mut a = ws.scratch::<f32>(100).expect("as asked for");
        let mut b = ws.scratch::<f64>(3).expect("as asked for");
        assert!(a.iter().all(|v| v.is_nan()) && b.iter().all(|v| v.is_nan()), "poisoned");
        a.fill(1.0);
        b.fill(2.0);
        assert!(a.iter().all(|v| *v == 1.0) && b.iter().all(|v| *v == 2.0));
        let e = ws.scratch::<f32>(1).map(drop).expect_err("more than asked for").to_string();
        assert!(e.contains("1024 bytes") && e.contains("768"), "{e}");
        // The space of a dropped block becomes free when all later blocks are dropped too.
        drop(a);
        assert!(ws.scratch::<f32>(1).is_err());
        drop(b);
        assert!(ws.scratch::<f32>(192).is_ok());
        assert!(ws.check("kernel").is_ok());
    }

    #[test]
    fn sizes_that_cannot_be_had_are_refused() {
        assert_eq!(block(8, usize::MAX / 4), usize::MAX);
        assert_eq!(per_thread(4, 8, usize::MAX, [usize::MAX, 1]), usize::MAX);
        assert_eq!(together([usize::MAX, 256]), usize::MAX);
        assert!(Arc::new(Pool::new(false)).reserve(usize::MAX).is_none());
        let pool = Arc::new(Pool::new(false));
        pool.limit(1000);
        let first = pool.reserve(600).expect("below the limit");
        assert!(pool.reserve(600).is_none());
        drop(first);
        assert!(pool.reserve(1000).is_some() && pool.memory().total() == 0);
    }

    #[test]
    fn a_query_far_above_what_is_taken_is_told() {
        let ws = workspace(3 * SLACK, 1);
        let e = ws.check("kernel").expect_err("nothing was taken").to_string();
        assert!(e.contains("kernel used 0 bytes"), "{e}");
        drop(ws.scratch::<f32>(SLACK / 2).expect("as asked for"));
        assert!(ws.check("kernel").is_ok());
    }

    #[test]
    fn tasks_have_parts_of_their_own() {
        let threads = rayon::ThreadPoolBuilder::new().num_threads(3).build().expect("three threads");
        threads.install(|| {
            let ws = workspace(per_thread(3, 4, 1000, [5, 70]), 3);
            let scratch = ws.per_thread::<i32, 2>(1000, [5, 70]).expect("as asked for");
            let clean = AtomicUsize::new(0);
            (0..1000).into_par_iter().for_each(|task| {
                let mut local = scratch.take();
                let [a, b] = local.parts();
                assert_eq!((a.len(), b.len()), (5, 70));
                clean.fetch_add(a.iter().chain(b.iter()).all(|v| *v == -1) as usize, Ordering::Relaxed);
                a.fill(task);
                b.fill(-task - 2);
                std::thread::yield_now();
                assert!(a.iter().all(|v| *v == task) && b.iter().all(|v| *v == -task - 2));
            });
            assert_eq!(clean.into_inner(), 1000);
        });
    }
}
