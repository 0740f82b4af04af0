//! The server owns the data folder, the command line asks: what is printed is the same as alone, and nothing that happens to
//! either side leaves the other in doubt.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};
use service::control::PROTOCOL;
use support::{Server, eventually, example, fail, ingested, quire, root, send, succeed, texts};

/// A folder of documents, each of some chunks.
fn documents(folder: &Path, number: usize, lines: usize) {
    std::fs::create_dir_all(folder).unwrap();
    for document in 0..number {
        let line =
            |line: usize| format!("Buoy {document}-{line} lies off the pier, and its lamp burns {line} hours.\n\n");
        std::fs::write(folder.join(format!("d{document:03}.txt")), (0..lines).map(line).collect::<String>()).unwrap();
    }
}

/// A command that runs while the test goes on.
fn begin(command: &mut Command) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

/// The exit code and everything on stderr of a command whose stdout is read elsewhere.
fn end(child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code(), texts(&output).1)
}

fn kill(signal: &str, id: u32) {
    assert!(Command::new("kill").args([signal, &id.to_string()]).status().unwrap().success());
}

/// Without what differs between any two runs: times, and how full the store's files are.
fn comparable(text: &str, json: bool) -> String {
    if json {
        let lines = text.lines().map(|line| without_times(serde_json::from_str(line).unwrap()).to_string());
        return lines.collect::<Vec<_>>().join("\n");
    }
    let kept = text.lines().filter(|line| !line.starts_with("on disk"));
    kept.map(timeless).collect::<Vec<_>>().join("\n")
}

/// A line without its durations: numbers before `s` and `ms`.
fn timeless(line: &str) -> String {
    let words: Vec<&str> = line.split(' ').collect();
    let is_unit = |word: Option<&&str>| word.is_some_and(|word| ["s", "ms"].contains(&word.trim_end_matches(';')));
    let kept =
        words.iter().enumerate().filter(|(at, word)| word.parse::<f64>().is_err() || !is_unit(words.get(at + 1)));
    // The unit is that of the number.
    kept.map(|(_, word)| if is_unit(Some(word)) { "s" } else { *word }).collect::<Vec<_>>().join(" ")
}

fn without_times(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(key, _)| {
                !key.ends_with("seconds")
                    && !key.ends_with("_unix")
                    && !["in_use", "disk_bytes"].contains(&key.as_str())
            })
            .map(|(key, value)| (key, without_times(value)))
            .collect(),
        Value::Array(values) => values.into_iter().map(without_times).collect(),
        other => other,
    }
}

fn copy(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap().success());
}

#[test]
fn commands_print_the_same_beside_a_server_as_alone() {
    let dir = ingested();
    let (alone, served) = (dir.path().join("data"), dir.path().join("copy"));
    copy(&alone, &served);
    documents(&dir.path().join("more"), 3, 20);
    std::fs::write(dir.path().join("more/broken.txt"), b"\0").unwrap();
    let question = example().question;
    let absent = format!("{}-{}", "0".repeat(64), "0".repeat(32));
    let document = example().documents[0].clone();
    let document = document.to_str().unwrap();
    let steps: [&[&str]; 36] = [
        &["ls"],
        &["ls", "absent"],
        &["collections", "--json"],
        &["search", "river"],
        &["search", "--json", "river", "--top-chunks", "3"],
        &["search", "qqqqq"],
        &["search", "river", "-c", "absent"],
        &["ask", &question],
        &["ask", "--json", &question, "--top-chunks", "2", "--max-tokens", "5"],
        &["ask", "--json", "--compare", &question, "--strategy", "window", "--ratio", "0.3"],
        &["ask", &question, "-c", "absent"],
        &["ask", &question, "--check-layer", "99"],
        &["ingest", "more"],
        &["ingest", "more", "--json"],
        &["ingest", "nowhere.txt"],
        &["ingest", "more/d000.txt", "more/absent.txt"],
        &["ingest", "more", "-c", ".."],
        &["search", "gazetteer"],
        &["cache", "stats"],
        &["cache", "ls"],
        &["cache", "ls", "--json"],
        &["cache", "verify"],
        &["cache", "verify", "--json", "--repair"],
        &["rm", document, "absent.txt"],
        &["rm", "--undo", document],
        &["rm", "--undo", document],
        &["collections"],
        &["collections", "rename", "default", "other"],
        &["collections", "rename", "default", "other"],
        &["collections", "rename", "other", "default", "--json"],
        &["rm", document, "--now"],
        &["reclaim"],
        &["rm", "-c", "absent"],
        &["cache", "evict", "--key", &absent],
        &["cache", "evict", "--to-bytes", "2M"],
        &["cache", "evict", "--all", "--json"],
    ];
    let run = |data: &Path, words: &[&str]| -> (Option<i32>, String, String) {
        let output = quire(data).args(words).output().unwrap();
        let (stdout, stderr) = texts(&output);
        let json = words.contains(&"--json");
        (output.status.code(), comparable(&stdout, json), stderr.replace(&*data.to_string_lossy(), "DATA"))
    };
    let expected: Vec<_> = steps.iter().map(|words| run(&alone, words)).collect();
    let server = Server::start(&served, &[]);
    for (words, expected) in steps.iter().zip(&expected) {
        let mut found = run(&served, words);
        // Only beside a server is it true.
        found.2 = found.2.replace("a running quire has this store open: these figures are of one moment\n", "");
        assert_eq!(&found, expected, "{words:?}");
    }
    let commands = server.get("/metrics").text();
    for (name, outcome, number) in [("search", "done", 4), ("ask", "failed", 2), ("cache evict", "done", 3)] {
        let line = format!("quire:commands_total{{command=\"{name}\",outcome=\"{outcome}\"}} {number}");
        assert!(commands.contains(&line), "no {line} in {commands}");
    }
}

