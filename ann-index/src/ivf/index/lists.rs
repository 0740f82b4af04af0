//! What is asked of faiss: to train centroids, to hold lists, to search them.

use std::ffi::{CStr, c_int};
use std::marker::PhantomData;
use std::sync::RwLockReadGuard;

use faiss::MetricType;
use faiss::cluster::{Clustering, ClusteringParameters};
use faiss::index::flat::FlatIndex;
use faiss::index::ivf_flat::IVFFlatIndex;
use faiss::index::{ConcurrentIndex, Index, NativeIndex, SearchWithParams};
use faiss::search_params::{SearchParameters, SearchParametersIVF};
use faiss::selector::IdSelector;

use crate::bitmap::Bitmap;
use crate::element::Element;
use crate::error::IndexError;
use crate::params::IvfParams;
use crate::rows::Rows;
use crate::storage::Wrong;
use crate::twins::{Distinct, TwinMap, Twins};

/// Rounds of k-means: as many as faiss takes for lists.
const ROUNDS: u32 = 10;
/// Keys of a list, on average, below which faiss warns that centroids mean little.
const FEWEST: usize = 39;
/// Keys worth a thread.
const PARALLEL_FROM: usize = 8192;
/// What an error says was going on.
const SEARCHING: &str = "searching";
const ASSIGNING: &str = "looking for the lists of keys";
const TRAINING: &str = "training centroids";
const FILLING: &str = "filling lists";

/// Lists over the distinct ones of an index's first keys. Never changed once made.
pub(super) struct Lists {
    dim: usize,
    /// The centroids once more, for the index does not tell which lists it will read.
    quantizer: FlatIndex,
    index: IVFFlatIndex,
    /// The list of each distinct key, in order of the keys.
    homes: Vec<u32>,
    /// How many keys each list has.
    sizes: Vec<usize>,
    twins: Twins,
    /// Keys before this one are here, or equal one that is.
    covered: usize,
    /// Distinct keys when the centroids were trained.
    trained: usize,
}

/// What a search found and read.
pub(super) struct Found {
    /// The best keys, each without its twins.
    pub(super) ids: Vec<u32>,
    /// Lists that were read.
    pub(super) lists: usize,
    /// Keys in them.
    pub(super) keys: usize,
    /// Bytes of these and of the centroids, as often as they were looked at.
    pub(super) bytes: usize,
}

/// What a search asks for.
struct Wish<'a> {
    params: SearchParameters,
    /// `params` points to it, and it to the bits. The crate lets go of it without freeing it.
    selector: *mut faiss_sys::FaissIDSelector,
    bits: PhantomData<&'a [u8]>,
}

impl<'a> Wish<'a> {
    fn new(probes: usize, wanted: Option<&'a [u8]>) -> Result<Self, IndexError> {
        let (params, selector) = match wanted {
            None => {
                let mut params = SearchParametersIVF::new().map_err(failed(SEARCHING))?;
                params.set_nprobe(probes);
                (params, std::ptr::null_mut())
            }
            Some(bits) => {
                let selector = IdSelector::bitmap(bits).map_err(failed(SEARCHING))?;
                let place = selector.inner_ptr();
                (SearchParametersIVF::new_with(selector, probes, 0).map_err(failed(SEARCHING))?, place)
            }
        };
        Ok(Self { params: params.upcast(), selector, bits: PhantomData })
    }
}

impl Drop for Wish<'_> {
    fn drop(&mut self) {
        if !self.selector.is_null() {
            // SAFETY: `IdSelector::bitmap` made it and nobody else frees it; freeing the parameters, which
            // comes next, does not look at it.
            unsafe { faiss_sys::faiss_IDSelector_free(self.selector) }
        }
    }
}

/// Distinct keys and their rows, widened.
struct Keys {
    ids: Vec<u32>,
    rows: Vec<f32>,
    twins: Twins,
}

impl Keys {
    /// Of the first `len` keys.
    fn of<T: Element>(rows: &Rows<T>, len: usize) -> Self {
        let (twins, mut distinct) = (Twins::default(), Distinct::default());
        distinct.take(rows, &twins, 0, len);
        let mut wide = vec![0.0; distinct.ids.len() * rows.dim()];
        for (&id, row) in distinct.ids.iter().zip(wide.chunks_exact_mut(rows.dim())) {
            T::decode(rows.row(id as usize), row);
        }
        Self { ids: distinct.ids, rows: wide, twins }
    }
}

