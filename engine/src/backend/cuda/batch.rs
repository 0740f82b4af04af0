//! What the kernels must know of a batch: tokens, positions, and where each sequence's pages lie.

use std::ops::Range;

use super::device::{Memory, Pinned};
use crate::config::{AttentionConfig, Strategy};
use crate::error::Result;
use crate::kv::device::{DeviceRun, PAGE};
use crate::model::transformer::Piece;

/// Arrays that have an entry for every row, in the order in which they lie in memory.
const ROW_ARRAYS: usize = 5;

/// Rows of one run of pages, as scalars for kernels that serve one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) first: usize,
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl From<&DeviceRun> for Extent {
    fn from(run: &DeviceRun) -> Extent {
        Extent { first: run.first(), start: run.positions().start, end: run.positions().end }
    }
}

/// Rows that are attended together. `window` of 0: all tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Span {
    /// One row a sequence; row `i` has table `i`.
    Decode { rows: Range<usize>, window: usize },
    /// All rows are of one sequence.
    Prefill { rows: Range<usize>, table: usize, extent: Extent, window: usize },
}

impl Span {
    pub(crate) fn rows(&self) -> &Range<usize> {
        match self {
            Span::Decode { rows, .. } | Span::Prefill { rows, .. } => rows,
        }
    }
}

/// Shape and addresses of a batch whose arrays lie in `inputs` on the device.
pub(crate) struct Batch {
    pub(crate) rows: usize,
    pub(crate) tables: usize,
    /// Page ids of a table.
    pub(crate) stride: usize,
    /// Rows whose final states are wanted.
    pub(crate) wanted: usize,
    base: u64,
    /// The arrays, until they are copied.
    integers: Vec<i32>,
    /// First row of each piece, in the order of the pieces.
    pub(crate) starts: Vec<usize>,
    /// Whether a prompt or a context is read, beside which others may decode.
    pub(crate) reads: bool,
    /// Whether some piece wants to see keys and values.
    pub(crate) tapped: bool,
    /// Over the recent runs; each row is in one.
    pub(crate) spans: Vec<Span>,
    /// Over the sinks of sequences that have split them off.
    pub(crate) sinks: Vec<Span>,
}

impl Batch {
    /// Copies the arrays to where the kernels read them.
    pub(crate) fn upload(&self, inputs: &Memory) -> Result<()> {
        inputs.write(0, &self.integers)
    }

    /// The same through page-locked memory, which must not be touched until the stream has passed.
    pub(crate) fn upload_through(&self, staging: &mut Pinned, inputs: &Memory) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(&self.integers);
        staging.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        inputs.write(0, &staging.bytes()[..bytes.len()])
    }

    /// Token ids; -1: padding.
    pub(crate) fn tokens(&self) -> u64 {
        self.base
    }

    /// Positions; -1: padding.
    pub(crate) fn positions(&self) -> u64 {
        self.row_array(1)
    }

    /// The table of each row.
    pub(crate) fn table_of(&self) -> u64 {
        self.row_array(2)
    }

    /// The rows whose final states are wanted, as many as [`wanted`](Batch::wanted).
    pub(crate) fn wanted_rows(&self) -> u64 {
        self.row_array(3)
    }

    /// For each wanted row, whether end-of-text tokens must not be chosen behind it.
    pub(crate) fn banned(&self) -> u64 {
        self.row_array(4)
    }

    /// Position of the first slot of each table.
    pub(crate) fn first(&self) -> u64 {
        self.row_array(ROW_ARRAYS)
    }

    pub(crate) fn start(&self) -> u64 {
        self.first() + 4 * self.tables as u64
    }

    pub(crate) fn end(&self) -> u64 {
        self.start() + 4 * self.tables as u64
    }

    /// The page ids of table `number`.
    pub(crate) fn table(&self, number: usize) -> u64 {
        self.end() + 4 * (self.tables + number * self.stride) as u64
    }

    fn row_array(&self, number: usize) -> u64 {
        self.base + 4 * (number * self.rows) as u64
    }
}

/// Integers that a batch of this shape takes.
pub(crate) fn integers(rows: usize, tables: usize, stride: usize) -> usize {
    ROW_ARRAYS * rows + tables * (3 + stride)
}

