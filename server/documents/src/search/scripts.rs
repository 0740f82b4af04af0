//! Which scripts are cut into words, and which into pairs of characters.
//!
//! Unicode's line breaking classes tell where words are not divided by spaces: SA (complex context: Thai, Lao, Khmer,
//! Burmese, Tai Le, New Tai Lue, Tai Tham, Tai Viet and others), AK, AP and AS (orthographic syllables of Brahmic scripts:
//! Balinese, Javanese, Batak, Kawi and others), ID and CJ (ideographs and kana). Ancient scripts and some that are rarely
//! written have class AL there, as letters of alphabets have: those whose texts run on without spaces are listed.
//!
//! Tibetan and its relatives divide syllables by a mark (tsheg), so that a syllable is a word here, and a word of several
//! syllables is found like a phrase.

use icu_properties::CodePointMapData;
use icu_properties::props::{GeneralCategory, LineBreak, Script};

use super::analyzer::Class;

/// The script of a character.
pub(super) fn of(c: char) -> Script {
    const { CodePointMapData::<Script>::new() }.get(c)
}

/// Whether a character belongs to the one before it.
pub(super) fn is_mark(c: char) -> bool {
    use GeneralCategory as G;
    let category = const { CodePointMapData::<GeneralCategory>::new() };
    matches!(category.get(c), G::NonspacingMark | G::SpacingMark | G::EnclosingMark)
}

/// Whether a normalised word begins in the Arabic script.
pub(super) fn is_arabic(word: &str) -> bool {
    word.chars().next().is_some_and(|c| !c.is_ascii() && of(c) == Script::Arabic)
}

/// How a run is cut that has the letter `c`.
pub(super) fn letter(c: char) -> Class {
    let breaks = const { CodePointMapData::<LineBreak>::new() };
    match of(c) {
        Script::Hangul => Class::Syllables,
        // Lengthens a vowel, in both kinds of kana.
        Script::Common if c == 'ー' => Class::Unspaced,
        Script::Latin | Script::Cyrillic | Script::Greek | Script::Arabic | Script::Hebrew => Class::Word,
        script if is_written_without_spaces(script) => Class::Unspaced,
        _ => match breaks.get(c) {
            LineBreak::ComplexContext | LineBreak::Aksara | LineBreak::AksaraPrebase | LineBreak::AksaraStart => {
                Class::Unspaced
            }
            LineBreak::Ideographic | LineBreak::ConditionalJapaneseStarter => Class::Unspaced,
            _ => Class::Word,
        },
    }
}

/// Scripts of which some or all letters have a line breaking class that does not say so.
fn is_written_without_spaces(script: Script) -> bool {
    matches!(
        script,
        // Small kana and iteration marks have classes of their own.
        Script::Han | Script::Hiragana | Script::Katakana | Script::Bopomofo | Script::Yi
            // Their dependent vowels and final consonants may have other classes than their consonants.
            | Script::Balinese | Script::Batak | Script::Buginese | Script::Cham | Script::Javanese | Script::Kawi
            | Script::Makasar | Script::Rejang | Script::Ahom
            | Script::Vai | Script::Nushu | Script::Tangut | Script::KhitanSmallScript | Script::Modi
            | Script::Brahmi | Script::Kharoshthi | Script::Siddham | Script::Gothic
            | Script::Cuneiform | Script::EgyptianHieroglyphs | Script::AnatolianHieroglyphs | Script::LinearA
    )
}
