//! The handle to the one thread that owns the model and all sequences.

mod device;
mod near;

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::mpsc::unbounded_channel;

use crate::backend::cuda::Limits as StepLimits;
use crate::chat::{ChatMessage, PromptFormat};
use crate::chunk::{ChunkKv, PromptChunk};
use crate::config::{AttentionConfig, BlendConfig, DeviceChoice, EngineConfig, Strategy};
use crate::error::{EngineError, Result};
use crate::job::Computation;
use crate::kv::building::cold_bytes;
use crate::kv::prefix::page_size;
use crate::kv::{KvDtype, KvShape};
use crate::memory;
use crate::model::spec::ModelSpec;
use crate::model::transformer::{Piece, Transformer, Want};
use crate::numerics;
use crate::prefix_cache::PageKey;
use crate::request::{
    AttentionInputs, ChunkAttention, EventStream, MAX_TOP_LOGPROBS, PreparedContext, Prompt, Request,
};
use crate::runner::{Command, Load, Runner, ask, never_fits};
use crate::scheduler::{Bytes, JOBS, Limits};
use crate::sequence::{Submitted, Waiting};
use crate::tiers::ChunkTiers;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// What an engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineLoad {
    /// Requests that are read or answered.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Bytes of KV of the running ones; pages that they share count once.
    pub kv_bytes: u64,
    /// Bytes of KV of the pages that the prefix cache keeps and no request uses; they give way to requests.
    pub cached_bytes: u64,
    /// Bytes of KV that both may hold.
    pub kv_budget_bytes: u64,
    /// How often a running request had to give its memory back, to be computed again later.
    pub preemptions: u64,
    /// Prompt tokens that the prefix cache was asked for.
    pub prefix_queries: u64,
    /// Of these, tokens whose state it had.
    pub prefix_hits: u64,
}

/// Adds the tokens that end an answer though the model's configuration does not list them: the tokenizer's end of a
/// text, and what the chat template puts behind an answer where nobody has said how to generate.
fn complete_eos(spec: &mut ModelSpec, tokenizer: &Tokenizer, chat: &PromptFormat) {
    let turn_end = if spec.eos_stated { None } else { chat.turn_end(tokenizer) };
    for token in tokenizer.eos().into_iter().chain(turn_end) {
        if !spec.eos.contains(&token) {
            spec.eos.push(token);
        }
    }
}

/// Cloneable handle to an engine. The engine stops when [`shutdown`](Engine::shutdown) was called or the last
/// handle is dropped, after the requests that it has taken.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    model: Arc<Transformer>,
    tokenizer: Tokenizer,
    chat: PromptFormat,
    queue: usize,
    limits: Limits,
    max_context: usize,
    fingerprint: [u8; 32],
    identity: u64,
    load: Arc<Load>,
    tiers: Arc<ChunkTiers>,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What a machine is taken to have that does not say.
const UNKNOWN_MEMORY: u64 = 8 << 30;

static NEXT_IDENTITY: AtomicU64 = AtomicU64::new(1);

impl Engine {
    /// Loads a model and starts its thread.
    ///
    /// # Errors
    /// Everything that can be wrong with a model's folder, each named.
    pub fn load(config: EngineConfig) -> Result<Engine> {
        let mut spec = ModelSpec::from_dir(&config.model_dir)?;
        let tokenizer = Tokenizer::from_dir(&config.model_dir, spec.vocab)?;
        let chat = PromptFormat::from_dir(&config.model_dir, &tokenizer)?;
        complete_eos(&mut spec, &tokenizer, &chat);
        let weights = Weights::open(&config.model_dir)?;
        let max_context = config.max_context.map_or(spec.max_context, |m| m.min(spec.max_context));
        let model = Arc::new(load_model(spec, &weights, &config, max_context)?);
        let limits = limits(&model, &config);
        let tiers = Arc::new(ChunkTiers::new(
            model.shape,
            model.cpu.isa,
            near::host_cache_bytes(&model, &config),
            model.device(),
        )?);
        let (page, budget) = (limits.page_bytes, limits.budget);
        if !page.fits(budget) {
            let (needed, budget) = (page.device + page.host, budget.device.max(budget.host));
            let why = format!(
                "a KV budget of {budget} bytes holds no page of {needed}: raise kv_budget_bytes, or use a smaller model \
                 where its weights leave no more"
            );
            return Err(EngineError::InvalidRequest(why));
        }
        let fingerprint = fingerprint(&weights, &model.spec);
        let (commands, receiver) = channel();
        let load = Arc::new(Load::default());
        let identity = NEXT_IDENTITY.fetch_add(1, Ordering::Relaxed);
        let runner = Runner {
            model: Arc::clone(&model),
            tokenizer: tokenizer.clone(),
            config: config.clone(),
            limits,
            max_context,
            identity,
            root: config.prefix_cache.then(|| prefix_root(&fingerprint, &model.shape, page_size(&model).0)),
            load: Arc::clone(&load),
            tiers: Arc::clone(&tiers),
            commands: receiver,
        };
        let thread = std::thread::Builder::new()
            .name("quire-engine".into())
            .spawn(move || runner.run())
            .map_err(|e| EngineError::Stopped(format!("its thread could not be started: {e}")))?;
        let inner = Inner {
            model,
            tokenizer,
            chat,
            limits,
            max_context,
            fingerprint,
            identity,
            load,
            tiers,
            commands,
            thread: Mutex::new(Some(thread)),
            queue: config.queue,
        };
        Ok(Engine { inner: Arc::new(inner) })
    }

