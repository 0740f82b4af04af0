//! KV to compute that is no request's: chunks for the store, contexts that many questions share, and what attention sees.
//!
//! A job holds the pages for all of its tokens from its beginning, and goes on by the tokens that the scheduler grants it.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use crate::blend::{Blend, Blended, Context, Progress, Suffix};
use crate::chunk::{ComputedChunk, PromptChunk, Tapped};
use crate::config::BlendConfig;
use crate::error::{EngineError, Result};
use crate::kv::sequence::SequenceKv;
use crate::model::transformer::{ChunkSums, Piece, Transformer, Want};
use crate::request::{AttentionInputs, ChunkAttention, PreparedContext};
use crate::scheduler::{Bytes, Entry, Work};
use crate::tiers::ChunkTiers;
use crate::unwind::guarded;

/// What is to be computed, and who is told.
pub(crate) enum Computation {
    Chunk { prefix: Vec<u32>, tokens: Vec<u32>, reply: Sender<Result<ComputedChunk>> },
    AttentionInputs { tokens: Vec<u32>, reply: Sender<Result<Vec<AttentionInputs>>> },
    ChunkAttention { prefix: Vec<u32>, chunks: Vec<Vec<u32>>, reply: Sender<Result<ChunkAttention>> },
    Context { prefix: Vec<u32>, chunks: Vec<PromptChunk>, blend: BlendConfig, reply: Sender<Result<PreparedContext>> },
}

/// A computation on its way.
pub(crate) struct Job {
    task: Task,
    /// Its place among all that have come: the smaller, the older.
    age: u64,
    /// Tokens whose KV it makes.
    tokens: usize,
    kv: SequenceKv,
    /// Tokens whose KV is made.
    done: usize,
    ended: bool,
}

enum Task {
    Text(Box<Text>),
    Context(Box<Preparing>),
}

/// A text that is read alone.
struct Text {
    tokens: Vec<u32>,
    tapped: Tapped,
    /// Queries, where these are wanted.
    queries: Option<Vec<Vec<f32>>>,
    /// What its tokens pay, where that is wanted.
    sums: Option<ChunkSums>,
    begun: Option<Instant>,
    reply: TextReply,
}

enum TextReply {
    Chunk {
        skip: usize,
        to: Sender<Result<ComputedChunk>>,
    },
    Inputs(Sender<Result<Vec<AttentionInputs>>>),
    /// Of chunks of so many tokens behind a prefix.
    Attention {
        prefix: usize,
        chunks: Vec<usize>,
        to: Sender<Result<ChunkAttention>>,
    },
}

/// A context for many questions.
struct Preparing {
    prefix: Vec<u32>,
    chunks: Vec<PromptChunk>,
    config: BlendConfig,
    blend: Option<Blend>,
    /// Whether there was no memory for its blend beside others: it begins again once those are done.
    held_back: bool,
    begun: Option<Instant>,
    /// Which engine makes it.
    engine: u64,
    reply: Sender<Result<PreparedContext>>,
}

impl Job {
    /// `engine`: which one it is.
    pub(crate) fn new(computation: Computation, age: u64, engine: u64, model: &Transformer) -> Job {
        let text = |tokens: Vec<u32>, queries, reply| {
            let text = Text { tokens, tapped: Vec::new(), queries, sums: None, begun: None, reply };
            (text.tokens.len(), Task::Text(Box::new(text)))
        };
        let (tokens, task) = match computation {
            Computation::Chunk { prefix, tokens, reply } => {
                let to = TextReply::Chunk { skip: prefix.len(), to: reply };
                text([prefix, tokens].concat(), None, to)
            }
            Computation::AttentionInputs { tokens, reply } => text(tokens, Some(Vec::new()), TextReply::Inputs(reply)),
            Computation::ChunkAttention { prefix, chunks, reply } => {
                let lengths = chunks.iter().map(Vec::len).collect();
                let to = TextReply::Attention { prefix: prefix.len(), chunks: lengths, to: reply };
                text([prefix, chunks.concat()].concat(), None, to)
            }
            Computation::Context { prefix, chunks, blend, reply } => {
                let tokens = prefix.len() + chunks.iter().map(|c| c.tokens.len()).sum::<usize>();
                let preparing = Preparing {
                    prefix,
                    chunks,
                    config: blend,
                    blend: None,
                    held_back: false,
                    begun: None,
                    engine,
                    reply,
                };
                (tokens, Task::Context(Box::new(preparing)))
            }
        };
        Job { task, age, tokens, kv: model.new_kv(), done: 0, ended: false }
    }

