//! One segment of consecutive keys: spherical k-means on centred keys, members of a cluster side by side.

use std::ops::Range;

use crate::codes::Codes;
use crate::element::Element;
use crate::error::IndexError;
use crate::isa::Isa;
use crate::key_index::Zone;
use crate::metric::dot;
use crate::panels::{HEIGHT, Panels, WIDTH, above, multiply};
use crate::params::ClustersParams;
use crate::rows::Rows;

/// See the module.
pub(super) struct Segment<T: Element> {
    first: usize,
    /// The stored keys, cluster after cluster.
    rows: Rows<T>,
    /// The ids of these rows.
    ids: Vec<u32>,
    /// Where the row of a key lies, by its number within the segment.
    places: Vec<u32>,
    /// Where each cluster's rows begin, and behind the last one where it ends.
    starts: Vec<u32>,
    /// `[clusters, dim]` means of the stored keys.
    means: Vec<f32>,
    codes: Codes,
}

impl<T: Element> Segment<T> {
    /// Clusters `keys`, of which the first one has the id `first`.
    pub(super) fn build(dim: usize, first: usize, keys: &[f32], params: &ClustersParams) -> Result<Self, IndexError> {
        let count = keys.len() / dim;
        let homes = spherical(dim, keys, count.div_ceil(params.keys_per_cluster), params.iterations);
        let mut order: Vec<u32> = (0..count as u32).collect();
        order.sort_by_key(|&i| homes[i as usize]);
        let mut starts = vec![0u32];
        for at in 1..=count {
            if at == count || homes[order[at] as usize] != homes[order[at - 1] as usize] {
                starts.push(at as u32);
            }
        }
        let rows = Rows::new(dim, count);
        let sorted: Vec<f32> =
            order.iter().flat_map(|&i| &keys[i as usize * dim..(i as usize + 1) * dim]).copied().collect();
        rows.append(&sorted)?;
        let ids = order.iter().map(|&i| first as u32 + i).collect();
        Self::from_parts(first, rows, ids, starts)
    }

    /// A segment whose parts are known to fit each other: `ids` are those from `first` on in another order, `starts`
    /// ascend from 0 to their number.
    pub(super) fn from_parts(first: usize, rows: Rows<T>, ids: Vec<u32>, starts: Vec<u32>) -> Result<Self, IndexError> {
        let dim = rows.dim();
        let mut places = vec![0; ids.len()];
        for (place, &id) in ids.iter().enumerate() {
            places[id as usize - first] = place as u32;
        }
        let clusters = starts.len() - 1;
        let (mut means, mut row) = (vec![0.0f32; clusters * dim], vec![0.0; dim]);
        let mut center = vec![0.0f64; dim];
        for (cluster, mean) in means.chunks_exact_mut(dim).enumerate() {
            let members = starts[cluster] as usize..starts[cluster + 1] as usize;
            let share = 1.0 / members.len() as f32;
            for member in members {
                T::decode(rows.row(member), &mut row);
                mean.iter_mut().zip(&row).for_each(|(sum, x)| *sum += x * share);
            }
            center.iter_mut().zip(mean.iter()).for_each(|(sum, &x)| *sum += f64::from(x) / clusters as f64);
        }
        let codes = Codes::new(center.into_iter().map(|x| x as f32).collect(), clusters);
        codes.append(&means)?;
        Ok(Self { first, rows, ids, places, starts, means, codes })
    }

    pub(super) fn first(&self) -> usize {
        self.first
    }

    pub(super) fn clusters(&self) -> usize {
        self.starts.len() - 1
    }

    /// The means, quantised.
    pub(super) fn codes(&self) -> &Codes {
        &self.codes
    }

    pub(super) fn rows(&self) -> &Rows<T> {
        &self.rows
    }

    pub(super) fn ids(&self) -> &[u32] {
        &self.ids
    }

    pub(super) fn starts(&self) -> &[u32] {
        &self.starts
    }

    fn range(&self, cluster: usize) -> Range<usize> {
        self.starts[cluster] as usize..self.starts[cluster + 1] as usize
    }

    /// Ids and stored rows of a cluster's keys.
    pub(super) fn members(&self, cluster: usize) -> (&[u32], &[T]) {
        let range = self.range(cluster);
        let (_, rows) = self.rows.runs(self.ids.len()).next().unwrap_or_default();
        let stride = self.rows.stride();
        (&self.ids[range.clone()], &rows[range.start * stride..range.end * stride])
    }

