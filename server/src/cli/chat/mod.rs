//! `quire chat`: a conversation on the terminal, or one turn a line from a pipe.

mod input;
mod lines;

use std::io::IsTerminal;
use std::sync::Arc;

use engine::{ChatMessage, Engine};
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::answer_view;
use super::args::ChatArgs;
use super::output::{Out, count, seconds};
use crate::config::{self, Settings};
use crate::error::{QuireError, Result};
use crate::metrics::Metrics;
use crate::service::{
    Answer, Answering, Conversation, Options, Passages, Piece, Purpose, Question, Search, Service, generate,
};
use documents::Library;
use documents::data_dir;
use input::{Entry, Grammar};
use lines::{Lines, Typed};

const HELP: &str = "\
/help            this text
/clear           forget everything that was said
/system TEXT     set the instruction in front of everything; without TEXT: remove it
/exit            end, as Ctrl-D does
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
Ctrl-C ends an answer; what there is of it stays in the conversation.";

/// Converses until the input ends. `documents`: each turn is answered over the collection.
pub(super) fn run(settings: &Settings, args: &ChatArgs, documents: bool, out: &Out) -> Result<()> {
    let speaker = Speaker::open(settings, documents, out)?;
    let conversation = Conversation::new(args.system.clone());
    speaker.tokens(&conversation.messages("Hello"))?;
    let failed = |source| QuireError::Io { action: "start the runtime for", path: "the conversation".into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let interactive = std::io::stdin().is_terminal();
    let lines = match interactive {
        true => Lines::edited((!args.no_history).then(config::chat_history))?,
        false => Lines::piped(),
    };
    let result = runtime.block_on(async {
        let chat = Chat {
            speaker: &speaker,
            conversation,
            grammar: Grammar::default(),
            lines,
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            interactive,
            stats: args.stats || out.verbose,
            number: 0,
            out,
        };
        chat.converse().await
    });
    speaker.engine().shutdown();
    result
}

/// Who answers.
enum Speaker {
    /// The model alone; needs no data folder, so that a running server keeps its own.
    Model { engine: Engine, metrics: Arc<Metrics>, options: Options },
    /// The model over a collection of documents.
    Documents { service: Box<Service>, collection: String, top_chunks: usize, options: Options },
}

impl Speaker {
    fn open(settings: &Settings, documents: bool, out: &Out) -> Result<Speaker> {
        if documents {
            // Before the model is loaded: a missing collection is the commoner mistake.
            data_dir::check(&settings.data_dir)?;
            Library::new(&settings.data_dir).collection(&settings.collection)?;
        }
        let spinner = out.spinner("loading the model");
        let options = Options::from_settings(settings)?;
        let speaker = if documents {
            let service = Box::new(Service::open(settings, Purpose::Ask)?);
            let (collection, top_chunks) = (settings.collection.clone(), settings.top_chunks);
            Speaker::Documents { service, collection, top_chunks, options }
        } else {
            let config = settings.engine()?;
            let name = settings.served_name(&config.model_dir);
            let metrics = Arc::new(Metrics::new(&settings.metrics_prefix, &name));
            Speaker::Model { engine: Engine::load(config)?, metrics, options }
        };
        if let Some(spinner) = spinner {
            spinner.finish_and_clear();
        }
        Ok(speaker)
    }

    fn engine(&self) -> &Engine {
        match self {
            Speaker::Model { engine, .. } => engine,
            Speaker::Documents { service, .. } => service.engine(),
        }
    }

    /// The length of a prompt, without passages.
    fn tokens(&self, messages: &[ChatMessage]) -> Result<usize> {
        let (chat, tokenizer) = (self.engine().chat(), self.engine().tokenizer());
        match self {
            Speaker::Model { .. } => Ok(chat.render(tokenizer, messages)?.len()),
            Speaker::Documents { .. } => {
                let prompt = chat.render_with_context(tokenizer, messages)?;
                Ok(prompt.prefix.len() + prompt.suffix.len())
            }
        }
    }

    /// Tokens that the conversation may take: the context without the answer, and over documents half of that.
    fn room(&self) -> usize {
        match self {
            Speaker::Model { engine, options, .. } => {
                conversation_room(engine.max_context(), options.max_tokens, false)
            }
            Speaker::Documents { service, options, .. } => {
                conversation_room(service.engine().max_context(), options.max_tokens, true)
            }
        }
    }

    fn answer(&self, messages: Vec<ChatMessage>, text: &str) -> Result<Answering> {
        match self {
            Speaker::Model { engine, metrics, options } => generate(engine, metrics, &messages, options),
            Speaker::Documents { service, collection, top_chunks, options } => service.answer(&Question {
                messages,
                passages: Passages::Search(Search {
                    collection: collection.clone(),
                    query: text.into(),
                    top_chunks: *top_chunks,
                    score_threshold: 0.0,
                }),
                options: options.clone(),
            }),
        }
    }
}

/// Tokens of a context of `limit` that a conversation leaves for the answer: those that it may have, at most half of the
/// context; without a bound, an eighth.
fn answer_room(limit: usize, max_tokens: Option<usize>) -> usize {
    max_tokens.map_or(limit / 8, |most| most.min(limit / 2))
}

/// What is left of a context of `limit` tokens beside the answer; over documents half of that, as passages need the rest.
fn conversation_room(limit: usize, max_tokens: Option<usize>, documents: bool) -> usize {
    let left = limit - answer_room(limit, max_tokens);
    if documents { left / 2 } else { left }
}

struct Chat<'a> {
    speaker: &'a Speaker,
    conversation: Conversation,
    grammar: Grammar,
    lines: Lines,
    interrupt: Signal,
    /// Somebody types.
    interactive: bool,
    stats: bool,
    number: usize,
    out: &'a Out,
}

