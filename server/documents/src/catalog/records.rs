//! Files that were uploaded and jobs that go on in the background: rows that survive a restart. What they mean is up to
//! whoever writes them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::batch::{Batch, read};
use super::error::CatalogError;
use super::rows::{DamagedRow, from_json, to_json, unseal};
use super::store::Family;
use super::{Catalog, Transaction};
use crate::error::Result;
use crate::seldom::Seldom;

/// Which list a record is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Uploaded files.
    File,
    /// Work in the background.
    Job,
}

impl RecordKind {
    fn family(self) -> Family {
        match self {
            RecordKind::File => Family::Files,
            RecordKind::Job => Family::Jobs,
        }
    }
}

/// A file or a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// Its name; records are listed in the order of these.
    pub id: String,
    /// What it is, in the words of whoever wrote it.
    pub kind: String,
    /// How it stands, in the words of whoever wrote it.
    pub state: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// When it is to be removed, in seconds since 1970.
    #[serde(default)]
    pub expires: Option<u64>,
    /// Steps that are done.
    #[serde(default)]
    pub done: u64,
    /// Steps in all.
    #[serde(default)]
    pub total: u64,
    /// Why it failed.
    #[serde(default)]
    pub last_error: Option<JobError>,
    /// Everything else.
    #[serde(default)]
    pub detail: Value,
}

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
}

impl Transaction<'_> {
    /// A record as it is after the changes so far.
    ///
    /// # Errors
    /// As [`Catalog::record`].
    pub fn record(&mut self, kind: RecordKind, id: &str) -> Result<Option<JobRecord>> {
        let mut read = || {
            let content = self.batch().get(kind.family(), id.as_bytes())?;
            Ok(content.map(|content| from_json(&content)).transpose()?)
        };
        read().map_err(|error: CatalogError| error.of(|| format!("record {id}")))
    }

    /// Writes a record, in the place of the one with its id.
    pub fn put_record(&mut self, kind: RecordKind, record: &JobRecord) {
        self.batch().put(kind.family(), record.id.clone().into_bytes(), to_json(record));
    }

    /// Removes a record, if it is there.
    pub fn remove_record(&mut self, kind: RecordKind, id: &str) {
        self.batch().delete(kind.family(), id.as_bytes().to_vec());
    }
}

impl Catalog {
    /// Writes a record, in the place of the one with its id. When this returns, it is on disk.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn put_record(&self, kind: RecordKind, record: &JobRecord) -> Result<()> {
        self.change(|transaction| {
            transaction.batch().put(kind.family(), record.id.clone().into_bytes(), to_json(record));
            Ok(())
        })?;
        Ok(())
    }

    /// Writes several records, all or none. When this returns, they are on disk.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn put_records(&self, kind: RecordKind, records: &[JobRecord]) -> Result<()> {
        self.change(|transaction| {
            let batch = transaction.batch();
            records.iter().for_each(|row| batch.put(kind.family(), row.id.clone().into_bytes(), to_json(row)));
            Ok(())
        })?;
        Ok(())
    }

    /// Removes a record; says whether there was one.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn remove_record(&self, kind: RecordKind, id: &str) -> Result<bool> {
        let removed = self.change(|transaction| {
            let batch: &mut Batch<'_> = transaction.batch();
            let there = batch.get(kind.family(), id.as_bytes()).map_or(true, |found| found.is_some());
            batch.delete(kind.family(), id.as_bytes().to_vec());
            Ok(there)
        })?;
        Ok(removed.value)
    }

    /// Removes several records, all or none; those that are not there are no error.
    ///
    /// # Errors
    /// As [`change`](Self::change).
    pub fn remove_records(&self, kind: RecordKind, ids: &[String]) -> Result<()> {
        self.change(|transaction| {
            let batch = transaction.batch();
            ids.iter().for_each(|id| batch.delete(kind.family(), id.clone().into_bytes()));
            Ok(())
        })?;
        Ok(())
    }

    /// A record by its id.
    ///
    /// # Errors
    /// [`crate::DocumentsError::DamagedDocument`], [`crate::DocumentsError::Catalog`].
    pub fn record(&self, kind: RecordKind, id: &str) -> Result<Option<JobRecord>> {
        let content = read(&self.store, kind.family(), id.as_bytes());
        let found = content.and_then(|content| Ok(content.map(|content| from_json(&content)).transpose()?));
        found.map_err(|error: CatalogError| error.of(|| id.to_string()))
    }

    /// All records of a kind, in the order of their ids. One that is damaged is left out, with a warning.
    ///
    /// # Errors
    /// [`crate::DocumentsError::Catalog`].
    pub fn records(&self, kind: RecordKind) -> Result<Vec<JobRecord>> {
        self.records_under(kind, "")
    }

    /// As [`records`](Self::records), those whose ids begin with `prefix`.
    ///
    /// # Errors
    /// As [`records`](Self::records).
    pub fn records_under(&self, kind: RecordKind, prefix: &str) -> Result<Vec<JobRecord>> {
        let mut records = Vec::new();
        for row in self.store.scan(kind.family(), prefix.as_bytes(), prefix.as_bytes()) {
            let read = |(key, row): (Vec<u8>, Vec<u8>)| {
                let record = unseal(kind.family(), &key, &row).and_then(from_json);
                Ok(record.map_err(|DamagedRow(problem)| {
                    DamagedRow(format!("{}: {problem}", String::from_utf8_lossy(&key)))
                })?)
            };
            match row.and_then(read) {
                Ok(record) => records.push(record),
                Err(CatalogError::Row(DamagedRow(problem))) => {
                    static TOLD: Seldom = Seldom::new();
                    if let Some(more) = TOLD.due() {
                        tracing::warn!(
                            problem,
                            more,
                            "a record is damaged: `quire catalog verify --repair` mends the rest"
                        );
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(records)
    }
}
