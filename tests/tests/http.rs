//! The server as its clients see it: through the public `openai` Python client, and byte by byte.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Read;
use std::process::Command;

use serde_json::{Value, json};
use support::{Server, eventually, example, ingested, python, quire, read, request, root, send, succeed};

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

fn long_answer() -> Value {
    json!({"model": "reference", "messages": [{"role": "user", "content": "Tell me about the harbour."}],
           "max_tokens": 20000, "ignore_eos": true, "stream": true})
}

#[test]
fn the_public_openai_client_gets_what_it_expects() {
    let python = python("openai");
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &["--api-key", "secret-7"]);
    let example = example();
    let output = Command::new(python)
        .arg(root().join("tests/openai_client.py"))
        .args([format!("http://{}/v1", server.address), "secret-7".into(), "reference".into()])
        .args([&example.question, &example.answer])
        .output()
        .unwrap();
    let (stdout, stderr) = support::texts(&output);
    assert!(output.status.success() && stdout.trim() == "ok", "{stdout}\n{stderr}");
}

#[test]
fn the_server_and_the_command_line_give_the_same_answer() {
    let dir = ingested();
    let data = dir.path().join("data");
    let example = example();
    let printed = succeed(quire(&data).args(["ask", &example.question, "--json", "--compare"]));
    let printed: Value = serde_json::from_str(&printed).unwrap();
    let server = Server::start(&data, &[]);
    let served = server
        .chat(&json!({"model": "reference", "messages": [{"role": "user", "content": example.question}],
                      "quire": {"collection": "default"}}))
        .json();
    assert_eq!(served["choices"][0]["message"]["content"], printed["answer"]["text"]);
    let passages = |citations: &Value| -> Vec<Value> {
        let fields = |c: &Value| json!([c["span"], c["passage"], c["score"], c["contains_answer"]]);
        citations.as_array().unwrap().iter().map(fields).collect()
    };
    assert_eq!(passages(&served["quire"]["citations"]), passages(&printed["answer"]["citations"]));
    for (shown, full) in std::iter::zip(
        served["quire"]["citations"].as_array().unwrap(),
        printed["answer"]["citations"].as_array().unwrap(),
    ) {
        let full = std::path::Path::new(full["document"].as_str().unwrap());
        assert!(full.is_absolute());
        assert_eq!(shown["document"], full.file_name().unwrap().to_str().unwrap());
    }
    assert_eq!(printed["full_recompute"]["stats"]["reused_tokens"], 0);
}

#[test]
fn a_model_may_be_named_as_on_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--model-name", "org/name"]);
    for path in ["/v1/models/org/name", "/v1/models/org%2Fname"] {
        assert_eq!(server.get(path).json()["id"], "org/name");
    }
    assert_eq!((server.get("/v1/models/org").status, server.get("/v1/models/name").status), (404, 404));
    let body = json!({"model": "org/name", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1});
    assert_eq!(server.chat(&body).status, 200);
}

#[test]
fn an_answer_that_nothing_bounds_ends_with_the_context() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--max-context", "300"]);
    let mut body = long_answer();
    body["stream"] = json!(false);
    for most in [json!(null), json!(-1), json!(1_000_000)] {
        body["max_tokens"] = most;
        let answer = server.chat(&body).json();
        assert_eq!(
            (&answer["usage"]["total_tokens"], &answer["choices"][0]["finish_reason"]),
            (&json!(300), &json!("length"))
        );
    }
    // What no context holds is refused by its length, in tokens or, without looking at it, in bytes.
    let words = |count: usize| json!({"messages": [{"role": "user", "content": "the ".repeat(count)}]});
    let refused = |count: usize, parts: &[&str]| {
        let response = server.chat(&words(count));
        let error = response.json()["error"].clone();
        assert_eq!((response.status, &error["code"]), (400, &json!("context_length_exceeded")), "{error}");
        let message = error["message"].as_str().unwrap();
        parts.iter().for_each(|part| assert!(message.contains(part), "{message}"));
    };
    refused(500, &["a prompt of 503 tokens", "300"]);
    refused(2_000_000, &["a prompt of 8000000 bytes has at least 444445 tokens", "300"]);
}

