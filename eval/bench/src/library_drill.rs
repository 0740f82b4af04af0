//! The drill of the whole library: a process that adds, replaces, renames and removes documents, brings them back, syncs folders,
//! lets files expire, evicts chunks, writes the catalog anew and removes for good is killed again and again, and each time what it left is looked at.
//!
//! After every kill the library must hold exactly what was acknowledged; of the one step that was being made, each document is
//! as before or as after it. Every text, every passage and every chunk is whole; what search finds, what the catalog lists and
//! what the store holds agree. Of what was removed for good no byte is left. Now and then the search index is damaged or gone when the process starts, so that it is killed
//! while it builds another.
//!
//! Killed by SIGKILL at random moments, or by power failures: the process dies in a file operation of its own, and what it had
//! not synced is undone (`faults`).

mod check;
mod worker;
mod world;

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use chunk_cache::ChunkKey;
use eval::{FailingDisk, Output, RunInfo};
use serde::Serialize;
use serde_json::json;

use super::crash::Random;
use super::dispatch::ScratchDir;
use crate::error::Result;
use crate::findings::Findings;
use settings::{QuireError, Settings};
pub(super) use worker::work;
use worker::{Line, Orders};
use world::{Step, World};

const COLLECTION: &str = "drill";
/// Kills after which the drill begins with an empty folder again.
const LIFE: usize = 40;
/// Steps of a process that nobody kills.
const STEPS: usize = 400;
/// A process that has not come to its end after so long hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// How the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// SIGKILL at a random moment.
    Kill,
    /// A power failure in a random operation: what is not synced is lost.
    Power,
}

/// What the drill does.
#[derive(Clone, Debug)]
pub(crate) struct LibraryDrillOptions {
    /// How the process dies.
    pub(crate) death: Death,
    /// How often.
    pub(crate) kills: usize,
    /// Seed of steps and moments.
    pub(crate) seed: u64,
    /// Where records go.
    pub(crate) output: Output,
}

/// What the drill found.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct LibraryDrillReport {
    /// What every drill counts.
    #[serde(flatten)]
    pub(crate) found: Findings,
    /// Of the kills, times in the middle of a step.
    pub(crate) kills_mid_step: usize,
    /// Of these, times while it opened the library.
    pub(crate) kills_opening: usize,
    /// Steps that were acknowledged.
    pub(crate) steps: usize,
    /// Documents that were compared, over all kills.
    pub(crate) documents_compared: usize,
}

impl LibraryDrillReport {
    /// For people.
    #[must_use]
    pub(crate) fn table(&self) -> String {
        format!(
            "| kills | in a step | while opening | steps done | documents compared | chunks compared | lost or wrong |\n\
             |---|---|---|---|---|---|---|\n| {} | {} | {} | {} | {} | {} | {} |",
            self.found.kills,
            self.kills_mid_step,
            self.kills_opening,
            self.steps,
            self.documents_compared,
            self.found.chunks_compared,
            self.found.lost_or_wrong
        )
    }
}

