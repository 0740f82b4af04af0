//! The server owns the data folder, the command line asks.
//!
//! What the command line does is a [`Command`]: data. Whoever owns the data folder executes it ([`execute()`]) and tells what
//! happens as [`Event`]s, which the command line prints. Where a server runs on the folder, that is the server, asked over a
//! socket in the folder ([`Remote`]); else it is the command line's own process. Both run the same code and print the same.
//!
//! * `command`, `event`: what is asked and what is told;
//! * `host`, `execute`: the side that owns the folder;
//! * `holder`: who has the folder, and its socket;
//! * `wire`, `remote`: the other side of the socket (the server's is in the crate `http-api`);
//! * `link`, `owned`: which of the two it is, and which settings are the server's.

mod cancel;
mod command;
mod event;
mod execute;
mod holder;
mod host;
mod link;
mod owned;
mod remote;
mod wire;

pub use cancel::{Cancel, Canceller};
pub use command::{AnswerSettings, CacheCommand, CatalogCommand, Command, ExactPath, Need, Retrieval, WriteAccess};
pub use event::{
    CacheEvent, CacheTotals, CatalogEvent, CatalogTotals, Event, Failure, IngestProgress, ListedChunk, ModelShare,
};
pub use execute::execute;
pub use holder::{Claim, Holder, Unspoken};
pub use host::Host;
pub use link::{Link, look};
pub use owned::owned;
pub use remote::Remote;
pub use wire::{Line, PATH, PROTOCOL, PROTOCOL_HEADER, ServerInfo, VERSION, owned_settings};
