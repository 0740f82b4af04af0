//! The forward pass, as the pieces that prefill, decode and blending drive in their own order.

mod sums;

use std::path::Path;

pub(crate) use self::sums::ChunkSums;
use super::layer::Layer;
use super::rope::{RopeTable, rotate_half};
use super::spec::ModelSpec;
use crate::attention::AttentionState;
use crate::attention::cold::{ColdStats, MakeIndex, make_index};
use crate::attention::dense::Queries;
use crate::backend::cpu::buffer::Buffer;
use crate::backend::cpu::linear::Linear;
use crate::backend::cpu::pool::Shards;
use crate::backend::cpu::{Cpu, Isa};
use crate::backend::cuda::{CudaConfig, CudaModel, Limits, Next};
use crate::config::{AttentionConfig, Strategy};
use crate::error::{EngineError, Result};
use crate::kv::dense::DenseKv;
use crate::kv::sequence::SequenceKv;
use crate::kv::{KvDtype, KvShape};
use crate::numerics::Activations;
use crate::sampler::Choice;
use crate::unwind::guarded;
use crate::weights::{Dtype, Weights};

/// A Llama-like model.
pub(crate) struct Transformer {
    pub(crate) spec: ModelSpec,
    pub(crate) shape: KvShape,
    /// Computes everything, or beside a GPU what strategies leave to the host.
    pub(crate) cpu: Cpu,
    rope: RopeTable,
    /// Softmax scale, with YaRN's attention factor (which transformers puts into cos and sin).
    scale: f32,
    body: Body,
    /// Builds indexes over cold keys; another one in tests.
    pub(crate) make_index: MakeIndex,
}

/// Where the weights are, and with them the arithmetic.
enum Body {
    Host(HostWeights),
    Device(Box<CudaModel>),
}

struct HostWeights {
    embedding: Linear,
    head: Option<Linear>,
    norm: Vec<f32>,
    layers: Vec<Layer>,
}

/// Final states of the rows that a forward pass was asked for.
pub(crate) enum States {
    /// `[rows, hidden]`
    Host(Vec<f32>),
    /// As many rows in the GPU's workspace, until the next forward pass.
    Device(usize),
}

/// Positions of some rows with their angles.
pub(crate) struct Rows {
    pub(crate) positions: Vec<usize>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rows {
    /// Row `i`'s cosines and sines.
    pub(crate) fn angles(&self, i: usize) -> (&[f32], &[f32]) {
        let half = self.cos.len() / self.positions.len();
        (&self.cos[i * half..(i + 1) * half], &self.sin[i * half..(i + 1) * half])
    }
}

/// Queries, keys and values of some rows in one layer.
pub(crate) struct Qkv {
    /// `[rows, heads, head_dim]`, rotated.
    pub(crate) q: Buffer,
    /// `[rows, kv_heads, head_dim]`, not rotated, rounded to the KV format.
    pub(crate) keys: Buffer,
    /// `[rows, kv_heads, head_dim]`, rounded to the KV format.
    pub(crate) values: Buffer,
}

/// Which rows' final states a forward pass is run for. What only they would need is skipped in the last layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    Nothing,
    Last,
    All,
}

/// One sequence's part of a batch: tokens to append.
pub(crate) struct Piece<'a> {
    pub(crate) kv: &'a mut SequenceKv,
    pub(crate) tokens: &'a [u32],
    /// `None`: exact attention over everything.
    pub(crate) attention: Option<&'a AttentionConfig>,
    pub(crate) want: Want,
    /// End-of-text tokens must not be chosen behind this piece.
    pub(crate) ban_eos: bool,
    pub(crate) stats: ColdStats,
    /// Why its attention failed in the pass, which went on for the others: its KV and states are then of no use.
    pub(crate) failed: Option<EngineError>,
    /// Receives, appended, each layer's keys (not rotated) and values.
    pub(crate) tap: Option<&'a mut Vec<(Vec<f32>, Vec<f32>)>>,
    /// Receives, appended, each layer's queries (rotated), `[tokens, heads, head_dim]`.
    pub(crate) query_tap: Option<&'a mut Vec<Vec<f32>>>,
    /// Receives what the tokens pay.
    pub(crate) sums: Option<&'a mut ChunkSums>,
}

