//! Flipped bytes and cut files in a closed directory: whatever is read back is right, or is not read.

use super::*;

const CHUNKS: u32 = 12;

/// A closed store with several payload files, some rows in tables and some only in the log.
fn template() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put_group(&store, 0..3);
    put_group(&store, [3]);
    put_group(&store, [4]);
    store.core.backend.flush().unwrap();
    put_group(&store, 5..8);
    store.core.backend.flush().unwrap();
    put_group(&store, 8..CHUNKS);
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
            path.is_file() && !name.starts_with("LO") && name != RESERVE_FILE && fs::metadata(path).unwrap().len() > 0
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
            let named = text.contains(&path.display().to_string()) && text.contains("quire cache evict --all");
            assert!(named, "{text}");
            tally.refused += 1;
            // What the error names really helps.
            ChunkStore::clear(path).unwrap();
            let store = open(path).unwrap();
            assert_eq!(put(&store, 2).unwrap(), crate::PutOutcome::Stored, "{what}");
            assert_eq!(look(&store, 2), Seen::Whole, "{what}");
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
    // A chunk that is read past a damaged part of its file may be found out only now.
    lost.extend((0..CHUNKS).filter(|n| *n != 1 && !store.contains(&key(*n))));
    lost.sort_unstable();
    lost.dedup();
    if lost.len() % 2 == 0 {
        store.repair().unwrap();
        assert!(store.verify().unwrap().is_clean(), "{what}");
    }
    put(&store, 200).unwrap();
    assert_eq!(look(&store, 200), Seen::Whole, "{what}");
    // Whatever was lost can be dropped or overwritten, and is whole again.
    for n in lost {
        if n % 2 == 0 {
            store.remove(&key(n)).unwrap();
            assert_eq!(look(&store, n), Seen::Absent, "{what}");
        }
        assert_eq!(put(&store, n).unwrap(), crate::PutOutcome::Stored, "{what}");
        assert_eq!(look(&store, n), Seen::Whole, "{what}");
    }
    // Nothing of the damage is left for the next process.
    store.compact().unwrap();
    drop(store);
    let store = open(path).unwrap();
    (0..CHUNKS).filter(|n| *n != 1).for_each(|n| assert_eq!(look(&store, n), Seen::Whole, "{what}"));
}

fn trials(count: u64, seed: u64, hurt: impl Fn(&mut Vec<u8>, &mut Dice)) -> Tally {
    let template = template();
    let files = data_files(template.path());
    for end in ["sst", "log"] {
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
fn a_valid_payload_of_another_put_of_the_same_chunk_is_found_by_verify() {
    use crate::backend::{payload_key, write_payload_file};
    use crate::{format, records};
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..3 {
        put(&store, n).unwrap();
    }
    // As an earlier put of the chunk could have left it: its name, its size and its checksums are right.
    let number = store.core.catalogue.lock().entries[&key(1)].number;
    store.core.backend.drop_files(number, number).unwrap();
    let file = store.core.incoming(number);
    write_payload_file(&file, |put_row| {
        for (index, layer) in (0..).zip(layers(1)) {
            let keys: Vec<u8> = layer.keys.iter().map(|byte| byte ^ u8::from(index == 1)).collect();
            let header = records::layer_header(&key(1), &SHAPE, tokens(1), index);
            put_row(&payload_key(number, index), &format::encode(&header, &[&keys, &layer.values])).unwrap();
        }
        Ok(())
    })
    .unwrap();
    store.core.take_over(&file, number, number).unwrap();
    let report = store.verify().unwrap();
    assert_eq!(report.damaged.iter().map(|d| (d.key, d.layer)).collect::<Vec<_>>(), [(key(1), Some(1))]);
    assert_eq!([look(&store, 0), look(&store, 1), look(&store, 2)], [Seen::Whole, Seen::Corrupt, Seen::Whole]);
}

#[test]
fn a_flipped_row_costs_one_chunk() {
    use crate::backend::{Family, Sync};
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put_group(&store, 0..3);
    let row_key = key(1).to_bytes().to_vec();
    let mut bytes = store.core.backend.get(Family::Chunks, &row_key).unwrap().unwrap();
    bytes[110] ^= 4;
    store.core.backend.write("a test", &[(Family::Chunks, row_key, Some(bytes))], Sync::Now).unwrap();
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

#[test]
fn a_cut_payload_file_costs_its_chunks_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    put_group(&store, 0..3);
    let before: std::collections::BTreeSet<_> = data_files(directory.path()).into_iter().collect();
    put_group(&store, 3..6);
    let after: std::collections::BTreeSet<_> = data_files(directory.path()).into_iter().collect();
    drop(store);
    let file = after.difference(&before).find(|file| file.extension().is_some_and(|end| end == "sst")).unwrap();
    let length = fs::metadata(file).unwrap().len();
    fs::OpenOptions::new().write(true).open(file).unwrap().set_len(length / 2).unwrap();
    let store = open(directory.path()).unwrap();
    assert_eq!(store.open_report().lost, 3);
    (0..6).for_each(|n| assert_eq!(look(&store, n), if n < 3 { Seen::Whole } else { Seen::Absent }));
    drop(store);
    // The file is forgotten: the next opening finds nothing to complain of.
    let store = open(directory.path()).unwrap();
    assert_eq!((store.open_report().lost, &store.open_report().salvaged), (0, &None));
}
