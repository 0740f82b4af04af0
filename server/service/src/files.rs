//! Files that clients upload. Their bytes lie in `files` of the data folder, under their ids; what is known of them is a
//! row of the catalog, which is written last and removed first: bytes without a row are swept at the next start.
//!
//! Documents that came in by another way are files too, under their own ids: their bytes are their texts.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use documents::{Catalog, CollectionInfo, DocumentId, DocumentInfo, JobRecord, Library, RecordKind, data_dir};
use serde_json::json;

use super::ids::{is_id, new_id};
use super::paging::{Page, PageRequest};
use super::vector_stores::{attached_name, plain_documents};
use super::{Service, now};
use settings::{QuireError, Result};

pub(crate) use documents::FILE_PREFIX;

/// The kind of the rows of files.
const FILE: &str = "file";
/// The folder of their bytes.
const FOLDER: &str = "files";
/// What documents are for that came in by another way.
const DOCUMENTS: &str = "assistants";
/// Bytes of a file that are read at a time.
const PIECE: usize = 256 << 10;
/// What the names of files begin with that are still being uploaded.
const PARTIAL: &str = "partial-";
/// Bytes of a file's name at most.
const LONGEST_NAME: usize = 255;

/// How the row of a file stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileState {
    /// Clients see it.
    Uploaded,
    /// It was deleted, and comes back with the documents that it became, until space is reclaimed.
    Removed,
}

impl FileState {
    fn name(self) -> &'static str {
        match self {
            FileState::Uploaded => "uploaded",
            FileState::Removed => "removed",
        }
    }

    /// The row of a file that stands so.
    pub(super) fn of(self, record: JobRecord) -> JobRecord {
        JobRecord { state: self.name().into(), ..record }
    }

    fn is_of(self, record: &JobRecord) -> bool {
        record.state == self.name()
    }
}

/// A file that was uploaded, or a document that came in by another way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadedFile {
    /// Its id.
    pub id: String,
    /// Its name, without folders.
    pub filename: String,
    /// What it is for, in the client's words.
    pub purpose: String,
    /// Its length.
    pub bytes: u64,
    /// When it came, in seconds since 1970.
    pub created: u64,
    /// When it is removed, in seconds since 1970.
    pub expires: Option<u64>,
    /// BLAKE3 of its bytes, in hexadecimal digits.
    hash: String,
    /// The document that it is, where it was not uploaded.
    document: Option<DocumentId>,
}

impl UploadedFile {
    fn record(&self) -> JobRecord {
        JobRecord {
            id: self.id.clone(),
            kind: FILE.into(),
            state: FileState::Uploaded.name().into(),
            created: self.created,
            expires: self.expires,
            done: self.bytes,
            total: self.bytes,
            last_error: None,
            detail: json!({"filename": self.filename, "purpose": self.purpose, "blake3": self.hash}),
        }
    }

    fn from_record(record: &JobRecord) -> UploadedFile {
        let text = |key: &str| record.detail[key].as_str().unwrap_or_default().to_string();
        UploadedFile {
            id: record.id.clone(),
            filename: text("filename"),
            purpose: text("purpose"),
            bytes: record.total,
            created: record.created,
            expires: record.expires,
            hash: text("blake3"),
            document: None,
        }
    }

    fn from_document(document: &DocumentInfo) -> UploadedFile {
        UploadedFile {
            id: document.id.to_string(),
            filename: plain_filename(document),
            purpose: DOCUMENTS.into(),
            bytes: document.bytes,
            created: document.created,
            expires: None,
            hash: blake3::Hash::from_bytes(document.content).to_hex().to_string(),
            document: Some(document.id),
        }
    }

    fn is_expired(&self) -> bool {
        self.expires.is_some_and(|at| at <= now())
    }
}

/// A file whose bytes are coming. Dropped before it is finished, it leaves nothing.
pub struct Upload {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
    limit: u64,
}

