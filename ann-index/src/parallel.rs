//! Work on several threads without a pool that could hand out foreign tasks.
//!
//! Rayon itself is not used where locks are held: waiting for it, a thread could be handed a task that wants a
//! lock which it already holds.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `work` on consecutive ranges of at most `grain` that cover `0..len`, on as many threads as the
/// caller's rayon pool has, or on this one alone when it belongs to that pool. Results in order.
pub(crate) fn map_ranges<R: Send>(len: usize, grain: usize, work: impl Fn(Range<usize>) -> R + Sync) -> Vec<R> {
    map_ranges_on(0, len, grain, work)
}

/// As [`map_ranges`], on that many threads; 0 leaves it to the caller's pool.
pub(crate) fn map_ranges_on<R: Send>(
    threads: usize,
    len: usize,
    grain: usize,
    work: impl Fn(Range<usize>) -> R + Sync,
) -> Vec<R> {
    let pieces = len.div_ceil(grain);
    let range = |piece: usize| piece * grain..len.min((piece + 1) * grain);
    let threads = match (threads, rayon::current_thread_index()) {
        (0, Some(_)) => 1,
        (0, None) => rayon::current_num_threads().min(pieces),
        (wanted, _) => wanted.min(pieces),
    };
    if threads < 2 {
        return (0..pieces).map(|piece| work(range(piece))).collect();
    }
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, R)>> = Mutex::new(Vec::with_capacity(pieces));
    let serve = || {
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= pieces {
                return;
            }
            let result = work(range(piece));
            done.lock().unwrap_or_else(PoisonError::into_inner).push((piece, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(serve);
        }
        serve();
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|&(piece, _)| piece);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_cover_all() {
        for (len, grain) in [(0, 3), (1, 3), (3, 3), (1000, 7)] {
            let ranges = map_ranges(len, grain, |range| range);
            assert_eq!(ranges.into_iter().flatten().collect::<Vec<_>>(), (0..len).collect::<Vec<_>>());
        }
    }
}
