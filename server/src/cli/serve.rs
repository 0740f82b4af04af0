//! `quire serve`.

use std::time::Duration;

use super::output::Out;
use crate::config::Settings;
use crate::error::{QuireError, Result};
use crate::http;

pub(super) fn run(settings: &Settings, out: &Out) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| QuireError::Io { action: "start the runtime for", path: "the server".into(), source })?;
    let json = out.json;
    let announce = |address: std::net::SocketAddr| {
        if settings.api_key.is_none() && !address.ip().is_loopback() {
            out.note(&format!(
                "WARNING: everyone who can reach {address} can use this server and read its documents: it has no key. Set \
                 QUIRE_API_KEY, or listen on 127.0.0.1"
            ));
        }
        if json {
            out.value(&serde_json::json!({"event": "listening", "address": address.to_string()}));
        } else {
            out.line(format!("listening on http://{address} (loading the model)"));
        }
    };
    let ready = || {
        if json {
            out.value(&serde_json::json!({"event": "ready"}));
        } else {
            out.line("ready");
        }
    };
    let result = runtime.block_on(http::serve(settings, &announce, &ready));
    // What is still running was given its time: it must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if !result?.is_some_and(http::close) {
        // Loading or an answer still runs. The process must end without the exit handlers, which destroy globals of RocksDB that
        // another thread may be using: it would abort.
        // SAFETY: ends the process; everything was printed with a line's end and is flushed.
        unsafe { libc::_exit(0) }
    }
    Ok(())
}
