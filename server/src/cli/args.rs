//! The grammar of the command line.

use std::path::PathBuf;

use ann_index::IndexKind;
use chunk_cache::ChunkKey;
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use engine::Strategy;
use eval::CheckpointShape;

use super::bench_library::LibraryArgs;
use super::eval::EvalArgs;
use super::store_args::{CrashArgs, StoreArgs};
use crate::config::{Bytes, Named, SettingsArgs};
use hub::ModelId;

/// Answers questions over documents, with attention state that is computed once per passage
///
/// Every setting is a flag, an environment variable (QUIRE_TOP_CHUNKS for --top-chunks) and a key of files
/// (top_chunks). Flags win, then the environment, then quire.toml in the current folder (or the file that --config
/// names), then quire/quire.toml in $XDG_CONFIG_HOME or ~/.config. Who may come in and where is written (host,
/// api_key, data_dir and others) is not decided by a quire.toml that lies in the current folder.
///
/// Sizes take units: 8G, 512M, 1.5GiB. Switches are --prefix-cache and --no-prefix-cache.
#[derive(Debug, Parser)]
#[command(name = "quire", version, arg_required_else_help = true)]
#[command(
    after_help = "`quire COMMAND --help` lists the settings that a command uses, `quire config show` all of them.\n\
    Exit codes: 0 done; 1 failed, or some of it (the others are done and kept); 2 wrong usage or a wrong setting."
)]
pub struct Cli {
    /// File of settings [default: quire.toml in the current folder, if it is there]
    #[arg(long, global = true, value_name = "FILE", hide_short_help = true)]
    pub config: Option<PathBuf>,
    /// Print machine-readable results, one JSON object a line
    #[arg(short, long, global = true)]
    pub json: bool,
    /// Print more to stderr: what an answer cost
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Print results and errors only: no remarks, no progress
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// The settings.
    #[command(flatten)]
    pub settings: SettingsArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Read documents (text, Markdown; folders to every depth) into a collection
    Ingest {
        /// Files and folders
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// Also remove documents of the collection whose files were below these paths and are gone
        #[arg(long)]
        sync: bool,
    },
    /// List the documents of a collection
    Ls {
        /// The collection [default: that of --collection]
        #[arg(value_name = "COLLECTION")]
        name: Option<String>,
    },
    /// Remove documents from a collection, or with --collection alone the whole collection
    ///
    /// What is removed can be restored with --undo until `quire reclaim`; with --now it is gone for good, down to the bytes
    /// on disk, which takes as long as reading and writing all documents.
    Rm {
        /// Documents: paths or other names as `quire ls` shows them, or ids
        names: Vec<String>,
        /// Remove for good
        #[arg(long, conflicts_with = "undo")]
        now: bool,
        /// Bring back what was removed
        #[arg(long)]
        undo: bool,
    },
    /// List the collections
    Collections,
    /// Remove for good what was removed and could still be restored: texts, tokens, cached chunks, words of the index
    Reclaim,
    /// Find passages by their words
    Search {
        /// What to look for; several words need no quotation marks
        #[arg(required = true)]
        query: Vec<String>,
    },
    /// Answer a question over a collection
    Ask {
        /// The question; several words need no quotation marks
        #[arg(required = true)]
        question: Vec<String>,
        /// Also answer with everything computed anew, and print both times to first token
        #[arg(long)]
        compare: bool,
    },
    /// Converse with the model: on a terminal, or one turn a line from a pipe
    ///
    /// A line that ends with \ goes on in the next one; """ begins and ends a text of several lines. /help lists the
    /// commands. Ctrl-C ends an answer, Ctrl-D the conversation. Once the context is full, the oldest turns are
    /// forgotten, and it is said so. From a pipe, the first error ends the conversation.
    Chat(ChatArgs),
    /// Fetch a model from the Hugging Face hub; from then on --model takes its name
    Pull {
        /// The model: OWNER/NAME, or OWNER/NAME@REVISION with a branch, tag or commit
        #[arg(value_name = "MODEL")]
        id: ModelId,
    },
    /// Serve the OpenAI-compatible API
    Serve,
    /// Look into the store of cached chunks
    Cache {
        /// What to do.
        #[command(subcommand)]
        command: CacheCommand,
    },
    /// Say what was found here: device, model, store, space; and what to do
    Doctor,
    /// Settings
    Config {
        /// What to do.
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Measure the quality of answers, per task, length and configuration
    Eval(EvalArgs),
    /// Measure speed and safety
    Bench {
        /// What to measure.
        #[command(subcommand)]
        command: BenchCommand,
    },
    /// Show on the example documents what Quire does
    Demo {
        /// Folder with documents and questions.jsonl [default: the examples beside the program]
        #[arg(long, value_name = "FOLDER")]
        documents: Option<PathBuf>,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

impl Command {
    /// Whether what it writes may hold texts of documents or conversations, so that nobody else may read it.
    pub(super) fn reads_documents(&self) -> bool {
        match self {
            Command::Ingest { .. }
            | Command::Ls { .. }
            | Command::Rm { .. }
            | Command::Collections
            | Command::Reclaim
            | Command::Search { .. }
            | Command::Ask { .. }
            | Command::Chat(_)
            | Command::Serve
            | Command::Cache { .. }
            | Command::Doctor
            | Command::Demo { .. } => true,
            // Models and their cache are shared with others; records and reports are published.
            Command::Pull { .. }
            | Command::Config { .. }
            | Command::Eval(_)
            | Command::Bench { .. }
            | Command::Completions { .. } => false,
        }
    }
}

/// How a conversation goes.
#[derive(Debug, clap::Args)]
pub struct ChatArgs {
    /// Instruction in front of everything that is said
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Answer every turn over the documents of the collection; --collection asks for it, too
    #[arg(long)]
    pub documents: bool,
    /// Print tokens and times of every turn, as --verbose does
    #[arg(long)]
    pub stats: bool,
    /// Keep nothing of what is typed; otherwise it is kept in quire/chat_history in $XDG_STATE_HOME or ~/.local/state
    #[arg(long)]
    pub no_history: bool,
}

/// What can be done with the chunk store.
#[derive(Debug, Subcommand)]
pub enum CacheCommand {
    /// Chunks, tokens and bytes
    Stats,
    /// List all chunks
    Ls,
    /// Read everything and compare it with its checksums; exit code 1 if anything is damaged
    Verify {
        /// Remove what is damaged: it is computed again when it is needed
        #[arg(long)]
        repair: bool,
    },
    /// Remove chunks; they are computed again when they are needed
    Evict {
        /// Remove this chunk
        #[arg(long, value_name = "KEY", required_unless_present_any = ["all", "to_bytes"])]
        key: Vec<ChunkKey>,
        /// Remove the least recently used chunks until so many bytes are left
        #[arg(long, value_name = "BYTES", conflicts_with_all = ["key", "all"])]
        to_bytes: Option<Bytes>,
        /// Remove all chunks, also where the disk is full
        #[arg(long, conflicts_with = "key")]
        all: bool,
    },
}

/// What can be done with the settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every setting with its value and where it came from
    Show,
}

/// Where measurements are recorded.
#[derive(Clone, Debug, clap::Args)]
pub struct RecordArgs {
    /// Folder of the records [default: eval/results of the source tree]
    #[arg(long, value_name = "FOLDER", conflicts_with = "no_records")]
    pub results: Option<PathBuf>,
    /// Write no records
    #[arg(long)]
    pub no_records: bool,
    /// The commit that the program was built from, for the records [default: what git says of the current folder]
    #[arg(long, value_name = "HASH", conflicts_with = "no_records")]
    pub commit: Option<String>,
    /// Name of this machine in the records [default: cpu2 with two cores, otherwise a description]
    #[arg(long, value_name = "NAME", conflicts_with = "no_records")]
    pub machine: Option<String>,
}

/// What of speed and safety is measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
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

/// A comparison of speed.
#[derive(Debug, clap::Args)]
pub struct SpeedArgs {
    /// Prompt lengths in tokens, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "2048,8192")]
    pub lengths: Vec<usize>,
    /// Timed rounds
    #[arg(long, default_value_t = 5)]
    pub repeats: usize,
    /// Tokens to decode
    #[arg(long, default_value_t = 64)]
    pub tokens: usize,
    /// Decode strategies, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "full")]
    pub strategies: Vec<Named<Strategy>>,
    /// Text of the prompts: `generated`, or a file or folder of JSON lines
    #[arg(long, default_value = "generated")]
    pub data: String,
    /// Python with torch and transformers, for the comparison
    #[arg(long, default_value = "python3")]
    pub python: PathBuf,
    /// Measure Quire alone
    #[arg(long)]
    pub no_peer: bool,
    /// First part of the records' case
    #[arg(long, default_value = "ref")]
    pub label: String,
    /// Records.
    #[command(flatten)]
    pub records: RecordArgs,
}

/// Answers one at a time, or many.
#[derive(Debug, clap::Args)]
pub struct DecodeArgs {
    /// What one comparison needs.
    #[command(flatten)]
    pub speed: SpeedArgs,
    /// Sequences that decode at the same time, separated by commas; cases become LABEL/LENGTH/bBATCH/STRATEGY
    #[arg(long, value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Draws from the likeliest tokens of this probability in all; a batch draws at --temperature, and its cases become
    /// LABEL/LENGTH/bBATCH/STRATEGY/tTEMPERATURE-kTOP_K-pTOP_P
    #[arg(long, default_value_t = 1.0, requires = "batch", allow_negative_numbers = true)]
    pub top_p: f32,
    /// Draws from so many likeliest tokens; 0: from all
    #[arg(long, default_value_t = 0, requires = "batch")]
    pub top_k: usize,
    /// Prompts of a batch
    #[arg(long, value_enum, default_value = "random", requires = "batch")]
    pub prompt: PromptArg,
    /// The length's name in the records' case, with one length [default: `short` up to 512 tokens, `2k` for 2048]
    #[arg(long, value_name = "NAME", requires = "batch")]
    pub length_name: Option<String>,
    /// Device of the comparison, as PyTorch names it; it gets random weights of the model's shape
    #[arg(long, default_value = "cuda", requires = "batch")]
    pub peer_device: String,
}

/// What prompts of a batch are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum PromptArg {
    /// Tokens drawn at random, other ones for every sequence
    Random,
    /// The text that --data names, the same for every sequence
    Text,
}

/// Answers beside arriving prompts.
#[derive(Debug, clap::Args)]
pub struct ServeBenchArgs {
    /// Sequences that decode all the time
    #[arg(long, default_value_t = 16)]
    pub sequences: usize,
    /// Tokens of their prompts
    #[arg(long, default_value_t = 512)]
    pub context: usize,
    /// Tokens that each may write at most
    #[arg(long, default_value_t = 4096)]
    pub answer_tokens: usize,
    /// Tokens that each writes without arrivals
    #[arg(long, default_value_t = 128)]
    pub alone: usize,
    /// Prompts that arrive
    #[arg(long, default_value_t = 8)]
    pub arrivals: usize,
    /// Tokens of each of them
    #[arg(long, default_value_t = 8192)]
    pub arrival_tokens: usize,
    /// Arrivals a second [default: each when the one before has its first token]
    #[arg(long)]
    pub rate: Option<f64>,
    /// Seed of all prompts
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// First part of the records' case
    #[arg(long, default_value = "ref")]
    pub label: String,
    /// Records.
    #[command(flatten)]
    pub records: RecordArgs,
}

/// What [`IndexArgs`] can search.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IndexDataArg {
    /// Made-up keys, and queries that are not distributed like them
    Ood,
    /// Made-up keys, and queries that are
    In,
    /// Keys and queries of the model's heads
    Model,
}

