//! The forward pass on a GPU: the same stages as on the CPU, fused where a kernel can take two.
//!
//! Few rows wait for the weights' bytes: one kernel per matrix reads them once, with the norm before it and the residual or
//! SwiGLU behind it. Many rows go through cuBLASLt; an f32 activation is then two bf16 rows (high and low half), which keeps
//! 16 of its bits, and whoever reads the product adds the two. Weights in f16 are two bf16 matrices, which keeps all of their
//! bits. Each matrix of a model may have a format of its own.

use super::batch::Batch;
use super::device::Memory;
use super::gemm::ProductShape;
use super::host_work::HostWork;
use super::model::CudaModel;
use super::ops::{Activated, NormOut, Residual};
use super::weights::{DeviceLayer, Format, Matrix};
use crate::error::Result;

/// Rows up to which the matrix-vector kernels are used, where a block gets enough shared memory.
pub(crate) const VECTOR_ROWS: usize = 8;

/// Parts that hold an activation's 16 highest bits.
const EXACT: usize = 2;

/// How rows are multiplied with a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Path {
    /// Matrix-vector kernels: f32 activations, weights in bf16 or f32.
    Vector,
    /// cuBLASLt with activations in this many bf16 parts; weights in bf16, or in two bf16 halves.
    Product(usize),
}

/// Queries, keys and values as `workspace.qkv` holds them: in how many parts, and the bias that is still to be added.
#[derive(Clone, Copy)]
pub(crate) struct Qkv<'a> {
    pub(crate) parts: usize,
    pub(crate) bias: Option<&'a Memory>,
}

/// What is still to be added to the residual stream: the parts of the last product, and its bias.
#[derive(Clone, Copy)]
pub(crate) struct Pending<'a> {
    pub(crate) parts: &'a Memory,
    pub(crate) count: usize,
    pub(crate) bias: Option<&'a Memory>,
}

impl CudaModel {
    /// bf16 parts of an activation in products and attention of many rows: one where prompts may be read fast; steps that
    /// only decode are exact in any case.
    pub(crate) fn parts_of(&self, batch: &Batch) -> usize {
        if self.fast_prefill && batch.reads { 1 } else { EXACT }
    }

    /// How `rows` rows are multiplied with a matrix, whatever the format of the others is. Rows beyond those that the kernels
    /// for bf16 take, and matrices of two bf16 halves, go through cuBLASLt; f32 has kernels for any number.
    fn path(&self, matrix: &Matrix, rows: usize, parts: usize) -> Path {
        match matrix.format {
            Format::F32 => Path::Vector,
            Format::Bf16 if rows <= self.vector_rows => Path::Vector,
            Format::Bf16 | Format::Halves => Path::Product(parts),
        }
    }

