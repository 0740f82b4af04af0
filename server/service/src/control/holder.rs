//! Which server has a data folder, and where it is asked.
//!
//! A server locks `quire.pid` in the folder for as long as it lives (the system lets go of the lock when it is killed), says in
//! it who it is, and listens on `quire.sock` beside it. Whoever finds the lock free has the folder to itself, whatever files
//! lie there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use documents::{DocumentsError, data_dir};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{PROTOCOL, VERSION};
use settings::{QuireError, Result};

/// Longest path of a socket that the system takes, in bytes, its end included.
const SOCKET_PATH: usize = 108;
/// How often, and how long between, something is tried that somebody may be about to finish.
const TRIES: usize = 40;
const BETWEEN: Duration = Duration::from_millis(25);

/// A server, as its folder names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its process id.
    pub pid: u32,
    /// The version of its program.
    pub version: String,
    /// The version of what it understands.
    pub protocol: u32,
    /// Where it is asked; `None`: nowhere.
    pub socket: Option<PathBuf>,
    /// Since when, in seconds of the Unix epoch.
    pub since_unix: u64,
}

fn pid_file(data_dir: &Path) -> PathBuf {
    data_dir.join("quire.pid")
}

fn socket(data_dir: &Path) -> PathBuf {
    data_dir.join("quire.sock")
}

/// The server that has the folder; `None` where none runs. Changes nothing.
///
/// # Errors
/// A server that has the folder and does not come to say who it is.
pub(super) fn find(data_dir: &Path) -> Result<Option<Holder>> {
    for attempt in 0..TRIES {
        if attempt > 0 {
            std::thread::sleep(BETWEEN);
        }
        // Who may not read it cannot ask either, and meets the lock of the chunk store as ever.
        let Ok(mut file) = File::open(pid_file(data_dir)) else { return Ok(None) };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {}
            // Closing the file lets go of the lock.
            _ => return Ok(None),
        }
        // It may be about to be written, or to be removed.
        let mut text = String::new();
        if file.read_to_string(&mut text).is_ok()
            && let Ok(holder) = serde_json::from_str(&text)
        {
            return Ok(Some(holder));
        }
    }
    Err(QuireError::FolderInUse {
        path: data_dir.into(),
        by: "a server that does not say who it is".into(),
        why: format!("{} names none", pid_file(data_dir).display()),
    })
}

/// A server that commands cannot ask.
#[derive(Debug)]
pub struct Unspoken {
    /// The data folder, if it is still taken.
    pub claim: Option<Claim>,
    /// What was not possible.
    pub what: &'static str,
    /// Why.
    pub error: std::io::Error,
}

/// The data folder, taken by this process for as long as this lives.
#[derive(Debug)]
pub struct Claim {
    data_dir: PathBuf,
    file: File,
}

impl Claim {
    /// Takes the folder, which is made where it is not there; `None` where it cannot be written, so that nobody needs it
    /// for himself.
    ///
    /// # Errors
    /// [`QuireError::FolderInUse`] while another server has it; [`DocumentsError::NewerDataDir`].
    pub fn take(dir: &Path) -> Result<Option<Claim>> {
        match data_dir::prepare(dir) {
            Err(DocumentsError::DataDir { .. }) => return Ok(None),
            outcome => outcome?,
        }
        let path = pid_file(dir);
        for attempt in 0..TRIES {
            if attempt > 0 {
                // Whoever only looks holds the lock for a moment.
                std::thread::sleep(BETWEEN);
            }
            let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
            let file = match opened {
                Ok(file) => file,
                // A disk that takes no file now may take one later.
                Err(error) if is_lack_of_space(&error) => return Ok(None),
                Err(source) => return Err(DocumentsError::writing(&path, source).into()),
            };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                // The one before may have removed the file after it was opened here.
                Ok(()) if is_at(&file, &path) => return Ok(Some(Claim { data_dir: dir.into(), file })),
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    if let Some(holder) = find(dir)? {
                        return Err(in_use(dir, &holder, "a data folder has one server at a time".into()));
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "the data folder cannot be locked; commands cannot ask this server");
                    return Ok(None);
                }
            }
        }
        let why = format!("{} stayed locked", path.display());
        Err(QuireError::FolderInUse { path: dir.into(), by: "another process".into(), why })
    }

    /// Listens in the folder for commands, and says there who it is. A socket that a killed server left is replaced.
    ///
    /// # Errors
    /// What cannot be made or written, as on a full disk: it can be tried again, also where the folder says by now who has it
    /// and where not to ask. [`Unspoken::claim`] is `None` where it could not even say that, and nobody has the folder any more.
    pub fn listen(mut self) -> std::result::Result<(Claim, UnixListener), Unspoken> {
        let listener = bind(&self.data_dir);
        if let Err(error) = self.introduce(listener.is_ok()) {
            return Err(Unspoken { claim: None, what: "who has the data folder cannot be written", error });
        }
        match listener {
            Ok(listener) => Ok((self, listener)),
            Err(error) => Err(Unspoken { claim: Some(self), what: "no socket can be made", error }),
        }
    }

    /// Says in the folder who has it.
    fn introduce(&mut self, listens: bool) -> std::io::Result<()> {
        let text = serde_json::to_string(&Holder {
            pid: std::process::id(),
            version: VERSION.into(),
            protocol: PROTOCOL,
            socket: listens.then(|| socket(&self.data_dir)),
            since_unix: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        })?;
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(text.as_bytes())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Nobody is at the socket any more, and the lock goes with the file: what cannot be removed does no harm.
        let _ = std::fs::remove_file(socket(&self.data_dir));
        let _ = std::fs::remove_file(pid_file(&self.data_dir));
    }
}

