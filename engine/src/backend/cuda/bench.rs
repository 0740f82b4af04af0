//! Measurements of a GPU and of decode attention alone.

use std::sync::Arc;

use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::device::{Device, Event, Memory};
use super::launch::{Shape, arguments};
use super::model::CudaConfig;
use super::module::{Kernel, Modules};
use super::ops::{DECODE_HEADS, DECODE_SHARED, DECODE_THREADS, decode_blocks};
use crate::error::{EngineError, Result};
use crate::kv::device::PAGE;

/// Bytes of the buffers that are copied to measure bandwidth.
const COPIED: usize = 1 << 30;
/// Copies that are made at least.
const COPIES: usize = 30;
/// KV that is read between two reads of the same bytes at least: several times any cache.
const APART: usize = 2 << 30;
/// Largest relative difference from plain arithmetic that passes.
const TOLERANCE: f64 = 1e-3;

/// Shape of a decode step's attention in one layer.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Sequences.
    pub batch: usize,
    /// Tokens of each.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Bytes of bf16 KV that one layer reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        4 * self.batch * self.tokens * self.kv_heads * self.head_dim
    }
}

/// Bytes a second that a copy within the GPU's memory moves, read and written bytes counted: the best of `repeats`, or
/// thirty if that is less, as clocks and other work only ever make it lower.
///
/// # Errors
/// No usable GPU, or too little memory on it.
pub fn copy_bandwidth(config: &CudaConfig, repeats: usize) -> Result<f64> {
    copy_bandwidth_of(&*Device::open(config.ordinal, config.memory_budget_bytes)?, repeats)
}

/// The same on the device that another one stands for, beside its budget.
pub(crate) fn copy_bandwidth_of(device: &Device, repeats: usize) -> Result<f64> {
    let device = Device::open(device.ordinal(), 2 * COPIED as u64 + (1 << 20))?;
    device.bind()?;
    let memory = device.allocate(2 * COPIED, "a measurement of bandwidth")?;
    memory.fill(0x5a)?;
    let mut best = f64::INFINITY;
    for _ in 0..repeats.max(COPIES) {
        let begin = Event::record(&device)?;
        memory.copy_within(0, COPIED, COPIED)?;
        best = best.min(Event::record(&device)?.seconds_since(&begin)?);
    }
    Ok(2.0 * COPIED as f64 / best)
}

/// Seconds of decode attention over random KV in scattered pages, a layer: one for each of `repeats`. Before anything is
/// timed, the result is compared with plain arithmetic.
///
/// # Errors
/// No usable GPU, too little memory on it, or a wrong result.
pub fn decode_attention(config: &CudaConfig, shape: AttentionShape, repeats: usize) -> Result<Vec<f64>> {
    let device = Device::open(config.ordinal, config.memory_budget_bytes)?;
    let modules = Modules::load(&device, config.kernel_cache.as_deref(), config.portable)?;
    let bench = Bench::new(&device, &modules, shape)?;
    bench.verify()?;
    let layers = bench.layers.len();
    let mut seconds = Vec::new();
    for repeat in 0..repeats + 2 {
        let begin = Event::record(&device)?;
        for layer in &bench.layers {
            bench.tuned(layer)?;
        }
        let one = Event::record(&device)?.seconds_since(&begin)? / layers as f64;
        if repeat >= 2 {
            seconds.push(one);
        }
    }
    Ok(seconds)
}

/// Inputs on the GPU.
struct Bench {
    device: Arc<Device>,
    shape: AttentionShape,
    tuned: Kernel,
    plain: Kernel,
    /// KV of several layers, so that no cache holds what is read next.
    layers: Vec<Memory>,
    q: Memory,
    table: Memory,
    stride: usize,
    /// First slots (0), starts (0), ends and positions, `[4][batch]`, then the rows' numbers.
    rows: Memory,
    out: [Memory; 2],
    lse: [Memory; 2],
    partial: Memory,
    counters: Memory,
}