/// Has a conversation from a pipe.
fn converse(data: &Path, flags: &[&str], input: &str) -> Output {
    let mut command = quire(data);
    command.arg("chat").args(flags).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_conversation_is_the_same_and_remembers_its_turns() {
    let dir = ingested();
    let data = dir.path().join("data");
    let question = example().question;
    let input = format!("{question}\n/system Answer in one word.\nWho keeps it?\n/clear\n{question}\n");
    let kinds: [&[&str]; 3] = [
        &["--json", "--max-tokens", "8"],
        &["--json", "--max-tokens", "8", "--documents"],
        &["--json", "--max-tokens", "16", "--max-context", "128"],
    ];
    let turns = |flags: &[&str]| -> Vec<Value> {
        let output = converse(&data, flags, &input);
        let (stdout, stderr) = texts(&output);
        assert!(output.status.success(), "{flags:?}: {stdout}\n{stderr}");
        let turns: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(turns.len(), 3, "{stdout}");
        // What the prefix cache had depends on what was asked before.
        let said = |turn: &Value| {
            json!([
                turn["question"],
                turn["answer"]["text"],
                turn["answer"]["citations"],
                turn["answer"]["stats"]["prompt_tokens"],
                turn["turns_forgotten"],
                turn["answer"]["notes"]
            ])
        };
        turns.iter().map(said).collect()
    };
    let alone: Vec<_> = kinds.iter().map(|flags| turns(flags)).collect();
    let server = Server::start(&data, &[]);
    assert_eq!(kinds[..2].iter().map(|flags| turns(flags)).collect::<Vec<_>>(), alone[..2]);
    // A context of another length than the server's: without documents, that needs no server.
    assert_eq!(turns(kinds[2]), alone[2]);
    fail(
        quire(&data).args(["chat", "--documents", "--max-context", "512"]),
        2,
        &["max_context", "Leave --max-context out"],
    );
    drop(server);
}

#[test]
fn a_conversation_whose_server_ends_says_so() {
    let dir = ingested();
    let data = dir.path().join("data");
    let mut server = Server::start(&data, &[]);
    let mut command = quire(&data);
    let (mut child, mut stdout) = begin(command.args(["chat", "--json", "--max-tokens", "4"]).stdin(Stdio::piped()));
    let mut typed = child.stdin.take().unwrap();
    typed.write_all(b"Who keeps the key?\n").unwrap();
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("\"turn\":1"), "{line}");
    server.child.kill().unwrap();
    server.wait();
    typed.write_all(b"And who else?\n").unwrap();
    drop(typed);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let (code, stderr) = end(child);
    assert_eq!(code, Some(1), "{rest}{stderr}");
    assert!(stderr.contains(&server.child.id().to_string()) && stderr.contains("it has ended"), "{stderr}");
}

