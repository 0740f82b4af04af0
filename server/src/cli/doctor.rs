//! `quire doctor`: what was found here, and what to do.

use chunk_cache::{Access, ChunkStore};
use engine::{DeviceChoice, Engine, Isa, ModelSpec, Tokenizer, find_gpu, memory_limit, missing_cuda_libraries};
use serde::Serialize;

use super::output::{Out, bytes, count};
use documents::{DocumentsError, collection_names, data_dir, glance};
use service::control;
use service::store::store_dir;
use settings::{QuireError, Result, Settings};

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Good,
    Note,
    Bad,
}

#[derive(Debug, Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    found: String,
    advice: Option<String>,
}

impl Check {
    fn good(what: &'static str, found: String) -> Check {
        Check { what, verdict: Verdict::Good, found, advice: None }
    }
    fn note(what: &'static str, found: String, advice: &str) -> Check {
        Check { what, verdict: Verdict::Note, found, advice: Some(advice.into()) }
    }
    fn bad(what: &'static str, found: String, advice: String) -> Check {
        Check { what, verdict: Verdict::Bad, found, advice: Some(advice) }
    }
}

pub(super) fn run(settings: &Settings, out: &Out) -> Result<()> {
    let mut checks = vec![cpu(), memory()];
    checks.push(gpu(settings));
    checks.extend(model(settings));
    checks.extend(server(settings));
    checks.extend(data(settings));
    for check in &checks {
        if out.json {
            out.value(check);
            continue;
        }
        let mark = match check.verdict {
            Verdict::Good => "ok  ",
            Verdict::Note => "note",
            Verdict::Bad => "BAD ",
        };
        out.line(format!("{mark}  {:10} {}", check.what, check.found));
        if let Some(advice) = &check.advice {
            out.line(format!("      {:10} -> {advice}", ""));
        }
    }
    match checks.iter().filter(|c| c.verdict == Verdict::Bad).count() {
        0 => Ok(()),
        bad => Err(QuireError::CheckFailed(format!("{} to put right (BAD above)", count(bad, "thing")))),
    }
}

fn cpu() -> Check {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let sets: Vec<String> = Isa::available().iter().map(|isa| format!("{isa:?}").to_lowercase()).collect();
    let found = format!("{}, {}: {}", count(threads, "thread"), std::env::consts::ARCH, sets.join(", "));
    match Isa::detect() {
        Isa::Amx | Isa::Avx512 => Check::good("cpu", found),
        Isa::Avx2 | Isa::Scalar => Check::note("cpu", found, "without AVX-512 everything is correct, but slower"),
    }
}

fn memory() -> Check {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
    };
    memory_check(field("MemAvailable:"), field("MemTotal:"), memory_limit())
}

/// `limit`: what this process may use; less than `total` where a control group says so.
fn memory_check(free: Option<u64>, total: Option<u64>, limit: Option<u64>) -> Check {
    let (Some(free), Some(total)) = (free, total) else {
        return Check::note("memory", "unknown".into(), "/proc/meminfo cannot be read here");
    };
    let group = limit.filter(|limit| *limit < total);
    let mut found = format!("{} free of {}", bytes(free), bytes(total));
    if let Some(limit) = group {
        found += &format!(", a control group allows {}", bytes(limit));
    }
    if group.is_some_and(|limit| limit < 1 << 30) {
        return Check::note("memory", found, "less than 1 GiB is allowed: give the container or service more");
    }
    if free < 1 << 30 {
        let advice = "less than 1 GiB is free: close other programs, or lower --kv-budget-bytes";
        return Check::note("memory", found, advice);
    }
    Check::good("memory", found)
}

