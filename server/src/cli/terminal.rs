//! What may reach a terminal: the text of documents, file names and answers, without the power to command it.
//!
//! A terminal obeys control characters: they move the cursor, change colours and titles, some even answer back; and
//! bidirectional overrides show text in another order than it has. All of them are shown as escapes instead. Everything
//! printed for people goes through here, also what is piped: it may end on a terminal behind the pipe.

use std::borrow::Cow;
use std::io::Write;

use tracing_subscriber::fmt::MakeWriter;

/// Whether a terminal would obey this character instead of showing it.
fn commands(c: char) -> bool {
    (c.is_control() && c != '\n' && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text with such characters as escapes, as in `\u{1b}`; lines that end in the way of Windows end in ours.
#[must_use]
pub fn safe(text: &str) -> Cow<'_, str> {
    if !text.contains(commands) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.replace("\r\n", "\n").chars() {
        if commands(c) {
            out.extend(c.escape_unicode());
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

/// The same in JSON, where it changes no value: such characters stand in strings only, and are escaped there.
pub(super) fn safe_json(text: String) -> String {
    // JSON escapes those below 32 itself.
    if !text.contains(commands) {
        return text;
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if commands(c) {
            out.push_str(&format!("\\u{:04x}", c as u32));
        } else {
            out.push(c);
        }
    }
    out
}

/// Standard error, for logs: they name files and quote libraries.
#[derive(Clone, Copy, Debug)]
pub(super) struct SafeStderr;

impl Write for SafeStderr {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::io::stderr().lock().write_all(safe(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

impl MakeWriter<'_> for SafeStderr {
    type Writer = SafeStderr;
    fn make_writer(&self) -> SafeStderr {
        SafeStderr
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_terminal_is_never_commanded() {
        assert_eq!(safe("plain Ümlaut שלום\tx\n"), "plain Ümlaut שלום\tx\n");
        assert_eq!(safe("\u{1b}[2J\u{7}\u{7f}"), "\\u{1b}[2J\\u{7}\\u{7f}");
        assert_eq!(safe("\u{9b}31m a\rb c\r\nd"), "\\u{9b}31m a\\u{d}b c\nd");
        assert_eq!(safe("invoice\u{202e}fdp.exe\u{2066}x\u{2069}"), "invoice\\u{202e}fdp.exe\\u{2066}x\\u{2069}");
    }

    #[test]
    fn json_keeps_its_value_and_has_no_such_character() {
        let value = serde_json::json!({"a\u{9b}": "\u{1b}[31m\u{7f}\u{85}\u{202e}\r\nö"});
        let text = safe_json(value.to_string());
        assert!(!text.contains(commands), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}
