//! What handlers share.

use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{Semaphore, watch};

use super::admission::body_budget;
use super::auth::hash_key;
use super::connections::Connection;
use super::queue::{Place, Queue};
use super::turns::Turns;
use service::Service;
use settings::{QuireError, Result, Settings};

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The model is being loaded.
    Loading,
    /// Requests are taken.
    Ready,
    /// Requests are refused, running ones are completed.
    Draining,
}

impl Phase {
    pub(super) fn name(self) -> &'static str {
        match self {
            Phase::Loading => "loading",
            Phase::Ready => "ready",
            Phase::Draining => "draining",
        }
    }
}

/// Requests a core that are prepared at the same time: more only take the processor from one another.
const PREPARING_A_CORE: usize = 2;

/// Files that are uploaded at the same time.
const UPLOADS: usize = 16;

/// Cheap to clone.
#[derive(Clone)]
pub(super) struct App(Arc<State>);

impl Deref for App {
    type Target = State;
    fn deref(&self) -> &State {
        &self.0
    }
}

pub(super) struct State {
    settings: Settings,
    model: String,
    key: Option<blake3::Hash>,
    service: OnceLock<Arc<Service>>,
    phase: watch::Sender<Phase>,
    queue: Queue,
    bodies: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    preparing: Arc<Semaphore>,
    turns: Turns,
    address: SocketAddr,
    recorder: PrometheusHandle,
    pub(super) started_unix: u64,
}

impl App {
    /// `address` is listened on; `connections` there can be at the same time.
    pub(super) fn new(
        settings: &Settings,
        model: String,
        recorder: PrometheusHandle,
        address: SocketAddr,
        connections: usize,
    ) -> App {
        // Those that are held by requests make way for nobody: some are left for probes and refusals.
        let places = settings.max_sequences.saturating_add(settings.queue).min(connections - connections / 8);
        let preparing = std::thread::available_parallelism().map_or(1, usize::from) * PREPARING_A_CORE;
        App(Arc::new(State {
            key: settings.api_key.as_deref().map(hash_key),
            bodies: body_budget(body_limit(settings)),
            uploads: Arc::new(Semaphore::new(UPLOADS)),
            settings: settings.clone(),
            model,
            service: OnceLock::new(),
            phase: watch::Sender::new(Phase::Loading),
            queue: Queue::new(places),
            preparing: Arc::new(Semaphore::new(preparing)),
            turns: Turns::new(),
            address,
            recorder,
            started_unix: unix_now(),
        }))
    }
}

impl State {
    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The name under which the model is offered.
    pub(super) fn model(&self) -> &str {
        &self.model
    }

    /// The hash of the key that requests must carry.
    pub(super) fn key(&self) -> Option<&blake3::Hash> {
        self.key.as_ref()
    }

    /// The address that is listened on.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Largest body of a request, in bytes.
    pub(super) fn body_limit(&self) -> usize {
        body_limit(&self.settings)
    }

    /// Room for bodies of requests.
    pub(super) fn bodies(&self) -> &Arc<Semaphore> {
        &self.bodies
    }

    /// Turns of files that are uploaded.
    pub(super) fn uploads(&self) -> &Arc<Semaphore> {
        &self.uploads
    }

    /// Turns of searching, tokenising and computing missing chunks.
    pub(super) fn preparing(&self) -> &Arc<Semaphore> {
        &self.preparing
    }

    pub(super) fn recorder(&self) -> &PrometheusHandle {
        &self.recorder
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Returns once the model is loaded, or never will be.
    pub(super) async fn loaded_or_draining(&self) -> Phase {
        // Fails only without a sender, which lives as long as this.
        self.phase.subscribe().wait_for(|phase| *phase != Phase::Loading).await.map_or(Phase::Draining, |phase| *phase)
    }

    /// Returns once requests are refused.
    pub(super) async fn draining(&self) {
        let _ = self.phase.subscribe().wait_for(|phase| *phase == Phase::Draining).await;
    }

    /// Turns to write documents.
    pub(super) fn turns(&self) -> &Turns {
        &self.turns
    }

    /// The model is loaded: requests are taken from now on, unless the server is stopping already.
    pub(super) fn become_ready(&self, service: Service) {
        let _ = self.service.set(Arc::new(service));
        self.phase.send_if_modified(|phase| {
            let loading = *phase == Phase::Loading;
            if loading {
                *phase = Phase::Ready;
            }
            loading
        });
    }

    /// Requests are refused from now on.
    pub(super) fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    /// The service, whatever the phase; `None` while it is being loaded.
    pub(super) fn loaded(&self) -> Option<&Arc<Service>> {
        self.service.get()
    }

    /// The error with which [`admit`](Self::admit) would refuse a request now.
    pub(super) fn may_admit(&self) -> Result<()> {
        match (self.phase(), self.service.get()) {
            (Phase::Draining, _) => Err(QuireError::Draining),
            (Phase::Ready, Some(_)) if self.queue.is_full() => Err(self.queue.refuse()),
            (Phase::Ready, Some(_)) => Ok(()),
            _ => Err(QuireError::Loading),
        }
    }

    /// Admission of one request: taken before any work is done for it, and held until its answer is complete.
    pub(super) fn admit(&self, connection: Option<&Connection>) -> Result<(Arc<Service>, Place)> {
        match (self.phase(), self.service.get()) {
            (Phase::Draining, _) => Err(QuireError::Draining),
            (Phase::Ready, Some(service)) => Ok((Arc::clone(service), self.queue.enter(connection)?)),
            _ => Err(QuireError::Loading),
        }
    }

    /// The service, for requests that take no place in the queue.
    pub(super) fn serving(&self) -> Result<Arc<Service>> {
        match (self.phase(), self.service.get()) {
            (Phase::Draining, _) => Err(QuireError::Draining),
            (Phase::Ready, Some(service)) => Ok(Arc::clone(service)),
            _ => Err(QuireError::Loading),
        }
    }

    /// Returns when no request is admitted any more.
    pub(super) async fn idle(&self) {
        self.queue.idle().await;
    }
}

fn body_limit(settings: &Settings) -> usize {
    usize::try_from(settings.body_limit_bytes.0).unwrap_or(usize::MAX)
}

/// Seconds since the Unix epoch.
pub(super) fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