/// The libraries that a GPU needs, and the GPU itself. Only what was asked for and is missing is bad.
fn gpu(settings: &Settings) -> Check {
    let asked = settings.device.0 == DeviceChoice::Cuda;
    let lacking = |found: String, advice: &str| match asked {
        true => Check::bad("gpu", found, advice.into()),
        false => Check::note("gpu", found, "the CPU computes"),
    };
    if settings.device.0 == DeviceChoice::Cpu {
        return Check::good("gpu", "none used: --device is cpu".into());
    }
    if let Some(missing) = missing_cuda_libraries() {
        let advice =
            "install the NVIDIA driver and the CUDA libraries NVRTC and cuBLASLt (CUDA 12 or 13), or set --device cpu";
        return lacking(missing.into(), advice);
    }
    match find_gpu(&settings.cuda()) {
        Ok(found) => Check::good("gpu", found),
        Err(error) => lacking(error.to_string(), "check `nvidia-smi`, or set --device cpu"),
    }
}

fn model(settings: &Settings) -> Vec<Check> {
    let dir = match settings.model_dir() {
        Ok(dir) => dir,
        Err(error) => return vec![Check::bad("model", "none".into(), error.to_string())],
    };
    let fix = "point --model at a complete folder as Hugging Face publishes it";
    let spec = match ModelSpec::from_dir(&dir) {
        Ok(spec) => spec,
        Err(error) => return vec![Check::bad("model", error.to_string(), fix.into())],
    };
    let shape = format!(
        "{} ({}, {} layers, {} wide, {} tokens of context)",
        dir.display(),
        spec.family,
        spec.layers,
        spec.hidden,
        spec.max_context
    );
    let mut checks = vec![Check::good("model", shape)];
    if let Err(error) = Tokenizer::from_dir(&dir, spec.vocab) {
        checks.push(Check::bad("tokenizer", error.to_string(), fix.into()));
    }
    match settings.engine().and_then(|config| Ok(Engine::load(config)?)) {
        Ok(engine) => {
            let per_step = bytes(engine.weight_bytes_per_step() as u64);
            checks.push(Check::good(
                "weights",
                format!(
                    "loaded; {:?} instructions, {}, {per_step} read per token",
                    engine.isa(),
                    count(engine.threads(), "thread")
                ),
            ));
        }
        Err(error) => {
            use engine::EngineError::{Device, InvalidRequest, Kernel, NoDevice, OutOfMemory};
            if let QuireError::Engine(NoDevice { .. }) = &error {
                let advice = "put right what `gpu` says, or set --device cpu";
                checks.push(Check::note("weights", "not loaded: there is no usable GPU".into(), advice));
                return checks;
            }
            let fix = match &error {
                QuireError::Engine(Device { .. } | Kernel { .. }) => "check `nvidia-smi`, or set --device cpu",
                QuireError::Engine(OutOfMemory { .. }) => "free or allow more memory, or set another --device",
                QuireError::Engine(InvalidRequest(_)) => "put right the setting that it names",
                _ => fix,
            };
            checks.push(Check::bad("weights", error.to_string(), fix.into()));
        }
    }
    checks
}

/// The server that has the data folder, if one runs.
fn server(settings: &Settings) -> Option<Check> {
    Some(match control::look(&settings.data_dir)? {
        Ok(remote) => {
            let info = remote.info();
            let found =
                format!("process id {}, quire {}, model {}, {}", info.pid, info.version, info.model, info.phase);
            Check::good("server", format!("{found}: commands ask it"))
        }
        Err(error) => Check::note("server", error.full_message(), "until then, commands that write are refused"),
    })
}

