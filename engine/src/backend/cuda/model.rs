//! A model on a GPU: weights, kernels, workspace, and the pool of KV pages.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::batch::{self, Batch, lay_out, tables_of};
use super::copies::Copies;
use super::device::{Device, Memory};
use super::gemm::Gemm;
use super::graph::{Graphs, rounded};
use super::host_work::HostWork;
use super::module::Modules;
use super::ops::{Ops, vector_rows};
use super::sample::{NO_TOKEN, Rows, Sampling};
use super::weights::DeviceWeights;
use crate::backend::cpu::Cpu;
use crate::error::{EngineError, Result};
use crate::kv::KvShape;
use crate::kv::device::{DevicePool, PAGE};
use crate::model::rope::RopeTable;
use crate::model::spec::ModelSpec;
use crate::model::transformer::Piece;
use crate::sampler::{Choice, Sampled};
use crate::tiers::DeviceArena;
use crate::weights::Weights;

/// Rows whose logits are computed at a time.
pub(crate) const LOGIT_ROWS: usize = 64;

/// Settings of the CUDA backend.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CudaConfig {
    /// Which GPU, from 0.
    pub ordinal: usize,
    /// Bytes of device memory that may be used; 0: most of what is free.
    pub memory_budget_bytes: u64,
    /// Where compiled kernels are kept; `None`: nowhere.
    pub kernel_cache: Option<PathBuf>,
    /// Round activations to bf16 before products of many rows, as is common, instead of keeping 16 of their bits in two
    /// bf16 numbers. Prefill is then up to twice as fast, and answers may differ from the CPU's.
    pub fast_prefill: bool,
    /// Only kernels that run on every card, also where there are faster ones: to compare with.
    pub portable: bool,
}

/// What every launch of a forward pass needs.
pub(crate) struct CudaModel {
    pub(crate) device: Arc<Device>,
    pub(crate) spec: ModelSpec,
    pub(crate) shape: KvShape,
    /// Softmax scale.
    pub(crate) scale: f32,
    pub(crate) weights: DeviceWeights,
    pub(crate) ops: Ops,
    pub(crate) gemm: Gemm,
    pub(crate) sampling: Sampling,
    pub(crate) workspace: Workspace,
    pub(crate) pool: Arc<DevicePool>,
    /// Memory for chunks that are used often; `None`: there is none.
    pub(crate) chunks: Option<Arc<DeviceArena>>,
    /// Rows up to which the matrix-vector kernels are used.
    pub(crate) vector_rows: usize,
    /// Whether activations are rounded to bf16 where prompts are read.
    pub(crate) fast_prefill: bool,
    /// After a replayed graph: its rows and parts of logits, `rows << 8 | parts`; else 0.
    pub(crate) head_done: AtomicUsize,
    /// Where the last batch's bans lie.
    pub(crate) banned: AtomicU64,
    graphs: Mutex<Graphs>,
    copies: Mutex<Copies>,
}

/// Memory for intermediate results, for at most `rows` rows.
pub(crate) struct Workspace {
    pub(crate) rows: usize,
    /// Sequences of a batch, each with at most two tables.
    pub(crate) tables: usize,
    /// Page ids of a table.
    pub(crate) stride: usize,
    /// The arrays of a [`Batch`].
    pub(crate) inputs: Memory,
    /// Residual stream, `[rows, hidden]` f32, as all that follow unless said otherwise.
    pub(crate) x: Memory,
    /// `[parts][rows][(heads + 2 kv_heads) * head_dim]`
    pub(crate) qkv: Memory,
    /// `[rows][heads][head_dim]`, rotated.
    pub(crate) q: Memory,
    /// `[rows][kv_heads][head_dim]`, not rotated, rounded to the KV format.
    pub(crate) keys: Memory,
    pub(crate) values: Memory,
    /// Cached keys and values on their way to the pages, in the KV format: room for `[2][rows][kv_heads][head_dim]` f32 each.
    pub(crate) cached: [Memory; 2],
    /// `[rows][heads][head_dim]` and `[rows][heads]`.
    pub(crate) attention: Memory,
    pub(crate) lse: Memory,
    /// A second state, to be merged.
    pub(crate) other: Memory,
    pub(crate) other_lse: Memory,
    /// `[parts][rows][widest input but the MLP's]` bf16.
    pub(crate) split: Memory,
    /// `[parts][rows][hidden]`
    pub(crate) product: Memory,
    /// `[parts][rows][2 * intermediate]`
    pub(crate) gate_up: Memory,
    /// `[parts][rows][intermediate]` bf16.
    pub(crate) split_hidden: Memory,
    /// `[8][intermediate]`, or of all rows for f32 weights.
    pub(crate) hidden: Memory,
    /// `[rows][hidden]`, normed.
    pub(crate) finals: Memory,
    /// `[parts][LOGIT_ROWS][vocab]`
    pub(crate) logits: Memory,
    /// `[rows]` zeros.
    pub(crate) zeros: Memory,
}

