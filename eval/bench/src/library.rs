//! The library bench: how soon many small notes can be searched, with the state of their chunks left to its first use.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Args;
use eval::{Output, Record, RunInfo};
use serde::Serialize;
use serde_json::json;

use super::args::RecordArgs;
use super::dispatch::ScratchDir;
use crate::error::Result;
use service::{IngestOptions, Purpose, Service};
use settings::{QuireError, Settings};

/// Name of the collection.
const COLLECTION: &str = "notes";
/// Notes of a folder.
const FOLDER: usize = 1000;

/// Flags of `quire-bench library`.
#[derive(Debug, Args)]
pub(crate) struct LibraryArgs {
    /// Notes to ingest
    #[arg(long, default_value_t = 100_000)]
    pub(crate) notes: usize,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

/// Figures of the bench.
#[derive(Clone, Debug, Serialize)]
pub(super) struct LibraryReport {
    /// All of them as records.
    pub(super) records: Vec<Record>,
}

impl LibraryReport {
    /// For people.
    pub(super) fn table(&self) -> String {
        let line = |r: &Record| format!("| {} | {} | {:.3} {} |", r.case, r.metric, r.value, r.unit);
        let lines: Vec<String> = self.records.iter().map(line).collect();
        format!("| case | metric | value |\n|---|---|---|\n{}", lines.join("\n"))
    }
}

/// Ingests notes from files and measures how long that takes, until the last one is found.
///
/// # Errors
/// What the service fails with, what keeps records from being written; [`QuireError::CheckFailed`] if a note is not found.
pub(super) fn library_bench(
    settings: &Settings,
    notes: usize,
    output: &Output,
    news: &mut dyn FnMut(&str),
) -> Result<LibraryReport> {
    let scratch = ScratchDir::new(&settings.data_dir, "bench-library")?;
    let (folder, data_dir) = (scratch.path().join("notes"), scratch.path().join("data"));
    let bytes = write_notes(&folder, notes)?;
    news(&format!("{notes} notes of {} bytes on average are written", bytes / notes.max(1)));
    let service = Service::open(&Settings { data_dir: data_dir.clone(), ..settings.clone() }, Purpose::Ingest)?;
    let info = RunInfo::start(output).with_config(json!({
        "notes": notes, "bytes": bytes, "threads": std::thread::available_parallelism().map_or(1, usize::from),
        "measured": "from naming the folder to finding the last note by a word that it alone has; chunks are lazy",
    }));
    let options = IngestOptions { lazy: true, ..IngestOptions::default() };
    let started = Instant::now();
    let report = service.ingest_while(COLLECTION, &[folder], &options, &|| true, &mut |_| {})?;
    let found = service.search(COLLECTION, &word(notes.saturating_sub(1)), 2)?;
    let seconds = started.elapsed().as_secs_f64();
    if report.new != notes || found.len() != 1 {
        let problem = format!("{} of {notes} notes came in, {} of the last were found", report.new, found.len());
        return Err(QuireError::CheckFailed(problem).into());
    }
    let started = Instant::now();
    service.ingest_while(COLLECTION, &[scratch.path().join("notes")], &options, &|| true, &mut |_| {})?;
    let again = started.elapsed().as_secs_f64();
    service.engine().shutdown();
    let case =
        format!("notes/{}", if notes.is_multiple_of(1000) { format!("{}k", notes / 1000) } else { notes.to_string() });
    let record = |metric, unit, value: f64| info.record("library", &case, metric, unit, (value * 1e3).round() / 1e3, 1);
    let disk = bytes_below(&data_dir);
    let records = vec![
        record("seconds", "s", seconds),
        record("seconds_unchanged", "s", again),
        record("disk_bytes_per_text_byte", "", disk as f64 / bytes.max(1) as f64),
    ];
    info.write(&records)?;
    Ok(LibraryReport { records })
}

/// A word that only this note has.
fn word(note: usize) -> String {
    format!("marker{note}x")
}

/// Writes notes of some eighty words, no two alike; says how many bytes they have.
fn write_notes(folder: &Path, notes: usize) -> Result<usize> {
    let who = ["The harbour master", "A clerk of the archive", "The night ferry", "An old pilot", "The surveyor"];
    let did = ["counted", "carried", "described", "returned", "measured", "forgot", "repaired"];
    let what = ["barrels of tar", "letters", "lamps", "soundings", "coils of rope", "brass fittings", "charts"];
    let place = ["near the sluice", "below the chapel", "at Orrin Quay", "behind the mill", "in the upper store"];
    let mut total = 0;
    for note in 0..notes {
        let mut text = format!("# Note {note}\n\n{}. ", word(note));
        for sentence in 0..8usize {
            // Different ones for each note: a mixed-up number takes the words' parts.
            let mixed = (note * 8 + sentence).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
            let (a, b, c, d) = (mixed % 5, mixed / 5 % 7, mixed / 35 % 7, mixed / 245 % 5);
            let number = mixed / 1225 % 9000 + 1000;
            text.push_str(&format!("{} {} {number} {} {}. ", who[a], did[b], what[c], place[d]));
        }
        total += text.len();
        let path: PathBuf = folder.join((note / FOLDER).to_string()).join(format!("note-{note}.md"));
        let written = match note % FOLDER {
            0 => std::fs::create_dir_all(path.parent().unwrap_or(folder)),
            _ => Ok(()),
        };
        written.and_then(|()| std::fs::write(&path, text)).map_err(|e| QuireError::writing(&path, e))?;
    }
    Ok(total)
}

/// Bytes of all files below a folder.
fn bytes_below(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => bytes_below(&entry.path()),
        Ok(metadata) => metadata.len(),
        Err(_) => 0,
    });
    bytes.sum()
}
