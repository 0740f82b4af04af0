//! The one mapping from errors to HTTP: status, OpenAI's error object, and when to try again.
//!
//! What a client sees is bounded, whatever it sent, and says nothing of this machine: no paths, no names of collections
//! that it did not name. What failed within is in the log, under the id of the request.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::EngineError;
use serde_json::{Value, json};

use documents::DocumentsError;

use service::metrics;
use settings::QuireError;

/// Longest message and longest name of a parameter, in characters.
const LONGEST_MESSAGE: usize = 1000;
const LONGEST_PARAM: usize = 100;
/// Longest error in the log, in characters.
const LONGEST_LOGGED: usize = 4000;

/// At most so many characters of a text on one line: what is left out is counted, and what moves a cursor or breaks a
/// line is written as its escape.
pub(super) fn bounded(text: &str, limit: usize) -> String {
    let mut out = String::new();
    let mut rest = text.chars();
    for c in rest.by_ref().take(limit) {
        if c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) || ('\u{2066}'..='\u{2069}').contains(&c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    match rest.as_str().len() {
        0 => out,
        bytes => format!("{out}... ({bytes} more bytes)"),
    }
}

/// The code of an error, left at its response for the metrics.
#[derive(Clone, Copy)]
pub(super) struct ErrorCode(pub(super) &'static str);

/// An error as a client sees it.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    kind: &'static str,
    code: Option<&'static str>,
    param: Option<String>,
    message: String,
    retry_after: Option<u32>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, code: None, param: None, message: message.into(), retry_after: None }
    }

    fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message).code("invalid_value")
    }

    pub(super) fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).code("not_found")
    }

    pub(super) fn wrong_method(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message).code("method_not_allowed")
    }

    pub(super) fn unauthorized() -> ApiError {
        let message = "this server needs a key: send it as `Authorization: Bearer KEY`";
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
            .code("invalid_api_key")
            .param("authorization")
    }

    /// The server was asked under a name that is not its own.
    pub(super) fn wrong_host(host: &str) -> ApiError {
        let message = format!(
            "this server has no key and is not called `{}`: ask it as localhost or by its address, give it a key \
             (--api-key), or allow the name (--allowed-hosts)",
            bounded(host, LONGEST_PARAM)
        );
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message).code("host_not_allowed").param("host")
    }

    /// A page from elsewhere sent the request.
    pub(super) fn cross_site() -> ApiError {
        let message = "this server has no key and takes no requests of pages from elsewhere: allow their origin \
                       (--cors-origins), or give the server a key (--api-key)";
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message).code("origin_not_allowed").param("origin")
    }

    /// The body could not be taken.
    pub(super) fn body(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        let param = match code {
            "unsupported_media_type" => "content-type",
            "unsupported_encoding" => "content-encoding",
            _ => "body",
        };
        ApiError::new(status, "invalid_request_error", message).code(code).param(param)
    }

    /// Other files are being uploaded.
    pub(super) fn uploads_full() -> ApiError {
        let message = "too many files are being uploaded at once. Try again later";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).code("uploads_full").retry_after(5)
    }

    /// Other large bodies are being read.
    pub(super) fn bodies_full() -> ApiError {
        let message = "too many large requests are being read at once. Try again later";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message).code("bodies_full").retry_after(2)
    }

    /// Something failed or panicked within.
    pub(super) fn internal() -> ApiError {
        let message = "the server failed at this request; its log says why, under this answer's x-request-id";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message).code("internal_error")
    }

    #[cfg(test)]
    pub(super) fn status(&self) -> u16 {
        self.status.as_u16()
    }

    fn code(self, code: &'static str) -> ApiError {
        ApiError { code: Some(code), ..self }
    }

    fn param(self, param: impl Into<String>) -> ApiError {
        ApiError { param: Some(param.into()), ..self }
    }

    fn retry_after(self, seconds: u32) -> ApiError {
        ApiError { retry_after: Some(seconds), ..self }
    }

    /// OpenAI's error object.
    fn body_value(&self) -> Value {
        let param = self.param.as_ref().map(|param| bounded(param, LONGEST_PARAM));
        let message = bounded(&self.message, LONGEST_MESSAGE);
        json!({"error": {"message": message, "type": self.kind, "param": param, "code": self.code}})
    }

    /// The same within a stream, whose status has been sent long ago.
    pub(super) fn event(&self) -> Value {
        metrics::http_error(self.status.as_u16(), self.code.unwrap_or_default());
        self.body_value()
    }
}

