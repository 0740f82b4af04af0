//! Every setting of Quire, in one place: flags, then environment, then files, then defaults.
//!
//! One table below makes the settings, their flags (`--top-chunks`), their environment variables
//! (`QUIRE_TOP_CHUNKS`) and their keys in files (`top_chunks`), so that none can be forgotten. It also says which
//! commands use a setting, and what a `quire.toml` of just any folder may not decide. This is the only file that reads
//! the environment.
//!
//! * `flags`: which type a flag takes;
//! * `values`: sizes, names, secrets;
//! * `access`: who may reach a server;
//! * `blending`: what becomes of cached chunks, and how a server watches that;
//! * `layers`: which of flags, environment and files wins.

mod access;
mod blending;
mod flags;
mod layers;
mod values;

use std::path::{Path, PathBuf};

use ann_index::IndexKind;
use chunk_cache::EvictionPolicy;
use engine::{
    AttentionConfig, BlendMode, Correction, CudaConfig, DeviceChoice, EngineConfig, GenerationConfig, KvDtype,
    SamplingParams, Strategy,
};
use serde::{Deserialize, Serialize};

use crate::error::{QuireError, Result};
pub use access::Names;
use access::{check_hosts, check_key, check_origins};
pub use flags::Flag;
use hub::{HubConfig, ModelId};
pub use layers::Config;
use layers::Files;
pub use values::{Bytes, GenerationSource, KvFormat, Named, Secret};

/// What is known of a setting beside its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Its key in files; the flag has dashes for the underscores.
    pub key: &'static str,
    /// Whether it is true or false, so that `--key` and `--no-key` say it all.
    pub switch: bool,
    /// Commands that use it; `eval` and `bench` are those of `quire-bench`, `bench` all of its measurements but `eval`.
    pub commands: &'static [&'static str],
    /// Only flags, the environment, the user's file and a file that was named may set it.
    pub personal: bool,
    /// It is shown nowhere.
    pub secret: bool,
}

impl Setting {
    /// Whether the command uses it: `ask`, or `bench decode`. `config show` shows them all.
    #[must_use]
    pub fn is_used_by(&self, command: &str) -> bool {
        let within =
            |name: &str| command.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with(' '));
        within("config") || self.commands.iter().any(|name| within(name))
    }
}

