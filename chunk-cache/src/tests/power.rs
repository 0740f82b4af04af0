//! A power failure: of what was written since the last sync, any part may be lost, in any order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use super::*;
use crate::backend::{Access, Backend, Family, Mode, Sync};

/// A row, and its value unless it was deleted.
type Change = (Family, Vec<u8>, Option<Vec<u8>>);

/// Everything that a backend wrote, one entry a call.
#[derive(Default)]
pub(crate) struct Journal(Mutex<Vec<(Vec<Change>, Sync)>>);

impl Journal {
    /// Notes a call that has succeeded. With [`Sync::Now`] this write and all before it are safe.
    pub(crate) fn wrote(&self, changes: impl IntoIterator<Item = Change>, sync: Sync) {
        self.0.lock().unwrap().push((changes.into_iter().collect(), sync));
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}

/// All rows of a database.
type Rows = BTreeMap<(Family, Vec<u8>), Vec<u8>>;

fn apply(rows: &mut Rows, changes: &[Change]) {
    for (family, key, value) in changes {
        match value {
            Some(value) => rows.insert((*family, key.clone()), value.clone()),
            None => rows.remove(&(*family, key.clone())),
        };
    }
}

/// What can be on disk after a power failure during call number `at`: everything up to the last sync that has returned,
/// and of the calls behind it none, all, one, or all but one.
fn survivors(calls: &[(Vec<Change>, Sync)], at: usize) -> BTreeSet<Rows> {
    let safe = calls[..at].iter().rposition(|(_, sync)| *sync == Sync::Now).map_or(0, |last| last + 1);
    let mut base = Rows::new();
    calls[..safe].iter().for_each(|(changes, _)| apply(&mut base, changes));
    let pending: Vec<&Vec<Change>> = calls[safe..=at].iter().map(|(changes, _)| changes).collect();
    let keep = |kept: &dyn Fn(usize) -> bool| {
        let mut rows = base.clone();
        let survived = pending.iter().enumerate().filter(|(i, _)| kept(*i));
        survived.for_each(|(_, changes)| apply(&mut rows, changes));
        rows
    };
    let mut all = BTreeSet::from([keep(&|_| false), keep(&|_| true)]);
    for one in 0..pending.len() {
        all.extend([keep(&|i| i == one), keep(&|i| i != one)]);
    }
    all
}

/// A database with these rows, opened as a store.
fn restored(directory: &Path, rows: &Rows) -> ChunkStore {
    let _ = fs::remove_dir_all(directory);
    let backend = Backend::open(directory, Mode::Strict, Access::Write).unwrap();
    for ((family, key), value) in rows {
        backend.put(*family, key, value, Sync::Later).unwrap();
    }
    drop(backend);
    open(directory).unwrap()
}

#[test]
fn a_power_failure_that_drops_unsynced_writes_leaves_every_chunk_whole_or_absent() {
    const CHUNKS: u32 = 4;
    let directory = tempfile::tempdir().unwrap();
    // Chunk 3 fits only in the place of others.
    let budget = bytes_of(1) + bytes_of(2) + bytes_of(3) / 2;
    let store = ChunkStore::open(directory.path(), options(budget)).unwrap();
    let there = |store: &ChunkStore| (0..CHUNKS).map(|n| store.contains(&key(n)).unwrap()).collect::<Vec<bool>>();
    // How many calls were made when an operation had returned, and what was there then.
    let mut moments = vec![(store.backend.journal.len(), there(&store))];
    type Operation = fn(&ChunkStore);
    let operations: [Operation; 6] = [
        |store| {
            put(store, 0).unwrap();
        },
        |store| {
            put(store, 1).unwrap();
        },
        |store| {
            store.remove(&key(0)).unwrap();
        },
        |store| {
            put(store, 2).unwrap();
        },
        |store| {
            put(store, 3).unwrap();
        },
        |store| {
            put(store, 0).unwrap();
        },
    ];
    for operation in operations {
        operation(&store);
        moments.push((store.backend.journal.len(), there(&store)));
    }
    assert!(store.stats().unwrap().evicted > 0);
    let calls = std::mem::take(&mut *store.backend.journal.0.lock().unwrap());
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
                assert!(allowed, "chunk {n} is {seen:?} after a power failure in call {at}: {:?}", calls[at].1);
            }
        }
    }
    assert!(tried.len() > 50, "{} states", tried.len());
}
