//! What handlers share.

use std::ops::Deref;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};

use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Settings;
use crate::error::{QuireError, Result};
use crate::service::Service;

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// The model is being loaded.
    Loading = 0,
    /// Requests are taken.
    Ready = 1,
    /// Requests are refused, running ones are completed.
    Draining = 2,
}

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
    phase: AtomicU8,
    permits: Arc<Semaphore>,
    limit: usize,
    recorder: PrometheusHandle,
    pub(super) started_unix: u64,
}

impl App {
    pub(super) fn new(settings: &Settings, model: String, recorder: PrometheusHandle) -> App {
        let limit = settings.max_sequences.saturating_add(settings.queue).clamp(1, Semaphore::MAX_PERMITS);
        App(Arc::new(State {
            key: settings.api_key.as_deref().map(|key| blake3::hash(key.as_bytes())),
            settings: settings.clone(),
            model,
            service: OnceLock::new(),
            phase: AtomicU8::new(Phase::Loading as u8),
            permits: Arc::new(Semaphore::new(limit)),
            limit,
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

    pub(super) fn recorder(&self) -> &PrometheusHandle {
        &self.recorder
    }

    pub(super) fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            0 => Phase::Loading,
            1 => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// The model is loaded: requests are taken from now on, unless the server is stopping already.
    pub(super) fn become_ready(&self, service: Service) {
        let _ = self.service.set(Arc::new(service));
        let (loading, ready) = (Phase::Loading as u8, Phase::Ready as u8);
        let _ = self.phase.compare_exchange(loading, ready, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Requests are refused from now on.
    pub(super) fn drain(&self) {
        self.phase.store(Phase::Draining as u8, Ordering::Release);
    }

    /// The service, whatever the phase; `None` while it is being loaded.
    pub(super) fn loaded(&self) -> Option<&Arc<Service>> {
        self.service.get()
    }

    /// Admission of one request: taken before any work is done for it, and held until its answer is complete.
    pub(super) fn admit(&self) -> Result<(Arc<Service>, OwnedSemaphorePermit)> {
        match (self.phase(), self.service.get()) {
            (Phase::Draining, _) => Err(QuireError::Draining),
            (Phase::Ready, Some(service)) => {
                let permit = Arc::clone(&self.permits).try_acquire_owned();
                let permit = permit.map_err(|_| QuireError::TooManyRequests { limit: self.limit })?;
                Ok((Arc::clone(service), permit))
            }
            _ => Err(QuireError::Loading),
        }
    }

    /// Returns when no request is admitted any more.
    pub(super) async fn idle(&self) {
        let all = u32::try_from(self.limit).unwrap_or(u32::MAX);
        // Fails only for a closed semaphore, and nobody closes it.
        let _ = self.permits.acquire_many(all).await;
    }
}

/// Seconds since the Unix epoch.
pub(super) fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}
