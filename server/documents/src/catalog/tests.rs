#![allow(clippy::unwrap_used)]
use super::*;
use crate::split::{ChunkSpan, Span};

/// A document whose words are its passages, each with one token.
fn document(name: &str, text: &str) -> NewDocument {
    let mut passages = Vec::new();
    for word in text.split_whitespace() {
        let start = word.as_ptr() as usize - text.as_ptr() as usize;
        let place = ChunkSpan { chars: Span { start, end: start + word.len() }, bytes: start..start + word.len() };
        let token = word.bytes().fold(7u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
        passages.push(NewPassage { place, page: None, tokens: vec![token] });
    }
    NewDocument {
        name: name.into(),
        text: text.into(),
        format: Format::Text,
        fingerprint: "words".into(),
        tokenizer: Some([3; 32]),
        passages,
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    }
}

struct Notes {
    catalog: Catalog,
    info: CollectionInfo,
}

impl Notes {
    fn new() -> Notes {
        let catalog = Catalog::in_memory().unwrap();
        let info = catalog.create_collection("notes", LanguageSetting::Auto).unwrap();
        Notes { catalog, info }
    }

    fn put(&self, document: &NewDocument) -> (PutOutcome, usize) {
        let changed = self.catalog.change(|transaction| transaction.put(&self.info, document)).unwrap();
        (changed.value, changed.orphans.len())
    }

    /// What became of a document with this text, and how many chunks nobody needs any more.
    fn kind(&self, name: &str, text: &str) -> (PutKind, usize) {
        let (outcome, orphans) = self.put(&document(name, text));
        (outcome.kind, orphans)
    }

    fn text(&self, name: &str) -> Option<String> {
        let id = self.catalog.named(self.info.id, name).unwrap()?;
        let info = self.catalog.document(&id).unwrap().unwrap();
        let passages = self.catalog.passages(&info).unwrap();
        let words: Vec<_> = passages.iter().map(|passage| self.catalog.passage_text(&info, passage).unwrap()).collect();
        let text = self.catalog.text(&info).unwrap();
        assert_eq!(words, text.split_whitespace().collect::<Vec<_>>());
        Some(text)
    }

    fn rows(&self, family: Family) -> usize {
        self.catalog.store.scan(family, b"", b"").count()
    }
}

#[test]
fn the_same_text_under_two_names_is_one_document_and_removing_one_name_keeps_it() {
    let notes = Notes::new();
    assert_eq!(notes.kind("a", "one two"), (PutKind::New, 0));
    assert_eq!(notes.kind("b", "one two"), (PutKind::AnotherName, 0));
    assert_eq!((notes.rows(Family::Documents), notes.rows(Family::Texts), notes.rows(Family::Passages)), (1, 1, 2));
    let remove = |name| notes.catalog.change(|t| t.remove_name(&notes.info, name)).unwrap();
    assert!(remove("a").value.is_some() && remove("a").value.is_none());
    assert_eq!((notes.text("a"), notes.text("b").as_deref()), (None, Some("one two")));
    // The last name takes the document with it, and then nobody needs its chunks.
    let removed = remove("b");
    assert!(removed.value.is_some() && removed.orphans.len() == 2, "{removed:?}");
    assert_eq!(notes.text("b"), None);
}

#[test]
fn a_name_with_another_text_keeps_its_id_and_lets_go_of_chunks_that_nobody_else_has() {
    let notes = Notes::new();
    let (first, _) = notes.put(&document("a", "one two three"));
    notes.put(&document("b", "three four"));
    let (second, orphans) = notes.put(&document("a", "two five"));
    assert_eq!((second, orphans), (PutOutcome { id: first.id, kind: PutKind::Changed }, 1), "`one` alone is gone");
    assert_eq!(notes.text("a").as_deref(), Some("two five"));
    assert_eq!((notes.kind("a", "two five"), notes.rows(Family::Texts)), ((PutKind::Unchanged, 0), 2));
    // Another text that is there already: the old document goes.
    assert_eq!(notes.kind("a", "three four"), (PutKind::Changed, 2));
    assert_eq!(
        (notes.rows(Family::Documents), notes.text("a"), notes.text("b")),
        (1, notes.text("b"), notes.text("a"))
    );
    // A shared text that one of its names leaves stays with the other.
    assert_eq!(notes.kind("a", "six"), (PutKind::Changed, 0));
    assert_eq!(notes.text("b").as_deref(), Some("three four"));
}

#[test]
fn a_renamed_file_is_the_same_document() {
    let notes = Notes::new();
    let (first, _) = notes.put(&document("old", "one two"));
    let content: TextHash = blake3::hash(b"one two").into();
    let gone = ["old".to_string()];
    let name = |name| notes.catalog.change(|t| t.name(&notes.info, name, Format::Text, &content, &gone)).unwrap();
    assert_eq!(name("new").value, Some(PutOutcome { id: first.id, kind: PutKind::Renamed }));
    assert_eq!((notes.text("old"), notes.text("new").as_deref()), (None, Some("one two")));
    let absent = notes.catalog.change(|t| t.name(&notes.info, "x", Format::Markdown, &content, &[])).unwrap();
    assert_eq!(absent.value, None, "the same bytes in another format are another document");
}

#[test]
fn what_was_removed_comes_back_until_space_is_reclaimed() {
    let notes = Notes::new();
    notes.kind("a", "one two");
    let before = notes.catalog.document(&notes.catalog.named(1, "a").unwrap().unwrap()).unwrap().unwrap();
    let remove = || assert!(notes.catalog.change(|t| t.remove_name(&notes.info, "a")).unwrap().value.is_some());
    let restore = || {
        let restored = notes.catalog.change(|t| t.restore(&notes.info, "a")).map(|changed| changed.value);
        restored.map(|restored| restored.map(|restored| restored.id))
    };
    remove();
    assert_eq!(restore().unwrap(), Some(before.id));
    assert_eq!(notes.catalog.document(&before.id).unwrap(), Some(before.clone()));
    assert_eq!((notes.text("a").as_deref(), notes.rows(Family::ChunkRefs)), (Some("one two"), 2));
    assert_eq!(restore().unwrap(), None, "it is there, and nothing else was removed");
    remove();
    // The same text came in again.
    notes.kind("b", "one two");
    let back = restore().unwrap();
    assert_eq!(back, notes.catalog.named(notes.info.id, "b").unwrap());
    assert_eq!(notes.rows(Family::Documents), 1);
    notes.catalog.change(|t| t.remove(&back.unwrap())).unwrap();
    assert_eq!(notes.catalog.reclaim(None).unwrap().value.documents, 1);
    assert_eq!(restore().unwrap(), None);
    for family in Family::ALL {
        let left = matches!(family, Family::Meta | Family::Collections | Family::Log | Family::Released);
        assert!(left || notes.rows(family) == 0, "{family:?}");
    }
}

#[test]
fn a_name_comes_back_with_the_text_that_it_had_whatever_came_in_meanwhile() {
    let notes = Notes::new();
    let remove = |name| assert!(notes.catalog.change(|t| t.remove_name(&notes.info, name)).unwrap().value.is_some());
    let restore = |name| notes.catalog.change(|t| t.restore(&notes.info, name)).unwrap().value;
    notes.kind("a", "one two");
    notes.kind("b", "one two");
    remove("a");
    remove("b");
    // The one that was taken from a document which was removed later comes back alone.
    assert!(restore("a").is_some());
    assert_eq!((notes.text("a").as_deref(), notes.text("b")), (Some("one two"), None));
    assert!(restore("b").is_some());
    assert_eq!((notes.text("a"), notes.rows(Family::Documents)), (notes.text("b"), 1));
    // Its document goes on with another text under another name, and loses that too.
    let id = |name| notes.catalog.named(notes.info.id, name).unwrap().unwrap();
    remove("a");
    let before = id("b");
    notes.kind("b", "three");
    assert_eq!(id("b"), before);
    assert!(restore("a").is_some());
    assert_eq!((notes.text("a").as_deref(), notes.text("b").as_deref()), (Some("one two"), Some("three")));
    notes.kind("b", "one two");
    remove("a");
    notes.kind("x", "six");
    notes.kind("b", "six");
    assert!(restore("a").is_some());
    assert_eq!((notes.text("a").as_deref(), notes.text("b").as_deref()), (Some("one two"), Some("six")));
    // A name that was removed, edited and taken in again: both texts come back in turn, and none is lost.
    notes.kind("c", "four");
    remove("c");
    notes.kind("c", "five");
    let replaced = |name| restore(name).map(|restored| restored.replaced);
    assert_eq!((replaced("c"), notes.text("c").as_deref()), (Some(true), Some("four")));
    assert_eq!((replaced("c"), notes.text("c").as_deref()), (Some(true), Some("five")));
    remove("c");
    assert_eq!((replaced("c"), notes.text("c").as_deref()), (Some(false), Some("five")));
    assert_eq!((replaced("c"), notes.text("c").as_deref()), (Some(true), Some("four")));
    notes.catalog.reclaim(None).unwrap();
    assert_eq!((restore("c"), notes.text("c").as_deref()), (None, Some("four")));
    assert_eq!((notes.rows(Family::Documents), notes.rows(Family::TextRefs)), (3, 3));
}

#[test]
fn documents_whose_texts_change_places_keep_their_ids() {
    let texts = ["one two", "two three", "three four"];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let notes = Notes::new();
        let ids: Vec<_> =
            ["a", "b", "c"].iter().zip(texts).map(|(name, text)| notes.put(&document(name, text)).0.id).collect();
        // Each gets the text of the next one, in any order; nobody has the first text any more in the end.
        let after = [texts[1], texts[2], "five"];
        for at in order {
            let left_by = ["a", "b", "c"].map(String::from).to_vec();
            let new = NewDocument { left_by, ..document(["a", "b", "c"][at], after[at]) };
            notes.put(&new);
        }
        for (at, name) in ["a", "b", "c"].iter().enumerate() {
            assert_eq!(notes.catalog.named(notes.info.id, name).unwrap(), Some(ids[at]), "{name} of {order:?}");
            assert_eq!(notes.text(name).as_deref(), Some(after[at]));
            let info = notes.catalog.document(&ids[at]).unwrap().unwrap();
            let owner = notes.catalog.with_content(notes.info.id, Format::Text, &info.content).unwrap();
            assert_eq!(owner, Some(ids[at]), "{name} of {order:?}");
        }
        assert_eq!((notes.rows(Family::Contents), notes.rows(Family::TextRefs)), (3, 3));
    }
    // A copy whose source was edited since is a document of its own, and the source keeps its id.
    let notes = Notes::new();
    let (source, _) = notes.put(&document("source", "one"));
    notes.put(&NewDocument { left_by: vec!["source".into()], ..document("copy", "one") });
    assert_eq!(notes.put(&document("source", "two")).0, PutOutcome { id: source.id, kind: PutKind::Changed });
    assert_eq!(notes.text("copy").as_deref(), Some("one"));
}

