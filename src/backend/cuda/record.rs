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

/// Starts recording the work that is enqueued on the compute stream.
pub(super) fn begin(gpu: &Gpu) -> std::result::Result<(), DriverError> {
    gpu.context.bind_to_thread()?;
    let mut recording = gpu.before_recording();
    if let Some(peers) = &gpu.peers {
        gpu.compute.join(&peers.stream)?;
    }
    let before = gpu.compute.record_event(None)?;
    // Relaxed: memory is allocated and freed on another stream during the recording.
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: the stream is alive and belongs to the bound context.
    unsafe { result::stream::begin_capture(gpu.compute.cu_stream(), mode)? };
    *recording = Some(before);
    Ok(())
}

/// Makes the compute stream wait for what the recording contains on the stream of the peers, without which it cannot end.
fn join_peers(gpu: &Gpu) -> std::result::Result<(), DriverError> {
    match &gpu.peers {
        Some(peers) if peers.is_recorded()? => gpu.compute.join(&peers.stream),
        _ => Ok(()),
    }
}

/// Ends the recording. Afterwards the streams are usable again, also in case of an error.
pub(super) fn end(gpu: &Arc<Gpu>, memory: Arc<Arena>) -> std::result::Result<Graph, DriverError> {
    // SAFETY: the stream is alive; the returned graph is destroyed once, here or by `Graph`.
    unsafe {
        let joined = join_peers(gpu);
        let ended = result::stream::end_capture(gpu.compute.cu_stream());
        *gpu.before_recording() = None;
        let graph = ended?;
        let made = joined.and_then(|()| result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)));
        match made {
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
        let launch = || {
            gpu.context.bind_to_thread()?;
            // Collectives have one order, those of the recording and others.
            if let Some(peers) = &gpu.peers {
                gpu.compute.join(&peers.stream)?;
            }
            // SAFETY: graph and stream are alive, and so is the memory used by the launches.
            unsafe { result::graph::launch(self.executable, gpu.compute.cu_stream())? };
            gpu.peers.as_ref().map_or(Ok(()), |peers| peers.stream.join(&gpu.compute))
        };
        launch().map_err(|e| gpu.error("replaying a recorded step", e))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.context.bind_to_thread().is_ok() {
            // The last replay may still run. Errors are ignored: a device that fails here also fails in a call that
            // reports it.
            let _ = self.gpu.finish();
            // SAFETY: `end` created both, and no replay can follow.
            unsafe {
                let _ = result::graph::exec_destroy(self.executable);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}
