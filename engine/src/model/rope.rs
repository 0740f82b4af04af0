//! Rotary position embedding (Su et al., arXiv 2104.09864) in the "rotate half" layout, and its scalings.
//!
//! A head of dimension `d` is `d / 2` pairs `(x[i], x[i + d/2])`; position `p` turns pair `i` by the angle
//! `p * inv_freq[i]`. Frequencies and angles are computed in f64: at position 100,000 an f32 angle is off by up
//! to 4e-3 radians, and rotating a cached chunk from its local to its final position must compose exactly.

use std::f64::consts::PI;
use std::fmt::Write as _;

/// How the base frequencies are changed to reach beyond the trained context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// The frequencies as trained.
    None,
    /// Position interpolation (Chen et al., arXiv 2306.15595): every frequency divided by `factor`.
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths are interpolated, short ones kept, those between blended.
    Llama3 {
        /// Division of the lowest frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are divided in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Tokens of context before the extension.
        original_context: f64,
    },
    /// YaRN (Peng et al., arXiv 2309.00071, section 3.2 "NTK-by-parts").
    Yarn {
        /// How many times longer the context becomes.
        factor: f64,
        /// Tokens of context before the extension.
        original_context: f64,
        /// Pairs that turn more often than this over the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are interpolated in full.
        beta_slow: f64,
        /// Whether the borders of the blend are rounded outwards to whole pairs.
        truncate: bool,
        /// Scale of both rotated queries and rotated keys (section 3.4); no part of the rotation.
        attention_factor: f64,
    },
}

/// The rotary embedding of one model: constant frequencies, the same at every length.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// The base of the geometric row of frequencies.
    pub theta: f64,
    /// Dimension of a head; even.
    pub head_dim: usize,
    /// The scaling.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Radians by which one position turns each of the `head_dim / 2` pairs.
    #[must_use]
    pub fn inv_freq(&self) -> Vec<f64> {
        let dim = self.head_dim as f64;
        let base = (0..self.head_dim / 2).map(|i| self.theta.powf(-(2.0 * i as f64) / dim));
        match self.scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => base
                .map(|f| {
                    let turns = original_context * f / (2.0 * PI);
                    if turns < low_freq_factor {
                        f / factor
                    } else if turns > high_freq_factor {
                        f
                    } else {
                        let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - keep) * f / factor + keep * f
                    }
                })
                .collect(),
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                // The (fractional) pair that makes `turns` turns over the original context.
                let pair = |turns: f64| dim * (original_context / (turns * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                base.enumerate()
                    .map(|(i, f)| {
                        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * interpolated + f * (1.0 - interpolated)
                    })
                    .collect()
            }
        }
    }

    /// Scale of rotated queries and of rotated keys: attention scores grow by its square. 1 except for YaRN.
    #[must_use]
    pub fn attention_factor(&self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Canonical text of every parameter, for cache keys: equal exactly when the rotations are equal by definition.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut text = format!("rope-halves/1 dim={} theta={:e}", self.head_dim, self.theta);
        // Writing into a String cannot fail.
        let _ = match &self.scaling {
            RopeScaling::None => write!(text, " none"),
            RopeScaling::Linear { factor } => write!(text, " linear factor={factor:e}"),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => write!(
                text,
                " llama3 factor={factor:e} low={low_freq_factor:e} high={high_freq_factor:e} original={original_context:e}"
            ),
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, attention_factor } => write!(
                text,
                " yarn factor={factor:e} original={original_context:e} fast={beta_fast:e} slow={beta_slow:e} \
                 truncate={truncate} attention={attention_factor:e}"
            ),
        };
        text
    }
}

/// Computes cosines and sines of positions; holds the frequencies.
#[derive(Debug, Clone)]
pub struct RopeTable {
    inv_freq: Vec<f64>,
}

impl RopeTable {
    /// A table for `rope`. [`Rope::attention_factor`] is not part of it.
    #[must_use]
    pub fn new(rope: &Rope) -> Self {
        RopeTable { inv_freq: rope.inv_freq() }
    }

    /// Pairs in a head: half its dimension.
    #[must_use]
    pub fn half(&self) -> usize {
        self.inv_freq.len()
    }

    /// Writes cosine and sine of the angles of `position` (negative: the inverse rotation), [`half`](Self::half) each.
    pub fn angles(&self, position: i64, cos: &mut [f32], sin: &mut [f32]) {
        debug_assert!(cos.len() == self.half() && sin.len() == self.half());
        for ((c, s), f) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
            let (sine, cosine) = (position as f64 * f).sin_cos();
            (*c, *s) = (cosine as f32, sine as f32);
        }
    }

    /// Cosines and sines of many positions, row-major `[positions, half]` each.
    #[must_use]
    pub fn rows(&self, positions: &[i64]) -> (Vec<f32>, Vec<f32>) {
        let half = self.half();
        let (mut cos, mut sin) = (vec![0.0; positions.len() * half], vec![0.0; positions.len() * half]);
        for ((&p, c), s) in positions.iter().zip(cos.chunks_exact_mut(half)).zip(sin.chunks_exact_mut(half)) {
            self.angles(p, c, s);
        }
        (cos, sin)
    }
}

