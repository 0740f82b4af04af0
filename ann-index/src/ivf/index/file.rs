//! Inverted lists in a file: the rows, the centroids, and which list each distinct key is in.
//!
//! Nothing that faiss itself has written is read: its reader trusts what it finds. Its lists are filled again from
//! numbers that were checked.

use std::path::Path;

use super::IvfIndex;
use super::lists::Lists;
use crate::check::check_rows;
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::KeyIndex;
use crate::params::IvfParams;
use crate::rows::Rows;
use crate::storage::{Parts, Sections, Tag, Wrong};

impl<T: Element> IvfIndex<T> {
    /// Writes keys and lists; the caller holds the writer lock.
    pub(super) fn write(&self, path: &Path) -> Result<(), IndexError> {
        let (len, lists) = (self.len(), self.lists());
        let mut sections = Sections::new::<T>(self.kind(), self.dim(), len);
        let (covered, trained) = lists.as_ref().map_or((0, 0), |lists| (lists.covered(), lists.trained()));
        sections.numbers(Tag::Params, [self.params.lists, covered, trained].map(|x| x as u32));
        sections.rows(Tag::Rows, &self.rows, len);
        sections.floats(Tag::Centroids, lists.as_ref().map_or(&[], |lists| lists.centroids()));
        sections.numbers(Tag::Homes, lists.iter().flat_map(|lists| lists.homes().iter().copied()));
        sections.write(path)
    }

    /// An index from a file.
    pub(super) fn read(parts: &Parts) -> Result<Self, Wrong> {
        let numbers = parts.numbers(Tag::Params, Some(3))?;
        let [lists, covered, trained] = [0, 1, 2].map(|i| numbers[i] as usize);
        if lists > 65_536 || covered > parts.len {
            return Err(format!("{lists} lists over {covered} of {} keys are out of range", parts.len));
        }
        let rows: Rows<T> = parts.rows(Tag::Rows, parts.len, 0, parts.len)?;
        let centroids = parts.floats(Tag::Centroids, None)?;
        check_rows("centroids", parts.dim, &centroids).map_err(|e| e.to_string())?;
        let homes = parts.numbers(Tag::Homes, None)?;
        let lists = match covered {
            0 => None,
            _ => Some(Lists::restore(&rows, covered, trained, &centroids, homes)?),
        };
        Ok(Self::new(rows, IvfParams { lists: numbers[0] as usize }, lists))
    }
}
