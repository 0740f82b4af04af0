//! Lists over HTTP: what of them is asked for, and how a page of them is answered.

use axum::http::Uri;
use serde_json::{Value, json};

use super::values::{cut, invalid};
use service::{Page, PageRequest};
use settings::{QuireError, Result};

/// Characters of an id that a cursor may have.
const LONGEST_CURSOR: usize = 128;

/// The parameters of a request's address.
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    pub(super) fn of(uri: &Uri) -> Result<Query> {
        let pairs = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(uri);
        let pairs = pairs.map_err(|e| invalid("query", format!("expected parameters as of a form: {e}")))?;
        Ok(Query(pairs.0))
    }

    /// A parameter, if it is given and not empty. Given twice, it is refused.
    pub(super) fn take(&mut self, key: &str) -> Result<Option<String>> {
        let given: Vec<String> =
            self.0.iter().filter(|(name, _)| name == key).map(|(_, value)| value.clone()).collect();
        self.0.retain(|(name, _)| name != key);
        match <[String; 1]>::try_from(given) {
            Ok([value]) => Ok(Some(value).filter(|value| !value.is_empty())),
            Err(none) if none.is_empty() => Ok(None),
            Err(many) => Err(invalid(key, format!("expected it once, found it {} times", many.len()))),
        }
    }

    /// One of a few words, if it is given.
    pub(super) fn word(&mut self, key: &str, words: &[&'static str]) -> Result<Option<&'static str>> {
        let Some(given) = self.take(key)? else { return Ok(None) };
        let known = words.iter().find(|word| **word == given).copied();
        let problem = || invalid(key, format!("expected {}, found `{}`", words.join(", "), cut(&given)));
        known.map(Some).ok_or_else(problem)
    }

    /// The page that is asked for, of `default` items where nothing is said and of `most` at most.
    pub(super) fn page(&mut self, default: usize, most: usize) -> Result<PageRequest> {
        let limit = match self.take("limit")? {
            None => default,
            Some(text) => text.parse().ok().filter(|limit| (1..=most).contains(limit)).ok_or_else(|| {
                invalid("limit", format!("expected a whole number from 1 to {most}, found `{}`", cut(&text)))
            })?,
        };
        let newest_first = self.word("order", &["desc", "asc"])? != Some("asc");
        Ok(PageRequest { after: self.cursor("after")?, before: self.cursor("before")?, limit, newest_first })
    }

    fn cursor(&mut self, key: &str) -> Result<Option<String>> {
        let Some(id) = self.take(key)? else { return Ok(None) };
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if id.len() > LONGEST_CURSOR || !id.chars().all(plain) {
            return Err(invalid(key, format!("expected the id of an item of this list, found `{}`", cut(&id))));
        }
        Ok(Some(id))
    }

    /// Refuses what nobody has taken; `known` says what there is.
    pub(super) fn finish(self, known: &'static str) -> Result<()> {
        match self.0.first() {
            Some((key, _)) => Err(QuireError::UnsupportedParameter { param: cut(key), hint: known }),
            None => Ok(()),
        }
    }
}

/// A page in OpenAI's shape.
pub(super) fn list(page: &Page<Value>) -> Value {
    let id = |item: Option<&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    json!({"object": "list", "data": page.data, "first_id": id(page.data.first()), "last_id": id(page.data.last()),
           "has_more": page.has_more})
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn page(query: &str) -> std::result::Result<PageRequest, String> {
        let read = || {
            let mut query = Query::of(&format!("/v1/files?{query}").parse().unwrap())?;
            let page = query.page(20, 100)?;
            query.finish("after, before, limit, order")?;
            Ok(page)
        };
        read().map_err(crate::values::param_of)
    }

    #[test]
    fn what_is_asked_for_is_read_or_refused_by_name() {
        let plain = PageRequest { after: None, before: None, limit: 20, newest_first: true };
        assert_eq!(page("").unwrap(), plain);
        assert_eq!(page("after=&order=desc").unwrap(), plain);
        let all = PageRequest { after: Some("file-1".into()), before: Some("b".into()), limit: 7, newest_first: false };
        assert_eq!(page("after=file-1&before=b&limit=7&order=asc").unwrap(), all);
        for (query, param) in [
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=x", "limit"),
            ("limit=1&limit=2", "limit"),
            ("order=up", "order"),
            ("after=a%2Fb", "after"),
            ("magic=1", "magic"),
        ] {
            assert_eq!(page(query).unwrap_err(), param, "{query}");
        }
    }
}
