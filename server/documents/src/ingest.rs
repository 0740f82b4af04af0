//! From paths to texts: which files are documents, and what is in them.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::encoding::decode;
use super::split::Format;
use crate::error::{DocumentsError, Result};

/// Bytes of a document at most: some 16 million tokens, which takes hours to read.
const DOCUMENT_LIMIT: u64 = 64 << 20;

/// A document that was read.
#[derive(Clone, Debug)]
pub struct Document {
    /// Its absolute path: its name in a collection.
    pub path: PathBuf,
    /// Its whole text, unchanged: character spans count from its beginning.
    pub text: String,
    /// How it is written.
    pub format: Format,
}

/// What lies at some paths.
#[derive(Debug, Default)]
pub struct Discovered {
    /// Documents, sorted and without repetition.
    pub documents: Vec<PathBuf>,
    /// Of these, the ones that were named themselves, not found in a folder; sorted.
    pub named: Vec<PathBuf>,
    /// What could not be read, or was named and is no document.
    pub problems: Vec<(PathBuf, DocumentsError)>,
    /// What folders hold beside documents.
    pub skipped: Skipped,
}

/// What was left out of folders, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Files and folders whose names begin with a dot.
    pub hidden: usize,
    /// Files that are neither text nor Markdown, by their names.
    pub other_formats: usize,
    /// Links to folders, and links that lead nowhere.
    pub links: usize,
    /// Pipes, sockets and devices.
    pub special: usize,
    /// Documents without text.
    pub empty: usize,
}

impl Skipped {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> usize {
        self.hidden + self.other_formats + self.links + self.special + self.empty
    }
}

/// The documents at `paths`: files as named, folders searched to every depth. In folders, hidden entries, other formats
/// and links to folders are left out, and counted. What cannot be read is told, and the rest is found all the same.
#[must_use]
pub fn discover(paths: &[PathBuf]) -> Discovered {
    let mut found = Discovered::default();
    for path in paths {
        if let Err(error) = discover_one(path, &mut found) {
            found.problems.push((path.clone(), error));
        }
    }
    for list in [&mut found.documents, &mut found.named] {
        list.sort();
        list.dedup();
    }
    found
}

fn discover_one(path: &Path, found: &mut Discovered) -> Result<()> {
    let failed = |source| DocumentsError::Io { action: "read", path: path.into(), source };
    let unsupported = |found: String| Err(DocumentsError::UnsupportedDocument { path: path.into(), found });
    let absolute = path.canonicalize().map_err(failed)?;
    if absolute.is_dir() {
        let before = (found.documents.len(), found.problems.len());
        walk(&absolute, found);
        if (found.documents.len(), found.problems.len()) == before {
            return Err(DocumentsError::NoDocuments { path: path.into() });
        }
        return Ok(());
    }
    if !absolute.is_file() {
        return unsupported("no regular file".into());
    }
    if Format::of_name(&absolute).is_none() {
        return unsupported(match absolute.extension() {
            Some(extension) => format!(".{}", extension.to_string_lossy()),
            None => "no extension".into(),
        });
    }
    found.documents.push(absolute.clone());
    found.named.push(absolute);
    Ok(())
}

fn walk(folder: &Path, found: &mut Discovered) {
    // A list of folders instead of recursion: none is too deep.
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let failed = |source| DocumentsError::Io { action: "read the folder", path: folder.clone(), source };
        let entries = match std::fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(source) => {
                let error = failed(source);
                found.problems.push((folder, error));
                continue;
            }
        };
        for entry in entries {
            match entry.and_then(|entry| Ok((entry.file_type()?, entry))) {
                Ok((kind, entry)) => sort_entry(&entry, kind, &mut folders, found),
                Err(source) => found.problems.push((folder.clone(), failed(source))),
            }
        }
    }
}

fn sort_entry(entry: &std::fs::DirEntry, kind: std::fs::FileType, folders: &mut Vec<PathBuf>, found: &mut Discovered) {
    let path = entry.path();
    let skipped = &mut found.skipped;
    if entry.file_name().as_encoded_bytes().starts_with(b".") {
        skipped.hidden += 1;
    } else if kind.is_dir() {
        folders.push(path);
    } else if kind.is_symlink() && !path.is_file() {
        skipped.links += 1;
    } else if !path.is_file() {
        skipped.special += 1;
    } else if Format::of_name(&path).is_none() {
        skipped.other_formats += 1;
    } else {
        found.documents.push(path);
    }
}

/// Reads one document.
///
/// # Errors
/// [`DocumentsError::Io`], [`DocumentsError::DocumentName`], [`DocumentsError::DocumentTooLarge`], [`DocumentsError::OtherEncoding`],
/// [`DocumentsError::NulInDocument`], [`DocumentsError::NotUtf8`] with the offset of the first bad byte,
/// [`DocumentsError::EmptyDocument`].
pub fn read_document(path: &Path) -> Result<Document> {
    // A collection knows documents by their names as text.
    if path.to_str().is_none() {
        return Err(DocumentsError::DocumentName { path: path.into() });
    }
    let bytes = read_bytes(path, DOCUMENT_LIMIT)?;
    document(path, Format::of_name(path).unwrap_or(Format::Text), bytes)
}

impl Document {
    /// Bytes of a document at most.
    pub const LIMIT: u64 = DOCUMENT_LIMIT;

