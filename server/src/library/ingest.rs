//! From paths to texts: which files are documents, and what is in them.

use std::path::{Path, PathBuf};

use super::split::Format;
use crate::error::{QuireError, Result};

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

fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
        "txt" | "text" => Some(Format::Text),
        "md" | "markdown" => Some(Format::Markdown),
        _ => None,
    }
}

/// The documents at `paths`, sorted and without repetition: files as named, folders searched to every depth. In
/// folders, hidden entries, other formats and links to folders are left out.
///
/// # Errors
/// [`QuireError::Io`] for what cannot be read, [`QuireError::UnsupportedDocument`] for a file in another format that
/// was named itself, [`QuireError::NoDocuments`] if nothing is found.
pub fn discover(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in paths {
        let absolute =
            path.canonicalize().map_err(|source| QuireError::Io { action: "read", path: path.clone(), source })?;
        let before = found.len();
        if absolute.is_dir() {
            walk(&absolute, &mut found)?;
            if found.len() == before {
                return Err(QuireError::NoDocuments { path: path.clone() });
            }
        } else if !absolute.is_file() {
            return Err(QuireError::UnsupportedDocument { path: path.clone(), found: "no regular file".into() });
        } else if format_of(&absolute).is_some() {
            found.push(absolute);
        } else {
            let found = match absolute.extension() {
                Some(extension) => format!(".{}", extension.to_string_lossy()),
                None => "no extension".into(),
            };
            return Err(QuireError::UnsupportedDocument { path: path.clone(), found });
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |source| QuireError::Io { action: "read the folder", path: folder.to_path_buf(), source };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            walk(&path, found)?;
        } else if path.is_file() && format_of(&path).is_some() {
            found.push(path);
        }
    }
    Ok(())
}

/// Reads one document.
///
/// # Errors
/// [`QuireError::Io`], [`QuireError::DocumentName`], [`QuireError::NotUtf8`] with the offset of the first bad byte,
/// [`QuireError::EmptyDocument`].
pub fn read_document(path: &Path) -> Result<Document> {
    // A collection knows documents by their names as text.
    if path.to_str().is_none() {
        return Err(QuireError::DocumentName { path: path.into() });
    }
    let bytes = std::fs::read(path).map_err(|source| QuireError::Io { action: "read", path: path.into(), source })?;
    let text = String::from_utf8(bytes)
        .map_err(|e| QuireError::NotUtf8 { path: path.into(), offset: e.utf8_error().valid_up_to() })?;
    if text.trim().is_empty() {
        let found = if text.is_empty() { "no bytes" } else { "only white space" };
        return Err(QuireError::EmptyDocument { path: path.into(), found });
    }
    let format = format_of(path).unwrap_or(Format::Text);
    Ok(Document { path: path.into(), text, format })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn folders_are_searched_to_every_depth_and_other_files_left_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b/.git")).unwrap();
        for name in ["z.md", "a/one.txt", "a/b/two.MD", "a/b/.git/x.txt", "a/image.png", ".hidden.md"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let root = dir.path().canonicalize().unwrap();
        let found = discover(&[dir.path().into(), dir.path().join("a/one.txt")]).unwrap();
        assert_eq!(found, ["a/b/two.MD", "a/one.txt", "z.md"].map(|n| root.join(n)));
    }

    #[test]
    fn what_is_no_document_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let error = discover(&[write("a.pdf", b"x")]).unwrap_err().to_string();
        assert!(error.contains("a.pdf") && error.contains("found .pdf"), "{error}");
        let error = discover(&[dir.path().join("absent.md")]).unwrap_err().to_string();
        assert!(error.contains("absent.md"), "{error}");
        let error = read_document(&write("latin1.txt", b"caf\xe9 noir")).unwrap_err().to_string();
        assert!(error.contains("latin1.txt") && error.contains("offset 3"), "{error}");
        let error = read_document(&write("empty.md", b"")).unwrap_err().to_string();
        assert!(error.contains("empty.md") && error.contains("no bytes"), "{error}");
        let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"caf\xe9.txt"));
        std::fs::write(&odd, "text").unwrap();
        assert!(matches!(read_document(&odd), Err(QuireError::DocumentName { .. })));
        let error = discover(&["/dev/null".into()]).unwrap_err().to_string();
        assert!(error.contains("no regular file"), "{error}");
        let error = read_document(&write("blank.md", b" \n\t")).unwrap_err().to_string();
        assert!(error.contains("only white space"), "{error}");
    }
}
