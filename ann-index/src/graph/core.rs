//! One graph and what belongs to it.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::build::{Decode, Incidences, Points, choose, link_back};
use super::guides::Guides;
use super::links::Links;
use super::shape::Shape;
use crate::codes::Codes;
use crate::error::IndexError;
use crate::metric::dot;
use crate::neighbours::Neighbours;
use crate::params::GraphParams;

/// Links over distinct keys, and where searches start.
pub(super) struct Core {
    pub(super) params: GraphParams,
    /// Of the keys: the same for all graphs over them.
    pub(super) codes: Arc<Codes>,
    pub(super) shape: Shape,
    pub(super) guides: Guides,
    links: RwLock<Arc<Links>>,
    entries: RwLock<Arc<Vec<u32>>>,
    /// The length at which every key was last known to be reached.
    checked: AtomicUsize,
    /// The root mean square of the projected keys' lengths at the build.
    pub(super) typical: f32,
}

/// A key this many times as long as is typical may be a long way from all others, and still wins most
/// inner products: every search scores such keys.
const OUTLIER: f32 = 2.5;
/// Entries at most through keys that are long.
const LONG_ENTRIES: usize = 256;

impl Core {
    /// A graph over the keys `distinct`, of which `keys` holds all and their twins, and `codes` all in codes. `samples`
    /// are the queries that the neighbours belong to; when they are not `known` to be of the kind to come, all
    /// directions count alike.
    pub(super) fn build(
        codes: &Arc<Codes>,
        keys: &[f32],
        distinct: &[u32],
        samples: &[f32],
        known: bool,
        neighbours: &Neighbours,
        params: &GraphParams,
    ) -> Result<Self, IndexError> {
        let dim = codes.center().len();
        let count = keys.len() / dim;
        let links = Links::new(params.degree, Links::bits_for(count), count);
        links.append(count)?;
        let mut core = Self {
            params: params.clone(),
            shape: if known { Shape::of(dim, samples) } else { Shape::even(dim) },
            guides: Guides::new(dim, samples, keys, neighbours),
            entries: RwLock::new(Arc::new(entries(neighbours, params.entry_points))),
            links: RwLock::new(Arc::new(links)),
            checked: AtomicUsize::new(count),
            typical: 0.0,
            codes: Arc::clone(codes),
        };
        let links = core.links();
        let points = Points::all(dim, core.shape.project(keys, core.codes.center()));
        // Keys may be so long that their squares overflow f32.
        let square = |&id: &u32| points.get(id).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let mean = distinct.iter().map(square).sum::<f64>() / distinct.len().max(1) as f64;
        core.typical = mean.sqrt().min(f64::from(f32::MAX)) as f32;
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
        codes: Arc<Codes>,
        shape: Shape,
        guides: Guides,
        links: Links,
        entries: Vec<u32>,
        typical: f32,
    ) -> Self {
        let checked = AtomicUsize::new(links.len());
        let (links, entries) = (RwLock::new(Arc::new(links)), RwLock::new(Arc::new(entries)));
        Self { params, codes, shape, guides, links, entries, checked, typical }
    }

    /// Adds the `count` keys that the codes have got more; those with the ids `fresh` equal no earlier one, `distinct`
    /// are all of that kind. One thread at a time.
    pub(super) fn append(
        &self,
        count: usize,
        fresh: &[u32],
        distinct: &[u32],
        decode: Decode<'_>,
    ) -> Result<(), IndexError> {
        let mut links = self.links();
        if !links.fits(links.len() + count) {
            links = Arc::new(links.widened(links.len() + count)?);
            *self.links.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&links);
        }
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

    /// Bytes of what no other graph over the keys shares.
    pub(super) fn memory_bytes(&self) -> usize {
        self.links().memory_bytes() + self.shape.memory_bytes() + self.guides.memory_bytes()
    }
}

fn norm(point: &[f32]) -> f32 {
    dot(point, point).sqrt()
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
