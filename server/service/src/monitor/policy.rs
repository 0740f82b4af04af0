//! What becomes of a collection whose blended questions drift from full recompute. Pure policy.

use std::collections::{HashMap, VecDeque};

use engine::{BlendConfig, BlendMode};

/// Samples that a verdict looks back on, and fewest for one. Divergences of single questions have a heavy tail: of two settings
/// of which one is plainly better, single questions often say the opposite.
const WINDOW: usize = 32;
const LEAST: usize = 8;
/// Collections that are watched. Of further ones nothing is kept.
const COLLECTIONS: usize = 1024;
/// By how much the budget rises.
const RAISE: f32 = 1.5;

/// What stands for the passages that come with questions, all of them; no collection can be called so.
pub(crate) const GIVEN: &str = "(given)";

/// How questions over a collection are blended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// As the settings say.
    Usual,
    /// With half more recomputed.
    Raised,
    /// Nothing cached is used.
    Computed,
}

impl Level {
    /// Its number in metrics.
    pub(crate) fn number(self) -> u8 {
        self as u8
    }

    /// Changes the blending of a request accordingly.
    pub(crate) fn apply(self, blend: &mut BlendConfig) {
        match self {
            Level::Usual => {}
            Level::Raised => {
                let raised = |share: f32| (share * RAISE).min(1.0);
                blend.ratio = raised(blend.ratio);
                blend.mass = blend.mass.map(|mass| 1.0 - (1.0 - mass) / RAISE);
                blend.gate.small_ratio = raised(blend.gate.small_ratio);
                blend.gate.most = raised(blend.gate.most);
            }
            Level::Computed => blend.mode = BlendMode::FullRecompute,
        }
    }

    /// What the reader of an answer should know.
    pub(crate) fn note(self, collection: &str) -> Option<String> {
        let told = match self {
            Level::Usual => return None,
            Level::Raised => "more of the cached passages was recomputed than usual",
            Level::Computed => "all passages were computed anew",
        };
        let over = match collection {
            GIVEN => "passages that come with questions".into(),
            name => format!("the collection `{name}`"),
        };
        Some(format!("{told}: answers from cached state over {over} have drifted from full recompute"))
    }

    /// What the log says when a collection comes here.
    pub(crate) fn consequence(self) -> &'static str {
        match self {
            Level::Usual => "answers from cached passages of this collection are as they should be",
            Level::Raised => {
                "answers from cached passages of this collection drift from full recompute: half more is recomputed"
            }
            Level::Computed => {
                "answers from cached passages of this collection still drift from full recompute: cached state is no longer used"
            }
        }
    }
}

/// What a sample has led to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Verdict {
    pub(super) level: Level,
    /// Whether it is another than before.
    pub(super) changed: bool,
    /// Mean divergence of the samples that were looked at, in nats, and how many these are.
    pub(super) mean: f64,
    pub(super) samples: usize,
}

#[derive(Debug)]
struct Watched {
    level: Level,
    recent: VecDeque<f64>,
}

/// The collections' levels. They only rise, until the server is started again: what a collection was brought to is not tried out on
/// its users once more.
#[derive(Debug)]
pub(super) struct Policy {
    /// Mean divergence from which on a level is left.
    limit: f64,
    collections: HashMap<String, Watched>,
}

impl Policy {
    /// `limit`: in nats.
    pub(super) fn new(limit: f64) -> Policy {
        Policy { limit, collections: HashMap::new() }
    }

    pub(super) fn level(&self, collection: &str) -> Level {
        self.collections.get(collection).map_or(Level::Usual, |watched| watched.level)
    }

