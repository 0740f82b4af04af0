//! The data folder as a whole: which version it has, and whether it can be written.
//!
//! A small file says which layout the folder has: catalog, indexes, chunks, and whatever later versions add. A folder without
//! one is new, or from before there was such a file. The chunk store and the catalog have versions of their own.
//!
//! Version 1 had no catalog: its collections are taken into one when the folder is first opened for writing.

use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{DocumentsError, Result};

/// The layout that this build writes, and the newest it reads.
const FORMAT: u32 = 2;

/// What the file says; other fields are for people.
#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    format: u32,
    #[serde(default)]
    written_by: String,
}

fn marker(dir: &Path) -> PathBuf {
    dir.join("quire-data.json")
}

/// Makes a folder, and what is missing of the path to it, for this user alone. One that is there stays as it is. What is made
/// survives a power failure, so that what is synced in it does.
///
/// # Errors
/// The system's.
pub fn create_private_dir(path: &Path) -> std::io::Result<()> {
    let missing = path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).count();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    for made in path.ancestors().take(missing) {
        let parent = made.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::File::open(parent)?.sync_all()?;
    }
    Ok(())
}

/// Refuses a folder that a newer version has written. Changes nothing.
///
/// # Errors
/// [`DocumentsError::NewerDataDir`]; [`DocumentsError::DataDirMarker`] for a file that says nothing.
pub fn check(dir: &Path) -> Result<()> {
    let path = marker(dir);
    let content = match std::fs::read(&path) {
        Ok(content) => content,
        // Whatever else is wrong with the folder is found by those who use it.
        Err(_) if !path.is_file() => return Ok(()),
        Err(source) => return Err(DocumentsError::Io { action: "read", path, source }),
    };
    match serde_json::from_slice::<Marker>(&content) {
        Ok(found) if found.format > FORMAT => {
            Err(DocumentsError::NewerDataDir { path: dir.into(), found: found.format, supported: FORMAT })
        }
        Ok(_) => Ok(()),
        Err(problem) => {
            let found = match content.trim_ascii() {
                [] if content.is_empty() => "an empty file".into(),
                [] => "nothing but white space".into(),
                cut if problem.is_eof() => format!("a file that is cut off behind {} bytes", cut.len()),
                _ => format!("something else ({problem})"),
            };
            Err(DocumentsError::DataDirMarker { path, found, newest: FORMAT })
        }
    }
}

/// Makes the folder ready to be written: it exists, has a version that this build knows, and takes files.
///
/// # Errors
/// Those of [`check`], and [`DocumentsError::DataDir`].
pub fn prepare(dir: &Path) -> Result<()> {
    create_private_dir(dir).map_err(|e| DocumentsError::writing(dir, e))?;
    check(dir)?;
    remove_old_probes(dir);
    let probe = probe(dir);
    std::fs::write(&probe, b"").map_err(|e| DocumentsError::writing(dir, e))?;
    let path = marker(dir);
    if path.exists() {
        return std::fs::remove_file(&probe).map_err(|e| DocumentsError::writing(dir, e));
    }
    write_marker(dir, &probe)
}

/// What the name begins with of the file by which a process finds out whether it may write; its id follows.
const PROBE: &str = ".writable-";
/// How old a file must be to be none that a process is just using.
const OLD_PROBE: std::time::Duration = std::time::Duration::from_secs(60);

fn probe(dir: &Path) -> PathBuf {
    dir.join(format!("{PROBE}{}", std::process::id()))
}

