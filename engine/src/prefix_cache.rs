//! Pages of KV that prompts with the same beginning share.
//!
//! A page is found by a hash of everything that its KV depends on: the engine's arithmetic and KV format, and all tokens
//! up to the page's last, as a chain: `key = hash(key of the page before, tokens of the page)` (automatic prefix
//! caching of vLLM). The hash is collision-resistant, since whoever can write prompts chooses what is hashed. Only full
//! pages are shared. A page in use by a sequence stays; the others are kept until their memory is wanted, and the least
//! recently used goes first.
//!
//! `P` is a handle to a page of all layers; copies of it share the memory. The cache knows nothing else of it, so that
//! it serves pages of any size on any device.

use std::collections::{BTreeMap, HashMap};

/// What a page's KV depends on, hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageKey([u8; 32]);

impl PageKey {
    /// The key before the first page. `identity`: everything but the tokens that KV depends on.
    #[must_use]
    pub fn root(identity: &[u8]) -> PageKey {
        PageKey(blake3::derive_key("quire prefix cache 1: root", identity))
    }

    /// The key of the page that holds `tokens`, behind the page of this key.
    #[must_use]
    pub fn then(&self, tokens: &[u32]) -> PageKey {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        PageKey(*hasher.finalize().as_bytes())
    }
}

struct Entry<P> {
    page: P,
    /// Sequences that hold it.
    users: usize,
    /// Where it stands among the unused ones.
    tick: u64,
}

/// Shared pages by their keys.
///
/// A chain's first pages are held whenever its last are, and let go after them: what is evicted first is therefore always
/// the end of a chain, and no page is kept that cannot be found.
pub struct PrefixCache<P> {
    entries: HashMap<PageKey, Entry<P>>,
    /// Pages that nobody holds, least recently used first.
    unused: BTreeMap<u64, PageKey>,
    ticks: u64,
}

impl<P: Clone> Default for PrefixCache<P> {
    fn default() -> Self {
        PrefixCache::new()
    }
}

impl<P: Clone> PrefixCache<P> {
    /// A cache without pages.
    #[must_use]
    pub fn new() -> PrefixCache<P> {
        PrefixCache { entries: HashMap::new(), unused: BTreeMap::new(), ticks: 0 }
    }

