//! Blending by the question, on the GPU: what its tokens attend, and the correction of what stays cached.

use std::ops::Range;

use super::batch::{Batch, Extent, Span};
use super::device::Memory;
use super::launch::{Shape, arguments};
use super::model::CudaModel;
use super::module::Kernel;
use super::ops::{BLOCK_HEADS, GRID_ROWS, THREADS};
use crate::blend::PRIOR;
use crate::error::{EngineError, Result};
use crate::kv::device::{DeviceRun, PAGE};
use crate::kv::sequence::SequenceKv;

/// The kernels of `attention_paid.cu`, or `attention_paid_mma.cu`, and `kv_shift.cu`.
pub(crate) struct RepairKernels {
    paid: Kernel,
    within: Kernel,
    sums: Kernel,
    shifts: Kernel,
    shift: Kernel,
}

impl RepairKernels {
    /// `kernel`: finds one in a file; `kv`: the suffix of those for the KV format; `tuned`: the heads' dimension, where the matrix
    /// unit's kernels serve it.
    pub(super) fn new(
        kernel: &dyn Fn(&str, &str) -> Result<Kernel>,
        kv: &str,
        tuned: Option<usize>,
    ) -> Result<RepairKernels> {
        Ok(RepairKernels {
            paid: match tuned {
                Some(dim) => kernel("attention_paid_mma.cu", &format!("attention_paid_d{dim}"))?,
                None => kernel("attention_paid.cu", &format!("attention_paid_{kv}"))?,
            },
            within: kernel("attention_paid.cu", "attention_within")?,
            sums: kernel("kv_shift.cu", &format!("kv_sums_{kv}"))?,
            shifts: kernel("kv_shift.cu", "kv_shifts")?,
            shift: kernel("kv_shift.cu", &format!("kv_shift_{kv}"))?,
        })
    }
}

/// Rows of a context that are recomputed and rows that stay cached, with what the correction of a layer needs.
pub(crate) struct ShiftRows {
    /// Page ids of the context.
    table: Memory,
    first: usize,
    groups: usize,
    /// Positions of the recomputed rows, and where each group's end.
    chosen: Memory,
    ends: Memory,
    /// Positions of the rows that stay, and the group of each.
    stale: Memory,
    group_of: Memory,
    stays: usize,
    /// `[groups][2][kv_heads][head_dim]`, before and after; the shifts go over those before.
    before: Memory,
    after: Memory,
    /// `[layers][2 * kv_heads][2]`, of the layers that were corrected.
    deviations: Memory,
    corrected: Vec<usize>,
}

impl CudaModel {
    /// Zeros for [`add_paid`](Self::add_paid), over a context of so many tokens.
    pub(crate) fn paid_sums(&self, context: usize) -> Result<Memory> {
        self.device.bind()?;
        let sums = self.device.allocate(2 * self.spec.kv_heads * context * 4, "the attention that a question pays")?;
        sums.fill(0)?;
        Ok(sums)
    }

    /// Adds what the rows `part` of the batch that was last attended pay to the first `context` tokens of its only sequence;
    /// with `last`, also apart what the last of them pays.
    pub(crate) fn add_paid(
        &self,
        layer: usize,
        batch: &Batch,
        part: Range<usize>,
        last: bool,
        context: usize,
        sums: &Memory,
    ) -> Result<()> {
        let [Span::Prefill { extent: Extent { first, .. }, window, .. }] = &batch.spans[..] else {
            return Err(EngineError::Internal("a question behind several contexts".into()));
        };
        let (w, spec) = (&self.workspace, &self.spec);
        let half = spec.kv_heads * context;
        let arguments = arguments![
            w.q.at::<f32>(part.start * spec.heads * spec.head_dim),
            w.lse.at::<f32>(part.start * spec.heads),
            batch.positions() + 4 * part.start as u64,
            batch.table(0),
            *first,
            self.pool.layer(layer),
            part.len(),
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            context,
            *window,
            self.scale,
            if last { sums.address() } else { 0 },
            sums.at::<f32>(half),
        ];
        let shape = Shape { grid: (context.div_ceil(PAGE), spec.kv_heads), ..Shape::new(1, THREADS) };
        self.device.launch(self.ops.repair.paid, shape, arguments)
    }

