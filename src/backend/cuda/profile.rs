//! The time of every launch on the compute stream, by events before and after it. Times are read from events that have
//! been reached, a few with every launch, so that neither the host nor the device waits for a measurement.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaEvent, DriverError, sys};

use super::arena::Gpu;
use crate::backend::{Cost, Profile};

type Result<T> = std::result::Result<T, DriverError>;

/// Launches that may wait for the device before each further one reads the times of earlier ones.
const WAITING: usize = 4096;

/// A launch whose time has not been read.
struct Launch {
    /// Kernel and implementation.
    name: (&'static str, &'static str),
    cost: Cost,
    start: CudaEvent,
    end: CudaEvent,
}

/// Measures launches.
#[derive(Default)]
pub(super) struct Profiler(Mutex<Measured>);

#[derive(Default)]
struct Measured {
    /// In the order of the stream.
    waiting: VecDeque<Launch>,
    /// The end of the last launch whose time has been read.
    last: Option<CudaEvent>,
    profile: Profile,
    /// Events that are in use no more.
    free: Vec<CudaEvent>,
}

impl Profiler {
    fn lock(&self) -> MutexGuard<'_, Measured> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event for the start of a launch, to be recorded immediately before it.
    pub(super) fn event(&self, gpu: &Gpu) -> Result<CudaEvent> {
        self.lock().event(gpu)
    }

    /// Adds the launch since `start` was recorded.
    pub(super) fn end(
        &self,
        gpu: &Gpu,
        start: CudaEvent,
        name: (&'static str, &'static str),
        cost: Cost,
    ) -> Result<()> {
        let mut all = self.lock();
        let end = all.event(gpu)?;
        end.record(&gpu.compute)?;
        all.waiting.push_back(Launch { name, cost, start, end });
        // Two for one, so that the rest shrinks, and none at once would take long.
        for _ in 0..2 {
            let reached = all.waiting.len() > WAITING && all.waiting[0].end.try_is_complete()?;
            if !reached || !all.read()? {
                break;
            }
        }
        Ok(())
    }

    /// The times since the last call. The device must have no work left.
    pub(super) fn take(&self) -> Result<Profile> {
        let mut all = self.lock();
        while all.read()? {}
        // What happens before the next launch is not a gap between two of them.
        let last = all.last.take();
        all.free.extend(last);
        Ok(std::mem::take(&mut all.profile))
    }
}

impl Measured {
    /// An event with a time.
    fn event(&mut self, gpu: &Gpu) -> Result<CudaEvent> {
        match self.free.pop() {
            Some(event) => Ok(event),
            None => gpu.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)),
        }
    }

    /// Adds the time of the first launch that waits, which the device has finished; false if there is none.
    fn read(&mut self) -> Result<bool> {
        let Some(Launch { name, cost, start, end }) = self.waiting.pop_front() else { return Ok(false) };
        let seconds = |from: &CudaEvent, to: &CudaEvent| from.elapsed_ms(to).map(|ms| f64::from(ms) * 1e-3);
        let idle = self.last.as_ref().map_or(Ok(0.0), |last| seconds(last, &start))?;
        self.profile.add(name, cost, seconds(&start, &end)?, idle);
        self.free.push(start);
        let last = self.last.replace(end);
        self.free.extend(last);
        Ok(true)
    }
}
