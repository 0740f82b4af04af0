//! Tables of the records, for people: the documents' figures come from nowhere else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::error::{EvalError, Result};
use crate::quality::config_place;
use crate::record::{Record, RecordLog, latest};
use crate::stats::wilson95;
use crate::tasks::task_names;

/// Records as one table, a line each.
#[must_use]
pub(crate) fn records_table(records: &[Record]) -> String {
    let mut text =
        String::from("| case | metric | value | unit | samples | floor | peers |\n|---|---|---|---|---|---|---|\n");
    for record in records {
        let peers: Vec<String> =
            record.peers.iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            record.case,
            record.metric,
            number(record.value),
            record.unit,
            record.samples,
            record.floor.map_or("-".into(), number),
            if peers.is_empty() { "-".into() } else { peers.join(", ") }
        );
    }
    text
}

/// All tables, from the records that are not superseded: quality as one table for each data source and metric with
/// the configurations as columns, every other bench as a list; machine by machine.
#[must_use]
pub fn markdown_report(records: &[Record]) -> String {
    let records = latest(records.to_vec());
    let mut text = String::from(
        "# Measured results\n\nGenerated from the records in `eval/results/` by `quire-bench report`; do not edit. Each record names the \
         command, the commit and the settings that it was measured with. A later record supersedes an earlier one of the \
         same bench, case, metric and machine.\n",
    );
    let mut groups: BTreeMap<(&str, &str), Vec<&Record>> = BTreeMap::new();
    for record in &records {
        groups.entry((&record.bench, &record.machine)).or_default().push(record);
    }
    for ((bench, machine), records) in groups {
        let _ = writeln!(text, "\n## {bench}, {machine}\n\n{}", origin(&records));
        text += &match bench {
            "quality" => quality(&records),
            "index" => index(&records),
            _ => list(&records),
        };
    }
    text
}

fn list(records: &[&Record]) -> String {
    format!("\n{}", records_table(&records.iter().map(|r| (*r).clone()).collect::<Vec<_>>()))
}

/// Made-up data as a list; a model's heads as one table for each kind of text and length, methods across.
fn index(records: &[&Record]) -> String {
    /// Shares by query head, and whether more was read than the budget, by method.
    type Heads<'a> = BTreeMap<&'a str, (Vec<f64>, bool)>;
    const BUDGET: f64 = 0.02;
    const METRIC: &str = "mass_recovered_budget_2pct";
    let (heads, rest): (Vec<&Record>, Vec<&Record>) = records.iter().partition(|r| r.case.split('/').count() == 4);
    let mut text = if rest.is_empty() { String::new() } else { list(&rest) };
    let mut tables: BTreeMap<String, (Vec<&str>, BTreeMap<&str, Heads<'_>>)> = BTreeMap::new();
    for record in heads.into_iter().filter(|record| record.metric == METRIC) {
        if let [source, length, place, method] = record.case.split('/').collect::<Vec<_>>()[..] {
            let (methods, places) = tables.entry(format!("{source}, {length}")).or_default();
            if !methods.contains(&method) {
                methods.push(method);
            }
            let listed = record.config["mass_recovered_by_query_head"].as_array();
            let shares = listed.into_iter().flatten().filter_map(serde_json::Value::as_f64).collect();
            // Rounding of the number of keys is no excess.
            let over = record.config["keys_touched_share"].as_f64().is_some_and(|read| read > 1.02 * BUDGET);
            places.entry(place).or_default().insert(method, (shares, over));
        }
    }
    for (name, (methods, places)) in tables {
        let _ = writeln!(
            text,
            "\n### Share of the attention on cold keys that is recovered within a budget of 2 % of them: {name}\n\n\
             \\*: more keys were read than the budget.\n\n\
             | layer, query head | {} |\n|---|{}",
            methods.join(" | "),
            "---|".repeat(methods.len())
        );
        for (place, by_method) in &places {
            let heads = by_method.values().map(|(shares, _)| shares.len()).max().unwrap_or_default();
            for head in 0..heads {
                let cell = |method: &str| {
                    let (shares, over) = by_method.get(method)?;
                    Some(format!("{:.3}{}", shares.get(head)?, if *over { "\\*" } else { "" }))
                };
                let cells: Vec<String> = methods.iter().map(|m| cell(m).unwrap_or("-".into())).collect();
                let _ = writeln!(text, "| {place} H{head} | {} |", cells.join(" | "));
            }
        }
    }
    text
}

/// Reads the records of a folder and writes the report; gives the number of records in it.
///
/// # Errors
/// Those of reading records; [`EvalError::Io`] when the report cannot be written.
pub fn write_report(results_dir: &Path, out: &Path) -> Result<usize> {
    let records = RecordLog::new(results_dir).latest()?;
    if let Some(folder) = out.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(EvalError::io("create", folder))?;
    }
    fs::write(out, markdown_report(&records)).map_err(EvalError::io("write", out))?;
    Ok(records.len())
}

