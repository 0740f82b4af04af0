#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// The reference model's: byte-level BPE, special tokens 0 to 5.
static REFERENCE: LazyLock<Tokenizer> = LazyLock::new(|| {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference");
    Tokenizer::from_dir(&dir, 7168).unwrap()
});

/// One as Llama 2 has it: a mark at the beginning of a text, bytes for what the vocabulary lacks.
static FALLBACK: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut vocab = serde_json::Map::new();
    let words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "é", "[X]"].map(str::to_string);
    for token in words.into_iter().chain((0..256).map(|b| format!("<0x{b:02X}>"))) {
        vocab.insert(token, json!(vocab.len()));
    }
    let special = |id: u32, content: &str, rstrip: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": rstrip,
               "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(0, "<unk>", false), special(1, "<s>", false), special(2, "</s>", false), special(8, "[X]", true)],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                  "vocab": vocab, "merges": [["▁", "a"]]},
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}"#,
    )
    .unwrap();
    Tokenizer::from_dir(dir.path(), 300).unwrap()
});

const SPECIALS: [&str; 6] =
    ["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|chunk|>", "<|question|>", "<|answer|>"];

#[test]
fn special_tokens_are_recognised_only_in_trusted_text() {
    for (id, literal) in (0u32..).zip(SPECIALS) {
        let text = format!("One{literal}two");
        assert!(REFERENCE.is_special(id));
        assert!(REFERENCE.encode(&text).unwrap().contains(&id));
        let plain = REFERENCE.encode_plain(&text).unwrap();
        assert!(plain.iter().all(|id| !REFERENCE.is_special(*id)), "{plain:?}");
        assert_eq!(REFERENCE.decode(&plain).unwrap(), text);
        assert_eq!(REFERENCE.decode(&REFERENCE.encode(&text).unwrap()).unwrap(), "Onetwo");
        assert_eq!(REFERENCE.decode_with_specials(&REFERENCE.encode(&text).unwrap()).unwrap(), text);
    }
    assert_eq!((REFERENCE.bos(), REFERENCE.eos()), (Some(1), Some(2)));
    assert_eq!((FALLBACK.bos(), FALLBACK.eos()), (Some(1), Some(2)));
}

