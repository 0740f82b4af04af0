//! A program of another language as a child process that answers commands, one JSON line each.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{EvalError, Result};

/// Set by users to hold libraries to one kind of kernel; a peer is to run at its best.
const TUNING: [&str; 2] = ["OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"];

/// A running child. Dropping it ends it.
pub(crate) struct Process {
    python: PathBuf,
    /// What the interpreter must import.
    needs: &'static str,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// What its first line says of its libraries.
    pub(crate) version: String,
}

impl Process {
    /// Starts `python -c script arguments` and waits until it says `{"ready": version}`.
    pub(crate) fn start(python: &Path, needs: &'static str, script: &str, arguments: &[String]) -> Result<Process> {
        let failed = |reason: String| EvalError::Peer { python: python.to_owned(), needs, reason };
        let mut command = Command::new(python);
        for name in TUNING {
            command.env_remove(name);
        }
        let mut child = command
            .args(["-c", script])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed(format!("it does not start: {e}")))?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("it has no standard input or output".into()));
        };
        let (python, stdout) = (python.to_owned(), BufReader::new(stdout));
        let mut process = Process { python, needs, child, stdin, stdout, version: String::new() };
        let ready = process.reply()?;
        let version = ready["ready"].as_str();
        process.version =
            version.ok_or_else(|| process.failed("its first line does not say that it is ready".into()))?.to_owned();
        Ok(process)
    }

    /// Sends a command and waits for its answer.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, command: &Value) -> Result<T> {
        let written = writeln!(self.stdin, "{command}").and_then(|()| self.stdin.flush());
        written.map_err(|e| self.failed(format!("it does not take commands: {e}")))?;
        let reply = self.reply()?;
        let shown = reply.to_string();
        serde_json::from_value(reply).map_err(|e| self.failed(format!("unexpected answer {shown}: {e}")))
    }

    fn reply(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.stdout.read_line(&mut line).map_err(|e| self.failed(format!("it cannot be read: {e}")))?;
        if read == 0 {
            return Err(self.failed("it ended without an answer".into()));
        }
        let reply: Value =
            serde_json::from_str(&line).map_err(|e| self.failed(format!("unreadable answer {line:?}: {e}")))?;
        match reply["error"].as_str() {
            Some(error) => Err(self.failed(error.to_owned())),
            None => Ok(reply),
        }
    }

    fn failed(&self, reason: String) -> EvalError {
        EvalError::Peer { python: self.python.clone(), needs: self.needs, reason }
    }
}

impl Drop for Process {
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
        let error = Process::start("no-such-python".as_ref(), "torch", "", &[]).err().unwrap().to_string();
        assert!(error.contains("no-such-python") && error.contains("imports torch"), "{error}");
    }

    #[test]
    fn a_child_that_says_nothing_is_an_error() {
        assert!(matches!(Process::start("true".as_ref(), "torch", "", &[]), Err(EvalError::Peer { .. })));
    }
}
