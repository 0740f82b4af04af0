//! `quire ask` and `quire search`.

use engine::{BlendConfig, BlendMode};
use serde_json::json;

use super::answer_view;
use super::output::{Out, place, seconds};
use crate::config::Settings;
use crate::error::{QuireError, Result};
use crate::service::{Purpose, Question, Service};
use documents::Library;
use documents::data_dir;

pub(super) fn search(settings: &Settings, query: &str, out: &Out) -> Result<()> {
    data_dir::check(&settings.data_dir)?;
    let library = Library::new(&settings.data_dir);
    let found = library.search(&settings.collection, query, settings.top_chunks)?;
    for hit in &found {
        if out.json {
            out.value(hit);
        } else {
            out.line(format!("{:7.3}  {}", hit.score, place(&hit.path, hit.line, hit.span)));
            out.line(format!("         {}", answer_view::excerpt(&hit.passage, "")));
        }
    }
    if found.is_empty() && !out.json {
        out.note("nothing found: no passage shares a word with the query");
    }
    Ok(())
}

pub(super) fn run(settings: &Settings, text: &str, compare: bool, out: &Out) -> Result<()> {
    if text.trim().is_empty() {
        return Err(QuireError::InvalidParameter {
            param: "QUESTION".into(),
            problem: "expected a question, found only white space".into(),
        });
    }
    let spinner = out.spinner("loading the model");
    // Before the model is loaded: a missing collection is the commoner mistake.
    data_dir::check(&settings.data_dir)?;
    Library::new(&settings.data_dir).collection(&settings.collection)?;
    let service = Service::open(settings, Purpose::Ask)?;
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    let question = Question::new(text, &settings.collection, settings.top_chunks, service.options().clone());
    let answering = service.answer(&question)?;
    let told = answering.notes().len();
    answer_view::notes(answering.notes(), out);
    let answer = answering.wait(&mut |piece| {
        if !out.json {
            out.text(piece);
        }
    })?;
    let full = if compare {
        let mut question = question.clone();
        question.options.blend = BlendConfig { mode: BlendMode::FullRecompute, ..question.options.blend };
        Some(service.answer(&question)?.wait(&mut |_| {})?)
    } else {
        None
    };
    service.engine().shutdown();
    if out.json {
        out.value(&json!({"answer": answer, "full_recompute": full}));
        return Ok(());
    }
    out.line("");
    out.line("");
    answer_view::citations(&answer.citations, &answer.text, out);
    if out.verbose || compare {
        answer_view::stats(&answer.stats, out);
    }
    answer_view::notes(&answer.notes[told..], out);
    if let Some(full) = full {
        out.line(format!(
            "  with everything computed anew: first token after {} (one run each, the second one warmer), answer \"{}\"",
            seconds(full.stats.ttft_seconds),
            full.text
        ));
    }
    Ok(())
}
