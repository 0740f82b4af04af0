//! Prompts of an exact length, whose answer the model knows.

use std::sync::Arc;

use engine::Engine;

use crate::ask::Material;
use crate::error::{EvalError, Result};
use crate::tasks::{Context, DataSource, GenerateOptions, generate, load_files};

/// A prompt in its parts; together they have the wanted number of tokens.
pub(super) struct SpeedPrompt {
    pub(super) prefix: Vec<u32>,
    pub(super) context: Vec<u32>,
    pub(super) suffix: Vec<u32>,
}

impl SpeedPrompt {
    pub(super) fn tokens(&self) -> Vec<u32> {
        [&self.prefix[..], &self.context, &self.suffix].concat()
    }
}

/// A prompt of `length` tokens: a context that holds the answer, filled up with others behind it, and the question. A
/// known answer keeps the best logit far from the second, so that both sides of a comparison must choose the same.
pub(super) fn prompt(engine: &Engine, text: &DataSource, length: usize) -> Result<SpeedPrompt> {
    let mut material = Material::new(engine)?;
    let mut contexts = contexts(engine, text, length)?;
    // The longest context that fits stands first; equal ones keep their order.
    let fits = |c: &Context| c.chunks.iter().map(|chunk| chunk.len()).sum::<usize>() / 4 < length;
    contexts.sort_by_key(|c| (!fits(c), std::cmp::Reverse(c.size)));
    let first = contexts.first().ok_or_else(|| EvalError::NothingToDo(format!("no context in {text}")))?;
    let suffix = material.question(&first.questions[0].text)?;
    let prefix = material.prefix().to_vec();
    let room = length.checked_sub(prefix.len() + suffix.len() + 1).ok_or_else(|| EvalError::BadOption {
        what: "the length of a prompt",
        found: length.to_string(),
        expected: format!("at least {} for the question alone", prefix.len() + suffix.len() + 1),
    })? + 1;
    let mut context = Vec::with_capacity(room);
    for chunk in contexts.iter().cycle().flat_map(|c| &c.chunks) {
        context.extend_from_slice(&material.chunk(chunk)?);
        if context.len() >= room {
            break;
        }
    }
    context.truncate(room);
    Ok(SpeedPrompt { prefix, context, suffix })
}

/// A context of chunks of one size, and a question.
pub(super) struct EqualChunks {
    pub(super) chunks: Vec<Arc<[u32]>>,
    pub(super) question: Vec<u32>,
}

/// Chunks of exactly `tokens` tokens each, the separator as the last; `count` different ones, and a question.
pub(super) fn equal_chunks(engine: &Engine, text: &DataSource, tokens: usize, count: usize) -> Result<EqualChunks> {
    let separator = engine.tokenizer().encode(engine.chat().chunk_suffix())?;
    let body = tokens.checked_sub(separator.len() + 1).map(|room| room + 1).ok_or_else(|| EvalError::BadOption {
        what: "the tokens of a chunk",
        found: tokens.to_string(),
        expected: format!("more than the separator's {}", separator.len()),
    })?;
    let mut prompt = prompt(engine, text, (body + 1) * count + 256)?;
    prompt.context.retain(|id| !separator.contains(id));
    let chunks = prompt.context.chunks_exact(body).cycle().take(count);
    let chunks: Vec<Arc<[u32]>> = chunks.map(|chunk| [chunk, &separator[..]].concat().into()).collect();
    Ok(EqualChunks { chunks, question: prompt.suffix })
}

fn contexts(engine: &Engine, text: &DataSource, length: usize) -> Result<Vec<Context>> {
    match text {
        DataSource::Files(path) => {
            let mut contexts = load_files(path, length)?;
            contexts.retain(|c| c.questions[0].task == "niah_single" || c.questions[0].task == "niah_multikey");
            Ok(contexts)
        }
        DataSource::Generated => {
            let count = |text: &str| engine.tokenizer().encode_plain(text).map_or(text.len(), |ids| ids.len());
            let options = GenerateOptions {
                tasks: vec!["niah_single".into()],
                lengths: vec![length.max(512)],
                samples: 2,
                seed: 1,
            };
            generate(&options, &count)
        }
    }
}
