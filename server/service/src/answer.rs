//! An answer while it is made, and what it was made of.

use std::borrow::Cow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use engine::{DecodeStats, Event, EventStream, FinishReason, Finished, GateReport, PrefillStats, TokenLogprob, Usage};
use serde::{Deserialize, Serialize};

use super::Options;
use super::context::{ContextChunk, Passage};
use super::passages::GivenPassage;
use crate::metrics::Metrics;
use crate::store::Origin;
use documents::{DocumentId, Span, comparable};
use settings::{QuireError, Result};

/// A passage that was in the context of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Citation {
    /// The document; of a passage that came with the question: its name.
    pub document: PathBuf,
    /// Where in the document, or in the text that was given, in characters.
    pub span: Span,
    /// The line that it begins in, from 1.
    pub line: usize,
    /// The text there.
    pub passage: String,
    /// How well it fits the question (BM25); absent where it was not searched for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f32>,
    /// Whether the answer, or one of its parts between commas, stands in the passage word for word, whatever the cases,
    /// diacritics and punctuation.
    pub contains_answer: bool,
    /// Where in the answer's text that part is, in characters: the first one, the whole answer before its parts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answer_span: Option<Span>,
    /// The id of the document in its collection.
    #[serde(skip)]
    pub document_id: Option<DocumentId>,
    /// The passage that came with the question and that this is of.
    #[serde(skip)]
    pub given: Option<Arc<GivenPassage>>,
}

/// What an answer cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub completion_tokens: usize,
    /// Context tokens whose cached state was used.
    pub reused_tokens: usize,
    /// Prompt tokens from a cache whose state is exact: of the prefix cache, and of chunks behind the tokens that they were computed behind.
    pub cached_exact_tokens: usize,
    /// Prompt tokens from the chunk store whose state was computed behind other tokens than those before them here.
    pub cached_composed_tokens: usize,
    /// Context tokens that were computed.
    pub recomputed_tokens: usize,
    /// Tokens at the beginning of a prompt without documents whose state the prefix cache had.
    pub prefix_tokens: usize,
    /// Tokens behind the context: the question.
    pub suffix_tokens: usize,
    /// Chunks found in the store.
    pub chunks_cached: usize,
    /// Chunks that were missing there: computed and stored before the answer began.
    pub chunks_computed: usize,
    /// Chunks that could not be read intact: computed within the prompt.
    pub chunks_failed: usize,
    /// Searching and tokenising.
    pub retrieve_seconds: f64,
    /// Looking chunks up, and computing those that were missing.
    pub prepare_seconds: f64,
    /// Waiting for the engine.
    pub queue_seconds: f64,
    /// Reading the prompt, up to the logits of the first token.
    pub prefill_seconds: f64,
    /// From the request to the first token: everything above.
    pub ttft_seconds: f64,
    /// Writing the answer.
    pub decode_seconds: f64,
    /// From the request to the last token.
    pub total_seconds: f64,
    /// Keys outside of sinks and window, summed over steps, layers and query heads.
    pub cold_keys: u64,
    /// Of these, keys that the index read.
    pub keys_scored: u64,
    /// Of these, keys that were attended.
    pub keys_attended: u64,
    /// Share of the cold keys that the index read; absent when nothing was cold.
    pub scored_share: Option<f64>,
    /// Share of the cold keys that were attended; absent when nothing was cold.
    pub attended_share: Option<f64>,
    /// Building indexes over cold keys.
    pub index_build_seconds: f64,
    /// How far cached state was off where it was compared with fresh state: mean squared deviation over mean square.
    pub blend_deviation: Option<f32>,
    /// The rule that chose what was recomputed; absent without a context.
    pub rule: Option<String>,
    /// What blending computed beyond reading the question once: its share of computing the cached tokens anew; absent where no
    /// cached token stood behind others than it was computed behind.
    pub charged_share: Option<f32>,
    /// How much the gate had recomputed, and why; absent where the rule does not ask the question, or nothing was to be chosen.
    pub gate: Option<GateReport>,
    /// The decode strategy.
    pub strategy: String,
    /// The blend mode.
    pub blend: String,
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Its text.
    pub text: String,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: Cow<'static, str>,
    /// The passages of its context, in the order of the prompt.
    pub citations: Vec<Citation>,
    /// What it cost.
    pub stats: Stats,
    /// What the reader should know.
    pub notes: Vec<String>,
}

