//! Searching a vector store.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use super::super::admission::Received;
use super::super::fields::Fields;
use super::super::files::{Answer, blocking};
use super::super::state::App;
use super::super::values::{boolean, cut, invalid, query, share, size};
use super::filters;
use service::{StoreHit, StoreSearch};
use settings::{QuireError, Result};

/// Results at most, and where nothing is said, as in OpenAI's API.
const MOST_RESULTS: usize = 50;
const USUAL_RESULTS: usize = 10;
/// Queries of one search at most.
const MOST_QUERIES: usize = 16;

pub(super) async fn search(State(app): State<App>, Path(store): Path<String>, received: Received) -> Answer {
    let Received { service, body } = received;
    let search = read(&body.bytes)?;
    drop(body);
    let queries = search.queries.clone();
    // Where the client hangs up, this function is dropped here, and nobody waits any more.
    let waits = Arc::new(());
    let gone = Arc::downgrade(&waits);
    // Fails only for a closed semaphore, and nobody closes it.
    let turn = Arc::clone(app.preparing()).acquire_owned().await.ok();
    let hits = blocking(move || {
        let hits = service.search_store(&store, &search, &|| gone.strong_count() > 0);
        drop(turn);
        hits
    });
    let found = hits.await?;
    drop(waits);
    let data: Vec<Value> = found.hits.iter().map(object).collect();
    Ok(Json(json!({"object": "vector_store.search_results.page", "search_query": queries, "data": data,
                   "has_more": found.has_more, "next_page": null})))
}

/// A result in OpenAI's shape, with the passage's place in its document beside the usual fields.
fn object(hit: &StoreHit) -> Value {
    json!({
        "file_id": hit.file, "filename": hit.filename, "score": hit.score, "attributes": hit.attributes,
        "content": [{"type": "text", "text": hit.found.passage}],
        "span": hit.found.span, "line": hit.found.line, "page": hit.found.page,
    })
}

fn read(body: &[u8]) -> Result<StoreSearch> {
    let known = "a search takes query, filters, max_num_results, ranking_options and rewrite_query";
    let mut fields = Fields::read(body, known)?;
    let queries = queries(&fields.take("query").unwrap_or(Value::Null))?;
    let limit = match fields.take("max_num_results") {
        None => USUAL_RESULTS,
        Some(value) => size("max_num_results", &value, 1)?,
    };
    if limit > MOST_RESULTS {
        return Err(invalid("max_num_results", format!("expected 1 to {MOST_RESULTS}, found {limit}")));
    }
    let filter = fields.take("filters").map(|value| filters::read("filters", value)).transpose()?;
    let score_threshold = fields.take("ranking_options").map(ranking).transpose()?.unwrap_or(0.0);
    if fields.take("rewrite_query").map_or(Ok(false), |value| boolean("rewrite_query", &value))? {
        let hint = "only false: what is asked is searched for as it stands";
        return Err(QuireError::UnsupportedParameter { param: "rewrite_query".into(), hint });
    }
    fields.finish()?;
    Ok(StoreSearch { queries, filter, limit, score_threshold })
}

fn queries(given: &Value) -> Result<Vec<String>> {
    match given {
        Value::Array(items) if (1..=MOST_QUERIES).contains(&items.len()) => {
            items.iter().enumerate().map(|(index, item)| query(&format!("query[{index}]"), item)).collect()
        }
        Value::Array(items) => {
            Err(invalid("query", format!("expected 1 to {MOST_QUERIES} queries, found {}", items.len())))
        }
        Value::Null => Err(invalid("query", "expected it to be given, found nothing".into())),
        other => Ok(vec![query("query", other)?]),
    }
}

/// The score below which passages are left out. There is one way of ranking, which all of OpenAI's names mean.
fn ranking(value: Value) -> Result<f32> {
    let mut fields = Fields::within("ranking_options", value, "ranking_options takes ranker and score_threshold")?;
    match fields.text("ranker")?.as_deref() {
        None | Some("none" | "auto" | "default-2024-11-15") => {}
        Some(other) => {
            let problem = format!("expected none, auto or default-2024-11-15, found `{}`", cut(other));
            return Err(invalid("ranking_options.ranker", problem));
        }
    }
    let threshold = fields.take("score_threshold");
    let threshold = threshold.map(|value| share("ranking_options.score_threshold", &value)).transpose()?;
    fields.finish()?;
    Ok(threshold.unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::values::param_of;

    #[test]
    fn a_search_is_read_with_what_it_leaves_open() {
        let read = |body: Value| read(body.to_string().as_bytes()).unwrap();
        let plain = StoreSearch { queries: vec!["lamp".into()], filter: None, limit: 10, score_threshold: 0.0 };
        assert_eq!(read(json!({"query": "lamp"})), plain);
        let all = read(json!({"query": ["a", "b"], "max_num_results": 50, "rewrite_query": false,
                              "ranking_options": {"ranker": "auto", "score_threshold": 0.5}}));
        assert_eq!((all.queries.len(), all.limit, all.score_threshold), (2, 50, 0.5));
    }

    #[test]
    fn what_is_wrong_with_a_search_is_named() {
        for (body, place) in [
            (json!({}), "query"),
            (json!({"query": " "}), "query"),
            (json!({"query": "\u{fdfa}".repeat(100_000)}), "query"),
            (json!({"query": []}), "query"),
            (json!({"query": ["a", ""]}), "query[1]"),
            (json!({"query": 3}), "query"),
            (json!({"query": "a", "max_num_results": 51}), "max_num_results"),
            (json!({"query": "a", "max_num_results": 0}), "max_num_results"),
            (json!({"query": "a", "rewrite_query": true}), "rewrite_query"),
            (json!({"query": "a", "ranking_options": {"ranker": "x"}}), "ranking_options.ranker"),
            (json!({"query": "a", "ranking_options": {"score_threshold": 2}}), "ranking_options.score_threshold"),
            (json!({"query": "a", "ranking_options": {"hybrid_search": {}}}), "ranking_options.hybrid_search"),
            (json!({"query": "a", "magic": 1}), "magic"),
        ] {
            assert_eq!(param_of(read(body.to_string().as_bytes()).unwrap_err()), place, "{body}");
        }
    }
}
