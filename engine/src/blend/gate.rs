//! The gate: how much of a context is recomputed, decided for each request from what the question's pass over the cached chunks
//! saw. A pure function: the same prompt and settings decide the same.
//!
//! A share of the tokens that suits a question about one place is too small where an answer is put together from many. Then
//! the scores are spread: it takes more tokens to hold the same part of them.

use super::plan::BlendPlan;
use super::select::{Budget, Ranking};
use crate::config::{BlendConfig, GateReason};
use crate::request::GateReport;

/// What is recomputed.
pub(super) struct Choice {
    /// Ascending indices into the scores.
    pub(super) chosen: Vec<usize>,
    pub(super) report: GateReport,
}

/// Whether reading the question over the cached chunks, to choose, costs what reuse saves: then everything is recomputed.
pub(super) fn is_not_worth_asking(config: &BlendConfig, composed: usize, suffix: usize) -> bool {
    let saved = composed as f64 * (1.0 - f64::from(config.ratio));
    config.mode.asks() && config.gate.on && config.mass.is_none() && suffix as f64 >= saved
}

/// The report where [`is_not_worth_asking`] says so.
pub(super) fn unasked() -> GateReport {
    GateReport { reason: GateReason::FewTokens, held: 1.0, breadth: 0.0 }
}

/// Chooses by `scores`, one for each token of the plan's composed spans and not negative.
pub(super) fn choose(config: &BlendConfig, plan: &BlendPlan, scores: &[f32]) -> Choice {
    let chunks: Vec<usize> = plan.composed().map(|span| span.positions.len()).collect();
    let ranking = Ranking::new(scores);
    let breadth = breadth(&chunks, scores);
    let (reason, count) = decide(config, &chunks, &ranking, breadth);
    let chosen = ranking.best(count, config.gate.reach(), &chunks);
    let held = ranking.held(&chosen) as f32;
    Choice { chosen, report: GateReport { reason, held, breadth: breadth as f32 } }
}

/// How many tokens are recomputed, and why so many.
fn decide(config: &BlendConfig, chunks: &[usize], ranking: &Ranking<'_>, breadth: f64) -> (GateReason, usize) {
    let gate = &config.gate;
    let usual = ranking.count(Budget::of(config));
    if !gate.on || config.mass.is_some() {
        return (GateReason::Off, usual);
    }
    let is_small = (ranking.len() as f64) < gate.small_tokens as f64 * chunks.len() as f64;
    let reaches = |from: f32| from > 0.0 && !is_small && breadth >= f64::from(from);
    if reaches(gate.whole) {
        return (GateReason::Everywhere, ranking.len());
    }
    let most = ranking.count(Budget::Tokens(gate.most)).max(usual);
    let spread = ranking.count(Budget::Mass(gate.mass)).min(most);
    let small = if is_small { ranking.count(Budget::Tokens(gate.small_ratio)) } else { 0 };
    let many = if reaches(gate.wide) { most } else { 0 };
    let reasons = [
        (GateReason::Usual, usual),
        (GateReason::SmallChunks, small),
        (GateReason::ManyChunks, many),
        (GateReason::Spread, spread),
    ];
    // The first of equal ones.
    reasons.into_iter().rev().max_by_key(|(_, count)| *count).unwrap_or((GateReason::Usual, usual))
}