#[test]
fn a_removed_collection_comes_back_with_its_documents_until_space_is_reclaimed() {
    let notes = Notes::new();
    notes.kind("a", "one two");
    let names = || notes.catalog.collections().unwrap().into_iter().map(|info| info.name).collect::<Vec<_>>();
    assert!(notes.catalog.remove_collection("notes").unwrap().is_some());
    assert!(names().is_empty() && notes.catalog.remove_collection("notes").unwrap().is_none());
    assert_eq!(notes.catalog.restore_collection("notes").unwrap(), Some(notes.info.clone()));
    assert_eq!((names(), notes.text("a").as_deref()), (vec!["notes".to_string()], Some("one two")));
    notes.catalog.remove_collection("notes").unwrap();
    let again = notes.catalog.create_collection("notes", LanguageSetting::Auto).unwrap();
    assert!(again.id != notes.info.id && notes.catalog.named(again.id, "a").unwrap().is_none());
    assert!(matches!(notes.catalog.restore_collection("notes"), Err(DocumentsError::NameTaken { .. })));
    let reclaimed = notes.catalog.reclaim(None).unwrap();
    assert_eq!(reclaimed.value, Reclaimed { collections: vec![notes.info.id], documents: 1 });
    assert_eq!((reclaimed.orphans.len(), notes.rows(Family::Texts), notes.rows(Family::Names)), (2, 0, 0));
}

