//! Sample queries that are kept, so that keys that come later find the queries they matter for.
//!
//! For each of up to 8,192 sample queries the score of its last known neighbour is kept: the bar that a new key
//! has to take. A new key looks for its rivals with the queries whose bar it takes by most, and counts as one
//! that queries look for when it takes any.

use crate::isa::Isa;
use crate::metric::dot;
use crate::neighbours::Neighbours;
use crate::panels::{HEIGHT, Panels, WIDTH, multiply};

/// Sample queries that are kept.
const GUIDES: usize = 8192;
/// Those that a new key searches with.
const OF_KEY: usize = 3;

/// See the module.
pub(super) struct Guides {
    dim: usize,
    /// Each of length 1.
    queries: Panels,
    bars: Vec<f32>,
}

impl Guides {
    /// Some of the samples; `keys` are those that the neighbours number.
    pub(super) fn new(dim: usize, samples: &[f32], keys: &[f32], neighbours: &Neighbours) -> Self {
        let count = samples.len() / dim;
        let step = count.div_ceil(GUIDES).max(1);
        let (mut queries, mut bars) = (Vec::new(), Vec::new());
        for (sample, list) in samples.chunks_exact(dim).zip(neighbours.lists()).step_by(step) {
            let largest = sample.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let (Some(&last), true) = (list.last(), largest > 0.0) else { continue };
            let scaled: Vec<f32> = sample.iter().map(|x| x / largest).collect();
            let norm = dot(&scaled, &scaled[..]).sqrt();
            let start = queries.len();
            queries.extend(scaled.iter().map(|x| x / norm));
            bars.push(dot(&queries[start..], &keys[last as usize * dim..(last as usize + 1) * dim]));
        }
        Self::from_parts(dim, queries, bars)
    }

    /// Guides that were read from a file.
    pub(super) fn from_parts(dim: usize, queries: Vec<f32>, bars: Vec<f32>) -> Self {
        Self { dim, queries: Panels::new(dim, &queries), bars }
    }

    /// The queries, `[guides, dim]`, and their bars.
    pub(super) fn parts(&self) -> (Vec<f32>, &[f32]) {
        ((0..self.bars.len() as u32).flat_map(|guide| self.query(guide)).collect(), &self.bars)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.queries.memory_bytes() + 4 * self.bars.len()
    }

    pub(super) fn query(&self, guide: u32) -> Vec<f32> {
        self.queries.row(guide as usize)
    }

    /// For each row, the guides whose bars it takes by most, or misses by least, each with by how much.
    pub(super) fn best_for(&self, rows: &[f32]) -> Vec<Vec<(f32, u32)>> {
        let (isa, mut tile) = (Isa::best(), [[0.0; WIDTH]; HEIGHT]);
        let mut all = Vec::with_capacity(rows.len() / self.dim);
        for rows in rows.chunks(HEIGHT * self.dim) {
            let mut best = [[(f32::NEG_INFINITY, u32::MAX); OF_KEY]; HEIGHT];
            for (start, len, panel) in self.queries.iter() {
                multiply(isa, self.dim, rows, panel, &mut tile);
                for (best, line) in best.iter_mut().zip(&tile) {
                    for (i, (score, bar)) in line[..len].iter().zip(&self.bars[start..]).enumerate() {
                        let over = score - bar;
                        if over > best[OF_KEY - 1].0 {
                            best[OF_KEY - 1] = (over, (start + i) as u32);
                            best.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
                        }
                    }
                }
            }
            let some = |best: &[(f32, u32); OF_KEY]| best.iter().copied().filter(|b| b.1 != u32::MAX).collect();
            all.extend(best[..rows.len() / self.dim].iter().map(some));
        }
        all
    }
}
