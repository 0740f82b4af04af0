//! What of a catalog is whole: every document with its names, text and passages, from whatever rows can be read.
//!
//! Most of what a row says another row says too: a document's names and text are told by rows of `names` and `contents`,
//! references follow from documents, and passages can be cut anew. So a document is lost only with its text, or where nothing
//! tells any more which text it has. A row that contradicts others is an old one, which came to light as the table with its
//! successor is gone.

mod reading;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::batch::read;
use super::error::CatalogError;
use super::id::DocumentId;
use super::rows::{CollectionInfo, DamagedRow, DocumentInfo, Passage, TextHash, from_json, tokens_hash, unseal};
use super::store::{Family, Store};
use super::{Attributes, keys, texts};
use crate::error::Result;
use crate::split::Format;
use reading::{cut_anew, entries, format_number, readable, rows, shown, unexpected};

/// A document that is whole, as it should lie in the catalog.
pub(super) struct WholeDocument {
    pub(super) info: DocumentInfo,
    pub(super) text: String,
    pub(super) passages: Vec<Passage>,
    /// Tokens of passages that it had and has no more.
    pub(super) released: Vec<Vec<u32>>,
}

/// A document of which something is damaged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedDocument {
    /// What it is known by.
    pub name: String,
    /// Its id.
    pub id: DocumentId,
    /// What is wrong.
    pub problem: String,
    /// Whether it can be saved, as its text is whole.
    pub is_saved: bool,
}

/// What was found of a catalog.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CatalogReport {
    /// Documents that are whole, or can be made whole; also those that were removed and can be restored.
    pub documents: u64,
    /// Their passages.
    pub passages: u64,
    /// Bytes of their texts.
    pub bytes: u64,
    /// Documents of which something is damaged.
    pub damaged: Vec<DamagedDocument>,
    /// Documents that were lost before, and wait to be ingested again.
    pub missing: Vec<DamagedDocument>,
    /// What is damaged beside documents: collections, files, jobs, unreadable parts.
    pub problems: Vec<String>,
    /// Rows of references that are missing or superfluous.
    pub references: u64,
}

impl CatalogReport {
    /// Whether nothing is damaged. Documents that were lost before are no damage.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.damaged.is_empty() && self.problems.is_empty() && self.references == 0
    }

    /// Documents that cannot be saved.
    #[must_use]
    pub fn lost(&self) -> usize {
        self.damaged.iter().filter(|document| !document.is_saved).count()
    }
}

/// What of a survey is written into another catalog.
pub(super) enum Saved<'a> {
    /// A document.
    Document(&'a WholeDocument),
    /// The name of a document that is lost, by which it is known when it comes in again.
    LostName { collection: u32, name: &'a str, id: DocumentId },
    /// The tokens of passages of a document that is lost.
    LostTokens(Vec<Vec<u32>>),
    /// A collection.
    Collection(&'a CollectionInfo),
    /// Any other row, with its content.
    Row(Family, &'a [u8], &'a [u8]),
}

/// Takes what is saved.
pub(super) type Sink<'a> = dyn FnMut(Saved<'_>) -> Result<()> + 'a;

/// Reads all of a catalog and hands what is whole to `sink`.
pub(super) fn survey(source: &Store, sink: &mut Sink<'_>) -> Result<CatalogReport> {
    let mut survey = Survey::read(source)?;
    survey.collections(sink)?;
    survey.documents(sink)?;
    survey.others(sink)?;
    survey.references()?;
    Ok(survey.report)
}

/// All small rows of a catalog.
struct Survey<'s> {
    source: &'s Store,
    report: CatalogReport,
    collections: Vec<CollectionInfo>,
    documents: BTreeMap<DocumentId, DocumentInfo>,
    /// Names that are there.
    names: BTreeMap<(u32, String), DocumentId>,
    /// Whether all of them could be read.
    names_are_whole: bool,
    /// Removed names: key and content.
    removed: Vec<(Vec<u8>, Vec<u8>)>,
    /// Texts by the documents that have them.
    contents: HashMap<DocumentId, Vec<(u32, Format, TextHash)>>,
    /// What was handed on: names and texts are given once.
    given_names: BTreeSet<(u32, String)>,
    given_texts: HashSet<(u32, u8, TextHash)>,
    text_refs: BTreeSet<Vec<u8>>,
    chunk_refs: HashSet<Vec<u8>>,
    kept: HashMap<DocumentId, u32>,
}

