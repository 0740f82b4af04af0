//! Texts to tokens, and one request from beginning to end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use engine::{ChatMessage, Engine, Event, EventStream, Finished, PrefillStats, PromptChunk, Request};

use crate::error::{EvalError, Result};

/// The tokens of contexts and questions, in the form that the model wants.
pub(crate) struct Material<'a> {
    engine: &'a Engine,
    separator: Vec<u32>,
    prefix: Arc<[u32]>,
    known: HashMap<Arc<str>, Arc<[u32]>>,
}

impl<'a> Material<'a> {
    pub(crate) fn new(engine: &'a Engine) -> Result<Self> {
        let mut material = Material { engine, separator: Vec::new(), prefix: Arc::new([]), known: HashMap::new() };
        material.separator = engine.tokenizer().encode(engine.chat().chunk_suffix())?;
        material.prefix = material.parts("?")?.0.into();
        Ok(material)
    }

    /// What stands before every context.
    pub(crate) fn prefix(&self) -> &Arc<[u32]> {
        &self.prefix
    }

    /// A chunk: the tokens of its text and the separator behind it.
    pub(crate) fn chunk(&mut self, text: &Arc<str>) -> Result<Arc<[u32]>> {
        if let Some(tokens) = self.known.get(text) {
            return Ok(tokens.clone());
        }
        let mut tokens = self.engine.tokenizer().encode_plain(text)?;
        tokens.extend_from_slice(&self.separator);
        let tokens: Arc<[u32]> = tokens.into();
        self.known.insert(text.clone(), tokens.clone());
        Ok(tokens)
    }

    /// What stands behind the context: the question and what opens the answer.
    pub(crate) fn question(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.parts(text)?.1)
    }

    fn parts(&self, question: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let messages = [ChatMessage::new("user", question)];
        let prompt = self.engine.chat().render_with_context(self.engine.tokenizer(), &messages)?;
        Ok((prompt.prefix, prompt.suffix))
    }

    /// A chunk of a prompt, computed in it unless a source is given.
    pub(crate) fn prompt_chunk(
        &self,
        tokens: &Arc<[u32]>,
        source: Option<Arc<dyn engine::ChunkSource>>,
    ) -> PromptChunk {
        PromptChunk { tokens: tokens.clone(), prefix: self.prefix.clone(), source }
    }
}

/// A request that has ended.
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    /// The model's logits in the place of each of these, where the request asks for them.
    pub(crate) logits: Vec<Vec<f32>>,
    /// From handing the request in to holding its first token.
    pub(crate) first_seconds: f64,
    /// From holding the first token to holding the last.
    pub(crate) rest_seconds: f64,
    pub(crate) prefill: PrefillStats,
    pub(crate) finished: Finished,
}

/// Hands a request in and waits for its end. Blocks.
pub(crate) fn ask(engine: &Engine, request: Request) -> Result<Answer> {
    let start = Instant::now();
    let mut events = engine.submit(request)?;
    follow(&mut events, start)
}

fn follow(events: &mut EventStream, start: Instant) -> Result<Answer> {
    let (mut text, mut ids, mut logits, mut prefill) = (String::new(), Vec::new(), Vec::new(), None);
    let (mut first, mut last) = (None, start);
    while let Some(event) = events.blocking_next() {
        match event {
            Event::Started(stats) => prefill = Some(stats),
            Event::Token(token) => {
                last = Instant::now();
                first.get_or_insert(last);
                text.push_str(&token.text);
                ids.push(token.id);
                if !token.logits.is_empty() {
                    logits.push(token.logits);
                }
            }
            Event::Finished(finished) => {
                text.push_str(&finished.text);
                let first = first.unwrap_or_else(Instant::now);
                return Ok(Answer {
                    text,
                    ids,
                    logits,
                    first_seconds: (first - start).as_secs_f64(),
                    rest_seconds: last.saturating_duration_since(first).as_secs_f64(),
                    prefill: prefill.ok_or(EvalError::Interrupted { when: "before its prompt was read" })?,
                    finished,
                });
            }
            Event::Failed(error) => return Err(error.into()),
        }
    }
    Err(EvalError::Interrupted { when: "before its end" })
}
