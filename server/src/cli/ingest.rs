//! `quire ingest`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use serde_json::json;

use super::output::{Out, count, seconds, short};
use crate::config::Settings;
use crate::error::Result;
use crate::service::{DocumentState, IngestEvent, IngestOptions, IngestReport, Purpose, Service};
use crate::store::Origin;
use documents::Skipped;

pub(super) fn run(settings: &Settings, paths: &[PathBuf], sync: bool, out: &Out) -> Result<()> {
    let options = IngestOptions { sync, ..settings.ingesting()? };
    let spinner = out.spinner("loading the model");
    let service = Service::open(settings, Purpose::Ingest)?;
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    let report = ingest(&service, &settings.collection, paths, &options, out)?;
    service.engine().shutdown();
    if out.json {
        out.value(&json!({"event": "report", "report": report}));
    } else {
        out.line(summary(&report));
    }
    report.check()
}

/// Between two lines about one document.
const LINES: Duration = Duration::from_secs(10);

/// Ingests and prints what happens: a bar on a terminal, else a line per document, else a JSON line per chunk and
/// document. A line is an acknowledgement: what it names is on disk.
pub(super) fn ingest(
    service: &Service,
    collection: &str,
    paths: &[PathBuf],
    options: &IngestOptions,
    out: &Out,
) -> Result<IngestReport> {
    let bar = out.bar();
    let mut told = Instant::now();
    let report = service.ingest_with(collection, paths, options, &mut |event| match (&bar, out.json) {
        (_, true) => print_json(event, out),
        (Some(bar), false) => show(event, bar, out),
        (None, false) => print_line(event, &mut told, out),
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    report
}

fn show(event: &IngestEvent<'_>, bar: &ProgressBar, out: &Out) {
    match event {
        IngestEvent::Document { path, done, total, .. } => {
            bar.set_length(*total as u64);
            bar.set_position(*done as u64);
            bar.set_message(short(path));
        }
        IngestEvent::Chunk { path, done, total, .. } => bar.set_message(inside(path, *done, *total)),
        IngestEvent::Removed { .. } => {}
        IngestEvent::Failed { error, .. } => bar.suspend(|| out.failed(&error.to_string())),
    }
}

/// How far a document is.
fn inside(path: &Path, done: usize, total: usize) -> String {
    format!("{}: {done} of {}", short(path), count(total, "chunk"))
}

fn print_json(event: &IngestEvent<'_>, out: &Out) {
    out.value(&match event {
        IngestEvent::Chunk { key, path, span, tokens, origin, done, total } => json!({
            "event": "chunk", "key": key.to_string(), "document": path.to_string_lossy(), "span": span, "tokens": tokens,
            "computed": *origin == Origin::Computed, "done": done, "total": total,
        }),
        IngestEvent::Document { path, state, chunks, computed, .. } => json!({
            "event": "document", "document": path.to_string_lossy(), "state": state, "chunks": chunks, "computed": computed,
        }),
        IngestEvent::Removed { path } => json!({"event": "removed", "document": path.to_string_lossy()}),
        IngestEvent::Failed { path, error } => {
            json!({"event": "failed", "document": path.to_string_lossy(), "error": error.to_string()})
        }
    });
}

/// Whether a document in which `done` chunks of `total` are stored is spoken of again, so long after the last time.
fn is_due(since: Duration, done: usize, total: usize) -> bool {
    since >= LINES && done < total
}

/// `told`: when a document was last spoken of.
fn print_line(event: &IngestEvent<'_>, told: &mut Instant, out: &Out) {
    match event {
        IngestEvent::Chunk { path, done, total, .. } => {
            if is_due(told.elapsed(), *done, *total) {
                *told = Instant::now();
                out.note(&inside(path, *done, *total));
            }
        }
        IngestEvent::Document { path, state, chunks, computed, done, total } => {
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
                short(path),
                count(*chunks, "chunk")
            ));
        }
        IngestEvent::Removed { path } => out.line(format!("{}: removed", short(path))),
        IngestEvent::Failed { error, .. } => out.failed(&error.to_string()),
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
        _ if report.chunks_left > 0 => {
            format!("{}, whose state is computed at first use", count(report.chunks_left, "chunk"))
        }
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
        assert_eq!(inside(Path::new("/a/long.md"), 1200, 3400), "/a/long.md: 1200 of 3,400 chunks");
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
