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

use std::collections::{HashMap, VecDeque};

use super::beam::{FOLLOWED, Field, Start, search, with_scratch};
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

/// Lost keys that hang on to one reached key, through each other.
const TREE: usize = 64;

/// What is known of a key that comes later.
struct Found {
    rivals: Vec<u32>,
    /// Whether it is among the best keys of a kept query.
    ranked: bool,
}

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

    /// Those of the keys from 0 on, without a table of their places.
    fn in_order(self) -> Self {
        Self { places: None, ..self }
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
    // Places are looked up once: later on, pairs of candidates are compared.
    let mut ranked: Vec<(f32, u32, &[f32])> = others
        .map(|&other| {
            let point = points.get(other);
            (squared_distance(at, point), other, point)
        })
        .collect();
    let order = |a: &(f32, u32, &[f32]), b: &(f32, u32, &[f32])| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
    if ranked.len() > CANDIDATES {
        ranked.select_nth_unstable_by(CANDIDATES, order);
        ranked.truncate(CANDIDATES);
    }
    ranked.sort_unstable_by(order);
    let mut taken: Vec<(u32, &[f32])> = Vec::with_capacity(limit);
    let mut left: Vec<u32> = Vec::new();
    for &(distance, other, point) in &ranked {
        if taken.len() == limit {
            break;
        }
        if taken.iter().any(|&(_, near)| squared_distance(near, point) < distance) {
            left.push(other);
        } else {
            taken.push((other, point));
        }
    }
    let room = limit - taken.len();
    taken.iter().map(|&(other, _)| other).chain(left.into_iter().take(room)).collect()
}

/// Gives the keys `ids` links among the candidates and those they have. Returns what each of them got.
pub(super) fn choose(
    links: &Links,
    points: &Points,
    ids: &[u32],
    candidates: impl Fn(usize, &mut Vec<u32>) + Sync,
) -> Vec<Vec<u32>> {
    let limit = links.degree() - SPARE;
    let view = links.view();
    let chosen = map_ranges(ids.len(), GRAIN, |range| {
        let mut found = Vec::new();
        let one = |i: usize| {
            view.read(ids[i], &mut found);
            candidates(i, &mut found);
            prune(points, ids[i], &mut found, limit)
        };
        range.map(one).collect::<Vec<_>>()
    });
    let chosen: Vec<Vec<u32>> = chosen.into_iter().flatten().collect();
    for (&id, chosen) in ids.iter().zip(&chosen) {
        links.set(id, chosen);
    }
    chosen
}

/// Gives the chosen keys links back to `ids`, and makes sure that each of `ids` keeps one that leads to it.
pub(super) fn link_back(links: &Links, points: &Points, ids: &[u32], chosen: &[Vec<u32>]) {
    let limit = links.degree() - SPARE;
    let view = links.view();
    let pairs = ids.iter().zip(chosen);
    let mut back: Vec<u64> =
        pairs.flat_map(|(&id, chosen)| chosen.iter().map(move |&to| u64::from(to) << 32 | u64::from(id))).collect();
    back.sort_unstable();
    let groups: Vec<&[u64]> = back.chunk_by(|a, b| a >> 32 == b >> 32).collect();
    map_ranges(groups.len(), GRAIN, |range| {
        let mut list = Vec::new();
        for group in &groups[range] {
            let id = (group[0] >> 32) as u32;
            view.read(id, &mut list);
            list.extend(group.iter().map(|&pair| pair as u32));
            list.sort_unstable();
            list.dedup();
            if list.len() > limit {
                list = prune(points, id, &mut list, limit);
            }
            links.set(id, &list);
        }
    });
    let mut list = Vec::new();
    for (&id, chosen) in ids.iter().zip(chosen) {
        let kept = |&to: &u32| {
            let mut kept = false;
            view.for_each(to, |link| kept |= link == id);
            kept
        };
        if !chosen.iter().any(kept) {
            lead_to(links, id, chosen, &mut list);
        }
    }
}

