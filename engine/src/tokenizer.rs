//! Text to token ids and back, through a model's `tokenizer.json` and the files beside it.
//!
//! Two ways in: [`Tokenizer::encode`] recognises the literals of control tokens (`<|end_of_text|>` and the like) and
//! is for text of the model's own making, such as a template; [`Tokenizer::encode_plain`] reads them as ordinary
//! text and is for everything that comes from outside: a document must not be able to end a prompt. Control tokens
//! are those that are marked as special, and added tokens that the model's chat template writes. Neither adds tokens
//! of its own.

mod bytes;
mod declared;
mod literals;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::AddedToken;

use crate::chat::source::Source;
use crate::chat::template_source;
use crate::error::{EngineError, Result};
use bytes::ByteCoding;
use declared::Declared;
use literals::{Literals, is_control, markers};

/// A model's tokenizer. Cheap to clone, safe to share.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    full: tokenizers::Tokenizer,
    /// Embeddings that the model has: ids from here on stand for nothing.
    vocab: usize,
    plain: Plain,
    /// The literals of `controls`.
    recognised: Literals,
    /// Control tokens by literal, sorted.
    controls: Vec<(String, Control)>,
    /// Ids of special tokens, sorted.
    specials: Vec<u32>,
    /// Everything whose literal must not act in a text from outside.
    guarded: Literals,
    names: Vec<(String, String)>,
    fingerprint: [u8; 32],
    bytes: ByteCoding,
}

/// A token that is recognised only in trusted text.
#[derive(Debug)]
struct Control {
    id: u32,
    strips: (bool, bool),
}

/// Reads the literals of control tokens as text; knows the `stands` instead.
#[derive(Debug)]
struct Plain {
    tokenizer: tokenizers::Tokenizer,
    stands: Vec<Stand>,
    /// Texts that would come out as control tokens, or as what the template writes for them, even so. They are taken
    /// apart behind their first character.
    broken: Literals,
    /// What is put there.
    gap: Stand,
}

