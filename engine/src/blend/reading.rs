//! Cached layers on their way from their sources: read by a thread of its own, one layer ahead of whoever uses them.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use rayon::prelude::*;

use super::plan::Span;
use crate::backend::cpu::Isa;
use crate::chunk::{ChunkLayer, ChunkSource, PromptChunk, read_layer};
use crate::error::{EngineError, Result};
use crate::kv::KvShape;
use crate::model::transformer::Transformer;

/// One layer's cached rows, one entry per cached span; or the chunk whose source failed.
type LoadedLayer = std::result::Result<Vec<ChunkLayer>, Lost>;

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
}

/// A span's chunk, its source and its tokens.
type Source = (usize, Arc<dyn ChunkSource>, usize);

impl Reading {
    /// Begins to read the layers of `spans`, which are of `chunks`.
    ///
    /// # Errors
    /// The system gives no thread.
    pub(super) fn begin(model: &Transformer, spans: &[Span], chunks: &[PromptChunk]) -> Result<Reading> {
        let sources = spans.iter().filter_map(|span| {
            let chunk = span.chunk?;
            Some((chunk, Arc::clone(chunks[chunk].source.as_ref()?), span.positions.len()))
        });
        let sources: Vec<Source> = sources.collect();
        if sources.is_empty() {
            return Ok(Reading { layers: None, next: None });
        }
        let (send, layers) = sync_channel::<LoadedLayer>(1);
        let (cores, isa, shape) = (Arc::clone(&model.cpu.cores), model.cpu.isa, model.shape);
        let read = move || {
            for layer in 0..shape.layers {
                let rows = cores.read(|| load_layer(isa, &shape, &sources, layer));
                let lost = rows.is_err();
                // The receiver is gone when nobody wants it any more.
                if send.send(rows).is_err() || lost {
                    return;
                }
            }
        };
        let none = |error| EngineError::Internal(format!("the system gives no thread to read chunks with: {error}"));
        std::thread::Builder::new().name("quire-read".into()).spawn(read).map_err(none)?;
        Ok(Reading { layers: Some(layers), next: None })
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

/// Reads one layer of all sources, several at a time: each waits for a disk, or checks and copies what it was given.
fn load_layer(isa: Isa, shape: &KvShape, sources: &[Source], layer: usize) -> LoadedLayer {
    let read = |(chunk, source, tokens): &Source| {
        read_layer(source.as_ref(), isa, shape, *tokens, layer).map_err(|error| Lost::Chunk(*chunk, error))
    };
    sources.par_iter().map(read).collect()
}
