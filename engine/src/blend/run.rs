//! Executes a [`BlendPlan`], in pieces.
//!
//! Rows that are computed may lie anywhere in the context. Each sees exactly the tokens up to its own
//! *position*: attention masks by position, not by row.
//!
//! Rules that know what to recompute beforehand, and `cacheblend`, which finds out on the way, go over the layers once, while
//! these are loaded. Those that ask the question go over them twice: with the question alone over everything as cached, then with
//! the tokens that it attends, whose keys and values then replace the cached ones. The question is read in the last pass, as
//! its last rows, where its attention is exact.

use std::sync::Arc;
use std::time::Duration;

use super::correct::Corrector;
use super::paid::{Paid, Watch};
use super::pass::{Loads, Pass, Passed};
use super::plan::{BlendPlan, Treatment};
use super::reading::{Lost, Reading};
use super::select::{Budget, highest};
use super::stream::Stream;
use super::{answer, cacheblend, epic, gate, heads, question, random};
use crate::chunk::PromptChunk;
use crate::config::{BlendConfig, BlendMode};
use crate::error::Result;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{States, Transformer};
use crate::request::{GateReport, PrefillStats};
use crate::tiers::ChunkTiers;

/// What is blended.
#[derive(Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) prefix: &'a [u32],
    pub(crate) chunks: &'a [PromptChunk],
    /// What stands behind it, for rules that go by the question. Empty: not known.
    pub(crate) suffix: &'a [u32],
    /// Where chunks are kept near; `None`: they are read from their sources.
    pub(crate) tiers: Option<&'a Arc<ChunkTiers>>,
}

impl<'a> Context<'a> {
    /// A context whose question is not known.
    pub(crate) fn unasked(prefix: &'a [u32], chunks: &'a [PromptChunk]) -> Context<'a> {
        Context { prefix, chunks, suffix: &[], tiers: None }
    }
}

/// What becomes of the tokens behind the context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suffix {
    /// They are looked at by the rules that ask, and read later.
    Later,
    /// They are read with the last pass, attending everything, and their KV stays. `ban_eos`: end-of-text tokens must not be
    /// chosen behind them.
    Read { ban_eos: bool },
}

/// How a blend came about (times are the caller's to fill in).
pub(crate) struct Blended {
    pub(crate) stats: PrefillStats,
    /// Where the suffix was read, the final state of its last token: on a GPU until the next forward pass or piece. `None` also
    /// where a rule has nothing to recompute: then the suffix is still to be read.
    pub(crate) state: Option<States>,
}

/// How far a blend has come.
pub(crate) enum Progress {
    /// There is more to do.
    More,
    /// The next layer has not arrived: nothing was done.
    Waits,
    Done(Box<Blended>),
}

/// A blend in progress. The KV is whoever's drives it: it must not be touched in between. Dropping it ends it.
pub(crate) struct Blend {
    /// As they can be served.
    config: BlendConfig,
    prefix: Vec<u32>,
    chunks: Vec<PromptChunk>,
    suffix: Vec<u32>,
    tiers: Option<Arc<ChunkTiers>>,
    then: Suffix,
    /// Tokens whose KV was there; they count neither as reused nor as recomputed.
    held: usize,
    /// Chunks whose source has failed.
    failed: Vec<usize>,
    plan: BlendPlan,
    loads: Loads,
    pass: Option<(Step, Pass)>,
    /// What the gate has decided.
    gate: Option<GateReport>,
}

/// Which pass it is.
enum Step {
    /// The question over everything as cached.
    Asking,
    /// The last one, in which these positions are recomputed, or those that the check layer chooses. `extra`: rows that go
    /// through all layers once more than they had to.
    Last { chosen: Vec<usize>, extra: usize },
}