    /// Zeros for [`add_within`](Self::add_within).
    pub(crate) fn within_sums(&self, tokens: usize) -> Result<Memory> {
        self.device.bind()?;
        let sums = self.device.allocate(tokens * 4, "the attention that tokens pay")?;
        sums.fill(0)?;
        Ok(sums)
    }

    /// Adds what the rows `part` of the batch that was last attended, which are of the sequence with this run, pay to the tokens
    /// at the positions `keys`, heads summed, to the f32 numbers at the address `sums`, one a row. Each row must see a key.
    pub(crate) fn add_within(
        &self,
        layer: usize,
        batch: &Batch,
        part: Range<usize>,
        run: &DeviceRun,
        keys: &Range<usize>,
        sums: u64,
    ) -> Result<()> {
        let of = batch.spans.iter().find_map(|span| match span {
            // Row i has table i.
            Span::Decode { rows, window } if rows.contains(&part.start) => Some((part.start, *window)),
            Span::Prefill { rows, table, window, .. } if rows.contains(&part.start) => Some((*table, *window)),
            _ => None,
        });
        let Some((table, window)) = of else {
            return Err(EngineError::Internal("rows that are in no span of their batch".into()));
        };
        let extent = Extent::from(run);
        let extent = Extent { start: extent.start.max(keys.start), end: extent.end.min(keys.end), ..extent };
        if extent.start >= extent.end {
            return Ok(());
        }
        let (w, heads) = (&self.workspace, self.spec.heads);
        let span = Span::Prefill { rows: part.clone(), table, extent, window };
        self.ops.attend(self, layer, batch, &span, (&w.other, &w.other_lse))?;
        let [within, all] = [&w.other_lse, &w.lse].map(|lse| lse.at::<f32>(part.start * heads));
        let shape = Shape::new(part.len().div_ceil(THREADS / 32), THREADS);
        self.device.launch(self.ops.repair.within, shape, arguments![within, all, part.len(), heads, sums])
    }

    /// What was added up.
    pub(crate) fn read_within(&self, sums: &Memory, tokens: usize) -> Result<Vec<f32>> {
        self.device.bind()?;
        let mut all = vec![0.0f32; tokens];
        sums.read(0, &mut all)?;
        Ok(all)
    }

    /// What the last token and what all have paid to each token of the context.
    pub(crate) fn read_paid(&self, sums: &Memory, context: usize) -> Result<[Vec<f32>; 2]> {
        self.device.bind()?;
        let mut all = vec![0.0f32; 2 * self.spec.kv_heads * context];
        sums.read(0, &mut all)?;
        let total = |heads: &[f32]| {
            let mut total = vec![0.0; context];
            for head in heads.chunks_exact(context.max(1)) {
                total.iter_mut().zip(head).for_each(|(sum, x)| *sum += x);
            }
            total
        };
        let (last, question) = all.split_at(all.len() / 2);
        Ok([total(last), total(question)])
    }

