//! Files and vector stores over HTTP: through the public `openai` clients, across restarts, and when their time has come.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread::JoinHandle;

use serde_json::{Value, json};
use service::{
    AttachRequest, AttachmentState, Chunking, DocumentName, DocumentsCommand, DocumentsEvent, PageRequest, Purpose,
    Service, StoreChange, StoreSettings,
};
use settings::Settings;
use support::{Response, Server, eventually, example, ingested, model, python, read, request, root, send, texts};

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

/// Runs a client of `tests` against a server and expects it to be content.
fn content(client: &mut Command, server: &Server, more: &[&Path]) {
    let example = example();
    client.args([format!("http://{}/v1", server.address), "secret-7".into(), "reference".into()]);
    let output = client.args([&example.question, &example.answer]).args(more).output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success() && stdout.trim() == "ok", "{stdout}\n{stderr}");
}

#[test]
fn the_public_openai_client_uploads_attaches_searches_and_deletes() {
    let python = python("openai");
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &["--api-key", "secret-7", "--upload-limit-bytes", "8M"]);
    let documents = example().documents;
    let script = root().join("tests/vector_stores_client.py");
    content(Command::new(python).arg(script), &server, &[&documents[0], &documents[1]]);
}

#[test]
fn the_public_openai_client_for_node_does_so_too() {
    let Some(node) = std::env::var_os("QUIRE_TEST_NODE") else {
        eprintln!("not tested: QUIRE_TEST_NODE names no folder with the `openai` package for Node");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--api-key", "secret-7"]);
    let script = root().join("tests/vector_stores_client.mjs");
    content(Command::new("node").arg(script).env("QUIRE_TEST_NODE", node), &server, &[&example().documents[0]]);
}

/// The blocks of a language in a Markdown file.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let parts = text.split("```").skip(1).step_by(2);
    parts.filter_map(|part| part.strip_prefix(language)?.strip_prefix('\n')).map(str::to_string).collect()
}

#[test]
fn the_retrievers_of_the_documentation_find_passages() {
    let guide = std::fs::read_to_string(root().join("docs/clients.md")).unwrap();
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &[]);
    let stores = server.get("/v1/vector_stores").json();
    let store = stores["data"][0]["id"].as_str().unwrap();
    let found: Vec<String> = blocks(&guide, "python").into_iter().filter(|block| block.contains("Retriever")).collect();
    assert_eq!(found.len(), 2, "{guide}");
    for (block, package) in found.iter().zip(["langchain_core", "llama_index.core"]) {
        assert!(block.contains(package), "{block}");
        let example = example();
        let block = block
            .replace("http://127.0.0.1:8080", &format!("http://{}", server.address))
            .replace("VECTOR_STORE_ID", store)
            .replace("QUESTION", &example.question);
        let output = Command::new(python(package)).args(["-c", &block]).output().unwrap();
        let (stdout, stderr) = texts(&output);
        assert!(output.status.success(), "{block}\n{stdout}\n{stderr}");
        assert!(stdout.to_lowercase().contains(&example.answer.to_lowercase()), "{block}\n{stdout}\n{stderr}");
    }
}

/// A form with one file, as bytes, and its header.
fn form(name: &str, text: &str) -> (String, Vec<u8>) {
    let body = format!(
        "--edge\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nassistants\r\n--edge\r\nContent-Disposition: \
         form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n{text}\r\n--edge--\r\n"
    );
    ("multipart/form-data; boundary=edge".into(), body.into_bytes())
}

fn upload(server: &Server, name: &str, text: &str) -> String {
    let (kind, body) = form(name, text);
    let made = request(server.address, "POST", "/v1/files", &[("content-type", &kind)], &body);
    assert_eq!(made.status, 200, "{}", made.text());
    made.json()["id"].as_str().unwrap().into()
}

fn post(server: &Server, path: &str, body: Value) -> Response {
    request(server.address, "POST", path, JSON, body.to_string().as_bytes())
}