/// The tables that pieces need: one for each recent run and one for each split-off run of sinks.
pub(crate) fn tables_of(pieces: &[Piece<'_>]) -> usize {
    pieces.iter().map(|p| 1 + usize::from(p.kv.device().is_some_and(|kv| kv.sinks.is_some()))).sum()
}

/// Lays pieces out, for arrays that will lie in `inputs`. Decoding pieces come first in memory; wanted rows are in the order of
/// the pieces. The pieces' runs must already reach to the ends of their tokens, and their tokens be the last of their run.
///
/// `padded`: rows to fill up to, with one token a sequence and the model's own window; 0: no padding. `stride`: page ids of
/// a table.
pub(crate) fn lay_out(
    pieces: &[Piece<'_>],
    window: Option<usize>,
    padded: usize,
    stride: usize,
    inputs: &Memory,
) -> Batch {
    let real: usize = pieces.iter().map(|p| p.tokens.len()).sum();
    let rows = real.max(padded);
    let tables = tables_of(pieces).max(padded);
    let mut fill = Fill::new(rows, tables, stride);
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    // Stable: decoding pieces by their window, then the others as they come.
    order.sort_by_key(|&i| (pieces[i].tokens.len() > 1, recent_window(&pieces[i], window)));
    let mut batch = Batch {
        rows,
        tables,
        stride,
        wanted: 0,
        base: inputs.address(),
        integers: Vec::new(),
        starts: vec![0; pieces.len()],
        reads: pieces.iter().any(|p| p.tokens.len() > 1),
        tapped: pieces.iter().any(|p| p.tap.is_some()),
        spans: Vec::new(),
        sinks: Vec::new(),
    };
    let mut sink_table = pieces.len();
    let mut row = 0;
    for (table, &i) in order.iter().enumerate() {
        let piece = &pieces[i];
        let Some(kv) = piece.kv.device() else { continue };
        let span = row..row + piece.tokens.len();
        batch.starts[i] = row;
        row = span.end;
        fill.piece(&span, table, piece.tokens, &kv.recent);
        let seen = recent_window(piece, window);
        batch.add(span.clone(), table, Extent::from(&kv.recent), seen);
        if let Some(sinks) = &kv.sinks {
            fill.run(sink_table, sinks);
            let extent = Extent::from(sinks);
            let window = window.unwrap_or(0);
            batch.sinks.push(Span::Prefill { rows: span, table: sink_table, extent, window });
            sink_table += 1;
        }
    }
    for (piece, start) in pieces.iter().zip(&batch.starts) {
        let end = start + piece.tokens.len();
        for row in end - piece.wanted()..end {
            fill.wanted(batch.wanted, row, piece.ban_eos);
            batch.wanted += 1;
        }
    }
    if padded > 0 {
        batch.spans = vec![Span::Decode { rows: 0..rows, window: window.unwrap_or(0) }];
        batch.wanted = padded;
    }
    batch.integers = fill.integers;
    batch
}

/// Rows at ascending positions of one run, which has pages for them; the last is the one that is wanted, if any. `ban_eos`:
/// end-of-text tokens must not be chosen behind it.
pub(crate) fn at_positions(
    positions: &[usize],
    run: &DeviceRun,
    window: Option<usize>,
    ban_eos: bool,
    stride: usize,
    inputs: &Memory,
) -> Batch {
    let rows = positions.len();
    let mut fill = Fill::new(rows, 1, stride);
    for (row, position) in positions.iter().enumerate() {
        fill.integers[rows + row] = *position as i32;
    }
    fill.run(0, run);
    if rows > 0 {
        fill.wanted(0, rows - 1, ban_eos);
    }
    let span = Span::Prefill { rows: 0..rows, table: 0, extent: Extent::from(run), window: window.unwrap_or(0) };
    Batch {
        rows,
        tables: 1,
        stride,
        wanted: rows.min(1),
        base: inputs.address(),
        integers: fill.integers,
        starts: vec![0],
        reads: true,
        tapped: false,
        spans: vec![span],
        sinks: Vec::new(),
    }
}

impl Batch {
    /// Adds a piece's rows; decoding pieces with the same window behind each other become one span.
    fn add(&mut self, rows: Range<usize>, table: usize, extent: Extent, window: usize) {
        if rows.len() > 1 {
            self.spans.push(Span::Prefill { rows, table, extent, window });
            return;
        }
        match self.spans.last_mut() {
            Some(Span::Decode { rows: before, window: seen }) if *seen == window && before.end == rows.start => {
                before.end = rows.end;
            }
            _ => self.spans.push(Span::Decode { rows, window }),
        }
    }
}

/// How many recent tokens a piece's rows see; 0: all that are there.
fn recent_window(piece: &Piece<'_>, model: Option<usize>) -> usize {
    let split = piece.kv.device().is_some_and(|kv| kv.sinks.is_some());
    match piece.attention {
        Some(AttentionConfig { strategy: Strategy::Window, window, .. }) if split => *window,
        _ => model.unwrap_or(0),
    }
}

/// The arrays under construction.
struct Fill {
    integers: Vec<i32>,
    rows: usize,
    tables: usize,
    stride: usize,
}

impl Fill {
    /// All padding: no token, no position, empty runs.
    fn new(rows: usize, tables: usize, stride: usize) -> Fill {
        let mut all = vec![0; integers(rows, tables, stride)];
        all[..2 * rows].fill(-1);
        Fill { integers: all, rows, tables, stride }
    }

    fn piece(&mut self, span: &Range<usize>, table: usize, tokens: &[u32], run: &DeviceRun) {
        let first = run.positions().end - tokens.len();
        for (i, token) in tokens.iter().enumerate() {
            let row = span.start + i;
            self.integers[row] = *token as i32;
            self.integers[self.rows + row] = (first + i) as i32;
            self.integers[2 * self.rows + row] = table as i32;
        }
        self.run(table, run);
    }

    fn run(&mut self, table: usize, run: &DeviceRun) {
        debug_assert!(run.page_count() <= self.stride && run.first().is_multiple_of(PAGE));
        let base = ROW_ARRAYS * self.rows;
        self.integers[base + table] = run.first() as i32;
        self.integers[base + self.tables + table] = run.positions().start as i32;
        self.integers[base + 2 * self.tables + table] = run.positions().end as i32;
        let pages = base + 3 * self.tables + table * self.stride;
        for (to, page) in self.integers[pages..pages + self.stride].iter_mut().zip(run.pages()) {
            *to = page as i32;
        }
    }

    fn wanted(&mut self, number: usize, row: usize, ban_eos: bool) {
        self.integers[3 * self.rows + number] = row as i32;
        self.integers[4 * self.rows + number] = i32::from(ban_eos);
    }
}
