//! The fields of a request's JSON object, taken one by one; whatever is left is refused by name.

use serde_json::{Map, Value};

use super::values::{brief, cut, invalid, text};
use settings::{QuireError, Result};

/// Pairs that clients may keep at a thing, and how long their names and texts may be, as in OpenAI's API.
const MOST_PAIRS: usize = 16;
const LONGEST_KEY: usize = 64;
const LONGEST_VALUE: usize = 512;

/// Fields of an object that nobody has taken yet.
pub(super) struct Fields {
    /// What stands before the names of fields in errors.
    prefix: String,
    fields: Map<String, Value>,
    /// What there is to be taken.
    known: &'static str,
}

impl Fields {
    /// Reads a body; `known` says which fields there are. No body is an object without fields.
    pub(super) fn read(body: &[u8], known: &'static str) -> Result<Fields> {
        if body.is_empty() {
            return Ok(Fields { prefix: String::new(), fields: Map::new(), known });
        }
        let value = serde_json::from_slice(body).map_err(|e| invalid("body", format!("expected JSON: {e}")))?;
        Fields::of("body", String::new(), value, known)
    }

    /// The fields of an object within a body.
    pub(super) fn within(name: &str, value: Value, known: &'static str) -> Result<Fields> {
        Fields::of(name, format!("{name}."), value, known)
    }

    fn of(name: &str, prefix: String, value: Value, known: &'static str) -> Result<Fields> {
        match value {
            Value::Object(fields) => Ok(Fields { prefix, fields, known }),
            other => Err(invalid(name, format!("expected an object, found {}", brief(&other)))),
        }
    }

    /// The name of a field in errors.
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// A field, if it is given and not null.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.given(key).flatten()
    }

    /// A field, if it is given; `Some(None)`: as null.
    pub(super) fn given(&mut self, key: &str) -> Option<Option<Value>> {
        let value = self.fields.remove(key)?;
        Some(Some(value).filter(|value| !value.is_null()))
    }

    /// A text, if it is given.
    pub(super) fn text(&mut self, key: &str) -> Result<Option<String>> {
        let name = self.name(key);
        self.take(key).map(|value| text(&name, &value)).transpose()
    }

    /// A text that must be given.
    pub(super) fn required(&mut self, key: &str) -> Result<String> {
        let name = self.name(key);
        self.text(key)?.ok_or_else(|| invalid(&name, "expected it to be given, found nothing".into()))
    }

    /// A list, if it is given.
    pub(super) fn list(&mut self, key: &str) -> Result<Option<Vec<Value>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(invalid(&self.name(key), format!("expected a list, found {}", brief(&other)))),
        }
    }

    /// Refuses what nobody has taken.
    pub(super) fn finish(self) -> Result<()> {
        match self.fields.keys().next() {
            Some(key) => {
                let param = format!("{}{}", self.prefix, cut(key));
                Err(QuireError::UnsupportedParameter { param, hint: self.known })
            }
            None => Ok(()),
        }
    }
}

/// Pairs of names and texts, numbers, true or false that a client keeps at a file of a vector store.
pub(super) fn attributes(name: &str, value: Value) -> Result<Map<String, Value>> {
    let scalar = |value: &Value| value.is_string() || value.is_number() || value.is_boolean();
    pairs(name, value, "a text, a number, true or false", &scalar)
}

/// Pairs of names and texts that a client keeps at a vector store.
pub(super) fn metadata(name: &str, value: Value) -> Result<Map<String, Value>> {
    pairs(name, value, "a text", &Value::is_string)
}

fn pairs(name: &str, value: Value, expected: &str, fits: &dyn Fn(&Value) -> bool) -> Result<Map<String, Value>> {
    let Value::Object(pairs) = value else {
        return Err(invalid(name, format!("expected an object, found {}", brief(&value))));
    };
    if pairs.len() > MOST_PAIRS {
        return Err(invalid(name, format!("expected at most {MOST_PAIRS} pairs, found {}", pairs.len())));
    }
    for (key, value) in &pairs {
        let place = format!("{name}.{}", cut(key));
        if key.chars().count() > LONGEST_KEY {
            let problem = format!("expected a name of at most {LONGEST_KEY} characters, found {}", key.chars().count());
            return Err(invalid(&place, problem));
        }
        if !fits(value) {
            return Err(invalid(&place, format!("expected {expected}, found {}", brief(value))));
        }
        let length = value.as_str().map_or(0, |text| text.chars().count());
        if length > LONGEST_VALUE {
            return Err(invalid(&place, format!("expected at most {LONGEST_VALUE} characters, found {length}")));
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::values::param_of as param;
    use serde_json::json;

    #[test]
    fn fields_that_nobody_takes_are_refused_by_name() {
        let mut fields = Fields::read(br#"{"name": "a", "x": null, "inner": {"y": 1, "z": 2}}"#, "name, x").unwrap();
        assert_eq!((fields.text("name").unwrap().as_deref(), fields.given("x")), (Some("a"), Some(None)));
        let inner = fields.take("inner").unwrap();
        fields.finish().unwrap();
        let mut inner = Fields::within("inner", inner, "y").unwrap();
        assert_eq!(inner.take("y"), Some(json!(1)));
        assert_eq!(param(inner.finish().unwrap_err()), "inner.z");
        assert_eq!(param(Fields::read(b"[]", "").err().unwrap()), "body");
        assert_eq!(param(Fields::read(b"{", "").err().unwrap()), "body");
        assert_eq!(param(Fields::read(b"{}", "").unwrap().required("name").unwrap_err()), "name");
        Fields::read(b"", "").unwrap().finish().unwrap();
    }

    #[test]
    fn pairs_are_few_and_short() {
        attributes("attributes", json!({"a": "b", "n": 1.5, "t": true})).unwrap();
        metadata("metadata", json!({"a": "x".repeat(512), "k".repeat(64): ""})).unwrap();
        let many: Map<String, Value> = (0..17).map(|i| (i.to_string(), json!("x"))).collect();
        for (value, name) in [
            (json!("x"), "m"),
            (Value::Object(many), "m"),
            (json!({"a": 1}), "m.a"),
            (json!({"a": "é".repeat(513)}), "m.a"),
            (json!({"k": null}), "m.k"),
        ] {
            assert_eq!(param(metadata("m", value).unwrap_err()), name);
        }
        assert_eq!(param(attributes("m", json!({"a": ["x"]})).unwrap_err()), "m.a");
        assert!(param(attributes("m", json!({"k".repeat(65): 1})).unwrap_err()).starts_with("m.kkk"));
    }
}
