//! The crash drill: `kill -9` an ingest at random moments, and see that nothing acknowledged is lost and nothing
//! partial is visible.
//!
//! Documents are generated from a seed. A reference store, filled without disturbance, says what every chunk must
//! hold. Then the program itself is started again and again on one data folder and killed after a random part of the
//! time that the undisturbed run took; what it printed before it died are the acknowledgements. After every kill the
//! folder is opened and checked: acknowledged chunks and documents are there, every visible chunk equals the
//! reference bit for bit, checksums match, and no payload is without manifest. A folder that is complete is emptied.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use chunk_cache::{ChunkKey, ChunkStore, LayerKv};
use engine::Engine;
use eval::{Output, RunInfo};
use serde::Serialize;
use serde_json::{Value, json};

use super::dispatch::ScratchDir;
use crate::error::Result;
use crate::findings::Findings;
use documents::Library;
use service::store::open_chunks;
use settings::{QuireError, Settings};

const COLLECTION: &str = "drill";

/// What the drill does.
#[derive(Clone, Debug)]
pub(crate) struct CrashOptions {
    /// Times to kill.
    pub(crate) kills: usize,
    /// Documents to ingest.
    pub(crate) documents: usize,
    /// Seed of documents and moments.
    pub(crate) seed: u64,
    /// Where records go.
    pub(crate) output: Output,
}

/// What the drill found.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct CrashReport {
    /// What every drill counts.
    #[serde(flatten)]
    pub(crate) found: Findings,
    /// Of the kills, times it had acknowledged something and had more to do.
    pub(crate) kills_mid_ingest: usize,
    /// Times it was done before it could be killed; not counted as kills.
    pub(crate) completed: usize,
    /// Chunks of the undisturbed run.
    pub(crate) chunks: usize,
    /// Acknowledged chunks and documents that were checked, over all kills.
    pub(crate) acknowledged_checked: usize,
}

impl CrashReport {
    /// For people.
    #[must_use]
    pub(crate) fn table(&self) -> String {
        format!(
            "| kills | in the middle | acknowledged, checked | chunks compared | lost or wrong |\n\
             |---|---|---|---|---|\n| {} | {} | {} | {} | {} |",
            self.found.kills,
            self.kills_mid_ingest,
            self.acknowledged_checked,
            self.found.chunks_compared,
            self.found.lost_or_wrong
        )
    }
}

/// What a run of the program acknowledged.
#[derive(Default)]
struct Acknowledged {
    chunks: BTreeSet<ChunkKey>,
    documents: BTreeMap<PathBuf, usize>,
}

impl Acknowledged {
    fn read(&mut self, line: &str) {
        // The last line may be cut off by the kill: then it acknowledges nothing.
        let Ok(value) = serde_json::from_str::<Value>(line) else { return };
        match value["event"].as_str() {
            Some("chunk") => {
                self.chunks.extend(value["key"].as_str().and_then(|key| key.parse::<ChunkKey>().ok()));
            }
            Some("document") => {
                let chunks = value["chunks"].as_u64().unwrap_or_default() as usize;
                self.documents.extend(value["document"].as_str().map(|path| (PathBuf::from(path), chunks)));
            }
            _ => {}
        }
    }
}

