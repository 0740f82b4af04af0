//! From the body of a chat completion to a question. What is not supported is refused by name, never ignored; what asks for
//! nothing is accepted.

mod messages;
mod neutral;
mod retrieval;

use engine::{ChatMessage, MAX_TOP_LOGPROBS};
use serde_json::{Map, Value};

use super::values::{boolean, brief, cut, invalid, named, number, share, size, text};
use retrieval::Retrieval;
use service::{Options, Passages};
use settings::{QuireError, Result};

/// Most texts in `stop`.
const MAX_STOPS: usize = 16;

/// Wrong keys of `logit_bias` that an error names.
const NAMED_KEYS: usize = 10;

/// What a body is read against.
#[derive(Debug)]
pub(super) struct Defaults<'a> {
    /// How an answer is made where the body says nothing.
    pub(super) options: &'a Options,
    pub(super) top_chunks: usize,
    /// The model that is offered.
    pub(super) model: &'a str,
    /// Answers that a request may ask for.
    pub(super) most_choices: usize,
}

/// A chat completion as it was asked for.
#[derive(Debug)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<ChatMessage>,
    pub(super) options: Options,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// What to answer from; `None`: from the messages alone.
    pub(super) passages: Option<Passages>,
    /// Answers that are wanted.
    pub(super) choices: usize,
}

impl ChatRequest {
    /// Reads a body.
    pub(super) fn parse(body: &[u8], defaults: &Defaults<'_>) -> Result<ChatRequest> {
        let body: Value = serde_json::from_slice(body).map_err(|e| invalid("body", format!("expected JSON: {e}")))?;
        let Value::Object(body) = body else {
            return Err(invalid("body", format!("expected a JSON object, found {}", brief(&body))));
        };
        let mut request = ChatRequest {
            messages: Vec::new(),
            options: defaults.options.clone(),
            stream: false,
            include_usage: false,
            passages: None,
            choices: 1,
        };
        let mut retrieval = Retrieval::default();
        if body.get("messages").is_none_or(Value::is_null) {
            return Err(invalid("messages", "expected it to be given, found nothing".into()));
        }
        // `null` means "not given", as in OpenAI's API.
        for (key, value) in body.iter().filter(|(_, value)| !value.is_null()) {
            match key.as_str() {
                "quire" => request.quire(value, &mut retrieval)?,
                _ => request.field(key, value, defaults)?,
            }
        }
        neutral::check_tools(&body)?;
        request.check_stream_options(&body)?;
        request.check_limits(&body)?;
        request.logprobs(&body)?;
        messages::check_end(&request.messages, &body)?;
        request.passages = retrieval.resolve(&request.messages, defaults.top_chunks)?;
        Ok(request)
    }

    fn field(&mut self, key: &str, value: &Value, defaults: &Defaults<'_>) -> Result<()> {
        let options = &mut self.options;
        let sampling = &mut options.sampling;
        match key {
            "model" => {
                let found: String = text(key, value)?;
                if found != defaults.model {
                    return Err(QuireError::UnknownModel { found: cut(&found), served: defaults.model.into() });
                }
            }
            "messages" => self.messages = messages::read(value)?,
            "stream" => self.stream = boolean(key, value)?,
            "stream_options" => self.include_usage = stream_options(value)?,
            "n" => self.choices = choices(value, defaults.most_choices)?,
            "max_tokens" | "max_completion_tokens" => options.max_tokens = bound(key, value, 1)?,
            "min_tokens" => options.min_tokens = size(key, value, 0)?,
            "temperature" => sampling.temperature = number(key, value)?,
            "top_p" => sampling.top_p = number(key, value)?,
            "top_k" => sampling.top_k = bound(key, value, 0)?.unwrap_or(0),
            "min_p" => sampling.min_p = number(key, value)?,
            "presence_penalty" => sampling.presence_penalty = number(key, value)?,
            "frequency_penalty" => sampling.frequency_penalty = number(key, value)?,
            "repetition_penalty" => sampling.repetition_penalty = number(key, value)?,
            "logit_bias" => sampling.logit_bias = logit_bias(value)?,
            "seed" => sampling.seed = Some(seed(value)?),
            "stop" => options.stop = stops(value)?,
            "ignore_eos" => options.ignore_eos = boolean(key, value)?,
            // Looked at together, once all fields are known.
            "logprobs"
            | "top_logprobs"
            | "tools"
            | "tool_choice"
            | "continue_final_message"
            | "add_generation_prompt" => {}
            _ => neutral::check(key, value)?,
        }
        Ok(())
    }