#[test]
fn three_commands_at_once_go_on_beside_an_answer_over_http() {
    let dir = ingested();
    let data = dir.path().join("data");
    documents(&dir.path().join("one"), 4, 30);
    documents(&dir.path().join("two"), 4, 35);
    let server = Server::start(&data, &[]);
    let body = json!({"model": "reference", "messages": [{"role": "user", "content": "Tell me about the harbour."}],
                      "max_tokens": 3000, "ignore_eos": true, "stream": true});
    let headers = [("content-type", "application/json")];
    let mut stream = send(server.address, "POST", "/v1/chat/completions", &headers, body.to_string().as_bytes());
    let mut first = [0; 512];
    assert!(stream.read(&mut first).unwrap() > 0);
    // Two of them write into the same collection: one after the other.
    let question = example().question;
    let all: [&[&str]; 3] = [&["ingest", "one"], &["ingest", "two"], &["ask", &question]];
    let running: Vec<_> = all.iter().map(|words| begin(quire(&data).args(*words))).collect();
    let printed: Vec<String> = running
        .into_iter()
        .map(|(child, mut stdout)| {
            let mut text = String::new();
            stdout.read_to_string(&mut text).unwrap();
            let (code, stderr) = end(child);
            assert_eq!(code, Some(0), "{text}\n{stderr}");
            text
        })
        .collect();
    assert!(printed[0].contains("all new") && printed[1].contains("all new"), "{printed:?}");
    assert!(printed[2].starts_with(&example().answer), "{printed:?}");
    assert!(succeed(quire(&data).args(["search", "buoy lamp", "--json"])).lines().count() > 1);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("[DONE]") && !rest.contains("\"error\""), "{rest}");
}

#[test]
fn a_server_that_is_killed_at_work_leaves_no_doubt_and_nothing_in_the_way() {
    let dir = ingested();
    let data = dir.path().join("data");
    documents(&dir.path().join("many"), 60, 60);
    let mut server = Server::start(&data, &[]);
    let (child, mut stdout) = begin(quire(&data).args(["ingest", "many"]));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("new"), "{line}");
    server.child.kill().unwrap();
    server.wait();
    let mut reported = line;
    stdout.read_to_string(&mut reported).unwrap();
    let (code, stderr) = end(child);
    assert_eq!(code, Some(1));
    let id = server.child.id().to_string();
    for part in ["did not complete", &id, "kept", "again"] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    // Its socket and its file lie there, and mean nothing: alone, or with the next server.
    assert!(data.join("quire.sock").exists() && data.join("quire.pid").exists());
    for document in
        reported.lines().filter(|line| line.starts_with('[')).map(|line| line.split(['/', ':']).nth(2).unwrap())
    {
        let number = document.trim_start_matches('d').trim_end_matches(".txt").parse::<usize>().unwrap();
        let found = succeed(quire(&data).args(["search", &format!("buoy {number}-7"), "--top-chunks", "50"]));
        assert!(found.contains(document), "{document} was reported and is not found: {found}");
    }
    succeed(quire(&data).args(["ask", &example().question]));
    let server = Server::start(&data, &[]);
    succeed(quire(&data).args(["ask", &example().question]));
    assert!(server.metric("quire:commands_total") > 0.0);
}

#[test]
fn commands_write_side_by_side_and_what_has_to_wait_says_for_whom() {
    let dir = ingested();
    let data = dir.path().join("data");
    documents(&dir.path().join("many"), 200, 60);
    for name in ["note", "other"] {
        std::fs::write(dir.path().join(format!("{name}.txt")), format!("The lamp of {name} was lit in 1851.")).unwrap();
    }
    let _server = Server::start(&data, &[]);
    let (mut long, mut stdout) = begin(quire(&data).args(["ingest", "many"]));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    // Into the same collection, and into another one.
    assert!(succeed(quire(&data).args(["ingest", "note.txt"])).contains("all new"));
    assert!(succeed(quire(&data).args(["ingest", "-c", "second", "other.txt"])).contains("all new"));
    succeed(quire(&data).args(["rm", "note.txt"]));
    assert!(long.try_wait().unwrap().is_none(), "the long ingest goes on meanwhile");
    // The whole collection is another matter.
    let (mut whole, mut removed) = begin(quire(&data).args(["rm", "-c", "default"]));
    let mut said = String::new();
    BufReader::new(whole.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("waiting for its turn") && said.contains("`ingest` (collection `default`, for "), "{said}");
    kill("-TERM", long.id());
    end(long);
    removed.read_line(&mut String::new()).unwrap();
    assert!(whole.wait().unwrap().success());
    assert!(!succeed(quire(&data).arg("collections")).contains("default"));
}

