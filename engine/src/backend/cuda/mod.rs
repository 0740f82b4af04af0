//! The engine on an NVIDIA GPU.
//!
//! `probe` finds the libraries, `device` holds context, stream and memory, `copies` brings keys and values over beside the kernels, `module` compiles and loads the kernels of
//! `engine/kernels`, `launch` starts them, `ops` knows each kernel's arguments and shape, `gemm` multiplies matrices, `prefill` divides attention of many rows among multiprocessors,
//! `weights` brings a model over, `cached` brings cached rows to the pages, `repair` sees what a question attends and corrects cached rows, `batch` lays out a step's inputs, `sample` chooses tokens, `forward` is the pass over the layers, `graph` replays
//! decode steps, `host_work` does what strategies leave to the CPU, `model` ties them together.

mod batch;
mod bench;
mod bench_scattered;
mod cached;
mod copies;
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
mod prefill;
mod probe;
mod repair;
mod sample;
mod stream;
mod weights;

pub(crate) use batch::Batch;
pub(crate) use bench::copy_bandwidth_of;
pub use bench::{AttentionShape, copy_bandwidth, decode_attention};
pub use bench_scattered::{ScatteredAttention, scattered_attention};
pub(crate) use cached::{CachedSpan, CachedSpans};
pub(crate) use copies::Mark;
pub(crate) use device::{Device, Memory, Pinned};
pub use model::CudaConfig;
pub(crate) use model::{CudaModel, Limits, Next};
pub use probe::missing_libraries;
pub(crate) use repair::ShiftRows;

/// The GPU that these settings name, in words.
///
/// # Errors
/// [`EngineError::NoDevice`](crate::EngineError::NoDevice): a library or the GPU is missing.
pub fn find_gpu(config: &CudaConfig) -> crate::Result<String> {
    let device = Device::open(config.ordinal, config.memory_budget_bytes)?;
    let (major, minor) = device.capability;
    let gib = device.memory().0 as f64 / f64::from(1 << 30);
    Ok(format!(
        "{} (compute capability {major}.{minor}, {} multiprocessors), {gib:.1} GiB may be used",
        device.name, device.multiprocessors
    ))
}
