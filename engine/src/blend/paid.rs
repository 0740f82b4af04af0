//! The attention that the question pays to each token of a context, seen while it is read.

use std::ops::Range;

use crate::attention::paid::add_paid;
use crate::backend::cuda::{Batch, Memory};
use crate::error::Result;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::Transformer;

/// Tokens at the end of the prompt that are looked at: a question may be long, and its end asks.
pub(super) const WATCHED: usize = 64;

/// Attention weights by position in the context, heads and layers summed.
pub(super) struct Paid {
    /// Of the prompt's last token, on layers from half depth on.
    pub(super) last: Vec<f32>,
    /// Of the prompt's last tokens, on all layers.
    pub(super) question: Vec<f32>,
}

/// Adds up what the last rows of a stream pay.
pub(super) struct Watch {
    /// Rows of the stream that are looked at: its last.
    rows: Range<usize>,
    sums: Sums,
}

enum Sums {
    Host(Paid),
    /// `[2 (last, question)][kv_heads][context]` f32.
    Device {
        sums: Memory,
        context: usize,
    },
}

/// Queries of some rows in one layer with the log-sum-exp of their scores, on the host.
pub(super) struct Attended<'a> {
    /// `[rows, heads, head_dim]`
    pub(super) q: &'a [f32],
    /// `[rows, heads]`
    pub(super) lse: &'a [f32],
    pub(super) positions: &'a [usize],
}

impl Watch {
    /// For a stream of `rows` rows, of which the last `suffix` stand behind a context of so many tokens.
    pub(super) fn new(model: &Transformer, context: usize, rows: usize, suffix: usize) -> Result<Watch> {
        let sums = match model.device() {
            None => Sums::Host(Paid { last: vec![0.0; context], question: vec![0.0; context] }),
            Some(device) => Sums::Device { sums: device.paid_sums(context)?, context },
        };
        Ok(Watch { rows: rows - suffix.min(WATCHED)..rows, sums })
    }

    /// Those of the rows of `block` that are looked at, counted from the block's first.
    fn part(&self, block: &Range<usize>) -> Range<usize> {
        let part = self.rows.start.max(block.start)..self.rows.end.min(block.end);
        part.start.saturating_sub(block.start)..part.end.saturating_sub(block.start)
    }

    /// Adds what the rows of `block` pay in `layer`, on the host.
    pub(super) fn add(
        &mut self,
        model: &Transformer,
        layer: usize,
        block: &Range<usize>,
        kv: &SequenceKv,
        attended: &Attended<'_>,
    ) {
        let (part, deep, end) = (self.part(block), is_deep(model, layer), self.rows.end);
        let Sums::Host(paid) = &mut self.sums else { return };
        let heads = model.spec.heads;
        let width = heads * model.spec.head_dim;
        let add = |rows: Range<usize>, to: &mut [f32]| {
            let q = &attended.q[rows.start * width..rows.end * width];
            let queries = model.queries(q, &attended.positions[rows.clone()]);
            add_paid(&model.cpu, kv.recent(layer), &queries, &attended.lse[rows.start * heads..rows.end * heads], to);
        };
        if deep && !part.is_empty() && block.end == end {
            add(part.end - 1..part.end, &mut paid.last);
        }
        if !part.is_empty() {
            add(part, &mut paid.question);
        }
    }

    /// The same of the rows in a GPU's workspace, which are those of `block`.
    pub(super) fn add_on_device(
        &mut self,
        model: &Transformer,
        layer: usize,
        block: &Range<usize>,
        batch: &Batch,
    ) -> Result<()> {
        let (part, last) = (self.part(block), is_deep(model, layer) && block.end == self.rows.end);
        match (&self.sums, model.device()) {
            (Sums::Device { sums, context }, Some(device)) if !part.is_empty() => {
                device.add_paid(layer, batch, part, last, *context, sums)
            }
            _ => Ok(()),
        }
    }

    /// What was paid.
    pub(super) fn finish(self, model: &Transformer) -> Result<Paid> {
        match (self.sums, model.device()) {
            (Sums::Device { sums, context }, Some(device)) => {
                let [last, question] = device.read_paid(&sums, context)?;
                Ok(Paid { last, question })
            }
            (Sums::Host(paid), _) => Ok(paid),
            (Sums::Device { .. }, None) => {
                Err(crate::EngineError::Internal("attention on a GPU with a model on the CPU".into()))
            }
        }
    }
}

/// Whether a layer counts for the last token.
fn is_deep(model: &Transformer, layer: usize) -> bool {
    2 * layer >= model.spec.layers
}
