//! Collections as programs before the catalog kept them: a folder each below `collections`, with a tantivy index whose stored
//! fields are the documents. They are read here, once, to be taken into the catalog.
//!
//! An index of the first version lies in the collection's folder itself, later ones in a folder named after their version.

use std::ops::Range;
use std::path::{Path, PathBuf};

use tantivy::schema::{Field, Value};
use tantivy::{Index, IndexReader, ReloadPolicy, TantivyDocument};

use super::index::{check_files, damaged, guarded};
use crate::catalog::{Catalog, CollectionInfo, LanguageSetting, NewDocument, NewPassage};
use crate::directory::IndexFolder;
use crate::error::{DocumentsError, Result};
use crate::split::{ChunkSpan, Format, Span};

/// The latest version there was.
const LAST: u32 = 2;
/// Documents that are taken in together.
const BATCH: usize = 500;

/// The folder of all such collections.
pub(crate) fn folder(data_dir: &Path) -> PathBuf {
    data_dir.join("collections")
}

/// The names of all such collections, sorted.
pub(crate) fn names(data_dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder(data_dir)) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter(|entry| index_of(&entry.path()).is_some())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// The version and the folder of the latest complete index in a collection's folder.
fn index_of(dir: &Path) -> Option<(u32, PathBuf)> {
    let version = |name: &str| match name {
        "meta.json" => Some(1),
        name => name.strip_prefix("index-")?.parse().ok(),
    };
    let entries = std::fs::read_dir(dir).ok()?.flatten();
    let versions = entries.filter_map(|entry| version(entry.file_name().to_str()?));
    let place = |version| if version == 1 { dir.into() } else { dir.join(format!("index-{version}")) };
    versions.map(|version| (version, place(version))).filter(|(_, path)| path.join("meta.json").is_file()).max()
}

/// Takes the documents of one such collection into the catalog; says how many they were.
///
/// # Errors
/// [`DocumentsError::NewerCollection`], [`DocumentsError::Index`] for a damaged one, and those of the catalog.
pub(crate) fn import(data_dir: &Path, name: &str, catalog: &Catalog) -> Result<usize> {
    let dir = folder(data_dir).join(name);
    let Some((version, path)) = index_of(&dir) else { return Ok(0) };
    if version > LAST {
        return Err(DocumentsError::NewerCollection { path: dir, found: version, known: LAST });
    }
    let collection = catalog.create_collection(name, LanguageSetting::Auto)?;
    let mut waiting = Vec::new();
    let mut taken = 0;
    let mut failed = None;
    let read = guarded(&dir, || {
        each(&path, &mut |document| {
            waiting.push(document);
            if waiting.len() == BATCH {
                taken += waiting.len();
                failed = take_in(catalog, &collection, &std::mem::take(&mut waiting)).err();
            }
            failed.is_none()
        })
    });
    if let Some(error) = failed {
        return Err(error);
    }
    read?;
    take_in(catalog, &collection, &waiting)?;
    Ok(taken + waiting.len())
}

fn take_in(catalog: &Catalog, collection: &CollectionInfo, documents: &[NewDocument]) -> Result<()> {
    catalog.change(|transaction| {
        for document in documents {
            transaction.put(collection, document)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Calls `take` with every document of an index, until it says no.
fn each(path: &Path, take: &mut dyn FnMut(NewDocument) -> bool) -> tantivy::Result<()> {
    let index = Index::open(IndexFolder::open(path)?)?;
    check_files(&index, path)?;
    let schema = index.schema();
    let [name, fingerprint, body, place] = ["path", "fingerprint", "body", "place"].map(|name| schema.get_field(name));
    let fields = [name?, fingerprint?, body?, place?];
    let seal = schema.get_field("seal").ok();
    let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    for segment in reader.searcher().segment_readers() {
        let store = segment.get_store_reader(1)?;
        for record in store.iter::<TantivyDocument>(segment.alive_bitset()) {
            let record = record?;
            // Passages have records of their own, which follow from those of documents.
            if text_of(&record, fields[2]).is_some() && !take(document(&record, fields, seal)?) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// A document from its record, compared with its seal where it has one.
fn document(record: &TantivyDocument, fields: [Field; 4], seal: Option<Field>) -> tantivy::Result<NewDocument> {
    let [name, fingerprint, text, places] = fields.map(|field| text_of(record, field).unwrap_or_default());
    let sealed = seal.and_then(|field| record.get_first(field).and_then(|value| value.as_bytes()));
    if sealed.is_some_and(|found| found != seal_of(&[name, fingerprint, places, text]).as_slice()) {
        return Err(damaged(&format!("what is stored of {name} is not what was written")));
    }
    let chunks: Option<Vec<_>> = places.lines().map(parse_place).collect();
    let chunks = chunks.filter(|chunks| chunks.iter().all(|chunk| text.get(chunk.bytes.clone()).is_some()));
    let chunks = chunks.ok_or_else(|| damaged(&format!("the passages of {name} are not as expected")))?;
    Ok(NewDocument {
        name: name.into(),
        text: text.into(),
        format: Format::of_name(Path::new(name)).unwrap_or(Format::Text),
        fingerprint: fingerprint.into(),
        tokenizer: None,
        passages: chunks.into_iter().map(|place| NewPassage { place, page: None, tokens: Vec::new() }).collect(),
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    })
}

fn text_of(record: &TantivyDocument, field: Field) -> Option<&str> {
    record.get_first(field).and_then(|value| value.as_str())
}

/// The hash that the second version wrote with a document: over its name, fingerprint, places and text.
fn seal_of(parts: &[&str; 4]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("quire document record 1");
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(str::as_bytes(part));
    }
    hasher.finalize().into()
}

/// A passage's place: `start end start end`, characters, then bytes.
fn parse_place(text: &str) -> Option<ChunkSpan> {
    let numbers: Vec<usize> = text.split(' ').map(|n| n.parse().ok()).collect::<Option<_>>()?;
    let [start, end, from, to]: [usize; 4] = numbers.try_into().ok()?;
    (start <= end && from <= to)
        .then_some(ChunkSpan { chars: Span { start, end }, bytes: Range { start: from, end: to } })
}
