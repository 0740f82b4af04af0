//! One bit is flipped somewhere in the files of a closed store, again and again.

use std::fs;
use std::path::{Path, PathBuf};

use chunk_cache::{ChunkStore, PutOutcome, StoreError, StoreOptions};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::content::{Seen, chunk, look, register};
use super::{DrillOptions, DrillReport, Tally};
use crate::error::{EvalError, Result};
use crate::progress::{Meter, Progress};
use crate::record::RunInfo;

const CHUNKS: u32 = 36;
const CASE: &str = "store/bitflips";

fn tokens(number: u32) -> u32 {
    1 + number * 29 % 120
}

/// Flips one bit a time, in all files in turn, each time in a fresh copy of a store, which is then opened, read, verified,
/// repaired and written. `served_wrong` counts chunks that were read with other bytes than were stored; `stuck` flips after
/// which a repair or a put failed, or the error of opening was of no help.
///
/// # Errors
/// What keeps the drill from being carried out. What it finds wrong is in the report.
pub fn drill_bitflips(options: &DrillOptions, progress: &mut dyn FnMut(&Progress)) -> Result<DrillReport> {
    let info = RunInfo::start(&options.output).with_config(json!({"chunks": CHUNKS, "seed": options.seed}));
    let scratch = options.dir.join(format!(".drill-bitflips-{}", std::process::id()));
    let (template, copy) = (scratch.join("template"), scratch.join("copy"));
    fs::create_dir_all(&scratch).map_err(EvalError::io("create", &scratch))?;
    let outcome = fill(&template).and_then(|files| {
        let mut meter = Meter::new(options.count, options.count as f64, progress);
        let mut random = ChaCha8Rng::seed_from_u64(options.seed);
        let mut tally = Tally::with(&["flips", "served_wrong", "stuck", "refused", "salvaged", "chunks_lost"]);
        for turn in 0..options.count {
            let name = &files[turn % files.len()];
            copy_folder(&template, &copy)?;
            let what = flip(&copy.join(name), &mut random)?;
            tally.add("flips", 1);
            examine(&copy, &what, &mut tally)?;
            meter.advance(1, 1.0, what);
        }
        tally.report(&info, CASE, options.count, &["served_wrong", "stuck"])
    });
    fs::remove_dir_all(&scratch).map_err(EvalError::io("remove", &scratch))?;
    outcome
}

fn open(dir: &Path) -> std::result::Result<ChunkStore, StoreError> {
    ChunkStore::open(dir, StoreOptions { byte_budget: 1 << 30 })
}

/// A closed store with several payload files, rows in tables and rows in the log. Returns the names of its files.
fn fill(dir: &Path) -> Result<Vec<PathBuf>> {
    for part in 0..3 {
        let store = open(dir)?;
        let model = register(&store)?;
        let numbers = part * CHUNKS / 3..(part + 1) * CHUNKS / 3;
        let tickets: std::result::Result<Vec<_>, _> =
            numbers.map(|number| store.put_behind(model, chunk(number, tokens(number)))).collect();
        for ticket in tickets? {
            ticket.wait()?;
        }
        // Into tables, but for what comes last.
        if part < 2 {
            store.reclaim()?;
        }
    }
    let listed = fs::read_dir(dir).map_err(EvalError::io("read", dir))?;
    let files =
        listed.flatten().filter(|entry| entry.path().is_file() && entry.metadata().is_ok_and(|data| data.len() > 0));
    // The reserve holds nothing, and the log for people and the lock are not read.
    let told =
        |name: &PathBuf| !["reserve", "LOCK", "LOG"].iter().any(|start| name.to_string_lossy().starts_with(start));
    let mut names: Vec<PathBuf> = files.map(|entry| entry.file_name().into()).filter(told).collect();
    names.sort();
    Ok(names)
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(to);
    fs::create_dir_all(to).map_err(EvalError::io("create", to))?;
    for entry in fs::read_dir(from).map_err(EvalError::io("read", from))?.flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_file() && entry.file_name() != "reserve" {
            fs::copy(entry.path(), &target).map_err(EvalError::io("write", &target))?;
        }
    }
    Ok(())
}

/// Says where the bit was.
fn flip(path: &Path, random: &mut ChaCha8Rng) -> Result<String> {
    let mut bytes = fs::read(path).map_err(EvalError::io("read", path))?;
    let (at, bit) = (random.random_range(0..bytes.len()), random.random_range(0..8u32));
    bytes[at] ^= 1 << bit;
    fs::write(path, &bytes).map_err(EvalError::io("write", path))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    Ok(format!("bit {bit} of byte {at} of {} of {name}", bytes.len()))
}

fn examine(dir: &Path, what: &str, tally: &mut Tally) -> Result<()> {
    let store = match open(dir) {
        Ok(store) => store,
        Err(error) => {
            tally.add("refused", 1);
            if !matches!(error, StoreError::Damaged { .. }) {
                tally.fault("stuck", format!("{what}: opening says only: {error}"));
                return Ok(());
            }
            // The error names the way out, which must be one.
            ChunkStore::clear(dir)?;
            let store = open(dir)?;
            if let Err(problem) = goes_on(&store) {
                tally.fault("stuck", format!("{what}: emptied, and then: {problem}"));
            }
            return Ok(());
        }
    };
    tally.add("salvaged", usize::from(store.open_report().salvaged.is_some()));
    for number in 0..CHUNKS {
        match look(&store, number, tokens(number)) {
            Ok(Seen::Whole) => {}
            Ok(Seen::Absent) => tally.add("chunks_lost", 1),
            Ok(Seen::Wrong) => tally.fault("served_wrong", format!("{what}: chunk {number}")),
            Err(error) => tally.fault("stuck", format!("{what}: reading: {error}")),
        }
    }
    let mended = || -> std::result::Result<(), String> {
        store.verify().map_err(|error| format!("verifying: {error}"))?;
        store.repair().map_err(|error| format!("repairing: {error}"))?;
        let after = store.verify().map_err(|error| format!("verifying again: {error}"))?;
        if !after.is_clean() {
            return Err(format!("not repaired: {after:?}"));
        }
        goes_on(&store)
    };
    if let Err(problem) = mended() {
        tally.fault("stuck", format!("{what}: {problem}"));
    }
    Ok(())
}

/// Whether a chunk can be stored, moved and read.
fn goes_on(store: &ChunkStore) -> std::result::Result<(), String> {
    let store_one = || -> Result<Seen> {
        let model = register(store)?;
        if store.put(model, chunk(CHUNKS, 50))? != PutOutcome::Stored {
            return Ok(Seen::Absent);
        }
        store.reclaim()?;
        Ok(look(store, CHUNKS, 50)?)
    };
    match store_one() {
        Ok(Seen::Whole) => Ok(()),
        Ok(other) => Err(format!("a stored chunk is {other:?}")),
        Err(error) => Err(format!("storing: {error}")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::record::Output;

    #[test]
    fn a_flipped_bit_in_any_file_is_never_served_and_never_leaves_the_store_stuck() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output { results_dir: None, ..Output::default() };
        let options = DrillOptions { dir: dir.path().into(), count: 60, seed: 3, output };
        let report = drill_bitflips(&options, &mut |_| {}).unwrap();
        assert_eq!((report.faults, report.problems), (0, Vec::<String>::new()));
        let count = |metric: &str| report.records.iter().find(|record| record.metric == metric).unwrap().value;
        assert_eq!(count("flips"), 60.0);
        assert!(count("chunks_lost") > 0.0, "the drill hit nothing");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
