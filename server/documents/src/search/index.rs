//! The tantivy index of a collection: terms of passages, and which passage of which document they are of. It holds no
//! texts: everything in it is derived from the catalog, and it can be thrown away.
//!
//! Each commit says what it was derived from: up to which change of the catalog, by which analyzer, for which language
//! setting. An index that is behind is caught up from the catalog's log; one that is damaged, or was derived otherwise, is
//! built again in a folder beside it, which takes its place once it is whole.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tantivy::error::DataCorruption;
use tantivy::schema::{
    BytesOptions, FAST, Field, INDEXED, IndexRecordOption, NumericOptions, STRING, Schema, TextFieldIndexing,
    TextOptions,
};
use tantivy::tokenizer::{PreTokenizedString, RawTokenizer, TextAnalyzer};
use tantivy::{Index, IndexReader, IndexWriter, ReloadPolicy, TantivyDocument, TantivyError, Term};

use super::analyzer::{Analyzer, VERSION};
use super::cut::Cuts;
use super::language;
use crate::catalog::{Catalog, DocumentId, IndexedPassages, LanguageSetting, LogEntry};
use crate::collections::remove_folder;
use crate::directory::IndexFolder;
use crate::error::{DocumentsError, Result};
use crate::seldom::Seldom;

/// Memory of the index writer; tantivy refuses less than 15 MB.
const WRITER_BYTES: usize = 32 << 20;
/// Terms come from our analyzer; tantivy only wants to know a name.
const TOKENIZER: &str = "quire";
/// Version of the list of fields.
const FIELDS_VERSION: u32 = 1;
/// Documents that are analysed at a time, by all cores.
const AT_A_TIME: usize = 256;

/// Names of fields that are read by name.
pub(super) const DOCUMENT: &str = "document";
pub(super) const NUMBER: &str = "number";
pub(super) const DIGEST: &str = "digest";

/// The fields of a passage.
#[derive(Clone, Copy)]
pub(super) struct Fields {
    /// Id of the document.
    document: Field,
    /// Which of its passages this is.
    number: Field,
    /// Name of the document's language; absent where its endings are not known.
    pub(super) language: Field,
    /// Terms.
    pub(super) text: Field,
    /// Equal for passages of equal text.
    digest: Field,
}

impl Fields {
    fn schema() -> Schema {
        let mut schema = Schema::builder();
        schema.add_bytes_field(DOCUMENT, BytesOptions::default() | INDEXED | FAST);
        schema.add_u64_field(NUMBER, NumericOptions::from(FAST));
        schema.add_text_field("language", STRING);
        let terms = TextFieldIndexing::default()
            .set_tokenizer(TOKENIZER)
            .set_index_option(IndexRecordOption::WithFreqsAndPositions);
        schema.add_text_field("text", TextOptions::default().set_indexing_options(terms));
        schema.add_u64_field(DIGEST, NumericOptions::from(FAST));
        schema.build()
    }

    fn of(schema: &Schema) -> tantivy::Result<Fields> {
        Ok(Fields {
            document: schema.get_field(DOCUMENT)?,
            number: schema.get_field(NUMBER)?,
            language: schema.get_field("language")?,
            text: schema.get_field("text")?,
            digest: schema.get_field(DIGEST)?,
        })
    }
}

/// What an index was derived from, kept with each commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Derivation {
    /// Version of the list of fields.
    fields: u32,
    /// Version of the analyzer.
    analyzer: u32,
    /// The collection's language setting.
    language: LanguageSetting,
    /// Which writing of the catalog it is of; 0 for one that was never repaired.
    #[serde(default)]
    generation: u64,
    /// The last change of the catalog that is in it.
    pub(super) sequence: u64,
}

impl Derivation {
    /// Of an index as it should be now.
    pub(super) fn of(catalog: &Catalog, language: &LanguageSetting) -> Derivation {
        Derivation::at(catalog, language, catalog.sequence())
    }

    /// Of an index as it should be after change `sequence`.
    pub(super) fn at(catalog: &Catalog, language: &LanguageSetting, sequence: u64) -> Derivation {
        let (language, generation) = (language.clone(), catalog.generation());
        Derivation { fields: FIELDS_VERSION, analyzer: VERSION, language, generation, sequence }
    }

    /// Whether only changes of the catalog lie between the two.
    fn differs_in_sequence_alone(&self, other: &Derivation) -> bool {
        Derivation { sequence: 0, ..self.clone() } == Derivation { sequence: 0, ..other.clone() }
    }
}

