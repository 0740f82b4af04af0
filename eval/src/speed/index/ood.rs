//! Keys and queries made up to have the character that attention's have: queries are not distributed like keys.
//!
//! RetrievalAttention (arXiv 2409.10516, section 2.3 and figure 3) measures it on long-context models: by Mahalanobis
//! distance, queries lie an order of magnitude further from the keys than keys from each other; an inverted file then
//! scans 30 to 50 % of the keys for recall@100 of 0.95, graphs over key-key neighbours stick in local optima, and a
//! graph that is shaped after queries reads 1 to 3 %.
//!
//! Here that comes about because **queries look where keys hardly vary**. In a random orthonormal basis (no axis is
//! special) of 128 dimensions:
//!
//! * `key = mean + s (A a + B b)`. `a` (96 dimensions) is content that keys differ by: 256 topics and individual
//!   variance, with a decaying spectrum. `b` (32 dimensions) has under half the deviation. Distances between keys are
//!   distances in `a`. `s` is log-normal (10 %): norms vary.
//! * `query = t (B z - mean / |mean| + 0.02 A noise)`: the energy lies in `b`'s space, with a constant offset against
//!   the keys' mean and a log-normal length (25 %). So a query ranks keys by `b`, which key-key proximity does not see.
//! * `z` has themes, because attention repeats them: half of its variance is one of 512 directions, half is new in
//!   every query. Samples and later queries share the themes and nothing else: no query occurs twice, and a later
//!   query's best keys are not those of the nearest sample.
//!
//! All numbers are rounded to bf16, which is what a KV cache holds: every program that is measured sees the same ones.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::data::{Dataset, Sizes, round_bf16};

/// Numbers of a key.
pub(super) const DIM: usize = 128;
/// Dimensions that queries look at.
const SEEN: usize = 32;
/// Dimensions that keys differ by.
const CONTENT: usize = DIM - SEEN;
const TOPICS: usize = 256;
const THEMES: usize = 512;
/// Length of the keys' mean; of a key without it: about 11.
const MEAN: f32 = 4.0;
/// Deviation of `b`; that of `a` is 1.
const SEEN_DEVIATION: f32 = 0.7;
/// Exponents of the spectra: the i-th dimension's deviation falls as `i^-x`.
const CONTENT_DECAY: f32 = 0.5;
const SEEN_DECAY: f32 = 0.65;
/// Share of a query's variance that is new.
const FRESH: f32 = 0.5;
/// What queries see of `a`.
const LEAK: f32 = 0.02;
/// Length of a query, roughly, over the root of [`SEEN`]: its sharpness. Ranks do not depend on it.
const QUERY_SCALE: f32 = 3.0;

/// The streams of the generator; each set of rows has its own, so that its size changes no other set.
#[derive(Clone, Copy)]
enum Stream {
    Structure,
    Keys,
    Samples,
    Tuning,
    Test,
}

/// What all rows share.
pub(super) struct Character {
    seed: u64,
    /// `[DIM, DIM]`, orthonormal rows: first those of `A`, then those of `B`.
    basis: Vec<f32>,
    mean: Vec<f32>,
    content_deviation: Vec<f32>,
    seen_deviation: Vec<f32>,
    /// `[TOPICS, CONTENT]`
    topics: Vec<f32>,
    /// `[THEMES, SEEN]`
    themes: Vec<f32>,
}

impl Character {
    pub(super) fn new(seed: u64) -> Character {
        let mut normal = Normal::new(seed, Stream::Structure);
        let basis = orthonormal(&mut normal);
        let direction = normal.many(DIM);
        let length = norm(&direction);
        Character {
            seed,
            basis,
            mean: direction.iter().map(|x| MEAN * x / length).collect(),
            content_deviation: spectrum(CONTENT, CONTENT_DECAY),
            seen_deviation: spectrum(SEEN, SEEN_DECAY),
            topics: normal.many(TOPICS * CONTENT),
            themes: normal.many(THEMES * SEEN),
        }
    }

    /// Keys and queries of different distributions.
    pub(super) fn out_of_distribution(&self, sizes: &Sizes) -> Dataset {
        self.dataset("ood", sizes, Character::query)
    }

