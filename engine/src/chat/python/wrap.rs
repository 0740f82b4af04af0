//! The filter `wordwrap`: Python's `textwrap` for each line of a text.

use minijinja::State;
use minijinja::value::Value;

use super::arguments::Arguments;
use super::filters::Args;
use super::{Result, failed, show, text};

/// How lines are broken.
struct Wrap {
    width: usize,
    long_words: bool,
    hyphens: bool,
}

/// `wordwrap(width=79, break_long_words=true, wrapstring="\n", break_on_hyphens=true)`.
pub(super) fn wordwrap(state: &State, value: &Value, args: Args) -> Result<String> {
    let args = args.into_values();
    let args = Arguments::new("wordwrap", &args)?;
    let (width, long): (Option<usize>, Option<bool>) =
        (args.optional(0, "width")?, args.optional(1, "break_long_words")?);
    let between = args.text(2, "wrapstring")?;
    let hyphens: Option<bool> = args.optional(3, "break_on_hyphens")?;
    args.end(4)?;
    let wrap = Wrap { width: width.unwrap_or(79), long_words: long.unwrap_or(true), hyphens: hyphens.unwrap_or(true) };
    if wrap.width == 0 {
        return Err(failed("wordwrap: expected a width above 0".into()));
    }
    let between = between.unwrap_or_else(|| "\n".into());
    let text = show::text(state, value)?;
    state.consume_fuel(text.len() as u64 / 8)?;
    let lines: Vec<String> =
        text::lines(&text, false).into_iter().map(|line| wrap.lines(line).join(&between)).collect();
    text::join(state, &between, &lines)
}

impl Wrap {
    fn lines(&self, line: &str) -> Vec<String> {
        let mut chunks: Vec<Vec<char>> = self.chunks(line);
        chunks.reverse();
        let mut lines = Vec::new();
        while let Some(next) = chunks.last() {
            if !lines.is_empty() && is_blank(next) {
                chunks.pop();
                continue;
            }
            let line = self.line(&mut chunks);
            if !line.is_empty() {
                lines.push(line);
            }
        }
        lines
    }

    /// Takes the chunks of one line from the end.
    fn line(&self, chunks: &mut Vec<Vec<char>>) -> String {
        let (mut taken, mut length): (Vec<Vec<char>>, usize) = (Vec::new(), 0);
        while let Some(chunk) = chunks.pop_if(|chunk| length + chunk.len() <= self.width) {
            length += chunk.len();
            taken.push(chunk);
        }
        if let Some(long) = chunks.last_mut().filter(|chunk| chunk.len() > self.width) {
            if self.long_words {
                let room = (self.width - length).max(1);
                let rest = long.split_off(self.cut(long, room));
                taken.push(std::mem::replace(long, rest));
            } else if taken.is_empty() {
                taken.extend(chunks.pop());
            }
        }
        taken.pop_if(|chunk| is_blank(chunk));
        taken.concat().into_iter().collect()
    }

    /// Where a word that is too long is cut: at the room's end, or behind a hyphen before it.
    fn cut(&self, word: &[char], room: usize) -> usize {
        if !self.hyphens || word.len() <= room {
            return room;
        }
        let hyphen = word[..room].iter().rposition(|c| *c == '-');
        hyphen.filter(|at| *at > 0 && word[..*at].iter().any(|c| *c != '-')).map_or(room, |at| at + 1)
    }

    /// Words and the white space between them; words are parted behind hyphens between letters.
    fn chunks(&self, line: &str) -> Vec<Vec<char>> {
        let mut chunks: Vec<Vec<char>> = Vec::new();
        let chars: Vec<char> = line.chars().collect();
        for (at, &c) in chars.iter().enumerate() {
            let letter = |at: Option<usize>| at.and_then(|at| chars.get(at)).is_some_and(|c| c.is_alphabetic());
            let parted = self.hyphens
                && at >= 3
                && chars[at - 1] == '-'
                && letter(Some(at))
                && letter(Some(at + 1))
                && letter(Some(at - 2))
                && letter(Some(at - 3));
            match chunks.last_mut().filter(|chunk| !parted && is_blank(chunk) == is_white(c)) {
                Some(chunk) => chunk.push(c),
                None => chunks.push(vec![c]),
            }
        }
        chunks
    }
}

/// What `textwrap` takes for white space.
fn is_white(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\u{b}' | '\u{c}' | '\r' | ' ')
}

fn is_blank(chunk: &[char]) -> bool {
    chunk.iter().all(|c| is_white(*c))
}
