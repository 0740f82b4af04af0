//! Admission of a request with a body: refused before anything of it is kept, or read within limits of size, time and
//! memory, and given a place.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use futures::StreamExt;
use http_body::Body as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::connections::Connection;
use super::error::{ApiError, bounded};
use super::observe::Account;
use super::queue::Place;
use super::state::{App, State};
use service::Service;

/// Bytes of a body that need no room of the budget: ordinary requests do not depend on what others send.
const SMALL: usize = 16 << 10;
/// Bytes that are reserved at once.
const STEP: usize = 64 << 10;
/// Largest bodies, of the most bytes that one may have, for which there is room at the same time.
const LARGEST_BODIES: usize = 8;
/// Characters of a charset's name that a message shows.
const LONGEST_CHARSET: usize = 40;
/// For how long, and how much of, a refused body is still read, so that its sender comes to read the refusal.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 64 << 20;

/// A request that is worked for from now on.
pub(super) struct Admitted {
    pub(super) service: Arc<Service>,
    pub(super) body: Buffered,
    pub(super) place: Place,
    pub(super) account: Account,
}

impl FromRequest<App> for Admitted {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Admitted, ApiError> {
        let (parts, body) = request.into_parts();
        let body = take_body(app, &parts.headers, body, State::may_admit).await?;
        let (service, place) = app.admit(parts.extensions.get::<Connection>())?;
        let account = parts.extensions.get::<Account>().cloned().unwrap_or_default();
        Ok(Admitted { service, body, place, account })
    }
}

/// A request about documents: it has a body, if any, within the same limits, and takes no place in the queue of answers.
pub(super) struct Received {
    pub(super) service: Arc<Service>,
    pub(super) body: Buffered,
}

impl FromRequest<App> for Received {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Received, ApiError> {
        let (parts, body) = request.into_parts();
        let service = app.serving()?;
        // What has no body says nothing of its type.
        if body.is_end_stream() {
            return Ok(Received { service, body: Buffered { bytes: Bytes::new(), _room: None } });
        }
        let body = take_body(app, &parts.headers, body, |state| state.serving().map(drop)).await?;
        Ok(Received { service, body })
    }
}

/// Reads a body of JSON, unless it can be refused before that; `admits` says whether requests are taken at all.
async fn take_body(
    app: &App,
    headers: &HeaderMap,
    body: Body,
    admits: impl Fn(&State) -> settings::Result<()>,
) -> Result<Buffered, ApiError> {
    if let Err(refusal) = may_send(app, headers).and_then(|()| Ok(admits(app)?)) {
        linger(headers, body);
        return Err(refusal);
    }
    let limit = app.body_limit();
    let time = Duration::from_secs(app.settings().body_seconds);
    let mut reader = Reader { stream: body.into_data_stream(), limit, budget: app.bodies(), room: None };
    match tokio::time::timeout(time, reader.read()).await {
        Ok(Ok(bytes)) => Ok(Buffered { bytes, _room: reader.room }),
        Ok(Err(refusal)) => {
            linger(headers, Body::from_stream(reader.stream));
            Err(refusal)
        }
        Err(_) => {
            let message = format!("expected the request's body within {} s; send it faster", time.as_secs());
            Err(ApiError::body(StatusCode::REQUEST_TIMEOUT, "request_timeout", message))
        }
    }
}

