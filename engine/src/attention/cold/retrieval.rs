//! Attention over cold segments: search the k keys that a query weighs most, attend them exactly.
//! (RetrievalAttention, arXiv 2409.10516, section 3.2.)

use std::ops::AddAssign;
use std::sync::Arc;

use ann_index::SearchParams;

use super::segment::Segment;
use crate::attention::AttentionState;
use crate::attention::dense::Queries;
use crate::backend::cpu::Cpu;
use crate::backend::cpu::pool::Shards;
use crate::error::Result;

/// What retrieval read, summed over queries, layers and query heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ColdStats {
    /// Keys that were cold.
    pub cold_keys: u64,
    /// Keys whose bytes the index touched.
    pub keys_scored: u64,
    /// Keys whose values were read.
    pub keys_attended: u64,
}

impl AddAssign for ColdStats {
    fn add_assign(&mut self, other: Self) {
        self.cold_keys += other.cold_keys;
        self.keys_scored += other.keys_scored;
        self.keys_attended += other.keys_attended;
    }
}

/// Attention of `queries` over `segments` in `layer`, restricted to each query head's `params.k` best keys.
/// All queries must lie behind the segments.
pub(crate) fn attend_cold(
    cpu: &Cpu,
    segments: &[Arc<Segment>],
    layer: usize,
    kv_heads: usize,
    queries: &Queries<'_>,
    params: &SearchParams,
) -> Result<(AttentionState, ColdStats)> {
    let rows = queries.rows();
    let dim = queries.q.len() / rows.max(1);
    let mut state = AttentionState::empty(rows, dim);
    let mut stats: Vec<Result<ColdStats>> = (0..rows).map(|_| Ok(ColdStats::default())).collect();
    {
        let (out, lse, seen) = (Shards::new(&mut state.out), Shards::new(&mut state.lse), Shards::new(&mut stats));
        // A search is worth a task of its own; batches of a few keep the queue short.
        cpu.pool.ranges(rows, rows.min(16 * cpu.pool.threads()), |range| {
            for row in range {
                let head = row % queries.heads / (queries.heads / kv_heads);
                let q = &queries.q[row * dim..(row + 1) * dim];
                // SAFETY: one part a row.
                let (out, lse, seen) =
                    unsafe { (out.part(row * dim..(row + 1) * dim), lse.part(row..row + 1), seen.part(row..row + 1)) };
                seen[0] = attend_row(segments, layer, head, q, queries.scale, params, out, &mut lse[0]);
            }
        });
    }
    let mut total = ColdStats::default();
    for row in stats {
        total += row?;
    }
    Ok((state, total))
}

#[allow(clippy::too_many_arguments)]
fn attend_row(
    segments: &[Arc<Segment>],
    layer: usize,
    head: usize,
    q: &[f32],
    scale: f32,
    params: &SearchParams,
    out: &mut [f32],
    lse: &mut f32,
) -> Result<ColdStats> {
    let mut stats = ColdStats::default();
    let mut hits: Vec<(usize, u32, f32)> =
        Vec::with_capacity(segments.iter().map(|s| params.k.min(s.positions().len())).sum());
    for (i, segment) in segments.iter().enumerate() {
        let found = segment.head(layer, head).index.search(q, params, None)?;
        stats.cold_keys += segment.positions().len() as u64;
        stats.keys_scored += found.stats.keys_touched as u64;
        hits.extend(found.hits.iter().map(|h| (i, h.id, h.score * scale)));
    }
    if segments.len() > 1 {
        hits.sort_unstable_by(|a, b| b.2.total_cmp(&a.2));
        hits.truncate(params.k);
    }
    stats.keys_attended = hits.len() as u64;
    let max = hits.iter().fold(f32::NEG_INFINITY, |m, h| m.max(h.2));
    let mut sum = 0.0;
    for (segment, id, score) in &hits {
        let weight = (score - max).exp();
        sum += weight;
        segments[*segment].head(layer, head).add_value(*id, weight, out);
    }
    if sum > 0.0 {
        out.iter_mut().for_each(|x| *x /= sum);
        *lse = max + sum.ln();
    }
    Ok(stats)
}
