//! One question read in full and as blended, and how far the two are apart.

use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use engine::{BlendConfig, BlendMode, Engine, EngineError, Event, Prompt, Request, kl_divergence, largest_logit};
use futures::Stream;
use futures::task::noop_waker_ref;

/// First tokens of full recompute's greedy answer that are compared.
const TOKENS: usize = 16;
/// Time between two looks at what others want of the engine.
const LOOK: Duration = Duration::from_millis(20);
/// Times that a reading gives way to others before its sample is dropped.
const TRIES: usize = 20;

/// How a blended question differs from full recompute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Seen {
    /// Mean over the first tokens of full recompute's greedy answer of KL(full || blended), in nats.
    pub(super) divergence: f64,
    /// Whether blending would choose the same token in each of these places.
    pub(super) same: bool,
}

/// The tokens of an answer, and the logits in the place of each.
type Reading = (Vec<u32>, Vec<Vec<f32>>);

/// Reads a question in full, then as `request` blends it with the tokens of the first answer forced. Both wait until the engine has
/// nothing to do, and begin again where somebody comes. `None`: others never left room, or nobody wants it any more.
///
/// # Errors
/// What the engine fails with.
pub(super) fn compare(
    engine: &Engine,
    request: &Request,
    wanted: &dyn Fn() -> bool,
) -> Result<Option<Seen>, EngineError> {
    let greedy = |prompt: &Prompt, blend: &BlendConfig| Request {
        attention: request.attention.clone(),
        blend: blend.clone(),
        report_logits: true,
        ..Request::new(prompt.clone(), TOKENS)
    };
    let full = BlendConfig { mode: BlendMode::FullRecompute, mass: None, ..request.blend.clone() };
    let Some((ids, of_full)) = read(engine, &greedy(&request.prompt, &full), wanted)? else { return Ok(None) };
    if ids.is_empty() {
        return Ok(None);
    }
    let forced = Request { forced: Some(ids.clone().into()), ..greedy(&request.prompt, &request.blend) };
    Ok(read(engine, &forced, wanted)?.map(|(_, blended)| seen(&ids, &of_full, &blended)))
}

/// Compares logits in the places of `ids`.
fn seen(ids: &[u32], full: &[Vec<f32>], blended: &[Vec<f32>]) -> Seen {
    let places = full.iter().zip(blended);
    let sum: f64 = places.map(|(full, blended)| kl_divergence(full, blended)).sum();
    let same = ids.iter().zip(blended).all(|(id, logits)| largest_logit(logits) == Some(*id));
    Seen { divergence: sum / full.len().min(blended.len()).max(1) as f64, same: same && blended.len() == ids.len() }
}

fn read(engine: &Engine, request: &Request, wanted: &dyn Fn() -> bool) -> Result<Option<Reading>, EngineError> {
    for _ in 0..TRIES {
        while is_busy(engine, 0) {
            if !wanted() {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
        if let Some(reading) = attempt(engine, request, wanted)? {
            return Ok(Some(reading));
        }
        if !wanted() {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Whether the engine has requests beside so many.
fn is_busy(engine: &Engine, own: usize) -> bool {
    let load = engine.load_report();
    load.running + load.waiting > own
}

/// `None`: it gave way. Dropping its events ends the request.
fn attempt(engine: &Engine, request: &Request, wanted: &dyn Fn() -> bool) -> Result<Option<Reading>, EngineError> {
    let mut events = pin!(engine.submit(request.clone())?);
    let (mut ids, mut logits) = (Vec::new(), Vec::new());
    let mut context = Context::from_waker(noop_waker_ref());
    loop {
        match events.as_mut().poll_next(&mut context) {
            Poll::Pending if is_busy(engine, 1) || !wanted() => return Ok(None),
            Poll::Pending => std::thread::sleep(LOOK),
            Poll::Ready(Some(Event::Started(_))) => {}
            Poll::Ready(Some(Event::Token(token))) => {
                ids.push(token.id);
                logits.push(token.logits);
            }
            Poll::Ready(Some(Event::Finished(_))) => return Ok(Some((ids, logits))),
            Poll::Ready(Some(Event::Failed(error))) => return Err(error),
            Poll::Ready(None) => return Err(EngineError::Internal("an answer ended without saying so".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_are_no_distance_and_others_are_the_mean_of_theirs() {
        let (a, b) = (vec![1.0, 3.0, 2.0], vec![3.0, 1.0, 2.0]);
        let full = [a.clone(), a.clone()];
        assert_eq!(seen(&[1, 1], &full, &full), Seen { divergence: 0.0, same: true });
        let apart = seen(&[1, 1], &full, &[a.clone(), b.clone()]);
        assert!((apart.divergence - kl_divergence(&a, &b) / 2.0).abs() < 1e-12 && !apart.same, "{apart:?}");
    }
}
