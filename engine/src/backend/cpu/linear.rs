//! Linear layers: `y = x W^T (+ b)` with weights in bf16 or f32, and f32 inputs.
//!
//! bf16 weights stay bf16 in memory, where their bytes decide the speed of decoding, and are widened in registers.

use half::bf16;

use super::micro::{Element, Product, Steps, product};
use super::pool::Shards;
use super::simd::{LANES, Simd, simd_dispatch};
use super::{Cpu, Isa};
use crate::weights::{Dtype, Tensor};

/// Rows of a task, a multiple of the register kernel's 12.
const ROW_BLOCK: usize = 96;
/// Rows of a task of matrix tiles: four tiles.
const TILES_ROW_BLOCK: usize = 64;
/// Groups of sixteen outputs of a task.
const GROUP_BLOCK: usize = 16;
/// Inner steps (pairs) of a pass: a panel of 32 outputs stays in L1.
const STEP_BLOCK: usize = 128;
/// Inner steps that weights are fetched ahead of their use.
const STEPS_AHEAD: usize = 32;

/// A linear layer's weights.
pub(crate) enum Linear {
    Bf16(Packed<bf16>),
    F32(Packed<f32>),
}

/// A matrix `[outputs, inputs]` laid out for the register kernel: `[outputs / 16][inputs / s][16][s]` with
/// `s` elements of a step, outputs padded with zeros to a multiple of 16.
pub(crate) struct Packed<E> {
    elements: Vec<E>,
    outputs: usize,
    inputs: usize,
}

impl Linear {
    /// Stacks matrices `[outputs_i, inputs]` by rows. All bf16 stays bf16; anything else becomes f32.
    pub(crate) fn new(cpu: &Cpu, parts: &[Tensor<'_>]) -> Linear {
        let inputs = parts[0].shape[1];
        if parts.iter().all(|t| t.dtype == Dtype::Bf16) && inputs.is_multiple_of(2) {
            let rows: Vec<&[u8]> = parts.iter().flat_map(|t| t.data.chunks_exact(2 * inputs)).collect();
            return Linear::Bf16(Packed::new(cpu, rows.len(), inputs, |row, i| {
                bf16::from_le_bytes([rows[row][2 * i], rows[row][2 * i + 1]])
            }));
        }
        let rows: Vec<f32> = parts.iter().flat_map(Tensor::to_f32).collect();
        Linear::F32(Packed::new(cpu, rows.len() / inputs, inputs, |row, i| rows[row * inputs + i]))
    }

    pub(crate) fn outputs(&self) -> usize {
        match self {
            Linear::Bf16(m) => m.outputs,
            Linear::F32(m) => m.outputs,
        }
    }

    /// Bytes that one pass over the weights reads.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Linear::Bf16(m) => m.elements.len() * 2,
            Linear::F32(m) => m.elements.len() * 4,
        }
    }

    /// Row `row` of the matrix: the embedding of a token when the matrix is one.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Linear::Bf16(m) => m.row(row, out),
            Linear::F32(m) => m.row(row, out),
        }
    }

    /// `y = x W^T`, or `y += x W^T` with `accumulate`. `x`: `[rows, inputs]`, `y`: `[rows, outputs]`.
    pub(crate) fn forward(&self, cpu: &Cpu, x: &[f32], y: &mut [f32], accumulate: bool) {
        match self {
            Linear::Bf16(m) => m.run(cpu, x, y, accumulate),
            Linear::F32(m) => m.run(cpu, x, y, accumulate),
        }
    }
}

impl<E: Element> Packed<E> {
    fn new(cpu: &Cpu, outputs: usize, inputs: usize, at: impl Fn(usize, usize) -> E + Sync) -> Packed<E> {
        let group = LANES * inputs;
        let groups = outputs.div_ceil(LANES);
        let mut elements = vec![E::default(); groups * group];
        let shards = Shards::new(&mut elements);
        cpu.pool.run(groups, |g| {
            // SAFETY: one part a group.
            let out = unsafe { shards.part(g * group..(g + 1) * group) };
            for row in g * LANES..outputs.min((g + 1) * LANES) {
                for i in 0..inputs {
                    out[within::<E>(row, i)] = at(row, i);
                }
            }
        });
        Packed { elements, outputs, inputs }
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        let group = &self.elements[row / LANES * LANES * self.inputs..];
        for (i, x) in out.iter_mut().enumerate() {
            *x = group[within::<E>(row, i)].to_f32();
        }
    }