#[test]
fn files_that_were_attached_are_read_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let text = |number: usize| -> String {
        let lines = (0..400).map(|line| format!("Line {line} of the book {number} about the moon over the marsh.\n\n"));
        lines.collect()
    };
    let mut server = Server::start(&data, &[]);
    let files: Vec<String> = (0..3).map(|number| upload(&server, &format!("{number}.txt"), &text(number))).collect();
    let store = post(&server, "/v1/vector_stores", json!({"file_ids": files})).json();
    assert_eq!((&store["status"], &store["file_counts"]["total"]), (&json!("in_progress"), &json!(3)));
    let path = format!("/v1/vector_stores/{}", store["id"].as_str().unwrap());
    // No time for anything.
    server.child.kill().unwrap();
    server.wait();
    // What an upload leaves that was cut off is swept.
    std::fs::write(data.join("files").join(format!("partial-{}", "0".repeat(24))), "x").unwrap();
    let server = Server::start(&data, &[]);
    eventually("all files are read", || server.get(&path).json()["file_counts"]["completed"] == 3);
    let found = post(&server, &format!("{path}/search"), json!({"query": "moon over the marsh book 2"})).json();
    assert!(found["data"].as_array().unwrap().iter().any(|hit| hit["filename"] == "2.txt"), "{found}");
    let kept = || std::fs::read_dir(data.join("files")).unwrap().count();
    assert_eq!(kept(), 3, "{:?}", std::fs::read_dir(data.join("files")).unwrap().collect::<Vec<_>>());
    // Uploads that are not completed leave nothing, and do not disturb others.
    let (kind, body) = form("cut.txt", &text(4));
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut cut = TcpStream::connect(server.address).unwrap();
    cut.write_all(head.as_bytes()).unwrap();
    cut.write_all(&body[..body.len() / 2]).unwrap();
    eventually("the upload has begun", || kept() == 4);
    drop(cut);
    eventually("the upload that was cut off is gone", || kept() == 3);
}

#[test]
fn a_lazy_server_has_files_found_at_once_and_computes_chunks_at_their_first_use() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--lazy", "--chunk-tokens", "64"]);
    let document = &example().documents[0];
    let text = std::fs::read_to_string(document).unwrap();
    let file = upload(&server, document.file_name().unwrap().to_str().unwrap(), &text);
    let store =
        post(&server, "/v1/vector_stores", json!({"file_ids": [file]})).json()["id"].as_str().unwrap().to_string();
    let path = format!("/v1/vector_stores/{store}/files/{file}");
    eventually("the file is read", || server.get(&path).json()["status"] == "completed");
    let size = &server.get(&path).json()["chunking_strategy"]["static"]["max_chunk_size_tokens"];
    assert_eq!(size, 64);
    let ask = || {
        let body = json!({"messages": [{"role": "user", "content": example().question}], "max_tokens": 4,
                          "quire": {"collection": store, "top_chunks": 3}});
        server.chat(&body).json()["quire"]["stats"]["chunks_computed"].clone()
    };
    assert_eq!((ask(), ask()), (json!(3), json!(0)));
}

#[test]
fn wrong_forms_are_refused_with_what_was_expected() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--upload-limit-bytes", "100K"]);
    let refused = |kind: &str, body: &[u8], status: u16, code: &str| {
        let response = read(send(server.address, "POST", "/v1/files", &[("content-type", kind)], body));
        assert_eq!((response.status, &response.json()["error"]["code"]), (status, &json!(code)), "{}", response.text());
    };
    let (kind, body) = form("a.txt", "text");
    refused("application/json", b"{}", 415, "unsupported_media_type");
    refused("multipart/form-data", &body, 400, "invalid_form");
    refused(&kind, &body[..body.len() - 20], 400, "invalid_form");
    refused(&kind, b"--edge--\r\n", 400, "invalid_value");
    let (kind, body) = form("a.txt", &"x".repeat(101 << 10));
    refused(&kind, &body, 413, "file_too_large");
    let (kind, body) = form("a.txt", &"x".repeat(3 << 20));
    refused(&kind, &body, 413, "file_too_large");
    assert_eq!(server.get("/v1/files").json()["data"], json!([]));
    assert_eq!(std::fs::read_dir(dir.path().join("data/files")).unwrap().count(), 0);
}

