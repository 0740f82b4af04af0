//! What is reported of an answer's tokens: text, bytes and log-probabilities, of the likeliest others as well.

use std::collections::VecDeque;

use crate::error::Result;
use crate::request::{Alternative, TokenLogprob};
use crate::sampler::Sampled;
use crate::tokenizer::Tokenizer;

/// Holds tokens back until their text is the answer's: text may be held back for a stop string, or until a character is
/// complete.
#[derive(Debug)]
pub(crate) struct TokenLog {
    tokenizer: Tokenizer,
    held: VecDeque<TokenLogprob>,
    /// How many of the first of these are complete: no text follows from them any more.
    complete: usize,
    /// Bytes of their text that have been released.
    released: usize,
    begun: bool,
}

impl TokenLog {
    pub(crate) fn new(tokenizer: Tokenizer) -> TokenLog {
        TokenLog { tokenizer, held: VecDeque::new(), complete: 0, released: 0, begun: false }
    }

    /// A token was chosen; `text` became certain with it, and `settled` says that nothing more follows from the tokens so far.
    /// Special tokens are no text: they are left out.
    ///
    /// # Errors
    /// What the tokenizer fails with.
    pub(crate) fn push(&mut self, sampled: Sampled, text: &str, top: Vec<(u32, f32)>, settled: bool) -> Result<()> {
        let Sampled { id, logprob } = sampled;
        if self.tokenizer.is_special(id) {
            return Ok(());
        }
        let begins = !std::mem::replace(&mut self.begun, true);
        let alternative = |(id, logprob)| -> Result<Alternative> {
            let bytes = self.tokenizer.token_bytes(id, begins)?;
            Ok(Alternative { id, text: String::from_utf8_lossy(&bytes).into_owned(), bytes, logprob })
        };
        let top = top.into_iter().map(alternative).collect::<Result<Vec<_>>>()?;
        let bytes = self.tokenizer.token_bytes(id, begins)?;
        self.held.push_back(TokenLogprob { id, text: text.into(), bytes, logprob, top });
        if settled {
            self.complete = self.held.len();
        }
        Ok(())
    }

    /// Text that follows from the last token, as nothing completes it any more.
    pub(crate) fn append(&mut self, text: &str) {
        if let Some(last) = self.held.back_mut() {
            last.text.push_str(text);
        }
    }

    /// So many bytes more of the text belong to the answer: the tokens that this makes complete. With `last`, nothing follows: a
    /// token whose text is the answer's in part is cut, and those behind it are dropped.
    pub(crate) fn release(&mut self, bytes: usize, last: bool) -> Vec<TokenLogprob> {
        self.released += bytes;
        let mut out = if last { self.cut() } else { self.drain_complete() };
        for token in &mut out {
            // One token has one text.
            let TokenLogprob { id, text, top, .. } = token;
            top.iter_mut().filter(|other| other.id == *id).for_each(|other| other.text.clone_from(text));
        }
        out
    }

    /// Tokens without a text of their own go with the one that completes their character.
    fn drain_complete(&mut self) -> Vec<TokenLogprob> {
        let (mut left, mut count) = (self.released, 0);
        for (index, token) in self.held.iter().take(self.complete).enumerate() {
            if token.text.len() > left {
                break;
            }
            left -= token.text.len();
            if !token.text.is_empty() {
                (count, self.released) = (index + 1, left);
            }
        }
        self.complete -= count;
        self.held.drain(..count).collect()
    }

    fn cut(&mut self) -> Vec<TokenLogprob> {
        let (mut out, mut parts) = (Vec::new(), Vec::new());
        for mut token in self.held.drain(..) {
            if token.text.is_empty() {
                parts.push(token);
                continue;
            }
            let kept = token.text.len().min(self.released);
            if kept == 0 {
                return out;
            }
            self.released -= kept;
            let cut = token.text[kept..].chars().count();
            token.text.truncate(kept);
            cut_bytes(&mut parts, &mut token, cut);
            out.append(&mut parts);
            out.push(token);
        }
        out.append(&mut parts);
        out
    }
}

/// Takes the bytes of the last `characters` off a token and the parts of characters before it; parts that are cut off whole are no
/// tokens of the answer. Bytes that are no character stand in a text as one U+FFFD for each broken sequence of them.
fn cut_bytes(parts: &mut Vec<TokenLogprob>, token: &mut TokenLogprob, characters: usize) {
    let bytes: Vec<u8> = parts.iter().chain([&*token]).flat_map(|token| token.bytes.iter().copied()).collect();
    let mut lengths = Vec::new();
    for chunk in bytes.utf8_chunks() {
        lengths.extend(chunk.valid().chars().map(char::len_utf8));
        lengths.extend(Some(chunk.invalid().len()).filter(|length| *length > 0));
    }
    let mut cut: usize = lengths.iter().rev().take(characters).sum();
    let mut shorten = |bytes: &mut Vec<u8>| {
        let left = bytes.len().saturating_sub(cut);
        cut -= bytes.len() - left;
        bytes.truncate(left);
        left
    };
    shorten(&mut token.bytes);
    while parts.last_mut().is_some_and(|part| shorten(&mut part.bytes) == 0) {
        parts.pop();
    }
}