impl Workspace {
    fn new(device: &Arc<Device>, spec: &ModelSpec, rows: usize, sequences: usize, context: usize) -> Result<Workspace> {
        let take = |numbers: usize, size: usize| device.allocate(numbers * size, "the workspace of a step");
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let (tables, stride) = (2 * sequences, context.div_ceil(PAGE));
        Ok(Workspace {
            rows,
            tables,
            stride,
            inputs: take(batch::integers(rows, tables, stride), 4)?,
            x: take(rows * spec.hidden, 4)?,
            qkv: take(2 * rows * (q + 2 * kv), 4)?,
            q: take(rows * q, 4)?,
            keys: take(rows * kv, 4)?,
            values: take(rows * kv, 4)?,
            cached: [take(2 * rows * kv, 4)?, take(2 * rows * kv, 4)?],
            attention: take(rows * q, 4)?,
            lse: take(rows * spec.heads, 4)?,
            other: take(rows * q, 4)?,
            other_lse: take(rows * spec.heads, 4)?,
            split: take(2 * rows * spec.hidden.max(q), 2)?,
            product: take(2 * rows * spec.hidden, 4)?,
            gate_up: take(4 * rows * spec.intermediate, 4)?,
            split_hidden: take(2 * rows * spec.intermediate, 2)?,
            hidden: take(rows * spec.intermediate, 4)?,
            finals: take(rows * spec.hidden, 4)?,
            logits: take(2 * LOGIT_ROWS * spec.vocab, 4)?,
            zeros: device.upload(&vec![0i32; rows], "the workspace of a step")?,
        })
    }
}

/// Bytes to leave beside the KV of `left` bytes for blending, which goes over a whole context at a time: residual streams of
/// all its tokens and of those that are recomputed, and their numbers; where cached ones go; what a question pays to each, and
/// which of them are corrected. No context is longer than the pages reach.
fn blend_bytes(spec: &ModelSpec, shape: KvShape, context: usize, left: u64) -> u64 {
    /// The driver rounds allocations up.
    const SLACK: u64 = 4 << 20;
    let token = (2 * (spec.hidden * 4 + 4) + 2 * spec.kv_heads * 4 + 12 + 16) as u64;
    let tokens = (left.saturating_sub(SLACK) / (token + shape.token_bytes() as u64)).min(context as u64);
    (tokens * token + SLACK).min(left)
}

/// Widest head that the kernels serve (`attention_any.cu`, `rope_append.cu`, `kv_rows.cu`).
const MOST_HEAD_DIM: usize = 256;

fn check_head_dim(head_dim: usize) -> Result<()> {
    if head_dim <= MOST_HEAD_DIM && head_dim.is_multiple_of(16) {
        return Ok(());
    }
    Err(EngineError::Unsupported {
        what: "head dimension on a GPU",
        found: head_dim.to_string(),
        supported: format!("multiples of 16 up to {MOST_HEAD_DIM}"),
        advice: "Set the device to `cpu`, which serves any multiple of 16",
    })
}

