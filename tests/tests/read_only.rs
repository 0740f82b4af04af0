//! Who only looks changes nothing, and what cannot be written is read all the same: a read-only data folder, a full disk.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use serde_json::{Value, json};
use support::{Server, binary, clean, example, fail, ingested, model, quire, root, succeed, texts};

fn json(command: &mut Command) -> Value {
    serde_json::from_str(succeed(command).lines().last().unwrap()).unwrap()
}

/// Contents and time stamps of everything below a folder, itself included.
fn traces(folder: &Path) -> BTreeMap<PathBuf, (SystemTime, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut paths = vec![folder.to_path_buf()];
    while let Some(path) = paths.pop() {
        let modified = std::fs::symlink_metadata(&path).unwrap().modified().unwrap();
        if path.is_dir() {
            paths.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            found.insert(path, (modified, Vec::new()));
        } else {
            let contents = std::fs::read(&path).unwrap();
            found.insert(path, (modified, contents));
        }
    }
    found
}

#[test]
fn commands_that_look_leave_no_trace_whatever_budget_they_are_given() {
    let dir = ingested();
    let data = dir.path().join("data");
    let before = traces(&data);
    let looking: [&[&str]; 8] = [
        &["doctor"],
        &["cache", "stats"],
        &["cache", "ls"],
        &["cache", "verify"],
        &["search", "river"],
        &["config", "show"],
        &["cache", "stats", "--json"],
        &["doctor", "--json"],
    ];
    for words in looking {
        let printed = succeed(quire(&data).args(words).env("QUIRE_CACHE_BYTES", "1M"));
        assert!(!printed.is_empty());
        assert!(traces(&data) == before, "{words:?} changed the data folder");
    }
}

#[test]
fn the_budget_is_the_stores_and_changes_when_ingesting_with_another() {
    let dir = ingested();
    let data = dir.path().join("data");
    let stats = || json(quire(&data).args(["cache", "stats", "--json"]));
    let before = stats();
    let (chunks, bytes) = (before["chunks"].as_u64().unwrap(), before["payload_bytes"].as_u64().unwrap());
    assert!(chunks > 2 && before["byte_budget"] == 8u64 << 30, "{before}");
    assert_eq!(
        (&before["models"][0]["name"], &before["models"][0]["chunks"]),
        (&json!("reference"), &before["chunks"])
    );
    // Asking keeps the budget, whatever is said.
    succeed(quire(&data).args(["ask", &example().question]).env("QUIRE_CACHE_BYTES", "1M"));
    assert_eq!(json(quire(&data).args(["cache", "stats", "--json"]).env("QUIRE_CACHE_BYTES", "1M"))["chunks"], chunks);
    let half = (bytes / 2).to_string();
    let note = dir.path().join("note.md");
    std::fs::write(&note, "The lamp of Varn Point was lit in 1851.\n").unwrap();
    succeed(quire(&data).arg("ingest").arg(&note).args(["--cache-bytes", &half]));
    let after = stats();
    assert!(after["chunks"].as_u64().unwrap() < chunks && after["byte_budget"] == bytes / 2, "{after}");
    // Kept for those who come later and say nothing.
    succeed(quire(&data).arg("ingest").arg(&note));
    assert_eq!(stats()["byte_budget"], after["byte_budget"]);
}

#[test]
fn the_cache_is_looked_into_and_verified_beside_a_running_server() {
    let dir = ingested();
    let data = dir.path().join("data");
    let alone = json(quire(&data).args(["cache", "stats", "--json"]));
    let server = Server::start(&data, &[]);
    let beside = json(quire(&data).args(["cache", "stats", "--json"]));
    assert_eq!((&beside["chunks"], &beside["in_use"]), (&alone["chunks"], &Value::from(true)));
    fail(quire(&data).args(["cache", "verify", "--no-server"]), 1, &["process id", "Stop that one"]);
    fail(quire(&data).args(["cache", "evict", "--all", "--no-server"]), 1, &["process id"]);
    assert_eq!(json(quire(&data).args(["cache", "verify", "--json"]))["chunks"], alone["chunks"]);
    assert!(succeed(quire(&data).arg("doctor")).contains("in use"));
    drop(server);
    assert_eq!(json(quire(&data).args(["cache", "verify", "--json"]))["chunks"], alone["chunks"]);
}

