//! The run itself: contexts, the ways of making their KV, questions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use engine::{ChunkKv, ChunkSource, Engine, PreparedContext, Prompt, PromptChunk, Request};

use super::Judged;
use super::config::{Blend, Config};
use super::report::Cost;
use crate::ask::{Material, ask};
use crate::error::Result;
use crate::progress::Meter;
use crate::tasks::{Context, Size, score};

/// Tokens of an answer at most; the longest wanted ones (four numbers of seven digits, a UUID) take half of it.
const MAX_TOKENS: usize = 96;
/// Bytes of chunk KV kept in case the chunk occurs again.
const KEPT_BYTES: usize = 1 << 29;

/// What contexts of one size cost under one configuration.
pub(super) type Costs = BTreeMap<(Size, &'static str), Cost>;

/// An estimate of the whole work, in tokens of prefill.
pub(super) fn cost(contexts: &[Context], configs: &[Config]) -> f64 {
    contexts.iter().flat_map(|context| groups(configs).map(|group| group_cost(context, group))).sum()
}

/// Configurations side by side that share a context's KV.
fn groups(configs: &[Config]) -> impl Iterator<Item = &[Config]> {
    configs.chunk_by(|a, b| a.blend == b.blend)
}

fn group_cost(context: &Context, group: &[Config]) -> f64 {
    let tokens = context.chunks.iter().map(|chunk| chunk.len()).sum::<usize>() as f64 / 4.0;
    let made = if group[0].blend == Blend::Reuse { tokens } else { tokens * (1.0 + tokens / 16_384.0) };
    made + 150.0 * (group.len() * context.questions.len()) as f64
}

/// Answers in the order of contexts, configurations, questions; each also goes to `sink` at once.
pub(super) fn run(
    engine: &Engine,
    contexts: &[Context],
    configs: &[Config],
    meter: &mut Meter<'_>,
    sink: &mut dyn FnMut(&Judged) -> Result<()>,
) -> Result<(Vec<Judged>, Costs)> {
    let mut runner = Runner { engine, material: Material::new(engine)?, chunks: HashMap::new(), costs: Costs::new() };
    let mut judged = Vec::new();
    for context in contexts {
        for group in groups(configs) {
            let prepared = runner.prepare(context, group[0].blend)?;
            for config in group {
                for answer in runner.questions(context, config, &prepared)? {
                    sink(&answer)?;
                    judged.push(answer);
                }
            }
            let names: Vec<&str> = group.iter().map(|config| config.name).collect();
            let steps = group.len() * context.questions.len();
            meter.advance(steps, group_cost(context, group), format!("{} {}", context.id, names.join(", ")));
        }
        runner.trim();
    }
    Ok((judged, runner.costs))
}

struct Runner<'a> {
    engine: &'a Engine,
    material: Material<'a>,
    chunks: HashMap<Arc<[u32]>, Arc<ChunkKv>>,
    costs: Costs,
}

impl Runner<'_> {
    fn prepare(&mut self, context: &Context, blend: Blend) -> Result<Arc<PreparedContext>> {
        let mut chunks: Vec<PromptChunk> = Vec::new();
        for text in &context.chunks {
            let tokens = self.material.chunk(text)?;
            let source = if blend.uses_chunks() { Some(self.source(&tokens)?) } else { None };
            chunks.push(self.material.prompt_chunk(&tokens, source));
        }
        let prefix = self.material.prefix().to_vec();
        Ok(self.engine.prepare_context(prefix, chunks, blend.settings())?)
    }

    /// The KV of a chunk behind nothing but the prefix.
    fn source(&mut self, tokens: &Arc<[u32]>) -> Result<Arc<dyn ChunkSource>> {
        if let Some(known) = self.chunks.get(tokens) {
            return Ok(known.clone());
        }
        let made = Arc::new(self.engine.chunk_kv(self.material.prefix(), tokens)?);
        self.chunks.insert(tokens.clone(), made.clone());
        Ok(made)
    }

    fn trim(&mut self) {
        let bytes = |kv: &Arc<ChunkKv>| kv.layers.iter().map(|l| l.keys.len() + l.values.len()).sum::<usize>();
        if self.chunks.values().map(bytes).sum::<usize>() > KEPT_BYTES {
            self.chunks.clear();
        }
    }

    fn questions(
        &mut self,
        context: &Context,
        config: &Config,
        prepared: &Arc<PreparedContext>,
    ) -> Result<Vec<Judged>> {
        let cost = self.costs.entry((context.size, config.name)).or_default();
        cost.context(prepared.stats());
        let mut judged = Vec::new();
        for question in &context.questions {
            let mut request = Request::new(Prompt::plain(self.material.question(&question.text)?), MAX_TOKENS);
            request.context = Some(prepared.clone());
            request.attention = config.attention.clone();
            let answer = ask(self.engine, request)?;
            cost.question(&answer.finished.decode);
            let output = answer.text.trim().to_owned();
            let score = score(&question.task, &output, &question.answers);
            judged.push(Judged {
                id: context.id.clone(),
                question_index: question.index,
                task: question.task.clone(),
                size: context.size.to_string(),
                order: context.size,
                config: config.name,
                output,
                answers: question.answers.clone(),
                exact: score.exact,
                part: score.part,
            });
        }
        Ok(judged)
    }
}
