//! What people and scripts meet on the command line: where results go, what a terminal is spared, which settings count.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::{binary, clean, example, fail, ingested, quire, succeed, texts};

/// Output of a command that must succeed: stdout, stderr.
fn both(command: &mut Command) -> (String, String) {
    let output = command.output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{command:?}: {stdout}\n{stderr}");
    (stdout, stderr)
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

#[test]
fn the_answer_is_on_stdout_and_what_it_cost_on_stderr_when_asked_for() {
    let dir = ingested();
    let data = dir.path().join("data");
    let example = example();
    let words: Vec<&str> = example.question.split(' ').collect();
    let (stdout, stderr) = both(quire(&data).arg("ask").args(&words));
    assert!(stdout.starts_with(&format!("{}\n", example.answer)), "{stdout}");
    assert!(!stdout.contains("first token") && !stderr.contains("first token"), "{stdout}{stderr}");
    let (verbose, costs) = both(quire(&data).args(["ask", "-v", &example.question]));
    assert_eq!(verbose, stdout);
    assert!(costs.contains("first token after") && costs.contains("reused"), "{costs}");
    let (_, quiet) = both(quire(&data).args(["ask", "-q", &example.question]));
    assert_eq!(quiet, "");
}

#[test]
fn a_result_that_has_nowhere_to_go_is_a_failure() {
    let dir = ingested();
    let data = dir.path().join("data");
    let question = example().question;
    for words in [&["ask", &question][..], &["search", "river"], &["cache", "stats", "--json"], &["config", "show"]] {
        let inner = quire(&data);
        let mut command = Command::new("sh");
        clean(&mut command, &data);
        command.envs(inner.get_envs().filter_map(|(key, value)| Some((key, value?))));
        command.args(["-c", "exec \"$@\" >&-", "sh"]).arg(inner.get_program()).args(inner.get_args()).args(words);
        fail(&mut command, 1, &["could not be written to standard output", "closed"]);
    }
}

#[test]
fn the_doctor_says_what_is_wrong_with_a_data_folder_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let told = |part: &str| {
        let (stdout, _) = texts(&quire(&data).arg("doctor").output().unwrap());
        assert!(stdout.contains(part), "{stdout}");
        stdout.lines().any(|line| line.starts_with("BAD   data"))
    };
    assert!(!told("not there yet"));
    write(&data, "a file");
    assert!(told("is no folder"));
    std::fs::remove_file(&data).unwrap();
    write(&data.join("quire-data.json"), "torn");
    assert!(told("remove that file if no newer quire has written the folder"));
    write(&data.join("quire-data.json"), "{\"format\": 9}");
    assert!(told("use a newer quire"));
}

#[test]
fn places_are_given_as_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(&dir.path().join("notes/lamp.md"), "# Lamps\n\n\nThe lamp of Varn Point was lit in 1851.\n");
    succeed(quire(&data).args(["ingest", "notes"]));
    let found = succeed(quire(&data).args(["search", "lit", "1851"]));
    assert!(found.contains("notes/lamp.md:1, characters 0-"), "{found}");
    let found: Value = serde_json::from_str(&succeed(quire(&data).args(["search", "-j", "lamp"]))).unwrap();
    assert_eq!(found["line"], 1);
    let answer: Value = serde_json::from_str(&succeed(quire(&data).args(["ask", "-j", "When was it lit?"]))).unwrap();
    assert_eq!(answer["answer"]["citations"][0]["line"], 1);
}

#[test]
fn documents_and_file_names_do_not_command_the_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let text = "The lamp \u{1b}[2J\u{1b}]0;owned\u{7} of \u{9b}31mVarn\u{202e} Point\r was lit in 1851.\n";
    let name = "lamp\u{1b}[31m\u{202e}.md";
    write(&dir.path().join("notes").join(name), text);
    write(&dir.path().join("notes/broken\u{1b}[5m.md"), "\0");
    let harmful = |text: &str| text.chars().any(|c| (c.is_control() && c != '\n') || c == '\u{202e}');
    let output = quire(&data).args(["ingest", "notes"]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(!harmful(&stdout) && !harmful(&stderr), "{stdout:?} {stderr:?}");
    assert!(stderr.contains("broken\\u{1b}[5m.md") && stdout.contains("lamp\\u{1b}"), "{stdout} {stderr}");
    for words in
        [&["search", "lamp"][..], &["ask", "-v", "When was the lamp lit?"], &["search", "nothing-here-\u{1b}[31m"]]
    {
        let (stdout, stderr) = both(quire(&data).args(words));
        assert!(!harmful(&stdout) && !harmful(&stderr), "{words:?}: {stdout:?} {stderr:?}");
    }
    // For programs nothing is changed, only escaped.
    let printed = succeed(quire(&data).args(["search", "--json", "lamp"]));
    assert!(!harmful(&printed), "{printed:?}");
    let found: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(found["passage"].as_str().unwrap(), text.trim_end());
    assert!(found["path"].as_str().unwrap().ends_with(name));
    let usage = fail(quire(&data).args(["doctor", "\u{1b}[31mx\u{202e}"]), 2, &["unexpected argument"]);
    assert!(!harmful(&usage), "{usage:?}");
}

