//! The use cases: ingest documents, search them, answer over them, generate without them.
//!
//! The command line and the server both stand on this; there is no word of HTTP here. Everything blocks; the one thing that
//! does not is waiting for the next piece of an answer ([`Answering::next`]).
//!
//! * [`Service`]: an engine, its chunk store and the collections, and what is done with them;
//! * [`store`]: the engine's chunks in the chunk store, and the one conversion between their layouts;
//! * [`control`]: the use cases of the command line as data, and the socket over which a running server is asked for them;
//! * [`metrics`]: what is counted and under which names.
//!
//! `monitor` compares a share of the questions with full recompute, in the background.

mod answer;
mod context;
pub mod control;
mod conversation;
mod files;
mod filter;
mod ids;
mod ingest;
mod jobs;
mod length;
mod manage;
pub mod metrics;
mod monitor;
mod paging;
mod passages;
pub mod store;
mod vector_stores;

pub use answer::{Answer, Answering, Citation, Piece, Stats};
pub use context::{ContextChunk, Passage, Passages, Question, Search};
pub use conversation::Conversation;
pub use files::{FileContent, Upload, UploadedFile};
pub use filter::{Comparison, Filter};
pub use ingest::{DocumentState, IngestEvent, IngestOptions, IngestReport};
pub use manage::{
    CollectionSummary, DocumentName, DocumentSummary, DocumentsCommand, DocumentsEvent, manage_documents,
};
pub use paging::{Page, PageRequest};
pub use passages::{GivenChunk, GivenPassage};
pub use vector_stores::{
    AttachRequest, Attachment, AttachmentState, Batch, Chunking, FileCounts, StaticChunking, StoreChange, StoreHit,
    StoreHits, StoreSearch, StoreSettings, VectorStore, attached_name,
};

use engine::{AttentionConfig, BlendConfig, ChatMessage, Engine, EngineConfig, Prompt, Request, SamplingParams};

use crate::metrics::Metrics;
use crate::store::KvStore;
use documents::{Access, DocumentsError, Found, Library, Limits, data_dir};
use settings::{Result, Settings};

/// How an answer is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Tokens of the answer at most; `None`: until the text or the context ends.
    pub max_tokens: Option<usize>,
    /// The answer does not end before it has so many tokens.
    pub min_tokens: usize,
    /// See [`Request::logprobs`].
    pub logprobs: Option<usize>,
    /// How decoding attends.
    pub attention: AttentionConfig,
    /// What becomes of cached chunks.
    pub blend: BlendConfig,
    /// Go on behind the model's end-of-text tokens.
    pub ignore_eos: bool,
}

impl Options {
    /// The options that the settings and the model's own files state.
    ///
    /// # Errors
    /// See [`Settings::sampling`].
    pub fn from_settings(settings: &Settings) -> Result<Options> {
        Ok(Options {
            sampling: settings.sampling()?,
            stop: Vec::new(),
            max_tokens: (settings.max_tokens > 0).then_some(settings.max_tokens),
            min_tokens: 0,
            logprobs: None,
            attention: settings.attention(),
            blend: settings.blending(),
            ignore_eos: false,
        })
    }

    fn request(&self, prompt: Prompt) -> Request {
        Request {
            prompt,
            context: None,
            sampling: self.sampling.clone(),
            stop: self.stop.clone(),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            logprobs: self.logprobs,
            attention: self.attention.clone(),
            blend: self.blend.clone(),
            ignore_eos: self.ignore_eos,
            forced: None,
            report_logits: false,
        }
    }
}

/// An engine, its chunk store and the collections.
pub struct Service {
    engine: Engine,
    store: KvStore,
    library: Library,
    limits: Limits,
    metrics: std::sync::Arc<Metrics>,
    options: Options,
    model: String,
    /// Tokens every chunk is computed behind: what begins a text, if the model has such a token.
    chunk_prefix: std::sync::Arc<[u32]>,
    /// Tokens behind every chunk's text.
    chunk_suffix: Vec<u32>,
    data_dir: std::path::PathBuf,
    /// How files that clients attach are ingested.
    ingesting: IngestOptions,
    jobs: jobs::JobQueue,
    monitor: monitor::Monitor,
    /// Held by whoever changes a file of a vector store: row and document change together.
    attaching: std::sync::Mutex<()>,
}

