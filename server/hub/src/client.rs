//! What is asked of the hub over HTTP: which files a revision has, what is known of a file, and its bytes.
//!
//! The requests are those of the Python library `huggingface_hub`, so that mirrors that serve it serve this, too.

use std::time::Duration;

use serde_json::Value;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, header};
use ureq::{Agent, Body};

use super::config::HubConfig;
use super::files::check_path;
use super::id::{ModelId, is_commit};
use crate::error::{HubError, Result};

/// Patience with a server that has stopped sending.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(20);
/// Redirects from an old name of a model to its new one, at most.
const RENAMES: usize = 5;
/// Bytes of a description of a repository, at most.
const DESCRIPTION_LIMIT: u64 = 64 << 20;

/// A connection to the hub for one model.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    id: ModelId,
}

/// A revision of a model.
pub(super) struct Revision {
    /// Its full hash.
    pub(super) commit: String,
    /// The names of its files.
    pub(super) files: Vec<String>,
}

/// What is known of a file before it is fetched.
#[derive(Debug)]
pub(super) struct RemoteFile {
    /// Its name.
    pub(super) name: String,
    /// Names its contents: their SHA-256 for files in large file storage, else Git's hash of them.
    pub(super) etag: String,
    /// Its bytes.
    pub(super) size: u64,
    /// Where it is.
    pub(super) url: String,
}

impl Client {
    pub(super) fn new(config: &HubConfig, id: &ModelId) -> Client {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("quire/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            // Large files lie with other hosts, which the token does not concern.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .build();
        Client { agent: agent.into(), endpoint: config.endpoint.clone(), token: config.token(), id: id.clone() }
    }

    /// The model's page.
    pub(super) fn page(&self) -> String {
        format!("{}/{}", self.endpoint, self.id.repository())
    }

    /// The commit and the files of the model's revision.
    pub(super) fn revision(&self) -> Result<Revision> {
        let (repository, revision) = (self.id.repository(), encoded(self.id.revision()));
        let url = format!("{}/api/models/{repository}/revision/{revision}", self.endpoint);
        let mut response = retrying(|| self.send(&url, "GET", 0))?;
        self.accept(&url, &response)?;
        let protocol = |expected, found: String| HubError::Protocol { url: url.clone(), expected, found };
        let body = response.body_mut().with_config().limit(DESCRIPTION_LIMIT).read_to_vec();
        let body = body.map_err(|e| HubError::Network { url: url.clone(), problem: e.to_string() })?;
        let parsed: Value =
            serde_json::from_slice(&body).map_err(|e| protocol("a JSON description of a model", e.to_string()))?;
        let commit = parsed["sha"].as_str().filter(|sha| is_commit(sha));
        let commit = commit.ok_or_else(|| protocol("a commit in `sha`", parsed["sha"].to_string()))?;
        let siblings = parsed["siblings"].as_array();
        let siblings = siblings.ok_or_else(|| protocol("a list of files in `siblings`", "none".into()))?;
        let mut files = Vec::with_capacity(siblings.len());
        for sibling in siblings {
            let name = sibling["rfilename"].as_str();
            let name = name.ok_or_else(|| protocol("a file's name in `rfilename`", sibling.to_string()))?;
            check_path(name, &url)?;
            files.push(name.to_string());
        }
        Ok(Revision { commit: commit.into(), files })
    }

    /// Size and hash of a file of a commit.
    pub(super) fn describe(&self, commit: &str, name: &str) -> Result<RemoteFile> {
        let repository = self.id.repository();
        let parts: Vec<String> = name.split('/').map(encoded).collect();
        let url = format!("{}/{repository}/resolve/{commit}/{}", self.endpoint, parts.join("/"));
        let response = self.head(&url)?;
        self.accept(&url, &response)?;
        let headers = response.headers();
        let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag")).map(unquoted).unwrap_or_default();
        if !is_hash_like(etag) {
            let expected = "a hash in X-Linked-Etag or ETag";
            return Err(HubError::Protocol { url, expected, found: format!("`{etag}`") });
        }
        let size = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
        let Some(size) = size.and_then(|size| size.parse().ok()) else {
            let expected = "a size in X-Linked-Size or Content-Length";
            return Err(HubError::Protocol { url, expected, found: size.unwrap_or("none").into() });
        };
        Ok(RemoteFile { name: name.into(), etag: etag.into(), size, url })
    }

    /// The headers of a file at the hub itself; where it lies elsewhere, those of the redirect, which describe it.
    fn head(&self, url: &str) -> Result<Response<Body>> {
        let mut at = url.to_string();
        for _ in 0..RENAMES {
            let response = retrying(|| self.send(&at, "HEAD", 0))?;
            let location = text(response.headers(), "location").filter(|_| response.status().is_redirection());
            // The model has another name by now.
            match location.filter(|to| to.starts_with('/') && !to.starts_with("//")) {
                Some(path) => at = format!("{}{path}", origin(&self.endpoint)),
                None => return Ok(response),
            }
        }
        let found = format!("more than {RENAMES}");
        Err(HubError::Protocol { url: url.into(), expected: "few redirects", found })
    }

    /// The bytes of a file from `start` on. The caller looks at the status.
    pub(super) fn fetch(&self, url: &str, start: u64) -> Result<Response<Body>> {
        self.send(url, "GET", start)
    }

    fn send(&self, url: &str, method: &str, start: u64) -> Result<Response<Body>> {
        // Hashes and ranges are those of the file, not of a compressed form.
        let mut request = ureq::http::Request::builder().method(method).uri(url).header("accept-encoding", "identity");
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let network = |problem: String| HubError::Network { url: url.into(), problem };
        let request = request.body(()).map_err(|e| network(e.to_string()))?;
        let redirects = if method == "HEAD" { 0 } else { 10 };
        let request = self.agent.configure_request(request).max_redirects(redirects).build();
        self.agent.run(request).map_err(|e| network(e.to_string()))
    }

    /// Takes an answer, or says why it is none.
    pub(super) fn accept(&self, url: &str, response: &Response<Body>) -> Result<()> {
        let status = response.status();
        let described = status.is_redirection() && response.headers().contains_key("x-linked-etag");
        if status.is_success() || described {
            return Ok(());
        }
        let (id, page, with_token) = (self.id.to_string(), self.page(), self.token.is_some());
        let not_found = |what| HubError::NotFound { id: id.clone(), page: page.clone(), what };
        Err(match (status.as_u16(), text(response.headers(), "x-error-code")) {
            (401 | 403, Some("GatedRepo")) => HubError::Gated { id, page, with_token },
            (401 | 403, _) => HubError::Denied { id, page, status: status.as_u16(), with_token },
            (404, Some("RevisionNotFound")) => not_found("revision"),
            (404, Some("EntryNotFound")) => not_found("file"),
            (404, _) => not_found("model"),
            (status, _) => HubError::Status { url: url.into(), status },
        })
    }
}

/// Pauses between attempts: half a second, doubled each time, until patience is at its end.
#[derive(Default)]
pub(super) struct Patience {
    failures: u32,
}

impl Patience {
    const ATTEMPTS: u32 = 4;

