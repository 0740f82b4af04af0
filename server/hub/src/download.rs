//! One file from the hub into the cache: resumed, verified, and visible only when it is complete.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::Path;

use ring::digest;
use ureq::http::StatusCode;

use super::cache::{HubCache, make_parent, writing};
use super::client::{Client, Patience, RemoteFile, is_passing, text};
use super::id::ModelId;
use super::pull::{FileState, PullEvent};
use crate::error::{HubError, Result};

const BUFFER: usize = 256 << 10;

/// Sees to it that the cache has the blob of a file.
pub(super) fn download(
    client: &Client,
    cache: &HubCache,
    id: &ModelId,
    file: &RemoteFile,
    on_event: &mut dyn FnMut(PullEvent<'_>),
) -> Result<FileState> {
    let blob = cache.blob(id, &file.etag);
    make_parent(&blob)?;
    if is_complete(&blob, file) {
        return Ok(FileState::Cached);
    }
    let lock = cache.lock_file(id, &file.etag)?;
    let locked = match lock.try_lock() {
        Err(TryLockError::WouldBlock) => {
            on_event(PullEvent::Waiting { name: &file.name });
            lock.lock()
        }
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Ok(()),
    };
    locked.map_err(|e| writing(&blob, e))?;
    // Whoever held the lock may have fetched it.
    if is_complete(&blob, file) {
        return Ok(FileState::Cached);
    }
    let partial = blob.with_file_name(format!("{}.incomplete", file.etag));
    let resumed = Transfer::open(&partial, file)?.run(client, on_event)?;
    fs::rename(&partial, &blob).map_err(|e| writing(&blob, e))?;
    Ok(if resumed { FileState::Resumed } else { FileState::Fetched })
}

fn is_complete(blob: &Path, file: &RemoteFile) -> bool {
    fs::metadata(blob).is_ok_and(|found| found.is_file() && found.len() == file.size)
}

/// A file on its way.
struct Transfer<'a> {
    remote: &'a RemoteFile,
    path: &'a Path,
    file: File,
    /// Bytes that are there.
    have: u64,
    hash: Hash,
}

/// How a piece of a transfer ended.
enum Piece {
    /// Everything is there.
    Complete,
    /// More is to come; this is why it did not.
    Broken(HubError),
}

impl<'a> Transfer<'a> {
    /// Goes on with what an earlier transfer left.
    fn open(path: &'a Path, remote: &'a RemoteFile) -> Result<Transfer<'a>> {
        let options = File::options().create(true).truncate(false).read(true).append(true).to_owned();
        let file = options.open(path).map_err(|e| writing(path, e))?;
        let mut transfer = Transfer { remote, path, file, have: 0, hash: Hash::new(remote) };
        let mut buffer = vec![0; BUFFER];
        loop {
            match transfer.file.read(&mut buffer).map_err(|e| writing(path, e))? {
                0 => break,
                read => {
                    transfer.hash.update(&buffer[..read]);
                    transfer.have += read as u64;
                }
            }
        }
        if transfer.have > remote.size {
            transfer.start_over()?;
        }
        Ok(transfer)
    }

    fn start_over(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|e| writing(self.path, e))?;
        (self.have, self.hash) = (0, Hash::new(self.remote));
        Ok(())
    }

    /// Fetches what is missing and verifies the whole. True if some of it was there before.
    fn run(mut self, client: &Client, on_event: &mut dyn FnMut(PullEvent<'_>)) -> Result<bool> {
        let (name, size) = (self.remote.name.as_str(), self.remote.size);
        let found = self.have;
        on_event(PullEvent::Begin { name, size, done: found });
        let mut patience = Patience::default();
        while self.have < size {
            let before = self.have;
            let error = match self.piece(client, on_event)? {
                Piece::Complete => break,
                Piece::Broken(error) => error,
            };
            if self.have > before {
                patience = Patience::default();
            }
            let Some(pause) = patience.next() else { return Err(error) };
            on_event(PullEvent::Retry { name, problem: &error.to_string() });
            std::thread::sleep(pause);
        }
        self.verify()?;
        self.file.sync_all().map_err(|e| writing(self.path, e))?;
        Ok(found > 0)
    }

    /// One request for all that is missing.
    fn piece(&mut self, client: &Client, on_event: &mut dyn FnMut(PullEvent<'_>)) -> Result<Piece> {
        let url = &self.remote.url;
        let response = match client.fetch(url, self.have) {
            Ok(response) => response,
            Err(error) => return Ok(Piece::Broken(error)),
        };
        let status = response.status();
        if is_passing(status.as_u16()) {
            return Ok(Piece::Broken(HubError::Status { url: url.clone(), status: status.as_u16() }));
        }
        if status == StatusCode::RANGE_NOT_SATISFIABLE && self.have > 0 {
            self.start_over()?;
            let problem = "the server does not know the part that is missing".into();
            return Ok(Piece::Broken(HubError::Network { url: url.clone(), problem }));
        }
        client.accept(url, &response)?;
        let range = text(response.headers(), "content-range");
        let continues = status == StatusCode::PARTIAL_CONTENT
            && range.is_some_and(|range| range.starts_with(&format!("bytes {}-", self.have)));
        if self.have > 0 && !continues {
            // The whole file is sent, whatever was asked for; or another part than that.
            self.start_over()?;
            if status == StatusCode::PARTIAL_CONTENT {
                let (expected, found) = ("the range that was asked for", range.unwrap_or("none").into());
                return Ok(Piece::Broken(HubError::Protocol { url: url.clone(), expected, found }));
            }
        }
        self.receive(response.into_body().into_with_config().limit(u64::MAX).reader(), on_event)
    }

    fn receive(&mut self, mut body: impl Read, on_event: &mut dyn FnMut(PullEvent<'_>)) -> Result<Piece> {
        let mut buffer = vec![0; BUFFER];
        let (name, size) = (self.remote.name.as_str(), self.remote.size);
        let broken = |problem: String| Piece::Broken(HubError::Network { url: self.remote.url.clone(), problem });
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) if self.have < size => {
                    return Ok(broken(format!("the connection ended after {} of {size} bytes", self.have)));
                }
                Ok(0) => return Ok(Piece::Complete),
                Ok(read) => read,
                Err(error) => return Ok(broken(format!("{error}, after {} of {size} bytes", self.have))),
            };
            let bytes = &buffer[..read];
            if self.have + read as u64 > size {
                return Err(self.discard(format!("{size} bytes"), "more".into()));
            }
            self.file.write_all(bytes).map_err(|e| writing(self.path, e))?;
            self.hash.update(bytes);
            self.have += read as u64;
            on_event(PullEvent::Progress { name, size, done: self.have });
        }
    }

    /// Compares what has come with the hash that names it.
    fn verify(&mut self) -> Result<()> {
        let Some(found) = std::mem::replace(&mut self.hash, Hash::Unknown).finish() else { return Ok(()) };
        if found == self.remote.etag {
            return Ok(());
        }
        let expected = format!("contents with the hash {}", self.remote.etag);
        Err(self.discard(expected, format!("contents with the hash {found}")))
    }

    /// What has come is of no use to the next attempt either.
    fn discard(&self, expected: String, found: String) -> HubError {
        if let Err(error) = fs::remove_file(self.path) {
            return writing(self.path, error);
        }
        HubError::Corrupt { file: self.remote.name.clone(), expected, found }
    }
}

