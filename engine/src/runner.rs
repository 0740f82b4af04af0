//! The engine's thread: takes commands, admits requests, runs steps.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::blend::blend;
use crate::chunk::{ChunkKv, PromptChunk};
use crate::config::{BlendConfig, EngineConfig};
use crate::error::{EngineError, Result};
use crate::model::transformer::{Piece, Transformer, Want};
use crate::request::{AttentionInputs, Event, PreparedContext, Request};
use crate::sequence::{Phase, Sequence};
use crate::tokenizer::Tokenizer;

/// What the engine's thread is told.
pub(crate) enum Command {
    Submit { request: Box<Request>, events: UnboundedSender<Event>, submitted: Instant },
    ChunkKv { prefix: Vec<u32>, tokens: Vec<u32>, reply: Sender<Result<ChunkKv>> },
    AttentionInputs { tokens: Vec<u32>, reply: Sender<Result<Vec<AttentionInputs>>> },
    Prepare { prefix: Vec<u32>, chunks: Vec<PromptChunk>, blend: BlendConfig, reply: Sender<Result<PreparedContext>> },
    Shutdown,
}

/// What other threads may read of the engine's state.
#[derive(Default)]
pub(crate) struct Load {
    pub(crate) running: AtomicUsize,
    /// Requests handed in and not yet admitted.
    pub(crate) waiting: AtomicUsize,
    pub(crate) kv_bytes: AtomicU64,
    pub(crate) stopping: AtomicBool,
}

/// A request that has not been admitted.
struct Waiting {
    request: Box<Request>,
    events: UnboundedSender<Event>,
    submitted: Instant,
}

/// Everything that the engine's thread owns.
pub(crate) struct Runner {
    pub(crate) model: Arc<Transformer>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) config: EngineConfig,
    pub(crate) kv_budget: u64,
    pub(crate) max_context: usize,
    pub(crate) identity: u64,
    pub(crate) load: Arc<Load>,
    pub(crate) commands: Receiver<Command>,
}

impl Runner {
    /// Runs until shutdown: then no command is taken any more, and what runs or waits is completed.
    pub(crate) fn run(self) {
        let mut waiting = VecDeque::new();
        let mut running: Vec<Sequence> = Vec::new();
        loop {
            let idle = waiting.is_empty() && running.is_empty();
            if !self.take_commands(&mut waiting, idle) && waiting.is_empty() && running.is_empty() {
                return;
            }
            self.admit(&mut waiting, &mut running);
            self.step(&mut running);
            running.retain(|s| s.phase != Phase::Done && !s.is_cancelled());
            self.report(&running);
        }
    }

