//! The cache of models, in the layout that the hub's tools share.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::files;
use super::id::{ModelId, is_commit};
use crate::error::{HubError, Result};

/// The folder of all models.
#[derive(Clone, Debug)]
pub struct HubCache {
    root: PathBuf,
}

impl HubCache {
    /// The cache at `root`, which need not be there.
    #[must_use]
    pub fn new(root: &Path) -> HubCache {
        HubCache { root: root.into() }
    }

    /// The folder of a model that has been fetched completely. `offline` is for the advice in errors.
    ///
    /// # Errors
    /// [`HubError::NotInCache`], [`HubError::Incomplete`].
    pub fn find(&self, id: &ModelId, offline: bool) -> Result<PathBuf> {
        let absent = || HubError::NotInCache { id: id.to_string(), cache: self.root.clone(), offline };
        let commit = self.commit(id).ok_or_else(absent)?;
        let folder = self.snapshot(id, &commit);
        if !folder.is_dir() {
            return Err(absent());
        }
        match files::missing(&folder)? {
            None => Ok(folder),
            Some(missing) => Err(HubError::Incomplete { id: id.to_string(), folder, missing, offline }),
        }
    }

    /// The commit that a model's revision named when it was last fetched.
    fn commit(&self, id: &ModelId) -> Option<String> {
        if is_commit(id.revision()) {
            return Some(id.revision().into());
        }
        let commit = fs::read_to_string(self.reference(id)).ok()?;
        // It becomes a part of a path.
        Some(commit.trim().to_string()).filter(|commit| is_commit(commit))
    }

    fn reference(&self, id: &ModelId) -> PathBuf {
        self.root.join(id.folder()).join("refs").join(id.revision())
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, id: &ModelId, commit: &str) -> PathBuf {
        self.root.join(id.folder()).join("snapshots").join(commit)
    }

    /// The file with a hash's contents.
    pub(super) fn blob(&self, id: &ModelId, etag: &str) -> PathBuf {
        self.root.join(id.folder()).join("blobs").join(etag)
    }

    /// The file that is locked while a blob is written, opened.
    pub(super) fn lock_file(&self, id: &ModelId, etag: &str) -> Result<File> {
        let path = self.root.join(".locks").join(id.folder()).join(format!("{etag}.lock"));
        make_parent(&path)?;
        let options = File::options().create(true).truncate(false).write(true).to_owned();
        options.open(&path).map_err(|e| writing(&path, e))
    }

    /// Makes `name` in a commit's folder, which may lie in a folder there, a link to a blob.
    pub(super) fn link(&self, id: &ModelId, commit: &str, name: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(id, commit).join(name);
        let up = "../".repeat(2 + name.matches('/').count());
        let target = Path::new(&up).join("blobs").join(etag);
        if fs::read_link(&path).is_ok_and(|found| found == target) {
            return Ok(());
        }
        replace(&path, &|temporary| symlink(&target, temporary))
    }

    /// Notes which commit a model's revision names. Last, so that what is found by name is complete.
    pub(super) fn set_reference(&self, id: &ModelId, commit: &str) -> Result<()> {
        if is_commit(id.revision()) {
            return Ok(());
        }
        replace(&self.reference(id), &|temporary| fs::write(temporary, commit))
    }
}

/// The name of the model whose snapshot a folder of a cache is: `owner/name`.
#[must_use]
pub fn snapshot_name(folder: &Path) -> Option<String> {
    let snapshots = folder.parent().filter(|parent| parent.ends_with("snapshots"))?;
    let repository = snapshots.parent()?.file_name()?.to_str()?.strip_prefix("models--")?;
    Some(repository.replacen("--", "/", 1))
}

/// Makes a file under another name and puts it in its place at once.
fn replace(path: &Path, make: &dyn Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    make_parent(path)?;
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    // What a killed process of the same number left behind.
    let _ = fs::remove_file(&temporary);
    make(&temporary).and_then(|()| fs::rename(&temporary, path)).map_err(|e| writing(path, e))
}

/// Makes the folder that a file is to lie in.
pub(super) fn make_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |folder| fs::create_dir_all(folder).map_err(|e| writing(folder, e)))
}

/// An attempt to write into the cache that failed.
pub(super) fn writing(path: &Path, source: std::io::Error) -> HubError {
    HubError::Io { action: "write into the hub's cache (HF_HOME, HF_HUB_CACHE) at", path: path.into(), source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    fn put(cache: &HubCache, id: &ModelId, name: &str, text: &str) {
        let blob = cache.blob(id, name);
        make_parent(&blob).unwrap();
        fs::write(blob, text).unwrap();
        cache.link(id, COMMIT, name, name).unwrap();
    }

    #[test]
    fn a_model_is_found_once_it_is_complete_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let cache = HubCache::new(dir.path());
        let id: ModelId = "org/name@refs/pr/1".parse().unwrap();
        let pinned: ModelId = format!("org/name@{COMMIT}").parse().unwrap();
        let error = |id| cache.find(id, false).unwrap_err().to_string();
        assert!(error(&id).contains("`quire pull org/name@refs/pr/1`"), "{}", error(&id));
        put(&cache, &id, "config.json", "{}");
        put(&cache, &id, "tokenizer.json", "{}");
        assert!(error(&id).contains("found neither"), "no reference yet: {}", error(&id));
        cache.set_reference(&id, COMMIT).unwrap();
        assert!(error(&id).contains("lacks model.safetensors"), "{}", error(&id));
        put(&cache, &id, "model.safetensors", "");
        let folder = cache.find(&id, false).unwrap();
        assert_eq!(fs::read_to_string(folder.join("config.json")).unwrap(), "{}");
        assert_eq!(cache.find(&pinned, false).unwrap(), folder);
        assert_eq!(snapshot_name(&folder).unwrap(), "org/name");

        cache.link(&id, COMMIT, "additional_chat_templates/default.jinja", "config.json").unwrap();
        assert_eq!(fs::read_to_string(folder.join("additional_chat_templates/default.jinja")).unwrap(), "{}");

        fs::remove_file(cache.blob(&id, "tokenizer.json")).unwrap();
        assert!(error(&id).contains("lacks tokenizer.json"), "{}", error(&id));
    }

    #[test]
    fn a_reference_is_not_followed_out_of_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let cache = HubCache::new(dir.path());
        let id: ModelId = "org/name".parse().unwrap();
        make_parent(&cache.reference(&id)).unwrap();
        fs::write(cache.reference(&id), "../../../elsewhere").unwrap();
        assert!(cache.find(&id, true).unwrap_err().to_string().contains("HF_HUB_OFFLINE"));
    }

    #[test]
    fn other_folders_have_no_name_of_the_hub() {
        assert_eq!(snapshot_name(Path::new("/models/reference")), None);
        assert_eq!(snapshot_name(Path::new("/x/snapshots/abc")), None);
        assert_eq!(snapshot_name(Path::new("/")), None);
    }
}
