//! Blending: a context's KV from cached chunks and selective recompute (CacheBlend, arXiv 2405.16444, section 4).
//!
//! `plan` says which parts of a context are exact, cached or to be computed; a rule chooses which cached tokens are recomputed,
//! one file each (`answer`, `question`, `cacheblend`, `heads`, `epic`, `random`); `run` is a blend as it goes on, piece by piece,
//! and `pass` one pass over the layers. What rules share stands apart: `reading` brings cached layers, `paid` sees what the
//! question attends, `gate` decides the budget, `select` takes the best within it, `correct` shifts what stays cached, and
//! `stream` has the rows that are computed.

mod answer;
mod cacheblend;
mod correct;
#[cfg(test)]
mod emulator;
mod epic;
mod gate;
mod heads;
mod paid;
mod pass;
mod plan;
mod question;
mod random;
mod reading;
#[cfg(test)]
mod rule_tests;
mod run;
mod select;
mod stream;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod whole;

pub(crate) use correct::PRIOR;
pub(crate) use run::{Blend, Blended, Context, Progress, Suffix};
#[cfg(test)]
pub(crate) use whole::{Whole, blend, blend_behind, blend_reading};
