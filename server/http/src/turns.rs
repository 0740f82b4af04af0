//! Turns of commands that write documents.
//!
//! The catalog is locked for a transaction, and a collection takes several writers: commands go on side by side, also into one
//! collection, and beside whatever comes over HTTP. What changes a collection as a whole (its language, its being there) has it to
//! itself. Ingests are a few at a time, as each has texts and an index writer in memory. Who waits is served in the order in which
//! all came.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use service::control::WriteAccess;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, OwnedSemaphorePermit, RwLock, Semaphore};

/// Ingests at the same time.
const INGESTS: usize = 4;

/// What is written, and by whom.
#[derive(Default)]
struct Books {
    locks: HashMap<String, Arc<RwLock<()>>>,
    /// Commands that write, by the number of their turn: what they are called, into what they write, since when.
    at_work: HashMap<u64, (&'static str, String, Instant)>,
    next: u64,
}

/// Hands out turns.
#[derive(Clone)]
pub(super) struct Turns {
    books: Arc<Mutex<Books>>,
    ingests: Arc<Semaphore>,
}

/// A turn; it ends when this is dropped.
pub(super) struct Turn {
    turns: Turns,
    number: u64,
    /// Let go of after the books were written.
    _locks: Vec<Held>,
    _ingest: Option<OwnedSemaphorePermit>,
}

/// A lock for as long as a turn lasts.
#[expect(dead_code, reason = "held, not read")]
enum Held {
    Shared(OwnedRwLockReadGuard<()>),
    Alone(OwnedRwLockWriteGuard<()>),
}

impl Turns {
    pub(super) fn new() -> Turns {
        Turns { books: Arc::default(), ingests: Arc::new(Semaphore::new(INGESTS)) }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn of the command with this name.
    pub(super) async fn take(&self, name: &'static str, access: &WriteAccess) -> Turn {
        let mut held = Vec::new();
        // Always in this order, so that no two wait for one another.
        for (what, alone) in access.in_order() {
            let lock = {
                let mut books = self.books();
                // Nobody has or wants the others.
                books.locks.retain(|_, lock| Arc::strong_count(lock) > 1);
                Arc::clone(books.locks.entry(what.to_string()).or_default())
            };
            held.push(match alone {
                true => Held::Alone(lock.write_owned().await),
                false => Held::Shared(lock.read_owned().await),
            });
        }
        let ingest = match access.ingests {
            // Fails only for a closed semaphore, and nobody closes it.
            true => Arc::clone(&self.ingests).acquire_owned().await.ok(),
            false => None,
        };
        let mut books = self.books();
        let number = books.next;
        books.next += 1;
        books.at_work.insert(number, (name, access.what(), Instant::now()));
        drop(books);
        Turn { turns: self.clone(), number, _locks: held, _ingest: ingest }
    }

    /// Who is at work, for somebody who waits.
    pub(super) fn at_work(&self) -> String {
        let books = self.books();
        let mut all: Vec<_> = books.at_work.iter().collect();
        all.sort_unstable_by_key(|(number, _)| **number);
        let one = |(_, (name, what, since)): (&u64, &(&'static str, String, Instant))| {
            format!("`{name}` ({what}, for {} s)", since.elapsed().as_secs())
        };
        all.into_iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.books().at_work.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures::FutureExt;

    fn access(collection: &str, alone: bool, ingests: bool) -> WriteAccess {
        WriteAccess { collection: Some(collection.into()), alone, removed: false, ingests }
    }

    #[tokio::test]
    async fn writers_go_on_side_by_side_and_what_changes_a_whole_collection_waits_for_them_in_its_turn() {
        let turns = Turns::new();
        let (notes, alone) = (access("notes", false, true), access("notes", true, false));
        let first = turns.take("ingest", &notes).await;
        let second = turns.take("ingest", &notes).now_or_never().unwrap();
        let other = turns.take("ingest", &access("other", true, true)).now_or_never().unwrap();
        let mut whole = Box::pin(turns.take("rm", &alone));
        assert!(whole.as_mut().now_or_never().is_none());
        // Who comes later does not overtake it.
        let mut later = Box::pin(turns.take("ingest", &notes));
        assert!(later.as_mut().now_or_never().is_none());
        let said = turns.at_work();
        assert!(
            said.starts_with("`ingest` (collection `notes`, for ") && said.contains("collection `other`"),
            "{said}"
        );
        drop((first, second));
        let whole = whole.now_or_never().unwrap();
        assert!(later.as_mut().now_or_never().is_none());
        drop(whole);
        let later = later.now_or_never().unwrap();
        drop((later, other));
        assert_eq!(turns.at_work(), "");
        drop(turns.take("rm", &access("third", false, false)).await);
        assert!(turns.books().locks.len() <= 1, "locks that nobody has are forgotten");
    }

    #[tokio::test]
    async fn ingests_are_a_few_at_a_time_and_other_commands_do_not_wait_for_their_places() {
        let turns = Turns::new();
        let names: Vec<String> = (0..INGESTS).map(|number| format!("c{number}")).collect();
        let mut held = Vec::new();
        for name in &names {
            held.push(turns.take("ingest", &access(name, false, true)).now_or_never().unwrap());
        }
        let more = access("more", false, true);
        let mut waiting = Box::pin(turns.take("ingest", &more));
        assert!(waiting.as_mut().now_or_never().is_none());
        turns.take("rm", &access("c0", false, false)).now_or_never().unwrap();
        held.pop();
        waiting.now_or_never().unwrap();
    }
}
