//! Passages of a vector store, as clients of OpenAI's API search for them.

use std::collections::HashMap;

use documents::{Attributes, DocumentId, DocumentInfo, Found};

use super::super::filter::Filter;
use super::attachments::attributes_of;
use super::{Service, attached_name};
use settings::Result;

/// What is searched for in a store.
#[derive(Clone, Debug, PartialEq)]
pub struct StoreSearch {
    /// Texts that are searched for, each for itself.
    pub queries: Vec<String>,
    /// Which files may be found.
    pub filter: Option<Filter>,
    /// Passages at most.
    pub limit: usize,
    /// Passages that score less are left out, 0 to 1.
    pub score_threshold: f32,
}

/// A passage that was found in a store.
#[derive(Clone, Debug, PartialEq)]
pub struct StoreHit {
    /// The id of its file; of its document, where no file was attached.
    pub file: String,
    /// Its file's name.
    pub filename: String,
    /// How well it fits the query, as a share of the score of the passage that fits best, over 0 to 1; of several queries, the
    /// one that it fits best.
    pub score: f32,
    /// What the client keeps at the file.
    pub attributes: Attributes,
    /// The passage.
    pub found: Found,
}

/// What a search of a store found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StoreHits {
    /// Passages, best first.
    pub hits: Vec<StoreHit>,
    /// Whether more passages fit than were asked for.
    pub has_more: bool,
}

impl Service {
    /// The passages of a store that fit best, best first.
    ///
    /// # Errors
    /// [`settings::QuireError::NotFound`], an expired store, a failing index or catalog; `Cancelled` once `wanted` says no.
    pub fn search_store(&self, id: &str, search: &StoreSearch, wanted: &dyn Fn() -> bool) -> Result<StoreHits> {
        let info = self.live_store(id)?;
        let collection = self.library.collection(&info.name)?;
        let admits = |document: &DocumentInfo| admitted(document, search.filter.as_ref()).is_some();
        let mut best: HashMap<(DocumentId, u32), (f32, Found)> = HashMap::new();
        for query in &search.queries {
            // One more tells whether there are more.
            let found = collection.search_where(query, search.limit + 1, &admits, wanted)?;
            let top = found.first().map_or(1.0, |found| found.score.max(f32::MIN_POSITIVE));
            for found in found {
                let score = found.score / top;
                let known = best.entry((found.id, found.number)).or_insert_with(|| (score, found));
                known.0 = known.0.max(score);
            }
        }
        let mut ranked: Vec<(f32, Found)> = best.into_values().collect();
        ranked.retain(|(score, _)| *score >= search.score_threshold);
        ranked.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| (&x.path, x.number).cmp(&(&y.path, y.number))));
        let has_more = ranked.len() > search.limit;
        ranked.truncate(search.limit);
        self.note_use(&info);
        let mut hits = Vec::with_capacity(ranked.len());
        for (score, found) in ranked {
            // One that was removed meanwhile is none.
            let Some(document) = collection.catalog().document(&found.id)? else { continue };
            let Some((file, filename, attributes)) = admitted(&document, search.filter.as_ref()) else { continue };
            hits.push(StoreHit { file, filename, score, attributes, found });
        }
        Ok(StoreHits { hits, has_more })
    }
}

/// The first file of a document that a filter admits: its id, its name, and what the client keeps at it.
fn admitted(document: &DocumentInfo, filter: Option<&Filter>) -> Option<(String, String, Attributes)> {
    let files = document.names.iter().map(|name| match attached_name(name) {
        Some((file, filename)) => (file.to_string(), filename.to_string()),
        None => {
            let filename = std::path::Path::new(name).file_name().unwrap_or_default();
            (document.id.to_string(), filename.to_string_lossy().into_owned())
        }
    });
    let with_attributes = files.map(|(file, filename)| {
        let attributes = attributes_of(document, &file);
        (file, filename, attributes)
    });
    let mut all = with_attributes;
    all.find(|(_, _, attributes)| filter.is_none_or(|filter| filter.admits(attributes)))
}
