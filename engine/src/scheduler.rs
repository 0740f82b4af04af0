//! Which requests run, and what each of them does in the next step. Pure policy: plain data in, a [`Step`] out.
//!
//! All requests stand in one queue, in the order in which they came; those that run are its first. So nothing overtakes
//! anything, and the oldest always runs. What is computed for no request (chunks for the store, prepared contexts: *jobs*)
//! stands in a queue of its own beside it, and takes its turns by age:
//!
//! * **Every step decodes all that decode**, one token each; what the budget of tokens leaves is filled with parts of
//!   prompts, oldest first (stall-free batching, Sarathi-Serve, arXiv 2403.02310, algorithm 3). Tokens between two
//!   tokens of an answer are thus bounded, whatever else is read; more tightly than where nobody waits for one, and prompts
//!   are read faster in larger steps. A context that is blended goes on by as much work as reading the granted tokens would be;
//!   one whose next layer has not come from its source yet is granted nothing, and holds nobody up. Jobs take from the same
//!   budget: between two tokens of an answer there is no more work because of them.
//! * **A prompt is admitted when there is room for all of it** and a page for its answer, beside what the prompts before
//!   it still need: the length of a prompt is known. That of an answer is not, so nothing is reserved for it: pages
//!   are taken when they are needed, and when there is none, the youngest that holds what is short gives way, becomes the
//!   first that waits and is computed again later (PagedAttention, arXiv 2309.06180, section 4.5: all or nothing, last come
//!   first preempted; recomputing costs one prefill, while reserving the longest answer would leave most memory idle). Whoever
//!   holds nothing of it (all its pages are shared, or it is another memory) would give way for nothing, and stays.
//! * **Nothing waits forever**: the oldest is never preempted, so it ends, and then another is the oldest. Where it does
//!   not fit alone, it never will: its answer ends there, and it fails where it has none.
//! * **A job has all its memory from its beginning**, is never preempted and does not grow, so it ends, too; it needs no place
//!   among the requests that run. It begins when it fits beside what is promised and nobody older waits for memory; who is younger
//!   than a job that waits for memory is not admitted before it. Where the oldest request lacks what jobs hold, it waits for them.

use std::ops::Add;

/// Bytes of the device's and of the host's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) device: u64,
    pub(crate) host: u64,
}

impl Bytes {
    pub(crate) fn fits(self, budget: Bytes) -> bool {
        self.device <= budget.device && self.host <= budget.host
    }

    pub(crate) fn times(self, n: usize) -> Bytes {
        Bytes { device: self.device.saturating_mul(n as u64), host: self.host.saturating_mul(n as u64) }
    }

    /// Whether both have some of the same memory.
    fn meets(self, other: Bytes) -> bool {
        (self.device > 0 && other.device > 0) || (self.host > 0 && other.host > 0)
    }

    pub(crate) fn minus(self, other: Bytes) -> Bytes {
        Bytes { device: self.device.saturating_sub(other.device), host: self.host.saturating_sub(other.host) }
    }
}

impl Add for Bytes {
    type Output = Bytes;

    fn add(self, other: Bytes) -> Bytes {
        Bytes { device: self.device.saturating_add(other.device), host: self.host.saturating_add(other.host) }
    }
}

impl std::iter::Sum for Bytes {
    fn sum<I: Iterator<Item = Bytes>>(all: I) -> Bytes {
        all.fold(Bytes::default(), Add::add)
    }
}

/// Jobs that have begun, at most: several, so that small ones fill a step together.
pub(crate) const JOBS: usize = 4;

/// What a step may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Tokens of a step, over all sequences. Decoding is never held back by it, and a prompt reads one token at least.
    pub(crate) step_tokens: usize,
    /// Tokens of prompts in a step in which some sequence decodes at most, one at least.
    pub(crate) mixed_prefill_tokens: usize,
    /// Sequences that run at the same time.
    pub(crate) max_sequences: usize,
    /// Tokens of a page of KV, and its bytes over all layers.
    pub(crate) page_tokens: usize,
    pub(crate) page_bytes: Bytes,
    /// Bytes of KV that all running sequences may hold.
    pub(crate) budget: Bytes,
}

impl Limits {
    /// Bytes of the pages that `tokens` fill, from the beginning of a page.
    pub(crate) fn bytes(&self, tokens: usize) -> Bytes {
        self.page_bytes.times(tokens.div_ceil(self.page_tokens))
    }

    /// Pages that have to go so that `held` bytes fit.
    pub(crate) fn pages_over(&self, held: Bytes) -> usize {
        let over = held.minus(self.budget);
        let pages = |over: u64, page: u64| if page == 0 { 0 } else { over.div_ceil(page) };
        pages(over.device, self.page_bytes.device).max(pages(over.host, self.page_bytes.host)) as usize
    }
}

/// What a sequence has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A context is blended: of what is left, so much as reading `tokens` costs. Whatever it is granted, it then holds
    /// `takes` tokens more.
    Blend { tokens: usize, takes: usize },
    /// Up to so many tokens are read. `whole`: all of them in one step.
    Read { tokens: usize, whole: bool },
    /// The last token of the answer is read, another one is written.
    Decode,
    /// Nothing until others have done something: an index is built, a layer is read.
    Wait,
}