impl<'a> Piece<'a> {
    pub(crate) fn exact(kv: &'a mut SequenceKv, tokens: &'a [u32], want: Want) -> Piece<'a> {
        Piece {
            kv,
            tokens,
            attention: None,
            want,
            ban_eos: false,
            stats: ColdStats::default(),
            failed: None,
            tap: None,
            query_tap: None,
            sums: None,
        }
    }

    /// Attention for its last rows, or nothing of use once that has failed: a search that fails or panics ends its own
    /// sequence only.
    fn attend(&mut self, cpu: &Cpu, layer: usize, queries: &Queries<'_>) -> AttentionState {
        let Piece { kv, attention, stats, failed, .. } = self;
        if failed.is_none() {
            let attended = guarded("attending", || match attention {
                Some(config) => kv.attend(cpu, layer, queries, config, stats),
                None => Ok(kv.attend_exact(cpu, layer, queries)),
            });
            match attended {
                Ok(state) => return state,
                Err(error) => *failed = Some(error),
            }
        }
        AttentionState::empty(queries.rows(), queries.q.len() / queries.rows().max(1))
    }

    /// Rows whose final states are wanted: the piece's last ones.
    pub(crate) fn wanted(&self) -> usize {
        match self.want {
            Want::Nothing => 0,
            Want::Last => 1.min(self.tokens.len()),
            Want::All => self.tokens.len(),
        }
    }

    /// Whether this is an ordinary step of decoding, as it comes again with every token.
    pub(crate) fn repeats(&self) -> bool {
        self.tokens.len() == 1
            && self.want == Want::Last
            && self.tap.is_none()
            && self.query_tap.is_none()
            && self.sums.is_none()
            && self.attention.is_none_or(|a| {
                a.strategy == Strategy::Full || (!self.kv.has_cold() && a.strategy != Strategy::Retrieval)
            })
    }
}

impl Transformer {
    /// Loads and packs the weights for the CPU. `kv`: the KV format, `None` for that of the weights.
    pub(crate) fn load(spec: ModelSpec, weights: &Weights, threads: usize, kv: Option<KvDtype>) -> Result<Transformer> {
        let spec = with_stored_head(spec, weights);
        let cpu = Cpu::new(threads);
        let embedding = weights.tensor("model.embed_tokens.weight", &[spec.vocab, spec.hidden])?;
        let shape = kv_shape(&spec, embedding.dtype, kv);
        let head = if spec.tied_embeddings {
            None
        } else {
            Some(Linear::new(&cpu, &[weights.tensor("lm_head.weight", &[spec.vocab, spec.hidden])?]))
        };
        let layers = (0..spec.layers).map(|i| Layer::load(&cpu, weights, &spec, i)).collect::<Result<_>>()?;
        let body = Body::Host(HostWeights {
            embedding: Linear::new(&cpu, &[embedding]),
            head,
            norm: weights.tensor("model.norm.weight", &[spec.hidden])?.to_f32(),
            layers,
        });
        let (rope, scale) = (RopeTable::new(&spec.rope), softmax_scale(&spec));
        Ok(Transformer { shape, rope, scale, body, cpu, make_index, spec })
    }

    /// Brings the weights to a GPU. `threads`: of what is left to the CPU.
    pub(crate) fn load_on_device(
        spec: ModelSpec,
        weights: &Weights,
        threads: usize,
        kv: Option<KvDtype>,
        config: &CudaConfig,
        limits: Limits,
    ) -> Result<Transformer> {
        let spec = with_stored_head(spec, weights);
        let embedding = weights.tensor("model.embed_tokens.weight", &[spec.vocab, spec.hidden])?;
        let shape = kv_shape(&spec, embedding.dtype, kv);
        let (rope, scale) = (RopeTable::new(&spec.rope), softmax_scale(&spec));
        let model = CudaModel::load(config, &spec, shape, scale, &rope, weights, limits)?;
        let body = Body::Device(Box::new(model));
        Ok(Transformer { shape, rope, scale, body, cpu: Cpu::new(threads), make_index, spec })
    }

