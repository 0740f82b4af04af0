//! Every kernel with its arguments and the shape of its launch. The kernels' files say what each argument is.

use std::ops::Range;
use std::sync::Arc;

use super::batch::{Batch, Extent, Span};
use super::device::{Device, Memory};
use super::forward::{Pending, Qkv, VECTOR_ROWS};
use super::launch::{Shape, arguments};
use super::model::{CudaModel, Limits};
use super::module::{Kernel, Modules};
use super::prefill::{Prefill, PrefillRows};
use super::repair::RepairKernels;
use super::weights::{Format, Matrix};
use crate::error::Result;
use crate::kv::{KvDtype, KvShape};
use crate::model::rope::RopeTable;
use crate::model::spec::ModelSpec;

/// Query heads that share a KV head's products in `attention_decode.cu`.
pub(super) const DECODE_HEADS: usize = 8;
/// Threads of a block of `attention_decode.cu` and `attention_any.cu`.
pub(super) const DECODE_THREADS: usize = 256;
/// Dynamic shared memory of `attention_decode.cu`.
pub(super) const DECODE_SHARED: usize = 131_072;
/// Threads of a block of most kernels.
pub(super) const THREADS: usize = 256;
/// Heads that a block of `rope_append.cu` and `kv_rows.cu` takes.
pub(super) const BLOCK_HEADS: usize = 8;
/// Most blocks in a grid's second direction.
pub(super) const GRID_ROWS: usize = 65_535;

/// The residual stream with what is still to be added, or some of its rows.
pub(crate) struct Residual<'a> {
    pub(crate) x: &'a Memory,
    pub(crate) pending: Option<Pending<'a>>,
    /// Address of row numbers; 0: all rows.
    pub(crate) rows: u64,
}