#[test]
fn passages_that_come_with_the_question_are_cut_where_the_context_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&dir.path().join("data"), &["--max-context", "1200", "--chunk-tokens", "128"]);
    let text = std::fs::read_to_string(root().join("examples/12-gazetteer.txt")).unwrap();
    let ask = |passages: Value| {
        let body = json!({"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 4,
                          "quire": {"passages": passages}});
        let answer = server.chat(&body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    };
    // So long that the body is read apart, and far longer than the context.
    let long: String = std::iter::repeat_n(text.as_str(), 1 + (70 << 10) / text.len()).collect();
    let answer = ask(json!(["Ada has the key.", {"text": long, "id": "long"}, "Nobody reads this."]));
    assert!(answer["usage"]["total_tokens"].as_u64().unwrap() <= 1200, "{}", answer["usage"]);
    let note = answer["quire"]["notes"][0].as_str().unwrap();
    assert!(note.starts_with("1 of 3 passages were left out, the last ones, and the one before was cut"), "{note}");
    let citations = answer["quire"]["citations"].as_array().unwrap();
    let spans: Vec<u64> = citations.iter().map(|citation| citation["span"]["start"].as_u64().unwrap()).collect();
    assert!(citations.len() > 4 && citations[0]["passage"] == "Ada has the key.", "{citations:?}");
    assert!(spans[1..].is_sorted() && citations[1..].iter().all(|citation| citation["id"] == "long"), "{citations:?}");
    let chars: Vec<char> = long.chars().collect();
    for citation in &citations[1..] {
        let place = |key: &str| citation["span"][key].as_u64().unwrap() as usize;
        let passage: String = chars[place("start")..place("end")].iter().collect();
        assert_eq!(citation["passage"], passage);
    }
    // The same chunks again, and no more of them are computed.
    let again = ask(json!(["Ada has the key.", {"text": long}]));
    assert_eq!(again["quire"]["stats"]["chunks_computed"], 0, "{}", again["quire"]["stats"]);
    let (cut, ends) = (again["quire"]["notes"][0].as_str().unwrap(), "more tokens");
    assert!(cut.starts_with("the last of 2 passages was cut: the context holds ") && cut.ends_with(ends), "{cut}");
}

#[test]
fn probes_metrics_and_errors_have_their_shapes() {
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &["--api-key", "secret-7", "--body-limit-bytes", "4096"]);
    let key = [("authorization", "Bearer secret-7"), ("content-type", "application/json")];
    let ask = |method: &str, path: &str, body: &str| request(server.address, method, path, &key, body.as_bytes());

    assert_eq!((server.get("/livez").status, server.get("/readyz").status), (200, 200));
    for path in ["/metrics", "/version", "/v1/models", "/absent"] {
        let refused = server.get(path);
        assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Bearer")), "{path}");
    }
    assert_eq!(ask("GET", "/version", "").json()["version"], env!("CARGO_PKG_VERSION"));

    for (method, path, body, status) in [
        ("GET", "/absent", "", 404),
        ("GET", "/v1/chat/completions", "", 405),
        ("POST", "/v1/chat/completions", "{not json", 400),
        ("POST", "/v1/chat/completions", "[]", 400),
        ("POST", "/v1/chat/completions", "{\"messages\": []}", 400),
    ] {
        let response = ask(method, path, body);
        assert_eq!(response.status, status, "{method} {path} {body}");
        let error = &response.json()["error"];
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error", "{error}");
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{error}");
    }
    let huge = format!("{{\"model\": \"{}\"}}", "x".repeat(5000));
    assert_eq!(ask("POST", "/v1/chat/completions", &huge).status, 413);

    let body = json!({"model": "reference", "messages": [{"role": "user", "content": example().question}],
                      "quire": {"collection": "default"}});
    assert_eq!(ask("POST", "/v1/chat/completions", &body.to_string()).status, 200);
    let metrics = ask("GET", "/metrics", "").text();
    for name in [
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:prefix_cache_queries_total{",
        "vllm:prefix_cache_hits_total{",
        "vllm:prompt_tokens_total{",
        "vllm:prompt_tokens_cached_total{",
        "vllm:generation_tokens_total{",
        "vllm:request_success_total{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:inter_token_latency_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_bucket{",
        "vllm:request_queue_time_seconds_bucket{",
        "quire:tokens_reused_total{",
        "quire:tokens_recomputed_total{",
        "quire:chunk_hits_total{",
        "quire:chunk_bytes{",
        "quire:corruption_found_total{",
    ] {
        assert!(metrics.contains(name), "no {name} in:\n{metrics}");
    }
}

