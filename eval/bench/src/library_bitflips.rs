//! The files of a library's catalog are damaged, one after the other: bits flipped, files cut or removed. Each time in a fresh
//! copy, which is then read, repaired as its errors say, and gone on with.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use documents::{
    ChunkSpan, DocumentsError, Format, Library, LibraryReport, NewDocument, NewPassage, Span, catalog_dir,
};
use eval::{Output, Record, RecordLog, RunInfo};
use serde::Serialize;
use serde_json::json;

use super::crash::Random;
use super::dispatch::ScratchDir;
use crate::error::Result;
use settings::{QuireError, Settings};

const COLLECTION: &str = "drill";
const CASE: &str = "library/bitflips";
/// Documents of the library.
const DOCUMENTS: usize = 240;

/// What the drill does.
#[derive(Clone, Debug)]
pub(crate) struct LibraryFlipsOptions {
    /// How often a file is damaged.
    pub(crate) flips: usize,
    /// Seed of places and kinds of damage.
    pub(crate) seed: u64,
    /// Where records go.
    pub(crate) output: Output,
}

/// What the drill found.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct LibraryFlipsReport {
    /// Times a file was damaged: all kinds.
    pub(crate) flips: usize,
    /// Of these, times it was cut to half of its length.
    pub(crate) cuts: usize,
    /// Of these, times it was removed.
    pub(crate) removals: usize,
    /// Another text than was put in was served.
    pub(crate) served_wrong: usize,
    /// Documents that were gone, and nothing said so.
    pub(crate) silent: usize,
    /// Times after which the way out that the error names did not work.
    pub(crate) stuck: usize,
    /// Times after which the catalog was not opened, with an error that names the way out.
    pub(crate) refused: usize,
    /// Documents that could not be saved, over all times.
    pub(crate) lost_documents: usize,
    /// Documents that could not be saved after a bit was flipped.
    pub(crate) lost_by_bits: usize,
    /// Times after which nothing could be saved.
    pub(crate) nothing_saved: usize,
    /// What was wrong, for the first times.
    pub(crate) problems: Vec<String>,
    /// What was recorded.
    pub(crate) records: Vec<Record>,
}

impl LibraryFlipsReport {
    /// For people.
    #[must_use]
    pub(crate) fn table(&self) -> String {
        format!(
            "| flips, cuts, removals | served wrong | silently gone | stuck | refused | documents lost | of these, by a bit |\n\
             |---|---|---|---|---|---|---|\n| {}, {}, {} | {} | {} | {} | {} | {} | {} |",
            self.flips - self.cuts - self.removals,
            self.cuts,
            self.removals,
            self.served_wrong,
            self.silent,
            self.stuck,
            self.refused,
            self.lost_documents,
            self.lost_by_bits
        )
    }

    /// An error if anything was served wrong, gone silently, or stuck.
    ///
    /// # Errors
    /// [`QuireError::CheckFailed`].
    pub(crate) fn check(&self) -> Result<()> {
        match self.served_wrong + self.silent + self.stuck {
            0 => Ok(()),
            faults => Err(QuireError::CheckFailed(format!(
                "{faults} times something was wrong, gone or stuck; the first: {}",
                self.problems.join("; ")
            ))
            .into()),
        }
    }

    fn problem(&mut self, text: String) {
        if self.problems.len() < 10 {
            self.problems.push(text);
        }
    }
}

/// Runs the drill in a scratch folder below the data folder; `news` gets a line per file.
///
/// # Errors
/// What keeps the drill from being carried out. What it finds wrong is in the report.
pub(crate) fn library_flips(
    settings: &Settings,
    options: &LibraryFlipsOptions,
    news: &mut dyn FnMut(&str),
) -> Result<LibraryFlipsReport> {
    let run = RunInfo::start(&options.output);
    let scratch = ScratchDir::new(&settings.data_dir, "library-bitflips")?;
    let (template, copy) = (scratch.path().join("template"), scratch.path().join("copy"));
    fill(&template)?;
    let files = files(&template)?;
    let mut random = Random(options.seed);
    let mut report = LibraryFlipsReport::default();
    for turn in 0..options.flips {
        let file = &files[turn % files.len()];
        copy_folder(&template, &copy)?;
        // A round of bits after the other; now and then one of files that are cut, or gone.
        let (what, is_bit) = damage(&catalog_dir(&copy).join(file), turn / files.len() % 5, &mut random, &mut report)?;
        let before = report.lost_documents;
        examine(&copy, &what, &mut report);
        if is_bit {
            report.lost_by_bits += report.lost_documents - before;
        }
        news(&format!("{} of {}: {what}, {} documents lost", turn + 1, options.flips, report.lost_documents - before));
    }
    record(&run, options, &mut report)?;
    Ok(report)
}