impl From<&QuireError> for ApiError {
    fn from(error: &QuireError) -> ApiError {
        let message = error.to_string();
        let invalid = || ApiError::invalid(message.clone());
        let overloaded = || ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message.clone());
        let unavailable = |text: &str| ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", text);
        match error {
            QuireError::InvalidParameter { param, .. } => invalid().param(param),
            QuireError::UnsupportedParameter { param, .. } => invalid().param(param).code("unsupported_parameter"),
            QuireError::Documents(DocumentsError::CollectionName { .. }) => invalid().param("quire.collection"),
            // Which others there are is not told.
            QuireError::Documents(DocumentsError::UnknownCollection { name, .. }) => {
                ApiError::not_found(format!("collection `{name}` does not exist on this server"))
                    .param("quire.collection")
                    .code("collection_not_found")
            }
            QuireError::NotFound { param, .. } => ApiError::not_found(message).param(param),
            QuireError::UploadTooLarge { .. } => {
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
                    .code("file_too_large")
                    .param("file")
            }
            QuireError::Documents(DocumentsError::DataDir { source, .. }) => {
                tracing::error!(error = bounded(&message, LONGEST_LOGGED), "a request could not write");
                cannot_write(source.kind())
            }
            QuireError::UnknownModel { .. } => ApiError::not_found(message).param("model").code("model_not_found"),
            QuireError::TooManyRequests { retry_after_seconds, .. } => {
                overloaded().code("queue_full").retry_after(*retry_after_seconds)
            }
            QuireError::Engine(EngineError::QueueFull { .. }) => overloaded().code("queue_full").retry_after(1),
            QuireError::Loading => unavailable(&message).code("loading").retry_after(2),
            QuireError::Draining => unavailable(&message).code("draining").retry_after(5),
            QuireError::Engine(EngineError::Stopped(_)) => {
                tracing::warn!(error = bounded(&message, LONGEST_LOGGED), "a request met an engine that has stopped");
                unavailable("the engine has stopped").code("engine_stopped").retry_after(5)
            }
            QuireError::Engine(
                EngineError::ContextLimit { .. } | EngineError::TextTooLong { .. } | EngineError::NeverFits { .. },
            ) => invalid().param("messages").code("context_length_exceeded"),
            QuireError::Engine(EngineError::RequestSetting { parameter, .. }) => {
                invalid().param(format!("quire.{parameter}"))
            }
            QuireError::Engine(EngineError::Sampling { parameter, .. }) => invalid().param(*parameter),
            QuireError::Engine(EngineError::InvalidRequest(_)) => invalid().param("messages"),
            QuireError::Engine(EngineError::ChatTemplate(_)) => invalid().param("messages"),
            QuireError::Engine(EngineError::OutOfMemory { .. }) => {
                unavailable(&message).code("out_of_memory").retry_after(5)
            }
            _ => {
                tracing::error!(error = bounded(&message, LONGEST_LOGGED), "a request failed");
                ApiError::internal()
            }
        }
    }
}

/// The disk or the folder does not take what a request brings.
fn cannot_write(kind: std::io::ErrorKind) -> ApiError {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    let (status, code, message) = match kind {
        StorageFull | QuotaExceeded => (
            StatusCode::INSUFFICIENT_STORAGE,
            "disk_full",
            "the server's disk is full: nothing was kept of this request",
        ),
        _ => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "read_only",
            "the server cannot write its data folder; its log says why, under this answer's x-request-id",
        ),
    };
    ApiError::new(status, "server_error", message).code(code)
}

