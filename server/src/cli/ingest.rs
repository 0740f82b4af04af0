//! `quire ingest`.

use std::path::PathBuf;

use serde_json::json;

use super::output::{Out, count, seconds, short};
use crate::config::Settings;
use crate::error::Result;
use crate::service::{DocumentState, IngestEvent, IngestReport, Service};
use crate::store::Origin;

pub(super) fn run(settings: &Settings, paths: &[PathBuf], out: &Out) -> Result<()> {
    let spinner = out.spinner("loading the model");
    let service = Service::open(settings)?;
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    let report = ingest(&service, &settings.collection, paths, out)?;
    service.engine().shutdown();
    if out.json {
        out.value(&json!({"event": "report", "report": report}));
    } else {
        out.line(summary(&report));
    }
    report.check()
}

/// Ingests and prints what happens: a bar on a terminal, else a line per document, else a JSON line per chunk and
/// document. A line is an acknowledgement: what it names is on disk.
pub(super) fn ingest(service: &Service, collection: &str, paths: &[PathBuf], out: &Out) -> Result<IngestReport> {
    let bar = out.bar();
    let report = service.ingest(collection, paths, &mut |event| match (&bar, out.json) {
        (_, true) => print_json(event, out),
        (Some(bar), false) => match event {
            IngestEvent::Document { path, done, total, .. } => {
                bar.set_length(*total as u64);
                bar.set_position(*done as u64);
                bar.set_message(short(path));
            }
            IngestEvent::Failed { error, .. } => bar.suspend(|| out.note(&format!("error: {error}"))),
            IngestEvent::Chunk { .. } => {}
        },
        (None, false) => print_line(event, out),
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    report
}

fn print_json(event: &IngestEvent<'_>, out: &Out) {
    out.value(&match event {
        IngestEvent::Chunk { key, path, span, tokens, origin } => json!({
            "event": "chunk", "key": key.to_string(), "document": path.to_string_lossy(), "span": span, "tokens": tokens,
            "computed": *origin == Origin::Computed,
        }),
        IngestEvent::Document { path, state, chunks, computed, .. } => json!({
            "event": "document", "document": path.to_string_lossy(), "state": state, "chunks": chunks, "computed": computed,
        }),
        IngestEvent::Failed { path, error } => {
            json!({"event": "failed", "document": path.to_string_lossy(), "error": error.to_string()})
        }
    });
}

fn print_line(event: &IngestEvent<'_>, out: &Out) {
    match event {
        IngestEvent::Chunk { .. } => {}
        IngestEvent::Document { path, state, chunks, computed, done, total } => {
            let state = match state {
                DocumentState::New => "new",
                DocumentState::Changed => "changed",
                DocumentState::Unchanged => "unchanged",
            };
            out.line(format!(
                "[{done}/{total}] {}: {state}, {}, {computed} computed",
                short(path),
                count(*chunks, "chunk")
            ));
        }
        IngestEvent::Failed { error, .. } => out.note(&format!("error: {error}")),
    }
}

/// One line over a whole ingest.
pub(super) fn summary(report: &IngestReport) -> String {
    let documents = report.new + report.changed + report.unchanged;
    let chunks = report.chunks_cached + report.chunks_computed;
    let state = match (report.new, report.changed) {
        (0, 0) if documents == 0 => "none could be read".to_string(),
        (0, 0) => "all unchanged".to_string(),
        (new, 0) if new == documents => "all new".to_string(),
        (new, changed) => format!("{new} new, {changed} changed, {} unchanged", report.unchanged),
    };
    let cached = match report.chunks_computed {
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
    format!(
        "{} in `{}` ({state}); {cached}; {} in {}{evicted}",
        count(documents, "document"),
        report.collection,
        count(report.tokens, "token"),
        seconds(report.seconds)
    )
}
