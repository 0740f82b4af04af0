//! The rule `heads`: the first tokens of every chunk, whose attention was that of a beginning when the chunk was computed
//! alone, as far as the budget goes. `epic` is the same with a fixed number.

use super::plan::BlendPlan;

/// The score of each token whose state is composed, in order of position: the nearer to its chunk's beginning, the higher.
pub(super) fn scores(plan: &BlendPlan) -> Vec<f32> {
    plan.composed().flat_map(|span| (0..span.positions.len()).map(|offset| 1.0 / (1.0 + offset as f32))).collect()
}
