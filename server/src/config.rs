//! Every setting of Quire, in one place: flags, then environment, then `quire.toml`, then defaults.
//!
//! One table below makes the settings, their flags (`--top-chunks`), their environment variables
//! (`QUIRE_TOP_CHUNKS`) and their keys in the file (`top_chunks`), so that none can be forgotten. This is the only
//! file that reads the environment.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ann_index::IndexKind;
use engine::{AttentionConfig, BlendConfig, BlendMode, CudaConfig, DeviceChoice, EngineConfig, KvDtype, Strategy};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{QuireError, Result};
use crate::hub::{self, HubConfig, ModelId};

/// A value that is written as its name: parsed and printed by the type's own `FromStr` and `Display`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named<T>(pub T);

impl<T: FromStr> FromStr for Named<T> {
    type Err = T::Err;
    fn from_str(text: &str) -> std::result::Result<Self, T::Err> {
        text.parse().map(Named)
    }
}

impl<T: fmt::Display> fmt::Display for Named<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<T: fmt::Display> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Named).map_err(serde::de::Error::custom)
    }
}

/// The number format of KV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvFormat {
    /// bf16 when the weights have 16 bits, else f32.
    Auto,
    /// Always f32.
    F32,
    /// Always bf16.
    Bf16,
}

impl FromStr for KvFormat {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(KvFormat::Auto),
            "f32" => Ok(KvFormat::F32),
            "bf16" => Ok(KvFormat::Bf16),
            other => Err(format!("KV format: expected auto, f32 or bf16, found `{other}`")),
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvFormat::Auto => "auto",
            KvFormat::F32 => "f32",
            KvFormat::Bf16 => "bf16",
        })
    }
}

macro_rules! settings {
    ($($heading:literal { $($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:expr, $shown:literal;)* })*) => {
        /// Every setting, validated.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Settings { $($(
            $(#[doc = $doc])+
            #[doc = concat!(" (default: ", $shown, ").")]
            pub $name: $type,
        )*)* }

        impl Default for Settings {
            fn default() -> Self {
                Settings { $($( $name: $default, )*)* }
            }
        }

        /// The settings as flags. What is not given stays `None`.
        #[derive(Clone, Debug, Default, clap::Args, Serialize)]
        pub struct SettingsArgs { $($(
            $(#[doc = $doc])+
            #[doc = concat!("[default: ", $shown, "]")]
            #[arg(long, global = true, help_heading = $heading, hide_short_help = true)]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $name: Option<<$type as Flag>::Value>,
        )*)* }

        /// The names of all settings, in the order of the documentation.
        pub const KEYS: &[&str] = &[$($( stringify!($name), )*)*];
    };
}

/// The type a flag takes for a setting of this type: that of the value itself, also where it is optional.
pub trait Flag {
    /// What the flag takes.
    type Value: Clone + Send + Sync + 'static;
}

macro_rules! plain_flags { ($($type:ty),*) => { $(impl Flag for $type { type Value = $type; })* } }
plain_flags!(bool, usize, u64, u16, f32, String, PathBuf);

impl<T: Clone + Send + Sync + 'static> Flag for Named<T> {
    type Value = Named<T>;
}
impl<T: Flag> Flag for Option<T> {
    type Value = T::Value;
}

