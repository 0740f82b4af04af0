//! Every index finds the best keys, hides what it is told to hide, and says what it read.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::open;
use rand::seq::SliceRandom;

#[test]
fn finds_the_best_keys() {
    each(|subject| {
        let mut data = HeadLike::new(64, 1);
        let index = subject.build(64, &data.keys(2500));
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
    });
}

#[test]
fn a_graph_reads_fewer_keys_than_a_scan() {
    each(|subject| {
        let mut data = HeadLike::new(32, 2);
        let index = subject.build(32, &data.keys(4000));
        let params = wish(10, 64);
        let stats = index.search(&data.query(), &params, None).unwrap().stats;
        match subject.kind {
            IndexKind::Flat => assert_eq!((stats.keys_touched, stats.nodes_visited), (4000, 0)),
            _ => {
                assert!(stats.keys_touched < 2500, "{stats:?}");
                assert!(stats.nodes_visited >= 1, "{stats:?}");
            }
        }
    });
}

#[test]
fn candidates_for_all_keys_find_all() {
    each(|subject| {
        let mut data = HeadLike::new(20, 3);
        let index = subject.build(20, &data.keys(700));
        for (k, ef) in [(20, 700), (20, 5000), (700, 1), (5000, 5000)] {
            assert_eq!(recall(&*index, &mut data, k, ef, &Bitmap::new()), 1.0);
        }
        // Almost as many candidates as keys: a graph is still walked, and must reach them all.
        let got = recall(&*index, &mut data, 20, 690, &Bitmap::new());
        assert!(got >= 0.999, "{}: {got}", subject.name);
    });
}

#[test]
fn stored_keys_come_back_rounded() {
    each(|subject| {
        let keys = HeadLike::new(5, 4).keys(300);
        let index = subject.build(5, &keys[..500]);
        index.append(&keys[500..]).unwrap();
        let mut key = [0.0; 5];
        for (id, expected) in keys.chunks(5).enumerate() {
            index.key(id as u32, &mut key).unwrap();
            assert_eq!(key[..], subject.round(expected));
        }
        assert!(index.memory_bytes() > keys.len());
    });
}

#[test]
fn hidden_keys_stay_hidden() {
    each(|subject| {
        let mut data = HeadLike::new(32, 8);
        let index = subject.build(32, &data.keys(1500));
        let mut order: Vec<u32> = (0..1500).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(9));
        for count in [1, 200, 750, 1200, 1450, 1499, 1500] {
            let mut hidden: Bitmap = order[..count].iter().copied().collect();
            // Ids that no key has do not matter.
            hidden.extend([1500, 9000]);
            assert_recall(subject, &*index, &mut data, &hidden);
        }
        let query = data.query();
        let best = truth(&*index, &query, &Bitmap::new());
        let hidden: Bitmap = best[..600].iter().map(|&(_, id)| id).collect();
        assert!(check(&*index, &query, 20, 200, &hidden) >= subject.recall_floor());
    });
}

#[test]
fn a_saved_index_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    each(|subject| {
        let mut data = HeadLike::new(24, 15);
        for count in [0, 1, 300, 1800] {
            let keys = [data.keys(count), data.keys(count.min(1))].concat();
            let index = subject.build(24, &keys);
            index.append(&keys[..24 * count.min(9)]).unwrap();
            let path = folder.path().join("index");
            index.save(&path).unwrap();
            let opened = open(&path).unwrap();
            assert_eq!((opened.kind(), opened.dim(), opened.len()), (subject.kind, 24, index.len()));
            let (mut a, mut b) = ([0.0; 24], [1.0; 24]);
            for id in 0..index.len() as u32 {
                index.key(id, &mut a).unwrap();
                opened.key(id, &mut b).unwrap();
                assert_eq!(a, b);
            }
            // `hnsw` is built again, and may differ where it is not exact.
            if subject.kind != IndexKind::Hnsw {
                for query in (0..20).map(|_| data.query()) {
                    let one = |index: &dyn KeyIndex| index.search(&query, &wish(20, 60), None).unwrap();
                    assert_eq!(one(&*index), one(&*opened));
                }
            }
            opened.append(&data.keys(400)).unwrap();
            assert_eq!(opened.len(), index.len() + 400);
            assert_recall(subject, &*opened, &mut data, &Bitmap::new());
            opened.save(&path).unwrap();
            assert_eq!(open(&path).unwrap().len(), opened.len());
        }
    });
}
