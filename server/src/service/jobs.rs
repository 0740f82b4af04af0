//! Work in the background of a server: attached files are read, one after the other, and what has expired is removed.
//!
//! What waits is in the catalog; the queue here only knows in which order, and is filled from the catalog at the start.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Service;
use crate::error::{QuireError, Result};

/// Time between two looks for what has expired.
const EXPIRY: Duration = Duration::from_secs(30);

/// Files that wait to be read.
#[derive(Default)]
pub(super) struct JobQueue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Stores and files.
    waiting: VecDeque<(String, String)>,
    stopped: bool,
}

/// What comes next.
enum Next {
    Read(String, String),
    Nothing,
    Stop,
}

impl JobQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file of a store waits to be read.
    pub(super) fn push(&self, store: &str, file: &str) {
        self.lock().waiting.push_back((store.into(), file.into()));
        self.changed.notify_all();
    }

    fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    fn next(&self, patience: Duration) -> Next {
        let idle = |state: &mut State| !state.stopped && state.waiting.is_empty();
        let waited = self.changed.wait_timeout_while(self.lock(), patience, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match state.waiting.pop_front() {
            _ if state.stopped => Next::Stop,
            Some((store, file)) => Next::Read(store, file),
            None => Next::Nothing,
        }
    }
}

impl Service {
    /// Makes good what an earlier process left: half uploaded files are removed, and files that wait to be read wait again. To
    /// be called before anybody else uses the service. Where nothing can be written, nothing is to be done.
    pub fn recover(&self) {
        if self.library.writable().is_err() {
            return;
        }
        match self.sweep_files().and_then(|()| self.waiting_attachments()) {
            Ok(waiting) => waiting.iter().for_each(|(store, file)| self.jobs.push(store, file)),
            Err(error) => tracing::error!(%error, "files that wait to be read could not be looked up"),
        }
    }

    /// Works in the background until [`stop_working`](Self::stop_working): reads files that were attached, and removes what has
    /// expired.
    pub fn work(&self) {
        let mut looked: Option<Instant> = None;
        loop {
            if looked.is_none_or(|looked| looked.elapsed() >= EXPIRY) {
                self.remove_expired();
                looked = Some(Instant::now());
            }
            match self.jobs.next(EXPIRY) {
                Next::Read(store, file) => self.read_guarded(&store, &file),
                Next::Nothing => {}
                Next::Stop => return,
            }
        }
    }

    /// Has [`work`](Self::work) end behind the chunk at hand. What waits is read after the next start.
    pub fn stop_working(&self) {
        self.jobs.lock().stopped = true;
        self.jobs.changed.notify_all();
    }

    /// A file that cannot be read, or at which something panics, costs nothing but itself.
    fn read_guarded(&self, store: &str, file: &str) {
        let wanted = || !self.jobs.is_stopped();
        let read = catch_unwind(AssertUnwindSafe(|| self.read_attachment(store, file, &wanted)));
        let problem = match read {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => QuireError::Internal("reading an attached file panicked".into()),
        };
        if let Err(error) = self.fail_attachment(store, file, &problem) {
            tracing::error!(%error, store, file, "what became of an attached file could not be written");
        }
    }

    fn remove_expired(&self) {
        let removed = || -> Result<usize> {
            let removed = self.remove_expired_files()? + self.empty_expired_stores()?;
            if removed > 0 {
                self.library.erase()?;
            }
            Ok(removed)
        };
        match catch_unwind(AssertUnwindSafe(removed)) {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => tracing::info!(removed, "files and vector stores have expired"),
            Ok(Err(error)) => tracing::warn!(%error, "what has expired could not be removed; it is tried again"),
            Err(_) => tracing::error!("removing what has expired panicked"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_in_the_order_in_which_they_were_attached_until_work_is_stopped() {
        let queue = JobQueue::default();
        queue.push("s", "a");
        queue.push("t", "b");
        for expected in ["a", "b"] {
            assert!(matches!(queue.next(Duration::ZERO), Next::Read(_, file) if file == expected));
        }
        assert!(matches!(queue.next(Duration::ZERO), Next::Nothing));
        queue.push("s", "c");
        queue.lock().stopped = true;
        assert!(matches!(queue.next(Duration::from_secs(60)), Next::Stop) && queue.is_stopped());
    }
}
