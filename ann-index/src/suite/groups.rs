//! Searches of a group of query heads at once.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::error::IndexError;

/// What a group read, beside what its queries read alone.
fn check_sharing(subject: Subject, index: &dyn KeyIndex, count: usize, shared: SearchStats, alone: SearchStats) {
    if matches!(subject.kind, IndexKind::Hnsw | IndexKind::Ivf) || count < 2 {
        return assert_eq!(shared, alone);
    }
    // A key is counted once, and these queries are alike enough to meet.
    assert!(shared.keys_touched <= index.len(), "{shared:?}");
    assert!(shared.keys_touched < alone.keys_touched && shared.bytes < alone.bytes, "{shared:?}, {alone:?}");
    assert!(shared.keys_touched * count >= alone.keys_touched && shared.bytes * count >= alone.bytes, "{shared:?}");
}

#[test]
fn equal_queries_of_a_group_are_read_for_once() {
    each(|subject| {
        let mut data = HeadLike::new(32, 17);
        let index = subject.build(32, &data.keys(1500));
        let query = data.query();
        let together = index.search_group(&query.repeat(3), &wish(20, 100), None).unwrap();
        let alone = index.search(&query, &wish(20, 100), None).unwrap();
        assert_eq!(together[0], alone);
        let again =
            if matches!(subject.kind, IndexKind::Hnsw | IndexKind::Ivf) { alone.stats } else { Default::default() };
        // Each head walks its own graph.
        for found in together[1..].iter().filter(|_| subject.query_heads == 1) {
            assert_eq!((&found.hits, found.stats), (&alone.hits, again));
        }
    });
}

#[test]
fn a_group_finds_what_its_queries_find_alone() {
    each(|subject| {
        let mut data = HeadLike::new(40, 14);
        let index = subject.build(40, &data.keys(1500));
        index.append(&data.keys(37)).unwrap();
        let hidden: Bitmap = (0..1500).step_by(7).collect();
        for (count, exclude) in [(0, None), (1, None), (3, Some(&hidden)), (4, None), (7, None), (8, Some(&hidden))] {
            let queries: Vec<f32> = (0..count).flat_map(|_| data.query()).collect();
            let together = index.search_group(&queries, &wish(20, 100), exclude).unwrap();
            assert_eq!(together.len(), count);
            let (mut shared, mut alone) = (SearchStats::default(), SearchStats::default());
            for (i, (query, found)) in queries.chunks(40).zip(&together).enumerate() {
                let wish = SearchParams { query_head: i % subject.query_heads, ..wish(20, 100) };
                let single = index.search(query, &wish, exclude).unwrap();
                assert_eq!(found.hits, single.hits);
                shared += found.stats;
                alone += single.stats;
            }
            check_sharing(subject, &*index, count, shared, alone);
        }
        assert!(index.search_group(&[0.0; 41], &wish(1, 1), None).is_err());
        assert!(index.search_group(&[f32::NAN; 40], &wish(1, 1), None).is_err());
    });
}

#[test]
fn only_clusters_have_zones() {
    each(|subject| {
        let mut data = HeadLike::new(24, 16);
        let index = subject.build(24, &data.keys(1500));
        index.append(&data.keys(30)).unwrap();
        let query = data.query();
        let all = index.search_zones(&query, usize::MAX, 5, None);
        if subject.kind != IndexKind::Clusters {
            let error = all.unwrap_err();
            return assert!(matches!(error, IndexError::Unsupported { .. }) && error.to_string().contains("clusters"));
        }
        let all = all.unwrap();
        assert_eq!((all.hits.len(), all.estimated.len()), (1530, 0));
        let some = index.search_zones(&query, 10, 20, None).unwrap();
        let rest = index.search_zones(&query, 10, usize::MAX, None).unwrap();
        assert_eq!(some.hits, rest.hits);
        assert_eq!(some.estimated[..], rest.estimated[..20]);
        let estimated: usize = rest.estimated.iter().map(|zone| zone.size).sum();
        assert_eq!(rest.hits.len() + estimated, 1530);
        // Means times sizes are what the keys that were not read add up to.
        let mut sums = [0.0f64; 24];
        let mut key = [0.0; 24];
        let read: BTreeSet<u32> = rest.hits.iter().map(|hit| hit.id).collect();
        for id in (0..1530).filter(|id| !read.contains(id)) {
            index.key(id, &mut key).unwrap();
            sums.iter_mut().zip(key).for_each(|(sum, x)| *sum += f64::from(x));
        }
        for (i, sum) in sums.iter().enumerate() {
            let zones: f64 = rest.estimated.iter().map(|z| f64::from(z.centroid[i]) * z.size as f64).sum();
            assert!((zones - sum).abs() < 1e-4 * 1500.0 * 10.0, "{zones} {sum}");
        }
    });
}
