//! The engine's thread: takes commands and executes the steps that the scheduler plans.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use crate::blend::blend;
use crate::chunk::{ChunkKv, PromptChunk};
use crate::config::{BlendConfig, EngineConfig};
use crate::error::{EngineError, Result};
use crate::kv::prefix::SharedPage;
use crate::model::transformer::{Piece, Transformer, Want};
use crate::prefix_cache::{PageKey, PrefixCache};
use crate::request::{AttentionInputs, PreparedContext};
use crate::sampler::Choice;
use crate::scheduler::{Bytes, Entry, Limits, plan};
use crate::sequence::{Phase, Sequence, Submitted};
use crate::tokenizer::Tokenizer;

/// What the engine's thread is told.
pub(crate) enum Command {
    Submit(Submitted),
    Compute(Computation),
    Shutdown,
}

/// KV to compute that is no request's.
pub(crate) enum Computation {
    Chunk { prefix: Vec<u32>, tokens: Vec<u32>, reply: Sender<Result<ChunkKv>> },
    AttentionInputs { tokens: Vec<u32>, reply: Sender<Result<Vec<AttentionInputs>>> },
    Context { prefix: Vec<u32>, chunks: Vec<PromptChunk>, blend: BlendConfig, reply: Sender<Result<PreparedContext>> },
}

impl Computation {
    /// Tokens whose KV it holds while it runs.
    fn tokens(&self) -> usize {
        match self {
            Computation::Chunk { prefix, tokens, .. } => prefix.len() + tokens.len(),
            Computation::AttentionInputs { tokens, .. } => tokens.len(),
            Computation::Context { prefix, chunks, .. } => {
                prefix.len() + chunks.iter().map(|c| c.tokens.len()).sum::<usize>()
            }
        }
    }
}

/// What other threads may read of the engine's state.
#[derive(Default)]
pub(crate) struct Load {
    pub(crate) running: AtomicUsize,
    /// Requests handed in that do not run.
    pub(crate) waiting: AtomicUsize,
    /// Bytes of KV of those that run.
    pub(crate) kv_bytes: AtomicU64,
    /// Bytes of KV of pages that no request uses.
    pub(crate) cached_bytes: AtomicU64,
    pub(crate) preemptions: AtomicU64,
    /// Prompt tokens that the prefix cache was asked for, and those that it had.
    pub(crate) prefix_queries: AtomicU64,
    pub(crate) prefix_hits: AtomicU64,
    pub(crate) stopping: AtomicBool,
    /// The GPU answers nothing any more: after some errors all that follows fails.
    pub(crate) lost: AtomicBool,
}

/// All requests by age, of which the first run, and the pages they share.
pub(crate) struct Queue {
    sequences: Vec<Sequence>,
    running: usize,
    cache: PrefixCache<SharedPage>,
    /// In the order in which they came.
    computations: VecDeque<Computation>,
    /// Pages of a GPU that could be had when the scheduler, which does not know of all pages, had let in one too many:
    /// nobody is let in until there are more, or a request has ended.
    full_at: Option<usize>,
}

impl Queue {
    pub(crate) fn new() -> Queue {
        Queue {
            sequences: Vec::new(),
            running: 0,
            cache: PrefixCache::new(),
            computations: VecDeque::new(),
            full_at: None,
        }
    }

    fn is_empty(&self) -> bool {
        self.sequences.is_empty() && self.computations.is_empty()
    }

    /// Bytes that those that run hold.
    fn used(&self, page: Bytes) -> Bytes {
        let private = self.sequences[..self.running].iter().map(|s| s.private_bytes(page)).sum::<Bytes>();
        private + page.times(self.cache.in_use())
    }
}

/// Everything that the engine's thread owns.
pub(crate) struct Runner {
    pub(crate) model: Arc<Transformer>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) config: EngineConfig,
    pub(crate) limits: Limits,
    pub(crate) max_context: usize,
    pub(crate) identity: u64,
    /// Where the prefix cache's keys begin; `None`: nothing is shared.
    pub(crate) root: Option<PageKey>,
    pub(crate) load: Arc<Load>,
    pub(crate) commands: Receiver<Command>,
}

impl Runner {
    /// Runs until shutdown: then no command is taken any more, and what runs or waits is completed.
    pub(crate) fn run(self) {
        let mut queue = Queue::new();
        let mut open = true;
        while open || !queue.is_empty() {
            // Shutdown comes once: nothing may be waited for behind it.
            open = open && self.take_commands(&mut queue);
            self.compute(&mut queue);
            self.cycle(&mut queue);
            if self.load.lost.load(Ordering::Relaxed) {
                tracing::error!("the GPU does not work any more: the engine stops, start the program again");
                self.load.stopping.store(true, Ordering::Release);
                let lost = || EngineError::Stopped("the GPU does not work any more: start the program again".into());
                return queue.sequences.iter_mut().for_each(|sequence| sequence.fail(lost()));
            }
        }
    }

