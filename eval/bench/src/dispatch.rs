//! Measurements, from the command line to their options.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use engine::{ChunkSource, DeviceChoice, Engine, EngineConfig};
use eval::{
    AttentionOptions, AttentionSumsOptions, BlendBenchOptions, CheckpointOptions, ChunkPlace, DrillOptions,
    DrillReport, FaultsOptions, GpuPeerOptions, HeadOptions, IndexBenchOptions, IndexData, MembwOptions, PeerOptions,
    ScatteredOptions, SourceProvider, SpeedOptions, StoreBenchOptions, TemplateOptions, TtftOptions,
    bench_attention_sums, bench_blend, bench_decode, bench_faults, bench_index, bench_membw, bench_prefill,
    bench_store, bench_templates, bench_ttft, default_results_dir, drill_bitflips, drill_full_disk, write_checkpoint,
    write_report,
};

use super::args::{BenchCommand, IndexArgs, IndexDataArg, RecordArgs, SpeedArgs, TtftArgs};
use super::crash::{CrashOptions, crash_drill};
use super::http::{HttpOptions, http_bench};
use super::library::library_bench;
use super::library_bitflips::{LibraryFlipsOptions, library_flips};
use super::library_drill::{self, Death, LibraryDrillOptions, library_drill};
use super::load;
use super::quality::{self, data_source, output, with_progress};
use super::search::{SearchBenchOptions, search_bench};
use super::start::{StartOptions, start_bench};
use super::store_args::{CrashArgs, CrashCase, StoreArgs};
use crate::error::Result;
use documents::data_dir::create_private_dir;
use quire::cli::{Out, count};
use serde_json::json;
use service::store::KvStore;
use settings::{QuireError, Settings};