/// Where a norm goes.
pub(crate) enum NormOut<'a> {
    /// Only the residual stream is updated.
    Nowhere,
    F32(&'a Memory),
    /// In so many bf16 parts.
    Split(&'a Memory, usize),
}

/// Where the activations of an MLP go.
pub(crate) enum Activated<'a> {
    F32(&'a Memory),
    /// In so many bf16 parts.
    Split(&'a Memory, usize),
}

/// Matrix-vector kernels for 1, 2, 4 and 8 rows.
struct Vectors {
    norm: [Kernel; 4],
    add: [Kernel; 4],
    swiglu: [Kernel; 4],
}

/// Loaded kernels, and what they need beside a step's memory.
pub(crate) struct Ops {
    device: Arc<Device>,
    spec: ModelSpec,
    embed_bf16: Kernel,
    embed_f32: Kernel,
    embed_halves: Kernel,
    add_norm: Kernel,
    rope_append: Kernel,
    pub(super) write_rows: Kernel,
    /// Of f32, of bf16.
    swiglu: [Kernel; 2],
    split: Kernel,
    merge: Kernel,
    vectors: Vectors,
    vectors_f32: [Kernel; 3],
    attention_decode: Option<Kernel>,
    attention_prefill: Option<Prefill>,
    attention_merge: Kernel,
    attention_any: Kernel,
    pub(super) repair: RepairKernels,
    /// Cosines and sines, `[positions][head_dim / 2]`.
    pub(super) cos: Memory,
    pub(super) sin: Memory,
    /// Partial states of `attention_decode.cu`, and its counters.
    partial: Memory,
    counters: Memory,
    /// The first slot, start and end of a run, for `attention_any.cu`.
    extent: Memory,
}

impl Ops {
    pub(crate) fn new(
        device: &Arc<Device>,
        modules: &Modules,
        spec: &ModelSpec,
        shape: KvShape,
        rope: &RopeTable,
        limits: Limits,
    ) -> Result<Ops> {
        let plain = |file: &str, name: &str| modules.kernel(file, name, 0);
        let kv = match shape.dtype {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
        };
        // Where a block gets too little shared memory, the plain kernel attends.
        let fits = device.shared_memory >= DECODE_SHARED;
        let tuned = fits && shape.dtype == KvDtype::Bf16 && [64, 128].contains(&spec.head_dim);
        let dim = spec.head_dim;
        let positions: Vec<i64> = (0..limits.context as i64).collect();
        let (cos, sin) = rope.rows(&positions);
        let vectors = |kind: &str| -> Result<[Kernel; 4]> {
            let shared = device.shared_memory.min(VECTOR_SHARED.1);
            let one = |rows: usize| modules.kernel("gemv.cu", &format!("gemv_{kind}_r{rows}"), shared);
            Ok([one(1)?, one(2)?, one(4)?, one(8)?])
        };
        let blocks = decode_blocks(device);
        let group_blocks = shape.kv_heads * (spec.heads / shape.kv_heads).div_ceil(DECODE_HEADS);
        let counters = device.allocate(2 * limits.sequences * group_blocks * 4, "counters of attention")?;
        counters.fill(0)?;
        Ok(Ops {
            spec: spec.clone(),
            embed_bf16: plain("embed.cu", "embed_bf16")?,
            embed_f32: plain("embed.cu", "embed_f32")?,
            embed_halves: plain("embed.cu", "embed_halves")?,
            add_norm: plain("norm.cu", "add_norm")?,
            rope_append: plain("rope_append.cu", &format!("rope_append_{kv}"))?,
            write_rows: plain("kv_rows.cu", &format!("write_rows_{kv}"))?,
            swiglu: [plain("swiglu.cu", "swiglu")?, plain("swiglu.cu", "swiglu_bf16")?],
            split: plain("split.cu", "split")?,
            merge: plain("merge.cu", "merge")?,
            vectors: Vectors { norm: vectors("norm")?, add: vectors("add")?, swiglu: vectors("swiglu")? },
            vectors_f32: [
                plain("gemv.cu", "gemv_f32w_norm")?,
                plain("gemv.cu", "gemv_f32w_add")?,
                plain("gemv.cu", "gemv_f32w_swiglu")?,
            ],
            attention_decode: tuned
                .then(|| modules.kernel("attention_decode.cu", &format!("attention_decode_d{dim}"), DECODE_SHARED))
                .transpose()?,
            attention_prefill: tuned.then(|| Prefill::new(device, modules, dim)).transpose()?,
            attention_merge: plain("attention_merge.cu", "attention_merge")?,
            attention_any: plain("attention_any.cu", &format!("attention_any_{kv}"))?,
            repair: RepairKernels::new(&plain, kv, tuned.then_some(dim))?,
            cos: device.upload(&cos, "the table of rotations")?,
            sin: device.upload(&sin, "the table of rotations")?,
            partial: device.allocate(blocks * 16 * (dim + 2) * 4, "partial states of attention")?,
            counters,
            extent: device.allocate(12, "where a run lies")?,
            device: Arc::clone(device),
        })
    }

    pub(crate) fn embed(&self, tokens: u64, table: &Matrix, x: &Memory, n: usize) -> Result<()> {
        let (shape, width) = (Shape::new(n, THREADS), table.inputs);
        let kernel = match table.format {
            Format::Bf16 => self.embed_bf16,
            Format::F32 => self.embed_f32,
            Format::Halves => {
                let arguments = arguments![tokens, &table.memory, table.low().unwrap_or(0), x, n, width];
                return self.device.launch(self.embed_halves, shape, arguments);
            }
        };
        self.device.launch(kernel, shape, arguments![tokens, &table.memory, x, n, width])
    }

    /// Picks rows (numbers at the address `rows`) of a matrix.
    pub(crate) fn rows(&self, rows: u64, from: &Memory, to: &Memory, n: usize, width: usize) -> Result<()> {
        self.device.launch(self.embed_f32, Shape::new(n, THREADS), arguments![rows, from, to, n, width])
    }

    /// `x += pending`, and the RMS norm of it.
    pub(crate) fn add_norm(&self, from: &Residual<'_>, weight: &Memory, out: NormOut<'_>, n: usize) -> Result<()> {
        let (parts, count, bias) = from.pending.map_or((None, 0, None), |p| (Some(p.parts), p.count, p.bias));
        let (plain, split, split_parts) = match out {
            NormOut::Nowhere => (None, None, 0),
            NormOut::F32(memory) => (Some(memory), None, 0),
            NormOut::Split(memory, parts) => (None, Some(memory), parts),
        };
        let (eps, width) = (self.spec.norm_eps, self.spec.hidden);
        let arguments =
            arguments![from.x, parts, count, bias, weight, eps, plain, split, split_parts, from.rows, n, width];
        // Few rows are hurried by more threads each.
        let each = if n > self.device.multiprocessors { 16 } else { 4 };
        let threads = width.div_ceil(each).next_multiple_of(32).min(1024);
        self.device.launch(self.add_norm, Shape::new(n, threads), arguments)
    }

    /// Rotates queries to the workspace; rotates keys and writes them with the values to the pages.
    pub(crate) fn rope_append(&self, model: &CudaModel, layer: usize, batch: &Batch, qkv: Qkv<'_>) -> Result<()> {
        let (w, spec, l) = (&model.workspace, &self.spec, &model.weights.layers[layer]);
        let tap = |memory| batch.tapped.then_some(memory);
        let arguments = arguments![
            &w.qkv,
            qkv.parts,
            qkv.bias,
            l.q_norm.as_ref(),
            l.k_norm.as_ref(),
            spec.norm_eps,
            &self.cos,
            &self.sin,
            batch.positions(),
            batch.table_of(),
            batch.table(0),
            batch.stride,
            batch.first(),
            model.pool.layer(layer),
            batch.rows,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            &w.q,
            tap(&w.keys),
            tap(&w.values),
        ];
        let blocks = (spec.heads + 2 * spec.kv_heads).div_ceil(BLOCK_HEADS);
        let shape = Shape { grid: (blocks, batch.rows.min(GRID_ROWS)), ..Shape::new(1, THREADS) };
        self.device.launch(self.rope_append, shape, arguments)
    }

    pub(crate) fn split(&self, x: u64, out: &Memory, parts: usize, n: usize, width: usize) -> Result<()> {
        let shape = Shape::new((n * width).div_ceil(4 * THREADS), THREADS);
        self.device.launch(self.split, shape, arguments![x, out, parts, n, width])
    }

    /// `[n, 2 width]` gates and ups in parts, of f32 or rounded to bf16, to `[n, width]`.
    pub(crate) fn swiglu(
        &self,
        gate_up: &Memory,
        (parts, rounded): (usize, bool),
        bias: Option<&Memory>,
        out: Activated<'_>,
        n: usize,
        width: usize,
    ) -> Result<()> {
        let (plain, split, split_parts) = match out {
            Activated::F32(memory) => (Some(memory), None, 0),
            Activated::Split(memory, parts) => (None, Some(memory), parts),
        };
        let shape = Shape { grid: (width.div_ceil(4 * THREADS), n.min(GRID_ROWS)), ..Shape::new(1, THREADS) };
        let arguments = arguments![gate_up, parts, bias, plain, split, split_parts, n, width];
        self.device.launch(self.swiglu[usize::from(rounded)], shape, arguments)
    }

    /// `y = W norm(x) + bias`; without a norm's weight, of `x` as it is.
    pub(crate) fn vector_product(
        &self,
        x: u64,
        norm: Option<&Memory>,
        matrix: &Matrix,
        bias: Option<&Memory>,
        y: &Memory,
        n: usize,
    ) -> Result<()> {
        let Matrix { outputs, inputs, .. } = *matrix;
        let arguments = arguments![x, norm, self.spec.norm_eps, &matrix.memory, bias, y, n, inputs, outputs];
        let (kernel, shape) = self.vector_kernel(&self.vectors.norm, 0, matrix, n, outputs);
        self.device.launch(kernel, shape, arguments)
    }

    /// `y += W x + bias`.
    pub(crate) fn vector_add(
        &self,
        x: &Memory,
        matrix: &Matrix,
        bias: Option<&Memory>,
        y: &Memory,
        n: usize,
    ) -> Result<()> {
        let Matrix { outputs, inputs, .. } = *matrix;
        let arguments = arguments![x, &matrix.memory, bias, y, n, inputs, outputs];
        let (kernel, shape) = self.vector_kernel(&self.vectors.add, 1, matrix, n, outputs);
        self.device.launch(kernel, shape, arguments)
    }

    /// `y = silu(gate) * up` of the norm of `x`, for stacked gates and ups.
    pub(crate) fn vector_swiglu(
        &self,
        x: &Memory,
        norm: &Memory,
        matrix: &Matrix,
        bias: Option<&Memory>,
        y: &Memory,
        n: usize,
    ) -> Result<()> {
        let (inputs, width) = (matrix.inputs, matrix.outputs / 2);
        let arguments = arguments![x, norm, self.spec.norm_eps, &matrix.memory, bias, y, n, inputs, width];
        let (kernel, shape) = self.vector_kernel(&self.vectors.swiglu, 2, matrix, n, width);
        self.device.launch(kernel, shape, arguments)
    }

    /// The kernel for `n` rows of this matrix's format, and its launch for so many outputs.
    fn vector_kernel(
        &self,
        bf16: &[Kernel; 4],
        kind: usize,
        matrix: &Matrix,
        n: usize,
        outputs: usize,
    ) -> (Kernel, Shape) {
        if matrix.format == Format::F32 {
            let shape = Shape { grid: (outputs.div_ceil(8), n), ..Shape::new(1, THREADS) };
            return (self.vectors_f32[kind], shape);
        }
        debug_assert!(matrix.format == Format::Bf16 && n <= VECTOR_ROWS);
        let size = [1, 2, 4, 8].iter().position(|rows| *rows >= n).unwrap_or(3);
        let shared = vector_shared(n, matrix.inputs).min(self.device.shared_memory);
        (bf16[size], Shape { shared, ..Shape::new(self.device.multiprocessors, THREADS) })
    }

    /// Attention of a span of rows over their runs, to `out` and `lse` of the workspace.
    pub(crate) fn attend(
        &self,
        model: &CudaModel,
        layer: usize,
        batch: &Batch,
        span: &Span,
        to: (&Memory, &Memory),
    ) -> Result<()> {
        let (spec, kv) = (&self.spec, model.pool.layer(layer));
        let rows = span.rows();
        let row = |memory: &Memory, width: usize| memory.at::<f32>(rows.start * width);
        let (heads, kv_heads, dim) = (spec.heads, spec.kv_heads, spec.head_dim);
        let q = row(&model.workspace.q, heads * dim);
        let (out, lse) = (row(to.0, heads * dim), row(to.1, heads));
        let positions = batch.positions() + 4 * rows.start as u64;
        let tables = |array: u64| array + 4 * rows.start as u64;
        match (span, self.attention_decode, &self.attention_prefill) {
            (Span::Decode { window, .. }, Some(kernel), _) => {
                let arguments = arguments![
                    q,
                    kv,
                    batch.table(rows.start),
                    batch.stride,
                    tables(batch.first()),
                    tables(batch.start()),
                    tables(batch.end()),
                    positions,
                    rows.len(),
                    heads,
                    kv_heads,
                    *window,
                    model.scale,
                    out,
                    lse,
                    &self.partial,
                    &self.counters,
                ];
                let blocks = decode_blocks(&self.device);
                let shape = Shape { shared: DECODE_SHARED, ..Shape::new(blocks, DECODE_THREADS) };
                self.device.launch(kernel, shape, arguments)
            }
            (Span::Prefill { table, extent, window, .. }, _, Some(kernel)) => {
                let rows = PrefillRows {
                    q,
                    positions,
                    rows: rows.len(),
                    table: batch.table(*table),
                    extent: *extent,
                    heads,
                    kv_heads,
                    dim,
                    window: *window,
                    scale: model.scale,
                    parts: model.parts_of(batch),
                    out,
                    lse,
                };
                kernel.attend(&self.device, self.attention_merge, kv, &rows)
            }
            (Span::Decode { window, .. } | Span::Prefill { window, .. }, _, _) => {
                let table_of = match span {
                    Span::Decode { .. } => batch.table_of() + 4 * rows.start as u64,
                    Span::Prefill { .. } => model.workspace.zeros.address(),
                };
                // One table for all rows: `zeros` names its first entry.
                let (base, [first, start, end]) = match span {
                    Span::Decode { .. } => (0, [batch.first(), batch.start(), batch.end()]),
                    Span::Prefill { table, extent, .. } => {
                        let Extent { first, start, end } = *extent;
                        self.extent.write(0, &[first, start, end].map(|position| position as i32))?;
                        (*table, [0, 1, 2].map(|i| self.extent.at::<i32>(i)))
                    }
                };
                let arguments = arguments![
                    q,
                    positions,
                    table_of,
                    kv,
                    batch.table(base),
                    batch.stride,
                    first,
                    start,
                    end,
                    rows.len(),
                    heads,
                    kv_heads,
                    dim,
                    *window,
                    model.scale,
                    out,
                    lse,
                ];
                self.device.launch(self.attention_any, Shape::new(rows.len() * heads, DECODE_THREADS), arguments)
            }
        }
    }

    /// Merges the second state of some rows into the first.
    pub(crate) fn merge(&self, model: &CudaModel, rows: &Range<usize>) -> Result<()> {
        let (w, spec) = (&model.workspace, &self.spec);
        let state = |memory: &Memory| memory.at::<f32>(rows.start * spec.heads * spec.head_dim);
        let lse = |memory: &Memory| memory.at::<f32>(rows.start * spec.heads);
        let count = rows.len() * spec.heads;
        let arguments =
            arguments![state(&w.attention), lse(&w.lse), state(&w.other), lse(&w.other_lse), count, spec.head_dim];
        self.device.launch(self.merge, Shape::new(count.div_ceil(8), THREADS), arguments)
    }
}

/// Blocks of `attention_decode.cu`: one a multiprocessor.
pub(super) fn decode_blocks(device: &Device) -> usize {
    device.multiprocessors
}

/// Least and most dynamic shared memory of `gemv.cu`. With the least no two of its blocks, nor one of them and one of decode
/// attention, are on a multiprocessor together, so that every one gets the same work (docs/notes/cuda-kernels-linear.md).
const VECTOR_SHARED: (usize, usize) = (118_784, 212_992);

/// Rows that `gemv.cu` takes at most on this GPU.
pub(super) fn vector_rows(device: &Device) -> usize {
    let fits = |n: &usize| vector_ring(*n) + 16_384 * n <= device.shared_memory;
    (1..=VECTOR_ROWS).rev().find(fits).unwrap_or(1)
}

/// Bytes of the ring of weights in `gemv.cu`.
fn vector_ring(n: usize) -> usize {
    if n <= 4 { 49_152 } else { 65_536 }
}

/// Dynamic shared memory of `gemv.cu`: its ring of weights, and the activations as far as they fit.
fn vector_shared(n: usize, inputs: usize) -> usize {
    let (least, most) = VECTOR_SHARED;
    (vector_ring(n) + 8192 * n * inputs.div_ceil(2048)).clamp(least, most)
}