    /// How long to wait before the next attempt; `None`: enough of it.
    pub(super) fn next(&mut self) -> Option<Duration> {
        self.failures += 1;
        (self.failures < Self::ATTEMPTS).then(|| Duration::from_millis(250 << self.failures))
    }
}

/// Whether trying again may help.
pub(super) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 429 | 500..=599)
}

fn retrying(send: impl Fn() -> Result<Response<Body>>) -> Result<Response<Body>> {
    let mut patience = Patience::default();
    loop {
        let result = send();
        let passing = result.as_ref().map_or(true, |response| is_passing(response.status().as_u16()));
        match patience.next() {
            Some(pause) if passing => std::thread::sleep(pause),
            _ => return result,
        }
    }
}

pub(super) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim)
}

/// An ETag without its quotes and the mark of a weak one.
fn unquoted(etag: &str) -> &str {
    etag.trim_start_matches("W/").trim_matches('"')
}

/// Whether an ETag can be a file's name.
fn is_hash_like(etag: &str) -> bool {
    (1..=128).contains(&etag.len()) && etag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
}

/// Scheme and host of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    url[host..].find('/').map_or(url, |end| &url[..host + end])
}

/// A text as one part of a URL's path.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_built() {
        assert_eq!(origin("https://hub.example/mirror/x"), "https://hub.example");
        assert_eq!(origin("http://127.0.0.1:80"), "http://127.0.0.1:80");
        assert_eq!(encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encoded("é +"), "%C3%A9%20%2B");
    }

    #[test]
    fn an_etag_that_is_no_file_name_is_none() {
        assert_eq!(unquoted("W/\"abc\""), "abc");
        assert!(is_hash_like("abc123") && is_hash_like("d41d8cd9-3"));
        assert!(!is_hash_like("../x") && !is_hash_like("") && !is_hash_like(&"a".repeat(129)) && !is_hash_like("a.b"));
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for status in [408, 429, 500, 502, 503, 504, 599] {
            assert!(is_passing(status), "{status}");
        }
        for status in [200, 206, 301, 400, 401, 403, 404, 410, 416, 499, 600] {
            assert!(!is_passing(status), "{status}");
        }
    }

    #[test]
    fn patience_ends() {
        let mut patience = Patience::default();
        let pauses: Vec<_> = std::iter::from_fn(|| patience.next()).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000]);
    }
}
