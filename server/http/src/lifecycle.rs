//! From the first open port to the exit: listen, load, serve; then unready, refuse, drain, flush.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::connections::{self, Limits};
use super::control;
use super::routes;
use super::state::App;
use crate::open_files::raise_open_files;
use service::control::{Claim, Unspoken};
use service::metrics;
use service::{Purpose, Service};
use settings::{QuireError, Result, Settings};

/// Files that a server may have open beside its connections: those of the chunk store, of collections and of the model.
const OTHER_FILES: u64 = 640;
/// Fewest connections, however few files may be open.
const FEWEST_CONNECTIONS: usize = 16;
/// Time between two rounds in which what histograms gathered is summed up, also where nobody reads the metrics.
const UPKEEP: Duration = Duration::from_secs(5);

/// Time between two attempts to take commands.
const RETRY: Duration = Duration::from_secs(3);

/// Time for connections to close once every answer is complete, and for what was cut off to end.
const GOODBYE: Duration = Duration::from_secs(2);

/// Serves until SIGTERM or SIGINT. The port is open before the model is loaded, so that probes can tell "loading" from
/// "gone"; `announce` gets the address, `ready` is called when requests are taken. Returns what served, where it was loaded,
/// to be [closed](close) once the runtime has ended and with it all answers.
///
/// # Errors
/// An address that cannot be listened on; everything that keeps the model or the data folder from being opened.
pub async fn serve(
    settings: &Settings,
    announce: &dyn Fn(SocketAddr),
    ready: &dyn Fn(),
) -> Result<Option<Arc<Service>>> {
    let model_dir = settings.model_dir()?;
    let claim = Claim::take(&settings.data_dir)?;
    let listener = listen(&settings.host, settings.port).await?;
    let failed = |source| QuireError::Listen { address: settings.host.clone(), source };
    let address = listener.local_addr().map_err(failed)?;
    announce(address);

    let connections = connection_limit(settings.max_connections, raise_open_files());
    let recorder = metrics::install()?;
    let app = App::new(settings, settings.served_name(&model_dir), recorder.clone(), address, connections);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let limits = Limits {
        connections,
        head: Duration::from_secs(settings.header_seconds),
        write: Duration::from_secs(settings.write_seconds),
    };
    let (stop, stopped) = watch::channel(false);
    let data_dir = settings.data_dir.clone();
    let mut commands = tokio::spawn(take_commands(claim, data_dir, app.clone(), stopped.clone()));
    let server = tokio::spawn(connections::serve(listener, routes(app.clone()), limits, stopped));
    let upkeep = tokio::spawn(every(UPKEEP, move || recorder.run_upkeep()));

    let to_load = settings.clone();
    let mut loading = tokio::task::spawn_blocking(move || {
        let service = Service::open(&to_load, Purpose::Serve)?;
        service.recover();
        Ok::<_, QuireError>(service)
    });
    let mut loaded = false;
    loop {
        tokio::select! {
            service = &mut loading, if !loaded => {
                let service = service.map_err(|e| QuireError::Internal(format!("loading panicked: {e}")))?;
                app.become_ready(service?);
                loaded = true;
                begin_work(&app);
                ready();
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }

    app.drain();
    if let Some(service) = app.loaded() {
        service.stop_working();
    }
    tracing::info!("draining: requests are refused, running ones get {} s", settings.drain_seconds);
    tokio::select! {
        idle = tokio::time::timeout(Duration::from_secs(settings.drain_seconds), app.idle()) => if idle.is_err() {
            tracing::warn!("requests were still running after {} s; they are cut off", settings.drain_seconds);
        },
        // Whoever asks twice does not want to wait.
        _ = terminate.recv() => tracing::warn!("asked to stop again: running requests are cut off"),
        _ = interrupt.recv() => tracing::warn!("asked to stop again: running requests are cut off"),
    }
    if let Some(service) = app.loaded() {
        // Whoever still waits for an answer is told how it ended.
        service.engine().cut_off();
    }
    let _ = stop.send(true);
    let ended = async {
        let _ = server.await;
        let _ = (&mut commands).await;
    };
    if tokio::time::timeout(GOODBYE, ended).await.is_err() {
        tracing::warn!("connections were still open; they are cut off");
        commands.abort();
    }
    upkeep.abort();
    Ok(app.loaded().map(Arc::clone))
}

/// Holds the data folder for this server and takes commands there, until `stopped` says so. Where there is no room for that, as
/// on a full disk, it is tried again.
async fn take_commands(mut claim: Option<Claim>, data_dir: PathBuf, app: App, mut stopped: watch::Receiver<bool>) {
    let mut told = false;
    loop {
        match claim.take().map(Claim::listen) {
            Some(Ok((_claim, socket))) => {
                if told {
                    tracing::info!("commands can ask this server by now");
                }
                // The folder is held for as long as commands are taken.
                return control::serve(socket, app, stopped).await;
            }
            Some(Err(Unspoken { claim: held, what, error })) => {
                if !told {
                    let path = data_dir.display();
                    tracing::warn!(%error, %path, "{what}; commands cannot ask this server until that is possible");
                    told = true;
                }
                claim = held;
            }
            None => told = true,
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            _ = stopped.changed() => return,
        }
        if claim.is_none() {
            let dir = data_dir.clone();
            let taken = tokio::task::spawn_blocking(move || Claim::take(&dir)).await;
            claim = match taken {
                Ok(Ok(claim)) => claim,
                Ok(Err(problem)) => {
                    tracing::debug!(%problem, "the data folder cannot be taken yet");
                    None
                }
                Err(_) => None,
            };
        }
    }
}

/// Does something at once and then again and again, until it is dropped.
async fn every(period: Duration, round: impl Fn()) {
    let mut rounds = tokio::time::interval(period);
    loop {
        rounds.tick().await;
        round();
    }
}

/// Has files that are attached read in the background, and a share of the questions compared, until the server stops.
fn begin_work(app: &App) {
    let Some(service) = app.loaded().map(Arc::clone) else { return };
    if app.settings().monitor_share > 0.0 {
        let watched = Arc::clone(&service);
        let started = std::thread::Builder::new().name("monitor".into()).spawn(move || watched.watch());
        if let Err(error) = started {
            tracing::error!(%error, "no thread for the monitor: no question is compared with full recompute");
        }
    }
    let started = std::thread::Builder::new().name("background".into()).spawn(move || service.work());
    if let Err(error) = started {
        tracing::error!(%error, "no thread for work in the background: files that are attached wait for the next start");
    }
}

/// Ends the engine, whose requests nobody waits for any more, and closes the store. False: something did not end in time, and
/// the store is left open. Every write of it was synced when it was made.
pub fn close(service: Arc<Service>) -> bool {
    let deadline = Instant::now() + GOODBYE;
    let (ended, end) = mpsc::channel();
    let engine = service.engine().clone();
    std::thread::spawn(move || {
        engine.shutdown();
        drop(engine);
        let _ = ended.send(());
    });
    let engine_ended = end.recv_timeout(GOODBYE).is_ok();
    while Arc::strong_count(&service) > 1 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    // An engine that still runs may hold chunks of the store.
    let ended = engine_ended && Arc::strong_count(&service) == 1;
    if !ended {
        tracing::warn!("some work did not end in time; it is cut off");
        // Nobody else may be the last to let go of the store.
        std::mem::forget(service);
    }
    ended
}

/// Connections at the same time: as wanted, or fewer where too few files may be open.
fn connection_limit(wanted: usize, open_files: u64) -> usize {
    let others = OTHER_FILES.min(open_files / 2);
    let possible = usize::try_from(open_files - others).unwrap_or(usize::MAX).max(FEWEST_CONNECTIONS);
    if wanted > possible {
        tracing::warn!("{possible} connections instead of {wanted}: no more than {open_files} files may be open");
    }
    wanted.clamp(FEWEST_CONNECTIONS, possible)
}

async fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let named = |source| QuireError::Listen { address: format!("{host}:{port}"), source };
    let addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await.map_err(named)?.collect();
    let mut last = None;
    for address in addresses {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
                last = Some(QuireError::PortInUse { address });
            }
            Err(source) => last = Some(QuireError::Listen { address: address.to_string(), source }),
        }
    }
    Err(last.unwrap_or_else(|| named(std::io::ErrorKind::AddrNotAvailable.into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_histograms_gather_is_summed_up_again_and_again() {
        let rounds = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counted = rounds.clone();
        let upkeep = tokio::spawn(every(Duration::from_millis(1), move || {
            counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }));
        while rounds.load(std::sync::atomic::Ordering::Relaxed) < 3 {
            tokio::task::yield_now().await;
        }
        upkeep.abort();
    }

    #[test]
    fn connections_leave_files_for_everything_else() {
        assert_eq!(connection_limit(1024, 1 << 20), 1024);
        assert_eq!(connection_limit(1024, 1024), 512);
        assert_eq!(connection_limit(1024, 1500), 860);
        assert_eq!(connection_limit(1024, 256), 128);
        assert_eq!(connection_limit(1, 256), FEWEST_CONNECTIONS);
        assert_eq!(connection_limit(1024, 20), FEWEST_CONNECTIONS);
    }
}