fn is_lack_of_space(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// Whether the open file is still the one at `path`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(open), Ok(there)) => (open.dev(), open.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

fn bind(data_dir: &Path) -> std::io::Result<UnixListener> {
    let path = socket(data_dir);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = with_short_path(data_dir, |path| UnixListener::bind(path))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Connects to the server of a folder.
///
/// # Errors
/// The system's: no socket, nobody behind it, not for this user.
pub(super) fn connect(data_dir: &Path) -> std::io::Result<UnixStream> {
    let stream = with_short_path(data_dir, |path| UnixStream::connect(path))?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// The path of a folder's socket, however long that of the folder is: through the open folder where it is too long.
fn with_short_path<T>(data_dir: &Path, with: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let path = socket(data_dir);
    if path.as_os_str().len() < SOCKET_PATH {
        return with(&path);
    }
    let folder = File::open(data_dir)?;
    with(&Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join("quire.sock"))
}

/// The error of a folder that a server has.
pub(super) fn in_use(data_dir: &Path, holder: &Holder, why: String) -> QuireError {
    let by = format!("the server with process id {}", holder.pid);
    QuireError::FolderInUse { path: data_dir.into(), by, why }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_folder_has_one_server_and_is_free_once_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(dir.path()).unwrap(), None);
        let (claim, _listener) = Claim::take(dir.path()).unwrap().unwrap().listen().unwrap();
        let holder = find(dir.path()).unwrap().unwrap();
        assert_eq!((holder.pid, holder.version.as_str(), holder.protocol), (std::process::id(), VERSION, PROTOCOL));
        let refused = Claim::take(dir.path()).unwrap_err().to_string();
        assert!(refused.contains(&format!("process id {}", holder.pid)) && refused.contains("--data-dir"), "{refused}");
        connect(dir.path()).unwrap();
        drop(claim);
        assert_eq!(find(dir.path()).unwrap(), None);
        assert!(!socket(dir.path()).exists() && !pid_file(dir.path()).exists());
    }

    #[test]
    fn what_a_killed_server_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(socket(dir.path())).unwrap());
        std::fs::write(pid_file(dir.path()), r#"{"pid":1,"version":"0","protocol":0,"socket":null,"since_unix":0}"#)
            .unwrap();
        assert_eq!(find(dir.path()).unwrap(), None);
        assert!(connect(dir.path()).is_err());
        let (_claim, _listener) = Claim::take(dir.path()).unwrap().unwrap().listen().unwrap();
        connect(dir.path()).unwrap();
        assert_eq!(find(dir.path()).unwrap().unwrap().pid, std::process::id());
        let mode = std::fs::metadata(socket(dir.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_server_that_could_not_listen_does_so_once_that_is_possible() {
        let dir = tempfile::tempdir().unwrap();
        // Something that cannot be replaced stands where the socket would be.
        std::fs::create_dir_all(socket(dir.path()).join("in/the/way")).unwrap();
        let unspoken = Claim::take(dir.path()).unwrap().unwrap().listen().unwrap_err();
        let holder = find(dir.path()).unwrap().unwrap();
        assert_eq!((holder.pid, holder.socket), (std::process::id(), None), "who has the folder is known already");
        std::fs::remove_dir_all(socket(dir.path())).unwrap();
        let (_claim, _listener) = unspoken.claim.unwrap().listen().unwrap();
        assert_eq!(find(dir.path()).unwrap().unwrap().socket, Some(socket(dir.path())));
        connect(dir.path()).unwrap();
    }

    #[test]
    fn the_path_of_the_folder_may_be_longer_than_that_of_a_socket() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a".repeat(100)).join("b".repeat(100));
        let (_claim, _listener) = Claim::take(&deep).unwrap().unwrap().listen().unwrap();
        assert_eq!(find(&deep).unwrap().unwrap().socket, Some(socket(&deep)));
        connect(&deep).unwrap();
    }
}