#[test]
fn a_long_text_lies_in_pieces_and_passages_reach_over_their_edges() {
    let notes = Notes::new();
    let text: String = (0..30_000).map(|i| format!("wörd{i} ")).collect();
    notes.kind("long", &text);
    assert!(notes.rows(Family::Texts) > 3, "{}", notes.rows(Family::Texts));
    assert_eq!(notes.text("long"), Some(text));
}

#[test]
fn a_document_whose_rows_are_damaged_is_named_and_comes_in_again() {
    let families = [Family::Documents, Family::Passages, Family::Texts];
    for family in families {
        let notes = Notes::new();
        notes.kind("a", "one two");
        notes.kind("b", "three");
        let content = |name: &str| {
            let id = notes.catalog.named(notes.info.id, name).unwrap().unwrap();
            let info = notes.catalog.document(&id)?.unwrap();
            notes.catalog.passages(&info)?;
            notes.catalog.text(&info)
        };
        let id = notes.catalog.named(notes.info.id, "a").unwrap().unwrap();
        let info = notes.catalog.document(&id).unwrap().unwrap();
        let prefix = if family == Family::Texts { info.content.to_vec() } else { id.bytes().to_vec() };
        let (key, mut row) = notes.catalog.store.scan(family, &prefix, &prefix).next().unwrap().unwrap();
        *row.last_mut().unwrap() ^= 1;
        notes.catalog.store.write([((family, key), Some(row))], true).unwrap();
        let error = content("a").unwrap_err();
        assert!(matches!(error, DocumentsError::DamagedDocument { .. }), "{family:?}: {error}");
        assert_eq!(content("b").unwrap(), "three");
        notes.kind("a", "one two");
        assert_eq!(content("a").unwrap(), "one two", "{family:?}");
    }
}

