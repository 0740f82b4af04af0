//! A server of this program's own, to be measured.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::error::Result;
use settings::{QuireError, Settings};

/// Time between two looks at `/readyz`.
const LOOK: Duration = Duration::from_millis(2);
/// Time for the child to end after SIGTERM.
const GOODBYE: Duration = Duration::from_secs(20);

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
pub(super) struct Server {
    child: Child,
    program: PathBuf,
    begun: Instant,
    limit: Duration,
    address: SocketAddr,
}

impl Server {
    /// Starts `program serve` with these settings on a free port of this machine, and waits until it listens.
    ///
    /// # Errors
    /// A program that cannot be started, ends, or takes longer than `limit`.
    pub(super) fn start(settings: &Settings, program: &Path, data_dir: &Path, limit: Duration) -> Result<Server> {
        let failed = |source| QuireError::Io { action: "run", path: program.into(), source };
        let mut command = Command::new(program);
        command.args(["serve", "--json"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        pass_settings(&mut command, settings, data_dir)?;
        let (begun, nowhere) = (Instant::now(), SocketAddr::from(([127, 0, 0, 1], 0)));
        let child = command.spawn().map_err(failed)?;
        let mut server = Server { child, program: program.into(), begun, limit, address: nowhere };
        let lines = server.lines();
        server.address = server.listening(&lines)?;
        Ok(server)
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Since it was started.
    pub(super) fn seconds(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    /// Waits until it takes requests.
    ///
    /// # Errors
    /// A server that ends, or takes longer than its limit.
    pub(super) fn wait_ready(&mut self) -> Result<()> {
        while !is_ready(self.address) {
            self.check_running()?;
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

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

    fn listening(&mut self, lines: &Receiver<String>) -> Result<SocketAddr> {
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
            return Err(QuireError::CheckFailed(problem).into());
        }
        if self.begun.elapsed() > self.limit {
            let problem = format!("the server was not ready after {} s; raise --limit", self.limit.as_secs());
            return Err(QuireError::CheckFailed(problem).into());
        }
        Ok(())
    }

    /// Ends it as an operator would, so that its memory is free for the next start.
    pub(super) fn stop(mut self) -> Result<()> {
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
        let problem = format!("the server did not end within {} s of SIGTERM", GOODBYE.as_secs());
        Err(QuireError::CheckFailed(problem).into())
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
        connection.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
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
    use settings::Secret;
    use std::net::TcpListener;

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
        assert_eq!(command.get_envs().count(), settings::KEYS.len());
    }
}
