//! Settings of the engine and of a request, with their defaults and their limits.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::backend::cuda::CudaConfig;
use crate::error::{EngineError, Result};
use crate::kv::KvDtype;

/// Settings of an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// The model's folder, as Hugging Face publishes it.
    pub model_dir: PathBuf,
    /// Where the model computes.
    pub device: DeviceChoice,
    /// The GPU's settings, where one is used.
    pub cuda: CudaConfig,
    /// Threads of the CPU backend; 0: all cores.
    pub threads: usize,
    /// Format of KV; `None`: bf16 when the weights have 16 bits, else f32.
    pub kv_dtype: Option<KvDtype>,
    /// Limit on prompt and answer in tokens; `None`: the model's own.
    pub max_context: Option<usize>,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
    /// Tokens of a step over all sequences: one for each that decodes, the rest for parts of prompts. Decoding is never
    /// held back, and a prompt reads one token a step at least.
    pub step_tokens: usize,
    /// Tokens of prompts in a step in which some sequence decodes at most. Fewer: an answer goes on more evenly while prompts
    /// are read; more: prompts are read faster.
    pub mixed_prefill_tokens: usize,
    /// Tokens of one prompt that are read in a step at most; also those of a step of computing a chunk.
    pub prefill_chunk: usize,
    /// Bytes of KV that all running sequences and the prefix cache may hold; 0: three quarters of what weights leave of the
    /// memory that the process may use, on a GPU all that is left there.
    pub kv_budget_bytes: u64,
    /// Bytes of chunks' KV that are kept in the host's memory once a request has read them; with a GPU, page-locked. `None`: a
    /// quarter of the memory that the process may use with a GPU, a sixteenth of what weights leave without.
    pub host_cache_bytes: Option<u64>,
    /// Bytes of the GPU's memory for chunks that are used often; `None`: a sixteenth of what is left for KV.
    pub device_cache_bytes: Option<u64>,
    /// Keep the KV of prompts and share it with later prompts that begin alike.
    pub prefix_cache: bool,
    /// Requests that may wait.
    pub queue: usize,
    /// For measurements: what leaves the window of a request waits for its index, instead of being attended exactly meanwhile.
    /// Repeatable, not faster. Other requests go on.
    pub wait_for_index: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            model_dir: PathBuf::new(),
            device: DeviceChoice::Auto,
            cuda: CudaConfig::default(),
            threads: 0,
            kv_dtype: None,
            max_context: None,
            max_sequences: 8,
            step_tokens: 512,
            mixed_prefill_tokens: 112,
            prefill_chunk: 512,
            kv_budget_bytes: 0,
            host_cache_bytes: None,
            device_cache_bytes: None,
            prefix_cache: true,
            queue: 64,
            wait_for_index: false,
        }
    }
}

macro_rules! named_values {
    ($(#[$doc:meta])* $name:ident, $words:literal { $($(#[$item_doc:meta])* $item:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name { $($(#[$item_doc])* #[serde(rename = $text)] $item),* }

        impl std::str::FromStr for $name {
            type Err = EngineError;
            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($text => Ok($name::$item),)*
                    other => Err(EngineError::InvalidRequest(format!(
                        concat!($words, ": expected one of ", $("`", $text, "` "),*, "found `{}`"), other
                    ))),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $($name::$item => $text),* })
            }
        }
    };
}

named_values! {
    /// Where a model computes.
    DeviceChoice, "the device" {
        /// On a GPU where there is a usable one, else on the CPU.
        Auto = "auto",
        /// On the CPU.
        Cpu = "cpu",
        /// On an NVIDIA GPU; without one, loading fails and says what is missing.
        Cuda = "cuda",
    }
}

named_values! {
    /// How decoding attends tokens outside of the recent window.
    Strategy, "the strategy" {
        /// All tokens, exactly.
        Full = "full",
        /// Only sinks and recent window (StreamingLLM, arXiv 2309.17453).
        Window = "window",
        /// Sinks, recent window, and the keys that an index finds (RetrievalAttention, arXiv 2409.10516).
        Retrieval = "retrieval",
    }
}

