//! `quire chat`: a conversation on the terminal, or one turn a line from a pipe.

mod input;
mod lines;

use std::io::IsTerminal;
use std::sync::Arc;

use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::answer_view;
use super::args::ChatArgs;
use super::asking::{self, Aside};
use super::output::{Out, count, seconds};
use input::{Entry, Grammar};
use lines::{Lines, Typed};
use service::control::{AnswerSettings, Cancel, Command, Event, Link, Need, Retrieval};
use service::{Answer, Conversation};
use settings::{Config, QuireError, Result};

const HELP: &str = "\
/help            this text
/clear           forget everything that was said
/system TEXT     set the instruction in front of everything; without TEXT: remove it
/exit            end, as Ctrl-D does
A line that ends with \\ goes on in the next one; \"\"\" begins and ends a text of several lines.
Ctrl-C ends an answer; what there is of it stays in the conversation.";

/// Converses until the input ends. `documents`: each turn is answered over the collection.
pub(super) fn run(config: &Config, args: &ChatArgs, documents: bool, out: &Out) -> Result<()> {
    let need = if documents { Need::Answers } else { Need::Model };
    let link = Arc::new(asking::open(config, "chat", need, out)?);
    let conversation = Conversation::new(args.system.clone());
    let check = Command::CheckConversation { conversation: conversation.clone(), over_documents: documents };
    asking::hear(&link, &check, out, &mut |_| {})?;
    let failed = |source| QuireError::Io { action: "start the runtime for", path: "the conversation".into(), source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let interactive = std::io::stdin().is_terminal();
    let lines = match interactive {
        true => Lines::edited((!args.no_history).then(settings::chat_history))?,
        false => Lines::piped(),
    };
    let result = runtime.block_on(async {
        let chat = Chat {
            link: Arc::clone(&link),
            passages: documents.then(|| Retrieval::from_settings(&config.settings)),
            answering: AnswerSettings::from_settings(&config.settings),
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
    link.close();
    result
}

struct Chat<'a> {
    link: Arc<Link>,
    /// Over which passages turns are answered; `None`: over none.
    passages: Option<Retrieval>,
    answering: AnswerSettings,
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
                Err(error) if self.interactive => self.out.error(&error.full_message(), error.exit_code()),
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
                let (conversation, over_documents) = (changed.clone(), self.passages.is_some());
                let check = Command::CheckConversation { conversation, over_documents };
                ended(start(&self.link, check, Cancel::never()).1).await?;
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
        let command = Command::Turn {
            conversation: self.conversation.clone(),
            question: text.clone(),
            passages: self.passages.clone(),
            answering: self.answering.clone(),
        };
        let (canceller, cancel) = Cancel::new();
        let (mut events, work) = start(&self.link, command, cancel);
        let (mut turn, mut aside) = (Turn::default(), Aside::new(self.out));
        let complete = loop {
            tokio::select! {
                biased;
                _ = self.interrupt.recv() => break false,
                event = events.recv() => match event {
                    Some(event) => aside.hear(event).into_iter().for_each(|event| self.hear(event, &mut turn)),
                    None => break true,
                }
            }
            if self.out.is_closed() {
                break false;
            }
        };
        aside.clear();
        // Gives up what is still being computed.
        canceller.cancel();
        drop(events);
        match ended(work).await {
            Err(error) if complete => return Err(error),
            _ => {}
        }
        self.number += 1;
        self.report(&text, &turn);
        // An answer that was ended before it began would be an empty one.
        if turn.answer.is_some() || !turn.said.is_empty() {
            self.conversation.add(text, turn.said);
        }
        Ok(())
    }

    fn hear(&mut self, event: Event, turn: &mut Turn) {
        match event {
            Event::Forgotten(dropped) => {
                turn.dropped = dropped;
                self.conversation.forget(dropped);
                let turns = count(dropped, "turn");
                self.out.note(&format!("(the context is full: the oldest {turns} of the conversation were forgotten)"));
            }
            Event::Begun { notes } => {
                turn.told = notes.len();
                if !self.out.json {
                    answer_view::notes(&notes, self.out);
                }
            }
            Event::Text(piece) => {
                if !self.out.json {
                    self.out.text(&piece);
                }
                turn.said.push_str(&piece);
            }
            Event::Answered(answer) => turn.answer = Some(answer),
            _ => {}
        }
    }

    fn report(&self, question: &str, turn: &Turn) {
        let (out, answer, said) = (self.out, turn.answer.as_deref(), turn.said.as_str());
        if out.json {
            let cancelled = || json!({"text": said, "finish_reason": "cancelled"});
            let answer = answer.map_or_else(cancelled, |answer| json!(answer));
            out.value(&json!({
                "turn": self.number, "question": question, "answer": answer, "turns_forgotten": turn.dropped,
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
        answer_view::notes(answer.notes.get(turn.told..).unwrap_or_default(), out);
        if answer.finish_reason == "length" {
            let tokens = count(answer.stats.completion_tokens, "token");
            out.note(&format!("(cut after {tokens}: see --max-tokens and --max-context)"));
        }
        if self.stats {
            out.note(&stats_line(answer, self.conversation.turns() + 1));
        }
    }
}

/// What is known of a turn.
#[derive(Default)]
struct Turn {
    /// Its answer so far.
    said: String,
    /// Its complete answer.
    answer: Option<Box<Answer>>,
    /// Earlier turns that were forgotten for it.
    dropped: usize,
    /// Notes that were told before the answer.
    told: usize,
}

/// Events that wait to be printed.
const EVENTS: usize = 64;

/// Has a command executed beside whoever types.
fn start(link: &Arc<Link>, command: Command, cancel: Cancel) -> (mpsc::Receiver<Event>, JoinHandle<Result<()>>) {
    let (sender, events) = mpsc::channel(EVENTS);
    let link = Arc::clone(link);
    let work = tokio::task::spawn_blocking(move || {
        link.run(&command, &cancel, &mut |event| {
            // Nobody listens once the turn is given up.
            let _ = sender.blocking_send(event);
        })
    });
    (events, work)
}

/// The end of a command.
async fn ended(work: JoinHandle<Result<()>>) -> Result<()> {
    work.await.map_err(|e| QuireError::Internal(format!("a turn panicked: {e}")))?
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
