//! The `quire-bench` binary.

use std::process::ExitCode;

/// As in `quire`, which is measured.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quire_bench::run(std::env::args_os())
}
