//! Numbers that look random and follow from a counter.

/// The finaliser of SplitMix64 over a step of its sequence (Steele, Lea, Flood: Fast splittable pseudorandom number
/// generators, 2014, figure 16): different counters give independent-looking words.
pub(super) fn mix(counter: u64) -> u64 {
    let mut z = counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// `length` token ids of a vocabulary of `vocab`, of which the first sixteen, where tokens with a meaning of their own
/// usually lie, do not occur.
pub(super) fn tokens(seed: u64, length: usize, vocab: usize) -> Vec<u32> {
    let key = mix(seed);
    let room = vocab.saturating_sub(16).max(1) as u64;
    (0..length as u64).map(|i| (16.min(vocab as u64 - 1) + mix(key.wrapping_add(i)) % room) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_fit_the_vocabulary_and_differ_by_seed() {
        let drawn = tokens(1, 1000, 300);
        assert!(drawn.iter().all(|id| (16..300).contains(id)));
        assert!(drawn.iter().collect::<std::collections::HashSet<_>>().len() > 200);
        assert_ne!(drawn, tokens(2, 1000, 300));
        assert_eq!(drawn[..10], tokens(1, 10, 300));
    }

    #[test]
    fn the_first_words_are_those_of_splitmix64_with_seed_0() {
        assert_eq!([mix(0), mix(1)], [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4]);
    }
}
