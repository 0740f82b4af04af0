//! Which listed faults a test run shows to be mended.
//!
//! `docs/faults.md` has one table row for each kind of fault that users met; its last column names the tests that hold the
//! right value. A row is mended where every test that it names passed in some log of `cargo test`.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::error::{EvalError, Result};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;

/// What [`bench_faults`] reads.
#[derive(Debug, Clone)]
pub struct FaultsOptions {
    /// The list: a Markdown file with tables whose last column names tests between backticks.
    pub list: PathBuf,
    /// What runs of `cargo test` printed.
    pub logs: Vec<PathBuf>,
    /// Where records go.
    pub output: Output,
}

/// How a test ended; of several runs of one, the last in this order counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    Ignored,
    Passed,
    Failed,
}

/// The result of [`bench_faults`].
#[derive(Debug, Clone, Serialize)]
pub struct FaultsReport {
    /// Rows of the list.
    pub listed: usize,
    /// Rows that name no test, or one that failed or is in no log: the row's input and what is wrong.
    pub open: Vec<String>,
    /// Rows with a test that was only ignored, as those for a GPU are without one: not shown by these logs.
    pub not_run: Vec<String>,
    /// As records: rows that were not run count as open.
    pub records: Vec<Record>,
}

impl FaultsReport {
    /// As Markdown, behind a line for every row that is not mended.
    #[must_use]
    pub fn table(&self) -> String {
        let lines = |what: &str, rows: &[String]| rows.iter().map(|row| format!("{what}: {row}\n")).collect::<String>();
        lines("open", &self.open) + &lines("not run", &self.not_run) + &records_table(&self.records)
    }
}

/// Compares the list of faults with what tests said.
///
/// # Errors
/// [`EvalError::Io`] for files that cannot be read or written; [`EvalError::NothingToDo`] for a list without rows.
pub fn bench_faults(options: &FaultsOptions) -> Result<FaultsReport> {
    let read = |path: &PathBuf| fs::read(path).map_err(EvalError::io("read", path));
    let list = String::from_utf8_lossy(&read(&options.list)?).into_owned();
    let mut outcomes = HashMap::new();
    for log in &options.logs {
        collect(&String::from_utf8_lossy(&read(log)?), &mut outcomes);
    }
    let rows = rows(&list);
    if rows.is_empty() {
        return Err(EvalError::NothingToDo(format!("{} has no table of faults", options.list.display())));
    }
    let (mut open, mut not_run) = (Vec::new(), Vec::new());
    for row in &rows {
        match verdict(row, &outcomes) {
            Err(why) => open.push(format!("{}: {why}", row.input)),
            Ok(false) => not_run.push(row.input.clone()),
            Ok(true) => {}
        }
    }
    let info = RunInfo::start(&options.output);
    let record = |metric: &str, value: usize| info.record("faults", "listed", metric, "rows", value as f64, rows.len());
    let records = vec![record("rows", rows.len()), record("open", open.len() + not_run.len())];
    info.write(&records)?;
    Ok(FaultsReport { listed: rows.len(), open, not_run, records })
}

/// A row of the list.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    input: String,
    /// The last parts of the tests' paths.
    tests: Vec<String>,
}

/// Rows of all tables whose head ends with a column `test`.
fn rows(list: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut inside = false;
    for line in list.lines().map(str::trim) {
        let Some(cells) = cells(line) else {
            inside = false;
            continue;
        };
        let (Some(first), Some(last)) = (cells.first(), cells.last()) else { continue };
        if last.eq_ignore_ascii_case("test") {
            inside = true;
        } else if inside && !first.starts_with("---") {
            let named = last.split('`').skip(1).step_by(2);
            let tests = named.map(|path| path.rsplit("::").next().unwrap_or(path).to_string()).collect();
            rows.push(Row { input: first.clone(), tests });
        }
    }
    rows
}

/// The cells of a table's line; `|` within a cell is written `\|`.
fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.strip_prefix('|')?.strip_suffix('|')?.replace("\\|", "\u{0}");
    Some(inner.split('|').map(|cell| cell.trim().replace('\u{0}', "|")).collect())
}

/// Adds what a log of `cargo test` says: `test PATH ... ok`.
fn collect(log: &str, outcomes: &mut HashMap<String, Outcome>) {
    for line in log.lines() {
        let Some((path, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) else {
            continue;
        };
        let outcome = match outcome.trim() {
            "ok" => Outcome::Passed,
            said if said.starts_with("ignored") => Outcome::Ignored,
            _ => Outcome::Failed,
        };
        // `test path - should panic ... ok`
        let path = path.split(' ').next().unwrap_or(path);
        let name = path.rsplit("::").next().unwrap_or(path);
        outcomes.entry(name.to_string()).and_modify(|known| *known = outcome.max(*known)).or_insert(outcome);
    }
}

/// Whether all of a row's tests passed; false where some were only ignored.
fn verdict(row: &Row, outcomes: &HashMap<String, Outcome>) -> std::result::Result<bool, String> {
    if row.tests.is_empty() {
        return Err("it names no test".into());
    }
    let mut ran = true;
    for test in &row.tests {
        match outcomes.get(test) {
            None => return Err(format!("no log has the test `{test}`")),
            Some(Outcome::Failed) => return Err(format!("the test `{test}` failed")),
            Some(Outcome::Ignored) => ran = false,
            Some(Outcome::Passed) => {}
        }
    }
    Ok(ran)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LIST: &str = "\
| what | where |
|---|---|
| no fault | `elsewhere` |

| input | it did | it does | test |
|---|---|---|---|
| a\\|b | panicked | answers | `engine::runner::tests::one`, `tests/http.rs::two` |
| c | hung | ends | `three` |
| d | lied | says so | by hand |
";

    fn verdicts(log: &str) -> Vec<std::result::Result<bool, String>> {
        let mut outcomes = HashMap::new();
        collect(log, &mut outcomes);
        rows(LIST).iter().map(|row| verdict(row, &outcomes)).collect()
    }

    #[test]
    fn a_fault_is_mended_where_all_its_tests_passed() {
        assert_eq!(rows(LIST)[0], Row { input: "a|b".into(), tests: vec!["one".into(), "two".into()] });
        let log =
            "running 3 tests\ntest runner::tests::one ... ok\ntest two - should panic ... ok\ntest x::three ... ok\n";
        let found = verdicts(log);
        assert_eq!(found[..2], [Ok(true), Ok(true)]);
        assert!(found[2].as_ref().unwrap_err().contains("no test"), "{found:?}");
    }

    #[test]
    fn failed_missing_and_ignored_tests_are_told_apart() {
        let found = verdicts("test one ... ok\ntest a::two ... FAILED\ntest three ... ignored, needs a GPU\n");
        assert!(found[0].as_ref().unwrap_err().contains("`two` failed"), "{found:?}");
        assert_eq!(found[1], Ok(false));
        let found = verdicts("test three ... ignored\ntest three ... ok\ntest two ... ok\ntest two ... FAILED\n");
        assert!(found[0].as_ref().unwrap_err().contains("no log has"), "{found:?}");
        assert_eq!(found[1], Ok(true));
        let found = verdicts("test one ... ok\ntest two ... ok\ntest two ... FAILED\n");
        assert!(found[0].is_err(), "a failure is not outweighed by another run: {found:?}");
    }
}
