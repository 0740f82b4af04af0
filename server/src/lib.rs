//! Quire: documents in, answers with citations out, over attention state that is computed once.
//!
//! This crate is the command line ([`cli`]) over the others, which join to a product:
//!
//! * `settings`: every setting, where its value came from, where the model is found; and everything that can go wrong;
//! * `documents`: documents as folders of text, chunks with their character spans, full-text search, and the folder that
//!   everything is kept in;
//! * `hub`: models of the Hugging Face hub, fetched into the cache that its tools share;
//! * `service`: the use cases `ingest`, `search`, `answer`, `generate`, without a word of HTTP, and those of the command line as
//!   data;
//! * `http_api`: the OpenAI-compatible server over the service.
//!
//! ```
//! use quire::cli::parse;
//!
//! let cli = parse(["quire", "ask", "--top-chunks", "3", "Who keeps the spare key?"].map(Into::into)).expect("a question");
//! assert_eq!(cli.common.settings.top_chunks, Some(3));
//! ```

pub mod cli;
mod process;