/// What a service is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Documents are ingested: the data folder must take them, and the chunk store gets the budget that is set.
    Ingest,
    /// Requests are served: the chunk store gets the budget that is set, if it can be written.
    Serve,
    /// Questions are answered. Where nothing can be written, answers are made all the same.
    Ask,
}

impl Service {
    /// Loads the model and opens the data folder.
    ///
    /// # Errors
    /// Everything that can be wrong with the model, the data folder or the store, each named.
    pub fn open(settings: &Settings, purpose: Purpose) -> Result<Service> {
        Service::open_with(settings, purpose, settings.engine()?)
    }

    /// As [`open`](Self::open), with an engine as `config` says.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(settings: &Settings, purpose: Purpose, config: EngineConfig) -> Result<Service> {
        match data_dir::prepare(&settings.data_dir) {
            Err(DocumentsError::DataDir { .. }) if purpose != Purpose::Ingest => data_dir::check(&settings.data_dir)?,
            outcome => outcome?,
        }
        let model = settings.served_name(&config.model_dir);
        let options = Options::from_settings(settings)?;
        let engine = Engine::load(config)?;
        let store = open_store(settings, purpose, &engine, &model)?;
        let chunk_suffix = engine.tokenizer().encode(engine.chat().chunk_suffix())?;
        let tokens = settings.chunk_tokens.saturating_sub(chunk_suffix.len()).max(1);
        settings.blending().validate(engine.spec().layers)?;
        let library = Library::new(&settings.data_dir);
        if purpose == Purpose::Serve {
            open_documents(&library)?;
        }
        Ok(Service {
            limits: Limits { tokens, overlap: settings.chunk_overlap.min(tokens / 2) },
            chunk_prefix: engine.tokenizer().bos().into_iter().collect(),
            library,
            metrics: std::sync::Arc::new(Metrics::new(&settings.metrics_prefix, &model)),
            data_dir: settings.data_dir.clone(),
            ingesting: IngestOptions::from_settings(settings)?,
            jobs: jobs::JobQueue::default(),
            monitor: monitor::Monitor::new(settings),
            attaching: std::sync::Mutex::default(),
            chunk_suffix,
            options,
            model,
            store,
            engine,
        })
    }

    /// The engine.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &std::sync::Arc<Metrics> {
        &self.metrics
    }

    /// The chunk store.
    #[must_use]
    pub fn store(&self) -> &KvStore {
        &self.store
    }

    /// How an answer is made where a request says nothing.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The name under which the model is offered.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The collections.
    #[must_use]
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// The tokens that every chunk is computed behind.
    #[must_use]
    pub fn chunk_prefix(&self) -> &[u32] {
        &self.chunk_prefix
    }

    /// The tokens of a passage as a chunk of a prompt.
    ///
    /// # Errors
    /// What the tokenizer refuses.
    pub fn chunk_tokens(&self, passage: &str) -> Result<Vec<u32>> {
        Ok(self.with_suffix(&self.engine.tokenizer().encode_plain(passage)?))
    }

    /// The tokens of a found passage as a chunk of a prompt: those that were made when it was ingested, unless that was
    /// for another tokenizer.
    ///
    /// # Errors
    /// What the tokenizer refuses.
    pub fn tokens_of(&self, found: &Found) -> Result<Vec<u32>> {
        match &found.tokens {
            Some(known) if known.tokenizer == self.engine.tokenizer_fingerprint() => {
                Ok(self.with_suffix(&known.tokens))
            }
            _ => self.chunk_tokens(&found.passage),
        }
    }

    /// Tokens of a passage with what stands behind every chunk.
    fn with_suffix(&self, tokens: &[u32]) -> Vec<u32> {
        [tokens, &self.chunk_suffix].concat()
    }

    /// Tells the chunk store of chunks that no document needs any more: they make way first, and those whose documents are gone
    /// for good are removed; says how many.
    ///
    /// # Errors
    /// Those of the catalog and the store.
    pub fn release_chunks(&self) -> Result<u64> {
        let Some(catalog) = self.library.catalog()?.filter(|catalog| catalog.access() == Access::Write) else {
            return Ok(0);
        };
        let mut removed = 0;
        loop {
            let released = catalog.released(RELEASED_AT_A_TIME)?;
            if released.is_empty() {
                return Ok(removed);
            }
            let keys = |gone| -> Vec<_> {
                let chunks = released.iter().filter(|chunk| chunk.gone == gone);
                chunks.map(|chunk| self.store.key(&self.chunk_prefix, &self.with_suffix(&chunk.tokens))).collect()
            };
            self.store.demote(&keys(false))?;
            removed += self.store.remove(&keys(true))?;
            catalog.forget_released(&released)?;
        }
    }

    /// The passages of a collection that fit `query` best, best first, none of them twice.
    ///
    /// # Errors
    /// [`DocumentsError::UnknownCollection`], [`DocumentsError::Index`].
    pub fn search(&self, collection: &str, query: &str, limit: usize) -> Result<Vec<Found>> {
        Ok(self.library.search(collection, query, limit)?)
    }

    /// Answers a conversation without documents.
    ///
    /// # Errors
    /// What the engine refuses: the context limit, a wrong parameter, a full queue.
    pub fn generate(&self, messages: &[ChatMessage], options: &Options) -> Result<Answering> {
        generate(&self.engine, &self.metrics, messages, options)
    }

    /// Compares a share of the questions with full recompute, as the settings say, until [`stop_working`](Self::stop_working): in the
    /// background, while the engine has nothing else to do.
    pub fn watch(&self) {
        self.monitor.work(&self.engine, &self.metrics);
    }

    /// Brings the metrics of states up to date, for a scrape.
    ///
    /// # Errors
    /// What the store refuses.
    pub fn observe(&self) -> Result<()> {
        let (chunks, bytes) = self.store.stats().map_or((0, 0), |stats| (stats.chunks, stats.payload_bytes));
        let load = self.engine.load_report();
        self.metrics.state(&load, chunks, bytes, self.store.corrupt_reads());
        self.metrics.tiers(&self.engine.chunk_tiers());
        Ok(())
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Answers a conversation with an engine alone: without documents, chunk store and data folder.
///
/// # Errors
/// As [`Service::generate`].
pub fn generate(
    engine: &Engine,
    metrics: &std::sync::Arc<Metrics>,
    messages: &[ChatMessage],
    options: &Options,
) -> Result<Answering> {
    let started = std::time::Instant::now();
    length::refuse_overlong(engine, messages, &|| true)?;
    let prompt = Prompt::plain(engine.chat().render(engine.tokenizer(), messages)?);
    let room = length::Room::share(engine.max_context(), prompt.len(), options.max_tokens)?;
    let notes = room.clip(0, options.max_tokens).into_iter().collect();
    let stream = engine.submit(options.request(prompt))?;
    Ok(Answering::new(stream, started, std::sync::Arc::clone(metrics), options).with_notes(notes))
}

/// Chunks that the chunk store is told of at a time.
const RELEASED_AT_A_TIME: usize = 1000;

/// Who serves owns the documents; where they cannot be written, they are read.
fn open_documents(library: &Library) -> Result<()> {
    match library.writable() {
        Err(error @ (DocumentsError::DataDir { .. } | DocumentsError::CatalogInUse { .. })) => {
            tracing::warn!(%error, "documents are only read");
            Ok(())
        }
        outcome => Ok(outcome.map(|_| ())?),
    }
}

/// Only who ingests or serves decides how large the store may become.
fn open_store(settings: &Settings, purpose: Purpose, engine: &Engine, model: &str) -> Result<KvStore> {
    let (dir, new_budget) = (&settings.data_dir, settings.store_bytes());
    let store = KvStore::open_if_possible(engine, dir, model, new_budget, &settings.tenant)?;
    store.set_policy(settings.cache_policy.0);
    let budget = settings.cache_bytes.filter(|_| purpose != Purpose::Ask);
    match budget.map(|bytes| store.set_budget(bytes.0)) {
        Some(Err(error)) if purpose == Purpose::Serve || !store.can_keep() => {
            tracing::warn!(%error, "the chunk store keeps the budget that it has");
        }
        Some(outcome) => outcome?,
        None => {}
    }
    Ok(store)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_answer_is_as_long_as_the_settings_say_and_never_as_the_model_does() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"do_sample": true, "temperature": 0.6, "max_new_tokens": 5}"#;
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        let options = |max_tokens| {
            let settings = Settings { model: Some(dir.path().into()), max_tokens, ..Settings::default() };
            let options = Options::from_settings(&settings).unwrap();
            (options.sampling.temperature, options.max_tokens)
        };
        assert_eq!((options(0), options(7)), ((0.6, None), (0.6, Some(7))));
    }
}
