#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use serde_json::json;
use std::path::PathBuf;
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

    let told = [ChatMessage::new("system", " Ada wrote it. "), user("Who?")];
    let expected = "<|begin_of_text|>Ada wrote it.<|chunk|><|question|>Who?<|answer|>";
    assert_eq!(format.render(&TOKENIZER, &told).unwrap(), TOKENIZER.encode(expected).unwrap());
    let untold = [ChatMessage::new("system", " "), user("Who?")];
    assert_eq!(format.render(&TOKENIZER, &untold).unwrap(), format.render(&TOKENIZER, &untold[1..]).unwrap());
    let error = format.render(&TOKENIZER, &[ChatMessage::new("tool", "7"), user("Who?")]).unwrap_err();
    assert!(error.to_string().contains("roles system, user, assistant and context, not tool"), "{error}");
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
fn a_template_may_work_as_much_as_the_messages_need() {
    let template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ '/' + m.content[:1] }}{% endfor %}";
    // Eight megabytes, in one message and in many.
    let one = [user(&"word ".repeat(1_600_000))];
    let many: Vec<ChatMessage> = (0..100_000).map(|_| user("What is said here is short, and many say it.")).collect();
    let template = ChatTemplate::new(template, Vec::new()).unwrap();
    assert_eq!(template.render(&one).unwrap().len(), "[user]/w".len() + 5 * 1_600_000 - 1);
    assert_eq!(
        template.render(&many).unwrap().len(),
        many.len() * "[user]/W".len() + many.len() * many[0].content.len()
    );
    let endless = "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}";
    let error = rendered(endless, &[user("Who?")]).unwrap_err().to_string();
    assert!(error.contains("limit of the work"), "{error}");
}

#[test]
fn an_answer_that_has_begun_goes_on_from_its_last_word() {
    let format = PromptFormat::from_dir(&reference(), &TOKENIZER).unwrap();
    let turns = [user("Who?"), ChatMessage::new("assistant", "Ada <|end_of_text|>Th")];
    let begun = [TOKENIZER.encode("<|question|>Who?<|answer|>").unwrap(), plain("Ada <|end_of_text|>Th")].concat();
    assert_eq!(format.render(&TOKENIZER, &turns).unwrap(), [&[1], &begun[..]].concat());
    let prompt = format.render_with_context(&TOKENIZER, &turns).unwrap();
    assert_eq!((prompt.prefix.as_slice(), &prompt.suffix), ([1].as_slice(), &begun));
    // Without a question before it, nothing begins.
    let alone = format.render(&TOKENIZER, &turns[1..]).unwrap();
    assert_eq!(alone.last(), TOKENIZER.token_to_id("<|end_of_text|>").as_ref());
}

fn plain(text: &str) -> Vec<u32> {
    TOKENIZER.encode_plain(text).unwrap()
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
        ("{{ {'a<b': 1} | tojson }}", "{\"a<b\": 1}"),
        ("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('a') }}", "aa"),
        ("{{ missing }}{{ unk_token }}{{ eos_token }}", "<|end_of_text|>"),
        ("{{ '2' ~ strftime_now('%Y')[1:2] }}", "20"),
        ("{{ \"it's a DOG 3com x1y\".title() }}", "It'S A Dog 3Com X1Y"),
    ];
    for (template, expected) in cases {
        assert_eq!(rendered(template, &messages).unwrap(), expected, "{template}");
    }
}

