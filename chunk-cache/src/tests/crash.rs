//! Images of a live directory, as a crash would leave it.

use super::*;

#[test]
fn a_payload_without_a_manifest_is_invisible_and_swept() {
    let directory = tempfile::tempdir().unwrap();
    let crashed = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put(&store, 1).unwrap();
    store.write_payload(&key(2), tokens(2), &layers(2)).unwrap();
    assert_eq!(look(&store, 2), Seen::Absent);
    assert_eq!(store.verify().unwrap().orphans, [key(2)]);
    image(directory.path(), crashed.path());

    let after = open(crashed.path()).unwrap();
    assert_eq!(after.open_report().orphans, 1);
    assert_eq!((look(&after, 1), look(&after, 2)), (Seen::Whole, Seen::Absent));
    assert!(after.verify().unwrap().is_clean());
    put(&after, 2).unwrap();
    assert_eq!(look(&after, 2), Seen::Whole);
}

#[test]
fn a_manifest_without_a_payload_is_corrupt_and_replaced_by_a_put() {
    use crate::backend::{Family, Sync, row_key};
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..4 {
        put(&store, n).unwrap();
    }
    // One loses a layer while the store is open, the other everything while it is closed.
    let layer = (Family::Kv, row_key(&key(2), 2).to_vec());
    store.backend.delete([layer], Sync::Now).unwrap();
    assert_eq!(look(&store, 2), Seen::Corrupt);
    let rows = crate::open::payload_rows(&key(3), &SHAPE);
    store.backend.delete(rows, Sync::Now).unwrap();
    drop(store);
    let store = open(directory.path()).unwrap();
    let damaged: Vec<_> = store.open_report().damaged.iter().map(|d| d.key).collect();
    assert_eq!(damaged, [key(3)]);
    assert_eq!((look(&store, 2), look(&store, 3)), (Seen::Corrupt, Seen::Corrupt));
    assert_eq!(store.verify().unwrap().damaged.len(), 2);
    for n in [2, 3] {
        assert_eq!(put(&store, n).unwrap(), crate::PutOutcome::Stored);
        assert_eq!(look(&store, n), Seen::Whole);
    }
    assert!(store.verify().unwrap().is_clean());
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
                store.compact();
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
fn a_log_torn_within_a_removal_leaves_the_chunk_whole_or_absent() {
    let directory = tempfile::tempdir().unwrap();
    let whole = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..3 {
        put(&store, n).unwrap();
    }
    let log = log_file(directory.path());
    let before = fs::metadata(&log).unwrap().len();
    store.remove(&key(1)).unwrap();
    image(directory.path(), whole.path());
    let length = fs::metadata(log_file(whole.path())).unwrap().len();
    assert!(length > before + 100);
    let torn = tempfile::tempdir().unwrap();
    let mut seen = Vec::new();
    for point in (before..length).step_by(12).chain([length]) {
        image(whole.path(), torn.path());
        let file = fs::OpenOptions::new().write(true).open(log_file(torn.path())).unwrap();
        file.set_len(point).unwrap();
        drop(file);
        let after = open(torn.path()).unwrap();
        assert_eq!((look(&after, 0), look(&after, 2)), (Seen::Whole, Seen::Whole));
        seen.push(look(&after, 1));
        assert!(after.verify().unwrap().is_clean());
    }
    assert!(!seen.contains(&Seen::Corrupt), "{seen:?}");
    assert!(seen.contains(&Seen::Whole) && seen.ends_with(&[Seen::Absent]), "{seen:?}");
}
