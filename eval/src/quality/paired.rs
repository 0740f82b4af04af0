//! Configurations compared with full recompute question by question.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use serde::Serialize;

use super::Judged;
use super::config::{FULL, place};
use crate::record::{Record, RunInfo};
use crate::stats::{bootstrap_mean95, mean};

/// Samples of an interval.
const RESAMPLES: usize = 10_000;
/// `full` answers a question when its score is above this.
const ANSWERED: f64 = 0.5;

/// One configuration beside `full`, over the questions that both were asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Paired {
    /// The task, where it is about one of several.
    pub task: Option<String>,
    /// The configuration.
    pub config: String,
    /// Questions.
    pub n: usize,
    /// Its mean score in \[0, 1\] (`squad`, `musique`, `cloze`: F1 of words, all others: share of wanted values).
    pub f1: f64,
    /// That of `full`.
    pub f1_full: f64,
    /// Share of exactly right answers.
    pub exact: f64,
    /// Mean over questions of the score of `full` minus its own.
    pub f1_loss: f64,
    /// 95 % interval of this, by the paired bootstrap.
    pub f1_loss_interval: (f64, f64),
    /// Mean over questions of the mean over the tokens of `full`'s answer of KL(full || this), in nats.
    pub kl_mean: f64,
    /// Mean over questions of this divergence in the place of the first token.
    pub kl_first: f64,
    /// Share of questions with `full`'s very answer.
    pub same_share: f64,
    /// The same of the questions that `full` answers with a score above 0.5; `None`: there is none.
    pub kept_share: Option<f64>,
    /// How many these are.
    pub answered: usize,
    /// Mean share of the cached tokens' computation that was done all the same; `None` where nothing was cached.
    pub charged_share: Option<f64>,
}

/// The answers of `full` and of another configuration to the same question.
type Pair<'a> = (&'a Judged, &'a Judged);

/// Every configuration that was asked beside `full`, in the order of tables: over all tasks, and over each where there are several.
pub(super) fn paired(judged: &[Judged]) -> Vec<Paired> {
    let full: HashMap<&str, &Judged> =
        judged.iter().filter(|answer| answer.config == FULL).map(|answer| (answer.key.as_str(), answer)).collect();
    let mut groups: BTreeMap<(Option<&str>, usize, &str), Vec<Pair<'_>>> = BTreeMap::new();
    for answer in judged.iter().filter(|answer| answer.beside.is_some()) {
        let Some(full) = full.get(answer.key.as_str()) else { continue };
        for task in [None, Some(answer.task.as_str())] {
            groups.entry((task, place(&answer.config), &answer.config)).or_default().push((full, answer));
        }
    }
    let tasks = groups.keys().filter_map(|(task, _, _)| *task).collect::<std::collections::BTreeSet<_>>().len();
    let kept = groups.into_iter().filter(|((task, _, _), _)| task.is_none() || tasks > 1);
    kept.map(|((task, _, config), pairs)| one(task, config, &pairs)).collect()
}

fn one(task: Option<&str>, config: &str, pairs: &[Pair<'_>]) -> Paired {
    let mean_of = |value: &dyn Fn(&Judged) -> Option<f64>| {
        let values: Vec<f64> = pairs.iter().filter_map(|(_, answer)| value(answer)).collect();
        (!values.is_empty()).then(|| mean(&values))
    };
    let same = |answer: &Judged| answer.beside.map(|beside| f64::from(u8::from(beside.same)));
    let losses: Vec<f64> = pairs.iter().map(|(full, answer)| full.part - answer.part).collect();
    let full: Vec<f64> = pairs.iter().map(|(full, _)| full.part).collect();
    let kept: Vec<f64> = pairs.iter().filter(|(full, _)| full.part > ANSWERED).filter_map(|(_, a)| same(a)).collect();
    Paired {
        task: task.map(str::to_owned),
        config: config.to_owned(),
        n: pairs.len(),
        f1: mean_of(&|answer| Some(answer.part)).unwrap_or_default(),
        f1_full: mean(&full),
        exact: mean_of(&|answer| Some(f64::from(u8::from(answer.exact)))).unwrap_or_default(),
        f1_loss: mean(&losses),
        f1_loss_interval: bootstrap_mean95(&losses, RESAMPLES, 1),
        kl_mean: mean_of(&|answer| answer.beside.map(|beside| beside.kl_mean)).unwrap_or_default(),
        kl_first: mean_of(&|answer| answer.beside.map(|beside| beside.kl_first)).unwrap_or_default(),
        same_share: mean_of(&same).unwrap_or_default(),
        kept_share: (!kept.is_empty()).then(|| mean(&kept)),
        answered: kept.len(),
        charged_share: mean_of(&|answer| answer.cost.charged_share),
    }
}

/// One line a configuration.
pub(super) fn table(paired: &[Paired]) -> String {
    let mut text = String::from(
        "\n| task | configuration | n | F1 | loss (95 %) | KL | same % | kept % of answered | charged % |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    for one in paired {
        let percent = |share: f64| format!("{:.1}", 100.0 * share);
        let (low, high) = one.f1_loss_interval;
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} (full {}) | {} ({} to {}) | {:.4} | {} | {} of {} | {} |",
            one.task.as_deref().unwrap_or("all"),
            one.config,
            one.n,
            percent(one.f1),
            percent(one.f1_full),
            percent(one.f1_loss),
            percent(low),
            percent(high),
            one.kl_mean,
            percent(one.same_share),
            one.kept_share.map_or("-".into(), percent),
            one.answered,
            one.charged_share.map_or("-".into(), percent),
        );
    }
    text
}

