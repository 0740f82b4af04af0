//! What is typed into a conversation: texts of one line or several, and commands.

/// Begins and ends a text of several lines.
const FENCE: &str = "\"\"\"";

/// Something complete that was typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// Something for the model.
    Text(String),
    /// `/help`.
    Help,
    /// `/clear`.
    Clear,
    /// `/system`, with the new instruction or without any.
    System(Option<String>),
    /// `/exit`.
    Exit,
    /// Something else that begins with `/`.
    Unknown(String),
}

/// Lines that do not make an entry yet.
#[derive(Debug, Default)]
pub(super) struct Grammar {
    lines: Vec<String>,
    fenced: bool,
}

impl Grammar {
    /// Whether more lines belong to what has been typed.
    pub(super) fn is_open(&self) -> bool {
        self.fenced || !self.lines.is_empty()
    }

    /// Forgets what is not complete.
    pub(super) fn reset(&mut self) {
        *self = Grammar::default();
    }

    /// Takes a line, or several that were pasted or recalled at once. `None`: nothing is complete, or there is nothing
    /// in it.
    pub(super) fn feed(&mut self, line: &str) -> Option<Entry> {
        if line.contains('\n') {
            return self.feed_block(line);
        }
        if !self.is_open()
            && let Some(rest) = line.trim_start().strip_prefix(FENCE)
        {
            self.fenced = true;
            return if rest.is_empty() { None } else { self.feed(rest) };
        }
        if self.fenced {
            let Some(last) = line.trim_end().strip_suffix(FENCE) else {
                self.lines.push(line.into());
                return None;
            };
            if !last.is_empty() {
                self.lines.push(last.into());
            }
            return self.finish();
        }
        match line.strip_suffix('\\') {
            Some(line) => {
                self.lines.push(line.into());
                None
            }
            None => {
                self.lines.push(line.into());
                self.finish()
            }
        }
    }

    /// Several lines at once are a text as they are; fences around them are taken off.
    fn feed_block(&mut self, block: &str) -> Option<Entry> {
        if !self.fenced && !block.trim_start().starts_with(FENCE) {
            self.lines.push(block.trim_end_matches('\n').into());
            return self.finish();
        }
        let mut lines = block.split('\n');
        let entry = lines.by_ref().find_map(|line| self.feed(line))?;
        let rest = lines.collect::<Vec<_>>().join("\n");
        Some(match entry {
            Entry::Text(text) if !rest.trim().is_empty() => Entry::Text(format!("{text}\n{rest}")),
            entry => entry,
        })
    }

    /// What has been typed is complete.
    pub(super) fn finish(&mut self) -> Option<Entry> {
        let Grammar { lines, fenced } = std::mem::take(self);
        let text = lines.join("\n");
        if text.trim().is_empty() {
            return None;
        }
        Some(if fenced { Entry::Text(text) } else { entry(text) })
    }
}

/// A command, if the first character is `/`; white space before it makes it a text.
fn entry(text: String) -> Entry {
    if !text.starts_with('/') {
        return Entry::Text(text);
    }
    let (command, rest) = text.split_once(char::is_whitespace).unwrap_or((&text, ""));
    let rest = rest.trim();
    match (command, rest) {
        ("/help", "") => Entry::Help,
        ("/clear", "") => Entry::Clear,
        ("/exit" | "/quit", "") => Entry::Exit,
        ("/system", "") => Entry::System(None),
        ("/system", rest) => Entry::System(Some(rest.into())),
        _ => Entry::Unknown(text),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The entries of some lines.
    fn entries(lines: &[&str]) -> Vec<Entry> {
        let mut grammar = Grammar::default();
        let mut entries: Vec<Entry> = lines.iter().filter_map(|line| grammar.feed(line)).collect();
        entries.extend(grammar.finish());
        entries
    }

    fn text(text: &str) -> Entry {
        Entry::Text(text.into())
    }

    #[test]
    fn a_line_is_a_text_and_nothing_is_none() {
        assert_eq!(entries(&["one", "", "  ", "two"]), [text("one"), text("two")]);
    }

    #[test]
    fn a_backslash_continues_a_line() {
        assert_eq!(entries(&["one\\", "two\\", "three", "four"]), [text("one\ntwo\nthree"), text("four")]);
        assert_eq!(entries(&["the end\\"]), [text("the end")]);
    }

    #[test]
    fn a_fence_keeps_everything_between() {
        let lines = ["\"\"\"one", "", "/two\\", "three\"\"\"", "four"];
        assert_eq!(entries(&lines), [text("one\n\n/two\\\nthree"), text("four")]);
        assert_eq!(entries(&["\"\"\"", "/help", "\"\"\""]), [text("/help")]);
        assert_eq!(entries(&["\"\"\"/one line\"\"\"", "two"]), [text("/one line"), text("two")]);
        assert_eq!(entries(&["\"\"\"", "\"\"\"", "two"]), [text("two")]);
        assert_eq!(entries(&["\"\"\"never closed"]), [text("never closed")]);
    }

    #[test]
    fn commands_begin_with_a_slash() {
        assert_eq!(entries(&["/help", "/clear", "/exit"]), [Entry::Help, Entry::Clear, Entry::Exit]);
        assert_eq!(entries(&["/system  be brief "]), [Entry::System(Some("be brief".into()))]);
        assert_eq!(entries(&["/system"]), [Entry::System(None)]);
        assert_eq!(entries(&["/hepl", "/exit now"]), ["/hepl", "/exit now"].map(|t| Entry::Unknown(t.into())));
        assert_eq!(entries(&[" /usr/bin"]), [text(" /usr/bin")]);
    }

    #[test]
    fn several_lines_at_once_are_one_text() {
        assert_eq!(entries(&["one\ntwo\n", "three"]), [text("one\ntwo"), text("three")]);
        assert_eq!(entries(&["\"\"\"\none\n\n/help\n\"\"\"", "two"]), [text("one\n\n/help"), text("two")]);
        assert_eq!(entries(&["\"\"\"one\ntwo", "three\"\"\""]), [text("one\ntwo\nthree")]);
        assert_eq!(entries(&["\"\"\"one\"\"\"\nbehind it"]), [text("one\nbehind it")]);
        assert_eq!(entries(&["a \\", "b\nc"]), [text("a \nb\nc")]);
    }
}
