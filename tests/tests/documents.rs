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
fn progress_and_summary_count_the_same_documents() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    for number in 0..9 {
        write(dir.path(), &format!("notes/{number}.txt"), &format!("Lamp {number} was lit."));
    }
    write(dir.path(), "notes/copy.txt", "Lamp 1 was lit.");
    write(dir.path(), "notes/deep/empty.md", " \n");
    write(dir.path(), "notes/void.txt", "");
    write(dir.path(), "notes/.hidden.txt", "Not seen.");
    write(dir.path(), "notes/picture.png", "Not read.");
    for name in ["latin.txt", "another.md", "zzz.txt"] {
        std::fs::write(dir.path().join("notes").join(name), b"caf\xe9").unwrap();
    }
    std::os::unix::fs::symlink(dir.path().join("notes/2.txt"), dir.path().join("notes/link.txt")).unwrap();
    std::os::unix::fs::symlink(dir.path(), dir.path().join("notes/loop")).unwrap();
    // 9 and two of equal text, two empty ones, three that fail, and a path that is not there.
    for (round, state) in [(1, "new"), (2, "unchanged")] {
        let output = quire(&data).args(["ingest", "notes", "absent"]).output().unwrap();
        let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        let counts = out.lines().filter_map(|line| line.strip_prefix('[')?.split_once(']')).map(|(count, _)| count);
        let counts: Vec<(usize, usize)> = counts
            .map(|count| count.split_once('/').unwrap())
            .map(|(done, total)| (done.parse().unwrap(), total.parse().unwrap()))
            .collect();
        assert_eq!(counts.len(), 11, "round {round}: {out}");
        assert!(counts.iter().all(|(done, total)| *done <= 17 && *total == 17), "round {round}: {counts:?}");
        assert!(counts.windows(2).all(|pair| pair[0].0 < pair[1].0), "round {round}: {counts:?}");
        assert!(err.contains("4 of 17 documents could not be ingested"), "round {round}: {err}");
        assert!(out.contains("11 documents in `default`") && out.contains(state), "{out}");
        assert!(out.contains("4 could not be read; skipped 5: 1 hidden, 1 neither text"), "{out}");
    }
}

#[test]
fn a_collection_is_renamed_beside_a_server_and_without_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(dir.path(), "a.txt", "The lamp of Varn Point was lit in 1851.");
    succeed(quire(&data).args(["ingest", "a.txt", "-c", "recovered-1"]));
    let rename = |old: &str, new: &str| succeed(quire(&data).args(["collections", "rename", old, new]));
    let finds = |name: &str| succeed(quire(&data).args(["search", "lamp", "-c", name])).contains("1851");
    assert_eq!(rename("recovered-1", "notes"), "recovered-1: renamed to notes\n");
    assert!(finds("notes"));
    fail(quire(&data).args(["search", "lamp", "-c", "recovered-1"]), 1, &["does not exist", "notes"]);
    fail(quire(&data).args(["collections", "rename", "recovered-1", "x"]), 1, &["does not exist", "notes"]);
    fail(quire(&data).args(["collections", "rename", "notes", "a/b"]), 2, &["a/b", "expected 1 to 64"]);
    let server = support::Server::start(&data, &[]);
    // The server has it open under its old name.
    assert!(finds("notes"));
    assert_eq!(rename("notes", "renamed"), "notes: renamed to renamed\n");
    assert!(finds("renamed"));
    fail(quire(&data).args(["search", "lamp", "-c", "notes"]), 1, &["does not exist", "renamed"]);
    // The name is free, and what comes in under it is another collection.
    write(dir.path(), "b.txt", "The harbour froze twice.");
    succeed(quire(&data).args(["ingest", "b.txt", "-c", "notes"]));
    fail(quire(&data).args(["collections", "rename", "renamed", "notes"]), 1, &["`notes` is there already"]);
    succeed(quire(&data).args(["rm", "-c", "renamed"]));
    succeed(quire(&data).args(["ingest", "b.txt", "-c", "renamed"]));
    let cure = "quire collections rename renamed NEW_NAME";
    fail(quire(&data).args(["rm", "--undo", "-c", "renamed"]), 1, &[cure]);
    rename("renamed", "later");
    succeed(quire(&data).args(["rm", "--undo", "-c", "renamed"]));
    assert!(finds("renamed"));
    drop(server);
    assert!(finds("renamed") && !finds("later"));
}

#[test]
fn what_has_no_word_is_no_query() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(dir.path(), "a.txt", "The lamp of Varn Point cost 40 €.");
    succeed(quire(&data).args(["ingest", "a.txt"]));
    for (query, found) in [("", "only white space"), (" \n", "only white space"), ("?! --", "only punctuation")] {
        fail(quire(&data).args(["search", query]), 2, &["QUERY", "expected a word to look for", found]);
    }
    assert!(succeed(quire(&data).args(["search", "€"])).contains("a.txt"));
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
