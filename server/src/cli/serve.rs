//! `quire serve`.

use std::time::Duration;

use super::output::Out;
use settings::{QuireError, Result, Settings};

pub(super) fn run(settings: &Settings, out: &Out) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|source| QuireError::Io { action: "start the runtime for", path: "the server".into(), source })?;
    let json = out.json;
    let announce = |address: std::net::SocketAddr| {
        warnings(settings, address).iter().for_each(|warning| out.note(warning));
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
    let result = runtime.block_on(http_api::serve(settings, &announce, &ready));
    // What is still running was given its time: it must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if !result?.is_some_and(http_api::close) {
        // Loading or an answer still runs. The process must end without the exit handlers, which destroy globals of RocksDB that
        // another thread may be using: it would abort.
        // SAFETY: ends the process; everything was printed with a line's end and is flushed.
        unsafe { libc::_exit(0) }
    }
    Ok(())
}

/// What whoever starts a server at `address` should know of who can use it.
fn warnings(settings: &Settings, address: std::net::SocketAddr) -> Vec<String> {
    let mut warnings = Vec::new();
    if settings.api_key.is_some() {
        return warnings;
    }
    if !address.ip().is_loopback() {
        warnings.push(format!(
            "WARNING: everyone who can reach {address} can use this server and read its documents: it has no key. Set \
             QUIRE_API_KEY, or listen on 127.0.0.1"
        ));
    }
    if settings.cors_origins.0.is_everything() {
        warnings.push(
            "WARNING: every web page that is open in a browser on this machine can use this server and read its documents: \
             it has no key and takes pages from everywhere. Set QUIRE_API_KEY, or name the pages (--cors-origins \
             https://app.example)"
                .into(),
        );
    }
    warnings
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use settings::{Named, Secret};

    #[test]
    fn a_server_that_anyone_can_use_says_so_unless_it_has_a_key() {
        let count = |cors: &str, address: &str, key: Option<&str>| {
            let settings = Settings {
                cors_origins: Named(cors.parse().unwrap()),
                api_key: key.map(|key| Secret(key.into())),
                ..Settings::default()
            };
            warnings(&settings, address.parse().unwrap()).len()
        };
        assert_eq!(count("", "127.0.0.1:80", None), 0);
        assert_eq!(count("https://app.example", "[::1]:80", None), 0);
        assert_eq!((count("*", "127.0.0.1:80", None), count("", "0.0.0.0:80", None)), (1, 1));
        assert_eq!((count("*", "0.0.0.0:80", None), count("*", "0.0.0.0:80", Some("k"))), (2, 0));
    }
}
