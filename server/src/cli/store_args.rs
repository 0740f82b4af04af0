//! Flags of the bench and of the drills of the chunk store.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::RecordArgs;
use crate::config::Bytes;

/// Flags of `quire bench store`.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Where folders of up to three times the bytes are made and removed again [default: the data folder]
    #[arg(long, value_name = "FOLDER")]
    pub dir: Option<PathBuf>,
    /// State to ingest; the other cases follow it
    #[arg(long, value_name = "BYTES", default_value = "4G")]
    pub bytes: Bytes,
    /// Chunks of the store that is opened
    #[arg(long, default_value_t = 100_000)]
    pub rows: usize,
    /// Rounds of reading and opening
    #[arg(long, default_value_t = 5)]
    pub repeats: usize,
    /// Seed of choices
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Records.
    #[command(flatten)]
    pub records: RecordArgs,
}

/// Flags of `quire bench crash`.
#[derive(Debug, Args)]
pub struct CrashArgs {
    /// What happens
    #[arg(value_enum, value_name = "CASE", default_value_t = CrashCase::Ingest)]
    pub case: CrashCase,
    /// Times to kill
    #[arg(long, default_value_t = 50)]
    pub kills: usize,
    /// Documents to ingest
    #[arg(long, default_value_t = 16)]
    pub documents: usize,
    /// Bits to flip
    #[arg(long, default_value_t = 2000)]
    pub flips: usize,
    /// Times to fill the disk
    #[arg(long, default_value_t = 60)]
    pub rounds: usize,
    /// Seed of the documents and the moments
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Records.
    #[command(flatten)]
    pub records: RecordArgs,
}

/// A crash drill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CrashCase {
    /// An ingest is killed
    #[value(name = "ingest/kill9")]
    Ingest,
    /// A process that works on a library is killed
    #[value(name = "library/kill9")]
    Library,
    /// The power fails while a process works on a library
    #[value(name = "library/unsynced-dropped")]
    LibraryPower,
    /// Bits of a chunk store's files are flipped
    #[value(name = "store/bitflips")]
    Bitflips,
    /// The disk below a chunk store becomes full
    #[value(name = "store/full-disk")]
    FullDisk,
}
