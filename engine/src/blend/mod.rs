//! Blending: a context's KV from cached chunks and selective recompute
//! (CacheBlend, arXiv 2405.16444, section 4).

mod plan;
mod run;
mod select;
mod stream;
#[cfg(test)]
mod tests;

pub(crate) use run::{blend, blend_behind};