#[test]
fn interrupting_a_command_ends_its_work_in_the_server() {
    let dir = ingested();
    let data = dir.path().join("data");
    documents(&dir.path().join("many"), 200, 60);
    std::fs::write(dir.path().join("note.txt"), "The lamp of Varn Point was lit in 1851.").unwrap();
    let server = Server::start(&data, &[]);
    let (child, mut stdout) = begin(quire(&data).args(["ingest", "many"]));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    // Not SIGINT, which a test run in the background may have inherited as ignored.
    kill("-TERM", child.id());
    end(child);
    assert!(succeed(quire(&data).args(["ingest", "note.txt"])).contains("all new"));
    let cancelled = "quire:commands_total{command=\"ingest\",outcome=\"cancelled\"} 1";
    eventually("the ingest is given up", || server.get("/metrics").text().contains(cancelled));
}

#[test]
fn a_server_that_is_asked_to_stop_says_so_to_what_it_cuts_short() {
    let dir = ingested();
    let data = dir.path().join("data");
    documents(&dir.path().join("many"), 200, 60);
    let mut server = Server::start(&data, &[]);
    let (child, mut stdout) = begin(quire(&data).args(["ingest", "many"]));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    server.terminate();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    let (code, stderr) = end(child);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("is shutting down") && stderr.contains("goes on from there"), "{stderr}");
    assert!(server.wait().success());
    assert!(!data.join("quire.sock").exists() && !data.join("quire.pid").exists());
    // Alone now, it goes on where that ended.
    std::fs::remove_dir_all(dir.path().join("many")).unwrap();
    documents(&dir.path().join("many"), 1, 60);
    assert!(
        succeed(quire(&data).args(["ingest", "many"])).contains("all unchanged"),
        "the first document was reported: {line}"
    );
}

#[test]
fn a_command_waits_until_the_server_has_loaded_its_model() {
    let dir = ingested();
    let data = dir.path().join("data");
    let (mut child, mut stdout) = begin(quire(&data).args(["serve", "--port", "0"]));
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("listening"), "{line}");
    let answer = succeed(quire(&data).args(["ask", &example().question]));
    assert!(answer.starts_with(&example().answer), "{answer}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_second_server_is_refused_and_who_has_the_folder_is_named() {
    let dir = ingested();
    let data = dir.path().join("data");
    let server = Server::start(&data, &[]);
    let id = format!("process id {}", server.child.id());
    fail(quire(&data).args(["serve", "--port", "0"]), 1, &[&id, "one server", "--data-dir"]);
    let found = succeed(quire(&data).arg("doctor"));
    assert!(found.contains(&id) && found.contains("model reference, ready"), "{found}");
    // Who does not want to ask it may look, and is told why no more goes.
    assert!(!succeed(quire(&data).args(["search", "--no-server", "river"])).is_empty());
    succeed(quire(&data).args(["cache", "stats", "--no-server"]));
    for words in [
        &["ask", "Who?"][..],
        &["ingest", "."],
        &["cache", "verify"],
        &["cache", "evict", "--all"],
        &["chat", "--documents"],
    ] {
        fail(quire(&data).args(words).arg("--no-server"), 1, &[&id, "--no-server"]);
    }
    // Nor can it be asked without its socket.
    std::fs::remove_file(data.join("quire.sock")).unwrap();
    for words in [&["ask", "Who?"][..], &["ingest", "."], &["cache", "evict", "--all"]] {
        fail(quire(&data).args(words), 1, &[&id, "cannot be asked", "quire.sock", "Stop that one"]);
    }
    let output = quire(&data).args(["search", "river"]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success() && !stdout.is_empty() && stderr.contains("done without it"), "{stdout}{stderr}");
    assert!(succeed(quire(&data).arg("doctor")).contains("cannot be asked"));
}