/// Runs the drill with `program` in a scratch folder below the data folder; `news` gets a line per kill.
///
/// # Errors
/// What keeps the drill from being carried out. What it finds wrong is in the report.
pub(crate) fn library_drill(
    settings: &Settings,
    program: &Path,
    options: &LibraryDrillOptions,
    news: &mut dyn FnMut(&str),
) -> Result<LibraryDrillReport> {
    let run = RunInfo::start(&options.output).with_config(json!({"seed": options.seed}));
    let scratch = ScratchDir::new(&settings.data_dir, "library-drill")?;
    let data = scratch.path().join("data");
    let documents = scratch.path().join("documents");
    make_dir(&documents)?;
    let documents = documents.canonicalize().map_err(|e| QuireError::writing(&documents, e))?;
    make_dir(&data)?;
    let disk = match options.death {
        Death::Kill => None,
        Death::Power => Some(FailingDisk::new(scratch.path(), &data, true)?),
    };
    let orders = scratch.path().join("orders.json");
    let mut drill = Drill {
        place: Place { program, model: settings.model_dir()?, data, documents, orders },
        disk,
        random: Random(options.seed),
        known: Known::default(),
        report: LibraryDrillReport::default(),
    };
    while drill.report.found.kills < options.kills {
        if drill.report.found.kills.is_multiple_of(LIFE) {
            drill.begin_anew()?;
        }
        let before = drill.report.found.problems.len();
        drill.round()?;
        let report = &drill.report;
        report.found.problems[before..].iter().for_each(|problem| news(problem));
        news(&format!(
            "kill {} of {}: {} documents, {} steps so far, {} problems",
            report.found.kills,
            options.kills,
            drill.known.world.documents.len(),
            report.steps,
            report.found.lost_or_wrong
        ));
    }
    let case = match options.death {
        Death::Kill => "library/kill9",
        Death::Power => "library/unsynced-dropped",
    };
    let mut report = drill.report;
    let figures = [
        ("kills_mid_step", report.kills_mid_step),
        ("kills_opening", report.kills_opening),
        ("steps", report.steps),
        ("documents_compared", report.documents_compared),
    ];
    report.found.record(&run, case, &figures)?;
    Ok(report)
}

fn make_dir(path: &Path) -> Result<()> {
    Ok(std::fs::create_dir_all(path).map_err(|e| QuireError::writing(path, e))?)
}

/// Where everything lies.
struct Place<'a> {
    program: &'a Path,
    model: PathBuf,
    data: PathBuf,
    documents: PathBuf,
    orders: PathBuf,
}

/// What is known of the library between two processes.
#[derive(Default)]
struct Known {
    world: World,
    /// Chunks that were acknowledged since chunks last made way.
    chunks: BTreeSet<ChunkKey>,
    /// Contents of which no byte may be left.
    erased: BTreeSet<u64>,
    /// What each chunk held when it was first seen.
    digests: HashMap<ChunkKey, blake3::Hash>,
}

struct Drill<'a> {
    place: Place<'a>,
    disk: Option<FailingDisk>,
    random: Random,
    known: Known,
    report: LibraryDrillReport,
}