/// Runs the drill with `program` in a scratch folder below the data folder; `news` gets a line per kill.
///
/// # Errors
/// What keeps the drill from being carried out. What it finds wrong is in the report.
pub(crate) fn crash_drill(
    settings: &Settings,
    program: &Path,
    options: &CrashOptions,
    news: &mut dyn FnMut(&str),
) -> Result<CrashReport> {
    let run = RunInfo::start(&options.output);
    let scratch = ScratchDir::new(&settings.data_dir, "crash-drill")?;
    let mut random = Random(options.seed);
    let documents = scratch.path().join("documents");
    write_documents(&documents, options.documents, &mut random)?;
    let model = settings.model_dir()?;
    let drill = Drill { program, model: &model, documents: &documents };

    let reference_dir = scratch.path().join("reference");
    let began = Instant::now();
    let undisturbed = drill.ingest(&reference_dir, None)?;
    let duration = began.elapsed();
    if !undisturbed.completed {
        return Err(QuireError::CheckFailed("the undisturbed ingest of the drill failed".into()).into());
    }
    let engine = Engine::load(settings.engine()?)?;
    let reference = read_all(&open(&reference_dir)?)?;
    let mut report = CrashReport { chunks: reference.len(), ..CrashReport::default() };
    news(&format!("{} chunks in {:.1} s undisturbed", reference.len(), duration.as_secs_f64()));

    let victim = scratch.path().join("victim");
    while report.found.kills < options.kills {
        if report.completed > 10 * options.kills + 10 {
            return Err(QuireError::CheckFailed(
                "the ingest is done before it can be killed: use more documents".into(),
            )
            .into());
        }
        let moment = duration.mul_f64(random.unit());
        let outcome = drill.ingest(&victim, Some(moment))?;
        check(&victim, &outcome.acknowledged, &reference, &mut report)?;
        if outcome.completed {
            report.completed += 1;
            std::fs::remove_dir_all(&victim).map_err(|e| QuireError::writing(&victim, e))?;
            continue;
        }
        report.found.kills += 1;
        let acknowledged = outcome.acknowledged.chunks.len();
        report.kills_mid_ingest += usize::from(acknowledged > 0 && acknowledged < reference.len());
        news(&format!(
            "kill {} of {} after {:.2} s: {acknowledged} chunks acknowledged, {} problems so far",
            report.found.kills,
            options.kills,
            moment.as_secs_f64(),
            report.found.lost_or_wrong
        ));
    }
    engine.shutdown();
    let figures =
        [("kills_mid_ingest", report.kills_mid_ingest), ("acknowledged_checked", report.acknowledged_checked)];
    let config = json!({"documents": options.documents, "chunks": report.chunks, "seed": options.seed});
    report.found.record(&run.with_config(config), "ingest/kill9", &figures)?;
    Ok(report)
}

/// One run of the program.
struct Outcome {
    acknowledged: Acknowledged,
    /// It ended by itself, and well.
    completed: bool,
}

struct Drill<'a> {
    program: &'a Path,
    model: &'a Path,
    documents: &'a Path,
}

impl Drill<'_> {
    /// Ingests into `data_dir`; with `moment`, the process is killed so long after its start.
    fn ingest(&self, data_dir: &Path, moment: Option<Duration>) -> Result<Outcome> {
        let failed = |source| QuireError::Io { action: "run", path: self.program.into(), source };
        let mut child = Command::new(self.program)
            .arg("ingest")
            .arg(self.documents)
            .arg("--json")
            .arg("--collection")
            .arg(COLLECTION)
            .arg("--data-dir")
            .arg(data_dir)
            .arg("--model")
            .arg(self.model)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .map_err(failed)?;
        let stdout = child.stdout.take();
        let reader = std::thread::spawn(move || {
            let mut acknowledged = Acknowledged::default();
            for line in stdout.into_iter().flat_map(|out| BufReader::new(out).lines()).map_while(|line| line.ok()) {
                acknowledged.read(&line);
            }
            acknowledged
        });
        if let Some(moment) = moment {
            let deadline = Instant::now() + moment;
            while Instant::now() < deadline && child.try_wait().map_err(failed)?.is_none() {
                std::thread::sleep(Duration::from_millis(1).min(deadline.saturating_duration_since(Instant::now())));
            }
            // SIGKILL: the process has no say in it. An ended process cannot be killed: that shows in its status.
            let _ = child.kill();
        }
        let status = child.wait().map_err(failed)?;
        let acknowledged = reader
            .join()
            .map_err(|_| QuireError::Internal("the thread that reads acknowledgements panicked".into()))?;
        if status.code().is_some_and(|code| code != 0) {
            return Err(QuireError::CheckFailed(format!("an ingest of the drill failed by itself: {status}")).into());
        }
        Ok(Outcome { acknowledged, completed: status.success() })
    }
}

fn open(data_dir: &Path) -> Result<ChunkStore> {
    Ok(open_chunks(data_dir, u64::MAX)?)
}

type Chunks = BTreeMap<ChunkKey, Vec<LayerKv>>;

fn read_chunk(store: &ChunkStore, key: &ChunkKey) -> Result<Option<Vec<LayerKv>>> {
    let Some(meta) = store.meta(key) else { return Ok(None) };
    let layers = (0..store.models()[meta.model].shape.layers).map(|layer| store.layer(key, layer));
    Ok(layers.collect::<std::result::Result<Option<Vec<_>>, _>>()?)
}

