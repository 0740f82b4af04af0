//! Transformer inference with tiered KV, retrieval inside attention and chunk blending.
//!
//! [`Engine`] is a handle to the one thread that owns the model and all sequences: [`Engine::submit`] takes a
//! [`Request`] and gives an [`EventStream`]. A prompt's context is a list of [`PromptChunk`]s whose KV may come from a
//! [`ChunkSource`]; [`Engine::chunk_kv`] makes it, [`BlendConfig`] says how much of it is recomputed in its new
//! place. [`AttentionConfig`] says what decoding attends outside of its recent window.
//!
//! Inside: `model` is the forward pass, `backend` the arithmetic, `attention` the states that merge, `kv` who owns
//! which token, `blend` the reuse of chunks. `scheduler` decides what each request does next, `runner` executes it,
//! `sequence` is a request; `prefix_cache` keeps what prompts with the same beginning share.

mod answer_text;
mod attention;
mod backend;
mod blend;
mod chat;
mod chunk;
mod config;
mod divergence;
mod engine;
mod error;
mod job;
mod kv;
mod logprobs;
mod memory;
mod model;
mod numerics;
mod prefix_cache;
#[cfg(test)]
mod properties;
mod request;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
mod stop;
mod tiers;
mod tokenizer;
mod unwind;
mod weights;

pub use attention::AttentionState;
pub use backend::cpu::Isa;
pub use backend::cuda::{
    AttentionShape, CudaConfig, ScatteredAttention, copy_bandwidth, decode_attention, find_gpu,
    missing_libraries as missing_cuda_libraries, scattered_attention,
};
pub use chat::{ChatMessage, ChatTemplate, ContextPrompt, PromptFormat};
pub use chunk::{ChunkKv, ChunkLayer, ChunkSource, PromptChunk};
pub use config::{
    AttentionConfig, BlendConfig, BlendMode, Correction, DeviceChoice, EngineConfig, GateConfig, GateReason, Strategy,
};
pub use divergence::{kl_divergence, largest_logit};
pub use engine::{Engine, EngineLoad, Model};
pub use error::{EngineError, Result};
pub use kv::codec::{CodecError, KvCodec};
pub use kv::{KvDtype, KvShape};
pub use memory::limit as memory_limit;
pub use model::generation::GenerationConfig;
pub use model::rope::{Rope, RopeScaling, RopeTable};
pub use model::spec::{Family, ModelSpec};
pub use prefix_cache::{PageKey, PrefixCache};
pub use request::{
    Alternative, AttentionInputs, ChunkAttention, DecodeStats, Event, EventStream, FinishReason, Finished, GateReport,
    MAX_TOP_LOGPROBS, PrefillStats, PreparedContext, Prompt, Request, TokenEvent, TokenLogprob, Usage,
};
pub use sampler::{Sampled, Sampler, SamplingParams};
pub use stop::StopMatcher;
pub use tiers::{ChunkName, Tier, TierLoad};
pub use tokenizer::{StreamDecoder, Tokenizer};
pub use weights::{Dtype, Tensor, Weights};
