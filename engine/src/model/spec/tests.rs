#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use serde_json::json;

use super::*;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden")
}

fn read(config: &Value, generation: Option<&Value>) -> Result<ModelSpec> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    if let Some(generation) = generation {
        std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
    }
    ModelSpec::from_dir(dir.path())
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5, "hidden_act": "silu",
    })
}

fn with(changes: Value) -> Value {
    let mut config = llama();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    config
}

/// The frequencies that `tests/fixtures/make_golden.py` had transformers compute (in f32).
#[test]
fn frequencies_are_those_of_transformers() {
    let cases: Vec<Value> = serde_json::from_slice(&std::fs::read(fixtures().join("rope.json")).unwrap()).unwrap();
    assert!(cases.len() >= 18);
    for case in cases {
        let head_dim = case["head_dim"].as_u64().unwrap() as usize;
        let positions = &case["max_position_embeddings"];
        let parameters = &case["rope_parameters"];
        let mut scaling = parameters.clone();
        let theta = scaling.as_object_mut().unwrap().remove("rope_theta").unwrap();
        let new = json!({"head_dim": head_dim, "max_position_embeddings": positions, "rope_parameters": parameters});
        let old = json!({"head_dim": head_dim, "max_position_embeddings": positions, "rope_theta": theta, "rope_scaling": scaling});
        let spec = read(&with(new), None).unwrap();
        assert_eq!(spec, read(&with(old), None).unwrap(), "the two spellings differ: {}", case["name"]);

        let found = spec.rope.inv_freq();
        let expected: Vec<f64> = case["inv_freq"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(&expected) {
            assert!((f - e).abs() <= 1e-6 * e, "{} {head_dim}: {f} {e}", case["name"]);
        }
        let factor = case["attention_factor"].as_f64().unwrap();
        assert!((spec.rope.attention_factor() - factor).abs() < 1e-12, "{}", case["name"]);
    }
}

#[test]
fn every_family_is_read_as_it_is() {
    let spec = |name: &str| ModelSpec::from_dir(&fixtures().join(name)).unwrap();
    let llama2 = spec("llama2");
    assert_eq!((llama2.family, llama2.layers, llama2.hidden, llama2.intermediate), (Family::Llama, 2, 64, 48));
    assert_eq!((llama2.heads, llama2.kv_heads, llama2.head_dim, llama2.vocab), (4, 2, 16, 251));
    assert_eq!((llama2.norm_eps, llama2.max_context, llama2.bos, &llama2.eos[..]), (1e-5, 512, Some(1), &[2][..]));
    assert!(!llama2.tied_embeddings && !llama2.attention_bias && !llama2.qk_norm && llama2.sliding_window.is_none());
    assert_eq!(llama2.rope, Rope { theta: 10_000.0, head_dim: 16, scaling: RopeScaling::None });

    assert!(spec("llama3").tied_embeddings);
    assert!(matches!(spec("llama3").rope.scaling, RopeScaling::Llama3 { original_context: 64.0, .. }));
    let linear = spec("llama-linear");
    assert!(linear.attention_bias && linear.output_bias && linear.mlp_bias);
    assert_eq!(linear.rope.scaling, RopeScaling::Linear { factor: 4.0 });
    assert!(matches!(spec("llama-yarn").rope.scaling, RopeScaling::Yarn { factor: 4.0, truncate: true, .. }));
    assert_eq!(spec("mistral").sliding_window, Some(48));
    let qwen2 = spec("qwen2");
    assert!(qwen2.attention_bias && !qwen2.output_bias && !qwen2.qk_norm && qwen2.sliding_window.is_none());
    let qwen3 = spec("qwen3");
    assert!(qwen3.qk_norm && !qwen3.attention_bias && qwen3.head_dim == 32);
}

#[test]
fn generation_config_comes_first_and_lists_are_read() {
    let config = with(json!({"bos_token_id": 3, "eos_token_id": 4}));
    let generation = json!({"eos_token_id": [5, 6]});
    let spec = read(&config, Some(&generation)).unwrap();
    assert_eq!((spec.bos, spec.eos), (Some(3), vec![5, 6]));
    let spec = read(&with(json!({"bos_token_id": null, "eos_token_id": null})), None).unwrap();
    assert_eq!((spec.bos, spec.eos), (None, vec![]));
    let spec = read(&llama(), None).unwrap();
    assert_eq!((spec.bos, spec.eos), (Some(1), vec![2]));
    for wrong in [json!("</s>"), json!(2.5), json!([2, "x"])] {
        let error = read(&with(json!({"eos_token_id": wrong})), None).unwrap_err().to_string();
        assert!(error.contains("`eos_token_id`: expected a token id, or a list of them, found"), "{error}");
    }
}

#[test]
fn ids_that_no_token_has_are_left_out_and_the_others_count() {
    let stated = |ids: Value| read(&with(json!({"eos_token_id": 4})), Some(&json!({"eos_token_id": ids}))).unwrap();
    assert_eq!(stated(json!([5, 100, -1, 99, 4_294_967_301_u64])).eos, [5, 99]);
    for ids in [json!(100), json!([128_009, -1]), json!(u64::MAX)] {
        let spec = stated(ids);
        // What the tokenizer and the template say of ends counts then.
        assert!(spec.eos.is_empty() && !spec.eos_stated, "{spec:?}");
    }
    assert_eq!(read(&with(json!({"bos_token_id": 100, "eos_token_id": [100, 4]})), None).unwrap().bos, None);
}

#[test]
fn yarn_beside_an_unextended_length_extends_the_context() {
    let scaling = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048});
    assert_eq!(read(&with(json!({"rope_scaling": scaling})), None).unwrap().max_context, 8192);
}