/// Everything that can be known before the body is read.
fn may_send(app: &App, headers: &HeaderMap) -> Result<(), ApiError> {
    let limit = app.body_limit();
    if !is_json(headers) {
        let message = "expected a body of `Content-Type: application/json`: add this header to the request";
        return Err(ApiError::body(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    if let Some(charset) = other_charset(headers) {
        let found = bounded(&charset, LONGEST_CHARSET);
        let message =
            format!("expected a body in UTF-8, found `charset={found}`: send JSON as utf-8, as RFC 8259 says");
        return Err(ApiError::body(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    if headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
        let message = "expected a body without `Content-Encoding`: send it uncompressed";
        return Err(ApiError::body(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_encoding", message));
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit as u64) {
        return Err(too_large(limit));
    }
    Ok(())
}

/// A browser sends other types from any page to any server, without asking the server first.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(Ok(value)) = headers.get(header::CONTENT_TYPE).map(|value| value.to_str()) else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.strip_prefix("application/").is_some_and(|kind| kind == "json" || kind.ends_with("+json"))
}

/// The encoding that the body is said to have, where that is not UTF-8.
fn other_charset(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    let parameters = value.split(';').skip(1).filter_map(|parameter| parameter.split_once('='));
    let charsets = parameters.filter(|(name, _)| name.trim().eq_ignore_ascii_case("charset"));
    let mut names = charsets.map(|(_, name)| name.trim().trim_matches('"').to_ascii_lowercase());
    names.find(|name| name != "utf-8" && name != "utf8")
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("expected a request body of at most {limit} bytes; send less, or raise body_limit_bytes");
    ApiError::body(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

/// A connection that is closed while something is unread is reset, and with it goes the answer: reads on for a moment.
/// Who waits for a `100 Continue` sends nothing.
pub(super) fn linger(headers: &HeaderMap, body: Body) {
    if headers.contains_key(header::EXPECT) {
        return;
    }
    tokio::spawn(tokio::time::timeout(LINGER, async move {
        let mut stream = body.into_data_stream();
        let mut rest = LINGER_BYTES;
        while let Some(Ok(bytes)) = stream.next().await {
            rest = rest.saturating_sub(bytes.len());
            if rest == 0 {
                break;
            }
        }
    }));
}

/// Room for the bodies of all requests, in pieces of [`STEP`].
pub(super) fn body_budget(limit: usize) -> Arc<Semaphore> {
    let steps = limit.div_ceil(STEP).saturating_mul(LARGEST_BODIES).clamp(1, Semaphore::MAX_PERMITS);
    Arc::new(Semaphore::new(steps))
}

/// A body in memory.
pub(super) struct Buffered {
    pub(super) bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

struct Reader<'a> {
    stream: BodyDataStream,
    limit: usize,
    budget: &'a Arc<Semaphore>,
    room: Option<OwnedSemaphorePermit>,
}

impl Reader<'_> {
    async fn read(&mut self) -> Result<Bytes, ApiError> {
        let mut body = Vec::new();
        while let Some(bytes) = self.stream.next().await {
            let bytes = bytes.map_err(|e| {
                let message = format!("expected the whole body of the request, found its end early: {e}");
                ApiError::body(StatusCode::BAD_REQUEST, "incomplete_body", message)
            })?;
            let length = body.len() + bytes.len();
            if length > self.limit {
                return Err(too_large(self.limit));
            }
            self.reserve(length)?;
            body.extend_from_slice(&bytes);
        }
        Ok(body.into())
    }

    /// Makes sure of room for `length` bytes.
    fn reserve(&mut self, length: usize) -> Result<(), ApiError> {
        let wanted = length.saturating_sub(SMALL).div_ceil(STEP);
        let missing = wanted.saturating_sub(self.room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits));
        if missing == 0 {
            return Ok(());
        }
        let more = u32::try_from(missing).ok().and_then(|n| Arc::clone(self.budget).try_acquire_many_owned(n).ok());
        let more = more.ok_or_else(ApiError::bodies_full)?;
        match &mut self.room {
            Some(room) => room.merge(more),
            None => self.room = Some(more),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn json_type(value: &str) -> bool {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, value.parse().unwrap());
        is_json(&headers)
    }

    #[test]
    fn only_json_is_json() {
        for value in ["application/json", "Application/JSON; charset=utf-8", " application/problem+json"] {
            assert!(json_type(value), "{value}");
        }
        for value in ["text/plain", "application/x-www-form-urlencoded", "text/json", "application/jsonx", "json", ""] {
            assert!(!json_type(value), "{value}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[test]
    fn only_utf_8_is_the_encoding_of_json() {
        let other = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().unwrap());
            other_charset(&headers)
        };
        for value in ["application/json", "application/json; charset=UTF-8", "application/json;x=y; Charset=\"utf8\""] {
            assert_eq!(other(value), None, "{value}");
        }
        for value in ["application/json; charset=latin1", "application/json;charset = \"Latin1\"; x"] {
            assert_eq!(other(value).as_deref(), Some("latin1"), "{value}");
        }
    }

    async fn read(body: Body, limit: usize, budget: &Arc<Semaphore>) -> (Result<Bytes, ApiError>, Option<usize>) {
        let mut reader = Reader { stream: body.into_data_stream(), limit, budget, room: None };
        let read = reader.read().await;
        (read, reader.room.map(|room| room.num_permits()))
    }

    fn body(bytes: usize) -> Body {
        let pieces =
            (0..bytes).step_by(1000).map(move |start| Ok::<_, std::io::Error>(vec![b'x'; 1000.min(bytes - start)]));
        Body::from_stream(futures::stream::iter(pieces))
    }

    #[test]
    fn bodies_are_kept_within_the_limit_and_the_room_for_all() {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let budget = body_budget(STEP);
            assert_eq!(budget.available_permits(), LARGEST_BODIES);
            let (read_small, room) = read(body(SMALL), 10 * STEP, &budget).await;
            assert_eq!((read_small.unwrap().len(), room), (SMALL, None));
            let (read_large, room) = read(body(SMALL + 3 * STEP + 1), 10 * STEP, &budget).await;
            assert_eq!((read_large.unwrap().len(), room), (SMALL + 3 * STEP + 1, Some(4)));
            assert_eq!(read(body(5001), 5000, &budget).await.0.unwrap_err().status(), 413);
            let others = Arc::clone(&budget).try_acquire_many_owned(LARGEST_BODIES as u32 - 1).unwrap();
            assert_eq!(read(body(SMALL + STEP + 1), 10 * STEP, &budget).await.0.unwrap_err().status(), 429);
            drop(others);
            assert_eq!(budget.available_permits(), LARGEST_BODIES);
        });
    }
}
