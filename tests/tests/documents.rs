//! Documents that come, change, move and go, through the real program.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use serde_json::Value;
use support::{fail, quire, succeed};

/// The last line that a command prints, as JSON.
fn last(command: &mut std::process::Command) -> Value {
    serde_json::from_str(succeed(command).lines().last().unwrap()).unwrap()
}

fn write(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// The ids and first names of all documents.
fn listed(data: &Path) -> Vec<(String, String)> {
    let lines = succeed(quire(data).args(["ls", "--json"]));
    let document = |line: &str| {
        let value: Value = serde_json::from_str(line).unwrap();
        let name = value["names"][0].as_str().unwrap().rsplit('/').next().unwrap().to_string();
        (value["id"].as_str().unwrap().to_string(), name)
    };
    lines.lines().map(document).collect()
}

#[test]
fn a_moved_file_keeps_its_document_and_sync_removes_what_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(dir.path(), "notes/a.txt", "The lamp of Varn Point was lit in 1851.");
    write(dir.path(), "notes/b.txt", "The harbour froze twice.");
    write(dir.path(), "other/c.txt", "A pilot came aboard.");
    let ingest = |words: &[&str]| last(quire(&data).arg("--json").arg("ingest").args(words))["report"].clone();
    assert_eq!(ingest(&["notes", "other"])["new"], 3);
    let before = listed(&data);
    assert!(before.iter().all(|(id, _)| id.starts_with("doc_")), "{before:?}");
    std::fs::rename(dir.path().join("notes/a.txt"), dir.path().join("notes/moved.txt")).unwrap();
    std::fs::copy(dir.path().join("notes/b.txt"), dir.path().join("notes/copy.txt")).unwrap();
    let report = ingest(&["notes"]);
    let counts = ["renamed", "copies", "unchanged", "new", "chunks_computed"].map(|key| report[key].as_u64().unwrap());
    assert_eq!(counts, [1, 1, 1, 0, 0], "{report}");
    let names = |listed: Vec<(String, String)>| listed.into_iter().map(|(_, name)| name).collect::<Vec<_>>();
    assert_eq!(names(listed(&data)), ["b.txt", "moved.txt", "c.txt"]);
    assert!(listed(&data).contains(&(before[0].0.clone(), "moved.txt".into())), "the same document");
    // What is gone elsewhere stays.
    for gone in ["notes/moved.txt", "notes/b.txt", "other/c.txt"] {
        std::fs::remove_file(dir.path().join(gone)).unwrap();
    }
    assert_eq!(ingest(&["notes", "--sync"])["removed"], 2);
    assert_eq!(names(listed(&data)), ["copy.txt", "c.txt"]);
    assert_eq!(succeed(quire(&data).args(["search", "lamp"])), "");
    let restored = succeed(quire(&data).args(["rm", "--undo", "notes/moved.txt"]));
    assert!(restored.contains("back"), "{restored}");
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("1851"));
    // By its id as well as by its name.
    succeed(quire(&data).args(["rm", &before[0].0]));
    assert!(succeed(quire(&data).args(["rm", "--undo", &before[0].0])).contains("moved.txt"));
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("1851"));
    // A path that is itself gone may be a disk that is not there.
    std::fs::remove_dir_all(dir.path().join("other")).unwrap();
    fail(quire(&data).args(["ingest", "--sync", "other"]), 1, &["other"]);
    assert_eq!(listed(&data).len(), 3);
}

#[test]
fn what_is_removed_for_good_takes_its_chunks_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(dir.path(), "a.txt", "The lamp of Varn Point was lit in 1851.");
    write(dir.path(), "b.txt", "The harbour froze twice.");
    succeed(quire(&data).args(["ingest", "a.txt", "b.txt"]));
    let chunks = || last(quire(&data).args(["cache", "stats", "--json"]))["chunks"].as_u64().unwrap();
    assert_eq!(chunks(), 2);
    succeed(quire(&data).args(["rm", "a.txt"]));
    assert_eq!(chunks(), 2, "it may come back");
    assert!(succeed(quire(&data).arg("reclaim")).contains("1 document, 1 cached chunk"));
    assert_eq!(chunks(), 1);
    fail(quire(&data).args(["rm", "b.txt", "none.txt", "--now"]), 1, &["none.txt", "quire ls default"]);
    assert_eq!((chunks(), listed(&data).len()), (0, 0));
    fail(quire(&data).arg("rm"), 2, &["--collection"]);
    fail(quire(&data).args(["ls", "nowhere"]), 1, &["`nowhere` does not exist"]);
}

#[test]
fn a_lazy_ingest_leaves_chunks_to_their_first_use() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(dir.path(), "a.txt", "The lamp of Varn Point was lit in 1851.");
    let report = last(quire(&data).args(["--json", "ingest", "--lazy", "--language", "de", "a.txt"]));
    assert_eq!((&report["report"]["chunks_left"], &report["report"]["chunks_computed"]), (&1.into(), &0.into()));
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("1851"));
    let answer = last(quire(&data).args(["ask", "--json", "When was the lamp of Varn Point lit?"]));
    assert_eq!(answer["answer"]["stats"]["chunks_computed"], 1);
    let collections = succeed(quire(&data).arg("collections"));
    assert!(collections.contains("default  1 document") && collections.contains("language de"), "{collections}");
    fail(quire(&data).args(["ingest", "--language", "xx", "a.txt"]), 2, &["`language`", "auto"]);
}
