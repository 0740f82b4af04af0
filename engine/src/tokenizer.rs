//! Text to token ids and back, through a model's `tokenizer.json`.
//!
//! Two ways in: [`Tokenizer::encode`] recognises the literals of special tokens (`<|end_of_text|>` and the like) and
//! is for text of the model's own making, such as a template; [`Tokenizer::encode_plain`] reads them as ordinary
//! text and is for everything that comes from outside: a document must not be able to end a prompt. "Special" is
//! what `tokenizer.json` marks so. Neither adds tokens of its own.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{EngineError, Result};

/// A model's tokenizer. Cheap to clone, safe to share.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    full: tokenizers::Tokenizer,
    /// Reads the literals of special tokens as text; knows the `stands` instead.
    plain: tokenizers::Tokenizer,
    stands: Vec<Stand>,
    specials: Vec<Special>,
    /// The characters that special tokens begin with.
    openers: Vec<char>,
    bos: Option<u32>,
    eos: Option<u32>,
    fingerprint: [u8; 32],
}

#[derive(Debug)]
struct Special {
    id: u32,
    token: AddedToken,
}

/// A literal that no text contains. It stands for a special token in text whose other parts are plain, so that one
/// pass splits the text exactly as the original literal would have.
#[derive(Debug)]
struct Stand {
    literal: String,
    id: u32,
    strips: (bool, bool),
}

