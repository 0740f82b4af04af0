//! One pass of a blend over the layers, in units that are run one by one: other work may come between any two of them.
//!
//! A unit is some of a layer's cached rows being written, or a block of rows in a layer. What the units are depends on the rows alone,
//! not on how many of them are run at a time: so the result does not depend on that either.

use std::ops::Range;

use super::cacheblend::{Cached, Check};
use super::correct::Corrector;
use super::paid::{WATCHED, Watch};
use super::plan::{BlendPlan, Span};
use super::reading::{Lost, Reading};
use super::stream::{CachedRows, Stream};
use crate::chunk::ChunkLayer;
use crate::config::Correction;
use crate::error::Result;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{States, Transformer};
use crate::tiers::CachedLayer;

/// Rows computed at a time, which bounds the memory of activations.
const ROWS: usize = 1024;

/// So many cached rows that are written count as one that is computed: 18 us against 55 us on an H200 with a model of 8
/// billion weights, from memory.
const WRITTEN: usize = 4;

/// Cached rows that are written at a time, about; tests have several of them in small contexts.
const WRITTEN_ROWS: usize = if cfg!(test) { 100 } else { 2048 };

/// A block counts as so many rows at least: reading the weights takes as long.
const LEAST: usize = 32;

/// Cached layers and where they go.
pub(super) struct Loads {
    pub(super) spans: Vec<Span>,
    /// Where their rows go, once there are pages.
    pub(super) rows: Option<CachedRows>,
    pub(super) reading: Reading,
}

impl Loads {
    /// The spans from number `first` on that are written together.
    fn group(&self, first: usize) -> Range<usize> {
        let mut rows = 0;
        let after = self.spans[first..].iter().position(|span| {
            rows += span.positions.len();
            rows >= WRITTEN_ROWS
        });
        first..after.map_or(self.spans.len(), |last| first + last + 1)
    }

    /// There are pages for all spans.
    pub(super) fn place(&mut self, model: &Transformer, kv: &SequenceKv) -> Result<()> {
        let firsts = std::iter::successors(Some(0), |first| Some(self.group(*first).end));
        let firsts: Vec<usize> = firsts.take_while(|first| *first < self.spans.len()).collect();
        self.rows = Some(CachedRows::new(model, kv, &self.spans, self.reading.readers(), &firsts)?);
        Ok(())
    }

    /// Writes what is cached of some spans in a layer; `all`: not only what is exact. Rows that are computed overwrite theirs
    /// afterwards.
    fn write(
        &self,
        model: &Transformer,
        kv: &mut SequenceKv,
        layer: usize,
        (spans, cached): (Range<usize>, &[CachedLayer]),
        all: bool,
    ) -> Result<()> {
        let rows = self.rows.as_ref();
        rows.map_or(Ok(()), |rows| rows.write(model, kv, layer, (&self.spans, spans), cached, all))
    }

    /// Rows of a layer.
    fn len(&self) -> usize {
        self.spans.iter().map(|span| span.positions.len()).sum()
    }
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    /// The layer's cached rows are taken from who reads them.
    Take,
    /// Some of them are written: of the spans from this one on.
    Write(usize),
    /// A block is compared with what is cached of it; behind the last, the stream is narrowed.
    Compare(usize),
    /// A block's keys and values are written, and behind the last block the others are corrected: all must be there first.
    Enter(usize),
    /// A block goes through the layer.
    Through(usize),
    /// The pass is over.
    Nothing,
}

/// The rule `cacheblend` on its way to the check layer.
struct Checking {
    layer: usize,
    ratio: f32,
    correction: Correction,
    check: Check,
}

/// What a pass has left beside the KV.
pub(super) struct Passed {
    pub(super) watch: Option<Watch>,
    /// See [`PrefillStats::blend_deviation`](crate::PrefillStats).
    pub(super) deviation: Option<f32>,
    /// Positions that the check layer has chosen.
    pub(super) checked: Option<Vec<usize>>,
    /// The final state of the last row, where it was asked for.
    pub(super) state: Option<States>,
}

/// Some rows on their way through the layers.
pub(super) struct Pass {
    stream: Stream,
    loads: bool,
    layer: usize,
    next: Unit,
    /// The layer's cached rows, until all are written; one entry per span.
    cached: Vec<CachedLayer>,
    /// The same on the host, where they are compared.
    compared: Vec<ChunkLayer>,
    corrector: Option<Corrector>,
    watch: Option<Watch>,
    checking: Option<Checking>,
    checked: Option<Vec<usize>>,
    deviation: Option<f32>,
    /// Whether the last row's final state is wanted.
    reads: bool,
    state: Option<States>,
}

