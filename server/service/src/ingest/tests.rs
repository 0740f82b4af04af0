#![allow(clippy::unwrap_used)]

use engine::DeviceChoice;

use super::*;
use crate::{DocumentName, DocumentsCommand, Purpose};
use settings::{Bytes, Named, Settings};

#[path = "beside_tests.rs"]
mod beside;

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

/// A folder with a text of several chunks.
fn buoys(dir: &Path) -> PathBuf {
    let path = dir.join("buoys.txt");
    let text: String = (0..30).map(|i| format!("Buoy {i} lies off the pier, and a lamp burns on it.\n\n")).collect();
    std::fs::write(&path, text).unwrap();
    path
}

/// A cache is worth having, and no more: documents come in without.
#[test]
fn documents_come_in_and_are_found_whatever_is_wrong_with_the_chunk_store() {
    let dir = tempfile::tempdir().unwrap();
    let document = buoys(dir.path());
    let data = |name: &str| dir.path().join(name);
    let taken = |settings: &Settings| {
        let service = Service::open(settings, Purpose::Ingest).unwrap();
        let report = service.ingest("notes", std::slice::from_ref(&document), &mut |_| {}).unwrap();
        assert_eq!((report.new, report.failed, report.chunks_computed), (1, 0, 0), "{report:?}");
        assert!(report.chunks_left > 3 && !service.search("notes", "buoy 17", 3).unwrap().is_empty(), "{report:?}");
        service
    };
    // A budget below one chunk.
    taken(&Settings { cache_bytes: Some(Bytes(4096)), ..settings(&data("small")) });
    // A store that cannot be opened, as its list of files is damaged.
    let whole = settings(&data("damaged"));
    Service::open(&whole, Purpose::Ingest).unwrap().store().ensure(&[1], &[5, 6, 7]).unwrap();
    let files = std::fs::read_dir(crate::store::store_dir(&whole.data_dir)).unwrap().map(|entry| entry.unwrap().path());
    let lists = files.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("MANIFEST"));
    lists.for_each(|path| std::fs::write(path, "no list of files").unwrap());
    let service = taken(&whole);
    assert!(service.store().chunks().is_none());
    // Emptied under whoever uses it, it is kept again.
    service.store().clear().unwrap();
    assert!(service.store().can_keep());
    let again = service.ingest("notes", std::slice::from_ref(&document), &mut |_| {}).unwrap();
    assert!(again.unchanged == 1 && again.chunks_computed > 3, "{again:?}");
    assert!(service.store().clear().unwrap() > 3);
    assert_eq!(service.store().stats().unwrap().chunks, 0);
}

#[test]
fn chunks_of_a_removed_collection_make_way_first_at_once_unless_another_needs_them() {
    let dir = tempfile::tempdir().unwrap();
    let (document, other) = (buoys(dir.path()), dir.path().join("other.txt"));
    std::fs::write(&other, "A pilot cutter waits at the harbour mouth.").unwrap();
    let service = Service::open(&settings(&dir.path().join("data")), Purpose::Ingest).unwrap();
    service.ingest("notes", &[document.clone(), other.clone()], &mut |_| {}).unwrap();
    service.ingest("both", &[other], &mut |_| {}).unwrap();
    let demoted = || {
        let chunks = service.store().chunks().unwrap().list();
        (chunks.iter().filter(|(_, meta)| meta.demoted).count(), chunks.len())
    };
    let all = demoted().1;
    assert!(demoted().0 == 0 && all > 4);
    let whole =
        |collection: &str| DocumentsCommand::Remove { collection: collection.into(), names: vec![], now: false };
    service.manage_documents(&whole("notes"), &mut |_| {}).unwrap();
    assert_eq!(demoted(), (all - 1, all));
    // What can come back is not removed for good with another's.
    let now = DocumentsCommand::Remove { collection: "both".into(), names: vec![], now: true };
    service.manage_documents(&now, &mut |_| {}).unwrap();
    assert_eq!(demoted().1, all);
    let back = DocumentsCommand::Restore { collection: "notes".into(), names: vec![] };
    service.manage_documents(&back, &mut |_| {}).unwrap();
    service.ingest("notes", &[document], &mut |_| {}).unwrap();
    assert_eq!(demoted(), (1, all), "used again");
}

/// Through a server, which has a tokenizer.
#[test]
fn documents_whose_passages_were_lost_are_cut_and_tokenised_as_ingest_does() {
    let dir = tempfile::tempdir().unwrap();
    let document = buoys(dir.path());
    let settings = settings(&dir.path().join("data"));
    let passages = |service: &Service| {
        let collection = service.library().collection("notes").unwrap();
        let stored = collection.document(&document.canonicalize().unwrap()).unwrap().unwrap();
        (stored.info.fingerprint.clone(), stored.info.tokens, stored.passages)
    };
    let before = {
        let service = Service::open(&settings, Purpose::Ingest).unwrap();
        service.ingest("notes", std::slice::from_ref(&document), &mut |_| {}).unwrap();
        // Everything is in tables.
        service.library().erase().unwrap();
        passages(&service)
    };
    let words: Vec<u8> = before.2[0].hash.to_vec();
    let tables =
        std::fs::read_dir(documents::catalog_dir(&settings.data_dir)).unwrap().map(|entry| entry.unwrap().path());
    let of_passages = tables.filter(|path| {
        path.extension().is_some_and(|end| end == "sst")
            && std::fs::read(path).unwrap().windows(words.len()).any(|bytes| bytes == words)
    });
    let removed = of_passages.map(|path| std::fs::remove_file(path).unwrap()).count();
    assert!(removed > 0);
    let service = Service::open(&settings, Purpose::Serve).unwrap();
    let found = service.library().repair(false).unwrap().unwrap();
    assert!(found.catalog.lost() == 0 && found.catalog.damaged[0].problem.contains("cut anew"), "{found:?}");
    assert!(!service.search("notes", "buoy 17", 3).unwrap().is_empty());
    assert_eq!(service.cut_again().unwrap(), 1);
    assert_eq!(passages(&service), before);
    assert!(!service.search("notes", "buoy 17", 3).unwrap().is_empty());
    assert_eq!(service.cut_again().unwrap(), 0);
    assert!(service.library().verify().unwrap().unwrap().is_clean());
}

/// A name that nothing compresses; the row of a file holds it.
#[test]
fn no_byte_of_the_name_of_a_deleted_file_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(&dir.path().join("data"));
    let service = Service::open(&settings, Purpose::Serve).unwrap();
    let name = "wr6cj2ue0ot9kq7zv9x1mw4tj8rb2nd6.txt";
    let upload = |seconds| {
        let mut upload = service.begin_upload(1000).unwrap();
        upload.write(b"A pilot cutter.").unwrap();
        service.finish_upload(upload, name, "assistants", seconds).unwrap()
    };
    fn holds(dir: &Path, name: &[u8]) -> bool {
        std::fs::read_dir(dir).unwrap().flatten().any(|entry| match entry.path() {
            path if path.is_dir() => holds(&path, name),
            path => std::fs::read(path).unwrap().windows(name.len()).any(|bytes| bytes == name),
        })
    }
    let is_anywhere = || holds(&settings.data_dir, name.as_bytes());
    let file = upload(None);
    assert!(is_anywhere());
    service.delete_file(&file.id).unwrap();
    service.remove_expired();
    assert!(!is_anywhere());
    // One whose time has come.
    upload(Some(0));
    assert!(is_anywhere());
    service.remove_expired();
    assert!(!is_anywhere());
}