impl Chat<'_> {
    /// Until the input ends, or nobody reads the answers any more. What goes wrong is told to whoever types, and ends a
    /// conversation from a pipe.
    async fn converse(mut self) -> Result<()> {
        if self.interactive {
            self.out.note("/help lists commands, Ctrl-D ends");
        }
        let mut typed = String::new();
        loop {
            let prompt = if self.grammar.is_open() { ". " } else { "> " };
            let line = tokio::select! {
                line = self.lines.next(prompt) => line,
                _ = self.interrupt.recv() => Some(Ok(Typed::Interrupt)),
            };
            let ended = line.is_none();
            let step = match line {
                Some(Ok(Typed::Interrupt)) if !self.interactive => return Ok(()),
                Some(Ok(Typed::Interrupt)) => {
                    self.grammar.reset();
                    typed.clear();
                    self.out.note("(Ctrl-D or /exit ends)");
                    continue;
                }
                Some(Ok(Typed::Line(line))) => {
                    typed = if typed.is_empty() { line.clone() } else { format!("{typed}\n{line}") };
                    Ok(self.grammar.feed(&line))
                }
                Some(Err(error)) => Err(error),
                None => Ok(self.grammar.finish()),
            };
            if !self.grammar.is_open() {
                let line = std::mem::take(&mut typed);
                // Recalled, a text of several lines needs no marks that say so.
                let text = match &step {
                    Ok(Some(Entry::Text(text))) if line.contains('\n') => text,
                    _ => &line,
                };
                self.lines.remember(text).await;
            }
            let step = match step {
                Ok(Some(Entry::Exit)) => return Ok(()),
                Ok(Some(entry)) => self.step(entry).await,
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            };
            match step {
                Err(error) if self.interactive => self.out.error(&error),
                step => step?,
            }
            if self.out.is_closed() {
                return Ok(());
            }
            if ended {
                if self.interactive {
                    self.out.note("");
                }
                return Ok(());
            }
        }
    }

    async fn step(&mut self, entry: Entry) -> Result<()> {
        match entry {
            Entry::Text(text) => return self.turn(text).await,
            Entry::Help => self.out.prompt(&format!("{HELP}\n")),
            Entry::Clear => {
                self.conversation.clear();
                self.out.note("(forgotten)");
            }
            Entry::System(system) => {
                let changed = self.conversation.with_system(system);
                // A model may know no instructions: then nothing changes.
                self.speaker.tokens(&changed.messages("Hello"))?;
                self.conversation = changed;
            }
            Entry::Exit => {}
            // Nobody is there to type it again, and lines of files may well begin with a path.
            Entry::Unknown(text) if !self.interactive => {
                let command = text.split_whitespace().next().unwrap_or_default();
                self.out.note(&format!("(`{command}` is no command: taken as a question)"));
                return self.turn(text).await;
            }
            Entry::Unknown(text) => {
                let command = text.split_whitespace().next().unwrap_or_default();
                let problem = format!(
                    "expected /help, /clear, /system or /exit, found `{command}`. Put a space in front of a text that \
                     begins with /"
                );
                return Err(QuireError::InvalidParameter { param: "command".into(), problem });
            }
        }
        Ok(())
    }

    async fn turn(&mut self, text: String) -> Result<()> {
        let tokens = |messages: &[ChatMessage]| self.speaker.tokens(messages);
        let dropped = self.conversation.make_room(&text, self.speaker.room(), &tokens)?;
        if dropped > 0 {
            let turns = count(dropped, "turn");
            self.out.note(&format!("(the context is full: the oldest {turns} of the conversation were forgotten)"));
        }
        let mut answering = self.speaker.answer(self.conversation.messages(&text), &text)?;
        let told = answering.notes().len();
        if !self.out.json {
            answer_view::notes(answering.notes(), self.out);
        }
        let mut said = String::new();
        let answer = loop {
            tokio::select! {
                biased;
                _ = self.interrupt.recv() => break None,
                piece = answering.next() => match piece {
                    Some(Ok(Piece::Text(piece))) => {
                        if !self.out.json {
                            self.out.text(&piece);
                        }
                        if self.out.is_closed() {
                            break None;
                        }
                        said.push_str(&piece);
                    }
                    Some(Ok(Piece::Done(answer))) => break Some(answer),
                    Some(Err(error)) => return Err(error),
                    None => return Err(QuireError::Internal("the engine ended an answer without saying so".into())),
                }
            }
        };
        // Cancels what is still being computed.
        drop(answering);
        self.number += 1;
        self.report(&text, &said, answer.as_deref(), (dropped, told));
        // An answer that was ended before it began would be an empty one.
        if answer.is_some() || !said.is_empty() {
            self.conversation.add(text, said);
        }
        Ok(())
    }

    /// `dropped`: turns that were forgotten; `told`: notes that were told before the answer.
    fn report(&self, question: &str, said: &str, answer: Option<&Answer>, (dropped, told): (usize, usize)) {
        let out = self.out;
        if out.json {
            let cancelled = || json!({"text": said, "finish_reason": "cancelled"});
            let answer = answer.map_or_else(cancelled, |answer| json!(answer));
            out.value(&json!({
                "turn": self.number, "question": question, "answer": answer, "turns_forgotten": dropped,
            }));
            return;
        }
        out.line("");
        let Some(answer) = answer else {
            let kept = if said.is_empty() { "the question is forgotten" } else { "what there is of it stays" };
            out.note(&format!("(the answer was ended; {kept})"));
            return;
        };
        answer_view::citations(&answer.citations, &answer.text, out);
        answer_view::notes(&answer.notes[told..], out);
        if answer.finish_reason == "length" {
            let tokens = count(answer.stats.completion_tokens, "token");
            out.note(&format!("(cut after {tokens}: see --max-tokens and --max-context)"));
        }
        if self.stats {
            out.note(&stats_line(answer, self.conversation.turns() + 1));
        }
    }
}

