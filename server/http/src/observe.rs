//! What operators see of every request: an id, one line of log without any text of it, and counts.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use tracing::Instrument;

use super::error::{ErrorCode, bounded};
use super::state::unix_now;
use service::metrics;

/// Names a request, in both directions.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken from a client.
const LONGEST_ID: usize = 128;
/// Longest path that is logged, in characters.
const LONGEST_PATH: usize = 200;
/// What is logged for a request whose client went away before the answer began, as nginx does.
const CLIENT_CLOSED: u16 = 499;

/// Tokens of one request, for its line in the log.
#[derive(Clone, Default)]
pub(super) struct Account(Arc<Tokens>);

#[derive(Default)]
struct Tokens {
    prompt: AtomicU64,
    completion: AtomicU64,
}

impl Account {
    pub(super) fn tokens(&self, prompt: usize, completion: usize) {
        self.0.prompt.store(prompt as u64, Ordering::Relaxed);
        self.0.completion.store(completion as u64, Ordering::Relaxed);
    }
}

/// Around every request: takes or makes its id, and tells what became of it once its answer has been sent or given up.
pub(super) async fn observe(mut request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let account = Account::default();
    request.extensions_mut().insert(account.clone());
    let mut outcome = Outcome {
        begun: Instant::now(),
        method: method_name(request.method()),
        handler: handler_name(&request),
        path: bounded(request.uri().path(), LONGEST_PATH),
        id: id.to_str().unwrap_or_default().to_string(),
        account,
        status: CLIENT_CLOSED,
        code: None,
        complete: false,
    };
    // Whatever is logged meanwhile carries the id.
    let span = tracing::error_span!("request", id = %outcome.id);
    let mut response = next.run(request).instrument(span).await;
    outcome.status = response.status().as_u16();
    outcome.code = response.extensions().get::<ErrorCode>().map(|code| code.0);
    response.headers_mut().insert(REQUEST_ID, id);
    response.map(|body| Body::new(Observed { body, outcome }))
}

/// The client's id, if it is one that can stand in headers and logs; else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let fits =
        |id: &&HeaderValue| (1..=LONGEST_ID).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic);
    if let Some(id) = headers.get(REQUEST_ID).filter(fits) {
        return id.clone();
    }
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let seed = [u64::from(std::process::id()), COUNT.fetch_add(1, Ordering::Relaxed), unix_now(), started_nanos()];
    let bytes: Vec<u8> = seed.iter().flat_map(|number| number.to_le_bytes()).collect();
    let hash = blake3::hash(&bytes).to_hex();
    HeaderValue::from_str(&format!("req-{}", &hash[..24])).unwrap_or(HeaderValue::from_static("req-0"))
}

/// Tells processes of one number apart, as in containers.
fn started_nanos() -> u64 {
    static STARTED: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
    });
    *STARTED
}

/// Of few values, as a label must be.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// The route, not the path: of few values, too.
fn handler_name(request: &Request) -> String {
    request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_string()
}

/// What became of a request; told when this is dropped.
struct Outcome {
    begun: Instant,
    method: &'static str,
    handler: String,
    path: String,
    id: String,
    account: Account,
    status: u16,
    code: Option<&'static str>,
    complete: bool,
}

impl Drop for Outcome {
    fn drop(&mut self) {
        metrics::http_request(self.method, &self.handler, self.status);
        if let Some(code) = self.code {
            metrics::http_error(self.status, code);
        }
        let milliseconds = (self.begun.elapsed().as_secs_f64() * 1e4).round() / 10.0;
        let tokens = &self.account.0;
        let (prompt, completion) = (tokens.prompt.load(Ordering::Relaxed), tokens.completion.load(Ordering::Relaxed));
        let end = if self.complete { "complete" } else { "cut off" };
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "quire::requests",
                    id = %self.id, method = self.method, path = ?self.path, status = self.status, ms = milliseconds,
                    prompt_tokens = prompt, completion_tokens = completion, code = self.code.unwrap_or_default(), end,
                    "request"
                )
            };
        }
        // Probes come every few seconds and say nothing new.
        if matches!(self.handler.as_str(), "/livez" | "/readyz" | "/health" | "/v1/health") {
            line!(debug)
        } else {
            line!(info)
        }
    }
}

/// An answer's body with what is told at its end.
struct Observed {
    body: Body,
    outcome: Outcome,
}

impl HttpBody for Observed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(frame) = &polled {
            self.outcome.complete = frame.is_none() || self.body.is_end_stream();
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        // Nobody asks for a body that is empty or was not wanted.
        self.outcome.complete |= self.body.is_end_stream() || self.outcome.method == "HEAD";
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn answered(id: &[u8]) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, HeaderValue::from_bytes(id).unwrap());
        request_id(&headers).to_str().unwrap().into()
    }

    #[test]
    fn an_id_is_taken_if_it_is_short_and_plain_and_made_otherwise() {
        assert_eq!(answered(b"abc-1/2:{3}"), "abc-1/2:{3}");
        let long = "x".repeat(LONGEST_ID + 1);
        for refused in [&b""[..], b"two words", "\u{e4}".as_bytes(), b"a\tb", long.as_bytes()] {
            assert!(answered(refused).starts_with("req-"), "{refused:?}");
        }
        let made: std::collections::HashSet<_> = (0..100).map(|_| request_id(&HeaderMap::new())).collect();
        assert_eq!(made.len(), 100);
    }
}
