//! The chunk store: what it writes for what it is given, what evicting frees, how fast layers are read, how soon it is open.
//!
//! Every case works in a folder of its own, which is removed again. State is random bytes: no file system or disk makes
//! less of it. Chunks have the layout of a model of 0.6 billion parameters (28 layers, 8 heads of 128 numbers of bf16), 256
//! tokens unless a case says otherwise: 1 MiB a layer.

mod disk;
mod filler;
mod reads;

use std::path::{Path, PathBuf};
use std::time::Instant;

use chunk_cache::{ChunkStore, PutTicket, StoreOptions};
use serde::Serialize;
use serde_json::json;

pub use self::disk::drop_page_cache;
use self::disk::{disk_bytes, peak_while, written_bytes};
use self::filler::{Filler, TOKENS};
use super::round;
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;

/// What [`bench_store`] measures.
#[derive(Debug, Clone)]
pub struct StoreBenchOptions {
    /// Where folders are made and removed again.
    pub dir: PathBuf,
    /// Bytes of state that are ingested; the other cases follow: budgets are a half and a quarter of it.
    pub bytes: u64,
    /// Chunks of the store that is opened.
    pub rows: usize,
    /// Rounds of reading.
    pub repeats: usize,
    /// Seed of choices.
    pub seed: u64,
    /// Where records go.
    pub output: Output,
}

impl Default for StoreBenchOptions {
    fn default() -> Self {
        StoreBenchOptions {
            dir: std::env::temp_dir(),
            bytes: 4 << 30,
            rows: 100_000,
            repeats: 5,
            seed: 1,
            output: Output::default(),
        }
    }
}

/// The result of [`bench_store`].
#[derive(Debug, Clone, Serialize)]
pub struct StoreBenchReport {
    /// All figures as records.
    pub records: Vec<Record>,
}

impl StoreBenchReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        records_table(&self.records)
    }
}

/// Measures the chunk store.
///
/// # Errors
/// [`EvalError::BadOption`] for sizes that say nothing, [`EvalError::Store`] and [`EvalError::Io`] where the store or the
/// folder fails.
pub fn bench_store(options: &StoreBenchOptions, progress: &mut dyn FnMut(&Progress)) -> Result<StoreBenchReport> {
    options.check()?;
    let info = RunInfo::start(&options.output).with_config(json!({
        "bytes": options.bytes, "rows": options.rows, "chunk_tokens": TOKENS, "layers": filler::SHAPE.layers,
        "layer_bytes": filler::layer_bytes(TOKENS), "repeats": options.repeats, "seed": options.seed,
    }));
    let mut bench = Bench { options, info, records: Vec::new(), meter: Meter::new(5, 5.0, progress) };
    bench.ingest_evict_and_read()?;
    bench.churn()?;
    bench.budget()?;
    bench.open()?;
    bench.info.write(&bench.records)?;
    Ok(StoreBenchReport { records: bench.records })
}

impl StoreBenchOptions {
    fn check(&self) -> Result<()> {
        let least = |what, found: u64, least: u64| {
            let expected = format!("at least {least}");
            if found < least { Err(EvalError::BadOption { what, found: found.to_string(), expected }) } else { Ok(()) }
        };
        // Below, a single chunk is too much of a budget.
        least("the number of bytes to ingest", self.bytes, 128 << 20)?;
        least("the number of chunks to open", self.rows as u64, 1)?;
        least("the number of rounds", self.repeats as u64, 1)
    }
}

/// The name of a size as cases have it: `4gib`.
fn size_name(bytes: u64) -> String {
    match bytes >> 30 {
        0 => format!("{}mib", bytes >> 20),
        gib => format!("{gib}gib"),
    }
}

struct Bench<'a> {
    options: &'a StoreBenchOptions,
    info: RunInfo,
    records: Vec<Record>,
    meter: Meter<'a>,
}