    /// Loads the model in `dir` for the CPU.
    pub(crate) fn load_dir(dir: &Path, threads: usize, kv: Option<KvDtype>) -> Result<Transformer> {
        let spec = ModelSpec::from_dir(dir)?;
        Transformer::load(spec, &Weights::open(dir)?, threads, kv)
    }

    /// Bytes of weights that one decode step reads.
    pub(crate) fn bytes_per_step(&self) -> usize {
        match &self.body {
            Body::Host(w) => {
                w.layers.iter().map(Layer::bytes).sum::<usize>() + w.head.as_ref().unwrap_or(&w.embedding).bytes()
            }
            Body::Device(model) => model.weights.bytes_per_step(),
        }
    }

    /// How exactly it computes.
    pub(crate) fn activations(&self) -> Activations {
        match &self.body {
            Body::Device(model) if model.fast_prefill => Activations::Bits8,
            Body::Device(_) => Activations::Bits16,
            Body::Host(_) if self.cpu.isa == Isa::Amx => Activations::Bits16,
            Body::Host(_) => Activations::Bits24,
        }
    }

    /// Bytes of weights in the host's memory.
    pub(crate) fn host_bytes(&self) -> usize {
        match &self.body {
            Body::Host(w) => {
                let rest = w.embedding.bytes() + w.head.as_ref().map_or(0, Linear::bytes);
                w.layers.iter().map(Layer::bytes).sum::<usize>() + rest
            }
            Body::Device(_) => 0,
        }
    }

    /// The GPU that computes; `None`: the CPU does.
    pub(crate) fn device(&self) -> Option<&CudaModel> {
        match &self.body {
            Body::Host(_) => None,
            Body::Device(model) => Some(model),
        }
    }

    /// The weights of the stages below, which are the CPU's.
    ///
    /// # Panics
    /// On a GPU, whose stages are in [`CudaModel`].
    fn host(&self) -> &HostWeights {
        match &self.body {
            Body::Host(weights) => weights,
            Body::Device(_) => panic!("a stage of the CPU was called with the weights on a GPU"),
        }
    }

    /// An empty sequence, where this model attends.
    pub(crate) fn new_kv(&self) -> SequenceKv {
        self.device().map_or_else(|| SequenceKv::new(self.shape), |model| SequenceKv::on_device(&model.pool))
    }

    /// Rows that one forward pass takes at most.
    pub(crate) fn most_rows(&self) -> usize {
        self.device().map_or(usize::MAX, |model| model.workspace.rows)
    }

