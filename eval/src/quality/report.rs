//! From judged answers to cells, a table and records.

use std::collections::BTreeMap;
use std::fmt::Write;

use engine::{DecodeStats, PrefillStats};
use serde::Serialize;

use super::Judged;
use super::run::Costs;
use crate::quality::config_names;
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
    /// Contexts.
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
    pub(super) fn context(&mut self, stats: &PrefillStats) {
        self.contexts += 1;
        self.reused_tokens += stats.reused_tokens;
        self.recomputed_tokens += stats.recomputed_tokens;
        self.context_seconds += stats.seconds;
        self.failed_chunks += stats.failed_chunks;
    }

    pub(super) fn question(&mut self, stats: &DecodeStats) {
        self.cold_keys += stats.cold_keys;
        self.keys_scored += stats.keys_scored;
        self.keys_attended += stats.keys_attended;
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
    /// Comparison with recorded answers, where there are any.
    pub agreement: Option<Agreement>,
    /// All of it as records.
    pub records: Vec<Record>,
}

impl QualityReport {
    pub(super) fn new(
        data: &DataSource,
        judged: &[Judged],
        costs: Costs,
        wanted: &BTreeMap<(String, usize), String>,
        info: &RunInfo,
    ) -> QualityReport {
        let cells = cells(judged);
        let costs: Vec<(String, String, Cost)> =
            costs.into_iter().map(|((size, config), cost)| (size.to_string(), config.to_owned(), cost)).collect();
        let mut costs = costs;
        let size = |size: &str| size.trim_end_matches('p').parse().unwrap_or(usize::MAX);
        costs.sort_by_key(|(name, config, _)| (name.ends_with('p'), size(name), place(&config_names(), config)));
        let agreement = agreement(judged, wanted);
        let records = records(data, &cells, &costs, agreement.as_ref(), info);
        QualityReport { cells, costs, agreement, records }
    }

    /// The cells, the costs and the agreement as Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let of_tasks = |r: &&Record| matches!(r.metric.as_str(), "exact_match" | "part_score");
        let mut text = quality(&self.records.iter().filter(of_tasks).collect::<Vec<_>>());
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

/// The place of a name in a list, behind all when it is not in it.
fn place(names: &[&str], name: &str) -> usize {
    names.iter().position(|n| *n == name).unwrap_or(names.len())
}

fn cells(judged: &[Judged]) -> Vec<Cell> {
    let configs = config_names();
    let mut groups: BTreeMap<(usize, &str, Size, usize), Vec<&Judged>> = BTreeMap::new();
    for answer in judged {
        let task = place(task_names(), &answer.task);
        let key = (task, answer.task.as_str(), answer.order, place(&configs, answer.config));
        groups.entry(key).or_default().push(answer);
    }
    groups.into_values().map(|answers| cell(&answers)).collect()
}

fn cell(answers: &[&Judged]) -> Cell {
    let n = answers.len();
    let exact = answers.iter().filter(|answer| answer.exact).count();
    let (low, high) = wilson95(exact, n);
    Cell {
        task: answers[0].task.clone(),
        size: answers[0].size.clone(),
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
    for answer in judged.iter().filter(|answer| answer.config == "full") {
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
    let data = data.label();
    let mut records = Vec::new();
    for cell in cells {
        let case = format!("{data}/{}/{}/{}", cell.task, cell.size, cell.config);
        records.push(info.record("quality", &case, "exact_match", "%", round(cell.exact_percent), cell.n));
        records.push(info.record("quality", &case, "part_score", "%", round(cell.part_percent), cell.n));
    }
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

/// Two decimals: counts are small, and lines short.
fn round(percent: f64) -> f64 {
    (percent * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::Output;

    fn judged(id: &str, config: &'static str, output: &str, exact: bool) -> Judged {
        Judged {
            id: id.into(),
            question_index: 0,
            task: "kv".into(),
            size: "1024".into(),
            order: Size::Tokens(1024),
            config,
            output: output.into(),
            answers: vec!["1".into()],
            exact,
            part: if exact { 1.0 } else { 0.5 },
        }
    }

    #[test]
    fn cells_count_and_agreement_compares_only_full() {
        let answers =
            [judged("a", "full", "1", true), judged("b", "full", "2", false), judged("a", "window", "9", false)];
        let wanted = BTreeMap::from([(("a".to_owned(), 0), "1".to_owned()), (("b".to_owned(), 0), "1".to_owned())]);
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let report = QualityReport::new(&DataSource::Generated, &answers, Costs::new(), &wanted, &info);
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
