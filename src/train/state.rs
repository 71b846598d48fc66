//! The step state: values that change from step to step, written by the host and read by kernels.

use crate::backend::{DType, Kernels, Role, Slot, Stream};
use crate::error::Result;
use crate::tensor::Tensor;

/// The host's copy of the step state and the device tensor it is sent to.
pub struct StepState {
    host: [f64; Slot::LEN],
    device: Tensor,
    dtype: DType,
}

impl StepState {
    /// A state of zeros; `dtype` is the accumulator type.
    pub fn new(dev: &dyn Kernels, dtype: DType) -> Result<Self> {
        let device = Tensor::zeros(dev, Role::Input, dtype, [Slot::LEN])?;
        Ok(StepState { host: [0.0; Slot::LEN], device, dtype })
    }

    /// Sets a slot on the host; [`StepState::send`] makes it visible to kernels.
    pub fn set(&mut self, slot: Slot, value: f64) {
        self.host[slot.index()] = value;
    }

    /// The host's value of a slot.
    pub fn get(&self, slot: Slot) -> f64 {
        self.host[slot.index()]
    }

    /// Copies the whole state to the device.
    pub fn send(&self, dev: &dyn Kernels) -> Result<()> {
        match self.dtype {
            DType::F64 => dev.copy_in(Stream::COMPUTE, bytemuck::cast_slice(&self.host), self.device.out()),
            _ => {
                let v = self.host.map(|x| x as f32);
                dev.copy_in(Stream::COMPUTE, bytemuck::cast_slice(&v), self.device.out())
            }
        }
    }

    /// The whole state on the device, `[Slot::LEN]`.
    pub fn tensor(&self) -> &Tensor {
        &self.device
    }

    /// One slot on the device, `[1]`.
    pub fn slot(&self, slot: Slot) -> Result<Tensor> {
        self.device.range(slot.index(), 1)
    }
}
