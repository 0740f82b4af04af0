//! The OpenAI-compatible server.
//!
//! `state` is what handlers share, `error` what they answer when something is wrong, `auth` who may ask; `chat_request`
//! turns a body into a question, `chat` answers it, `probes` is for those who operate the server, `lifecycle` starts
//! and stops it: unready, refuse, drain, flush, exit.

mod auth;
mod chat;
mod chat_request;
mod error;
mod lifecycle;
mod probes;
mod state;

pub use lifecycle::{close, serve};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};

use error::ApiError;
use state::App;

/// All routes.
fn router(app: App) -> Router {
    let limit = app.settings().body_limit_bytes.0 as usize;
    let guarded = Router::new()
        .route("/v1/models", get(probes::models))
        // Names on the hub have a slash.
        .route("/v1/models/{*model}", get(probes::model))
        .route("/v1/chat/completions", post(chat::completions))
        .route("/metrics", get(probes::metrics))
        .route("/version", get(probes::version))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), auth::require_key));
    Router::new()
        .route("/livez", get(probes::live))
        .route("/readyz", get(probes::ready))
        .merge(guarded)
        .layer(DefaultBodyLimit::max(limit))
        .layer(tower_http::trace::TraceLayer::new_for_http().on_failure(()))
        .with_state(app)
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {method} {}; see the documentation for the routes there are", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(format!("{} does not take {method}", uri.path()))
}