named_values! {
    /// What becomes of cached chunks in a prompt: the rule that chooses which of their tokens are recomputed. A chunk whose
    /// state is exact, since it stands behind the very tokens that it was computed behind, is used as it is in all of them but
    /// `full-recompute`.
    BlendMode, "the blend mode" {
        /// The tokens that the question and the first token of the answer attend most.
        Answer = "answer",
        /// The tokens that the question attends most.
        Question = "question",
        /// The tokens whose values deviate most on an early layer (CacheBlend, arXiv 2405.16444).
        CacheBlend = "cacheblend",
        /// The first tokens of each chunk, as many of each as the ratio pays for.
        Heads = "heads",
        /// The first 32 tokens of each chunk (EPIC, arXiv 2410.15332), whatever the ratio.
        Epic = "epic",
        /// Tokens drawn at random, to compare with.
        Random = "random",
        /// Keys are rotated to the new positions; nothing is recomputed.
        Reuse = "reuse",
        /// Chunks are ignored: everything is computed.
        FullRecompute = "full-recompute",
    }
}

named_values! {
    /// What is added to the keys and values of tokens that stay cached: on every layer but the first, by head, the mean of what
    /// recomputing has changed.
    Correction, "the correction" {
        /// Nothing.
        None = "none",
        /// The mean over all recomputed tokens of the prompt.
        Prompt = "prompt",
        /// The mean over the recomputed tokens of the same chunk, drawn towards the prompt's.
        Chunk = "chunk",
    }
}

named_values! {
    /// Why so much of a context was recomputed.
    GateReason, "the reason" {
        /// The gate is off: as the settings say.
        Off = "off",
        /// It saw no cause for more than the usual share.
        Usual = "usual",
        /// The chunks are small: each was computed with little before it.
        SmallChunks = "small-chunks",
        /// The scores are spread over many tokens: the usual share would have too little of them.
        Spread = "spread",
        /// The question looks at many chunks: its answer is put together from facts that span them.
        ManyChunks = "many-chunks",
        /// It looks at so many of them, as counting and aggregating does, that all of it is computed.
        Everywhere = "everywhere",
        /// So few tokens are cached that choosing among them costs what reuse saves: all of them.
        FewTokens = "few-tokens",
    }
}

/// Settings of attention for one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionConfig {
    /// What happens to tokens outside of sinks and window.
    pub strategy: Strategy,
    /// First tokens that are always attended.
    pub sinks: usize,
    /// Recent tokens that are always attended, the newest included.
    pub window: usize,
    /// Cold keys that each query head attends.
    pub k: usize,
    /// Candidates that a graph search keeps; at least `k` is used.
    pub ef: usize,
    /// The index over cold keys.
    #[serde(with = "index_name")]
    pub index: ann_index::IndexKind,
}