    /// Tokens whose KV it holds once it has begun.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// As the scheduler sees it. `chunk`: tokens that are read in a step at most.
    pub(crate) fn entry(&mut self, model: &Transformer, chunk: usize) -> Entry {
        let work = match &mut self.task {
            Task::Text(text) => Work::Read { tokens: (text.tokens.len() - self.done).min(chunk), whole: false },
            Task::Context(preparing) => match &mut preparing.blend {
                _ if preparing.held_back => Work::Wait,
                Some(blend) => match blend.is_ready() {
                    true => Work::Blend { tokens: blend.left(model), takes: 0 },
                    false => Work::Wait,
                },
                None => Work::Blend { tokens: self.tokens.max(1), takes: 0 },
            },
        };
        let shared = Bytes::default();
        Entry { work, ahead: self.tokens, room: self.tokens, own: self.kv.bytes(), shared, age: self.age }
    }

    /// Takes its pages.
    ///
    /// # Errors
    /// [`EngineError::OutOfMemory`] where a GPU has too few.
    pub(crate) fn begin(&mut self, model: &Transformer) -> Result<()> {
        self.kv.extend_to(self.tokens)?;
        self.kv.truncate(0);
        let Task::Text(text) = &mut self.task else { return Ok(()) };
        text.begun = Some(Instant::now());
        if let TextReply::Attention { prefix, chunks, .. } = &text.reply {
            text.sums = Some(ChunkSums::new(model, *prefix, chunks)?);
        } else {
            // What comes with every step is appended: nothing that is there is moved for it.
            let room = || Vec::with_capacity(text.tokens.len() * model.shape.width());
            text.tapped = (0..model.spec.layers).map(|_| (room(), room())).collect();
        }
        Ok(())
    }

    /// Bytes that it holds.
    pub(crate) fn bytes(&self) -> Bytes {
        self.kv.bytes()
    }

    /// Whether nothing is left to do.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether it reads a text, with others in one batch.
    pub(crate) fn is_text(&self) -> bool {
        matches!(self.task, Task::Text(_))
    }

    /// Whether its context waits for memory that others have.
    pub(crate) fn is_held_back(&self) -> bool {
        matches!(&self.task, Task::Context(preparing) if preparing.held_back)
    }

    /// Whether a context is in the making.
    pub(crate) fn is_blending(&self) -> bool {
        matches!(&self.task, Task::Context(preparing) if preparing.blend.is_some())
    }

