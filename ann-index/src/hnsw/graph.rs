//! One graph over distinct keys, built by `hnsw_rs`.
//!
//! The graph holds numbers of keys; their contents are read from the shared rows, so keys exist
//! once. What was found in the source of `hnsw_rs` 0.3.5 and is heeded here:
//!
//! * points inserted side by side into an empty graph stay without links: the first ones are
//!   inserted one after the other;
//! * the list of links that point back to a key is cut at the farthest, without the heuristic that
//!   keeps a graph connected, so a key far from all others may have no link leading to it. Each
//!   key is looked up after its insertion, and those that are not found ("stragglers") are scored
//!   in every search;
//! * a key much longer than the others wins most inner products, and yet has next to no links that
//!   lead to it, for it is far from all: the longest keys are scored in every search;
//! * a filtered walk can unwrap an empty heap when it holds a single candidate: it gets two or more;
//! * a hidden entry point may take the place of a candidate and is dropped at the end: all scored
//!   keys are ranked here instead of the returned ones;
//! * it logs at level `info` through the `log` crate; only a program's logger can silence that.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use hnsw_rs::hnsw::{FilterT, Hnsw};

use super::lift::{Lift, LiftedDistance, point, probe};
use super::visits;
use crate::element::Element;
use crate::error::IndexError;
use crate::metric::dot;
use crate::params::IndexParams;
use crate::rows::Rows;

/// Points that are inserted one after the other at the start of a graph.
const SERIAL_START: usize = 256;
/// Points worth a thread.
const PARALLEL_FROM: usize = 1000;
/// How many of the longest keys every search scores.
const LONGEST: usize = 128;
/// Layers at most; a point reaches layer n with probability m to the power -n.
const LAYERS: usize = 16;

/// See the module.
pub(super) struct Graph<T: Element> {
    hnsw: Hnsw<'static, f32, LiftedDistance<T>>,
    rows: Arc<Rows<T>>,
    lift: Lift,
    /// Bits of the longest distance of a key from the centre, rounded up.
    reach: AtomicU32,
    points: AtomicUsize,
    stragglers: RwLock<Vec<u32>>,
    /// The keys farthest from the centre with their distances, the farthest first.
    longest: RwLock<Vec<(f64, u32)>>,
}

/// The keys that a search scored.
pub(super) struct Walk {
    /// Distinct keys with their exact scores.
    pub(super) scored: Vec<(u32, f32)>,
    /// How many of them were met by following links.
    pub(super) nodes: usize,
}

impl<T: Element> Graph<T> {
    /// A graph over the given keys. `wanted` as in [`insert`](Self::insert).
    pub(super) fn build(
        rows: Arc<Rows<T>>,
        ids: &[u32],
        params: &IndexParams,
        wanted: &(dyn Fn() -> bool + Sync),
    ) -> Result<Self, IndexError> {
        let distance = LiftedDistance(Arc::clone(&rows));
        let (m, ef) = (params.hnsw_m, params.hnsw_ef_construction);
        let graph = Self {
            hnsw: Hnsw::new(m, ids.len(), LAYERS, ef, distance),
            lift: Lift::of(&rows, ids),
            rows,
            reach: AtomicU32::new(0),
            points: AtomicUsize::new(0),
            stragglers: RwLock::default(),
            longest: RwLock::default(),
        };
        graph.insert(ids, wanted)?;
        Ok(graph)
    }

    /// Whether these keys are close enough to the centre to be lifted.
    pub(super) fn fits(&self, ids: &[u32]) -> bool {
        let mut norms = ids.iter().map(|&id| self.norm(id));
        norms.all(|norm| self.lift.covers(norm))
    }