/// What comes next of an answer.
#[derive(Debug)]
pub enum Piece {
    /// More text.
    Text(String),
    /// The end.
    Done(Box<Answer>),
}

/// An answer that is being made. Dropping it cancels the work.
pub struct Answering {
    stream: EventStream,
    tally: Tally,
    /// The end, while text that the engine had held back goes first.
    end: Option<Box<Answer>>,
    /// Tokens that nobody has taken yet.
    logprobs: Vec<TokenLogprob>,
}

impl Answering {
    pub(super) fn new(stream: EventStream, started: Instant, metrics: Arc<Metrics>, options: &Options) -> Answering {
        let stats = Stats {
            strategy: options.attention.strategy.to_string(),
            blend: options.blend.mode.to_string(),
            ..Stats::default()
        };
        Answering {
            stream,
            end: None,
            logprobs: Vec::new(),
            tally: Tally {
                started,
                last_token: None,
                metrics,
                text: String::new(),
                context: Vec::new(),
                notes: Vec::new(),
                stats,
            },
        }
    }

    pub(super) fn with_context(
        mut self,
        context: Vec<ContextChunk>,
        retrieve_seconds: f64,
        prepare_seconds: f64,
    ) -> Answering {
        let count = |origin| context.iter().filter(|c| c.origin == Some(origin)).count();
        let stats = &mut self.tally.stats;
        stats.chunks_cached = count(Origin::Cached);
        stats.chunks_computed = count(Origin::Computed);
        stats.retrieve_seconds = retrieve_seconds;
        stats.prepare_seconds = prepare_seconds;
        self.tally.context = context;
        self
    }

    /// The same with remarks that are known before it begins.
    pub(super) fn with_notes(mut self, notes: Vec<String>) -> Answering {
        self.tally.notes = notes;
        self
    }

    /// What the reader should know of the answer before it begins: passages or tokens that had to be left out. More may
    /// come with the answer, behind these.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.tally.notes
    }

    /// The passages in the context, in the order of the prompt.
    #[must_use]
    pub fn context(&self) -> &[ContextChunk] {
        &self.tally.context
    }

    /// What comes next; `None` behind the end.
    ///
    /// # Errors
    /// What the engine failed with; nothing comes after that.
    pub async fn next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(answer) = self.end.take() {
                return Some(Ok(Piece::Done(answer)));
            }
            let event = self.stream.next().await?;
            if let Some(piece) = self.absorb(event) {
                return Some(piece);
            }
        }
    }

    /// As [`next`](Self::next), blocking this thread.
    pub fn blocking_next(&mut self) -> Option<Result<Piece>> {
        loop {
            if let Some(answer) = self.end.take() {
                return Some(Ok(Piece::Done(answer)));
            }
            let event = self.stream.blocking_next()?;
            if let Some(piece) = self.absorb(event) {
                return Some(piece);
            }
        }
    }

    /// The tokens of the text since the last call, if [`Options::logprobs`] asks for them.
    pub fn take_logprobs(&mut self) -> Vec<TokenLogprob> {
        std::mem::take(&mut self.logprobs)
    }

    fn absorb(&mut self, event: Event) -> Option<Result<Piece>> {
        match event {
            Event::Started(prefill) => {
                self.tally.started(&prefill);
                None
            }
            Event::Token(token) => {
                self.tally.token();
                self.tally.text.push_str(&token.text);
                self.logprobs.extend(token.logprobs);
                (!token.text.is_empty()).then_some(Ok(Piece::Text(token.text)))
            }
            Event::Finished(mut finished) => {
                self.logprobs.append(&mut finished.logprobs);
                let answer = Box::new(self.tally.finish(&finished));
                if finished.text.is_empty() {
                    return Some(Ok(Piece::Done(answer)));
                }
                self.end = Some(answer);
                Some(Ok(Piece::Text(finished.text)))
            }
            Event::Failed(error) => Some(Err(error.into())),
        }
    }

    /// Waits for the end, blocking this thread; `on_text` sees the text as it comes.
    ///
    /// # Errors
    /// What the engine failed with.
    pub fn wait(mut self, on_text: &mut dyn FnMut(&str)) -> Result<Answer> {
        while let Some(piece) = self.blocking_next() {
            match piece? {
                Piece::Text(text) => on_text(&text),
                Piece::Done(answer) => return Ok(*answer),
            }
        }
        Err(QuireError::Internal("the engine ended an answer without saying so".into()))
    }
}