/// In how many chunks the score is, as if it were in all of them alike: the exponential of the entropy of their shares.
fn breadth(chunks: &[usize], scores: &[f32]) -> f64 {
    let mut rest = scores;
    let mut sums = Vec::with_capacity(chunks.len());
    for &tokens in chunks {
        let (chunk, behind) = rest.split_at(tokens.min(rest.len()));
        sums.push(chunk.iter().map(|score| f64::from(*score)).sum::<f64>());
        rest = behind;
    }
    let sum: f64 = sums.iter().sum();
    let shares = sums.iter().map(|part| part / sum).filter(|share| *share > 0.0);
    let entropy: f64 = shares.map(|share| -share * share.ln()).sum();
    if sum > 0.0 { entropy.exp() } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::plan::{Span, Treatment};
    use super::super::select::highest;
    use super::*;
    use crate::config::{BlendMode, GateConfig};

    /// Composed chunks of these lengths behind an exact one.
    fn plan(chunks: &[usize]) -> BlendPlan {
        let mut start = 0;
        let spans = std::iter::once(7).chain(chunks.iter().copied()).enumerate().map(|(i, tokens)| {
            let positions = start..start + tokens;
            start = positions.end;
            Span { positions, treatment: if i == 0 { Treatment::Exact } else { Treatment::Cached }, chunk: Some(i) }
        });
        let spans: Vec<Span> = spans.collect();
        BlendPlan { tokens: vec![5; start], spans }
    }

    fn config(gate: GateConfig) -> BlendConfig {
        BlendConfig { ratio: 0.1, gate: GateConfig { on: true, ..gate }, ..BlendConfig::default() }
    }

    fn never() -> GateConfig {
        GateConfig {
            on: true,
            small_tokens: 0,
            small_ratio: 0.0,
            mass: 0.0,
            most: 0.0,
            wide: 0.0,
            whole: 0.0,
            reach: 0,
        }
    }

    /// Scores of 4 chunks of 50 tokens: `peaks` tokens, spread over all, have all but a thousandth of each.
    fn peaked(peaks: usize) -> Vec<f32> {
        (0..200).map(|token| if token % (200 / peaks) == 0 { 1.0 } else { 0.001 }).collect()
    }

    #[test]
    fn a_question_that_looks_at_few_places_pays_the_usual_share() {
        let gate = GateConfig { mass: 0.8, most: 0.3, ..never() };
        let choice = choose(&config(gate), &plan(&[50; 4]), &peaked(10));
        assert_eq!((choice.report.reason, choice.chosen.len()), (GateReason::Usual, 20));
        assert!(choice.report.held > 0.98 && (choice.report.breadth - 4.0).abs() < 0.1, "{:?}", choice.report);
    }

    #[test]
    fn scores_that_are_spread_are_held_as_far_as_the_limit() {
        let spread = |mass, most| {
            let gate = GateConfig { mass, most, ..never() };
            let choice = choose(&config(gate), &plan(&[50; 4]), &peaked(50));
            (choice.report.reason, choice.chosen.len())
        };
        assert_eq!(spread(0.8, 0.3), (GateReason::Spread, 41), "40 peaks have a little less than that");
        assert_eq!(spread(0.8, 0.15), (GateReason::Spread, 30));
        assert_eq!(spread(0.3, 0.3), (GateReason::Usual, 20));
        assert_eq!(spread(0.8, 0.05), (GateReason::Usual, 20), "the limit takes nothing from the usual share");
    }

    #[test]
    fn small_chunks_pay_their_share_unless_more_is_needed() {
        let gate = |mass| GateConfig { small_tokens: 60, small_ratio: 0.15, mass, most: 0.3, ..never() };
        let reason = |gate, peaks| {
            let choice = choose(&config(gate), &plan(&[50; 4]), &peaked(peaks));
            (choice.report.reason, choice.chosen.len())
        };
        assert_eq!(reason(gate(0.0), 10), (GateReason::SmallChunks, 30));
        assert_eq!(reason(gate(0.8), 50), (GateReason::Spread, 41));
        assert_eq!(reason(GateConfig { small_tokens: 50, ..gate(0.0) }, 10), (GateReason::Usual, 20));
    }

    #[test]
    fn what_looks_at_many_chunks_pays_the_limit_and_what_looks_at_more_is_computed_whole() {
        let at = |gate: GateConfig| choose(&config(gate), &plan(&[50; 4]), &peaked(20));
        let all = at(GateConfig { whole: 3.9, ..never() });
        assert_eq!(all.report.reason, GateReason::Everywhere);
        assert_eq!(all.chosen, (0..200).collect::<Vec<_>>());
        assert!(all.report.held > 0.999);
        let many = at(GateConfig { wide: 3.9, whole: 4.1, most: 0.25, ..never() });
        assert_eq!((many.report.reason, many.chosen.len()), (GateReason::ManyChunks, 50));
        assert_eq!(at(GateConfig { wide: 4.1, most: 0.25, ..never() }).report.reason, GateReason::Usual);
        // Of small chunks there are many in any case.
        let small =
            at(GateConfig { wide: 3.0, whole: 3.0, most: 0.25, small_tokens: 51, small_ratio: 0.15, ..never() });
        assert_eq!((small.report.reason, small.chosen.len()), (GateReason::SmallChunks, 30));
        let mut one_chunk = vec![0.0; 200];
        one_chunk[60..90].fill(1.0);
        let narrow = choose(&config(GateConfig { wide: 1.5, whole: 1.5, ..never() }), &plan(&[50; 4]), &one_chunk);
        assert_eq!((narrow.report.reason, narrow.report.breadth), (GateReason::Usual, 1.0));
    }

    #[test]
    fn neighbours_are_taken_within_a_chunk_and_within_the_budget() {
        let mut scores = vec![0.0; 40];
        (scores[9], scores[30], scores[20]) = (5.0, 3.0, 2.0);
        let chosen = |reach, ratio| {
            let config = BlendConfig { ratio, ..config(GateConfig { reach, ..never() }) };
            choose(&config, &plan(&[10, 20, 10]), &scores).chosen
        };
        assert_eq!(chosen(2, 0.15), [7, 8, 9, 30, 31, 32], "chunks end at 10 and 30");
        assert_eq!(chosen(2, 0.125), [7, 8, 9, 30, 31]);
        assert_eq!(chosen(100, 0.25), (0..10).collect::<Vec<_>>());
    }

    #[test]
    fn where_choosing_costs_what_it_saves_nothing_is_chosen() {
        let config = config(never());
        assert!(!is_not_worth_asking(&config, 100, 89) && is_not_worth_asking(&config, 100, 90));
        let off = BlendConfig { gate: GateConfig { on: false, ..never() }, ..config.clone() };
        let other = BlendConfig { mode: BlendMode::CacheBlend, ..config };
        assert!(!is_not_worth_asking(&off, 100, 1000) && !is_not_worth_asking(&other, 100, 1000));
    }

    #[test]
    fn scores_that_are_nothing_decide_nothing() {
        let gate = GateConfig { mass: 0.9, most: 0.5, wide: 0.5, whole: 0.5, ..never() };
        let choice = choose(&config(gate), &plan(&[50; 2]), &[0.0; 100]);
        assert_eq!((choice.report.reason, choice.report.held, choice.report.breadth), (GateReason::Usual, 0.0, 0.0));
        assert_eq!(choice.chosen.len(), 10);
    }

    proptest! {
        #[test]
        fn off_it_is_the_settings_share_and_on_it_never_is_less_nor_beyond_its_limits(
            scores in prop::collection::vec(0u8..50, 24), cut in 1usize..23, mass in 0u8..=10, most in 0u8..=10, small in 0usize..30,
            reach in 0usize..4,
        ) {
            let scores: Vec<f32> = scores.into_iter().map(f32::from).collect();
            let plan = plan(&[cut, 24 - cut]);
            let tenths = |tenths: u8| f32::from(tenths) / 10.0;
            let gate = GateConfig { mass: tenths(mass), most: tenths(most), small_tokens: small, small_ratio: 0.2, reach, ..never() };
            let on = config(gate);
            let off = BlendConfig { gate: GateConfig { on: false, ..on.gate.clone() }, ..on.clone() };
            let usual = choose(&off, &plan, &scores);
            prop_assert_eq!(&usual.chosen, &highest(&scores, Budget::of(&off)));
            prop_assert_eq!(usual.report.reason, GateReason::Off);
            let choice = choose(&on, &plan, &scores);
            let most = (24.0 * tenths(most)).round().max((24.0_f32 * 0.2).round());
            prop_assert!(choice.chosen.len() >= usual.chosen.len() && choice.chosen.len() <= most as usize);
            prop_assert!(choice.chosen.is_sorted_by(|a, b| a < b));
            prop_assert!(choice.report.held >= usual.report.held - 1e-6 || reach > 0);
            prop_assert!((1.0 - 1e-4..=2.0 + 1e-4).contains(&choice.report.breadth) || scores.iter().all(|s| *s == 0.0));
            prop_assert_eq!(choose(&on, &plan, &scores).chosen, choice.chosen);
        }
    }
}
