//! Cached layers on their way from their sources: read by a thread of its own, one layer ahead of whoever uses them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use rayon::prelude::*;

use super::plan::Span;
use crate::backend::cpu::Isa;
use crate::chunk::PromptChunk;
use crate::error::{EngineError, Result};
use crate::kv::KvShape;
use crate::model::transformer::Transformer;
use crate::tiers::{CachedLayer, ChunkReader, ChunkTiers};

/// One layer's cached rows, one entry per cached span; or the chunk whose source failed.
type LoadedLayer = std::result::Result<Vec<CachedLayer>, Lost>;

/// Why a layer is not there.
pub(super) enum Lost {
    /// The source of this chunk has failed.
    Chunk(usize, EngineError),
    /// Something else has.
    Reading(EngineError),
}

impl From<EngineError> for Lost {
    fn from(error: EngineError) -> Self {
        Lost::Reading(error)
    }
}

/// The layers of some spans in ascending order. Dropping it ends the reading.
pub(super) struct Reading {
    /// `None`: nothing is cached, and every layer is there.
    layers: Option<Receiver<LoadedLayer>>,
    /// The next layer, once it has arrived.
    next: Option<LoadedLayer>,
    /// One a span.
    readers: Arc<[ChunkReader]>,
}

impl Reading {
    /// Begins to read the layers of `spans`, which are of `chunks`, from the nearest tier.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn begin(
        model: &Transformer,
        spans: &[Span],
        chunks: &[PromptChunk],
        tiers: Option<&ChunkTiers>,
    ) -> Result<Reading> {
        let sources = spans.iter().filter_map(|span| chunks[span.chunk?].source.as_ref());
        let reader = |source| tiers.map_or_else(|| ChunkReader::of(source), |tiers| tiers.reader(source));
        let readers: Arc<[ChunkReader]> = sources.map(reader).collect();
        if readers.is_empty() {
            return Ok(Reading { layers: None, next: None, readers });
        }
        let numbers: Vec<usize> = spans.iter().filter_map(|span| span.chunk).collect();
        let reading = Arc::clone(&readers);
        let (send, layers) = sync_channel::<LoadedLayer>(1);
        let (cores, isa, shape) = (Arc::clone(&model.cpu.cores), model.cpu.isa, model.shape);
        let read = move || {
            for layer in 0..shape.layers {
                let rows = cores.read(|| load_layer(isa, &shape, &numbers, &reading, layer));
                let lost = rows.is_err();
                // The receiver is gone when nobody wants it any more.
                if send.send(rows).is_err() || lost {
                    return;
                }
            }
        };
        let none = |error| EngineError::Internal(format!("the system gives no thread to read chunks with: {error}"));
        std::thread::Builder::new().name("quire-read".into()).spawn(read).map_err(none)?;
        Ok(Reading { layers: Some(layers), next: None, readers })
    }

    /// Where each span is read from.
    pub(super) fn readers(&self) -> &[ChunkReader] {
        &self.readers
    }

    /// Whether the next layer is there, or never will be.
    pub(super) fn arrived(&mut self) -> bool {
        let Some(layers) = self.layers.as_ref().filter(|_| self.next.is_none()) else { return true };
        match layers.try_recv() {
            Ok(layer) => self.next = Some(layer),
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => self.next = Some(ended()),
        }
        true
    }

    /// Waits for the next layer, so long at most. Whether it is there.
    pub(super) fn wait(&mut self, most: Duration) -> bool {
        let Some(layers) = self.layers.as_ref().filter(|_| self.next.is_none()) else { return true };
        match layers.recv_timeout(most) {
            Ok(layer) => self.next = Some(layer),
            Err(RecvTimeoutError::Timeout) => return false,
            Err(RecvTimeoutError::Disconnected) => self.next = Some(ended()),
        }
        true
    }

    /// The next layer, which has [arrived](Reading::arrived).
    pub(super) fn take(&mut self) -> LoadedLayer {
        if self.layers.is_none() {
            return Ok(Vec::new());
        }
        self.next.take().unwrap_or_else(ended)
    }
}

fn ended() -> LoadedLayer {
    Err(Lost::Reading(EngineError::Internal("the thread that reads cached chunks ended early".into())))
}

/// Reads one layer of all chunks, which have these numbers, several at a time: each waits for a disk, or checks and copies what it
/// was given.
fn load_layer(isa: Isa, shape: &KvShape, chunks: &[usize], readers: &[ChunkReader], layer: usize) -> LoadedLayer {
    let read = |(chunk, reader): (&usize, &ChunkReader)| {
        reader.layer(isa, shape, layer).map_err(|error| Lost::Chunk(*chunk, error))
    };
    chunks.par_iter().zip(readers).map(read).collect()
}
