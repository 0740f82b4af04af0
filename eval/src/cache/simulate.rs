//! Caches that serve a workload: the chunk store by its policies, and the engine's prefix cache. Choices are made by the
//! programs' own code ([`chunk_cache::plan_eviction`], [`chunk_cache::cheapest`], [`engine::PrefixCache`]); what is simulated is
//! that a token takes no memory and a computation no time.

use std::collections::BTreeMap;
use std::ops::Range;

use chunk_cache::{Before, ChunkId, ChunkKey, EvictionPolicy, Provenance, VariantId, Worth, cheapest, plan_eviction};
use engine::{PageKey, PrefixCache};

use super::workload::Workload;

/// At which position attention takes as much computation as the weights: an 8B model of Llama 3's shape has 8.03e9 of these,
/// two operations each, and attends a token with 4 x 32 layers x 4,096 operations.
const ATTENTION_PAR: f64 = 2.0 * 8.03e9 / (4.0 * 32.0 * 4096.0);

/// Tokens of a page of the prefix cache, as on a GPU.
const PAGE: usize = 64;

/// The computation of the tokens at these positions, in that of a token at position 0.
fn work(positions: Range<usize>) -> f64 {
    let (start, end) = (positions.start as f64, positions.end as f64);
    (end - start) + (end * end - start * start) / (2.0 * ATTENTION_PAR)
}

/// What a cache did for the requests that count.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Tally {
    /// Tokens of chunks, and those whose state was found.
    pub(super) tokens: f64,
    pub(super) found: f64,
    /// The computation of all prompts, and what of it was done.
    pub(super) full: f64,
    pub(super) computed: f64,
    /// The computation of what was found, and what of it was done again.
    pub(super) reused: f64,
    pub(super) repaired: f64,
}

impl Tally {
    pub(super) fn hit_ratio(&self) -> f64 {
        self.found / self.tokens
    }

    pub(super) fn saved_compute(&self) -> f64 {
        1.0 - self.computed / self.full
    }

    pub(super) fn saved_over(&self, other: &Tally) -> f64 {
        1.0 - self.computed / other.computed
    }

    pub(super) fn recomputed_share(&self) -> f64 {
        if self.reused > 0.0 { self.repaired / self.reused } else { 0.0 }
    }

    fn prompt(&mut self, length: usize) {
        self.full += work(0..length);
    }

    /// A run of a chunk's tokens, of which this share of the computation is done.
    fn chunk(&mut self, positions: Range<usize>, found: bool, share: f64) {
        let (tokens, work) = (positions.len() as f64, work(positions));
        self.tokens += tokens;
        self.computed += share * work;
        if found {
            self.found += tokens;
            self.reused += work;
            self.repaired += share * work;
        }
    }

    fn other(&mut self, positions: Range<usize>) {
        self.computed += work(positions);
    }
}

/// What a cache is held to.
#[derive(Debug, Clone, Copy)]
pub(super) struct CacheSetting {
    pub(super) policy: EvictionPolicy,
    /// Tokens whose state it may hold.
    pub(super) budget: usize,
    /// The share of a chunk that is recomputed where nothing that it was computed behind stands before it: alpha times impact.
    pub(super) charged: f32,
    /// Chunks that stand before a chunk again make it cheaper. Otherwise only equal prompts do.
    pub(super) overlap: bool,
    /// Variants of a chunk at most; above 1, a chunk that was used before is computed anew, and kept as another variant, where
    /// less than half of what each was computed behind stands before it.
    pub(super) variants: usize,
}

/// Serves the workload from a store of chunks.
pub(super) fn chunk_store(workload: &Workload, setting: CacheSetting) -> Tally {
    let mut cache = ChunkSim { setting, kept: BTreeMap::new(), used: 0, clock: 0, age: 0.0, stored: 0 };
    let mut tally = Tally::default();
    for (number, (chunks, question)) in workload.requests.iter().enumerate() {
        let mut counted = Tally::default();
        cache.serve(workload, chunks, *question, &mut counted);
        // The prompt's head is in every cache from the first request on.
        if number >= workload.warm {
            add(&mut tally, &counted);
        }
    }
    tally
}

fn add(sum: &mut Tally, one: &Tally) {
    sum.tokens += one.tokens;
    sum.found += one.found;
    sum.full += one.full;
    sum.computed += one.computed;
    sum.reused += one.reused;
    sum.repaired += one.repaired;
}

struct ChunkSim {
    setting: CacheSetting,
    kept: BTreeMap<ChunkKey, (Worth, Provenance)>,
    used: u64,
    clock: u64,
    age: f64,
    stored: u64,
}