    /// Passes a result on. After an error of the GPU, asks it whether it still works.
    fn watched<T>(&self, result: Result<T>) -> Result<T> {
        if let (Err(EngineError::Device { .. }), Some(model)) = (&result, self.model.device())
            && model.device.synchronize().is_err()
        {
            self.load.lost.store(true, Ordering::Relaxed);
        }
        result
    }

    /// One step of all that run.
    fn cycle(&self, queue: &mut Queue) {
        settle(queue);
        self.remove_ended(queue);
        if !queue.sequences.is_empty() {
            let entries = self.entries(queue);
            let mut step = plan(&self.limits, queue.used(self.limits.page_bytes), &entries, queue.running);
            self.arrange(queue, step.tokens.len());
            if let Some(needed) = step.out_of_memory {
                queue.sequences[0].fail(never_fits(needed, self.limits.budget));
            } else {
                self.make_room(queue, &mut step.tokens);
                self.execute(queue, &step.tokens);
            }
            self.remove_ended(queue);
        }
        self.report(queue);
    }

    /// What the scheduler sees: no more than may run. While a computation waits for memory, nobody is admitted before it,
    /// and nobody where one more was too many before.
    fn entries(&self, queue: &mut Queue) -> Vec<Entry> {
        let (chunk, page) = (self.config.prefill_chunk.max(1), self.limits.page_bytes);
        queue.full_at = queue.full_at.filter(|then| self.pages_to_be_had(queue, then + 1) <= *then);
        let full = queue.full_at.is_some();
        let waits =
            queue.running > 0 && (full || queue.computations.front().is_some_and(|first| !self.fits(queue, first)));
        let Queue { sequences, running, cache, .. } = queue;
        let (run, wait) = sequences.split_at_mut(*running);
        let free = if waits { 0 } else { self.limits.max_sequences - run.len() };
        let wait = wait.iter_mut().take(free);
        let run = run.iter().map(|s| s.running_entry(cache, chunk, page));
        run.chain(wait.map(|s| s.waiting_entry(cache, chunk))).collect()
    }

