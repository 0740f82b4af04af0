//! Executes a [`BlendPlan`], layer by layer.
//!
//! Rows that are computed may lie anywhere in the context. Each sees exactly the tokens up to its own
//! *position*: attention masks by position, not by row.
//!
//! Rules that know what to recompute beforehand, and `cacheblend`, which finds out on the way, go over the layers once, while
//! these are loaded. Those that ask the question go over them twice: with the question alone over everything as cached, then with
//! the tokens that it attends, whose keys and values then replace the cached ones.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use rayon::prelude::*;

use super::correct::Corrector;
use super::paid::{Paid, WATCHED, Watch};
use super::plan::{BlendPlan, Span, Treatment};
use super::select::{Budget, highest};
use super::stream::{Stream, write_cached};
use super::{answer, cacheblend, epic, gate, heads, question, random};
use crate::chunk::{ChunkLayer, ChunkSource, PromptChunk, read_layer};
use crate::config::{BlendConfig, BlendMode, Correction};
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Rows, Transformer};
use crate::request::{GateReport, PrefillStats};

/// Rows computed at a time, which bounds the memory of activations.
const ROWS: usize = 1024;

/// A context's KV and how it came about (times are the caller's to fill in).
pub(crate) struct Blended {
    pub(crate) kv: SequenceKv,
    pub(crate) stats: PrefillStats,
}

/// What is blended.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) prefix: &'a [u32],
    pub(crate) chunks: &'a [PromptChunk],
    /// What will be read behind it, for rules that go by the question; its KV is not kept. Empty: not known.
    pub(crate) suffix: &'a [u32],
}

impl<'a> Context<'a> {
    /// A context whose question is not known.
    pub(crate) fn unasked(prefix: &'a [u32], chunks: &'a [PromptChunk]) -> Context<'a> {
        Context { prefix, chunks, suffix: &[] }
    }
}

/// One layer's cached rows, one entry per cached span; or the chunk whose source failed.
type LoadedLayer = std::result::Result<Vec<ChunkLayer>, (usize, EngineError)>;

