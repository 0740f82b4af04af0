//! The answers of a run as a file that a later run goes on with.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Judged;
use super::config::Config;
use crate::error::{EvalError, Result};
use crate::tasks::{Context, Question};

/// Answers by question and configuration: those of an earlier run, read from the file, and the new ones, written to it at once.
/// The file's first line holds the settings that all its answers were given under; each other line is an answer.
pub(super) struct Answers {
    file: Option<(PathBuf, File)>,
    known: HashMap<(String, String), Judged>,
}

#[derive(Serialize, Deserialize)]
struct Header {
    settings: Value,
}

impl Answers {
    /// `None`: nothing is kept. A line that an interrupted run left unfinished is cut off.
    ///
    /// # Errors
    /// [`EvalError::Io`]; [`EvalError::BadLine`]; [`EvalError::OtherAnswers`] where the file's answers were given under other settings.
    pub(super) fn open(path: Option<&Path>, settings: &Value) -> Result<Answers> {
        let Some(path) = path else { return Ok(Answers { file: None, known: HashMap::new() }) };
        let mut options = OpenOptions::new();
        let mut file = options.create(true).append(true).read(true).open(path).map_err(EvalError::io("open", path))?;
        let text = std::fs::read(path).map_err(EvalError::io("read", path))?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).map_err(EvalError::io("write", path))?;
        let known = read(path, &text[..whole], settings)?;
        if whole == 0 {
            write_line(&mut file, path, &Header { settings: settings.clone() })?;
        }
        Ok(Answers { file: Some((path.to_owned(), file)), known })
    }

    /// The answer of an earlier run under the same configuration.
    pub(super) fn known(&self, key: &str, config: &Config) -> Option<&Judged> {
        let answer = self.known.get(&(key.to_owned(), config.name.clone()));
        answer.filter(|answer| answer.blend == config.blend)
    }

    /// # Errors
    /// [`EvalError::Io`].
    pub(super) fn write(&mut self, answer: &Judged) -> Result<()> {
        self.file.as_mut().map_or(Ok(()), |(path, file)| write_line(file, path, answer))
    }
}

fn read(path: &Path, text: &[u8], settings: &Value) -> Result<HashMap<(String, String), Judged>> {
    let bad = |line: usize, expected, reason: serde_json::Error| EvalError::BadLine {
        path: path.to_owned(),
        line,
        expected,
        reason: reason.to_string(),
    };
    let mut lines = text.split(|byte| *byte == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    if let Some((at, line)) = lines.next() {
        let found: Header = serde_json::from_slice(line).map_err(|e| bad(at + 1, "the settings of a run", e))?;
        if found.settings != *settings {
            let (found, wanted) = (found.settings.to_string(), settings.to_string());
            return Err(EvalError::OtherAnswers { path: path.to_owned(), found, wanted });
        }
    }
    lines
        .map(|(at, line)| {
            let answer: Judged = serde_json::from_slice(line).map_err(|e| bad(at + 1, "an answer of a run", e))?;
            Ok(((answer.key.clone(), answer.config.clone()), answer))
        })
        .collect()
}

fn write_line(file: &mut File, path: &Path, value: &impl Serialize) -> Result<()> {
    // One write, so that lines stay whole.
    let mut line = serde_json::to_vec(value).map_err(|e| EvalError::io("write", path)(std::io::Error::other(e)))?;
    line.push(b'\n');
    file.write_all(&line).map_err(EvalError::io("write", path))
}

/// Tells a question and its context from all others.
pub(super) fn key(context: &Context, question: &Question) -> String {
    let mut hasher = blake3::Hasher::new();
    let texts = context.chunks.iter().map(|chunk| &**chunk).chain([question.text.as_str(), question.task.as_str()]);
    for text in texts.chain(question.answers.iter().map(String::as_str)) {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    hasher.finalize().to_hex()[..24].to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::json;

    use super::*;
    use crate::quality::QualityOptions;
    use crate::quality::config::chosen;
    use crate::quality::tests::judged;

    fn config(name: &str) -> Config {
        let configs = vec![name.to_owned()];
        chosen(&QualityOptions { configs, ..QualityOptions::default() }).unwrap().remove(0)
    }

    /// An answer to the question of a context.
    fn answer(id: &str, config: &Config, output: &str) -> Judged {
        Judged { blend: config.blend.clone(), ..judged(id, &config.name, output, 1.0) }
    }

    #[test]
    fn answers_come_back_and_what_was_cut_off_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.jsonl");
        let settings = json!({"k": 1});
        let mut answers = Answers::open(Some(&path), &settings).unwrap();
        let (full, reuse) = (config("full"), config("reuse"));
        let (one, two) = (answer("a", &full, "x"), answer("b", &full, "y"));
        answers.write(&one).unwrap();
        answers.write(&two).unwrap();
        let text = std::fs::read(&path).unwrap();
        std::fs::write(&path, &text[..text.len() - 9]).unwrap();
        let mut again = Answers::open(Some(&path), &settings).unwrap();
        assert_eq!(again.known(&one.key, &full), Some(&one));
        assert_eq!((again.known(&two.key, &full), again.known(&one.key, &reuse)), (None, None));
        // A name that has come to mean something else.
        let other = Config { blend: config("cacheblend-7").blend, ..full.clone() };
        assert_eq!(again.known(&one.key, &other), None);
        again.write(&two).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), text);
    }

    #[test]
    fn other_settings_and_other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.jsonl");
        Answers::open(Some(&path), &json!({"k": 1})).unwrap();
        let text = Answers::open(Some(&path), &json!({"k": 2})).err().unwrap().to_string();
        assert!(text.contains("{\"k\":1}") && text.contains("{\"k\":2}") && text.contains("another file"), "{text}");
        std::fs::write(&path, "{\"id\": 3}\n").unwrap();
        assert!(matches!(Answers::open(Some(&path), &json!({})), Err(EvalError::BadLine { line: 1, .. })));
    }

    #[test]
    fn a_key_tells_contexts_questions_and_wanted_answers_apart() {
        let question = |text: &str, answer: &str| Question {
            task: "kv".into(),
            text: text.into(),
            answers: vec![answer.into()],
            index: 0,
        };
        let context = |chunks: &[&str]| Context {
            id: "same".into(),
            size: crate::tasks::Size::Tokens(1),
            chunks: chunks.iter().map(|c| (*c).into()).collect(),
            questions: Vec::new(),
        };
        let keys = [
            key(&context(&["a", "b"]), &question("q", "x")),
            key(&context(&["ab"]), &question("q", "x")),
            key(&context(&["a", "b"]), &question("r", "x")),
            key(&context(&["a", "b"]), &question("q", "y")),
        ];
        assert_eq!(keys.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
        assert_eq!(keys[0], key(&context(&["a", "b"]), &question("q", "x")));
    }
}