impl Blend {
    /// Begins to read what is cached of `context`. `held`: so many of its first tokens, of the prefix, are there.
    ///
    /// # Errors
    /// The system gives no thread to read with.
    pub(crate) fn new(
        model: &Transformer,
        held: usize,
        context: &Context<'_>,
        config: &BlendConfig,
        then: Suffix,
    ) -> Result<Blend> {
        let Context { prefix, chunks, suffix, tiers } = *context;
        let config = resolved(config, suffix);
        let plan = BlendPlan::new(prefix, chunks, &config, &[]);
        Ok(Blend {
            loads: loads(model, &plan, chunks, tiers)?,
            plan,
            config,
            prefix: prefix.to_vec(),
            chunks: chunks.to_vec(),
            suffix: suffix.to_vec(),
            tiers: tiers.cloned(),
            then,
            held,
            failed: Vec::new(),
            pass: None,
            gate: None,
        })
    }

    /// Tokens whose KV was there when it began.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Whether it can go on: the layer that it needs next has arrived.
    pub(crate) fn is_ready(&mut self) -> bool {
        let wants = self.pass.as_ref().is_none_or(|(_, pass)| pass.wants_layer());
        !wants || self.loads.reading.arrived()
    }

    /// Waits until it can go on, so long at most. Whether it can.
    pub(crate) fn wait(&mut self, most: Duration) -> bool {
        self.is_ready() || self.loads.reading.wait(most)
    }

    /// Tokens of KV that it takes when it goes on, beyond those that are held.
    pub(crate) fn takes(&self) -> usize {
        if self.pass.is_some() { 0 } else { self.end() - self.held }
    }

    /// What is left of this pass, in tokens that go through all layers; about.
    pub(crate) fn left(&self, model: &Transformer) -> usize {
        match &self.pass {
            None => self.plan.tokens.len().max(1),
            Some((_, pass)) => pass.left(model, &self.loads).div_ceil(model.spec.layers).max(1),
        }
    }

    /// Goes on, for about the cost of reading so many `tokens`: less is left undone than the next unit, and one unit is always
    /// done. A chunk whose source fails is computed instead: then all begins again. After an error, it must not go on.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`](crate::EngineError::OutOfMemory) and other failures of a GPU.
    pub(crate) fn advance(&mut self, model: &Transformer, kv: &mut SequenceKv, tokens: usize) -> Result<Progress> {
        let most = tokens.saturating_mul(model.spec.layers);
        let mut spent = 0;
        loop {
            if !self.is_ready() {
                return Ok(if spent > 0 { Progress::More } else { Progress::Waits });
            }
            let (step, mut pass) = match self.pass.take() {
                Some(pass) => pass,
                None => self.begin(model, kv)?,
            };
            let cost = pass.cost(model, &self.loads);
            if spent > 0 && spent + cost > most {
                self.pass = Some((step, pass));
                return Ok(Progress::More);
            }
            spent += cost;
            match pass.step(model, &self.plan, &mut self.loads, kv) {
                Ok(()) if !pass.is_over() => self.pass = Some((step, pass)),
                Ok(()) => {
                    if let Some(blended) = self.passed(model, kv, step, pass)? {
                        return Ok(Progress::Done(Box::new(blended)));
                    }
                }
                Err(Lost::Reading(error)) => return Err(error),
                Err(Lost::Chunk(chunk, error)) => {
                    tracing::warn!(chunk, %error, "a cached chunk could not be read; it is computed instead");
                    self.failed.push(chunk);
                    self.plan = BlendPlan::new(&self.prefix, &self.chunks, &self.config, &self.failed);
                    self.loads = loads(model, &self.plan, &self.chunks, self.tiers.as_ref())?;
                    kv.truncate(self.held);
                }
            }
        }
    }