impl Drill<'_> {
    /// An empty folder; what chunks hold is known for good.
    fn begin_anew(&mut self) -> Result<()> {
        std::fs::remove_dir_all(&self.place.data).map_err(|e| QuireError::writing(&self.place.data, e))?;
        make_dir(&self.place.data)?;
        let next = self.known.world.next;
        self.known.world = World { next, ..World::default() };
        self.known.chunks.clear();
        self.known.erased.clear();
        Ok(())
    }

    /// One process from its start to its death, and what it left.
    fn round(&mut self) -> Result<()> {
        self.damage_index()?;
        self.known.world.write_files(&self.place.documents)?;
        let orders = Orders {
            documents: self.place.documents.clone(),
            world: self.known.world.clone(),
            seed: self.random.next(),
            steps: STEPS,
        };
        let text = serde_json::to_string(&orders).map_err(|e| QuireError::Internal(e.to_string()))?;
        std::fs::write(&self.place.orders, text).map_err(|e| QuireError::writing(&self.place.orders, e))?;
        let Some(begun) = self.run()? else { return Ok(()) };
        self.report.found.kills += 1;
        self.report.kills_mid_step += usize::from(begun.is_some());
        let after = begun.as_ref().map_or_else(|| self.known.world.clone(), |step| self.known.world.after(step));
        // A power failure may bring back files that were removed, until the next process removes them again.
        if self.disk.is_none() {
            check::check_erased(&self.place.data, &self.known, &mut self.report)?;
        }
        let found = check::check(&self.place.data, &self.place.documents, &mut self.known, &after, &mut self.report)?;
        // Numbers of contents that may have been used are not used again.
        let next = self.known.world.next.max(after.next) + 3;
        let removed = self.known.world.surely_removed(&after, &found);
        self.known.world = World { next, removed, ..found };
        Ok(())
    }

    /// Once in a while the search index is gone, or a byte of it has changed.
    fn damage_index(&mut self) -> Result<()> {
        let index = self.place.data.join("index");
        if !index.exists() || self.random.below(8) > 0 {
            return Ok(());
        }
        Ok(std::fs::remove_dir_all(&index).map_err(|e| QuireError::writing(&index, e))?)
    }

    /// Runs the process until it dies; gives the step that it was in. `None`: it came to its end before.
    fn run(&mut self) -> Result<Option<Option<Step>>> {
        let failed = |source| QuireError::Io { action: "run", path: self.place.program.into(), source };
        let mut command = Command::new(self.place.program);
        command.arg("crash-worker").arg(&self.place.orders).arg("--data-dir").arg(&self.place.data);
        command.arg("--model").arg(&self.place.model).args(["--log", "error"]);
        // Evicting lowers the budget and raises it again; a process that died in between must not leave the lower one.
        command.args(["--cache-bytes", "8G"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        if let Some(disk) = &self.disk {
            // Opening takes some dozens; a step a dozen.
            let last = [60, 400, 1500][self.random.below(3)];
            disk.kill_at(1 + self.random.below(last) as u64)?;
            disk.below(&mut command);
        }
        let mut child = command.spawn().map_err(failed)?;
        let lines = lines(child.stdout.take());
        let mut life = Life { ready: false, begun: None, kill: None, started: Instant::now() };
        if self.disk.is_none() && self.random.below(6) == 0 {
            life.kill = Some(Instant::now() + Duration::from_millis(self.random.below(500) as u64));
        }
        loop {
            match lines.recv_timeout(Duration::from_millis(1)) {
                Ok(line) => self.take(line, &mut life),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
            }
            if life.kill.is_some_and(|moment| Instant::now() >= moment) {
                // An ended process cannot be killed: that shows in its status.
                let _ = child.kill();
                life.kill = None;
            }
            if life.started.elapsed() > PATIENCE {
                let _ = child.kill();
                self.report.found.problem("the process hangs".into());
            }
        }
        let status = child.wait().map_err(failed)?;
        if let Some(code) = status.code() {
            if code != 0 {
                self.report.found.problem(format!("the process failed by itself: {status}"));
                self.report.found.kills += 1;
            }
            return Ok(None);
        }
        self.report.kills_opening += usize::from(!life.ready);
        Ok(Some(life.begun))
    }

    fn take(&mut self, line: Line, life: &mut Life) {
        match line {
            Line::Ready => {
                life.ready = true;
                if self.disk.is_none() && life.kill.is_none() {
                    life.kill = Some(Instant::now() + Duration::from_millis(self.random.below(900) as u64));
                }
            }
            Line::Begin(step) => {
                if step.frees_chunks() {
                    self.known.chunks.clear();
                }
                life.begun = Some(step);
            }
            Line::Chunk(key) => self.known.chunks.extend(key.parse::<ChunkKey>().ok()),
            Line::Done => {
                self.report.steps += 1;
                if let Some(step) = life.begun.take() {
                    self.known.erased.extend(self.known.world.erased_by(&step));
                    self.known.world = self.known.world.after(&step);
                }
            }
        }
    }
}

/// A process while it runs.
struct Life {
    ready: bool,
    /// The step that it is in.
    begun: Option<Step>,
    /// When it is to be killed.
    kill: Option<Instant>,
    started: Instant,
}

/// The lines that a process prints, read by a thread until it ends. A line that is cut off by its death says nothing.
fn lines(stdout: Option<std::process::ChildStdout>) -> Receiver<Line> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(|line| line.ok()) {
            let Ok(line) = serde_json::from_str(&line) else { continue };
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
