//! `quire ingest`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde_json::json;

use super::asking;
use super::output::{Out, count, seconds, short};
use documents::Skipped;
use service::control::{Command, Event, ExactPath, IngestProgress};
use service::{DocumentState, IngestOptions, IngestReport, Service};
use settings::{Config, QuireError, Result};

pub(super) fn run(config: &Config, paths: &[PathBuf], sync: bool, out: &Out) -> Result<()> {
    let settings = &config.settings;
    let command = Command::Ingest {
        collection: settings.collection.clone(),
        paths: paths.iter().map(|path| ExactPath::resolve(path)).collect(),
        options: IngestOptions { sync, ..IngestOptions::from_settings(settings)? },
        cache_bytes: settings.cache_bytes.map(|bytes| bytes.0),
    };
    let link = asking::open(config, "ingest", command.need(), out)?;
    let (mut progress, mut report) = (Progress::new(out), None);
    let outcome = asking::hear(&link, &command, out, &mut |event| match event {
        Event::Ingest(step) => {
            progress.show(&step);
            if let IngestProgress::Failed { document, unreadable: true, .. } = &step
                && link.is_server()
            {
                explain(Path::new(document), out);
            }
        }
        Event::Ingested(whole) => report = Some(whole),
        _ => {}
    });
    progress.finish();
    if let Err(QuireError::Told { unreadable: true, .. }) = &outcome {
        paths.iter().for_each(|path| explain(path, out));
    }
    match report {
        Some(report) if out.json => out.value(&json!({"event": "report", "report": report})),
        Some(report) => out.line(summary(&report)),
        None => {}
    }
    link.close();
    outcome
}

/// Says of a document that a server could not read what its user can.
fn explain(path: &Path, out: &Out) {
    let readable = std::fs::File::open(path).is_ok() && (!path.is_dir() || std::fs::read_dir(path).is_ok());
    if readable {
        out.note(&format!(
            "note: you can read {}, the running server cannot: it reads as the user that it runs as, and where it runs \
             (in a container, say). Copy it to where both can, or stop the server",
            short(path)
        ));
    }
}

/// Between two lines about one document.
const LINES: Duration = Duration::from_secs(10);

/// Ingests with a service of this process and prints what happens: a bar on a terminal, else a line per document, else a JSON line per chunk and
/// document. A line is an acknowledgement: what it names is on disk.
pub(super) fn ingest(service: &Service, collection: &str, paths: &[PathBuf], out: &Out) -> Result<IngestReport> {
    let mut progress = Progress::new(out);
    let report = service.ingest(collection, paths, &mut |event| progress.show(&event.into()));
    progress.finish();
    report
}

/// Shows the steps of an ingest.
struct Progress<'a> {
    out: &'a Out,
    bar: Option<ProgressBar>,
    /// When a document was last spoken of.
    told: Instant,
}

