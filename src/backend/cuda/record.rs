//! Recorded steps: CUDA graphs.

use std::sync::Arc;

use cudarc::driver::{DriverError, result, sys};

use super::arena::{Arena, Gpu};
use crate::backend::Recording;
use crate::error::Result;

/// A graph and the memory that its launches use.
pub(super) struct Graph {
    gpu: Arc<Gpu>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    _memory: Arc<Arena>,
}

/// Starts keeping what is enqueued on the compute stream.
pub(super) fn begin(gpu: &Gpu) -> std::result::Result<(), DriverError> {
    gpu.context.bind_to_thread()?;
    // Relaxed: memory is taken on another stream while the recording is made.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    unsafe { result::stream::begin_capture(gpu.compute.cu_stream(), mode) }
}

/// Ends it. The stream is usable again whatever happens.
pub(super) fn end(gpu: &Arc<Gpu>, memory: Arc<Arena>) -> std::result::Result<Graph, DriverError> {
    unsafe {
        let graph = result::stream::end_capture(gpu.compute.cu_stream())?;
        match result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) {
            Ok(executable) => Ok(Graph { gpu: gpu.clone(), graph, executable, _memory: memory }),
            Err(e) => {
                result::graph::destroy(graph)?;
                Err(e)
            }
        }
    }
}

impl Recording for Graph {
    fn replay(&self) -> Result<()> {
        let gpu = &self.gpu;
        let bound = gpu.context.bind_to_thread();
        let done =
            bound.and_then(|()| unsafe { result::graph::launch(self.executable, gpu.compute.cu_stream()) });
        done.map_err(|e| gpu.error("replaying a recorded step", e))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.context.bind_to_thread().is_ok() {
            // The last replay may still run. A device that fails here has failed elsewhere, where it is reported.
            let _ = self.gpu.compute.synchronize();
            unsafe {
                let _ = result::graph::exec_destroy(self.executable);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}