/// The last change that an index of this catalog has, of those below `data_dir`: an index has no change that the catalog has
/// not. What cannot be read tells nothing.
pub(crate) fn furthest(data_dir: &Path, generation: u64) -> u64 {
    #[derive(Deserialize)]
    struct Meta {
        payload: Option<String>,
    }
    let reached = |entry: std::fs::DirEntry| {
        let text = std::fs::read_to_string(entry.path().join("meta.json")).ok()?;
        let meta: Meta = serde_json::from_str(&text).ok()?;
        let derivation: Derivation = serde_json::from_str(&meta.payload?).ok()?;
        (derivation.generation == generation).then_some(derivation.sequence)
    };
    let indexes = std::fs::read_dir(data_dir.join("index")).into_iter().flatten().flatten();
    indexes.filter_map(reached).max().unwrap_or(0)
}

/// An index that is open.
pub(super) struct OpenIndex {
    pub(super) index: Index,
    pub(super) reader: IndexReader,
    pub(super) fields: Fields,
    /// Where it lies.
    pub(super) dir: PathBuf,
    /// What its last commit says.
    pub(super) derivation: Derivation,
}

impl OpenIndex {
    fn new(index: Index, dir: &Path, derivation: Derivation) -> tantivy::Result<OpenIndex> {
        index.tokenizers().register(TOKENIZER, TextAnalyzer::from(RawTokenizer::default()));
        let fields = Fields::of(&index.schema())?;
        let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
        Ok(OpenIndex { index, reader, fields, dir: dir.into(), derivation })
    }

    /// Opens the index in `dir`, every file of which has the checksum that it was written with; `None` if there is none, or
    /// one that was derived otherwise than `wanted` or from a later state of the catalog.
    pub(super) fn open(dir: &Path, wanted: &Derivation) -> Result<Option<OpenIndex>> {
        OpenIndex::open_if(dir, |found| found.differs_in_sequence_alone(wanted) && found.sequence <= wanted.sequence)
    }

    /// Opens the index in `dir`, if it is of this writing of the catalog, whatever else it was derived by.
    pub(super) fn open_of(dir: &Path, generation: u64) -> Result<Option<OpenIndex>> {
        OpenIndex::open_if(dir, |found| found.generation == generation)
    }

    fn open_if(dir: &Path, is_it: impl FnOnce(&Derivation) -> bool) -> Result<Option<OpenIndex>> {
        if !dir.join("meta.json").is_file() {
            return Ok(None);
        }
        guarded(dir, || {
            let index = Index::open(IndexFolder::open(dir)?)?;
            check_files(&index, dir)?;
            let payload = index.load_metas()?.payload.unwrap_or_default();
            let Ok(found) = serde_json::from_str::<Derivation>(&payload) else { return Ok(None) };
            if !is_it(&found) || index.schema() != Fields::schema() {
                return Ok(None);
            }
            OpenIndex::new(index, dir, found).map(Some)
        })
    }

    /// Whether the index in `dir` was derived for another language than `wanted`, as somebody asked for since.
    pub(super) fn is_of_another_language(dir: &Path, wanted: &Derivation) -> bool {
        let payload = guarded(dir, || Ok(Index::open(IndexFolder::open(dir)?)?.load_metas()?.payload));
        let found = payload.ok().flatten().and_then(|payload| serde_json::from_str::<Derivation>(&payload).ok());
        found.is_some_and(|found| found.language != wanted.language)
    }

    /// Makes an empty index in `dir`, whatever was there.
    pub(super) fn create(dir: &Path, derivation: Derivation) -> Result<OpenIndex> {
        remove_folder(dir)?;
        crate::data_dir::create_private_dir(dir).map_err(|e| DocumentsError::writing(dir, e))?;
        guarded(dir, || OpenIndex::new(Index::create_in_dir(dir, Fields::schema())?, dir, derivation))
    }

    /// Makes an empty index in memory.
    pub(super) fn in_memory(derivation: Derivation) -> Result<OpenIndex> {
        let dir = Path::new("(in memory)");
        guarded(dir, || OpenIndex::new(Index::create_in_ram(Fields::schema()), dir, derivation))
    }

