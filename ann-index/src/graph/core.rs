//! A graph and what belongs to it.

use std::sync::{Arc, PoisonError, RwLock};

use super::beam::{FOLLOWED, Field, Walked, with_scratch};
use super::build::{Incidences, Points, attach};
use super::links::Links;
use super::shape::Shape;
use crate::codes::Codes;
use crate::error::IndexError;
use crate::neighbours::Neighbours;
use crate::order::id_of;
use crate::params::GraphParams;

/// Links over distinct keys, their codes, and where searches start.
pub(super) struct Core {
    pub(super) params: GraphParams,
    pub(super) codes: Codes,
    pub(super) shape: Shape,
    links: RwLock<Arc<Links>>,
    entries: RwLock<Arc<Vec<u32>>>,
}

impl Core {
    /// A graph over the keys `distinct`, of which `keys` holds all and their twins. `samples` are the queries
    /// that the neighbours belong to.
    pub(super) fn build(
        dim: usize,
        keys: &[f32],
        distinct: &[u32],
        samples: &[f32],
        neighbours: &Neighbours,
        params: &GraphParams,
    ) -> Result<Self, IndexError> {
        let count = keys.len() / dim;
        let center = mean(dim, keys);
        let codes = Codes::new(center, count);
        codes.append(keys)?;
        let links = Links::new(params.degree, Links::bits_for(count), count);
        links.append(count)?;
        let core = Self {
            params: params.clone(),
            shape: Shape::of(dim, samples),
            entries: RwLock::new(Arc::new(entries(neighbours, params.entry_points))),
            links: RwLock::new(Arc::new(links)),
            codes,
        };
        let links = core.links();
        let t = std::time::Instant::now();
        let points = Points::all(dim, core.shape.project(keys, core.codes.center()));
        eprintln!("project {:?}", t.elapsed());
        let incidences = Incidences::new(count, neighbours);
        attach(&links, &points, distinct, |id, out| incidences.candidates(neighbours, id, out));
        eprintln!("lists {:?}", t.elapsed());
        drop(incidences);
        core.connect(&links, &points, distinct);
        eprintln!("connect {:?}", t.elapsed());
        Ok(core)
    }

    pub(super) fn links(&self) -> Arc<Links> {
        Arc::clone(&self.links.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn entries(&self) -> Arc<Vec<u32>> {
        Arc::clone(&self.entries.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The `ef` best keys that `wanted` lets through, of those on the way to them, the best first by their codes.
    pub(super) fn walk(&self, query: &[f32], ef: usize, wanted: Option<&dyn Fn(u32) -> bool>) -> (Vec<u32>, Walked) {
        let probe = self.codes.probe(query);
        let links = self.links();
        let codes = self.codes.view();
        let field = Field { len: codes.len().min(links.len()), codes, links: links.view() };
        with_scratch(|scratch| {
            let walked = field.search(scratch, &probe, &self.entries(), ef, wanted);
            let ids = scratch.pool.iter().map(|&rank| id_of(rank) & !FOLLOWED);
            (ids.filter(|&id| wanted.is_none_or(|wanted| wanted(id))).collect(), walked)
        })
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.codes.memory_bytes() + self.links().memory_bytes() + self.shape.memory_bytes()
    }
}

fn mean(dim: usize, keys: &[f32]) -> Vec<f32> {
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