/// Records under the name that the run was given: `CASE/CONFIG`, or `CASE/TASK/CONFIG`.
pub(super) fn records(case: &str, paired: &[Paired], info: &RunInfo) -> Vec<Record> {
    let mut records = Vec::new();
    for one in paired {
        let case = one.task.as_ref().map_or_else(|| case.to_owned(), |task| format!("{case}/{task}"));
        let mut add = |config: &str, metric: &str, unit: &str, value: Option<f64>, n: usize| {
            let case = format!("{case}/{config}");
            records.extend(value.map(|value| info.record("quality", &case, metric, unit, rounded(value), n)));
        };
        let config = &one.config;
        add(config, "f1", "ratio", Some(one.f1), one.n);
        add(config, "exact", "ratio", Some(one.exact), one.n);
        add(config, "f1_loss", "ratio", Some(one.f1_loss), one.n);
        add(config, "f1_loss_lower95", "ratio", Some(one.f1_loss_interval.0), one.n);
        add(config, "f1_loss_upper95", "ratio", Some(one.f1_loss_interval.1), one.n);
        add(config, "kl_mean", "nats", Some(one.kl_mean), one.n);
        add(config, "same_share", "ratio", Some(one.same_share), one.n);
        add(config, "kept_share", "ratio", one.kept_share, one.answered);
        add(config, "charged_share", "ratio", one.charged_share, one.n);
    }
    // `full` itself, once for each task.
    for (at, one) in paired.iter().enumerate() {
        if paired[..at].iter().all(|before| before.task != one.task) {
            let case = one.task.as_ref().map_or_else(|| case.to_owned(), |task| format!("{case}/{task}"));
            records.push(info.record("quality", &format!("{case}/{FULL}"), "f1", "ratio", rounded(one.f1_full), one.n));
        }
    }
    records
}

/// Five decimals: far below what a thousand questions can tell.
fn rounded(value: f64) -> f64 {
    (value * 1e5).round() / 1e5
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::beside::BesideFull;
    use super::super::tests::judged;
    use super::*;
    use crate::record::Output;

    fn beside(id: &str, config: &str, part: f64, same: bool, kl: f64, charged: Option<f64>) -> Judged {
        let mut answer = judged(id, config, "x", part);
        answer.beside = Some(BesideFull { kl_mean: kl, kl_first: 2.0 * kl, same });
        answer.cost.charged_share = charged;
        answer
    }

    fn answers() -> Vec<Judged> {
        vec![
            judged("a", "full", "x", 1.0),
            judged("b", "full", "x", 0.6),
            judged("c", "full", "x", 0.5),
            beside("a", "reuse", 1.0, true, 0.1, Some(0.0)),
            beside("b", "reuse", 0.0, false, 0.5, Some(0.0)),
            beside("c", "reuse", 1.0, false, 0.3, Some(0.0)),
            // Asked without `full`: no pair.
            beside("d", "reuse", 0.0, false, 9.0, Some(1.0)),
            beside("a", "cacheblend-15", 1.0, true, 0.1, Some(0.2)),
        ]
    }

    #[test]
    fn pairs_are_of_the_same_question_and_kept_is_of_what_full_answers() {
        let paired = paired(&answers());
        let names: Vec<&str> = paired.iter().map(|one| one.config.as_str()).collect();
        assert_eq!(names, ["reuse", "cacheblend-15"]);
        let reuse = &paired[0];
        assert_eq!((reuse.n, reuse.answered, reuse.kept_share), (3, 2, Some(0.5)));
        let near = |a: f64, b: f64| (a - b).abs() < 1e-12;
        assert!(near(reuse.f1_loss, (0.6 - 0.5) / 3.0) && near(reuse.f1_full, 0.7), "{reuse:?}");
        assert!(near(reuse.kl_mean, 0.3) && near(reuse.kl_first, 0.6) && near(reuse.same_share, 1.0 / 3.0));
        assert!(reuse.f1_loss_interval.0 <= reuse.f1_loss && reuse.f1_loss <= reuse.f1_loss_interval.1);
        assert_eq!((paired[1].charged_share, paired[1].n), (Some(0.2), 1));
    }

    #[test]
    fn several_tasks_are_shown_together_and_each_alone() {
        let mut answers = answers();
        for answer in answers.iter_mut().filter(|answer| answer.id == "b") {
            answer.task = "vt".into();
        }
        let paired = paired(&answers);
        let shown: Vec<(Option<&str>, &str, usize)> =
            paired.iter().map(|one| (one.task.as_deref(), one.config.as_str(), one.n)).collect();
        let expected = [
            (None, "reuse", 3),
            (None, "cacheblend-15", 1),
            (Some("kv"), "reuse", 2),
            (Some("kv"), "cacheblend-15", 1),
            (Some("vt"), "reuse", 1),
        ];
        assert_eq!(shown, expected);
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let records = records("m/d", &paired, &info);
        let value = |case: &str, metric: &str| {
            let found: Vec<f64> =
                records.iter().filter(|r| r.case == case && r.metric == metric).map(|r| r.value).collect();
            assert_eq!(found.len(), 1, "{case} {metric}");
            found[0]
        };
        assert_eq!(value("m/d/reuse", "f1_loss"), 0.03333);
        assert_eq!((value("m/d/full", "f1"), value("m/d/vt/full", "f1")), (0.7, 0.6));
        assert_eq!(value("m/d/vt/reuse", "kept_share"), 0.0);
        assert!(
            table(&paired)
                .contains("| vt | reuse | 1 | 0.0 (full 60.0) | 60.0 (60.0 to 60.0) | 0.5000 | 0.0 | 0.0 of 1 | 0.0 |")
        );
    }
}
