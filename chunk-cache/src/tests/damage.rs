//! Flipped bytes and cut files in a closed directory: whatever is read back is right, or is not read.

use super::*;

const CHUNKS: u32 = 12;

/// A closed store with some chunks in table and blob files and some only in the log.
fn template() -> tempfile::TempDir {
    use crate::backend::Family;
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..CHUNKS {
        put(&store, n).unwrap();
        if n == 4 || n == 7 {
            for family in Family::ALL {
                store.backend.flush(family).unwrap();
            }
        }
    }
    store.remove(&key(1)).unwrap();
    drop(store);
    directory
}

fn data_files(path: &Path) -> Vec<std::path::PathBuf> {
    let mut files: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            !name.starts_with("LO") && fs::metadata(path).unwrap().len() > 0
        })
        .collect();
    files.sort();
    files
}

#[derive(Debug, Default)]
struct Tally {
    refused: u32,
    salvaged: u32,
    corrupt: u32,
    absent: u32,
    unharmed: u32,
}

/// Opens a damaged directory and checks all that is promised of it.
fn examine(path: &Path, tally: &mut Tally, what: &str) {
    let store = match open(path) {
        Ok(store) => store,
        Err(error) => {
            let text = error.to_string();
            let clear = matches!(error, StoreError::Damaged { .. });
            assert!(clear, "{what}: {error:?}");
            assert!(text.contains(&path.display().to_string()) && text.contains("remove the directory"), "{text}");
            tally.refused += 1;
            return;
        }
    };
    tally.salvaged += u32::from(store.open_report().salvaged.is_some());
    let mut lost = Vec::new();
    for n in 0..CHUNKS {
        match look(&store, n) {
            Seen::Whole => continue,
            Seen::Corrupt => tally.corrupt += 1,
            // Chunk 1 was removed.
            Seen::Absent if n == 1 => continue,
            Seen::Absent => tally.absent += 1,
        }
        lost.push(n);
    }
    tally.unharmed += u32::from(lost.is_empty());
    store.verify().unwrap();
    // Whatever was lost can be dropped or overwritten, and is whole again.
    for n in lost {
        if n % 2 == 0 {
            store.remove(&key(n)).unwrap();
            assert_eq!(look(&store, n), Seen::Absent, "{what}");
        }
        assert_eq!(put(&store, n).unwrap(), crate::PutOutcome::Stored, "{what}");
        assert_eq!(look(&store, n), Seen::Whole, "{what}");
    }
}

fn trials(count: u64, seed: u64, hurt: impl Fn(&mut Vec<u8>, &mut Dice)) -> Tally {
    let template = template();
    let files = data_files(template.path());
    for end in ["sst", "blob", "log"] {
        assert!(files.iter().any(|f| f.extension().is_some_and(|e| e == end)), "no {end} file");
    }
    let mut dice = Dice(seed);
    let mut tally = Tally::default();
    for trial in 0..count {
        let copy = tempfile::tempdir().unwrap();
        image(template.path(), copy.path());
        let file = &files[(trial % files.len() as u64) as usize];
        let target = copy.path().join(file.file_name().unwrap());
        let mut bytes = fs::read(&target).unwrap();
        hurt(&mut bytes, &mut dice);
        fs::write(&target, bytes).unwrap();
        examine(copy.path(), &mut tally, &format!("trial {trial}, {}", target.display()));
    }
    tally
}

#[test]
fn flipped_bytes_are_never_served() {
    let tally = trials(160, 21, |bytes, dice| {
        let at = dice.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 + dice.below(255) as u8;
    });
    // Each way out was taken, or the test looked at nothing.
    assert!(tally.corrupt > 0 && tally.refused > 0 && tally.salvaged > 0, "{tally:?}");
}

#[test]
fn cut_and_overwritten_files_are_never_served() {
    let tally = trials(80, 22, |bytes, dice| {
        let at = dice.below(bytes.len() as u64) as usize;
        if dice.below(2) == 0 {
            bytes.truncate(at);
        } else {
            let end = bytes.len().min(at + 700);
            bytes[at..end].fill_with(|| dice.below(256) as u8);
        }
    });
    assert!(tally.corrupt + tally.absent > 0 && tally.refused > 0, "{tally:?}");
}

