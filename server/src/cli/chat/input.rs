//! What is typed into a conversation: texts of one line or several, and commands.

use std::io::{BufRead, Read};

use tokio::sync::mpsc::{Receiver, channel};

use crate::error::{QuireError, Result};

/// Bytes of one line at most.
const LINE_LIMIT: u64 = 16 << 20;
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

    /// Takes a line. `None`: nothing is complete, or there is nothing in it.
    pub(super) fn feed(&mut self, line: &str) -> Option<Entry> {
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

/// The lines of standard input, read by a thread of their own: waiting for one cannot be interrupted otherwise.
pub(super) fn lines() -> Receiver<Result<String>> {
    let (sender, receiver) = channel(1);
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        loop {
            let line = match read_line(&mut stdin) {
                Ok(None) => return,
                Ok(Some(line)) => Ok(line),
                Err(error) => Err(error),
            };
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

fn read_line(input: &mut impl BufRead) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    let read = input.take(LINE_LIMIT + 1).read_until(b'\n', &mut bytes);
    read.map_err(|source| QuireError::Io { action: "read", path: "standard input".into(), source })?;
    let wrong = |problem| QuireError::InvalidParameter { param: "standard input".into(), problem };
    if bytes.is_empty() {
        return Ok(None);
    }
    if bytes.len() as u64 > LINE_LIMIT {
        return Err(wrong(format!("expected lines of at most {LINE_LIMIT} bytes, found a longer one")));
    }
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        wrong(format!("expected UTF-8, found a line with an invalid byte at offset {at}"))
    })?;
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(Some(line.strip_suffix('\r').unwrap_or(line).into()))
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
    fn lines_that_are_no_text_are_refused() {
        let read = |bytes: &[u8]| read_line(&mut std::io::BufReader::new(bytes));
        assert_eq!(read(b"a\r\nb").unwrap().unwrap(), "a");
        assert_eq!(read(b"").unwrap(), None);
        assert!(read(b"ab\xff\n").unwrap_err().to_string().contains("offset 2"));
        let long = vec![b'x'; LINE_LIMIT as usize + 1];
        assert!(read(&long).unwrap_err().to_string().contains("longer"));
    }
}
