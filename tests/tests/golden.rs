//! The forward pass against Hugging Face transformers: tiny random models of every family
//! (`tests/fixtures/make_golden.py`), and the reference model's answers (`tests/fixtures/make_reference_outputs.py`).

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::{Path, PathBuf};

use engine::{
    ChatMessage, DeviceChoice, Engine, EngineConfig, Event, EventStream, KvDtype, Model, ModelSpec, Prompt,
    PromptChunk, Request, SamplingParams,
};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// The prompts of `reference_outputs.jsonl`, in its order: those that a script makes from a seed, and those of the examples.
fn reference_prompts() -> Vec<Value> {
    let script = fixtures().join("make_reference_prompts.py");
    let python = std::env::var_os("QUIRE_TEST_PYTHON").unwrap_or_else(|| "python3".into());
    let made = std::process::Command::new(python).arg(&script).env("PYTHONIOENCODING", "utf-8").output().unwrap();
    assert!(made.status.success(), "{}: {}", script.display(), String::from_utf8_lossy(&made.stderr));
    let made = String::from_utf8(made.stdout).unwrap();
    let mut prompts: Vec<Value> = made.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    prompts.extend(lines(&fixtures().join("reference_examples.jsonl")));
    prompts
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn largest(logits: &[f32]) -> u32 {
    (0u32..).zip(logits).max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0))).unwrap().0
}

/// Logits within 1e-3 of each other, relative to the larger of the expected logit and the logits' own deviation: a
/// logit that happens to lie near zero carries the rounding of all that was added up to it.
fn assert_close(name: &str, position: &str, found: &[f32], expected: &Value) {
    let expected: Vec<f32> = expected.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    assert_eq!(found.len(), expected.len());
    let deviation = (expected.iter().map(|e| e * e).sum::<f32>() / expected.len() as f32).sqrt();
    for (token, (f, e)) in found.iter().zip(&expected).enumerate() {
        let difference = (f - e).abs() / e.abs().max(deviation);
        assert!(difference <= 1e-3, "{name}, position {position}, token {token}: {f} instead of {e} ({difference:e})");
    }
}

fn check(name: &str) {
    check_on(name, DeviceChoice::Cpu);
}

fn check_on(name: &str, device: DeviceChoice) {
    check_in(name, fixtures().join("golden").join(name), device);
}

fn check_in(name: &str, dir: PathBuf, device: DeviceChoice) {
    let expected = json(&dir.join("expected.json"));
    let vocab = ModelSpec::from_dir(&dir).unwrap().vocab;
    let config = EngineConfig {
        model_dir: dir.clone(),
        device,
        threads: 2,
        kv_dtype: Some(KvDtype::F32),
        kv_budget_bytes: 1 << 28,
        ..EngineConfig::default()
    };
    let model = Model::load_as(&config).unwrap();
    let mut tokens = ids(&expected["prompt"]);

    let logits = model.logits(&tokens).unwrap();
    assert_eq!(logits.len(), tokens.len() * vocab);
    for (position, expected) in expected["logits"].as_object().unwrap() {
        let row = position.parse::<usize>().unwrap() * vocab;
        assert_close(name, position, &logits[row..row + vocab], expected);
    }

    for (step, greedy) in expected["greedy"].as_array().unwrap().iter().enumerate() {
        let logits = model.logits(&tokens).unwrap();
        let (expected, margin) = (greedy["id"].as_u64().unwrap() as u32, greedy["margin"].as_f64().unwrap());
        let found = largest(&logits[logits.len() - vocab..]);
        assert!(found == expected || margin <= 1e-2, "{name}, step {step}: {found} instead of {expected} ({margin})");
        tokens.push(expected);
    }
}

#[test]
fn llama_2() {
    check("llama2");
}

#[test]
fn llama_3_tied_with_its_scaling_in_bf16() {
    check("llama3");
}

#[test]
fn llama_with_linear_scaling_and_biases() {
    check("llama-linear");
}

#[test]
fn llama_with_yarn_in_f16() {
    check("llama-yarn");
}

#[test]
fn mistral_with_a_window_shorter_than_the_prompt() {
    check("mistral");
}

#[test]
fn qwen_2_with_biases_in_shards() {
    check("qwen2");
}

