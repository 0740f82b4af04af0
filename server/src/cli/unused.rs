//! Flags of settings that a command does not use: they are refused, so that nobody believes that they had an effect.
//!
//! Values of files and of the environment are for all commands, and each takes what it uses.

use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Command};

use settings::{SETTINGS, Setting};

/// Refuses flags of settings that the command which was called does not use. `setting_name` says what the table of settings
/// calls it.
///
/// # Errors
/// [`ErrorKind::UnknownArgument`], naming the first such flag, and the commands that use it.
pub(super) fn refuse(
    grammar: &mut Command,
    setting_name: fn(&str) -> String,
    matches: &ArgMatches,
) -> Result<(), clap::Error> {
    let (path, given) = called(matches);
    let name = setting_name(&path);
    let Some(setting) = given.into_iter().find(|setting| !setting.is_used_by(&name)) else { return Ok(()) };
    let flag = setting.key.replace('_', "-");
    let users: Vec<String> = setting.commands.iter().map(|name| format!("`{}`", user(name))).collect();
    let message = format!(
        "`{} {path}` does not use --{flag}: leave it out. Used by {}. In a file or in the environment it may stay",
        grammar.get_name(),
        users.join(", ")
    );
    Err(grammar.error(ErrorKind::UnknownArgument, message))
}

/// How a command of the table of settings is called.
fn user(name: &str) -> String {
    match name.strip_prefix("bench") {
        Some(which) => format!("quire-bench{which}"),
        None if name == "eval" => "quire-bench eval".into(),
        None => format!("quire {name}"),
    }
}

/// The command's name, as in `cache stats`, and the settings whose flags were given anywhere.
fn called(matches: &ArgMatches) -> (String, Vec<&'static Setting>) {
    let (mut at, mut names, mut given) = (matches, Vec::new(), Vec::new());
    loop {
        let is_given = |setting: &&Setting| {
            at.ids().any(|id| id == setting.key) && at.value_source(setting.key) == Some(ValueSource::CommandLine)
        };
        given.extend(SETTINGS.iter().filter(is_given));
        let Some((name, below)) = at.subcommand() else { break };
        names.push(name);
        at = below;
    }
    (names.join(" "), given)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::ffi::OsString;

    use super::super::parse::parse;

    fn refusal(line: &str) -> Option<String> {
        let error = parse(line.split(' ').map(OsString::from)).err()?;
        assert_eq!(error.exit_code(), 2, "{error}");
        Some(error.to_string())
    }

    #[test]
    fn a_flag_that_the_command_does_not_use_is_refused_wherever_it_stands() {
        for (line, flag) in [
            ("quire ls --temperature 1", "--temperature"),
            ("quire --temperature 1 ls", "--temperature"),
            ("quire -m folder search lamp", "--model"),
            ("quire cache stats --no-prefix-cache", "--prefix-cache"),
            ("quire cache --top-chunks 3 stats", "--top-chunks"),
            ("quire pull a/b --data-dir x", "--data-dir"),
            ("quire collections -c notes", "--collection"),
            ("quire ask Who? --host 0.0.0.0", "--host"),
            ("quire completions bash --log info", "--log"),
        ] {
            let error = refusal(line).unwrap_or_else(|| panic!("{line} is taken"));
            assert!(error.contains(&format!("does not use {flag}")) && error.contains("Used by `quire "), "{error}");
        }
        let error = refusal("quire ls --temperature 1").unwrap();
        assert!(error.contains("`quire ls`") && error.contains("`quire ask`, `quire chat`"), "{error}");
    }

    #[test]
    fn what_a_command_uses_is_taken_wherever_it_stands() {
        for line in [
            "quire --temperature 1 ask Who?",
            "quire ask --temperature 1 Who? -d x -m y -c z",
            "quire -d x --log info cache --no-server stats",
            "quire config show --temperature 1 --host ::1",
            "quire serve --no-prefix-cache --temperature 0 --lazy",
            "quire rm -c notes -m folder --tenant t --now",
        ] {
            assert_eq!(refusal(line), None, "{line}");
        }
    }
}
