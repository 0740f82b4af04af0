//! `quire-bench`: measurements and drills of Quire, from the command line to records.
//!
//! Whoever runs Quire does not need it, and `quire` contains none of it. Options become those of the library `eval`, which
//! measures and records; what needs whole programs, servers and data folders is measured here:
//!
//! * `args`, `store_args`: the grammar; `dispatch`: from its commands to options; `cache`: caches simulated;
//! * `quality`, `load`, `search`, `library`: quality, engines under load, finding passages, many small notes;
//! * `child`, `start`, `http`: a server of its own, how soon it is ready, how it bears many clients;
//! * `crash`, `library_drill`: processes that are killed at work, and what is left; `findings`: what both count;
//! * `library_bitflips`: a catalog whose files are damaged.

mod args;
mod cache;
mod child;
mod crash;
mod dispatch;
mod error;
mod findings;
mod http;
mod library;
mod library_bitflips;
mod library_drill;
mod load;
mod quality;
mod search;
mod start;
mod store_args;

use std::ffi::OsString;
use std::process::ExitCode;

use args::Cli;
use quire::cli::{Out, load_config, parse_as, print_usage};
use settings::full_message;

/// Runs a command line, the program's name first, and says with which code the process ends: 0 done, 1 failed, 2 wrong usage.
#[must_use]
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match parse_as::<Cli>(words, setting_name) {
        Ok(cli) => cli,
        Err(usage) => return print_usage(&usage),
    };
    let out = Out::new(&cli.common);
    let outcome = measure(cli, &out).map_err(|error| (full_message(&error), error.exit_code()));
    out.end(outcome)
}

/// Whether a command line, the program's name first, is taken; runs nothing.
///
/// # Errors
/// Wrong usage, help and version, as clap tells them.
pub fn check(words: impl IntoIterator<Item = OsString>) -> Result<(), clap::Error> {
    parse_as::<Cli>(words, setting_name).map(|_| ())
}

fn measure(cli: Cli, out: &Out) -> error::Result<()> {
    let config = load_config(&cli.common)?;
    dispatch::run(&config.settings, cli.command, out)
}

/// What the table of settings calls a command of this program.
fn setting_name(path: &str) -> String {
    if path == "eval" { path.into() } else { format!("bench {path}") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use quire::cli::grammar;

    #[test]
    fn the_grammar_is_consistent() {
        grammar::<Cli>(setting_name).debug_assert();
    }

    #[test]
    fn help_shows_the_settings_that_a_measurement_uses() {
        let help = |line: &str| check(line.split(' ').map(Into::into)).unwrap_err().to_string();
        assert!(help("quire-bench decode --help").contains("--strategy"));
        assert!(
            !help("quire-bench decode --help").contains("--host <")
                && help("quire-bench start --help").contains("--host <")
        );
        let eval = help("quire-bench eval --help");
        assert!(eval.contains("--strategy") && !eval.contains("--data-dir"), "{eval}");
    }

    #[test]
    fn settings_name_measurements_that_there_are() {
        let root = grammar::<Cli>(setting_name);
        let known: Vec<&str> = root.get_subcommands().map(clap::Command::get_name).collect();
        for setting in settings::SETTINGS {
            for name in setting.commands.iter().filter_map(|name| name.strip_prefix("bench ")) {
                assert!(known.contains(&name), "{}: {name}", setting.key);
            }
        }
    }
}