#[test]
fn settings_of_the_server_are_not_changed_by_a_command_and_it_says_so() {
    let dir = ingested();
    let data = dir.path().join("data");
    let server = Server::start(&data, &["--threads", "2"]);
    let question = example().question;
    let other = root().join("tests/fixtures/golden/llama3");
    let other = other.to_str().unwrap();
    fail(
        quire(&data).args(["ask", &question, "--tenant", "b"]),
        2,
        &["tenant", "flag", "running server", "Leave --tenant out"],
    );
    let mut command = Command::new(support::binary());
    support::clean(&mut command, &data);
    let id = server.child.id().to_string();
    fail(
        command.arg("-d").arg(&data).args(["ask", &question, "--model", other]),
        2,
        &["model", &id, other, "eval/models/reference"],
    );
    let output = quire(&data).args(["ask", &question, "--threads", "1"]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(stdout.starts_with(&example().answer), "{stdout}{stderr}");
    assert!(stderr.contains("--threads 1 (flag --threads) has no effect") && stderr.contains("has 2"), "{stderr}");
    // What a command does not use is no matter in the environment, and refused as a flag; and a link to the model is the model.
    succeed(quire(&data).args(["search", "river"]).env("QUIRE_THREADS", "1").env("QUIRE_TENANT", "b"));
    fail(
        quire(&data).args(["search", "river", "--tenant", "b"]),
        2,
        &["`quire search` does not use --tenant", "`quire ask`"],
    );
    let link = dir.path().join("linked");
    std::os::unix::fs::symlink(support::model(), &link).unwrap();
    let mut command = Command::new(support::binary());
    support::clean(&mut command, &data);
    succeed(command.arg("-d").arg(&data).arg("--model").arg(link).args(["ask", &question]));
}

/// A server in name: the lock, the file, and a socket that answers every request with `answer`.
fn pretend(data: &Path, about: &Value, answer: &str) -> File {
    std::fs::create_dir_all(data).unwrap();
    let mut file = File::create(data.join("quire.pid")).unwrap();
    file.try_lock().unwrap();
    file.write_all(about.to_string().as_bytes()).unwrap();
    let _ = std::fs::remove_file(data.join("quire.sock"));
    let listener = UnixListener::bind(data.join("quire.sock")).unwrap();
    let answer = answer.to_string();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut asked = [0; 4096];
            let number = stream.read(&mut asked).unwrap_or(0);
            let posted = asked[..number].starts_with(b"POST");
            let parts: Vec<&str> = answer.split("\n---\n").collect();
            let _ = stream.write_all(parts[usize::from(posted).min(parts.len() - 1)].as_bytes());
            // What is unread when a connection closes takes the answer with it.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut stream, &mut std::io::sink());
        }
    });
    file
}

#[test]
fn a_server_of_another_version_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let about = |version: &str, protocol: u32| json!({"pid": 4711, "version": version, "protocol": protocol, "socket": "quire.sock", "since_unix": 0});
    let ok = |body: &Value| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.to_string().len());
    let info = |version: &str, protocol: u32| {
        json!({"pid": 4711, "version": version, "protocol": protocol, "model": "m", "model_dir": support::model(),
               "phase": "ready", "settings": {}})
    };
    let (newer, newer_protocol) = (ok(&info("9.9.9", PROTOCOL)), ok(&info(version, 77)));
    let cases = [
        (about("9.9.9", PROTOCOL), ""),
        (about(version, 77), ""),
        (about(version, PROTOCOL), newer.as_str()),
        (about(version, PROTOCOL), &newer_protocol),
    ];
    for (number, (about, answer)) in cases.into_iter().enumerate() {
        let data = dir.path().join(number.to_string());
        let _held = pretend(&data, &about, answer);
        fail(quire(&data).args(["ingest", "."]), 1, &["process id 4711", version, "Stop it"]);
    }
    // One that speaks no such thing, and one that breaks off within an answer.
    let data = dir.path().join("garbage");
    let _held = pretend(&data, &about(version, PROTOCOL), "SSH-2.0-quire\r\n");
    fail(quire(&data).args(["ask", "Who?"]), 1, &["process id 4711", "cannot be asked"]);
    // Who only looks goes on without it.
    assert!(succeed(quire(&data).args(["cache", "stats"])).contains("no chunk store yet"));
    let data = dir.path().join("broken");
    let lines = "{\"event\":{\"begun\":{\"notes\":[]}}}\n{\"event\":{\"text\":\"The keeper\"}}\n";
    let begun = format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{lines}\r\n", lines.len());
    let _held = pretend(&data, &about(version, PROTOCOL), &format!("{}\n---\n{begun}", ok(&info(version, PROTOCOL))));
    let output = quire(&data).args(["ask", "Who?"]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert_eq!((output.status.code(), stdout.as_str()), (Some(1), "The keeper"));
    assert!(stderr.contains("did not complete") && stderr.contains("killed"), "{stderr}");
}