#[test]
fn a_change_that_fails_leaves_nothing() {
    let notes = Notes::new();
    let sequence = notes.catalog.sequence();
    let failed = notes.catalog.change(|transaction| {
        transaction.put(&notes.info, &document("a", "one"))?;
        Err::<(), _>(DocumentsError::Cancelled)
    });
    assert!(failed.is_err());
    assert_eq!((notes.text("a"), notes.catalog.sequence()), (None, sequence));
}

#[test]
fn the_log_tells_what_changed_once_each_and_is_trimmed() {
    let notes = Notes::new();
    let (outcome, _) = notes.put(&document("a", "one"));
    let changes = |after| notes.catalog.changes(notes.info.id, after).unwrap().unwrap();
    assert_eq!(changes(0), [(1, LogEntry::Put(outcome.id))]);
    let both = notes.catalog.change(|transaction| {
        transaction.put(&notes.info, &document("a", "two"))?;
        transaction.remove_name(&notes.info, "a")
    });
    assert!(both.unwrap().value.is_some());
    assert_eq!(changes(1), [(2, LogEntry::Removed(outcome.id))]);
    notes.catalog.trim_log(notes.info.id, 1).unwrap();
    assert_eq!((changes(0).len(), notes.catalog.sequence()), (1, 2));
}

#[test]
fn files_and_jobs_are_kept_in_the_order_of_their_ids() {
    let notes = Notes::new();
    let job = |id: &str, state: &str| JobRecord {
        id: id.into(),
        kind: "ingest".into(),
        state: state.into(),
        created: 7,
        expires: Some(9),
        done: 1,
        total: 2,
        last_error: Some(JobError { code: "x".into(), message: "y".into() }),
        detail: serde_json::json!({"files": [1, 2]}),
    };
    for (id, state) in [("b", "queued"), ("a", "queued"), ("b", "done")] {
        notes.catalog.put_record(RecordKind::Job, &job(id, state)).unwrap();
    }
    assert_eq!(notes.catalog.records(RecordKind::Job).unwrap(), [job("a", "queued"), job("b", "done")]);
    assert_eq!(notes.catalog.record(RecordKind::File, "a").unwrap(), None);
    assert!(notes.catalog.remove_record(RecordKind::Job, "a").unwrap());
    assert!(!notes.catalog.remove_record(RecordKind::Job, "a").unwrap());
}

#[test]
fn chunks_that_nobody_needs_wait_until_the_chunk_store_was_told_and_those_needed_again_do_not() {
    let notes = Notes::new();
    notes.kind("a", "one two");
    notes.kind("b", "two");
    assert!(notes.catalog.released(9).unwrap().is_empty());
    notes.catalog.change(|t| t.remove_name(&notes.info, "a")).unwrap();
    let released = notes.catalog.released(9).unwrap();
    assert_eq!(released.iter().map(|chunk| chunk.gone).collect::<Vec<_>>(), [false], "`two` is needed by b");
    assert_eq!(notes.catalog.released(9).unwrap(), released, "they are told of until they are forgotten");
    notes.catalog.reclaim(None).unwrap();
    let gone = notes.catalog.released(9).unwrap();
    assert!(gone.len() == 1 && gone[0].gone && gone[0].tokens == released[0].tokens);
    notes.kind("c", "one");
    assert!(notes.catalog.released(9).unwrap().is_empty(), "it is needed again");
    notes.catalog.change(|t| t.remove_name(&notes.info, "c")).unwrap();
    notes.catalog.forget_released(&notes.catalog.released(9).unwrap()).unwrap();
    assert!(notes.catalog.released(9).unwrap().is_empty());
}

#[test]
fn a_catalog_whose_making_was_cut_off_is_none_until_somebody_makes_it_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("catalog");
    let mut options = rocksdb::Options::default();
    options.create_if_missing(true);
    // Families are made one after the other.
    for families in [&[][..], &["meta"], &["meta", "collections"]] {
        options.create_missing_column_families(true);
        drop(rocksdb::DB::open_cf(&options, &path, families).unwrap());
        assert!(!Catalog::exists(&path), "{families:?}");
    }
    drop(Catalog::open(&path, Access::Write).unwrap());
    assert!(Catalog::exists(&path));
    Catalog::open(&path, Access::Read).unwrap();
}
