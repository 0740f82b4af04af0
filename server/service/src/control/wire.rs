//! What goes over the socket, beside HTTP: a command one way, lines of JSON the other.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::event::{Event, Failure};
use settings::Settings;

/// The version of what goes over the socket: raised when commands or events change their meaning or their form.
pub const PROTOCOL: u32 = 3;
/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where commands are posted, and where the server says who it is.
pub const PATH: &str = "/control";
/// Header of every request and answer with the [`PROTOCOL`] that was spoken.
pub const PROTOCOL_HEADER: &str = "x-quire-protocol";

/// A line of an answer. Exactly one of the last two ends it; an answer without is not complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Something happened.
    Event(Event),
    /// The command is done.
    Done,
    /// The command failed.
    Error(Failure),
}

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerInfo {
    /// Its process id.
    pub pid: u32,
    /// The version of its program.
    pub version: String,
    /// See [`PROTOCOL`].
    pub protocol: u32,
    /// The name of its model.
    pub model: String,
    /// Where that lies.
    pub model_dir: String,
    /// `loading`, `ready` or `draining`.
    pub phase: String,
    /// Its own of the settings that a command may name, too: see [`owned`](super::owned).
    pub settings: Map<String, Value>,
}

/// Those of the settings that a server has for all of its commands.
#[must_use]
pub fn owned_settings(settings: &Settings, keys: &[&str]) -> Map<String, Value> {
    let all = serde_json::to_value(settings).unwrap_or_default();
    keys.iter().filter_map(|&key| Some((key.to_string(), all.get(key)?.clone()))).collect()
}