/// The commands, dates and commits that a section comes from.
fn origin(records: &[&Record]) -> String {
    let runs: BTreeSet<(&str, &str, &str)> =
        records.iter().map(|r| (&r.date[..r.date.len().min(10)], r.command.as_str(), r.commit.as_str())).collect();
    let lines: Vec<String> =
        runs.into_iter().map(|(date, command, commit)| format!("`{command}` ({date}, commit {commit})")).collect();
    lines.join("; ")
}

/// Task, length and configuration, and what was recorded.
type Row<'a> = (Vec<&'a str>, &'a Record);

/// Quality as one table for each data source and metric, where it was recorded by task and length; comparisons with full
/// recompute as one table for each model and data.
pub(crate) fn quality(records: &[&Record]) -> String {
    let (compared, records): (Vec<&Record>, Vec<&Record>) = records.iter().partition(|record| record.unit != "%");
    let mut tables: BTreeMap<(&str, &str), Vec<Row<'_>>> = BTreeMap::new();
    for record in records {
        let parts: Vec<&str> = record.case.split('/').collect();
        if let [data, rest @ ..] = &parts[..] {
            tables.entry((data, &record.metric)).or_default().push((rest.to_vec(), record));
        }
    }
    let mut text = String::new();
    for ((data, metric), rows) in tables {
        let _ = writeln!(text, "\n### {} in %, {data}\n", metric.replace('_', " "));
        text += &pivot(&rows, metric == "exact_match");
    }
    text + &compared_with_full(&compared)
}

/// Metrics of a comparison with full recompute, in the order of columns.
const COMPARED: [&str; 9] = [
    "f1",
    "exact",
    "f1_loss",
    "f1_loss_lower95",
    "f1_loss_upper95",
    "kl_mean",
    "same_share",
    "kept_share",
    "charged_share",
];

/// Model and data (`qwen15/xquad10`) as a table, tasks (where there are several) and configurations down, metrics across.
fn compared_with_full(records: &[&Record]) -> String {
    type Lines<'a> = BTreeMap<(&'a str, usize, &'a str), (usize, BTreeMap<&'a str, f64>)>;
    let mut tables: BTreeMap<String, Lines<'_>> = BTreeMap::new();
    for record in records {
        let (data, task, config) = match record.case.split('/').collect::<Vec<_>>()[..] {
            [model, data, config] => (format!("{model}/{data}"), "all", config),
            [model, data, task, config] => (format!("{model}/{data}"), task, config),
            _ => continue,
        };
        let lines = tables.entry(data).or_default();
        let (n, metrics) = lines.entry((task, config_place(config), config)).or_default();
        *n = record.samples.max(*n);
        metrics.insert(&record.metric, record.value);
    }
    let mut text = String::new();
    for (data, lines) in tables {
        let _ = writeln!(
            text,
            "\n### Beside full recompute: {data}\n\n| task | configuration | n | {} |\n|---|---|---|{}",
            COMPARED.join(" | "),
            "---|".repeat(COMPARED.len())
        );
        for ((task, _, config), (n, metrics)) in lines {
            let cells = COMPARED.map(|metric| metrics.get(metric).map_or("-".into(), |value| number(*value)));
            let _ = writeln!(text, "| {task} | {config} | {n} | {} |", cells.join(" | "));
        }
    }
    text
}

/// By configuration.
type Cells<'a> = BTreeMap<&'a str, &'a Record>;