#[test]
fn a_folder_does_not_decide_who_may_come_in_or_where_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    // Commands of these tests stand in this folder.
    write(&dir.path().join("quire.toml"), "top_chunks = 3\ndata_dir = \"elsewhere\"\n");
    let mut here = quire(&data);
    fail(here.args(["config", "show"]), 2, &["data_dir", "quire.toml", "current folder", "Move the line", "--config"]);
    let shown = succeed(quire(&data).args(["config", "show", "--config", "quire.toml"]));
    assert!(shown.contains("top_chunks") && !dir.path().join("elsewhere").exists(), "{shown}");
    write(&dir.path().join("quire.toml"), "top_chunks = 3\n");
    write(&dir.path().join("config/quire/quire.toml"), "top_chunks = 4\nhost = \"::1\"\ncache_bytes = \"2G\"\n");
    let shown: Value = serde_json::from_str(&succeed(quire(&data).args(["config", "show", "--json"]))).unwrap();
    assert_eq!((&shown["top_chunks"]["value"], &shown["host"]["value"]), (&Value::from(3), &Value::from("::1")));
    assert_eq!(shown["cache_bytes"]["value"], 2u64 << 30);
    let origin = shown["host"]["origin"].as_str().unwrap();
    assert!(origin.ends_with("config/quire/quire.toml"), "{origin}");
}

#[test]
fn a_key_is_read_from_a_file_and_shown_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    write(&dir.path().join("key"), "hunter2\n");
    for more in [&["--api-key-file", "key"][..], &["--api-key", "hunter2"]] {
        for words in [&["config", "show"][..], &["config", "show", "--json"], &["config", "show", "--log", "trace"]] {
            let (stdout, stderr) = both(quire(&data).args(words).args(more));
            assert!(stdout.contains("(set)") && !format!("{stdout}{stderr}").contains("hunter2"), "{stdout} {stderr}");
        }
    }
    let server = support::Server::start(&data, &["--api-key-file", "key"]);
    assert_eq!(server.get("/v1/models").status, 401);
    let key = [("authorization", "Bearer hunter2")];
    assert_eq!(support::request(server.address, "GET", "/v1/models", &key, b"").status, 200);
}

#[test]
fn usage_is_explained_with_its_exit_codes() {
    let help = |words: &[&str]| {
        let output = Command::new(binary()).args(words).stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{words:?}");
        texts(&output).0
    };
    assert!(help(&["--help"]).contains("Exit codes: 0 done; 1 failed"));
    assert!(help(&["-h"]).contains("2 wrong usage"));
    assert!(help(&["completions", "bash"]).contains("--no-prefix-cache"));
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fail(quire(&data).args(["serve", "--cache-bytes", "8X"]), 2, &["8G or 1.5GiB", "8X"]);
    fail(quire(&data).args(["ask", "Who?"]).env("QUIRE_KV_BUDGET_BYTES", "lots"), 2, &["kv_budget_bytes", "8G"]);
    fail(quire(&data).args(["search"]), 2, &["QUERY"]);
}

#[test]
fn one_unreadable_folder_or_file_is_named_and_the_rest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let notes = dir.path().join("notes");
    write(&notes.join("good.md"), "The lamp of Varn Point was lit in 1851.\n");
    write(&notes.join("marked.txt"), "\u{feff}The quay of Orrin was built in 1790.\n");
    write(&notes.join("nul.txt"), "a\0b");
    let wide: Vec<u8> = "The bell rings.".encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(notes.join("wide.txt"), wide).unwrap();
    write(&notes.join("empty.md"), "");
    write(&notes.join("scan.pdf"), "%PDF");
    write(&notes.join(".git/x.md"), "hidden");
    std::os::unix::fs::symlink(&notes, notes.join("round")).unwrap();
    let ingest = || {
        let mut command = quire(&data);
        command.args(["ingest", "notes", "absent.md"]);
        command
    };
    let parts = ["absent.md", "nul.txt", "NUL byte at offset 1", "wide.txt", "iconv -f UTF-16LE", "3 of 6 documents"];
    fail(&mut ingest(), 1, &parts);
    let output = ingest().output().unwrap();
    let summary = texts(&output).0;
    for part in ["3 could not be read", "skipped 4", "1 hidden", "1 neither", "1 links", "1 without text"] {
        assert!(summary.contains(part), "{summary} lacks {part}");
    }
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("good.md"));
    let marked: Value = serde_json::from_str(&succeed(quire(&data).args(["search", "-j", "quay"]))).unwrap();
    assert_eq!(
        (marked["passage"].as_str(), &marked["span"]["start"]),
        (Some("The quay of Orrin was built in 1790."), &1.into())
    );

    // A document that is emptied is told, as the collection keeps what it had.
    write(&notes.join("good.md"), "");
    fail(&mut ingest(), 1, &["good.md", "no bytes"]);
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("good.md"));
}

#[test]
fn a_folder_that_may_not_be_listed_is_named() {
    let root = std::fs::metadata("/proc/self").map(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let notes = dir.path().join("notes");
    write(&notes.join("good.md"), "The lamp of Varn Point was lit in 1851.\n");
    write(&notes.join("locked/secret.md"), "Nobody reads this.\n");
    let words = ["ingest", "notes"];
    let command = |mut command: Command| {
        support::clean(&mut command, &data);
        command.args(["--data-dir"]).arg(&data).arg("--model").arg(support::model()).args(words);
        command
    };
    std::fs::set_permissions(notes.join("locked"), std::os::unix::fs::PermissionsExt::from_mode(0o0)).unwrap();
    let mut run = if root {
        // Permissions do not bind root; without its capabilities they do.
        let mut run = Command::new("setpriv");
        run.args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"])
            .arg(binary());
        command(run)
    } else {
        command(Command::new(binary()))
    };
    let stderr = fail(&mut run, 1, &["notes/locked", "ermission denied", "1 of 2 documents"]);
    std::fs::set_permissions(notes.join("locked"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert!(!stderr.contains("secret.md"), "{stderr}");
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("good.md"));
}
