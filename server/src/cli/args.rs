//! The grammar of the command line.

use std::path::PathBuf;

use chunk_cache::ChunkKey;
use clap::{Parser, Subcommand};
use clap_complete::Shell;

use hub::ModelId;
use settings::{Bytes, SettingsArgs};

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
    /// What every command takes.
    #[command(flatten)]
    pub common: CommonArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What every command of every program takes.
#[derive(Debug, clap::Args)]
pub struct CommonArgs {
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
        /// Documents: paths (of a folder: all below it), other names as `quire ls` shows them, or ids
        names: Vec<String>,
        /// Remove for good
        #[arg(long, conflicts_with = "undo")]
        now: bool,
        /// Bring back what was removed; alone: list the collections that can be brought back, with their ids
        #[arg(long)]
        undo: bool,
    },
    /// List the collections, or rename one
    Collections {
        /// What to do; nothing: list them
        #[command(subcommand)]
        command: Option<CollectionsCommand>,
    },
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
    /// Look into the catalog: documents, their texts and passages, and what search rests on
    Catalog {
        /// What to do.
        #[command(subcommand)]
        command: CatalogCommand,
    },
    /// Say what was found here: device, model, store, space; and what to do
    Doctor,
    /// Settings
    Config {
        /// What to do.
        #[command(subcommand)]
        command: ConfigCommand,
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
            | Command::Collections { .. }
            | Command::Reclaim
            | Command::Search { .. }
            | Command::Ask { .. }
            | Command::Chat(_)
            | Command::Serve
            | Command::Cache { .. }
            | Command::Catalog { .. }
            | Command::Doctor
            | Command::Demo { .. } => true,
            // Models and their cache are shared with others.
            Command::Pull { .. } | Command::Config { .. } | Command::Completions { .. } => false,
        }
    }
}

/// What can be done with collections as a whole.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum CollectionsCommand {
    /// Give a collection another name; renaming it back undoes that
    Rename {
        /// The collection
        old: String,
        /// Its new name
        new: String,
    },
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
    /// Read everything and compare it with its checksums; exit code 1 if anything is damaged and stays so
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
        /// Remove chunks, in the order of --cache-policy, until so many bytes are left
        #[arg(long, value_name = "BYTES", conflicts_with_all = ["key", "all"])]
        to_bytes: Option<Bytes>,
        /// Remove all chunks, also where the disk is full
        #[arg(long, conflicts_with = "key")]
        all: bool,
    },
}

/// What can be done with the catalog.
#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Read everything and compare it with its checksums, hashes and references; exit code 1 if anything is damaged
    Verify {
        /// Write the catalog anew from all documents that are whole, and build the search indexes again
        ///
        /// Documents that cannot be saved are named; the next `quire ingest` of their files brings them in again. Takes as
        /// much space as the catalog, until it is done.
        #[arg(long)]
        repair: bool,
        /// Begin with an empty catalog where nothing can be saved; the damaged one stays beside it
        #[arg(long, requires = "repair")]
        anew: bool,
    },
}

/// What can be done with the settings.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print every setting with its value and where it came from
    Show,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use engine::Strategy;
    use settings::Named;

    #[test]
    fn settings_may_stand_behind_the_subcommand() {
        let cli = Cli::try_parse_from(["quire", "ask", "Who?", "--strategy", "window", "--top-chunks=3"]).unwrap();
        assert_eq!(cli.common.settings.top_chunks, Some(3));
        assert_eq!(cli.common.settings.strategy, Some(Named(Strategy::Window)));
        let error = Cli::try_parse_from(["quire", "ask", "Who?", "--strategy", "magic"]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("retrieval"), "{error}");
    }
}