/// Computes the KV of `context`. A chunk whose source fails is computed instead.
///
/// # Errors
/// [`EngineError::Cancelled`] once `cancelled` says so.
pub(crate) fn blend(
    model: &Transformer,
    context: &Context<'_>,
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> Result<Blended> {
    blend_behind(model, &model.new_kv(), context, config, cancelled)
}

/// As [`blend`], where `start` holds the KV of the first tokens of the prefix; they count neither as reused nor as recomputed.
pub(crate) fn blend_behind(
    model: &Transformer,
    start: &SequenceKv,
    context: &Context<'_>,
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> Result<Blended> {
    let config = &resolved(config, context);
    let mut failed = Vec::new();
    loop {
        let plan = BlendPlan::new(context.prefix, context.chunks, config, &failed);
        match attempt(model, start, &plan, context, config, cancelled) {
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

/// The settings as they can be served: without a question, `cacheblend` stands in for the rules that go by it.
fn resolved(config: &BlendConfig, context: &Context<'_>) -> BlendConfig {
    if !config.mode.asks() || !context.suffix.is_empty() {
        return config.clone();
    }
    BlendConfig { mode: BlendMode::CacheBlend, mass: None, ..config.clone() }
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
    context: &Context<'_>,
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> std::result::Result<Blended, Attempt> {
    let spans = plan.cached_spans();
    // One layer is read while the one before is computed.
    std::thread::scope(|scope| {
        let (send, loaded) = sync_channel::<LoadedLayer>(1);
        let spans = &spans;
        let read = move || {
            for layer in 0..model.spec.layers {
                let rows = load_layer(model, spans, context.chunks, layer);
                let lost = rows.is_err();
                // The receiver is gone when the blend was cancelled.
                if send.send(rows).is_err() || lost {
                    return;
                }
            }
        };
        let none = |error| EngineError::Internal(format!("the system gives no thread to read chunks with: {error}"));
        std::thread::Builder::new().name("quire-read".into()).spawn_scoped(scope, read).map_err(none)?;
        Run::new(model, start, plan, spans, loaded, cancelled)?.follow(config, context.suffix)
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
        read_layer(source.as_ref(), model.cpu.isa, &model.shape, tokens, layer).map_err(|error| (chunk, error))
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
    cancelled: &'a dyn Fn() -> bool,
    /// Layers of tokens that were computed, beyond those that had to be: see [`PrefillStats::charged_share`].
    charged: usize,
    deviation: Option<f32>,
    gate: Option<GateReport>,
}

impl<'a> Run<'a> {
    fn new(
        model: &'a Transformer,
        start: &SequenceKv,
        plan: &'a BlendPlan,
        spans: &'a [Span],
        loaded: Receiver<LoadedLayer>,
        cancelled: &'a dyn Fn() -> bool,
    ) -> Result<Run<'a>> {
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
            cancelled,
            charged: 0,
            deviation: None,
            gate: None,
        })
    }

    /// Follows the rule.
    fn follow(mut self, config: &BlendConfig, suffix: &[u32]) -> std::result::Result<Blended, Attempt> {
        let composed = self.plan.positions(&[Treatment::Cached]);
        let correction = config.correction();
        let chosen = match config.mode {
            _ if composed.is_empty() => self.once(Vec::new(), correction)?,
            BlendMode::Reuse | BlendMode::FullRecompute => self.once(Vec::new(), correction)?,
            BlendMode::Epic => self.once(epic::chosen(self.plan), correction)?,
            BlendMode::Heads => {
                let chosen = highest(&heads::scores(self.plan), Budget::of(config));
                self.once(picked(&composed, &chosen), correction)?
            }
            BlendMode::Random => {
                let tokens = self.plan.tokens.iter().chain(suffix).copied();
                let chosen = highest(&random::scores(composed.len(), tokens), Budget::of(config));
                self.once(picked(&composed, &chosen), correction)?
            }
            BlendMode::CacheBlend => self.checking(config.check_layer, config.ratio, correction)?,
            BlendMode::Question | BlendMode::Answer
                if gate::is_not_worth_asking(config, composed.len(), suffix.len()) =>
            {
                self.gate = Some(gate::unasked());
                self.once(composed.clone(), Correction::None)?
            }
            BlendMode::Question | BlendMode::Answer => {
                let paid = self.asking(suffix)?;
                let scores = match config.mode {
                    BlendMode::Question => picked(&question::scores(paid), &composed),
                    _ => answer::scores(&paid, &composed),
                };
                let choice = gate::choose(config, self.plan, &scores);
                self.gate = Some(choice.report);
                let chosen = picked(&composed, &choice.chosen);
                self.again(chosen, correction, suffix.len())?
            }
        };
        Ok(self.finish(config.mode, chosen, composed.len()))
    }

    fn finish(self, rule: BlendMode, chosen: Vec<usize>, composed: usize) -> Blended {
        let (fresh, recomputed, layers) = (self.fresh(0).len(), chosen.len(), self.model.spec.layers);
        let stats = PrefillStats {
            prompt_tokens: self.plan.tokens.len(),
            reused_tokens: self.plan.tokens.len() - self.held - fresh - recomputed,
            exact_tokens: self.plan.positions(&[Treatment::Exact]).len(),
            recomputed_tokens: fresh + recomputed,
            rule: Some(rule),
            chosen,
            charged_share: (composed > 0).then(|| (self.charged as f64 / (composed * layers) as f64) as f32),
            blend_deviation: self.deviation,
            gate: self.gate,
            ..PrefillStats::default()
        };
        Blended { kv: self.kv, stats }
    }

    /// Positions, from `from` on, of tokens that are computed whatever the rule.
    fn fresh(&self, from: usize) -> Vec<usize> {
        let mut positions = self.plan.positions(&[Treatment::Fresh]);
        positions.retain(|position| *position >= self.held.max(from));
        positions
    }

    fn stream(&self, positions: Vec<usize>, suffix: &[u32]) -> Result<Stream<'a>> {
        let context = &self.plan.tokens;
        let token = |p: &usize| context.get(*p).copied().unwrap_or_else(|| suffix[*p - context.len()]);
        let tokens: Vec<u32> = positions.iter().map(token).collect();
        Stream::new(self.model, positions, &tokens)
    }

    fn layers(&self) -> std::ops::Range<usize> {
        0..self.model.spec.layers
    }

    /// One pass over the layers as they come, in which the positions `chosen` are recomputed. Returns them.
    fn once(&mut self, chosen: Vec<usize>, correction: Correction) -> std::result::Result<Vec<usize>, Attempt> {
        let mut stream = self.stream(merged(self.fresh(0), &chosen), &[])?;
        let mut corrector = Corrector::new(self.model, self.plan, &chosen, correction, 1, &self.kv)?;
        for layer in self.layers() {
            let cached = self.next_layer()?;
            self.write_cached(layer, &cached, true)?;
            self.compute(layer, &mut stream, corrector.as_mut(), None)?;
        }
        self.deviation = corrector.map_or(Ok(None), Corrector::deviation)?;
        self.charged = chosen.len() * self.model.spec.layers;
        Ok(chosen)
    }

    /// One pass over the layers as they come, which begins with all tokens and goes on behind the check layer with those that
    /// deviate most. Returns their positions.
    fn checking(
        &mut self,
        check: usize,
        ratio: f32,
        correction: Correction,
    ) -> std::result::Result<Vec<usize>, Attempt> {
        let composed = self.plan.positions(&[Treatment::Cached]);
        let mut stream = self.stream(merged(self.fresh(0), &composed), &[])?;
        let (mut chosen, mut corrector) = (composed, None);
        for layer in self.layers() {
            let rows = self.next_layer()?;
            if layer == check {
                let blocks = blocks(self.model, stream.len());
                let cached = cacheblend::Cached { spans: self.spans, rows: &rows, shape: self.model.shape };
                let checked = cacheblend::check(&stream, layer, blocks, &cached, &self.kv, ratio)?;
                stream.keep(&checked.kept)?;
                corrector = Corrector::new(self.model, self.plan, &checked.chosen, correction, layer, &self.kv)?;
                self.deviation = Some(checked.deviation);
                chosen = checked.chosen;
            }
            self.write_cached(layer, &rows, layer >= check)?;
            self.compute(layer, &mut stream, corrector.as_mut(), None)?;
        }
        self.charged = cacheblend::token_layers(self.plan, check, self.model.spec.layers, chosen.len());
        Ok(chosen)
    }

    /// One pass over the layers as they come with the question behind the chunks as they are cached, whose KV is then forgotten.
    /// Returns what it attends.
    fn asking(&mut self, suffix: &[u32]) -> std::result::Result<Paid, Attempt> {
        let context = self.plan.tokens.len();
        let asked: Vec<usize> = (context..context + suffix.len()).collect();
        self.kv.extend_to(context + suffix.len())?;
        let mut stream = self.stream(merged(self.fresh(0), &asked), suffix)?;
        let mut watch = Watch::new(self.model, context, stream.len(), suffix.len())?;
        for layer in self.layers() {
            let cached = self.next_layer()?;
            self.write_cached(layer, &cached, true)?;
            self.compute(layer, &mut stream, None, Some(&mut watch))?;
        }
        self.kv.truncate(context);
        Ok(watch.finish()?)
    }

    /// A pass over the layers behind `asking`, in which the positions `chosen` are recomputed, and what is computed anyway
    /// behind the first of the cached chunks. Returns those that were chosen.
    fn again(&mut self, chosen: Vec<usize>, correction: Correction, suffix: usize) -> Result<Vec<usize>> {
        // Once for choosing, and once more to be read.
        let mut rows = suffix;
        if let Some(first) = self.plan.composed().next().filter(|_| !chosen.is_empty()) {
            let mut stream = self.stream(merged(self.fresh(first.positions.start), &chosen), &[])?;
            rows += stream.len();
            let mut corrector = Corrector::new(self.model, self.plan, &chosen, correction, 1, &self.kv)?;
            for layer in self.layers() {
                self.compute(layer, &mut stream, corrector.as_mut(), None)?;
            }
            self.deviation = corrector.map_or(Ok(None), Corrector::deviation)?;
        }
        self.charged = rows * self.model.spec.layers;
        Ok(chosen)
    }

    /// Waits for a layer's cached rows, as long as somebody wants them.
    fn next_layer(&self) -> std::result::Result<Vec<ChunkLayer>, Attempt> {
        const LOOK: Duration = Duration::from_millis(50);
        loop {
            match self.loaded.recv_timeout(LOOK) {
                Ok(layer) => return layer.map_err(|(chunk, error)| Attempt::ChunkLost(chunk, error)),
                Err(RecvTimeoutError::Timeout) if (self.cancelled)() => return Err(EngineError::Cancelled.into()),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(EngineError::Internal("the thread that reads cached chunks ended early".into()).into());
                }
            }
        }
    }

    /// Writes what is cached; `all`: not only what is exact. Rows that are computed overwrite theirs afterwards.
    fn write_cached(&mut self, layer: usize, cached: &[ChunkLayer], all: bool) -> Result<()> {
        for ((span, rows), cached) in self.spans.iter().zip(&self.span_rows).zip(cached) {
            if all || span.treatment == Treatment::Exact {
                write_cached(self.model, &mut self.kv, layer, rows, cached)?;
            }
        }
        Ok(())
    }

    /// Runs the layer for the rows of `stream`, in order of position: a row needs those before it. A layer that is corrected needs
    /// all of its rows written first; where they are more than one block, they are computed once more to attend.
    fn compute(
        &mut self,
        layer: usize,
        stream: &mut Stream<'_>,
        corrector: Option<&mut Corrector<'_>>,
        mut watch: Option<&mut Watch<'_>>,
    ) -> Result<()> {
        let mut entered = false;
        if let Some(corrector) = corrector.filter(|corrector| corrector.acts(layer)) {
            corrector.before(layer, &self.kv)?;
            for block in blocks(self.model, stream.len()) {
                self.stop_if_cancelled()?;
                stream.enter(layer, block, &mut self.kv)?;
            }
            corrector.after(layer, &mut self.kv)?;
            entered = blocks(self.model, stream.len()).count() == 1;
        }
        for block in blocks(self.model, stream.len()) {
            self.stop_if_cancelled()?;
            if !entered {
                stream.enter(layer, block, &mut self.kv)?;
            }
            stream.leave(layer, &self.kv, watch.as_deref_mut())?;
        }
        Ok(())
    }

    fn stop_if_cancelled(&self) -> Result<()> {
        if (self.cancelled)() { Err(EngineError::Cancelled) } else { Ok(()) }
    }
}

/// The rows in blocks that are about equal: a small last one would be computed at the cost of a larger one. And the last, where
/// there are several, has all tokens of a question that are looked at, so that what they pay is added up in the same order
/// whatever comes before them.
fn blocks(model: &Transformer, rows: usize) -> impl Iterator<Item = std::ops::Range<usize>> + use<> {
    // On the CPU, tests have several of them in small contexts.
    let most = if cfg!(test) && model.device().is_none() { 2 * WATCHED } else { ROWS };
    let count = rows.div_ceil(most.min(model.most_rows()));
    (0..count).map(move |i| rows * i / count..rows * (i + 1) / count)
}

/// The elements at these indices.
fn picked<T: Copy>(from: &[T], indices: &[usize]) -> Vec<T> {
    indices.iter().map(|i| from[*i]).collect()
}

/// Both, ascending.
fn merged(mut a: Vec<usize>, b: &[usize]) -> Vec<usize> {
    a.extend_from_slice(b);
    a.sort_unstable();
    a
}
