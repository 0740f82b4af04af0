//! The bytes that tokens stand for, and how many tokens bytes become at least.

use serde_json::Value;
use tokenizers::{DecoderWrapper, ModelWrapper};

use super::Tokenizer;
use crate::error::Result;

/// How a vocabulary writes bytes.
#[derive(Debug)]
pub(super) struct ByteCoding {
    form: Form,
    /// Bytes of text that a token stands for at most; `None`: a token may stand for any number of them.
    longest: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A character for each byte, as of GPT-2.
    Level,
    /// Text, and `<0x0A>` for a byte that is no text by itself.
    Fallback,
    /// Text alone.
    Text,
}

impl ByteCoding {
    pub(super) fn of(tokenizer: &tokenizers::Tokenizer) -> ByteCoding {
        let form = tokenizer.get_decoder().map_or(Form::Text, form);
        ByteCoding { form, longest: longest(tokenizer, form) }
    }
}

fn form(decoder: &DecoderWrapper) -> Form {
    match decoder {
        DecoderWrapper::ByteLevel(_) => Form::Level,
        DecoderWrapper::ByteFallback(_) => Form::Fallback,
        DecoderWrapper::Sequence(all) => {
            all.get_decoders().iter().map(form).find(|form| *form != Form::Text).unwrap_or(Form::Text)
        }
        _ => Form::Text,
    }
}

/// Every byte is in some token where unknown text becomes tokens of single bytes: then tokens of so many bytes at most make up a
/// text, unless it loses bytes before.
fn longest(tokenizer: &tokenizers::Tokenizer, form: Form) -> Option<usize> {
    let ModelWrapper::BPE(model) = tokenizer.get_model() else { return None };
    if form == Form::Text || (form == Form::Fallback && !model.byte_fallback) {
        return None;
    }
    // These swallow the white space around them.
    if tokenizer.get_added_tokens_decoder().values().any(|token| token.lstrip || token.rstrip) {
        return None;
    }
    let split = serde_json::to_string(&tokenizer.get_pre_tokenizer()).ok()?;
    if ["Removed", "Whitespace"].iter().any(|loses| split.contains(loses)) {
        return None;
    }
    let normalizer = serde_json::to_value(tokenizer.get_normalizer()).ok()?;
    let length = |token: &String| if form == Form::Level { token.chars().count().max(1) } else { token.len() };
    Some(tokenizer.get_vocab(true).keys().map(length).max()? * shrinking(&normalizer)?)
}

/// How many bytes become one at most; `None`: any number.
fn shrinking(normalizer: &Value) -> Option<usize> {
    match normalizer["type"].as_str() {
        None if normalizer.is_null() => Some(1),
        Some("Prepend") => Some(1),
        // A space becomes a mark.
        Some("Replace") if normalizer["pattern"]["String"] == " " && normalizer["content"] != "" => Some(1),
        // Three bytes of a Kelvin sign become one; marks and letters become one letter of a third of their bytes.
        Some("NFC") => Some(4),
        Some("Sequence") => normalizer["normalizers"].as_array()?.iter().map(shrinking).product(),
        _ => None,
    }
}

impl Tokenizer {
    /// The bytes of a token as it stands in a text, or at the beginning of one where that makes a difference: parts of a
    /// character too, and the literal of a special token. None for an id beyond the vocabulary.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn token_bytes(&self, id: u32, begins: bool) -> Result<Vec<u8>> {
        let Some(token) = self.inner.full.id_to_token(id) else { return Ok(Vec::new()) };
        match self.inner.bytes.form {
            Form::Level => return Ok(level_bytes(&token)),
            Form::Fallback => {
                if let Some(byte) = fallback_byte(&token) {
                    return Ok(vec![byte]);
                }
            }
            Form::Text => {}
        }
        let once = self.decode_with_specials(&[id])?;
        if begins {
            return Ok(once.into_bytes());
        }
        // Behind itself it is not the first, whose space is dropped by some and which others put none in front of.
        let twice = self.decode_with_specials(&[id, id])?;
        Ok(twice.strip_prefix(once.as_str()).unwrap_or(&once).as_bytes().to_vec())
    }

    /// Tokens that a text of so many bytes becomes at least, whatever it says.
    #[must_use]
    pub fn least_tokens(&self, bytes: usize) -> usize {
        self.inner.bytes.longest.map_or(0, |longest| bytes.div_ceil(longest))
    }
}

/// As the decoder of byte-level vocabularies has it: a token with any other character is text.
fn level_bytes(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(level_byte).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a character stands for: printable ones for themselves, the others in order behind them (GPT-2's
/// `bytes_to_unicode`).
fn level_byte(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>').filter(|digits| digits.len() == 2)?;
    u8::from_str_radix(digits, 16).ok()
}
