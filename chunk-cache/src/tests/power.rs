//! A power failure: of the rows that were written since the last sync, any part may be lost, in any order. Payload files
//! are safe when adding or dropping them returns, whatever became of the rows before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use super::*;
use crate::backend::{Access, Backend, Change, Family, Sync, payload_key, payload_number, write_payload_file};

/// Everything that one call changed.
#[derive(Clone)]
enum Call {
    Rows(Vec<Change>, Sync),
    Files(Vec<Change>),
}

/// Everything that a backend wrote, one entry a call.
#[derive(Default)]
pub(crate) struct Journal(Mutex<Vec<Call>>);

impl Journal {
    /// Notes a call that has succeeded. With [`Sync::Now`] this write and all rows before it are safe.
    pub(crate) fn wrote(&self, changes: impl IntoIterator<Item = Change>, sync: Sync) {
        self.0.lock().unwrap().push(Call::Rows(changes.into_iter().collect(), sync));
    }

    /// Notes a payload file that was added.
    pub(crate) fn added(&self, rows: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) {
        let added = rows.into_iter().map(|(key, value)| (Family::Payload, key, Some(value)));
        self.0.lock().unwrap().push(Call::Files(added.collect()));
    }

    /// Notes payload files that were dropped.
    pub(crate) fn dropped(&self, first: u64, last: u64) {
        let mut calls = self.0.lock().unwrap();
        let added = calls.iter().filter_map(|call| match call {
            Call::Files(changes) => Some(changes.iter()),
            Call::Rows(..) => None,
        });
        let within = |key: &&Vec<u8>| payload_number(key).is_some_and(|number| (first..=last).contains(&number));
        let keys: BTreeSet<Vec<u8>> = added.flatten().map(|(_, key, _)| key).filter(within).cloned().collect();
        calls.push(Call::Files(keys.into_iter().map(|key| (Family::Payload, key, None)).collect()));
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// All rows of a database.
type Rows = BTreeMap<(Family, Vec<u8>), Vec<u8>>;

fn apply(rows: &mut Rows, call: &Call) {
    let (Call::Rows(changes, _) | Call::Files(changes)) = call;
    for (family, key, value) in changes {
        match value {
            Some(value) => rows.insert((*family, key.clone()), value.clone()),
            None => rows.remove(&(*family, key.clone())),
        };
    }
}

/// What can be on disk after a power failure during call number `at`: all files, all rows up to the last sync that has
/// returned, and of the rows behind it and the call itself none, all, one, or all but one.
fn survivors(calls: &[Call], at: usize) -> BTreeSet<Rows> {
    let synced = |call: &Call| matches!(call, Call::Rows(_, Sync::Now));
    let safe = calls[..at].iter().rposition(synced).map_or(0, |last| last + 1);
    let in_doubt = |index: usize| index == at || (index >= safe && matches!(calls[index], Call::Rows(..)));
    let pending: Vec<usize> = (0..=at).filter(|index| in_doubt(*index)).collect();
    let keep = |kept: &dyn Fn(usize) -> bool| {
        let mut rows = Rows::new();
        let survived = (0..=at).filter(|index| !in_doubt(*index) || kept(*index));
        survived.for_each(|index| apply(&mut rows, &calls[index]));
        rows
    };
    let mut all = BTreeSet::from([keep(&|_| false), keep(&|_| true)]);
    for one in pending {
        all.extend([keep(&|i| i == one), keep(&|i| i != one)]);
    }
    all
}

/// A database with these rows, opened as a store. Each chunk's payload becomes a file of its own.
fn restored(directory: &Path, rows: &Rows) -> ChunkStore {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir_all(directory.join("incoming")).unwrap();
    let (backend, _) = Backend::open(directory, Access::Write).unwrap();
    type Row<'a> = (&'a [u8], &'a [u8]);
    let mut payloads: BTreeMap<u64, Vec<Row<'_>>> = BTreeMap::new();
    for ((family, key), value) in rows {
        match payload_number(key).filter(|_| *family == Family::Payload) {
            Some(number) => payloads.entry(number).or_default().push((key, value)),
            None => backend.write("a test", &[(*family, key.clone(), Some(value.clone()))], Sync::Later).unwrap(),
        }
    }
    for (number, rows) in payloads {
        assert_eq!(rows[0].0, payload_key(number, 0));
        let file = directory.join("incoming/one.sst");
        write_payload_file(&file, |put_row| {
            rows.iter().for_each(|(key, value)| put_row(key, value).unwrap());
            Ok(())
        })
        .unwrap();
        backend.ingest(&file, number..=number).unwrap();
    }
    drop(backend);
    open(directory).unwrap()
}

#[test]
fn a_power_failure_that_drops_unsynced_writes_leaves_every_chunk_whole_or_absent() {
    const CHUNKS: u32 = 5;
    let directory = tempfile::tempdir().unwrap();
    // Chunk 3 fits only in the place of others.
    let budget = bytes_of(1) + bytes_of(2) + bytes_of(3) / 2;
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    model(&store);
    let there = |store: &ChunkStore| (0..CHUNKS).map(|n| store.contains(&key(n))).collect::<Vec<bool>>();
    // How many calls were made when an operation had returned, and what was there then.
    let settle = |store: &ChunkStore| assert!(!store.remove(&key(999)).unwrap());
    settle(&store);
    let mut moments = vec![(store.core.backend.journal.len(), there(&store))];
    type Operation = fn(&ChunkStore);
    let operations: [Operation; 9] = [
        |store| put_each(store, [0]),
        |store| put_each(store, [1]),
        |store| assert!(store.remove(&key(0)).unwrap()),
        |store| put_each(store, [2]),
        |store| put_each(store, [3]),
        |store| put_group(store, [0, 4]),
        |store| assert!(store.remove(&key(4)).unwrap()),
        // Moves chunk 0, whose file has lost its other half.
        |store| store.compact().unwrap(),
        |store| put_each(store, [4]),
    ];
    for operation in operations {
        operation(&store);
        settle(&store);
        moments.push((store.core.backend.journal.len(), there(&store)));
    }
    assert!(store.stats().evicted > 0);
    let calls = std::mem::take(&mut *store.core.backend.journal.0.lock().unwrap());
    let mut tried = BTreeSet::new();
    let disk = tempfile::tempdir().unwrap();
    for at in moments[0].0..calls.len() {
        let done = moments.partition_point(|(calls, _)| *calls <= at) - 1;
        let (before, after) = (&moments[done].1, &moments[done + 1].1);
        for rows in survivors(&calls, at) {
            // The same rows between the same moments need to be looked at once.
            if !tried.insert((done, rows.clone())) {
                continue;
            }
            let store = restored(disk.path(), &rows);
            for n in 0..CHUNKS {
                let seen = look(&store, n);
                let (was, is) = (before[n as usize], after[n as usize]);
                let allowed = (seen == Seen::Whole && (was || is)) || (seen == Seen::Absent && !(was && is));
                assert!(allowed, "chunk {n} is {seen:?} after a power failure in call {at}");
            }
        }
    }
    assert!(tried.len() > 30, "{} states", tried.len());
}
