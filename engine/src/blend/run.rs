//! Executes a [`BlendPlan`], layer by layer.
//!
//! Rows that are computed may lie anywhere in the context. Each sees exactly the tokens up to its own
//! *position*: attention masks by position, not by row.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use rayon::prelude::*;

use super::plan::{BlendPlan, Span, Treatment};
use super::select::most_deviating;
use super::stream::{Stream, write_cached};
use crate::chunk::{ChunkLayer, ChunkSource, PromptChunk, read_layer};
use crate::config::BlendConfig;
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Rows, Transformer};
use crate::request::PrefillStats;

/// Rows computed at a time, which bounds the memory of activations.
const ROWS: usize = 1024;

/// A context's KV and how it came about (times are the caller's to fill in).
pub(crate) struct Blended {
    pub(crate) kv: SequenceKv,
    pub(crate) stats: PrefillStats,
}

/// One layer's cached rows, one entry per cached span; or the chunk whose source failed.
type LoadedLayer = std::result::Result<Vec<ChunkLayer>, (usize, EngineError)>;

/// Computes the KV of `prefix` and `chunks`. A chunk whose source fails is computed instead.
///
/// # Errors
/// [`EngineError::Cancelled`] once `cancelled` says so.
pub(crate) fn blend(
    model: &Transformer,
    prefix: &[u32],
    chunks: &[PromptChunk],
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> Result<Blended> {
    blend_behind(model, &model.new_kv(), prefix, chunks, config, cancelled)
}

/// As [`blend`], where `start` holds the KV of the first tokens of `prefix`; they count neither as reused nor as recomputed.
pub(crate) fn blend_behind(
    model: &Transformer,
    start: &SequenceKv,
    prefix: &[u32],
    chunks: &[PromptChunk],
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> Result<Blended> {
    let mut failed = Vec::new();
    loop {
        let plan = BlendPlan::new(prefix, chunks, config, &failed);
        match attempt(model, start, &plan, chunks, cancelled) {
            Ok(mut blended) => {
                blended.stats.failed_chunks = failed.len();
                return Ok(blended);
            }
            Err(Attempt::Failed(error)) => return Err(error),
            Err(Attempt::ChunkLost(chunk, error)) => {
                tracing::warn!(chunk, %error, "a cached chunk could not be read; it is computed instead");
                failed.push(chunk);
            }
        }
    }
}

enum Attempt {
    ChunkLost(usize, EngineError),
    Failed(EngineError),
}

impl From<EngineError> for Attempt {
    fn from(error: EngineError) -> Self {
        Attempt::Failed(error)
    }
}

fn attempt(
    model: &Transformer,
    start: &SequenceKv,
    plan: &BlendPlan,
    chunks: &[PromptChunk],
    cancelled: &dyn Fn() -> bool,
) -> std::result::Result<Blended, Attempt> {
    let spans = plan.cached_spans();
    // One layer is read while the one before is computed.
    std::thread::scope(|scope| {
        let (send, loaded) = sync_channel::<LoadedLayer>(1);
        let spans = &spans;
        let read = move || {
            for layer in 0..model.spec.layers {
                let rows = load_layer(model, spans, chunks, layer);
                let lost = rows.is_err();
                // The receiver is gone when the blend was cancelled.
                if send.send(rows).is_err() || lost {
                    return;
                }
            }
        };
        let none = |error| EngineError::Internal(format!("the system gives no thread to read chunks with: {error}"));
        std::thread::Builder::new().name("quire-read".into()).spawn_scoped(scope, read).map_err(none)?;
        Run::new(model, start, plan, spans, loaded)?.layers(cancelled)
    })
}

/// Reads one layer of all cached spans, several at a time: each waits for a disk, or checks and copies what it was given.
fn load_layer(model: &Transformer, spans: &[Span], chunks: &[PromptChunk], layer: usize) -> LoadedLayer {
    let sources = spans.iter().filter_map(|span| {
        let chunk = span.chunk?;
        Some((chunk, chunks[chunk].source.as_ref()?, span.positions.len()))
    });
    let sources: Vec<_> = sources.collect();
    let read = |&(chunk, source, tokens): &(usize, &Arc<dyn ChunkSource>, usize)| {
        read_layer(source.as_ref(), &model.shape, tokens, layer).map_err(|error| (chunk, error))
    };
    model.cpu.cores.read(|| sources.par_iter().map(read).collect())
}

struct Run<'a> {
    model: &'a Transformer,
    plan: &'a BlendPlan,
    spans: &'a [Span],
    /// Angles of each cached span's positions.
    span_rows: Vec<Rows>,
    loaded: Receiver<LoadedLayer>,
    /// Tokens whose KV was there.
    held: usize,
    kv: SequenceKv,
    /// The rows that are computed.
    active: Stream<'a>,
    deviation: Option<f32>,
}

impl<'a> Run<'a> {
    fn new(
        model: &'a Transformer,
        start: &SequenceKv,
        plan: &'a BlendPlan,
        spans: &'a [Span],
        loaded: Receiver<LoadedLayer>,
    ) -> Result<Run<'a>> {
        // Without a check layer, cached tokens are never computed.
        let computed: &[Treatment] = match plan.check {
            Some(_) => &[Treatment::Fresh, Treatment::Cached],
            None => &[Treatment::Fresh],
        };
        let mut positions = plan.positions(computed);
        positions.retain(|position| *position >= start.len());
        let tokens: Vec<u32> = positions.iter().map(|p| plan.tokens[*p]).collect();
        let mut kv = start.clone();
        kv.extend_to(plan.tokens.len())?;
        Ok(Run {
            model,
            plan,
            spans,
            span_rows: spans.iter().map(|s| model.rows(s.positions.clone().collect())).collect(),
            loaded,
            held: start.len(),
            kv,
            active: Stream::new(model, positions, &tokens)?,
            deviation: None,
        })
    }

    fn layers(mut self, cancelled: &dyn Fn() -> bool) -> std::result::Result<Blended, Attempt> {
        for layer in 0..self.model.spec.layers {
            let cached = self.next_layer(cancelled)?.map_err(|(chunk, error)| Attempt::ChunkLost(chunk, error))?;
            if let Some((check, ratio)) = self.plan.check
                && check == layer
            {
                self.select(layer, ratio, &cached)?;
            }
            self.write_cached(layer, &cached)?;
            self.compute(layer, cancelled)?;
        }
        let recomputed = self.active.len();
        let stats = PrefillStats {
            prompt_tokens: self.plan.tokens.len(),
            reused_tokens: self.plan.tokens.len() - self.held - recomputed,
            recomputed_tokens: recomputed,
            blend_deviation: self.deviation,
            ..PrefillStats::default()
        };
        Ok(Blended { kv: self.kv, stats })
    }

    /// Waits for a layer's cached rows, as long as somebody wants them.
    fn next_layer(&self, cancelled: &dyn Fn() -> bool) -> Result<LoadedLayer> {
        const LOOK: Duration = Duration::from_millis(50);
        loop {
            match self.loaded.recv_timeout(LOOK) {
                Ok(layer) => return Ok(layer),
                Err(RecvTimeoutError::Timeout) if cancelled() => return Err(EngineError::Cancelled),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(EngineError::Internal("the thread that reads cached chunks ended early".into()));
                }
            }
        }
    }

    /// Writes what stays cached. Rows that are computed overwrite theirs afterwards.
    fn write_cached(&mut self, layer: usize, cached: &[ChunkLayer]) -> Result<()> {
        let checked = self.plan.check.is_none_or(|(check, _)| layer >= check);
        for ((span, rows), cached) in self.spans.iter().zip(&self.span_rows).zip(cached) {
            if checked || span.treatment == Treatment::Exact {
                write_cached(self.model, &mut self.kv, layer, rows, cached)?;
            }
        }
        Ok(())
    }

    /// Narrows the active rows to the fresh ones and the most deviating of the cached ones.
    fn select(&mut self, layer: usize, ratio: f32, cached: &[ChunkLayer]) -> Result<()> {
        let width = self.model.shape.width();
        let mut candidates = Vec::new();
        let mut deviation = Vec::new();
        let mut relative = 0.0;
        for block in blocks(self.model, self.active.len()) {
            let (fresh_keys, fresh_values) = self.active.keys_and_values(layer, block.clone(), &self.kv)?;
            for i in 0..block.len() {
                let position = self.active.position(block.start + i);
                let Some((keys, values)) = self.cached_row(position, cached) else { continue };
                let row = i * width..(i + 1) * width;
                let (k, size_k) = distance(&fresh_keys[row.clone()], &keys);
                let (v, size_v) = distance(&fresh_values[row], &values);
                candidates.push(block.start + i);
                deviation.push(k + v);
                relative += (k + v) / (size_k + size_v).max(f32::MIN_POSITIVE);
            }
        }
        self.deviation = Some(relative / candidates.len().max(1) as f32);
        let chosen = most_deviating(&deviation, ratio);
        let mut keep = vec![true; self.active.len()];
        candidates.iter().for_each(|c| keep[*c] = false);
        chosen.iter().for_each(|c| keep[candidates[*c]] = true);
        let kept: Vec<usize> = (0..keep.len()).filter(|i| keep[*i]).collect();
        self.active.keep(&kept)
    }

    /// The cached keys and values of a position whose span is `Cached`.
    fn cached_row(&self, position: usize, cached: &[ChunkLayer]) -> Option<(Vec<f32>, Vec<f32>)> {
        let after = self.spans.partition_point(|s| s.positions.end <= position);
        let span = self.spans.get(after)?;
        if !span.positions.contains(&position) || span.treatment != Treatment::Cached {
            return None;
        }
        let (dtype, width) = (self.model.shape.dtype, self.model.shape.width());
        let at = (position - span.positions.start) * width * dtype.size();
        let row = at..at + width * dtype.size();
        Some((dtype.decode(&cached[after].keys[row.clone()]), dtype.decode(&cached[after].values[row])))
    }

    /// Runs the layer for the active rows, in order of position: a row needs those before it.
    fn compute(&mut self, layer: usize, cancelled: &dyn Fn() -> bool) -> Result<()> {
        for block in blocks(self.model, self.active.len()) {
            if cancelled() {
                return Err(EngineError::Cancelled);
            }
            self.active.compute(layer, block, &mut self.kv)?;
        }
        Ok(())
    }
}

fn blocks(model: &Transformer, rows: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let size = ROWS.min(model.most_rows());
    (0..rows).step_by(size).map(move |start| start..rows.min(start + size))
}

/// Squared distance, and the squared size of `fresh`.
fn distance(fresh: &[f32], cached: &[f32]) -> (f32, f32) {
    let squares = fresh.iter().zip(cached).map(|(f, c)| ((f - c) * (f - c), f * f));
    squares.fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1))
}
