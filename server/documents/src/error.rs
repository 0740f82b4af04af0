//! What can go wrong with documents, collections and the folder that they are kept in.

use std::path::PathBuf;

/// This crate's result type.
pub type Result<T, E = DocumentsError> = std::result::Result<T, E>;

/// Errors of documents and collections: what was expected, what came and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentsError {
    /// A document is not UTF-8.
    #[error(
        "document {}: expected UTF-8 text, found an invalid byte at offset {offset}. Convert it, for example with \
         `iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE` if it is Latin-1, or from GB18030, SHIFT-JIS, UTF-16LE or whatever it is", path.display()
    )]
    NotUtf8 {
        /// The document.
        path: PathBuf,
        /// Offset of the first byte that is no UTF-8.
        offset: usize,
    },

    /// A document is in another encoding.
    #[error(
        "document {}: expected UTF-8 text, found {found} at offset {offset}. Convert it: \
         `iconv -f {encoding} -t UTF-8 FILE > NEW_FILE`", path.display()
    )]
    OtherEncoding {
        /// The document.
        path: PathBuf,
        /// What gives it away.
        found: &'static str,
        /// Where.
        offset: usize,
        /// Its encoding, as iconv names it.
        encoding: &'static str,
    },

    /// A document has bytes that no text has.
    #[error(
        "document {}: expected text, found a NUL byte at offset {offset}: it is no text, is damaged, or is in another \
         encoding. If it is UTF-16, convert it: `iconv -f UTF-16LE -t UTF-8 FILE > NEW_FILE`, or from UTF-16BE; otherwise \
         remove the bytes: `tr -d '\\000' < FILE > NEW_FILE`", path.display()
    )]
    NulInDocument {
        /// The document.
        path: PathBuf,
        /// Offset of the first.
        offset: usize,
    },

    /// A document is larger than any that could be read in reasonable time.
    #[error(
        "document {}: expected at most {limit} bytes, found {found}. Split it, for example with \
         `split --line-bytes={limit}`", path.display()
    )]
    DocumentTooLarge {
        /// The document.
        path: PathBuf,
        /// Bytes that it has, as far as known.
        found: u64,
        /// Bytes that it may have.
        limit: u64,
    },

    /// A document's name is not UTF-8, so that no answer could cite it.
    #[error("document {}: expected a file name in UTF-8. Rename the file, then ingest it again", path.display())]
    DocumentName {
        /// The document.
        path: PathBuf,
    },

    /// A document has no text.
    #[error(
        "document {}: expected text, found {found} at offset 0. Remove it from the folder, or write something into it",
        path.display()
    )]
    EmptyDocument {
        /// The document.
        path: PathBuf,
        /// "no bytes" or "only white space".
        found: &'static str,
    },

    /// A document is in a format that is not read.
    #[error(
        "document {}: expected a text (.txt, .text) or Markdown (.md, .markdown) file, found {found}. \
         Convert it to one of these", path.display()
    )]
    UnsupportedDocument {
        /// The document.
        path: PathBuf,
        /// Its extension, or its kind.
        found: String,
    },

    /// There is nothing to ingest.
    #[error("no documents: expected text (.txt) or Markdown (.md) files under {}, found none", path.display())]
    NoDocuments {
        /// What was searched.
        path: PathBuf,
    },

    /// A collection's name cannot be a folder's.
    #[error(
        "collection `{found}`: expected 1 to 64 letters, digits, `-`, `_` or `.`, not beginning with `.`. \
         Choose another name"
    )]
    CollectionName {
        /// The name that was given.
        found: String,
    },

    /// There is no such collection.
    #[error(
        "collection `{name}` does not exist{}. Make it with `quire ingest PATH --collection {name}`",
        if known.is_empty() { String::from("; there is none yet") } else { format!("; there are: {}", known.join(", ")) }
    )]
    UnknownCollection {
        /// The name that was asked for.
        name: String,
        /// The collections that exist.
        known: Vec<String>,
    },

    /// A collection was written by a later version of the program.
    #[error(
        "collection {}: a newer Quire has written it (search index {found}, this one knows up to {known}). Use that \
         one, or ingest the documents into another collection", path.display()
    )]
    NewerCollection {
        /// Its folder.
        path: PathBuf,
        /// The version found.
        found: u32,
        /// The latest one that this program knows.
        known: u32,
    },

    /// The catalog of documents failed.
    #[error(
        "catalog of documents at {}: {action} failed: {source}. If it comes again, `quire catalog verify --repair` \
         saves all documents that are whole", path.display()
    )]
    Catalog {
        /// The catalog's folder.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The reason.
        source: Box<rocksdb::Error>,
    },

    /// The catalog is damaged, as a whole or where something of it has to be read for others.
    #[error(
        "catalog of documents at {}: it is damaged: {problem}. `quire catalog verify --repair` saves all documents that are \
         whole, and names the others", path.display()
    )]
    DamagedCatalog {
        /// The catalog's folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },

    /// Removed documents are gone, but not their bytes.
    #[error(
        "catalog of documents at {}: what was removed is gone, but words of it may still lie in {files}, which cannot be \
         rewritten: there is damage. `quire catalog verify --repair` writes the catalog anew, without them", path.display()
    )]
    NotErased {
        /// The catalog's folder.
        path: PathBuf,
        /// Names of files.
        files: String,
    },

    /// Nothing of a damaged catalog can be saved.
    #[error(
        "catalog of documents at {}: nothing of it can be saved: {problem}. Restore the folder from a backup; or begin with an \
         empty catalog, beside which the damaged one is kept: `quire catalog verify --repair --anew`, then ingest the documents \
         again", path.display()
    )]
    NothingSaved {
        /// The catalog's folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },

    /// A repair does not find enough space. The catalog is as it was.
    #[error(
        "{}: the disk is full, with {free} bytes free. Writing the catalog anew beside the damaged one takes up to {needed} bytes: \
         free so many on that disk, then repair again; nothing has changed", path.display()
    )]
    RepairSpace {
        /// What could not be written.
        path: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are needed at most, about.
        needed: u64,
    },

    /// Another process writes the catalog.
    #[error(
        "catalog of documents at {}: another quire is using it for writing. Wait for it, stop it, or choose another \
         folder with --data-dir", path.display()
    )]
    CatalogInUse {
        /// The catalog's folder.
        path: PathBuf,
    },

    /// What the catalog keeps of a document is not what was written.
    #[error(
        "{what}: what is stored is not what was written: {problem}. Others are not affected. Ingest it again, or see \
         `quire catalog verify --repair`"
    )]
    DamagedDocument {
        /// The document, by its name where that is known.
        what: String,
        /// What was expected and what came.
        problem: String,
    },

    /// There is no such document.
    #[error("collection `{collection}` has no document `{name}`. `quire ls {collection}` lists those there are")]
    UnknownDocument {
        /// The name or id that was asked for.
        name: String,
        /// The collection.
        collection: String,
    },

    /// A collection was removed, or got another name, while somebody was writing into it.
    #[error(
        "collection `{name}` was removed or renamed meanwhile: nothing more comes in under this name. What was removed comes \
         back with `quire rm --undo --collection {name}`"
    )]
    CollectionRemoved {
        /// Its name.
        name: String,
    },

    /// What was removed for good is still in files of the catalog.
    #[error(
        "what was removed can no longer be restored, but its bytes could not be taken off the disk at {}: rewriting the catalog's \
         files failed, as on a full disk. Make room, see `quire doctor`, and repeat with `quire reclaim`", path.display()
    )]
    CatalogNotErased {
        /// The catalog's folder.
        path: PathBuf,
    },

    /// Something that was removed cannot come back, as its name was given anew.
    #[error(
        "`{name}` was removed and is there again. Before the old one is restored, remove the new one, or give it another \
         name (a collection: `quire collections rename {name} NEW_NAME`; a file: rename it and ingest it again)"
    )]
    NameTaken {
        /// The name.
        name: String,
    },

    /// A collection is to get a name that another one has.
    #[error("collection `{name}` is there already: choose another name")]
    CollectionExists {
        /// The name.
        name: String,
    },

    /// The language of a collection is none whose endings are known.
    #[error("language `{found}`: expected `auto` or one of {}", known.join(", "))]
    UnknownLanguage {
        /// What was given.
        found: String,
        /// The languages that there are.
        known: Vec<&'static str>,
    },

    /// The full-text index failed.
    #[error("collection index at {}: {source}. {advice}", path.display())]
    Index {
        /// The index's folder.
        path: PathBuf,
        /// What to do.
        advice: &'static str,
        /// The reason.
        source: Box<tantivy::TantivyError>,
    },

    /// The data folder cannot be written.
    #[error(
        "data folder {}: expected to be able to write there: {source}. {}, or choose another with --data-dir",
        path.display(),
        if no_space(source) { "Free some space on that disk" } else { "Make it writable for this user" }
    )]
    DataDir {
        /// The folder or file that could not be written.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },

    /// The data folder was written by a newer version of this program.
    #[error(
        "data folder {}: it has version {found}, this program reads up to {supported}. Use a newer quire, or choose \
         another folder with --data-dir", path.display()
    )]
    NewerDataDir {
        /// The folder.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest that this build reads.
        supported: u32,
    },

    /// The file that says which version the data folder has cannot be understood.
    #[error(
        "{}: expected the version of the data folder, as in {{\"format\": {newest}}}, found {found}. The documents beside it \
         are not touched. If no newer quire has written this folder, remove that file: it is written again",
        path.display()
    )]
    DataDirMarker {
        /// The file.
        path: PathBuf,
        /// What is there instead.
        found: String,
        /// The version that this build writes.
        newest: u32,
    },

    /// A file operation failed.
    #[error("cannot {action} {}: {source}. Check the path, and that this user may use it", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },

    /// Nobody waits for the result any more.
    #[error("cancelled")]
    Cancelled,

    /// Something that should not happen happened.
    #[error("internal error: {0}. This is a defect of the program: please report it")]
    Internal(String),
}

fn no_space(source: &std::io::Error) -> bool {
    matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

impl DocumentsError {
    /// For attempts to write below the data folder.
    #[must_use]
    pub fn writing(path: impl Into<PathBuf>, source: std::io::Error) -> DocumentsError {
        DocumentsError::DataDir { path: path.into(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_collection_lists_those_there_are() {
        let error = DocumentsError::UnknownCollection { name: "b".into(), known: vec!["a".into(), "c".into()] };
        assert!(error.to_string().contains("there are: a, c. Make it with `quire ingest PATH --collection b`"));
    }
}
