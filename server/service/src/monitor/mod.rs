//! The monitor: a share of the questions is also read in full, in the background and only while nobody waits, and compared with
//! what blending makes of them. Where the two drift apart in a collection, its questions get a larger budget, then full
//! recompute, and their answers say so.
//!
//! `policy` decides, `compare` asks the engine. A request that states its own blending is neither compared nor changed, and
//! without samples nothing changes at all: an answer then depends on nothing that was asked before.

mod compare;
mod policy;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use engine::{BlendConfig, BlendMode, Engine, Request};

use crate::metrics::Metrics;
use policy::Policy;
pub(super) use policy::{GIVEN, Level};
use settings::Settings;

/// Samples that wait. Each holds on to the chunks that it is about; a further one is dropped.
const QUEUE: usize = 4;

/// A question to be compared.
pub(super) struct Sample {
    /// Where its passages are from.
    pub(super) collection: String,
    /// As it was asked, with the blending to be judged.
    pub(super) request: Request,
}

/// Draws samples, keeps those that wait, and knows what became of the collections.
pub(super) struct Monitor {
    share: f64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    policy: Policy,
    /// Samples that are owed, below 1 between two draws.
    owed: f64,
    waiting: VecDeque<Sample>,
    stopped: bool,
}

impl Monitor {
    pub(super) fn new(settings: &Settings) -> Monitor {
        let policy = Policy::new(f64::from(settings.monitor_limit));
        let state = State { policy, owed: 0.0, waiting: VecDeque::new(), stopped: false };
        Monitor { share: f64::from(settings.monitor_share), state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How a collection is to be blended, for a request with `blend` where `usual` are the server's own settings; `None`: the request
    /// is none of the monitor's.
    pub(super) fn level(&self, collection: &str, blend: &BlendConfig, usual: &BlendConfig) -> Option<Level> {
        let watched = self.share > 0.0 && blend == usual && blend.mode != BlendMode::FullRecompute;
        watched.then(|| self.lock().policy.level(collection))
    }

    /// Whether the next request is to be compared: of any run of requests the share, evenly spread.
    pub(super) fn draws(&self) -> bool {
        let mut state = self.lock();
        state.owed += self.share;
        let drawn = state.owed >= 1.0 - 1e-9;
        state.owed -= if drawn { 1.0 } else { 0.0 };
        drawn
    }

    /// A sample waits for a quiet moment. False: too many do.
    pub(super) fn offer(&self, sample: Sample) -> bool {
        let mut state = self.lock();
        let taken = state.waiting.len() < QUEUE && !state.stopped;
        if taken {
            state.waiting.push_back(sample);
            self.changed.notify_all();
        }
        taken
    }

    fn next(&self) -> Option<Sample> {
        let idle = |state: &mut State| !state.stopped && state.waiting.is_empty();
        let mut state = self.changed.wait_while(self.lock(), idle).unwrap_or_else(PoisonError::into_inner);
        if state.stopped { None } else { state.waiting.pop_front() }
    }

    /// Compares samples until [`stop`](Self::stop).
    pub(super) fn work(&self, engine: &Engine, metrics: &Metrics) {
        while let Some(sample) = self.next() {
            let wanted = || !self.lock().stopped;
            let seen = catch_unwind(AssertUnwindSafe(|| compare::compare(engine, &sample.request, &wanted)));
            match seen {
                Ok(Ok(Some(seen))) => self.judge(&sample.collection, seen, metrics),
                Ok(Ok(None)) => metrics.sample_dropped(),
                Ok(Err(error)) => {
                    metrics.sample_dropped();
                    tracing::debug!(%error, collection = sample.collection, "a sample could not be compared");
                }
                Err(_) => tracing::error!(collection = sample.collection, "comparing a sample panicked"),
            }
        }
    }

    fn judge(&self, collection: &str, seen: compare::Seen, metrics: &Metrics) {
        let verdict = self.lock().policy.observe(collection, seen.divergence);
        metrics.sample(collection, seen.divergence, seen.same, verdict.level);
        if verdict.changed {
            let (mean, samples) = (verdict.mean, verdict.samples);
            tracing::warn!(collection, mean, samples, "{}", verdict.level.consequence());
        }
    }

    /// Ends [`work`](Self::work) at the next token; what waits is dropped.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        state.waiting.clear();
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::Prompt;

    fn monitor(share: f32) -> Monitor {
        Monitor::new(&Settings { monitor_share: share, ..Settings::default() })
    }

    fn sample() -> Sample {
        Sample { collection: "c".into(), request: Request::new(Prompt::default(), 1) }
    }

    #[test]
    fn the_share_is_drawn_evenly() {
        for (share, every) in [(1.0, 1), (0.5, 2), (0.25, 4), (0.1, 10)] {
            let monitor = monitor(share);
            let drawn: Vec<usize> = (1..=40).filter(|_| monitor.draws()).collect();
            assert_eq!(drawn, (1..=40 / every).map(|i| i * every).collect::<Vec<_>>(), "{share}");
        }
        let none = monitor(0.0);
        assert!((0..100).all(|_| !none.draws()));
    }

    #[test]
    fn only_requests_with_the_servers_own_blending_are_watched_and_none_without_a_share() {
        let usual = BlendConfig::default();
        let full = BlendConfig { mode: BlendMode::FullRecompute, ..BlendConfig::default() };
        let own = BlendConfig { ratio: 0.5, ..BlendConfig::default() };
        let monitor = monitor(0.1);
        assert_eq!(monitor.level("c", &usual, &usual), Some(Level::Usual));
        assert_eq!((monitor.level("c", &own, &usual), monitor.level("c", &full, &full)), (None, None));
        assert_eq!(self::monitor(0.0).level("c", &usual, &usual), None);
    }

    #[test]
    fn samples_wait_in_order_as_far_as_there_is_room_and_end_with_the_monitor() {
        let monitor = monitor(1.0);
        assert!((0..QUEUE).all(|_| monitor.offer(sample())) && !monitor.offer(sample()));
        assert_eq!(monitor.next().map(|sample| sample.collection), Some("c".into()));
        assert!(monitor.offer(sample()));
        monitor.stop();
        assert!(monitor.next().is_none() && !monitor.offer(sample()));
    }
}
