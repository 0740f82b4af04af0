//! A server that compares what it answers from cached passages with full recompute, and one that does not.
#![allow(clippy::unwrap_used)]

mod support;

use serde_json::{Value, json};
use support::{Server, eventually, example, ingested};

/// The `quire` object of an answer, with its text.
fn ask(server: &Server, question: &str, more: &Value) -> (Value, String) {
    let mut quire = json!({"collection": "default"});
    quire.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let messages = json!([{"role": "user", "content": question}]);
    let body = json!({"messages": messages, "temperature": 0, "max_tokens": 12, "quire": quire});
    let response = server.chat(&body);
    assert_eq!(response.status, 200, "{}", response.text());
    let all = response.json();
    let cached = all["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let stats = &all["quire"]["stats"];
    let of = |name: &str| stats[name].as_u64().unwrap();
    assert_eq!(cached, of("cached_exact_tokens") + of("cached_composed_tokens"), "{stats}");
    (all["quire"].clone(), all["choices"][0]["message"]["content"].as_str().unwrap().into())
}

fn notes(quire: &Value) -> String {
    quire["notes"].to_string()
}

#[test]
fn a_collection_that_drifts_from_full_recompute_pays_more_and_then_all_of_it() {
    let dir = ingested();
    let log = dir.path().join("log");
    let limit = ["--monitor-share", "1", "--monitor-limit", "1e-9", "--blend", "reuse"];
    let server = Server::start_logged(&dir.path().join("data"), &log, &limit);
    let question = example().question;
    let none = json!({});
    let (first, _) = ask(&server, &question, &none);
    assert!(first["stats"]["cached_composed_tokens"].as_u64() > Some(0) && notes(&first) == "[]", "{first}");
    let level = |wanted: f64| {
        move |server: &Server| {
            let metrics = server.get("/metrics").text();
            metrics.contains("collection=\"default\"") && server.metric("quire:monitor_level") == wanted
        }
    };
    for wanted in [1.0, 2.0] {
        // Samples are compared while nobody asks: so there is a pause behind each question.
        eventually("the level rises", || {
            ask(&server, &question, &none);
            (0..40).any(|_| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                level(wanted)(&server)
            })
        });
        let (answer, _) = ask(&server, &question, &none);
        assert!(notes(&answer).contains("the collection `default` have drifted"), "{answer}");
        let whole = answer["stats"]["reused_tokens"] == 0;
        assert_eq!(whole, wanted == 2.0, "{answer}");
    }
    // What states its own blending keeps it.
    let (own, _) = ask(&server, &question, &json!({"blend": "answer"}));
    assert!(own["stats"]["cached_composed_tokens"].as_u64() > Some(0) && notes(&own) == "[]", "{own}");
    let told = std::fs::read_to_string(&log).unwrap();
    assert_eq!(told.matches("half more is recomputed").count(), 1, "{told}");
    assert_eq!(told.matches("no longer used").count(), 1, "{told}");
}

#[test]
fn without_samples_and_below_the_limit_an_answer_is_the_same_whatever_was_asked_before() {
    let dir = ingested();
    let question = example().question;
    let none = json!({});
    let mut all = Vec::new();
    for settings in [&["--monitor-share", "0"][..], &["--monitor-share", "1", "--monitor-limit", "1000"]] {
        let server = Server::start(&dir.path().join("data"), settings);
        let answer = || {
            let (quire, text) = ask(&server, &question, &none);
            let of = |name: &str| quire["stats"][name].clone();
            (text, of("reused_tokens"), of("recomputed_tokens"), notes(&quire))
        };
        all.push(answer());
        for other in ["Which tower is the highest?", "Who wrote the letters?", &question] {
            ask(&server, other, &none);
            ask(&server, other, &json!({"blend": "reuse"}));
        }
        all.push(answer());
        if settings[1] == "1" {
            eventually("samples are compared", || {
                server.get("/metrics").text().contains("quire:monitor_samples_total{")
            });
            all.push(answer());
        }
    }
    assert!(all.iter().all(|answer| *answer == all[0]), "{all:?}");
}
