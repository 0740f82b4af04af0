//! `quire demo`: what Quire exists for, on the example documents, in half a minute.

use std::path::{Path, PathBuf};

use ann_index::IndexKind;
use engine::{AttentionConfig, BlendConfig, BlendMode, EngineConfig, Strategy};
use serde::{Deserialize, Serialize};

use super::answer_view;
use super::ingest::{ingest, summary};
use super::output::{Out, count, grouped, seconds};
use documents::{DocumentsError, data_dir, discover};
use service::control::look;
use service::{Answer, IngestReport, Options, Purpose, Question, Service};
use settings::{QuireError, Result, Settings, find_shipped};

const COLLECTION: &str = "examples";
/// Timed rounds of each side, after one untimed round.
const ROUNDS: usize = 5;

/// A line of `questions.jsonl`; other fields are for other readers.
#[derive(Debug, Deserialize)]
struct Example {
    question: String,
    answer: String,
    #[serde(default)]
    demonstration: bool,
}

/// Times to first token of both sides, in seconds.
#[derive(Debug, Default, Serialize)]
struct Comparison {
    blended_seconds: Vec<f64>,
    full_recompute_seconds: Vec<f64>,
    blended_median_seconds: f64,
    full_recompute_median_seconds: f64,
    ratio: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    ingest: IngestReport,
    question: String,
    expected: String,
    answer: Answer,
    full_recompute: Answer,
    retrieval: Answer,
    time_to_first_token: Comparison,
}

pub(super) fn run(settings: &Settings, documents: Option<&Path>, out: &Out) -> Result<()> {
    let folder = match documents {
        Some(folder) => folder.to_path_buf(),
        None => find_shipped("examples", "examples", "questions.jsonl").map_err(|searched| {
            DocumentsError::NoDocuments { path: searched.into_iter().next().unwrap_or_default() }
        })?,
    };
    let example = demonstration(&folder)?;
    let place = Place::of(settings)?;
    let settings = &place.settings;
    if place.own.is_some() {
        out.note(
            "a running server has the data folder: the demo works in a folder of its own, which it removes at its end",
        );
    }
    let spinner = out.spinner("loading the model");
    // What is shown is what an index reads, not how soon it is ready.
    let service =
        Service::open_with(settings, Purpose::Ingest, EngineConfig { wait_for_index: true, ..settings.engine()? })?;
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    if !out.json {
        heading(&service, &folder, out);
    }
    let report = service_report(&service, settings, &folder, example, out)?;
    service.engine().shutdown();
    if out.json {
        out.value(&report);
    } else {
        print(&report, out);
    }
    Ok(())
}

/// Where the demo works.
struct Place {
    settings: Settings,
    /// A folder for as long as it runs, where a server has the data folder.
    own: Option<PathBuf>,
}

impl Place {
    fn of(settings: &Settings) -> Result<Place> {
        if look(&settings.data_dir).is_none() {
            return Ok(Place { settings: settings.clone(), own: None });
        }
        let own = std::env::temp_dir().join(format!("quire-demo-{}", std::process::id()));
        data_dir::create_private_dir(&own).map_err(|error| DocumentsError::writing(&own, error))?;
        Ok(Place { settings: Settings { data_dir: own.clone(), ..settings.clone() }, own: Some(own) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(own) = &self.own {
            // What cannot be removed lies among other temporary files.
            let _ = std::fs::remove_dir_all(own);
        }
    }
}

fn service_report(
    service: &Service,
    settings: &Settings,
    folder: &Path,
    example: Example,
    out: &Out,
) -> Result<Report> {
    let report = ingest(service, COLLECTION, &examples(folder)?, &out.without_results())?;
    report.check()?;
    if !out.json {
        out.line(format!("1. Ingest: {}", summary(&report)));
        if report.chunks_computed > 0 {
            out.line("   (run this again: every chunk will be found cached)");
        }
        out.line("");
    }
    let spinner = out.spinner("asking");
    let mut options = service.options().clone();
    options.max_tokens = options.max_tokens.or(Some(64));
    // Times and answers are compared.
    options.sampling.temperature = settings.temperature.unwrap_or(0.0);
    let asked = |options: Options| Question::new(&example.question, COLLECTION, settings.top_chunks, options);
    let blended = asked(options.clone());
    let mut recompute = options.clone();
    recompute.blend = BlendConfig { mode: BlendMode::FullRecompute, ..recompute.blend };
    let (answer, full_recompute, comparison) = compare(service, &blended, &asked(recompute))?;
    let mut retrieval = options;
    retrieval.attention = AttentionConfig {
        strategy: Strategy::Retrieval,
        sinks: 4,
        window: 64,
        k: 64,
        ef: 64,
        index: IndexKind::Clusters,
    };
    let retrieval = ask(service, &asked(retrieval))?;
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    Ok(Report {
        ingest: report,
        question: example.question,
        expected: example.answer,
        answer,
        full_recompute,
        retrieval,
        time_to_first_token: comparison,
    })
}

/// The documents of a folder, without the note to people that lies beside them.
fn examples(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = discover(&[folder.to_path_buf()]);
    if let Some((_, error)) = found.problems.pop() {
        return Err(error.into());
    }
    let mut documents = found.documents;
    documents.retain(|path| path.file_name().is_none_or(|name| name != "README.md"));
    Ok(documents)
}

fn ask(service: &Service, question: &Question) -> Result<Answer> {
    service.answer(question)?.wait(&mut |_| {})
}

/// Both sides in turn, one untimed round and then [`ROUNDS`] timed ones.
fn compare(service: &Service, blended: &Question, recompute: &Question) -> Result<(Answer, Answer, Comparison)> {
    let mut answers = (ask(service, blended)?, ask(service, recompute)?);
    let mut times = Comparison::default();
    for _ in 0..ROUNDS {
        answers = (ask(service, blended)?, ask(service, recompute)?);
        times.blended_seconds.push(answers.0.stats.ttft_seconds);
        times.full_recompute_seconds.push(answers.1.stats.ttft_seconds);
    }
    times.blended_median_seconds = median(&times.blended_seconds);
    times.full_recompute_median_seconds = median(&times.full_recompute_seconds);
    times.ratio = times.full_recompute_median_seconds / times.blended_median_seconds;
    Ok((answers.0, answers.1, times))
}

/// The middle of the values, or of the two in the middle the mean; not a number if there is none.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (length, middle) if length % 2 == 0 => (sorted[middle - 1] + sorted[middle]) / 2.0,
        (_, middle) => sorted[middle],
    }
}

