//! The run itself: contexts, the ways of making their KV, questions.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use engine::{
    ChunkKv, ChunkSource, DecodeStats, Engine, EngineError, KvCodec, PrefillStats, PreparedContext, Prompt,
    PromptChunk, Request,
};

use super::answers::{Answers, key};
use super::beside::{BesideFull, FullAnswer};
use super::config::{Config, FULL};
use super::{AnswerCost, Judged};
use crate::ask::{Answer, Material, ask};
use crate::error::Result;
use crate::progress::Meter;
use crate::tasks::{Context, Question, score};

/// Tokens of an answer at most; the longest wanted ones (four numbers of seven digits, a UUID) take half of it.
pub(super) const MAX_TOKENS: usize = 96;
/// Bytes of chunk KV kept in case the chunk occurs again.
const KEPT_BYTES: usize = 1 << 30;

/// An estimate of the whole work, in tokens of prefill.
pub(super) fn cost(contexts: &[Context], configs: &[Config]) -> f64 {
    contexts.iter().flat_map(|context| groups(configs).map(|group| group_cost(context, group))).sum()
}

/// Configurations side by side that share a context's KV.
fn groups(configs: &[Config]) -> impl Iterator<Item = &[Config]> {
    configs.chunk_by(|a, b| (&a.blend, a.codec) == (&b.blend, b.codec))
}

fn group_cost(context: &Context, group: &[Config]) -> f64 {
    let tokens = context.chunks.iter().map(|chunk| chunk.len()).sum::<usize>() as f64 / 4.0;
    let questions = context.questions.len();
    let times = if group[0].is_shared() { 1 } else { group.len() * questions };
    let made = if group[0].blend.ratio == 0.0 { tokens } else { tokens * (1.0 + tokens / 16_384.0) };
    made * times as f64 + 150.0 * (group.len() * questions) as f64
}

/// Answers in the order of contexts, configurations, questions; new ones also go to `answers` at once. Ends behind the context
/// during which `until` has passed.
pub(super) fn run(
    engine: &Engine,
    contexts: &[Context],
    configs: &[Config],
    answers: &mut Answers,
    meter: &mut Meter<'_>,
    until: Option<Instant>,
) -> Result<Vec<Judged>> {
    let mut runner = Runner { engine, material: Material::new(engine)?, chunks: HashMap::new() };
    let mut judged = Vec::new();
    for context in contexts {
        if until.is_some_and(|until| Instant::now() >= until) {
            meter.say(format!("the time is over: {} answers", judged.len()));
            break;
        }
        runner.context(context, configs, answers, meter, &mut judged)?;
        runner.trim();
    }
    Ok(judged)
}

struct Runner<'a> {
    engine: &'a Engine,
    material: Material<'a>,
    chunks: HashMap<(Arc<[u32]>, KvCodec), Arc<ChunkKv>>,
}

/// How a question is put to a configuration.
struct Asked<'a> {
    config: &'a Config,
    /// Of the context, where questions share it.
    prepared: Option<&'a Arc<PreparedContext>>,
    request: Request,
}