/// What is known of an answer so far.
struct Tally {
    started: Instant,
    last_token: Option<Instant>,
    metrics: Arc<Metrics>,
    text: String,
    context: Vec<ContextChunk>,
    notes: Vec<String>,
    stats: Stats,
}

impl Tally {
    fn started(&mut self, prefill: &PrefillStats) {
        let stats = &mut self.stats;
        stats.prompt_tokens = prefill.prompt_tokens;
        stats.reused_tokens = prefill.reused_tokens;
        stats.cached_exact_tokens = prefill.exact_tokens + prefill.prefix_tokens;
        stats.cached_composed_tokens = prefill.reused_tokens - prefill.exact_tokens;
        stats.recomputed_tokens = prefill.recomputed_tokens;
        stats.prefix_tokens = prefill.prefix_tokens;
        stats.suffix_tokens = prefill.suffix_tokens;
        stats.chunks_failed = prefill.failed_chunks;
        stats.queue_seconds = prefill.queue_seconds;
        stats.prefill_seconds = prefill.seconds;
        stats.blend_deviation = prefill.blend_deviation;
        stats.rule = prefill.rule.map(|rule| rule.to_string());
        stats.charged_share = prefill.charged_share;
        stats.gate = prefill.gate;
        stats.ttft_seconds = self.started.elapsed().as_secs_f64();
        self.metrics.first_token(prefill, stats.ttft_seconds);
        if prefill.failed_chunks > 0 {
            self.notes.push(format!(
                "{} cached chunks could not be read intact and were computed instead",
                prefill.failed_chunks
            ));
        }
    }

    fn token(&mut self) {
        let now = Instant::now();
        match self.last_token {
            None => self.stats.ttft_seconds = (now - self.started).as_secs_f64(),
            Some(last) => self.metrics.next_token((now - last).as_secs_f64()),
        }
        self.last_token = Some(now);
    }

    fn finish(&mut self, finished: &Finished) -> Answer {
        self.text.push_str(&finished.text);
        let reason = match finished.reason {
            FinishReason::Stop | FinishReason::StopString => "stop",
            FinishReason::Length => "length",
            FinishReason::Memory => {
                self.notes.push("the answer was cut: the memory for KV (kv_budget_bytes) holds no more".into());
                "length"
            }
        };
        self.stats.total_seconds = self.started.elapsed().as_secs_f64();
        self.end(&finished.usage, &finished.decode);
        if finished.decode.index_failures > 0 {
            self.notes.push("an index over cold keys could not be built: they were attended exactly".into());
        }
        self.metrics.finished(reason, &finished.usage, &finished.decode, self.stats.total_seconds);
        Answer {
            citations: cite(&self.context, &self.text),
            text: std::mem::take(&mut self.text),
            finish_reason: reason.into(),
            stats: self.stats.clone(),
            notes: std::mem::take(&mut self.notes),
        }
    }

    fn end(&mut self, usage: &Usage, decode: &DecodeStats) {
        let stats = &mut self.stats;
        stats.completion_tokens = usage.completion_tokens;
        stats.decode_seconds = decode.seconds;
        stats.cold_keys = decode.cold_keys;
        stats.keys_scored = decode.keys_scored;
        stats.keys_attended = decode.keys_attended;
        stats.scored_share = decode.scored_share();
        stats.attended_share = decode.attended_share();
        stats.index_build_seconds = decode.index_build_seconds;
    }
}

