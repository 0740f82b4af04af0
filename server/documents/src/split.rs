//! Splits a text into chunks of at most so many tokens, at headings, paragraphs and sentences where possible.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use text_splitter::{ChunkCharIndex, ChunkConfig, MarkdownSplitter, TextSplitter, TryChunkSizer};

/// A run of characters of a document: Unicode scalar values, from `start` up to but not including `end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Span {
    /// The first character.
    pub start: usize,
    /// Behind the last character.
    pub end: usize,
}

impl Span {
    /// Characters that both spans cover.
    #[must_use]
    pub fn overlap(&self, other: &Span) -> usize {
        self.end.min(other.end).saturating_sub(self.start.max(other.start))
    }

    /// Characters.
    #[must_use]
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether it covers nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end == self.start
    }
}

/// Where a chunk lies in its document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkSpan {
    /// In characters.
    pub chars: Span,
    /// In bytes, on character boundaries.
    pub bytes: Range<usize>,
}

/// How a document is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Plain text: boundaries are paragraphs, lines, sentences, words.
    Text,
    /// Markdown: headings and blocks come first.
    Markdown,
}

impl Format {
    /// What the end of a file's name says; `None` for formats that are not read.
    #[must_use]
    pub fn of_name(name: &Path) -> Option<Format> {
        match name.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "txt" | "text" => Some(Format::Text),
            "md" | "markdown" => Some(Format::Markdown),
            _ => None,
        }
    }
}

/// How large chunks may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of a chunk at most.
    pub tokens: usize,
    /// Tokens that neighbours share at most; below `tokens`.
    pub overlap: usize,
}

/// Counts tokens; remembers what it counted, as the splitter asks for the same stretches again and again.
struct Counter<'a, E> {
    count: &'a dyn Fn(&str) -> Result<usize, E>,
    known: RefCell<HashMap<(usize, usize), usize>>,
}

impl<E: std::error::Error> TryChunkSizer for Counter<'_, E> {
    type Error = E;

    fn try_size(&self, chunk: &str) -> Result<usize, E> {
        let place = (chunk.as_ptr() as usize, chunk.len());
        if let Some(&tokens) = self.known.borrow().get(&place) {
            return Ok(tokens);
        }
        let tokens = (self.count)(chunk)?;
        self.known.borrow_mut().insert(place, tokens);
        Ok(tokens)
    }
}

/// Bytes of a document that are split at a time: the splitter looks at all that is left of its text for every chunk,
/// so that its time grows with the square of the length.
const PIECE: usize = 32 << 10;

/// The byte order mark that some editors write at the beginning of UTF-8: a character of the file, not of the text.
fn mark(text: &str) -> &str {
    let mark = '\u{feff}';
    if text.starts_with(mark) { &text[..mark.len_utf8()] } else { "" }
}

/// Cuts `text` into pieces of at most [`PIECE`] bytes: behind an empty line if there is one, else behind a line, else
/// behind a space, else anywhere between two characters. A byte order mark belongs to no piece.
fn pieces(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut start = mark(text).len();
    while text.len() - start > PIECE {
        let mut limit = start + PIECE;
        while !text.is_char_boundary(limit) {
            limit -= 1;
        }
        let window = &text[start..limit];
        let cut = ["\n\n", "\n", " "].iter().find_map(|mark| window.rfind(mark).map(|at| at + mark.len()));
        let end = start + cut.unwrap_or(window.len());
        found.push(start..end);
        start = end;
    }
    found.push(start..text.len());
    found
}