    /// A question over the collection, blended as its level says, was so far from full recompute.
    pub(super) fn observe(&mut self, collection: &str, divergence: f64) -> Verdict {
        let known = self.collections.contains_key(collection);
        if !known && self.collections.len() >= COLLECTIONS {
            return Verdict { level: Level::Usual, changed: false, mean: divergence, samples: 1 };
        }
        let new = || Watched { level: Level::Usual, recent: VecDeque::new() };
        let watched = self.collections.entry(collection.to_owned()).or_insert_with(new);
        watched.recent.push_back(divergence);
        if watched.recent.len() > WINDOW {
            watched.recent.pop_front();
        }
        let samples = watched.recent.len();
        let mean = watched.recent.iter().sum::<f64>() / samples as f64;
        let changed = samples >= LEAST && mean > self.limit && watched.level < Level::Computed;
        if changed {
            watched.level = if watched.level == Level::Usual { Level::Raised } else { Level::Computed };
            // What was seen under the old level says nothing of the new one.
            watched.recent.clear();
        }
        Verdict { level: watched.level, changed, mean, samples }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_budget_rises_then_reuse_ends_each_after_enough_samples_and_only_there() {
        let mut policy = Policy::new(0.2);
        let changes: Vec<(usize, Level)> = (1..=30)
            .filter_map(|i| {
                let verdict = policy.observe("bad", 0.5);
                verdict.changed.then_some((i, verdict.level))
            })
            .collect();
        assert_eq!(changes, [(LEAST, Level::Raised), (2 * LEAST, Level::Computed)]);
        (0..30).for_each(|_| assert!(!policy.observe("good", 0.1).changed));
        assert_eq!((policy.level("bad"), policy.level("good")), (Level::Computed, Level::Usual));
        assert_eq!(policy.level("unknown"), Level::Usual);
    }

    #[test]
    fn one_bad_sample_among_good_ones_changes_nothing() {
        let mut policy = Policy::new(0.2);
        for i in 0..200 {
            let verdict = policy.observe("c", if i % 16 == 15 { 2.0 } else { 0.02 });
            assert!(!verdict.changed, "{i}: {verdict:?}");
        }
    }

    #[test]
    fn what_lies_long_ago_is_forgotten() {
        let mut policy = Policy::new(0.2);
        (0..200).for_each(|_| assert!(!policy.observe("c", 0.0).changed));
        let after = (1..).find(|_| policy.observe("c", 0.5).changed);
        assert!(after.is_some_and(|samples| samples <= WINDOW), "{after:?}");
    }

    #[test]
    fn a_level_changes_what_is_recomputed_and_says_so() {
        let usual = BlendConfig { mass: Some(0.7), ..BlendConfig::default() };
        let at = |level: Level| {
            let mut blend = usual.clone();
            level.apply(&mut blend);
            blend
        };
        assert_eq!((at(Level::Usual), Level::Usual.note("c")), (usual.clone(), None));
        let raised = at(Level::Raised);
        assert!((raised.ratio - 1.5 * usual.ratio).abs() < 1e-6 && raised.mode == usual.mode);
        assert!((raised.mass.unwrap_or_default() - 0.8).abs() < 1e-6 && raised.gate.most > usual.gate.most);
        assert!(raised.validate(8).is_ok());
        assert_eq!(at(Level::Computed).mode, BlendMode::FullRecompute);
        assert!(
            Level::Computed.note("papers").is_some_and(|note| note.contains("the collection `papers` have drifted"))
        );
        assert!(Level::Raised.note(GIVEN).is_some_and(|note| note.contains("that come with questions")));
    }

    proptest! {
        #[test]
        fn levels_only_rise_and_by_one(divergences in prop::collection::vec((0usize..3, 0.0f64..1.0), 0..200)) {
            let mut policy = Policy::new(0.3);
            let names = ["a", "b", "c"];
            for (collection, divergence) in divergences {
                let before = policy.level(names[collection]);
                let verdict = policy.observe(names[collection], divergence);
                let after = policy.level(names[collection]);
                prop_assert_eq!(after, verdict.level);
                prop_assert_eq!(after > before, verdict.changed);
                prop_assert!(after.number() <= before.number() + 1 && after >= before);
                prop_assert!(!verdict.changed || (verdict.mean > 0.3 && verdict.samples >= LEAST));
            }
        }
    }
}
