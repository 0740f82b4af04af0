//! The objects that answer a chat completion, in OpenAI's shapes.

use std::sync::atomic::{AtomicU64, Ordering};

use engine::TokenLogprob;
use serde_json::{Value, json};

use super::citation;
use super::state::unix_now;
use service::Answer;

/// The log-probability of what is impossible, as OpenAI writes it: minus infinity is no number in JSON.
const IMPOSSIBLE: f32 = -9999.0;

/// What all objects of one completion share.
pub(super) struct Head {
    id: String,
    created: u64,
    model: String,
    /// Whether tokens are reported.
    logprobs: bool,
}

/// An answer with the tokens that were asked for.
pub(super) type Choice = (Answer, Vec<TokenLogprob>);

impl Head {
    pub(super) fn new(model: &str, logprobs: bool) -> Head {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let seed = format!("{} {count} {:?}", std::process::id(), std::time::SystemTime::now());
        let hash = blake3::hash(seed.as_bytes()).to_hex();
        Head { id: format!("chatcmpl-{}", &hash[..24]), created: unix_now(), model: model.into(), logprobs }
    }

    fn object(&self, object: &str, choices: Value) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices})
    }

    /// The whole completion; one answer at least.
    pub(super) fn whole(&self, answers: &[Choice]) -> Value {
        let choice = |(index, (answer, tokens)): (usize, &Choice)| {
            let annotations = citation::annotations(answer);
            let message =
                json!({"role": "assistant", "content": answer.text, "refusal": null, "annotations": annotations});
            json!({"index": index, "message": message, "logprobs": self.logprobs(tokens),
                   "finish_reason": answer.finish_reason})
        };
        let mut object = self.object("chat.completion", answers.iter().enumerate().map(choice).collect());
        object["usage"] = usage(answers.iter().map(|(answer, _)| answer));
        object["quire"] = answers.first().map_or(Value::Null, |(answer, _)| quire(answer));
        object
    }

    /// The first chunk of an answer, with what its reader should know before it.
    pub(super) fn opening(&self, index: usize, notes: &[String]) -> Value {
        let mut chunk = self.chunk(index, json!({"role": "assistant", "content": ""}), Value::Null, None);
        if !notes.is_empty() {
            chunk["quire"] = json!({"notes": notes});
        }
        chunk
    }

    /// More text, and the tokens it is made of.
    pub(super) fn text(&self, index: usize, text: &str, tokens: &[TokenLogprob]) -> Value {
        self.chunk(index, json!({"content": text}), self.logprobs(tokens), None)
    }

    /// The last chunk of an answer, with its annotations.
    pub(super) fn closing(&self, index: usize, answer: &Answer, tokens: &[TokenLogprob]) -> Value {
        let logprobs = if tokens.is_empty() { Value::Null } else { self.logprobs(tokens) };
        let annotations = citation::annotations(answer);
        let delta = if annotations.is_empty() { json!({}) } else { json!({"annotations": annotations}) };
        let mut chunk = self.chunk(index, delta, logprobs, Some(&answer.finish_reason));
        chunk["quire"] = quire(answer);
        chunk
    }

    /// The chunk behind all others, where it is asked for.
    pub(super) fn usage(&self, answers: &[Answer]) -> Value {
        let mut chunk = self.object("chat.completion.chunk", json!([]));
        chunk["usage"] = usage(answers.iter());
        chunk
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish_reason: Option<&str>) -> Value {
        let choice = json!({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        self.object("chat.completion.chunk", json!([choice]))
    }

    fn logprobs(&self, tokens: &[TokenLogprob]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let entry = |text: &str, bytes: &[u8], logprob: f32| json!({"token": text, "logprob": logprob.max(IMPOSSIBLE), "bytes": bytes});
        let token = |token: &TokenLogprob| {
            let mut value = entry(&token.text, &token.bytes, token.logprob);
            value["top_logprobs"] =
                token.top.iter().map(|other| entry(&other.text, &other.bytes, other.logprob)).collect();
            value
        };
        json!({"content": tokens.iter().map(token).collect::<Vec<_>>(), "refusal": null})
    }
}

/// All answers have one prompt.
fn usage<'a>(answers: impl Iterator<Item = &'a Answer>) -> Value {
    let mut answers = answers.map(|answer| &answer.stats);
    let Some(first) = answers.next() else { return Value::Null };
    let completion = first.completion_tokens + answers.map(|stats| stats.completion_tokens).sum::<usize>();
    json!({
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.reused_tokens + first.prefix_tokens},
    })
}

fn quire(answer: &Answer) -> Value {
    let citations: Vec<Value> = answer.citations.iter().map(citation::public).collect();
    json!({"stats": answer.stats, "citations": citations, "notes": answer.notes})
}