#[test]
fn qwen_3_with_normed_heads() {
    check("qwen3");
}

/// The same model, stored in another way: `change` gets a copy of its folder.
fn check_stored(name: &str, change: impl FnOnce(&Path)) {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixtures().join("golden").join(name)).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    change(copy.path());
    check_in(name, copy.path().into(), DeviceChoice::Cpu);
}

fn configure(dir: &Path, fields: &Value) {
    let mut config = json(&dir.join("config.json"));
    config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// Rewrites the header of a file of weights.
fn rewrite(path: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>, &mut Vec<u8>)) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut data = bytes[8 + length..].to_vec();
    change(&mut header, &mut data);
    let header = serde_json::to_vec(&header).unwrap();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()).unwrap();
}

#[test]
fn weights_without_the_prefix_of_a_causal_model() {
    check_stored("llama3", |dir| {
        rewrite(&dir.join("model.safetensors"), |header, _| {
            let bare = |name: String| name.strip_prefix("model.").map_or(name.clone(), str::to_string);
            *header = std::mem::take(header).into_iter().map(|(name, tensor)| (bare(name), tensor)).collect();
        });
    });
}

#[test]
fn an_index_that_names_what_no_shard_holds() {
    check_stored("llama3", |dir| {
        let mut map = serde_json::Map::new();
        rewrite(&dir.join("model.safetensors"), |header, _| {
            for name in header.keys().filter(|name| *name != "__metadata__") {
                map.insert(name.clone(), "model-1.safetensors".into());
            }
        });
        for name in ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"] {
            map.insert(name.into(), "model-1.safetensors".into());
        }
        std::fs::rename(dir.join("model.safetensors"), dir.join("model-1.safetensors")).unwrap();
        let index = serde_json::json!({"weight_map": map});
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    });
}

/// transformers uses a head that is stored, even where the configuration ties it to the embedding.
#[test]
fn a_stored_head_counts_beside_tying() {
    check_stored("llama2", |dir| configure(dir, &serde_json::json!({"tie_word_embeddings": true})));
}

#[test]
fn a_window_that_begins_behind_the_last_layer() {
    let window = serde_json::json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2, "layer_types": null});
    check_stored("qwen3", |dir| configure(dir, &window));
}

#[test]
fn weights_of_mixed_formats() {
    check_stored("llama3", |dir| {
        rewrite(&dir.join("model.safetensors"), |header, data| {
            // Every second tensor as f32, which holds each bf16 number exactly.
            let mut wide = Vec::new();
            for (index, (name, tensor)) in header.iter_mut().enumerate() {
                if name == "__metadata__" {
                    continue;
                }
                let place = |i: usize| tensor["data_offsets"][i].as_u64().unwrap() as usize;
                let stored = data[place(0)..place(1)].to_vec();
                let from = wide.len();
                if index % 2 == 0 {
                    tensor["dtype"] = "F32".into();
                    stored.chunks(2).for_each(|half| wide.extend([0, 0, half[0], half[1]]));
                } else {
                    wide.extend(stored);
                }
                tensor["data_offsets"] = serde_json::json!([from, wide.len()]);
            }
            *data = wide;
        });
    });
}

#[test]
#[ignore = "needs a GPU"]
fn every_family_on_a_gpu() {
    for name in ["llama2", "llama3", "llama-linear", "llama-yarn", "mistral", "qwen2", "qwen3"] {
        check_on(name, DeviceChoice::Cuda);
    }
}

