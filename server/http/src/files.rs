//! `/v1/files`: files that clients upload, to be attached to vector stores.

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderName, HeaderValue, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use futures::stream::{self, Stream};
use serde_json::{Value, json};

use super::error::ApiError;
use super::page::{Query, list};
use super::state::App;
use super::upload;
use service::{FileContent, UploadedFile};
use settings::{QuireError, Result};

/// Files of a page at most, and where nothing is said.
const MOST_FILES: usize = 10_000;

/// What most requests about documents are answered with.
pub(super) type Answer = Result<Json<Value>, ApiError>;

pub(super) fn routes() -> Router<App> {
    Router::new()
        // An upload has limits of its own.
        .route("/v1/files", get(all).post(upload::create).layer(DefaultBodyLimit::disable()))
        .route("/v1/files/{file}", get(one).delete(delete))
        .route("/v1/files/{file}/content", get(content))
}

/// A file in OpenAI's shape.
pub(super) fn object(file: &UploadedFile) -> Value {
    json!({"id": file.id, "object": "file", "bytes": file.bytes, "created_at": file.created, "expires_at": file.expires,
           "filename": file.filename, "purpose": file.purpose, "status": "processed", "status_details": null})
}

/// Does what blocks apart from what other requests wait for.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|e| QuireError::Internal(format!("a request panicked: {e}")))??)
}

async fn all(State(app): State<App>, uri: Uri) -> Answer {
    let service = app.serving()?;
    let mut query = Query::of(&uri)?;
    let page = query.page(MOST_FILES, MOST_FILES)?;
    let purpose = query.take("purpose")?;
    query.finish("after, before, limit, order and purpose")?;
    let files = blocking(move || service.files(purpose.as_deref(), &page)).await?;
    Ok(Json(list(&files.map(|file| object(&file)))))
}

async fn one(State(app): State<App>, Path(id): Path<String>) -> Answer {
    let service = app.serving()?;
    let file = blocking(move || service.file(&id, "file_id")).await?;
    Ok(Json(object(&file)))
}

async fn delete(State(app): State<App>, Path(id): Path<String>) -> Answer {
    let service = app.serving()?;
    let deleted = json!({"id": id, "object": "file", "deleted": true});
    blocking(move || service.delete_file(&id)).await?;
    Ok(Json(deleted))
}

/// What a browser may do with somebody's file: keep it, not run it.
const HARMLESS: [(HeaderName, HeaderValue); 3] = [
    (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
    (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment")),
];

async fn content(State(app): State<App>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let service = app.serving()?;
    let (file, content) = blocking(move || service.file_content(&id, "file_id")).await?;
    let mut response = (HARMLESS, Body::from_stream(pieces(content))).into_response();
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    Ok(response)
}

/// The bytes of a file as they are read. Where that fails the connection is cut: the length was promised.
fn pieces(content: FileContent) -> impl Stream<Item = std::io::Result<Vec<u8>>> {
    stream::unfold(Some(content), |content| async move {
        let mut content = content?;
        let read = tokio::task::spawn_blocking(move || (content.piece(), content)).await;
        let (piece, content) = read.ok()?;
        match piece {
            Ok(piece) if piece.is_empty() => None,
            Ok(piece) => Some((Ok(piece), Some(content))),
            Err(error) => {
                tracing::error!(%error, "a file could not be read to its end");
                Some((Err(std::io::ErrorKind::Other.into()), None))
            }
        }
    })
}
