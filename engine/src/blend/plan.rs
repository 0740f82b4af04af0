//! Which parts of a context are computed, which are reused, and why.

use std::ops::Range;

use crate::chunk::PromptChunk;
use crate::config::{BlendConfig, BlendMode};

/// What happens to a run of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Treatment {
    /// Computed in all layers: a prefix, or a chunk without cached state.
    Fresh,
    /// Used as cached: the tokens before it are those it was computed behind.
    Exact,
    /// Used as cached, except for what the selection recomputes.
    Cached,
}

/// A run of tokens with one treatment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) positions: Range<usize>,
    pub(crate) treatment: Treatment,
    /// Index of the chunk; `None` for the prefix.
    pub(crate) chunk: Option<usize>,
}

/// The plan for one context.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct BlendPlan {
    pub(crate) tokens: Vec<u32>,
    /// Contiguous from position 0.
    pub(crate) spans: Vec<Span>,
}

impl BlendPlan {
    /// `failed`: chunks whose source has failed.
    pub(crate) fn new(prefix: &[u32], chunks: &[PromptChunk], config: &BlendConfig, failed: &[usize]) -> BlendPlan {
        let mut tokens = prefix.to_vec();
        let mut spans = vec![Span { positions: 0..prefix.len(), treatment: Treatment::Fresh, chunk: None }];
        for (i, chunk) in chunks.iter().enumerate() {
            let usable = config.mode != BlendMode::FullRecompute && chunk.source.is_some() && !failed.contains(&i);
            let treatment = match usable {
                false => Treatment::Fresh,
                true if *chunk.prefix == tokens[..] => Treatment::Exact,
                true => Treatment::Cached,
            };
            let start = tokens.len();
            tokens.extend_from_slice(&chunk.tokens);
            spans.push(Span { positions: start..tokens.len(), treatment, chunk: Some(i) });
        }
        spans.retain(|s| !s.positions.is_empty());
        BlendPlan { tokens, spans }
    }

    /// Positions of all tokens with one of these treatments, ascending.
    pub(crate) fn positions(&self, treatments: &[Treatment]) -> Vec<usize> {
        let chosen = self.spans.iter().filter(|s| treatments.contains(&s.treatment));
        chosen.flat_map(|s| s.positions.clone()).collect()
    }

    /// The spans that a rule chooses from: what is exact takes no part in scores, budgets, corrections and what is charged.
    pub(crate) fn composed(&self) -> impl Iterator<Item = &Span> {
        self.spans.iter().filter(|s| s.treatment == Treatment::Cached)
    }

    /// Spans whose cached state is read.
    pub(crate) fn cached_spans(&self) -> Vec<Span> {
        self.spans.iter().filter(|s| s.treatment != Treatment::Fresh).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::ChunkKv;
    use std::sync::Arc;

    fn chunk(tokens: &[u32], prefix: &[u32], cached: bool) -> PromptChunk {
        let kv = ChunkKv { tokens: tokens.len(), layers: Vec::new() };
        PromptChunk { tokens: tokens.into(), prefix: prefix.into(), source: cached.then(|| Arc::new(kv) as _) }
    }

    fn treatments(config: &BlendConfig, failed: &[usize]) -> Vec<Treatment> {
        let chunks = [chunk(&[5, 6], &[1], true), chunk(&[7], &[1], true), chunk(&[8], &[1], false)];
        BlendPlan::new(&[1], &chunks, config, failed).spans.iter().map(|s| s.treatment).collect()
    }

    #[test]
    fn a_chunk_is_exact_only_behind_the_prefix_it_was_computed_behind() {
        use Treatment::{Cached, Exact, Fresh};
        let config = BlendConfig::default();
        assert_eq!(treatments(&config, &[]), [Fresh, Exact, Cached, Fresh]);
        assert_eq!(treatments(&config, &[0]), [Fresh, Fresh, Cached, Fresh]);
        let full = BlendConfig { mode: BlendMode::FullRecompute, ..config };
        assert_eq!(treatments(&full, &[]), [Fresh; 4]);
    }

    #[test]
    fn a_chunk_cached_behind_the_whole_prompt_before_it_is_exact_too() {
        let chunks = [chunk(&[5, 6], &[1], true), chunk(&[7], &[1, 5, 6], true)];
        let plan = BlendPlan::new(&[1], &chunks, &BlendConfig::default(), &[]);
        assert_eq!(plan.positions(&[Treatment::Exact]), [1, 2, 3]);
        assert_eq!(plan.composed().count(), 0);
    }
}