#[test]
fn an_upload_goes_to_disk_and_not_into_memory() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &[]);
    let most = || -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    upload(&server, "small.txt", "text");
    let before = most();
    upload(&server, "large.txt", &"x".repeat(160 << 20));
    let grown = (most() - before) >> 10;
    assert!(grown < 40, "{grown} MiB");
}

/// Whether any file below a folder has these bytes.
fn somewhere(folder: &Path, bytes: &[u8]) -> Option<std::path::PathBuf> {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let found = match path.is_dir() {
            true => somewhere(&path, bytes),
            false => {
                let content = std::fs::read(&path).unwrap_or_default();
                content.windows(bytes.len()).any(|window| window == bytes).then_some(path)
            }
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// A service of its own with somebody who works in the background.
struct Working {
    service: Arc<Service>,
    worker: Option<JoinHandle<()>>,
}

impl Working {
    fn open(data: &Path) -> Working {
        let settings = Settings { data_dir: data.into(), model: Some(model()), ..Settings::default() };
        let service = Arc::new(Service::open(&settings, Purpose::Serve).unwrap());
        service.recover();
        let at_work = Arc::clone(&service);
        Working { service, worker: Some(std::thread::spawn(move || at_work.work())) }
    }

    fn upload(&self, name: &str, text: &str, seconds: Option<u64>) -> String {
        let mut upload = self.service.begin_upload(1 << 20).unwrap();
        upload.write(text.as_bytes()).unwrap();
        self.service.finish_upload(upload, name, "assistants", seconds).unwrap().id
    }

    fn attach(&self, store: &str, file: &str) {
        let request = AttachRequest { file: file.into(), attributes: None, chunking: Chunking::Auto };
        self.service.attach_one(store, request).unwrap();
    }

    fn is_completed(&self, store: &str, file: &str) -> bool {
        self.service.store_file(store, file).is_ok_and(|found| found.state == AttachmentState::Completed)
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.service.stop_working();
        self.worker.take().unwrap().join().unwrap();
        self.service.engine().shutdown();
    }
}

/// Random letters, so that no compression hides them.
const MARKER: &str = "zqvxkjwpybfghqzxvkwjqpyx";

#[test]
fn a_file_whose_time_has_come_is_gone_to_the_last_byte() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let kept = 5;
    let (store, lasting, brief) = {
        let working = Working::open(&data);
        let store = working.service.create_store(StoreSettings::default(), &[]).unwrap().id;
        let lasting = working.upload("lasting.txt", "A text that lasts.", None);
        let brief = working.upload("brief.txt", &format!("The word is {MARKER}."), Some(kept));
        working.attach(&store, &lasting);
        working.attach(&store, &brief);
        eventually("both files are read", || [&lasting, &brief].iter().all(|file| working.is_completed(&store, file)));
        assert!(somewhere(&data, MARKER.as_bytes()).is_some());
        std::thread::sleep(std::time::Duration::from_secs(kept));
        // Gone for whoever asks, before it is removed.
        working.service.file(&brief, "file_id").unwrap_err();
        (store, lasting, brief)
    };
    // The next start removes what has expired meanwhile.
    let working = Working::open(&data);
    eventually("the file is out of its store", || working.service.store_file(&store, &brief).is_err());
    eventually("its bytes are gone", || somewhere(&data, MARKER.as_bytes()).is_none());
    assert!(working.is_completed(&store, &lasting));
}

#[test]
fn a_store_that_nobody_uses_is_emptied_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let (store, file) = {
        let working = Working::open(&data);
        let store = working.service.create_store(StoreSettings::default(), &[]).unwrap().id;
        let file = working.upload("notes.txt", &format!("The word is {MARKER}."), None);
        working.attach(&store, &file);
        eventually("the file is read", || working.is_completed(&store, &file));
        let at_once = StoreChange { expires_after_days: Some(Some(0)), ..StoreChange::default() };
        assert!(working.service.change_store(&store, at_once).unwrap().expired);
        (store, file)
    };
    let working = Working::open(&data);
    eventually("the store is empty", || working.service.store_by_id(&store).unwrap().files.total == 0);
    assert!(working.service.store_by_id(&store).unwrap().expired);
    let request = AttachRequest { file: file.clone(), attributes: None, chunking: Chunking::Auto };
    working.service.attach_one(&store, request).unwrap_err();
    // The file itself is the client's, and stays until it is deleted.
    working.service.file(&file, "file_id").unwrap();
    working.service.delete_file(&file).unwrap();
    working.service.delete_store(&store).unwrap();
    working.service.library().erase().unwrap();
    assert_eq!(somewhere(&data, MARKER.as_bytes()), None);
}

