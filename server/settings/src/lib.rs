//! Every setting and everything that can go wrong: what service, server and command line all know.
//!
//! * [`Settings`]: every setting, validated; [`Config`]: settings with where each value came from; [`SETTINGS`]: the table;
//! * [`QuireError`]: what can go wrong between a user and an answer, each with what was expected, what came and what to do.
//!
//! ```
//! use settings::{Settings, SettingsArgs};
//!
//! let settings = Settings::default();
//! assert_eq!(settings.chunk_tokens, 256);
//! assert!(SettingsArgs::default().top_chunks.is_none());
//! ```

mod config;
mod error;

pub use config::{
    Bytes, Config, Flag, GenerationSource, KEYS, KvFormat, MAX_TOP_CHUNKS, NEW_STORE_BYTES, Named, Names, SETTINGS,
    Secret, Setting, Settings, SettingsArgs, chat_history, find_shipped, hub, setting,
};
pub use error::{QuireError, Result, full_message};
