//! The whole bench, small and without peers: what it writes, not how fast it is.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use ann_index::build;

use super::*;
use crate::record::RecordLog;

fn small(dir: &Path) -> IndexBenchOptions {
    IndexBenchOptions {
        keys: 4096,
        samples: 1024,
        queries: 64,
        k: 10,
        repeats: 1,
        peers: false,
        scratch: dir.into(),
        figures: Some(dir.join("figures")),
        output: Output { results_dir: Some(dir.join("results")), ..Output::default() },
        ..IndexBenchOptions::default()
    }
}

#[test]
fn every_index_is_measured_recorded_and_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let options = small(dir.path());
    let report = bench_index(None, &options, &mut |_| {}).unwrap();
    assert_eq!(RecordLog::new(dir.path().join("results")).read_all().unwrap(), report.records);
    let metrics = |case: &str| -> BTreeSet<&str> {
        report.records.iter().filter(|r| r.bench == "index" && r.case == case).map(|r| r.metric.as_str()).collect()
    };
    for data in ["ood", "in"] {
        for kind in ["flat", "graph", "clusters", "hnsw"] {
            let found = metrics(&format!("{data}/4k/{kind}"));
            for metric in [
                "recall_at_10",
                "keys_touched_share",
                "latency_us",
                "latency_batched_us",
                "keys_touched_batched_share",
                "memory",
            ] {
                assert!(found.contains(metric), "{data} {kind}: {found:?}");
            }
        }
        let graph = metrics(&format!("{data}/4k/graph"));
        assert!(graph.contains("link_bytes_share") && graph.contains("knn_seconds"), "{graph:?}");
        assert!(graph.contains("recall_loss_after_growth") && !graph.contains("speedup_over_best_peer"), "{graph:?}");
        assert!(metrics(&format!("{data}/4k/flat")).contains("bandwidth_share"));
        let svg = fs::read_to_string(dir.path().join(format!("figures/index-{data}-4k.svg"))).unwrap();
        assert!(svg.contains(">graph</text>") && svg.contains(">clusters</text>"), "{svg}");
    }
    let value = |case: &str, metric: &str| {
        report.records.iter().find(|r| r.case == case && r.metric == metric).map(|r| r.value).unwrap()
    };
    assert_eq!((value("ood/4k/flat", "recall_at_10"), value("ood/4k/flat", "keys_touched_share")), (1.0, 1.0));
    assert!(value("ood/4k/graph", "recall_at_10") > 0.9);
    assert!(value("ood/4k/graph", "keys_touched_share") < value("ood/4k/clusters", "keys_touched_share"));
    // The scan reads each key once for a group of four, the others as often as they do for one query, or less.
    assert_eq!(value("ood/4k/flat", "keys_touched_batched_share"), 0.25);
    for kind in ["graph", "clusters"] {
        let [alone, shared] =
            ["keys_touched_share", "keys_touched_batched_share"].map(|metric| value(&format!("ood/4k/{kind}"), metric));
        assert!(shared < alone, "{kind}: {alone} alone, {shared} in groups");
    }
    // Nothing is left of what the peers would have read.
    assert!(fs::read_dir(dir.path()).unwrap().all(|e| !e.unwrap().file_name().to_string_lossy().starts_with("quire-")));
}

/// The published character at a size that a test can afford: a scan of k-means lists, best lists first, must read far
/// more keys than the graph for the same recall when queries are not distributed like keys.
#[test]
fn lists_of_near_keys_are_no_help_out_of_distribution() {
    let sizes = Sizes { keys: 4096, growth: 0, samples: 2048, queries: 64 };
    let character = Character::new(2);
    let params = |kind| IndexParams { kind, ..IndexParams::default() };
    let needed = |data: &Dataset, kind| {
        let index = build(DIM, &data.keys, &data.samples, &params(kind)).unwrap();
        let judge = data::Judge::new(DIM, &data.keys, &data.test, 20).unwrap();
        let mut side = side::Ours { index, built: side::Built { seconds: 0.0, bytes: 0.0, settings: String::new() } };
        let queries = side::Queries { judge, file: PathBuf::new() };
        let curve = sweep::sweep(&mut side, &queries, 0.0).unwrap();
        sweep::touched_at_target(&curve).unwrap() / data.len() as f64
    };
    let data = character.out_of_distribution(&sizes);
    let (graph, lists) = (needed(&data, IndexKind::Graph), needed(&data, IndexKind::Clusters));
    assert!(graph * 2.0 < lists && lists > 0.3, "graph {graph}, clusters {lists}");
}

#[test]
fn senseless_options_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for options in [
        IndexBenchOptions { repeats: 0, ..small(dir.path()) },
        IndexBenchOptions { keys: 5, ..small(dir.path()) },
        IndexBenchOptions { data: vec![], ..small(dir.path()) },
        IndexBenchOptions { kinds: vec![IndexKind::Flat, IndexKind::Flat], ..small(dir.path()) },
        IndexBenchOptions { data: vec![IndexData::InDistribution; 2], ..small(dir.path()) },
        IndexBenchOptions { keys: 1 << 60, ..small(dir.path()) },
        IndexBenchOptions { data: vec![IndexData::Model], ..small(dir.path()) },
        IndexBenchOptions { peers: true, python: "no-such-python".into(), kinds: vec![], ..small(dir.path()) },
    ] {
        assert!(bench_index(None, &options, &mut |_| {}).is_err());
    }
    // Before anything is read: that takes minutes.
    let heads = HeadOptions { lengths: vec![100, 9000, 200], ..HeadOptions::default() };
    let options = IndexBenchOptions { data: vec![IndexData::Model], heads, ..small(dir.path()) };
    assert_eq!(
        options.check(Some(8192)).unwrap_err().to_string(),
        "the longest text is 9000 tokens, expected at most the model's 8192"
    );
}
