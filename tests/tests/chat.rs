//! `quire chat`: a conversation is the same whether it comes from a pipe, a terminal or the API; and it survives what is
//! typed wrong, ended early or too long.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use support::{Server, example, fail, ingested, python, quire, root, succeed, texts};

/// Runs a conversation from a pipe to its end.
fn chat(data: &Path, flags: &[&str], input: &[u8]) -> Output {
    let mut command = quire(data);
    command.arg("chat").args(flags).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A program that has ended reads no more.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// The turns of a conversation from a pipe, and what was said beside them.
fn turns(data: &Path, flags: &[&str], input: &str) -> (Vec<Value>, String) {
    let output = chat(data, &[&["--json"], flags].concat(), input.as_bytes());
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{stdout}\n{stderr}");
    (stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect(), stderr)
}

/// A conversation that must fail.
fn fails(data: &Path, flags: &[&str], input: &[u8], code: i32, parts: &[&str]) {
    let output = chat(data, flags, input);
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{stdout}\n{stderr}");
    parts.iter().for_each(|part| assert!(stderr.contains(part), "expected `{part}` in: {stderr}"));
}

fn text(turn: &Value) -> &str {
    turn["answer"]["text"].as_str().unwrap()
}

fn prompt_tokens(turn: &Value) -> u64 {
    turn["answer"]["stats"]["prompt_tokens"].as_u64().unwrap()
}

const FACTS: &str = "The lamp of Varn Point was lit in 1851. The keeper of Varn Point is Ada Thorne. ";

#[test]
fn a_conversation_is_what_the_api_makes_of_its_messages() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    // It holds the data folder; a conversation without documents needs none.
    let server = Server::start(&data, &["--max-tokens", "24"]);
    let questions =
        [format!("{FACTS}Who is the keeper of Varn Point?"), "When was the lamp lit?".into(), "Who?".into()];
    let (turns, _) = turns(&data, &["--max-tokens", "24"], &(questions.join("\n") + "\n"));
    assert_eq!(turns.len(), 3);
    let mut messages = Vec::new();
    for (turn, question) in turns.iter().zip(&questions) {
        messages.push(json!({"role": "user", "content": question}));
        let served = server.chat(&json!({"model": "reference", "messages": messages})).json();
        let answer = &served["choices"][0]["message"]["content"];
        assert_eq!((&turn["answer"]["text"], turn["question"].as_str()), (answer, Some(question.as_str())));
        assert_eq!(json!(prompt_tokens(turn)), served["usage"]["prompt_tokens"]);
        messages.push(json!({"role": "assistant", "content": answer}));
    }
    assert!(prompt_tokens(&turns[0]) < prompt_tokens(&turns[1]) && prompt_tokens(&turns[1]) < prompt_tokens(&turns[2]));
    assert_eq!((&turns[2]["turn"], &turns[2]["turns_forgotten"]), (&json!(3), &json!(0)));

    // For people: the answers alone, everything else beside them.
    let output = chat(&data, &["--max-tokens", "24", "--stats"], questions.join("\n").as_bytes());
    let (stdout, stderr) = texts(&output);
    let answers: String = turns.iter().map(|turn| format!("{}\n", text(turn))).collect();
    assert_eq!(stdout, answers);
    assert!(stderr.contains(&format!("(2 turns; prompt of {} tokens", prompt_tokens(&turns[1]))), "{stderr}");
    assert!(!stderr.contains("> "), "no prompt where nobody types: {stderr}");
}

#[test]
fn texts_of_several_lines_and_commands() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let input = "one two\nthree\n/clear\none two\n\n/help\nfour\\\nfive\n/clear\n\"\"\"\nfour\nfive\n\"\"\"\n /help\n/exit\nnever";
    let (turns, stderr) = turns(&data, &["--max-tokens", "4"], input);
    let asked: Vec<&str> = turns.iter().map(|turn| turn["question"].as_str().unwrap()).collect();
    assert_eq!(asked, ["one two", "three", "one two", "four\nfive", "four\nfive", " /help"]);
    assert!(stderr.contains("/system TEXT"), "{stderr}");
    // What was said before is forgotten.
    assert_eq!((text(&turns[2]), prompt_tokens(&turns[2])), (text(&turns[0]), prompt_tokens(&turns[0])));
    assert!(prompt_tokens(&turns[3]) > prompt_tokens(&turns[4]));
}

#[test]
fn a_line_of_a_pipe_that_begins_with_a_slash_and_is_no_command_is_a_question() {
    let dir = tempfile::tempdir().unwrap();
    let (turns, stderr) =
        turns(&dir.path().join("data"), &["--max-tokens", "4"], "/etc/hosts is what?\n/exit now\nx\n");
    let asked: Vec<&str> = turns.iter().map(|turn| turn["question"].as_str().unwrap()).collect();
    assert_eq!(asked, ["/etc/hosts is what?", "/exit now", "x"]);
    assert!(stderr.contains("`/etc/hosts` is no command") && stderr.contains("`/exit` is no command"), "{stderr}");
}

#[test]
fn the_oldest_turns_make_way_once_the_context_is_full() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let flags = ["--max-context", "128", "--max-tokens", "16"];
    let lines: String = (0..12).map(|i| format!("The boat number {i} lies in the harbour. Where?\n")).collect();
    let (told, stderr) = turns(&data, &flags, &lines);
    assert_eq!(told.len(), 12);
    assert!(told.iter().all(|turn| prompt_tokens(turn) <= 112), "{told:?}");
    let forgotten: Vec<u64> = told.iter().map(|turn| turn["turns_forgotten"].as_u64().unwrap()).collect();
    assert_eq!(forgotten[0], 0);
    assert!(forgotten.iter().sum::<u64>() > 3, "{forgotten:?}");
    let times = forgotten.iter().filter(|n| **n > 0).count();
    assert_eq!(stderr.matches("the context is full: the oldest").count(), times, "{stderr}");
    // A question that fits nowhere.
    let long = "The boat lies in the harbour. ".repeat(40);
    fails(&data, &flags, format!("one\n{long}\n").as_bytes(), 1, &["context", "the limit is 112", "Shorten"]);
}