    /// Takes what has been sent, waiting for it when there is nothing to do. False once shutdown was.
    fn take_commands(&self, queue: &mut Queue) -> bool {
        let mut idle = queue.is_empty();
        loop {
            let command = if std::mem::take(&mut idle) {
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit(submitted)) => queue.sequences.push(self.sequence(submitted)),
                Ok(Command::Compute(computation)) => queue.computations.push_back(computation),
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => {
                    self.load.stopping.store(true, Ordering::Release);
                    return false;
                }
            }
        }
    }

    /// Runs the first of the computations that wait, if there is room for its KV: at most one between two steps, as
    /// whoever asks for one may ask again at once. Where nothing runs, nothing else will make room.
    fn compute(&self, queue: &mut Queue) {
        let Some(first) = queue.computations.front() else { return };
        if queue.running > 0 && !self.fits(queue, first) {
            return;
        }
        let Some(first) = queue.computations.pop_front() else { return };
        self.make_room_for(queue, first.tokens());
        // Whoever asked may have gone away: then the reply is dropped.
        match first {
            Computation::Chunk { prefix, tokens, reply } => {
                let step = self.config.prefill_chunk.max(1);
                drop(reply.send(self.watched(ChunkKv::compute(&self.model, &prefix, &tokens, step))));
            }
            Computation::AttentionInputs { tokens, reply } => {
                drop(reply.send(self.watched(self.attention_inputs(&tokens))));
            }
            Computation::Context { prefix, chunks, blend, reply } => {
                drop(reply.send(self.watched(self.prepare(&prefix, &chunks, &blend))));
            }
        }
    }

    /// Whether there is room for a computation's KV beside what the running requests hold.
    fn fits(&self, queue: &Queue, computation: &Computation) -> bool {
        let (page, pages) = (self.limits.page_bytes, self.pages(computation.tokens()));
        (queue.used(page) + page.times(pages)).fits(self.limits.budget) && pages <= self.pages_to_be_had(queue, pages)
    }

    /// Pages of a GPU that are free, or would be without those that nobody uses; `most` if there are more.
    fn pages_to_be_had(&self, queue: &Queue, most: usize) -> usize {
        let Some(device) = self.model.device() else { return most };
        let free = device.pool.pages().1.min(most);
        free + queue.cache.unused(most - free, &SharedPage::is_last)
    }

    /// Pages of KV that no request accounts for; one more for where a page is copied.
    fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.page_tokens) + 1
    }

    fn sequence(&self, submitted: Submitted) -> Sequence {
        let request = &submitted.request;
        let context = request.context.as_ref().map_or(0, |c| c.len());
        let limit = request.max_tokens.min(self.max_context.saturating_sub(context + request.prompt.len()));
        Sequence::new(submitted, &self.model, &self.tokenizer, limit, self.root)
    }

    /// Forgets what is done and what nobody waits for any more.
    fn remove_ended(&self, queue: &mut Queue) {
        let (mut place, mut running) = (0, queue.running);
        queue.sequences.retain_mut(|sequence| {
            let ran = place < queue.running;
            place += 1;
            let ended = sequence.phase == Phase::Done || sequence.is_cancelled();
            if ended {
                queue.full_at = None;
            }
            if ended && ran {
                sequence.release(&mut queue.cache);
                running -= 1;
            } else if ended {
                self.load.waiting.fetch_sub(1, Ordering::AcqRel);
            }
            !ended
        });
        queue.running = running;
    }

    /// Makes the first `running` run: those beyond lose their KV, those that are new get what is there.
    fn arrange(&self, queue: &mut Queue, running: usize) {
        for sequence in queue.sequences.iter_mut().take(queue.running).skip(running) {
            sequence.preempt(&mut queue.cache, &self.model);
            self.load.preemptions.fetch_add(1, Ordering::Relaxed);
            self.load.waiting.fetch_add(1, Ordering::AcqRel);
        }
        for sequence in queue.sequences.iter_mut().take(running).skip(queue.running) {
            self.load.waiting.fetch_sub(1, Ordering::AcqRel);
            if let Some((asked, found)) = sequence.admit(&mut queue.cache) {
                self.load.prefix_queries.fetch_add(asked as u64, Ordering::Relaxed);
                self.load.prefix_hits.fetch_add(found as u64, Ordering::Relaxed);
            }
        }
        queue.running = running;
        settle(queue);
    }

    /// Pages that nobody uses give way to those that a step of so many tokens takes. Where a GPU has too few even so, as
    /// some are taken that no request accounts for (by prepared contexts), the youngest give way too.
    fn make_room(&self, queue: &mut Queue, tokens: &mut Vec<usize>) {
        let growth = queue.sequences.iter().zip(&*tokens).map(|(s, n)| self.limits.bytes(n.saturating_sub(s.room())));
        let growth = growth.sum();
        self.evict_for(queue, growth);
        let missing = |queue: &Queue, tokens: &[usize]| -> usize {
            queue.sequences.iter().zip(tokens).map(|(s, n)| s.missing_on_device(*n)).sum()
        };
        while !self.make_free(queue, missing(queue, tokens)) && tokens.len() > 1 {
            tokens.pop();
            self.arrange(queue, tokens.len());
            queue.full_at = Some(self.pages_to_be_had(queue, usize::MAX - 1));
        }
    }

    /// Pages that nobody uses give way to KV of so many tokens that no request accounts for.
    fn make_room_for(&self, queue: &mut Queue, tokens: usize) {
        let pages = self.pages(tokens);
        self.evict_for(queue, self.limits.page_bytes.times(pages));
        self.make_free(queue, pages);
    }

    /// Pages that nobody uses give way until so many bytes fit into the budget.
    fn evict_for(&self, queue: &mut Queue, bytes: Bytes) {
        let page = self.limits.page_bytes;
        let unused = page.times(queue.cache.len() - queue.cache.in_use());
        let held = queue.used(page) + unused + bytes;
        queue.cache.evict(self.limits.pages_over(held), &|_| true);
    }

    /// On a GPU: cached pages give way until so many are free, or none is left that nobody uses. Whether so many are free.
    fn make_free(&self, queue: &mut Queue, pages: usize) -> bool {
        let Some(device) = self.model.device() else { return true };
        queue.cache.evict(pages.saturating_sub(device.pool.pages().1), &SharedPage::is_last);
        pages <= device.pool.pages().1
    }

    /// Blends contexts, and reads the tokens of all others in one batch.
    fn execute(&self, queue: &mut Queue, tokens: &[usize]) {
        let mut batch = Vec::new();
        for (sequence, &tokens) in queue.sequences.iter_mut().zip(tokens).filter(|(_, tokens)| **tokens > 0) {
            match sequence.phase {
                Phase::Context => {
                    let blended = self.watched(sequence.blend(&self.model, &mut queue.cache));
                    blended.unwrap_or_else(|error| sequence.fail(error));
                }
                Phase::Text => batch.push((sequence, tokens)),
                Phase::Done => {}
            }
        }
        if !batch.is_empty() {
            self.forward(&mut batch, &mut queue.cache);
        }
    }

    fn forward(&self, batch: &mut [(&mut Sequence, usize)], cache: &mut PrefixCache<SharedPage>) {
        let mut pieces: Vec<Piece<'_>> = batch.iter_mut().map(|(s, tokens)| s.piece(*tokens)).collect();
        let states = self.model.forward(&mut pieces);
        let read: Vec<_> = pieces.iter().map(|p| (p.stats, p.want == Want::Last)).collect();
        let on_gpu = self.model.device().is_some();
        let wanted = batch.iter_mut().zip(&read).filter(|(_, (_, last))| *last);
        let choices: Vec<Choice> = wanted.map(|((s, _), _)| if on_gpu { s.choice() } else { Choice::Logits }).collect();
        let nexts = match self.watched(states.and_then(|states| self.model.next(&states, &choices))) {
            Ok(nexts) => nexts,
            // One step, one fate: which sequence was at fault is not known.
            Err(error) => return batch.iter_mut().for_each(|(s, _)| s.fail(for_each(&error))),
        };
        let mut nexts = nexts.into_iter();
        for ((sequence, tokens), (stats, last)) in batch.iter_mut().zip(read) {
            sequence.advance(*tokens, stats, cache);
            let next = if last { nexts.next() } else { None };
            if let Some(next) = next
                && let Err(error) = sequence.accept(next)
            {
                sequence.fail(error);
            }
        }
    }

    fn report(&self, queue: &Queue) {
        let (page, cache, load) = (self.limits.page_bytes, &queue.cache, &self.load);
        load.running.store(queue.running, Ordering::Relaxed);
        // Where the pages are.
        let here = |bytes: Bytes| if page.device > 0 { bytes.device } else { bytes.host };
        load.kv_bytes.store(here(queue.used(page)), Ordering::Relaxed);
        load.cached_bytes.store(here(page.times(cache.len() - cache.in_use())), Ordering::Relaxed);
    }

    /// What every layer's attention sees of a text that is read alone.
    fn attention_inputs(&self, tokens: &[u32]) -> Result<Vec<AttentionInputs>> {
        let mut kv = self.model.new_kv();
        let (mut tap, mut query_tap) = (Vec::new(), Vec::new());
        for part in tokens.chunks(self.model.most_rows()) {
            let piece = Piece::exact(&mut kv, part, Want::Nothing);
            let piece = Piece { tap: Some(&mut tap), query_tap: Some(&mut query_tap), ..piece };
            self.model.forward(&mut [piece])?;
        }
        let rows = self.model.rows((0..tokens.len()).collect());
        let layers = tap.into_iter().zip(query_tap);
        Ok(layers
            .map(|((keys, _), queries)| AttentionInputs {
                queries,
                keys: self.model.rotated(&rows, keys),
                scale: self.model.softmax_scale(),
            })
            .collect())
    }

    fn prepare(&self, prefix: &[u32], chunks: &[PromptChunk], config: &BlendConfig) -> Result<PreparedContext> {
        let begun = Instant::now();
        let mut blended = blend(&self.model, prefix, chunks, config, &|| false)?;
        blended.stats.seconds = begun.elapsed().as_secs_f64();
        Ok(PreparedContext { kv: blended.kv, stats: blended.stats, engine: self.identity })
    }
}