impl Work {
    /// Tokens by which its KV grows when it is granted so many.
    pub(crate) fn takes(self, granted: usize) -> usize {
        match self {
            Work::Blend { .. } if granted == 0 => 0,
            Work::Blend { takes, .. } => takes,
            Work::Read { .. } | Work::Decode | Work::Wait => granted,
        }
    }
}

/// A request as the scheduler sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) work: Work,
    /// Tokens by which its KV grows until it decodes, those of `work` included. For one that waits: all that it will
    /// hold, except for pages which running sequences hold already and share with it.
    pub(crate) ahead: usize,
    /// So many of the tokens ahead fit into pages that it holds.
    pub(crate) room: usize,
    /// Bytes that only it holds: what is free once it is preempted.
    pub(crate) own: Bytes,
    /// Bytes that it holds together with others.
    pub(crate) shared: Bytes,
    /// The smaller, the older; of requests and jobs alike.
    pub(crate) age: u64,
}

impl Entry {
    /// Bytes of the pages that it takes for its next `tokens`.
    fn growth(&self, limits: &Limits, tokens: usize) -> Bytes {
        limits.bytes(tokens.saturating_sub(self.room))
    }
}

/// All that stands before the scheduler, by age.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Queued<'a> {
    /// Requests, of which the first `running` run.
    pub(crate) requests: &'a [Entry],
    pub(crate) running: usize,
    /// Jobs, of which the first `begun` hold their memory.
    pub(crate) jobs: &'a [Entry],
    pub(crate) begun: usize,
    /// Bytes that all of those hold.
    pub(crate) used: Bytes,
}

/// What happens next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Step {
    /// Places, ascending, of those that run no longer: they become the first of those that wait.
    pub(crate) preempted: Vec<usize>,
    /// Tokens that each of those that run from now on is granted: those that stay, and behind them those that are admitted.
    pub(crate) tokens: Vec<usize>,
    /// The same of jobs: those that have begun, and behind them those that begin.
    pub(crate) jobs: Vec<usize>,
    /// The oldest does not fit, although nobody else holds what it lacks: so many bytes it needs. Then nothing else is planned.
    pub(crate) out_of_memory: Option<Bytes>,
}

/// Plans a step.
pub(crate) fn plan(limits: &Limits, queued: &Queued<'_>) -> Step {
    let share = Share::new(limits, &queued.requests[..queued.running]);
    let mut plan = Plan { limits, queued, used: queued.used, share, step: Step::default() };
    if plan.keep() {
        plan.admit();
    }
    plan.step
}

/// The tokens of a step that are left for prompts, contexts and jobs.
#[derive(Clone, Copy)]
struct Share {
    left: usize,
    /// Whether some of them are granted already.
    taken: bool,
}

impl Share {
    fn new(limits: &Limits, running: &[Entry]) -> Share {
        let decoding = running.iter().filter(|e| e.work == Work::Decode).count();
        let most = if decoding > 0 { limits.mixed_prefill_tokens } else { usize::MAX };
        Share { left: limits.step_tokens.saturating_sub(decoding).min(most).max(1), taken: false }
    }

    /// The tokens that a running sequence is granted. What is whole may exceed the budget when it is the first.
    fn grant(&mut self, work: Work) -> usize {
        let granted = match work {
            Work::Decode => return 1,
            Work::Wait => return 0,
            Work::Read { tokens, whole: true } if self.taken && tokens > self.left => 0,
            Work::Read { tokens, whole: true } => tokens,
            Work::Blend { tokens, .. } | Work::Read { tokens, whole: false } => tokens.min(self.left),
        };
        self.taken |= granted > 0;
        self.left = self.left.saturating_sub(granted);
        granted
    }
}

struct Plan<'a> {
    limits: &'a Limits,
    queued: &'a Queued<'a>,
    /// Bytes that are held once the step is done.
    used: Bytes,
    share: Share,
    step: Step,
}