    /// Takes what has been sent, waiting for it when `idle`. False once the engine is stopping.
    fn take_commands(&self, waiting: &mut VecDeque<Waiting>, idle: bool) -> bool {
        if self.load.stopping.load(Ordering::Acquire) && !idle {
            return false;
        }
        let mut first = idle;
        loop {
            let command = if std::mem::take(&mut first) {
                self.commands.recv().map_err(|_| TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(Command::Submit { request, events, submitted }) => {
                    waiting.push_back(Waiting { request, events, submitted });
                }
                // Whoever asked may have gone away: then the reply is dropped.
                Ok(Command::ChunkKv { prefix, tokens, reply }) => {
                    let step = self.config.prefill_chunk.max(1);
                    drop(reply.send(ChunkKv::compute(&self.model, &prefix, &tokens, step)));
                }
                Ok(Command::AttentionInputs { tokens, reply }) => drop(reply.send(self.attention_inputs(&tokens))),
                Ok(Command::Prepare { prefix, chunks, blend, reply }) => {
                    drop(reply.send(self.prepare(&prefix, &chunks, &blend)));
                }
                Err(TryRecvError::Empty) => return true,
                Ok(Command::Shutdown) | Err(TryRecvError::Disconnected) => {
                    self.load.stopping.store(true, Ordering::Release);
                    return false;
                }
            }
        }
    }

    /// Bytes of KV that a request needs at most.
    fn kv_need(&self, request: &Request) -> u64 {
        let context = request.context.as_ref().map_or(0, |c| c.len());
        let tokens = (context + request.prompt.len()).saturating_add(request.max_tokens).min(self.max_context);
        (tokens * self.model.shape.token_bytes()) as u64
    }

    fn admit(&self, waiting: &mut VecDeque<Waiting>, running: &mut Vec<Sequence>) {
        while let Some(next) = waiting.front() {
            let used: u64 = running.iter().map(|s| self.kv_need(&s.request)).sum();
            let room = running.len() < self.config.max_sequences.max(1)
                && (running.is_empty() || used + self.kv_need(&next.request) <= self.kv_budget);
            if !room {
                return;
            }
            let Some(Waiting { request, events, submitted }) = waiting.pop_front() else { return };
            self.load.waiting.fetch_sub(1, Ordering::AcqRel);
            if events.is_closed() {
                continue;
            }
            let context = request.context.as_ref().map_or(0, |c| c.len());
            let limit = request.max_tokens.min(self.max_context.saturating_sub(context + request.prompt.len()));
            running.push(Sequence::new(*request, events, submitted, &self.model, &self.tokenizer, limit));
        }
    }

    /// One step: a part of the first prompt that is not yet read, then a token for all that decode.
    fn step(&self, running: &mut [Sequence]) {
        let reading = running.iter_mut().find(|s| matches!(s.phase, Phase::Context | Phase::Suffix(_)));
        if let Some(sequence) = reading
            && let Err(error) = sequence.prefill_step(&self.model, self.config.prefill_chunk.max(1))
        {
            sequence.fail(error);
        }
        let mut decoding: Vec<&mut Sequence> =
            running.iter_mut().filter(|s| s.phase == Phase::Decode && !s.is_cancelled()).collect();
        decoding.retain_mut(|s| match s.settle() {
            Ok(()) => true,
            Err(error) => {
                s.fail(error);
                false
            }
        });
        if !decoding.is_empty() {
            self.decode(&mut decoding);
        }
    }

    fn decode(&self, sequences: &mut [&mut Sequence]) {
        let tokens: Vec<[u32; 1]> = sequences.iter().map(|s| [s.next_token()]).collect();
        let mut pieces: Vec<Piece<'_>> =
            sequences.iter_mut().zip(&tokens).map(|(s, token)| s.decode_piece(token)).collect();
        let states = self.model.forward(&mut pieces);
        let stats: Vec<_> = pieces.iter().map(|p| p.stats).collect();
        let greedy: Vec<bool> = sequences.iter().map(|s| s.is_greedy()).collect();
        let nexts = match states.and_then(|states| self.model.next(&states, &greedy)) {
            Ok(nexts) => nexts,
            Err(error) => {
                // One step, one fate: which sequence was at fault is not known.
                let why = error.to_string();
                sequences.iter_mut().for_each(|s| s.fail(EngineError::Internal(why.clone())));
                return;
            }
        };
        for ((sequence, stats), next) in sequences.iter_mut().zip(stats).zip(nexts) {
            sequence.add_cold(stats);
            if let Err(error) = sequence.accept(next) {
                sequence.fail(error);
            }
        }
    }

    fn report(&self, running: &[Sequence]) {
        self.load.running.store(running.len(), Ordering::Relaxed);
        self.load.kv_bytes.store(running.iter().map(|s| s.kv.bytes() as u64).sum(), Ordering::Relaxed);
    }

    /// What every layer's attention sees of a text that is read alone.
    fn attention_inputs(&self, tokens: &[u32]) -> Result<Vec<AttentionInputs>> {
        let mut kv = self.model.new_kv();
        let (mut tap, mut query_tap) = (Vec::new(), Vec::new());
        for part in tokens.chunks(self.model.most_rows()) {
            let piece = Piece::exact(&mut kv, part, Want::Nothing);
            let piece = Piece { tap: Some(&mut tap), query_tap: Some(&mut query_tap), ..piece };
            self.model.forward(&mut [piece])?;
        }
        let rows = self.model.rows((0..tokens.len()).collect());
        let layers = tap.into_iter().zip(query_tap);
        Ok(layers
            .map(|((keys, _), queries)| AttentionInputs {
                queries,
                keys: self.model.rotated(&rows, keys),
                scale: self.model.softmax_scale(),
            })
            .collect())
    }

    fn prepare(&self, prefix: &[u32], chunks: &[PromptChunk], config: &BlendConfig) -> Result<PreparedContext> {
        let begun = Instant::now();
        let mut blended = blend(&self.model, prefix, chunks, config, &|| false)?;
        blended.stats.seconds = begun.elapsed().as_secs_f64();
        Ok(PreparedContext { kv: blended.kv, stats: blended.stats, engine: self.identity })
    }
}

/// Asks the engine's thread and waits for the answer.
pub(crate) fn ask<T>(commands: &Sender<Command>, command: impl FnOnce(Sender<Result<T>>) -> Command) -> Result<T> {
    let stopped = || EngineError::Stopped("its thread takes no more commands".into());
    let (reply, answer) = mpsc::channel();
    commands.send(command(reply)).map_err(|_| stopped())?;
    answer.recv().map_err(|_| stopped())?
}
