//! Answers: to a question, or to the next turn of a conversation.

use engine::{BlendConfig, BlendMode, ChatMessage, EngineError};

use super::super::cancel::Cancel;
use super::super::command::{AnswerSettings, Retrieval};
use super::super::event::Event;
use super::super::host::Host;
use crate::{Answer, Answering, Conversation, Passages, Piece, Question, Search, generate};
use settings::{QuireError, Result};

pub(super) fn ask(
    host: &Host,
    text: &str,
    passages: &Retrieval,
    (answering, compare): (&AnswerSettings, bool),
    cancel: &Cancel,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let service = host.service()?;
    let options = answering.options(host.settings())?;
    let wanted = || !cancel.is_cancelled();
    let mut question = Question::new(text, &passages.collection, passages.top_chunks, options);
    let answer = follow(service.answer_while(&question, &wanted)?, cancel, on_event)?;
    on_event(Event::Answered(Box::new(answer)));
    if compare {
        question.options.blend = BlendConfig { mode: BlendMode::FullRecompute, ..question.options.blend };
        let answer = follow(service.answer_while(&question, &wanted)?, cancel, &mut |_| {})?;
        on_event(Event::Recomputed(Box::new(answer)));
    }
    Ok(())
}

/// `passages`: over which the turn is answered, if over any.
pub(super) fn turn(
    host: &Host,
    mut conversation: Conversation,
    text: &str,
    (passages, answering): (Option<&Retrieval>, &AnswerSettings),
    cancel: &Cancel,
    on_event: &mut dyn FnMut(Event),
) -> Result<()> {
    let options = answering.options(host.settings())?;
    let room = conversation_room(host.model()?.0.max_context(), options.max_tokens, passages.is_some());
    let length = |messages: &[ChatMessage]| tokens(host, messages, passages.is_some());
    let forgotten = conversation.make_room(text, room, &length)?;
    if forgotten > 0 {
        on_event(Event::Forgotten(forgotten));
    }
    let messages = conversation.messages(text);
    let answering = match passages {
        None => {
            let (engine, metrics) = host.model()?;
            generate(engine, metrics, &messages, &options)?
        }
        Some(Retrieval { collection, top_chunks }) => {
            let (collection, query, top_chunks) = (collection.clone(), text.into(), *top_chunks);
            let passages = Passages::Search(Search { collection, query, top_chunks, score_threshold: 0.0 });
            let question = Question { messages, passages, options };
            host.service()?.answer_while(&question, &|| !cancel.is_cancelled())?
        }
    };
    let answer = follow(answering, cancel, on_event)?;
    on_event(Event::Answered(Box::new(answer)));
    Ok(())
}

/// The length of a prompt, without passages.
pub(super) fn tokens(host: &Host, messages: &[ChatMessage], over_documents: bool) -> Result<usize> {
    let engine = host.model()?.0;
    if !over_documents {
        return Ok(engine.chat().render(engine.tokenizer(), messages)?.len());
    }
    let prompt = engine.chat().render_with_context(engine.tokenizer(), messages)?;
    Ok(prompt.prefix.len() + prompt.suffix.len())
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

/// Tells of an answer while it is made. Giving it up cancels the work at once.
fn follow(mut answering: Answering, cancel: &Cancel, on_event: &mut dyn FnMut(Event)) -> Result<Answer> {
    on_event(Event::Begun { notes: answering.notes().to_vec() });
    let failed = |e| QuireError::Internal(format!("an answer cannot be waited for: {e}"));
    let waiting = tokio::runtime::Builder::new_current_thread().build().map_err(failed)?;
    loop {
        let piece = waiting.block_on(async {
            tokio::select! {
                biased;
                () = cancel.cancelled() => Some(Err(EngineError::Cancelled.into())),
                piece = answering.next() => piece,
            }
        });
        match piece {
            Some(Ok(Piece::Text(text))) => on_event(Event::Text(text)),
            Some(Ok(Piece::Done(answer))) => return Ok(*answer),
            Some(Err(error)) => return Err(error),
            None => return Err(QuireError::Internal("the engine ended an answer without saying so".into())),
        }
    }
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
