//! The other program as a child process that keeps its model loaded.

use serde::Deserialize;
use serde_json::{Value, json};

use super::PeerOptions;
use crate::error::Result;
use crate::process::Process;

/// The program itself travels with this one.
const SCRIPT: &str = include_str!("../../peers/transformers_speed.py");

/// Number formats that it is measured in.
pub(super) const DTYPES: [&str; 2] = ["f32", "bf16"];
/// Caches that decoding is measured with.
pub(super) const CACHES: [&str; 2] = ["dynamic", "static"];

/// What it answers.
#[derive(Deserialize)]
struct Reply {
    seconds: f64,
    tokens: Vec<u32>,
}

/// A running peer. Dropping it ends the child.
pub(super) struct Peer {
    process: Process,
    /// Its libraries.
    pub(super) version: String,
}

impl Peer {
    /// Starts it and waits until the model is loaded in all formats.
    pub(super) fn start(options: &PeerOptions, threads: usize) -> Result<Peer> {
        let arguments = [options.model_dir.display().to_string(), threads.to_string(), DTYPES.join(",")];
        let process = Process::start(&options.python, "torch and transformers", SCRIPT, &arguments)?;
        let version = process.version.clone();
        Ok(Peer { process, version })
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
        let reply: Reply = self.process.ask(command)?;
        Ok((reply.seconds, reply.tokens))
    }
}