impl Upload {
    /// Takes more bytes.
    ///
    /// # Errors
    /// [`QuireError::UploadTooLarge`]; those of a failed write.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes += bytes.len() as u64;
        if self.bytes > self.limit {
            return Err(QuireError::UploadTooLarge { limit: self.limit });
        }
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(|e| QuireError::writing(&self.path, e))
    }

    /// Has all bytes on disk under the file's own name.
    fn keep(&self, path: &Path) -> std::io::Result<()> {
        self.file.sync_all()?;
        std::fs::rename(&self.path, path)?;
        File::open(path.parent().unwrap_or(path))?.sync_all()
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        // One that was kept is no longer there.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Service {
    fn files_dir(&self) -> PathBuf {
        self.data_dir.join(FOLDER)
    }

    /// Begins to take a file of at most `limit` bytes.
    ///
    /// # Errors
    /// [`documents::DocumentsError::DataDir`] where nothing can be written.
    pub fn begin_upload(&self, limit: u64) -> Result<Upload> {
        let dir = self.files_dir();
        data_dir::create_private_dir(&dir).map_err(|e| QuireError::writing(&dir, e))?;
        let path = dir.join(new_id(PARTIAL));
        let file = File::create_new(&path).map_err(|e| QuireError::writing(&path, e))?;
        Ok(Upload { path, file, hasher: blake3::Hasher::new(), bytes: 0, limit })
    }

    /// Keeps a file that has come whole, for `seconds` if these are given. When this returns, it is on disk.
    ///
    /// # Errors
    /// An empty file, and those of a failed write.
    pub fn finish_upload(
        &self,
        upload: Upload,
        filename: &str,
        purpose: &str,
        seconds: Option<u64>,
    ) -> Result<UploadedFile> {
        if upload.bytes == 0 {
            let problem = "expected a file with contents, found an empty one".into();
            return Err(QuireError::InvalidParameter { param: "file".into(), problem });
        }
        let created = now();
        let file = UploadedFile {
            id: new_id(FILE_PREFIX),
            filename: clean_name(filename),
            purpose: purpose.into(),
            bytes: upload.bytes,
            created,
            expires: seconds.map(|seconds| created.saturating_add(seconds)),
            hash: upload.hasher.finalize().to_hex().to_string(),
            document: None,
        };
        let path = self.files_dir().join(&file.id);
        upload.keep(&path).map_err(|e| QuireError::writing(&path, e))?;
        let written = self.library.writable().and_then(|catalog| catalog.put_record(RecordKind::File, &file.record()));
        if let Err(error) = written {
            let _ = std::fs::remove_file(&path);
            return Err(error.into());
        }
        Ok(file)
    }

    /// A file by its id; `param` is where it was named.
    ///
    /// # Errors
    /// [`QuireError::NotFound`], also for one that has expired; a failing catalog.
    pub fn file(&self, id: &str, param: &'static str) -> Result<UploadedFile> {
        let absent = || QuireError::NotFound { what: "file", id: id.into(), param: param.into() };
        let Some(catalog) = self.library.catalog()? else { return Err(absent()) };
        if let Ok(id) = id.parse::<DocumentId>() {
            return Ok(UploadedFile::from_document(&self.plain_document(&catalog, &id)?.ok_or_else(absent)?.1));
        }
        if !is_id(FILE_PREFIX, id) {
            return Err(absent());
        }
        let record = catalog.record(RecordKind::File, id)?.filter(|record| FileState::Uploaded.is_of(record));
        let file = record.as_ref().map(UploadedFile::from_record);
        file.filter(|file| !file.is_expired()).ok_or_else(absent)
    }

    /// A document that no client attached, with its collection; `None` where there is none, or the collection was removed.
    fn plain_document(&self, catalog: &Catalog, id: &DocumentId) -> Result<Option<(CollectionInfo, DocumentInfo)>> {
        let document = catalog.document(id)?.filter(|document| document.removed.is_none());
        let is_plain = |document: &DocumentInfo| document.names.iter().any(|name| attached_name(name).is_none());
        let Some(document) = document.filter(is_plain) else { return Ok(None) };
        let info = catalog.collections()?.into_iter().find(|info| info.id == document.collection);
        Ok(info.map(|info| (info, document)))
    }

    /// A page of the files, of one purpose only where one is given.
    ///
    /// # Errors
    /// A failing catalog.
    pub fn files(&self, purpose: Option<&str>, page: &PageRequest) -> Result<Page<UploadedFile>> {
        let Some(catalog) = self.library.catalog()? else { return Ok(page.of(Vec::new(), |_: &UploadedFile| "")) };
        let wanted = |file: &UploadedFile| !file.is_expired() && purpose.is_none_or(|purpose| file.purpose == purpose);
        let uploaded = self.records_of(FileState::Uploaded)?.into_iter().filter(wanted);
        let mut items: Vec<(String, Option<UploadedFile>)> =
            uploaded.map(|file| (file.id.clone(), Some(file))).collect();
        if purpose.is_none_or(|purpose| purpose == DOCUMENTS) {
            for info in catalog.collections()? {
                items.extend(plain_documents(&catalog, &info)?.iter().map(|id| (id.to_string(), None)));
            }
        }
        // Rows of documents are read for those of the page alone.
        let page = page.of(items, |(id, _): &(String, Option<UploadedFile>)| id);
        let mut data = Vec::with_capacity(page.data.len());
        for (id, file) in page.data {
            match file {
                Some(file) => data.push(file),
                // One that was removed meanwhile is none.
                None => data.extend(self.file(&id, "file_id").ok()),
            }
        }
        Ok(Page { data, has_more: page.has_more })
    }

    fn records_of(&self, state: FileState) -> Result<Vec<UploadedFile>> {
        let Some(catalog) = self.library.catalog()? else { return Ok(Vec::new()) };
        let records = catalog.records(RecordKind::File)?;
        Ok(records.iter().filter(|record| state.is_of(record)).map(UploadedFile::from_record).collect())
    }

    /// A file's bytes, which are compared with what was uploaded before any is given out.
    ///
    /// # Errors
    /// As [`file`](Self::file); a file that cannot be read or is damaged.
    pub fn file_content(&self, id: &str, param: &'static str) -> Result<(UploadedFile, FileContent)> {
        let file = self.file(id, param)?;
        if let Some(document) = &file.document {
            let gone = || QuireError::NotFound { what: "file", id: id.into(), param: param.into() };
            let catalog = self.library.catalog()?.ok_or_else(gone)?;
            let info = catalog.document(document)?.ok_or_else(gone)?;
            // Compared with its hash where it is read.
            let text = catalog.text(&info)?.into_bytes();
            return Ok((file, FileContent::Text(text)));
        }
        let content = FileContent::Bytes { path: self.files_dir().join(id), file: None };
        if content.hash()? != file.hash {
            return Err(QuireError::Internal(format!("the bytes of {id} are not those that were uploaded")));
        }
        Ok((file, content))
    }

    /// Removes a file, also from all vector stores. What it became there can be restored until space is reclaimed, and the file
    /// with it; one that is in no store is gone for good.
    ///
    /// # Errors
    /// As [`file`](Self::file); those of a failed write.
    pub fn delete_file(&self, id: &str) -> Result<()> {
        let file = self.file(id, "file_id")?;
        // Nobody attaches it meanwhile.
        let _changing = self.attaching();
        if let Some(document) = &file.document {
            let catalog = self.library.writable()?;
            let Some((info, document)) = self.plain_document(&catalog, document)? else { return Ok(()) };
            return self.remove_plain(&info, &document);
        }
        if !self.detach_everywhere(id)? {
            // Its name lies in the catalog's log until that is rewritten.
            self.jobs.erase_soon();
            return self.forget_file(id);
        }
        let catalog = self.library.writable()?;
        Ok(catalog.put_record(RecordKind::File, &FileState::Removed.of(file.record()))?)
    }

    fn forget_file(&self, id: &str) -> Result<()> {
        forget_file(&self.library, id)
    }

    /// Removes the files whose time has come; says how many.
    pub(super) fn remove_expired_files(&self) -> Result<usize> {
        let mut files = self.records_of(FileState::Uploaded)?;
        files.extend(self.records_of(FileState::Removed)?);
        files.retain(UploadedFile::is_expired);
        for file in &files {
            let _changing = self.attaching();
            self.jobs.erase_soon();
            self.purge_everywhere(&file.id)?;
            self.forget_file(&file.id)?;
        }
        Ok(files.len())
    }

    /// Removes bytes that no row tells of: of uploads that were cut off.
    pub(super) fn sweep_files(&self) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(self.files_dir()) else { return Ok(()) };
        let catalog = self.library.catalog()?;
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let known = match &catalog {
                Some(catalog) if is_id(FILE_PREFIX, &name) => catalog.record(RecordKind::File, &name)?.is_some(),
                _ => false,
            };
            if !known && (is_id(FILE_PREFIX, &name) || is_id(PARTIAL, &name)) {
                // What cannot be removed is tried again at the next start.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }
}

/// Forgets the files that were deleted and could have come back: the documents that they became are gone.
pub(super) fn forget_removed(library: &Library) -> Result<()> {
    for record in library.writable()?.records(RecordKind::File)?.iter().filter(|row| FileState::Removed.is_of(row)) {
        forget_file(library, &record.id)?;
    }
    Ok(())
}

/// Removes a file's row, then its bytes.
fn forget_file(library: &Library, id: &str) -> Result<()> {
    library.writable()?.remove_record(RecordKind::File, id)?;
    let path = library.data_dir().join(FOLDER).join(id);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(QuireError::writing(path, error)),
        _ => Ok(()),
    }
}

