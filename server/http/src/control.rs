//! Commands of the command line, asked over the socket in the data folder.
//!
//! Only this user and root come in. Answers take a place in the queue as those over TCP do, and are completed at shutdown;
//! everything else runs beside them and is given up then. Connections here are in no count: nobody else can open any.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::stream;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tower::ServiceExt;

use super::state::{App, Phase};
use super::turns::Turn;
use service::control::{
    Cancel, Canceller, Command, Event, Failure, Host, Line, PATH, PROTOCOL, PROTOCOL_HEADER, ServerInfo, VERSION,
    WriteAccess, execute, owned, owned_settings,
};
use service::metrics;
use settings::{QuireError, Result};

/// Largest command, in bytes: a conversation that fills a long context.
const LARGEST_COMMAND: usize = 64 << 20;
/// For the head of a request.
const HEAD: Duration = Duration::from_secs(10);
/// Time for a command that is given up to end behind its step.
const GOODBYE: Duration = Duration::from_secs(1);
/// Time that a command waits for its turn before it says so.
const MOMENT: Duration = Duration::from_millis(200);
/// Lines that wait for whoever asked to take them.
const LINES: usize = 64;

/// Takes commands until `stop` says so; then takes no more, and returns when those there are have ended.
pub(super) async fn serve(listener: std::os::unix::net::UnixListener, app: App, mut stop: watch::Receiver<bool>) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "commands cannot ask this server"),
    };
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stop.changed() => break,
        };
        match accepted {
            Ok((stream, _)) => drop(connections.spawn(serve_one(stream, app.clone()))),
            Err(error) => {
                tracing::warn!(%error, "a command could not be taken");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn serve_one(stream: UnixStream, app: App) {
    let peer = stream.peer_cred().map(|peer| peer.uid());
    let routes = match peer {
        Ok(uid) if may_ask(uid, rustix::process::geteuid().as_raw()) => Router::new()
            .route(PATH, get(info).post(command))
            .layer(DefaultBodyLimit::max(LARGEST_COMMAND))
            .with_state(app),
        _ => Router::new().fallback(stranger),
    };
    let answering = service_fn(move |request: Request<Incoming>| {
        let routes = routes.clone();
        async move {
            let mut response = routes.oneshot(request.map(Body::new)).await?;
            response.headers_mut().insert(PROTOCOL_HEADER, PROTOCOL.into());
            Ok::<_, Infallible>(response)
        }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), answering).await {
        tracing::debug!(%error, "who asked for a command went away");
    }
}

/// Whether a process of user `peer` may ask a server of user `own`.
fn may_ask(peer: u32, own: u32) -> bool {
    peer == own || peer == 0
}

async fn stranger() -> Response {
    refuse(StatusCode::FORBIDDEN, "this server takes commands of its own user and of root only")
}

fn refuse(status: StatusCode, message: &str) -> Response {
    let failure = Failure { message: message.into(), exit_code: 1, unreadable: false };
    (status, axum::Json(failure)).into_response()
}

async fn info(State(app): State<App>) -> axum::Json<ServerInfo> {
    let settings = app.settings();
    axum::Json(ServerInfo {
        pid: std::process::id(),
        version: VERSION.into(),
        protocol: PROTOCOL,
        model: app.model().into(),
        model_dir: settings.model_dir().map(|dir| dir.display().to_string()).unwrap_or_default(),
        phase: app.phase().name().into(),
        settings: owned_settings(settings, &owned()),
    })
}

async fn command(State(app): State<App>, headers: HeaderMap, body: Bytes) -> Response {
    let spoken = headers.get(PROTOCOL_HEADER).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    let command = match serde_json::from_slice::<Command>(&body) {
        Ok(command) if spoken == Some(PROTOCOL) => command,
        _ => {
            let message = format!(
                "the running server (process id {}) is quire {VERSION} and does not know this command. Stop it, or use \
                 the quire that it was started with",
                std::process::id()
            );
            return refuse(StatusCode::BAD_REQUEST, &message);
        }
    };
    drop(body);
    let (lines, receiver) = mpsc::channel(LINES);
    tokio::spawn(work(app, command, lines));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(ndjson(receiver))).into_response()
}

/// Lines up to the one that ends the answer.
fn ndjson(receiver: mpsc::Receiver<Line>) -> impl futures::Stream<Item = std::result::Result<Bytes, Infallible>> {
    stream::unfold(Some(receiver), |receiver| async move {
        let mut receiver = receiver?;
        let line = receiver.recv().await?;
        let last = !matches!(line, Line::Event(_));
        let mut text = serde_json::to_vec(&line).unwrap_or_else(|error| {
            tracing::error!(%error, "a line cannot be written as JSON");
            b"null".to_vec()
        });
        text.push(b'\n');
        Some((Ok(Bytes::from(text)), (!last).then_some(receiver)))
    })
}

/// Executes a command and sees to it that its last line is sent, whatever becomes of it.
async fn work(app: App, command: Command, lines: mpsc::Sender<Line>) {
    let (name, begun) = (command.name(), Instant::now());
    let outcome = match admitted(&app, &lines).await {
        Ok(host) => executed(&app, host, command, &lines).await,
        Err(error) => Err(error),
    };
    let (said, last) = match &outcome {
        Ok(()) => ("done", Line::Done),
        Err(_) if lines.is_closed() => ("cancelled", Line::Done),
        Err(error) => ("failed", Line::Error(Failure::from(error))),
    };
    metrics::command(name, said);
    tracing::info!(command = name, outcome = said, seconds = begun.elapsed().as_secs_f64(), "command");
    let _ = lines.send(last).await;
}

/// Waits until the model is loaded.
async fn admitted(app: &App, lines: &mpsc::Sender<Line>) -> Result<Host> {
    if app.phase() == Phase::Loading {
        let _ = lines.send(Line::Event(Event::Loading)).await;
    }
    tokio::select! {
        phase = app.loaded_or_draining() => match (phase, app.loaded()) {
            (Phase::Ready, Some(service)) => Ok(Host::serving(app.settings(), Arc::clone(service))),
            _ => Err(stopping()),
        },
        () = lines.closed() => Err(engine::EngineError::Cancelled.into()),
    }
}

async fn executed(app: &App, host: Host, command: Command, lines: &mpsc::Sender<Line>) -> Result<()> {
    let place = command.answers().then(|| app.admit(None)).transpose()?;
    let turn = match host.write_access(&command)? {
        Some(access) => tokio::select! {
            turn = taken(app, command.name(), &access, lines) => Some(turn),
            () = app.draining() => return Err(stopping()),
            () = lines.closed() => return Err(engine::EngineError::Cancelled.into()),
        },
        None => None,
    };
    let drains = command.answers();
    // Fails only for a closed semaphore, and nobody closes it.
    let preparing = if drains { Arc::clone(app.preparing()).acquire_owned().await.ok() } else { None };
    let (canceller, cancel) = Cancel::new();
    let mut running = start(host, command, (cancel, preparing), lines.clone());
    let outcome = tokio::select! {
        outcome = &mut running => outcome,
        () = lines.closed() => ended(&canceller, running).await,
        () = app.draining(), if !drains => match ended(&canceller, running).await {
            Ok(Err(QuireError::Engine(engine::EngineError::Cancelled))) => Ok(Err(stopping())),
            outcome => outcome,
        }
    };
    drop((place, turn));
    outcome.map_err(|e| QuireError::Internal(format!("a command panicked: {e}")))?
}

/// Waits for a turn to write documents, and says so where that takes more than a moment.
async fn taken(app: &App, name: &'static str, access: &WriteAccess, lines: &mpsc::Sender<Line>) -> Turn {
    let taking = app.turns().take(name, access);
    tokio::pin!(taking);
    tokio::select! {
        biased;
        turn = &mut taking => return turn,
        () = tokio::time::sleep(MOMENT) => {}
    }
    let note = format!("waiting for its turn in the running server; at work: {}", app.turns().at_work());
    let _ = lines.send(Line::Event(Event::Note(note))).await;
    taking.await
}

type Running = JoinHandle<Result<()>>;

/// Runs a command on a thread of its own. `preparing`: its turn of searching, tokenising and computing missing chunks.
fn start(
    host: Host,
    command: Command,
    (cancel, mut preparing): (Cancel, Option<OwnedSemaphorePermit>),
    lines: mpsc::Sender<Line>,
) -> Running {
    tokio::task::spawn_blocking(move || {
        execute(&host, &command, &cancel, &mut |event| {
            if matches!(event, Event::Begun { .. }) {
                preparing = None;
            }
            // Whoever asked may be gone; then the command is about to be given up.
            let _ = lines.blocking_send(Line::Event(event));
        })
    })
}

/// Gives a command up and waits a moment for it to end.
async fn ended(canceller: &Canceller, running: Running) -> std::result::Result<Result<()>, tokio::task::JoinError> {
    canceller.cancel();
    match tokio::time::timeout(GOODBYE, running).await {
        Ok(outcome) => outcome,
        Err(_) => Ok(Err(engine::EngineError::Cancelled.into())),
    }
}

/// The error of a command that the server's end cuts short.
fn stopping() -> QuireError {
    let message = format!(
        "the running server (process id {}) is shutting down. What was reported is done and kept; the same command goes \
         on from there, once the server has ended or another runs",
        std::process::id()
    );
    QuireError::Told { message, exit_code: 1, unreadable: false }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_servers_own_user_and_root_may_ask() {
        assert!(may_ask(1000, 1000) && may_ask(0, 1000) && may_ask(0, 0));
        assert!(!may_ask(1001, 1000) && !may_ask(1000, 0));
    }
}
