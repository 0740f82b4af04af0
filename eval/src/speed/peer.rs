//! The other program as a child process that keeps its model loaded.

use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::Deserialize;
use serde_json::{Value, json};

use super::PeerOptions;
use crate::error::{EvalError, Result};

/// The program itself travels with this one.
const SCRIPT: &str = include_str!("../../peers/transformers_speed.py");

/// Number formats that it is measured in.
pub(super) const DTYPES: [&str; 2] = ["f32", "bf16"];
/// Caches that decoding is measured with.
pub(super) const CACHES: [&str; 2] = ["dynamic", "static"];

/// A line that the child writes.
#[derive(Deserialize)]
struct Reply {
    error: Option<String>,
    ready: Option<String>,
    #[serde(default)]
    seconds: f64,
    #[serde(default)]
    tokens: Vec<u32>,
}

/// A running peer. Dropping it ends the child.
pub(super) struct Peer {
    python: PathBuf,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Its libraries.
    pub(super) version: String,
}

impl Peer {
    /// Starts it and waits until the model is loaded in all formats.
    pub(super) fn start(options: &PeerOptions, threads: usize) -> Result<Peer> {
        let failed = |reason: String| EvalError::Peer { python: options.python.clone(), reason };
        let mut child = Command::new(&options.python)
            .args(["-c", SCRIPT])
            .arg(&options.model_dir)
            .args([threads.to_string(), DTYPES.join(",")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed(format!("it does not start: {e}")))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("it has no standard input or output".into()));
        };
        let python = options.python.clone();
        let mut peer = Peer { python, child, stdin, stdout: BufReader::new(stdout), version: String::new() };
        let ready = peer.reply()?.ready;
        peer.version = ready.ok_or_else(|| failed("its first line does not say that it is ready".into()))?;
        Ok(peer)
    }

    /// The prompt of all that follows.
    pub(super) fn prompt(&mut self, ids: &[u32]) -> Result<()> {
        self.command(&json!({"cmd": "prompt", "ids": ids})).map(drop)
    }

    /// Seconds of reading the prompt, and the token it chose.
    pub(super) fn prefill(&mut self, dtype: &str) -> Result<(f64, Vec<u32>)> {
        self.command(&json!({"cmd": "prefill", "dtype": dtype}))
    }

    /// Seconds from the first of `tokens` tokens to the last, and the tokens.
    pub(super) fn decode(&mut self, dtype: &str, cache: &str, tokens: usize) -> Result<(f64, Vec<u32>)> {
        self.command(&json!({"cmd": "decode", "dtype": dtype, "cache": cache, "tokens": tokens}))
    }

    fn command(&mut self, command: &Value) -> Result<(f64, Vec<u32>)> {
        let written = writeln!(self.stdin, "{command}").and_then(|()| self.stdin.flush());
        written.map_err(|e| self.failed(format!("it does not take commands: {e}")))?;
        let reply = self.reply()?;
        Ok((reply.seconds, reply.tokens))
    }

    fn reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line).map_err(|e| self.failed(format!("it cannot be read: {e}")))?;
        if read == 0 {
            return Err(self.failed("it ended without an answer".into()));
        }
        let reply: Reply =
            serde_json::from_str(&line).map_err(|e| self.failed(format!("unreadable answer {line:?}: {e}")))?;
        match reply.error {
            Some(error) => Err(self.failed(error)),
            None => Ok(reply),
        }
    }

    fn failed(&self, reason: String) -> EvalError {
        EvalError::Peer { python: self.python.clone(), reason }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It also ends by itself when its input closes; killing does not wait for what it is doing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_missing_interpreter_is_named_with_what_to_do() {
        let options = PeerOptions { python: "no-such-python".into(), ..PeerOptions::default() };
        let error = Peer::start(&options, 1).err().unwrap().to_string();
        assert!(error.contains("no-such-python") && error.contains("torch and transformers"), "{error}");
    }

    #[test]
    fn a_child_that_says_nothing_is_an_error() {
        let options = PeerOptions { python: "true".into(), ..PeerOptions::default() };
        assert!(matches!(Peer::start(&options, 1), Err(EvalError::Peer { .. })));
    }
}