/// An index by its name.
mod index_name {
    use ann_index::IndexKind;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(kind: &IndexKind, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(kind)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<IndexKind, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Default for AttentionConfig {
    fn default() -> Self {
        AttentionConfig {
            strategy: Strategy::Full,
            sinks: 4,
            window: 512,
            k: 128,
            ef: 256,
            index: ann_index::IndexKind::Flat,
        }
    }
}

impl AttentionConfig {
    /// Most that sinks, window, `k` and `ef` may be: beyond any context, and small enough to add and multiply.
    pub const LIMIT: usize = 1 << 24;

    /// # Errors
    /// [`EngineError::RequestSetting`] for a window or `k` of 0, for numbers above [`LIMIT`](Self::LIMIT), and for an index
    /// that this program is built without.
    pub fn validate(&self) -> Result<()> {
        let wrong = |parameter, problem| EngineError::RequestSetting { of: "attention", parameter, problem };
        for (name, value) in [("sinks", self.sinks), ("window", self.window), ("k", self.k), ("ef", self.ef)] {
            if value > Self::LIMIT {
                return Err(wrong(name, format!("expected at most {}, found {value}", Self::LIMIT)));
            }
        }
        if self.strategy != Strategy::Full && self.window == 0 {
            return Err(wrong("window", "expected at least 1, found 0".into()));
        }
        if self.strategy == Strategy::Retrieval {
            self.index.check_built_in().map_err(|error| wrong("index", error.to_string()))?;
        }
        if self.strategy == Strategy::Retrieval && self.k == 0 {
            let problem = "expected at least 1, found 0; strategy `window` attends no cold keys";
            return Err(wrong("k", problem.into()));
        }
        Ok(())
    }
}

/// Settings of blending for one request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BlendConfig {
    /// What becomes of cached chunks.
    pub mode: BlendMode,
    /// Share of the cached tokens that is recomputed, 0 to 1. By default .1: with the question, which `answer` reads twice, and what the
    /// gate adds, that was 14 % of the computation in questions over ten passages. `epic`, `reuse` and `full-recompute` do not look at it.
    pub ratio: f32,
    /// Instead of `ratio`, for `answer` and `question`: as many tokens are recomputed as have this share of the attention that
    /// the rule goes by, above 0, up to 1. A question that looks at few places pays less than one that looks everywhere.
    pub mass: Option<f32>,
    /// How tokens that stay cached are corrected; `None`: as the rule does by itself ([`correction`](Self::correction)).
    pub correction: Option<Correction>,
    /// The layer on which `cacheblend` compares fresh and cached values, also where it stands in for `answer` and `question`.
    /// Up to it, everything is computed.
    pub check_layer: usize,
    /// When `answer` and `question` recompute more than `ratio`; not with `mass`.
    pub gate: GateConfig,
}

/// When more than the usual share is recomputed, by what reading the question over the cached chunks has shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GateConfig {
    /// Whether it acts. Off: every request recomputes the share that the settings say.
    pub on: bool,
    /// Where the mean length of the chunks is below this, in tokens, at least `small_ratio` is recomputed.
    pub small_tokens: usize,
    /// See `small_tokens`.
    pub small_ratio: f32,
    /// So many tokens are recomputed as have this share of the scores, 0 to 1, where these are more than usual.
    pub mass: f32,
    /// But no more than this share of the tokens, where that is above the usual one.
    pub most: f32,
    /// `most` is recomputed where the scores are in as many chunks as this ([`GateReport::breadth`](crate::GateReport)), unless
    /// these are small; 0: never.
    pub wide: f32,
    /// The same for everything.
    pub whole: f32,
    /// Neighbours on either side, in its chunk, that are recomputed with a chosen token, within the same budget.
    pub reach: usize,
}

impl Default for GateConfig {
    fn default() -> Self {
        GateConfig {
            on: true,
            small_tokens: 96,
            small_ratio: 0.17,
            mass: 0.56,
            most: 0.35,
            wide: 14.5,
            whole: 0.0,
            reach: 0,
        }
    }
}

impl GateConfig {
    /// See the field; 0 where the gate is off.
    pub(crate) fn reach(&self) -> usize {
        if self.on { self.reach } else { 0 }
    }

    fn validate(&self) -> Result<()> {
        for (name, share) in [("small_ratio", self.small_ratio), ("mass", self.mass), ("most", self.most)] {
            if !(0.0..=1.0).contains(&share) {
                let problem = format!("expected {name} of the gate from 0 to 1, found {share}");
                return Err(EngineError::RequestSetting { of: "blending", parameter: "blend_gate", problem });
            }
        }
        Ok(())
    }
}

impl Default for BlendConfig {
    fn default() -> Self {
        BlendConfig {
            mode: BlendMode::Answer,
            ratio: 0.1,
            mass: None,
            correction: None,
            check_layer: 1,
            gate: GateConfig::default(),
        }
    }
}

impl BlendConfig {
    /// How tokens that stay cached are corrected: as set, else by chunk for the rules that look at the question, and not at all
    /// for those that were published without.
    #[must_use]
    pub fn correction(&self) -> Correction {
        let own = if self.mode.asks() { Correction::Chunk } else { Correction::None };
        self.correction.unwrap_or(own)
    }

