//! The variants of a chunk: what each was computed behind, what using it costs elsewhere, and which is the cheapest.
//!
//! After Cache-Craft (arXiv 2502.15734). The state of a chunk holds what its tokens took from the chunks before it. Where other
//! chunks stand before it now, part of it is recomputed: the more, the more the chunk took from what was before it (the cache
//! context impact), and the less of that is before it again (the prefix overlap).

use crate::catalogue::Entry;
use crate::error::StoreError;
use crate::key::{ChunkId, ChunkKey, VariantId};
use crate::reading::{ReadError, corrupt, damage};
use crate::records::Section;
use crate::stats::ChunkMeta;
use crate::store::ChunkStore;

/// A chunk that another was computed behind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Before {
    /// The chunk.
    pub chunk: ChunkId,
    /// The attention that the tokens behind it paid its tokens, heads and layers summed; not negative.
    pub attention: f32,
}

/// What a chunk's state was computed behind.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Provenance {
    /// The chunks before it, in order.
    pub before: Vec<Before>,
    /// How much of the state depends on them, 0 to 1: the cache context impact, 1 / (1 + e^(-a/b)), with a the mean attention
    /// between a token of the chunk and one of those before, b the mean within the chunk.
    pub impact: f32,
}

impl Provenance {
    /// The section of a chunk's row that holds it.
    pub const TAG: u16 = 1;

    /// The cache context impact of attention sums: `inter` paid to `before` tokens of other chunks by the chunk's `tokens`, and
    /// `intra` paid within the chunk. Without tokens before or attention within it is .5, that of no influence.
    #[must_use]
    pub fn impact_of(inter: f64, before: usize, intra: f64, tokens: usize) -> f32 {
        let tokens = tokens as f64;
        let (a, b) = (inter / (tokens * before as f64), intra / (tokens * tokens));
        let ratio = if a.is_finite() && b > 0.0 { a / b } else { 0.0 };
        (1.0 / (1.0 + (-ratio).exp())) as f32
    }

    /// The prefix overlap with the order penalty, 0 to 1: the share of the attention to chunks before that goes to those which
    /// stand before it again, times the share of pairs of those whose order is the same. 1 where nothing was before it and
    /// nothing is.
    #[must_use]
    pub fn overlap(&self, now: &[ChunkId]) -> f32 {
        if self.before.is_empty() && now.is_empty() {
            return 1.0;
        }
        let places: Vec<(usize, f32)> = self
            .before
            .iter()
            .filter_map(|before| Some((now.iter().position(|chunk| *chunk == before.chunk)?, before.attention)))
            .collect();
        let all: f32 = self.before.iter().map(|before| before.attention).sum();
        let kept: f32 = places.iter().map(|(_, attention)| attention).sum();
        if all <= 0.0 {
            return 0.0;
        }
        let pairs = places.len() * places.len().saturating_sub(1) / 2;
        let nearer =
            |(i, (place, _)): (usize, &(usize, f32))| places[i + 1..].iter().filter(|(p, _)| p < place).count();
        let discordant: usize = places.iter().enumerate().map(nearer).sum();
        let penalty = if pairs == 0 { 0.0 } else { discordant as f32 / pairs as f32 };
        kept / all * (1.0 - penalty)
    }

    /// The cache fix overhead, 0 to 1: the share of the chunk's tokens to recompute where these chunks stand before it. `alpha`
    /// is calibrated: the least that meets a target of quality.
    #[must_use]
    pub fn fix_overhead(&self, alpha: f32, now: &[ChunkId]) -> f32 {
        (alpha * self.impact * (1.0 - self.overlap(now))).clamp(0.0, 1.0)
    }

    /// As part of a chunk's row.
    #[must_use]
    pub fn to_section(&self) -> Section {
        let mut bytes = self.impact.to_le_bytes().to_vec();
        for before in &self.before {
            bytes.extend_from_slice(&before.chunk.0);
            bytes.extend_from_slice(&before.attention.to_le_bytes());
        }
        Section { tag: Provenance::TAG, bytes }
    }

