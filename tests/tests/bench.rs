//! Benches of load, from the command line to records, on a model of random weights.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use support::{bench_binary, clean, fail, succeed};

/// `quire-bench` on the model of random weights in `dir`.
fn bench(dir: &Path, what: &str) -> Command {
    let mut command = Command::new(bench_binary());
    clean(&mut command, &dir.join("data"));
    command.args(["--device", "cpu", "--data-dir"]).arg(dir.join("data")).arg("--model").arg(dir.join("model"));
    command.args([what, "--label", "tiny", "--machine", "test", "--results"]).arg(dir.join("results"));
    command
}

/// The records of a file, as (case, metric, value).
fn records(dir: &Path, file: &str) -> Vec<(String, String, f64)> {
    let text = std::fs::read_to_string(dir.join("results").join(file)).unwrap();
    let record = |line: &str| {
        let record: Value = serde_json::from_str(line).unwrap();
        assert_eq!(record["machine"], "test", "{record}");
        let text = |key: &str| record[key].as_str().unwrap().to_owned();
        (text("case"), text("metric"), record["value"].as_f64().unwrap())
    };
    text.lines().map(record).collect()
}

#[test]
fn load_is_measured_on_a_model_that_was_written_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let (dir, data) = (dir.path(), dir.path().join("data"));
    let checkpoint = || {
        let mut command = support::bench(&data);
        command.args(["checkpoint", "--shape", "tiny"]).arg(dir.join("model"));
        command
    };
    succeed(&mut checkpoint());
    fail(&mut checkpoint(), 2, &["expected a folder without a model", "choose another"]);

    let batch = ["--batch", "1,3", "--lengths", "64", "--tokens", "8", "--repeats", "1", "--no-peer"];
    succeed(bench(dir, "decode").args(batch));
    let decode = records(dir, "decode.jsonl");
    for case in ["tiny/short/b1/full", "tiny/short/b3/full"] {
        let share = decode.iter().find(|r| r.0 == case && r.1 == "floor_share").unwrap().2;
        // Caches can be faster than what the floor is computed with, not by orders of magnitude.
        assert!(share > 0.0 && share < 10.0, "{case}: {share}");
    }

    let load = ["--sequences", "2", "--context", "32", "--alone", "10", "--arrivals", "2", "--arrival-tokens", "600"];
    succeed(bench(dir, "serve").args(load));
    let serve = records(dir, "serve.jsonl");
    assert!(serve.iter().any(|r| r.0 == "tiny/mixed" && r.1 == "itl_p99_ratio" && r.2 > 0.0), "{serve:?}");

    succeed(bench(dir, "start").args(["--repeats", "1"]));
    let start = records(dir, "start.jsonl");
    assert!(start.iter().any(|r| r.0 == "tiny/warm" && r.1 == "seconds" && r.2 > 0.0), "{start:?}");
    // Nothing is left behind in the user's folder.
    assert_eq!(std::fs::read_dir(&data).map_or(0, Iterator::count), 0);
}
