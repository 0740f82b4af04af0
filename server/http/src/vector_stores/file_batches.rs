//! Files that are attached to a vector store together.

use std::collections::HashSet;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::Uri;
use serde_json::{Value, json};

use super::super::admission::Received;
use super::super::fields::{Fields, attributes};
use super::super::files::{Answer, blocking};
use super::super::page::{Query, list};
use super::super::state::App;
use super::super::values::invalid;
use super::files::{MOST_FILES, attach_request, file_ids, object as file_object, state};
use super::{MOST, USUAL, chunking};
use service::{AttachRequest, Batch};
use settings::Result;

/// A batch in OpenAI's shape.
fn object(batch: &Batch) -> Value {
    json!({"id": batch.id, "object": "vector_store.files_batch", "created_at": batch.created,
           "vector_store_id": batch.store, "status": batch.state.name(), "file_counts": batch.files})
}

pub(super) async fn create(Path(store): Path<String>, received: Received) -> Answer {
    let Received { service, body } = received;
    let files = read(&body.bytes)?;
    Ok(Json(object(&blocking(move || service.attach_batch(&store, &files)).await?)))
}

/// The files of a batch, each with its place: `file_ids`, which share attributes and chunking, or `files` with their own.
fn read(body: &[u8]) -> Result<Vec<(String, AttachRequest)>> {
    let mut fields = Fields::read(body, "a file batch takes file_ids or files, attributes and chunking_strategy")?;
    let (ids, files) = (fields.list("file_ids")?, fields.list("files")?);
    let shared = fields.take("attributes").map(|value| attributes("attributes", value)).transpose()?;
    let chunking = fields.take("chunking_strategy");
    let requests = match (ids, files) {
        (Some(ids), None) => {
            let chunking = chunking::read("chunking_strategy", chunking)?;
            let request = |(place, file)| (place, AttachRequest { file, attributes: shared.clone(), chunking });
            file_ids("file_ids", ids)?.into_iter().map(request).collect::<Vec<_>>()
        }
        (None, Some(_)) if shared.is_some() || chunking.is_some() => {
            let key = if shared.is_some() { "attributes" } else { "chunking_strategy" };
            return Err(invalid(key, "expected it in each of files, or together with file_ids".into()));
        }
        (None, Some(files)) => read_files(files)?,
        (Some(_), Some(_)) => return Err(invalid("files", "expected file_ids or files, found both".into())),
        (None, None) => return Err(invalid("file_ids", "expected file_ids or files, found neither".into())),
    };
    fields.finish()?;
    if requests.is_empty() {
        return Err(invalid("file_ids", "expected at least one file, found none".into()));
    }
    let mut seen = HashSet::new();
    match requests.iter().find(|(_, request)| !seen.insert(request.file.as_str())) {
        Some((place, _)) => Err(invalid(place, "expected each file once, found it again".into())),
        None => Ok(requests),
    }
}

fn read_files(files: Vec<Value>) -> Result<Vec<(String, AttachRequest)>> {
    if files.len() > MOST_FILES {
        return Err(invalid("files", format!("expected at most {MOST_FILES} files, found {}", files.len())));
    }
    let one = |(index, file): (usize, Value)| {
        let place = format!("files[{index}]");
        let mut fields = Fields::within(&place, file, "a file takes file_id, attributes and chunking_strategy")?;
        let request = attach_request(&mut fields)?;
        let name = fields.name("file_id");
        fields.finish()?;
        Ok((name, request))
    };
    files.into_iter().enumerate().map(one).collect()
}

pub(super) async fn one(State(app): State<App>, Path((store, batch)): Path<(String, String)>) -> Answer {
    let service = app.serving()?;
    Ok(Json(object(&blocking(move || service.batch(&store, &batch)).await?)))
}

pub(super) async fn cancel(Path((store, batch)): Path<(String, String)>, received: Received) -> Answer {
    let Received { service, body } = received;
    Fields::read(&body.bytes, "a batch is cancelled without further fields")?.finish()?;
    Ok(Json(object(&blocking(move || service.cancel_batch(&store, &batch)).await?)))
}

pub(super) async fn files(State(app): State<App>, Path((store, batch)): Path<(String, String)>, uri: Uri) -> Answer {
    let service = app.serving()?;
    let mut query = Query::of(&uri)?;
    let (page, state) = (query.page(USUAL, MOST)?, state(&mut query)?);
    query.finish("after, before, filter, limit and order")?;
    let auto = service.auto_chunking();
    let files = blocking(move || service.files_of_batch(&store, &batch, state, &page)).await?;
    Ok(Json(list(&files.map(|file| file_object(&file, auto)))))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::values::param_of;
    use service::{Chunking, StaticChunking};

    #[test]
    fn files_of_a_batch_share_what_is_said_of_them_or_have_their_own() {
        let read = |body: Value| read(body.to_string().as_bytes());
        let shared = read(json!({"file_ids": ["a", "b"], "attributes": {"x": 1}})).unwrap();
        assert!(shared.iter().all(|(_, request)| request.attributes.as_ref().unwrap()["x"] == 1));
        assert_eq!((shared[1].0.as_str(), shared[1].1.file.as_str()), ("file_ids[1]", "b"));
        let chunking = json!({"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 5}});
        let own = read(json!({"files": [{"file_id": "a", "chunking_strategy": chunking}, {"file_id": "b"}]})).unwrap();
        let cut = Chunking::Static(StaticChunking { max_tokens: 100, overlap: 5 });
        assert_eq!([own[0].1.chunking, own[1].1.chunking], [cut, Chunking::Auto]);
        for (body, place) in [
            (json!({}), "file_ids"),
            (json!({"file_ids": []}), "file_ids"),
            (json!({"file_ids": [1]}), "file_ids[0]"),
            (json!({"file_ids": ["a", "b", "a"]}), "file_ids[2]"),
            (json!({"file_ids": ["a"], "files": [{"file_id": "b"}]}), "files"),
            (json!({"files": [{"file_id": "b"}], "attributes": {}}), "attributes"),
            (json!({"files": [{}]}), "files[0].file_id"),
            (json!({"files": [{"file_id": "b", "magic": 1}]}), "files[0].magic"),
            (json!({"files": [{"file_id": "b", "attributes": {"a": []}}]}), "files[0].attributes.a"),
            (json!({"file_ids": vec!["a"; 2001]}), "file_ids"),
        ] {
            assert_eq!(param_of(read(body.clone()).unwrap_err()), place, "{body}");
        }
    }
}
