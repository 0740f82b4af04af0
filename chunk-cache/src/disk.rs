//! Space on the disk below the store: how much is free, and a reserve that is given up when there is none.

use std::fs;
use std::path::{Path, PathBuf};

/// Name of the reserve's file in the store's directory.
pub(crate) const RESERVE_FILE: &str = "reserve";
const MIB: u64 = 1 << 20;

/// Free bytes for this user where `path` lies; `None` where the system does not say.
pub(crate) fn free_bytes(path: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(path).ok()?;
    Some(found.f_bavail.saturating_mul(found.f_frsize))
}

/// A file that holds space for the log and the catalogue while the disk is full: evicting needs some before it frees any.
#[derive(Debug)]
pub(crate) struct Reserve {
    path: PathBuf,
    bytes: u64,
}

impl Reserve {
    /// The reserve of a store with this budget; no file is made yet.
    pub(crate) fn new(directory: &Path, byte_budget: u64) -> Reserve {
        let bytes = (byte_budget / 64).clamp(4 * MIB, 16 * MIB);
        Reserve { path: directory.join(RESERVE_FILE), bytes }
    }

    /// Bytes that a writer leaves free beside its own, so that the catalogue can go on.
    pub(crate) fn margin(&self) -> u64 {
        self.bytes
    }

    /// Takes the space again, once there is plenty. Doing without is no error.
    pub(crate) fn refill(&self) {
        let free = self.path.parent().and_then(free_bytes).unwrap_or(0);
        if self.path.exists() || free < 4 * self.bytes {
            return;
        }
        let filled = fs::File::create(&self.path).and_then(|file| {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, self.bytes)?;
            Ok(())
        });
        if let Err(error) = filled {
            tracing::debug!(%error, "no space is kept in reserve");
            self.release();
        }
    }

    /// Gives the space up; true when there was any.
    pub(crate) fn release(&self) -> bool {
        fs::remove_file(&self.path).is_ok()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_reserve_really_takes_space_and_gives_it_back_once() {
        let directory = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(directory.path(), 1 << 40);
        assert!(!reserve.release());
        reserve.refill();
        let taken = fs::metadata(directory.path().join(RESERVE_FILE)).unwrap();
        assert!(taken.blocks() * 512 >= 16 * MIB, "{} blocks", taken.blocks());
        assert!(reserve.release() && !reserve.release());
        assert!(free_bytes(directory.path()).unwrap() > 0);
    }
}
