//! Attention of query rows that lie scattered over a context, as blending has them, beside that of a whole prompt.

use std::sync::Arc;

use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::batch::Extent;
use super::device::{Device, Event, Memory};
use super::launch::{Shape, arguments};
use super::model::CudaConfig;
use super::module::{Kernel, Modules};
use super::prefill::{Prefill, PrefillRows};
use crate::error::{EngineError, Result};
use crate::kv::device::PAGE;

/// Largest relative difference between the rows of both that passes: they are summed up in other blocks.
const TOLERANCE: f64 = 1e-2;

/// What [`scattered_attention`] has measured.
#[derive(Clone, Debug)]
pub struct ScatteredAttention {
    /// Seconds of each call of the scattered rows.
    pub scattered: Vec<f64>,
    /// Seconds of each call of all rows.
    pub causal: Vec<f64>,
    /// (Query, key) pairs of the scattered rows over those of all.
    pub share: f64,
}

const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const DIM: usize = 128;
const WHAT: &str = "a measurement of attention";

/// Attention of a share of the rows of a context of `tokens` tokens, at random positions, and of all of its rows: 32 query heads
/// over 8 KV heads of 128, with one bf16 activation. Calls alternate; before anything is timed, the scattered rows are
/// compared with the same rows of all.
///
/// # Errors
/// No usable GPU, too little memory on it, or a wrong result.
pub fn scattered_attention(
    config: &CudaConfig,
    tokens: usize,
    share: f64,
    repeats: usize,
) -> Result<ScatteredAttention> {
    let device = Device::open(config.ordinal, config.memory_budget_bytes)?;
    let modules = Modules::load(&device, config.kernel_cache.as_deref(), config.portable)?;
    device.bind()?;
    let bench = Bench::new(&device, &modules, tokens)?;
    let mut rng = ChaCha8Rng::seed_from_u64(23);
    let all: Vec<i32> = (0..tokens as i32).collect();
    let count = ((tokens as f64 * share) as usize).clamp(1, tokens.max(1));
    let mut some: Vec<i32> = all.choose_multiple(&mut rng, count).copied().collect();
    some.sort_unstable();
    let q: Vec<f32> = (0..tokens * HEADS * DIM).map(|_| rng.random_range(-1.0..1.0)).collect();
    let sides = [Side::new(&device, &q, &some)?, Side::new(&device, &q, &all)?];
    bench.verify(&sides, &some)?;
    let mut seconds = [Vec::new(), Vec::new()];
    for repeat in 0..repeats + 2 {
        for (side, seconds) in sides.iter().zip(&mut seconds) {
            let begin = Event::record(&device)?;
            bench.attend(side)?;
            let one = Event::record(&device)?.seconds_since(&begin)?;
            if repeat >= 2 {
                seconds.push(one);
            }
        }
    }
    let pairs = |positions: &[i32]| positions.iter().map(|position| f64::from(*position) + 1.0).sum::<f64>();
    let [scattered, causal] = seconds;
    Ok(ScatteredAttention { scattered, causal, share: pairs(&some) / pairs(&all) })
}

/// Queries of some rows, and where their states go.
struct Side {
    rows: usize,
    q: Memory,
    positions: Memory,
    out: Memory,
    lse: Memory,
}

impl Side {
    /// Of the queries `q` of all rows those at these positions.
    fn new(device: &Arc<Device>, q: &[f32], positions: &[i32]) -> Result<Side> {
        let width = HEADS * DIM;
        let picked: Vec<f32> = positions.iter().flat_map(|row| row_of(q, *row, width)).copied().collect();
        Ok(Side {
            rows: positions.len(),
            out: device.upload(&vec![f32::NAN; picked.len()], WHAT)?,
            q: device.upload(&picked, WHAT)?,
            positions: device.upload(positions, WHAT)?,
            lse: device.allocate(positions.len() * HEADS * 4, WHAT)?,
        })
    }

    fn read(&self) -> Result<Vec<f32>> {
        let mut out = vec![0.0; self.rows * HEADS * DIM];
        self.out.read(0, &mut out)?;
        Ok(out)
    }
}

fn row_of(rows: &[f32], row: i32, width: usize) -> &[f32] {
    &rows[row as usize * width..(row as usize + 1) * width]
}

/// Random KV in pages, and the kernels.
struct Bench {
    device: Arc<Device>,
    prefill: Prefill,
    merge: Kernel,
    tokens: usize,
    kv: Memory,
    table: Memory,
}

impl Bench {
    fn new(device: &Arc<Device>, modules: &Modules, tokens: usize) -> Result<Bench> {
        let pages = tokens.div_ceil(PAGE);
        let kv = device.allocate(pages * 4 * PAGE * KV_HEADS * DIM, WHAT)?;
        let (fill, numbers) = (modules.kernel("fill.cu", "fill_random_bf16", 0)?, (kv.bytes() / 4) as u64);
        device.launch(fill, Shape::new(8 * device.multiprocessors, 256), arguments![&kv, numbers, 1u64, 1.0f32])?;
        let mut table: Vec<i32> = (0..pages as i32).collect();
        table.shuffle(&mut ChaCha8Rng::seed_from_u64(29));
        Ok(Bench {
            device: Arc::clone(device),
            prefill: Prefill::new(device, modules, DIM)?,
            merge: modules.kernel("attention_merge.cu", "attention_merge", 0)?,
            tokens,
            kv,
            table: device.upload(&table, WHAT)?,
        })
    }

    fn attend(&self, side: &Side) -> Result<()> {
        let rows = PrefillRows {
            q: side.q.address(),
            positions: side.positions.address(),
            rows: side.rows,
            table: self.table.address(),
            extent: Extent { first: 0, start: 0, end: self.tokens },
            heads: HEADS,
            kv_heads: KV_HEADS,
            dim: DIM,
            window: 0,
            scale: 1.0 / (DIM as f32).sqrt(),
            parts: 1,
            out: side.out.address(),
            lse: side.lse.address(),
        };
        self.prefill.attend(&self.device, self.merge, &self.kv, &rows)
    }

    fn verify(&self, [scattered, causal]: &[Side; 2], some: &[i32]) -> Result<()> {
        self.attend(causal)?;
        self.attend(scattered)?;
        let (whole, found) = (causal.read()?, scattered.read()?);
        let wanted = some.iter().flat_map(|row| row_of(&whole, *row, HEADS * DIM));
        let square = |x: f32| f64::from(x) * f64::from(x);
        let (distance, size) =
            found.iter().zip(wanted).fold((0.0, 0.0), |(d, s), (a, b)| (d + square(a - b), s + square(*b)));
        let error = (distance / size).sqrt();
        // NaN is no number below the tolerance.
        if error <= TOLERANCE {
            return Ok(());
        }
        Err(EngineError::Internal(format!("scattered rows differ from the same rows of all by {error:e}")))
    }
}
