//! Places for requests: how many are worked for or wait, and when those who find none shall come back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::connections::{Connection, Held};
use settings::{QuireError, Result};

/// What is assumed of the time between two answers before any has been given.
const FIRST_GUESS: f64 = 1.0;
/// Answers over which the mean is taken, the latest with the most weight.
const MEMORY: f64 = 16.0;
/// Clients of OpenAI's API follow a `Retry-After` up to this, in seconds, and otherwise come back far too early.
const LONGEST: f64 = 60.0;

/// The places of a server.
pub(super) struct Queue {
    places: Arc<Semaphore>,
    limit: usize,
    pace: Arc<Mutex<Pace>>,
}

impl Queue {
    /// `limit`: requests that run or wait at the same time.
    pub(super) fn new(limit: usize) -> Queue {
        let limit = limit.clamp(1, Semaphore::MAX_PERMITS);
        Queue { places: Arc::new(Semaphore::new(limit)), limit, pace: Arc::new(Mutex::new(Pace::new(Instant::now()))) }
    }

    /// Whether [`enter`](Self::enter) would refuse now. That is asked before a body is read for nothing.
    pub(super) fn is_full(&self) -> bool {
        self.places.available_permits() == 0
    }

    /// Takes a place, which also keeps the request's connection.
    ///
    /// # Errors
    /// [`QuireError::TooManyRequests`] with the time at which there should be one.
    pub(super) fn enter(&self, connection: Option<&Connection>) -> Result<Place> {
        let permit = Arc::clone(&self.places).try_acquire_owned().map_err(|_| self.refuse())?;
        if self.places.available_permits() + 1 == self.limit {
            // The time without requests is no time between answers.
            lock(&self.pace).resume(Instant::now());
        }
        Ok(Place { pace: Arc::clone(&self.pace), _permit: permit, _held: connection.map(Connection::hold) })
    }

    /// The error for a request that finds no place.
    pub(super) fn refuse(&self) -> QuireError {
        let retry_after_seconds = lock(&self.pace).promise(Instant::now());
        QuireError::TooManyRequests { limit: self.limit, retry_after_seconds }
    }

    /// Returns when every place is free.
    pub(super) async fn idle(&self) {
        let all = u32::try_from(self.limit).unwrap_or(u32::MAX);
        // Fails only for a closed semaphore, and nobody closes it.
        let _ = self.places.acquire_many(all).await;
    }
}

fn lock(pace: &Mutex<Pace>) -> std::sync::MutexGuard<'_, Pace> {
    pace.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The place of one request, from before any work is done for it until its answer is complete.
pub(super) struct Place {
    pace: Arc<Mutex<Pace>>,
    _permit: OwnedSemaphorePermit,
    _held: Option<Held>,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.pace).completed(Instant::now());
    }
}

/// How fast places become free, and when those that were promised will be.
struct Pace {
    /// Mean time between two answers while there are requests, in seconds.
    between: f64,
    /// Answers that it rests on, up to [`MEMORY`].
    answers: f64,
    /// The last answer, or the first request since there was none.
    last: Instant,
    /// When the place that was promised last becomes free.
    promised: Instant,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { between: FIRST_GUESS, answers: 0.0, last: now, promised: now }
    }

    fn resume(&mut self, now: Instant) {
        self.last = now;
    }

    fn completed(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.last).as_secs_f64();
        self.answers = (self.answers + 1.0).min(MEMORY);
        self.between += (since - self.between) / self.answers;
        self.last = now;
    }

    /// Seconds until the next place becomes free that was not promised to somebody else: one after the other, as fast
    /// as answers are given (a leaky bucket).
    fn promise(&mut self, now: Instant) -> u32 {
        let step = Duration::from_secs_f64(self.between.min(LONGEST));
        self.promised = (self.promised.max(now) + step).min(now + Duration::from_secs_f64(LONGEST));
        let wait = self.promised.saturating_duration_since(now).as_secs_f64();
        wait.ceil().clamp(1.0, LONGEST) as u32
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn places_are_promised_one_after_the_other_as_fast_as_answers_are_given() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        let mut now = start;
        for _ in 0..200 {
            now += Duration::from_millis(250);
            pace.completed(now);
        }
        assert!((pace.between - 0.25).abs() < 1e-4, "{}", pace.between);
        pace.between = 0.25;
        let promised: Vec<u32> = (0..12).map(|_| pace.promise(now)).collect();
        assert_eq!(promised, [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]);
        // What was promised for times that have passed is forgotten.
        assert_eq!(pace.promise(now + Duration::from_secs(10)), 1);
        for _ in 0..1000 {
            assert!((1..=60).contains(&pace.promise(now)));
        }
        assert_eq!(pace.promise(now), 60);
    }

    #[test]
    fn a_time_without_requests_does_not_make_answers_slow() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        pace.between = 0.5;
        let later = start + Duration::from_secs(3600);
        pace.resume(later);
        pace.completed(later + Duration::from_millis(500));
        assert!((pace.between - 0.5).abs() < 1e-9, "{}", pace.between);
    }

    #[test]
    fn a_place_is_free_again_once_it_is_let_go() {
        let queue = Queue::new(2);
        let places = [queue.enter(None).unwrap(), queue.enter(None).unwrap()];
        assert!(queue.is_full());
        let refused = queue.enter(None).err().unwrap();
        assert!(matches!(refused, QuireError::TooManyRequests { limit: 2, retry_after_seconds: 1.. }), "{refused}");
        drop(places);
        assert!(!queue.is_full() && queue.enter(None).is_ok());
    }
}
