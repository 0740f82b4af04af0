//! Tasks of our own making: facts planted into passages of our own writing.
//!
//! The kinds of tasks follow RULER (arXiv 2404.06654: needles, variable tracking) and the reference model's own tasks
//! with facts spread over chunks; the sentences are the forms that model was trained to read. Everything is drawn from
//! the seed, the task, the length and the number of the context, so that each context is the same whatever else is made.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::plant::{Maker, Passage};
use super::words::Words;
use super::{Context, Size, check_names};
use crate::error::{EvalError, Result};

/// Passages, one a paragraph.
pub(crate) const PASSAGES: &str = include_str!("../../passages/passages.txt");

/// The tasks that [`generate`] makes.
pub const GENERATED_TASKS: [&str; 10] = [
    "niah_single",
    "niah_uuid",
    "niah_multivalue",
    "niah_multiquery",
    "kv",
    "vt",
    "x_alias",
    "x_ref",
    "x_pron",
    "x_report",
];

/// Tokens left free for the question and the answer.
const RESERVE: usize = 96;
/// Shorter contexts hold no task.
const SHORTEST: usize = 512;

/// What [`generate`] makes.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Names of [`GENERATED_TASKS`]; empty: all.
    pub tasks: Vec<String>,
    /// Target lengths in tokens, at least 512.
    pub lengths: Vec<usize>,
    /// Contexts (of one question each) for each task and length.
    pub samples: usize,
    /// Same seed, same tasks.
    pub seed: u64,
}

/// Makes contexts whose tokens, as `count` counts those of a text, stay under the target length together with the
/// separators, the question and the answer.
///
/// # Errors
/// [`EvalError::UnknownName`] for other tasks; [`EvalError::BadOption`] for lengths under 512.
pub fn generate(options: &GenerateOptions, count: &dyn Fn(&str) -> usize) -> Result<Vec<Context>> {
    check_names("generated task", &options.tasks, &GENERATED_TASKS)?;
    if let Some(length) = options.lengths.iter().find(|length| **length < SHORTEST) {
        let expected = format!("at least {SHORTEST}");
        return Err(EvalError::BadOption {
            what: "the length of a generated context",
            found: length.to_string(),
            expected,
        });
    }
    let passages: Vec<Passage> =
        PASSAGES.split("\n\n").map(str::trim).filter(|p| !p.is_empty()).map(Passage::new).collect();
    let mut contexts = Vec::new();
    for task in
        GENERATED_TASKS.into_iter().filter(|task| options.tasks.is_empty() || options.tasks.iter().any(|t| t == task))
    {
        for &length in &options.lengths {
            for number in 0..options.samples {
                let rng = ChaCha8Rng::seed_from_u64(mix(options.seed, task, length, number));
                let mut maker =
                    Maker { words: Words::new(rng, PASSAGES), budget: length - RESERVE, count, passages: &passages };
                let (chunks, question) = maker.make(task);
                let id = format!("generated-{task}-{length}-{number}");
                contexts.push(Context { id, size: Size::Tokens(length), chunks, questions: vec![question] });
            }
        }
    }
    Ok(contexts)
}

