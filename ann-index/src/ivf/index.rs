//! Maximum inner products by the inverted lists of faiss (IVF-Flat; Douze et al., "The Faiss library", arXiv 2401.08281).
//!
//! faiss trains the centroids, looks for the lists nearest to a query and scans them; what it finds is ranked here by the
//! stored rows. Its lists hold the keys as they are stored, widened to f32: it has no kernels for our formats, so a
//! key costs four bytes a number on top of its row. Around the lists, this module:
//!
//! * scans while the keys are few, and always scans the tail: keys that came after the lists were made. When the
//!   tail has outgrown its share, the lists are made anew beside the old ones, so that no search waits;
//! * keeps the centroids until there are twice as many keys as they were trained on;
//! * puts only the first of equal keys into the lists, so that equal ones come in the order of their ids;
//! * reads more lists where those asked for hold fewer than `k` keys that are not hidden.
//!
//! A search runs on the calling thread. Training keeps to the threads of the caller's rayon pool, but for the matrix
//! products inside it, whose threads OpenBLAS counts for the whole process.

mod file;
mod lists;

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use crate::bitmap::Bitmap;
use crate::check::{check_query, check_rows};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{KeyIndex, SearchResult, SearchStats};
use crate::metric::dot;
use crate::params::{IndexKind, IvfParams, SearchParams};
use crate::rows::Rows;
use crate::scan::{read_key, scan};
use crate::storage::{Parts, Wrong};
use crate::top_k::TopK;
use lists::Lists;

/// Whether this program has the kind.
pub(crate) const BUILT_IN: bool = true;

/// Fewer distinct keys than this are scanned: that takes microseconds.
const LISTS_FROM: usize = 512;
/// Keys of a tail at least, before lists are made anew.
const TAIL: usize = 512;
/// A tail may be this part of the keys in the lists.
const TAIL_SHARE: usize = 16;

/// An index over `keys`, rows of `dim` numbers; everything was checked.
pub(crate) fn build<T: Element>(dim: usize, keys: &[f32], params: &IvfParams) -> Result<Box<dyn KeyIndex>, IndexError> {
    let index = IvfIndex::<T>::new(Rows::new(dim, keys.len() / dim), params.clone(), None);
    index.rows.append(keys)?;
    index.make_lists()?;
    Ok(Box::new(index))
}

/// An index from a file.
pub(crate) fn read<T: Element>(
    parts: &Parts,
    damaged: &dyn Fn(Wrong) -> IndexError,
) -> Result<Box<dyn KeyIndex>, IndexError> {
    Ok(Box::new(IvfIndex::<T>::read(parts).map_err(damaged)?))
}

/// See the module.
struct IvfIndex<T: Element> {
    rows: Rows<T>,
    params: IvfParams,
    lists: RwLock<Option<Arc<Lists>>>,
    writer: Mutex<()>,
}

impl<T: Element> IvfIndex<T> {
    fn new(rows: Rows<T>, params: IvfParams, lists: Option<Lists>) -> Self {
        Self { rows, params, lists: RwLock::new(lists.map(Arc::new)), writer: Mutex::default() }
    }

    fn lists(&self) -> Option<Arc<Lists>> {
        self.lists.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Brings all keys that are there now into lists, if there are enough.
    fn make_lists(&self) -> Result<(), IndexError> {
        if let Some(lists) = Lists::make(&self.rows, &self.params, self.lists().as_deref(), LISTS_FROM)? {
            *self.lists.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(lists));
        }
        Ok(())
    }

    /// The best `k` of the lists and of the tail behind them, up to the key `len`. `k` keys are not hidden.
    fn search_lists(
        &self,
        lists: &Lists,
        len: usize,
        query: &[f32],
        (k, mut probes): (usize, usize),
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        let visible = |id: u32| !exclude.is_some_and(|set| set.contains(id));
        let rows = self.rows.view();
        let wanted = exclude.map(|set| lists.wanted(set));
        let twins = lists.twins();
        let tail = lists.covered()..len;
        let mut bytes = tail.len() * self.rows.row_bytes();
        let tail_hits: Vec<(u32, f32)> =
            tail.clone().filter(|&id| visible(id as u32)).map(|id| (id as u32, dot(query, rows.row(id)))).collect();
        loop {
            let found = lists.search(query, (k, k.saturating_sub(tail_hits.len())), probes, wanted.as_deref())?;
            bytes += found.bytes + found.ids.len() * self.rows.row_bytes();
            let mut top = TopK::new(k);
            let mut offer = |id: u32, score: f32| {
                if visible(id) && score >= top.threshold() {
                    top.offer(id, score);
                }
            };
            for &id in &found.ids {
                let score = dot(query, rows.row(id as usize));
                let same = twins.get(&id).into_iter().flatten();
                std::iter::once(&id).chain(same).for_each(|&id| offer(id, score));
            }
            tail_hits.iter().for_each(|&(id, score)| offer(id, score));
            let hits = top.into_hits();
            if hits.len() == k {
                let keys_touched = found.keys + tail.len();
                return Ok(SearchResult {
                    hits,
                    stats: SearchStats { keys_touched, bytes, nodes_visited: found.lists },
                });
            }
            if found.lists == lists.count() {
                // All keys are in some list; were it not so, the rows would still have them.
                return Ok(scan(&self.rows, len, query, k, exclude));
            }
            probes = 2 * found.lists;
        }
    }
}