/// What a command over documents tells, in short.
fn told(working: &Working, command: DocumentsCommand) -> Vec<String> {
    let mut told = Vec::new();
    let done = working.service.manage_documents(&command, &mut |event| {
        told.push(match event {
            DocumentsEvent::Removed { name } => format!("-{name}"),
            DocumentsEvent::Restored { name, .. } => format!("+{name}"),
            DocumentsEvent::Reclaimed { collections, documents, .. } => format!("{collections} {documents}"),
            other => format!("{other:?}"),
        });
    });
    done.unwrap();
    told
}

#[test]
fn what_was_deleted_comes_back_with_its_rows_until_space_is_reclaimed() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let working = Working::open(&data);
    let service = &working.service;
    let store = service.create_store(StoreSettings::default(), &[]).unwrap().id;
    let file = working.upload("notes.txt", &format!("The word is {MARKER}."), None);
    let attributes: serde_json::Map<String, Value> = [("year".to_string(), json!(1851))].into_iter().collect();
    let request = |attributes| AttachRequest { file: file.clone(), attributes, chunking: Chunking::Auto };
    service.attach_one(&store, request(Some(attributes.clone()))).unwrap();
    eventually("the file is read", || working.is_completed(&store, &file));
    let restore = |name: &str| {
        let names = Vec::from_iter((!name.is_empty()).then(|| DocumentName::here(name)));
        told(&working, DocumentsCommand::Restore { collection: store.clone(), names })
    };
    let is_whole = || {
        assert!(working.is_completed(&store, &file));
        assert_eq!(service.store_file(&store, &file).unwrap().attributes, attributes);
        assert_eq!(service.store_by_id(&store).unwrap().files.total, 1);
        assert_eq!(service.search(&store, MARKER, 9).unwrap().len(), 1);
        assert!(service.file_content(&file, "file_id").is_ok());
    };
    // Out of its store, deleted with the file, and with the whole store.
    service.detach(&store, &file).unwrap();
    assert!(service.store_file(&store, &file).is_err() && service.search(&store, MARKER, 9).unwrap().is_empty());
    assert_eq!(restore(&file), [format!("+{file}/notes.txt")]);
    is_whole();
    service.delete_file(&file).unwrap();
    let page = PageRequest { after: None, before: None, limit: 9, newest_first: true };
    assert!(service.file(&file, "file_id").is_err() && service.files(None, &page).unwrap().data.is_empty());
    assert!(service.attach_one(&store, request(None)).is_err());
    assert_eq!(restore(&format!("{file}/notes.txt")), [format!("+{file}/notes.txt")]);
    is_whole();
    service.delete_store(&store).unwrap();
    assert!(service.store_by_id(&store).is_err());
    assert_eq!(restore(""), [format!("+{store}")]);
    is_whole();
    // The command line removes it from the store, too.
    let names = vec![DocumentName::here(&file)];
    told(&working, DocumentsCommand::Remove { collection: store.clone(), names, now: false });
    assert!(service.store_file(&store, &file).is_err() && service.file(&file, "file_id").is_ok());
    // Attached again, it takes what it is given.
    let other: serde_json::Map<String, Value> = [("year".to_string(), json!(1852))].into_iter().collect();
    service.attach_one(&store, request(Some(other.clone()))).unwrap();
    eventually("the file is read again", || working.is_completed(&store, &file));
    assert_eq!(service.store_file(&store, &file).unwrap().attributes, other);
    service.attach_one(&store, request(Some(attributes.clone()))).unwrap();
    is_whole();
    // Reclaiming counts what was deleted, and leaves nothing of it.
    service.delete_file(&file).unwrap();
    service.delete_store(&store).unwrap();
    let reclaimed = told(&working, DocumentsCommand::Reclaim);
    assert!(reclaimed[0].starts_with("1 ") && reclaimed[0] != "1 0", "{reclaimed:?}");
    assert_eq!(somewhere(&data, MARKER.as_bytes()), None);
}