    /// The same keys, and queries that are drawn as keys are.
    pub(super) fn in_distribution(&self, sizes: &Sizes) -> Dataset {
        self.dataset("in", sizes, Character::key)
    }

    fn dataset(&self, name: &'static str, sizes: &Sizes, query: RowMaker) -> Dataset {
        let mut keys = self.rows(Stream::Keys, sizes.keys + sizes.growth, Character::key);
        let growth = keys.split_off(sizes.keys * DIM);
        Dataset {
            name,
            dim: DIM,
            keys,
            growth,
            samples: self.rows(Stream::Samples, sizes.samples, query),
            tuning: self.rows(Stream::Tuning, sizes.queries, query),
            test: self.rows(Stream::Test, sizes.queries, query),
        }
    }

    fn rows(&self, stream: Stream, count: usize, make: RowMaker) -> Vec<f32> {
        let mut normal = Normal::new(self.seed, stream);
        let mut rows = vec![0.0; count * DIM];
        for row in rows.chunks_exact_mut(DIM) {
            make(self, &mut normal, row);
            row.iter_mut().for_each(|x| *x = round_bf16(*x));
        }
        rows
    }

    fn key(&self, normal: &mut Normal, row: &mut [f32]) {
        let topic = &self.topics[normal.below(TOPICS) * CONTENT..][..CONTENT];
        let half = 0.5_f32.sqrt();
        let mut parts = [0.0; DIM];
        let (content, seen) = parts.split_at_mut(CONTENT);
        for ((x, topic), deviation) in content.iter_mut().zip(topic).zip(&self.content_deviation) {
            *x = half * (topic + normal.next()) * deviation;
        }
        for (x, deviation) in seen.iter_mut().zip(&self.seen_deviation) {
            *x = SEEN_DEVIATION * normal.next() * deviation;
        }
        let scale = (0.1 * normal.next()).exp();
        parts.iter_mut().for_each(|x| *x *= scale);
        row.copy_from_slice(&self.mean);
        self.add_in_basis(&parts, row);
    }

    fn query(&self, normal: &mut Normal, row: &mut [f32]) {
        let theme = &self.themes[normal.below(THEMES) * SEEN..][..SEEN];
        let mut parts = [0.0; DIM];
        let (content, seen) = parts.split_at_mut(CONTENT);
        content.iter_mut().for_each(|x| *x = LEAK * normal.next());
        for ((x, theme), deviation) in seen.iter_mut().zip(theme).zip(&self.seen_deviation) {
            *x = ((1.0 - FRESH).sqrt() * theme + FRESH.sqrt() * normal.next()) * deviation;
        }
        row.iter_mut().zip(&self.mean).for_each(|(x, mean)| *x = -mean / MEAN);
        self.add_in_basis(&parts, row);
        let scale = QUERY_SCALE * (0.25 * normal.next()).exp();
        row.iter_mut().for_each(|x| *x *= scale);
    }

    fn add_in_basis(&self, parts: &[f32], row: &mut [f32]) {
        for (part, direction) in parts.iter().zip(self.basis.chunks_exact(DIM)) {
            row.iter_mut().zip(direction).for_each(|(x, d)| *x += part * d);
        }
    }
}

type RowMaker = fn(&Character, &mut Normal, &mut [f32]);

/// Deviations that fall as `i^-decay`, with a mean square of 1.
fn spectrum(dims: usize, decay: f32) -> Vec<f32> {
    let raw: Vec<f32> = (1..=dims).map(|i| (i as f32).powf(-decay)).collect();
    let root = norm(&raw) / (dims as f32).sqrt();
    raw.iter().map(|x| x / root).collect()
}

/// Random orthonormal rows: Gram-Schmidt over normal ones, which has no preferred direction.
fn orthonormal(normal: &mut Normal) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::with_capacity(DIM);
    for _ in 0..DIM {
        let mut row: Vec<f64> = normal.many(DIM).into_iter().map(f64::from).collect();
        for _ in 0..2 {
            for other in &rows {
                let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
        }
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
        rows.push(row);
    }
    rows.into_iter().flatten().map(|x| x as f32).collect()
}

fn norm(x: &[f32]) -> f32 {
    x.iter().map(|x| x * x).sum::<f32>().sqrt()
}

