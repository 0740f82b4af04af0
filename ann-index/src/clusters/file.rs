//! Clusters in a file.

use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

use super::segment::Segment;
use super::{ClustersIndex, State};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::KeyIndex;
use crate::params::ClustersParams;
use crate::rows::Rows;
use crate::storage::{Parts, Sections, Tag, Wrong, append_rows};

impl<T: Element> ClustersIndex<T> {
    /// Writes the clusters and the tail; the caller holds the writer lock.
    pub(super) fn write(&self, path: &Path) -> Result<(), IndexError> {
        let state = self.state();
        let mut sections = Sections::new::<T>(self.kind(), self.dim, state.len());
        let params = [self.params.segment, self.params.keys_per_cluster, self.params.iterations];
        sections.numbers(Tag::Params, params.map(|x| x as u32));
        let counts = state.segments.iter().flat_map(|s| [s.ids().len() as u32, s.starts().len() as u32]);
        sections.numbers(Tag::Segments, counts);
        sections.numbers(Tag::Ids, state.segments.iter().flat_map(|s| s.ids().iter().copied()));
        sections.numbers(Tag::Starts, state.segments.iter().flat_map(|s| s.starts().iter().copied()));
        let mut rows = Vec::new();
        state.segments.iter().for_each(|s| append_rows(&mut rows, s.rows(), s.ids().len()));
        sections.bytes(Tag::Rows, rows);
        sections.rows(Tag::Tail, &state.tail, state.tail.len());
        sections.write(path)
    }

    /// An index from a file.
    pub(crate) fn read(parts: &Parts) -> Result<Self, Wrong> {
        let params = read_params(parts)?;
        let counts = parts.numbers(Tag::Segments, None)?;
        let (all_ids, all_starts) = (parts.numbers(Tag::Ids, None)?, parts.numbers(Tag::Starts, None)?);
        if counts.len() % 2 != 0 || all_ids.len() > parts.len {
            return Err(format!("{} clustered keys among {}", all_ids.len(), parts.len));
        }
        let (mut segments, mut first, mut used) = (Vec::new(), 0, 0);
        for count in counts.chunks_exact(2) {
            let ids = all_ids.get(first..first + count[0] as usize);
            let starts = all_starts.get(used..used + count[1] as usize);
            let (Some(ids), Some(starts)) = (ids, starts) else {
                return Err("the segments have more keys or clusters than are there".to_owned());
            };
            check_segment(first, ids, starts)?;
            let rows = parts.rows(Tag::Rows, all_ids.len(), first, ids.len())?;
            let segment = Segment::from_parts(first, rows, ids.to_vec(), starts.to_vec()).map_err(|e| e.to_string())?;
            segments.push(Arc::new(segment));
            first += ids.len();
            used += starts.len();
        }
        if first != all_ids.len() || used != all_starts.len() {
            return Err("there are more keys or clusters than the segments have".to_owned());
        }
        // The tail grows: it cannot stay in the file, and is short.
        let mapped: Rows<T> = parts.rows(Tag::Tail, parts.len - first, 0, parts.len - first)?;
        let mut state = State { segments, clustered: first, tail: mapped };
        state.tail = state.tail.copied().map_err(|e| e.to_string())?;
        Ok(Self { dim: parts.dim, params, state: RwLock::new(Arc::new(state)), writer: Mutex::default() })
    }
}

fn read_params(parts: &Parts) -> Result<ClustersParams, Wrong> {
    let numbers = parts.numbers(Tag::Params, Some(3))?;
    let [segment, keys_per_cluster, iterations] = [0, 1, 2].map(|i| numbers[i] as usize);
    let params = ClustersParams { segment, keys_per_cluster, iterations };
    let good =
        (64..=65_536).contains(&segment) && (1..=1024).contains(&keys_per_cluster) && (1..=100).contains(&iterations);
    if good { Ok(params) } else { Err(format!("{params:?} are out of range")) }
}

/// Whether the ids are those from `first` on in some order, and the starts ascend to their number.
fn check_segment(first: usize, ids: &[u32], starts: &[u32]) -> Result<(), Wrong> {
    let mut seen = vec![false; ids.len()];
    for &id in ids {
        match seen.get_mut((id as usize).wrapping_sub(first)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(format!("key {id} is twice or in the wrong segment")),
        }
    }
    let ascend = starts.windows(2).all(|pair| pair[0] < pair[1]);
    if ids.is_empty() || !ascend || starts.first() != Some(&0) || starts.last() != Some(&(ids.len() as u32)) {
        return Err(format!("the clusters of the segment from key {first} on do not cover it"));
    }
    Ok(())
}
