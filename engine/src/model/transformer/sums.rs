//! What the tokens of chunks attend while a prompt is read: a by-product, from attention's log-sum-exp.

use std::ops::Range;

use super::Transformer;
use crate::attention::dense::Queries;
use crate::attention::within::{Region, add_within};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Batch, CudaModel, Memory};
use crate::error::{EngineError, Result};
use crate::kv::dense::DenseKv;
use crate::kv::device::DeviceRun;

/// Sums of attention weights by token, over heads and all layers but the last, which nobody waits for.
pub(crate) struct ChunkSums {
    /// Each token is in one at most.
    own: Vec<Region>,
    /// What all of them pay to the prompt's prefix, where there is one.
    prefix: Option<Region>,
    tokens: usize,
    sums: Sums,
}

/// `[2 (own, prefix)][tokens]`
enum Sums {
    Host(Vec<f32>),
    Device(Memory),
}

impl ChunkSums {
    /// For a prompt of a prefix and chunks behind each other, read from its beginning on.
    pub(crate) fn new(model: &Transformer, prefix: usize, chunks: &[usize]) -> Result<ChunkSums> {
        let mut start = prefix;
        let mut own = Vec::with_capacity(chunks.len());
        for tokens in chunks {
            let chunk = start..start + tokens;
            start = chunk.end;
            own.push(Region { tokens: chunk.clone(), keys: chunk });
        }
        let behind = Region { tokens: prefix..start, keys: 0..prefix };
        let sums = match model.device() {
            None => Sums::Host(vec![0.0; 2 * start]),
            Some(device) => Sums::Device(device.within_sums(2 * start)?),
        };
        let prefix = (prefix > 0 && start > prefix).then_some(behind);
        Ok(ChunkSums { own, prefix, tokens: start, sums })
    }

    /// The regions, each with where the sums of the token at position 0 would be.
    fn regions(&self) -> impl Iterator<Item = (&Region, usize)> {
        self.own.iter().map(|region| (region, 0)).chain(self.prefix.iter().map(|region| (region, self.tokens)))
    }

    /// Adds what some tokens, one behind the other, pay in a layer, on the host.
    pub(crate) fn add(&mut self, cpu: &Cpu, kv: &DenseKv, queries: &Queries<'_>, lse: &[f32]) {
        let Some(first) = queries.positions.first().copied() else { return };
        let regions: Vec<(Region, usize)> = self.regions().map(|(region, at)| (region.clone(), at)).collect();
        let Sums::Host(sums) = &mut self.sums else { return };
        for (region, at) in regions {
            let paid = &mut sums[at + first..at + first + queries.positions.len()];
            add_within(cpu, kv, queries, lse, &region, paid);
        }
    }

    /// The same of the rows in a GPU's workspace, which are the last tokens of a run of pages.
    pub(crate) fn add_on_device(
        &self,
        model: &CudaModel,
        layer: usize,
        batch: &Batch,
        rows: &Range<usize>,
        run: &DeviceRun,
    ) -> Result<()> {
        let Sums::Device(sums) = &self.sums else { return Ok(()) };
        let first = run.positions().end - rows.len();
        for (region, at) in self.regions() {
            let of = region.rows(first, rows.len(), model.spec.sliding_window);
            if !of.is_empty() {
                let part = rows.start + of.start..rows.start + of.end;
                let paid = sums.at::<f32>(at + first + of.start);
                model.add_within(layer, batch, part, run, &region.keys, paid)?;
            }
        }
        Ok(())
    }

    /// Shares of all attention, by chunk and token: what stays within the chunk, and what goes to the prefix.
    pub(crate) fn finish(self, model: &Transformer) -> Result<[Vec<Vec<f32>>; 2]> {
        let sums = match (self.sums, model.device()) {
            (Sums::Host(sums), _) => sums,
            (Sums::Device(sums), Some(device)) => device.read_within(&sums, 2 * self.tokens)?,
            (Sums::Device(_), None) => {
                return Err(EngineError::Internal("attention on a GPU with a model on the CPU".into()));
            }
        };
        let all = (model.spec.heads * (model.spec.layers - 1).max(1)) as f32;
        let shares = |at: usize| {
            let chunk = |region: &Region| {
                sums[at + region.tokens.start..at + region.tokens.end].iter().map(|sum| sum / all).collect()
            };
            self.own.iter().map(chunk).collect()
        };
        Ok([shares(0), shares(self.tokens)])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::super::{Piece, Want};
    use super::*;

    /// Read in steps that end within chunks, the shares are those of one step; they are shares, and the first chunk of a prompt
    /// without a prefix keeps all to itself.
    #[test]
    fn shares_do_not_depend_on_the_steps_and_add_up() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden/llama2");
        let model = Transformer::load_dir(&dir, 2, None).unwrap();
        let tokens: Vec<u32> = (0..90).map(|i| (i * 7 + 3) % 50).collect();
        let read = |prefix: usize, step: usize| {
            let chunks = [30, 1, 90 - 31 - prefix];
            let mut sums = ChunkSums::new(&model, prefix, &chunks).unwrap();
            let mut kv = model.new_kv();
            for part in tokens.chunks(step) {
                let piece = Piece::exact(&mut kv, part, Want::Nothing);
                model.forward(&mut [Piece { sums: Some(&mut sums), ..piece }]).unwrap();
            }
            sums.finish(&model).unwrap()
        };
        for prefix in [0, 4] {
            let [own, before] = read(prefix, 90);
            let [parts, parts_before] = read(prefix, 13);
            let pairs = |a: &[Vec<f32>], b: &[Vec<f32>]| {
                a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
            };
            assert!(pairs(&own, &parts) < 1e-4 && pairs(&before, &parts_before) < 1e-4);
            for (own, before) in own.iter().flatten().zip(before.iter().flatten()) {
                assert!(*own > 0.0 && *before >= 0.0 && own + before < 1.0 + 1e-4, "{own} {before}");
            }
            for (own, before) in own[0].iter().zip(&before[0]) {
                assert!((own + before - 1.0).abs() < 1e-4, "there is nothing else before the first chunk");
            }
            assert!(own[2][0] + before[2][0] < 0.999, "the third chunk attends the others");
        }
    }
}
