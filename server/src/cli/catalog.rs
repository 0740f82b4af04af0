//! `quire catalog verify`: compares the catalog with its checksums, and writes it anew.

use serde_json::json;

use super::args::CatalogCommand as Called;
use super::asking;
use super::output::{Out, bytes, count, short};
use service::control::{CatalogCommand, CatalogEvent, CatalogTotals, Command, Event};
use settings::{Config, QuireError, Result};

pub(super) fn run(config: &Config, called: &Called, out: &Out) -> Result<()> {
    let command = match called {
        Called::Verify { repair: false, .. } => CatalogCommand::Verify,
        Called::Verify { repair: true, anew } => CatalogCommand::Repair { anew: *anew },
    };
    // What is damaged is an error of the command, which is told last.
    let mut damage = Ok(());
    asking::run(config, "catalog verify", &Command::Catalog(command), out, &mut |event| {
        if let Event::Catalog(event) = event
            && let Err(error) = print(event, out)
        {
            damage = Err(error);
        }
    })?;
    damage
}

fn print(event: CatalogEvent, out: &Out) -> Result<()> {
    if out.json && !matches!(event, CatalogEvent::Verified(_)) {
        out.value(&event);
        return Ok(());
    }
    match event {
        CatalogEvent::Absent { dir } => out.line(format!("no catalog yet at {dir}")),
        CatalogEvent::Damaged { name, id, problem, is_saved } => {
            let state = if is_saved { "damaged, can be saved" } else { "lost" };
            out.failed(&format!("{state}: {} ({id}): {problem}", short(name.as_ref())));
        }
        CatalogEvent::Missing { name, id } => {
            out.line(format!("lost before, ingest it again: {} ({id})", short(name.as_ref())));
        }
        CatalogEvent::Problem { what } => out.failed(&format!("damaged: {what}")),
        CatalogEvent::Verified(totals) => return verified(&totals, out),
    }
    Ok(())
}

fn verified(totals: &CatalogTotals, out: &Out) -> Result<()> {
    if out.json {
        out.value(&json!({ "verified": totals }));
    } else {
        out.line(format!(
            "{}, {}, {} of texts are whole",
            count(totals.documents as usize, "document"),
            count(totals.passages as usize, "passage"),
            bytes(totals.bytes)
        ));
    }
    if totals.repaired {
        return repaired(totals, out);
    }
    if totals.clean {
        if !out.json {
            out.line("everything matches its checksums");
        }
        return Ok(());
    }
    Err(QuireError::CheckFailed(format!(
        "the catalog has {} ({} of them lost), {} beside these, and {} that are missing or superfluous; \
         `quire catalog verify --repair` saves what is whole",
        count(totals.damaged, "damaged document"),
        totals.lost,
        count(totals.problems, "damaged part"),
        count(totals.references as usize, "reference")
    )))
}

fn repaired(totals: &CatalogTotals, out: &Out) -> Result<()> {
    if !out.json {
        out.line("the catalog was written anew, and the search indexes built again");
    }
    match totals.lost {
        0 => Ok(()),
        lost => Err(QuireError::CheckFailed(format!(
            "{} could not be saved (named above): `quire ingest` of the same files brings them in again",
            count(lost, "document")
        ))),
    }
}