impl Pass {
    /// `loads`: the cached layers are written on the way; `corrector`: corrects what stays cached.
    pub(super) fn new(model: &Transformer, stream: Stream, loads: bool, corrector: Option<Corrector>) -> Pass {
        let mut pass = Pass {
            stream,
            loads,
            layer: 0,
            next: Unit::Take,
            cached: Vec::new(),
            compared: Vec::new(),
            corrector,
            watch: None,
            checking: None,
            checked: None,
            deviation: None,
            reads: false,
            state: None,
        };
        if !loads {
            pass.next = pass.first_block(model);
        }
        pass
    }

    /// What the last rows pay is added up.
    pub(super) fn watching(self, watch: Watch) -> Pass {
        Pass { watch: Some(watch), ..self }
    }

    /// The rows are narrowed on a layer to those that deviate most there; what stays cached is corrected from there on.
    pub(super) fn checking(self, layer: usize, ratio: f32, correction: Correction) -> Pass {
        let checking = Checking { layer, ratio, correction, check: Check::default() };
        Pass { checking: Some(checking), ..self }
    }

    /// The final state of the last row is wanted.
    pub(super) fn reading(self) -> Pass {
        Pass { reads: true, ..self }
    }

    pub(super) fn rows(&self) -> usize {
        self.stream.len()
    }

    pub(super) fn is_over(&self) -> bool {
        self.next == Unit::Nothing
    }

    /// Whether the next unit takes a layer from the reading thread.
    pub(super) fn wants_layer(&self) -> bool {
        self.next == Unit::Take
    }

    /// What the next unit costs, in rows that are computed in a layer.
    pub(super) fn cost(&self, model: &Transformer, loads: &Loads) -> usize {
        match self.next {
            Unit::Take => 0,
            Unit::Write(first) => {
                let rows = loads.spans[loads.group(first)].iter().map(|span| span.positions.len()).sum::<usize>();
                rows.div_ceil(WRITTEN)
            }
            Unit::Compare(block) | Unit::Enter(block) | Unit::Through(block) => {
                self.block(model, block).len().max(LEAST)
            }
            Unit::Nothing => 0,
        }
    }

    /// What is left costs, about.
    pub(super) fn left(&self, model: &Transformer, loads: &Loads) -> usize {
        let written = if self.loads { loads.len().div_ceil(WRITTEN) } else { 0 };
        (model.spec.layers - self.layer) * (self.stream.len().max(LEAST) + written)
    }

    /// Runs the next unit. A layer that is wanted must have arrived.
    pub(super) fn step(
        &mut self,
        model: &Transformer,
        plan: &BlendPlan,
        loads: &mut Loads,
        kv: &mut SequenceKv,
    ) -> std::result::Result<(), Lost> {
        self.next = match self.next {
            Unit::Take => self.take(model, loads)?,
            Unit::Write(first) => self.write(model, loads, kv, first)?,
            Unit::Compare(block) => self.compare(model, plan, loads, kv, block)?,
            Unit::Enter(block) => self.enter(model, kv, block)?,
            Unit::Through(block) => self.through(model, kv, block)?,
            Unit::Nothing => Unit::Nothing,
        };
        Ok(())
    }

    /// What it has left.
    pub(super) fn finish(self, model: &Transformer) -> Result<Passed> {
        let Pass { watch, checked, corrector, state, mut deviation, .. } = self;
        // What the check layer has seen says more than the corrector, which saw the chosen ones only.
        if deviation.is_none() {
            deviation = corrector.map_or(Ok(None), |corrector| corrector.deviation(model))?;
        }
        Ok(Passed { watch, deviation, checked, state })
    }

    fn take(&mut self, model: &Transformer, loads: &mut Loads) -> std::result::Result<Unit, Lost> {
        self.cached = loads.reading.take()?;
        let checks = self.checking.as_ref().is_some_and(|checking| checking.layer == self.layer);
        if !checks {
            return Ok(self.first_write(model, loads));
        }
        let of_host = |rows: &CachedLayer| rows.to_host(model.device(), self.layer);
        self.compared = self.cached.iter().map(of_host).collect::<Result<_>>()?;
        Ok(Unit::Compare(0))
    }

    fn write(&mut self, model: &Transformer, loads: &Loads, kv: &mut SequenceKv, first: usize) -> Result<Unit> {
        let (group, all) = (loads.group(first), self.checking.is_none());
        let next = group.end;
        loads.write(model, kv, self.layer, (group, &self.cached), all)?;
        if next < loads.spans.len() {
            return Ok(Unit::Write(next));
        }
        self.cached = Vec::new();
        Ok(self.first_block(model))
    }