    /// The first pass.
    fn begin(&mut self, model: &Transformer, kv: &mut SequenceKv) -> Result<(Step, Pass)> {
        kv.extend_to(self.end())?;
        self.loads.place(model, kv)?;
        let composed = self.plan.positions(&[Treatment::Cached]);
        let chosen = match self.config.mode {
            _ if composed.is_empty() => Vec::new(),
            BlendMode::Reuse | BlendMode::FullRecompute => Vec::new(),
            BlendMode::Epic => epic::chosen(&self.plan),
            BlendMode::Heads => picked(&composed, &highest(&heads::scores(&self.plan), Budget::of(&self.config))),
            BlendMode::Random => {
                let tokens = self.plan.tokens.iter().chain(&self.suffix).copied();
                picked(&composed, &highest(&random::scores(composed.len(), tokens), Budget::of(&self.config)))
            }
            BlendMode::CacheBlend => {
                let BlendConfig { check_layer, ratio, .. } = self.config;
                let pass = Pass::new(model, self.stream(model, self.rows(0, &composed))?, true, None);
                let pass = pass.checking(check_layer, ratio, self.config.correction());
                return Ok((Step::Last { chosen: Vec::new(), extra: 0 }, self.reading(pass)));
            }
            BlendMode::Question | BlendMode::Answer
                if gate::is_not_worth_asking(&self.config, composed.len(), self.suffix.len()) =>
            {
                self.gate = Some(gate::unasked());
                composed
            }
            BlendMode::Question | BlendMode::Answer => {
                let context = self.plan.tokens.len();
                let asked: Vec<usize> = (context..context + self.suffix.len()).collect();
                let pass = Pass::new(model, self.stream(model, merged(self.fresh(0), &asked))?, true, None);
                let watch = Watch::new(model, context, pass.rows(), self.suffix.len())?;
                return Ok((Step::Asking, pass.watching(watch)));
            }
        };
        let corrector = Corrector::new(model, &self.plan, &chosen, self.config.correction(), 1, kv)?;
        let pass = Pass::new(model, self.stream(model, self.rows(0, &chosen))?, true, corrector);
        Ok((Step::Last { chosen, extra: 0 }, self.reading(pass)))
    }

    /// Behind a pass: the next one, or the end.
    fn passed(&mut self, model: &Transformer, kv: &mut SequenceKv, step: Step, pass: Pass) -> Result<Option<Blended>> {
        let Passed { watch, deviation, checked, state } = pass.finish(model)?;
        let (chosen, extra) = match (step, watch) {
            (Step::Last { chosen, extra }, _) => (checked.unwrap_or(chosen), extra),
            (Step::Asking, None) => (Vec::new(), self.suffix.len()),
            (Step::Asking, Some(watch)) => {
                let chosen = self.choose(watch.finish(model)?);
                let first = self.plan.composed().next().map(|span| span.positions.start);
                if let Some(first) = first.filter(|_| !chosen.is_empty()) {
                    if self.then == Suffix::Later {
                        kv.truncate(self.plan.tokens.len());
                    }
                    let corrector = Corrector::new(model, &self.plan, &chosen, self.config.correction(), 1, kv)?;
                    let pass = Pass::new(model, self.stream(model, self.rows(first, &chosen))?, false, corrector);
                    // The question once for choosing, and a second time what is computed anyway.
                    let extra = self.suffix.len() + self.fresh(first).len();
                    self.pass = Some((Step::Last { chosen, extra }, self.reading(pass)));
                    return Ok(None);
                }
                (chosen, self.suffix.len())
            }
        };
        if state.is_none() {
            kv.truncate(self.plan.tokens.len());
        }
        self.let_go(model)?;
        let stats = self.stats(model, chosen, extra, deviation);
        Ok(Some(Blended { stats, state }))
    }

    /// All layers have been read: their memory may change from now on, and chunks that are used often go to the GPU.
    fn let_go(&self, model: &Transformer) -> Result<()> {
        if let Some(device) = model.device() {
            device.copies().settle()?;
        }
        let readers = self.loads.reading.readers();
        self.tiers.as_ref().map_or(Ok(()), |tiers| tiers.promote(model.device(), readers))
    }

