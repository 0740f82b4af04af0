//! From a question to a prompt: which chunks, in which order, and from where.

use std::sync::Arc;
use std::time::Instant;

use engine::{BlendMode, ChatMessage, EngineError, Prompt, PromptChunk};

use super::answer::Answering;
use super::length::{Room, refuse_overlong};
use super::{Options, Service};
use crate::error::Result;
use crate::store::Origin;
use documents::Found;

/// A question over a collection.
#[derive(Clone, Debug)]
pub struct Question {
    /// The conversation; its last message asks.
    pub messages: Vec<ChatMessage>,
    /// What is searched for.
    pub query: String,
    /// Where is searched.
    pub collection: String,
    /// Chunks to retrieve at most.
    pub top_chunks: usize,
    /// How the answer is made.
    pub options: Options,
}

impl Question {
    /// A question of one message.
    #[must_use]
    pub fn new(text: &str, collection: &str, top_chunks: usize, options: Options) -> Question {
        Question {
            messages: vec![ChatMessage::new("user", text)],
            query: text.into(),
            collection: collection.into(),
            top_chunks,
            options,
        }
    }
}

/// A chunk of the context that an answer was made from.
#[derive(Clone, Debug)]
pub struct ContextChunk {
    /// The passage and its place.
    pub found: Found,
    /// Its tokens.
    pub tokens: usize,
    /// Where its state came from; `None` when nothing cached was to be used.
    pub origin: Option<Origin>,
}

/// A retrieved chunk with its tokens.
struct Candidate {
    found: Found,
    tokens: Vec<u32>,
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
        let options = &question.options;
        options.blend.validate(self.engine.spec().layers)?;
        let collection = self.library.collection(&question.collection)?;
        // Before anything whose cost grows with the question.
        refuse_overlong(&self.engine, &question.messages, wanted)?;
        let rendered = self.engine.chat().render_with_context(self.engine.tokenizer(), &question.messages)?;
        let fixed = rendered.prefix.len() + rendered.suffix.len();
        let room = Room::share(self.engine.max_context(), fixed, options.max_tokens)?;

        let mut notes = Vec::new();
        let found = collection.search(&question.query, question.top_chunks, wanted)?;
        if found.is_empty() {
            notes.push("no passage of the collection shares a word with the question".to_string());
        }
        let chosen = fit(self.candidates(found, wanted)?, room.passages, &mut notes);
        notes.extend(room.clip(chosen.iter().map(|candidate| candidate.tokens.len()).sum(), options.max_tokens));
        let retrieved = started.elapsed().as_secs_f64();

        let mut prompt = Prompt { prefix: rendered.prefix, chunks: Vec::new(), suffix: rendered.suffix };
        let mut context = Vec::with_capacity(chosen.len());
        for Candidate { found, tokens } in chosen {
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
            context.push(ContextChunk { found, tokens: tokens.len(), origin });
            prompt.chunks.push(PromptChunk { tokens: tokens.into(), prefix: Arc::clone(&self.chunk_prefix), source });
        }
        let prepared = started.elapsed().as_secs_f64();
        let stream = self.engine.submit(options.request(prompt))?;
        let answering = Answering::new(stream, started, Arc::clone(&self.metrics), options);
        Ok(answering.with_context(context, retrieved, prepared - retrieved).with_notes(notes))
    }

    fn candidates(&self, found: Vec<Found>, wanted: &dyn Fn() -> bool) -> Result<Vec<Candidate>> {
        let candidate = |found: Found| match wanted() {
            true => Ok(Candidate { tokens: self.chunk_tokens(&found.passage)?, found }),
            false => Err(EngineError::Cancelled.into()),
        };
        found.into_iter().map(candidate).collect()
    }
}

/// The best candidates that fit `room` tokens together, in the order of their documents.
fn fit(candidates: Vec<Candidate>, room: usize, notes: &mut Vec<String>) -> Vec<Candidate> {
    let total = candidates.len();
    let mut used = 0;
    let mut chosen: Vec<Candidate> = candidates
        .into_iter()
        .take_while(|candidate| {
            used += candidate.tokens.len();
            used <= room
        })
        .collect();
    if chosen.len() < total {
        notes.push(format!(
            "{} of {total} passages were left out, the least fitting ones: the context holds {room} more tokens",
            total - chosen.len()
        ));
    }
    chosen.sort_by(|a, b| (&a.found.path, a.found.span).cmp(&(&b.found.path, b.found.span)));
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use documents::Span;

    fn found(path: &str, start: usize, end: usize, passage: &str) -> Found {
        Found { path: path.into(), span: Span { start, end }, line: 1, passage: passage.into(), score: 1.0 }
    }

    #[test]
    fn the_least_fitting_passages_make_way_and_the_rest_is_in_document_order() {
        let candidate = |path: &str, start: usize, tokens: usize| Candidate {
            found: found(path, start, start + 10, path),
            tokens: vec![0; tokens],
        };
        let mut notes = Vec::new();
        let ranked = vec![candidate("b", 50, 40), candidate("b", 7, 40), candidate("a", 9, 20), candidate("a", 0, 1)];
        let chosen = fit(ranked, 100, &mut notes);
        let order: Vec<_> = chosen.iter().map(|c| (c.found.path.to_str(), c.found.span.start)).collect();
        assert_eq!(order, [(Some("a"), 9), (Some("b"), 7), (Some("b"), 50)]);
        assert_eq!(notes.len(), 1);
        assert!(notes[0].starts_with("1 of 4 passages were left out"), "{notes:?}");
    }
}
