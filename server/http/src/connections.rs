//! Connections: how many there are, how long each may take, and which one makes way when there are too many.
//!
//! A connection waits for its next request, is asked something, or is held by a request that is being worked for. At
//! the limit, a new one takes the place of the one that is not held and has been so the longest: those that were opened
//! and say nothing, and those that send byte by byte, go first, and whoever asks at once is always answered.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_io_timeout::TimeoutStream;
use tower::{Service, ServiceExt};

use service::metrics;

/// Longest head of a request, in bytes, and what is read of a body at once.
const BUFFER: usize = 64 << 10;
/// Time without a sign of life after which the other side is asked for one.
const PROBE_AFTER: Duration = Duration::from_secs(60);
/// Time for the system to have descriptors again.
const BREATH: Duration = Duration::from_millis(50);

/// What connections may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Connections at the same time.
    pub(super) connections: usize,
    /// For the head of the next request, from the opening or from the end of the last answer.
    pub(super) head: Duration,
    /// For a client to take anything of its answer.
    pub(super) write: Duration,
}

/// Accepts connections and serves them until `stop` says so; then takes no more, and ends when those there are have
/// been answered.
pub(super) async fn serve<S>(listener: TcpListener, service: S, limits: Limits, mut stop: watch::Receiver<bool>)
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let table = Arc::new(Table::default());
    let slots = Arc::new(Semaphore::new(limits.connections));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.changed() => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                not_accepted(&table, &error).await;
                continue;
            }
        };
        let slot = match Arc::clone(&slots).try_acquire_owned() {
            Ok(slot) => slot,
            Err(_) => {
                table.evict_oldest();
                tokio::select! {
                    // Fails only for a closed semaphore, and nobody closes it.
                    slot = Arc::clone(&slots).acquire_owned() => match slot {
                        Ok(slot) => slot,
                        Err(_) => break,
                    },
                    _ = stop.changed() => break,
                }
            }
        };
        let entered = Entered::new(&table);
        let (service, stop) = (service.clone(), stop.clone());
        tokio::spawn(async move {
            serve_one(stream, service, &entered.0, limits, stop).await;
            drop(entered);
            drop(slot);
        });
    }
    drop(listener);
    let all = u32::try_from(limits.connections).unwrap_or(u32::MAX);
    let _ = slots.acquire_many(all).await;
}

/// A client that went away before it was accepted is nobody's concern; without descriptors, the oldest makes way.
async fn not_accepted(table: &Table, error: &std::io::Error) {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted) {
        return;
    }
    tracing::warn!(%error, "a connection could not be accepted");
    table.evict_oldest();
    tokio::time::sleep(BREATH).await;
}

