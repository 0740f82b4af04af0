#![allow(clippy::unwrap_used)]
use super::*;
use serde_json::json;
use service::GivenPassage;
use settings::{GenerationSource, Named, Settings};

/// As a client sends it, with a model and a message where it names none.
fn parse(mut body: Value) -> Result<ChatRequest> {
    let defaults = json!({"model": "m", "messages": [{"role": "user", "content": "Hi"}]});
    for (key, value) in defaults.as_object().unwrap() {
        body.as_object_mut().unwrap().entry(key).or_insert(value.clone());
    }
    parse_text(&body.to_string())
}

fn parse_text(body: &str) -> Result<ChatRequest> {
    let settings = Settings { generation_config: Named(GenerationSource::None), ..Settings::default() };
    let options = Options::from_settings(&settings).unwrap();
    let defaults = Defaults { options: &options, top_chunks: 8, model: "m", most_choices: 4 };
    ChatRequest::parse(body.as_bytes(), &defaults)
}

fn param(error: QuireError) -> String {
    match error {
        QuireError::InvalidParameter { param, .. } | QuireError::UnsupportedParameter { param, .. } => param,
        other => format!("{other:?}"),
    }
}

fn refused_param(body: Value) -> String {
    param(parse(body).unwrap_err())
}

fn search(request: &ChatRequest) -> (String, String, usize, f32) {
    match request.passages.clone().unwrap() {
        Passages::Search(search) => (search.collection, search.query, search.top_chunks, search.score_threshold),
        Passages::Given(given) => panic!("{given:?}"),
    }
}

fn given(passages: Value) -> Vec<GivenPassage> {
    match parse(json!({"quire": {"passages": passages}})).unwrap().passages.unwrap() {
        Passages::Given(given) => given.iter().map(|passage| GivenPassage::clone(passage)).collect(),
        Passages::Search(search) => panic!("{search:?}"),
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (body, param) in [
        (json!({"n": 0}), "n"),
        (json!({"n": 5}), "n"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": -1}), "top_logprobs"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tools": [{"type": "function"}], "tool_choice": "auto"}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "function", "function": {"name": "f"}}}), "tool_choice"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"store": true}), "store"),
        (json!({"verbosity": "low"}), "verbosity"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"metadata": "x"}), "metadata"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (json!({"frobnicate": 1}), "frobnicate"),
        (json!({"quire": {"magic": 1}}), "quire.magic"),
        (json!({"quire": {"strategy": "magic"}}), "quire.strategy"),
        (json!({"quire": {"ratio": 2}}), "quire.ratio"),
        (json!({"quire": {"blend_mass": 2}}), "quire.blend_mass"),
        (json!({"quire": {"correction": "some"}}), "quire.correction"),
        (json!({"quire": {"top_chunks": 1025}}), "quire.top_chunks"),
        (json!({"quire": {"top_chunks": 3}}), "quire.top_chunks"),
        (json!({"quire": {"query": "keys"}}), "quire.query"),
        (json!({"quire": {"score_threshold": 0.5, "passages": ["x"]}}), "quire.score_threshold"),
        (json!({"quire": {"collection": "c", "score_threshold": 1.5}}), "quire.score_threshold"),
        (json!({"quire": {"collection": "c", "score_threshold": -0.1}}), "quire.score_threshold"),
        (json!({"quire": {"collection": "c", "query": " "}}), "quire.query"),
        (json!({"quire": {"collection": "c", "passages": ["x"]}}), "quire.passages"),
        (json!({"quire": {"passages": "x"}}), "quire.passages"),
        (json!({"quire": {"passages": vec!["x"; 1025]}}), "quire.passages"),
        (json!({"quire": {"passages": ["x", ""]}}), "quire.passages[1]"),
        (json!({"quire": {"passages": ["x", "y", " \n"]}}), "quire.passages[2]"),
        (json!({"quire": {"passages": ["x", 3]}}), "quire.passages[1]"),
        (json!({"quire": {"passages": [{"id": "7"}]}}), "quire.passages[0].text"),
        (json!({"quire": {"passages": [{"text": ""}]}}), "quire.passages[0].text"),
        (json!({"quire": {"passages": [{"text": "x".repeat((1 << 20) + 1)}]}}), "quire.passages[0].text"),
        (json!({"quire": {"passages": [{"text": "x", "id": 7}]}}), "quire.passages[0].id"),
        (json!({"quire": {"passages": [{"text": "x", "page_content": "x"}]}}), "quire.passages[0].page_content"),
        (
            json!({"quire": {"passages": [{"text": "x", "metadata": {}, "attributes": {}}]}}),
            "quire.passages[0].attributes",
        ),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -2}), "max_tokens"),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_tokens"),
        (json!({"max_tokens": 3, "min_tokens": 4}), "min_tokens"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"stop": ["a", ""]}), "stop"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 60, "05": 60}}), "logit_bias"),
        (json!({"logit_bias": {"5": "much"}}), "logit_bias"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user", "content": null}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
    ] {
        assert_eq!(refused_param(body.clone()), param, "{body}");
    }
    let image = json!([{"role": "user", "content": [{"type": "image_url"}]}]);
    assert_eq!(refused_param(json!({"messages": image})), "messages[0].content[0].type");
    let refusal = json!([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]);
    assert_eq!(refused_param(json!({"messages": refusal})), "messages[0].content[0].type");
    let called = json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]);
    assert_eq!(refused_param(json!({"messages": called})), "messages[0].tool_calls");
}