fn cite(context: &[ContextChunk], answer: &str) -> Vec<Citation> {
    let parts = answer_parts(answer);
    context.iter().map(|chunk| cite_one(&chunk.passage, &parts)).collect()
}

fn cite_one(passage: &Passage, parts: &[AnswerPart]) -> Citation {
    let text = comparable(passage.text());
    let answer_span = parts.iter().find(|part| text.contains(part.words.as_str())).map(|part| part.span);
    let (document, span, line) = match passage {
        Passage::Found(found) => (found.path.clone(), found.span, found.line),
        Passage::Given(chunk) => (PathBuf::from(&*chunk.given.name()), chunk.span.chars, chunk.line()),
    };
    let (score, document_id, given) = match passage {
        Passage::Found(found) => (Some(found.score), Some(found.id), None),
        Passage::Given(chunk) => (None, None, Some(Arc::clone(&chunk.given))),
    };
    Citation {
        document,
        span,
        line,
        passage: passage.text().to_string(),
        score,
        contains_answer: answer_span.is_some(),
        answer_span,
        document_id,
        given,
    }
}

/// An answer as a whole, or what stands between two of its commas.
struct AnswerPart {
    /// As ` word word `.
    words: String,
    /// Where it stands in the answer, in characters.
    span: Span,
}

/// The answer, then its parts.
fn answer_parts(answer: &str) -> Vec<AnswerPart> {
    // Also the commas of Chinese, Japanese and Arabic.
    let between = answer.split(['、', '，', '،']).flat_map(|part| part.split(", "));
    let mut parts: Vec<AnswerPart> = std::iter::once(answer)
        .chain(between)
        .map(|part| {
            let (lead, text) = (part.len() - part.trim_start().len(), part.trim());
            // A part is a slice of the answer.
            let before = part.as_ptr() as usize - answer.as_ptr() as usize + lead;
            let start = answer[..before].chars().count();
            AnswerPart { words: comparable(text), span: Span { start, end: start + text.chars().count() } }
        })
        .collect();
    parts.retain(|part| part.words.chars().any(char::is_alphanumeric));
    parts.dedup_by(|b, a| b.words == a.words);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(passage: &str, answer: &str) -> bool {
        let passage = comparable(passage);
        answer_parts(answer).iter().any(|part| passage.contains(part.words.as_str()))
    }

    #[test]
    fn an_answer_is_found_word_for_word_only() {
        assert!(contains("The Skerrick tower is 131 feet\nhigh.", "131 Feet"));
        assert!(contains("built by Ada Thorne,", "Ines Marl, Ada Thorne"));
        assert!(!contains("The tower is 1310 feet high.", "131"));
        assert!(!contains("Any passage.", " . "));
        assert!(!contains("Adam Thorne", "Ada"));
    }

    #[test]
    fn an_answer_is_found_in_every_script_and_with_or_without_accents() {
        assert!(contains("图书馆每天早上九点开门。", "九点"));
        assert!(contains("열쇠는 도서관에 있습니다.", "도서관"));
        assert!(contains("Das Café Zu\u{308}rich öffnet um ７ Uhr.", "cafe zürich"));
        assert!(contains("เก็บกุญแจไว้ในตู้ ๔๔๑๗", "4417"));
        assert!(contains("鍵は事務所にあります。", "受付、事務所"));
        assert!(!contains("图书馆每天早上九点开门。", "十点"));
    }

    #[test]
    fn the_place_of_a_part_in_the_answer_is_counted_in_characters() {
        for answer in [" Inés Marl, Ada Thorne.", "Ines", "一、二，三", ", ,x,  y", ""] {
            for part in answer_parts(answer) {
                let shown: String = answer.chars().skip(part.span.start).take(part.span.len()).collect();
                assert_eq!(comparable(&shown), part.words, "{answer}");
                assert_eq!(shown.trim(), shown, "{answer}");
            }
        }
        let parts: Vec<Span> = answer_parts(" Inés Marl, Ada Thorne.").iter().map(|part| part.span).collect();
        assert_eq!(parts, [(1, 23), (1, 10), (12, 23)].map(|(start, end)| Span { start, end }));
    }
}