/// What `max_position_embeddings` means beside each scaling, and the length that is left open.
#[test]
fn an_extended_context_has_its_extended_length() {
    let length = |scaling: Value, stated: Value| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), with(json!({"rope_scaling": scaling})).to_string()).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), stated.to_string()).unwrap();
        ModelSpec::from_dir(dir.path()).unwrap().max_context
    };
    let linear = |factor: f64| json!({"type": "linear", "factor": factor});
    // The length before is 2,048.
    assert_eq!(length(linear(4.0), json!({})), 8192);
    assert_eq!(length(linear(2.5), json!({"model_max_length": 1e30})), 5120);
    assert_eq!(length(linear(1.0), json!({})), 2048);
    // The tokenizer's configuration says that it is the length after, or something between.
    assert_eq!(length(linear(4.0), json!({"model_max_length": 2048})), 2048);
    assert_eq!(length(linear(4.0), json!({"model_max_length": 4096})), 4096);
    assert_eq!(length(linear(4.0), json!({"model_max_length": 512})), 8192);
    let original = json!({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 512});
    assert_eq!(length(original, json!({})), 2048);
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 512});
    assert_eq!(length(llama3, json!({"model_max_length": 4096})), 2048);
    assert_eq!(length(json!({"type": "default"}), json!({"model_max_length": 4096})), 2048);
    assert_eq!(length(json!(null), json!({"model_max_length": 4096})), 2048);
}

