//! What the context holds: whether a conversation fits, and how much of it passages and answer get.

use engine::{ChatMessage, Engine, EngineError};

use settings::Result;

/// Bytes of a text whose tokens are counted at a time.
const PIECE: usize = 16 << 10;
/// Tokens that a cut through a text may add to it, at most.
const CUT: usize = 8;
/// Tokens of an answer that passages never take, unless fewer were asked for or the context is small.
const ANSWER: usize = 1024;

/// Refuses messages that are too long for the context by far, before they are rendered: a text of many megabytes costs
/// no more than one that fills the context. Others are measured exactly once they are rendered.
///
/// # Errors
/// [`EngineError::TextTooLong`] where the bytes say so, [`EngineError::ContextLimit`] with the tokens that were counted until it was clear, [`EngineError::Cancelled`] once
/// `wanted` says no.
pub(super) fn refuse_overlong(engine: &Engine, messages: &[ChatMessage], wanted: &dyn Fn() -> bool) -> Result<()> {
    engine.check_texts(messages)?;
    let limit = engine.max_context();
    let bytes: usize = messages.iter().map(|message| message.content.len()).sum();
    // About twice what fits: counting that exactly costs little.
    if bytes <= limit.saturating_mul(8) {
        return Ok(());
    }
    let mut tokens = 0;
    for piece in messages.iter().flat_map(|message| pieces(&message.content)) {
        if !wanted() {
            return Err(EngineError::Cancelled.into());
        }
        tokens += engine.tokenizer().encode_plain(piece)?.len().saturating_sub(CUT);
        if tokens > limit {
            return Err(EngineError::ContextLimit { tokens, limit }.into());
        }
    }
    Ok(())
}

/// Cuts a text where a space begins, else between two characters.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let mut end = rest.len().min(PIECE);
        while !rest.is_char_boundary(end) {
            end -= 1;
        }
        if end < rest.len() {
            end = rest[..end].rfind(' ').filter(|at| *at > 0).unwrap_or(end);
        }
        let (piece, behind) = rest.split_at(end);
        rest = behind;
        Some(piece)
    })
}

/// How the context is shared, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Room {
    /// What instructions and question leave.
    free: usize,
    /// What passages may have of it.
    pub(super) passages: usize,
}

impl Room {
    /// Shares what `fixed` tokens of instructions and question leave of a context of `limit` tokens. Passages come first:
    /// a long answer that was asked for gets what they leave. For the answer stay the tokens that were asked for, but at
    /// most 1,024 and at most a quarter of the room, and at least one.
    ///
    /// # Errors
    /// [`EngineError::ContextLimit`] if not one token of an answer fits.
    pub(super) fn share(limit: usize, fixed: usize, max_tokens: Option<usize>) -> Result<Room> {
        let free = limit.saturating_sub(fixed);
        if free == 0 {
            return Err(EngineError::ContextLimit { tokens: fixed, limit }.into());
        }
        let answer = max_tokens.unwrap_or(ANSWER).min(ANSWER).min(free / 4).max(1);
        Ok(Room { free, passages: free - answer })
    }

    /// What to say of an answer that was asked for with `max_tokens` behind passages of so many tokens, if it does not fit whole.
    pub(super) fn clip(&self, passages: usize, max_tokens: Option<usize>) -> Option<String> {
        let left = self.free.saturating_sub(passages);
        max_tokens.filter(|most| *most > left).map(|max_tokens| {
            format!("the answer can have {left} tokens at most instead of {max_tokens}: more does not fit the context")
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn passages_come_first_and_the_answer_gets_what_they_leave() {
        for max_tokens in [256, 8_000, 32_500, 32_740, 32_768, 100_000, usize::MAX] {
            let room = Room::share(32_768, 100, Some(max_tokens)).unwrap();
            assert_eq!(room.passages, 32_668 - max_tokens.min(1_024), "{max_tokens}");
        }
        let open = Room::share(32_768, 100, None).unwrap();
        assert_eq!((open.passages, open.clip(2_000, None)), (32_668 - 1_024, None));
        let room = Room::share(32_768, 100, Some(32_740)).unwrap();
        assert_eq!(room.clip(2_000, Some(30_668)), None);
        let note = room.clip(2_000, Some(32_740)).unwrap();
        assert!(note.contains("30668") && note.contains("32740"), "{note}");
    }

    #[test]
    fn a_small_context_is_shared_and_one_token_of_the_answer_is_enough() {
        assert_eq!(Room::share(1_000, 200, Some(5_000)).unwrap(), Room { free: 800, passages: 600 });
        assert_eq!(Room::share(1_000, 200, Some(100)).unwrap().passages, 700);
        assert_eq!(Room::share(1_000, 999, Some(5_000)).unwrap(), Room { free: 1, passages: 0 });
        let error = Room::share(1_000, 1_000, Some(1)).unwrap_err().to_string();
        assert!(error.contains("prompt of 1000 tokens"), "{error}");
    }

    #[test]
    fn pieces_make_up_the_text_and_begin_at_spaces() {
        let words = "wörter ".repeat(10_000);
        let cut: Vec<&str> = pieces(&words).collect();
        assert_eq!(cut.concat(), words);
        assert!(cut.len() > 3 && cut[1..].iter().all(|piece| piece.starts_with(' ') && piece.len() <= PIECE));
        let one = "é".repeat(PIECE);
        assert_eq!(pieces(&one).collect::<Vec<_>>().concat(), one);
        assert_eq!(pieces("").count(), 0);
    }
}