#[test]
fn a_missing_file_is_a_miss_or_a_refusal() {
    let template = template();
    let mut tally = Tally::default();
    for file in data_files(template.path()) {
        let copy = tempfile::tempdir().unwrap();
        image(template.path(), copy.path());
        fs::remove_file(copy.path().join(file.file_name().unwrap())).unwrap();
        examine(copy.path(), &mut tally, &format!("without {}", file.display()));
    }
}

#[test]
fn our_own_checksum_catches_what_rocksdb_cannot_see() {
    use crate::backend::{Family, Sync, row_key};
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    let mut dice = Dice(3);
    for n in 0..6 {
        put(&store, n).unwrap();
        // Written through RocksDB, so that its own checksums hold.
        let row = row_key(&key(n), 1 + n % SHAPE.layers);
        let mut bytes = store.backend.get(Family::Kv, &row).unwrap().unwrap().to_vec();
        let at = dice.below(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << dice.below(8);
        store.backend.put(Family::Kv, &row, &bytes, Sync::Now).unwrap();
    }
    // A whole and valid payload, but another chunk's.
    put(&store, 6).unwrap();
    put(&store, 156).unwrap();
    assert_eq!(tokens(6), tokens(156));
    let other = store.backend.get(Family::Kv, &row_key(&key(156), 1)).unwrap().unwrap().to_vec();
    store.backend.put(Family::Kv, &row_key(&key(6), 1), &other, Sync::Now).unwrap();
    let report = store.verify().unwrap();
    assert_eq!(report.damaged.len(), 7);
    for n in 0..7 {
        assert_eq!(look(&store, n), Seen::Corrupt);
    }
    assert_eq!(look(&store, 156), Seen::Whole);
}

#[test]
fn a_valid_row_of_another_put_of_the_same_chunk_is_corrupt() {
    use crate::backend::{Family, Sync, row_key};
    use crate::{format, records};
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..3 {
        put(&store, n).unwrap();
    }
    // As an earlier put of the chunk could have left it: its name, its size and its checksums are right.
    let other: Vec<u8> = layers(1)[1].keys.iter().map(|byte| byte ^ 1).collect();
    let header = records::layer_header(&key(1), &SHAPE, tokens(1), 1);
    let row = format::encode(&header, &[&other, &layers(1)[1].values]);
    store.backend.put(Family::Kv, &row_key(&key(1), 2), &row, Sync::Now).unwrap();
    assert_eq!([look(&store, 0), look(&store, 1), look(&store, 2)], [Seen::Whole, Seen::Corrupt, Seen::Whole]);
    drop(store);
    let store = open(directory.path()).unwrap();
    let report = store.verify().unwrap();
    assert_eq!(report.damaged.iter().map(|d| (d.key, d.layer)).collect::<Vec<_>>(), [(key(1), Some(1))]);
}

#[test]
fn a_flipped_manifest_costs_one_chunk() {
    use crate::backend::{Family, Sync};
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..3 {
        put(&store, n).unwrap();
    }
    let mut bytes = store.backend.get(Family::Manifest, &key(1).0).unwrap().unwrap().to_vec();
    bytes[90] ^= 4;
    store.backend.put(Family::Manifest, &key(1).0, &bytes, Sync::Now).unwrap();
    drop(store);
    let store = open(directory.path()).unwrap();
    assert_eq!(store.open_report().damaged.len(), 1);
    assert_eq!((look(&store, 0), look(&store, 1), look(&store, 2)), (Seen::Whole, Seen::Corrupt, Seen::Whole));
    put(&store, 1).unwrap();
    drop(store);
    let store = open(directory.path()).unwrap();
    assert_eq!(look(&store, 1), Seen::Whole);
    assert!(store.verify().unwrap().is_clean());
}