    /// # Errors
    /// A token id outside of the vocabulary.
    pub(crate) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let width = self.spec.hidden;
        let mut x = vec![0.0; tokens.len() * width];
        for (token, row) in tokens.iter().zip(x.chunks_exact_mut(width)) {
            if *token as usize >= self.spec.vocab {
                return Err(EngineError::InvalidRequest(format!(
                    "token id: expected below the model's vocabulary of {}, found {token}",
                    self.spec.vocab
                )));
            }
            self.host().embedding.row(*token as usize, row);
        }
        Ok(x)
    }

    pub(crate) fn rows(&self, positions: Vec<usize>) -> Rows {
        let signed: Vec<i64> = positions.iter().map(|&p| p as i64).collect();
        let (cos, sin) = self.rope.rows(&signed);
        Rows { positions, cos, sin }
    }

    /// As [`rows`](Self::rows), with angles only where the stages below need them: a GPU has a table of its own.
    pub(crate) fn stage_rows(&self, positions: Vec<usize>) -> Rows {
        match self.device() {
            None => self.rows(positions),
            Some(_) => Rows { positions, cos: Vec::new(), sin: Vec::new() },
        }
    }

    /// Queries, keys and values of `x` in `layer`.
    pub(crate) fn qkv(&self, layer: usize, x: &[f32], rows: &Rows) -> Qkv {
        let (l, spec, n) = (&self.host().layers[layer], &self.spec, rows.positions.len());
        let (dim, q_width, kv_width) = (spec.head_dim, spec.heads * spec.head_dim, self.shape.width());
        let all = self.project(&l.qkv, l.qkv_bias.as_deref(), &self.normed(x, &l.attention_norm), n);
        let width = q_width + 2 * kv_width;
        let take = |width: usize| self.cpu.buffers.take(n * width);
        let mut out = Qkv { q: take(q_width), keys: take(kv_width), values: take(kv_width) };
        let (q, k, v) = (Shards::new(&mut out.q), Shards::new(&mut out.keys), Shards::new(&mut out.values));
        self.cpu.rows(n, |i| {
            // SAFETY: one part a row.
            let (q, k, v) = unsafe {
                let kv = i * kv_width..(i + 1) * kv_width;
                (q.part(i * q_width..(i + 1) * q_width), k.part(kv.clone()), v.part(kv))
            };
            let row = &all[i * width..(i + 1) * width];
            q.copy_from_slice(&row[..q_width]);
            k.copy_from_slice(&row[q_width..q_width + kv_width]);
            v.copy_from_slice(&row[q_width + kv_width..]);
            norm_heads(q, l.q_norm.as_deref(), spec.norm_eps);
            norm_heads(k, l.k_norm.as_deref(), spec.norm_eps);
            let (cos, sin) = rows.angles(i);
            q.chunks_exact_mut(dim).for_each(|head| rotate_half(head, cos, sin));
            self.shape.dtype.round(k);
            self.shape.dtype.round(v);
        });
        out
    }

    /// Rotates keys to the rows' positions and writes them with their values.
    pub(crate) fn write_kv(&self, run: &mut DenseKv, rows: &Rows, keys: &[f32], values: &[f32]) {
        let width = self.shape.width();
        let mut pages = run.pages_mut(&rows.positions);
        let tasks = pages.len();
        let pages = Shards::new(&mut pages);
        self.cpu.pool.run(tasks, |task| {
            // SAFETY: one part a page.
            let page = &mut unsafe { pages.part(task..task + 1) }[0];
            let mut rotated = vec![0.0; width];
            for i in page.rows.clone() {
                rotated.copy_from_slice(&keys[i * width..(i + 1) * width]);
                let (cos, sin) = rows.angles(i);
                rotated.chunks_exact_mut(self.shape.head_dim).for_each(|head| rotate_half(head, cos, sin));
                page.write(rows.positions[i], &rotated, &values[i * width..(i + 1) * width]);
            }
        });
    }

    /// Keys rotated to the rows' positions and rounded: as the cache holds them.
    pub(crate) fn rotated(&self, rows: &Rows, mut keys: Vec<f32>) -> Vec<f32> {
        for (i, row) in keys.chunks_exact_mut(self.shape.width()).enumerate() {
            let (cos, sin) = rows.angles(i);
            row.chunks_exact_mut(self.shape.head_dim).for_each(|head| rotate_half(head, cos, sin));
        }
        self.shape.dtype.round(&mut keys);
        keys
    }

    /// What attention multiplies the products of queries and keys with.
    pub(crate) fn softmax_scale(&self) -> f32 {
        self.scale
    }

    /// The queries of rows at ascending positions of one sequence.
    pub(crate) fn queries<'a>(&self, q: &'a [f32], positions: &'a [usize]) -> Queries<'a> {
        let (heads, scale, window) = (self.spec.heads, self.scale, self.spec.sliding_window);
        Queries { q, positions, heads, scale, window }
    }

    /// Everything behind attention: output projection, MLP, both residuals. `attention`: `[rows, heads * head_dim]`.
    pub(crate) fn finish_layer(&self, layer: usize, x: &mut [f32], attention: &[f32]) {
        let (l, spec) = (&self.host().layers[layer], &self.spec);
        let n = x.len() / spec.hidden;
        l.output.forward(&self.cpu, attention, x, true);
        add_bias(x, l.output_bias.as_deref());
        let normed = self.normed(x, &l.mlp_norm);
        let gate_up = self.project(&l.gate_up, l.gate_up_bias.as_deref(), &normed, n);
        let mut hidden = self.cpu.buffers.take(n * spec.intermediate);
        self.cpu.swiglu(&gate_up, spec.intermediate, &mut hidden);
        l.down.forward(&self.cpu, &hidden, x, true);
        add_bias(x, l.down_bias.as_deref());
    }

    /// Logits of final states, `[rows, vocab]`.
    pub(crate) fn logits(&self, states: &States) -> Result<Vec<f32>> {
        match (&self.body, states) {
            (Body::Host(w), States::Host(x)) => {
                let n = x.len() / self.spec.hidden;
                let head = w.head.as_ref().unwrap_or(&w.embedding);
                Ok(self.project(head, None, &self.normed(x, &w.norm), n).to_vec())
            }
            (Body::Device(model), States::Device(rows)) => model.logits(*rows),
            _ => Err(EngineError::Internal("final states of another device".into())),
        }
    }

    /// What follows each row of `states`: the chosen token where a GPU computes, else logits.
    pub(crate) fn next(&self, states: &States, choices: &[Choice]) -> Result<Vec<Next>> {
        if let (Body::Device(model), States::Device(_)) = (&self.body, states) {
            return model.next(choices);
        }
        let logits = self.logits(states)?;
        Ok(logits.chunks_exact(self.spec.vocab).map(|row| Next::Logits(row.to_vec())).collect())
    }

    /// Appends the tokens of all pieces and returns the wanted rows' final states, in order.
    pub(crate) fn forward(&self, pieces: &mut [Piece<'_>]) -> Result<States> {
        match &self.body {
            Body::Host(_) => self.forward_on_host(pieces).map(States::Host),
            Body::Device(model) => model.forward(&self.cpu, pieces).map(States::Device),
        }
    }

    fn forward_on_host(&self, pieces: &mut [Piece<'_>]) -> Result<Vec<f32>> {
        let tokens: Vec<u32> = pieces.iter().flat_map(|p| p.tokens).copied().collect();
        let mut x = self.embed(&tokens)?;
        let mut positions = Vec::with_capacity(tokens.len());
        for piece in pieces.iter_mut() {
            let start = piece.kv.len();
            positions.extend(start..start + piece.tokens.len());
            piece.kv.extend_to(start + piece.tokens.len())?;
        }
        let rows = self.rows(positions);
        for layer in 0..self.spec.layers {
            let qkv = self.qkv(layer, &x, &rows);
            let kept = if layer + 1 == self.spec.layers { Some(wanted(pieces)) } else { None };
            let attention = self.attend_pieces(layer, pieces, &rows, &qkv, kept.as_deref());
            if let Some(kept) = &kept {
                x = gather(&x, self.spec.hidden, kept);
            }
            if !x.is_empty() {
                self.finish_layer(layer, &mut x, &attention);
            }
        }
        Ok(x)
    }

    /// Writes each piece's KV and attends. `kept`: the rows to attend for, `None` for all.
    fn attend_pieces(
        &self,
        layer: usize,
        pieces: &mut [Piece<'_>],
        rows: &Rows,
        qkv: &Qkv,
        kept: Option<&[usize]>,
    ) -> Vec<f32> {
        let (width, q_width) = (self.shape.width(), self.spec.heads * self.spec.head_dim);
        let mut attention = Vec::new();
        let mut start = 0;
        for piece in pieces {
            let range = start..start + piece.tokens.len();
            start = range.end;
            let (keys, values) = (
                &qkv.keys[range.start * width..range.end * width],
                &qkv.values[range.start * width..range.end * width],
            );
            let part = rows.part(range.clone());
            self.write_kv(piece.kv.recent_mut(layer), &part, keys, values);
            if let Some(tap) = &mut piece.tap {
                if tap.len() <= layer {
                    tap.resize_with(layer + 1, Default::default);
                }
                tap[layer].0.extend_from_slice(keys);
                tap[layer].1.extend_from_slice(values);
            }
            if let Some(tap) = &mut piece.query_tap {
                if tap.len() <= layer {
                    tap.resize_with(layer + 1, Default::default);
                }
                tap[layer].extend_from_slice(&qkv.q[range.start * q_width..range.end * q_width]);
            }
            // The rows to attend for are the piece's last ones: none, one or all.
            let first = match kept {
                Some(kept) => kept.iter().copied().find(|r| range.contains(r)).unwrap_or(range.end),
                None => range.start,
            };
            if first == range.end {
                continue;
            }
            let q = &qkv.q[first * q_width..range.end * q_width];
            let queries = self.queries(q, &rows.positions[first..range.end]);
            let state = piece.attend(&self.cpu, layer, &queries);
            if let (Some(sums), None) = (&mut piece.sums, kept) {
                sums.add(&self.cpu, piece.kv.recent(layer), &queries, &state.lse);
            }
            if attention.is_empty() {
                attention = state.out;
            } else {
                attention.extend(state.out);
            }
        }
        attention
    }

    fn normed(&self, x: &[f32], weight: &[f32]) -> Buffer {
        let mut out = self.cpu.buffers.take(x.len());
        self.cpu.rms_norm(x, weight, self.spec.norm_eps, &mut out);
        out
    }

    fn project(&self, matrix: &Linear, bias: Option<&[f32]>, x: &[f32], rows: usize) -> Buffer {
        let mut y = self.cpu.buffers.take(rows * matrix.outputs());
        matrix.forward(&self.cpu, x, &mut y, false);
        add_bias(&mut y, bias);
        y
    }
}

impl Rows {
    /// The rows of `range`.
    pub(crate) fn part(&self, range: std::ops::Range<usize>) -> Rows {
        let half = self.cos.len() / self.positions.len().max(1);
        let angles = range.start * half..range.end * half;
        Rows {
            positions: self.positions[range].to_vec(),
            cos: self.cos[angles.clone()].to_vec(),
            sin: self.sin[angles].to_vec(),
        }
    }

    /// The rows `picked`.
    pub(crate) fn pick(&self, picked: &[usize]) -> Rows {
        let half = self.cos.len() / self.positions.len().max(1);
        Rows {
            positions: picked.iter().map(|r| self.positions[*r]).collect(),
            cos: gather(&self.cos, half, picked),
            sin: gather(&self.sin, half, picked),
        }
    }
}

/// The spec as the weights have it: a head that is stored and differs from the embedding is used even where the
/// configuration ties the two, as transformers does.
fn with_stored_head(spec: ModelSpec, weights: &Weights) -> ModelSpec {
    const HEAD: &str = "lm_head.weight";
    let own = weights.has(HEAD) && !weights.same(HEAD, "model.embed_tokens.weight");
    ModelSpec { tied_embeddings: spec.tied_embeddings && !own, ..spec }
}

/// The shape and format of KV: `kv`, or that of the weights.
fn kv_shape(spec: &ModelSpec, weights: Dtype, kv: Option<KvDtype>) -> KvShape {
    let dtype = kv.unwrap_or(if weights == Dtype::F32 { KvDtype::F32 } else { KvDtype::Bf16 });
    KvShape { layers: spec.layers, kv_heads: spec.kv_heads, head_dim: spec.head_dim, dtype }
}

fn softmax_scale(spec: &ModelSpec) -> f32 {
    let factor = spec.rope.attention_factor() as f32;
    factor * factor / (spec.head_dim as f32).sqrt()
}

/// The rows `picked` of a matrix of `width` columns.
pub(crate) fn gather(x: &[f32], width: usize, picked: &[usize]) -> Vec<f32> {
    let mut out = Vec::with_capacity(picked.len() * width);
    picked.iter().for_each(|r| out.extend_from_slice(&x[r * width..(r + 1) * width]));
    out
}

/// The rows of a batch whose final states are wanted.
fn wanted(pieces: &[Piece<'_>]) -> Vec<usize> {
    let mut rows = Vec::new();
    let mut start = 0;
    for piece in pieces {
        let end = start + piece.tokens.len();
        rows.extend(end - piece.wanted()..end);
        start = end;
    }
    rows
}

fn add_bias(y: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        for row in y.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
}

/// RMSNorm over each head (Qwen3).
fn norm_heads(x: &mut [f32], weight: Option<&[f32]>, eps: f32) {
    let Some(weight) = weight else { return };
    for head in x.chunks_exact_mut(weight.len()) {
        let mean = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        head.iter_mut().zip(weight).for_each(|(x, w)| *x = *x * scale * w);
    }
}
