//! What a layer leaves to the host: taps of keys, values and queries, and attention over cold tokens.

use std::ops::Range;

use super::batch::Batch;
use super::device::Memory;
use super::model::CudaModel;
use crate::attention::dense::Queries;
use crate::backend::cpu::Cpu;
use crate::error::Result;
use crate::model::transformer::Piece;

/// Runs behind every layer's attention. While it works on the host the GPU waits: strategies that need it run launch by launch.
pub(crate) struct HostWork<'a, 'b> {
    cpu: &'a Cpu,
    pieces: &'a mut [Piece<'b>],
}

impl<'a, 'b> HostWork<'a, 'b> {
    pub(crate) fn new(cpu: &'a Cpu, pieces: &'a mut [Piece<'b>]) -> Self {
        HostWork { cpu, pieces }
    }

    pub(crate) fn after_attention(&mut self, model: &CudaModel, layer: usize, batch: &Batch) -> Result<()> {
        for (piece, start) in self.pieces.iter_mut().zip(&batch.starts) {
            let rows = *start..start + piece.tokens.len();
            taps(piece, model, layer, &rows)?;
            cold(self.cpu, piece, model, layer, &rows)?;
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

fn taps(piece: &mut Piece<'_>, model: &CudaModel, layer: usize, rows: &Range<usize>) -> Result<()> {
    let (w, width) = (&model.workspace, model.shape.width());
    if let Some(tap) = &mut piece.tap {
        if tap.len() <= layer {
            tap.resize_with(layer + 1, Default::default);
        }
        tap[layer].0.extend(rows_of(&w.keys, rows, width)?);
        tap[layer].1.extend(rows_of(&w.values, rows, width)?);
    }
    if let Some(tap) = &mut piece.query_tap {
        if tap.len() <= layer {
            tap.resize_with(layer + 1, Default::default);
        }
        tap[layer].extend(rows_of(&w.q, rows, model.spec.heads * model.spec.head_dim)?);
    }
    Ok(())
}

/// Attention over cold segments, searched on the host, merged into the device's state.
fn cold(cpu: &Cpu, piece: &mut Piece<'_>, model: &CudaModel, layer: usize, rows: &Range<usize>) -> Result<()> {
    let Some(config) = piece.attention else { return Ok(()) };
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
    let state = piece.kv.attend_cold(cpu, layer, &queries, config, &mut piece.stats)?;
    w.other.write(rows.start * width, &state.out)?;
    w.other_lse.write(rows.start * spec.heads, &state.lse)?;
    model.ops.merge(model, rows)
}
