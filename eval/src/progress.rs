//! News of a long run, for whoever shows them.

use std::fmt;
use std::time::Instant;

/// One line of news.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Steps behind us.
    pub done: usize,
    /// All steps; 0 when not known.
    pub total: usize,
    /// Estimated seconds left.
    pub eta_seconds: Option<f64>,
    /// What has just happened, or happens next.
    pub message: String,
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.eta_seconds {
            Some(left) if left >= 90.0 => write!(f, "[{}/{}, {:.0} min left] ", self.done, self.total, left / 60.0)?,
            Some(left) => write!(f, "[{}/{}, {left:.0} s left] ", self.done, self.total)?,
            None if self.total > 0 => write!(f, "[{}/{}] ", self.done, self.total)?,
            None => {}
        }
        f.write_str(&self.message)
    }
}

/// Counts steps whose costs differ, and estimates what is left from the cost behind.
pub(crate) struct Meter<'a> {
    report: &'a mut dyn FnMut(&Progress),
    started: Instant,
    total: usize,
    done: usize,
    cost_total: f64,
    cost_done: f64,
}

impl<'a> Meter<'a> {
    /// A meter for `total` steps of `cost_total` in all, in any unit.
    pub(crate) fn new(total: usize, cost_total: f64, report: &'a mut dyn FnMut(&Progress)) -> Self {
        Meter { report, started: Instant::now(), total, done: 0, cost_total, cost_done: 0.0 }
    }

    /// Says something without a step.
    pub(crate) fn say(&mut self, message: impl Into<String>) {
        let progress =
            Progress { done: self.done, total: self.total, eta_seconds: self.eta(), message: message.into() };
        (self.report)(&progress);
    }

    /// `steps` steps of `cost` in all are done.
    pub(crate) fn advance(&mut self, steps: usize, cost: f64, message: impl Into<String>) {
        self.done += steps;
        self.cost_done += cost;
        self.say(message);
    }

    fn eta(&self) -> Option<f64> {
        let share = self.cost_done / self.cost_total;
        (share > 0.0).then(|| self.started.elapsed().as_secs_f64() * (1.0 - share).max(0.0) / share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_steps_and_estimates_only_after_the_first() {
        let mut lines = Vec::new();
        let mut sink = |p: &Progress| lines.push(p.clone());
        let mut meter = Meter::new(4, 10.0, &mut sink);
        meter.say("start");
        meter.advance(1, 5.0, "half");
        meter.advance(3, 5.0, "end");
        assert_eq!(lines[0].eta_seconds, None);
        assert_eq!(lines.iter().map(|p| p.done).collect::<Vec<_>>(), [0, 1, 4]);
        assert_eq!(lines[2].eta_seconds, Some(0.0));
        assert_eq!(lines[0].to_string(), "[0/4] start");
    }
}