    /// What the sections of a chunk's row say; `None` where they say nothing of it, or nothing that can be read.
    #[must_use]
    pub fn from_sections(sections: &[Section]) -> Option<Provenance> {
        let section = sections.iter().find(|section| section.tag == Provenance::TAG)?;
        let (impact, rest) = section.bytes.split_first_chunk::<4>()?;
        let entries = rest.chunks_exact(36);
        if !entries.remainder().is_empty() {
            return None;
        }
        let before = entries.map(|entry| {
            let (chunk, attention) = entry.split_first_chunk::<32>()?;
            let attention = f32::from_le_bytes(attention.try_into().ok()?);
            (attention >= 0.0 && attention.is_finite()).then_some(Before { chunk: ChunkId(*chunk), attention })
        });
        let impact = f32::from_le_bytes(*impact);
        let before = before.collect::<Option<Vec<_>>>()?;
        (0.0..=1.0).contains(&impact).then_some(Provenance { before, impact })
    }
}

/// A stored variant of a chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Its name.
    pub key: ChunkKey,
    /// What is known of it.
    pub meta: ChunkMeta,
    /// What it was computed behind; `None`: it was stored without saying so.
    pub provenance: Option<Provenance>,
}

/// The variant that costs the least where these chunks stand before it, with its cache fix overhead; of equals the first.
#[must_use]
pub fn cheapest<'a>(
    variants: impl IntoIterator<Item = (&'a ChunkKey, &'a Provenance)>,
    alpha: f32,
    now: &[ChunkId],
) -> Option<(ChunkKey, f32)> {
    let costs = variants.into_iter().map(|(key, provenance)| (*key, provenance.fix_overhead(alpha, now)));
    costs.min_by(|(_, a), (_, b)| a.total_cmp(b))
}

