//! The engine's thread: takes commands and executes the steps that the scheduler plans.

mod room;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use crate::config::EngineConfig;
use crate::error::{EngineError, Result};
use crate::job::{Computation, Job};
use crate::kv::prefix::SharedPage;
use crate::model::transformer::{Piece, States, Transformer, Want};
use crate::prefix_cache::{PageKey, PrefixCache};
use crate::request::Event;
use crate::sampler::Choice;
use crate::scheduler::{Bytes, Entry, Limits, Queued, Step, plan};
use crate::sequence::{Blending, Phase, Sequence, Submitted};
use crate::tiers::{ChunkReader, ChunkTiers};
use crate::tokenizer::Tokenizer;
use crate::unwind::{guarded, message};

/// How often the engine looks whether something has changed while all that run wait for indexes or for cached layers.
const LOOK: Duration = Duration::from_millis(2);

/// What the engine's thread is told.
pub(crate) enum Command {
    Submit(Submitted),
    Compute(Computation),
    /// Chunks that have been read are to be kept on the GPU; how many of them are.
    Keep(Vec<ChunkReader>, Sender<Result<usize>>),
    Shutdown,
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

/// All requests by age, of which the first run, and the pages they share; beside them what is computed for none.
pub(crate) struct Queue {
    sequences: Vec<Sequence>,
    running: usize,
    cache: PrefixCache<SharedPage>,
    /// By age; the first have begun.
    jobs: Vec<Job>,
    begun: usize,
    /// Requests and jobs that have come.
    come: u64,
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
            jobs: Vec::new(),
            begun: 0,
            come: 0,
            full_at: None,
        }
    }

    /// Ends all that runs and waits, saying why.
    fn fail_all(&mut self, why: &str) {
        self.sequences.iter_mut().for_each(|sequence| sequence.fail(EngineError::Stopped(why.into())));
        self.jobs.iter_mut().for_each(|job| job.fail(EngineError::Stopped(why.into())));
    }

    fn is_empty(&self) -> bool {
        self.sequences.is_empty() && self.jobs.is_empty()
    }

    /// Bytes that those that run hold.
    fn used(&self, page: Bytes) -> Bytes {
        let private = self.sequences[..self.running].iter().map(|s| s.private_bytes(page)).sum::<Bytes>();
        let jobs = self.jobs[..self.begun].iter().map(Job::bytes).sum::<Bytes>();
        private + jobs + page.times(self.cache.in_use())
    }

    /// The age of who comes now.
    fn next_age(&mut self) -> u64 {
        self.come += 1;
        self.come
    }

    /// Contexts that are in the making.
    fn blending(&self) -> usize {
        let requests = self.sequences.iter().filter(|sequence| sequence.is_blending()).count();
        requests + self.jobs.iter().filter(|job| job.is_blending()).count()
    }

    /// Whether one of them waits for memory that the others have.
    fn holds_back(&self) -> bool {
        self.sequences.iter().any(Sequence::is_held_back) || self.jobs.iter().any(Job::is_held_back)
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
    pub(crate) tiers: Arc<ChunkTiers>,
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

    /// A step; whether there was anything to do. A panic that nothing narrower has caught ends all that run.
    fn round(&self, queue: &mut Queue) -> bool {
        let done = catch_unwind(AssertUnwindSafe(|| self.cycle(queue)));
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
        for mut job in queue.jobs.drain(..queue.begun) {
            job.fail(EngineError::Panicked { doing: "running a step", message: message.clone() });
        }
        queue.begun = 0;
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
        if !queue.is_empty() {
            let (requests, jobs) = self.entries(queue);
            let (running, begun, used) = (queue.running, queue.begun, queue.used(self.limits.page_bytes));
            let queued = Queued { requests: &requests, running, jobs: &jobs, begun, used };
            let mut step = plan(&self.limits, &queued);
            if let Some(needed) = step.out_of_memory {
                self.arrange(queue, &step.preempted, queue.running - step.preempted.len());
                queue.sequences[0].out_of_memory(needed, self.limits.budget);
            } else {
                self.arrange(queue, &step.preempted, step.tokens.len());
                self.begin_jobs(queue, &mut step);
                self.make_room(queue, &mut step);
                busy |= self.execute(queue, &step);
            }
            busy |= self.remove_ended(queue);
        }
        self.report(queue);
        busy
    }

    /// What the scheduler sees of requests and jobs. Nobody is admitted where one more was too many before.
    fn entries(&self, queue: &mut Queue) -> (Vec<Entry>, Vec<Entry>) {
        let (chunk, page) = (self.config.prefill_chunk.max(1), self.limits.page_bytes);
        queue.full_at = queue.full_at.filter(|then| self.pages_to_be_had(queue, then + 1) <= *then);
        let full = queue.running > 0 && queue.full_at.is_some();
        if queue.blending() == 0 {
            queue.sequences.iter_mut().for_each(Sequence::let_go);
            queue.jobs.iter_mut().for_each(Job::let_go);
        }
        let Queue { sequences, running, cache, jobs, .. } = queue;
        let (run, wait) = sequences.split_at_mut(*running);
        let free = if full { 0 } else { self.limits.max_sequences - run.len() };
        let wait = wait.iter_mut().take(free);
        let run = run.iter_mut().map(|s| s.running_entry(&self.model, cache, chunk, page));
        let requests = run.chain(wait.map(|s| s.waiting_entry(cache, chunk))).collect();
        (requests, jobs.iter_mut().map(|job| job.entry(&self.model, chunk)).collect())
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
                Ok(Command::Compute(computation)) => {
                    let age = queue.next_age();
                    queue.jobs.push(Job::new(computation, age, self.identity, &self.model));
                }
                // Whoever asked may have gone away.
                Ok(Command::Keep(chunks, reply)) => {
                    let keep = || self.tiers.keep_on_device(self.model.device(), &chunks);
                    drop(reply.send(self.watched(guarded("keeping chunks on the GPU", keep))));
                }
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
        let age = queue.next_age();
        match guarded("taking a request", || Ok(self.sequence(submitted, age))) {
            Ok(sequence) => queue.sequences.push(sequence),
            Err(error) => drop(events.send(Event::Failed(error))),
        }
    }

    fn sequence(&self, submitted: Submitted, age: u64) -> Sequence {
        let request = &submitted.request;
        let context = request.context.as_ref().map_or(0, |c| c.len());
        let room = self.max_context.saturating_sub(context + request.prompt.len());
        let forced = request.forced.as_ref().map_or(room, |tokens| tokens.len());
        let limit = request.max_tokens.unwrap_or(room).min(room).min(forced);
        Sequence::new(submitted, age, &self.model, &self.tokenizer, limit, self.root, self.config.wait_for_index)
    }

    /// Forgets what is done and what nobody waits for any more; whether there was any.
    fn remove_ended(&self, queue: &mut Queue) -> bool {
        let before_jobs = queue.jobs.len();
        let before = queue.sequences.len() + before_jobs;
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
        queue.jobs.retain(|job| !job.has_ended());
        queue.begun -= before_jobs - queue.jobs.len();
        queue.sequences.len() + queue.jobs.len() < before
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

    /// Goes on with contexts, and reads the tokens of all others in one batch; whether there was any. Where all that is left waits
    /// for a cached layer, waits for the oldest's a while.
    fn execute(&self, queue: &mut Queue, step: &Step) -> bool {
        // Who blends in this step reads no text in it: that is not what it was granted.
        let reads: Vec<bool> = queue.sequences.iter().map(|sequence| sequence.phase == Phase::Text).collect();
        let mut busy = self.blend(queue, step);
        let Queue { sequences, jobs, cache, .. } = &mut *queue;
        let mut batch = Vec::new();
        for ((sequence, &tokens), reads) in sequences.iter_mut().zip(&step.tokens).zip(reads) {
            // One that was admitted in this step may have begun to build an index.
            if reads && tokens > 0 && sequence.phase == Phase::Text && !sequence.waits_for_index() {
                batch.push((sequence, tokens));
            }
        }
        let jobs = jobs.iter_mut().zip(&step.jobs).filter(|(job, tokens)| **tokens > 0 && job.is_text());
        let mut texts: Vec<(&mut Job, usize)> = jobs.map(|(job, tokens)| (job, *tokens)).collect();
        if !batch.is_empty() || !texts.is_empty() {
            busy = true;
            self.forward(&mut batch, &mut texts, cache);
        }
        if !busy && queue.blending() > 0 {
            let mut waiting = queue.sequences.iter_mut().filter(|sequence| sequence.is_blending());
            match (waiting.next(), queue.jobs.iter_mut().find(|job| job.is_blending())) {
                (Some(sequence), _) => sequence.wait_for_layer(LOOK),
                (None, Some(job)) => job.wait_for_layer(LOOK),
                (None, None) => false,
            };
            return true;
        }
        busy
    }

    /// Goes on with the contexts that are granted something; whether anything was done.
    fn blend(&self, queue: &mut Queue, step: &Step) -> bool {
        let mut busy = false;
        for (place, &tokens) in step.tokens.iter().enumerate() {
            let (held_back, blending) = (queue.holds_back(), queue.blending());
            let Queue { sequences, cache, .. } = &mut *queue;
            let sequence = &mut sequences[place];
            // None begins while there is no memory for another one.
            let goes_on = sequence.is_blending();
            if tokens == 0 || sequence.phase != Phase::Context || (held_back && !goes_on) {
                continue;
            }
            let others = blending > usize::from(goes_on);
            match self.watched(sequence.go_on_blending(&self.model, &self.tiers, tokens, cache)) {
                Ok(Blending::Waits) => {}
                Ok(Blending::Went) => busy = true,
                Ok(Blending::Read(states)) => {
                    busy = true;
                    let chosen = self.choose(sequence, &states);
                    chosen.unwrap_or_else(|error| sequence.fail(error));
                }
                Err(EngineError::OutOfMemory { .. }) if others => sequence.hold_back(),
                Err(error) => sequence.fail(error),
            }
        }
        for (place, &tokens) in step.jobs.iter().enumerate() {
            let (held_back, blending) = (queue.holds_back(), queue.blending());
            let job = &mut queue.jobs[place];
            let goes_on = job.is_blending();
            if tokens == 0 || job.is_text() || (held_back && !goes_on) {
                continue;
            }
            let others = blending > usize::from(goes_on);
            match self.watched(job.go_on_blending(&self.model, &self.tiers, tokens)) {
                Ok(done) => busy |= done,
                Err(EngineError::OutOfMemory { .. }) if others => job.hold_back(),
                Err(error) => job.fail(error),
            }
        }
        busy
    }

    /// Chooses what follows the last token of a prompt whose final state is there.
    fn choose(&self, sequence: &mut Sequence, states: &States) -> Result<()> {
        let choice = if self.model.device().is_some() { sequence.choice() } else { Choice::Logits };
        let next = guarded("choosing tokens", || self.model.next(states, &[choice]));
        let next = self.watched(next)?.pop();
        next.map_or_else(
            || Err(EngineError::Internal("no token follows a prompt".into())),
            |next| sequence.accept(next),
        )
    }

    /// Reads tokens of requests and of jobs, and chooses what follows those that have read all they have.
    fn forward(
        &self,
        batch: &mut [(&mut Sequence, usize)],
        jobs: &mut [(&mut Job, usize)],
        cache: &mut PrefixCache<SharedPage>,
    ) {
        let mut pieces: Vec<Piece<'_>> = batch.iter_mut().map(|(s, tokens)| s.piece(*tokens)).collect();
        pieces.extend(jobs.iter_mut().filter_map(|(job, tokens)| job.piece(*tokens)));
        let states = guarded("reading tokens", || self.model.forward(&mut pieces));
        let read: Vec<_> = pieces.into_iter().map(|p| (p.stats, p.want == Want::Last, p.failed)).collect();
        let on_gpu = self.model.device().is_some();
        let wanted = batch.iter_mut().zip(&read).filter(|(_, (_, last, _))| *last);
        let choices = wanted.map(|((s, _), _)| if on_gpu { s.choice() } else { Choice::Logits }).collect::<Vec<_>>();
        let nexts = states.and_then(|states| guarded("choosing tokens", || self.model.next(&states, &choices)));
        let nexts = match self.watched(nexts) {
            Ok(nexts) => nexts,
            // One step, one fate: which sequence was at fault is not known.
            Err(error) => {
                batch.iter_mut().for_each(|(s, _)| s.fail(for_each(&error)));
                return jobs.iter_mut().for_each(|(job, _)| job.fail(for_each(&error)));
            }
        };
        let (mut nexts, mut read) = (nexts.into_iter(), read.into_iter());
        for ((sequence, tokens), (stats, last, failed)) in batch.iter_mut().zip(read.by_ref()) {
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
        for ((job, tokens), (.., failed)) in jobs.iter_mut().zip(read) {
            match failed {
                Some(error) => job.fail(error),
                None => job.advance(*tokens, &self.model),
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

/// Asks the engine's thread for a computation and waits for the answer.
pub(crate) fn ask<T>(
    commands: &Sender<Command>,
    computation: impl FnOnce(Sender<Result<T>>) -> Computation,
) -> Result<T> {
    ask_for(commands, |reply| Command::Compute(computation(reply)))
}

/// Gives the engine's thread a command and waits for the answer.
pub(crate) fn ask_for<T>(commands: &Sender<Command>, command: impl FnOnce(Sender<Result<T>>) -> Command) -> Result<T> {
    let stopped = || EngineError::Stopped("its thread takes no more commands".into());
    let (reply, answer) = mpsc::channel();
    commands.send(command(reply)).map_err(|_| stopped())?;
    answer.recv().map_err(|_| stopped())?
}

#[cfg(test)]
#[path = "runner/tests.rs"]
mod tests;
