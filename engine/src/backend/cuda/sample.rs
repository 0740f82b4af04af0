//! The choice of tokens on the GPU.

use std::sync::Arc;

use super::device::{Device, Memory};
use super::launch::{Arguments, Shape, arguments};
use super::model::LOGIT_ROWS;
use super::module::{Kernel, Modules};
use crate::error::Result;
use crate::model::spec::ModelSpec;
use crate::sampler::{Choice, Filtered};

/// Blocks that share a row in `sample.cu`, and the threads of each.
const CHOOSE_BLOCKS: usize = 128;
const CHOOSE_THREADS: usize = 256;
/// Threads of a block that draws a token, and of one in `sample_filtered.cu`.
const DRAW_THREADS: usize = 1024;
const FILTER_THREADS: usize = 512;
/// Blocks of a cluster that shares a row in `sample_filtered.cu`, where the GPU has clusters.
const FILTER_CLUSTER: usize = 8;
/// Numbers of 32 bits of a row's wish and of an entry, as `sample_filtered.cu` lays them out.
const WISH: usize = 14;
const ENTRY: usize = 3;

/// In a row whose logits are all minus infinity once they are adjusted.
pub(crate) const NO_TOKEN: u32 = u32::MAX;

/// Logits of some rows where a head has left them.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    /// `[parts][rows][vocab]`
    pub(crate) logits: &'a Memory,
    pub(crate) parts: usize,
    pub(crate) rows: usize,
    /// Address of the rows' flags: whether end-of-text tokens must not be chosen.
    pub(crate) banned: u64,
}

/// Kernels that choose, and the memory between them.
pub(crate) struct Sampling {
    device: Arc<Device>,
    vocab: usize,
    choose: Kernel,
    draw: Kernel,
    filter: Kernel,
    /// Blocks of `filter` for a row.
    filter_blocks: usize,
    /// Scratch of `sample.cu`, and its counters.
    scratch: Memory,
    counters: Memory,
    /// End-of-text tokens, and how many.
    eos: Memory,
    eos_count: usize,
    /// The likeliest tokens, their log-probabilities, and whether logits were bad: `[3][LOGIT_ROWS]`.
    pub(crate) chosen: Memory,
    /// For rows that are drawn: `[LOGIT_ROWS]` f32, `[LOGIT_ROWS]` f64, and tokens with their log-probabilities,
    /// `[2][LOGIT_ROWS]`.
    temperatures: Memory,
    draws: Memory,
    drawn: Memory,
    /// What is wanted of rows that are filtered, and their adjusted tokens, of as many rows at a time as there is room for:
    /// for one row in any case.
    wishes: Memory,
    entries: Memory,
}

impl Sampling {
    /// `portable`: as on a GPU without clusters.
    pub(crate) fn new(device: &Arc<Device>, modules: &Modules, spec: &ModelSpec, portable: bool) -> Result<Sampling> {
        let take = |numbers: usize, size: usize| device.allocate(numbers * size, "the choice of tokens");
        let counters = take(LOGIT_ROWS, 4)?;
        counters.fill(0)?;
        let (filter, filter_blocks) = match device.capability.0 >= 9 && !portable {
            true => ("sample_filtered_cluster", FILTER_CLUSTER),
            false => ("sample_filtered", 1),
        };
        let eos: Vec<i32> = spec.eos.iter().map(|token| *token as i32).chain([-1]).collect();
        Ok(Sampling {
            vocab: spec.vocab,
            choose: modules.kernel("sample.cu", "argmax_logprob", 0)?,
            draw: modules.kernel("sample.cu", "draw", 0)?,
            filter: modules.kernel("sample_filtered.cu", filter, 0)?,
            filter_blocks,
            scratch: take(LOGIT_ROWS * CHOOSE_BLOCKS, 16)?,
            counters,
            eos: device.upload(&eos, "end-of-text tokens")?,
            eos_count: spec.eos.len(),
            chosen: take(3 * LOGIT_ROWS, 4)?,
            temperatures: take(LOGIT_ROWS, 4)?,
            draws: take(LOGIT_ROWS, 8)?,
            drawn: take(2 * LOGIT_ROWS, 4)?,
            wishes: take(LOGIT_ROWS * WISH, 4)?,
            entries: take(spec.vocab * ENTRY, 4)?,
            device: Arc::clone(device),
        })
    }

