//! Names of models on the hub.

use std::fmt;
use std::str::FromStr;

/// Where a repository's current state is found when no revision is named.
const DEFAULT_REVISION: &str = "main";

/// `owner/name`, or `owner/name@revision` with a branch, tag or commit. Its parts are safe as parts of paths and URLs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    owner: String,
    name: String,
    revision: Option<String>,
}

impl ModelId {
    /// `owner/name`.
    #[must_use]
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    /// The revision; `main` where none was named.
    #[must_use]
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(DEFAULT_REVISION)
    }

    /// The name of the repository's folder in the cache.
    pub(super) fn folder(&self) -> String {
        format!("models--{}--{}", self.owner, self.name)
    }
}

impl FromStr for ModelId {
    type Err = String;

    fn from_str(text: &str) -> Result<ModelId, String> {
        let wrong = |why: &str| {
            format!(
                "expected OWNER/NAME or OWNER/NAME@REVISION as on the hub, for example Qwen/Qwen3-0.6B, found `{text}`: \
                 {why}"
            )
        };
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (owner, name) = repository.split_once('/').ok_or_else(|| wrong("there is no `/`"))?;
        if !is_part(owner) || !is_part(name) {
            return Err(wrong(
                "owner and name are 1 to 96 letters, digits, `-`, `_` or `.`, without `--` or `..`, and neither begin \
                 nor end with `-` or `.`",
            ));
        }
        if revision.is_some_and(|revision| !is_revision(revision)) {
            return Err(wrong("a revision is a branch, tag or commit"));
        }
        Ok(ModelId { owner: owner.into(), name: name.into(), revision: revision.map(Into::into) })
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)?;
        match &self.revision {
            Some(revision) => write!(f, "@{revision}"),
            None => Ok(()),
        }
    }
}

/// The hub's own rules; `--` separates owner and name in the cache.
fn is_part(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=96).contains(&part.len())
        && part.chars().all(allowed)
        && !part.starts_with(['-', '.'])
        && !part.ends_with(['-', '.'])
        && !part.contains("--")
        && !part.contains("..")
}

/// What Git allows of a branch or tag, and a little less.
fn is_revision(revision: &str) -> bool {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '/' | '=');
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.ends_with('.') && !part.contains("..");
    (1..=200).contains(&revision.len()) && revision.chars().all(allowed) && revision.split('/').all(part)
}

/// Whether `text` is the full hash of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_taken_apart_and_put_together_again() {
        let id: ModelId = "Qwen/Qwen3-0.6B".parse().unwrap();
        assert_eq!((id.repository().as_str(), id.revision()), ("Qwen/Qwen3-0.6B", "main"));
        assert_eq!(id.folder(), "models--Qwen--Qwen3-0.6B");
        let id: ModelId = "org/name@refs/pr/7".parse().unwrap();
        assert_eq!((id.to_string().as_str(), id.revision()), ("org/name@refs/pr/7", "refs/pr/7"));
    }

    #[test]
    fn nothing_that_leaves_its_folder_is_a_name() {
        for text in [
            "name",
            "",
            "/",
            "a/",
            "/a",
            "a/b/c",
            "../b",
            "a/..",
            "a/.b",
            "./b",
            "~/b",
            "a--b/c",
            "a/b--c",
            "a b/c",
            "a/b@",
            "a/b@..",
            "a/b@x/../y",
            "a/b@/x",
            "a/b@x/",
            "a/b@x?y",
            "a/b@.x",
            "a/b@x y",
            "a/b\n",
            "a\\b/c",
            "a/b@x%2f",
        ] {
            let refused = text.parse::<ModelId>().unwrap_err();
            assert!(refused.contains("OWNER/NAME"), "{refused}");
        }
    }

    #[test]
    fn commits_are_full_lower_case_hashes() {
        assert!(is_commit(&"0123456789abcdef".repeat(3)[..40]));
        assert!(!is_commit("main") && !is_commit(&"A".repeat(40)) && !is_commit(&"a".repeat(39)));
    }
}
