//! `quire ask` and `quire search`.

use documents::Found;
use serde_json::json;

use super::output::{Out, place, seconds};
use super::{answer_view, asking};
use service::Answer;
use service::control::{AnswerSettings, Command, Event, Retrieval};
use settings::{Config, QuireError, Result};

pub(super) fn search(config: &Config, query: &str, out: &Out) -> Result<()> {
    if documents::comparable(query).trim().is_empty() {
        let found = if query.trim().is_empty() { "only white space" } else { "only punctuation" };
        return Err(QuireError::InvalidParameter {
            param: "QUERY".into(),
            problem: format!("expected a word to look for, found {found}"),
        });
    }
    let command = Command::Search { passages: Retrieval::from_settings(&config.settings), query: query.into() };
    let mut found = false;
    asking::run(config, "search", &command, out, &mut |event| {
        if let Event::Hit(hit) = event {
            found = true;
            print_hit(&hit, out);
        }
    })?;
    if !found && !out.json {
        out.note("nothing found: no passage shares a word with the query");
    }
    Ok(())
}

fn print_hit(hit: &Found, out: &Out) {
    if out.json {
        return out.value(hit);
    }
    out.line(format!("{:7.3}  {}", hit.score, place(&hit.path, hit.line, hit.span)));
    out.line(format!("         {}", answer_view::excerpt(&hit.passage, "")));
}

pub(super) fn run(config: &Config, text: &str, compare: bool, out: &Out) -> Result<()> {
    if text.trim().is_empty() {
        return Err(QuireError::InvalidParameter {
            param: "QUESTION".into(),
            problem: "expected a question, found only white space".into(),
        });
    }
    let command = Command::Ask {
        question: text.into(),
        passages: Retrieval::from_settings(&config.settings),
        answering: AnswerSettings::from_settings(&config.settings),
        compare,
    };
    let (mut told, mut answer, mut full) = (0, None, None);
    asking::run(config, "ask", &command, out, &mut |event| match event {
        Event::Begun { notes } => {
            answer_view::notes(&notes, out);
            told = notes.len();
        }
        Event::Text(piece) if !out.json => out.text(&piece),
        Event::Answered(whole) => answer = Some(whole),
        Event::Recomputed(whole) => full = Some(whole),
        _ => {}
    })?;
    let answer = answer.ok_or_else(|| QuireError::Internal("a question ended without an answer".into()))?;
    if out.json {
        out.value(&json!({"answer": answer, "full_recompute": full}));
    } else {
        print(&answer, told, full.as_deref(), out);
    }
    Ok(())
}

/// What comes behind the text of an answer. `told`: notes that were told before it.
fn print(answer: &Answer, told: usize, full: Option<&Answer>, out: &Out) {
    out.line("");
    out.line("");
    answer_view::citations(&answer.citations, &answer.text, out);
    if out.verbose || full.is_some() {
        answer_view::stats(&answer.stats, out);
    }
    answer_view::notes(answer.notes.get(told..).unwrap_or_default(), out);
    if let Some(full) = full {
        out.line(format!(
            "  with everything computed anew: first token after {} (one run each, the second one warmer), answer \"{}\"",
            seconds(full.stats.ttft_seconds),
            full.text
        ));
    }
}
