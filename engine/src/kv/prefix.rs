//! Pages that sequences share through the prefix cache.

use std::sync::Arc;

use super::KvShape;
use super::device::{self, DevicePage};
use super::page::{PAGE, Page};
use super::sequence::SequenceKv;
use crate::model::transformer::Transformer;
use crate::prefix_cache::{PageKey, PrefixCache};
use crate::scheduler::Bytes;

/// A page of every layer, where the model computes.
#[derive(Clone)]
pub(crate) enum SharedPage {
    Host(Arc<[Arc<Page>]>),
    Device(Arc<DevicePage>),
}

impl SharedPage {
    /// Whether its memory is free once this handle is gone. A sequence that has moved away from what it once shared may
    /// still hold it.
    pub(crate) fn is_last(&self) -> bool {
        match self {
            SharedPage::Host(layers) => Arc::strong_count(layers) == 1,
            SharedPage::Device(page) => Arc::strong_count(page) == 1,
        }
    }
}

/// Tokens of a page, and its bytes over all layers, where `model` computes.
pub(crate) fn page_size(model: &Transformer) -> (usize, Bytes) {
    match model.device() {
        None => (PAGE, Bytes { device: 0, host: page_bytes(&model.shape) }),
        Some(device) => (device::PAGE, Bytes { device: device.pool.page_bytes() as u64, host: 0 }),
    }
}

/// Bytes of a page of every layer on the host.
pub(crate) fn page_bytes(shape: &KvShape) -> u64 {
    (shape.layers * Page::bytes(shape)) as u64
}

impl SequenceKv {
    /// Tokens of a page.
    fn page_tokens(&self) -> usize {
        if self.device.is_some() { device::PAGE } else { PAGE }
    }

    /// Tokens that fit into the pages it has.
    pub(crate) fn room(&self) -> usize {
        if let Some(kv) = &self.device {
            return kv.recent.room();
        }
        let run = &self.recent[0];
        (run.first + run.pages.len() * PAGE).saturating_sub(run.end)
    }

    /// Page `number`, which must be full, of a sequence from which nothing has left the recent run.
    fn page(&self, number: usize) -> SharedPage {
        match &self.device {
            Some(kv) => SharedPage::Device(kv.recent.page(number)),
            None => SharedPage::Host(self.recent.iter().map(|run| Arc::clone(&run.pages[number])).collect()),
        }
    }

    /// Appends a full page, or puts it in the place of one with the same tokens.
    fn put_page(&mut self, number: usize, page: &SharedPage) {
        let layers = match (page, &mut self.device) {
            (SharedPage::Device(page), Some(kv)) => return kv.recent.put_page(number, page),
            (SharedPage::Host(layers), None) => layers,
            // An engine has one kind of pages.
            (SharedPage::Device(_), None) | (SharedPage::Host(_), Some(_)) => return,
        };
        for (run, page) in self.recent.iter_mut().zip(layers.iter()) {
            if number == run.pages.len() {
                run.pages.push_back(Arc::clone(page));
                run.end = (number + 1) * PAGE;
            } else {
                run.pages[number] = Arc::clone(page);
            }
        }
    }
}

/// One sequence's part in the prefix cache: the first pages of its KV. Tokens are given from the sequence's first on.
pub(crate) struct SharedPages {
    root: PageKey,
    /// Tokens of a page.
    size: usize,
    /// Keys of its first pages, as far as they have been asked for.
    keys: Vec<PageKey>,
    /// So many of its first pages are the cache's, held by it.
    held: usize,
}

impl SharedPages {
    pub(crate) fn new(root: PageKey, kv: &SequenceKv) -> SharedPages {
        SharedPages { root, size: kv.page_tokens(), keys: Vec::new(), held: 0 }
    }

    /// Keys of the full pages of `tokens`.
    fn chain(&mut self, tokens: &[u32]) -> &[PageKey] {
        for page in tokens.chunks_exact(self.size).skip(self.keys.len()) {
            let before = self.keys.last().unwrap_or(&self.root);
            self.keys.push(before.then(page));
        }
        &self.keys[..tokens.len() / self.size]
    }

    /// How many of `tokens` the cache has, and how many of them on pages that are in use.
    pub(crate) fn found(&mut self, cache: &PrefixCache<SharedPage>, tokens: &[u32]) -> (usize, usize) {
        let size = self.size;
        let chain = self.chain(tokens);
        (cache.found(chain) * size, cache.held_by(chain, 1) * size)
    }

    /// Begins an empty `kv` with what the cache has of `tokens`.
    pub(crate) fn adopt(&mut self, cache: &mut PrefixCache<SharedPage>, kv: &mut SequenceKv, tokens: &[u32]) {
        for (number, key) in self.chain(tokens).iter().enumerate() {
            let Some(page) = cache.take(key) else { break };
            kv.put_page(number, &page);
        }
        self.held = kv.len() / self.size;
    }

    /// Shares the full pages of `tokens`, all of which `kv` holds. Where another sequence has shared the same page
    /// before, that one is used from now on.
    pub(crate) fn share(&mut self, cache: &mut PrefixCache<SharedPage>, kv: &mut SequenceKv, tokens: &[u32]) {
        while self.held < tokens.len() / self.size {
            let number = self.held;
            let page = cache.share(self.chain(tokens)[number], kv.page(number));
            kv.put_page(number, &page);
            self.held += 1;
        }
    }

    /// Lets all pages go.
    pub(crate) fn release(&mut self, cache: &mut PrefixCache<SharedPage>) {
        cache.release(&self.keys[..self.held]);
        self.held = 0;
    }

    /// Pages that it holds.
    pub(crate) fn held(&self) -> usize {
        self.held
    }

    /// Of the pages that it holds, those that no other sequence holds.
    pub(crate) fn held_alone(&self, cache: &PrefixCache<SharedPage>) -> usize {
        self.held - cache.held_by(&self.keys[..self.held], 2)
    }
}