fn stats_line(answer: &Answer, turns: usize) -> String {
    let stats = &answer.stats;
    let speed = stats.completion_tokens as f64 / stats.decode_seconds;
    let speed = if speed.is_finite() { format!(", {speed:.1} tokens/s") } else { String::new() };
    format!(
        "({}; prompt of {}, {} of them reused; answer of {}; first token after {}{speed})",
        count(turns, "turn"),
        count(stats.prompt_tokens, "token"),
        stats.reused_tokens + stats.prefix_tokens,
        count(stats.completion_tokens, "token"),
        seconds(stats.ttft_seconds),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conversation_has_room_however_long_its_answers_may_be() {
        for limit in [64, 4096, 32_768] {
            for max_tokens in [None, Some(1), Some(limit / 2), Some(limit), Some(usize::MAX)] {
                let (alone, over) =
                    (conversation_room(limit, max_tokens, false), conversation_room(limit, max_tokens, true));
                assert!(alone >= limit / 2 && over >= limit / 4, "{limit}, {max_tokens:?}: {alone}, {over}");
                assert!(over + answer_room(limit, max_tokens) <= limit / 2 + limit / 4 + 1, "passages have a quarter");
            }
        }
        assert_eq!((conversation_room(800, None, false), conversation_room(800, Some(100), true)), (700, 350));
    }
}