fn record(run: &RunInfo, options: &LibraryFlipsOptions, report: &mut LibraryFlipsReport) -> Result<()> {
    let figures = [
        ("flips", report.flips),
        ("cuts", report.cuts),
        ("removals", report.removals),
        ("served_wrong", report.served_wrong),
        ("silent", report.silent),
        ("stuck", report.stuck),
        ("refused", report.refused),
        ("nothing_saved", report.nothing_saved),
        ("lost_documents", report.lost_documents),
        ("lost_by_bits", report.lost_by_bits),
    ];
    for (metric, value) in figures {
        let mut record = run.record("crash", CASE, metric, "count", value as f64, report.flips);
        record.config = json!({"documents": DOCUMENTS, "seed": options.seed});
        report.records.push(record);
    }
    if let Some(dir) = &options.output.results_dir {
        RecordLog::new(dir).append(&report.records)?;
    }
    Ok(())
}

fn name(number: usize) -> String {
    format!("/shelf/of/notes/note-{number:03}.md")
}

/// A text with a word that no other has; some are longer than a row of the catalog.
fn text(number: usize) -> String {
    let mut random = Random(number as u64);
    let lines = if number % 40 == 9 { 900 } else { 3 + number % 9 };
    let line = |line: usize| format!("Entry {line} of lighthouse{number}x says {:016x}.\n", random.next());
    (0..lines).map(line).collect()
}

fn document(number: usize) -> NewDocument {
    let text = text(number);
    let mut start = 0;
    let passage = |line: &str| {
        let bytes = start..start + line.len();
        start = bytes.end + 1;
        let place = ChunkSpan { chars: Span { start: bytes.start, end: bytes.end }, bytes: bytes.clone() };
        NewPassage { place, page: None, tokens: vec![number as u32, bytes.start as u32] }
    };
    let passages = text.lines().map(passage).collect();
    NewDocument {
        name: name(number),
        text,
        format: Format::Markdown,
        fingerprint: "lines".into(),
        tokenizer: Some([1; 32]),
        passages,
        attributes: None,
        instead_of: Vec::new(),
        left_by: Vec::new(),
    }
}

fn put(library: &Library, collection: &str, numbers: std::ops::Range<usize>) -> documents::Result<()> {
    let collection = library.collection_or_new(collection)?;
    let writer = collection.writer()?;
    let documents: Vec<NewDocument> = numbers.map(document).collect();
    for some in documents.chunks(10) {
        writer.change(|transaction, info| {
            some.iter().try_for_each(|document| transaction.put(info, document).map(|_| ()))
        })?;
    }
    Ok(())
}

/// A closed library: a third in tables of the last level, a third in tables above, a third in the log.
fn fill(dir: &Path) -> Result<()> {
    let library = Library::new(dir);
    put(&library, COLLECTION, 0..DOCUMENTS / 3)?;
    library.erase()?;
    put(&library, COLLECTION, DOCUMENTS / 3..2 * DOCUMENTS / 3)?;
    drop(library);
    // What was in the log comes into tables with the next opening.
    Ok(put(&Library::new(dir), COLLECTION, 2 * DOCUMENTS / 3..DOCUMENTS)?)
}

/// The files of the catalog that are read.
fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let dir = catalog_dir(dir);
    let is_told = |name: &str| ["LOCK", "LOG", "OPTIONS", "IDENTITY"].iter().any(|start| name.starts_with(start));
    let entries = fs::read_dir(&dir).map_err(|e| QuireError::writing(&dir, e))?.flatten();
    let holding = entries.filter(|entry| entry.metadata().is_ok_and(|found| found.len() > 0));
    let mut names: Vec<PathBuf> = holding.map(|entry| entry.file_name().into()).collect();
    names.retain(|name| !is_told(&name.to_string_lossy()));
    names.sort();
    Ok(names)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(to);
    let failed = |e| QuireError::writing(to, e);
    fs::create_dir_all(to).map_err(failed)?;
    for entry in fs::read_dir(from).map_err(failed)?.flatten() {
        let target = to.join(entry.file_name());
        match entry.path().is_dir() {
            true => copy_folder(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target).map_err(failed)?),
        }
    }
    Ok(())
}

/// Says what was done, and whether it was a bit.
fn damage(path: &Path, round: usize, random: &mut Random, report: &mut LibraryFlipsReport) -> Result<(String, bool)> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let failed = |e| QuireError::writing(path, e);
    let mut bytes = fs::read(path).map_err(failed)?;
    report.flips += 1;
    match round {
        1 => {
            report.cuts += 1;
            fs::write(path, &bytes[..bytes.len() / 2]).map_err(failed)?;
            Ok((format!("{name} cut to half"), false))
        }
        3 => {
            report.removals += 1;
            fs::remove_file(path).map_err(failed)?;
            Ok((format!("{name} removed"), false))
        }
        _ => {
            let (at, bit) = (random.below(bytes.len()), random.below(8));
            bytes[at] ^= 1 << bit;
            fs::write(path, &bytes).map_err(failed)?;
            Ok((format!("bit {bit} of byte {at} of {} of {name}", bytes.len()), true))
        }
    }
}

