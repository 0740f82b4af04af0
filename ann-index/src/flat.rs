//! The exact index: every search reads every key, in order, at the speed of memory.

use std::fmt;
use std::path::Path;

use crate::bitmap::Bitmap;
use crate::check::{check_query, check_rows};
use crate::element::Element;
use crate::error::IndexError;
use crate::key_index::{KeyIndex, SearchResult};
use crate::params::{IndexKind, SearchParams};
use crate::rows::Rows;
use crate::scan::{read_key, scan, scan_group};
use crate::storage::{Parts, Sections, Tag, Wrong};

/// See the module.
pub(crate) struct FlatIndex<T> {
    rows: Rows<T>,
}

impl<T: Element> FlatIndex<T> {
    /// An index over `keys`, rows of `dim` numbers.
    pub(crate) fn build(dim: usize, keys: &[f32]) -> Result<Self, IndexError> {
        check_rows("keys", dim, keys)?;
        let rows = Rows::new(dim, keys.len() / dim);
        rows.append(keys)?;
        Ok(Self { rows })
    }
}

impl<T: Element> FlatIndex<T> {
    /// An index from a file.
    pub(crate) fn read(parts: &Parts) -> Result<Self, Wrong> {
        Ok(Self { rows: parts.rows(Tag::Rows, parts.len, 0, parts.len)? })
    }
}

impl<T: Element> KeyIndex for FlatIndex<T> {
    fn dim(&self) -> usize {
        self.rows.dim()
    }

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn append(&self, keys: &[f32]) -> Result<(), IndexError> {
        check_rows("keys", self.dim(), keys)?;
        self.rows.append(keys).map(|_| ())
    }

    fn search(
        &self,
        query: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<SearchResult, IndexError> {
        check_query(self.dim(), query)?;
        if params.k == 0 {
            return Ok(SearchResult::default());
        }
        Ok(scan(&self.rows, self.len(), query, params.k, exclude))
    }

    fn search_group(
        &self,
        queries: &[f32],
        params: &SearchParams,
        exclude: Option<&Bitmap>,
    ) -> Result<Vec<SearchResult>, IndexError> {
        check_rows("queries", self.dim(), queries)?;
        Ok(scan_group(&self.rows, self.len(), queries, params.k, exclude))
    }

    fn key(&self, id: u32, out: &mut [f32]) -> Result<(), IndexError> {
        read_key(&self.rows, id, out)
    }

    fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.rows.memory_bytes()
    }

    fn kind(&self) -> IndexKind {
        IndexKind::Flat
    }

    fn save(&self, path: &Path) -> Result<(), IndexError> {
        let len = self.len();
        let mut sections = Sections::new::<T>(self.kind(), self.dim(), len);
        sections.rows(Tag::Rows, &self.rows, len);
        sections.write(path)
    }
}

impl<T: Element> fmt::Debug for FlatIndex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlatIndex")
            .field("dim", &self.dim())
            .field("len", &self.len())
            .field("precision", &T::PRECISION)
            .finish()
    }
}
