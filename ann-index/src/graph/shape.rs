//! What is known of the queries to come: their mean and how they vary.
//!
//! Keys and queries differ in distribution, so closeness of keys says little about which keys compete for
//! one query. What matters of the difference x of two keys is how much it changes the score of a random
//! query, E[((q - mean).x)^2] = x'Sx with the covariance S = LL' of the queries. Multiplied by L', keys that
//! behave alike under the queries lie close together, and ordinary distances serve. This costs
//! dim^2 numbers and is all that later insertions need to know of the sample queries.

use super::super::panels::{HEIGHT, Panels, WIDTH, multiply};
use crate::isa::Isa;
use crate::metric::dot;
use crate::parallel::map_ranges;

/// Up to this dimension the whole covariance is kept, above it only variances.
pub(super) const FULL_UP_TO: usize = 512;
/// Share of the mean variance that is added to every direction, so that no direction counts nothing.
const RIDGE: f64 = 1e-3;
/// How many standard deviations a query lies in the direction of a key that it prefers.
const REACH: f32 = 3.5;

/// See the module.
pub(super) struct Shape {
    pub(super) mean: Vec<f32>,
    /// L, `[dim][dim]` with zeros above the diagonal, or its diagonal alone.
    pub(super) factor: Vec<f32>,
    /// L' in panels.
    panels: Option<Panels>,
}

impl Shape {
    /// Of queries of which nothing is known.
    pub(super) fn even(dim: usize) -> Self {
        let size = Self::factor_len(dim);
        let factor = (0..size).map(|i| if size == dim || i % (dim + 1) == 0 { 1.0 } else { 0.0 }).collect();
        Self::from_parts(vec![0.0; dim], factor)
    }

    /// Mean and covariance of `samples`, of which there is at least one, in a unit that keeps squares finite.
    pub(super) fn of(dim: usize, samples: &[f32]) -> Self {
        let largest = samples.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let scaled: Vec<f32> = samples.iter().map(|x| x / largest).collect();
        let samples = &scaled[..];
        let count = (samples.len() / dim).max(1);
        let mut mean = vec![0.0f64; dim];
        for row in samples.chunks_exact(dim) {
            for (sum, &x) in mean.iter_mut().zip(row) {
                *sum += f64::from(x) / count as f64;
            }
        }
        let mean: Vec<f32> = mean.into_iter().map(|x| x as f32).collect();
        let factor =
            if dim > FULL_UP_TO { deviations(&mean, samples) } else { cholesky(dim, covariance(&mean, samples)) };
        Self::from_parts(mean, factor)
    }

    /// A shape that was read from a file.
    pub(super) fn from_parts(mean: Vec<f32>, factor: Vec<f32>) -> Self {
        let dim = mean.len();
        let panels = (factor.len() > dim).then(|| {
            let turned: Vec<f32> = (0..dim * dim).map(|i| factor[i % dim * dim + i / dim]).collect();
            Panels::new(dim, &turned)
        });
        Self { mean, factor, panels }
    }

    /// Numbers of the factor for that dimension.
    pub(super) fn factor_len(dim: usize) -> usize {
        if dim > FULL_UP_TO { dim } else { dim * dim }
    }

    pub(super) fn memory_bytes(&self) -> usize {
        4 * (self.mean.len() + self.factor.len() + self.panels.as_ref().map_or(0, |_| self.factor.len()))
    }

    /// L'(row - center) for every row.
    pub(super) fn project(&self, rows: &[f32], center: &[f32]) -> Vec<f32> {
        let dim = self.mean.len();
        let grain = 128 * HEIGHT;
        let parts = map_ranges(rows.len() / dim, grain, |range| {
            let rows = &rows[range.start * dim..range.end * dim];
            let centered: Vec<f32> =
                rows.chunks_exact(dim).flat_map(|row| row.iter().zip(center).map(|(x, c)| x - c)).collect();
            self.multiply(&centered)
        });
        parts.concat()
    }

    fn multiply(&self, rows: &[f32]) -> Vec<f32> {
        let dim = self.mean.len();
        let Some(panels) = &self.panels else {
            return rows.iter().enumerate().map(|(i, x)| x * self.factor[i % dim]).collect();
        };
        let (isa, mut tile) = (Isa::best(), [[0.0; WIDTH]; HEIGHT]);
        let mut out = vec![0.0; rows.len()];
        for (rows, out) in rows.chunks(HEIGHT * dim).zip(out.chunks_mut(HEIGHT * dim)) {
            for (start, len, panel) in panels.iter() {
                multiply(isa, dim, rows, panel, &mut tile);
                for (out, line) in out.chunks_exact_mut(dim).zip(&tile) {
                    out[start..start + len].copy_from_slice(&line[..len]);
                }
            }
        }
        out
    }