    fn run(&self, cpu: &Cpu, a: &[f32], y: &mut [f32], accumulate: bool)
    where
        Packed<E>: BlockProduct<E>,
    {
        let (rows, groups) = (a.len() / self.inputs, self.outputs.div_ceil(LANES));
        let tiles = E::STEP == 2 && cpu.isa == Isa::Amx;
        let row_block = if tiles { TILES_ROW_BLOCK } else { ROW_BLOCK };
        let row_tasks = rows.div_ceil(row_block);
        // Few rows: the weights are read once, so the groups are shared out evenly among the threads. Tiles want whole
        // rows, so that a row is split into its two parts once.
        let group_block = if rows <= 16 || tiles {
            groups.div_ceil((2 * cpu.pool.threads()).div_ceil(row_tasks.max(1))).max(1)
        } else {
            GROUP_BLOCK
        };
        let group_tasks = groups.div_ceil(group_block);
        let out = Shards::new(y);
        cpu.pool.run(row_tasks * group_tasks, |t| {
            let (row, group) = (t % row_tasks * row_block, t / row_tasks * group_block);
            let rows = row..rows.min(row + row_block);
            let groups = group..groups.min(group + group_block);
            Self::block(cpu, &Block { matrix: self, a, rows, groups, out, accumulate });
        });
    }
}

/// Where in its group an element lies.
#[inline(always)]
fn within<E: Element>(row: usize, i: usize) -> usize {
    (i / E::STEP) * E::STEP * LANES + E::STEP * (row % LANES) + i % E::STEP
}

struct Block<'a, E> {
    matrix: &'a Packed<E>,
    a: &'a [f32],
    rows: std::ops::Range<usize>,
    groups: std::ops::Range<usize>,
    out: Shards<'a, f32>,
    accumulate: bool,
}