/// Removes the probes of processes that were killed: a probe is there for milliseconds. What cannot be removed is in nobody's way.
fn remove_old_probes(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_probe = entry.file_name().to_string_lossy().starts_with(PROBE);
        let age = || entry.metadata().ok()?.modified().ok()?.elapsed().ok();
        if is_probe && age().is_some_and(|age| age > OLD_PROBE) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Says that the folder has the layout of this build, once it has.
pub(crate) fn raise(dir: &Path) -> Result<()> {
    let text = std::fs::read_to_string(marker(dir)).unwrap_or_default();
    if serde_json::from_str::<Marker>(&text).is_ok_and(|found| found.format >= FORMAT) {
        return Ok(());
    }
    write_marker(dir, &probe(dir))
}

/// Writes the marker, whole or not at all, by way of the file `scratch`.
fn write_marker(dir: &Path, scratch: &Path) -> Result<()> {
    let content = Marker { format: FORMAT, written_by: format!("quire {}", env!("CARGO_PKG_VERSION")) };
    let text = serde_json::to_string(&content)
        .map_err(|e| DocumentsError::Internal(format!("the version of the data folder cannot be written: {e}")))?;
    let write = || {
        let mut file = std::fs::File::create(scratch)?;
        file.write_all((text + "\n").as_bytes())?;
        // A name that outlives a power failure must not be that of an empty file.
        file.sync_all()?;
        std::fs::rename(scratch, marker(dir))?;
        std::fs::File::open(dir)?.sync_all()
    };
    write().map_err(|e| {
        let _ = std::fs::remove_file(scratch);
        DocumentsError::writing(dir, e)
    })
}

/// Whether this process may make files in the folder, found out without making one.
///
/// # Errors
/// The system's reason: permissions, a read-only file system, no such folder.
pub fn check_writable(dir: &Path) -> std::io::Result<()> {
    use rustix::fs::{Access, access};
    Ok(access(dir, Access::WRITE_OK | Access::EXEC_OK)?)
}

/// Free bytes where `path` lies or would lie; `None` where the system does not say.
#[must_use]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let existing = path.ancestors().find(|p| p.exists()).filter(|p| !p.as_os_str().is_empty());
    let found = rustix::fs::statvfs(existing.unwrap_or(Path::new("."))).ok()?;
    Some(found.f_bavail * found.f_frsize)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_folder_of_a_newer_version_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        check(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        prepare(dir.path()).unwrap();
        std::fs::write(marker(dir.path()), "{\"format\": 7, \"compressed\": true}").unwrap();
        for outcome in [check(dir.path()), prepare(dir.path())] {
            let text = outcome.unwrap_err().to_string();
            for part in [&*dir.path().to_string_lossy(), "version 7", "up to 2", "newer quire", "--data-dir"] {
                assert!(text.contains(part), "{text} lacks {part}");
            }
        }
    }

    #[test]
    fn a_marker_that_says_nothing_is_called_what_it_is_and_removing_it_is_the_cure() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path()).unwrap();
        let whole = std::fs::read(marker(dir.path())).unwrap();
        std::fs::write(dir.path().join("kept"), "kept").unwrap();
        let cases: [(&[u8], &str); 8] = [
            (b"", "found an empty file"),
            (b" \n", "found nothing but white space"),
            (&whole[..5], "found a file that is cut off behind 5 bytes"),
            (&whole[..whole.len() - 3], "found a file that is cut off behind"),
            (b"torn", "found something else"),
            (b"{\"format\": \"two\"}", "found something else"),
            (b"{}", "found something else"),
            (&[0; 40], "found something else"),
        ];
        for (content, found) in cases {
            std::fs::write(marker(dir.path()), content).unwrap();
            for outcome in [check(dir.path()), prepare(dir.path())] {
                let text = outcome.unwrap_err().to_string();
                assert!(text.contains("quire-data.json") && text.contains(found), "{text}");
                assert!(
                    text.contains(&format!("{{\"format\": {FORMAT}}}")) && text.contains("remove that file"),
                    "{text}"
                );
            }
            assert_eq!(std::fs::read(marker(dir.path())).unwrap(), content, "a check has changed something");
            std::fs::remove_file(marker(dir.path())).unwrap();
            prepare(dir.path()).unwrap();
            assert_eq!(std::fs::read(marker(dir.path())).unwrap(), whole);
            assert_eq!(std::fs::read(dir.path().join("kept")).unwrap(), b"kept");
        }
    }

    #[test]
    fn probes_of_processes_that_were_killed_are_removed_and_those_of_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join(".writable-1"), dir.path().join(".writable-2"));
        for path in [&old, &new] {
            std::fs::write(path, b"").unwrap();
        }
        let hour = std::time::Duration::from_secs(3600);
        std::fs::File::open(&old).unwrap().set_modified(std::time::SystemTime::now() - hour).unwrap();
        prepare(dir.path()).unwrap();
        assert!(!old.exists() && new.exists());
    }

    #[test]
    fn asking_whether_a_folder_can_be_written_leaves_nothing_there() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path()).unwrap();
        check_writable(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(check_writable(&dir.path().join("absent")).is_err());
        assert!(free_bytes(&dir.path().join("not/there/yet")).unwrap() > 0);
    }
}