impl<'a> Progress<'a> {
    fn new(out: &'a Out) -> Progress<'a> {
        Progress { out, bar: out.bar(), told: Instant::now() }
    }

    fn show(&mut self, step: &IngestProgress) {
        match (&self.bar, self.out.json) {
            (_, true) => print_json(step, self.out),
            (Some(bar), false) => show(step, bar, self.out),
            (None, false) => print_line(step, &mut self.told, self.out),
        }
    }

    fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn show(step: &IngestProgress, bar: &ProgressBar, out: &Out) {
    match step {
        IngestProgress::Document { document, done, total, .. } => {
            bar.set_length(*total as u64);
            bar.set_position(*done as u64);
            bar.set_message(short(Path::new(document)));
        }
        IngestProgress::Chunk { document, done, total, .. } => bar.set_message(inside(document, *done, *total)),
        IngestProgress::Removed { .. } => {}
        IngestProgress::Kept { path, documents } => bar.suspend(|| out.note(&kept(path, *documents))),
        IngestProgress::Failed { error, .. } => bar.suspend(|| out.failed(error)),
    }
}

/// What `--sync` has not done, and how it is done.
fn kept(path: &str, documents: usize) -> String {
    let (path, it) = (short(Path::new(path)), if documents == 1 { "it" } else { "them" });
    format!(
        "note: {path} is not there, and may be a disk that is missing: {} of the collection from there stayed. \
         `quire rm {path}` removes {it}",
        count(documents, "document")
    )
}

/// How far a document is.
fn inside(document: &str, done: usize, total: usize) -> String {
    format!("{}: {done} of {}", short(Path::new(document)), count(total, "chunk"))
}

fn print_json(step: &IngestProgress, out: &Out) {
    out.value(&match step {
        IngestProgress::Chunk { key, document, span, tokens, computed, done, total } => json!({
            "event": "chunk", "key": key, "document": document, "span": span, "tokens": tokens,
            "computed": computed, "done": done, "total": total,
        }),
        IngestProgress::Document { document, state, chunks, computed, .. } => json!({
            "event": "document", "document": document, "state": state, "chunks": chunks, "computed": computed,
        }),
        IngestProgress::Removed { document } => json!({"event": "removed", "document": document}),
        IngestProgress::Kept { path, documents } => json!({"event": "kept", "path": path, "documents": documents}),
        IngestProgress::Failed { document, error, .. } => {
            json!({"event": "failed", "document": document, "error": error})
        }
    });
}

/// Whether a document in which `done` chunks of `total` are stored is spoken of again, so long after the last time.
fn is_due(since: Duration, done: usize, total: usize) -> bool {
    since >= LINES && done < total
}

/// `told`: when a document was last spoken of.
fn print_line(step: &IngestProgress, told: &mut Instant, out: &Out) {
    match step {
        IngestProgress::Chunk { document, done, total, .. } => {
            if is_due(told.elapsed(), *done, *total) {
                *told = Instant::now();
                out.note(&inside(document, *done, *total));
            }
        }
        IngestProgress::Document { document, state, chunks, computed, done, total } => {
            *told = Instant::now();
            let state = match state {
                DocumentState::New => "new",
                DocumentState::Changed => "changed",
                DocumentState::Unchanged => "unchanged",
                DocumentState::Renamed => "renamed",
                DocumentState::Copy => "the same text as another",
            };
            out.line(format!(
                "[{done}/{total}] {}: {state}, {}, {computed} computed",
                short(Path::new(document)),
                count(*chunks, "chunk")
            ));
        }
        IngestProgress::Kept { path, documents } => out.note(&kept(path, *documents)),
        IngestProgress::Removed { document } => out.line(format!("{}: removed", short(Path::new(document)))),
        IngestProgress::Failed { error, .. } => out.failed(error),
    }
}

/// One line over a whole ingest.
pub(super) fn summary(report: &IngestReport) -> String {
    let documents = report.documents();
    let chunks = report.chunks_cached + report.chunks_computed;
    let also =
        [(report.renamed, "renamed"), (report.copies, "of a text that another has"), (report.removed, "removed")];
    let also: String =
        also.iter().filter(|(number, _)| *number > 0).map(|(number, what)| format!(", {number} {what}")).collect();
    let state = match (report.new, report.changed) {
        (0, 0) if documents == 0 && also.is_empty() => "none could be read".to_string(),
        (0, 0) if also.is_empty() => "all unchanged".to_string(),
        (new, 0) if new == documents && also.is_empty() => "all new".to_string(),
        (new, changed) => format!("{new} new, {changed} changed, {} unchanged{also}", report.unchanged),
    };
    let cached = match report.chunks_computed {
        _ if report.chunks_left > 0 && chunks == 0 => {
            format!("{}, whose state is computed at first use", count(report.chunks_left, "chunk"))
        }
        computed if report.chunks_left > 0 => format!(
            "{}: {computed} computed, {} cached, {} left to their first use",
            count(chunks + report.chunks_left, "chunk"),
            report.chunks_cached,
            report.chunks_left
        ),
        0 if chunks == 0 => "no chunks".to_string(),
        0 => format!("every one of {} was cached, 0 computed", count(chunks, "chunk")),
        computed => format!("{}: {computed} computed, {} cached", count(chunks, "chunk"), report.chunks_cached),
    };
    let evicted = match report.chunks_evicted {
        0 => String::new(),
        evicted => format!(
            "; {} made way in the cache and will be computed again: raise --cache-bytes",
            count(evicted as usize, "chunk")
        ),
    };
    let failed = match report.failed {
        0 => String::new(),
        failed => format!("; {failed} could not be read"),
    };
    format!(
        "{} in `{}` ({state}); {cached}; {} in {}{evicted}{failed}{}",
        count(documents, "document"),
        report.collection,
        count(report.tokens, "token"),
        seconds(report.seconds),
        skipped(&report.skipped)
    )
}

/// What was left out, by reason.
fn skipped(skipped: &Skipped) -> String {
    let reasons = [
        (skipped.hidden, "hidden"),
        (skipped.other_formats, "neither text nor Markdown"),
        (skipped.links, "links to folders or to nothing"),
        (skipped.special, "no regular files"),
        (skipped.empty, "without text"),
    ];
    let named: Vec<String> =
        reasons.iter().filter(|(number, _)| *number > 0).map(|(number, why)| format!("{number} {why}")).collect();
    if named.is_empty() { String::new() } else { format!("; skipped {}: {}", skipped.total(), named.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_document_is_spoken_of_every_ten_seconds_until_its_last_chunk() {
        assert!(!is_due(Duration::from_millis(9_999), 1, 9));
        assert!(is_due(Duration::from_secs(10), 1, 9) && is_due(Duration::from_secs(11), 8, 9));
        assert!(!is_due(Duration::from_secs(60), 9, 9), "the document's own line follows");
        assert_eq!(inside("/a/long.md", 1200, 3400), "/a/long.md: 1200 of 3,400 chunks");
    }

    #[test]
    fn the_summary_counts_what_was_left_out_and_why() {
        let skipped = Skipped { hidden: 2, other_formats: 3, empty: 1, ..Skipped::default() };
        let report = IngestReport { collection: "c".into(), new: 1, failed: 2, skipped, ..IngestReport::default() };
        let line = summary(&report);
        assert!(line.contains("2 could not be read"), "{line}");
        assert!(line.ends_with("skipped 6: 2 hidden, 3 neither text nor Markdown, 1 without text"), "{line}");
        let none = IngestReport { new: 1, ..IngestReport::default() };
        assert!(!summary(&none).contains("skipped") && !summary(&none).contains("could not"));
    }
}
