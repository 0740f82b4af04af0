//! A store on a small file system that is filled up around it, before and while it writes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use chunk_cache::{ChunkStore, StoreError, StoreOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::content::{Seen, chunk, key, look, register};
use super::{DrillOptions, DrillReport, Tally};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::RunInfo;

const CASE: &str = "store/full-disk";
const DISK_MIB: u64 = 160;

/// Fills the disk below a store in every round, by so much that writes fail before, within or behind their payload; then
/// evicts on the full disk, or frees it. One and the same open store must go on. `stuck` counts evictions that failed on the
/// full disk and puts that failed on the free one, `lost_or_wrong` acknowledged chunks that are not there as they were.
///
/// # Errors
/// [`EvalError::BadOption`] where a file system in memory cannot be mounted; what else keeps the drill from being carried
/// out. What it finds wrong is in the report.
pub fn drill_full_disk(options: &DrillOptions, progress: &mut dyn FnMut(&Progress)) -> Result<DrillReport> {
    let info = RunInfo::start(&options.output).with_config(json!({"disk_mib": DISK_MIB, "seed": options.seed}));
    let disk = SmallDisk::mount(&options.dir)?;
    let folder = disk.path.join("chunks");
    let store = ChunkStore::open(&folder, StoreOptions { byte_budget: 1 << 30 })?;
    let mut drill = Drill {
        disk: &disk,
        store,
        held: BTreeMap::new(),
        next: 0,
        random: ChaCha8Rng::seed_from_u64(options.seed),
        tally: Tally::with(&["rounds", "stuck", "lost_or_wrong", "refused", "stored"]),
    };
    let mut meter = Meter::new(options.count, options.count as f64, progress);
    for round in 0..options.count {
        drill.round(round)?;
        meter.advance(1, 1.0, format!("{} chunks held", drill.held.len()));
    }
    drill.check("at the end");
    let Drill { store, held, tally, .. } = drill;
    drop(store);
    let mut tally = tally;
    let store = ChunkStore::open(&folder, StoreOptions { byte_budget: 1 << 30 })?;
    for (number, tokens) in held {
        if !matches!(look(&store, number, tokens), Ok(Seen::Whole)) {
            tally.fault("lost_or_wrong", format!("chunk {number} is gone after opening the store again"));
        }
    }
    drop(store);
    tally.report(&info, CASE, options.count, &["stuck", "lost_or_wrong"])
}

struct Drill<'a> {
    disk: &'a SmallDisk,
    store: ChunkStore,
    /// Acknowledged chunks and their tokens.
    held: BTreeMap<u32, u32>,
    next: u32,
    random: ChaCha8Rng,
    tally: Tally,
}

impl Drill<'_> {
    fn round(&mut self, round: usize) -> Result<()> {
        self.tally.add("rounds", 1);
        // Nothing free, a little, or about as much as the store asks for beforehand.
        let leave = [0, self.random.random_range(0..2 << 20), self.random.random_range(0..40 << 20)][round % 3];
        if round.is_multiple_of(2) {
            self.disk.fill(leave)?;
            self.put_some(12);
        } else {
            // The disk becomes full while the store writes.
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                let disk = self.disk;
                let filler = scope.spawn(|| disk.fill_slowly(&done));
                self.put_some(24);
                done.store(true, Ordering::Release);
                filler
                    .join()
                    .map_err(|_| EvalError::io("fill", &disk.path)(std::io::Error::other("a thread panicked")))?
            })?;
            self.disk.fill(leave)?;
        }
        self.check("on the full disk");
        if round % 4 < 2 {
            self.evict_some();
        }
        self.disk.free()?;
        self.put_when_free(round);
        if round % 5 == 4 {
            self.evict_most();
        }
        Ok(())
    }

    /// Hands chunks of up to 1 MiB over, and counts those that are refused for want of space.
    fn put_some(&mut self, count: usize) {
        let mut tickets = Vec::new();
        for _ in 0..count {
            let (number, tokens) = (self.next, self.random.random_range(1..1024));
            self.next += 1;
            let handed =
                register(&self.store).and_then(|model| Ok(self.store.put_behind(model, chunk(number, tokens))?));
            match handed {
                Ok(ticket) => tickets.push((number, tokens, ticket)),
                Err(_) => self.tally.add("refused", 1),
            }
        }
        for (number, tokens, ticket) in tickets {
            match ticket.wait() {
                Ok(_) => {
                    self.held.insert(number, tokens);
                    self.tally.add("stored", 1);
                }
                Err(StoreError::OutOfSpace { .. } | StoreError::Closed { .. }) => self.tally.add("refused", 1),
                Err(error) => {
                    self.tally.add("refused", 1);
                    self.tally.add("refused_otherwise", 1);
                    self.tally.problems.push(format!("a put on a full disk: {error}"));
                }
            }
        }
    }

    fn put_when_free(&mut self, round: usize) {
        let (number, tokens) = (self.next, 100);
        self.next += 1;
        let put = register(&self.store).and_then(|model| Ok(self.store.put(model, chunk(number, tokens))?));
        match put {
            Ok(_) => {
                self.held.insert(number, tokens);
            }
            Err(error) => self.tally.fault("stuck", format!("round {round}, the disk is free again: {error}")),
        }
    }

    fn evict_some(&mut self) {
        let gone: Vec<u32> = self.held.keys().copied().filter(|_| self.random.random_range(0..3) == 0).collect();
        let keys: Vec<_> = gone.iter().map(|number| key(*number)).collect();
        match self.store.remove_all(&keys) {
            Ok(_) => self.held.retain(|number, _| !gone.contains(number)),
            Err(error) => self.tally.fault("stuck", format!("evicting on a full disk: {error}")),
        }
        self.check("after evicting on a full disk");
    }

    /// Room for the next rounds.
    fn evict_most(&mut self) {
        let keys: Vec<_> = self.held.keys().skip(8).map(|number| key(*number)).collect();
        let removed = self.store.remove_all(&keys).and_then(|_| self.store.compact());
        match removed {
            Ok(()) => {
                let kept: Vec<u32> = self.held.keys().take(8).copied().collect();
                self.held.retain(|number, _| kept.contains(number));
            }
            Err(error) => self.tally.fault("stuck", format!("evicting on a free disk: {error}")),
        }
    }

    /// Everything acknowledged is there.
    fn check(&mut self, when: &str) {
        for (number, tokens) in &self.held {
            match look(&self.store, *number, *tokens) {
                Ok(Seen::Whole) => {}
                other => self.tally.fault("lost_or_wrong", format!("{when}: chunk {number}: {other:?}")),
            }
        }
    }
}