#[test]
fn tokens_beyond_the_vocabulary_are_never_made() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference");
    let all = std::fs::read(dir.join("tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_slice(&all).unwrap();
    let added = json["added_tokens"].as_array_mut().unwrap();
    let mut unused = added[0].clone();
    unused["id"] = json!(7168);
    unused["content"] = json!("<|unused|>");
    added.push(unused);
    let copy = tempfile::tempdir().unwrap();
    std::fs::write(copy.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(copy.path(), 7168).unwrap();
    let text = "a <|unused|> b";
    for ids in [tokenizer.encode(text).unwrap(), tokenizer.encode_plain(text).unwrap()] {
        assert!(ids.iter().all(|id| *id < 7168), "{ids:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    }
    // An ordinary word of the vocabulary that the model lacks is an error where it is needed.
    let short = Tokenizer::from_dir(&dir, 7160).unwrap();
    assert_eq!(short.encode_plain("the").unwrap(), REFERENCE.encode_plain("the").unwrap());
    let word = REFERENCE.decode(&[7167]).unwrap();
    for error in [short.encode_plain(&word), short.encode(&word)] {
        assert!(matches!(error, Err(EngineError::TokenizerMismatch { id: 7160.., vocab: 7160, .. })), "{error:?}");
    }
    assert!(short.encode_plain_with_offsets(&word).is_err());
}

#[test]
fn the_tokenizer_of_a_larger_model_is_refused() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../eval/models/reference");
    match Tokenizer::from_dir(&dir, 7000) {
        Err(EngineError::TokenizerMismatch { id: 7167, vocab: 7000, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_piece_that_plain_text_gives_is_taken_apart() {
    // Unigram models have their special tokens among their pieces.
    let vocab =
        json!([["<unk>", 0.0], ["</s>", -1.0], ["<", -2.0], ["/", -2.0], ["s", -2.0], [">", -2.0], ["a", -2.0]]);
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": null, "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
        "added_tokens": [{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
    });
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path(), 7).unwrap();
    assert_eq!(tokenizer.encode("a</s>").unwrap(), [6, 1]);
    assert_eq!(tokenizer.encode_plain("a</s>a").unwrap(), [6, 2, 3, 4, 5, 6]);
    let offsets = tokenizer.encode_plain_with_offsets("a</s>a</s>").unwrap();
    let ranges: Vec<Range<usize>> = offsets.into_iter().map(|(_, range)| range).collect();
    assert_eq!(ranges, (0..10).map(|at| at..at + 1).collect::<Vec<_>>());
}

#[test]
fn a_missing_or_damaged_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Tokenizer::from_dir(dir.path(), 10), Err(EngineError::MissingFile { .. })));
    for text in ["", "{}", "{\"model\": 3}"] {
        std::fs::write(dir.path().join("tokenizer.json"), text).unwrap();
        let error = Tokenizer::from_dir(dir.path(), 10).unwrap_err();
        assert!(matches!(error, EngineError::Tokenizer { .. }), "{error:?}");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn offsets_point_into_the_text() {
    let text = "Rhine: 1,233 km — née “Rhenus” 🙂.";
    let tokens = REFERENCE.encode_plain_with_offsets(text).unwrap();
    assert_eq!(tokens.iter().map(|(id, _)| *id).collect::<Vec<_>>(), REFERENCE.encode_plain(text).unwrap());
    assert!(tokens.iter().all(|(_, range)| text.get(range.clone()).is_some_and(|t| !t.is_empty())));
    assert_eq!((tokens[0].1.start, tokens.last().unwrap().1.end), (0, text.len()));
}

#[test]
fn parts_are_tokenised_as_the_text_they_make_up() {
    let parts = [Part::Trusted("<s>[X]  a"), Part::Plain("b</s>"), Part::Trusted("a</s>")];
    let ids = FALLBACK.encode_parts(&parts, false).unwrap();
    // The special token swallows the spaces behind it, and only the first text of all would be marked.
    assert_eq!(ids[..4], [1, 8, 4, 5]);
    assert_eq!(ids.iter().filter(|id| FALLBACK.is_special(**id)).copied().collect::<Vec<_>>(), [1, 8, 2]);
    assert_eq!(*ids.last().unwrap(), 2);
    assert_eq!(FALLBACK.encode_parts(&[Part::Trusted("a")], false).unwrap(), [6]);
    assert_eq!(FALLBACK.encode_parts(&[Part::Trusted("a")], true).unwrap(), [4]);
    assert_eq!(FALLBACK.encode_parts(&[], true).unwrap(), Vec::<u32>::new());
}

fn streamed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = tokenizer.stream();
    let mut text = String::new();
    for id in ids {
        text += &decoder.push(*id).unwrap();
    }
    text + &decoder.finish().unwrap()
}

#[test]
fn half_a_character_is_held_back() {
    for tokenizer in [&*REFERENCE, &*FALLBACK] {
        let ids = tokenizer.encode_plain("a🙂b").unwrap();
        let mut decoder = tokenizer.stream();
        let pieces: Vec<String> = ids.iter().map(|id| decoder.push(*id).unwrap()).collect();
        assert!(pieces.iter().all(|p| !p.contains('\u{fffd}')), "{pieces:?}");
        assert!(pieces.iter().any(|p| p.contains('🙂')), "{pieces:?}");
        assert_eq!(pieces.concat(), "a🙂b");
    }
}

#[test]
fn a_cut_character_ends_as_the_whole_decode_ends() {
    for tokenizer in [&*REFERENCE, &*FALLBACK] {
        let ids = tokenizer.encode_plain("a 🙂").unwrap();
        let cut = &ids[..ids.len() - 1];
        assert_eq!(streamed(tokenizer, cut), tokenizer.decode(cut).unwrap());
        assert!(streamed(tokenizer, cut).ends_with('\u{fffd}'));
    }
}

fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        "[ a-zA-Z0-9,.\n]{0,12}",
        any::<String>(),
        prop::sample::select(SPECIALS.to_vec()).prop_map(str::to_string),
        prop::sample::select(vec!["<|", "|>", "<|end_of_text|", "🙂", "é", "<s>", "[X] ", "</s>"])
            .prop_map(str::to_string),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn plain_text_survives_and_holds_no_special_token(text in text()) {
        let ids = REFERENCE.encode_plain(&text).unwrap();
        prop_assert!(ids.iter().all(|id| !REFERENCE.is_special(*id) && *id < 7168));
        prop_assert_eq!(REFERENCE.decode(&ids).unwrap(), text);
    }

    #[test]
    fn trusted_parts_are_encoded_as_the_library_encodes_them(text in text()) {
        for tokenizer in [&*REFERENCE, &*FALLBACK] {
            let parts = [Part::Trusted(text.as_str())];
            prop_assert_eq!(tokenizer.encode_parts(&parts, false).unwrap(), tokenizer.encode(&text).unwrap());
        }
    }

    #[test]
    fn a_stream_gives_what_the_whole_gives(ids in prop::collection::vec(0u32..7168, 0..40)) {
        prop_assert_eq!(streamed(&REFERENCE, &ids), REFERENCE.decode(&ids).unwrap());
    }

    #[test]
    fn a_stream_of_texts_with_fallback_gives_what_the_whole_gives(text in "[^\u{fffd}]{0,30}", specials in 0usize..3) {
        let mut ids = FALLBACK.encode_plain(&text).unwrap();
        for _ in 0..specials { ids.insert(ids.len() / 2, 2); }
        // Special tokens have no text: the bytes of a character on both sides of them are joined.
        prop_assert_eq!(streamed(&FALLBACK, &ids), FALLBACK.decode(&ids).unwrap());
    }
}

/// The bytes of tokens, the first of which begin a text.
fn bytes_of(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u8> {
    ids.iter().enumerate().flat_map(|(index, id)| tokenizer.token_bytes(*id, index == 0).unwrap()).collect()
}

proptest! {
    #[test]
    fn the_bytes_of_a_texts_tokens_are_its_bytes(text in "[a-zé備\\u{1f917}\\u{ad}\\u{7f} \\n]{0,12}") {
        let ids = REFERENCE.encode_plain(&text).unwrap();
        prop_assert_eq!(bytes_of(&REFERENCE, &ids), text.as_bytes());
        prop_assert!(ids.len() >= REFERENCE.least_tokens(text.len()));
    }

    #[test]
    fn bytes_that_the_vocabulary_lacks_are_tokens_of_their_own(text in "[abé備 ]{0,12}") {
        let ids = FALLBACK.encode_plain(&text).unwrap();
        // A space at the beginning is the mark that every text begins with.
        prop_assert_eq!(bytes_of(&FALLBACK, &ids), FALLBACK.decode(&ids).unwrap().into_bytes());
    }
}

#[test]
fn a_token_alone_has_its_bytes() {
    let bytes = |tokenizer: &Tokenizer, token: &str, begins| {
        tokenizer.token_bytes(tokenizer.token_to_id(token).unwrap(), begins).unwrap()
    };
    assert_eq!(bytes(&REFERENCE, "Ġrepresentatives", false), b" representatives");
    assert_eq!(bytes(&REFERENCE, "Ġrepresentatives", true), b" representatives");
    assert_eq!(bytes(&REFERENCE, "<|question|>", false), b"<|question|>");
    assert_eq!((bytes(&FALLBACK, "▁a", false), bytes(&FALLBACK, "▁a", true)), (b" a".to_vec(), b"a".to_vec()));
    assert_eq!(bytes(&FALLBACK, "<0xE5>", true), [0xe5]);
    assert_eq!(REFERENCE.token_bytes(7168, false).unwrap(), b"");
}

#[test]
fn the_longest_token_says_how_few_tokens_a_text_has() {
    // `Contextualization` behind a space.
    assert_eq!(REFERENCE.least_tokens(18 * 1000), 1000);
    assert_eq!(REFERENCE.least_tokens(18 * 1000 + 1), 1001);
    // One of its tokens swallows white space.
    assert_eq!(FALLBACK.least_tokens(1 << 30), 0);
}
