//! Records of measured figures: one JSON object a line, one file a bench, never rewritten.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{EvalError, Result};

/// One measured figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Which bench wrote it: `decode`, `quality`, ...; also the name of the file.
    pub bench: String,
    /// What was measured, as a path: `ref/8k/cpu/full`.
    pub case: String,
    /// Which figure of the case.
    pub metric: String,
    /// Its unit: `ms`, `tokens/s`, `GB/s`, `%`, `ratio`, ...
    pub unit: String,
    /// The figure; the median where several samples were taken.
    pub value: f64,
    /// How many samples it rests on.
    pub samples: usize,
    /// The least (or most) possible value, in the record's unit, where one is known.
    #[serde(default)]
    pub floor: Option<f64>,
    /// The same figure of other programs, measured in the same run.
    #[serde(default)]
    pub peers: BTreeMap<String, f64>,
    /// What to type to measure it again.
    pub command: String,
    /// The commit that was measured; `+changes` behind it when files differed from it.
    pub commit: String,
    /// `cpu2` for two cores, otherwise a description.
    pub machine: String,
    /// UTC, ISO 8601.
    pub date: String,
    /// The invocation it comes from: records with the same `run` belong together.
    pub run: String,
    /// What was set: sizes, threads, seeds, versions.
    #[serde(default)]
    pub config: Value,
}

impl Record {
    /// What a later record must share to supersede this one.
    fn identity(&self) -> (&str, &str, &str, &str) {
        (&self.bench, &self.case, &self.metric, &self.machine)
    }
}

/// Where records go, and what they say of their origin.
#[derive(Debug, Clone)]
pub struct Output {
    /// The folder of the records; `None`: write none.
    pub results_dir: Option<PathBuf>,
    /// What the user typed.
    pub command: String,
    /// `None`: `cpu2` with two cores, otherwise a description.
    pub machine: Option<String>,
    /// `None`: git is asked; `unknown` where it does not answer.
    pub commit: Option<String>,
}

impl Default for Output {
    fn default() -> Self {
        Output { results_dir: Some(default_results_dir()), command: String::new(), machine: None, commit: None }
    }
}

/// `eval/results` under the repository that the current folder lies in; `results` in the current folder elsewhere.
#[must_use]
pub fn default_results_dir() -> PathBuf {
    let here = std::env::current_dir().unwrap_or_default();
    here.ancestors()
        .map(|folder| folder.join("eval").join("results"))
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| here.join("results"))
}

/// One invocation: what all its records share.
#[derive(Debug, Clone)]
pub struct RunInfo {
    command: String,
    commit: String,
    machine: String,
    date: String,
    run: String,
    config: Value,
    log: Option<RecordLog>,
}

impl RunInfo {
    /// Begins an invocation: takes the time, the machine and the commit.
    #[must_use]
    pub fn start(output: &Output) -> RunInfo {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let date = iso8601(now.as_secs());
        RunInfo {
            command: output.command.clone(),
            commit: output.commit.clone().unwrap_or_else(commit),
            machine: output.machine.clone().unwrap_or_else(machine),
            run: format!("{}-{:x}", date.replace(['-', ':'], ""), std::process::id() ^ now.subsec_nanos()),
            date,
            config: Value::Object(serde_json::Map::new()),
            log: output.results_dir.as_ref().map(RecordLog::new),
        }
    }

    /// The same invocation with what was set in it.
    #[must_use]
    pub fn with_config(mut self, config: Value) -> RunInfo {
        self.config = config;
        self
    }

    /// A record of this invocation, without floor and peers.
    #[must_use]
    pub fn record(&self, bench: &str, case: &str, metric: &str, unit: &str, value: f64, samples: usize) -> Record {
        Record {
            bench: bench.into(),
            case: case.into(),
            metric: metric.into(),
            unit: unit.into(),
            value,
            samples,
            floor: None,
            peers: BTreeMap::new(),
            command: self.command.clone(),
            commit: self.commit.clone(),
            machine: self.machine.clone(),
            date: self.date.clone(),
            run: self.run.clone(),
            config: self.config.clone(),
        }
    }

    /// Appends records where [`Output::results_dir`] says; does nothing where it says nothing.
    ///
    /// # Errors
    /// [`EvalError::Io`].
    pub fn write(&self, records: &[Record]) -> Result<()> {
        self.log.as_ref().map_or(Ok(()), |log| log.append(records))
    }
}

/// The JSON lines files of a folder.
#[derive(Debug, Clone)]
pub struct RecordLog {
    dir: PathBuf,
}

impl Output {
    /// Makes the folder of the records, if there is to be one, and looks whether files can be written there: before
    /// something is measured for minutes.
    ///
    /// # Errors
    /// [`EvalError::Io`].
    pub fn prepare(&self) -> Result<()> {
        let Some(dir) = &self.results_dir else { return Ok(()) };
        fs::create_dir_all(dir).map_err(EvalError::io("create", dir))?;
        let probe = dir.join(format!(".writable.{}", std::process::id()));
        fs::write(&probe, "").and_then(|()| fs::remove_file(&probe)).map_err(EvalError::io("write", &probe))
    }
}

