//! The engine on an NVIDIA GPU.
//!
//! `probe` finds the libraries, `device` holds context, stream and memory, `module` compiles and loads the kernels of
//! `engine/kernels`, `launch` starts them, `ops` knows each kernel's arguments and shape, `gemm` multiplies matrices,
//! `weights` brings a model over, `batch` lays out a step's inputs, `forward` is the pass over the layers, `graph` replays
//! decode steps, `host_work` does what strategies leave to the CPU, `model` ties them together.

mod batch;
mod device;
mod forward;
mod gemm;
mod graph;
mod host_work;
mod launch;
mod model;
mod module;
mod ops;
#[cfg(test)]
mod parity;
mod probe;
mod stream;
mod weights;

pub(crate) use device::{Device, Memory};
pub use model::CudaConfig;
pub(crate) use model::{CudaModel, Limits, Next};
pub use probe::{Library, libraries};
