//! Images of a live directory, as a crash would leave it.

use super::*;
use crate::backend::{Change, Family, Sync, payload_key, write_payload_file};
use crate::format;
use crate::records::layer_header;

/// Adds a payload file as a put does before its rows are written. Returns its number.
pub(super) fn write_payload_alone(store: &ChunkStore, n: u32) -> u64 {
    let number = store.core.catalogue.lock().take_numbers(1);
    let file = store.core.incoming(number);
    write_payload_file(&file, |put_row| {
        for (index, layer) in (0..).zip(layers(n)) {
            let value = format::encode(&layer_header(&key(n), &SHAPE, tokens(n), index), &[&layer.keys, &layer.values]);
            put_row(&payload_key(number, index), &value).unwrap();
        }
        Ok(())
    })
    .unwrap();
    store.core.take_over(&file, number, number).unwrap();
    number
}

/// Takes the payload file away in which a chunk lies, behind the store's back.
fn drop_payload(store: &ChunkStore, n: u32) {
    let number = store.core.catalogue.lock().entries[&key(n)].number;
    store.core.backend.drop_files(number, number).unwrap();
}

#[test]
fn a_payload_without_a_row_is_invisible_and_swept() {
    let directory = tempfile::tempdir().unwrap();
    let crashed = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put(&store, 1).unwrap();
    write_payload_alone(&store, 2);
    assert_eq!(look(&store, 2), Seen::Absent);
    image(directory.path(), crashed.path());

    let after = open(crashed.path()).unwrap();
    assert_eq!(after.open_report().orphans, 1);
    assert_eq!((look(&after, 1), look(&after, 2)), (Seen::Whole, Seen::Absent));
    assert_eq!(after.core.backend.payload_files().unwrap().len(), 1);
    assert!(after.verify().unwrap().is_clean());
    put(&after, 2).unwrap();
    assert_eq!(look(&after, 2), Seen::Whole);
    drop(after);
    assert_eq!(open(crashed.path()).unwrap().open_report().orphans, 0);
}

#[test]
fn a_file_that_was_not_yet_taken_over_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put(&store, 1).unwrap();
    drop(store);
    let left = directory.path().join("incoming/00000000000000000009.sst");
    fs::write(&left, b"half a file").unwrap();
    let store = open(directory.path()).unwrap();
    assert!(!left.exists());
    assert_eq!(look(&store, 1), Seen::Whole);
}

#[test]
fn a_row_without_a_payload_is_corrupt_while_open_and_absent_afterwards() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..4 {
        put(&store, n).unwrap();
    }
    drop_payload(&store, 2);
    assert_eq!(look(&store, 2), Seen::Corrupt);
    drop_payload(&store, 3);
    drop(store);
    let store = open(directory.path()).unwrap();
    assert_eq!(store.open_report().lost, 2);
    assert_eq!((look(&store, 2), look(&store, 3)), (Seen::Absent, Seen::Absent));
    assert!(store.verify().unwrap().is_clean());
    for n in [2, 3] {
        assert_eq!(put(&store, n).unwrap(), crate::PutOutcome::Stored);
        assert_eq!(look(&store, n), Seen::Whole);
    }
    drop(store);
    assert_eq!(open(directory.path()).unwrap().open_report().lost, 0);
}

#[test]
fn a_row_under_which_another_chunk_lies_is_corrupt() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    // Of equal size, so that only the name differs.
    assert_eq!(tokens(6), tokens(156));
    put_group(&store, [6, 156, 1]);
    let (mut row, other) = (store.core.chunk_row(&key(6)).unwrap(), store.core.chunk_row(&key(156)).unwrap());
    (row.number, row.offset) = (other.number, other.offset);
    let change: Change = (Family::Chunks, key(6).to_bytes().to_vec(), Some(row.encode(&key(6))));
    store.core.backend.write("a test", &[change], Sync::Now).unwrap();
    drop(store);
    let store = open(directory.path()).unwrap();
    assert_eq!([look(&store, 6), look(&store, 156), look(&store, 1)], [Seen::Corrupt, Seen::Whole, Seen::Whole]);
}

