//! `POST /v1/chat/completions`, whole and streamed.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use engine::EngineError;
use futures::stream::{self, Stream};
use serde_json::{Value, json};

use super::admission::Admitted;
use super::chat_request::ChatRequest;
use super::citation;
use super::error::ApiError;
use super::observe::Account;
use super::queue::Place;
use super::state::{App, unix_now};
use crate::error::{QuireError, Result};
use crate::service::{Answer, Answering, Piece, Question, Service};

pub(super) async fn completions(
    State(app): State<App>,
    Admitted { service, body, place, account }: Admitted,
) -> std::result::Result<Response, ApiError> {
    let request = ChatRequest::parse(&body.bytes, app.settings(), app.model())?;
    drop(body);
    let head = Head::new(app.model());
    let (stream, include_usage) = (request.stream, request.include_usage);
    // Searching, tokenising and computing missing chunks block. Where the client hangs up meanwhile, this function is dropped
    // here: then they end behind the chunk at hand, and count as a request until that.
    let waits = Arc::new(());
    let gone = Arc::downgrade(&waits);
    // Fails only for a closed semaphore, and nobody closes it.
    let turn = Arc::clone(app.preparing()).acquire_owned().await.ok();
    let begun = tokio::task::spawn_blocking(move || {
        let begun = begin(&service, request, &|| gone.strong_count() > 0);
        drop(turn);
        (begun, place)
    })
    .await;
    drop(waits);
    let (answering, place) = begun.map_err(|e| QuireError::Internal(format!("a request panicked: {e}")))?;
    let answering = answering?;
    let notes = notes_header(answering.notes());
    if stream {
        let keepalive = KeepAlive::new().interval(Duration::from_secs(app.settings().keepalive_seconds));
        let events = Streaming::new(answering, (place, account), head, include_usage).events();
        return Ok(with_notes(notes, Sse::new(events).keep_alive(keepalive)));
    }
    let answer = complete(answering).await?;
    drop(place);
    account.tokens(answer.stats.prompt_tokens, answer.stats.completion_tokens);
    Ok(with_notes(notes, Json(head.whole(&answer))))
}

/// Header of an answer with what its reader should know before it begins.
const NOTES_HEADER: &str = "x-quire-notes";
/// Bytes of that header at most; `quire.notes` has the whole.
const NOTES_BYTES: usize = 512;

fn with_notes(notes: Option<HeaderValue>, response: impl IntoResponse) -> Response {
    let mut response = response.into_response();
    if let Some(notes) = notes {
        response.headers_mut().insert(NOTES_HEADER, notes);
    }
    response
}

/// Notes in one line of printable ASCII.
fn notes_header(notes: &[String]) -> Option<HeaderValue> {
    let printable = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let line: String = notes.join("; ").chars().map(printable).take(NOTES_BYTES).collect();
    HeaderValue::from_str(&line).ok().filter(|value| !value.is_empty())
}

fn begin(service: &Arc<Service>, request: ChatRequest, wanted: &dyn Fn() -> bool) -> Result<Answering> {
    if !wanted() {
        return Err(EngineError::Cancelled.into());
    }
    let query = request.query();
    let ChatRequest { messages, options, collection, top_chunks, .. } = request;
    match collection {
        Some(collection) => {
            service.answer_while(&Question { messages, query: query?, collection, top_chunks, options }, wanted)
        }
        None => service.generate(&messages, &options),
    }
}

async fn complete(mut answering: Answering) -> Result<Answer> {
    while let Some(piece) = answering.next().await {
        if let Piece::Done(answer) = piece? {
            return Ok(*answer);
        }
    }
    Err(QuireError::Internal("the engine ended an answer without saying so".into()))
}

/// What all objects of one completion share.
struct Head {
    id: String,
    created: u64,
    model: String,
}

impl Head {
    fn new(model: &str) -> Head {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let seed = format!("{} {count} {:?}", std::process::id(), std::time::SystemTime::now());
        let hash = blake3::hash(seed.as_bytes()).to_hex();
        Head { id: format!("chatcmpl-{}", &hash[..24]), created: unix_now(), model: model.into() }
    }