fn read_all(store: &ChunkStore) -> Result<Chunks> {
    let mut chunks = Chunks::new();
    for (key, _) in store.list() {
        if let Some(layers) = read_chunk(store, &key)? {
            chunks.insert(key, layers);
        }
    }
    Ok(chunks)
}

/// Looks at what a killed run left.
fn check(data_dir: &Path, acknowledged: &Acknowledged, reference: &Chunks, report: &mut CrashReport) -> Result<()> {
    report.acknowledged_checked += acknowledged.chunks.len() + acknowledged.documents.len();
    if !service::store::store_dir(data_dir).is_dir() {
        if !acknowledged.chunks.is_empty() {
            report
                .found
                .problem(format!("{} chunks were acknowledged and there is no store", acknowledged.chunks.len()));
        }
        return Ok(());
    }
    let store = match open(data_dir) {
        Ok(store) => store,
        Err(error) => {
            report.found.problem(format!("the store cannot be opened: {error}"));
            return Ok(());
        }
    };
    let list = store.list();
    let visible: BTreeSet<ChunkKey> = list.into_iter().map(|(key, _)| key).collect();
    for key in acknowledged.chunks.difference(&visible) {
        report.found.problem(format!("acknowledged chunk {key} is gone"));
    }
    for key in &visible {
        report.found.chunks_compared += 1;
        match (read_chunk(&store, key), reference.get(key)) {
            (Ok(Some(found)), Some(expected)) if found == *expected => {}
            (Ok(Some(_)), Some(_)) => report.found.problem(format!("chunk {key} differs from the undisturbed run")),
            (_, None) => report.found.problem(format!("chunk {key} is visible and not in the undisturbed run")),
            (Ok(None), _) => report.found.problem(format!("chunk {key} is visible and partly missing")),
            (Err(error), _) => report.found.problem(format!("chunk {key} is visible and cannot be read: {error}")),
        }
    }
    let verified = store.verify()?;
    if !verified.is_clean() {
        report.found.problem(format!("the store is not clean: {verified:?}"));
    }
    check_documents(data_dir, acknowledged, report)
}

fn check_documents(data_dir: &Path, acknowledged: &Acknowledged, report: &mut CrashReport) -> Result<()> {
    if acknowledged.documents.is_empty() {
        return Ok(());
    }
    let collection = match Library::new(data_dir).collection(COLLECTION) {
        Ok(collection) => collection,
        Err(error) => {
            report.found.problem(format!("the collection cannot be opened: {error}"));
            return Ok(());
        }
    };
    for (path, chunks) in &acknowledged.documents {
        match collection.document(path) {
            Ok(Some(document)) if document.passages.len() == *chunks => {}
            Ok(Some(_)) => report.found.problem(format!("document {} has lost chunks", path.display())),
            Ok(None) => report.found.problem(format!("acknowledged document {} is gone", path.display())),
            Err(error) => report.found.problem(format!("document {}: {error}", path.display())),
        }
    }
    Ok(())
}

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014, figure 16): equal seeds give
/// equal documents and moments.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 up to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }

    /// Below `end`, which is not 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// One of several.
    pub(super) fn choose<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

fn write_documents(dir: &Path, documents: usize, random: &mut Random) -> Result<()> {
    let who = ["The harbour master", "A clerk of the archive", "The night ferry", "An old pilot", "The surveyor"];
    let did = ["counted", "carried", "described", "returned", "measured", "forgot", "repaired"];
    let what = ["barrels of tar", "letters", "lamps", "soundings", "coils of rope", "brass fittings", "charts"];
    let place = ["near the sluice", "below the chapel", "at Orrin Quay", "behind the mill", "in the upper store"];
    std::fs::create_dir_all(dir).map_err(|e| QuireError::writing(dir, e))?;
    for document in 0..documents {
        let mut text = format!("# Journal {document}\n\n");
        for entry in 0..60 {
            let number = random.next() % 9000 + 1000;
            let sentence = format!(
                "{} {} {number} {} {}. ",
                random.pick(&who),
                random.pick(&did),
                random.pick(&what),
                random.pick(&place)
            );
            text.push_str(&sentence);
            if entry % 6 == 5 {
                text.push_str("\n\n");
            }
        }
        let path = dir.join(format!("journal-{document:03}.md"));
        std::fs::write(&path, text).map_err(|e| QuireError::writing(&path, e))?;
    }
    Ok(())
}