/// FNV-1a over what a context depends on.
pub(super) fn mix(seed: u64, task: &str, length: usize, number: usize) -> u64 {
    let numbers = [seed, length as u64, number as u64];
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).chain(task.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    /// About what a tokenizer of English does: a token for four letters, each digit and each mark.
    fn count(text: &str) -> usize {
        text.split_whitespace()
            .map(|word| {
                let letters = word.chars().filter(|c| c.is_alphabetic()).count();
                letters.div_ceil(4) + word.chars().count() - letters
            })
            .sum()
    }

    fn made(seed: u64, lengths: &[usize]) -> Vec<Context> {
        let options = GenerateOptions { tasks: vec![], lengths: lengths.to_vec(), samples: 6, seed };
        generate(&options, &count).unwrap()
    }

    #[test]
    fn answers_stand_in_the_chunks_and_lengths_are_kept() {
        let contexts = made(1, &[512, 1024, 4096, 8192]);
        assert_eq!(contexts.len(), GENERATED_TASKS.len() * 4 * 6);
        for context in &contexts {
            let Size::Tokens(length) = context.size else { panic!("{:?}", context.size) };
            let question = &context.questions[0];
            for value in question.answers[0].split(", ") {
                let holds = |chunk: &&Arc<str>| chunk.contains(value);
                assert!(!value.is_empty() && context.chunks.iter().any(|c| holds(&c)), "{}: {value}", context.id);
            }
            let tokens: usize = context.chunks.iter().map(|c| count(c) + 1).sum();
            assert!(tokens + count(&question.text) < length, "{}: {tokens}", context.id);
            assert!(tokens * 10 > (length - RESERVE) * 7, "{}: only {tokens}", context.id);
            assert!(context.chunks.len() >= 2 && context.chunks.iter().all(|c| !c.is_empty()), "{}", context.id);
        }
    }

    #[test]
    fn same_seed_same_tasks_whatever_else_is_made() {
        assert_eq!(made(7, &[1024]), made(7, &[1024]));
        assert_ne!(made(7, &[1024]), made(8, &[1024]));
        let options = GenerateOptions { tasks: vec!["vt".into()], lengths: vec![1024], samples: 1, seed: 7 };
        let alone = generate(&options, &count).unwrap();
        assert!(made(7, &[512, 1024]).contains(&alone[0]));
    }

    /// The chunk and the place in it of the first chunk that holds `text`.
    fn place(context: &Context, text: &str) -> (usize, usize) {
        let mut found = context.chunks.iter().enumerate().filter_map(|(i, c)| c.find(text).map(|at| (i, at)));
        found.next().unwrap_or_else(|| panic!("{}: no {text:?}", context.id))
    }

    #[test]
    fn facts_over_chunks_are_in_different_ones_in_order() {
        for context in made(3, &[1024, 4096]) {
            let question = &context.questions[0];
            let value = &question.answers[0];
            let subject = |sentence: &str| sentence.rsplit("is ").next().unwrap().trim_end_matches('.').to_owned();
            if question.task == "x_report" {
                let mut reports = context.chunks.iter().flat_map(|c| c.split("Report ").skip(1));
                let said = |report: &&str| {
                    let sentence = report.split('.').next().unwrap();
                    sentence.contains("part two") && sentence.contains(value.as_str())
                };
                let id = &reports.find(said).unwrap()[..4];
                let first = format!("Report {id}, part one: the subject of this report is ");
                let (one, two) = (place(&context, &first), place(&context, &format!("Report {id}, part two")));
                assert!(one.0 < two.0, "{}", context.id);
                let rest = &context.chunks[one.0][one.1..];
                let person = subject(rest.split_inclusive('.').next().unwrap());
                assert!(question.text.contains(&person), "{}: {person} in {}", context.id, question.text);
            }
            if question.task == "x_pron" {
                let (chunk, at) = place(&context, &format!(" {value}"));
                assert!(chunk > 0 && at < 200, "{}", context.id);
            }
        }
    }

    #[test]
    fn chains_and_several_values_are_asked_in_order_of_appearance() {
        for context in made(5, &[2048]) {
            let question = &context.questions[0];
            let wanted: Vec<String> = match question.task.as_str() {
                "vt" => question.answers[0].split(", ").map(|v| format!("VAR {v} = ")).collect(),
                "niah_multivalue" => question.answers[0].split(", ").map(|v| format!("is: {v}.")).collect(),
                _ => continue,
            };
            let places: Vec<(usize, usize)> = wanted.iter().map(|text| place(&context, text)).collect();
            assert!(places.windows(2).all(|pair| pair[0] < pair[1]), "{}: {places:?}", context.id);
        }
    }

    #[test]
    fn bad_options_are_refused() {
        let options = GenerateOptions { tasks: vec!["squad".into()], lengths: vec![1024], samples: 1, seed: 0 };
        assert!(matches!(generate(&options, &count), Err(EvalError::UnknownName { .. })));
        let options = GenerateOptions { tasks: vec![], lengths: vec![100], samples: 1, seed: 0 };
        assert!(matches!(generate(&options, &count), Err(EvalError::BadOption { .. })));
    }
}