#[test]
fn damage_is_told_and_removed_only_when_asked() {
    let dir = ingested();
    let data = dir.path().join("data");
    // Whoever opens the store next for writing moves chunks out of its log.
    succeed(quire(&data).args(["ask", &example().question]));
    let files = std::fs::read_dir(data.join("chunks")).unwrap().map(|entry| entry.unwrap().path());
    let tables = files.filter(|path| path.extension().is_some_and(|end| end == "sst"));
    let largest = tables.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&largest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&largest, bytes).unwrap();
    let before = traces(&data);
    for _ in 0..2 {
        fail(quire(&data).args(["cache", "verify"]), 1, &["damaged", "--repair"]);
    }
    assert!(traces(&data) == before, "verifying changed the data folder");
    let repaired = succeed(quire(&data).args(["cache", "verify", "--repair"]));
    assert!(repaired.contains("1 damaged chunk") && repaired.contains("computed again"), "{repaired}");
    assert_eq!(json(quire(&data).args(["cache", "verify", "--json"]))["clean"], true);
    // What was removed is computed again.
    succeed(quire(&data).arg("ingest").args(example().documents));
}

#[test]
fn a_data_folder_of_a_newer_version_is_named_by_every_command() {
    let dir = ingested();
    let data = dir.path().join("data");
    std::fs::write(data.join("quire-data.json"), "{\"format\": 3}").unwrap();
    let before = traces(&data);
    let question = example().question;
    for words in
        [&["search", "river"][..], &["ask", &question], &["cache", "stats"], &["cache", "evict", "--all"], &["serve"]]
    {
        fail(quire(&data).args(words), 1, &["data folder", "version 3", "newer quire"]);
    }
    let output = quire(&data).arg("doctor").output().unwrap();
    assert!(texts(&output).0.contains("newer quire") && output.status.code() == Some(1));
    fail(quire(&data).arg("ingest").args(example().documents), 1, &["version 3", "newer quire"]);
    assert!(traces(&data) == before);
}

#[test]
fn a_store_that_cannot_be_opened_any_more_is_done_without_until_it_is_cleared() {
    let dir = ingested();
    let data = dir.path().join("data");
    std::fs::remove_file(data.join("chunks/CURRENT")).unwrap();
    let output = quire(&data).args(["ask", "--json", &example().question]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success() && stderr.contains("no cache is used"), "{stderr}");
    let answer: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(answer["answer"]["text"].as_str().unwrap().trim(), example().answer);
    // Documents come in without it, and it is said how it is had again.
    let note = dir.path().join("note.md");
    std::fs::write(&note, "The lamp of Varn Point was lit in 1851.\n").unwrap();
    let output = quire(&data).arg("ingest").arg(&note).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stderr.contains("chunks is corrupt") && stderr.contains("quire cache evict --all"), "{stderr}");
    assert!(succeed(quire(&data).args(["search", "Varn"])).contains("note.md"));
    succeed(quire(&data).args(["cache", "evict", "--all"]));
    succeed(quire(&data).arg("ingest").args(example().documents));
}

