//! The OpenAI-compatible server.
//!
//! `lifecycle` starts and stops it: unready, refuse, drain, flush, exit. A request passes `connections` (how many, how
//! long), `observe` (id, log, counts), `origin` (which pages may ask), `auth` (who may ask) and `admission` (its body,
//! within limits), and takes a place in the `queue`; `chat_request` turns its body into a question, `chat` answers it in the
//! shapes of `chat_response`, `citation` shows what it was answered from.
//! `files` and `vector_stores` are documents over HTTP; `upload` takes files in, `fields`, `page` and `values` read what all
//! requests are made of.
//! `control` takes the command line's commands over a socket in the data folder, `turns` says when they may write documents.
//! `probes` is for those who operate the server, `state` is what handlers share, `error` what they answer when something
//! is wrong.

mod admission;
mod auth;
mod chat;
mod chat_request;
mod chat_response;
mod citation;
mod connections;
mod control;
mod error;
mod fields;
mod files;
mod lifecycle;
mod observe;
mod open_files;
mod origin;
mod page;
mod probes;
mod queue;
mod state;
mod turns;
mod upload;
mod values;
mod vector_stores;

pub use lifecycle::{close, serve};
pub use open_files::raise_open_files;

use axum::Router;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower::Layer;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::normalize_path::{NormalizePath, NormalizePathLayer};

use error::ApiError;
use state::App;

/// All routes, with and without a slash at their end.
fn routes(app: App) -> NormalizePath<Router> {
    let mut guarded = Router::new()
        .route("/", get(probes::root))
        .route("/v1/models", get(probes::models))
        // Names on the hub have a slash.
        .route("/v1/models/{*model}", get(probes::model))
        .route("/v1/chat/completions", post(chat::completions))
        .merge(files::routes())
        .merge(vector_stores::routes())
        .route("/metrics", get(probes::metrics))
        .route("/version", get(probes::version))
        .fallback(not_found)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(app.clone(), auth::require_key));
    if let Some(cross_site) = origin::cross_site(&app) {
        guarded = guarded.layer(cross_site);
    }
    guarded = guarded.layer(from_fn_with_state(app.clone(), origin::require_own_name));
    let mut all = Router::new()
        .route("/livez", get(probes::live))
        .route("/readyz", get(probes::ready))
        .route("/health", get(probes::ready))
        .route("/v1/health", get(probes::ready))
        .merge(guarded);
    if let Some(cors) = origin::cors(&app.settings().cors_origins.0) {
        all = all.layer(cors);
    }
    NormalizePathLayer::trim_trailing_slash().layer(watched(all).with_state(app))
}

/// With what holds for every route: a panic is an answer, and every request is told of in the log.
fn watched<S: Clone + Send + Sync + 'static>(routes: Router<S>) -> Router<S> {
    routes.layer(CatchPanicLayer::custom(panicked)).layer(from_fn(observe::observe))
}

async fn not_found(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {method} {}; see the documentation for the routes there are", uri.path()))
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::wrong_method(format!("{} does not take {method}", uri.path()))
}

/// A panic is a defect and costs its own request alone.
fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    tracing::error!("a handler panicked; what it said stands above");
    ApiError::internal().into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use axum::body::Body;
    use axum::http::{Request, StatusCode};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_panic_in_a_handler_is_an_answer_to_its_own_request() {
        let defect = get(|| async { if true { panic!("a defect") } else { "never" } });
        let routes: Router = watched(Router::new().route("/defect", defect).route("/well", get(|| async { "well" })));
        for _ in 0..2 {
            let ask = |path: &str| routes.clone().oneshot(Request::get(path).body(Body::empty()).unwrap());
            let answer = ask("/defect").await.unwrap();
            assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
            assert!(answer.headers().contains_key("x-request-id"));
            let body = axum::body::to_bytes(answer.into_body(), 10_000).await.unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert!(body["error"]["message"].is_string() && !body.to_string().contains("a defect"), "{body}");
            assert_eq!(ask("/well").await.unwrap().status(), StatusCode::OK);
        }
    }
}
