//! Whatever happens in whatever order, catalog, search and references to chunks tell the same as a model of a few maps.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;

use crate::catalog::{NewDocument, NewPassage};
use crate::{ChunkSpan, Collection, Format, Library, Span};

const NAMES: [&str; 5] = ["/none/a", "/none/b", "c", "d", "e"];
const WORDS: [&str; 6] = ["anchor", "beacon", "compass", "dinghy", "estuary", "ferry"];

/// Text number `at`: two sentences of different words, so that texts share passages, and so chunks.
fn text(at: usize) -> String {
    let (first, second) = (at % 3, 3 + at / 3 % 3);
    format!("One {} lies here.\nThe {} is away.\n", WORDS[first], WORDS[second])
}

fn tokens(passage: &str) -> Vec<u32> {
    passage.bytes().map(u32::from).collect()
}

fn document(name: &str, text: &str) -> NewDocument {
    let mut start = 0;
    let passage = |line: &str| {
        let bytes = start..start + line.len();
        start += line.len() + 1;
        let place = ChunkSpan { chars: Span { start: bytes.start, end: bytes.end }, bytes };
        NewPassage { place, page: None, tokens: tokens(line) }
    };
    NewDocument {
        name: name.into(),
        text: text.into(),
        format: Format::Text,
        fingerprint: "lines".into(),
        tokenizer: Some([1; 32]),
        passages: text.lines().map(passage).collect(),
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    }
}

#[derive(Clone, Debug)]
enum Step {
    /// A name comes in with a text, new or changed.
    Put(usize, usize),
    /// Several come in at once.
    PutAll(Vec<(usize, usize)>),
    /// A file has moved.
    Rename(usize, usize),
    /// Two files have changed places.
    Swap(usize, usize),
    Remove(usize),
    Restore(usize),
    /// A chunk makes way in the chunk store.
    Evict(usize),
    Reclaim,
    /// The process ends after the catalog has a change and before the index has it.
    CrashBehindCatalog(usize, usize),
    /// The process is gone; another one finds what was on disk at that moment.
    Crash,
    Reopen,
    /// The index is lost.
    LoseIndex,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let put = || (0..NAMES.len(), 0..9usize);
    let name = || 0..NAMES.len();
    let step = prop_oneof![
        6 => put().prop_map(|(name, text)| Step::Put(name, text)),
        2 => prop::collection::vec(put(), 2..5).prop_map(Step::PutAll),
        3 => (name(), name()).prop_map(|(from, to)| Step::Rename(from, to)),
        2 => (name(), name()).prop_map(|(one, other)| Step::Swap(one, other)),
        4 => name().prop_map(Step::Remove),
        3 => name().prop_map(Step::Restore),
        2 => (0..6usize).prop_map(Step::Evict),
        1 => Just(Step::Reclaim),
        1 => put().prop_map(|(name, text)| Step::CrashBehindCatalog(name, text)),
        1 => Just(Step::Crash),
        1 => Just(Step::Reopen),
        1 => Just(Step::LoseIndex),
    ];
    prop::collection::vec(step, 1..24)
}

/// What should be there.
#[derive(Default)]
struct Model {
    /// Names that are there, with their texts.
    names: BTreeMap<String, String>,
    /// The texts that names were removed with, the last one last.
    removed: BTreeMap<String, Vec<String>>,
    /// A chunk store: chunks, and whether they make way first.
    chunks: BTreeMap<Vec<u32>, bool>,
}

impl Model {
    fn needed(&self) -> BTreeSet<Vec<u32>> {
        self.names.values().flat_map(|text| text.lines().map(tokens)).collect()
    }

    fn remember(&mut self, name: &str, text: String) {
        let texts = self.removed.entry(name.into()).or_default();
        texts.retain(|known| *known != text);
        texts.push(text);
    }

    /// What an ingest does for a document before it is committed.
    fn store_chunks(&mut self, text: &str) {
        for line in text.lines() {
            self.chunks.insert(tokens(line), false);
        }
    }
}

/// The library under test, in a folder of its own for each life.
struct Subject {
    scratch: tempfile::TempDir,
    lives: usize,
    library: Library,
}

impl Subject {
    fn new() -> Subject {
        let scratch = tempfile::tempdir().unwrap();
        let library = Library::new(&scratch.path().join("0"));
        Subject { scratch, lives: 0, library }
    }

    fn dir(&self) -> PathBuf {
        self.scratch.path().join(self.lives.to_string())
    }

    fn collection(&self) -> Arc<Collection> {
        self.library.collection_or_new("notes").unwrap()
    }

