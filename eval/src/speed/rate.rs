//! How fast the device that the engine computes on reads memory: what floors of decoding are computed with.

use engine::Engine;

use super::membw::FloorRate;
use crate::error::Result;

/// A read rate and where it comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct ReadRate {
    /// In GB/s.
    pub(super) gb_s: f64,
    /// For the settings of records.
    pub(super) measured: &'static str,
}

/// The read rate of the engine's device for a step that reads `bytes`.
///
/// On the CPU: with the engine's number of threads, the higher one of a large buffer and of a buffer of just these
/// bytes, which caches may hold. The higher rate makes the stricter floor. On a GPU: a large copy within its memory.
pub(super) fn device_read_rate(engine: &Engine, bytes: u64, repeats: usize) -> Result<ReadRate> {
    if let Some(bandwidth) = engine.gpu_bandwidth(repeats) {
        return Ok(ReadRate {
            gb_s: bandwidth? / 1e9,
            measured: "copied within the GPU's memory, read and written bytes counted",
        });
    }
    let rate = FloorRate::measure(engine.threads(), bytes, repeats)?;
    Ok(ReadRate { gb_s: rate.strict(), measured: "read by the CPU, the higher of a large and of a floor-sized buffer" })
}
