//! The server and clients that are slow, rude, many, or pages of somebody else.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use support::{
    Response, Server, eventually, example, fail, ingested, python, quire, read, request, root, send, succeed, texts,
};

const CHAT: &str = "/v1/chat/completions";
const JSON: (&str, &str) = ("content-type", "application/json");

fn short_answer() -> Value {
    json!({"model": "reference", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1})
}

fn endless_answer(stream: bool) -> Value {
    json!({"model": "reference", "messages": [{"role": "user", "content": "Tell me about the harbour."}],
           "max_tokens": 20000, "ignore_eos": true, "stream": stream})
}

fn empty_data() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A request with a `Host` of its own.
fn ask_as(server: &Server, host: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Response {
    let mut connection = TcpStream::connect(server.address).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    write!(connection, "{head}Content-Length: {}\r\n\r\n{body}", body.len()).unwrap();
    read(connection)
}

/// Writes the beginning of a request and leaves it at that.
fn begin(server: &Server, text: &str) -> TcpStream {
    let mut connection = TcpStream::connect(server.address).unwrap();
    connection.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    connection.write_all(text.as_bytes()).unwrap();
    connection
}

fn head_of_chat(more: &str) -> String {
    format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}\r\n\r\n")
}

#[test]
fn connections_that_never_finish_a_request_keep_nobody_out() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--max-connections", "16"]);
    let beginnings =
        [String::new(), "GET /livez HTTP/1.1\r\nHost: localh".into(), head_of_chat("Content-Length: 1000") + "{"];
    let mut open: Vec<TcpStream> = (0..96).map(|i| begin(&server, &beginnings[i % 3])).collect();
    for connection in &mut open {
        let _ = connection.write(b"x");
    }
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.chat(&short_answer()).status, 200);
    assert!(server.metric("quire:connections_cut_total{reason=\"evicted\"}") >= 80.0);
    assert!(server.metric("quire:connections ") <= 16.0);
}

#[test]
fn an_answer_that_is_being_given_is_never_pushed_out_by_new_connections() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--max-connections", "16"]);
    let mut body = endless_answer(true);
    body["max_tokens"] = json!(300);
    let running = send(server.address, "POST", CHAT, &[JSON], body.to_string().as_bytes());
    eventually("the request runs", || server.metric("vllm:num_requests_running") == 1.0);
    let _open: Vec<TcpStream> = (0..64).map(|_| begin(&server, "GET ")).collect();
    assert_eq!(server.get("/livez").status, 200);
    assert!(read(running).text().contains("data: [DONE]"));
}

#[test]
fn a_request_that_does_not_arrive_in_time_is_given_up() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--header-seconds", "1", "--body-seconds", "1"]);
    for text in ["", "GET /livez HTTP/1.1\r\nHost: localh"] {
        let mut answer = Vec::new();
        begin(&server, text).read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty(), "{}", String::from_utf8_lossy(&answer));
    }
    let late = read(begin(&server, &(head_of_chat("Content-Length: 1000") + "{")));
    assert_eq!((late.status, late.json()["error"]["code"].as_str()), (408, Some("request_timeout")));
    // One that is kept alive may wait as long for its next request, and not longer.
    let mut kept = begin(&server, "GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut answer = String::new();
    kept.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn a_reader_that_stops_reading_loses_its_answer() {
    let dir = empty_data();
    // Every piece carries the model's name: some hundred of them fill what the system keeps for a connection.
    let name = "m".repeat(20_000);
    let server = Server::start(&dir.path().join("data"), &["--write-seconds", "1", "--model-name", &name]);
    let mut body = endless_answer(true);
    body["model"] = json!(name);
    let _unread = send(server.address, "POST", CHAT, &[JSON], body.to_string().as_bytes());
    eventually("the request runs", || server.metric("vllm:num_requests_running") == 1.0);
    eventually("the request is given up", || server.metric("vllm:num_requests_running") == 0.0);
}

#[test]
fn a_body_that_will_not_be_taken_is_refused_before_it_is_sent() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--body-limit-bytes", "100000"]);
    let refused = |head: &str, status: u16, code: &str, param: &str| {
        let response = read(begin(&server, head));
        let error = response.json()["error"].clone();
        assert_eq!(
            (response.status, error["code"].as_str(), error["param"].as_str()),
            (status, Some(code), Some(param))
        );
    };
    let closing = "Connection: close\r\n";
    refused(&head_of_chat(&format!("{closing}Content-Length: 9000000000")), 413, "request_too_large", "body");
    for kind in [
        "",
        "Content-Type: text/plain\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: application/json; charset=latin1\r\n",
    ] {
        let head = format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{kind}{closing}Content-Length: 10\r\n\r\n");
        refused(&head, 415, "unsupported_media_type", "content-type");
    }
    let packed = head_of_chat(&format!("{closing}Content-Encoding: gzip\r\nContent-Length: 10"));
    refused(&packed, 415, "unsupported_encoding", "content-encoding");
    // A length that is not told is counted; and what was sent too much does not keep the refusal from being read.
    let piece = format!("8000\r\n{}\r\n", "x".repeat(0x8000));
    let chunked = head_of_chat(&format!("{closing}Transfer-Encoding: chunked")) + &piece.repeat(4) + "0\r\n\r\n";
    refused(&chunked, 413, "request_too_large", "body");
    let huge = request(server.address, "POST", CHAT, &[JSON], &vec![b' '; 8 << 20]);
    assert_eq!(huge.status, 413);
}

