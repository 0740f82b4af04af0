//! The bench of the server under bad weather: many requests at once, and many connections that never finish a request.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use eval::{Output, Record, RunInfo};
use serde::Serialize;
use serde_json::{Value, json};

use super::child::Server;
use super::dispatch::ScratchDir;
use crate::error::{BenchError, Result};
use http_api::raise_open_files;
use settings::{QuireError, Settings};

/// The public client, many times.
const BURST: &str = include_str!("../../peers/openai_burst.py");
/// Tokens of each answer of the burst at most.
const ANSWER_TOKENS: usize = 16;
/// Times that `/livez` is asked; the slowest counts.
const PROBES: usize = 20;
/// Time after which an answer of `/livez` no longer counts.
const PROBE_LIMIT: Duration = Duration::from_secs(10);
/// Files that this process needs beside the connections.
const OTHER_FILES: u64 = 64;

/// What the bench does.
#[derive(Clone, Debug)]
pub(super) struct HttpOptions {
    /// Chat completions that are sent at once.
    pub(super) requests: usize,
    /// Connections that stay half open.
    pub(super) connections: usize,
    /// Python with the `openai` package.
    pub(super) python: PathBuf,
    /// Longest time that the server may take to become ready.
    pub(super) limit: Duration,
    /// Where records go.
    pub(super) output: Output,
}

/// Figures of the bench.
#[derive(Clone, Debug, Serialize)]
pub(super) struct HttpReport {
    /// All of them as records.
    pub(super) records: Vec<Record>,
}

impl HttpReport {
    /// For people.
    pub(super) fn table(&self) -> String {
        let line = |r: &Record| format!("| {} | {} | {:.4} | {} |", r.case, r.metric, r.value, r.unit);
        let lines: Vec<String> = self.records.iter().map(line).collect();
        format!("| case | metric | value | unit |\n|---|---|---|---|\n{}", lines.join("\n"))
    }
}

/// Starts a server for each of the two and measures it.
///
/// # Errors
/// Too few open files, a Python without `openai`, a server that does not become ready; what keeps records from being written.
pub(super) fn http_bench(
    settings: &Settings,
    program: &Path,
    options: &HttpOptions,
    news: &mut dyn FnMut(&str),
) -> Result<HttpReport> {
    let files = raise_open_files();
    if files < options.connections as u64 + OTHER_FILES {
        let found = options.connections;
        let problem =
            format!("{found} connections need more than the {files} files that may be open: raise `ulimit -Hn`");
        return Err(QuireError::CheckFailed(problem).into());
    }
    options.output.prepare()?;
    let with_server = |measure: &mut dyn FnMut(SocketAddr) -> Result<Value>| {
        let scratch = ScratchDir::new(&settings.data_dir, "bench-http")?;
        let mut server = Server::start(settings, program, scratch.path(), options.limit)?;
        server.wait_ready()?;
        let measured = measure(server.address())?;
        server.stop()?;
        Ok::<_, BenchError>(measured)
    };
    let model = settings.served_name(&settings.model_dir()?);
    let burst = with_server(&mut |address| burst(&options.python, address, &model, options.requests))?;
    news(&format!("{} requests at once: {burst}", options.requests));
    let half_open = with_server(&mut |address| half_open(address, options.connections))?;
    news(&format!("{} connections half open: {half_open}", options.connections));

    let config = json!({
        "max_sequences": settings.max_sequences, "queue": settings.queue, "max_connections": settings.max_connections,
        "answer_tokens": ANSWER_TOKENS, "burst": burst, "half_open": half_open,
    });
    let info = RunInfo::start(&options.output).with_config(config);
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap_or(f64::NAN);
    let at_once = format!("{}-at-once", options.requests);
    let records = vec![
        info.record("http", &at_once, "answered", "requests", number(&burst, "answered"), options.requests),
        info.record("http", &at_once, "seconds", "s", number(&burst, "seconds"), 1),
        info.record(
            "http",
            &format!("half-open-{}", options.connections),
            "livez_seconds",
            "s",
            number(&half_open, "livez_seconds"),
            PROBES,
        ),
    ];
    info.write(&records)?;
    Ok(HttpReport { records })
}

/// What the script says of its requests.
fn burst(python: &Path, address: SocketAddr, model: &str, requests: usize) -> Result<Value> {
    let failed = |source| QuireError::Io { action: "run", path: python.into(), source };
    let output = Command::new(python)
        .args(["-c", BURST, &format!("http://{address}/v1"), model])
        .args([requests.to_string(), ANSWER_TOKENS.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(failed)?;
    let told = output.status.success().then(|| serde_json::from_slice(&output.stdout).ok()).flatten();
    told.ok_or_else(|| {
        let problem = format!(
            "{} could not send requests with the public `openai` client; it says why on stderr. Name a Python that has \
             the package with --python",
            python.display()
        );
        QuireError::CheckFailed(problem).into()
    })
}

/// Beginnings of requests that never end: nothing, a head, a body.
const BEGINNINGS: [&str; 3] = [
    "",
    "GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{",
];

/// Opens connections that send a byte now and then, and measures how long `/livez` takes meanwhile.
fn half_open(address: SocketAddr, connections: usize) -> Result<Value> {
    let failed = |source| QuireError::Listen { address: address.to_string(), source };
    let mut open = Vec::with_capacity(connections);
    for number in 0..connections {
        let mut connection = TcpStream::connect_timeout(&address, PROBE_LIMIT).map_err(failed)?;
        // One that the server has closed already is no longer half open, which is what it is for.
        let _ = connection.write_all(BEGINNINGS[number % BEGINNINGS.len()].as_bytes());
        connection.set_nonblocking(true).map_err(failed)?;
        open.push(connection);
    }
    let (mut slowest, mut answered) = (0.0_f64, 0);
    for _ in 0..PROBES {
        for connection in &mut open {
            let _ = connection.write(b"x");
        }
        let begun = Instant::now();
        answered += usize::from(is_live(address));
        slowest = slowest.max(begun.elapsed().as_secs_f64());
    }
    let still_open = open.iter_mut().filter_map(|connection| connection.read(&mut [0; 64]).err());
    let still_open = still_open.filter(|error| error.kind() == std::io::ErrorKind::WouldBlock).count();
    if answered < PROBES {
        let problem =
            format!("/livez answered {answered} of {PROBES} times beside {connections} half-open connections");
        return Err(QuireError::CheckFailed(problem).into());
    }
    Ok(json!({"livez_seconds": slowest, "answered": answered, "still_open": still_open}))
}

fn is_live(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<[u8; 12]> {
        let mut connection = TcpStream::connect_timeout(&address, PROBE_LIMIT)?;
        connection.set_read_timeout(Some(PROBE_LIMIT))?;
        connection.write_all(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut status = [0; 12];
        connection.read_exact(&mut status)?;
        Ok(status)
    };
    ask().is_ok_and(|status| status.ends_with(b" 200"))
}
