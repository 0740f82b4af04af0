//! The quire binary.

use std::process::ExitCode;

use clap::Parser;
use quire::cli::{Cli, run};

/// Activations come and go by the megabyte; the system's allocator returns them to the system each time, and every
/// page of the next ones is a fault.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    run(Cli::parse())
}
