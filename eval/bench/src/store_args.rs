//! Flags of the bench and of the drills of the chunk store.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::RecordArgs;
use settings::Bytes;

/// Flags of `quire-bench store`.
#[derive(Debug, Args)]
pub(crate) struct StoreArgs {
    /// Where folders of up to three times the bytes are made and removed again [default: the data folder]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) dir: Option<PathBuf>,
    /// State to ingest; the other cases follow it
    #[arg(long, value_name = "BYTES", default_value = "4G")]
    pub(crate) bytes: Bytes,
    /// Chunks of the store that is opened
    #[arg(long, default_value_t = 100_000)]
    pub(crate) rows: usize,
    /// Rounds of reading and opening
    #[arg(long, default_value_t = 5)]
    pub(crate) repeats: usize,
    /// Seed of choices
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

/// Flags of `quire-bench crash`.
#[derive(Debug, Args)]
pub(crate) struct CrashArgs {
    /// What happens
    #[arg(value_enum, value_name = "CASE", default_value_t = CrashCase::Ingest)]
    pub(crate) case: CrashCase,
    /// Times to kill
    #[arg(long, default_value_t = 50)]
    pub(crate) kills: usize,
    /// Documents to ingest
    #[arg(long, default_value_t = 16)]
    pub(crate) documents: usize,
    /// Bits to flip
    #[arg(long, default_value_t = 2000)]
    pub(crate) flips: usize,
    /// Times to fill the disk
    #[arg(long, default_value_t = 60)]
    pub(crate) rounds: usize,
    /// Seed of the documents and the moments
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

/// A crash drill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CrashCase {
    /// An ingest is killed
    #[value(name = "ingest/kill9")]
    Ingest,
    /// A process that works on a library is killed
    #[value(name = "library/kill9")]
    Library,
    /// The power fails while a process works on a library
    #[value(name = "library/unsynced-dropped")]
    LibraryPower,
    /// Files of a catalog of documents are damaged
    #[value(name = "library/bitflips")]
    LibraryFlips,
    /// Bits of a chunk store's files are flipped
    #[value(name = "store/bitflips")]
    Bitflips,
    /// The disk below a chunk store becomes full
    #[value(name = "store/full-disk")]
    FullDisk,
}