    /// The query among those of one likelihood that scores a key highest: mean + r Ly / |y| for the
    /// projected key y. Its other best keys are those that compete with the key.
    pub(super) fn query_for(&self, projected: &[f32]) -> Vec<f32> {
        let dim = self.mean.len();
        let norm = dot(projected, projected).sqrt();
        let step = if norm > 0.0 { REACH / norm } else { 0.0 };
        let ahead = |i: usize| match self.panels {
            Some(_) => dot(&projected[..=i], &self.factor[i * dim..i * dim + i + 1]),
            None => projected[i] * self.factor[i],
        };
        self.mean.iter().enumerate().map(|(i, m)| m + step * ahead(i)).collect()
    }
}

fn deviations(mean: &[f32], samples: &[f32]) -> Vec<f32> {
    let dim = mean.len();
    let mut squares = vec![0.0f64; dim];
    for row in samples.chunks_exact(dim) {
        for ((sum, &x), &m) in squares.iter_mut().zip(row).zip(mean) {
            *sum += f64::from(x - m).powi(2);
        }
    }
    let ridge = squares.iter().sum::<f64>() / dim as f64 * RIDGE + f64::MIN_POSITIVE;
    squares.iter().map(|square| ((square + ridge) / (samples.len() / dim) as f64).sqrt() as f32).collect()
}

/// The lower half of the covariance, `[dim][dim]`.
fn covariance(mean: &[f32], samples: &[f32]) -> Vec<f64> {
    /// Rows that are added up in f32.
    const BATCH: usize = 128;
    let dim = mean.len();
    let count = (samples.len() / dim) as f64;
    let partial = map_ranges(samples.len() / dim, 64 * BATCH, |range| {
        let mut sums = vec![0.0f64; dim * dim];
        let mut batch = vec![0.0f32; dim * dim];
        let mut row = vec![0.0; dim];
        for rows in samples[range.start * dim..range.end * dim].chunks(BATCH * dim) {
            batch.fill(0.0);
            for sample in rows.chunks_exact(dim) {
                for ((to, x), m) in row.iter_mut().zip(sample).zip(mean) {
                    *to = x - m;
                }
                for (i, line) in batch.chunks_exact_mut(dim).enumerate() {
                    for (sum, x) in line[..=i].iter_mut().zip(&row) {
                        *sum += row[i] * x;
                    }
                }
            }
            for (sum, &x) in sums.iter_mut().zip(&batch) {
                *sum += f64::from(x) / count;
            }
        }
        sums
    });
    let mut all = vec![0.0; dim * dim];
    for sums in partial {
        for (to, x) in all.iter_mut().zip(sums) {
            *to += x;
        }
    }
    all
}

/// L of LL' = the matrix of which the lower half is given, with a ridge.
fn cholesky(dim: usize, mut a: Vec<f64>) -> Vec<f32> {
    let trace: f64 = (0..dim).map(|i| a[i * dim + i]).sum();
    let ridge = if trace > 0.0 { trace / dim as f64 * RIDGE } else { 1.0 };
    for i in 0..dim {
        a[i * dim + i] += ridge;
        for j in 0..=i {
            let done: f64 = (0..j).map(|k| a[i * dim + k] * a[j * dim + k]).sum();
            let rest = a[i * dim + j] - done;
            a[i * dim + j] = if i == j { rest.max(ridge * 1e-6).sqrt() } else { rest / a[j * dim + j] };
        }
    }
    (0..dim * dim).map(|at| if at % dim <= at / dim { a[at] as f32 } else { 0.0 }).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn distances_are_deviations_of_scores() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for dim in [1, 5, 70, FULL_UP_TO + 1] {
            let mut draw = |scale: f32| -> f32 { (rng.random::<f32>() - 0.5) * scale };
            let samples: Vec<f32> =
                (0..3000 * dim).map(|i| 4.0 + draw(if i % dim % 3 == 0 { 9.0 } else { 1.0 })).collect();
            let largest = samples.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let shape = Shape::of(dim, &samples);
            let keys: Vec<f32> = (0..2 * dim).map(|_| draw(2.0)).collect();
            let points = shape.project(&keys, &vec![0.7; dim]);
            let near: f32 = points[..dim].iter().zip(&points[dim..]).map(|(a, b)| (a - b).powi(2)).sum();
            let apart: Vec<f32> = keys[..dim].iter().zip(&keys[dim..]).map(|(a, b)| a - b).collect();
            let scores: Vec<f32> = samples.chunks(dim).map(|q| dot(q, &apart[..])).collect();
            let mean = scores.iter().sum::<f32>() / 3000.0;
            let variance = scores.iter().map(|s| (s - mean).powi(2)).sum::<f32>() / 3000.0;
            let variance = variance / largest.powi(2);
            assert!((near / variance - 1.0).abs() < 0.15, "{dim}: {near} {variance}");
            // No query as likely scores the key higher than the one that is made for it.
            let made = shape.query_for(&points[..dim]);
            let other = shape.query_for(&points[dim..]);
            let lifted: Vec<f32> = keys[..dim].iter().map(|x| x - 0.7).collect();
            assert!(dot(&made, &lifted[..]) >= dot(&other, &lifted[..]) - 1e-3);
        }
    }
}
