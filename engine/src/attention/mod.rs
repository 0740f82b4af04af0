//! Attention over sets of tokens. Every kind yields an [`AttentionState`], and states merge.

pub(crate) mod cold;
pub(crate) mod dense;
pub(crate) mod paid;
mod state;
pub(crate) mod within;

pub use state::AttentionState;
