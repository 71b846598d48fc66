//! Copies between host and device through pinned memory. The caller can reuse its bytes immediately, and reading back
//! waits only when the value is requested.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaEvent, DriverError, result, sys};
use rayon::prelude::*;

use super::arena::Gpu;
use super::{call, ffi};
use crate::backend::{In, Pending};
use crate::error::Result;

/// Larger copies are split into pieces of this many bytes.
const PIECE: usize = 32 << 20;
/// Bytes of pinned memory beyond which a copy waits for an earlier one instead of allocating a block.
const KEPT: usize = 256 << 20;

/// Bytes that a thread copies at a time.
const SHARE: usize = 1 << 20;

/// Copies bytes by several threads: one alone is slower than the bus, above all out of a file that is mapped into memory.
fn fill(to: &mut [MaybeUninit<u8>], from: &[u8]) {
    to.par_chunks_mut(SHARE).zip(from.par_chunks(SHARE)).for_each(|(to, from)| {
        // SAFETY: both are as long as `from`, and they do not overlap, since `to` is borrowed mutably.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_mut_ptr().cast(), from.len()) }
    });
}

/// Pinned blocks, reused when their copy is done.
pub(super) struct Pinned {
    gpu: Arc<Gpu>,
    blocks: Mutex<Vec<Block>>,
}

struct Block {
    at: *mut u8,
    bytes: usize,
    done: CudaEvent,
}

// SAFETY: the pointer is to host memory that the block owns.
unsafe impl Send for Block {}

impl Pinned {
    pub(super) fn new(gpu: Arc<Gpu>) -> Self {
        Pinned { gpu, blocks: Mutex::default() }
    }

    /// A block of at least `bytes` bytes that is not used by any copy.
    fn take(&self, bytes: usize) -> std::result::Result<Block, DriverError> {
        let size = bytes.max(4096).next_power_of_two();
        {
            let mut all = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(i) = all.iter().position(|b| b.bytes == size && b.done.is_complete()) {
                return Ok(all.swap_remove(i));
            }
            let held: usize = all.iter().map(|b| b.bytes).sum();
            if held + size > KEPT
                && let Some(i) = all.iter().position(|b| b.bytes == size)
            {
                let block = all.swap_remove(i);
                self.gpu.reach(&block.done)?;
                return Ok(block);
            }
        }
        self.gpu.context.bind_to_thread()?;
        // SAFETY: the context is bound; the block is not read before a copy has written it.
        let at = unsafe { result::malloc_host(size, 0)? };
        Ok(Block { at: at.cast(), bytes: size, done: self.gpu.context.new_event(None)? })
    }

    fn give(&self, block: Block) {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner).push(block);
    }

    /// Enqueues a copy of `src` to `dst` on `stream`.
    pub(super) fn copy_in(
        &self,
        stream: &cudarc::driver::CudaStream,
        src: &[u8],
        dst: u64,
    ) -> std::result::Result<(), DriverError> {
        for (i, piece) in src.chunks(PIECE).enumerate() {
            let block = self.take(piece.len())?;
            // SAFETY: the block is at least as long as the piece and held only here; it is not reused before `done`.
            // The caller checked that the target is as long as the source.
            unsafe {
                let to = std::slice::from_raw_parts_mut(block.at.cast::<MaybeUninit<u8>>(), piece.len());
                fill(to, piece);
                let from = std::slice::from_raw_parts(block.at, piece.len());
                result::memcpy_htod_async(dst + (i * PIECE) as u64, from, stream.cu_stream())?;
            }
            block.done.record(stream)?;
            self.give(block);
        }
        Ok(())
    }

    /// Enqueues a copy of `src` to the host on `stream`, followed by a copy of the fault slot.
    pub(super) fn read_later(
        self: &Arc<Self>,
        stream: &cudarc::driver::CudaStream,
        src: In,
        fault: u64,
    ) -> std::result::Result<Pending, DriverError> {
        let (rows, width) = (src.dims.rows(), src.dims.cols() * src.dtype.size());
        let bytes = rows * width;
        let slot = bytes.next_multiple_of(8);
        let block = self.take(slot + size_of::<ffi::ett_fault>())?;
        let from = src.addr();
        // SAFETY: the block has room for both copies and is not reused before they are done; the caller checked the
        // view, and the fault slot is one fault long.
        unsafe {
            let to = |at: usize, n: usize| std::slice::from_raw_parts_mut(block.at.add(at), n);
            if bytes > 0 && src.is_contiguous() {
                result::memcpy_dtoh_async(to(0, bytes), from, stream.cu_stream())?;
            } else if bytes > 0 {
                let copy = sys::CUDA_MEMCPY2D {
                    srcXInBytes: 0,
                    srcY: 0,
                    srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
                    srcHost: std::ptr::null(),
                    srcDevice: from,
                    srcArray: std::ptr::null_mut(),
                    srcPitch: src.ld as usize * src.dtype.size(),
                    dstXInBytes: 0,
                    dstY: 0,
                    dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_HOST,
                    dstHost: block.at.cast::<c_void>(),
                    dstDevice: 0,
                    dstArray: std::ptr::null_mut(),
                    dstPitch: width,
                    WidthInBytes: width,
                    Height: rows,
                };
                sys::cuMemcpy2DAsync_v2(&copy, stream.cu_stream()).result()?;
            }
            let n = size_of::<ffi::ett_fault>();
            result::memcpy_dtoh_async(to(slot, n), fault, stream.cu_stream())?;
        }
        block.done.record(stream)?;
        let held = Held { block: Some(block), home: self.clone() };
        let gpu = self.gpu.clone();
        Ok(Pending::new(move || held.wait(&gpu, bytes, slot, fault)))
    }
}

/// A block with a copy in progress.
struct Held {
    block: Option<Block>,
    home: Arc<Pinned>,
}

impl Held {
    fn wait(self, gpu: &Gpu, bytes: usize, slot: usize, fault: u64) -> Result<Vec<u8>> {
        let Some(block) = &self.block else { return Ok(Vec::new()) };
        gpu.wait(&block.done, "waiting for a value")?;
        // SAFETY: both copies are done, and the block is as long as both; a fault consists of numbers.
        let (v, found) = unsafe {
            let v = std::slice::from_raw_parts(block.at, bytes).to_vec();
            (v, std::ptr::read(block.at.add(slot).cast::<ffi::ett_fault>()))
        };
        match call::fault(&found) {
            None => Ok(v),
            Some(error) => {
                // A fault is reported once: clearing the slot makes room for the next. During a recording, the clearing
                // would become a part of every replay.
                if gpu.is_recording() {
                    return Err(error);
                }
                let n = size_of::<ffi::ett_fault>();
                // SAFETY: the slot is one fault long and alive as long as the device.
                let clear = unsafe { result::memset_d8_async(fault, 0, n, gpu.compute.cu_stream()) };
                clear.map_err(|e| gpu.error("clearing a fault", e))?;
                Err(error)
            }
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.home.give(block);
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.context.bind_to_thread().is_err() {
            return;
        }
        for block in self.blocks.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // Errors are ignored: a device that fails here also fails in a call that reports it.
            let _ = self.gpu.reach(&block.done);
            // SAFETY: it came from `malloc_host`, and its copy is done.
            let _ = unsafe { result::free_host(block.at.cast()) };
        }
    }
}