    /// Adds keys, each of them once. One thread at a time calls this; searches may run meanwhile.
    ///
    /// # Errors
    /// [`IndexError::Cancelled`] once `wanted`, which is asked before each key, says no: the graph is then of no use.
    pub(super) fn insert(&self, ids: &[u32], wanted: &(dyn Fn() -> bool + Sync)) -> Result<(), IndexError> {
        let longest = ids.iter().map(|&id| self.norm(id)).fold(0.0, f64::max);
        // The bits of floats that are not negative are ordered as the floats are.
        let reach = (longest as f32).next_up().to_bits();
        self.reach.fetch_max(reach, Ordering::Release);

        let mut longest = self.longest.write().unwrap_or_else(PoisonError::into_inner);
        longest.extend(ids.iter().map(|&id| (self.norm(id), id)));
        longest.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
        longest.truncate(LONGEST);
        drop(longest);

        let present = self.points.fetch_add(ids.len(), Ordering::Relaxed);
        let serial = SERIAL_START.saturating_sub(present).min(ids.len());
        let insert = |&id: &u32| {
            let height = self.lift.height(self.norm(id));
            self.hnsw.insert_slice((&point(id, height), id as usize));
        };
        let look_up = |&id: &u32| {
            if !self.finds(id) {
                let list = self.stragglers.write();
                list.unwrap_or_else(PoisonError::into_inner).push(id);
            }
        };
        let all = ids[..serial].iter().all(|id| {
            wanted() && {
                insert(id);
                true
            }
        }) && for_each_parallel(&ids[serial..], wanted, &insert)
            && for_each_parallel(ids, wanted, &look_up);
        if all { Ok(()) } else { Err(IndexError::Cancelled) }
    }

    /// Scores the keys met on the way to the `ef` best that `wanted` lets through, and the
    /// stragglers and the longest keys.
    pub(super) fn walk(&self, query: &[f32], ef: usize, wanted: Option<&dyn Fn(u32) -> bool>) -> Walk {
        let norm = f64::from(dot(query, query)).sqrt();
        let reach = f64::from(f32::from_bits(self.reach.load(Ordering::Acquire)));
        // |q.c| + |q||x - c| bounds q.x; the last term covers rounding in both.
        let center = f64::from(dot(query, &self.lift.center));
        let size = norm * reach + center.abs();
        let probe = probe(query, (center + norm * reach + 1e-6 * size) as f32);
        let ef = ef.max(2);
        visits::begin();
        let filter = wanted.map(|wanted| move |id: &usize| wanted(*id as u32));
        let filter = filter.as_ref().map(|filter| filter as &dyn FilterT);
        self.hnsw.search_filter(&probe, ef, ef, filter);
        let nodes = visits::count();
        let stragglers = self.stragglers.read();
        for &id in stragglers.unwrap_or_else(PoisonError::into_inner).iter() {
            visits::note(id, dot(query, self.rows.row(id as usize)));
        }
        let longest = self.longest.read();
        for &(_, id) in longest.unwrap_or_else(PoisonError::into_inner).iter() {
            visits::note(id, dot(query, self.rows.row(id as usize)));
        }
        Walk { scored: visits::take(), nodes }
    }

    /// An estimate: `hnsw_rs` keeps every link in an allocation of its own, and every point with
    /// sixteen lists of links.
    pub(super) fn memory_bytes(&self) -> usize {
        const LINK: usize = 48 + 8;
        const POINT: usize = 640;
        let links = 2 * self.hnsw.get_max_nb_connection() as usize;
        self.points.load(Ordering::Relaxed) * (POINT + links * LINK)
    }

    fn norm(&self, id: u32) -> f64 {
        self.lift.norm(self.rows.row(id as usize))
    }

    /// Whether a walk to the key itself ends at it.
    fn finds(&self, id: u32) -> bool {
        let height = self.lift.height(self.norm(id));
        let ef = 2 * self.hnsw.get_max_nb_connection() as usize;
        let found = self.hnsw.search(&point(id, height), ef, ef);
        found.iter().any(|near| near.d_id == id as usize)
    }
}

/// Calls `work` on every item, as long as `wanted` says yes, on as many threads as the caller's rayon pool has, or on this one
/// when it belongs to that pool. Rayon itself is not used: waiting for it, this thread could be
/// handed a task that wants a lock which it already holds. Whether all were done.
fn for_each_parallel(items: &[u32], wanted: &(dyn Fn() -> bool + Sync), work: &(impl Fn(&u32) + Sync)) -> bool {
    let threads = match rayon::current_thread_index() {
        Some(_) => 1,
        None => rayon::current_num_threads().min(items.len() / PARALLEL_FROM),
    };
    let next = AtomicUsize::new(0);
    let given_up = AtomicBool::new(false);
    let serve = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !wanted() {
                return given_up.store(true, Ordering::Relaxed);
            }
            work(item);
        }
    };
    if threads < 2 {
        serve();
        return !given_up.into_inner();
    }
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(serve);
        }
        serve();
    });
    !given_up.into_inner()
}
