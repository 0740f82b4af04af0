//! The engine's thread: takes commands and executes the steps that the scheduler plans.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::blend::{Context, blend};
use crate::chunk::{ChunkKv, PromptChunk};
use crate::config::{BlendConfig, EngineConfig};
use crate::error::{EngineError, Result};
use crate::kv::prefix::SharedPage;
use crate::model::transformer::{ChunkSums, Piece, Transformer, Want};
use crate::prefix_cache::{PageKey, PrefixCache};
use crate::request::Event;
use crate::request::{AttentionInputs, ChunkAttention, PreparedContext};
use crate::sampler::Choice;
use crate::scheduler::{Bytes, Entry, Limits, Step, plan};
use crate::sequence::{Phase, Sequence, Submitted};
use crate::tokenizer::Tokenizer;
use crate::unwind::{guarded, message};

/// How often the engine looks whether something has changed while all that run wait for indexes.
const LOOK: Duration = Duration::from_millis(2);

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
    ChunkAttention { prefix: Vec<u32>, chunks: Vec<Vec<u32>>, reply: Sender<Result<ChunkAttention>> },
    Context { prefix: Vec<u32>, chunks: Vec<PromptChunk>, blend: BlendConfig, reply: Sender<Result<PreparedContext>> },
}

impl Computation {
    /// Tokens whose KV it holds while it runs.
    fn tokens(&self) -> usize {
        match self {
            Computation::Chunk { prefix, tokens, .. } => prefix.len() + tokens.len(),
            Computation::AttentionInputs { tokens, .. } => tokens.len(),
            Computation::ChunkAttention { prefix, chunks, .. } => {
                prefix.len() + chunks.iter().map(Vec::len).sum::<usize>()
            }
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
    /// What runs and waits is to end without being completed.
    pub(crate) cut_off: AtomicBool,
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

    /// Ends all that runs and waits, saying why.
    fn fail_all(&mut self, why: &str) {
        self.sequences.iter_mut().for_each(|sequence| sequence.fail(EngineError::Stopped(why.into())));
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
        let (mut open, mut idle) = (true, false);
        while open || !queue.is_empty() {
            // Shutdown comes once: nothing may be waited for behind it.
            open = open && self.take_commands(&mut queue, idle);
            idle = !self.round(&mut queue);
            if idle && !open {
                std::thread::sleep(LOOK);
            }
            if self.load.lost.load(Ordering::Relaxed) {
                tracing::error!("the GPU does not work any more: the engine stops, start the program again");
                self.load.stopping.store(true, Ordering::Release);
                return queue.fail_all("the GPU does not work any more: start the program again");
            }
            if self.load.cut_off.load(Ordering::Acquire) {
                return queue.fail_all("it is shutting down, and the answer was not complete");
            }
        }
    }

    /// A computation and a step; whether there was anything to do. A panic that nothing narrower has caught ends all that run.
    fn round(&self, queue: &mut Queue) -> bool {
        let round = || {
            let computed = self.compute(queue);
            self.cycle(queue) || computed
        };
        let done = catch_unwind(AssertUnwindSafe(round));
        done.unwrap_or_else(|panic| {
            self.recover(queue, &*panic);
            true
        })
    }

    /// After a panic somewhere in a step: what ran is in an unknown state, and so are the pages that it shared. All of that
    /// goes. What waits holds nothing, and goes on.
    fn recover(&self, queue: &mut Queue, panic: &(dyn Any + Send)) {
        let message = message(panic);
        tracing::error!(message, "a step panicked: the requests that ran have failed");
        queue.cache = PrefixCache::new();
        queue.sequences.retain_mut(|sequence| {
            if sequence.runs() {
                sequence.fail(EngineError::Panicked { doing: "running a step", message: message.clone() });
            }
            !sequence.runs()
        });
        queue.running = 0;
        queue.full_at = None;
        self.report(queue);
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

    /// One step of all that run; whether there was anything to do.
    fn cycle(&self, queue: &mut Queue) -> bool {
        self.settle(queue);
        let mut busy = self.remove_ended(queue);
        if !queue.sequences.is_empty() {
            let entries = self.entries(queue);
            let mut step = plan(&self.limits, queue.used(self.limits.page_bytes), &entries, queue.running);
            if let Some(needed) = step.out_of_memory {
                self.arrange(queue, &step.preempted, queue.running - step.preempted.len());
                queue.sequences[0].out_of_memory(needed, self.limits.budget);
            } else {
                self.arrange(queue, &step.preempted, step.tokens.len());
                self.make_room(queue, &mut step);
                busy |= self.execute(queue, &step.tokens);
            }
            busy |= self.remove_ended(queue);
        }
        self.report(queue);
        busy
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

    /// Takes what has been sent, waiting for it when there is nothing to do, and a moment when all that run wait (`idle`).
    /// False once shutdown was.
    fn take_commands(&self, queue: &mut Queue, idle: bool) -> bool {
        let (mut empty, mut idle) = (queue.is_empty(), idle);
        loop {
            let command = if std::mem::take(&mut empty) {
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else if std::mem::take(&mut idle) {
                self.commands.recv_timeout(LOOK).map_err(|error| match error {
                    RecvTimeoutError::Timeout => TryRecvError::Empty,
                    RecvTimeoutError::Disconnected => TryRecvError::Disconnected,
                })
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit(submitted)) => self.enqueue(queue, submitted),
                Ok(Command::Compute(computation)) => queue.computations.push_back(computation),
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => {
                    self.load.stopping.store(true, Ordering::Release);
                    return false;
                }
            }
        }
    }

    fn enqueue(&self, queue: &mut Queue, submitted: Submitted) {
        let events = submitted.events.clone();
        match guarded("taking a request", || Ok(self.sequence(submitted))) {
            Ok(sequence) => queue.sequences.push(sequence),
            Err(error) => drop(events.send(Event::Failed(error))),
        }
    }

    /// Runs the first of the computations that wait, if there is room for its KV: at most one between two steps, as
    /// whoever asks for one may ask again at once. Where nothing runs, nothing else will make room. Whether one ran.
    fn compute(&self, queue: &mut Queue) -> bool {
        let Some(first) = queue.computations.front() else { return false };
        if queue.running > 0 && !self.fits(queue, first) {
            return false;
        }
        let Some(first) = queue.computations.pop_front() else { return false };
        self.make_room_for(queue, first.tokens());
        // Whoever asked may have gone away: then the reply is dropped.
        match first {
            Computation::Chunk { prefix, tokens, reply } => {
                let step = self.config.prefill_chunk.max(1);
                let compute = || ChunkKv::compute(&self.model, &prefix, &tokens, step);
                drop(reply.send(self.watched(guarded("computing a chunk", compute))));
            }
            Computation::AttentionInputs { tokens, reply } => {
                let compute = || self.attention_inputs(&tokens);
                drop(reply.send(self.watched(guarded("computing a text", compute))));
            }
            Computation::ChunkAttention { prefix, chunks, reply } => {
                let compute = || self.chunk_attention(&prefix, &chunks);
                drop(reply.send(self.watched(guarded("reading chunks", compute))));
            }
            Computation::Context { prefix, chunks, blend, reply } => {
                let compute = || self.prepare(&prefix, &chunks, &blend);
                drop(reply.send(self.watched(guarded("preparing a context", compute))));
            }
        }
        true
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
        let room = self.max_context.saturating_sub(context + request.prompt.len());
        let forced = request.forced.as_ref().map_or(room, |tokens| tokens.len());
        let limit = request.max_tokens.unwrap_or(room).min(room).min(forced);
        Sequence::new(submitted, &self.model, &self.tokenizer, limit, self.root, self.config.wait_for_index)
    }

    /// Forgets what is done and what nobody waits for any more; whether there was any.
    fn remove_ended(&self, queue: &mut Queue) -> bool {
        let before = queue.sequences.len();
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
            }
            !ended
        });
        queue.running = running;
        queue.sequences.len() < before
    }

    /// Has those at the places `preempted` (ascending) lose their KV and become the first of those that wait, and makes the
    /// first `running` of the queue run: those that are new get what is there.
    fn arrange(&self, queue: &mut Queue, preempted: &[usize], running: usize) {
        for place in preempted.iter().rev() {
            let mut sequence = queue.sequences.remove(*place);
            sequence.preempt(&mut queue.cache, &self.model, &self.load);
            queue.running -= 1;
            queue.sequences.insert(queue.running, sequence);
            self.load.preemptions.fetch_add(1, Ordering::Relaxed);
        }
        for sequence in queue.sequences.iter_mut().take(running).skip(queue.running) {
            if let Some((asked, found)) = sequence.admit(&mut queue.cache) {
                self.load.prefix_queries.fetch_add(asked as u64, Ordering::Relaxed);
                self.load.prefix_hits.fetch_add(found as u64, Ordering::Relaxed);
            }
        }
        queue.running = running;
        self.settle(queue);
    }

    /// What left the windows of those that run finds its place, so that what they hold is what is counted.
    fn settle(&self, queue: &mut Queue) {
        // On a GPU, what is free of the host's memory; what one of them begins to take is not there for the next.
        let on_gpu = self.model.device().is_some();
        let mut room = if on_gpu { self.limits.budget.minus(queue.used(self.limits.page_bytes)).host } else { 0 };
        for sequence in &mut queue.sequences[..queue.running] {
            let before = sequence.private_bytes(Bytes::default()).host;
            let settled = self.watched(sequence.settle(&mut queue.cache, &self.model, room));
            settled.unwrap_or_else(|error| sequence.fail(error));
            if on_gpu {
                room = (room + before).saturating_sub(sequence.private_bytes(Bytes::default()).host);
            }
        }
    }

    /// Pages that nobody uses give way to those that a step takes. Where a GPU has too few even so, as some are taken that no
    /// request accounts for (by prepared contexts), the youngest that hold some give way too, or wait.
    fn make_room(&self, queue: &mut Queue, step: &mut Step) {
        let tokens = &mut step.tokens;
        let growth = queue.sequences.iter().zip(&*tokens).map(|(s, n)| self.limits.bytes(n.saturating_sub(s.room())));
        let growth = growth.sum();
        self.evict_for(queue, growth);
        let missing = |queue: &Queue, tokens: &[usize]| -> usize {
            queue.sequences.iter().zip(tokens).map(|(s, n)| s.missing_on_device(*n)).sum()
        };
        while !self.make_free(queue, missing(queue, tokens)) {
            let frees = |place: &usize| {
                let entry = queue.sequences[*place].running_entry(&queue.cache, 1, self.limits.page_bytes);
                entry.own.device > 0
            };
            if let Some(place) = (1..tokens.len()).rev().find(frees) {
                tokens.remove(place);
                self.arrange(queue, &[place], tokens.len());
            } else if let Some(tokens) = tokens.iter_mut().skip(1).rev().find(|tokens| **tokens > 0) {
                *tokens = 0;
            } else {
                // Nobody is left to give way. Where no answer has begun, reading says what is missing.
                if tokens.first().is_some_and(|tokens| *tokens > 0) && queue.sequences[0].cut() {
                    tokens[0] = 0;
                }
                break;
            }
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

    /// Blends contexts, and reads the tokens of all others in one batch; whether there was any.
    fn execute(&self, queue: &mut Queue, tokens: &[usize]) -> bool {
        let (mut batch, mut busy) = (Vec::new(), false);
        for (sequence, &tokens) in queue.sequences.iter_mut().zip(tokens).filter(|(_, tokens)| **tokens > 0) {
            match sequence.phase {
                Phase::Context => {
                    busy = true;
                    let blended = self.watched(sequence.blend(&self.model, &mut queue.cache));
                    blended.unwrap_or_else(|error| sequence.fail(error));
                }
                // One that was admitted in this step may have begun to build an index.
                Phase::Text if sequence.waits_for_index() => {}
                Phase::Text => batch.push((sequence, tokens)),
                Phase::Done => {}
            }
        }
        if !batch.is_empty() {
            busy = true;
            self.forward(&mut batch, &mut queue.cache);
        }
        busy
    }

    fn forward(&self, batch: &mut [(&mut Sequence, usize)], cache: &mut PrefixCache<SharedPage>) {
        let mut pieces: Vec<Piece<'_>> = batch.iter_mut().map(|(s, tokens)| s.piece(*tokens)).collect();
        let states = guarded("reading tokens", || self.model.forward(&mut pieces));
        let read: Vec<_> = pieces.into_iter().map(|p| (p.stats, p.want == Want::Last, p.failed)).collect();
        let on_gpu = self.model.device().is_some();
        let wanted = batch.iter_mut().zip(&read).filter(|(_, (_, last, _))| *last);
        let choices = wanted.map(|((s, _), _)| if on_gpu { s.choice() } else { Choice::Logits }).collect::<Vec<_>>();
        let nexts = states.and_then(|states| guarded("choosing tokens", || self.model.next(&states, &choices)));
        let nexts = match self.watched(nexts) {
            Ok(nexts) => nexts,
            // One step, one fate: which sequence was at fault is not known.
            Err(error) => return batch.iter_mut().for_each(|(s, _)| s.fail(for_each(&error))),
        };
        let mut nexts = nexts.into_iter();
        for ((sequence, tokens), (stats, last, failed)) in batch.iter_mut().zip(read) {
            let next = if last { nexts.next() } else { None };
            if let Some(error) = failed {
                sequence.fail(error);
                continue;
            }
            sequence.advance(*tokens, stats, cache);
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

    /// What the tokens of chunks attend.
    fn chunk_attention(&self, prefix: &[u32], chunks: &[Vec<u32>]) -> Result<ChunkAttention> {
        let begun = Instant::now();
        let lengths: Vec<usize> = chunks.iter().map(Vec::len).collect();
        let mut sums = ChunkSums::new(&self.model, prefix.len(), &lengths)?;
        let mut kv = self.model.new_kv();
        let step = self.config.prefill_chunk.max(1).min(self.model.most_rows());
        for part in [prefix.to_vec(), chunks.concat()].concat().chunks(step) {
            let piece = Piece::exact(&mut kv, part, Want::Nothing);
            self.model.forward(&mut [Piece { sums: Some(&mut sums), ..piece }])?;
        }
        let [own, prefix] = sums.finish(&self.model)?;
        Ok(ChunkAttention { own, prefix, seconds: begun.elapsed().as_secs_f64() })
    }

    fn prepare(&self, prefix: &[u32], chunks: &[PromptChunk], config: &BlendConfig) -> Result<PreparedContext> {
        let begun = Instant::now();
        let mut blended = blend(&self.model, &Context::unasked(prefix, chunks), config, &|| false)?;
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
        EngineError::Panicked { doing, message } => EngineError::Panicked { doing, message: message.clone() },
        other => EngineError::Internal(other.to_string()),
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
