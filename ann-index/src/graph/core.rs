//! A graph and what belongs to it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::beam::{FOLLOWED, Field, Scratch, with_scratch};
use super::build::{Decode, Incidences, Points, choose, link_back};
use super::guides::Guides;
use super::links::Links;
use super::shape::Shape;
use crate::codes::{Codes, Probe};
use crate::error::IndexError;
use crate::metric::dot;
use crate::neighbours::Neighbours;
use crate::order::id_of;
use crate::params::GraphParams;

/// Links over distinct keys, their codes, and where searches start.
pub(super) struct Core {
    pub(super) params: GraphParams,
    pub(super) codes: Codes,
    pub(super) shape: Shape,
    pub(super) guides: Guides,
    /// Distinct keys when it was built.
    pub(super) built: usize,
    links: RwLock<Arc<Links>>,
    entries: RwLock<Arc<Vec<u32>>>,
    /// The length at which every key was last known to be reached.
    checked: AtomicUsize,
    /// The root mean square of the projected keys' lengths at the build.
    pub(super) typical: f32,
}

/// What a walk found and read.
pub(super) struct Walked {
    /// Candidates, the best first.
    pub(super) ids: Vec<u32>,
    /// Keys that no walk before it in the group has scored.
    pub(super) scored: usize,
    /// Keys whose links no walk before it in the group has followed.
    pub(super) followed: usize,
}

/// A set of keys, one bit each; without room until it is used.
pub(super) struct KeySet {
    len: usize,
    bits: Vec<u64>,
}

impl KeySet {
    /// Room for the keys below `len`.
    pub(super) fn new(len: usize) -> Self {
        Self { len, bits: Vec::new() }
    }

    fn bits(&mut self) -> &mut [u64] {
        if self.bits.is_empty() {
            self.bits.resize(self.len.div_ceil(64), 0);
        }
        &mut self.bits
    }

    /// Adds keys; returns how many of them are new.
    fn extend(&mut self, keys: &[u64]) -> usize {
        let mut new = 0;
        for (held, keys) in self.bits().iter_mut().zip(keys) {
            new += (keys & !*held).count_ones() as usize;
            *held |= keys;
        }
        new
    }

    /// Adds a key; whether it is new.
    pub(super) fn insert(&mut self, id: u32) -> bool {
        let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
        let held = &mut self.bits()[word];
        let new = *held & bit == 0;
        *held |= bit;
        new
    }
}

/// A key this many times as long as is typical may be a long way from all others, and still wins most
/// inner products: every search scores such keys.
const OUTLIER: f32 = 2.5;
/// Entries at most through keys that are long.
const LONG_ENTRIES: usize = 256;

impl Core {
    /// A graph over the keys `distinct`, of which `keys` holds all and their twins. `samples` are the queries that
    /// the neighbours belong to; when they are not `known` to be of the kind to come, all directions count alike.
    pub(super) fn build(
        dim: usize,
        keys: &[f32],
        distinct: &[u32],
        samples: &[f32],
        known: bool,
        neighbours: &Neighbours,
        params: &GraphParams,
    ) -> Result<Self, IndexError> {
        let count = keys.len() / dim;
        let center = mean(dim, keys);
        let codes = Codes::new(center, count);
        codes.append(keys)?;
        let links = Links::new(params.degree, Links::bits_for(count), count);
        links.append(count)?;
        let mut core = Self {
            params: params.clone(),
            shape: if known { Shape::of(dim, samples) } else { Shape::even(dim) },
            guides: Guides::new(dim, samples, keys, neighbours),
            built: distinct.len(),
            entries: RwLock::new(Arc::new(entries(neighbours, params.entry_points))),
            links: RwLock::new(Arc::new(links)),
            checked: AtomicUsize::new(count),
            typical: 0.0,
            codes,
        };
        let links = core.links();
        let points = Points::all(dim, core.shape.project(keys, core.codes.center()));
        let squares = distinct.iter().map(|&id| f64::from(norm(points.get(id))).powi(2));
        core.typical = (squares.sum::<f64>() / distinct.len().max(1) as f64).sqrt() as f32;
        core.add_entries(&core.outliers(&points, distinct));
        let incidences = Incidences::new(count, neighbours);
        let chosen = choose(&links, &points, distinct, |i, out| incidences.candidates(neighbours, distinct[i], out));
        link_back(&links, &points, distinct, &chosen);
        drop((incidences, chosen));
        core.connect(&links, &points, distinct);
        core.reach_all(&links, distinct);
        Ok(core)
    }

    /// A graph from a file.
    pub(super) fn from_parts(
        params: GraphParams,
        codes: Codes,
        shape: Shape,
        guides: Guides,
        links: Links,
        entries: Vec<u32>,
        typical: f32,
    ) -> Self {
        let (checked, built) = (AtomicUsize::new(links.len()), links.len());
        let (links, entries) = (RwLock::new(Arc::new(links)), RwLock::new(Arc::new(entries)));
        Self { params, codes, shape, guides, built, links, entries, checked, typical }
    }

