//! Space of removed chunks: files that go whole, files that are rewritten, and traces.

use super::*;

/// Wide chunks, so that what is in a file is nearly all payload.
const WIDE: KvShape = KvShape { layers: 2, kv_heads: 8, head_dim: 64, dtype: KvDtype::F32 };

fn wide(n: u32) -> NewChunk {
    let side = WIDE.bytes_per_side(16).unwrap() as usize;
    let fill = |what: u8| {
        let mut bytes = vec![0; side];
        blake3::Hasher::new().update(&n.to_le_bytes()).update(&[what]).finalize_xof().fill(&mut bytes);
        bytes::Bytes::from(bytes)
    };
    let layer = |l: u8| LayerKv { keys: fill(2 * l), values: fill(2 * l + 1) };
    NewChunk::new(key(n), 16, vec![layer(0), layer(1)])
}

fn filled(directory: &Path, chunks: u32) -> ChunkStore {
    let store = open(directory).unwrap();
    let model = store.register(&toy(WIDE)).unwrap();
    let tickets: Vec<_> = (0..chunks).map(|n| store.put_behind(model, wide(n)).unwrap()).collect();
    for ticket in tickets {
        ticket.wait().unwrap();
    }
    store
}

fn is_whole(store: &ChunkStore, n: u32) -> bool {
    (0..).zip(wide(n).layers).all(|(index, wanted)| store.layer(&key(n), index).unwrap() == Some(wanted))
}

/// Bytes of payload files in the directory.
fn payload_on_disk(directory: &Path) -> u64 {
    let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    let tables = files.filter(|file| file.path().extension().is_some_and(|end| end == "sst"));
    tables.map(|file| file.metadata().unwrap().len()).sum()
}

#[test]
fn a_random_half_that_is_removed_frees_its_bytes_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let store = filled(directory.path(), 200);
    let before = payload_on_disk(directory.path());
    let mut dice = Dice(8);
    let (gone, kept): (Vec<u32>, Vec<u32>) = (0..200).partition(|_| dice.below(2) == 0);
    let keys: Vec<_> = gone.iter().map(|n| key(*n)).collect();
    assert_eq!(store.remove_all(&keys).unwrap(), gone.len() as u64);
    store.compact().unwrap();
    let freed = before - payload_on_disk(directory.path());
    let removed = gone.len() as u64 * WIDE.payload_bytes(16).unwrap();
    assert!(freed * 10 >= removed * 9, "{freed} of {removed} bytes are free");
    drop(store);
    let store = open(directory.path()).unwrap();
    assert!(kept.iter().all(|n| is_whole(&store, *n)) && !gone.iter().any(|n| store.contains(&key(*n))));
    assert_eq!(store.verify().unwrap().chunks, kept.len() as u64);
}

#[test]
fn what_is_removed_and_reclaimed_leaves_no_byte_behind() {
    let directory = tempfile::tempdir().unwrap();
    let store = filled(directory.path(), 30);
    let marks: Vec<Vec<u8>> = [4, 17].map(|n| wide(n).layers[1].values[100..164].to_vec()).into();
    let names: Vec<Vec<u8>> = [4, 17].map(|n| key(n).to_bytes().to_vec()).into();
    let contains = |what: &[u8]| {
        let files = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.is_file()).any(|path| {
            let bytes = fs::read(&path).unwrap();
            bytes.windows(what.len()).any(|window| window == what)
        })
    };
    assert!(marks.iter().chain(&names).all(|what| contains(what)));
    store.remove_all(&[key(4), key(17)]).unwrap();
    store.reclaim().unwrap();
    assert!(!marks.iter().chain(&names).any(|what| contains(what)));
    assert!((0..30).all(|n| is_whole(&store, n) != [4, 17].contains(&n)));
}

#[test]
fn many_small_files_are_gathered() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path()).unwrap();
    for n in 0..80 {
        put(&store, n).unwrap();
    }
    // Asking for anything waits until the writer is done with what it did before.
    store.remove(&key(200)).unwrap();
    let files = store.core.catalogue.lock().segments.len();
    assert!(files < 64, "{files} files");
    (0..80).for_each(|n| assert_eq!(look(&store, n), Seen::Whole));
}

#[test]
fn a_reader_of_a_chunk_that_is_moved_and_removed_sees_it_whole_or_not_at_all() {
    let directory = tempfile::tempdir().unwrap();
    let store = filled(directory.path(), 60);
    let held = store.layer(&key(50), 1).unwrap().unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut dice = Dice(5);
            for _ in 0..2000 {
                let n = dice.below(60) as u32;
                if let Some(found) = store.layer(&key(n), 1).unwrap() {
                    assert!(found == wide(n).layers[1]);
                }
            }
        });
        for n in (0..60).step_by(3) {
            store.remove(&key(n)).unwrap();
            store.compact().unwrap();
        }
        reader.join().unwrap();
    });
    assert_eq!(held, wide(50).layers[1]);
    assert!(store.verify().unwrap().is_clean());
}
