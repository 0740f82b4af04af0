//! Decoding as a CUDA graph: some three hundred launches replayed as one.
//!
//! A graph is captured for a number of sequences, rounded up to a few sizes; rows beyond the real ones are padding that every
//! kernel passes over. What changes from step to step (tokens, positions, pages) lies in arrays that are copied before the
//! replay, and kernels divide their work by what they find there.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cudarc::driver::{result, sys};

use super::batch::Batch;
use super::device::{Device, Event, Pinned, failed};
use super::model::{CudaModel, LOGIT_ROWS};
use crate::error::Result;
use crate::model::transformer::Piece;
use crate::unwind::guarded;

/// Numbers of sequences that graphs are captured for, up to the rows of a block of logits.
const SIZES: [usize; 12] = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64];

/// The least size of graph that holds so many sequences, where there is one.
pub(crate) fn rounded(sequences: usize) -> usize {
    SIZES.into_iter().find(|size| *size >= sequences).unwrap_or(sequences)
}

/// Captured graphs by number of rows, and the page-locked memory through which a step's arrays and choices pass.
pub(crate) struct Graphs {
    captured: HashMap<usize, Captured>,
    inputs: Pinned,
    /// As `sampling.chosen`.
    chosen: Pinned,
}

/// An executable graph, and the parts that its logits are in.
struct Captured {
    device: Arc<Device>,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
    parts: usize,
}

// SAFETY: handles; used by one thread at a time, behind a mutex.
unsafe impl Send for Captured {}

impl Graphs {
    /// `inputs`: integers of the largest batch.
    pub(crate) fn new(device: &Arc<Device>, inputs: usize) -> Result<Graphs> {
        let chosen = 3 * LOGIT_ROWS * size_of::<u32>();
        Ok(Graphs {
            captured: HashMap::new(),
            inputs: Pinned::new(device, inputs * size_of::<i32>())?,
            chosen: Pinned::new(device, chosen)?,
        })
    }

    /// What the last step has chosen; the stream must have been waited for.
    pub(crate) fn chosen(&self) -> &[u32] {
        bytemuck::cast_slice(self.chosen.bytes())
    }

    /// The size of graph for this many sequences; `None`: there is none so large.
    pub(crate) fn size(model: &CudaModel, sequences: usize) -> Option<usize> {
        let most = LOGIT_ROWS.min(model.workspace.tables / 2);
        SIZES.into_iter().find(|size| *size >= sequences).filter(|size| *size <= most)
    }

    /// A decode step of `size` rows, up to the chosen tokens. The first of a size runs launch by launch, which also makes the
    /// plans of its products, and is captured behind that.
    pub(crate) fn step(&mut self, model: &CudaModel, size: usize, pieces: &[Piece<'_>]) -> Result<usize> {
        let batch = model.lay_out(pieces, size);
        if model.head_done.load(Ordering::Relaxed) != 0 {
            // The last step's choices were never asked for, so that its arrays may still be on their way.
            model.device.synchronize()?;
        }
        batch.upload_through(&mut self.inputs, &model.workspace.inputs)?;
        let begun = tracing::enabled!(tracing::Level::TRACE).then(|| Event::record(&model.device)).transpose()?;
        let parts = match self.captured.get(&size) {
            Some(captured) => {
                captured.replay()?;
                captured.parts
            }
            None => {
                let parts = run(model, &batch)?;
                model.device.synchronize()?;
                let captured = Captured::capture(&model.device, || run(model, &batch))?;
                tracing::debug!(size, "a decode step was captured as a graph");
                self.captured.insert(size, captured);
                parts
            }
        };
        if let Some(begun) = begun {
            let ms = 1e3 * Event::record(&model.device)?.seconds_since(&begun)?;
            tracing::trace!(size, ms, "a decode step on the GPU");
        }
        model.sampling.chosen.read_later(0, self.chosen.bytes_mut())?;
        model.head_done.store(size << 8 | parts, Ordering::Relaxed);
        model.banned.store(batch.banned(), Ordering::Relaxed);
        Ok(pieces.len())
    }
}

/// The launches of a whole step; the parts that logits are in.
fn run(model: &CudaModel, batch: &Batch) -> Result<usize> {
    model.layers(batch, None)?;
    let parts = model.head(0, batch.rows)?;
    model.sampling.choose(model.last_logits(parts, batch.rows, batch.banned()))?;
    Ok(parts)
}

impl Captured {
    fn capture(device: &Arc<Device>, launches: impl FnOnce() -> Result<usize>) -> Result<Captured> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives; a capture that was begun is ended below, whatever happens between.
        unsafe { result::stream::begin_capture(device.stream(), mode) }
            .map_err(failed("begin the capture of a graph"))?;
        let launched = guarded("capturing a graph", launches);
        // SAFETY: a capture was begun on this stream.
        let graph = unsafe { result::stream::end_capture(device.stream()) }.map_err(failed("capture a graph"));
        let (parts, graph) = (launched?, graph?);
        // SAFETY: the graph was just captured.
        let executable = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        match executable {
            Ok(executable) => Ok(Captured { device: Arc::clone(device), graph, executable, parts }),
            Err(error) => {
                // SAFETY: captured above, destroyed once.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(failed("instantiate a graph")(error))
            }
        }
    }

    fn replay(&self) -> Result<()> {
        // SAFETY: the graph is instantiated, and all memory that it names lives as long as the model.
        unsafe { result::graph::launch(self.executable, self.device.stream()) }.map_err(failed("replay a graph"))
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        let _ = self.device.bind();
        // SAFETY: made by `capture`, destroyed once.
        unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::EngineError;

    #[test]
    #[ignore = "needs a GPU"]
    fn a_panic_while_a_graph_is_captured_ends_the_capture() {
        let device = Device::open(0, 1 << 24).unwrap();
        device.bind().unwrap();
        let memory = device.upload(&[1u32; 16], "a test").unwrap();
        let refused = Captured::capture(&device, || panic!("between two launches"));
        assert!(matches!(refused, Err(EngineError::Panicked { .. })), "{:?}", refused.err());
        let graph = Captured::capture(&device, || memory.fill(0).map(|()| 1)).unwrap();
        graph.replay().unwrap();
        let mut read = [1u32; 16];
        memory.read(0, &mut read).unwrap();
        assert_eq!(read, [0; 16]);
    }
}