impl RecordLog {
    /// The log in this folder, which need not exist.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> RecordLog {
        RecordLog { dir: dir.into() }
    }

    /// Appends each record to `<folder>/<bench>.jsonl`; one write a file, so that lines stay whole.
    ///
    /// # Errors
    /// [`EvalError::Io`] when the folder or a file cannot be written; [`EvalError::BadOption`] for a bench whose name
    /// is no file name or a value that is no number.
    pub fn append(&self, records: &[Record]) -> Result<()> {
        let mut files: BTreeMap<&str, String> = BTreeMap::new();
        for record in records {
            check(record)?;
            let text = files.entry(&record.bench).or_default();
            text.push_str(
                &serde_json::to_string(record)
                    .map_err(|e| EvalError::io("write", &self.dir)(std::io::Error::other(e)))?,
            );
            text.push('\n');
        }
        fs::create_dir_all(&self.dir).map_err(EvalError::io("create", &self.dir))?;
        for (bench, text) in files {
            let path = self.dir.join(format!("{bench}.jsonl"));
            let mut file =
                OpenOptions::new().create(true).append(true).open(&path).map_err(EvalError::io("write", &path))?;
            file.write_all(text.as_bytes()).map_err(EvalError::io("write", &path))?;
        }
        Ok(())
    }

    /// Every record, file by file in the order of names, line by line.
    ///
    /// # Errors
    /// [`EvalError::Io`]; [`EvalError::BadLine`] for a line that is no record. An absent folder holds none.
    pub fn read_all(&self) -> Result<Vec<Record>> {
        if !self.dir.is_dir() {
            return Ok(Vec::new());
        }
        let listed = fs::read_dir(&self.dir).map_err(EvalError::io("read", &self.dir))?;
        let mut paths: Vec<PathBuf> =
            listed.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "jsonl")).collect();
        paths.sort();
        let mut records = Vec::new();
        for path in paths {
            records.extend(read_file(&path)?);
        }
        Ok(records)
    }

    /// The records that no later one of the same bench, case, metric and machine supersedes, in order of bench and of
    /// first appearance.
    ///
    /// # Errors
    /// As [`RecordLog::read_all`].
    pub fn latest(&self) -> Result<Vec<Record>> {
        Ok(latest(self.read_all()?))
    }
}

/// Keeps the last record of each identity, at the place of the first.
pub(crate) fn latest(records: Vec<Record>) -> Vec<Record> {
    let mut kept: Vec<Record> = Vec::new();
    let mut place: HashMap<(String, String, String, String), usize> = HashMap::new();
    for record in records {
        let (bench, case, metric, machine) = record.identity();
        let key = (bench.to_owned(), case.to_owned(), metric.to_owned(), machine.to_owned());
        match place.get(&key) {
            // Lines are appended as runs end, so a later line is a later run unless its date says otherwise (files
            // joined by a merge).
            Some(&at) if kept[at].date <= record.date => kept[at] = record,
            Some(_) => {}
            None => {
                place.insert(key, kept.len());
                kept.push(record);
            }
        }
    }
    kept
}

/// What a line of a file need not repeat from the line of the same run before it.
const OF_A_RUN: [&str; 5] = ["command", "commit", "machine", "date", "config"];

fn read_file(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(EvalError::io("read", path))?;
    let mut runs: HashMap<String, Map<String, Value>> = HashMap::new();
    let mut records = Vec::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let record = read_line(line, &mut runs).map_err(|e| EvalError::BadLine {
            path: path.to_owned(),
            line: at + 1,
            expected: "a record (bench, case, metric, unit, value, samples, run; and command, commit, machine, date, unless \
                       a line above it has them for the same run)",
            reason: e.to_string(),
        })?;
        records.push(record);
    }
    Ok(records)
}

/// `runs` has the last line of each run, of which this one may leave out what it shares.
fn read_line(line: &str, runs: &mut HashMap<String, Map<String, Value>>) -> serde_json::Result<Record> {
    let mut fields: Map<String, Value> = serde_json::from_str(line)?;
    let run = fields.get("run").and_then(Value::as_str).unwrap_or_default().to_owned();
    if let Some(before) = runs.get(&run) {
        for name in OF_A_RUN.iter().filter(|name| before.contains_key(**name)) {
            fields.entry(*name).or_insert_with(|| before[*name].clone());
        }
    }
    let record = Record::deserialize(&fields)?;
    runs.insert(run, fields);
    Ok(record)
}

fn check(record: &Record) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if record.bench.is_empty() || !record.bench.chars().all(plain) {
        let expected = "letters, digits, `-` and `_`: it names a file".into();
        return Err(EvalError::BadOption { what: "the bench of a record", found: record.bench.clone(), expected });
    }
    if !record.value.is_finite() {
        let found = format!("{} for {} of {}", record.value, record.metric, record.case);
        return Err(EvalError::BadOption { what: "the value of a record", found, expected: "a number".into() });
    }
    Ok(())
}

/// The name of this machine in records.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores == 2 { "cpu2".into() } else { format!("cpu{cores} {}", std::env::consts::ARCH) }
}

