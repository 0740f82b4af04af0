//! `quire ls`, `rm`, `collections` and `reclaim`.
//!
//! Only what is removed for good needs the model: the keys of its cached chunks depend on that.

use serde_json::json;

use super::output::{Out, bytes, count, grouped, short};
use crate::config::Settings;
use crate::error::{QuireError, Result};
use crate::service::{DocumentName, DocumentsCommand, DocumentsEvent, Purpose, Service, manage_documents};
use crate::store::store_dir;
use documents::{Library, data_dir};

/// What is to be removed, or brought back.
pub(super) struct Removal {
    /// The documents.
    pub(super) names: Vec<String>,
    /// For good.
    pub(super) now: bool,
    /// Bring it back.
    pub(super) undo: bool,
    /// Whether a collection was named, which is meant as a whole where no documents are.
    pub(super) whole: bool,
}

pub(super) fn ls(settings: &Settings, name: Option<String>, out: &Out) -> Result<()> {
    let collection = name.unwrap_or_else(|| settings.collection.clone());
    run(settings, &DocumentsCommand::List { collection }, out)
}

pub(super) fn collections(settings: &Settings, out: &Out) -> Result<()> {
    run(settings, &DocumentsCommand::Collections, out)
}

pub(super) fn reclaim(settings: &Settings, out: &Out) -> Result<()> {
    run(settings, &DocumentsCommand::Reclaim, out)
}

pub(super) fn rm(settings: &Settings, removal: &Removal, out: &Out) -> Result<()> {
    if removal.names.is_empty() && !removal.whole {
        return Err(QuireError::InvalidParameter {
            param: "NAME".into(),
            problem: "expected documents, or --collection NAME for all of a collection".into(),
        });
    }
    let collection = settings.collection.clone();
    let names = removal.names.iter().map(|given| DocumentName::here(given)).collect();
    let command = match removal.undo {
        true => DocumentsCommand::Restore { collection, names },
        false => DocumentsCommand::Remove { collection, names, now: removal.now },
    };
    run(settings, &command, out)
}

fn run(settings: &Settings, command: &DocumentsCommand, out: &Out) -> Result<()> {
    data_dir::check(&settings.data_dir)?;
    let for_good = matches!(command, DocumentsCommand::Reclaim | DocumentsCommand::Remove { now: true, .. });
    let mut listed = 0;
    let mut tell = |event: DocumentsEvent| {
        listed += 1;
        show(&event, out);
    };
    if for_good && store_dir(&settings.data_dir).is_dir() {
        let spinner = out.spinner("loading the model");
        let service = Service::open(settings, Purpose::Ask)?;
        if let Some(spinner) = spinner {
            spinner.finish_and_clear();
        }
        let done = service.manage_documents(command, &mut tell);
        service.engine().shutdown();
        return done;
    }
    manage_documents(&Library::new(&settings.data_dir), command, &|| Ok(0), &mut tell)?;
    if listed == 0 {
        out.note("nothing there yet: `quire ingest PATH` takes documents in");
    }
    Ok(())
}

/// Prints what a command found or did.
pub(super) fn show(event: &DocumentsEvent, out: &Out) {
    if out.json {
        if let DocumentsEvent::Failed { error, .. } = event {
            out.failed(error);
        }
        return out.value(&json!(event));
    }
    match event {
        DocumentsEvent::Document(document) => {
            let names: Vec<String> = document.names.iter().map(|name| short(name.as_ref())).collect();
            out.line(format!(
                "{}  {:>10}  {:>7}  {}",
                document.id,
                bytes(document.bytes),
                grouped(u64::from(document.passages)),
                names.join("  =  ")
            ));
        }
        DocumentsEvent::Collection(sum) => out.line(format!(
            "{}  {}, {}, {} in {}, language {}",
            sum.name,
            count(sum.documents as usize, "document"),
            bytes(sum.bytes),
            count(sum.tokens as usize, "token"),
            count(sum.passages as usize, "passage"),
            sum.language
        )),
        DocumentsEvent::Removed { name } => out.line(format!("{}: removed", short(name.as_ref()))),
        DocumentsEvent::Restored { name } => out.line(format!("{}: back", short(name.as_ref()))),
        DocumentsEvent::Failed { error, .. } => out.failed(error),
        DocumentsEvent::Reclaimed { collections, documents, chunks } => out.line(format!(
            "gone for good: {}, {}, {}",
            count(*collections, "collection"),
            count(*documents, "document"),
            count(*chunks as usize, "cached chunk")
        )),
    }
}