impl ChunkStore {
    /// The variants of a chunk that are on disk, ordered by key. A variant whose row is damaged stops being served.
    ///
    /// # Errors
    /// Those of a failing device, and [`StoreError::Corrupt`] for a damaged row.
    pub fn variants(&self, chunk: &ChunkId) -> Result<Vec<Variant>, StoreError> {
        let [first, last] = [0, u8::MAX].map(|byte| ChunkKey { chunk: *chunk, variant: VariantId([byte; 16]) });
        let stored: Vec<(ChunkKey, Entry)> =
            self.core.catalogue.lock().entries.range(first..=last).map(|(key, entry)| (*key, *entry)).collect();
        let mut variants = Vec::with_capacity(stored.len());
        for (key, entry) in stored {
            match self.core.chunk_row(&key) {
                Ok(row) => {
                    let provenance = Provenance::from_sections(&row.sections);
                    variants.push(Variant { key, meta: ChunkMeta::from(&entry), provenance });
                }
                Err(ReadError::Store(error)) => return Err(error),
                Err(ReadError::Damage(error)) => {
                    let damage = damage(key, None, error);
                    if self.core.condemn(entry.number, &damage) {
                        return Err(corrupt(damage));
                    }
                    // Removed or replaced while its row was being read.
                }
            }
        }
        Ok(variants)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    fn id(n: u8) -> ChunkId {
        ChunkId([n; 32])
    }

    fn behind(before: &[(u8, f32)]) -> Provenance {
        let before = before.iter().map(|(n, attention)| Before { chunk: id(*n), attention: *attention }).collect();
        Provenance { before, impact: 0.8 }
    }

    fn ids(chunks: &[u8]) -> Vec<ChunkId> {
        chunks.iter().map(|n| id(*n)).collect()
    }

    #[test]
    fn overlap_is_the_attention_that_is_there_again_in_the_same_order() {
        let chunk = behind(&[(1, 1.0), (2, 3.0), (3, 4.0)]);
        let overlap = |now: &[u8]| chunk.overlap(&ids(now));
        assert_eq!(overlap(&[1, 2, 3]), 1.0);
        assert_eq!(overlap(&[7, 1, 2, 8, 3]), 1.0, "others in between are not counted");
        assert_eq!((overlap(&[2]), overlap(&[3, 9]), overlap(&[9]), overlap(&[])), (0.375, 0.5, 0.0, 0.0));
        assert_eq!(overlap(&[3, 2, 1]), 0.0, "every pair is the other way round");
        assert!((overlap(&[2, 1, 3]) - 2.0 / 3.0).abs() < 1e-6);
        assert_eq!(overlap(&[3, 2]), 0.0);
        assert_eq!((behind(&[]).overlap(&[]), behind(&[]).overlap(&ids(&[1]))), (1.0, 0.0));
        assert_eq!(behind(&[(1, 0.0)]).overlap(&ids(&[1])), 0.0, "no attention says nothing");
    }

    #[test]
    fn the_overhead_is_scaled_by_the_impact_and_bounded() {
        let chunk = behind(&[(1, 1.0), (2, 1.0)]);
        assert!((chunk.fix_overhead(0.5, &ids(&[1])) - 0.5 * 0.8 * 0.5).abs() < 1e-6);
        assert_eq!((chunk.fix_overhead(0.5, &ids(&[1, 2])), chunk.fix_overhead(9.0, &[])), (0.0, 1.0));
    }

    #[test]
    fn the_impact_compares_means_between_tokens() {
        let impact = Provenance::impact_of;
        // As much attention for a pair of tokens outside as inside.
        assert!((impact(60.0, 30, 20.0, 10) - 1.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6);
        assert_eq!((impact(0.0, 30, 20.0, 10), impact(0.0, 0, 20.0, 10), impact(5.0, 30, 0.0, 10)), (0.5, 0.5, 0.5));
        assert!(impact(60.0, 30, 20.0, 10) > impact(30.0, 30, 20.0, 10));
    }

    #[test]
    fn the_cheapest_variant_is_the_one_behind_what_is_there() {
        let key = |n| ChunkKey { chunk: id(0), variant: VariantId([n; 16]) };
        let list =
            [(key(1), behind(&[(1, 1.0)])), (key(2), behind(&[(2, 1.0), (1, 1.0)])), (key(3), behind(&[(2, 1.0)]))];
        let choice = |now: &[u8]| cheapest(list.iter().map(|(k, p)| (k, p)), 0.5, &ids(now));
        assert_eq!(choice(&[1]), Some((key(1), 0.0)));
        assert_eq!(choice(&[2]), Some((key(3), 0.0)));
        assert_eq!(choice(&[2, 1]).unwrap().0, key(1), "of equals the first");
        assert_eq!(choice(&[9]), Some((key(1), 0.4)));
        assert_eq!(cheapest([], 0.5, &[]), None);
    }

    proptest! {
        #[test]
        fn provenance_round_trips_and_other_bytes_are_survived(
            before in prop::collection::vec((any::<[u8; 32]>(), 0f32..1e6), 0..9), impact in 0f32..=1.0, bytes: Vec<u8>,
        ) {
            let before = before.into_iter().map(|(chunk, attention)| Before { chunk: ChunkId(chunk), attention }).collect();
            let provenance = Provenance { before, impact };
            let other = Section { tag: 9, bytes: bytes.clone() };
            prop_assert_eq!(Provenance::from_sections(&[other.clone(), provenance.to_section()]), Some(provenance));
            prop_assert_eq!(Provenance::from_sections(&[other]), None);
            let _ = Provenance::from_sections(&[Section { tag: Provenance::TAG, bytes }]);
        }

        #[test]
        fn an_overlap_is_a_share_and_whole_only_for_all_in_order(
            attention in prop::collection::vec(0.1f32..9.0, 1..6), now in prop::collection::vec(0u8..6, 0..6),
        ) {
            let mut now = now;
            let mut seen = std::collections::HashSet::new();
            now.retain(|n| seen.insert(*n));
            let before: Vec<(u8, f32)> = (0..).zip(attention).collect();
            let overlap = behind(&before).overlap(&ids(&now));
            prop_assert!((0.0..=1.0).contains(&overlap));
            let there: Vec<u8> = now.iter().copied().filter(|n| usize::from(*n) < before.len()).collect();
            let whole = there.len() == before.len() && there.is_sorted();
            prop_assert_eq!(overlap > 0.999_99, whole);
        }
    }
}
