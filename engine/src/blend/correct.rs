//! Correction of tokens that stay cached: what recomputing changes in some tokens of a context, it would have changed in the
//! others too (after AgentKVShift). On every layer but the first, whose keys and values depend on nothing but the token, the
//! mean of (fresh - cached) over the recomputed tokens is added to the others: to values, and to keys before rotation.
//!
//! The difference is taken between what the pages hold of the recomputed rows before and after they are written, rotated
//! back. So nothing of the cache has to be kept beside the pages, and the cached chunks stay as they are. A layer is corrected
//! once all its recomputed rows are written, before any of them attends.
//!
//! A correction calibrated by a token's offset in its chunk, collected once per model, would be another part of
//! [`Shift::of`].

use super::plan::BlendPlan;
use crate::backend::cpu::pool::Shards;
use crate::backend::cuda::ShiftRows;
use crate::config::Correction;
use crate::error::Result;
use crate::kv::sequence::SequenceKv;
use crate::model::rope::{rotate_half, rotate_half_back};
use crate::model::transformer::{Rows, Transformer};

/// Fewer recomputed tokens than these say nothing about the others.
const LEAST: usize = 4;
/// So many tokens with the prompt's mean are added to those of a chunk.
pub(crate) const PRIOR: f64 = 8.0;

/// The rows of a context that are recomputed and those that stay, by the chunks that they belong to.
pub(super) struct Corrector {
    by_chunk: bool,
    /// The first layer that is corrected.
    first: usize,
    rows: Sides,
    /// Of the layers so far, |mean difference|^2 over |mean fresh|^2.
    deviations: Vec<f64>,
}

enum Sides {
    Host(Box<HostSides>),
    Device(Box<ShiftRows>),
}

struct HostSides {
    /// Where each group's recomputed rows end.
    ends: Vec<usize>,
    chosen: Rows,
    /// The rows that stay cached, and the group of each.
    stale: Rows,
    groups: Vec<usize>,
    /// Before the recomputed rows are written.
    before: Vec<f64>,
}

impl Corrector {
    /// `chosen`: positions, ascending, of the recomputed tokens among those of the plan's composed spans; `first`: the first layer
    /// that is corrected, 1 at least. `None`: there is nothing to correct, or too little to go by.
    pub(super) fn new(
        model: &Transformer,
        plan: &BlendPlan,
        chosen: &[usize],
        correction: Correction,
        first: usize,
        kv: &SequenceKv,
    ) -> Result<Option<Corrector>> {
        let (mut ends, mut stale, mut groups) = (Vec::new(), Vec::new(), Vec::new());
        for (group, span) in plan.composed().enumerate() {
            let here = chosen.partition_point(|p| *p < span.positions.start);
            ends.push(chosen.partition_point(|p| *p < span.positions.end));
            let mut fresh = chosen[here..ends[group]].iter().copied().peekable();
            let stays = span.positions.clone().filter(|position| fresh.next_if_eq(position).is_none());
            stale.extend(stays);
            groups.resize(stale.len(), group);
        }
        if correction == Correction::None || chosen.len() < LEAST || stale.is_empty() {
            return Ok(None);
        }
        let by_chunk = correction == Correction::Chunk;
        let rows = match model.device() {
            None => Sides::Host(Box::new(HostSides {
                ends,
                chosen: model.rows(chosen.to_vec()),
                stale: model.rows(stale),
                groups,
                before: Vec::new(),
            })),
            Some(device) => Sides::Device(Box::new(device.shift_rows(kv, chosen, &ends, &stale, &groups)?)),
        };
        Ok(Some(Corrector { by_chunk, first, rows, deviations: Vec::new() }))
    }

    /// Whether a layer is corrected.
    pub(super) fn acts(&self, layer: usize) -> bool {
        layer >= self.first
    }

    /// Before the recomputed rows of a layer are written, while the pages hold them as cached.
    pub(super) fn before(&mut self, model: &Transformer, layer: usize, kv: &SequenceKv) -> Result<()> {
        match &mut self.rows {
            Sides::Host(rows) => {
                rows.before = rows.sums(model, layer, kv);
                Ok(())
            }
            Sides::Device(rows) => model.device().map_or(Ok(()), |device| device.shift_before(layer, rows)),
        }
    }

    /// Corrects a layer, once all its recomputed rows are written.
    pub(super) fn after(&mut self, model: &Transformer, layer: usize, kv: &mut SequenceKv) -> Result<()> {
        match &mut self.rows {
            Sides::Host(rows) => {
                let shift = Shift::of(rows, rows.sums(model, layer, kv), self.by_chunk, &model.shape);
                self.deviations.push(shift.deviation);
                rows.apply(model, layer, kv, &shift.rows);
                Ok(())
            }
            Sides::Device(rows) => {
                model.device().map_or(Ok(()), |device| device.shift_after(layer, rows, self.by_chunk))
            }
        }
    }