/// Normal numbers (Box and Muller, 1958), seeded.
struct Normal {
    rng: ChaCha8Rng,
    spare: Option<f32>,
}

impl Normal {
    fn new(seed: u64, stream: Stream) -> Normal {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream as u64);
        Normal { rng, spare: None }
    }

    fn next(&mut self) -> f32 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        // In (0, 1]: the logarithm of 0 is none.
        let radius = (-2.0 * (1.0 - self.rng.random::<f64>()).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.rng.random::<f64>()).sin_cos();
        self.spare = Some((radius * sin) as f32);
        (radius * cos) as f32
    }

    fn many(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn below(&mut self, count: usize) -> usize {
        self.rng.random_range(0..count)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn sizes() -> Sizes {
        Sizes { keys: 4096, growth: 64, samples: 512, queries: 128 }
    }

    fn dot(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn same_seed_same_rows_whatever_the_sizes() {
        let (a, b) = (Character::new(3).out_of_distribution(&sizes()), Character::new(3).out_of_distribution(&sizes()));
        assert!(a.keys == b.keys && a.test == b.test && a.samples == b.samples);
        let fewer = Sizes { keys: 1000, samples: 8, ..sizes() };
        let c = Character::new(3).out_of_distribution(&fewer);
        assert!(
            c.keys[..] == a.keys[..1000 * DIM] && c.test == a.test && c.growth[..] == a.keys[1000 * DIM..1064 * DIM]
        );
        let other = Character::new(4).out_of_distribution(&sizes());
        assert!(other.keys != a.keys && other.test != a.test);
    }

    #[test]
    fn the_basis_is_orthonormal() {
        let basis = Character::new(1).basis;
        for (i, a) in basis.chunks(DIM).enumerate() {
            for (j, b) in basis.chunks(DIM).enumerate() {
                assert!((dot(a, b) - f32::from(u8::from(i == j))).abs() < 1e-4, "{i} {j}");
            }
        }
    }

    #[test]
    fn no_later_query_is_a_sample() {
        let data = Character::new(1).out_of_distribution(&sizes());
        let mut nearest = Vec::new();
        for query in data.test.chunks(DIM) {
            let cosine = |other: &[f32]| dot(query, other) / norm(query) / norm(other);
            nearest.push(data.samples.chunks(DIM).chain(data.tuning.chunks(DIM)).map(cosine).fold(-1.0, f32::max));
        }
        assert!(nearest.iter().all(|cosine| *cosine < 0.999), "{nearest:?}");
    }

    /// The published measure, in the basis where it is easy: the keys' covariance is nearly diagonal there.
    #[test]
    fn queries_are_far_from_the_keys_in_mahalanobis_distance_only_out_of_distribution() {
        let character = Character::new(1);
        let coordinates = |rows: &[f32]| -> Vec<Vec<f32>> {
            let of = |row: &[f32]| character.basis.chunks(DIM).map(|d| dot(row, d)).collect();
            rows.chunks(DIM).map(of).collect()
        };
        let data = character.out_of_distribution(&sizes());
        let keys = coordinates(&data.keys);
        let mean = |i: usize| keys.iter().map(|k| k[i]).sum::<f32>() / keys.len() as f32;
        let means: Vec<f32> = (0..DIM).map(mean).collect();
        let variance = |i: usize| keys.iter().map(|k| (k[i] - means[i]).powi(2)).sum::<f32>() / keys.len() as f32;
        let variances: Vec<f32> = (0..DIM).map(variance).collect();
        let distance = |rows: &[f32]| {
            let of = |row: &Vec<f32>| (0..DIM).map(|i| (row[i] - means[i]).powi(2) / variances[i]).sum::<f32>().sqrt();
            let all: Vec<f32> = coordinates(rows).iter().map(of).collect();
            all.iter().sum::<f32>() / all.len() as f32
        };
        let (near, far) = (distance(&data.keys), distance(&data.test));
        assert!(far > 2.0 * near, "{far} {near}");
        let inside = distance(&character.in_distribution(&sizes()).test);
        assert!((inside / near - 1.0).abs() < 0.1, "{inside} {near}");
    }
}
