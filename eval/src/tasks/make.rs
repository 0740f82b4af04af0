//! Questions over passages of published data, in the form that [`load_files`](super::load_files) reads.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::cut::chunks;
use super::files::write_line;
use super::generate::{PASSAGES, mix};
use super::lists::{LIST_TASKS, lines, spread};
use super::score::normalize_squad;
use super::sources::{PassageQuestion, Passages, read_musique, read_squad};
use super::words::Words;
use super::{Context, Question, Size};
use crate::error::{EvalError, Result};

/// Passages of a question, the right one among them.
const CHOICES: usize = 10;
/// Words of a chunk where passages are cut.
const SMALL: usize = 45;
/// Passages that the lines of a list are spread over, and tokens of such a context, about.
const LIST_PASSAGES: usize = 18;
const LIST_TOKENS: usize = 4096;

/// Behind each question over passages: answers are compared with a few words of a passage, and a chat model left to itself writes
/// sentences.
const INSTRUCTION: &str = "Answer with a short phrase from the passages.";

/// What [`make_data`] makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MadeData {
    /// From a file in SQuAD's format: each question over its passage and nine others in random order.
    Passages10,
    /// The same, each passage cut at the ends of sentences into chunks of at most 45 words.
    Passages10Small,
    /// From lists of MuSiQue's form: each question over the passages that it comes with.
    Musique10,
    /// Lists and chains (RULER's kind) whose lines are spread over 18 passages of a file in SQuAD's format.
    Lists4k,
}

impl MadeData {
    /// All of them, by name.
    pub const NAMES: [(&'static str, MadeData); 4] = [
        ("xquad10", MadeData::Passages10),
        ("xquad10-small", MadeData::Passages10Small),
        ("musique10", MadeData::Musique10),
        ("lists4k", MadeData::Lists4k),
    ];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(_, data)| *data == self).map_or("", |(name, _)| name)
    }
}

impl FromStr for MadeData {
    type Err = EvalError;

    fn from_str(text: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(name, _)| *name == text).map(|(_, data)| *data).ok_or_else(|| {
            EvalError::UnknownName {
                what: "kind of data",
                name: text.into(),
                known: Self::NAMES.map(|(name, _)| name).join(", "),
            }
        })
    }
}

/// What [`make_data`] makes, and of what.
#[derive(Debug, Clone)]
pub struct MakeOptions {
    /// The kind.
    pub data: MadeData,
    /// The published file.
    pub from: PathBuf,
    /// Questions of the file, counted from 0 in its order. Other passages than theirs do not occur. `None`: all.
    pub questions: Option<Range<usize>>,
    /// Contexts of each task, of [`MadeData::Lists4k`] only.
    pub samples: usize,
    /// Same seed, same contexts.
    pub seed: u64,
}

/// Makes contexts of one question each. Their order is random, so that the first of them are a sample of all; each depends
/// on nothing but the seed, the file and the passages that may occur. Besides its own, no passage of a question holds one of
/// its answers, word for word; of MuSiQue, passages are as published.
///
/// # Errors
/// [`EvalError::Io`] and [`EvalError::BadFile`] for the file; [`EvalError::BadOption`] for questions that it does not have, and
/// where too few passages are left.
pub fn make_data(options: &MakeOptions) -> Result<Vec<Context>> {
    let mut contexts = match options.data {
        MadeData::Musique10 => musique(options)?,
        MadeData::Lists4k => lists(options)?,
        MadeData::Passages10 | MadeData::Passages10Small => passages(options)?,
    };
    contexts.shuffle(&mut ChaCha8Rng::seed_from_u64(options.seed));
    Ok(contexts)
}

/// Writes contexts as JSON lines.
///
/// # Errors
/// [`EvalError::Io`].
pub fn write_contexts(path: &Path, contexts: &[Context]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(path)?);
        contexts.iter().try_for_each(|context| write_line(&mut file, context))?;
        file.flush()
    };
    write().map_err(EvalError::io("write", path))
}

