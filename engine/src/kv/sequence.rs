//! A sequence's KV. Every token has one home: the sinks, the recent run, or a cold segment.

use std::ops::Range;
use std::sync::Arc;

use ann_index::SearchParams;

use super::KvShape;
use super::building::Building;
use super::dense::DenseKv;
use super::device::{DevicePool, DeviceRun};
use super::page::Page;
use crate::attention::AttentionState;
use crate::attention::cold::{ColdStats, Segment, attend_cold};
use crate::attention::dense::{Queries, attend};
use crate::backend::cpu::Cpu;
use crate::config::{AttentionConfig, Strategy};
use crate::error::Result;
use crate::model::transformer::Transformer;
use crate::scheduler::Bytes;

/// KV of one sequence, all layers.
#[derive(Clone)]
pub(crate) struct SequenceKv {
    pub(super) shape: KvShape,
    /// One per layer; `None` until tokens have left the recent run.
    sinks: Option<Vec<DenseKv>>,
    pub(super) recent: Vec<DenseKv>,
    /// Sinks and recent run of a sequence on a GPU, in place of the two above.
    pub(super) device: Option<DeviceKv>,
    /// Contiguous, between sinks and recent run; on the host.
    pub(super) cold: Vec<Arc<Segment>>,
    pub(super) building: Building,
    pub(super) index_seconds: f64,
    /// Indexes that could not be built. After the first, what leaves the window stays where it is, attended exactly.
    pub(super) index_failures: usize,
}

/// What a sequence has on a GPU.
#[derive(Clone)]
pub(crate) struct DeviceKv {
    pub(crate) recent: DeviceRun,
    /// `None` until tokens have left the recent run.
    pub(crate) sinks: Option<DeviceRun>,
}

impl SequenceKv {
    pub(crate) fn new(shape: KvShape) -> SequenceKv {
        SequenceKv {
            shape,
            sinks: None,
            recent: (0..shape.layers).map(|_| DenseKv::new(shape, 0)).collect(),
            device: None,
            cold: Vec::new(),
            building: Building::default(),
            index_seconds: 0.0,
            index_failures: 0,
        }
    }

    /// A sequence whose sinks and recent run live in `pool`.
    pub(crate) fn on_device(pool: &Arc<DevicePool>) -> SequenceKv {
        let device = Some(DeviceKv { recent: DeviceRun::new(pool), sinks: None });
        SequenceKv { recent: Vec::new(), device, ..SequenceKv::new(*pool.shape()) }
    }

    /// What lives on a GPU; `None` where the CPU attends.
    pub(crate) fn device(&self) -> Option<&DeviceKv> {
        self.device.as_ref()
    }

    /// Tokens so far, wherever they live.
    pub(crate) fn len(&self) -> usize {
        self.recent_positions().end
    }

    fn recent_positions(&self) -> Range<usize> {
        self.device.as_ref().map_or_else(|| self.recent[0].positions(), |kv| kv.recent.positions())
    }

    /// Bytes held, shared pages counted in full.
    pub(crate) fn bytes(&self) -> Bytes {
        let runs = self.recent.iter().chain(self.sinks.iter().flatten());
        let host = runs.map(DenseKv::page_count).sum::<usize>() * Page::bytes(&self.shape)
            + self.cold.iter().map(|s| s.bytes()).sum::<usize>()
            + self.building.bytes();
        let device = self.device.iter().flat_map(|kv| std::iter::once(&kv.recent).chain(&kv.sinks));
        let device = device.map(|run| run.page_count() * run.pool().page_bytes()).sum::<usize>();
        Bytes { device: device as u64, host: host as u64 }
    }

    /// Of these, bytes that nobody else holds.
    pub(crate) fn exclusive_bytes(&self) -> Bytes {
        let runs = self.recent.iter().chain(self.sinks.iter().flatten());
        let cold = self.cold.iter().filter(|segment| Arc::strong_count(segment) == 1);
        let host = runs.map(DenseKv::exclusive_pages).sum::<usize>() * Page::bytes(&self.shape)
            + cold.map(|segment| segment.bytes()).sum::<usize>()
            + self.building.bytes();
        let device = self.device.iter().flat_map(|kv| std::iter::once(&kv.recent).chain(&kv.sinks));
        let device = device.map(|run| run.exclusive_pages() * run.pool().page_bytes()).sum::<usize>();
        Bytes { device: device as u64, host: host as u64 }
    }

    pub(crate) fn index_seconds(&self) -> f64 {
        self.index_seconds
    }

    /// Indexes that could not be built.
    pub(crate) fn index_failures(&self) -> usize {
        self.index_failures
    }

    /// Makes room for tokens up to `end` in all layers.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] when a GPU's pages are used up.
    pub(crate) fn extend_to(&mut self, end: usize) -> Result<()> {
        self.recent.iter_mut().for_each(|run| run.extend_to(end));
        self.device.as_mut().map_or(Ok(()), |kv| kv.recent.extend_to(end))
    }