settings! {
    "Model" {
        /// The model: a folder as Hugging Face publishes it, or OWNER/NAME that `quire pull` fetched
        model: Option<PathBuf> = None, "the reference model found beside the program";
        /// Name under which the server offers the model
        model_name: Option<String> = None, "the model's name on the hub, else that of its folder";
        /// Where the model computes: auto (a GPU where there is one), cpu or cuda
        device: Named<DeviceChoice> = Named(DeviceChoice::Auto), "auto";
        /// Which GPU, from 0
        gpu: usize = 0, "0";
        /// Bytes of the GPU's memory that may be used; 0: most of what is free
        gpu_memory_bytes: u64 = 0, "0";
        /// Round activations to bf16 when a GPU reads a prompt: up to twice as fast, less exact: true or false
        fast_prefill: bool = false, "false";
        /// Folder for kernels that were compiled for a GPU
        kernel_cache: PathBuf = default_kernel_cache(), "$XDG_CACHE_HOME/quire/kernels or ~/.cache/quire/kernels";
        /// Threads of the CPU backend; 0: all cores
        threads: usize = 0, "0";
        /// Number format of KV: auto, f32 or bf16
        kv_format: Named<KvFormat> = Named(KvFormat::Auto), "auto: bf16 for 16-bit weights";
        /// Limit on prompt and answer in tokens; 0: the model's own
        max_context: usize = 0, "0";
        /// Requests that run at the same time
        max_sequences: usize = 8, "8";
        /// Requests that may wait; more are refused with 429
        queue: usize = 64, "64";
        /// Tokens of a step over all requests: one for each that is answered, the rest for prompts
        step_tokens: usize = 512, "512";
        /// Tokens of prompts in a step in which some request is answered at most
        mixed_prefill_tokens: usize = 112, "112";
        /// Tokens of one prompt that a step reads at most
        prefill_chunk: usize = 512, "512";
        /// Bytes of KV in memory over all running requests and the prefix cache; 0: most of what weights leave
        kv_budget_bytes: u64 = 0, "0";
        /// Share the KV of prompts without documents that begin alike: true or false
        prefix_cache: bool = true, "true";
    }
    "Documents" {
        /// Folder for collections and cached chunks
        data_dir: PathBuf = default_data_dir(), "$XDG_DATA_HOME/quire or ~/.local/share/quire";
        /// Collection of documents to use
        collection: String = "default".into(), "default";
        /// Tokens of a chunk at most
        chunk_tokens: usize = 256, "256";
        /// Tokens that neighbouring chunks share at most
        chunk_overlap: usize = 32, "32";
        /// Bytes of cached chunks on disk; the least recently used make way
        cache_bytes: u64 = 8 << 30, "8589934592";
        /// Salt of cached chunks: tenants with different salts never share one
        tenant: String = String::new(), "empty";
    }
    "Answers" {
        /// Chunks that a question retrieves
        top_chunks: usize = 8, "8";
        /// Tokens of an answer at most
        max_tokens: usize = 256, "256";
        /// Sampling temperature where a request names none; 0: greedy
        temperature: f32 = 0.0, "0";
    }
    "Decoding" {
        /// What happens to tokens outside of sinks and window: full, window or retrieval
        strategy: Named<Strategy> = Named(Strategy::Full), "full";
        /// First tokens that are always attended
        sinks: usize = 4, "4";
        /// Recent tokens that are always attended
        window: usize = 512, "512";
        /// Cold keys that each query head attends
        k: usize = 128, "128";
        /// Candidates that a graph search keeps
        ef: usize = 256, "256";
        /// Index over cold keys: flat, hnsw, graph, clusters, or ivf where it is built in
        index: Named<IndexKind> = Named(IndexKind::Flat), "flat";
    }
    "Blending" {
        /// What becomes of cached chunks: cacheblend, reuse or full-recompute
        blend: Named<BlendMode> = Named(BlendMode::CacheBlend), "cacheblend";
        /// Share of cached tokens that cacheblend recomputes, 0 to 1
        ratio: f32 = 0.15, "0.15";
        /// Layer on which cacheblend compares fresh and cached values
        check_layer: usize = 1, "1";
    }
    "Server" {
        /// Address to listen on
        host: String = "127.0.0.1".into(), "127.0.0.1";
        /// Port to listen on; 0: any free one
        port: u16 = 8080, "8080";
        /// Key that requests must carry as bearer token
        api_key: Option<String> = None, "none: open to everyone who can connect";
        /// Largest request body in bytes
        body_limit_bytes: usize = 8 << 20, "8388608";
        /// Seconds that running requests get at shutdown
        drain_seconds: u64 = 30, "30";
        /// Seconds between comments that keep a silent stream open
        keepalive_seconds: u64 = 15, "15";
        /// Prefix of the metrics that vLLM also has
        metrics_prefix: String = "vllm".into(), "vllm";
        /// What to log to stderr: error, warn, info, debug, trace, or a filter as of tracing
        log: String = "warn".into(), "warn";
    }
}

