//! The tokens of many requests as they come, taken by one thread: a thread for each would be woken at every step, at
//! the cost of the engine's own thread.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use engine::{Engine, Event, EventStream, Request};

use crate::error::{EvalError, Result};

/// What one request has done so far.
pub(super) struct Track {
    stream: Option<EventStream>,
    /// When each of its tokens was chosen: this thread may come to them late, above all where the engine takes all cores.
    pub(super) tokens: Vec<Instant>,
    /// Its first token.
    pub(super) first_id: Option<u32>,
}

impl Track {
    /// Its tokens since this moment.
    pub(super) fn since(&self, moment: Instant) -> usize {
        self.tokens.iter().rev().take_while(|at| **at >= moment).count()
    }

    /// Whether it has written all that it may.
    pub(super) fn ended(&self) -> bool {
        self.stream.is_none()
    }

    /// Seconds between neighbouring tokens of which both were chosen in this span.
    pub(super) fn gaps(&self, from: Instant, to: Instant) -> impl Iterator<Item = f64> {
        let inside = self.tokens.windows(2).filter(move |pair| pair[0] >= from && pair[1] <= to);
        inside.map(|pair| (pair[1] - pair[0]).as_secs_f64())
    }
}

/// Requests that run at the same time. Dropping it cancels them.
pub(super) struct Streams {
    pub(super) tracks: Vec<Track>,
    waker: Waker,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Streams {
    /// For use by this thread.
    pub(super) fn new() -> Streams {
        Streams { tracks: Vec::new(), waker: Arc::new(Unpark(thread::current())).into() }
    }

    /// Hands a request in; its place among the tracks.
    pub(super) fn submit(&mut self, engine: &Engine, request: Request) -> Result<usize> {
        let stream = Some(engine.submit(request)?);
        self.tracks.push(Track { stream, tokens: Vec::new(), first_id: None });
        Ok(self.tracks.len() - 1)
    }

    /// Takes what comes until `enough` or, where it is given, until this moment.
    ///
    /// # Errors
    /// Those of the requests; [`EvalError::Interrupted`] where all have ended and it is still not enough.
    pub(super) fn take_until(&mut self, deadline: Option<Instant>, enough: impl Fn(&[Track]) -> bool) -> Result<()> {
        loop {
            let news = self.poll()?;
            if enough(&self.tracks) || deadline.is_some_and(|moment| Instant::now() >= moment) {
                return Ok(());
            }
            if news {
                continue;
            }
            match deadline.map(|moment| moment.saturating_duration_since(Instant::now())) {
                None if self.tracks.iter().all(Track::ended) => {
                    return Err(EvalError::Interrupted { when: "before all requests had written enough" });
                }
                None => thread::park(),
                Some(left) => thread::park_timeout(left.max(Duration::from_micros(1))),
            }
        }
    }

    /// Takes every event that is there. Whether there was any.
    fn poll(&mut self) -> Result<bool> {
        let mut context = Context::from_waker(&self.waker);
        let mut any = false;
        for track in &mut self.tracks {
            while let Some(stream) = &mut track.stream {
                let Poll::Ready(event) = pin!(stream.next()).poll(&mut context) else { break };
                any = true;
                match event {
                    Some(Event::Started(_)) => {}
                    Some(Event::Token(token)) => {
                        if !token.logprob.is_finite() {
                            return Err(EvalError::NotANumber { what: "the log-probability of a token" });
                        }
                        track.first_id.get_or_insert(token.id);
                        track.tokens.push(token.at);
                    }
                    Some(Event::Finished(_)) => track.stream = None,
                    Some(Event::Failed(error)) => return Err(error.into()),
                    None => return Err(EvalError::Interrupted { when: "before its end" }),
                }
            }
        }
        Ok(any)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::speed::random;
    use engine::{EngineConfig, Prompt};

    #[test]
    fn tokens_of_requests_that_run_together_are_seen_in_order() {
        let model_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference");
        let engine = Engine::load(EngineConfig { model_dir, threads: 1, ..EngineConfig::default() }).unwrap();
        let mut streams = Streams::new();
        let before = Instant::now();
        for seed in 0..3 {
            let prompt = Prompt::plain(random::tokens(seed, 20, engine.spec().vocab));
            let request = Request { ignore_eos: true, ..Request::new(prompt, 6) };
            assert_eq!(streams.submit(&engine, request).unwrap(), seed as usize);
        }
        streams.take_until(None, |tracks| tracks.iter().all(Track::ended)).unwrap();
        for track in &streams.tracks {
            assert_eq!((track.tokens.len(), track.gaps(before, Instant::now()).count()), (6, 5));
            assert_eq!(track.gaps(track.tokens[1], track.tokens[4]).count(), 3);
            assert!(track.tokens.is_sorted() && track.tokens[0] > before && track.first_id.is_some());
        }
        // Nothing is left to wait for: a moment passes by, without one it is an error.
        assert!(streams.take_until(Some(Instant::now()), |_| false).is_ok());
        assert!(matches!(streams.take_until(None, |_| false), Err(EvalError::Interrupted { .. })));
    }

    #[test]
    fn a_request_that_fails_is_an_error() {
        let model_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/reference");
        let engine = Engine::load(EngineConfig { model_dir, threads: 1, ..EngineConfig::default() }).unwrap();
        let beyond = Request::new(Prompt::plain(vec![9_999_999]), 2);
        let mut streams = Streams::new();
        let failed = streams.submit(&engine, beyond).and_then(|_| streams.take_until(None, |_| false));
        assert!(matches!(failed, Err(EvalError::Engine(_))), "{failed:?}");
    }
}
