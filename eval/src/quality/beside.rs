//! How far an answer and its distributions are from those of full recompute.

use engine::{kl_divergence, largest_logit};
use serde::{Deserialize, Serialize};

/// What `full` answered, and its distribution in the place of each token.
pub(super) struct FullAnswer {
    /// With the end-of-text token, where the answer ended by one.
    pub(super) ids: Vec<u32>,
    pub(super) text: String,
    /// Logits of all tokens in the place of each of `ids`.
    pub(super) places: Vec<Vec<f32>>,
    /// Tokens that are text, at least one place.
    pub(super) tokens: usize,
}

/// A configuration's distributions beside those of `full`, in the places of the tokens of `full`'s answer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct BesideFull {
    /// Mean over the tokens of the answer of the Kullback-Leibler divergence KL(full || this), in nats. The place behind
    /// the last token counts only where the answer has none.
    pub(crate) kl_mean: f64,
    /// The same of the first token alone.
    pub(crate) kl_first: f64,
    /// Whether this configuration gives `full`'s very answer.
    pub(crate) same: bool,
}

impl FullAnswer {
    /// `logits`: in the place of each of `ids`; `ended`: by an end-of-text token, the last of `ids`.
    pub(super) fn new(ids: Vec<u32>, text: String, logits: Vec<Vec<f32>>, ended: bool) -> FullAnswer {
        let tokens = (ids.len() - usize::from(ended)).max(1).min(ids.len());
        FullAnswer { ids, text, places: logits, tokens }
    }

    /// `logits`: of another configuration in the same places. Also whether it would choose the same token in each.
    pub(super) fn compare(&self, logits: &[Vec<f32>]) -> BesideFull {
        let same = logits.len() == self.ids.len()
            && self.ids.iter().zip(logits).all(|(id, row)| largest_logit(row) == Some(*id));
        let places = self.places.iter().zip(logits).take(self.tokens);
        let kl: Vec<f64> = places.map(|(full, other)| kl_divergence(full, other)).collect();
        BesideFull {
            kl_mean: kl.iter().sum::<f64>() / kl.len().max(1) as f64,
            kl_first: kl.first().copied().unwrap_or_default(),
            same,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs(shares: &[f32]) -> Vec<f32> {
        // Logits are defined up to a constant.
        shares.iter().map(|share| share.ln() + 3.0).collect()
    }

    #[test]
    fn divergences_are_those_of_the_distributions() {
        let full = FullAnswer::new(
            vec![0, 1, 2],
            "x".into(),
            vec![logs(&[0.5, 0.25, 0.25]), logs(&[0.1, 0.8, 0.1]), logs(&[0.2, 0.2, 0.6])],
            true,
        );
        let found = full.compare(&[logs(&[0.25, 0.5, 0.25]), logs(&[0.1, 0.8, 0.1]), logs(&[0.9, 0.05, 0.05])]);
        let first = 0.5 * 2.0_f64.ln() + 0.25 * 0.5_f64.ln();
        assert!((found.kl_first - first).abs() < 1e-6, "{found:?}");
        assert!((found.kl_mean - first / 2.0).abs() < 1e-6, "the end of the text is no token of the answer: {found:?}");
        assert!(!found.same);
    }

    #[test]
    fn the_same_distributions_are_the_same_answer_and_the_end_counts_for_that() {
        let rows = || vec![logs(&[0.6, 0.4]), logs(&[0.3, 0.7])];
        let full = FullAnswer::new(vec![0, 1], "x".into(), rows(), true);
        let found = full.compare(&rows());
        assert!(found.same && found.kl_mean.abs() < 1e-9);
        let goes_on = full.compare(&[logs(&[0.6, 0.4]), logs(&[0.7, 0.3])]);
        assert!(!goes_on.same && goes_on.kl_mean.abs() < 1e-9, "it would go on where `full` ends");
        // Nothing but the end.
        let empty = FullAnswer::new(vec![1], String::new(), vec![logs(&[0.3, 0.7])], true);
        assert!(empty.compare(&[logs(&[0.4, 0.6])]).kl_mean > 0.0);
    }
}