/// The file name of a document that came in otherwise than as an uploaded file.
pub(super) fn plain_filename(document: &DocumentInfo) -> String {
    let name = document.names.iter().find(|name| attached_name(name).is_none());
    name.and_then(|name| Path::new(name).file_name()).unwrap_or_default().to_string_lossy().into()
}

/// The bytes of a file, to be read piece by piece.
pub enum FileContent {
    /// Of one that was uploaded.
    Bytes {
        /// Where they lie.
        path: PathBuf,
        /// Open behind what was read.
        file: Option<File>,
    },
    /// The text of a document, or what is left of it.
    Text(Vec<u8>),
}

impl FileContent {
    fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        match self {
            FileContent::Bytes { path, .. } => {
                hasher.update_reader(open(path)?).map_err(|source| unreadable(path, source))?;
            }
            FileContent::Text(text) => drop(hasher.update(text)),
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// The next bytes; none behind the end.
    ///
    /// # Errors
    /// Those of a failed read.
    pub fn piece(&mut self) -> Result<Vec<u8>> {
        match self {
            FileContent::Bytes { path, file } => {
                let mut from = match file.take() {
                    Some(file) => file,
                    None => open(path)?,
                };
                let mut piece = vec![0; PIECE];
                let read = from.read(&mut piece).map_err(|source| unreadable(path, source))?;
                piece.truncate(read);
                *file = Some(from);
                Ok(piece)
            }
            FileContent::Text(text) => Ok(text.drain(..text.len().min(PIECE)).collect()),
        }
    }

    /// All of the bytes, where they are at most `limit`.
    pub(super) fn whole(&self, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            FileContent::Bytes { path, .. } => {
                open(path)?.take(limit).read_to_end(&mut bytes).map_err(|source| unreadable(path, source))?;
            }
            FileContent::Text(text) => bytes.extend_from_slice(text),
        }
        Ok(bytes)
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| unreadable(path, source))
}

