//! One request, from its admission to its end.

mod answer;
mod context;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::answer_text::AnswerText;
use crate::attention::cold::ColdStats;
use crate::blend::Blend;
use crate::config::Strategy;
use crate::error::Result;
use crate::kv::prefix::{SharedPage, SharedPages};
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Piece, Transformer, Want};
use crate::prefix_cache::{PageKey, PrefixCache};
use crate::request::{Event, FinishReason, PrefillStats, Request};
use crate::runner::{Load, never_fits};
use crate::sampler::Sampler;
use crate::scheduler::{Bytes, Entry, Work};
use crate::tokenizer::Tokenizer;
use crate::unwind::guarded;
pub(crate) use context::Blending;

/// Where a request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The context's KV is still to be made.
    Context,
    /// Text behind the context is read: the rest of the prompt, and the answer as it grows.
    Text,
    /// Nothing is left to do.
    Done,
}

/// A request as it was handed in.
pub(crate) struct Submitted {
    pub(crate) request: Box<Request>,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) at: Instant,
    pub(crate) waiting: Waiting,
}

/// Counts a request among those that wait, as long as it lives.
pub(crate) struct Waiting(Arc<Load>);

impl Waiting {
    /// Also says how many others wait.
    pub(crate) fn new(load: &Arc<Load>) -> (Waiting, usize) {
        let others = load.waiting.fetch_add(1, Ordering::AcqRel);
        (Waiting(Arc::clone(load)), others)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A request with its KV and the state of its answer.
///
/// Prompt and answer are one text, and decoding is reading its last token. So a sequence that has lost its KV goes on
/// where it was by reading its text again; sampler, stop strings and reported events are not touched by that.
pub(crate) struct Sequence {
    request: Request,
    kv: SequenceKv,
    pub(crate) phase: Phase,
    /// Its place among all that have come: the smaller, the older.
    age: u64,
    /// The context's KV in the making, which then is what `kv` holds.
    blend: Option<Box<Blend>>,
    /// Whether there was no memory for its blend beside others: it begins again once those are done.
    held_back: bool,
    /// `None` while it runs.
    waiting: Option<Waiting>,
    events: UnboundedSender<Event>,
    /// What is read behind the context: `prompt` tokens of the prompt, then the answer.
    text: Vec<u32>,
    prompt: usize,
    /// Tokens of `text` whose KV is held.
    read: usize,
    /// Tokens of `text` that have been read once.
    seen: usize,
    /// Tokens before the text.
    context: usize,
    /// Whether tokens before the suffix exist, so that the strategy holds for the suffix too.
    has_context: bool,
    /// Whether the context has been blended once.
    blended: bool,
    /// `None`: its pages are not shared.
    shared: Option<SharedPages>,
    /// Whether what leaves the window waits for its index, instead of being attended exactly meanwhile.
    wait_for_index: bool,
    submitted: Instant,
    admitted: Option<Instant>,
    /// When the first token of the answer was known.
    decoding: Option<Instant>,
    prefill: PrefillStats,
    steps: usize,
    limit: usize,
    cold: ColdStats,
    /// Of KV that has been dropped.
    index_seconds: f64,
    index_failures: usize,
    sampler: Sampler,
    answer: AnswerText,
    eos: Arc<[u32]>,
}

impl Sequence {
    /// `age`: its place among all that have come; `limit`: tokens of the answer at most; `root`: of the prefix cache, if there
    /// is one.
    pub(crate) fn new(
        submitted: Submitted,
        age: u64,
        model: &Transformer,
        tokenizer: &Tokenizer,
        limit: usize,
        root: Option<PageKey>,
        wait_for_index: bool,
    ) -> Sequence {
        let Submitted { request, events, at, waiting } = submitted;
        let mut request = *request;
        let mut sampler = Sampler::new(request.sampling.clone());
        sampler.observe(&request.prompt.prefix);
        request.prompt.chunks.iter().for_each(|c| sampler.observe(&c.tokens));
        sampler.observe(&request.prompt.suffix);
        let mut text = std::mem::take(&mut request.prompt.suffix);
        let has_context = request.context.is_some() || !request.prompt.chunks.is_empty();
        if !has_context {
            // A prefix without chunks is an ordinary beginning of the prompt.
            text.splice(0..0, std::mem::take(&mut request.prompt.prefix));
        }
        let kv = model.new_kv();
        Sequence {
            phase: first_phase(&request),
            age,
            blend: None,
            held_back: false,
            waiting: Some(waiting),
            wait_for_index,
            events,
            prompt: text.len(),
            text,
            read: 0,
            seen: 0,
            context: request.context.as_ref().map_or_else(|| request.prompt.len(), |c| c.len()),
            has_context,
            blended: false,
            shared: root.filter(|_| request.context.is_none()).map(|root| SharedPages::new(root, &kv)),
            kv,
            submitted: at,
            admitted: None,
            decoding: None,
            prefill: PrefillStats::default(),
            steps: 0,
            limit,
            cold: ColdStats::default(),
            index_seconds: 0.0,
            index_failures: 0,
            sampler,
            answer: AnswerText::new(tokenizer, request.stop.clone(), request.logprobs.is_some()),
            eos: model.spec.eos.as_slice().into(),
            request,
        }
    }

    /// Whether whoever asked has gone away.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Ends the request with an error, unless it has ended.
    pub(crate) fn fail(&mut self, error: crate::EngineError) {
        if std::mem::replace(&mut self.phase, Phase::Done) != Phase::Done {
            // A closed channel means that nobody wants to know.
            let _ = self.events.send(Event::Failed(error));
        }
    }

    /// Whether it runs: only then it holds KV, and pages of the prefix cache.
    pub(crate) fn runs(&self) -> bool {
        self.waiting.is_none()
    }

    /// Whether it reads nothing until its index is built.
    pub(crate) fn waits_for_index(&self) -> bool {
        self.wait_for_index && self.phase == Phase::Text && self.kv.is_indexing()
    }

    /// The budget does not hold `needed` bytes, although nobody else runs: an answer that has begun ends here. An index over the
    /// prompt that does not fit is an error: an answer that it ends after a few tokens would be none.
    pub(crate) fn out_of_memory(&mut self, needed: Bytes, budget: Bytes) {
        let begun = self.bytes().fits(budget) || self.written() > self.request.attention.window;
        if !begun || !self.cut() {
            self.fail(never_fits(needed, budget));
        }
    }

    /// Ends an answer that has begun, for want of memory. False: none has.
    pub(crate) fn cut(&mut self) -> bool {
        let begun = self.written() > 0;
        if begun {
            self.finish(FinishReason::Memory).unwrap_or_else(|error| self.fail(error));
        }
        begun
    }

    /// Whether the answer must not end yet.
    fn goes_on(&self) -> bool {
        self.request.ignore_eos || self.written() < self.request.min_tokens
    }

    /// Tokens of the answer so far.
    fn written(&self) -> usize {
        self.text.len() - self.prompt
    }

    fn attends_all(&self) -> bool {
        self.request.attention.strategy == Strategy::Full
    }

    /// Whether what is read next is attended under the strategy. A prompt without context is read exactly.
    fn under_strategy(&self) -> bool {
        self.has_context || self.read >= self.prompt
    }

    /// As the scheduler sees it while it runs. `chunk`: tokens of a prompt that are read in a step at most; `page`:
    /// bytes of a page.
    pub(crate) fn running_entry(
        &mut self,
        model: &Transformer,
        cache: &PrefixCache<SharedPage>,
        chunk: usize,
        page: Bytes,
    ) -> Entry {
        let work = match &mut self.blend {
            _ if self.held_back => Work::Wait,
            Some(blend) => match blend.is_ready() {
                true => Work::Blend { tokens: blend.left(model), takes: blend.takes() },
                false => Work::Wait,
            },
            None => self.work(self.kv.len(), chunk),
        };
        let (own, shared) = self.own_bytes(cache, page);
        Entry {
            work,
            ahead: self.context + self.text.len() - self.kv.len(),
            room: self.kv.room(),
            own,
            shared,
            age: self.age,
        }
    }

    /// Bytes that only it holds, and those that it holds together with others. `page`: bytes of a page.
    pub(crate) fn own_bytes(&self, cache: &PrefixCache<SharedPage>, page: Bytes) -> (Bytes, Bytes) {
        let (held, alone) = self.shared.as_ref().map_or((0, 0), |s| (s.held(), s.held_alone(cache)));
        let own = match &self.request.context {
            // Others may go on from the same context.
            Some(_) => self.kv.exclusive_bytes(),
            None => self.bytes().minus(page.times(held)) + page.times(alone),
        };
        (own, page.times(held - alone))
    }

    /// As the scheduler sees it while it waits.
    pub(crate) fn waiting_entry(&mut self, cache: &PrefixCache<SharedPage>, chunk: usize) -> Entry {
        let exact = exact(&self.request, before_last(&self.text), self.prompt);
        let (found, in_use) = self.shared.as_mut().map_or((0, 0), |shared| shared.found(cache, exact));
        // The KV of a prepared context is there.
        let prepared = if self.request.context.is_some() { self.context } else { 0 };
        Entry {
            work: self.work(prepared + found, chunk),
            ahead: self.context + self.text.len() - in_use,
            room: 0,
            own: Bytes::default(),
            shared: Bytes::default(),
            age: self.age,
        }
    }

    /// What is to be done behind the first `held` tokens of context and text.
    fn work(&self, held: usize, chunk: usize) -> Work {
        if self.phase == Phase::Context {
            // A blend that is still to begin. The question takes its pages with the context.
            let tokens = (self.context - held).max(1);
            return Work::Blend { tokens, takes: self.context - held + self.prompt };
        }
        if self.waits_for_index() {
            return Work::Wait;
        }
        let read = held - self.context;
        let rest = self.text.len() - read;
        if rest == 1 && self.written() > 0 {
            Work::Decode
        } else if self.attends_all() {
            Work::Read { tokens: rest.min(chunk), whole: false }
        } else if read < self.prompt {
            // Between parts of a suffix, tokens leave the window: where it is cut must not depend on the others.
            Work::Read { tokens: (self.prompt - read).min(chunk), whole: self.has_context }
        } else {
            // An answer is read again as it was written.
            Work::Read { tokens: 1, whole: false }
        }
    }

    /// Bytes of its KV, shared pages included.
    fn bytes(&self) -> Bytes {
        self.kv.bytes()
    }

    /// Bytes of its KV that are not the cache's. `page`: bytes of a page.
    pub(crate) fn private_bytes(&self, page: Bytes) -> Bytes {
        self.bytes().minus(page.times(self.shared.as_ref().map_or(0, SharedPages::held)))
    }

    /// Tokens that fit into pages that it holds.
    pub(crate) fn room(&self) -> usize {
        self.kv.room()
    }

    /// Tokens by which its KV grows when it is granted so many.
    pub(crate) fn takes(&self, granted: usize) -> usize {
        match (&self.blend, self.phase) {
            (Some(blend), _) if granted > 0 => blend.takes(),
            (None, Phase::Context) => self.work(self.kv.len(), 1).takes(granted),
            (Some(_), _) => 0,
            (None, Phase::Text | Phase::Done) => granted,
        }
    }

    /// Pages of a GPU's pool that it takes when it is granted so many tokens.
    pub(crate) fn missing_on_device(&self, granted: usize) -> usize {
        self.kv.device().map_or(0, |kv| kv.recent.missing(self.takes(granted)))
    }

    /// Begins to run, with the KV that is there. When it does so for the first time and the prefix cache was asked:
    /// the tokens that it was asked for and those that it had.
    pub(crate) fn admit(&mut self, cache: &mut PrefixCache<SharedPage>) -> Option<(usize, usize)> {
        let first = self.admitted.is_none();
        self.admitted.get_or_insert_with(Instant::now);
        self.waiting = None;
        if let Some(context) = &self.request.context {
            self.kv = context.kv.clone();
            if first {
                self.prefill = context.stats.clone();
            }
        }
        let exact = exact(&self.request, before_last(&self.text), self.prompt);
        self.shared.as_mut()?.adopt(cache, &mut self.kv, exact);
        self.read = if self.has_context { 0 } else { self.kv.len() };
        if !first {
            return None;
        }
        self.prefill.prefix_tokens = self.kv.len();
        Some((if self.has_context { exact.len() } else { self.prompt }, self.kv.len()))
    }

    /// Loses its KV, to be computed again when it is next admitted.
    pub(crate) fn preempt(&mut self, cache: &mut PrefixCache<SharedPage>, model: &Transformer, load: &Arc<Load>) {
        self.release(cache);
        self.index_seconds += self.kv.index_seconds();
        self.index_failures += self.kv.index_failures();
        self.blend = None;
        self.held_back = false;
        self.kv = model.new_kv();
        self.read = 0;
        self.phase = first_phase(&self.request);
        self.waiting = Some(Waiting::new(load).0);
    }

    /// Lets shared pages go.
    pub(crate) fn release(&mut self, cache: &mut PrefixCache<SharedPage>) {
        if let Some(shared) = &mut self.shared {
            shared.release(cache);
        }
    }

    /// Shares what has been computed and depends on nothing but the tokens.
    fn share(&mut self, cache: &mut PrefixCache<SharedPage>) {
        let exact = exact(&self.request, &self.text[..self.read], self.prompt);
        if let Some(shared) = &mut self.shared {
            shared.share(cache, &mut self.kv, exact);
        }
    }

    /// Before text is read: what left the window finds its place.
    /// `room`: bytes of the host's memory that an index of what lies on a GPU may take.
    pub(crate) fn settle(&mut self, cache: &mut PrefixCache<SharedPage>, model: &Transformer, room: u64) -> Result<()> {
        if self.phase != Phase::Text || !self.under_strategy() {
            return Ok(());
        }
        if !self.attends_all() {
            // It drops pages as it goes on: from here on they are its own.
            self.release(cache);
            self.shared = None;
        }
        guarded("moving tokens out of the window", || self.kv.settle(&self.request.attention, model, room))
    }

    /// This sequence's part of a batch: the next `tokens` of its text. Where they are the last, the next token is wanted.
    pub(crate) fn piece(&mut self, tokens: usize) -> Piece<'_> {
        let end = self.read + tokens;
        let want = if end == self.text.len() { Want::Last } else { Want::Nothing };
        let attention = self.under_strategy().then_some(&self.request.attention);
        let ban_eos = self.goes_on();
        Piece { attention, ban_eos, ..Piece::exact(&mut self.kv, &self.text[self.read..end], want) }
    }

    /// The next `tokens` have been read.
    pub(crate) fn advance(&mut self, tokens: usize, stats: ColdStats, cache: &mut PrefixCache<SharedPage>) {
        self.read += tokens;
        if self.read > self.seen {
            self.cold += stats;
            self.seen = self.read;
        }
        self.share(cache);
    }
}

/// The tokens at the beginning of a sequence whose KV depends on nothing but the tokens: those before a context; without
/// one, those of `text` that are attended exactly, of which the first `prompt` are the prompt's.
fn exact<'a>(request: &'a Request, text: &'a [u32], prompt: usize) -> &'a [u32] {
    if !request.prompt.chunks.is_empty() {
        &request.prompt.prefix
    } else if request.attention.strategy == Strategy::Full {
        text
    } else {
        &text[..text.len().min(prompt)]
    }
}

/// The last token of a text is read in any case, for what comes behind it.
fn before_last(text: &[u32]) -> &[u32] {
    &text[..text.len().saturating_sub(1)]
}

/// What comes first: the context, unless there is none or its KV is there.
fn first_phase(request: &Request) -> Phase {
    if request.context.is_none() && !request.prompt.chunks.is_empty() { Phase::Context } else { Phase::Text }
}
