//! A graph in a file.

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::core::Core;
use super::graphs::Graphs;
use super::guides::Guides;
use super::links::{ID_BITS, Links};
use super::shape::Shape;
use super::{GRAPH_FROM, GraphIndex, MOST_HEADS, MOST_KEYS, SETTLED, Writer};
use crate::blocks::Blocks;
use crate::check::check_rows;
use crate::codes::{Codes, code_stride};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::KeyIndex;
use crate::params::GraphParams;
use crate::rows::Rows;
use crate::storage::{Parts, Sections, Tag, Wrong};
use crate::twins::{Twins, same_row};

impl<T: Element> GraphIndex<T> {
    /// Writes the graph, or, as long as there is none, the samples for it.
    pub(super) fn write(&self, path: &Path) -> Result<(), IndexError> {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let (len, graphs) = (self.len(), self.graphs());
        let mut sections = Sections::new::<T>(self.kind(), self.dim(), len);
        let p = &self.params;
        let of_heads = graphs.as_ref().map_or(&[][..], |graphs| &graphs.of_heads);
        let bits = of_heads.first().map_or(0, |graph| graph.links().bits());
        let mut typical = of_heads.iter().map(|graph| graph.typical.to_bits());
        let sizes = [p.degree, p.build_ef, p.entry_points, p.sample_neighbours].map(|x| x as u32);
        let mut numbers: Vec<u32> = sizes.into_iter().chain([bits, typical.next().unwrap_or(0)]).collect();
        // Files of one graph are as they were when there could be no other.
        if p.query_heads > 1 {
            numbers.extend(std::iter::once(p.query_heads as u32).chain(typical));
        }
        sections.numbers(Tag::Params, numbers);
        sections.rows(Tag::Rows, &self.rows, len);
        let twins = self.twins.read();
        let mut pairs: Vec<[u32; 2]> =
            twins.iter().flat_map(|(&first, twins)| twins.iter().map(move |&twin| [first, twin])).collect();
        drop(twins);
        pairs.sort_unstable();
        sections.numbers(Tag::Twins, pairs.into_iter().flatten());
        sections.floats(Tag::Samples, &writer.samples);
        if let Some(graphs) = graphs {
            graphs.write(&mut sections, len);
        }
        sections.write(path)
    }

    /// An index from a file.
    pub(crate) fn read(parts: &Parts) -> Result<Self, Wrong> {
        let (params, bits, typical) = read_params(parts)?;
        if parts.len >= MOST_KEYS {
            return Err(format!("{} keys are more than a graph can number", parts.len));
        }
        let rows: Rows<T> = parts.rows(Tag::Rows, parts.len, 0, parts.len)?;
        let twins = Twins::default();
        twins.extend(&read_twins(parts, &rows)?);
        let samples = parts.floats(Tag::Samples, None)?;
        check_rows("sample queries", parts.dim, &samples).map_err(|e| e.to_string())?;
        if !(samples.len() / parts.dim).is_multiple_of(params.query_heads) {
            return Err(format!("{} sample queries of {} query heads", samples.len() / parts.dim, params.query_heads));
        }
        let graphs = match bits {
            0 => None,
            _ => {
                let mut graphs = Graphs::read(parts, &params, bits, &typical, &twins)?;
                if !samples.is_empty() {
                    // Samples are kept until the graphs have settled.
                    graphs.built = graphs.built.min(SETTLED - 1);
                }
                Some(Arc::new(graphs))
            }
        };
        Ok(Self {
            rows,
            params,
            graph_from: GRAPH_FROM,
            graphs: RwLock::new(graphs),
            twins,
            kept: AtomicUsize::new(samples.len()),
            writer: Mutex::new(Writer { distinct: None, samples }),
        })
    }
}

/// Settings, bits of a link, and how long keys typically are in each graph.
fn read_params(parts: &Parts) -> Result<(GraphParams, u32, Vec<f32>), Wrong> {
    let numbers = parts.numbers(Tag::Params, None)?;
    let [degree, build_ef, entry_points, sample_neighbours, bits, first, rest @ ..] = &numbers[..] else {
        return Err(format!("{} settings, expected at least 6", numbers.len()));
    };
    let [degree, build_ef, entry_points, sample_neighbours] =
        [degree, build_ef, entry_points, sample_neighbours].map(|x| *x as usize);
    let query_heads = rest.first().map_or(1, |heads| *heads as usize);
    let others = rest.get(1..).unwrap_or_default();
    let typical: Vec<f32> = std::iter::once(first).chain(others).map(|bits| f32::from_bits(*bits)).collect();
    let params = GraphParams { degree, build_ef, entry_points, sample_neighbours, query_heads };
    let good = (4..=255).contains(&degree)
        && (1..=65_536).contains(&build_ef)
        && (1..=4096).contains(&entry_points)
        && (2..=4096).contains(&sample_neighbours)
        && (1..=MOST_HEADS).contains(&query_heads)
        && (typical.len() == 1 || typical.len() == query_heads && *bits != 0)
        && (*bits == 0 || ID_BITS.contains(bits))
        && typical.iter().all(|typical| *typical >= 0.0 && typical.is_finite());
    if good { Ok((params, *bits, typical)) } else { Err(format!("{params:?}, {bits}, {typical:?} are out of range")) }
}

