//! A fork-join pool for short parallel regions.
//!
//! A decode step is some forty regions of a few microseconds each. Workers therefore spin for
//! a moment before they sleep, and the caller never waits for a worker that has not yet joined.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// How long an idle worker looks for work before it sleeps.
const SPIN: Duration = Duration::from_micros(60);
const OPEN: u64 = 1 << 31;
const ENTERED: u64 = OPEN - 1;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Upper half: number of the region. Lower half: open flag and how many workers joined.
    state: AtomicU64,
    job: Mutex<Option<SendJob>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    finished: AtomicU64,
    /// The first panic of a task on a worker, for the caller.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    asleep: AtomicUsize,
}

#[derive(Clone, Copy)]
struct SendJob(Job);
// SAFETY: the closure behind the pointer is `Sync`, and `Pool::run` outlives its use.
unsafe impl Send for SendJob {}

/// Threads that run the tasks of one region at a time. The caller's thread is one of them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Thread)>,
    caller: Mutex<()>,
    /// Regions from now on to the one whose tasks panic; 0: none does.
    #[cfg(test)]
    pub(crate) trip: AtomicUsize,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub(crate) fn new(threads: usize) -> Pool {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: Mutex::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            finished: AtomicU64::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
        });
        let workers = (1..threads.max(1))
            .filter_map(|i| {
                let shared = Arc::clone(&shared);
                let handle =
                    std::thread::Builder::new().name(format!("quire-cpu-{i}")).spawn(move || work(&shared)).ok()?;
                let thread = handle.thread().clone();
                Some((handle, thread))
            })
            .collect();
        Pool {
            shared,
            workers,
            caller: Mutex::new(()),
            #[cfg(test)]
            trip: AtomicUsize::new(0),
        }
    }

    /// Threads that take part, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(0..tasks)` on all threads and returns when all are done. A panic in a task is raised
    /// again here. Must not be called from inside a task.
    pub(crate) fn run(&self, tasks: usize, task: impl Fn(usize) + Sync) {
        #[cfg(test)]
        let tripped = self.trip.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) == Ok(1);
        #[cfg(test)]
        let task = |i| {
            assert!(!tripped, "tripped over task {i}");
            task(i);
        };
        if tasks <= 1 || self.workers.is_empty() {
            (0..tasks).for_each(task);
            return;
        }
        let _one_region = self.caller.lock().unwrap_or_else(PoisonError::into_inner);
        let s = &*self.shared;
        let job: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes; workers use the pointer between joining and finishing,
        // and this function does not return before all that joined have finished.
        let job: Job = unsafe { std::mem::transmute(job) };
        *s.job.lock().unwrap_or_else(PoisonError::into_inner) = Some(SendJob(job));
        s.tasks.store(tasks, Ordering::Relaxed);
        s.next.store(0, Ordering::Relaxed);
        s.finished.store(0, Ordering::Relaxed);
        let region = (s.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        s.state.store((region << 32) | OPEN, Ordering::SeqCst);
        if s.asleep.load(Ordering::SeqCst) > 0 {
            self.workers.iter().for_each(|(_, t)| t.unpark());
        }
        let mine = catch_unwind(AssertUnwindSafe(|| take_tasks(s, &task)));
        let joined = s.state.fetch_and(!OPEN, Ordering::AcqRel) & ENTERED;
        let mut spins = 0u32;
        while s.finished.load(Ordering::Acquire) != joined {
            std::hint::spin_loop();
            spins += 1;
            if spins > 20_000 {
                std::thread::yield_now();
            }
        }
        let theirs = s.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = mine.err().or(theirs) {
            resume_unwind(panic);
        }
    }

    /// Splits `0..n` into at most `parts` even ranges and runs them as tasks.
    pub(crate) fn ranges(&self, n: usize, parts: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
        let parts = parts.clamp(1, n.max(1));
        self.run(parts, |i| task(n * i / parts..n * (i + 1) / parts));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (handle, thread) in self.workers.drain(..) {
            thread.unpark();
            // A worker that panicked has already been reported by `run`.
            let _ = handle.join();
        }
    }
}

