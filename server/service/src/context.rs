//! From a question to a prompt: which chunks, in which order, and from where.

use std::sync::Arc;
use std::time::Instant;

use engine::{BlendMode, ChatMessage, EngineError, Prompt, PromptChunk};

use super::answer::Answering;
use super::length::{Room, refuse_overlong};
use super::monitor::{GIVEN, Level, Sample};
use super::passages::{GivenChunk, GivenPassage};
use super::{Options, Service};
use crate::store::Origin;
use documents::{Collection, Found};
use settings::Result;

/// A question over passages.
#[derive(Clone, Debug)]
pub struct Question {
    /// The conversation; its last message asks.
    pub messages: Vec<ChatMessage>,
    /// What it is answered from.
    pub passages: Passages,
    /// How the answer is made.
    pub options: Options,
}

/// Where the passages of a question come from.
#[derive(Clone, Debug)]
pub enum Passages {
    /// They are searched for.
    Search(Search),
    /// They came with the question, in the order in which they are to be read.
    Given(Arc<[Arc<GivenPassage>]>),
}

/// A search in a collection.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    /// Where is searched: a collection's name, or the id of a vector store.
    pub collection: String,
    /// What is searched for.
    pub query: String,
    /// Chunks to retrieve at most.
    pub top_chunks: usize,
    /// Passages whose score is below this share of the best one's are left out; 0: none.
    pub score_threshold: f32,
}

impl Question {
    /// A question of one message over a collection.
    #[must_use]
    pub fn new(text: &str, collection: &str, top_chunks: usize, options: Options) -> Question {
        Question {
            messages: vec![ChatMessage::new("user", text)],
            passages: Passages::Search(Search {
                collection: collection.into(),
                query: text.into(),
                top_chunks,
                score_threshold: 0.0,
            }),
            options,
        }
    }
}

/// A chunk of the context that an answer was made from.
#[derive(Clone, Debug)]
pub struct ContextChunk {
    /// The passage and its place.
    pub passage: Passage,
    /// Its tokens.
    pub tokens: usize,
    /// Where its state came from; `None` when nothing cached was to be used.
    pub origin: Option<Origin>,
}

/// A passage that an answer is made from.
#[derive(Clone, Debug)]
pub enum Passage {
    /// A search found it.
    Found(Found),
    /// It came with the question.
    Given(GivenChunk),
}

impl Passage {
    /// The text.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Passage::Found(found) => &found.passage,
            Passage::Given(chunk) => chunk.text(),
        }
    }
}

/// A passage with its tokens.
pub(super) struct Candidate {
    pub(super) passage: Passage,
    pub(super) tokens: Vec<u32>,
}

/// What stands around the passages of a prompt.
struct Frame {
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    room: Room,
}

impl Service {
    /// Retrieves chunks, takes their state from the store (computing what is missing) and begins to answer.
    ///
    /// # Errors
    /// An unknown collection, the context limit, a wrong parameter, a full queue, a failing store.
    pub fn answer(&self, question: &Question) -> Result<Answering> {
        self.answer_while(question, &|| true)
    }

