//! Quality beside full recompute, from published questions to records, on the reference model.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use support::{bench, fail, succeed};

/// Twelve passages in SQuAD's format, each about a person of its own, with a question each.
fn published(path: &Path) {
    let names =
        ["Ada", "Bruno", "Clara", "David", "Elena", "Fritz", "Greta", "Hugo", "Irma", "Jonas", "Karin", "Ludwig"];
    let towns = [
        "Brouthal", "Dremoth", "Gaveil", "Hosterl", "Kranouth", "Lemaith", "Morvens", "Prunor", "Sitharl", "Travoul",
        "Vekaim", "Zornal",
    ];
    let paragraphs: Vec<Value> = names
        .iter()
        .zip(towns)
        .map(|(name, town)| {
            let context = format!(
                "The harbour was quiet that year, and few ships came in. {name} Keller moved to {town} last spring. \
                 The old lighthouse was painted white again. Nobody remembered who had asked for it."
            );
            let question = format!("Where did {name} Keller move last spring?");
            json!({"context": context, "qas": [{"question": question, "answers": [{"text": town}]}]})
        })
        .collect();
    std::fs::write(path, json!({"data": [{"title": "t", "paragraphs": paragraphs}]}).to_string()).unwrap();
}

#[test]
fn configurations_are_compared_with_full_recompute_and_an_interrupted_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let data = path("data");
    let command = |words: &[&str]| -> Command {
        let mut command = bench(&data);
        command.args(["--device", "cpu"]).args(words);
        command
    };
    published(&path("squad.json"));
    let made = |from: &str| {
        let mut command = command(&["questions", "xquad10", "--questions", from, "--from"]);
        command.arg(path("squad.json")).arg("--out").arg(path("questions.jsonl"));
        command
    };
    succeed(&mut made("0..12"));
    // The reference model takes no instructions: it knows the wording of its questions.
    let instruction = " Answer with a short phrase from the passages.";
    let questions = std::fs::read_to_string(path("questions.jsonl")).unwrap();
    assert_eq!(questions.matches(instruction).count(), 12);
    fail(&mut made("0..13"), 2, &["0..13", "at most 12"]);
    fail(&mut made("twelve"), 2, &["590..1190"]);
    std::fs::write(path("questions.jsonl"), questions.replace(instruction, "")).unwrap();

    let eval = |limit: &str, configs: &str| {
        let mut command =
            command(&["eval", "--case", "ref/xquad10", "--commit", "abc", "--limit", limit, "--configs", configs]);
        command.arg("--data").arg(path("questions.jsonl")).arg("--answers").arg(path("answers.jsonl"));
        command.arg("--results").arg(path("results"));
        command
    };
    let configs = "answer-100,full,reuse,answer-15";
    let answers = || std::fs::read_to_string(path("answers.jsonl")).unwrap();
    succeed(&mut eval("1", configs));
    let first = answers();
    assert_eq!(first.lines().count(), 1 + 4, "settings, and an answer a configuration");
    // As if it had been killed while it wrote the last answer.
    std::fs::write(path("answers.jsonl"), &first[..first.len() - 20]).unwrap();
    let table = succeed(&mut eval("3", configs));
    let all = answers();
    assert!(all.starts_with(&first[..first.rfind("{\"key\"").unwrap()]), "what was there stays");
    assert_eq!(all.lines().count(), 1 + 3 * 4);
    assert!(table.contains("| all | answer-15 | 3 |"), "{table}");
    succeed(&mut eval("3", configs));
    assert_eq!(answers(), all, "nothing is asked again");
    fail(eval("3", configs).args(["--k", "7"]), 1, &["answers.jsonl", "another run"]);

    let records = std::fs::read_to_string(path("results/quality.jsonl")).unwrap();
    let value = |config: &str, metric: &str| -> f64 {
        let case = format!("ref/xquad10/{config}");
        let mut lines = records.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let last = lines.rfind(|r| r["case"] == case.as_str() && r["metric"] == metric);
        last.unwrap_or_else(|| panic!("no {metric} of {case} in:\n{records}"))["value"].as_f64().unwrap()
    };
    // All tokens recomputed is full recompute.
    assert_eq!((value("answer-100", "f1_loss"), value("answer-100", "same_share")), (0.0, 1.0));
    assert!(value("answer-100", "kl_mean") < 1e-4 && value("answer-100", "charged_share") >= 1.0);
    assert!(value("reuse", "kl_mean") > value("answer-100", "kl_mean"));
    assert_eq!(value("reuse", "charged_share"), 0.0);
    assert!((0.1..0.5).contains(&value("answer-15", "charged_share")));
    assert!(value("reuse", "f1_loss_lower95") <= value("reuse", "f1_loss_upper95"));
    for config in ["reuse", "answer-15", "answer-100"] {
        let loss = value("full", "f1") - value(config, "f1");
        assert!((value(config, "f1_loss") - loss).abs() < 1e-4, "{config}");
    }

    fail(&mut eval("1", "reuse,answer-15"), 2, &["ref/xquad10", "`full`"]);
    fail(&mut eval("1", "full,swift-15"), 2, &["swift-15", "MODE-PERCENT"]);
}
