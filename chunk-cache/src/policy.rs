//! What a chunk is worth keeping for: the orders in which chunks may make way.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

/// In which order chunks make way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EvictionPolicy {
    /// Those first that save the least compute for their bytes: what a use saves on average, times uses, over bytes
    /// (Cache-Craft, arXiv 2502.15734, its eviction by expected saving and frequency). Being stored counts as a use. What was
    /// used long ago loses to what was used lately: the score counts from the highest one that had made way by the last use
    /// (GreedyDual-Size with frequency: Cao and Irani 1997, Cherkasova 1998).
    #[default]
    CacheCraft,
    /// The least recently used first.
    Lru,
    /// The least often used first; of those the least recently used.
    Lfu,
}

impl EvictionPolicy {
    /// All of them.
    pub const ALL: [EvictionPolicy; 3] = [EvictionPolicy::CacheCraft, EvictionPolicy::Lru, EvictionPolicy::Lfu];

    /// `Less`: `a` makes way before `b`.
    pub fn order(self, a: &Worth, b: &Worth) -> Ordering {
        let by = match self {
            EvictionPolicy::CacheCraft => a.score().total_cmp(&b.score()),
            EvictionPolicy::Lru => Ordering::Equal,
            EvictionPolicy::Lfu => a.hits.cmp(&b.hits),
        };
        by.then(a.last_used.cmp(&b.last_used))
    }

    /// The age of uses from now on, behind `age`, when a chunk of this worth makes way.
    #[must_use]
    pub fn age_behind(self, age: f64, gone: &Worth) -> f64 {
        if self == EvictionPolicy::CacheCraft { age.max(gone.score()) } else { age }
    }
}

impl fmt::Display for EvictionPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EvictionPolicy::CacheCraft => "cachecraft",
            EvictionPolicy::Lru => "lru",
            EvictionPolicy::Lfu => "lfu",
        })
    }
}

/// A text that names no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("eviction policy: expected cachecraft, lru or lfu, found `{found}`")]
pub struct ParsePolicyError {
    /// The text that was given.
    pub found: String,
}

impl FromStr for EvictionPolicy {
    type Err = ParsePolicyError;

    fn from_str(text: &str) -> Result<Self, ParsePolicyError> {
        let named = EvictionPolicy::ALL.into_iter().find(|policy| policy.to_string() == text);
        named.ok_or_else(|| ParsePolicyError { found: text.to_owned() })
    }
}

/// What a policy knows of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Worth {
    /// Bytes that it takes.
    pub bytes: u64,
    /// Larger is more recent.
    pub last_used: u64,
    /// How often it was used after it was stored.
    pub hits: u64,
    /// Compute that these uses saved, in the unit of `cost`.
    pub saved: u64,
    /// What computing it takes, in any unit that all chunks share; 0: not known.
    pub cost: u64,
    /// The age when it was last used: see [`EvictionPolicy::age_behind`]. Not negative.
    pub age: f64,
}

impl Worth {
    /// Compute saved by a use, times uses, for a byte, behind the age.
    fn score(&self) -> f64 {
        // Before its first use a chunk promises to save all of what computing it takes.
        let by_use = if self.hits == 0 { self.cost as f64 } else { self.saved as f64 / self.hits as f64 };
        self.age + by_use * (self.hits + 1) as f64 / self.bytes.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use proptest::prelude::*;

    fn worth() -> impl Strategy<Value = Worth> {
        (1..9u64, 0..9u64, 0..4u64, 0..9u64, 0..9u64, 0..3u8).prop_map(|(bytes, last_used, hits, saved, cost, age)| {
            Worth { bytes, last_used, hits, saved, cost, age: f64::from(age) }
        })
    }

    #[test]
    fn what_saves_more_for_its_bytes_stays() {
        let goes_first = |policy: EvictionPolicy, a: Worth, b: Worth| policy.order(&a, &b) == Ordering::Less;
        let base = Worth { bytes: 100, last_used: 5, hits: 2, saved: 200, cost: 100, age: 0.0 };
        let craft = EvictionPolicy::CacheCraft;
        for better in [
            Worth { bytes: 50, ..base },
            Worth { saved: 201, ..base },
            Worth { hits: 3, saved: 300, ..base },
            Worth { last_used: 6, ..base },
        ] {
            assert!(goes_first(craft, base, Worth { last_used: better.last_used.max(4), ..better }), "{better:?}");
        }
        // As often used, but each use recomputed most of it.
        assert!(goes_first(craft, Worth { saved: 20, last_used: 9, ..base }, base));
        // Never used since it was stored: one use that saves all is expected.
        let fresh = Worth { hits: 0, saved: 0, last_used: 9, ..base };
        assert!(goes_first(craft, fresh, base) && !goes_first(EvictionPolicy::Lru, fresh, base));
        assert!(goes_first(EvictionPolicy::Lfu, fresh, base));
        assert!(goes_first(
            craft,
            Worth { hits: 1, saved: 60, ..base },
            Worth { hits: 0, saved: 0, cost: 130, ..base }
        ));
    }

    #[test]
    fn what_was_often_used_long_ago_makes_way_in_the_end() {
        let (craft, mut age) = (EvictionPolicy::CacheCraft, 0.0);
        let old = Worth { bytes: 1, last_used: 1, hits: 9, saved: 90, cost: 10, age };
        // Chunks that are stored and never used again make way one behind the other.
        let passing = |age, now| Worth { bytes: 1, last_used: now, cost: 10, age, ..Worth::default() };
        let mut turns = 2;
        while craft.order(&passing(age, turns), &old) == Ordering::Less {
            age = craft.age_behind(age, &passing(age, turns));
            turns += 1;
        }
        assert_eq!((turns, age), (11, 90.0), "ten uses, the first included, outlive nine chunks of one");
        assert_eq!(EvictionPolicy::Lru.age_behind(3.0, &old), 3.0);
        assert_eq!(craft.age_behind(300.0, &old), 300.0, "time does not go back");
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for policy in EvictionPolicy::ALL {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        let error = "LRU".parse::<EvictionPolicy>().unwrap_err();
        assert!(error.to_string().contains("`LRU`") && error.to_string().contains("cachecraft"));
    }

    proptest! {
        #[test]
        fn every_policy_is_an_order(a in worth(), b in worth(), c in worth()) {
            for policy in EvictionPolicy::ALL {
                prop_assert_eq!(policy.order(&a, &b), policy.order(&b, &a).reverse());
                let mut three = [a, b, c];
                three.sort_by(|x, y| policy.order(x, y));
                prop_assert!(policy.order(&three[0], &three[2]) != Ordering::Greater);
            }
        }
    }
}
