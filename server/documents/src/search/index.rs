//! The tantivy index of a collection: where it lies, which version it has, what its records hold.
//!
//! An index is one folder in the collection's own, named after the analyzer's version. It is derived from the texts
//! in it: one of an earlier version is built again from these when the collection is opened, in a folder beside it that
//! takes its name once it is complete. An earlier program has put its index into the collection's folder itself.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tantivy::error::DataCorruption;
use tantivy::schema::{
    FAST, Field, IndexRecordOption, NumericOptions, STORED, STRING, Schema, TextFieldIndexing, TextOptions, Value,
};
use tantivy::tokenizer::{PreTokenizedString, RawTokenizer, TextAnalyzer};
use tantivy::{Index, IndexReader, IndexWriter, ReloadPolicy, TantivyDocument, TantivyError, Term};

use super::analyzer::{Analyzer, VERSION};
use super::language;
use super::record::{Record, parse_place, passage_digest, passage_seal, write_place};
use crate::directory::IndexFolder;
use crate::error::{DocumentsError, Result};

/// Memory of the index writer; tantivy refuses less than 15 MB.
pub(super) const WRITER_BYTES: usize = 32 << 20;
/// Terms come from our analyzer; tantivy only wants to know a name.
const TOKENIZER: &str = "quire";
const META: &str = "meta.json";

/// The fields of an index of this version.
#[derive(Clone, Copy)]
pub(super) struct Fields {
    /// Path of the document, on its own record only.
    pub(super) document: Field,
    /// Path of the document, on all of its records: what a replacement deletes.
    pub(super) path: Field,
    /// Name of the document's language, on its own record only; absent where its endings are not known.
    pub(super) language: Field,
    pub(super) fingerprint: Field,
    pub(super) body: Field,
    /// Terms of a chunk.
    pub(super) text: Field,
    /// `start end start end`: characters, then bytes.
    pub(super) place: Field,
    /// Hash of everything above that is stored, and of the passage.
    pub(super) seal: Field,
    /// Equal for chunks of equal text.
    pub(super) digest: Field,
}

/// Name of the field that has [`Fields::digest`].
pub(super) const DIGEST: &str = "digest";

impl Fields {
    fn schema() -> Schema {
        let mut schema = Schema::builder();
        schema.add_text_field("document", STRING);
        schema.add_text_field("path", STRING | STORED);
        schema.add_text_field("language", STRING | STORED);
        schema.add_text_field("fingerprint", STORED);
        schema.add_text_field("body", STORED);
        let terms = TextFieldIndexing::default()
            .set_tokenizer(TOKENIZER)
            .set_index_option(IndexRecordOption::WithFreqsAndPositions);
        schema.add_text_field("text", TextOptions::default().set_indexing_options(terms));
        schema.add_text_field("place", STORED);
        schema.add_bytes_field("seal", STORED);
        schema.add_u64_field(DIGEST, NumericOptions::from(FAST));
        schema.build()
    }

    fn of(schema: &Schema) -> tantivy::Result<Fields> {
        Ok(Fields {
            document: schema.get_field("document")?,
            path: schema.get_field("path")?,
            language: schema.get_field("language")?,
            fingerprint: schema.get_field("fingerprint")?,
            body: schema.get_field("body")?,
            text: schema.get_field("text")?,
            place: schema.get_field("place")?,
            seal: schema.get_field("seal")?,
            digest: schema.get_field(DIGEST)?,
        })
    }
}

/// An index that is open.
pub(super) struct OpenIndex {
    pub(super) index: Index,
    pub(super) reader: IndexReader,
    pub(super) fields: Fields,
    /// Whether it can be written: it lies in the collection's folder, not in memory.
    pub(super) on_disk: bool,
}

impl OpenIndex {
    fn new(index: Index, on_disk: bool) -> tantivy::Result<OpenIndex> {
        index.tokenizers().register(TOKENIZER, TextAnalyzer::from(RawTokenizer::default()));
        let fields = Fields::of(&index.schema())?;
        let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
        Ok(OpenIndex { index, reader, fields, on_disk })
    }