/// A block on the machine's instruction set.
trait BlockProduct<E> {
    fn block(cpu: &Cpu, block: &Block<'_, E>);
}

impl BlockProduct<bf16> for Packed<bf16> {
    fn block(cpu: &Cpu, block: &Block<'_, bf16>) {
        simd_dispatch!(cpu.isa, block_bf16, &Block<'_, bf16>, block);
    }
}

impl BlockProduct<f32> for Packed<f32> {
    fn block(cpu: &Cpu, block: &Block<'_, f32>) {
        simd_dispatch!(cpu.isa, block_f32, &Block<'_, f32>, block);
    }
}

#[inline(always)]
unsafe fn block_bf16<S: Simd>(b: &Block<'_, bf16>) {
    // SAFETY: the caller is compiled for `S`.
    unsafe { block_product::<S, bf16>(b) }
}

#[inline(always)]
unsafe fn block_f32<S: Simd>(b: &Block<'_, f32>) {
    // SAFETY: the caller is compiled for `S`.
    unsafe { block_product::<S, f32>(b) }
}

#[inline(always)]
unsafe fn block_product<S: Steps<E>, E: Element>(b: &Block<'_, E>) {
    let (width, outputs) = (b.matrix.inputs, b.matrix.outputs);
    let (rows, groups, steps) = (b.rows.len(), b.groups.len(), width / E::STEP);
    let lanes = groups * LANES;
    // The last group may be padded: it is computed beside and copied.
    let padded = b.groups.end * LANES > outputs;
    let mut beside = vec![0.0f32; if padded { rows * lanes } else { 0 }];
    let (c, c_stride) = if padded {
        (beside.as_mut_ptr(), lanes)
    } else {
        // SAFETY: blocks of rows and groups are disjoint; only their elements are touched below.
        (unsafe { b.out.part_ptr(b.rows.start * outputs + b.groups.start * LANES) }, outputs)
    };
    let step_block = if S::TILES { steps } else { STEP_BLOCK };
    for first in (0..steps).step_by(step_block) {
        let p = Product {
            rows,
            groups,
            steps: step_block.min(steps - first),
            a: b.a[b.rows.start * width + first * E::STEP..].as_ptr(),
            a_stride: width,
            b: b.matrix.elements[b.groups.start * LANES * width + first * E::STEP * LANES..].as_ptr(),
            b_step: E::STEP * LANES,
            b_group: LANES * width,
            c,
            c_stride,
            accumulate: first > 0 || (b.accumulate && !padded),
            ahead: STEPS_AHEAD * E::STEP * LANES,
        };
        // SAFETY: all extents lie inside the slices above.
        unsafe { product::<S, E>(&p) }
    }
    if padded {
        let width = outputs - b.groups.start * LANES;
        for (r, from) in beside.chunks_exact(lanes).enumerate() {
            let at = (b.rows.start + r) * outputs + b.groups.start * LANES;
            // SAFETY: these elements belong to this block alone.
            let to = unsafe { b.out.part(at..at + width) };
            for (y, x) in to.iter_mut().zip(from) {
                *y = if b.accumulate { *y + x } else { *x };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| (((i + 1) * 2_654_435_761 * (seed + 1)) >> 9) as u32 as f32 / 2f32.powi(31) - 1.0).collect()
    }

    fn tensor<'a>(bytes: &'a [u8], dtype: Dtype, shape: &'a [usize]) -> Tensor<'a> {
        Tensor { dtype, shape, data: bytes }
    }

    #[test]
    fn layers_agree_with_double_precision() {
        for isa in Isa::available() {
            let mut cpu = Cpu::new(2);
            cpu.isa = isa;
            for (outputs, inputs) in [(16, 8), (30, 64), (250, 64), (96, 1100)] {
                let w = values(outputs * inputs, 1);
                let bf: Vec<u8> = w.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect();
                let f: Vec<u8> = w.iter().flat_map(|x| x.to_le_bytes()).collect();
                let half = outputs / 2;
                let shapes = [[half, inputs], [outputs - half, inputs]];
                let parts = [
                    tensor(&bf[..half * inputs * 2], Dtype::Bf16, &shapes[0]),
                    tensor(&bf[half * inputs * 2..], Dtype::Bf16, &shapes[1]),
                ];
                let packed = Linear::new(&cpu, &parts);
                let plain = Linear::new(&cpu, &[tensor(&f, Dtype::F32, &[outputs, inputs])]);
                let mut row = vec![0.0; inputs];
                packed.row(outputs - 1, &mut row);
                assert_eq!(row[3], bf16::from_f32(w[(outputs - 1) * inputs + 3]).to_f32());
                for rows in [1, 2, 5, 13, 100] {
                    let x = values(rows * inputs, 2);
                    for (layer, rounded_w) in [(&packed, true), (&plain, false)] {
                        let r = |x: f32, yes: bool| f64::from(if yes { bf16::from_f32(x).to_f32() } else { x });
                        let mut y = vec![1.0; rows * outputs];
                        layer.forward(&cpu, &x, &mut y, true);
                        let mut alone = vec![f32::NAN; rows * outputs];
                        layer.forward(&cpu, &x, &mut alone, false);
                        for (i, (y, alone)) in y.iter().zip(&alone).enumerate() {
                            let (a, b) = (i / outputs * inputs, i % outputs * inputs);
                            let dot: f64 = (0..inputs).map(|k| f64::from(x[a + k]) * r(w[b + k], rounded_w)).sum();
                            for (found, what) in [(f64::from(*y) - 1.0, "added"), (f64::from(*alone), "alone")] {
                                let error = (found - dot).abs();
                                assert!(error < 2e-5 * (inputs as f64).sqrt(), "{isa:?}, {what}: {error}");
                            }
                        }
                    }
                }
            }
        }
    }
}
