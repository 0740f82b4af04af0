//! A model's weights on the GPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::driver::result;
use half::{bf16, f16};

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
    /// Two bf16 matrices whose sum is the matrix, behind each other: the high and the low half of f16, which has eleven
    /// significant bits where two bf16 have sixteen.
    Halves,
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
    /// The address of the second one of two halves.
    pub(crate) fn low(&self) -> Option<u64> {
        (self.format == Format::Halves).then(|| self.memory.at::<u8>(half_bytes(self.outputs, self.inputs)))
    }

    /// Bytes that a product reads.
    pub(crate) fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

/// Bytes from one half of a matrix to the other: cuBLASLt takes operands to begin at multiples of 256.
fn half_bytes(outputs: usize, inputs: usize) -> usize {
    (2 * outputs * inputs).next_multiple_of(256)
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
    /// bf16 or f16 of the file, of which the high or the low half is copied.
    Half {
        bytes: &'a [u8],
        dtype: Dtype,
        low: bool,
    },
}

impl Source<'_> {
    /// As many as are copied.
    fn bytes(&self) -> &[u8] {
        match self {
            Source::File(bytes) | Source::Half { bytes, .. } => bytes,
            Source::Made(numbers) => bytemuck::cast_slice(numbers),
        }
    }

    /// Puts a piece of the bytes, as it is copied, into `to`.
    fn stage(&self, piece: &[u8], to: &mut [u8]) {
        let Source::Half { dtype, low, .. } = self else { return to.copy_from_slice(piece) };
        for (from, to) in piece.chunks_exact(2).zip(to.chunks_exact_mut(2)) {
            let (high, rest) = halves(*dtype, u16::from_le_bytes([from[0], from[1]]));
            to.copy_from_slice(&(if *low { rest } else { high }).to_le_bytes());
        }
    }
}

/// A number of 16 bits as the sum of two bf16.
fn halves(dtype: Dtype, bits: u16) -> (bf16, bf16) {
    if dtype == Dtype::Bf16 {
        return (bf16::from_bits(bits), bf16::ZERO);
    }
    let whole = f16::from_bits(bits).to_f32();
    let high = bf16::from_f32(whole);
    let low = if whole.is_finite() { bf16::from_f32(whole - high.to_f32()) } else { bf16::ZERO };
    (high, low)
}

impl<'a> Loader<'a> {
    /// Stacks tensors `[outputs, inputs]`. All bf16 stays bf16; f16, or both, becomes halves; anything else f32.
    fn matrix(&mut self, parts: &[(String, usize)], inputs: usize) -> Result<Matrix> {
        let tensors = parts
            .iter()
            .map(|(name, outputs)| self.weights.tensor(name, &[*outputs, inputs]))
            .collect::<Result<Vec<Tensor<'a>>>>()?;
        let outputs = parts.iter().map(|(_, outputs)| outputs).sum();
        let format = if tensors.iter().all(|t| t.dtype == Dtype::Bf16) {
            Format::Bf16
        } else if tensors.iter().all(|t| t.dtype != Dtype::F32) {
            Format::Halves
        } else {
            Format::F32
        };
        let bytes = match format {
            Format::Bf16 => outputs * inputs * 2,
            Format::F32 => outputs * inputs * 4,
            Format::Halves => 2 * half_bytes(outputs, inputs),
        };
        let memory = self.device.allocate(bytes, "the model's weights")?;
        let mut to = memory.address();
        for tensor in tensors {
            let (bytes, dtype) = (tensor.data, tensor.dtype);
            let from = match format {
                Format::F32 if dtype != Dtype::F32 => Source::Made(tensor.to_f32()),
                Format::F32 | Format::Bf16 => Source::File(bytes),
                Format::Halves => {
                    let to = to + half_bytes(outputs, inputs) as u64;
                    self.copies.push(Copy { from: Source::Half { bytes, dtype, low: true }, to });
                    Source::Half { bytes, dtype, low: false }
                }
            };
            let copied = from.bytes().len() as u64;
            self.copies.push(Copy { from, to });
            to += copied;
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
        let pieces: Vec<(&Source<'_>, &[u8], u64)> = self
            .copies
            .iter()
            .flat_map(|copy| {
                let bytes = copy.from.bytes().chunks(PIECE).enumerate();
                bytes.map(|(i, piece)| (&copy.from, piece, copy.to + (i * PIECE) as u64))
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
                let Some((from, bytes, to)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) else { break Ok(()) };
                from.stage(bytes, &mut staging.bytes_mut()[..bytes.len()]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finite_f16_is_the_sum_of_its_halves() {
        for bits in 0..=u16::MAX {
            let whole = f16::from_bits(bits).to_f32();
            let (high, low) = halves(Dtype::F16, bits);
            match whole.is_finite() {
                true => assert_eq!(high.to_f32() + low.to_f32(), whole, "{bits:#x}"),
                false => assert!(!(high.to_f32() + low.to_f32()).is_finite(), "{bits:#x}"),
            }
            let (high, low) = halves(Dtype::Bf16, bits);
            assert_eq!((high.to_bits(), low), (bits, bf16::ZERO));
        }
    }

    #[test]
    fn pieces_are_staged_as_they_are_copied() {
        let numbers = [1.0f32, 1.0 + 1.0 / 512.0, -65504.0, 6e-8];
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect();
        let staged = |low| {
            let mut out = vec![0; bytes.len()];
            Source::Half { bytes: &bytes, dtype: Dtype::F16, low }.stage(&bytes, &mut out);
            out.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect::<Vec<f32>>()
        };
        let sums: Vec<f32> = staged(false).iter().zip(staged(true)).map(|(high, low)| high + low).collect();
        assert_eq!(sums, numbers.map(|x| f16::from_f32(x).to_f32()));
        let mut out = vec![0; bytes.len()];
        Source::File(&bytes).stage(&bytes, &mut out);
        assert_eq!((out, half_bytes(3, 5), half_bytes(16, 8)), (bytes, 256, 256));
    }
}