/// Most chunks that a question may retrieve.
pub const MAX_TOP_CHUNKS: usize = 1024;

/// Where a value came from.
const FROM_DEFAULTS: &str = "default";
const FROM_ENVIRONMENT: &str = "environment";
const FROM_FLAGS: &str = "flag";

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
    text: String,
}

impl Provider for File {
    fn metadata(&self) -> Metadata {
        Metadata::named("file").source(self.path.as_path())
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        use figment::providers::{Format, Toml};
        Toml::string(&self.text).data()
    }
}

/// The effective settings with their origins.
#[derive(Clone, Debug)]
pub struct Config {
    /// The settings.
    pub settings: Settings,
    /// Per setting, in the order of [`KEYS`]: where its value came from.
    pub origins: Vec<(&'static str, String)>,
    /// Environment variables that begin with `QUIRE_` and are no setting.
    pub unknown_variables: Vec<String>,
}

/// `QUIRE_*` variables that are no settings: the path of the file, and those of scripts and tests.
const OTHER_VARIABLES: &[&str] = &["QUIRE_CONFIG", "QUIRE_CACHE", "QUIRE_TEST_PYTHON"];

impl Config {
    /// Reads all layers. `file`: as given by `--config`; otherwise `QUIRE_CONFIG`, otherwise `quire.toml` in the
    /// current folder if it is there.
    ///
    /// # Errors
    /// [`QuireError::Config`] naming the setting, its origin, what was expected and what came.
    pub fn load(flags: &SettingsArgs, file: Option<&Path>) -> Result<Config> {
        let environment: Vec<(String, String)> = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(key, _)| key.starts_with("QUIRE_"))
            .collect();
        let named = environment.iter().find(|(key, _)| key == "QUIRE_CONFIG");
        let file = match (file, named) {
            (Some(path), _) => Some(path.to_path_buf()),
            (None, Some((_, path))) => Some(PathBuf::from(path)),
            (None, None) => Some(PathBuf::from("quire.toml")).filter(|path| path.exists()),
        };
        Config::from_layers(flags, &environment, file.as_deref())
    }

    fn from_layers(flags: &SettingsArgs, environment: &[(String, String)], file: Option<&Path>) -> Result<Config> {
        let mut figment = Figment::from(layer(FROM_DEFAULTS, &Settings::default())?);
        if let Some(path) = file {
            figment = figment.merge(read_file(path)?);
        }
        let (values, unknown_variables) = from_environment(environment);
        figment = figment.merge(Layer { name: FROM_ENVIRONMENT, values });
        figment = figment.merge(layer(FROM_FLAGS, flags)?);

        let settings: Settings = figment.extract_lossy().map_err(|e| config_error(&e))?;
        let origins: Vec<_> = KEYS.iter().map(|&key| (key, origin(&figment, key))).collect();
        settings.validate(&origins)?;
        Ok(Config { settings, origins, unknown_variables })
    }
}

fn layer<T: Serialize>(name: &'static str, values: &T) -> Result<Layer> {
    let value = Value::serialize(values).map_err(|e| config_error(&e))?;
    Ok(Layer { name, values: value.into_dict().unwrap_or_default() })
}

fn read_file(path: &Path) -> Result<File> {
    let text = std::fs::read_to_string(path).map_err(|e| QuireError::Config {
        setting: "config".into(),
        origin: "command line or environment".into(),
        problem: format!("expected a readable file of settings at {}: {e}", path.display()),
    })?;
    Ok(File { path: path.to_path_buf(), text })
}

/// Values stay texts: which of them are numbers is known from the setting's type, not from the look of the text.
fn from_environment(environment: &[(String, String)]) -> (Dict, Vec<String>) {
    let mut values = Dict::new();
    let mut unknown = Vec::new();
    for (name, value) in environment {
        let key = name.trim_start_matches("QUIRE_").to_ascii_lowercase();
        if KEYS.contains(&key.as_str()) {
            values.insert(key, Value::from(value.as_str()));
        } else if !OTHER_VARIABLES.contains(&name.as_str()) {
            unknown.push(name.clone());
        }
    }
    (values, unknown)
}

