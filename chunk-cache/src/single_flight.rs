//! One computation for all that want its result at the same time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::compute::ComputeError;

/// Time between two questions whether a result is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// Computations that run, by the name of their result.
pub struct SingleFlight<K, V> {
    running: Mutex<HashMap<K, Arc<Flight<V>>>>,
}

impl<K, V> Default for SingleFlight<K, V> {
    fn default() -> Self {
        SingleFlight { running: Mutex::default() }
    }
}

struct Flight<V> {
    state: Mutex<State<V>>,
    ended: Condvar,
}

enum State<V> {
    Running,
    Done(V),
    Failed,
}

/// Whose turn it is.
pub(crate) enum Turn<'a, K: Eq + Hash + Clone, V> {
    /// The caller's: nobody else computes this now.
    Lead(Lead<'a, K, V>),
    /// Somebody else's, which the caller waits for.
    Follow(Follow<V>),
}

/// How waiting ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Waited<V> {
    /// With the result.
    Done(V),
    /// The one who computed failed. That says nothing of the next attempt, whoever makes it.
    Failed,
    /// The result is no longer wanted.
    Unwanted,
}

/// Where a result came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched<F, V> {
    /// It was there.
    Found(F),
    /// Somebody else computed it meanwhile.
    Shared(V),
    /// This call computed it.
    Computed(V),
}

impl<K: Eq + Hash + Clone, V: Clone> SingleFlight<K, V> {
    /// What `find` finds, or what `compute` makes: once for all that want it at the same time. Waits for others only as
    /// long as `wanted` says so; when the one who computes fails, the next one tries.
    ///
    /// # Errors
    /// Those of `compute`, and [`ComputeError::Unwanted`].
    pub fn fetch<F, E>(
        &self,
        key: &K,
        wanted: &dyn Fn() -> bool,
        find: &dyn Fn() -> Option<F>,
        compute: &dyn Fn() -> Result<V, E>,
    ) -> Result<Fetched<F, V>, ComputeError<E>> {
        loop {
            if let Some(found) = find() {
                return Ok(Fetched::Found(found));
            }
            match self.join(key) {
                Turn::Lead(lead) => {
                    // Whoever had the turn before may have put it there since it was looked for.
                    if let Some(found) = find() {
                        return Ok(Fetched::Found(found));
                    }
                    let value = compute().map_err(ComputeError::Failed)?;
                    lead.end(value.clone());
                    return Ok(Fetched::Computed(value));
                }
                Turn::Follow(other) => match other.wait(wanted) {
                    Waited::Done(value) => return Ok(Fetched::Shared(value)),
                    Waited::Failed => {}
                    Waited::Unwanted => return Err(ComputeError::Unwanted),
                },
            }
        }
    }

    /// The turn of a caller that wants the result of this name.
    pub(crate) fn join(&self, key: &K) -> Turn<'_, K, V> {
        let mut running = lock(&self.running);
        if let Some(flight) = running.get(key) {
            return Turn::Follow(Follow(Arc::clone(flight)));
        }
        let flight = Arc::new(Flight { state: Mutex::new(State::Running), ended: Condvar::new() });
        running.insert(key.clone(), Arc::clone(&flight));
        Turn::Lead(Lead { of: self, key: key.clone(), flight })
    }
}

/// The turn to compute. Dropping it without a result, as an error or a panic does, wakes the others to try themselves.
pub(crate) struct Lead<'a, K: Eq + Hash + Clone, V> {
    of: &'a SingleFlight<K, V>,
    key: K,
    flight: Arc<Flight<V>>,
}

impl<K: Eq + Hash + Clone, V> Lead<'_, K, V> {
    /// Hands the result to all that wait.
    pub(crate) fn end(self, value: V) {
        *lock(&self.flight.state) = State::Done(value);
    }
}

impl<K: Eq + Hash + Clone, V> Drop for Lead<'_, K, V> {
    fn drop(&mut self) {
        // Gone before the others wake: those who then come find either the result where it was put, or nobody at work.
        lock(&self.of.running).remove(&self.key);
        let mut state = lock(&self.flight.state);
        if matches!(*state, State::Running) {
            *state = State::Failed;
        }
        drop(state);
        self.flight.ended.notify_all();
    }
}

/// The result of somebody else's turn, which may still be computed.
pub(crate) struct Follow<V>(Arc<Flight<V>>);

impl<V: Clone> Follow<V> {
    /// Waits for the end, as long as `wanted` says so.
    pub(crate) fn wait(&self, wanted: &dyn Fn() -> bool) -> Waited<V> {
        let mut state = lock(&self.0.state);
        loop {
            match &*state {
                State::Done(value) => return Waited::Done(value.clone()),
                State::Failed => return Waited::Failed,
                State::Running if !wanted() => return Waited::Unwanted,
                State::Running => {
                    let waited = self.0.ended.wait_timeout(state, LOOK);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn lead<'a>(flights: &'a SingleFlight<&'static str, u32>, key: &'static str) -> Lead<'a, &'static str, u32> {
        match flights.join(&key) {
            Turn::Lead(lead) => lead,
            Turn::Follow(_) => panic!("somebody else computes {key}"),
        }
    }

    fn follow(flights: &SingleFlight<&'static str, u32>, key: &'static str) -> Follow<u32> {
        match flights.join(&key) {
            Turn::Lead(_) => panic!("nobody computes {key}"),
            Turn::Follow(follow) => follow,
        }
    }

    #[test]
    fn all_that_want_a_result_at_the_same_time_get_one_computation() {
        let flights = SingleFlight::default();
        let (computed, begin) = (AtomicUsize::new(0), Barrier::new(8));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let turn = flights.join(&"a");
                    // Everybody has a turn before the one who leads ends it.
                    begin.wait();
                    match turn {
                        Turn::Lead(lead) => {
                            computed.fetch_add(1, Ordering::Relaxed);
                            lead.end(7);
                        }
                        Turn::Follow(follow) => assert_eq!(follow.wait(&|| true), Waited::Done(7)),
                    }
                });
            }
        });
        assert_eq!(computed.load(Ordering::Relaxed), 1);
        lead(&flights, "a");
    }

    #[test]
    fn one_that_fails_or_panics_leaves_the_turn_to_the_next() {
        let flights = SingleFlight::default();
        let failing = lead(&flights, "a");
        let waiting = follow(&flights, "a");
        lead(&flights, "b").end(1);
        drop(failing);
        assert_eq!(waiting.wait(&|| true), Waited::Failed);
        let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _lead = lead(&flights, "a");
            panic!("as a computation might");
        }));
        assert!(panicking.is_err());
        lead(&flights, "a").end(2);
        assert_eq!(lock(&flights.running).len(), 0);
    }

    #[test]
    fn who_no_longer_wants_the_result_leaves_and_the_others_still_get_it() {
        let flights = SingleFlight::default();
        let leading = lead(&flights, "a");
        let (leaving, staying) = (follow(&flights, "a"), follow(&flights, "a"));
        assert_eq!(leaving.wait(&|| false), Waited::Unwanted);
        leading.end(3);
        assert_eq!(staying.wait(&|| true), Waited::Done(3));
    }
}