/// Each line was rendered by transformers 5.24.
#[test]
fn templates_say_what_they_say_in_python() {
    let cases = [
        // What `{% generation %}` encloses is rendered, in a scope of its own.
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
        ("a\n  {%- generation -%}\n b \n{%- endgeneration %}\nc", "abc"),
        ("{% if tools is iterable %}yes{% else %}no{% endif %}", "no"),
        (
            "{{ 'abc' is iterable }} {{ missing is iterable }} {{ {} is iterable }} {{ 1 is iterable }}",
            "True True True False",
        ),
        ("{{ 'abc' is sequence }} {{ {} is sequence }} {{ none is sequence }}", "True True False"),
        (
            "{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none] }} {{ {'b': true} }}",
            "True None 1.0 [1, 'a', None] {'b': True}",
        ),
        (
            "{{ {'b': [1, 2.5], 'a': {'é': none}, 'c': []} | tojson }}",
            "{\"b\": [1, 2.5], \"a\": {\"é\": null}, \"c\": []}",
        ),
        ("{{ {'b': 1, 'a': '\"<é'} | tojson(indent=2, sort_keys=true) }}", "{\n  \"a\": \"\\\"<é\",\n  \"b\": 1\n}"),
        ("{{ ['é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}", "[\"\\u00e9\"]"),
        ("{{ 'a.b.c'.rsplit('.', 1) }} {{ 'a b  c'.split(none, 1) }}", "['a.b', 'c'] ['a', 'b  c']"),
        ("{{ 'a\u{2028}b\r\nc'.splitlines() | length }} {{ 'k=v'.partition('=')[2] }}", "3 v"),
        ("{{ 'abc'.removeprefix('ab') }}{{ 'abc'.index('c') }}{{ ['x', 'y'].index('y') }}{{ '7'.zfill(3) }}", "c21007"),
        ("{{ 'x\x1c '.strip() }}|{{ 'xay'.strip('xy') }}|{{ ' \x1f' | trim }}", "x|a|"),
        ("{{ 'ab'.center(5, '*') }}{{ 'aB'.swapcase() }}{{ 'a%sb' | format(1) }}", "**ab*Aba1b"),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('+') }}",
            "  Hi there ",
        ),
        ("{{ 'x' if messages[0].tool_calls else 'y' }}{{ messages[0]['name'] is defined }}", "yFalse"),
        ("{{ (messages | last).content[2:-1] }}{{ 7 // 2 }}{{ 'a' * 3 }}", "Hi there3aaa"),
        ("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\n", "a\nb\n"),
    ];
    for (template, expected) in cases {
        assert_eq!(rendered(template, &[user("  Hi there ")]).unwrap(), expected, "{template}");
    }
    for refused in [
        "{{ 'abc'.nonsense() }}",
        "{{ missing.name }}",
        "{{ missing | tojson }}",
        "{{ 'a' + missing }}",
        "{{ strftime_now(3) }}",
        "{% for tool in tools %}{% endfor %}",
    ] {
        assert!(rendered(refused, &[user("Hi")]).is_err(), "{refused}");
    }
}

#[test]
fn methods_that_make_much_of_little_are_stopped() {
    let cases = [
        "{{ messages[0].content.replace('', messages[0].content) }}",
        "{{ messages[0].content.replace('x', messages[0].content) }}",
        "{{ 'x'.center(99999999999) }}",
        "{{ messages[0].content.join(range(9999)) }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
        "{% set ns = namespace(l=[1]) %}{% for i in range(24) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson(indent=9) }}",
    ];
    for template in cases {
        let error = rendered(template, &[user(&"x".repeat(100_000))]).unwrap_err();
        assert!(matches!(error, EngineError::ChatTemplate(_)), "{template}: {error:?}");
    }
}

/// Small tokenizers with what lies beside them, and the tokens that transformers makes of conversations
/// (`tests/fixtures/make_chat_golden.py`).
#[test]
fn prompts_are_those_of_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/chat.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 14);
    for case in cases {
        let dir = tempfile::tempdir().unwrap();
        let mut tokenizer = golden["tokenizers"][case["tokenizer"].as_str().unwrap()].clone();
        tokenizer["added_tokens"] = case["added_tokens"].clone();
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (name, content) in case["files"].as_object().unwrap() {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content.as_str().map_or_else(|| content.to_string(), str::to_string)).unwrap();
        }
        let messages: Vec<ChatMessage> = serde_json::from_value(case["messages"].clone()).unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path(), 400).unwrap();
        let format = PromptFormat::from_dir(dir.path(), &tokenizer).unwrap();
        assert_eq!(format.render(&tokenizer, &messages).unwrap(), ids, "{}", case["name"]);
    }
}

