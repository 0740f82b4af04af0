//! Chat templates of public models, rendered here and by Hugging Face transformers.

use std::path::PathBuf;

use engine::{ChatMessage, ChatTemplate};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{EvalError, Result};
use crate::process::Process;
use crate::progress::{Meter, Progress};
use crate::record::{Output, Record, RunInfo};
use crate::report::records_table;

/// The program itself travels with this one.
const SCRIPT: &str = include_str!("../peers/chat_templates.py");

/// What templates may call the special tokens of a model.
const TOKENS: [(&str, &str); 4] =
    [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>")];

/// Characters of both texts that are shown where they begin to differ.
const SHOWN: usize = 60;

/// What [`bench_templates`] compares.
#[derive(Debug, Clone)]
pub struct TemplateOptions {
    /// A Python interpreter that imports transformers and jinja2.
    pub python: PathBuf,
    /// Packages that carry templates, as `scripts/chat_templates.sh` brings them.
    pub packages: PathBuf,
    /// Where records go.
    pub output: Output,
}

/// A template whose texts differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TemplateDifference {
    /// The package and the file.
    pub template: String,
    /// The first of the conversations that differs, counted from 1.
    pub conversation: usize,
    /// Both texts from shortly before the place, or the refusals.
    pub ours: String,
    /// What transformers says.
    pub theirs: String,
}

/// The result of [`bench_templates`].
#[derive(Debug, Clone, Serialize)]
pub struct TemplateReport {
    /// All figures as records.
    pub records: Vec<Record>,
    /// The templates that differ, each with its first difference.
    pub differing: Vec<TemplateDifference>,
}

impl TemplateReport {
    /// As Markdown.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = records_table(&self.records);
        for difference in &self.differing {
            let TemplateDifference { template, conversation, ours, theirs } = difference;
            text += &format!(
                "\n{template}, conversation {conversation}\n    here:         {ours}\n    transformers: {theirs}\n"
            );
        }
        text
    }
}

#[derive(Deserialize)]
struct Count {
    templates: usize,
}

#[derive(Deserialize)]
struct Reference {
    name: String,
    source: String,
    rendered: Vec<Rendered>,
}

/// A text, or why there is none.
#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Rendered {
    Text(String),
    Error(String),
}

/// Renders four conversations with every template in the packages, here and by transformers' machinery: the texts must be
/// equal, or both must refuse.
///
/// # Errors
/// [`EvalError::Peer`]; [`EvalError::BadOption`] where the packages carry no template; [`EvalError::Io`] when records
/// cannot be written.
pub fn bench_templates(options: &TemplateOptions, progress: &mut dyn FnMut(&Progress)) -> Result<TemplateReport> {
    options.output.prepare()?;
    let packages = options.packages.display().to_string();
    let mut peer = Process::start(&options.python, "transformers and jinja2", SCRIPT, std::slice::from_ref(&packages))?;
    let conversations = conversations();
    let tokens: serde_json::Map<_, _> = TOKENS.iter().map(|(name, token)| (name.to_string(), json!(token))).collect();
    let count: Count = peer.ask(&json!({"conversations": conversations, "tokens": tokens}))?;
    if count.templates == 0 {
        let expected = "a folder of packages with chat templates: scripts/chat_templates.sh brings some".into();
        return Err(EvalError::BadOption { what: "the folder of packages", found: packages, expected });
    }
    let info = RunInfo::start(&options.output)
        .with_config(json!({"peer": peer.version, "conversations": conversations.len()}));
    let mut meter = Meter::new(count.templates, count.templates as f64, progress);
    let (mut differing, mut refused) = (Vec::new(), 0);
    for index in 0..count.templates {
        let mut compare = || -> Result<_> { Ok(compare(&peer.ask(&json!({"template": index}))?, &conversations)) };
        let (mut difference, both_refuse) = compare()?;
        if difference.is_some() {
            // A template may write the time.
            difference = compare()?.0;
        }
        refused += both_refuse;
        meter.advance(1, 1.0, difference.as_ref().map_or("equal".into(), |d: &TemplateDifference| d.template.clone()));
        differing.extend(difference);
    }
    let figure = |metric: &str, value: usize, samples: usize| {
        info.record("templates", "public", metric, "templates", value as f64, samples)
    };
    let records = vec![
        figure("compared", count.templates, count.templates),
        figure("differing", differing.len(), count.templates),
        Record {
            unit: "conversations".into(),
            ..figure("refused_by_both", refused, count.templates * conversations.len())
        },
    ];
    info.write(&records)?;
    Ok(TemplateReport { records, differing })
}