/// The error of a batch, for one of its sequences.
fn for_each(error: &EngineError) -> EngineError {
    match error {
        EngineError::OutOfMemory { what, needed, budget } => {
            EngineError::OutOfMemory { what: what.clone(), needed: *needed, budget: *budget }
        }
        EngineError::Device { action, reason } => EngineError::Device { action, reason: reason.clone() },
        other => EngineError::Internal(other.to_string()),
    }
}

/// What left the windows of those that run finds its place, so that what they hold is what is counted.
fn settle(queue: &mut Queue) {
    for sequence in &mut queue.sequences[..queue.running] {
        sequence.settle(&mut queue.cache).unwrap_or_else(|error| sequence.fail(error));
    }
}

/// The error for KV that the whole budget is too small for.
pub(crate) fn never_fits(needed: Bytes, budget: Bytes) -> EngineError {
    if needed.host > budget.host {
        EngineError::NeverFits { memory: "host", needed: needed.host, budget: budget.host }
    } else {
        EngineError::NeverFits { memory: "device", needed: needed.device, budget: budget.device }
    }
}

/// Asks the engine's thread and waits for the answer.
pub(crate) fn ask<T>(
    commands: &Sender<Command>,
    computation: impl FnOnce(Sender<Result<T>>) -> Computation,
) -> Result<T> {
    let stopped = || EngineError::Stopped("its thread takes no more commands".into());
    let (reply, answer) = mpsc::channel();
    commands.send(Command::Compute(computation(reply))).map_err(|_| stopped())?;
    answer.recv().map_err(|_| stopped())?
}

#[cfg(test)]
#[path = "runner/tests.rs"]
mod tests;
