//! Models of the Hugging Face hub: their names, the cache that the hub's tools share, and fetching into it.
//!
//! * [`ModelId`]: a name, `owner/name@revision`;
//! * [`HubConfig`]: where the cache lies and where the hub is, from the variables that the hub's tools read;
//! * [`HubCache`]: from a name to the folder of a model that is there, whoever fetched it;
//! * [`pull`](pull()): from a name to such a folder, over the network.
//!
//! The layout of the cache is that of the Python library `huggingface_hub`, so that each finds what the other fetched:
//!
//! ```text
//! models--OWNER--NAME/blobs/ETAG                 contents, named by their hash
//! models--OWNER--NAME/snapshots/COMMIT/FILE      links to blobs
//! models--OWNER--NAME/refs/REVISION              the commit that a branch or tag named when it was last fetched
//! .locks/models--OWNER--NAME/ETAG.lock           held while a blob is written
//! ```

mod cache;
mod client;
mod config;
mod download;
mod error;
mod files;
mod id;
mod pull;

pub use cache::{HubCache, snapshot_name};
pub use config::HubConfig;
pub use error::{HubError, Result};
pub use id::ModelId;
pub use pull::{FileState, PullEvent, Pulled, PulledFile, pull};
