//! A running server, as the command line asks it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::EngineError;
use futures::StreamExt;
use http_body_util::{BodyDataStream, BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::cancel::Cancel;
use super::command::Command;
use super::event::{Event, Failure};
use super::holder::{self, Holder, in_use};
use super::wire::{Line, PATH, PROTOCOL, PROTOCOL_HEADER, ServerInfo, VERSION};
use settings::{QuireError, Result};

/// Time for a server to say who it is, and to begin an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Longest line of an answer, in bytes: a passage, an answer with its citations.
const LONGEST_LINE: usize = 256 << 20;

/// A server that was found and speaks as this program does.
#[derive(Clone, Debug)]
pub struct Remote {
    data_dir: PathBuf,
    holder: Holder,
    info: ServerInfo,
}

impl Remote {
    /// Asks the server who it is.
    ///
    /// # Errors
    /// [`QuireError::OtherVersion`]; [`QuireError::FolderInUse`] for one that cannot be asked.
    pub fn meet(data_dir: &Path, holder: Holder) -> Result<Remote> {
        let same = |version: &str, protocol| match (version, protocol) {
            (VERSION, PROTOCOL) => Ok(()),
            _ => Err(QuireError::OtherVersion { pid: holder.pid, found: version.into(), own: VERSION }),
        };
        same(&holder.version, holder.protocol)?;
        let unreachable = |why: String| in_use(data_dir, &holder, format!("it cannot be asked: {why}"));
        let socket = holder.socket.as_ref().ok_or_else(|| unreachable("it has no socket, as its log says".into()))?;
        let failed = |e: std::io::Error| unreachable(format!("{}: {e}", socket.display()));
        let text = runtime()?.block_on(async {
            let asked = send(data_dir, Method::GET, Vec::new());
            let answer = async {
                let response = asked.await?;
                let taken = response.status() == StatusCode::OK;
                let text = whole(response).await?;
                match serde_json::from_slice::<Failure>(&text) {
                    Ok(failure) if !taken => Err(std::io::Error::other(failure.message)),
                    _ => Ok(text),
                }
            };
            let answer = tokio::time::timeout(PATIENCE, answer).await;
            answer.unwrap_or_else(|_| Err(silent()))
        });
        let text = text.map_err(failed)?;
        let protocol = serde_json::from_slice::<Value>(&text).unwrap_or_default();
        let spoken = (protocol["version"].as_str().unwrap_or("unknown"), protocol["protocol"].as_u64());
        same(spoken.0, spoken.1.and_then(|number| u32::try_from(number).ok()).unwrap_or_default())?;
        let info = serde_json::from_slice(&text).map_err(|e| unreachable(format!("its answer cannot be read: {e}")))?;
        Ok(Remote { data_dir: data_dir.into(), holder, info })
    }

    /// What it says of itself.
    #[must_use]
    pub fn info(&self) -> &ServerInfo {
        &self.info
    }

    /// Has a command executed, as [`execute`](super::execute()) would here.
    ///
    /// # Errors
    /// What the command failed with, in the words of the server; a server that went away.
    pub fn run(&self, command: &Command, cancel: &Cancel, on_event: &mut dyn FnMut(Event)) -> Result<()> {
        let body = serde_json::to_vec(command)
            .map_err(|e| QuireError::Internal(format!("a command cannot be written as JSON: {e}")))?;
        let runtime = runtime()?;
        let mut answer = runtime.block_on(unless(cancel, self.begin(body)))?;
        loop {
            // The connection ends when this returns, and with it the work.
            match runtime.block_on(unless(cancel, answer.next()))? {
                Line::Event(event) => on_event(event),
                Line::Done => return Ok(()),
                Line::Error(failure) => return Err(refused(failure)),
            }
        }
    }

    /// Sends a command, and returns once its answer begins.
    async fn begin(&self, body: Vec<u8>) -> Result<Answer<'_>> {
        let asked = tokio::time::timeout(PATIENCE, send(&self.data_dir, Method::POST, body)).await;
        let asked = asked.unwrap_or_else(|_| Err(silent()));
        let response = asked.map_err(|e| match holder::find(&self.data_dir) {
            Ok(None) => self.lost("it has ended"),
            _ => in_use(&self.data_dir, &self.holder, format!("it cannot be asked: {e}")),
        })?;
        if response.status() != StatusCode::OK {
            let text = whole(response).await.unwrap_or_default();
            let unknown = |_| self.lost("it answered nothing that this quire knows");
            return Err(refused(serde_json::from_slice(&text).map_err(unknown)?));
        }
        Ok(Answer { remote: self, stream: response.into_body().into_data_stream(), unread: Vec::new() })
    }

    fn lost(&self, why: &str) -> QuireError {
        QuireError::ServerLost { pid: self.holder.pid, why: why.into() }
    }
}

/// The lines of an answer as they come.
struct Answer<'a> {
    remote: &'a Remote,
    stream: BodyDataStream<Incoming>,
    unread: Vec<u8>,
}

impl Answer<'_> {
    async fn next(&mut self) -> Result<Line> {
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line)
                    .map_err(|e| self.remote.lost(&format!("what it says cannot be read: {e}")));
            }
            if self.unread.len() > LONGEST_LINE {
                return Err(self.remote.lost("what it says does not end"));
            }
            match self.stream.next().await {
                Some(Ok(bytes)) => self.unread.extend_from_slice(&bytes),
                Some(Err(_)) | None => {
                    return Err(self.remote.lost("it ended, or was killed, before the command was done"));
                }
            }
        }
    }
}

/// What `work` gives, unless it is given up before.
async fn unless<T>(cancel: &Cancel, work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(EngineError::Cancelled.into()),
        outcome = work => outcome,
    }
}

fn silent() -> std::io::Error {
    std::io::Error::other("it did not answer; it may be stopped")
}

fn refused(failure: Failure) -> QuireError {
    let Failure { message, exit_code, unreadable } = failure;
    QuireError::Told { message, exit_code, unreadable }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    let failed = |source| QuireError::Io { action: "start the runtime for", path: "the running server".into(), source };
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)
}

/// Sends a request on a connection of its own and returns once the answer begins.
async fn send(data_dir: &Path, method: Method, body: Vec<u8>) -> std::io::Result<Response<Incoming>> {
    let stream = tokio::net::UnixStream::from_std(holder::connect(data_dir)?)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(PATH)
        .header(header::HOST, "quire")
        .header(header::CONTENT_TYPE, "application/json")
        .header(PROTOCOL_HEADER, PROTOCOL)
        .body(Full::new(Bytes::from(body)))
        .map_err(std::io::Error::other)?;
    sender.send_request(request).await.map_err(std::io::Error::other)
}

/// All of an answer that is short.
async fn whole(response: Response<Incoming>) -> std::io::Result<Bytes> {
    let collected = Limited::new(response.into_body(), 1 << 20).collect().await.map_err(std::io::Error::other)?;
    Ok(collected.to_bytes())
}
