//! `quire-bench cache`: what caches of chunks save by their policy.

use std::path::PathBuf;

use clap::Args;
use eval::{CacheBenchOptions, bench_cache};

use super::args::RecordArgs;
use super::dispatch::print;
use super::quality::{output, with_progress};
use crate::error::Result;
use quire::cli::Out;

/// Flags of `quire-bench cache`.
#[derive(Debug, Args)]
pub(crate) struct CacheArgs {
    /// A trace in Mooncake's format (JSON lines with input_length and hash_ids) beside the made-up workload
    #[arg(long, value_name = "FILE")]
    mooncake: Option<PathBuf>,
    /// Sizes of the caches in percent of all chunks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "5,10,20,50")]
    shares: Vec<usize>,
    /// Share of a chunk's computation that is done again behind other chunks
    #[arg(long, default_value_t = CacheBenchOptions::default().charged_share)]
    charged_share: f32,
    /// Variants of a chunk at most
    #[arg(long, default_value_t = 1)]
    variants: usize,
    /// Seed of the made-up workload
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Records.
    #[command(flatten)]
    records: RecordArgs,
}

pub(super) fn run(args: CacheArgs, out: &Out) -> Result<()> {
    let CacheArgs { mooncake, shares, charged_share, variants, seed, records } = args;
    let options = CacheBenchOptions { mooncake, shares, charged_share, variants, seed, output: output(&records)? };
    let report = with_progress(out, |progress| Ok(bench_cache(&options, progress)?))?;
    print(&report, &report.table(), out);
    Ok(())
}
