//! Exact attention over a [`DenseKv`]: blocked online softmax on the CPU.
//!
//! A tile is some query tokens of one KV head's group of query heads, so that a block of K and V read
//! once serves them all. Memory grows with the tile and the block, never with the square of the
//! length. Scores are kept in units of log2 (FlashAttention-2, arXiv 2307.08691, algorithm 1).

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::state::{AttentionState, merge_row};
#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::amx;
#[cfg(target_arch = "x86_64")]
use crate::backend::cpu::micro::for_tiles;
use crate::backend::cpu::micro::{Product, Steps, product};
use crate::backend::cpu::pool::Shards;
use crate::backend::cpu::simd::{LANES, MASKED, Simd, simd_dispatch};
use crate::backend::cpu::{Cpu, Isa};
use crate::kv::dense::DenseKv;
use crate::kv::page::{KvElement, PAGE};
use crate::kv::{KvDtype, KvShape};

/// Keys of a block; divides a page.
const BLOCK: usize = 128;
/// Tokens whose values are fetched ahead of their use.
const VALUES_AHEAD: usize = 32;
/// Query rows (tokens times heads of a group) of a tile, a multiple of the register kernel's 12.
const TILE_ROWS: usize = 48;
/// The same for matrix tiles, which want pairs of sixteen.
const TILES_ROWS: usize = 96;

/// Queries of some tokens, of all heads.
#[derive(Clone, Copy)]
pub(crate) struct Queries<'a> {
    /// `[tokens, heads, head_dim]`, rotated to their positions.
    pub q: &'a [f32],
    /// Position of each token, ascending. A token sees itself and what lies before it.
    pub positions: &'a [usize],
    pub heads: usize,
    /// Softmax scale.
    pub scale: f32,
    /// Each token sees only itself and the `window - 1` tokens before it.
    pub window: Option<usize>,
}

impl Queries<'_> {
    pub(crate) fn rows(&self) -> usize {
        self.positions.len() * self.heads
    }

    /// Positions that a token sees.
    pub(super) fn visible(&self, token: usize) -> Range<usize> {
        let end = self.positions[token] + 1;
        end.saturating_sub(self.window.unwrap_or(end))..end
    }
}