    /// The positions to be recomputed, by what the question pays.
    fn choose(&mut self, paid: Paid) -> Vec<usize> {
        let composed = self.plan.positions(&[Treatment::Cached]);
        let scores = match self.config.mode {
            BlendMode::Question => picked(&question::scores(paid), &composed),
            _ => answer::scores(&paid, &composed),
        };
        let choice = gate::choose(&self.config, &self.plan, &scores);
        self.gate = Some(choice.report);
        picked(&composed, &choice.chosen)
    }

    /// `extra`: rows that went through all layers beyond the chosen ones.
    fn stats(&self, model: &Transformer, chosen: Vec<usize>, extra: usize, deviation: Option<f32>) -> PrefillStats {
        let (fresh, recomputed, layers) = (self.fresh(0).len(), chosen.len(), model.spec.layers);
        let composed: usize = self.plan.composed().map(|span| span.positions.len()).sum();
        let charged = match self.config.mode {
            BlendMode::CacheBlend => cacheblend::token_layers(&self.plan, self.config.check_layer, layers, recomputed),
            _ => (recomputed + extra) * layers,
        };
        PrefillStats {
            prompt_tokens: self.plan.tokens.len(),
            reused_tokens: self.plan.tokens.len() - self.held - fresh - recomputed,
            exact_tokens: self.plan.positions(&[Treatment::Exact]).len(),
            recomputed_tokens: fresh + recomputed,
            rule: Some(self.config.mode),
            chosen,
            charged_share: (composed > 0).then(|| (charged as f64 / (composed * layers) as f64) as f32),
            blend_deviation: deviation,
            gate: self.gate,
            failed_chunks: self.failed.len(),
            ..PrefillStats::default()
        }
    }

    /// Where the KV ends while it goes on.
    fn end(&self) -> usize {
        let behind = if self.then != Suffix::Later || self.config.mode.asks() { self.suffix.len() } else { 0 };
        self.plan.tokens.len() + behind
    }

    /// Positions, from `from` on, of tokens that are computed whatever the rule.
    fn fresh(&self, from: usize) -> Vec<usize> {
        let mut positions = self.plan.positions(&[Treatment::Fresh]);
        positions.retain(|position| *position >= self.held.max(from));
        positions
    }

    /// The rows of the last pass: what is computed anyway from `from` on, what is chosen, and the suffix where it is read.
    fn rows(&self, from: usize, chosen: &[usize]) -> Vec<usize> {
        let mut rows = merged(self.fresh(from), chosen);
        if self.then != Suffix::Later {
            rows.extend(self.plan.tokens.len()..self.plan.tokens.len() + self.suffix.len());
        }
        rows
    }

    /// The last pass ends with the last token's state where the suffix is read.
    fn reading(&self, pass: Pass) -> Pass {
        if self.then != Suffix::Later && !self.suffix.is_empty() { pass.reading() } else { pass }
    }

    fn stream(&self, model: &Transformer, positions: Vec<usize>) -> Result<Stream> {
        let context = &self.plan.tokens;
        let token = |p: &usize| context.get(*p).copied().unwrap_or_else(|| self.suffix[*p - context.len()]);
        let tokens: Vec<u32> = positions.iter().map(token).collect();
        Stream::new(model, positions, &tokens, self.then == Suffix::Read { ban_eos: true })
    }
}

/// The settings as they can be served: without a question, `cacheblend` stands in for the rules that go by it.
fn resolved(config: &BlendConfig, suffix: &[u32]) -> BlendConfig {
    if !config.mode.asks() || !suffix.is_empty() {
        return config.clone();
    }
    BlendConfig { mode: BlendMode::CacheBlend, mass: None, ..config.clone() }
}

/// What is cached of a plan, on its way.
fn loads(
    model: &Transformer,
    plan: &BlendPlan,
    chunks: &[PromptChunk],
    tiers: Option<&Arc<ChunkTiers>>,
) -> Result<Loads> {
    let spans = plan.cached_spans();
    let reading = Reading::begin(model, &spans, chunks, tiers.map(Arc::as_ref))?;
    Ok(Loads { spans, rows: None, reading })
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