/// As transformers 5.24 reads each.
#[test]
fn a_window_is_that_of_the_layers_that_have_one() {
    let window = |architecture: &str, change: Value| {
        let mut config = with(json!({"architectures": [architecture], "num_key_value_heads": 2}));
        config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        read(&config, None).map(|spec| spec.sliding_window)
    };
    for qwen in ["Qwen2ForCausalLM", "Qwen3ForCausalLM"] {
        let used = |change: Value| {
            let mut all = json!({"use_sliding_window": true, "sliding_window": 64});
            all.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            window(qwen, all)
        };
        assert_eq!(used(json!({"max_window_layers": 2})).unwrap(), None);
        assert_eq!(used(json!({"max_window_layers": 70})).unwrap(), None);
        assert_eq!(used(json!({})).unwrap(), None, "28 layers are the default");
        assert_eq!(used(json!({"sliding_window": null, "max_window_layers": 0})).unwrap(), None);
        assert_eq!(used(json!({"max_window_layers": 0})).unwrap(), Some(64));
        assert_eq!(used(json!({"layer_types": ["sliding_attention", "sliding_attention"]})).unwrap(), Some(64));
        assert_eq!(
            used(json!({"max_window_layers": 0, "layer_types": ["full_attention", "full_attention"]})).unwrap(),
            None
        );
        assert!(used(json!({"max_window_layers": 1})).is_err());
        assert!(used(json!({"layer_types": ["full_attention", "sliding_attention"]})).is_err());
        assert_eq!(window(qwen, json!({"sliding_window": 64, "max_window_layers": 0})).unwrap(), None);
    }
    // Llama's configuration knows none of these fields.
    let all = json!({"use_sliding_window": true, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(window("LlamaForCausalLM", all).unwrap(), None);
    assert_eq!(window("MistralForCausalLM", json!({})).unwrap(), Some(4096));
    assert_eq!(window("MistralForCausalLM", json!({"sliding_window": null})).unwrap(), None);
}

#[test]
fn absent_and_null_fields_have_transformers_defaults() {
    let spec = |change: Value| read(&with(change), None).unwrap();
    assert_eq!(spec(json!({"num_key_value_heads": null})).kv_heads, 4);
    let mut absent = with(json!({"num_attention_heads": 32, "hidden_size": 512}));
    absent.as_object_mut().unwrap().remove("num_key_value_heads");
    for (architecture, kv_heads) in [("LlamaForCausalLM", 32), ("MistralForCausalLM", 8), ("Qwen2ForCausalLM", 32)] {
        absent["architectures"] = json!([architecture]);
        assert_eq!(read(&absent, None).unwrap().kv_heads, kv_heads, "{architecture}");
    }
    assert_eq!(spec(json!({"head_dim": null})).head_dim, 16);
    assert!(!spec(json!({"tie_word_embeddings": null})).tied_embeddings);
    let plain = spec(json!({}));
    for same in [
        json!({"rope_scaling": null, "rope_parameters": null, "torch_dtype": "float16", "dtype": null, "x": 1}),
        json!({"rope_scaling": {"type": "default"}}),
        json!({"rope_scaling": {"rope_type": "default", "factor": null}}),
        json!({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_scaling": {"type": "linear", "factor": 2}}),
        json!({"attention_bias": null, "mlp_bias": false, "hidden_act": "silu", "max_window_layers": 0}),
    ] {
        assert_eq!(spec(same.clone()), plain, "{same}");
    }
    assert_eq!(spec(json!({"rope_parameters": {"rope_theta": 5e5}})).rope.theta, 5e5);
}

#[test]
fn whether_the_ends_of_answers_are_stated_is_known() {
    assert!(!read(&llama(), None).unwrap().eos_stated);
    assert!(!read(&llama(), Some(&json!({"temperature": 1}))).unwrap().eos_stated);
    assert!(read(&llama(), Some(&json!({"eos_token_id": [3]}))).unwrap().eos_stated);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let cases = [
        (json!({"architectures": ["MixtralForCausalLM"]}), "MixtralForCausalLM", "Qwen3ForCausalLM"),
        (json!({"architectures": []}), "none named", "LlamaForCausalLM"),
        (json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), "\"dynamic\"", "frozen per sequence"),
        (
            json!({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}),
            "\"longrope\"",
            "change with the length",
        ),
        (json!({"rope_scaling": {"rope_type": "proportional"}}), "\"proportional\"", "llama3, yarn"),
        (
            json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "max_window_layers": 1}),
            "1 of 2 layers with a window",
            "full attention",
        ),
        (
            json!({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"]}),
            "layer_types",
            "full attention",
        ),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq", "bf16"),
        (json!({"hidden_act": "gelu"}), "gelu", "silu"),
        (json!({"head_dim": 20}), "20", "multiples of 16"),
    ];
    for (change, found, supported) in cases {
        let error = read(&with(change.clone()), None).unwrap_err();
        assert!(matches!(error, EngineError::Unsupported { .. }), "{change}: {error:?}");
        let text = error.to_string();
        assert!(text.contains(found) && text.contains(supported), "{text}");
    }
}

#[test]
fn a_wrong_field_is_named_with_what_was_expected() {
    let cases = [
        (
            json!({"num_key_value_heads": 3}),
            "`num_key_value_heads`: expected a divisor of num_attention_heads (4), found 3",
        ),
        (json!({"hidden_size": 0}), "`hidden_size`: expected a whole number from 1 to 2^30, found 0"),
        (json!({"vocab_size": null}), "`vocab_size`: expected a whole number from 1 to 2^30, found null"),
        (
            json!({"num_hidden_layers": "two"}),
            "`num_hidden_layers`: expected a whole number from 1 to 2^30, found \"two\"",
        ),
        (json!({"hidden_size": 66}), "`hidden_size`: expected a multiple of num_attention_heads (4), found 66"),
        (json!({"rms_norm_eps": 0}), "`rms_norm_eps`: expected a number between 0 and 1, found 0"),
        (json!({"rope_theta": -1.0}), "`rope_theta`: expected a number above 1, found -1.0"),
        (
            json!({"rope_scaling": {"type": "linear"}}),
            "`rope_scaling.factor`: expected a number above 0, found no such field",
        ),
        (json!({"rope_scaling": [1]}), "`rope_scaling`: expected an object or null, found [1]"),
        (json!({"tie_word_embeddings": 1}), "`tie_word_embeddings`: expected true or false, found 1"),
        (
            json!({"partial_rotary_factor": 0.5}),
            "`partial_rotary_factor`: expected 1 (the whole head is rotated), found 0.5",
        ),
    ];
    for (change, message) in cases {
        let error = read(&with(change.clone()), None).unwrap_err();
        assert!(matches!(error, EngineError::Config { .. }), "{change}: {error:?}");
        assert!(error.to_string().contains(message), "{error}");
    }
}

#[test]
fn a_missing_or_malformed_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(ModelSpec::from_dir(dir.path()), Err(EngineError::MissingFile { .. })));
    for text in ["", "{\"hidden_size\": 6", "[]", "\u{0}"] {
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let error = ModelSpec::from_dir(dir.path()).unwrap_err();
        assert!(matches!(error, EngineError::Config { .. }), "{error:?}");
        assert!(error.to_string().contains("config.json"), "{error}");
    }
}