/// Lets one of the keys `from` link to `id`: the first with room, or the first one at the cost of its last link.
fn lead_to(links: &Links, id: u32, from: &[u32], list: &mut Vec<u32>) {
    let view = links.view();
    let mut read = |from: u32| {
        view.read(from, list);
        list.clone()
    };
    let roomy = from.iter().find(|&&from| read(from).len() < links.degree());
    let Some(&from) = roomy.or(from.first()) else { return };
    let mut list = read(from);
    list.truncate(links.degree() - 1);
    list.push(id);
    links.set(from, &list);
}

/// Widens key `id` into a row of `dim` numbers.
pub(super) type Decode<'a> = &'a (dyn Fn(u32, &mut [f32]) + Sync);

impl Core {
    /// Links for the keys `ids` from what the graph finds for them.
    pub(super) fn connect(&self, links: &Links, points: &Points, ids: &[u32]) {
        for batch in ids.chunks(BATCH) {
            let chosen = choose(links, points, batch, |i, out| self.rivals(links, points.get(batch[i]), out));
            link_back(links, points, batch, &chosen);
        }
    }

    /// As [`Core::connect`], for keys that come later. Links back go only to keys that some kept query ranks high: the
    /// many others would take the places of those that queries look for. Unless `swept`, that is, unless a look for lost
    /// keys follows, the others hang on to one key each.
    pub(super) fn connect_new(&self, links: &Links, decode: Decode<'_>, ids: &[u32], swept: bool) {
        // Many keys meet most of the others; few meet few.
        let many = ids.first().is_some_and(|&first| ids.len() >= first as usize / 16);
        let all = many.then(|| self.project(decode, &(0..links.len() as u32).collect::<Vec<_>>()).in_order());
        let mut done = 0;
        while done < ids.len() {
            let size = (ids[done] as usize / 16).clamp(1, BATCH / 4);
            let batch = &ids[done..ids.len().min(done + size)];
            done += batch.len();
            let found = self.find_for_new(links, decode, batch);
            let near = |of: Vec<u32>| if all.is_some() { None } else { Some(self.project(decode, &of)) };
            let met = near(union(batch.iter().chain(found.iter().flat_map(|f| &f.rivals))));
            let Some(points) = all.as_ref().or(met.as_ref()) else { return };
            let chosen = choose(links, points, batch, |i, out| out.extend_from_slice(&found[i].rivals));
            let (mut ranked, mut theirs) = (Vec::new(), Vec::new());
            for ((&id, chosen), found) in batch.iter().zip(chosen).zip(&found) {
                if found.ranked {
                    ranked.push(id);
                    theirs.push(chosen);
                } else if !swept {
                    lead_to(links, id, &chosen, &mut Vec::new());
                }
            }
            let mut behind = union(ranked.iter().chain(theirs.iter().flatten()));
            for target in behind.clone() {
                links.view().for_each(target, |link| behind.push(link));
            }
            let met = near(union(behind.iter()));
            let Some(points) = all.as_ref().or(met.as_ref()) else { return };
            link_back(links, points, &ranked, &theirs);
        }
    }

    /// What searches with the query made for each key and with the kept queries that rank it highest find.
    fn find_for_new(&self, links: &Links, decode: Decode<'_>, ids: &[u32]) -> Vec<Found> {
        let (mine, dim) = (self.project(decode, ids), self.codes.center().len());
        let found = map_ranges(ids.len(), GRAIN / 8, |range| {
            let mut rows = vec![0.0; range.len() * dim];
            for (row, i) in rows.chunks_exact_mut(dim).zip(range.clone()) {
                decode(ids[i], row);
            }
            let guides = self.guides.best_for(&rows);
            let one = |(i, guides): (usize, &Vec<(f32, u32)>)| {
                let mut rivals = Vec::new();
                self.rivals(links, mine.get(ids[i]), &mut rivals);
                for &(_, guide) in guides {
                    self.find(links, &self.guides.query(guide), &mut rivals);
                }
                // Without kept queries nothing is known against a key.
                Found { rivals, ranked: guides.first().is_none_or(|&(over, _)| over > 0.0) }
            };
            range.zip(&guides).map(one).collect::<Vec<_>>()
        });
        found.into_iter().flatten().collect()
    }