impl Bench<'_> {
    fn record(&mut self, case: &str, metric: &str, unit: &str, value: f64, samples: usize) {
        self.records.push(self.info.record("store", case, metric, unit, round(value), samples));
    }

    fn scratch(&self, name: &str) -> Result<Scratch> {
        Scratch::new(&self.options.dir, name)
    }

    /// Bytes that this process wrote to the disk for `payload` bytes of state.
    fn amplification(&self, before: u64, payload: u64) -> Result<f64> {
        Ok((written_bytes()? - before) as f64 / payload as f64)
    }

    fn ingest_evict_and_read(&mut self) -> Result<()> {
        let scratch = self.scratch("ingest")?;
        let bytes = self.options.bytes;
        let store = open(scratch.path(), 2 * bytes)?;
        let mut filler = Filler::new(&store, self.options.seed)?;
        let (before, began) = (written_bytes()?, Instant::now());
        let payload = fill(&store, &mut filler, bytes)?;
        let case = format!("ingest-{}", size_name(bytes));
        let amplification = self.amplification(before, payload)?;
        self.record(&case, "write_amplification", "ratio", amplification, 1);
        self.record(&case, "rate", "MB/s", payload as f64 / 1e6 / began.elapsed().as_secs_f64(), 1);
        self.meter.advance(1, 1.0, format!("{case}: {amplification:.3} bytes written for one of state"));

        let half = store.stats().payload_bytes / 2;
        self.evict("evict-oldest-half", &scratch, &store, |store| store.evict_to(half))?;
        let refill = bytes - store.stats().payload_bytes;
        fill(&store, &mut filler, refill)?;
        let victims: Vec<_> =
            store.list().into_iter().map(|(key, _)| key).filter(|_| filler.random.below(2) == 0).collect();
        self.evict("evict-random-half", &scratch, &store, |store| store.remove_all(&victims))?;
        self.meter.advance(1, 1.0, "evicting measured".to_owned());
        self.read_layers(&scratch, &store)?;
        self.meter.advance(1, 1.0, "reading measured".to_owned());
        Ok(())
    }

    /// What of the bytes of evicted chunks the disk has back when the store says that it is done.
    fn evict(
        &mut self,
        case: &str,
        scratch: &Scratch,
        store: &ChunkStore,
        evict: impl FnOnce(&ChunkStore) -> std::result::Result<u64, chunk_cache::StoreError>,
    ) -> Result<()> {
        let (disk, held, began) = (disk_bytes(scratch.path()), store.stats().payload_bytes, Instant::now());
        let written = written_bytes()?;
        evict(store)?;
        store.compact()?;
        let freed = disk.saturating_sub(disk_bytes(scratch.path()));
        let evicted = held - store.stats().payload_bytes;
        self.record(case, "bytes_freed_share", "ratio", freed as f64 / evicted as f64, 1);
        self.record(case, "time", "s", began.elapsed().as_secs_f64(), 1);
        let rewritten = self.amplification(written, evicted)?;
        self.record(case, "bytes_written_share", "ratio", rewritten, 1);
        Ok(())
    }

    fn read_layers(&mut self, scratch: &Scratch, store: &ChunkStore) -> Result<()> {
        let warm = reads::warm(store, self.options.repeats)?;
        self.record("layer-read/warm", "share_of_memcpy", "ratio", warm.share(), self.options.repeats);
        self.record("layer-read/warm", "rate", "GB/s", warm.read, self.options.repeats);
        self.record("layer-read/warm", "memcpy", "GB/s", warm.memcpy, self.options.repeats);
        let cold = reads::cold(store, scratch.path(), self.options.repeats)?;
        self.record("layer-read/cold", "rate", "GB/s", cold.read, self.options.repeats);
        self.record("layer-read/cold", "file_rate", "GB/s", cold.file, self.options.repeats);
        Ok(())
    }

    /// Three times the budget passes through the store, while some chunks stay in use.
    fn churn(&mut self) -> Result<()> {
        let scratch = self.scratch("churn")?;
        let budget = self.options.bytes / 4;
        let store = open(scratch.path(), budget)?;
        let mut filler = Filler::new(&store, self.options.seed + 1)?;
        fill_mixed(&store, &mut filler, budget)?;
        let before = written_bytes()?;
        let payload = fill_mixed(&store, &mut filler, 3 * budget)?;
        let amplification = self.amplification(before, payload)?;
        self.record("churn-3x-budget", "write_amplification", "ratio", amplification, 1);
        self.meter.advance(1, 1.0, format!("churn: {amplification:.3} bytes written for one of state"));
        Ok(())
    }

    /// Twice the budget passes through the store; how much of the disk does it take at most?
    fn budget(&mut self) -> Result<()> {
        let scratch = self.scratch("budget")?;
        let budget = self.options.bytes / 2;
        let store = open(scratch.path(), budget)?;
        let mut filler = Filler::new(&store, self.options.seed + 2)?;
        let (filled, peak) = peak_while(scratch.path(), || fill_mixed(&store, &mut filler, 2 * budget));
        filled?;
        self.record("budget", "peak_over_budget", "ratio", peak as f64 / budget as f64, 1);
        let held = store.stats().payload_bytes;
        self.record("budget", "held_over_budget", "ratio", held as f64 / budget as f64, 1);
        Ok(())
    }

    fn open(&mut self) -> Result<()> {
        let scratch = self.scratch("open")?;
        let rows = self.options.rows;
        let store = open(scratch.path(), self.options.bytes)?;
        let mut filler = Filler::new(&store, self.options.seed + 3)?;
        let mut tickets = Vec::with_capacity(rows);
        for _ in 0..rows {
            tickets.push(filler.put_tiny(&store)?);
        }
        wait(tickets)?;
        for (key, _) in store.list().iter().step_by(2) {
            store.touch(key)?;
        }
        drop(store);
        let mut seconds = Vec::new();
        for _ in 0..self.options.repeats {
            drop_page_cache(scratch.path())?;
            let began = Instant::now();
            let store = open(scratch.path(), self.options.bytes)?;
            seconds.push(began.elapsed().as_secs_f64());
            let found = store.stats().chunks;
            if found != rows as u64 {
                return Err(EvalError::BadOption {
                    what: "the number of chunks found again",
                    found: found.to_string(),
                    expected: rows.to_string(),
                });
            }
        }
        let case = format!(
            "open/{}-chunks",
            if rows.is_multiple_of(1000) { format!("{}k", rows / 1000) } else { rows.to_string() }
        );
        let median = crate::stats::median(&seconds);
        self.record(&case, "seconds", "s", median, seconds.len());
        self.meter.advance(1, 1.0, format!("{case}: {median:.2} s"));
        Ok(())
    }
}