#[test]
fn over_documents_a_turn_is_answered_as_a_question_is() {
    let dir = ingested();
    let data = dir.path().join("data");
    let example = example();
    let asked: Value = serde_json::from_str(&succeed(quire(&data).args(["ask", &example.question, "--json"]))).unwrap();
    let input = format!("{}\nWhy?\n", example.question);
    for flags in [["--documents"].as_slice(), &["--collection", "default"]] {
        let (turns, _) = turns(&data, flags, &input);
        assert_eq!(text(&turns[0]), asked["answer"]["text"]);
        assert_eq!(turns[0]["answer"]["citations"], asked["answer"]["citations"]);
        assert!(prompt_tokens(&turns[1]) > 0 && turns.len() == 2);
    }
    fails(&data, &["--collection", "absent"], b"x\n", 1, &["collection `absent` does not exist", "quire ingest"]);
}

/// The reference model with a template that refuses instructions.
fn without_instructions(dir: &Path) -> String {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference").canonicalize().unwrap();
    let model = dir.join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(&reference).unwrap() {
        let file = file.unwrap();
        std::os::unix::fs::symlink(file.path(), model.join(file.file_name())).unwrap();
    }
    let template = "{% if messages[0].role == 'system' %}{{ raise_exception('no instructions here') }}{% endif %}";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    model.display().to_string()
}

#[test]
fn what_is_typed_wrong_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    fails(&data, &[], b"a\xff\n", 2, &["standard input", "UTF-8", "offset 1"]);
    // A model that knows no instructions: found before anybody has typed anything.
    let model = without_instructions(dir.path());
    let refused = &["no instructions here"];
    fails(&data, &["--model", &model, "--system", "Be brief."], b"", 1, refused);
    fails(&data, &["--model", &model], b"/system Be brief.\n", 1, refused);
    fails(&data, &["--model", "nowhere"], b"", 1, &["nowhere", "config.json", "missing"]);
    fail(quire(&data).args(["chat", "--temperature", "3"]), 2, &["temperature", "0 to 2"]);
    fail(quire(&data).args(["chat", "--strategy", "magic"]), 2, &["magic", "retrieval"]);
    fail(quire(&data).args(["chat", "Hello"]), 2, &["Hello"]);
    assert_eq!(succeed(quire(&data).arg("chat")), "");
    assert!(!data.exists(), "a conversation without documents leaves nothing");
}

#[test]
fn an_interrupt_ends_the_answer_and_not_the_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = quire(&dir.path().join("data"));
    command
        .args(["chat", "--json", "--max-tokens", "8", "--threads", "1"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&lines.next().unwrap().unwrap()).unwrap();
    let interrupt = || {
        let id = child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &id]).status().unwrap().success());
    };
    stdin.write_all(b"one\n").unwrap();
    let first = next();
    // Reading this takes seconds.
    writeln!(stdin, "{}", "The boat lies in the harbour. ".repeat(2500)).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    interrupt();
    let cancelled = next();
    assert_eq!((cancelled["answer"]["finish_reason"].as_str(), text(&cancelled)), (Some("cancelled"), ""));
    stdin.write_all(b"one\n").unwrap();
    let third = next();
    assert_eq!(third["turn"], 3);
    assert!(prompt_tokens(&third) < 100 && prompt_tokens(&third) > prompt_tokens(&first), "{third}");
    // With nothing to end, the conversation ends.
    interrupt();
    assert!(child.wait().unwrap().success());
}

#[test]
fn on_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let mut words = quire(&dir.path().join("data"));
    words.args(["chat", "--max-tokens", "8", "--threads", "1"]);
    let mut command = Command::new(python("pty"));
    command.arg(root().join("tests/chat_terminal.py")).arg(words.get_program()).args(words.get_args());
    support::clean(&mut command, &dir.path().join("data"));
    command.envs(words.get_envs().filter_map(|(key, value)| Some((key, value?)))).env("TERM", "xterm");
    let history = dir.path().join("state/quire/chat_history");
    let private = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o077 == 0;
    assert_eq!(succeed(&mut command).trim(), "ok");
    let typed = std::fs::read_to_string(&history).unwrap();
    assert!(typed.contains("/help") && typed.contains("one\\ntwo\\nthree"), "{typed}");
    assert!(private(&history) && private(history.parent().unwrap()));

    std::fs::remove_file(&history).unwrap();
    succeed(command.arg("--no-history"));
    assert!(!history.exists());
}

#[test]
fn a_pipe_whose_reader_has_gone_ends_the_conversation() {
    let dir = tempfile::tempdir().unwrap();
    for flags in [&["--json"][..], &[]] {
        let mut command = quire(&dir.path().join("data"));
        command.args(["chat", "--max-tokens", "4"]).args(flags).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"one\n").unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        stdout.read_line(&mut String::new()).unwrap();
        drop(stdout);
        // The input does not end.
        support::eventually("the conversation ends", || {
            let _ = stdin.write_all(b"one\n");
            child.try_wait().unwrap().is_some()
        });
        assert!(child.wait().unwrap().success());
    }
}