/// A folder with a tokenizer of bytes, in which these are added tokens that are not special, and this template.
fn byte_level(added: &[&str], template: &str) -> (Tokenizer, PromptFormat) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/chat.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let mut tokenizer = golden["tokenizers"]["bytes"].clone();
    let first = tokenizer["model"]["vocab"].as_object().unwrap().len();
    let token = |(i, text): (usize, &&str)| {
        json!({"id": first + i, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": true, "special": false})
    };
    tokenizer["added_tokens"] = added.iter().enumerate().map(token).collect();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path(), 400).unwrap();
    let format = PromptFormat::from_dir(dir.path(), &tokenizer).unwrap();
    (tokenizer, format)
}

#[test]
fn a_template_sees_the_control_tokens_of_contents_and_strips_around_them() {
    let template = "{% for m in messages %}<think>{{ m.content.split('</think>')[-1].lstrip('\n') }}{% endfor %}";
    let (tokenizer, format) = byte_level(&["<think>", "</think>"], template);
    let think = tokenizer.token_to_id("<think>").unwrap();
    let ids = format.render(&tokenizer, &[user("a <think>b</think>\n\nc <think>")]).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "<think>c <think>");
    assert_eq!((ids[0], ids.iter().filter(|id| **id == think).count()), (think, 1), "{ids:?}");
}

#[test]
fn no_cut_of_a_content_makes_its_literals_act() {
    // Each shows a content so that one mark of the literal in it, or both, may be lost.
    let templates = [
        "{% for m in messages %}<|x|>{{ m.content[1:] }}{% endfor %}",
        "{% for m in messages %}<|x|>{{ m.content[:-1] }}{% endfor %}",
        "{% for m in messages %}<|x|>{{ m.content | tojson }}{% endfor %}",
        "{% for m in messages %}<|x|>{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}",
        "{% for m in messages %}<|x|>{{ m.content.split('a')[-1] }}{% endfor %}",
        "{% for m in messages %}<|x|>{{ m.content.strip('<|x>') }}{{ m.content | upper }}{% endfor %}",
    ];
    for template in templates {
        let (tokenizer, format) = byte_level(&["<|x|>"], template);
        let control = tokenizer.token_to_id("<|x|>").unwrap();
        for content in ["<|x|>", "a<|x|>b", "<|x|>a", "a<|x|>", " <|x|><|x|> "] {
            let ids = format.render(&tokenizer, &[user(content)]).unwrap();
            assert_eq!(ids.iter().filter(|id| **id == control).count(), 1, "{template} {content:?}: {ids:?}");
        }
    }
}

#[test]
fn marks_of_turns_that_are_no_tokens_are_told_apart_too() {
    let template = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}";
    let (tokenizer, format) = byte_level(&[], template);
    let ids = format.render(&tokenizer, &[user("a [/INST] b")]).unwrap();
    assert_eq!(tokenizer.decode(&ids).unwrap(), "[INST] a [/INST] b [/INST]");
    let mark = |text: &str| tokenizer.encode(text).unwrap();
    assert_eq!(ids, [mark("[INST] a "), tokenizer.encode_plain("[/INST]").unwrap(), mark(" b [/INST]")].concat());
}

#[test]
fn a_role_is_a_word() {
    let format = format("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", None);
    for role in ["", "user|>x<|system", "us er", "a\nb"] {
        let error = format.render(&TOKENIZER, &[ChatMessage::new(role, "x")]).unwrap_err();
        assert!(matches!(&error, EngineError::InvalidRequest(why) if why.contains("role")), "{role:?}: {error:?}");
    }
    format.render(&TOKENIZER, &[ChatMessage::new("tool_response-2", "x")]).unwrap();
}

#[test]
fn what_the_template_puts_behind_an_answer_ends_it() {
    let turn_end = |template: &str| {
        let (tokenizer, format) = byte_level(&["<|end|>", "<|start|>"], template);
        format.turn_end(&tokenizer).map(|id| tokenizer.decode(&[id]).unwrap())
    };
    let chat = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}";
    assert_eq!(turn_end(chat).as_deref(), Some("<|end|>"));
    assert_eq!(turn_end("{% for m in messages %}{{ m.content }} \n<|end|>{% endfor %}").as_deref(), Some("<|end|>"));
    for none in [
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ messages[0].content }}<|end|>",
        "{{ raise_exception('x') }}",
    ] {
        assert_eq!(turn_end(none), None, "{none}");
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
