//! A blend from beginning to end, for tests.

use std::time::Duration;

use super::run::{Blend, Blended, Context, Progress, Suffix};
use crate::config::BlendConfig;
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{States, Transformer};
use crate::request::PrefillStats;

/// A context's KV and how it came about.
pub(crate) struct Whole {
    pub(crate) kv: SequenceKv,
    pub(crate) stats: PrefillStats,
    pub(crate) state: Option<States>,
}

/// Computes the KV of `context` unit by unit.
///
/// # Errors
/// [`EngineError::Cancelled`] once `cancelled`, which is asked before every unit, says so.
pub(crate) fn blend(
    model: &Transformer,
    context: &Context<'_>,
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> Result<Whole> {
    blend_behind(model, &model.new_kv(), context, config, cancelled)
}

/// As [`blend`], where `start` holds the KV of the first tokens of the prefix.
pub(crate) fn blend_behind(
    model: &Transformer,
    start: &SequenceKv,
    context: &Context<'_>,
    config: &BlendConfig,
    cancelled: &dyn Fn() -> bool,
) -> Result<Whole> {
    let budget = || if cancelled() { None } else { Some(1) };
    drive(model, start.clone(), context, config, Suffix::Later, budget)
}

/// As [`blend`], with the suffix read in the last pass, and with pieces of `budget` tokens.
pub(crate) fn blend_reading(
    model: &Transformer,
    context: &Context<'_>,
    config: &BlendConfig,
    mut budget: impl FnMut() -> usize,
) -> Result<Whole> {
    let read = Suffix::Read { ban_eos: false };
    drive(model, model.new_kv(), context, config, read, || Some(budget()))
}

fn drive(
    model: &Transformer,
    mut kv: SequenceKv,
    context: &Context<'_>,
    config: &BlendConfig,
    then: Suffix,
    mut budget: impl FnMut() -> Option<usize>,
) -> Result<Whole> {
    let mut blend = Blend::new(model, kv.len(), context, config, then)?;
    loop {
        // So that how often it is asked depends on the units alone.
        while !blend.wait(Duration::from_secs(1)) {}
        let tokens = budget().ok_or(EngineError::Cancelled)?;
        match blend.advance(model, &mut kv, tokens)? {
            Progress::More | Progress::Waits => {}
            Progress::Done(blended) => {
                let Blended { stats, state } = *blended;
                return Ok(Whole { kv, stats, state });
            }
        }
    }
}
