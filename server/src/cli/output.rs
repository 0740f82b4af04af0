//! Printing: results to stdout, progress and errors to stderr; for people, or as JSON lines.

use std::cell::Cell;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::json;

use super::args::CommonArgs;
use super::terminal::{safe, safe_json};
use crate::process::stdout_was_closed;
use documents::Span;

/// Where a command prints.
#[derive(Debug)]
pub struct Out {
    /// As JSON lines.
    pub json: bool,
    /// With what an answer cost.
    pub(super) verbose: bool,
    /// Without remarks and progress.
    quiet: bool,
    terminal: bool,
    silent: bool,
    /// Some of the result could not be written.
    lost: Cell<bool>,
    /// Whoever read the result has gone away.
    gone: Cell<bool>,
}

impl Out {
    /// As the command line asks for it.
    #[must_use]
    pub fn new(common: &CommonArgs) -> Out {
        let CommonArgs { json, verbose, quiet, .. } = *common;
        Out {
            json,
            verbose,
            quiet,
            terminal: std::io::stderr().is_terminal() && !quiet,
            silent: false,
            lost: Cell::new(false),
            gone: Cell::new(false),
        }
    }

    /// Whether nothing more of the result can be written.
    pub(super) fn is_closed(&self) -> bool {
        self.lost.get() || self.gone.get()
    }

    fn written(&self, result: std::io::Result<()>) {
        match result {
            Ok(()) if stdout_was_closed() => self.lost.set(true),
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => self.gone.set(true),
            Err(_) => self.lost.set(true),
        }
    }

    /// Like this one, but for bars, remarks and errors only: results are not printed.
    pub(super) fn without_results(&self) -> Out {
        Out {
            json: false,
            verbose: self.verbose,
            quiet: self.quiet,
            terminal: self.terminal && !self.json,
            silent: true,
            lost: Cell::new(false),
            gone: Cell::new(false),
        }
    }

    /// A line of the result. A reader that went away is no error of ours.
    pub fn line(&self, text: impl AsRef<str>) {
        if self.silent {
            return;
        }
        self.written(writeln!(std::io::stdout().lock(), "{}", safe(text.as_ref())));
    }

    /// Text without a line end, shown at once.
    pub(super) fn text(&self, text: &str) {
        let mut stdout = std::io::stdout().lock();
        self.written(stdout.write_all(safe(text).as_bytes()).and_then(|()| stdout.flush()));
    }

    /// A result as one JSON line.
    pub fn value<T: Serialize>(&self, value: &T) {
        match serde_json::to_string(value) {
            Ok(text) if self.silent => drop(text),
            Ok(text) => self.written(writeln!(std::io::stdout().lock(), "{}", safe_json(text))),
            Err(error) => self.complain(&format!("a result could not be written as JSON: {error}")),
        }
    }

    /// Asks for input, beside the result.
    pub(super) fn prompt(&self, text: &str) {
        let mut stderr = std::io::stderr().lock();
        let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
    }

    /// A remark for people, beside the result.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.complain(text);
        }
    }

    /// What is said beside the result whoever listens.
    fn complain(&self, text: &str) {
        let _ = writeln!(std::io::stderr().lock(), "{}", safe(text));
    }

    /// Tells how a command ended (if not well: why, and with which exit code), and says with which code the process ends. A result
    /// that could not be written is no success.
    #[must_use]
    pub fn end(&self, outcome: Result<(), (String, u8)>) -> ExitCode {
        match outcome {
            Ok(()) if self.lost.get() => {
                self.failed("the result could not be written to standard output: is it closed, or the disk full?");
                ExitCode::FAILURE
            }
            Ok(()) => ExitCode::SUCCESS,
            Err((message, exit_code)) => {
                self.error(&message, exit_code);
                ExitCode::from(exit_code)
            }
        }
    }

    /// An error that ends the command, or a turn of it.
    pub(super) fn error(&self, message: &str, exit_code: u8) {
        if self.json {
            self.value(&json!({"error": {"message": message, "exit_code": exit_code}}));
        }
        self.complain(&format!("error: {message}"));
    }

    /// A part that failed while the rest goes on, named at once.
    pub(super) fn failed(&self, text: &str) {
        self.complain(&format!("error: {text}"));
    }

    /// A bar for work of known size; only on a terminal.
    #[must_use]
    pub fn bar(&self) -> Option<ProgressBar> {
        if !self.terminal || self.json {
            return None;
        }
        let bar = ProgressBar::no_length();
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Some(bar)
    }

    /// A bar for a file that comes over the network; only on a terminal.
    pub(super) fn bytes_bar(&self, name: &str, size: u64) -> Option<ProgressBar> {
        let bar = self.bar()?.with_message(safe(name).into_owned());
        let style = "{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {wide_msg}";
        bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_length(size);
        Some(bar)
    }

    /// A sign of life while something of unknown length runs; only on a terminal.
    pub(super) fn spinner(&self, message: &str) -> Option<ProgressBar> {
        if !self.terminal || self.json {
            return None;
        }
        let spinner = ProgressBar::new_spinner().with_message(message.to_string());
        spinner.enable_steady_tick(Duration::from_millis(100));
        Some(spinner)
    }
}

/// A path as people know it: relative to the current folder where it lies below.
pub(super) fn short(path: &Path) -> String {
    let current = std::env::current_dir().and_then(|dir| dir.canonicalize()).ok();
    let relative = current.as_deref().and_then(|dir| path.strip_prefix(dir).ok());
    safe(&relative.unwrap_or(path).display().to_string()).replace('\n', "\\u{a}")
}

/// Where a passage stands: file and line, as editors and terminals take them, and characters.
pub(super) fn place(path: &Path, line: usize, span: Span) -> String {
    format!("{}:{line}, characters {}-{}", short(path), span.start, span.end)
}

/// A duration with a fitting unit.
pub(super) fn seconds(value: f64) -> String {
    if value < 1.0 { format!("{:.1} ms", value * 1e3) } else { format!("{value:.2} s") }
}

/// Bytes with a fitting unit.
pub(super) fn bytes(value: u64) -> String {
    let mut scaled = value as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if scaled < 1024.0 {
            return if unit == "B" { format!("{value} B") } else { format!("{scaled:.1} {unit}") };
        }
        scaled /= 1024.0;
    }
    format!("{scaled:.1} TiB")
}

/// A number with its noun.
#[must_use]
pub fn count(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{} {noun}s", grouped(number as u64)) }
}

/// A number with its thousands apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_line() {
        assert_eq!(short(Path::new("/a\nerror: forged")), "/a\\u{a}error: forged");
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(grouped(1_234_567), "1,234,567");
        assert_eq!(grouped(999), "999");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
        assert_eq!(seconds(0.0421), "42.1 ms");
        assert_eq!(count(1, "chunk"), "1 chunk");
        assert_eq!(count(1500, "chunk"), "1,500 chunks");
    }
}
