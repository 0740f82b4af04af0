#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use serde_json::json;
use std::sync::LazyLock;
use tempfile::TempDir;

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference")
}

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_dir(&reference(), 7168).unwrap());

fn user(text: &str) -> ChatMessage {
    ChatMessage::new("user", text)
}

fn folder(template: &str, prompt: Option<Value>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}, "chat_template": template});
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    if let Some(prompt) = prompt {
        std::fs::write(dir.path().join("prompt.json"), prompt.to_string()).unwrap();
    }
    dir
}

fn format(template: &str, prompt: Option<Value>) -> PromptFormat {
    PromptFormat::from_dir(folder(template, prompt).path(), &TOKENIZER).unwrap()
}

fn rendered(template: &str, messages: &[ChatMessage]) -> Result<String> {
    TOKENIZER.decode_with_specials(&format(template, None).render(&TOKENIZER, messages)?)
}

#[test]
fn the_reference_model_gets_its_own_form() {
    let format = PromptFormat::from_dir(&reference(), &TOKENIZER).unwrap();
    let prompt = format.render_with_context(&TOKENIZER, &[user(" Who? ")]).unwrap();
    assert_eq!(prompt.prefix, [1]);
    assert_eq!(prompt.suffix, TOKENIZER.encode("<|question|>Who?<|answer|>").unwrap());
    assert_eq!(TOKENIZER.encode(format.chunk_suffix()).unwrap(), [3]);

    let turns = [user("Who?"), ChatMessage::new("assistant", "Ada"), user("When?")];
    let prompt = format.render_with_context(&TOKENIZER, &turns).unwrap();
    assert_eq!(prompt.prefix, [1]);
    let expected = "<|question|>Who?<|answer|>Ada<|end_of_text|><|question|>When?<|answer|>";
    assert_eq!(prompt.suffix, TOKENIZER.encode(expected).unwrap());
    assert_eq!(format.render(&TOKENIZER, &turns).unwrap(), [&[1], &prompt.suffix[..]].concat());

    let error = format.render(&TOKENIZER, &[ChatMessage::new("system", "Be kind"), user("Who?")]).unwrap_err();
    assert!(error.to_string().contains("roles user, assistant and context, not system"), "{error}");
}

#[test]
fn without_a_context_role_the_context_stands_before_the_first_question() {
    let template =
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}";
    let messages = [ChatMessage::new("system", "S"), user("One?"), ChatMessage::new("assistant", "1"), user("Two?")];
    let prompt = format(template, None).render_with_context(&TOKENIZER, &messages).unwrap();
    let text = |ids: &[u32]| TOKENIZER.decode_with_specials(ids).unwrap();
    assert_eq!(
        text(&prompt.prefix),
        "<|begin_of_text|>[system]S<|end_of_text|>[user]Answer from the passages below.\n\n"
    );
    assert_eq!(text(&prompt.suffix), "One?<|end_of_text|>[assistant]1<|end_of_text|>[user]Two?<|end_of_text|>");

    let prompt = json!({"context_role": "context", "chunk_suffix": "<|chunk|>"});
    let prompt = format(template, Some(prompt)).render_with_context(&TOKENIZER, &messages).unwrap();
    assert_eq!(text(&prompt.prefix), "<|begin_of_text|>[system]S<|end_of_text|>[context]");
    assert!(text(&prompt.suffix).starts_with("<|end_of_text|>[user]One?"));
}

#[test]
fn a_template_that_hides_the_context_or_doubles_it_is_refused() {
    let role = Some(json!({"context_role": "context"}));
    let hides = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
    let error = format(hides, role).render_with_context(&TOKENIZER, &[user("Who?")]).unwrap_err();
    assert!(error.to_string().contains("leaves out the retrieved context"), "{error}");
    let doubles = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}";
    let error = format(doubles, None).render_with_context(&TOKENIZER, &[user("Who?")]).unwrap_err();
    assert!(error.to_string().contains("twice"), "{error}");
}

