//! The grammar of the command line.

use std::path::PathBuf;

use ann_index::IndexKind;
use clap::{Parser, Subcommand};
use engine::{BlendMode, Strategy};
use eval::{CheckpointShape, ChunkPlace};
use quire::cli::CommonArgs;
use settings::Named;

use super::cache::CacheArgs;
use super::library::LibraryArgs;
use super::quality::{EvalArgs, QuestionsArgs};
use super::store_args::{CrashArgs, StoreArgs};

/// Where measurements are recorded.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RecordArgs {
    /// Folder of the records [default: eval/results of the source tree]
    #[arg(long, value_name = "FOLDER", conflicts_with = "no_records")]
    pub(crate) results: Option<PathBuf>,
    /// Write no records
    #[arg(long)]
    pub(crate) no_records: bool,
    /// The commit that the program was built from, for the records [default: what git says of the current folder]
    #[arg(long, value_name = "HASH", conflicts_with = "no_records")]
    pub(crate) commit: Option<String>,
    /// Name of this machine in the records [default: cpu2 with two cores, otherwise a description]
    #[arg(long, value_name = "NAME", conflicts_with = "no_records")]
    pub(crate) machine: Option<String>,
}

/// Measures Quire: its speed, what it survives, the quality of its answers
///
/// Settings are those of `quire`, from the same flags, variables and files; every measurement is recorded in eval/results,
/// unless --no-records is given.
#[derive(Debug, Parser)]
#[command(name = "quire-bench", version, arg_required_else_help = true)]
#[command(
    after_help = "`quire-bench COMMAND --help` lists the settings that a command uses, `quire config show` all of them.\n\
    Exit codes: 0 done; 1 failed; 2 wrong usage or a wrong setting."
)]
pub(crate) struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    /// What to measure.
    #[command(subcommand)]
    pub(crate) command: BenchCommand,
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Quality of answers, per task, length and configuration
    Eval(EvalArgs),
    /// Make questions over passages of XQuAD or MuSiQue, for `eval --data`
    Questions(QuestionsArgs),
    /// Reading prompts, beside transformers
    Prefill(SpeedArgs),
    /// Writing answers, beside transformers and the floor of bytes; one at a time, or with --batch many
    Decode(Box<DecodeArgs>),
    /// Time between tokens of answers while long prompts arrive, and without them
    Serve(ServeBenchArgs),
    /// From starting `quire serve` to readiness, with the model's files in the page cache
    Start {
        /// Timed starts
        #[arg(long, default_value_t = 5)]
        repeats: usize,
        /// Seconds that a start may take
        #[arg(long, default_value_t = 300)]
        limit: u64,
        /// First part of the records' case
        #[arg(long, default_value = "ref")]
        label: String,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// The server under many requests at once, and beside connections that never finish a request
    Http {
        /// Chat completions that the `openai` client sends at once
        #[arg(long, default_value_t = 200)]
        requests: usize,
        /// Connections that stay half open
        #[arg(long, default_value_t = 2000)]
        connections: usize,
        /// Python with the public `openai` package
        #[arg(long, default_value = "python3")]
        python: PathBuf,
        /// Seconds that the server may take to become ready
        #[arg(long, default_value_t = 300)]
        limit: u64,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// A GPU's attention of one token over a long context, beside cuDNN's
    AttentionDecode {
        /// Tokens of context
        #[arg(long, default_value_t = 131_072)]
        tokens: usize,
        /// Sequences, separated by commas
        #[arg(long, value_delimiter = ',', default_value = "1,8")]
        batch: Vec<usize>,
        /// Calls of a round
        #[arg(long, default_value_t = 20)]
        repeats: usize,
        /// Timed rounds
        #[arg(long, default_value_t = 3)]
        rounds: usize,
        /// Python with torch and transformers on the GPU, for the comparison
        #[arg(long, default_value = "python3")]
        python: PathBuf,
        /// Measure Quire alone
        #[arg(long)]
        no_peer: bool,
        /// First part of the records' case
        #[arg(long, default_value = "8b")]
        label: String,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// What it costs to learn how much of their attention chunks keep to themselves, while they are read
    AttentionSums {
        /// Tokens of the prompts, separated by commas
        #[arg(long, value_delimiter = ',', default_value = "8192")]
        lengths: Vec<usize>,
        /// Timed rounds
        #[arg(long, default_value_t = 9)]
        repeats: usize,
        /// First part of the records' case
        #[arg(long, default_value = "8b")]
        label: String,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// Write a model folder with random weights, to measure with; tokenizer and prompt format are those of --model
    Checkpoint {
        /// Folder to write
        dir: PathBuf,
        /// `8b` (Llama-3.1-8B, 16 GB) or `tiny`
        #[arg(long, default_value = "8b")]
        shape: Named<CheckpointShape>,
        /// Seed of the weights
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Time to first token: full recompute, reuse and cacheblend
    Blend {
        /// Context lengths in tokens, separated by commas
        #[arg(long, value_delimiter = ',', default_value = "2048,4096,8192")]
        lengths: Vec<usize>,
        /// Timed rounds
        #[arg(long, default_value_t = 5)]
        repeats: usize,
        /// Text of the prompts: `generated`, or a file or folder of JSON lines
        #[arg(long, default_value = "generated")]
        data: String,
        /// First part of the records' case
        #[arg(long, default_value = "ref")]
        label: String,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// Time to first token by where cached chunks are kept, beside full recompute and the prefix cache
    Ttft(TtftArgs),
    /// A GPU's attention of query rows that lie scattered over a context, beside that of a whole prompt
    AttentionScattered {
        /// Tokens of context
        #[arg(long, default_value_t = 32_768)]
        tokens: usize,
        /// Rows, in percent of them
        #[arg(long, default_value_t = 10)]
        percent: u32,
        /// Timed calls
        #[arg(long, default_value_t = 20)]
        repeats: usize,
        /// First part of the records' case
        #[arg(long, default_value = "8b")]
        label: String,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// Indexes: recall against keys read and time, beside hnswlib, faiss and usearch
    Index(Box<IndexArgs>),
    /// Read bandwidth of memory
    Membw {
        /// Repetitions
        #[arg(long, default_value_t = 5)]
        repeats: usize,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// The chunk store: bytes written and freed, rates of reading, time to open
    Store(StoreArgs),
    /// What caches of chunks save by their policy of eviction, beside the prefix cache: simulated
    Cache(CacheArgs),
    /// Chat templates of public models, rendered here and by Hugging Face transformers
    Templates {
        /// Python interpreter that imports transformers and jinja2
        #[arg(long, value_name = "PROGRAM", default_value = "python3")]
        python: PathBuf,
        /// Folder of packages that carry templates; scripts/chat_templates.sh brings some
        #[arg(long, value_name = "FOLDER")]
        packages: PathBuf,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// Kill an ingest at random moments and check what is left
    Crash(CrashArgs),
    /// How soon many small notes can be searched
    Library(LibraryArgs),
    /// Works on a library until the drill kills it
    #[command(hide = true)]
    CrashWorker {
        /// What to do, as the drill writes it
        orders: PathBuf,
    },
    /// Finding passages: recall over questions whose passages are known, and the time of an enormous query
    Search {
        /// Passages with questions: SQuAD's format, or a list of ctxs, question and answers; may be repeated
        #[arg(long, value_name = "FILE")]
        data: Vec<PathBuf>,
        /// Distinct words of the enormous query
        #[arg(long, default_value_t = 200_000)]
        words: usize,
        /// Times that it is sent
        #[arg(long, default_value_t = 5)]
        repeats: usize,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// Which listed faults are mended, as logs of `cargo test` show
    Faults {
        /// The list: tables whose last column, `test`, names tests
        #[arg(long, value_name = "FILE", default_value = "docs/faults.md")]
        list: PathBuf,
        /// What a run of `cargo test` printed; once for each run
        #[arg(long = "log", value_name = "FILE", required = true)]
        logs: Vec<PathBuf>,
        /// Faults whose tests were ignored, as those for a GPU, are no failure
        #[arg(long)]
        allow_ignored: bool,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
    /// Make the tables of all records
    Report {
        /// File to write
        #[arg(long, value_name = "FILE", default_value = "docs/results.md")]
        out: PathBuf,
        /// Records.
        #[command(flatten)]
        records: RecordArgs,
    },
}

/// Prompts of cached chunks.
#[derive(Debug, clap::Args)]
pub(crate) struct TtftArgs {
    /// Chunks of the prompt; --chunk-tokens says how long each is
    #[arg(long, default_value_t = 10)]
    pub(crate) chunks: usize,
    /// Tokens of the question
    #[arg(long, default_value_t = 64)]
    pub(crate) question: usize,
    /// Where the chunks are, separated by commas: device, host, rocksdb-warm, rocksdb-cold
    #[arg(long, value_delimiter = ',', default_value = "host,rocksdb-warm,rocksdb-cold")]
    pub(crate) from: Vec<Named<ChunkPlace>>,
    /// Rules beside the settings' own, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub(crate) rules: Vec<Named<BlendMode>>,
    /// Timed rounds
    #[arg(long, default_value_t = 5)]
    pub(crate) repeats: usize,
    /// First part of the records' case
    #[arg(long, default_value = "ref")]
    pub(crate) label: String,
    /// What stands between label and rule in the records' case [default: CHUNKSxTOKENS/PLACE]
    #[arg(long, value_name = "NAME")]
    pub(crate) case: Option<String>,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

/// A comparison of speed.
#[derive(Debug, clap::Args)]
pub(crate) struct SpeedArgs {
    /// Prompt lengths in tokens, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "2048,8192")]
    pub(crate) lengths: Vec<usize>,
    /// Timed rounds
    #[arg(long, default_value_t = 5)]
    pub(crate) repeats: usize,
    /// Tokens to decode
    #[arg(long, default_value_t = 64)]
    pub(crate) tokens: usize,
    /// Decode strategies, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "full")]
    pub(crate) strategies: Vec<Named<Strategy>>,
    /// Text of the prompts: `generated`, or a file or folder of JSON lines
    #[arg(long, default_value = "generated")]
    pub(crate) data: String,
    /// Python with torch and transformers, for the comparison
    #[arg(long, default_value = "python3")]
    pub(crate) python: PathBuf,
    /// Measure Quire alone
    #[arg(long)]
    pub(crate) no_peer: bool,
    /// First part of the records' case
    #[arg(long, default_value = "ref")]
    pub(crate) label: String,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

/// Answers one at a time, or many.
#[derive(Debug, clap::Args)]
pub(crate) struct DecodeArgs {
    /// What one comparison needs.
    #[command(flatten)]
    pub(crate) speed: SpeedArgs,
    /// Sequences that decode at the same time, separated by commas; cases become LABEL/LENGTH/bBATCH/STRATEGY
    #[arg(long, value_delimiter = ',')]
    pub(crate) batch: Vec<usize>,
    /// Draws from the likeliest tokens of this probability in all; a batch draws at --temperature, and its cases become
    /// LABEL/LENGTH/bBATCH/STRATEGY/tTEMPERATURE-kTOP_K-pTOP_P
    #[arg(long, default_value_t = 1.0, requires = "batch", allow_negative_numbers = true)]
    pub(crate) top_p: f32,
    /// Draws from so many likeliest tokens; 0: from all
    #[arg(long, default_value_t = 0, requires = "batch")]
    pub(crate) top_k: usize,
    /// Prompts of a batch
    #[arg(long, value_enum, default_value = "random", requires = "batch")]
    pub(crate) prompt: PromptArg,
    /// The length's name in the records' case, with one length [default: `short` up to 512 tokens, `2k` for 2048]
    #[arg(long, value_name = "NAME", requires = "batch")]
    pub(crate) length_name: Option<String>,
    /// Device of the comparison, as PyTorch names it; it gets random weights of the model's shape
    #[arg(long, default_value = "cuda", requires = "batch")]
    pub(crate) peer_device: String,
}

/// What prompts of a batch are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum PromptArg {
    /// Tokens drawn at random, other ones for every sequence
    Random,
    /// The text that --data names, the same for every sequence
    Text,
}

/// Answers beside arriving prompts.
#[derive(Debug, clap::Args)]
pub(crate) struct ServeBenchArgs {
    /// Sequences that decode all the time
    #[arg(long, default_value_t = 16)]
    pub(crate) sequences: usize,
    /// Tokens of their prompts
    #[arg(long, default_value_t = 512)]
    pub(crate) context: usize,
    /// Tokens that each may write at most
    #[arg(long, default_value_t = 4096)]
    pub(crate) answer_tokens: usize,
    /// Tokens that each writes without arrivals
    #[arg(long, default_value_t = 128)]
    pub(crate) alone: usize,
    /// Prompts that arrive
    #[arg(long, default_value_t = 8)]
    pub(crate) arrivals: usize,
    /// Tokens of each of them
    #[arg(long, default_value_t = 8192)]
    pub(crate) arrival_tokens: usize,
    /// Arrivals a second [default: each when the one before has its first token]
    #[arg(long)]
    pub(crate) rate: Option<f64>,
    /// Instead of prompts: chunks are ingested all the time, and each arrival is a question over the newest of them
    #[arg(long, conflicts_with = "rate")]
    pub(crate) ingest: bool,
    /// Tokens of a chunk that is ingested
    #[arg(long, default_value_t = 512, requires = "ingest")]
    pub(crate) chunk_tokens: usize,
    /// Seed of all prompts
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// First part of the records' case
    #[arg(long, default_value = "ref")]
    pub(crate) label: String,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

/// What [`IndexArgs`] can search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum IndexDataArg {
    /// Made-up keys, and queries that are not distributed like them
    Ood,
    /// Made-up keys, and queries that are
    In,
    /// Keys and queries of the model's heads
    Model,
}

/// A comparison of indexes.
#[derive(Debug, clap::Args)]
pub(crate) struct IndexArgs {
    /// What is searched, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "ood,in")]
    pub(crate) sets: Vec<IndexDataArg>,
    /// Made-up keys
    #[arg(long, default_value_t = 131_072)]
    pub(crate) keys: usize,
    /// Sample queries for made-up keys
    #[arg(long, default_value_t = 32_768)]
    pub(crate) samples: usize,
    /// Queries to choose settings with, and as many others to report figures for
    #[arg(long, default_value_t = 1000)]
    pub(crate) queries: usize,
    /// Seed of what is made up
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Indexes, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "flat,graph,clusters,hnsw")]
    pub(crate) kinds: Vec<Named<IndexKind>>,
    /// Timed rounds
    #[arg(long, default_value_t = 3)]
    pub(crate) repeats: usize,
    /// Texts for the model's heads, in tokens, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "8192")]
    pub(crate) lengths: Vec<usize>,
    /// Retrieval tasks for the model's heads: `generated`, or a file or folder of JSON lines
    #[arg(long, default_value = "generated")]
    pub(crate) data: String,
    /// Running text for the model's heads: a text file, or JSON lines with texts in `document`
    #[arg(long, value_name = "FILE")]
    pub(crate) text: Option<PathBuf>,
    /// Texts of each kind and length for the model's heads
    #[arg(long, default_value_t = 2)]
    pub(crate) texts: usize,
    /// Python with faiss, hnswlib and usearch, for the comparison
    #[arg(long, default_value = "python3")]
    pub(crate) python: PathBuf,
    /// Measure Quire alone
    #[arg(long)]
    pub(crate) no_peer: bool,
    /// Folder for curves [default: draw none]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) figures: Option<PathBuf>,
    /// First part of the records' case for the model's heads
    #[arg(long, default_value = "model")]
    pub(crate) label: String,
    /// Records.
    #[command(flatten)]
    pub(crate) records: RecordArgs,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn options_of_batches_need_a_batch() {
        let parse = |words: &str| Cli::try_parse_from(["quire-bench", "decode"].into_iter().chain(words.split(' ')));
        for words in ["--length-name short", "--prompt text", "--peer-device cpu"] {
            assert!(parse(words).unwrap_err().to_string().contains("--batch"), "{words}");
        }
        let cli = parse("--batch 1,64 --lengths 2048 --machine h200").unwrap();
        let BenchCommand::Decode(args) = cli.command else { unreachable!() };
        assert_eq!((args.batch, args.prompt, args.speed.lengths), (vec![1, 64], PromptArg::Random, vec![2048]));
        assert_eq!(args.speed.records.machine.as_deref(), Some("h200"));
        assert!(Cli::try_parse_from(["quire-bench", "checkpoint", "x", "--shape", "9b"]).is_err());
    }
}