/// A part of a text: from the model's own template, or from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part<'a> {
    /// Literals of special tokens are recognised.
    Trusted(&'a str),
    /// Everything is plain text.
    Plain(&'a str),
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir` and, if there, the names of bos and eos in `tokenizer_config.json`; checks that
    /// every id fits a model with `vocab` embeddings.
    ///
    /// # Errors
    /// [`EngineError::MissingFile`], [`EngineError::Tokenizer`], [`EngineError::TokenizerMismatch`].
    pub fn from_dir(dir: &Path, vocab: usize) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path)
            .map_err(|e| EngineError::reading(&path, e, "it turns text into the model's tokens"))?;
        let failed = |e: tokenizers::Error| EngineError::Tokenizer { path: path.clone(), why: e.to_string() };
        let mut full = tokenizers::Tokenizer::from_bytes(&bytes).map_err(failed)?;
        full.with_padding(None).with_truncation(None).map_err(failed)?;
        check_vocabulary(&full, &path, vocab)?;

        let mut specials: Vec<Special> = full
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| Special { id, token })
            .collect();
        specials.sort_by_key(|special| special.id);
        let mut openers: Vec<char> = specials.iter().filter_map(|s| s.token.content.chars().next()).collect();
        openers.sort_unstable();
        openers.dedup();
        let (plain, stands) = plain(&full, &specials).map_err(failed)?;

        let config = read_config(&dir.join("tokenizer_config.json"))?;
        let named = |key: &str| {
            let name = &config[key];
            full.token_to_id(name.as_str().or_else(|| name["content"].as_str())?)
        };
        let (bos, eos) = (named("bos_token"), named("eos_token"));
        let fingerprint = blake3::derive_key("quire tokenizer 1", &bytes);
        Ok(Tokenizer { inner: Arc::new(Inner { path, full, plain, stands, specials, openers, bos, eos, fingerprint }) })
    }

    /// Token ids of a trusted text: the literals of special tokens become these tokens. None is added.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the tokenizer's own rules fail on the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.inner.full.encode_fast(text, false).map_err(|e| self.failed(&e))?.get_ids().to_vec())
    }

    /// Token ids of a text from outside: the literals of special tokens are ordinary text. None is added.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.inner.plain.encode_fast(text, false).map_err(|e| self.failed(&e))?.get_ids().to_vec())
    }

    /// As [`encode_plain`](Self::encode_plain), with the bytes of `text` that each token stands for. Tokens that share
    /// a character all cover it whole, so that every range lies on character boundaries.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let encoding = self.inner.plain.encode(text, false).map_err(|e| self.failed(&e))?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end);
        Ok(encoding.get_ids().iter().copied().zip(ranges).collect())
    }

    /// Tokenises parts as the one text they make up. With `continues`, the text does not begin the prompt: tokenizers
    /// that mark the beginning of a text do not mark this one.
    pub(crate) fn encode_parts(&self, parts: &[Part<'_>], continues: bool) -> Result<Vec<u32>> {
        let mut text = String::new();
        let mut ids = Vec::new();
        if continues && let Some(stand) = self.inner.stands.first() {
            text.push_str(&stand.literal);
        }
        for part in parts {
            match part {
                Part::Plain(plain) => text.push_str(plain),
                Part::Trusted(trusted) => self.stand_in(trusted, &mut text, &mut ids),
            }
        }
        let encoded = self.encode_plain(&text)?;
        let encoded = &encoded[usize::from(continues && !self.inner.stands.is_empty() && !encoded.is_empty())..];
        let mut ids = ids.into_iter();
        let is_stand = |id: u32| self.inner.stands.iter().any(|stand| stand.id == id);
        let restored = encoded.iter().map(|&id| if is_stand(id) { ids.next() } else { Some(id) });
        let restored: Option<Vec<u32>> = restored.collect();
        match restored {
            Some(restored) if ids.next().is_none() => Ok(restored),
            _ => Err(EngineError::Internal("special tokens were lost while a prompt was tokenised".into())),
        }
    }

    /// Appends `trusted` to `text`, special tokens replaced by their stands and their ids appended to `ids`.
    fn stand_in(&self, mut trusted: &str, text: &mut String, ids: &mut Vec<u32>) {
        while let Some((at, special)) = self.find_special(trusted) {
            let strips = (special.token.lstrip, special.token.rstrip);
            text.push_str(&trusted[..at]);
            // Every special token has a stand that strips as it does.
            text.extend(self.inner.stands.iter().find(|s| s.strips == strips).map(|s| s.literal.as_str()));
            ids.push(special.id);
            trusted = &trusted[at + special.token.content.len()..];
        }
        text.push_str(trusted);
    }

    /// The leftmost literal of a special token in `text`, the longest of those that start there.
    fn find_special(&self, text: &str) -> Option<(usize, &Special)> {
        let mut openings = text.char_indices().filter(|(_, c)| self.inner.openers.contains(c));
        openings.find_map(|(at, _)| {
            let here = self.inner.specials.iter().filter(|s| text[at..].starts_with(&s.token.content));
            here.max_by_key(|s| s.token.content.len()).map(|special| (at, special))
        })
    }

    /// The leftmost literal of a special token in `text`.
    pub(crate) fn find_special_literal(&self, text: &str) -> Option<Range<usize>> {
        self.find_special(text).map(|(at, special)| at..at + special.token.content.len())
    }

    /// The text of these tokens; special tokens and ids beyond the vocabulary give none.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.full.decode(ids, true).map_err(|e| self.failed(&e))
    }

    /// As [`decode`](Self::decode), with the literals of special tokens.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn decode_with_specials(&self, ids: &[u32]) -> Result<String> {
        self.inner.full.decode(ids, false).map_err(|e| self.failed(&e))
    }

    /// Whether `tokenizer.json` marks the token as special.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.specials.binary_search_by_key(&id, |special| special.id).is_ok()
    }

    /// The id of a token by its literal.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.full.token_to_id(token)
    }

    /// The token that `tokenizer_config.json` names to begin a text.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.inner.bos
    }

    /// The token that `tokenizer_config.json` names to end a text.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.inner.eos
    }

    /// Hash of `tokenizer.json`: equal fingerprints give equal tokens.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        self.inner.fingerprint
    }

    /// A decoder for tokens that come one by one.
    #[must_use]
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder { tokenizer: self.clone(), ids: Vec::new(), settled: 0, context: String::new(), sent: 0 }
    }

    fn failed(&self, error: &tokenizers::Error) -> EngineError {
        EngineError::Tokenizer { path: self.inner.path.clone(), why: error.to_string() }
    }
}

fn check_vocabulary(tokenizer: &tokenizers::Tokenizer, path: &Path, vocab: usize) -> Result<()> {
    match tokenizer.get_vocab(true).into_iter().max_by_key(|(_, id)| *id) {
        Some((token, id)) if id as usize >= vocab => {
            Err(EngineError::TokenizerMismatch { path: path.to_path_buf(), token, id, vocab })
        }
        Some(_) => Ok(()),
        None => Err(EngineError::Tokenizer { path: path.to_path_buf(), why: "it has no tokens".into() }),
    }
}

fn plain(
    full: &tokenizers::Tokenizer,
    specials: &[Special],
) -> tokenizers::Result<(tokenizers::Tokenizer, Vec<Stand>)> {
    let mut plain = full.clone();
    plain.set_encode_special_tokens(true);
    let mut stands: Vec<Stand> = Vec::new();
    let kinds = [(false, false), (false, true), (true, false), (true, true)];
    for strips in kinds {
        // The first one also marks a text that continues another.
        if strips != (false, false) && !specials.iter().any(|s| (s.token.lstrip, s.token.rstrip) == strips) {
            continue;
        }
        // Random, so that no text can be made to contain it.
        let literal = format!("\u{10fffd}{:032x}\u{10fffd}", rand::random::<u128>());
        let token = AddedToken::from(literal.clone(), false).normalized(false).lstrip(strips.0).rstrip(strips.1);
        plain.add_tokens([token])?;
        let id = plain.token_to_id(&literal).ok_or("a token that was added is not there")?;
        stands.push(Stand { literal, id, strips });
    }
    Ok((plain, stands))
}

fn read_config(path: &Path) -> Result<Value> {
    match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| EngineError::Config {
            file: path.to_path_buf(),
            field: "(the whole file)".into(),
            expected: "a JSON object".into(),
            found: e.to_string(),
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(e) => Err(EngineError::reading(path, e, "it names the special tokens")),
    }
}

/// Turns tokens that come one by one into text, never half a character.
///
/// What it gives, put together, is what [`Tokenizer::decode`] gives for all tokens at once. (One exception: tokenizers
/// with byte fallback decode a run of bytes by looking at all of it; where such a run is not valid UTF-8 or holds a
/// replacement character itself, characters that came earlier stay as given.)
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// The tokens of the last settled piece, kept as left context, and the unsettled ones behind it.
    ids: Vec<u32>,
    settled: usize,
    /// The text of the settled ones among `ids`.
    context: String,
    /// Bytes of the text of the unsettled ones that were given out.
    sent: usize,
}

impl StreamDecoder {
    /// Replacement characters at the end that may still become a character: a character has at most 4 bytes.
    const UNSETTLED: usize = 3;

    /// Takes a token; gives the text that is certain now, which may be empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        if self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.ids.push(id);
        let tail = self.tail()?;
        let mut end = tail.len();
        for _ in 0..Self::UNSETTLED {
            end = tail[..end].strip_suffix(char::REPLACEMENT_CHARACTER).map_or(end, str::len);
        }
        let given = tail.get(self.sent..end).unwrap_or_default().to_string();
        if end == tail.len() {
            self.ids.drain(..self.settled);
            self.settled = self.ids.len();
            self.context = self.tokenizer.decode(&self.ids)?;
            self.sent = 0;
        } else {
            self.sent = self.sent.max(end);
        }
        Ok(given)
    }

    /// The stream has ended: the rest, with replacement characters for what never became a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String> {
        Ok(self.tail()?.get(self.sent..).unwrap_or_default().to_string())
    }

    /// The text of the unsettled tokens, as they read behind the settled ones.
    fn tail(&self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        match text.strip_prefix(self.context.as_str()) {
            Some(tail) => Ok(tail.to_string()),
            // Byte fallback: a run of bytes whose end is incomplete makes all of it, settled or not, unreadable.
            None => self.tokenizer.decode(&self.ids[self.settled..]),
        }
    }
}

#[cfg(test)]
#[path = "tokenizer/tests.rs"]
mod tests;
