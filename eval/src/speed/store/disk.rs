//! What a folder takes of the disk, and what this process writes.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{EvalError, Result};

/// Files of a folder and of those in it. What goes meanwhile is left out.
pub(super) fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Bytes of the disk's blocks that a folder takes. A file with two names, as one that is being taken over, counts once.
pub(super) fn disk_bytes(dir: &Path) -> u64 {
    let mut seen = std::collections::HashSet::new();
    let metadata = files(dir).into_iter().filter_map(|path| fs::metadata(path).ok());
    metadata.filter(|data| seen.insert(data.ino())).map(|data| data.blocks() * 512).sum()
}

/// The result of `work`, and the most of the disk that the folder took meanwhile, looked at every few milliseconds.
pub(super) fn peak_while<T>(dir: &Path, work: impl FnOnce() -> T) -> (T, u64) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut peak = 0;
            while !done.load(Ordering::Acquire) {
                peak = peak.max(disk_bytes(dir));
                std::thread::sleep(Duration::from_millis(3));
            }
            peak.max(disk_bytes(dir))
        });
        let result = work();
        done.store(true, Ordering::Release);
        (result, watcher.join().unwrap_or(0))
    })
}

/// Bytes that this process has caused to be written to the disk since it began.
pub(super) fn written_bytes() -> Result<u64> {
    let path = Path::new("/proc/self/io");
    let text = fs::read_to_string(path).map_err(EvalError::io("read", path))?;
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    let number = line.and_then(|number| number.trim().parse().ok());
    number.ok_or_else(|| EvalError::io("read", path)(std::io::Error::other("it has no line write_bytes")))
}

/// Makes the kernel forget what it holds of a folder's files, after writing what is not yet written.
///
/// # Errors
/// A file that cannot be read or written out.
pub fn drop_page_cache(dir: &Path) -> Result<()> {
    use rustix::fs::{Advice, fadvise};
    for path in files(dir) {
        let forget = || -> std::io::Result<()> {
            let file = fs::File::open(&path)?;
            file.sync_all()?;
            Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
        };
        match forget() {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(EvalError::io("drop from the page cache", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}
