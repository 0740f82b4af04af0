//! The main job, as the demonstration runs it, and the commands that measure, each in a short form.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::Value;
use support::{bench, quire, root, succeed};

/// What blending with the default ratio is known to get wrong; examples/README.md says so.
const NEEDS_FULL_RECOMPUTE: [&str; 5] = ["Ostravane", "Maldenrow", "Theodora Wend", "Clara Winterholt", "Halvanger"];

fn json(text: &str) -> Value {
    serde_json::from_str(text.lines().last().unwrap()).unwrap()
}

fn passages_are_where_citations_say(answer: &Value) {
    for citation in answer["citations"].as_array().unwrap() {
        let text = std::fs::read_to_string(citation["document"].as_str().unwrap()).unwrap();
        let at = |end: &str| citation["span"][end].as_u64().unwrap() as usize;
        let passage: String = text.chars().skip(at("start")).take(at("end") - at("start")).collect();
        assert_eq!(citation["passage"], passage.as_str());
    }
}

#[test]
fn the_demonstration_answers_and_a_second_run_finds_everything_cached() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let first = json(&succeed(quire(&data).args(["demo", "--json"])));
    assert!(first["ingest"]["chunks_computed"].as_u64().unwrap() > 50, "{}", first["ingest"]);
    for side in ["answer", "full_recompute", "retrieval"] {
        let text = first[side]["text"].as_str().unwrap().trim();
        assert_eq!(text, first["expected"].as_str().unwrap(), "{side}");
        passages_are_where_citations_say(&first[side]);
    }
    let stats = &first["answer"]["stats"];
    let (reused, recomputed) = (stats["reused_tokens"].as_u64().unwrap(), stats["recomputed_tokens"].as_u64().unwrap());
    assert!(reused > 3 * recomputed && recomputed > 0, "{stats}");
    assert_eq!(first["full_recompute"]["stats"]["reused_tokens"], 0);
    let share = first["retrieval"]["stats"]["scored_share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.0, "{share}");

    let second = json(&succeed(quire(&data).args(["demo", "--json"])));
    assert_eq!(second["ingest"]["chunks_computed"], 0);
    assert_eq!(second["ingest"]["chunks_cached"], first["ingest"]["chunks_computed"]);
    assert_eq!(second["answer"]["text"], first["answer"]["text"]);
    let printed = succeed(quire(&data).arg("demo"));
    assert!(printed.contains("chunks was cached, 0 computed"), "{printed}");
    assert!(printed.contains("blended cached KV") && printed.contains("full recompute"), "{printed}");
}

#[test]
fn the_shipped_questions_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let folder = root().join("examples");
    let mut documents: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    documents.retain(|path| path.file_name().unwrap().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()));
    succeed(quire(&data).arg("ingest").args(documents));
    let lines = std::fs::read_to_string(folder.join("questions.jsonl")).unwrap();
    for line in lines.lines() {
        let asked: Value = serde_json::from_str(line).unwrap();
        let (question, wanted) = (asked["question"].as_str().unwrap(), asked["answer"].as_str().unwrap());
        let answer = json(&succeed(quire(&data).args(["ask", question, "--json", "--compare"])));
        assert_eq!(answer["full_recompute"]["text"].as_str().unwrap().trim(), wanted, "{question}");
        let blended = answer["answer"]["text"].as_str().unwrap().trim();
        let hard = NEEDS_FULL_RECOMPUTE.iter().any(|name| question.contains(name));
        assert!(hard || blended == wanted, "{question}: {blended}");
    }
}

#[test]
fn measuring_commands_write_their_records() {
    let dir = tempfile::tempdir().unwrap();
    let results = dir.path().join("results");
    let data = dir.path().join("data");
    let measure = |words: &[&str]| {
        succeed(bench(&data).args(words).args(["--commit", "abc", "--results"]).arg(&results));
    };
    measure(&[
        "eval",
        "--tasks",
        "kv",
        "--lengths",
        "1024",
        "--samples",
        "1",
        "--configs",
        "full,reuse,cacheblend-15,retrieval-flat",
    ]);
    measure(&["prefill", "--no-peer", "--lengths", "256", "--repeats", "1"]);
    measure(&["decode", "--no-peer", "--lengths", "256", "--repeats", "1", "--tokens", "4"]);
    measure(&["blend", "--lengths", "512", "--repeats", "1"]);
    for (name, case, metric) in [
        ("quality", "generated/kv/1024/full", "exact_match"),
        ("quality", "generated/kv/1024/cacheblend-15", "exact_match"),
        ("prefill", "ref/256/cpu", "time_to_first_token"),
        ("decode", "ref/256/cpu/full", "floor_share"),
    ] {
        let text = std::fs::read_to_string(results.join(format!("{name}.jsonl"))).unwrap();
        let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let found: Vec<Value> = records.filter(|r| r["case"] == case && r["metric"] == metric).collect();
        assert_eq!(found.len(), 1, "{name} {case} {metric} in:\n{text}");
        assert_eq!((found[0]["commit"].as_str(), found[0]["bench"].as_str()), (Some("abc"), Some(name)));
        assert!(found[0]["value"].as_f64().unwrap().is_finite());
    }
    assert!(results.join("blend.jsonl").exists());
}