impl<T: Element> KeyIndex for IvfIndex<T> {
    fn dim(&self) -> usize {
        self.rows.dim()
    }

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn append(&self, keys: &[f32]) -> Result<(), IndexError> {
        check_rows("keys", self.dim(), keys)?;
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.rows.append(keys)?;
        let covered = self.lists().map_or(0, |lists| lists.covered());
        if self.len() - covered >= TAIL.max(covered / TAIL_SHARE) {
            // The keys are there already. If faiss fails, as it does without memory, they stay in the tail, where
            // searches find them, until a later append tries again.
            let _ = self.make_lists();
        }
        Ok(())
    }

    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        check_query(self.dim(), query)?;
        // The lists are taken first, so that they never hold a key beyond the length.
        let lists = self.lists();
        let len = self.len();
        let k = params.k.min(len - exclude.map_or(0, |set| set.count_below(len)));
        if k == 0 {
            return Ok(SearchResult::default());
        }
        let Some(lists) = lists else {
            return Ok(scan(&self.rows, len, query, k, exclude));
        };
        let probes = match params.probes {
            0 => (lists.count() / 50).max((2 * k * lists.count()).div_ceil(lists.covered())),
            probes => probes,
        };
        self.search_lists(&lists, len, query, (k, probes), exclude)
    }

    fn key(&self, id: u32, out: &mut [f32]) -> Result<(), IndexError> {
        read_key(&self.rows, id, out)
    }

    fn memory_bytes(&self) -> usize {
        let lists = self.lists().map_or(0, |lists| lists.memory_bytes());
        size_of::<Self>() + self.rows.memory_bytes() + lists
    }

    fn kind(&self) -> IndexKind {
        IndexKind::Ivf
    }

    fn save(&self, path: &Path) -> Result<(), IndexError> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.write(path)
    }
}

impl<T: Element> fmt::Debug for IvfIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IvfIndex")
            .field("dim", &self.dim())
            .field("len", &self.len())
            .field("precision", &T::PRECISION)
            .field("params", &self.params)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use half::bf16;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const DIM: usize = 8;

    fn rows(rng: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
        (0..count * DIM).map(|_| rng.random::<f32>() - 0.5).collect()
    }

    fn index(keys: &[f32], lists: usize) -> IvfIndex<bf16> {
        let index = IvfIndex::new(Rows::new(DIM, keys.len() / DIM), IvfParams { lists }, None);
        index.rows.append(keys).unwrap();
        index.make_lists().unwrap();
        index
    }

    #[test]
    fn lists_follow_the_keys_and_are_trained_again_when_these_have_doubled() {
        let rng = &mut ChaCha8Rng::seed_from_u64(1);
        let index = index(&rows(rng, 2000), 0);
        let state = || index.lists().map(|lists| (lists.covered(), lists.trained())).unwrap();
        assert_eq!(state(), (2000, 2000));
        for (more, expected) in [(500, (2000, 2000)), (12, (2512, 2000)), (1487, (3999, 2000)), (600, (4599, 4599))] {
            index.append(&rows(rng, more)).unwrap();
            assert_eq!(state(), expected, "after {more} more");
        }
    }

    #[test]
    fn a_search_reads_the_lists_that_it_is_asked_for_and_the_tail() {
        let rng = &mut ChaCha8Rng::seed_from_u64(2);
        let index = index(&rows(rng, 4000), 20);
        index.append(&rows(rng, 100)).unwrap();
        let lists = index.lists().unwrap();
        assert_eq!(lists.count(), 20);
        let query = &rows(rng, 1);
        let search = |k, probes| {
            index.search(query, &SearchParams { k, ef: 0, probes, ..SearchParams::default() }, None).unwrap()
        };
        let mut before = 100;
        for probes in 1..=20 {
            let found = search(5, probes);
            assert_eq!(found.stats.nodes_visited, probes);
            assert!(found.stats.keys_touched >= before, "{probes}: {:?}", found.stats);
            before = found.stats.keys_touched;
            // All keys that were read can be had, without reading more.
            let all = search(before, probes);
            assert_eq!((all.hits.len(), all.stats.keys_touched), (before, before));
            assert_eq!(all.hits[..5], found.hits);
        }
        assert_eq!(before, 4100);
        assert!(search(3000, 1).stats.nodes_visited > 1);
    }
}