    fn compare(
        &mut self,
        model: &Transformer,
        plan: &BlendPlan,
        loads: &Loads,
        kv: &mut SequenceKv,
        block: usize,
    ) -> Result<Unit> {
        let rows = self.block(model, block);
        let Some(checking) = &mut self.checking else { return Ok(self.first_write(model, loads)) };
        let cached = Cached { spans: &loads.spans, rows: &self.compared, shape: model.shape };
        checking.check.compare(model, &self.stream, (self.layer, rows), &cached, kv)?;
        if block + 1 < self.blocks(model) {
            return Ok(Unit::Compare(block + 1));
        }
        let Some(Checking { ratio, correction, check, .. }) = self.checking.take() else {
            return Ok(self.first_write(model, loads));
        };
        self.compared = Vec::new();
        let checked = check.finish(&self.stream, ratio);
        self.stream.keep(model, &checked.kept)?;
        self.corrector = Corrector::new(model, plan, &checked.chosen, correction, self.layer, kv)?;
        self.deviation = Some(checked.deviation);
        self.checked = Some(checked.chosen);
        Ok(self.first_write(model, loads))
    }

    fn enter(&mut self, model: &Transformer, kv: &mut SequenceKv, block: usize) -> Result<Unit> {
        let (rows, layer) = (self.block(model, block), self.layer);
        let Some(corrector) = &mut self.corrector else { return Ok(Unit::Through(0)) };
        if block == 0 {
            corrector.before(model, layer, kv)?;
        }
        self.stream.enter(model, layer, rows, kv)?;
        let blocks = self.blocks(model);
        if block + 1 < blocks {
            return Ok(Unit::Enter(block + 1));
        }
        if let Some(corrector) = &mut self.corrector {
            corrector.after(model, layer, kv)?;
        }
        // In the last layer, nothing is left but the last row's state.
        match self.is_last(model) {
            true if self.reads => Ok(Unit::Through(blocks - 1)),
            true => Ok(Unit::Nothing),
            false => Ok(Unit::Through(0)),
        }
    }

    fn through(&mut self, model: &Transformer, kv: &mut SequenceKv, block: usize) -> Result<Unit> {
        let (rows, layer, blocks) = (self.block(model, block), self.layer, self.blocks(model));
        // Where there is one block, it need not be computed once more to attend.
        let alone = self.corrector.as_mut().filter(|corrector| blocks == 1 && corrector.acts(layer));
        if let Some(corrector) = alone {
            corrector.before(model, layer, kv)?;
            self.stream.enter(model, layer, rows, kv)?;
            corrector.after(model, layer, kv)?;
        } else {
            self.stream.enter(model, layer, rows, kv)?;
        }
        if self.reads && self.is_last(model) && block + 1 == blocks {
            self.state = Some(self.stream.last_state(model, layer, kv)?);
        } else {
            self.stream.leave(model, layer, kv, self.watch.as_mut())?;
        }
        Ok(if block + 1 < blocks { Unit::Through(block + 1) } else { self.next_layer(model) })
    }

    fn is_last(&self, model: &Transformer) -> bool {
        self.layer + 1 == model.spec.layers
    }

    fn next_layer(&mut self, model: &Transformer) -> Unit {
        self.layer += 1;
        match self.layer == model.spec.layers {
            true => Unit::Nothing,
            false if self.loads => Unit::Take,
            false => self.first_block(model),
        }
    }

    /// The first unit of a layer whose cached rows have been taken.
    fn first_write(&mut self, model: &Transformer, loads: &Loads) -> Unit {
        if loads.spans.is_empty() { self.first_block(model) } else { Unit::Write(0) }
    }

    /// The first unit of a layer whose cached rows are written.
    fn first_block(&mut self, model: &Transformer) -> Unit {
        match self.blocks(model) {
            0 => self.next_layer(model),
            1 => Unit::Through(0),
            _ if self.corrector.as_ref().is_some_and(|corrector| corrector.acts(self.layer)) => Unit::Enter(0),
            _ => Unit::Through(0),
        }
    }

    /// The rows go through a layer in blocks that are about equal: a small last one would be computed at the cost of a larger
    /// one. And the last, where there are several, has all tokens of a question that are looked at, so that what they pay is
    /// added up in the same order whatever comes before them.
    fn blocks(&self, model: &Transformer) -> usize {
        // On the CPU, tests have several of them in small contexts.
        let most = if cfg!(test) && model.device().is_none() { 2 * WATCHED } else { ROWS };
        self.stream.len().div_ceil(most.min(model.most_rows()))
    }

    /// The rows of a block.
    fn block(&self, model: &Transformer, number: usize) -> Range<usize> {
        let (rows, count) = (self.stream.len(), self.blocks(model).max(1));
        rows * number / count..rows * (number + 1) / count
    }
}