#[test]
fn clients_at_the_same_time_do_not_disturb_one_another() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &[]);
    let store = post(&server, "/v1/vector_stores", json!({})).json()["id"].as_str().unwrap().to_string();
    let path = format!("/v1/vector_stores/{store}");
    let client = |number: usize| {
        for round in 0..4 {
            let word = format!("word{number}x{round}");
            let file = upload(&server, &format!("{word}.txt"), &format!("This is about {word} and nothing else."));
            let body = json!({"file_id": file, "attributes": {"client": number}});
            assert_eq!(post(&server, &format!("{path}/files"), body).status, 200);
            let attached = format!("{path}/files/{file}");
            eventually("the file is read", || server.get(&attached).json()["status"] == "completed");
            let only = json!({"type": "eq", "key": "client", "value": number});
            let found = post(&server, &format!("{path}/search"), json!({"query": word, "filters": only})).json();
            assert_eq!(found["data"][0]["file_id"], json!(file), "{found}");
            if round % 2 == 0 {
                let deleted = request(server.address, "DELETE", &format!("/v1/files/{file}"), &[], b"");
                assert_eq!(deleted.json()["deleted"], true);
                assert_eq!(server.get(&attached).status, 404);
            }
        }
    };
    std::thread::scope(|scope| (0..6).for_each(|number| drop(scope.spawn(move || client(number)))));
    let counts = server.get(&path).json()["file_counts"].clone();
    assert_eq!((&counts["completed"], &counts["total"]), (&json!(12), &json!(12)));
    assert_eq!(server.get("/v1/files").json()["data"].as_array().unwrap().len(), 12);
}

#[test]
fn a_server_that_is_killed_at_any_time_keeps_what_it_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let mut server = Server::start(&data, &[]);
    let store = post(&server, "/v1/vector_stores", json!({})).json()["id"].as_str().unwrap().to_string();
    let path = format!("/v1/vector_stores/{store}");
    let (mut kept, mut deleted) = (Vec::new(), Vec::new());
    for round in 0..6u64 {
        for number in 0..4 {
            let text = format!("Round {round} has the number {number} and a word of its own: w{round}n{number}.");
            let file = upload(&server, &format!("{round}-{number}.txt"), &text);
            assert_eq!(post(&server, &format!("{path}/files"), json!({"file_id": file})).status, 200);
            kept.push((file, text));
        }
        let (gone, _) = kept.remove(kept.len() / 2);
        assert_eq!(request(server.address, "DELETE", &format!("/v1/files/{gone}"), &[], b"").status, 200);
        deleted.push(gone);
        std::thread::sleep(std::time::Duration::from_millis(round * 7));
        server.child.kill().unwrap();
        server.wait();
        server = Server::start(&data, &[]);
    }
    eventually("everything is read", || server.get(&path).json()["file_counts"]["completed"] == kept.len());
    for (file, text) in &kept {
        assert_eq!(server.get(&format!("/v1/files/{file}/content")).text(), *text);
        let read = server.get(&format!("{path}/files/{file}/content")).json();
        assert_eq!(read["data"][0]["text"], *text);
        let word = text.rsplit(' ').next().unwrap();
        let found = post(&server, &format!("{path}/search"), json!({"query": word})).json();
        assert_eq!(found["data"][0]["file_id"], json!(file), "{word}: {found}");
    }
    for file in &deleted {
        assert_eq!(server.get(&format!("{path}/files/{file}")).status, 404);
    }
    let found = post(&server, &format!("{path}/search"), json!({"query": "round number word", "max_num_results": 50}));
    let found = found.json();
    assert_eq!(found["data"].as_array().unwrap().len(), kept.len(), "{found}");
}