fn origin(figment: &Figment, key: &str) -> String {
    let Some(metadata) = figment.find_metadata(key) else {
        return FROM_DEFAULTS.into();
    };
    match (metadata.name.as_ref(), &metadata.source) {
        (FROM_ENVIRONMENT, _) => format!("environment QUIRE_{}", key.to_ascii_uppercase()),
        (FROM_FLAGS, _) => format!("flag --{}", key.replace('_', "-")),
        (_, Some(source)) => format!("file {source}"),
        (name, None) => name.to_string(),
    }
}

fn config_error(error: &figment::Error) -> QuireError {
    let origin = match error.metadata.as_ref() {
        Some(m) => match &m.source {
            Some(source) => format!("{} {source}", m.name),
            None => m.name.to_string(),
        },
        None => "settings".into(),
    };
    QuireError::Config {
        setting: if error.path.is_empty() { "(file)".into() } else { error.path.join(".") },
        origin,
        problem: format!("{}. `quire config show` lists all settings", error.kind),
    }
}

impl Settings {
    fn validate(&self, origins: &[(&'static str, String)]) -> Result<()> {
        let refuse = |key: &str, problem: String| {
            let origin = origins.iter().find(|(k, _)| *k == key).map_or("", |(_, o)| o.as_str());
            Err(QuireError::Config { setting: key.into(), origin: origin.into(), problem })
        };
        let at_least_one = [
            ("max_sequences", self.max_sequences),
            ("step_tokens", self.step_tokens),
            ("mixed_prefill_tokens", self.mixed_prefill_tokens),
            ("prefill_chunk", self.prefill_chunk),
            ("top_chunks", self.top_chunks),
            ("max_tokens", self.max_tokens),
            ("body_limit_bytes", self.body_limit_bytes),
            ("keepalive_seconds", self.keepalive_seconds as usize),
        ];
        for (key, value) in at_least_one {
            if value == 0 {
                return refuse(key, "expected at least 1, found 0".into());
            }
        }
        for (key, value, limit) in [("top_chunks", self.top_chunks, MAX_TOP_CHUNKS), ("threads", self.threads, 1024)] {
            if value > limit {
                return refuse(key, format!("expected at most {limit}, found {value}"));
            }
        }
        if self.chunk_tokens < 16 {
            return refuse("chunk_tokens", format!("expected at least 16, found {}", self.chunk_tokens));
        }
        if self.chunk_overlap * 2 > self.chunk_tokens {
            let problem =
                format!("expected at most half of chunk_tokens ({}), found {}", self.chunk_tokens, self.chunk_overlap);
            return refuse("chunk_overlap", problem);
        }
        if !(0.0..=2.0).contains(&self.temperature) {
            return refuse("temperature", format!("expected 0 to 2, found {}", self.temperature));
        }
        if !(0.0..=1.0).contains(&self.ratio) {
            return refuse("ratio", format!("expected 0 to 1, found {}", self.ratio));
        }
        if self.api_key.as_deref() == Some("") {
            return refuse("api_key", "expected a key, found an empty text; leave it out to run without".into());
        }
        self.attention().validate().or_else(|e| refuse("strategy", e.to_string()))?;
        crate::library::check_collection_name(&self.collection).or_else(|e| refuse("collection", e.to_string()))
    }

    /// How decoding attends.
    #[must_use]
    pub fn attention(&self) -> AttentionConfig {
        AttentionConfig {
            strategy: self.strategy.0,
            sinks: self.sinks,
            window: self.window,
            k: self.k,
            ef: self.ef,
            index: self.index.0,
        }
    }

    /// What becomes of cached chunks.
    #[must_use]
    pub fn blending(&self) -> BlendConfig {
        BlendConfig { mode: self.blend.0, ratio: self.ratio, check_layer: self.check_layer }
    }

    /// Settings of a GPU.
    #[must_use]
    pub fn cuda(&self) -> CudaConfig {
        CudaConfig {
            ordinal: self.gpu,
            memory_budget_bytes: self.gpu_memory_bytes,
            kernel_cache: Some(self.kernel_cache.clone()),
            fast_prefill: self.fast_prefill,
            portable: false,
        }
    }

    /// Settings of the engine.
    ///
    /// # Errors
    /// [`QuireError::ModelNotFound`] when no model is named and none lies beside the program.
    pub fn engine(&self) -> Result<EngineConfig> {
        Ok(EngineConfig {
            model_dir: self.model_dir()?,
            device: self.device.0,
            cuda: self.cuda(),
            threads: self.threads,
            kv_dtype: match self.kv_format.0 {
                KvFormat::Auto => None,
                KvFormat::F32 => Some(KvDtype::F32),
                KvFormat::Bf16 => Some(KvDtype::Bf16),
            },
            max_context: (self.max_context > 0).then_some(self.max_context),
            max_sequences: self.max_sequences,
            step_tokens: self.step_tokens,
            mixed_prefill_tokens: self.mixed_prefill_tokens,
            prefill_chunk: self.prefill_chunk,
            kv_budget_bytes: self.kv_budget_bytes,
            prefix_cache: self.prefix_cache,
            queue: self.queue,
            wait_for_index: false,
        })
    }

    /// The model's folder: as set, else the reference model that lies beside the program. What is set and does not
    /// exist, but may be a name on the hub, is looked for in the hub's cache.
    ///
    /// # Errors
    /// [`QuireError::ModelNotFound`] with the places that were searched; [`QuireError::Hub`] for a model that was not
    /// fetched, or not completely.
    pub fn model_dir(&self) -> Result<PathBuf> {
        match &self.model {
            Some(path) if path.exists() => Ok(path.clone()),
            Some(path) => match path.to_str().and_then(|text| text.parse::<ModelId>().ok()) {
                Some(id) => hub().cache().find(&id, hub().offline),
                None => Ok(path.clone()),
            },
            None => find_shipped("models/reference", "eval/models/reference", "config.json")
                .map_err(|searched| QuireError::ModelNotFound { searched }),
        }
    }

    /// The name under which the model is offered: as set, else the model's name on the hub, else its folder's.
    #[must_use]
    pub fn served_name(&self, model_dir: &Path) -> String {
        let on_hub = || hub::snapshot_name(model_dir);
        let folder = || model_dir.file_name().map(|name| name.to_string_lossy().into_owned());
        self.model_name.clone().or_else(on_hub).or_else(folder).unwrap_or_else(|| "model".into())
    }
}

/// Where models of the hub are kept and fetched from: not settings of Quire, but the variables that all of the hub's
/// tools read.
#[must_use]
pub fn hub() -> HubConfig {
    HubConfig::from_variables(&|name| std::env::var_os(name))
}

/// Finds a folder that ships with the program and contains `witness`: `../share/quire/INSTALLED` beside the
/// executable, then `IN_TREE` in the folders above the executable, above the current folder, and in the source tree
/// the program was built from.
///
/// # Errors
/// The places that were searched.
pub fn find_shipped(installed: &str, in_tree: &str, witness: &str) -> std::result::Result<PathBuf, Vec<PathBuf>> {
    let executable = std::env::current_exe().ok();
    let beside = executable.as_deref().and_then(Path::parent);
    let mut places = Vec::new();
    places.extend(beside.and_then(Path::parent).map(|p| p.join("share/quire").join(installed)));
    let current = std::env::current_dir().ok();
    for start in [beside, current.as_deref()].into_iter().flatten() {
        places.extend(start.ancestors().map(|folder| folder.join(in_tree)));
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(|root| root.join(in_tree));
    places.extend(source);
    match places.iter().find(|place| place.join(witness).is_file()) {
        Some(found) => Ok(found.clone()),
        None => Err(places),
    }
}

fn default_data_dir() -> PathBuf {
    user_dir("XDG_DATA_HOME", ".local/share").join("quire")
}

fn default_kernel_cache() -> PathBuf {
    user_dir("XDG_CACHE_HOME", ".cache").join("quire/kernels")
}

/// The folder that the variable names, else the one below the user's home, else the system's for temporary files.
fn user_dir(variable: &str, below_home: &str) -> PathBuf {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(variable).or_else(|| absolute("HOME").map(|home| home.join(below_home))).unwrap_or_else(std::env::temp_dir)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn load(flags: &SettingsArgs, environment: &[(&str, &str)], file: Option<&Path>) -> Result<Config> {
        let environment: Vec<_> = environment.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Config::from_layers(flags, &environment, file)
    }

    fn origin_of<'a>(config: &'a Config, key: &str) -> &'a str {
        &config.origins.iter().find(|(k, _)| *k == key).unwrap().1
    }

    #[test]
    fn flags_beat_environment_beats_file_beats_defaults() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quire.toml");
        std::fs::write(&path, "top_chunks = 3\nk = 7\nwindow = 99\nstrategy = \"window\"\n").unwrap();
        let flags = SettingsArgs { top_chunks: Some(5), ..SettingsArgs::default() };
        let environment = [("QUIRE_TOP_CHUNKS", "4"), ("QUIRE_K", "8"), ("QUIRE_RATIO", "0.25")];
        let config = load(&flags, &environment, Some(&path)).unwrap();
        let s = &config.settings;
        assert_eq!((s.top_chunks, s.k, s.window, s.sinks, s.ratio), (5, 8, 99, 4, 0.25));
        assert_eq!(s.strategy, Named(Strategy::Window));
        assert_eq!(origin_of(&config, "top_chunks"), "flag --top-chunks");
        assert_eq!(origin_of(&config, "k"), "environment QUIRE_K");
        assert!(origin_of(&config, "window").ends_with("quire.toml"), "{}", origin_of(&config, "window"));
        assert_eq!(origin_of(&config, "sinks"), "default");
    }

