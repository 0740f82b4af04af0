//! For those who operate the server: is it alive, is it ready, what does it offer, what did it do.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::state::{App, Phase};
use settings::QuireError;

pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "live"}))
}

pub(super) async fn ready(State(app): State<App>) -> Response {
    let dead = app.loaded().is_some_and(|service| !service.engine().is_alive());
    let (status, text) = match app.phase() {
        Phase::Ready if dead => (StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped"),
        Phase::Ready => return Json(json!({"status": "ready"})).into_response(),
        Phase::Loading => (StatusCode::SERVICE_UNAVAILABLE, "loading"),
        Phase::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
    };
    (status, [(header::RETRY_AFTER, "2")], Json(json!({"status": text}))).into_response()
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

fn describe(app: &App) -> Value {
    let context = app.loaded().map(|service| service.engine().max_context());
    json!({
        "id": app.model(), "object": "model", "created": app.started_unix, "owned_by": "quire",
        "max_model_len": context,
    })
}

pub(super) async fn models(State(app): State<App>) -> Json<Value> {
    Json(json!({"object": "list", "data": [describe(&app)]}))
}

pub(super) async fn model(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    if name == app.model() {
        return Ok(Json(describe(&app)));
    }
    Err(QuireError::UnknownModel { found: name, served: app.model().into() }.into())
}

/// What there is here, for whoever opens the address.
pub(super) async fn root(State(app): State<App>) -> Json<Value> {
    Json(json!({
        "name": "quire", "version": env!("CARGO_PKG_VERSION"), "model": app.model(),
        "routes": ["/v1/chat/completions", "/v1/models", "/health", "/livez", "/readyz", "/metrics", "/version"],
    }))
}

pub(super) async fn metrics(State(app): State<App>) -> Response {
    if let Some(service) = app.loaded()
        && let Err(error) = service.observe()
    {
        tracing::warn!(%error, "the store could not be observed for metrics");
    }
    app.recorder().run_upkeep();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.recorder().render()).into_response()
}
