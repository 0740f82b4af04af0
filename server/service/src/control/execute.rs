//! Commands at work, on the side that owns the data folder: the command line's own process, or a server.

mod answer;
mod cache;
mod catalog;

use std::path::PathBuf;

use super::cancel::Cancel;
use super::command::Command;
use super::event::{Event, IngestProgress};
use super::host::Host;
use crate::IngestOptions;
use settings::Result;

/// Executes a command. `on_event` hears what happens, in order; once `cancel` says so, the command ends behind the step at hand.
///
/// # Errors
/// What the command failed with, also [`EngineError::Cancelled`](engine::EngineError::Cancelled).
pub fn execute(host: &Host, command: &Command, cancel: &Cancel, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    match command {
        Command::Search { passages, query } => {
            host.search(passages, query)?.into_iter().for_each(|hit| on_event(Event::Hit(hit)));
            Ok(())
        }
        Command::Ask { question, passages, answering, compare } => {
            answer::ask(host, question, passages, (answering, *compare), cancel, on_event)
        }
        Command::CheckConversation { conversation, over_documents } => {
            answer::tokens(host, &conversation.messages("Hello"), *over_documents).map(|_| ())
        }
        Command::Turn { conversation, question, passages, answering } => {
            let passages = passages.as_ref();
            answer::turn(host, conversation.clone(), question, (passages, answering), cancel, on_event)
        }
        Command::Ingest { collection, paths, options, cache_bytes } => {
            let paths: Vec<_> = paths.iter().map(|path| path.as_path().to_path_buf()).collect();
            ingest(host, (collection, &paths, options), *cache_bytes, cancel, on_event)
        }
        Command::Documents(command) => host.manage_documents(command, &mut |event| on_event(Event::Documents(event))),
        Command::Cache(command) => cache::execute(host, command, on_event),
        Command::Catalog(command) => catalog::execute(host, *command, on_event),
    }
}

fn ingest(
    host: &Host,
    (collection, paths, options): (&str, &[PathBuf], &IngestOptions),
    cache_bytes: Option<u64>,
    cancel: &Cancel,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let service = host.service()?;
    if !options.lazy && !service.store().mend() {
        on_event(Event::Note(
            "the running server has no chunk store that can be written, as it said when it started: documents are taken in, the \
             state of their chunks is left to its first use. On a full disk make room: it then opens the store by itself. If the \
             store is damaged, `quire cache evict --all` empties it"
                .into(),
        ));
    }
    if let Some(bytes) = cache_bytes {
        service.store().set_budget(bytes)?;
    }
    let wanted = || !cancel.is_cancelled();
    let report = service.ingest_while(collection, paths, options, &wanted, &mut |event| {
        on_event(Event::Ingest(IngestProgress::from(event)));
    })?;
    on_event(Event::Ingested(report.clone()));
    report.check()
}
