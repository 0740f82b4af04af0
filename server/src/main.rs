//! The quire binary.

use std::process::ExitCode;

use quire::cli::{parse, print_usage, run};

/// Activations come and go by the megabyte; the system's allocator returns them to the system each time, and every
/// page of the next ones is a fault.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match parse(std::env::args_os()) {
        Ok(cli) => run(cli),
        Err(usage) => print_usage(&usage),
    }
}