fn open(dir: &Path, byte_budget: u64) -> Result<ChunkStore> {
    Ok(ChunkStore::open(dir, StoreOptions { byte_budget })?)
}

fn wait(tickets: Vec<PutTicket>) -> Result<()> {
    for ticket in tickets {
        ticket.wait()?;
    }
    Ok(())
}

/// Stores at least so many bytes of state in chunks of one size. Returns how many.
fn fill(store: &ChunkStore, filler: &mut Filler, bytes: u64) -> Result<u64> {
    let (mut payload, mut tickets) = (0, Vec::new());
    while payload < bytes {
        let (ticket, size) = filler.put(store, TOKENS)?;
        payload += size;
        tickets.push(ticket);
    }
    wait(tickets)?;
    Ok(payload)
}

/// As [`fill`], with chunks of 16 to 512 tokens, as far as they are a sixteenth of the budget or less. A chunk in eight is used again and again: one of them is touched for every
/// chunk that is stored.
fn fill_mixed(store: &ChunkStore, filler: &mut Filler, bytes: u64) -> Result<u64> {
    let most = store.budget() / 16;
    let fits = |tokens: &u32| *tokens == 16 || filler::chunk_bytes(*tokens) <= most;
    let sizes: Vec<u32> = (4..10).map(|power| 1 << power).filter(fits).collect();
    let (mut payload, mut tickets) = (0, Vec::new());
    while payload < bytes {
        let tokens = sizes[filler.random.below(sizes.len())];
        let (ticket, size) = filler.put(store, tokens)?;
        payload += size;
        tickets.push(ticket);
        filler.touch_used(store)?;
    }
    wait(tickets)?;
    Ok(payload)
}

/// A folder that is removed again.
struct Scratch(PathBuf);

impl Scratch {
    fn new(dir: &Path, name: &str) -> Result<Scratch> {
        let path = dir.join(format!(".bench-store-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).map_err(EvalError::io("create", &path))?;
        Ok(Scratch(path))
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What stays is found by whoever looks for space; nothing depends on it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_small_run_records_every_case_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results");
        let options = StoreBenchOptions {
            dir: dir.path().into(),
            bytes: 128 << 20,
            rows: 300,
            repeats: 1,
            output: Output { results_dir: Some(results.clone()), ..Output::default() },
            ..StoreBenchOptions::default()
        };
        let report = bench_store(&options, &mut |_| {}).unwrap();
        let figure = |case: &str, metric: &str| {
            let found = report.records.iter().find(|record| (&*record.case, &*record.metric) == (case, metric));
            found.unwrap_or_else(|| panic!("no {metric} of {case}")).value
        };
        assert!(figure("ingest-128mib", "write_amplification") > 0.9);
        assert!(figure("evict-oldest-half", "bytes_freed_share") > 0.8);
        assert!(figure("evict-random-half", "bytes_freed_share") > 0.8);
        assert!(figure("churn-3x-budget", "write_amplification") > 0.9);
        assert!(figure("budget", "peak_over_budget") > 0.5);
        assert!(figure("layer-read/warm", "share_of_memcpy") > 0.0 && figure("layer-read/cold", "rate") > 0.0);
        assert!(figure("open/300-chunks", "seconds") > 0.0);
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, [results]);
    }

    #[test]
    fn senseless_sizes_are_refused() {
        let options = StoreBenchOptions {
            bytes: 1,
            output: Output { results_dir: None, ..Output::default() },
            ..StoreBenchOptions::default()
        };
        assert!(bench_store(&options, &mut |_| {}).is_err());
        assert_eq!([size_name(4 << 30), size_name(128 << 20)], ["4gib", "128mib"]);
    }
}
