//! What stored numbers depend on beside weights, tokens and formats: how they were computed.
//!
//! The same build computes the same model in several ways (instruction sets, matrix tiles, GPUs), which differ by rounding.
//! Two ways have one name where the KV format rounds away what they differ by anyway, so that a store serves both; and two
//! names where it does not.

use crate::kv::KvDtype;

/// Raised by hand whenever a change makes a model compute other numbers, by more than rounding: what was stored before is then
/// not found any more, and computed again. (Not a hash of the kernels' sources: most of their changes leave the numbers as
/// they are, and would throw stores away.)
pub(crate) const VERSION: u32 = 1;

/// Significant bits that products and attention keep of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activations {
    /// f32: the CPU without matrix tiles.
    Bits24,
    /// Two bf16 numbers: matrix tiles, and GPUs.
    Bits16,
    /// One bf16 number, gates of the MLP before their product too: GPUs with `fast_prefill`.
    Bits8,
}

/// The name of a way to compute state that is kept in `kv`.
pub(crate) fn name(activations: Activations, kv: KvDtype) -> String {
    let bits = match (activations, kv) {
        (Activations::Bits8, _) => "8, gates too",
        // bf16 keeps 8 bits of what is stored.
        (Activations::Bits16 | Activations::Bits24, KvDtype::Bf16) => "16 or more",
        (Activations::Bits16, KvDtype::F32) => "16",
        (Activations::Bits24, KvDtype::F32) => "24",
    };
    format!("numerics {VERSION}, activations of {bits} bits")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ways_that_differ_by_more_than_the_format_rounds_have_different_names() {
        use Activations::{Bits8, Bits16, Bits24};
        let names = |kv| [Bits8, Bits16, Bits24].map(|activations| name(activations, kv));
        assert_eq!(names(KvDtype::F32).into_iter().collect::<HashSet<_>>().len(), 3);
        let [fast, tiles, plain] = names(KvDtype::Bf16);
        assert!(fast != tiles && tiles == plain);
    }
}
