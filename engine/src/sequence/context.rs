//! A request's context, blended piece by piece.

use std::sync::Arc;
use std::time::Duration;

use super::{Phase, Sequence};
use crate::blend::{Blend, Blended, Context, Progress, Suffix};
use crate::error::Result;
use crate::kv::prefix::SharedPage;
use crate::model::transformer::{States, Transformer};
use crate::prefix_cache::PrefixCache;
use crate::request::{PrefillStats, Prompt};
use crate::tiers::ChunkTiers;
use crate::unwind::guarded;

/// What came of a piece of a context.
pub(crate) enum Blending {
    /// Nothing: its next layer has not been read yet.
    Waits,
    Went,
    /// The whole prompt has been read, and what follows it is to be chosen.
    Read(States),
}

impl Sequence {
    /// Whether its context waits for memory that others have.
    pub(crate) fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// Whether its context is in the making.
    pub(crate) fn is_blending(&self) -> bool {
        self.blend.is_some()
    }

    /// Makes a piece of the context's KV, for about the cost of reading so many tokens. Where nothing leaves the window before
    /// the answer, the prompt behind it is read with it.
    pub(crate) fn go_on_blending(
        &mut self,
        model: &Transformer,
        tiers: &Arc<ChunkTiers>,
        tokens: usize,
        cache: &mut PrefixCache<SharedPage>,
    ) -> Result<Blending> {
        let begun = self.blend.take().map_or_else(|| self.begin_blend(model, tiers), Ok)?;
        let blend = self.blend.insert(begun);
        let progress = guarded("blending a context", || blend.advance(model, &mut self.kv, tokens))?;
        let Blended { stats, state } = match progress {
            Progress::Waits => return Ok(Blending::Waits),
            Progress::More => return Ok(Blending::Went),
            Progress::Done(blended) => *blended,
        };
        self.blend = None;
        self.phase = Phase::Text;
        // What a second time costs, after its memory was taken, is not the request's.
        if !std::mem::replace(&mut self.blended, true) {
            self.prefill = PrefillStats { prefix_tokens: self.prefill.prefix_tokens, ..stats };
        }
        self.share(cache);
        let Some(state) = state else { return Ok(Blending::Went) };
        self.read = self.prompt;
        self.seen = self.seen.max(self.read);
        // An answer that has begun is read again as it was written.
        Ok(if self.read == self.text.len() { Blending::Read(state) } else { Blending::Went })
    }

    fn begin_blend(&self, model: &Transformer, tiers: &Arc<ChunkTiers>) -> Result<Box<Blend>> {
        let Prompt { prefix, chunks, .. } = &self.request.prompt;
        // The question as it was asked: an answer that is computed again must not change what is recomputed.
        let context = Context { prefix, chunks, suffix: &self.text[..self.prompt], tiers: Some(tiers) };
        let exact = self.attends_all() || self.context + self.prompt <= self.request.attention.window;
        let then = if exact { Suffix::Read { ban_eos: self.goes_on() } } else { Suffix::Later };
        Blend::new(model, self.kv.len(), &context, &self.request.blend, then).map(Box::new)
    }

    /// Gives the memory of its blend back, beside the pages, to begin again when there is more.
    pub(crate) fn hold_back(&mut self) {
        if let Some(blend) = self.blend.take() {
            self.kv.truncate(blend.held());
            self.held_back = true;
        }
    }

    /// There is more memory for blends than there was.
    pub(crate) fn let_go(&mut self) {
        self.held_back = false;
    }

    /// Waits for the next layer of its context, so long at most. Whether it is there.
    pub(crate) fn wait_for_layer(&mut self, most: Duration) -> bool {
        self.blend.as_mut().is_some_and(|blend| blend.wait(most))
    }
}