#[test]
fn a_page_of_somebody_else_cannot_use_a_server_without_a_key() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--allowed-hosts", "quire.internal"]);
    let body = short_answer().to_string();
    let post = |host: &str, headers: &[(&str, &str)]| {
        let headers: Vec<_> = std::iter::once(JSON).chain(headers.iter().copied()).collect();
        let response = ask_as(&server, host, "POST", CHAT, &headers, &body);
        let code = response.json()["error"]["code"].as_str().unwrap_or_default().to_string();
        (response.status, code)
    };
    let (own, fine) = (server.address.to_string(), (200, String::new()));
    for host in [own.as_str(), "localhost:8080", "[::1]:8080", "quire.internal"] {
        assert_eq!(post(host, &[]), fine, "{host}");
    }
    // A name that somebody made to point here.
    for path in ["/", "/v1/models", "/metrics", "/absent"] {
        let refused = ask_as(&server, "evil.example:8080", "GET", path, &[], "");
        assert_eq!(
            (refused.status, refused.json()["error"]["code"].as_str()),
            (403, Some("host_not_allowed")),
            "{path}"
        );
    }
    assert_eq!(post("evil.example", &[]), (403, "host_not_allowed".into()));
    assert_eq!(post("localhost:8080", &[("host", "evil.example")]), (403, "host_not_allowed".into()));
    // Probes tell nothing, and come under all names.
    for path in ["/livez", "/readyz", "/health"] {
        assert_eq!(ask_as(&server, "10.1.2.3:8080", "GET", path, &[], "").status, 200);
    }
    for sent in [
        &[("origin", "https://evil.example")][..],
        &[("origin", "null")],
        &[("sec-fetch-site", "cross-site"), ("origin", "https://evil.example")],
        &[("sec-fetch-site", "same-site"), ("origin", "http://localhost:3000")],
    ] {
        assert_eq!(post(&own, sent), (403, "origin_not_allowed".into()), "{sent:?}");
    }
    let from_itself = format!("http://{own}");
    assert_eq!(post(&own, &[("origin", &from_itself), ("sec-fetch-site", "same-origin")]), fine);
    // What a page may send without asking first is no JSON.
    let form = [("content-type", "text/plain"), ("sec-fetch-site", "none")];
    assert_eq!(ask_as(&server, &own, "POST", CHAT, &form, &body).status, 415);
}

#[test]
fn a_server_with_a_key_may_be_called_by_any_name() {
    let dir = empty_data();
    // As a file with a line end gives it.
    let server = Server::start(&dir.path().join("data"), &["--api-key", " secret-7\n"]);
    let (body, key) = (short_answer().to_string(), ("authorization", "Bearer  secret-7 "));
    let post = |headers: &[(&str, &str)]| ask_as(&server, "quire.example", "POST", CHAT, headers, &body).status;
    assert_eq!(post(&[JSON, key]), 200);
    assert_eq!(post(&[JSON, key, ("origin", "https://app.example")]), 200);
    assert_eq!(post(&[JSON]), 401);
    assert_eq!(post(&[JSON, ("authorization", "Bearer secret-77")]), 401);
}

#[test]
fn keys_that_no_client_could_send_are_refused_at_the_start() {
    let dir = empty_data();
    for key in ["", "  ", "schl\u{fc}ssel", "two words"] {
        let stderr =
            fail(quire(&dir.path().join("data")).args(["serve", "--api-key", key]), 2, &["api_key", "expected"]);
        assert!(key.trim().is_empty() || !stderr.contains(key), "{stderr}");
    }
    fail(
        quire(&dir.path().join("data")).args(["serve", "--cors-origins", "app.example"]),
        2,
        &["cors_origins", "https://app.example"],
    );
}