    /// Adds keys: rows of `dim` numbers, of which those with the ids `fresh` equal no earlier one; `distinct` are all
    /// of that kind. One thread at a time.
    pub(super) fn append(
        &self,
        keys: &[f32],
        fresh: &[u32],
        distinct: &[u32],
        decode: Decode<'_>,
    ) -> Result<(), IndexError> {
        let count = keys.len() / self.codes.center().len();
        let mut links = self.links();
        if !links.fits(links.len() + count) {
            links = Arc::new(links.widened(links.len() + count)?);
            *self.links.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&links);
        }
        self.codes.append(keys)?;
        links.append(count)?;
        // Looking for lost keys costs a walk over all links: it is done once per sixteenth of growth.
        let len = links.len();
        let checked = self.checked.load(Ordering::Relaxed);
        let sweep = len >= checked + checked / 16;
        self.connect_new(&links, decode, fresh, sweep);
        self.add_entries(&self.outliers(&self.project(decode, fresh), fresh));
        if sweep {
            self.reach_all(&links, distinct);
            self.checked.store(len, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The longest of the keys that are far longer than is typical.
    fn outliers(&self, points: &Points, ids: &[u32]) -> Vec<u32> {
        let lengths = ids.iter().map(|&id| (norm(points.get(id)), id));
        let mut long: Vec<(f32, u32)> = lengths.filter(|&(length, _)| length > OUTLIER * self.typical).collect();
        long.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        long.truncate(LONG_ENTRIES.saturating_sub(self.entries().len()).min(LONG_ENTRIES / 4));
        long.into_iter().map(|(_, id)| id).collect()
    }

    /// Lets every search score these keys first.
    pub(super) fn add_entries(&self, ids: &[u32]) {
        if ids.is_empty() {
            return;
        }
        let mut all = self.entries().to_vec();
        all.extend(ids.iter().filter(|id| !all.contains(id)).collect::<Vec<_>>());
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(all);
    }

    pub(super) fn links(&self) -> Arc<Links> {
        Arc::clone(&self.links.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn entries(&self) -> Arc<Vec<u32>> {
        Arc::clone(&self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// For each query, the `ef` best keys that `wanted` lets through, of those on the way to them, the best first by
    /// their codes.
    pub(super) fn walk(&self, queries: &[f32], ef: usize, wanted: Option<&dyn Fn(u32) -> bool>) -> Vec<Walked> {
        let probes: Vec<Probe> = queries.chunks_exact(self.codes.center().len()).map(|q| self.codes.probe(q)).collect();
        let links = self.links();
        let codes = self.codes.view();
        let field = Field { len: codes.len().min(links.len()), codes, links: links.view() };
        with_scratch(probes.len(), |scratch| {
            field.search(scratch, &probes, &self.entries(), ef, wanted);
            let (mut scored, mut followed) = (KeySet::new(field.len), KeySet::new(field.len));
            let alone = scratch.len() == 1;
            let walked = |scratch: &mut Scratch| {
                let ids = scratch.pool.iter().map(|&rank| id_of(rank) & !FOLLOWED);
                let Scratch { followed: all, seen, .. } = scratch;
                Walked {
                    ids: ids.filter(|&id| wanted.is_none_or(|wanted| wanted(id))).collect(),
                    scored: if alone { scratch.scored } else { scored.extend(seen) },
                    followed: if alone { all.len() } else { all.iter().filter(|&&id| followed.insert(id)).count() },
                }
            };
            scratch.iter_mut().map(walked).collect()
        })
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.codes.memory_bytes() + self.links().memory_bytes() + self.shape.memory_bytes() + self.guides.memory_bytes()
    }
}

fn norm(point: &[f32]) -> f32 {
    dot(point, point).sqrt()
}

pub(super) fn mean(dim: usize, keys: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0f64; dim];
    for row in keys.chunks_exact(dim) {
        for (sum, &x) in sums.iter_mut().zip(row) {
            *sum += f64::from(x);
        }
    }
    let count = (keys.len() / dim).max(1) as f64;
    sums.into_iter().map(|sum| (sum / count) as f32).collect()
}

/// The best keys of some of the sample queries.
fn entries(neighbours: &Neighbours, count: usize) -> Vec<u32> {
    let lists = neighbours.lists();
    let step = (lists.len() / (4 * count)).max(1);
    let mut ids: Vec<u32> = Vec::new();
    for list in lists.step_by(step) {
        if ids.len() < count && !ids.contains(&list[0]) {
            ids.push(list[0]);
        }
    }
    ids
}