    /// See [`PrefillStats::blend_deviation`](crate::PrefillStats).
    pub(super) fn deviation(mut self, model: &Transformer) -> Result<Option<f32>> {
        if let (Sides::Device(rows), Some(device)) = (&self.rows, model.device()) {
            self.deviations = device.shift_deviations(rows)?;
        }
        let mean = self.deviations.iter().sum::<f64>() / self.deviations.len().max(1) as f64;
        Ok((!self.deviations.is_empty()).then_some(mean as f32))
    }
}

/// What is added to each group's rows in a layer: `[groups][2 (keys, values)][kv_heads * head_dim]`.
struct Shift {
    rows: Vec<f32>,
    deviation: f64,
}

impl Shift {
    /// From the sums of the recomputed rows as they are now and as they were.
    fn of(rows: &HostSides, after: Vec<f64>, by_chunk: bool, shape: &crate::kv::KvShape) -> Shift {
        let width = 2 * shape.width();
        let count = rows.chosen.positions.len() as f64;
        let (mut mean, mut fresh) = (vec![0.0; width], vec![0.0; width]);
        let differences: Vec<f64> = after.iter().zip(&rows.before).map(|(after, before)| after - before).collect();
        for (group, now) in differences.chunks_exact(width).zip(after.chunks_exact(width)) {
            mean.iter_mut().zip(group).for_each(|(mean, x)| *mean += x / count);
            fresh.iter_mut().zip(now).for_each(|(mean, x)| *mean += x / count);
        }
        let squares = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        let deviation = squares(&mean) / squares(&fresh).max(f64::MIN_POSITIVE);
        let mut start = 0;
        let shifts = differences.chunks_exact(width).zip(&rows.ends).flat_map(|(group, &end)| {
            let own = if by_chunk { (end - start) as f64 } else { 0.0 };
            start = end;
            let shrunk = group.iter().zip(&mean).map(move |(sum, mean)| {
                let sum = if own > 0.0 { *sum } else { 0.0 };
                ((sum + PRIOR * mean) / (own + PRIOR)) as f32
            });
            shrunk.collect::<Vec<f32>>()
        });
        Shift { rows: shifts.collect(), deviation }
    }
}

impl HostSides {
    /// Sums of the recomputed rows' keys, rotated back, and values: `[groups][2][kv_heads * head_dim]`.
    fn sums(&self, model: &Transformer, layer: usize, kv: &SequenceKv) -> Vec<f64> {
        let (width, dim) = (model.shape.width(), model.shape.head_dim);
        let mut sums = vec![0.0; self.ends.len() * 2 * width];
        let parts = Shards::new(&mut sums);
        model.cpu.pool.run(self.ends.len(), |group| {
            // SAFETY: one part a group.
            let part = unsafe { parts.part(group * 2 * width..(group + 1) * 2 * width) };
            let (mut keys, mut values) = (vec![0.0; width], vec![0.0; width]);
            let start = if group == 0 { 0 } else { self.ends[group - 1] };
            for row in start..self.ends[group] {
                kv.recent(layer).read(self.chosen.positions[row], &mut keys, &mut values);
                let (cos, sin) = self.chosen.angles(row);
                keys.chunks_exact_mut(dim).for_each(|head| rotate_half_back(head, cos, sin));
                part.iter_mut().zip(keys.iter().chain(&values)).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        });
        sums
    }

    /// Adds each group's shift to its rows that stay cached.
    fn apply(&self, model: &Transformer, layer: usize, kv: &mut SequenceKv, shift: &[f32]) {
        let (width, dim) = (model.shape.width(), model.shape.head_dim);
        let mut pages = kv.recent_mut(layer).pages_mut(&self.stale.positions);
        let tasks = pages.len();
        let pages = Shards::new(&mut pages);
        model.cpu.pool.run(tasks, |task| {
            // SAFETY: one part a page.
            let page = &mut unsafe { pages.part(task..task + 1) }[0];
            let (mut keys, mut values, mut turned) = (vec![0.0; width], vec![0.0; width], vec![0.0; width]);
            for row in page.rows.clone() {
                let (position, group) = (self.stale.positions[row], self.groups[row]);
                let (of_keys, of_values) = shift[group * 2 * width..(group + 1) * 2 * width].split_at(width);
                page.read(position, &mut keys, &mut values);
                turned.copy_from_slice(of_keys);
                let (cos, sin) = self.stale.angles(row);
                turned.chunks_exact_mut(dim).for_each(|head| rotate_half(head, cos, sin));
                keys.iter_mut().zip(&turned).for_each(|(x, shift)| *x += shift);
                values.iter_mut().zip(of_values).for_each(|(x, shift)| *x += shift);
                page.write(position, &keys, &values);
            }
        });
    }
}
