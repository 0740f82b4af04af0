//! The smallest, the equal and the wrong.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::error::IndexError;

#[test]
fn one_key() {
    each(|subject| {
        let index = subject.build(3, &[1.0, -2.0, 4.0]);
        for k in [1, 2, 100] {
            let hits = search(&*index, &[1.0, 1.0, 0.5], k, 10);
            assert_eq!((hits.len(), hits[0].id), (1, 0));
            assert!((hits[0].score - 1.0).abs() < 0.02);
        }
        let hidden: Bitmap = [0].into_iter().collect();
        let params = wish(4, 4);
        let found = index.search(&[1.0; 3], &params, Some(&hidden)).unwrap();
        assert_eq!(found.hits, []);
    });
}

#[test]
fn dimension_one() {
    each(|subject| {
        let keys: Vec<f32> = (0..600).map(|i| ((i * 7) % 600) as f32 / 8.0).collect();
        // A scale per row of one number stores it as it is.
        let index = subject.build(1, &keys);
        for query in [[2.0], [-2.0], [0.0]] {
            let got = check(&*index, &query, 5, 40, &Bitmap::new());
            assert!(got >= subject.recall_floor(), "{}: {got}", subject.name);
        }
    });
}

#[test]
fn no_hits_asked_for() {
    each(|subject| {
        let index = subject.build(2, &[1.0; 40]);
        let params = wish(0, 0);
        let found = index.search(&[1.0, 2.0], &params, None).unwrap();
        assert_eq!(found, Default::default());
    });
}

#[test]
fn equal_keys_are_all_found_and_do_not_hide_others() {
    each(|subject| {
        let mut data = HeadLike::new(16, 10);
        let mut keys = Vec::new();
        let (some, many) = (data.keys(800), data.keys(1));
        for key in some.chunks(16) {
            keys.extend_from_slice(key);
            keys.extend_from_slice(&many);
        }
        let index = subject.build(16, &keys);
        index.append(&many).unwrap();
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
        // The query for which the repeated key is the best by far: the lowest ids win.
        let size: f32 = many.iter().map(|x| x * x).sum();
        let mean: Vec<f32> = many.iter().map(|x| x * 100.0 / size).collect();
        let long = subject.build(16, &keys.iter().map(|x| x / 50.0).collect::<Vec<_>>());
        long.append(&many).unwrap();
        long.append(&many).unwrap();
        let ids: Vec<u32> = search(&*long, &mean, 2, 10).iter().map(|h| h.id).collect();
        assert_eq!(ids, [1600, 1601]);
        let hidden: Bitmap = [1600].into_iter().collect();
        let params = wish(1, 10);
        let found = long.search(&mean, &params, Some(&hidden)).unwrap();
        assert_eq!(found.hits[0].id, 1601, "a twin of a hidden key is found");
    });
}

#[test]
fn zero_keys_and_zero_queries() {
    each(|subject| {
        let mut keys = vec![0.0; 8 * 700];
        for (i, x) in keys.iter_mut().enumerate().filter(|(i, _)| i % 3 == 0) {
            *x = if i % 2 == 0 { -0.0 } else { 0.0 };
        }
        let index = subject.build(8, &keys);
        let query = [1.0, -1.0, 3.0, 0.0, 2.0, 1.0, 1.0, -5.0];
        for query in [query, [0.0; 8]] {
            let hits = search(&*index, &query, 30, 40);
            let expected: Vec<Hit> = (0..30).map(|id| Hit { id, score: 0.0 }).collect();
            assert_eq!(hits, expected);
        }
        let mut data = HeadLike::new(8, 11);
        index.append(&data.keys(700)).unwrap();
        assert_recall(subject, &*index, &mut data, &Bitmap::new());
        assert_eq!(search(&*index, &[0.0; 8], 900, 1000).len(), 900);
    });
}

#[test]
fn what_cannot_be_ordered_is_refused_whole() {
    each(|subject| {
        let index = subject.build(2, &[1.0, 2.0]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let error = index.append(&[5.0, 6.0, 7.0, bad]).unwrap_err();
            let place = matches!(error, IndexError::NotFinite { row: 1, column: 1, .. });
            assert!(place, "{error}");
            let params = wish(1, 1);
            assert!(index.search(&[bad, 0.0], &params, None).is_err());
        }
        let error = index.append(&[0.0, 0.0, 3e38, 0.0]).unwrap_err();
        assert!(matches!(error, IndexError::TooLong { row: 1, .. }), "{error}");
        assert_eq!(index.len(), 1);
        assert_eq!(search(&*index, &[1.0, 0.0], 9, 9).len(), 1);
        if subject.precision == KeyPrecision::F16 {
            let error = index.append(&[0.0, 7e4]).unwrap_err();
            return assert!(matches!(error, IndexError::TooLarge { row: 0, column: 1, .. }), "{error}");
        }
        // The longest that is taken overflows nothing.
        let long = (1u64 << 61) as f32;
        index.append(&[long, 0.0, 0.0, -long]).unwrap();
        let hits = search(&*index, &[0.0, long], 3, 1);
        assert!((hits[2].score / (-long * long) - 1.0).abs() < 1e-6);
    });
}

#[test]
fn wrong_lengths_are_refused() {
    each(|subject| {
        let index = subject.build(3, &[1.0; 6]);
        let error = index.append(&[1.0; 4]).unwrap_err();
        assert!(matches!(error, IndexError::NotRows { dim: 3, found: 4, .. }));
        let params = wish(1, 1);
        for len in [0, 2, 4, 6] {
            let error = index.search(&vec![1.0; len], &params, None).unwrap_err();
            assert!(matches!(error, IndexError::DimensionMismatch { .. }));
            assert!(index.key(0, &mut vec![0.0; len]).is_err());
        }
        let error = index.key(2, &mut [0.0; 3]).unwrap_err();
        assert_eq!(error, IndexError::UnknownId { id: 2, len: 2 });
        assert_eq!(index.len(), 2);
    });
}