    /// What all kernels take first: the rows, what must not be chosen, and the likeliest tokens.
    fn arguments(&self, of: Rows<'_>) -> Arguments {
        let chosen = |array: usize| self.chosen.at::<u32>(array * LOGIT_ROWS);
        arguments![
            of.logits,
            of.parts,
            of.rows,
            self.vocab,
            &self.eos,
            self.eos_count,
            of.banned,
            chosen(0),
            chosen(1),
            chosen(2),
        ]
    }

    /// The likeliest tokens of all rows, to `chosen`.
    pub(crate) fn choose(&self, of: Rows<'_>) -> Result<()> {
        let arguments = self.arguments(of).with(&self.scratch).with(&self.counters);
        let shape = Shape { grid: (CHOOSE_BLOCKS, of.rows), ..Shape::new(1, CHOOSE_THREADS) };
        self.device.launch(self.choose, shape, arguments)
    }

    /// Behind [`choose`](Sampling::choose): tokens and log-probabilities of the rows that are drawn or filtered,
    /// `[2][LOGIT_ROWS]`; empty where none is. [`NO_TOKEN`] where none can be drawn. Logits of filtered rows are adjusted in place.
    pub(crate) fn draw(&self, of: Rows<'_>, choices: &[Choice]) -> Result<Vec<u32>> {
        let (mut temperatures, mut draws) = (vec![1.0f32; of.rows], vec![-1.0f64; of.rows]);
        let mut filtered = Vec::new();
        for (row, choice) in choices.iter().enumerate() {
            match choice {
                Choice::Draw { temperature, at } => (temperatures[row], draws[row]) = (*temperature, *at),
                Choice::Filtered(wish) => filtered.push((row, wish.as_ref())),
                Choice::Greedy | Choice::Logits => {}
            }
        }
        let drawn = draws.iter().any(|at| *at >= 0.0);
        if drawn {
            self.temperatures.write(0, &temperatures)?;
            self.draws.write(0, &draws)?;
            let arguments = self.arguments(of).with(&self.temperatures).with(&self.draws);
            self.launch_draw(self.draw, Shape::new(of.rows, DRAW_THREADS), arguments)?;
        }
        let mut rest = filtered.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.fitting(rest));
            self.draw_filtered(of, now)?;
            rest = later;
        }
        if !drawn && filtered.is_empty() {
            return Ok(Vec::new());
        }
        let mut out = vec![0; 2 * LOGIT_ROWS];
        self.drawn.read(0, &mut out)?;
        Ok(out)
    }

    /// The last arguments are where the tokens go.
    fn launch_draw(&self, kernel: Kernel, shape: Shape, arguments: Arguments) -> Result<()> {
        let drawn = |array: usize| self.drawn.at::<u32>(array * LOGIT_ROWS);
        self.device.launch(kernel, shape, arguments.with(drawn(0)).with(drawn(1)))
    }

    /// How many of the first rows have room for their entries together, one at least: a token has one entry a row at most.
    fn fitting(&self, rows: &[(usize, &Filtered)]) -> usize {
        let mut entries = 0;
        let fits = |(_, wish): &&(usize, &Filtered)| {
            entries += wish.adjusted.len();
            entries <= self.vocab
        };
        rows.iter().take_while(fits).count().max(1)
    }

    fn draw_filtered(&self, of: Rows<'_>, rows: &[(usize, &Filtered)]) -> Result<()> {
        let (mut wishes, mut entries) = (Vec::with_capacity(rows.len() * WISH), Vec::new());
        for (row, wish) in rows {
            let begin = entries.len() / ENTRY;
            for token in &wish.adjusted {
                let count = token.count.map_or(-1, |count| count.min(i32::MAX as u32) as i32);
                entries.extend([token.id, token.bias.to_bits(), count as u32]);
            }
            let (at, params) = (wish.at.to_bits(), &wish.params);
            let top_k = if params.top_k < self.vocab { params.top_k } else { 0 };
            wishes.extend([at as u32, (at >> 32) as u32, *row as u32, begin as u32, (entries.len() / ENTRY) as u32]);
            wishes.extend(
                [params.repetition_penalty, params.frequency_penalty, params.presence_penalty].map(f32::to_bits),
            );
            wishes.extend([params.temperature, params.top_p, params.min_p].map(f32::to_bits));
            wishes.extend([top_k as u32, u32::from(params.is_ordered()), 0]);
        }
        self.wishes.write(0, &wishes)?;
        self.entries.write(0, &entries)?;
        let arguments = self.arguments(of).with(&self.wishes).with(&self.entries);
        self.launch_draw(self.filter, Shape::new(rows.len() * self.filter_blocks, FILTER_THREADS), arguments)
    }
}
