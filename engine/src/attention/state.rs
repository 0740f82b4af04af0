//! Attention over some tokens, as a value that merges with attention over others.

/// Attention of `rows` queries over a set of tokens: the weighted mean of their values and the
/// log-sum-exp of their scores (natural logarithm). Over no tokens, `out` is 0 and `lse` is minus infinity.
///
/// Merging is associative and commutative up to rounding, and the empty state is its identity
/// (FlashAttention-2, arXiv 2307.08691, section 3.1; flash-decoding merges splits the same way).
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionState {
    /// `[rows, dim]`
    pub out: Vec<f32>,
    /// `[rows]`
    pub lse: Vec<f32>,
}

impl AttentionState {
    /// Attention over no tokens.
    #[must_use]
    pub fn empty(rows: usize, dim: usize) -> AttentionState {
        AttentionState { out: vec![0.0; rows * dim], lse: vec![f32::NEG_INFINITY; rows] }
    }

    /// Makes this the attention over the union of both sets, which must be disjoint.
    ///
    /// # Panics
    /// When the shapes differ.
    pub fn merge(&mut self, other: &AttentionState) {
        assert_eq!(self.lse.len(), other.lse.len(), "states of different numbers of queries");
        assert_eq!(self.out.len(), other.out.len(), "states of different widths");
        if self.lse.is_empty() {
            return;
        }
        let dim = self.out.len() / self.lse.len();
        for (row, out) in self.out.chunks_exact_mut(dim).enumerate() {
            merge_row(out, &mut self.lse[row], &other.out[row * dim..(row + 1) * dim], other.lse[row]);
        }
    }
}

/// Merges one query's attention over other tokens into `(out, lse)`.
pub(crate) fn merge_row(out: &mut [f32], lse: &mut f32, other: &[f32], other_lse: f32) {
    if other_lse == f32::NEG_INFINITY {
        return;
    }
    if *lse == f32::NEG_INFINITY {
        out.copy_from_slice(other);
        *lse = other_lse;
        return;
    }
    let max = lse.max(other_lse);
    let (a, b) = ((*lse - max).exp(), (other_lse - max).exp());
    let sum = a + b;
    for (x, y) in out.iter_mut().zip(other) {
        *x = (*x * a + y * b) / sum;
    }
    *lse = max + sum.ln();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIM: usize = 3;

    /// Direct attention of one query over tokens `(score, value)` in double precision.
    fn direct(tokens: &[(f32, [f32; DIM])]) -> AttentionState {
        let mut state = AttentionState::empty(1, DIM);
        let max = tokens.iter().fold(f64::NEG_INFINITY, |m, t| m.max(f64::from(t.0)));
        let sum: f64 = tokens.iter().map(|t| (f64::from(t.0) - max).exp()).sum();
        if !tokens.is_empty() {
            for d in 0..DIM {
                let x: f64 = tokens.iter().map(|t| (f64::from(t.0) - max).exp() * f64::from(t.1[d])).sum();
                state.out[d] = (x / sum) as f32;
            }
            state.lse[0] = (max + sum.ln()) as f32;
        }
        state
    }

    fn close(a: &AttentionState, b: &AttentionState) -> bool {
        let near = |x: f32, y: f32| x == y || (x - y).abs() < 1e-4;
        a.lse.iter().zip(&b.lse).all(|(x, y)| near(*x, *y)) && a.out.iter().zip(&b.out).all(|(x, y)| near(*x, *y))
    }

    fn tokens() -> impl Strategy<Value = Vec<(f32, [f32; DIM])>> {
        prop::collection::vec((-60.0f32..60.0, prop::array::uniform3(-2.0f32..2.0)), 0..7)
    }

    fn merged(a: &AttentionState, b: &AttentionState) -> AttentionState {
        let mut c = a.clone();
        c.merge(b);
        c
    }

    proptest! {
        #[test]
        fn merge_is_attention_over_the_union(a in tokens(), b in tokens(), c in tokens()) {
            let (x, y, z) = (direct(&a), direct(&b), direct(&c));
            let union = direct(&[a, b, c].concat());
            prop_assert!(close(&merged(&merged(&x, &y), &z), &union));
            prop_assert!(close(&merged(&x, &merged(&y, &z)), &union));
            prop_assert!(close(&merged(&z, &merged(&y, &x)), &union));
        }

        #[test]
        fn the_empty_state_is_the_identity(a in tokens()) {
            let (x, none) = (direct(&a), AttentionState::empty(1, DIM));
            prop_assert_eq!(&merged(&x, &none), &x);
            prop_assert_eq!(&merged(&none, &x), &x);
        }
    }

    #[test]
    fn no_queries_merge_too() {
        let mut a = AttentionState::empty(0, DIM);
        a.merge(&AttentionState::empty(0, DIM));
        assert!(a.out.is_empty());
    }
}
