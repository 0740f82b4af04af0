//! The tokens that the files beside `tokenizer.json` declare, as transformers takes them in.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::error::{EngineError, Result};

/// The special tokens that every tokenizer may name, in transformers' order.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the files beside `tokenizer.json` say of its tokens.
#[derive(Debug, Default)]
pub(super) struct Declared {
    /// The literals of named tokens: `bos_token`, `<s>`.
    pub(super) names: Vec<(String, String)>,
    /// Tokens that `tokenizer.json` lacks or has with other properties, in the order in which they get their ids.
    pub(super) tokens: Vec<AddedToken>,
}

impl Declared {
    /// Reads `tokenizer_config.json` and, where that lists no added tokens, `special_tokens_map.json` and
    /// `added_tokens.json` in `dir`, each of which may be absent. `known`: the added tokens of `tokenizer.json`.
    ///
    /// # Errors
    /// [`EngineError::Config`] for a malformed file.
    pub(super) fn read(dir: &Path, known: &[AddedToken]) -> Result<Declared> {
        let config_path = dir.join("tokenizer_config.json");
        let mut config = object(&config_path)?;
        let listed = match config.get("added_tokens_decoder") {
            None | Some(Value::Null) => None,
            Some(Value::Object(listed)) => Some(decoder(listed).map_err(|field| {
                wrong(&config_path, &field, "an object with the token's `content`", "something else")
            })?),
            Some(_) => {
                return Err(wrong(&config_path, "added_tokens_decoder", "an object of tokens by id", "something else"));
            }
        };
        let legacy = listed.is_none();
        if legacy {
            config.extend(object(&dir.join("special_tokens_map.json"))?);
        }
        let names = names(&config);
        let extras = extras(&config);
        let mut tokens = match listed {
            Some(listed) => listed,
            None => legacy_tokens(&object(&dir.join("added_tokens.json"))?, &names, &extras),
        };
        tokens.retain(|token| !known.contains(token));
        // Last those that are only named; they get the next free ids unless the vocabulary has them.
        let named = names.iter().map(|(_, literal)| literal).chain(&extras);
        for literal in named {
            let has = |tokens: &[AddedToken]| tokens.iter().any(|token| token.content == *literal);
            if !has(known) && !has(&tokens) {
                tokens.push(AddedToken::from(literal.clone(), true));
            }
        }
        for token in &mut tokens {
            token.special |= names.iter().any(|(_, literal)| *literal == token.content);
        }
        Ok(Declared { names, tokens })
    }
}

/// A JSON object in a file; empty where there is no file.
fn object(path: &Path) -> Result<Map<String, Value>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(e) => return Err(EngineError::reading(path, e, "it names the special tokens")),
    };
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(wrong(path, "(the whole file)", "a JSON object", "something else")),
        Err(e) => Err(wrong(path, "(the whole file)", "a JSON object", &e.to_string())),
    }
}

fn wrong(path: &Path, field: &str, expected: &str, found: &str) -> EngineError {
    EngineError::Config {
        file: path.to_path_buf(),
        field: field.into(),
        expected: expected.into(),
        found: found.into(),
    }
}

/// The literal of a token, which may be given as an object with its properties.
fn literal(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// The named tokens: those of every model, `..._token` of this one, and a mapping of further ones.
fn names(config: &Map<String, Value>) -> Vec<(String, String)> {
    let further = config.get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
    let own = config.iter().filter(|(name, _)| name.ends_with("_token") && !NAMED.contains(&name.as_str()));
    let named = NAMED.into_iter().filter_map(|name| Some((name.to_string(), literal(config.get(name)?)?)));
    named.chain(own.chain(further).filter_map(|(name, value)| Some((name.clone(), literal(value)?)))).collect()
}

/// Special tokens without a name.
fn extras(config: &Map<String, Value>) -> Vec<String> {
    let list = |name: &str| config.get(name).and_then(Value::as_array).filter(|list| !list.is_empty());
    let found = list("extra_special_tokens").or_else(|| list("additional_special_tokens"));
    found.into_iter().flatten().filter_map(literal).collect()
}

/// `added_tokens_decoder`, by id. The error is the field that is wrong.
fn decoder(listed: &Map<String, Value>) -> std::result::Result<Vec<AddedToken>, String> {
    let mut tokens = BTreeMap::new();
    for (id, properties) in listed {
        let field = || format!("added_tokens_decoder.{id}");
        let content = properties["content"].as_str().ok_or_else(field)?;
        let flag = |name: &str, default: bool| properties[name].as_bool().unwrap_or(default);
        let special = flag("special", false);
        let token = AddedToken::from(content.to_string(), special)
            .single_word(flag("single_word", false))
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .normalized(flag("normalized", !special));
        tokens.insert(id.parse::<u64>().map_err(|_| field())?, token);
    }
    Ok(tokens.into_values().collect())
}

/// `added_tokens.json`: literals and their ids.
fn legacy_tokens(listed: &Map<String, Value>, names: &[(String, String)], extras: &[String]) -> Vec<AddedToken> {
    let mut listed: Vec<(&String, u64)> =
        listed.iter().map(|(literal, id)| (literal, id.as_u64().unwrap_or(u64::MAX))).collect();
    listed.sort_by_key(|(_, id)| *id);
    let special = |literal: &String| extras.contains(literal) || names.iter().any(|(_, named)| named == literal);
    listed.into_iter().map(|(literal, _)| AddedToken::from(literal.clone(), special(literal))).collect()
}