/// What is reported of a token is the log-softmax of the logits that transformers computes, whatever the sampling.
fn check_logprobs_on(name: &str, device: DeviceChoice) {
    let golden = fixtures().join("golden").join(name);
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(golden.join(file), dir.path().join(file)).unwrap();
    }
    let vocab = ModelSpec::from_dir(&golden).unwrap().vocab;
    let words: serde_json::Map<_, _> = (0..vocab).map(|id| (format!("w{id}"), id.into())).collect();
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = EngineConfig {
        model_dir: dir.path().into(),
        device,
        threads: 2,
        kv_dtype: Some(KvDtype::F32),
        kv_budget_bytes: 1 << 28,
        ..EngineConfig::default()
    };
    let engine = Engine::load(config).unwrap();
    let expected = json(&golden.join("expected.json"));
    let prompt = ids(&expected["prompt"]);
    let logits = expected["logits"][(prompt.len() - 1).to_string()].as_array().unwrap();
    let logits: Vec<f64> = logits.iter().map(|logit| logit.as_f64().unwrap()).collect();
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = top + logits.iter().map(|logit| (logit - top).exp()).sum::<f64>().ln();
    let mut order: Vec<u32> = (0..vocab as u32).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));

    let hot = SamplingParams { temperature: 2.0, top_k: 50, seed: Some(3), ..SamplingParams::default() };
    let biased = SamplingParams { logit_bias: vec![(order[30], 100.0)], repetition_penalty: 1.5, ..hot.clone() };
    for sampling in [SamplingParams::default(), hot, biased] {
        let request = Request {
            logprobs: Some(20),
            ignore_eos: true,
            sampling,
            ..Request::new(Prompt::plain(prompt.clone()), 2)
        };
        let mut events = engine.submit(request).unwrap();
        let mut tokens = Vec::new();
        while let Some(event) = events.blocking_next() {
            match event {
                Event::Token(token) => tokens.push(token),
                Event::Failed(error) => panic!("{error}"),
                Event::Started(_) | Event::Finished(_) => {}
            }
        }
        let first = &tokens[0].logprobs[0];
        assert_eq!((first.id, first.logprob), (tokens[0].id, tokens[0].logprob));
        assert_eq!((first.text.as_str(), first.bytes.as_slice()), (tokens[0].text.as_str(), tokens[0].text.as_bytes()));
        assert_eq!(first.top.iter().map(|other| other.id).collect::<Vec<_>>(), order[..20], "{name}");
        for (id, found) in first.top.iter().map(|other| (other.id, other.logprob)).chain([(first.id, first.logprob)]) {
            let difference = f64::from(found) - (logits[id as usize] - log_sum);
            assert!(difference.abs() < 5e-3, "{name}, token {id}: {found} is off by {difference}");
        }
        for other in &first.top {
            assert_eq!(
                (other.text.as_str(), other.bytes.as_slice()),
                (format!("w{}", other.id).as_str(), other.text.as_bytes())
            );
        }
        assert_eq!(tokens[1].logprobs[0].text, format!(" w{}", tokens[1].id));
    }
    engine.shutdown();
}