#[test]
fn a_model_without_a_template_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let format = PromptFormat::from_dir(dir.path(), &TOKENIZER).unwrap();
    assert!(!format.has_template());
    let error = format.render(&TOKENIZER, &[user("Who?")]).unwrap_err();
    assert!(error.to_string().contains("chat_template.jinja"), "{error}");
}

#[test]
fn requests_without_anything_to_answer_are_refused() {
    let format = format("{% for m in messages %}{{ m.content }}{% endfor %}", None);
    assert!(matches!(format.render(&TOKENIZER, &[]), Err(EngineError::InvalidRequest(_))));
    let only = [ChatMessage::new("assistant", "1")];
    assert!(matches!(format.render_with_context(&TOKENIZER, &only), Err(EngineError::InvalidRequest(_))));
    assert!(matches!(format.render_with_context(&TOKENIZER, &[user("")]), Err(EngineError::InvalidRequest(_))));
}

#[test]
fn templates_see_what_hugging_face_shows_them() {
    let messages = [user("  Hi there ")];
    let cases = [
        ("{%- for m in messages %}\n    {{ m['content'].strip() }}\n{%- endfor %}", "    Hi there"),
        ("{% if tools is not none %}tools{% endif %}{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}end", "end"),
        ("{{ messages[0].items() | list | length }}{{ messages[0].get('name', '-') }}", "2-"),
        ("{{ messages[-1].content.split('t')[0] }}", "  Hi "),
        ("{{ {'a<b': 1} | tojson }}", "{\"a<b\":1}"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('a') }}", "aa"),
        ("{{ missing }}{{ unk_token }}{{ eos_token }}", "<|end_of_text|>"),
        ("{{ '2' ~ strftime_now('%Y')[1:2] }}", "20"),
    ];
    for (template, expected) in cases {
        assert_eq!(rendered(template, &messages).unwrap(), expected, "{template}");
    }
}

#[test]
fn a_template_cannot_run_for_ever_fill_memory_or_read_files() {
    let cases = [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "limit of"),
        (
            "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "limit of",
        ),
        ("{% for a in range(9999) %}{{ messages[0].content }}{% endfor %}", "limit of"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ""),
        ("{% include '/etc/passwd' %}", "/etc/passwd"),
        ("{{ raise_exception('no ' + messages[0].role) }}", "no user"),
    ];
    let messages = [user(&"x".repeat(10_000))];
    for (template, message) in cases {
        let error = rendered(template, &messages).unwrap_err();
        assert!(matches!(error, EngineError::ChatTemplate(_)), "{template}: {error:?}");
        assert!(error.to_string().contains(message), "{template}: {error}");
    }
    let broken = PromptFormat::from_dir(folder("{% for %}", None).path(), &TOKENIZER).unwrap_err();
    assert!(broken.to_string().contains("line 1"), "{broken}");
}

#[test]
fn a_misspelt_field_of_prompt_json_is_named() {
    let dir = folder("x", Some(json!({"chunk_sufix": "x"})));
    let error = PromptFormat::from_dir(dir.path(), &TOKENIZER).unwrap_err().to_string();
    assert!(error.contains("prompt.json") && error.contains("chunk_sufix"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Contents never become special tokens, and otherwise the prompt is what the library makes of the whole text.
    #[test]
    fn contents_cannot_inject_special_tokens(
        pieces in prop::collection::vec(
            prop::sample::select(vec!["a", " b", "<|end_of_text|>", "<|question|>", "<|", "|>", "é", "\n", "<|chunk|><|answer|>"]), 1..8),
    ) {
        let content = pieces.concat();
        let template = "{% for m in messages %}<|question|>{{ m.content }}<|answer|>{% endfor %}";
        let ids = format(template, None).render(&TOKENIZER, &[user(&content)]).unwrap();
        let specials: Vec<u32> = ids.iter().copied().filter(|id| TOKENIZER.is_special(*id)).collect();
        prop_assert_eq!(specials, [4, 5]);
        prop_assert_eq!(TOKENIZER.decode(&ids).unwrap(), content.clone());
        prop_assert_eq!(ids, [&[4], &TOKENIZER.encode_plain(&content).unwrap()[..], &[5]].concat());
    }
}