fn unreadable(path: &Path, source: std::io::Error) -> QuireError {
    QuireError::Io { action: "read", path: path.into(), source }
}

/// A file's name as it is shown: without folders of whichever system, control characters and white space around it.
fn clean_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let shown: String = last.chars().filter(|c| !c.is_control()).collect();
    let mut shown = shown.trim();
    while shown.len() > LONGEST_NAME {
        // The ending tells the format: what is cut is the beginning.
        let first = shown.chars().next().map_or(1, char::len_utf8);
        shown = &shown[first..];
    }
    if shown.is_empty() || shown == "." || shown == ".." { "file".into() } else { shown.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_without_folders_and_control_characters_and_not_too_long() {
        for (name, clean) in [
            ("notes.md", "notes.md"),
            ("../../etc/passwd", "passwd"),
            ("C:\\Users\\ann\\notes.txt", "notes.txt"),
            (" a\u{0}b\n.txt ", "ab.txt"),
            ("", "file"),
            ("/", "file"),
            ("..", "file"),
            ("潮汐.md", "潮汐.md"),
        ] {
            assert_eq!(clean_name(name), clean, "{name:?}");
        }
        let long = clean_name(&format!("{}.md", "é".repeat(300)));
        assert!(long.len() <= LONGEST_NAME && long.ends_with("é.md"), "{long}");
    }
}