impl Plan<'_> {
    /// Gives those that run their tokens and pages, oldest first. False when not all had room.
    fn keep(&mut self) -> bool {
        let running = self.queued.running;
        let mut stays = vec![true; running];
        let mut all = true;
        for (i, entry) in self.queued.requests[..running].iter().enumerate() {
            if !stays[i] {
                continue;
            }
            self.go_on_with_jobs(entry.age);
            let share = self.share;
            let tokens = self.share.grant(entry.work);
            let growth = entry.growth(self.limits, entry.work.takes(tokens));
            let missing = self.make_room(&mut stays, i, growth);
            if missing == Bytes::default() {
                self.used = self.used + growth;
                self.step.tokens.push(tokens);
                continue;
            }
            all = false;
            if i == 0 {
                // Nobody is left to give way. What others shared with each other alone is free, too, although `used` counts it.
                let needed = entry.own + entry.shared + growth;
                if !needed.fits(self.limits.budget) {
                    self.step.out_of_memory = Some(needed);
                    self.step.tokens.push(0);
                    break;
                }
                if self.begun_jobs().iter().any(|job| job.own.meets(missing)) {
                    self.share = share;
                    self.step.tokens.push(0);
                    continue;
                }
                self.step.tokens.push(tokens);
                self.used = self.used + growth;
            } else if entry.own.meets(missing) {
                stays[i] = false;
                self.used = self.used.minus(entry.own);
            } else {
                // It holds nothing of what is short: it waits for it with what it has.
                self.share = share;
                self.step.tokens.push(0);
            }
        }
        self.go_on_with_jobs(u64::MAX);
        self.step.preempted = (0..running).filter(|i| !stays[*i]).collect();
        all && self.step.preempted.is_empty()
    }

    fn begun_jobs(&self) -> &[Entry] {
        &self.queued.jobs[..self.queued.begun]
    }

    /// Gives jobs that have begun and are older than `age` their tokens.
    fn go_on_with_jobs(&mut self, age: u64) {
        while let Some(job) = self.begun_jobs().get(self.step.jobs.len()).filter(|job| job.age < age) {
            let work = job.work;
            let tokens = self.share.grant(work);
            self.step.jobs.push(tokens);
        }
    }

    /// Has the youngest behind `place` that hold what `growth` is short of give way, until it fits. What is still missing.
    ///
    /// For the oldest, whatever is held beyond the budget is short: indexes grow between steps.
    fn make_room(&mut self, stays: &mut [bool], place: usize, growth: Bytes) -> Bytes {
        loop {
            let mut missing = (self.used + growth).minus(self.limits.budget);
            if place > 0 {
                missing.device = if growth.device > 0 { missing.device } else { 0 };
                missing.host = if growth.host > 0 { missing.host } else { 0 };
            }
            if missing == Bytes::default() {
                return missing;
            }
            let queue = self.queued.requests;
            let youngest = |frees: &dyn Fn(&Entry) -> bool| {
                (place + 1..stays.len()).rev().find(|i| stays[*i] && frees(&queue[*i]))
            };
            // Several may share pages with each other alone: these are free once the last of them has given way.
            let shares = |entry: &Entry| place == 0 && entry.shared.meets(missing);
            let found = youngest(&|entry| entry.own.meets(missing)).or_else(|| youngest(&shares));
            let Some(found) = found else { return missing };
            stays[found] = false;
            self.used = self.used.minus(queue[found].own);
        }
    }

    /// Lets the oldest of those that wait in, requests and jobs by age, while there is room for their prompts.
    fn admit(&mut self) {
        let unread = self.queued.requests.iter().zip(&self.step.tokens).map(|(entry, tokens)| {
            let takes = entry.work.takes(*tokens);
            entry.growth(self.limits, entry.ahead).minus(entry.growth(self.limits, takes))
        });
        let mut promised: Bytes = self.used + unread.sum();
        loop {
            let place = self.step.tokens.len() < self.limits.max_sequences;
            let request = self.queued.requests.get(self.step.tokens.len()).filter(|_| place);
            let job = self.queued.jobs.get(self.step.jobs.len()).filter(|_| self.step.jobs.len() < JOBS);
            let goes_on = match (request, job) {
                (Some(request), Some(job)) if job.age < request.age => self.begin(job, &mut promised),
                (Some(request), _) => self.let_in(request, &mut promised),
                (None, Some(job)) => self.begin(job, &mut promised),
                (None, None) => return,
            };
            if !goes_on {
                return;
            }
        }
    }

    /// Whether nothing runs.
    fn is_alone(&self) -> bool {
        self.step.tokens.is_empty() && self.step.jobs.is_empty()
    }

    /// Lets a request in, if there is room for its prompt, and a page for its answer beside others. Whether there is.
    fn let_in(&mut self, entry: &Entry, promised: &mut Bytes) -> bool {
        let alone = self.is_alone();
        let prompt = self.limits.bytes(entry.ahead);
        let wanted = *promised + prompt + if alone { Bytes::default() } else { self.limits.page_bytes };
        if !wanted.fits(self.limits.budget) {
            if alone {
                self.step.tokens.push(0);
                self.step.out_of_memory = Some(wanted);
            }
            return false;
        }
        if self.share.left == 0 {
            return false;
        }
        // One that was preempted while it wrote reads its last tokens like a prompt.
        let work = if entry.work == Work::Decode { Work::Read { tokens: 1, whole: false } } else { entry.work };
        let tokens = self.share.grant(work);
        if tokens == 0 {
            return false;
        }
        *promised = *promised + prompt;
        self.step.tokens.push(tokens);
        true
    }

    /// Lets a job begin, if there is room for all of it. Whether there is. Alone it does in any case: nothing else makes room.
    fn begin(&mut self, job: &Entry, promised: &mut Bytes) -> bool {
        let whole = self.limits.bytes(job.ahead);
        if self.share.left == 0 || !(self.is_alone() || (*promised + whole).fits(self.limits.budget)) {
            return false;
        }
        *promised = *promised + whole;
        let tokens = self.share.grant(job.work);
        self.step.jobs.push(tokens);
        true
    }
}

#[cfg(test)]
#[path = "scheduler/tests.rs"]
mod tests;
