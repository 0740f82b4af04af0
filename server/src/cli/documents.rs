//! `quire ls`, `rm`, `collections` and `reclaim`.

use serde_json::json;

use super::asking;
use super::output::{Out, bytes, count, grouped, short};
use service::control::{Command, Event};
use service::{DocumentName, DocumentsCommand, DocumentsEvent};
use settings::{Config, QuireError, Result};

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

pub(super) fn ls(config: &Config, name: Option<String>, out: &Out) -> Result<()> {
    let collection = name.unwrap_or_else(|| config.settings.collection.clone());
    run(config, "ls", DocumentsCommand::List { collection }, out)
}

pub(super) fn collections(config: &Config, out: &Out) -> Result<()> {
    run(config, "collections", DocumentsCommand::Collections, out)
}

pub(super) fn rename(config: &Config, collection: String, to: String, out: &Out) -> Result<()> {
    run(config, "collections", DocumentsCommand::Rename { collection, to }, out)
}

pub(super) fn reclaim(config: &Config, out: &Out) -> Result<()> {
    run(config, "reclaim", DocumentsCommand::Reclaim, out)
}

pub(super) fn rm(config: &Config, removal: &Removal, out: &Out) -> Result<()> {
    if removal.names.is_empty() && !removal.whole {
        if removal.undo {
            return run(config, "rm", DocumentsCommand::Removed, out);
        }
        return Err(QuireError::InvalidParameter {
            param: "NAME".into(),
            problem: "expected documents, or --collection NAME for all of a collection".into(),
        });
    }
    let collection = config.settings.collection.clone();
    let names = removal.names.iter().map(|given| DocumentName::here(given)).collect();
    let command = match removal.undo {
        true => DocumentsCommand::Restore { collection, names },
        false => DocumentsCommand::Remove { collection, names, now: removal.now },
    };
    run(config, "rm", command, out)
}

fn run(config: &Config, name: &str, command: DocumentsCommand, out: &Out) -> Result<()> {
    let mut listed = 0;
    let nothing_removed = command == DocumentsCommand::Removed;
    asking::run(config, name, &Command::Documents(command), out, &mut |event| {
        if let Event::Documents(event) = event {
            listed += 1;
            show(&event, out);
        }
    })?;
    if listed == 0 {
        out.note(match nothing_removed {
            true => "no collection was removed that could be brought back",
            false => "nothing there yet: `quire ingest PATH` takes documents in",
        });
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
        DocumentsEvent::RemovedCollection { name, id, documents, .. } => out.line(format!(
            "{name}: removed, {}; back with `quire rm --undo --collection {id}`",
            count(*documents as usize, "document")
        )),
        DocumentsEvent::Collection(sum) => out.line(format!(
            "{}  {}, {}, {} in {}, language {}{}",
            sum.name,
            count(sum.documents as usize, "document"),
            bytes(sum.bytes),
            count(sum.tokens as usize, "token"),
            count(sum.passages as usize, "passage"),
            sum.language,
            match sum.damaged {
                0 => String::new(),
                damaged => format!("; {} damaged or lost: see `quire ls {}`", grouped(damaged), sum.name),
            }
        )),
        DocumentsEvent::Damaged { name, id, problem } => {
            out.line(format!("{id}  {:>10}  {:>7}  {}: {problem}", "damaged", "", short(name.as_ref())));
        }
        DocumentsEvent::Renamed { name, to } => {
            out.line(format!("{}: renamed to {}", short(name.as_ref()), short(to.as_ref())))
        }
        DocumentsEvent::Removed { name } => out.line(format!("{}: removed", short(name.as_ref()))),
        DocumentsEvent::Restored { name, replaced } => out.line(match replaced {
            true => format!(
                "{}: back, in the place of another text, which the same command brings back",
                short(name.as_ref())
            ),
            false => format!("{}: back", short(name.as_ref())),
        }),
        DocumentsEvent::Failed { error, .. } => out.failed(error),
        DocumentsEvent::Reclaimed { collections, documents, chunks } => out.line(format!(
            "gone for good: {}, {}, {}",
            count(*collections, "collection"),
            count(*documents, "document"),
            count(*chunks as usize, "cached chunk")
        )),
    }
}
