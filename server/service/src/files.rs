//! Files that clients upload. Their bytes lie in `files` of the data folder, under their ids; what is known of them is a
//! row of the catalog, which is written last and removed first: bytes without a row are swept at the next start.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use documents::{JobRecord, RecordKind, data_dir};
use serde_json::json;

use super::ids::{is_id, new_id};
use super::paging::{Page, PageRequest};
use super::{Service, now};
use settings::{QuireError, Result};

/// What an id of a file begins with.
pub(crate) const FILE_PREFIX: &str = "file-";
/// The kind of the rows of files.
const FILE: &str = "file";
/// Bytes of a file that are read at a time.
const PIECE: usize = 256 << 10;
/// What the names of files begin with that are still being uploaded.
const PARTIAL: &str = "partial-";
/// Bytes of a file's name at most.
const LONGEST_NAME: usize = 255;

/// A file that was uploaded.
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
}

impl UploadedFile {
    fn record(&self) -> JobRecord {
        JobRecord {
            id: self.id.clone(),
            kind: FILE.into(),
            state: "uploaded".into(),
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
        self.data_dir.join("files")
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
        if !is_id(FILE_PREFIX, id) {
            return Err(absent());
        }
        let record = match self.library.catalog()? {
            Some(catalog) => catalog.record(RecordKind::File, id)?,
            None => None,
        };
        let file = record.as_ref().map(UploadedFile::from_record);
        file.filter(|file| !file.is_expired()).ok_or_else(absent)
    }

    /// A page of the files, of one purpose only where one is given.
    ///
    /// # Errors
    /// A failing catalog.
    pub fn files(&self, purpose: Option<&str>, page: &PageRequest) -> Result<Page<UploadedFile>> {
        let wanted = |file: &UploadedFile| !file.is_expired() && purpose.is_none_or(|purpose| file.purpose == purpose);
        let files = self.all_files()?.into_iter().filter(wanted).collect();
        Ok(page.of(files, |file: &UploadedFile| &file.id))
    }

    fn all_files(&self) -> Result<Vec<UploadedFile>> {
        let Some(catalog) = self.library.catalog()? else { return Ok(Vec::new()) };
        Ok(catalog.records(RecordKind::File)?.iter().map(UploadedFile::from_record).collect())
    }

    /// A file's bytes, which are compared with what was uploaded before any is given out.
    ///
    /// # Errors
    /// As [`file`](Self::file); a file that cannot be read or is damaged.
    pub fn file_content(&self, id: &str, param: &'static str) -> Result<(UploadedFile, FileContent)> {
        let file = self.file(id, param)?;
        let path = self.files_dir().join(id);
        let content = FileContent { path, file: None };
        if content.hash()? != file.hash {
            return Err(QuireError::Internal(format!("the bytes of {id} are not those that were uploaded")));
        }
        Ok((file, content))
    }

    /// Removes a file for good, also from all vector stores.
    ///
    /// # Errors
    /// As [`file`](Self::file); those of a failed write.
    pub fn delete_file(&self, id: &str) -> Result<()> {
        self.file(id, "file_id")?;
        self.remove_file(id)
    }

    fn remove_file(&self, id: &str) -> Result<()> {
        // Nobody attaches it meanwhile.
        let _changing = self.attaching();
        self.detach_everywhere(id)?;
        self.library.writable()?.remove_record(RecordKind::File, id)?;
        let path = self.files_dir().join(id);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(QuireError::writing(path, error)),
            _ => Ok(()),
        }
    }

    /// Removes the files whose time has come; says how many.
    pub(super) fn remove_expired_files(&self) -> Result<usize> {
        let expired: Vec<UploadedFile> = self.all_files()?.into_iter().filter(UploadedFile::is_expired).collect();
        for file in &expired {
            self.remove_file(&file.id)?;
        }
        Ok(expired.len())
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

/// The bytes of a file, to be read piece by piece.
pub struct FileContent {
    path: PathBuf,
    file: Option<File>,
}

impl FileContent {
    fn hash(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(self.open()?).map_err(|e| self.unreadable(e))?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn open(&self) -> Result<File> {
        File::open(&self.path).map_err(|e| self.unreadable(e))
    }

    fn unreadable(&self, source: std::io::Error) -> QuireError {
        QuireError::Io { action: "read", path: self.path.clone(), source }
    }

    /// The next bytes; none behind the end.
    ///
    /// # Errors
    /// Those of a failed read.
    pub fn piece(&mut self) -> Result<Vec<u8>> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.open()?,
        };
        let mut piece = vec![0; PIECE];
        let read = file.read(&mut piece).map_err(|e| self.unreadable(e))?;
        piece.truncate(read);
        self.file = Some(file);
        Ok(piece)
    }

    /// All of the bytes, where they are at most `limit`.
    pub(super) fn whole(&self, limit: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.open()?.take(limit).read_to_end(&mut bytes).map_err(|e| self.unreadable(e))?;
        Ok(bytes)
    }
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
