//! The command line: one subcommand per file, all of them over the service.

mod answer_view;
mod args;
mod ask;
mod asking;
mod cache;
mod catalog;
mod chat;
mod config;
mod demo;
mod doctor;
mod documents;
mod ingest;
mod output;
mod parse;
mod pull;
mod serve;
mod terminal;
mod unused;

pub use args::{Cli, Command, CommonArgs};
pub use output::{Out, count};
pub use parse::{grammar, parse, parse_as};
pub use terminal::safe;

use std::io::Write;
use std::process::ExitCode;

use settings::{Config, QuireError, Result};

/// Runs a parsed command line and says with which code the process ends: 0 done, 1 failed, 2 wrong usage.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let out = Out::new(&cli.common);
    let outcome = dispatch(cli, &out).map_err(|error| (error.full_message(), error.exit_code()));
    out.end(outcome)
}

/// Prints help, the version, or what is wrong with the words of a command line, and says with which code to end.
#[must_use]
pub fn print_usage(usage: &clap::Error) -> ExitCode {
    let printed = match usage.use_stderr() {
        // It quotes words, which may be names of files.
        true => writeln!(std::io::stderr().lock(), "{}", terminal::safe(usage.render().to_string().trim_end())),
        false => usage.print(),
    };
    match printed {
        Ok(()) => ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2)),
        Err(_) => ExitCode::FAILURE,
    }
}

fn dispatch(cli: Cli, out: &Out) -> Result<()> {
    if let Command::Completions { shell } = cli.command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut parse::command(), "quire", &mut script);
        out.text(&String::from_utf8_lossy(&script));
        return Ok(());
    }
    let config = load_config(&cli.common)?;
    let settings = &config.settings;
    if cli.command.reads_documents() {
        crate::process::keep_files_private();
    }
    match cli.command {
        Command::Ingest { paths, sync } => ingest::run(&config, &paths, sync, out),
        Command::Ls { name } => documents::ls(&config, name, out),
        Command::Rm { names, now, undo } => {
            let whole = cli.common.settings.collection.is_some();
            documents::rm(&config, &documents::Removal { names, now, undo, whole }, out)
        }
        Command::Collections { command: None } => documents::collections(&config, out),
        Command::Collections { command: Some(args::CollectionsCommand::Rename { old, new }) } => {
            documents::rename(&config, old, new, out)
        }
        Command::Reclaim => documents::reclaim(&config, out),
        Command::Search { query } => ask::search(&config, &query.join(" "), out),
        Command::Ask { question, compare } => ask::run(&config, &question.join(" "), compare, out),
        Command::Chat(args) => {
            let documents = args.documents || cli.common.settings.collection.is_some();
            chat::run(&config, &args, documents, out)
        }
        Command::Pull { id } => pull::run(&id, out),
        Command::Serve => serve::run(settings, out),
        Command::Cache { command } => cache::run(&config, &command, out),
        Command::Catalog { command } => catalog::run(&config, &command, out),
        Command::Doctor => doctor::run(settings, out),
        Command::Config { command: args::ConfigCommand::Show } => {
            config::show(&config, out);
            Ok(())
        }
        Command::Demo { documents } => demo::run(settings, documents.as_deref(), out),
        Command::Completions { .. } => Ok(()),
    }
}

/// Reads the settings, and begins to log as they say.
///
/// # Errors
/// [`QuireError::Config`]: a setting or a file of settings is wrong.
pub fn load_config(common: &CommonArgs) -> Result<Config> {
    let config = Config::load(&common.settings, common.config.as_deref())?;
    start_log(&config.settings.log)?;
    for variable in &config.unknown_variables {
        tracing::warn!("{variable} is no setting of quire; `quire config show` lists them");
    }
    Ok(config)
}

fn start_log(filter: &str) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).map_err(|e| QuireError::Config {
        setting: "log".into(),
        origin: "settings".into(),
        problem: format!("expected a level or a filter as of tracing, found `{filter}`: {e}"),
    })?;
    // A second start in one process, as in tests, keeps the first.
    let _ =
        // A log that cannot be written must not end the program, which reporting that on stderr would.
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(terminal::SafeStderr)
            .log_internal_errors(false)
            .with_ansi(false)
            .try_init();
    Ok(())
}