#[test]
fn a_closed_connection_cancels_its_work() {
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &[]);
    for stream in [true, false] {
        let mut body = long_answer();
        body["stream"] = json!(stream);
        let path = "/v1/chat/completions";
        let connection = send(server.address, "POST", path, JSON, body.to_string().as_bytes());
        eventually("the request runs", || server.metric("vllm:num_requests_running") == 1.0);
        drop(connection);
        eventually("the request is cancelled", || server.metric("vllm:num_requests_running") == 0.0);
    }
}

#[test]
fn a_stream_that_fails_ends_with_its_error_and_done() {
    let dir = ingested();
    // Three pages of 256 tokens: enough for prompt and answer, and not for the keys that an index holds beside them.
    let server = Server::start(&dir.path().join("data"), &["--kv-budget-bytes", "3145728"]);
    let body = json!({"model": "reference", "messages": [{"role": "user", "content": "the sea ".repeat(190)}],
                      "max_tokens": 330, "ignore_eos": true, "stream": true,
                      "quire": {"strategy": "retrieval", "window": 32}});
    let text = server.chat(&body).text();
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let [.., failed, done] = events[..] else { panic!("{text}") };
    let failed: Value = serde_json::from_str(failed).unwrap();
    assert_eq!((&failed["error"]["code"], done), (&json!("context_length_exceeded"), "[DONE]"), "{text}");
    assert!(!text.contains("\"finish_reason\":\"length\""), "{text}");
    // It has failed alone.
    let body = json!({"model": "reference", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 1});
    assert_eq!(server.chat(&body).status, 200);
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let dir = ingested();
    let server = Server::start(&dir.path().join("data"), &["--max-sequences", "1", "--queue", "1"]);
    let body = long_answer().to_string();
    let post = || send(server.address, "POST", "/v1/chat/completions", JSON, body.as_bytes());
    let _running = post();
    eventually("one runs", || server.metric("vllm:num_requests_running") == 1.0);
    let _waiting = post();
    eventually("one waits", || server.metric("vllm:num_requests_waiting") == 1.0);
    let refused = read(post());
    assert_eq!(refused.status, 429, "{}", refused.text());
    assert!(refused.header("retry-after").is_some());
    assert_eq!(refused.json()["error"]["code"], "queue_full");
}

#[test]
fn at_shutdown_running_answers_are_completed_and_new_ones_refused() {
    let dir = ingested();
    let mut server = Server::start(&dir.path().join("data"), &[]);
    let mut body = long_answer();
    body["max_tokens"] = json!(600);
    let mut running = send(server.address, "POST", "/v1/chat/completions", JSON, body.to_string().as_bytes());
    eventually("the request runs", || server.metric("vllm:num_requests_running") == 1.0);
    server.terminate();
    eventually("the server is unready", || server.get("/readyz").status == 503);
    let refused = server.chat(&body);
    assert_eq!((refused.status, refused.header("retry-after").is_some()), (503, true), "{}", refused.text());
    assert_eq!(server.get("/livez").status, 200);
    let mut text = String::new();
    running.read_to_string(&mut text).unwrap();
    assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("data: [DONE]"), "{text}");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn at_shutdown_answers_that_take_too_long_end_with_an_error_and_the_process_ends_well() {
    let dir = ingested();
    // The store was closed by whoever let go of it last, while the process ended: that was a race. A second signal waits for nobody.
    for (drain, again) in [("0", false), ("1", false), ("300", true)] {
        let mut server = Server::start(&dir.path().join("data"), &["--drain-seconds", drain]);
        let body = long_answer().to_string();
        let mut running: Vec<_> =
            (0..8).map(|_| send(server.address, "POST", "/v1/chat/completions", JSON, body.as_bytes())).collect();
        eventually("they run", || server.metric("vllm:num_requests_running") == 8.0);
        server.terminate();
        if again {
            eventually("the server is unready", || server.get("/readyz").status == 503);
            server.terminate();
        }
        assert_eq!(server.wait().code(), Some(0));
        for connection in &mut running {
            let mut text = String::new();
            connection.read_to_string(&mut text).unwrap();
            assert!(text.contains("\"error\"") && text.contains("data: [DONE]"), "{text}");
        }
    }
}
