//! Launching kernels: arguments, shapes, and the overlap of one kernel's start with its predecessor's end.

use cudarc::driver::sys;

use super::device::Device;
use super::module::Kernel;
use crate::error::{EngineError, Result};

/// Most arguments of a kernel.
const ARGUMENTS: usize = 32;

/// Grid, block and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) grid: (usize, usize),
    pub(crate) block: usize,
    pub(crate) shared: usize,
    /// The kernel waits for its predecessor by itself (`griddepcontrol`), so that it may start before that one's end.
    pub(crate) early: bool,
}

impl Shape {
    pub(crate) fn new(grid: usize, block: usize) -> Shape {
        Shape { grid: (grid, 1), block, shared: 0, early: true }
    }

    /// Whether the grid has no block.
    fn is_empty(&self) -> bool {
        self.grid.0 == 0 || self.grid.1 == 0
    }
}

/// Arguments of a kernel, in its order. Each takes eight bytes here, of which the kernel reads as many as its type has.
pub(crate) struct Arguments {
    words: [u64; ARGUMENTS],
    count: usize,
}

/// Something that can be an argument: an address, or a number.
pub(crate) trait Argument {
    fn word(self) -> u64;
}

impl Argument for u64 {
    fn word(self) -> u64 {
        self
    }
}
impl Argument for i32 {
    fn word(self) -> u64 {
        u64::from(self as u32)
    }
}
impl Argument for usize {
    /// Sizes are 32-bit integers in all kernels, as their contract says.
    fn word(self) -> u64 {
        debug_assert!(i32::try_from(self).is_ok());
        self as u64
    }
}
impl Argument for f32 {
    fn word(self) -> u64 {
        u64::from(self.to_bits())
    }
}
impl Argument for &super::device::Memory {
    fn word(self) -> u64 {
        self.address()
    }
}
/// `None` is the null pointer.
impl Argument for Option<&super::device::Memory> {
    fn word(self) -> u64 {
        self.map_or(0, super::device::Memory::address)
    }
}

impl Arguments {
    pub(crate) fn new() -> Arguments {
        Arguments { words: [0; ARGUMENTS], count: 0 }
    }

    pub(crate) fn with(mut self, argument: impl Argument) -> Arguments {
        self.words[self.count] = argument.word();
        self.count += 1;
        self
    }
}

/// The arguments of a launch, in the kernel's order.
macro_rules! arguments {
    ($($argument:expr),* $(,)?) => { $crate::backend::cuda::launch::Arguments::new()$(.with($argument))* };
}
pub(crate) use arguments;

impl Device {
    /// Puts a launch on the stream of the kernels; without blocks there is nothing to do, which CUDA would call an error. Whether memory
    /// suffices for the arguments is the caller's to know.
    pub(crate) fn launch(&self, kernel: Kernel, shape: Shape, arguments: Arguments) -> Result<()> {
        self.launch_on(self.stream(), kernel, shape, arguments)
    }

    /// Puts a launch on any stream.
    pub(crate) fn launch_on(
        &self,
        stream: sys::CUstream,
        kernel: Kernel,
        shape: Shape,
        mut arguments: Arguments,
    ) -> Result<()> {
        if shape.is_empty() {
            return Ok(());
        }
        let mut pointers: [*mut std::ffi::c_void; ARGUMENTS] = [std::ptr::null_mut(); ARGUMENTS];
        for (pointer, word) in pointers.iter_mut().zip(arguments.words.iter_mut()) {
            *pointer = std::ptr::from_mut(word).cast();
        }
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: shape.grid.0 as u32,
            gridDimY: shape.grid.1 as u32,
            gridDimZ: 1,
            blockDimX: shape.block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared as u32,
            hStream: stream,
            attrs: &mut early,
            numAttrs: u32::from(shape.early && self.capability.0 >= 9),
        };
        // SAFETY: the function is loaded, and the pointers lead to as many words as the kernel has parameters; callers pass
        // addresses of allocations that outlive the launch, as freeing waits for the stream.
        unsafe { sys::cuLaunchKernelEx(&config, kernel.function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|error| EngineError::Device {
                action: "start a kernel",
                reason: format!("{}, {shape:?}: {error}", kernel.file),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_without_blocks_in_either_direction_is_empty() {
        let grid = |grid| Shape { grid, ..Shape::new(1, 256) };
        assert!(grid((0, 1)).is_empty() && grid((7, 0)).is_empty() && grid((0, 0)).is_empty());
        assert!(!grid((1, 1)).is_empty());
    }
}