    pub(super) fn project(&self, decode: Decode<'_>, ids: &[u32]) -> Points {
        let dim = self.codes.center().len();
        let rows = map_ranges(ids.len(), 1024, |range| {
            let mut rows = vec![0.0; range.len() * dim];
            for (row, &id) in rows.chunks_exact_mut(dim).zip(&ids[range]) {
                decode(id, row);
            }
            rows
        });
        Points::some(dim, self.shape.project(&rows.concat(), self.codes.center()), ids)
    }

    /// Adds the keys that a search with the query made for this projected key finds.
    fn rivals(&self, links: &Links, point: &[f32], out: &mut Vec<u32>) {
        self.find(links, &self.shape.query_for(point), out);
    }

    /// Adds the best keys for a query.
    fn find(&self, links: &Links, query: &[f32], out: &mut Vec<u32>) {
        let probe = self.codes.probe(query);
        let (field, entries) = (Field::new(self.codes.view(), links), self.entries());
        with_scratch(1, |scratch| {
            let start = Start { field: &field, probe: &probe, entries: &entries };
            search(scratch, &[start], self.params.build_ef, None);
            out.extend(scratch[0].pool.iter().map(|&rank| id_of(rank) & !FOLLOWED));
        });
    }

    /// Leads a path to each of the `distinct` keys; should there be no room for that, keys become entries of every search.
    ///
    /// Keys that compete for no query get few links back: those of strong keys go to their rivals. They hang on to
    /// each other, in the two places that each list has left, and the first of them on to a reached key: hung on to
    /// keys that searches follow, they would be a sixth of all that searches read.
    pub(super) fn reach_all(&self, links: &Links, distinct: &[u32]) {
        let view = links.view();
        let mut reached = self.reached(links);
        let mut lost: Vec<u32> = distinct.iter().copied().filter(|&id| !reached[id as usize]).collect();
        let roots: Vec<u32> = distinct.iter().copied().filter(|&id| reached[id as usize]).collect();
        let (mut roots, mut places, mut list) = (roots.into_iter(), VecDeque::new(), Vec::new());
        let mut hung = 0;
        lost.retain(|&id| {
            while !reached[id as usize] {
                // No tree is large: a list that is pruned later may drop the one link that leads to it.
                if hung == TREE && roots.len() > 0 {
                    places.clear();
                }
                if places.is_empty() {
                    let Some(root) = roots.next() else { return true };
                    places.push_back(root);
                    hung = 0;
                }
                let from = places[0];
                view.read(from, &mut list);
                if list.len() < links.degree() {
                    list.push(id);
                    links.set(from, &list);
                    self.spread(links, id, &mut reached);
                    places.push_back(id);
                    hung += 1;
                } else {
                    places.pop_front();
                }
            }
            false
        });
        self.add_entries(&lost);
    }

    /// Whether a path from the entries leads to a key, for each of them.
    fn reached(&self, links: &Links) -> Vec<bool> {
        let mut reached = vec![false; links.len()];
        for &id in self.entries().iter() {
            if !reached[id as usize] {
                self.spread(links, id, &mut reached);
            }
        }
        reached
    }

    /// Marks what paths from a key lead to.
    fn spread(&self, links: &Links, from: u32, reached: &mut [bool]) {
        let view = links.view();
        let mut open = vec![from];
        reached[from as usize] = true;
        while let Some(id) = open.pop() {
            view.for_each(id, |link| {
                if let Some(seen) = reached.get_mut(link as usize).filter(|seen| !**seen) {
                    *seen = true;
                    open.push(link);
                }
            });
        }
    }
}

/// Each id once, in order.
fn union<'a>(ids: impl Iterator<Item = &'a u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = ids.copied().collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}
