//! Lists and chains whose lines are spread over many passages, after RULER (arXiv 2404.06654): one of many keys, several keys,
//! several values of a key, variables that pass a value on, and the words that occur most often.

use std::sync::Arc;

use rand::Rng;
use rand::seq::SliceRandom;

use super::Question;
use super::cut::sentences;
use super::words::Words;

/// The tasks that are made here.
pub(super) const LIST_TASKS: [&str; 5] =
    ["ruler_multikey", "ruler_multiquery", "ruler_multivalue", "ruler_vt", "ruler_cwe"];

/// Keys that are asked for, and values of one key.
const WANTED: usize = 4;
/// Variables of a chain; a second chain stands beside it.
const CHAIN: usize = 3;
/// Words that occur most often, how often each does, and how many others stand in a line beside them at least.
const COMMON: usize = 5;
const OCCURRENCES: usize = 12;
const RARE: usize = 6;

/// Lines for a context, in this order, and the question about them. `passages`: that they will be spread over.
pub(super) fn lines(task: &str, words: &mut Words, passages: usize) -> (Vec<String>, Question) {
    match task {
        "ruler_vt" => chains(words),
        "ruler_cwe" => common_words(words, passages),
        _ => keys(task, words, passages),
    }
}

fn question(task: &str, text: String, values: &[String]) -> Question {
    Question { task: task.into(), text, answers: vec![values.join(", ")], index: 0 }
}

/// A line for each passage; one of the keys has several values in the task that says so.
fn keys(task: &str, words: &mut Words, passages: usize) -> (Vec<String>, Question) {
    let mut pairs: Vec<(String, String)> = (0..passages).map(|_| (words.key(), words.number(7..=7))).collect();
    let several = task == "ruler_multivalue";
    let asked = if task == "ruler_multikey" { 1 } else { WANTED.min(passages) };
    if several {
        let key = pairs[0].0.clone();
        pairs[..asked].iter_mut().for_each(|pair| pair.0.clone_from(&key));
    }
    let wanted = pairs[..asked].to_vec();
    pairs.shuffle(&mut words.rng);
    let values: Vec<String> = wanted.iter().map(|(_, value)| value.clone()).collect();
    let mut names: Vec<&str> = wanted.iter().map(|(key, _)| key.as_str()).collect();
    names.dedup();
    let text = match (several, &names[..]) {
        (false, [name]) => {
            format!(
                "What is the special magic number for {name} that the passages mention? Answer with the number alone."
            )
        }
        _ => format!(
            "What are all the special magic numbers for {} that the passages mention? Answer with the numbers alone, \
             separated by commas.",
            names.join(", ")
        ),
    };
    let lines = pairs.iter().map(|(key, value)| format!("One of the special magic numbers for {key} is: {value}."));
    (lines.collect(), question(task, text, &values))
}

/// Two chains of variables, one line after the other of each, mixed.
fn chains(words: &mut Words) -> (Vec<String>, Question) {
    let mut chain = || {
        let (value, names) = (words.number(5..=5), (0..CHAIN).map(|_| words.variable()).collect::<Vec<_>>());
        let first = std::iter::once(format!("VAR {} = {value}.", names[0]));
        let lines = first.chain(names.windows(2).map(|pair| format!("VAR {} = VAR {}.", pair[1], pair[0])));
        (lines.collect::<Vec<String>>(), value, names)
    };
    let ((wanted, value, names), (other, _, _)) = (chain(), chain());
    let (mut wanted, mut other) = (wanted.into_iter().peekable(), other.into_iter().peekable());
    let mut lines = Vec::new();
    while wanted.peek().is_some() || other.peek().is_some() {
        let (one, two) = if words.rng.random_bool(0.5) { (&mut wanted, &mut other) } else { (&mut other, &mut wanted) };
        lines.extend(one.next().or_else(|| two.next()));
    }
    let text = format!(
        "Which variables (VAR) of the passages have the value {value}, directly or through other variables? Answer with \
         their names alone, separated by commas."
    );
    (lines, question("ruler_vt", text, &names))
}

/// A list of words for each passage: some words stand in most lists, all others once.
fn common_words(words: &mut Words, passages: usize) -> (Vec<String>, Question) {
    let common: Vec<String> = (0..COMMON).map(|_| words.word()).collect();
    let mut lists: Vec<Vec<String>> = (0..passages).map(|_| (0..RARE).map(|_| words.word()).collect()).collect();
    for word in &common {
        let mut order: Vec<usize> = (0..passages).collect();
        order.shuffle(&mut words.rng);
        order.into_iter().take(OCCURRENCES).for_each(|list| lists[list].push(word.clone()));
    }
    let line = |mut list: Vec<String>| {
        list.shuffle(&mut words.rng);
        format!("Words: {}.", list.join(", "))
    };
    let lines = lists.into_iter().map(line).collect();
    let text = format!(
        "Which {COMMON} words occur most often in the lists of the passages that begin with `Words:`? Answer with the words \
         alone, separated by commas."
    );
    (lines, question("ruler_cwe", text, &common))
}