    /// The passages that it holds: document, number and digest of each.
    pub(super) fn passages(&self) -> Result<IndexedPassages> {
        guarded(&self.dir, || {
            let mut found = IndexedPassages::new();
            for segment in self.reader.searcher().segment_readers() {
                let columns = segment.fast_fields();
                let (numbers, digests) = (columns.u64(NUMBER)?, columns.u64(DIGEST)?);
                let Some(documents) = columns.bytes(DOCUMENT)? else { continue };
                for row in segment.doc_ids_alive() {
                    let mut id = Vec::new();
                    if let Some(ordinal) = documents.term_ords(row).next() {
                        documents.ord_to_bytes(ordinal, &mut id)?;
                    }
                    let id = DocumentId::from_bytes(&id).ok_or_else(|| damaged("a passage is of no document"))?;
                    let number = numbers.first(row).unwrap_or(u64::MAX);
                    found.entry(id).or_default().insert(number, digests.first(row).unwrap_or_default());
                }
            }
            Ok(found)
        })
    }

    pub(super) fn writer(&self) -> Result<IndexWriter> {
        guarded(&self.dir, || {
            let writer = self.index.writer_with_num_threads(1, WRITER_BYTES)?;
            // Files of a commit that was cut off have the names that the next one gives its own.
            writer.garbage_collect_files().wait()?;
            Ok(writer)
        })
    }

    /// Brings in what entries of the catalog's log tell of; not visible before a commit. What the catalog cannot read
    /// is left out, with a warning.
    pub(super) fn add(&self, writer: &IndexWriter, catalog: &Catalog, entries: &[LogEntry]) -> Result<()> {
        for some in entries.chunks(AT_A_TIME) {
            let put = some.iter().filter_map(|entry| match entry {
                LogEntry::Put(id) => Some(*id),
                LogEntry::Removed(_) => None,
            });
            let found = self.analysed(catalog, &put.collect::<Vec<_>>())?;
            guarded(&self.dir, || {
                for LogEntry::Put(id) | LogEntry::Removed(id) in some {
                    writer.delete_term(Term::from_field_bytes(self.fields.document, id.bytes()));
                }
                found.into_iter().try_for_each(|passage| writer.add_document(passage).map(|_| ()))
            })?;
        }
        Ok(())
    }

    /// Makes what was added visible and durable, as the state of the catalog after change `sequence`.
    pub(super) fn commit(&mut self, writer: &mut IndexWriter, sequence: u64) -> Result<()> {
        let derivation = Derivation { sequence, ..self.derivation.clone() };
        let payload = serde_json::to_string(&derivation)
            .map_err(|e| DocumentsError::Internal(format!("what an index is derived from cannot be written: {e}")))?;
        let outcome = guarded(&self.dir, || {
            let mut prepared = writer.prepare_commit()?;
            prepared.set_payload(&payload);
            prepared.commit()?;
            self.reader.reload()
        });
        if outcome.is_ok() {
            self.derivation = derivation;
        }
        outcome
    }

    /// Passages of documents as records of the index, made by all cores.
    fn analysed(&self, catalog: &Catalog, ids: &[DocumentId]) -> Result<Vec<TantivyDocument>> {
        let (fields, language) = (self.fields, &self.derivation.language);
        let cores = std::thread::available_parallelism().map_or(1, usize::from).min(ids.len().max(1));
        let share = ids.len().div_ceil(cores).max(1);
        let mut records = Vec::new();
        std::thread::scope(|scope| {
            let work = |ids: &'_ [DocumentId]| -> Result<Vec<TantivyDocument>> {
                let mut records = Vec::new();
                for id in ids {
                    match passages(catalog, fields, language, id) {
                        Ok(found) => records.extend(found),
                        Err(problem @ DocumentsError::DamagedDocument { .. }) => {
                            static TOLD: Seldom = Seldom::new();
                            let Some(more) = TOLD.due() else { continue };
                            tracing::warn!(
                                %problem, more,
                                "a document cannot be found until it is ingested again, or `quire catalog verify --repair` saves it"
                            );
                        }
                        Err(error) => return Err(error),
                    }
                }
                Ok(records)
            };
            let shares: Vec<_> = ids.chunks(share).map(|ids| scope.spawn(move || work(ids))).collect();
            for share in shares {
                let found =
                    share.join().map_err(|_| DocumentsError::Internal("analysing a document panicked".into()))?;
                records.extend(found?);
            }
            Ok(records)
        })
    }
}