    /// The model's shape.
    #[must_use]
    pub fn spec(&self) -> &ModelSpec {
        &self.inner.model.spec
    }

    /// The model's tokenizer.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.inner.tokenizer
    }

    /// How messages and context become a prompt.
    #[must_use]
    pub fn chat(&self) -> &PromptFormat {
        &self.inner.chat
    }

    /// The shape and format of KV.
    #[must_use]
    pub fn kv_shape(&self) -> KvShape {
        self.inner.model.shape
    }

    /// Limit on prompt and answer, in tokens.
    #[must_use]
    pub fn max_context(&self) -> usize {
        self.inner.max_context
    }

    /// Threads of the CPU backend.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.inner.model.cpu.pool.threads()
    }

    /// Bytes of weights that one decode step reads.
    #[must_use]
    pub fn weight_bytes_per_step(&self) -> usize {
        self.inner.model.bytes_per_step()
    }

    /// Hash of the weights (names, shapes, formats, bytes) and of everything else in the model's folder that its
    /// attention state depends on.
    #[must_use]
    pub fn model_fingerprint(&self) -> [u8; 32] {
        self.inner.fingerprint
    }

    /// How this engine computes the state of chunks, in words: engines whose words differ compute other numbers, by more than
    /// what rounding to the KV format leaves of the difference.
    #[must_use]
    pub fn numerics(&self) -> String {
        numerics::name(self.inner.model.activations(), self.kv_shape().dtype)
    }

    /// Hash of the tokenizer.
    #[must_use]
    pub fn tokenizer_fingerprint(&self) -> [u8; 32] {
        self.inner.tokenizer.fingerprint()
    }

    /// Hands a request in. Dropping the stream cancels it.
    ///
    /// # Errors
    /// At once for what is wrong with the request, for a full queue and for an engine that is stopping.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        self.validate(&request)?;
        let load = &self.inner.load;
        if load.stopping.load(Ordering::Acquire) {
            return Err(EngineError::Stopped("it is shutting down".into()));
        }
        let limit = self.inner.queue;
        // Those that only wait for the next step to begin are not the queue's.
        let free = self.inner.limits.max_sequences.saturating_sub(load.running.load(Ordering::Relaxed));
        let (waiting, others) = Waiting::new(load);
        if others >= (limit + free).max(1) {
            return Err(EngineError::QueueFull { limit });
        }
        let (events, stream) = unbounded_channel();
        let submitted = Submitted { request: Box::new(request), events, at: Instant::now(), waiting };
        // Behind a shutdown nobody takes it: then its stream ends with `Stopped`.
        let sent = self.inner.commands.send(Command::Submit(submitted));
        sent.map_err(|_| EngineError::Stopped("its thread has ended".into()))?;
        Ok(EventStream::new(stream))
    }

    fn validate(&self, request: &Request) -> Result<()> {
        let wrong = |why: &str| Err(EngineError::InvalidRequest(why.into()));
        request.sampling.validate(self.spec().vocab)?;
        if let Some(count) = request.logprobs.filter(|count| *count > MAX_TOP_LOGPROBS) {
            let (parameter, expected) = ("top_logprobs", "a whole number from 0 to 20");
            return Err(EngineError::Sampling { parameter, expected, found: count.to_string() });
        }
        if request.forced.as_ref().is_some_and(|tokens| tokens.is_empty()) {
            return wrong(
                "forced answer: expected at least one token, found none; leave it out to have the model answer",
            );
        }
        request.attention.validate()?;
        request.blend.validate(self.spec().layers)?;
        if self.spec().sliding_window.is_some() && request.attention.strategy != Strategy::Full {
            let problem = "this model sees a sliding window by itself; expected `full`, which honours it".into();
            return Err(EngineError::RequestSetting { of: "attention", parameter: "strategy", problem });
        }
        if request.prompt.suffix.is_empty() {
            return wrong("prompt: expected at least one token behind the context, found none");
        }
        let context = match &request.context {
            None => 0,
            Some(c) if c.engine != self.inner.identity => {
                return wrong("prepared context: it was made by another engine; prepare it with this one");
            }
            Some(_) if !request.prompt.prefix.is_empty() || !request.prompt.chunks.is_empty() => {
                return wrong("prompt: with a prepared context, expected only a suffix, found a prefix or chunks");
            }
            Some(c) => c.len(),
        };
        self.check_chunks(&request.prompt.chunks)?;
        self.check_tokens(&request.prompt, request.forced.as_deref().unwrap_or_default())?;
        self.check_prompt(context + request.prompt.len(), request.max_tokens != Some(0))?;
        self.check_index(context + request.prompt.len(), &request.attention)
    }

    /// Whether a prompt of so many tokens fits, with the first token of its answer where one is wanted. An answer may be
    /// cut, so that no length that is asked for is too large.
    fn check_prompt(&self, tokens: usize, answered: bool) -> Result<()> {
        let limit = self.inner.max_context;
        if tokens + usize::from(answered) > limit {
            return Err(EngineError::ContextLimit { tokens, limit });
        }
        self.check_budget(tokens)
    }

    /// On a GPU, what an index over a prompt of so many tokens takes of the host's memory.
    fn check_index(&self, tokens: usize, attention: &AttentionConfig) -> Result<()> {
        if self.inner.model.device().is_none() || attention.strategy != Strategy::Retrieval {
            return Ok(());
        }
        let host = cold_bytes(tokens, attention, self.kv_shape().token_bytes());
        let (needed, budget) = (Bytes { device: 0, host }, self.inner.limits.budget);
        if needed.fits(budget) { Ok(()) } else { Err(never_fits(needed, budget)) }
    }

    fn check_chunks(&self, chunks: &[PromptChunk]) -> Result<()> {
        for (i, chunk) in chunks.iter().enumerate() {
            let found = chunk.source.as_ref().map_or(chunk.tokens.len(), |s| s.tokens());
            if found != chunk.tokens.len() {
                return Err(EngineError::InvalidRequest(format!(
                    "chunk {i}: expected cached state of {} tokens, found one of {found}",
                    chunk.tokens.len()
                )));
            }
        }
        Ok(())
    }

    /// A batch is computed at once: no request may bring in what makes it fail.
    fn check_tokens(&self, prompt: &Prompt, answer: &[u32]) -> Result<()> {
        let vocab = self.spec().vocab;
        let chunks = prompt.chunks.iter().flat_map(|chunk| chunk.tokens.iter());
        let mut tokens = prompt.prefix.iter().chain(chunks).chain(&prompt.suffix).chain(answer);
        match tokens.find(|token| **token as usize >= vocab) {
            Some(token) => Err(EngineError::InvalidRequest(format!(
                "token id: expected below the model's vocabulary of {vocab}, found {token}"
            ))),
            None => Ok(()),
        }
    }

    /// Refuses messages whose texts exceed the context whatever tokens they become, before anything is done with them.
    ///
    /// # Errors
    /// [`EngineError::TextTooLong`].
    pub fn check_texts(&self, messages: &[ChatMessage]) -> Result<()> {
        let bytes = messages.iter().map(|message| message.content.len()).sum();
        let (tokens, limit) = (self.inner.tokenizer.least_tokens(bytes), self.inner.max_context);
        if tokens > limit { Err(EngineError::TextTooLong { bytes, tokens, limit }) } else { Ok(()) }
    }

    fn check_length(&self, tokens: usize) -> Result<()> {
        let limit = self.inner.max_context;
        if tokens > limit { Err(EngineError::ContextLimit { tokens, limit }) } else { Ok(()) }
    }

    fn check_budget(&self, tokens: usize) -> Result<()> {
        let (needed, budget) = (self.inner.limits.bytes(tokens), self.inner.limits.budget);
        if needed.fits(budget) { Ok(()) } else { Err(never_fits(needed, budget)) }
    }

    /// KV of `tokens` behind `prefix`, computed in isolation. Blocks.
    ///
    /// # Errors
    /// No tokens, too many tokens, or a stopped engine.
    pub fn chunk_kv(&self, prefix: &[u32], tokens: &[u32]) -> Result<ChunkKv> {
        if tokens.is_empty() {
            return Err(EngineError::InvalidRequest("chunk: expected at least one token, found none".into()));
        }
        self.check_length(prefix.len() + tokens.len())?;
        self.check_budget(prefix.len() + tokens.len())?;
        let (prefix, tokens) = (prefix.to_vec(), tokens.to_vec());
        let computed = ask(&self.inner.commands, |reply| Computation::Chunk { prefix, tokens, reply })?;
        computed.encoded(&self.inner.model)
    }

    /// Queries and keys of every layer for a text that is read alone, for measurements of what attention looks at.
    /// Holds all of them in f32: `4 * tokens * (heads + kv_heads) * head_dim` bytes a layer. Blocks.
    ///
    /// # Errors
    /// As [`chunk_kv`](Engine::chunk_kv).
    pub fn attention_inputs(&self, tokens: &[u32]) -> Result<Vec<AttentionInputs>> {
        if tokens.is_empty() {
            return Err(EngineError::InvalidRequest("text: expected at least one token, found none".into()));
        }
        self.check_length(tokens.len())?;
        self.check_budget(tokens.len())?;
        let tokens = tokens.to_vec();
        ask(&self.inner.commands, |reply| Computation::AttentionInputs { tokens, reply })
    }

    /// What the tokens of chunks attend where they stand behind `prefix` and one behind the other: a by-product of reading them.
    /// Without chunks only the prefix is read, which takes the time that reading takes. Blocks.
    ///
    /// # Errors
    /// As [`chunk_kv`](Engine::chunk_kv).
    pub fn chunk_attention(&self, prefix: &[u32], chunks: &[Vec<u32>]) -> Result<ChunkAttention> {
        let tokens = prefix.len() + chunks.iter().map(Vec::len).sum::<usize>();
        if tokens == 0 || chunks.iter().any(Vec::is_empty) {
            return Err(EngineError::InvalidRequest("chunks: expected at least one token in each, found none".into()));
        }
        self.check_length(tokens)?;
        self.check_budget(tokens)?;
        let (prefix, chunks) = (prefix.to_vec(), chunks.to_vec());
        ask(&self.inner.commands, |reply| Computation::ChunkAttention { prefix, chunks, reply })
    }

    /// KV of a context that many questions share. No question is known yet: where the blend mode goes by one, `cacheblend` stands
    /// in for it, as [`PrefillStats::rule`](crate::PrefillStats::rule) then says. Blocks.
    ///
    /// # Errors
    /// As [`submit`](Engine::submit).
    pub fn prepare_context(
        &self,
        prefix: Vec<u32>,
        chunks: Vec<PromptChunk>,
        blend: BlendConfig,
    ) -> Result<Arc<PreparedContext>> {
        blend.validate(self.spec().layers)?;
        self.check_chunks(&chunks)?;
        let tokens = prefix.len() + chunks.iter().map(|c| c.tokens.len()).sum::<usize>();
        self.check_length(tokens + 2)?;
        self.check_budget(tokens)?;
        ask(&self.inner.commands, |reply| Computation::Context { prefix, chunks, blend, reply }).map(Arc::new)
    }

    /// Whether the engine's thread runs, so that requests can be answered.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let thread = self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// What the engine is doing.
    #[must_use]
    pub fn load_report(&self) -> EngineLoad {
        let load = &self.inner.load;
        EngineLoad {
            running: load.running.load(Ordering::Relaxed),
            waiting: load.waiting.load(Ordering::Relaxed),
            kv_bytes: load.kv_bytes.load(Ordering::Relaxed),
            cached_bytes: load.cached_bytes.load(Ordering::Relaxed),
            kv_budget_bytes: self.inner.kv_budget(),
            preemptions: load.preemptions.load(Ordering::Relaxed),
            prefix_queries: load.prefix_queries.load(Ordering::Relaxed),
            prefix_hits: load.prefix_hits.load(Ordering::Relaxed),
        }
    }

    /// Takes no more requests, completes those it has, and waits for that. Idempotent.
    pub fn shutdown(&self) {
        self.inner.stop();
    }

    /// Takes no more requests, and ends those it has with [`EngineError::Stopped`] behind the step at hand, without waiting for
    /// that. Idempotent.
    pub fn cut_off(&self) {
        self.inner.load.stopping.store(true, Ordering::Release);
        self.inner.load.cut_off.store(true, Ordering::Release);
        // Where all that run wait for something, the thread looks again at once. It may have ended already.
        let _ = self.inner.commands.send(Command::Shutdown);
    }
}