/// Rotates one head in place by the angles whose cosines and sines are given (half of `head`'s length each).
pub(crate) fn rotate_half(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// Undoes [`rotate_half`].
pub(crate) fn rotate_half_back(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c + *b * s, *b * c - *a * s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ropes() -> Vec<Rope> {
        let scalings = [
            RopeScaling::None,
            RopeScaling::Linear { factor: 4.0 },
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192.0 },
            RopeScaling::Yarn {
                factor: 4.0,
                original_context: 4096.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: true,
                attention_factor: 1.1,
            },
        ];
        scalings.into_iter().map(|scaling| Rope { theta: 500_000.0, head_dim: 16, scaling }).collect()
    }

    /// The scaling with each of its numbers changed alone. A new number does not compile until it is named here.
    fn each_number_changed(scaling: &RopeScaling) -> Vec<RopeScaling> {
        let more = |x: f64| x * (1.0 + 1e-12);
        match *scaling {
            RopeScaling::None => Vec::new(),
            RopeScaling::Linear { factor } => vec![RopeScaling::Linear { factor: more(factor) }],
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => (0..4)
                .map(|i| {
                    let turn = |at: usize, x: f64| if at == i { more(x) } else { x };
                    RopeScaling::Llama3 {
                        factor: turn(0, factor),
                        low_freq_factor: turn(1, low_freq_factor),
                        high_freq_factor: turn(2, high_freq_factor),
                        original_context: turn(3, original_context),
                    }
                })
                .collect(),
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, attention_factor } => (0..6)
                .map(|i| {
                    let turn = |at: usize, x: f64| if at == i { more(x) } else { x };
                    RopeScaling::Yarn {
                        factor: turn(0, factor),
                        original_context: turn(1, original_context),
                        beta_fast: turn(2, beta_fast),
                        beta_slow: turn(3, beta_slow),
                        attention_factor: turn(4, attention_factor),
                        truncate: truncate != (i == 5),
                    }
                })
                .collect(),
        }
    }

    #[test]
    fn every_number_of_every_scaling_changes_the_fingerprint() {
        let mut texts = std::collections::BTreeSet::new();
        let mut count = 0;
        for rope in ropes() {
            assert_eq!(rope.fingerprint(), rope.clone().fingerprint());
            let theta = Rope { theta: rope.theta * (1.0 + 1e-12), ..rope.clone() };
            let dim = Rope { head_dim: 32, ..rope.clone() };
            let scaled = each_number_changed(&rope.scaling);
            let scaled = scaled.into_iter().map(|scaling| Rope { scaling, ..rope.clone() });
            for changed in scaled.chain([rope.clone(), theta, dim]) {
                count += 1;
                assert!(texts.insert(changed.fingerprint()), "{changed:?} has the fingerprint of another");
            }
        }
        assert_eq!(count, 4 * 3 + 1 + 4 + 6);
    }

    #[test]
    fn rotation_turns_pairs_that_lie_half_a_head_apart() {
        let table = RopeTable::new(&Rope { theta: 100.0, head_dim: 4, scaling: RopeScaling::None });
        let (cos, sin) = table.rows(&[3]);
        let mut head = [1.0, 0.0, 0.0, 1.0];
        rotate_half(&mut head, &cos, &sin);
        let expected = [3f32.cos(), -0.3f32.sin(), 3f32.sin(), 0.3f32.cos()];
        for (found, expected) in head.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{head:?}");
        }
    }

    proptest! {
        /// What reuse of cached chunks stands on: two rotations are one by the sum, at any distance.
        #[test]
        fn rotations_compose(
            head in prop::collection::vec(-1.0f32..1.0, 16), a in 0i64..200_000, b in -200_000i64..200_000,
        ) {
            for rope in ropes() {
                let table = RopeTable::new(&rope);
                let rotate = |head: &mut [f32], position| {
                    let (cos, sin) = table.rows(&[position]);
                    rotate_half(head, &cos, &sin);
                };
                let (mut twice, mut once) = (head.clone(), head.clone());
                rotate(&mut twice, a);
                rotate(&mut twice, b);
                rotate(&mut once, a + b);
                for (x, y) in twice.iter().zip(&once) {
                    prop_assert!((x - y).abs() < 1e-6, "{x} {y}");
                }
            }
        }
    }
}
