//! How much a collection holds, without reading all of it each time somebody asks.
//!
//! Totals are summed up from the rows of documents when they are first asked for, kept in memory, and changed with each
//! transaction by the rows that it changes. Nothing of them is on disk: a damaged row or a batch that was written twice cannot make
//! them wrong for longer than the process lives.

use std::collections::HashMap;

use super::batch::{Batch, read};
use super::error::CatalogError;
use super::rows::{DocumentInfo, from_json, unseal};
use super::store::{Family, Store};
use super::{Access, Catalog};
use crate::attached_name;
use crate::error::Result;

/// What a collection holds; a document that was removed is not counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Documents.
    pub documents: u64,
    /// Bytes of their texts.
    pub bytes: u64,
    /// Their passages.
    pub passages: u64,
    /// Tokens of their passages.
    pub tokens: u64,
    /// Of the documents, those that came in otherwise than as uploaded files, perhaps as such too.
    pub plain_documents: u64,
    /// Bytes of the texts of these.
    pub plain_bytes: u64,
}

impl Totals {
    fn of(info: &DocumentInfo) -> Totals {
        if info.removed.is_some() {
            return Totals::default();
        }
        let plain = u64::from(info.names.iter().any(|name| attached_name(name).is_none()));
        Totals {
            documents: 1,
            bytes: info.bytes,
            passages: u64::from(info.passages),
            tokens: info.tokens,
            plain_documents: plain,
            plain_bytes: plain * info.bytes,
        }
    }

    fn each(&mut self, other: Totals, change: fn(u64, u64) -> u64) {
        for (own, other) in [
            (&mut self.documents, other.documents),
            (&mut self.bytes, other.bytes),
            (&mut self.passages, other.passages),
            (&mut self.tokens, other.tokens),
            (&mut self.plain_documents, other.plain_documents),
            (&mut self.plain_bytes, other.plain_bytes),
        ] {
            *own = change(*own, other);
        }
    }
}

/// Totals of all collections, by number.
pub(super) type AllTotals = HashMap<u32, Totals>;

/// Rows of documents before and after a transaction.
pub(super) struct TotalsChange(Vec<(Option<DocumentInfo>, Option<DocumentInfo>)>);

impl TotalsChange {
    /// What the changes of a batch mean; to be called before they are written.
    pub(super) fn of(batch: &Batch<'_>) -> Result<TotalsChange, CatalogError> {
        // One that is damaged was not counted.
        let parsed = |content: &[u8]| from_json::<DocumentInfo>(content).ok();
        let mut changes = Vec::new();
        for (key, content) in batch.changed(Family::Documents) {
            let before = match read(batch.store(), Family::Documents, key) {
                Ok(before) => before,
                Err(CatalogError::Row(_)) => None,
                Err(error) => return Err(error),
            };
            changes.push((before.as_deref().and_then(parsed), content.and_then(parsed)));
        }
        Ok(TotalsChange(changes))
    }

    /// Brings the changes, which are written by now, into totals.
    pub(super) fn apply(self, totals: &mut AllTotals) {
        for (before, after) in self.0 {
            if let Some(info) = after {
                totals.entry(info.collection).or_default().each(Totals::of(&info), u64::saturating_add);
            }
            if let Some(info) = before {
                totals.entry(info.collection).or_default().each(Totals::of(&info), u64::saturating_sub);
            }
        }
    }
}

fn sum(store: &Store) -> Result<AllTotals, CatalogError> {
    let mut totals = AllTotals::new();
    for row in store.scan(Family::Documents, b"", b"") {
        // One that is damaged is told of by whoever reads it.
        let (key, row) = match row {
            Err(CatalogError::Row(_)) => continue,
            row => row?,
        };
        if let Ok(info) = unseal(Family::Documents, &key, &row).and_then(from_json::<DocumentInfo>) {
            totals.entry(info.collection).or_default().each(Totals::of(&info), u64::saturating_add);
        }
    }
    Ok(totals)
}

impl Catalog {
    /// What a collection holds. The first call reads the rows of all documents, later ones none.
    ///
    /// # Errors
    /// [`DocumentsError::Catalog`](crate::DocumentsError::Catalog).
    pub fn totals(&self, collection: u32) -> Result<Totals> {
        let of = |totals: &AllTotals| totals.get(&collection).copied().unwrap_or_default();
        if self.access() == Access::Read {
            // Somebody else may be writing.
            return Ok(of(&sum(&self.store)?));
        }
        let mut writing = self.writing();
        let totals = match writing.totals.take() {
            Some(totals) => totals,
            None => sum(&self.store)?,
        };
        let found = of(&totals);
        writing.totals = Some(totals);
        Ok(found)
    }
}
