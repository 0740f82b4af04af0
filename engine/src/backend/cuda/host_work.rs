//! What a layer leaves to the host: taps of keys, values and queries, and attention over cold tokens.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::MutexGuard;

use super::batch::Batch;
use super::copies::Copies;
use super::device::Memory;
use super::model::CudaModel;
use crate::attention::dense::Queries;
use crate::backend::cpu::Cpu;
use crate::error::Result;
use crate::model::transformer::Piece;
use crate::unwind::guarded;

/// Runs behind every layer's attention. While it searches on the host the GPU waits: strategies that need it run launch by launch.
/// Keys and values that are tapped leave beside the kernels, and are taken two layers later.
pub(crate) struct HostWork<'a, 'b> {
    model: &'a CudaModel,
    cpu: &'a Cpu,
    pieces: &'a mut [Piece<'b>],
    /// Held while keys and values leave.
    copies: Option<MutexGuard<'a, Copies>>,
    /// What is under way: layer, and first row of each piece.
    leaving: VecDeque<(usize, Vec<usize>)>,
}

impl<'a, 'b> HostWork<'a, 'b> {
    pub(crate) fn new(model: &'a CudaModel, cpu: &'a Cpu, pieces: &'a mut [Piece<'b>]) -> Self {
        let copies = pieces.iter().any(|piece| piece.tap.is_some()).then(|| model.copies());
        HostWork { model, cpu, pieces, copies, leaving: VecDeque::new() }
    }

    pub(crate) fn after_attention(&mut self, layer: usize, batch: &Batch) -> Result<()> {
        if self.leaving.len() == 2 {
            self.take()?;
        }
        let (w, model) = (&self.model.workspace, self.model);
        if let Some(copies) = &mut self.copies {
            copies.leave(layer, &w.keys, &w.values, batch.rows * model.shape.width() * size_of::<f32>())?;
            self.leaving.push_back((layer, batch.starts.clone()));
        }
        for (piece, start) in self.pieces.iter_mut().zip(&batch.starts) {
            let rows = *start..start + piece.tokens.len();
            tap_queries(piece, model, layer, &rows)?;
            let sums = piece.sums.as_ref().filter(|_| layer + 1 < model.spec.layers);
            if let (Some(sums), Some(kv)) = (sums, piece.kv.device()) {
                sums.add_on_device(model, layer, batch, &rows, &kv.recent)?;
            }
            cold(self.cpu, piece, model, layer, &rows)?;
        }
        Ok(())
    }

    /// The next layer writes its keys and values where this one's are.
    pub(crate) fn after_layer(&mut self) -> Result<()> {
        self.copies.as_ref().map_or(Ok(()), |copies| copies.hold_kernels())
    }

    /// Takes what is still under way.
    pub(crate) fn end(&mut self) -> Result<()> {
        while !self.leaving.is_empty() {
            self.take()?;
        }
        Ok(())
    }

    /// Takes the keys and values of the first of the layers that are under way.
    fn take(&mut self) -> Result<()> {
        let (Some(copies), Some((layer, starts))) = (&self.copies, self.leaving.pop_front()) else { return Ok(()) };
        let (keys, values) = copies.left(layer)?;
        let width = self.model.shape.width();
        for (piece, start) in self.pieces.iter_mut().zip(starts) {
            let rows = start * width..(start + piece.tokens.len()) * width;
            let Some(tap) = &mut piece.tap else { continue };
            if tap.len() <= layer {
                tap.resize_with(layer + 1, Default::default);
            }
            tap[layer].0.extend_from_slice(&keys[rows.clone()]);
            tap[layer].1.extend_from_slice(&values[rows]);
        }
        Ok(())
    }
}

/// Rows of a matrix of `width` columns.
fn rows_of(memory: &Memory, rows: &Range<usize>, width: usize) -> Result<Vec<f32>> {
    let mut out = vec![0.0; rows.len() * width];
    memory.read(rows.start * width, &mut out)?;
    Ok(out)
}

fn tap_queries(piece: &mut Piece<'_>, model: &CudaModel, layer: usize, rows: &Range<usize>) -> Result<()> {
    if let Some(tap) = &mut piece.query_tap {
        if tap.len() <= layer {
            tap.resize_with(layer + 1, Default::default);
        }
        tap[layer].extend(rows_of(&model.workspace.q, rows, model.spec.heads * model.spec.head_dim)?);
    }
    Ok(())
}

/// Attention over cold segments, searched on the host, merged into the device's state.
fn cold(cpu: &Cpu, piece: &mut Piece<'_>, model: &CudaModel, layer: usize, rows: &Range<usize>) -> Result<()> {
    let Some(config) = piece.attention.filter(|_| piece.failed.is_none()) else { return Ok(()) };
    let last = piece.kv.len();
    let positions: Vec<usize> = (last - rows.len()..last).collect();
    let spec = &model.spec;
    let mut queries =
        Queries { q: &[], positions: &positions, heads: spec.heads, scale: model.scale, window: spec.sliding_window };
    piece.kv.count_unindexed(&queries, config, &mut piece.stats);
    if !piece.kv.has_cold() {
        return Ok(());
    }
    let (w, width) = (&model.workspace, spec.heads * spec.head_dim);
    let q = rows_of(&w.q, rows, width)?;
    queries.q = &q;
    let search = || piece.kv.attend_cold(cpu, layer, &queries, config, &mut piece.stats);
    let state = match guarded("searching cold keys", search) {
        Ok(state) => state,
        // A search that fails or panics ends its own sequence only.
        Err(error) => {
            piece.failed = Some(error);
            return Ok(());
        }
    };
    w.other.write(rows.start * width, &state.out)?;
    w.other_lse.write(rows.start * spec.heads, &state.lse)?;
    model.ops.merge(model, rows)
}