fn examine(dir: &Path, what: &str, report: &mut LibraryFlipsReport) {
    let before = Library::new(dir);
    match served(&before, what, report) {
        Ok((_, silent)) if silent.is_empty() => {}
        Ok((_, silent)) => {
            report.silent += silent.len();
            report.problem(format!("{what}: nothing says that {silent:?} are damaged"));
        }
        Err(DocumentsError::DamagedCatalog { .. }) => report.refused += 1,
        Err(error) => {
            report.stuck += 1;
            report.problem(format!("{what}: reading says only: {error}"));
            return;
        }
    }
    let way_out = || -> documents::Result<Option<LibraryReport>> {
        match before.repair(false) {
            Err(DocumentsError::NothingSaved { .. }) => {
                before.repair(true)?;
                Ok(None)
            }
            repaired => repaired,
        }
    };
    let found = match way_out() {
        Ok(found) => found,
        Err(error) => {
            report.stuck += 1;
            report.problem(format!("{what}: repairing: {error}"));
            return;
        }
    };
    drop(before);
    report.nothing_saved += usize::from(found.is_none());
    let told = found.is_none_or(|found| !found.catalog.problems.is_empty());
    if let Err(problem) = goes_on(dir, what, told, report) {
        report.stuck += 1;
        report.problem(format!("{what}: repaired, and then: {problem}"));
    }
}

/// After a repair: nothing is damaged any more, what was lost comes in again, all is erased that should be.
fn goes_on(dir: &Path, what: &str, told: bool, report: &mut LibraryFlipsReport) -> std::result::Result<(), String> {
    let text = |error: DocumentsError| error.to_string();
    let library = Library::new(dir);
    let is_clean = || -> std::result::Result<(), String> {
        match library.verify().map_err(text)? {
            Some(again) if !again.is_clean() => Err(format!("still damaged: {again:?}")),
            _ => Ok(()),
        }
    };
    is_clean()?;
    let (lacking, silent) = served(&library, what, report).map_err(text)?;
    report.lost_documents += lacking.len();
    // With the log, or a table, names can be gone: then the damage as a whole was told.
    if !silent.is_empty() && !told {
        report.silent += silent.len();
        report.problem(format!("{what}: {silent:?} are gone, and the repair did not say so"));
    }
    let collection = collection_name(&library).map_err(text)?;
    put(&library, &collection, 0..DOCUMENTS).map_err(text)?;
    let (lacking, _) = served(&library, what, report).map_err(text)?;
    if !lacking.is_empty() {
        return Err(format!("{lacking:?} did not come in again"));
    }
    library.reclaim(None).and_then(|_| library.erase()).map_err(text)?;
    is_clean()
}

/// The only collection, whose name may have been lost.
fn collection_name(library: &Library) -> documents::Result<String> {
    Ok(library.collections()?.pop().map_or_else(|| COLLECTION.into(), |info| info.name))
}

/// Looks at everything that is served: which documents are not there or not whole, and of which of them nothing is said.
fn served(
    library: &Library,
    what: &str,
    report: &mut LibraryFlipsReport,
) -> documents::Result<(BTreeSet<usize>, BTreeSet<usize>)> {
    let (mut lacking, mut silent) = (BTreeSet::new(), BTreeSet::new());
    let collection = match library.collection(&collection_name(library)?) {
        // The row of the collection is damaged, of which the log and `verify` tell.
        Err(DocumentsError::UnknownCollection { .. }) => return Ok(((0..DOCUMENTS).collect(), silent)),
        outcome => outcome?,
    };
    let (_, damaged) = collection.catalog().listing(collection.info().id)?;
    for number in 0..DOCUMENTS {
        let name = name(number);
        match collection.document(Path::new(&name)) {
            Ok(Some(stored)) if stored.text == text(number) => {}
            Ok(Some(_)) => {
                report.served_wrong += 1;
                report.problem(format!("{what}: another text of {name}"));
            }
            Ok(None) => {
                lacking.insert(number);
                if !damaged.iter().any(|entry| entry.name.contains(&name)) {
                    silent.insert(number);
                }
            }
            Err(DocumentsError::DamagedDocument { .. }) => {
                lacking.insert(number);
            }
            Err(error) => return Err(error),
        }
        let found = match collection.search(&format!("lighthouse{number}x"), 5, &|| true) {
            Err(DocumentsError::DamagedDocument { .. }) => continue,
            found => found?,
        };
        let is_right = |hit: &documents::Found| {
            hit.path == Path::new(&name) && text(number).get(hit.span.start..hit.span.end) == Some(&hit.passage)
        };
        if !found.iter().all(is_right) {
            report.served_wrong += 1;
            report.problem(format!("{what}: another passage for {name}"));
        }
        if found.is_empty() && !lacking.contains(&number) {
            silent.insert(number);
        }
    }
    Ok((lacking, silent))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_damaged_file_of_the_catalog_is_named_and_mended_and_nothing_wrong_is_served() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { data_dir: dir.path().into(), ..Settings::default() };
        let options =
            LibraryFlipsOptions { flips: 6, seed: 5, output: Output { results_dir: None, ..Output::default() } };
        let report = library_flips(&settings, &options, &mut |_| {}).unwrap();
        assert_eq!((report.served_wrong, report.silent, report.stuck), (0, 0, 0), "{:?}", report.problems);
        assert_eq!((report.flips, report.records.len()), (6, 10));
    }
}