#[test]
fn pages_of_listed_origins_may_use_the_server_and_no_others() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--cors-origins", "https://app.example"]);
    let own = server.address.to_string();
    let asked = [("access-control-request-method", "POST"), ("access-control-request-headers", "content-type,x-more")];
    let preflight = |server: &Server, origin: &str| {
        let headers = [("origin", origin), asked[0], asked[1]];
        ask_as(server, &own, "OPTIONS", CHAT, &headers, "")
    };
    let allowed = preflight(&server, "https://app.example");
    assert_eq!((allowed.status, allowed.header("access-control-allow-origin")), (200, Some("https://app.example")));
    assert_eq!(allowed.header("access-control-allow-headers"), Some("content-type,x-more"));
    assert!(allowed.header("access-control-allow-methods").unwrap().contains("POST"));
    assert_eq!(preflight(&server, "https://evil.example").header("access-control-allow-origin"), None);

    let post = |origin: &str| {
        let headers = [JSON, ("origin", origin), ("sec-fetch-site", "cross-site")];
        ask_as(&server, &own, "POST", CHAT, &headers, &short_answer().to_string())
    };
    let answered = post("https://app.example");
    assert_eq!((answered.status, answered.header("access-control-allow-origin")), (200, Some("https://app.example")));
    assert!(answered.header("access-control-expose-headers").unwrap().contains("x-request-id"));
    let refused = post("https://evil.example");
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (403, None));
    drop(server);

    let closed = Server::start(&dir.path().join("data"), &[]);
    let own = closed.address.to_string();
    let read = ask_as(&closed, &own, "GET", "/v1/models", &[("origin", "https://app.example")], "");
    assert_eq!((read.status, read.header("access-control-allow-origin")), (200, None));
}

#[test]
fn routes_are_found_with_and_without_a_slash_at_their_end() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &[]);
    for path in ["/", "/v1/models", "/v1/models/", "/v1/models/reference/", "/health", "/health/", "/v1/health"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    let body = short_answer().to_string();
    assert_eq!(request(server.address, "POST", "/v1/chat/completions/", &[JSON], body.as_bytes()).status, 200);
    assert_eq!(server.get("/v1/absent/").status, 404);
    assert_eq!(request(server.address, "HEAD", "/health", &[], b"").status, 200);
}

#[test]
fn errors_are_short_name_their_parameter_and_tell_nothing_of_the_machine() {
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &[]);
    let name = "x".repeat(5_000_000);
    let digits = "7".repeat(100_000);
    for (field, value, status, param) in [
        ("model", json!(name), 404, "model"),
        ("max_tokens", json!(digits), 400, "max_tokens"),
        ("quire", json!({"collection": digits}), 400, "quire.collection"),
        ("quire", json!({"collection": "absent"}), 404, "quire.collection"),
        ("quire", json!({"collection": "default", "k": 1_u64 << 40}), 400, "quire.k"),
        ("quire", json!({"collection": "default", "check_layer": 99}), 400, "quire.check_layer"),
        ("messages", json!([{"role": "assistant", "content": "Only I speak."}]), 400, "messages"),
    ] {
        let mut body = short_answer();
        body[field] = value;
        if field == "messages" {
            body["quire"] = json!({"collection": "default"});
        }
        let response = server.chat(&body);
        assert_eq!(response.status, status, "{field}: {}", response.text());
        assert_eq!(response.json()["error"]["param"], param, "{}", response.text());
        assert!(response.body.len() < 4000, "{field}: {} bytes", response.body.len());
        assert!(!response.text().contains("default,") && !response.text().contains(dir.path().to_str().unwrap()));
    }
    let field = request(server.address, "POST", CHAT, &[JSON], format!("{{\"{name}\": 1}}").as_bytes());
    assert_eq!(field.status, 400);
    assert!(field.body.len() < 4000);
    let answer = server
        .chat(&json!({"model": "reference", "messages": [{"role": "user", "content": example().question}],
                "quire": {"collection": "default"}}));
    let (root, data) = (root().to_str().unwrap().to_string(), dir.path().to_str().unwrap().to_string());
    assert!(!answer.json()["quire"]["citations"].as_array().unwrap().is_empty());
    assert!(!answer.text().contains(&root) && !answer.text().contains(&data), "{}", answer.text());
}