/// The hash that an ETag is, recognised by its length.
enum Hash {
    /// SHA-256 of the contents: files in large file storage.
    Sha256(digest::Context),
    /// Git's hash of a blob, SHA-1 over `blob SIZE`, a NUL and the contents: all other files.
    Git(digest::Context),
    /// A mirror's own; the size has to do.
    Unknown,
}

impl Hash {
    fn new(file: &RemoteFile) -> Hash {
        let hexadecimal = file.etag.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        match file.etag.len() {
            64 if hexadecimal => Hash::Sha256(digest::Context::new(&digest::SHA256)),
            40 if hexadecimal => {
                let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {}\0", file.size).as_bytes());
                Hash::Git(context)
            }
            _ => Hash::Unknown,
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Hash::Sha256(context) | Hash::Git(context) => context.update(bytes),
            Hash::Unknown => {}
        }
    }

    /// In hexadecimal.
    fn finish(self) -> Option<String> {
        match self {
            Hash::Sha256(context) | Hash::Git(context) => {
                Some(context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
            }
            Hash::Unknown => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn hash(etag: &str, contents: &[u8]) -> Option<String> {
        let etag = etag.to_string();
        let file = RemoteFile { name: "x".into(), etag, size: contents.len() as u64, url: String::new() };
        let mut hash = Hash::new(&file);
        contents.chunks(3).for_each(|piece| hash.update(piece));
        hash.finish()
    }

    #[test]
    fn hashes_are_those_of_sha256sum_and_git() {
        // printf 'hello\n' | sha256sum; printf 'hello\n' | git hash-object --stdin
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let git = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(hash(sha256, b"hello\n").unwrap(), sha256);
        assert_eq!(hash(git, b"hello\n").unwrap(), git);
        assert_eq!(hash("d41d8cd98f00b204e9800998ecf8427e", b"hello\n"), None);
    }

    #[test]
    fn what_an_earlier_attempt_left_is_part_of_the_hash_and_too_much_of_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.incomplete");
        let etag = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03".to_string();
        let remote = RemoteFile { name: "x".into(), etag, size: 6, url: String::new() };
        for (left, have) in [("", 0), ("hel", 3), ("hello\n", 6), ("hello\nand more", 0)] {
            fs::write(&path, left).unwrap();
            let mut transfer = Transfer::open(&path, &remote).unwrap();
            assert_eq!(transfer.have, have, "{left:?}");
            let piece = transfer.receive(&b"hello\n"[have as usize..], &mut |_| {}).unwrap();
            assert!(matches!(piece, Piece::Complete));
            transfer.verify().unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"hello\n", "{left:?}");
        }
        fs::write(&path, "HEL").unwrap();
        let mut transfer = Transfer::open(&path, &remote).unwrap();
        transfer.receive(&b"lo\n"[..], &mut |_| {}).unwrap();
        let error = transfer.verify().unwrap_err().to_string();
        assert!(error.contains(&remote.etag) && !path.exists(), "{error}");
    }
}
