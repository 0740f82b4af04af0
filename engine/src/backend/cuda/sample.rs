//! The choice of tokens on the GPU.

use std::sync::Arc;

use super::device::{Device, Memory};
use super::launch::{Arguments, Shape, arguments};
use super::model::LOGIT_ROWS;
use super::module::{Kernel, Modules};
use crate::error::Result;
use crate::model::spec::ModelSpec;
use crate::sampler::{Choice, Draw};

/// Blocks that share a row in `sample.cu`, and the threads of each.
const CHOOSE_BLOCKS: usize = 128;
const CHOOSE_THREADS: usize = 256;
/// Threads of a block in `draw.cu`, and blocks of the cluster that shares a row where the GPU has clusters.
const DRAW_THREADS: usize = 512;
const DRAW_CLUSTER: usize = 8;
/// Numbers of 32 bits of a row's wish and of an entry, as `draw.cu` lays them out.
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
    /// Blocks of `draw` for a row.
    draw_blocks: usize,
    /// Scratch of `sample.cu`, and its counters.
    scratch: Memory,
    counters: Memory,
    /// End-of-text tokens, and how many.
    eos: Memory,
    eos_count: usize,
    /// The likeliest tokens, their log-probabilities, and whether logits were bad: `[3][LOGIT_ROWS]`.
    pub(crate) chosen: Memory,
    /// Tokens that were drawn, with their log-probabilities: `[2][LOGIT_ROWS]`.
    drawn: Memory,
    /// What is wanted of rows that are drawn, and their adjusted tokens, of as many rows at a time as there is room for:
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
        let clusters = device.capability.0 >= 9 && !portable;
        let (draw, draw_blocks) = if clusters { ("draw_cluster", DRAW_CLUSTER) } else { ("draw", 1) };
        let eos: Vec<i32> = spec.eos.iter().map(|token| *token as i32).chain([-1]).collect();
        Ok(Sampling {
            vocab: spec.vocab,
            choose: modules.kernel("sample.cu", "argmax_logprob", 0)?,
            draw: modules.kernel("draw.cu", draw, 0)?,
            draw_blocks,
            scratch: take(LOGIT_ROWS * CHOOSE_BLOCKS, 16)?,
            counters,
            eos: device.upload(&eos, "end-of-text tokens")?,
            eos_count: spec.eos.len(),
            chosen: take(3 * LOGIT_ROWS, 4)?,
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

    /// Behind [`choose`](Sampling::choose): tokens and log-probabilities of the rows that are drawn, `[2][LOGIT_ROWS]`; empty
    /// where none is. [`NO_TOKEN`] where none can be drawn. Logits of these rows are adjusted in place.
    pub(crate) fn draw(&self, of: Rows<'_>, choices: &[Choice]) -> Result<Vec<u32>> {
        let mut draws: Vec<(usize, &Draw)> = Vec::new();
        for (row, choice) in choices.iter().enumerate() {
            if let Choice::Draw(draw) = choice.of_token() {
                draws.push((row, draw));
            }
        }
        if draws.is_empty() {
            return Ok(Vec::new());
        }
        let mut rest = draws.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.fitting(rest));
            self.draw_rows(of, now)?;
            rest = later;
        }
        let mut out = vec![0; 2 * LOGIT_ROWS];
        self.drawn.read(0, &mut out)?;
        Ok(out)
    }

    /// How many of the first rows have room for their entries together, one at least: a token has one entry a row at most.
    fn fitting(&self, rows: &[(usize, &Draw)]) -> usize {
        let mut entries = 0;
        let fits = |(_, wish): &&(usize, &Draw)| {
            entries += wish.adjusted.len();
            entries <= self.vocab
        };
        rows.iter().take_while(fits).count().max(1)
    }

    fn draw_rows(&self, of: Rows<'_>, rows: &[(usize, &Draw)]) -> Result<()> {
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
        let drawn = |array: usize| self.drawn.at::<u32>(array * LOGIT_ROWS);
        let arguments = self.arguments(of).with(&self.wishes).with(&self.entries).with(drawn(0)).with(drawn(1));
        self.device.launch(self.draw, Shape::new(rows.len() * self.draw_blocks, DRAW_THREADS), arguments)
    }
}