#[test]
fn every_request_has_an_id_and_a_line_in_the_log_without_its_texts() {
    let dir = empty_data();
    let log = dir.path().join("log");
    let server = Server::start_logged(&dir.path().join("data"), &log, &["--log", "info"]);
    let secret = "confidential-words";
    let body = json!({"model": "reference", "messages": [{"role": "user", "content": secret}], "max_tokens": 2});
    for stream in [false, true] {
        let mut body = body.clone();
        body["stream"] = json!(stream);
        let id = format!("mine-{stream}");
        let headers = [JSON, ("x-request-id", id.as_str())];
        let answered = request(server.address, "POST", CHAT, &headers, body.to_string().as_bytes());
        assert_eq!((answered.status, answered.header("x-request-id")), (200, Some(id.as_str())));
    }
    for (path, id) in [("/absent%0a%1b[31mINFO", "x".repeat(200)), ("/absent?q=confidential-words", "two words".into())]
    {
        let made = request(server.address, "GET", path, &[("x-request-id", &id)], b"");
        assert!(made.header("x-request-id").unwrap().starts_with("req-"), "{made:?}");
    }
    let hung_up = send(server.address, "POST", CHAT, &[JSON], endless_answer(false).to_string().as_bytes());
    eventually("the request runs", || server.metric("vllm:num_requests_running") == 1.0);
    drop(hung_up);
    let lines = || std::fs::read_to_string(&log).unwrap();
    eventually("a client that went away is logged", || lines().contains("status=499"));
    let text = lines();
    for id in ["mine-false", "mine-true"] {
        let of = |line: &&str| line.contains(&format!("id={id}")) && line.contains("method=");
        let line = text.lines().find(of).unwrap_or_else(|| panic!("no line of {id} in:\n{text}"));
        for part in ["POST", "\"/v1/chat/completions\"", "status=200", "ms=", "completion_tokens=2", "complete"] {
            assert!(line.contains(part), "no {part} in {line}");
        }
        assert!(!line.contains("prompt_tokens=0"), "{line}");
    }
    assert!(text.contains("status=404") && !text.contains(secret) && !text.contains('\u{1b}'), "{text}");
    assert!(!text.lines().any(|line| line.starts_with("INFO")), "{text}");
}

#[test]
fn refusals_and_errors_are_counted_by_status_and_kind() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &[]);
    server.get("/absent");
    server.chat(&json!({"model": "another", "messages": []}));
    server.chat(&short_answer());
    request(server.address, "POST", CHAT, &[], b"{}");
    let count = |series: &str| server.metric(series);
    assert_eq!(count("quire:request_errors_total{status=\"404\",code=\"not_found\"}"), 1.0);
    assert_eq!(count("quire:request_errors_total{status=\"404\",code=\"model_not_found\"}"), 1.0);
    assert_eq!(count("quire:request_errors_total{status=\"415\",code=\"unsupported_media_type\"}"), 1.0);
    let chat = "quire:http_requests_total{method=\"POST\",handler=\"/v1/chat/completions\",status=";
    assert_eq!((count(&format!("{chat}\"200\"}}")), count(&format!("{chat}\"404\"}}"))), (1.0, 1.0));
}

#[test]
fn a_chunk_that_many_requests_miss_is_computed_once() {
    let dir = ingested();
    let data = dir.path().join("data");
    succeed(quire(&data).args(["cache", "evict", "--all"]));
    let server = Server::start(&data, &["--max-sequences", "8"]);
    let body = json!({"model": "reference", "messages": [{"role": "user", "content": example().question}],
                      "max_tokens": 4, "quire": {"collection": "default"}});
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..8).map(|_| scope.spawn(|| server.chat(&body).json())).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    let chunks = answers[0]["quire"]["citations"].as_array().unwrap().len() as u64;
    let computed: u64 = answers.iter().map(|a| a["quire"]["stats"]["chunks_computed"].as_u64().unwrap()).sum();
    assert_eq!(computed, chunks, "{chunks} chunks were missing");
    assert!(answers.iter().all(|a| a["choices"][0]["message"] == answers[0]["choices"][0]["message"]));
}

#[test]
fn the_openai_clients_own_retries_carry_it_through_a_full_queue() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--max-sequences", "2", "--queue", "2"]);
    let output = Command::new(python("openai"))
        .arg(root().join("eval/peers/openai_burst.py"))
        .args([format!("http://{}/v1", server.address), "reference".into(), "16".into(), "4".into()])
        .output()
        .unwrap();
    let (stdout, stderr) = texts(&output);
    let told: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}\n{stderr}"));
    assert_eq!(told["answered"], 16, "{told}");
    assert!(told["retries"].as_u64().unwrap() > 0, "the queue was never full: {told}");
}

