//! Tests that cross crates, in `tests/`; and what those share that read the source tree.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// The root of the source tree.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// All files below `dir` with this ending, as (path from the root, text); those of builds and hidden folders left out.
///
/// # Panics
/// There is none, or one cannot be read.
#[must_use]
pub fn files(dir: &str, ending: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(dir)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().to_string();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    folders.push(path);
                }
            } else if name.ends_with(ending) {
                let relative = path.strip_prefix(root()).unwrap().to_string_lossy().to_string();
                found.push((relative, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!found.is_empty(), "no {ending} below {dir}");
    found
}

/// The part of a file before its unit tests.
#[must_use]
pub fn without_tests(text: &str) -> &str {
    text.find("\n#[cfg(test)]\nmod ").or_else(|| text.find("\n#[cfg(test)]\n#[path")).map_or(text, |at| &text[..at])
}

/// Whether a file holds nothing but tests.
#[must_use]
pub fn is_test_file(path: &str) -> bool {
    path.ends_with("tests.rs")
        || path.contains("/tests/")
        || path.ends_with("properties.rs")
        || path.ends_with("suite.rs")
        || path.contains("/suite/")
}

/// Fails a test that has found offences against a rule.
///
/// # Panics
/// There are some.
pub fn complain(offences: &[String], rule: &str) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}
