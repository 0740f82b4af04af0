//! From the tokens of an answer to its text: characters are completed, stop strings found, tokens reported.

use crate::error::Result;
use crate::logprobs::TokenLog;
use crate::request::TokenLogprob;
use crate::sampler::Sampled;
use crate::stop::{Released, StopMatcher};
use crate::tokenizer::{StreamDecoder, Tokenizer};

/// The text of an answer as it grows.
pub(crate) struct AnswerText {
    decoder: StreamDecoder,
    stop: StopMatcher,
    /// `None`: tokens are not reported.
    log: Option<TokenLog>,
}

/// What a token adds to the answer.
#[derive(Debug, Default)]
pub(crate) struct AnswerPiece {
    pub(crate) text: String,
    /// The tokens that became complete.
    pub(crate) logprobs: Vec<TokenLogprob>,
    /// A stop string was reached: nothing more is added.
    pub(crate) stopped: bool,
}

impl AnswerText {
    pub(crate) fn new(tokenizer: &Tokenizer, stop: Vec<String>, logprobs: bool) -> AnswerText {
        AnswerText {
            decoder: tokenizer.stream(),
            stop: StopMatcher::new(stop),
            log: logprobs.then(|| TokenLog::new(tokenizer.clone())),
        }
    }

    /// Takes a token; `top` are the likeliest in its place. Stop strings are not looked for where they `may_stop` nothing yet.
    ///
    /// # Errors
    /// What the tokenizer fails with.
    pub(crate) fn push(&mut self, sampled: Sampled, top: Vec<(u32, f32)>, may_stop: bool) -> Result<AnswerPiece> {
        let text = self.decoder.push(sampled.id)?;
        if let Some(log) = &mut self.log {
            log.push(sampled, &text, top, self.decoder.is_settled())?;
        }
        let Released { text, stop } = if may_stop { self.stop.push(&text) } else { Released { text, stop: None } };
        let stopped = stop.is_some();
        let logprobs = self.log.as_mut().map_or_else(Vec::new, |log| log.release(text.len(), stopped));
        Ok(AnswerPiece { text, logprobs, stopped })
    }