impl From<QuireError> for ApiError {
    fn from(error: QuireError) -> ApiError {
        ApiError::from(&error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body_value())).into_response();
        response.extensions_mut().insert(ErrorCode(self.code.unwrap_or_default()));
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use engine::{AttentionConfig, BlendConfig, Strategy};

    #[test]
    fn full_queues_and_shutdowns_say_when_to_come_back() {
        let full = QuireError::Engine(EngineError::QueueFull { limit: 1 });
        for (error, status) in [(full, 429), (QuireError::Loading, 503), (QuireError::Draining, 503)] {
            let response = ApiError::from(error).into_response();
            assert_eq!(response.status().as_u16(), status);
            assert!(response.headers().contains_key(header::RETRY_AFTER));
        }
    }

    #[test]
    fn a_wrong_parameter_is_named() {
        let error = EngineError::Sampling { parameter: "top_p", expected: "x", found: "y".into() };
        let error = ApiError::from(QuireError::Engine(error));
        assert_eq!(error.status, StatusCode::BAD_REQUEST);
        assert_eq!(error.body_value()["error"]["param"], "top_p");

        let attention = |config: AttentionConfig| ApiError::from(QuireError::from(config.validate().unwrap_err()));
        let blend = |config: BlendConfig| ApiError::from(QuireError::from(config.validate(6).unwrap_err()));
        let window = AttentionConfig { strategy: Strategy::Window, ..AttentionConfig::default() };
        for (error, param) in [
            (attention(AttentionConfig { k: usize::MAX, ..AttentionConfig::default() }), "quire.k"),
            (attention(AttentionConfig { ef: usize::MAX, ..AttentionConfig::default() }), "quire.ef"),
            (attention(AttentionConfig { sinks: usize::MAX, ..AttentionConfig::default() }), "quire.sinks"),
            (attention(AttentionConfig { window: 0, ..window }), "quire.window"),
            (blend(BlendConfig { ratio: 2.0, ..BlendConfig::default() }), "quire.ratio"),
            (blend(BlendConfig { mass: Some(1.5), ..BlendConfig::default() }), "quire.blend_mass"),
            (blend(BlendConfig { check_layer: 99, ..BlendConfig::default() }), "quire.check_layer"),
        ] {
            assert_eq!(error.body_value()["error"]["param"], param, "{error:?}");
        }
    }

    #[test]
    fn a_message_is_bounded_whatever_was_sent() {
        let found = "\u{e9}\n".repeat(3_000_000);
        let unknown = QuireError::UnknownModel { found: found.clone(), served: "m".into() };
        let field = QuireError::UnsupportedParameter { param: found, hint: "" };
        for error in [unknown, field] {
            let body = ApiError::from(error).body_value();
            assert!(body.to_string().len() < 10_000);
            assert!(body["error"]["message"].as_str().unwrap().ends_with(" more bytes)"), "{body}");
            assert!(!body["error"]["message"].as_str().unwrap().contains('\n'));
        }
    }

    #[test]
    fn nothing_of_this_machine_is_told() {
        let path = std::path::PathBuf::from("/home/ann/secret");
        let io = || std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        let known = vec!["layoffs".to_string()];
        for error in [
            QuireError::Io { action: "read", path: path.clone(), source: io() },
            QuireError::writing(path.clone(), io()),
            DocumentsError::UnknownCollection { name: "x".into(), known }.into(),
            QuireError::Internal("at /home/ann/secret".into()),
            QuireError::Engine(EngineError::Stopped("/home/ann/secret".into())),
        ] {
            let body = ApiError::from(error).body_value().to_string();
            assert!(!body.contains("secret") && !body.contains("layoffs"), "{body}");
        }
    }
}
