//! Indexes under construction: what has left the window, on its way to a cold segment.
//!
//! On the CPU a build reads the pages themselves. From a GPU they are read first, some in each step so that no step waits for
//! all of them, and lie on the host in the KV format until the index is there: they count as this sequence's, and so does
//! what the index will hold at least.

use std::ops::Range;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};

use ann_index::IndexParams;

use super::device::DeviceRun;
use super::sequence::SequenceKv;
use crate::attention::cold::{Segment, SegmentRows, SegmentSource};
use crate::config::AttentionConfig;
use crate::error::{EngineError, Result};
use crate::model::transformer::Transformer;
use crate::unwind::guarded;

/// Tokens that leave the window are indexed in batches of at least this many. Until then they are
/// attended exactly.
const FLUSH: usize = 256;
/// A new segment absorbs the ones before it that are smaller than this many times its own size, so
/// that a long answer leaves few segments and each token is indexed a logarithmic number of times.
const ABSORB: usize = 4;
/// Tokens that are read from a GPU between two steps.
const READ_AT_ONCE: usize = 2048;

/// What becomes of tokens that have left the window.
#[derive(Default)]
pub(super) enum Building {
    /// None of them is on its way.
    #[default]
    Idle,
    /// They are read from a GPU.
    Reading(Reading),
    /// Their index is built by other threads, or waits for that.
    Built(Built),
}

/// Tokens of a GPU's pages, as far as they are read.
pub(super) struct Reading {
    tokens: Range<usize>,
    /// `[layers]` of keys and values, as [`SegmentRows::Read`] wants them.
    rows: Vec<(Vec<u8>, Vec<u8>)>,
    upto: usize,
    bytes: usize,
}

/// A segment that other threads build.
pub(super) struct Built {
    /// Behind a mutex only so that a sequence can be shared between threads.
    segment: Mutex<Receiver<Result<Segment>>>,
    /// Segments at the end of the cold ones which it replaces.
    absorbs: usize,
    /// Bytes on the host beside pages.
    bytes: usize,
    /// Held, as long as somebody waits.
    _wanted: Arc<()>,
}

impl Clone for Building {
    /// A fork starts its own index when it needs one.
    fn clone(&self) -> Self {
        Building::Idle
    }
}

impl Building {
    /// Bytes on the host beside pages.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Building::Idle => 0,
            Building::Reading(reading) => reading.bytes,
            Building::Built(built) => built.bytes,
        }
    }
}

/// Bytes of the host's memory that a context of so many tokens takes on a GPU under `retrieval`, at least: the copies of what
/// leaves the window, while their index is built, and the keys and values in the index.
pub(crate) fn cold_bytes(tokens: usize, config: &AttentionConfig, token_bytes: usize) -> u64 {
    let cold = (tokens + 1).saturating_sub(config.window).saturating_sub(config.sinks);
    if cold < FLUSH { 0 } else { 2 * cold as u64 * token_bytes as u64 }
}

impl SequenceKv {
    /// Whether an index is under construction.
    pub(crate) fn is_indexing(&self) -> bool {
        !matches!(self.building, Building::Idle)
    }

    /// Has what lies before `window_start` indexed, once it is enough. `room`: bytes of the host's memory that are free; where
    /// that is too little, it stays where it is for now.
    pub(super) fn settle_behind_indexes(
        &mut self,
        window_start: usize,
        config: &AttentionConfig,
        model: &Transformer,
        room: u64,
    ) -> Result<()> {
        self.take_built(config.sinks);
        let from = self.cold.last().map_or(config.sinks, |s| s.positions().end);
        if !self.is_indexing() && self.index_failures == 0 && window_start >= from + FLUSH {
            let tokens = from..window_start;
            match &self.device {
                None => self.start_build(tokens, SegmentRows::Dense(self.recent.clone()), 0, config, model),
                Some(_) => {
                    let bytes = 2 * tokens.len() * self.shape.token_bytes();
                    if bytes as u64 <= room {
                        self.building = Building::Reading(Reading::new(tokens, self.shape.layers, bytes));
                    }
                }
            }
        }
        if let (Building::Reading(reading), Some(kv)) = (&mut self.building, &self.device)
            && reading.go_on(&kv.recent)?
            && let Building::Reading(read) = std::mem::take(&mut self.building)
        {
            self.start_build(read.tokens, SegmentRows::Read(read.rows), read.bytes, config, model);
        }
        Ok(())
    }