impl Inner {
    /// Bytes of KV that all requests may hold where the model computes.
    fn kv_budget(&self) -> u64 {
        let Limits { page_bytes, budget, .. } = self.limits;
        if page_bytes.device > 0 { budget.device } else { budget.host }
    }

    fn stop(&self) {
        self.load.stopping.store(true, Ordering::Release);
        // The thread may have ended already.
        let _ = self.commands.send(Command::Shutdown);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread had panicked");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the scheduler may hand out: on a GPU the pages of its pool, and the host's memory for what is cold.
fn limits(model: &Transformer, config: &EngineConfig) -> Limits {
    let (page_tokens, page_bytes) = page_size(model);
    let left = || memory::for_kv(memory::limit().unwrap_or(UNKNOWN_MEMORY), model.host_bytes() as u64);
    let host = if config.kv_budget_bytes > 0 { config.kv_budget_bytes } else { left() };
    let device = model.device().map(|device| device.kv_bytes());
    Limits {
        step_tokens: config.step_tokens,
        mixed_prefill_tokens: config.mixed_prefill_tokens,
        max_sequences: config.max_sequences.max(1),
        page_tokens,
        page_bytes,
        budget: Bytes { device: device.unwrap_or(0), host },
    }
}

/// On the GPU or the CPU, as the settings and the machine say.
fn load_model(spec: ModelSpec, weights: &Weights, config: &EngineConfig, max_context: usize) -> Result<Transformer> {
    let limits = StepLimits {
        // A part of a prompt that is read whole may exceed the budget of tokens.
        rows: config.step_tokens.max(config.prefill_chunk).max(1) + config.max_sequences.max(1),
        sequences: config.max_sequences.max(1) + JOBS,
        context: max_context,
        kv_bytes: config.kv_budget_bytes,
        chunk_bytes: config.device_cache_bytes,
    };
    let (threads, kv) = (config.threads, config.kv_dtype);
    match config.device {
        DeviceChoice::Cpu => Transformer::load(spec, weights, threads, kv),
        DeviceChoice::Cuda => Transformer::load_on_device(spec, weights, threads, kv, &config.cuda, limits),
        DeviceChoice::Auto => {
            match Transformer::load_on_device(spec.clone(), weights, threads, kv, &config.cuda, limits) {
                Err(EngineError::NoDevice { why }) => {
                    tracing::debug!(why, "no GPU is used");
                    Transformer::load(spec, weights, threads, kv)
                }
                Err(error @ EngineError::Unsupported { .. }) => {
                    tracing::warn!(%error, "the GPU is not used");
                    Transformer::load(spec, weights, threads, kv)
                }
                loaded => loaded,
            }
        }
    }
}

fn fingerprint(weights: &Weights, spec: &ModelSpec) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&weights.fingerprint());
    hasher.update(spec.arithmetic().as_bytes());
    *hasher.finalize().as_bytes()
}

