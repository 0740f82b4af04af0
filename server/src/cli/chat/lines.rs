//! Where the lines of a conversation come from: an editor on a terminal, or a pipe.
//!
//! Both are read by a thread of their own, as waiting for a line cannot be interrupted otherwise. The editor has the
//! terminal only while a line is asked for, so that Ctrl-C reaches this program as a signal while it answers.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Behavior, Config, Editor};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use settings::{QuireError, Result};

/// Bytes of one line at most.
const LINE_LIMIT: u64 = 16 << 20;
/// Texts that are remembered.
const HISTORY: usize = 1000;

/// What came from whoever talks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Typed {
    /// A line, or several that were pasted or recalled at once.
    Line(String),
    /// Ctrl-C.
    Interrupt,
}

/// What the editor is asked to do.
enum Order {
    Read(&'static str),
    Remember(String),
}

/// The lines of a conversation.
pub(super) struct Lines {
    /// To the editor, where there is one.
    orders: Option<Sender<Order>>,
    typed: Receiver<Result<Typed>>,
    /// The editor is reading.
    asked: bool,
}

impl Lines {
    /// From standard input, which is no terminal.
    pub(super) fn piped() -> Lines {
        let (sender, typed) = channel(1);
        std::thread::spawn(move || {
            let mut stdin = std::io::stdin().lock();
            loop {
                let line = match read_line(&mut stdin) {
                    Ok(None) => return,
                    Ok(Some(line)) => Ok(Typed::Line(line)),
                    Err(error) => Err(error),
                };
                if sender.blocking_send(line).is_err() {
                    return;
                }
            }
        });
        Lines { orders: None, typed, asked: false }
    }

    /// From the terminal, with editing; `history`: the file that remembers what was typed.
    ///
    /// # Errors
    /// A terminal that cannot be used.
    pub(super) fn edited(history: Option<PathBuf>) -> Result<Lines> {
        let mut editor = editor().map_err(refused)?;
        let (orders, mut todo) = channel(4);
        let (sender, typed) = channel(1);
        std::thread::spawn(move || {
            let history = history.filter(|path| open_history(&mut editor, path));
            while let Some(order) = todo.blocking_recv() {
                match order {
                    Order::Remember(text) => remember(&mut editor, &text, history.as_deref()),
                    Order::Read(prompt) => {
                        let line = match editor.readline(prompt) {
                            Ok(line) => Ok(Typed::Line(line)),
                            Err(ReadlineError::Interrupted) => Ok(Typed::Interrupt),
                            Err(ReadlineError::Eof) => return,
                            // Bytes that are no text: the line is lost, the conversation is not.
                            Err(ReadlineError::Io(error)) if error.kind() == std::io::ErrorKind::InvalidData => {
                                if sender.blocking_send(Err(refused(ReadlineError::Io(error)))).is_err() {
                                    return;
                                }
                                continue;
                            }
                            Err(error) => Err(refused(error)),
                        };
                        let failed = line.is_err();
                        if sender.blocking_send(line).is_err() || failed {
                            return;
                        }
                    }
                }
            }
        });
        Ok(Lines { orders: Some(orders), typed, asked: false })
    }

    /// The next line; `None` at the end. May be given up and asked again.
    pub(super) async fn next(&mut self, prompt: &'static str) -> Option<Result<Typed>> {
        if let Some(orders) = self.orders.as_ref().filter(|_| !self.asked) {
            orders.send(Order::Read(prompt)).await.ok()?;
            self.asked = true;
        }
        let typed = self.typed.recv().await;
        self.asked = false;
        typed
    }

    /// Keeps a text, to be recalled later.
    pub(super) async fn remember(&self, text: &str) {
        if let Some(orders) = self.orders.as_ref().filter(|_| !text.trim().is_empty()) {
            // An editor that has ended remembers nothing more.
            let _ = orders.send(Order::Remember(text.into())).await;
        }
    }
}

fn editor() -> rustyline::Result<Editor<(), FileHistory>> {
    // The terminal itself, so that prompts do not get among answers that are written elsewhere.
    let config = Config::builder()
        .behavior(Behavior::PreferTerm)
        .max_history_size(HISTORY)?
        .history_ignore_dups(true)?
        .history_ignore_space(true)
        .build();
    Editor::with_config(config)
}

/// Reads what was remembered; false where nothing can be.
fn open_history(editor: &mut Editor<(), FileHistory>, path: &Path) -> bool {
    use std::os::unix::fs::DirBuilderExt;
    let made = path.parent().map(|dir| std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir));
    if let Some(Err(error)) = made {
        tracing::info!(%error, "no history of what is typed can be kept");
        return false;
    }
    match editor.load_history(path) {
        Ok(()) => true,
        Err(ReadlineError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the history of what was typed cannot be read");
            false
        }
    }
}

fn remember(editor: &mut Editor<(), FileHistory>, text: &str, path: Option<&Path>) {
    let added = editor.add_history_entry(text).and_then(|added| match path {
        // Readable by this user alone: the editor sees to that when it makes the file.
        Some(path) if added => editor.append_history(path),
        _ => Ok(()),
    });
    if let Err(error) = added {
        tracing::warn!(%error, "what was typed could not be remembered");
    }
}

fn refused(error: ReadlineError) -> QuireError {
    QuireError::InvalidParameter { param: "terminal".into(), problem: format!("expected a line: {error}") }
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
