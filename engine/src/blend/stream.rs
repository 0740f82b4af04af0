//! The residual stream of the rows that a blend computes, where the model computes.

use std::ops::Range;

use super::paid::{Attended, Watch};
use super::plan::{Span, Treatment};
use crate::backend::cuda::{Batch, CachedSpan, CachedSpans, Memory};
use crate::error::Result;
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{Qkv, Rows, States, Transformer, gather};
use crate::tiers::{CachedLayer, ChunkReader};

/// Rows at ascending positions of one context, with their residual stream.
pub(super) struct Stream {
    rows: Rows,
    x: Residual,
    /// End-of-text tokens must not be chosen behind the last row.
    ban_eos: bool,
    /// What `enter` has left for `leave`.
    entered: Option<(Range<usize>, Entered)>,
}

/// Queries of some rows in a layer, where the model computes.
enum Entered {
    Host(Qkv, Rows),
    /// They are in the workspace.
    Device(Batch),
}

/// `[rows, hidden]`
enum Residual {
    Host(Vec<f32>),
    Device(Memory),
}

impl Stream {
    /// The embeddings of `tokens`. `ban_eos`: end-of-text tokens must not be chosen behind the last of them.
    pub(super) fn new(model: &Transformer, positions: Vec<usize>, tokens: &[u32], ban_eos: bool) -> Result<Stream> {
        let x = match model.device() {
            None => Residual::Host(model.embed(tokens)?),
            Some(device) => Residual::Device(device.stream(tokens)?),
        };
        Ok(Stream { rows: model.stage_rows(positions), x, ban_eos, entered: None })
    }

    pub(super) fn len(&self) -> usize {
        self.rows.positions.len()
    }

    pub(super) fn position(&self, row: usize) -> usize {
        self.rows.positions[row]
    }

    /// Keys (not rotated) and values of the rows of `block` in `layer`, `[rows, kv_heads, head_dim]`.
    pub(super) fn keys_and_values(
        &self,
        model: &Transformer,
        layer: usize,
        block: Range<usize>,
        kv: &SequenceKv,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        match &self.x {
            Residual::Host(x) => {
                let hidden = model.spec.hidden;
                let qkv = model.qkv(layer, &x[block.start * hidden..block.end * hidden], &self.rows.part(block));
                Ok((qkv.keys.to_vec(), qkv.values.to_vec()))
            }
            Residual::Device(x) => {
                let positions = &self.rows.positions[block.clone()];
                on_device(model)?.stream_keys_and_values(layer, x, block.start, positions, kv)
            }
        }
    }

    /// Computes queries, keys and values of the rows of `block` in `layer`, and writes keys and values.
    pub(super) fn enter(
        &mut self,
        model: &Transformer,
        layer: usize,
        block: Range<usize>,
        kv: &mut SequenceKv,
    ) -> Result<()> {
        let entered = match &self.x {
            Residual::Host(x) => {
                let (rows, hidden) = (self.rows.part(block.clone()), model.spec.hidden);
                let qkv = model.qkv(layer, &x[block.start * hidden..block.end * hidden], &rows);
                model.write_kv(kv.recent_mut(layer), &rows, &qkv.keys, &qkv.values);
                Entered::Host(qkv, rows)
            }
            Residual::Device(x) => {
                let positions = &self.rows.positions[block.clone()];
                Entered::Device(on_device(model)?.stream_enter(layer, x, block.start, positions, kv, self.ban_eos)?)
            }
        };
        self.entered = Some((block, entered));
        Ok(())
    }

    /// Attention and all behind it for the rows that were last entered; those before them have been through the layer. In the
    /// last layer nothing behind attention is of use, and attention only to `watch`, which sees what they pay.
    pub(super) fn leave(
        &mut self,
        model: &Transformer,
        layer: usize,
        kv: &SequenceKv,
        mut watch: Option<&mut Watch>,
    ) -> Result<()> {
        let Some((block, entered)) = self.entered.take() else { return Ok(()) };
        let last = layer + 1 == model.spec.layers;
        if last && watch.is_none() {
            return Ok(());
        }
        match (&mut self.x, entered) {
            (Residual::Host(x), Entered::Host(qkv, rows)) => {
                let state = kv.attend_exact(&model.cpu, layer, &model.queries(&qkv.q, &rows.positions));
                if let Some(watch) = &mut watch {
                    let attended = Attended { q: &qkv.q, lse: &state.lse, positions: &rows.positions };
                    watch.add(model, layer, &block, kv, &attended);
                }
                if !last {
                    let hidden = model.spec.hidden;
                    model.finish_layer(layer, &mut x[block.start * hidden..block.end * hidden], &state.out);
                }
                Ok(())
            }
            (Residual::Device(x), Entered::Device(batch)) => {
                on_device(model)?.stream_leave(layer, x, block.start, &batch, last)?;
                watch.map_or(Ok(()), |watch| watch.add_on_device(model, layer, &block, &batch))
            }
            _ => Err(crate::EngineError::Internal("rows of another device".into())),
        }
    }