    /// As [`answer`](Service::answer), given up between two steps once nobody waits any more, as `wanted` says.
    ///
    /// Passages are chosen first; the answer gets what they leave of the context. What did not fit is said in
    /// [`Answering::notes`].
    ///
    /// # Errors
    /// As [`answer`](Service::answer), and [`EngineError::Cancelled`].
    pub fn answer_while(&self, question: &Question, wanted: &dyn Fn() -> bool) -> Result<Answering> {
        let started = Instant::now();
        let mut options = question.options.clone();
        options.blend.validate(self.engine.spec().layers)?;
        let mut notes = Vec::new();
        let collection = match &question.passages {
            Passages::Search(search) => self.collection_name(&search.collection)?,
            Passages::Given(_) => GIVEN.into(),
        };
        let level = self.monitor.level(&collection, &options.blend, &self.options.blend);
        if let Some(level) = level {
            level.apply(&mut options.blend);
            notes.extend(level.note(&collection));
        }
        let (frame, chosen) = match &question.passages {
            Passages::Search(search) => {
                let collection = self.library.collection(&collection)?;
                let frame = self.frame(question, wanted)?;
                let chosen = self.retrieve(&collection, search, frame.room.passages, wanted, &mut notes)?;
                (frame, chosen)
            }
            Passages::Given(given) => {
                let frame = self.frame(question, wanted)?;
                let chosen = self.take_given(given, frame.room.passages, wanted, &mut notes)?;
                (frame, chosen)
            }
        };
        let length = chosen.iter().map(|candidate| candidate.tokens.len()).sum();
        notes.extend(frame.room.clip(length, options.max_tokens));
        let retrieved = started.elapsed().as_secs_f64();
        let (prompt, context) = self.prepare(frame, chosen, &options, wanted)?;
        let prepared = started.elapsed().as_secs_f64();
        let request = options.request(prompt);
        let drawn = level.is_some_and(|level| level < Level::Computed) && !context.is_empty() && self.monitor.draws();
        let sample = drawn.then(|| Sample { collection, request: request.clone() });
        let stream = self.engine.submit(request)?;
        if sample.is_some_and(|sample| !self.monitor.offer(sample)) {
            self.metrics.sample_dropped();
        }
        let answering = Answering::new(stream, started, Arc::clone(&self.metrics), &options);
        Ok(answering.with_context(context, retrieved, prepared - retrieved).with_notes(notes))
    }

    /// Renders the conversation around its passages, and says how much room they have.
    fn frame(&self, question: &Question, wanted: &dyn Fn() -> bool) -> Result<Frame> {
        // Before anything whose cost grows with the question.
        refuse_overlong(&self.engine, &question.messages, wanted)?;
        let rendered = self.engine.chat().render_with_context(self.engine.tokenizer(), &question.messages)?;
        let fixed = rendered.prefix.len() + rendered.suffix.len();
        let room = Room::share(self.engine.max_context(), fixed, question.options.max_tokens)?;
        Ok(Frame { prefix: rendered.prefix, suffix: rendered.suffix, room })
    }

