//! What was said in a conversation, as far as the context holds it.

use engine::{ChatMessage, EngineError};
use serde::{Deserialize, Serialize};

use settings::Result;

/// A question with its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Turn {
    question: String,
    answer: String,
}

/// A conversation: an instruction that stays, and turns, of which the oldest make way.
///
/// The prompt of a turn begins with the prompt of the turn before, until turns make way: state that the engine keeps of
/// prompts it has read serves the whole conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<Turn>,
}

impl Conversation {
    /// One in which nothing was said. `system`: the instruction in front of everything.
    #[must_use]
    pub fn new(system: Option<String>) -> Conversation {
        Conversation { system, turns: Vec::new() }
    }

    /// The same turns behind another instruction.
    #[must_use]
    pub fn with_system(&self, system: Option<String>) -> Conversation {
        Conversation { system, turns: self.turns.clone() }
    }

    /// Forgets all turns; the instruction stays.
    pub fn clear(&mut self) {
        self.turns.clear();
    }

    /// Forgets the oldest turns, so many.
    pub fn forget(&mut self, turns: usize) {
        self.turns.drain(..turns.min(self.turns.len()));
    }

    /// Turns that are remembered.
    #[must_use]
    pub fn turns(&self) -> usize {
        self.turns.len()
    }

    /// The conversation with a question at its end.
    #[must_use]
    pub fn messages(&self, question: &str) -> Vec<ChatMessage> {
        self.messages_from(0, question)
    }

    fn messages_from(&self, first: usize, question: &str) -> Vec<ChatMessage> {
        let system = self.system.iter().map(|text| ChatMessage::new("system", text));
        let turns = self.turns[first..]
            .iter()
            .flat_map(|turn| [ChatMessage::new("user", &turn.question), ChatMessage::new("assistant", &turn.answer)]);
        system.chain(turns).chain([ChatMessage::new("user", question)]).collect()
    }

    /// Remembers a turn.
    pub fn add(&mut self, question: String, answer: String) {
        self.turns.push(Turn { question, answer });
    }

    /// Forgets the oldest turns if the prompt of `question` exceeds `room` tokens, and says how many. Then it forgets
    /// enough for a quarter of the room to be free: else every further turn would change where the prompt begins, and
    /// nothing read before could serve it. `tokens`: the length of a prompt.
    ///
    /// # Errors
    /// [`EngineError::ContextLimit`] for a question that does not fit alone, with nothing forgotten; what `tokens`
    /// fails with.
    pub fn make_room(
        &mut self,
        question: &str,
        room: usize,
        tokens: &dyn Fn(&[ChatMessage]) -> Result<usize>,
    ) -> Result<usize> {
        let needed = |first| tokens(&self.messages_from(first, question));
        if needed(0)? <= room {
            return Ok(0);
        }
        let alone = needed(self.turns.len())?;
        if alone > room {
            return Err(EngineError::ContextLimit { tokens: alone, limit: room }.into());
        }
        let mut dropped = 1;
        while dropped < self.turns.len() && needed(dropped)? > room - room / 4 {
            dropped += 1;
        }
        self.forget(dropped);
        Ok(dropped)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A token a character.
    fn length(messages: &[ChatMessage]) -> Result<usize> {
        Ok(messages.iter().map(|m| m.content.len()).sum())
    }

    fn said(turns: usize) -> Conversation {
        let mut conversation = Conversation::new(Some("be".into()));
        (0..turns).for_each(|i| conversation.add(format!("q{i}345"), format!("a{i}345")));
        conversation
    }

    fn texts(conversation: &Conversation, question: &str) -> Vec<String> {
        conversation.messages(question).iter().map(|m| format!("{}:{}", m.role, m.content)).collect()
    }

    #[test]
    fn messages_are_in_order_and_each_prompt_begins_with_the_last_one() {
        let mut conversation = said(1);
        let before = texts(&conversation, "now");
        assert_eq!(before, ["system:be", "user:q0345", "assistant:a0345", "user:now"]);
        conversation.add("now".into(), "yes".into());
        let after = texts(&conversation, "then");
        assert_eq!(after[..before.len()], before[..]);
        assert_eq!(texts(&conversation.with_system(None), "x")[0], "user:q0345");
        conversation.clear();
        assert_eq!(texts(&conversation, "x"), ["system:be", "user:x"]);
    }

    #[test]
    fn the_oldest_turns_make_way_and_leave_a_quarter_free() {
        let mut conversation = said(10);
        // 2 + 10 * 10 + 8 characters.
        assert_eq!(conversation.make_room("question", 110, &length).unwrap(), 0);
        assert_eq!(conversation.make_room("question", 100, &length).unwrap(), 4);
        assert_eq!(length(&conversation.messages("question")).unwrap(), 70);
        assert_eq!(texts(&conversation, "x")[1], "user:q4345");
        // The rest may go as well, the instruction stays.
        assert_eq!(conversation.make_room(&"x".repeat(90), 95, &length).unwrap(), 6);
        assert_eq!(conversation.turns(), 0);
        assert_eq!(texts(&conversation, "x"), ["system:be", "user:x"]);
    }

    #[test]
    fn a_question_that_does_not_fit_alone_costs_no_turn() {
        let mut conversation = said(3);
        let error = conversation.make_room(&"x".repeat(50), 51, &length).unwrap_err();
        assert!(error.to_string().contains("52") && error.to_string().contains("51"), "{error}");
        assert_eq!(conversation, said(3));
        assert!(Conversation::default().make_room("xx", 1, &length).is_err());
    }

    proptest::proptest! {
        #[test]
        fn as_few_turns_as_it_takes_make_way(
            sizes in proptest::collection::vec((0usize..30, 0usize..30), 0..12), question in 0usize..60, room in 0usize..400,
        ) {
            let mut conversation = Conversation::new(Some("be".into()));
            for (question, answer) in &sizes {
                conversation.add("q".repeat(*question), "a".repeat(*answer));
            }
            let asked = "x".repeat(question);
            // Characters of the prompt without the first so many turns.
            let left = |dropped: usize| 2 + question + sizes[dropped..].iter().map(|(q, a)| q + a).sum::<usize>();
            let dropped = match conversation.make_room(&asked, room, &length) {
                Ok(dropped) => dropped,
                Err(_) => {
                    assert!(left(sizes.len()) > room && conversation.turns() == sizes.len());
                    return Ok(());
                }
            };
            assert_eq!(conversation.turns(), sizes.len() - dropped);
            assert_eq!(length(&conversation.messages(&asked)).unwrap(), left(dropped));
            assert!(left(dropped) <= room);
            if dropped > 0 {
                let enough = |dropped: usize| left(dropped) <= room - room / 4;
                assert!(left(0) > room, "there was room");
                assert!(enough(dropped) || dropped == sizes.len(), "no quarter is free");
                assert!(dropped == 1 || !enough(dropped - 1), "one fewer would have been enough");
            }
        }
    }
}
