//! How many tokens are recomputed, and the best ones of so many.

use crate::config::BlendConfig;

/// What limits the tokens that are recomputed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Budget {
    /// This share of the tokens.
    Tokens(f32),
    /// As many as it takes to have this share of the sum of all scores.
    Mass(f32),
}

impl Budget {
    pub(super) fn of(config: &BlendConfig) -> Budget {
        config.mass.map_or(Budget::Tokens(config.ratio), Budget::Mass)
    }
}

/// Tokens by their scores, the best first. Ties go to the earlier token.
pub(super) struct Ranking<'a> {
    /// Not negative.
    scores: &'a [f32],
    /// Indices into `scores`.
    order: Vec<usize>,
}

impl<'a> Ranking<'a> {
    pub(super) fn new(scores: &'a [f32]) -> Ranking<'a> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        Ranking { scores, order }
    }

    /// The tokens that are ranked.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// How many tokens a budget pays for.
    pub(super) fn count(&self, budget: Budget) -> usize {
        let scores = self.order.iter().map(|token| f64::from(self.scores[*token]));
        match budget {
            Budget::Tokens(ratio) => (self.len() as f64 * f64::from(ratio)).round() as usize,
            Budget::Mass(share) => {
                let goal = f64::from(share) * scores.clone().sum::<f64>();
                let mut covered = 0.0;
                let before = scores.take_while(|score| {
                    let open = covered < goal;
                    covered += score;
                    open
                });
                before.count()
            }
        }
    }

    /// `count` tokens as ascending indices: the best, each with up to `reach` neighbours on either side that are in its chunk. `chunks`: the
    /// tokens of each, in their order.
    pub(super) fn best(&self, count: usize, reach: usize, chunks: &[usize]) -> Vec<usize> {
        let mut chosen = match reach {
            0 => self.order[..count.min(self.len())].to_vec(),
            _ => self.with_neighbours(count, reach, chunks),
        };
        chosen.sort_unstable();
        chosen
    }

    fn with_neighbours(&self, count: usize, reach: usize, chunks: &[usize]) -> Vec<usize> {
        let mut end = 0;
        let ends: Vec<usize> = chunks
            .iter()
            .map(|tokens| {
                end += tokens;
                end
            })
            .collect();
        let (mut chosen, mut taken) = (Vec::with_capacity(count), vec![false; self.len()]);
        for &token in &self.order {
            let chunk = ends.partition_point(|end| *end <= token);
            let (start, end) =
                (if chunk == 0 { 0 } else { ends[chunk - 1] }, ends.get(chunk).copied().unwrap_or(self.len()));
            let near = token.saturating_sub(reach).max(start)..(token + reach + 1).min(end);
            for neighbour in std::iter::once(token).chain(near) {
                if chosen.len() == count {
                    return chosen;
                }
                if !std::mem::replace(&mut taken[neighbour], true) {
                    chosen.push(neighbour);
                }
            }
        }
        chosen
    }

    /// The share of all scores that these tokens have.
    pub(super) fn held(&self, chosen: &[usize]) -> f64 {
        let sum: f64 = self.scores.iter().map(|score| f64::from(*score)).sum();
        let of: f64 = chosen.iter().map(|token| f64::from(self.scores[*token])).sum();
        if sum > 0.0 { of / sum } else { 0.0 }
    }
}

/// The best-scored tokens as far as the budget goes, as ascending indices into `scores`, which are not negative. Ties go to the
/// earlier token.
pub(super) fn highest(scores: &[f32], budget: Budget) -> Vec<usize> {
    let ranking = Ranking::new(scores);
    ranking.best(ranking.count(budget), 0, &[])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_highest_scores_are_chosen_in_order_of_position() {
        let scores = [0.1, 5.0, 0.2, 9.0, 5.0];
        assert_eq!(highest(&scores, Budget::Tokens(0.4)), [1, 3]);
        assert_eq!(highest(&scores, Budget::Tokens(0.6)), [1, 3, 4]);
        assert_eq!(highest(&scores, Budget::Tokens(1.0)), [0, 1, 2, 3, 4]);
        assert!(highest(&scores, Budget::Tokens(0.0)).is_empty());
        assert!(highest(&[], Budget::Tokens(0.5)).is_empty());
    }

    #[test]
    fn a_mass_is_covered_by_the_fewest_tokens_that_have_it() {
        let scores = [1.0, 6.0, 0.0, 2.0, 1.0];
        let chosen = |share| highest(&scores, Budget::Mass(share));
        assert_eq!(chosen(0.5), [1]);
        assert_eq!(chosen(0.625), [1, 3]);
        assert_eq!(chosen(0.875), [0, 1, 3]);
        assert_eq!(chosen(1.0), [0, 1, 3, 4], "a token that has nothing adds nothing");
        assert!(highest(&[0.0; 3], Budget::Mass(0.9)).is_empty());
    }

    proptest! {
        #[test]
        fn one_token_less_than_chosen_does_not_cover_the_mass(
            scores in prop::collection::vec(0u8..20, 1..60), share in 1usize..=16,
        ) {
            let scores: Vec<f32> = scores.into_iter().map(f32::from).collect();
            let chosen = highest(&scores, Budget::Mass(share as f32 / 16.0));
            let goal = scores.iter().sum::<f32>() * share as f32 / 16.0;
            let sum: f32 = chosen.iter().map(|i| scores[*i]).sum();
            let least = chosen.iter().map(|i| scores[*i]).fold(f32::INFINITY, f32::min);
            prop_assert!(sum >= goal);
            prop_assert!(chosen.is_empty() || sum - least < goal);
        }
    }
}