/// Sizes that a [`CudaModel`] is made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Rows of a step.
    pub(crate) rows: usize,
    /// Sequences of a step.
    pub(crate) sequences: usize,
    /// Tokens of a sequence.
    pub(crate) context: usize,
    /// Bytes of KV; 0: whatever the device has left.
    pub(crate) kv_bytes: u64,
    /// Bytes for chunks that are used often; `None`: a sixteenth of what is left for KV.
    pub(crate) chunk_bytes: Option<u64>,
}

impl CudaModel {
    /// Opens the GPU, compiles or loads the kernels, and brings the weights over.
    ///
    /// # Errors
    /// [`EngineError::NoDevice`], [`EngineError::Kernel`], [`EngineError::OutOfMemory`], [`EngineError::Unsupported`] for heads
    /// that no kernel serves, and what is wrong with the weights.
    pub(crate) fn load(
        config: &CudaConfig,
        spec: &ModelSpec,
        shape: KvShape,
        scale: f32,
        rope: &RopeTable,
        weights: &Weights,
        limits: Limits,
    ) -> Result<CudaModel> {
        let limits = Limits { sequences: rounded(limits.sequences), ..limits };
        let device = Device::open(config.ordinal, config.memory_budget_bytes)?;
        check_head_dim(spec.head_dim)?;
        // Kernels are read or compiled while weights are copied.
        let (modules, loaded) = std::thread::scope(|scope| {
            let modules = scope.spawn(|| Modules::load(&device, config.kernel_cache.as_deref(), config.portable));
            let loaded = device.bind().and_then(|()| DeviceWeights::load(&device, weights, spec));
            let lost = || EngineError::Internal("the thread that loads kernels panicked".into());
            (modules.join().map_err(|_| lost()), loaded)
        });
        let (modules, weights) = (modules??, loaded?);
        let gemm = Gemm::new(&device)?;
        let rows = limits.rows.max(limits.sequences).max(LOGIT_ROWS);
        let workspace = Workspace::new(&device, spec, rows, limits.sequences, limits.context)?;
        let graphs = Graphs::new(&device, batch::integers(limits.sequences, limits.sequences, workspace.stride))?;
        let copies = Copies::new(&device, rows * shape.width() * size_of::<f32>())?;
        let ops = Ops::new(&device, &modules, spec, shape, rope, limits)?;
        let sampling = Sampling::new(&device, &modules, spec, config.portable)?;
        let (budget, used) = device.memory();
        let left = budget.saturating_sub(used);
        let left = left - blend_bytes(spec, shape, limits.context, left);
        let chunk_bytes = limits.chunk_bytes.unwrap_or(left / 16).min(left);
        let chunks = match chunk_bytes {
            0 => None,
            bytes => Some(DeviceArena::new(device.allocate(bytes as usize, "chunks that are used often")?)),
        };
        let left = left - chunk_bytes;
        let kv_bytes = if limits.kv_bytes > 0 { limits.kv_bytes.min(left) } else { left };
        let pool = DevicePool::new(&device, shape, kv_bytes)?;
        tracing::info!(
            gpu = device.name,
            kernels_compiled = modules.compiled,
            kernels_from_disk = modules.cached,
            kv_bytes,
            chunk_bytes,
            "the model is on the GPU"
        );
        Ok(CudaModel {
            spec: spec.clone(),
            shape,
            scale,
            weights,
            ops,
            gemm,
            sampling,
            workspace,
            pool,
            chunks,
            vector_rows: vector_rows(&device),
            fast_prefill: config.fast_prefill,
            head_done: AtomicUsize::new(0),
            banned: AtomicU64::new(0),
            graphs: Mutex::new(graphs),
            copies: Mutex::new(copies),
            device,
        })
    }