    /// `bytes`: on the host beside pages, while it is built.
    fn start_build(
        &mut self,
        tokens: Range<usize>,
        dense: SegmentRows,
        bytes: usize,
        config: &AttentionConfig,
        model: &Transformer,
    ) {
        let mut absorbs = 0;
        let mut size = tokens.len();
        for segment in self.cold.iter().rev() {
            if segment.positions().len() >= ABSORB * size {
                break;
            }
            size += segment.positions().len();
            absorbs += 1;
        }
        let source = SegmentSource {
            shape: self.shape,
            absorbed: self.cold[self.cold.len() - absorbs..].to_vec(),
            dense,
            tokens,
            params: IndexParams { kind: config.index, ..IndexParams::default() },
            make: model.make_index,
        };
        let (send, segment) = channel();
        let wanted = Arc::new(());
        let alive = Arc::downgrade(&wanted);
        let job = move || {
            // Nobody waits any more when the sequence has ended: then it goes no further, and its result is dropped.
            let wanted = || alive.strong_count() > 0;
            let _ = send.send(guarded("building an index", || source.build(&wanted)));
        };
        match model.cpu.cores.build(job) {
            Ok(()) => {
                let segment = Mutex::new(segment);
                self.building = Building::Built(Built { segment, absorbs, bytes, _wanted: wanted });
            }
            Err(error) => self.not_built(&error),
        }
    }

    /// Takes a finished segment over.
    fn take_built(&mut self, sinks: usize) {
        let Building::Built(built) = &mut self.building else { return };
        let segment = match built.segment.get_mut().unwrap_or_else(PoisonError::into_inner).try_recv() {
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => {
                Err(EngineError::Internal("the thread that built a key index ended without a result".into()))
            }
            Ok(segment) => segment,
        };
        let absorbs = built.absorbs;
        self.building = Building::Idle;
        match segment {
            Ok(segment) => self.install(segment, absorbs, sinks),
            Err(error) => self.not_built(&error),
        }
    }

    fn install(&mut self, segment: Segment, absorbs: usize, sinks: usize) {
        self.split_sinks(sinks);
        self.cold.truncate(self.cold.len() - absorbs);
        self.index_seconds += segment.build_seconds();
        let end = segment.positions().end;
        self.cold.push(Arc::new(segment));
        self.drop_before(end);
    }

    fn not_built(&mut self, error: &EngineError) {
        tracing::error!(%error, "an index could not be built; what has left the window is attended exactly");
        self.index_failures += 1;
    }

    /// Settles until nothing is under construction.
    #[cfg(test)]
    pub(crate) fn settle_and_wait(&mut self, config: &AttentionConfig, model: &Transformer) {
        self.settle(config, model, u64::MAX).unwrap();
        while self.is_indexing() {
            std::thread::yield_now();
            self.settle(config, model, u64::MAX).unwrap();
        }
    }
}

impl Reading {
    fn new(tokens: Range<usize>, layers: usize, bytes: usize) -> Reading {
        let row = bytes / 2 / layers / 2;
        let rows = (0..layers).map(|_| (Vec::with_capacity(row), Vec::with_capacity(row))).collect();
        Reading { upto: tokens.start, tokens, rows, bytes }
    }

    /// Reads some more of the tokens; whether all are read now.
    fn go_on(&mut self, run: &DeviceRun) -> Result<bool> {
        let end = self.tokens.end.min(self.upto + READ_AT_ONCE);
        run.read(self.upto..end, &mut self.rows)?;
        self.upto = end;
        Ok(end == self.tokens.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_on_the_host_are_counted_where_something_leaves_the_window() {
        let config = AttentionConfig { window: 100, sinks: 4, ..AttentionConfig::default() };
        assert_eq!(cold_bytes(0, &config, 10), 0);
        assert_eq!(cold_bytes(103 + 255, &config, 10), 0);
        assert_eq!(cold_bytes(103 + 256, &config, 10), 2 * 256 * 10);
        assert_eq!(cold_bytes(131_072, &config, 131_072), 2 * (131_073 - 104) * 131_072);
    }
}