/// The commit of the repository around the current folder.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short=12", "HEAD"]) else {
        return "unknown".into();
    };
    // Records themselves do not change what was measured.
    let changed = git(&["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)eval/results"]);
    if changed.is_some_and(|lines| !lines.is_empty()) { format!("{commit}+changes") } else { commit }
}

/// Seconds since 1970 as `YYYY-MM-DDTHH:MM:SSZ` (days to date after H. Hinnant, "chrono-compatible low-level date
/// algorithms").
fn iso8601(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn info(dir: &Path) -> RunInfo {
        let output = Output {
            results_dir: Some(dir.into()),
            command: "quire-bench decode".into(),
            machine: Some("cpu2".into()),
            commit: Some("abc".into()),
        };
        RunInfo::start(&output).with_config(json!({"threads": 2}))
    }

    #[test]
    fn a_line_has_what_it_leaves_out_from_the_line_of_its_run_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let full = |run: &str, case: &str, size: usize| {
            let info = RunInfo { run: run.into(), ..info(dir.path()) }.with_config(json!({"size": size}));
            info.record("decode", case, "ms", "ms", 1.5, 3)
        };
        let records = [full("a", "1", 1), full("b", "2", 2), full("a", "3", 1), full("a", "4", 7), full("a", "5", 7)];
        let short = |record: &Record, without: &[&str]| {
            let mut value = serde_json::to_value(record).unwrap();
            without.iter().for_each(|name| drop(value.as_object_mut().unwrap().shift_remove(*name)));
            value.to_string()
        };
        let rest = ["command", "commit", "machine", "date", "floor", "peers"];
        let lines = [
            short(&records[0], &[]),
            short(&records[1], &[]),
            short(&records[2], &[&rest[..], &["config"]].concat()),
            short(&records[3], &rest),
            short(&records[4], &[&rest[..], &["config"]].concat()),
        ];
        let path = dir.path().join("decode.jsonl");
        fs::write(&path, lines.join("\n")).unwrap();
        assert_eq!(RecordLog::new(dir.path()).read_all().unwrap(), records);
        // Nobody knows what a run was that no line tells of.
        fs::write(&path, &lines[2]).unwrap();
        let error = RecordLog::new(dir.path()).read_all().unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("same run") && error.contains("command"), "{error}");
    }

    #[test]
    fn records_come_back_as_written() {
        let dir = tempfile::tempdir().unwrap();
        let info = info(dir.path());
        let mut first = info.record("decode", "ref/2k/cpu/full", "time_per_token", "ms", 1.25, 5);
        first.floor = Some(0.5);
        first.peers.insert("transformers bf16".into(), 7.5);
        let second = info.record("prefill", "ref/2k/cpu", "time", "ms", 200.0, 5);
        info.write(&[first.clone(), second.clone()]).unwrap();
        assert_eq!(RecordLog::new(dir.path()).read_all().unwrap(), [first, second]);
        assert!(dir.path().join("decode.jsonl").is_file() && dir.path().join("prefill.jsonl").is_file());
    }

    #[test]
    fn later_records_supersede_the_same_identity_only() {
        let dir = tempfile::tempdir().unwrap();
        let log = RecordLog::new(dir.path());
        let record = |case: &str, value| info(dir.path()).record("decode", case, "time", "ms", value, 1);
        log.append(&[record("a", 1.0), record("b", 2.0)]).unwrap();
        let mut elsewhere = record("a", 9.0);
        elsewhere.machine = "h200".into();
        log.append(&[elsewhere, record("a", 3.0)]).unwrap();
        let values: Vec<f64> = log.latest().unwrap().iter().map(|r| r.value).collect();
        assert_eq!(values, [3.0, 2.0, 9.0]);
    }

    #[test]
    fn an_older_date_never_supersedes() {
        let dir = tempfile::tempdir().unwrap();
        let new = info(dir.path()).record("decode", "a", "time", "ms", 1.0, 1);
        let old = Record { date: "2001-01-01T00:00:00Z".into(), value: 2.0, ..new.clone() };
        assert_eq!(latest(vec![new.clone(), old]), [new]);
    }

    #[test]
    fn bad_lines_are_named_and_bad_records_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("decode.jsonl"), "\n{\"bench\": 3}\n").unwrap();
        let error = RecordLog::new(dir.path()).read_all().unwrap_err();
        assert!(matches!(error, EvalError::BadLine { line: 2, .. }), "{error}");
        let log = RecordLog::new(dir.path().join("new"));
        let outside = info(dir.path()).record("../x", "a", "time", "ms", 1.0, 1);
        assert!(log.append(&[outside]).is_err());
        let no_number = info(dir.path()).record("decode", "a", "time", "ms", f64::NAN, 1);
        assert!(log.append(&[no_number]).is_err());
        assert!(log.read_all().unwrap().is_empty());
    }

    #[test]
    fn dates_are_right_at_the_edges() {
        assert_eq!(iso8601(0), "1970-01-01T00:00:00Z");
        assert_eq!(iso8601(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(iso8601(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(iso8601(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(iso8601(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}