    fn change<T>(
        &self,
        make: impl FnOnce(&mut crate::Transaction<'_>, &crate::CollectionInfo) -> crate::Result<T>,
    ) -> crate::Result<T> {
        Ok(self.collection().writer().unwrap().change(make)?.0)
    }

    /// Goes on with what is on disk at this moment.
    fn crash(&mut self) {
        let before = self.dir();
        self.lives += 1;
        // What works in the background removes files now and then: a copy with a hole is none of one moment.
        let copied = (0..50).any(|_| {
            let _ = std::fs::remove_dir_all(self.dir());
            copy(&before, &self.dir()).is_ok()
        });
        assert!(copied, "files vanished from {} in each of 50 copies", before.display());
        self.library = Library::new(&self.dir());
        // Nothing may be there yet.
        let _ = std::fs::remove_dir_all(before);
    }

    fn reopen(&mut self) {
        // What was open has to be closed first.
        self.library = Library::new(Path::new("/none"));
        self.library = Library::new(&self.dir());
    }
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    // Nothing may be there yet.
    for entry in std::fs::read_dir(from).into_iter().flatten() {
        let entry = entry?;
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name()))?,
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name()))?),
        }
    }
    Ok(())
}

fn apply(step: &Step, subject: &mut Subject, model: &mut Model) {
    match step {
        Step::Put(name, at) => put_all(subject, model, &[(*name, *at)]),
        Step::PutAll(documents) => put_all(subject, model, documents),
        Step::Rename(from, to) => rename(subject, model, NAMES[*from], NAMES[*to]),
        Step::Swap(one, other) => swap(subject, model, NAMES[*one], NAMES[*other]),
        Step::Remove(name) => {
            let removed = subject.change(|t, info| t.remove_name(info, NAMES[*name])).unwrap();
            let expected = model.names.remove(NAMES[*name]);
            assert_eq!(removed.is_some(), expected.is_some());
            if let Some(text) = expected {
                model.remember(NAMES[*name], text);
            }
        }
        Step::Restore(name) => restore(subject, model, NAMES[*name]),
        Step::Evict(at) => {
            let evicted = model.chunks.keys().nth(*at).cloned();
            evicted.map(|chunk| model.chunks.remove(&chunk));
        }
        Step::Reclaim => {
            subject.collection();
            subject.library.reclaim(None).unwrap();
            model.removed.clear();
        }
        Step::CrashBehindCatalog(name, at) => {
            let (collection, text) = (subject.collection(), text(*at));
            model.store_chunks(&text);
            let new = document(NAMES[*name], &text);
            collection.catalog().change(|transaction| transaction.put(collection.info(), &new)).unwrap();
            model.names.insert(NAMES[*name].into(), text);
            drop(collection);
            subject.crash();
        }
        Step::Crash => subject.crash(),
        Step::Reopen => subject.reopen(),
        Step::LoseIndex => {
            subject.reopen();
            let _ = std::fs::remove_dir_all(subject.dir().join("index"));
        }
    }
}

fn put_all(subject: &Subject, model: &mut Model, documents: &[(usize, usize)]) {
    let new: Vec<_> = documents.iter().map(|(name, at)| document(NAMES[*name], &text(*at))).collect();
    for document in &new {
        model.store_chunks(&document.text);
        model.names.insert(document.name.clone(), document.text.clone());
    }
    subject.change(|t, info| new.iter().try_for_each(|document| t.put(info, document).map(|_| ()))).unwrap();
}

fn rename(subject: &Subject, model: &mut Model, from: &str, to: &str) {
    let Some(text) = model.names.get(from).cloned().filter(|_| from != to) else { return };
    let new = NewDocument { instead_of: vec![from.into()], ..document(to, &text) };
    let was = subject.collection().document_info(from).unwrap().unwrap().id;
    let outcome = subject.change(|t, info| t.put(info, &new)).unwrap();
    assert_eq!(outcome.id, was, "a moved file is the same document");
    // A name that had the text already says nothing of a move.
    if model.names.insert(to.into(), text.clone()) != Some(text) {
        model.names.remove(from);
    }
}