#[test]
fn log_probabilities_are_those_of_transformers() {
    for name in ["llama2", "llama-linear", "qwen3"] {
        check_logprobs_on(name, DeviceChoice::Cpu);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn log_probabilities_are_those_of_transformers_on_a_gpu() {
    for name in ["llama2", "llama-linear", "qwen3"] {
        check_logprobs_on(name, DeviceChoice::Cuda);
    }
}

/// The text of an answer and its tokens, the end token left out.
fn answer(engine: &Engine, mut events: EventStream) -> (String, Vec<u32>) {
    let (mut text, mut tokens) = (String::new(), Vec::new());
    while let Some(event) = events.blocking_next() {
        match event {
            Event::Token(token) => {
                text += &token.text;
                tokens.push(token.id);
            }
            Event::Failed(error) => panic!("{error}"),
            Event::Started(_) | Event::Finished(_) => {}
        }
    }
    tokens.retain(|id| !engine.spec().eos.contains(id));
    (text, tokens)
}

#[test]
fn the_reference_model_answers_as_transformers_does() {
    answers_as_transformers_does(DeviceChoice::Cpu, false);
}

#[test]
fn the_reference_model_answers_many_at_once_as_transformers_does() {
    answers_as_transformers_does(DeviceChoice::Cpu, true);
}

#[test]
#[ignore = "needs a GPU"]
fn the_reference_model_answers_as_transformers_does_on_a_gpu() {
    answers_as_transformers_does(DeviceChoice::Cuda, false);
    answers_as_transformers_does(DeviceChoice::Cuda, true);
}

/// `together`: all questions are asked before the first is answered, so that steps hold parts of many.
fn answers_as_transformers_does(device: DeviceChoice, together: bool) {
    let model_dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference");
    let config = EngineConfig {
        model_dir,
        device,
        threads: 2,
        kv_budget_bytes: 1 << 30,
        queue: 1000,
        ..EngineConfig::default()
    };
    let engine = Engine::load(config).unwrap();
    let prompts = reference_prompts();
    let outputs = lines(&fixtures().join("reference_outputs.jsonl"));
    assert!(prompts.len() >= 50 && prompts.len() == outputs.len());
    let mut asked = Vec::new();
    for (prompt, expected) in prompts.iter().zip(&outputs) {
        assert_eq!(prompt["id"], expected["id"]);
        let assembled = assemble(&engine, prompt);
        assert_eq!(assembled.len() as u64, expected["prompt_tokens"].as_u64().unwrap(), "{}", prompt["id"]);
        asked.push((engine.submit(Request::new(assembled, 24)).unwrap(), expected));
        if !together {
            asked.drain(..).for_each(|(events, expected)| check_answer(&engine, events, expected));
        }
    }
    asked.into_iter().for_each(|(events, expected)| check_answer(&engine, events, expected));
}

fn assemble(engine: &Engine, prompt: &Value) -> Prompt {
    let tokenizer = engine.tokenizer();
    let suffix = tokenizer.encode(engine.chat().chunk_suffix()).unwrap();
    let question = ChatMessage::new("user", prompt["question"].as_str().unwrap());
    let parts = engine.chat().render_with_context(tokenizer, &[question]).unwrap();
    assert_eq!(parts.prefix, tokenizer.encode(prompt["prefix"].as_str().unwrap()).unwrap());
    let chunk = |text: &Value| PromptChunk {
        tokens: [tokenizer.encode_plain(text.as_str().unwrap()).unwrap(), suffix.clone()].concat().into(),
        prefix: parts.prefix.clone().into(),
        source: None,
    };
    let chunks = prompt["chunks"].as_array().unwrap().iter().map(chunk).collect();
    Prompt { prefix: parts.prefix.clone(), chunks, suffix: parts.suffix }
}

/// The configuration names another token, and nobody has said how to generate.
#[test]
fn an_answer_ends_where_only_the_tokenizer_names_its_end() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference").canonicalize().unwrap();
    let copy = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "prompt.json", "model.safetensors"] {
        std::os::unix::fs::symlink(reference.join(name), copy.path().join(name)).unwrap();
    }
    let other = json(&reference.join("config.json"));
    std::fs::remove_file(copy.path().join("config.json")).unwrap();
    std::fs::write(copy.path().join("config.json"), other.to_string()).unwrap();
    configure(copy.path(), &serde_json::json!({"eos_token_id": 3}));
    let load = || {
        let config = EngineConfig {
            model_dir: copy.path().into(),
            device: DeviceChoice::Cpu,
            threads: 2,
            kv_budget_bytes: 1 << 28,
            ..EngineConfig::default()
        };
        Engine::load(config).unwrap()
    };
    let engine = load();
    assert_eq!(engine.spec().eos, [3, 2]);
    let prompt = &reference_prompts()[0];
    let expected = &lines(&fixtures().join("reference_outputs.jsonl"))[0];
    let events = engine.submit(Request::new(assemble(&engine, prompt), 24)).unwrap();
    check_answer(&engine, events, expected);
    // Not even the tokenizer: the template puts it behind what the assistant said.
    let unnamed = json(&reference.join("tokenizer_config.json"));
    let template = unnamed["chat_template"].as_str().unwrap().replace("eos_token", "'<|end_of_text|>'");
    std::fs::remove_file(copy.path().join("tokenizer_config.json")).unwrap();
    let unnamed = serde_json::json!({"bos_token": unnamed["bos_token"], "chat_template": template});
    std::fs::write(copy.path().join("tokenizer_config.json"), unnamed.to_string()).unwrap();
    assert_eq!(load().spec().eos, [3, 2]);
    // Where somebody has said how to generate, the template adds nothing.
    std::fs::write(copy.path().join("generation_config.json"), r#"{"eos_token_id": [3]}"#).unwrap();
    assert_eq!(load().spec().eos, [3]);
}

fn check_answer(engine: &Engine, events: EventStream, expected: &Value) {
    let (text, tokens) = answer(engine, events);
    let mut wanted = ids(&expected["tokens"]);
    wanted.retain(|id| !engine.spec().eos.contains(id));
    assert_eq!((text.as_str(), tokens), (expected["text"].as_str().unwrap(), wanted), "{}", expected["id"]);
}