impl Lists {
    /// Lists over all keys that are there now, or none if they have fewer than `fewest` distinct ones. The centroids
    /// of `old` are kept while they are good enough.
    pub(super) fn make<T: Element>(
        rows: &Rows<T>,
        params: &IvfParams,
        old: Option<&Lists>,
        fewest: usize,
    ) -> Result<Option<Lists>, IndexError> {
        let (dim, covered) = (rows.dim(), rows.len());
        let keys = Keys::of(rows, covered);
        let count = keys.ids.len();
        if count < fewest {
            return Ok(None);
        }
        set_threads(count);
        let (centroids, trained, mut homes) = match old.filter(|old| count < 2 * old.trained) {
            Some(old) => (old.centroids().to_vec(), old.trained, old.homes.clone()),
            None => (train(dim, &keys.rows, list_count(params, count))?, count, Vec::new()),
        };
        let quantizer = flat(dim, &centroids)?;
        let found = ConcurrentIndex::assign(&quantizer, &keys.rows[homes.len() * dim..], 1);
        for label in found.map_err(failed(ASSIGNING))?.labels {
            homes.push(label.get().ok_or_else(|| error(ASSIGNING, "it found none"))? as u32);
        }
        Self::fill(dim, quantizer, keys, homes, covered, trained).map(Some)
    }

    /// Lists from a file, over the first `covered` keys.
    pub(super) fn restore<T: Element>(
        rows: &Rows<T>,
        covered: usize,
        trained: usize,
        centroids: &[f32],
        homes: Vec<u32>,
    ) -> Result<Lists, Wrong> {
        let dim = rows.dim();
        let (count, keys) = (centroids.len() / dim, Keys::of(rows, covered));
        if !(1..=homes.len()).contains(&trained) || homes.len() != keys.ids.len() {
            let distinct = keys.ids.len();
            return Err(format!(
                "{} keys in lists, {trained} of them trained on, expected {distinct} and 1 to {distinct}",
                homes.len()
            ));
        }
        if let Some(home) = homes.iter().find(|&&home| home as usize >= count) {
            return Err(format!("a key is in list {home} of {count}"));
        }
        set_threads(homes.len());
        let quantizer = flat(dim, centroids).map_err(|e| e.to_string())?;
        Self::fill(dim, quantizer, keys, homes, covered, trained).map_err(|e| e.to_string())
    }

    /// Puts each key into its list. All homes are below the number of centroids.
    fn fill(
        dim: usize,
        quantizer: FlatIndex,
        keys: Keys,
        homes: Vec<u32>,
        covered: usize,
        trained: usize,
    ) -> Result<Lists, IndexError> {
        assert!(homes.len() == keys.ids.len() && keys.rows.len() == homes.len() * dim, "a home for each key");
        let centroids = quantizer.xb();
        let mut sizes = vec![0; centroids.len() / dim];
        homes.iter().for_each(|&home| sizes[home as usize] += 1);
        let index = IVFFlatIndex::new(flat(dim, centroids)?, dim as u32, sizes.len() as u32, MetricType::InnerProduct);
        let index = index.map_err(failed(FILLING))?;
        let wide = |numbers: &[u32]| numbers.iter().map(|&x| i64::from(x)).collect::<Vec<i64>>();
        let (ids, lists) = (wide(&keys.ids), wide(&homes));
        // SAFETY: the pointer is that of a living index of this kind, which nobody else knows yet; there are
        // `ids.len()` rows of `dim` numbers, ids and lists, and every list is one of the index (`sizes` was
        // counted with them).
        let code = unsafe {
            let lists_at = lists.as_ptr();
            let inner = index.inner_ptr().cast();
            faiss_sys::faiss_IndexIVFFlat_add_core(inner, ids.len() as i64, keys.rows.as_ptr(), ids.as_ptr(), lists_at)
        };
        if code != 0 {
            return Err(last_error(FILLING));
        }
        Ok(Lists { dim, quantizer, index, homes, sizes, twins: keys.twins, covered, trained })
    }

    /// How many lists there are.
    pub(super) fn count(&self) -> usize {
        self.sizes.len()
    }

    pub(super) fn covered(&self) -> usize {
        self.covered
    }

    pub(super) fn trained(&self) -> usize {
        self.trained
    }

    pub(super) fn homes(&self) -> &[u32] {
        &self.homes
    }

    /// `[lists, dim]`
    pub(super) fn centroids(&self) -> &[f32] {
        self.quantizer.xb()
    }

