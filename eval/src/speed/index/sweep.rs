//! From a knob to a curve, and from a curve to the setting that is reported.

use super::side::{Pass, Queries, Side};
use crate::error::Result;

/// The recall that all are compared at.
pub(super) const TARGET: f64 = 0.95;
/// Where a curve ends: what lies above costs long searches and tells nothing.
const ENOUGH: f64 = 0.98;

/// A setting and what it gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) knob: usize,
    pub(super) pass: Pass,
}

/// Searches with rising settings until nearly everything is found, and so many keys are read where that is told.
pub(super) fn sweep(side: &mut dyn Side, queries: &Queries<'_>, keys: f64) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    for knob in side.grid() {
        let pass = side.search(knob, queries, false)?;
        points.push(Point { knob, pass });
        if pass.recall.mean >= ENOUGH && pass.touched.is_none_or(|touched| touched >= keys) {
            break;
        }
    }
    Ok(points)
}

/// The setting to report: the smallest that reaches [`TARGET`], with whether one does; the largest if none does. Ours
/// must reach it with three standard errors to spare, so that other queries of the same kind find it reached too; of a
/// peer the bare mean is enough.
pub(super) fn operating_point(points: &[Point], is_peer: bool) -> Option<(usize, bool)> {
    let margin = if is_peer { 0.0 } else { 3.0 };
    let reaches = |point: &&Point| point.pass.recall.mean - margin * point.pass.recall.error >= TARGET;
    let reaching = points.iter().find(reaches).map(|point| (point.knob, true));
    reaching.or_else(|| points.last().map(|point| (point.knob, false)))
}

/// The largest setting that reads at most this share of the keys.
pub(super) fn within_budget(points: &[Point], keys: usize, share: f64) -> Option<usize> {
    let fits = |point: &&Point| point.pass.touched.is_some_and(|touched| touched <= share * keys as f64);
    points.iter().rfind(fits).map(|point| point.knob)
}

/// Keys read at exactly the target, between the last point below it and the first above it; `None` when it is not
/// reached or not told.
pub(super) fn touched_at_target(points: &[Point]) -> Option<f64> {
    let at = points.iter().position(|point| point.pass.recall.mean >= TARGET)?;
    let above = points[at].pass;
    let Some(below) = at.checked_sub(1).map(|before| points[before].pass) else {
        return above.touched;
    };
    let share = (TARGET - below.recall.mean) / (above.recall.mean - below.recall.mean);
    Some(below.touched? + share * (above.touched? - below.touched?))
}

#[cfg(test)]
mod tests {
    use super::super::data::Recall;
    use super::*;

    fn points(recalls: &[f64]) -> Vec<Point> {
        let point = |(i, mean): (usize, &f64)| Point {
            knob: 10 * (i + 1),
            pass: Pass {
                recall: Recall { mean: *mean, error: 0.01 },
                touched: Some(100.0 * (i + 1) as f64),
                bytes: None,
                latency_us: 1.0,
                batched_us: None,
                batched_touched: None,
            },
        };
        recalls.iter().enumerate().map(point).collect()
    }

    #[test]
    fn ours_need_a_margin_and_peers_do_not() {
        let curve = points(&[0.9, 0.97, 0.985]);
        assert_eq!(operating_point(&curve, true), Some((20, true)));
        assert_eq!(operating_point(&curve, false), Some((30, true)));
        assert_eq!(operating_point(&points(&[0.5, 0.6]), true), Some((20, false)));
        assert_eq!(operating_point(&[], true), None);
    }

    #[test]
    fn budgets_and_the_target_are_read_off_the_curve() {
        let curve = points(&[0.9, 0.94, 0.96]);
        assert_eq!(within_budget(&curve, 1000, 0.25), Some(20));
        assert_eq!(within_budget(&curve, 1000, 0.05), None);
        assert!(touched_at_target(&curve).is_some_and(|keys| (keys - 250.0).abs() < 1e-9));
        assert_eq!(touched_at_target(&points(&[0.99])), Some(100.0));
        assert_eq!(touched_at_target(&points(&[0.9])), None);
    }
}
