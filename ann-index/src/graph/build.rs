//! How a graph gets its links.
//!
//! RoarGraph (arXiv 2408.08933, section 4) projects the bipartite graph of sample queries and their nearest keys onto
//! the keys, prunes by occlusion, adds reverse links, and lets each key search the graph for more. Here:
//!
//! 1. a key's candidates are the other neighbours of the queries that have it among theirs (not only
//!    those of its best query), pruned by occlusion in the metric of `shape.rs`;
//! 2. every key searches with the query that would prefer it; what is found joins the candidates;
//! 3. links are made both ways, and a full list is pruned again;
//! 4. keys that no path leads to are linked from what their own search finds.

use std::collections::HashMap;

use super::beam::{FOLLOWED, Field, with_scratch};
use super::core::Core;
use super::links::Links;
use crate::metric::squared_distance;
use crate::neighbours::Neighbours;
use crate::order::id_of;
use crate::parallel::map_ranges;

/// Sample queries at most whose neighbours a key considers.
const QUERIES_OF_KEY: usize = 16;
/// Candidates at most that are pruned.
const CANDIDATES: usize = 160;
/// Keys that search the same state of the graph.
const BATCH: usize = 8192;
/// Keys of one piece of work.
const GRAIN: usize = 64;
/// Links of a key that are left free for keys to come and for those that no path leads to.
const SPARE: usize = 2;

/// Projected keys.
pub(super) struct Points {
    dim: usize,
    data: Vec<f32>,
    /// Where a key lies; `None` when each lies at its id.
    places: Option<HashMap<u32, u32>>,
}

impl Points {
    /// All keys, from 0 on.
    pub(super) fn all(dim: usize, data: Vec<f32>) -> Self {
        Self { dim, data, places: None }
    }

    /// The keys `ids`.
    pub(super) fn some(dim: usize, data: Vec<f32>, ids: &[u32]) -> Self {
        Self { dim, data, places: Some(ids.iter().copied().zip(0..).collect()) }
    }

    #[inline]
    pub(super) fn get(&self, id: u32) -> &[f32] {
        let place = self.places.as_ref().map_or(id as usize, |places| places[&id] as usize);
        &self.data[place * self.dim..(place + 1) * self.dim]
    }
}

/// For each key, the sample queries that have it among their neighbours.
pub(super) struct Incidences {
    starts: Vec<u32>,
    queries: Vec<u32>,
}

impl Incidences {
    pub(super) fn new(keys: usize, neighbours: &Neighbours) -> Self {
        let mut starts = vec![0u32; keys + 2];
        for &id in &neighbours.ids {
            starts[id as usize + 2] += 1;
        }
        for i in 2..starts.len() {
            starts[i] += starts[i - 1];
        }
        let mut queries = vec![0; neighbours.ids.len()];
        for (query, list) in neighbours.lists().enumerate() {
            for &id in list {
                let place = &mut starts[id as usize + 1];
                queries[*place as usize] = query as u32;
                *place += 1;
            }
        }
        Self { starts, queries }
    }

    /// Adds the neighbours of some of the key's queries.
    pub(super) fn candidates(&self, neighbours: &Neighbours, id: u32, out: &mut Vec<u32>) {
        let mine = &self.queries[self.starts[id as usize] as usize..self.starts[id as usize + 1] as usize];
        let step = mine.len().div_ceil(QUERIES_OF_KEY).max(1);
        for &query in mine.iter().step_by(step) {
            let start = query as usize * neighbours.k;
            out.extend_from_slice(&neighbours.ids[start..start + neighbours.k]);
        }
    }
}

/// Of the candidates for the links of `id`, at most `limit`: from near to far, each that is not nearer
/// to one taken before than to `id`; then the nearest of the others.
fn prune(points: &Points, id: u32, candidates: &mut Vec<u32>, limit: usize) -> Vec<u32> {
    let at = points.get(id);
    candidates.sort_unstable();
    candidates.dedup();
    let others = candidates.iter().filter(|&&other| other != id);
    let mut ranked: Vec<(f32, u32)> = others.map(|&other| (squared_distance(at, points.get(other)), other)).collect();
    let order = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    if ranked.len() > CANDIDATES {
        ranked.select_nth_unstable_by(CANDIDATES, order);
        ranked.truncate(CANDIDATES);
    }
    ranked.sort_unstable_by(order);
    let mut taken: Vec<u32> = Vec::with_capacity(limit);
    let mut left: Vec<u32> = Vec::new();
    for &(distance, other) in &ranked {
        if taken.len() == limit {
            break;
        }
        let point = points.get(other);
        if taken.iter().any(|&near| squared_distance(points.get(near), point) < distance) {
            left.push(other);
        } else {
            taken.push(other);
        }
    }
    let room = limit - taken.len();
    taken.extend(left.into_iter().take(room));
    taken
}

/// Gives the keys `ids` links among the candidates and those they have, and the linked keys links back.
pub(super) fn attach(links: &Links, points: &Points, ids: &[u32], candidates: impl Fn(u32, &mut Vec<u32>) + Sync) {
    let limit = links.degree() - SPARE;
    let view = links.view();
    let chosen = map_ranges(ids.len(), GRAIN, |range| {
        let (mut found, mut old) = (Vec::new(), Vec::new());
        ids[range]
            .iter()
            .map(|&id| {
                found.clear();
                view.read(id, &mut old);
                found.extend_from_slice(&old);
                candidates(id, &mut found);
                prune(points, id, &mut found, limit)
            })
            .collect::<Vec<_>>()
    });
    let mut back: Vec<u64> = Vec::with_capacity(ids.len() * limit);
    for (&id, chosen) in ids.iter().zip(chosen.iter().flatten()) {
        links.set(id, chosen);
        back.extend(chosen.iter().map(|&other| u64::from(other) << 32 | u64::from(id)));
    }
    back.sort_unstable();
    let groups: Vec<&[u64]> = back.chunk_by(|a, b| a >> 32 == b >> 32).collect();
    map_ranges(groups.len(), GRAIN, |range| {
        let mut list = Vec::new();
        for group in &groups[range] {
            let id = (group[0] >> 32) as u32;
            view.read(id, &mut list);
            let before = list.len();
            list.extend(
                group
                    .iter()
                    .map(|&pair| pair as u32)
                    .filter(|source| !list[..before].contains(source))
                    .collect::<Vec<_>>(),
            );
            if list.len() > limit {
                list = prune(points, id, &mut list, limit);
            }
            links.set(id, &list);
        }
    });
}

impl Core {
    /// Links for the keys `ids` from what the graph finds for them.
    pub(super) fn connect(&self, links: &Links, points: &Points, ids: &[u32]) {
        let mut done = 0;
        while done < ids.len() {
            let batch = &ids[done..ids.len().min(done + BATCH)];
            attach(links, points, batch, |id, out| self.rivals(links, points.get(id), out));
            done += batch.len();
        }
    }

    /// Adds the keys that a search with the query made for this projected key finds.
    fn rivals(&self, links: &Links, point: &[f32], out: &mut Vec<u32>) {
        let query = self.shape.query_for(point);
        let probe = self.codes.probe(&query);
        let codes = self.codes.view();
        let field = Field { len: codes.len().min(links.len()), codes, links: links.view() };
        with_scratch(|scratch| {
            field.search(scratch, &probe, &self.entries(), self.params.build_ef, None);
            out.extend(scratch.pool.iter().map(|&rank| id_of(rank) & !FOLLOWED));
        });
    }
}
