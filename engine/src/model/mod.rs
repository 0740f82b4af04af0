//! One transformer for every Llama-like family; what tells models apart is data.

pub(crate) mod config;
pub(crate) mod generation;
pub(crate) mod layer;
pub(crate) mod rope;
pub(crate) mod spec;
pub(crate) mod transformer;
