//! How files of a vector store are cut into chunks, as requests say it and as answers show it.

use serde_json::{Value, json};

use super::super::fields::Fields;
use super::super::values::{cut, invalid, size};
use service::{Chunking, StaticChunking};
use settings::Result;

/// Tokens of a chunk at least and at most, as in OpenAI's API.
const TOKENS: std::ops::RangeInclusive<usize> = 100..=4096;

/// What a request says; nothing means `auto`.
pub(super) fn read(name: &str, value: Option<Value>) -> Result<Chunking> {
    let Some(value) = value else { return Ok(Chunking::Auto) };
    let mut fields = Fields::within(name, value, "a chunking strategy takes type and static")?;
    let kind = fields.required("type")?;
    let chunking = match kind.as_str() {
        "auto" => Chunking::Auto,
        "static" => {
            let place = fields.name("static");
            let value = fields.take("static").ok_or_else(|| {
                invalid(&place, "expected max_chunk_size_tokens and chunk_overlap_tokens, found nothing".into())
            })?;
            Chunking::Static(read_static(&place, value)?)
        }
        other => {
            let problem = format!("expected auto or static, found `{}`", cut(other));
            return Err(invalid(&fields.name("type"), problem));
        }
    };
    fields.finish()?;
    Ok(chunking)
}

fn read_static(name: &str, value: Value) -> Result<StaticChunking> {
    let known = "a static strategy takes max_chunk_size_tokens and chunk_overlap_tokens";
    let mut fields = Fields::within(name, value, known)?;
    let mut number = |key: &str| -> Result<(usize, String)> {
        let place = fields.name(key);
        let value = fields.take(key).ok_or_else(|| invalid(&place, "expected it to be given, found nothing".into()))?;
        Ok((size(&place, &value, 0)?, place))
    };
    let (max_tokens, max_place) = number("max_chunk_size_tokens")?;
    let (overlap, overlap_place) = number("chunk_overlap_tokens")?;
    fields.finish()?;
    if !TOKENS.contains(&max_tokens) {
        let problem = format!("expected {} to {} tokens, found {max_tokens}", TOKENS.start(), TOKENS.end());
        return Err(invalid(&max_place, problem));
    }
    if overlap > max_tokens / 2 {
        let problem = format!("expected at most half of max_chunk_size_tokens ({max_tokens}), found {overlap}");
        return Err(invalid(&overlap_place, problem));
    }
    Ok(StaticChunking { max_tokens, overlap })
}

/// What an answer shows: of `auto`, what that means here.
pub(super) fn object(chunking: Chunking, auto: StaticChunking) -> Value {
    let of = |chunking: StaticChunking| {
        json!({"type": "static", "static": {"max_chunk_size_tokens": chunking.max_tokens,
               "chunk_overlap_tokens": chunking.overlap}})
    };
    match chunking {
        Chunking::Auto => of(auto),
        Chunking::Static(chunking) => of(chunking),
        Chunking::Other => json!({"type": "other"}),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::values::param_of;

    #[test]
    fn a_strategy_is_read_as_it_is_shown_and_bounded() {
        let auto = StaticChunking { max_tokens: 256, overlap: 32 };
        assert_eq!(read("c", None).unwrap(), Chunking::Auto);
        assert_eq!(read("c", Some(json!({"type": "auto"}))).unwrap(), Chunking::Auto);
        let of = |max: usize, overlap: usize| json!({"type": "static", "static": {"max_chunk_size_tokens": max, "chunk_overlap_tokens": overlap}});
        for (max, overlap) in [(100, 0), (4096, 2048)] {
            let chunking = read("c", Some(of(max, overlap))).unwrap();
            assert_eq!(object(chunking, auto), of(max, overlap));
        }
        assert_eq!(object(Chunking::Auto, auto), of(256, 32));
        for (value, place) in [
            (of(99, 0), "c.static.max_chunk_size_tokens"),
            (of(4097, 0), "c.static.max_chunk_size_tokens"),
            (of(100, 51), "c.static.chunk_overlap_tokens"),
            (json!({"type": "static"}), "c.static"),
            (json!({"type": "static", "static": {"max_chunk_size_tokens": 100}}), "c.static.chunk_overlap_tokens"),
            (json!({"type": "magic"}), "c.type"),
            (json!({"type": "auto", "magic": 1}), "c.magic"),
            (json!("auto"), "c"),
        ] {
            assert_eq!(param_of(read("c", Some(value.clone())).unwrap_err()), place, "{value}");
        }
    }
}
