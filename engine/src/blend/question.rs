//! The rule `question`: the tokens that the question attends most, when it is read over the chunks as they are cached.

use super::paid::Paid;

/// The score of each position: the attention that the question pays it, heads and layers summed.
pub(super) fn scores(paid: Paid) -> Vec<f32> {
    paid.question
}