/// A shell in namespaces of its own, in which it may mount; `None` where the system grants no such thing.
fn mounting(script: &str, dir: &Path) -> Option<Command> {
    let mut probe = Command::new("unshare");
    probe.args(["-Urm", "mount", "-t", "tmpfs", "-o", "size=1m", "none"]).arg(dir);
    if !probe.output().is_ok_and(|output| output.status.success()) {
        eprintln!("not tried: this system lets nobody mount (unshare -Urm)");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-Urm", "bash", "-euo", "pipefail", "-c", script, "bash"]);
    clean(&mut command, &dir.join("data"));
    command.env("QUIRE", binary()).env("MODEL", model()).env("EXAMPLES", root().join("examples"));
    Some(command)
}

#[test]
fn a_read_only_mount_is_searched_asked_served_and_looked_into() {
    let dir = ingested();
    let script = r#"
        mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"
        run() { QUIRE_DATA_DIR="$1" QUIRE_MODEL="$MODEL" "$QUIRE" "${@:2}"; }
        if touch "$1/x" 2>/dev/null; then echo "not read-only"; exit 9; fi
        run "$1" search river
        run "$1" ask --json "$2" | tail -n 1 > "$3/answer"
        run "$1" cache stats; run "$1" cache ls > /dev/null; run "$1" cache verify
        if run "$1" doctor > "$3/doctor"; then exit 8; fi
        grep -q "cannot be written" "$3/doctor"
        if run "$1" ingest "$EXAMPLES/12-gazetteer.txt" 2> "$3/ingest"; then exit 7; fi
        grep -q "Read-only file system" "$3/ingest"
    "#;
    let data = dir.path().join("data");
    let Some(mut command) = mounting(script, dir.path()) else { return };
    let before = traces(&data);
    let output = command.arg(&data).arg(example().question).arg(dir.path()).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert!(stderr.contains("cached chunks are used, new ones are not kept"), "{stderr}");
    let answer: Value = serde_json::from_str(&std::fs::read_to_string(dir.path().join("answer")).unwrap()).unwrap();
    assert_eq!(answer["answer"]["text"].as_str().unwrap().trim(), example().answer);
    assert!(answer["answer"]["stats"]["chunks_cached"].as_u64().unwrap() > 0, "{answer}");
    assert!(traces(&data) == before);
}

#[test]
fn a_full_disk_is_freed_and_answers_are_made_without_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        disk="$1/disk"; mkdir "$disk"; mount -t tmpfs -o size=48m none "$disk"
        run() { QUIRE_DATA_DIR="$disk/data" QUIRE_MODEL="$MODEL" "$QUIRE" "${@}"; }
        run ingest "$EXAMPLES/12-gazetteer.txt"
        # Documents are kept where the state of their chunks does not fit.
        run ingest --json "$EXAMPLES" > "$1/acknowledged" 2> "$1/full"
        grep -q "no space left" "$1/full"
        run ls | grep -q 01-museum-guide
        cat /dev/zero > "$disk/rest" 2>/dev/null || true
        # Nothing that was acknowledged is lost.
        run cache ls --json > "$1/listed"
        run ask --json "$2" | tail -n 1 > "$1/answer"
        run search river > /dev/null
        run cache stats > /dev/null
        "$QUIRE" --data-dir "$disk/data" --model "$MODEL" serve --port 0 --json > "$1/served" & server=$!
        trap 'kill "$server" 2> /dev/null || true' EXIT
        for _ in $(seq 600); do grep -q ready "$1/served" && break; sleep 0.1; done
        grep -q ready "$1/served"; kill "$server"; wait "$server"
        run cache evict --all
        rm "$disk/rest"
        run ingest "$EXAMPLES/12-gazetteer.txt"
        run cache verify
    "#;
    let Some(mut command) = mounting(script, dir.path()) else { return };
    let question = "In which locker does Jonas Tarbelow keep the spare key?";
    let output = command.arg(dir.path()).arg(question).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    assert!(stderr.contains("no space left") && stderr.contains("answers stay the same"), "{stderr}");
    let lines = |name: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(dir.path().join(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let listed: Vec<Value> = lines("listed").into_iter().map(|line| line["key"].clone()).collect();
    let acknowledged = lines("acknowledged").into_iter().filter(|line| line["event"] == "chunk");
    let lost = acknowledged.filter(|line| !listed.contains(&line["key"])).count();
    assert_eq!((lost, listed.is_empty()), (0, false));
}

/// With nothing in reserve, not even the rows fit that say which chunks are gone.
#[test]
fn all_chunks_are_evicted_through_a_server_whose_disk_is_full_to_the_last_byte() {
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        disk="$1/disk"; mkdir "$disk"; mount -t tmpfs -o size=64m none "$disk"
        run() { QUIRE_DATA_DIR="$disk/data" QUIRE_MODEL="$MODEL" "$QUIRE" "${@}"; }
        run ingest "$EXAMPLES/12-gazetteer.txt"
        "$QUIRE" --data-dir "$disk/data" --model "$MODEL" serve --port 0 --json > "$1/served" & server=$!
        trap 'kill "$server" 2> /dev/null || true' EXIT
        for _ in $(seq 600); do grep -q ready "$1/served" && break; sleep 0.1; done
        rm -f "$disk/data/chunks/reserve"
        cat /dev/zero > "$disk/rest" 2>/dev/null || true
        run cache evict --all
        run cache stats --json > "$1/stats"
        kill -0 "$server"
        rm "$disk/rest"
        run search river > /dev/null
        run ingest "$EXAMPLES"
    "#;
    let Some(mut command) = mounting(script, dir.path()) else { return };
    let output = command.arg(dir.path()).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{}\n{stdout}\n{stderr}", output.status);
    let stats = std::fs::read_to_string(dir.path().join("stats")).unwrap();
    let stats: Value = serde_json::from_str(stats.lines().last().unwrap()).unwrap();
    assert_eq!(stats["chunks"], 0, "{stats}");
}