    /// The answer has ended, not by a stop string: what was held back.
    ///
    /// # Errors
    /// What the tokenizer fails with.
    pub(crate) fn finish(&mut self) -> Result<AnswerPiece> {
        let rest = self.decoder.clone().finish()?;
        let Released { text, stop } = self.stop.push(&rest);
        let text = text + &self.stop.finish();
        let logprobs = self.log.as_mut().map_or_else(Vec::new, |log| {
            log.append(&rest);
            log.release(text.len(), true)
        });
        Ok(AnswerPiece { text, logprobs, stopped: stop.is_some() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    static REFERENCE: LazyLock<Tokenizer> = LazyLock::new(|| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference");
        Tokenizer::from_dir(&dir, 7168).unwrap()
    });

    /// All pieces of an answer, each token chosen among itself and another.
    fn answer(ids: &[u32], stop: &[&str]) -> Vec<AnswerPiece> {
        let stop = stop.iter().map(ToString::to_string).collect();
        let mut answer = AnswerText::new(&REFERENCE, stop, true);
        let mut pieces = Vec::new();
        for &id in ids {
            let piece = answer.push(Sampled { id, logprob: -0.5 }, vec![(id, -0.5), (40, -1.5)], true).unwrap();
            let stopped = piece.stopped;
            pieces.push(piece);
            if stopped {
                return pieces;
            }
        }
        pieces.push(answer.finish().unwrap());
        pieces
    }

    /// The text, that of the tokens, and their bytes.
    fn joined(pieces: &[AnswerPiece]) -> (String, String, Vec<u8>) {
        let tokens = || pieces.iter().flat_map(|piece| &piece.logprobs);
        (
            pieces.iter().map(|piece| piece.text.as_str()).collect(),
            tokens().map(|token| token.text.as_str()).collect(),
            tokens().flat_map(|token| token.bytes.clone()).collect(),
        )
    }

    #[test]
    fn the_last_token_of_a_character_has_all_of_it_and_each_its_bytes() {
        let ids = REFERENCE.encode_plain("a \u{5099}!").unwrap();
        let pieces = answer(&ids, &[]);
        let tokens: Vec<_> = pieces.iter().flat_map(|piece| &piece.logprobs).collect();
        assert_eq!(tokens.len(), ids.len());
        let parts = tokens.iter().filter(|token| token.text.is_empty()).count();
        assert!(parts > 0, "no token is part of a character: {tokens:?}");
        let whole = tokens.iter().find(|token| token.text.ends_with('\u{5099}')).unwrap();
        assert!(std::str::from_utf8(&whole.bytes).is_err(), "its bytes are a part: {whole:?}");
        assert_eq!((whole.top[0].text.as_str(), &whole.top[0].bytes), (whole.text.as_str(), &whole.bytes));
        assert!(pieces.iter().all(|piece| piece.logprobs.is_empty() || !piece.text.is_empty()), "{pieces:?}");
        assert_eq!(joined(&pieces), ("a \u{5099}!".into(), "a \u{5099}!".into(), "a \u{5099}!".into()));
    }

    #[test]
    fn tokens_of_a_stop_string_are_left_out_and_one_that_reaches_into_it_is_cut() {
        let ids = REFERENCE.encode_plain("the harbour, the keeper").unwrap();
        for stop in ["bour", ", the k", " the", "h", "er"] {
            let pieces = answer(&ids, &[stop]);
            let expected = "the harbour, the keeper".split(stop).next().unwrap();
            assert_eq!(joined(&pieces), (expected.into(), expected.into(), expected.into()), "{stop}");
        }
        // A special token is no text.
        assert_eq!(joined(&answer(&[ids[0], 3, ids[1]], &[])).1.matches("<|").count(), 0);
    }

    /// U+FFFD stands for bytes that are no character, of which a stop string may take any number.
    #[test]
    fn a_stop_string_cuts_broken_characters_as_it_cuts_whole_ones() {
        let byte = |byte: u8| REFERENCE.encode_plain(&char::from(byte).to_string()).unwrap();
        // Two bytes that begin a character each and lack the rest of it, then a letter.
        let lead: u32 = {
            let parts = REFERENCE.encode_plain("\u{5099}").unwrap();
            parts[0]
        };
        let ids = [byte(b'a'), vec![lead, lead], byte(b'b')].concat();
        let (whole, _, bytes) = joined(&answer(&ids, &[]));
        assert_eq!((whole.as_str(), bytes.len()), ("a\u{fffd}\u{fffd}b", 4));
        for (stop, text, length) in [
            ("b", "a\u{fffd}\u{fffd}", 3),
            ("\u{fffd}b", "a\u{fffd}", 2),
            ("\u{fffd}\u{fffd}", "a", 1),
            ("\u{fffd}", "a", 1),
            ("a", "", 0),
        ] {
            let (found, tokens, bytes) = joined(&answer(&ids, &[stop]));
            assert_eq!((found.as_str(), tokens.as_str(), bytes.len()), (text, text, length), "{stop:?}");
        }
    }

    proptest! {
        #[test]
        fn the_tokens_texts_make_up_the_answer_whatever_the_tokens_are(
            ids in prop::collection::vec(6u32..7168, 0..40),
            bytes in prop::collection::vec(6u32..262, 0..12),
            stop in prop::collection::vec("[a-e\u{fffd} ]{1,2}", 0..3),
        ) {
            let ids = [ids, bytes].concat();
            let stop: Vec<&str> = stop.iter().map(String::as_str).collect();
            let (text, tokens, bytes) = joined(&answer(&ids, &stop));
            prop_assert_eq!(&text, &tokens);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes));
        }
    }
}