#[test]
fn clients_that_hung_up_leave_their_places_to_others() {
    let dir = empty_data();
    let server = Server::start(&dir.path().join("data"), &["--max-sequences", "1", "--queue", "2"]);
    for stream in [true, false] {
        let body = endless_answer(stream).to_string();
        for round in 0..4 {
            let connection = send(server.address, "POST", CHAT, &[JSON], body.as_bytes());
            eventually("the request runs", || server.metric("vllm:num_requests_running") == 1.0);
            drop(connection);
            eventually("a place is free again", || server.chat(&short_answer()).status == 200);
            assert!(round < 4);
        }
    }
    // Also those that hung up while they waited.
    let body = endless_answer(false).to_string();
    let all: Vec<TcpStream> = (0..3).map(|_| send(server.address, "POST", CHAT, &[JSON], body.as_bytes())).collect();
    eventually("two wait", || server.metric("vllm:num_requests_waiting") == 2.0);
    drop(all);
    eventually("all places are free again", || server.chat(&short_answer()).status == 200);
}

#[test]
fn a_full_queue_and_a_shutdown_keep_their_word_to_answers_that_are_not_streamed() {
    let dir = empty_data();
    let mut server = Server::start(&dir.path().join("data"), &["--max-sequences", "1", "--queue", "1"]);
    let mut body = endless_answer(false);
    body["max_tokens"] = json!(400);
    let post = || send(server.address, "POST", CHAT, &[JSON], body.to_string().as_bytes());
    let running = post();
    eventually("one runs", || server.metric("vllm:num_requests_running") == 1.0);
    let waiting = post();
    eventually("one waits", || server.metric("vllm:num_requests_waiting") == 1.0);
    let refused = read(post());
    assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (429, Some("queue_full")));
    let seconds: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds), "{seconds}");
    server.terminate();
    eventually("the server is unready", || server.get("/readyz").status == 503);
    assert_eq!(read(post()).status, 503);
    for answer in [running, waiting] {
        let answer = read(answer);
        assert_eq!((answer.status, answer.json()["usage"]["completion_tokens"].as_u64()), (200, Some(400)));
    }
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn chunks_are_no_longer_computed_for_a_client_that_hung_up() {
    let dir = empty_data();
    let data = dir.path().join("data");
    let text: String = (0..6000).map(|i| format!("The keeper wrote line {i} about the lamp. ")).collect();
    let document = dir.path().join("log.txt");
    std::fs::write(&document, text).unwrap();
    succeed(quire(&data).arg("ingest").arg(&document));
    succeed(quire(&data).args(["cache", "evict", "--all"]));
    let server = Server::start(&data, &[]);
    let body = json!({"model": "reference", "messages": [{"role": "user", "content": "What did the keeper write?"}],
                      "max_tokens": 4, "quire": {"collection": "default", "top_chunks": 1000}});
    let connection = send(server.address, "POST", CHAT, &[JSON], body.to_string().as_bytes());
    eventually("chunks are stored", || server.metric("quire:chunks{") >= 2.0);
    drop(connection);
    // The chunk at hand is completed, and what has its place in the queue is given up behind it.
    eventually("the client is gone", || {
        let before = server.metric("quire:chunks{");
        std::thread::sleep(Duration::from_millis(500));
        server.metric("quire:chunks{") == before
    });
    let stored = server.metric("quire:chunks{");
    assert!(stored < 60.0, "{stored} chunks were computed for nobody");
}

#[test]
fn what_is_written_is_for_its_user_alone_and_what_was_there_stays_as_it_was() {
    let dir = ingested();
    let data = dir.path().join("data");
    drop(Server::start(&data, &[]));
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let mut folders = vec![data.clone()];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        assert_eq!(mode(&folder), 0o700, "{}", folder.display());
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files += 1;
                assert_eq!(mode(&path) & 0o077, 0, "{}", path.display());
            }
        }
    }
    assert!(files > 5);
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::set_permissions(&shared, std::fs::Permissions::from_mode(0o750)).unwrap();
    succeed(quire(&shared).arg("ingest").args(example().documents));
    assert_eq!(mode(&shared), 0o750);
    assert_eq!(mode(&shared.join("chunks")), 0o700);
}

#[test]
fn a_server_that_everybody_can_reach_without_a_key_says_so() {
    let dir = empty_data();
    for (arguments, warned) in [
        (&["--host", "0.0.0.0"][..], true),
        (&["--host", "0.0.0.0", "--api-key", "secret-7"], false),
        (&["--host", "127.0.0.1"], false),
    ] {
        let log = dir.path().join("log");
        drop(Server::start_logged(&dir.path().join("data"), &log, arguments));
        let text = std::fs::read_to_string(&log).unwrap();
        assert_eq!(text.contains("WARNING") && text.contains("QUIRE_API_KEY"), warned, "{arguments:?}: {text}");
    }
}