    pub(super) fn twins(&self) -> RwLockReadGuard<'_, TwinMap> {
        self.twins.read()
    }

    /// One bit a key, set where the key or one of its twins is not hidden.
    pub(super) fn wanted(&self, hidden: &Bitmap) -> Vec<u8> {
        let mut bits: Vec<u8> =
            (0..self.covered).step_by(64).flat_map(|start| (!hidden.bits_from(start)).to_le_bytes()).collect();
        for (&first, twins) in self.twins.read().iter() {
            if twins.iter().any(|&twin| !hidden.contains(twin)) {
                bits[first as usize / 8] |= 1 << (first % 8);
            }
        }
        bits
    }

    /// The best `k` keys, and some more, of those whose bit in `wanted` is set: in the best `probes` lists and as many
    /// more as it takes to have `least` keys of any kind.
    pub(super) fn search(
        &self,
        query: &[f32],
        (k, least): (usize, usize),
        probes: usize,
        wanted: Option<&[u8]>,
    ) -> Result<Found, IndexError> {
        let (mut probes, mut looks) = (probes.min(self.count()), 1);
        let mut keys = self.keys_in_lists(query, probes)?;
        while keys < least && probes < self.count() {
            probes = (2 * probes).min(self.count());
            keys = self.keys_in_lists(query, probes)?;
            looks += 1;
        }
        // A key and its copy in a list may differ in the last bits of their products: some more are looked for.
        let candidates = (k + k / 8 + 16).min(keys.max(1));
        let wish = Wish::new(probes, wanted)?;
        let labels = self.index.search_with_params(query, candidates, &wish.params);
        let labels = labels.map_err(failed(SEARCHING))?.labels;
        let ids = labels.iter().filter_map(|id| Some(id.get()? as u32)).collect();
        let bytes = keys * self.entry_bytes() + (looks + 1) * size_of_val(self.centroids());
        Ok(Found { ids, lists: probes, keys, bytes })
    }

    /// How many keys the best lists hold.
    fn keys_in_lists(&self, query: &[f32], probes: usize) -> Result<usize, IndexError> {
        let lists = ConcurrentIndex::assign(&self.quantizer, query, probes).map_err(failed(SEARCHING))?.labels;
        Ok(lists.iter().filter_map(|list| Some(self.sizes[list.get()? as usize])).sum())
    }

    /// Bytes of a key in a list: its numbers and its id.
    fn entry_bytes(&self) -> usize {
        4 * self.dim + size_of::<i64>()
    }

    /// Lists double their room as they grow.
    pub(super) fn memory_bytes(&self) -> usize {
        let room: usize = self.sizes.iter().filter(|&&size| size > 0).map(|size| size.next_power_of_two()).sum();
        let centroids = 2 * size_of_val(self.centroids());
        room * self.entry_bytes() + centroids + 4 * self.homes.len() + self.twins.memory_bytes()
    }
}

/// How many lists that many distinct keys have.
fn list_count(params: &IvfParams, keys: usize) -> usize {
    let wanted = match params.lists {
        0 => 4 * keys.isqrt(),
        lists => lists,
    };
    wanted.clamp(1, (keys / FEWEST).max(1))
}

/// `[count, dim]` centroids as faiss trains them for inner products: of length 1.
fn train(dim: usize, rows: &[f32], count: usize) -> Result<Vec<f32>, IndexError> {
    let mut params = ClusteringParameters::new();
    params.set_niter(ROUNDS);
    params.set_spherical(true);
    let clustering = Clustering::new_with_params(dim as u32, count as u32, &params);
    let mut clustering = clustering.map_err(failed(TRAINING))?;
    clustering.train(rows, &mut flat(dim, &[])?).map_err(failed(TRAINING))?;
    Ok(clustering.centroids().map_err(failed(TRAINING))?.concat())
}

/// An exact index over rows.
fn flat(dim: usize, rows: &[f32]) -> Result<FlatIndex, IndexError> {
    let mut index = FlatIndex::new_ip(dim as u32).map_err(failed(FILLING))?;
    index.add(rows).map_err(failed(FILLING))?;
    Ok(index)
}

/// Lets faiss work with the threads of the caller's rayon pool, or with the caller alone where it belongs to that pool or
/// the keys are few: OpenMP's threads spin while they wait for each other, which costs more than they save.
fn set_threads(keys: usize) {
    unsafe extern "C" {
        /// Of OpenMP, which faiss is linked with: sets the threads of what the calling thread starts.
        fn omp_set_num_threads(threads: c_int);
    }
    let threads = match rayon::current_thread_index() {
        Some(_) => 1,
        None => rayon::current_num_threads().min(keys / PARALLEL_FROM).max(1),
    };
    // SAFETY: any positive number will do.
    unsafe { omp_set_num_threads(threads as c_int) }
}

fn error(action: &'static str, reason: &str) -> IndexError {
    IndexError::Library { library: "faiss", action, reason: reason.to_owned() }
}

fn failed(action: &'static str) -> impl Fn(faiss::error::Error) -> IndexError {
    move |reason| error(action, &reason.to_string())
}

/// The error of a call that has just failed on this thread.
fn last_error(action: &'static str) -> IndexError {
    // SAFETY: faiss keeps the text until the thread's next error.
    let text = unsafe {
        let text = faiss_sys::faiss_get_last_error();
        if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy()) }
    };
    error(action, &text.unwrap_or_default())
}
