//! Cached rows on their way to the pages of a context: through the memories that copies come to, or from where they lie on the
//! GPU already.

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;

use super::device::Memory;
use super::launch::{Shape, arguments};
use super::model::CudaModel;
use super::ops::{BLOCK_HEADS, GRID_ROWS, THREADS};
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;
use crate::tiers::{CachedLayer, DeviceChunk};

/// Where the cached rows of some spans of a context go, in any layer.
pub(crate) struct CachedSpans {
    /// Page ids of the context.
    table: Memory,
    first: usize,
    /// `[3 (position, at, apart)][rows]`, as `kv_rows.cu` has it: the rows of all loads, then those that lie on the GPU.
    rows: Memory,
    count: usize,
    loads: Vec<Load>,
    /// Spans that lie on the GPU, with their rows.
    resident: Vec<(usize, Range<usize>)>,
    chunks: Vec<Arc<DeviceChunk>>,
    /// On which rows that come are written.
    arrivals: CUstream,
}

/// What one copy brings.
#[derive(Debug, Default, PartialEq, Eq)]
struct Load {
    rows: Range<usize>,
    /// Spans, and which of their rows: keys of each, then values.
    parts: Vec<(usize, Range<usize>)>,
}

/// A span of cached rows of a context.
pub(crate) struct CachedSpan {
    /// Its number among all spans of the context.
    pub(crate) number: usize,
    /// Spans that are written together: no copy brings rows of two groups.
    pub(crate) group: usize,
    pub(crate) positions: Range<usize>,
    /// The chunk, where it lies on the GPU.
    pub(crate) chunk: Option<Arc<DeviceChunk>>,
}

/// Divides spans among copies of `room` rows of keys and as many of values at most. Returns the copies, and of each row its
/// position, where its keys are and how far behind them its values.
fn divide(spans: &[&CachedSpan], room: usize) -> (Vec<Load>, Vec<[usize; 3]>) {
    let (mut loads, mut rows, mut filled, mut group) = (Vec::<Load>::new(), Vec::new(), room, 0);
    for span in spans {
        let mut from = 0;
        while from < span.positions.len() {
            if filled == room || span.group != group {
                group = span.group;
                loads.push(Load { rows: rows.len()..rows.len(), parts: Vec::new() });
                filled = 0;
            }
            let Some(load) = loads.last_mut() else { break };
            let part = from..span.positions.len().min(from + room - filled);
            let length = part.len();
            rows.extend((0..length).map(|i| [span.positions.start + from + i, 2 * filled + i, length]));
            from = part.end;
            load.parts.push((span.number, part));
            load.rows.end = rows.len();
            filled += length;
        }
    }
    (loads, rows)
}

impl CudaModel {
    /// Prepares for the cached rows of these spans of a context, which has pages for them. The device's memory for them is made
    /// once for all layers.
    pub(crate) fn cached_spans(&self, kv: &SequenceKv, spans: &[CachedSpan]) -> Result<CachedSpans> {
        self.device.bind()?;
        let here =
            kv.device().ok_or_else(|| EngineError::Internal("a context on the CPU was given to a GPU".into()))?;
        let row = self.row_bytes();
        let room = self.copies().room() / (2 * row);
        let staged: Vec<&CachedSpan> = spans.iter().filter(|span| span.chunk.is_none()).collect();
        let (loads, mut rows) = divide(&staged, room);
        let mut resident = Vec::new();
        for (span, chunk) in spans.iter().filter_map(|span| Some((span, span.chunk.as_ref()?))) {
            let (at, length) = (chunk.offset() as usize / row, span.positions.len());
            resident.push((span.number, rows.len()..rows.len() + length));
            rows.extend((0..length).map(|i| [span.positions.start + i, at + i, length]));
        }
        let numbers: Vec<i32> = (0..3).flat_map(|array| rows.iter().map(move |row| row[array] as i32)).collect();
        let pages: Vec<i32> = here.recent.pages().map(|page| page as i32).collect();
        let what = "the places of cached rows";
        let (table, numbers) = (self.device.upload(&pages, what)?, self.device.upload(&numbers, what)?);
        Ok(CachedSpans {
            table,
            first: here.recent.first(),
            rows: numbers,
            count: rows.len(),
            loads,
            resident,
            chunks: spans.iter().filter_map(|span| span.chunk.clone()).collect(),
            // Behind the pages' former owners, and the numbers above.
            arrivals: self.copies().arrivals()?,
        })
    }

    /// Bytes of a token's keys, or values, in a layer.
    fn row_bytes(&self) -> usize {
        self.shape.width() * self.shape.dtype.size()
    }

