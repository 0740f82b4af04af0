//! What of a rendered prompt came from outside, and where retrieved context goes.
//!
//! A conversation is rendered as it is, and once more with the first character of each literal of a control token in it
//! replaced: where nothing else tells the two texts apart, that shows where these literals went. A template may look
//! for some of them (`</think>` and the like) and then says something else; it gets them readable, between marks. In
//! the end, what came from outside stands between marks and is plain text, and the rest is the template's or harmless.
//! Marks are characters that neither the messages nor the template contain, chosen at random for each prompt.

use super::{ChatMessage, ChatTemplate};
use crate::error::{EngineError, Result};
use crate::tokenizer::{Part, Tokenizer};

/// A private use plane of Unicode: characters without a meaning.
const PRIVATE: std::ops::RangeInclusive<u32> = 0xF_0000..=0xF_FFFD;

pub(super) struct Marks<'a> {
    tokenizer: &'a Tokenizer,
    open: char,
    close: char,
    hole: char,
}

/// A prompt in parts, before and behind the retrieved context.
pub(super) struct Split<'a> {
    pub(super) before: Vec<Part<'a>>,
    pub(super) after: Option<Vec<Part<'a>>>,
}

impl<'a> Marks<'a> {
    /// Marks for a prompt of these messages.
    ///
    /// # Errors
    /// [`EngineError::InvalidRequest`] without messages, and for roles that are no words: templates write them between
    /// the brackets of their control tokens.
    pub(super) fn choose(tokenizer: &'a Tokenizer, template: &ChatTemplate, messages: &[ChatMessage]) -> Result<Self> {
        if messages.is_empty() {
            return Err(EngineError::InvalidRequest("expected at least one message, found none".into()));
        }
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        if let Some(message) = messages.iter().find(|m| m.role.is_empty() || !m.role.chars().all(is_word)) {
            let role: String = message.role.chars().take(40).collect();
            return Err(EngineError::InvalidRequest(format!(
                "expected roles of letters, digits, `_` and `-`, found the role {role:?}"
            )));
        }
        let taken = |c: char| {
            let (plain, escaped) = (c.to_string(), escaped(c));
            let contents = messages.iter().map(|m| m.content.as_str());
            contents.chain([template.literals()]).any(|text| text.contains(&plain) || text.contains(&escaped))
        };
        let mut chosen = Vec::with_capacity(3);
        while chosen.len() < 3 {
            let candidate = char::from_u32(rand::random_range(PRIVATE)).filter(|c| !chosen.contains(c) && !taken(*c));
            chosen.extend(candidate);
        }
        Ok(Marks { tokenizer, open: chosen[0], close: chosen[1], hole: chosen[2] })
    }

    /// The mark of the place for the context.
    pub(super) fn hole(&self) -> String {
        self.hole.to_string()
    }

