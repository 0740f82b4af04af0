//! transformers and PyTorch's attention on a GPU, as a child process that is told part by part what to time.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{EvalError, Result};
use crate::process::Process;

/// The program itself travels with this one.
const SCRIPT: &str = include_str!("../../peers/transformers_gpu.py");

/// The other side of benches on a device.
#[derive(Debug, Clone)]
pub struct GpuPeerOptions {
    /// A Python interpreter that imports torch and transformers.
    pub python: PathBuf,
    /// The folder whose `config.json` gives the model's shape; `None`: that of Llama-3.1-8B. Weights are random.
    pub model_dir: Option<PathBuf>,
    /// PyTorch's name of the device.
    pub device: String,
    /// Without it, only this program is measured.
    pub enabled: bool,
}

impl Default for GpuPeerOptions {
    fn default() -> Self {
        GpuPeerOptions { python: "python3".into(), model_dir: None, device: "cuda".into(), enabled: true }
    }
}

/// A running peer. Dropping it ends the child and frees its memory on the device.
pub(super) struct GpuPeer {
    process: Process,
    /// Its libraries and its device.
    pub(super) version: String,
}

#[derive(Deserialize)]
struct Reply {
    samples: Vec<f64>,
}

impl GpuPeer {
    /// Starts it, unless it is not wanted.
    pub(super) fn start(options: &GpuPeerOptions) -> Result<Option<GpuPeer>> {
        if !options.enabled {
            return Ok(None);
        }
        let mut arguments = vec!["--commands".to_owned(), "--device".into(), options.device.clone()];
        if let Some(dir) = &options.model_dir {
            arguments.extend(["--model".into(), dir.display().to_string()]);
        }
        let process = Process::start(&options.python, "torch and transformers", SCRIPT, &arguments)?;
        let version = process.version.clone();
        Ok(Some(GpuPeer { process, version }))
    }

    /// Times of a part in ms. The inner error is one of this part alone, as the peer words it.
    pub(super) fn time(&mut self, part: &str) -> Result<std::result::Result<Vec<f64>, String>> {
        match self.process.ask::<Reply>(&Value::from(part)) {
            Ok(reply) => Ok(Ok(reply.samples)),
            // Its own words begin with the part; everything else means that it is gone.
            Err(EvalError::Peer { reason, .. }) if reason.starts_with(part) => Ok(Err(reason)),
            Err(error) => Err(error),
        }
    }
}