/// Tasks and lengths down, configurations across.
fn pivot(rows: &[Row<'_>], intervals: bool) -> String {
    let task_place = |name: &str| task_names().iter().position(|n| *n == name).unwrap_or(task_names().len());
    let mut columns: BTreeSet<(usize, &str)> = BTreeSet::new();
    // In the order of tasks, then of sizes.
    let mut lines: BTreeMap<(usize, &str, usize, &str), Cells<'_>> = BTreeMap::new();
    for (parts, record) in rows {
        if let [task, size, config] = parts[..] {
            columns.insert((config_place(config), config));
            let order = size.trim_end_matches('p').parse().unwrap_or(usize::MAX);
            lines.entry((task_place(task), task, order, size)).or_default().insert(config, record);
        }
    }
    let header: Vec<&str> = columns.iter().map(|(_, name)| *name).collect();
    let mut text =
        format!("| task | length | n | {} |\n|---|---|---|{}\n", header.join(" | "), "---|".repeat(header.len()));
    for ((_, task, _, size), cells) in lines {
        let n = cells.values().map(|record| record.samples).max().unwrap_or_default();
        let shown: Vec<String> =
            header.iter().map(|name| cells.get(name).map_or("-".into(), |record| cell(record, intervals))).collect();
        let _ = writeln!(text, "| {task} | {size} | {n} | {} |", shown.join(" | "));
    }
    text
}

fn cell(record: &Record, interval: bool) -> String {
    if !interval {
        return format!("{:.1}", record.value);
    }
    let hits = (record.value / 100.0 * record.samples as f64).round() as usize;
    let (low, high) = wilson95(hits, record.samples);
    format!("{:.1} ({:.0} to {:.0})", record.value, 100.0 * low, 100.0 * high)
}

/// Up to four digits behind the point, none that say nothing.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 1.0 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::{Output, RunInfo};

    fn info() -> RunInfo {
        let output = Output {
            results_dir: None,
            command: "quire x".into(),
            machine: Some("cpu2".into()),
            commit: Some("abc".into()),
        };
        RunInfo::start(&output)
    }

    #[test]
    fn quality_becomes_columns_and_only_the_latest_counts() {
        let info = info();
        let record = |config: &str, value| {
            info.record("quality", &format!("files/kv/1024/{config}"), "exact_match", "%", value, 16)
        };
        let text = markdown_report(&[record("window", 25.0), record("full", 50.0), record("full", 100.0)]);
        assert!(text.contains("| task | length | n | full | window |"), "{text}");
        assert!(text.contains("| kv | 1024 | 16 | 100.0 (81 to 100) | 25.0 (10 to 49) |"), "{text}");
        assert!(!text.contains("50.0"), "{text}");
        assert!(text.contains("`quire x`"));
    }

    #[test]
    fn comparisons_with_full_are_tables_of_their_own() {
        let info = info();
        let record = |case: &str, metric: &str, value| info.record("quality", case, metric, "ratio", value, 600);
        let text = markdown_report(&[
            record("qwen15/lists4k/reuse", "kept_share", 0.25),
            record("qwen15/lists4k/full", "f1", 0.5),
            record("qwen15/lists4k/reuse", "f1", 0.125),
            record("qwen15/lists4k/ruler_vt/reuse", "f1", 0.75),
            info.record("quality", "files/kv/1024/full", "exact_match", "%", 100.0, 16),
        ]);
        let table = "### Beside full recompute: qwen15/lists4k\n\n| task | configuration | n | f1 | exact | f1_loss | f1_loss_lower95 | \
                     f1_loss_upper95 | kl_mean | same_share | kept_share | charged_share |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n\
                     | all | full | 600 | 0.5 | - | - | - | - | - | - | - | - |\n\
                     | all | reuse | 600 | 0.125 | - | - | - | - | - | - | 0.25 | - |\n\
                     | ruler_vt | reuse | 600 | 0.75 |";
        assert!(text.contains(table), "{text}");
        assert!(text.contains("| kv | 1024 | 16 | 100.0"), "{text}");
    }

    #[test]
    fn lists_show_floor_and_peers_and_the_file_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = info().record("decode", "ref/8k/cpu/full", "time_per_token", "ms", 1.5, 5);
        record.floor = Some(0.75);
        record.peers.insert("transformers bf16".into(), 12.0);
        RecordLog::new(dir.path()).append(&[record]).unwrap();
        let out = dir.path().join("docs/results.md");
        assert_eq!(write_report(dir.path(), &out).unwrap(), 1);
        let text = fs::read_to_string(out).unwrap();
        assert!(
            text.contains("| ref/8k/cpu/full | time_per_token | 1.5 | ms | 5 | 0.75 | transformers bf16 12 |"),
            "{text}"
        );
    }

    #[test]
    fn a_models_heads_become_rows_and_made_up_data_stays_a_list() {
        let record = |method: &str, shares: &[f64]| {
            let info = info().with_config(serde_json::json!({"mass_recovered_by_query_head": shares}));
            info.record("index", &format!("model-text/8k/L1/{method}"), "mass_recovered_budget_2pct", "ratio", 0.5, 1)
        };
        let made_up = info().record("index", "ood/128k/graph", "recall_at_100", "ratio", 0.96, 1);
        let text = markdown_report(&[made_up, record("exact", &[0.5, 0.75]), record("graph", &[0.25, 0.125])]);
        assert!(text.contains("| ood/128k/graph | recall_at_100 | 0.96 |"), "{text}");
        assert!(text.contains("| layer, query head | exact | graph |"), "{text}");
        assert!(text.contains("| L1 H0 | 0.500 | 0.250 |\n| L1 H1 | 0.750 | 0.125 |"), "{text}");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([number(12345.6), number(100.0), number(2.5), number(0.01234)], ["12346", "100", "2.5", "0.0123"]);
    }
}
