//! What can be changed in the catalog, all of it together: documents come, change and are renamed here; how they are
//! removed and restored is in `removal`.

mod removal;

pub(super) use removal::ENTRY as REMOVED_ENTRY;
pub use removal::Restored;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::SystemTime;

use super::batch::Batch;
use super::error::CatalogError;
use super::id::DocumentId;
use super::manage::find_document;
use super::rows::{
    Attributes, CollectionInfo, DamagedRow, DocumentInfo, LogEntry, Passage, ReleasedChunk, TextHash, from_json,
    to_json, tokens_hash,
};
use super::store::{Family, Store};
use super::{keys, texts};
use crate::error::{DocumentsError, Result};
use crate::split::{ChunkSpan, Format};

/// A document as it comes in.
#[derive(Clone, Debug)]
pub struct NewDocument {
    /// What it is to be known by.
    pub name: String,
    /// Its whole text.
    pub text: String,
    /// How it is written.
    pub format: Format,
    /// Identifies how it was split, tokenizer and limits included.
    pub fingerprint: String,
    /// Fingerprint of the tokenizer that the passages' tokens are of.
    pub tokenizer: Option<[u8; 32]>,
    /// Its passages, in order.
    pub passages: Vec<NewPassage>,
    /// What clients keep there; `None` leaves what there is.
    pub attributes: Option<Attributes>,
    /// Names that are gone from where they came from: a document with this text is no longer known by them.
    pub instead_of: Vec<String>,
    /// Names that stand for another text by now, which is yet to come in: a document that has this text under such names alone
    /// is theirs, and this one has the text from now on. So documents keep their ids when their texts change places.
    pub left_by: Vec<String>,
}

/// A passage as it comes in.
#[derive(Clone, Debug)]
pub struct NewPassage {
    /// Where it lies.
    pub place: ChunkSpan,
    /// The page that it begins on, from 1, of documents that have pages.
    pub page: Option<u32>,
    /// Its tokens; empty without a tokenizer.
    pub tokens: Vec<u32>,
}

/// How a document that came in stood to the collection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutKind {
    /// The collection had neither the name nor the text.
    New,
    /// The name had another text, or the text other passages.
    Changed,
    /// All was there.
    Unchanged,
    /// The text was there under names that are gone.
    Renamed,
    /// The text is there under another name too.
    AnotherName,
}

/// What became of a document that came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PutOutcome {
    /// The document that has the name now.
    pub id: DocumentId,
    /// How it stood to the collection.
    pub kind: PutKind,
}