fn data(settings: &Settings) -> Vec<Check> {
    let dir = &settings.data_dir;
    let mut checks = Vec::new();
    if dir.is_dir() {
        checks.push(match (data_dir::check(dir), data_dir::check_writable(dir)) {
            (Err(error), _) => Check::bad("data", error.to_string(), advice_on_folder(&error).into()),
            (_, Ok(())) => Check::good("data", dir.display().to_string()),
            (_, Err(error)) => Check::bad(
                "data",
                format!("{} cannot be written: {error}", dir.display()),
                "searching and asking work, ingesting does not: make it writable for this user, or choose another with \
                 --data-dir"
                    .into(),
            ),
        });
    } else if std::fs::symlink_metadata(dir).is_ok() {
        let found = format!("{} is no folder", dir.display());
        checks.push(Check::bad("data", found, "choose a folder, or a name that is free, with --data-dir".into()));
        return checks;
    } else {
        let found = format!("{} (not there yet)", dir.display());
        checks.push(Check::note("data", found, "`quire ingest PATH` makes it"));
    }
    checks.push(match collection_names(dir) {
        Err(error) => Check::bad("documents", error.to_string(), "see the message".into()),
        Ok(names) if names.is_empty() => {
            Check::note("documents", "no collection".into(), "`quire ingest PATH` makes one")
        }
        Ok(names) => Check::good("documents", format!("collections: {}", names.join(", "))),
    });
    if let Ok(Some(problem)) = glance(dir) {
        let advice = "`quire catalog verify` tells all of it, with --repair it saves what is whole";
        checks.push(Check::bad("catalog", problem, advice.into()));
    }
    let store = ChunkStore::open_existing(&store_dir(dir), Access::Read, settings.store_bytes());
    let room = match &store {
        Ok(Some(store)) => store.stats().byte_budget.saturating_sub(store.stats().payload_bytes),
        _ => settings.store_bytes(),
    };
    checks.extend(chunks(settings, store));
    match data_dir::free_bytes(dir) {
        Some(free) if free < room => checks.push(Check::note(
            "disk",
            format!("{} free, the cache may grow by {}", bytes(free), bytes(room)),
            "free some space, lower --cache-bytes of `quire ingest` or `quire serve`, or choose another --data-dir",
        )),
        Some(free) => checks.push(Check::good("disk", format!("{} free", bytes(free)))),
        None => checks.push(Check::note("disk", "unknown".into(), "the free space cannot be read here")),
    }
    checks
}

fn advice_on_folder(error: &DocumentsError) -> &'static str {
    match error {
        DocumentsError::NewerDataDir { .. } => "use a newer quire, or another --data-dir",
        DocumentsError::DataDirMarker { .. } => {
            "remove that file if no newer quire has written the folder: it is written again; else use another --data-dir"
        }
        _ => "make the folder readable for this user, or choose another with --data-dir",
    }
}

/// Looks into the store as one that reads only, so that nothing changes and a running server goes on.
fn chunks(
    settings: &Settings,
    store: std::result::Result<Option<ChunkStore>, chunk_cache::StoreError>,
) -> Option<Check> {
    let dir = store_dir(&settings.data_dir);
    let look = |store: &ChunkStore| -> Result<Check> {
        let stats = store.stats();
        let found = format!(
            "{}: {}, {} of at most {} (`quire cache verify` reads it all)",
            dir.display(),
            count(stats.chunks as usize, "chunk"),
            bytes(stats.payload_bytes),
            bytes(stats.byte_budget)
        );
        Ok(match ChunkStore::is_in_use(&dir)? {
            true => Check::note("chunks", format!("{found}; in use"), "nothing to do if that is your server"),
            false => Check::good("chunks", found),
        })
    };
    let bad = |error: String| Check::bad("chunks", dir.display().to_string(), error);
    match store {
        Ok(store) => store.map(|store| look(&store).unwrap_or_else(|error| bad(error.to_string()))),
        Err(error) => Some(bad(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_a_control_group_leaves_of_the_machines() {
        let gib = |n: u64| Some(n << 30);
        let found = |check: Check| (check.verdict, check.found);
        assert_eq!(found(memory_check(gib(8), gib(16), gib(16))), (Verdict::Good, "8.0 GiB free of 16.0 GiB".into()));
        let limited = "8.0 GiB free of 16.0 GiB, a control group allows 4.0 GiB";
        assert_eq!(found(memory_check(gib(8), gib(16), gib(4))), (Verdict::Good, limited.into()));
        assert_eq!(memory_check(gib(8), gib(16), Some(512 << 20)).verdict, Verdict::Note);
        assert_eq!(memory_check(Some(512 << 20), gib(16), gib(16)).verdict, Verdict::Note);
        assert_eq!(memory_check(None, None, None).verdict, Verdict::Note);
    }
}
