//! `POST /v1/files`: a file comes in as a form of several parts, and goes to disk piece by piece.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, Bytes};
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::{BoxError, Json};
use futures::Stream;
use tokio::sync::OwnedSemaphorePermit;

use super::admission::linger;
use super::error::ApiError;
use super::files::{Answer, blocking, object};
use super::state::App;
use super::values::{cut, invalid};
use service::{Service, Upload, UploadedFile};
use settings::{QuireError, Result};

/// Bytes of a field beside the file at most.
const LONGEST_FIELD: usize = 1024;
/// Bytes of a file that are written at a time.
const PIECE: usize = 256 << 10;
/// Bytes that a form has beside its file at most.
const FORM: u64 = 64 << 10;
/// Bytes of a form that are held in memory beside those, about.
const AHEAD: usize = 1 << 20;
/// What files may be for.
const PURPOSES: [&str; 2] = ["assistants", "user_data"];
/// Seconds that a file may be kept where it expires: an hour to 30 days.
const KEPT: std::ops::RangeInclusive<u64> = 3_600..=2_592_000;
const KNOWN: &str = "a form takes file, purpose, expires_after[anchor] and expires_after[seconds]";

/// What a form says beside the file.
#[derive(Default)]
struct Form {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
}

impl Form {
    fn purpose(&self) -> Result<String> {
        match &self.purpose {
            Some(purpose) if PURPOSES.contains(&purpose.as_str()) => Ok(purpose.clone()),
            other => {
                let found = other.as_ref().map_or("nothing".into(), |found| format!("`{}`", cut(found)));
                Err(invalid("purpose", format!("expected {}, found {found}", PURPOSES.join(" or "))))
            }
        }
    }

    /// For how long the file is kept; `None`: until it is deleted.
    fn seconds(&self) -> Result<Option<u64>> {
        match (self.anchor.as_deref(), &self.seconds) {
            (None, None) => Ok(None),
            (Some("created_at"), Some(text)) => {
                let seconds = text.parse().ok().filter(|seconds| KEPT.contains(seconds));
                seconds.map(Some).ok_or_else(|| {
                    let problem = format!("expected {} to {} seconds, found `{}`", KEPT.start(), KEPT.end(), cut(text));
                    invalid("expires_after.seconds", problem)
                })
            }
            (Some("created_at"), None) => {
                Err(invalid("expires_after.seconds", "expected it together with the anchor, found nothing".into()))
            }
            (other, _) => {
                let found = other.map_or("nothing".into(), |found| format!("`{}`", cut(found)));
                Err(invalid("expires_after.anchor", format!("expected created_at, found {found}")))
            }
        }
    }
}

pub(super) async fn create(State(app): State<App>, request: Request) -> Answer {
    let headers = request.headers().clone();
    let limit = app.settings().upload_limit_bytes.0;
    let turn = match may_upload(&app, &headers, limit) {
        Ok(turn) => turn,
        Err(refusal) => {
            linger(&headers, request.into_body());
            return Err(refusal);
        }
    };
    let service = app.serving()?;
    let ahead = Arc::new(AtomicUsize::new(0));
    let request = request.map(|body| Body::from_stream(Paced::new(body, &ahead)));
    let mut form = Multipart::from_request(request, &()).await.map_err(|e| not_a_form(&e.body_text()))?;
    let patience = Duration::from_secs(app.settings().body_seconds);
    let outcome = Receiver { service: &service, limit, patience, ahead: &ahead }.receive(&mut form).await;
    if outcome.is_err() {
        // Its sender comes to read the refusal.
        tokio::spawn(tokio::time::timeout(Duration::from_secs(2), async move {
            while let Ok(Some(mut field)) = form.next_field().await {
                while let Ok(Some(bytes)) = field.chunk().await {
                    ahead.fetch_sub(bytes.len(), Ordering::Relaxed);
                }
            }
        }));
    }
    drop(turn);
    Ok(Json(object(&outcome?)))
}

