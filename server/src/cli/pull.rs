//! `quire pull`.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde_json::json;

use super::output::{Out, bytes, count};
use hub::{self, FileState, ModelId, PullEvent};
use settings::Result;

/// Between two lines about one file.
const LINES: Duration = Duration::from_secs(10);

pub(super) fn run(id: &ModelId, out: &Out) -> Result<()> {
    let mut view = View { out, bar: None, told: Instant::now() };
    let pulled = hub::pull(&settings::hub(), id, &mut |event| view.show(&event));
    view.clear();
    let pulled = pulled?;
    if out.json {
        out.value(&json!({
            "event": "pulled", "model": id.to_string(), "commit": pulled.commit,
            "folder": pulled.folder.to_string_lossy(), "files": pulled.files,
        }));
        return Ok(());
    }
    let total: u64 = pulled.files.iter().map(|file| file.bytes).sum();
    out.line(format!("{id} at commit {}: {}, {}", pulled.commit, count(pulled.files.len(), "file"), bytes(total)));
    out.line(format!("  folder: {}", pulled.folder.display()));
    out.line(format!("  use it: quire chat --model {id}"));
    out.line(format!("          or QUIRE_MODEL={id}, or model = \"{id}\" in quire.toml, for every command"));
    Ok(())
}

/// A bar a file on a terminal, lines elsewhere; both on stderr, beside the result.
struct View<'a> {
    out: &'a Out,
    bar: Option<ProgressBar>,
    told: Instant,
}

impl View<'_> {
    fn show(&mut self, event: &PullEvent<'_>) {
        if self.out.json {
            return self.json(event);
        }
        match event {
            PullEvent::Begin { name, size, done } => {
                self.told = Instant::now();
                self.bar = self.out.bytes_bar(name, *size);
                if let Some(bar) = &self.bar {
                    bar.set_position(*done);
                    bar.reset_eta();
                } else if *done > 0 {
                    self.out.note(&format!("{name}: going on behind {} of {}", bytes(*done), bytes(*size)));
                } else {
                    self.out.note(&format!("{name}: fetching {}", bytes(*size)));
                }
            }
            PullEvent::Progress { name, size, done } => match &self.bar {
                Some(bar) => bar.set_position(*done),
                None if self.told.elapsed() >= LINES => {
                    self.told = Instant::now();
                    self.out.note(&format!("{name}: {} of {}", bytes(*done), bytes(*size)));
                }
                None => {}
            },
            PullEvent::Waiting { name } => {
                self.note(&format!("{name}: another process fetches it, waiting for its end"))
            }
            PullEvent::Retry { name, problem } => self.note(&format!("{name}: trying again: {problem}")),
            PullEvent::File(file) => {
                self.clear();
                if file.state == FileState::Cached {
                    self.out.note(&format!("{}: in the cache, {}", file.name, bytes(file.bytes)));
                } else {
                    self.out.note(&format!("{}: complete, {}", file.name, bytes(file.bytes)));
                }
            }
        }
    }

    fn json(&mut self, event: &PullEvent<'_>) {
        match event {
            PullEvent::File(file) => self.out.value(&json!({"event": "file", "file": file})),
            PullEvent::Waiting { name } => self.out.value(&json!({"event": "waiting", "name": name})),
            PullEvent::Retry { name, problem } => {
                self.out.value(&json!({"event": "retry", "name": name, "problem": problem}));
            }
            PullEvent::Begin { name, size, done } => {
                self.out.value(&json!({"event": "begin", "name": name, "bytes": size, "done": done}));
            }
            PullEvent::Progress { .. } => {}
        }
    }

    fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.out.note(text)),
            None => self.out.note(text),
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