/// A literal that no text contains. It stands for a control token in text whose other parts are plain, so that one
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
    /// Literals of control tokens are recognised.
    Trusted(&'a str),
    /// Everything is plain text.
    Plain(&'a str),
}

impl Tokenizer {
    /// Reads `tokenizer.json` in `dir` and the tokens that the files beside it declare, for a model with `vocab`
    /// embeddings. Tokens beyond them are never made: as literals they are ordinary text.
    ///
    /// # Errors
    /// [`EngineError::MissingFile`], [`EngineError::Tokenizer`]; [`EngineError::TokenizerMismatch`] where so many tokens lie
    /// beyond the vocabulary that the tokenizer is another model's; [`EngineError::Config`] for a malformed file beside it.
    pub fn from_dir(dir: &Path, vocab: usize) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path)
            .map_err(|e| EngineError::reading(&path, e, "it turns text into the model's tokens"))?;
        let failed = |e: tokenizers::Error| EngineError::Tokenizer { path: path.clone(), why: e.to_string() };
        let mut full = tokenizers::Tokenizer::from_bytes(&bytes).map_err(failed)?;
        full.with_padding(None).with_truncation(None).map_err(failed)?;
        if full.get_vocab_size(true) == 0 {
            return Err(EngineError::Tokenizer { path, why: "it has no tokens".into() });
        }
        check_vocabulary(&full, &path, vocab)?;
        let known: Vec<AddedToken> = full.get_added_tokens_decoder().into_values().collect();
        let Declared { names, tokens } = Declared::read(dir, &known)?;
        full.add_tokens(tokens.iter().cloned()).map_err(failed)?;

        let template = template_source(dir)?.map(|source| Source::new(&source).literals).unwrap_or_default();
        let mut added: Vec<(u32, AddedToken)> = full.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        let specials = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        let exists = |id: u32| (id as usize) < vocab;
        let hidden: Vec<AddedToken> = added
            .iter()
            .filter(|(id, token)| !exists(*id) || is_control(token, &template))
            .map(|(_, token)| token.clone())
            .collect();
        let mut controls: Vec<(String, Control)> = added
            .iter()
            .filter(|(id, token)| exists(*id) && is_control(token, &template))
            .map(|(id, token)| (token.content.clone(), Control { id: *id, strips: (token.lstrip, token.rstrip) }))
            .collect();
        controls.sort_by(|(a, _), (b, _)| a.cmp(b));
        let is_added = |text: &String| added.iter().any(|(_, token)| token.content == *text);
        let markers: Vec<String> = markers(&template).into_iter().filter(|text| !is_added(text)).collect();
        let literals = |texts: Vec<String>| Literals::new(texts).map_err(|why| failed(why.into()));
        let recognised = literals(controls.iter().map(|(literal, _)| literal.clone()).collect())?;
        let guarded = literals(recognised.texts().iter().chain(&markers).cloned().collect())?;
        let plain = Plain::new(&full, &hidden, &controls, markers).map_err(failed)?;
        let fingerprint = fingerprint(&bytes, &tokens, guarded.texts());
        let bytes = ByteCoding::of(&full);
        let inner =
            Inner { path, full, vocab, plain, recognised, controls, specials, guarded, names, fingerprint, bytes };
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// Token ids of a trusted text: the literals of control tokens become these tokens. None is added.
    ///
    /// # Errors
    /// [`EngineError::Tokenizer`] if the tokenizer's own rules fail on the text; [`EngineError::TokenizerMismatch`] where
    /// they give a token that the model has no embedding for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_parts(&[Part::Trusted(text)], false)
    }

    /// Token ids of a text from outside: the literals of control tokens are ordinary text. None is added.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        let (apart, gaps) = self.inner.plain.take_apart(text);
        let mut ids = self.ids(apart.as_deref().unwrap_or(text))?;
        if !gaps.is_empty() {
            ids.retain(|id| *id != self.inner.plain.gap.id);
        }
        self.check(&ids)?;
        Ok(ids)
    }

    /// As [`encode_plain`](Self::encode_plain), with the bytes of `text` that each token stands for. Tokens that share
    /// a character all cover it whole, so that every range lies on character boundaries.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_plain_with_offsets(&self, text: &str) -> Result<Vec<(u32, Range<usize>)>> {
        let plain = &self.inner.plain;
        let (apart, gaps) = plain.take_apart(text);
        let encoding = plain.tokenizer.encode(apart.as_deref().unwrap_or(text), false).map_err(|e| self.failed(&e))?;
        let width = plain.gap.literal.len();
        // Where a place of the text with gaps lies in the text.
        let opened: Vec<usize> = gaps.iter().enumerate().map(|(i, gap)| gap + i * width).collect();
        let place = |at: usize| at - width * opened.partition_point(|gap| *gap < at);
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| place(start)..place(end));
        let tokens: Vec<(u32, Range<usize>)> =
            encoding.get_ids().iter().copied().zip(ranges).filter(|(id, _)| *id != plain.gap.id).collect();
        self.check(encoding.get_ids().iter().filter(|id| **id != plain.gap.id))?;
        Ok(tokens)
    }

    /// Tokenises parts as the one text they make up. With `continues`, the text does not begin the prompt: tokenizers
    /// that mark the beginning of a text do not mark this one.
    pub(crate) fn encode_parts(&self, parts: &[Part<'_>], continues: bool) -> Result<Vec<u32>> {
        let plain = &self.inner.plain;
        let mut text = String::new();
        let mut ids = Vec::new();
        if continues {
            text.push_str(&plain.gap.literal);
        }
        for part in parts {
            match part {
                Part::Plain(part) => text.push_str(plain.take_apart(part).0.as_deref().unwrap_or(part)),
                Part::Trusted(trusted) => self.stand_in(trusted, &mut text, &mut ids),
            }
        }
        let mut ids = ids.into_iter();
        let is_stand = |id: u32| plain.stands.iter().any(|stand| stand.id == id);
        let encoded = self.ids(&text)?.into_iter().filter(|id| *id != plain.gap.id);
        let restored: Option<Vec<u32>> = encoded.map(|id| if is_stand(id) { ids.next() } else { Some(id) }).collect();
        match restored {
            Some(restored) if ids.next().is_none() => {
                self.check(&restored)?;
                Ok(restored)
            }
            _ => Err(EngineError::Internal("control tokens were lost while a prompt was tokenised".into())),
        }
    }

    /// Appends `trusted` to `text`, control tokens replaced by their stands and their ids appended to `ids`.
    fn stand_in(&self, mut trusted: &str, text: &mut String, ids: &mut Vec<u32>) {
        let Inner { plain, controls, .. } = &*self.inner;
        while let Some(found) = self.inner.recognised.find(trusted) {
            text.push_str(&trusted[..found.start]);
            let literal = &trusted[found.clone()];
            if let Ok(at) = controls.binary_search_by(|(control, _)| control.as_str().cmp(literal)) {
                let control = &controls[at].1;
                // Every control token has a stand that strips as it does.
                text.extend(plain.stands.iter().find(|s| s.strips == control.strips).map(|s| s.literal.as_str()));
                ids.push(control.id);
            }
            trusted = &trusted[found.end..];
        }
        text.push_str(trusted);
    }

    fn ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.inner.plain.tokenizer.encode_fast(text, false).map_err(|e| self.failed(&e))?.get_ids().to_vec())
    }

    /// Refuses tokens that the model has no embedding for.
    fn check<'a>(&self, ids: impl IntoIterator<Item = &'a u32>) -> Result<()> {
        match ids.into_iter().find(|id| **id as usize >= self.inner.vocab) {
            None => Ok(()),
            Some(id) => Err(EngineError::TokenizerMismatch {
                path: self.inner.path.clone(),
                token: self.inner.full.id_to_token(*id).unwrap_or_default(),
                id: *id,
                vocab: self.inner.vocab,
            }),
        }
    }

    /// The leftmost text that must not act as a control token when it comes from outside: the literal of one, or a mark
    /// of turns that the chat template writes.
    pub(crate) fn find_control(&self, text: &str) -> Option<Range<usize>> {
        self.inner.guarded.find(text)
    }

    /// The control token whose literal `text` begins with.
    pub(crate) fn control_at_start(&self, text: &str) -> Option<u32> {
        let found = self.inner.recognised.find(text).filter(|found| found.start == 0)?;
        self.token_to_id(&text[found])
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

    /// Whether the token is marked as special: it has no text.
    #[must_use]
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.specials.binary_search(&id).is_ok()
    }

    /// The id of a token by its literal.
    #[must_use]
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.full.token_to_id(token)
    }

    /// The token that is named to begin a text, where the model has it.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.named("bos_token")
    }

    /// The token that is named to end a text, where the model has it.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.named("eos_token")
    }

    fn named(&self, name: &str) -> Option<u32> {
        let (_, literal) = self.inner.names.iter().find(|(named, _)| named == name)?;
        self.token_to_id(literal).filter(|id| (*id as usize) < self.inner.vocab)
    }

    /// The literals of the tokens that the model's files name: `bos_token`, `<s>`.
    #[must_use]
    pub fn names(&self) -> &[(String, String)] {
        &self.inner.names
    }

    /// Hash of everything that decides how texts are tokenised: equal fingerprints give equal tokens.
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