/// Everything that can be known before the form is read.
fn may_upload(app: &App, headers: &HeaderMap, limit: u64) -> Result<OwnedSemaphorePermit, ApiError> {
    app.serving()?;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if !kind.trim_start().to_ascii_lowercase().starts_with("multipart/form-data") {
        let message = "expected a body of `Content-Type: multipart/form-data`: send the file as a form";
        return Err(ApiError::body(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > limit.saturating_add(FORM)) {
        return Err(QuireError::UploadTooLarge { limit }.into());
    }
    Arc::clone(app.uploads()).try_acquire_owned().map_err(|_| ApiError::uploads_full())
}

/// A body that is given out piece by piece, as it is taken: the reader of forms would gather all that has come already in
/// memory, and look for the end of a part's head without end.
struct Paced {
    body: BodyDataStream,
    /// Bytes that were given out and that nobody has taken yet.
    ahead: Arc<AtomicUsize>,
    /// A piece was just given out.
    pause: bool,
}

impl Paced {
    fn new(body: Body, ahead: &Arc<AtomicUsize>) -> Paced {
        Paced { body: body.into_data_stream(), ahead: Arc::clone(ahead), pause: false }
    }
}

impl Stream for Paced {
    type Item = Result<Bytes, BoxError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.pause) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = std::task::ready!(Pin::new(&mut self.body).poll_next(context));
        let Some(Ok(bytes)) = next else { return Poll::Ready(next.map(|next| next.map_err(Into::into))) };
        self.pause = true;
        if self.ahead.fetch_add(bytes.len(), Ordering::Relaxed) > AHEAD {
            return Poll::Ready(Some(Err("it has too much beside its file".into())));
        }
        Poll::Ready(Some(Ok(bytes)))
    }
}

/// Takes in a form.
struct Receiver<'a> {
    service: &'a Arc<Service>,
    /// Bytes of a file at most.
    limit: u64,
    /// How long nothing may come.
    patience: Duration,
    ahead: &'a AtomicUsize,
}

impl Receiver<'_> {
    /// Reads a form. Its fields come in any order, so that they are looked at once all have come.
    async fn receive(&self, multipart: &mut Multipart) -> Result<UploadedFile, ApiError> {
        let mut form = Form::default();
        let mut file: Option<(String, Upload)> = None;
        while let Some(field) = self.in_time(multipart.next_field()).await? {
            let name = field.name().unwrap_or_default().to_string();
            let place = match name.as_str() {
                "file" if file.is_none() => {
                    file = Some(self.file(field).await?);
                    continue;
                }
                "purpose" => &mut form.purpose,
                "expires_after[anchor]" | "expires_after.anchor" => &mut form.anchor,
                "expires_after[seconds]" | "expires_after.seconds" => &mut form.seconds,
                "file" => return Err(invalid("file", "expected one file, found several".into()).into()),
                _ => return Err(QuireError::UnsupportedParameter { param: cut(&name), hint: KNOWN }.into()),
            };
            if place.is_some() {
                return Err(invalid(&name, "expected it once, found it twice".into()).into());
            }
            *place = Some(self.text(&name, field).await?);
        }
        let Some((filename, upload)) = file else {
            return Err(invalid("file", "expected a file, found nothing".into()).into());
        };
        let (purpose, seconds) = (form.purpose()?, form.seconds()?);
        let service = Arc::clone(self.service);
        blocking(move || service.finish_upload(upload, &filename, &purpose, seconds)).await
    }

    async fn file(&self, mut field: Field<'_>) -> Result<(String, Upload), ApiError> {
        let filename = field.file_name().unwrap_or_default().to_string();
        let (service, limit) = (Arc::clone(self.service), self.limit);
        let mut upload = blocking(move || service.begin_upload(limit)).await?;
        let mut piece = Vec::with_capacity(PIECE);
        while let Some(bytes) = self.chunk(&mut field).await? {
            piece.extend_from_slice(&bytes);
            if piece.len() >= PIECE {
                (upload, piece) = write(upload, piece).await?;
            }
        }
        (upload, _) = write(upload, piece).await?;
        Ok((filename, upload))
    }

    async fn text(&self, name: &str, mut field: Field<'_>) -> Result<String, ApiError> {
        let mut text = Vec::new();
        while let Some(bytes) = self.chunk(&mut field).await? {
            text.extend_from_slice(&bytes);
            if text.len() > LONGEST_FIELD {
                return Err(invalid(name, format!("expected at most {LONGEST_FIELD} bytes")).into());
            }
        }
        let text = String::from_utf8(text);
        Ok(text.map_err(|_| invalid(name, "expected a text in UTF-8".into()))?)
    }

    async fn chunk(&self, field: &mut Field<'_>) -> Result<Option<Bytes>, ApiError> {
        let chunk = self.in_time(field.chunk()).await?;
        self.ahead.fetch_sub(chunk.as_ref().map_or(0, Bytes::len), Ordering::Relaxed);
        Ok(chunk)
    }

    /// A file may take its time, but something of it must come.
    async fn in_time<T>(&self, next: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
        match tokio::time::timeout(self.patience, next).await {
            Ok(next) => next.map_err(|e| not_a_form(&e.body_text())),
            Err(_) => {
                let message = format!("expected more of the form within {} s; send it faster", self.patience.as_secs());
                Err(ApiError::body(StatusCode::REQUEST_TIMEOUT, "request_timeout", message))
            }
        }
    }
}

