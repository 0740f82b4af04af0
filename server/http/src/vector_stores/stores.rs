//! Vector stores themselves: made, listed, changed, deleted.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::Uri;
use serde_json::{Map, Value, json};

use super::super::admission::Received;
use super::super::fields::{Fields, metadata};
use super::super::files::{Answer, blocking};
use super::super::page::{Query, list};
use super::super::state::App;
use super::super::values::{cut, invalid, size};
use super::files::file_ids;
use super::{MOST, USUAL, chunking};
use service::{AttachRequest, StoreChange, StoreSettings, VectorStore};
use settings::Result;

/// Characters of a store's name and of its description at most.
const LONGEST_NAME: usize = 256;
const LONGEST_DESCRIPTION: usize = 2048;
/// Days after which an unused store may be emptied, at most.
const MOST_DAYS: usize = 365;

/// A store in OpenAI's shape.
fn object(store: &VectorStore) -> Value {
    let settings = &store.settings;
    let status = match store {
        VectorStore { expired: true, .. } => "expired",
        VectorStore { files, .. } if files.in_progress > 0 => "in_progress",
        _ => "completed",
    };
    let expires_after = settings.expires_after_days.map(|days| json!({"anchor": "last_active_at", "days": days}));
    json!({
        "id": store.id, "object": "vector_store", "created_at": store.created, "name": settings.name,
        "description": settings.description, "usage_bytes": store.bytes, "file_counts": store.files, "status": status,
        "expires_after": expires_after, "expires_at": store.expires, "last_active_at": store.last_active,
        "metadata": settings.metadata,
    })
}

/// What is to be made, and which files are attached to it at once.
fn read(body: &[u8]) -> Result<(StoreSettings, Vec<(String, AttachRequest)>)> {
    let known = "a vector store takes name, description, file_ids, chunking_strategy, expires_after and metadata";
    let mut fields = Fields::read(body, known)?;
    let settings = StoreSettings {
        name: short(&mut fields, "name", LONGEST_NAME)?.unwrap_or_default(),
        description: short(&mut fields, "description", LONGEST_DESCRIPTION)?,
        metadata: fields.take("metadata").map(|value| metadata("metadata", value)).transpose()?.unwrap_or_default(),
        expires_after_days: fields.take("expires_after").map(days).transpose()?,
    };
    let (files, chunking) = (fields.list("file_ids")?.unwrap_or_default(), fields.take("chunking_strategy"));
    if files.is_empty() && chunking.is_some() {
        return Err(invalid("chunking_strategy", "expected only together with file_ids".into()));
    }
    let chunking = chunking::read("chunking_strategy", chunking)?;
    fields.finish()?;
    let request = |(place, file)| (place, AttachRequest { file, attributes: None, chunking });
    Ok((settings, file_ids("file_ids", files)?.into_iter().map(request).collect()))
}

pub(super) async fn create(received: Received) -> Answer {
    let Received { service, body } = received;
    let (settings, files) = read(&body.bytes)?;
    let made = blocking(move || service.create_store(settings, &files)).await?;
    Ok(Json(object(&made)))
}

pub(super) async fn all(State(app): State<App>, uri: Uri) -> Answer {
    let service = app.serving()?;
    let mut query = Query::of(&uri)?;
    let page = query.page(USUAL, MOST)?;
    query.finish("after, before, limit and order")?;
    let stores = blocking(move || service.stores(&page)).await?;
    Ok(Json(list(&stores.map(|store| object(&store)))))
}

pub(super) async fn one(State(app): State<App>, Path(id): Path<String>) -> Answer {
    let service = app.serving()?;
    Ok(Json(object(&blocking(move || service.store_by_id(&id)).await?)))
}

pub(super) async fn change(Path(id): Path<String>, received: Received) -> Answer {
    let Received { service, body } = received;
    let change = read_change(&body.bytes)?;
    Ok(Json(object(&blocking(move || service.change_store(&id, change)).await?)))
}

