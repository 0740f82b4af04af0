//! From flags, environment and files to settings: which layer wins, what each may set, where a value came from.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Serialize;

use super::{Secret, Settings, SettingsArgs, setting};
use crate::error::{QuireError, Result};

const FROM_DEFAULTS: &str = "default";
const FROM_ENVIRONMENT: &str = "environment";
const FROM_FLAGS: &str = "flag";

/// `QUIRE_*` variables that are no settings: the path of the file, and those of scripts and tests.
const OTHER_VARIABLES: &[&str] = &["QUIRE_CONFIG", "QUIRE_CACHE", "QUIRE_TEST_PYTHON", "QUIRE_TEST_NODE"];

/// The effective settings with their origins.
#[derive(Clone, Debug)]
pub struct Config {
    /// The settings.
    pub settings: Settings,
    /// Per setting, in the order of [`KEYS`](super::KEYS): where its value came from.
    pub origins: Vec<(&'static str, String)>,
    /// Environment variables that begin with `QUIRE_` and are no setting.
    pub unknown_variables: Vec<String>,
}

/// The files of settings, from the weakest to the strongest.
#[derive(Clone, Debug, Default)]
pub(super) struct Files {
    /// The user's own.
    pub(super) user: Option<PathBuf>,
    /// The one that the command line or the environment names.
    pub(super) named: Option<PathBuf>,
    /// The one that lies in the current folder; not looked at where one is named.
    pub(super) folder: Option<PathBuf>,
}

/// One layer of values.
struct Layer {
    name: &'static str,
    values: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name)
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// A file of settings, read whole before it is parsed, so that "unreadable" and "wrong" are told apart.
struct File {
    path: PathBuf,
    values: Dict,
}

impl Provider for File {
    fn metadata(&self) -> Metadata {
        Metadata::named("file").source(self.path.as_path())
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

impl Config {
    /// Where the value of a setting came from; `None`: nobody set it.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&str> {
        let origin = self.origins.iter().find(|(known, _)| *known == key).map(|(_, origin)| origin.as_str());
        origin.filter(|origin| *origin != FROM_DEFAULTS)
    }

    /// Merges all layers: defaults, the user's file, the named or the folder's file, environment, flags.
    pub(super) fn from_layers(
        flags: &SettingsArgs,
        environment: &[(String, OsString)],
        files: &Files,
    ) -> Result<Config> {
        let mut figment = Figment::from(layer(FROM_DEFAULTS, &Settings::default())?);
        if let Some(path) = &files.user {
            figment = figment.merge(read_file(path)?);
        }
        match (&files.named, &files.folder) {
            (Some(path), _) => figment = figment.merge(read_file(path)?),
            (None, Some(path)) => {
                // Nobody named it: a pipe that somebody put there would be waited for in every command.
                if !path.is_file() {
                    return Err(QuireError::Config {
                        setting: "config".into(),
                        origin: "the current folder".into(),
                        problem: format!("expected a file at {}, found something else: remove it", path.display()),
                    });
                }
                let file = read_file(path)?;
                refuse_personal(&file, files.user.as_deref())?;
                figment = figment.merge(file);
            }
            (None, None) => {}
        }
        let (values, unknown_variables) = from_environment(environment)?;
        figment = figment.merge(Layer { name: FROM_ENVIRONMENT, values });
        figment = figment.merge(layer(FROM_FLAGS, flags)?);

        let mut settings: Settings = figment.extract_lossy().map_err(|e| config_error(&e))?;
        let mut origins: Vec<_> = super::KEYS.iter().map(|&key| (key, origin(&figment, key))).collect();
        read_key(&mut settings, &mut origins)?;
        settings.validate(&origins)?;
        Ok(Config { settings, origins, unknown_variables })
    }
}

/// Refuses what a file that lies in just any folder must not decide.
fn refuse_personal(file: &File, user: Option<&Path>) -> Result<()> {
    let personal = file.values.keys().find(|key| setting(key).is_some_and(|setting| setting.personal));
    let Some(key) = personal else { return Ok(()) };
    let place = user.map_or_else(|| "~/.config/quire/quire.toml".into(), |path| path.display().to_string());
    Err(QuireError::Config {
        setting: key.clone(),
        origin: format!("file {}", file.path.display()),
        problem: format!(
            "a quire.toml that lies in the current folder may not set it: it decides who may use Quire, or where and \
             how much is written. Move the line to {place}, or name the file with --config to trust all of it"
        ),
    })
}

/// Takes the key from the file that holds it, where one is named.
fn read_key(settings: &mut Settings, origins: &mut [(&'static str, String)]) -> Result<()> {
    let Some(path) = &settings.api_key_file else { return Ok(()) };
    let of = |key: &str| origins.iter().find(|(k, _)| *k == key).map_or("", |(_, origin)| origin.as_str());
    let refuse = |problem: String| {
        Err(QuireError::Config { setting: "api_key_file".into(), origin: of("api_key_file").into(), problem })
    };
    if settings.api_key.is_some() {
        return match strength(of("api_key")).cmp(&strength(of("api_key_file"))) {
            std::cmp::Ordering::Greater => Ok(()),
            std::cmp::Ordering::Less => read_key_from(&path.clone(), settings, origins),
            std::cmp::Ordering::Equal => refuse("expected api_key or api_key_file, found both: leave one out".into()),
        };
    }
    read_key_from(&path.clone(), settings, origins)
}

fn read_key_from(path: &Path, settings: &mut Settings, origins: &mut [(&'static str, String)]) -> Result<()> {
    let text = read_small(path).map_err(|e| QuireError::Config {
        setting: "api_key_file".into(),
        origin: origins.iter().find(|(k, _)| *k == "api_key_file").map_or_else(String::new, |(_, o)| o.clone()),
        problem: format!("expected a readable text file with the key at {}: {e}", path.display()),
    })?;
    settings.api_key = Some(Secret(text.trim().into()));
    if let Some((_, origin)) = origins.iter_mut().find(|(key, _)| *key == "api_key") {
        *origin = format!("file {}, named by api_key_file", path.display());
    }
    Ok(())
}

/// Which of two origins wins: the larger.
fn strength(origin: &str) -> usize {
    [FROM_DEFAULTS, "file", FROM_ENVIRONMENT, FROM_FLAGS].iter().rposition(|from| origin.starts_with(from)).unwrap_or(0)
}

fn layer<T: Serialize>(name: &'static str, values: &T) -> Result<Layer> {
    let value = Value::serialize(values).map_err(|e| config_error(&e))?;
    Ok(Layer { name, values: value.into_dict().unwrap_or_default() })
}

/// Bytes of a file of settings or of a key at most.
const MOST_BYTES: u64 = 1 << 20;

/// Reads a small text. A file that never ends, such as a device, is an error.
fn read_small(path: &Path) -> std::io::Result<String> {
    use std::io::{Error, ErrorKind, Read};
    let mut text = String::new();
    std::fs::File::open(path)?.take(MOST_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST_BYTES {
        return Err(Error::new(ErrorKind::InvalidData, "it is larger than 1 MiB"));
    }
    Ok(text)
}

fn read_file(path: &Path) -> Result<File> {
    use figment::providers::{Format, Toml};
    let refuse =
        |origin: &str, problem: String| QuireError::Config { setting: "config".into(), origin: origin.into(), problem };
    let text = read_small(path).map_err(|e| {
        let problem = format!("expected a readable file of settings at {}: {e}", path.display());
        refuse("command line, environment or the usual places", problem)
    })?;
    let data = Toml::string(&text).data().map_err(|e| {
        let problem = format!("expected TOML at {}: {}", path.display(), without_source(&e.to_string()));
        refuse("file", problem)
    })?;
    let values = data.into_iter().find(|(profile, _)| *profile == Profile::Default).map(|(_, values)| values);
    Ok(File { path: path.to_path_buf(), values: values.unwrap_or_default() })
}

/// A message of the TOML parser without the line of the file that it quotes: that may hold a key.
fn without_source(message: &str) -> String {
    let quoted =
        |line: &str| line.trim_start().trim_start_matches(|c: char| c.is_ascii_digit()).trim_start().starts_with('|');
    message.lines().filter(|line| !quoted(line)).map(str::trim).collect::<Vec<_>>().join(": ")
}

/// Values stay texts: which of them are numbers is known from the setting's type, not from the look of the text.
fn from_environment(environment: &[(String, OsString)]) -> Result<(Dict, Vec<String>)> {
    let mut values = Dict::new();
    let mut unknown = Vec::new();
    for (name, value) in environment {
        let key = name.trim_start_matches("QUIRE_").to_ascii_lowercase();
        if setting(&key).is_some() {
            let Some(text) = value.to_str() else {
                let problem = "expected text in UTF-8, found other bytes".into();
                return Err(QuireError::Config { setting: key, origin: format!("environment {name}"), problem });
            };
            values.insert(key, Value::from(text));
        } else if !OTHER_VARIABLES.contains(&name.as_str()) {
            unknown.push(name.clone());
        }
    }
    Ok((values, unknown))
}

fn origin(figment: &Figment, key: &str) -> String {
    figment.find_metadata(key).map_or(FROM_DEFAULTS.into(), |metadata| origin_name(metadata, key))
}

/// The layer that a setting is of, with the name that the setting has there.
fn origin_name(metadata: &Metadata, key: &str) -> String {
    match (metadata.name.as_ref(), &metadata.source) {
        (FROM_ENVIRONMENT, _) => format!("environment QUIRE_{}", key.to_ascii_uppercase()),
        (FROM_FLAGS, _) => format!("flag --{}", key.replace('_', "-")),
        (_, Some(source)) => format!("file {source}"),
        (name, None) => name.to_string(),
    }
}

fn config_error(error: &figment::Error) -> QuireError {
    let setting = if error.path.is_empty() { "(file)".into() } else { error.path.join(".") };
    let origin = error.metadata.as_ref().map_or("settings".into(), |metadata| origin_name(metadata, &setting));
    let problem = match super::setting(&setting) {
        // What was found may be most of a key.
        Some(known) if known.secret => "expected a text".into(),
        _ => error.kind.to_string(),
    };
    QuireError::Config { setting, origin, problem: format!("{problem}. `quire config show` lists all settings") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{Bytes, Named};
    use engine::Strategy;

    #[test]
    fn a_file_without_end_is_an_error() {
        let folder = Files { folder: Some("/dev/zero".into()), ..Files::default() };
        let error = load(&SettingsArgs::default(), &[], &folder).unwrap_err().to_string();
        assert!(error.contains("current folder") && error.contains("remove it"), "{error}");
        let error = read_small(Path::new("/dev/zero")).unwrap_err().to_string();
        assert!(error.contains("larger than 1 MiB"), "{error}");
        for (key, file) in [("api_key_file", "/dev/zero"), ("config", "/dev/zero")] {
            let named = Files { named: (key == "config").then(|| file.into()), ..Files::default() };
            let flags =
                SettingsArgs { api_key_file: (key == "api_key_file").then(|| file.into()), ..SettingsArgs::default() };
            let error = load(&flags, &[], &named).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("1 MiB"), "{error}");
        }
    }

    fn load(flags: &SettingsArgs, environment: &[(&str, &str)], files: &Files) -> Result<Config> {
        let environment: Vec<_> = environment.iter().map(|(k, v)| (k.to_string(), OsString::from(v))).collect();
        Config::from_layers(flags, &environment, files)
    }

    fn origin_of<'a>(config: &'a Config, key: &str) -> &'a str {
        &config.origins.iter().find(|(k, _)| *k == key).unwrap().1
    }

    /// A file of settings in a folder of its own.
    fn file(text: &str) -> (tempfile::TempDir, Option<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quire.toml");
        std::fs::write(&path, text).unwrap();
        (dir, Some(path))
    }

    fn refusal(environment: &[(&str, &str)], files: &Files, parts: &[&str]) {
        let error = load(&SettingsArgs::default(), environment, files).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        parts.iter().for_each(|part| assert!(text.contains(part), "{text} lacks {part}"));
    }

    #[test]
    fn flags_beat_environment_beats_files_beat_defaults() {
        let (_a, user) = file("top_chunks = 2\nk = 6\nwindow = 98\nsinks = 5\ndata_dir = \"/x\"\n");
        let (_b, folder) = file("top_chunks = 3\nk = 7\nwindow = 99\nstrategy = \"window\"\n");
        let files = Files { user, folder, named: None };
        let flags = SettingsArgs { top_chunks: Some(5), ..SettingsArgs::default() };
        let environment = [("QUIRE_TOP_CHUNKS", "4"), ("QUIRE_K", "8"), ("QUIRE_RATIO", "0.25")];
        let config = load(&flags, &environment, &files).unwrap();
        let s = &config.settings;
        assert_eq!((s.top_chunks, s.k, s.window, s.sinks, s.ratio, s.ef), (5, 8, 99, 5, 0.25, 256));
        assert_eq!((s.strategy, s.data_dir.to_str()), (Named(Strategy::Window), Some("/x")));
        assert_eq!(origin_of(&config, "top_chunks"), "flag --top-chunks");
        assert_eq!(origin_of(&config, "k"), "environment QUIRE_K");
        assert!(origin_of(&config, "window").ends_with("quire.toml"), "{}", origin_of(&config, "window"));
        assert_eq!(origin_of(&config, "ef"), "default");
    }

    #[test]
    fn a_file_of_just_any_folder_decides_neither_who_may_come_in_nor_where_is_written() {
        for line in [
            "host = \"0.0.0.0\"",
            "data_dir = \"/tmp/x\"",
            "api_key = \"k\"",
            "api_key_file = \"k\"",
            "cache_bytes = \"1K\"",
            "kernel_cache = \"/tmp/k\"",
            "tenant = \"other\"",
        ] {
            let (_dir, path) = file(&format!("top_chunks = 3\n{line}\n"));
            let key = line.split(' ').next().unwrap();
            let folder = Files { folder: path.clone(), ..Files::default() };
            refusal(&[], &folder, &[&format!("`{key}`"), "current folder", "quire.toml", "--config"]);
            if key != "api_key_file" {
                let trusted = [
                    Files { named: path.clone(), ..Files::default() },
                    Files { user: path.clone(), ..Files::default() },
                ];
                for files in trusted {
                    assert_eq!(load(&SettingsArgs::default(), &[], &files).unwrap().settings.top_chunks, 3);
                }
            }
        }
    }

    #[test]
    fn a_named_file_stands_in_for_the_folders_and_the_users_stays_below() {
        let (_a, user) = file("k = 6\nsinks = 5\n");
        let (_b, named) = file("k = 7\n");
        let (_c, folder) = file("host = \"0.0.0.0\"\n");
        let config = load(&SettingsArgs::default(), &[], &Files { user, named, folder }).unwrap();
        assert_eq!((config.settings.k, config.settings.sinks), (7, 5));
    }

    #[test]
    fn sizes_come_with_units_from_every_layer() {
        let (_a, user) = file("cache_bytes = \"1.5GiB\"\nbody_limit_bytes = 1048576\n");
        let flags = SettingsArgs { gpu_memory_bytes: Some(Bytes(7)), ..SettingsArgs::default() };
        let files = Files { user, ..Files::default() };
        let config = load(&flags, &[("QUIRE_KV_BUDGET_BYTES", "512M")], &files).unwrap();
        let s = config.settings;
        assert_eq!((s.cache_bytes, s.kv_budget_bytes), (Some(Bytes(3 << 29)), Bytes(512 << 20)));
        assert_eq!((s.body_limit_bytes, s.gpu_memory_bytes), (Bytes(1 << 20), Bytes(7)));
        refusal(&[("QUIRE_CACHE_BYTES", "lots")], &Files::default(), &["cache_bytes", "8G", "lots"]);
        let (_b, user) = file("cache_bytes = 1.5\n");
        refusal(&[], &Files { user, ..Files::default() }, &["cache_bytes", "8G"]);
    }

    #[test]
    fn texts_that_look_like_numbers_stay_texts() {
        let environment = [("QUIRE_COLLECTION", "2024"), ("QUIRE_API_KEY", "007"), ("QUIRE_DATA_DIR", "1")];
        let config = load(&SettingsArgs::default(), &environment, &Files::default()).unwrap();
        assert_eq!(config.settings.collection, "2024");
        assert_eq!(config.settings.api_key.as_deref(), Some("007"));
        assert_eq!(config.settings.data_dir, PathBuf::from("1"));
    }

    #[test]
    fn wrong_values_name_setting_origin_and_expectation() {
        let none = Files::default();
        refusal(&[("QUIRE_K", "many")], &none, &["`k`", "environment", "many"]);
        refusal(&[("QUIRE_STRATEGY", "magic")], &none, &["strategy", "retrieval", "magic"]);
        refusal(&[("QUIRE_RATIO", "1.5")], &none, &["`ratio`", "environment QUIRE_RATIO", "0 to 1", "1.5"]);
        refusal(&[("QUIRE_MONITOR_SHARE", "1.5")], &none, &["monitor_share", "0 to 1", "1.5"]);
        refusal(&[("QUIRE_MONITOR_LIMIT", "0")], &none, &["monitor_limit", "above 0"]);
        refusal(&[("QUIRE_CHUNK_OVERLAP", "200")], &none, &["chunk_overlap", "half of chunk_tokens"]);
        refusal(&[("QUIRE_COLLECTION", "../x")], &none, &["collection", "../x"]);
        let (_dir, folder) = file("top_chunk = 3\n");
        refusal(&[], &Files { folder, ..Files::default() }, &["top_chunk"]);
        let bytes = std::os::unix::ffi::OsStrExt::from_bytes(b"\xff");
        let environment = [("QUIRE_DATA_DIR".to_string(), std::ffi::OsStr::to_os_string(bytes))];
        let error = Config::from_layers(&SettingsArgs::default(), &environment, &none).unwrap_err().to_string();
        assert!(error.contains("QUIRE_DATA_DIR") && error.contains("UTF-8"), "{error}");
    }

    #[test]
    fn a_setting_wins_over_the_model_and_the_model_over_the_default() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 5}"#;
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        let model = dir.path().to_str().unwrap();
        let load = |environment: &[(&str, &str)]| load(&SettingsArgs::default(), environment, &Files::default());
        let sampling = |more: &[(&str, &str)]| {
            let settings = load(&[&[("QUIRE_MODEL", model)], more].concat()).unwrap().settings;
            let sampling = settings.sampling().unwrap();
            (sampling.temperature, sampling.top_p, settings.max_tokens)
        };
        assert_eq!(sampling(&[]), (0.6, 0.9, 0));
        assert_eq!(sampling(&[("QUIRE_TEMPERATURE", "0"), ("QUIRE_MAX_TOKENS", "7")]), (0.0, 0.9, 7));
        assert_eq!(sampling(&[("QUIRE_GENERATION_CONFIG", "none")]), (1.0, 1.0, 0));
        let both = [("QUIRE_GENERATION_CONFIG", "none"), ("QUIRE_TEMPERATURE", "0.5")];
        assert_eq!(sampling(&both), (0.5, 1.0, 0));
        let wrong = load(&[("QUIRE_GENERATION_CONFIG", "some")]).unwrap_err();
        assert!(wrong.to_string().contains("auto or none"), "{wrong}");
    }

    #[test]
    fn unknown_variables_are_told() {
        let environment = [("QUIRE_TOPCHUNKS", "4"), ("QUIRE_CACHE", "/x")];
        let config = load(&SettingsArgs::default(), &environment, &Files::default()).unwrap();
        assert_eq!(config.unknown_variables, ["QUIRE_TOPCHUNKS"]);
    }

    #[test]
    fn a_key_comes_from_a_file_and_the_stronger_layer_wins() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "  from-file\n").unwrap();
        let named = path.to_str().unwrap();
        let key = |flags: &SettingsArgs, environment: &[(&str, &str)]| {
            let config = load(flags, environment, &Files::default()).unwrap();
            (config.settings.api_key.clone().unwrap().0, origin_of(&config, "api_key").to_string())
        };
        let none = SettingsArgs::default();
        let (found, origin) = key(&none, &[("QUIRE_API_KEY_FILE", named)]);
        assert_eq!(found, "from-file");
        assert!(origin.contains(named), "{origin}");
        let flag = SettingsArgs { api_key: Some(Secret("flag".into())), ..SettingsArgs::default() };
        assert_eq!(key(&flag, &[("QUIRE_API_KEY_FILE", named)]).0, "flag");
        let flag = SettingsArgs { api_key_file: Some(path.clone()), ..SettingsArgs::default() };
        assert_eq!(key(&flag, &[("QUIRE_API_KEY", "environment")]).0, "from-file");
        let both = [("QUIRE_API_KEY", "x"), ("QUIRE_API_KEY_FILE", named)];
        refusal(&both, &Files::default(), &["api_key_file", "found both"]);
        refusal(&[("QUIRE_API_KEY_FILE", "/nowhere/key")], &Files::default(), &["/nowhere/key", "readable"]);
        std::fs::write(&path, " \n").unwrap();
        refusal(&[("QUIRE_API_KEY_FILE", named)], &Files::default(), &["api_key", "empty"]);
    }

    #[test]
    fn a_wrong_file_is_told_without_the_secrets_in_it() {
        for text in ["api_key = \"hunter2\n", "api_key = hunter2", "api_key = [\"hunter2\"]", "api_key.x = \"hunter2\""]
        {
            let (_dir, user) = file(text);
            let files = Files { user, ..Files::default() };
            let error = load(&SettingsArgs::default(), &[], &files).unwrap_err();
            let shown = format!("{error} {error:?}");
            assert!(!shown.contains("hunter2") && shown.contains("quire.toml"), "{shown}");
        }
    }
}