#[test]
fn the_path_of_the_data_folder_may_be_long() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("long".repeat(30)).join("longer".repeat(20)).join("data");
    std::fs::create_dir_all(data.parent().unwrap()).unwrap();
    assert!(data.as_os_str().len() > 240);
    let server = Server::start(&data, &[]);
    std::fs::write(data.parent().unwrap().join("note.txt"), "The lamp of Varn Point was lit in 1851.").unwrap();
    succeed(quire(&data).args(["ingest", "note.txt"]));
    assert!(succeed(quire(&data).args(["search", "lamp"])).contains("note.txt:1"));
    assert!(server.metric("quire:commands_total") >= 1.0);
}

/// Whether this process may become another user, as in a container of CI.
fn is_root() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    status.lines().any(|line| line.starts_with("Uid:\t0\t"))
}

#[test]
fn others_may_not_ask_and_are_told_whose_server_it_is() {
    use std::os::unix::fs::PermissionsExt;
    // Only root can be somebody else.
    if !is_root() {
        return;
    }
    let dir = ingested();
    let data = dir.path().join("data");
    let server = Server::start(&data, &[]);
    let open = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    [dir.path(), &data].into_iter().for_each(|folder| open(folder, 0o777));
    open(&data.join("quire.pid"), 0o644);
    let nobody = PathBuf::from(support::binary());
    let readable = Command::new(&nobody).arg("--version").uid(65534).output();
    if !readable.is_ok_and(|output| output.status.success()) {
        return;
    }
    let asked = |words: &[&str]| {
        let output = quire(&data).args(words).uid(65534).gid(65534).output().unwrap();
        (output.status.code(), texts(&output).1)
    };
    let id = format!("process id {}", server.child.id());
    // The socket is for its user alone; and where it is opened to all, the server asks who comes.
    for (mode, part) in [(0o600, "Permission denied"), (0o666, "its own user and of root only")] {
        open(&data.join("quire.sock"), mode);
        let (code, stderr) = asked(&["ask", "Who?"]);
        assert_eq!(code, Some(1), "{stderr}");
        assert!(stderr.contains(&id) && stderr.contains(part), "{stderr}");
    }
}

#[test]
fn a_document_that_only_the_asker_can_read_is_named_as_such() {
    if !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let data = dir.path().join("data");
    let open = quire(&data).arg("--version").uid(65534).gid(65534).output();
    if !open.is_ok_and(|output| output.status.success()) {
        return;
    }
    let (mut child, mut stdout) =
        begin(quire(&data).args(["serve", "--port", "0", "--device", "cpu"]).uid(65534).gid(65534));
    let mut line = String::new();
    while !line.contains("ready") {
        line.clear();
        if stdout.read_line(&mut line).unwrap() == 0 {
            let (_, stderr) = end(child);
            // The model may lie where nobody else can read it.
            assert!(stderr.contains("ermission"), "{stderr}");
            return;
        }
    }
    let secret = dir.path().join("secret.txt");
    std::fs::write(&secret, "The lamp of Varn Point was lit in 1851.").unwrap();
    std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&secret, Some(0), Some(0)).unwrap();
    fail(quire(&data).args(["ingest", "secret.txt"]), 1, &["secret.txt", "the running server cannot"]);
    child.kill().unwrap();
    child.wait().unwrap();
}
