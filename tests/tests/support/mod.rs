//! What the tests that drive the real binary share.
#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;

/// The root of the source tree.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The reference model's folder.
pub(crate) fn model() -> PathBuf {
    root().join("eval/models/reference")
}

/// The binary beside these tests. Cargo does not build it for the tests of another package: the test command does, and
/// building it from here would choose other features of shared dependencies and compile them all once more.
pub(crate) fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| built("quire"))
}

/// The same of `quire-bench`, which finds the other beside itself.
pub(crate) fn bench_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| built("quire-bench"))
}

fn built(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let binary = test.parent().and_then(Path::parent).unwrap().join(name);
    assert!(binary.exists(), "{} is missing: run `cargo build --release --workspace` first", binary.display());
    binary
}

/// The program with no settings from outside but its data folder and the model.
pub(crate) fn quire(data_dir: &Path) -> Command {
    program(binary(), data_dir)
}

/// `quire-bench` with no settings from outside.
pub(crate) fn bench(data_dir: &Path) -> Command {
    program(bench_binary(), data_dir)
}

fn program(path: &Path, data_dir: &Path) -> Command {
    let mut command = Command::new(path);
    clean(&mut command, data_dir);
    // Not by flags: not every command uses both.
    command.env("QUIRE_DATA_DIR", data_dir).env("QUIRE_MODEL", model());
    command
}

/// A Python that can import `package`: named by `QUIRE_TEST_PYTHON`, else of the virtual environment in the source
/// tree, else `python3`.
pub(crate) fn python(package: &str) -> PathBuf {
    let named = std::env::var_os("QUIRE_TEST_PYTHON").map(PathBuf::from);
    let local = Some(root().join(".venv/bin/python")).filter(|path| path.exists());
    let python = named.or(local).unwrap_or_else(|| "python3".into());
    let check = Command::new(&python).args(["-c", &format!("import {package}")]).output();
    assert!(
        check.is_ok_and(|output| output.status.success()),
        "{} cannot import the public `{package}` package, which this test compares with. Set QUIRE_TEST_PYTHON to a \
         Python that can: python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements-test.txt",
        python.display()
    );
    python
}

/// Takes the settings of whoever runs the tests out of a command's environment.
pub(crate) fn clean(command: &mut Command, data_dir: &Path) {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy().to_ascii_uppercase();
        if ["QUIRE_", "HF_", "HUGGING"].iter().any(|start| text.starts_with(start)) || text.ends_with("_PROXY") {
            command.env_remove(name);
        }
    }
    // Nor do the settings and the history of whoever runs the tests lie there.
    let home = data_dir.parent().unwrap();
    command.env("XDG_CONFIG_HOME", home.join("config")).env("XDG_STATE_HOME", home.join("state"));
    command.current_dir(home).stdin(Stdio::null());
}

/// Output as text: stdout, stderr.
pub(crate) fn texts(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into(), String::from_utf8_lossy(&output.stderr).into())
}

/// Runs to the end and expects success.
pub(crate) fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert!(output.status.success(), "{command:?}: {}\n{stdout}\n{stderr}", output.status);
    stdout
}

/// Runs to the end, expects the exit code and all of `parts` in the error message.
pub(crate) fn fail(command: &mut Command, code: i32, parts: &[&str]) -> String {
    let output = command.output().unwrap();
    let (stdout, stderr) = texts(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}:\n{stdout}\n{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{command:?}: expected `{part}` in:\n{stderr}");
    }
    stderr
}

/// A question about the examples.
pub(crate) struct Example {
    pub(crate) question: String,
    pub(crate) answer: String,
    pub(crate) documents: Vec<PathBuf>,
}

/// The first question of the examples that one document answers; with a second document beside it.
pub(crate) fn example() -> Example {
    let folder = root().join("examples");
    let lines = std::fs::read_to_string(folder.join("questions.jsonl")).unwrap();
    let questions: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let chosen = questions.iter().find(|q| q["documents"].as_array().unwrap().len() == 1).unwrap();
    let needed = chosen["documents"][0].as_str().unwrap();
    let other = if needed == "12-gazetteer.txt" { "13-river-walk.md" } else { "12-gazetteer.txt" };
    Example {
        question: chosen["question"].as_str().unwrap().into(),
        answer: chosen["answer"].as_str().unwrap().into(),
        documents: vec![folder.join(needed), folder.join(other)],
    }
}

/// A data folder whose collection `default` has the documents of [`example`].
pub(crate) fn ingested() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    succeed(quire(&dir.path().join("data")).arg("ingest").args(example().documents));
    dir
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    stdout: BufReader<ChildStdout>,
}

impl Server {
    /// Starts `quire serve` on a free port and waits until it takes requests.
    pub(crate) fn start(data_dir: &Path, more: &[&str]) -> Server {
        Server::from(quire(data_dir).args(["serve", "--port", "0", "--json"]).args(more))
    }

    /// The same with everything that it logs in a file.
    pub(crate) fn start_logged(data_dir: &Path, log: &Path, more: &[&str]) -> Server {
        let log = std::fs::File::create(log).unwrap();
        Server::from(quire(data_dir).args(["serve", "--port", "0", "--json"]).args(more).stderr(log))
    }

    /// Starts a command that serves, and waits until it takes requests.
    pub(crate) fn from(command: &mut Command) -> Server {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let listening = event(&mut stdout, "listening");
        let address = listening["address"].as_str().unwrap().parse().unwrap();
        event(&mut stdout, "ready");
        Server { child, address, stdout }
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        request(self.address, "GET", path, &[], b"")
    }

    pub(crate) fn chat(&self, body: &Value) -> Response {
        let body = body.to_string();
        request(self.address, "POST", "/v1/chat/completions", &[("content-type", "application/json")], body.as_bytes())
    }

    /// A metric without regard to its labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
        let line = line.unwrap_or_else(|| panic!("no metric {name} in:\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    pub(crate) fn terminate(&self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    }

    /// Waits for the end of the process.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn event(stdout: &mut BufReader<ChildStdout>, name: &str) -> Value {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    let value: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("expected `{name}`, got `{line}`: {e}"));
    assert_eq!(value["event"], name, "{line}");
    value
}

/// An HTTP response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.text()))
    }
}

/// Sends a request on a connection of its own and leaves the answer to be read.
pub(crate) fn send(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (key, value) in headers {
        head.push_str(&format!("{key}: {value}\r\n"));
    }
    head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses early may close before it has read everything.
    let _ = stream.write_all(body);
    stream
}

/// Sends a request and reads the whole answer.
pub(crate) fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Response {
    read(send(address, method, path, headers, body))
}

/// Reads an answer to its end.
pub(crate) fn read(mut stream: TcpStream) -> Response {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    let split = bytes.windows(4).position(|w| w == b"\r\n\r\n").expect("no end of the headers");
    let head = String::from_utf8_lossy(&bytes[..split]).into_owned();
    let mut lines = head.lines();
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key.to_ascii_lowercase(), value.trim().to_string()))
        .collect();
    let raw = &bytes[split + 4..];
    let chunked = headers.iter().any(|(key, value)| key == "transfer-encoding" && value == "chunked");
    Response { status, headers, body: if chunked { unchunk(raw) } else { raw.to_vec() } }
}

fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = raw.windows(2).position(|w| w == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..end]).unwrap().trim(), 16).unwrap();
        if size == 0 {
            break;
        }
        body.extend_from_slice(&raw[end + 2..end + 2 + size]);
        raw = &raw[end + 2 + size + 2..];
    }
    body
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "still not after 30 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
