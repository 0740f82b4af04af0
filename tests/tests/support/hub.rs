//! A hub on this machine: the part of the Hugging Face hub's API that fetching a model needs, and its misfortunes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

use ring::digest;
use serde_json::{Value, json};

/// The one commit of the one model.
pub(crate) const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// What the hub has and how it behaves.
#[derive(Clone, Default)]
pub(crate) struct Behaviour {
    /// Files of `test/model`.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// What the description says instead of the commit.
    pub(crate) commit: Option<&'static str>,
    /// Only who shows this token is let in.
    pub(crate) token: Option<&'static str>,
    /// A file with an ETag that is not its hash.
    pub(crate) etag: Option<(&'static str, &'static str)>,
    /// Of a file, a byte is sent wrong.
    pub(crate) corrupt: Option<&'static str>,
    /// Of a file, the connection breaks after so many bytes, so many times.
    pub(crate) cut: Option<(&'static str, usize, usize)>,
    /// Of a file, sending stops in the middle until [`Hub::release`].
    pub(crate) hold: Option<&'static str>,
    /// Ranges are not known here.
    pub(crate) without_ranges: bool,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: Option<String>,
    pub(crate) authorization: Option<String>,
}

#[derive(Default)]
struct State {
    behaviour: Mutex<Behaviour>,
    asked: Mutex<Vec<Asked>>,
    held: Mutex<bool>,
    release: Condvar,
}

/// A running hub. Its thread ends with the process.
pub(crate) struct Hub {
    address: SocketAddr,
    state: Arc<State>,
}

impl Hub {
    pub(crate) fn start(behaviour: Behaviour) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State { behaviour: Mutex::new(behaviour), held: Mutex::new(true), ..State::default() });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let state = Arc::clone(&shared);
                // A client that goes away is no error of the hub.
                std::thread::spawn(move || drop(serve(&state, stream.unwrap(), address)));
            }
        });
        Hub { address, state }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.state.behaviour.lock().unwrap());
    }

    /// Lets what is held go on.
    pub(crate) fn release(&self) {
        *self.state.held.lock().unwrap() = false;
        self.state.release.notify_all();
    }

    /// What has been asked for since the last call.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.state.asked.lock().unwrap())
    }
}

/// Files in large file storage are known by their SHA-256, others by Git's hash.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin") || name == "tokenizer.json"
}

