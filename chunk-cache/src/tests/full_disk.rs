//! A full disk, where one can be made: a small file system in memory.

use std::process::Command;

use super::*;

/// A file system of its own; `None` where mounting is not allowed.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(mib: u64) -> Option<SmallDisk> {
        let directory = tempfile::tempdir().unwrap();
        let size = format!("size={mib}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(directory.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(SmallDisk(directory))
    }

    fn filler(&self) -> std::path::PathBuf {
        self.0.path().join("filler")
    }

    /// Fills what is free but for about so many bytes.
    fn fill(&self, leave: u64) {
        let free = crate::disk::free_bytes(self.0.path()).unwrap();
        let file = fs::OpenOptions::new().create(true).append(true).open(self.filler()).unwrap();
        let length = file.metadata().unwrap().len() + free.saturating_sub(leave);
        let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length.max(1));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_store_on_a_full_disk_reads_evicts_and_stores_again_without_being_opened_anew() {
    let Some(disk) = SmallDisk::mount(48) else {
        eprintln!("skipped: mounting is not allowed here");
        return;
    };
    let path = disk.0.path().join("chunks");
    let store = open(&path).unwrap();
    let mut dice = Dice(17);
    put_each(&store, 0..6);
    for round in 0..12u32 {
        // From nothing free at all to a little more than is asked for beforehand.
        disk.fill(dice.below(6 << 20) * u64::from(round % 3));
        for n in 10..20 {
            match put(&store, n + 10 * round) {
                Ok(_) | Err(StoreError::OutOfSpace { .. }) => {}
                Err(other) => panic!("round {round}: {other}"),
            }
        }
        (0..6).for_each(|n| assert_eq!(look(&store, n), Seen::Whole, "round {round}"));
        // Evicting needs no space beside what is kept in reserve.
        store.remove_all(&(10..20).map(|n| key(n + 10 * round)).collect::<Vec<_>>()).unwrap();
        fs::remove_file(disk.filler()).unwrap();
        put(&store, 500 + round).unwrap();
        assert_eq!(look(&store, 500 + round), Seen::Whole);
    }
    disk.fill(0);
    drop(store);
    // Emptying it needs none at all.
    assert!(ChunkStore::clear(&path).unwrap() > 0);
    fs::remove_file(disk.filler()).unwrap();
    put(&open(&path).unwrap(), 1).unwrap();
}