/// A setting by its key.
#[must_use]
pub fn setting(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

/// Every command reads these.
const ALL: &[&str] = &[
    "ingest",
    "ls",
    "rm",
    "collections",
    "reclaim",
    "search",
    "ask",
    "chat",
    "pull",
    "serve",
    "cache",
    "catalog",
    "doctor",
    "eval",
    "bench",
    "demo",
];
/// These load a model.
const MODEL: &[&str] = &["ingest", "rm", "reclaim", "ask", "chat", "serve", "doctor", "eval", "bench", "demo"];
/// These use the data folder.
const FOLDER: &[&str] = &[
    "ingest",
    "ls",
    "rm",
    "collections",
    "reclaim",
    "search",
    "ask",
    "chat",
    "serve",
    "cache",
    "catalog",
    "doctor",
    "bench",
    "demo",
];
/// These use one collection.
const COLLECTION: &[&str] = &["ingest", "ls", "rm", "search", "ask", "chat"];
/// These read documents into a collection.
const INGESTING: &[&str] = &["ingest", "serve"];
/// These ask a running server.
const ASKING: &[&str] = &["ingest", "ls", "rm", "collections", "reclaim", "search", "ask", "chat", "cache", "catalog"];
/// These cut documents into chunks.
const SPLITTING: &[&str] = &["ingest", "serve", "demo", "bench"];
/// These decide how large the chunk store may become.
const STORING: &[&str] = &["ingest", "serve", "doctor", "demo", "bench"];
/// Chunks make way under these.
const EVICTING: &[&str] = &["ingest", "ask", "chat", "serve", "cache evict", "demo", "bench"];
/// These look for chunks in the store.
const CHUNKS: &[&str] = &["ingest", "rm", "reclaim", "ask", "chat", "serve", "demo", "bench"];
/// These search.
const RETRIEVING: &[&str] = &["search", "ask", "chat", "serve", "demo"];
/// These write answers.
const ANSWERING: &[&str] = &["ask", "chat", "serve", "demo", "bench"];
/// These decode with a strategy.
const DECODING: &[&str] = &["ask", "chat", "serve", "demo", "eval", "bench"];
/// These listen.
const SERVING: &[&str] = &["serve", "bench start"];

/// Who may decide a setting.
const ANYONE: bool = false;
/// A file that lies in just any folder may not.
const PERSONAL: bool = true;

macro_rules! settings {
    ($($heading:literal, $commands:ident, $who:ident { $($(#[doc = $doc:literal])+ $name:ident: $type:ty = $default:expr, $shown:literal;)* })*) => {
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
            #[arg(allow_negative_numbers = true, value_parser = <$type as Flag>::parser())]
            #[serde(skip_serializing_if = "Option::is_none")]
            pub $name: Option<<$type as Flag>::Value>,
        )*)* }

        /// All settings, in the order of the documentation.
        pub const SETTINGS: &[Setting] = &[$($( Setting {
            key: stringify!($name),
            switch: <$type as Flag>::SWITCH,
            commands: $commands,
            personal: $who,
            secret: <$type as Flag>::SECRET,
        }, )*)*];

        /// The names of all settings, in the order of the documentation.
        pub const KEYS: &[&str] = &[$($( stringify!($name), )*)*];
    };
}

settings! {
    "Model", MODEL, ANYONE {
        /// The model: a folder as Hugging Face publishes it, or OWNER/NAME that `quire pull` fetched
        model: Option<PathBuf> = None, "the reference model found beside the program";
        /// Name under which the server offers the model
        model_name: Option<String> = None, "the model's name on the hub, else that of its folder";
        /// Where the model computes: auto (a GPU where there is one), cpu or cuda
        device: Named<DeviceChoice> = Named(DeviceChoice::Auto), "auto";
        /// Which GPU, from 0
        gpu: usize = 0, "0";
        /// Bytes of the GPU's memory that may be used; 0: most of what is free
        gpu_memory_bytes: Bytes = Bytes(0), "0";
        /// Round activations to bf16 when a GPU reads a prompt: up to twice as fast, less exact
        fast_prefill: bool = false, "false";
        /// Threads of the CPU backend; 0: all cores
        threads: usize = 0, "0";
        /// Number format of KV: auto, f32 or bf16
        kv_format: Named<KvFormat> = Named(KvFormat::Auto), "auto: bf16 for 16-bit weights";
        /// Limit on prompt and answer in tokens; 0: the model's own
        max_context: usize = 0, "0";
        /// Requests that run at the same time
        max_sequences: usize = 8, "8";
        /// Requests that may wait; more are refused with 429
        queue: usize = 256, "256";
        /// Tokens of a step over all requests: one for each that is answered, the rest for prompts
        step_tokens: usize = 512, "512";
        /// Tokens of prompts in a step in which some request is answered at most
        mixed_prefill_tokens: usize = 112, "112";
        /// Tokens of one prompt that a step reads at most
        prefill_chunk: usize = 512, "512";
        /// Bytes of KV in memory over all running requests and the prefix cache; 0: most of what weights leave
        kv_budget_bytes: Bytes = Bytes(0), "0";
        /// Bytes of chunks' state that are kept in memory once a question has read them, page-locked where there is a GPU
        host_cache_bytes: Option<Bytes> = None, "a quarter of the memory with a GPU, else a sixteenth of what weights leave";
        /// Bytes of a GPU's memory for chunks that are used often
        device_cache_bytes: Option<Bytes> = None, "a sixteenth of what is left for KV";
        /// Share the KV of prompts without documents that begin alike
        prefix_cache: bool = true, "true";
    }
    "Model", MODEL, PERSONAL {
        /// Folder for kernels that were compiled for a GPU
        kernel_cache: PathBuf = default_kernel_cache(), "$XDG_CACHE_HOME/quire/kernels or ~/.cache/quire/kernels";
    }
    "Documents", FOLDER, PERSONAL {
        /// Folder for collections and cached chunks
        data_dir: PathBuf = default_data_dir(), "$XDG_DATA_HOME/quire or ~/.local/share/quire";
    }
    "Documents", COLLECTION, ANYONE {
        /// Collection of documents to use
        collection: String = "default".into(), "default";
    }
    "Documents", INGESTING, ANYONE {
        /// Leave the state of chunks to their first use: documents are found at once, first answers from them take longer
        lazy: bool = false, "false";
        /// Whose endings of words the collection knows: auto (each document's own language), or one of ar, da, de, el, en, es,
        /// fi, fr, hu, it, nl, no, pt, ro, ru, sv, ta and tr
        language: Option<String> = None, "what the collection has; auto for a new one";
    }
    "Documents", ASKING, ANYONE {
        /// Ask the server that runs on the data folder, where there is one; false: work alone
        server: bool = true, "true";
    }
    "Documents", SPLITTING, ANYONE {
        /// Tokens of a chunk at most
        chunk_tokens: usize = 256, "256";
        /// Tokens that neighbouring chunks share at most
        chunk_overlap: usize = 32, "32";
    }
    "Documents", STORING, PERSONAL {
        /// Bytes of cached chunks on disk; others make way. The store keeps what it is given
        cache_bytes: Option<Bytes> = None, "what the store was given last; 8G for a new one";
    }
    "Documents", EVICTING, PERSONAL {
        /// Which cached chunks make way first: cachecraft (those that save the least compute for their bytes, of late), lru (the
        /// least recently used) or lfu (the least often used)
        cache_policy: Named<EvictionPolicy> = Named(EvictionPolicy::CacheCraft), "cachecraft";
    }
    "Documents", CHUNKS, PERSONAL {
        /// Salt of cached chunks: tenants with different salts never share one
        tenant: String = String::new(), "empty";
    }
    "Answers", RETRIEVING, ANYONE {
        /// Chunks that a question retrieves
        top_chunks: usize = 8, "8";
    }
    "Answers", ANSWERING, ANYONE {
        /// Tokens of an answer at most where a request names no number; 0: until the text or the context ends
        max_tokens: usize = 0, "0";
        /// Sampling temperature where a request names none, 0 (greedy) to 2 as in the OpenAI API
        temperature: Option<f32> = None, "the model's, else 1";
        /// Sampling that the model comes with (generation_config.json): auto (where nothing else is named) or none
        generation_config: Named<GenerationSource> = Named(GenerationSource::Auto), "auto";
    }
    "Decoding", DECODING, ANYONE {
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
    "Blending", ANSWERING, ANYONE {
        /// What becomes of cached chunks: answer, question, cacheblend, heads, epic, random, reuse or full-recompute
        blend: Named<BlendMode> = Named(BlendMode::Answer), "answer";
        /// Share of cached tokens that is recomputed, 0 to 1
        ratio: f32 = 0.1, "0.1";
        /// Instead of the ratio: recompute tokens until this share of the attention is covered (answer and question)
        blend_mass: Option<f32> = None, "none";
        /// How tokens that stay cached are corrected: none, prompt or chunk
        correction: Option<Named<Correction>> = None, "chunk for answer and question, else none";
        /// Recompute more where a question turns out to need it, up to everything (answer and question, not with blend_mass)
        blend_gate: bool = true, "true";
        /// Layer on which cacheblend compares fresh and cached values
        check_layer: usize = 1, "1";
    }
    "Server", SERVING, PERSONAL {
        /// Address to listen on
        host: String = "127.0.0.1".into(), "127.0.0.1";
        /// Key that requests must carry as bearer token; other users of this machine see flags, so rather name a file
        api_key: Option<Secret> = None, "none: open to everyone who can connect";
        /// File that holds the key
        api_key_file: Option<PathBuf> = None, "none";
        /// Names under which a server without a key may be asked, beside localhost and its address, separated by commas; *: all
        allowed_hosts: Named<Names> = Named(Names::default()), "none";
        /// Origins of web pages that may use the server, such as `https://app.example`, separated by commas; *: all
        cors_origins: Named<Names> = Named(Names::default()), "none";
        /// Largest request body in bytes
        body_limit_bytes: Bytes = Bytes(8 << 20), "8M";
        /// Largest file that can be uploaded, in bytes; documents of up to 64M can be attached to a vector store
        upload_limit_bytes: Bytes = Bytes(512 << 20), "512M";
    }
    "Server", SERVING, ANYONE {
        /// Port to listen on; 0: any free one
        port: u16 = 8080, "8080";
        /// Connections at the same time; a further one takes the place of the one that has been silent longest
        max_connections: usize = 1024, "1024";
        /// Seconds that a connection may take until the head of its next request has come
        header_seconds: u64 = 30, "30";
        /// Seconds that the body of a request may take
        body_seconds: u64 = 60, "60";
        /// Seconds that a client may take nothing of its answer
        write_seconds: u64 = 60, "60";
        /// Seconds that running requests get at shutdown
        drain_seconds: u64 = 30, "30";
        /// Seconds between comments that keep a silent stream open
        keepalive_seconds: u64 = 15, "15";
        /// Share of the questions that are also read in full in the background, to compare, 0 to 1
        monitor_share: f32 = 0.0, "0: none";
        /// Mean divergence of a collection's answers from full recompute, in nats, from which on more is recomputed there
        monitor_limit: f32 = 0.2, "0.2";
        /// Prefix of the metrics that vLLM also has
        metrics_prefix: String = "vllm".into(), "vllm";
    }
    "Output", ALL, ANYONE {
        /// What to log to stderr: error, warn, info, debug, trace, or a filter as of tracing
        log: String = "warn".into(), "warn";
    }
}

/// Most chunks that a question may retrieve.
pub const MAX_TOP_CHUNKS: usize = 1024;

/// Bytes of cached chunks that a new store may hold where nobody says how many.
pub const NEW_STORE_BYTES: Bytes = Bytes(8 << 30);

impl Config {
    /// Reads all layers. `file`: as given by `--config`; otherwise `QUIRE_CONFIG`, otherwise `quire.toml` in the
    /// current folder if it is there. Below it lies the user's own file, if it is there.
    ///
    /// # Errors
    /// [`QuireError::Config`] naming the setting, its origin, what was expected and what came.
    pub fn load(flags: &SettingsArgs, file: Option<&Path>) -> Result<Config> {
        let environment: Vec<_> = std::env::vars_os()
            .filter_map(|(key, value)| Some((key.into_string().ok()?, value)))
            .filter(|(key, _)| key.starts_with("QUIRE_"))
            .collect();
        let variable = environment.iter().find(|(key, _)| key == "QUIRE_CONFIG").map(|(_, path)| PathBuf::from(path));
        let present = |path: PathBuf| Some(path).filter(|path| path.exists());
        let user = present(user_dir("XDG_CONFIG_HOME", ".config").join("quire/quire.toml"));
        // Whoever stands in the folder of the own file has one file, not two.
        let same =
            |path: &PathBuf| user.as_ref().is_some_and(|user| user.canonicalize().ok() == path.canonicalize().ok());
        let folder = present("quire.toml".into()).filter(|path| !same(path));
        let files = Files { named: file.map(Path::to_path_buf).or(variable), folder, user };
        Config::from_layers(flags, &environment, &files)
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
            ("body_limit_bytes", self.body_limit_bytes.0 as usize),
            ("upload_limit_bytes", self.upload_limit_bytes.0 as usize),
            ("keepalive_seconds", self.keepalive_seconds as usize),
            ("max_connections", self.max_connections),
            ("header_seconds", self.header_seconds as usize),
            ("body_seconds", self.body_seconds as usize),
            ("write_seconds", self.write_seconds as usize),
        ];
        for (key, value) in at_least_one {
            if value == 0 {
                return refuse(key, "expected at least 1, found 0".into());
            }
        }
        let day = 86_400;
        let at_most = [
            ("top_chunks", self.top_chunks, MAX_TOP_CHUNKS),
            ("threads", self.threads, 1024),
            ("max_connections", self.max_connections, 1 << 20),
            ("header_seconds", self.header_seconds as usize, day),
            ("body_seconds", self.body_seconds as usize, day),
            ("write_seconds", self.write_seconds as usize, day),
        ];
        for (key, value, limit) in at_most {
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
        if let Some(temperature) = self.temperature.filter(|t| !(0.0..=2.0).contains(t)) {
            return refuse("temperature", format!("expected 0 to 2, as in the OpenAI API, found {temperature}"));
        }
        self.check_blending().or_else(|(setting, problem)| refuse(setting, problem))?;
        if let Some(key) = &self.api_key {
            check_key(key).or_else(|problem| refuse("api_key", problem.into()))?;
        }
        values::check_log(&self.log).or_else(|problem| refuse("log", problem))?;
        check_hosts(&self.allowed_hosts.0).or_else(|problem| refuse("allowed_hosts", problem))?;
        check_origins(&self.cors_origins.0).or_else(|problem| refuse("cors_origins", problem))?;
        self.attention().validate().or_else(|e| refuse("strategy", e.to_string()))?;
        if let Some(language) = &self.language {
            documents::parse_language(language).map(|_| ()).or_else(|e| refuse("language", e.to_string()))?;
        }
        documents::check_collection_name(&self.collection).or_else(|e| refuse("collection", e.to_string()))
    }

    /// Bytes of cached chunks that a new store may hold.
    #[must_use]
    pub fn store_bytes(&self) -> u64 {
        self.cache_bytes.unwrap_or(NEW_STORE_BYTES).0
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

    /// How tokens are chosen where a request says nothing: as set, else as the model's `generation_config.json` says, else as in the
    /// OpenAI API.
    ///
    /// # Errors
    /// A model that is not found, or whose file is wrong.
    pub fn sampling(&self) -> Result<SamplingParams> {
        let generation = match self.generation_config.0 {
            GenerationSource::Auto => GenerationConfig::from_dir(&self.model_dir()?)?,
            GenerationSource::None => GenerationConfig::default(),
        };
        Ok(GenerationConfig { temperature: self.temperature.or(generation.temperature), ..generation }.sampling())
    }

    /// Settings of a GPU.
    #[must_use]
    pub fn cuda(&self) -> CudaConfig {
        CudaConfig {
            ordinal: self.gpu,
            memory_budget_bytes: self.gpu_memory_bytes.0,
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
            kv_budget_bytes: self.kv_budget_bytes.0,
            host_cache_bytes: self.host_cache_bytes.map(|bytes| bytes.0),
            device_cache_bytes: self.device_cache_bytes.map(|bytes| bytes.0),
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
                Some(id) => Ok(hub().cache().find(&id, hub().offline)?),
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
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).map(|root| root.join(in_tree));
    places.extend(source);
    match places.iter().find(|place| place.join(witness).is_file()) {
        Some(found) => Ok(found.clone()),
        None => Err(places),
    }
}

fn default_data_dir() -> PathBuf {
    user_dir("XDG_DATA_HOME", ".local/share").join("quire")
}

/// Where what was typed into conversations is remembered.
#[must_use]
pub fn chat_history() -> PathBuf {
    user_dir("XDG_STATE_HOME", ".local/state").join("quire/chat_history")
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

    #[test]
    fn the_help_of_language_lists_all_that_are_known() {
        let flags = <SettingsArgs as clap::Args>::augment_args(clap::Command::new("quire"));
        let flag =
            flags.get_arguments().find(|arg| arg.get_id() == "language").unwrap().get_help().unwrap().to_string();
        let listed: Vec<&str> = flag.split(|c: char| !c.is_alphabetic()).filter(|word| word.len() == 2).collect();
        let listed: Vec<&str> = listed.into_iter().filter(|word| !["of", "or"].contains(word)).collect();
        let Err(documents::DocumentsError::UnknownLanguage { known, .. }) = documents::parse_language("xx") else {
            panic!("xx is a language")
        };
        assert_eq!(listed, known, "{flag}");
    }

    #[test]
    fn a_setting_knows_the_commands_that_use_it() {
        let uses = |key: &str, command: &str| setting(key).unwrap().is_used_by(command);
        assert!(uses("top_chunks", "search") && !uses("temperature", "search") && !uses("host", "ask"));
        assert!(uses("k", "bench decode") && uses("host", "bench start") && !uses("host", "bench decode"));
        assert!(uses("log", "cache stats") && !uses("cache_bytes", "cache stats") && uses("host", "config show"));
        assert!(!uses("k", "benchmark") && setting("top_chunk").is_none());
    }
}