/// The chunks of `text` in order. Every chunk holds at most `limits.tokens` tokens as counted by `count`; white space
/// around a chunk belongs to none. Chunks share tokens with their neighbours except every 32 KiB.
///
/// # Errors
/// What `count` returns.
pub fn split<E: std::error::Error>(
    text: &str,
    format: Format,
    limits: Limits,
    count: &dyn Fn(&str) -> Result<usize, E>,
) -> Result<Vec<ChunkSpan>, E> {
    let (mut chunks, mut chars): (Vec<ChunkSpan>, usize) = (Vec::new(), mark(text).chars().count());
    for piece in pieces(text) {
        let text = &text[piece.clone()];
        let counter = Counter { count, known: RefCell::default() };
        let config = ChunkConfig::new(limits.tokens).with_overlap(limits.overlap);
        // An overlap that is no smaller than a chunk is none that could be meant.
        let config = config.unwrap_or_else(|_| ChunkConfig::new(limits.tokens)).with_sizer(counter);
        let span = |found: Result<ChunkCharIndex<'_>, E>| {
            found.map(|c| {
                // The splitter of Markdown leaves some white space, such as tabs, at the edges.
                let (lead, passage) = (c.chunk.len() - c.chunk.trim_start().len(), c.chunk.trim());
                let start = chars + c.char_offset + c.chunk[..lead].chars().count();
                let from = piece.start + c.byte_offset + lead;
                ChunkSpan {
                    chars: Span { start, end: start + passage.chars().count() },
                    bytes: from..from + passage.len(),
                }
            })
        };
        let found: Result<Vec<ChunkSpan>, E> = match format {
            Format::Text => TextSplitter::new(config).try_chunk_char_indices(text).map(span).collect(),
            Format::Markdown => MarkdownSplitter::new(config).try_chunk_char_indices(text).map(span).collect(),
        };
        for chunk in found?.into_iter().filter(|chunk| !chunk.chars.is_empty()) {
            // Without the white space in front of it a chunk may begin where the one before does: the longer one holds both.
            match chunks.last_mut() {
                Some(last) if chunk.bytes.start <= last.bytes.start => {
                    if chunk.bytes.end > last.bytes.end {
                        *last = chunk;
                    }
                }
                _ => chunks.push(chunk),
            }
        }
        chars += text.chars().count();
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// Words as tokens.
    fn words(text: &str) -> Result<usize, std::convert::Infallible> {
        Ok(text.split_whitespace().count())
    }

    fn prose(sentences: usize) -> String {
        let mut text = String::new();
        for i in 0..sentences {
            text.push_str(&format!("Der Fährmann Ñandú zählte {i} Boote im grünen Wasser — und ging heim. "));
            if i % 5 == 4 {
                text.push_str("\n\n");
            }
        }
        text
    }

    #[test]
    fn spans_point_into_the_source_and_respect_the_limit() {
        let text = prose(60);
        let chunks = split(&text, Format::Text, Limits { tokens: 40, overlap: 12 }, &words).unwrap();
        assert!(chunks.len() > 15);
        for chunk in &chunks {
            let passage = &text[chunk.bytes.clone()];
            let by_chars: String = text.chars().skip(chunk.chars.start).take(chunk.chars.len()).collect();
            assert_eq!(passage, by_chars);
            assert!(words(passage).unwrap() <= 40);
        }
    }

    #[test]
    fn long_documents_are_cut_into_pieces_and_nothing_is_lost() {
        let text = prose(2000);
        assert!(text.len() > 3 * PIECE);
        let chunks = split(&text, Format::Text, Limits { tokens: 40, overlap: 0 }, &words).unwrap();
        let mut covered = 0;
        for chunk in &chunks {
            assert!(text[covered..chunk.bytes.start].trim().is_empty());
            assert_eq!(text[..chunk.bytes.start].chars().count(), chunk.chars.start);
            covered = chunk.bytes.end;
        }
        assert!(text[covered..].trim().is_empty());
        let one_word = "é".repeat(PIECE);
        assert_eq!(pieces(&one_word), [0..PIECE, PIECE..2 * PIECE]);
        assert_eq!(pieces("short"), vec![0..5]);
    }

    #[test]
    fn a_byte_order_mark_is_in_no_chunk_and_still_a_character_of_the_file() {
        let text = "\u{feff}# One\n\nThe lamp was lit.";
        for format in [Format::Text, Format::Markdown] {
            let chunks = split(text, format, Limits { tokens: 40, overlap: 0 }, &words).unwrap();
            assert_eq!(&text[chunks[0].bytes.clone()], "# One\n\nThe lamp was lit.");
            assert_eq!(chunks[0].chars, Span { start: 1, end: 25 });
        }
    }

    #[test]
    fn no_word_is_lost_and_neighbours_overlap() {
        let text = prose(60);
        let chunks = split(&text, Format::Text, Limits { tokens: 40, overlap: 14 }, &words).unwrap();
        let mut covered = 0;
        let mut overlaps = 0;
        for chunk in &chunks {
            assert!(chunk.bytes.start <= covered || text[covered..chunk.bytes.start].trim().is_empty());
            overlaps += usize::from(chunk.bytes.start < covered);
            covered = chunk.bytes.end;
        }
        assert!(text[covered..].trim().is_empty());
        assert!(overlaps * 3 > chunks.len(), "{overlaps} of {}", chunks.len());
    }

    #[test]
    fn cuts_fall_on_sentences_and_headings() {
        let text = prose(30);
        for chunk in split(&text, Format::Text, Limits { tokens: 30, overlap: 0 }, &words).unwrap() {
            assert!(text[chunk.bytes.clone()].ends_with('.'), "{:?}", &text[chunk.bytes]);
        }
        let markdown = format!("# One\n\n{}\n\n# Two\n\n{}", prose(4), prose(4));
        let chunks = split(&markdown, Format::Markdown, Limits { tokens: 70, overlap: 0 }, &words).unwrap();
        let heads: Vec<_> =
            chunks.iter().map(|c| markdown[c.bytes.clone()].chars().take(5).collect::<String>()).collect();
        assert!(heads.contains(&"# Two".to_string()), "{heads:?}");
    }

    /// Words and white space of all kinds, some of it Markdown, long enough for several pieces now and then.
    fn texts() -> impl Strategy<Value = String> {
        let word = prop_oneof![
            8 => "[a-zé]{1,9}[.,!?]?", 2 => "[東京都文書]{1,9}。?", 1 => Just("# ".to_string()), 1 => Just("- x".to_string()),
            1 => Just("\u{301}👩‍👩‍👧".to_string()), 1 => "[0-9]{1,4}",
        ];
        let space =
            prop_oneof![8 => Just(" "), 2 => Just("\n"), 2 => Just("\n\n"), 1 => Just("\r\n"), 1 => Just("\t  ")];
        let texts = prop::collection::vec((word, space), 0..120);
        (texts, prop_oneof![4 => Just(1usize), 1 => Just(60)]).prop_map(|(words, times)| {
            words.iter().map(|(word, space)| format!("{word}{space}")).collect::<String>().repeat(times)
        })
    }

    #[test]
    fn white_space_at_the_edges_belongs_to_no_chunk() {
        let text = "é é a - x é\t  a\na ";
        let chunks = split(text, Format::Markdown, Limits { tokens: 5, overlap: 1 }, &words).unwrap();
        let passages: Vec<&str> = chunks.iter().map(|chunk| &text[chunk.bytes.clone()]).collect();
        assert!(passages.len() > 1 && passages.iter().all(|passage| passage.trim() == *passage), "{passages:?}");
        for chunk in &chunks {
            let by_chars: String = text.chars().skip(chunk.chars.start).take(chunk.chars.len()).collect();
            assert_eq!(by_chars, text[chunk.bytes.clone()]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        #[test]
        fn chunks_lie_in_order_cover_every_word_and_keep_to_their_limits(
            text in texts(), tokens in 4usize..60, share in 0usize..=10, markdown: bool,
        ) {
            let format = if markdown { Format::Markdown } else { Format::Text };
            let limits = Limits { tokens, overlap: (tokens - 1) * share / 20 };
            let chunks = split(&text, format, limits, &words).unwrap();
            let (mut covered, mut start, mut chars) = (0, 0, 0);
            for (i, chunk) in chunks.iter().enumerate() {
                let passage = &text[chunk.bytes.clone()];
                prop_assert!(!passage.is_empty() && passage.trim() == passage, "{passage:?}");
                prop_assert!(words(passage).unwrap() <= tokens, "{} words", words(passage).unwrap());
                prop_assert!(i == 0 || chunk.bytes.start > start, "chunks go on");
                prop_assert!(chunk.bytes.start >= covered || limits.overlap > 0, "an overlap that nobody asked for");
                if chunk.bytes.start < covered {
                    let shared = words(&text[chunk.bytes.start..covered]).unwrap();
                    prop_assert!(shared <= limits.overlap, "{shared} words shared");
                } else {
                    prop_assert!(text[covered..chunk.bytes.start].trim().is_empty(), "something is lost");
                }
                // Counted on from the chunk before.
                chars += text[start..chunk.bytes.start].chars().count();
                prop_assert_eq!(chunk.chars, Span { start: chars, end: chars + passage.chars().count() });
                (start, covered) = (chunk.bytes.start, chunk.bytes.end);
            }
            prop_assert!(text[covered..].trim().is_empty(), "the end is lost");
        }
    }
}
