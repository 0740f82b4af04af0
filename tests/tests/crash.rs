//! A short form of the crash drill; `quire-bench crash` is the long one.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use support::{bench, succeed};

#[test]
fn nothing_acknowledged_is_lost_and_nothing_partial_visible_after_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let printed = succeed(bench(&data).args([
        "crash",
        "--kills",
        "6",
        "--documents",
        "4",
        "--seed",
        "11",
        "--no-records",
        "--json",
    ]));
    let report: Value = serde_json::from_str(printed.lines().last().unwrap()).unwrap();
    assert_eq!(report["kills"], 6, "{report}");
    assert_eq!(report["lost_or_wrong"], 0, "{report}");
    assert!(report["chunks"].as_u64().unwrap() >= 20, "{report}");
    // The drill leaves nothing behind in the user's folder.
    assert_eq!(std::fs::read_dir(&data).unwrap().count(), 0);
}
