//! Attention of many rows of one sequence: the kernel, and how its work is divided among a GPU's multiprocessors.

use std::sync::Arc;

use super::batch::Extent;
use super::device::{Device, Memory};
use super::launch::{Shape, arguments};
use super::module::{Kernel, Modules, PREFILL, PREFILL_HOPPER};
use crate::error::Result;

/// Threads of a block of `attention_prefill.cu` and `attention_merge.cu`.
const ATTENTION_THREADS: usize = 128;

/// Prefill attention: the kernel with its launch, and room for partial states.
pub(super) struct Prefill {
    kernel: Kernel,
    /// Rows (tokens times heads of a group) of a block, with activations in one part and in two.
    block_rows: [usize; 2],
    threads: usize,
    shared: usize,
    /// Blocks that a multiprocessor has at a time.
    resident: usize,
    partial: Memory,
    partial_lse: Memory,
}

/// Into how many parts, `most` at most, the keys of `blocks` blocks are divided where `slots` blocks run at a time. A last wave of
/// blocks that fills few slots takes as long as a full one, so that the fewest parts are chosen which take about as long as the
/// best.
fn key_parts(slots: usize, blocks: usize, most: usize) -> usize {
    /// More is not worth the merging.
    const MOST: usize = 32;
    /// What one part more must bring.
    const WORTH: f64 = 1.08;
    let candidates = 1..=most.clamp(1, MOST);
    // In times of an undivided block.
    let time = |parts: usize| (blocks * parts).div_ceil(slots.max(1)) as f64 / parts as f64;
    let best = candidates.clone().map(time).fold(f64::INFINITY, f64::min);
    candidates.clone().find(|parts| time(*parts) <= WORTH * best).unwrap_or(1)
}

/// Numbers of the partial states of prefill attention, and keys that are not worth dividing.
const PREFILL_PARTIAL: usize = 16 << 20;
const PREFILL_PART_KEYS: usize = 1024;

impl Prefill {
    /// For heads of `dim`, 64 or 128.
    pub(super) fn new(device: &Arc<Device>, modules: &Modules, dim: usize) -> Result<Prefill> {
        let name = format!("attention_prefill_d{dim}");
        let hopper = modules.has(PREFILL_HOPPER);
        let (file, shared) = if hopper { (PREFILL_HOPPER, 1536 * dim) } else { (PREFILL, 768 * dim) };
        Ok(Prefill {
            kernel: modules.kernel(file, &name, shared)?,
            block_rows: if hopper { [192, 192] } else { [128, 64] },
            threads: if hopper { 512 } else { ATTENTION_THREADS },
            shared,
            resident: if hopper { 1 } else { 2 },
            partial: device.allocate(PREFILL_PARTIAL * 4, "partial states of attention")?,
            partial_lse: device.allocate(PREFILL_PARTIAL / dim * 4, "partial states of attention")?,
        })
    }

    /// Parts that the keys of a launch with so many blocks are divided into, so that the GPU is filled.
    fn parts(&self, device: &Device, blocks: usize, numbers: usize, keys: usize) -> usize {
        let most = (keys / PREFILL_PART_KEYS).min(PREFILL_PARTIAL / numbers.max(1));
        key_parts(self.resident * device.multiprocessors, blocks, most)
    }

    /// Attention of rows over a run. `merge`: the kernel for where the keys are divided among several blocks.
    pub(super) fn attend(&self, device: &Device, merge: Kernel, kv: &Memory, of: &PrefillRows) -> Result<()> {
        let PrefillRows { rows, heads, kv_heads, dim, extent, out, lse, .. } = *of;
        let blocks = kv_heads * (rows * (heads / kv_heads)).div_ceil(self.block_rows[of.parts - 1]);
        let parts = self.parts(device, blocks, rows * heads * dim, extent.end - extent.start);
        let (to_out, to_lse) = match parts {
            1 => (out, lse),
            _ => (self.partial.address(), self.partial_lse.address()),
        };
        let arguments = arguments![
            of.q,
            of.positions,
            kv,
            of.table,
            extent.first,
            extent.start,
            extent.end,
            rows,
            heads,
            kv_heads,
            of.window,
            of.scale,
            i32::from(of.parts == 2),
            to_out,
            to_lse,
        ];
        let shape = Shape { grid: (blocks, parts), block: self.threads, shared: self.shared, early: true };
        device.launch(self.kernel, shape, arguments)?;
        if parts == 1 {
            return Ok(());
        }
        let count = rows * heads;
        let shape = Shape::new(count.div_ceil(4), ATTENTION_THREADS);
        device.launch(merge, shape, arguments![to_out, to_lse, parts, count, dim, out, lse])
    }
}

/// Rows of one sequence that attend its run; addresses and sizes as the kernels have them.
pub(super) struct PrefillRows {
    pub(super) q: u64,
    pub(super) positions: u64,
    pub(super) rows: usize,
    pub(super) table: u64,
    pub(super) extent: Extent,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) window: usize,
    pub(super) scale: f32,
    /// bf16 parts of queries and weights.
    pub(super) parts: usize,
    pub(super) out: u64,
    pub(super) lse: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_divided_where_a_last_wave_would_fill_few_multiprocessors() {
        // One block a multiprocessor, and none left over: whole.
        assert_eq!([132, 264, 1320].map(|blocks| key_parts(132, blocks, 8)), [1; 3]);
        // 176 blocks are two waves, 528 thirds of them four.
        assert_eq!((key_parts(132, 176, 2), key_parts(132, 176, 8)), (2, 3));
        // Few blocks are divided until there is one for each.
        assert_eq!((key_parts(132, 16, 128), key_parts(132, 16, 5), key_parts(132, 1, 500)), (8, 5, 30));
        // Nothing to divide, or no room for parts.
        assert_eq!((key_parts(132, 16, 0), key_parts(132, 0, 4)), (1, 1));
    }
}
