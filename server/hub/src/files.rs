//! Of which files a model consists.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

use crate::error::{HubError, Result};

/// Files beside the weights that are read, those that must be there first.
pub(super) const BESIDE_WEIGHTS: [&str; 9] = [
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
    "prompt.json",
];

/// How many of [`BESIDE_WEIGHTS`] must be there.
pub(super) const REQUIRED: usize = 2;

/// Weights in one file. Where it is, no shards are read.
pub(super) const SINGLE: &str = "model.safetensors";

/// Says which tensor is in which shard.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// Refuses a name of a file that is not one of a plain file in a folder. `origin`: who named it.
///
/// # Errors
/// [`HubError::FileName`].
pub(super) fn check_name(name: &str, origin: &str) -> Result<()> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '=' | ' ' | '(' | ')' | ',');
    if name.is_empty() || name.len() > 255 || name.starts_with('.') || !name.chars().all(plain) {
        return Err(HubError::FileName { origin: origin.into(), name: name.into() });
    }
    Ok(())
}

/// Refuses a path in a repository that leads out of it. Most files of a repository are not fetched, but a list that
/// names such a path is not one to trust.
///
/// # Errors
/// [`HubError::FileName`].
pub(super) fn check_path(path: &str, origin: &str) -> Result<()> {
    let leads_out = |part: &str| matches!(part, "" | "." | "..") || part.contains(['\\', '\0']);
    if path.split('/').any(leads_out) {
        return Err(HubError::FileName { origin: origin.into(), name: path.into() });
    }
    Ok(())
}

/// The shards that an index names.
///
/// # Errors
/// An index that cannot be read or names no files; [`HubError::FileName`].
pub(super) fn shards(index: &Path) -> Result<Vec<String>> {
    let text = std::fs::read(index).map_err(|source| HubError::Io {
        action: "read the index of weights",
        path: index.into(),
        source,
    })?;
    let wrong = |found: String| HubError::Protocol {
        url: index.display().to_string(),
        expected: "a JSON object whose `weight_map` names a file for every tensor",
        found,
    };
    let parsed: Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
    let map = parsed["weight_map"].as_object().ok_or_else(|| wrong("no `weight_map`".into()))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().ok_or_else(|| wrong(format!("{file} for {tensor}")))?;
        check_name(file, &index.display().to_string())?;
        names.insert(file.to_string());
    }
    Ok(names.into_iter().collect())
}

/// The first file that a model's folder lacks.
///
/// # Errors
/// As [`shards`].
pub(super) fn missing(folder: &Path) -> Result<Option<String>> {
    // A link whose blob has gone is no file.
    let lacks = |name: &str| !folder.join(name).is_file();
    if let Some(name) = BESIDE_WEIGHTS[..REQUIRED].iter().find(|name| lacks(name)) {
        return Ok(Some((*name).into()));
    }
    if !lacks(SINGLE) {
        return Ok(None);
    }
    if lacks(INDEX) {
        return Ok(Some(SINGLE.into()));
    }
    Ok(shards(&folder.join(INDEX))?.into_iter().find(|name| lacks(name)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn only_names_of_plain_files_pass() {
        for name in ["model.safetensors", "model-00001-of-00002.safetensors", "chat_template.jinja", "a b (1).json"] {
            check_name(name, "x").unwrap();
        }
        for name in ["", "..", "../x", "a/b", "/etc/passwd", "a\\b", ".hidden", "x\0", "x\n", "c:x"] {
            assert!(check_name(name, "the hub").unwrap_err().to_string().contains("the hub names the file"));
        }
    }

    #[test]
    fn paths_stay_in_their_repository() {
        for path in [".gitattributes", "onnx/model.onnx", "what's up [1]?.png", "a/..b/c"] {
            check_path(path, "x").unwrap();
        }
        for path in ["../x", "a/../../x", "/etc/passwd", "a//b", "./x", "a\\..\\b", ""] {
            assert!(check_path(path, "x").unwrap_err().to_string().contains("refused"), "{path}");
        }
    }

    #[test]
    fn a_folder_is_complete_with_every_shard() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let missing = || missing(dir.path()).unwrap();
        assert_eq!(missing().unwrap(), "config.json");
        put("config.json", "{}");
        assert_eq!(missing().unwrap(), "tokenizer.json");
        put("tokenizer.json", "{}");
        assert_eq!(missing().unwrap(), "model.safetensors");
        put(INDEX, r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"}}"#);
        put("m-1.safetensors", "");
        assert_eq!(missing().unwrap(), "m-2.safetensors");
        put("m-2.safetensors", "");
        assert_eq!(missing(), None);
    }

    #[test]
    fn an_index_names_no_file_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let index = dir.path().join(INDEX);
        std::fs::write(&index, r#"{"weight_map": {"a": "../../x.safetensors"}}"#).unwrap();
        assert!(shards(&index).unwrap_err().to_string().contains("../../x.safetensors"));
        std::fs::write(&index, r#"{"weights": {}}"#).unwrap();
        assert!(shards(&index).unwrap_err().to_string().contains("weight_map"));
    }
}
