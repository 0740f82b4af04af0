//! Quality tasks, speed benches and the records that both write.
//!
//! A tour:
//!
//! * [`run_quality`] asks questions over contexts of chunks under every way of serving them (full attention, window,
//!   retrieval, reuse of chunks with and without repair) and judges the answers. Contexts come from
//!   [`DataSource::Generated`] (made here, seeded) or from files; [`make_data`] makes such files of published questions over
//!   passages. Beside full recompute it says what each configuration loses, question by question ([`Paired`]).
//! * [`bench_prefill`] and [`bench_decode`] time the engine side by side with Hugging Face transformers and against the
//!   floor that [`bench_membw`]'s rates set; [`bench_blend`] times cached contexts against recomputed ones.
//! * [`bench_batch_decode`] times batches of answers against the floor of the engine's device, [`bench_mixed_load`]
//!   answers while long prompts arrive, [`bench_attention_decode`] a device's attention beside cuDNN's;
//!   [`write_checkpoint`] writes a model of random weights for them.
//! * [`bench_index`] measures indexes beside hnswlib, faiss and usearch, on made-up keys and on those of a model's heads.
//! * [`bench_cache`] simulates what caches of chunks save by their policy of eviction, beside a prefix cache.
//! * [`bench_templates`] renders chat templates of public models here and by transformers, and shows where they differ.
//! * [`bench_faults`] says which faults of a list are shown to be mended by what tests printed.
//! * [`Record`] is one measured figure, [`RecordLog`] a folder of JSON lines files that only grow; a later record
//!   supersedes an earlier one of the same bench, case, metric and machine. [`markdown_report`] makes tables of them.
//!
//! Nothing here parses a command line or prints: options come in as plain structures, news goes to a callback, and
//! reports come back.
//!
//! ```
//! use eval::{GenerateOptions, generate, score};
//!
//! let options = GenerateOptions { tasks: vec!["kv".into()], lengths: vec![1024], samples: 1, seed: 1 };
//! let contexts = generate(&options, &|text| text.len() / 3)?;
//! let question = &contexts[0].questions[0];
//! assert!(contexts[0].chunks.iter().any(|chunk| chunk.contains(&question.answers[0])));
//! assert!(score("kv", &question.answers[0], &question.answers).exact);
//! # Ok::<(), eval::EvalError>(())
//! ```

mod ask;
mod cache;
mod drill;
mod error;
mod faults;
mod process;
mod progress;
mod quality;
mod record;
mod report;
mod speed;
mod stats;
mod tasks;
mod templates;

pub use cache::{CacheBenchOptions, CacheBenchReport, bench_cache};
pub use drill::failing_disk::{self, FailingDisk};
pub use drill::{DrillOptions, DrillReport, drill_bitflips, drill_full_disk};
pub use error::{EvalError, Result};
pub use faults::{FaultsOptions, FaultsReport, bench_faults};
pub use progress::Progress;
pub use quality::{Agreement, Cell, Cost, Paired, QualityOptions, QualityReport, config_names, run_quality};
pub use record::{Output, Record, RecordLog, RunInfo, default_results_dir};
pub use report::{markdown_report, write_report};
pub use speed::{
    AttentionOptions, AttentionShape, AttentionSumsOptions, BatchDecodeOptions, BlendBenchOptions, BlendReport,
    CheckpointOptions, CheckpointReport, CheckpointShape, ChunkPlace, DecodePeers, DeviceAttention, GpuPeerOptions,
    HeadOptions, IndexBenchOptions, IndexData, MembwOptions, MembwReport, MixedLoadOptions, PeerOptions, PromptSource,
    Scattered, ScatteredOptions, SourceProvider, SpeedOptions, SpeedReport, StoreBenchOptions, StoreBenchReport,
    TtftOptions, bench_attention_decode, bench_attention_sums, bench_batch_decode, bench_blend, bench_decode,
    bench_index, bench_ingest_load, bench_membw, bench_mixed_load, bench_prefill, bench_scattered, bench_store,
    bench_ttft, drop_page_cache, time_decode_peers, write_checkpoint,
};
pub use stats::{bootstrap_mean95, mean, median, percentile, wilson95};
pub use tasks::{
    Context, DataSource, GENERATED_TASKS, GenerateOptions, MadeData, MakeOptions, Question, Score, Size, generate,
    load_files, make_data, normalize_squad, reference_outputs, score, task_names, write_contexts,
};
pub use templates::{TemplateDifference, TemplateOptions, TemplateReport, bench_templates};