    /// A document whose bytes came by another way than as a file; its name tells its format.
    ///
    /// # Errors
    /// As [`read_document`], and [`DocumentsError::UnsupportedDocument`] for a format that is not read.
    pub fn from_bytes(name: &Path, bytes: Vec<u8>) -> Result<Document> {
        let Some(format) = Format::of_name(name) else {
            let ending = name.extension().map(|ending| format!(".{}", ending.to_string_lossy()));
            let found = ending.unwrap_or_else(|| "no extension".into());
            return Err(DocumentsError::UnsupportedDocument { path: name.into(), found });
        };
        if bytes.len() as u64 > DOCUMENT_LIMIT {
            let found = bytes.len() as u64;
            return Err(DocumentsError::DocumentTooLarge { path: name.into(), found, limit: DOCUMENT_LIMIT });
        }
        document(name, format, bytes)
    }
}

fn document(path: &Path, format: Format, bytes: Vec<u8>) -> Result<Document> {
    let text = decode(path, bytes)?;
    if text.trim_start_matches('\u{feff}').trim().is_empty() {
        let found = if text.is_empty() { "no bytes" } else { "only white space" };
        return Err(DocumentsError::EmptyDocument { path: path.into(), found });
    }
    Ok(Document { path: path.into(), text, format })
}

/// A regular file's bytes, without waiting for whoever fills a pipe that has come in its place, and without end.
fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let failed = |source| DocumentsError::Io { action: "read", path: path.into(), source };
    let options = std::fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = options.map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(DocumentsError::UnsupportedDocument { path: path.into(), found: "no regular file".into() });
    }
    let mut bytes = Vec::new();
    if metadata.len() <= limit {
        file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    }
    let found = metadata.len().max(bytes.len() as u64);
    if found > limit {
        return Err(DocumentsError::DocumentTooLarge { path: path.into(), found, limit });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    fn problem(path: &Path) -> String {
        let found = discover(&[path.into()]);
        assert!(found.documents.is_empty() && found.problems.len() == 1, "{found:?}");
        found.problems[0].1.to_string()
    }

    #[test]
    fn folders_are_searched_to_every_depth_and_what_is_left_out_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b/.git")).unwrap();
        for name in ["z.md", "a/one.txt", "a/b/two.MD", "a/b/.git/x.txt", "a/image.png", ".hidden.md"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        symlink(dir.path(), dir.path().join("a/loop")).unwrap();
        symlink("self.txt", dir.path().join("self.txt")).unwrap();
        symlink("/dev/zero", dir.path().join("endless.txt")).unwrap();
        symlink(dir.path().join("z.md"), dir.path().join("y.md")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket.txt")).unwrap();
        let root = dir.path().canonicalize().unwrap();
        let found = discover(&[dir.path().into(), dir.path().join("a/one.txt")]);
        assert_eq!(found.documents, ["a/b/two.MD", "a/one.txt", "y.md", "z.md"].map(|n| root.join(n)));
        assert_eq!(found.named, [root.join("a/one.txt")]);
        assert!(found.problems.is_empty(), "{found:?}");
        assert_eq!(found.skipped, Skipped { hidden: 2, other_formats: 1, links: 3, special: 1, empty: 0 });
    }

    #[test]
    fn what_cannot_be_found_is_named_and_the_rest_is_found() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["good.md", "a.pdf"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        std::fs::create_dir(dir.path().join("nothing")).unwrap();
        let paths = ["absent.md", "a.pdf", "good.md", "nothing"].map(|name| dir.path().join(name));
        let found = discover(&paths);
        assert_eq!(found.documents, [paths[2].canonicalize().unwrap()]);
        let named: Vec<_> = found.problems.iter().map(|(path, _)| path).collect();
        assert_eq!(named, [&paths[0], &paths[1], &paths[3]]);
    }

    #[test]
    fn what_is_no_document_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let error = problem(&write("a.pdf", b"x"));
        assert!(error.contains("a.pdf") && error.contains("found .pdf"), "{error}");
        assert!(problem(&dir.path().join("absent.md")).contains("absent.md"));
        let error = read_document(&write("latin1.txt", b"caf\xe9 noir")).unwrap_err().to_string();
        assert!(error.contains("latin1.txt") && error.contains("offset 3"), "{error}");
        let error = read_document(&write("empty.md", b"")).unwrap_err().to_string();
        assert!(error.contains("empty.md") && error.contains("no bytes"), "{error}");
        let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.txt"));
        std::fs::write(&odd, "text").unwrap();
        assert!(matches!(read_document(&odd), Err(DocumentsError::DocumentName { .. })));
        assert!(problem(Path::new("/dev/null")).contains("no regular file"));
        for blank in [&b" \n\t"[..], b"\xef\xbb\xbf\n"] {
            let error = read_document(&write("blank.md", blank)).unwrap_err().to_string();
            assert!(error.contains("only white space"), "{error}");
        }
    }

    #[test]
    fn neither_pipes_nor_endless_nor_huge_files_hang() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe.txt");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for path in [pipe.as_path(), Path::new("/dev/zero")] {
            let error = read_document(path).unwrap_err().to_string();
            assert!(error.contains("no regular file"), "{error}");
        }
        let huge = dir.path().join("huge.txt");
        std::fs::File::create(&huge).unwrap().set_len(1 << 40).unwrap();
        let error = read_document(&huge).unwrap_err().to_string();
        assert!(error.contains("huge.txt") && error.contains("1099511627776") && error.contains("split"), "{error}");
        std::fs::write(&huge, "abcd").unwrap();
        assert!(matches!(read_bytes(&huge, 3), Err(DocumentsError::DocumentTooLarge { found: 4, limit: 3, .. })));
        assert_eq!(read_bytes(&huge, 4).unwrap(), b"abcd");
    }
}