    /// Says that it has failed, unless it has ended. Whoever asked may have gone away: then nobody is told.
    pub(crate) fn fail(&mut self, error: EngineError) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        match &self.task {
            Task::Text(text) => match &text.reply {
                TextReply::Chunk { to, .. } => drop(to.send(Err(error))),
                TextReply::Inputs(to) => drop(to.send(Err(error))),
                TextReply::Attention { to, .. } => drop(to.send(Err(error))),
            },
            Task::Context(preparing) => drop(preparing.reply.send(Err(error))),
        }
    }

    /// Its part of a batch: the next `tokens` of its text. `None`: it is no text.
    pub(crate) fn piece(&mut self, tokens: usize) -> Option<Piece<'_>> {
        let Task::Text(text) = &mut self.task else { return None };
        let text = &mut **text;
        let part = &text.tokens[self.done..self.done + tokens];
        let piece = Piece::exact(&mut self.kv, part, Want::Nothing);
        let tap = if text.sums.is_some() { None } else { Some(&mut text.tapped) };
        Some(Piece { tap, query_tap: text.queries.as_mut(), sums: text.sums.as_mut(), ..piece })
    }

    /// The next `tokens` of its text have been read.
    pub(crate) fn advance(&mut self, tokens: usize, model: &Transformer) {
        self.done += tokens;
        let Task::Text(text) = &mut self.task else { return };
        if self.done < text.tokens.len() {
            return;
        }
        self.ended = true;
        let tapped = std::mem::take(&mut text.tapped);
        match &text.reply {
            TextReply::Chunk { skip, to } => {
                let tokens = text.tokens.len() - skip;
                drop(to.send(Ok(ComputedChunk { skip: *skip, tokens, tapped })));
            }
            TextReply::Attention { to, .. } => {
                let none = || EngineError::Internal("nothing was added up of a text that was read for it".into());
                let finished = text.sums.take().ok_or_else(none).and_then(|sums| sums.finish(model));
                // A GPU has done all of it only now.
                let seconds = text.begun.map_or(0.0, |begun| begun.elapsed().as_secs_f64());
                drop(to.send(finished.map(|[own, prefix]| ChunkAttention { own, prefix, seconds })));
            }
            TextReply::Inputs(to) => {
                let rows = model.rows((0..text.tokens.len()).collect());
                let layers = tapped.into_iter().zip(text.queries.take().unwrap_or_default());
                let input = |((keys, _), queries): ((Vec<f32>, Vec<f32>), Vec<f32>)| AttentionInputs {
                    queries,
                    keys: model.rotated(&rows, keys),
                    scale: model.softmax_scale(),
                };
                drop(to.send(Ok(layers.map(input).collect())));
            }
        }
    }

    /// Makes a piece of a context, for about the cost of reading so many tokens. Whether anything was done.
    pub(crate) fn go_on_blending(
        &mut self,
        model: &Transformer,
        tiers: &Arc<ChunkTiers>,
        tokens: usize,
    ) -> Result<bool> {
        let Task::Context(preparing) = &mut self.task else { return Ok(false) };
        let begun = *preparing.begun.get_or_insert_with(Instant::now);
        let Preparing { prefix, chunks, config, blend, engine, reply, .. } = &mut **preparing;
        let context = Context { tiers: Some(tiers), ..Context::unasked(prefix, chunks) };
        let new = || Blend::new(model, 0, &context, config, Suffix::Later);
        let begun_blend = blend.take().map_or_else(new, Ok)?;
        let current = blend.insert(begun_blend);
        let kv = &mut self.kv;
        let Blended { mut stats, .. } = match guarded("preparing a context", || current.advance(model, kv, tokens))? {
            Progress::Waits => return Ok(false),
            Progress::More => return Ok(true),
            Progress::Done(blended) => *blended,
        };
        *blend = None;
        self.ended = true;
        stats.seconds = begun.elapsed().as_secs_f64();
        let kv = std::mem::replace(&mut self.kv, model.new_kv());
        drop(reply.send(Ok(PreparedContext { kv, stats, engine: *engine })));
        Ok(true)
    }

    /// Gives the memory of its blend back, beside the pages, to begin again when there is more.
    pub(crate) fn hold_back(&mut self) {
        if let Task::Context(preparing) = &mut self.task {
            preparing.blend = None;
            preparing.held_back = true;
            self.kv.truncate(0);
        }
    }

    /// There is more memory for blends than there was.
    pub(crate) fn let_go(&mut self) {
        if let Task::Context(preparing) = &mut self.task {
            preparing.held_back = false;
        }
    }

    /// Waits for the next layer of its context, so long at most. Whether it is there.
    pub(crate) fn wait_for_layer(&mut self, most: Duration) -> bool {
        match &mut self.task {
            Task::Context(preparing) => preparing.blend.as_mut().is_some_and(|blend| blend.wait(most)),
            Task::Text(_) => false,
        }
    }
}
