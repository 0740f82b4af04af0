//! Judging an answer.

use std::collections::{HashMap, HashSet};

/// What one answer is worth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// Equal to one of the wanted answers.
    pub exact: bool,
    /// In \[0, 1\]: the share of the wanted values that were named; for `squad`, `musique` and `cloze` the F1 of words.
    pub part: f64,
}

/// Judges `output` by the rule of `task` against the best of `answers`.
///
/// `squad`, `musique` and `cloze` compare after SQuAD's normalisation (Rajpurkar et al. 2016, section 6: exact match, and F1 over the
/// bag of words). `ruler_*` count the wanted values that stand anywhere in the answer, as RULER does (arXiv 2404.06654), but only
/// as whole words. All other tasks compare the text with blanks around it removed; their wanted values are joined by `", "`, and
/// each counts once wherever it stands.
#[must_use]
pub fn score(task: &str, output: &str, answers: &[String]) -> Score {
    let judge = match task {
        "squad" | "musique" | "cloze" => score_words,
        _ if task.starts_with("ruler_") => score_mentions,
        _ => score_values,
    };
    let mut best = Score { exact: false, part: 0.0 };
    for answer in answers {
        let one = judge(output, answer);
        best = Score { exact: best.exact || one.exact, part: best.part.max(one.part) };
    }
    best
}

fn score_values(output: &str, answer: &str) -> Score {
    let values = |text: &str| text.split(", ").map(|v| v.trim().to_owned()).collect::<Vec<_>>();
    let (wanted, named) = (values(answer), values(output));
    let found = wanted.iter().filter(|value| named.contains(value)).count();
    Score { exact: output.trim() == answer.trim(), part: found as f64 / wanted.len() as f64 }
}

fn score_mentions(output: &str, answer: &str) -> Score {
    let inside = |c: char| c.is_alphanumeric() || c == '-';
    let words: HashSet<String> = output.split(|c| !inside(c)).map(str::to_lowercase).collect();
    let wanted: Vec<String> = answer.split(", ").map(str::to_lowercase).collect();
    let found = wanted.iter().filter(|value| words.contains(*value)).count();
    Score { exact: found == wanted.len(), part: found as f64 / wanted.len() as f64 }
}

fn score_words(output: &str, answer: &str) -> Score {
    let (output, answer) = (normalize_squad(output), normalize_squad(answer));
    Score { exact: output == answer, part: f1(&output, &answer) }
}

/// SQuAD's normalisation: lower case, ASCII punctuation and the articles a, an, the removed, blanks joined.
#[must_use]
pub fn normalize_squad(text: &str) -> String {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let words: Vec<&str> = kept.split_whitespace().filter(|word| !matches!(*word, "a" | "an" | "the")).collect();
    words.join(" ")
}

/// Harmonic mean of precision and recall over the words of two normalised texts.
fn f1(output: &str, answer: &str) -> f64 {
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in answer.split(' ') {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in output.split(' ') {
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    let words = output.split(' ').count() + answer.split(' ').count();
    2.0 * f64::from(common) / words as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(task: &str, output: &str, answers: &[&str]) -> (bool, f64) {
        let answers: Vec<String> = answers.iter().map(|a| (*a).to_owned()).collect();
        let score = score(task, output, &answers);
        (score.exact, score.part)
    }

    #[test]
    fn values_count_once_each_in_any_order_but_exact_wants_the_order() {
        assert_eq!(judged("niah_multivalue", "17, 4, 900", &["17, 4, 900"]), (true, 1.0));
        assert_eq!(judged("niah_multivalue", "4, 17", &["17, 4"]), (false, 1.0));
        assert_eq!(judged("niah_multivalue", "17, 17, 17", &["17, 4"]), (false, 0.5));
        // A part of a number is another number.
        assert_eq!(judged("kv", "1234", &["123"]), (false, 0.0));
        assert_eq!(judged("kv", " 123\n", &["123"]), (true, 1.0));
    }

    #[test]
    fn any_one_of_the_answers_counts() {
        assert_eq!(judged("squad", "Norwood", &["Jordan Norwood", "Norwood"]), (true, 1.0));
        assert_eq!(judged("x_ref", "b", &["a", "b"]), (true, 1.0));
        assert_eq!(judged("x_ref", "c", &["a", "b"]), (false, 0.0));
    }

    #[test]
    fn squad_ignores_case_articles_and_punctuation() {
        assert_eq!(normalize_squad("  The Silk-Road,  a  route. "), "silkroad route");
        assert_eq!(normalize_squad("Theatre an anthem"), "theatre anthem");
        assert!(judged("squad", "the silk road", &["Silk Road."]).0);
        assert!(!judged("x_ref", "the silk road", &["Silk Road."]).0);
    }

    #[test]
    fn f1_counts_repeated_words_as_often_as_they_are_wanted() {
        let (_, part) = judged("squad", "red red red", &["red fox"]);
        assert!((part - 2.0 / 5.0).abs() < 1e-12, "{part}");
        assert_eq!(judged("squad", "", &["fox"]), (false, 0.0));
    }

    /// What the script of SQuAD 1.1 (`evaluate-v1.1.py`: `normalize_answer`, `f1_score`, `exact_match_score`) gives for these.
    #[test]
    fn words_are_scored_as_the_script_of_squad_scores_them() {
        for (output, answer, exact, f1) in [
            ("Denver Broncos", "The Denver Broncos!", true, 1.0),
            ("The Broncos of Denver", "Denver Broncos", false, 0.8),
            ("It was the 24-10 win.", "24\u{2013}10", false, 0.0),
            ("$1.5 million", "1.5 million", true, 1.0),
            ("a b b c", "b b d", false, 2.0 * (2.0 / 3.0) * (2.0 / 3.0) / (4.0 / 3.0)),
            ("no, no, no", "No", false, 0.5),
            ("caf\u{e9}", "CAF\u{c9}", true, 1.0),
        ] {
            let (found, part) = judged("squad", output, &[answer]);
            assert_eq!(found, exact, "{output} / {answer}");
            assert!((part - f1).abs() < 1e-12, "{output} / {answer}: {part}");
            assert_eq!(judged("musique", output, &[answer]), (found, part));
        }
        assert_eq!(judged("squad", "in Rome", &["Paris", "Rome", "in Rome, Italy"]), (false, 0.8));
    }

    #[test]
    fn lists_count_whole_words_wherever_they_stand() {
        let wanted = ["1234567, 7654321"];
        assert_eq!(judged("ruler_multiquery", "The numbers are 7654321 and 1234567.", &wanted), (true, 1.0));
        assert_eq!(judged("ruler_multiquery", "12345678, 7654321", &wanted), (false, 0.5));
        assert_eq!(judged("ruler_vt", "VAR abc; QRS", &["ABC, QRS, XYZ"]).1, 2.0 / 3.0);
    }
}
