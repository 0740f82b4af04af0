//! Which language a document is written in, as far as the endings of its words are concerned.

use tantivy::tokenizer::Language;
use whatlang::{Detector, Lang};

use crate::catalog::LanguageSetting;
use crate::error::{DocumentsError, Result};

/// Languages whose endings are known: the name that an index keeps, and what both libraries call them.
const KNOWN: [(&str, Language, Lang); 18] = [
    ("ar", Language::Arabic, Lang::Ara),
    ("da", Language::Danish, Lang::Dan),
    ("de", Language::German, Lang::Deu),
    ("el", Language::Greek, Lang::Ell),
    ("en", Language::English, Lang::Eng),
    ("es", Language::Spanish, Lang::Spa),
    ("fi", Language::Finnish, Lang::Fin),
    ("fr", Language::French, Lang::Fra),
    ("hu", Language::Hungarian, Lang::Hun),
    ("it", Language::Italian, Lang::Ita),
    ("nl", Language::Dutch, Lang::Nld),
    ("no", Language::Norwegian, Lang::Nob),
    ("pt", Language::Portuguese, Lang::Por),
    ("ro", Language::Romanian, Lang::Ron),
    ("ru", Language::Russian, Lang::Rus),
    ("sv", Language::Swedish, Lang::Swe),
    ("ta", Language::Tamil, Lang::Tam),
    ("tr", Language::Turkish, Lang::Tur),
];

/// Bytes of a document that its language is told from.
const SAMPLE: usize = 16 << 10;

/// The name of the language of a text; `None` for one whose endings are not known.
///
/// Words are found as they stand whatever comes of this: endings are cut off beside that.
pub(super) fn detect(text: &str) -> Option<&'static str> {
    let mut end = text.len().min(SAMPLE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let found = Detector::new().detect(&text[..end])?;
    let known = |lang: Lang| KNOWN.iter().find(|(.., known)| *known == lang).map(|(name, ..)| *name);
    if found.is_reliable() {
        return known(found.lang());
    }
    // A few words: one of those whose endings are known, if any.
    let likely = Detector::with_allowlist(KNOWN.iter().map(|(.., lang)| *lang).collect());
    likely.detect(&text[..end]).and_then(|found| known(found.lang()))
}

/// The language of a name.
pub(super) fn by_name(name: &str) -> Option<Language> {
    KNOWN.iter().find(|(known, ..)| *known == name).map(|(_, language, _)| *language)
}

/// A language setting from its name: `auto`, or a language whose endings are known.
///
/// # Errors
/// [`DocumentsError::UnknownLanguage`].
pub fn parse_language(text: &str) -> Result<LanguageSetting> {
    if text == "auto" {
        return Ok(LanguageSetting::Auto);
    }
    match by_name(text) {
        Some(_) => Ok(LanguageSetting::Fixed(text.into())),
        None => {
            let known = KNOWN.iter().map(|(name, ..)| *name).collect();
            Err(DocumentsError::UnknownLanguage { found: text.into(), known })
        }
    }
}