fn swap(subject: &Subject, model: &mut Model, one: &str, other: &str) {
    let (Some(first), Some(second)) = (model.names.get(one).cloned(), model.names.get(other).cloned()) else { return };
    let info = |name: &str| subject.collection().document_info(name).unwrap().unwrap();
    let before = [info(one), info(other)];
    let come_in = |name: &str, text: &str, other: &str| {
        let left_by = Vec::from_iter((first != second).then(|| other.to_string()));
        let new = NewDocument { left_by, ..document(name, text) };
        subject.change(|t, info| t.put(info, &new)).unwrap();
    };
    // Not together: the process may end in between.
    come_in(one, &second, other);
    come_in(other, &first, one);
    model.store_chunks(&first);
    model.store_chunks(&second);
    model.names.insert(one.into(), second);
    model.names.insert(other.into(), first);
    if before.iter().all(|info| info.names.len() == 1) {
        assert_eq!([info(one).id, info(other).id], [before[0].id, before[1].id], "ids stay with the names");
    }
}

fn restore(subject: &Subject, model: &mut Model, name: &str) {
    let restored = subject.change(|t, info| t.restore(info, name)).unwrap();
    let expected = model.removed.get_mut(name).and_then(Vec::pop);
    assert_eq!(restored.is_some(), expected.is_some());
    let Some(text) = expected else { return };
    model.store_chunks(&text);
    let before = model.names.insert(name.into(), text.clone()).filter(|before| *before != text);
    assert_eq!(restored.unwrap().replaced, before.is_some());
    // What had the name meanwhile can be brought back in turn.
    if let Some(before) = before {
        model.remember(name, before);
    }
}

fn check(subject: &Subject, model: &mut Model) {
    let collection = subject.collection();
    let catalog = collection.catalog();
    let listed = catalog.names(collection.info().id, None, usize::MAX).unwrap();
    let names: Vec<&String> = listed.iter().map(|(name, _)| name).collect();
    assert_eq!(names, model.names.keys().collect::<Vec<_>>());
    let mut ids = BTreeMap::new();
    for (name, id) in &listed {
        let stored = collection.document(Path::new(name)).unwrap().unwrap();
        assert_eq!((&stored.text, stored.info.id), (&model.names[name], *id));
        assert!(stored.info.names.contains(name) && stored.info.removed.is_none());
        assert_eq!(ids.entry(stored.text).or_insert(*id), id, "equal texts are one document");
    }
    let distinct: BTreeSet<_> = ids.values().collect();
    assert_eq!(distinct.len(), ids.len(), "different texts are different documents");
    let passages: usize = ids.keys().map(|text| text.lines().count()).sum();
    let bytes: usize = ids.keys().map(String::len).sum();
    let totals = catalog.totals(collection.info().id).unwrap();
    assert_eq!(
        (totals.documents, totals.bytes, totals.passages),
        (ids.len() as u64, bytes as u64, passages as u64),
        "what is counted on the way is what is there"
    );
    assert_eq!(collection.indexed_passages().unwrap(), passages as u64);
    for word in WORDS {
        let found = collection.search(word, 50, &|| true).unwrap();
        // Equal passages are found once.
        let expected: BTreeSet<&str> = ids.keys().flat_map(|t| t.lines()).filter(|line| line.contains(word)).collect();
        let passages: BTreeSet<&str> = found.iter().map(|found| found.passage.as_str()).collect();
        assert_eq!(passages, expected, "{word}");
        for found in &found {
            let text = &model.names[found.path.to_str().unwrap()];
            assert_eq!(found.passage, text[found.span.start..found.span.end]);
            assert_eq!(found.tokens.as_ref().unwrap().tokens, tokens(&found.passage));
        }
    }
    check_chunks(subject, model);
}

/// The chunk store hears of every chunk that nobody needs, and of no other.
fn check_chunks(subject: &Subject, model: &mut Model) {
    let catalog = subject.library.writable().unwrap();
    let needed = model.needed();
    let released = catalog.released(usize::MAX).unwrap();
    for chunk in &released {
        assert!(!needed.contains(&chunk.tokens), "a chunk that is needed is let go");
        match chunk.gone {
            true => drop(model.chunks.remove(&chunk.tokens)),
            false => drop(model.chunks.get_mut(&chunk.tokens).map(|first| *first = true)),
        }
    }
    catalog.forget_released(&released).unwrap();
    for (chunk, first) in &model.chunks {
        assert_eq!(
            *first,
            !needed.contains(chunk),
            "{}",
            String::from_utf8_lossy(&chunk.iter().map(|t| *t as u8).collect::<Vec<_>>())
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(40) })]

    #[test]
    fn catalog_search_and_chunks_agree_with_a_model_after_every_step(steps in steps()) {
        let (mut subject, mut model) = (Subject::new(), Model::default());
        for step in &steps {
            apply(step, &mut subject, &mut model);
            check(&subject, &mut model);
        }
    }
}