fn chunk_id(number: usize) -> ChunkId {
    let mut id = [0; 32];
    id[..8].copy_from_slice(&(number as u64).to_le_bytes());
    ChunkId(id)
}

impl ChunkSim {
    fn serve(&mut self, workload: &Workload, chunks: &[usize], question: usize, tally: &mut Tally) {
        let (mut position, mut before, mut new) = (workload.head, Vec::new(), Vec::new());
        for chunk in chunks {
            let (id, tokens) = (chunk_id(*chunk), workload.chunks[*chunk]);
            let positions = position..position + tokens;
            let exact = workload.chained;
            match self.find(id, &before, exact) {
                Some((key, share)) => {
                    tally.chunk(positions.clone(), true, f64::from(share));
                    self.note_use(&key, work(positions) * f64::from(1.0 - share));
                }
                None => {
                    tally.chunk(positions.clone(), false, 1.0);
                    new.push((id, before.clone(), positions));
                }
            }
            position += tokens;
            before.push((id, tokens));
        }
        tally.other(position..position + question);
        tally.prompt(position + question);
        // Written behind the request that computed them.
        new.into_iter().for_each(|(id, before, positions)| self.store(id, &before, positions));
    }

    /// The variant to use, with the share of it that is recomputed; `None`: the chunk is computed.
    fn find(&self, id: ChunkId, before: &[(ChunkId, usize)], exact: bool) -> Option<(ChunkKey, f32)> {
        let CacheSetting { charged, overlap, variants, .. } = self.setting;
        let before: Vec<ChunkId> = before.iter().map(|(id, _)| *id).collect();
        let [first, last] = [0, u8::MAX].map(|byte| ChunkKey { chunk: id, variant: VariantId([byte; 16]) });
        let stored = self.kept.range(first..=last);
        let count = stored.clone().count();
        let (key, share) = cheapest(stored.map(|(key, (_, provenance))| (key, provenance)), charged, &before)?;
        if exact {
            return Some((key, 0.0));
        }
        let (worth, provenance) = &self.kept[&key];
        if count < variants && worth.hits > 0 && provenance.overlap(&before) < 0.5 {
            return None;
        }
        let same = provenance.before.iter().map(|b| b.chunk).eq(before.iter().copied());
        Some((key, if overlap || same { share } else { charged }))
    }

    fn note_use(&mut self, key: &ChunkKey, saved: f64) {
        self.clock += 1;
        if let Some((worth, _)) = self.kept.get_mut(key) {
            *worth = Worth {
                hits: worth.hits + 1,
                saved: worth.saved + micro(saved),
                last_used: self.clock,
                age: self.age,
                ..*worth
            };
        }
    }

    fn store(&mut self, id: ChunkId, before: &[(ChunkId, usize)], positions: Range<usize>) {
        let (bytes, budget) = (positions.len() as u64, self.setting.budget as u64);
        if self.used + bytes > budget {
            let kept = self.kept.iter().map(|(key, (worth, _))| (*key, *worth));
            let Some(victims) = plan_eviction(self.setting.policy, budget, bytes, kept) else { return };
            for key in victims {
                let Some((gone, _)) = self.kept.remove(&key) else { continue };
                self.used -= gone.bytes;
                self.age = self.setting.policy.age_behind(self.age, &gone);
            }
        }
        self.clock += 1;
        self.stored += 1;
        let mut variant = VariantId([0; 16]);
        variant.0[..8].copy_from_slice(&self.stored.to_be_bytes());
        // What is not measured here: attention to a chunk before is taken to follow its length.
        let before = before.iter().map(|(chunk, tokens)| Before { chunk: *chunk, attention: *tokens as f32 });
        let provenance = Provenance { before: before.collect(), impact: 1.0 };
        let worth =
            Worth { bytes, last_used: self.clock, cost: micro(work(positions)), age: self.age, ..Worth::default() };
        if self.kept.insert(ChunkKey { chunk: id, variant }, (worth, provenance)).is_none() {
            self.used += bytes;
        }
    }
}

/// In the unit of a policy's whole numbers.
fn micro(work: f64) -> u64 {
    (work * 1e3).round() as u64
}