    #[test]
    fn texts_that_look_like_numbers_stay_texts() {
        let environment = [("QUIRE_COLLECTION", "2024"), ("QUIRE_API_KEY", "007"), ("QUIRE_DATA_DIR", "1")];
        let config = load(&SettingsArgs::default(), &environment, None).unwrap();
        assert_eq!(config.settings.collection, "2024");
        assert_eq!(config.settings.api_key.as_deref(), Some("007"));
        assert_eq!(config.settings.data_dir, PathBuf::from("1"));
    }

    #[test]
    fn wrong_values_name_setting_origin_and_expectation() {
        let check = |environment: &[(&str, &str)], parts: &[&str]| {
            let error = load(&SettingsArgs::default(), environment, None).unwrap_err().to_string();
            for part in parts {
                assert!(error.contains(part), "{error} lacks {part}");
            }
        };
        check(&[("QUIRE_K", "many")], &["`k`", "environment", "many"]);
        check(&[("QUIRE_STRATEGY", "magic")], &["strategy", "retrieval", "magic"]);
        check(&[("QUIRE_RATIO", "1.5")], &["`ratio`", "environment QUIRE_RATIO", "0 to 1", "1.5"]);
        check(&[("QUIRE_CHUNK_OVERLAP", "200")], &["chunk_overlap", "half of chunk_tokens"]);
        check(&[("QUIRE_COLLECTION", "../x")], &["collection", "../x"]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("quire.toml");
        std::fs::write(&path, "top_chunk = 3\n").unwrap();
        let error = load(&SettingsArgs::default(), &[], Some(&path)).unwrap_err().to_string();
        assert!(error.contains("top_chunk"), "{error}");
    }

    #[test]
    fn unknown_variables_are_told() {
        let environment = [("QUIRE_TOPCHUNKS", "4"), ("QUIRE_CACHE", "/x")];
        let config = load(&SettingsArgs::default(), &environment, None).unwrap();
        assert_eq!(config.unknown_variables, ["QUIRE_TOPCHUNKS"]);
    }
}
