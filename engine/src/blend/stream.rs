//! The residual stream of the rows that a blend computes, where the model computes.

use std::ops::Range;

use super::paid::{Attended, Watch};
use crate::backend::cuda::{Batch, Memory};
use crate::chunk::ChunkLayer;
use crate::error::Result;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Qkv, Rows, Transformer, gather};

/// Rows at ascending positions of one context, with their residual stream.
pub(super) struct Stream<'a> {
    model: &'a Transformer,
    rows: Rows,
    x: Residual,
    /// What `enter` has left for `leave`.
    entered: Option<(Range<usize>, Entered)>,
}

/// Queries of some rows in a layer, where the model computes.
enum Entered {
    Host(Qkv, Rows),
    /// They are in the workspace.
    Device(Batch),
}

/// `[rows, hidden]`
enum Residual {
    Host(Vec<f32>),
    Device(Memory),
}

impl<'a> Stream<'a> {
    /// The embeddings of `tokens`.
    pub(super) fn new(model: &'a Transformer, positions: Vec<usize>, tokens: &[u32]) -> Result<Stream<'a>> {
        let x = match model.device() {
            None => Residual::Host(model.embed(tokens)?),
            Some(device) => Residual::Device(device.stream(tokens)?),
        };
        Ok(Stream { model, rows: model.rows(positions), x, entered: None })
    }

    pub(super) fn len(&self) -> usize {
        self.rows.positions.len()
    }

    pub(super) fn position(&self, row: usize) -> usize {
        self.rows.positions[row]
    }

    /// Keys (not rotated) and values of the rows of `block` in `layer`, `[rows, kv_heads, head_dim]`.
    pub(super) fn keys_and_values(
        &self,
        layer: usize,
        block: Range<usize>,
        kv: &SequenceKv,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        match &self.x {
            Residual::Host(x) => {
                let hidden = self.model.spec.hidden;
                let qkv = self.model.qkv(layer, &x[block.start * hidden..block.end * hidden], &self.rows.part(block));
                Ok((qkv.keys.to_vec(), qkv.values.to_vec()))
            }
            Residual::Device(x) => {
                let positions = &self.rows.positions[block.clone()];
                on_device(self.model)?.stream_keys_and_values(layer, x, block.start, positions, kv)
            }
        }
    }

    /// Computes queries, keys and values of the rows of `block` in `layer`, and writes keys and values.
    pub(super) fn enter(&mut self, layer: usize, block: Range<usize>, kv: &mut SequenceKv) -> Result<()> {
        let model = self.model;
        let entered = match &self.x {
            Residual::Host(x) => {
                let (rows, hidden) = (self.rows.part(block.clone()), model.spec.hidden);
                let qkv = model.qkv(layer, &x[block.start * hidden..block.end * hidden], &rows);
                model.write_kv(kv.recent_mut(layer), &rows, &qkv.keys, &qkv.values);
                Entered::Host(qkv, rows)
            }
            Residual::Device(x) => {
                let positions = &self.rows.positions[block.clone()];
                Entered::Device(on_device(model)?.stream_enter(layer, x, block.start, positions, kv)?)
            }
        };
        self.entered = Some((block, entered));
        Ok(())
    }

    /// Attention and all behind it for the rows that were last entered; those before them have been through the layer. In the
    /// last layer nothing behind attention is of use, and attention only to `watch`, which sees what they pay.
    pub(super) fn leave(&mut self, layer: usize, kv: &SequenceKv, mut watch: Option<&mut Watch<'_>>) -> Result<()> {
        let Some((block, entered)) = self.entered.take() else { return Ok(()) };
        let model = self.model;
        let last = layer + 1 == model.spec.layers;
        if last && watch.is_none() {
            return Ok(());
        }
        match (&mut self.x, entered) {
            (Residual::Host(x), Entered::Host(qkv, rows)) => {
                let state = kv.attend_exact(&model.cpu, layer, &model.queries(&qkv.q, &rows.positions));
                if let Some(watch) = &mut watch {
                    let attended = Attended { q: &qkv.q, lse: &state.lse, positions: &rows.positions };
                    watch.add(layer, &block, kv, &attended);
                }
                if !last {
                    let hidden = model.spec.hidden;
                    model.finish_layer(layer, &mut x[block.start * hidden..block.end * hidden], &state.out);
                }
                Ok(())
            }
            (Residual::Device(x), Entered::Device(batch)) => {
                on_device(model)?.stream_leave(layer, x, block.start, &batch, last)?;
                watch.map_or(Ok(()), |watch| watch.add_on_device(layer, &block, &batch))
            }
            _ => Err(crate::EngineError::Internal("rows of another device".into())),
        }
    }

    /// Narrows the stream to some of its rows.
    pub(super) fn keep(&mut self, kept: &[usize]) -> Result<()> {
        self.x = match &self.x {
            Residual::Host(x) => Residual::Host(gather(x, self.model.spec.hidden, kept)),
            Residual::Device(x) => Residual::Device(on_device(self.model)?.stream_rows(x, kept)?),
        };
        self.rows = self.rows.pick(kept);
        Ok(())
    }
}

/// Writes cached rows (keys not rotated) to the positions of `rows`.
pub(super) fn write_cached(
    model: &Transformer,
    kv: &mut SequenceKv,
    layer: usize,
    rows: &Rows,
    cached: &ChunkLayer,
) -> Result<()> {
    match model.device() {
        None => {
            let dtype = model.shape.dtype;
            model.write_kv(kv.recent_mut(layer), rows, &dtype.decode(&cached.keys), &dtype.decode(&cached.values));
            Ok(())
        }
        Some(device) => device.write_cached(layer, &rows.positions, cached, kv),
    }
}

fn on_device(model: &Transformer) -> Result<&crate::backend::cuda::CudaModel> {
    model.device().ok_or_else(|| crate::EngineError::Internal("a stream on a GPU with a model on the CPU".into()))
}