/// The records of a document; none where it is gone.
fn passages(
    catalog: &Catalog,
    fields: Fields,
    setting: &LanguageSetting,
    id: &DocumentId,
) -> Result<Vec<TantivyDocument>> {
    let Some(info) = catalog.document(id)?.filter(|info| info.removed.is_none()) else { return Ok(Vec::new()) };
    let text = catalog.text(&info)?;
    let language = match setting {
        LanguageSetting::Auto => language::detect(&text),
        LanguageSetting::Fixed(name) => Some(name.as_str()),
    };
    let known: Vec<_> = language.and_then(language::by_name).into_iter().collect();
    let (mut analyzer, mut cuts) = (Analyzer::new(&known), Cuts::new(&text));
    let mut records = Vec::with_capacity(info.passages as usize);
    for (number, passage) in catalog.passages(&info)?.iter().enumerate() {
        // A passage that reaches beyond its text is damaged, and the catalog says so when it is read.
        let place = passage.place.bytes.clone();
        let Some(passage) = text.get(place.clone()) else { continue };
        let mut record = TantivyDocument::default();
        record.add_bytes(fields.document, id.bytes());
        record.add_u64(fields.number, number as u64);
        if let Some(language) = language {
            record.add_text(fields.language, language);
        }
        let tokens = analyzer.passage(&mut cuts, place);
        record.add_pre_tokenized_text(fields.text, PreTokenizedString { text: String::new(), tokens });
        record.add_u64(fields.digest, passage_digest(passage));
        records.push(record);
    }
    Ok(records)
}

/// Files that every segment has, by their endings.
const SEGMENT_FILES: [&str; 6] = ["fast", "fieldnorm", "idx", "pos", "store", "term"];

/// Compares the checksums of all files that the index in folder `path` reads, and misses those that are not there.
pub(super) fn check_files(index: &Index, path: &Path) -> tantivy::Result<()> {
    // An ingest that was killed leaves files of other segments, and lists of removals that nobody reads.
    let segments = index.searchable_segment_metas()?;
    let is_read = |name: &str| {
        segments.iter().any(|segment| {
            let removed = || segment.delete_opstamp().is_some_and(|stamp| name.ends_with(&format!(".{stamp}.del")));
            name.starts_with(&segment.id().uuid_string()) && (!name.ends_with(".del") || removed())
        })
    };
    for segment in &segments {
        for ending in SEGMENT_FILES {
            let name = format!("{}.{ending}", segment.id().uuid_string());
            if !path.join(&name).exists() {
                return Err(damaged(&format!("{name} is missing")));
            }
        }
    }
    for file in std::fs::read_dir(path)? {
        let name = file?.file_name();
        let name = name.to_string_lossy();
        if is_read(&name) && !index.directory().validate_checksum(Path::new(&*name))? {
            return Err(damaged(&format!("the checksum of {name} is wrong")));
        }
    }
    Ok(())
}

pub(super) fn damaged(what: &str) -> TantivyError {
    TantivyError::DataCorruption(DataCorruption::comment_only(what))
}

/// Equal for passages that differ in white space at most.
pub(crate) fn passage_digest(passage: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for word in passage.split_whitespace() {
        hasher.update(word.as_bytes());
        hasher.update(b" ");
    }
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Runs something that reads or writes the index in `dir`: what fails is named, and so is a panic, which some damage
/// to an index causes.
pub(super) fn guarded<T>(dir: &Path, work: impl FnOnce() -> tantivy::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|source| index_error(dir, source)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
            Err(index_error(dir, damaged(&format!("reading it panicked: {text}"))))
        }
    }
}

fn index_error(dir: &Path, source: TantivyError) -> DocumentsError {
    use tantivy::directory::error::{LockError, OpenDirectoryError, OpenReadError, OpenWriteError};
    let io = match &source {
        TantivyError::IoError(e) => Some(e.kind()),
        TantivyError::OpenWriteError(OpenWriteError::IoError { io_error, .. }) => Some(io_error.kind()),
        TantivyError::OpenReadError(OpenReadError::IoError { io_error, .. }) => Some(io_error.kind()),
        TantivyError::OpenDirectoryError(OpenDirectoryError::IoError { io_error, .. }) => Some(io_error.kind()),
        TantivyError::LockFailure(LockError::IoError(e), _) => Some(e.kind()),
        _ => None,
    };
    use ErrorKind as K;
    if let Some(kind @ (K::PermissionDenied | K::ReadOnlyFilesystem | K::StorageFull | K::NotADirectory)) = io {
        return DocumentsError::writing(dir, kind.into());
    }
    let advice = match &source {
        TantivyError::LockFailure(..) => "Another quire is ingesting into this collection: wait for it, or stop it",
        _ => "It is built again from the catalog when the collection is next opened",
    };
    DocumentsError::Index { path: dir.into(), advice, source: Box::new(source) }
}
