//! What an engine computes on, and how.

use super::Engine;
use crate::backend::cpu::Isa;
use crate::backend::cuda::copy_bandwidth_of;
use crate::error::Result;
use crate::numerics;

impl Engine {
    /// The GPU in use: its name. `None`: the CPU computes.
    #[must_use]
    pub fn gpu(&self) -> Option<&str> {
        self.inner.model.device().map(|model| model.device.name.as_str())
    }

    /// Whether activations are rounded to one bf16 number where prompts are read.
    #[must_use]
    pub fn rounds_activations(&self) -> bool {
        self.inner.model.activations() == numerics::Activations::Bits8
    }

    /// Bytes a second that a copy within the GPU's memory moves, read and written bytes counted; `None` without a GPU.
    ///
    /// # Errors
    /// (inner) Too little memory beside the engine's.
    #[must_use]
    pub fn gpu_bandwidth(&self, repeats: usize) -> Option<Result<f64>> {
        self.inner.model.device().map(|model| copy_bandwidth_of(&model.device, repeats))
    }

    /// The instruction set in use on the CPU.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.inner.model.cpu.isa
    }
}