    /// Appends the tokens of all pieces, whose final states are then in the workspace until the next call, in the order of the
    /// pieces. Returns how many.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] when the pages do not suffice; no piece has then changed.
    pub(crate) fn forward(&self, cpu: &Cpu, pieces: &mut [Piece<'_>]) -> Result<usize> {
        self.device.bind()?;
        self.check(pieces)?;
        self.reserve(pieces)?;
        if let Some(size) = self.repeats(pieces) {
            return self.graphs.lock().unwrap_or_else(PoisonError::into_inner).step(self, size, pieces);
        }
        let batch = self.lay_out(pieces, 0);
        batch.upload(&self.workspace.inputs)?;
        self.head_done.store(0, Ordering::Relaxed);
        self.layers(&batch, Some(&mut HostWork::new(self, cpu, pieces)))?;
        self.banned.store(batch.banned(), Ordering::Relaxed);
        Ok(batch.wanted)
    }

    /// What goes on beside the kernels.
    pub(crate) fn copies(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `padded`: rows to fill up to; 0: none.
    pub(crate) fn lay_out(&self, pieces: &[Piece<'_>], padded: usize) -> Batch {
        lay_out(pieces, self.spec.sliding_window, padded, self.workspace.stride, &self.workspace.inputs)
    }

    /// # Errors
    /// Tokens outside of the vocabulary, and batches that the workspace is too small for.
    fn check(&self, pieces: &[Piece<'_>]) -> Result<()> {
        pieces.iter().try_for_each(|p| self.check_vocabulary(p.tokens))?;
        let (rows, tables) = (pieces.iter().map(|p| p.tokens.len()).sum::<usize>(), tables_of(pieces));
        if rows > self.workspace.rows || tables > self.workspace.tables {
            return Err(EngineError::Internal(format!(
                "a step of {rows} rows and {tables} tables, room for {} and {}",
                self.workspace.rows, self.workspace.tables
            )));
        }
        Ok(())
    }

    pub(crate) fn check_vocabulary(&self, tokens: &[u32]) -> Result<()> {
        match tokens.iter().find(|t| **t as usize >= self.spec.vocab) {
            None => Ok(()),
            Some(token) => Err(EngineError::InvalidRequest(format!(
                "token id: expected below the model's vocabulary of {}, found {token}",
                self.spec.vocab
            ))),
        }
    }

    /// Gives every piece's run the pages for its tokens.
    fn reserve(&self, pieces: &mut [Piece<'_>]) -> Result<()> {
        let needed: usize =
            pieces.iter().map(|p| p.kv.device().map_or(0, |kv| kv.recent.missing(p.tokens.len()))).sum();
        self.pool.check(needed)?;
        for piece in pieces {
            let end = piece.kv.len() + piece.tokens.len();
            piece.kv.extend_to(end)?;
        }
        Ok(())
    }

    /// The size of the graph, where the batch has a shape that comes again with every token: one token a sequence, nothing on
    /// the host.
    fn repeats(&self, pieces: &[Piece<'_>]) -> Option<usize> {
        let same = |p: &Piece<'_>| p.repeats() && p.kv.device().is_some_and(|kv| kv.sinks.is_none());
        pieces.iter().all(same).then(|| Graphs::size(self, pieces.len())).flatten()
    }

    /// Bytes of KV that all sequences together may have.
    pub(crate) fn kv_bytes(&self) -> u64 {
        (self.pool.pages().0 * self.pool.page_bytes()) as u64
    }

    /// Logits of the last forward pass's wanted rows, `[rows, vocab]`.
    pub(crate) fn logits(&self, rows: usize) -> Result<Vec<f32>> {
        self.device.bind()?;
        let vocab = self.spec.vocab;
        let mut all = vec![0.0; rows * vocab];
        for (i, block) in all.chunks_mut(LOGIT_ROWS * vocab).enumerate() {
            let rows = block.len() / vocab;
            let parts = self.head(i * LOGIT_ROWS, rows)?;
            self.read_logits(parts, rows, 0..rows, block)?;
        }
        Ok(all)
    }

    /// Reads logits of some of the `rows` rows that the head was last run for.
    fn read_logits(&self, parts: usize, rows: usize, range: std::ops::Range<usize>, out: &mut [f32]) -> Result<()> {
        let vocab = self.spec.vocab;
        self.workspace.logits.read(range.start * vocab, out)?;
        if parts == 2 {
            let mut low = vec![0.0; out.len()];
            self.workspace.logits.read((rows + range.start) * vocab, &mut low)?;
            out.iter_mut().zip(&low).for_each(|(x, low)| *x += low);
        }
        Ok(())
    }

    fn read_row(&self, parts: usize, rows: usize, row: usize) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; self.spec.vocab];
        self.read_logits(parts, rows, row..row + 1, &mut logits)?;
        Ok(logits)
    }

    /// What follows each of the last forward pass's wanted rows: a token that is chosen here, or logits.
    pub(crate) fn next(&self, choices: &[Choice]) -> Result<Vec<Next>> {
        self.device.bind()?;
        let mut all = Vec::with_capacity(choices.len());
        for (i, block) in choices.chunks(LOGIT_ROWS).enumerate() {
            let banned = self.banned.load(Ordering::Relaxed) + 4 * (i * LOGIT_ROWS) as u64;
            // A replayed graph has been through the head already.
            let (parts, rows, chosen) = match self.head_done.swap(0, Ordering::Relaxed) {
                0 => {
                    let parts = self.head(i * LOGIT_ROWS, block.len())?;
                    self.sampling.choose(self.last_logits(parts, block.len(), banned))?;
                    let mut chosen = vec![0; 3 * LOGIT_ROWS];
                    self.sampling.chosen.read(0, &mut chosen)?;
                    (parts, block.len(), chosen)
                }
                done => {
                    self.device.synchronize()?;
                    let graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
                    (done & 0xff, done >> 8, graphs.chosen().to_vec())
                }
            };
            // Drawing adjusts them.
            let mut kept = Vec::with_capacity(block.len());
            for (row, choice) in block.iter().enumerate() {
                let logits = choice.wants_logits().then(|| self.read_row(parts, rows, row)).transpose()?;
                kept.push((choice.of_token(), logits));
            }
            let drawn = self.sampling.draw(self.last_logits(parts, rows, banned), block)?;
            self.take_block(parts, rows, &chosen, &drawn, kept, &mut all)?;
        }
        Ok(all)
    }

    /// Logits that the head was last run for.
    pub(crate) fn last_logits(&self, parts: usize, rows: usize, banned: u64) -> Rows<'_> {
        Rows { logits: &self.workspace.logits, parts, rows, banned }
    }

    /// `rows` rows of logits in `parts` parts, of which the first are those of `choices`; with the logits of some as they were.
    fn take_block(
        &self,
        parts: usize,
        rows: usize,
        chosen: &[u32],
        drawn: &[u32],
        choices: Vec<(&Choice, Option<Vec<f32>>)>,
        all: &mut Vec<Next>,
    ) -> Result<()> {
        for (row, (choice, kept)) in choices.into_iter().enumerate() {
            let bad = chosen[2 * LOGIT_ROWS + row] != 0;
            // Bad logits go to the host too, which says what is wrong with them.
            let from = match choice {
                Choice::Greedy => Some(chosen),
                Choice::Draw(_) => Some(drawn),
                Choice::Logits | Choice::WithLogits(_) => None,
            };
            if let (Some(from), false) = (from.filter(|from| from[row] != NO_TOKEN), bad) {
                let logprob = f32::from_bits(from[LOGIT_ROWS + row]);
                let sampled = Sampled { id: from[row], logprob };
                all.push(kept.map_or(Next::Token(sampled), |logits| Next::TokenOf(sampled, logits)));
            } else {
                all.push(Next::Logits(kept.map_or_else(|| self.read_row(parts, rows, row), Ok)?));
            }
        }
        Ok(())
    }
}

/// What follows a row.
pub(crate) enum Next {
    Token(Sampled),
    /// A token, and the raw logits that it was chosen from.
    TokenOf(Sampled, Vec<f32>),
    Logits(Vec<f32>),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_no_kernel_serves_are_refused_by_name() {
        assert!([16, 48, 64, 80, 96, 128, 256].into_iter().all(|dim| check_head_dim(dim).is_ok()));
        let refused = check_head_dim(272).unwrap_err();
        assert!(
            matches!(refused, EngineError::Unsupported { .. }) && refused.to_string().contains("found 272"),
            "{refused}"
        );
        assert!(check_head_dim(40).is_err());
    }
}
