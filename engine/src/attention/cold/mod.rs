//! Attention over the tokens that have left the dense KV.
//!
//! `window` (StreamingLLM, arXiv 2309.17453) drops them; `retrieval` (RetrievalAttention, arXiv 2409.10516)
//! keeps them behind indexes and attends the hits exactly.

mod retrieval;
mod segment;
#[cfg(test)]
mod tests;

pub(crate) use retrieval::{ColdStats, attend_cold};
pub(crate) use segment::{MakeIndex, Segment, SegmentRows, SegmentSource, make_index};
