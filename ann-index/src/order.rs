//! Scored ids as one integer: a smaller one is a better hit, so that sorting integers ranks hits.

use crate::key_index::Hit;

/// The rank of an id with that score: a higher score ranks lower, and among equal scores a lower id.
/// The two zeros are equal.
#[inline]
pub(crate) fn rank(score: f32, id: u32) -> u64 {
    let bits = (score + 0.0).to_bits();
    // Ascending floats as ascending integers, then turned round.
    let ascending = bits ^ ((bits as i32 >> 31) as u32 | 1 << 31);
    u64::from(!ascending) << 32 | u64::from(id)
}

/// The id in a rank.
#[inline]
pub(crate) fn id_of(rank: u64) -> u32 {
    rank as u32
}

/// The score in a rank.
#[inline]
pub(crate) fn score_of(rank: u64) -> f32 {
    let ascending = !((rank >> 32) as u32);
    let mask = if ascending >> 31 == 1 { 1 << 31 } else { u32::MAX };
    f32::from_bits(ascending ^ mask)
}

/// Ranks as hits, best first.
pub(crate) fn into_hits(mut ranks: Vec<u64>) -> Vec<Hit> {
    ranks.sort_unstable();
    ranks.into_iter().map(|rank| Hit { id: id_of(rank), score: score_of(rank) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranks_order_as_hits_do(a in -9.0f32..9.0, b in -9.0f32..9.0, i in 0u32..3, j in 0u32..3) {
            for (a, b) in [(a, b), (a, a), (a, -a), (0.0, -0.0), (a * 1e-42, b * 1e-42)] {
                let better = a > b || (a == b && i < j);
                prop_assert_eq!(rank(a, i) < rank(b, j), better);
                prop_assert_eq!(score_of(rank(a, i)), a);
                prop_assert_eq!(id_of(rank(a, i)), i);
            }
        }
    }
}
