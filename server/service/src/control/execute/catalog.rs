//! The catalog as a whole: compared with its checksums, written anew.

use documents::{LibraryReport, catalog_dir};

use super::super::command::CatalogCommand;
use super::super::event::{CatalogEvent, CatalogTotals, Event};
use super::super::host::Host;
use settings::Result;

pub(super) fn execute(host: &Host, command: CatalogCommand, on_event: &mut dyn FnMut(Event)) -> Result<()> {
    let mut tell = |event| on_event(Event::Catalog(event));
    let found = host.with_library(|library| match command {
        CatalogCommand::Verify => library.verify(),
        CatalogCommand::Repair { anew } => library.repair(anew),
    })?;
    let Some(report) = found else {
        tell(CatalogEvent::Absent { dir: catalog_dir(host.data_dir()).to_string_lossy().into() });
        return Ok(());
    };
    report_on(report, command != CatalogCommand::Verify, &mut tell);
    if command != CatalogCommand::Verify
        && let Ok(service) = host.service()
        && let cut @ 1.. = service.cut_again()?
    {
        on_event(Event::Note(format!(
            "documents whose passages were lost were cut and tokenised again, as when they were ingested: {cut}"
        )));
    }
    Ok(())
}

fn report_on(report: LibraryReport, repaired: bool, tell: &mut dyn FnMut(CatalogEvent)) {
    let clean = report.is_clean();
    let LibraryReport { catalog, indexes } = report;
    let lost = catalog.lost();
    let (damaged, missing) = (catalog.damaged.len(), catalog.missing.len());
    for document in catalog.damaged {
        let (id, is_saved) = (document.id.to_string(), document.is_saved);
        tell(CatalogEvent::Damaged { name: document.name, id, problem: document.problem, is_saved });
    }
    for document in catalog.missing {
        tell(CatalogEvent::Missing { name: document.name, id: document.id.to_string() });
    }
    let problems = catalog.problems.len() + indexes.len();
    let of_index = |(collection, problem)| format!("search index of {collection}: {problem}");
    for what in catalog.problems.into_iter().chain(indexes.into_iter().map(of_index)) {
        tell(CatalogEvent::Problem { what });
    }
    tell(CatalogEvent::Verified(CatalogTotals {
        documents: catalog.documents,
        passages: catalog.passages,
        bytes: catalog.bytes,
        damaged,
        lost,
        missing,
        problems,
        references: catalog.references,
        clean,
        repaired,
    }));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use documents::{Format, Library, NewDocument};
    use settings::Settings;

    use super::super::super::{Cancel, Command, Host, Need};
    use super::super::execute;
    use super::*;

    fn told(settings: &Settings, command: CatalogCommand) -> Vec<CatalogEvent> {
        let host = Host::alone(settings, Need::Write).unwrap();
        let mut events = Vec::new();
        execute(&host, &Command::Catalog(command), &Cancel::never(), &mut |event| match event {
            Event::Catalog(event) => events.push(event),
            other => panic!("{other:?}"),
        })
        .unwrap();
        events
    }

    #[test]
    fn a_damaged_catalog_is_told_repaired_and_clean_again() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { data_dir: dir.path().into(), ..Settings::default() };
        assert!(matches!(told(&settings, CatalogCommand::Verify)[..], [CatalogEvent::Absent { .. }]));
        let document = NewDocument {
            name: "/d/a".into(),
            text: "A lighthouse.".into(),
            format: Format::Text,
            fingerprint: "whole".into(),
            tokenizer: None,
            passages: Vec::new(),
            attributes: None,
            instead_of: Vec::new(),
            left_by: Vec::new(),
        };
        let library = Library::new(dir.path());
        let collection = library.collection_or_new("notes").unwrap();
        collection.writer().unwrap().change(|t, info| t.put(info, &document)).unwrap();
        drop((collection, library));
        std::fs::remove_file(catalog_dir(dir.path()).join("CURRENT")).unwrap();
        let totals = |events: &[CatalogEvent]| match events.last() {
            Some(CatalogEvent::Verified(totals)) => totals.clone(),
            other => panic!("{other:?}"),
        };
        let found = told(&settings, CatalogCommand::Verify);
        assert!(found.iter().any(|event| matches!(event, CatalogEvent::Problem { what } if what.contains("CURRENT"))));
        assert!(!totals(&found).clean && !totals(&found).repaired);
        let repaired = totals(&told(&settings, CatalogCommand::Repair { anew: false }));
        assert!(repaired.repaired && repaired.lost == 0 && repaired.documents == 1, "{repaired:?}");
        let after = totals(&told(&settings, CatalogCommand::Verify));
        assert!(after.clean && after.documents == 1, "{after:?}");
    }
}
