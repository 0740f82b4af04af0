//! What a drill that kills processes found, whatever it killed: counted, recorded, told.

use eval::{Record, RunInfo};
use serde::Serialize;
use settings::QuireError;

use crate::error::Result;

/// Problems that are kept in words; all are counted.
const KEPT: usize = 10;

/// What every such drill counts.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Findings {
    /// Times a process was killed.
    pub(crate) kills: usize,
    /// Visible chunks that were compared with what they must hold, over all kills.
    pub(crate) chunks_compared: usize,
    /// Everything that was lost, wrong or partial.
    pub(crate) lost_or_wrong: usize,
    /// What exactly, for the first of them.
    pub(crate) problems: Vec<String>,
    /// What was recorded.
    pub(crate) records: Vec<Record>,
}

impl Findings {
    /// Counts something that is lost or wrong.
    pub(crate) fn problem(&mut self, text: String) {
        self.lost_or_wrong += 1;
        if self.problems.len() < KEPT {
            self.problems.push(format!("kill {}: {text}", self.kills));
        }
    }

    /// Records these figures of a case of the bench `crash`, with what every drill counts before and behind them.
    ///
    /// # Errors
    /// A folder of records that cannot be written.
    pub(crate) fn record(&mut self, run: &RunInfo, case: &str, figures: &[(&str, usize)]) -> Result<()> {
        let (first, last) = (
            [("kills", self.kills)],
            [("chunks_compared", self.chunks_compared), ("lost_or_wrong", self.lost_or_wrong)],
        );
        let record =
            |(metric, value): &(&str, usize)| run.record("crash", case, metric, "count", *value as f64, self.kills);
        self.records = first.iter().chain(figures).chain(&last).map(record).collect();
        Ok(run.write(&self.records)?)
    }

    /// An error if anything was lost or wrong.
    ///
    /// # Errors
    /// [`QuireError::CheckFailed`].
    pub(crate) fn check(&self) -> Result<()> {
        if self.lost_or_wrong == 0 {
            return Ok(());
        }
        let (wrong, kills, first) = (self.lost_or_wrong, self.kills, self.problems.join("; "));
        let problem = format!("{wrong} things were lost or wrong after {kills} kills; the first: {first}");
        Err(QuireError::CheckFailed(problem).into())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use eval::Output;

    #[test]
    fn all_problems_are_counted_the_first_are_told_and_records_have_the_count() {
        let mut found = Findings { kills: 7, chunks_compared: 3, ..Findings::default() };
        assert!(found.check().is_ok());
        (0..12).for_each(|number| found.problem(format!("chunk {number} is gone")));
        let error = found.check().unwrap_err().to_string();
        assert!(error.contains("12 things") && error.contains("kill 7: chunk 9 is gone"), "{error}");
        assert!(!error.contains("chunk 10"), "{error}");
        let run = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        found.record(&run, "library/kill9", &[("steps", 5)]).unwrap();
        let values: Vec<_> = found.records.iter().map(|r| (r.metric.as_str(), r.value, r.samples)).collect();
        let expected = [("kills", 7.0, 7), ("steps", 5.0, 7), ("chunks_compared", 3.0, 7), ("lost_or_wrong", 12.0, 7)];
        assert_eq!(values, expected);
    }
}