    /// Runs all layers over a batch whose arrays lie on the device, and leaves the wanted rows' normed final states in the
    /// workspace. Only launches, unless there is work for the host: it can be captured.
    pub(crate) fn layers(&self, batch: &Batch, mut host: Option<&mut HostWork<'_, '_>>) -> Result<()> {
        let (w, n) = (&self.workspace, batch.rows);
        self.ops.embed(batch.tokens(), &self.weights.embedding, &w.x, n)?;
        let parts = self.parts_of(batch);
        let mut pending: Option<Pending<'_>> = None;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            let qkv = self.qkv(layer, pending.take(), n, parts)?;
            self.ops.rope_append(self, index, batch, qkv)?;
            self.attend(index, batch)?;
            if let Some(host) = &mut host {
                host.after_attention(index, batch)?;
            }
            pending = self.finish(layer, n, parts)?;
            if let Some(host) = &mut host {
                host.after_layer()?;
            }
        }
        self.final_states(batch, pending)?;
        host.map_or(Ok(()), HostWork::end)
    }

    /// Queries, keys and values in `layer` of the rows in the workspace, which are a batch of their own.
    pub(crate) fn qkv_of(&self, layer: usize, batch: &Batch) -> Result<()> {
        let qkv = self.qkv(&self.weights.layers[layer], None, batch.rows, self.parts_of(batch))?;
        self.ops.rope_append(self, layer, batch, qkv)
    }

    /// Attention and all behind it in `layer`, for the rows in the workspace.
    pub(crate) fn leave(&self, layer: usize, batch: &Batch) -> Result<()> {
        self.attend(layer, batch)?;
        let pending = self.finish(&self.weights.layers[layer], batch.rows, self.parts_of(batch))?;
        self.settle(pending, batch.rows)
    }

    /// Adds what is pending to the residual stream.
    fn settle(&self, pending: Option<Pending<'_>>, rows: usize) -> Result<()> {
        if pending.is_none() {
            return Ok(());
        }
        let from = Residual { x: &self.workspace.x, pending, rows: 0 };
        self.ops.add_norm(&from, &self.weights.norm, NormOut::Nowhere, rows)
    }

    /// Queries, keys and values of all rows, to `workspace.qkv`.
    fn qkv<'a>(&self, layer: &'a DeviceLayer, pending: Option<Pending<'_>>, n: usize, parts: usize) -> Result<Qkv<'a>> {
        let w = &self.workspace;
        match self.path(&layer.qkv, n, parts) {
            Path::Vector => {
                self.settle(pending, n)?;
                let norm = Some(&layer.attention_norm);
                self.ops.vector_product(w.x.address(), norm, &layer.qkv, layer.qkv_bias.as_ref(), &w.qkv, n)?;
                Ok(Qkv { parts: 1, bias: None })
            }
            Path::Product(parts) => {
                self.normed(pending, &layer.attention_norm, n, parts)?;
                self.product(&layer.qkv, &w.split, &w.qkv, n, parts)?;
                Ok(Qkv { parts, bias: layer.qkv_bias.as_ref() })
            }
        }
    }

    /// Everything behind attention: output projection, MLP, both residuals. Each matrix is multiplied in its own way: what goes
    /// from one to the next is brought into the form that the next one takes.
    fn finish<'a>(&'a self, layer: &'a DeviceLayer, n: usize, parts: usize) -> Result<Option<Pending<'a>>> {
        let (w, width) = (&self.workspace, self.spec.intermediate);
        let pending = match self.path(&layer.output, n, parts) {
            Path::Vector => {
                self.ops.vector_add(&w.attention, &layer.output, layer.output_bias.as_ref(), &w.x, n)?;
                None
            }
            Path::Product(parts) => {
                self.ops.split(w.attention.address(), &w.split, parts, n, layer.output.inputs)?;
                self.product(&layer.output, &w.split, &w.product, n, parts)?;
                Some(Pending { parts: &w.product, count: parts, bias: layer.output_bias.as_ref() })
            }
        };
        let (norm, bias, down) = (&layer.mlp_norm, layer.gate_up_bias.as_ref(), self.path(&layer.down, n, parts));
        match (self.path(&layer.gate_up, n, parts), down) {
            (Path::Vector, down) => {
                self.settle(pending, n)?;
                self.ops.vector_swiglu(&w.x, norm, &layer.gate_up, bias, &w.hidden, n)?;
                if let Path::Product(parts) = down {
                    self.ops.split(w.hidden.address(), &w.split_hidden, parts, n, width)?;
                }
            }
            (Path::Product(parts), down) => {
                self.normed(pending, norm, n, parts)?;
                // Where activations are rounded anyway, the widest of them is at once: its bytes take longer than the rest.
                let rounded = parts == 1 && layer.gate_up.low().is_none();
                self.product_as(&layer.gate_up, &w.split, &w.gate_up, n * parts, rounded)?;
                let out = match down {
                    Path::Vector => Activated::F32(&w.hidden),
                    Path::Product(parts) => Activated::Split(&w.split_hidden, parts),
                };
                self.ops.swiglu(&w.gate_up, (parts, rounded), bias, out, n, width)?;
            }
        }
        match down {
            Path::Vector => {
                self.ops.vector_add(&w.hidden, &layer.down, layer.down_bias.as_ref(), &w.x, n)?;
                Ok(None)
            }
            Path::Product(parts) => {
                self.product(&layer.down, &w.split_hidden, &w.product, n, parts)?;
                Ok(Some(Pending { parts: &w.product, count: parts, bias: layer.down_bias.as_ref() }))
            }
        }
    }

    /// `x += pending`; its norm, in bf16 parts, to the workspace.
    fn normed(&self, pending: Option<Pending<'_>>, weight: &Memory, n: usize, parts: usize) -> Result<()> {
        let from = Residual { x: &self.workspace.x, pending, rows: 0 };
        self.ops.add_norm(&from, weight, NormOut::Split(&self.workspace.split, parts), n)
    }

    /// `y = x W^T`, where `x` and `y` are in `parts`. The halves of a matrix of two are added in `y`.
    fn product(&self, matrix: &Matrix, x: &Memory, y: &Memory, n: usize, parts: usize) -> Result<()> {
        self.product_as(matrix, x, y, n * parts, false)
    }

    /// The same for so many rows; `rounded`: to bf16, of a matrix of one part.
    fn product_as(&self, matrix: &Matrix, x: &Memory, y: &Memory, rows: usize, rounded: bool) -> Result<()> {
        let shape = ProductShape { rows, outputs: matrix.outputs, inputs: matrix.inputs, rounded };
        let (x, y) = (x.address(), y.address());
        self.gemm.product(shape, x, matrix.memory.address(), y, false)?;
        matrix.low().map_or(Ok(()), |low| self.gemm.product(shape, x, low, y, true))
    }

    /// The wanted rows' normed final states, to `workspace.finals`.
    pub(super) fn final_states(&self, batch: &Batch, pending: Option<Pending<'_>>) -> Result<()> {
        let w = &self.workspace;
        self.settle(pending, batch.rows)?;
        if batch.wanted == 0 {
            return Ok(());
        }
        let from = Residual { x: &w.x, pending: None, rows: batch.wanted_rows() };
        self.ops.add_norm(&from, &self.weights.norm, NormOut::F32(&w.finals), batch.wanted)
    }

    /// Logits of `rows` final states from number `first` on, to `workspace.logits`; the number of parts they are in.
    pub(crate) fn head(&self, first: usize, rows: usize) -> Result<usize> {
        let (w, head) = (&self.workspace, self.weights.head());
        let x = w.finals.at::<f32>(first * self.spec.hidden);
        match self.path(head, rows, EXACT) {
            Path::Vector => {
                self.ops.vector_product(x, None, head, None, &w.logits, rows)?;
                Ok(1)
            }
            Path::Product(parts) => {
                self.ops.split(x, &w.split, parts, rows, self.spec.hidden)?;
                self.product(head, &w.split, &w.logits, rows, parts)?;
                Ok(parts)
            }
        }
    }

    /// Attention of all rows over their sequences' recent runs, then over sinks where there are such.
    pub(super) fn attend(&self, layer: usize, batch: &Batch) -> Result<()> {
        let w = &self.workspace;
        for span in &batch.spans {
            self.ops.attend(self, layer, batch, span, (&w.attention, &w.lse))?;
        }
        for sinks in &batch.sinks {
            self.ops.attend(self, layer, batch, sinks, (&w.other, &w.other_lse))?;
            self.ops.merge(self, sinks.rows())?;
        }
        Ok(())
    }
}
