//! The state of chunks on its way to the store: the next chunk is computed while those before are written.
//!
//! A chunk is reported once it is on disk, in order, and a document is committed once all of its chunks are.

use chunk_cache::StoreError;
use documents::{NewPassage, Span};
use settings::{QuireError, Result};

use super::{IngestEvent, Run};
use crate::store::{Ensured, Origin};

/// A chunk that is being written, or was found in the store.
pub(super) struct WrittenChunk {
    ensured: Ensured,
    /// Which of the documents that wait it is of.
    document: usize,
    span: Span,
    tokens: usize,
    /// Its place among the document's chunks, from 1.
    number: usize,
}

impl Run<'_> {
    /// Has the chunks of the last document that waits computed, unless that is left to their first use.
    pub(super) fn compute(&mut self, passages: &[NewPassage]) -> Result<()> {
        for (index, passage) in passages.iter().enumerate() {
            let tokens = self.service.with_suffix(&passage.tokens);
            self.report.tokens += tokens.len();
            if self.lazy {
                self.report.chunks_left += 1;
                continue;
            }
            self.check_wanted()?;
            match self.service.store.ensure_behind(&self.service.chunk_prefix, &tokens) {
                Ok(ensured) => self.chunks.push_back(WrittenChunk {
                    ensured,
                    document: self.waiting.len() - 1,
                    span: passage.place.chars,
                    tokens: tokens.len(),
                    number: index + 1,
                }),
                Err(error) => self.leave(error)?,
            }
            while self.chunks.front().is_some_and(|chunk| chunk.ensured.is_settled()) {
                self.settle_one()?;
            }
        }
        Ok(())
    }

    /// Waits until all chunks are on disk, and reports them.
    pub(super) fn settle_all(&mut self) -> Result<()> {
        while !self.chunks.is_empty() {
            self.settle_one()?;
        }
        Ok(())
    }

    fn settle_one(&mut self) -> Result<()> {
        let Some(WrittenChunk { ensured, document, span, tokens, number }) = self.chunks.pop_front() else {
            return Ok(());
        };
        if let Err(error) = ensured.wait() {
            return self.leave(error);
        }
        let computed = ensured.origin == Origin::Computed;
        self.service.metrics.chunk(!computed);
        let Some(waiting) = self.waiting.get_mut(document) else { return Ok(()) };
        waiting.computed += usize::from(computed);
        self.report.chunks_computed += usize::from(computed);
        self.report.chunks_cached += usize::from(!computed);
        (self.on_event)(&IngestEvent::Chunk {
            key: ensured.key,
            path: waiting.path,
            span,
            tokens,
            origin: ensured.origin,
            done: number,
            total: waiting.chunks,
        });
        Ok(())
    }

    /// A chunk that the store has no room for is left to its first use, and so are those behind it: a cache is worth having, and no
    /// more.
    fn leave(&mut self, error: QuireError) -> Result<()> {
        let QuireError::Store(
            problem @ (StoreError::OutOfSpace { .. }
            | StoreError::NoRoom { .. }
            | StoreError::TooLarge { .. }
            | StoreError::Damaged { .. }
            | StoreError::Closed { .. }),
        ) = error
        else {
            return Err(error);
        };
        if !self.lazy {
            tracing::warn!(%problem, "documents are kept; the state of their chunks is left to its first use");
        }
        self.lazy = true;
        self.report.chunks_left += 1;
        Ok(())
    }
}