#[test]
fn neutral_values_and_null_ask_for_nothing() {
    let fields = [
        ("n", json!(1)),
        ("logprobs", json!(false)),
        ("top_logprobs", json!(null)),
        ("top_logprobs", json!(0)),
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("tool_choice", json!("auto")),
        ("parallel_tool_calls", json!(false)),
        ("functions", json!([])),
        ("function_call", json!("none")),
        ("response_format", json!({"type": "text"})),
        ("modalities", json!(["text"])),
        ("stop", json!(null)),
        ("seed", json!(null)),
        ("max_tokens", json!(null)),
        ("user", json!("u")),
        ("safety_identifier", json!("u")),
        ("prompt_cache_key", json!("k")),
        ("metadata", json!({"a": "b"})),
        ("metadata", json!({})),
        ("store", json!(false)),
        ("service_tier", json!("default")),
        ("stream_options", json!(null)),
        ("add_generation_prompt", json!(true)),
        ("continue_final_message", json!(false)),
        ("length_penalty", json!(1.0)),
        ("skip_special_tokens", json!(true)),
    ];
    for (key, value) in fields {
        let request = parse(json!({key: value})).unwrap_or_else(|error| panic!("{key}: {value}: {error}"));
        assert!(request.options.stop.is_empty() && !request.stream && request.passages.is_none());
        assert_eq!((request.choices, request.options.max_tokens, request.options.logprobs), (1, None, None));
    }
    // Tools that are not to be called.
    parse(json!({"tools": [{"type": "function"}], "tool_choice": "none"})).unwrap();
    // Where one model is offered, it need not be named.
    let body = parse_text(r#"{"messages": [{"role": "user", "content": "Hi"}]}"#).unwrap();
    assert_eq!(body.messages[0].content, "Hi");
}

#[test]
fn everything_supported_arrives() {
    let request = parse(json!({
        "messages": [{"role": "developer", "content": "Be brief."},
                     {"role": "user", "content": [{"type": "text", "text": "Who"}, {"type": "text", "text": "is it?"}]}],
        "stream": true, "stream_options": {"include_usage": true}, "max_completion_tokens": 7, "temperature": 0.5,
        "top_p": 0.9, "seed": -1, "stop": "x", "logit_bias": {"5": -100}, "presence_penalty": 1, "min_tokens": 2, "n": 3,
        "logprobs": true, "top_logprobs": 4,
        "quire": {"collection": "c", "top_chunks": 3, "score_threshold": 0.25, "strategy": "retrieval", "k": 9, "index": "hnsw",
                  "blend": "question", "ratio": 0.3, "blend_mass": 0.75, "blend_gate": true, "correction": "prompt"},
    }))
    .unwrap();
    // Parts are lines, and are searched for.
    assert_eq!(search(&request), ("c".into(), "Who\nis it?".into(), 3, 0.25));
    assert_eq!(request.messages[0].role, "system");
    let o = &request.options;
    assert_eq!((o.max_tokens, o.min_tokens, o.logprobs, request.choices), (Some(7), 2, Some(4), 3));
    assert_eq!((o.sampling.seed, o.attention.k), (Some(u64::MAX), 9));
    assert_eq!((o.sampling.logit_bias.as_slice(), o.stop.len()), ([(5, -100.0)].as_slice(), 1));
    assert_eq!((o.blend.mode, o.blend.ratio, o.blend.mass), (engine::BlendMode::Question, 0.3, Some(0.75)));
    assert_eq!((o.blend.correction, o.blend.gate.on), (Some(engine::Correction::Prompt), true));
    assert!(request.stream && request.include_usage);
    let all = parse(json!({"logprobs": true, "max_tokens": -1, "top_k": -1})).unwrap().options;
    assert_eq!((all.logprobs, all.max_tokens, all.sampling.top_k), (Some(0), None, 0));
}

#[test]
fn passages_are_texts_or_say_more_of_themselves() {
    let all = given(json!(["x", {"text": "y", "id": "7", "filename": "y.md", "title": "Y", "url": "https://y.example",
                                 "metadata": {"page": 3}}]));
    assert_eq!(all[0], GivenPassage { text: "x".into(), number: 1, ..GivenPassage::default() });
    assert_eq!(all[1].number, 2);
    let names = [&all[1].id, &all[1].filename, &all[1].title, &all[1].url].map(|name| name.as_deref().unwrap());
    assert_eq!((all[1].text.as_str(), names), ("y", ["7", "y.md", "Y", "https://y.example"]));
    assert_eq!(all[1].attributes.as_ref().unwrap()["page"], 3);
    assert_eq!(
        given(json!([{"text": "z", "attributes": {"a": "b"}, "id": null}]))[0].attributes.as_ref().unwrap()["a"],
        "b"
    );
    // A search elsewhere that found nothing.
    assert!(given(json!([])).is_empty());
}

#[test]
fn what_is_searched_for_may_be_another_text_than_the_last_message() {
    let request = |quire: Value, content: &str| {
        parse(json!({"messages": [{"role": "user", "content": content}], "quire": quire}))
    };
    let asked = request(json!({"collection": "c", "query": "spare key"}), "And the other one?").unwrap();
    assert_eq!(search(&asked), ("c".into(), "spare key".into(), 8, 0.0));
    assert_eq!(param(request(json!({"collection": "c"}), " ").unwrap_err()), "messages");
    request(json!({"collection": "c", "query": "spare key"}), " ").unwrap();
}

#[test]
fn a_request_wins_over_a_setting_and_minus_one_over_its_bound() {
    let settings = Settings {
        generation_config: Named(GenerationSource::None),
        max_tokens: 9,
        temperature: Some(0.25),
        ..Settings::default()
    };
    let options = Options::from_settings(&settings).unwrap();
    let defaults = Defaults { options: &options, top_chunks: 8, model: "m", most_choices: 1 };
    let read = |more: &str| {
        let body = format!(r#"{{"messages": [{{"role": "user", "content": "Hi"}}]{more}}}"#);
        let options = ChatRequest::parse(body.as_bytes(), &defaults).unwrap().options;
        (options.max_tokens, options.sampling.temperature)
    };
    assert_eq!(read(""), (Some(9), 0.25));
    assert_eq!(read(r#", "max_tokens": null, "temperature": null"#), (Some(9), 0.25));
    assert_eq!(read(r#", "max_tokens": 20, "temperature": 2"#), (Some(20), 2.0));
    assert_eq!(read(r#", "max_tokens": -1"#), (None, 0.25));
}

#[test]
fn histories_of_other_servers_are_read() {
    let history = json!([
        {"role": "user", "content": "Who?", "name": "Ada", "extra": {"x": 1}},
        {"role": "assistant", "content": "Bo.", "refusal": null, "annotations": [], "audio": null, "tool_calls": [],
         "function_call": null, "reasoning_content": "..."},
        {"role": "assistant", "content": null},
        {"role": "assistant", "content": null, "refusal": "I cannot say."},
        {"role": "user", "content": []},
    ]);
    let messages = parse(json!({"messages": history})).unwrap().messages;
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    assert_eq!(contents, ["Who?", "Bo.", "", "I cannot say.", ""]);
}

#[test]
fn one_answer_at_the_end_may_have_begun() {
    let (user, answer) = (json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": "Well, "}));
    let begun = json!([user, answer]);
    assert_eq!(parse(json!({"messages": begun})).unwrap().messages.len(), 2);
    parse(json!({"messages": begun, "continue_final_message": true, "add_generation_prompt": false})).unwrap();
    for (body, name) in [
        (json!({"messages": begun, "continue_final_message": false}), "continue_final_message"),
        (json!({"messages": begun, "add_generation_prompt": true}), "add_generation_prompt"),
        (json!({"continue_final_message": true}), "continue_final_message"),
        (json!({"add_generation_prompt": false}), "add_generation_prompt"),
        (json!({"messages": [user, answer, answer]}), "messages"),
    ] {
        assert_eq!(refused_param(body.clone()), name, "{body}");
    }
}

#[test]
fn stream_options_are_for_streams_whatever_they_say() {
    for options in
        [json!({}), json!({"include_usage": null}), json!({"include_usage": false}), json!({"include_usage": true})]
    {
        assert_eq!(refused_param(json!({"stream_options": options})), "stream_options", "{options}");
        assert_eq!(refused_param(json!({"stream_options": options, "stream": false})), "stream_options", "{options}");
        parse(json!({"stream_options": options, "stream": true})).unwrap();
    }
}

#[test]
fn a_seed_is_a_number_of_64_bits_with_a_sign() {
    let seed = |text: &str| {
        let body = format!(r#"{{"messages": [{{"role": "user", "content": "Hi"}}], "seed": {text}}}"#);
        parse_text(&body).map(|request| request.options.sampling.seed.unwrap())
    };
    for number in [i64::MIN, -1, 0, i64::MAX] {
        assert_eq!(seed(&number.to_string()).unwrap(), number.cast_unsigned());
    }
    for wrong in ["9223372036854775808", "-9223372036854775809", "1.5", "\"1\""] {
        assert_eq!(param(seed(wrong).unwrap_err()), "seed", "{wrong}");
    }
}

#[test]
fn all_wrong_tokens_of_a_bias_are_named() {
    let error = parse(json!({"logit_bias": {"5": 1, "x": 1, "-3": 1, "2.5": 1}})).unwrap_err().to_string();
    for key in ["`x`", "`-3`", "`2.5`"] {
        assert!(error.contains(key), "{error}");
    }
    assert!(!error.contains("`5`"), "{error}");
}

#[test]
fn messages_of_errors_are_short_whatever_was_sent() {
    let long = "x".repeat(100_000);
    let list = vec![1; 50_000];
    for body in [
        json!({"model": long}),
        json!({"max_tokens": long}),
        json!({"max_tokens": list}),
        json!({"messages": [{"role": long, "content": "x"}]}),
        json!({"messages": [{"role": "user", "content": {long.as_str(): 1}}]}),
        json!({"stop": [1, long]}),
        json!({"tools": long}),
        json!({"quire": long}),
        json!({"quire": {long.as_str(): 1}}),
        json!({"quire": {"strategy": long}}),
        json!({"stream": true, "stream_options": {long.as_str(): 1}}),
        json!({"logit_bias": {long.as_str(): 1}}),
        json!({"logit_bias": (0..5000).map(|i| (format!("t{i}"), json!(1))).collect::<Map<_, _>>()}),
        json!({long.as_str(): 1}),
    ] {
        let error = parse(body).unwrap_err().to_string();
        assert!(error.len() < 1500, "{} bytes: {}", error.len(), &error[..200]);
    }
    let error = parse_text(&format!("{{\"messages\": {long}")).unwrap_err().to_string();
    assert!(error.len() < 200, "{error}");
}

#[test]
fn another_model_is_not_found() {
    let error = parse(json!({"model": "gpt"})).unwrap_err();
    assert!(matches!(error, QuireError::UnknownModel { .. }), "{error}");
}
