//! The rule `epic`: attention sinks form at the beginning of each chunk that was computed alone, and the first tokens of later
//! chunks should not be such (EPIC, arXiv 2410.15332, LegoLink).

use super::plan::BlendPlan;

/// First tokens of each chunk that are recomputed.
pub(super) const TOKENS: usize = 32;

/// Positions, ascending, of the first tokens of each chunk whose state is not exact.
pub(super) fn chosen(plan: &BlendPlan) -> Vec<usize> {
    plan.composed().flat_map(|span| span.positions.clone().take(TOKENS)).collect()
}
