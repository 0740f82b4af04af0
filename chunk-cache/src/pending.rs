//! Chunks on their way to disk, and the writer's list of things to do.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::StoreError;
use crate::key::ChunkKey;
use crate::records::Section;
use crate::shape::LayerKv;
use crate::stats::PutOutcome;

/// A chunk's attention state, to be stored.
#[derive(Debug, Clone)]
pub struct NewChunk {
    /// Its name.
    pub key: ChunkKey,
    /// Its tokens.
    pub tokens: u32,
    /// One a layer of the model.
    pub layers: Vec<LayerKv>,
    /// What computing it took, in microseconds; 0: not known.
    pub compute_micros: u64,
    /// A hash that names the tenant it was computed for; zero: none.
    pub tenant: [u8; 16],
    /// What later stages of retrieval and attention want to know of it.
    pub sections: Vec<Section>,
}

impl NewChunk {
    /// A chunk of which nothing but its state is known.
    pub fn new(key: ChunkKey, tokens: u32, layers: Vec<LayerKv>) -> NewChunk {
        NewChunk { key, tokens, layers, compute_micros: 0, tenant: [0; 16], sections: Vec::new() }
    }
}

/// A chunk that was handed over.
#[derive(Debug)]
pub(crate) struct PendingPut {
    pub(crate) chunk: NewChunk,
    /// Index of its model.
    pub(crate) model: u32,
    /// Bytes of keys and values.
    pub(crate) bytes: u64,
    pub(crate) done: Arc<Completion<PutOutcome>>,
}

/// The promise of a chunk that is being written behind its caller's back.
#[derive(Debug, Clone)]
pub struct PutTicket {
    pub(crate) done: Arc<Completion<PutOutcome>>,
    /// Somebody else handed the chunk over.
    pub(crate) joined: bool,
}

impl PutTicket {
    /// Waits until the chunk is on disk, safe from crash and power failure.
    ///
    /// # Errors
    /// Those of [`ChunkStore::put`](crate::ChunkStore::put).
    pub fn wait(&self) -> Result<PutOutcome, StoreError> {
        let outcome = self.done.wait()?;
        Ok(if self.joined { PutOutcome::AlreadyPresent } else { outcome })
    }

    /// Whether waiting would return at once.
    pub fn is_done(&self) -> bool {
        lock(&self.done.outcome).is_some()
    }

    pub(crate) fn already_present() -> PutTicket {
        let done = Arc::<Completion<PutOutcome>>::default();
        done.set(Ok(PutOutcome::AlreadyPresent));
        PutTicket { done, joined: true }
    }
}

/// An outcome that one thread sets and others wait for.
#[derive(Debug)]
pub(crate) struct Completion<T> {
    outcome: Mutex<Option<Result<T, StoreError>>>,
    set: Condvar,
}

impl<T> Default for Completion<T> {
    fn default() -> Self {
        Completion { outcome: Mutex::new(None), set: Condvar::new() }
    }
}

impl<T: Clone> Completion<T> {
    /// The first outcome stays.
    pub(crate) fn set(&self, outcome: Result<T, StoreError>) {
        lock(&self.outcome).get_or_insert(outcome);
        self.set.notify_all();
    }

    pub(crate) fn wait(&self) -> Result<T, StoreError> {
        let mut outcome = lock(&self.outcome);
        loop {
            match &*outcome {
                Some(outcome) => return outcome.clone(),
                None => outcome = self.set.wait(outcome).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// How much of the payload files is rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thoroughness {
    /// Files with more than a few dead bytes.
    Space,
    /// Every file with any dead byte, and the rows of what was removed.
    Traces,
}

/// Something that the writer is to do beside storing chunks. The number that comes back counts chunks.
#[derive(Debug)]
pub(crate) enum Task {
    /// Remove these, whatever state they are in.
    Remove(Vec<ChunkKey>),
    /// Change the budget.
    SetBudget(u64),
    /// Remove the first to go until so many bytes are left.
    EvictTo(u64),
    /// Give the space of removed chunks back.
    Reclaim(Thoroughness),
    /// Remove what is damaged, and write the catalogue anew where it cannot be read.
    Repair,
}

/// What the writer does next.
pub(crate) enum Work {
    Store(Vec<Arc<PendingPut>>),
    Other(Task, Arc<Completion<u64>>),
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    closed: bool,
}

/// The writer's list of things to do, in the order in which they came.
#[derive(Default)]
pub(crate) struct Mailbox {
    queue: Mutex<Queue>,
    filled: Condvar,
}

impl Mailbox {
    /// False when nobody takes work any more.
    pub(crate) fn push(&self, work: Work) -> bool {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return false;
        }
        queue.work.push_back(work);
        self.filled.notify_one();
        true
    }

    /// No more work is taken; what is there is still handed out.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.filled.notify_all();
    }

    /// Takes what is left, once nobody works on it any more.
    pub(crate) fn drain(&self) -> Vec<Work> {
        lock(&self.queue).work.drain(..).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        lock(&self.queue).work.is_empty()
    }

    /// The next thing to do: chunks that wait behind each other are taken together, up to about `group_bytes`. Waits
    /// for work; `None` when the mailbox is closed and empty.
    pub(crate) fn next(&self, group_bytes: u64) -> Option<Work> {
        let mut queue = lock(&self.queue);
        loop {
            match queue.work.pop_front() {
                Some(Work::Store(mut group)) => {
                    let mut bytes: u64 = group.iter().map(|put| put.bytes).sum();
                    while let Some(Work::Store(more)) = queue.work.front_mut() {
                        bytes += more.iter().map(|put| put.bytes).sum::<u64>();
                        if bytes > group_bytes {
                            break;
                        }
                        group.append(more);
                        queue.work.pop_front();
                    }
                    return Some(Work::Store(group));
                }
                Some(other) => return Some(other),
                None if queue.closed => return None,
                None => queue = self.filled.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