fn take_tasks(s: &Shared, task: &(dyn Fn(usize) + Sync)) {
    let tasks = s.tasks.load(Ordering::Relaxed);
    loop {
        let i = s.next.fetch_add(1, Ordering::Relaxed);
        if i >= tasks {
            return;
        }
        task(i);
    }
}

fn work(s: &Shared) {
    let mut last = 0;
    while let Some(region) = wait_for_region(s, last) {
        last = region;
        let Some(job) = *s.job.lock().unwrap_or_else(PoisonError::into_inner) else { continue };
        // SAFETY: this thread has joined the region, so `run` keeps the closure alive.
        let task = unsafe { &*job.0 };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| take_tasks(s, task))) {
            s.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        s.finished.fetch_add(1, Ordering::Release);
    }
}

/// Joins the next open region after `last` and returns its number; `None` when the pool stops.
fn wait_for_region(s: &Shared, last: u64) -> Option<u64> {
    let mut since = Instant::now();
    let mut rounds = 0u32;
    loop {
        if s.stop.load(Ordering::Relaxed) {
            return None;
        }
        let state = s.state.load(Ordering::SeqCst);
        if state & OPEN != 0 && state >> 32 != last {
            if s.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some(state >> 32);
            }
            continue;
        }
        rounds += 1;
        std::hint::spin_loop();
        if rounds.is_multiple_of(64) && since.elapsed() > SPIN {
            s.asleep.fetch_add(1, Ordering::SeqCst);
            let state = s.state.load(Ordering::SeqCst);
            let work = state & OPEN != 0 && state >> 32 != last;
            if !work && !s.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            s.asleep.fetch_sub(1, Ordering::SeqCst);
            since = Instant::now();
        }
    }
}

/// A mutable slice that several tasks write, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct Shards<'a, T> {
    start: *mut T,
    len: usize,
    life: std::marker::PhantomData<&'a mut [T]>,
}
// SAFETY: `part` is unsafe and asks for disjoint ranges.
unsafe impl<T: Send> Send for Shards<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shards<'_, T> {}

impl<'a, T> Shards<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Shards { start: slice.as_mut_ptr(), len: slice.len(), life: std::marker::PhantomData }
    }

    /// A pointer to element `at` and all that follow.
    ///
    /// # Safety
    /// What is written through it must not overlap what other tasks touch.
    pub(crate) unsafe fn part_ptr(&self, at: usize) -> *mut T {
        assert!(at <= self.len, "part outside of the slice");
        // SAFETY: inside the slice.
        unsafe { self.start.add(at) }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No two live parts may overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part outside of the slice");
        // SAFETY: inside the slice, and the caller keeps parts disjoint.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_ten_thousand_regions() {
        let pool = Pool::new(4);
        for region in 0..10_000usize {
            let n = region % 37;
            let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
            pool.run(n, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            if region % 1000 == 0 {
                std::thread::sleep(SPIN * 3);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(3);
        for round in 0..200 {
            let panics = |i: usize| match round % 3 {
                0 => assert!(i != 40, "forty"),
                1 => assert!(i != 0, "forty"),
                _ => panic!("forty"),
            };
            let caught = catch_unwind(AssertUnwindSafe(|| pool.run(64, panics)));
            assert_eq!(crate::unwind::message(&*caught.unwrap_err()), "forty", "whichever thread it was on");
        }
        let sum = AtomicUsize::new(0);
        pool.run(100, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4950);
    }

    #[test]
    fn ranges_cover_everything_once() {
        let pool = Pool::new(2);
        for n in [0, 1, 2, 7, 100] {
            let mut seen = vec![0u8; n];
            let shards = Shards::new(&mut seen);
            // SAFETY: ranges are disjoint.
            pool.ranges(n, 3, |r| unsafe { shards.part(r) }.iter_mut().for_each(|x| *x += 1));
            assert!(seen.iter().all(|&x| x == 1));
        }
    }
}
