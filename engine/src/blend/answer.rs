//! The rule `answer`: what matters is what the first token of the answer is going to look at. Its query is that of the
//! prompt's last token on the deeper layers; the question as a whole says what else may be needed later.
//!
//! Measured with trained models against deviations, true and estimated, first tokens, all layers, other weights and two rounds:
//! `docs/notes/blending.md`.

use super::paid::Paid;

/// What the question counts beside the last token.
const QUESTION: f64 = 0.5;

/// The score of each position that counts: its share of what the last token pays to all of those, plus half its share of what
/// the question does.
pub(super) fn scores(paid: &Paid, counted: &[usize]) -> Vec<f32> {
    let share = |paid: &[f32]| -> Vec<f64> {
        let of: Vec<f64> = counted.iter().map(|position| f64::from(paid[*position])).collect();
        let sum = of.iter().sum::<f64>().max(f64::MIN_POSITIVE);
        of.into_iter().map(|paid| paid / sum).collect()
    };
    let (last, question) = (share(&paid.last), share(&paid.question));
    last.iter().zip(&question).map(|(last, question)| (last + QUESTION * question) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_a_share_of_what_is_paid_to_tokens_that_count() {
        // Position 1 is exact: however much it gets, it changes nothing.
        let paid = |exact: f32| Paid { last: vec![1.0, exact, 3.0], question: vec![30.0, exact, 10.0] };
        let scores_of = |exact| scores(&paid(exact), &[0, 2]);
        assert_eq!(scores_of(0.0), [0.25 + 0.5 * 0.75, 0.75 + 0.5 * 0.25]);
        assert_eq!(scores_of(9.0), scores_of(0.0));
        let none = Paid { last: vec![0.0; 3], question: vec![0.0; 3] };
        assert_eq!(scores(&none, &[0, 2]), [0.0, 0.0]);
    }
}
