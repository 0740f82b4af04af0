//! Keys that come later are found, whoever appends or searches meanwhile.

#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn appended_keys_are_found() {
    each(|subject| {
        let mut data = HeadLike::new(48, 5);
        let keys = data.keys(2400);
        let (first, rest) = keys.split_at(48 * 1000);
        let index = subject.build(48, first);
        for batch in rest.chunks(48 * 130) {
            index.append(batch).unwrap();
        }
        assert_eq!(index.len(), 2400);
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
        for (id, key) in keys.chunks(48).enumerate().skip(2395) {
            let best = search(&*index, key, 1, 100)[0];
            let own: f32 = key.iter().map(|x| x * x).sum();
            assert!(best.id as usize == id || best.score > 0.98 * own);
        }
    });
}

#[test]
fn an_index_that_starts_empty_grows_key_by_key() {
    each(|subject| {
        let mut data = HeadLike::new(16, 6);
        let index = subject.build(16, &[]);
        assert!(index.is_empty());
        assert_eq!(search(&*index, &data.query(), 5, 50), []);
        index.append(&[]).unwrap();
        for (n, key) in data.keys(700).chunks(16).enumerate() {
            index.append(key).unwrap();
            assert_eq!(index.len(), n + 1);
        }
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
    });
}

#[test]
fn keys_longer_than_all_before_are_found() {
    each(|subject| {
        let mut data = HeadLike::new(32, 7);
        let index = subject.build(32, &data.keys(1500));
        // Within the headroom, far beyond it, and back.
        for scale in [1.3, 50.0, 1.0, 3000.0] {
            let keys: Vec<f32> = data.keys(60).iter().map(|x| x * scale).collect();
            index.append(&keys).unwrap();
            assert_recall(subject, &*index, &mut data, &Bitmap::new());
        }
    });
}

#[test]
fn searches_run_while_keys_are_appended() {
    each(|subject| {
        let mut data = HeadLike::new(16, 12);
        let keys = data.keys(2000);
        let (first, rest) = keys.split_at(16 * 600);
        let index = subject.build(16, first);
        let queries: Vec<_> = (0..20).map(|_| data.query()).collect();
        let searcher = |queries: &[Vec<f32>]| {
            while index.len() < 2000 {
                for query in queries {
                    let before = index.len();
                    let hits = search(&*index, query, 10, 60);
                    assert_eq!(hits.len(), 10);
                    let mut key = [0.0; 16];
                    for hit in hits {
                        assert!((hit.id as usize) < index.len());
                        index.key(hit.id, &mut key).unwrap();
                        let id = hit.id as usize;
                        assert_eq!(key[..], subject.round(&keys[16 * id..16 * (id + 1)]));
                    }
                    assert!(index.len() >= before);
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| searcher(&queries[..10]));
            scope.spawn(|| searcher(&queries[10..]));
            for (i, batch) in rest.chunks(16 * 70).enumerate() {
                index.append(batch).unwrap();
                // What an append has brought is seen by the next search.
                let newest = 600 + 70 * (i + 1) - 1;
                let key = &keys[16 * newest..16 * (newest + 1)];
                let best = search(&*index, key, 2000, 2000);
                assert!(best.iter().any(|hit| hit.id as usize == newest));
            }
        });
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
    });
}

#[test]
fn appends_from_two_threads_both_arrive() {
    each(|subject| {
        let mut data = HeadLike::new(4, 13);
        let index = subject.build(4, &[]);
        let halves = [data.keys(400), data.keys(400)];
        std::thread::scope(|scope| {
            for half in &halves {
                let index = &index;
                scope.spawn(move || {
                    for key in half.chunks(8) {
                        index.append(key).unwrap();
                    }
                });
            }
        });
        assert_eq!(index.len(), 800);
        let first = |half: &[f32]| -> Vec<u32> { half.chunks(4).map(|key| subject.round(key)[0].to_bits()).collect() };
        let mut expected = [first(&halves[0]), first(&halves[1])].concat();
        let mut key = [0.0; 4];
        let mut stored: Vec<u32> = (0..800)
            .map(|id| {
                index.key(id, &mut key).unwrap();
                key[0].to_bits()
            })
            .collect();
        expected.sort_unstable();
        stored.sort_unstable();
        assert_eq!(stored, expected);
    });
}
