//! Files of a vector store: attached, listed, changed, read, taken out.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::Uri;
use serde_json::{Map, Value, json};

use super::super::admission::Received;
use super::super::fields::{Fields, attributes};
use super::super::files::{Answer, blocking};
use super::super::page::{Query, list};
use super::super::state::App;
use super::super::values::{invalid, text};
use super::{MOST, USUAL, chunking};
use service::{AttachRequest, Attachment, AttachmentState, StaticChunking};
use settings::Result;

/// Files that can be attached together.
pub(super) const MOST_FILES: usize = 2000;

/// A file of a store in OpenAI's shape, with its name beside the usual fields.
pub(super) fn object(attachment: &Attachment, auto: StaticChunking) -> Value {
    json!({
        "id": attachment.file, "object": "vector_store.file", "created_at": attachment.created,
        "vector_store_id": attachment.store, "status": attachment.state.name(), "usage_bytes": attachment.bytes,
        "last_error": attachment.last_error, "attributes": attachment.attributes,
        "chunking_strategy": chunking::object(attachment.chunking, auto), "filename": attachment.filename,
    })
}

/// The ids of a list of files, each with its place in the request.
pub(super) fn file_ids(name: &str, items: Vec<Value>) -> Result<Vec<(String, String)>> {
    if items.len() > MOST_FILES {
        return Err(invalid(name, format!("expected at most {MOST_FILES} files, found {}", items.len())));
    }
    let read = |(index, item): (usize, Value)| {
        let place = format!("{name}[{index}]");
        let id = text(&place, &item)?;
        Ok((place, id))
    };
    items.into_iter().enumerate().map(read).collect()
}

/// What an object says of a file that is to be attached.
pub(super) fn attach_request(fields: &mut Fields) -> Result<AttachRequest> {
    let (attributes_name, chunking_name) = (fields.name("attributes"), fields.name("chunking_strategy"));
    Ok(AttachRequest {
        file: fields.required("file_id")?,
        attributes: fields.take("attributes").map(|value| attributes(&attributes_name, value)).transpose()?,
        chunking: chunking::read(&chunking_name, fields.take("chunking_strategy"))?,
    })
}

/// Which files of a list are wanted.
pub(super) fn state(query: &mut Query) -> Result<Option<AttachmentState>> {
    let names = ["in_progress", "completed", "failed", "cancelled"];
    Ok(query.word("filter", &names)?.and_then(AttachmentState::named))
}

pub(super) async fn attach(Path(store): Path<String>, received: Received) -> Answer {
    let Received { service, body } = received;
    let mut fields = Fields::read(&body.bytes, "a file takes file_id, attributes and chunking_strategy")?;
    let request = attach_request(&mut fields)?;
    fields.finish()?;
    let auto = service.auto_chunking();
    let attached = blocking(move || service.attach_one(&store, request)).await?;
    Ok(Json(object(&attached, auto)))
}

pub(super) async fn all(State(app): State<App>, Path(store): Path<String>, uri: Uri) -> Answer {
    let service = app.serving()?;
    let mut query = Query::of(&uri)?;
    let (page, state) = (query.page(USUAL, MOST)?, state(&mut query)?);
    query.finish("after, before, filter, limit and order")?;
    let auto = service.auto_chunking();
    let files = blocking(move || service.store_files(&store, state, &page)).await?;
    Ok(Json(list(&files.map(|file| object(&file, auto)))))
}

pub(super) async fn one(State(app): State<App>, Path((store, file)): Path<(String, String)>) -> Answer {
    let service = app.serving()?;
    let auto = service.auto_chunking();
    Ok(Json(object(&blocking(move || service.store_file(&store, &file)).await?, auto)))
}

pub(super) async fn change(Path((store, file)): Path<(String, String)>, received: Received) -> Answer {
    let Received { service, body } = received;
    let mut fields = Fields::read(&body.bytes, "a change takes attributes")?;
    let kept = match fields.given("attributes") {
        None => return Err(invalid("attributes", "expected it to be given, found nothing".into()).into()),
        Some(None) => Map::new(),
        Some(Some(value)) => attributes("attributes", value)?,
    };
    fields.finish()?;
    let auto = service.auto_chunking();
    Ok(Json(object(&blocking(move || service.change_store_file(&store, &file, kept)).await?, auto)))
}

pub(super) async fn detach(State(app): State<App>, Path((store, file)): Path<(String, String)>) -> Answer {
    let service = app.serving()?;
    let deleted = json!({"id": file, "object": "vector_store.file.deleted", "deleted": true});
    blocking(move || service.detach(&store, &file)).await?;
    Ok(Json(deleted))
}

pub(super) async fn content(State(app): State<App>, Path((store, file)): Path<(String, String)>) -> Answer {
    let service = app.serving()?;
    let (attachment, text) = blocking(move || service.store_file_text(&store, &file)).await?;
    Ok(Json(json!({
        "object": "vector_store.file_content.page", "file_id": attachment.file, "filename": attachment.filename,
        "attributes": attachment.attributes, "data": [{"type": "text", "text": text}], "has_more": false,
        "next_page": null,
    })))
}
