//! `POST /v1/chat/completions`, whole and streamed.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use engine::{EngineError, TokenLogprob};
use futures::StreamExt;
use futures::stream::{self, SelectAll, Stream};
use serde_json::Value;

use super::admission::{Admitted, Buffered};
use super::chat_request::{ChatRequest, Defaults};
use super::chat_response::{Choice, Head};
use super::error::ApiError;
use super::observe::Account;
use super::queue::Place;
use super::state::App;
use service::{Answer, Answering, Piece, Question, Service};
use settings::{QuireError, Result};

pub(super) async fn completions(
    State(app): State<App>,
    Admitted { service, body, place, account }: Admitted,
) -> std::result::Result<Response, ApiError> {
    let request = read(&app, &service, body).await?;
    let head = Head::new(app.model(), request.options.logprobs.is_some());
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
    let notes = answering.first().and_then(|answering| notes_header(answering.notes()));
    if stream {
        let keepalive = KeepAlive::new().interval(Duration::from_secs(app.settings().keepalive_seconds));
        let events = Streaming::new(answering, (place, account), head, include_usage).events();
        return Ok(with_notes(notes, Sse::new(events).keep_alive(keepalive)));
    }
    let mut answers = Vec::with_capacity(answering.len());
    for answering in answering {
        answers.push(complete(answering).await?);
    }
    drop(place);
    report(&account, answers.iter().map(|(answer, _)| answer));
    Ok(with_notes(notes, Json(head.whole(&answers))))
}

/// Bytes of a body from which on it is not parsed between the steps of other requests.
const LARGE_BODY: usize = 64 << 10;

async fn read(app: &App, service: &Arc<Service>, body: Buffered) -> Result<ChatRequest> {
    let small = body.bytes.len() < LARGE_BODY;
    let (app, service) = (app.clone(), Arc::clone(service));
    let parse = move || {
        let settings = app.settings();
        let defaults = Defaults {
            options: service.options(),
            top_chunks: settings.top_chunks,
            model: app.model(),
            most_choices: settings.max_sequences,
        };
        ChatRequest::parse(&body.bytes, &defaults)
    };
    if small {
        return parse();
    }
    let parsed = tokio::task::spawn_blocking(parse).await;
    parsed.map_err(|e| QuireError::Internal(format!("reading a request panicked: {e}")))?
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

/// Tells what a request took: its answers have one prompt.
fn report<'a>(account: &Account, answers: impl Iterator<Item = &'a Answer>) {
    let (mut prompt, mut completion) = (0, 0);
    for answer in answers {
        prompt = answer.stats.prompt_tokens;
        completion += answer.stats.completion_tokens;
    }
    account.tokens(prompt, completion);
}

/// One answer for each choice; equal seeds would give equal ones.
fn begin(service: &Arc<Service>, request: ChatRequest, wanted: &dyn Fn() -> bool) -> Result<Vec<Answering>> {
    if !wanted() {
        return Err(EngineError::Cancelled.into());
    }
    let ChatRequest { messages, options, passages, choices, .. } = request;
    let answer = |choice: usize| {
        let mut options = options.clone();
        options.sampling.seed = options.sampling.seed.map(|seed| seed.wrapping_add(choice as u64));
        match &passages {
            Some(passages) => {
                let (messages, passages) = (messages.clone(), passages.clone());
                service.answer_while(&Question { messages, passages, options }, wanted)
            }
            None => service.generate(&messages, &options),
        }
    };
    (0..choices).map(answer).collect()
}

async fn complete(mut answering: Answering) -> Result<Choice> {
    while let Some(piece) = answering.next().await {
        if let Piece::Done(answer) = piece? {
            return Ok((*answer, answering.take_logprobs()));
        }
    }
    Err(ended())
}

/// An answer has ended without its last piece.
fn ended() -> QuireError {
    QuireError::Internal("the engine ended an answer without saying so".into())
}

/// A piece of one of the answers, with its tokens.
type ChoicePiece = (usize, Result<Piece>, Vec<TokenLogprob>);

/// A completion as server-sent events. Dropping it, as a closed connection does, cancels the work.
struct Streaming {
    pieces: SelectAll<Pin<Box<dyn Stream<Item = ChoicePiece> + Send>>>,
    head: Head,
    include_usage: bool,
    /// What is to be sent before anything is waited for.
    events: VecDeque<Event>,
    /// Answers that go on.
    open: usize,
    answers: Vec<Answer>,
    account: Account,
    _place: Place,
}

impl Streaming {
    fn new(answering: Vec<Answering>, of: (Place, Account), head: Head, include_usage: bool) -> Streaming {
        let (open, (place, account)) = (answering.len(), of);
        let openings: Vec<Value> =
            answering.iter().enumerate().map(|(index, answering)| head.opening(index, answering.notes())).collect();
        let pieces = answering.into_iter().enumerate().map(|(index, answering)| pieces(index, answering).boxed());
        let pieces = stream::select_all(pieces);
        let (events, answers) = (VecDeque::new(), Vec::new());
        let mut streaming = Streaming { pieces, head, include_usage, events, open, answers, account, _place: place };
        openings.into_iter().for_each(|chunk| streaming.chunk(chunk));
        streaming
    }

    fn events(self) -> impl Stream<Item = std::result::Result<Event, Infallible>> {
        stream::unfold(self, |mut streaming| async move {
            let event = streaming.next().await?;
            Some((Ok(event), streaming))
        })
    }

    async fn next(&mut self) -> Option<Event> {
        while self.events.is_empty() && self.open > 0 {
            match self.pieces.next().await {
                Some((index, Ok(Piece::Text(text)), tokens)) => self.chunk(self.head.text(index, &text, &tokens)),
                Some((index, Ok(Piece::Done(answer)), tokens)) => {
                    self.chunk(self.head.closing(index, &answer, &tokens));
                    self.answers.push(*answer);
                    report(&self.account, self.answers.iter());
                    self.open -= 1;
                    if self.open == 0 {
                        self.close();
                    }
                }
                Some((_, Err(error), _)) => self.fail(&error),
                None => self.fail(&ended()),
            }
        }
        self.events.pop_front()
    }

    /// With `include_usage`, every chunk but the last has a `usage` of null.
    fn chunk(&mut self, mut chunk: Value) {
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        self.events.push_back(Event::default().data(chunk.to_string()));
    }

    fn close(&mut self) {
        if self.include_usage {
            let usage = self.head.usage(&self.answers);
            self.events.push_back(Event::default().data(usage.to_string()));
        }
        self.events.push_back(Event::default().data("[DONE]"));
    }

    /// The other answers are cancelled.
    fn fail(&mut self, error: &QuireError) {
        self.pieces.clear();
        self.open = 0;
        self.events.push_back(Event::default().data(ApiError::from(error).event().to_string()));
        self.events.push_back(Event::default().data("[DONE]"));
    }
}

fn pieces(index: usize, answering: Answering) -> impl Stream<Item = ChoicePiece> {
    stream::unfold(answering, move |mut answering| async move {
        let piece = answering.next().await?;
        let tokens = answering.take_logprobs();
        Some(((index, piece, tokens), answering))
    })
}