impl Runner<'_> {
    /// All questions of a context under all configurations, but for answers that are known.
    fn context(
        &mut self,
        context: &Context,
        configs: &[Config],
        answers: &mut Answers,
        meter: &mut Meter<'_>,
        judged: &mut Vec<Judged>,
    ) -> Result<()> {
        let keys: Vec<String> = context.questions.iter().map(|question| key(context, question)).collect();
        let beside_full = configs.len() > 1 && configs.iter().any(|config| config.name == FULL);
        let known = |answers: &Answers, config: &Config, at: usize| -> Option<Judged> {
            let lacks = |answer: &Judged| beside_full && config.name != FULL && answer.beside.is_none();
            answers.known(&keys[at], config).filter(|answer| !lacks(answer)).cloned()
        };
        // What others are compared with is needed for these questions, known or not.
        let open: Vec<bool> =
            (0..keys.len()).map(|at| configs.iter().any(|config| known(answers, config, at).is_none())).collect();
        let mut full: Vec<Option<FullAnswer>> = keys.iter().map(|_| None).collect();
        for group in groups(configs) {
            let compared = |config: &Config| beside_full && config.name == FULL;
            let wanted = |config: &Config, at: usize, known: bool| !known || (compared(config) && open[at]);
            let any = group
                .iter()
                .any(|config| (0..keys.len()).any(|at| wanted(config, at, known(answers, config, at).is_some())));
            let prepared = if any && group[0].is_shared() { Some(self.prepare(context, &group[0])?) } else { None };
            for config in group {
                for (at, question) in context.questions.iter().enumerate() {
                    let before = known(answers, config, at);
                    if !wanted(config, at, before.is_some()) {
                        judged.extend(before);
                        continue;
                    }
                    let request = self.request(context, question, config, prepared.as_ref())?;
                    let asked = Asked { config, prepared: prepared.as_ref(), request };
                    let (answer, beside) = if compared(config) {
                        let (answer, reading) = self.full(asked.request.clone())?;
                        full[at] = Some(reading);
                        (answer, None)
                    } else {
                        self.beside(&asked, full[at].as_ref())?
                    };
                    let new = asked.judge(context, question, keys[at].clone(), &answer, beside);
                    if before.is_none() {
                        answers.write(&new)?;
                    }
                    judged.push(new);
                }
            }
            let names: Vec<&str> = group.iter().map(|config| config.name.as_str()).collect();
            let steps = group.len() * context.questions.len();
            meter.advance(steps, group_cost(context, group), format!("{} {}", context.id, names.join(", ")));
        }
        Ok(())
    }

    /// The answer of `full`, and its distributions.
    fn full(&self, request: Request) -> Result<(Answer, FullAnswer)> {
        let mut answer = ask(self.engine, Request { report_logits: true, ..request })?;
        let logits = std::mem::take(&mut answer.logits);
        let ended = answer.ids.last().is_some_and(|id| self.engine.spec().eos.contains(id));
        let reading = FullAnswer::new(answer.ids.clone(), answer.text.clone(), logits, ended);
        Ok((answer, reading))
    }

    /// The answer of another configuration, and where it stands beside `full`: the tokens of `full`'s answer are given to it, and only
    /// where it would choose another one does it answer itself.
    fn beside(&self, asked: &Asked<'_>, full: Option<&FullAnswer>) -> Result<(Answer, Option<BesideFull>)> {
        let Some(full) = full else { return Ok((ask(self.engine, asked.request.clone())?, None)) };
        let forced = Request { forced: Some(full.ids.clone().into()), report_logits: true, ..asked.request.clone() };
        let mut answer = ask(self.engine, forced)?;
        let beside = full.compare(&std::mem::take(&mut answer.logits));
        if beside.same {
            answer.text.clone_from(&full.text);
        } else {
            answer = ask(self.engine, asked.request.clone())?;
        }
        Ok((answer, Some(beside)))
    }

    fn request(
        &mut self,
        context: &Context,
        question: &Question,
        config: &Config,
        prepared: Option<&Arc<PreparedContext>>,
    ) -> Result<Request> {
        let mut prompt = Prompt::plain(self.material.question(&question.text)?);
        if prepared.is_none() {
            prompt.prefix = self.material.prefix().to_vec();
            prompt.chunks = self.prompt_chunks(context, config)?;
        }
        let mut request = Request::new(prompt, MAX_TOKENS);
        request.context = prepared.cloned();
        request.attention = config.attention.clone();
        request.blend = config.blend.clone();
        Ok(request)
    }

    fn prepare(&mut self, context: &Context, config: &Config) -> Result<Arc<PreparedContext>> {
        let chunks = self.prompt_chunks(context, config)?;
        let prefix = self.material.prefix().to_vec();
        Ok(self.engine.prepare_context(prefix, chunks, config.blend.clone())?)
    }

    fn prompt_chunks(&mut self, context: &Context, config: &Config) -> Result<Vec<PromptChunk>> {
        let mut chunks: Vec<PromptChunk> = Vec::new();
        for text in &context.chunks {
            let tokens = self.material.chunk(text)?;
            let source = if config.uses_chunks() { Some(self.source(&tokens, config.codec)?) } else { None };
            let source = source.map(|kv| kv as Arc<dyn ChunkSource>);
            chunks.push(self.material.prompt_chunk(&tokens, source));
        }
        Ok(chunks)
    }

    /// The KV of a chunk behind nothing but the prefix, as the codec stores it.
    fn source(&mut self, tokens: &Arc<[u32]>, codec: KvCodec) -> Result<Arc<ChunkKv>> {
        let name = (tokens.clone(), codec);
        if let Some(known) = self.chunks.get(&name) {
            return Ok(known.clone());
        }
        let made = Arc::new(match codec {
            KvCodec::Raw => self.engine.chunk_kv(self.material.prefix(), tokens)?,
            _ => {
                let raw = self.source(tokens, KvCodec::Raw)?;
                raw.coded(codec, &self.engine.kv_shape()).map_err(EngineError::from)?
            }
        });
        self.chunks.insert(name, made.clone());
        Ok(made)
    }

    fn trim(&mut self) {
        let bytes = |kv: &Arc<ChunkKv>| kv.layers.iter().map(|l| l.keys.len() + l.values.len()).sum::<usize>();
        if self.chunks.values().map(bytes).sum::<usize>() > KEPT_BYTES {
            self.chunks.clear();
        }
    }
}

impl Asked<'_> {
    fn judge(
        &self,
        context: &Context,
        question: &Question,
        key: String,
        answer: &Answer,
        beside: Option<BesideFull>,
    ) -> Judged {
        let made = self.prepared.map_or(&answer.prefill, |prepared| prepared.stats());
        let output = answer.text.trim().to_owned();
        let score = score(&question.task, &output, &question.answers);
        Judged {
            key,
            id: context.id.clone(),
            question_index: question.index,
            task: question.task.clone(),
            size: context.size,
            config: self.config.name.clone(),
            blend: self.config.blend.clone(),
            output,
            answers: question.answers.clone(),
            exact: score.exact,
            part: score.part,
            cost: cost_of(made, &answer.finished.decode, self.prepared.is_some()),
            beside,
        }
    }
}

fn cost_of(made: &PrefillStats, decode: &DecodeStats, shared: bool) -> AnswerCost {
    AnswerCost {
        shared,
        reused_tokens: made.reused_tokens,
        recomputed_tokens: made.recomputed_tokens,
        context_seconds: made.seconds,
        failed_chunks: made.failed_chunks,
        charged_share: made.charged_share.map(f64::from),
        gate: made.gate,
        cold_keys: decode.cold_keys,
        keys_scored: decode.keys_scored,
        keys_attended: decode.keys_attended,
    }
}