/// The passages with the lines in them, in the order of both: at most one line a passage while there are enough of them, on a
/// line of its own behind a sentence.
pub(super) fn spread(words: &mut Words, passages: &[&str], lines: &[String]) -> Vec<Arc<str>> {
    let mut order: Vec<usize> = (0..passages.len()).collect();
    order.shuffle(&mut words.rng);
    let mut places: Vec<usize> = (0..lines.len()).map(|line| order[line % order.len()]).collect();
    places.sort_unstable();
    let mut chunks: Vec<Vec<String>> =
        passages.iter().map(|text| sentences(text).into_iter().map(str::to_owned).collect()).collect();
    // From the last on: what follows in the same passage stands behind it.
    let mut end: Vec<usize> = chunks.iter().map(Vec::len).collect();
    for (line, &place) in lines.iter().zip(&places).rev() {
        let at = words.rng.random_range(1.min(end[place])..=end[place]);
        chunks[place].insert(at, format!("\n{line}\n"));
        end[place] = at;
    }
    chunks.into_iter().map(|parts| parts.join(" ").replace(" \n", "\n").replace("\n ", "\n").trim().into()).collect()
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::tasks::generate::PASSAGES;

    const PASSAGE: &str = "The sea was calm. A boat came in. Nobody saw it.";

    fn made(task: &str, seed: u64) -> (Vec<Arc<str>>, Question) {
        let mut words = Words::new(ChaCha8Rng::seed_from_u64(seed), PASSAGES);
        let (lines, question) = lines(task, &mut words, 18);
        (spread(&mut words, &[PASSAGE; 18], &lines), question)
    }

    /// Lines of all chunks that hold a text.
    fn holding<'a>(chunks: &'a [Arc<str>], text: &'a str) -> Vec<&'a str> {
        chunks.iter().flat_map(|chunk| chunk.lines()).filter(|line| line.contains(text)).collect()
    }

    #[test]
    fn every_value_stands_in_one_line_with_its_key_and_in_one_chunk() {
        for (task, wanted, keys) in [("ruler_multikey", 1, 1), ("ruler_multiquery", 4, 4), ("ruler_multivalue", 4, 1)] {
            for seed in 0..8 {
                let (chunks, question) = made(task, seed);
                let values: Vec<&str> = question.answers[0].split(", ").collect();
                assert_eq!(values.len(), wanted);
                let mut asked = std::collections::BTreeSet::new();
                for value in values {
                    let [line] = holding(&chunks, value)[..] else { panic!("{task}: {value}") };
                    let key = line.split(" for ").nth(1).and_then(|rest| rest.split(" is: ").next()).unwrap_or("?");
                    assert!(question.text.contains(key), "{task}: {line}");
                    asked.insert(key.to_owned());
                }
                assert_eq!(asked.len(), keys, "{task}");
                assert_eq!(chunks.iter().filter(|chunk| chunk.contains("magic")).count(), 18, "one line a passage");
            }
        }
    }

    #[test]
    fn a_chain_leads_to_its_value_in_the_order_of_the_chunks_and_the_other_does_not() {
        for seed in 0..8 {
            let (chunks, question) = made("ruler_vt", seed);
            let text = chunks.join("\n");
            let names: Vec<&str> = question.answers[0].split(", ").collect();
            let mut value =
                question.text.split("value ").nth(1).and_then(|t| t.split(',').next()).unwrap_or("?").to_owned();
            let mut last = 0;
            for name in &names {
                let at = text.find(&format!("VAR {name} = {value}.")).unwrap_or(0);
                assert!(at > last, "{name} = {value} behind {last} in:\n{text}");
                (last, value) = (at, format!("VAR {name}"));
            }
            assert_eq!((names.len(), holding(&chunks, "VAR ").len()), (3, 6));
            assert_eq!(chunks.iter().filter(|chunk| chunk.contains("VAR")).count(), 6, "a chunk each");
        }
    }

    #[test]
    fn common_words_are_those_that_occur_most_often() {
        for seed in 0..8 {
            let (chunks, question) = made("ruler_cwe", seed);
            let mut counts = std::collections::BTreeMap::<&str, usize>::new();
            for line in holding(&chunks, "Words:") {
                let list = line.trim_start_matches("Words: ").trim_end_matches('.');
                list.split(", ").for_each(|word| *counts.entry(word).or_default() += 1);
            }
            let wanted: Vec<&str> = question.answers[0].split(", ").collect();
            assert_eq!(wanted.len(), 5);
            for (word, count) in counts {
                assert_eq!(count, if wanted.contains(&word) { 12 } else { 1 }, "{word}");
            }
        }
    }

    #[test]
    fn passages_keep_their_sentences() {
        let (chunks, _) = made("ruler_multikey", 1);
        for chunk in &chunks {
            let kept: Vec<&str> = chunk.lines().filter(|line| !line.contains("magic")).collect();
            assert_eq!(kept.join(" "), PASSAGE);
        }
    }
}