/// What conversations are made of in practice, and what templates treat differently: without and with a system prompt,
/// over several turns, with white space, other scripts, markup and thoughts, and such as some templates refuse.
fn conversations() -> [Vec<ChatMessage>; 4] {
    let turns = |turns: &[(&str, &str)]| turns.iter().map(|(role, text)| ChatMessage::new(*role, *text)).collect();
    [
        turns(&[("user", "Who wrote the letter?")]),
        turns(&[
            ("system", "You answer in one sentence."),
            ("user", "Who wrote the letter?"),
            ("assistant", "Ada did."),
            ("user", "When?"),
        ]),
        turns(&[
            ("user", "  Grüße, 你好 👋 \n\n"),
            ("assistant", "<think>\nhm, \"so\"\n</think>\n\nIt's <b>bold</b> & 'fine'\t.\n"),
            ("user", "a\r\nb\n  {{ x }} {% y %}\\n "),
            ("assistant", "  "),
            ("user", "ends with spaces  \n"),
        ]),
        turns(&[
            ("system", " \n"),
            ("user", "First."),
            ("user", "Second, at once."),
            ("assistant", "Yes."),
            ("assistant", "And more."),
            ("user", ""),
        ]),
    ]
}

/// The first difference of a template, and the number of conversations that both sides refuse.
fn compare(reference: &Reference, conversations: &[Vec<ChatMessage>]) -> (Option<TemplateDifference>, usize) {
    let tokens = TOKENS.iter().map(|(name, token)| (name.to_string(), token.to_string())).collect();
    let template = ChatTemplate::new(&reference.source, tokens);
    let (mut first, mut refused) = (None, 0);
    for (index, (theirs, messages)) in reference.rendered.iter().zip(conversations).enumerate() {
        let ours = match &template {
            Ok(template) => template.render(messages).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let (ours, theirs) = match (ours, theirs) {
            (Ok(ours), Rendered::Text(theirs)) if ours == *theirs => continue,
            (Err(_), Rendered::Error(_)) => {
                refused += 1;
                continue;
            }
            (Ok(ours), Rendered::Text(theirs)) => {
                let from =
                    ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b).count().saturating_sub(SHOWN / 2);
                let shown = |text: &str| format!("{:?}", text.chars().skip(from).take(SHOWN).collect::<String>());
                (shown(&ours), shown(theirs))
            }
            (Ok(ours), Rendered::Error(theirs)) => {
                (format!("{:?}", ours.chars().take(SHOWN).collect::<String>()), format!("refuses: {theirs}"))
            }
            (Err(ours), Rendered::Text(theirs)) => {
                (format!("refuses: {ours}"), format!("{:?}", theirs.chars().take(SHOWN).collect::<String>()))
            }
        };
        let difference =
            || TemplateDifference { template: reference.name.clone(), conversation: index + 1, ours, theirs };
        first.get_or_insert_with(difference);
    }
    (first, refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(source: &str, rendered: impl Fn(usize) -> Rendered) -> Reference {
        let rendered = (0..conversations().len()).map(rendered).collect();
        Reference { name: "a: b".into(), source: source.into(), rendered }
    }

    #[test]
    fn a_difference_is_shown_with_both_sides_and_refusals_count_only_on_both() {
        let compare = |reference| compare(&reference, &conversations());
        assert_eq!(
            compare(reference("{{ messages|length }}", |i| Rendered::Text([1, 4, 5, 6][i].to_string()))),
            (None, 0)
        );
        let (found, _) = compare(reference("x", |i| Rendered::Text(if i == 2 { "y" } else { "x" }.into())));
        let expected = TemplateDifference {
            template: "a: b".into(),
            conversation: 3,
            ours: "\"x\"".into(),
            theirs: "\"y\"".into(),
        };
        assert_eq!(found, Some(expected));
        assert_eq!(compare(reference("{% nonsense %}", |_| Rendered::Error("no".into()))), (None, 4));
        let (found, refused) = compare(reference("x", |_| Rendered::Error("no".into())));
        assert_eq!((found.map(|d| d.theirs), refused), (Some("refuses: no".into()), 0));
    }
}