impl<'s> Survey<'s> {
    fn read(source: &'s Store) -> Result<Survey<'s>> {
        let mut report = CatalogReport::default();
        let problems = &mut report.problems;
        let collections = rows(source, Family::Collections, problems, |_, content| from_json(content))?;
        let documents = rows(source, Family::Documents, problems, |key, content| {
            let info: DocumentInfo = from_json(content)?;
            if info.id.bytes() == key { Ok((info.id, info)) } else { Err(unexpected("its id")) }
        })?;
        let before = problems.len();
        let (mut names, mut removed) = (BTreeMap::new(), Vec::new());
        rows(source, Family::Names, problems, |key, content| {
            let (collection, rest) = key.split_first_chunk::<4>().ok_or_else(|| unexpected("a name"))?;
            let (kind, name) = rest.split_first().ok_or_else(|| unexpected("a name"))?;
            if *kind == 1 {
                removed.push((key.to_vec(), content.to_vec()));
                return Ok(());
            }
            let name = String::from_utf8(name.to_vec()).map_err(|_| unexpected("a name"))?;
            let id = DocumentId::from_bytes(content).ok_or_else(|| unexpected("the id behind a name"))?;
            names.insert((u32::from_be_bytes(*collection), name), id);
            Ok(())
        })?;
        let names_are_whole = problems.len() == before;
        let mut contents: HashMap<DocumentId, Vec<_>> = HashMap::new();
        rows(source, Family::Contents, problems, |key, content| {
            let (collection, rest) = key.split_first_chunk::<4>().ok_or_else(|| unexpected("a text's key"))?;
            let (format, text) = rest.split_first().ok_or_else(|| unexpected("a text's key"))?;
            let format = if *format == format_number(Format::Markdown) { Format::Markdown } else { Format::Text };
            let text = text.try_into().map_err(|_| unexpected("a text's key"))?;
            let id = DocumentId::from_bytes(content).ok_or_else(|| unexpected("the id behind a text"))?;
            contents.entry(id).or_default().push((u32::from_be_bytes(*collection), format, text));
            Ok(())
        })?;
        let mut survey = Survey {
            source,
            report,
            collections,
            documents: documents.into_iter().collect(),
            names,
            names_are_whole,
            removed,
            contents,
            given_names: BTreeSet::new(),
            given_texts: HashSet::new(),
            text_refs: BTreeSet::new(),
            chunk_refs: HashSet::new(),
            kept: HashMap::new(),
        };
        survey.read_behind_tables()?;
        Ok(survey)
    }

    /// Rows that lie where a table is damaged, in another table: they are found by their keys alone.
    fn read_behind_tables(&mut self) -> Result<()> {
        let known: BTreeSet<DocumentId> = self.names.values().chain(self.contents.keys()).copied().collect();
        for id in known.into_iter().filter(|id| !self.documents.contains_key(id)).collect::<Vec<_>>() {
            if let Ok(Some(content)) = readable(read(self.source, Family::Documents, id.bytes()))?
                && let Ok(info) = from_json::<DocumentInfo>(&content)
            {
                self.documents.insert(id, info);
            }
        }
        let mut found = Vec::new();
        for info in self.documents.values().filter(|info| info.removed.is_none()) {
            for name in &info.names {
                let key = (info.collection, name.clone());
                if !self.names.contains_key(&key)
                    && let Ok(Some(content)) =
                        readable(read(self.source, Family::Names, &keys::name(info.collection, false, name)))?
                    && let Some(id) = DocumentId::from_bytes(&content)
                {
                    found.push((key, id));
                }
            }
        }
        self.names.extend(found);
        Ok(())
    }

    /// Collections, and one for each number that documents have and no row.
    fn collections(&mut self, sink: &mut Sink<'_>) -> Result<()> {
        let known: BTreeSet<u32> = self.collections.iter().map(|info| info.id).collect();
        let of_documents = self.documents.values().map(|info| info.collection);
        let used: BTreeSet<u32> = of_documents.chain(self.names.keys().map(|(collection, _)| *collection)).collect();
        for id in used.difference(&known) {
            let name = format!("recovered-{id}");
            self.report.problems.push(format!(
                "the name of collection {id} is lost: it is called {name} until `quire collections rename {name} NEW_NAME`"
            ));
            let (language, attributes) = (super::LanguageSetting::default(), Attributes::new());
            let created = super::transaction::now();
            self.collections.push(CollectionInfo { name, id: *id, language, created, removed: None, attributes });
        }
        self.collections.iter().try_for_each(|info| sink(Saved::Collection(info)))
    }

    fn documents(&mut self, sink: &mut Sink<'_>) -> Result<()> {
        let mut names_of: HashMap<DocumentId, Vec<(u32, String)>> = HashMap::new();
        for ((collection, name), id) in &self.names {
            names_of.entry(*id).or_default().push((*collection, name.clone()));
        }
        let ids: BTreeSet<DocumentId> =
            self.documents.keys().chain(names_of.keys()).chain(self.contents.keys()).copied().collect();
        let mut lost = Vec::new();
        for id in ids {
            let called = names_of.remove(&id).unwrap_or_default();
            match self.document(id, &called)? {
                Ok((whole, problem)) => {
                    if let Some(problem) = problem {
                        self.damaged(&whole.info.names, id, problem, true);
                    }
                    self.keep(&whole);
                    sink(Saved::Document(&whole))?;
                    // Names of a document that was lost, whose id this one has.
                    let others = called.into_iter().filter(|(_, name)| !whole.info.names.contains(name));
                    lost.extend(others.map(|(collection, name)| (collection, name, id)));
                }
                Err(problem) => {
                    let info = self.documents.get(&id);
                    let mut names: Vec<(u32, String)> = called;
                    if let Some(info) = info.filter(|info| info.removed.is_none()) {
                        names.extend(info.names.iter().map(|name| (info.collection, name.clone())));
                    }
                    let known = info.map(|info| info.names.clone()).unwrap_or_default();
                    let shown: Vec<String> = names.iter().map(|(_, name)| name.clone()).chain(known).collect();
                    match problem {
                        Some(problem) => self.damaged(&shown, id, problem, false),
                        // Contents alone, without text, are superfluous.
                        None if names.is_empty() => self.report.references += 1,
                        None => {}
                    }
                    sink(Saved::LostTokens(self.readable_tokens(&id)?))?;
                    lost.extend(names.into_iter().map(|(collection, name)| (collection, name, id)));
                }
            }
        }
        let damaged: HashSet<DocumentId> = self.report.damaged.iter().map(|document| document.id).collect();
        for (collection, name, id) in lost {
            // Another document may have the name by now.
            if !self.given_names.insert((collection, name.clone())) {
                continue;
            }
            sink(Saved::LostName { collection, name: &name, id })?;
            if !damaged.contains(&id) {
                let problem = super::LOST.to_string();
                self.report.missing.push(DamagedDocument { name, id, problem, is_saved: false });
            }
        }
        Ok(())
    }

    fn damaged(&mut self, names: &[String], id: DocumentId, problem: String, is_saved: bool) {
        let mut names = names.to_vec();
        names.sort();
        names.dedup();
        let name = if names.is_empty() { id.to_string() } else { names.join("  =  ") };
        self.report.damaged.push(DamagedDocument { name, id, problem, is_saved });
    }

    /// A document and what had to be put right of it; or what is wrong, `None` where it was lost before.
    #[allow(clippy::type_complexity)]
    fn document(
        &mut self,
        id: DocumentId,
        called: &[(u32, String)],
    ) -> Result<Result<(WholeDocument, Option<String>), Option<String>>> {
        let mut problems = Vec::new();
        let mut info = match self.info(id, called, &mut problems)? {
            Ok(info) => info,
            Err(problem) => return Ok(Err(problem)),
        };
        let text = match readable(texts::whole(self.source, &info.content))? {
            Ok(text) => text,
            Err(problem) => return Ok(Err(Some(problem))),
        };
        if info.removed.is_none() {
            let place = (info.collection, format_number(info.format), info.content);
            if !self.given_texts.insert(place) {
                return Ok(Err(Some("another document has its text".into())));
            }
            if info.names.is_empty() {
                return Ok(Err(Some("its names are lost".into())));
            }
            info.names.retain(|name| self.given_names.insert((info.collection, name.clone())));
        }
        let (passages, released) = match self.passages(&info, &text)? {
            Ok(passages) => (passages, Vec::new()),
            Err(problem) => {
                problems.push(format!(
                    "{problem}: they are cut anew, and their tokens made at each use until it is ingested again"
                ));
                (info.fingerprint, info.tokenizer) = (String::new(), None);
                (cut_anew(&text, info.format), self.readable_tokens(&id)?)
            }
        };
        let tokens = passages.iter().map(|passage| passage.tokens.len() as u64).sum();
        info.passages = u32::try_from(passages.len()).unwrap_or(u32::MAX);
        (info.tokens, info.bytes) = (tokens, text.len() as u64);
        let problem = (!problems.is_empty()).then(|| problems.join("; "));
        Ok(Ok((WholeDocument { info, text, passages, released }, problem)))
    }

    /// What a document is, from its own row or from those that name it.
    fn info(
        &self,
        id: DocumentId,
        called: &[(u32, String)],
        problems: &mut Vec<String>,
    ) -> Result<Result<DocumentInfo, Option<String>>> {
        let texts = self.contents.get(&id).map_or(&[][..], Vec::as_slice);
        let needs = |text: &TextHash| -> Result<bool> {
            let row = readable(read(self.source, Family::TextRefs, &keys::reference(text, &id)))?;
            Ok(!matches!(row, Ok(None)))
        };
        let row = self.documents.get(&id);
        if let Some(row) = row {
            let mut info = row.clone();
            let is_removed_by_name = || {
                let names = info.names.iter().map(|name| keys::name(info.collection, true, name));
                let mut rows = names.map(|key| self.removed.iter().find(|(known, _)| *known == key));
                rows.any(|row| row.is_some_and(|(_, content)| entries(content).any(|(entry, _)| entry == id)))
            };
            let agrees = texts.iter().any(|(collection, format, text)| info.holds(*collection, *format, text));
            if info.removed.is_some() && called.is_empty() {
                return Ok(Ok(info));
            }
            if info.removed.is_none() && called.is_empty() && texts.is_empty() && is_removed_by_name() {
                problems.push("its row is an old one: it was removed".into());
                info.removed = Some(super::transaction::now());
                return Ok(Ok(info));
            }
            if agrees || texts.is_empty() && info.removed.is_none() {
                self.names_of(&mut info, called, problems);
                if !agrees {
                    problems.push("the row of its text is missing".into());
                }
                return Ok(Ok(info));
            }
        }
        // Its own row is gone, or an old one: what others say of it.
        for (collection, format, text) in texts {
            if !needs(text)? {
                continue;
            }
            let names = called.iter().filter(|(of, _)| of == collection).map(|(_, name)| name.clone()).collect();
            let now = super::transaction::now();
            problems.push("its own row is lost, and made anew".into());
            return Ok(Ok(DocumentInfo {
                id,
                collection: *collection,
                names,
                content: *text,
                format: *format,
                bytes: 0,
                fingerprint: String::new(),
                tokenizer: None,
                passages: u32::MAX,
                tokens: 0,
                removed_names: row.map(|row| row.removed_names.clone()).unwrap_or_default(),
                created: row.map_or(now, |row| row.created),
                updated: now,
                removed: None,
                attributes: row.map(|row| row.attributes.clone()).unwrap_or_default(),
            }));
        }
        match (row, readable(read(self.source, Family::Documents, id.bytes()))?) {
            (Some(_), _) => Ok(Err(Some("its row is an old one, and its text is lost".into()))),
            (None, Ok(_)) => Ok(Err(None)),
            (None, Err(problem)) => Ok(Err(Some(problem))),
        }
    }

    /// Names of a document that is there: those of its row, but for such as another document has by now.
    fn names_of(&self, info: &mut DocumentInfo, called: &[(u32, String)], problems: &mut Vec<String>) {
        let collection = info.collection;
        let is_called = |name: &String| called.iter().any(|(of, known)| (*of, known) == (collection, name));
        let others = |name: &String| self.names.get(&(collection, name.clone())).is_some_and(|other| *other != info.id);
        let (rows, without): (Vec<String>, Vec<String>) = info.names.iter().cloned().partition(is_called);
        let free: Vec<String> = without.iter().filter(|name| !others(name)).cloned().collect();
        if !without.is_empty() {
            problems.push(format!("the row of its name {} is damaged or missing", without.join(", ")));
        }
        // Where all names could be read, the one without a row is one that it had before.
        info.names = rows;
        if info.names.is_empty() || !self.names_are_whole {
            info.names.extend(free);
            info.names.sort();
        }
    }

    /// The passages of a document, each compared with its text; or what is wrong with them.
    fn passages(&self, info: &DocumentInfo, text: &str) -> Result<Result<Vec<Passage>, String>> {
        let mut passages = Vec::new();
        for number in 0..info.passages {
            let content = match readable(read(self.source, Family::Passages, &keys::passage(&info.id, number)))? {
                Ok(Some(content)) => content,
                // The number is not known.
                Ok(None) if info.passages == u32::MAX => break,
                Ok(None) => return Ok(Err(format!("passage {number} is missing"))),
                Err(problem) => return Ok(Err(format!("passage {number}: {problem}"))),
            };
            let is_its_own = |passage: &Passage| {
                let part = text.get(passage.place.bytes.clone());
                part.is_some_and(|part| *blake3::hash(part.as_bytes()).as_bytes() == passage.hash)
            };
            match Passage::decode(&content) {
                Ok(passage) if is_its_own(&passage) => passages.push(passage),
                Ok(_) => return Ok(Err(format!("passage {number} is none of its text"))),
                Err(DamagedRow(problem)) => return Ok(Err(format!("passage {number}: {problem}"))),
            }
        }
        if passages.is_empty() && !text.trim().is_empty() {
            return Ok(Err("it has no passages".into()));
        }
        Ok(Ok(passages))
    }

    /// The tokens of a document's passages, as far as they can be read.
    fn readable_tokens(&self, id: &DocumentId) -> Result<Vec<Vec<u32>>> {
        let mut tokens = Vec::new();
        for row in self.source.scan(Family::Passages, id.bytes(), id.bytes()) {
            let passage = row.and_then(|(key, row)| Ok(Passage::decode(unseal(Family::Passages, &key, &row)?)?));
            match passage {
                Ok(passage) if !passage.tokens.is_empty() => tokens.push(passage.tokens),
                Ok(_) | Err(CatalogError::Row(_)) => {}
                Err(CatalogError::Whole(error)) => return Err(error),
            }
        }
        Ok(tokens)
    }

    /// Notes which rows follow from a document.
    fn keep(&mut self, whole: &WholeDocument) {
        let WholeDocument { info, text, passages, .. } = whole;
        self.report.documents += 1;
        self.report.passages += passages.len() as u64;
        self.report.bytes += text.len() as u64;
        self.kept.insert(info.id, info.passages);
        self.text_refs.insert(keys::reference(&info.content, &info.id));
        if info.removed.is_none() {
            for passage in passages.iter().filter(|passage| !passage.tokens.is_empty()) {
                self.chunk_refs.insert(keys::reference(&tokens_hash(&passage.tokens), &info.id));
            }
        }
    }

    /// Rows that stand for themselves.
    fn others(&mut self, sink: &mut Sink<'_>) -> Result<()> {
        for (key, content) in std::mem::take(&mut self.removed) {
            let mut kept = Vec::new();
            for (id, entry) in entries(&content) {
                if self.kept.contains_key(&id) {
                    kept.extend_from_slice(entry);
                } else if let Err(problem) = readable(read(self.source, Family::Documents, id.bytes()))? {
                    self.damaged(&[shown(Family::Names, &key)], id, format!("removed, and {problem}"), false);
                }
            }
            if !kept.is_empty() {
                sink(Saved::Row(Family::Names, &key, &kept))?;
            }
        }
        for family in [Family::Released, Family::Files, Family::Jobs, Family::Meta] {
            let found = rows(self.source, family, &mut self.report.problems, |key, content| {
                Ok((key.to_vec(), content.to_vec()))
            })?;
            found.iter().try_for_each(|(key, content)| sink(Saved::Row(family, key, content)))?;
        }
        Ok(())
    }

    /// Compares the rows that follow from documents with those that are there.
    fn references(&mut self) -> Result<()> {
        let problems = &mut self.report.problems;
        let text_refs = rows(self.source, Family::TextRefs, problems, |key, _| Ok(key.to_vec()))?;
        let chunk_refs = rows(self.source, Family::ChunkRefs, problems, |key, _| Ok(key.to_vec()))?;
        let texts = rows(self.source, Family::Texts, problems, |key, _| Ok(key.to_vec()))?;
        let passages = rows(self.source, Family::Passages, problems, |key, _| Ok(key.to_vec()))?;
        rows(self.source, Family::Log, problems, |_, content| from_json::<super::LogEntry>(content).map(|_| ()))?;
        let right = text_refs.iter().filter(|key| self.text_refs.contains(*key)).count();
        let mut wrong = text_refs.len() + self.text_refs.len() - 2 * right;
        let right = chunk_refs.iter().filter(|key| self.chunk_refs.contains(*key)).count();
        wrong += chunk_refs.len() + self.chunk_refs.len() - 2 * right;
        let needed: HashSet<&[u8]> = self.text_refs.iter().filter_map(|key| key.get(..32)).collect();
        wrong += texts.iter().filter(|key| !key.get(..32).is_some_and(|hash| needed.contains(hash))).count();
        let is_of_a_document = |key: &Vec<u8>| {
            let id = key.get(..DocumentId::LENGTH).and_then(DocumentId::from_bytes);
            id.is_some_and(|id| self.kept.contains_key(&id))
        };
        wrong += passages.iter().filter(|key| !is_of_a_document(key)).count();
        self.report.references += wrong as u64;
        Ok(())
    }
}