/// Serves the workload from the engine's prefix cache, with a budget of tokens.
pub(super) fn prefix_cache(workload: &Workload, budget: usize) -> Tally {
    let mut cache = PrefixCache::new();
    let mut tally = Tally::default();
    for (number, (chunks, question)) in workload.requests.iter().enumerate() {
        let (mut chain, mut key) = (Vec::new(), PageKey::root(b"simulated"));
        let head = std::iter::once((usize::MAX, workload.head));
        for (chunk, tokens) in head.chain(chunks.iter().map(|chunk| (*chunk, workload.chunks[*chunk]))) {
            for page in 0..tokens / PAGE {
                key = key.then(&[chunk as u32, page as u32]);
                chain.push(key);
            }
        }
        let found = cache.found(&chain) * PAGE;
        for key in &chain {
            if cache.take(key).is_none() {
                cache.share(*key, ());
            }
        }
        cache.release(&chain);
        let above = (cache.len() * PAGE).saturating_sub(budget + workload.head).div_ceil(PAGE);
        cache.evict(above, &|()| true);
        if number < workload.warm {
            continue;
        }
        let mut position = workload.head;
        for chunk in chunks {
            let end = position + workload.chunks[*chunk];
            let cut = found.clamp(position, end);
            tally.chunk(position..cut, true, 0.0);
            tally.chunk(cut..end, false, 1.0);
            position = end;
        }
        tally.other(position..position + question);
        tally.prompt(position + question);
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(requests: &[&[usize]], chained: bool) -> Workload {
        let requests = requests.iter().map(|chunks| (chunks.to_vec(), 10)).collect();
        Workload { name: "test", chunks: vec![64; 9], requests, head: 64, warm: 0, chained }
    }

    fn setting(budget: usize) -> CacheSetting {
        CacheSetting { policy: EvictionPolicy::Lru, budget, charged: 0.25, overlap: true, variants: 1 }
    }

    #[test]
    fn work_grows_with_the_position() {
        assert!((work(0..10) + work(10..30) - work(0..30)).abs() < 1e-9);
        let far = ATTENTION_PAR as usize;
        assert!((work(far..far + 1) - 2.0).abs() < 0.01 && (work(0..1) - 1.0).abs() < 0.01);
    }

    #[test]
    fn a_chunk_is_recomputed_by_what_stands_before_it() {
        // 1 is first behind 0, then behind 0 again, then alone, then behind 0 and another.
        let served = |requests: &[&[usize]]| chunk_store(&workload(requests, false), setting(9 * 64));
        let again = served(&[&[0, 1], &[0, 1]]);
        assert_eq!((again.hit_ratio(), again.repaired), (0.5, 0.0));
        let alone = served(&[&[0, 1], &[1]]);
        assert!((alone.repaired - 0.25 * work(64..128)).abs() < 1e-9, "{alone:?}");
        let between = served(&[&[0, 1], &[0, 2, 1]]);
        assert_eq!(between.repaired, 0.0);
        let strict = CacheSetting { overlap: false, ..setting(9 * 64) };
        let between = chunk_store(&workload(&[&[0, 1], &[0, 2, 1]], false), strict);
        assert!((between.repaired - 0.25 * work(192..256)).abs() < 1e-9);
        let chained = chunk_store(&workload(&[&[0, 1], &[1]], true), setting(9 * 64));
        assert_eq!(chained.repaired, 0.0);
        assert!((chained.computed - work(64..192) - work(192..202) - work(128..138)).abs() < 1e-9);
    }

    #[test]
    fn another_variant_serves_the_other_neighbour() {
        let requests: &[&[usize]] = &[&[0, 1], &[0, 1], &[2, 1], &[2, 1], &[0, 1]];
        let one = chunk_store(&workload(requests, false), setting(9 * 64));
        let two = chunk_store(&workload(requests, false), CacheSetting { variants: 2, ..setting(9 * 64) });
        assert!(one.repaired > 0.0 && two.repaired == 0.0);
        assert!(two.found < one.found, "the second variant is computed");
    }

    #[test]
    fn a_budget_holds_and_the_policy_says_who_goes() {
        let requests: &[&[usize]] = &[&[0], &[0], &[0], &[1], &[2], &[3], &[0]];
        let hits = |policy| {
            // Room for three; the low-water mark leaves one beside the new one.
            let setting = CacheSetting { policy, ..setting(3 * 64 + 8) };
            chunk_store(&workload(requests, false), setting).found / 64.0
        };
        assert_eq!(
            (hits(EvictionPolicy::Lru), hits(EvictionPolicy::Lfu), hits(EvictionPolicy::CacheCraft)),
            (2.0, 3.0, 3.0)
        );
    }

    #[test]
    fn the_prefix_cache_serves_equal_beginnings_alone() {
        let served = prefix_cache(&workload(&[&[0, 1], &[0, 1], &[0, 2], &[1, 0]], false), 9 * 64);
        assert_eq!(served.found, 3.0 * 64.0);
        assert_eq!(served.repaired, 0.0);
        // The budget is of chunks: the head is beside it.
        let small = prefix_cache(&workload(&[&[0, 1], &[0, 1]], false), 64);
        assert_eq!(small.found, 64.0);
    }
}