/// A comparison of indexes.
#[derive(Debug, clap::Args)]
pub struct IndexArgs {
    /// What is searched, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "ood,in")]
    pub sets: Vec<IndexDataArg>,
    /// Made-up keys
    #[arg(long, default_value_t = 131_072)]
    pub keys: usize,
    /// Sample queries for made-up keys
    #[arg(long, default_value_t = 32_768)]
    pub samples: usize,
    /// Queries to choose settings with, and as many others to report figures for
    #[arg(long, default_value_t = 1000)]
    pub queries: usize,
    /// Seed of what is made up
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Indexes, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "flat,graph,clusters,hnsw")]
    pub kinds: Vec<Named<IndexKind>>,
    /// Timed rounds
    #[arg(long, default_value_t = 3)]
    pub repeats: usize,
    /// Texts for the model's heads, in tokens, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "8192")]
    pub lengths: Vec<usize>,
    /// Retrieval tasks for the model's heads: `generated`, or a file or folder of JSON lines
    #[arg(long, default_value = "generated")]
    pub data: String,
    /// Running text for the model's heads: a text file, or JSON lines with texts in `document`
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Texts of each kind and length for the model's heads
    #[arg(long, default_value_t = 2)]
    pub texts: usize,
    /// Python with faiss, hnswlib and usearch, for the comparison
    #[arg(long, default_value = "python3")]
    pub python: PathBuf,
    /// Measure Quire alone
    #[arg(long)]
    pub no_peer: bool,
    /// Folder for curves [default: draw none]
    #[arg(long, value_name = "FOLDER")]
    pub figures: Option<PathBuf>,
    /// First part of the records' case for the model's heads
    #[arg(long, default_value = "model")]
    pub label: String,
    /// Records.
    #[command(flatten)]
    pub records: RecordArgs,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn settings_may_stand_behind_the_subcommand() {
        let cli = Cli::try_parse_from(["quire", "ask", "Who?", "--strategy", "window", "--top-chunks=3"]).unwrap();
        assert_eq!(cli.settings.top_chunks, Some(3));
        assert_eq!(cli.settings.strategy, Some(Named(Strategy::Window)));
        let error = Cli::try_parse_from(["quire", "ask", "Who?", "--strategy", "magic"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("retrieval"), "{error}");
    }

    #[test]
    fn options_of_batches_need_a_batch() {
        let parse = |words: &str| Cli::try_parse_from(["quire", "bench", "decode"].into_iter().chain(words.split(' ')));
        for words in ["--length-name short", "--prompt text", "--peer-device cpu"] {
            assert!(parse(words).unwrap_err().to_string().contains("--batch"), "{words}");
        }
        let cli = parse("--batch 1,64 --lengths 2048 --machine h200").unwrap();
        let Command::Bench { command: BenchCommand::Decode(args) } = cli.command else { unreachable!() };
        assert_eq!((args.batch, args.prompt, args.speed.lengths), (vec![1, 64], PromptArg::Random, vec![2048]));
        assert_eq!(args.speed.records.machine.as_deref(), Some("h200"));
        assert!(Cli::try_parse_from(["quire", "bench", "checkpoint", "x", "--shape", "9b"]).is_err());
    }
}