    /// The last layer for the very last row, which was last entered: its final state, as a forward pass leaves it.
    pub(super) fn last_state(&mut self, model: &Transformer, layer: usize, kv: &SequenceKv) -> Result<States> {
        match (&self.x, self.entered.take()) {
            (Residual::Host(x), Some((_, Entered::Host(qkv, rows)))) => {
                let (last, width) = (rows.positions.len() - 1, model.spec.heads * model.spec.head_dim);
                let queries = model.queries(&qkv.q[last * width..], &rows.positions[last..]);
                let state = kv.attend_exact(&model.cpu, layer, &queries);
                let mut x = x[x.len() - model.spec.hidden..].to_vec();
                model.finish_layer(layer, &mut x, &state.out);
                Ok(States::Host(x))
            }
            (Residual::Device(_), Some((_, Entered::Device(batch)))) => {
                Ok(States::Device(on_device(model)?.stream_last_state(layer, &batch)?))
            }
            _ => Err(crate::EngineError::Internal("no row was entered whose state is asked for".into())),
        }
    }

    /// Narrows the stream to some of its rows.
    pub(super) fn keep(&mut self, model: &Transformer, kept: &[usize]) -> Result<()> {
        self.x = match &self.x {
            Residual::Host(x) => Residual::Host(gather(x, model.spec.hidden, kept)),
            Residual::Device(x) => Residual::Device(on_device(model)?.stream_rows(x, kept)?),
        };
        self.rows = self.rows.pick(kept);
        Ok(())
    }
}

/// Spans of cached rows on their way to the pages.
pub(super) enum CachedRows {
    /// Angles of each span's positions.
    Host(Vec<Rows>),
    /// The spans with this treatment.
    Device(Box<[(Treatment, CachedSpans); 2]>),
}

impl CachedRows {
    /// For all layers of these spans, which are read by `readers`; `kv` has pages for them. `firsts`: numbers of the spans that
    /// groups of those that are written together begin with.
    pub(super) fn new(
        model: &Transformer,
        kv: &SequenceKv,
        spans: &[Span],
        readers: &[ChunkReader],
        firsts: &[usize],
    ) -> Result<CachedRows> {
        let Some(device) = model.device() else {
            return Ok(CachedRows::Host(spans.iter().map(|s| model.rows(s.positions.clone().collect())).collect()));
        };
        let of = |treatment| {
            let ours = spans.iter().zip(readers).enumerate().filter(|(_, (span, _))| span.treatment == treatment);
            let ours = ours.map(|(number, (span, reader))| CachedSpan {
                number,
                group: firsts.partition_point(|first| *first <= number),
                positions: span.positions.clone(),
                chunk: reader.on_device().cloned(),
            });
            Ok::<_, crate::EngineError>((treatment, device.cached_spans(kv, &ours.collect::<Vec<_>>())?))
        };
        Ok(CachedRows::Device(Box::new([of(Treatment::Exact)?, of(Treatment::Cached)?])))
    }

    /// Writes a group of the spans in a layer; `all`: not only those that are exact.
    pub(super) fn write(
        &self,
        model: &Transformer,
        kv: &mut SequenceKv,
        layer: usize,
        (spans, group): (&[Span], Range<usize>),
        cached: &[CachedLayer],
        all: bool,
    ) -> Result<()> {
        let wanted = |treatment: Treatment| all || treatment == Treatment::Exact;
        match self {
            CachedRows::Host(rows) => {
                let dtype = model.shape.dtype;
                for at in group.filter(|at| wanted(spans[*at].treatment)) {
                    let cached = cached[at].to_host(None, layer)?;
                    let (keys, values) = (dtype.decode(&cached.keys), dtype.decode(&cached.values));
                    model.write_kv(kv.recent_mut(layer), &rows[at], &keys, &values);
                }
                Ok(())
            }
            CachedRows::Device(parts) => {
                let mut parts = parts.iter().filter(|(treatment, _)| wanted(*treatment));
                parts.try_for_each(|(_, spans)| on_device(model)?.write_cached(layer, spans, &group, cached))
            }
        }
    }
}

fn on_device(model: &Transformer) -> Result<&crate::backend::cuda::CudaModel> {
    model.device().ok_or_else(|| crate::EngineError::Internal("a stream on a GPU with a model on the CPU".into()))
}