    /// Pages, used or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Pages that are held by sequences.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.entries.len() - self.unused.len()
    }

    /// How many of a chain's first pages are there.
    #[must_use]
    pub fn found(&self, chain: &[PageKey]) -> usize {
        chain.partition_point(|key| self.entries.contains_key(key))
    }

    /// How many of a chain's first pages are held by so many sequences at least. Who holds a page holds all before it.
    #[must_use]
    pub fn held_by(&self, chain: &[PageKey], users: usize) -> usize {
        chain.partition_point(|key| self.entries.get(key).is_some_and(|entry| entry.users >= users))
    }

    /// Holds the page; `None` when it is not there.
    pub fn take(&mut self, key: &PageKey) -> Option<P> {
        let entry = self.entries.get_mut(key)?;
        if entry.users == 0 {
            self.unused.remove(&entry.tick);
        }
        entry.users += 1;
        Some(entry.page.clone())
    }

    /// Offers a page and holds it. Where the same page is there already, it is given back and the offered one is not
    /// kept.
    pub fn share(&mut self, key: PageKey, page: P) -> P {
        if let Some(there) = self.take(&key) {
            return there;
        }
        self.entries.insert(key, Entry { page: page.clone(), users: 1, tick: 0 });
        page
    }

    /// Lets the pages of a chain go, which were taken or shared once each.
    pub fn release(&mut self, chain: &[PageKey]) {
        for key in chain.iter().rev() {
            let Some(entry) = self.entries.get_mut(key) else { continue };
            entry.users = entry.users.saturating_sub(1);
            if entry.users == 0 {
                self.ticks += 1;
                entry.tick = self.ticks;
                self.unused.insert(self.ticks, *key);
            }
        }
    }

    /// How many unused pages there are of those that `counts` says; `most` if there are more.
    #[must_use]
    pub fn unused(&self, most: usize, counts: &dyn Fn(&P) -> bool) -> usize {
        let counted = |key: &&PageKey| self.entries.get(key).is_some_and(|entry| counts(&entry.page));
        self.unused.values().filter(counted).take(most).count()
    }

    /// Forgets unused pages, the least recently used first, until so many of those that `counts` says are gone, or all.
    pub fn evict(&mut self, pages: usize, counts: &dyn Fn(&P) -> bool) {
        let mut left = pages;
        while left > 0 {
            let Some((_, key)) = self.unused.pop_first() else { return };
            left -= self.entries.remove(&key).map_or(0, |entry| usize::from(counts(&entry.page)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    fn chain(tokens: &[u32]) -> Vec<PageKey> {
        let mut keys = vec![PageKey::root(b"model")];
        tokens.chunks_exact(2).for_each(|page| keys.push(keys[keys.len() - 1].then(page)));
        keys.split_off(1)
    }

    #[test]
    fn a_key_depends_on_the_engine_and_on_every_token_before() {
        let (root, other) = (PageKey::root(b"a"), PageKey::root(b"b"));
        assert_ne!(root.then(&[1, 2]), other.then(&[1, 2]));
        assert_eq!(chain(&[1, 2, 3, 4])[..], chain(&[1, 2, 3, 4, 5, 6])[..2]);
        assert_ne!(chain(&[1, 2, 3, 4])[1], chain(&[1, 9, 3, 4])[1]);
        assert_ne!(root.then(&[1, 2]), root.then(&[2, 1]));
        assert_ne!(root.then(&[1]).then(&[2]), root.then(&[1, 2]));
    }

    #[test]
    fn pages_in_use_stay_and_the_ends_of_old_chains_go_first() {
        let mut cache = PrefixCache::new();
        let (long, short) = (chain(&[1, 2, 3, 4, 5, 6]), chain(&[7, 8, 9, 10]));
        for (i, key) in long.iter().chain(&short).enumerate() {
            assert_eq!(cache.share(*key, i), i);
        }
        cache.evict(9, &|_| true);
        assert_eq!((cache.len(), cache.in_use()), (5, 5), "all are held");
        cache.release(&long);
        cache.release(&short);
        assert_eq!((cache.take(&long[0]), cache.take(&long[1])), (Some(0), Some(1)));
        cache.evict(1, &|_| true);
        assert_eq!((cache.found(&long), cache.found(&short)), (2, 2), "the end of the longer one goes");
        cache.release(&long[..2]);
        cache.evict(3, &|_| true);
        assert_eq!((cache.found(&long), cache.found(&short), cache.len()), (1, 0, 1), "the older one, then the end");
    }

    #[test]
    fn pages_that_free_nothing_do_not_count_as_evicted() {
        let mut cache = PrefixCache::new();
        let chain = chain(&[1, 2, 3, 4, 5, 6]);
        let pages: Vec<Arc<usize>> = chain.iter().enumerate().map(|(i, key)| cache.share(*key, Arc::new(i))).collect();
        cache.release(&chain);
        // The last page goes first; somebody holds it and the one before it still.
        let held = pages[1..].to_vec();
        drop(pages);
        let counted = |most| cache.unused(most, &|page| Arc::strong_count(page) == 1);
        assert_eq!((counted(9), counted(0), cache.unused(9, &|_| true), cache.unused(2, &|_| true)), (1, 0, 3, 2));
        cache.evict(1, &|page| Arc::strong_count(page) == 1);
        assert_eq!((cache.len(), held.len()), (0, 2), "it takes all three to free one");
    }

    #[test]
    fn of_two_equal_pages_one_is_kept() {
        let mut cache = PrefixCache::new();
        let key = chain(&[1, 2])[0];
        let (first, second) = (Arc::new(1), Arc::new(1));
        assert!(Arc::ptr_eq(&cache.share(key, Arc::clone(&first)), &first));
        assert!(Arc::ptr_eq(&cache.share(key, second), &first));
        assert_eq!((cache.held_by(&[key], 2), cache.held_by(&[key], 3), cache.len()), (1, 0, 1));
        cache.release(&[key]);
        assert_eq!(cache.in_use(), 1);
        cache.release(&[key]);
        assert_eq!(cache.in_use(), 0);
    }

    proptest! {
        /// Sequences with random beginnings come and go under eviction.
        #[test]
        fn what_is_held_is_there_and_what_is_there_can_be_found(
            steps in prop::collection::vec((0usize..4, prop::collection::vec(0u32..2, 2..12), 0usize..4), 1..80),
        ) {
            let mut cache: PrefixCache<Vec<u32>> = PrefixCache::new();
            let mut all: HashMap<PageKey, Vec<u32>> = HashMap::new();
            let mut held: Vec<(Vec<PageKey>, Vec<u32>)> = Vec::new();
            for (kind, tokens, n) in steps {
                match kind {
                    0 | 1 => {
                        let keys = chain(&tokens);
                        let found = cache.found(&keys);
                        for (i, key) in keys.iter().enumerate() {
                            let upto = tokens[..2 * (i + 1)].to_vec();
                            all.insert(*key, upto.clone());
                            let page = if i < found { cache.take(key) } else { Some(cache.share(*key, upto.clone())) };
                            prop_assert_eq!(page, Some(upto));
                        }
                        held.push((keys, tokens));
                    }
                    2 if !held.is_empty() => cache.release(&held.swap_remove(n % held.len()).0),
                    _ => cache.evict(n, &|_| true),
                }
                for (keys, tokens) in &held {
                    prop_assert_eq!(cache.found(keys), keys.len());
                    // Pages that another one holds, too.
                    let common = |(_, other): &(_, Vec<u32>)| {
                        tokens.iter().zip(other).take_while(|(a, b)| a == b).count().min(other.len()) / 2
                    };
                    let mut shared: Vec<usize> = held.iter().map(common).collect();
                    shared.sort_unstable();
                    shared.pop();
                    prop_assert_eq!(cache.held_by(keys, 2), shared.pop().unwrap_or(0));
                }
                let users: usize = cache.entries.values().map(|entry| entry.users).sum();
                prop_assert_eq!(users, held.iter().map(|(keys, _)| keys.len()).sum::<usize>());
                // No orphans: all pages before one that is there are there.
                for (key, tokens) in all.iter().filter(|(key, _)| cache.entries.contains_key(key)) {
                    let keys = chain(tokens);
                    prop_assert_eq!((keys.last(), cache.found(&keys)), (Some(key), keys.len()));
                }
            }
            held.iter().for_each(|(keys, _)| cache.release(keys));
            prop_assert_eq!(cache.in_use(), 0);
            cache.evict(usize::MAX, &|_| true);
            prop_assert_eq!(cache.len(), 0);
        }
    }
}