/// The chosen questions, with their places in the file.
fn chosen<T>(options: &MakeOptions, questions: Vec<T>) -> Result<Vec<(usize, T)>> {
    let count = questions.len();
    let range = options.questions.clone().unwrap_or(0..count);
    if range.is_empty() || range.end > count {
        return Err(EvalError::BadOption {
            what: "the range of questions",
            found: format!("{}..{}", range.start, range.end),
            expected: format!(
                "FROM..TO with FROM below TO and TO at most {count}, the questions of {}",
                options.from.display()
            ),
        });
    }
    Ok(questions.into_iter().enumerate().filter(|(at, _)| range.contains(at)).collect())
}

fn musique(options: &MakeOptions) -> Result<Vec<Context>> {
    let questions = chosen(options, read_musique(&options.from)?)?;
    let context = |(at, asked): (usize, super::sources::MusiqueQuestion)| {
        let chunks: Vec<Arc<str>> = asked.contexts.into_iter().map(|passage| passage.text.into()).collect();
        let question =
            Question { task: "musique".into(), text: instructed(&asked.text), answers: asked.answers, index: 0 };
        Context { id: format!("musique10-{at}"), size: Size::Passages(chunks.len()), chunks, questions: vec![question] }
    };
    Ok(questions.into_iter().map(context).collect())
}

/// The passages of questions, each once, in the order of the file.
fn passages_of(all: &[Arc<str>], questions: &[(usize, PassageQuestion)]) -> Vec<(usize, Arc<str>)> {
    let mut places: Vec<usize> = questions.iter().map(|(_, question)| question.passage).collect();
    places.sort_unstable();
    places.dedup();
    places.into_iter().map(|place| (place, all[place].clone())).collect()
}

fn passages(options: &MakeOptions) -> Result<Vec<Context>> {
    let Passages { passages: all, questions } = read_squad(&options.from)?;
    let questions = chosen(options, questions)?;
    let pool = passages_of(&all, &questions);
    let words: Vec<String> = pool.iter().map(|(_, text)| padded(text)).collect();
    let small = options.data == MadeData::Passages10Small;
    questions
        .into_iter()
        .map(|(at, asked)| {
            let answers: Vec<String> = asked.answers.iter().map(|answer| padded(answer)).collect();
            let holds = |passage: &str| answers.iter().any(|answer| passage.contains(answer.as_str()));
            let others = pool.iter().zip(&words).filter(|((place, _), words)| *place != asked.passage && !holds(words));
            let mut others: Vec<&Arc<str>> = others.map(|((_, text), _)| text).collect();
            if others.len() + 1 < CHOICES {
                return Err(too_few(others.len(), CHOICES - 1, &format!("without the answers of question {at}")));
            }
            // The same passages in the same order, cut or not.
            let mut rng = ChaCha8Rng::seed_from_u64(mix(options.seed, "passages", CHOICES, at));
            others.shuffle(&mut rng);
            others.truncate(CHOICES - 1);
            others.push(&all[asked.passage]);
            others.shuffle(&mut rng);
            let cut = |text: &Arc<str>| -> Vec<Arc<str>> {
                if small { chunks(text, SMALL).into_iter().map(Into::into).collect() } else { vec![text.clone()] }
            };
            let question =
                Question { task: "squad".into(), text: instructed(&asked.text), answers: asked.answers, index: 0 };
            Ok(Context {
                id: format!("{}-{at}", options.data.name()),
                size: Size::Passages(CHOICES),
                chunks: others.into_iter().flat_map(cut).collect(),
                questions: vec![question],
            })
        })
        .collect()
}

fn instructed(question: &str) -> String {
    format!("{question} {INSTRUCTION}")
}

/// The words of a text as SQuAD compares them, each between blanks.
fn padded(text: &str) -> String {
    format!(" {} ", normalize_squad(text))
}

