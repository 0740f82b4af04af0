//! Passages that come with the question, from whoever searches elsewhere.
//!
//! They become chunks as documents do: a long one is split, each piece is computed by itself, kept in the chunk store under
//! its tokens, and blended into the prompt. Nothing of them is kept beside that.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use engine::EngineError;
use serde_json::{Map, Value};

use super::Service;
use super::context::{Candidate, Passage};
use documents::{ChunkSpan, Format, split};
use settings::Result;

/// A text that came with a question, and what its citations say of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GivenPassage {
    /// The text.
    pub text: String,
    /// Its id, there where it came from.
    pub id: Option<String>,
    /// The file that it is from.
    pub filename: Option<String>,
    /// What it is called.
    pub title: Option<String>,
    /// Where it can be read.
    pub url: Option<String>,
    /// What else is known of it.
    pub attributes: Option<Map<String, Value>>,
    /// Which of the passages that came it is, from 1.
    pub number: usize,
}

impl GivenPassage {
    /// What it is called by people: its file, else its title, its place or its id, else its number.
    #[must_use]
    pub fn name(&self) -> Cow<'_, str> {
        let names = [&self.filename, &self.title, &self.url, &self.id];
        let given = names.into_iter().find_map(|name| name.as_deref());
        given.map_or_else(|| format!("passage {}", self.number).into(), Cow::Borrowed)
    }

    fn format(&self) -> Format {
        self.filename.as_deref().and_then(|name| Format::of_name(name.as_ref())).unwrap_or(Format::Text)
    }

    /// Its words, whatever the white space between them.
    fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for word in self.text.split_whitespace() {
            hasher.update(word.as_bytes()).update(b" ");
        }
        hasher.finalize()
    }
}

/// A piece of a passage that came with a question.
#[derive(Clone, Debug)]
pub struct GivenChunk {
    /// The passage.
    pub given: Arc<GivenPassage>,
    /// Where in its text.
    pub span: ChunkSpan,
}

impl GivenChunk {
    /// The text there.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.given.text[self.span.bytes.clone()]
    }

    /// The line of the passage that it begins in, from 1.
    #[must_use]
    pub fn line(&self) -> usize {
        1 + self.given.text.as_bytes()[..self.span.bytes.start].iter().filter(|byte| **byte == b'\n').count()
    }
}

/// What was taken of the passages that were given.
#[derive(Default)]
struct Taken {
    chunks: Vec<Candidate>,
    tokens: usize,
    /// Passages that are in the context, the last one perhaps in part.
    passages: usize,
    cut: bool,
}

impl Service {
    /// The given passages that fit `room` tokens together, in their order: the first ones, of the last of them perhaps only the
    /// beginning. What does not fit is not even read. One that says the same as one before it is left out.
    pub(super) fn take_given(
        &self,
        given: &[Arc<GivenPassage>],
        room: usize,
        wanted: &dyn Fn() -> bool,
        notes: &mut Vec<String>,
    ) -> Result<Vec<Candidate>> {
        let distinct = distinct(given);
        let repeated = given.len() - distinct.len();
        if repeated > 0 {
            notes.push(format!("{repeated} of {} passages were left out: they repeat others", given.len()));
        }
        if given.is_empty() {
            notes.push("no passage was given".to_string());
        }
        let mut taken = Taken::default();
        for passage in &distinct {
            if !wanted() {
                return Err(EngineError::Cancelled.into());
            }
            if !self.take_one(passage, room, &mut taken)? {
                break;
            }
        }
        notes.extend(taken.shortfall(distinct.len(), room));
        Ok(taken.chunks)
    }

    /// Takes the chunks of a passage until `room` tokens are full. False: they are.
    fn take_one(&self, passage: &Arc<GivenPassage>, room: usize, taken: &mut Taken) -> Result<bool> {
        let count = |text: &str| self.engine.tokenizer().encode_plain(text).map(|tokens| tokens.len());
        let spans = split(&passage.text, passage.format(), self.limits, &count)?;
        for (index, span) in spans.into_iter().enumerate() {
            let chunk = GivenChunk { given: Arc::clone(passage), span };
            let tokens = self.chunk_tokens(chunk.text())?;
            if taken.tokens + tokens.len() > room {
                taken.cut = index > 0;
                return Ok(false);
            }
            taken.passages += usize::from(index == 0);
            taken.tokens += tokens.len();
            taken.chunks.push(Candidate { passage: Passage::Given(chunk), tokens });
        }
        Ok(true)
    }
}

impl Taken {
    /// What to say where not all of `total` passages fitted.
    fn shortfall(&self, total: usize, room: usize) -> Option<String> {
        let left_out = total - self.passages;
        let what = match (left_out, self.cut) {
            (0, false) => return None,
            (0, true) => format!("the last of {total} passages was cut"),
            (_, false) => format!("{left_out} of {total} passages were left out, the last ones"),
            (_, true) => {
                format!("{left_out} of {total} passages were left out, the last ones, and the one before was cut")
            }
        };
        Some(format!("{what}: the context holds {room} more tokens"))
    }
}

/// The passages, each text once.
fn distinct(given: &[Arc<GivenPassage>]) -> Vec<Arc<GivenPassage>> {
    let mut seen = HashSet::new();
    given.iter().filter(|passage| seen.insert(passage.digest())).map(Arc::clone).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn passage(text: &str) -> Arc<GivenPassage> {
        Arc::new(GivenPassage { text: text.into(), ..GivenPassage::default() })
    }

    #[test]
    fn a_text_that_comes_twice_is_read_once_whatever_its_white_space() {
        let given = ["a b", "a  b\n", "ab", "b a", " a b"].map(passage);
        let kept: Vec<String> = distinct(&given).iter().map(|passage| passage.text.clone()).collect();
        assert_eq!(kept, ["a b", "ab", "b a"]);
    }

    #[test]
    fn a_passage_goes_by_the_best_of_its_names() {
        let mut passage = GivenPassage { id: Some("7".into()), ..GivenPassage::default() };
        assert_eq!(passage.name(), "7");
        passage.title = Some("Tides".into());
        assert_eq!(passage.name(), "Tides");
        passage.filename = Some("tides.md".into());
        assert_eq!((&*passage.name(), passage.format()), ("tides.md", Format::Markdown));
        let [one, other] = [1, 2].map(|number| GivenPassage { number, ..GivenPassage::default() });
        assert_eq!((&*one.name(), &*other.name()), ("passage 1", "passage 2"), "citations tell them apart");
    }

    #[test]
    fn what_did_not_fit_is_said_once_and_exactly() {
        let said = |passages: usize, cut: bool| Taken { passages, cut, ..Taken::default() }.shortfall(5, 90);
        assert_eq!(said(5, false), None);
        let ends = ": the context holds 90 more tokens";
        assert_eq!(said(5, true).unwrap(), format!("the last of 5 passages was cut{ends}"));
        assert_eq!(said(3, false).unwrap(), format!("2 of 5 passages were left out, the last ones{ends}"));
        assert!(said(3, true).unwrap().starts_with("2 of 5 passages were left out, the last ones, and the one before"));
    }
}
