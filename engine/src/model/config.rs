//! Typed access to the fields of a JSON object, with errors that name file, field, expectation and finding.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{EngineError, Result};

/// A JSON object of a file. A field that is `null` counts as absent, except for [`Fields::has`].
pub(crate) struct Fields {
    file: PathBuf,
    prefix: String,
    object: Map<String, Value>,
}

impl Fields {
    /// Reads the object in the file at `path`.
    pub(crate) fn read(path: &Path, needed_for: &'static str) -> Result<Fields> {
        let bytes = std::fs::read(path).map_err(|e| EngineError::reading(path, e, needed_for))?;
        let malformed = |found: String| EngineError::Config {
            file: path.to_path_buf(),
            field: "(the whole file)".into(),
            expected: "a JSON object".into(),
            found,
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Fields { file: path.to_path_buf(), prefix: String::new(), object }),
            Ok(other) => Err(malformed(brief(&other))),
            Err(error) => Err(malformed(format!("{} bytes that do not parse: {error}", bytes.len()))),
        }
    }

    /// The error that `field` holds something other than `expected`.
    pub(crate) fn wrong(&self, field: &str, expected: &str) -> EngineError {
        EngineError::Config {
            file: self.file.clone(),
            field: format!("{}{field}", self.prefix),
            expected: expected.to_string(),
            found: self.object.get(field).map_or_else(|| "no such field".into(), brief),
        }
    }

    /// Whether the field is there, even as `null`.
    pub(crate) fn has(&self, field: &str) -> bool {
        self.object.contains_key(field)
    }

    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    pub(crate) fn nested(&self, field: &str) -> Result<Option<Fields>> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(object)) => {
                let prefix = format!("{}{field}.", self.prefix);
                Ok(Some(Fields { file: self.file.clone(), prefix, object: object.clone() }))
            }
            Some(_) => Err(self.wrong(field, "an object or null")),
        }
    }

    pub(crate) fn optional_size(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else {
            return Ok(None);
        };
        // The bound keeps products of two sizes, in bytes, far from overflow.
        match value.as_u64() {
            Some(n @ 1..=0x4000_0000) => Ok(Some(n as usize)),
            _ => Err(self.wrong(field, "a whole number from 1 to 2^30")),
        }
    }

    /// The field as a size, where it is one.
    pub(crate) fn get_size(&self, field: &str) -> Option<usize> {
        self.optional_size(field).ok().flatten()
    }

    /// A whole number, which may be 0.
    pub(crate) fn whole_or(&self, field: &str, default: usize) -> Result<usize> {
        match self.get(field).map(Value::as_u64) {
            None => Ok(default),
            Some(Some(n @ 0..=0x4000_0000)) => Ok(n as usize),
            Some(_) => Err(self.wrong(field, "a whole number from 0 to 2^30")),
        }
    }

    pub(crate) fn size_or(&self, field: &str, default: usize) -> Result<usize> {
        Ok(self.optional_size(field)?.unwrap_or(default))
    }

    pub(crate) fn size(&self, field: &str) -> Result<usize> {
        self.optional_size(field)?.ok_or_else(|| self.wrong(field, "a whole number from 1 to 2^30"))
    }

    pub(crate) fn number_or(&self, field: &str, default: f64) -> Result<f64> {
        match self.get(field).map(Value::as_f64) {
            None => Ok(default),
            Some(Some(number)) if number.is_finite() => Ok(number),
            Some(_) => Err(self.wrong(field, "a number")),
        }
    }

    /// A required number above zero.
    pub(crate) fn positive(&self, field: &str) -> Result<f64> {
        match self.number_or(field, 0.0)? {
            number if number > 0.0 => Ok(number),
            _ => Err(self.wrong(field, "a number above 0")),
        }
    }

    pub(crate) fn flag_or(&self, field: &str, default: bool) -> Result<bool> {
        match self.get(field) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(field, "true or false")),
        }
    }

    /// A token id or a list of them; `None` when the field is absent, empty when it is `null`. Ids that none of `vocab` tokens
    /// has are left out with a warning, as no model gives them: transformers takes such files too.
    pub(crate) fn token_ids(&self, field: &str, vocab: usize) -> Result<Option<Vec<u32>>> {
        let values = match self.object.get(field) {
            None => return Ok(None),
            Some(Value::Null) => return Ok(Some(Vec::new())),
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
        };
        let stated: Option<Vec<i128>> =
            values.iter().map(|v| v.as_u64().map(i128::from).or(v.as_i64().map(i128::from))).collect();
        let stated = stated.ok_or_else(|| self.wrong(field, "a token id, or a list of them"))?;
        let (ids, absent): (Vec<i128>, Vec<i128>) =
            stated.into_iter().partition(|id| (0..vocab.min(u32::MAX as usize) as i128).contains(id));
        if !absent.is_empty() {
            let file = self.file.display();
            tracing::warn!(%file, field, ?absent, vocab_size = vocab, "left out: no token has these ids");
        }
        Ok(Some(ids.into_iter().map(|id| id as u32).collect()))
    }
}

/// The value as JSON, cut to a length that suits a message.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