    /// Writes a document, which then replaces the one of its name. Not visible before a commit.
    pub(super) fn put(&self, writer: &IndexWriter, record: &Record<'_>) -> tantivy::Result<()> {
        let fields = &self.fields;
        writer.delete_term(Term::from_field_text(fields.path, record.name));
        let language = language::detect(record.text);
        let mut whole = TantivyDocument::default();
        whole.add_text(fields.document, record.name);
        whole.add_text(fields.path, record.name);
        if let Some(language) = language {
            whole.add_text(fields.language, language);
        }
        whole.add_text(fields.fingerprint, record.fingerprint);
        whole.add_text(fields.body, record.text);
        whole.add_text(fields.place, record.places());
        whole.add_bytes(fields.seal, &record.seal());
        writer.add_document(whole)?;
        let known: Vec<_> = language.and_then(language::by_name).into_iter().collect();
        let mut analyzer = Analyzer::new(&known);
        for chunk in record.chunks {
            let passage = &record.text[chunk.bytes.clone()];
            let mut found = TantivyDocument::default();
            found.add_text(fields.path, record.name);
            let tokens = analyzer.passage(passage);
            found.add_pre_tokenized_text(fields.text, PreTokenizedString { text: String::new(), tokens });
            found.add_text(fields.place, write_place(chunk));
            found.add_bytes(fields.seal, &passage_seal(record.name, chunk, passage));
            found.add_u64(fields.digest, passage_digest(passage));
            writer.add_document(found)?;
        }
        Ok(())
    }
}

/// What lies in a collection's folder.
enum Layout {
    /// No index.
    Absent,
    /// One of this version, there.
    Current(PathBuf),
    /// One of an earlier version, there.
    Earlier(PathBuf),
    /// Only one of a later version.
    Later(u32),
}

impl Layout {
    fn of(dir: &Path) -> Layout {
        let mut versions = versions(dir);
        versions.sort_unstable();
        let earlier = versions.iter().rev().find(|version| **version < VERSION);
        match (versions.contains(&VERSION), earlier, versions.last()) {
            (true, ..) => Layout::Current(folder(dir, VERSION)),
            (_, Some(version), _) => Layout::Earlier(folder(dir, *version)),
            (_, None, Some(version)) => Layout::Later(*version),
            (_, None, None) => Layout::Absent,
        }
    }
}

/// Whether a collection's folder has an index of any version.
pub(crate) fn has_index(dir: &Path) -> bool {
    !versions(dir).is_empty()
}

/// The versions whose complete indexes are in a collection's folder.
fn versions(dir: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let version = |name: &str| match name {
        META => Some(1),
        name => name.strip_prefix("index-")?.parse().ok(),
    };
    let names = entries.flatten().filter_map(|entry| version(entry.file_name().to_str()?));
    names.filter(|version| folder(dir, *version).join(META).is_file()).collect()
}

fn folder(dir: &Path, version: u32) -> PathBuf {
    if version == 1 { dir.into() } else { dir.join(format!("index-{version}")) }
}

/// Opens the index of the collection in `dir`; `None` if there is none. One of an earlier version is built again.
///
/// # Errors
/// [`DocumentsError::NewerCollection`], [`DocumentsError::Index`] for a damaged one.
pub(super) fn open(dir: &Path) -> Result<Option<OpenIndex>> {
    match Layout::of(dir) {
        Layout::Absent => Ok(None),
        Layout::Later(found) => Err(DocumentsError::NewerCollection { path: dir.into(), found, known: VERSION }),
        Layout::Current(path) => guarded(dir, || open_checked(&path)).map(Some),
        Layout::Earlier(_) => rebuild(dir).map(Some),
    }
}

/// Makes an empty index for the collection in `dir`.
pub(super) fn create(dir: &Path) -> Result<OpenIndex> {
    let path = folder(dir, VERSION);
    std::fs::create_dir_all(&path).map_err(|e| DocumentsError::writing(&path, e))?;
    guarded(dir, || OpenIndex::new(Index::create_in_dir(&path, Fields::schema())?, true))
}

/// An index of this version, every file of which has the checksum that it was written with.
fn open_checked(path: &Path) -> tantivy::Result<OpenIndex> {
    let index = Index::open(IndexFolder::open(path)?)?;
    check_files(&index, path)?;
    if index.schema() != Fields::schema() {
        return Err(damaged("its list of fields is not that of its version"));
    }
    OpenIndex::new(index, true)
}

/// Compares the checksums of all files that the index in folder `path` reads.
fn check_files(index: &Index, path: &Path) -> tantivy::Result<()> {
    // An ingest that was killed leaves files of other segments, and lists of removals that nobody reads.
    let segments = index.searchable_segment_metas()?;
    let is_read = |name: &str| {
        segments.iter().any(|segment| {
            let removed = || segment.delete_opstamp().is_some_and(|stamp| name.ends_with(&format!(".{stamp}.del")));
            name.starts_with(&segment.id().uuid_string()) && (!name.ends_with(".del") || removed())
        })
    };
    for file in std::fs::read_dir(path)? {
        let name = file?.file_name();
        let name = name.to_string_lossy();
        if is_read(&name) && !index.directory().validate_checksum(Path::new(&*name))? {
            return Err(damaged(&format!("the checksum of {name} is wrong")));
        }
    }
    Ok(())
}

