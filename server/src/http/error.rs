//! The one mapping from errors to HTTP: status, OpenAI's error object, and when to try again.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use engine::EngineError;
use serde_json::{Value, json};

use crate::error::QuireError;

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

    pub(super) fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    pub(super) fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message).code("not_found")
    }

    pub(super) fn wrong_method(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message).code("method_not_allowed")
    }

    pub(super) fn unauthorized() -> ApiError {
        let message = "this server needs a key: send it as `Authorization: Bearer KEY`";
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message).code("invalid_api_key")
    }

    /// The body could not be taken: too large, or cut off.
    pub(super) fn body(status: StatusCode, message: String) -> ApiError {
        ApiError::new(status, "invalid_request_error", message)
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

    /// OpenAI's error object, also for the inside of a stream.
    pub(super) fn body_value(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<&QuireError> for ApiError {
    fn from(error: &QuireError) -> ApiError {
        let message = error.to_string();
        let invalid = || ApiError::invalid(message.clone());
        let overloaded = || ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message.clone());
        let unavailable = || ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message.clone());
        match error {
            QuireError::InvalidParameter { param, .. } => invalid().param(param).code("invalid_value"),
            QuireError::UnsupportedParameter { param, .. } => invalid().param(param).code("unsupported_parameter"),
            QuireError::CollectionName { .. } => invalid().param("quire.collection").code("invalid_value"),
            QuireError::UnknownCollection { .. } => {
                ApiError::not_found(message).param("quire.collection").code("collection_not_found")
            }
            QuireError::UnknownModel { .. } => ApiError::not_found(message).param("model").code("model_not_found"),
            QuireError::TooManyRequests { .. } | QuireError::Engine(EngineError::QueueFull { .. }) => {
                overloaded().code("queue_full").retry_after(1)
            }
            QuireError::Loading => unavailable().code("loading").retry_after(2),
            QuireError::Draining | QuireError::Engine(EngineError::Stopped(_)) => {
                unavailable().code("draining").retry_after(5)
            }
            QuireError::Engine(EngineError::ContextLimit { .. }) => {
                invalid().param("messages").code("context_length_exceeded")
            }
            QuireError::Engine(EngineError::Sampling { parameter, .. }) => {
                invalid().param(*parameter).code("invalid_value")
            }
            QuireError::Engine(EngineError::InvalidRequest(_)) => invalid(),
            QuireError::Engine(EngineError::ChatTemplate(_)) => invalid().param("messages"),
            QuireError::Engine(EngineError::NeverFits { .. }) => {
                invalid().param("messages").code("context_length_exceeded")
            }
            QuireError::Engine(EngineError::OutOfMemory { .. }) => unavailable().code("out_of_memory").retry_after(5),
            _ => {
                tracing::error!(%error, "a request failed");
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
            }
        }
    }
}

impl From<QuireError> for ApiError {
    fn from(error: QuireError) -> ApiError {
        ApiError::from(&error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body_value())).into_response();
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
    use super::*;

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
    }
}
