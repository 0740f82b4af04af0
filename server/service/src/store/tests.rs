#![allow(clippy::unwrap_used)]

use std::collections::HashMap;

use engine::{DeviceChoice, EngineConfig, KvDtype};

use super::*;

fn engine(kv: KvDtype) -> Engine {
    let model_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../eval/models/reference");
    let config = EngineConfig { model_dir, device: DeviceChoice::Cpu, threads: 1, ..EngineConfig::default() };
    Engine::load(EngineConfig { kv_dtype: Some(kv), kv_budget_bytes: 64 << 20, ..config }).unwrap()
}

#[test]
fn every_input_changes_a_chunks_key_and_nothing_else_does() {
    let mut keys: HashMap<ChunkKey, String> = HashMap::new();
    for kv in [KvDtype::F32, KvDtype::Bf16] {
        let engine = engine(kv);
        for salt in ["", "a", "b"] {
            let open = || {
                let dir = tempfile::tempdir().unwrap();
                let store = KvStore::open(&engine, dir.path(), "reference", 1 << 20, salt).unwrap();
                (dir, store)
            };
            let ((_dir, store), (_other_dir, other)) = (open(), open());
            // The last of each: the same tokens, cut elsewhere between prefix and chunk.
            for prefix in [&[][..], &[1], &[2], &[1, 5]] {
                for tokens in [&[5, 6, 7][..], &[5, 7, 6], &[5, 6], &[6, 7]] {
                    let about = format!("{kv:?}, salt `{salt}`, {tokens:?} behind {prefix:?}");
                    let key = store.key(prefix, tokens);
                    assert_eq!(key, other.key(prefix, tokens), "in another folder: {about}");
                    if let Some(same) = keys.insert(key, about.clone()) {
                        panic!("{about} has the key of {same}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_chunk_that_a_prompt_uses_is_not_pushed_out() {
    let engine = engine(KvDtype::Bf16);
    let tokens = |first: u32| -> Vec<u32> { (first..first + 40).collect() };
    let bytes = store_shape(engine.kv_shape()).unwrap().payload_bytes(40).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // Room for one chunk and a half.
    let store = KvStore::open(&engine, dir.path(), "reference", bytes * 3 / 2, "").unwrap();
    let (used, origin) = store.source(&[1], &tokens(10)).unwrap();
    assert_eq!((origin, used.tokens()), (Origin::Computed, 40));
    let first = used.layer(0).unwrap();
    // Another one finds no place: it is used from memory, with the same numbers as if it were stored.
    let (other, origin) = store.source(&[1], &tokens(60)).unwrap();
    assert_eq!(origin, Origin::Computed);
    assert!(store.ensure(&[1], &tokens(60)).is_err());
    let from_memory = other.layer(1).unwrap();
    assert_eq!(used.layer(0).unwrap(), first);
    drop((used, other));
    let (key, origin) = store.ensure(&[1], &tokens(60)).unwrap();
    assert_eq!(origin, Origin::Computed);
    let chunks = store.chunks().unwrap();
    assert!(chunks.contains(&key) && !chunks.contains(&store.key(&[1], &tokens(10))));
    let (stored, origin) = store.source(&[1], &tokens(60)).unwrap();
    assert_eq!(origin, Origin::Cached);
    assert_eq!(stored.layer(1).unwrap(), from_memory);
}

#[test]
fn a_store_that_could_not_be_written_at_first_is_opened_once_it_can_be() {
    let engine = engine(KvDtype::Bf16);
    let tokens: Vec<u32> = (10..50).collect();
    let dir = tempfile::tempdir().unwrap();
    // Something stands where a chunk store would be made, as a disk without room would.
    std::fs::write(store_dir(dir.path()), "in the way").unwrap();
    let store = KvStore::open_if_possible(&engine, dir.path(), "reference", 1 << 30, "").unwrap();
    assert!(store.chunks().is_none() && !store.mend());
    let (_, origin) = store.source(&[1], &tokens).unwrap();
    assert_eq!(origin, Origin::Computed);
    store.set_budget(1 << 29).unwrap();
    std::fs::remove_file(store_dir(dir.path())).unwrap();
    assert!(store.mend() && store.mend());
    let (key, origin) = store.ensure(&[1], &tokens).unwrap();
    assert_eq!(origin, Origin::Computed);
    let chunks = store.chunks().unwrap();
    assert!(chunks.contains(&key) && chunks.budget() == 1 << 29);
}

#[test]
fn a_chunk_that_is_written_behind_is_on_disk_once_it_was_waited_for() {
    let engine = engine(KvDtype::Bf16);
    let dir = tempfile::tempdir().unwrap();
    let store = KvStore::open(&engine, dir.path(), "reference", 1 << 30, "").unwrap();
    let texts: Vec<Vec<u32>> = (0..3).map(|first| (10 + first..50 + first).collect()).collect();
    let ensured: Vec<Ensured> = texts.iter().map(|tokens| store.ensure_behind(&[1], tokens).unwrap()).collect();
    for ensured in &ensured {
        ensured.wait().unwrap();
        assert!(ensured.is_settled() && store.chunks().unwrap().contains(&ensured.key));
    }
    let again = store.ensure_behind(&[1], &texts[0]).unwrap();
    assert!(again.origin == Origin::Cached && again.key == ensured[0].key && again.is_settled());
}