/// Builds the index of this version from the texts in one of an earlier version, which then goes. Where nothing can be
/// written, the new one is in memory.
fn rebuild(dir: &Path) -> Result<OpenIndex> {
    let lock = std::fs::File::create(dir.join(".rebuild.lock")).and_then(|file| file.lock().map(|()| file));
    // Another process may have done it meanwhile.
    let earlier = match Layout::of(dir) {
        Layout::Earlier(path) => path,
        Layout::Current(path) => return guarded(dir, || open_checked(&path)),
        Layout::Absent | Layout::Later(_) => return Err(index_error(dir, damaged("it went away while it was opened"))),
    };
    tracing::info!(collection = %dir.display(), "building the index again, for a new analyzer");
    let old = || Index::open(IndexFolder::open(&earlier)?);
    if lock.is_err() {
        return guarded(dir, || {
            let built = OpenIndex::new(Index::create_in_ram(Fields::schema()), false)?;
            copy(&old()?, &earlier, &built).map(|()| built)
        });
    }
    let partial = dir.join(format!("index-{VERSION}.partial"));
    let writing = |e| DocumentsError::writing(&partial, e);
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(writing)?;
    }
    std::fs::create_dir(&partial).map_err(writing)?;
    guarded(dir, || {
        let built = OpenIndex::new(Index::create_in_dir(&partial, Fields::schema())?, true)?;
        copy(&old()?, &earlier, &built)
    })?;
    let path = folder(dir, VERSION);
    std::fs::rename(&partial, &path).map_err(writing)?;
    std::fs::File::open(dir).and_then(|folder| folder.sync_all()).map_err(writing)?;
    remove_earlier(dir);
    guarded(dir, || open_checked(&path))
}

/// Removes indexes that the one of this version has replaced. What cannot be removed is in nobody's way.
pub(super) fn remove_earlier(dir: &Path) {
    for version in versions(dir).into_iter().filter(|version| *version < VERSION) {
        if version > 1 {
            let _ = std::fs::remove_dir_all(folder(dir, version));
            continue;
        }
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) && entry.file_name() != ".rebuild.lock" {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Copies all documents of an index of any version, which is in folder `path`.
fn copy(from: &Index, path: &Path, to: &OpenIndex) -> tantivy::Result<()> {
    check_files(from, path)?;
    let schema = from.schema();
    let [path, fingerprint, body, place] = ["path", "fingerprint", "body", "place"].map(|name| schema.get_field(name));
    let (path, fingerprint, body, place) = (path?, fingerprint?, body?, place?);
    let reader: IndexReader = from.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    let mut writer = to.index.writer_with_num_threads(1, WRITER_BYTES)?;
    for segment in reader.searcher().segment_readers() {
        let store = segment.get_store_reader(1)?;
        for stored in store.iter::<TantivyDocument>(segment.alive_bitset()) {
            let stored = stored?;
            let Some(text) = text_of(&stored, body) else { continue };
            let (name, fingerprint) = (text_of(&stored, path), text_of(&stored, fingerprint));
            let chunks: Option<Vec<_>> = text_of(&stored, place).unwrap_or_default().lines().map(parse_place).collect();
            let chunks = chunks.filter(|chunks| chunks.iter().all(|chunk| text.get(chunk.bytes.clone()).is_some()));
            let (Some(name), Some(fingerprint), Some(chunks)) = (name, fingerprint, chunks) else {
                return Err(damaged("the record of a document is incomplete"));
            };
            to.put(&writer, &Record { name, fingerprint, text, chunks: &chunks })?;
        }
    }
    writer.commit()?;
    writer.wait_merging_threads()
}

/// The first value of a text field.
pub(super) fn text_of(record: &TantivyDocument, field: Field) -> Option<&str> {
    record.get_first(field).and_then(|value| value.as_str())
}

/// The first value of a field of bytes.
pub(super) fn bytes_of(record: &TantivyDocument, field: Field) -> Option<&[u8]> {
    record.get_first(field).and_then(|value| value.as_bytes())
}

pub(super) fn damaged(what: &str) -> TantivyError {
    TantivyError::DataCorruption(DataCorruption::comment_only(what))
}

/// Runs something that reads or writes the index in `dir`: what fails is named, and so is a panic, which some damage
/// to an index causes.
pub(super) fn guarded<T>(dir: &Path, work: impl FnOnce() -> tantivy::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|e| index_error(dir, e)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(index_error(dir, damaged(&format!("reading it panicked: {text}"))))
        }
    }
}

pub(super) fn index_error(dir: &Path, source: TantivyError) -> DocumentsError {
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
        _ => "Remove this folder and ingest the documents again: cached chunks stay",
    };
    DocumentsError::Index { path: dir.into(), advice, source: Box::new(source) }
}
