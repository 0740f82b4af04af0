//! What the system gives this process and lets it do, and what it lets others do with this process's files.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::Mode;
use rustix::process::umask;

/// From now on, files and folders that this process makes are for its user alone. Those that are there stay as they are.
pub(crate) fn keep_files_private() {
    let others = Mode::RWXG | Mode::RWXO;
    let before = umask(others);
    umask(before | others);
}

static STDOUT_CLOSED: AtomicBool = AtomicBool::new(false);

/// Whether this process was started without a standard output (`>&-`). What is written there then seems to succeed: before
/// `main`, Rust's runtime opens `/dev/null` in its place, so that no other file gets its number.
pub(crate) fn stdout_was_closed() -> bool {
    STDOUT_CLOSED.load(Ordering::Relaxed)
}

/// Runs when the program is loaded, before the runtime.
extern "C" fn look_at_stdout() {
    // SAFETY: asks for the flags of a number, open or not; nothing else runs yet.
    if unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1 {
        STDOUT_CLOSED.store(true, Ordering::Relaxed);
    }
}

// SAFETY: the section holds pointers to functions that take nothing we need and return.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_AT_STDOUT: extern "C" fn() = look_at_stdout;