/// What is to be changed; null takes away what there is.
fn read_change(body: &[u8]) -> Result<StoreChange> {
    let mut fields = Fields::read(body, "a change takes name, expires_after and metadata")?;
    let name = short(&mut fields, "name", LONGEST_NAME)?;
    let change = StoreChange {
        name,
        metadata: match fields.given("metadata") {
            None => None,
            Some(None) => Some(Map::new()),
            Some(Some(value)) => Some(metadata("metadata", value)?),
        },
        expires_after_days: match fields.given("expires_after") {
            None => None,
            Some(value) => Some(value.map(days).transpose()?),
        },
    };
    fields.finish()?;
    Ok(change)
}

pub(super) async fn delete(State(app): State<App>, Path(id): Path<String>) -> Answer {
    let service = app.serving()?;
    let deleted = json!({"id": id, "object": "vector_store.deleted", "deleted": true});
    blocking(move || service.delete_store(&id)).await?;
    Ok(Json(deleted))
}

fn short(fields: &mut Fields, key: &str, most: usize) -> Result<Option<String>> {
    let text = fields.text(key)?;
    match text.as_ref().map_or(0, |text| text.chars().count()) {
        length if length > most => {
            Err(invalid(&fields.name(key), format!("expected at most {most} characters, found {length}")))
        }
        _ => Ok(text),
    }
}

fn days(value: Value) -> Result<u64> {
    let mut fields = Fields::within("expires_after", value, "expires_after takes anchor and days")?;
    let anchor = fields.required("anchor")?;
    if anchor != "last_active_at" {
        let problem = format!("expected last_active_at, found `{}`", cut(&anchor));
        return Err(invalid("expires_after.anchor", problem));
    }
    let days = size("expires_after.days", &fields.take("days").unwrap_or(Value::Null), 1)?;
    if days > MOST_DAYS {
        return Err(invalid("expires_after.days", format!("expected at most {MOST_DAYS}, found {days}")));
    }
    fields.finish()?;
    Ok(days as u64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::values::param_of;

    #[test]
    fn what_is_wrong_with_a_new_store_is_named() {
        let read = |body: Value| read(body.to_string().as_bytes());
        let after = |days: Value| json!({"expires_after": {"anchor": "last_active_at", "days": days}});
        let (settings, files) = read(json!({"name": "n", "file_ids": ["f"], "metadata": {"a": "b"}})).unwrap();
        assert_eq!((settings.name.as_str(), files[0].0.as_str(), files.len()), ("n", "file_ids[0]", 1));
        assert_eq!(read(after(json!(7))).unwrap().0.expires_after_days, Some(7));
        for (body, place) in [
            (json!({"name": "x".repeat(257)}), "name"),
            (json!({"metadata": {"a": 1}}), "metadata.a"),
            (after(json!(0)), "expires_after.days"),
            (after(json!(366)), "expires_after.days"),
            (json!({"expires_after": {"anchor": "created_at", "days": 1}}), "expires_after.anchor"),
            (json!({"expires_after": {"days": 1}}), "expires_after.anchor"),
            (json!({"chunking_strategy": {"type": "auto"}}), "chunking_strategy"),
            (json!({"file_ids": "f"}), "file_ids"),
            (json!({"magic": 1}), "magic"),
        ] {
            assert_eq!(param_of(read(body.clone()).unwrap_err()), place, "{body}");
        }
    }

    #[test]
    fn a_change_tells_what_is_taken_away_from_what_stays() {
        let read = |body: Value| read_change(body.to_string().as_bytes()).unwrap();
        let nothing = read(json!({"name": null}));
        assert!(nothing.name.is_none() && nothing.metadata.is_none() && nothing.expires_after_days.is_none());
        let away = read(json!({"metadata": null, "expires_after": null}));
        assert_eq!((away.metadata, away.expires_after_days), (Some(Map::new()), Some(None)));
    }
}
