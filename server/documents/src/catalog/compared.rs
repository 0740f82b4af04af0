//! What a damaged catalog has lost without a trace, found out by what search indexes have of it.
//!
//! All rows of a change lie together in RocksDB's log. Where that is damaged, a document may be gone with everything that named
//! it, or be there with the text that it had before: then only an index, which had the change, knows of it.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::error::CatalogError;
use super::id::DocumentId;
use super::rows::{LogEntry, from_json, unseal};
use super::store::{Family, Store};
use super::survey::{CatalogReport, DamagedDocument, Saved};
use crate::error::Result;
use crate::search::passage_digest;

/// For each document of an index the digests of its passages, by their numbers.
pub(crate) type IndexedPassages = HashMap<DocumentId, BTreeMap<u64, u64>>;

const GONE: &str = "it came in with the last changes, which are gone with a damaged part of the log";
const OLDER: &str = "its last change is gone with a damaged part of the log: what it was before is there";

/// A document by what it is called and digests of its passages.
struct Digested {
    name: String,
    passages: BTreeMap<u64, u64>,
}

/// Documents that were read, to be compared with what indexes have.
#[derive(Default)]
pub(super) struct Compared {
    /// Those that are whole, with a name and digests of their passages; `None` for those that were removed.
    whole: HashMap<DocumentId, Option<Digested>>,
}

impl Compared {
    /// Notes what was read.
    pub(super) fn take(&mut self, saved: Saved<'_>) -> Result<()> {
        if let Saved::Document(document) = saved {
            let info = &document.info;
            let digests = || {
                let parts = document.passages.iter().map(|passage| document.text.get(passage.place.bytes.clone()));
                let digest = |(number, part): (usize, Option<&str>)| Some((number as u64, passage_digest(part?)));
                Digested { name: info.names.join("  =  "), passages: parts.enumerate().filter_map(digest).collect() }
            };
            // Passages that were cut anew say nothing.
            let comparable = info.removed.is_none() && !info.fingerprint.is_empty();
            self.whole.insert(info.id, comparable.then(digests));
        }
        Ok(())
    }

    /// Adds to the report what `indexed` tells of documents that is not in the catalog any more. Documents whose change the index
    /// lacks, as the catalog's log of changes says, are not compared.
    pub(super) fn with(self, source: &Store, indexed: IndexedPassages, report: &mut CatalogReport) -> Result<()> {
        let told = report.damaged.iter().chain(&report.missing).map(|document| document.id);
        let known: HashSet<DocumentId> = told.chain(changed(source)?).collect();
        let mut added = Vec::new();
        for (id, passages) in indexed.into_iter().filter(|(id, _)| !known.contains(id)) {
            let (name, problem, is_saved) = match self.whole.get(&id) {
                None => (id.to_string(), GONE, false),
                Some(Some(whole)) if whole.passages != passages => (whole.name.clone(), OLDER, true),
                Some(_) => continue,
            };
            added.push(DamagedDocument { name, id, problem: problem.into(), is_saved });
        }
        if added.is_empty() {
            return Ok(());
        }
        let gone = added.iter().filter(|document| !document.is_saved).count();
        report.problems.push(format!(
            "the last changes are gone with a damaged part of the log: search indexes tell of {gone} documents that were in them, \
             and of {} that are there as they were before: ingest again what came in last",
            added.len() - gone
        ));
        added.sort_by(|a, b| a.name.cmp(&b.name));
        report.damaged.extend(added);
        Ok(())
    }
}

/// Documents of which the log of changes tells.
fn changed(source: &Store) -> Result<Vec<DocumentId>> {
    let mut ids = Vec::new();
    for row in source.scan(Family::Log, b"", b"") {
        match row.and_then(|(key, row)| Ok(from_json::<LogEntry>(unseal(Family::Log, &key, &row)?)?)) {
            Ok(LogEntry::Put(id) | LogEntry::Removed(id)) => ids.push(id),
            Err(CatalogError::Row(_)) => {}
            Err(CatalogError::Whole(error)) => return Err(error),
        }
    }
    Ok(ids)
}