/// Refuses another model's tokenizer. A few unused tokens beyond the embeddings are common, a hundredth of its words is
/// not.
fn check_vocabulary(tokenizer: &tokenizers::Tokenizer, path: &Path, vocab: usize) -> Result<()> {
    let words = tokenizer.get_vocab(false);
    let beyond = words.values().filter(|id| **id as usize >= vocab).count();
    match words.iter().max_by_key(|(_, id)| **id) {
        Some((token, id)) if beyond * 100 > words.len() => {
            Err(EngineError::TokenizerMismatch { path: path.to_path_buf(), token: token.clone(), id: *id, vocab })
        }
        _ => Ok(()),
    }
}

impl Plain {
    /// `hidden`: added tokens whose literals are to be ordinary text; `markers`: further texts that must not come out as
    /// they do in the template.
    fn new(
        full: &tokenizers::Tokenizer,
        hidden: &[AddedToken],
        controls: &[(String, Control)],
        markers: Vec<String>,
    ) -> tokenizers::Result<Plain> {
        let mut tokenizer = full.clone();
        tokenizer.set_encode_special_tokens(true);
        tokenizer.add_tokens(hidden.iter().map(|token| token.clone().special(true)))?;
        let mut stand = |strips: (bool, bool)| -> tokenizers::Result<Stand> {
            // Random, so that no text can be made to contain it.
            let literal = format!("\u{10fffd}{:032x}\u{10fffd}", rand::random::<u128>());
            let token = AddedToken::from(literal.clone(), false).normalized(false).lstrip(strips.0).rstrip(strips.1);
            tokenizer.add_tokens([token])?;
            let id = tokenizer.token_to_id(&literal).ok_or("a token that was added is not there")?;
            Ok(Stand { literal, id, strips })
        };
        let gap = stand((false, false))?;
        let mut kinds: Vec<(bool, bool)> = controls.iter().map(|(_, control)| control.strips).collect();
        kinds.sort_unstable();
        kinds.dedup();
        let stands = kinds.into_iter().map(&mut stand).collect::<tokenizers::Result<_>>()?;
        let mut broken = markers;
        for (literal, control) in controls {
            if tokenizer.encode_fast(literal.as_str(), false)?.get_ids().contains(&control.id) {
                broken.push(literal.clone());
            }
        }
        Ok(Plain { tokenizer, stands, broken: Literals::new(broken)?, gap })
    }

    /// `text` with gaps in it, where it holds texts that must not stay whole, and the places of the gaps in `text`.
    fn take_apart(&self, text: &str) -> (Option<String>, Vec<usize>) {
        let (mut apart, mut gaps, mut done) = (String::new(), Vec::new(), 0);
        while let Some(found) = self.broken.find(&text[done..]) {
            let first = text[done + found.start..].chars().next().map_or(1, char::len_utf8);
            let gap = done + found.start + first;
            apart.push_str(&text[done..gap]);
            apart.push_str(&self.gap.literal);
            gaps.push(gap);
            done = gap;
        }
        if gaps.is_empty() {
            return (None, gaps);
        }
        apart.push_str(&text[done..]);
        (Some(apart), gaps)
    }
}

/// What decides how texts are tokenised: `tokenizer.json`, what other files add to it, and what is guarded.
fn fingerprint(file: &[u8], declared: &[AddedToken], guarded: &[String]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("quire tokenizer 2");
    let mut field = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    field(file);
    for token in declared {
        let flags = [token.single_word, token.lstrip, token.rstrip, token.normalized, token.special];
        field(token.content.as_bytes());
        field(&flags.map(u8::from));
    }
    field(&[]);
    guarded.iter().for_each(|literal| field(literal.as_bytes()));
    *hasher.finalize().as_bytes()
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

    /// Whether all text of the tokens so far was given.
    pub(crate) fn is_settled(&self) -> bool {
        self.ids.len() == self.settled
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
