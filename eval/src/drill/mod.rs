//! Drills that damage a chunk store or take its disk away, and see that nothing wrong is served and nothing is stuck.

mod bitflips;
mod content;
pub mod failing_disk;
mod full_disk;

use std::path::PathBuf;

use serde::Serialize;

use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;

pub use bitflips::drill_bitflips;
pub use full_disk::drill_full_disk;

/// What a drill does.
#[derive(Debug, Clone)]
pub struct DrillOptions {
    /// Where folders are made and removed again.
    pub dir: PathBuf,
    /// Flips, or rounds.
    pub count: usize,
    /// Seed of choices.
    pub seed: u64,
    /// Where records go.
    pub output: Output,
}

/// What a drill found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DrillReport {
    /// All figures as records.
    pub records: Vec<Record>,
    /// Everything that must not be.
    pub faults: usize,
    /// What exactly, for the first of them.
    pub problems: Vec<String>,
}

impl DrillReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        records_table(&self.records)
    }
}

/// Counts of one drill.
#[derive(Default)]
struct Tally {
    /// Metric and count, in the order in which they first came.
    counts: Vec<(&'static str, usize)>,
    problems: Vec<String>,
}

impl Tally {
    fn with(metrics: &[&'static str]) -> Tally {
        Tally { counts: metrics.iter().map(|metric| (*metric, 0)).collect(), ..Tally::default() }
    }

    fn add(&mut self, metric: &'static str, more: usize) {
        match self.counts.iter_mut().find(|(known, _)| *known == metric) {
            Some((_, count)) => *count += more,
            None => self.counts.push((metric, more)),
        }
    }

    fn fault(&mut self, metric: &'static str, what: String) {
        self.add(metric, 1);
        if self.problems.len() < 10 {
            self.problems.push(what);
        }
    }

    /// `faults` names the metrics of what must not be.
    fn report(self, info: &RunInfo, case: &str, samples: usize, faults: &[&str]) -> crate::Result<DrillReport> {
        let record =
            |(metric, count): &(&str, usize)| info.record("crash", case, metric, "count", *count as f64, samples);
        let records: Vec<Record> = self.counts.iter().map(record).collect();
        info.write(&records)?;
        let faults = self.counts.iter().filter(|(metric, _)| faults.contains(metric)).map(|(_, count)| count).sum();
        Ok(DrillReport { records, faults, problems: self.problems })
    }
}
