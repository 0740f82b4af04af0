//! The start bench: from starting `quire serve` to the moment that it takes requests.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use eval::{Output, Record, RunInfo, median};
use serde::Serialize;
use serde_json::{Value, json};

use super::bench::ScratchDir;
use crate::config::Settings;
use crate::error::{QuireError, Result};

/// Time between two looks at `/readyz`.
const LOOK: Duration = Duration::from_millis(2);
/// Time for the child to end after SIGTERM.
const GOODBYE: Duration = Duration::from_secs(20);

/// What the bench does.
#[derive(Clone, Debug)]
pub(super) struct StartOptions {
    /// Timed starts; one more before them warms the page cache.
    pub(super) repeats: usize,
    /// Longest time that a start may take.
    pub(super) limit: Duration,
    /// First part of the records' case.
    pub(super) label: String,
    /// Where records go.
    pub(super) output: Output,
}

/// Figures of the bench.
#[derive(Clone, Debug, Serialize)]
pub(super) struct StartReport {
    /// All of them as records.
    pub(super) records: Vec<Record>,
}

impl StartReport {
    /// For people.
    pub(super) fn table(&self) -> String {
        let lines =
            self.records.iter().map(|r| format!("| {} | {} | {:.3} | {} |", r.case, r.metric, r.value, r.samples));
        let lines: Vec<String> = lines.collect();
        format!("| case | metric | s | samples |\n|---|---|---|---|\n{}", lines.join("\n"))
    }
}

/// One start, in seconds from the start of the process.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Start {
    /// The port is open; the model begins to be loaded.
    listening: f64,
    /// `/readyz` says 200.
    ready: f64,
}

/// Starts `program serve` with these settings, on a free port and with a data folder of its own, again and again.
///
/// # Errors
/// A server that ends or does not become ready in time; what keeps records from being written.
pub(super) fn start_bench(
    settings: &Settings,
    program: &Path,
    options: &StartOptions,
    news: &mut dyn FnMut(&str),
) -> Result<StartReport> {
    let model = settings.model_dir()?;
    let config = json!({
        "model": model.display().to_string(), "weight_bytes": weight_bytes(&model), "repeats": options.repeats,
        "measured": "from starting the process to 200 from /readyz; page cache warmed by a start before",
        "max_sequences": settings.max_sequences, "threads": settings.threads,
    });
    let info = RunInfo::start(&options.output).with_config(config);
    let mut starts = Vec::new();
    for round in 0..=options.repeats {
        let scratch = ScratchDir::new(&settings.data_dir, "bench-start")?;
        let start = one_start(settings, program, scratch.path(), options.limit)?;
        let state = if round == 0 { "warm-up" } else { "timed" };
        news(&format!("start {round}: {state}, ready after {:.3} s", start.ready));
        if round > 0 {
            starts.push(start);
        }
    }
    let records = figures(&info, &format!("{}/warm", options.label), &starts);
    info.write(&records)?;
    Ok(StartReport { records })
}

/// Bytes of the files of weights.
fn weight_bytes(model: &Path) -> u64 {
    let listed = std::fs::read_dir(model).into_iter().flatten().flatten();
    let weights = listed.filter(|entry| entry.path().extension().is_some_and(|x| x == "safetensors"));
    weights.filter_map(|entry| std::fs::metadata(entry.path()).ok()).map(|file| file.len()).sum()
}

fn figures(info: &RunInfo, case: &str, starts: &[Start]) -> Vec<Record> {
    let figure = |metric, of: &dyn Fn(&Start) -> f64| {
        let seconds: Vec<f64> = starts.iter().map(of).collect();
        info.record("start", case, metric, "s", (median(&seconds) * 1e4).round() / 1e4, seconds.len())
    };
    vec![
        figure("seconds", &|start| start.ready),
        figure("seconds_to_listening", &|start| start.listening),
        figure("seconds_loading", &|start| start.ready - start.listening),
    ]
}

