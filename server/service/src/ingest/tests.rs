#![allow(clippy::unwrap_used)]

use engine::DeviceChoice;

use super::*;
use crate::{DocumentName, DocumentsCommand, Purpose};
use settings::{Bytes, Named, Settings};

fn settings(data_dir: &Path) -> Settings {
    Settings {
        model: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../eval/models/reference")),
        device: Named(DeviceChoice::Cpu),
        threads: 1,
        kv_budget_bytes: Bytes(64 << 20),
        chunk_tokens: 64,
        chunk_overlap: 16,
        data_dir: data_dir.into(),
        ..Settings::default()
    }
}

/// New, changed and unchanged documents, chunks that were cached and chunks that were computed, as the metrics have them too.
fn ingest(settings: &Settings, documents: &Path) -> [usize; 5] {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let report = ::metrics::with_local_recorder(&recorder, || {
        let service = Service::open(settings, Purpose::Ingest).unwrap();
        service.ingest("notes", &[documents.into()], &mut |_| {}).unwrap()
    });
    assert_eq!(report.failed, 0);
    let scrape = recorder.handle().render();
    let counted = |name: &str| -> usize {
        // What was never counted may not be there.
        let line = scrape.lines().find(|line| line.starts_with(name));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    };
    let chunks = (counted("quire:chunk_hits_total"), counted("quire:chunk_misses_total"));
    assert_eq!(chunks, (report.chunks_cached, report.chunks_computed), "{scrape}");
    [report.new, report.changed, report.unchanged, report.chunks_cached, report.chunks_computed]
}

#[test]
fn a_document_is_read_anew_when_its_text_or_its_splitting_changes_and_only_then() {
    let dir = tempfile::tempdir().unwrap();
    let documents = dir.path().join("documents");
    std::fs::create_dir(&documents).unwrap();
    let lines = |n: usize| {
        (0..n).map(|i| format!("Buoy {i} lies off the pier, and a lamp burns on it.\n\n")).collect::<String>()
    };
    std::fs::write(documents.join("a.md"), lines(16)).unwrap();
    std::fs::write(documents.join("b.txt"), "One lamp.").unwrap();
    let data = dir.path().join("data");
    let base = settings(&data);
    let first = ingest(&base, &documents);
    assert!(first[..3] == [2, 0, 0] && first[4] > 3, "{first:?}");
    let chunks = first[3] + first[4];
    assert_eq!(ingest(&base, &documents), [0, 0, 2, chunks, 0]);
    // Each decides where a chunk ends.
    let smaller = Settings { chunk_tokens: 48, ..base.clone() };
    assert_eq!(ingest(&smaller, &documents)[..3], [0, 2, 0]);
    let apart = Settings { chunk_overlap: 0, ..smaller };
    assert_eq!(ingest(&apart, &documents)[..3], [0, 2, 0]);
    assert_eq!(ingest(&base, &documents), [0, 2, 0, chunks, 0], "as at first: its chunks are still there");
    std::fs::write(documents.join("b.txt"), "Two lamps.").unwrap();
    assert_eq!(ingest(&base, &documents), [0, 1, 1, chunks - 1, 1]);
}

#[test]
fn an_ingest_that_nobody_waits_for_ends_behind_a_chunk_and_keeps_what_it_reported() {
    let dir = tempfile::tempdir().unwrap();
    let documents = dir.path().join("documents");
    std::fs::create_dir(&documents).unwrap();
    for name in ["a.txt", "b.txt", "c.txt"] {
        std::fs::write(documents.join(name), format!("The lamp of {name} burns.")).unwrap();
    }
    let service = Service::open(&settings(&dir.path().join("data")), Purpose::Ingest).unwrap();
    let reported = std::cell::Cell::new(0);
    let (options, paths) = (IngestOptions::default(), [documents]);
    let asked = std::cell::Cell::new(0);
    // Asked before each document and each chunk: the third is not begun.
    let wanted = || asked.replace(asked.get() + 1) < 5 && reported.get() < 1;
    let outcome = service.ingest_while("notes", &paths, &options, &wanted, &mut |event| {
        assert!(matches!(event, IngestEvent::Chunk { .. }), "{event:?}");
        reported.set(reported.get() + 1);
    });
    // The last chunks may be on their way to the disk when the first of them is reported.
    assert!(matches!(outcome, Err(QuireError::Engine(EngineError::Cancelled))), "{outcome:?}");
    assert_eq!(service.search("notes", "lamp", 9).unwrap().len(), 0);
    let rest = service.ingest("notes", &paths, &mut |_| {}).unwrap();
    assert_eq!((rest.new, rest.chunks_cached + rest.chunks_computed), (3, 3));
    assert!(rest.chunks_cached >= reported.get().max(1), "{rest:?}");
}

#[test]
fn a_folder_that_is_gone_as_a_whole_is_named_with_what_stays_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (notes, other) =
        (dir.path().canonicalize().unwrap().join("notes"), dir.path().canonicalize().unwrap().join("other"));
    for (folder, name) in [(&notes, "a.txt"), (&notes, "b.txt"), (&other, "c.txt"), (&other, "d.txt")] {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join(name), format!("The lamp of {name} burns.")).unwrap();
    }
    let service = Service::open(&settings(&dir.path().join("data")), Purpose::Ingest).unwrap();
    let paths = [notes.clone(), other.clone()];
    let options = IngestOptions { lazy: true, sync: true, ..IngestOptions::default() };
    let sync = || {
        let mut told = Vec::new();
        let report = service.ingest_while("notes", &paths, &options, &|| true, &mut |event| match event {
            IngestEvent::Kept { path, documents } => told.push(format!("{} {documents}", path.display())),
            IngestEvent::Removed { path } => told.push(format!("-{}", path.display())),
            _ => {}
        });
        (report.unwrap().removed, told)
    };
    assert_eq!(sync(), (0, vec![]));
    std::fs::remove_dir_all(&notes).unwrap();
    std::fs::remove_file(other.join("d.txt")).unwrap();
    let kept = format!("{} 2", notes.display());
    assert_eq!(sync(), (1, vec![kept, format!("-{}", other.join("d.txt").display())]));
    let remove = DocumentsCommand::Remove {
        collection: "notes".into(),
        names: vec![DocumentName::here(notes.to_str().unwrap())],
        now: false,
    };
    service.manage_documents(&remove, &mut |_| {}).unwrap();
    assert_eq!(sync(), (0, vec![]));
    assert_eq!(service.search("notes", "lamp", 9).unwrap().len(), 1);
}
