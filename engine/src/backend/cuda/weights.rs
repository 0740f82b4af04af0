//! A model's weights on the GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::result;

use super::device::{Device, Memory, Pinned, failed};
use crate::error::{EngineError, Result};
use crate::model::spec::ModelSpec;
use crate::weights::{Dtype, Tensor, Weights};

/// Bytes that a thread copies at a time.
const PIECE: usize = 16 << 20;
/// Threads that copy from the page cache into page-locked memory: together they outrun the bus.
const THREADS: usize = 12;

/// A linear layer's weights, `[outputs, inputs]` row-major.
pub(crate) struct Matrix {
    pub(crate) memory: Memory,
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) format: Format,
}

/// How a matrix is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Bf16,
    F32,
}

/// One transformer block. Projections that read the same input are stacked into one matrix.
pub(crate) struct DeviceLayer {
    pub(crate) attention_norm: Memory,
    pub(crate) qkv: Matrix,
    pub(crate) qkv_bias: Option<Memory>,
    pub(crate) q_norm: Option<Memory>,
    pub(crate) k_norm: Option<Memory>,
    pub(crate) output: Matrix,
    pub(crate) output_bias: Option<Memory>,
    pub(crate) mlp_norm: Memory,
    pub(crate) gate_up: Matrix,
    pub(crate) gate_up_bias: Option<Memory>,
    pub(crate) down: Matrix,
    pub(crate) down_bias: Option<Memory>,
}

/// All of them.
pub(crate) struct DeviceWeights {
    pub(crate) embedding: Matrix,
    /// `None`: the embedding.
    pub(crate) head: Option<Matrix>,
    pub(crate) norm: Memory,
    pub(crate) layers: Vec<DeviceLayer>,
}

impl Matrix {
    /// Bytes that a product reads.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

impl DeviceWeights {
    /// Allocates and fills.
    ///
    /// # Errors
    /// What is wrong with the weights, and [`EngineError::OutOfMemory`] when they do not fit.
    pub(crate) fn load(device: &Arc<Device>, weights: &Weights, spec: &ModelSpec) -> Result<DeviceWeights> {
        let mut loader = Loader { device, weights, copies: Vec::new() };
        let embedding = loader.matrix(&[("model.embed_tokens.weight".into(), spec.vocab)], spec.hidden)?;
        let head = match spec.tied_embeddings {
            true => None,
            false => Some(loader.matrix(&[("lm_head.weight".into(), spec.vocab)], spec.hidden)?),
        };
        let norm = loader.vector("model.norm.weight", spec.hidden)?;
        let layers = (0..spec.layers).map(|i| loader.layer(spec, i)).collect::<Result<_>>()?;
        loader.run()?;
        Ok(DeviceWeights { embedding, head, norm, layers })
    }

    /// Bytes of weights that one decode step reads.
    pub(crate) fn bytes_per_step(&self) -> usize {
        let layer = |l: &DeviceLayer| [&l.qkv, &l.output, &l.gate_up, &l.down].iter().map(|m| m.bytes()).sum::<usize>();
        self.layers.iter().map(layer).sum::<usize>() + self.head().bytes()
    }

    /// The matrix that gives logits.
    pub(crate) fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Collects copies, and makes them on many threads.
struct Loader<'a> {
    device: &'a Arc<Device>,
    weights: &'a Weights,
    copies: Vec<Copy<'a>>,
}

/// Bytes of the file and the address they go to.
struct Copy<'a> {
    from: Source<'a>,
    to: u64,
}

enum Source<'a> {
    File(&'a [u8]),
    Made(Vec<f32>),
}

impl Source<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Source::File(bytes) => bytes,
            Source::Made(numbers) => bytemuck::cast_slice(numbers),
        }
    }
}

impl<'a> Loader<'a> {
    /// Stacks tensors `[outputs, inputs]`. What is not all bf16 becomes f32.
    fn matrix(&mut self, parts: &[(String, usize)], inputs: usize) -> Result<Matrix> {
        let tensors = parts
            .iter()
            .map(|(name, outputs)| self.weights.tensor(name, &[*outputs, inputs]))
            .collect::<Result<Vec<Tensor<'a>>>>()?;
        let bf16 = tensors.iter().all(|t| t.dtype == Dtype::Bf16);
        let (format, size) = if bf16 { (Format::Bf16, 2) } else { (Format::F32, 4) };
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        let memory = self.device.allocate(outputs * inputs * size, "the model's weights")?;
        let mut to = memory.address();
        for tensor in tensors {
            let from = if bf16 || tensor.dtype == Dtype::F32 {
                Source::File(tensor.data)
            } else {
                Source::Made(tensor.to_f32())
            };
            let bytes = from.bytes().len() as u64;
            self.copies.push(Copy { from, to });
            to += bytes;
        }
        Ok(Matrix { memory, outputs, inputs, format })
    }

