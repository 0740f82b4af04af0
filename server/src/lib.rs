//! Quire: documents in, answers with citations out, over attention state that is computed once.
//!
//! This crate joins the others to a product. Reading it top down:
//!
//! * [`config`]: every setting, where its value came from, and where the model is found;
//! * [`documents`]: documents as folders of text, chunks with their character spans, full-text search, and the folder that
//!   everything is kept in;
//! * [`hub`]: models of the Hugging Face hub, fetched into the cache that its tools share;
//! * [`store`]: the engine's chunks in the chunk store, and the one conversion between their layouts;
//! * [`service`]: the use cases `ingest`, `search`, `answer`, `generate`, without a word of HTTP;
//! * [`control`]: the use cases of the command line as data, and the socket over which a running server is asked for them;
//! * [`http`]: the OpenAI-compatible server over the service;
//! * [`cli`]: the command line, which asks `control` and prints what it tells;
//! * [`metrics`]: what is counted and under which names;
//! * [`error`]: everything that can go wrong, with one mapping to exit codes and one to HTTP.
//!
//! ```
//! use quire::config::{Settings, SettingsArgs};
//!
//! let settings = Settings::default();
//! assert_eq!(settings.chunk_tokens, 256);
//! assert!(SettingsArgs::default().top_chunks.is_none());
//! ```

pub mod cli;
pub mod config;
pub mod control;
pub mod error;
pub mod http;
pub mod metrics;
mod process;
pub mod service;
pub mod store;

pub use error::{QuireError, Result};
