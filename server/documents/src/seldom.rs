//! Warnings that would come by the thousand, from one cause: told once a minute, with how many there were.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long nothing is told again.
const PAUSE: Duration = Duration::from_secs(60);

/// Of one place that warns: when it last did.
#[derive(Debug, Default)]
pub struct Seldom(Mutex<Option<(Instant, u64)>>);

impl Seldom {
    /// Of a place that has not warned yet.
    #[must_use]
    pub const fn new() -> Seldom {
        Seldom(Mutex::new(None))
    }

    /// Whether to warn now: how many times it was left out since the last warning; `None` where that was less than a minute ago.
    pub fn due(&self) -> Option<u64> {
        self.due_at(Instant::now())
    }

    fn due_at(&self, now: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match last.as_mut() {
            Some((told, left_out)) if now.duration_since(*told) < PAUSE => {
                *left_out += 1;
                None
            }
            _ => Some(last.replace((now, 0)).map_or(0, |(_, left_out)| left_out)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_warnings_one_a_minute_is_told_with_the_number_of_those_between() {
        let (seldom, start) = (Seldom::new(), Instant::now());
        let told = |seconds| seldom.due_at(start + Duration::from_secs(seconds));
        let all: Vec<_> = [0, 1, 30, 59, 60, 61, 200].map(told).into();
        assert_eq!(all, [Some(0), None, None, None, Some(3), None, Some(1)]);
    }
}
