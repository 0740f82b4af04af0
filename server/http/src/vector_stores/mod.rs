//! `/v1/vector_stores`: collections of documents, as clients of OpenAI's API make, fill and search them.

mod chunking;
mod file_batches;
mod files;
mod filters;
mod search;
mod stores;

use axum::Router;
use axum::routing::{get, post};

use super::state::App;

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/vector_stores", get(stores::all).post(stores::create))
        .route("/v1/vector_stores/{store}", get(stores::one).post(stores::change).delete(stores::delete))
        .route("/v1/vector_stores/{store}/search", post(search::search))
        .route("/v1/vector_stores/{store}/files", get(files::all).post(files::attach))
        .route("/v1/vector_stores/{store}/files/{file}", get(files::one).post(files::change).delete(files::detach))
        .route("/v1/vector_stores/{store}/files/{file}/content", get(files::content))
        .route("/v1/vector_stores/{store}/file_batches", post(file_batches::create))
        .route("/v1/vector_stores/{store}/file_batches/{batch}", get(file_batches::one))
        .route("/v1/vector_stores/{store}/file_batches/{batch}/cancel", post(file_batches::cancel))
        .route("/v1/vector_stores/{store}/file_batches/{batch}/files", get(file_batches::files))
}

/// Things of a page at most, and where nothing is said.
const MOST: usize = 100;
const USUAL: usize = 20;