#[test]
fn acknowledged_chunks_survive_a_crash_between_any_two_writes() {
    let mut dice = Dice(11);
    for run in 0..4 {
        let directory = tempfile::tempdir().unwrap();
        let crashed = tempfile::tempdir().unwrap();
        let store = open(directory.path()).unwrap();
        let mut acknowledged = std::collections::BTreeSet::new();
        for step in 0..24 {
            let n = dice.below(16) as u32;
            if dice.below(4) == 0 {
                store.remove(&key(n)).unwrap();
                acknowledged.remove(&n);
            } else {
                put(&store, n).unwrap();
                acknowledged.insert(n);
            }
            if dice.below(8) == 0 {
                store.compact().unwrap();
            }
            if dice.below(4) == 0 {
                image(directory.path(), crashed.path());
                let after = open(crashed.path()).unwrap();
                assert_eq!(after.open_report().salvaged, None);
                for n in 0..16 {
                    let wanted = if acknowledged.contains(&n) { Seen::Whole } else { Seen::Absent };
                    assert_eq!(look(&after, n), wanted, "run {run} step {step} chunk {n}");
                }
            }
        }
    }
}

fn log_file(path: &Path) -> std::path::PathBuf {
    let files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|p| p.extension().is_some_and(|e| e == "log")).max().unwrap()
}

#[test]
fn a_log_torn_anywhere_loses_only_what_was_not_acknowledged() {
    let directory = tempfile::tempdir().unwrap();
    let whole = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let log = log_file(directory.path());
    let mut acknowledged_at = Vec::new();
    for n in 0..10 {
        put(&store, n).unwrap();
        acknowledged_at.push(fs::metadata(&log).unwrap().len());
    }
    image(directory.path(), whole.path());
    assert_eq!(log_file(whole.path()).file_name(), log.file_name());
    let length = fs::metadata(log_file(whole.path())).unwrap().len();
    let mut dice = Dice(5);
    let torn = tempfile::tempdir().unwrap();
    let points = (0..30).map(|_| dice.below(length + 1)).chain(acknowledged_at.clone());
    for point in points.collect::<Vec<_>>() {
        image(whole.path(), torn.path());
        let file = fs::OpenOptions::new().write(true).open(log_file(torn.path())).unwrap();
        file.set_len(point).unwrap();
        drop(file);
        let after = open(torn.path()).unwrap();
        for (n, at) in (0..).zip(&acknowledged_at) {
            let seen = look(&after, n);
            // A chunk whose last byte was written but not yet acknowledged may be there already.
            assert!(seen == Seen::Whole || (*at > point && seen == Seen::Absent), "{n} {seen:?}");
        }
        assert!(after.verify().unwrap().is_clean());
    }
}

#[test]
fn a_log_torn_within_a_removal_or_a_move_leaves_every_chunk_whole_or_absent() {
    let directory = tempfile::tempdir().unwrap();
    let whole = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put_group(&store, 0..4);
    let log = log_file(directory.path());
    let before = fs::metadata(&log).unwrap().len();
    // Keeps the old file, as a crash before it is dropped would.
    let kept = tempfile::tempdir().unwrap();
    image(directory.path(), kept.path());
    store.remove(&key(1)).unwrap();
    store.reclaim().unwrap();
    image(directory.path(), whole.path());
    let torn = tempfile::tempdir().unwrap();
    image(kept.path(), torn.path());
    let after = open(torn.path()).unwrap();
    (0..4).for_each(|n| assert_eq!(look(&after, n), Seen::Whole));
    drop(after);
    let after = open(whole.path()).unwrap();
    assert_eq!([0, 1, 2, 3].map(|n| look(&after, n)), [Seen::Whole, Seen::Absent, Seen::Whole, Seen::Whole]);
    assert!(after.verify().unwrap().is_clean() && before > 0);
}