/// A file system in memory, mounted for the drill.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    fn mount(dir: &Path) -> Result<SmallDisk> {
        let path = dir.join(format!(".drill-disk-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(EvalError::io("create", &path))?;
        let size = format!("size={DISK_MIB}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&path).output();
        match mounted {
            Ok(output) if output.status.success() => Ok(SmallDisk { path }),
            refused => {
                let _ = fs::remove_dir(&path);
                let reason = refused.map_or_else(
                    |error| error.to_string(),
                    |output| String::from_utf8_lossy(&output.stderr).trim().to_owned(),
                );
                Err(EvalError::BadOption {
                    what: "the right to mount",
                    found: reason,
                    expected: "root, or a namespace that may mount: run the same command behind `unshare -Urm`".into(),
                })
            }
        }
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Takes so many bytes more, or as many as there are.
    fn take(&self, bytes: u64) -> Result<()> {
        let path = self.filler();
        let file =
            fs::OpenOptions::new().create(true).append(true).open(&path).map_err(EvalError::io("write", &path))?;
        let from = file.metadata().map_err(EvalError::io("read", &path))?.len();
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&file, flags, from, bytes.max(1)) {
            Ok(()) | Err(rustix::io::Errno::NOSPC) => Ok(()),
            Err(error) => Err(EvalError::io("fill", &path)(error.into())),
        }
    }

    fn left(&self) -> Result<u64> {
        let found = rustix::fs::statvfs(&self.path).map_err(|error| EvalError::io("read", &self.path)(error.into()))?;
        Ok(found.f_bavail * found.f_frsize)
    }

    /// Fills the disk up to about so many bytes.
    fn fill(&self, leave: u64) -> Result<()> {
        let left = self.left()?;
        if left > leave { self.take(left - leave) } else { Ok(()) }
    }

    /// Fills the disk step by step until it is full or the others are done.
    fn fill_slowly(&self, done: &AtomicBool) -> Result<()> {
        while !done.load(Ordering::Acquire) && self.left()? > 0 {
            self.take(self.left()?.min(4 << 20))?;
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn free(&self) -> Result<()> {
        let path = self.filler();
        if path.exists() {
            fs::remove_file(&path).map_err(EvalError::io("remove", &path))?;
        }
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).status();
        let _ = fs::remove_dir(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::Output;

    #[test]
    fn a_store_goes_on_when_its_disk_has_been_full() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output { results_dir: None, ..Output::default() };
        let options = DrillOptions { dir: dir.path().into(), count: 12, seed: 5, output };
        let report = match drill_full_disk(&options, &mut |_| {}) {
            Err(EvalError::BadOption { what: "the right to mount", .. }) => {
                eprintln!("not tried: mounting is not allowed here");
                return;
            }
            report => report.unwrap(),
        };
        assert_eq!((report.faults, &report.problems), (0, &Vec::new()));
        let count = |metric: &str| report.records.iter().find(|record| record.metric == metric).unwrap().value;
        assert!(count("refused") > 0.0 && count("stored") > 0.0, "{}", report.table());
    }
}