fn demonstration(folder: &Path) -> Result<Example> {
    let path: PathBuf = folder.join("questions.jsonl");
    let text = std::fs::read_to_string(&path).map_err(|source| QuireError::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let mut examples = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let example: Example = serde_json::from_str(line).map_err(|e| QuireError::InvalidParameter {
            param: format!("{}:{}", path.display(), number + 1),
            problem: format!("expected an object with `question` and `answer`: {e}"),
        })?;
        examples.push(example);
    }
    let chosen = examples.iter().position(|e| e.demonstration).unwrap_or(0);
    if examples.is_empty() {
        return Err(DocumentsError::NoDocuments { path }.into());
    }
    Ok(examples.swap_remove(chosen))
}

fn heading(service: &Service, folder: &Path, out: &Out) {
    let engine = service.engine();
    out.line(format!(
        "Quire on the documents in {} (model `{}`, {}, {:?} instructions)",
        super::output::short(folder),
        service.model(),
        count(engine.threads(), "CPU thread"),
        engine.isa()
    ));
    out.line("");
}

fn print(report: &Report, out: &Out) {
    let answer = &report.answer;
    out.line(format!("2. Ask: {}", report.question));
    out.line("");
    out.line(format!("   {}", answer.text.trim()));
    out.line("");
    answer_view::citations(&answer.citations, &answer.text, out);
    for note in &answer.notes {
        out.line(format!("   note: {note}"));
    }
    if !same(&answer.text, &report.expected) {
        out.line(format!("   note: the documents say \"{}\"; this answer is wrong", report.expected));
    }
    out.line("");

    let times = &report.time_to_first_token;
    let stats = &answer.stats;
    out.line(format!("3. Time to first token, prompt of {}", count(stats.prompt_tokens, "token")));
    out.line(format!("   blended cached KV  {:>10}", seconds(times.blended_median_seconds)));
    out.line(format!(
        "   full recompute     {:>10}   {:.1} times the blended one",
        seconds(times.full_recompute_median_seconds),
        times.ratio
    ));
    out.line(format!(
        "   (medians of {ROUNDS}, measured now in turn after a warm-up, search and reading of the cache included)"
    ));
    out.line(format!(
        "   context tokens: {} reused, {} recomputed; {} of the question besides",
        grouped(stats.reused_tokens as u64),
        grouped(stats.recomputed_tokens as u64),
        stats.suffix_tokens
    ));
    if !same(&report.full_recompute.text, &answer.text) {
        out.line(format!("   with full recompute the answer is \"{}\"", report.full_recompute.text.trim()));
    }
    out.line("");
    retrieval(report, out);
}

fn retrieval(report: &Report, out: &Out) {
    let stats = &report.retrieval.stats;
    out.line("4. Decoding by retrieval: 4 sinks and a window of 64, the rest behind clusters of keys (k = 64)");
    out.line(format!("   answer: {}", report.retrieval.text.trim()));
    match (stats.scored_share, stats.attended_share) {
        (Some(scored), Some(attended)) => out.line(format!(
            "   of the cold keys, the index read {:.1} % and attention {:.1} %",
            scored * 100.0,
            attended * 100.0
        )),
        _ => out.line("   no key was cold: the prompt fits into the window"),
    }
}

fn same(a: &str, b: &str) -> bool {
    a.trim().eq_ignore_ascii_case(b.trim())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_marked_question_is_chosen_else_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(dir.path().join("questions.jsonl"), text).unwrap();
        write(
            "{\"question\":\"a\",\"answer\":\"1\"}\n\n{\"question\":\"b\",\"answer\":\"2\",\"demonstration\":true}\n",
        );
        assert_eq!(demonstration(dir.path()).unwrap().question, "b");
        write("{\"question\":\"a\",\"answer\":\"1\"}\n{\"question\":\"b\",\"answer\":\"2\"}\n");
        assert_eq!(demonstration(dir.path()).unwrap().question, "a");
        write("{\"question\":\"a\"}\n");
        let error = demonstration(dir.path()).unwrap_err().to_string();
        assert!(error.contains("questions.jsonl:1"), "{error}");
    }

    #[test]
    fn beside_a_server_the_demo_works_in_a_folder_of_its_own_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { data_dir: dir.path().into(), ..Settings::default() };
        assert_eq!(Place::of(&settings).unwrap().settings.data_dir, dir.path());
        let held = service::control::Claim::take(dir.path()).unwrap().unwrap().listen().unwrap();
        let place = Place::of(&settings).unwrap();
        let own = place.own.clone().unwrap();
        assert!(own.is_dir() && place.settings.data_dir == own);
        std::fs::write(own.join("chunk"), "x").unwrap();
        drop(place);
        assert!(!own.exists());
        drop(held);
    }
}