/// Where the keys of the prefix cache begin: all that KV depends on beside the tokens.
fn prefix_root(fingerprint: &[u8; 32], shape: &KvShape, page: usize) -> PageKey {
    let format = format!("{shape:?}, pages of {page}");
    PageKey::root(&[fingerprint, format.as_bytes()].concat())
}

/// A model alone, for comparing logits and for measurements.
pub struct Model {
    model: Transformer,
}

impl Model {
    /// Loads the model in `dir`. `threads` of 0: all cores. `kv`: the KV format, `None` for that of the weights.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load(dir: &Path, threads: usize, kv: Option<KvDtype>) -> Result<Model> {
        Ok(Model { model: Transformer::load_dir(dir, threads, kv)? })
    }

    /// Loads the model that `config` names where it says.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn load_as(config: &EngineConfig) -> Result<Model> {
        let spec = ModelSpec::from_dir(&config.model_dir)?;
        let context = config.max_context.map_or(spec.max_context, |m| m.min(spec.max_context));
        Ok(Model { model: load_model(spec, &Weights::open(&config.model_dir)?, config, context)? })
    }

    /// Logits behind every token of a text, `[tokens, vocab]`.
    ///
    /// # Errors
    /// A token outside of the vocabulary.
    pub fn logits(&self, tokens: &[u32]) -> Result<Vec<f32>> {
        let mut kv = self.model.new_kv();
        let mut all = Vec::with_capacity(tokens.len() * self.model.spec.vocab);
        for part in tokens.chunks(self.model.most_rows()) {
            let states = self.model.forward(&mut [Piece::exact(&mut kv, part, Want::All)])?;
            all.extend(self.model.logits(&states)?);
        }
        Ok(all)
    }
}

#[cfg(test)]
#[path = "engine/tests.rs"]
mod tests;