/// Attention of `queries` over the tokens of `kv` that they may see. Rows are `[tokens, heads]`.
pub(crate) fn attend(cpu: &Cpu, kv: &DenseKv, queries: &Queries<'_>) -> AttentionState {
    let dim = kv.shape().head_dim;
    let mut state = AttentionState::empty(queries.rows(), dim);
    let run = kv.positions();
    let Some(last) = queries.positions.last().filter(|_| !run.is_empty()) else { return state };
    let lowest = queries.visible(0).start.max(run.start);
    let keys = lowest - lowest % BLOCK..run.end.min(last + 1);
    if keys.is_empty() {
        return state;
    }
    let plan = Plan::new(cpu, kv.shape(), queries, keys.len());
    let mut parts: Vec<AttentionState> = (1..plan.splits).map(|_| AttentionState::empty(queries.rows(), dim)).collect();
    {
        let out: Vec<_> = std::iter::once(&mut state)
            .chain(&mut parts)
            .map(|s| (Shards::new(&mut s.out), Shards::new(&mut s.lse)))
            .collect();
        cpu.pool.run(plan.tasks(), |task| {
            let (tile, split) = (task / plan.splits, task % plan.splits);
            let (head, tokens) = plan.tile(tile);
            let share = plan.share(&keys, split);
            let job = Job { kv, queries, head, tokens, keys: share, out: &out[split] };
            match kv.shape().dtype {
                KvDtype::F32 => simd_dispatch!(cpu.isa, tile_f32, &Job<'_>, &job),
                KvDtype::Bf16 => simd_dispatch!(cpu.isa, tile_bf16, &Job<'_>, &job),
            }
        });
    }
    for (row, out) in state.out.chunks_exact_mut(dim).enumerate() {
        for part in &parts {
            merge_row(out, &mut state.lse[row], &part.out[row * dim..(row + 1) * dim], part.lse[row]);
        }
    }
    state
}

/// How the work is cut: by KV head, by query tokens and, where those are few, by keys.
struct Plan {
    kv_heads: usize,
    tokens: usize,
    tile_tokens: usize,
    splits: usize,
}

impl Plan {
    fn new(cpu: &Cpu, shape: &KvShape, queries: &Queries<'_>, keys: usize) -> Plan {
        let group = queries.heads / shape.kv_heads;
        let tokens = queries.positions.len();
        let tile_rows = if cpu.isa == Isa::Amx && shape.dtype == KvDtype::Bf16 { TILES_ROWS } else { TILE_ROWS };
        let tile_tokens = (tile_rows / group).max(1);
        let tiles = shape.kv_heads * tokens.div_ceil(tile_tokens);
        let threads = cpu.pool.threads();
        // One tile a thread is enough when they are alike; a split costs a merge.
        let splits = if tiles.is_multiple_of(threads) { 1 } else { (2 * threads).div_ceil(tiles) };
        Plan { kv_heads: shape.kv_heads, tokens, tile_tokens, splits: splits.clamp(1, keys.div_ceil(2 * BLOCK)) }
    }

    fn tasks(&self) -> usize {
        self.kv_heads * self.tokens.div_ceil(self.tile_tokens) * self.splits
    }

    /// The KV head and the query tokens of a tile. The last tokens come first: they see most.
    fn tile(&self, tile: usize) -> (usize, Range<usize>) {
        let tiles = self.tokens.div_ceil(self.tile_tokens);
        let first = (tiles - 1 - tile / self.kv_heads) * self.tile_tokens;
        (tile % self.kv_heads, first..self.tokens.min(first + self.tile_tokens))
    }

    /// The keys of a split, cut at blocks.
    fn share(&self, keys: &Range<usize>, split: usize) -> Range<usize> {
        let blocks = keys.len().div_ceil(BLOCK);
        let at = |i: usize| (keys.start + blocks * i / self.splits * BLOCK).min(keys.end);
        at(split)..at(split + 1)
    }
}

struct Job<'a> {
    kv: &'a DenseKv,
    queries: &'a Queries<'a>,
    head: usize,
    tokens: Range<usize>,
    /// Positions; starts at a block.
    keys: Range<usize>,
    out: &'a (Shards<'a, f32>, Shards<'a, f32>),
}

#[inline(always)]
unsafe fn tile_f32<S: Simd>(job: &Job<'_>) {
    // SAFETY: the caller is compiled for `S`.
    unsafe { Tile::<f32>::new(job).run::<S>() }
}

#[inline(always)]
unsafe fn tile_bf16<S: Simd>(job: &Job<'_>) {
    // SAFETY: the caller is compiled for `S`.
    unsafe { Tile::<bf16>::new(job).run::<S>() }
}

/// The working set of one tile.
struct Tile<'a, E> {
    job: &'a Job<'a>,
    rows: usize,
    dim: usize,
    /// `[rows, dim]`, scaled to log2 units.
    q: Vec<f32>,
    /// The same, split for matrix tiles.
    #[cfg(target_arch = "x86_64")]
    q_tiles: amx::Packed,
    element: PhantomData<E>,
    /// Visible positions of each row.
    visible: Vec<Range<usize>>,
    /// `[rows, BLOCK]`; turned into weights in place.
    scores: Vec<f32>,
    /// `[rows, dim]`
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

impl<'a, E: KvElement> Tile<'a, E> {
    fn new(job: &'a Job<'a>) -> Tile<'a, E> {
        let (queries, dim) = (job.queries, job.kv.shape().head_dim);
        let group = queries.heads / job.kv.shape().kv_heads;
        let rows = job.tokens.len() * group;
        let mut q = vec![0.0; rows * dim];
        let mut visible = Vec::with_capacity(rows);
        let scale = queries.scale * std::f32::consts::LOG2_E;
        for (i, token) in job.tokens.clone().enumerate() {
            let run = job.kv.positions();
            let seen = queries.visible(token);
            for g in 0..group {
                let row = i * group + g;
                let from = (token * queries.heads + job.head * group + g) * dim;
                for d in 0..dim {
                    q[row * dim + d] = queries.q[from + d] * scale;
                }
                visible.push(seen.start.max(run.start)..seen.end.min(run.end));
            }
        }
        Tile {
            job,
            rows,
            dim,
            q,
            #[cfg(target_arch = "x86_64")]
            q_tiles: amx::Packed::default(),
            element: PhantomData,
            visible,
            scores: vec![0.0; rows * BLOCK],
            out: vec![0.0; rows * dim],
            max: vec![f32::NEG_INFINITY; rows],
            sum: vec![0.0; rows],
        }
    }

    #[inline(always)]
    unsafe fn run<S: Steps<E>>(mut self) {
        #[cfg(target_arch = "x86_64")]
        if S::TILES && E::DTYPE == KvDtype::Bf16 {
            // SAFETY: `q` has `rows` rows of `dim`; tiles are there where `S` says so.
            unsafe { self.q_tiles.fill(self.q.as_ptr(), self.rows, self.dim, self.dim) }
        }
        let last = self.visible.iter().map(|v| v.end).max().unwrap_or(0);
        let first = self.visible.iter().map(|v| v.start).min().unwrap_or(0);
        let keys = self.job.keys.clone();
        let mut block = keys.start;
        while block < keys.end.min(last) {
            let end = keys.end.min(last).min(block + BLOCK);
            if end > first {
                // SAFETY: the block lies in one page of the run; the caller is compiled for `S`.
                unsafe { self.block::<S>(block, end) }
            }
            block += BLOCK;
        }
        self.finish();
    }

    /// Attends the keys `block..end`.
    #[inline(always)]
    unsafe fn block<S: Steps<E>>(&mut self, block: usize, end: usize) {
        let (shape, dim) = (self.job.kv.shape(), self.dim);
        let (k, v) = self.job.kv.page(block).head::<E>(shape, self.job.head);
        let slot = block % PAGE;
        let groups = (end - block).div_ceil(LANES);
        let scores = Product {
            rows: self.rows,
            groups,
            steps: dim / E::STEP,
            a: self.q.as_ptr(),
            a_stride: dim,
            b: k[slot * dim..].as_ptr(),
            b_step: LANES * E::STEP,
            b_group: LANES * dim,
            c: self.scores.as_mut_ptr(),
            c_stride: BLOCK,
            accumulate: false,
            // The next four groups, one tile of the register kernel.
            ahead: 4 * LANES * dim,
        };
        // SAFETY: the block's slots lie inside the page; all buffers have `rows` rows.
        unsafe { self.q_product::<S>(&scores) };
        for row in 0..self.rows {
            // SAFETY: the caller is compiled for `S`.
            unsafe { self.soften::<S>(row, block, groups * LANES) }
        }
        let values = Product {
            rows: self.rows,
            groups: dim / LANES,
            steps: groups * LANES / E::STEP,
            a: self.scores.as_ptr(),
            a_stride: BLOCK,
            b: v[slot * dim..].as_ptr(),
            b_step: dim * E::STEP,
            b_group: LANES * E::STEP,
            c: self.out.as_mut_ptr(),
            c_stride: dim,
            accumulate: true,
            ahead: VALUES_AHEAD * dim,
        };
        // SAFETY: as above; `dim` is a multiple of 16.
        unsafe { product::<S, E>(&values) };
    }

    /// QK^T. For matrix tiles, the queries were split once for all blocks.
    #[inline(always)]
    unsafe fn q_product<S: Steps<E>>(&self, p: &Product<E>) {
        #[cfg(target_arch = "x86_64")]
        if let Some(p) = for_tiles::<S, E>(p) {
            // SAFETY: the caller's extents; `run` has split the queries.
            return unsafe { amx::product_packed(&self.q_tiles, p) };
        }
        // SAFETY: the caller's extents.
        unsafe { product::<S, E>(p) }
    }

    /// Turns a row's scores into weights relative to its running maximum.
    #[inline(always)]
    unsafe fn soften<S: Steps<E>>(&mut self, row: usize, block: usize, width: usize) {
        let seen = self.visible[row].clone();
        let (lo, hi) = (seen.start.saturating_sub(block).min(width), seen.end.saturating_sub(block).min(width));
        let at = row * BLOCK;
        if lo >= hi {
            self.scores[at..at + width].fill(0.0);
            return;
        }
        self.scores[at..at + lo].fill(MASKED);
        self.scores[at + hi..at + width].fill(MASKED);
        // SAFETY: a row of BLOCK lanes, `width` a multiple of 16 up to BLOCK; the caller is compiled for `S`.
        unsafe {
            let scores = self.scores.as_mut_ptr().add(at);
            let mut top = S::splat(self.max[row]);
            for i in (0..width).step_by(LANES) {
                top = S::max(top, S::load(scores.add(i)));
            }
            let max = S::maximum(top);
            if max > self.max[row] {
                self.rescale(row, (self.max[row] - max).exp2());
                self.max[row] = max;
            }
            let base = S::splat(max);
            let mut sum = S::zero();
            for i in (0..width).step_by(LANES) {
                let x = S::sub(S::load(scores.add(i)), base);
                // Beside values of bf16 the cheaper function is exact enough.
                let p = if E::DTYPE == KvDtype::Bf16 { S::exp2_weight(x) } else { S::exp2(x) };
                sum = S::add(sum, p);
                S::store(scores.add(i), p);
            }
            self.sum[row] += S::sum(sum);
        }
    }

    #[inline(always)]
    fn rescale(&mut self, row: usize, factor: f32) {
        self.sum[row] *= factor;
        self.out[row * self.dim..(row + 1) * self.dim].iter_mut().for_each(|x| *x *= factor);
    }

    fn finish(self) {
        let (queries, dim) = (self.job.queries, self.dim);
        let group = queries.heads / self.job.kv.shape().kv_heads;
        for row in 0..self.rows {
            if self.sum[row] == 0.0 {
                continue;
            }
            let (token, g) = (self.job.tokens.start + row / group, row % group);
            let to = token * queries.heads + self.job.head * group + g;
            // SAFETY: each row belongs to one tile and each split has its own state.
            let (out, lse) =
                unsafe { (self.job.out.0.part(to * dim..(to + 1) * dim), self.job.out.1.part(to..to + 1)) };
            let scale = 1.0 / self.sum[row];
            out.iter_mut().zip(&self.out[row * dim..(row + 1) * dim]).for_each(|(x, y)| *x = y * scale);
            lse[0] = (self.max[row] + self.sum[row].log2()) * std::f32::consts::LN_2;
        }
    }
}

#[cfg(test)]
#[path = "dense_tests.rs"]
mod tests;
