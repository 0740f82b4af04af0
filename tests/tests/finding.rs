//! Passages between the question and the answer: which are found, which are left out, and where that is said.
#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;

use serde_json::{Value, json};
use support::{Server, ingested, quire, root, succeed, texts};

const QUESTION: &str = "In which locker does Jonas Tarbelow keep the spare key?";

fn ask(question: &str, max_tokens: u64, stream: bool) -> Value {
    json!({"model": "reference", "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens,
           "stream": stream, "quire": {"collection": "default", "top_chunks": 8}})
}

/// A data folder with all example documents.
fn examples() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut documents: Vec<_> =
        std::fs::read_dir(root().join("examples")).unwrap().map(|entry| entry.unwrap().path()).collect();
    documents.retain(|path| path.file_name().unwrap().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()));
    succeed(quire(&dir.path().join("data")).arg("ingest").args(documents));
    dir
}

fn write(folder: &Path, documents: &[(&str, &str)]) {
    std::fs::create_dir_all(folder).unwrap();
    for (name, text) in documents {
        std::fs::write(folder.join(name), text).unwrap();
    }
}

/// The objects of a stream of server-sent events.
fn events(text: &str) -> Vec<Value> {
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
}

#[test]
fn a_long_answer_that_is_asked_for_leaves_the_passages_alone() {
    let dir = examples();
    let server = Server::start(&dir.path().join("data"), &[]);
    for max_tokens in [256, 8_000, 32_500, 32_740, 32_768, 100_000] {
        let response = server.chat(&ask(QUESTION, max_tokens, false));
        let answer = response.json();
        let text = answer["choices"][0]["message"]["content"].as_str().unwrap().trim();
        let passages = answer["quire"]["citations"].as_array().unwrap().len();
        assert_eq!((text, passages), ("4172", 8), "{max_tokens}: {answer}");
        // What does not fit is said in both places, and nowhere else.
        let notes = answer["quire"]["notes"].to_string();
        let clipped = max_tokens > 30_000;
        assert_eq!(notes.contains("does not fit the context"), clipped, "{max_tokens}: {notes}");
        assert_eq!(response.header("x-quire-notes").is_some(), clipped, "{max_tokens}");
    }
    let response = server.chat(&ask(QUESTION, 100_000, true));
    assert!(response.header("x-quire-notes").unwrap().contains("instead of 100000"));
    let first = &events(&response.text())[0];
    assert_eq!(first["choices"][0]["delta"]["content"], "");
    assert!(first["quire"]["notes"][0].as_str().unwrap().contains("instead of 100000"), "{first}");
}

#[test]
fn an_answer_without_passages_says_so_before_it_begins() {
    let dir = ingested();
    let data = dir.path().join("data");
    let output = quire(&data).args(["ask", "Xyzzy plugh?", "--max-tokens", "8"]).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(stderr.contains("note: no passage of the collection shares a word") && !stdout.contains("no passage of"));
    let server = Server::start(&data, &[]);
    let response = server.chat(&ask("Xyzzy plugh?", 8, true));
    let header = response.header("x-quire-notes").unwrap().to_string();
    assert!(header.starts_with("no passage of the collection"), "{header}");
    assert_eq!(events(&response.text())[0]["quire"]["notes"], json!([header]));
    // Nothing is said where nothing is to be said.
    let response = server.chat(&ask("Who is it?", 8, true));
    assert_eq!(response.header("x-quire-notes"), None);
    assert_eq!(events(&response.text())[0].get("quire"), None);
}

#[test]
fn a_question_of_200_000_words_is_refused() {
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &[]);
    let question: String = (0..200_000).map(|word| format!("w{word} ")).collect();
    for collection in [json!({"collection": "default"}), Value::Null] {
        let mut body = ask(&question, 16, false);
        body["quire"] = collection;
        let refused = server.chat(&body);
        let error = &refused.json()["error"];
        assert_eq!((refused.status, error["code"].as_str()), (400, Some("context_length_exceeded")), "{error}");
    }
}

#[test]
fn copies_of_a_passage_and_scripts_without_spaces_hide_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (data, folder) = (dir.path().join("data"), dir.path().join("documents"));
    let copy = "Where is the spare key of the lighthouse kept? For questions about the spare key of the lighthouse, ask \
                the desk.\n";
    let names: Vec<String> = (1..=8).map(|number| format!("copy{number}.txt")).collect();
    let mut documents: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), copy)).collect();
    documents.extend([
        ("keeper.txt", "Notes of the keeper, May. The spare key is kept in locker 4417, behind the oil store.\n"),
        ("zh.txt", "阿明把备用钥匙放在第四四一七号储物柜里。图书馆每天早上九点开门，星期一休息。\n"),
        ("ko.txt", "예비 열쇠는 도서관 안내 데스크에 있습니다. 도서관은 월요일에 쉽니다.\n"),
        ("nfd.txt", "The cafe\u{301} Zu\u{308}rich opens at seven.\n"),
    ]);
    write(&folder, &documents);
    succeed(quire(&data).arg("ingest").arg(&folder));
    for (query, name) in [
        ("where is the spare key of the lighthouse", "keeper.txt"),
        ("备用钥匙", "zh.txt"),
        ("图书馆", "zh.txt"),
        ("열쇠", "ko.txt"),
        ("도서관", "ko.txt"),
        ("café", "nfd.txt"),
        ("zurich", "nfd.txt"),
    ] {
        let found = succeed(quire(&data).args(["search", query, "--json", "--top-chunks", "8"]));
        assert!(found.contains(name), "{query}:\n{found}");
        assert!(found.matches("copy").count() <= 1, "{query}:\n{found}");
    }
}