/// Changes to the catalog that become visible and durable together. Dropped, nothing of it happened.
pub struct Transaction<'a> {
    batch: Batch<'a>,
    log: Vec<(u32, LogEntry)>,
    /// Chunks that lost a document, by the hash of their tokens.
    released: HashMap<[u8; 32], ReleasedChunk>,
    now: u64,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl<'a> Transaction<'a> {
    pub(super) fn new(store: &'a Store) -> Transaction<'a> {
        Transaction { batch: Batch::new(store), log: Vec::new(), released: HashMap::new(), now: now() }
    }

    pub(super) fn batch(&mut self) -> &mut Batch<'a> {
        &mut self.batch
    }

    /// Takes a document in: a new one, another text for a name, or another name for a text. A name that loses its
    /// text to another document takes the old document with it if that has no further name.
    ///
    /// # Errors
    /// [`DocumentsError::DamagedDocument`], [`DocumentsError::Catalog`].
    pub fn put(&mut self, collection: &CollectionInfo, new: &NewDocument) -> Result<PutOutcome> {
        self.try_put(collection, new).map_err(|error| error.of(|| format!("document {}", new.name)))
    }

    fn try_put(&mut self, collection: &CollectionInfo, new: &NewDocument) -> Result<PutOutcome, CatalogError> {
        let content: TextHash = blake3::hash(new.text.as_bytes()).into();
        let joined = match self.is_left(collection, new, &content)? {
            true => None,
            false => self.try_name(collection, &new.name, new.format, &content, &new.instead_of)?,
        };
        if let Some(outcome) = joined {
            let mut info = self.known(&outcome.id)?;
            let whole = texts::is_whole(&self.batch, &content);
            if !whole {
                texts::write(&mut self.batch, &content, &new.text);
            }
            let split_alike = info.fingerprint == new.fingerprint && info.tokenizer == new.tokenizer;
            if split_alike && whole && self.passages(&info).is_ok() {
                if let Some(attributes) = new.attributes.as_ref().filter(|found| **found != info.attributes) {
                    info.attributes = attributes.clone();
                    self.write_info(&info);
                }
                return Ok(outcome);
            }
            self.rewrite(&mut info, new)?;
            let kind = if outcome.kind == PutKind::Unchanged { PutKind::Changed } else { outcome.kind };
            return Ok(PutOutcome { kind, ..outcome });
        }
        let known = self.id_of(collection.id, &new.name)?;
        let current = self.named(collection.id, &new.name)?;
        let kind = if current.is_some() { PutKind::Changed } else { PutKind::New };
        let mut info = match current {
            // No other name holds the old text.
            Some(mut info) if info.names.len() == 1 => {
                self.set_aside(&mut info)?;
                self.disown(&info);
                texts::release(&mut self.batch, &info.content, info.bytes, &info.id)?;
                info
            }
            current => {
                if let Some(shared) = current {
                    self.detach(shared, &new.name)?;
                }
                let mut fresh = self.fresh(collection, &new.name);
                // One that was lost is the same document again.
                if let Some(lost) = known.filter(|id| matches!(self.info(id), Ok(None))) {
                    fresh.id = lost;
                }
                fresh
            }
        };
        (info.content, info.format, info.bytes) = (content, new.format, new.text.len() as u64);
        texts::keep(&mut self.batch, &content, &new.text, &info.id)?;
        self.batch.put(Family::Names, keys::name(info.collection, false, &new.name), info.id.bytes().to_vec());
        self.batch.put(
            Family::Contents,
            keys::content(info.collection, info.format, &content),
            info.id.bytes().to_vec(),
        );
        self.rewrite(&mut info, new)?;
        Ok(PutOutcome { id: info.id, kind })
    }

    /// Gives a text that is there another name, in the place of `instead_of`; `None` where the text is not there, and
    /// nothing is changed.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn name(
        &mut self,
        collection: &CollectionInfo,
        name: &str,
        format: Format,
        content: &TextHash,
        instead_of: &[String],
    ) -> Result<Option<PutOutcome>> {
        self.try_name(collection, name, format, content, instead_of).map_err(|e| e.of(|| format!("document {name}")))
    }

    fn try_name(
        &mut self,
        collection: &CollectionInfo,
        name: &str,
        format: Format,
        content: &TextHash,
        instead_of: &[String],
    ) -> Result<Option<PutOutcome>, CatalogError> {
        let Some(mut info) = self.holder(collection.id, format, content)? else { return Ok(None) };
        let id = info.id;
        self.mend(Family::Contents, keys::content(collection.id, format, content), &id);
        if info.names.iter().any(|known| known == name) {
            self.mend(Family::Names, keys::name(collection.id, false, name), &id);
            return Ok(Some(PutOutcome { id, kind: PutKind::Unchanged }));
        }
        let current = self.named(collection.id, name)?;
        let kind = if current.is_some() { PutKind::Changed } else { PutKind::AnotherName };
        if let Some(other) = current {
            self.detach(other, name)?;
        }
        let (gone, mut names): (Vec<_>, Vec<_>) = info.names.drain(..).partition(|known| instead_of.contains(known));
        for gone in &gone {
            self.batch.delete(Family::Names, keys::name(collection.id, false, gone));
        }
        names.push(name.into());
        names.sort();
        info.names = names;
        self.batch.put(Family::Names, keys::name(collection.id, false, name), id.bytes().to_vec());
        self.write_info(&info);
        let renamed = kind == PutKind::AnotherName && !gone.is_empty();
        Ok(Some(PutOutcome { id, kind: if renamed { PutKind::Renamed } else { kind } }))
    }

    /// Refuses to go on with a collection that was removed since it was opened: nobody would see what comes into it, and nobody
    /// would remove that.
    ///
    /// # Errors
    /// [`DocumentsError::CollectionRemoved`], [`DocumentsError::Catalog`].
    pub(crate) fn check_collection(&self, collection: &CollectionInfo) -> Result<()> {
        let found = self.batch.get(Family::Collections, &keys::collection(&collection.name))?;
        match found.map(|content| from_json::<CollectionInfo>(&content)).transpose().map_err(CatalogError::from)? {
            Some(found) if found.id == collection.id => Ok(()),
            _ => Err(DocumentsError::CollectionRemoved { name: collection.name.clone() }),
        }
    }

    /// A document as it is after the changes so far, also one that was removed and can be restored.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn document(&self, id: &DocumentId) -> Result<Option<DocumentInfo>> {
        self.info(id).map_err(|error| error.of(|| format!("document {id}")))
    }

    /// Replaces what clients keep at a document; says whether there is one.
    ///
    /// # Errors
    /// As [`put`](Self::put).
    pub fn set_attributes(&mut self, id: &DocumentId, attributes: Attributes) -> Result<bool> {
        let Some(mut info) = self.info(id).map_err(|error| error.of(|| format!("document {id}")))? else {
            return Ok(false);
        };
        info.attributes = attributes;
        self.write_info(&info);
        Ok(true)
    }

    fn fresh(&self, collection: &CollectionInfo, name: &str) -> DocumentInfo {
        DocumentInfo {
            id: DocumentId::random(),
            collection: collection.id,
            names: vec![name.into()],
            content: [0; 32],
            format: Format::Text,
            bytes: 0,
            fingerprint: String::new(),
            tokenizer: None,
            passages: 0,
            tokens: 0,
            created: self.now,
            updated: self.now,
            removed: None,
            removed_names: Vec::new(),
            attributes: Attributes::new(),
        }
    }

    /// Whether the text is there under names alone that stand for another one by now, and the new document has, or gets, an id of its own.
    fn is_left(
        &mut self,
        collection: &CollectionInfo,
        new: &NewDocument,
        text: &TextHash,
    ) -> Result<bool, CatalogError> {
        if new.left_by.is_empty() {
            return Ok(false);
        }
        let Some(owner) = self.holder(collection.id, new.format, text)? else { return Ok(false) };
        let current = self.named(collection.id, &new.name)?;
        Ok(owner.names.iter().all(|name| *name != new.name && new.left_by.contains(name))
            && current.is_none_or(|current| current.names.len() == 1))
    }

    /// A document's text is no longer that of its collection, unless another document has it by now.
    fn disown(&mut self, info: &DocumentInfo) {
        let key = keys::content(info.collection, info.format, &info.content);
        // A row that is damaged goes, too.
        if !matches!(self.id_at(Family::Contents, &key), Ok(Some(owner)) if owner != info.id) {
            self.batch.delete(Family::Contents, key);
        }
    }

    /// Replaces the passages of a document whose text is kept.
    fn rewrite(&mut self, info: &mut DocumentInfo, new: &NewDocument) -> Result<(), CatalogError> {
        self.drop_passages(info, false)?;
        let (mut line, mut at) = (1, 0);
        for (number, found) in (0u32..).zip(&new.passages) {
            let range = found.place.bytes.clone();
            let Some(text) = new.text.get(range.clone()) else {
                return Err(DamagedRow(format!("passage {number} lies at bytes {range:?}, outside of its text")).into());
            };
            // Passages begin behind one another, so that lines are counted once.
            let skipped = new.text.as_bytes().get(at..range.start).unwrap_or_default();
            line += skipped.iter().filter(|byte| **byte == b'\n').count();
            at = at.max(range.start);
            let (hash, tokens) = (blake3::hash(text.as_bytes()).into(), found.tokens.clone());
            let passage = Passage { place: found.place.clone(), line, page: found.page, hash, tokens };
            self.refer(&passage, &info.id);
            self.batch.put(Family::Passages, keys::passage(&info.id, number), passage.encode());
        }
        info.passages = u32::try_from(new.passages.len()).map_err(|_| DamagedRow("too many passages".into()))?;
        info.tokens = new.passages.iter().map(|passage| passage.tokens.len() as u64).sum();
        (info.fingerprint, info.tokenizer, info.updated) = (new.fingerprint.clone(), new.tokenizer, self.now);
        if let Some(attributes) = &new.attributes {
            info.attributes = attributes.clone();
        }
        self.write_info(info);
        self.log.push((info.collection, LogEntry::Put(info.id)));
        Ok(())
    }

    /// `gone`: for good, and nothing else comes in their place.
    fn drop_passages(&mut self, info: &DocumentInfo, gone: bool) -> Result<(), CatalogError> {
        // What cannot be read is dropped all the same: this is how a damaged document is mended.
        let known = (0..info.passages).map(|number| keys::passage(&info.id, number));
        let found = self.batch.readable_keys(Family::Passages, info.id.bytes())?;
        for key in known.chain(found).collect::<BTreeSet<_>>() {
            let content = self.batch.get(Family::Passages, &key);
            if let Ok(Some(passage)) = content.and_then(|c| Ok(c.map(|c| Passage::decode(&c)).transpose()?)) {
                self.release(&passage, &info.id, gone);
            }
            self.batch.delete(Family::Passages, key);
        }
        Ok(())
    }

    fn passages(&self, info: &DocumentInfo) -> Result<Vec<Passage>, CatalogError> {
        (0..info.passages).map(|number| self.passage(&info.id, number)).collect()
    }

    fn passage(&self, id: &DocumentId, number: u32) -> Result<Passage, CatalogError> {
        let content = self.batch.get(Family::Passages, &keys::passage(id, number))?;
        Ok(Passage::decode(&content.ok_or_else(|| DamagedRow(format!("passage {number} is missing")))?)?)
    }

    fn refer(&mut self, passage: &Passage, id: &DocumentId) {
        if !passage.tokens.is_empty() {
            let hash = tokens_hash(&passage.tokens);
            self.batch.put(Family::ChunkRefs, keys::reference(&hash, id), Vec::new());
        }
    }

    fn release(&mut self, passage: &Passage, id: &DocumentId, gone: bool) {
        if !passage.tokens.is_empty() {
            let hash = tokens_hash(&passage.tokens);
            self.batch.delete(Family::ChunkRefs, keys::reference(&hash, id));
            let new = || ReleasedChunk { tokens: passage.tokens.clone(), gone };
            self.released.entry(hash).or_insert_with(new).gone |= gone;
        }
    }

    fn id_at(&self, family: Family, key: &[u8]) -> Result<Option<DocumentId>, CatalogError> {
        let Some(content) = self.batch.get(family, key)? else { return Ok(None) };
        let id =
            DocumentId::from_bytes(&content).ok_or_else(|| DamagedRow("a document's id is not as expected".into()))?;
        Ok(Some(id))
    }

    /// The id that a row names; where the row is damaged, that of the document which it should name.
    fn id_or_search(
        &self,
        family: Family,
        key: &[u8],
        is_it: impl Fn(&DocumentInfo) -> bool,
    ) -> Result<Option<DocumentId>, CatalogError> {
        match self.id_at(family, key) {
            Err(CatalogError::Row(_)) => Ok(find_document(self.batch.store(), is_it)?.map(|info| info.id)),
            outcome => outcome,
        }
    }

    /// The id of the document that has a name, or had it before it was lost.
    fn id_of(&self, collection: u32, name: &str) -> Result<Option<DocumentId>, CatalogError> {
        self.id_or_search(Family::Names, &keys::name(collection, false, name), |info| info.is_called(collection, name))
    }

    /// The document of a collection that has a text.
    fn holder(
        &mut self,
        collection: u32,
        format: Format,
        text: &TextHash,
    ) -> Result<Option<DocumentInfo>, CatalogError> {
        let key = keys::content(collection, format, text);
        let id = self.id_or_search(Family::Contents, &key, |info| info.holds(collection, format, text))?;
        let info = id.map(|id| self.sound(collection, &id)).transpose()?.flatten();
        // The row may be of a document that was lost, whose id another one has by now.
        Ok(info.filter(|info| info.holds(collection, format, text)))
    }

    /// Writes a row that names a document again unless it is whole.
    fn mend(&mut self, family: Family, key: Vec<u8>, id: &DocumentId) {
        if !matches!(self.batch.get(family, &key), Ok(Some(content)) if content == id.bytes()) {
            self.batch.put(family, key, id.bytes().to_vec());
        }
    }

    fn info(&self, id: &DocumentId) -> Result<Option<DocumentInfo>, CatalogError> {
        let content = self.batch.get(Family::Documents, id.bytes())?;
        Ok(content.map(|content| from_json(&content)).transpose()?)
    }

    /// A document that another row names.
    fn known(&self, id: &DocumentId) -> Result<DocumentInfo, CatalogError> {
        Ok(self.info(id)?.ok_or_else(|| DamagedRow(format!("the row of {id} is missing")))?)
    }

    fn named(&mut self, collection: u32, name: &str) -> Result<Option<DocumentInfo>, CatalogError> {
        let id = self.id_of(collection, name)?;
        let info = id.map(|id| self.sound(collection, &id)).transpose()?.flatten();
        // The name of a lost document stands for nothing, whatever has its id by now.
        Ok(info.filter(|info| info.is_called(collection, name)))
    }

    /// A document that another row names; one whose own row is lost is cleared away, so that it can come in again.
    fn sound(&mut self, collection: u32, id: &DocumentId) -> Result<Option<DocumentInfo>, CatalogError> {
        match self.known(id) {
            Err(CatalogError::Row(DamagedRow(problem))) => {
                tracing::warn!(%id, problem, "a document is lost: it is taken in anew");
                for key in self.batch.readable_keys(Family::Passages, id.bytes())? {
                    self.batch.delete(Family::Passages, key);
                }
                self.batch.delete(Family::Documents, id.bytes().to_vec());
                self.log.push((collection, LogEntry::Removed(*id)));
                Ok(None)
            }
            outcome => outcome.map(Some),
        }
    }

    fn write_info(&mut self, info: &DocumentInfo) {
        self.batch.put(Family::Documents, info.id.bytes().to_vec(), to_json(info));
    }

    /// Has everything on disk, with the changes logged from `sequence` on, which then is the next one. Returns the tokens
    /// of chunks that no document needs any more.
    pub(super) fn commit(mut self, sequence: &mut u64) -> Result<Vec<Vec<u32>>, CatalogError> {
        self.check_records()?;
        let orphans = self.orphans()?;
        let mut last = BTreeMap::new();
        for (collection, entry) in &self.log {
            let (LogEntry::Put(id) | LogEntry::Removed(id)) = entry;
            last.insert((*collection, *id), *entry);
        }
        let mut next = *sequence;
        for ((collection, _), entry) in last {
            self.batch.put(Family::Log, keys::log(collection, next), to_json(&entry));
            next += 1;
        }
        if next != *sequence {
            self.batch.put(Family::Meta, super::NEXT_SEQUENCE.to_vec(), next.to_be_bytes().to_vec());
        }
        // Also where writing fails: what may be there all the same keeps its numbers.
        *sequence = next;
        self.batch.commit()?;
        Ok(orphans)
    }

    /// Refuses records that no list would show, as their place lies in a table that is damaged.
    fn check_records(&self) -> Result<(), CatalogError> {
        let store = self.batch.store();
        for family in [Family::Files, Family::Jobs] {
            for (key, _) in self.batch.changed(family).filter(|(_, content)| content.is_some()) {
                if let Some(Err(CatalogError::Row(DamagedRow(problem)))) = store.scan(family, key, key).next() {
                    return Err(DocumentsError::DamagedCatalog { path: store.path().into(), problem }.into());
                }
            }
        }
        Ok(())
    }

    /// Notes the chunks that no document needs any more, so that the chunk store is told even if the process ends here.
    fn orphans(&mut self) -> Result<Vec<Vec<u32>>, CatalogError> {
        let mut orphans = Vec::new();
        for (hash, chunk) in std::mem::take(&mut self.released) {
            if !self.batch.any(Family::ChunkRefs, &hash)? {
                self.batch.put(Family::Released, hash.to_vec(), to_json(&chunk));
                orphans.push(chunk.tokens);
            }
        }
        Ok(orphans)
    }
}