fn one_start(settings: &Settings, program: &Path, data_dir: &Path, limit: Duration) -> Result<Start> {
    let failed = |source| QuireError::Io { action: "run", path: program.into(), source };
    let mut command = Command::new(program);
    command.args(["serve", "--json"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    pass_settings(&mut command, settings, data_dir)?;
    let begun = Instant::now();
    let mut server = Server { child: command.spawn().map_err(failed)?, program: program.into(), begun, limit };
    let lines = server.lines();
    let address = server.address(&lines)?;
    let listening = begun.elapsed().as_secs_f64();
    while !is_ready(address) {
        server.check_running()?;
        std::thread::sleep(LOOK);
    }
    let ready = begun.elapsed().as_secs_f64();
    server.stop()?;
    Ok(Start { listening, ready })
}

/// The settings as the child's environment, which wins over any file; all but those of where to listen and to write.
fn pass_settings(command: &mut Command, settings: &Settings, data_dir: &Path) -> Result<()> {
    let own = Settings {
        host: "127.0.0.1".into(),
        port: 0,
        api_key: None,
        api_key_file: None,
        data_dir: data_dir.into(),
        model: Some(settings.model_dir()?),
        ..settings.clone()
    };
    let values = serde_json::to_value(&own)
        .map_err(|e| QuireError::Internal(format!("the settings cannot be passed on: {e}")))?;
    for (key, value) in values.as_object().into_iter().flatten() {
        let name = format!("QUIRE_{}", key.to_ascii_uppercase());
        match value {
            Value::Null => command.env_remove(name),
            Value::String(text) => command.env(name, text),
            other => command.env(name, other.to_string()),
        };
    }
    Ok(())
}

/// A running server. Dropping it kills it.
struct Server {
    child: Child,
    program: PathBuf,
    begun: Instant,
    limit: Duration,
}

impl Server {
    /// What it prints, line by line. The channel ends with its output.
    fn lines(&mut self) -> Receiver<String> {
        let (sender, lines) = channel();
        let stdout = self.child.stdout.take();
        std::thread::spawn(move || {
            for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(|line| line.ok()) {
                // The other side may have seen enough; what is printed must still be taken away.
                let _ = sender.send(line);
            }
        });
        lines
    }

    fn address(&mut self, lines: &Receiver<String>) -> Result<SocketAddr> {
        loop {
            match lines.recv_timeout(Duration::from_millis(100)) {
                Ok(line) => {
                    let said: Value = serde_json::from_str(&line).unwrap_or_default();
                    if let Some(address) = said["address"].as_str().and_then(|text| text.parse().ok()) {
                        return Ok(address);
                    }
                }
                Err(RecvTimeoutError::Timeout) => self.check_running()?,
                Err(RecvTimeoutError::Disconnected) => {
                    self.check_running()?;
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    /// It must not have ended, nor take too long.
    fn check_running(&mut self) -> Result<()> {
        let failed = |source| QuireError::Io { action: "wait for", path: self.program.clone(), source };
        if let Some(status) = self.child.try_wait().map_err(failed)? {
            let problem = format!("the server ended before it was ready ({status}); it says why on stderr");
            return Err(QuireError::CheckFailed(problem));
        }
        if self.begun.elapsed() > self.limit {
            let problem = format!("the server was not ready after {} s; raise --limit", self.limit.as_secs());
            return Err(QuireError::CheckFailed(problem));
        }
        Ok(())
    }

    /// Ends it as an operator would, so that its memory is free for the next start.
    fn stop(mut self) -> Result<()> {
        // SAFETY: kill only takes numbers; the child has not been waited for, so that its id is still its own.
        let sent = unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGTERM) };
        let deadline = Instant::now() + GOODBYE;
        let failed = |source| QuireError::Io { action: "end", path: self.program.clone(), source };
        while sent == 0 && Instant::now() < deadline {
            if self.child.try_wait().map_err(failed)?.is_some() {
                return Ok(());
            }
            std::thread::sleep(LOOK);
        }
        Err(QuireError::CheckFailed(format!("the server did not end within {} s of SIGTERM", GOODBYE.as_secs())))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // An ended child cannot be killed; that is all right.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `/readyz` says 200. A server that does not answer yet is not ready.
fn is_ready(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<[u8; 12]> {
        let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        connection.set_read_timeout(Some(Duration::from_secs(1)))?;
        connection.write_all(b"GET /readyz HTTP/1.1\r\nHost: quire\r\nConnection: close\r\n\r\n")?;
        let mut status = [0; 12];
        connection.read_exact(&mut status)?;
        Ok(status)
    };
    ask().is_ok_and(|status| status.ends_with(b" 200"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::Secret;
    use std::net::TcpListener;

    #[test]
    fn seconds_are_medians_and_loading_is_what_comes_after_listening() {
        let info = RunInfo::start(&Output { results_dir: None, ..Output::default() });
        let start = |listening, ready| Start { listening, ready };
        let records = figures(&info, "8b/warm", &[start(0.5, 3.0), start(0.25, 9.0), start(0.25, 2.25)]);
        let values: Vec<(&str, f64)> = records.iter().map(|r| (r.metric.as_str(), r.value)).collect();
        assert_eq!(values, [("seconds", 3.0), ("seconds_to_listening", 0.25), ("seconds_loading", 2.5)]);
        assert!(records.iter().all(|r| r.bench == "start" && r.case == "8b/warm" && r.samples == 3));
    }

    #[test]
    fn only_status_200_is_ready() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answers = ["HTTP/1.1 503 Service Unavailable\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"];
        let server = std::thread::spawn(move || {
            for answer in answers {
                let (mut connection, _) = listener.accept().unwrap();
                let _ = connection.read(&mut [0; 256]).unwrap();
                connection.write_all(answer.as_bytes()).unwrap();
            }
        });
        assert_eq!([is_ready(address), is_ready(address)], [false, true]);
        server.join().unwrap();
        assert!(!is_ready(address));
    }

    #[test]
    fn every_setting_reaches_the_child_and_where_it_listens_is_its_own() {
        let settings =
            Settings { api_key: Some(Secret("secret".into())), port: 8080, prefill_chunk: 77, ..Settings::default() };
        let settings = Settings { model: Some("/models/one".into()), ..settings };
        let mut command = Command::new("quire");
        pass_settings(&mut command, &settings, Path::new("/scratch")).unwrap();
        let value = |name: &str| {
            let (_, value) = command.get_envs().find(|(key, _)| *key == name).unwrap();
            value.map(|text| text.to_string_lossy().into_owned())
        };
        assert_eq!(value("QUIRE_PREFILL_CHUNK").as_deref(), Some("77"));
        assert_eq!(value("QUIRE_MODEL").as_deref(), Some("/models/one"));
        assert_eq!(value("QUIRE_STRATEGY").as_deref(), Some("full"));
        assert_eq!((value("QUIRE_PORT").as_deref(), value("QUIRE_API_KEY")), (Some("0"), None));
        assert_eq!(value("QUIRE_DATA_DIR").as_deref(), Some("/scratch"));
        assert_eq!(command.get_envs().count(), crate::config::KEYS.len());
    }

    #[test]
    fn a_program_that_ends_at_once_is_an_error() {
        let settings = Settings { model: Some("/models/one".into()), ..Settings::default() };
        let error = one_start(&settings, Path::new("true"), Path::new("/tmp"), Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("ended before it was ready"), "{error}");
    }
}
