//! The graphs over the keys of a KV head: one for all its query heads, or one for each of them.
//!
//! Graphs differ in their links and in what they know of queries; the keys' codes are the same for all.

use std::sync::Arc;

use super::beam::{FOLLOWED, Field, Scratch, Start, search, with_scratch};
use super::build::Decode;
use super::core::Core;
use crate::codes::{Codes, Probe};
use crate::error::IndexError;
use crate::neighbours::Neighbours;
use crate::order::id_of;
use crate::params::GraphParams;

/// See the module.
pub(super) struct Graphs {
    pub(super) codes: Arc<Codes>,
    /// Distinct keys when they were built.
    pub(super) built: usize,
    /// Graph i belongs to query head i; a single one to all heads.
    pub(super) of_heads: Vec<Core>,
}

/// What a walk found and read.
pub(super) struct Walked {
    /// Candidates, the best first.
    pub(super) ids: Vec<u32>,
    /// Keys that no walk before it in the group has scored.
    pub(super) scored: usize,
    /// Keys whose links in this graph no walk before it in the group has followed.
    pub(super) followed: usize,
}

/// A set of keys, one bit each; without room until it is used.
pub(super) struct KeySet {
    len: usize,
    bits: Vec<u64>,
}

impl KeySet {
    /// Room for the keys below `len`.
    pub(super) fn new(len: usize) -> Self {
        Self { len, bits: Vec::new() }
    }

    fn bits(&mut self) -> &mut [u64] {
        if self.bits.is_empty() {
            self.bits.resize(self.len.div_ceil(64), 0);
        }
        &mut self.bits
    }

    /// Adds keys; returns how many of them are new.
    fn extend(&mut self, keys: &[u64]) -> usize {
        let mut new = 0;
        for (held, keys) in self.bits().iter_mut().zip(keys) {
            new += (keys & !*held).count_ones() as usize;
            *held |= keys;
        }
        new
    }

    /// Adds a key; whether it is new.
    pub(super) fn insert(&mut self, id: u32) -> bool {
        let (word, bit) = (id as usize / 64, 1u64 << (id % 64));
        let held = &mut self.bits()[word];
        let new = *held & bit == 0;
        *held |= bit;
        new
    }
}

impl Graphs {
    /// Graphs over the keys `distinct`, of which `keys` holds all and their twins. `samples` are the queries that the
    /// neighbours belong to, head after head for every token; when they are not `known` to be of the kind to come, one
    /// graph serves all heads, and all directions count alike.
    pub(super) fn build(
        dim: usize,
        keys: &[f32],
        distinct: &[u32],
        samples: &[f32],
        known: bool,
        neighbours: &Neighbours,
        params: &GraphParams,
    ) -> Result<Self, IndexError> {
        let codes = Arc::new(Codes::new(mean(dim, keys), keys.len() / dim));
        codes.append(keys)?;
        let heads = if known { params.query_heads } else { 1 };
        let graph = |head: usize| {
            if heads == 1 {
                return Core::build(&codes, keys, distinct, samples, known, neighbours, params);
            }
            let mine = samples.chunks_exact(dim).skip(head).step_by(heads).flatten().copied().collect::<Vec<f32>>();
            let ids = neighbours.lists().skip(head).step_by(heads).flatten().copied().collect();
            Core::build(&codes, keys, distinct, &mine, known, &Neighbours { k: neighbours.k, ids }, params)
        };
        let of_heads = (0..heads).map(graph).collect::<Result<_, _>>()?;
        Ok(Self { codes, built: distinct.len(), of_heads })
    }

    /// Adds keys: rows of `dim` numbers, of which those with the ids `fresh` equal no earlier one; `distinct` are all
    /// of that kind. One thread at a time.
    pub(super) fn append(
        &self,
        keys: &[f32],
        fresh: &[u32],
        distinct: &[u32],
        decode: Decode<'_>,
    ) -> Result<(), IndexError> {
        self.codes.append(keys)?;
        let count = keys.len() / self.codes.center().len();
        self.of_heads.iter().try_for_each(|graph| graph.append(count, fresh, distinct, decode))
    }

    /// For each query, the `ef` best keys that `wanted` lets through, of those on the way to them, the best first by
    /// their codes. The queries are those of the heads from `first` on, one after the other and over again.
    pub(super) fn walk(
        &self,
        queries: &[f32],
        first: usize,
        ef: usize,
        wanted: Option<&dyn Fn(u32) -> bool>,
    ) -> Vec<Walked> {
        let probes: Vec<Probe> = queries.chunks_exact(self.codes.center().len()).map(|q| self.codes.probe(q)).collect();
        let held: Vec<_> = self.of_heads.iter().map(|graph| (graph.links(), graph.entries())).collect();
        let fields: Vec<Field<'_>> = held.iter().map(|(links, _)| Field::new(self.codes.view(), links)).collect();
        let graph_of = |walk: usize| (first % held.len() + walk) % held.len();
        let starts: Vec<Start<'_>> = (0..)
            .zip(&probes)
            .map(|(walk, probe)| Start { field: &fields[graph_of(walk)], probe, entries: &held[graph_of(walk)].1 })
            .collect();
        with_scratch(probes.len(), |scratch| {
            search(scratch, &starts, ef, wanted);
            let len = fields.iter().map(|field| field.len).max().unwrap_or_default();
            let mut scored = KeySet::new(len);
            let mut followed: Vec<KeySet> = fields.iter().map(|_| KeySet::new(len)).collect();
            let alone = scratch.len() == 1;
            let walked = |(walk, scratch): (usize, &mut Scratch)| {
                let ids = scratch.pool.iter().map(|&rank| id_of(rank) & !FOLLOWED);
                let Scratch { followed: all, seen, .. } = scratch;
                let before = &mut followed[graph_of(walk)];
                Walked {
                    ids: ids.filter(|&id| wanted.is_none_or(|wanted| wanted(id))).collect(),
                    scored: if alone { scratch.scored } else { scored.extend(seen) },
                    followed: if alone { all.len() } else { all.iter().filter(|&&id| before.insert(id)).count() },
                }
            };
            scratch.iter_mut().enumerate().map(walked).collect()
        })
    }

    /// Bytes of a key's links in one graph.
    pub(super) fn link_row_bytes(&self) -> usize {
        self.of_heads[0].links().row_bytes()
    }

    /// Bytes of all links.
    pub(super) fn link_bytes(&self) -> usize {
        self.of_heads.iter().map(|graph| graph.links().memory_bytes()).sum()
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.codes.memory_bytes() + self.of_heads.iter().map(Core::memory_bytes).sum::<usize>()
    }
}

pub(super) fn mean(dim: usize, keys: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0f64; dim];
    for row in keys.chunks_exact(dim) {
        for (sum, &x) in sums.iter_mut().zip(row) {
            *sum += f64::from(x);
        }
    }
    let count = (keys.len() / dim).max(1) as f64;
    sums.into_iter().map(|sum| (sum / count) as f32).collect()
}