fn too_few(found: usize, needed: usize, which: &str) -> EvalError {
    EvalError::BadOption {
        what: "the range of questions",
        found: format!("one with {found} passages {which}"),
        expected: format!("one with at least {needed} such passages: widen it"),
    }
}

fn lists(options: &MakeOptions) -> Result<Vec<Context>> {
    let Passages { passages: all, questions } = read_squad(&options.from)?;
    let pool = passages_of(&all, &chosen(options, questions)?);
    if pool.len() < LIST_PASSAGES {
        return Err(too_few(pool.len(), LIST_PASSAGES, "in all"));
    }
    let made = LIST_TASKS.iter().flat_map(|task| (0..options.samples).map(move |number| (*task, number)));
    let context = |(task, number): (&str, usize)| {
        let rng = ChaCha8Rng::seed_from_u64(mix(options.seed, task, LIST_TOKENS, number));
        let mut words = Words::new(rng, PASSAGES);
        let mut texts: Vec<&str> = pool.iter().map(|(_, text)| &**text).collect();
        texts.shuffle(&mut words.rng);
        texts.truncate(LIST_PASSAGES);
        let (lines, question) = lines(task, &mut words, LIST_PASSAGES);
        let chunks = spread(&mut words, &texts, &lines);
        Context { id: format!("{task}-{number}"), size: Size::Tokens(LIST_TOKENS), chunks, questions: vec![question] }
    };
    Ok(made.map(context).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::tasks::load_files;

    /// A file in SQuAD's format: passage `i` says that item `i` costs `i` coins and `i + 1` stamps, and has two questions.
    fn squad(dir: &Path, passages: usize) -> PathBuf {
        let paragraph = |i: usize| -> Value {
            let context = format!("Item number {i} is old. It costs {i} coins. It also costs {} stamps.", i + 1);
            let asked = |of: &str, answer: usize| json!({"question": format!("How many {of} for {i}?"), "answers": [{"text": format!("{answer} {of}")}]});
            json!({"context": context, "qas": [asked("coins", i), asked("stamps", i + 1)]})
        };
        let paragraphs: Vec<Value> = (0..passages).map(paragraph).collect();
        let path = dir.join("squad.json");
        std::fs::write(&path, json!({"data": [{"title": "t", "paragraphs": paragraphs}]}).to_string()).unwrap();
        path
    }

    fn options(data: MadeData, from: &Path) -> MakeOptions {
        MakeOptions { data, from: from.into(), questions: None, samples: 2, seed: 1 }
    }

    #[test]
    fn an_answer_stands_in_one_of_ten_passages_all_of_the_questions_in_range() {
        let dir = tempfile::tempdir().unwrap();
        let from = squad(dir.path(), 40);
        let range = MakeOptions { questions: Some(20..60), ..options(MadeData::Passages10, &from) };
        let contexts = make_data(&range).unwrap();
        assert_eq!(contexts.len(), 40);
        let mut places = BTreeSet::new();
        for context in &contexts {
            let answer = &context.questions[0].answers[0];
            let holding: Vec<usize> =
                (0..10).filter(|at| padded(&context.chunks[*at]).contains(&padded(answer))).collect();
            assert_eq!((context.chunks.len(), holding.len()), (10, 1), "{answer}: {:?}", context.chunks);
            places.insert(holding[0]);
            assert_eq!(context.chunks.iter().collect::<BTreeSet<_>>().len(), 10);
            for chunk in &context.chunks {
                let item: usize = chunk.split_whitespace().nth(2).unwrap().parse().unwrap();
                assert!((10..30).contains(&item), "{chunk}");
            }
        }
        assert!(places.len() > 5, "the place says nothing: {places:?}");
        let asked: Vec<&str> = contexts.iter().map(|c| c.questions[0].text.as_str()).collect();
        assert!(asked.iter().collect::<BTreeSet<_>>().len() == 40 && !asked.is_sorted(), "all, in random order");
    }

    #[test]
    fn a_seed_gives_the_same_contexts_another_gives_others_and_they_come_back_from_their_file() {
        let dir = tempfile::tempdir().unwrap();
        let from = squad(dir.path(), 40);
        for (_, data) in MadeData::NAMES.into_iter().filter(|(_, data)| *data != MadeData::Musique10) {
            let once = make_data(&options(data, &from)).unwrap();
            assert_eq!(once, make_data(&options(data, &from)).unwrap());
            assert_ne!(once, make_data(&MakeOptions { seed: 2, ..options(data, &from) }).unwrap());
            let path = dir.path().join("made.jsonl");
            write_contexts(&path, &once).unwrap();
            assert_eq!(load_files(&path, 8192).unwrap(), once);
        }
    }

    #[test]
    fn cut_passages_are_the_same_in_the_same_order() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("squad.json");
        let words = |i: usize| {
            (0..60).map(|w| format!("w{i}x{w}{}", if w % 7 == 6 { "." } else { "" })).collect::<Vec<_>>().join(" ")
        };
        let words = |i: usize| words(i).replace(". w", ". W");
        let paragraphs: Vec<Value> = (0..12)
            .map(|i| json!({"context": words(i), "qas": [{"question": "?", "answers": [{"text": format!("w{i}x3")}]}]}))
            .collect();
        std::fs::write(&from, json!({"data": [{"paragraphs": paragraphs}]}).to_string()).unwrap();
        let whole = make_data(&options(MadeData::Passages10, &from)).unwrap();
        let small = make_data(&options(MadeData::Passages10Small, &from)).unwrap();
        for (whole, small) in whole.iter().zip(&small) {
            assert_eq!(whole.questions, small.questions);
            assert_eq!((whole.chunks.len(), small.chunks.len()), (10, 20));
            assert!(small.chunks.iter().all(|chunk| chunk.split(' ').count() <= 45));
            assert_eq!(whole.chunks.join(" "), small.chunks.join(" "));
        }
    }

    #[test]
    fn musique_keeps_its_passages_and_lists_have_eighteen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("musique.json");
        let question = |i: usize| json!({"ctxs": [{"title": "", "text": format!("a {i}")}, {"text": "b"}], "question": format!("Q{i}"), "answers": ["a"]});
        std::fs::write(&path, json!([question(0), question(1), question(2)]).to_string()).unwrap();
        let made = make_data(&MakeOptions { questions: Some(1..3), ..options(MadeData::Musique10, &path) }).unwrap();
        let mut texts: Vec<String> = made.iter().map(|context| context.chunks.join("|")).collect();
        texts.sort();
        assert_eq!(texts, ["a 1|b", "a 2|b"]);
        assert!(made.iter().all(|context| context.questions[0].task == "musique"));

        let made = make_data(&options(MadeData::Lists4k, &squad(dir.path(), 30))).unwrap();
        assert_eq!(made.len(), 2 * LIST_TASKS.len());
        assert!(made.iter().all(|context| context.chunks.len() == 18 && context.size == Size::Tokens(4096)));
    }

    #[test]
    fn what_the_file_does_not_have_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let from = squad(dir.path(), 12);
        let text = |options: MakeOptions| make_data(&options).unwrap_err().to_string();
        for range in [20..30, 5..5] {
            let wrong = MakeOptions { questions: Some(range), ..options(MadeData::Passages10, &from) };
            assert!(text(wrong).contains("at most 24"));
        }
        let narrow = MakeOptions { questions: Some(0..10), ..options(MadeData::Passages10, &from) };
        assert!(text(narrow).contains("widen"));
        assert!(text(options(MadeData::Lists4k, &from)).contains("18"));
        assert!(text(options(MadeData::Musique10, &from)).contains("ctxs"));
        assert!("xquad11".parse::<MadeData>().unwrap_err().to_string().contains("xquad10-small"));
    }
}