    /// The passages of a collection that a search finds and that fit `room` tokens.
    fn retrieve(
        &self,
        collection: &Collection,
        search: &Search,
        room: usize,
        wanted: &dyn Fn() -> bool,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Candidate>> {
        let mut found = collection.search(&search.query, search.top_chunks, wanted)?;
        if found.is_empty() {
            notes.push("no passage of the collection shares a word with the question".to_string());
        }
        notes.extend(cut_off(&mut found, search.score_threshold));
        Ok(fit(self.candidates(found, wanted)?, room, notes))
    }

    /// Takes the state of the chosen passages from the store, computing what is missing, and puts the prompt together.
    fn prepare(
        &self,
        frame: Frame,
        chosen: Vec<Candidate>,
        options: &Options,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(Prompt, Vec<ContextChunk>)> {
        let mut prompt = Prompt { prefix: frame.prefix, chunks: Vec::new(), suffix: frame.suffix };
        let mut context = Vec::with_capacity(chosen.len());
        for Candidate { passage, tokens } in chosen {
            if !wanted() {
                return Err(EngineError::Cancelled.into());
            }
            let (source, origin) = match options.blend.mode {
                BlendMode::FullRecompute => (None, None),
                _ => {
                    let (source, origin) = self.store.source_while(&self.chunk_prefix, &tokens, wanted)?;
                    self.metrics.chunk(origin == Origin::Cached);
                    (Some(source), Some(origin))
                }
            };
            context.push(ContextChunk { passage, tokens: tokens.len(), origin });
            prompt.chunks.push(PromptChunk { tokens: tokens.into(), prefix: Arc::clone(&self.chunk_prefix), source });
        }
        Ok((prompt, context))
    }

    fn candidates(&self, found: Vec<Found>, wanted: &dyn Fn() -> bool) -> Result<Vec<(Found, Vec<u32>)>> {
        let candidate = |found: Found| match wanted() {
            true => self.tokens_of(&found).map(|tokens| (found, tokens)),
            false => Err(EngineError::Cancelled.into()),
        };
        found.into_iter().map(candidate).collect()
    }
}

/// Leaves out the passages whose score is below `threshold` times the best one's, and says so.
fn cut_off(found: &mut Vec<Found>, threshold: f32) -> Option<String> {
    let best = found.first().map_or(0.0, |found| found.score);
    let total = found.len();
    found.retain(|found| found.score >= threshold * best);
    let left_out = total - found.len();
    (left_out > 0).then(|| {
        format!("{left_out} of {total} passages were left out: they score below {threshold} of the best one's score")
    })
}

/// The best candidates that fit `room` tokens together, in the order of their documents.
fn fit(candidates: Vec<(Found, Vec<u32>)>, room: usize, notes: &mut Vec<String>) -> Vec<Candidate> {
    let total = candidates.len();
    let mut used = 0;
    let mut chosen: Vec<_> = candidates
        .into_iter()
        .take_while(|(_, tokens)| {
            used += tokens.len();
            used <= room
        })
        .collect();
    if chosen.len() < total {
        notes.push(format!(
            "{} of {total} passages were left out, the least fitting ones: the context holds {room} more tokens",
            total - chosen.len()
        ));
    }
    chosen.sort_by(|(a, _), (b, _)| (&a.path, a.span).cmp(&(&b.path, b.span)));
    chosen.into_iter().map(|(found, tokens)| Candidate { passage: Passage::Found(found), tokens }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use documents::{DocumentId, Span};

    fn found(path: &str, start: usize, end: usize, passage: &str) -> Found {
        Found {
            path: path.into(),
            id: DocumentId::random(),
            number: 0,
            span: Span { start, end },
            line: 1,
            page: None,
            passage: passage.into(),
            score: 1.0,
            tokens: None,
        }
    }

    #[test]
    fn the_least_fitting_passages_make_way_and_the_rest_is_in_document_order() {
        let candidate =
            |path: &str, start: usize, tokens: usize| (found(path, start, start + 10, path), vec![0; tokens]);
        let mut notes = Vec::new();
        let ranked = vec![candidate("b", 50, 40), candidate("b", 7, 40), candidate("a", 9, 20), candidate("a", 0, 1)];
        let chosen = fit(ranked, 100, &mut notes);
        let place = |chosen: &Candidate| match &chosen.passage {
            Passage::Found(found) => (found.path.display().to_string(), found.span.start),
            Passage::Given(_) => unreachable!("none was given"),
        };
        let order: Vec<_> = chosen.iter().map(place).collect();
        assert_eq!(order, [("a".into(), 9), ("b".into(), 7), ("b".into(), 50)]);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("1 of 4 passages were left out"), "{notes:?}");
    }

    #[test]
    fn what_scores_below_a_share_of_the_best_is_left_out() {
        let scored = |scores: &[f32]| -> Vec<Found> {
            scores.iter().map(|&score| Found { score, ..found("a", 0, 1, "x") }).collect()
        };
        for (threshold, kept) in [(0.0, 4), (0.1, 3), (0.5, 2), (0.51, 1), (1.0, 1)] {
            let mut passages = scored(&[8.0, 4.0, 1.0, 0.5]);
            let note = cut_off(&mut passages, threshold);
            assert_eq!(passages.len(), kept, "{threshold}");
            assert_eq!(note.is_some(), kept < 4, "{threshold}");
            assert!(note.is_none_or(|note| note.starts_with(&format!("{} of 4 passages", 4 - kept))));
        }
        assert_eq!(cut_off(&mut Vec::new(), 1.0), None);
    }
}
