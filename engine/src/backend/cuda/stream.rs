//! Stages over rows at any ascending positions of one context, for blending.

use std::sync::atomic::Ordering;

use super::batch::{Batch, at_positions};
use super::device::Memory;
use super::model::CudaModel;
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;

impl CudaModel {
    /// Embeddings, `[tokens, hidden]`.
    pub(crate) fn stream(&self, tokens: &[u32]) -> Result<Memory> {
        self.device.bind()?;
        self.check_vocabulary(tokens)?;
        let x = self.device.allocate(tokens.len() * self.spec.hidden * 4, "the residual stream of a context")?;
        let ids: Vec<i32> = tokens.iter().map(|t| *t as i32).collect();
        let ids = self.device.upload(&ids, "the tokens of a context")?;
        self.ops.embed(ids.address(), &self.weights.embedding, &x, tokens.len())?;
        Ok(x)
    }

    /// The rows `kept` of a residual stream.
    pub(crate) fn stream_rows(&self, x: &Memory, kept: &[usize]) -> Result<Memory> {
        self.device.bind()?;
        let out = self.device.allocate(kept.len() * self.spec.hidden * 4, "the residual stream of a context")?;
        let rows: Vec<i32> = kept.iter().map(|r| *r as i32).collect();
        let rows = self.device.upload(&rows, "the rows of a context")?;
        self.ops.rows(rows.address(), x, &out, kept.len(), self.spec.hidden)?;
        Ok(out)
    }

    /// Keys (not rotated) and values of the rows of `x` from `first` on, which lie at `positions`. They are also written to the
    /// pages.
    pub(crate) fn stream_keys_and_values(
        &self,
        layer: usize,
        x: &Memory,
        first: usize,
        positions: &[usize],
        kv: &SequenceKv,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let mut batch = self.positions(positions, kv, false)?;
        batch.tapped = true;
        self.enter(layer, x, first, &batch)?;
        let width = batch.rows * self.shape.width();
        let (mut keys, mut values) = (vec![0.0; width], vec![0.0; width]);
        self.workspace.keys.read(0, &mut keys)?;
        self.workspace.values.read(0, &mut values)?;
        Ok((keys, values))
    }

    /// Queries, keys and values in `layer` of the rows of `x` from `first` on, which lie at `positions`: queries to the workspace,
    /// keys and values to the pages. `ban_eos`: end-of-text tokens must not be chosen behind the last of them.
    pub(crate) fn stream_enter(
        &self,
        layer: usize,
        x: &Memory,
        first: usize,
        positions: &[usize],
        kv: &SequenceKv,
        ban_eos: bool,
    ) -> Result<Batch> {
        let batch = self.positions(positions, kv, ban_eos)?;
        self.enter(layer, x, first, &batch)?;
        Ok(batch)
    }

    /// Attention and all behind it for the rows that were last entered, which are updated in `x`; with `last`, attention alone.
    pub(crate) fn stream_leave(&self, layer: usize, x: &Memory, first: usize, batch: &Batch, last: bool) -> Result<()> {
        if last {
            return self.attend(layer, batch);
        }
        self.leave(layer, batch)?;
        let row = self.spec.hidden * 4;
        self.workspace.x.copy_to(0, x, first * row, batch.rows * row)
    }

    /// The last layer for the rows that were last entered, of which the last one's normed final state is then the workspace's
    /// only one. Returns how many there are.
    pub(crate) fn stream_last_state(&self, layer: usize, batch: &Batch) -> Result<usize> {
        self.leave(layer, batch)?;
        self.final_states(batch, None)?;
        self.head_done.store(0, Ordering::Relaxed);
        self.banned.store(batch.banned(), Ordering::Relaxed);
        Ok(batch.wanted)
    }

    /// The batch of rows at these positions of a context that has pages for them, its arrays copied.
    fn positions(&self, positions: &[usize], kv: &SequenceKv, ban_eos: bool) -> Result<Batch> {
        self.device.bind()?;
        let here =
            kv.device().ok_or_else(|| EngineError::Internal("a context on the CPU was given to a GPU".into()))?;
        let w = &self.workspace;
        let window = self.spec.sliding_window;
        let batch = at_positions(positions, &here.recent, window, ban_eos, w.stride, &w.inputs);
        batch.upload(&w.inputs)?;
        Ok(batch)
    }

    /// Queries, keys and values of rows of a residual stream; KV goes to the pages.
    fn enter(&self, layer: usize, x: &Memory, first: usize, batch: &Batch) -> Result<()> {
        let row = self.spec.hidden * 4;
        x.copy_to(first * row, &self.workspace.x, 0, batch.rows * row)?;
        self.qkv_of(layer, batch)
    }
}