    /// The text of a conversation, with marks around what came from outside and must not act.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub(super) fn render(&self, template: &ChatTemplate, messages: &[ChatMessage]) -> Result<String> {
        let plain = template.render(messages)?;
        if messages.iter().all(|m| self.tokenizer.find_control(&m.content).is_none()) {
            return Ok(plain);
        }
        let (open, close) = (self.open, self.close);
        let hidden = self.rendered(template, messages, |literal| {
            let rest = literal.chars().next().map_or("", |first| &literal[first.len_utf8()..]);
            format!("{open}{rest}")
        });
        if let Some(marked) = hidden.ok().and_then(|hidden| self.places(&hidden, &plain)) {
            return Ok(marked);
        }
        let marked = self.rendered(template, messages, |literal| format!("{open}{literal}{close}"))?;
        Ok(self.align(&marked, &plain).unwrap_or(marked))
    }

    /// Renders with `instead` of every literal of a control token.
    fn rendered(
        &self,
        template: &ChatTemplate,
        messages: &[ChatMessage],
        instead: impl Fn(&str) -> String,
    ) -> Result<String> {
        let replaced = |content: &str| {
            let (mut text, mut rest) = (String::new(), content);
            while let Some(found) = self.tokenizer.find_control(rest) {
                text.push_str(&rest[..found.start]);
                text.push_str(&instead(&rest[found.clone()]));
                rest = &rest[found.end..];
            }
            text + rest
        };
        let messages: Vec<ChatMessage> =
            messages.iter().map(|m| ChatMessage::new(m.role.clone(), replaced(&m.content))).collect();
        let text = template.render(&messages)?;
        // JSON may have been told to write ASCII.
        let unescaped = |text: String, mark: char| match text.contains(&escaped(mark)) {
            true => text.replace(&escaped(mark), mark.encode_utf8(&mut [0; 4])),
            false => text,
        };
        Ok(unescaped(unescaped(text, self.open), self.close))
    }

    /// `plain` with marks around the literals whose first character `hidden` lacks; `None` where that is not all that tells
    /// the two apart.
    fn places(&self, hidden: &str, plain: &str) -> Option<String> {
        let (mut marked, mut done) = (String::with_capacity(plain.len()), 0);
        let mut chars = plain.char_indices();
        for hidden in hidden.chars() {
            let (at, c) = chars.next()?;
            if hidden == self.open {
                let literal = self.tokenizer.find_control(&plain[at..]).filter(|found| found.start == 0);
                // One that was cut is none, and one that began within another was marked with it.
                if let Some(found) = literal.filter(|_| at >= done) {
                    marked.push_str(&plain[done..at]);
                    marked.push(self.open);
                    marked.push_str(&plain[at..at + found.end]);
                    marked.push(self.close);
                    done = at + found.end;
                }
            } else if hidden != c {
                return None;
            }
        }
        marked.push_str(&plain[done..]);
        chars.next().is_none().then_some(marked)
    }

    /// `marked` without white space that only the marks kept from being stripped, so that the text is `plain`'s; `None`
    /// where the marks made the template say something else.
    fn align(&self, marked: &str, plain: &str) -> Option<String> {
        let mut aligned = String::with_capacity(marked.len());
        let mut plain = plain.chars().peekable();
        for c in marked.chars() {
            if c == self.open || c == self.close || plain.next_if_eq(&c).is_some() {
                aligned.push(c);
            } else if !c.is_whitespace() {
                return None;
            }
        }
        plain.next().is_none().then_some(aligned)
    }

    /// Splits a rendered text at the marks.
    ///
    /// # Errors
    /// [`EngineError::ChatTemplate`] where the context stands in it more than once.
    pub(super) fn split<'t>(&self, text: &'t str) -> Result<Split<'t>> {
        let mut split = Split { before: Vec::new(), after: None };
        let mut rest = text;
        while let Some(at) = rest.find([self.open, self.close, self.hole]) {
            let parts = split.after.as_mut().unwrap_or(&mut split.before);
            let (before, behind) = rest.split_at(at);
            let mark = behind.chars().next().unwrap_or(self.hole);
            rest = &behind[mark.len_utf8()..];
            parts.push(Part::Trusted(before));
            // A template may cut texts anywhere: the mark behind a literal need not be there, and single marks say nothing.
            if mark == self.open
                && let Some(found) = self.tokenizer.find_control(rest).filter(|found| found.start == 0)
            {
                parts.push(Part::Plain(&rest[..found.end]));
                rest = rest[found.end..].strip_prefix(self.close).unwrap_or(&rest[found.end..]);
            }
            if mark == self.hole && split.after.replace(Vec::new()).is_some() {
                return Err(EngineError::ChatTemplate(
                    "it shows the retrieved context twice: expected each content once. Use another template".into(),
                ));
            }
        }
        split.after.as_mut().unwrap_or(&mut split.before).push(Part::Trusted(rest));
        Ok(split)
    }
}

/// The character as JSON writes it in ASCII.
fn escaped(c: char) -> String {
    c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
}