    fn quire(&mut self, value: &Value, retrieval: &mut Retrieval) -> Result<()> {
        let Value::Object(fields) = value else {
            return Err(invalid("quire", format!("expected an object, found {}", brief(value))));
        };
        for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
            let name = format!("quire.{}", cut(key));
            let attention = &mut self.options.attention;
            let blend = &mut self.options.blend;
            match key.as_str() {
                "strategy" => attention.strategy = named(&name, value)?,
                "sinks" => attention.sinks = size(&name, value, 0)?,
                "window" => attention.window = size(&name, value, 1)?,
                "k" => attention.k = size(&name, value, 1)?,
                "ef" => attention.ef = size(&name, value, 1)?,
                "index" => attention.index = named(&name, value)?,
                "blend" => blend.mode = named(&name, value)?,
                "ratio" => blend.ratio = share(&name, value)?,
                "blend_mass" => blend.mass = Some(share(&name, value)?),
                "correction" => blend.correction = Some(named(&name, value)?),
                "blend_gate" => blend.gate.on = boolean(&name, value)?,
                "check_layer" => blend.check_layer = size(&name, value, 0)?,
                _ if retrieval.field(key, &name, value)? => {}
                _ => return Err(QuireError::UnsupportedParameter { param: name, hint: QUIRE_FIELDS }),
            }
        }
        Ok(())
    }

    fn check_stream_options(&self, body: &Map<String, Value>) -> Result<()> {
        match body.get("stream_options") {
            Some(options) if !options.is_null() && !self.stream => {
                Err(invalid("stream_options", "expected only together with `stream`: true".into()))
            }
            _ => Ok(()),
        }
    }

    fn check_limits(&self, body: &Map<String, Value>) -> Result<()> {
        let both = (body.get("max_tokens"), body.get("max_completion_tokens"));
        if let (Some(a @ Value::Number(_)), Some(b @ Value::Number(_))) = both
            && a != b
        {
            return Err(invalid("max_tokens", format!("expected the same as max_completion_tokens ({b}), found {a}")));
        }
        match self.options.max_tokens {
            Some(most) if most < self.options.min_tokens => {
                let problem = format!("expected at most max_tokens ({most}), found {}", self.options.min_tokens);
                Err(invalid("min_tokens", problem))
            }
            _ => Ok(()),
        }
    }

    /// `logprobs` says whether tokens are reported, `top_logprobs` how many others beside each.
    fn logprobs(&mut self, body: &Map<String, Value>) -> Result<()> {
        let given = |key| body.get(key).filter(|value| !value.is_null());
        let wanted = given("logprobs").map_or(Ok(false), |value| boolean("logprobs", value))?;
        let top = given("top_logprobs").map_or(Ok(0), |value| size("top_logprobs", value, 0))?;
        if top > MAX_TOP_LOGPROBS {
            return Err(invalid("top_logprobs", format!("expected at most {MAX_TOP_LOGPROBS}, found {top}")));
        }
        if top > 0 && !wanted {
            return Err(invalid("top_logprobs", "expected only together with `logprobs`: true".into()));
        }
        self.options.logprobs = wanted.then_some(top);
        Ok(())
    }
}

const QUIRE_FIELDS: &str = "`quire` takes collection, top_chunks, query, score_threshold, passages, strategy, \
                            sinks, window, k, ef, index, blend, ratio, blend_mass, blend_gate, correction and \
                            check_layer";

fn choices(value: &Value, most: usize) -> Result<usize> {
    let number = size("n", value, 1)?;
    if number > most {
        return Err(invalid("n", format!("expected at most {most}, the requests that run at a time, found {value}")));
    }
    Ok(number)
}

/// A number of at least `least`, or -1: no bound.
fn bound(param: &str, value: &Value, least: u64) -> Result<Option<usize>> {
    if value.as_i64() == Some(-1) {
        return Ok(None);
    }
    size(param, value, least).map(Some)
}

/// Any whole number of 64 bits with a sign; negative ones count from the top.
fn seed(value: &Value) -> Result<u64> {
    let seed = value.as_i64().map(i64::cast_unsigned);
    seed.ok_or_else(|| {
        invalid("seed", format!("expected a whole number from -2^63 to 2^63 - 1, found {}", brief(value)))
    })
}

fn stream_options(value: &Value) -> Result<bool> {
    let Value::Object(fields) = value else {
        return Err(invalid("stream_options", format!("expected an object, found {}", brief(value))));
    };
    let mut include_usage = false;
    for (key, value) in fields.iter().filter(|(_, value)| !value.is_null()) {
        let name = format!("stream_options.{}", cut(key));
        match key.as_str() {
            "include_usage" => include_usage = boolean(&name, value)?,
            // Padding against guessing from lengths: not done, so only "off" is true.
            "include_obfuscation" if value == false => {}
            _ => return Err(QuireError::UnsupportedParameter { param: name, hint: "only include_usage" }),
        }
    }
    Ok(include_usage)
}

fn stops(value: &Value) -> Result<Vec<String>> {
    let texts = match value {
        Value::Array(items) => items.iter().map(|item| text("stop", item)).collect::<Result<Vec<_>>>()?,
        other => vec![text("stop", other)?],
    };
    if texts.len() > MAX_STOPS || texts.iter().any(String::is_empty) {
        return Err(invalid("stop", format!("expected at most {MAX_STOPS} texts, none of them empty")));
    }
    Ok(texts)
}

fn logit_bias(value: &Value) -> Result<Vec<(u32, f32)>> {
    let Value::Object(fields) = value else {
        let problem = format!("expected an object of token ids and numbers, found {}", brief(value));
        return Err(invalid("logit_bias", problem));
    };
    // Written in one way only, so that no token is named twice.
    let id = |token: &String| token.parse().ok().filter(|id: &u32| id.to_string() == *token);
    let wrong: Vec<String> =
        fields.keys().filter(|token| id(token).is_none()).map(|token| format!("`{}`", cut(token))).collect();
    if !wrong.is_empty() {
        let more = wrong.len().saturating_sub(NAMED_KEYS);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let named = wrong[..wrong.len().min(NAMED_KEYS)].join(", ");
        return Err(invalid("logit_bias", format!("expected token ids as keys, found {named}{more}")));
    }
    let pairs = fields.iter().filter_map(|(token, bias)| Some((id(token)?, bias)));
    pairs.map(|(id, bias)| Ok((id, number("logit_bias", bias)?))).collect()
}

#[cfg(test)]
mod tests;