    /// Writes a layer of the spans with the numbers `group`, which is one of the groups that they were given in. Their rows are
    /// found by their numbers in `cached`. Kernels that are launched from now on find them in the pages.
    pub(crate) fn write_cached(
        &self,
        layer: usize,
        spans: &CachedSpans,
        group: &Range<usize>,
        cached: &[CachedLayer],
    ) -> Result<()> {
        self.device.bind()?;
        let (to, row) = (&self.workspace.cached, self.row_bytes());
        let mut copies = self.copies();
        let ours = |load: &&Load| load.parts.first().is_some_and(|(span, _)| group.contains(span));
        for load in spans.loads.iter().filter(ours) {
            copies.begin()?;
            for (span, rows) in &load.parts {
                let (found, pinned) = match &cached[*span] {
                    CachedLayer::Host(found) => (found, false),
                    CachedLayer::Pinned(found) => (found, true),
                    CachedLayer::Device(_) => {
                        return Err(EngineError::Internal(
                            "a chunk that lies on the GPU was to be copied there".into(),
                        ));
                    }
                };
                let bytes = rows.start * row..rows.end * row;
                copies.bring(&found.keys.slice(bytes.clone()), pinned, to)?;
                copies.bring(&found.values.slice(bytes), pinned, to)?;
            }
            let from = copies.come(to)?;
            self.write_rows(spans.arrivals, layer, 0, from, spans, &load.rows)?;
            copies.used()?;
        }
        let mut ours = spans.resident.iter().filter(|(span, _)| group.contains(span)).map(|(_, rows)| rows);
        let Some(first) = ours.next() else { return Ok(()) };
        // They lie one behind the other.
        let rows = first.start..ours.next_back().unwrap_or(first).end;
        if layer == 0 {
            spans.chunks.iter().try_for_each(|chunk| chunk.hold(self))?;
        }
        let from = self.chunks.as_ref().map_or(0, |arena| arena.address());
        self.write_rows(self.device.stream(), layer, layer, from, spans, &rows)
    }

    /// Writes some rows, which lie at `from` on: those of `step` layers behind the one that their numbers are of.
    fn write_rows(
        &self,
        stream: CUstream,
        layer: usize,
        step: usize,
        from: u64,
        spans: &CachedSpans,
        rows: &Range<usize>,
    ) -> Result<()> {
        let (ops, shape) = (&self.ops, &self.shape);
        let array = |number: usize| spans.rows.at::<i32>(number * spans.count + rows.start);
        let arguments = arguments![
            from,
            &ops.cos,
            &ops.sin,
            array(0),
            array(1),
            array(2),
            step,
            &spans.table,
            spans.first,
            self.pool.layer(layer),
            rows.len(),
            shape.kv_heads,
            shape.head_dim,
        ];
        let grid = (shape.kv_heads.div_ceil(BLOCK_HEADS), rows.len().min(GRID_ROWS));
        let launch = Shape { grid, ..Shape::new(1, THREADS) };
        self.device.launch_on(stream, ops.write_rows, launch, arguments)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_row_is_brought_once_and_found_where_its_copy_puts_it(
            lengths in prop::collection::vec(0usize..20, 0..6), room in 1usize..12,
        ) {
            let mut spans = Vec::new();
            let mut start = 3;
            for (i, length) in lengths.iter().enumerate() {
                let positions = start..start + length;
                spans.push(CachedSpan { number: 2 * i, group: i / 3, positions, chunk: None });
                start += length + i;
            }
            let (loads, rows) = divide(&spans.iter().collect::<Vec<_>>(), room);
            let mut positions = Vec::new();
            for load in &loads {
                // What the copies put where: (key or value, position).
                let mut memory = Vec::new();
                for (number, part) in &load.parts {
                    let span = &spans[number / 2];
                    for side in 0..2 {
                        memory.extend(part.clone().map(|row| (side, span.positions.start + row)));
                    }
                }
                prop_assert!(memory.len() <= 2 * room && load.rows.len() * 2 == memory.len());
                prop_assert!(load.parts.iter().all(|(number, _)| (*number < 6) == (load.parts[0].0 < 6)));
                for [position, at, apart] in &rows[load.rows.clone()] {
                    prop_assert_eq!((memory[*at], memory[at + apart]), ((0, *position), (1, *position)));
                    positions.push(*position);
                }
            }
            prop_assert_eq!(positions, spans.iter().flat_map(|span| span.positions.clone()).collect::<Vec<_>>());
        }
    }
}