async fn write(mut upload: Upload, mut piece: Vec<u8>) -> Result<(Upload, Vec<u8>), ApiError> {
    blocking(move || {
        upload.write(&piece)?;
        piece.clear();
        Ok((upload, piece))
    })
    .await
}

fn not_a_form(problem: &str) -> ApiError {
    let message = format!("expected a form of several parts (multipart/form-data): {problem}");
    ApiError::body(StatusCode::BAD_REQUEST, "invalid_form", message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_is_for_something_that_is_done_and_kept_for_a_time_that_there_is() {
        let form = |purpose: &str| Form { purpose: Some(purpose.into()), ..Form::default() };
        assert_eq!(form("assistants").purpose().unwrap(), "assistants");
        assert!(form("fine-tune").purpose().unwrap_err().to_string().contains("assistants or user_data"));
        assert!(Form::default().purpose().is_err());
        let kept = |anchor: Option<&str>, seconds: Option<&str>| {
            Form { anchor: anchor.map(str::to_string), seconds: seconds.map(str::to_string), ..Form::default() }
                .seconds()
        };
        assert_eq!(kept(None, None).unwrap(), None);
        assert_eq!(kept(Some("created_at"), Some("3600")).unwrap(), Some(3600));
        for (anchor, seconds) in [
            (Some("created_at"), Some("3599")),
            (Some("created_at"), Some("2592001")),
            (Some("created_at"), None),
            (Some("last_active_at"), Some("3600")),
            (None, Some("3600")),
        ] {
            assert!(kept(anchor, seconds).is_err(), "{anchor:?} {seconds:?}");
        }
    }

    #[test]
    fn a_body_is_given_out_as_it_is_taken_and_not_far_ahead() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let pieces = futures::stream::iter((0..64).map(|_| Ok::<_, std::io::Error>(vec![b'x'; 64 << 10])));
            let ahead = Arc::new(AtomicUsize::new(0));
            let mut paced = Paced::new(Body::from_stream(pieces), &ahead);
            // Taken at once, all of it comes, with a pause behind each piece.
            for _ in 0..32 {
                let bytes = futures::StreamExt::next(&mut paced).await.unwrap().unwrap();
                assert!(paced.pause);
                ahead.fetch_sub(bytes.len(), Ordering::Relaxed);
            }
            let mut held = 0;
            while let Ok(bytes) = futures::StreamExt::next(&mut paced).await.unwrap() {
                held += bytes.len();
            }
            assert!(held <= AHEAD + (64 << 10), "{held}");
        });
    }
}
