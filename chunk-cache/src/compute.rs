//! Reading a chunk, or computing it once for all who want it.

use std::sync::Arc;

use crate::error::StoreError;
use crate::key::ChunkKey;
use crate::pending::{NewChunk, PutTicket};
use crate::shape::LayerKv;
use crate::single_flight::Fetched;
use crate::store::{ChunkStore, ModelHandle};

/// A chunk's state in memory, on its way to disk or not to be kept.
#[derive(Debug, Clone)]
pub struct InMemory {
    /// One a layer.
    pub layers: Arc<[LayerKv]>,
    /// The promise that it will be on disk; an error where the store did not take it.
    pub stored: Result<PutTicket, StoreError>,
}

/// Where a chunk's state is that was asked for.
#[derive(Debug, Clone)]
pub enum Found {
    /// On disk: [`ChunkStore::layer`] reads it.
    Stored,
    /// In memory.
    InMemory(InMemory),
}

/// Why a chunk could not be had.
#[derive(Debug)]
pub enum ComputeError<E> {
    /// The computation failed.
    Failed(E),
    /// It is no longer wanted.
    Unwanted,
}

impl ChunkStore {
    /// A chunk, from the store or computed: all that want it at the same time are given one computation. A computed state
    /// is used from memory and written behind. The flag says whether this call computed it. Waits for others only as long as
    /// `wanted` says so.
    ///
    /// # Errors
    /// [`ComputeError::Failed`] with the computation's own error. What the store refuses is in [`InMemory::stored`].
    pub fn read_or_compute<E>(
        &self,
        model: ModelHandle,
        key: &ChunkKey,
        wanted: &dyn Fn() -> bool,
        compute: impl Fn() -> Result<NewChunk, E>,
    ) -> Result<(Found, bool), ComputeError<E>> {
        let find = || self.find(key);
        let keep = || {
            let chunk = compute()?;
            let layers = chunk.layers.clone().into();
            Ok(InMemory { layers, stored: self.put_behind(model, chunk) })
        };
        match self.flights.fetch(key, wanted, &find, &keep) {
            Ok(Fetched::Found(found)) => Ok((found, false)),
            Ok(Fetched::Shared(state)) => Ok((Found::InMemory(state), false)),
            Ok(Fetched::Computed(state)) => Ok((Found::InMemory(state), true)),
            Err(error) => Err(error),
        }
    }

    fn find(&self, key: &ChunkKey) -> Option<Found> {
        let state = self.core.catalogue.lock();
        if state.entries.contains_key(key) {
            return Some(Found::Stored);
        }
        let put = state.pending.get(key)?;
        let stored = Ok(PutTicket { done: Arc::clone(&put.done), joined: true });
        Some(Found::InMemory(InMemory { layers: put.chunk.layers.clone().into(), stored }))
    }
}