async fn serve_one<S>(
    stream: TcpStream,
    service: S,
    connection: &Connection,
    limits: Limits,
    mut stop: watch::Receiver<bool>,
) where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    set_options(&stream);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.write));
    let asked = connection.clone();
    let answering = service_fn(move |request: hyper::Request<Incoming>| {
        asked.renew();
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(asked.clone());
        service.clone().oneshot(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head).max_buf_size(BUFFER);
    let mut http = pin!(http.serve_connection(TokioIo::new(Box::pin(stream)), answering));
    let mut stopping = *stop.borrow();
    if stopping {
        http.as_mut().graceful_shutdown();
    }
    loop {
        tokio::select! {
            ended = http.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended early");
                    metrics::connection_cut(if error.is_timeout() { "timeout" } else { "client" });
                }
                return;
            }
            () = connection.0.evicted.notified() => {
                metrics::connection_cut("evicted");
                return;
            }
            _ = stop.changed(), if !stopping => {
                stopping = true;
                http.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Tokens of a stream leave at once, and a machine that vanished is noticed. Without either, everything still works.
fn set_options(stream: &TcpStream) {
    let keepalive = socket2::TcpKeepalive::new().with_time(PROBE_AFTER).with_interval(PROBE_AFTER / 4);
    let set = stream.set_nodelay(true).and_then(|()| socket2::SockRef::from(stream).set_tcp_keepalive(&keepalive));
    if let Err(error) = set {
        tracing::debug!(%error, "options of a connection could not be set");
    }
}

/// Connections that no request holds, by the order in which they began to wait.
#[derive(Default)]
struct Table {
    turns: Mutex<Turns>,
}

#[derive(Default)]
struct Turns {
    last: u64,
    open: usize,
    waiting: BTreeMap<u64, Arc<Inner>>,
}

impl Table {
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn evict_oldest(&self) {
        if let Some((_, oldest)) = self.turns().waiting.pop_first() {
            oldest.turn.store(HELD, Ordering::Relaxed);
            oldest.evicted.notify_one();
        }
    }
}

impl Turns {
    fn remove(&mut self, connection: &Inner) {
        if connection.turn.load(Ordering::Relaxed) != GONE {
            self.waiting.remove(&connection.turn.swap(HELD, Ordering::Relaxed));
        }
    }

    fn append(&mut self, connection: &Arc<Inner>) {
        if connection.turn.load(Ordering::Relaxed) != GONE {
            self.last += 1;
            connection.turn.store(self.last, Ordering::Relaxed);
            self.waiting.insert(self.last, Arc::clone(connection));
        }
    }
}

/// The turn of a connection that is held.
const HELD: u64 = 0;
/// The turn of a connection that has ended; what worked for it may end later.
const GONE: u64 = u64::MAX;

/// One connection, as its requests see it.
#[derive(Clone)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    table: Arc<Table>,
    /// Its key among those that wait, [`HELD`] or [`GONE`]; changes only under the table's lock.
    turn: AtomicU64,
    evicted: Notify,
}

impl Connection {
    /// It was heard of: all others that wait make way before it.
    fn renew(&self) {
        let mut turns = self.0.table.turns();
        turns.remove(&self.0);
        turns.append(&self.0);
    }

    /// Keeps it until the guard is dropped, whatever else comes.
    pub(super) fn hold(&self) -> Held {
        self.0.table.turns().remove(&self.0);
        Held(self.clone())
    }
}

/// An open connection; it leaves the table when this is dropped.
struct Entered(Connection);

impl Entered {
    fn new(table: &Arc<Table>) -> Entered {
        let connection =
            Arc::new(Inner { table: Arc::clone(table), turn: AtomicU64::new(HELD), evicted: Notify::new() });
        let mut turns = table.turns();
        turns.open += 1;
        turns.append(&connection);
        metrics::connections(turns.open);
        drop(turns);
        Entered(Connection(connection))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut turns = self.0.0.table.turns();
        turns.remove(&self.0.0);
        self.0.0.turn.store(GONE, Ordering::Relaxed);
        turns.open -= 1;
        metrics::connections(turns.open);
    }
}

/// A connection that makes way for nobody.
pub(super) struct Held(Connection);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.renew();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn is_evicted(entered: &Entered) -> bool {
        use futures::FutureExt;
        entered.0.0.evicted.notified().now_or_never().is_some()
    }

    #[test]
    fn the_connection_that_waits_longest_makes_way_and_one_that_is_held_never() {
        let table = Arc::new(Table::default());
        let [first, second, third] = [(); 3].map(|()| Entered::new(&table));
        let held = first.0.hold();
        second.0.renew();
        table.evict_oldest();
        assert_eq!([&first, &second, &third].map(is_evicted), [false, false, true]);
        drop(held);
        table.evict_oldest();
        assert_eq!([&first, &second].map(is_evicted), [false, true]);
    }

    #[test]
    fn a_connection_that_has_ended_does_not_come_back_with_the_work_for_it() {
        let table = Arc::new(Table::default());
        let entered = Entered::new(&table);
        let held = entered.0.hold();
        drop(entered);
        drop(held);
        let turns = table.turns();
        assert_eq!((turns.open, turns.waiting.len()), (0, 0));
    }
}
