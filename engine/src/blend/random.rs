//! The rule `random`, which any other has to beat: tokens drawn without looking at them. The same prompt draws the same.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// As many scores, drawn from a seed that is a hash of the prompt's tokens.
pub(super) fn scores(count: usize, tokens: impl Iterator<Item = u32>) -> Vec<f32> {
    let mut hasher = blake3::Hasher::new_derive_key("quire random blending 1");
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
    (0..count).map(|_| rng.random()).collect()
}