pub(super) fn run(settings: &Settings, command: BenchCommand, out: &Out) -> Result<()> {
    match command {
        BenchCommand::Eval(args) => quality::run(settings, args, out),
        BenchCommand::Questions(args) => quality::make_questions(args, out),
        BenchCommand::Prefill(args) => speed(settings, args, out, Kind::Prefill),
        BenchCommand::Decode(args) if args.batch.is_empty() => speed(settings, args.speed, out, Kind::Decode),
        BenchCommand::Decode(args) => load::batch_decode(settings, *args, out),
        BenchCommand::Serve(args) => load::mixed_load(settings, &args, out),
        BenchCommand::Start { repeats, limit, label, records } => {
            let limit = Duration::from_secs(limit);
            if repeats == 0 {
                let (found, expected) = ("0".into(), "at least 1".into());
                return Err(eval::EvalError::BadOption { what: "the number of starts", found, expected }.into());
            }
            let options = StartOptions { repeats, limit, label, output: output(&records)? };
            let report = start_bench(settings, &program()?, &options, &mut |news| out.note(news))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::Http { requests, connections, python, limit, records } => {
            let limit = Duration::from_secs(limit);
            let options = HttpOptions { requests, connections, python, limit, output: output(&records)? };
            let report = http_bench(settings, &program()?, &options, &mut |news| out.note(news))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::AttentionDecode { tokens, batch, repeats, rounds, python, no_peer, label, records } => {
            let options = AttentionOptions {
                tokens,
                batches: batch,
                repeats,
                rounds,
                peer: GpuPeerOptions { python, enabled: !no_peer, ..GpuPeerOptions::default() },
                model_label: label,
                output: output(&records)?,
            };
            load::attention_decode(settings, &options, out)
        }
        BenchCommand::AttentionSums { lengths, repeats, label, records } => {
            let options = AttentionSumsOptions {
                lengths,
                chunk_tokens: settings.chunk_tokens,
                repeats,
                model_label: label,
                output: output(&records)?,
            };
            let engine = Engine::load(settings.engine()?)?;
            let report = with_progress(out, |progress| Ok(bench_attention_sums(&engine, &options, progress)?))?;
            engine.shutdown();
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::Checkpoint { dir, shape, seed } => {
            let options = CheckpointOptions {
                dir,
                shape: shape.0,
                seed,
                tokenizer_dir: settings.model_dir()?,
                threads: settings.threads,
                ..CheckpointOptions::default()
            };
            let report = with_progress(out, |progress| Ok(write_checkpoint(&options, progress)?))?;
            print(&report, &report.line(), out);
            Ok(())
        }
        BenchCommand::Blend { lengths, repeats, data, label, records } => {
            let options = BlendBenchOptions {
                lengths,
                chunk_tokens: settings.chunk_tokens,
                ratio: settings.ratio,
                repeats,
                text: data_source(&data)?,
                model_label: label,
                output: output(&records)?,
            };
            blend(settings, &options, out)
        }
        BenchCommand::Ttft(args) => ttft(settings, args, out),
        BenchCommand::AttentionScattered { tokens, percent, repeats, label, records } => {
            let output = output(&records)?;
            let options = ScatteredOptions { tokens, percent, repeats, model_label: label, output };
            load::attention_scattered(settings, &options, out)
        }
        BenchCommand::Index(args) => index(settings, *args, out),
        BenchCommand::Membw { repeats, records } => {
            let options = MembwOptions {
                threads: settings.threads,
                repeats,
                output: output(&records)?,
                ..MembwOptions::default()
            };
            let report = with_progress(out, |progress| Ok(bench_membw(&options, progress)?))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::Store(StoreArgs { dir, bytes, rows, repeats, seed, records }) => {
            let dir = dir.unwrap_or_else(|| settings.data_dir.clone());
            let output = output(&records)?;
            let options = StoreBenchOptions { dir, bytes: bytes.0, rows, repeats, seed, output };
            let report = with_progress(out, |progress| Ok(bench_store(&options, progress)?))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::Cache(args) => super::cache::run(args, out),
        BenchCommand::Templates { python, packages, records } => {
            let options = TemplateOptions { python, packages, output: output(&records)? };
            let report = with_progress(out, |progress| Ok(bench_templates(&options, progress)?))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::CrashWorker { orders } => library_drill::work(settings, &orders),
        BenchCommand::Crash(CrashArgs { case, kills, documents, flips, rounds, seed, records }) => {
            let output = output(&records)?;
            let drill = |count| DrillOptions { dir: settings.data_dir.clone(), count, seed, output: output.clone() };
            match case {
                CrashCase::Ingest => {
                    let options = CrashOptions { kills, documents, seed, output };
                    let report = crash_drill(settings, &program()?, &options, &mut |news| out.note(news))?;
                    print(&report, &report.table(), out);
                    report.found.check()
                }
                CrashCase::Library | CrashCase::LibraryPower => {
                    let death = if case == CrashCase::Library { Death::Kill } else { Death::Power };
                    let options = LibraryDrillOptions { death, kills, seed, output };
                    let report = library_drill(settings, &this_program()?, &options, &mut |news| out.note(news))?;
                    print(&report, &report.table(), out);
                    report.found.check()
                }
                CrashCase::LibraryFlips => {
                    let options = LibraryFlipsOptions { flips, seed, output };
                    let report = library_flips(settings, &options, &mut |news| out.note(news))?;
                    print(&report, &report.table(), out);
                    report.check()
                }
                CrashCase::Bitflips => drilled(with_progress(out, |p| Ok(drill_bitflips(&drill(flips), p)?))?, out),
                CrashCase::FullDisk => drilled(with_progress(out, |p| Ok(drill_full_disk(&drill(rounds), p)?))?, out),
            }
        }
        BenchCommand::Library(args) => {
            let report = library_bench(settings, args.notes, &output(&args.records)?, &mut |news| out.note(news))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::Search { data, words, repeats, records } => {
            let options = SearchBenchOptions { data, words, repeats, output: output(&records)? };
            let report = search_bench(settings, &options, &mut |news| out.note(news))?;
            print(&report, &report.table(), out);
            Ok(())
        }
        BenchCommand::Faults { list, logs, allow_ignored, records } => {
            let report = bench_faults(&FaultsOptions { list, logs, output: output(&records)? })?;
            print(&report, &report.table(), out);
            let open = report.open.len() + if allow_ignored { 0 } else { report.not_run.len() };
            if open == 0 {
                return Ok(());
            }
            Err(QuireError::CheckFailed(format!(
                "{open} of {} listed faults are not shown to be mended",
                report.listed
            ))
            .into())
        }
        BenchCommand::Report { out: file, records } => report(&file, &records, out),
    }
}

fn drilled(report: DrillReport, out: &Out) -> Result<()> {
    print(&report, &report.table(), out);
    match report.faults {
        0 => Ok(()),
        faults => Err(QuireError::CheckFailed(format!(
            "{faults} times something was wrong, lost or stuck; the first: {}",
            report.problems.join("; ")
        ))
        .into()),
    }
}

/// This program, to be started again.
fn this_program() -> Result<PathBuf> {
    Ok(std::env::current_exe().map_err(|source| QuireError::Io {
        action: "find",
        path: "this program".into(),
        source,
    })?)
}

/// The program `quire`, which is measured: it lies beside this one.
fn program() -> Result<PathBuf> {
    let quire = this_program()?.with_file_name("quire");
    if quire.is_file() {
        return Ok(quire);
    }
    let problem = format!(
        "expected the program that is measured at {}, found none: build it beside this one with `cargo build --release -p \
         quire`, in the same profile",
        quire.display()
    );
    Err(QuireError::CheckFailed(problem).into())
}

pub(super) fn print<T: serde::Serialize>(report: &T, table: &str, out: &Out) {
    if out.json {
        out.value(report);
    } else {
        out.line(table);
    }
}

enum Kind {
    Prefill,
    Decode,
}

/// On the CPU, as the transformers beside it are; a prompt alone also on a GPU, if that is asked for.
fn speed(settings: &Settings, args: SpeedArgs, out: &Out, kind: Kind) -> Result<()> {
    // The same prompt is read again and again, and reading it is what is timed.
    let gpu = args.no_peer && matches!(kind, Kind::Prefill) && settings.device.0 == DeviceChoice::Cuda;
    let device = if gpu { DeviceChoice::Cuda } else { DeviceChoice::Cpu };
    let config = EngineConfig { device, prefix_cache: false, wait_for_index: true, ..settings.engine()? };
    let options = SpeedOptions {
        lengths: args.lengths,
        repeats: args.repeats,
        decode_tokens: args.tokens,
        strategies: args.strategies.into_iter().map(|named| named.0).collect(),
        text: data_source(&args.data)?,
        model_label: args.label,
        peer: PeerOptions { python: args.python, model_dir: config.model_dir.clone(), enabled: !args.no_peer },
        output: output(&args.records)?,
    };
    let engine = Engine::load(config)?;
    let report = with_progress(out, |progress| {
        Ok(match kind {
            Kind::Prefill => bench_prefill(&engine, &options, progress)?,
            Kind::Decode => bench_decode(&engine, &options, progress)?,
        })
    })?;
    engine.shutdown();
    print(&report, &report.table(), out);
    Ok(())
}

/// The model is loaded only where its heads are searched.
fn index(settings: &Settings, args: IndexArgs, out: &Out) -> Result<()> {
    let sets = args.sets.iter().map(|set| match set {
        IndexDataArg::Ood => IndexData::OutOfDistribution,
        IndexDataArg::In => IndexData::InDistribution,
        IndexDataArg::Model => IndexData::Model,
    });
    let options = IndexBenchOptions {
        data: sets.collect(),
        keys: args.keys,
        samples: args.samples,
        queries: args.queries,
        seed: args.seed,
        kinds: args.kinds.into_iter().map(|named| named.0).collect(),
        repeats: args.repeats,
        python: args.python,
        peers: !args.no_peer,
        heads: HeadOptions {
            lengths: args.lengths,
            tasks: data_source(&args.data)?,
            text: args.text,
            texts: args.texts,
            sinks: settings.sinks,
            window: settings.window,
            ..HeadOptions::default()
        },
        model_label: args.label,
        figures: args.figures,
        output: output(&args.records)?,
        ..IndexBenchOptions::default()
    };
    let wanted = options.data.contains(&IndexData::Model);
    let engine = if wanted { Some(Engine::load(settings.engine()?)?) } else { None };
    let report = with_progress(out, |progress| Ok(bench_index(engine.as_ref(), &options, progress)?))?;
    if let Some(engine) = engine {
        engine.shutdown();
    }
    print(&report, &report.table(), out);
    Ok(())
}

/// A store in a folder of its own, so that the bench neither uses nor fills the user's.
fn blend(settings: &Settings, options: &BlendBenchOptions, out: &Out) -> Result<()> {
    let engine = Engine::load(settings.engine()?)?;
    let dir = ScratchDir::new(&settings.data_dir, "bench-blend")?;
    let store = KvStore::open(&engine, dir.path(), "bench", settings.store_bytes(), &settings.tenant)?;
    let provider = StoreProvider { store };
    let report = with_progress(out, |progress| Ok(bench_blend(&engine, &[&provider], options, progress)?))?;
    engine.shutdown();
    print(&report, &report.table(), out);
    Ok(())
}

/// As [`blend`]; the store has room for all chunks, and the prefix cache for a prompt.
fn ttft(settings: &Settings, args: TtftArgs, out: &Out) -> Result<()> {
    let own = settings.blending();
    let rules =
        std::iter::once(own.mode).chain(args.rules.iter().map(|named| named.0).filter(|rule| *rule != own.mode));
    let options = TtftOptions {
        chunks: args.chunks,
        chunk_tokens: settings.chunk_tokens,
        question_tokens: args.question,
        places: args.from.into_iter().map(|named| named.0).collect(),
        rules: rules.collect(),
        blend: own,
        repeats: args.repeats,
        model_label: args.label,
        case: args.case,
        note: json!({
            "prefill_chunk": settings.prefill_chunk, "step_tokens": settings.step_tokens,
            "fast_prefill": settings.fast_prefill, "weights": "as in the model's folder",
        }),
        output: output(&args.records)?,
    };
    let engine = Engine::load(EngineConfig { prefix_cache: true, ..settings.engine()? })?;
    let stored = |place: &ChunkPlace| matches!(place, ChunkPlace::StoreWarm | ChunkPlace::StoreCold);
    let dir = ScratchDir::new(&settings.data_dir, "bench-ttft")?;
    let bytes = (args.chunks * settings.chunk_tokens * engine.kv_shape().token_bytes()) as u64;
    let open = || KvStore::open(&engine, dir.path(), "bench", bytes + bytes / 4 + (1 << 30), &settings.tenant);
    let store = options.places.iter().any(stored).then(open).transpose()?.map(|store| StoreProvider { store });
    let store = store.as_ref().map(|store| store as &dyn SourceProvider);
    let cold = || eval::drop_page_cache(dir.path());
    let report = with_progress(out, |progress| Ok(bench_ttft(&engine, store, &cold, &options, progress)?))?;
    engine.shutdown();
    print(&report, &report.table(), out);
    Ok(())
}

struct StoreProvider {
    store: KvStore,
}

impl SourceProvider for StoreProvider {
    fn name(&self) -> &str {
        "store"
    }

    fn sources(
        &self,
        prefix: &[u32],
        chunks: &[Vec<u32>],
    ) -> std::result::Result<Vec<Arc<dyn ChunkSource>>, Box<dyn std::error::Error + Send + Sync>> {
        chunks.iter().map(|tokens| Ok(self.store.source(prefix, tokens)?.0)).collect()
    }
}

fn report(file: &Path, records: &RecordArgs, out: &Out) -> Result<()> {
    let results = records.results.clone().unwrap_or_else(default_results_dir);
    let shown = write_report(&results, file)?;
    out.line(format!("{} from {} in {}", count(shown, "record"), results.display(), file.display()));
    Ok(())
}

/// A folder that is gone when it is no longer used.
pub(super) struct ScratchDir(PathBuf);

impl ScratchDir {
    /// Makes a folder of this name and this process below `parent`.
    pub(super) fn new(parent: &Path, name: &str) -> Result<ScratchDir> {
        let path = parent.join(format!(".{name}-{}", std::process::id()));
        create_private_dir(&path).map_err(|e| QuireError::writing(&path, e))?;
        Ok(ScratchDir(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "a scratch folder is left behind");
        }
    }
}