impl Bench {
    fn new(device: &Arc<Device>, modules: &Modules, shape: AttentionShape) -> Result<Bench> {
        let AttentionShape { batch, tokens, heads, kv_heads, head_dim } = shape;
        if ![64, 128].contains(&head_dim) || heads % kv_heads != 0 || batch * tokens == 0 {
            return Err(EngineError::InvalidRequest(format!(
                "decode attention: expected heads of 64 or 128 in whole groups and at least one token, found {shape:?}"
            )));
        }
        device.bind()?;
        let mut rng = ChaCha8Rng::seed_from_u64(17);
        let what = "a measurement of attention";
        let stride = tokens.div_ceil(PAGE);
        let page = 4 * PAGE * kv_heads * head_dim;
        let fill = modules.kernel("fill.cu", "fill_random_bf16", 0)?;
        let count = APART.div_ceil(shape.bytes()).max(2);
        let layers = (0..count)
            .map(|layer| {
                let memory = device.allocate(batch * stride * page, what)?;
                let numbers = (batch * stride * page / 2) as u64;
                let launch = Shape::new(8 * device.multiprocessors, 256);
                device.launch(fill, launch, arguments![&memory, numbers, layer as u64, 1.0f32])?;
                Ok(memory)
            })
            .collect::<Result<Vec<_>>>()?;
        let mut pages: Vec<i32> = (0..(batch * stride) as i32).collect();
        pages.shuffle(&mut rng);
        let ends = |value: i32| std::iter::repeat_n(value, batch);
        let rows = ends(0).chain(ends(0)).chain(ends(tokens as i32)).chain(ends(tokens as i32 - 1));
        let rows: Vec<i32> = rows.chain(0..batch as i32).collect();
        let q: Vec<f32> = (0..batch * heads * head_dim).map(|_| rng.random_range(-1.0..1.0)).collect();
        let out = || device.upload(&vec![f32::NAN; batch * heads * head_dim], what);
        let lse = || device.upload(&vec![f32::NAN; batch * heads], what);
        let items = batch * kv_heads * (heads / kv_heads).div_ceil(DECODE_HEADS);
        let counters = device.allocate(items * 4, what)?;
        counters.fill(0)?;
        Ok(Bench {
            tuned: modules.kernel("attention_decode.cu", &format!("attention_decode_d{head_dim}"), DECODE_SHARED)?,
            plain: modules.kernel("attention_any.cu", "attention_any_bf16", 0)?,
            layers,
            q: device.upload(&q, what)?,
            table: device.upload(&pages, what)?,
            stride,
            rows: device.upload(&rows, what)?,
            out: [out()?, out()?],
            lse: [lse()?, lse()?],
            partial: device.allocate(decode_blocks(device) * 16 * (head_dim + 2) * 4, what)?,
            counters,
            shape,
            device: Arc::clone(device),
        })
    }

    fn rows(&self, array: usize) -> u64 {
        self.rows.at::<i32>(array * self.shape.batch)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    fn tuned(&self, kv: &Memory) -> Result<()> {
        let AttentionShape { batch, heads, kv_heads, .. } = self.shape;
        let launch = Shape { shared: DECODE_SHARED, ..Shape::new(decode_blocks(&self.device), DECODE_THREADS) };
        let arguments = arguments![
            &self.q,
            kv,
            &self.table,
            self.stride,
            self.rows(0),
            self.rows(1),
            self.rows(2),
            self.rows(3),
            batch,
            heads,
            kv_heads,
            0i32,
            self.scale(),
            &self.out[0],
            &self.lse[0],
            &self.partial,
            &self.counters,
        ];
        self.device.launch(self.tuned, launch, arguments)
    }

    fn plain(&self, kv: &Memory) -> Result<()> {
        let AttentionShape { batch, heads, kv_heads, head_dim, .. } = self.shape;
        let arguments = arguments![
            &self.q,
            self.rows(3),
            self.rows(4),
            kv,
            &self.table,
            self.stride,
            self.rows(0),
            self.rows(1),
            self.rows(2),
            batch,
            heads,
            kv_heads,
            head_dim,
            0i32,
            self.scale(),
            &self.out[1],
            &self.lse[1],
        ];
        self.device.launch(self.plain, Shape::new(batch * heads, DECODE_THREADS), arguments)
    }

    fn verify(&self) -> Result<()> {
        self.tuned(&self.layers[0])?;
        self.plain(&self.layers[0])?;
        let numbers = self.shape.batch * self.shape.heads * self.shape.head_dim;
        let (mut found, mut expected) = (vec![0.0f32; numbers], vec![0.0f32; numbers]);
        self.out[0].read(0, &mut found)?;
        self.out[1].read(0, &mut expected)?;
        let square = |x: f32| f64::from(x) * f64::from(x);
        let distance: f64 = found.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let size: f64 = expected.iter().map(|x| square(*x)).sum();
        let error = (distance / size).sqrt();
        // NaN is no number below the tolerance.
        if error <= TOLERANCE {
            return Ok(());
        }
        Err(EngineError::Internal(format!("decode attention differs from plain arithmetic by {error:e}")))
    }
}