    fn vector(&mut self, name: &str, width: usize) -> Result<Memory> {
        let numbers = self.weights.tensor(name, &[width])?.to_f32();
        self.device.upload(&numbers, "the model's weights")
    }

    fn layer(&mut self, spec: &ModelSpec, layer: usize) -> Result<DeviceLayer> {
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let name = |part: &str, what: &str| format!("model.layers.{layer}.{part}.{what}");
        let weights = |parts: &[(&str, usize)]| -> Vec<(String, usize)> {
            parts.iter().map(|(part, outputs)| (name(part, "weight"), *outputs)).collect()
        };
        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let output = [("self_attn.o_proj", spec.hidden)];
        let gate_up = [("mlp.gate_proj", spec.intermediate), ("mlp.up_proj", spec.intermediate)];
        let down = [("mlp.down_proj", spec.hidden)];
        let mut head_norm =
            |part: &str| spec.qk_norm.then(|| self.vector(&name(part, "weight"), spec.head_dim)).transpose();
        let (q_norm, k_norm) = (head_norm("self_attn.q_norm")?, head_norm("self_attn.k_norm")?);
        Ok(DeviceLayer {
            attention_norm: self.vector(&name("input_layernorm", "weight"), spec.hidden)?,
            qkv: self.matrix(&weights(&qkv), spec.hidden)?,
            qkv_bias: self.bias(spec.attention_bias, layer, &qkv)?,
            q_norm,
            k_norm,
            output: self.matrix(&weights(&output), q)?,
            output_bias: self.bias(spec.output_bias, layer, &output)?,
            mlp_norm: self.vector(&name("post_attention_layernorm", "weight"), spec.hidden)?,
            gate_up: self.matrix(&weights(&gate_up), spec.hidden)?,
            gate_up_bias: self.bias(spec.mlp_bias, layer, &gate_up)?,
            down: self.matrix(&weights(&down), spec.intermediate)?,
            down_bias: self.bias(spec.mlp_bias, layer, &down)?,
        })
    }

    fn bias(&mut self, present: bool, layer: usize, parts: &[(&str, usize)]) -> Result<Option<Memory>> {
        if !present {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (part, width) in parts {
            let name = format!("model.layers.{layer}.{part}.bias");
            all.extend(self.weights.tensor(&name, &[*width])?.to_f32());
        }
        self.device.upload(&all, "the model's weights").map(Some)
    }

    /// Makes the copies: each thread takes the next piece, copies it into page-locked memory of its own (which also reads
    /// it from the disk if need be) and sends it on.
    fn run(self) -> Result<()> {
        let pieces: Vec<(&[u8], u64)> = self
            .copies
            .iter()
            .flat_map(|copy| {
                let bytes = copy.from.bytes().chunks(PIECE).enumerate();
                bytes.map(|(i, piece)| (piece, copy.to + (i * PIECE) as u64))
            })
            .collect();
        let next = AtomicUsize::new(0);
        let threads = THREADS.min(std::thread::available_parallelism().map_or(1, usize::from)).min(pieces.len().max(1));
        let worker = || -> Result<()> {
            self.device.bind()?;
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking);
            let stream = stream.map_err(failed("make a stream"))?;
            let mut staging = Pinned::new(self.device, PIECE)?;
            let outcome = loop {
                let Some((bytes, to)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break Ok(()) };
                staging.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
                // SAFETY: the destination was allocated for exactly these bytes; the staging memory stays untouched until the
                // stream has been waited for.
                let sent = unsafe {
                    result::memcpy_htod_async(*to, &staging.bytes()[..bytes.len()], stream)
                        .and_then(|()| result::stream::synchronize(stream))
                };
                if let Err(error) = sent {
                    break Err(failed("copy weights to the GPU")(error));
                }
            };
            // SAFETY: made above; nothing is in flight.
            let _ = unsafe { result::stream::destroy(stream) };
            outcome
        };
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
            let lost = || EngineError::Internal("a thread that copies weights to the GPU panicked".into());
            running.into_iter().try_for_each(|thread| thread.join().map_err(|_| lost())?)
        })
    }
}