    /// Brings over which rows of a context are recomputed and which stay: see `blend::correct`.
    pub(crate) fn shift_rows(
        &self,
        kv: &SequenceKv,
        chosen: &[usize],
        ends: &[usize],
        stale: &[usize],
        group_of: &[usize],
    ) -> Result<ShiftRows> {
        self.device.bind()?;
        let here =
            kv.device().ok_or_else(|| EngineError::Internal("a context on the CPU was given to a GPU".into()))?;
        let what = "the correction of a context";
        let upload = |numbers: &[usize]| {
            let numbers: Vec<i32> = numbers.iter().map(|n| *n as i32).collect();
            self.device.upload(&numbers, what)
        };
        let pages: Vec<usize> = here.recent.pages().map(|page| page as usize).collect();
        let sums = ends.len() * 2 * self.shape.width() * 4;
        Ok(ShiftRows {
            table: upload(&pages)?,
            first: here.recent.first(),
            groups: ends.len(),
            chosen: upload(chosen)?,
            ends: upload(ends)?,
            stale: upload(stale)?,
            group_of: upload(group_of)?,
            stays: stale.len(),
            before: self.device.allocate(sums, what)?,
            after: self.device.allocate(sums, what)?,
            deviations: self.device.allocate(self.shape.layers * self.shape.kv_heads * 4 * 4, what)?,
            corrected: Vec::new(),
        })
    }

    fn shift_sums(&self, layer: usize, rows: &ShiftRows, sums: &Memory) -> Result<()> {
        let (ops, shape) = (&self.ops, &self.shape);
        let arguments = arguments![
            &ops.cos,
            &ops.sin,
            &rows.chosen,
            &rows.ends,
            &rows.table,
            rows.first,
            self.pool.layer(layer),
            shape.kv_heads,
            shape.head_dim,
            sums,
        ];
        let launch = Shape { grid: (rows.groups, 2 * shape.kv_heads), ..Shape::new(1, THREADS) };
        self.device.launch(ops.repair.sums, launch, arguments)
    }

    /// Adds up the rows that will be recomputed, as they are cached.
    pub(crate) fn shift_before(&self, layer: usize, rows: &ShiftRows) -> Result<()> {
        self.device.bind()?;
        self.shift_sums(layer, rows, &rows.before)
    }

    /// Adds up the rows that were recomputed and shifts the others.
    pub(crate) fn shift_after(&self, layer: usize, rows: &mut ShiftRows, by_chunk: bool) -> Result<()> {
        self.device.bind()?;
        self.shift_sums(layer, rows, &rows.after)?;
        let (ops, shape) = (&self.ops, &self.shape);
        let deviation = rows.deviations.at::<f32>(layer * shape.kv_heads * 4);
        let means = arguments![
            &rows.before,
            &rows.after,
            &rows.ends,
            rows.groups,
            i32::from(by_chunk),
            PRIOR as f32,
            shape.kv_heads,
            shape.head_dim,
            &rows.before,
            deviation,
        ];
        self.device.launch(ops.repair.shifts, Shape::new(2 * shape.kv_heads, THREADS), means)?;
        let arguments = arguments![
            &ops.cos,
            &ops.sin,
            &rows.stale,
            &rows.group_of,
            &rows.table,
            rows.first,
            self.pool.layer(layer),
            rows.stays,
            shape.kv_heads,
            shape.head_dim,
            &rows.before,
        ];
        let grid = (shape.kv_heads.div_ceil(BLOCK_HEADS), rows.stays.min(GRID_ROWS));
        self.device.launch(ops.repair.shift, Shape { grid, ..Shape::new(1, THREADS) }, arguments)?;
        rows.corrected.push(layer);
        Ok(())
    }

    /// Of each layer that was corrected, |mean difference|^2 over |mean fresh|^2.
    pub(crate) fn shift_deviations(&self, rows: &ShiftRows) -> Result<Vec<f64>> {
        self.device.bind()?;
        let heads = 2 * self.shape.kv_heads;
        let mut all = vec![0.0f32; self.shape.layers * heads * 2];
        rows.deviations.read(0, &mut all)?;
        let of_layer = |layer: &usize| {
            let pairs = all[layer * heads * 2..(layer + 1) * heads * 2].chunks_exact(2);
            let (changed, size) =
                pairs.fold((0.0, 0.0), |(a, b), pair| (a + f64::from(pair[0]), b + f64::from(pair[1])));
            changed / size.max(f64::MIN_POSITIVE)
        };
        Ok(rows.corrected.iter().map(of_layer).collect())
    }
}
