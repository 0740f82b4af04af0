//! From judged answers to cells, a table and records.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::Serialize;

use super::config::{FULL, place};
use super::paired::{self, Paired, paired};
use super::{AnswerCost, Judged};
use crate::record::{Record, RunInfo};
use crate::report::quality;
use crate::stats::wilson95;
use crate::tasks::{DataSource, Size, task_names};

/// One task at one size under one configuration.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Cell {
    /// The task.
    pub task: String,
    /// Target length in tokens, or the number of passages with a `p` behind it.
    pub size: String,
    /// The configuration.
    pub config: String,
    /// Questions.
    pub n: usize,
    /// Exactly right answers.
    pub exact: usize,
    /// Share of these in %.
    pub exact_percent: f64,
    /// Its 95 % interval (Wilson) in %.
    pub interval: (f64, f64),
    /// Mean share of wanted values (`squad`, `cloze`: F1 of words) in %.
    pub part_percent: f64,
}

/// What contexts of one size cost under one configuration.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Contexts that were made: one for each question where they depend on it.
    pub contexts: usize,
    /// Context tokens whose cached state was used.
    pub reused_tokens: usize,
    /// Context tokens that were computed.
    pub recomputed_tokens: usize,
    /// Seconds of making the contexts' KV.
    pub context_seconds: f64,
    /// Chunks whose cached state could not be read.
    pub failed_chunks: usize,
    /// Cold keys, over queries, layers and heads.
    pub cold_keys: u64,
    /// Of these, touched by the index.
    pub keys_scored: u64,
    /// Of these, attended.
    pub keys_attended: u64,
}

impl Cost {
    fn context(&mut self, cost: &AnswerCost) {
        self.contexts += 1;
        self.reused_tokens += cost.reused_tokens;
        self.recomputed_tokens += cost.recomputed_tokens;
        self.context_seconds += cost.context_seconds;
        self.failed_chunks += cost.failed_chunks;
    }

    fn question(&mut self, cost: &AnswerCost) {
        self.cold_keys += cost.cold_keys;
        self.keys_scored += cost.keys_scored;
        self.keys_attended += cost.keys_attended;
    }
}

/// How often `full` gave the text that the model's authors recorded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Answers that could be compared.
    pub n: usize,
    /// Equal ones.
    pub equal: usize,
    /// The others: context and question, our text, the recorded text.
    pub disagreements: Vec<(String, String, String)>,
}

/// The result of [`run_quality`](super::run_quality).
#[derive(Debug, Clone, Serialize)]
pub struct QualityReport {
    /// Cells by task, size and configuration, in the order of tables.
    pub cells: Vec<Cell>,
    /// By size and configuration.
    pub costs: Vec<(String, String, Cost)>,
    /// Configurations beside `full`, question by question; empty where it was not asked.
    pub paired: Vec<Paired>,
    /// Comparison with recorded answers, where there are any.
    pub agreement: Option<Agreement>,
    /// What was recorded.
    pub records: Vec<Record>,
    #[serde(skip)]
    table: String,
}

impl QualityReport {
    /// `case`: of records of the comparison, instead of those by task and length.
    pub(super) fn new(
        data: &DataSource,
        case: Option<&str>,
        judged: &[Judged],
        wanted: &BTreeMap<(String, usize), String>,
        info: &RunInfo,
    ) -> QualityReport {
        let (cells, costs, paired) = (cells(judged), costs(judged), paired(judged));
        let agreement = agreement(judged, wanted);
        let records = match case {
            Some(case) => paired::records(case, &paired, info),
            None => records(data, &cells, &costs, agreement.as_ref(), info),
        };
        let table = cells_table(data, &cells, info);
        QualityReport { cells, costs, paired, agreement, records, table }
    }

    /// The cells, the costs, the comparison with `full` and the agreement as Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = self.table.clone();
        text += "\n| length | configuration | contexts | tokens reused | tokens computed | cold keys touched % | attended % |\n";
        text += "|---|---|---|---|---|---|---|\n";
        for (size, config, cost) in &self.costs {
            let share = |keys: u64| percent_of(keys, cost.cold_keys).map_or("-".into(), |p| format!("{p:.2}"));
            let _ = writeln!(
                text,
                "| {size} | {config} | {} | {} | {} | {} | {} |",
                cost.contexts,
                cost.reused_tokens,
                cost.recomputed_tokens,
                share(cost.keys_scored),
                share(cost.keys_attended)
            );
        }
        if !self.paired.is_empty() {
            text += &paired::table(&self.paired);
        }
        if let Some(agreement) = &self.agreement {
            let _ = writeln!(text, "\nRecorded answers reproduced by `full`: {} of {}", agreement.equal, agreement.n);
            for (id, ours, theirs) in &agreement.disagreements {
                let _ = writeln!(text, "- {id}: `{ours}`, recorded `{theirs}`");
            }
        }
        text
    }
}

fn percent_of(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| 100.0 * part as f64 / whole as f64)
}

/// The place of a task in tables, behind all where it is not known.
fn task_place(name: &str) -> usize {
    task_names().iter().position(|task| *task == name).unwrap_or(task_names().len())
}

fn cells(judged: &[Judged]) -> Vec<Cell> {
    let mut groups: BTreeMap<(usize, &str, Size, usize, &str), Vec<&Judged>> = BTreeMap::new();
    for answer in judged {
        let (task, config) = (answer.task.as_str(), answer.config.as_str());
        groups.entry((task_place(task), task, answer.size, place(config), config)).or_default().push(answer);
    }
    groups.into_values().map(|answers| cell(&answers)).collect()
}