fn hexadecimal(algorithm: &'static digest::Algorithm, bytes: &[u8]) -> String {
    digest::digest(algorithm, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn hash(name: &str, contents: &[u8]) -> String {
    if is_large(name) {
        return hexadecimal(&digest::SHA256, contents);
    }
    let head = format!("blob {}\0", contents.len());
    hexadecimal(&digest::SHA1_FOR_LEGACY_USE_ONLY, &[head.as_bytes(), contents].concat())
}

fn serve(state: &State, mut stream: TcpStream, address: SocketAddr) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut asked = Asked { method, path, range: None, authorization: None };
    for line in lines {
        let line = line?;
        let Some((key, value)) = line.split_once(':') else { break };
        let value = Some(value.trim().to_string());
        match key.to_ascii_lowercase().as_str() {
            "range" => asked.range = value,
            "authorization" => asked.authorization = value,
            _ => {}
        }
    }
    state.asked.lock().unwrap().push(asked.clone());
    let behaviour = state.behaviour.lock().unwrap().clone();
    let path = asked.path.split('?').next().unwrap();
    if let Some(name) = path.strip_prefix("/storage/") {
        return send(state, &behaviour, &mut stream, &asked, name, &[]);
    }
    let token = behaviour.token.map(|token| format!("Bearer {token}"));
    if token.is_some() && asked.authorization != token {
        return refuse(&mut stream, "401 Unauthorized", "GatedRepo");
    }
    if let Some(revision) = path.strip_prefix("/api/models/test/model/revision/") {
        return match ["main", "refs%2Fpr%2F1", COMMIT].contains(&revision) {
            true => whole(&mut stream, &description(&behaviour)),
            false => refuse(&mut stream, "404 Not Found", "RevisionNotFound"),
        };
    }
    // Newer clients list the files here.
    if path == format!("/api/models/test/model/tree/{COMMIT}") {
        return whole(&mut stream, &tree(&behaviour));
    }
    let Some(name) = path.strip_prefix(&format!("/test/model/resolve/{COMMIT}/")) else {
        // Who is not known is told nothing about what there is.
        return match asked.authorization {
            Some(_) => refuse(&mut stream, "404 Not Found", "RepoNotFound"),
            None => refuse(&mut stream, "401 Unauthorized", "RepoNotFound"),
        };
    };
    let Some(contents) = behaviour.files.get(name) else {
        return refuse(&mut stream, "404 Not Found", "EntryNotFound");
    };
    let etag = match behaviour.etag {
        Some((file, etag)) if file == name => etag.to_string(),
        _ => hash(name, contents),
    };
    let commit = format!("X-Repo-Commit: {COMMIT}");
    if is_large(name) {
        let port = address.port();
        return write!(
            stream,
            "HTTP/1.1 302 Found\r\n{commit}\r\nX-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nETag: \"another\"\r\n\
             Location: http://localhost:{port}/storage/{name}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            contents.len()
        );
    }
    send(state, &behaviour, &mut stream, &asked, name, &[commit, format!("ETag: \"{etag}\"")])
}

fn description(behaviour: &Behaviour) -> Value {
    let siblings: Vec<Value> = behaviour.files.keys().map(|name| json!({"rfilename": name})).collect();
    json!({
        "id": "test/model", "modelId": "test/model", "private": false, "tags": [], "downloads": 0, "likes": 0,
        "sha": behaviour.commit.unwrap_or(COMMIT), "siblings": siblings,
    })
}

fn tree(behaviour: &Behaviour) -> Value {
    let entry = |(name, contents): (&String, &Vec<u8>)| {
        let (size, oid) = (contents.len(), hash(name, contents));
        let mut entry = json!({"type": "file", "path": name, "size": size, "oid": oid});
        if is_large(name) {
            entry["oid"] = json!(COMMIT);
            entry["lfs"] = json!({"oid": oid, "size": size, "pointerSize": 134});
        }
        entry
    };
    behaviour.files.iter().map(entry).collect()
}

fn whole(stream: &mut TcpStream, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close";
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn refuse(stream: &mut TcpStream, status: &str, code: &str) -> std::io::Result<()> {
    write!(stream, "HTTP/1.1 {status}\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

/// A file, or what was asked of it, with everything that may go wrong on the way.
fn send(
    state: &State,
    behaviour: &Behaviour,
    stream: &mut TcpStream,
    asked: &Asked,
    name: &str,
    headers: &[String],
) -> std::io::Result<()> {
    let mut contents = behaviour.files[name].clone();
    if behaviour.corrupt == Some(name) {
        let middle = contents.len() / 2;
        contents[middle] ^= 1;
    }
    let range = asked.range.as_ref().filter(|_| !behaviour.without_ranges);
    let start: Option<usize> = range.map(|r| r.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let mut head: Vec<String> = headers.to_vec();
    let (status, body) = match start {
        None => ("200 OK", &contents[..]),
        Some(start) if start >= contents.len() => ("416 Range Not Satisfiable", &contents[..0]),
        Some(start) => {
            head.push(format!("Content-Range: bytes {start}-{}/{}", contents.len() - 1, contents.len()));
            ("206 Partial Content", &contents[start..])
        }
    };
    head.push(format!("Content-Length: {}", body.len()));
    write!(stream, "HTTP/1.1 {status}\r\n{}\r\nConnection: close\r\n\r\n", head.join("\r\n"))?;
    if asked.method == "HEAD" {
        return Ok(());
    }
    if let Some((file, after, times)) = behaviour.cut
        && file == name
        && times > 0
    {
        let after = after.min(body.len());
        state.behaviour.lock().unwrap().cut = Some((file, after, times - 1));
        return stream.write_all(&body[..after]);
    }
    if behaviour.hold == Some(name) {
        stream.write_all(&body[..body.len() / 2])?;
        let held = state.held.lock().unwrap();
        drop(state.release.wait_while(held, |held| *held).unwrap());
        return stream.write_all(&body[body.len() / 2..]);
    }
    stream.write_all(body)
}