/// Pairs of a key and a later one that equals it.
fn read_twins<T: Element>(parts: &Parts, rows: &Rows<T>) -> Result<Vec<(u32, u32)>, Wrong> {
    let numbers = parts.numbers(Tag::Twins, None)?;
    let pairs: Vec<(u32, u32)> = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let mut twins: Vec<u32> = pairs.iter().map(|pair| pair.1).collect();
    twins.sort_unstable();
    let twice = twins.windows(2).any(|pair| pair[0] == pair[1]);
    let good = |&(first, twin): &(u32, u32)| {
        first < twin
            && (twin as usize) < rows.len()
            && twins.binary_search(&first).is_err()
            && same_row(rows.row(first as usize), rows.row(twin as usize))
    };
    let ordered = pairs.windows(2).all(|two| two[0] < two[1]);
    if numbers.len() % 2 != 0 || twice || !ordered || !pairs.iter().all(good) {
        return Err("equal keys are recorded wrongly".to_owned());
    }
    Ok(pairs)
}

/// An id that may be linked to.
type Node<'a> = &'a dyn Fn(u32) -> bool;

impl Graphs {
    fn write(&self, sections: &mut Sections, len: usize) {
        let (codes, scales) = self.codes.parts();
        sections.floats(Tag::Center, self.codes.center());
        sections.bytes(Tag::Codes, codes.runs(len).flat_map(|(_, run)| run).copied().collect());
        sections.floats(Tag::Scales, &scales.runs(len).flat_map(|(_, run)| run).copied().collect::<Vec<_>>());
        for (n, graph) in self.of_heads.iter().enumerate() {
            sections.of_graph(n);
            graph.write(sections, len);
        }
    }

    fn read(parts: &Parts, params: &GraphParams, bits: u32, typical: &[f32], twins: &Twins) -> Result<Self, Wrong> {
        let (dim, len) = (parts.dim, parts.len);
        let short = || "a section is too short or not aligned".to_owned();
        let center = parts.floats(Tag::Center, Some(dim))?;
        let (map, offset) = parts.place(Tag::Codes, len, code_stride(dim))?;
        let codes = Blocks::mapped(code_stride(dim), len, map, offset).ok_or_else(short)?;
        if parts.floats(Tag::Scales, Some(len))?.iter().any(|&scale| scale < 0.0) {
            return Err("a scale is negative".to_owned());
        }
        let (map, offset) = parts.place(Tag::Scales, len, 4)?;
        let scales = Blocks::mapped(1, len, map, offset).ok_or_else(short)?;
        let codes = Arc::new(Codes::from_parts(center, codes, scales));
        let twin: HashSet<u32> = twins.read().values().flatten().copied().collect();
        let node = |id: u32| (id as usize) < len && !twin.contains(&id);
        let graph = |(n, &typical)| Core::read(&parts.of_graph(n), params, &codes, bits, typical, &node);
        let of_heads = typical.iter().enumerate().map(graph).collect::<Result<_, _>>()?;
        Ok(Self { codes, built: len, of_heads })
    }
}

impl Core {
    fn write(&self, sections: &mut Sections, len: usize) {
        sections.floats(Tag::Mean, &self.shape.mean);
        sections.floats(Tag::Factor, &self.shape.factor);
        sections.numbers(Tag::Entries, self.entries().iter().copied());
        let (queries, bars) = self.guides.parts();
        sections.floats(Tag::Guides, &queries);
        sections.floats(Tag::Bars, bars);
        let links = self.links();
        let words = links.rows().runs(len).flat_map(|(_, run)| run);
        sections.bytes(Tag::Links, words.flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect());
    }

    fn read(
        parts: &Parts,
        params: &GraphParams,
        codes: &Arc<Codes>,
        bits: u32,
        typical: f32,
        node: Node<'_>,
    ) -> Result<Self, Wrong> {
        let (dim, len) = (parts.dim, parts.len);
        let mean = parts.floats(Tag::Mean, Some(dim))?;
        let factor = parts.floats(Tag::Factor, Some(Shape::factor_len(dim)))?;
        let shape = Shape::from_parts(mean, factor);
        let entries = parts.numbers(Tag::Entries, None)?;
        if entries.iter().any(|&id| !node(id)) || entries.is_empty() {
            return Err("an entry is no key of the graph".to_owned());
        }
        let row = Links::row_bytes_of(params.degree, bits);
        let (map, offset) = parts.place(Tag::Links, len, row)?;
        let links = Links::mapped(params.degree, bits, len, map, offset);
        let links = links.ok_or("a section is too short or not aligned")?;
        if !links.fits(len) {
            return Err(format!("{bits} bits cannot number {len} keys"));
        }
        let view = links.view();
        for id in 0..len as u32 {
            let mut good = true;
            view.for_each(id, |link| good &= node(link));
            if !good {
                return Err(format!("key {id} has a link to a key that is not in the graph"));
            }
        }
        let bars = parts.floats(Tag::Bars, None)?;
        let queries = parts.floats(Tag::Guides, bars.len().checked_mul(dim))?;
        if queries.iter().any(|x| x.abs() > 1.0 + 1e-3) {
            return Err("a kept query is longer than 1".to_owned());
        }
        let guides = Guides::from_parts(dim, queries, bars);
        Ok(Self::from_parts(params.clone(), Arc::clone(codes), shape, guides, links, entries, typical))
    }
}