/// By size and configuration. Contexts that questions share count once.
fn costs(judged: &[Judged]) -> Vec<(String, String, Cost)> {
    let mut costs: BTreeMap<(Size, usize, &str), (Cost, BTreeSet<&str>)> = BTreeMap::new();
    for answer in judged {
        let key = (answer.size, place(&answer.config), answer.config.as_str());
        let (cost, contexts) = costs.entry(key).or_default();
        if contexts.insert(&answer.id) || !answer.cost.shared {
            cost.context(&answer.cost);
        }
        cost.question(&answer.cost);
    }
    costs.into_iter().map(|((size, _, config), (cost, _))| (size.to_string(), config.to_owned(), cost)).collect()
}

/// The cells as tables.
fn cells_table(data: &DataSource, cells: &[Cell], info: &RunInfo) -> String {
    quality(&cell_records(data, cells, info).iter().collect::<Vec<_>>())
}

fn cell(answers: &[&Judged]) -> Cell {
    let n = answers.len();
    let exact = answers.iter().filter(|answer| answer.exact).count();
    let (low, high) = wilson95(exact, n);
    Cell {
        task: answers[0].task.clone(),
        size: answers[0].size.to_string(),
        config: answers[0].config.to_owned(),
        n,
        exact,
        exact_percent: 100.0 * exact as f64 / n as f64,
        interval: (100.0 * low, 100.0 * high),
        part_percent: 100.0 * answers.iter().map(|answer| answer.part).sum::<f64>() / n as f64,
    }
}

fn agreement(judged: &[Judged], wanted: &BTreeMap<(String, usize), String>) -> Option<Agreement> {
    let mut agreement = Agreement { n: 0, equal: 0, disagreements: Vec::new() };
    for answer in judged.iter().filter(|answer| answer.config == FULL) {
        let Some(text) = wanted.get(&(answer.id.clone(), answer.question_index)) else {
            continue;
        };
        agreement.n += 1;
        if answer.output == text.trim() {
            agreement.equal += 1;
        } else {
            let id = format!("{} question {} ({})", answer.id, answer.question_index, answer.task);
            agreement.disagreements.push((id, answer.output.clone(), text.clone()));
        }
    }
    (agreement.n > 0).then_some(agreement)
}

fn records(
    data: &DataSource,
    cells: &[Cell],
    costs: &[(String, String, Cost)],
    agreement: Option<&Agreement>,
    info: &RunInfo,
) -> Vec<Record> {
    let mut records = cell_records(data, cells, info);
    let data = data.label();
    for (size, config, cost) in costs {
        let case = format!("{data}/all/{size}/{config}");
        let mut add = |metric: &str, value: Option<f64>| {
            records.extend(value.map(|v| info.record("quality", &case, metric, "%", round(v), cost.contexts)));
        };
        let computed = cost.recomputed_tokens as u64;
        add("tokens_computed", percent_of(computed, computed + cost.reused_tokens as u64));
        add("cold_keys_touched", percent_of(cost.keys_scored, cost.cold_keys));
        add("cold_keys_attended", percent_of(cost.keys_attended, cost.cold_keys));
    }
    if let Some(found) = agreement {
        let share = 100.0 * found.equal as f64 / found.n as f64;
        let case = format!("{data}/all/all/full");
        records.push(info.record("quality", &case, "agreement_with_recorded_answers", "%", round(share), found.n));
    }
    records
}

fn cell_records(data: &DataSource, cells: &[Cell], info: &RunInfo) -> Vec<Record> {
    let data = data.label();
    let of_cell = |cell: &Cell| {
        let case = format!("{data}/{}/{}/{}", cell.task, cell.size, cell.config);
        [("exact_match", cell.exact_percent), ("part_score", cell.part_percent)]
            .map(|(metric, percent)| info.record("quality", &case, metric, "%", round(percent), cell.n))
    };
    cells.iter().flat_map(of_cell).collect()
}

/// Two decimals: counts are small, and lines short.
fn round(percent: f64) -> f64 {
    (percent * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::quality::tests::judged;
    use crate::record::Output;

    #[test]
    fn cells_count_and_agreement_compares_only_full() {
        let answers = [judged("a", "full", "1", 1.0), judged("b", "full", "2", 0.5), judged("a", "window", "9", 0.5)];
        let wanted = BTreeMap::from([(("a".to_owned(), 0), "1".to_owned()), (("b".to_owned(), 0), "1".to_owned())]);
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let report = QualityReport::new(&DataSource::Generated, None, &answers, &wanted, &info);
        let full = &report.cells[0];
        assert_eq!((full.config.as_str(), full.n, full.exact), ("full", 2, 1));
        assert_eq!((full.exact_percent, full.part_percent), (50.0, 75.0));
        assert!(full.interval.0 < 50.0 && full.interval.1 > 50.0);
        let agreement = report.agreement.as_ref().unwrap();
        assert_eq!((agreement.n, agreement.equal), (2, 1));
        assert_eq!(agreement.disagreements[0].0, "b question 0 (kv)");
        let record = report.records.iter().find(|r| r.case == "generated/kv/1024/full").unwrap();
        assert_eq!((record.metric.as_str(), record.value, record.samples), ("exact_match", 50.0, 2));
        let table = report.table();
        assert!(table.contains("| task | length | n | full | window |"), "{table}");
        assert!(table.contains("| kv | 1024 | 2 | 50.0 (9 to 91) | 0.0 (0 to 79) |"), "{table}");
        assert!(table.contains("reproduced by `full`: 1 of 2"), "{table}");
    }
}