    fn object(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    fn whole(&self, answer: &Answer) -> Value {
        let message = json!({"role": "assistant", "content": answer.text, "refusal": null});
        let choice = json!({"index": 0, "message": message, "logprobs": null, "finish_reason": answer.finish_reason});
        let mut object = self.object("chat.completion", json!([choice]));
        object["usage"] = usage(answer);
        object["quire"] = quire(answer);
        object
    }

    fn chunk(&self, delta: Value, finish_reason: Option<&str>) -> Value {
        let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish_reason});
        self.object("chat.completion.chunk", json!([choice]))
    }
}

fn usage(answer: &Answer) -> Value {
    let stats = &answer.stats;
    json!({
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.completion_tokens,
        "total_tokens": stats.prompt_tokens + stats.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens + stats.prefix_tokens},
    })
}

fn quire(answer: &Answer) -> Value {
    let citations: Vec<Value> = answer.citations.iter().map(citation::public).collect();
    json!({"stats": answer.stats, "citations": citations, "notes": answer.notes})
}

/// A completion as server-sent events. Dropping it, as a closed connection does, cancels the work.
struct Streaming {
    answering: Answering,
    head: Head,
    include_usage: bool,
    state: Step,
    account: Account,
    _place: Place,
}

/// What comes next.
enum Step {
    Role,
    Text,
    Usage(Box<Answer>),
    Done,
    End,
}

impl Streaming {
    fn new(answering: Answering, of: (Place, Account), head: Head, include_usage: bool) -> Streaming {
        let (place, account) = of;
        Streaming { answering, head, include_usage, state: Step::Role, account, _place: place }
    }

    fn events(self) -> impl Stream<Item = std::result::Result<Event, Infallible>> {
        stream::unfold(self, |mut streaming| async move {
            let event = streaming.step().await?;
            Some((Ok(event), streaming))
        })
    }

    async fn step(&mut self) -> Option<Event> {
        match std::mem::replace(&mut self.state, Step::End) {
            Step::Role => {
                self.state = Step::Text;
                let mut chunk = self.head.chunk(json!({"role": "assistant", "content": ""}), None);
                if !self.answering.notes().is_empty() {
                    chunk["quire"] = json!({"notes": self.answering.notes()});
                }
                Some(self.event(chunk))
            }
            Step::Text => self.next_piece().await,
            Step::Usage(answer) => {
                self.state = Step::Done;
                let mut chunk = self.head.object("chat.completion.chunk", json!([]));
                chunk["usage"] = usage(&answer);
                Some(Event::default().data(chunk.to_string()))
            }
            Step::Done => Some(Event::default().data("[DONE]")),
            Step::End => None,
        }
    }

    async fn next_piece(&mut self) -> Option<Event> {
        match self.answering.next().await {
            Some(Ok(Piece::Text(text))) => {
                self.state = Step::Text;
                let chunk = self.head.chunk(json!({"content": text}), None);
                Some(self.event(chunk))
            }
            Some(Ok(Piece::Done(answer))) => {
                self.account.tokens(answer.stats.prompt_tokens, answer.stats.completion_tokens);
                let mut chunk = self.head.chunk(json!({}), Some(answer.finish_reason));
                chunk["quire"] = quire(&answer);
                self.state = if self.include_usage { Step::Usage(answer) } else { Step::Done };
                Some(self.event(chunk))
            }
            Some(Err(error)) => Some(self.failure(&error)),
            None => Some(self.failure(&QuireError::Internal("the engine ended an answer without saying so".into()))),
        }
    }

    /// An error, behind which only the end comes.
    fn failure(&mut self, error: &QuireError) -> Event {
        self.state = Step::Done;
        Event::default().data(ApiError::from(error).event().to_string())
    }

    /// With `include_usage`, every chunk but the last has a `usage` of null.
    fn event(&self, mut chunk: Value) -> Event {
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        Event::default().data(chunk.to_string())
    }
}