    /// Brings a cluster's keys closer.
    pub(super) fn prefetch(&self, cluster: usize) {
        let view = self.rows.view();
        self.range(cluster).for_each(|row| view.prefetch(row));
    }

    pub(super) fn zone(&self, cluster: usize) -> Zone {
        let dim = self.rows.dim();
        Zone { centroid: self.means[cluster * dim..(cluster + 1) * dim].to_vec(), size: self.range(cluster).len() }
    }

    /// Widens a key.
    pub(super) fn key(&self, id: u32, out: &mut [f32]) {
        T::decode(self.rows.row(self.places[id as usize - self.first] as usize), out);
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let small = self.ids.len() + self.places.len() + self.starts.len() + self.means.len();
        size_of::<Self>() + self.rows.memory_bytes() + 4 * small + self.codes.memory_bytes()
    }
}

/// The cluster of each key: k-means of the directions of the keys from their mean (Dhillon and Modha, "Concept
/// decompositions for large sparse text data using clustering", Machine Learning 42, 2001), started from keys at even
/// distances in the sequence.
fn spherical(dim: usize, keys: &[f32], clusters: usize, iterations: usize) -> Vec<u32> {
    let count = keys.len() / dim;
    let mut center = vec![0.0f64; dim];
    for key in keys.chunks_exact(dim) {
        center.iter_mut().zip(key).for_each(|(sum, &x)| *sum += f64::from(x) / count as f64);
    }
    let center: Vec<f32> = center.into_iter().map(|x| x as f32).collect();
    let mut directions: Vec<f32> =
        keys.chunks_exact(dim).flat_map(|key| key.iter().zip(&center).map(|(x, c)| x - c)).collect();
    directions.chunks_exact_mut(dim).for_each(normalise);
    let start = |i: usize| (i * count + count / 2) / clusters;
    let mut poles: Vec<f32> =
        (0..clusters).flat_map(|i| &directions[start(i) * dim..(start(i) + 1) * dim]).copied().collect();
    let mut homes = nearest(dim, &directions, &poles);
    for _ in 1..iterations {
        let old = poles.clone();
        poles.fill(0.0);
        for (key, &home) in directions.chunks_exact(dim).zip(&homes) {
            let pole = &mut poles[home as usize * dim..(home as usize + 1) * dim];
            pole.iter_mut().zip(key).for_each(|(sum, x)| *sum += x);
        }
        for (pole, old) in poles.chunks_exact_mut(dim).zip(old.chunks_exact(dim)) {
            normalise(pole);
            // A cluster without members stays where it was.
            if pole.iter().all(|&x| x == 0.0) {
                pole.copy_from_slice(old);
            }
        }
        homes = nearest(dim, &directions, &poles);
    }
    homes
}

fn normalise(row: &mut [f32]) {
    let largest = row.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    if largest == 0.0 {
        return;
    }
    row.iter_mut().for_each(|x| *x /= largest);
    let norm = dot(row, &*row).sqrt();
    row.iter_mut().for_each(|x| *x /= norm);
}

/// For each row the pole with the largest product, the first one among equals.
fn nearest(dim: usize, rows: &[f32], poles: &[f32]) -> Vec<u32> {
    let (isa, panels) = (Isa::best(), Panels::new(dim, poles));
    let mut tile = [[0.0; WIDTH]; HEIGHT];
    let mut homes = Vec::with_capacity(rows.len() / dim);
    for rows in rows.chunks(HEIGHT * dim) {
        let mut best = [(f32::NEG_INFINITY, 0u32); HEIGHT];
        for (start, len, panel) in panels.iter() {
            multiply(isa, dim, rows, panel, &mut tile);
            for (best, line) in best.iter_mut().zip(&tile) {
                let mut bits = above(isa, line, best.0) & (u64::MAX >> (WIDTH - len));
                while bits != 0 {
                    let i = bits.trailing_zeros() as usize;
                    bits &= bits - 1;
                    if line[i] > best.0 {
                        *best = (line[i], (start + i) as u32);
                    }
                }
            }
        }
        homes.extend(best[..rows.len() / dim].iter().map(|best| best.1));
    }
    homes
}
