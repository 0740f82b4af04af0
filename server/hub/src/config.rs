//! The variables that the hub's tools read, with the meaning they have there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::cache::HubCache;

/// Where the hub is when `HF_ENDPOINT` does not say.
const PUBLIC_HUB: &str = "https://huggingface.co";

/// Where models of the hub are kept, and how they are fetched.
pub struct HubConfig {
    /// Folder of the cache: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `$HF_HOME/hub`.
    pub cache: PathBuf,
    /// Address of the hub, without a `/` at the end: `HF_ENDPOINT`.
    pub endpoint: String,
    /// `HF_HUB_OFFLINE`: nothing is fetched.
    pub offline: bool,
    /// `HF_TOKEN`; it goes before the file.
    token: Option<String>,
    /// `HF_TOKEN_PATH`, else `$HF_HOME/token`, which `hf auth login` writes.
    token_file: PathBuf,
}

impl HubConfig {
    /// Reads the variables through `get`. `HF_HOME` is `$XDG_CACHE_HOME/huggingface` or `~/.cache/huggingface` where it
    /// is not set.
    pub fn from_variables(get: &dyn Fn(&str) -> Option<OsString>) -> HubConfig {
        let text = |name: &str| get(name)?.into_string().ok().map(|t| t.trim().to_string()).filter(|t| !t.is_empty());
        let user = get("HOME").map(PathBuf::from).unwrap_or_else(std::env::temp_dir);
        let folder = |name: &str| {
            let path = PathBuf::from(get(name).filter(|value| !value.is_empty())?);
            Some(match path.strip_prefix("~") {
                Ok(rest) => user.join(rest),
                Err(_) => path,
            })
        };
        let caches = folder("XDG_CACHE_HOME").unwrap_or_else(|| user.join(".cache"));
        let home = folder("HF_HOME").unwrap_or_else(|| caches.join("huggingface"));
        let cache = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| PUBLIC_HUB.into());
        let yes = |value: String| matches!(value.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE");
        HubConfig {
            cache: cache.unwrap_or_else(|| home.join("hub")),
            endpoint: endpoint.trim_end_matches('/').into(),
            offline: text("HF_HUB_OFFLINE").is_some_and(yes),
            token: text("HF_TOKEN"),
            token_file: folder("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")),
        }
    }

    /// The cache.
    #[must_use]
    pub fn cache(&self) -> HubCache {
        HubCache::new(&self.cache)
    }

    /// The token to show to the hub. A file that is not there or unreadable is none: most models need no token.
    pub(super) fn token(&self) -> Option<String> {
        self.token.clone().or_else(|| read_token(&self.token_file))
    }
}

fn read_token(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_string()).filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(variables: &[(&str, &str)]) -> HubConfig {
        HubConfig::from_variables(&|name| variables.iter().find(|(key, _)| *key == name).map(|(_, v)| v.into()))
    }

    #[test]
    fn the_nearer_variable_wins() {
        let home = ("HOME", "/home/a");
        let cache = |more: &[(&str, &str)]| config(&[&[home], more].concat()).cache;
        assert_eq!(cache(&[]), Path::new("/home/a/.cache/huggingface/hub"));
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/h/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HF_HUB_CACHE", "~/c")]), Path::new("/home/a/c"));
        assert_eq!(cache(&[("HF_HOME", "")]), Path::new("/home/a/.cache/huggingface/hub"));
    }

    #[test]
    fn offline_and_endpoint_are_read_as_the_hubs_tools_do() {
        for (value, offline) in [("1", true), ("true", true), ("Yes", true), ("0", false), ("", false), ("no", false)] {
            assert_eq!(config(&[("HF_HUB_OFFLINE", value)]).offline, offline, "{value}");
        }
        assert_eq!(config(&[("HF_ENDPOINT", "http://localhost:1/")]).endpoint, "http://localhost:1");
        assert_eq!(config(&[]).endpoint, "https://huggingface.co");
    }

    #[test]
    fn the_token_is_taken_from_the_variable_then_from_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        assert_eq!(config(&[("HF_HOME", home)]).token(), None);
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(config(&[("HF_HOME", home)]).token().unwrap(), "hf_file");
        assert_eq!(config(&[("HF_HOME", home), ("HF_TOKEN", "hf_variable\n")]).token().unwrap(), "hf_variable");
    }
}