    /// Forgets the tokens from `end` on, none of which has left the recent run. Their pages stay, as room for others.
    pub(crate) fn truncate(&mut self, end: usize) {
        self.recent.iter_mut().for_each(|run| run.truncate(end));
        self.device.iter_mut().for_each(|kv| kv.recent.truncate(end));
    }

    /// A layer of the recent run.
    pub(crate) fn recent(&self, layer: usize) -> &DenseKv {
        &self.recent[layer]
    }

    /// The run that new tokens are written to.
    pub(crate) fn recent_mut(&mut self, layer: usize) -> &mut DenseKv {
        &mut self.recent[layer]
    }

    /// Keys (rotated) and values of one head, row-major, for positions in the recent run.
    #[cfg(test)]
    pub(crate) fn rows(&self, layer: usize, head: usize, range: Range<usize>) -> (Vec<f32>, Vec<f32>) {
        self.recent[layer].rows(head, range)
    }

    /// Exact attention over all tokens of a sequence from which none has left the recent run.
    pub(crate) fn attend_exact(&self, cpu: &Cpu, layer: usize, queries: &Queries<'_>) -> AttentionState {
        debug_assert!(self.sinks.is_none(), "tokens have left the dense KV");
        attend(cpu, &self.recent[layer], queries)
    }

    /// Attention under the strategy of `config`. Queries lie at the sequence's end.
    pub(crate) fn attend(
        &self,
        cpu: &Cpu,
        layer: usize,
        queries: &Queries<'_>,
        config: &AttentionConfig,
        stats: &mut ColdStats,
    ) -> Result<AttentionState> {
        self.count_unindexed(queries, config, stats);
        let Some(sinks) = &self.sinks else { return Ok(attend(cpu, &self.recent[layer], queries)) };
        let window = match config.strategy {
            Strategy::Window => Some(config.window),
            _ => queries.window,
        };
        let mut state = attend(cpu, &self.recent[layer], &Queries { window, ..*queries });
        state.merge(&attend(cpu, &sinks[layer], queries));
        if self.has_cold() {
            state.merge(&self.attend_cold(cpu, layer, queries, config, stats)?);
        }
        Ok(state)
    }

    pub(crate) fn has_cold(&self) -> bool {
        !self.cold.is_empty()
    }

    /// Attention over the cold segments.
    pub(crate) fn attend_cold(
        &self,
        cpu: &Cpu,
        layer: usize,
        queries: &Queries<'_>,
        config: &AttentionConfig,
        stats: &mut ColdStats,
    ) -> Result<AttentionState> {
        let params = SearchParams { k: config.k, ef: config.ef, ..SearchParams::default() };
        let (state, seen) = attend_cold(cpu, &self.cold, layer, self.shape.kv_heads, queries, &params)?;
        *stats += seen;
        Ok(state)
    }

    /// Counts the keys that have left the window and wait for their index: attended exactly, so all of them are read.
    pub(crate) fn count_unindexed(&self, queries: &Queries<'_>, config: &AttentionConfig, stats: &mut ColdStats) {
        if config.strategy != Strategy::Retrieval {
            return;
        }
        let first = self.recent_positions().start.max(config.sinks);
        let waiting = |position: &usize| (position + 1).saturating_sub(config.window).saturating_sub(first);
        let keys = (queries.positions.iter().map(waiting).sum::<usize>() * queries.heads) as u64;
        *stats += ColdStats { cold_keys: keys, keys_scored: keys, keys_attended: keys };
    }

    /// Moves what has left the window to its place under the strategy. Called between steps. An index that could not be built
    /// is no error: its tokens are attended exactly. `room`: bytes of the host's memory that an index may take.
    pub(crate) fn settle(&mut self, config: &AttentionConfig, model: &Transformer, room: u64) -> Result<()> {
        // The next token sees itself and `window - 1` tokens before it.
        let window_start = (self.len() + 1).saturating_sub(config.window);
        match config.strategy {
            Strategy::Full => Ok(()),
            Strategy::Window => {
                if window_start > config.sinks {
                    self.split_sinks(config.sinks);
                    self.drop_before(window_start);
                }
                Ok(())
            }
            Strategy::Retrieval => self.settle_behind_indexes(window_start, config, model, room),
        }
    }

    /// Forgets the recent run's tokens before `start`.
    pub(super) fn drop_before(&mut self, start: usize) {
        self.recent.iter_mut().for_each(|run| run.drop_before(start));
        self.device.iter_mut().for_each(|kv| kv.recent.drop_before(start));
    }

    pub(super) fn split_sinks(&mut self, sinks: usize) {
        if let Some(kv) = self.device.as_mut().filter(|kv| kv.sinks.is_none()) {
            kv.sinks = Some(kv.recent.head_copy(sinks));
            kv.recent.drop_before(sinks);
        }
        if self.device.is_none() && self.sinks.is_none() {
            self.sinks = Some(self.recent.iter().map(|run| run.head_copy(sinks)).collect());
            self.recent.iter_mut().for_each(|run| run.drop_before(sinks));
        }
    }
}
