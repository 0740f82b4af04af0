//! Work in the background of a server: attached files are read, one after the other, and what has expired is removed.
//!
//! What waits is in the catalog; the queue here only knows in which order, and is filled from the catalog at the start.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Service;
use settings::{QuireError, Result};

/// Time between two looks for what has expired.
const EXPIRY: Duration = Duration::from_secs(30);

/// Time between two attempts to use a disk that could not be written.
const MENDING: Duration = Duration::from_secs(3);

/// Files of one store that are read in one go at most.
const GROUP: usize = 256;

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
    /// Whether what an earlier process left was made good.
    recovered: bool,
    /// Whether rows are gone whose bytes are still to be taken off the disk.
    erasing: bool,
    stopped: bool,
}

/// What comes next.
enum Next {
    /// Files of one store.
    Read(String, Vec<String>),
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

    /// Files of a store that were taken and not read: they are the next.
    fn put_back(&self, store: &str, files: &[String]) {
        let mut state = self.lock();
        files.iter().rev().for_each(|file| state.waiting.push_front((store.into(), file.clone())));
    }

    /// Has the bytes of rows that are gone taken off the disk, with what has expired next.
    pub(super) fn erase_soon(&self) {
        self.lock().erasing = true;
    }

    fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    fn next(&self, patience: Duration) -> Next {
        let idle = |state: &mut State| !state.stopped && state.waiting.is_empty();
        let waited = self.changed.wait_timeout_while(self.lock(), patience, idle);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.stopped {
            return Next::Stop;
        }
        let Some((store, first)) = state.waiting.pop_front() else { return Next::Nothing };
        let mut files = vec![first];
        while files.len() < GROUP && state.waiting.front().is_some_and(|(next, _)| *next == store) {
            files.extend(state.waiting.pop_front().map(|(_, file)| file));
        }
        Next::Read(store, files)
    }
}

impl Service {
    /// Makes good what an earlier process left: half uploaded files are removed, and files that wait to be read wait again. To
    /// be called before anybody else uses the service. Where nothing can be written, nothing is to be done.
    pub fn recover(&self) {
        if self.library.writable().is_err() {
            // A full disk may get room: what waits is then looked up by `work`.
            return;
        }
        self.jobs.lock().recovered = true;
        if let Err(error) = self.sweep_files().and_then(|()| self.queue_waiting()) {
            tracing::error!(%error, "files that wait to be read could not be looked up");
        }
    }

    /// Works in the background until [`stop_working`](Self::stop_working): reads files that were attached, and removes what has
    /// expired.
    pub fn work(&self) {
        let mut looked: Option<Instant> = None;
        loop {
            let mended = self.store.mend();
            let recovered = self.jobs.lock().recovered;
            if !recovered && self.library.writable().is_ok() {
                // Nothing is swept any more: an upload may be coming in.
                match self.queue_waiting() {
                    Ok(()) => self.jobs.lock().recovered = true,
                    Err(error) => tracing::warn!(%error, "files that wait to be read could not be looked up yet"),
                }
            }
            let patience = if mended && recovered { EXPIRY } else { MENDING };
            if looked.is_none_or(|looked| looked.elapsed() >= EXPIRY) {
                self.remove_expired();
                looked = Some(Instant::now());
            }
            match self.jobs.next(patience) {
                Next::Read(store, files) => self.read_guarded(&store, &files),
                Next::Nothing => {}
                Next::Stop => return,
            }
        }
    }

    /// Has [`work`](Self::work) end behind the chunk at hand, and [`watch`](Self::watch). What waits is read after the next start.
    pub fn stop_working(&self) {
        self.monitor.stop();
        self.jobs.lock().stopped = true;
        self.jobs.changed.notify_all();
    }

    /// Files that cannot be read cost nothing but themselves.
    fn read_guarded(&self, store: &str, files: &[String]) {
        let wanted = || !self.jobs.is_stopped();
        let read = catch_unwind(AssertUnwindSafe(|| self.read_attachments(store, files, &wanted)));
        let problem = match read {
            Ok(Ok(read)) => return self.jobs.put_back(store, &files[read..]),
            Ok(Err(error)) => error,
            Err(_) => QuireError::Internal("keeping attached files panicked".into()),
        };
        if let Err(error) = self.fail_attachments(store, files, &problem) {
            tracing::error!(%error, %problem, store, "what became of attached files could not be written");
        }
    }

    /// Removes files and vector stores whose time has come, down to the bytes on disk; also those of files that were deleted. What
    /// cannot be removed is tried again by the next call; [`work`](Self::work) makes one every half a minute.
    pub fn remove_expired(&self) {
        let removed = || -> Result<usize> {
            let removed = self.remove_expired_files()? + self.empty_expired_stores()?;
            if std::mem::take(&mut self.jobs.lock().erasing) {
                // Where it fails, it is tried again with the next look.
                self.library.erase().inspect_err(|_| self.jobs.erase_soon())?;
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
    fn files_of_a_store_are_read_together_in_the_order_in_which_they_were_attached_until_work_is_stopped() {
        let queue = JobQueue::default();
        for (store, file) in [("s", "a"), ("s", "b"), ("t", "c"), ("s", "d")] {
            queue.push(store, file);
        }
        let next = || match queue.next(Duration::ZERO) {
            Next::Read(store, files) => format!("{store} {}", files.join(" ")),
            Next::Nothing => "nothing".into(),
            Next::Stop => "stop".into(),
        };
        assert_eq!(next(), "s a b");
        queue.put_back("s", &["b".into()]);
        assert_eq!([next(), next(), next(), next()], ["s b", "t c", "s d", "nothing"]);
        queue.push("s", "e");
        queue.lock().stopped = true;
        assert!(next() == "stop" && queue.is_stopped());
    }
}
