//! How the cores are shared: the one place that starts threads which compute, and says how many.
//!
//! | work | threads | shares the cores by |
//! |---|---|---|
//! | forward passes, and the searches inside them | all cores, [`Pool`](super::cpu::pool::Pool) | going first: it has what it needs at any time |
//! | reading and checking cached chunks | as many again, of their own | waiting for disks mostly; a pass waits for them |
//! | building indexes | as many again, of their own, for one index at a time | a lower priority: they take what the others leave |
//!
//! Each has threads of its own, so that none waits behind another's work. Indexes are built one after the other, in the order
//! in which they are asked for: the memory of no more than one is under construction, and each is done as early as it can be.

use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{EngineError, Result};
use crate::unwind::guarded;

/// What the threads that build indexes do one after the other.
type Job = Box<dyn FnOnce() + Send>;

/// Threads beside the forward pass's, started when they are first needed.
pub(crate) struct Cores {
    threads: usize,
    readers: OnceLock<Option<ThreadPool>>,
    builders: OnceLock<Option<Sender<Job>>>,
}

impl Cores {
    /// `threads`: cores to share.
    pub(crate) fn new(threads: usize) -> Cores {
        Cores { threads, readers: OnceLock::new(), builders: OnceLock::new() }
    }

    /// Runs `work`, which may use rayon, on the threads that read chunks; on this one where the system gives none.
    pub(crate) fn read<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let start = || {
            let named = ThreadPoolBuilder::new().num_threads(self.threads).thread_name(|i| format!("quire-read-{i}"));
            named.build().inspect_err(|error| tracing::warn!(%error, "chunks are read by the engine's thread")).ok()
        };
        match self.readers.get_or_init(start) {
            Some(readers) => readers.install(work),
            None => work(),
        }
    }

    /// Has `job`, which may use rayon, run behind all jobs before it. A job that panics harms none behind it.
    ///
    /// # Errors
    /// [`EngineError::Internal`] where the system gives no threads.
    pub(crate) fn build(&self, job: impl FnOnce() + Send + 'static) -> Result<()> {
        let queue = self.builders.get_or_init(|| start_builders(self.threads));
        let none = || EngineError::Internal("the system gives no threads to build indexes with".into());
        queue.as_ref().ok_or_else(none)?.send(Box::new(job)).map_err(|_| none())
    }
}

/// The queue of a thread that does one job after the other on threads of its own; it ends with the queue.
fn start_builders(threads: usize) -> Option<Sender<Job>> {
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("quire-index-{i}"))
        .start_handler(|_| yield_to_others());
    let pool = pool.build().inspect_err(|error| tracing::warn!(%error, "no index can be built")).ok()?;
    let (queue, jobs) = channel::<Job>();
    let work = move || {
        for job in jobs {
            // A job says by itself what became of it. One that panics was not to.
            let done = guarded("building an index", || {
                pool.install(job);
                Ok(())
            });
            done.unwrap_or_else(|error| tracing::error!(%error, "an index was not built"));
        }
    };
    std::thread::Builder::new().name("quire-index".into()).spawn(work).ok()?;
    Some(queue)
}

/// Lets threads of the normal priority go first. Where that is refused, both share alike.
fn yield_to_others() {
    const NICE: i32 = 10;
    // SAFETY: no memory is passed; on Linux, process 0 is the calling thread alone.
    let _ = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn indexes_are_built_one_after_the_other_and_a_panic_harms_none_of_them() {
        let cores = Cores::new(3);
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (send, done) = channel();
        for number in 0..20usize {
            let (running, most, send) = (Arc::clone(&running), Arc::clone(&most), send.clone());
            let job = move || {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                let sum: usize = (0..1000usize).into_par_iter().map(|i| i % 7).sum();
                running.fetch_sub(1, Ordering::SeqCst);
                assert!(number % 5 != 3, "job {number} panics");
                send.send((number, sum)).unwrap();
            };
            cores.build(job).unwrap();
        }
        drop(send);
        let numbers: Vec<usize> = done.iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, (0..20).filter(|n| n % 5 != 3).collect::<Vec<_>>());
        assert_eq!(most.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn chunks_are_read_while_the_builders_are_busy() {
        let cores = Cores::new(2);
        let (over, wait) = channel::<()>();
        let (began, begun) = channel();
        let busy = move || {
            began.send(()).unwrap();
            let _ = wait.recv();
        };
        cores.build(busy).unwrap();
        begun.recv().unwrap();
        assert_eq!(cores.read(|| (0..100usize).into_par_iter().sum::<usize>()), 4950);
        drop(over);
    }
}
