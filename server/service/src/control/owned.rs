//! Settings that a running server has for all of its commands, and what becomes of a command that names another value.

use super::remote::Remote;
use settings::{Config, QuireError, Result, setting};

/// These change what comes out: a command that names another value is refused.
const DECISIVE: &[&str] =
    &["model", "fast_prefill", "kv_format", "max_context", "tenant", "chunk_tokens", "chunk_overlap"];
/// These change how fast it comes: the server's count, which is said.
const OTHER: &[&str] = &[
    "model_name",
    "device",
    "gpu",
    "gpu_memory_bytes",
    "threads",
    "max_sequences",
    "queue",
    "step_tokens",
    "mixed_prefill_tokens",
    "prefill_chunk",
    "kv_budget_bytes",
    "host_cache_bytes",
    "device_cache_bytes",
    "prefix_cache",
    "kernel_cache",
];

/// All of them.
#[must_use]
pub fn owned() -> Vec<&'static str> {
    [DECISIVE, OTHER].concat()
}

/// Compares what flags, environment and files say with the server's settings, as far as the command uses them.
pub(super) fn check(config: &Config, command: &str, remote: &Remote, on_note: &mut dyn FnMut(&str)) -> Result<()> {
    let info = remote.info();
    let own = super::wire::owned_settings(&config.settings, &owned());
    for key in owned() {
        let used = setting(key).is_some_and(|setting| setting.is_used_by(command));
        let Some(origin) = config.origin(key).filter(|_| used) else { continue };
        let (wanted, served) = match key {
            "model" => (config.settings.model_dir()?.display().to_string(), info.model_dir.clone()),
            _ => (shown(own.get(key)), shown(info.settings.get(key))),
        };
        let same = match key {
            "model" => same_folder(&wanted, &served),
            _ => wanted == served,
        };
        if same {
            continue;
        }
        let flag = key.replace('_', "-");
        if DECISIVE.contains(&key) {
            return Err(QuireError::Config {
                setting: key.into(),
                origin: origin.into(),
                problem: format!(
                    "expected that of the running server (process id {}), {served}, found {wanted}. Leave --{flag} out, \
                     or stop the server",
                    info.pid
                ),
            });
        }
        on_note(&format!(
            "note: --{flag} {wanted} ({origin}) has no effect: the running server (process id {}) has {served}",
            info.pid
        ));
    }
    Ok(())
}

fn same_folder(a: &str, b: &str) -> bool {
    let real = |path: &str| std::path::Path::new(path).canonicalize().ok();
    a == b || real(a).is_some_and(|path| Some(path) == real(b))
}

fn shown(value: Option<&serde_json::Value>) -> String {
    match value {
        None | Some(serde_json::Value::Null) => "none".into(),
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_setting_of_the_engine_is_the_servers() {
        let owned = owned();
        for setting in settings::SETTINGS.iter().filter(|setting| setting.commands.contains(&"eval")) {
            // What eval has in common with commands that a server executes is the engine, decoding and the log.
            let travels = ["strategy", "sinks", "window", "k", "ef", "index", "log"].contains(&setting.key);
            assert!(travels != owned.contains(&setting.key), "{}", setting.key);
        }
        assert!(owned.iter().all(|key| setting(key).is_some()));
    }
}