    /// `layers`: of the model.
    ///
    /// # Errors
    /// [`EngineError::RequestSetting`] for a ratio outside 0 to 1, for a share of attention that is none or that the mode does
    /// not go by, and for a check layer that the model does not have.
    pub fn validate(&self, layers: usize) -> Result<()> {
        let wrong = |parameter, problem| EngineError::RequestSetting { of: "blending", parameter, problem };
        if !(0.0..=1.0).contains(&self.ratio) {
            return Err(wrong("ratio", format!("expected a number from 0 to 1, found {}", self.ratio)));
        }
        if let Some(mass) = self.mass {
            if !(mass > 0.0 && mass <= 1.0) {
                return Err(wrong("blend_mass", format!("expected a number above 0, up to 1, found {mass}")));
            }
            if !self.mode.asks() {
                let problem =
                    format!("expected only with `answer` or `question`, found with `{}`; set a ratio", self.mode);
                return Err(wrong("blend_mass", problem));
            }
        }
        self.gate.validate()?;
        // On layer 0 keys and values depend on nothing but the token: there is nothing to compare.
        let checks = self.mode == BlendMode::CacheBlend || self.mode.asks();
        if checks && !(1..layers.max(2)).contains(&self.check_layer) {
            let (last, found) = (layers.saturating_sub(1).max(1), self.check_layer);
            let problem = format!("expected from 1 to {last} for a model of {layers} layers, found {found}");
            return Err(wrong("check_layer", problem));
        }
        Ok(())
    }
}

impl BlendMode {
    /// Whether it goes by the attention that the question pays, so that it needs one.
    #[must_use]
    pub fn asks(self) -> bool {
        matches!(self, BlendMode::Answer | BlendMode::Question)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_list_what_there_is() {
        for s in [Strategy::Full, Strategy::Window, Strategy::Retrieval] {
            assert_eq!(s.to_string().parse::<Strategy>().unwrap(), s);
            assert_eq!(serde_json::to_string(&s).unwrap(), format!("\"{s}\""));
        }
        let error = "blend".parse::<BlendMode>().unwrap_err().to_string();
        assert!(error.contains("`full-recompute`") && error.contains("found `blend`"), "{error}");
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        assert!(BlendConfig { ratio: f32::NAN, ..Default::default() }.validate(8).is_err());
        assert!(BlendConfig { check_layer: 0, ..Default::default() }.validate(8).is_err());
        assert!(BlendConfig { check_layer: 8, ..Default::default() }.validate(8).is_err());
        assert!(BlendConfig::default().validate(8).is_ok());
        let mass = |mode, mass| BlendConfig { mode, mass: Some(mass), ..Default::default() }.validate(8);
        assert!(mass(BlendMode::Answer, 0.9).is_ok() && mass(BlendMode::Question, 1.0).is_ok());
        for (mode, share) in [(BlendMode::Answer, 0.0), (BlendMode::Answer, f32::NAN), (BlendMode::Epic, 0.9)] {
            let refused = mass(mode, share).unwrap_err().to_string();
            assert!(refused.contains("blend_mass"), "{refused}");
        }
        let attention = AttentionConfig { strategy: Strategy::Retrieval, k: 0, ..Default::default() };
        assert!(attention.validate().is_err());
        let kinds = ann_index::IndexKind::ALL;
        for (kind, strategy) in kinds.into_iter().flat_map(|k| [(k, Strategy::Full), (k, Strategy::Retrieval)]) {
            let attention = AttentionConfig { strategy, index: kind, ..Default::default() };
            let wanted = kind.is_built_in() || strategy == Strategy::Full;
            assert_eq!(attention.validate().is_ok(), wanted, "{kind} {strategy}");
        }
        let attention = AttentionConfig { k: usize::MAX, ..Default::default() };
        assert!(attention.validate().unwrap_err().to_string().contains("attention k"));
    }
}
